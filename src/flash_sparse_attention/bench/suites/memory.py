"""How much memory forward and backward pass take by length, and how long sequences can be."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ... import functional
from .. import costs, inputs
from ..cases import Bench, Case
from ..machine import peak_memory
from ..results import Row
from ..shapes import Shape
from .attention import whole_case
from .operators import full_case

SUITE = "memory"
FULL_UP_TO = 131072  # tokens; its memory is linear too, and its time tells the suite `attention`
EVERYTHING = ("window", "compressed", "selected", "index")


def groups(shapes: list[Shape], bench: Bench) -> Iterator[tuple[str, list[Case]]]:
    """A forward with a backward pass at each length: as it is, with all parts computed again, and full attention."""
    for shape in shapes:
        x = inputs.draw(shape, bench.device)
        both = costs.whole(shape, "forward") + costs.whole(shape, "backward")
        cases = [dataclasses.replace(whole_case(shape, x, ("both",), EVERYTHING), costs={"both": both})]
        full = full_case(shape, x, bench, False)
        if shape.tokens <= FULL_UP_TO and full.variants:
            dense = costs.full(shape, "forward") + costs.full(shape, "backward")
            cases.append(dataclasses.replace(full, variants=full.variants[:1], costs={"both": dense}, with_memory=True))
        yield str(shape), cases


def cpu_rows(shapes: list[Shape], bench: Bench) -> list[Row]:
    """On a CPU: the peak of a process of its own that runs a forward and a backward pass once."""
    rows = []
    for shape in shapes:
        bench.announce(f"whole attention at {shape.tokens:,} tokens")
        cost = costs.whole(shape, "forward") + costs.whole(shape, "backward")
        fixed = (SUITE, "whole attention", "both", "blockwise", True, shape.whole())
        peak = _in_process(partial(_run_once, shape, torch.get_num_threads()))
        found: dict[str, Any] = {"memory": {"peak": peak}} if peak else {"skipped": "failed: its process ended early"}
        notes = "peak of the process, Python and PyTorch included"
        rows.append(Row(*fixed, flops=cost.flops, bytes=cost.bytes, notes=notes, **found))
    return rows


def _run_once(shape: Shape, threads: int) -> None:
    torch.set_num_threads(threads)
    x = inputs.draw(shape, torch.device("cpu"))
    functional.nsa_attention(*x, shape.nsa).out.sum().backward()


def _in_process(run: Any) -> int | None:
    """Bytes that a new process had resident at its peak when it had run this; None if it did not end well."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(run, there))
    process.start()
    there.close()
    try:
        peak: int | None = here.recv()
    except EOFError:
        peak = None
    process.join()
    return peak


def _report_peak(run: Any, pipe: Any) -> None:
    run()
    pipe.send(peak_memory())
