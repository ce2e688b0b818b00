"""Pictures of results: time, gain and memory by length, by heads of a group, roofline, decoding, models.

Functions leave the global state of pyplot alone, and files hold no date and no version: equal results are equal files,
with one version of matplotlib. The colours are those of Okabe and Ito; of several variants ours is blue, with full
lines or full marks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import text
from .results import FULL, Row
from .sources import Device, direction_order, distinct

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = "#0072B2"
_OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_DIRECTION_COLOURS = {"forward": "#0072B2", "backward": "#D55E00", "both": "#009E73", "step": "#CC79A7"}
_MARKERS = {"forward": "o", "backward": "^", "both": "s", "step": "D"}
_INK, _FAINT_INK, _FRAME, _GRID = "#22262A", "#667078", "#AEB6BD", "#E4E7EA"
_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": _FAINT_INK}
_DPI = 150
_WHOLE, _SELECTED = "whole attention", "selected attention"


@dataclass(frozen=True)
class Plot:
    """A picture that can be drawn.

    Attributes:
        name: of its file, without the suffix.
        caption: what it shows.
        draw: draws it.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]


def plots(device: Device) -> list[Plot]:
    """The pictures that there are rows for."""
    slug = "-".join("".join(char if char.isalnum() else " " for char in device.name.lower()).split())
    found = []
    for name, caption, plan in (
        ("length", "time and gain of the whole attention by length", _by_length),
        ("groups", "gain by the heads of a group", _by_group),
        ("roofline", "achieved arithmetic against its intensity", _roofline),
        ("memory", "memory by length", _memory),
        ("decode", "time of decoding by context", _decode),
        ("models", "speed of models", _models),
    ):
        draw = plan(device)
        if draw is not None:
            found.append(Plot(f"{slug}-{name}", f"{device.name}: {caption}", draw))
    return found


def save(plot: Plot, folder: Path, svg: bool = False) -> list[Path]:
    """Writes the picture as PNG, and as SVG if asked; returns the files. Makes the folder where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{plot.name}.png"]
    with _style():
        figure = plot.draw()
        figure.savefig(files[0], dpi=_DPI, format="png", metadata={"Software": None})
        if svg:
            files.append(folder / f"{plot.name}.svg")
            figure.savefig(files[1], format="svg", metadata={"Date": None, "Creator": None})
    return files


@contextmanager
def _style() -> Iterator[None]:
    """The same for every user: nothing of a matplotlibrc, and identifiers in SVG that do not change."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "flash_sparse_attention", "svg.fonttype": "path"})
        yield


def _by_length(device: Device) -> Callable[[], Figure] | None:
    rows = [row for row in device.rows if row.suite == "attention" and row.operator in (_WHOLE, FULL)]
    rows = _one_family(rows, "tokens", _WHOLE)
    if not rows:
        return None

    def draw() -> Figure:
        directions = sorted(distinct(rows, "direction"), key=direction_order)
        figure, panels = _page(len(directions) + 1, f"Whole attention by length: {_family(device, rows, 'tokens')}")
        for ax, direction in zip(panels, directions, strict=False):
            _draw_times(ax, [row for row in rows if row.direction == direction], "tokens")
            _finish(ax, direction.capitalize(), "tokens", "ms")
        ax = panels[-1]
        for direction in directions:
            points = _gains(device, [row for row in rows if row.direction == direction], "tokens")
            if points:
                colour = _DIRECTION_COLOURS.get(direction, _INK)
                ax.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3.5, lw=1.5, label=direction)
        _draw_one(ax)
        _number(ax, rows, "tokens")
        _finish(ax, f"Gain over the fastest {FULL}", "tokens", "times as fast")
        return figure

    return draw


