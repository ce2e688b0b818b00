"""Drawings of recorded attention: which blocks each query selects, and how open the gates are.

Functions return a `matplotlib.figure.Figure`, which `save_png` writes; the global state of pyplot is left alone. The
colours are those of Okabe and Ito, which colour-blind readers tell apart; a branch has one colour everywhere. Lengths
of the layout are inches, counted from the left and from the top.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .analysis import Category, chosen_distances, layer_labels, mean_gates, selection_map
from .nn.attention import BRANCHES
from .validation import FLOAT_DTYPES, bad, check_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_BRANCH_COLOURS = dict(zip(BRANCHES, ("#0072B2", "#D55E00", "#009E73"), strict=True))
_CATEGORY_COLOURS = {
    Category.FUTURE: "#FFFFFF",
    Category.UNUSED: "#E9ECEF",
    Category.INIT: "#0072B2",
    Category.LOCAL: "#7CC4EC",
    Category.CHOSEN: _BRANCH_COLOURS["selected"],
}
_INK, _FAINT_INK, _FRAME = "#22262A", "#667078", "#AEB6BD"
_LEFT, _RIGHT, _TOP = 0.85, 0.3, 1.0
_DPI = 150
# A map has at most this many rows and columns, about the pixels of a small panel; queries or blocks beyond share them.
_MAX_CELLS = 256
_MAX_BINS = 48
# Cells of a larger heat map have no room for a figure.
_MAX_HEADS_IN_FIGURES, _MAX_LAYERS_IN_FIGURES = 8, 32


def selection_figure(
    block_indices: Mapping[str, Tensor], *, block_size: int, num_init_blocks: int, num_local_blocks: int
) -> Figure:
    """A map for each layer and KV head: queries downwards, blocks to the right, coloured by `analysis.Category`.

    Where there are more queries than rows of pixels, neighbouring queries share one, and a block that few of them
    choose is faint.

    Args:
        block_indices: name of the layer -> its selection, int32 `[N, Hk, T]` of one sequence, the same N for all.
        block_size: l', tokens of a block.
        num_init_blocks: first blocks that the selection was forced to keep.
        num_local_blocks: newest blocks that it was forced to keep, the query's own included.

    Raises:
        ValueError: if there is no layer or no token, or a selection has a wrong shape, dtype or length.
    """
    from matplotlib.patches import Patch

    sizes = {"block_size": block_size, "num_init_blocks": num_init_blocks, "num_local_blocks": num_local_blocks}
    tokens = _common_length("block_indices", block_indices, {"Hk": None, "T": None}, torch.int32)
    layers, heads = len(block_indices), max(indices.shape[1] for indices in block_indices.values())
    # Few heads leave room for several layers side by side.
    layers_per_line = min(layers, max(1, 4 // heads))
    columns, lines = layers_per_line * heads, -(-layers // layers_per_line)
    panel = min(4.2, max(1.15, 9.0 / columns))
    roomy = panel > 1.8
    gap_x, gap_y = 0.22, 0.36
    width = _LEFT + columns * (panel + gap_x) - gap_x + _RIGHT
    # Only the page of a single panel is too narrow for a legend in one line.
    legend_lines = 1 if columns > 1 else 4
    figure = _page(width, _TOP + lines * (panel + gap_y) - gap_y + 0.65 + 0.2 * legend_lines)
    queries_per_row = _queries_per_row(tokens, block_size)
    means = f"; {queries_per_row} queries share a row of pixels" if queries_per_row > 1 else ""
    _heading(figure, "Blocks that each query attends to", f"{tokens:,} tokens in blocks of {block_size}{means}")

    for index, (layer, indices) in enumerate(zip(layer_labels(block_indices), block_indices.values(), strict=True)):
        line, place = divmod(index, layers_per_line)
        for head in range(indices.shape[1]):
            column = place * heads + head
            ax = _place(figure, _LEFT + column * (panel + gap_x), _TOP + line * (panel + gap_y), panel, panel)
            codes = selection_map(indices[:, head : head + 1], **sizes)
            _draw_map(ax, codes[0].numpy(), block_size, queries_per_row)
            # Numbers of five digits stand close in a panel that is not among the widest.
            most = 3 if tokens >= 10_000 and panel < 3 else 5
            _number_tokens(ax.xaxis, tokens, most=most if roomy else 2)
            _number_tokens(ax.yaxis, tokens, most=5 if roomy else 2, horizontal=False)
            _label(
                ax,
                f"{layer}, KV head {head}",
                size=8.5 if roomy else 7,
                x="key (token)" if index + layers_per_line >= layers else None,
                y="query (token)" if column == 0 else None,
            )
            distance = chosen_distances(codes, block_size=block_size).mean.item()
            note = "none chosen" if np.isnan(distance) else f"chosen: {distance:.1f} blocks back"
            note = note if roomy else note.replace(" ", "\n", 1).replace(" back", "\nback")
            # The future is empty, so there is room above the diagonal.
            ax.text(0.97, 0.96, note, transform=ax.transAxes, ha="right", va="top", fontsize=7, color=_FAINT_INK)
    names = {
        Category.CHOSEN: "chosen by score" + (", darker: by more of the queries" if queries_per_row > 1 else ""),
        Category.INIT: "first blocks, forced",
        Category.LOCAL: "newest blocks, forced",
        Category.UNUSED: "visible, not selected",
    }
    handles = [Patch(facecolor=_CATEGORY_COLOURS[code], edgecolor=_FRAME, lw=0.5, label=names[code]) for code in names]
    _legend(figure, handles, 4 // legend_lines)
    return figure


def gates_figure(gates: Mapping[str, Tensor]) -> Figure:
    """A column for each branch: the mean gate of every layer and head, and below it the gates along the sequence.

    A line is the median over the heads and the tokens about a position, its band holds the middle 80 % of them.

    Args:
        gates: name of the layer -> gates after the sigmoid, `[N, Hq, 3]` (or `[N, 1, 3]`, one for all heads), any
            floating dtype, the same N for all.

    Raises:
        ValueError: if there is no layer or no token, or gates have a wrong shape, dtype or length.
    """
    tokens = _common_length("gates", gates, {"Hq": None, "branches": len(BRANCHES)}, *FLOAT_DTYPES)
    labels, layers = layer_labels(gates), len(gates)
    heads = max(values.shape[1] for values in gates.values())
    means = np.full((layers, heads, len(BRANCHES)), np.nan)
    for layer, values in enumerate(gates.values()):
        means[layer, : values.shape[1]] = mean_gates(values).numpy()

    width, gap = 2.9, 0.3
    map_height = layers * min(0.34, max(0.16, 8.0 / layers))
    maps_top = _TOP + 0.35
    panel_height = min(0.9, max(0.5, 12.0 / layers))
    panels_top = maps_top + map_height + 1.0
    page_width = _LEFT + len(BRANCHES) * (width + gap) - gap + _RIGHT
    figure = _page(page_width, panels_top + layers * (panel_height + 0.12) + 0.5)
    _heading(figure, "How open the gates of the branches are", f"{tokens:,} tokens; 0 is closed, 1 is open")
    _subheading(figure, maps_top - 0.4, "Mean over the tokens, by layer and head")
    _subheading(
        figure,
        panels_top - 0.28,
        "Along the sequence: median over heads and nearby tokens, with the middle 80 % of them",
    )
    for column, branch in enumerate(BRANCHES):
        left = _LEFT + column * (width + gap)
        ax = _place(figure, left, maps_top, width, map_height)
        _draw_means(ax, means[:, :, column], _BRANCH_COLOURS[branch])
        _label(ax, branch, x="query head" if heads > 1 else "one gate for all heads", y=None)
        ax.set_yticks(range(layers), labels)
        ax.tick_params(labelleft=column == 0)
        _draw_scale(figure, left + width - 0.85, maps_top - 0.16, _BRANCH_COLOURS[branch])
        for layer, values in enumerate(gates.values()):
            ax = _place(figure, left, panels_top + layer * (panel_height + 0.12), width, panel_height)
            _draw_course(ax, values[..., column], _BRANCH_COLOURS[branch])
            _label(
                ax,
                None,
                x="position (token)" if layer == layers - 1 else None,
                y=labels[layer] if column == 0 else None,
            )
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure; makes the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")


def _draw_map(ax: Axes, codes: npt.NDArray[np.uint8], block_size: int, queries_per_row: int) -> None:
    """One head: `codes [N, J]` in colour, and the causal frontier."""
    tokens, blocks = codes.shape
    blocks_per_column = -(-blocks // _MAX_CELLS)
    image = _mean_colours(codes, queries_per_row, blocks_per_column)
    rows, columns = image.shape[:2]
    ax.imshow(
        image,
        extent=(0, columns * blocks_per_column * block_size, rows * queries_per_row, 0),
        aspect="auto",
        interpolation="nearest",
    )
    edges = np.arange(blocks + 1).repeat(2) * block_size
    ax.plot(edges[2:], edges[1:-1], color=_INK, lw=0.7 if blocks <= 128 else 0.35, solid_joinstyle="miter")
    ax.set_xlim(0, tokens)
    ax.set_ylim(tokens, 0)


def _mean_colours(
    codes: npt.NDArray[np.uint8], queries_per_row: int, blocks_per_column: int
) -> npt.NDArray[np.float64]:
    """`codes [N, J]` as colours `[rows, columns, 3]`, each the mean of the pairs (query, block) that share it.

    But for the chosen ones: their colour counts with the square root of their share, so that a block which one query in
    sixteen chooses can still be seen.
    """
    from matplotlib.colors import to_rgb

    bands = [codes[first : first + queries_per_row] for first in range(0, len(codes), queries_per_row)]
    columns = np.arange(0, codes.shape[1], blocks_per_column)
    # Band by band, as reduceat over the first axis takes ten times as long, which shows from 30,000 tokens on.
    counts = {
        code: np.add.reduceat(np.stack([(band == code).sum(0, dtype=np.int32) for band in bands]), columns, 1)
        for code in _CATEGORY_COLOURS
    }
    chosen, total = counts.pop(Category.CHOSEN), sum(counts.values())
    others = sum(count[..., None] * np.array(to_rgb(_CATEGORY_COLOURS[code])) for code, count in counts.items())
    share = np.sqrt(chosen / (chosen + total))[..., None]
    mean = others / np.maximum(total, 1)[..., None]
    return (1 - share) * mean + share * np.array(to_rgb(_CATEGORY_COLOURS[Category.CHOSEN]))


def _draw_means(ax: Axes, means: npt.NDArray[np.float64], colour: str) -> None:
    """The heat map of one branch, `means [layers, heads]`; NaN where a layer has fewer heads."""
    colours = _shades(colour)
    ax.imshow(means, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    layers, heads = means.shape
    every = -(-heads // 16)
    ax.set_xticks(range(0, heads, every), [str(head) for head in range(0, heads, every)] if heads > 1 else [""])
    ax.hlines(np.arange(1, layers) - 0.5, -0.5, heads - 0.5, color="white", lw=8.0 / max(layers, 8))
    ax.vlines(np.arange(1, heads) - 0.5, -0.5, layers - 0.5, color="white", lw=8.0 / max(heads, 8))
    ax.tick_params(length=0)
    if heads > _MAX_HEADS_IN_FIGURES or layers > _MAX_LAYERS_IN_FIGURES:
        return
    for layer, head in np.argwhere(~np.isnan(means)):
        value = means[layer, head]
        brightness = np.dot(colours(value)[:3], (0.3, 0.59, 0.11))
        ink = _INK if brightness > 0.55 else "white"
        ax.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=ink)


def _draw_scale(figure: Figure, left: float, top: float, colour: str) -> None:
    """A strip with the shades from 0 to 1."""
    ax = _place(figure, left, top, 0.7, 0.08)
    ax.imshow(np.linspace(0, 1, 64)[None], cmap=_shades(colour), vmin=0, vmax=1, aspect="auto")
    ax.set_xticks([])
    ax.set_yticks([])
    for x, text, side in ((-0.06, "0", "right"), (1.06, "1", "left")):
        ax.text(x, 0.5, text, transform=ax.transAxes, ha=side, va="center_baseline", fontsize=7, color=_FAINT_INK)


def _shades(colour: str) -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(colour, ["#FFFFFF", colour])


def _draw_course(ax: Axes, gates: Tensor, colour: str) -> None:
    """One layer and branch: quantiles of `gates [N, Hq]` over the heads and the tokens of each bin of positions."""
    tokens = gates.shape[0]
    edges = np.linspace(0, tokens, max(1, min(_MAX_BINS, tokens // 8)) + 1).round().astype(int)
    bins = gates.detach().cpu().double().split(np.diff(edges).tolist())
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, median, high = torch.stack([values.quantile(levels) for values in bins], dim=1).numpy()
    # A bin is drawn from its first token to the first of the next one.
    low, median, high = (np.append(course, course[-1]) for course in (low, median, high))
    ax.fill_between(edges, low, high, step="post", color=colour, alpha=0.22, lw=0)
    ax.plot(edges, median, drawstyle="steps-post", color=colour, lw=1.5)
    ax.set_xlim(0, tokens)
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.5, 1], ["0", "", "1"])
    ax.grid(axis="y", color="#E4E7EA", lw=0.6)
    ax.set_axisbelow(True)
    _number_tokens(ax.xaxis, tokens)


def _page(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at this place, in the common style."""
    page_width, page_height = figure.get_size_inches()
    ax = figure.add_axes(
        (left / page_width, 1 - (top + height) / page_height, width / page_width, height / page_height)
    )
    ax.tick_params(labelsize=7.5, color=_FRAME, labelcolor=_FAINT_INK, length=2.5, width=0.6, pad=2)
    for spine in ax.spines.values():
        spine.set(color=_FRAME, linewidth=0.6)
    return ax


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(_LEFT / width, 1 - 0.22 / height, title, fontsize=13, fontweight="bold", color=_INK, va="top")
    figure.text(_LEFT / width, 1 - 0.5 / height, subtitle, fontsize=9, color=_FAINT_INK, va="top")


