"""The inverted index: which tokens selected each block of each key/value head.

A *bucket* is a (kv head, block of the pack). Its *pairs*, one for each (token, slot) that selected the block, stand in
the order of their tokens. Invalid, future, out-of-range and repeated entries of a selection fall out here, once, for
every consumer. Nothing waits for the host, and the same selection always gives the same index.

Tokens are counted in *runs* of consecutive tokens, whose number is bounded, so that the counters take O(N) memory at
any length. Worked example: one kv head, blocks of 2 tokens, T = 2, four queries, two runs of two tokens:

    query  block_indices   counts in (block, run)        place of each slot     pairs
      0      [ 0, -1]      block 0: run 0: 2  run 1: 2       0  -1              block 0: tokens 0 1 2 3
      1      [ 5,  0]      block 1: run 0: 0  run 1: 2      -1   1              block 1: tokens 2 3
      2      [ 0,  1]                                        2   4
      3      [ 1,  0]      they begin at 0 2, 4 4            5   3

5 names no block, and is dropped. The counters of a run stand side by side, since the program that writes its pairs
goes back and forth between them. Buckets are cut into *segments* of a bounded number of pairs, which are what the
programs of the main kernels own: blocks that every token selects do not make a tail.

The work is cut into *chunks*, a range of kv heads and a range of tokens each, since the partial results of the main
kernels are kept for one chunk only. The pairs of a range of tokens come before those of the next, so that the pairs of
a chunk are consecutive, and their partial results are as well.

An entry is *near* if its block is among the first NEAR_INIT of its sequence, or among the newest NEAR_LOCAL up to the
query's own; the others are *far*. Of a far block the near pairs come first, as they have the first tokens that see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    block_bounds,
    bounds_of_keys,
    keys_ahead,
    pack_blocks,
    padded,
    sequence_of,
    take_over,
)
from .tuning import early_launch

# Counters of a selection: more runs make the writing of the pairs shorter, which one program does for each run, until
# there are more counters than entries.
MAX_RUNS, MIN_RUNS, COUNTERS, LEAST_RUN = 1024, 64, 1 << 23, 16
COUNT_ENTRIES = 256
# Lanes of a warp, which places as many entries at once. Where there are more tokens the counters of the runs that are
# written side by side do not fit a cache any more, and it places twice as many.
WARP, SHORT = tl.constexpr(32), 1 << 14
# Blocks whose counters are made places at once.
START_BLOCKS = 128
# Runs and buckets of a tile whose counts are summed up.
SCAN_RUNS, SCAN_BUCKETS = 256, 8
SEGMENT_BUCKETS = 128
SEGMENT_FIELDS = 5
# Programs that start last should be short ones. Where a range of heads has more than so many (chunk, bucket), all are
# short; otherwise segments are made for so many at once, so that they take little memory.
SEGMENT_CLASSES, MAX_FLAT = 4, 1 << 18
# Near blocks: those that NSA always selects. The kernels of `selected_near` and `near_hopper` are for these numbers.
NEAR_INIT, NEAR_LOCAL = tl.constexpr(1), tl.constexpr(2)
# There is no PTX in Triton's interpreter.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Chunks:
    """How the work is cut so that partial results fit a workspace: heads first, then tokens.

    Attributes:
        total_tokens, num_kv_heads, slots: of the selection, `[N, Hk, T]`.
        num_blocks: block ids of the pack of keys; see `primitives.sequence_of`.
        heads: kv heads of a chunk, divides `num_kv_heads`.
        runs, tokens_per_run: runs of a chunk, and tokens of a run.
        token_chunks: chunks along the tokens.
    """

    total_tokens: int
    num_kv_heads: int
    slots: int
    num_blocks: int
    heads: int
    runs: int
    tokens_per_run: int
    token_chunks: int

    @classmethod
    def fit(
        cls,
        block_indices: Tensor,
        total_keys: int,
        num_sequences: int,
        block_size: int,
        bytes_per_pair: int,
        workspace_bytes: int,
    ) -> Chunks:
        """The largest chunks whose partial results, `bytes_per_pair` for each slot, fit the workspace.

        `total_keys` are the tokens that have keys, those of the selection or more.
        """
        total_tokens, num_kv_heads, slots = block_indices.shape
        num_blocks = pack_blocks(total_keys, num_sequences, block_size)
        fitting = max(1, workspace_bytes // (bytes_per_pair * slots))  # (token, kv head) pairs
        divisors = (h for h in range(1, num_kv_heads + 1) if num_kv_heads % h == 0 and h * total_tokens <= fitting)
        heads = max(divisors, default=1)
        token_chunks = triton.cdiv(total_tokens, min(total_tokens, max(fitting // heads, MIN_CHUNK_TOKENS)))
        max_runs = min(MAX_RUNS, max(MIN_RUNS, COUNTERS // (num_kv_heads * num_blocks)))
        max_runs = min(max_runs, triton.cdiv(total_tokens, LEAST_RUN))
        runs = triton.cdiv(max_runs, token_chunks)
        step = tokens_per_step(slots, total_tokens)
        tokens_per_run = triton.cdiv(triton.cdiv(triton.cdiv(total_tokens, token_chunks), runs), step) * step
        runs = triton.cdiv(triton.cdiv(total_tokens, token_chunks), tokens_per_run)
        token_chunks = triton.cdiv(total_tokens, runs * tokens_per_run)
        return cls(total_tokens, num_kv_heads, slots, num_blocks, heads, runs, tokens_per_run, token_chunks)

    @property
    def tokens(self) -> int:
        """Tokens of a chunk; the last one may have fewer."""
        return self.runs * self.tokens_per_run

    @property
    def buckets(self) -> int:
        """Buckets of a chunk."""
        return self.heads * self.num_blocks

    @property
    def head_chunks(self) -> int:
        """Chunks along the kv heads."""
        return self.num_kv_heads // self.heads

    @property
    def pairs(self) -> int:
        """Pairs of a chunk at most."""
        return min(self.tokens, self.total_tokens) * self.heads * self.slots

    @property
    def counters(self) -> int:
        """Counters of the index: (chunk of tokens, run, bucket of all)."""
        return self.bucket_ends * self.runs

    @property
    def bucket_ends(self) -> int:
        """Buckets of all, counted again in each chunk of tokens."""
        return self.token_chunks * self.num_kv_heads * self.num_blocks

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """The chunks, as (number, first kv head, first token, tokens)."""
        for head_chunk in range(self.head_chunks):
            for token_chunk in range(self.token_chunks):
                first_token = token_chunk * self.tokens
                tokens = min(self.tokens, self.total_tokens - first_token)
                number = head_chunk * self.token_chunks + token_chunk
                yield number, head_chunk * self.heads, first_token, tokens


MIN_CHUNK_TOKENS = 256


def tokens_per_step(slots: int, total_tokens: int) -> int:
    """Tokens whose pairs are placed at once."""
    entries = WARP.value if total_tokens <= SHORT else 2 * WARP.value
    return max(1, entries // padded(slots, 1))


@dataclass(frozen=True)
class InvertedIndex:
    """The index of one selection.

    Attributes:
        chunks: how it is cut.
        place: the pair of each slot, -1 where the slot does not count, int32 `[N, Hk, T]`.
        pairs: token of each pair, int32 `[N * Hk * T]`, used as far as there are valid entries.
        bucket_ends: one past the last pair of each (chunk of tokens, bucket), int32.
        far: the same as `place` for far entries, -1 for others; None if not asked for.
        selected: a bit for each near block that a query selected: the first ones, then its own and those before that;
            int32 `[N, Hk]`, None if not asked for.
    """

    chunks: Chunks
    place: Tensor
    pairs: Tensor
    bucket_ends: Tensor
    far: Tensor | None = None
    selected: Tensor | None = None

    def segments(self, segment_pairs: int) -> Iterator[Segments]:
        """Cuts the buckets of every chunk into segments of at most `segment_pairs` pairs."""
        return self._cut(segment_pairs, None, None, None, 1)

    def far_segments(
        self, segment_pairs: int, cu_seqlens: Tensor, block_size: int, cu_seqlens_k: Tensor | None = None
    ) -> Iterator[Segments]:
        """As `segments`, without the pairs of near entries; bounds are as for `build_index`."""
        return self._cut(segment_pairs, self.pairs, cu_seqlens, cu_seqlens_k, block_size)

    def most_tiles(self, segment_pairs: int) -> int:
        """Upper bound of the segments of a chunk whose buckets are cut."""
        # A bucket that is cut fills a segment at least, and has at most one that is not full: twice as many at most.
        return max(1, min(self._most_of_chunk(segment_pairs), 2 * (self.chunks.pairs // segment_pairs)))

    def _most_of_chunk(self, segment_pairs: int) -> int:
        chunks = self.chunks
        return chunks.pairs // segment_pairs + min(chunks.buckets, chunks.pairs)

    def _cut(
        self,
        segment_pairs: int,
        pairs: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        block_size: int,
    ) -> Iterator[Segments]:
        chunks = self.chunks
        new: dict[str, Any] = {"dtype": torch.int32, "device": self.pairs.device}
        of_heads = chunks.token_chunks * chunks.buckets
        at_once = max(1, MAX_FLAT // of_heads)
        classes = SEGMENT_CLASSES if of_heads <= MAX_FLAT else 1
        sequences = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        given = self.bucket_ends, pairs, cu_seqlens, cu_seqlens_k
        for first in range(0, chunks.head_chunks, at_once):
            head_chunks = min(at_once, chunks.head_chunks - first)
            flat = head_chunks * of_heads
            sizes = (
                first * of_heads, flat, chunks.buckets, chunks.head_chunks, chunks.token_chunks, segment_pairs, classes,
                sequences, chunks.num_blocks, block_size,
            )  # fmt: skip
            grid = (triton.cdiv(flat, SEGMENT_BUCKETS),)
            counts = torch.empty((classes + 1) * flat, **new)
            _count_segments_kernel[grid](*given, counts, *sizes, SEGMENT_BUCKETS, **early_launch())
            # One sum over both: of the tiles only differences count.
            ends = torch.cumsum(counts, 0, dtype=torch.int32)
            del counts
            # In any chunk a bucket has a segment that is not full at most once.
            most_pairs = chunks.total_tokens * head_chunks * chunks.heads * chunks.slots
            table = torch.empty((most_pairs // segment_pairs + min(flat, most_pairs), SEGMENT_FIELDS), **new)
            _fill_segments_kernel[grid](*given, ends, table, *sizes, SEGMENT_FIELDS, SEGMENT_BUCKETS, **early_launch())
            yield Segments(
                table, ends, classes, flat, self._most_of_chunk(segment_pairs), first * chunks.token_chunks,
                [*chunks][first * chunks.token_chunks : (first + head_chunks) * chunks.token_chunks],
            )  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """The segments of some chunks, chunk after chunk; in a chunk by the classes of their pairs, the large ones first.

    Attributes:
        table: first pair, first pair of the chunk, pairs, bucket (of all), and the number of the segment among those of
            the chunk whose buckets are cut, -1 where it is alone in its bucket; int32 `[S, 5]`. The numbers of a bucket
            follow each other.
        ends: one past the last segment of each (chunk, class, bucket of the chunk); behind those, for each (chunk,
            bucket of the chunk), the same counting only the segments of buckets that are cut, on top of all segments;
            int32.
        classes: of pairs: class i has more than `segment_pairs / 2**(i + 1)`, the last one all others.
        flat: number of (chunk, bucket of the chunk).
        most_of_chunk: upper bound of the segments of a chunk, which is the grid of its main kernel.
        first_number, chunks: number of the first chunk among all, and the chunks, as `Chunks` gives them.
    """

    table: Tensor
    ends: Tensor
    classes: int
    flat: int
    most_of_chunk: int
    first_number: int
    chunks: list[tuple[int, int, int, int]]


def mark_valid(
    block_indices: Tensor, cu_seqlens: Tensor, block_size: int, cu_seqlens_k: Tensor | None = None
) -> Tensor:
    """0 for the entries of a selection that count and -1 for the others, int32 `[N, Hk, T]`; see `build_index`."""
    place = torch.empty(block_indices.shape, dtype=torch.int32, device=block_indices.device)
    _count_pairs(block_indices, cu_seqlens, cu_seqlens_k, block_size, place, None, 0, 1)
    return place


def build_index(
    block_indices: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    chunks: Chunks,
    cu_seqlens_k: Tensor | None = None,
    split: bool = False,
) -> InvertedIndex:
    """The inverted index of a selection int32 `[N, Hk, T]` of any content.

    `cu_seqlens` bounds the queries, and `cu_seqlens_k` the tokens, of which the last ones of a sequence have queries;
    None where all have. With `split` it tells far entries from near ones.
    """
    total_tokens, num_kv_heads, slots = block_indices.shape
    new: dict[str, Any] = {"dtype": torch.int32, "device": block_indices.device}
    place = torch.empty(block_indices.shape, **new)
    counts = torch.zeros(chunks.counters, **new)
    _count_pairs(
        block_indices, cu_seqlens, cu_seqlens_k, block_size, place, counts,
        chunks.num_blocks, chunks.tokens_per_run,
    )  # fmt: skip
    buckets = num_kv_heads * chunks.num_blocks
    totals = torch.empty(chunks.bucket_ends, **new)
    _start_runs_kernel[(triton.cdiv(buckets, SCAN_BUCKETS), chunks.token_chunks)](
        counts, totals, chunks.runs, buckets, SCAN_RUNS, SCAN_BUCKETS, **early_launch()
    )
    bucket_ends = torch.cumsum(totals, 0, dtype=torch.int32)
    pairs = torch.empty(block_indices.numel(), **new)
    far, selected = (torch.empty_like(place), place.new_empty(place.shape[:2])) if split else (None, None)
    _scatter_pairs_kernel[(triton.cdiv(total_tokens, chunks.tokens_per_run), num_kv_heads)](
        block_indices, cu_seqlens, cu_seqlens_k, place, counts, bucket_ends, bucket_ends.numel(), pairs, far,
        selected, total_tokens, cu_seqlens.numel() - 1, chunks.num_blocks, chunks.runs, chunks.tokens_per_run,
        num_kv_heads, slots, padded(slots, 1), block_size, tokens_per_step(slots, total_tokens), START_BLOCKS,
        num_warps=1, **early_launch(),
    )  # fmt: skip
    return InvertedIndex(chunks, place, pairs, bucket_ends, far, selected)


def _count_pairs(
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    place: Tensor,
    counts: Tensor | None,
    num_blocks: int,
    tokens_per_run: int,
) -> None:
    total_tokens, num_kv_heads, slots = block_indices.shape
    tokens = max(1, COUNT_ENTRIES // padded(slots, 1))
    _count_pairs_kernel[(triton.cdiv(total_tokens, tokens), num_kv_heads)](
        block_indices, cu_seqlens, cu_seqlens_k, place, place if counts is None else counts,
        total_tokens, cu_seqlens.numel() - 1, num_blocks, tokens_per_run,
        num_kv_heads, slots, padded(slots, 1), block_size, counts is not None, tokens, **early_launch(),
    )  # fmt: skip


@triton.jit
def _buckets(
    block, token, head, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, num_blocks, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Bucket of each entry, whether its block exists and is not in the future, and the block of its query."""
    sequence = sequence_of(token, cu_seqlens_ptr, num_sequences, 0)
    start = tl.load(bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr) + sequence)
    ahead = keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr)
    # geometry.num_eligible_blocks
    own = (token + ahead - start) // BLOCK_SIZE
    return head * num_blocks + start // BLOCK_SIZE + sequence + block, (block >= 0) & (block <= own), own


