"""What a benchmark leaves: rows of times with all that is needed to read and to repeat them, as JSON.

A row is one way (`variant`) to compute one thing (`operator`, `direction`) on one shape. Rows of the same operator,
direction, shape and inputs are comparable, and so is full attention of the same heads and length with everything that
takes its place: `Report.gains`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..validation import bad

SCHEMA = 1
FULL = "full attention"
# What is no attention, and takes the place of none.
_CHORES = ("inverted index", "compress", "combine")
# Sizes of a shape that full attention depends on.
_DENSE_SIZES = ("tokens", "heads", "kv_heads", "head_dim", "head_dim_v", "batch", "new_tokens", "dtype")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of the runs of a row, compilation and warm-up left out.

    Attributes:
        median: half of the runs took at most this long.
        first_quartile, third_quartile: the middle half of the runs lies between.
        repeats: number of the runs.
        host_ms: until the call returned, the median; None where it was not taken. Launches of a GPU are queued by then.
    """

    median: float
    first_quartile: float
    third_quartile: float
    repeats: int
    host_ms: float | None = None

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.third_quartile - self.first_quartile) / self.median if self.median > 0 else math.nan


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        suite: `operators`, `attention`, `decode`, `model` or `memory`.
        operator: what is computed: `selected attention`, `whole attention`, `full attention`, `training step`, ...
        direction: `forward`, `backward`, `both` or `step`.
        variant: how: an implementation or schedule of ours (`kv_outer`), or a baseline (`cudnn`).
        ours: whether it is this library's.
        shape: sizes by name (tokens, heads, kv_heads, head_dim, block_size, slots, dtype, ...).
        inputs: `random`, or `recorded`: selections of a trained model.
        ms: the time; None if there is none.
        skipped: why there is no time; empty if there is one.
        check: error of each output as a share of what it may be, at most 1; empty for what is not checked.
        flops: of the arithmetic that the operator needs; None where no model says.
        bytes: that it has to move at the least: inputs once, outputs once.
        moved_bytes: that its schedule moves, with intermediate results; None where that is not modelled.
        memory: bytes by name: `inputs`, `kept` for the backward pass, `workspace`, `peak`.
        compile_s: seconds of the first run: compilation, tuning and all.
        notes: what a reader must know.
    """

    suite: str
    operator: str
    direction: str
    variant: str
    ours: bool
    shape: dict[str, int | str]
    inputs: str = "random"
    ms: Timing | None = None
    skipped: str = ""
    check: dict[str, float] = field(default_factory=dict)
    flops: float | None = None
    bytes: float | None = None
    moved_bytes: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    compile_s: float | None = None
    notes: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What the same row of another run has in common with this one."""
        sizes = ", ".join(f"{name}={value}" for name, value in sorted(self.shape.items()))
        return self.suite, self.operator, self.direction, self.variant, sizes, self.inputs

    @property
    def tflop_per_s(self) -> float | None:
        """Achieved arithmetic, 1e12 FLOP/s."""
        return None if self.ms is None or self.flops is None else self.flops / self.ms.median * 1e-9

    @property
    def tb_per_s(self) -> float | None:
        """Achieved traffic, 1e12 byte/s: what the schedule moves where that is modelled, else the least there is."""
        moved = self.bytes if self.moved_bytes is None else self.moved_bytes
        return None if self.ms is None or moved is None else moved / self.ms.median * 1e-9

    def dense_key(self) -> tuple[Any, ...]:
        """What this row and the full attention that it takes the place of have in common."""
        return self.suite, self.direction, tuple((name, self.shape.get(name)) for name in _DENSE_SIZES)


