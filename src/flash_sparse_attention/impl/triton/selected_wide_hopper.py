"""The kernels of selected attention for Hopper (sm_90) and 128 keys at a time; see `selected_hopper`.

Forward, of blocks of 128:

    producer     4 warps    as there
    consumers    2 groups of 4 warps, for alternate tiles of rows: S = Q K^T of both halves of the keys, P, P V

Backward, of parts of 128:

    producer     4 warps    as there
    consumers    2 groups of 4 warps, for the same tile of rows; each has 64 of the keys, and their dK and dV:
       |                    S, dP -> P, dS -> dV, dK
       |                    dS of both in shared memory -> dQ, of which each has half of the columns
    copy engine (TMA)       stores it

Backward, rows are gathered, and partial results stored, once for 128 keys: half as often as with parts of 64.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .primitives import LN_2, LOG2_E, exp_below, lift, take_over, wait_for_the_kernel_before
from .segment import add_up, keys_of_bucket, segment_of_program
from .selected_hopper import (
    BARRIER,
    EDGE,
    LINE,
    TILE,
    WARPS,
    _copy_keys,
    _produce_backward,
    _produce_forward,
    _ring,
    _rows_seen,
    _store_tile,
)

# Keys of a part; tiles of the ring, of which backward no fourth fits; registers of a thread, as in `selected_hopper`.
KEYS, FORWARD_STAGES, STAGES = gl.constexpr(128), gl.constexpr(4), gl.constexpr(3)
OPTIONS = {"num_warps": 4, "maxnreg": 168}
CONSUMER, PRODUCER = gl.constexpr(232), gl.constexpr(40)


@gluon.jit
def _attend(tile, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row, num_rows,
            key_first, key_end, ahead, scale, WHO: gl.constexpr, DIM: gl.constexpr, TAIL: gl.constexpr,
            EARLY: gl.constexpr):  # fmt: skip
    """The softmax of a tile of rows over the block, normalised, with its lse."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    stage = tile % FORWARD_STAGES
    q = q_s.index(stage)
    mbarrier.wait(full.index(stage), (tile // FORWARD_STAGES) & 1)
    fence_async_shared()
    zeros = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    low = warpgroup_mma(q, k_s.index(none).permute((1, 0)), zeros, use_acc=False, is_async=True)
    high = warpgroup_mma(q, k_s.index(1 + none).permute((1, 0)), zeros, use_acc=False, is_async=True)
    seen = _rows_seen(tile, token_s, num_rows, key_first, key_end, ahead, 2 * FORWARD_STAGES, False, row_layout)
    low, high = warpgroup_mma_wait(0, deps=[low, high])
    mbarrier.arrive(empty.index(stage), count=1)
    key = gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))[None, :]
    low = gl.where(key < seen[:, None], low, -float("inf"))
    high = gl.where(key + EDGE < seen[:, None], high, -float("inf"))
    # The first key of a block is visible to all of its rows, so that no maximum is -inf. In log2 units.
    largest = gl.max(gl.maximum(low, high), 1) * (scale * LOG2_E)
    low = gl.exp2(low * (scale * LOG2_E) - largest[:, None])
    high = gl.exp2(high * (scale * LOG2_E) - largest[:, None])
    total = gl.sum(low + high, 1)
    share = (1.0 / total)[:, None]
    p_low = gl.convert_layout((low * share).to(q_s.dtype), operand)
    p_high = gl.convert_layout((high * share).to(q_s.dtype), operand)
    out = gl.zeros([EDGE, DIM], gl.float32, out_layout)
    out = warpgroup_mma(p_low, v_s.index(none), out, use_acc=False, is_async=True)
    out = warpgroup_mma(p_high, v_s.index(1 + none), out, is_async=True)
    row = tile * EDGE + gl.arange(0, EDGE, layout=row_layout)
    lse = (largest + gl.log2(total)) * LN_2
    out = warpgroup_mma_wait(0, deps=[out])
    if tile == WHO:
        # The kernel before may still read the partial results of the chunk before.
        take_over(EARLY)
    gl.store(lse_ptr + row, lse, mask=row < num_rows)
    tma.store_wait(0)
    _store_tile(
        tile, out_s.index(WHO + none), descriptor, partial_ptr, first_row, num_rows, 0, DIM, out, DIM, TAIL, out_layout
    )


@gluon.jit
def _consume_forward(WHO: gl.constexpr, k_s, v_s, q_s, token_s, out_s, full, empty, ready, descriptor, partial_ptr,
                     lse_ptr, first_row, num_rows, key_first, key_end, ahead, scale, DIM: gl.constexpr,
                     EARLY: gl.constexpr):  # fmt: skip
    """Every second tile; waits for the kernel before when its first one is to be stored."""
    whole = num_rows // EDGE
    mbarrier.wait(ready.index(0), 0)
    for tile in range(WHO, whole, 2):
        _attend(tile, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, WHO, DIM, False, EARLY)  # fmt: skip
    if (whole * EDGE < num_rows) & (whole % 2 == WHO):
        _attend(whole, k_s, v_s, q_s, token_s, out_s, full, empty, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, WHO, DIM, True, EARLY)  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_sequences", "num_blocks", "first_place", "places", "fresh"])
