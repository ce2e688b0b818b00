"""Every Triton kernel, compiled ahead of time for the GPUs that it is for, and what it takes of them. Needs no GPU."""

# ruff: noqa: E402 (what needs Triton's compiler comes after the check that it is there)

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: a process has Triton's interpreter or its compiler", allow_module_level=True)

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flash_sparse_attention import KVPages, NSAConfig
from flash_sparse_attention.impl import triton as kernels
from flash_sparse_attention.impl.triton import block_scores, block_scores_hopper, cache_write, interval
from flash_sparse_attention.impl.triton.block_scores import launch_select_blocks
from flash_sparse_attention.impl.triton.combine import launch_combine, launch_combine_backward
from flash_sparse_attention.impl.triton.decode import DecodeShape, launch_decode
from flash_sparse_attention.impl.triton.delta import launch_gated_shifts, launch_shifts
from flash_sparse_attention.impl.triton.interval import (
    IntervalSizes,
    launch_interval_dkv,
    launch_interval_dq,
    launch_interval_fwd,
)
from flash_sparse_attention.impl.triton.inverted_index import SHORT, Chunks, InvertedIndex, build_index, mark_valid
from flash_sparse_attention.impl.triton.merge import MOST_HOPPER_SLOTS, launch_merge
from flash_sparse_attention.impl.triton.ops import selected as ops
from flash_sparse_attention.impl.triton.selected_kv_outer import (
    launch_selected_bwd_kv_outer,
    launch_selected_fwd_kv_outer,
    takes_near_kernels,
)
from flash_sparse_attention.impl.triton.selected_query_outer import (
    launch_selected_dq_query_outer,
    launch_selected_fwd_query_outer,
)
from flash_sparse_attention.impl.triton.tuning import (
    WIDE_TILES_OF_OTHERS,
    DecodeTiles,
    IntervalSchedule,
    SelectedShape,
    interval_schedule,
    score_tiles,
    tiles_of,
)
from flash_sparse_attention.types import Compression, Place
from gpuless import SHARED_BYTES, TENSOR_MEMORY_COLUMNS, Compiled, Compiler

# The package has a function of this name.
compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")

NUM_KV_HEADS = 8
KERNEL_SIZE, KERNEL_STRIDE, SCORE_BLOCK_SIZE = 32, 16, 64
# The default of `selected_attention`.
WORKSPACE_MIB = 1024


@dataclass(frozen=True)
class Case:
    """What kernels are specialised for; `past`: more keys than queries."""

    arch: int
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    group: int = 4
    slots: int = 16
    block_size: int = 64
    past: bool = False

    @property
    def others(self) -> bool:
        """Whether the kernels are compiled as well that a device of sm_90 takes for rows that are not aligned only."""
        return self == Case(90)

    @property
    def without_dq(self) -> bool:
        """Whether dK and dV alone are compiled: of the kernels for Hopper, for each head dimension and dtype."""
        others = not self.specialized[1] or self.block_size == 128
        return others or (self.group, self.slots, self.block_size, self.past) == (4, 16, 64, False)

    @property
    def specialized(self) -> tuple[bool, bool]:
        """Whether a forward and a backward kernel for Hopper are taken."""
        half, dims = self.dtype != torch.float32, self.dims in ((64, 64), (128, 128))
        backward = self.arch == 90 and half and dims and self.block_size % 64 == 0
        return backward and (self.block_size == 64 or (self.block_size, self.dims[0]) == (128, 128)), backward

    @property
    def wide(self) -> tuple[bool, bool]:
        """Whether they are those of `selected_wide_hopper`."""
        forward, backward = self.specialized
        return forward and self.block_size == 128, backward and self.dims[0] == 128 and self.block_size % 128 == 0

    @property
    def hopper_merge(self) -> bool:
        """Whether softmaxes are merged by the kernel of `merge_hopper`."""
        return self.arch == 90 and self.dtype != torch.float32 and self.dims[1] in (64, 128)

    @property
    def hopper_intervals(self) -> bool:
        """Whether the kernels of `interval_hopper` are compiled: groups, and more keys than queries, change little."""
        return self == Case(90)

    @property
    def hopper_scores(self) -> bool:
        """Whether block scores are those of `block_scores_hopper`."""
        return self.specialized[1] and self.branches and self.group >= 5

    @property
    def near(self) -> bool:
        """Whether the kernel of near blocks is compiled that devices other than sm_90 have; no default takes it."""
        return self == Case(self.arch)

    @property
    def branches(self) -> bool:
        """Whether all of the whole attention is compiled.

        Not where a case varies what only selected attention knows, and some head dimensions will do.
        """
        selected_alone = (self.slots, self.block_size) != (16, 64) or self.group == 1 or self.dtype == torch.float16
        dims = ((128, 128), (192, 128), (80, 80)) if self.arch == 90 else ((128, 128),)
        return not selected_alone and self.dims in dims

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dims = "x".join(map(str, self.dims))
        past = "-past" if self.past else ""
        return f"sm_{self.arch}-{dtype}-dims{dims}-group{self.group}-slots{self.slots}-block{self.block_size}{past}"


