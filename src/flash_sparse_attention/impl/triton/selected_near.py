"""Attention of selected near blocks; see `inverted_index` for *near*.

    rows of a block        ######                ############    near blocks are the same for all queries of a block, so
    (token, head)          ######                ############    a program holds them, and each row leaves out what it
                           ######                ############    did not select
                          block 0  .  .  .  .  own - 1,   own
                                   `- far -'
                               partial results of the main kernel, which the merge adds

Of a selection as NSA makes it, one partial result takes the place of three; it stands where the result will. A program
has all query heads of 64 tokens, which read each near block once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inverted_index import InvertedIndex, is_near, near_bits
from .primitives import (
    LN_2,
    block_bounds,
    bounds_of_keys,
    exp_shifted,
    finite_maximum,
    keys_ahead,
    load_rows,
    padded,
    padded_dim,
    sequence_of,
    store_rows,
)

# Rows of a tile, warps, and stages of the loop over tiles of rows; 2 stages took 1.21 ms for 0.76 (H200).
ROWS, WARPS, STAGES = 64, 4, 1
# Entries that a program splits.
SPLIT_ENTRIES = 1024


def launch_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    index: InvertedIndex,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    specialized: bool,
) -> Tensor:
    """Attention to the near entries of a selection, into out and lse; and the place of its far ones, -1 of others.

    `scale` is positive; bounds are as for `build_index`; `specialized`: by the kernel for Hopper.
    """
    (total_tokens, num_heads, dim_k), dim_v, chunks = q.shape, v.shape[2], index.chunks
    group, num_sequences, slots = num_heads // chunks.num_kv_heads, cu_seqlens.numel() - 1, padded(chunks.slots, 1)
    far, selected = index.far, index.selected
    if far is None or selected is None:
        # Of an index that was kept.
        far, selected = torch.empty_like(index.place), index.place.new_empty(index.place.shape[:2])
        tokens = max(1, SPLIT_ENTRIES // slots)
        _split_entries_kernel[(triton.cdiv(total_tokens, tokens), chunks.num_kv_heads)](
            block_indices, index.place, far, selected, cu_seqlens, cu_seqlens_k, total_tokens, num_sequences,
            chunks.num_kv_heads, chunks.slots, slots, block_size, tokens,
        )  # fmt: skip
    if specialized:
        # Not every version of Triton has what it needs.
        from . import near_hopper

        spans = k.shape[0] // (near_hopper.SPAN * block_size) + num_sequences
        near_hopper._selected_near_hopper_kernel[(spans, chunks.num_kv_heads)](
            q, k, v, selected, cu_seqlens, cu_seqlens_k, out, lse, num_sequences, scale,
            q.stride(0), k.stride(0), v.stride(0), num_heads, group, dim_k, near_hopper.SPAN, **near_hopper.OPTIONS,
        )  # fmt: skip
        return far
    rows = ROWS if q.dtype != torch.float32 and max(dim_k, dim_v) <= 128 else 16
    _selected_near_kernel[(chunks.num_blocks, chunks.num_kv_heads)](
        q, k, v, selected, cu_seqlens, cu_seqlens_k, out, lse, num_sequences, scale,
        q.stride(0), k.stride(0), v.stride(0), num_heads, group, dim_k, dim_v,
        block_size, padded(block_size), rows, STAGES, num_warps=WARPS,
    )  # fmt: skip
    return far


@triton.jit(do_not_specialize=["total_tokens", "num_sequences"])
def _split_entries_kernel(
    block_indices_ptr,
    place_ptr,
    far_ptr,
    selected_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    total_tokens,
    num_sequences,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Splits the entries of a selection into far and near ones.

    Grid: (tile of tokens, kv head).
    Owns: what `InvertedIndex` calls `far` and `selected`, of its tokens and head.
    Invariant: no loop.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < total_tokens
    slot = tl.arange(0, SLOTS_PADDED)[None, :]
    row = token.to(tl.int64) * HEADS + tl.program_id(1)
    at = row[:, None] * SLOTS + slot
    mask_slots = mask[:, None] & (slot < SLOTS)
    place = tl.load(place_ptr + at, mask=mask_slots, other=-1)  # [TOKENS, SLOTS]
    block = tl.load(block_indices_ptr + at, mask=mask_slots, other=0)
    token = tl.minimum(token, total_tokens - 1)
    sequence = sequence_of(token, cu_seqlens_ptr, num_sequences, 0)
    start = tl.load(bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr) + sequence)
    own = (token + keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr) - start)[:, None] // BLOCK_SIZE
    near = is_near(block, own)
    tl.store(far_ptr + at, tl.where(near, -1, place), mask=mask_slots)
    tl.store(selected_ptr + row, tl.sum(near_bits(block, own, near & (place >= 0)), 1), mask=mask)


@triton.jit
def _scores(q, k, key, key_end, selected, position, NUMBER: tl.constexpr):
    """Scores of a tile of rows and a near block, -inf where a row did not select it or does not see the key."""
    last = tl.where(((selected >> NUMBER) & 1) != 0, tl.minimum(position + 1, key_end), 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    return tl.where(key[None, :] < last[:, None], scores, -float("inf"))


@triton.jit
def _load_selected(selected_ptr, first_row, num_rows, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    row = first_row + tl.arange(0, ROWS)
    return tl.load(selected_ptr + row // GROUP * HEADS, mask=row < num_rows, other=0)


@triton.jit(do_not_specialize=["num_sequences"])
def _selected_near_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    selected_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    num_sequences,
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the queries of a block to the near blocks that they selected.

    Grid: (block of the pack; kv head).
    Owns: out and lse of the queries that stand in its block, by plain stores.
    Invariant: after n steps, the rows of the first n tiles are stored.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    head = tl.program_id(1)
    bounds_ptr = bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr)
    key_start, sequence_end, sequence = block_bounds(tl.program_id(0), bounds_ptr, num_sequences, BLOCK_SIZE)
    ahead = keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr)
    # Its queries, in the pack of queries.
    token_begin = tl.maximum(key_start - ahead, tl.load(cu_seqlens_ptr + sequence))
    token_end = tl.minimum(key_start + BLOCK_SIZE, sequence_end) - ahead
    num_rows = (token_end - token_begin) * GROUP
    if num_rows <= 0:
        return
    sequence_start = tl.load(bounds_ptr + sequence)
    position_begin = token_begin + ahead - sequence_start
    block = (key_start - sequence_start) // BLOCK_SIZE
    length = sequence_end - sequence_start
    lane = tl.arange(0, KEYS)
    in_block = lane < BLOCK_SIZE
    first_key = sequence_start.to(tl.int64)
    k_ptr += first_key * STRIDE_K + head * DIM_K
    v_ptr += first_key * STRIDE_V + head * DIM_V
    # Keys of the first block, of the one before, and of its own; the block before the first is read as the first.
    key_0, key_1, key_2 = lane, tl.maximum(block - 1, 0) * BLOCK_SIZE + lane, block * BLOCK_SIZE + lane
    there_0, there_1, there_2 = in_block & (key_0 < length), in_block & (key_1 < length), in_block & (key_2 < length)
    k_0 = load_rows(k_ptr, key_0.to(tl.int64) * STRIDE_K, there_0, DIM_K, padded_dim(DIM_K))  # [KEYS, DK]
    v_0 = load_rows(v_ptr, key_0.to(tl.int64) * STRIDE_V, there_0, DIM_V, padded_dim(DIM_V))  # [KEYS, DV]
    k_1 = load_rows(k_ptr, key_1.to(tl.int64) * STRIDE_K, there_1, DIM_K, padded_dim(DIM_K))
    v_1 = load_rows(v_ptr, key_1.to(tl.int64) * STRIDE_V, there_1, DIM_V, padded_dim(DIM_V))
    k_2 = load_rows(k_ptr, key_2.to(tl.int64) * STRIDE_K, there_2, DIM_K, padded_dim(DIM_K))
    v_2 = load_rows(v_ptr, key_2.to(tl.int64) * STRIDE_V, there_2, DIM_V, padded_dim(DIM_V))
    token_begin = token_begin.to(tl.int64)
    q_ptr += token_begin * STRIDE_Q + head * (GROUP * DIM_K)
    out_ptr += (token_begin * NUM_HEADS + head * GROUP) * DIM_V
    lse_ptr += token_begin * NUM_HEADS + head * GROUP
    selected_ptr += token_begin * HEADS + head
    end_1, end_2 = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
    selected_next = _load_selected(selected_ptr, 0, num_rows, HEADS, GROUP, ROWS)
    for first_row in tl.range(0, num_rows, ROWS, num_stages=STAGES):
        # Loaded one step ahead, as Triton issues those loads early alone that matrix units take.
        selected = selected_next
        selected_next = _load_selected(selected_ptr, first_row + ROWS, num_rows, HEADS, GROUP, ROWS)
        row = first_row + tl.arange(0, ROWS)
        mask = row < num_rows
        token, g = row // GROUP, row % GROUP
        position = position_begin + token
        q = load_rows(q_ptr, token * STRIDE_Q + g * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
        scores_0 = _scores(q, k_0, key_0, BLOCK_SIZE, selected, position, 0)
        scores_1 = _scores(q, k_1, key_1, end_1, selected, position, 2)
        scores_2 = _scores(q, k_2, key_2, end_2, selected, position, 1)
        largest = tl.maximum(tl.maximum(tl.max(scores_0, 1), tl.max(scores_1, 1)), tl.max(scores_2, 1)) * scale
        finite = finite_maximum(largest)
        p_0, p_1 = exp_shifted(scores_0, scale, finite, EXACT), exp_shifted(scores_1, scale, finite, EXACT)
        p_2 = exp_shifted(scores_2, scale, finite, EXACT)
        total = tl.sum(p_0, 1) + tl.sum(p_1, 1) + tl.sum(p_2, 1)
        total = tl.where(total == 0.0, 1.0, total)
        out = tl.dot(p_0.to(v_0.dtype), v_0, input_precision="ieee")
        out = tl.dot(p_1.to(v_1.dtype), v_1, out, input_precision="ieee")
        out = tl.dot(p_2.to(v_2.dtype), v_2, out, input_precision="ieee")
        at_out = token * NUM_HEADS + g
        store_rows(out_ptr, at_out * DIM_V, mask, out * (1.0 / total)[:, None], DIM_V, padded_dim(DIM_V), STREAMED=True)
        tl.store(lse_ptr + at_out, largest + tl.log2(total) * LN_2, mask=mask)