def _selected_fwd_wide_hopper_kernel(
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
    """What `_selected_fwd_kv_outer_kernel` computes, for blocks of 128.

    Grid: (segment of the chunk,); programs beyond the last segment leave.
    Owns: the partial results of its pairs: whole tiles by `descriptor`, the last one and lse by plain stores.
    Invariant: after n steps of a consumer, the rows of its first n tiles are stored or on their way.
    """
    gl.static_assert(BLOCK_SIZE == KEYS)
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
    full, empty, ready = _ring(FORWARD_STAGES)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, DIM], TILE)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [FORWARD_STAGES, EDGE, DIM], TILE)
    out_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, DIM], TILE)
    token_s = gl.allocate_shared_memory(gl.int32, [2 * FORWARD_STAGES, EDGE], LINE)
    _copy_keys(k_s, v_s, k_ptr, v_ptr, key_first, last_key, head, STRIDE_K, STRIDE_V, DIM, ready.index(0))
    lse_ptr = partial_lse_ptr + first_row.to(gl.int64)
    gl.warp_specialize(
        [
            (_consume_forward, (
                0, k_s, v_s, q_s, token_s, out_s, full, empty, ready, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, DIM, EARLY,
            )),
            (_consume_forward, (
                1, k_s, v_s, q_s, token_s, out_s, full, empty, ready, descriptor, partial_ptr, lse_ptr, first_row,
                num_rows, key_first, key_end, ahead, scale, DIM, EARLY,
            )),
            (_produce_forward, (
                q_ptr + head * (GROUP * DIM), pairs_ptr + first_pair, num_rows, q_s, token_s, full, empty,
                STRIDE_Q, GROUP, DIM, FORWARD_STAGES,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


@gluon.jit
def _differentiate(tile, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, both, descriptor,
                   partial_ptr, first_row, column, num_rows, key_first, key_end, ahead, scale,
                   WHO: gl.constexpr, DIM: gl.constexpr, STRIDE: gl.constexpr, WITH_DQ: gl.constexpr,
                   LIFT: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """Adds a tile of rows to dK and dV of its keys, and stores its half of the columns of dQ before `softmax_scale`."""
    HALF: gl.constexpr = DIM // 2
    dtype: gl.constexpr = q_s.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    half_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    k, v, p_tile = k_s.index(WHO + none), v_s.index(WHO + none), p_s.index(WHO + none)
    # Of the tile before, the other consumer may still read dS.
    parity = tile & 1
    ds_tile = ds_s.index(2 * parity + WHO)
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
    # The tile before may still be read by the copy engine: dQ takes the place of P.
    tma.store_wait(0)
    p_tile.store((p * LIFT).to(dtype))
    delta = row_s.index(2 * stage + 1).load(row_layout)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds_tile.store((p * (dp - delta[:, None])).to(dtype))
    fence_async_shared()
    if WITH_DQ:
        mbarrier.arrive(both.index(parity), count=1)
    dv = warpgroup_mma(p_tile.permute((1, 0)), do, dv, is_async=True)
    dk = warpgroup_mma(ds_tile.permute((1, 0)), q, dk, is_async=True)
    if WITH_DQ:
        mbarrier.wait(both.index(parity), (tile >> 1) & 1)
        dq = gl.zeros([EDGE, HALF], gl.float32, half_layout)
        k_first, k_second = k_s.index(none).slice(WHO * HALF, HALF, 1), k_s.index(1 + none).slice(WHO * HALF, HALF, 1)
        dq = warpgroup_mma(ds_s.index(2 * parity), k_first, dq, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds_s.index(2 * parity + 1), k_second, dq, is_async=True)
        dq, dv, dk = warpgroup_mma_wait(0, deps=[dq, dv, dk])
        mbarrier.arrive(empty.index(stage), count=1)
        _store_tile(
            tile, p_tile, descriptor, partial_ptr, first_row, num_rows, column + WHO * HALF, STRIDE, dq, HALF, TAIL,
            half_layout,
        )  # fmt: skip
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consume(
    WHO: gl.constexpr, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, ready, both, descriptor,
    partial_ptr, dk_tiles_ptr, dv_tiles_ptr, dk_sum_ptr, dv_sum_ptr, dk_ptr, dv_ptr, first_row, column, num_rows,
    part_first, block_end, ahead, tile, head, first_head, chunk_heads, add, last, scale,
    DIM: gl.constexpr, STRIDE: gl.constexpr, HEADS: gl.constexpr, WITH_DQ: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    """All tiles of rows, for its half of the keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    key_first = part_first + WHO * EDGE
    # The block may end before this half of the part begins: then no row sees a key of it.
    key_end = gl.minimum(gl.maximum(block_end, key_first), key_first + EDGE)
    dk = gl.zeros([EDGE, DIM], gl.float32, layout)
    dv = gl.zeros([EDGE, DIM], gl.float32, layout)
    whole = num_rows // EDGE
    mbarrier.wait(ready.index(0), 0)
    for i in range(0, whole):
        dk, dv = _differentiate(
            i, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, both, descriptor, partial_ptr,
            first_row, column, num_rows, key_first, key_end, ahead, scale, WHO, DIM, STRIDE, WITH_DQ, LIFT, False,
        )  # fmt: skip
    if whole * EDGE < num_rows:
        dk, dv = _differentiate(
            whole, dk, dv, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, both, descriptor, partial_ptr,
            first_row, column, num_rows, key_first, key_end, ahead, scale, WHO, DIM, STRIDE, WITH_DQ, LIFT, True,
        )  # fmt: skip
    tma.store_wait(0)
    dv = dv / LIFT
    in_tile = gl.arange(0, EDGE, layout=gl.SliceLayout(1, layout))
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    if tile >= 0:
        at = (((tile.to(gl.int64) * 2 + WHO) * EDGE + in_tile) * DIM)[:, None] + offs[None, :]
        gl.store(dk_tiles_ptr + at, dk)
        gl.store(dv_tiles_ptr + at, dv)
    else:
        key = key_first + in_tile
        own = key, offs, key < key_end, head, first_head, chunk_heads, add, last
        add_up(dk, dk_sum_ptr, dk_ptr, *own, scale, HEADS, DIM)
        add_up(dv, dv_sum_ptr, dv_ptr, *own, 1.0, HEADS, DIM)


@gluon.jit(
    do_not_specialize=[
        "num_sequences", "num_blocks", "first_place", "places", "first_head", "chunk_heads", "add", "last"
    ]
)  # fmt: skip
def _selected_bwd_wide_hopper_kernel(
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
    """What `_selected_bwd_kv_outer_kernel` computes, for parts of 128 keys and heads of 128.

    Grid: (segment of the chunk, part of its block); programs beyond the last segment leave.
    Owns: the partial dQ of its pairs, whole tiles by `descriptor` (None without dQ) and the last one by plain stores;
        and its tiles of dk and dv; or, if it is alone in its bucket, the gradients of the keys.
    Invariant: after n steps of both consumers, their dk and dv are the sums over the first n tiles of rows.
    """
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    LIFT: gl.constexpr = lift(q_ptr.dtype.element_ty)
    PARTS: gl.constexpr = BLOCK_SIZE // KEYS
    wait_for_the_kernel_before(EARLY)
    first_pair, in_chunk, pairs, bucket, tile = segment_of_program(segments_ptr, segment_ends_ptr, first_place, places)
    if pairs == 0:
        return
    part, head = gl.program_id(1), bucket // num_blocks
    key_first, key_end, ahead = keys_of_bucket(
        bucket % num_blocks, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    last_key = key_end - 1
    key_first += part * KEYS
    if tile >= 0:
        tile = tile * PARTS + part
    num_rows, first_row = pairs * GROUP, in_chunk * GROUP
    full, empty, ready = _ring(STAGES, 2)
    both = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(both.index(i), count=2)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, DIM], TILE)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    do_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    row_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, EDGE], LINE)
    token_s = gl.allocate_shared_memory(gl.int32, [2 * STAGES, EDGE], LINE)
    p_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [2, EDGE, EDGE], TILE)
    ds_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [4, EDGE, EDGE], TILE)
    _copy_keys(k_s, v_s, k_ptr, v_ptr, key_first, last_key, head, STRIDE_K, STRIDE_V, DIM, ready.index(0))
    gl.warp_specialize(
        [
            (_consume, (
                0, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, ready, both, descriptor, partial_ptr,
                dk_tiles_ptr, dv_tiles_ptr, dk_sum_ptr, dv_sum_ptr, dk_ptr, dv_ptr, first_row, part * DIM, num_rows,
                key_first, key_end, ahead, tile, head, first_head, chunk_heads, add, last, scale,
                DIM, PARTS * DIM, HEADS, WITH_DQ, LIFT,
            )),
            (_consume, (
                1, k_s, v_s, q_s, do_s, row_s, token_s, p_s, ds_s, full, empty, ready, both, descriptor, partial_ptr,
                dk_tiles_ptr, dv_tiles_ptr, dk_sum_ptr, dv_sum_ptr, dk_ptr, dv_ptr, first_row, part * DIM, num_rows,
                key_first, key_end, ahead, tile, head, first_head, chunk_heads, add, last, scale,
                DIM, PARTS * DIM, HEADS, WITH_DQ, LIFT,
            )),
            (_produce_backward, (
                q_ptr + head * (GROUP * DIM), d_out_ptr + head * (GROUP * DIM), shift_ptr + head * GROUP,
                delta_ptr + head * GROUP, pairs_ptr + first_pair, num_rows, q_s, do_s, row_s, token_s, full, empty,
                STRIDE_Q, STRIDE_DO, NUM_HEADS, GROUP, DIM, STAGES,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER, PRODUCER],
    )  # fmt: skip
