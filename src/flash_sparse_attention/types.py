"""Data that passes between the layers of the library: the layout of a batch, and what operators return."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import geometry
from .validation import bad, check_cu_seqlens


class AttentionOutput(NamedTuple):
    """A softmax attention, in the form that can be merged with another one over other keys.

    Attributes:
        out: weighted mean of the values, the dtype of the inputs; 0 where a query sees no key.
        lse: logarithm (natural) of the sum of exponentiated scores, float32 (float64 for float64 inputs); -inf where a
            query sees no key. Differentiable.
    """

    out: Tensor
    lse: Tensor


class NSAOutput(NamedTuple):
    """What `nsa_attention` returns.

    Attributes:
        out: the gated sum of the three branches, `[N, Hq, Dv]` (or `[B, S, Hq, Dv]`).
        block_indices: the blocks that each query selected, int32 `[N, Hk, T]` (or `[B, S, Hk, T]`), ascending, -1 in
            unused slots. Carries no gradient.
    """

    out: Tensor
    block_indices: Tensor


class Compression(NamedTuple):
    """How `compress` turns a window of l tokens into one: its kind and the weights that this kind needs.

    Attributes:
        kind: `mean`, `linear`, `mlp` or `weighted`.
        weight: `linear`: `[Hk, l * D, D]`; `mlp`: the first layer `[Hk, l * D, E]`; `weighted`: `[Hk, l]`, applied as
            it is (take a softmax before, if one is wanted); `mean`: None.
        bias: `mlp`: bias of the first layer `[Hk, E]`, or None.
        weight_out: `mlp`: the second layer `[Hk, E, D]`.
        bias_out: `mlp`: bias of the second layer `[Hk, D]`, or None.
        position_embedding: `[l, D]`, added to the tokens of each window first, or None.
    """

    kind: str = "mean"
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_out: Tensor | None = None
    bias_out: Tensor | None = None
    position_embedding: Tensor | None = None


class Place(NamedTuple):
    """Where tokens stand in a cache: page and row of the page, in bounds, and whether they are there at all."""

    page: Tensor
    row: Tensor
    exists: Tensor


@dataclass(frozen=True, eq=False)
class KVPages:
    """The keys and values of a batch of sequences in pages, as in vLLM and FlashInfer, with compressed ones beside.

    Token t of sequence b stands in row `t % page_size` of the page `page_table[b, t // page_size]`. The compressed
    token of a window stands by the newest chunk of the window, `geometry.newest_chunk`: chunk c in row
    `c % (page_size / d)` of the page `page_table[b, c // (page_size / d)]`. So what a page holds depends on nothing
    that follows it, and sequences that begin alike may share their first pages. A cache without pages is one whose
    sequences have one page each.

    Attributes:
        k: rotated keys of the selected branch `[P, page_size, Hk, Dk]`; page_size is a multiple of the block size.
        v: values of the selected branch `[P, page_size, Hk, Dv]`.
        k_window: rotated keys of the window; `k` itself where the branches share it.
        v_window: values of the window; `v` itself where the branches share it.
        k_compressed: compressed keys `[P, page_size / d, Hk, Dk]`.
        v_compressed: compressed values `[P, page_size / d, Hk, Dv]`.
        page_table: int32 `[B, pages]`. Entries past the last token may be anything; what is no page, as -1, holds
            nothing that could be attended to.
        seq_lens: tokens of each sequence, int32 `[B]`.
    """

    k: Tensor
    v: Tensor
    k_window: Tensor
    v_window: Tensor
    k_compressed: Tensor
    v_compressed: Tensor
    page_table: Tensor
    seq_lens: Tensor

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]

    def within_capacity(self) -> KVPages:
        """The same, with lengths of at least 0 that are no larger than what the page table has room for."""
        lens = self.seq_lens.clamp(0, self.page_table.shape[1] * self.page_size)
        return dataclasses.replace(self, seq_lens=lens)

    def place(self, sequence: Tensor, token: Tensor) -> Place:
        """Where tokens by position stand; `sequence` and `token` are integers that broadcast.

        Negative positions, those that have no page and those from `seq_lens` on do not exist.
        """
        return self._place(sequence, token, self.page_size, self.seq_lens)

    def compressed_place(self, sequence: Tensor, window: Tensor, kernel_size: int, kernel_stride: int) -> Place:
        """Where compressed tokens stand; as `place`."""
        windows = geometry.num_compressed_tokens(self.seq_lens, kernel_size, kernel_stride)
        chunk = geometry.newest_chunk(window, kernel_size, kernel_stride)
        ends = torch.where(windows > 0, geometry.newest_chunk(windows, kernel_size, kernel_stride), 0)
        return self._place(sequence, chunk.masked_fill(window < 0, -1), self.page_size // kernel_stride, ends)

    def _place(self, sequence: Tensor, index: Tensor, rows: int, ends: Tensor) -> Place:
        inside = (index >= 0) & (index < ends[sequence])
        column = (index // rows).clamp(0, self.page_table.shape[1] - 1)
        page = self.page_table[sequence, column].long()
        exists = inside & (index < self.page_table.shape[1] * rows) & (page >= 0) & (page < len(self.k))
        return Place(page.clamp(0, len(self.k) - 1), index % rows, exists)


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The bounds of the sequences in a pack, on the host and on a device, built once a batch.

    Operators accept it wherever they accept `cu_seqlens`; a tensor must be copied to the host on every call, which
    waits for the device, and a layout need not.

    Where keys are there for more tokens than queries, as when a prompt is read in pieces, the layout is that of the
    queries, which are the last tokens of each sequence, and `keys` is that of all tokens.

    Attributes:
        lengths: tokens of each sequence; 0 is allowed.
        cu_seqlens: their running sum with a leading 0, int32 `[B + 1]`, on the device of the batch.
        with_past: the layout of all tokens that have keys; None where those are the same.

    Example:
        >>> layout = SequenceLayout.from_lengths([3, 0, 5])
        >>> layout.cu_seqlens.tolist(), layout.total_tokens, layout.max_length
        ([0, 3, 3, 8], 8, 5)
        >>> layout.positions().tolist()
        [0, 1, 2, 0, 1, 2, 3, 4]
        >>> layout.after(SequenceLayout.from_lengths([5, 0, 5])).positions().tolist()
        [2, 3, 4, 0, 1, 2, 3, 4]
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor = field(repr=False)
    with_past: SequenceLayout | None = field(default=None, repr=False)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of sequences of these lengths (tokens). Does not wait for the device."""
        # Traced, they may be symbols.
        if not torch.compiler.is_compiling():
            try:
                lengths = [operator.index(length) for length in lengths]
            except TypeError as error:
                raise bad("lengths", "whole numbers of tokens", repr(lengths)) from error
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths must not be negative, got {list(lengths)}")
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        return cls(tuple(lengths), torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total_tokens: int | None = None) -> SequenceLayout:
        """The layout with these bounds, int32 `[B + 1]`, copied to the host once.

        Raises:
            ValueError: if `cu_seqlens` is no int32 vector that starts at 0, never decreases and ends at
                `total_tokens`.
        """
        bounds = check_cu_seqlens(cu_seqlens, total_tokens)
        return cls(tuple(b - a for a, b in pairwise(bounds)), cu_seqlens)

    @classmethod
    def uniform(cls, batch: int, length: int, device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of `batch` sequences of one length: a batched tensor `[B, S, ...]`, flattened."""
        if torch.compiler.is_compiling() or length <= 0:
            bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        else:
            # One launch; traced, its size would be an expression of the length.
            bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
        return cls((length,) * batch, bounds)

    @classmethod
    def of(cls, argument: str, x: Tensor, batched: bool, cu_seqlens: Tensor | SequenceLayout | None) -> SequenceLayout:
        """The sequences in the argument `x`: packed `[N, ...]` with bounds or without, or batched `[B, S, ...]`.

        Raises:
            ValueError: if `cu_seqlens` is given for a batch, does not fit the tokens of `x`, or is on another device.
        """
        if batched:
            if cu_seqlens is not None:
                raise bad("cu_seqlens", f"left out for a batched {argument} [B, S, ...]", "both", "pack the batch")
            return cls.uniform(x.shape[0], x.shape[1], x.device)
        if cu_seqlens is None:
            return cls.uniform(1, x.shape[0], x.device)
        if not isinstance(cu_seqlens, (Tensor, SequenceLayout)):
            raise bad("cu_seqlens", "an int32 tensor [B + 1], a SequenceLayout or None", type(cu_seqlens).__name__)
        # First, as the bounds of a tensor on a device without data (meta) cannot be read.
        if cu_seqlens.device != x.device:
            device = f"on the device of {argument} ({x.device})"
            raise bad("cu_seqlens", device, cu_seqlens.device, f"move it with .to({argument}.device)")
        if isinstance(cu_seqlens, Tensor):
            return cls.from_cu_seqlens(cu_seqlens, x.shape[0])
        if cu_seqlens.total_tokens != x.shape[0]:
            raise bad("cu_seqlens", f"a layout of the N={x.shape[0]} tokens of {argument}", cu_seqlens.total_tokens)
        return cu_seqlens

    def after(self, keys: SequenceLayout) -> SequenceLayout:
        """The layout of these tokens as the last ones of the sequences of `keys`.

        Raises:
            ValueError: if `keys` has another number of sequences, a shorter one, or is on another device.
        """
        if keys.with_past is not None:
            raise bad("cu_seqlens_k", "the layout of all tokens", "one with a past")
        if keys.batch != self.batch:
            raise bad("cu_seqlens_k", f"of B={self.batch} sequences, as cu_seqlens", keys.batch)
        for index, (queries, tokens) in enumerate(zip(self.lengths, keys.lengths, strict=True)):
            if queries > tokens:
                expected = "at least as long as cu_seqlens in every sequence"
                raise bad("cu_seqlens_k", expected, f"{tokens} tokens for {queries} queries in sequence {index}")
        if keys.device != self.device:
            raise bad("cu_seqlens_k", f"on the device of cu_seqlens ({self.device})", keys.device)
        return SequenceLayout(self.lengths, self.cu_seqlens, None if keys.lengths == self.lengths else keys)

    def to(self, device: torch.device | str) -> SequenceLayout:
        """The layout on another device."""
        keys = None if self.with_past is None else self.with_past.to(device)
        return SequenceLayout(self.lengths, self.cu_seqlens.to(device, non_blocking=True), keys)

    @property
    def keys(self) -> SequenceLayout:
        """The layout of the tokens that have keys: the queries' own, and those before them."""
        return self if self.with_past is None else self.with_past

    @property
    def batch(self) -> int:
        """Number of sequences, empty ones included."""
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 if there is none."""
        return max(self.lengths) if self.lengths else 0

    @property
    def device(self) -> torch.device:
        """Device of `cu_seqlens`."""
        return self.cu_seqlens.device

    def sequence_ids(self) -> Tensor:
        """The sequence that each token belongs to, int64 `[N]`."""
        ids = torch.arange(self.batch, device=self.device)
        return ids.repeat_interleave(self.cu_seqlens.diff(), output_size=self.total_tokens)

    def positions(self) -> Tensor:
        """The position of each token in its sequence, int64 `[N]`."""
        tokens, ids = torch.arange(self.total_tokens, device=self.device), self.sequence_ids()
        if self.with_past is None:
            return tokens - self.cu_seqlens[ids]
        # The last query of a sequence stands at its last token.
        return tokens - self.cu_seqlens[ids + 1] + self.with_past.cu_seqlens.diff()[ids]

    def compressed(self, kernel_size: int, kernel_stride: int) -> SequenceLayout:
        """The layout of the compressed tokens: `geometry.num_compressed_tokens` for each sequence."""
        return self._mapped(lambda length: geometry.num_compressed_tokens(length, kernel_size, kernel_stride))

    def blocks(self, block_size: int) -> SequenceLayout:
        """The layout of the selection blocks: `geometry.num_blocks` for each sequence."""
        return self._mapped(lambda length: geometry.num_blocks(length, block_size))

    def window_starts(self, kernel_size: int, kernel_stride: int) -> Tensor:
        """The index in the pack of the first token of each compression window, int64 `[M]`."""
        windows = self.compressed(kernel_size, kernel_stride)
        return self.keys.cu_seqlens[windows.sequence_ids()] + geometry.window_start(windows.positions(), kernel_stride)

    def chunks(self, kernel_stride: int) -> SequenceLayout:
        """The layout of the whole chunks: `geometry.num_chunks` for each sequence."""
        return self._mapped(lambda length: geometry.num_chunks(length, kernel_stride))

    def _mapped(self, count: Callable[[Any], Any]) -> SequenceLayout:
        """The layout of as many tokens of each sequence of keys as `count` says; takes an integer or a tensor of them.

        The bounds are computed where they are needed: a copy from the host could not be captured in a CUDA graph.
        """
        ends = count(self.keys.cu_seqlens.diff()).cumsum(0, dtype=torch.int32)
        return SequenceLayout(tuple(map(count, self.keys.lengths)), torch.cat([ends.new_zeros(1), ends]))
