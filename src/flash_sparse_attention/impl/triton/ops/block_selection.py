"""Block selection."""

from __future__ import annotations

import torch
from torch import Tensor

from ....types import SequenceLayout
from ..block_scores import launch_select_blocks
from ..primitives import dense_rows, on_its_device
from ..tuning import score_tiles
from .interval import key_bounds, query_and_key_bounds


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
    """As `reference.select_blocks`, by Triton kernels: int32 `[N, Hk, T]`."""
    sizes = kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks
    tensors = q.detach(), k_compressed.detach(), lse.detach(), *query_and_key_bounds(layout)
    return _select_blocks(*tensors, layout.keys.max_length, *sizes, softmax_scale)


@torch.library.custom_op("flash_sparse_attention::select_blocks_triton", mutates_args=())
@on_its_device
def _select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    max_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    softmax_scale: float,
) -> Tensor:
    """`max_length`: tokens of the longest sequence. `cu_seqlens_k`: as `interval._interval_attention`."""
    if q.shape[0] == 0:
        return _empty_indices(q, k, num_selected_blocks)
    q, k, lse = dense_rows(q), dense_rows(k), lse.float().contiguous()
    return launch_select_blocks(
        q, k, lse, cu_seqlens, key_bounds(cu_seqlens, cu_seqlens_k, kernel_size, kernel_stride), max_length,
        kernel_size, kernel_stride, block_size, num_selected_blocks, num_init_blocks, num_local_blocks, softmax_scale,
        score_tiles(q.shape[2], q.dtype), cu_seqlens_k,
    )  # fmt: skip


def _empty_indices(q: Tensor, k: Tensor, num_selected_blocks: int) -> Tensor:
    return q.new_empty(q.shape[0], k.shape[1], num_selected_blocks, dtype=torch.int32)


@_select_blocks.register_fake
def _(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, max_length: int,
    kernel_size: int, kernel_stride: int, block_size: int, num_selected_blocks: int, num_init_blocks: int,
    num_local_blocks: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    return _empty_indices(q, k, num_selected_blocks)
