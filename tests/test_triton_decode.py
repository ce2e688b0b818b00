"""The attention of new tokens over a cache by Triton kernels, in Triton's interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator

import pytest
import torch
from torch.library import opcheck

from flash_sparse_attention import KVPages, NSAConfig, nsa_attention_with_kvcache
from flash_sparse_attention.accuracy.budgets import compare
from pages import SMALL, Filled

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # -inf - -inf and log 0, as numpy sees them
]


@pytest.fixture(autouse=True)
def few_programs_and_small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each program takes the interpreter milliseconds; several shares and tiles of everything none the less."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    tuning = importlib.import_module("flash_sparse_attention.impl.triton.tuning")
    for constant, value in (
        ("DECODE_PROGRAMS", 24),
        ("LEAST_SHARE", 16),
        ("SELECT_CHUNKS", 16),
        ("SELECT_COLUMNS", 16),
    ):
        monkeypatch.setattr(tuning, constant, value)
    tuning._decode_tiles.cache_clear()
    yield
    tuning._decode_tiles.cache_clear()


def sizes(kernel_size: int, kernel_stride: int, block_size: int, **others: int) -> NSAConfig:
    return NSAConfig(kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, **others)


def check(filled: Filled, tokens: int, **options: float) -> None:
    """The selection is that of the reference, and the output is as exact as that in the same dtype, but for a factor.

    Random numbers leave gaps between importances that float32 does not close.
    """
    exact, chosen = filled.expected(tokens)
    plain, _ = filled.expected(tokens, filled.q.dtype)
    got = nsa_attention_with_kvcache(*filled.last(tokens), filled.pages, filled.config, impl="triton", **options)
    assert torch.equal(got.block_indices, chosen)
    errors = compare(got.out, plain, exact)
    assert errors.max_error <= errors.max_budget, errors
    assert errors.mean_error <= errors.mean_budget, errors


@pytest.mark.parametrize(
    ("tokens", "page_size", "lengths", "heads"),
    [
        (1, None, (1, 0, 200), (4, 2)),
        (1, 16, (7, 131, 33), (4, 2)),
        (1, 48, (8, 150), (4, 2)),
        (3, 128, (2, 140), (4, 2)),
        # Several tiles of rows; here one begins and ends inside of a group.
        (5, 64, (93,), (5, 1)),
        (16, 16, (9, 100), (1, 1)),
        (16, 48, (101,), (2, 1)),
    ],
)
def test_last_tokens(tokens: int, page_size: int | None, lengths: tuple[int, ...], heads: tuple[int, int]):
    check(Filled(lengths, heads=heads, page_size=page_size, dtype=torch.float32), tokens)


@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 1), (8, 1), (16, 1), (20, 1)], ids=str)
def test_groups(heads: tuple[int, int]):
    check(Filled((90,), heads=heads, dims=(8, 24), page_size=32, dtype=torch.float32), 1)


@pytest.mark.parametrize(
    ("config", "page_size"),
    [
        # Windows that begin in no other block, and no forced block at all.
        (sizes(16, 16, 16, num_selected_blocks=3, num_init_blocks=0, num_local_blocks=0, window_size=5), 32),
        # Sizes that are no powers of two; windows of three strides; everything selected.
        (sizes(12, 4, 24, num_selected_blocks=40, window_size=70), 72),
        # Blocks of several tiles of keys, and none that begins at a multiple of 64.
        (sizes(8, 8, 72, num_selected_blocks=3, window_size=1), None),
        # Blocks of one chunk, smaller than a tile.
        (sizes(8, 4, 4, num_selected_blocks=9, num_init_blocks=2, num_local_blocks=3, window_size=33), 8),
    ],
    ids=str,
)
def test_geometries(config: NSAConfig, page_size: int | None):
    check(Filled((220, 31), config, page_size=page_size, dtype=torch.float32), 1)


def test_float16():
    check(Filled((120, 77), dtype=torch.float16), 1)


def test_loud_queries():
    """Heads that look at one share of the keys only weigh as much as others."""
    filled = Filled((400,), heads=(8, 1), page_size=16, dtype=torch.float32)
    filled.q.mul_(20.0)
    check(filled, 1)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale: float):
    filled = Filled((60,), dtype=torch.float32)
    q, gates = filled.last(1)
    got, expected = (
        nsa_attention_with_kvcache(q, gates, filled.pages, SMALL, softmax_scale=scale, impl=impl)
        for impl in ("triton", "reference")
    )
    assert torch.equal(got.block_indices, expected.block_indices)
    torch.testing.assert_close(got.out, expected.out)


def test_many_tokens_are_worked_through_in_steps_and_one_gate_serves_all_heads(monkeypatch: pytest.MonkeyPatch):
    kvcache = importlib.import_module("flash_sparse_attention.impl.triton.ops.kvcache")
    monkeypatch.setattr(kvcache, "TOKENS_AT_ONCE", 2)
    filled = Filled((50, 2), heads=(2, 1), page_size=16, dtype=torch.float32)
    filled.gates = filled.gates[:, :1]
    check(filled, 5)


def test_ties_go_to_the_lower_block():
    # A window for each block, of three kinds whose products are exact, so that importances are equal to the last bit.
    for slots in (4, 7, 11):
        blocks = {"num_selected_blocks": slots, "num_init_blocks": 0, "num_local_blocks": 1, "window_size": 3}
        filled = Filled((290,), sizes(16, 16, 16, **blocks), heads=(1, 1), page_size=32, dtype=torch.float32)
        kinds = 4 * torch.eye(3, 16)
        for x in (filled.k_compressed, filled.pages.k_compressed):
            kind = x[..., 0].nan_to_num().mul(8).floor().long() % 3
            x.copy_(kinds[kind.flatten()].view_as(x).where(x.isfinite(), x))
        check(filled, 1)


def test_pages_that_are_none_and_any_length():
    filled = Filled((200, 60), heads=(2, 2), page_size=16, dtype=torch.float32)
    q, gates = filled.last(1)
    table = filled.pages.page_table.clone()
    table[0, 3], table[0, 4], table[1, 3] = -1, 2**31 - 1, -(2**31)
    broken = dataclasses.replace(filled.pages, page_table=table)
    got, expected = (nsa_attention_with_kvcache(q, gates, broken, SMALL, impl=impl) for impl in ("triton", "blockwise"))
    assert torch.equal(got.block_indices, expected.block_indices)
    torch.testing.assert_close(got.out, expected.out, rtol=1e-4, atol=1e-5)
    # Longer than the pages, and less than nothing.
    lens = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    got = nsa_attention_with_kvcache(q, gates, dataclasses.replace(broken, seq_lens=lens), SMALL, impl="triton")
    assert got.out[1].eq(0).all()
    assert got.block_indices[1].eq(-1).all()
    assert got.block_indices[0].lt(table.shape[1]).all()


def test_no_page_at_all():
    filled = Filled((200,), page_size=16, dtype=torch.float32)
    nothing = dataclasses.replace(filled.pages, page_table=torch.full_like(filled.pages.page_table, -1))
    got = nsa_attention_with_kvcache(*filled.last(1), nothing, SMALL, impl="triton")
    assert got.out.eq(0).all()
    assert got.block_indices.ge(0).all()


def strided(pages: KVPages) -> KVPages:
    """The same in pools whose pages and tokens lie apart, each in its own way, and a page table that is a view."""
    changed = {}
    for extra, name in enumerate(("k", "v", "k_window", "v_window", "k_compressed", "v_compressed"), 1):
        pool = getattr(pages, name)
        (count, rows, heads, dim) = pool.shape
        larger = torch.full((count, rows + extra, heads + extra, dim), torch.nan, dtype=pool.dtype)
        changed[name] = larger[:, :rows, extra:]
        changed[name].copy_(pool)
    wider = torch.full((len(pages.page_table), pages.page_table.shape[1] + 3), -7, dtype=torch.int32)
    wider[:, 2:-1] = pages.page_table
    return dataclasses.replace(pages, page_table=wider[:, 2:-1], **changed)


def test_views_of_larger_pools():
    for page_size in (32, 128):
        filled = Filled((100, 41), heads=(2, 2), page_size=page_size, dtype=torch.float32)
        filled.pages = strided(filled.pages)
        check(filled, 1)


def test_pools_that_would_have_to_be_copied():
    filled = Filled((40,), dtype=torch.float32)
    q, gates = filled.last(1)
    apart = filled.pages.k.transpose(1, 2).contiguous().transpose(1, 2)
    for name, pool in (("k", apart), ("v_window", filled.pages.v.mT.contiguous().mT)):
        broken = dataclasses.replace(filled.pages, **{name: pool})
        with pytest.raises(ValueError, match=rf"pages\.{name} must be of adjacent heads"):
            nsa_attention_with_kvcache(q, gates, broken, SMALL, impl="triton")


def test_what_it_does_not_take():
    filled = Filled((40,), sizes(32, 8, 16, num_selected_blocks=4, window_size=9), dtype=torch.float32)
    with pytest.raises(ValueError, match="compression windows of at most block_size"):
        nsa_attention_with_kvcache(*filled.last(1), filled.pages, filled.config, impl="triton")


def test_operator_contract():
    from flash_sparse_attention.impl.triton.ops.kvcache import POOLS, _with_kvcache

    filled = Filled((20,), heads=(1, 1), dtype=torch.float32)
    pools = (getattr(filled.pages, name) for name in POOLS)
    opcheck(
        _with_kvcache,
        (*filled.last(1), *pools, filled.pages.page_table, filled.pages.seq_lens, 8, 4, 16, 5, 1, 2, 21, 0.25),
    )
