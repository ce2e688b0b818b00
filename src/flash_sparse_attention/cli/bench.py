"""`fsa bench`: measures what each part costs on this machine, beside what others take for the same."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..bench import baselines
from ..bench.results import Report, Row
from ..bench.run import SELECTIONS, SUITES, Options, check_options
from ..bench.run import run as run_suites
from ..bench.shapes import PRESETS, parse_lengths
from ..training.config import resolve_device
from ..validation import FLOAT_DTYPES, bad, check_choice, check_positive
from .bench_redo import redo
from .bench_reports import compare, report

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES if dtype.itemsize <= 4}
# What a line needs where nobody looks at a terminal: nothing is cut off or wrapped.
_PLAIN_WIDTH = 200

bench_app = typer.Typer(
    help="Measure what each part costs here, and how it compares; report, compare and redo results.",
    invoke_without_command=True,
    no_args_is_help=False,
)
bench_app.command("report")(report)
bench_app.command("compare")(compare)
bench_app.command("redo")(redo)


@bench_app.callback()
def run(
    context: typer.Context,
    suites: Annotated[str, typer.Option(help=f"Which suites, with commas between: {', '.join(SUITES)}.")] = "all",
    preset: Annotated[
        str, typer.Option(help=f"Shapes of operators, attention and memory: {', '.join(PRESETS)}.")
    ] = "default",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few short cases: does all work, and roughly how fast?")
    ] = False,
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 8192,64K,1M.", show_default="by suite")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads.", show_default="by preset")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads.", show_default="by preset")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head.", show_default="by preset")] = None,
    head_dim_v: Annotated[
        int | None, typer.Option(help="Channels of a head of the values.", show_default="as --head-dim")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a selection block.", show_default="64")] = None,
    slots: Annotated[int | None, typer.Option(help="Blocks that a query selects.", show_default="16")] = None,
    window_size: Annotated[int | None, typer.Option(help="Tokens of the sliding window.", show_default="512")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=", ".join(_DTYPES), show_default="bfloat16, on a CPU float32")
    ] = None,
    selections: Annotated[
        str, typer.Option(help=f"Which blocks selected attention is given: {', '.join(SELECTIONS)}.")
    ] = "both",
    compile_baselines: Annotated[
        bool, typer.Option("--compile-baselines", help="Compiled baselines on all shapes, not on the first only.")
    ] = False,
    full_attention: Annotated[
        str | None,
        typer.Option(
            help="Full attention to compare with, such as cudnn,flash; or none. All suites but decode.",
            show_default="all there is",
        ),
    ] = None,
    longest_run: Annotated[
        float | None,
        typer.Option(
            help="operators, attention, memory: seconds; what takes longer at the least is left out.",
            show_default="10, on a CPU 60",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="decode: sequences.", show_default="16")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="decode: new tokens of each.", show_default="1")] = None,
    page_size: Annotated[int | None, typer.Option(help="decode: tokens of a page.", show_default="one page")] = None,
    models: Annotated[str | None, typer.Option(help="model: which, with commas between.", show_default="all")] = None,
    layers: Annotated[str | None, typer.Option(help="model: layers, or fit.", show_default="fit")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="File for the results, written as they come.")] = Path("bench.json"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces that file.")] = False,
    commit: Annotated[
        str | None, typer.Option(help="What is measured, where the sources lie in no repository.")
    ] = None,
) -> None:
    """Measure suites, and keep the results as JSON.

    Each case is checked first, and what fails has no time. Exit code 1 if something of this library failed.
    """
    if context.invoked_subcommand is not None:
        return
    where = resolve_device(device)
    chosen = SUITES if suites == "all" else tuple(dict.fromkeys(suites.replace(" ", "").split(",")))
    for suite in chosen:
        check_choice("--suites", suite, ("all", *SUITES))
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    sizes |= {"head_dim_v": head_dim if head_dim_v is None else head_dim_v}
    sizes |= {"num_selected_blocks": slots, "window_size": window_size}
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    for name, size in changes.items():
        check_positive(name, size)
    if dtype is not None:
        check_choice("--dtype", dtype, _DTYPES)
        changes["dtype"] = _DTYPES[dtype]
    if longest_run is not None and not longest_run > 0:
        raise bad("--longest-run", "a positive number of seconds", longest_run)
    full = () if full_attention == "none" else _names(full_attention)
    known = [one.name for one in baselines.full_attention(where)]
    for name in full or ():
        if name not in known:
            raise bad("--full-attention", f"none, or of {', '.join(known)}", repr(name))
    options = Options(
        suites=chosen,
        device=where,
        preset=preset,
        lengths=None if lengths is None else parse_lengths(lengths),
        changes=changes,
        quick=quick,
        compile_baselines=compile_baselines,
        selections=selections,
        suite_options=_suite_options(changes, batch, new_tokens, page_size, models, layers),
        commit=commit,
        full_attention=full,
        longest_run_s=longest_run,
    )
    check_options(options)
    if output.is_dir():
        raise bad("--output", "a file", f"the folder {str(output)!r}")
    if output.exists() and not overwrite:
        raise bad("--output", "a new file", f"{str(output)!r}, which is there", "--overwrite replaces it")
    measured = _measure(options, output)
    if any(row.skipped.startswith("failed") for row in measured.rows):
        raise typer.Exit(1)


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names with commas between."""
    return None if text is None else tuple(dict.fromkeys(text.replace(" ", "").split(",")))


