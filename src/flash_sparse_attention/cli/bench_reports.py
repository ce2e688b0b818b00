"""`fsa bench report` and `fsa bench compare`: what becomes of results."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..bench import documents, figures, text
from ..bench.compare import Comparison
from ..bench.compare import compare as compared
from ..bench.report import page
from ..bench.sources import read, read_report, row_words, shape_words
from ..validation import bad

# What a line needs where nobody looks at a terminal: nothing is cut off or wrapped.
_PLAIN_WIDTH = 240
_STYLES = {"regression": "bold red", "improvement": "bold green", "slower": "yellow", "faster": "cyan"}


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results of fsa bench, of any devices.")],
    output: Annotated[
        Path | None, typer.Option(help="Page to write, in Markdown.", show_default="standard output")
    ] = None,
    readme: Annotated[
        list[Path] | None,
        typer.Option(help="Document whose tables and figures between comments are renewed; may be repeated."),
    ] = None,
    repeats: Annotated[
        Path | None,
        typer.Option(
            metavar="PATTERN", help="Results of second runs, held against FILE: a name, or in quotes one with *."
        ),
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures, which the page then shows.")] = None,
    svg: Annotated[bool, typer.Option("--svg", help="Pictures as SVG too.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Writes nothing; exit code 1 if something is not as the results have it.")
    ] = False,
) -> None:
    """Turn results into a page, the tables of documents, and pictures."""
    if svg and plots is None:
        raise bad("--svg", "with --plots", "no folder for pictures")
    if check and output is None and plots is None and not readme:
        raise bad("--check", "with --output, --readme or --plots", "none of them", "they say what is checked")
    devices = read(files, [] if repeats is None else _named(repeats))
    pictures = {} if plots is None else {device.name: figures.plots(device) for device in devices}
    written = page(devices, output, pictures, plots, svg, repeats)
    if output is None and plots is None and not readme:
        print(written, end="")
        return
    # All of it is known before any of it is written.
    texts = {document: documents.filled(document, devices) for document in readme or ()}
    if output is not None:
        if output in texts:
            raise bad("--readme", "another file than --output", repr(str(output)))
        texts[output] = written
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if check:
        stale = [path for path, content in texts.items() if _content(path) != content]
        suffixes = (".png", ".svg") if svg else (".png",)
        named = [f"{plot.name}{suffix}" for found in pictures.values() for plot in found for suffix in suffixes]
        stale += [plots / name for name in named if not (plots / name).exists()] if plots is not None else []
        for path in stale:
            console.print(f"{path}: not what the results give" if path.exists() else f"{path}: missing")
        if stale:
            raise typer.Exit(1)
        console.print("All is as the results have it.")
        return
    for path, content in texts.items():
        changed = _content(path) != content
        if changed:
            _write(path, content)
        console.print(f"{path}: {'written' if changed else 'unchanged'}")
    for plot in [plot for found in pictures.values() for plot in found]:
        assert plots is not None
        for path in figures.save(plot, plots, svg):
            console.print(f"{path}: drawn")


def _named(pattern: Path) -> list[Path]:
    """The file of this name, or all whose names are like this."""
    pattern = pattern.expanduser()
    found = [pattern] if pattern.is_file() else [path for path in map(Path, glob.glob(str(pattern))) if path.is_file()]
    if not found:
        raise bad("--repeats", "the name of a file, or a pattern that files have", repr(str(pattern)))
    return found


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Result of fsa bench to compare with.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Result of the later run.")],
    threshold: Annotated[float, typer.Option(help="Share by which times may differ.")] = 0.03,
    min_ms: Annotated[float, typer.Option(help="Rows whose times are both shorter are shown, and not judged.")] = 0.2,
) -> None:
    """Compare two results row by row.

    Exit code 1 if a row of ours is slower by more than the threshold, or has no time any more.
    """
    if not threshold > 0:
        raise bad("--threshold", "more than 0", threshold)
    if not min_ms >= 0:
        raise bad("--min-ms", "at least 0", min_ms)
    comparison = compared(read_report(before), read_report(after), threshold, min_ms)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, highlight=False, width=_PLAIN_WIDTH)
    for warning in comparison.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    _print_pairs(comparison, console)
    for row in comparison.lost:
        console.print(f"lost: {row_words(row)}: {row.skipped}", style="bold red", soft_wrap=True)
    for file, rows in ((before, comparison.only_before), (after, comparison.only_after)):
        if rows:
            console.print(f"Only in {file}:", soft_wrap=True)
        for row in rows:
            time = text.duration(row.ms.median) if row.ms is not None else ""
            console.print(f"  {row_words(row)}: {time}", soft_wrap=True)
    console.print(comparison.summary(), soft_wrap=True)
    if not comparison.passed:
        raise typer.Exit(1)


def _print_pairs(comparison: Comparison, console: Console) -> None:
    if not comparison.pairs:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("suite", "operator", "direction", "variant"):
        table.add_column(column, no_wrap=True)
    table.add_column("shape")
    for column in ("A", "B", "B / A"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("quartiles", ""):
        table.add_column(column, no_wrap=True)
    for pair in comparison.pairs:
        row, verdict = pair.after, comparison.verdict(pair)
        times = [text.duration(ms.median) for ms in (pair.before.ms, pair.after.ms) if ms is not None]
        table.add_row(
            row.suite,
            row.operator,
            row.direction,
            row.variant if row.ours else f"{row.variant} (baseline)",
            shape_words(row),
            *times,
            f"{pair.ratio:.3f}",
            "apart" if pair.apart else "overlap",
            verdict or ("agrees" if comparison.judged(pair) else "agrees, short"),
            style=_STYLES.get(verdict),
        )
    console.print(table)


def _content(path: Path) -> str | None:
    """What a file holds, line ends as they are; None if there is none."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def _write(path: Path, content: str) -> None:
    """Whole or not at all, line ends as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    with beside.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
    beside.replace(path)
