"""The page of all results: device by device what was measured, how, and where a baseline is faster."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from . import agreement, text
from .figures import Plot
from .results import FULL, Gain, Row, comparable
from .sources import Device, Source, direction_order, distinct, row_words, shape_words

_ENVIRONMENT = {
    "kind": "kind",
    "driver": "driver",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "torch": "torch",
    "triton": "Triton",
    "python": "Python",
    "flash_sparse_attention": "flash_sparse_attention",
    "commit": "commit",
}
# What has a place of its own on the page.
_ELSEWHERE = {"device", "method", "clocks", "baselines"}
_CLOCKS = {"sm_mhz": "SM MHz", "memory_mhz": "memory MHz", "power_w": "power W", "temperature_c": "°C"}
# What takes the place of full attention.
RIVALS = ("whole attention", "selected attention", "decode attention", "decode step")
# Rows whose quartiles are further apart, as a share of the median, are named; shorter ones vary anyway.
STEADY, STEADY_FROM_MS = 0.03, 0.2
_LEGEND = """\
A time is the median of its runs, and the middle half of them lies between the times in parentheses. *Host* is the
time until the call returned: where it is longer than the time of the device, a call by itself waits for the host, and
a CUDA graph does not. *TFLOP/s* counts the arithmetic that the operator needs, *TB/s* what its schedule moves (where
that is not modelled, inputs and outputs once). *Roofline* is the share of the time that the arithmetic, or the least
traffic, would take at the rates measured on the same device in the same run. *Over* a baseline says how many times as
long the baseline takes: below 1x it is the faster one. Rows of this library are bold. *Error* is the largest error of
an output as a share of its bound."""


def page(
    devices: Sequence[Device],
    output: Path | None = None,
    plots: Mapping[str, Sequence[Plot]] | None = None,
    folder: Path | None = None,
    svg: bool = False,
    repeats: Path | None = None,
) -> str:
    """The page in Markdown.

    Args:
        devices: what was measured.
        output: where the page will stand; its links start there. None for a page that stands nowhere.
        plots: pictures of a device, by its name.
        folder: where the pictures are.
        svg: the pictures are there as SVG too, which the command on the page then says.
        repeats: pattern of the files of second runs, likewise.
    """
    link = links_from(output)
    parts = ["# Benchmarks\n", "<!-- Made by `fsa bench report`: what is changed by hand is lost. -->\n"]
    parts.append(f"What `fsa bench` measured on {text.listed(device.name for device in devices)}.\n\n{_LEGEND}\n")
    parts.append(
        f"This page is what\n\n```bash\n{_command(devices, output, folder, svg, repeats)}\n```\n\nmakes of the files.\n"
    )
    parts.append("".join(f"- [{device.name}](#{_anchor(device.name)})\n" for device in devices))
    for device in devices:
        parts.append(f"## {device.name}\n")
        parts += _environment(device, link)
        parts += _pictures((plots or {}).get(device.name, ()), folder, link)
        parts += _steadiness(device)
        parts += ["### Two runs\n", agreement.table(device, link)] if device.repeats else []
        parts += _where_we_lose(device)
        for suite in distinct(device.rows, "suite"):
            parts += _suite(device, suite)
        parts += _memory(device)
        parts += _checks(device)
        parts += _skipped(device)
        parts += _method(device)
    return "\n".join(parts)


def links_from(document: Path | None) -> Callable[[Path], str]:
    """How a document links to files: relative to its folder."""

    def link(path: Path) -> str:
        return path.name if document is None else Path(os.path.relpath(path, document.parent)).as_posix()

    return link


def baseline_name(gain: Gain) -> str:
    """`cudnn`, or `full attention, cudnn` where that takes the place of another operator."""
    return gain.other.variant if gain.other.operator == gain.ours.operator else f"{FULL}, {gain.other.variant}"


def largest_error(row: Row) -> float | None:
    """Of the outputs of a row as a share of what it may be; infinite for one that is no number, None if unchecked."""
    return max((error if text.is_number(error) else math.inf for error in row.check.values()), default=None)


def _command(
    devices: Sequence[Device], output: Path | None, folder: Path | None, svg: bool, repeats: Path | None
) -> str:
    """What made the page, as typed in the folder that holds all that it names."""
    files = sorted(source.path for device in devices for source in device.sources)
    written = [path for path in (output, folder, repeats) if path is not None]
    root = os.path.commonpath([*(path.absolute().parent for path in [*files, *written])])

    def named(path: Path) -> str:
        return shlex.quote(Path(os.path.relpath(path, root)).as_posix())

    options = [] if repeats is None else [f"--repeats {named(repeats)}"]
    options += [] if output is None else [f"--output {named(output)}"]
    options += [] if folder is None else [f"--plots {named(folder)}" + (" --svg" if svg else "")]
    return " \\\n    ".join(["fsa bench report", *map(named, files), *options])


def _environment(device: Device, link: Callable[[Path], str]) -> list[str]:
    names = list(dict.fromkeys(name for source in device.sources for name in source.report.environment))
    known = [name for name in _ENVIRONMENT if name in names]
    others = sorted(name for name in names if name not in _ENVIRONMENT and name not in _ELSEWHERE)
    rows = []
    for name in [*known, *others, *(name for name in ("baselines",) if name in names)]:
        values = device.setting(name)
        said = [(text.value_text(value), sources) for value, sources in values if value not in (None, "", {}, [])]
        if len(values) == 1:
            cell = "".join(value for value, _ in said)
        else:
            cell = "; ".join(f"{value} ({_names(sources)})" for value, sources in said)
        rows.append([_ENVIRONMENT.get(name, name.replace("_", " ")), cell])
    parts = ["### Environment\n", text.table(["", device.name], rows)]
    parts.append(
        "".join(
            f"- [{source.path.name}]({link(source.path)}), of {source.report.date}: `{source.report.command}`\n"
            for source in device.sources
        )
    )
    parts += _clocks(device)
    return [*parts, *_roofline(device)]


def _clocks(device: Device) -> list[str]:
    rows, several = [], len(device.sources) > 1
    for source in device.sources:
        clocks = source.report.environment.get("clocks")
        for suite, values in clocks.items() if isinstance(clocks, Mapping) else ():
            if isinstance(values, Mapping):
                shown = [text.value_text(values[name]) if values.get(name) is not None else "" for name in _CLOCKS]
                rows.append([suite, *shown, source.path.name if several else ""])
    return [text.table(["clocks, suite by suite", *_CLOCKS.values(), "file"], rows)] if rows else []


def _roofline(device: Device) -> list[str]:
    rows = []
    for source in device.sources:
        rates = source.report.roofline
        products = [
            f"{dtype} {text.digits(rate)} TFLOP/s"
            for dtype, rate in rates.product_tflop_per_s.items()
            if text.is_number(rate)
        ]
        copy = text.digits(rates.copy_tb_per_s)
        if copy or products:
            rows.append([source.path.name, copy and f"{copy} TB/s", ", ".join(products)])
    header = ["measured roofline", "copy, bytes read and written", "product of matrices"]
    return [text.table(header, rows)] if rows else ["The roofline was not measured.\n"]


def _pictures(plots: Sequence[Plot], folder: Path | None, link: Callable[[Path], str]) -> list[str]:
    if folder is None:
        return []
    return [f"![{plot.caption}]({link(folder / f'{plot.name}.png')})\n" for plot in plots]


def _suite(device: Device, suite: str) -> list[str]:
    timed = [row for row in device.rows if row.suite == suite and row.ms is not None]
    parts = [f"### Suite {suite}\n"] if timed else []
    for operator in distinct(timed, "operator"):
        parts += _operator(device, [row for row in timed if row.operator == operator])
    return parts


def _operator(device: Device, rows: list[Row]) -> list[str]:
    """The table of an operator: its shapes, in order, and on each its directions and variants, ours first."""
    rows = sorted(
        rows,
        key=lambda row: (
            text.order(row.shape),
            row.inputs,
            direction_order(row.direction),
            not row.ours,
        ),
    )
    same, varying = text.common(row.shape for row in rows)
    several_inputs = len({row.inputs for row in rows}) > 1
    gains = {row.key: _fastest_by_baseline(device.gains_of(row)) for row in rows if row.ours}
    baselines = sorted({name for found in gains.values() for name in found}, key=lambda name: (FULL in name, name))
    notes: dict[str, int] = {}
    lines = []
    for row in rows:
        assert row.ms is not None
        labels = text.labels(row.shape)
        mark = f" [{notes.setdefault(row.notes, len(notes) + 1)}]" if row.notes else ""
        error = largest_error(row)
        lines.append(
            [
                *(labels.get(name, "") for name in varying),
                row.inputs if several_inputs else "",
                row.direction,
                (f"**{row.variant}**" if row.ours else row.variant) + mark,
                text.duration(row.ms.median, row.ms.first_quartile, row.ms.third_quartile),
                text.duration(row.ms.host_ms) if device.kind == "cuda" else "",
                text.digits(row.tflop_per_s),
                text.digits(row.tb_per_s),
                text.share(device.of_roofline(row)),
                *(text.ratio(gains.get(row.key, {}).get(name)) for name in baselines),
                "" if error is None else text.share(error) or "no number",
            ]
        )
    header = [*varying, "inputs", "direction", "variant", "time", "host", "TFLOP/s", "TB/s", "roofline"]
    header += [*(f"over {name}" for name in baselines), "error"]
    parts = [f"#### {rows[0].operator}\n"]
    parts += [f"All with {text.in_words(same)}.\n"] if same and len(rows) > 1 else []
    parts += [f"With {text.in_words(same)}.\n"] if same and len(rows) == 1 else []
    parts.append(text.table(header, lines))
    parts += ["".join(f"- [{number}] {text.cell(note)}\n" for note, number in notes.items())] if notes else []
    first = [row.compile_s for row in rows if row.ours and row.compile_s is not None and text.is_number(row.compile_s)]
    if first:
        took = " to ".join(dict.fromkeys(text.duration(1e3 * seconds) for seconds in (min(first), max(first))))
        parts.append(f"The first call of ours, with what was not compiled before, took {took}.\n")
    return parts


def _fastest_by_baseline(gains: Iterable[Gain]) -> dict[str, float]:
    """Name of a baseline -> the gain over it, over the fastest of several with one name."""
    found: dict[str, float] = {}
    for gain in gains:
        name = baseline_name(gain)
        found[name] = min(gain.ratio, found.get(name, math.inf))
    return found


def _memory(device: Device) -> list[str]:
    parts = []
    rows = [row for row in device.rows if row.memory]
    for suite, operator in dict.fromkeys((row.suite, row.operator) for row in rows):
        chosen = [row for row in rows if (row.suite, row.operator) == (suite, operator)]
        chosen.sort(key=lambda row: (text.order(row.shape), row.inputs, direction_order(row.direction), not row.ours))
        same, varying = text.common(row.shape for row in chosen)
        names = list(dict.fromkeys(name for row in chosen for name in row.memory))
        lines = []
        for row in chosen:
            labels = text.labels(row.shape)
            lines.append(
                [
                    *(labels.get(name, "") for name in varying),
                    row.direction,
                    f"**{row.variant}**" if row.ours else row.variant,
                    *(text.size(row.memory.get(name)) for name in names),
                ]
            )
        parts.append(f"{operator}, suite {suite}" + (f", {text.in_words(same)}" if same else "") + ":\n")
        parts.append(text.table([*varying, "direction", "variant", *names], lines))
    return ["### Memory\n", *parts] if parts else []


def _checks(device: Device) -> list[str]:
    """The largest error of each variant of each operator, and all that are too large."""
    worst: dict[tuple[str, str, str], tuple[float, Row, int]] = {}
    for row in device.rows:
        error = largest_error(row)
        if error is not None:
            key = (row.operator, row.variant, row.direction)
            known = worst.get(key, (-1.0, row, 0))
            worst[key] = (*max((error, row), known[:2], key=lambda pair: pair[0]), known[2] + 1)
    checked = [row for row in device.rows if row.check]
    if not checked:
        return ["### Checks\n", "No row was checked.\n"]
    failed = [row for row in checked if not (largest_error(row) or 0.0) <= 1]
    verdict = f"**{text.counted(len(failed), 'row')} too far off:**" if failed else "All within what is allowed."
    unchecked = sum(row.ours and row.ms is not None and not row.check for row in device.rows)
    parts = [
        "### Checks\n",
        f"{text.counted(len(checked), 'row')} checked on the shapes that were timed. {verdict}"
        + (f" {text.counted(unchecked, 'timed row')} of ours without a check." if unchecked else "")
        + "\n",
    ]
    parts += ["".join(f"- {row_words(row)}: {text.value_text(row.check)}\n" for row in failed)] if failed else []
    lines = []
    for (operator, variant, direction), (error, row, count) in worst.items():
        output = max(row.check, key=lambda name: row.check[name] if text.is_number(row.check[name]) else math.inf)
        where = text.in_words(text.labels(row.shape))
        lines.append([operator, variant, direction, f"{count:,}", text.share(error) or "no number", output, where])
    header = ["operator", "variant", "direction", "rows", "largest error", "of", "at"]
    return [*parts, text.table(header, lines)]


def _steadiness(device: Device) -> list[str]:
    """How many rows vary within the run, by more than what runs are compared by."""
    timed = [(row.ms.spread, row) for row in device.rows if row.ms is not None and row.ms.median > STEADY_FROM_MS]
    unsteady = [(spread, row) for spread, row in timed if text.is_number(spread) and spread > STEADY]
    if not unsteady:
        return []
    spread, row = max(unsteady, key=lambda one: one[0])
    which = f"{row.operator}, {row.variant}, {row.direction}, {shape_words(row)}"
    rows, most = text.counted(len(timed), "row"), text.share(spread)
    return [
        f"Of {rows} above {STEADY_FROM_MS} ms, {len(unsteady)} have quartiles that lie more than {text.share(STEADY)} "
        f"of the median apart, at most {most} ({which}): gains of such rows are no more exact than that.\n"
    ]


def _where_we_lose(device: Device) -> list[str]:
    # A part of the whole is no rival of full attention.
    rivals = [gain for gain in device.gains if gain.other.operator != FULL or gain.ours.operator in RIVALS]
    lost = sorted((gain for gain in rivals if gain.ratio < 1), key=lambda gain: gain.ratio)
    pairs = text.counted(len(rivals), "comparable pair")
    parts = ["### Where we lose\n"]
    if not rivals:
        parts.append("Nothing here is comparable with a baseline.\n")
    elif not lost:
        parts.append(f"Nowhere: in none of {pairs} is the baseline faster.\n")
    else:
        parts.append(f"In {len(lost):,} of {pairs} the baseline is faster, here with the largest loss first.\n")
        lines = []
        for gain in lost:
            ours, other = gain.ours, gain.other
            assert ours.ms is not None
            assert other.ms is not None
            overlap = ours.ms.first_quartile <= other.ms.third_quartile
            lines.append(
                [
                    ours.operator,
                    ours.direction,
                    ours.variant,
                    shape_words(ours),
                    baseline_name(gain),
                    text.duration(ours.ms.median),
                    text.duration(other.ms.median),
                    text.ratio(gain.ratio) + (", within the spread" if overlap else ""),
                ]
            )
        header = ["operator", "direction", "ours", "shape", "faster", "our time", "its time", "gain"]
        parts.append(text.table(header, lines))
    return [*parts, *_not_ours(device)]


def _not_ours(device: Device) -> list[str]:
    """Where a baseline has a time and ours has none."""
    lines = []
    for row in device.rows:
        if not row.ours or not row.skipped:
            continue
        source = device.source_of(row)
        others = [
            other for other in source.report.rows if not other.ours and other.ms is not None and comparable(row, other)
        ]
        if others:
            name = text.listed(other.variant for other in others)
            lines.append([row.operator, row.direction, row.variant, shape_words(row), name, row.skipped])
    if not lines:
        return []
    header = ["operator", "direction", "ours", "shape", "ran", "why ours did not"]
    return ["Skipped by us, while a baseline ran:\n", text.table(header, lines)]


def _skipped(device: Device) -> list[str]:
    """What has no time, together where the reason is one."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in device.rows:
        if row.skipped:
            groups.setdefault((row.suite, row.operator, row.variant, row.skipped), []).append(row)
    if not groups:
        return []
    lines = []
    for (suite, operator, variant, why), rows in groups.items():
        rows.sort(key=lambda row: text.order(row.shape))
        name = f"**{variant}**" if rows[0].ours else variant
        shapes = text.listed((shape_words(row) for row in rows), most=3)
        lines.append([suite, operator, name, text.listed(distinct(rows, "direction")), shapes, why])
    header = ["suite", "operator", "variant", "direction", "shapes", "why"]
    return ["### Skipped\n", text.table(header, lines)]


def _method(device: Device) -> list[str]:
    parts = []
    for method, sources in device.setting("method"):
        sentences = [method] if isinstance(method, str) else list(method or ())
        if sentences:
            of = f"{_names(sources)}:\n\n" if len(device.setting("method")) > 1 else ""
            parts.append(of + "".join(f"- {text.value_text(sentence)}\n" for sentence in sentences))
    return ["### How it was measured\n", *parts] if parts else []


def _names(sources: Iterable[Source]) -> str:
    return text.listed(source.path.name for source in sources)


def _anchor(heading: str) -> str:
    """What GitHub calls a heading."""
    return "".join(char for char in heading.lower() if char.isalnum() or char in "_- ").replace(" ", "-")
