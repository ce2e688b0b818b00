"""The kernel of block scores for Hopper (sm_90), with warps of two kinds; see `block_scores`.

    producer     asks the copy engine for tiles of 128 windows, ahead of the consumers
    consumers    2 groups of 4 warps, for alternate tiles of windows of the same 64 tokens:
                     for head of the group:    P += exp(Q K^T - lse), the product of the next head under way meanwhile
                     scores = sums of P over each block, and what the windows of the block before reach into it

The queries of all heads of the group stay in shared memory: for large groups, whose queries the kernel of
`block_scores` reads again for each tile of windows. Where those of 64 tokens do not fit, a tile has 32 or 16 tokens,
and a product is that of two heads or four, whose scores are added up at the end.

A tile begins one block early, whose score the tile before has: so nothing is carried from tile to tile. Written in
Gluon, as `selected_hopper` is.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_scores import overlap_of
from .interval import interval_end
from .primitives import LOG2_E, past_of, tile_of_rows
from .selected_hopper import BARRIER, EDGE, LINE, TILE, WARPS

# Windows of a tile; registers of a thread, as those of `selected_hopper`.
KEYS = gl.constexpr(128)
OPTIONS = {"num_warps": 4, "maxnreg": 168}
CONSUMER, PRODUCER = gl.constexpr(232), gl.constexpr(40)
# Shared memory of a program, and what of it barriers take.
SHARED_BYTES, BARRIER_BYTES = 227 << 10, 1 << 10
# Tiles of the ring at most, and at least; windows of a block at most.
MOST_STAGES, LEAST_STAGES = 4, 2
MOST_WINDOWS = 8
# Heads in the rows of a product: a tile has 64 tokens of a head, 32 of two or 16 of four.
PACKS = 1, 2, 4
PACKED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
# Heads of a group at least.
LEAST_GROUP = 5


def pack_of(group: int, dim: int, windows: int) -> int:
    """Heads in the rows of a product, as few as let the queries of the group fit; 0 where they never do."""
    # Four heads of blocks of one window change layouts in twice as much.
    packs = PACKS if windows > 1 else PACKS[:2]
    fitting = (pack for pack in packs if group % pack == 0 and stages_of(group // pack, dim, windows) >= LEAST_STAGES)
    return next(fitting, 0)


def stages_of(products: int, dim: int, windows: int) -> int:
    """Tiles of the ring that fit beside so many tiles of queries and lse, and what layouts are changed in."""
    exchange = 2 * min(4 * EDGE.value * KEYS.value // windows, 16 << 10)
    queries = EDGE.value * (2 * dim + 4) * products
    free = SHARED_BYTES - BARRIER_BYTES - exchange - queries
    return min(MOST_STAGES, free // (2 * KEYS.value * dim))


def serves(group: int, dim: int, kernel_size: int, kernel_stride: int, block_size: int) -> bool:
    """Whether there is a kernel for such a group, and for windows of which none reaches beyond the next block."""
    windows, rest = divmod(block_size, kernel_stride)
    if rest or windows not in (1, 2, 4, MOST_WINDOWS) or group < LEAST_GROUP:
        return False
    # Blocks of one window spill in the loop; of narrow heads, which have less to do beside it, they were not timed.
    if windows == 1 and dim < 128:
        return False
    reach = kernel_size - kernel_stride
    return reach <= (block_size if windows > 1 else 0) and pack_of(group, dim, windows) > 0


def token_descriptor(q: Tensor, pack: int) -> TensorDescriptor:
    """By which the copy engine copies tiles of tokens of some heads of q `[T, Hq, D]`."""
    strides = [q.stride(0), q.shape[2], 1]
    return TensorDescriptor(q, list(q.shape), strides, [EDGE.value // pack, pack, q.shape[2]], PACKED.value)


def window_descriptor(k: Tensor) -> TensorDescriptor:
    """By which the copy engine copies tiles of windows of a head of k `[M, Hk, D]`."""
    length, heads, dim = k.shape
    return TensorDescriptor(k, [length, heads * dim], [k.stride(0), 1], [KEYS.value, dim], TILE.value)


@gluon.jit
def _produce(k_desc, k_s, full, empty, row, column, tiles, STEP: gl.constexpr, STAGES: gl.constexpr):
    """Fills the ring; before the first and behind the last window may stand anything."""
    for tile in range(0, tiles):
        stage = tile % STAGES
        mbarrier.wait(empty.index(stage), ((tile // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row + tile * STEP, column], full.index(stage), k_s.index(stage))


@gluon.jit
def _score(tile, q_s, k_s, lse_s, full, empty, scores_ptr, columns, first_block, first_token, length, past, end,
           masked, factor, HEADS: gl.constexpr, PRODUCTS: gl.constexpr, PACK: gl.constexpr, KERNEL_SIZE: gl.constexpr,
           KERNEL_STRIDE: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Scores of the blocks of a tile of windows."""
    DIM: gl.constexpr = q_s.shape[3]
    TOKENS: gl.constexpr = EDGE // PACK
    WINDOWS: gl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    BLOCKS: gl.constexpr = KEYS // WINDOWS
    HALO: gl.constexpr = 1 if KERNEL_SIZE > KERNEL_STRIDE else 0
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    LANES: gl.constexpr = BLOCKS if BLOCKS < 32 else 32
    by_row: gl.constexpr = gl.BlockedLayout([PACK, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    by_token: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    # Always 0, which the compiler does not see: it would hold the addresses of all operands in registers otherwise.
    none = tile >> 30
    stage = tile % STAGES
    mbarrier.wait(full.index(stage), (tile // STAGES) & 1)
    k = k_s.index(stage).permute((1, 0))
    zeros = gl.zeros([EDGE, KEYS], gl.float32, scores_layout)
    p = zeros
    s = warpgroup_mma(q_s.index(none).reshape([EDGE, DIM]), k, zeros, use_acc=False, is_async=True)
    for g in gl.static_range(PRODUCTS):
        shift = lse_s.index(g).load(row_layout)
        if g + 1 < PRODUCTS:
            q = q_s.index(g + 1 + none).reshape([EDGE, DIM])
            following = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
        else:
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(stage), count=1)
        p += gl.exp2(s * factor - shift[:, None])
        if g + 1 < PRODUCTS:
            s = following
    first_block += tile * (BLOCKS - HALO)
    if masked:
        window = first_block * WINDOWS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, scores_layout))
        p = gl.where((window[None, :] >= 0) & (window[None, :] < end[:, None]), p, 0.0)
    if WINDOWS > 1:
        apart = p.reshape([EDGE, BLOCKS, WINDOWS])
        L: gl.constexpr = apart.type.layout
        window = gl.arange(0, WINDOWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
        own = overlap_of(window, 0, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(gl.float32)
        sums = gl.sum(apart * own, axis=2)
        sums = gl.convert_layout(sums, by_row)
        if HALO:
            reach = overlap_of(window, 1, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(gl.float32)
            reached = gl.convert_layout(gl.sum(apart * reach, axis=2), by_row)
            before = gl.maximum(gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, by_row)) - 1, 0)
            zero = gl.zeros([EDGE, BLOCKS], gl.int32, by_row)
            sums += gl.gather(reached, zero + before[None, :], axis=1)
    else:
        sums = gl.convert_layout(p, by_row)
    if PACK > 1:
        sums = gl.convert_layout(gl.sum(sums.reshape([TOKENS, PACK, BLOCKS]), axis=1), by_token)
    row = none + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, by_token))
    in_tile = gl.arange(0, BLOCKS, layout=gl.SliceLayout(0, by_token))
    block = first_block + in_tile
    own = (past + first_token + row) // BLOCK_SIZE
    stored = (first_token + row < length)[:, None] & (block[None, :] <= own[:, None]) & (in_tile >= HALO)[None, :]
    scores_ptrs = scores_ptr + (row.to(gl.int64) * HEADS * columns)[:, None] + block[None, :]
    gl.store(scores_ptrs, sums, mask=stored)


