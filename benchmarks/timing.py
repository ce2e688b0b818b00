"""What the GPU benchmarks share: times of a run, of its kernels, and what their reports begin with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flash_sparse_attention as fsa


def milliseconds(run: Callable[[], object], flush: Tensor) -> float:
    """CUDA-event time of a run."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        flush.zero_()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def kernels(run: Callable[[], object], at_least_ms: float) -> dict[str, float]:
    """Milliseconds of each kernel of a run that takes more than this, by name."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        run()
        torch.cuda.synchronize()
    events = ((event.key.split("(")[0][:60], event.self_device_time_total / 1000) for event in record.key_averages())
    return {name: round(ms, 3) for name, ms in events if ms > at_least_ms}


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def header(measured: str, dtype: str) -> dict[str, Any]:
    """What a report begins with: how, when, where and of which versions and commit it was measured."""
    # Here, as benchmarks on a CPU need no Triton.
    import triton

    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "flash_sparse_attention": fsa.__version__,
        "commit": measured,
        "dtype": dtype,
    }
