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


def launch_shifts(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """shift and delta, float32 `[N, Hq]`.

    shift is lse, in the units of `exp_below`; inf where a row sees no key, so that its probabilities are 0.
    delta = sum(d_out * out) - d_lse; None stands for no gradient of lse.
    """
    total_tokens, num_heads, dim = out.shape
    shift, delta = lse.new_empty(total_tokens, num_heads), lse.new_empty(total_tokens, num_heads)
    rows = _rows(out)
    _shifts_kernel[(triton.cdiv(total_tokens * num_heads, rows),)](
        d_out, None if d_lse is None else d_lse.contiguous(), out, lse, shift, delta,
        total_tokens * num_heads, d_out.stride(0), num_heads, dim, rows,
    )  # fmt: skip
    return shift, delta


# Rows, (token, query head), up to which shift and delta of all branches are kept at once: 24 bytes a row.
ROWS_AT_ONCE = 1 << 23


def branches_at_once(rows: int) -> tuple[range, ...]:
    """Of compressed, selected and window, the branches whose shift and delta are computed together, selected first."""
    return (range(3),) if rows <= ROWS_AT_ONCE else (range(1, 2), range(2, 3), range(1))


def shift_bytes(rows: int) -> int:
    """What shift and delta take of the workspace at a time."""
    return 2 * 4 * rows * len(branches_at_once(rows)[0])


def launch_gated_shifts(
    d_out: Tensor, outs: list[Tensor], lses: list[Tensor], gates: Tensor, d_gates: Tensor, branches: range
) -> tuple[Tensor, Tensor]:
    """shift and delta of gated branches, float32 `[branches, at least N * Hq]`; the gradient of their gates.

    Args:
        d_out: `[N, Hq, Dv]`, of the gated sum.
        outs: outputs of these branches `[N, Hq, Dv]`.
        lses: their lse `[N, Hq]`.
        gates: `[N, Hq, 3]` or `[N, 1, 3]`, before the sigmoid.
        d_gates: of the shape of `gates`; receives what these branches have of it.
        branches: their numbers, consecutive ones.
    """
    total_tokens, num_heads, dim = outs[0].shape
    gates, first, count = gates.contiguous(), branches[0], len(branches)
    # Rows that begin at multiples of 16 bytes: kernels are compiled for those.
    branch_stride = triton.cdiv(total_tokens * num_heads, 4) * 4
    shift, delta = (lses[0].new_empty(count, branch_stride) for _ in range(2))
    # One gate for all heads collects the gradients of all.
    shared = gates.shape[1] < num_heads
    of_heads = lses[0].new_empty(total_tokens, num_heads, count) if shared else d_gates
    # The others are not read.
    outs, lses = [*outs, *[outs[0]] * (3 - count)], [*lses, *[lses[0]] * (3 - count)]
    rows = _rows(outs[0])
    _gated_shifts_kernel[(triton.cdiv(total_tokens * num_heads, rows),)](
        d_out, *outs, *lses, gates, shift, delta, of_heads, total_tokens * num_heads, branch_stride,
        d_out.stride(0), first, count, of_heads.shape[2], 0 if shared else first, num_heads, gates.shape[1], dim, rows,
    )  # fmt: skip
    if shared:
        d_gates[:, :, first : first + count] = of_heads.sum_to_size(total_tokens, gates.shape[1], count)
    return shift, delta


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
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + row, mask=mask, other=0.0)
    tl.store(delta_ptr + row, delta, mask=mask)
    lse = tl.load(lse_ptr + row, mask=mask, other=0.0)
    tl.store(shift_ptr + row, _exponent(lse, out_ptr.dtype.element_ty == tl.float32), mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "branch_stride", "first_branch", "branches", "columns", "first_column"]
)  # fmt: skip
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
    first_branch,
    branches,
    columns,
    first_column,
    NUM_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """shift and delta of each (branch, token, head), and the gradient of its gate, of one branch or several.

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
    gates_ptr += (token * GATE_HEADS + head % GATE_HEADS) * 3 + first_branch
    d_gates_ptr += row * columns + first_column
    for branch in tl.static_range(3):
        out_ptr = out_0_ptr if branch == 0 else (out_1_ptr if branch == 1 else out_2_ptr)
        lse_ptr = lse_0_ptr if branch == 0 else (lse_1_ptr if branch == 1 else lse_2_ptr)
        # Loads of all branches are asked for at once, which they were not behind a condition.
        mask = mask & (branch < branches)
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
        d_gate = delta * weight * (1.0 - weight)
        tl.store(d_gates_ptr + branch, d_gate.to(d_gates_ptr.dtype.element_ty), mask=mask)
