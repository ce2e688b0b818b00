"""Is it right? Some rows of an output, and the gradients through them, beside the reference in float64.

The rows are pieces of consecutive tokens at the begin, in the middle and at the end of the sequence. The reference
computes a piece as the last queries of a shorter sequence, so that nothing of size N x N is made. An error is given as
a share of what it may be: twice that of plain PyTorch with the rounding points of a kernel (`accuracy.budgets`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..accuracy.budgets import Errors, compare
from ..types import SequenceLayout

Tensors = Mapping[str, Tensor]
# (inputs, first token, token behind the last, layout of the piece) -> output of the piece, by the reference
Expected = Callable[[Tensors, int, int, SequenceLayout], Tensor]
# Scores in float64 that a check may hold at once.
_MAX_SCORES = 1 << 27


def pieces(tokens: int, heads: int) -> list[tuple[int, int]]:
    """Ranges of tokens that are checked.

    >>> pieces(1000, 8)
    [(0, 16), (493, 509), (984, 1000)]
    >>> pieces(20, 8)
    [(0, 20)]
    """
    rows = max(1, min(16, _MAX_SCORES // (tokens * heads)))
    if tokens <= 3 * rows:
        return [(0, tokens)]
    # Not at a multiple of a power of two, where tiles and blocks begin.
    middle = tokens // 2 - 7 if tokens > 64 else tokens // 2
    return [(0, rows), (middle, min(middle + rows, tokens - rows)), (tokens - rows, tokens)]


def layout_of(first: int, last: int, device: torch.device) -> SequenceLayout:
    """The layout of the queries [first, last) behind the tokens before them."""
    return SequenceLayout.uniform(1, last - first, device).after(SequenceLayout.uniform(1, last, device))


def check(
    run: Callable[[Tensors], Tensor], expected: Expected, inputs: Tensors, heads: int, gradients: bool, seed: int = 0
) -> dict[str, float]:
    """Errors of the output and of the gradients by every input that wants one.

    Args:
        run: the whole, on inputs `[N, ...]` by name; returns `[N, Hq, Dv]`.
        expected: the same of a piece, by the reference, in the dtype of the inputs that it is given.
        inputs: by name; integers are passed on as they are.
        heads: query heads.
        gradients: whether gradients are checked as well.
        seed: of the gradient of the output.

    Returns:
        Name -> error as a share of what it may be, at most 1 if all is right; infinite or NaN if something is very
        wrong.
    """
    leaves = {name: x.detach().requires_grad_(gradients and x.is_floating_point()) for name, x in inputs.items()}
    with torch.set_grad_enabled(gradients):
        out = run(leaves)
    ranges = pieces(len(out), heads)
    rows = torch.cat([torch.arange(first, last, device=out.device) for first, last in ranges])
    generator = torch.Generator(out.device).manual_seed(seed)
    d_rows = torch.randn(len(rows), *out.shape[1:], device=out.device, dtype=out.dtype, generator=generator)
    # Rows that are not compared must be numbers at least.
    finite = {"finite": 0.0 if bool(torch.isfinite(out).all()) else math.inf}
    got = {"out": out.detach()[rows]}
    if gradients:
        d_out = torch.zeros_like(out).index_copy(0, rows, d_rows)
        got |= _gradients(out, leaves, d_out)
    del out
    plain = _by_reference(expected, inputs, ranges, d_rows, None, gradients)
    exact = _by_reference(expected, inputs, ranges, d_rows, torch.float64, gradients)
    terms = [x for name, x in exact.items() if name.startswith("grad v")]
    return finite | {
        name: share(compare(got[name], plain[name], value, terms=terms if name in ("grad q", "grad k") else ()))
        for name, value in exact.items()
    }


def share(errors: Errors) -> float:
    """The larger error as a share of what it may be.

    >>> share(Errors(1.0, 0.1, 2.0, 0.1))
    1.0
    """
    shares = []
    for error, budget in ((errors.max_error, errors.max_budget), (errors.mean_error, errors.mean_budget)):
        shares.append(error / budget if budget > 0 else (0.0 if error == 0 else math.inf))
    # Not the larger of the two, which might lose a NaN.
    return next((x for x in shares if math.isnan(x)), max(shares))


def keep_worst(worst: dict[str, float], found: Mapping[str, float]) -> None:
    """Takes over what is worse; a NaN stays.

    >>> worst = {"out": 0.5}
    >>> keep_worst(worst, {"out": math.nan, "lse": 0.1})
    >>> keep_worst(worst, {"out": 0.7})
    >>> worst
    {'out': nan, 'lse': 0.1}
    """
    for name, error in found.items():
        known = worst.setdefault(name, 0.0)
        if not math.isnan(known) and not error <= known:
            worst[name] = error


def _by_reference(
    expected: Expected,
    inputs: Tensors,
    ranges: list[tuple[int, int]],
    d_rows: Tensor,
    dtype: torch.dtype | None,
    gradients: bool,
) -> dict[str, Tensor]:
    """Output and gradients of the pieces, in `dtype` or that of the inputs."""
    leaves = {
        name: (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(gradients)
        if x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    outs, place, found = [], 0, {}
    totals: dict[str, Tensor] = {}
    for first, last in ranges:
        with torch.set_grad_enabled(gradients):
            out = expected(leaves, first, last, layout_of(first, last, d_rows.device))
        outs.append(out.detach())
        if gradients:
            # A piece at a time, so that the scores of one are held.
            for name, gradient in _gradients(out, leaves, d_rows[place : place + last - first].to(out.dtype)).items():
                # Gradients of a kernel are rounded once, so the pieces are added in float32 or better.
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                totals[name] = totals[name] + wide if name in totals else wide
        place += last - first
    found["out"] = torch.cat(outs)
    for name, total in totals.items():
        found[name] = total.to(leaves[name.removeprefix("grad ")].dtype)
    return found


def _gradients(out: Tensor, leaves: Tensors, d_out: Tensor) -> dict[str, Tensor]:
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], d_out, allow_unused=True)
    return {
        f"grad {name}": torch.full_like(leaves[name], math.nan) if gradient is None else gradient
        for name, gradient in zip(wanted, found, strict=True)
    }