def _by_group(device: Device) -> Callable[[], Figure] | None:
    """Gains where only the heads differ, at the length that was measured with most of them."""
    panels: list[tuple[str, list[Row]]] = []
    for suite, operator in (("attention", _WHOLE), ("operators", _SELECTED)):
        rows = [row for row in device.rows if (row.suite, row.operator) == (suite, operator) and row.ours]
        rows = [row for row in rows if {"heads", "kv_heads"} <= row.shape.keys() and device.gain(row) is not None]
        rows = _one_family(rows, "heads", operator, also=("kv_heads",))
        if rows:
            panels.append((operator, rows))
    if not panels:
        return None

    def draw() -> Figure:
        figure, axes = _page(len(panels), f"Gain by heads of a group: {device.name}", width=4.6)
        for ax, (operator, rows) in zip(axes, panels, strict=True):
            groups = sorted({_group(row) for row in rows})
            directions = sorted(distinct(rows, "direction"), key=direction_order)
            for place, direction in enumerate(directions):
                found = {_group(row): row for row in rows if row.direction == direction}
                offset = (place - (len(directions) - 1) / 2) * 0.8 / len(directions)
                heights = [_gain(device, found.get(group)) for group in groups]
                places = [number + offset for number in range(len(groups))]
                colour = _DIRECTION_COLOURS.get(direction, _INK)
                bars = ax.bar(places, heights, 0.75 / len(directions), color=colour, label=direction)
                shown = [text.digits(height) if height else "" for height in heights]
                ax.bar_label(bars, shown, fontsize=6.5, color=_INK, padding=1)
            _draw_one(ax)
            ax.set_xticks(range(len(groups)), [f"{size}\n{heads}/{kv}" for size, heads, kv in groups])
            sizes = text.in_words(_same(rows, "heads"))
            labels = "query heads of a group, heads/KV heads", "times as fast"
            _finish(ax, operator.capitalize(), *labels, subtitle=sizes, outside=True)
        return figure

    return draw


def _roofline(device: Device) -> Callable[[], Figure] | None:
    rows = [
        row
        for row in device.rows
        if row.tflop_per_s and row.bytes and row.flops and text.is_number(row.flops) and text.is_number(row.bytes)
    ]
    rates = device.sources[-1].report.roofline
    products = {dtype: rate for dtype, rate in rates.product_tflop_per_s.items() if text.is_number(rate) and rate > 0}
    copy = rates.copy_tb_per_s
    if not rows or copy is None or not text.is_number(copy) or not products:
        return None
    dtypes = set(distinct_sizes(rows, "dtype"))
    products = {dtype: rate for dtype, rate in products.items() if dtype in dtypes} or products

    def intensity(row: Row) -> float:
        assert row.flops is not None
        assert row.bytes is not None
        return row.flops / row.bytes

    def draw() -> Figure:
        figure, (ax,) = _page(1, f"Roofline: {device.name}", width=7.5, height=4.6)
        operators = distinct(rows, "operator")
        colours = dict(zip(operators, _cycle((_OURS, *_OTHERS), len(operators)), strict=True))
        for row in rows:
            colour = colours[row.operator]
            ax.plot(
                intensity(row),
                row.tflop_per_s or 0.0,
                _MARKERS.get(row.direction, "o"),
                color=colour,
                mfc=colour if row.ours else "white",
                ms=4.5,
                mew=0.9,
                alpha=0.85,
            )
        least, most = min(map(intensity, rows)) / 2, max(map(intensity, rows)) * 2
        for dtype, rate in products.items():
            knee = rate / copy
            xs = [min(least, knee / 2), knee, max(most, knee * 2)]
            ax.plot(xs, [min(rate, x * copy) for x in xs], color=_FAINT_INK, lw=1.0, zorder=0)
            note = f"{dtype} product {text.digits(rate)} TFLOP/s"
            ax.annotate(note, (xs[2], rate), xytext=(-2, 3), ha="right", **_NOTE)
        note = f"copy {text.digits(copy)} TB/s"
        _log(ax, "x", [least, most])
        _log(ax, "y", [*(row.tflop_per_s or 0.0 for row in rows), *products.values()])
        x = min(least, min(products.values()) / copy / 2)
        ax.annotate(note, (x, x * copy), xytext=(8, 0), va="top", **_NOTE)
        ax.plot([], [], "o", color=_INK, ms=4.5, label="ours")
        ax.plot([], [], "o", color=_INK, mfc="white", ms=4.5, label="baseline")
        for direction in sorted(distinct(rows, "direction"), key=direction_order):
            ax.plot([], [], _MARKERS.get(direction, "o"), color=_FAINT_INK, ms=4.5, label=direction)
        for operator, colour in colours.items():
            ax.plot([], [], "s", color=colour, ms=5, label=operator)
        _finish(ax, "", "FLOP for each byte of inputs and outputs", "TFLOP/s", outside=True)
        return figure

    return draw


