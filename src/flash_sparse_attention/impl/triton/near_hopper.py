"""The kernel of selected near blocks for Hopper (sm_90), with warps of two kinds; see `selected_near`.

    blocks of a program      j - 1     j     j + 1   ...     each is the own one of its queries and the one before that
                               `--.  .--'                    of the next queries: a ring of three holds them, and the
    rows of block j            64 queries, all heads         first block of the sequence stands beside it

    producer     4 warps     K and V of blocks, q and selected blocks of tiles of rows, ahead of the consumers
    consumers    2 groups of 4 warps, for alternate tiles of rows

Written in Gluon, as `selected_hopper` is.
"""

from __future__ import annotations

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
from .primitives import LN_2, LOG2_E, bounds_of_keys, finite_maximum, past_of, tile_of_rows
from .selected_hopper import BARRIER, EDGE, LINE, TILE, WARPS, _by_16_bytes, _copy_rows

# Blocks of a program, places of the ring of blocks, and tiles of the ring of rows. H200, 65,536 tokens, 32/8 heads of
# 128, ms: 0.51 so, 4 blocks 0.55, 16 blocks 0.51 (at 8,192 tokens 0.068 so, 16 blocks 0.12).
SPAN, PLACES, STAGES = 8, gl.constexpr(3), gl.constexpr(3)
OPTIONS = {"num_warps": 4, "maxnreg": 168}
CONSUMER, PRODUCER = gl.constexpr(208), gl.constexpr(88)


@gluon.jit
def _copy_block(k_s, v_s, place, full, k_ptr, v_ptr, block, last_key, STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr,
                DIM: gl.constexpr):  # fmt: skip
    """Asks for K and V of a block; past the last key of the sequence it stands again: no row sees it there."""
    _copy_tile(k_s.index(place), k_ptr, block * EDGE, last_key, STRIDE_K, 1, DIM)
    _copy_tile(v_s.index(place), v_ptr, block * EDGE, last_key, STRIDE_V, 1, DIM)
    async_copy.mbarrier_arrive(full.index(place), increment_count=False)


@gluon.jit
def _produce(q_ptr, k_ptr, v_ptr, selected_ptr, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty,
             first_block, blocks, last_key, past, num_rows, STRIDE_Q: gl.constexpr, STRIDE_K: gl.constexpr,
             STRIDE_V: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
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
        for j in range(0, GROUP):
            tile = i * GROUP + j
            stage = tile % STAGES
            first_row = (block * EDGE - past) * GROUP + j * EDGE
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
    # How many keys of each block a row sees.
    seen_init = gl.where((selected & 1) != 0, block * EDGE + in_block + 1, 0)
    seen_own = gl.where((selected & 2) != 0, in_block + 1, 0)
    seen_older = gl.where((selected & 4) != 0, EDGE, 0)
    scores_init = gl.where(key < seen_init[:, None], scores_init, -float("inf"))
    scores_older = gl.where(key < seen_older[:, None], scores_older, -float("inf"))
    scores_own = gl.where(key < seen_own[:, None], scores_own, -float("inf"))
    largest = gl.maximum(gl.maximum(gl.max(scores_init, 1), gl.max(scores_older, 1)), gl.max(scores_own, 1)) * factor
    finite = finite_maximum(largest)[:, None]
    p_init, p_older = gl.exp2(scores_init * factor - finite), gl.exp2(scores_older * factor - finite)
    p_own = gl.exp2(scores_own * factor - finite)
    total = gl.sum(p_init, 1) + gl.sum(p_older, 1) + gl.sum(p_own, 1)
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
    _store_rows(out_ptr, first_row, num_rows, out, q, NUM_HEADS, GROUP, DIM, False)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _consume(WHO: gl.constexpr, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty, out_ptr, lse_ptr,
             first_block, blocks, past, num_rows, scale, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
             DIM: gl.constexpr):  # fmt: skip
    """Every second tile of rows."""
    mbarrier.wait(keys_full.index(PLACES), 0)
    mbarrier.wait(keys_full.index(0), 0)
    for i in range(0, blocks):
        mbarrier.wait(keys_full.index((i + 1) % PLACES), ((i + 1) // PLACES) & 1)
        # GROUP, which the compiler does not see: it would unroll the loop, and spill.
        for j in range((WHO + i * GROUP) % 2, GROUP + (i >> 30), 2):
            _attend_tile(i * GROUP + j, i, j, first_block + i, q_s, k_s, v_s, selected_s, full, empty, out_ptr,
                         lse_ptr, past, num_rows, scale * LOG2_E, NUM_HEADS, GROUP, DIM)  # fmt: skip
        mbarrier.arrive(keys_empty.index(i % PLACES), count=1)


@gluon.jit(do_not_specialize=["num_sequences"])
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
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """What `_selected_near_kernel` computes, for blocks of 64.

    Grid: (BLOCKS blocks of a sequence of the pack; kv head).
    Owns: out and lse of the queries that stand in its blocks, by plain stores.
    Invariant: after n steps of a consumer, those of its tiles of the first n blocks are stored.
    """
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    head = gl.program_id(1)
    sequence, key_start, length, first_position = tile_of_rows(
        gl.program_id(0), bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr), num_sequences, 1, BLOCKS * EDGE
    )
    token_start = gl.load(cu_seqlens_ptr + sequence)
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    first_block = first_position // EDGE
    blocks_end = gl.minimum(first_block + BLOCKS, gl.cdiv(length, EDGE))
    # Blocks of tokens without queries have nothing to do.
    first_block = gl.maximum(first_block, past // EDGE)
    blocks = blocks_end - first_block
    num_rows = (length - past) * GROUP
    if (blocks <= 0) | (num_rows <= 0):
        return
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
                first_block, blocks, past, num_rows, scale, NUM_HEADS, GROUP, DIM,
            )),
            (_consume, (
                1, q_s, k_s, v_s, selected_s, full, empty, keys_full, keys_empty, out_ptr + at * DIM, lse_ptr + at,
                first_block, blocks, past, num_rows, scale, NUM_HEADS, GROUP, DIM,
            )),
            (_produce, (
                q_ptr + token_start * STRIDE_Q + head * (GROUP * DIM), k_ptr + key_start * STRIDE_K + head * DIM,
                v_ptr + key_start * STRIDE_V + head * DIM, selected_ptr + token_start * HEADS + head, q_s, k_s, v_s,
                selected_s, full, empty, keys_full, keys_empty, first_block, blocks, length - 1, past, num_rows,
                STRIDE_Q, STRIDE_K, STRIDE_V, HEADS, GROUP, DIM,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER, PRODUCER],
    )  # fmt: skip
