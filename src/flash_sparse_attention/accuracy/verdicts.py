"""`judge`: a case goes in, a verdict on every tensor of every operator comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..impl import CAPABILITIES, IMPLEMENTATIONS, OPERATORS, available, explain
from .cases import Case
from .problems import problems


@dataclass(frozen=True)
class Row:
    """The verdict on one tensor of one operator of one implementation. Errors are absolute, in the units of the tensor.

    Attributes:
        operator: public name of the operator, or `nsa_attention`.
        variant: which use of the operator, such as the kind of compression; may be empty.
        impl: name of the implementation.
        case: the inputs.
        tensor: `out`, `lse`, `grad q` and so on; of selections `structure`, `importance` (see `compare_selection`) and,
            where ties are exact, `block_indices` (entries that differ).
        max_error: largest error.
        mean_error: mean error.
        max_budget: what `max_error` may be.
        mean_budget: what `mean_error` may be.
    """

    operator: str
    variant: str
    impl: str
    case: Case
    tensor: str
    max_error: float
    mean_error: float
    max_budget: float
    mean_budget: float

    @property
    def ok(self) -> bool:
        """Whether both errors keep to their budgets; false for NaN, and where plain PyTorch itself is not finite."""
        finite = math.isfinite(self.max_budget) and math.isfinite(self.mean_budget)
        return finite and self.max_error <= self.max_budget and self.mean_error <= self.mean_budget

    @property
    def strain(self) -> float:
        """The larger of error / budget: at most 1 where `ok`, more elsewhere, infinite where an error is not finite."""
        return max(_ratio(self.max_error, self.max_budget), _ratio(self.mean_error, self.mean_budget))

    @property
    def label(self) -> str:
        """Operator and variant."""
        return f"{self.operator} ({self.variant})" if self.variant else self.operator


def implementations(operator: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names to judge: every implementation that can run the operator here, but the reference, which is the measure.

    `nsa_attention` needs all operators of an implementation; if `impl="auto"` mixes several, `auto` is judged as well.
    An implementation of selected attention with several loop orders is judged in each: `triton/query_outer`.
    """
    parts = OPERATORS if operator == "nsa_attention" else (operator,)
    runnable = [set(available(part, device, dtype)) - {"reference"} for part in parts]
    names = [impl for impl in IMPLEMENTATIONS if all(impl in can for can in runnable)]
    if operator == "selected_attention":
        names = [name for impl in names for name in _with_loop_orders(impl)]
    taken = {decision.impl for decision in explain(device, dtype) if decision.chosen}
    return [*names, "auto"] if operator == "nsa_attention" and len(taken) > 1 else names


def judge(
    case: Case,
    device: torch.device | str = "cpu",
    impls: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Verdicts on every tensor, forward and backward, one operator after the other.

    Args:
        case: the inputs.
        device: where to compute.
        impls: the implementations to judge, of those that can run; all by default.
        operators: the operators to judge, of those that the case concerns; all by default.

    Raises:
        Exception: whatever an implementation raises.

    Example:
        >>> all(row.ok for row in judge(Case((40,)), impls=["blockwise"], operators=["combine"]))
        True
    """
    device = torch.device(device)
    for operator in case.operators:
        names = implementations(operator, device, case.dtype)
        names = [name for name in names if impls is None or name.split("/")[0] in impls]
        if not names or (operators is not None and operator not in operators):
            continue
        for problem in problems(operator, case, device):
            for impl in names:
                for tensor, errors in problem.errors(impl).items():
                    yield Row(operator, problem.variant, impl, case, tensor, *errors)


def _with_loop_orders(impl: str) -> list[str]:
    rows = (row for row in CAPABILITIES if (row.operator, row.impl) == ("selected_attention", impl))
    orders = [order for row in rows for order in row.loop_orders]
    return [f"{impl}/{order}" for order in orders] if len(orders) > 1 else [impl]


def _ratio(error: float, budget: float) -> float:
    if error == 0:
        return 0.0
    return error / budget if math.isfinite(error) and budget > 0 else math.inf
