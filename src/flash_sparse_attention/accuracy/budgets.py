"""Errors against float64, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import geometry
from ..config import NSAConfig
from ..types import SequenceLayout

# How many times the error of plain PyTorch an implementation may have.
FACTOR = 2.0
# What is always allowed, in half ulps of the largest element (for the mean error: of the mean element). Plain PyTorch
# is exact by luck where few elements are at stake: with one visible key, P = 1 and the output is the value itself.
#   half precisions: P and dS may each be rounded at another place than in plain PyTorch, which takes one unit each;
#   float32: nothing is rounded, but sums run in another order. 22 were seen in a linear compression, whose sums have
#   6,144 terms, where plain PyTorch had 8.
ROUNDINGS = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 32.0}
# The same for terms that cancel, in float32 half ulps of their size. The gradients of q and k are sums of
# P * (dP - sum(P * dP)), which is nothing where one key takes all of P, and plain PyTorch may find exactly that.
CANCELLING_ROUNDINGS = 4.0
# Of float64 inputs, relative to the largest element: plain PyTorch is the reference itself, and what remains is the
# order of the sums.
FLOAT64_BUDGET = 1e-11


class Errors(NamedTuple):
    """Distance of a tensor from the exact one, and what it may be; absolute, in the units of the tensor."""

    max_error: float
    mean_error: float
    max_budget: float
    mean_budget: float


def compare(got: Tensor, plain: Tensor, exact: Tensor, *, terms: Sequence[Tensor] = ()) -> Errors:
    """Errors of `got`, with the budget that `plain` allows.

    Args:
        got: a result, any shape.
        plain: the same from plain PyTorch; its dtype is that of the inputs (float32 for lse), or float64.
        exact: the same in float64. Its elements are finite or -inf; -inf must stand at the same places in `got`.
        terms: tensors as large as the terms that cancel in `got`, if any do; see `CANCELLING_ROUNDINGS`.

    Returns:
        The errors; infinite if `got` has another shape or dtype, or -inf at other places.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> compare(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 1.875]), exact)
        Errors(max_error=0.5, mean_error=0.25, max_budget=0.25, mean_budget=0.125)
    """
    invisible = exact == -math.inf
    plain_error = (plain.double() - exact)[~invisible]
    budgets = []
    for size in (largest, mean):
        magnitude, magnitude_of_terms = size(exact[~invisible]), max(map(size, terms), default=0.0)
        if plain.dtype == torch.float64:
            budgets.append(FLOAT64_BUDGET * max(magnitude, magnitude_of_terms))
        else:
            floor = ROUNDINGS[plain.dtype] * _half_ulp(plain.dtype) * magnitude
            floor += CANCELLING_ROUNDINGS * _half_ulp(torch.float32) * magnitude_of_terms
            budgets.append(max(FACTOR * size(plain_error), floor))
    same_form = got.shape == exact.shape and got.dtype == plain.dtype
    if not same_form or not torch.equal(got == -math.inf, invisible):
        return Errors(math.inf, math.inf, *budgets)
    error = (got.double() - exact)[~invisible]
    return Errors(largest(error), mean(error), *budgets)


def compare_selection(
    block_indices: Tensor, plain: Tensor, exact: Tensor, config: NSAConfig, layout: SequenceLayout
) -> dict[str, Errors]:
    """Errors of a selection, by the importance of what it keeps.

    Args:
        block_indices: the selection, int32 `[N, Hk, T]`.
        plain: importances `[N, Hk, J]` from plain PyTorch.
        exact: the same in float64.
        config: what was selected by; only its sizes matter.
        layout: of the N tokens.

    Returns:
        `structure`: entries that are not as the specification fixes them: ascending eligible blocks, as many as there
        are up to T, then -1; all forced blocks among them; of blocks with importance 0, which tie exactly, the lower.
        Not one is allowed.
        `importance`: best rejected - worst kept, relative to the largest importance of the query. Two values lie behind
        it that may each err by `FACTOR` times the error of plain PyTorch, so twice that is allowed.
    """
    slots, num_blocks = config.num_selected_blocks, exact.shape[-1]
    if block_indices.dtype != torch.int32 or block_indices.shape != (*exact.shape[:2], slots):
        return {"structure": Errors(math.inf, math.inf, 0.0, 0.0)}
    if exact.numel() == 0:
        return {"structure": Errors(0.0, 0.0, 0.0, 0.0)}
    token = layout.positions()[:, None, None]
    blocks = torch.arange(num_blocks, device=exact.device)
    num_eligible = geometry.num_eligible_blocks(token, config.block_size)
    first_local = geometry.first_local_block(token, config.block_size, config.num_local_blocks)

    used = torch.arange(slots, device=exact.device) < num_eligible
    out_of_form = torch.where(used, (block_indices < 0) | (block_indices >= num_eligible), block_indices != -1)
    out_of_form[..., 1:] |= used[..., 1:] & (block_indices[..., 1:] <= block_indices[..., :-1])

    # Column `num_blocks` collects what names no block.
    named = block_indices.long().masked_fill((block_indices < 0) | (block_indices >= num_blocks), num_blocks)
    kept = torch.zeros(*exact.shape[:2], num_blocks + 1, dtype=torch.bool, device=exact.device)
    kept = kept.scatter(2, named, True)[..., :-1]
    eligible = blocks < num_eligible
    forced = eligible & ((blocks < config.num_init_blocks) | (blocks >= first_local))
    chosen, rejected = kept & eligible & ~forced, ~kept & eligible & ~forced

    lowest_unimportant = blocks.where(rejected & (exact == 0), num_blocks).amin(-1, keepdim=True)
    out_of_order = chosen & (exact == 0) & (blocks > lowest_unimportant)
    wrong = int(out_of_form.sum()) + int((forced & ~kept).sum()) + int(out_of_order.sum())

    size = exact.amax(-1).clamp(min=torch.finfo(torch.float64).tiny)
    shortfall = exact.where(rejected, -math.inf).amax(-1) - exact.where(chosen, math.inf).amin(-1)
    shortfall = (shortfall / size).clamp(min=0.0)
    budget = FLOAT64_BUDGET
    if plain.dtype != torch.float64:
        plain_error = ((plain.double() - exact).abs().amax(-1) / size).max().item()
        budget = 2 * FACTOR * plain_error + CANCELLING_ROUNDINGS * _half_ulp(torch.float32)
    return {
        "structure": Errors(wrong, wrong / block_indices.numel(), 0.0, 0.0),
        "importance": Errors(largest(shortfall), mean(shortfall), budget, budget),
    }


def largest(x: Tensor) -> float:
    """Largest absolute element, 0 if there is none; NaN if any is."""
    return x.abs().max().item() if x.numel() else 0.0


def mean(x: Tensor) -> float:
    """Mean absolute element, 0 if there is none; NaN if any is."""
    return x.abs().double().mean().item() if x.numel() else 0.0


def _half_ulp(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2
