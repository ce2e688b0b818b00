"""Times of runs, taken in turn.

Runs that are compared are interleaved, so that clocks that fall or rise while they run touch all of them alike. Before
each run of a GPU its memory is written to, 4 GiB at the least: no cache holds the inputs, and the device is busy until
all launches of the run are queued, so that the time is the device's. The time that the host takes to queue them is
told apart: where it is the larger one, a run by itself waits for the host. What a run allocates, PyTorch's allocator
has kept from the runs before.

A GPU at its power limit lowers its clocks, and products of matrices suffer from that more than traffic does. So that
one variant does not pay for the heat of another, the device rests before each run for as long as the last one took, and
by chance up to half as long again: the limit is kept in steps of time, and runs at even distances may all meet the
same part of a step. (Full attention by cuDNN, forward, 65,536 tokens of 32/4 heads, one process on an H200: single runs
took 50.3 to 54.1 ms; at one even distance the median was 50.4 and all were alike, at another one it was 52.1.)
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .results import Timing

Run = Callable[[], object]
# Writes of 1 GiB before a run. A host that takes longer than the most of them cannot be covered.
_LEAST_WRITES, _MOST_WRITES = 4, 200
_LONGEST_REST_MS = 500.0
# Rests are longer than the run before by up to this share.
_UNEVEN = 0.5

METHOD = {
    "cuda": (
        "Times are of CUDA events about the launches of a call; the median of the runs and the quartiles are given.",
        "Before each run 4 GiB or more are written, so that no cache holds the inputs and all launches are queued; "
        "the time that the host takes to queue them is told apart.",
        "Before that the device rests for as long as the run before took and by chance up to half as long again (0.5 s "
        "at the most), since at its power limit it lowers its clocks, in steps that runs at even distances would meet.",
        "All variants of a case are run in turn, after a warm-up of each by time; compilation is timed apart.",
        "Where the quartiles lie further apart than 2 % of the median, it is run four times as often, 6 s at the most "
        "(not with --quick); of what takes longer than that the warm-up counts.",
        "Each variant is checked on the same inputs first, and gets no time if it fails; docs/cli.md says by what.",
        "Clocks and power are read and never set.",
    ),
    "cpu": (
        "Times are of the wall clock; the median of the runs and the quartiles are given.",
        "Before each run 256 MiB are written, so that no cache holds the inputs.",
        "All variants of a case are run in turn, after a warm-up of each.",
        "Where the quartiles lie further apart than 2 % of the median, it is run four times as often, 6 s at the most "
        "(not with --quick); of what takes longer than that the warm-up counts.",
        "Each variant is checked on the same inputs first, and gets no time if it fails; docs/cli.md says by what.",
    ),
}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        warm_up_ms: of the wall clock, for runs of each variant before any counts; one run at the least.
        target_ms: of runs of each variant that count.
        min_repeats, max_repeats: that many at the least and at the most.
        limit_ms: what takes so long that even the fewest runs would exceed it is run less often, twice at the least. A
            warm-up that takes longer counts as one of the runs.
        spread, more: quartiles that lie further apart than this share of the median call for more runs, so many times
            as many within `limit_ms`.
    """

    warm_up_ms: float = 100.0
    target_ms: float = 600.0
    min_repeats: int = 8
    max_repeats: int = 30
    limit_ms: float = 6000.0
    spread: float = 0.02
    more: int = 4

    @classmethod
    def quick(cls) -> Effort:
        """Enough to see that all works, and roughly how fast."""
        return cls(warm_up_ms=20.0, target_ms=50.0, min_repeats=3, max_repeats=5, limit_ms=3000.0, more=1)

    def repeats(self, ms: float) -> int:
        """Number of runs that count of what takes so long.

        >>> Effort().repeats(100.0), Effort().repeats(1.0), Effort().repeats(20.0), Effort().repeats(1e4)
        (8, 30, 30, 2)
        """
        ms = max(ms, 1e-3)
        wanted = min(max(int(self.target_ms / ms), self.min_repeats), self.max_repeats)
        return max(min(wanted, int(self.limit_ms / ms)), 2)

    def enough(self, found: Timing) -> int:
        """Number of runs that it takes in all where so many were done.

        >>> Effort().enough(Timing(10.0, 9.95, 10.1, 30)), Effort().enough(Timing(10.0, 9.8, 10.1, 30))
        (30, 120)
        >>> Effort().enough(Timing(400.0, 390.0, 410.0, 5))
        15
        """
        if found.spread <= self.spread:
            return found.repeats
        return max(found.repeats, min(self.more * found.repeats, int(self.limit_ms / found.median)))


