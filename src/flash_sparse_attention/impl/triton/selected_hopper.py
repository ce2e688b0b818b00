"""The KV-outer kernels of selected attention for Hopper (sm_90), with warps of two kinds; see `selected_kv_outer`.

    producer     4 warps    tokens of the pairs -> rows of q, dO, shift and delta, tiles ahead of the consumers
       |                    a ring of tiles in shared memory; each is full, then empty again (two barriers)
    consumers    4 warps    S = Q K_j^T, P, ..., one tile each; the backward pass has two of them, for alternate tiles
       |                    the partial results of a tile in shared memory
    copy engine (TMA)       stores them; those of the last tile of a segment, which may have few rows, the consumer does

What a warp of the other kernels does in turn goes on side by side: gathers wait for memory, products for the matrix
units, and neither for the other. Results are the same, and bitwise equal from run to run.

Written in Gluon, the language below Triton's, which names layouts, shared memory and barriers. Its interface changes
from version to version, and its programs do not run in Triton's interpreter: tests run them on a GPU only.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .primitives import LN_2, LOG2_E, exp_below, lift, take_over, wait_for_the_kernel_before
from .segment import add_up, keys_of_bucket, segment_of_program

# Layout of tiles in shared memory, as matrix units and the copy engine read them; of one value a row; of barriers.
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())
# Rows of a tile and keys of a block (or of a part of it): what one product of a warp group takes.
EDGE = gl.constexpr(64)
WARPS = gl.constexpr(4)
# Tiles of the ring. H200, 65,536 tokens, 32/8 heads of 128, main kernels, ms: backward 6.1 so, 3 tiles 6.8. Forward
# 3.6 so, with two programs on a multiprocessor; programs of 2 or 3 consumers that share K and V: 3.9.
FORWARD_STAGES, BACKWARD_STAGES = gl.constexpr(3), gl.constexpr(4)
# Registers of a thread: on average, which decides how many programs fit (2 and 1), and of the producer. Consumers of
# the backward pass have 232; with fewer, or with more for them and 24 for the producer, values are spilled: 8 to 14 ms.
FORWARD_OPTIONS, FORWARD_PRODUCER = {"num_warps": 4, "maxnreg": 128}, gl.constexpr(56)
BACKWARD_OPTIONS = {"num_warps": 4, "maxnreg": 168}
BACKWARD_CONSUMER, BACKWARD_PRODUCER = gl.constexpr(232), gl.constexpr(40)


def tile_descriptor(partial: Tensor, parts: int, pieces: int = 1) -> TensorDescriptor:
    """By which tiles of the partial results `[rows * parts, dim]` are stored, each a piece of the columns of a part."""
    rows, dim = partial.shape[0] // parts, partial.shape[1]
    return TensorDescriptor(partial, [rows, parts * dim], [parts * dim, 1], [EDGE.value, dim // pieces], TILE.value)


@triton.constexpr_function
def _by_16_bytes(dim):
    """The layout in which a warp group copies rows."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def _copy_rows(tile, x_ptr, rows, DIM: gl.constexpr):
    """Asks for rows of `DIM` elements that begin at the offsets `rows` (64-bit)."""
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, _by_16_bytes(DIM)))
    async_copy.async_copy_global_to_shared(tile, x_ptr + rows[:, None] + offs[None, :])


