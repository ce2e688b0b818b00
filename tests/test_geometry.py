"""Index formulas: by hand where the specification gives numbers, and by enumerating tokens everywhere."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention import Interval, geometry

# (l, d, l'): the paper's, windows that are blocks, one long window, fine strides, and the least.
SIZES = [(32, 16, 64), (16, 16, 16), (64, 64, 64), (32, 8, 32), (8, 4, 16), (64, 16, 16), (1, 1, 1)]
INTERVALS = [
    Interval(),
    Interval(window_size=1),
    Interval(window_size=5),
    Interval(8, 4),
    Interval(8, 4, window_size=2),
    Interval(4, 4),
    Interval(5, 1),
]


def windows_within(length: int, kernel_size: int, kernel_stride: int) -> list[int]:
    """Windows all of whose tokens exist."""
    return [
        i
        for i in range(length + 1)
        if all(t < length for t in range(i * kernel_stride, i * kernel_stride + kernel_size))
    ]


def chunks_of(first_token: int, tokens: int, kernel_stride: int) -> set[int]:
    return {t // kernel_stride for t in range(first_token, first_token + tokens)}


def test_overlap_of_the_paper():
    # Equation 9 with l = 32, d = 16, l' = 64: windows 4j - 1 .. 4j + 3 with 1, 2, 2, 2, 1.
    for j in (1, 2, 7):
        assert [geometry.overlap(i, j, 32, 16, 64) for i in range(4 * j - 2, 4 * j + 5)] == [0, 1, 2, 2, 2, 1, 0]
    assert [geometry.overlap(i, 0, 32, 16, 64) for i in range(5)] == [2, 2, 2, 1, 0]


def test_overlap_is_identity_where_windows_are_blocks():
    assert [[geometry.overlap(i, j, 64, 64, 64) for i in range(3)] for j in range(3)] == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SIZES)
def test_overlap_counts_shared_chunks(kernel_size: int, kernel_stride: int, block_size: int):
    for i in range(12):
        for j in range(6):
            window = chunks_of(i * kernel_stride, kernel_size, kernel_stride)
            block = chunks_of(j * block_size, block_size, kernel_stride)
            assert geometry.overlap(i, j, kernel_size, kernel_stride, block_size) == len(window & block)


@pytest.mark.parametrize(("kernel_size", "kernel_stride", "block_size"), SIZES)
def test_counts_of_windows_chunks_and_blocks(kernel_size: int, kernel_stride: int, block_size: int):
    for length in range(140):
        tokens = range(length)
        windows = windows_within(length, kernel_size, kernel_stride)
        assert geometry.num_compressed_tokens(length, kernel_size, kernel_stride) == len(windows)
        whole = [c for c in range(length + 1) if (c + 1) * kernel_stride <= length]
        assert geometry.num_chunks(length, kernel_stride) == len(whole)
        assert geometry.num_blocks(length, block_size) == len({t // block_size for t in tokens})


@pytest.mark.parametrize("num_local_blocks", [0, 1, 2, 5])
def test_eligible_and_local_blocks(num_local_blocks: int):
    block_size = 4
    for token in range(40):
        eligible = [j for j in range(50) if j * block_size <= token]
        assert geometry.block_of(token, block_size) == eligible[-1]
        assert geometry.num_eligible_blocks(token, block_size) == len(eligible)
        local = eligible[len(eligible) - min(num_local_blocks, len(eligible)) :]
        first = geometry.first_local_block(token, block_size, num_local_blocks)
        assert [j for j in eligible if j >= first] == local
        assert all(geometry.first_token_of_block(j, block_size) <= token for j in eligible)
    assert geometry.first_token_of_block(3, 64) == 192
    assert geometry.window_start(3, 16) == 48


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_interval_is_what_a_query_may_see(interval: Interval):
    for length in range(40):
        assert interval.num_keys(length) == len(windows_within(length, interval.kernel_size, interval.kernel_stride))
    for token in range(60):
        whole = windows_within(token + 1, interval.kernel_size, interval.kernel_stride)
        seen = whole if interval.window_size is None else whole[-interval.window_size :]
        assert list(range(interval.start(token), interval.end(token))) == seen
        assert interval.start(token) <= interval.end(token)


def test_windows_of_the_branches_by_hand():
    compressed = Interval(kernel_size=32, kernel_stride=16)
    assert [compressed.end(t) for t in (0, 30, 31, 46, 47, 63)] == [0, 0, 1, 1, 2, 3]
    window = Interval(window_size=512)
    # Exactly 512 tokens, the query's own included.
    assert [(window.start(t), window.end(t)) for t in (0, 510, 511, 512)] == [(0, 1), (0, 511), (0, 512), (1, 513)]


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_last_token_is_the_first_query_that_sees_a_key(interval: Interval):
    for key in range(20):
        token = interval.last_token(key)
        assert interval.end(token) == key + 1
        assert interval.end(token - 1) == key


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_the_queries_that_see_a_key_are_a_range(interval: Interval):
    tokens = range(80)
    assert all(interval.start(t) <= interval.start(t + 1) and interval.end(t) <= interval.end(t + 1) for t in tokens)


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_tensors_and_integers_alike(interval: Interval):
    tokens = torch.arange(50)
    for formula in (interval.start, interval.end, interval.last_token, interval.num_keys):
        result = formula(tokens)
        assert isinstance(result, torch.Tensor)
        assert result.dtype == tokens.dtype
        assert result.tolist() == [formula(t) for t in range(50)]


def test_tensors_and_integers_alike_in_functions():
    tokens = torch.arange(50)
    for formula, sizes in (
        (geometry.num_compressed_tokens, (8, 4)),
        (geometry.num_chunks, (4,)),
        (geometry.num_blocks, (8,)),
        (geometry.block_of, (8,)),
        (geometry.first_token_of_block, (8,)),
        (geometry.num_eligible_blocks, (8,)),
        (geometry.first_local_block, (8, 2)),
        (geometry.window_start, (4,)),
    ):
        assert formula(tokens, *sizes).tolist() == [formula(t, *sizes) for t in range(50)]
    windows, blocks = torch.arange(12)[:, None], torch.arange(5)[None, :]
    expected = [[geometry.overlap(i, j, 8, 4, 16) for j in range(5)] for i in range(12)]
    assert geometry.overlap(windows, blocks, 8, 4, 16).tolist() == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ({"kernel_stride": -1}, "kernel_stride must be at least 1, got -1"),
        ({"window_size": 0}, "window_size must be at least 1, or None for no bound, got 0"),
    ],
)
def test_interval_refuses_sizes_below_one(sizes: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Interval(**sizes)
