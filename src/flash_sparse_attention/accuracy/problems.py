"""Every operator with inputs, ready to be computed by any implementation and judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..config import compression_kinds
from ..geometry import Interval
from ..types import SequenceLayout
from . import plain
from .budgets import Errors, compare, compare_selection
from .cases import Case
from .inputs import Random, Tensors, attention_inputs, combine_inputs, compress_inputs, hostile_indices, whole_inputs

Compute = Callable[[Tensors, str], Tensors]  # (inputs by name, implementation) -> outputs by name


@dataclass(frozen=True)
class Problem:
    """An operator and its inputs.

    Attributes:
        operator: its public name.
        variant: which use of it; may be empty.
        case: where the inputs come from.
        layout: of the queries; see `Case.layout`.
        inputs: by name. All are floating, and all are differentiated.
        compute: computes the outputs.
    """

    operator: str
    variant: str
    case: Case
    layout: SequenceLayout
    inputs: Tensors
    compute: Compute

    @cached_property
    def exact(self) -> Tensors:
        """Outputs and gradients of the reference in float64."""
        return self.evaluate(self.compute, "reference", torch.float64)

    @cached_property
    def plain(self) -> Tensors:
        """Outputs and gradients of plain PyTorch."""
        return self.evaluate(self.compute, "reference", self.case.dtype)

    def errors(self, impl: str) -> dict[str, Errors]:
        """Errors of every output and gradient of an implementation, by name."""
        return _compare_all(self.evaluate(self.compute, impl, self.case.dtype), self.plain, self.exact)

    def evaluate(self, compute: Compute, impl: str, dtype: torch.dtype) -> Tensors:
        """Outputs, and gradients by the inputs, on the inputs in `dtype`."""
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in self.inputs.items()}
        outputs = compute(leaves, impl)
        random = Random(self.case, self.layout.device, "upstream")
        upstream = {name: random(*x.shape).to(x.dtype) for name, x in outputs.items() if x.is_floating_point()}
        # An output that an implementation cut off from its inputs makes gradients wrong, or missing, which is NaN.
        attached = [name for name in upstream if outputs[name].requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if attached:
            chosen = [outputs[name] for name in attached], list(leaves.values()), [upstream[name] for name in attached]
            grads = torch.autograd.grad(*chosen, allow_unused=True)
        results = {name: x.detach() for name, x in outputs.items()}
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            results[f"grad {name}"] = torch.full_like(leaf, math.nan) if grad is None else grad
        return results


class SelectionProblem(Problem):
    """`select_blocks`, whose outputs are integers: compared by importance, and where ties are exact, as they are."""

    def errors(self, impl: str) -> dict[str, Errors]:
        """Errors of the selection; see `compare_selection`."""
        got = self.compute(self.inputs, impl)["block_indices"]
        importances = self.importance(self.case.dtype), self.importance(torch.float64)
        errors = compare_selection(got, *importances, self.case.config, self.layout)
        if self.case.flavour == "ties":
            wrong = int((got != self.compute(self.inputs, "reference")["block_indices"]).sum())
            errors["block_indices"] = Errors(wrong, wrong / max(got.numel(), 1), 0.0, 0.0)
        return errors

    def importance(self, dtype: torch.dtype) -> Tensor:
        """Importances by the reference in `dtype`."""
        q, k_compressed = self.inputs["q"].to(dtype), self.inputs["k_compressed"].to(dtype)
        return plain.importance(q, k_compressed, self.inputs["lse"], self.case.config, self.layout)


class WholeProblem(Problem):
    """`nsa_attention`: its selection is compared by importance, and everything else given this selection."""

    def errors(self, impl: str) -> dict[str, Errors]:
        """Errors of the output, every gradient and the selection."""
        got = self.evaluate(self.compute, impl, self.case.dtype)
        block_indices = got.pop("block_indices")

        def compute(x: Tensors, impl: str) -> Tensors:
            return {"out": plain.attend_sparsely(x, block_indices, self.case.config, self.layout)}

        measure = self.evaluate(compute, "reference", self.case.dtype)
        exact = self.evaluate(compute, "reference", torch.float64)
        importances = self.importance(self.case.dtype), self.importance(torch.float64)
        selection = compare_selection(block_indices, *importances, self.case.config, self.layout)
        return {**_compare_all(got, measure, exact), **selection}

    def importance(self, dtype: torch.dtype) -> Tensor:
        """Importances by the reference in `dtype`, all the way from q, k and v."""
        config, x = self.case.config, {name: value.to(dtype) for name, value in self.inputs.items()}
        k_compressed, _ = plain.compressed_pair(x, config, self.layout)
        lse = plain.log_sum_exp(x["q"], k_compressed, config, self.layout)
        return plain.importance(x["q"], k_compressed, lse, config, self.layout)


def problems(operator: str, case: Case, device: torch.device) -> Iterator[Problem]:
    """All uses of an operator on a case."""
    layout, config = case.layout(device), case.config
    if operator == "compress":
        for kind in compression_kinds():
            yield _compress_problem(kind, case, layout.keys)
    elif operator == "interval_attention":
        yield _interval_problem("compressed", Interval(config.kernel_size, config.kernel_stride), case, layout)
        yield _interval_problem("window", Interval(window_size=config.window_size), case, layout)
    elif operator == "select_blocks":
        yield _selection_problem(case, layout)
    elif operator == "selected_attention":
        yield _selected_problem(case, layout)
    elif operator == "combine":
        for variant, gate_heads in (("a gate per head", case.num_heads), ("a gate per token", 1)):
            inputs = combine_inputs(case, layout, gate_heads)
            yield Problem("combine", variant, case, layout, inputs, _combine)
    else:
        assert operator == "nsa_attention", operator
        yield _whole_problem(case, layout)


def _compress_problem(kind: str, case: Case, layout: SequenceLayout) -> Problem:
    windows = plain.sizes(case.config, "kernel_size", "kernel_stride")

    def compute(x: Tensors, impl: str) -> Tensors:
        return {"out": _call(functional.compress, x, kind=kind, **windows, cu_seqlens=layout, impl=impl)}

    return Problem("compress", kind, case, layout, compress_inputs(kind, case, layout), compute)


def _interval_problem(variant: str, interval: Interval, case: Case, layout: SequenceLayout) -> Problem:
    def compute(x: Tensors, impl: str) -> Tensors:
        attend = functional.interval_attention
        return plain.attend(attend, x["q"], x["k"], x["v"], interval, layout, impl)._asdict()

    keys = layout.compressed(interval.kernel_size, interval.kernel_stride)
    return Problem("interval_attention", variant, case, layout, attention_inputs(case, layout, keys), compute)


def _selection_problem(case: Case, layout: SequenceLayout) -> SelectionProblem:
    config = case.config
    x = attention_inputs(case, layout, layout.compressed(config.kernel_size, config.kernel_stride))
    if case.flavour == "ties":
        # Probabilities are then exp of the scores, 1 or 0, and importances are counts.
        lse = x["q"].new_zeros(x["q"].shape[:2], dtype=torch.float64)
    else:
        lse = plain.log_sum_exp(x["q"].double(), x["k"].double(), config, layout)
    lse = lse.to(torch.promote_types(case.dtype, torch.float32))
    numbers = plain.sizes(
        config,
        "kernel_size",
        "kernel_stride",
        "block_size",
        "num_selected_blocks",
        "num_init_blocks",
        "num_local_blocks",
    )

    def compute(x: Tensors, impl: str) -> Tensors:
        return {"block_indices": _call(functional.select_blocks, x, **numbers, cu_seqlens=layout, impl=impl)}

    inputs = {"q": x["q"], "k_compressed": x["k"], "lse": lse}
    return SelectionProblem("select_blocks", "", case, layout, inputs, compute)


def _selected_problem(case: Case, layout: SequenceLayout) -> Problem:
    if case.flavour == "hostile indices":
        block_indices = hostile_indices(case, layout)
    else:
        selection = _selection_problem(case, layout)
        block_indices = selection.compute(selection.inputs, "reference")["block_indices"]

    def compute(x: Tensors, impl: str) -> Tensors:
        impl, _, loop_order = impl.partition("/")
        size = case.config.block_size
        attend = partial(functional.selected_attention, block_size=size, loop_order=loop_order or "auto")
        return plain.attend(attend, x["q"], x["k"], x["v"], block_indices, layout, impl)._asdict()

    return Problem("selected_attention", "", case, layout, attention_inputs(case, layout, layout.keys), compute)


def _combine(x: Tensors, impl: str) -> Tensors:
    return {"out": _call(functional.combine, x, impl=impl)}


def _whole_problem(case: Case, layout: SequenceLayout) -> WholeProblem:
    def compute(x: Tensors, impl: str) -> Tensors:
        return _call(functional.nsa_attention, x, config=case.config, cu_seqlens=layout, impl=impl)._asdict()

    return WholeProblem("nsa_attention", "", case, layout, whole_inputs(case, layout), compute)


def _call(operator: Callable[..., Any], x: Tensors, **others: Any) -> Any:
    """An operator whose arguments are called as the inputs are."""
    return operator(**x, **others)


def _compare_all(got: Tensors, measure: Tensors, exact: Tensors) -> dict[str, Errors]:
    """`compare` for every tensor of a call; where no key is visible, 0 must be 0."""
    grads_v = [x for name, x in exact.items() if name.startswith("grad v")]
    errors = {}
    for name, value in exact.items():
        cancels = "grad v" in exact and name.startswith(("grad q", "grad k"))
        errors[name] = compare(got[name], measure[name], value, terms=grads_v if cancels else ())
        if "lse" in exact and name in ("out", "grad q"):
            blind = got[name][exact["lse"] == -math.inf]
            if not torch.equal(blind, torch.zeros_like(blind)):
                errors[name] = errors[name]._replace(max_error=math.inf)
    return errors