@gluon.jit
def _copy_keys(k_s, v_s, k_ptr, v_ptr, key_first, last_key, head, STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr,
               DIM: gl.constexpr, ready):  # fmt: skip
    """Asks for K and V of tiles of keys. Past the last key of the block it stands again: no row sees it there."""
    TILES: gl.constexpr = k_s.shape[0]
    for i in gl.static_range(TILES):
        key = key_first + i * EDGE + gl.arange(0, EDGE, layout=gl.SliceLayout(1, _by_16_bytes(DIM)))
        key = gl.minimum(key, last_key).to(gl.int64)
        _copy_rows(k_s.index(i), k_ptr, key * STRIDE_K + head * DIM, DIM)
        _copy_rows(v_s.index(i), v_ptr, key * STRIDE_V + head * DIM, DIM)
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def _ring(STAGES: gl.constexpr, READERS: gl.constexpr = 1):
    """The barriers of a ring: full when all threads of the producer have copied, empty when its readers say so."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=32 * WARPS)
        mbarrier.init(empty.index(i), count=READERS)
    mbarrier.init(ready.index(0), count=32 * WARPS)
    return full, empty, ready


@gluon.jit
def _copy_tokens(token_s, tile, pairs_ptr, num_rows, GROUP: gl.constexpr, PLACES: gl.constexpr):
    """Asks for the token of each row of a tile; rows that are not there hold that of the last one."""
    row = tile * EDGE + gl.arange(0, EDGE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    pair = gl.minimum(row, num_rows - 1) // GROUP
    async_copy.async_copy_global_to_shared(token_s.index(tile % PLACES), pairs_ptr + pair)
    async_copy.commit_group()


@gluon.jit
def _rows_seen(tile, token_s, num_rows, key_first, key_end, ahead, PLACES: gl.constexpr, TAIL: gl.constexpr,
               LAYOUT: gl.constexpr):  # fmt: skip
    """How many keys of the tile each row sees: those up to its token and the end of the block; none if not there."""
    token = token_s.index(tile % PLACES).load(LAYOUT)
    seen = gl.minimum(token + ahead + 1, key_end) - key_first
    if TAIL:
        seen = gl.where(tile * EDGE + gl.arange(0, EDGE, layout=LAYOUT) < num_rows, seen, 0)
    return seen


@gluon.jit
def _store_tile(tile, buffer, descriptor, partial_ptr, first_row, num_rows, column, STRIDE: gl.constexpr, x,
                DIM: gl.constexpr, TAIL: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Stores partial results by the copy engine, or what there is of the last tile by the warps themselves."""
    if TAIL:
        row = tile * EDGE + gl.arange(0, EDGE, layout=gl.SliceLayout(1, LAYOUT))
        offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
        x_ptrs = partial_ptr + ((first_row + row).to(gl.int64) * STRIDE + column)[:, None] + offs[None, :]
        gl.store(x_ptrs, x.to(partial_ptr.dtype.element_ty), mask=(row < num_rows)[:, None])
    else:
        buffer.store(x.to(partial_ptr.dtype.element_ty))
        fence_async_shared()
        tma.async_copy_shared_to_global(descriptor, [first_row + tile * EDGE, column], buffer)


