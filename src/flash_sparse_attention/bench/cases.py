"""A case: one operator on one shape, the ways to compute it, and how it is checked and timed.

first run    compiles; its seconds are kept apart
check        against the reference; what fails gets no time
memory       of one run alone
times        of all variants of a group of cases, in turn: forward passes, then backward passes
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import Expected, check
from .costs import Cost
from .results import Row, Timing
from .timing import Clock, Effort, Run, backward_of, first_run_s, interleaved, synchronize

# Times as much error as ours that a baseline may have: it must compute the same, and how exactly is its own business.
BASELINE_SLACK = 4.0
MIB = 2**20


class Refusal(Exception):
    """Why a variant cannot be run on a shape."""


@dataclass(frozen=True)
class Variant:
    """One way to compute something.

    Attributes:
        name: as in `Row.variant`.
        ours: as in `Row.ours`.
        run: takes the inputs of the case by name, returns the output `[N, ...]`. Raises `Refusal` for what it cannot.
        costs: by direction; those of the case for the directions that are missing.
        checked: whether it is checked against the reference.
        notes: as in `Row.notes`.
        strict: whether its errors are held to what those of ours may be, which ours are anyway.
    """

    name: str
    run: Callable[[Mapping[str, Tensor]], Tensor]
    ours: bool = True
    costs: Mapping[str, Cost] = field(default_factory=dict)
    checked: bool = True
    notes: str = ""
    strict: bool = False


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Attributes:
        operator: as in `Row.operator`.
        shape: as in `Row.shape`.
        heads: query heads, for the size of the check.
        inputs: by name; `wanted` of them are differentiated.
        variants: ways to compute it.
        costs: by direction: `forward` and `backward`, either, or `both` for one behind the other.
        expected: pieces of the output by the reference; None if `verify` is all there is to check.
        verify: checks an output in another way; returns errors as shares of what they may be.
        also: checks what else the newest run left.
        origin: as in `Row.inputs`.
        with_memory: whether memory is measured.
        check_gradients: whether gradients are checked; of very long sequences the reference takes too much memory.
    """

    operator: str
    shape: dict[str, int | str]
    heads: int
    inputs: Mapping[str, Tensor]
    variants: Sequence[Variant]
    costs: Mapping[str, Cost]
    expected: Expected | None = None
    verify: Callable[[Tensor], dict[str, float]] | None = None
    also: Callable[[], dict[str, float]] | None = None
    origin: str = "random"
    with_memory: bool = False
    check_gradients: bool = True

    @property
    def directions(self) -> tuple[str, ...]:
        """`forward` and `backward`, either, or `both` at once."""
        return tuple(self.costs)

    def row(self, suite: str, variant: Variant, direction: str, **found: Any) -> Row:
        """A row of this case."""
        cost = variant.costs.get(direction, self.costs[direction])
        fields: dict[str, Any] = {
            "inputs": self.origin,
            "notes": variant.notes,
            "flops": cost.flops or None,
            "bytes": cost.bytes or None,
            "moved_bytes": cost.moved_bytes,
        }
        return Row(suite, self.operator, direction, variant.name, variant.ours, self.shape, **{**fields, **found})


# A case, one of its variants, and what was found of it besides its time.
Entry = tuple[Case, Variant, dict[str, object]]


