"""The gated sum of the branches, forward and backward: a pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import load_rows, padded_dim, store_rows

COMBINE_ROWS = 32


def launch_combine(outs: tuple[Tensor, Tensor, Tensor], gates: Tensor) -> Tensor:
    """The sum over the branches of sigmoid(gate) * out, `[N, Hq, Dv]`; gates `[N, Hq, 3]` or `[N, 1, 3]`."""
    total_tokens, num_heads, dim = outs[0].shape
    total = outs[0].new_empty(outs[0].shape)
    _combine_kernel[(triton.cdiv(total_tokens * num_heads, COMBINE_ROWS),)](
        *outs, gates.contiguous(), total, total_tokens * num_heads, *(x.stride(0) for x in outs),
        num_heads, gates.shape[1], dim, COMBINE_ROWS,
    )  # fmt: skip
    return total


def launch_combine_backward(
    d_out: Tensor, outs: tuple[Tensor, Tensor, Tensor], gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the branches and of the gates."""
    total_tokens, num_heads, dim = outs[0].shape
    gates = gates.contiguous()
    grads = [x.new_empty(x.shape) for x in outs]
    d_gates = torch.empty(total_tokens, num_heads, 3, dtype=torch.float32, device=d_out.device)
    _combine_backward_kernel[(triton.cdiv(total_tokens * num_heads, COMBINE_ROWS),)](
        d_out, *outs, gates, *grads, d_gates, total_tokens * num_heads,
        d_out.stride(0), *(x.stride(0) for x in outs), num_heads, gates.shape[1], dim, COMBINE_ROWS,
    )  # fmt: skip
    # One gate for all heads collects the gradients of all.
    return grads[0], grads[1], grads[2], d_gates.sum_to_size(gates.shape).to(gates.dtype)


@triton.jit
def _weight(gates_ptr, row, branch, mask, NUM_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr):
    """The sigmoid of a branch's gate, for rows (token, head)."""
    at = (row // NUM_HEADS * GATE_HEADS + row % NUM_HEADS % GATE_HEADS) * 3 + branch
    return tl.sigmoid(tl.load(gates_ptr + at, mask=mask, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    gates_ptr,
    total_ptr,
    num_rows,
    STRIDE_0: tl.constexpr,
    STRIDE_1: tl.constexpr,
    STRIDE_2: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gated sum of each (token, head).

    Grid: (tile of rows,).
    Owns: total of its rows, by plain stores.
    Invariant: no loop.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token, in_token = row // NUM_HEADS, row % NUM_HEADS * DIM
    x = load_rows(out_0_ptr, token * STRIDE_0 + in_token, mask, DIM, PADDED).to(tl.float32)
    total = x * _weight(gates_ptr, row, 0, mask, NUM_HEADS, GATE_HEADS)[:, None]
    x = load_rows(out_1_ptr, token * STRIDE_1 + in_token, mask, DIM, PADDED).to(tl.float32)
    total += x * _weight(gates_ptr, row, 1, mask, NUM_HEADS, GATE_HEADS)[:, None]
    x = load_rows(out_2_ptr, token * STRIDE_2 + in_token, mask, DIM, PADDED).to(tl.float32)
    total += x * _weight(gates_ptr, row, 2, mask, NUM_HEADS, GATE_HEADS)[:, None]
    store_rows(total_ptr, row * DIM, mask, total, DIM, PADDED)


@triton.jit
def _branch_backward(
    do, out_ptr, rows, gates_ptr, branch, grad_ptr, d_gates_ptr, row, mask,
    NUM_HEADS: tl.constexpr, GATE_HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of a branch and of its gate."""
    PADDED: tl.constexpr = padded_dim(DIM)
    weight = _weight(gates_ptr, row, branch, mask, NUM_HEADS, GATE_HEADS)
    d_weight = tl.sum(do * load_rows(out_ptr, rows, mask, DIM, PADDED).to(tl.float32), 1)
    store_rows(grad_ptr, row * DIM, mask, do * weight[:, None], DIM, PADDED)
    tl.store(d_gates_ptr + row * 3 + branch, d_weight * weight * (1.0 - weight), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_backward_kernel(
    d_out_ptr,
    out_0_ptr,
    out_1_ptr,
    out_2_ptr,
    gates_ptr,
    grad_0_ptr,
    grad_1_ptr,
    grad_2_ptr,
    d_gates_ptr,
    num_rows,
    STRIDE_DO: tl.constexpr,
    STRIDE_0: tl.constexpr,
    STRIDE_1: tl.constexpr,
    STRIDE_2: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of the branches and gates of each (token, head).

    Grid: (tile of rows,).
    Owns: the gradients of its rows, by plain stores.
    Invariant: no loop.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    token, in_token = row // NUM_HEADS, row % NUM_HEADS * DIM
    do = load_rows(d_out_ptr, token * STRIDE_DO + in_token, mask, DIM, padded_dim(DIM)).to(tl.float32)
    _branch_backward(
        do, out_0_ptr, token * STRIDE_0 + in_token, gates_ptr, 0, grad_0_ptr, d_gates_ptr, row, mask,
        NUM_HEADS, GATE_HEADS, DIM,
    )  # fmt: skip
    _branch_backward(
        do, out_1_ptr, token * STRIDE_1 + in_token, gates_ptr, 1, grad_1_ptr, d_gates_ptr, row, mask,
        NUM_HEADS, GATE_HEADS, DIM,
    )  # fmt: skip
    _branch_backward(
        do, out_2_ptr, token * STRIDE_2 + in_token, gates_ptr, 2, grad_2_ptr, d_gates_ptr, row, mask,
        NUM_HEADS, GATE_HEADS, DIM,
    )  # fmt: skip
