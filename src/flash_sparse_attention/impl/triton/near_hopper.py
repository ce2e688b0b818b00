"""The kernel of selected near blocks for Hopper (sm_90), with warps of two kinds; see `selected_near`.

    blocks of a program      j - 1     j     j + 1   ...     each is the own one of its queries and the one before that
                               `--.  .--'                    of the next queries: a ring of three holds them, and the
    rows of block j            64 queries, all heads         first block of the sequence stands beside it

    producer     4 warps     K and V of blocks, q and selected blocks of tiles of rows, ahead of the consumers
    consumers    2 groups of 4 warps, for alternate tiles of rows

Written in Gluon, as `selected_hopper` is.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .interval_hopper import _copy_tile, _store_rows
from .primitives import LN_2, LOG2_E, finite_maximum, multiprocessors, take_over
from .selected_hopper import BARRIER, EDGE, LINE, TILE, WARPS, _by_16_bytes, _copy_rows
from .selected_near import blocks_of_chunk

# Blocks of a program at most; heads of a group, each of which has a tile of rows of a block, that one program has at
# most, and that programs have which share a block; places of the ring of blocks, and tiles of the ring of rows. H200,
# heads of 128, whole forward pass, ms: 65,536 tokens of 32/8 heads, programs of 4 blocks (which makes as many as there
# are multiprocessors) 5.86, of 2 5.88; of 64/4 heads 11.20 so, 16 tiles in a program 11.44; of 32/4 heads 8 tiles 5.81,
# shared by two programs 5.84. A third consumer: 5.95 for 5.84.
MOST_BLOCKS, MOST_TILES, SHARED_TILES, PLACES, STAGES = 8, 8, 4, gl.constexpr(3), gl.constexpr(3)
OPTIONS = {"num_warps": 4, "maxnreg": 168}
CONSUMER, PRODUCER = gl.constexpr(208), gl.constexpr(88)


def programs_of_chunk(blocks: int, group: int, device: torch.device) -> tuple[int, int]:
    """Blocks of a program, and tiles of the rows of each, such that a chunk of so many blocks is done at once."""
    tiles = SHARED_TILES if group > MOST_TILES and group % SHARED_TILES == 0 else group
    span = triton.cdiv(blocks * (group // tiles), multiprocessors(device))
    return max(1, min(span, MOST_BLOCKS)), tiles


@gluon.jit
def _copy_block(k_s, v_s, place, full, k_ptr, v_ptr, block, last_key, STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr,
                DIM: gl.constexpr):  # fmt: skip
    """Asks for K and V of a block; past the last key of the sequence it stands again: no row sees it there."""
    _copy_tile(k_s.index(place), k_ptr, block * EDGE, last_key, STRIDE_K, 1, DIM)
    _copy_tile(v_s.index(place), v_ptr, block * EDGE, last_key, STRIDE_V, 1, DIM)
    async_copy.mbarrier_arrive(full.index(place), increment_count=False)


@gluon.jit
def _produce(q_ptr, k_ptr, v_ptr, selected_ptr, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty,
             first_block, blocks, first_tile, last_key, past, num_rows, STRIDE_Q: gl.constexpr, STRIDE_K: gl.constexpr,
             STRIDE_V: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr,
             DIM: gl.constexpr):  # fmt: skip
    """Fills both rings; rows that are not there hold others.

    Invariant: after n steps, n + 1 blocks beside the first one were asked for, and the rows of n.
    """
    layout: gl.constexpr = _by_16_bytes(DIM)
    line = gl.arange(0, EDGE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    lane = gl.arange(0, EDGE, layout=gl.SliceLayout(1, layout))
    before = gl.maximum(first_block - 1, 0)
    _copy_block(k_s, v_s, PLACES, keys_full, k_ptr, v_ptr, 0, last_key, STRIDE_K, STRIDE_V, DIM)
    _copy_block(k_s, v_s, 0, keys_full, k_ptr, v_ptr, before, last_key, STRIDE_K, STRIDE_V, DIM)
    for i in range(0, blocks):
        block = first_block + i
        place = (i + 1) % PLACES
        mbarrier.wait(keys_empty.index(place), (((i + 1) // PLACES) & 1) ^ 1)
        _copy_block(k_s, v_s, place, keys_full, k_ptr, v_ptr, block, last_key, STRIDE_K, STRIDE_V, DIM)
        for j in range(0, TILES):
            tile = i * TILES + j
            stage = tile % STAGES
            first_row = (block * EDGE - past) * GROUP + (first_tile + j) * EDGE
            row = gl.minimum(gl.maximum(first_row + lane, 0), num_rows - 1)
            at = gl.minimum(gl.maximum(first_row + line, 0), num_rows - 1) // GROUP
            mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
            _copy_rows(q_s.index(stage), q_ptr, (row // GROUP).to(gl.int64) * STRIDE_Q + row % GROUP * DIM, DIM)
            async_copy.async_copy_global_to_shared(selected_s.index(stage), selected_ptr + at.to(gl.int64) * HEADS)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _attend_tile(tile, i, j, block, q_s, k_s, v_s, selected_s, full, empty, out_ptr, lse_ptr, past, num_rows, factor,
                 NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """The softmax of the j-th tile of rows of a block over the near blocks that they selected."""
    dtype: gl.constexpr = q_s.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    stage, init, older, own = tile % STAGES, PLACES + none, i % PLACES + none, (i + 1) % PLACES + none
    mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
    fence_async_shared()
    q = q_s.index(stage)
    zeros = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    scores_init = warpgroup_mma(q, k_s.index(init).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores_older = warpgroup_mma(q, k_s.index(older).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores_own = warpgroup_mma(q, k_s.index(own).permute((1, 0)), zeros, use_acc=False, is_async=True)
    selected = selected_s.index(stage).load(row_layout)
    scores_init, scores_older, scores_own = warpgroup_mma_wait(0, deps=[scores_init, scores_older, scores_own])
    in_block = (j * EDGE + gl.arange(0, EDGE, layout=row_layout)) // GROUP
    key = gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))[None, :]
    # In the first block of a sequence that one is also the own one, and of the own one a row sees only a part.
    selected = gl.where(block == 0, selected << 1, selected)
    scores_init = gl.where(((selected & 1) != 0)[:, None], scores_init, -float("inf"))
    scores_older = gl.where(((selected & 4) != 0)[:, None], scores_older, -float("inf"))
    scores_own = gl.where(key < gl.where((selected & 2) != 0, in_block + 1, 0)[:, None], scores_own, -float("inf"))
    largest = gl.max(gl.maximum(gl.maximum(scores_init, scores_older), scores_own), 1) * factor
    finite = finite_maximum(largest)[:, None]
    p_init, p_older = gl.exp2(scores_init * factor - finite), gl.exp2(scores_older * factor - finite)
    p_own = gl.exp2(scores_own * factor - finite)
    total = gl.sum(p_init + p_older + p_own, 1)
    total = gl.where(total == 0.0, 1.0, total)
    out = gl.zeros([EDGE, DIM], gl.float32, out_layout)
    p_init = gl.convert_layout(p_init.to(dtype), operand)
    out = warpgroup_mma(p_init, v_s.index(init), out, use_acc=False, is_async=True)
    p_older = gl.convert_layout(p_older.to(dtype), operand)
    out = warpgroup_mma(p_older, v_s.index(older), out, is_async=True)
    p_own = gl.convert_layout(p_own.to(dtype), operand)
    out = warpgroup_mma(p_own, v_s.index(own), out, is_async=True)
    first_row = (block * EDGE - past) * GROUP + j * EDGE
    row = first_row + gl.arange(0, EDGE, layout=row_layout)
    lse_ptrs = lse_ptr + (row // GROUP).to(gl.int64) * NUM_HEADS + row % GROUP
    gl.store(lse_ptrs, (largest + gl.log2(total)) * LN_2, mask=(row >= 0) & (row < num_rows))
    out = warpgroup_mma_wait(0, deps=[out])
    out = out * gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
    _store_rows(out_ptr, first_row, num_rows, out, q, NUM_HEADS, GROUP, DIM, False, STAY=True)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _consume(WHO: gl.constexpr, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty, out_ptr, lse_ptr,
             first_block, blocks, first_tile, past, num_rows, scale, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
             TILES: gl.constexpr, DIM: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Every second tile of rows. The merge that follows relies on the kernel before as well."""
    mbarrier.wait(keys_full.index(PLACES), 0)
    mbarrier.wait(keys_full.index(0), 0)
    for i in range(0, blocks):
        mbarrier.wait(keys_full.index((i + 1) % PLACES), ((i + 1) // PLACES) & 1)
        # TILES, which the compiler does not see: it would unroll the loop, and spill.
        for j in range((WHO + i * TILES) % 2, TILES + (i >> 30), 2):
            _attend_tile(i * TILES + j, i, first_tile + j, first_block + i, q_s, k_s, v_s, selected_s, full, empty,
                         out_ptr, lse_ptr, past, num_rows, scale * LOG2_E, NUM_HEADS, GROUP, DIM)  # fmt: skip
        mbarrier.arrive(keys_empty.index(i % PLACES), count=1)
    take_over(EARLY)


@gluon.jit(do_not_specialize=["num_sequences", "first_token", "tokens", "first_head", "span"])
def _selected_near_hopper_kernel(
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
    span,
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    TILES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """What `_selected_near_kernel` computes, for blocks of 64.

    Grid: (`span` blocks, as `blocks_of_chunk` numbers them; kv head of the chunk; TILES tiles of the rows of a block).
    Owns: out and lse of the queries of the chunk that stand in its blocks, by plain stores.
    Invariant: after n steps of a consumer, those of its tiles of the first n blocks are stored.

    It has nothing to do with the main kernel before it, and runs where that one leaves room at its end.
    """
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    head = first_head + gl.program_id(1)
    key_start, token_start, past, length, first_block, end_block = blocks_of_chunk(
        gl.program_id(0), first_token, tokens, span, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, EDGE
    )
    blocks = end_block - first_block
    if blocks <= 0:
        take_over(EARLY)
        return
    # Of the queries of the chunk. Keys behind the last one of them are not seen.
    num_rows = (length - past) * GROUP
    first_tile = gl.program_id(2) * TILES if TILES < GROUP else 0
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    keys_full = gl.allocate_shared_memory(gl.int64, [PLACES + 1, 1], BARRIER)
    keys_empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=32 * WARPS)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(PLACES):
        mbarrier.init(keys_empty.index(i), count=2)
    for i in gl.static_range(PLACES + 1):
        mbarrier.init(keys_full.index(i), count=32 * WARPS)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [PLACES + 1, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [PLACES + 1, EDGE, DIM], TILE)
    selected_s = gl.allocate_shared_memory(gl.int32, [STAGES, EDGE], LINE)
    token_start, key_start = token_start.to(gl.int64), key_start.to(gl.int64)
    at = token_start * NUM_HEADS + head * GROUP
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty, out_ptr + at * DIM, lse_ptr + at,
                first_block, blocks, first_tile, past, num_rows, scale, NUM_HEADS, GROUP, TILES, DIM, EARLY,
            )),
            (_consume, (
                1, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty, out_ptr + at * DIM, lse_ptr + at,
                first_block, blocks, first_tile, past, num_rows, scale, NUM_HEADS, GROUP, TILES, DIM, EARLY,
            )),
            (_produce, (
                q_ptr + token_start * STRIDE_Q + head * (GROUP * DIM), k_ptr + key_start * STRIDE_K + head * DIM,
                v_ptr + key_start * STRIDE_V + head * DIM, selected_ptr + token_start * HEADS + head, q_s, k_s, v_s,
                selected_s, full, empty, keys_full, keys_empty, first_block, blocks, first_tile, length - 1, past,
                num_rows, STRIDE_Q, STRIDE_K, STRIDE_V, HEADS, GROUP, TILES, DIM,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER, PRODUCER],
    )  # fmt: skip
