"""Runs suites one behind the other, and makes a report of them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from ..config import NSAConfig
from ..validation import bad, check_choice
from . import baselines, shapes
from .cases import Bench
from .machine import clocks, environment, measure_roofline
from .results import Report, Row
from .shapes import Shape
from .timing import Effort, clock_of

SUITES = ("operators", "attention", "decode", "model", "memory")
SELECTIONS = ("random", "recorded", "both")
# A device without a GPU gets small heads and float32, as small models have.
_CPU_SHAPE: dict[str, Any] = {"heads": 8, "kv_heads": 2, "head_dim": 64, "head_dim_v": 64, "dtype": torch.float32}
_CPU_LENGTHS = {
    "operators": (4096, 16384),
    "attention": (4096, 8192, 16384, 32768),
    "memory": (16384, 65536),
}
_QUICK_LENGTHS = {"cuda": (8192,), "cpu": (1024,)}
_MAX_RUN_S = {"cuda": 10.0, "cpu": 60.0}
_MEMORY_LENGTHS = tuple(1 << n for n in (16, 18, 20))


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        suites: of `SUITES`.
        device: to measure on.
        preset: of `shapes.PRESETS`, for the suites `operators`, `attention` and `memory`.
        lengths: tokens, instead of those of a suite.
        changes: sizes instead of the preset's: fields of `Shape`, and of its `NSAConfig`.
        quick: few short cases.
        compile_baselines: measures baselines that are compiled for each shape on all of them, not on the first only.
        selections: `random`, `recorded` (of a trained model) or `both`; for the suite `operators`.
        suite_options: keyword arguments for the options of a suite, by its name.
        commit: of the sources; None to ask git.
        full_attention: names of `baselines.full_attention` that the sparse kind is held against; None for all.
        longest_run_s: what takes longer at the least is left out; None for 10 on a GPU and 60 on a CPU.
    """

    suites: tuple[str, ...] = SUITES
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    preset: str = "default"
    lengths: tuple[int, ...] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    compile_baselines: bool = False
    selections: str = "both"
    suite_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    commit: str | None = None
    full_attention: tuple[str, ...] | None = None
    longest_run_s: float | None = None

    def __post_init__(self) -> None:
        for suite in self.suites:
            check_choice("suite", suite, SUITES)
        check_choice("preset", self.preset, shapes.PRESETS)
        check_choice("selections", self.selections, SELECTIONS)
        for name in self.full_attention or ():
            known = (one.name for one in baselines.full_attention(self.device))
            check_choice("full_attention", name, tuple(known))

    def shapes(self, suite: str) -> list[Shape]:
        """The shapes of a suite that has any."""
        kind = self.device.type
        changes = {name: value for name, value in self.changes.items() if name in _fields(Shape)}
        nsa = {name: value for name, value in self.changes.items() if name in _fields(NSAConfig)}
        lengths = self.lengths
        if kind == "cpu":
            lengths = lengths or _CPU_LENGTHS[suite]
            small = _CPU_SHAPE if self.preset == "default" else {"dtype": _CPU_SHAPE["dtype"]}
            changes = {**small, **changes}
        if self.quick:
            lengths = self.lengths or _QUICK_LENGTHS[kind]
        if suite == "operators":
            chosen = shapes.operator_shapes(self.preset, lengths, **changes)
        else:
            if suite == "memory":
                lengths = lengths or _MEMORY_LENGTHS
            chosen = shapes.attention_shapes(self.preset, lengths, **changes)
        # Shapes that the changes made the same are one.
        return list(dict.fromkeys(dataclasses.replace(shape, nsa=shape.nsa.replace(**nsa)) for shape in chosen))


