"""Every index formula of Native Sparse Attention, once.

Positions are counted from the start of their own sequence. *Token* t stands at position t; *compressed token* i
summarises the tokens of *window* i, `[i * d, i * d + l)`; *block* j holds the tokens `[j * l', (j + 1) * l')`; *chunk*
c holds the tokens `[c * d, (c + 1) * d)`, the grain that windows and blocks share. With l = 8, d = 4, l' = 16:

    tokens    0   4   8   12  16  20  24  28  32
    chunks    |0  |1  |2  |3  |4  |5  |6  |7  |
    windows   [0 -----]
                  [1 -----]
                      [2 -----]          ...
    blocks    [0 ------------][1 ------------]

Functions take Python integers or integer tensors alike, and return the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Ints = TypeVar("Ints", int, Tensor)


def num_compressed_tokens(length: Ints, kernel_size: int, kernel_stride: int) -> Ints:
    """Windows that fit wholly into `length` tokens: max(0, (L - l) // d + 1).

    >>> [num_compressed_tokens(n, 32, 16) for n in (0, 31, 32, 47, 48)]
    [0, 0, 1, 1, 2]
    """
    return _at_least_zero((length - kernel_size) // kernel_stride + 1)


def num_chunks(length: Ints, kernel_stride: int) -> Ints:
    """Whole chunks of d tokens in `length` tokens."""
    return length // kernel_stride


def num_blocks(length: Ints, block_size: int) -> Ints:
    """Blocks that hold `length` tokens, the last one perhaps partly: ceil(L / l').

    >>> [num_blocks(n, 64) for n in (0, 1, 64, 65)]
    [0, 1, 1, 2]
    """
    return (length + block_size - 1) // block_size


def block_of(token: Ints, block_size: int) -> Ints:
    """Block that holds the token."""
    return token // block_size


def first_token_of_block(block: Ints, block_size: int) -> Ints:
    """First token of the block."""
    return block * block_size


def num_eligible_blocks(token: Ints, block_size: int) -> Ints:
    """Blocks j that a query at `token` may select, those with j * l' <= t: the first t // l' + 1."""
    return block_of(token, block_size) + 1


def first_local_block(token: Ints, block_size: int, num_local_blocks: int) -> Ints:
    """Oldest of the `num_local_blocks` newest eligible blocks; these blocks are always kept."""
    return _at_least_zero(num_eligible_blocks(token, block_size) - num_local_blocks)


def window_start(window: Ints, kernel_stride: int) -> Ints:
    """First token of a compression window, where `rope="after"` puts the compressed key: i * d."""
    return window * kernel_stride


def newest_chunk(window: Ints, kernel_size: int, kernel_stride: int) -> Ints:
    """Last chunk of a compression window: i + l / d - 1. A cache keeps compressed tokens by it.

    >>> [newest_chunk(i, 32, 16) for i in (0, 1)]
    [1, 2]
    """
    return window + kernel_size // kernel_stride - 1


def overlap(window: Ints, block: Ints, kernel_size: int, kernel_stride: int, block_size: int) -> Ints:
    """Chunks that a compression window and a selection block share.

    For l = 32, d = 16, l' = 64 this is 1, 2, 2, 2, 1 on the windows 4j - 1 .. 4j + 3 (equation 9 of the NSA paper,
    whose indices start at 1).

    >>> [overlap(i, 1, 32, 16, 64) for i in range(2, 9)]
    [0, 1, 2, 2, 2, 1, 0]
    """
    chunks_per_window, chunks_per_block = kernel_size // kernel_stride, block_size // kernel_stride
    newest_start = _larger(window, block * chunks_per_block)
    oldest_end = _smaller(window + chunks_per_window, (block + 1) * chunks_per_block)
    return _at_least_zero(oldest_end - newest_start)


def windows_reach(kernel_size: int, kernel_stride: int, block_size: int) -> int:
    """How many blocks past the one in which it begins a compression window may overlap.

    >>> [windows_reach(*sizes) for sizes in ((32, 16, 64), (64, 64, 64), (64, 16, 16))]
    [1, 0, 3]
    """
    chunks_before, chunks_per_block = kernel_size // kernel_stride - 1, block_size // kernel_stride
    return -(-chunks_before // chunks_per_block)


@dataclass(frozen=True)
class Interval:
    """The contiguous range of keys [start(t), end(t)) that the query at token t attends to.

    Key s stands for the tokens [s * kernel_stride, s * kernel_stride + kernel_size), and a query sees the keys whose
    tokens all lie at or before its own: the newest `window_size` of them, or all. Two branches are intervals:

        compressed attention   Interval(kernel_size=l, kernel_stride=d)
        sliding window         Interval(window_size=w)

    and `Interval()` is plain causal attention. `start` and `end` never decrease as t grows, so the queries that see a
    key are a range as well.

    Raises:
        ValueError: if a size is smaller than 1.
    """

    kernel_size: int = 1
    kernel_stride: int = 1
    window_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"Interval: {name} must be at least 1, got {getattr(self, name)}")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"Interval: window_size must be at least 1, or None for no bound, got {self.window_size}")

    def num_keys(self, length: Ints) -> Ints:
        """Keys of a sequence of `length` tokens."""
        return num_compressed_tokens(length, self.kernel_size, self.kernel_stride)

    def end(self, token: Ints) -> Ints:
        """One past the newest visible key.

        >>> [Interval(kernel_size=32, kernel_stride=16).end(t) for t in (0, 30, 31, 47)]
        [0, 0, 1, 2]
        """
        return num_compressed_tokens(token + 1, self.kernel_size, self.kernel_stride)

    def start(self, token: Ints) -> Ints:
        """Oldest visible key; equal to `end` where none is visible.

        >>> [Interval(window_size=512).start(t) for t in (0, 511, 512)]
        [0, 0, 1]
        """
        if self.window_size is None:
            return token * 0
        return _at_least_zero(self.end(token) - self.window_size)

    def last_token(self, key: Ints) -> Ints:
        """Newest token that the key stands for, which is the first query that sees it."""
        return key * self.kernel_stride + self.kernel_size - 1


def _at_least_zero(value: Ints) -> Ints:
    return value.clamp(min=0) if isinstance(value, Tensor) else max(0, value)


def _larger(a: Ints, b: Ints) -> Ints:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


def _smaller(a: Ints, b: Ints) -> Ints:
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)
