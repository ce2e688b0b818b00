"""Sums over the slots of a selection: partial softmaxes into one, partial gradients into one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .inverted_index import InvertedIndex
from .primitives import (
    LN_2,
    LOG2_E,
    finite_maximum,
    load_rows,
    padded,
    padded_dim,
    store_rows,
    wait_for_the_kernel_before,
)
from .tuning import early_launch, has_hopper_kernels, runs_gluon

# Elements that a program of one warp holds. All of its loads are in flight at once: at 65,536 tokens of 32/8 heads on
# an H200 one row by 16 slots with one warp took 2.25 ms, with two warps 3.9, rows that loop over their slots 3.5.
MERGE_TILE = 2048
# Slots for which there is a kernel for Hopper: it has code for each.
MOST_HOPPER_SLOTS = 128


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
    far: Tensor | None = None,
) -> None:
    """Merges the partial results of a chunk, `[pairs, G, parts, D]`, into its rows of out and lse.

    With `partial_lse` they are softmaxes, merged by their lse; without, they are summed and multiplied with `scale`.
    Slots that are not valid are not read. With `far`, of `launch_near`, they are those of far entries, and out and lse
    hold those of the near ones.
    """
    num_heads, dim = out.shape[1:]
    chunks = index.chunks
    group = num_heads // chunks.num_kv_heads
    first_row = (first_token // chunks.tokens * chunks.num_kv_heads + first_head) * chunks.num_blocks
    if partial_lse is not None and lse is not None and _takes_hopper_kernel(out, chunks.slots):
        # Not every version of Triton has what it needs.
        from .merge_hopper import launch_merge_hopper

        launch_merge_hopper(partial, partial_lse, index, out, lse, first_row, first_head, first_token, tokens, far)
        return
    tile = min(padded(chunks.slots * parts, 1), max(1, MERGE_TILE // padded(dim)))
    rows = max(1, MERGE_TILE // (padded(dim) * tile))
    _merge_slots_kernel[(triton.cdiv(tokens * chunks.heads * group, rows),)](
        partial, partial if partial_lse is None else partial_lse,
        index.place if far is None else far, index.bucket_ends,
        out, out if lse is None else lse, first_row, first_token, first_head, tokens, chunks.heads * group, scale,
        num_heads, group, chunks.slots, padded(chunks.slots, 1), parts,
        dim, partial_lse is not None, far is not None, rows, tile, num_warps=1, **early_launch(),
    )  # fmt: skip


def _takes_hopper_kernel(out: Tensor, slots: int) -> bool:
    """Whether `merge_hopper` merges the softmaxes of `out`."""
    return slots <= MOST_HOPPER_SLOTS and has_hopper_kernels(out.shape[2], out.shape[2], out.dtype) and runs_gluon()


@triton.jit
def _load_slots(
    partial_ptr, places, first_pair, in_group, mask, first,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial results of rows from a slot (or a part of one) on, [ROWS, TILE, DIM], their numbers, which are there."""
    offs = tl.arange(0, padded_dim(DIM))[None, None, :]
    part = first + tl.arange(0, TILE)[None, :]
    place = tl.load(places[:, None] + part // PARTS, mask=mask[:, None] & (part < SLOTS * PARTS), other=-1)
    at = (place - first_pair).to(tl.int64) * GROUP + in_group[:, None]
    there = place >= 0
    offs_rows = ((at * PARTS + part % PARTS) * DIM)[:, :, None]
    return tl.load(partial_ptr + offs_rows + offs, mask=there[:, :, None] & (offs < DIM), other=0.0), at, there


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
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sums the partial results of each row, a (token, query head), over its valid slots; ADD: and what it has already.

    Grid: (tile of rows of the chunk,).
    Owns: out[row] and lse[row], by plain stores.
    Invariant: after n steps, `total` is the weighted sum of the valid ones among the first n tiles of slots.
    """
    wait_for_the_kernel_before(EARLY)
    PADDED: tl.constexpr = padded_dim(DIM)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < tokens.to(tl.int64) * chunk_heads
    token = first_token + row // chunk_heads
    head = first_head * GROUP + row % chunk_heads
    first_pair = tl.load(bucket_end_ptr + first_row - 1, mask=first_row > 0, other=0)
    places = place_ptr + (token * (NUM_HEADS // GROUP) + head // GROUP) * SLOTS
    in_group = head % GROUP
    given = partial_ptr, places, first_pair, in_group, mask
    # Asked for before the lse, which wait for the same places.
    tile, at, there = _load_slots(*given, 0, GROUP, SLOTS, PARTS, DIM, TILE)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    if SOFTMAX:
        slot = tl.arange(0, SLOTS_PADDED)[None, :]
        place = tl.load(places[:, None] + slot, mask=mask[:, None] & (slot < SLOTS), other=-1)  # [ROWS, SLOTS]
        at_lse = (place - first_pair).to(tl.int64) * GROUP + in_group[:, None]
        partial_lse = tl.load(partial_lse_ptr + at_lse, mask=place >= 0, other=-float("inf"))
        largest = tl.max(partial_lse, 1)
        if ADD:
            own_lse = tl.load(lse_ptr + token * NUM_HEADS + head, mask=mask, other=-float("inf"))
            own = load_rows(out_ptr, (token * NUM_HEADS + head) * DIM, mask, DIM, PADDED)
            largest = tl.maximum(largest, own_lse)
        largest = finite_maximum(largest)
        exp_sum = tl.sum(tl.exp2((partial_lse - largest[:, None]) * LOG2_E), 1)
        if ADD:
            exp_sum += tl.exp2((own_lse - largest) * LOG2_E)
        lse = largest + tl.log2(exp_sum) * LN_2
        normaliser = finite_maximum(lse)
        tl.store(lse_ptr + token * NUM_HEADS + head, lse, mask=mask)
        if ADD:
            total += own.to(tl.float32) * tl.exp2((own_lse - normaliser) * LOG2_E)[:, None]
    for first in tl.static_range(0, SLOTS * PARTS, TILE):
        if first > 0:
            tile, at, there = _load_slots(*given, first, GROUP, SLOTS, PARTS, DIM, TILE)
        tile = tile.to(tl.float32)
        if SOFTMAX:
            partial_lse = tl.load(partial_lse_ptr + at, mask=there, other=-float("inf"))
            weight = tl.exp2((partial_lse - normaliser[:, None]) * LOG2_E)
            tile = tile * weight[:, :, None]
        total += tl.sum(tile, 1)
    if not SOFTMAX:
        total *= scale
    store_rows(out_ptr, (token * NUM_HEADS + head) * DIM, mask, total, DIM, PADDED)
