"""Every Triton kernel, compiled ahead of time for the GPUs that it is for, and what it takes of them. Needs no GPU."""

# ruff: noqa: E402 (what needs Triton's compiler comes after the check that it is there)

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: a process has Triton's interpreter or its compiler", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flash_sparse_attention.impl import triton as kernels
from flash_sparse_attention.impl.triton.delta import launch_shifts
from flash_sparse_attention.impl.triton.inverted_index import mark_valid
from flash_sparse_attention.impl.triton.ops import selected as ops
from flash_sparse_attention.impl.triton.selected_kv_outer import (
    launch_selected_bwd_kv_outer,
    launch_selected_fwd_kv_outer,
)
from flash_sparse_attention.impl.triton.selected_query_outer import (
    launch_selected_dq_query_outer,
    launch_selected_fwd_query_outer,
)
from flash_sparse_attention.impl.triton.tuning import SelectedShape, tiles_of
from gpuless import SHARED_BYTES, TENSOR_MEMORY_COLUMNS, Compiled, Compiler

NUM_KV_HEADS = 8
# The default of `selected_attention`.
WORKSPACE_MIB = 1024


@dataclass(frozen=True)
class Case:
    """What kernels are specialised for."""

    arch: int
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    group: int = 4
    slots: int = 16
    block_size: int = 64

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dims = "x".join(map(str, self.dims))
        return f"sm_{self.arch}-{dtype}-dims{dims}-group{self.group}-slots{self.slots}-block{self.block_size}"


DIMS = [(128, 128), (64, 64), (192, 128), (80, 80)]
CASES = [
    *(Case(arch, dims) for arch in SHARED_BYTES for dims in DIMS),
    Case(90, group=1),
    Case(90, group=5),
    Case(90, block_size=16),
    Case(90, block_size=128),
    Case(90, block_size=256),
    Case(90, slots=12),
    Case(90, dtype=torch.float16),
    Case(90, dtype=torch.float32),
    Case(90, dims=(256, 256)),
]

# Bytes that a thread spills at most, by kernel and compute capability: measured with Triton 3.7.1, and at most 10 %
# more. What stands nowhere spills nothing.
FORWARD = "_selected_fwd_kv_outer_kernel"
BACKWARD = "_selected_bwd_kv_outer_kernel WITH_DQ"
BACKWARD_WITHOUT_DQ = "_selected_bwd_kv_outer_kernel"
SPILL_BYTES = {
    FORWARD: {80: 116, 90: 8, 100: 16},
    # Most of it around the last stores, where dK, dV and the sums to add to are held at once; 20 loads in the loop.
    BACKWARD: {80: 264, 90: 280, 100: 158},
    BACKWARD_WITHOUT_DQ: {80: 136, 90: 158, 100: 154},
    "_sum_segments_kernel": {80: 4},
}
SPILL_BYTES_OF_CASE = {
    Case(90, block_size=256): {FORWARD: 184},
    Case(100, (192, 128)): {BACKWARD: 246},
    # Products in float32 take no matrix unit.
    Case(90, dtype=torch.float32): {
        FORWARD: 704,
        BACKWARD: 408,
        BACKWARD_WITHOUT_DQ: 1300,
        "_selected_fwd_query_outer_kernel": 592,
    },
}
# The products of a whole warp group or program; rows of 32, which wide heads take, are too few for them.
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def launch_all(case: Case, total_tokens: int = 4096, num_sequences: int = 3) -> None:
    """Launches what both loop orders launch, forward and backward, with the tiles that users get."""
    dim_k, dim_v = case.dims
    num_heads, block_size = NUM_KV_HEADS * case.group, case.block_size

    def rows(heads: int, *dim: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(total_tokens, heads, *dim, dtype=dtype, device="meta")

    q, k, v, d_out = (
        rows(num_heads, dim_k),
        rows(NUM_KV_HEADS, dim_k),
        rows(NUM_KV_HEADS, dim_v),
        rows(num_heads, dim_v),
    )
    block_indices = rows(NUM_KV_HEADS, case.slots, dtype=torch.int32)
    cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int32, device="meta")
    shape = SelectedShape.of(q, k, v, block_indices, block_size)
    tiles = tiles_of(shape)
    sizes = cu_seqlens, block_size, dim_k**-0.5

    index = ops._index(shape, block_indices, cu_seqlens, block_size, WORKSPACE_MIB)
    out, lse = launch_selected_fwd_kv_outer(q, k, v, index, *sizes, tiles.kv_outer_forward)
    given = d_out, q, k, v, *launch_shifts(d_out, torch.empty_like(lse), out, lse)
    launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, torch.empty_like(q))
    launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, None)

    place = mark_valid(block_indices, cu_seqlens, block_size)
    launch_selected_fwd_query_outer(q, k, v, block_indices, place, *sizes, tiles.query_outer)
    launch_selected_dq_query_outer(*given, block_indices, place, *sizes, tiles.query_outer)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Compiler(monkeypatch, tmp_path_factory.mktemp("triton"))


