"""Second runs held against the first ones, file by file: how many times agree, and which deviates most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import text
from .compare import Comparison, compare, rates_of
from .results import Report
from .sources import Device, Source, row_words

NOTHING = "No row of two runs is long enough.\n"


@dataclass(frozen=True)
class Agreement:
    """Rows that two files have both."""

    first: Source
    second: Source
    comparison: Comparison

    @property
    def commits(self) -> tuple[object, object]:
        """Of the sources; None where it is not known."""
        first, second = (source.report.environment.get("commit") for source in (self.first, self.second))
        return first, second

    @property
    def agreeing(self) -> int:
        """Rows that are long enough, and agree."""
        return sum(map(self.comparison.agrees, self.comparison.judged_pairs))


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
        lost = len(agreement.comparison.lost)
        files = [f"[{source.path.name}]({link(source.path)})" for source in (agreement.first, agreement.second)]
        threshold, min_ms = agreement.comparison.threshold, agreement.comparison.min_ms
        lines.append(
            [
                *files,
                text.listed(dict.fromkeys(str(commit or "unknown") for commit in agreement.commits)),
                _products(agreement.first.report, agreement.second.report),
                f"{agreement.agreeing} of {len(judged) + lost}" + (f", {lost} skipped" if lost else ""),
                f"{100 * worst.deviation:.1f} %",
                row_words(worst.after),
            ]
        )
    if not lines:
        return NOTHING
    header = ["run", "other run", "commit", "products", f"within {100 * threshold:g} %", "most", "of"]
    legend = (
        f"Rows of at least {min_ms:g} ms whose medians are within {100 * threshold:g} % of one another, and the one "
        "that deviates most, as `fsa bench compare` has it. *Products* is how much faster the device was in products "
        "of matrices in the other run: other GPUs of the same kind differ, and hotter ones.\n"
    )
    return text.table(header, lines) + "\n" + legend


def total(device: Device) -> str:
    """`240 of 241`: rows of all second runs of the same commit that agree, of those that are long enough."""
    same = [agreement for agreement in agreements(device) if agreement.commits[0] == agreement.commits[1]]
    rows = sum(len(agreement.comparison.judged_pairs) + len(agreement.comparison.lost) for agreement in same)
    return f"{sum(agreement.agreeing for agreement in same):,} of {rows:,}"


def _products(first: Report, second: Report) -> str:
    """`+2.6 %`: of the fastest dtype that both measured."""
    rates = [rates_of(report.roofline) for report in (first, second)]
    both = [name for name in rates[0] if name in rates[1] and "products" in name]
    if not both:
        return ""
    fastest = max(both, key=lambda name: rates[0][name])
    # No -0.0.
    return f"{round(100 * (rates[1][fastest] / rates[0][fastest] - 1), 1) + 0.0:+.1f} %"
