"""Block selection: scores of the blocks, a chunk of tokens at a time, and the T best of each (token, kv head).

    scores   program (span of blocks, tile of tokens, kv head)
                 for tile of blocks:           |w w w w|w w w w|      the windows that begin in them
                     for head of the group:    P += exp(Q K^T - lse)  one tile of probabilities, summed over the group
                     scores = sums of P over each block, and what the windows before reach into it
    pick     program (token, kv head): the row of scores in registers; bisection finds the least score that is kept

Most groups of 5 heads and more have another kernel of scores on Hopper for long sequences, `block_scores_hopper`.

Scores of a chunk are written once and read once; nothing grows with the square of the length.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interval import interval_end
from .primitives import (
    exp_shifted,
    load_rows,
    padded,
    padded_dim,
    past_of,
    positive_scale,
    tile_descriptor,
    tile_of_rows,
)
from .tuning import ScoreTiles, has_hopper_kernels, takes_hopper_kernels

# Bytes of the scores of a chunk of tokens, and programs that a chunk is to have.
SCORE_BYTES, SCORE_PROGRAMS = 256 << 20, 1024
# Queries of a sequence in the mean, and tokens of the longest one, its past included, from which on block scores are
# those of `block_scores_hopper`. H200, us, 40/8 and 64/4 heads of 128: 65,536 tokens 4531 -> 3282, 9032 -> 4798; 8,192
# 103 -> 98, 160 -> 137; 8 sequences of 8,192 718 -> 739, 1296 -> 1009; 16 of 4,096 464 -> 552, 743 -> 746.
LEAST_TOKENS, LEAST_LENGTH = 4096, 8192
# Along the second dimension of a grid.
MOST_PROGRAMS = 65535
# Blocks that a warp keeps in registers; and those of the smallest kernel, of which there is one for each power of two.
PICK_COLUMNS, LEAST_COLUMNS = 1024, 128
# Registers of a thread that picks from few blocks, with which 32 warps fit into a multiprocessor, and from more; and
# warps of a row at most. H200, 32/8 heads, us, with 64, 72 and 128: 32,768 tokens 276, 282, 282; 65,536 842, 830, 867;
# 131,072 3162, 3106, 3359, and with a warp for 512 blocks 3583.
PICK_REGISTERS, MORE_PICK_REGISTERS, PICK_WARPS = 64, 72, 16
# Blocks up to which slots are numbered in bytes.
FEW_COLUMNS = tl.constexpr(256)


def launch_select_blocks(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    max_length: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    softmax_scale: float,
    tiles: ScoreTiles,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The T blocks that each (token, kv head) keeps: int32 `[N, Hk, T]`, ascending, -1 in unused slots at the end.

    Args:
        q: `[N, Hq, Dk]`.
        k: compressed keys `[M, Hk, Dk]`.
        lse: of the compressed attention, float32 `[N, Hq]`.
        cu_seqlens, key_bounds: int32 `[B + 1]`, bounds of the queries and of the compressed tokens.
        max_length: tokens of the longest sequence at most, those without queries included.
        kernel_size, ..., softmax_scale: as `select_blocks`.
        tiles: of the scores.
        cu_seqlens_k: int32 `[B + 1]`, bounds of the tokens, of which the last ones have queries; None where all have.
    """
    (total_tokens, num_heads, dim), num_kv_heads = q.shape, k.shape[1]
    group, num_sequences = num_heads // num_kv_heads, cu_seqlens.numel() - 1
    indices = torch.empty(total_tokens, num_kv_heads, num_selected_blocks, dtype=torch.int32, device=q.device)
    q, softmax_scale = positive_scale(q, softmax_scale)
    windows = padded(block_size // kernel_stride, 1)
    blocks = max(1, tiles.keys // windows)
    specialized = None
    if total_tokens >= LEAST_TOKENS * num_sequences and max_length >= LEAST_LENGTH:
        specialized = _specialized_kernels(tiles, q, k, kernel_size, kernel_stride, block_size)
    tokens = tiles.tokens
    if specialized:
        pack = specialized.pack_of(group, dim, windows)
        tokens = specialized.EDGE.value // pack
        blocks = specialized.KEYS.value // windows - int(kernel_size > kernel_stride)
        q_desc, k_desc = specialized.token_descriptor(q, pack), specialized.window_descriptor(k)
    else:
        k_desc = tile_descriptor(k, blocks * windows) if windows == block_size // kernel_stride else None
    token_tiles = total_tokens // tokens + num_sequences
    most_blocks = triton.cdiv(max_length, block_size)
    chunk = max(1, SCORE_BYTES // (4 * tokens * num_kv_heads * most_blocks))
    chunk = min(chunk, token_tiles, MOST_PROGRAMS)
    # What picks the blocks reads as many as its kernel holds, behind the last row too.
    behind = padded(most_blocks, LEAST_COLUMNS)
    scores = torch.empty(chunk * tokens * num_kv_heads * most_blocks + behind, dtype=torch.float32, device=q.device)
    for first_tile in range(0, token_tiles, chunk):
        some = min(chunk, token_tiles - first_tile)
        newest = max_length
        if cu_seqlens_k is None:
            # No tile is further from the start of its sequence than from that of the pack.
            newest = min(max_length, (first_tile + some) * tokens)
        columns = triton.cdiv(newest, block_size)
        block_tiles = triton.cdiv(columns, blocks)
        spans = min(block_tiles, triton.cdiv(SCORE_PROGRAMS, some * num_kv_heads))
        span = triton.cdiv(block_tiles, spans)
        grid = triton.cdiv(block_tiles, span), some, num_kv_heads
        places = num_sequences, first_tile, columns, span, softmax_scale
        if specialized:
            specialized._block_scores_hopper_kernel[grid](
                q_desc, k_desc, lse, cu_seqlens, key_bounds, cu_seqlens_k, scores, *places,
                num_heads, group, pack, dim, kernel_size, kernel_stride, block_size,
                specialized.stages_of(group // pack, dim, windows), **specialized.OPTIONS,
            )  # fmt: skip
        else:
            _block_scores_kernel[grid](
                q, k, k_desc, lse, cu_seqlens, key_bounds, cu_seqlens_k, scores, *places,
                q.stride(0), k.stride(0), num_heads, group, dim, kernel_size, kernel_stride, block_size,
                tokens, blocks, windows, group <= tiles.resident, tiles.stages, num_warps=tiles.warps,
            )  # fmt: skip
        held = padded(columns, LEAST_COLUMNS)
        options = _pick_options(held)
        _pick_blocks_kernel[(some * tokens, num_kv_heads)](
            scores, cu_seqlens, cu_seqlens_k, indices, num_sequences, first_tile, columns,
            num_kv_heads, tokens, block_size, num_selected_blocks, padded(num_selected_blocks),
            num_init_blocks, num_local_blocks, held, 32 * options["num_warps"], **options,
        )  # fmt: skip
    return indices


def _pick_options(columns: int) -> dict[str, int]:
    """Warps, and the bound of registers where the row leaves room for one and the device knows it."""
    options = {"num_warps": min(max(1, columns // PICK_COLUMNS), PICK_WARPS)}
    if columns <= PICK_COLUMNS * PICK_WARPS and torch.version.hip is None:
        options["maxnreg"] = PICK_REGISTERS if columns < PICK_COLUMNS else MORE_PICK_REGISTERS
    return options


def _specialized_kernels(
    tiles: ScoreTiles, q: Tensor, k: Tensor, kernel_size: int, kernel_stride: int, block_size: int
) -> ModuleType | None:
    """`block_scores_hopper`, where the device, the tensors and the windows allow it."""
    (_, heads, dim), kv_heads = q.shape, k.shape[1]
    # Nothing has no descriptor, and its strides are multiples of one another.
    if not k.numel() or q.stride(0) % dim:
        return None
    if not (has_hopper_kernels(dim, dim, q.dtype) and takes_hopper_kernels(tiles, q, k)):
        return None
    from . import block_scores_hopper

    served = block_scores_hopper.serves(heads // kv_heads, dim, kernel_size, kernel_stride, block_size)
    return block_scores_hopper if served else None


@triton.jit
def overlap_of(window, block, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """geometry.overlap, in chunks."""
    start = tl.maximum(window, block * (BLOCK_SIZE // KERNEL_STRIDE))
    end = tl.minimum(window + KERNEL_SIZE // KERNEL_STRIDE, (block + 1) * (BLOCK_SIZE // KERNEL_STRIDE))
    return tl.maximum(end - start, 0)


@triton.jit
def _load_head(
    q_ptr, lse_ptr, in_pack, q_head, mask, STRIDE_Q: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr
):
    """Queries [TOKENS, D] and lse [TOKENS] of a head."""
    q = load_rows(q_ptr, in_pack * STRIDE_Q + q_head * DIM, mask, DIM, padded_dim(DIM))
    return q, tl.load(lse_ptr + in_pack * NUM_HEADS + q_head, mask=mask, other=0.0)


@triton.jit
def _probabilities(q, k, lse, scale):
    """exp(Q K^T - lse), [TOKENS, KEYS]."""
    return exp_shifted(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, lse, q.dtype == tl.float32)


@triton.jit(do_not_specialize=["num_sequences", "first_tile", "columns", "span"])
def _block_scores_kernel(
    q_ptr,
    k_ptr,
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
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WINDOWS: tl.constexpr,
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Importance of a span of tiles of blocks for a tile of tokens: probabilities of the windows that overlap each.

    A tile holds the windows that begin in its BLOCKS blocks, WINDOWS (a power of two) for each; a window may reach into
    the next block, and that of a tile's last block into the next tile. A span begins a tile early to know those.

    Grid: (span of tiles of blocks, tile of tokens of the chunk, last first; kv head).
    Owns: scores [chunk's token, kv head, block] of its eligible pairs, by plain stores.
    Invariant: after n steps, `reached` is what the last block of the n-th tile gives to the block after it.
    """
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    head = tl.program_id(2)
    slot = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, token_start, length, first_token = tile_of_rows(
        first_tile + slot, cu_seqlens_ptr, num_sequences, 1, TOKENS
    )
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    last_token = past + tl.minimum(first_token + TOKENS, length) - 1
    first = tl.program_id(0) * span
    if (first_token >= length) | (first * BLOCKS > last_token // BLOCK_SIZE):
        return
    in_tile = tl.arange(0, TOKENS)
    token = first_token + in_tile
    mask = token < length
    pos_token = past + token
    end = interval_end(pos_token, KERNEL_SIZE, KERNEL_STRIDE)
    key_start = tl.load(key_bounds_ptr + sequence)
    num_keys = tl.load(key_bounds_ptr + sequence + 1) - key_start
    in_pack = (token_start + token).to(tl.int64)
    k_ptr += key_start.to(tl.int64) * STRIDE_K + head * DIM
    q_0, lse_0 = _load_head(q_ptr, lse_ptr, in_pack, head * GROUP, mask, STRIDE_Q, NUM_HEADS, DIM)
    if RESIDENT and GROUP > 1:
        q_1, lse_1 = _load_head(q_ptr, lse_ptr, in_pack, head * GROUP + 1, mask, STRIDE_Q, NUM_HEADS, DIM)
    if RESIDENT and GROUP > 2:
        q_2, lse_2 = _load_head(q_ptr, lse_ptr, in_pack, head * GROUP + 2, mask, STRIDE_Q, NUM_HEADS, DIM)
    if RESIDENT and GROUP > 3:
        q_3, lse_3 = _load_head(q_ptr, lse_ptr, in_pack, head * GROUP + 3, mask, STRIDE_Q, NUM_HEADS, DIM)
    column = tl.arange(0, BLOCKS * WINDOWS)
    in_block = tl.arange(0, WINDOWS)
    own = overlap_of(in_block, 0, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(tl.float32)
    own = tl.where(in_block < PER_BLOCK, own, 0.0)[None, None, :]
    reach = overlap_of(in_block, 1, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(tl.float32)
    reach = tl.where(in_block < PER_BLOCK, reach, 0.0)[None, None, :]
    in_row = (slot * TOKENS + in_tile).to(tl.int64) * (NUM_HEADS // GROUP) + head
    scores_ptr += in_row[:, None] * columns
    offs = tl.arange(0, BLOCKS)
    before = tl.broadcast_to(tl.maximum(offs - 1, 0)[None, :], [TOKENS, BLOCKS])
    reached = tl.zeros([TOKENS], tl.float32)
    tiles = tl.minimum(first + span, last_token // BLOCK_SIZE // BLOCKS + 1)
    for tile in tl.range(tl.maximum(first - 1, 0), tiles, num_stages=STAGES):
        key = (tile * BLOCKS + column // WINDOWS) * PER_BLOCK + column % WINDOWS
        there = (key < num_keys) & (column % WINDOWS < PER_BLOCK)
        if k_desc is None:
            k = load_rows(k_ptr, key.to(tl.int64) * STRIDE_K, there, DIM, padded_dim(DIM))  # [KEYS, D]
        else:
            # What lies behind the last key may be anything: those probabilities are replaced.
            k = k_desc.load([key_start + tile * (BLOCKS * WINDOWS), head * DIM])
        p = _probabilities(q_0, k, lse_0, scale)
        if RESIDENT:
            if GROUP > 1:
                p += _probabilities(q_1, k, lse_1, scale)
            if GROUP > 2:
                p += _probabilities(q_2, k, lse_2, scale)
            if GROUP > 3:
                p += _probabilities(q_3, k, lse_3, scale)
        else:
            for g in tl.range(1, GROUP):
                q, lse = _load_head(q_ptr, lse_ptr, in_pack, head * GROUP + g, mask, STRIDE_Q, NUM_HEADS, DIM)
                p += _probabilities(q, k, lse, scale)
        p = tl.where((key[None, :] < end[:, None]) & (column % WINDOWS < PER_BLOCK)[None, :], p, 0.0)
        p = tl.reshape(p, [TOKENS, BLOCKS, WINDOWS])
        scores = tl.sum(p * own, 2)
        if KERNEL_SIZE > KERNEL_STRIDE:
            next_block = tl.sum(p * reach, 2)
            scores += tl.where(offs[None, :] == 0, reached[:, None], tl.gather(next_block, before, 1))
            reached = tl.sum(tl.where(offs[None, :] == BLOCKS - 1, next_block, 0.0), 1)
        block = tile * BLOCKS + offs
        stored = mask[:, None] & (block[None, :] <= pos_token[:, None] // BLOCK_SIZE) & (tile >= first)
        tl.store(scores_ptr + block[None, :], scores, mask=stored)


@triton.jit
def _slots_of_few(kept, indices_ptr, block):
    """Stores the kept blocks in order; kept [ROWS, LANES], of 256 at most, row after row.

    Four rows are counted at once, each in a byte of a sum, which holds any slot. Worked example, rows of two lanes
    with 1 1, 0 1, 1 0 and 0 0 kept: the lanes count 1 0 1 0 and 1 1 0 0, before the rows stand 0 2 3 4, so that the
    slots of the second lane are 0+1, 2+0, 3+1 (not kept) and 4+0 (neither).
    """
    ROWS: tl.constexpr = kept.shape[0]
    LANES: tl.constexpr = kept.shape[1]
    shift = 8 * tl.arange(0, 4)[None, :, None]
    counts = tl.sum(tl.reshape(kept, [ROWS // 4, 4, LANES]) << shift, 1)
    of_rows = tl.sum(counts, 1)
    of_words = (of_rows + (of_rows >> 8) + (of_rows >> 16) + (of_rows >> 24)) & 0xFF
    before = (tl.cumsum(of_words) - of_words) * 0x01010101 + (of_rows << 8) + (of_rows << 16) + (of_rows << 24)
    slots = tl.cumsum(counts, 1) - counts + before[:, None]
    slot = (slots[:, None, :] >> shift) & 0xFF
    tl.store(indices_ptr + tl.reshape(slot, [ROWS * LANES]), block, mask=tl.reshape(kept, [ROWS * LANES]) > 0)


@triton.jit
def _slots_by_lane(kept, indices_ptr):
    """Stores the kept blocks lane after lane, in as many steps as one lane has of them; kept [ROWS, LANES].

    A lane's rows are bits of a word, of which the lowest is stored and cleared in each step.
    """
    ROWS: tl.constexpr = kept.shape[0]
    LANES: tl.constexpr = kept.shape[1]
    DEPTH: tl.constexpr = min(ROWS, 32)
    apart = tl.reshape(kept, [ROWS // DEPTH, DEPTH, LANES])
    rest = tl.sum(apart << tl.arange(0, DEPTH)[None, :, None], 1)
    counts = tl.sum(apart, 1)
    of_lane = tl.sum(counts, 0)
    slot = tl.cumsum(counts, 0) - counts + (tl.cumsum(of_lane) - of_lane)[None, :]
    row = DEPTH * tl.arange(0, ROWS // DEPTH)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    for _ in range(tl.max(tl.max(counts, 0))):
        there = rest != 0
        # Of a power of two, or of its negative, the exponent tells the place of the bit.
        exponent = ((rest & -rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
        tl.store(indices_ptr + slot, (row + exponent - 127) * LANES + lane, mask=there)
        slot += there.to(tl.int32)
        rest &= rest - 1


@triton.jit(do_not_specialize=["num_sequences", "first_tile", "columns"])
def _pick_blocks_kernel(
    scores_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    indices_ptr,
    num_sequences,
    first_tile,
    columns,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The blocks that a (token, kv head) keeps: forced ones, then those of the largest scores, ties to the lower one.

    Scores are at least 0, so that their bits are ordered as they are; forced blocks get the largest bits of all. The
    `wanted`-th largest of the maxima of groups of four is a bound below which nothing is kept; few lie above it that
    are not, and those are dropped from the least on. Worked example, 2 of scores 3 5 3 1 | 2 1 0 0: the maxima are 5
    and 2, the bound is 2; of 3 5 3 2 first 2 is dropped, then of the two that tie at 3 the higher block.

    Grid: (token of the chunk, kv head).
    Owns: the T indices of its token and head, by plain stores.
    Invariant: `low` or more is the score of `found` blocks, which are at least as many as are wanted.
    """
    head = tl.program_id(1)
    tile = first_tile + tl.program_id(0) // TOKENS
    sequence, token_start, length, first_token = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, 1, TOKENS)
    token = first_token + tl.program_id(0) % TOKENS
    if token >= length:
        return
    # geometry.num_eligible_blocks
    eligible = (past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr) + token) // BLOCK_SIZE + 1
    wanted = tl.minimum(SLOTS, eligible)
    block = tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * HEADS + head
    # What lies behind the eligible ones may be anything. With masks, each load would wait for the one before.
    score = tl.load(scores_ptr + row * columns + block)
    # The larger of the two drops NaN.
    bits = tl.maximum(score, 0.0).to(tl.int32, bitcast=True)
    # geometry.first_local_block
    bits = tl.where((block < INIT_BLOCKS) | (block >= eligible - LOCAL_BLOCKS), 0x7FFFFFFF, bits)
    bits = tl.where(block < eligible, bits, -1)

    # In groups of elements that one thread holds; at least the least of the maxima of threads is that of each of them.
    best = tl.max(tl.reshape(bits, [COLUMNS // (4 * LANES), 4, LANES]), 1)
    low = wanted * 0
    if SLOTS <= LANES:
        low = tl.maximum(tl.min(tl.max(best, 0)), 0)
    high = tl.maximum(tl.max(tl.max(tl.where(best < 0x7FFFFFFF, best, -1), 0)), low) + 1
    found = tl.sum(tl.sum((best >= low).to(tl.int32), 0))
    while (high - low > 1) & (found > wanted):
        middle = low + (high - low) // 2
        count = tl.sum(tl.sum((best >= middle).to(tl.int32), 0))
        enough = count >= wanted
        low = tl.where(enough, middle, low)
        found = tl.where(enough, count, found)
        high = tl.where(enough, high, middle)

    found = tl.sum((bits >= low).to(tl.int32))
    while found > wanted:
        least = tl.min(tl.where(bits >= low, bits, 0x7FFFFFFF))
        tied = bits == least
        ties = tl.sum(tied.to(tl.int32))
        # All that tie are dropped, or only the highest blocks among them.
        spare = tl.where(found - ties >= wanted, 0, ties - (found - wanted))
        if spare > 0:
            # The least bound below which so many tie.
            none = spare * 0
            bound = none + COLUMNS
            while bound - none > 1:
                middle = (none + bound) // 2
                # Plus 0, which the compiler does not see: it would hold all that the loop does not change in registers.
                first = (bits == least + (middle >> 30)) & (block + (middle >> 30) < middle)
                enough = tl.sum(first.to(tl.int32)) >= spare
                bound = tl.where(enough, middle, bound)
                none = tl.where(enough, none, middle)
            bits = tl.where(tied & (block >= bound), -1, bits)
        low = least + (spare == 0).to(tl.int32)
        found = tl.maximum(found - ties, wanted)

    kept = tl.reshape((bits >= low).to(tl.int32), [COLUMNS // LANES, LANES])
    indices_ptr += ((token_start + token).to(tl.int64) * HEADS + head) * SLOTS
    slots = tl.arange(0, SLOTS_PADDED)
    used = slots < wanted
    if COLUMNS <= FEW_COLUMNS:
        _slots_of_few(kept, indices_ptr, block)
        tl.store(indices_ptr + slots, -1, mask=(slots < SLOTS) & (slots >= wanted))
    else:
        _slots_by_lane(kept, indices_ptr)
        tl.debug_barrier()
        chosen = tl.load(indices_ptr + slots, mask=used, other=0x7FFFFFFF)
        tl.debug_barrier()
        rank = tl.sum((chosen[None, :] < chosen[:, None]).to(tl.int32), 1)
        tl.store(indices_ptr + tl.where(used, rank, slots), tl.where(used, chosen, -1), mask=slots < SLOTS)
