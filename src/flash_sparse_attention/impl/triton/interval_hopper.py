"""The kernels of interval attention for Hopper (sm_90), with warps of two kinds; see `interval`.

    producer     4 warps    tiles of K and V (forward, dQ) or of q, dO, shift and delta (dK, dV), ahead of the consumers
       |                    a ring of tiles in shared memory; each is full, then empty again (two barriers)
    consumers    groups of 4 warps with 64 rows (forward: 3, dQ: 2) or 64 keys each (dK, dV: 2); all take every tile

While some consumers exponentiate, another one has the matrix units. A tile of K and V that many rows share is a command
to the copy engine; rows, which are cut from several heads of many tokens, the threads of the producer copy. Results are
the same as those of `interval`, and bitwise equal from run to run. Written in Gluon, as `selected_hopper` is.
"""

from __future__ import annotations

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

from .interval import _key_range, _last_token, _start, _visible, interval_end
from .primitives import LN_2, LOG2_E, exp_below, lift, past_of, tile_of_rows
from .selected_hopper import BARRIER, EDGE, LINE, TILE, WARPS, _by_16_bytes, _copy_rows

# Groups of consumers, and tiles of the ring. H200, 65,536 tokens, 32/8 heads of 128, ms. Compressed, forward: 3.76 so;
# where warps stored their rows from registers 3.99, then with 2 groups 4.65, and 4.36 where the product with V of the
# tile before went on meanwhile (3 groups have too few registers for that), with tiles of 128 keys 5.1 to 5.5. With
# threads that copy K and V: forward 4.31 for 3.99, dQ 5.10 for 4.86.
FORWARD_CONSUMERS, FORWARD_STAGES = gl.constexpr(3), gl.constexpr(4)
BACKWARD_CONSUMERS, DQ_STAGES, DKV_STAGES = gl.constexpr(2), gl.constexpr(4), gl.constexpr(4)
# Registers of a thread: on average, of a consumer and of the producer.
FORWARD_OPTIONS = {"num_warps": 4, "maxnreg": 128}
BACKWARD_OPTIONS = {"num_warps": 4, "maxnreg": 168}
FORWARD_CONSUMER, FORWARD_PRODUCER = gl.constexpr(160), gl.constexpr(32)
BACKWARD_CONSUMER, BACKWARD_PRODUCER = gl.constexpr(232), gl.constexpr(40)
# Rows or keys of a program.
FORWARD_ROWS = EDGE.value * FORWARD_CONSUMERS.value
BACKWARD_ROWS = EDGE.value * BACKWARD_CONSUMERS.value