def _memory(device: Device) -> Callable[[], Figure] | None:
    rows = [row for row in device.rows if row.operator in (_WHOLE, FULL) and any(row.memory.values())]
    suites = [suite for suite in ("memory", *distinct(rows, "suite")) if any(row.suite == suite for row in rows)]
    rows = _one_family([row for row in rows if row.suite in suites[:1]], "tokens", _WHOLE, timed=False)
    if not rows:
        return None

    # (variant, ours, name of the memory) -> tokens -> GiB, the most of several directions
    lines: dict[tuple[str, bool, str], dict[float, float]] = {}
    for row in rows:
        for name in ("peak", "kept", "workspace", "inputs") if row.ours else ("peak",):
            count, tokens = row.memory.get(name), float(row.shape["tokens"])
            if count and text.is_number(count):
                points = lines.setdefault((row.variant, row.ours, name), {})
                points[tokens] = max(points.get(tokens, 0.0), count / 2**30)
    if not lines:
        return None

    def draw() -> Figure:
        figure, (ax,) = _page(1, f"Memory by length: {_family(device, rows, 'tokens')}", width=6.5)
        for line, colour in zip(lines, _cycle((_OURS, *_OTHERS), len(lines)), strict=True):
            variant, ours, name = line
            places, heights = zip(*sorted(lines[line].items()), strict=True)
            ax.plot(places, heights, "o-" if ours else "o--", color=colour, ms=3.5, lw=1.5, label=f"{variant}, {name}")
        _log(ax, "y", [height for points in lines.values() for height in points.values()])
        _number(ax, rows, "tokens")
        _finish(ax, "", "tokens", "GiB", outside=True)
        return figure

    return draw


def _decode(device: Device) -> Callable[[], Figure] | None:
    rows = [row for row in device.rows if row.suite == "decode"]
    # What all layers share, and prompts, have no full attention beside them.
    operators = distinct([row for row in rows if row.ours and device.gains_of(row)], "operator")
    chosen = [
        (operator, _one_family([row for row in rows if row.operator in (operator, FULL)], "tokens", operator))
        for operator in operators
    ]
    panels = [(operator, found) for operator, found in chosen if found]
    if not panels:
        return None

    def draw() -> Figure:
        sizes = text.in_words(_same([row for _, found in panels for row in found], "tokens"))
        figure, axes = _page(len(panels), f"Decoding by context: {device.name}\n{sizes}", width=4.6)
        for ax, (operator, found) in zip(axes, panels, strict=True):
            _draw_times(ax, found, "tokens")
            _finish(ax, operator.capitalize(), "tokens before", "ms")
        return figure

    return draw


def _models(device: Device) -> Callable[[], Figure] | None:
    rows = [row for row in device.rows if row.suite == "model" and row.ms is not None and "tokens" in row.shape]
    panels = list(dict.fromkeys((row.operator, row.direction) for row in rows))
    if not panels:
        return None

    def draw() -> Figure:
        figure, axes = _page(len(panels), f"Models: {device.name}", width=max(4.6, 9.2 / len(panels)))
        variants = sorted({(not row.ours, row.variant) for row in rows})
        colours = _colours([variant for _, variant in variants], {name for other, name in variants if not other})
        for ax, (operator, direction) in zip(axes, panels, strict=True):
            found = sorted(
                (row for row in rows if (row.operator, row.direction) == (operator, direction)),
                key=lambda row: text.order(row.shape),
            )
            _, varying = text.common(row.shape for row in found)
            shapes = list(dict.fromkeys(row.key[4:] for row in found))
            names: list[str] = []
            for shape in shapes:
                row = next(row for row in found if row.key[4:] == shape)
                labels = text.labels(row.shape)
                names.append("\n".join(labels[name] for name in varying if name in labels) or labels["tokens"])
            for place, (_, variant) in enumerate(variants):
                speeds = {row.key[4:]: _speed(row) for row in found if row.variant == variant}
                offset = (place - (len(variants) - 1) / 2) * 0.8 / len(variants)
                heights = [speeds.get(shape, 0.0) for shape in shapes]
                spots = [number + offset for number in range(len(shapes))]
                bars = ax.bar(spots, heights, 0.76 / len(variants), color=colours[variant], label=variant)
                shown = [text.digits(height) if height else "" for height in heights]
                ax.bar_label(bars, shown, fontsize=6.5, color=_INK, padding=1)
            ax.set_xticks(range(len(shapes)), names)
            several = len({way for name, way in panels if name == operator}) > 1
            title = f"{operator}, {direction}" if several else operator
            _finish(ax, title.capitalize(), ", ".join(varying) or "tokens", "thousand tokens a second")
        return figure

    return draw