@gluon.jit
def _consume(WHO: gl.constexpr, q_s, k_s, lse_s, full, empty, ready, scores_ptr, columns, first_block, head_end,
             clear_end, tiles, first_token, length, past, scale, HEADS: gl.constexpr, PRODUCTS: gl.constexpr,
             PACK: gl.constexpr, KERNEL_SIZE: gl.constexpr, KERNEL_STRIDE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """Every second tile of windows; the first one of a sequence and the last ones need a mask."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    token = first_token + gl.arange(0, EDGE, layout=gl.SliceLayout(1, scores_layout)) // PACK
    end = interval_end(past + gl.minimum(token, length - 1), KERNEL_SIZE, KERNEL_STRIDE)
    factor = scale * LOG2_E
    mbarrier.wait(ready.index(0), 0)
    for tile in range(WHO, tiles, 2):
        masked = (tile < head_end) | (tile >= clear_end)
        _score(tile, q_s, k_s, lse_s, full, empty, scores_ptr, columns, first_block, first_token, length, past,
               end, masked, factor, HEADS, PRODUCTS, PACK, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, STAGES)  # fmt: skip


@gluon.jit(do_not_specialize=["num_sequences", "first_tile", "columns", "span"])
def _block_scores_hopper_kernel(
    q_desc,
    k_desc,
    lse_ptr,
    cu_seqlens_ptr,
    key_bounds_ptr,
    cu_seqlens_k_ptr,
    scores_ptr,
    num_sequences,
    first_tile,
    columns,
    span,
    scale,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    DIM: gl.constexpr,
    KERNEL_SIZE: gl.constexpr,
    KERNEL_STRIDE: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What `_block_scores_kernel` computes.

    Grid: (span of tiles of windows, tile of tokens of the chunk, last first; kv head).
    Owns: scores [chunk's token, kv head, block] of its eligible pairs, by plain stores.
    Invariant: after n steps of a consumer, the scores of the blocks of its first n tiles are stored.
    """
    HEADS: gl.constexpr = NUM_HEADS // GROUP
    PRODUCTS: gl.constexpr = GROUP // PACK
    TOKENS: gl.constexpr = EDGE // PACK
    WINDOWS: gl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    BLOCKS: gl.constexpr = KEYS // WINDOWS
    HALO: gl.constexpr = 1 if KERNEL_SIZE > KERNEL_STRIDE else 0
    STEP: gl.constexpr = BLOCKS - HALO
    head = gl.program_id(2)
    slot = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence, token_start, length, first_token = tile_of_rows(
        first_tile + slot, cu_seqlens_ptr, num_sequences, 1, TOKENS
    )
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    last_block = (past + gl.minimum(first_token + TOKENS, length) - 1) // BLOCK_SIZE
    first = gl.program_id(0) * span
    if (first_token >= length) | (first * STEP > last_block):
        return
    tiles = gl.minimum(span, last_block // STEP + 1 - first)
    first_block = first * STEP - HALO
    # Tiles whose windows all tokens see; a tile ends with the block that the next one begins with.
    seen_by_all = interval_end(past + first_token, KERNEL_SIZE, KERNEL_STRIDE)
    clear_end = gl.maximum(seen_by_all - (first_block + HALO) * WINDOWS, 0) // (STEP * WINDOWS)
    head_end = gl.minimum(gl.where(first_block < 0, 1, 0), tiles)
    clear_end = gl.minimum(gl.maximum(clear_end, head_end), tiles)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(ready.index(0), count=1)
    q_s = gl.allocate_shared_memory(q_desc.dtype, [PRODUCTS, TOKENS, PACK, DIM], PACKED)
    k_s = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, DIM], TILE)
    lse_s = gl.allocate_shared_memory(gl.float32, [PRODUCTS, EDGE], LINE)
    mbarrier.expect(ready.index(0), PRODUCTS * q_desc.block_type.nbytes)
    for g in gl.static_range(PRODUCTS):
        place = [token_start + first_token, head * GROUP + g * PACK, 0]
        tma.async_copy_global_to_shared(q_desc, place, ready.index(0), q_s.index(g))
    line = gl.arange(0, EDGE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    token = token_start.to(gl.int64) + gl.minimum(first_token + line // PACK, length - 1)
    lse_ptrs = lse_ptr + token * NUM_HEADS + head * GROUP + line % PACK
    for g in gl.static_range(PRODUCTS):
        lse_s.index(g).store(gl.load(lse_ptrs + g * PACK) * LOG2_E)
    key_start = gl.load(key_bounds_ptr + sequence)
    in_row = (slot * TOKENS).to(gl.int64) * HEADS + head
    scores_ptr += in_row * columns
    gl.warp_specialize(
        [
            (_consume, (
                0, q_s, k_s, lse_s, full, empty, ready, scores_ptr, columns, first_block, head_end, clear_end,
                tiles, first_token, length, past, scale,
                HEADS, PRODUCTS, PACK, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, STAGES,
            )),
            (_consume, (
                1, q_s, k_s, lse_s, full, empty, ready, scores_ptr, columns, first_block, head_end, clear_end,
                tiles, first_token, length, past, scale,
                HEADS, PRODUCTS, PACK, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, STAGES,
            )),
            (_produce, (
                k_desc, k_s, full, empty, key_start + first_block * WINDOWS, head * DIM, tiles, STEP * WINDOWS, STAGES,
            )),
        ],
        [WARPS, WARPS],
        [CONSUMER, PRODUCER],
    )  # fmt: skip