def _suite_options(
    changes: dict[str, Any],
    batch: int | None,
    new_tokens: int | None,
    page_size: int | None,
    models: str | None,
    layers: str | None,
) -> dict[str, dict[str, Any]]:
    """What was said for one suite alone, and the sizes that it shares with others."""
    shared: tuple[str, ...] = ("heads", "kv_heads", "head_dim")
    decode: dict[str, Any] = {name: changes[name] for name in shared if name in changes}
    decode |= {"batch": batch, "new_tokens": new_tokens, "page_size": page_size}
    for name in ("batch", "new_tokens", "page_size"):
        if decode[name] is not None:
            check_positive(f"--{name.replace('_', '-')}", decode[name])
    if layers is not None and layers != "fit" and not (layers.isdigit() and int(layers) > 0):
        raise bad("--layers", "a number of layers, or fit", repr(layers))
    if "dtype" in changes:
        decode["dtype"] = changes["dtype"]
    model: dict[str, Any] = {
        "dtype": changes.get("dtype"),
        "models": _names(models),
        "layers": int(layers) if layers is not None and layers != "fit" else layers,
    }
    given = {"decode": decode, "model": model}
    return {suite: {name: x for name, x in found.items() if x is not None} for suite, found in given.items()}


def _measure(options: Options, output: Path) -> Report:
    """Runs, shows tables as they come, and keeps all that was measured whatever happens."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_PLAIN_WIDTH)
    if options.device.type == "cpu":
        console.print("There is no GPU in use here: these are the times of a CPU, beside those of PyTorch's attention.")
    command = shlex.join(["fsa", *sys.argv[1:]])

    with console.status("") as status:

        def group_done(title: str, rows: list[Row], so_far: Report) -> None:
            so_far.save(output)
            console.print(_table(title, rows, so_far))
            for row in rows:
                if row.skipped:
                    console.print(f"  no {row.operator}, {row.variant}, {row.direction}: {row.skipped}", soft_wrap=True)

        measured = run_suites(options, command, announce=lambda line: status.update(line), group_done=group_done)
    measured.save(output)
    roofline = measured.roofline
    rates = ", ".join(f"{name} products {rate:,.3g} TFLOP/s" for name, rate in roofline.product_tflop_per_s.items())
    console.print(f"{measured.device}: copy {roofline.copy_tb_per_s:.3g} TB/s, {rates}")
    console.print(f"Results are in {output}; fsa bench report {output} makes tables and plots.", soft_wrap=True)
    return measured


def _table(title: str, rows: Sequence[Row], measured: Report) -> Table:
    """Rows that have a time or memory."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    table.add_column("by", no_wrap=True)
    table.add_column("direction", no_wrap=True)
    for column in (
        "ms",
        "spread",
        "host ms",
        "TFLOP/s",
        "TB/s",
        "roofline",
        "peak GiB",
        "error/budget",
        "full attention",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    gains = {gain.ours.key: gain for gain in _best_full(rows, measured)}
    for row in rows:
        if row.skipped:
            continue
        gain = gains.get(row.key)
        fraction = measured.roofline.fraction(row)
        cells = [
            "" if row.ms is None else f"{row.ms.median:.3f}",
            "" if row.ms is None else f"{row.ms.spread:.1%}",
            _number(None if row.ms is None else row.ms.host_ms, "{:.2f}"),
            _number(row.tflop_per_s, "{:.3g}"),
            _number(row.tb_per_s, "{:.3g}"),
            _number(fraction, "{:.0%}"),
            _number(row.memory["peak"] / 2**30 if "peak" in row.memory else None, "{:.2f}"),
            _number(max(row.check.values(), default=None), "{:.2f}"),
            "" if gain is None else f"{gain.ratio:.2f}x of {gain.other.variant}",
        ]
        origin = "" if row.inputs == "random" else f", {row.inputs}"
        table.add_row(f"{row.operator}{origin}", row.variant, row.direction, *cells, style="bold" if row.ours else None)
    return table


def _best_full(rows: Sequence[Row], measured: Report) -> list[Any]:
    """The gain of each row of ours over the fastest full attention."""
    best: dict[tuple[str, ...], Any] = {}
    keys = {row.key for row in rows}
    for gain in measured.gains():
        if gain.ours.key in keys and gain.other.operator == "full attention":
            known = best.get(gain.ours.key)
            if known is None or gain.ratio < known.ratio:
                best[gain.ours.key] = gain
    return list(best.values())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
