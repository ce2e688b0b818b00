"""Compression as `torch` sees it: custom operators with shapes for tracing and gradients, over the launchers."""

from __future__ import annotations

from collections import Counter
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .... import geometry
from ....types import Compression, SequenceLayout
from ..compress import (
    Windows,
    launch_compress_linear,
    launch_compress_linear_dweight,
    launch_compress_linear_dx,
    launch_compress_pooled,
    launch_compress_pooled_dweight,
    launch_compress_pooled_dx,
    launch_key_bounds,
)
from ..primitives import dense_rows, on_its_device


def compress(
    x: Tensor, compression: Compression, kernel_size: int, kernel_stride: int, layout: SequenceLayout
) -> Tensor:
    """As `reference.compress`, by Triton kernels: `[N, Hk, D]` -> `[M, Hk, D]`, the dtype of x.

    Sums are float32. Matrices of the first layer are rounded to the dtype of x for the products; the second layer of
    `mlp`, and all that a position embedding adds, are float32.
    """
    # By length, as windows of a cache come as thousands of sequences of one length; traced, lengths may be symbols.
    lengths = zip(layout.lengths, repeat(1)) if torch.compiler.is_compiling() else Counter(layout.lengths).items()
    num_windows = sum(
        geometry.num_compressed_tokens(length, kernel_size, kernel_stride) * count for length, count in lengths
    )
    sizes = layout.cu_seqlens, kernel_size, kernel_stride, num_windows
    # A position embedding adds the same to every window.
    position = None if compression.position_embedding is None else compression.position_embedding.float()
    constant = None
    if compression.kind in ("mean", "weighted"):
        weight = None if compression.weight is None else compression.weight.float()
        if position is not None:
            constant = position.mean(0).expand(x.shape[1:]) if weight is None else weight @ position
        out: Tensor = _compress_pooled(x, weight, constant, *sizes)[0]
        return out
    assert compression.weight is not None, "validated at the public boundary"
    weight = compression.weight.to(x.dtype)
    if position is not None:
        constant = position.flatten() @ compression.weight.float()
    if compression.kind == "linear":
        out = _compress_linear(x, weight, constant, *sizes, x.dtype)[0]
        return out
    if compression.bias is not None:
        constant = compression.bias.float() if constant is None else compression.bias.float() + constant
    hidden = F.gelu(_compress_linear(x, weight, constant, *sizes, torch.float32)[0])
    assert compression.weight_out is not None, "validated at the public boundary"
    out = torch.bmm(hidden.transpose(0, 1), compression.weight_out.float()).transpose(0, 1)
    if compression.bias_out is not None:
        out = out + compression.bias_out.float()
    return out.to(x.dtype).contiguous()


@torch.library.custom_op("flash_sparse_attention::compress_pooled_triton", mutates_args=())
@on_its_device
def _compress_pooled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    num_windows: int,
) -> tuple[Tensor, Tensor]:
    """Weighted sums (means without `weight` float32 `[Hk, l]`) plus `bias` float32 `[Hk, D]`; and the bounds of the
    windows of each sequence."""
    bounds = launch_key_bounds(cu_seqlens, kernel_size, kernel_stride)
    if num_windows == 0:
        return x.new_empty(0, *x.shape[1:]), bounds
    windows = Windows(cu_seqlens, bounds, x.shape[0], num_windows, kernel_size, kernel_stride)
    return launch_compress_pooled(dense_rows(x), _contiguous(weight), _contiguous(bias), windows), bounds