@dataclass(frozen=True)
class Roofline:
    """What the device reached in this run; None where it was not measured.

    Attributes:
        copy_tb_per_s: copy of a large tensor, bytes read and written.
        product_tflop_per_s: square product of matrices, by dtype.
    """

    copy_tb_per_s: float | None = None
    product_tflop_per_s: dict[str, float] = field(default_factory=dict)

    def ms(self, row: Row) -> float | None:
        """The least time for the arithmetic and the least traffic of a row at these rates."""
        peak = self.product_tflop_per_s.get(str(row.shape.get("dtype")))
        parts = []
        if row.flops is not None and peak:
            parts.append(row.flops / peak * 1e-9)
        if row.bytes is not None and self.copy_tb_per_s:
            parts.append(row.bytes / self.copy_tb_per_s * 1e-9)
        return max(parts, default=None)

    def fraction(self, row: Row) -> float | None:
        """That time as a share of the one taken."""
        least = self.ms(row)
        return None if row.ms is None or least is None else least / row.ms.median


@dataclass(frozen=True)
class Report:
    """A run of `fsa bench`.

    Attributes:
        command: that repeats it.
        date: of its begin, ISO 8601.
        environment: device, versions, commit, clocks and power by suite; texts and numbers by name.
        roofline: rates of the device in this run.
        rows: in the order in which they were measured.
    """

    command: str
    date: str
    environment: dict[str, Any]
    roofline: Roofline
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """Name of the device."""
        return str(self.environment.get("device", "unknown device"))

    def gains(self) -> Iterator[Gain]:
        """How much longer every baseline takes than every row of ours that it is comparable with."""
        timed = [row for row in self.rows if row.ms is not None]
        for ours in timed:
            if not ours.ours:
                continue
            for other in timed:
                if not other.ours and comparable(ours, other):
                    yield Gain(ours, other)

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.unfinished")
        beside.write_text(json.dumps(_compact(dataclasses.asdict(self)), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what `save` wrote.

        Raises:
            ValueError: if there is no such file, or it is no report or one of another version that cannot be read.
            OSError: if it cannot be read.
        """
        expected = "a result of `fsa bench`"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise bad(
                "FILE", expected, f"{str(path)!r}, which does not exist", "fsa bench --output writes one"
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise bad("FILE", expected, f"{str(path)!r}, which is no JSON ({error})") from error
        if not isinstance(content, dict) or "schema" not in content or "rows" not in content:
            raise bad("FILE", expected, f"{str(path)!r}, which has no rows")
        if content["schema"] != SCHEMA:
            raise bad("FILE", f"{expected} of schema {SCHEMA}", f"{str(path)!r} of schema {content['schema']}")
        try:
            rows = tuple(_row(row) for row in content["rows"])
            roofline = Roofline(**content["roofline"])
            return cls(content["command"], content["date"], content["environment"], roofline, rows)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise bad("FILE", expected, f"{str(path)!r}, whose content does not fit ({error})") from error


@dataclass(frozen=True)
class Gain:
    """Two comparable rows, ours and a baseline's."""

    ours: Row
    other: Row

    @property
    def ratio(self) -> float:
        """Times as long as ours that the other takes: more than 1 is a win for us."""
        assert self.ours.ms is not None
        assert self.other.ms is not None
        return self.other.ms.median / self.ours.ms.median


def comparable(ours: Row, other: Row) -> bool:
    """Whether the time of the other row says something about that of ours: the same work, or full attention instead."""
    if other.operator == ours.operator:
        return ours.key[0] == other.key[0] and ours.direction == other.direction and ours.key[4:] == other.key[4:]
    return other.operator == FULL and ours.operator not in _CHORES and ours.dense_key() == other.dense_key()


def _row(content: Mapping[str, Any]) -> Row:
    ms = None if content.get("ms") is None else Timing(**content["ms"])
    check = {name: float(error) for name, error in content.get("check", {}).items()}
    return Row(**{**content, "ms": ms, "check": check})


def _compact(content: Mapping[str, Any]) -> dict[str, Any]:
    """With the schema first, and rows without what is empty."""
    rows = [
        {name: value for name, value in row.items() if name == "shape" or value not in (None, "", {})}
        for row in content["rows"]
    ]
    for row in rows:
        # JSON has no numbers for infinite errors and those that are none.
        check = row.get("check", {})
        check |= {name: str(error) for name, error in check.items() if not math.isfinite(error)}
    return {"schema": SCHEMA, **content, "rows": rows}