@dataclass(frozen=True)
class Taken:
    """The time of one run, and of the host until the call returned; milliseconds."""

    ms: float
    host_ms: float


class Clock(Protocol):
    """Takes the time of a run."""

    def time(self, run: Run, host_ms: float) -> Taken:
        """The time of one run that is known to keep the host for so long."""


class CudaClock:
    """CUDA events, behind writes that are larger than all caches and take longer than the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        self._flush.zero_()
        self._write_ms = self._rest_ms = 0.0
        self._random = random.Random(0)
        self._write_ms = self.time(lambda: self._flush.zero_(), 0.0).ms

    def time(self, run: Run, host_ms: float) -> Taken:
        """The time of the device from the first to the last launch of the run."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        time.sleep(rest_s(self._rest_ms, self._random))
        # Half as long again, as the host is not equally fast every time.
        cover = int(1.5 * host_ms / self._write_ms) + 1 if self._write_ms > 0 else 0
        with torch.cuda.device(self._device):
            for _ in range(min(max(_LEAST_WRITES, cover), _MOST_WRITES)):
                self._flush.zero_()
            start.record()
            begin = time.perf_counter()
            run()
            host = time.perf_counter() - begin
            stop.record()
            stop.synchronize()
        self._rest_ms = start.elapsed_time(stop)
        return Taken(self._rest_ms, 1000 * host)


def rest_s(last_ms: float, chance: random.Random) -> float:
    """Seconds of rest after a run of the device.

    >>> 0.1 <= rest_s(100.0, random.Random(0)) <= 0.15
    True
    >>> rest_s(2600.0, random.Random(0))
    0.5
    """
    return min(last_ms * chance.uniform(1.0, 1.0 + _UNEVEN), _LONGEST_REST_MS) / 1000


class CpuClock:
    """The wall clock, behind a write that is larger than most caches."""

    def __init__(self) -> None:
        self._flush = torch.empty(1 << 28, dtype=torch.uint8)

    def time(self, run: Run, host_ms: float) -> Taken:
        """The time of the run."""
        self._flush.zero_()
        begin = time.perf_counter()
        run()
        ms = 1000 * (time.perf_counter() - begin)
        return Taken(ms, ms)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleaved(runs: Mapping[str, Run], clock: Clock, effort: Effort) -> dict[str, Timing]:
    """The times of runs, taken in turn until each was run as often as `effort` wants.

    Runs that take long are done less often than short ones, spread over the whole time. Those whose times differ much
    are done again, in turn as well.

    Returns:
        The timing of each, by name.
    """
    wanted: dict[str, int] = {}
    host_ms: dict[str, float] = {}
    times: dict[str, list[Taken]] = {name: [] for name in runs}
    for name, run in runs.items():
        begin = time.perf_counter()
        taken = clock.time(run, 0.0)
        while 1000 * (time.perf_counter() - begin) < effort.warm_up_ms:
            taken = clock.time(run, taken.host_ms)
        wanted[name], host_ms[name] = effort.repeats(taken.ms), taken.host_ms
        if taken.ms > effort.limit_ms:
            times[name].append(taken)
    rounds = max(wanted.values(), default=0)
    for number in range(rounds):
        for name, run in runs.items():
            # Evenly spread: the i-th run of this one is due in round i * rounds / wanted.
            if len(times[name]) * rounds <= number * wanted[name] and len(times[name]) < wanted[name]:
                times[name].append(clock.time(run, host_ms[name]))
    enough = {name: effort.enough(_timing(taken)) for name, taken in times.items()}
    while unsettled := [name for name in runs if len(times[name]) < enough[name]]:
        for name in unsettled:
            times[name].append(clock.time(runs[name], host_ms[name]))
    return {name: _timing(taken) for name, taken in times.items()}


def _timing(taken: list[Taken]) -> Timing:
    return timing([one.ms for one in taken], [one.host_ms for one in taken])


def timing(ms: list[float], host_ms: list[float]) -> Timing:
    """Median and quartiles of some times, and the median of those of the host.

    >>> timing([1.0, 2.0, 3.0, 4.0, 5.0], [0.5])
    Timing(median=3.0, first_quartile=2.0, third_quartile=4.0, repeats=5, host_ms=0.5)
    """
    first, median, third = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (ms[0],) * 3
    return Timing(median, first, third, len(ms), statistics.median(host_ms))


def first_run_s(run: Run, device: torch.device) -> float:
    """Seconds of a run on the wall clock, with all that it compiles."""
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Waits for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backward_of(out: Tensor, leaves: tuple[Tensor, ...], d_out: Tensor) -> Callable[[], Any]:
    """A run of the backward pass of `out`, which can be done again and again."""
    return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