DIMS = [(128, 128), (64, 64), (192, 128), (80, 80)]
CASES = [
    *(Case(arch, dims) for arch in SHARED_BYTES for dims in DIMS),
    Case(90, group=1),
    Case(90, group=5),
    Case(90, group=16),
    Case(90, block_size=16),
    Case(90, block_size=128),
    Case(90, (64, 64), block_size=128),
    Case(90, block_size=256),
    Case(90, slots=12),
    Case(90, dtype=torch.float16),
    Case(90, dtype=torch.float32),
    Case(90, dims=(256, 256)),
    Case(90, past=True),
]

# Bytes that a thread spills at most, by kernel and compute capability: measured with Triton 3.7.1, and at most 10 %
# more. What stands nowhere spills nothing.
FORWARD = "_selected_fwd_kv_outer_kernel"
BACKWARD = "_selected_bwd_kv_outer_kernel WITH_DQ"
BACKWARD_WITHOUT_DQ = "_selected_bwd_kv_outer_kernel"
SELECTED = (FORWARD, BACKWARD, BACKWARD_WITHOUT_DQ)
# Their kernels for Hopper.
HOPPER = {
    FORWARD: "_selected_fwd_hopper_kernel",
    BACKWARD: "_selected_bwd_hopper_kernel WITH_DQ",
    BACKWARD_WITHOUT_DQ: "_selected_bwd_hopper_kernel",
}
# Of parts of 128 keys.
WIDE = {name: hopper.replace("_hopper", "_wide_hopper") for name, hopper in HOPPER.items()}
MERGE = "_merge_slots_kernel", "_merge_slots_hopper_kernel"
# Kernels of tiles that lie side by side, and those of them that Hopper has others for.
NEAR, SPLIT = ("_selected_near_kernel", "_selected_near_hopper_kernel"), "_split_entries_kernel"
INTERVAL = ("_interval_fwd_kernel", "_interval_dq_kernel", "_interval_dkv_kernel")
HOPPER_INTERVAL = tuple(name.replace("_kernel", "_hopper_kernel") for name in INTERVAL)
SCORES = "_block_scores_kernel", "_block_scores_hopper_kernel"
DENSE = (*INTERVAL, SCORES[0])
SPILL_BYTES = {
    FORWARD: {80: 116, 90: 8, 100: 16},
    # Most of it around the last stores, where dK, dV and the sums to add to are held at once; 20 loads in the loop.
    BACKWARD: {80: 264, 90: 280, 100: 158},
    BACKWARD_WITHOUT_DQ: {80: 136, 90: 158, 100: 154},
    HOPPER[BACKWARD]: {90: 12},
    HOPPER[BACKWARD_WITHOUT_DQ]: {90: 12},
    # In the producer, which has few registers.
    WIDE[BACKWARD]: {90: 26},
    WIDE[BACKWARD_WITHOUT_DQ]: {90: 26},
    # Around the last stores, of which a window has three loops before it.
    "_interval_fwd_hopper_kernel": {90: 120},
    "_interval_dkv_hopper_kernel": {90: 26},
    "_interval_dkv_hopper_kernel ADD": {90: 8},
    # No default takes it; see `Case.near`.
    NEAR[0]: {80: 4, 90: 56, 100: 260},
    NEAR[1]: {90: 4},
    "_sum_segments_kernel": {100: 4},
    "_interval_fwd_kernel": {80: 60, 90: 16},
    # Both gradients, scores and their gradient are held at once; the loop is faster so than with smaller tiles.
    "_interval_dkv_kernel": {80: 116, 90: 350},
    "_interval_dkv_kernel ADD": {90: 8},
    SCORES[0]: {80: 190, 90: 8, 100: 350},
    # Before the loop.
    SCORES[1]: {90: 8},
    "_gated_shifts_kernel": {80: 8},
}
SPILL_BYTES_OF_CASE = {
    Case(90, block_size=128): {BACKWARD: 92},
    Case(90, block_size=256): {FORWARD: 184, BACKWARD: 92},
    # Six values that are read once in a tile.
    Case(90, group=16): {SCORES[1]: 24},
    Case(100, (192, 128)): {BACKWARD: 246},
    # Products in float32 take no matrix unit.
    Case(90, dtype=torch.float32): {
        FORWARD: 704,
        BACKWARD: 408,
        BACKWARD_WITHOUT_DQ: 1300,
        "_selected_fwd_query_outer_kernel": 592,
        "_interval_fwd_kernel": 1400,
        "_interval_dq_kernel": 2500,
        "_interval_dq_kernel ADD": 1060,
        "_interval_dkv_kernel": 1800,
        "_interval_dkv_kernel ADD": 1500,
        "_block_scores_kernel": 1000,
        "_gated_shifts_kernel": 390,
    },
}
# The products of a whole warp group or program; rows of 32, which wide heads take, are too few for them.
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def launch_all(case: Case, total_tokens: int = 4096, num_sequences: int = 3) -> None:
    """Launches what both loop orders launch, forward and backward, with the tiles that users get."""
    dim_k, dim_v = case.dims
    num_heads, block_size = NUM_KV_HEADS * case.group, case.block_size

    def rows(heads: int, dim: int, dtype: torch.dtype = case.dtype, tokens: int = total_tokens) -> torch.Tensor:
        return torch.empty(tokens, heads, dim, dtype=dtype, device="meta")

    total_keys = 2 * total_tokens if case.past else total_tokens
    q, d_out = rows(num_heads, dim_k), rows(num_heads, dim_v)
    k, v = (rows(NUM_KV_HEADS, dim, tokens=total_keys) for dim in case.dims)
    block_indices = rows(NUM_KV_HEADS, case.slots, dtype=torch.int32)
    cu_seqlens = torch.empty(num_sequences + 1, dtype=torch.int32, device="meta")
    cu_seqlens_k = torch.empty_like(cu_seqlens) if case.past else None
    shape = SelectedShape.of(q, k, v, block_indices, block_size)
    tiles = tiles_of(shape)
    sizes = cu_seqlens, block_size, dim_k**-0.5

    split = takes_near_kernels(tiles.kv_outer_forward, q, k, v)
    bounds = cu_seqlens, cu_seqlens_k, block_size, WORKSPACE_MIB
    index = ops._index(shape, block_indices, total_keys, *bounds, None, split)
    selection = q, k, v, block_indices, index
    out, lse = launch_selected_fwd_kv_outer(*selection, *sizes, tiles.kv_outer_forward, cu_seqlens_k)
    # As of an index that was kept.
    index = replace(index, far=None, selected=None)
    selection = q, k, v, block_indices, index
    launch_selected_fwd_kv_outer(*selection, *sizes, tiles.kv_outer_forward, cu_seqlens_k)
    if case.near:
        near = replace(tiles.kv_outer_forward, dense_near=True, specialized=False)
        launch_selected_fwd_kv_outer(*selection, *sizes, near, cu_seqlens_k)
    given = d_out, q, k, v, *launch_shifts(d_out, torch.empty_like(lse), out, lse)
    launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, torch.empty_like(q), cu_seqlens_k)
    if case.without_dq:
        launch_selected_bwd_kv_outer(*given, index, *sizes, tiles.kv_outer_backward, None, cu_seqlens_k)
    if case.others:
        forward, backward = (replace(x, specialized=False) for x in (tiles.kv_outer_forward, tiles.kv_outer_backward))
        launch_selected_fwd_kv_outer(*selection, *sizes, replace(forward, dense_near=False), cu_seqlens_k)
        launch_selected_bwd_kv_outer(*given, index, *sizes, backward, torch.empty_like(q), cu_seqlens_k)
        launch_selected_bwd_kv_outer(*given, index, *sizes, backward, None, cu_seqlens_k)

    if case.wide[0]:
        others = replace(tiles.kv_outer_forward, specialized=False)
        launch_selected_fwd_kv_outer(*selection, *sizes, others, cu_seqlens_k)
    if case.wide[1]:
        wide = replace(tiles.kv_outer_backward, specialized=False, **WIDE_TILES_OF_OTHERS)
        launch_selected_bwd_kv_outer(*given, index, *sizes, wide, torch.empty_like(q), cu_seqlens_k)
    if case.branches:
        launch_branches(case, q, k, v, d_out, cu_seqlens, cu_seqlens_k)
    place = mark_valid(block_indices, cu_seqlens, block_size, cu_seqlens_k)
    launch_selected_fwd_query_outer(q, k, v, block_indices, place, *sizes, tiles.query_outer, cu_seqlens_k)
    launch_selected_dq_query_outer(*given, block_indices, place, *sizes, tiles.query_outer, cu_seqlens_k)


