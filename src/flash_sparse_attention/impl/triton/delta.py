"""What the backward pass of softmax subtracts from dP."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .primitives import load_rows, padded_dim

DELTA_ROWS = 32


def launch_delta(d_out: Tensor, d_lse: Tensor, out: Tensor) -> Tensor:
    """delta `[N, Hq]` = sum(d_out * out) - d_lse, float32; with P the probabilities, dS = P * (dP - delta)."""
    total_tokens, num_heads, dim = out.shape
    delta = d_lse.new_empty(total_tokens, num_heads)
    _delta_kernel[(triton.cdiv(total_tokens * num_heads, DELTA_ROWS),)](
        d_out, d_lse, out, delta, total_tokens * num_heads, d_out.stride(0), num_heads, dim, DELTA_ROWS
    )
    return delta


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    d_out_ptr,
    d_lse_ptr,
    out_ptr,
    delta_ptr,
    num_rows,
    stride_do,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta of each (token, head).

    Grid: (tile of rows,).
    Owns: delta of its rows, by plain stores.
    Invariant: no loop.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    do = load_rows(d_out_ptr, row // NUM_HEADS * stride_do + row % NUM_HEADS * DIM, mask, DIM, PADDED)
    out = load_rows(out_ptr, row * DIM, mask, DIM, PADDED)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta - tl.load(d_lse_ptr + row, mask=mask, other=0.0), mask=mask)