def key_descriptors(k: Tensor, v: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """By which the copy engine copies 64 rows of a head of k and v, `[M, Hk, D]`."""

    def of(x: Tensor) -> TensorDescriptor:
        length, heads, dim = x.shape
        return TensorDescriptor(x, [length, heads * dim], [x.stride(0), 1], [EDGE.value, dim], TILE.value)

    return of(k), of(v)


@gluon.jit
def _barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring whose tiles have two halves, of a tile beside it, and of what is read once.

    `ARRIVALS` fill half a tile of the ring; all threads of the producer the others.
    """
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 2, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=CONSUMERS)
    mbarrier.init(full.index(2 * STAGES), count=32 * WARPS)
    mbarrier.init(full.index(2 * STAGES + 1), count=32 * WARPS)
    mbarrier.init(ready.index(0), count=32 * WARPS)
    return full, empty, ready


@gluon.jit
def _copy_tile(tile, x_ptr, row, last, STRIDE: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr):
    """Asks for 64 (token, head of the group) rows; past the last one it stands again."""
    row = gl.minimum(row + gl.arange(0, EDGE, layout=gl.SliceLayout(1, _by_16_bytes(DIM))), last)
    _copy_rows(tile, x_ptr, (row // GROUP).to(gl.int64) * STRIDE + row % GROUP * DIM, DIM)


@gluon.jit
def _tiles_of_keys(first_row, num_rows, past, GROUP: gl.constexpr, KERNEL_SIZE: gl.constexpr,
                   KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Keys that a tile of rows sees: the first, one past the last; and in tiles of them four numbers.

    All tiles, whole ones, and one past the last of those that need a mask at their beginning, and of those that follow
    without one; the others need a mask at their end.
    """
    first, _, last = _key_range(first_row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS, EDGE)
    seen_by_all = interval_end(past + first_row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    tiles = gl.cdiv(last - first, EDGE)
    head_end = gl.minimum(gl.cdiv(_start(last, WINDOW) - first, EDGE), tiles)
    clear_end = gl.maximum(gl.maximum(seen_by_all - first, 0) // EDGE, head_end)
    return first, last, tiles, (last - first) // EDGE, head_end, clear_end


@gluon.jit
def _wait_full(full, tile, whole, HALF: gl.constexpr, STAGES: gl.constexpr):
    """Waits for K (HALF 0) or V (1) of a tile; the one after the whole ones has barriers of its own."""
    alone = tile >= whole
    at = gl.where(alone, 2 * STAGES, 2 * (tile % STAGES)) + HALF
    mbarrier.wait(full.index(at), gl.where(alone, 0, (tile // STAGES) & 1))
    # What threads have copied is read by the matrix unit, in another way to shared memory.
    fence_async_shared()


@gluon.jit
def _produce_keys(k_desc, v_desc, k_ptr, v_ptr, k_s, v_s, full, empty, key_start, column, first, last, tiles, whole,
                  STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fills the ring with tiles of K and V.

    The copy engine copies whole tiles. Behind the last key may stand anything, and 0 times NaN is NaN: threads copy the
    last tile, with the last key again where there are no more.
    """
    for tile in range(0, whole):
        stage = tile % STAGES
        row = key_start + first + tile * EDGE
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(2 * stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row, column], full.index(2 * stage), k_s.index(stage))
        mbarrier.expect(full.index(2 * stage + 1), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, column], full.index(2 * stage + 1), v_s.index(stage))
    if whole < tiles:
        stage = whole % STAGES
        key = first + whole * EDGE
        k_ptr += key_start.to(gl.int64) * STRIDE_K + column
        v_ptr += key_start.to(gl.int64) * STRIDE_V + column
        mbarrier.wait(empty.index(stage), ((whole // STAGES) & 1) ^ 1)
        _copy_tile(k_s.index(stage), k_ptr, key, last - 1, STRIDE_K, 1, DIM)
        async_copy.mbarrier_arrive(full.index(2 * STAGES), increment_count=False)
        _copy_tile(v_s.index(stage), v_ptr, key, last - 1, STRIDE_V, 1, DIM)
        async_copy.mbarrier_arrive(full.index(2 * STAGES + 1), increment_count=False)
        async_copy.wait_group(0)


@gluon.jit
def _ends_of_rows(row, num_rows, past, GROUP: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr,
                  WINDOW: gl.constexpr):  # fmt: skip
    """First key that each row sees, and one past its last; rows that are not there see what the last one does."""
    end = interval_end(past + gl.minimum(row, num_rows - 1) // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    return _start(end, WINDOW), end


@gluon.jit
def _load_line(x_ptr, row, num_rows, other, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """One float32 of each (token, head of the group) row."""
    return gl.load(x_ptr + (row // GROUP).to(gl.int64) * NUM_HEADS + row % GROUP, mask=row < num_rows, other=other)


@gluon.jit
def _store_rows(x_ptr, first_row, num_rows, x, buffer, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
                DIM: gl.constexpr, ADD: gl.constexpr, STAY: gl.constexpr = False):  # fmt: skip
    """Stores 64 (token, head of the group) rows, or adds them to what is there; STAY: L2 keeps them as long as it can.

    They go through `buffer`, in shared memory, as matrix units leave a thread 4 bytes of each piece of a row.
    """
    layout: gl.constexpr = _by_16_bytes(DIM)
    row = first_row + gl.arange(0, EDGE, layout=gl.SliceLayout(1, layout))
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    x_ptrs = x_ptr + (((row // GROUP).to(gl.int64) * NUM_HEADS + row % GROUP) * DIM)[:, None] + offs[None, :]
    mask = (row < num_rows)[:, None] & (row >= 0)[:, None]
    if ADD:
        buffer.store(gl.load(x_ptrs, mask=mask, other=0.0))
        x += buffer.load(x.type.layout).to(gl.float32)
    buffer.store(x.to(x_ptr.dtype.element_ty))
    gl.store(x_ptrs, buffer.load(layout), mask=mask, eviction_policy="evict_last" if STAY else "")


@gluon.jit
def _store_keys(x_ptr, first_key, keys_end, x, HEADS: gl.constexpr, DIM: gl.constexpr, ADD: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Stores 64 keys' gradients, or adds them to what is there."""
    key = first_key + gl.arange(0, EDGE, layout=gl.SliceLayout(1, LAYOUT))
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    x_ptrs = x_ptr + (key.to(gl.int64) * (HEADS * DIM))[:, None] + offs[None, :]
    mask = (key < keys_end)[:, None]
    if ADD:
        x += gl.load(x_ptrs, mask=mask, other=0.0).to(gl.float32)
    gl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _softmax_step(tile, q, k_s, v_s, full, empty, out, total, largest, whole, first, start, end, factor,
                  WINDOW: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """A tile of keys enters a running softmax."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    stage = tile % STAGES
    _wait_full(full, tile, whole, 0, STAGES)
    scores = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    if MASKED:
        key = first + tile * EDGE + gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))
        scores = gl.where(_visible(key[None, :], start[:, None], end[:, None], WINDOW), scores, -float("inf"))
    larger = gl.maximum(largest, gl.max(scores, 1) * factor)
    finite = larger
    if MASKED:
        # A row that has seen no key keeps -inf, and any finite maximum serves it.
        finite = gl.where(larger == -float("inf"), 0.0, larger)
    p = gl.exp2(scores * factor - finite[:, None])
    shrink = gl.exp2(largest - finite)
    total = total * shrink + gl.sum(p, 1)
    p = gl.convert_layout(p.to(k_s.dtype), gl.DotOperandLayout(0, wide_layout, 2))
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, wide_layout))[:, None]
    _wait_full(full, tile, whole, 1, STAGES)
    out = warpgroup_mma(p, v_s.index(stage), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])
    mbarrier.arrive(empty.index(stage), count=1)
    return out, total, larger


@gluon.jit
def _attend(
    WHO: gl.constexpr, q_s, k_s, v_s, full, empty, ready, out_ptr, lse_ptr, first_row, num_rows, past, first, tiles,
    whole, head_end, clear_end, scale, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of a consumer's rows to all tiles of keys."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    # In log2 units, as are the maxima.
    factor = scale * LOG2_E
    first_row += WHO * EDGE
    row = first_row + gl.arange(0, EDGE, layout=row_layout)
    start, end = _ends_of_rows(row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW)
    largest = gl.full([EDGE], -float("inf"), gl.float32, row_layout)
    total = gl.zeros([EDGE], gl.float32, row_layout)
    out = gl.zeros([EDGE, DIM], gl.float32, wide_layout)
    mbarrier.wait(ready.index(0), 0)
    q = q_s.index(WHO).load(gl.DotOperandLayout(0, scores_layout, 2))
    if WINDOW > 0:
        for tile in range(0, head_end):
            out, total, largest = _softmax_step(
                tile, q, k_s, v_s, full, empty, out, total, largest, whole, first, start, end, factor,
                WINDOW, DIM, STAGES, True,
            )  # fmt: skip
    for tile in range(head_end, clear_end):
        out, total, largest = _softmax_step(
            tile, q, k_s, v_s, full, empty, out, total, largest, whole, first, start, end, factor,
            WINDOW, DIM, STAGES, False,
        )  # fmt: skip
    for tile in range(clear_end, tiles):
        out, total, largest = _softmax_step(
            tile, q, k_s, v_s, full, empty, out, total, largest, whole, first, start, end, factor,
            WINDOW, DIM, STAGES, True,
        )  # fmt: skip
    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    out = out * gl.convert_layout(inverse, gl.SliceLayout(1, wide_layout))[:, None]
    lse_ptrs = lse_ptr + (row // GROUP).to(gl.int64) * NUM_HEADS + row % GROUP
    gl.store(lse_ptrs, (largest + gl.log2(total)) * LN_2, mask=row < num_rows)
    _store_rows(out_ptr, first_row, num_rows, out, q_s.index(WHO), NUM_HEADS, GROUP, DIM, False)


@gluon.jit(do_not_specialize=["num_sequences"])
def _interval_fwd_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    cu_seqlens_ptr,
    key_bounds_ptr,
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
    KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """What `_interval_fwd_kernel` computes.

    Grid: (tile of rows of the pack, last first; kv head).
    Owns: out and lse of its rows, by plain stores.
    Invariant: after n steps of a consumer, `out`, `total` and `largest` are the softmax over the first n tiles of keys.
    """
    STAGES: gl.constexpr = FORWARD_STAGES
    ROWS: gl.constexpr = EDGE * FORWARD_CONSUMERS
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    head = gl.program_id(1)
    sequence, token_start, length, first_row = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, GROUP, ROWS)
    num_rows = length * GROUP
    if first_row >= num_rows:
        return
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    first, last, tiles, whole, head_end, clear_end = _tiles_of_keys(
        first_row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS
    )
    key_start = gl.load(key_bounds_ptr + sequence)
    token_start = token_start.to(gl.int64)
    at = token_start * NUM_HEADS + head * GROUP
    full, empty, ready = _barriers(STAGES, 1, FORWARD_CONSUMERS)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [FORWARD_CONSUMERS, EDGE, DIM], TILE)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    q_ptr += token_start * STRIDE_Q + head * (GROUP * DIM)
    for i in gl.static_range(FORWARD_CONSUMERS):
        _copy_tile(q_s.index(i), q_ptr, first_row + i * EDGE, num_rows - 1, STRIDE_Q, GROUP, DIM)
    async_copy.mbarrier_arrive(ready.index(0), increment_count=False)
    gl.warp_specialize(
        [
            (_attend, (
                0, q_s, k_s, v_s, full, empty, ready, out_ptr + at * DIM, lse_ptr + at, first_row, num_rows, past,
                first, tiles, whole, head_end, clear_end, scale,
                NUM_HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES,
            )),
            (_attend, (
                1, q_s, k_s, v_s, full, empty, ready, out_ptr + at * DIM, lse_ptr + at, first_row, num_rows, past,
                first, tiles, whole, head_end, clear_end, scale,
                NUM_HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES,
            )),
            (_attend, (
                2, q_s, k_s, v_s, full, empty, ready, out_ptr + at * DIM, lse_ptr + at, first_row, num_rows, past,
                first, tiles, whole, head_end, clear_end, scale,
                NUM_HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES,
            )),
            (_produce_keys, (
                k_desc, v_desc, k_ptr, v_ptr, k_s, v_s, full, empty, key_start, head * DIM, first, last, tiles, whole,
                STRIDE_K, STRIDE_V, DIM, STAGES,
            )),
        ],
        [WARPS, WARPS, WARPS],
        [FORWARD_CONSUMER, FORWARD_CONSUMER, FORWARD_PRODUCER],
    )  # fmt: skip


@gluon.jit
def _dq_step(tile, q, do, dq, k_s, v_s, full, empty, whole, first, start, end, shift, delta, scale,
             WINDOW: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """What a tile of keys adds to dQ, before the scale of the scores."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    stage = tile % STAGES
    k = k_s.index(stage)
    _wait_full(full, tile, whole, 0, STAGES)
    _wait_full(full, tile, whole, 1, STAGES)
    zeros = gl.zeros([EDGE, EDGE], gl.float32, scores_layout)
    scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v_s.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    p = exp_below(scores, scale, shift[:, None], False)
    if MASKED:
        key = first + tile * EDGE + gl.arange(0, EDGE, layout=gl.SliceLayout(0, scores_layout))
        p = gl.where(_visible(key[None, :], start[:, None], end[:, None], WINDOW), p, 0.0)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = (p * (dp - delta[:, None])).to(k_s.dtype)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(0, wide_layout, 2))
    # Waited for here: products that are under way from one step to the next serialise all of them (C7512 of ptxas).
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(empty.index(stage), count=1)
    return dq


@gluon.jit
def _differentiate_rows(
    WHO: gl.constexpr, q_s, do_s, k_s, v_s, full, empty, ready, dq_ptr, shift_ptr, delta_ptr, first_row, num_rows, past,
    first, tiles, whole, head_end, clear_end, scale, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr, ADD: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of a consumer's rows."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    first_row += WHO * EDGE
    row = first_row + gl.arange(0, EDGE, layout=gl.SliceLayout(1, scores_layout))
    start, end = _ends_of_rows(row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW)
    shift = _load_line(shift_ptr, row, num_rows, float("inf"), NUM_HEADS, GROUP)
    delta = _load_line(delta_ptr, row, num_rows, 0.0, NUM_HEADS, GROUP)
    dq = gl.zeros([EDGE, DIM], gl.float32, wide_layout)
    mbarrier.wait(ready.index(0), 0)
    q, do = q_s.index(WHO).load(operand), do_s.index(WHO).load(operand)
    if WINDOW > 0:
        for tile in range(0, head_end):
            dq = _dq_step(tile, q, do, dq, k_s, v_s, full, empty, whole, first, start, end, shift, delta, scale,
                          WINDOW, DIM, STAGES, True)  # fmt: skip
    for tile in range(head_end, clear_end):
        dq = _dq_step(tile, q, do, dq, k_s, v_s, full, empty, whole, first, start, end, shift, delta, scale,
                      WINDOW, DIM, STAGES, False)  # fmt: skip
    for tile in range(clear_end, tiles):
        dq = _dq_step(tile, q, do, dq, k_s, v_s, full, empty, whole, first, start, end, shift, delta, scale,
                      WINDOW, DIM, STAGES, True)  # fmt: skip
    _store_rows(dq_ptr, first_row, num_rows, dq * scale, q_s.index(WHO), NUM_HEADS, GROUP, DIM, ADD)


@gluon.jit(do_not_specialize=["num_sequences"])
def _interval_dq_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    d_out_ptr,
    shift_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    key_bounds_ptr,
    cu_seqlens_k_ptr,
    dq_ptr,
    num_sequences,
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    STRIDE_DO: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    WINDOW: gl.constexpr,
    ADD: gl.constexpr,
):
    """What `_interval_dq_kernel` computes.

    Grid: (tile of rows of the pack, last first; kv head).
    Owns: dq of its rows, by plain stores.
    Invariant: after n steps of a consumer, `dq` is the sum over the first n tiles of keys.
    """
    STAGES: gl.constexpr = DQ_STAGES
    ROWS: gl.constexpr = EDGE * BACKWARD_CONSUMERS
    tile = gl.num_programs(0) - 1 - gl.program_id(0)
    head = gl.program_id(1)
    sequence, token_start, length, first_row = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, GROUP, ROWS)
    num_rows = length * GROUP
    if first_row >= num_rows:
        return
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    first, last, tiles, whole, head_end, clear_end = _tiles_of_keys(
        first_row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS
    )
    key_start = gl.load(key_bounds_ptr + sequence)
    token_start = token_start.to(gl.int64)
    at = token_start * NUM_HEADS + head * GROUP
    full, empty, ready = _barriers(STAGES, 1, BACKWARD_CONSUMERS)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [BACKWARD_CONSUMERS, EDGE, DIM], TILE)
    do_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [BACKWARD_CONSUMERS, EDGE, DIM], TILE)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    q_ptr += token_start * STRIDE_Q + head * (GROUP * DIM)
    d_out_ptr += token_start * STRIDE_DO + head * (GROUP * DIM)
    for i in gl.static_range(BACKWARD_CONSUMERS):
        _copy_tile(q_s.index(i), q_ptr, first_row + i * EDGE, num_rows - 1, STRIDE_Q, GROUP, DIM)
        _copy_tile(do_s.index(i), d_out_ptr, first_row + i * EDGE, num_rows - 1, STRIDE_DO, GROUP, DIM)
    async_copy.mbarrier_arrive(ready.index(0), increment_count=False)
    gl.warp_specialize(
        [
            (_differentiate_rows, (
                0, q_s, do_s, k_s, v_s, full, empty, ready, dq_ptr + at * DIM, shift_ptr + at, delta_ptr + at,
                first_row, num_rows, past, first, tiles, whole, head_end, clear_end, scale,
                NUM_HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ADD, STAGES,
            )),
            (_differentiate_rows, (
                1, q_s, do_s, k_s, v_s, full, empty, ready, dq_ptr + at * DIM, shift_ptr + at, delta_ptr + at,
                first_row, num_rows, past, first, tiles, whole, head_end, clear_end, scale,
                NUM_HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ADD, STAGES,
            )),
            (_produce_keys, (
                k_desc, v_desc, k_ptr, v_ptr, k_s, v_s, full, empty, key_start, head * DIM, first, last, tiles, whole,
                STRIDE_K, STRIDE_V, DIM, STAGES,
            )),
        ],
        [WARPS, WARPS],
        [BACKWARD_CONSUMER, BACKWARD_PRODUCER],
    )  # fmt: skip


@gluon.jit
def _rows_of_keys(sequence, first_key, keys_of_sequence, share, shares, cu_seqlens_ptr, cu_seqlens_k_ptr,
                  GROUP: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr,
                  KEYS: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Rows of a share that see one of a tile of keys, of all rows of their sequence.

    Returns the first and one past the last; in tiles of them all, one past the last of those that need a mask at their
    beginning, and of those that follow without one; the first token of the sequence, and its tokens without queries.
    """
    token_start = gl.load(cu_seqlens_ptr + sequence)
    length = gl.load(cu_seqlens_ptr + sequence + 1) - token_start
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    last_key = gl.minimum(first_key + KEYS, keys_of_sequence) - 1
    rows_start = (_last_token(first_key, KERNEL_SIZE, KERNEL_STRIDE) - past) * GROUP
    tokens_end = length
    see_all_end = length
    if WINDOW > 0:
        # The first query that does not see the last key any more is the first to see the one WINDOW keys later.
        tokens_end = gl.minimum(length, _last_token(last_key + WINDOW, KERNEL_SIZE, KERNEL_STRIDE) - past)
        see_all_end = gl.minimum(length, _last_token(first_key + WINDOW, KERNEL_SIZE, KERNEL_STRIDE) - past)
    rows_end = tokens_end * GROUP
    if cu_seqlens_k_ptr is not None:
        # A key of the past is seen from the first query on, or by none: windows end, and a sequence may lack queries.
        rows_start = gl.maximum(rows_start, 0)
    rows_end = gl.maximum(rows_end, rows_start)
    steps = gl.cdiv(gl.cdiv(rows_end - rows_start, ROWS), shares)
    rows_start += share * steps * ROWS
    rows_end = gl.minimum(rows_end, rows_start + steps * ROWS)
    tiles = gl.maximum(gl.cdiv(rows_end - rows_start, ROWS), 0)
    see_all = (_last_token(last_key, KERNEL_SIZE, KERNEL_STRIDE) - past) * GROUP
    head_end = gl.minimum(gl.cdiv(gl.maximum(see_all - rows_start, 0), ROWS), tiles)
    clear_end = gl.maximum(gl.minimum(see_all_end * GROUP, rows_end) - rows_start, 0) // ROWS
    return rows_start, rows_end, tiles, head_end, gl.maximum(clear_end, head_end), token_start, past


@gluon.jit
def _produce_rows(q_ptr, do_ptr, shift_ptr, delta_ptr, q_s, do_s, row_s, full, empty, first_row, rows_end, tiles,
                  STRIDE_Q: gl.constexpr, STRIDE_DO: gl.constexpr, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr,
                  DIM: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fills the ring with tiles of q and dO, and `row_s` with shift and delta of their rows."""
    line = gl.arange(0, EDGE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    for tile in range(0, tiles):
        stage = tile % STAGES
        row = first_row + tile * EDGE
        one = gl.minimum(row + line, rows_end - 1)
        at = (one // GROUP).to(gl.int64) * NUM_HEADS + one % GROUP
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        _copy_tile(q_s.index(stage), q_ptr, row, rows_end - 1, STRIDE_Q, GROUP, DIM)
        async_copy.async_copy_global_to_shared(row_s.index(2 * stage), shift_ptr + at)
        async_copy.mbarrier_arrive(full.index(2 * stage), increment_count=False)
        _copy_tile(do_s.index(stage), do_ptr, row, rows_end - 1, STRIDE_DO, GROUP, DIM)
        async_copy.async_copy_global_to_shared(row_s.index(2 * stage + 1), delta_ptr + at)
        async_copy.mbarrier_arrive(full.index(2 * stage + 1), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _dkv_step(tile, dk, dv, k_s, v_s, q_s, do_s, row_s, full, empty, first_row, rows_end, past, key, scale,
              WHO: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr, KERNEL_SIZE: gl.constexpr,
              KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr, LIFT: gl.constexpr,
              MASKED: gl.constexpr):  # fmt: skip
    """What a tile of rows adds to dK (before the scale of the scores) and dV."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_layout, 2)
    line: gl.constexpr = gl.SliceLayout(0, layout)
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    k, v = k_s.index(WHO + none), v_s.index(WHO + none)
    stage = tile % STAGES
    q, do = q_s.index(stage), do_s.index(stage)
    mbarrier.wait(full.index(2 * stage), (tile // STAGES) & 1)
    mbarrier.wait(full.index(2 * stage + 1), (tile // STAGES) & 1)
    fence_async_shared()
    zeros = gl.zeros([EDGE, EDGE], gl.float32, layout)
    products = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # The sums of dP begin with -delta, which then takes no registers of its own.
    dp = zeros - row_s.index(2 * stage + 1).load(line)[None, :]
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, is_async=True)
    shift = row_s.index(2 * stage).load(line)
    products = warpgroup_mma_wait(1, deps=[products])
    p = exp_below(products, scale, shift[None, :], False)
    if MASKED:
        row = first_row + tile * EDGE + gl.arange(0, EDGE, layout=line)
        end = interval_end(past + row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
        start = _start(end, WINDOW)
        end = gl.where(row < rows_end, end, 0)
        p = gl.where(_visible(key[:, None], start[None, :], end[None, :], WINDOW), p, 0.0)
    p_half = gl.convert_layout((p * LIFT).to(q_s.dtype), operand)
    dv = warpgroup_mma(p_half, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = gl.convert_layout((p * dp).to(q_s.dtype), operand)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _differentiate_keys(
    WHO: gl.constexpr, k_s, v_s, q_s, do_s, row_s, full, empty, ready, dk_ptr, dv_ptr, first_key, keys_end, first_row,
    rows_end, tiles, head_end, clear_end, past, scale, HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, WINDOW: gl.constexpr, ADD: gl.constexpr,
    STAGES: gl.constexpr, LIFT: gl.constexpr,
):  # fmt: skip
    """dK and dV of a consumer's 64 keys."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EDGE, 16])
    wide_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    first_key += WHO * EDGE
    key = first_key + gl.arange(0, EDGE, layout=gl.SliceLayout(1, layout))
    dk = gl.zeros([EDGE, DIM], gl.float32, wide_layout)
    dv = gl.zeros([EDGE, DIM], gl.float32, wide_layout)
    mbarrier.wait(ready.index(0), 0)
    for tile in range(0, head_end):
        dk, dv = _dkv_step(
            tile, dk, dv, k_s, v_s, q_s, do_s, row_s, full, empty, first_row, rows_end, past, key, scale,
            WHO, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES, LIFT, True,
        )  # fmt: skip
    for tile in range(head_end, clear_end):
        dk, dv = _dkv_step(
            tile, dk, dv, k_s, v_s, q_s, do_s, row_s, full, empty, first_row, rows_end, past, key, scale,
            WHO, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES, LIFT, False,
        )  # fmt: skip
    for tile in range(clear_end, tiles):
        dk, dv = _dkv_step(
            tile, dk, dv, k_s, v_s, q_s, do_s, row_s, full, empty, first_row, rows_end, past, key, scale,
            WHO, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, STAGES, LIFT, True,
        )  # fmt: skip
    _store_keys(dk_ptr, first_key, keys_end, dk * scale, HEADS, DIM, ADD, wide_layout)
    _store_keys(dv_ptr, first_key, keys_end, dv / LIFT, HEADS, DIM, ADD, wide_layout)


@gluon.jit(do_not_specialize=["num_sequences", "num_keys"])
def _interval_dkv_hopper_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    shift_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    key_bounds_ptr,
    cu_seqlens_k_ptr,
    dk_ptr,
    dv_ptr,
    num_sequences,
    num_keys,
    scale,
    STRIDE_Q: gl.constexpr,
    STRIDE_K: gl.constexpr,
    STRIDE_V: gl.constexpr,
    STRIDE_DO: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    WINDOW: gl.constexpr,
    ADD: gl.constexpr,
):
    """What `_interval_dkv_kernel` computes.

    Grid: (tile of keys of the pack, first keys first, as most queries see them; kv head; share of the rows).
    Owns: dk and dv of its keys and share, by plain stores.
    Invariant: after n steps of a consumer, `dk` and `dv` are the sums over the first n tiles of rows.
    """
    STAGES: gl.constexpr = DKV_STAGES
    KEYS: gl.constexpr = EDGE * BACKWARD_CONSUMERS
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    LIFT: gl.constexpr = lift(q_ptr.dtype.element_ty)
    head = gl.program_id(1)
    share = gl.program_id(2)
    sequence, key_start, keys_of_sequence, first_key = tile_of_rows(
        gl.program_id(0), key_bounds_ptr, num_sequences, 1, KEYS
    )
    if first_key >= keys_of_sequence:
        return
    first_row, rows_end, tiles, head_end, clear_end, token_start, past = _rows_of_keys(
        sequence, first_key, keys_of_sequence, share, gl.num_programs(2), cu_seqlens_ptr, cu_seqlens_k_ptr,
        GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, KEYS, EDGE,
    )  # fmt: skip
    full, empty, ready = _barriers(STAGES, 32 * WARPS, BACKWARD_CONSUMERS)
    k_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [BACKWARD_CONSUMERS, EDGE, DIM], TILE)
    v_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [BACKWARD_CONSUMERS, EDGE, DIM], TILE)
    q_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    do_s = gl.allocate_shared_memory(q_ptr.dtype.element_ty, [STAGES, EDGE, DIM], TILE)
    row_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, EDGE], LINE)
    key_start = key_start.to(gl.int64)
    k_ptr += key_start * STRIDE_K + head * DIM
    v_ptr += key_start * STRIDE_V + head * DIM
    for i in gl.static_range(BACKWARD_CONSUMERS):
        _copy_tile(k_s.index(i), k_ptr, first_key + i * EDGE, keys_of_sequence - 1, STRIDE_K, 1, DIM)
        _copy_tile(v_s.index(i), v_ptr, first_key + i * EDGE, keys_of_sequence - 1, STRIDE_V, 1, DIM)
    async_copy.mbarrier_arrive(ready.index(0), increment_count=False)
    token_start = token_start.to(gl.int64)
    at = ((share.to(gl.int64) * num_keys + key_start) * HEADS + head) * DIM
    gl.warp_specialize(
        [
            (_differentiate_keys, (
                0, k_s, v_s, q_s, do_s, row_s, full, empty, ready, dk_ptr + at, dv_ptr + at, first_key,
                keys_of_sequence, first_row, rows_end, tiles, head_end, clear_end, past, scale,
                HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ADD, STAGES, LIFT,
            )),
            (_differentiate_keys, (
                1, k_s, v_s, q_s, do_s, row_s, full, empty, ready, dk_ptr + at, dv_ptr + at, first_key,
                keys_of_sequence, first_row, rows_end, tiles, head_end, clear_end, past, scale,
                HEADS, GROUP, DIM, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ADD, STAGES, LIFT,
            )),
            (_produce_rows, (
                q_ptr + token_start * STRIDE_Q + head * (GROUP * DIM),
                d_out_ptr + token_start * STRIDE_DO + head * (GROUP * DIM),
                shift_ptr + token_start * NUM_HEADS + head * GROUP, delta_ptr + token_start * NUM_HEADS + head * GROUP,
                q_s, do_s, row_s, full, empty, first_row, rows_end, tiles,
                STRIDE_Q, STRIDE_DO, NUM_HEADS, GROUP, DIM, STAGES,
            )),
        ],
        [WARPS, WARPS],
        [BACKWARD_CONSUMER, BACKWARD_PRODUCER],
    )  # fmt: skip