def launch_branches(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
) -> None:
    """Launches what the whole attention adds: compression, both intervals, block selection and the gated sum."""
    tokens = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    num_windows = (len(k) - KERNEL_SIZE) // KERNEL_STRIDE + 1
    bounds = compress.launch_key_bounds(tokens, KERNEL_SIZE, KERNEL_STRIDE)
    windows = compress.Windows(tokens, bounds, len(k), num_windows, KERNEL_SIZE, KERNEL_STRIDE)
    k_compressed, v_compressed = (compress.launch_compress_pooled(x, None, None, windows) for x in (k, v))
    positions = torch.empty(NUM_KV_HEADS, KERNEL_SIZE, device="meta")
    compress.launch_compress_pooled(k, positions, torch.empty(NUM_KV_HEADS, k.shape[2], device="meta"), windows)
    compress.launch_compress_pooled_dx(k_compressed, positions, windows)
    compress.launch_compress_pooled_dweight(k_compressed, k, windows)
    weight = torch.empty(NUM_KV_HEADS, KERNEL_SIZE * k.shape[2], 2 * k.shape[2], dtype=case.dtype, device="meta")
    hidden = compress.launch_compress_linear(k, weight, None, windows, case.dtype)
    compress.launch_compress_linear_dx(hidden, weight, windows)
    compress.launch_compress_linear_dweight(hidden, k, windows)

    gates = torch.empty(*q.shape[:2], 3, device="meta")
    outs, lses = [], []
    for sizes, keys, values, key_bounds in (
        (IntervalSizes(KERNEL_SIZE, KERNEL_STRIDE, 0, 0.1), k_compressed, v_compressed, bounds),
        (IntervalSizes(1, 1, 512, 0.1), k, v, tokens),
    ):
        schedule = interval_schedule(*case.dims, case.dtype, sizes.window_size > 0, case.arch)
        others = IntervalSchedule(*(replace(tiles, specialized=False) for tiles in schedule))
        schedules = [schedule, others] if case.others else [schedule] if case.hopper_intervals else [others]
        for forward, dq, dkv in schedules:
            given = q, keys, values
            out, lse = launch_interval_fwd(*given, cu_seqlens, key_bounds, sizes, forward, cu_seqlens_k)
            shift = delta = torch.empty_like(lse)
            rest = shift, delta, cu_seqlens, key_bounds, sizes
            add = sizes.window_size > 0
            launch_interval_dq(d_out, *given, *rest, dq, torch.empty_like(q), add, cu_seqlens_k)
            sums = (torch.empty_like(keys), torch.empty_like(values)) if add else None
            launch_interval_dkv(d_out, *given, *rest, dkv, cu_seqlens_k, sums)
        outs, lses = [*outs, out], [*lses, lse]
    with pytest.MonkeyPatch.context() as patch:
        # As if the sequences were long.
        patch.setattr(block_scores, "LEAST_TOKENS", 0)
        patch.setattr(block_scores, "LEAST_LENGTH", 0)
        launch_select_blocks(
            q, k_compressed, lses[0], cu_seqlens, bounds, len(k), KERNEL_SIZE, KERNEL_STRIDE, SCORE_BLOCK_SIZE,
            case.slots, 1, 2, 0.1, score_tiles(case.dims[0], case.dtype, case.arch), cu_seqlens_k,
        )  # fmt: skip
    branches, branch_lses = (outs[0], outs[0], outs[1]), [lses[0], lses[0], lses[1]]
    launch_combine(branches, gates)
    launch_combine_backward(d_out, branches, gates)
    launch_gated_shifts(d_out, [*branches], branch_lses, gates, torch.empty_like(gates), range(3))


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Lengths that are compiled for are short, and the kernels are those of long ones.
        monkeypatch.setattr(interval, "LEAST_HOPPER_KEYS", 0)
        yield Compiler(monkeypatch, tmp_path_factory.mktemp("triton"))