def distinct_sizes(rows: Iterable[Row], name: str) -> list[int | str]:
    """The values of a size in these rows, in their order."""
    return list(dict.fromkeys(row.shape[name] for row in rows if name in row.shape))


def _one_family(
    rows: Sequence[Row], size: str, operator: str, also: Sequence[str] = (), timed: bool = True
) -> list[Row]:
    """The rows that differ in this size alone, in the family where ours has most values of it; none if there is one."""

    def family(row: Row) -> tuple[Any, ...]:
        others = {name: value for name, value in row.shape.items() if name not in (size, *also)}
        return tuple(sorted((name, str(value)) for name, value in others.items()))

    rows = [row for row in rows if size in row.shape and (not timed or row.ms is not None)]
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.ours and row.operator == operator:
            found.setdefault((family(row), row.inputs), []).append(row)
    best = max(found.values(), key=lambda members: len({_sizes(row, (size, *also)) for row in members}), default=[])
    if len({_sizes(row, (size, *also)) for row in best}) < 2:
        return []
    first = best[0]
    baselines = [row for row in rows if not row.ours and _fits(row, first, (size, *also), operator)]
    return sorted([*best, *baselines], key=lambda row: text.order(row.shape))


def _fits(other: Row, ours: Row, free: Sequence[str], operator: str) -> bool:
    """Whether a baseline is of this family: its sizes, but for the free ones, are also ours."""
    if other.operator not in (operator, FULL):
        return False
    fixed = {name: value for name, value in other.shape.items() if name not in free}
    return all(ours.shape.get(name) == value for name, value in fixed.items())


def _sizes(row: Row, names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.shape.get(name) for name in names)


def _group(row: Row) -> tuple[int, int, int]:
    """(query heads of a group, query heads, key/value heads)"""
    heads, kv_heads = int(row.shape["heads"]), int(row.shape["kv_heads"])
    return heads // kv_heads, heads, kv_heads


def _gain(device: Device, row: Row | None) -> float:
    gain = None if row is None else device.gain(row)
    return 0.0 if gain is None else gain.ratio


def _gains(device: Device, rows: Iterable[Row], size: str) -> list[tuple[float, float]]:
    """(size, gain) of ours, the better of several variants."""
    best: dict[float, float] = {}
    for row in rows:
        gain = device.gain(row) if row.ours else None
        if gain is not None:
            place = float(row.shape[size])
            best[place] = max(gain.ratio, best.get(place, 0.0))
    return sorted(best.items())


def _speed(row: Row) -> float:
    """Thousands of tokens a second."""
    assert row.ms is not None
    return int(row.shape["tokens"]) * int(row.shape.get("batch", 1)) / row.ms.median


def _colours(variants: Sequence[str], ours: Iterable[str]) -> dict[str, str]:
    """Blue for ours, the first of them; the other colours for the rest."""
    mine = [name for name in variants if name in set(ours)]
    rest = [name for name in variants if name not in mine[:1]]
    return dict(zip(mine[:1], (_OURS,), strict=False)) | dict(zip(rest, _cycle(_OTHERS, len(rest)), strict=True))


def _cycle(colours: Sequence[str], number: int) -> list[str]:
    return [colours[place % len(colours)] for place in range(number)]


