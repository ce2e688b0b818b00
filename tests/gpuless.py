"""Triton's compiler without a GPU: launches on meta tensors are compiled for a chosen GPU, and never run."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Bytes of shared memory that a program may have, by compute capability (CUDA programming guide).
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}
# Columns of tensor memory, which sm_100 has.
TENSOR_MEMORY_COLUMNS = 512
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Compiled:
    """One kernel, specialised and compiled, with what it takes of a GPU.

    Attributes:
        name: of the kernel.
        variant: its name and its flags that are on: what has bounds of its own.
        hash: of its source, specialisation and options: equal where Triton would not compile again.
        registers, spill_bytes: of a thread; spilled stores.
        max_registers: what the launch allows, 255 where it says nothing.
        shared_bytes, tensor_memory: of a program; tensor memory in columns.
        ptx: its assembly.
        early: whether it is launched before the one before it has ended, for which it waits by itself.
        serialized: whether the assembler makes products of a warp group wait for each other, as registers are few.
    """

    name: str
    variant: str
    hash: str
    registers: int
    spill_bytes: int
    max_registers: int
    shared_bytes: int
    tensor_memory: int
    ptx: str
    serialized: bool
    early: bool


class TargetDriver:
    """What Triton asks of a driver before a kernel runs, answered for a GPU that is not there."""

    def __init__(self, target: GPUTarget, device: str = "not there") -> None:
        self.target, self.device = target, device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, int]:
        """Names the caches of compiled kernels, which those of a real device (a number) must not meet."""
        return self.device, self.target.arch

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class Compiler:
    """Compiles launches."""

    # Of the process: a kernel is compiled once in it, and reported on then, whichever module asks again later.
    _known: ClassVar[dict[str, Compiled]] = {}

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
        self._launched: dict[str, Compiled] = {}
        self._wanted: dict[tuple[str, str], str] = {}
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache_dir))
        # The report of the assembler, which has the spills, is printed where a kernel is compiled.
        monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
        run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            report = io.StringIO()
            with contextlib.redirect_stdout(report):
                binary = run(kernel, *args, **{**kwargs, "warmup": True})
            flags = [name for name, arg in zip(kernel.arg_names, args, strict=False) if arg is True]
            if binary is None:
                name = kernel.fn.__name__
                self._wanted[name, self._key] = " ".join([name, *flags])
                return binary
            if binary.hash not in self._known:
                self._known[binary.hash] = _resources(binary, flags, report.getvalue())
            self._launched[binary.hash] = self._known[binary.hash]
            return binary

        monkeypatch.setattr(JITFunction, "run", compile_only)
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def launches(self, arch: int) -> Iterator[dict[str, Compiled]]:
        """Launches in the body are compiled for a compute capability, into the dictionary, by their hashes."""
        self._launched = {}
        with self._target(TargetDriver(GPUTarget("cuda", arch, 32))):
            yield self._launched

    @contextlib.contextmanager
    def specializations(self, arch: int) -> Iterator[dict[tuple[str, str], str]]:
        """Launches in the body are not compiled: into the dictionary go the variants of their kernels, by their names
        and all that Triton would compile them for, which is what it knows compiled kernels by."""
        self._wanted = {}

        def refuse(*, key: str, **_: Any) -> bool:
            self._key = key
            return True

        # For a device of its own, for which nothing was ever compiled.
        with self._target(TargetDriver(GPUTarget("cuda", arch, 32), "nor compiled for")) as patch:
            patch.setattr(knobs.runtime, "jit_cache_hook", refuse)
            yield self._wanted

    @contextlib.contextmanager
    def _target(self, target: TargetDriver) -> Iterator[pytest.MonkeyPatch]:
        """What is launched in the body is launched on a GPU that is not there."""
        with self._monkeypatch.context() as patch:
            # The plain attribute, as Triton's own way back (`reset_active`) fails where there is no GPU.
            attribute = "_active" if "_active" in vars(driver) else "active"
            patch.setattr(driver, attribute, target)
            yield patch


def _resources(binary: Any, flags: list[str], report: str) -> Compiled:
    metadata = binary.metadata
    registers, spills = re.search(r"Used (\d+) registers", report), re.search(r"(\d+) bytes spill stores", report)
    if registers is None or spills is None:
        raise RuntimeError(f"no report of the assembler for {metadata.name}: {report!r}")
    return Compiled(
        metadata.name,
        " ".join([metadata.name, *flags]),
        binary.hash,
        int(registers[1]),
        int(spills[1]),
        metadata.maxnreg or MAX_REGISTERS,
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
        binary.asm["ptx"],
        "wgmma.mma_async instructions are serialized" in report,
        bool(getattr(metadata, "launch_pdl", False)),
    )
