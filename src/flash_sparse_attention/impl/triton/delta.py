"""What the backward pass of softmax needs of each row: how far scores are shifted, and what is subtracted from dP.

With P = exp(scores - lse) the probabilities, dS = P * (dP - delta). A gate w on the output is a factor of P in the
gradient, which is a shift as well: w * P = exp(scores - (lse - log w)). So the branches of the gated sum share d_out,
and none of their outputs' gradients is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import LOG2_E, load_rows, padded_dim


def _rows(out: Tensor) -> int:
    """Rows of a tile; few in float32, whose products take no matrix unit."""
    return 16 if out.dtype == torch.float32 else 32


def launch_shifts(d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """shift and delta, float32 `[N, Hq]`.

    shift is lse, in the units of `exp_below`; inf where a row sees no key, so that its probabilities are 0.
    delta = sum(d_out * out) - d_lse.
    """
    total_tokens, num_heads, dim = out.shape
    shift, delta = d_lse.new_empty(total_tokens, num_heads), d_lse.new_empty(total_tokens, num_heads)
    rows = _rows(out)
    _shifts_kernel[(triton.cdiv(total_tokens * num_heads, rows),)](
        d_out, d_lse, out, lse, shift, delta, total_tokens * num_heads, d_out.stride(0), num_heads, dim, rows
    )
    return shift, delta


def launch_gated_shifts(
    d_out: Tensor, outs: tuple[Tensor, Tensor, Tensor], lses: tuple[Tensor, Tensor, Tensor], gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """shift and delta of three gated branches, float32 `[3, at least N * Hq]`, and the gradient of the gates.

    Args:
        d_out: `[N, Hq, Dv]`, of the gated sum.
        outs: outputs of the branches `[N, Hq, Dv]`.
        lses: their lse `[N, Hq]`.
        gates: `[N, Hq, 3]` or `[N, 1, 3]`, before the sigmoid.
    """
    total_tokens, num_heads, dim = outs[0].shape
    gates = gates.contiguous()
    # Rows that begin at multiples of 16 bytes: kernels are compiled for those.
    branch_stride = triton.cdiv(total_tokens * num_heads, 4) * 4
    shift, delta = (lses[0].new_empty(3, branch_stride) for _ in range(2))
    d_gates = lses[0].new_empty(total_tokens, num_heads, 3)
    rows = _rows(outs[0])
    _gated_shifts_kernel[(triton.cdiv(total_tokens * num_heads, rows),)](
        d_out, *outs, *lses, gates, shift, delta, d_gates, total_tokens * num_heads, branch_stride, d_out.stride(0),
        num_heads, gates.shape[1], dim, rows,
    )  # fmt: skip
    # One gate for all heads collects the gradients of all.
    return shift, delta, d_gates.sum_to_size(gates.shape).to(gates.dtype)


@triton.jit
def _row_products(do, out, ROWS: tl.constexpr):
    """sum(do * out) of each row, [ROWS].

    In float32 by the product that computes dP, in the same order: where a row sees one key, `out` is its value, and
    dP - delta is 0 and not what rounding leaves of it. Half precisions would not notice.
    """
    if do.dtype == tl.float32:
        row = tl.arange(0, ROWS)
        products = tl.dot(do, tl.trans(out), input_precision="ieee")
        delta = tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    return delta


@triton.jit
def _exponent(lse, EXACT: tl.constexpr):
    """lse in the units of `exp_below`, and inf for -inf."""
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return lse if EXACT else lse * LOG2_E


@triton.jit(do_not_specialize=["num_rows"])
def _shifts_kernel(
    d_out_ptr,
    d_lse_ptr,
    out_ptr,
    lse_ptr,
    shift_ptr,
    delta_ptr,
    num_rows,
    stride_do,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """shift and delta of each (token, head).

    Grid: (tile of rows,).
    Owns: shift and delta of its rows, by plain stores.
    Invariant: no loop.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    do = load_rows(d_out_ptr, row // NUM_HEADS * stride_do + row % NUM_HEADS * DIM, mask, DIM, PADDED)
    out = load_rows(out_ptr, row * DIM, mask, DIM, PADDED)
    delta = _row_products(do, out, ROWS)
    tl.store(delta_ptr + row, delta - tl.load(d_lse_ptr + row, mask=mask, other=0.0), mask=mask)
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
    tl.store(shift_ptr + row, _exponent(lse, out_ptr.dtype.element_ty == tl.float32), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "branch_stride"])
def _gated_shifts_kernel(
    d_out_ptr,
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    lse_0_ptr,
    lse_1_ptr,
    lse_2_ptr,
    gates_ptr,
    shift_ptr,
    delta_ptr,
    d_gates_ptr,
    num_rows,
    branch_stride,
    stride_do,
    NUM_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """shift and delta of each (branch, token, head), and the gradient of its gate.

    Grid: (tile of rows,).
    Owns: shift, delta and d_gates of its rows, by plain stores.
    Invariant: no loop.
    """
    EXACT: tl.constexpr = out_0_ptr.dtype.element_ty == tl.float32
    PADDED: tl.constexpr = padded_dim(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token, head = row // NUM_HEADS, row % NUM_HEADS
    do = load_rows(d_out_ptr, token * stride_do + head * DIM, mask, DIM, PADDED)
    gates_ptr += (token * GATE_HEADS + head % GATE_HEADS) * 3
    for branch in tl.static_range(3):
        out_ptr = out_0_ptr if branch == 0 else (out_1_ptr if branch == 1 else out_2_ptr)
        lse_ptr = lse_0_ptr if branch == 0 else (lse_1_ptr if branch == 1 else lse_2_ptr)
        out = load_rows(out_ptr, row * DIM, mask, DIM, PADDED)
        delta = _row_products(do, out, ROWS)
        gate = tl.load(gates_ptr + branch, mask=mask, other=0.0).to(tl.float32)
        # log of the sigmoid, without overflow on either side
        log_weight = tl.minimum(gate, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(gate)))
        weight = tl.exp(log_weight)
        lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
        at = branch * branch_stride.to(tl.int64) + row
        tl.store(shift_ptr + at, _exponent(lse, EXACT) - (log_weight if EXACT else log_weight * LOG2_E), mask=mask)
        tl.store(delta_ptr + at, delta, mask=mask)
        tl.store(d_gates_ptr + row * 3 + branch, delta * weight * (1.0 - weight), mask=mask)
