"""`NSACache`: any way of reading a text in pieces gives what reading it at once gives."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sparse_attention import NSAConfig, SequenceLayout
from flash_sparse_attention.cache import NSACache
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig, NativeSparseAttention

SIZES: dict[str, Any] = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "num_selected_blocks": 4,
    "num_local_blocks": 1,
    "window_size": 21,
}
CONFIGS = {
    "paper": NSAConfig.preset("paper", **SIZES),
    "fsa": NSAConfig.preset("fsa", **SIZES),
    "fla": NSAConfig.preset("fla", **{**SIZES, "kernel_size": 16, "kernel_stride": 16}),
    "weighted": NSAConfig(**SIZES, compression="weighted", branch_kv="shared", position_embedding="k"),
    "mean, independent": NSAConfig(**SIZES, compression="mean", position_embedding="none"),
    "before, independent": NSAConfig(**SIZES, compression="linear", rope="before"),
}
HIDDEN = 24
# Lengths from none to more than the first page, and pieces that end inside a window, at a block, behind it.
LENGTHS = (130, 1, 0, 33, 64)


def layer_of(config: NSAConfig, heads: tuple[int, int] = (4, 2), **options: Any) -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(HIDDEN, *heads, config, head_dim=8, head_dim_v=6, dtype=torch.float64, **options)
    # Gates that are all alike would hide a mixed-up branch.
    torch.nn.init.normal_(layer.branch_gate_proj.weight)
    return layer


def pieces_of(lengths: tuple[int, ...], sizes: list[int]) -> list[list[tuple[int, int]]]:
    """Each sequence cut into pieces of these sizes, the last size repeated, as (begin, end)."""
    steps, done = [], [0] * len(lengths)
    for number in range(10**6):
        size = sizes[min(number, len(sizes) - 1)]
        ends = [min(length, at + size) for length, at in zip(lengths, done, strict=True)]
        steps.append(list(zip(done, ends, strict=True)))
        done = ends
        if tuple(done) == lengths:
            break
    return steps


def read(
    layer: NativeSparseAttention, x: Tensor, lengths: tuple[int, ...], sizes: list[int], cache: NSACache
) -> Tensor:
    """The output of all tokens of packed sequences, read in pieces."""
    own, outs = x.split(lengths), [[] for _ in lengths]
    for step in pieces_of(lengths, sizes):
        layout = SequenceLayout.from_lengths([end - begin for begin, end in step])
        piece = torch.cat([tokens[begin:end] for tokens, (begin, end) in zip(own, step, strict=True)])
        with cache.extend(layout):
            got = layer(piece, layout, cache=cache.layers[0])
        for out, part in zip(outs, got.split(layout.lengths), strict=True):
            out.append(part)
    return torch.cat([torch.cat(out) for out in outs])


def check(layer: NativeSparseAttention, lengths: tuple[int, ...], sizes: list[int], cache: NSACache) -> None:
    x = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x, SequenceLayout.from_lengths(lengths))
    torch.testing.assert_close(read(layer, x, lengths, sizes, cache), expected, rtol=1e-10, atol=1e-10)
    assert cache.lengths == lengths
    assert cache.seq_lens.tolist() == list(lengths)


@pytest.mark.parametrize("sizes", [[200], [1], [40, 1], [7, 3], [17, 30], [50, 20, 1]], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_any_split_gives_the_same(name: str, sizes: list[int]):
    layer = layer_of(CONFIGS[name])
    check(layer, LENGTHS, sizes, layer.new_cache(len(LENGTHS), 130))


@pytest.mark.parametrize("rope_theta", [None, 500.0])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (5, 1), (8, 1), (16, 1), (10, 2)], ids=str)
def test_groups(heads: tuple[int, int], rope_theta: float | None):
    layer = layer_of(CONFIGS["paper"], heads, rope_theta=rope_theta)
    check(layer, (70, 40), [33, 1, 5], layer.new_cache(2, 128))


@pytest.mark.parametrize("preset", ["paper", "fla"])
def test_thousands_of_tokens(preset: str):
    # The sizes that people use; a prompt, tokens one by one across the bounds of blocks and windows, long pieces.
    layer = layer_of(NSAConfig.preset(preset))
    lengths = (2305, 1, 70, 2113)
    cache = layer.new_cache(4, 3072, page_size=1024, num_pages=7)
    table = [[6, 0, 5], [1, -1, -1], [2, -1, -1], [3, 4, -1]]
    cache.set_pages(torch.tensor(table, dtype=torch.int32))
    with pytest.raises(ValueError, match="sequence 3 must be of 3 pages, got 2 pages for 2113 tokens"):
        check(layer, lengths, [2113], cache)
    assert cache.lengths == (0, 0, 0, 0)
    check(layer, (2305, 1, 70, 2048), [2017, *[1] * 40, 5, 16, 130, 97], cache)


@pytest.mark.parametrize("max_crop", [0, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_that_grows(name: str, max_crop: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flash_sparse_attention.cache.nsa_cache.FIRST_CAPACITY", 16)
    layer = layer_of(CONFIGS[name])
    cache = layer.new_cache(2, max_crop=max_crop)
    assert cache.capacity == 16
    check(layer, (150, 30), [10, 1, 20, 3], cache)


def paged(layer: NativeSparseAttention, page_size: int, **options: Any) -> NSACache:
    cache = layer.new_cache(len(LENGTHS), 160, page_size=page_size, num_pages=40, **options)
    order, used, table = torch.randperm(40).tolist(), 0, torch.full((len(LENGTHS), 160 // page_size), -1)
    for b, length in enumerate(LENGTHS):
        count = -(-length // page_size)
        table[b, :count] = torch.tensor(order[used : used + count])
        used += count
    cache.set_pages(table.to(torch.int32))
    return cache


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("name", CONFIGS)
def test_pages(name: str, page_size: int):
    layer = layer_of(CONFIGS[name])
    check(layer, LENGTHS, [29, 1, 3, 18], paged(layer, page_size))


def test_pools_of_an_engine():
    layer = layer_of(CONFIGS["fsa"])
    # FlashInfer's layout: keys and values of a page together, so their pages are not adjacent.
    pool = torch.full((40, 2, 16, 2, 8), torch.nan, dtype=torch.float64)
    pools = [(pool[:, 0], pool[:, 1, :, :, :6].clone())]
    cache = paged(layer, 16, pools=pools)
    check(layer, LENGTHS, [29, 1], cache)
    assert not pool[:, 0].isnan().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_prefix_is_read_once(name: str):
    layer = layer_of(CONFIGS[name])
    x = torch.randn(2, 80, HIDDEN, dtype=torch.float64)
    x[1, :32] = x[0, :32]
    cache = layer.new_cache(2, 80, page_size=16, num_pages=10)
    none = -1
    cache.set_pages(torch.tensor([[3, 1, 4, 0, 5], [none] * 5], dtype=torch.int32))
    first = SequenceLayout.from_lengths([50, 0])
    with cache.extend(first):
        layer(x[0, :50], first, cache=cache.layers[0])
    cache.set_pages(torch.tensor([[3, 1, 4, 0, 5], [3, 1, 2, 6, 7]], dtype=torch.int32), [50, 32])
    rest = SequenceLayout.from_lengths([30, 48])
    with cache.extend(rest):
        got = layer(torch.cat([x[0, 50:], x[1, 32:]]), rest, cache=cache.layers[0])
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(got, torch.cat([expected[0, 50:], expected[1, 32:]]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_crop_takes_tokens_back(name: str):
    layer = layer_of(CONFIGS[name])
    x = torch.randn(2, 120, HIDDEN, dtype=torch.float64)
    cache = layer.new_cache(2, 120, max_crop=30)
    wrong = torch.randn(2, 25, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)

    def append(piece: Tensor) -> Tensor:
        with cache.extend(SequenceLayout.uniform(2, piece.shape[1])):
            return layer(piece, cache=cache.layers[0])

    append(x[:, :61])
    for at, proposed in ((61, 25), (64, 3), (70, 16)):
        if at > cache.lengths[0]:
            append(x[:, cache.lengths[0] : at])
        append(wrong[:, :proposed])
        cache.crop(at)
        assert cache.lengths == (at, at)
        torch.testing.assert_close(append(x[:, at : at + 2]), expected[:, at : at + 2], rtol=1e-10, atol=1e-10)
    cache.crop([72, 0])
    assert cache.seq_lens.tolist() == [72, 0]
    layout = SequenceLayout.from_lengths([48, 120])
    with cache.extend(layout):
        got = layer(torch.cat([x[0, 72:], x[1]]), layout, cache=cache.layers[0])
    torch.testing.assert_close(got, torch.cat([expected[0, 72:], expected[1]]), rtol=1e-10, atol=1e-10)


def test_crop_beyond_the_tail():
    layer = layer_of(CONFIGS["fsa"])
    cache = layer.new_cache(1, 300, max_crop=10)
    with cache.extend(SequenceLayout.uniform(1, 200)):
        layer(torch.randn(1, 200, HIDDEN, dtype=torch.float64), cache=cache.layers[0])
    with pytest.raises(ValueError, match=r"lengths\[0\] must be 0, or a length that the tail reaches back to, got 100"):
        cache.crop(100)
    assert cache.lengths == (200,)
    cache.crop(190)
    # What the tail lost when there were 200 tokens is still lost, whatever is appended.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lengths\[0\] must be 0, or a length that the tail .*, got 185"):
            cache.crop(185)
        with cache.extend(SequenceLayout.uniform(1, 1)):
            layer(torch.randn(1, 1, HIDDEN, dtype=torch.float64), cache=cache.layers[0])
    cache.crop(0)
    whole = layer_of(CONFIGS["fla"]).new_cache(1, 300, max_crop=0)
    assert not whole.layers[0].has_tail


def test_reorder():
    layer = layer_of(CONFIGS["paper"])
    x = torch.randn(3, 60, HIDDEN, dtype=torch.float64)
    cache = layer.new_cache(3, 64)
    layout = SequenceLayout.from_lengths([40, 30, 50])
    with cache.extend(layout):
        layer(torch.cat([x[0, :40], x[1, :30], x[2, :50]]), layout, cache=cache.layers[0])
    cache.reorder(torch.tensor([2, 0, 2]))
    assert cache.lengths == (50, 40, 50)
    with cache.extend(SequenceLayout.uniform(3, 3)):
        got = layer(torch.stack([x[2, 50:53], x[0, 40:43], x[2, 50:53]]), cache=cache.layers[0])
    with torch.no_grad():
        expected = layer(x)
    expected = torch.stack([expected[2, 50:53], expected[0, 40:43], expected[2, 50:53]])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("capacity", [60, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_select(name: str, capacity: int | None, monkeypatch: pytest.MonkeyPatch):
    """Fewer sequences, more of them, and as many; then one token, some taken back, and more than there was room for."""
    monkeypatch.setattr("flash_sparse_attention.cache.nsa_cache.FIRST_CAPACITY", 48)
    layer = layer_of(CONFIGS[name])
    x = torch.randn(3, 60, HIDDEN, dtype=torch.float64)
    cache = layer.new_cache(3, capacity, max_crop=4)
    with torch.no_grad():
        expected = layer(x)
    layout = SequenceLayout.from_lengths([40, 30, 45])
    with cache.extend(layout):
        begins = [row[:length] for row, length in zip(x, layout.lengths, strict=True)]
        layer(torch.cat(begins), layout, cache=cache.layers[0])
    held, lengths = [0, 1, 2], list(layout.lengths)

    def go_on(tokens: int) -> None:
        nonlocal lengths
        piece = torch.stack([x[row, length : length + tokens] for row, length in zip(held, lengths, strict=True)])
        wanted = [expected[row, length : length + tokens] for row, length in zip(held, lengths, strict=True)]
        with cache.extend(SequenceLayout.uniform(len(held), tokens)):
            got = layer(piece, cache=cache.layers[0])
        torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-10, atol=1e-10)
        lengths = [length + tokens for length in lengths]

    for order in ([2, 0], [1, 0, 1, 1], [3, 1, 1, 0]):
        cache.select(torch.tensor(order))
        held, lengths = [held[x] for x in order], [lengths[x] for x in order]
        assert cache.batch == len(order)
        assert cache.lengths == tuple(lengths)
        assert cache.seq_lens.tolist() == lengths
        go_on(1)
        cache.crop([length - 2 for length in lengths])
        lengths = [length - 2 for length in lengths]
        go_on(3)
    cache.select([held.index(0)])
    held, lengths = [0], [lengths[held.index(0)]]
    go_on(60 - lengths[0])
    # What the tail has lost stays lost.
    if cache.layers[0].has_tail:
        with pytest.raises(
            ValueError, match=r"lengths\[0\] must be 0, or a length that the tail reaches back to, got 30"
        ):
            cache.crop(30)


def test_select_refuses():
    layer = layer_of(CONFIGS["fsa"])
    cache = layer.new_cache(2, 64)
    for order in ([], [2], [-1, 0, 0]):
        with pytest.raises(ValueError, match="order must be numbers of sequences from 0 to 1"):
            cache.select(order)
    assert cache.batch == 2
    with cache.extend(SequenceLayout.uniform(2, 1)):
        with pytest.raises(ValueError, match="extend must be left before the cache is changed"):
            cache.select([0])
        layer(torch.zeros(2, 1, HIDDEN, dtype=torch.float64), cache=cache.layers[0])
    with pytest.raises(ValueError, match="cache must be dense to be selected from, got paged"):
        layer.new_cache(2, 64, page_size=16, num_pages=8).select([0])


def test_a_failure_leaves_the_cache_as_it_was():
    model = LanguageModel(LanguageModelConfig(num_layers=2, nsa=CONFIGS["fsa"]), dtype=torch.float64)
    tokens = torch.randint(256, (2, 70))
    cache = model.new_cache(2, 70)
    model(tokens[:, :50], cache=cache)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens[:, 50:60], cache=cache)
    handle.remove()
    assert cache.lengths == (50, 50)
    assert cache.seq_lens.tolist() == [50, 50]
    torch.testing.assert_close(model(tokens[:, 50:], cache=cache), model(tokens)[:, 50:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["paper", "fsa", "fla"])
def test_a_step_that_failed_half_way(name: str):
    layer = layer_of(CONFIGS[name])
    x = torch.randn(1, 400, HIDDEN, dtype=torch.float64)
    cache = layer.new_cache(1, 400, max_crop=20)

    def append(piece: Tensor, fail: bool = False) -> Tensor:
        with cache.extend(SequenceLayout.uniform(1, piece.shape[1])):
            out = layer(piece, cache=cache.layers[0])
            if fail:
                raise RuntimeError("out of memory")
            return out

    with torch.no_grad():
        expected = layer(x)
    append(x[:, :101])
    with pytest.raises(RuntimeError, match="out of memory"):
        append(torch.randn(1, 15, HIDDEN, dtype=torch.float64), fail=True)
    torch.testing.assert_close(append(x[:, 101:120]), expected[:, 101:120], rtol=1e-10, atol=1e-10)
    with pytest.raises(RuntimeError, match="out of memory"):
        append(torch.randn(1, 150, HIDDEN, dtype=torch.float64), fail=True)
    assert cache.seq_lens.tolist() == list(cache.lengths) == [120]
    if cache.layers[0].has_tail:
        with pytest.raises(ValueError, match="sequence 0 must be whole, got without what its next window needs: crop"):
            append(x[:, 120:121])
        cache.crop(0)
        append(x[:, :120])
    torch.testing.assert_close(append(x[:, 120:]), expected[:, 120:], rtol=1e-10, atol=1e-10)


def test_a_failure_before_anything_is_written(monkeypatch: pytest.MonkeyPatch):
    layer = layer_of(CONFIGS["paper"])
    cache = layer.new_cache(2, 60)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(NSACache, "_windows_of", fail)
        with pytest.raises(RuntimeError), cache.extend(SequenceLayout.uniform(2, 20)):
            pass
    assert cache.seq_lens.tolist() == [0, 0]
    check(layer, (40, 33), [20, 1], cache)


def test_a_growth_that_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flash_sparse_attention.cache.nsa_cache.FIRST_CAPACITY", 16)
    layer = layer_of(CONFIGS["paper"])
    cache = layer.new_cache(1, num_layers=2, max_crop=0)
    grown = type(cache.layers[1]).grown

    def fail(self: Any, size: int) -> Any:
        if self.index == 1 and size > 100:
            raise RuntimeError("out of memory")
        return grown(self, size)

    monkeypatch.setattr(type(cache.layers[1]), "grown", fail)
    with pytest.raises(RuntimeError), cache.extend(SequenceLayout.uniform(1, 200)):
        pass
    check(layer, (45,), [20, 25], cache)


def test_pages_change_hands():
    layer = layer_of(CONFIGS["fsa"])
    x = torch.randn(2, 150, HIDDEN, dtype=torch.float64)
    cache = layer.new_cache(2, 160, page_size=32, num_pages=10, max_crop=0)
    table = torch.arange(10, dtype=torch.int32).view(2, 5)
    cache.set_pages(table)
    with torch.no_grad():
        expected = layer(x)
    layout = SequenceLayout.from_lengths([110, 121])
    with cache.extend(layout):
        layer(torch.cat([x[0, :110], x[1, :121]]), layout, cache=cache.layers[0])
    with pytest.raises(ValueError, match="lengths must be such that the tails of the pages reach back so far, got 100"):
        cache.set_pages(table, [100, 121])
    with pytest.raises(ValueError, match="lengths must be such that the tails of the pages"):
        cache.set_pages(table.flip(0), [110, 110])
    assert cache.lengths == (110, 121)
    # A full page is a place to go on from; other pages are written anew.
    cache.set_pages(table.flip(0), [121, 96])
    rest = SequenceLayout.from_lengths([29, 54])
    with cache.extend(rest):
        got = layer(torch.cat([x[1, 121:], x[0, 96:]]), rest, cache=cache.layers[0])
    torch.testing.assert_close(got, torch.cat([expected[1, 121:], expected[0, 96:]]), rtol=1e-10, atol=1e-10)


def test_a_sequence_that_rests_blocks_no_other():
    layer = layer_of(CONFIGS["fsa"])
    cache = layer.new_cache(2, 64, page_size=16, num_pages=6)
    cache.set_pages(torch.tensor([[0, 1, 2, -1], [-1] * 4], dtype=torch.int32))
    with cache.extend(SequenceLayout.from_lengths([32, 0])):
        layer(tokens(1, 32)[0], SequenceLayout.from_lengths([32, 0]), cache=cache.layers[0])
    cache.set_pages(torch.tensor([[0, 1, 2, -1], [0, 1, 3, -1]], dtype=torch.int32), [32, 32])
    cache.crop([0, 32])
    layout = SequenceLayout.from_lengths([0, 8])
    with cache.extend(layout):
        layer(tokens(1, 8)[0], layout, cache=cache.layers[0])
    with (
        pytest.raises(ValueError, match="page 0 in sequences"),
        cache.extend(SequenceLayout.from_lengths([1, 0])),
    ):
        pass


def test_nothing_else_happens_within_a_step(layer: NativeSparseAttention):
    cache = layer.new_cache(2, 50)
    step = SequenceLayout.uniform(2, 1)
    for change in (lambda: cache.crop(0), lambda: cache.reorder([0, 1]), cache.replayed):
        with (
            pytest.raises(ValueError, match="extend must be left before the cache is changed"),
            cache.extend(step),
        ):
            change()
    with (
        pytest.raises(ValueError, match="layout must be of the new tokens alone"),
        cache.extend(step.after(SequenceLayout.uniform(2, 5))),
    ):
        pass
    assert cache.lengths == (0, 0)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize("page_size", [None, 32])
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_read_that_was_not_written(name: str, page_size: int | None, impl: str):
    layer = layer_of(CONFIGS[name], impl=impl)
    x, outs = torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64), []
    for fill in (0.0, torch.nan):
        cache = layer.new_cache(len(LENGTHS), 160) if page_size is None else paged(layer, page_size)
        for pool in cache.layers[0].pools():
            pool.fill_(fill)
        outs.append(read(layer, x, LENGTHS, [29, 1, 3, 18], cache))
    assert torch.equal(*outs)


class Course:
    """A cache, and what each of its sequences should hold; every step is compared with reading all at once.

    Attributes:
        texts: hidden states of the tokens of each sequence.
        longest: tokens that each sequence had at the most since it was empty.
        shared: tokens of each sequence in pages that may be another one's too.
    """

    BATCH, CAPACITY, PAGE = 3, 112, 32

    def __init__(self, layer: NativeSparseAttention, kind: str, max_crop: int | None, draw: random.Random) -> None:
        self.layer, self.draw, self.paged = layer, draw, kind == "paged"
        self.max_crop = 10**9 if max_crop is None else max_crop
        pages = {"page_size": self.PAGE, "num_pages": 24} if self.paged else {}
        capacity = None if kind == "growing" else self.CAPACITY
        self.cache = layer.new_cache(self.BATCH, capacity, max_crop=max_crop, **pages)
        for pool in self.cache.layers[0].pools():
            pool.fill_(torch.nan)
        self.texts = [torch.zeros(0, HIDDEN, dtype=torch.float64)] * self.BATCH
        self.longest, self.shared = [0] * self.BATCH, [0] * self.BATCH
        self.rows = torch.arange(12).view(self.BATCH, 4).tolist()
        if self.paged:
            self.cache.set_pages(torch.tensor(self.rows, dtype=torch.int32))

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    def beyond_the_tail(self, lengths: list[int]) -> list[int]:
        """Sequences that may have lost what they need to go on at these lengths."""
        return [b for b, length in enumerate(lengths) if length and self.longest[b] - length > self.max_crop]

    def append(self, counts: list[int], fail: bool = False) -> None:
        counts = [min(count, self.CAPACITY - length) for count, length in zip(counts, self.lengths, strict=True)]
        layout = SequenceLayout.from_lengths(counts)
        new = torch.randn(layout.total_tokens, HIDDEN, dtype=torch.float64)
        longer = [torch.cat(pair) for pair in zip(self.texts, new.split(counts), strict=True)]
        try:
            with self.cache.extend(layout):
                got = self.layer(new, layout, cache=self.cache.layers[0])
                if fail:
                    raise RuntimeError
        except RuntimeError:
            self.longest = [max(pair) for pair in zip(self.longest, map(len, longer), strict=True)]
            return
        except ValueError as error:
            self.lose("whole, got without what its next window needs", error)
            return
        self.texts = longer
        self.longest = [max(pair) for pair in zip(self.longest, self.lengths, strict=True)]
        with torch.no_grad():
            whole = self.layer(torch.cat(longer), SequenceLayout.from_lengths(self.lengths)).split(self.lengths)
        expected = [out[len(out) - count :] for out, count in zip(whole, counts, strict=True)]
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-10, atol=1e-10)

    def piece(self) -> None:
        self.append([self.draw.choice((0, self.draw.randint(1, 50))) for _ in self.texts])

    def step(self) -> None:
        self.append([self.draw.randint(1, 5)] * self.BATCH)

    def fail(self) -> None:
        self.append([self.draw.choice((0, 1, 7, 40)) for _ in self.texts], fail=True)

    def crop(self) -> None:
        lowest = [min(length, max(1, shared)) for length, shared in zip(self.lengths, self.shared, strict=True)]
        to = [max(low, length - self.draw.randint(0, 20)) for low, length in zip(lowest, self.lengths, strict=True)]
        try:
            self.cache.crop(to)
        except ValueError:
            assert self.beyond_the_tail(to)
        else:
            self.texts = [text[:length] for text, length in zip(self.texts, to, strict=True)]

    def lose(self, expected: str, error: ValueError) -> None:
        """Empties what a failed step has left without its tail, and nothing else may be refused for that."""
        if expected not in str(error):
            raise error
        self.empty(self.beyond_the_tail(self.lengths))

    def crop_to_nothing(self) -> None:
        self.empty([self.draw.randrange(self.BATCH)])

    def empty(self, sequences: list[int]) -> None:
        assert sequences
        self.cache.crop([0 if b in sequences else length for b, length in enumerate(self.lengths)])
        for b in sequences:
            self.texts[b], self.longest[b], self.shared[b] = self.texts[b][:0], 0, 0
            # Others may go on with its pages.
            self.rows[b] = self.unused_pages()
        if self.paged:
            self.set_pages()

    def reorder(self) -> None:
        """Any order of a dense cache; with pages, sequences change places, or one goes on from pages of another."""
        order = self.draw.choices(range(self.BATCH), k=self.BATCH)
        if self.paged:
            # Pages of a sequence that has lost its tail are not taken; it is emptied while it is known by its number.
            self.set_pages()
            order = self.draw.sample(range(self.BATCH), self.BATCH)
        else:
            self.cache.reorder(order)
        self.texts, self.longest, self.shared, self.rows = (
            [x[b] for b in order] for x in (self.texts, self.longest, self.shared, self.rows)
        )
        if self.paged:
            full = self.lengths[0] // self.PAGE
            self.rows[1] = [*self.rows[0][:full], *self.unused_pages()[full:]]
            self.texts[1], self.longest[1] = self.texts[0][: full * self.PAGE], full * self.PAGE
            self.shared[0] = self.shared[1] = full * self.PAGE
            self.set_pages()

    def unused_pages(self) -> list[int]:
        return self.draw.sample([page for page in range(24) if not any(page in row for row in self.rows)], 4)

    def set_pages(self) -> None:
        try:
            self.cache.set_pages(torch.tensor(self.rows, dtype=torch.int32), self.lengths)
        except ValueError as error:
            self.lose("such that the tails of the pages reach back so far", error)


@pytest.mark.parametrize("max_crop", [0, 12, None])
@pytest.mark.parametrize("kind", ["dense", "growing", "paged"])
@pytest.mark.parametrize("name", ["paper", "fsa"])
def test_any_course(name: str, kind: str, max_crop: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flash_sparse_attention.cache.nsa_cache.FIRST_CAPACITY", 16)
    draw = random.Random(f"{name} {kind} {max_crop}")
    course = Course(layer_of(CONFIGS[name]), kind, max_crop, draw)
    often, seldom = (course.piece, course.step, course.crop), (course.fail, course.reorder, course.crop_to_nothing)
    for _ in range(30):
        draw.choice((*often, *often, *seldom))()
        assert list(course.cache.lengths) == course.cache.seq_lens.tolist() == course.lengths


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_token_by_token(name: str):
    config = LanguageModelConfig(num_layers=2, hidden_size=32, intermediate_size=32, head_dim=8, nsa=CONFIGS[name])
    model = LanguageModel(config, dtype=torch.float64)
    lengths = (40, 3, 61)
    tokens = torch.randint(256, (3, 70))
    cache = model.new_cache(3)
    prompt = torch.cat([tokens[b, :length] for b, length in enumerate(lengths)])
    got = [model(prompt, SequenceLayout.from_lengths(lengths), cache, last_logits=True)]
    assert not got[0].requires_grad
    for step in range(5):
        at = torch.tensor(lengths) + step
        got.append(model(tokens[torch.arange(3), at][:, None], cache=cache, last_logits=True))
    with torch.no_grad():
        whole = model(tokens)
    for step, logits in enumerate(got):
        expected = torch.stack([whole[b, length - 1 + step] for b, length in enumerate(lengths)])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_half_precision_under_autocast():
    layer = NativeSparseAttention(HIDDEN, 4, 2, CONFIGS["paper"], head_dim=8)
    x = torch.randn(1, 50, HIDDEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = layer.new_cache(1, 50)
        assert cache.dtype == torch.bfloat16
        with cache.extend(SequenceLayout.uniform(1, 50)):
            out = layer(x, cache=cache.layers[0])
    assert out.dtype == torch.bfloat16
    cache.crop(0)
    with (
        pytest.raises(ValueError, match=r"cache must be of torch.float32, as the keys are, got torch.bfloat16"),
        cache.extend(SequenceLayout.uniform(1, 50)),
    ):
        layer(x, cache=cache.layers[0])
    assert cache.lengths == (0,)


# What does not fit.


@pytest.fixture
def layer() -> NativeSparseAttention:
    return layer_of(CONFIGS["fsa"])


def tokens(batch: int, count: int) -> Tensor:
    return torch.zeros(batch, count, HIDDEN, dtype=torch.float64)


def test_past_the_capacity(layer: NativeSparseAttention):
    cache = layer.new_cache(2, 50)
    with cache.extend(SequenceLayout.uniform(2, 45)):
        layer(tokens(2, 45), cache=cache.layers[0])
    before = [pool.clone() for pool in cache.layers[0].pools()]
    with (
        pytest.raises(ValueError, match="sequence 0 must be of at most capacity=50 tokens, got 51: crop it"),
        cache.extend(SequenceLayout.uniform(2, 6)),
    ):
        pass
    assert cache.lengths == (45, 45)
    assert all(map(torch.equal, before, cache.layers[0].pools()))
    with cache.extend(SequenceLayout.uniform(2, 5)):
        layer(tokens(2, 5), cache=cache.layers[0])


def test_another_attention_batch_or_dtype(layer: NativeSparseAttention):
    cache = layer.new_cache(2, 50)
    other = layer_of(CONFIGS["paper"])
    with (
        pytest.raises(ValueError, match="cache must be made for config="),
        cache.extend(SequenceLayout.uniform(2, 1)),
    ):
        other(tokens(2, 1), cache=cache.layers[0])
    with (
        pytest.raises(ValueError, match="cache must be made for num_kv_heads=4, got 2"),
        cache.extend(SequenceLayout.uniform(2, 1)),
    ):
        layer_of(CONFIGS["fsa"], (4, 4))(tokens(2, 1), cache=cache.layers[0])
    with (
        pytest.raises(ValueError, match="layout must be of the B=2 sequences of the cache, got 3"),
        cache.extend(SequenceLayout.uniform(3, 1)),
    ):
        pass
    with (
        pytest.raises(
            ValueError, match=r"hidden_states must be of the lengths \[1, 1\] by which the cache is extended"
        ),
        cache.extend(SequenceLayout.uniform(2, 1)),
    ):
        layer(tokens(2, 2), cache=cache.layers[0])
    with (
        pytest.raises(ValueError, match="position_ids must be left out with a cache"),
        cache.extend(SequenceLayout.uniform(2, 1)),
    ):
        layer(tokens(2, 1), position_ids=torch.zeros(2, 1, dtype=torch.int64), cache=cache.layers[0])
    with pytest.raises(ValueError, match="cache must be extended by the new tokens"):
        layer(tokens(2, 1), cache=cache.layers[0])
    with (
        cache.extend(SequenceLayout.uniform(2, 1)),
        pytest.raises(ValueError, match="extend must be left before"),
        cache.extend(SequenceLayout.uniform(2, 1)),
    ):
        pass
    cache.crop(0)
    with pytest.raises(ValueError, match="attention must be 'nsa' to have a cache, got 'full'"):
        LanguageModel(LanguageModelConfig(num_layers=1, attention="full")).new_cache(1)
    model = LanguageModel(LanguageModelConfig(num_layers=1, nsa=CONFIGS["fsa"]))
    with pytest.raises(ValueError, match="cache must be made for num_layers=1, got 3"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=model.layers[0].self_attn.new_cache(1, num_layers=3))
    with pytest.raises(ValueError, match="cache must be an NSACache or None, got LayerCache: new_cache makes one"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=model.new_cache(1).layers[0])
    assert cache.lengths == (0, 0)


def test_pages_that_overlap_or_are_missing(layer: NativeSparseAttention):
    cache = layer.new_cache(2, 64, page_size=16, num_pages=6)

    def give(rows: list[list[int]], lengths: list[int] | None = None) -> None:
        cache.set_pages(torch.tensor(rows, dtype=torch.int32), lengths)

    give([[0, 1], [2, -1]])
    with (
        pytest.raises(ValueError, match="sequence 1 must be of 2 pages, got 1 pages for 17 tokens: give it more"),
        cache.extend(SequenceLayout.uniform(2, 17)),
    ):
        pass
    with pytest.raises(ValueError, match=r"of pages with one owner.* page 1 in sequences \[0, 1\]"):
        give([[0, 1], [2, 1]])
    with pytest.raises(ValueError, match=r"page 0 in sequences \[0, 0\]"):
        give([[0, 0], [2, 1]])
    with pytest.raises(ValueError, match="page_table must be of pages below P=6, got 6 in sequence 1"):
        give([[0, 1], [2, 6]])
    with pytest.raises(ValueError, match="at least 2 pages for the 20 tokens of sequence 0"):
        give([[0, -1], [2, 3]], [20, 0])
    with pytest.raises(ValueError, match="of at most 4 pages a sequence"):
        give([[0, 1, 2, 3, 4], [5, -1, -1, -1, -1]])
    assert cache.page_table[:, :2].tolist() == [[0, 1], [2, -1]]
    assert cache.lengths == (0, 0)
    with pytest.raises(ValueError, match="cache must be dense to be reordered, got paged"):
        cache.reorder([0, 1])
    with pytest.raises(ValueError, match="cache must be paged to be given pages, got dense"):
        layer.new_cache(2, 64).set_pages(cache.page_table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 20, "num_pages": 2}, "page_size must be a multiple of block_size=16, got 20"),
        ({"page_size": 16}, "num_pages must be the number of pages"),
        ({"num_pages": 3}, "page_size must be given with pools or num_pages"),
        ({"max_crop": -1}, "max_crop must be an integer of at least 0"),
        ({"page_size": 16, "num_pages": 2, "pools": []}, "pools must be one pair for each of num_layers=1, got 0"),
    ],
)
def test_caches_that_cannot_be(layer: NativeSparseAttention, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        layer.new_cache(1, **options)


def test_memory_is_free_when_the_cache_is_dropped():
    layer = layer_of(CONFIGS["fsa"])
    cache = layer.new_cache(2, capacity=None)
    read(layer, torch.randn(40, HIDDEN, dtype=torch.float64), (30, 10), [20], cache)
    kept = [weakref.ref(x) for x in (cache, cache.layers[0], *cache.layers[0].pools(), cache.seq_lens)]
    gc.disable()
    try:
        del cache
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
