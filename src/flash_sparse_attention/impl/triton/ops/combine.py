"""The gated sum of the branches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..combine import launch_combine, launch_combine_backward
from ..primitives import dense_rows, on_its_device


def combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    """As `reference.combine`: branches `[N, Hq, Dv]`, gates `[N, Hq, 3]` or `[N, 1, 3]`, by a Triton kernel."""
    return _combine(out_compressed, out_selected, out_window, gates)


@torch.library.custom_op("flash_sparse_attention::combine_triton", mutates_args=())
@on_its_device
def _combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    if out_compressed.numel() == 0:
        return out_window.new_empty(out_window.shape)
    outs = dense_rows(out_compressed), dense_rows(out_selected), dense_rows(out_window)
    return launch_combine(outs, gates)


@torch.library.custom_op("flash_sparse_attention::combine_triton_backward", mutates_args=())
@on_its_device
def _combine_backward(
    d_out: Tensor, out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the branches and of the gates."""
    outs = dense_rows(out_compressed), dense_rows(out_selected), dense_rows(out_window)
    if d_out.numel() == 0:
        empty = [x.new_empty(x.shape) for x in outs]
        return empty[0], empty[1], empty[2], gates.new_zeros(gates.shape)
    return launch_combine_backward(dense_rows(d_out), outs, gates)


def _differentiate(ctx, d_out):
    return _combine_backward(d_out, *ctx.saved_tensors)


_combine.register_fake(lambda out_compressed, out_selected, out_window, gates: out_window.new_empty(out_window.shape))
_combine_backward.register_fake(lambda d_out, *inputs: tuple(x.new_empty(x.shape) for x in inputs))
_combine.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
