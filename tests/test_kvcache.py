"""The whole attention of new tokens over a cache, against the whole attention of whole sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flash_sparse_attention import KVPages, NSAConfig, nsa_attention_with_kvcache
from pages import SMALL, Filled

LENGTHS = (1, 0, 7, 8, 16, 33, 200, 131)
IMPLS = ("reference", "blockwise")


def check(filled: Filled, tokens: int, impl: str) -> None:
    expected, chosen = filled.expected(tokens)
    q, gates = filled.last(tokens)
    # Queries that stand nowhere may hold anything.
    got = nsa_attention_with_kvcache(q, gates, filled.pages, filled.config, impl=impl)
    assert torch.equal(got.block_indices, chosen)
    torch.testing.assert_close(got.out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_last_tokens(tokens: int, page_size: int | None, impl: str):
    check(Filled(LENGTHS, page_size=page_size), tokens, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (5, 1), (8, 1), (16, 1)], ids=str)
def test_groups(heads: tuple[int, int], impl: str):
    check(Filled((90, 40), heads=heads, dims=(8, 12), page_size=32), 2, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "config",
    [
        NSAConfig(kernel_size=16, kernel_stride=16, block_size=16, num_selected_blocks=3, window_size=5),
        NSAConfig(kernel_size=32, kernel_stride=8, block_size=16, num_selected_blocks=4, num_local_blocks=0),
        NSAConfig(kernel_size=4, kernel_stride=4, block_size=32, num_selected_blocks=9, num_init_blocks=0),
    ],
    ids=str,
)
def test_geometries(config: NSAConfig, impl: str):
    check(Filled((150, 31, 64), config, page_size=64), 2, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_tokens_at_once(impl: str):
    check(Filled((70, 90)), 90, impl)


def test_many_tokens_are_worked_through_in_steps(monkeypatch: pytest.MonkeyPatch):
    from flash_sparse_attention.impl.blockwise import kvcache

    monkeypatch.setattr(kvcache, "SCORE_TILE", 2000)
    check(Filled((70, 90), page_size=16), 30, "blockwise")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_gate_for_all_heads(impl: str):
    filled = Filled((50,))
    filled.gates = filled.gates[:, :1]
    check(filled, 2, impl)


def test_pages_that_are_none_are_not_attended_to():
    filled = Filled((200,), page_size=16)
    q, gates = filled.last(1)
    table = filled.pages.page_table.clone()
    table[0, 3], table[0, 4] = -1, 10**6
    broken = dataclasses.replace(filled.pages, page_table=table)
    got = nsa_attention_with_kvcache(q, gates, broken, SMALL, impl="blockwise").out
    assert got.isfinite().all()
    assert not torch.equal(got, nsa_attention_with_kvcache(q, gates, filled.pages, SMALL, impl="blockwise").out)


def test_half_precision_is_computed_in_float32():
    filled = Filled((120, 77), dtype=torch.bfloat16)
    q, gates = filled.last(2)
    expected, _ = filled.expected(2)
    got = nsa_attention_with_kvcache(q, gates, filled.pages, SMALL, impl="blockwise").out
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0.03, atol=0.03)


BAD: dict[str, tuple[str, Any]] = {
    "page_table": ("pages.page_table must be int32 .*got int64", lambda p: p.page_table.long()),
    "seq_lens": (r"pages.seq_lens must be int32 \[B=2\], got \[1\]", lambda p: p.seq_lens[:1]),
    "k": ("pages.k must be of pages of a multiple of block_size=16 tokens, got 120", lambda p: p.k[:, :120]),
    "k_compressed": (r"pages.k_compressed must be .*rows=\d+, Hk=2, D=16", lambda p: p.k_compressed[:, 1:]),
    "v_window": ("pages.v_window must be of the same dtype as pages.k", lambda p: p.v_window.float()),
}


@pytest.mark.parametrize("name", BAD)
def test_caches_that_do_not_fit(name: str):
    filled = Filled((120, 77))
    q, gates = filled.last(1)
    message, change = BAD[name]
    broken: KVPages = dataclasses.replace(filled.pages, **{name: change(filled.pages)})
    with pytest.raises(ValueError, match=message):
        nsa_attention_with_kvcache(q, gates, broken, SMALL)


def test_queries_that_do_not_fit():
    filled = Filled((120, 77))
    q, gates = filled.last(1)
    with pytest.raises(ValueError, match="q must be of the B=2 sequences of the cache"):
        nsa_attention_with_kvcache(q[:1], gates[:1], filled.pages, SMALL)
    with pytest.raises(ValueError, match=r"q must be of the same dtype as pages\.k"):
        nsa_attention_with_kvcache(q.float(), gates, filled.pages, SMALL)
    with pytest.raises(ValueError, match="q must be of the head dimension of the cache, Dk=16"):
        nsa_attention_with_kvcache(q[..., :8], gates, filled.pages, SMALL)
    with pytest.raises(ValueError, match="gates must be"):
        nsa_attention_with_kvcache(q, gates[:, :, :2], filled.pages, SMALL)
    with pytest.raises(ValueError, match="pages must be a KVPages, got tuple"):
        nsa_attention_with_kvcache(q, gates, (1, 2), SMALL)