def compile_all(compiler: Compiler, case: Case) -> list[Compiled]:
    with compiler.launches(case.arch) as launched:
        launch_all(case)
        if case.branches:
            long = torch.empty(2 * SHORT, NUM_KV_HEADS, case.slots, dtype=torch.int32, device="meta")
            chunks = Chunks.fit(long, len(long), 3, case.block_size, 1, WORKSPACE_MIB << 20)
            build_index(long, torch.empty(4, dtype=torch.int32, device="meta"), case.block_size, chunks, None, True)
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


# Those of the whole attention, which take longest, first: no worker is left with one of them at the end.
@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: not case.branches), ids=str)
def test_compiles_and_fits(compiler: Compiler, case: Case):
    compiled = compile_all(compiler, case)
    names, expected = {kernel.name for kernel in compiled}, kernel_names()
    taken = zip((FORWARD, BACKWARD_WITHOUT_DQ), case.specialized, case.wide, strict=True)
    for name, specialized, wide in taken:
        others = case.others or wide
        expected -= {name} if specialized and not others else set()
        expected -= set() if specialized and not wide else {HOPPER[name]}
        expected -= set() if wide else {WIDE[name]}
    expected -= set() if case.hopper_intervals else set(HOPPER_INTERVAL)
    expected -= {SCORES[not case.hopper_scores]}
    expected -= set() if case.near else {NEAR[0]}
    near = case.specialized[0] and not case.wide[0]
    expected -= set() if near else {NEAR[1]}
    expected -= set() if case.near or near else {SPLIT}
    expected -= set() if case.hopper_merge else {MERGE[1]}
    assert names == expected if case.branches else names < expected
    assert not [problem for kernel in compiled for problem in too_much(case, kernel)]
    assert_early_kernels_wait(compiled, case.arch)
    assert_merges_fit([kernel for kernel in compiled if kernel.name == MERGE[1]])
    if case.dtype != torch.float32 and max(case.dims) <= 128:
        wanted = SELECTED if case.without_dq else (FORWARD, BACKWARD)
        selected = set()
        for name in wanted:
            specialized, wide = (both[name != FORWARD] for both in (case.specialized, case.wide))
            selected.add(WIDE[name] if wide else HOPPER[name] if specialized else name)
        selected |= ({NEAR[0]} if case.near else set()) | ({NEAR[1]} if near else set())
        main = [
            kernel
            for kernel in compiled
            if kernel.variant in selected or kernel.name in (*DENSE, *HOPPER_INTERVAL, SCORES[1])
        ]
        dense = (*INTERVAL, SCORES[case.hopper_scores]) if case.branches else ()
        assert {*selected, *dense} <= {x for k in main for x in (k.variant, k.name)}
        assert not [kernel.variant for kernel in main if MATRIX_UNITS[case.arch] not in kernel.ptx]
        assert not [kernel.variant for kernel in compiled if "_hopper_" in kernel.name and kernel.serialized]