@torch.library.custom_op("flash_sparse_attention::compress_pooled_triton_backward", mutates_args=())
@on_its_device
def _compress_pooled_backward(
    d_out: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    cu_seqlens: Tensor,
    bounds: Tensor,
    total_tokens: int,
    kernel_size: int,
    kernel_stride: int,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights, each empty if it is not wanted; `x` is for the latter."""
    num_windows, num_heads, dim = d_out.shape
    dx, dweight = (d_out.new_empty(0) for _ in range(2))
    if num_windows == 0:
        if with_dx:
            dx = d_out.new_zeros(total_tokens, num_heads, dim)
        if with_dweight:
            dweight = d_out.new_zeros(num_heads, kernel_size, dtype=torch.float32)
        return dx, dweight
    d_out = dense_rows(d_out)
    windows = Windows(cu_seqlens, bounds, total_tokens, num_windows, kernel_size, kernel_stride)
    if with_dx:
        dx = launch_compress_pooled_dx(d_out, _contiguous(weight), windows)
    if with_dweight:
        assert x is not None
        dweight = launch_compress_pooled_dweight(d_out, dense_rows(x), windows)
    return dx, dweight


@torch.library.custom_op("flash_sparse_attention::compress_linear_triton", mutates_args=())
@on_its_device
def _compress_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    kernel_size: int,
    kernel_stride: int,
    num_windows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Windows times `weight` `[Hk, l * D, E]` plus `bias` float32 `[Hk, E]`, in `dtype`; and the bounds of the windows
    of each sequence."""
    bounds = launch_key_bounds(cu_seqlens, kernel_size, kernel_stride)
    if num_windows == 0:
        return x.new_empty(0, x.shape[1], weight.shape[2], dtype=dtype), bounds
    windows = Windows(cu_seqlens, bounds, x.shape[0], num_windows, kernel_size, kernel_stride)
    out = launch_compress_linear(dense_rows(x), weight.contiguous(), _contiguous(bias), windows, dtype)
    return out, bounds


@torch.library.custom_op("flash_sparse_attention::compress_linear_triton_backward", mutates_args=())
@on_its_device
def _compress_linear_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor,
    bounds: Tensor,
    kernel_size: int,
    kernel_stride: int,
    with_dx: bool,
    with_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the matrices, each empty if it is not wanted."""
    num_windows = d_out.shape[0]
    dx, dweight = (x.new_empty(0) for _ in range(2))
    if num_windows == 0:
        if with_dx:
            dx = x.new_zeros(x.shape)
        if with_dweight:
            dweight = weight.new_zeros(weight.shape)
        return dx, dweight
    # Matrix units take operands of one dtype.
    d_out = dense_rows(d_out.to(x.dtype))
    windows = Windows(cu_seqlens, bounds, x.shape[0], num_windows, kernel_size, kernel_stride)
    if with_dx:
        dx = launch_compress_linear_dx(d_out, weight.contiguous(), windows)
    if with_dweight:
        dweight = launch_compress_linear_dweight(d_out, dense_rows(x), windows)
    return dx, dweight


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _save_pooled(ctx, inputs, output):
    x, weight, _, cu_seqlens, kernel_size, kernel_stride, _ = inputs
    # A mean does not need x again.
    ctx.save_for_backward(None if weight is None else x, weight, cu_seqlens, output[1])
    ctx.sizes = x.shape[0], kernel_size, kernel_stride


def _differentiate_pooled(ctx, d_out, _):
    with_dx, with_dweight, with_dbias = ctx.needs_input_grad[:3]
    dx, dweight = _compress_pooled_backward(d_out, *ctx.saved_tensors, *ctx.sizes, with_dx, with_dweight)
    return _gradients(d_out, dx, dweight, with_dx, with_dweight, with_dbias) + (None,) * 4


def _save_linear(ctx, inputs, output):
    x, weight, _, cu_seqlens, kernel_size, kernel_stride, _, _ = inputs
    ctx.save_for_backward(x, weight, cu_seqlens, output[1])
    ctx.sizes = kernel_size, kernel_stride


def _differentiate_linear(ctx, d_out, _):
    with_dx, with_dweight, with_dbias = ctx.needs_input_grad[:3]
    dx, dweight = _compress_linear_backward(d_out, *ctx.saved_tensors, *ctx.sizes, with_dx, with_dweight)
    return _gradients(d_out, dx, dweight, with_dx, with_dweight, with_dbias) + (None,) * 5


def _gradients(d_out, dx, dweight, with_dx, with_dweight, with_dbias):
    """Gradients of x, the weight and the bias, None where they are not wanted."""
    dbias = d_out.sum(0, dtype=torch.float32) if with_dbias else None
    return dx if with_dx else None, dweight if with_dweight else None, dbias


@_compress_pooled.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int,
    num_windows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(num_windows, *x.shape[1:]), cu_seqlens.new_empty(cu_seqlens.shape)


@_compress_pooled_backward.register_fake
def _(
    d_out: Tensor, x: Tensor | None, weight: Tensor | None, cu_seqlens: Tensor, bounds: Tensor, total_tokens: int,
    kernel_size: int, kernel_stride: int, with_dx: bool, with_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, num_heads, dim = d_out.shape
    dx = d_out.new_empty((total_tokens, num_heads, dim) if with_dx else 0)
    if not with_dweight:
        return dx, d_out.new_empty(0)
    return dx, d_out.new_empty(num_heads, kernel_size, dtype=torch.float32)


@_compress_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int,
    num_windows: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = x.new_empty(num_windows, x.shape[1], weight.shape[2], dtype=dtype)
    return out, cu_seqlens.new_empty(cu_seqlens.shape)


@_compress_linear_backward.register_fake
def _(
    d_out: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor, bounds: Tensor, kernel_size: int, kernel_stride: int,
    with_dx: bool, with_dweight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if with_dx else 0)
    return dx, weight.new_empty(weight.shape if with_dweight else 0)


_compress_pooled.register_autograd(_differentiate_pooled, setup_context=_save_pooled)
_compress_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)
