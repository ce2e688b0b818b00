"""The whole attention from q, k, v and gates, by length and by heads, beside full attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...accuracy import plain
from ...accuracy.budgets import compare_selection
from ...config import NSAConfig
from ...types import SequenceLayout
from .. import baselines, costs, inputs
from ..cases import Bench, Case, Variant
from ..checks import keep_worst, layout_of, pieces, share
from ..shapes import Shape
from .operators import ATTENTION_DIRECTIONS, full_case, gradients_are_checked

Tensors = Mapping[str, Tensor]


def cases(shape: Shape, bench: Bench, compile_baselines: bool) -> list[Case]:
    """The whole attention and full attention, and what flash-linear-attention has where it takes the shape."""
    x = inputs.draw(shape, bench.device)
    found = [whole_case(shape, x), full_case(shape, x, bench, compile_baselines)]
    if bench.device.type == "cuda" and shape.group >= 16 and shape.head_dim == shape.head_dim_v:
        found.append(fla_case(shape, x))
    return found


def whole_case(
    shape: Shape, x: inputs.Inputs, directions: tuple[str, ...] = ATTENTION_DIRECTIONS, recompute: tuple[str, ...] = ()
) -> Case:
    """The whole attention; on a GPU also with selected attention in the other loop order.

    With `recompute` the other one is that which computes these parts again in the backward pass.
    """
    cuda = x.q.device.type == "cuda"
    # The selection of the newest run: what the output is checked with, and is checked itself.
    newest: dict[str, Tensor] = {}

    def run(given: Tensors, **options: Any) -> Tensor:
        out, newest["block_indices"] = functional.nsa_attention(*_arguments(given), shape.nsa, **options)
        return out

    def expected(given: Tensors, first: int, last: int, layout: SequenceLayout) -> Tensor:
        return plain.attend_sparsely(_piece(given, first, last), newest["block_indices"][first:last], shape.nsa, layout)

    def also() -> dict[str, float]:
        return selection_errors(shape, x.q.detach(), x.k.detach(), newest["block_indices"])

    found = [Variant("triton" if cuda else "blockwise", run)]
    if recompute:
        notes = "recompute=" + ", ".join(recompute)
        found.append(Variant(f"{found[0].name}, recompute", partial(run, recompute=recompute), notes=notes))
    elif cuda:
        found.append(Variant("query_outer", partial(run, loop_order="query_outer"), ours=False, strict=True))
    return Case(
        "whole attention", shape.whole(), shape.heads, _leaves(x), found,
        {way: costs.whole(shape, way) for way in directions}, expected, also=also,
        with_memory=True, check_gradients=gradients_are_checked(shape),
    )  # fmt: skip


def selection_errors(shape: Shape, q: Tensor, k: Tensor, indices: Tensor) -> dict[str, float]:
    """Errors of a selection on some rows, importances from q and k; see `accuracy.budgets.compare_selection`."""
    nsa, worst = shape.nsa, dict[str, float]()
    windows: dict[str, Any] = plain.sizes(nsa, "kernel_size", "kernel_stride")
    for first, last in pieces(shape.tokens, shape.heads):
        layout = layout_of(first, last, q.device)

        def importance(
            dtype: torch.dtype, rows: slice = slice(first, last), last: int = last, layout: SequenceLayout = layout
        ) -> Tensor:
            queries = q[rows].to(dtype)
            keys = functional.compress(k[:last].to(dtype), **windows, impl="reference")
            lse = plain.log_sum_exp(queries, keys, nsa, layout)
            return plain.importance(queries, keys, lse, nsa, layout)

        errors = compare_selection(indices[first:last], importance(q.dtype), importance(torch.float64), nsa, layout)
        keep_worst(worst, {name: share(error) for name, error in errors.items()})
    return worst


def fla_case(shape: Shape, x: inputs.Inputs) -> Case:
    """Both on the sizes that flash-linear-attention has: compressed tokens are means of whole blocks."""
    nsa = NSAConfig.preset("fla").replace(num_selected_blocks=shape.nsa.num_selected_blocks)
    pooled = dataclasses.replace(shape, nsa=nsa)
    ours = whole_case(pooled, x)

    def run(given: Tensors) -> Tensor:
        return baselines.whole_by_fla(pooled)(*_arguments(given))

    without = "" if baselines.has_flash_attn() else "without the sliding window, which needs flash-attn; "
    theirs = Variant(
        "flash-linear-attention", run, ours=False, checked=False,
        notes=f"{without}chooses blocks in another way, so that outputs are not compared",
    )  # fmt: skip
    first = ours.variants[0]
    return dataclasses.replace(ours, variants=[first, theirs], with_memory=False)


def groups(shapes: list[Shape], bench: Bench, compile_baselines: bool) -> Iterator[tuple[str, list[Case]]]:
    """A group of cases for each shape; compiled baselines where they are asked for."""
    for shape in shapes:
        yield str(shape), cases(shape, bench, compile_baselines)


def _arguments(given: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return given["q"], given["k"], given["v"], given["gates"]


def _piece(given: Tensors, first: int, last: int) -> dict[str, Tensor]:
    queries = {name: given[name][first:last] for name in ("q", "gates")}
    return {**queries, "k": given["k"][:last], "v": given["v"][:last]}


def _leaves(x: inputs.Inputs) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in x._asdict().items()}
