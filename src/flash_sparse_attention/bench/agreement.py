"""Second runs held against the first ones, file by file: how many times agree, and which deviates most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import text
from .compare import Comparison, compare
from .results import Report
from .sources import Device, Source, row_words

NOTHING = "There was no row of at least 0.2 ms in two runs.\n"


@dataclass(frozen=True)
class Agreement:
    """Rows that two files have both."""

    first: Source
    second: Source
    comparison: Comparison


def agreements(device: Device) -> list[Agreement]:
    """Of every second run with every file that has the newest of some of its rows."""
    found = []
    for second in device.repeats:
        for first in device.sources:
            rows = [row for row in second.report.rows if device.has(row) and device.source_of(row) is first]
            if rows:
                comparison = compare(first.report, dataclasses.replace(second.report, rows=tuple(rows)))
                found.append(Agreement(first, second, comparison))
    return found


def table(device: Device, link: Callable[[Path], str]) -> str:
    """What agrees, in Markdown; a row for each pair of files.

    Args:
        device: with second runs.
        link: of a file.
    """
    lines = []
    for agreement in agreements(device):
        judged = agreement.comparison.judged_pairs
        if not judged:
            continue
        worst = max(judged, key=lambda pair: pair.deviation)
        files = [f"[{source.path.name}]({link(source.path)})" for source in (agreement.first, agreement.second)]
        commits = [source.report.environment.get("commit") for source in (agreement.first, agreement.second)]
        lines.append(
            [
                *files,
                text.listed(dict.fromkeys(str(commit) for commit in commits if commit)),
                _products(agreement.first.report, agreement.second.report),
                f"{sum(map(agreement.comparison.agrees, judged))} of {len(judged)}",
                f"{100 * worst.deviation:.1f} %",
                row_words(worst.after),
            ]
        )
    if not lines:
        return NOTHING
    header = ["first run", "second run", "commit", "products", "within 3 %", "most", "of"]
    legend = (
        "Rows of at least 0.2 ms whose medians are within 3 % of one another, and the one that deviates most, as "
        "`fsa bench compare` has it. *Products* is how much faster the device was in products of matrices in the "
        "second run: other GPUs of the same kind, and hotter ones, differ.\n"
    )
    return text.table(header, lines) + "\n" + legend


def total(device: Device) -> str:
    """`240 of 241`: rows of all second runs that agree, of those that are long enough."""
    comparisons = [agreement.comparison for agreement in agreements(device)]
    agreeing = sum(comparison.agrees(pair) for comparison in comparisons for pair in comparison.judged_pairs)
    return f"{agreeing:,} of {sum(len(comparison.judged_pairs) for comparison in comparisons):,}"


def _products(first: Report, second: Report) -> str:
    """`+2.6 %`: of the fastest dtype that both measured."""
    rates = [report.roofline.product_tflop_per_s for report in (first, second)]
    both = rates[0].keys() & rates[1].keys()
    if not both:
        return ""
    dtype = max(both, key=lambda name: rates[0][name])
    return f"{100 * (rates[1][dtype] / rates[0][dtype] - 1):+.1f} %"
