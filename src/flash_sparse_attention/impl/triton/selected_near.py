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
    bounds_of_keys,
    exp_shifted,
    finite_maximum,
    keys_ahead,
    load_rows,
    padded,
    padded_dim,
    past_of,
    sequence_of,
    store_rows,
)
from .tuning import early_launch

# Rows of a tile, warps, and stages of the loop over tiles of rows; 2 stages took 1.21 ms for 0.76 (H200).
ROWS, WARPS, STAGES = 64, 4, 1
# Entries that a program splits.
SPLIT_ENTRIES = 1024


def split_entries(
    block_indices: Tensor,
    index: InvertedIndex,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """What `InvertedIndex` calls `far` and `selected`, of an index of `block_indices` that was built without them."""
    far, selected = torch.empty_like(index.place), index.place.new_empty(index.place.shape[:2])
    total_tokens, num_kv_heads, num_slots = index.place.shape
    slots = padded(num_slots, 1)
    tokens = max(1, SPLIT_ENTRIES // slots)
    _split_entries_kernel[(triton.cdiv(total_tokens, tokens), num_kv_heads)](
        block_indices, index.place, far, selected, cu_seqlens, cu_seqlens_k, total_tokens, cu_seqlens.numel() - 1,
        num_kv_heads, num_slots, slots, block_size, tokens,
    )  # fmt: skip
    return far, selected


def launch_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    scale: float,
    chunk: tuple[int, int, int, int],
    specialized: bool,
) -> None:
    """Attention to the near entries of a chunk of a selection, into its rows of out and lse.

    `selected` is that of `InvertedIndex`, `scale` positive, `chunk` its first head of k and its heads, its first token
    and its tokens; bounds are as for `build_index`; `specialized`: by the kernel for Hopper. That one writes before it
    waits for the kernel before it, which must be the main kernel of the chunk: that has nothing to do with out and lse.
    """
    (_, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    first_head, heads, first_token, tokens = chunk
    given = q, k, v, selected, cu_seqlens, cu_seqlens_k, out, lse, cu_seqlens.numel() - 1, first_token, tokens
    strides = q.stride(0), k.stride(0), v.stride(0), num_heads, num_heads // num_kv_heads
    if specialized:
        # Not every version of Triton has what it needs.
        from . import near_hopper

        group, blocks = num_heads // num_kv_heads, heads * triton.cdiv(tokens, block_size)
        span, tiles = near_hopper.programs_of_chunk(blocks, group, q.device)
        grid = _programs(tokens, span * block_size, cu_seqlens, cu_seqlens_k), heads, group // tiles
        near_hopper._selected_near_hopper_kernel[grid](
            *given, first_head, span, scale, *strides, dim_k, tiles, **near_hopper.OPTIONS, **early_launch()
        )
        return
    rows = ROWS if q.dtype != torch.float32 and max(dim_k, dim_v) <= 128 else 16
    _selected_near_kernel[(_programs(tokens, block_size, cu_seqlens, cu_seqlens_k), heads)](
        *given, first_head, scale, *strides, dim_k, dim_v, block_size, padded(block_size), rows, STAGES,
        num_warps=WARPS,
    )  # fmt: skip


def _programs(tokens: int, size: int, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> int:
    """Upper bound of the programs of `blocks_of_chunk`."""
    return tokens // size + (1 if cu_seqlens_k is None else 2) * (cu_seqlens.numel() - 1) + 1


@triton.jit
def _first_program(sequence, first_token, tokens, size, cu_seqlens_ptr, cu_seqlens_k_ptr):
    """The first program of a sequence, as `blocks_of_chunk` numbers them."""
    of_each: tl.constexpr = 1 if cu_seqlens_k_ptr is None else 2
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence) - first_token, 0), tokens)
    return begin // size + of_each * sequence + (begin > 0).to(tl.int32)


@triton.jit
def blocks_of_chunk(
    program, first_token, tokens, span, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE: tl.constexpr
):
    """The blocks of a program, which are `span` consecutive ones of a sequence or fewer, and their queries of a chunk.

    The programs of a sequence that has its first query of the chunk at token a of the chunk begin with the number
    a // (span * BLOCK_SIZE) + sequence, and one more where a > 0. L tokens lie in L // (span * BLOCK_SIZE) + 1 times
    `span` blocks at most where they begin with a block, as all do but those at the start of the chunk, and in one time
    more elsewhere. So numbers of two sequences never meet, some programs have nothing, and nothing must be summed to
    know them. Where sequences have a past, none need begin with a block: 2 * sequence then.

    Returns the first token of the sequence in the pack of keys, its first query of the chunk in the pack of queries,
    the positions in the sequence of this and behind the last one of the chunk, and the first block and the end of them.
    """
    size = span * BLOCK_SIZE
    low = program * 0
    high = low + num_sequences
    width = num_sequences
    # Invariant: the first program of `low` is <= program, that of `high` is > program.
    while width > 1:
        middle = (low + high) // 2
        after = _first_program(middle, first_token, tokens, size, cu_seqlens_ptr, cu_seqlens_k_ptr) <= program
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
        width = (width + 1) // 2
    token_start, token_end = tl.load(cu_seqlens_ptr + low), tl.load(cu_seqlens_ptr + low + 1)
    begin = tl.minimum(tl.maximum(token_start - first_token, 0), tokens)
    end = tl.minimum(tl.maximum(token_end - first_token, 0), tokens)
    # Position of a query less its place in the chunk.
    ahead = past_of(low, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr) + first_token - token_start
    before = _first_program(low, first_token, tokens, size, cu_seqlens_ptr, cu_seqlens_k_ptr)
    first_block = (begin + ahead) // BLOCK_SIZE + (program - before) * span
    end_block = tl.minimum(first_block + span, (end + ahead + BLOCK_SIZE - 1) // BLOCK_SIZE)
    end_block = tl.where(begin < end, end_block, first_block)
    key_start = tl.load(bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr) + low)
    return key_start, first_token + begin, begin + ahead, end + ahead, first_block, end_block


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


@triton.jit(do_not_specialize=["num_sequences", "first_token", "tokens", "first_head"])
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
    first_token,
    tokens,
    first_head,
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

    Grid: (block, as `blocks_of_chunk` numbers them; kv head of the chunk).
    Owns: out and lse of the queries of the chunk that stand in its block, by plain stores.
    Invariant: after n steps, the rows of the first n tiles are stored.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    head = first_head + tl.program_id(1)
    first_key, token_begin, position_begin, length, block, block_end = blocks_of_chunk(
        tl.program_id(0), first_token, tokens, 1, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    if block >= block_end:
        return
    # Its queries, of the chunk. Keys behind the last one of the chunk are not seen.
    later = tl.maximum(block * BLOCK_SIZE - position_begin, 0)
    token_begin += later
    position_begin += later
    num_rows = (tl.minimum((block + 1) * BLOCK_SIZE, length) - position_begin) * GROUP
    lane = tl.arange(0, KEYS)
    in_block = lane < BLOCK_SIZE
    first_key = first_key.to(tl.int64)
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