def compile_all(compiler: Compiler, case: Case, **lengths: int) -> list[Compiled]:
    with compiler.launches(case.arch) as launched:
        launch_all(case, **lengths)
    return list(launched.values())


def too_much(case: Case, kernel: Compiled) -> Iterator[str]:
    """Each resource of which a kernel takes more than its bound."""
    spill_bytes = SPILL_BYTES_OF_CASE.get(case, {}).get(kernel.variant)
    if spill_bytes is None:
        spill_bytes = SPILL_BYTES.get(kernel.variant, {}).get(case.arch, 0)
    for resource, taken, bound in (
        ("registers", kernel.registers, kernel.max_registers),
        ("bytes of spills", kernel.spill_bytes, spill_bytes),
        ("bytes of shared memory", kernel.shared_bytes, SHARED_BYTES[case.arch]),
        ("columns of tensor memory", kernel.tensor_memory, TENSOR_MEMORY_COLUMNS),
    ):
        if taken > bound:
            yield f"{kernel.variant}: {taken} {resource}, more than {bound}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_and_fits(compiler: Compiler, case: Case):
    compiled = compile_all(compiler, case)
    assert {kernel.name for kernel in compiled} == kernel_names()
    assert not [problem for kernel in compiled for problem in too_much(case, kernel)]
    if case.dtype != torch.float32 and max(case.dims) <= 128:
        main = {kernel.variant: kernel.ptx for kernel in compiled}
        for variant in (FORWARD, BACKWARD, BACKWARD_WITHOUT_DQ):
            assert MATRIX_UNITS[case.arch] in main[variant], variant


def kernel_names() -> set[str]:
    """The kernels of the package, so that a case cannot forget one."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    functions = [function for module in modules for function in vars(module).values()]
    names = {function.fn.__name__ for function in functions if isinstance(function, JITFunction)}
    return {name for name in names if name.endswith("_kernel")}


LENGTHS = [(1000, 1), (4097, 7), (65536, 16)]


def test_lengths_never_recompile(compiler: Compiler):
    known: dict[str, str] = {}
    again: set[str] = set()
    for total_tokens, num_sequences in LENGTHS:
        compiled = compile_all(compiler, Case(90), total_tokens=total_tokens, num_sequences=num_sequences)
        variants = {kernel.hash: kernel.variant for kernel in compiled}
        known = known or variants
        again |= {variant for hash, variant in variants.items() if hash not in known}
    assert known
    assert not again


def test_compiler_leaves_triton_as_it_was(tmp_path: Path):
    run, active = JITFunction.run, vars(driver).copy()
    with pytest.MonkeyPatch.context() as monkeypatch, Compiler(monkeypatch, tmp_path).launches(90):
        assert vars(driver) != active
    assert JITFunction.run is run
    assert vars(driver) == active
