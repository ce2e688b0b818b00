"""The operators that `torch` sees: custom operators with shapes for tracing and gradients, over the launchers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ....types import AttentionOutput, SequenceLayout
from ....validation import bad
from ..delta import launch_shifts, shift_bytes
from ..inverted_index import Chunks, InvertedIndex, build_index, mark_valid
from ..primitives import dense_rows, on_its_device
from ..selected_kv_outer import launch_selected_bwd_kv_outer, launch_selected_fwd_kv_outer, takes_near_kernels
from ..selected_query_outer import launch_selected_dq_query_outer, launch_selected_fwd_query_outer
from ..tuning import SelectedShape, loop_orders_of, tiles_of
from .interval import query_and_key_bounds

MAX_PAIRS = 2**31
# Partial results, of the workspace at most and at least, and of what longer sequences leave of it.
PARTIAL_SHARE, LEAST_SHARE, SHARE_OF_REST = 0.6, 0.25, 0.7


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: SequenceLayout,
    softmax_scale: float,
    loop_order: str = "auto",
    workspace_mib: int = 1024,
    save_index: bool = True,
) -> AttentionOutput:
    """As `reference.selected_attention`, by Triton kernels in either loop order.

    Args:
        q: `[N, Hq, Dk]`; k: `[M, Hk, Dk]`; v: `[M, Hk, Dv]`; block_indices: int32 `[N, Hk, T]`.
        block_size: tokens of a block.
        layout: of the N queries, the last tokens of their sequences.
        softmax_scale: factor of the scores.
        loop_order: `kv_outer`, `query_outer`, or `auto`, which takes what was measured to be faster in each pass.
        workspace_mib: bound of the partial results that the KV-outer order keeps at a time, MiB.
        save_index: keep the inverted index for the backward pass; otherwise it is built again.

    Raises:
        ValueError: if the selection has 2**31 entries or more.
    """
    if block_indices.numel() >= MAX_PAIRS:
        raise bad("block_indices", f"of fewer than {MAX_PAIRS} entries", block_indices.numel(), "split the pack")
    tensors = q, k, v, block_indices, *query_and_key_bounds(layout)
    out, lse, *_ = _selected_attention(*tensors, block_size, softmax_scale, loop_order, workspace_mib, save_index)
    return AttentionOutput(out, lse)


@torch.library.custom_op("flash_sparse_attention::selected_attention_triton", mutates_args=())
@on_its_device
def _selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
    save_index: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, and the inverted index (place, pairs, bucket_ends) if it is kept, three empty tensors if not.

    `cu_seqlens_k`: as `interval._interval_attention`.
    """
    if q.shape[0] == 0:
        return _empty_outputs(q, v, block_indices)
    tensors = dense_rows(q), dense_rows(k), dense_rows(v), block_indices.contiguous(), cu_seqlens, cu_seqlens_k
    return attend_selected(*tensors, block_size, softmax_scale, loop_order, workspace_mib, save_index)


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
    save_index: bool,
    saved: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_selected_attention`, for tensors whose rows are dense, by a saved index if there is one."""
    shape = SelectedShape.of(q, k, v, block_indices, block_size)
    tiles = tiles_of(shape)
    if loop_orders_of(shape, loop_order).forward == "query_outer":
        place = mark_valid(block_indices, cu_seqlens, block_size, cu_seqlens_k)
        out, lse = launch_selected_fwd_query_outer(
            q, k, v, block_indices, place, cu_seqlens, block_size, softmax_scale, tiles.query_outer, cu_seqlens_k
        )
        return out, lse, *nothing(q)
    split = takes_near_kernels(tiles.kv_outer_forward, q, k, v)
    sizes = block_size, workspace_mib
    index = _index(shape, block_indices, k.shape[0], cu_seqlens, cu_seqlens_k, *sizes, saved, split)
    out, lse = launch_selected_fwd_kv_outer(
        q, k, v, block_indices, index, cu_seqlens, block_size, softmax_scale, tiles.kv_outer_forward, cu_seqlens_k
    )
    if not save_index:
        return out, lse, *nothing(q)
    return out, lse, index.place, index.pairs, index.bucket_ends


@torch.library.custom_op("flash_sparse_attention::selected_attention_triton_backward", mutates_args=())
@on_its_device
def _selected_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    place: Tensor,
    pairs: Tensor,
    bucket_ends: Tensor,
    block_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again from lse."""
    if q.shape[0] == 0:
        return _empty_gradients(q, k, v)
    q, k, v, d_out = map(dense_rows, (q, k, v, d_out))
    shift, delta = launch_shifts(d_out, d_lse, out, lse)
    tensors = d_out, q, k, v, block_indices.contiguous(), cu_seqlens, cu_seqlens_k, shift, delta
    return differentiate_selected(
        *tensors, place, pairs, bucket_ends, block_size, softmax_scale, loop_order, workspace_mib
    )


def differentiate_selected(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    shift: Tensor,
    delta: Tensor,
    place: Tensor,
    pairs: Tensor,
    bucket_ends: Tensor,
    block_size: int,
    softmax_scale: float,
    loop_order: str,
    workspace_mib: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, whose rows are dense; `shift` and `delta` are those of `launch_shifts`."""
    shape = SelectedShape.of(q, k, v, block_indices, block_size)
    tiles = tiles_of(shape)
    saved = place, pairs, bucket_ends
    index = _index(shape, block_indices, k.shape[0], cu_seqlens, cu_seqlens_k, block_size, workspace_mib, saved)
    sizes = cu_seqlens, block_size, softmax_scale
    given = d_out, q, k, v, shift, delta
    if loop_orders_of(shape, loop_order).backward == "query_outer":
        dq = launch_selected_dq_query_outer(*given, block_indices, index.place, *sizes, tiles.query_outer, cu_seqlens_k)
        dk, dv = launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, None, cu_seqlens_k)
        return dq, dk, dv
    dq = q.new_empty(q.shape)
    dk, dv = launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, dq, cu_seqlens_k)
    return dq, dk, dv


def kept_index(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    loop_order: str,
    workspace_mib: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Storage for the inverted index that a forward pass keeps: place, pairs, bucket_ends; empty if it builds none."""
    shape = SelectedShape.of(q, k, v, block_indices, block_size)
    if loop_orders_of(shape, loop_order).forward == "query_outer":
        return nothing(q)
    chunks = chunks_of(shape, block_indices, k.shape[0], cu_seqlens, workspace_mib)
    place, pairs = block_indices.new_empty(block_indices.shape), block_indices.new_empty(block_indices.numel())
    return place, pairs, block_indices.new_empty(chunks.bucket_ends)


def chunks_of(
    shape: SelectedShape, block_indices: Tensor, total_keys: int, cu_seqlens: Tensor, workspace_mib: int
) -> Chunks:
    """How both passes cut the work; the same, so that they can share an index."""
    parts = triton.cdiv(shape.block_size, tiles_of(shape).kv_outer_backward.keys)
    row_bytes = max(shape.dim_v * shape.dtype.itemsize + 4, shape.dim_k * shape.dtype.itemsize * parts)
    # The forward pass also keeps the places of far entries, and which near blocks a query selected; the backward pass
    # shift and delta, dK and dV of the segments, and sums of those where tokens are cut: of long sequences 8 bits each.
    workspace = workspace_mib << 20
    entries = shape.total_tokens * shape.num_kv_heads
    forward = 4 * entries * (shape.slots + 1)
    sums = total_keys * (shape.dim_k + shape.dim_v) * (1 if shape.dtype.itemsize == 2 else 4)
    backward = shift_bytes(entries * shape.group) + sums
    left = workspace - max(forward, backward)
    partial_bytes = int(max(LEAST_SHARE * workspace, min(PARTIAL_SHARE * workspace, SHARE_OF_REST * left)))
    num_sequences = cu_seqlens.numel() - 1
    sizes = shape.block_size, shape.group * row_bytes, partial_bytes
    return Chunks.fit(block_indices, total_keys, num_sequences, *sizes)


def _index(
    shape: SelectedShape,
    block_indices: Tensor,
    total_keys: int,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    workspace_mib: int,
    saved: tuple[Tensor, Tensor, Tensor] | None = None,
    split: bool = False,
) -> InvertedIndex:
    """The inverted index: the one that was saved, or built, with `split` as that of `build_index`."""
    chunks = chunks_of(shape, block_indices, total_keys, cu_seqlens, workspace_mib)
    if saved is not None and saved[0].numel() > 0:
        return InvertedIndex(chunks, *saved)
    return build_index(block_indices, cu_seqlens, block_size, chunks, cu_seqlens_k, split)


def nothing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of an index that is not kept."""
    place, pairs, bucket_ends = (torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(3))
    return place, pairs, bucket_ends


def _empty_outputs(q: Tensor, v: Tensor, block_indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, lse = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
    return out, lse, *nothing(block_indices)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)


def _save(ctx, inputs, output):
    # Zeros for what nobody differentiates, an index among it, would take time and memory.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], *output)
    # Not whether the index is kept: an empty one is not.
    ctx.sizes = inputs[6:-1]


def _differentiate(ctx, d_out, d_lse, *_):
    # Once: activation checkpointing refuses to give them a second time.
    saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[6])
    return (*_selected_attention_backward(d_out, d_lse, *saved, *ctx.sizes), *[None] * 8)


@_selected_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None,
    block_size: int, softmax_scale: float, loop_order: str, workspace_mib: int, save_index: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out, lse, *index = _empty_outputs(q, v, block_indices)
    if save_index:
        index = [*kept_index(q, k, v, block_indices, cu_seqlens, block_size, loop_order, workspace_mib)]
    return out, lse, index[0], index[1], index[2]


_selected_attention_backward.register_fake(lambda d_out, d_lse, q, k, v, *_: _empty_gradients(q, k, v))
_selected_attention.register_autograd(_differentiate, setup_context=_save)