def run(
    options: Options,
    command: str,
    *,
    announce: Callable[[str], None] = lambda line: None,
    group_done: Callable[[str, list[Row], Report], None] = lambda title, rows, report: None,
) -> Report:
    """Measures.

    Args:
        options: what.
        command: that repeats it.
        announce: is told what comes next.
        group_done: is given the title and rows of a group that was measured, and the report up to there, which can be
            kept in case that a later group never ends.
    """
    device = options.device
    effort = Effort.quick() if options.quick else Effort()
    longest = _MAX_RUN_S[device.type] if options.longest_run_s is None else options.longest_run_s
    bench = Bench(device, clock_of(device), effort, announce, max_run_s=longest, full_attention=options.full_attention)
    found = environment(device, options.commit) | {"baselines": baselines.versions(device, Shape(1)), "clocks": {}}
    announce("roofline")
    dtypes = dict.fromkeys([torch.bfloat16 if device.type == "cuda" else torch.float32])
    dtypes |= dict.fromkeys([options.changes["dtype"]] if "dtype" in options.changes else [])
    roofline = measure_roofline(device, bench.clock, bench.effort, tuple(dtypes))
    bench = dataclasses.replace(bench, flop_per_s=1e12 * max(roofline.product_tflop_per_s.values()))
    report = Report(command, datetime.now(timezone.utc).isoformat(timespec="seconds"), found, roofline, ())
    for suite in options.suites:
        for title, rows in _guarded(suite, _groups(suite, options, bench)):
            found["clocks"][suite] = clocks(device)
            report = dataclasses.replace(report, rows=(*report.rows, *rows))
            group_done(title, rows, report)
    return report


def _guarded(suite: str, groups: Iterator[tuple[str, list[Row]]]) -> Iterator[tuple[str, list[Row]]]:
    """The groups; what raises ends the suite with a row that says so, and not the run."""
    try:
        yield from groups
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield suite, [Row(suite, "suite", "forward", suite, True, {}, skipped=f"failed: the rest of the suite: {what}")]


def _groups(suite: str, options: Options, bench: Bench) -> Iterator[tuple[str, list[Row]]]:
    """Titles and rows of the groups of a suite."""
    module = importlib.import_module(f"{__package__}.suites.{suite}")
    if suite in ("decode", "model"):
        yield from module.groups(module.options(options.quick, bench.device, **_given(suite, options)), bench)
        return
    chosen = options.shapes(suite)
    if suite == "memory" and bench.device.type == "cpu":
        for shape in chosen:
            yield str(shape), module.cpu_rows([shape], bench)
        return
    arguments: tuple[Any, ...] = ()
    if suite == "attention":
        arguments = (options.compile_baselines,)
    elif suite == "operators":
        arguments = (options.compile_baselines, _recorded(options))
    # A group holds its tensors until the next one is made, so nothing of it may be kept here.
    for title, cases in module.groups(chosen, bench, *arguments):
        bench.announce(title)
        rows = bench.measure(suite, cases)
        cases.clear()
        yield title, rows


def _given(suite: str, options: Options) -> dict[str, Any]:
    """Options of a suite that were given, with the lengths."""
    given = dict(options.suite_options.get(suite, {}))
    if suite == "model" and options.full_attention is not None:
        given["full_attention"] = options.full_attention
    return given if options.lengths is None else {"lengths": options.lengths, **given}


def _recorded(options: Options) -> Callable[[Shape], Tensor | None]:
    """The selection of a trained model for a shape that it fits; None for the others."""
    if options.selections == "random":
        return lambda shape: None
    from .. import selections

    recorded = selections.recorded_selections()

    def choose(shape: Shape) -> Tensor | None:
        same = all(
            getattr(shape.nsa, name) == getattr(recorded.config, name) for name in ("block_size", "num_selected_blocks")
        )
        if not same or shape.tokens > recorded.total_tokens:
            return None
        return selections.widened(recorded.layers, num_kv_heads=shape.kv_heads, total_tokens=shape.tokens).to(
            options.device
        )

    return choose


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def check_options(options: Options) -> None:
    """Refuses, before anything is measured, what a suite would refuse later, and `recorded` where no shape takes it.

    Raises:
        ValueError: if so.
    """
    for suite in options.suites:
        if suite in ("decode", "model"):
            module = importlib.import_module(f"{__package__}.suites.{suite}")
            module.options(options.quick, options.device, **_given(suite, options))
        else:
            options.shapes(suite)
    if options.selections == "recorded" and "operators" in options.suites:
        choose = _recorded(options)
        if all(choose(shape) is None for shape in options.shapes("operators")):
            expected = "random or both for shapes that no recorded selection fits"
            raise bad("--selections", expected, "'recorded'", "its length, blocks or slots are others")


__all__ = ["SELECTIONS", "SUITES", "Options", "check_options", "run"]
