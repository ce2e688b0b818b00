"""Block selection: the scores of a tile of queries become block importances, and those T blocks a query.

Shape suffixes: T queries of a tile, S keys (compressed tokens), K key/value heads, R (query, head of the group) rows,
D head dimension, J blocks, N selected blocks.
"""

import math

import torch
from torch import Tensor

from ... import geometry
from ...geometry import Interval
from ...precision import no_autocast
from ...types import SequenceLayout
from .common import LOG2_E, Scratch, head_major, layout_of, normaliser_log2, rows
from .interval import tiles


def select_blocks(
    q: Tensor,
    k_compressed: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    layout: SequenceLayout,
    softmax_scale: float,
) -> Tensor:
    """As `reference.select_blocks`; the scores of a tile of queries become block importances, and T blocks a query."""
    sizes = kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks
    return _select_blocks(
        q.detach(),
        k_compressed.detach(),
        lse.detach(),
        layout.cu_seqlens,
        layout.keys.cu_seqlens,
        *sizes,
        softmax_scale=softmax_scale,
    )


@torch.library.custom_op("flash_sparse_attention::select_blocks_blockwise", mutates_args=())
def _select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    softmax_scale: float,
) -> Tensor:
    layout = layout_of(cu_seqlens, cu_seqlens_k)
    positions, num_kv_heads = layout.positions(), k.shape[1]
    group = q.shape[1] // num_kv_heads
    key_position_S = layout.compressed(kernel_size, kernel_stride).positions()
    indices = torch.empty((q.shape[0], num_kv_heads, num_selected_blocks), dtype=torch.int32, device=q.device)
    chunks_per_window, chunks_per_block = kernel_size // kernel_stride, block_size // kernel_stride
    overlaps = overlaps_of(kernel_size, kernel_stride, block_size)
    with no_autocast(q):
        k_KSD = head_major(k) * (softmax_scale * LOG2_E)
        scratch = Scratch(k_KSD)
        less_normaliser_KN1 = rows(normaliser_log2(lse.to(k_KSD.dtype)).neg_(), num_kv_heads)
        for tile in tiles(Interval(kernel_size, kernel_stride), layout, q.shape[1]):
            at = tile.queries
            q_KRD = scratch.rows("q", q[at], num_kv_heads)
            less_normaliser_KR1 = less_normaliser_KN1[:, at.start * group : at.stop * group]
            blocks_T = geometry.num_eligible_blocks(positions[at], block_size)
            num_blocks = int(blocks_T.max())
            # Probability of each window of the query's own sequence, summed over the group, with room at both ends.
            columns = len(overlaps) + (num_blocks - 1) * chunks_per_block
            p_KTS = scratch.empty("p", num_kv_heads, len(blocks_T), columns).zero_()
            for span in tile.spans():
                p_KRS = scratch.product("scores", q_KRD, k_KSD[:, span].mT, plus=less_normaliser_KR1).exp2_()
                group_KTS = tile.clear_(p_KRS, span).unflatten(1, (len(blocks_T), -1)).sum(2)
                if tile.one_sequence:
                    column = span.start - tile.keys.start + chunks_per_window - 1
                    p_KTS[..., column : column + group_KTS.shape[-1]] = group_KTS
                else:
                    # Of a sequence without queries there may be more keys than columns; what is hidden adds 0 anywhere.
                    column_S = (key_position_S[span] + chunks_per_window - 1).clamp(max=columns - 1)
                    p_KTS.index_add_(2, column_S, group_KTS)
            importance_KTJ = q_KRD.new_zeros(num_kv_heads, len(blocks_T), num_blocks)
            shared_chunks(p_KTS, overlaps, chunks_per_block, importance_KTJ)
            forced = num_init_blocks, num_local_blocks
            chosen_KTN = keep_largest(importance_KTJ, positions[at], block_size, *forced, num_selected_blocks)
            indices[at] = chosen_KTN.transpose(0, 1).to(torch.int32)
    return indices


def overlaps_of(kernel_size: int, kernel_stride: int, block_size: int) -> list[int]:
    """Chunks that a block shares with each window that overlaps it, the oldest window first."""
    chunks_per_window, chunks_per_block = kernel_size // kernel_stride, block_size // kernel_stride
    # Windows 1 - chunks_per_window .. chunks_per_block - 1, counted from a block's own first chunk, overlap it.
    near = range(1 - chunks_per_window, chunks_per_block)
    return [geometry.overlap(window, 0, kernel_size, kernel_stride, block_size) for window in near]


def shared_chunks(p_KTS: Tensor, overlaps: list[int], chunks_per_block: int, importance_KTJ: Tensor) -> None:
    """Adds to the importance of each block the probabilities of the windows that overlap it, weighted.

    `p_KTS` has l / d - 1 columns before that of window 0, and columns up to the last block's last window.
    """
    num_blocks = importance_KTJ.shape[-1]
    for first, shared in enumerate(overlaps):
        importance_KTJ.add_(p_KTS[..., first::chunks_per_block][..., :num_blocks], alpha=shared)


def keep_largest(
    importance_KTJ: Tensor,
    position_T: Tensor,
    block_size: int,
    num_init_blocks: int,
    num_local_blocks: int,
    num_selected_blocks: int,
) -> Tensor:
    """The blocks that queries at these positions keep, `[K, T, N]`, ascending, -1 in unused slots.

    Writes over `importance_KTJ`. A query at a negative position keeps none.
    """
    blocks_J = torch.arange(importance_KTJ.shape[-1], device=importance_KTJ.device)
    local_T = geometry.first_local_block(position_T, block_size, num_local_blocks)
    importance_KTJ.masked_fill_((blocks_J < num_init_blocks) | (blocks_J >= local_T[:, None]), math.inf)
    eligible_T = geometry.num_eligible_blocks(position_T, block_size)
    importance_KTJ.masked_fill_(blocks_J >= eligible_T[:, None], -math.inf)
    chosen_KTN = _largest(importance_KTJ, min(num_selected_blocks, len(blocks_J)))
    return torch.nn.functional.pad(chosen_KTN, (0, num_selected_blocks - chosen_KTN.shape[-1]), value=-1)


def _largest(importance_KTJ: Tensor, count: int) -> Tensor:
    """The `count` blocks of largest importance, ascending, -1 at the end for those at -inf; ties to the lower block."""
    num_blocks = importance_KTJ.shape[-1]
    if importance_KTJ.dtype == torch.float32:
        # topk keeps no order among equals, so the block number goes into the low half of a 64-bit key; the bits of
        # non-negative floats are ordered as the floats are.
        bits = importance_KTJ.view(torch.int32).long().masked_fill_(importance_KTJ < 0, -1)
        key = (bits << 32) | (num_blocks - 1 - torch.arange(num_blocks, device=bits.device))
        top = key.topk(count, sorted=False)
        chosen = top.indices.masked_fill(top.values < 0, num_blocks)
    else:
        ordered = importance_KTJ.sort(dim=-1, descending=True, stable=True)
        chosen = ordered.indices[..., :count].masked_fill(ordered.values[..., :count] == -math.inf, num_blocks)
    chosen = chosen.sort(-1).values
    return chosen.masked_fill(chosen == num_blocks, -1)


_select_blocks.register_fake(
    lambda q, k, lse, cu_seqlens, cu_seqlens_k, kernel_size, kernel_stride, block_size, num_selected_blocks, *_: (
        q.new_empty(q.shape[0], k.shape[1], num_selected_blocks, dtype=torch.int32)
    )
)