def _draw_times(ax: Axes, rows: Sequence[Row], size: str) -> None:
    """A line for each variant, with the middle half of the runs as a band."""
    lines = list(dict.fromkeys((row.operator, row.variant, row.ours) for row in rows))
    lines.sort(key=lambda line: (not line[2], line))
    names = {line: line[1] if line[0] != FULL else f"full, {line[1]}" for line in lines}
    colours = _colours([names[line] for line in lines], {names[line] for line in lines if line[2]})
    for line in lines:
        found = sorted(
            (row for row in rows if (row.operator, row.variant, row.ours) == line),
            key=lambda row: float(row.shape[size]),
        )
        places = [float(row.shape[size]) for row in found]
        times = [row.ms for row in found if row.ms is not None]
        colour, style = colours[names[line]], "-" if line[2] else "--"
        medians = [time.median for time in times]
        ax.plot(places, medians, marker="o", ms=3.5, lw=1.5, color=colour, ls=style, label=names[line])
        low, high = [time.first_quartile for time in times], [time.third_quartile for time in times]
        ax.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
    _log(ax, "y", [row.ms.median for row in rows if row.ms is not None])
    _number(ax, rows, size)


def _draw_one(ax: Axes) -> None:
    """The line above which ours is faster."""
    ax.axhline(1.0, color=_FAINT_INK, lw=0.8, zorder=0)


def _number(ax: Axes, rows: Sequence[Row], size: str) -> None:
    """A logarithmic axis with the sizes that were measured, 65,536 as 64K."""
    sizes = sorted({int(row.shape[size]) for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [_short(value) for value in sizes])
    ax.minorticks_off()


def _log(ax: Axes, side: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers: of every decade 1, 2 and 5, or 1 alone where there are many."""
    from matplotlib.ticker import LogLocator, NullLocator

    few = max(values) < 1000 * min(values)
    if side == "x":
        ax.set_xscale("log")
    else:
        ax.set_yscale("log")
    axis = ax.xaxis if side == "x" else ax.yaxis
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _short(value: int) -> str:
    for unit, scale in (("M", 2**20), ("K", 2**10)):
        if value >= scale and value % (scale // 4) == 0:
            return f"{value / scale:g}{unit}"
    return f"{value:,}"


def _same(rows: Sequence[Row], size: str) -> dict[str, str]:
    """Labels that ours have in common, without that of the size."""
    same, _ = text.common(row.shape for row in rows if row.ours)
    return {name: value for name, value in same.items() if name != size.replace("_", " ")}


def _family(device: Device, rows: Sequence[Row], size: str) -> str:
    return f"{device.name}\n{text.in_words(_same(rows, size))}"


def _page(panels: int, heading: str, width: float = 3.6, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A row of panels under a heading, whose second line is fainter."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, width * panels), height), facecolor="white", layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    figure.suptitle(heading, fontsize=9.5, color=_INK, x=0.01, ha="left")
    for ax in axes:
        ax.tick_params(labelsize=7.5, color=_FRAME, labelcolor=_FAINT_INK, length=2.5, width=0.6, pad=2)
        for spine in ax.spines.values():
            spine.set(color=_FRAME, linewidth=0.6)
        ax.grid(color=_GRID, lw=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _finish(ax: Axes, title: str, x: str, y: str, subtitle: str = "", outside: bool = False) -> None:
    """Titles, and a legend of what has a label, inside the panel or on its right."""
    # Broken behind commas only.
    lines = textwrap.wrap(subtitle.replace(" ", "\xa0").replace(",\xa0", ", "), 52)
    ax.set_title(title, fontsize=9, color=_INK, loc="left", pad=5 + 10 * len(lines))
    ax.annotate("\n".join(lines), (0, 1), xytext=(0, 4), xycoords="axes fraction", va="bottom", **_NOTE)
    ax.set_xlabel(x, fontsize=8, color=_FAINT_INK, labelpad=3)
    ax.set_ylabel(y, fontsize=8, color=_FAINT_INK, labelpad=3)
    if ax.get_legend_handles_labels()[0]:
        place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)} if outside else {"loc": "best"}
        ax.legend(fontsize=7, labelcolor=_INK, frameon=False, **place)
