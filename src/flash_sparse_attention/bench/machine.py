"""What a measurement depends on besides the code: device, versions, clocks, power; and how fast the device is."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .results import Roofline
from .timing import METHOD, Clock, Effort, interleaved

_QUERIES = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Device, versions and commit; `commit` instead of what git says of the sources."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "kind": device.type,
        "python": platform.python_version(),
        "flash_sparse_attention": __version__,
        "commit": source_commit() if commit is None else commit,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "threads": torch.get_num_threads(),
        "method": list(METHOD[device.type]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _nvidia_smi(device, "driver_version"),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {name: value for name, value in found.items() if value is not None}


def clocks(device: torch.device) -> dict[str, float]:
    """Clocks, power and temperature at this moment; empty where they cannot be read. Nothing is set."""
    if device.type != "cuda":
        return {}
    answer = _nvidia_smi(device, ",".join(_QUERIES.values()))
    values = {}
    for name, text in zip(_QUERIES, (answer or "").split(","), strict=False):
        try:
            values[name] = float(text)
        except ValueError:
            continue
    return values


def measure_roofline(device: torch.device, clock: Clock, effort: Effort, dtypes: tuple[torch.dtype, ...]) -> Roofline:
    """Rates of a copy and of square products of matrices, measured."""
    cuda = device.type == "cuda"
    source = torch.empty(1 << (31 if cuda else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    side = 8192 if cuda else 1024
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        runs[_name(dtype)] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    times = interleaved(runs, clock, effort)
    products = {_name(dtype): 2 * side**3 / times[_name(dtype)].median * 1e-9 for dtype in dtypes}
    return Roofline(2 * source.numel() / times["copy"].median * 1e-9, products)


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Bytes that this process had resident at its peak. What `getrusage` says on Linux may be its parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        # Kibibytes, but on macOS bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def source_commit() -> str | None:
    """The commit of the sources, where they lie in a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    known, command = [*git, "ls-files", "--error-unmatch", Path(__file__).name], [*git, "describe", "--always"]
    try:
        # An installed package may lie in a repository of something else.
        subprocess.run(known, capture_output=True, check=True, timeout=10)
        command += ["--dirty", "--exclude", "*"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(device: torch.device, query: str) -> str | None:
    """What nvidia-smi says of a device."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [f"--id=GPU-{uuid}"] if uuid is not None else []
    command = ["nvidia-smi", *which, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
