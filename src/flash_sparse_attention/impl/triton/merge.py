"""Sums over the slots of a selection: partial softmaxes into one, partial gradients into one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .inverted_index import InvertedIndex
from .primitives import LN_2, LOG2_E, padded, padded_dim, store_rows

# Elements that a program of one warp holds. All of its loads are in flight at once: at 65,536 tokens of 32/8 heads on
# an H200 one row by 16 slots with one warp took 2.25 ms, with two warps 3.9, rows that loop over their slots 3.5.
MERGE_TILE, MERGE_STEPS = 2048, 4


def launch_merge(
    partial: Tensor,
    partial_lse: Tensor | None,
    index: InvertedIndex,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    first_head: int,
    first_token: int,
    tokens: int,
    parts: int = 1,
) -> None:
    """Merges the partial results of a chunk, `[pairs, G, parts, D]`, into its rows of out and lse.

    With `partial_lse` they are softmaxes, merged by their lse; without, they are summed and multiplied with `scale`.
    Slots that are not valid are not read.
    """
    num_heads, dim = out.shape[1:]
    chunks = index.chunks
    group = num_heads // chunks.num_kv_heads
    tile = min(padded(chunks.slots * parts, 1), max(1, MERGE_TILE // padded(dim)))
    rows = max(1, MERGE_TILE // (padded(dim) * tile))
    first_row = (first_token // chunks.tokens * chunks.num_kv_heads + first_head) * chunks.num_blocks
    steps = MERGE_STEPS
    _merge_slots_kernel[(triton.cdiv(tokens * chunks.heads * group, rows * steps),)](
        partial, partial if partial_lse is None else partial_lse, index.place, index.bucket_ends,
        out, out if lse is None else lse, first_row, first_token, first_head, tokens, chunks.heads * group, scale,
        num_heads, group, chunks.slots, padded(chunks.slots, 1), parts,
        dim, partial_lse is not None, rows, steps, tile, num_warps=1,
    )  # fmt: skip


@triton.jit
def _load_slots(
    partial_ptr, place_ptr, first_pair, row, mask, first, first_token, first_head, chunk_heads,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile of the partial results of rows, [ROWS, TILE, DIM], where their lse stand, and which of them are there."""
    offs = tl.arange(0, padded_dim(DIM))[None, None, :]
    token, head = first_token + row // chunk_heads, first_head * GROUP + row % chunk_heads
    places = place_ptr + (token * (NUM_HEADS // GROUP) + head // GROUP) * SLOTS
    part = first + tl.arange(0, TILE)[None, :]
    place = tl.load(places[:, None] + part // PARTS, mask=mask[:, None] & (part < SLOTS * PARTS), other=-1)
    at = (place - first_pair).to(tl.int64) * GROUP + (head % GROUP)[:, None]
    there = place >= 0
    offs_rows = ((at * PARTS + part % PARTS) * DIM)[:, :, None]
    tile = tl.load(partial_ptr + offs_rows + offs, mask=there[:, :, None] & (offs < DIM), other=0.0)
    return tile, at, there


@triton.jit(do_not_specialize=["first_row", "first_token", "first_head", "tokens", "chunk_heads"])
def _merge_slots_kernel(
    partial_ptr,
    partial_lse_ptr,
    place_ptr,
    bucket_end_ptr,
    out_ptr,
    lse_ptr,
    first_row,
    first_token,
    first_head,
    tokens,
    chunk_heads,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums the partial results of each row, a (token, query head), over its valid slots.

    Grid: (STEPS tiles of rows of the chunk,).
    Owns: out[row] and lse[row], by plain stores.
    Invariant: after n steps, `total` is the weighted sum of the valid ones among the first tiles of slots, of which
        each row has TILES; those of n // TILES tiles of rows are stored.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    TILES: tl.constexpr = (SLOTS * PARTS + TILE - 1) // TILE
    num_rows = tokens.to(tl.int64) * chunk_heads
    begin = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    row_next = begin + tl.arange(0, ROWS)
    mask_next = row_next < num_rows
    first_pair = tl.load(bucket_end_ptr + first_row - 1, mask=first_row > 0, other=0)
    tile_next, at_next, there_next = _load_slots(
        partial_ptr, place_ptr, first_pair, row_next, mask_next, 0, first_token, first_head, chunk_heads,
        NUM_HEADS, GROUP, SLOTS, PARTS, DIM, TILE,
    )  # fmt: skip
    if SOFTMAX:
        all_rows = begin + tl.arange(0, ROWS * STEPS)
        mask = all_rows < num_rows
        token, head = first_token + all_rows // chunk_heads, first_head * GROUP + all_rows % chunk_heads
        slot = tl.arange(0, SLOTS_PADDED)[None, :]
        places = place_ptr + (token * (NUM_HEADS // GROUP) + head // GROUP) * SLOTS
        place = tl.load(places[:, None] + slot, mask=mask[:, None] & (slot < SLOTS), other=-1)  # [ROWS * STEPS, SLOTS]
        at = (place - first_pair).to(tl.int64) * GROUP + (head % GROUP)[:, None]
        partial_lse = tl.load(partial_lse_ptr + at, mask=place >= 0, other=-float("inf"))
        largest = tl.max(partial_lse, 1)
        lse_ptrs = lse_ptr + token * NUM_HEADS + head
        # A row without a block keeps -inf, and any finite maximum serves it.
        largest = tl.where(largest == -float("inf"), 0.0, largest)
        lse = largest + tl.log2(tl.sum(tl.exp2((partial_lse - largest[:, None]) * LOG2_E), 1)) * LN_2
        tl.store(lse_ptrs, lse, mask=mask)
        normalisers = tl.where(lse == -float("inf"), 0.0, lse)
    for i in tl.static_range(0, STEPS * TILES):
        tile, at, there, row, mask = tile_next, at_next, there_next, row_next, mask_next
        if i + 1 < STEPS * TILES:
            # Asked for before this one is summed up, as the store of its sum would have to come first.
            row_next = begin + (i + 1) // TILES * ROWS + tl.arange(0, ROWS)
            mask_next = row_next < num_rows
            tile_next, at_next, there_next = _load_slots(
                partial_ptr, place_ptr, first_pair, row_next, mask_next, (i + 1) % TILES * TILE, first_token,
                first_head, chunk_heads, NUM_HEADS, GROUP, SLOTS, PARTS, DIM, TILE,
            )  # fmt: skip
        at_out = (first_token + row // chunk_heads) * NUM_HEADS + first_head * GROUP + row % chunk_heads
        if i % TILES == 0:
            total = tl.zeros([ROWS, PADDED], tl.float32)
            if SOFTMAX:
                normaliser = _of_step(normalisers, i // TILES, ROWS, STEPS)
        tile = tile.to(tl.float32)
        if SOFTMAX:
            partial_lse = tl.load(partial_lse_ptr + at, mask=there, other=-float("inf"))
            tile *= tl.exp2((partial_lse - normaliser[:, None]) * LOG2_E)[:, :, None]
        total += tl.sum(tile, 1)
        if (i + 1) % TILES == 0:
            if not SOFTMAX:
                total *= scale
            store_rows(out_ptr, at_out * DIM, mask, total, DIM, PADDED)


@triton.jit
def _of_step(x, i, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Those of the i-th ROWS of [ROWS * STEPS] values, none of which is infinite."""
    x = tl.reshape(x, [STEPS, ROWS])
    return tl.sum(tl.where(tl.arange(0, STEPS)[:, None] == i, x, 0.0), 0)
