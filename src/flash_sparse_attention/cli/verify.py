"""`fsa verify`: holds every implementation against the float64 reference."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from ..accuracy import FULL, QUICK, Case, Row, implementations, judge
from ..impl import IMPLEMENTATIONS
from ..training.config import resolve_device
from ..validation import bad, check_choice

# What a line needs where nobody looks at a terminal: nothing is cut off or wrapped.
_PLAIN_WIDTH = 200


class _Crash(NamedTuple):
    """An operator that raised."""

    operator: str
    case: Case
    error: str


def verify(
    impl: Annotated[
        list[str] | None,
        typer.Option(help="Implementation to verify; may be repeated.", show_default="all that can run"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick/--full", help="A few cases, or all of them.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Writes every single error to this file.")
    ] = None,
) -> None:
    """Verify every operator of every implementation against the float64 reference.

    An error may be at most twice that of plain PyTorch in the same dtype; exit code 1 if one is more.
    """
    where = resolve_device(device)
    cases = QUICK if quick else FULL
    _check_implementations(impl, where, cases)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_PLAIN_WIDTH)
    rows: list[Row] = []
    crashes: list[_Crash] = []
    with _one_thread():
        for found in _judge_all(cases, where, impl, console):
            if isinstance(found, Row):
                rows.append(found)
            else:
                crashes.append(found)
    if not rows and not crashes:
        console.print(f"Nothing to verify: on {where.type} there is no implementation but the reference.")
        return

    failures = [row for row in rows if not row.ok]
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(_report(where, quick, rows, crashes), indent=1) + "\n", encoding="utf-8")
    _print_table(rows, console)
    for row in failures:
        console.print(
            f"FAILED {row.impl}: {row.label}, {row.tensor}: error {row.max_error:.2e} (budget {row.max_budget:.2e}), "
            f"mean {row.mean_error:.2e} (budget {row.mean_budget:.2e}), case {row.case}, seed {row.case.seed}",
            soft_wrap=True,
        )
    for crash in crashes:
        console.print(f"RAISED {crash.operator}: {crash.error}, case {crash.case}", soft_wrap=True)
    verdict = f"{len(failures)} over budget, {len(crashes)} raised" if failures or crashes else "all within budget"
    console.print(f"{len(rows):,} tensors of {len(cases)} cases on {where.type}: {verdict}.")
    if failures or crashes:
        raise typer.Exit(1)


def _check_implementations(impls: Sequence[str] | None, device: torch.device, cases: Sequence[Case]) -> None:
    """An implementation that was asked for by name must exist, must not be the measure, and must run here."""
    for impl in impls or ():
        check_choice("impl", impl, IMPLEMENTATIONS)
        if impl == "reference":
            raise bad("--impl", "other than the reference", repr(impl), "it is what the others are held against")
        if not any(impl in implementations(op, device, case.dtype) for case in cases for op in case.operators):
            raise bad("--impl", f"an implementation that runs on {device.type}", repr(impl), "see fsa inspect")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for PyTorch. The tensors are small, and threads that wait for each other take longer: 8 times where
    other programs keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _judge_all(
    cases: Sequence[Case], device: torch.device, impls: Sequence[str] | None, console: Console
) -> Iterator[Row | _Crash]:
    """All verdicts; what an implementation raises becomes one, too. Shows the progress on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            for operator in case.operators:
                try:
                    yield from judge(case, device, impls, [operator])
                except Exception as error:
                    yield _Crash(operator, case, f"{type(error).__name__}: {error}")
            progress.advance(task)


def _print_table(rows: Sequence[Row], console: Console) -> None:
    """For each tensor of each operator, the case that came nearest to its budget."""
    worst: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        key = (row.impl, row.label, _dtype(row), row.tensor)
        if key not in worst or row.strain > worst[key].strain:
            worst[key] = row
    table = Table(box=None, pad_edge=False)
    for column in ("implementation", "operator", "dtype", "tensor"):
        table.add_column(column, no_wrap=True)
    for column in ("largest error", "budget", "mean error", "budget", "used"):
        table.add_column(column, justify="right", no_wrap=True)
    for key in sorted(worst):
        row = worst[key]
        used = f"{row.strain:.0%}" if math.isfinite(row.strain) else "over"
        errors = (row.max_error, row.max_budget, row.mean_error, row.mean_budget)
        table.add_row(*key, *(f"{error:.2e}" for error in errors), used, style=None if row.ok else "bold red")
    console.print(table)


def _report(device: torch.device, quick: bool, rows: Sequence[Row], crashes: Sequence[_Crash]) -> dict[str, Any]:
    """Everything, in types that JSON knows; errors that are not finite are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "flash_sparse_attention": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "grid": "quick" if quick else "full",
        "passed": not crashes and all(row.ok for row in rows),
        "rows": [
            {
                "operator": row.operator,
                "variant": row.variant,
                "impl": row.impl,
                "case": str(row.case),
                "seed": row.case.seed,
                "dtype": _dtype(row),
                "tensor": row.tensor,
                "max_error": number(row.max_error),
                "max_budget": number(row.max_budget),
                "mean_error": number(row.mean_error),
                "mean_budget": number(row.mean_budget),
                "ok": row.ok,
            }
            for row in rows
        ],
        "raised": [{"operator": crash.operator, "case": str(crash.case), "error": crash.error} for crash in crashes],
    }


def _dtype(row: Row) -> str:
    return str(row.case.dtype).removeprefix("torch.")