@gluon.jit
def _produce_forward(q_ptr, pairs_ptr, num_rows, q_s, token_s, full, empty,
                     STRIDE_Q: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fills the ring of the forward pass.

    Invariant: after n steps, n tiles were asked for, and the tokens of STAGES more.
    """
    lane = gl.arange(0, EDGE, layout=gl.SliceLayout(1, _by_16_bytes(DIM)))
    for tile in gl.static_range(STAGES):
        _copy_tokens(token_s, tile, pairs_ptr, num_rows, GROUP, 2 * STAGES)
    for tile in range(0, gl.cdiv(num_rows, EDGE)):
        stage = tile % STAGES
        async_copy.wait_group(STAGES - 1)
        token = token_s.index(tile % (2 * STAGES)).load(gl.SliceLayout(1, _by_16_bytes(DIM)))
        in_group = gl.minimum(tile * EDGE + lane, num_rows - 1) % GROUP
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        _copy_rows(q_s.index(stage), q_ptr, token.to(gl.int64) * STRIDE_Q + in_group * DIM, DIM)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        _copy_tokens(token_s, tile + STAGES, pairs_ptr, num_rows, GROUP, 2 * STAGES)
    async_copy.wait_group(0)


@gluon.jit
def _attend(tile, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row, num_rows,
            key_first, key_end, ahead, scale, DIM: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
            EARLY: gl.constexpr):  # fmt: skip
    """The softmax of a tile of rows over the block, normalised, with its lse."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    stage = tile % STAGES
    mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
    # What threads have copied is read by the matrix unit, in another way to shared memory.
    fence_async_shared()
    scores = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    scores = warpgroup_mma(q_s.index(stage), k_s.index(0).permute((1, 0)), scores, use_acc=False, is_async=True)
    seen = _rows_seen(tile, token_s, num_rows, key_first, key_end, ahead, 2 * STAGES, False, row_layout)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty.index(stage), count=1)
    key = gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))
    scores = gl.where(key[None, :] < seen[:, None], scores, -float("inf"))
    # The first key of a block is visible to all of its rows, so that no maximum is -inf. In log2 units.
    largest = gl.max(scores, 1) * (scale * LOG2_E)
    p = gl.exp2(scores * (scale * LOG2_E) - largest[:, None])
    total = gl.sum(p, 1)
    p = (p * (1.0 / total)[:, None]).to(q_s.dtype)
    out = gl.zeros([EDGE, DIM], gl.float32, out_layout)
    p = gl.convert_layout(p, gl.DotOperandLayout(0, out_layout, 2))
    out = warpgroup_mma(p, v_s.index(0), out, use_acc=False, is_async=True)
    row = tile * EDGE + gl.arange(0, EDGE, layout=row_layout)
    lse = (largest + gl.log2(total)) * LN_2
    out = warpgroup_mma_wait(0, deps=[out])
    if tile == 0:
        # The kernel before may still read the partial results of the chunk before.
        take_over(EARLY)
    gl.store(lse_ptr + row, lse, mask=row < num_rows)
    tma.store_wait(0)
    _store_tile(tile, out_s, descriptor, partial_ptr, first_row, num_rows, 0, DIM, out, DIM, TAIL, out_layout)


@gluon.jit
def _consume_forward(k_s, v_s, q_s, token_s, out_s, full, empty, ready, descriptor, partial_ptr, lse_ptr, first_row,
                     num_rows, key_first, key_end, ahead, scale, DIM: gl.constexpr, STAGES: gl.constexpr,
                     EARLY: gl.constexpr):  # fmt: skip
    """Tile after tile; waits for the kernel before when the first one is to be stored."""
    whole = num_rows // EDGE
    mbarrier.wait(ready.index(0), 0)
    for tile in range(0, whole):
        _attend(tile, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, DIM, STAGES, False, EARLY)  # fmt: skip
    if whole * EDGE < num_rows:
        _attend(whole, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, DIM, STAGES, True, EARLY)  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_sequences", "num_blocks", "first_place", "places", "fresh"])
def _selected_fwd_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    descriptor,
    partial_ptr,
    partial_lse_ptr,
    pairs_ptr,
    segments_ptr,
    segment_ends_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    num_sequences,
    num_blocks,
    first_place,
    places,
    fresh,
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    EARLY: gl.constexpr,
):
    """What `_selected_fwd_kv_outer_kernel` computes, for blocks of 64.

    Grid: (segment of the chunk,); programs beyond the last segment leave.
    Owns: the partial results of its pairs: whole tiles by `descriptor`, the last one and lse by plain stores.
    Invariant: after n steps of the consumer, the rows of the first n tiles are stored or on their way.
    """
    STAGES: gl.constexpr = FORWARD_STAGES
    if fresh != 0:
        take_over(EARLY)
    first_pair, in_chunk, pairs, bucket, _ = segment_of_program(segments_ptr, segment_ends_ptr, first_place, places)
    if pairs == 0:
        take_over(EARLY)
        return
    head = bucket // num_blocks
    key_first, key_end, ahead = keys_of_bucket(
        bucket % num_blocks, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    last_key = key_end - 1
    num_rows, first_row = pairs * GROUP, in_chunk * GROUP
    full, empty, ready = _ring(STAGES)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [1, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [1, EDGE, DIM], TILE)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    out_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [EDGE, DIM], TILE)
    token_s = gl.allocate_shared_memory(gl.int32, [2 * STAGES, EDGE], LINE)
    _copy_keys(k_s, v_s, k_ptr, v_ptr, key_first, last_key, head, STRIDE_K, STRIDE_V, DIM, ready.index(0))
    gl.warp_specialize(
        [
            (_consume_forward, (
                k_s, v_s, q_s, token_s, out_s, full, empty, ready, descriptor, partial_ptr,
                partial_lse_ptr + first_row.to(gl.int64), first_row, num_rows, key_first, key_end, ahead, scale,
                DIM, STAGES, EARLY,
            )),
            (_produce_forward, (
                q_ptr + head * (GROUP * DIM), pairs_ptr + first_pair, num_rows, q_s, token_s, full, empty,
                STRIDE_Q, GROUP, DIM, STAGES,
            )),
        ],
        [WARPS],
        [FORWARD_PRODUCER],
    )  # fmt: skip


