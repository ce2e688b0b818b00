"""The merge of partial softmaxes by programs that compute the near ones themselves; see `inverted_index` for *near*.

    rows of a tile         ######                    ######      near blocks of neighbouring tokens: nearly the same, so
    (token, head)          ######                  ########      tiles of rows attend to them as in `interval`, and each
                           ######                  ########      row leaves out what it did not select
                          block 0  .  .  .  . own - 1, own
                                   `- far -'
                                 partial results of the main kernel, merged by their lse

Of a selection as NSA makes it the partial results of three slots are neither written nor read.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inverted_index import NEAR_INIT, NEAR_LOCAL, InvertedIndex, is_near
from .primitives import (
    LN_2,
    LOG2_E,
    bounds_of_keys,
    exp_shifted,
    load_rows,
    padded,
    padded_dim,
    past_of,
    store_rows,
    tile_of_rows,
)

# Rows and keys of a tile, warps, stages of the loop over keys, and registers of a thread at most (None: no bound).
ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 1
REGISTERS: int | None = 168
# Loads of 16 bytes that a thread has in flight while partial results are merged: each of another slot of its row.
LOADS = 16
# Of the bits of the near blocks that a row selected, those of the first blocks.
INIT_BITS = tl.constexpr((1 << NEAR_INIT.value) - 1)


def launch_merge_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    index: InvertedIndex,
    partial: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    first_head: int,
    first_token: int,
    tokens: int,
) -> None:
    """Rows of out and lse of a chunk: near entries by q, k and v, the others by their partial results `[pairs, G, Dv]`.

    Partial results of near entries are not read. `scale` is positive; bounds are as for `build_index`.
    """
    (_, num_heads, dim_k), dim_v, chunks = q.shape, v.shape[2], index.chunks
    group, num_sequences = num_heads // chunks.num_kv_heads, cu_seqlens.numel() - 1
    rows, keys = _tile(q.dtype, max(dim_k, dim_v), block_size)
    step_slots, step_rows = _step(out, chunks.slots, rows)
    # The bucket that is the first of the chunk.
    first_bucket = (first_token // chunks.tokens * chunks.num_kv_heads + first_head) * chunks.num_blocks
    # Ids of the tiles that may have rows of the chunk; see `sequence_of`.
    first_tile = first_token * group // rows
    tiles = ((first_token + tokens) * group - 1) // rows + num_sequences - first_tile
    options: dict[str, Any] = {"num_warps": WARPS}
    if REGISTERS is not None and torch.version.hip is None and q.dtype != torch.float32:
        options["maxnreg"] = REGISTERS
    _merge_near_kernel[(tiles, chunks.heads)](
        q, k, v, block_indices, index.place, index.bucket_ends, partial, partial_lse, cu_seqlens, cu_seqlens_k,
        out, lse, num_sequences, first_tile, first_bucket, first_token, first_token + tokens, first_head, scale,
        q.stride(0), k.stride(0), v.stride(0), num_heads, group, chunks.slots, padded(chunks.slots, 1), dim_k, dim_v,
        block_size, rows, keys, STAGES, step_rows, step_slots, **options,
    )  # fmt: skip


def _tile(dtype: torch.dtype, dim: int, block_size: int) -> tuple[int, int]:
    """Rows and keys of a tile: what fits in registers."""
    rows, keys = (ROWS, KEYS) if dim <= 128 else (32, 32)
    if dtype == torch.float32:
        rows, keys = 32 if dim <= 128 else 16, 16
    return rows, min(keys, padded(block_size))


def _step(out: Tensor, slots: int, rows: int) -> tuple[int, int]:
    """Slots and rows that are merged at once: as many rows as threads have 16 bytes of each, a thread all slots."""
    at_once = 32 * WARPS * 16 // out.element_size()
    return min(padded(slots, 1), LOADS), min(rows, max(1, at_once // padded(out.shape[2])))


@triton.jit
def _some_rows(first_row, lane_begin, lane_end, first, lane, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows `lane`, below ROWS, from the row `first` of the tile on, a multiple of ROWS: the token, counted from
    that of the tile's first row, the head of the group, and whether they are there."""
    mask = (first + lane >= lane_begin) & (first + lane < lane_end)
    if ROWS % GROUP == 0:
        # The same, as the first row is a multiple of ROWS too, but known when the kernel is compiled.
        return first // GROUP + lane // GROUP, lane % GROUP, mask
    row = first_row % GROUP + first + lane
    return row // GROUP, row % GROUP, mask


