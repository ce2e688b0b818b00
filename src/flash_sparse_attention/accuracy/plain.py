"""The measure: the operators by the reference, and in less than float64 with the rounding points of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..config import NSAConfig
from ..geometry import Interval
from ..impl.reference import block_importance
from ..types import AttentionOutput, SequenceLayout
from .inputs import Tensors


def sizes(config: NSAConfig, *names: str) -> dict[str, Any]:
    """Those fields of `config`, as keyword arguments."""
    return {name: getattr(config, name) for name in names}


def attend(
    operator: Callable[..., AttentionOutput],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    which: Interval | Tensor,
    layout: SequenceLayout,
    impl: str,
) -> AttentionOutput:
    """An attention operator by any implementation. `which` is what it takes after v: an interval, or block indices."""
    result = operator(q, k, v, which, cu_seqlens=layout, impl=impl)
    if impl != "reference" or q.dtype == torch.float64:
        return result
    with torch.no_grad():
        exact = operator(q.double(), k.double(), v.double(), which, cu_seqlens=layout, impl=impl)
    return AttentionOutput(*_StoredOutput.apply(*result, exact.out))


class _StoredOutput(torch.autograd.Function):
    """The rounding point that the backward pass of attention has wherever P is not kept.

    dS = P * (dP - sum(P * dP) + d_lse). Without P, sum(P * dP) is taken as sum(d_out * out), from the output as it was
    rounded and stored; autograd has it exactly. The difference goes in through d_lse.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, exact_out: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(out, exact_out)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor, None]:
        out, exact_out = ctx.saved_tensors
        stored = (d_out.float() * out.float()).sum(-1)
        return d_out, d_lse - (stored - (d_out.double() * exact_out).sum(-1)).to(d_lse.dtype), None


def attend_sparsely(x: Tensors, block_indices: Tensor, config: NSAConfig, layout: SequenceLayout) -> Tensor:
    """The output of `nsa_attention` on `inputs.whole_inputs`, for a selection that is given."""
    windows, window = Interval(config.kernel_size, config.kernel_stride), Interval(window_size=config.window_size)
    selected_attention = partial(functional.selected_attention, block_size=config.block_size)
    q, k, v = x["q"], x["k"], x["v"]
    k_compressed, v_compressed = compressed_pair(x, config, layout)
    k_window, v_window = x.get("k_window", k), x.get("v_window", v)
    compressed = attend(functional.interval_attention, q, k_compressed, v_compressed, windows, layout, "reference")
    selected = attend(selected_attention, q, k, v, block_indices, layout, "reference")
    recent = attend(functional.interval_attention, q, k_window, v_window, window, layout, "reference")
    return functional.combine(compressed.out, selected.out, recent.out, x["gates"], impl="reference")


def compressed_pair(x: Tensors, config: NSAConfig, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
    """The compressed keys and values of `inputs.whole_inputs`: given, or means."""
    if "k_compressed" in x:
        return x["k_compressed"], x["v_compressed"]
    how = {**sizes(config, "kernel_size", "kernel_stride"), "cu_seqlens": layout.keys, "impl": "reference"}
    return functional.compress(x["k"], **how), functional.compress(x["v"], **how)


def log_sum_exp(q: Tensor, k_compressed: Tensor, config: NSAConfig, layout: SequenceLayout) -> Tensor:
    """lse of compressed attention."""
    windows = sizes(config, "kernel_size", "kernel_stride")
    return functional.compressed_attention(
        q, k_compressed, k_compressed, **windows, cu_seqlens=layout, impl="reference"
    ).lse


def importance(q: Tensor, k_compressed: Tensor, lse: Tensor, config: NSAConfig, layout: SequenceLayout) -> Tensor:
    """Importance of every block to every query, `[N, Hk, J]`, in the dtype of q (float32 at least)."""
    windows = sizes(config, "kernel_size", "kernel_stride", "block_size")
    return block_importance(q, k_compressed, lse, **windows, layout=layout, softmax_scale=float(q.shape[-1]) ** -0.5)