# Launched before the one before them has ended, on sm_90: such as wait for it before all else, and such as do that
# later, with the number of places where they wait: programs without work; warps that write what others may still read.
EARLY = {
    "_count_pairs_kernel", "_start_runs_kernel", "_scatter_pairs_kernel", "_count_segments_kernel",
    "_fill_segments_kernel", HOPPER[BACKWARD_WITHOUT_DQ], WIDE[BACKWARD_WITHOUT_DQ], "_sum_segments_kernel", MERGE[0],
}  # fmt: skip
LATE = {HOPPER[FORWARD]: 4, WIDE[FORWARD]: 6, NEAR[1]: 3, MERGE[1]: 2}
# Which of them do not let the next one begin.
ALONE = {HOPPER[BACKWARD_WITHOUT_DQ], WIDE[BACKWARD_WITHOUT_DQ], "_sum_segments_kernel", MERGE[0]}


def assert_early_kernels_wait(compiled: list[Compiled], arch: int) -> None:
    early = [kernel for kernel in compiled if kernel.early]
    names = {kernel.name for kernel in early}
    assert names == {kernel.name for kernel in compiled if kernel.name in {*EARLY, *LATE}} if arch == 90 else not names
    for kernel in early:
        # No kernel lets the next one begin that has not waited itself.
        each = ["wait"] if kernel.name in ALONE else ["wait", "launch_dependents"]
        assert re.findall(r"griddepcontrol\.(\w+)", kernel.ptx) == each * LATE.get(kernel.name, 1)
        if kernel.name in LATE:
            continue
        first_access = re.search(r"\b(ld|st|atom|red)\.\S*global|\bcp\.async", kernel.ptx)
        assert first_access
        assert 0 <= kernel.ptx.find("griddepcontrol.wait") < first_access.start()


