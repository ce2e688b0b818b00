"""The reference, against loops written straight from the specification, and its gradients against differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import loops
from flash_sparse_attention import (
    Compression,
    Interval,
    NSAConfig,
    SequenceLayout,
    combine,
    compress,
    compressed_attention,
    interval_attention,
    nsa_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)
from flash_sparse_attention.impl import reference

PACKS = [[1], [3], [4], [11], [0], [9, 0, 1, 6], [5, 13]]
HEADS = [(1, 1), (4, 2), (3, 1)]
# (l, d, l'): overlapping windows over several blocks, windows that are blocks, and windows longer than blocks.
SIZES = [(4, 2, 4), (3, 3, 3), (4, 2, 2), (2, 1, 4)]
# What gradients are checked on.
LENGTHS = [6, 0, 1, 4]
LAYOUT = SequenceLayout.from_lengths(LENGTHS)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(result: Tensor, expected: object) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64).reshape(result.shape)
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


def test_compress_by_hand():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).reshape(6, 1, 1)
    mean = compress(x, kernel_size=4, kernel_stride=2, impl="reference")
    assert mean.flatten().tolist() == [3.75, 15.0]
    weight = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    weighted = compress(x, kind="weighted", weight=weight, kernel_size=4, kernel_stride=2, impl="reference")
    assert weighted.flatten().tolist() == [17.0, 68.0]


def test_attention_by_hand():
    # Scores of query 2 are 0, ln 2 and ln 5, so that its probabilities are 1/8, 2/8 and 5/8.
    q = torch.ones(3, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64).reshape(3, 1, 1)
    v = torch.tensor([8.0, 16.0, 24.0], dtype=torch.float64).reshape(3, 1, 1)
    out, lse = interval_attention(q, k, v, Interval(), impl="reference")
    assert_same(out, [8, 40 / 3, 20])
    assert_same(lse, [0, math.log(3), math.log(8)])
    out, lse = sliding_window_attention(q, k, v, window_size=2, impl="reference")
    assert_same(out, [8, 40 / 3, (2 * 16 + 5 * 24) / 7])
    assert_same(lse, [0, math.log(3), math.log(7)])
    # Halves of the scores: square roots of the weights.
    _, lse = interval_attention(q, k, v, Interval(), softmax_scale=0.5, impl="reference")
    assert_same(lse, [0, math.log(1 + 2**0.5), math.log(1 + 2**0.5 + 5**0.5)])


def test_selected_attention_by_hand():
    q = torch.ones(6, 1, 1, dtype=torch.float64)
    k = torch.zeros(6, 1, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64).reshape(6, 1, 1)
    indices = torch.tensor([[0, -1], [0, 1], [1, 0], [1, 1], [2, 0], [-1, -1]], dtype=torch.int32).reshape(6, 1, 2)
    out, lse = selected_attention(q, k, v, indices, block_size=2, impl="reference")
    assert_same(out, [1, 1.5, 7 / 3, 6, 19 / 3, 0])
    assert_same(lse, [0, math.log(2), math.log(3), math.log(2), math.log(3), -math.inf])


def test_probabilities_are_rounded_before_they_meet_the_values():
    # So that the reference in bfloat16 has the rounding points of a kernel, and makes a fair measure of one.
    tokens = 50
    q, k, v = (torch.randn(tokens, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    out, lse = interval_attention(q, k, v, Interval(), impl="reference")
    scores = q[:, 0].float() @ k[:, 0].float().T * 8**-0.5
    p = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    rounded, exact = (x.float() @ v[:, 0].float() for x in (p.bfloat16(), p))
    assert (out[:, 0] - rounded).abs().max() < (out[:, 0] - exact).abs().max()
    torch.testing.assert_close(out[:, 0], rounded.bfloat16(), rtol=2**-7, atol=1e-6)
    # Sums in another order, as another processor takes them, round a few elements to the other neighbour.
    shares = [(out[:, 0] == x.bfloat16()).float().mean().item() for x in (rounded, exact)]
    assert shares[0] > 0.98, shares
    assert shares[1] < 0.9, shares
    assert (out[:, 0] == exact.bfloat16()).float().mean() < 0.9
    assert lse.dtype == torch.float32


def test_combine_by_hand():
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    gates = torch.tensor([[[0.0, math.log(3), -math.log(3)], [math.log(1 / 3), 0.0, 0.0]]], dtype=torch.float64)
    out = combine(one, 10 * one, 100 * one, gates, impl="reference")
    assert_same(out, [0.5 + 7.5 + 25, 0.25 + 5 + 50])
    shared = combine(one, 10 * one, 100 * one, gates[:, :1], impl="reference")
    assert_same(shared, [33, 33])


def test_block_selection_by_hand():
    # l = d = l' = 1: importances are the probabilities, so that the query's scores decide.
    k = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 0.0]).reshape(6, 1, 1)
    q = torch.ones(6, 1, 1)
    sizes = {"kernel_size": 1, "kernel_stride": 1}
    lse = compressed_attention(q, k, k, **sizes, impl="reference").lse
    chosen = select_blocks(
        q, k, lse, **sizes, block_size=1, num_selected_blocks=3, num_init_blocks=1, num_local_blocks=1, impl="reference"
    )
    assert chosen.dtype == torch.int32
    assert chosen[:, 0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]
    free = select_blocks(
        q, k, lse, **sizes, block_size=1, num_selected_blocks=2, num_init_blocks=0, num_local_blocks=0, impl="reference"
    )
    # Token 0 and 4, 5 tie at a score of 0, but 1 and 3 have more.
    assert free[:, 0].tolist() == [[0, -1], [0, 1], [1, 2], [1, 3], [1, 3], [1, 3]]


def test_importance_of_the_paper_by_hand():
    # l = 32, d = 16, l' = 64 and equal probabilities: token 191 sees 11 windows, which overlap the three blocks
    # 2 + 2 + 2 + 1, 1 + 2 + 2 + 2 + 1 and 1 + 2 + 2 + 2 times.
    layout = SequenceLayout.from_lengths([192])
    q, k = torch.zeros(192, 2, 4, dtype=torch.float64), torch.zeros(11, 1, 4, dtype=torch.float64)
    lse = torch.full((192, 2), math.log(11), dtype=torch.float64)
    importance = reference.block_importance(q, k, lse, 32, 16, 64, layout, 1.0)
    assert_same(importance[191], [2 * 7 / 11, 2 * 8 / 11, 2 * 7 / 11])
    # Token 62 sees two windows, the second of which begins with the last but two chunk of block 0.
    assert_same(importance[62], [2 * 4 / 11, 0, 0])


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SIZES)
@pytest.mark.parametrize("kind", ["mean", "weighted", "linear", "mlp"])
def test_compress(kind: str, kernel_size: int, kernel_stride: int, block_size: int, lengths: list[int]):
    heads, dim, hidden = 2, 3, 5
    x, position = draw(sum(lengths), heads, dim), draw(kernel_size, dim)
    weights: dict[str, Tensor] = {
        "mean": {},
        "weighted": {"weight": draw(heads, kernel_size)},
        "linear": {"weight": draw(heads, kernel_size * dim, dim)},
        "mlp": {
            "weight": draw(heads, kernel_size * dim, hidden),
            "bias": draw(heads, hidden),
            "weight_out": draw(heads, hidden, dim),
            "bias_out": draw(heads, dim),
        },
    }[kind]
    lists = {name: weight.tolist() for name, weight in weights.items()}

    def summarise(vectors: list[list[float]], head: int) -> list[float]:
        vectors = [
            [a + b for a, b in zip(vector, add, strict=True)]
            for vector, add in zip(vectors, position.tolist(), strict=True)
        ]
        flat = [value for vector in vectors for value in vector]
        if kind == "mean":
            return loops.mean(vectors, head)
        if kind == "weighted":
            return [
                sum(w * c for w, c in zip(lists["weight"][head], column, strict=True))
                for column in zip(*vectors, strict=True)
            ]
        if kind == "linear":
            return loops.matmul(flat, lists["weight"][head])
        inner = [a + b for a, b in zip(loops.matmul(flat, lists["weight"][head]), lists["bias"][head], strict=True)]
        outer = loops.matmul([loops.gelu(a) for a in inner], lists["weight_out"][head])
        return [a + b for a, b in zip(outer, lists["bias_out"][head], strict=True)]

    result = compress(
        x,
        kind=kind,
        **weights,
        position_embedding=position,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        cu_seqlens=SequenceLayout.from_lengths(lengths),
        impl="reference",
    )
    assert_same(result, loops.compress(x.tolist(), lengths, kernel_size, kernel_stride, summarise))


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SIZES)
def test_compressed_attention_and_selection(
    kernel_size: int, kernel_stride: int, block_size: int, num_heads: int, num_kv_heads: int, lengths: list[int]
):
    layout, dim, dim_v = SequenceLayout.from_lengths(lengths), 3, 2
    keys = layout.compressed(kernel_size, kernel_stride).total_tokens
    q, k, v = draw(sum(lengths), num_heads, dim), draw(keys, num_kv_heads, dim), draw(keys, num_kv_heads, dim_v)
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride}
    result = compressed_attention(q, k, v, **sizes, cu_seqlens=layout, impl="reference")
    visible = loops.visible_windows(lengths, kernel_size, kernel_stride)
    out, lse = loops.attention(q.tolist(), k.tolist(), v.tolist(), lengths, dim**-0.5, dim_v, visible)
    assert_same(result.out, out)
    assert_same(result.lse, lse)

    for forced in ({"num_init_blocks": 1, "num_local_blocks": 1}, {"num_init_blocks": 0, "num_local_blocks": 2}):
        numbers = {"block_size": block_size, "num_selected_blocks": 3, **forced}
        chosen = select_blocks(q, k, result.lse, **sizes, **numbers, cu_seqlens=layout, impl="reference")
        if not keys:
            num_kv_heads = 1
        expected = loops.select(q.tolist(), k.tolist(), lengths, dim**-0.5, **sizes, **numbers)
        assert chosen[:, :num_kv_heads].tolist() == expected


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("window_size", [1, 3, 100])
def test_sliding_window(window_size: int, num_heads: int, num_kv_heads: int, lengths: list[int]):
    tokens, dim, dim_v = sum(lengths), 3, 2
    q, k, v = draw(tokens, num_heads, dim), draw(tokens, num_kv_heads, dim), draw(tokens, num_kv_heads, dim_v)
    layout = SequenceLayout.from_lengths(lengths)
    result = sliding_window_attention(
        q, k, v, window_size=window_size, cu_seqlens=layout, softmax_scale=0.7, impl="reference"
    )
    visible = loops.visible_recent(lengths, window_size)
    out, lse = loops.attention(q.tolist(), k.tolist(), v.tolist(), lengths, 0.7, dim_v, visible)
    assert_same(result.out, out)
    assert_same(result.lse, lse)


@pytest.mark.parametrize("lengths", PACKS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_selected_attention(block_size: int, num_heads: int, num_kv_heads: int, lengths: list[int]):
    tokens, dim, dim_v = sum(lengths), 3, 2
    q, k, v = draw(tokens, num_heads, dim), draw(tokens, num_kv_heads, dim), draw(tokens, num_kv_heads, dim_v)
    # Unused, valid, future and absurd, in any order and repeated.
    values = torch.tensor([-1, 0, 0, 1, 2, 3, 5, 9, -7, 2**31 - 1, -(2**31), 2**30])
    indices = values[torch.randint(len(values), (tokens, num_kv_heads, 4))].int()
    layout = SequenceLayout.from_lengths(lengths)
    result = selected_attention(q, k, v, indices, block_size=block_size, cu_seqlens=layout, impl="reference")
    visible = loops.visible_selected(lengths, indices.tolist(), block_size)
    out, lse = loops.attention(q.tolist(), k.tolist(), v.tolist(), lengths, dim**-0.5, dim_v, visible)
    assert_same(result.out, out)
    assert_same(result.lse, lse)


def check(function: Callable[..., object], *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


def finite(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Differences of -inf are no numbers."""
    out, lse = result
    return out, lse[lse > -math.inf]


