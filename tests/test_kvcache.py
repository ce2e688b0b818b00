"""The whole attention of new tokens over a cache, against the whole attention of whole sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

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


def dense(filled: Filled, sequence: int, position: int, there: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Output `[Hq, Dv]` and blocks `[Hk, T]` of a token by dense attention to what stands in pages that are there."""
    config, own = filled.config, slice(*filled.layout.cu_seqlens[sequence : sequence + 2].tolist())
    stride, length = config.kernel_stride, own.stop - own.start
    before = filled.layout.compressed(config.kernel_size, stride).cu_seqlens[sequence : sequence + 2].tolist()
    q, gates = filled.q[own][position], filled.gates[own][position]
    heads_k = filled.heads[1]

    def attend(k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("kgd,skd->kgs", q.unflatten(0, (heads_k, -1)), k) * q.shape[-1] ** -0.5
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("kgs,skv->kgv", p, v).flatten(0, 1), p.sum(1)

    # Chunks of d tokens: a compressed token stands by the last one of its window.
    windows, chunks = torch.arange(before[1] - before[0])[:, None], torch.arange(-(-length // stride))
    newest = windows + config.kernel_size // stride - 1
    seen = (newest + 1) * stride <= position + 1
    kept = [x[slice(*before)] for x in (filled.k_compressed, filled.v_compressed)]
    compressed, p_KM = attend(*kept, (seen & there[newest * stride // page_size]).T)

    blocks = torch.arange(position // config.block_size + 1)
    in_window = ((chunks >= windows) & (chunks <= newest)).double()
    in_block = (chunks * stride // config.block_size == blocks[:, None]).double()
    forced = (blocks < config.num_init_blocks) | (blocks > blocks[-1] - config.num_local_blocks)
    ranking_KJ = (p_KM @ in_window @ in_block.T).masked_fill(forced, torch.inf)
    order = ranking_KJ.sort(dim=-1, descending=True, stable=True).indices[:, : config.num_selected_blocks]
    chosen = order.sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, config.num_selected_blocks - chosen.shape[-1]), value=-1)

    tokens = torch.arange(length)
    past = (tokens <= position) & there[tokens // page_size]
    named = (tokens // config.block_size == chosen[..., None]).any(1)
    selected, _ = attend(filled.k[own], filled.v[own], (past & named)[:, None])
    window, _ = attend(filled.k_window[own], filled.v_window[own], past & (tokens > position - config.window_size))
    return (torch.stack([compressed, selected, window], -1) * gates.sigmoid()[:, None]).sum(-1), chosen


@pytest.mark.parametrize("page_size", [16, 48])
@pytest.mark.parametrize("missing", [(), (2,), (0, 3), (1, -1), "all"], ids=str)
def test_tokens_of_pages_that_are_none_are_left_out(missing: tuple[int, ...] | str, page_size: int):
    filled, tokens = Filled((200, 7, 131), page_size=page_size), 3
    table = filled.pages.page_table.clone()
    there = torch.ones(3, table.shape[1], dtype=torch.bool)
    for b, length in enumerate(filled.layout.lengths):
        count = -(-length // page_size)
        for column in range(count) if missing == "all" else {x % count for x in missing}:
            there[b, column] = False
            # What is no page may be any number that names none.
            table[b, column] = (-1, 10**6, -(2**31))[b]
    broken = dataclasses.replace(filled.pages, page_table=table)
    got = nsa_attention_with_kvcache(*filled.last(tokens), broken, SMALL, impl="blockwise")
    for b, length in enumerate(filled.layout.lengths):
        for i in range(tokens):
            out, chosen = dense(filled, b, length - tokens + i, there[b], page_size)
            assert torch.equal(got.block_indices[b, i].long(), chosen)
            torch.testing.assert_close(got.out[b, i], out, rtol=1e-10, atol=1e-10)
    assert missing != "all" or got.out.eq(0).all()


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
