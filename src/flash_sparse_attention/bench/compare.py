"""Two runs of `fsa bench`, row by row: whether times agree, and what became slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import Report, Roofline, Row
from .sources import row_words
from .text import is_number, value_text

# What differs between any two runs, or is a text about them.
_IGNORED = {"clocks", "method"}
# Devices of one kind differ, and one from day to day, and rows with them; less says nothing.
_SAME_RATE = 0.01


@dataclass(frozen=True)
class Pair:
    """The same row of two runs; both have a time."""

    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """Times as long as before that it takes now: more than 1 is slower."""
        assert self.before.ms is not None
        assert self.after.ms is not None
        return self.after.ms.median / self.before.ms.median

    @property
    def deviation(self) -> float:
        """How much the longer time is above the shorter one, as a share of it."""
        return max(self.ratio, 1 / self.ratio) - 1

    @property
    def apart(self) -> bool:
        """Whether the middle halves of the runs do not overlap."""
        before, after = self.before.ms, self.after.ms
        assert before is not None
        assert after is not None
        return before.third_quartile < after.first_quartile or after.third_quartile < before.first_quartile

    @property
    def ms(self) -> float:
        """The longer time."""
        assert self.before.ms is not None
        assert self.after.ms is not None
        return max(self.before.ms.median, self.after.ms.median)


@dataclass(frozen=True)
class Comparison:
    """All rows of two runs.

    Attributes:
        pairs: rows with a time in both, in the order of the first run.
        lost: rows of ours with a time in the first run that the second one skipped.
        only_before, only_after: other rows with a time in one run alone.
        warnings: what differs between the runs besides the times.
        threshold: deviation up to which times agree.
        min_ms: times below this one are shown and not judged.
    """

    pairs: tuple[Pair, ...]
    lost: tuple[Row, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    warnings: tuple[str, ...]
    threshold: float
    min_ms: float

    def judged(self, pair: Pair) -> bool:
        """Whether it is long enough to say something."""
        return pair.ms >= self.min_ms

    def agrees(self, pair: Pair) -> bool:
        """Whether both times are the same within the threshold."""
        return pair.deviation <= self.threshold

    def verdict(self, pair: Pair) -> str:
        """`slower`, `faster`, or empty; `regression` or `improvement` for what is judged and ours."""
        if self.agrees(pair):
            return ""
        if self.judged(pair) and pair.after.ours:
            return "regression" if pair.ratio > 1 else "improvement"
        return "slower" if pair.ratio > 1 else "faster"

    @property
    def regressions(self) -> list[Pair]:
        """Rows of ours that are slower by more than the threshold."""
        return [pair for pair in self.pairs if self.verdict(pair) == "regression"]

    @property
    def passed(self) -> bool:
        """Whether nothing of ours became slower, or stopped running."""
        return not self.regressions and not self.lost

    @property
    def judged_pairs(self) -> list[Pair]:
        """Those that are long enough."""
        return [pair for pair in self.pairs if self.judged(pair)]

    def summary(self) -> str:
        """How many rows agree, and the largest deviation."""
        judged = self.judged_pairs
        if not judged:
            return f"No row of at least {self.min_ms:g} ms is in both runs."
        agreeing = sum(map(self.agrees, judged))
        worst = max(judged, key=lambda pair: pair.deviation)
        sentences = [
            f"{agreeing} of {len(judged)} rows of at least {self.min_ms:g} ms agree within {100 * self.threshold:g} %; "
            f"the largest deviation is {100 * worst.deviation:.1f} % ({row_words(worst.after)})."
        ]
        short = len(self.pairs) - len(judged)
        sentences += [f"{short} shorter {'row was' if short == 1 else 'rows were'} not judged."] if short else []
        ours = len(self.regressions)
        sentences += [f"{ours} of ours {'is' if ours == 1 else 'are'} slower."] if ours else []
        lost = len(self.lost)
        sentences += [f"{lost} of ours ran before and {'was' if lost == 1 else 'were'} skipped."] if lost else []
        return " ".join(sentences)


def compare(before: Report, after: Report, threshold: float = 0.03, min_ms: float = 0.2) -> Comparison:
    """Two runs by the keys of their rows.

    >>> from .results import Roofline, Timing
    >>> rows = [Row("operators", "combine", "forward", "triton", True, {}, ms=Timing(t, t, t, 9)) for t in (1.0, 1.5)]
    >>> runs = [Report("fsa bench", "2026-01-01", {}, Roofline(), (row,)) for row in rows]
    >>> comparison = compare(*runs)
    >>> comparison.pairs[0].ratio, comparison.passed
    (1.5, False)
    """
    first, second = ({row.key: row for row in report.rows} for report in (before, after))
    timed = [{key: row for key, row in rows.items() if row.ms is not None} for rows in (first, second)]
    gone = [row for key, row in timed[0].items() if key not in timed[1]]
    lost = [row for row in gone if row.ours and row.key in second and second[row.key].skipped]
    return Comparison(
        pairs=tuple(Pair(row, timed[1][key]) for key, row in timed[0].items() if key in timed[1]),
        lost=tuple(second[row.key] for row in lost),
        only_before=tuple(row for row in gone if row not in lost),
        only_after=tuple(row for key, row in timed[1].items() if key not in timed[0]),
        warnings=tuple(_differences(before, after)),
        threshold=threshold,
        min_ms=min_ms,
    )


def _differences(before: Report, after: Report) -> Sequence[str]:
    """Of the environments; baselines one by one."""
    found = []
    settings = [_flat(report.environment) for report in (before, after)]
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        values = [setting.get(name) for setting in settings]
        if values[0] != values[1]:
            texts = ["unknown" if value is None else value_text(value) for value in values]
            found.append(f"{name} differs: {texts[0]} before, {texts[1]} after")
    rates = [rates_of(report.roofline) for report in (before, after)]
    for name in sorted(rates[0].keys() & rates[1].keys()):
        first, second = rates[0][name], rates[1][name]
        more = second / first - 1
        if abs(more) > _SAME_RATE:
            found.append(f"{name} differs by {100 * more:+.1f} %: {first:.4g} before, {second:.4g} after")
    return found


def rates_of(roofline: Roofline) -> dict[str, float]:
    """What the device reached, by name; what is no number above 0 was not measured."""
    rates = {f"rate of {dtype} products (TFLOP/s)": rate for dtype, rate in roofline.product_tflop_per_s.items()}
    found = rates | {"rate of copies (TB/s)": roofline.copy_tb_per_s}
    return {name: rate for name, rate in found.items() if rate is not None and is_number(rate) and rate > 0}


def _flat(environment: dict[str, object]) -> dict[str, object]:
    flat = {name: value for name, value in environment.items() if name not in _IGNORED and name != "baselines"}
    baselines = environment.get("baselines")
    return flat | (dict(baselines) if isinstance(baselines, dict) else {})