def test_gradients_of_compress():
    sizes = {"kernel_size": 4, "kernel_stride": 2, "cu_seqlens": LAYOUT, "impl": "reference"}
    x, position = draw(11, 2, 2), draw(4, 2)
    check(lambda x, p: compress(x, position_embedding=p, **sizes), x, position)
    check(
        lambda x, p, w: compress(x, kind="weighted", weight=w, position_embedding=p, **sizes), x, position, draw(2, 4)
    )
    check(
        lambda x, p, w: compress(x, kind="linear", weight=w, position_embedding=p, **sizes), x, position, draw(2, 8, 2)
    )
    check(
        lambda x, *weights: compress(x, **Compression("mlp", *weights)._asdict(), **sizes),
        x,
        draw(2, 8, 3),
        draw(2, 3),
        draw(2, 3, 2),
        draw(2, 2),
        position,
    )


@pytest.mark.parametrize("interval", [Interval(4, 2), Interval(window_size=3), Interval()], ids=str)
def test_gradients_of_interval_attention(interval: Interval):
    keys = LAYOUT.compressed(interval.kernel_size, interval.kernel_stride).total_tokens
    check(
        lambda q, k, v: finite(interval_attention(q, k, v, interval, cu_seqlens=LAYOUT, impl="reference")),
        draw(11, 4, 2),
        draw(keys, 2, 2),
        draw(keys, 2, 3),
    )


