"""The merge of partial results for Hopper (sm_90), with warps of two kinds; see `merge`.

    producer     4 warps    places of the slots of a tile of rows, tiles ahead of all -> lse and partial results
       |                    a ring of stages in shared memory, some slots of a tile each
    consumer     4 warps    largest lse -> weights -> sum over the slots, each thread of 16 bytes of a row

What a warp of the other kernel waits for in turn (places, partial results, its store) goes on side by side: memory
always has as much to bring as the rings of a multiprocessor hold. Programs stay, and take tile after tile.

Slots that are not valid are not read: copies that are masked fill with zeros.

Written in Gluon, as `selected_hopper` is.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from .inverted_index import InvertedIndex
from .primitives import LN_2, LOG2_E, finite_maximum, multiprocessors, padded, take_over
from .selected_hopper import BARRIER, LINE, WARPS, _by_16_bytes, _copy_rows
from .tuning import early_launch

# Of one slot of a tile of rows, of which a thread has 16 bytes.
SLOT_BYTES = 32 * WARPS.value * 16
# Slots of a stage at most, shared memory of the ring, stages of it at most, and programs of a multiprocessor. H200,
# 65,536 tokens, 32/8 heads of 128, far slots of 16, of the 16 chunks each, ms: 0.1314 so, the kernel for other devices
# 0.1460; rings of 80 KiB 0.1323; one program with 128 or 192 KiB 0.1343, 0.1358; three with 48 KiB 0.1322; stages of 4
# slots 0.133. 64/4 heads, 8,192 tokens of 32/8, 8 slots of 16/4 (rings of 80 KiB): 0.144, 0.129, 0.087 for 0.164,
# 0.143, 0.109. For sums of dQ, which wait for less, it took 0.141 to 0.143 for 0.139.
STAGE_SLOTS, RING_BYTES, MOST_STAGES, PROGRAMS = 8, 48 << 10, 12, 2
OPTIONS = {"num_warps": 4, "maxnreg": 96}
PRODUCER = gl.constexpr(72)
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SLABS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


def launch_merge_hopper(
    partial: Tensor,
    partial_lse: Tensor,
    index: InvertedIndex,
    out: Tensor,
    lse: Tensor,
    first_row: int,
    first_head: int,
    first_token: int,
    tokens: int,
    far: Tensor | None,
) -> None:
    """`merge.launch_merge` of softmaxes, in half precision, heads of 64 or 128; `first_row`: of the bucket ends."""
    (num_heads, dim), chunks = out.shape[1:], index.chunks
    group = num_heads // chunks.num_kv_heads
    # The larger one if both hold equally many slots that are not there.
    sizes = (min(size, padded(chunks.slots, 1)) for size in (STAGE_SLOTS, STAGE_SLOTS // 2))
    step = min(sizes, key=lambda size: triton.cdiv(chunks.slots, size) * size)
    stages = min(max(2, RING_BYTES // (step * SLOT_BYTES)), MOST_STAGES)
    tiles = triton.cdiv(tokens * chunks.heads * group * dim * out.element_size(), SLOT_BYTES)
    _merge_slots_hopper_kernel[(min(tiles, PROGRAMS * multiprocessors(out.device)),)](
        partial, partial_lse, index.place if far is None else far, index.bucket_ends, out, lse,
        first_row, first_token, first_head, tokens, chunks.heads * group,
        num_heads, group, chunks.slots, padded(chunks.slots, 1), dim, far is not None, step, stages,
        **OPTIONS, **early_launch(),
    )  # fmt: skip


@triton.constexpr_function
def _slots_by_16_bytes(dim):
    """The layout in which a warp group copies rows of several slots; of one slot it is `_by_16_bytes`."""
    return gl.BlockedLayout([1, 1, 8], [1, 256 // dim, dim // 8], [1, 4, 1], [2, 1, 0])


@triton.constexpr_function
def _end_of_step(step, size, slots):
    return min((step + 1) * size, slots)


@gluon.jit
def _rows(tile, num_rows, first, chunk_heads, NUM_HEADS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of a tile in the chunk, and in out; those that are not there are the last one again."""
    row = gl.minimum(tile * ROWS + gl.arange(0, ROWS, layout=LAYOUT), num_rows - 1)
    return row, first + row + (row // chunk_heads).to(gl.int64) * (NUM_HEADS - chunk_heads)


@gluon.jit
def _copy_places(place_s, tile, place_ptr, num_rows, first, chunk_heads, NUM_HEADS: gl.constexpr,
                 GROUP: gl.constexpr, SLOTS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Asks for the places of a tile, [SLOTS_PADDED, ROWS]."""
    _, at = _rows(tile, num_rows, first, chunk_heads, NUM_HEADS, ROWS, gl.SliceLayout(0, LAYOUT))
    slot = gl.arange(0, place_s.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    async_copy.async_copy_global_to_shared(place_s, place_ptr + (at // GROUP * SLOTS)[None, :] + slot, slot < SLOTS)
    async_copy.commit_group()


@gluon.jit
def _produce(partial_ptr, partial_lse_ptr, place_ptr, out_ptr, lse_ptr, x_s, own_s, place_s, lse_s, own_lse_s, full,
             empty, program, programs, tiles, num_rows, first, first_pair, chunk_heads, NUM_HEADS: gl.constexpr,
             GROUP: gl.constexpr, SLOTS: gl.constexpr, DIM: gl.constexpr, ADD: gl.constexpr, STEP: gl.constexpr,
             STAGES: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Fills the rings.

    Invariant: after n steps, all of n tiles was asked for, and the places of AHEAD more.
    """
    ROWS: gl.constexpr = x_s.shape[1]
    PLACES: gl.constexpr = place_s.shape[0]
    HELD: gl.constexpr = lse_s.shape[0]
    STEPS: gl.constexpr = (SLOTS + STEP - 1) // STEP
    dtype: gl.constexpr = partial_ptr.dtype.element_ty
    slabs: gl.constexpr = _slots_by_16_bytes(DIM)
    slots: gl.constexpr = gl.SliceLayout(2, slabs)
    lines: gl.constexpr = gl.BlockedLayout([1, 1], [32 // ROWS, ROWS], [WARPS, 1], [1, 0])
    x_slabs = x_s._reinterpret(dtype, [STAGES, STEP, ROWS, DIM], SLABS)
    offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, slabs)))[None, None, :]
    slot_of_lines = gl.arange(0, place_s.shape[1], layout=gl.SliceLayout(1, lines))[:, None]
    for i in range(0, AHEAD):
        _copy_places(place_s.index(i), program + i * programs, place_ptr, num_rows, first, chunk_heads,
                     NUM_HEADS, GROUP, SLOTS, ROWS, lines)  # fmt: skip
    # The kernel before has nothing to do with places.
    take_over(EARLY)
    for i in range(0, tiles):
        tile, at_place, at_lse = program + i * programs, i % PLACES, i % HELD
        async_copy.wait_group(AHEAD - 1)
        row, at_out = _rows(tile, num_rows, first, chunk_heads, NUM_HEADS, ROWS, gl.SliceLayout(0, lines))
        place = place_s.index(at_place).load(lines)
        at = (place - first_pair).to(gl.int64) * GROUP + (row % GROUP)[None, :]
        there = (place >= 0) & (slot_of_lines < SLOTS)
        async_copy.async_copy_global_to_shared(lse_s.index(at_lse), partial_lse_ptr + at, there)
        if ADD:
            async_copy.async_copy_global_to_shared(own_lse_s.index(at_lse), lse_ptr + at_out)
            _, at_out = _rows(tile, num_rows, first, chunk_heads, NUM_HEADS, ROWS, gl.SliceLayout(1, _by_16_bytes(DIM)))
            _copy_rows(own_s.index(at_lse), out_ptr, at_out * DIM, DIM)
        row, _ = _rows(tile, num_rows, first, chunk_heads, NUM_HEADS, ROWS, gl.SliceLayout(0, slots))
        in_pair = (row % GROUP * DIM)[None, :]
        for step in gl.static_range(STEPS):
            place = place_s.index(at_place).slice(step * STEP, STEP).load(slots)
            there = place >= 0
            if SLOTS % STEP != 0:
                there = there & (step * STEP + gl.arange(0, STEP, layout=gl.SliceLayout(1, slots)) < SLOTS)[:, None]
            x_ptrs = partial_ptr + ((place - first_pair).to(gl.int64) * (GROUP * DIM) + in_pair)[:, :, None]
            number = i * STEPS + step
            stage = number % STAGES
            mbarrier.wait(empty.index(stage), ((number // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(x_slabs.index(stage), x_ptrs + offs, there[:, :, None])
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        _copy_places(place_s.index((i + AHEAD) % PLACES), tile + AHEAD * programs, place_ptr, num_rows, first,
                     chunk_heads, NUM_HEADS, GROUP, SLOTS, ROWS, lines)  # fmt: skip
    async_copy.wait_group(0)


@gluon.jit
def _load_lse(lse_lines, place_lines, first_lse, first_place, SLOT: gl.constexpr, LAYOUT: gl.constexpr):
    """lse of a slot of each row, -inf where the slot is not valid."""
    place = place_lines.index(first_place + SLOT).load(LAYOUT)
    return gl.where(place >= 0, lse_lines.index(first_lse + SLOT).load(LAYOUT), -float("inf"))


@gluon.jit
def _consume(out_ptr, lse_ptr, x_s, own_s, place_s, lse_s, own_lse_s, full, empty, program, programs, tiles, num_rows,
             first, chunk_heads, NUM_HEADS: gl.constexpr, SLOTS: gl.constexpr, DIM: gl.constexpr, ADD: gl.constexpr,
             STEP: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Merges the slots of each row."""
    take_over(EARLY)
    ROWS: gl.constexpr = x_s.shape[1]
    PLACES: gl.constexpr = place_s.shape[0]
    HELD: gl.constexpr = lse_s.shape[0]
    SLOTS_PADDED: gl.constexpr = place_s.shape[1]
    STEPS: gl.constexpr = (SLOTS + STEP - 1) // STEP
    layout: gl.constexpr = _by_16_bytes(DIM)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    place_lines = place_s._reinterpret(gl.int32, [PLACES * SLOTS_PADDED, ROWS], LINE)
    lse_lines = lse_s._reinterpret(gl.float32, [HELD * SLOTS_PADDED, ROWS], LINE)
    for i in range(0, tiles):
        tile, first_number = program + i * programs, i * STEPS
        at_lse = i % HELD
        first_place, first_lse = i % PLACES * SLOTS_PADDED, at_lse * SLOTS_PADDED
        total = gl.zeros([ROWS, DIM], gl.float32, layout)
        # What does not belong to a slot has come with the first stage.
        mbarrier.wait(full.index(first_number % STAGES), (first_number // STAGES) & 1)
        largest = gl.full([ROWS], -float("inf"), gl.float32, row_layout)
        for slot in gl.static_range(SLOTS):
            slot_lse = _load_lse(lse_lines, place_lines, first_lse, first_place, slot, row_layout)
            largest = gl.maximum(largest, slot_lse)
        if ADD:
            own_lse = own_lse_s.index(at_lse).load(row_layout)
            largest = gl.maximum(largest, own_lse)
        largest = finite_maximum(largest)
        exp_sum = gl.zeros([ROWS], gl.float32, row_layout)
        if ADD:
            exp_sum = gl.exp2((own_lse - largest) * LOG2_E)
            total = own_s.index(at_lse).load(layout).to(gl.float32) * exp_sum[:, None]
        for step in gl.static_range(STEPS):
            number = first_number + step
            stage = number % STAGES
            mbarrier.wait(full.index(stage), (number // STAGES) & 1)
            for slot in gl.static_range(step * STEP, _end_of_step(step, STEP, SLOTS)):
                x = x_s.index(stage * STEP + slot % STEP).load(layout).to(gl.float32)
                slot_lse = _load_lse(lse_lines, place_lines, first_lse, first_place, slot, row_layout)
                weight = gl.exp2((slot_lse - largest) * LOG2_E)
                exp_sum += weight
                total += x * weight[:, None]
            mbarrier.arrive(empty.index(stage), count=1)
        mask = tile * ROWS + gl.arange(0, ROWS, layout=row_layout) < num_rows
        _, at_out = _rows(tile, num_rows, first, chunk_heads, NUM_HEADS, ROWS, row_layout)
        gl.store(lse_ptr + at_out, largest + gl.log2(exp_sum) * LN_2, mask=mask)
        # Rows that have nothing: all weights are 0, and so is the sum.
        total = total * (1.0 / gl.where(exp_sum == 0.0, 1.0, exp_sum))[:, None]
        offs = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
        out_ptrs = out_ptr + (at_out * DIM)[:, None] + offs[None, :]
        gl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@gluon.jit(do_not_specialize=["first_row", "first_token", "first_head", "tokens", "chunk_heads"])
def _merge_slots_hopper_kernel(
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
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    SLOTS: gl.constexpr,
    SLOTS_PADDED: gl.constexpr,
    DIM: gl.constexpr,
    ADD: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """What `_merge_slots_kernel` computes of softmaxes.

    Grid: (program,); of P programs, the p-th has the tiles p, p + P, ... of rows of the chunk.
    Owns: out[row] and lse[row] of its tiles, by plain stores.
    Invariant: after n steps of the consumer, the rows of its first n tiles are stored.
    """
    dtype: gl.constexpr = partial_ptr.dtype.element_ty
    ROWS: gl.constexpr = 32 * WARPS * 8 // DIM
    STEPS: gl.constexpr = (SLOTS + STEP - 1) // STEP
    # Tiles of which the ring has slots at a time, at most; tiles whose places are asked for before.
    HELD: gl.constexpr = (STAGES + STEPS - 1) // STEPS + 1
    AHEAD: gl.constexpr = HELD + 1
    PLACES: gl.constexpr = HELD + AHEAD
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=32 * WARPS)
        mbarrier.init(empty.index(i), count=1)
    x_s = gl.allocate_shared_memory(dtype, [STAGES * STEP, ROWS, DIM], LINES)
    place_s = gl.allocate_shared_memory(gl.int32, [PLACES, SLOTS_PADDED, ROWS], LINES)
    lse_s = gl.allocate_shared_memory(gl.float32, [HELD, SLOTS_PADDED, ROWS], LINES)
    own_s = gl.allocate_shared_memory(dtype, [HELD, ROWS, DIM if ADD else 1], LINES)
    own_lse_s = gl.allocate_shared_memory(gl.float32, [HELD, ROWS], LINE)
    first_pair = gl.load(bucket_end_ptr + first_row - 1, mask=first_row > 0, other=0)
    # Row of out that the chunk begins with.
    first = first_token.to(gl.int64) * NUM_HEADS + first_head * GROUP
    num_rows = tokens * chunk_heads
    program, programs = gl.program_id(0), gl.num_programs(0)
    tiles = gl.cdiv(gl.cdiv(num_rows, ROWS) - program, programs)
    gl.warp_specialize(
        [
            (_consume, (
                out_ptr, lse_ptr, x_s, own_s, place_s, lse_s, own_lse_s, full, empty, program, programs, tiles,
                num_rows, first, chunk_heads, NUM_HEADS, SLOTS, DIM, ADD, STEP, STAGES, EARLY,
            )),
            (_produce, (
                partial_ptr, partial_lse_ptr, place_ptr, out_ptr, lse_ptr, x_s, own_s, place_s, lse_s, own_lse_s, full,
                empty, program, programs, tiles, num_rows, first, first_pair, chunk_heads,
                NUM_HEADS, GROUP, SLOTS, DIM, ADD, STEP, STAGES, AHEAD, EARLY,
            )),
        ],
        [WARPS],
        [PRODUCER],
    )  # fmt: skip