@triton.jit
def _entries(
    block_indices_ptr, place_ptr, first_position, token, slot, mask,
    HEADS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Of the entries of rows their blocks, which are near, and the place of those that are far, -1 of the others.

    Entries that are not valid are neither. Shapes of `token`, `slot` and `mask` broadcast.
    """
    at = token * (HEADS * SLOTS) + slot
    mask = mask & (slot < SLOTS)
    place = tl.load(place_ptr + at, mask=mask, other=-1)
    block = tl.load(block_indices_ptr + at, mask=mask, other=0)
    near = is_near(block, (first_position + token) // BLOCK_SIZE)
    return block, near & (place >= 0), tl.where(near, -1, place)


@triton.jit
def _near_blocks(block, near, own):
    """Which near blocks each row selected, a bit each: the first ones, then its own and those before that."""
    number = tl.where(block < NEAR_INIT, block, NEAR_INIT + own[:, None] - block)
    return tl.sum(tl.where(near, 1 << tl.where(near, number, 0), 0), 1)


@triton.jit
def _finite(largest):
    """A maximum to subtract: any finite one serves a row that has nothing, whose maximum is -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def _lse(lse_a, lse_b):
    """log(exp(lse_a) + exp(lse_b))"""
    largest = _finite(tl.maximum(lse_a, lse_b))
    return largest + tl.log2(tl.exp2((lse_a - largest) * LOG2_E) + tl.exp2((lse_b - largest) * LOG2_E)) * LN_2


@triton.jit
def _attend_near(
    q, k_ptr, v_ptr, selected, position, oldest, newest, scale,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The softmax of each row over the near blocks that it selected: outputs, their factor, and lse.

    `position` is that of a row in its sequence, `oldest` and `newest` the bounds of all, `selected` of `_near_blocks`.
    """
    EXACT: tl.constexpr = q.dtype == tl.float32
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    # Tiles of keys: those of the first blocks, if a row selected one, then those of the newest blocks of all rows.
    INIT: tl.constexpr = NEAR_INIT * PARTS
    first_local = tl.maximum(oldest // BLOCK_SIZE - (NEAR_LOCAL - 1), NEAR_INIT)
    local_parts = tl.maximum(newest // BLOCK_SIZE + 1 - first_local, 0) * PARTS
    begin = tl.where(tl.max(selected & INIT_BITS, 0) > 0, 0, INIT)
    end = INIT + tl.where(tl.max(selected >> NEAR_INIT, 0) > 0, local_parts, 0)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, padded_dim(DIM_V)], tl.float32)
    for part in tl.range(begin, end, num_stages=STAGES):
        block = part // PARTS
        if NEAR_INIT > 0:
            block = tl.where(part < INIT, block, first_local + block - NEAR_INIT)
        first_key = block * BLOCK_SIZE + part % PARTS * KEYS
        lane = tl.arange(0, KEYS)
        key = first_key + lane
        there = key <= newest
        first_key = first_key.to(tl.int64)
        k = load_rows(k_ptr + first_key * STRIDE_K, lane * STRIDE_K, there, DIM_K, padded_dim(DIM_K))  # [KEYS, DK]
        v = load_rows(v_ptr + first_key * STRIDE_V, lane * STRIDE_V, there, DIM_V, padded_dim(DIM_V))  # [KEYS, DV]
        # Rows see no key of a block that is not theirs; nor of one in the future, whatever its number is here.
        number = tl.where(part < INIT, block, NEAR_INIT + position // BLOCK_SIZE - block)
        chosen = (selected >> tl.minimum(tl.maximum(number, 0), NEAR_INIT + NEAR_LOCAL)) & 1
        last_key = tl.where(chosen != 0, tl.minimum(position, block * BLOCK_SIZE + (BLOCK_SIZE - 1)), -1)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(key[None, :] <= last_key[:, None], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        finite = _finite(larger)
        p = exp_shifted(scores, scale, finite, EXACT)
        shrink = tl.exp2((largest - finite) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = larger
    total = tl.where(total == 0.0, 1.0, total)
    return out, 1.0 / total, largest + tl.log2(total) * LN_2


@triton.jit
def _add_far(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, block_indices_ptr, place_ptr,
    first_position, first_pair, first_row, lane_begin, lane_end,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STEP_ROWS: tl.constexpr, STEP_SLOTS: tl.constexpr,
):  # fmt: skip
    """Adds the far partial results of a tile of rows to `out`, weighted by their lse and that of all, `lse`."""
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    PADDED: tl.constexpr = padded_dim(DIM)
    offs = tl.arange(0, PADDED)[None, :]
    lane = tl.arange(0, STEP_ROWS)
    # Entries in one dimension, rows side by side: so threads that are side by side have other rows, not other slots.
    lane_of_entry = tl.arange(0, STEP_SLOTS * STEP_ROWS) % STEP_ROWS
    slot = tl.arange(0, STEP_SLOTS * STEP_ROWS) // STEP_ROWS
    given = block_indices_ptr, place_ptr, first_position
    rows = first_row, lane_begin, lane_end
    token_next, g_next, mask_next = _some_rows(*rows, 0, lane_of_entry, GROUP, STEP_ROWS)
    _, _, far_next = _entries(*given, token_next, slot, mask_next, HEADS, SLOTS, BLOCK_SIZE)
    for first in tl.range(0, lane_end, STEP_ROWS, num_stages=1):
        # Loaded one step ahead, as partial results cannot be asked for before their places are there.
        token, g, mask, far = token_next, g_next, mask_next, far_next
        token_next, g_next, mask_next = _some_rows(*rows, first + STEP_ROWS, lane_of_entry, GROUP, STEP_ROWS)
        _, _, far_next = _entries(*given, token_next, slot, mask_next, HEADS, SLOTS, BLOCK_SIZE)
        normaliser = _finite(tl.load(lse_ptr + token * NUM_HEADS + g, mask=mask, other=0.0))
        token_of_row, g_of_row, mask_rows = _some_rows(*rows, first, lane, GROUP, STEP_ROWS)
        at_out = (token_of_row * NUM_HEADS + g_of_row) * DIM
        out = load_rows(out_ptr, at_out, mask_rows, DIM, PADDED).to(tl.float32)  # [STEP_ROWS, DV]
        for first_slot in tl.static_range(0, SLOTS, STEP_SLOTS):
            if first_slot > 0:
                _, _, far = _entries(*given, token, first_slot + slot, mask, HEADS, SLOTS, BLOCK_SIZE)
            there = far >= 0
            at = (far - first_pair).to(tl.int64) * GROUP + g
            mask_tile = there[:, None]
            if PADDED != DIM:
                mask_tile = mask_tile & (offs < DIM)
            tile = tl.load(partial_ptr + (at * DIM)[:, None] + offs, mask=mask_tile, other=0.0)
            partial_lse = tl.load(partial_lse_ptr + at, mask=there, other=-float("inf"))
            weight = tl.exp2((partial_lse - normaliser) * LOG2_E)
            tile = tile.to(tl.float32) * weight[:, None]
            out += tl.sum(tl.reshape(tile, (STEP_SLOTS, STEP_ROWS, PADDED)), 0)
        store_rows(out_ptr, at_out, mask_rows, out, DIM, PADDED)


@triton.jit(
    do_not_specialize=["num_sequences", "first_tile", "first_bucket", "first_token", "tokens_end", "first_head"]
)  # fmt: skip
def _merge_near_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_indices_ptr,
    place_ptr,
    bucket_end_ptr,
    partial_ptr,
    partial_lse_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    num_sequences,
    first_tile,
    first_bucket,
    first_token,
    tokens_end,
    first_head,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_SLOTS: tl.constexpr,
):
    """Attention of a tile of rows to the blocks that they selected: near ones here, the others by partial results.

    Grid: (tile of rows of the pack that may have some of the chunk, kv head of the chunk).
    Owns: out and lse of its rows in the chunk, by plain stores.
    Invariant: after n steps of `_attend_near`, its sums are the softmax over the first n tiles of near keys; after n
        steps of `_add_far`, the rows of the first n are merged.
    """
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    head = first_head + tl.program_id(1)
    sequence, start, length, first_row = tile_of_rows(
        first_tile + tl.program_id(0), cu_seqlens_ptr, num_sequences, GROUP, ROWS
    )
    # A chunk may begin and end within a sequence, and within a tile.
    row_begin = tl.maximum(first_row, (first_token - start) * GROUP)
    row_end = tl.minimum(first_row + ROWS, tl.minimum(length, tokens_end - start) * GROUP)
    if row_begin >= row_end:
        return
    lane_begin, lane_end = row_begin - first_row, row_end - first_row
    # All pointers are to the first row's token, so that the offsets of the others are small.
    first_token_of_tile = (start + first_row // GROUP).to(tl.int64)
    past = past_of(sequence, start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    first_position = past + first_row // GROUP
    first_head_of_group = first_token_of_tile * NUM_HEADS + head * GROUP
    out_ptr += first_head_of_group * DIM_V
    lse_ptr += first_head_of_group
    q_ptr += first_token_of_tile * STRIDE_Q + head * (GROUP * DIM_K)
    block_indices_ptr += (first_token_of_tile * HEADS + head) * SLOTS
    place_ptr += (first_token_of_tile * HEADS + head) * SLOTS
    key_start = tl.load(bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr) + sequence).to(tl.int64)
    k_ptr += key_start * STRIDE_K + head * DIM_K
    v_ptr += key_start * STRIDE_V + head * DIM_V
    first_pair = tl.load(bucket_end_ptr + first_bucket - 1, mask=first_bucket > 0, other=0)

    token, g, mask = _some_rows(first_row, lane_begin, lane_end, 0, tl.arange(0, ROWS), GROUP, ROWS)
    position = first_position + token
    q = load_rows(q_ptr, token * STRIDE_Q + g * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    slot = tl.arange(0, SLOTS_PADDED)[None, :]
    block, near, far = _entries(
        block_indices_ptr, place_ptr, first_position, token[:, None], slot, mask[:, None], HEADS, SLOTS, BLOCK_SIZE
    )
    at = (far - first_pair).to(tl.int64) * GROUP + g[:, None]
    partial_lse = tl.load(partial_lse_ptr + at, mask=far >= 0, other=-float("inf"))  # [ROWS, SLOTS]
    largest = _finite(tl.max(partial_lse, 1))
    far_lse = largest + tl.log2(tl.sum(tl.exp2((partial_lse - largest[:, None]) * LOG2_E), 1)) * LN_2
    out, factor, near_lse = _attend_near(
        q, k_ptr, v_ptr, _near_blocks(block, near, position // BLOCK_SIZE), position,
        past + row_begin // GROUP, past + (row_end - 1) // GROUP, scale,
        STRIDE_K, STRIDE_V, DIM_K, DIM_V, BLOCK_SIZE, ROWS, KEYS, STAGES,
    )  # fmt: skip
    lse = _lse(near_lse, far_lse)
    factor *= tl.exp2((near_lse - _finite(lse)) * LOG2_E)
    at_out = token * NUM_HEADS + g
    store_rows(out_ptr, at_out * DIM_V, mask, out * factor[:, None], DIM_V, padded_dim(DIM_V))
    tl.store(lse_ptr + at_out, lse, mask=mask)
    # Rows go through memory, where other threads of this program read them: matrix units want other layouts of a tile
    # than loads of 16 bytes.
    tl.debug_barrier()
    _add_far(
        partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, block_indices_ptr, place_ptr,
        first_position, first_pair, first_row, lane_begin, lane_end,
        NUM_HEADS, GROUP, SLOTS, DIM_V, BLOCK_SIZE, STEP_ROWS, STEP_SLOTS,
    )  # fmt: skip