def assert_merges_fit(merges: list[Compiled]) -> None:
    """Two programs fit on a multiprocessor of 228 KiB, of which each has 1 KiB beside its own; copies have 16 bytes."""
    assert not [kernel.variant for kernel in merges if kernel.shared_bytes > 113 << 10]
    assert not [kernel.variant for kernel in merges if "cp.async.cg.shared.global" not in kernel.ptx]


@pytest.mark.parametrize(("slots", "dim"), [(1, 128), (MOST_HOPPER_SLOTS, 64)], ids=str)
def test_merges_of_fewest_and_most_slots_fit(compiler: Compiler, slots: int, dim: int):
    tokens, new = 4096, {"device": "meta", "dtype": torch.bfloat16}
    block_indices = torch.empty(tokens, NUM_KV_HEADS, slots, dtype=torch.int32, device="meta")
    chunks = Chunks.fit(block_indices, tokens, 1, 64, 1, 1 << 30)
    index = InvertedIndex(chunks, block_indices, block_indices.view(-1), block_indices.view(-1))
    out, lse = torch.empty(tokens, 32, dim, **new), torch.empty(tokens, 32, device="meta")
    partial, partial_lse = torch.empty(4 * chunks.pairs, dim, **new), torch.empty(4 * chunks.pairs, device="meta")
    with compiler.launches(90) as launched:
        launch_merge(partial, partial_lse, index, out, lse, 1.0, 0, 0, tokens, far=block_indices)
    [merge] = launched.values()
    assert merge.name == MERGE[1]
    assert merge.spill_bytes == 0
    assert_merges_fit([merge])