@gluon.jit
def _produce_backward(q_ptr, do_ptr, shift_ptr, delta_ptr, pairs_ptr, num_rows, q_s, do_s, row_s, token_s, full, empty,
                      STRIDE_Q: gl.constexpr, STRIDE_DO: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
                      DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fills the ring of the backward pass; `row_s` holds shift and delta of each tile. See `_produce_forward`."""
    line_layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows_layout: gl.constexpr = gl.SliceLayout(1, _by_16_bytes(DIM))
    line, lane = gl.arange(0, EDGE, layout=line_layout), gl.arange(0, EDGE, layout=rows_layout)
    for tile in gl.static_range(STAGES):
        _copy_tokens(token_s, tile, pairs_ptr, num_rows, GROUP, 2 * STAGES)
    for tile in range(0, gl.cdiv(num_rows, EDGE)):
        stage = tile % STAGES
        async_copy.wait_group(STAGES - 1)
        tokens = token_s.index(tile % (2 * STAGES))
        token = tokens.load(rows_layout).to(gl.int64)
        in_group = gl.minimum(tile * EDGE + lane, num_rows - 1) % GROUP
        at = tokens.load(line_layout).to(gl.int64) * NUM_HEADS
        at += gl.minimum(tile * EDGE + line, num_rows - 1) % GROUP
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        _copy_rows(q_s.index(stage), q_ptr, token * STRIDE_Q + in_group * DIM, DIM)
        _copy_rows(do_s.index(stage), do_ptr, token * STRIDE_DO + in_group * DIM, DIM)
        async_copy.async_copy_global_to_shared(row_s.index(2 * stage), shift_ptr + at)
        async_copy.async_copy_global_to_shared(row_s.index(2 * stage + 1), delta_ptr + at)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        _copy_tokens(token_s, tile + STAGES, pairs_ptr, num_rows, GROUP, 2 * STAGES)
    async_copy.wait_group(0)


@gluon.jit
def _differentiate(tile, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, full, empty, descriptor, partial_ptr,
                   first_row, column, num_rows, key_first, key_end, ahead, scale,
                   WHO: gl.constexpr, DIM: gl.constexpr, STRIDE: gl.constexpr, WITH_DQ: gl.constexpr,
                   STAGES: gl.constexpr, LIFT: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """Adds a tile of rows to dK and dV, and stores its dQ before `softmax_scale`."""
    dtype: gl.constexpr = q_s.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    k, v = k_s.index(none), v_s.index(none)
    p_tile, ds_tile = p_s.index(2 * WHO + none), p_s.index(2 * WHO + 1 + none)
    dq_tile = dq_s.index(WHO * (2 * EDGE // DIM) + none)
    stage = tile % STAGES
    q, do = q_s.index(stage), do_s.index(stage)
    mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
    fence_async_shared()
    zeros = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    shift = row_s.index(2 * stage).load(row_layout)
    seen = _rows_seen(tile, token_s, num_rows, key_first, key_end, ahead, 2 * STAGES, TAIL, row_layout)
    scores = warpgroup_mma_wait(1, deps=[scores])
    key = gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))
    p = exp_below(scores, scale, shift[:, None], False)
    p = gl.where(key[None, :] < seen[:, None], p, 0.0)
    # The tile before may still be read by the copy engine: dQ takes the place of P and dS.
    tma.store_wait(0)
    p_tile.store((p * LIFT).to(dtype))
    delta = row_s.index(2 * stage + 1).load(row_layout)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds_tile.store((p * (dp - delta[:, None])).to(dtype))
    fence_async_shared()
    dv = warpgroup_mma(p_tile.permute((1, 0)), do, dv, is_async=True)
    dk = warpgroup_mma(ds_tile.permute((1, 0)), q, dk, is_async=True)
    if WITH_DQ:
        # With dS from registers the products are not asynchronous any more: too few are left.
        dq = gl.zeros([EDGE, DIM], gl.float32, wide_layout)
        dq = warpgroup_mma(ds_tile, k, dq, use_acc=False, is_async=True)
        dq, dv, dk = warpgroup_mma_wait(0, deps=[dq, dv, dk])
        mbarrier.arrive(empty.index(stage), count=1)
        _store_tile(
            tile, dq_tile, descriptor, partial_ptr, first_row, num_rows, column, STRIDE, dq, DIM, TAIL, wide_layout
        )
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consume_backward(
    WHO: gl.constexpr, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, exchange_s, full, empty, ready, done,
    descriptor, partial_ptr, tiles_ptr, sum_ptr, grad_ptr, first_row, column, num_rows, key_first, key_end, ahead, tile,
    head, first_head, chunk_heads, add, last, scale,
    DIM: gl.constexpr, STRIDE: gl.constexpr, HEADS: gl.constexpr, WITH_DQ: gl.constexpr, STAGES: gl.constexpr,
    LIFT: gl.constexpr,
):  # fmt: skip
    """Every second tile of rows; then dK of all of them (the first consumer) or dV (the second)."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    dk = gl.zeros([EDGE, DIM], gl.float32, layout)
    dv = gl.zeros([EDGE, DIM], gl.float32, layout)
    whole = num_rows // EDGE
    mbarrier.wait(ready.index(0), 0)
    for i in range(WHO, whole, 2):
        dk, dv = _differentiate(
            i, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, full, empty, descriptor, partial_ptr, first_row,
            column, num_rows, key_first, key_end, ahead, scale, WHO, DIM, STRIDE, WITH_DQ, STAGES, LIFT, False,
        )  # fmt: skip
    if (whole * EDGE < num_rows) & (whole % 2 == WHO):
        dk, dv = _differentiate(
            whole, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, full, empty, descriptor, partial_ptr,
            first_row, column, num_rows, key_first, key_end, ahead, scale, WHO, DIM, STRIDE, WITH_DQ, STAGES, LIFT,
            True,
        )  # fmt: skip
    tma.store_wait(0)
    # Both are done with the ring, in which each leaves what the other one needs.
    mbarrier.arrive(done.index(0), count=1)
    mbarrier.wait(done.index(0), 0)
    exchange_s.index(WHO).store(dv if WHO == 0 else dk)
    mbarrier.arrive(done.index(1), count=1)
    mbarrier.wait(done.index(1), 0)
    total = exchange_s.index(1 - WHO).load(layout)
    total = dk + total if WHO == 0 else (dv + total) / LIFT
    in_tile = gl.arange(0, EDGE, layout=gl.SliceLayout(1, layout))
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    if tile >= 0:
        gl.store(tiles_ptr + ((tile.to(gl.int64) * EDGE + in_tile) * DIM)[:, None] + offs[None, :], total)
    else:
        key = key_first + in_tile
        factor = scale if WHO == 0 else 1.0
        add_up(
            total, sum_ptr, grad_ptr, key, offs, key < key_end, head, first_head, chunk_heads, add, last, factor,
            HEADS, DIM,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "num_sequences", "num_blocks", "first_place", "places", "first_head", "chunk_heads", "add", "last"
    ]
)  # fmt: skip
def _selected_bwd_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    shift_ptr,
    delta_ptr,
    descriptor,
    partial_ptr,
    dk_tiles_ptr,
    dv_tiles_ptr,
    dk_sum_ptr,
    dv_sum_ptr,
    dk_ptr,
    dv_ptr,
    pairs_ptr,
    segments_ptr,
    segment_ends_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    num_sequences,
    num_blocks,
    first_place,
    places,
    first_head,
    chunk_heads,
    add,
    last,
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    STRIDE_DO: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WITH_DQ: gl.constexpr,
    EARLY: gl.constexpr,
):
    """What `_selected_bwd_kv_outer_kernel` computes, for parts of 64 keys.

    Grid: (segment of the chunk, part of its block); programs beyond the last segment leave.
    Owns: the partial dQ of its pairs, whole tiles by `descriptor` (None without dQ) and the last one by plain stores;
        and its tile of dk and dv; or, if it is alone in its bucket, the gradients of the keys.
    Invariant: after n steps of both consumers, their dk and dv add up to the sums over the first 2 n tiles of rows.
    """
    STAGES: gl.constexpr = BACKWARD_STAGES
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    LIFT: gl.constexpr = lift(q_ptr.dtype.element_ty)
    PARTS: gl.constexpr = BLOCK_SIZE // EDGE
    wait_for_the_kernel_before(EARLY)
    first_pair, in_chunk, pairs, bucket, tile = segment_of_program(segments_ptr, segment_ends_ptr, first_place, places)
    if pairs == 0:
        return
    part, head = gl.program_id(1), bucket // num_blocks
    key_first, key_end, ahead = keys_of_bucket(
        bucket % num_blocks, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    key_first += part * EDGE
    # The last block of a sequence may end before this part of it begins: then no row sees a key of it.
    last_key = key_end - 1
    key_end = gl.minimum(gl.maximum(key_end, key_first), key_first + EDGE)
    if tile >= 0:
        tile = tile * PARTS + part
    num_rows, first_row = pairs * GROUP, in_chunk * GROUP
    full, empty, ready = _ring(STAGES)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(done.index(i), count=2)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [1, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [1, EDGE, DIM], TILE)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    do_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    row_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, EDGE], LINE)
    token_s = gl.allocate_shared_memory(gl.int32, [2 * STAGES, EDGE], LINE)
    p_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [4, EDGE, EDGE], TILE)
    # P and dS of a consumer have the place of its dQ, or more.
    dq_s = p_s._reinterpret(q_ptr.dtype.element_ty, [4 * EDGE // DIM, EDGE, DIM], TILE)
    exchange_s = q_s._reinterpret(gl.float32, [2, EDGE, DIM], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    _copy_keys(k_s, v_s, k_ptr, v_ptr, key_first, last_key, head, STRIDE_K, STRIDE_V, DIM, ready.index(0))
    gl.warp_specialize(
        [
            (_consume_backward, (
                0, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, exchange_s, full, empty, ready, done,
                descriptor, partial_ptr, dk_tiles_ptr, dk_sum_ptr, dk_ptr, first_row, part * DIM, num_rows, key_first,
                key_end, ahead, tile, head, first_head, chunk_heads, add, last, scale,
                DIM, PARTS * DIM, HEADS, WITH_DQ, STAGES, LIFT,
            )),
            (_consume_backward, (
                1, k_s, v_s, q_s, do_s, row_s, token_s, p_s, dq_s, exchange_s, full, empty, ready, done,
                descriptor, partial_ptr, dv_tiles_ptr, dv_sum_ptr, dv_ptr, first_row, part * DIM, num_rows, key_first,
                key_end, ahead, tile, head, first_head, chunk_heads, add, last, scale,
                DIM, PARTS * DIM, HEADS, WITH_DQ, STAGES, LIFT,
            )),
            (_produce_backward, (
                q_ptr + head * (GROUP * DIM), d_out_ptr + head * (GROUP * DIM), shift_ptr + head * GROUP,
                delta_ptr + head * GROUP, pairs_ptr + first_pair, num_rows, q_s, do_s, row_s, token_s, full, empty,
                STRIDE_Q, STRIDE_DO, NUM_HEADS, GROUP, DIM, STAGES,
            )),
        ],
        [WARPS, WARPS],
        [BACKWARD_CONSUMER, BACKWARD_PRODUCER],
    )  # fmt: skip