def test_gradients_of_selected_attention():
    indices = torch.tensor([[0, -1], [1, 0], [-1, -1], [0, 0], [2**31 - 1, 1]], dtype=torch.int32)
    indices = indices[torch.arange(22) % 5].reshape(11, 2, 2)
    check(
        lambda q, k, v: finite(selected_attention(q, k, v, indices, block_size=2, cu_seqlens=LAYOUT, impl="reference")),
        draw(11, 4, 2),
        draw(11, 2, 2),
        draw(11, 2, 3),
    )


def test_gradients_of_combine():
    check(lambda *x: combine(*x, impl="reference"), *(draw(5, 2, 3) for _ in range(3)), draw(5, 2, 3))
    check(lambda *x: combine(*x, impl="reference"), *(draw(5, 2, 4) for _ in range(3)), draw(5, 1, 3))


def test_gradients_of_the_whole():
    config = NSAConfig(
        kernel_size=4,
        kernel_stride=2,
        block_size=4,
        num_selected_blocks=2,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=3,
    )
    check(
        lambda *x: nsa_attention(*x, config, cu_seqlens=LAYOUT, impl="reference").out,
        draw(11, 4, 2),
        draw(11, 2, 2),
        draw(11, 2, 3),
        draw(11, 4, 3),
    )
