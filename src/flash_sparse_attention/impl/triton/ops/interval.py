"""Interval attention: the compressed branch and the sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from ....geometry import Interval
from ....types import AttentionOutput, SequenceLayout
from ..compress import launch_key_bounds
from ..delta import launch_shifts
from ..interval import IntervalSizes, launch_interval_dkv, launch_interval_dq, launch_interval_fwd
from ..primitives import dense_rows, on_its_device
from ..tuning import interval_schedule


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, interval: Interval, layout: SequenceLayout, softmax_scale: float
) -> AttentionOutput:
    """As `reference.interval_attention`, by Triton kernels.

    Args:
        q: `[N, Hq, Dk]`; k: `[M, Hk, Dk]`; v: `[M, Hk, Dv]`.
        interval: which keys a query sees.
        layout: of the N queries, the last tokens of their sequences.
        softmax_scale: factor of the scores.
    """
    sizes = interval.kernel_size, interval.kernel_stride, interval.window_size or 0
    return AttentionOutput(*_interval_attention(q, k, v, *query_and_key_bounds(layout), *sizes, softmax_scale))


def query_and_key_bounds(layout: SequenceLayout) -> tuple[Tensor, Tensor | None]:
    """Bounds of the queries, and of the tokens that have keys; None for these where all have queries."""
    return layout.cu_seqlens, None if layout.with_past is None else layout.with_past.cu_seqlens


def key_bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, kernel_size: int, kernel_stride: int) -> Tensor:
    """Bounds of the keys of each sequence, int32 `[B + 1]`."""
    tokens = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if kernel_size == kernel_stride == 1:
        return tokens
    return launch_key_bounds(tokens, kernel_size, kernel_stride)


@torch.library.custom_op("flash_sparse_attention::interval_attention_triton", mutates_args=())
@on_its_device
def _interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """out and lse; `window_size` 0 stands for no bound. `cu_seqlens_k` None: all tokens that have keys have queries."""
    if q.shape[0] == 0:
        return _empty_outputs(q, v)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    bounds = cu_seqlens, key_bounds(cu_seqlens, cu_seqlens_k, kernel_size, kernel_stride)
    schedule = interval_schedule(q.shape[2], v.shape[2], q.dtype, window_size > 0)
    sizes = IntervalSizes.of(kernel_size, kernel_stride, window_size, softmax_scale)
    return launch_interval_fwd(q, k, v, *bounds, sizes, schedule.forward, cu_seqlens_k)


@torch.library.custom_op("flash_sparse_attention::interval_attention_triton_backward", mutates_args=())
@on_its_device
def _interval_attention_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again from lse."""
    dq = q.new_empty(q.shape)
    if q.shape[0] == 0:
        return dq, k.new_zeros(k.shape), v.new_zeros(v.shape)
    d_out, q, k, v = map(dense_rows, (d_out, q, k, v))
    bounds = cu_seqlens, key_bounds(cu_seqlens, cu_seqlens_k, kernel_size, kernel_stride)
    schedule = interval_schedule(q.shape[2], v.shape[2], q.dtype, window_size > 0)
    sizes = IntervalSizes.of(kernel_size, kernel_stride, window_size, softmax_scale)
    given = d_out, q, k, v, *launch_shifts(d_out, d_lse, out, lse)
    launch_interval_dq(*given, *bounds, sizes, schedule.dq, dq, cu_seqlens_k=cu_seqlens_k)
    return dq, *launch_interval_dkv(*given, *bounds, sizes, schedule.dkv, cu_seqlens_k)


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


def _save(ctx, inputs, output):
    # Zeros where nobody differentiates lse would take time and memory.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.sizes = inputs[5:]


def _differentiate(ctx, d_out, d_lse):
    # Once: activation checkpointing refuses to give them a second time.
    saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(saved[5])
    return (*_interval_attention_backward(d_out, d_lse, *saved, *ctx.sizes), *[None] * 6)


_interval_attention.register_fake(lambda q, k, v, *_: _empty_outputs(q, v))
_interval_attention_backward.register_fake(
    lambda d_out, d_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
_interval_attention.register_autograd(_differentiate, setup_context=_save)
