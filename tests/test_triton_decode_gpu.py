"""The attention of new tokens over a cache by Triton kernels on a GPU: pytest -m gpu."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import Interval, NSAConfig, SequenceLayout, nsa_attention_with_kvcache
from flash_sparse_attention.accuracy.budgets import Errors, compare, compare_selection
from flash_sparse_attention.impl import WITH_KVCACHE, reference, resolve
from flash_sparse_attention.types import NSAOutput
from graphs import recorded
from pages import Filled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PAPER, FLA = NSAConfig(), NSAConfig.preset("fla")
FINE = NSAConfig(kernel_size=16, kernel_stride=8, block_size=48, num_selected_blocks=12, window_size=77)
MANY = NSAConfig(kernel_size=32, kernel_stride=16, block_size=32, num_selected_blocks=256, window_size=700)


class Case(NamedTuple):
    """New tokens of sequences of these lengths, and what kernels treat apart."""

    lengths: tuple[int, ...]
    tokens: int
    heads: tuple[int, int]
    dims: tuple[int, int] = (128, 128)
    config: NSAConfig = PAPER
    page_size: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        sizes = f"{config.kernel_size}/{config.kernel_stride}/{config.block_size}/{config.num_selected_blocks}"
        heads, dims = "x".join(map(str, self.heads)), "x".join(map(str, self.dims))
        return f"{self.lengths}-{self.tokens}-heads{heads}-dims{dims}-{sizes}-pages{self.page_size}-{dtype}"


GRID = [
    Case((1500, 33, 1, 700), 1, (8, 2)),
    Case((1500, 65, 700), 1, (8, 2), page_size=64),
    Case((1500, 65, 700), 3, (8, 2), page_size=256, dtype=torch.float16),
    Case((1500, 16, 700), 16, (8, 2), page_size=1024),
    Case((1501, 16), 16, (32, 2), page_size=64),
    Case((1777,), 40, (4, 4)),
    Case((900, 40), 1, (5, 1), (80, 80), FINE, 96),
    Case((900, 2, 0), 3, (7, 1), (192, 128), FINE),
    Case((900, 40), 1, (12, 1), (96, 112), FLA, 64, torch.float16),
    Case((900, 40), 4, (16, 1), (64, 64), FLA),
    Case((900, 40), 1, (80, 1), (16, 48), PAPER, 192),
    Case((900, 40), 2, (4, 2), (256, 256)),
    Case((3000, 200), 1, (8, 2), (128, 128), MANY, 32),
    Case((900, 40), 2, (4, 2), dtype=torch.float32),
    Case((900, 40), 1, (2, 2), (256, 256), FINE, 48, torch.float32),
    # Long enough for several shares and tiles of everything.
    Case((131072, 70000), 1, (8, 2)),
    Case((131072,), 2, (4, 1), page_size=64),
]


def importances(q: Tensor, filled: Filled, layout: SequenceLayout) -> Tensor:
    """Of the blocks for queries `[N, Hq, Dk]`, in the dtype of q or wider, `[N, Hk, J]`."""
    config, scale = filled.config, q.shape[-1] ** -0.5
    k, v = (x.to(q.dtype) for x in (filled.k_compressed, filled.v_compressed))
    windows = Interval(config.kernel_size, config.kernel_stride)
    lse = reference.interval_attention(q, k, v, windows, layout, scale).lse
    sizes = config.kernel_size, config.kernel_stride, config.block_size
    return reference.block_importance(q, k, lse, *sizes, layout, scale)


def attended(q: Tensor, gates: Tensor, block_indices: Tensor, filled: Filled, layout: SequenceLayout) -> Tensor:
    """The output for queries and a selection, in the dtype of q."""
    names = "k", "v", "k_window", "v_window", "k_compressed", "v_compressed"
    k, v, k_window, v_window, *compressed = (getattr(filled, name).to(q.dtype) for name in names)
    config, rest = filled.config, (layout, q.shape[-1] ** -0.5)
    windows, recent = Interval(config.kernel_size, config.kernel_stride), Interval(window_size=config.window_size)
    outs = (
        reference.interval_attention(q, *compressed, windows, *rest).out,
        reference.selected_attention(q, k, v, block_indices, config.block_size, *rest).out,
        reference.interval_attention(q, k_window, v_window, recent, *rest).out,
    )
    return reference.combine(*outs, gates)


def errors(filled: Filled, tokens: int, got: NSAOutput) -> dict[str, Errors]:
    """Of the selection by importance, and of the output given the selection."""
    lengths = [min(tokens, length) for length in filled.layout.lengths]
    layout = SequenceLayout.from_lengths(lengths, "cuda").after(filled.layout)

    def flat(x: Tensor) -> Tensor:
        return torch.cat([own[tokens - asked :] for own, asked in zip(x, lengths, strict=True)])

    q, gates = map(flat, filled.last(tokens))
    out, block_indices = map(flat, got)
    plain, exact = (importances(x, filled, layout) for x in (q, q.double()))
    found = compare_selection(block_indices, plain, exact, filled.config, layout)
    plain, exact = (attended(x, gates, block_indices, filled, layout) for x in (q, q.double()))
    return {**found, "out": compare(out, plain, exact)}


@pytest.mark.parametrize("case", GRID, ids=str)
def test_within_the_budgets(case: Case):
    lengths, tokens, *rest = case
    filled = Filled(lengths, rest[2], rest[0], rest[1], *rest[3:], device="cuda")
    got = nsa_attention_with_kvcache(*filled.last(tokens), filled.pages, case.config, impl="triton")
    for b, length in enumerate(lengths):
        assert got.out[b, : max(0, tokens - length)].eq(0).all()
        assert got.block_indices[b, : max(0, tokens - length)].eq(-1).all()
    for name, error in errors(filled, tokens, got).items():
        assert error.max_error <= error.max_budget, (name, error)
        assert error.mean_error <= error.mean_budget, (name, error)


def small(tokens: int = 1, page_size: int = 64) -> tuple[Filled, Callable[[], NSAOutput]]:
    """A filled cache and a call over it, on tensors that stay where they are."""
    filled = Filled((1500, 700, 90), PAPER, (8, 2), (64, 64), page_size, torch.bfloat16, "cuda")
    q, gates = filled.last(tokens)
    return filled, lambda: nsa_attention_with_kvcache(q, gates, filled.pages, PAPER)


def test_auto_takes_the_kernels_and_is_bitwise_equal_from_run_to_run():
    assert resolve(WITH_KVCACHE, "auto", torch.device("cuda"), torch.bfloat16, 128, 1, 16).impl == "triton"
    _, run = small(tokens=3)
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_captured_graph_takes_other_lengths_and_pages(tokens: int):
    filled, run = small(tokens)
    lens, table = filled.pages.seq_lens, filled.pages.page_table
    graph, captured = recorded(run)
    pages = table.clone()
    for lengths in ((1499, 1, 64), (700, 0, 90), (2, 699, 89), (1500, 700, 90), (10**9, -5, 31)):
        lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        # Sequences change places, which makes the shorter ones' missing pages those of longer ones.
        table.copy_(pages if lengths[0] > lengths[1] else pages[[1, 0, 2]])
        graph.replay()
        got = [x.clone() for x in captured]
        # What a length claims beyond what was written is NaN.
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, run(), strict=True))
        if max(lengths) <= 1500 and min(lengths) >= 0:
            blockwise = nsa_attention_with_kvcache(*filled.last(tokens), filled.pages, PAPER, impl="blockwise")
            assert got[1].ge(0).sum() == blockwise.block_indices.ge(0).sum()
            if torch.equal(got[1], blockwise.block_indices):
                torch.testing.assert_close(got[0], blockwise.out, rtol=2**-6, atol=2**-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_no_host_synchronisation():
    for tokens in (1, 20):
        _, run = small(tokens)
        run()
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


def test_new_lengths_and_capacities_compile_nothing():
    from flash_sparse_attention.impl.triton import decode

    def specialisations() -> int:
        kernels = (
            decode._decode_scores_kernel,
            decode._decode_select_kernel,
            decode._decode_attend_kernel,
            decode._decode_merge_kernel,
        )
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    filled, run = small(page_size=1024)
    run()
    before = specialisations()
    for lengths in ((1, 1, 1), (1500, 16, 3), (0, 700, 17)):
        filled.pages.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        run()
    for page_size in (2048, 3072):
        _, run = small(page_size=page_size)
        run()
    assert specialisations() == before


def test_memory_that_nobody_wrote_is_not_read():
    """Page tables of nonsense, over pools that are NaN but for what the cache holds."""
    filled, run = small()
    table = filled.pages.page_table
    table[0, 5:9] = torch.tensor([-1, 10**9, -(2**31), len(filled.pages.k)], dtype=torch.int32, device="cuda")
    got = run()
    assert got.out.isfinite().all()
    expected = nsa_attention_with_kvcache(*filled.last(1), filled.pages, PAPER, impl="blockwise")
    assert got.block_indices.ge(0).sum() == expected.block_indices.ge(0).sum()
    if torch.equal(got.block_indices, expected.block_indices):
        torch.testing.assert_close(got.out, expected.out, rtol=2**-6, atol=2**-6)
    nothing = dataclasses.replace(filled.pages, page_table=torch.full_like(table, -1))
    assert nsa_attention_with_kvcache(*filled.last(1), nothing, PAPER).out.eq(0).all()