@triton.jit(do_not_specialize=["total_tokens", "num_sequences", "num_blocks", "tokens_per_run"])
def _count_pairs_kernel(
    block_indices_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    place_ptr,
    count_ptr,
    total_tokens,
    num_sequences,
    num_blocks,
    tokens_per_run,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Finds the entries that count, and counts them.

    Grid: (tile of tokens, kv head).
    Owns: place[tile, head] by plain stores; counts by atomics, whose order changes nothing.
    Invariant: after n steps, entries that repeat one of the first n slots are known.
    """
    take_over(EARLY)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    slot = tl.arange(0, SLOTS_PADDED)[None, :]
    mask_tokens = token < total_tokens
    mask = mask_tokens[:, None] & (slot < SLOTS)
    row = (token.to(tl.int64) * HEADS + head) * SLOTS
    block = tl.load(block_indices_ptr + row[:, None] + slot, mask=mask, other=-1)  # [TOKENS, SLOTS]
    token = tl.minimum(token, total_tokens - 1)[:, None]
    bucket, valid, _ = _buckets(
        block, token, head, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, num_blocks, BLOCK_SIZE
    )
    for i in range(SLOTS - 1):
        other = tl.load(block_indices_ptr + row + i, mask=mask_tokens, other=-1)[:, None]
        valid = valid & ((block != other) | (slot <= i))
    tl.store(place_ptr + row[:, None] + slot, tl.where(valid, 0, -1), mask=mask)
    if COUNT:
        at = (token // tokens_per_run).to(tl.int64) * (HEADS * num_blocks) + bucket
        tl.atomic_add(count_ptr + at, 1, mask=valid & mask, sem="relaxed")


@triton.jit(do_not_specialize=["runs", "buckets"])
def _start_runs_kernel(
    counter_ptr, total_ptr, runs, buckets, RUNS: tl.constexpr, BUCKETS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Turns the counts of the runs of each bucket into the places in it where they begin, and sums them up.

    Grid: (tile of buckets, chunk of tokens).
    Owns: the counters of its buckets in the chunk, and their totals.
    Invariant: after n steps, `start` is where the run behind the first n tiles of runs begins.
    """
    take_over(EARLY)
    bucket = tl.program_id(0) * BUCKETS + tl.arange(0, BUCKETS)
    chunk = tl.program_id(1).to(tl.int64)
    mask = bucket < buckets
    start = bucket * 0
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        counters = counter_ptr + (chunk * runs + run)[:, None] * buckets + bucket[None, :]
        there = (run < runs)[:, None] & mask[None, :]
        count = tl.load(counters, mask=there, other=0)  # [RUNS, BUCKETS]
        tl.store(counters, start[None, :] + tl.cumsum(count, 0) - count, mask=there)
        start += tl.sum(count, 0)
    tl.store(total_ptr + chunk * buckets + bucket, start, mask=mask)


@triton.jit
def is_near(block, own):
    """Which entries are near, of those that count; `own` is the block of the query itself. Shapes broadcast.

    The newest ones are those from geometry.first_local_block on.
    """
    return (block < NEAR_INIT) | (block > own - NEAR_LOCAL)


@triton.jit
def near_bits(block, own, mask):
    """A bit for each near entry, which says which of the near blocks it is; see `InvertedIndex.selected`."""
    number = tl.where(block < NEAR_INIT, block, NEAR_INIT + own - block)
    return tl.where(mask, 1 << tl.where(mask, number, 0), 0)


@triton.jit
def _entries(
    block_indices_ptr, place_ptr, token, slot, end, head, HEADS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Block and place of entries of tokens before `end`, -1 for those that are not there. Shapes are the same."""
    mask = (token < end) & (slot < SLOTS)
    offs = (token.to(tl.int64) * HEADS + head) * SLOTS + slot
    block = tl.load(block_indices_ptr + offs, mask=mask, other=-1)
    return block, tl.load(place_ptr + offs, mask=mask, other=-1)


@triton.jit
def _ranks(name, ENTRIES: tl.constexpr):
    """Of int32 names of entries: how many of the same stand before each, and how many behind; by one warp."""
    if INTERPRETED or ENTRIES > WARP:
        entry = tl.arange(0, ENTRIES)
        # Both are counted at once: those before in the low half of a number, those behind in the high half.
        one = tl.where(entry[None, :] < entry[:, None], 1, tl.where(entry[None, :] > entry[:, None], 1 << 16, 0))
        others = tl.sum(tl.where(name[:, None] == name[None, :], one, 0), 1)
        return others % (1 << 16), others >> 16
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 same, part, lanes;
        match.any.sync.b32 same, $2, 0xffffffff;
        mov.u32 lanes, %lanemask_lt;
        and.b32 part, same, lanes;
        popc.b32 $0, part;
        mov.u32 lanes, %lanemask_gt;
        and.b32 part, same, lanes;
        popc.b32 $1, part;
        }""",
        "=r,=r,r", [name], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_ends", "total_tokens", "num_sequences", "num_blocks", "runs", "tokens_per_run"])
def _scatter_pairs_kernel(
    block_indices_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    place_ptr,
    counter_ptr,
    bucket_end_ptr,
    num_ends,
    pairs_ptr,
    far_ptr,
    selected_ptr,
    total_tokens,
    num_sequences,
    num_blocks,
    runs,
    tokens_per_run,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    START_BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Writes the pairs of a run to their places, in the order of their tokens.

    Grid: (run of all tokens, kv head).
    Owns: the pairs and places of the run, and its counters, which nobody else touches; and a share of `pairs` as far as
        it is behind all pairs: zeros, so that an index that is saved has nothing undefined in it. With `far_ptr`, also
        what `InvertedIndex` says of far and of near entries.
    Invariant: after n steps of the first loop, the counters of the first n tiles of blocks are places among all pairs.
        After a step of the second, each counter of the run stands behind the pairs written so far.
    """
    take_over(EARLY)
    run, head = tl.program_id(0), tl.program_id(1)
    buckets = HEADS * num_blocks
    counter_ptr += run.to(tl.int64) * buckets
    first_row = (run // runs).to(tl.int64) * buckets
    for first_block in range(0, num_blocks, START_BLOCKS):
        # Pairs begin where those of the bucket before end. This also brings the counters near.
        block = first_block + tl.arange(0, START_BLOCKS)
        bucket, mask = head * num_blocks + block, block < num_blocks
        row = first_row + bucket
        start = tl.load(bucket_end_ptr + row - 1, mask=mask & (row > 0), other=0)
        tl.store(counter_ptr + bucket, tl.load(counter_ptr + bucket, mask=mask, other=0) + start, mask=mask)
    tl.debug_barrier()
    ENTRIES: tl.constexpr = TOKENS * SLOTS_PADDED
    entry = tl.arange(0, ENTRIES)
    slot = entry % SLOTS_PADDED
    begin = run * tokens_per_run
    end = tl.minimum(begin + tokens_per_run, total_tokens)
    token = begin + entry // SLOTS_PADDED
    block_next, place_next = _entries(block_indices_ptr, place_ptr, token, slot, end, head, HEADS, SLOTS)
    for first in range(begin, end, TOKENS):
        # Loaded one step ahead, as a step is shorter than the way to memory.
        block, valid = block_next, place_next == 0
        block_next, place_next = _entries(block_indices_ptr, place_ptr, token + TOKENS, slot, end, head, HEADS, SLOTS)
        bucket, _, own = _buckets(
            block, tl.minimum(token, total_tokens - 1), head,
            cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, num_blocks, BLOCK_SIZE,
        )  # fmt: skip
        at = tl.load(counter_ptr + bucket, mask=valid, other=0)
        last = valid
        if TOKENS > 1:
            # Entries of this step that share a counter.
            before, behind = _ranks(tl.where(valid, bucket, -1 - entry), ENTRIES)
            at += before
            last = valid & (behind == 0)
        tl.store(pairs_ptr + at, token, mask=valid)
        offs = (token.to(tl.int64) * HEADS + head) * SLOTS + slot
        tl.store(place_ptr + offs, at, mask=valid)
        if far_ptr is not None:
            near = is_near(block, own)
            tl.store(far_ptr + offs, tl.where(valid & ~near, at, -1), mask=(token < end) & (slot < SLOTS))
            bits = tl.reshape(near_bits(block, own, valid & near), (TOKENS, SLOTS_PADDED))
            query = first + tl.arange(0, TOKENS)
            tl.store(selected_ptr + query.to(tl.int64) * HEADS + head, tl.sum(bits, 1), mask=query < end)
        # The reads of this step come before its writes, and these before the reads of the next one.
        tl.debug_barrier()
        tl.store(counter_ptr + bucket, at + 1, mask=last)
        tl.debug_barrier()
        token += TOKENS
    entries = total_tokens.to(tl.int64) * (HEADS * SLOTS)
    share = tl.cdiv(entries, tl.num_programs(0) * HEADS)
    share_begin = share * (run * HEADS + head)
    share_end = tl.minimum(share_begin + share, entries)
    share_begin = tl.maximum(share_begin, tl.load(bucket_end_ptr + num_ends - 1))
    for behind in range(share_begin, share_end, ENTRIES):
        tl.store(pairs_ptr + behind + entry, 0, mask=behind + entry < share_end)


@triton.jit
def chunk_pairs(flat, bucket_end_ptr, buckets, head_chunks, token_chunks, mask):
    """Of each (chunk, bucket of the chunk): bucket (of all), first pair, one past the last, first of the chunk."""
    chunk = flat // buckets
    token_chunk = chunk % token_chunks
    first_bucket = chunk // token_chunks * buckets
    bucket = first_bucket + flat % buckets
    first_row = token_chunk.to(tl.int64) * (head_chunks * buckets)
    row, chunk_row = first_row + bucket, first_row + first_bucket
    # Pairs begin where those of the bucket before end.
    begin = tl.load(bucket_end_ptr + row - 1, mask=mask & (row > 0), other=0)
    end = tl.load(bucket_end_ptr + row, mask=mask, other=0)
    first = tl.load(bucket_end_ptr + chunk_row - 1, mask=mask & (chunk_row > 0), other=0)
    return bucket, begin, end, first


@triton.constexpr_function
def _bits(number):
    return int(number).bit_length()


@triton.jit
def _first_far(
    bucket, begin, end, pairs_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, num_blocks, mask,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The first far pair of each bucket, `end` where there is none."""
    bounds_ptr = bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr)
    key_start, _, sequence = block_bounds(bucket % num_blocks, bounds_ptr, num_sequences, BLOCK_SIZE)
    in_sequence = (key_start - tl.load(bounds_ptr + sequence)) // BLOCK_SIZE
    # The first token of whose newest blocks it is none.
    first_token = key_start + NEAR_LOCAL * BLOCK_SIZE - keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr)
    # Invariant: pairs before `begin` are near; of those behind, fewer than the last step took are.
    STEPS: tl.constexpr = _bits(NEAR_LOCAL * BLOCK_SIZE)
    for i in tl.static_range(STEPS):
        last = begin + (1 << (STEPS - 1 - i)) - 1
        there = mask & (last < end)
        near = there & (tl.load(pairs_ptr + last, mask=there, other=0) < first_token)
        begin = tl.where(near, last + 1, begin)
    return tl.where(in_sequence < NEAR_INIT, end, begin)


@triton.jit
def _pairs_to_cut(
    flat, bucket_end_ptr, pairs_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, buckets, head_chunks, token_chunks,
    num_sequences, num_blocks, mask, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """`chunk_pairs`; with `pairs_ptr`, beginning with the first far pair."""
    bucket, begin, end, first = chunk_pairs(flat, bucket_end_ptr, buckets, head_chunks, token_chunks, mask)
    if pairs_ptr is not None:
        begin = _first_far(
            bucket, begin, end, pairs_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, num_blocks, mask, BLOCK_SIZE
        )
    return bucket, begin, end, first


@triton.jit
def _cut_pairs(pairs, segment_pairs, classes):
    """Full segments of each bucket, the pairs of its last segment if that is not full, and the class of that."""
    full, rest = pairs // segment_pairs, pairs % segment_pairs
    rest_class = rest * 0
    for i in range(1, classes):
        rest_class += (rest <= (segment_pairs >> i)).to(tl.int32)
    return full, rest, rest_class


@triton.jit(
    do_not_specialize=[
        "first_flat", "num_flat", "buckets", "head_chunks", "token_chunks", "segment_pairs", "classes", "num_sequences",
        "num_blocks",
    ]
)  # fmt: skip
def _count_segments_kernel(
    bucket_end_ptr,
    pairs_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    count_ptr,
    first_flat,
    num_flat,
    buckets,
    head_chunks,
    token_chunks,
    segment_pairs,
    classes,
    num_sequences,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Counts the segments of each (chunk, bucket of the chunk), of all pairs or, with `pairs_ptr`, of the far ones.

    Grid: (tile of them,).
    Owns: their counts, of the segments of each class and of those of buckets that are cut; see `Segments`.
    Invariant: after n steps, the counts of the first n classes are written.
    """
    take_over(EARLY)
    flat = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = flat < num_flat
    _, begin, end, _ = _pairs_to_cut(
        first_flat + flat, bucket_end_ptr, pairs_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, buckets, head_chunks,
        token_chunks, num_sequences, num_blocks, mask, BLOCK_SIZE,
    )  # fmt: skip
    full, rest, rest_class = _cut_pairs(end - begin, segment_pairs, classes)
    at = flat // buckets * (classes * buckets) + flat % buckets
    for i in range(classes):
        of_class = tl.where(rest_class == i, tl.minimum(rest, 1), 0) + tl.where(i == 0, full, 0)
        tl.store(count_ptr + at + i * buckets, of_class, mask=mask)
    count = full + tl.minimum(rest, 1)
    tl.store(count_ptr + classes * num_flat + flat, tl.where(count > 1, count, 0), mask=mask)


@triton.jit(
    do_not_specialize=[
        "first_flat", "num_flat", "buckets", "head_chunks", "token_chunks", "segment_pairs", "classes", "num_sequences",
        "num_blocks",
    ]
)  # fmt: skip
def _fill_segments_kernel(
    bucket_end_ptr,
    pairs_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    segment_end_ptr,
    table_ptr,
    first_flat,
    num_flat,
    buckets,
    head_chunks,
    token_chunks,
    segment_pairs,
    classes,
    num_sequences,
    num_blocks,
    BLOCK_SIZE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Writes the segments of each (chunk, bucket of the chunk), of the pairs that `_count_segments_kernel` counts.

    Grid: (tile of them,).
    Owns: their rows of the table.
    Invariant: after n steps, the first n segments of each are written.
    """
    take_over(EARLY)
    flat = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = flat < num_flat
    bucket, begin, end, first_of_chunk = _pairs_to_cut(
        first_flat + flat, bucket_end_ptr, pairs_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, buckets, head_chunks,
        token_chunks, num_sequences, num_blocks, mask, BLOCK_SIZE,
    )  # fmt: skip
    full, rest, rest_class = _cut_pairs(end - begin, segment_pairs, classes)
    count = full + tl.minimum(rest, 1)
    at = flat // buckets * (classes * buckets) + flat % buckets
    first = tl.load(segment_end_ptr + at, mask=mask, other=0) - tl.where(rest_class == 0, count, full)
    last = tl.load(segment_end_ptr + at + rest_class * buckets, mask=mask, other=0) - 1
    tile_end_ptr = segment_end_ptr + classes * num_flat
    first_tile = tl.load(tile_end_ptr + flat, mask=mask, other=0) - count
    first_tile -= tl.load(tile_end_ptr + flat // buckets * buckets - 1, mask=mask, other=0)
    for i in range(0, tl.max(count, 0)):
        row = table_ptr + tl.where(i < full, first + i, last).to(tl.int64) * FIELDS
        here = mask & (i < count)
        pair = begin + i * segment_pairs
        tl.store(row, pair, mask=here)
        tl.store(row + 1, first_of_chunk, mask=here)
        tl.store(row + 2, tl.minimum(end - pair, segment_pairs), mask=here)
        tl.store(row + 3, bucket, mask=here)
        tl.store(row + 4, tl.where(count > 1, first_tile + i, -1), mask=here)
