"""The whole attention of new tokens over a cache of pages."""

from __future__ import annotations

import torch
from torch import Tensor

from ....config import NSAConfig
from ....types import KVPages, NSAOutput
from ....validation import bad
from ..decode import DecodeShape, launch_decode
from ..primitives import on_its_device
from ..tuning import DecodeTiles

# New tokens of a sequence whose scores are kept at once, if they take no more bytes than this.
TOKENS_AT_ONCE, SCORE_BYTES = 16, 1 << 30
POOLS = ("k", "v", "k_window", "v_window", "k_compressed", "v_compressed")


def nsa_attention_with_kvcache(
    q: Tensor, gates: Tensor, pages: KVPages, config: NSAConfig, softmax_scale: float
) -> NSAOutput:
    """As `reference.nsa_attention_with_kvcache`, by Triton kernels. No gradients, nothing waits for the device.

    Args:
        q: `[B, S, Hq, Dk]`.
        gates: `[B, S, Hq, 3]` or `[B, S, 1, 3]`.
        pages: may be views, of pages or of tokens of a larger pool.
        config: the sizes.
        softmax_scale: factor of the scores.

    Raises:
        ValueError: if heads of a pool are not adjacent, or their channels not contiguous.
    """
    for name in POOLS:
        pool = getattr(pages, name)
        adjacent = pool.shape[2] == 1 or pool.stride(2) == pool.shape[3]
        if not adjacent or (pool.stride(3) != 1 and pool.shape[3] > 1):
            expected = "of adjacent heads with contiguous channels, strides (.., .., D, 1)"
            raise bad(f"pages.{name}", expected, pool.stride(), "lay it out so, a copy for each call would be slow")
    tensors = (x.detach() for x in (q, gates, *(getattr(pages, name) for name in POOLS)))
    out, block_indices = _with_kvcache(
        *tensors, pages.page_table, pages.seq_lens, config.kernel_size, config.kernel_stride, config.block_size,
        config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks, config.window_size, softmax_scale,
    )  # fmt: skip
    return NSAOutput(out, block_indices)


@torch.library.custom_op("flash_sparse_attention::nsa_attention_with_kvcache_triton", mutates_args=())
@on_its_device
def _with_kvcache(
    q: Tensor,
    gates: Tensor,
    k: Tensor,
    v: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    k_compressed: Tensor,
    v_compressed: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """out and block_indices."""
    config = NSAConfig(
        kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks, window_size
    )
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    pages = KVPages(k, v, k_window, v_window, k_compressed, v_compressed, page_table, seq_lens.contiguous())
    tokens = q.shape[1]
    shape = DecodeShape.of(q, pages, config)
    sizes = shape.num_kv_heads, shape.group, (q.shape[3], v.shape[3]), q.dtype, shape.chunks, config
    step = max(1, min(TOKENS_AT_ONCE, tokens, SCORE_BYTES // shape.score_bytes))
    parts = []
    for begin in range(0, tokens, step):
        some = slice(begin, min(begin + step, tokens))
        tiles = DecodeTiles.of(shape.batch, some.stop - begin, *sizes)
        given = q[:, some], gates[:, some].contiguous(), pages, config, softmax_scale
        parts.append(launch_decode(*given, tokens - begin, tiles))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], 1), torch.cat([indices for _, indices in parts], 1)


@_with_kvcache.register_fake
def _(
    q: Tensor, gates: Tensor, k: Tensor, v: Tensor, k_window: Tensor, v_window: Tensor, k_compressed: Tensor,
    v_compressed: Tensor, page_table: Tensor, seq_lens: Tensor, kernel_size: int, kernel_stride: int, block_size: int,
    num_selected_blocks: int, *rest: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(*q.shape[:2], k.shape[2], num_selected_blocks, dtype=torch.int32)
