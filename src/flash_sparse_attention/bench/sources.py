"""Result files by device: what was measured there, and which of it is comparable."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..validation import bad
from .results import FULL, Gain, Report, Row
from .text import in_words, is_number, labels, listed

_DIRECTIONS = ("forward", "backward", "both", "step")


@dataclass(frozen=True)
class Source:
    """A result file."""

    path: Path
    report: Report


@dataclass(frozen=True)
class Device:
    """What several files say about one device.

    Attributes:
        name: of the device.
        sources: its files, by date.
        repeats: files of second runs, by name, which those are held against.
    """

    name: str
    sources: tuple[Source, ...]
    repeats: tuple[Source, ...] = ()

    @property
    def kind(self) -> str:
        """`cuda` or `cpu`."""
        return str(self.sources[-1].report.environment.get("kind", "cuda"))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """As they were measured; of two with the same key that of the later file."""
        return tuple(row for _, row in self._latest.values())

    @cached_property
    def gains(self) -> tuple[Gain, ...]:
        """Of rows that were measured in the same run."""
        return tuple(
            gain
            for source in self.sources
            for gain in source.report.gains()
            if self.source_of(gain.ours) is source and self.source_of(gain.other) is source
        )

    def gains_of(self, row: Row) -> list[Gain]:
        """Those of a row of ours."""
        return self._gains_by_key.get(row.key, [])

    def gain(self, row: Row, over: str | None = None) -> Gain | None:
        """That over the fastest baseline of a row of ours.

        Args:
            row: ours.
            over: variant of the baseline; `fastest` for any; None for full attention, or for any where a row has none.
        """
        gains = self.gains_of(row)
        if over is None:
            gains = [gain for gain in gains if gain.other.operator == FULL] or gains
        elif over != "fastest":
            gains = [gain for gain in gains if gain.other.variant == over]
        return min(gains, key=lambda gain: gain.ratio, default=None)

    def source_of(self, row: Row) -> Source:
        """The file that a row comes from."""
        return self._latest[row.key][0]

    def has(self, row: Row) -> bool:
        """Whether there is a row with the same key."""
        return row.key in self._latest

    def repeated_by(self, source: Source) -> bool:
        """Whether a file has a row of this device that is here as well."""
        return source.report.device == self.name and any(map(self.has, source.report.rows))

    def of_roofline(self, row: Row) -> float | None:
        """Share of what the device reached in the run of this row."""
        return self.source_of(row).report.roofline.fraction(row)

    def setting(self, name: str) -> list[tuple[Any, list[Source]]]:
        """What the environments say about something, each value with its files; None where one says nothing."""
        found: list[tuple[Any, list[Source]]] = []
        for source in self.sources:
            value = source.report.environment.get(name)
            sources = next((sources for known, sources in found if known == value), None)
            if sources is None:
                found.append((value, [source]))
            else:
                sources.append(source)
        return found

    @cached_property
    def _latest(self) -> dict[tuple[str, ...], tuple[Source, Row]]:
        found: dict[tuple[str, ...], tuple[Source, Row]] = {}
        for source in self.sources:
            for row in source.report.rows:
                found[row.key] = (source, row)
        return found

    @cached_property
    def _gains_by_key(self) -> dict[tuple[str, ...], list[Gain]]:
        found: dict[tuple[str, ...], list[Gain]] = {}
        for gain in self.gains:
            found.setdefault(gain.ours.key, []).append(gain)
        return found


def read(files: Iterable[Path], repeats: Iterable[Path] = ()) -> list[Device]:
    """Result files by device, GPUs first. The order of the files does not matter.

    Args:
        files: results.
        repeats: results of second runs.

    Raises:
        ValueError: if there is no file, one is no result, one is given as both, or no second run has a row that a first
            one has.
        OSError: if one cannot be read.
    """
    by_device: dict[str, list[Source]] = {}
    sources = [Source(path, read_report(path)) for path in sorted(set(files))]
    if not sources:
        raise bad("FILE", "at least one result of `fsa bench`", "none")
    for source in sorted(sources, key=lambda source: source.report.date):
        by_device.setdefault(source.report.device, []).append(source)
    repeats = sorted(set(repeats))
    both = {path.resolve() for path in repeats} & {source.path.resolve() for source in sources}
    if both:
        raise bad("--repeats", "other files than FILE", listed(map(str, sorted(both))))
    second = [Source(path, read_report(path)) for path in repeats]
    devices = [Device(name, tuple(found)) for name, found in by_device.items()]
    devices = [dataclasses.replace(device, repeats=tuple(filter(device.repeated_by, second))) for device in devices]
    if second and not any(device.repeats for device in devices):
        names = listed(source.path.name for source in second)
        raise bad("--repeats", "second runs of what is in the results, on such a device", names)
    return sorted(devices, key=lambda device: (device.kind == "cpu", device.name))


def read_report(path: Path) -> Report:
    """A result whose times are all numbers above 0: a row whose time is none counts as skipped."""
    report = Report.load(path)
    return dataclasses.replace(report, rows=tuple(map(_sound, report.rows)))


def direction_order(direction: str) -> tuple[int, str]:
    """Sorts directions: forward, backward, both, step, and then any other."""
    known = direction in _DIRECTIONS
    return (_DIRECTIONS.index(direction), "") if known else (len(_DIRECTIONS), direction)


def distinct(rows: Sequence[Row], name: str) -> list[str]:
    """The values that an attribute has in these rows, in their order."""
    return list(dict.fromkeys(str(getattr(row, name)) for row in rows))


def row_words(row: Row) -> str:
    """`operators: selected attention, forward, kv_outer, 65,536 tokens, 32/8 heads`: all that tells it from others."""
    return f"{row.suite}: {row.operator}, {row.direction}, {row.variant}, {shape_words(row)}"


def shape_words(row: Row) -> str:
    """The sizes of a row, and its inputs where they are not random."""
    words = in_words(labels(row.shape))
    return words if row.inputs == "random" else f"{words}, {row.inputs} inputs"


def _sound(row: Row) -> Row:
    if row.ms is None:
        return row
    times = (row.ms.median, row.ms.first_quartile, row.ms.third_quartile)
    if all(is_number(time) and time > 0 for time in times):
        return row
    return dataclasses.replace(row, ms=None, skipped=f"its time is no number above 0: {row.ms.median}")
