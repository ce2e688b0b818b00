"""Block scores by the kernel for Hopper: pytest -m gpu."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.accuracy import Case, judge
from flash_sparse_attention.accuracy.budgets import compare_selection
from flash_sparse_attention.impl import reference
from flash_sparse_attention.impl.triton.tuning import runs_gluon, score_tiles

HOPPER = torch.cuda.is_available() and runs_gluon()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs sm_90 and the Gluon that its kernels were tried with"),
]

block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
compress = importlib.import_module("flash_sparse_attention.impl.triton.compress")
LENGTHS = [700, 0, 1, 64, 1999, 20000]
# Blocks of one window: as many tiles of windows as the ring is to be used twice by.
LONGER = [*LENGTHS[:-1], 50000]
PAPER, FINE = NSAConfig(), NSAConfig(kernel_size=16, kernel_stride=8, num_selected_blocks=12, window_size=77)
SHORT = NSAConfig(kernel_size=8, kernel_stride=4, block_size=16, num_selected_blocks=5, window_size=40)


# Groups and head dimensions that do not fit, or were not timed, where blocks have one window: the other kernel's.
UNSERVED = {(20, 128), (24, 128), (12, 64), (22, 64)}


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        self.launches += 1
        return self.kernel[grid]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """The kernel, which sequences of all lengths take."""
    module = importlib.import_module("flash_sparse_attention.impl.triton.block_scores_hopper")
    counted = Counted(module._block_scores_hopper_kernel)
    monkeypatch.setattr(module, "_block_scores_hopper_kernel", counted)
    monkeypatch.setattr(block_scores, "LEAST_TOKENS", 0)
    monkeypatch.setattr(block_scores, "LEAST_LENGTH", 0)
    return counted


class Pick:
    """Keeps the scores that it is to pick from: first row of the chunk, rows of a tile, scores [rows, Hk, blocks]."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, Tensor]] = []

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(scores: Tensor, *args: Any, **options: Any) -> None:
            first_tile, columns, heads, tokens = args[4:8]
            chunk = scores[: grid[0] * heads * columns].view(grid[0], heads, columns).clone()
            self.seen.append((first_tile * tokens, tokens, chunk))

        return launch

    def by_token(self, bounds: list[int]) -> Tensor:
        """The scores [N, Hk, blocks] of a pack with such bounds, NaN where there are none."""
        heads, columns = self.seen[0][2].shape[1], max(chunk.shape[2] for *_, chunk in self.seen)
        found = torch.full((bounds[-1], heads, columns), math.nan, device=self.seen[0][2].device)
        for first, tokens, chunk in self.seen:
            for sequence, (start, end) in enumerate(pairwise(bounds)):
                row = (start // tokens + sequence) * tokens - first + torch.arange(end - start, device=found.device)
                inside = (row >= 0) & (row < len(chunk))
                found[start:end][inside, :, : chunk.shape[2]] = chunk[row[inside]]
        return found


@contextlib.contextmanager
def empty_is_nan() -> Iterator[None]:
    """While active, `torch.empty` is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (10, 2, 128, torch.bfloat16),
        (6, 1, 128, torch.float16),
        (16, 2, 128, torch.bfloat16),
        (12, 1, 64, torch.float16),
        (32, 2, 128, torch.bfloat16),
        (24, 1, 128, torch.float16),
        (40, 2, 128, torch.bfloat16),
        (44, 2, 64, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("windows", [(32, 16, 64), (64, 64, 64), (16, 8, 64), (32, 32, 64), (64, 16, 64)], ids=str)
@pytest.mark.parametrize("past", [None, [0, 64, 70, 1000, 3, 129]], ids=str)
def test_as_the_other_kernel(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, windows: tuple[int, int, int], past: list[int] | None,
    hopper: Counted, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    one_window = windows == (64, 64, 64)
    served = not one_window or (heads // kv_heads, dim) not in UNSERVED
    lengths = LONGER if one_window else LENGTHS
    kernel_size, stride, block_size = windows
    device = torch.device("cuda")
    layout = SequenceLayout.from_lengths(lengths, device)
    before = past or [0] * len(lengths)
    keys = SequenceLayout.from_lengths([a + b for a, b in zip(lengths, before, strict=True)], device)
    bounds = compress.launch_key_bounds(keys.cu_seqlens, kernel_size, stride)
    num_windows, longest = int(bounds[-1]), int(keys.cu_seqlens.diff().max())
    # Between the rows, and behind the last window, stands no number.
    q = torch.full((sum(lengths), heads + 2, dim), math.nan, device=device, dtype=dtype)[:, :heads]
    q.normal_()
    k = torch.full((num_windows + 200, kv_heads + 1, dim), math.nan, device=device, dtype=dtype)[:, :kv_heads]
    k[:num_windows].normal_()
    # Such that probabilities add up to no more than 1, and none for queries that see no window.
    lse = 8 + torch.rand(len(q), heads, device=device)
    position = layout.positions() + torch.tensor(before, device=device)[layout.sequence_ids()]
    tiles = score_tiles(dim, dtype)
    # The second has all tiles of a sequence in one program, the third several chunks.
    for programs, chunk in ((1024, 1 << 30), (1, 1 << 30), (1024, 4 << 20)):
        monkeypatch.setattr(block_scores, "SCORE_PROGRAMS", programs)
        monkeypatch.setattr(block_scores, "SCORE_BYTES", chunk)
        found = []
        for one in (tiles, replace(tiles, specialized=False)):
            launches, pick = hopper.launches, Pick()
            monkeypatch.setattr(block_scores, "_pick_blocks_kernel", pick)
            with empty_is_nan():
                block_scores.launch_select_blocks(
                    q, k, lse, layout.cu_seqlens, bounds, longest, kernel_size, stride, block_size, 16, 1, 2,
                    dim**-0.5, one, keys.cu_seqlens if past else None,
                )  # fmt: skip
            assert (hopper.launches > launches) == (one.specialized and served)
            assert (len(pick.seen) > 1) == (chunk < 1 << 30)
            scores = pick.by_token(layout.cu_seqlens.tolist())
            there = torch.arange(scores.shape[2], device=device) <= (position // block_size)[:, None, None]
            there = there.expand_as(scores)
            if len(pick.seen) == 1:
                assert torch.equal(scores.isnan(), ~there)
            found.append(scores[there])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


CASES = [
    *(
        Case((700, 1, 0, 333), heads, kv_heads, dim, dim, config, dtype, seed=21)
        for heads, kv_heads, dim, config, dtype in (
            (5, 1, 128, PAPER, torch.bfloat16),
            (16, 2, 128, PAPER, torch.float16),
            (7, 1, 128, FINE, torch.bfloat16),
            (20, 1, 64, PAPER, torch.bfloat16),
            (16, 1, 128, PAPER, torch.bfloat16),
            (20, 1, 128, FINE, torch.bfloat16),
            (6, 1, 64, SHORT, torch.float16),
            (5, 1, 128, NSAConfig.preset("fla"), torch.bfloat16),
        )
    ),
    Case((5000, 70), 10, 2, 128, 128, PAPER, torch.bfloat16, seed=22),
    Case((310, 41), 5, 1, 128, 128, SHORT, torch.bfloat16, "large queries", seed=23),
    Case((900, 41), 5, 1, 64, 64, SHORT, torch.bfloat16, "ties", seed=24),
    Case((300, 41), 8, 1, 128, 128, FINE, torch.bfloat16, seed=25, past=(1000, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_budgets(case: Case, hopper: Counted):
    rows = list(judge(case, "cuda", impls=["triton"], operators=["select_blocks"]))
    assert rows
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    assert hopper.launches > 0


@pytest.mark.parametrize(("windows", "loudness"), [((32, 16, 64), 0.005), ((32, 32, 64), 0.02), ((16, 8, 64), 0.005)])
def test_scores_that_lie_close_together(windows: tuple[int, int, int], loudness: float, hopper: Counted):
    """Quiet queries have blocks of almost one importance, which a rounded sum would not tell apart."""
    kernel_size, stride, block_size = windows
    tokens, length, group, dim, device = 2048, 8192, 5, 64, torch.device("cuda")
    keys = SequenceLayout.from_lengths([length], device)
    layout = SequenceLayout.from_lengths([tokens], device).after(keys)
    bounds = compress.launch_key_bounds(keys.cu_seqlens, kernel_size, stride)
    q = (torch.randn(tokens, group, dim, device=device) * loudness).bfloat16()
    k = torch.randn(int(bounds[-1]), 1, dim, device=device).bfloat16()
    scale = dim**-0.5
    logits = torch.einsum("tgd,sd->tgs", q.double(), k[:, 0].double()) * scale
    visible = (torch.arange(len(k), device=device) * stride + kernel_size)[None, :] <= layout.positions()[:, None] + 1
    lse = logits.masked_fill(~visible[:, None], -math.inf).logsumexp(-1).float()
    sizes = kernel_size, stride, block_size
    exact = reference.block_importance(q.double(), k.double(), lse, *sizes, layout, scale)
    plain = reference.block_importance(q.float(), k.float(), lse, *sizes, layout, scale)
    config = NSAConfig(kernel_size=kernel_size, kernel_stride=stride, block_size=block_size)
    indices = block_scores.launch_select_blocks(
        q, k, lse, layout.cu_seqlens, bounds, length, *sizes, config.num_selected_blocks, config.num_init_blocks,
        config.num_local_blocks, scale, score_tiles(dim, q.dtype), keys.cu_seqlens,
    )  # fmt: skip
    assert hopper.launches == 1
    errors = compare_selection(indices, plain, exact, config, layout)
    assert errors["structure"].max_error == 0
    assert errors["importance"].max_error <= errors["importance"].max_budget


def test_new_lengths_compile_nothing(hopper: Counted):
    config = PAPER
    sizes = config.kernel_size, config.kernel_stride, config.block_size
    specialisations = []
    for lengths in ([1024], [1000], [40], [2048], [33, 1500, 16], [333, 1]):
        cu_seqlens = SequenceLayout.from_lengths(lengths, "cuda").cu_seqlens
        bounds = compress.launch_key_bounds(cu_seqlens, *sizes[:2])
        q = torch.randn(sum(lengths), 6, 128, device="cuda").bfloat16()
        k = torch.randn(int(bounds[-1]), 1, 128, device="cuda").bfloat16()
        block_scores.launch_select_blocks(
            q, k, torch.full((len(q), 6), 9.0, device="cuda"), cu_seqlens, bounds, max(lengths), *sizes, 16, 1, 2, 0.1,
            score_tiles(128, q.dtype),
        )  # fmt: skip
        specialisations.append(sum(len(cache[0]) for cache in hopper.kernel.device_caches.values()))
    assert hopper.launches == 6
    assert specialisations[1] == specialisations[-1]


@pytest.mark.parametrize(("heads", "kv_heads"), [(40, 8), (32, 2), (24, 1)])
def test_scores_are_the_same_twice(heads: int, kv_heads: int, hopper: Counted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(block_scores, "_pick_blocks_kernel", pick := Pick())
    # One program for all tiles of windows of a tile of tokens.
    monkeypatch.setattr(block_scores, "SCORE_PROGRAMS", 1)
    tokens, sizes = 32768, (PAPER.kernel_size, PAPER.kernel_stride, PAPER.block_size)
    cu_seqlens = SequenceLayout.from_lengths([tokens], "cuda").cu_seqlens
    bounds = compress.launch_key_bounds(cu_seqlens, *sizes[:2])
    q = torch.randn(tokens, heads, 128, device="cuda").bfloat16()
    k = torch.randn(int(bounds[-1]), kv_heads, 128, device="cuda").bfloat16()
    lse = torch.full((tokens, heads), 9.0, device="cuda")
    found = []
    for _ in range(3):
        pick.seen.clear()
        with empty_is_nan():
            block_scores.launch_select_blocks(
                q, k, lse, cu_seqlens, bounds, tokens, *sizes, 16, 1, 2, 0.1, score_tiles(128, q.dtype)
            )
        found.append(pick.by_token([0, tokens]).nan_to_num(-1))
    assert hopper.launches >= 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