def _subheading(figure: Figure, top: float, text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(_LEFT / width, 1 - top / height, text, fontsize=9, color=_FAINT_INK, va="top")


def _legend(figure: Figure, handles: list[Patch], columns: int) -> None:
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(_LEFT / width, 0.12 / height),
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=_INK,
        borderaxespad=0,
        borderpad=0,
        handlelength=1.4,
        columnspacing=1.8,
    )


def _label(ax: Axes, title: str | None, x: str | None, y: str | None, size: float = 8.5) -> None:
    """Title and axis labels; an axis without a label loses its numbers too, since a neighbour shows them."""
    if title is not None:
        ax.set_title(title, fontsize=size, color=_INK, loc="left", pad=4)
    ax.tick_params(labelbottom=x is not None, labelleft=y is not None)
    ax.set_xlabel(x or "", fontsize=8, color=_FAINT_INK, labelpad=3)
    ax.set_ylabel(y or "", fontsize=8, color=_FAINT_INK, labelpad=3)


def _queries_per_row(tokens: int, block_size: int) -> int:
    """Queries that share a row of pixels: whole shares of a block or whole blocks, so that forced blocks stay crisp."""
    needed = -(-tokens // _MAX_CELLS)
    return next(n for n in itertools.count(needed) if block_size % n == 0 or n % block_size == 0)


def _number_tokens(axis: Axis, tokens: int, most: int = 5, horizontal: bool = True) -> None:
    """Round positions, 0 and at most this many more; numbers at the ends of a horizontal axis stay within the panel."""
    step = 1
    while tokens // step > most:
        step *= 2
    ticks = range(0, tokens + 1, step)
    axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    for tick in axis.get_major_ticks():
        if horizontal and tick.get_loc() in (0, tokens):
            tick.label1.set_horizontalalignment("left" if tick.get_loc() == 0 else "right")


def _common_length(
    argument: str, layers: Mapping[str, Tensor], dims: Mapping[str, int | None], *dtypes: torch.dtype
) -> int:
    """Tokens of every layer's tensor `[N, *dims]`; at least one layer of at least one token."""
    lengths = {check_tensor(argument, values, {"N": None, **dims}, dtypes).shape[0] for values in layers.values()}
    if not lengths:
        raise bad(argument, "at least one layer", "none")
    if len(lengths) > 1 or not min(lengths):
        raise bad(argument, "of one length of at least 1 token in all layers", sorted(lengths))
    return lengths.pop()
