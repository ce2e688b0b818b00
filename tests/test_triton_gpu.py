"""The Triton kernels on a GPU: pytest -m gpu."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import SequenceLayout, selected_attention
from flash_sparse_attention.accuracy import FULL, Case, judge
from flash_sparse_attention.impl.triton import interval
from flash_sparse_attention.impl.triton.compress import launch_key_bounds
from flash_sparse_attention.impl.triton.delta import launch_shifts
from flash_sparse_attention.impl.triton.inverted_index import Chunks, InvertedIndex, build_index
from flash_sparse_attention.impl.triton.measure import Problem
from flash_sparse_attention.impl.triton.selected_kv_outer import launch_selected_fwd_kv_outer, specialized_kernels
from flash_sparse_attention.impl.triton.tuning import (
    QUERY_OUTER_FROM_GROUP,
    WIDE_KEYS,
    WIDE_TILES_OF_OTHERS,
    SelectedShape,
    built_in_tiles,
    interval_schedule,
    loop_orders_of,
    runs_gluon,
)
from graphs import recorded
from triton_cases import config, random_selection, selected_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LOOP_ORDERS = ("kv_outer", "query_outer")
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a device of sm_90"
)
HALF = (torch.bfloat16, torch.float16)
GRID = [
    *(case for case in FULL if "selected_attention" in case.operators and case.dtype != torch.float64),
    # Every head dimension, block size and number of slots that kernels treat apart, and groups that divide no tile.
    *(
        Case((260, 1, 0, 133), heads, kv_heads, dim, dim_v, config(block_size, slots), dtype, flavour, seed=9)
        for heads, kv_heads, dim, dim_v, block_size, slots, dtype, flavour in (
            (4, 2, 16, 16, 16, 1, torch.bfloat16, "plain"),
            (6, 1, 32, 64, 32, 12, torch.float16, "plain"),
            (12, 1, 80, 80, 64, 3, torch.bfloat16, "plain"),
            (10, 2, 112, 96, 48, 5, torch.bfloat16, "hostile indices"),
            (8, 2, 128, 128, 64, 16, torch.bfloat16, "hostile indices"),
            (8, 2, 128, 128, 128, 8, torch.bfloat16, "plain"),
            (6, 2, 128, 128, 128, 5, torch.float16, "hostile indices"),
            (4, 1, 128, 128, 256, 2, torch.bfloat16, "hostile indices"),
            (3, 1, 192, 128, 64, 20, torch.bfloat16, "plain"),
            (2, 2, 256, 256, 64, 4, torch.bfloat16, "plain"),
            (2, 1, 256, 128, 256, 2, torch.float16, "plain"),
            (48, 1, 64, 64, 16, 64, torch.bfloat16, "hostile indices"),
            (4, 2, 128, 128, 64, 16, torch.float32, "plain"),
            (2, 1, 256, 256, 256, 2, torch.float32, "plain"),
        )
    ),
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_within_the_budgets_in_both_loop_orders(case: Case):
    rows = list(judge(case, "cuda", impls=["triton"], operators=["selected_attention"]))
    assert {row.impl for row in rows} == {"triton/kv_outer", "triton/query_outer"}
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]


def inputs(
    tokens: int, heads: int = 8, kv_heads: int = 2, dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """q, k and v, wanting gradients, and the gradient of the output."""
    shapes = [(tokens, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    *leaves, d_out = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    return [*(x.requires_grad_() for x in leaves), d_out]


def gradients(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, indices: Tensor, **options: object) -> list[Tensor]:
    """Output and gradients."""
    out = selected_attention(q, k, v, indices, impl="triton", **options).out  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), d_out)]


@HOPPER
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "block_size", "slots", "dtype", "workspace_mib"),
    [
        (8192, 32, 8, 64, 16, torch.bfloat16, 1024),
        (8192, 32, 8, 64, 16, torch.bfloat16, 40),
        (8192, 16, 4, 128, 8, torch.bfloat16, 16),
        (3000, 16, 1, 64, 12, torch.float16, 4),
        (3000, 4, 2, 32, 8, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_kernels_that_begin_early_change_nothing(
    tokens: int, heads: int, kv_heads: int, block_size: int, slots: int, dtype: torch.dtype, workspace_mib: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from flash_sparse_attention.impl.triton import inverted_index, merge, merge_hopper, selected_kv_outer, selected_near

    x = inputs(tokens, heads, kv_heads, dtype=dtype)
    indices = random_selection(tokens, kv_heads, slots, -(-tokens // block_size), "cuda")
    options = {"block_size": block_size, "workspace_mib": workspace_mib, "loop_order": "kv_outer"}
    early = [gradients(*x, indices, **options) for _ in range(10)]
    for module in (inverted_index, merge, merge_hopper, selected_kv_outer, selected_near):
        monkeypatch.setattr(module, "early_launch", lambda: {"EARLY": False})
    expected = gradients(*x, indices, **options)
    for got in early:
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_bitwise_equal_from_run_to_run_and_whatever_is_kept(loop_order: str):
    x, indices = inputs(5000), random_selection(5000, 2, 16, 79, "cuda")
    first = gradients(*x, indices, loop_order=loop_order)
    for options in ({}, {}, {"save_index": False}):
        again = gradients(*x, indices, loop_order=loop_order, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("heads", [16, 32, 64])
def test_large_groups_take_each_pass_in_its_order(heads: int):
    x, indices = inputs(3000, heads, 1), random_selection(3000, 1, 16, 47, "cuda")
    forward, backward = loop_orders_of(SelectedShape.of(*x[:3], indices, 64), "auto")
    assert forward == ("query_outer" if heads >= QUERY_OUTER_FROM_GROUP else "kv_outer")
    by_order = {loop_order: gradients(*x, indices, loop_order=loop_order) for loop_order in LOOP_ORDERS}
    got = gradients(*x, indices)
    assert torch.equal(got[0], by_order[forward][0])
    for a, b in zip(got, by_order[backward], strict=True):
        assert (a - b).abs().max() / b.abs().max() < 8e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_small_workspace_changes_no_output(eight_bits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.triton import selected_kv_outer

    x, indices = inputs(9000, dtype=dtype), random_selection(9000, 2, 16, 141, "cuda")
    if eight_bits:
        # As of long sequences: sums are in the gradients and in 8 bits of what rounding leaves.
        monkeypatch.setattr(selected_kv_outer, "FLOAT32_SUMS", 0)
    whole, cut = gradients(*x, indices), gradients(*x, indices, workspace_mib=8)
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])
    for a, b in zip(whole[2:], cut[2:], strict=True):
        # One unit in the last place.
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "slots", "block_size"),
    [((8, 2), 128, 16, 64), ((5, 1), 64, 12, 64), ((6, 2), 128, 3, 128), ((4, 4), 128, 1, 64)],
    ids=str,
)
def test_merge_by_warps_of_two_kinds(
    heads: tuple[int, int], dim: int, slots: int, block_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    from flash_sparse_attention.impl.triton import merge

    if not runs_gluon():
        pytest.skip("the kernel is for sm_90 and some versions of Triton")
    *x, _ = inputs(3001, *heads, dim, dtype)
    indices = random_selection(3001, heads[1], slots, 47, "cuda")
    layout = SequenceLayout.from_lengths([1500, 0, 1, 1500], "cuda")

    def attend() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return selected_attention(
                *x, indices, block_size=block_size, cu_seqlens=layout, impl="triton", loop_order="kv_outer",
                workspace_mib=4,
            )  # fmt: skip

    first, again = attend(), attend()
    monkeypatch.setattr(merge, "MOST_HOPPER_SLOTS", 0)
    expected = attend()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[0], expected[0], rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 4)
    torch.testing.assert_close(first[1], expected[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("workspace_mib", [16, 64])
def test_the_workspace_keeps_to_its_bound(workspace_mib: int):
    x, indices = inputs(16384), random_selection(16384, 2, 16, 256, "cuda")
    gradients(*x, indices, workspace_mib=workspace_mib)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.no_grad():
        out, lse = selected_attention(*x[:3], indices, impl="triton", workspace_mib=workspace_mib)
    index = 3 * indices.numel() * 4 + (40 << 20)
    assert torch.cuda.max_memory_allocated() - held <= (workspace_mib << 20) + index + out.nbytes + lse.nbytes


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_no_host_synchronisation(loop_order: str):
    x, indices = inputs(700), random_selection(700, 2, 4, 11, "cuda")
    layout = SequenceLayout.from_lengths([300, 0, 400], "cuda")
    gradients(*x, indices, loop_order=loop_order, cu_seqlens=layout)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(*x, indices, loop_order=loop_order, cu_seqlens=layout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_captured_in_a_graph(loop_order: str):
    *leaves, d_out = inputs(600)
    indices, layout = random_selection(600, 2, 4, 10, "cuda"), SequenceLayout.from_lengths([250, 350], "cuda")
    common = {"loop_order": loop_order, "cu_seqlens": layout}
    graph, captured = recorded(lambda: gradients(*leaves, d_out, indices, **common))
    with torch.no_grad():
        for x in leaves:
            x.normal_()
        indices.copy_(random_selection(600, 2, 4, 10, "cuda"))
    graph.replay()
    expected = gradients(*leaves, d_out, indices, **common)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
def test_logits_of_ten_thousand(loop_order: str):
    q, k, v, d_out = inputs(400)
    with torch.no_grad():
        q.mul_(1e4 / 128**0.5)
    got = gradients(q, k, v, d_out, random_selection(400, 2, 4, 7, "cuda"), loop_order=loop_order)
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize("slots", [1, 2, 5, 16, 32, 40])
@pytest.mark.parametrize("lengths", [[20000], [3000, 1, 0, 900, 64]], ids=str)
def test_index_against_a_stable_sort(lengths: list[int], slots: int):
    layout, heads = SequenceLayout.from_lengths(lengths, "cuda"), 2
    tokens = layout.total_tokens
    position = layout.positions()[:, None, None]
    # Near each other, so that the tokens of a step share blocks; some negative, some in the future.
    indices = (position // 64 + 2).to(torch.int32) - random_selection(tokens, heads, slots, 12, "cuda")
    chunks = Chunks.fit(indices, tokens, layout.batch, 64, 1, 1 << 30)
    # Three chunks of tokens, or fewer where runs do not divide.
    chunks = replace(chunks, runs=-(-chunks.runs // 3), token_chunks=3)
    index = build_index(indices, layout.cu_seqlens, 64, chunks)
    valid = (indices >= 0) & (indices <= position // 64)
    for slot in range(1, slots):
        valid[..., slot] &= (indices[..., :slot] != indices[..., slot, None]).all(-1)
    sequence = layout.sequence_ids()[:, None, None].long()
    first_block = layout.cu_seqlens.long()[sequence] // 64 + sequence
    head = torch.arange(heads, device="cuda")[None, :, None]
    bucket = head * chunks.num_blocks + first_block + indices
    token = torch.arange(tokens, device="cuda")[:, None, None].expand_as(indices)
    key = (token // chunks.tokens * (heads * chunks.num_blocks) + bucket)[valid]
    order = key.sort(stable=True).indices
    assert torch.equal(index.pairs[: len(order)].long(), token[valid][order])
    assert not index.pairs[len(order) :].any()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device="cuda")
    assert torch.equal(index.place[valid].long(), place)
    assert (index.place[~valid] == -1).all()
    ends = torch.bincount(key, minlength=chunks.bucket_ends).cumsum(0)
    assert torch.equal(index.bucket_ends.long(), ends)


def test_new_lengths_compile_nothing():
    from flash_sparse_attention.impl.triton import inverted_index, merge, selected_kv_outer

    def specialisations() -> int:
        kernels = (
            selected_kv_outer._selected_fwd_kv_outer_kernel,
            selected_kv_outer._selected_bwd_kv_outer_kernel,
            inverted_index._scatter_pairs_kernel,
            inverted_index._fill_segments_kernel,
            merge._merge_slots_kernel,
        )
        if runs_gluon():
            from flash_sparse_attention.impl.triton import near_hopper, selected_hopper

            kernels += selected_hopper._selected_fwd_hopper_kernel, selected_hopper._selected_bwd_hopper_kernel
            kernels += (near_hopper._selected_near_hopper_kernel,)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for tokens in (1024, 1000):
        gradients(*inputs(tokens), random_selection(tokens, 2, 4, 16, "cuda"))
    before = specialisations()
    for lengths in ([1], [16], [2048], [1, 1500, 16], [333, 1]):
        x, indices = inputs(sum(lengths)), random_selection(sum(lengths), 2, 4, 16, "cuda")
        gradients(*x, indices, cu_seqlens=SequenceLayout.from_lengths(lengths, "cuda"))
    assert specialisations() == before


@HOPPER
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "dtype"),
    [
        (8, 2, 128, 64, torch.bfloat16),
        (8, 2, 128, 64, torch.float16),
        (2, 2, 128, 64, torch.bfloat16),
        (5, 1, 64, 64, torch.bfloat16),
        (8, 2, 64, 128, torch.float16),
        (8, 2, 128, 128, torch.bfloat16),
        (2, 2, 128, 128, torch.bfloat16),
        (7, 1, 128, 192, torch.bfloat16),
        (16, 1, 128, 256, torch.bfloat16),
    ],
    ids=str,
)
def test_warps_of_two_kinds_compute_the_same(heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype):
    # Sequences that end before, at and after the parts of a block, and tiles that are full, or hold few rows.
    layout = SequenceLayout.from_lengths([700, 0, 1, 64, 1999, 130], "cuda")
    shape = SelectedShape(layout.total_tokens, kv_heads, heads // kv_heads, 8, block_size, dim, dim, dtype)
    problem, tiles = Problem.random(shape, layout, torch.device("cuda")), built_in_tiles(shape)
    for launch, chosen, tensors in (
        (problem.kv_outer_forward, tiles.kv_outer_forward, 3),
        (problem.kv_outer_backward, tiles.kv_outer_backward, 4),
    ):
        if launch == problem.kv_outer_forward and block_size != 64 and (block_size, dim) != (128, 128):
            continue
        assert specialized_kernels(chosen, *(problem.q, problem.k, problem.v, problem.d_out)[:tensors]) is not None
        for pairs in (chosen.segment_pairs, 40):
            tried = replace(chosen, segment_pairs=pairs)
            wide = WIDE_TILES_OF_OTHERS if tensors == 4 and tried.keys == WIDE_KEYS else {}
            others = launch(replace(tried, specialized=False, dense_near=False, **wide))
            assert_same(launch(tried), launch(tried), others, dtype)
            if tried.dense_near:
                assert_same(launch(tried), launch(tried), launch(replace(tried, dense_near=False)), dtype)


def assert_same(
    got: tuple[Tensor, ...], again: tuple[Tensor, ...], others: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """The same as others but for rounding, and bitwise from run to run."""
    for a, b, other in zip(got, again, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.isfinite(), other.isfinite())
        a, other = (x.float().nan_to_num(0.0, 0.0, 0.0) for x in (a, other))
        assert (a - other).abs().max() / other.abs().max() < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@HOPPER
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (2, 2, 128), (5, 1, 64), (32, 2, 64)], ids=str)
@pytest.mark.parametrize("past", [None, [0, 64, 70, 1000, 3, 129]], ids=str)
@pytest.mark.parametrize(("processors", "pairs"), [(132, 1 << 30), (3, 4000), (40, 30_000)], ids=str)
def test_near_blocks_of_any_selection(
    heads: int, kv_heads: int, dim: int, past: list[int] | None, processors: int, pairs: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    from flash_sparse_attention.impl.triton import inverted_index, near_hopper

    # Programs of many blocks, and chunks that cut heads, sequences and blocks.
    monkeypatch.setattr(near_hopper, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 1)
    lengths, device = [700, 0, 1, 64, 1999, 130], torch.device("cuda")
    layout = SequenceLayout.from_lengths(lengths, device)
    keys = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, past or [0] * 6, strict=True)], device)
    indices = random_selection(layout.total_tokens, kv_heads, 9, 40, "cuda")
    # Near blocks of half the rows, which random ones seldom are: the first, the own and the one before, each or not.
    positions = torch.cat(
        [torch.arange(k - q, k) for q, k in zip(lengths, keys.cu_seqlens.diff().tolist(), strict=True)]
    )
    own = (positions // 64).to("cuda", torch.int32)[:, None].expand(-1, kv_heads)
    for slot, block in enumerate((own, own - 1, own * 0)):
        indices[..., slot] = torch.where(torch.rand(own.shape, device=device) < 0.5, block, indices[..., slot])
    q = torch.randn(layout.total_tokens, heads, dim, device=device).bfloat16()
    k, v = (torch.randn(keys.total_tokens, kv_heads, dim, device=device).bfloat16() for _ in range(2))
    shape = SelectedShape.of(q, k, v, indices, 64)
    tiles = built_in_tiles(shape).kv_outer_forward
    assert tiles.dense_near
    bounds = None if past is None else keys.cu_seqlens
    chunks = Chunks.fit(indices, len(k), layout.batch, 64, 1, pairs)
    assert (chunks.token_chunks == 1) == (pairs > indices.numel() // kv_heads)
    indexes = [build_index(indices, layout.cu_seqlens, 64, chunks, bounds, split) for split in (True, False)]

    def launch(near: bool, index: InvertedIndex) -> tuple[Tensor, ...]:
        given = q, k, v, indices, index, layout.cu_seqlens, 64, dim**-0.5, replace(tiles, dense_near=near)
        return launch_selected_fwd_kv_outer(*given, bounds)

    assert_same(*(launch(True, index) for index in indexes), launch(False, indexes[0]), torch.bfloat16)


@HOPPER
@pytest.mark.parametrize(("heads", "kv_heads", "dtype"), [(8, 2, torch.bfloat16), (5, 1, torch.float16)], ids=str)
@pytest.mark.parametrize("pairs", [1 << 30, 4000], ids=str)
def test_blocks_of_128_after_a_past(heads: int, kv_heads: int, dtype: torch.dtype, pairs: int, monkeypatch):
    from flash_sparse_attention.impl.triton import inverted_index

    # Many small chunks, each of which writes over what the merge of the one before reads.
    monkeypatch.setattr(inverted_index, "MIN_CHUNK_TOKENS", 1)
    lengths, past, device = [700, 0, 1, 128, 1999, 130], [0, 64, 70, 1000, 3, 129], torch.device("cuda")
    layout = SequenceLayout.from_lengths(lengths, device)
    bounds = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, past, strict=True)], device).cu_seqlens
    indices = random_selection(layout.total_tokens, kv_heads, 8, 20, "cuda")
    q = torch.randn(layout.total_tokens, heads, 128, device=device).to(dtype)
    k, v = (torch.randn(int(bounds[-1]), kv_heads, 128, device=device).to(dtype) for _ in range(2))
    tiles = built_in_tiles(SelectedShape.of(q, k, v, indices, 128)).kv_outer_forward
    assert specialized_kernels(tiles, q, k, v) is not None
    chunks = Chunks.fit(indices, len(k), layout.batch, 128, 1, pairs)
    assert (chunks.token_chunks == 1) == (pairs > indices.numel() // kv_heads)
    index = build_index(indices, layout.cu_seqlens, 128, chunks, bounds)

    def launch(specialized: bool, segment_pairs: int) -> tuple[Tensor, ...]:
        tried = replace(tiles, specialized=specialized, segment_pairs=segment_pairs)
        given = q, k, v, indices, index, layout.cu_seqlens, 128, 128**-0.5, tried
        return launch_selected_fwd_kv_outer(*given, bounds)

    for segment_pairs in (tiles.segment_pairs, 10):
        others = launch(False, segment_pairs)
        for _ in range(5):
            assert_same(launch(True, segment_pairs), launch(True, segment_pairs), others, dtype)


@HOPPER
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (8, 2, 128, torch.bfloat16),
        (2, 2, 128, torch.float16),
        (5, 1, 64, torch.bfloat16),
        (32, 2, 64, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("past", [None, [0, 64, 70, 1000, 3, 129, 40]], ids=str)
@pytest.mark.parametrize("window", [0, 130], ids=str)
def test_intervals_by_warps_of_two_kinds(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, past: list[int] | None, window: int, monkeypatch
):
    monkeypatch.setattr(interval, "LEAST_HOPPER_KEYS", 0)
    device, lengths = torch.device("cuda"), [700, 0, 1, 64, 1999, 130, 33]
    layout = SequenceLayout.from_lengths(lengths, device)
    keys = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, past or [0] * 7, strict=True)], device)
    bounds_k = None if past is None else keys.cu_seqlens
    sizes = interval.IntervalSizes(1, 1, window, dim**-0.5) if window else interval.IntervalSizes(8, 4, 0, dim**-0.5)
    key_bounds = keys.cu_seqlens if window else launch_key_bounds(keys.cu_seqlens, 8, 4)
    num_keys = int(key_bounds[-1])
    q, d_out = (torch.randn(layout.total_tokens, heads, dim, device=device).to(dtype) for _ in range(2))
    # What stands behind the last key is no number.
    k, v = (torch.full((num_keys + 100, kv_heads, dim), float("nan"), device=device, dtype=dtype) for _ in range(2))
    k[:num_keys], v[:num_keys] = (torch.randn(num_keys, kv_heads, dim, device=device).to(dtype) for _ in range(2))
    schedule = interval_schedule(dim, dim, dtype, window > 0)
    assert all(tiles.specialized for tiles in schedule)
    dq, dk, dv = (torch.randn_like(x) for x in (q, k, v))

    def run(specialized: bool) -> tuple[Tensor, ...]:
        forward, by_rows, by_keys = (replace(tiles, specialized=specialized) for tiles in schedule)
        out, lse = interval.launch_interval_fwd(q, k, v, layout.cu_seqlens, key_bounds, sizes, forward, bounds_k)
        shift, delta = launch_shifts(d_out, torch.zeros_like(lse), out, lse)
        given = d_out, q, k, v, shift, delta, layout.cu_seqlens, key_bounds, sizes
        new, sums = torch.empty_like(q), dq.clone()
        interval.launch_interval_dq(*given, by_rows, new, False, bounds_k)
        interval.launch_interval_dq(*given, by_rows, sums, True, bounds_k)
        of_keys = interval.launch_interval_dkv(*given, by_keys, bounds_k)
        added = interval.launch_interval_dkv(*given, by_keys, bounds_k, (dk.clone(), dv.clone()))
        return out, lse, new, sums, *(x[:num_keys] for x in (*of_keys, *added))

    got = run(True)
    assert all(x.isfinite().all() for x in (got[0], *got[2:]))
    assert_same(got, run(True), run(False), dtype)


@pytest.mark.parametrize("block_size", [64, 128])
def test_rows_that_are_not_aligned_take_other_kernels(block_size: int):
    q, k, v, d_out = inputs(300)
    indices = random_selection(300, 2, 4, -(-300 // block_size), "cuda")
    # Rows that begin at multiples of 2 bytes only.
    shifted = torch.randn(300 * 8 * 128 + 1, device="cuda", dtype=q.dtype)[1:].view_as(q).copy_(q.detach())
    assert shifted.data_ptr() % 16 != 0
    expected = gradients(q, k, v, d_out, indices, block_size=block_size)
    got = gradients(shifted.requires_grad_(), k, v, d_out, indices, block_size=block_size)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


def test_compiled_by_inductor():
    q, k, v, d_out = inputs(500)
    indices = random_selection(500, 2, 4, 8, "cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return selected_attention(q * 1.0, k, v, indices, impl="triton").out * 2.0

    expected = [attend(q, k, v), *torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)]
    compiled = torch.compile(attend, fullgraph=True)
    got = [compiled(q, k, v), *torch.autograd.grad(compiled(q, k, v), (q, k, v), d_out)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("loop_order", LOOP_ORDERS)
@pytest.mark.parametrize(("tokens", "heads"), [(65536, 32), (1048576, 64)], ids=str)
def test_long_sequences_row_by_row(tokens: int, heads: int, loop_order: str):
    # 1,048,576 tokens of 64 heads of 128 are 2**33 elements: offsets of 32 bits would show.
    if torch.cuda.mem_get_info()[1] < 100 << 30 and tokens > 65536:
        pytest.skip("needs 100 GiB of device memory")
    kv_heads, slots, block_size = 4, 4, 64
    q, k, v, d_out = inputs(tokens, heads, kv_heads)
    indices = random_selection(tokens, kv_heads, slots, tokens // block_size, "cuda")
    rows = torch.cat([torch.randint(0, tokens, (30,), device="cuda"), torch.tensor([0, tokens - 1], device="cuda")])
    rows = rows.unique()
    # Only these rows have a gradient, so that the gradients of k and v can be known.
    d_rows = d_out[rows].clone()
    d_out.zero_().index_copy_(0, rows, d_rows)
    out, lse = selected_attention(q, k, v, indices, impl="triton", loop_order=loop_order)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), d_out)
    del d_out
    q_rows, out_rows, lse_rows, dq_rows = (x.detach()[rows] for x in (q, out, lse, dq))
    assert torch.isfinite(out).all()
    del q, out, lse, dq
    q_rows.requires_grad_()
    exact_out, exact_lse = selected_rows(q_rows, k, v, indices, block_size, rows)
    torch.testing.assert_close(out_rows.double(), exact_out, rtol=0, atol=3e-2)
    torch.testing.assert_close(lse_rows.double(), exact_lse, rtol=0, atol=1e-4)
    expected = torch.autograd.grad(exact_out, (q_rows, k, v), d_rows.double())
    for got, exact in zip((dq_rows, dk, dv), expected, strict=True):
        assert (got - exact).abs().max() <= 2e-2 * exact.abs().max()