@pytest.mark.parametrize("sizes", [(64, 64, 64), (32, 32, 64), (32, 16, 64), (16, 8, 64)], ids=str)
@pytest.mark.parametrize("pack", [1, 2, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_block_scores_of_the_largest_group_fit(compiler: Compiler, dim: int, pack: int, sizes: tuple[int, int, int]):
    hopper, windows = block_scores_hopper, sizes[2] // sizes[1]
    groups = [group for group in range(1, 100) if hopper.serves(group, dim, *sizes)]
    groups = [group for group in groups if hopper.pack_of(group, dim, windows) == pack]
    if not groups:
        assert (windows, dim, pack) in {(1, 64, 1), (1, 64, 2), (1, 64, 4), (1, 128, 4)}
        return
    group = max(groups)
    length, half = block_scores.LEAST_LENGTH, {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(length, group, dim, **half), torch.empty(length // sizes[1], 1, dim, **half)
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    with compiler.launches(90) as launched:
        launch_select_blocks(
            q, k, torch.empty(length, group, device="meta"), bounds, bounds, length, *sizes, 16, 1, 2, 0.1,
            score_tiles(dim, q.dtype, 90),
        )  # fmt: skip
    [scores] = [kernel for kernel in launched.values() if kernel.name in SCORES]
    assert scores.name == SCORES[1]
    assert scores.shared_bytes <= SHARED_BYTES[90]
    assert not scores.serialized
    assert scores.registers <= 168
    # Few are in the loop, but for blocks of one window or two, of which many scores are converted at once.
    assert scores.spill_bytes <= (150 if windows < 4 else 70 if pack > 1 else 20)


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("blocks", [16384, 32768])
def test_picking_of_very_many_blocks_fits(compiler: Compiler, arch: int, blocks: int):
    tokens, half = 64 * blocks, {"device": "meta", "dtype": torch.bfloat16}
    q, k = torch.empty(tokens, 4, 128, **half), torch.empty(tokens // 16, 1, 128, **half)
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    with compiler.launches(arch) as launched:
        launch_select_blocks(
            q, k, torch.empty(tokens, 4, device="meta"), bounds, bounds, tokens, 32, 16, 64, 16, 1, 2, 0.1,
            score_tiles(128, q.dtype, arch),
        )  # fmt: skip
    picks = [kernel for kernel in launched.values() if kernel.name == "_pick_blocks_kernel"]
    assert len(picks) > 7
    # As much as other devices have.
    assert max(kernel.shared_bytes for kernel in picks) <= 99 << 10
    # Rows of more than 1,024 blocks for a warp are held in as many registers as there are.
    assert sorted(kernel.max_registers for kernel in picks)[:8] == [64] * 3 + [72] * 5
    few = sorted(kernel.spill_bytes for kernel in picks)[:8]
    # Where scores tie.
    assert max(few) <= (112 if arch == 100 else 12)


def kernel_names(decoding: bool = False) -> set[str]:
    """The kernels of the package, those of a cache or the others, so that a case cannot forget one."""
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    functions = [function for module in modules for function in vars(module).values()]
    names = {function.fn.__name__ for function in functions if isinstance(function, JITFunction)}
    of_cache = ("_decode_", *CACHE_WRITES)
    return {name for name in names if name.endswith("_kernel") and name.startswith(of_cache) == decoding}


@dataclass(frozen=True)
class DecodeCase:
    """What the kernels of decoding are specialised for: new tokens of a sequence; tokens of a page and its pages."""

    arch: int
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    group: int = 4
    tokens: int = 1
    pages: tuple[int, int] = (1, 65536)

    def __str__(self) -> str:
        dtype, dims = str(self.dtype).removeprefix("torch."), "x".join(map(str, self.dims))
        columns, page_size = self.pages
        return f"sm_{self.arch}-{dtype}-dims{dims}-group{self.group}-{self.tokens}-pages{columns}x{page_size}"


CACHE_WRITES = ("_store_rows", "_gather_windows", "_pool_windows", "_plan_step")
# As above; none of it is in a loop.
DECODE_SPILL_BYTES = {DecodeCase(90): 13, DecodeCase(100): 4}
DECODE_CASES = [
    *DECODE_SPILL_BYTES,
    DecodeCase(80),
    DecodeCase(90, tokens=16, pages=(256, 256)),
    DecodeCase(90, (256, 256), tokens=3),
    DecodeCase(90, dtype=torch.float32, group=5),
]


def launch_decoding(case: DecodeCase, batch: int = 16) -> None:
    """Launches the kernels of `nsa_attention_with_kvcache`, with the tiles that users get."""
    (columns, page_size), (dim_k, dim_v), config = case.pages, case.dims, NSAConfig()

    def pool(rows: int, dim: int) -> torch.Tensor:
        return torch.empty(20, rows, NUM_KV_HEADS, dim, dtype=case.dtype, device="meta")

    rows = page_size, page_size, page_size // config.kernel_stride
    pools = [pool(size, dim) for size in rows for dim in case.dims]
    table, lens = (torch.empty(*size, dtype=torch.int32, device="meta") for size in ((batch, columns), (batch,)))
    pages = KVPages(*pools, table, lens)
    q = torch.empty(batch, case.tokens, NUM_KV_HEADS * case.group, dim_k, dtype=case.dtype, device="meta")
    gates = torch.empty(*q.shape[:3], 3, dtype=case.dtype, device="meta")
    shape = DecodeShape.of(q, pages, config)
    sizes = NUM_KV_HEADS, case.group, case.dims, case.dtype, shape.chunks, config, case.arch
    tiles = DecodeTiles.of(batch, case.tokens, *sizes)
    out, _ = launch_decode(q, gates, pages, config, 0.1, case.tokens, tiles)
    new, place = (
        pools[0].new_empty,
        Place(*(lens.new_empty(batch, dtype=x) for x in (torch.int64, torch.int64, torch.bool))),
    )
    rows_new = tuple(new(batch, NUM_KV_HEADS, dim) for dim in case.dims)
    angles = tuple(new(batch, dim_k // 2, dtype=torch.float32) for _ in range(2))
    pools, mean = (pages.k, pages.v), Compression()
    for count, by in ((3, None), (1, angles)):
        cache_write.store_rows([(pools, rows_new, place)] * count, by)
    kept, chosen = Place(*(x[:, None].expand(-1, KERNEL_SIZE) for x in place)), (place.row, place.exists)
    cache_write.gather_windows(pools, rows_new, place, *chosen)
    wide = tuple(x[:, None].expand(-1, KERNEL_SIZE) for x in chosen)
    cache_write.pool_windows(pools, pools, rows_new, kept, *wide, place, (mean, mean), angles)
    cache_write.plan_step(lens, table, case.tokens, KERNEL_SIZE, KERNEL_STRIDE, 20, page_size, 64)
    assert out.shape == (*q.shape[:3], dim_v)


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_decoding_compiles_and_fits(compiler: Compiler, case: DecodeCase):
    with compiler.launches(case.arch) as launched:
        launch_decoding(case)
    compiled = list(launched.values())
    assert {kernel.name for kernel in compiled} == kernel_names(decoding=True)
    spill_bytes = DECODE_SPILL_BYTES.get(case, 0)
    assert not [kernel.variant for kernel in compiled if kernel.spill_bytes > spill_bytes]
    assert not [kernel.variant for kernel in compiled if kernel.registers > kernel.max_registers]
    assert not [kernel.variant for kernel in compiled if kernel.shared_bytes > SHARED_BYTES[case.arch]]
    readers = [kernel for kernel in compiled if kernel.name in ("_decode_scores_kernel", "_decode_attend_kernel")]
    # Rows are copied 16 bytes at a time, while those before are computed with.
    if case.dtype != torch.float32:
        assert all("cp.async.cg.shared.global" in kernel.ptx for kernel in readers)
    if case.arch == 90 and case.dims == (128, 128) and case.tokens == 1 and case.dtype != torch.float32:
        # Three programs fit on a multiprocessor of 65,536 registers and 228 KiB.
        assert all(kernel.registers <= 168 and kernel.shared_bytes <= 75 << 10 for kernel in readers)


def test_capacities_and_pages_never_recompile_decoding(compiler: Compiler):
    wanted = []
    for pages in ((1, 65536), (1, 4160), (13, 1024), (16, 8192)):
        with compiler.specializations(90) as launched:
            launch_decoding(DecodeCase(90, pages=pages))
        wanted.append(launched)
    assert wanted[0]
    assert all(one == wanted[0] for one in wanted)


LENGTHS = [(1000, 1), (4097, 7), (65536, 16)]


# The one holds a row of scores: there is a kernel for each power of two, as short rows would pay for long ones. The
# other writes float32 for several shares of the rows, into which short sequences are cut, and for one the gradients, or
# adds to them.
DKV = INTERVAL[-1], HOPPER_INTERVAL[-1]
# Beyond 16,384 tokens pairs are placed 64 at a time instead of 32.
BY_MAGNITUDE = {"_pick_blocks_kernel", "_scatter_pairs_kernel", *DKV, *(f"{name} ADD" for name in DKV)}


@pytest.mark.parametrize("case", [Case(90), Case(90, group=16), Case(90, block_size=128)], ids=str)
def test_lengths_never_recompile(compiler: Compiler, case: Case):
    known: dict[tuple[str, str], str] = {}
    again: set[str] = set()
    for total_tokens, num_sequences in LENGTHS:
        with compiler.specializations(90) as wanted:
            launch_all(case, total_tokens, num_sequences)
        known = known or wanted
        again |= {variant for key, variant in wanted.items() if key not in known and variant not in BY_MAGNITUDE}
    assert known
    assert not again


def test_compiler_leaves_triton_as_it_was(tmp_path: Path):
    run, active = JITFunction.run, vars(driver).copy()
    with pytest.MonkeyPatch.context() as monkeypatch, Compiler(monkeypatch, tmp_path).launches(90):
        assert vars(driver) != active
    assert JITFunction.run is run
    assert vars(driver) == active