@dataclass(frozen=True)
class Bench:
    """What all suites measure with.

    Attributes:
        device: that is measured.
        clock: its clock.
        effort: how long each case is measured.
        announce: is told what comes next, a line.
        max_run_s: what takes longer at the least is left out.
        flop_per_s: of products of matrices on this device; 0 if that is not known.
        full_attention: names of `baselines.full_attention` that take part; None for all.
    """

    device: torch.device
    clock: Clock
    effort: Effort
    announce: Callable[[str], None] = lambda line: None
    max_run_s: float = 10.0
    flop_per_s: float = 0.0
    full_attention: tuple[str, ...] | None = None

    def measure(self, suite: str, cases: Iterable[Case]) -> list[Row]:
        """Rows of a group of cases, whose variants are timed in turn."""
        with warnings.catch_warnings():
            # PyTorch warns about each of its kernels that cannot run something, and about those that add in any order.
            warnings.filterwarnings("ignore", category=UserWarning)
            return self._measure(suite, cases)

    def _measure(self, suite: str, cases: Iterable[Case]) -> list[Row]:
        rows: list[Row] = []
        ready: list[Entry] = []
        for case in cases:
            for variant in case.variants:
                self.announce(f"{case.operator}, {variant.name}")
                found, reason = self._prepare(case, variant)
                if reason:
                    rows += [case.row(suite, variant, way, skipped=reason, **found) for way in case.directions]
                else:
                    ready.append((case, variant, found))
        for direction in ("forward", "backward", "both"):
            chosen = [entry for entry in ready if direction in entry[0].directions]
            if not chosen:
                continue
            self.announce(f"times, {direction}")
            times: list[Timing | str] = []
            with contextlib.suppress(Exception):
                times += self._times(chosen, direction)
            if not times:
                # Together they may want more memory than there is: one after the other, and what fails says so. Here,
                # where no exception holds what the others kept.
                self._clear()
                times += [self._time_alone(entry, direction) for entry in chosen]
            for (case, variant, found), time in zip(chosen, times, strict=True):
                taken: dict[str, object] = {"skipped": time} if isinstance(time, str) else {"ms": time}
                rows.append(case.row(suite, variant, direction, **taken, **found))
            self._clear()
        return rows

    def _times(self, entries: Sequence[Entry], direction: str) -> list[Timing]:
        """Timings of variants that are run in turn."""
        runs = {str(number): self._run(case, variant, direction) for number, (case, variant, _) in enumerate(entries)}
        return list(interleaved(runs, self.clock, self.effort).values())

    def _time_alone(self, entry: Entry, direction: str) -> Timing | str:
        """The timing of one variant, or why there is none."""
        try:
            return self._times([entry], direction)[0]
        except Exception as error:
            return _reason(error, entry[1])
        finally:
            self._clear()

    def _prepare(self, case: Case, variant: Variant) -> tuple[dict[str, object], str]:
        """Compiles, checks and weighs a variant: what was found, and why it cannot be timed."""
        found: dict[str, object] = {}
        flops = sum(variant.costs.get(way, cost).flops for way, cost in case.costs.items())
        if self.flop_per_s and flops / self.flop_per_s > self.max_run_s:
            return found, f"takes at least {flops / self.flop_per_s:.0f} s"
        backward = case.directions != ("forward",)
        try:
            found["compile_s"] = round(first_run_s(lambda: self._once(case, variant, backward), self.device), 2)
            if variant.checked:
                found["check"] = self._check(case, variant, backward)
            if case.with_memory and self.device.type == "cuda":
                found["memory"] = self._memory(case, variant, backward)
        except Refusal as refusal:
            return {}, str(refusal)
        except Exception as error:
            return {}, _reason(error, variant)
        finally:
            self._clear()
        errors = found.get("check")
        assert errors is None or isinstance(errors, dict)
        allowed = 1.0 if variant.ours or variant.strict else BASELINE_SLACK
        wrong = {name: error for name, error in (errors or {}).items() if not error <= allowed}
        if wrong:
            which = ", ".join(f"{name} ({error:.3g} of what its error may be)" for name, error in wrong.items())
            return found, f"{_verdict(variant)}: wrong {which}"
        return found, ""

    def _check(self, case: Case, variant: Variant, backward: bool) -> dict[str, float]:
        assert case.expected is not None or case.verify is not None, case.operator
        errors: dict[str, float] = {}
        if case.expected is not None:
            errors |= check(variant.run, case.expected, case.inputs, case.heads, backward and case.check_gradients)
        if case.verify is not None:
            with torch.no_grad():
                errors |= case.verify(variant.run(case.inputs))
        if case.also is not None:
            with torch.no_grad():
                errors |= case.also()
        return errors

    def _once(self, case: Case, variant: Variant, backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = variant.run(case.inputs)
        if backward:
            torch.autograd.grad(out, _wanted(case.inputs), torch.ones_like(out), allow_unused=True)

    def _run(self, case: Case, variant: Variant, direction: str) -> Run:
        if direction == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return variant.run(case.inputs)

            return forward
        if direction == "both":
            return lambda: self._once(case, variant, True)
        out = variant.run(case.inputs)
        return backward_of(out, _wanted(case.inputs), torch.randn_like(out))

    def _memory(self, case: Case, variant: Variant, backward: bool) -> dict[str, int]:
        """Bytes of one run alone."""
        self._clear()
        inputs = sum(x.numel() * x.element_size() for x in case.inputs.values())
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.set_grad_enabled(backward):
            out = variant.run(case.inputs)
        kept = torch.cuda.memory_allocated(self.device) - held
        peak = torch.cuda.max_memory_allocated(self.device) - held
        memory = {"inputs": inputs, "kept": kept, "forward_workspace": peak - kept}
        if backward:
            d_out = torch.randn_like(out)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            gradients = torch.autograd.grad(out, _wanted(case.inputs), d_out, allow_unused=True)
            new = sum(x.numel() * x.element_size() for x in gradients if x is not None)
            backward_peak = torch.cuda.max_memory_allocated(self.device)
            memory["backward_workspace"] = backward_peak - before - new
            peak = max(peak, backward_peak - held)
        memory["peak"] = inputs + peak
        return memory

    def _clear(self) -> None:
        gc.collect()
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception, variant: Variant) -> str:
    """Why a variant that raised has no time. A baseline may fail in any way; ours must not, and their rows say so."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"{_verdict(variant)}: {what}"


def _verdict(variant: Variant) -> str:
    """What it is called that a variant does not work: a failure of this library, or a baseline that is left out."""
    return "failed" if variant.ours or variant.strict else "refused"


def close(expected: Tensor, tolerance: float) -> Callable[[Tensor], dict[str, float]]:
    """A check by distance: mean error relative to the mean element, as a share of `tolerance`."""

    def verify(got: Tensor) -> dict[str, float]:
        distance = (got.double() - expected.double()).abs().mean() / expected.double().abs().mean()
        return {"out": distance.item() / tolerance}

    return verify


def _wanted(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs.values() if x.requires_grad)
