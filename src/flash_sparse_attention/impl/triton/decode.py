"""The whole attention of a few new tokens over a cache of pages: four launches, whatever the lengths.

    scores   program (share of the compressed keys, rows, kv head, sequence)
                 S = Q K^T, stored;   running softmax -> a partial output
    select   program (token, kv head)
                 P = exp(S - lse), summed over the group and over the windows of each block -> the T largest
    attend   program (share of the selected blocks or of the window, token, kv head)
                 running softmax over tiles of keys that lie in one page -> a partial output
    merge    program (token, head)
                 partial outputs of each branch by their lse, times the gates

        partial outputs of a (token, head)    | compressed . . . | selected . . | window . |     . of no share, not read

Grids depend on shapes alone. How the work of a sequence is cut into shares is found out from its length on the device,
by every kernel alike (`_share`), so a CUDA graph may be replayed with other lengths and other pages. Nothing is
atomic: results are bitwise equal from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import geometry
from ...config import NSAConfig
from ...types import KVPages
from .block_scores import overlap_of
from .interval import MOST_TOKENS, interval_end
from .primitives import (
    LN_2,
    LOG2_E,
    dense_rows,
    exp_shifted,
    load_rows,
    padded,
    padded_dim,
    positive_scale,
    store_rows,
)
from .tuning import DecodeTiles, launch_options

# Compressed keys of a tile at most.
MOST_KEYS = 64


class DecodeShape(NamedTuple):
    """Sizes of a call, none of which is read from a device.

    Attributes:
        batch, tokens: sequences, and new tokens of each.
        num_kv_heads, group: heads, and query heads of each.
        page_size, capacity: tokens of a page, and of all pages that a sequence may have.
        chunks, blocks: of a sequence at most.
    """

    batch: int
    tokens: int
    num_kv_heads: int
    group: int
    page_size: int
    capacity: int
    chunks: int
    blocks: int

    @classmethod
    def of(cls, q: Tensor, pages: KVPages, config: NSAConfig) -> DecodeShape:
        """The sizes for queries `[B, S, Hq, Dk]`."""
        batch, tokens, num_heads, _ = q.shape
        num_kv_heads = pages.k.shape[2]
        capacity = min(pages.page_table.shape[1] * pages.page_size, MOST_TOKENS)
        chunks = geometry.num_chunks(capacity, config.kernel_stride)
        blocks = geometry.num_blocks(capacity, config.block_size)
        return cls(batch, tokens, num_kv_heads, num_heads // num_kv_heads, pages.page_size, capacity, chunks, blocks)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group

    @property
    def columns(self) -> int:
        """Of a row of scores: whole tiles of keys, which are stored without a mask."""
        return max(1, triton.cdiv(self.chunks, MOST_KEYS)) * MOST_KEYS

    @property
    def score_bytes(self) -> int:
        """Of the scores of one new token of each sequence."""
        return 4 * self.batch * self.num_heads * self.columns


class Partials(NamedTuple):
    """Partial softmaxes of the (token, head) rows.

    Attributes:
        out: `[B * S, Hq, parts, Dv]`, normalised, float32.
        lse: `[B * S, Hq, parts]`, natural logarithm.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, shape: DecodeShape, dim_v: int, tiles: DecodeTiles, device: torch.device) -> Partials:
        """Room for those of a call."""
        rows = shape.batch * shape.tokens, shape.num_heads, tiles.parts
        return cls(*(torch.empty(size, dtype=torch.float32, device=device) for size in ((*rows, dim_v), rows)))


def launch_decode(
    q: Tensor,
    gates: Tensor,
    pages: KVPages,
    config: NSAConfig,
    softmax_scale: float,
    back: int,
    tiles: DecodeTiles,
) -> tuple[Tensor, Tensor]:
    """out `[B, S, Hq, Dv]` and the selection int32 `[B, S, Hk, T]`, by one launch of each kernel.

    Args:
        q: `[B, S, Hq, Dk]`.
        gates: `[B, S, Hq, 3]` or `[B, S, 1, 3]`, contiguous.
        pages: pools with adjacent heads and contiguous channels.
        config: the sizes.
        softmax_scale: factor of the scores.
        back: token i of S stands at position seq_lens[b] - back + i.
        tiles: of the kernels.
    """
    shape, dim_v = DecodeShape.of(q, pages, config), pages.v.shape[3]
    partials = Partials.empty(shape, dim_v, tiles, q.device)
    q, softmax_scale = positive_scale(dense_rows(q.flatten(0, 1)), softmax_scale)
    scores = launch_decode_scores(q, pages, config, softmax_scale, back, shape, tiles, partials)
    block_indices = launch_decode_select(scores, partials, pages.seq_lens, config, back, shape, tiles)
    launch_decode_attend(q, block_indices, pages, config, softmax_scale, back, shape, tiles, partials)
    out = q.new_empty(shape.batch, shape.tokens, shape.num_heads, dim_v)
    launch_decode_merge(partials, gates, pages.seq_lens, config, back, shape, tiles, out)
    return out, block_indices


def launch_decode_scores(
    q: Tensor,
    pages: KVPages,
    config: NSAConfig,
    softmax_scale: float,
    back: int,
    shape: DecodeShape,
    tiles: DecodeTiles,
    partials: Partials,
) -> Tensor:
    """The scores of the compressed keys `[B, Hk, S * G, columns]`, by chunk, and the first of the partial outputs.

    q: `[B * S, Hq, Dk]`; `softmax_scale` is positive.
    """
    k, v = pages.k_compressed, pages.v_compressed
    num_rows = shape.tokens * shape.group
    scores = torch.empty(shape.batch, shape.num_kv_heads, num_rows, shape.columns, dtype=torch.float32, device=q.device)
    grid = shape.num_kv_heads * triton.cdiv(num_rows, tiles.rows) * shape.batch, tiles.compressed_splits
    one_page = pages.page_table.shape[1] == 1 or k.shape[1] % tiles.compressed_keys == 0
    _decode_scores_kernel[grid](
        q, k, v, pages.page_table, pages.seq_lens, scores, *partials,
        len(k), k.shape[1], shape.capacity, back, shape.tokens, tiles.compressed_splits, tiles.parts, shape.columns,
        softmax_scale, q.stride(0), k.stride()[:2], v.stride()[:2], pages.page_table.stride(0),
        shape.num_kv_heads, shape.group, k.shape[3], v.shape[3], config.kernel_size, config.kernel_stride,
        one_page, tiles.compressed_keys, tiles.least_keys, tiles.rows,
        *((tiles.compressed_keys, tiles.stages) if one_page else (tiles.scattered_keys, tiles.scattered_stages)),
        **launch_options(tiles),
    )  # fmt: skip
    return scores


def launch_decode_select(
    scores: Tensor,
    partials: Partials,
    seq_lens: Tensor,
    config: NSAConfig,
    back: int,
    shape: DecodeShape,
    tiles: DecodeTiles,
) -> Tensor:
    """The blocks that each (token, kv head) keeps, int32 `[B, S, Hk, T]`, ascending, -1 in unused slots."""
    rows = shape.batch, shape.tokens, shape.num_kv_heads
    lse = torch.empty(shape.batch * shape.tokens, shape.num_heads, dtype=torch.float32, device=scores.device)
    ranking = torch.empty(*rows, shape.blocks, dtype=torch.int32, device=scores.device)
    block_indices = torch.empty(*rows, config.num_selected_blocks, dtype=torch.int32, device=scores.device)
    _decode_select_kernel[(shape.batch * shape.tokens * shape.num_kv_heads,)](
        scores, partials.lse, seq_lens, lse, ranking, block_indices,
        shape.capacity, back, shape.tokens, tiles.compressed_splits, tiles.parts, shape.columns, shape.blocks,
        shape.num_kv_heads, shape.group, config.kernel_size, config.kernel_stride, config.block_size,
        config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks, tiles.compressed_keys,
        tiles.least_keys, padded(tiles.compressed_splits), tiles.blocks,
        padded(config.block_size // config.kernel_stride, 1), tiles.columns, num_warps=tiles.select_warps,
    )  # fmt: skip
    return block_indices


def launch_decode_attend(
    q: Tensor,
    block_indices: Tensor,
    pages: KVPages,
    config: NSAConfig,
    softmax_scale: float,
    back: int,
    shape: DecodeShape,
    tiles: DecodeTiles,
    partials: Partials,
) -> None:
    """The partial outputs of the selected blocks and of the window; q is as for the scores."""
    rows = min(tiles.rows, padded(shape.group))
    programs = shape.num_kv_heads * triton.cdiv(shape.group, rows) * shape.batch * shape.tokens
    pools = pages.k, pages.v, pages.k_window, pages.v_window
    _decode_attend_kernel[(programs, tiles.selected_splits + tiles.window_splits)](
        q, *pools, pages.page_table, pages.seq_lens, block_indices, *partials,
        len(pages.k), shape.page_size, shape.capacity, back, shape.tokens, tiles.compressed_splits,
        tiles.selected_splits, tiles.window_splits, softmax_scale,
        q.stride(0), *(pool.stride()[:2] for pool in pools), pages.page_table.stride(0),
        shape.num_kv_heads, shape.group, config.num_selected_blocks, pages.k.shape[3], pages.v.shape[3],
        config.block_size, min(config.window_size, MOST_TOKENS), rows, tiles.keys, tiles.stages,
        **launch_options(tiles),
    )  # fmt: skip


def launch_decode_merge(
    partials: Partials,
    gates: Tensor,
    seq_lens: Tensor,
    config: NSAConfig,
    back: int,
    shape: DecodeShape,
    tiles: DecodeTiles,
    out: Tensor,
) -> None:
    """The gated sum of the branches into `out`, `[B, S, Hq, Dv]`."""
    _decode_merge_kernel[(shape.batch * shape.tokens * shape.num_heads,)](
        *partials, gates, seq_lens, out, shape.capacity, back, shape.tokens, tiles.compressed_splits,
        tiles.selected_splits, tiles.window_splits,
        shape.num_heads, gates.shape[2], config.num_selected_blocks, out.shape[3], config.kernel_size,
        config.kernel_stride, config.block_size, min(config.window_size, MOST_TOKENS), tiles.compressed_keys,
        tiles.least_keys, tiles.keys, padded(tiles.parts), num_warps=tiles.merge_warps,
    )  # fmt: skip


@triton.jit
def _length(seq_lens_ptr, sequence, capacity):
    """Tokens of a sequence; no more than its pages hold, as what stands there may be anything."""
    return tl.minimum(tl.maximum(tl.load(seq_lens_ptr + sequence), 0), capacity)


@triton.jit
def _chunk_end(token, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """One past the newest chunk of the windows that a token sees, 0 if it sees none; see geometry.newest_chunk."""
    end = interval_end(token, KERNEL_SIZE, KERNEL_STRIDE)
    return tl.where(end > 0, end + (KERNEL_SIZE // KERNEL_STRIDE - 1), 0)


@triton.jit
def _share(total, splits, STEP: tl.constexpr, LEAST: tl.constexpr):
    """Items of a share where `total` are cut into `splits` at most, in whole steps; and the shares that hold any."""
    share = tl.maximum((total + splits * STEP - 1) // (splits * STEP) * STEP, LEAST)
    return share, (total + share - 1) // share


@triton.jit
def _tiles_of(position, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of the blocks that a token keeps; the first block of its window, and the tiles from there to its own."""
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    own = position // BLOCK_SIZE
    first = tl.maximum(position - WINDOW_SIZE + 1, 0) // BLOCK_SIZE
    return tl.minimum(own + 1, SLOTS) * PARTS, first, (own - first + 1) * PARTS


@triton.jit
def _softmax_step(products, v, out, total, largest, scale, EXACT: tl.constexpr):
    """A tile of keys enters a running softmax; `products` are -inf where a row does not see a key."""
    larger = tl.maximum(largest, tl.max(products, 1) * scale)
    # A row that has seen no key keeps -inf, and any finite maximum serves it.
    finite = tl.where(larger == -float("inf"), 0.0, larger)
    p = exp_shifted(products, scale, finite, EXACT)
    shrink = tl.exp2((largest - finite) * LOG2_E)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, total, larger


@triton.jit
def _store_part(partial_ptr, partial_lse_ptr, at, mask, out, total, largest, DIM: tl.constexpr):
    """Stores a running softmax at the parts `at` (64-bit) of its rows."""
    out = out * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    store_rows(partial_ptr, at * DIM, mask, out, DIM, padded_dim(DIM))
    tl.store(partial_lse_ptr + at, largest + tl.log2(total) * LN_2, mask=mask)


@triton.jit(
    do_not_specialize=["num_pages", "page_rows", "capacity", "back", "tokens", "splits", "parts", "stride_table"]
)
def _decode_scores_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    seq_lens_ptr,
    scores_ptr,
    partial_ptr,
    partial_lse_ptr,
    num_pages,
    page_rows,
    capacity,
    back,
    tokens,
    splits,
    parts,
    columns,
    scale,
    stride_q,
    strides_k,
    strides_v,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    STEP: tl.constexpr,
    LEAST_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of rows, (token, head of the group), to a share of the compressed keys, and the scores of these.

    Keys are counted as pages hold them, by the newest chunk of their windows. ONE_PAGE says that those of a tile lie in
    one page; else each is looked up, a load before the load, which takes more stages.

    Grid: (kv head, fastest, then tile of rows, then sequence; share).
    Owns: the scores of its rows and keys, and part `share` of its rows, by plain stores.
    Invariant: after n steps, `out`, `total` and `largest` are the softmax over the first n tiles of the share.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(0) % NUM_KV_HEADS
    row_tiles = (tokens * GROUP + ROWS - 1) // ROWS
    first_row = tl.program_id(0) // NUM_KV_HEADS % row_tiles * ROWS
    sequence = tl.program_id(0) // NUM_KV_HEADS // row_tiles
    oldest = _length(seq_lens_ptr, sequence, capacity) - back
    num_chunks = _chunk_end(oldest + tokens - 1, KERNEL_SIZE, KERNEL_STRIDE)
    share, _ = _share(num_chunks, splits, STEP, LEAST_KEYS)
    first = tl.program_id(1) * share
    if first >= num_chunks:
        return
    row = first_row + tl.arange(0, ROWS)
    mask = row < tokens * GROUP
    end = _chunk_end(oldest + row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    # Later keys are seen by no row of the tile.
    newest = oldest + (tl.minimum(first_row + ROWS, tokens * GROUP) - 1) // GROUP
    last = tl.minimum(first + share, _chunk_end(newest, KERNEL_SIZE, KERNEL_STRIDE))
    token = sequence.to(tl.int64) * tokens + row // GROUP
    q_head = head * GROUP + row % GROUP
    q = load_rows(q_ptr, token * stride_q + q_head * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    page_table_ptr += sequence.to(tl.int64) * stride_table
    k_ptr += head * DIM_K
    v_ptr += head * DIM_V
    in_scores = (sequence.to(tl.int64) * NUM_KV_HEADS + head) * tokens * GROUP + row
    scores_ptr += in_scores[:, None] * columns
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, padded_dim(DIM_V)], tl.float32)
    offs = tl.arange(0, KEYS)
    for start in tl.range(first, last, KEYS, num_stages=STAGES):
        chunk = start + offs
        there = (chunk >= KERNEL_SIZE // KERNEL_STRIDE - 1) & (chunk < last)
        # A scalar if ONE_PAGE, and its keys follow each other; else [KEYS].
        place = start if ONE_PAGE else chunk
        page = tl.load(page_table_ptr + place // page_rows, mask=place < last, other=-1)
        in_page = (place % page_rows).to(tl.int64)
        there = there & (page >= 0) & (page < num_pages)
        k_tile = page.to(tl.int64) * strides_k[0] + in_page * strides_k[1]
        v_tile = page.to(tl.int64) * strides_v[0] + in_page * strides_v[1]
        if ONE_PAGE:
            k = load_rows(k_ptr + k_tile, offs.to(tl.int64) * strides_k[1], there, DIM_K, padded_dim(DIM_K))
            v = load_rows(v_ptr + v_tile, offs.to(tl.int64) * strides_v[1], there, DIM_V, padded_dim(DIM_V))
        else:
            k = load_rows(k_ptr, k_tile, there, DIM_K, padded_dim(DIM_K))  # [KEYS, DK]
            v = load_rows(v_ptr, v_tile, there, DIM_V, padded_dim(DIM_V))  # [KEYS, DV]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS]
        products = tl.where(there[None, :] & (chunk[None, :] < end[:, None]), products, -float("inf"))
        tl.store(scores_ptr + chunk[None, :], products * scale, mask=mask[:, None])
        out, total, largest = _softmax_step(products, v, out, total, largest, scale, EXACT)
    at = (token * (NUM_KV_HEADS * GROUP) + q_head) * parts + tl.program_id(1)
    _store_part(partial_ptr, partial_lse_ptr, at, mask, out, total, largest, DIM_V)


@triton.jit
def _group_lse(partial_lse_ptr, lse_ptr, row, parts, live, GROUP: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """Merges the lse of the shares of the compressed keys for the heads of a group, from `row` on; finite ones."""
    g = tl.arange(0, padded_dim(GROUP))
    split = tl.arange(0, SPLITS_PADDED)
    at = (row + g)[:, None] * parts + split[None, :]
    part = tl.load(partial_lse_ptr + at, mask=(g < GROUP)[:, None] & (split < live)[None, :], other=-float("inf"))
    largest = tl.max(part, 1)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.sum(tl.exp2((part - largest[:, None]) * LOG2_E), 1)
    # A row without a key has no probability that this could change.
    lse = largest + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN_2
    tl.store(lse_ptr + row + g, lse, mask=g < GROUP)


@triton.jit
def _rank_blocks(
    scores_ptr, lse_ptr, ranking_ptr, eligible, end, columns,
    GROUP: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Stores by what blocks are ranked: the bits of their importance, which is not negative; the forced ones' largest.

    A window is counted by its newest chunk, and may reach into the block before that of this chunk. Tiles of blocks are
    worked through from the last on; `reached` is what the first block of a tile gives to the last one of the next.
    """
    PER_BLOCK: tl.constexpr = BLOCK_SIZE // KERNEL_STRIDE
    HEADS: tl.constexpr = 4 if GROUP > 4 else GROUP
    column = tl.arange(0, BLOCKS * WINDOWS)
    in_block = tl.arange(0, WINDOWS)
    # geometry.newest_chunk
    window = in_block - (KERNEL_SIZE // KERNEL_STRIDE - 1)
    own = overlap_of(window, 0, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(tl.float32)[None, :]
    reach = overlap_of(window, -1, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE).to(tl.float32)[None, :]
    offs = tl.arange(0, BLOCKS)
    reached = end * 0.0
    # Scores from `end` to the end of a tile are -inf; so far they can be loaded several at a time.
    whole = (end + 15) // 16 * 16
    for before in tl.range(0, eligible, BLOCKS):
        first = ((eligible - 1) // BLOCKS) * BLOCKS - before
        chunk = first * PER_BLOCK + column
        there = chunk < whole
        if WINDOWS != PER_BLOCK:
            chunk = (first + column // WINDOWS) * PER_BLOCK + column % WINDOWS
            there = (chunk < whole) & (column % WINDOWS < PER_BLOCK)
        p = tl.zeros([BLOCKS * WINDOWS], tl.float32)
        for first_head in tl.range(0, GROUP, HEADS):
            # Loads of several heads are in flight at once.
            for i in tl.static_range(HEADS):
                head = first_head + i
                lse = tl.load(lse_ptr + head, mask=head < GROUP, other=0.0)
                at = head.to(tl.int64) * columns + chunk
                score = tl.load(scores_ptr + at, mask=there & (head < GROUP), other=-float("inf"))
                p += tl.exp2((score - lse) * LOG2_E)
        p = tl.reshape(p, [BLOCKS, WINDOWS])
        importance = tl.sum(p * own, 1)
        if KERNEL_SIZE > KERNEL_STRIDE:
            previous = tl.sum(p * reach, 1)
            importance += tl.where(
                offs == BLOCKS - 1, reached, tl.gather(previous, tl.minimum(offs + 1, BLOCKS - 1), 0)
            )
            reached = tl.sum(tl.where(offs == 0, previous, 0.0))
        block = first + offs
        # The larger of the two drops NaN.
        bits = tl.maximum(importance, 0.0).to(tl.int32, bitcast=True)
        # geometry.first_local_block
        bits = tl.where((block < INIT_BLOCKS) | (block >= eligible - LOCAL_BLOCKS), 0x7FFFFFFF, bits)
        tl.store(ranking_ptr + block, bits, mask=block < eligible)


@triton.jit
def _bound(ranking_ptr, eligible, wanted, COLUMNS: tl.constexpr):
    """The least rank that is kept, and how many of the blocks at it are, so that `wanted` are in all.

    Each pass over the ranks counts those above three bounds, as fields of 21 bits, and leaves a quarter of the range.
    Invariant: `found` blocks, as many as are wanted or more, lie at `low` or above, and `over` at `high` or above:
    fewer than are wanted, or all of them forced.
    """
    offs = tl.arange(0, COLUMNS)
    low = eligible * 0
    high = low + 0x7FFFFFFF
    found = eligible
    over = low
    while (high - low > 1) & (found > wanted):
        quarter = (high - low) // 4
        first = low + tl.maximum(quarter, 1)
        second = low + tl.maximum(2 * quarter, 1)
        third = low + tl.maximum(3 * quarter, 1)
        above = tl.zeros([COLUMNS], tl.int64)
        for begin in tl.range(0, eligible, COLUMNS):
            bits = tl.load(ranking_ptr + begin + offs, mask=begin + offs < eligible, other=-1)
            above += (bits >= first).to(tl.int64)
            above += (bits >= second).to(tl.int64) << 21
            above += (bits >= third).to(tl.int64) << 42
        counts = tl.sum(above)
        of_first = (counts & 0x1FFFFF).to(tl.int32)
        of_second = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
        of_third = (counts >> 42).to(tl.int32)
        over = tl.where(of_third < wanted, of_third, over)
        high = tl.where(of_third < wanted, third, high)
        over = tl.where(of_second < wanted, of_second, over)
        high = tl.where(of_second < wanted, second, high)
        over = tl.where(of_first < wanted, of_first, over)
        high = tl.where(of_first < wanted, first, high)
        found = tl.where(of_first >= wanted, of_first, found)
        low = tl.where(of_first >= wanted, first, low)
        found = tl.where(of_second >= wanted, of_second, found)
        low = tl.where(of_second >= wanted, second, low)
        found = tl.where(of_third >= wanted, of_third, found)
        low = tl.where(of_third >= wanted, third, low)
    # Where more are found, they tie at `low`.
    return low, tl.where(found > wanted, wanted - over, wanted)


@triton.jit
def _store_largest(ranking_ptr, indices_ptr, eligible, bound, ties, COLUMNS: tl.constexpr):
    """Stores the blocks above the bound and the first `ties` at it, ascending."""
    offs = tl.arange(0, COLUMNS)
    above_before = eligible * 0
    tied_before = eligible * 0
    for begin in tl.range(0, eligible, COLUMNS):
        bits = tl.load(ranking_ptr + begin + offs, mask=begin + offs < eligible, other=-1)
        # A field for each; a tile has fewer than 2**15 of them.
        rank = tl.cumsum((bits > bound).to(tl.int32) + ((bits == bound).to(tl.int32) << 16))
        above = above_before + (rank & 0xFFFF)
        tied = tied_before + (rank >> 16)
        kept = (bits > bound) | ((bits == bound) & (tied <= ties))
        tl.store(indices_ptr + above + tl.minimum(tied, ties) - 1, begin + offs, mask=kept)
        above_before += tl.sum((bits > bound).to(tl.int32))
        tied_before += tl.sum((bits == bound).to(tl.int32))


@triton.jit(do_not_specialize=["capacity", "back", "tokens", "splits", "parts", "ranks"])
def _decode_select_kernel(
    scores_ptr,
    partial_lse_ptr,
    seq_lens_ptr,
    lse_ptr,
    ranking_ptr,
    indices_ptr,
    capacity,
    back,
    tokens,
    splits,
    parts,
    columns,
    ranks,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    LEAST_KEYS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    WINDOWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The blocks that a (token, kv head) keeps: forced ones, then the most important, ties to the lower one.

    Grid: (kv head, fastest, then token,).
    Owns: the T indices of its token and head, and their rows of `lse` and `ranking`, by plain stores.
    Invariant: those of its loops are said where they are.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    token = tl.program_id(0) // NUM_KV_HEADS
    sequence = token // tokens
    oldest = _length(seq_lens_ptr, sequence, capacity) - back
    position = oldest + token % tokens
    # geometry.num_eligible_blocks
    eligible = tl.where(position >= 0, position // BLOCK_SIZE + 1, 0)
    wanted = tl.minimum(SLOTS, eligible)
    indices_ptr += tl.program_id(0).to(tl.int64) * SLOTS
    slot = tl.arange(0, padded_dim(SLOTS))
    if eligible <= SLOTS:
        tl.store(indices_ptr + slot, tl.where(slot < eligible, slot, -1), mask=slot < SLOTS)
        return
    row = token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * GROUP
    num_chunks = _chunk_end(oldest + tokens - 1, KERNEL_SIZE, KERNEL_STRIDE)
    _, live = _share(num_chunks, splits, STEP, LEAST_KEYS)
    _group_lse(partial_lse_ptr, lse_ptr, row, parts, live, GROUP, SPLITS_PADDED)
    tl.debug_barrier()
    in_scores = (sequence.to(tl.int64) * NUM_KV_HEADS + head) * tokens + token % tokens
    ranking_ptr += tl.program_id(0).to(tl.int64) * ranks
    _rank_blocks(
        scores_ptr + in_scores * GROUP * columns, lse_ptr + row, ranking_ptr, eligible,
        _chunk_end(position, KERNEL_SIZE, KERNEL_STRIDE), columns,
        GROUP, KERNEL_SIZE, KERNEL_STRIDE, BLOCK_SIZE, INIT_BLOCKS, LOCAL_BLOCKS, BLOCKS, WINDOWS,
    )  # fmt: skip
    tl.debug_barrier()
    bound, ties = _bound(ranking_ptr, eligible, wanted, COLUMNS)
    _store_largest(ranking_ptr, indices_ptr, eligible, bound, ties, COLUMNS)


@triton.jit(
    do_not_specialize=[
        "num_pages", "page_size", "capacity", "back", "tokens", "splits", "selected_splits", "window_splits",
        "stride_table",
    ]
)  # fmt: skip
def _decode_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_window_ptr,
    v_window_ptr,
    page_table_ptr,
    seq_lens_ptr,
    indices_ptr,
    partial_ptr,
    partial_lse_ptr,
    num_pages,
    page_size,
    capacity,
    back,
    tokens,
    splits,
    selected_splits,
    window_splits,
    scale,
    stride_q,
    strides_k,
    strides_v,
    strides_k_window,
    strides_v_window,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of heads of a group of a token to a share of its selected blocks or of its window.

    Both are tiles of blocks, those of the window consecutive ones; a page holds whole blocks, so a tile has one page.

    Grid: (kv head, fastest, then tile of heads of the group, then token; share: of the blocks first, then of the
        window).
    Owns: its part of its rows, by plain stores.
    Invariant: after n steps, `out`, `total` and `largest` are the softmax over the first n tiles of the share.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    HEAD_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    head = tl.program_id(0) % NUM_KV_HEADS
    token = tl.program_id(0) // (NUM_KV_HEADS * HEAD_TILES)
    sequence = token // tokens
    position = _length(seq_lens_ptr, sequence, capacity) - back + token % tokens
    if position < 0:
        return
    num_selected, first_block, num_window = _tiles_of(position, SLOTS, BLOCK_SIZE, WINDOW_SIZE, KEYS)
    windowed = tl.program_id(1) >= selected_splits
    num_tiles = tl.where(windowed, num_window, num_selected)
    share, _ = _share(num_tiles, tl.where(windowed, window_splits, selected_splits), 1, 1)
    first = (tl.program_id(1) - tl.where(windowed, selected_splits, 0)) * share
    if first >= num_tiles:
        return
    g = tl.program_id(0) // NUM_KV_HEADS % HEAD_TILES * ROWS + tl.arange(0, ROWS)
    mask = g < GROUP
    q_head = head * GROUP + g
    q = load_rows(q_ptr, token.to(tl.int64) * stride_q + q_head * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    k_ptr = tl.where(windowed, k_window_ptr, k_ptr) + head * DIM_K
    v_ptr = tl.where(windowed, v_window_ptr, v_ptr) + head * DIM_V
    k_page = tl.where(windowed, strides_k_window[0], strides_k[0]).to(tl.int64)
    k_row = tl.where(windowed, strides_k_window[1], strides_k[1]).to(tl.int64)
    v_page = tl.where(windowed, strides_v_window[0], strides_v[0]).to(tl.int64)
    v_row = tl.where(windowed, strides_v_window[1], strides_v[1]).to(tl.int64)
    page_table_ptr += sequence.to(tl.int64) * stride_table
    indices_ptr += (token.to(tl.int64) * NUM_KV_HEADS + head) * SLOTS
    oldest = tl.where(windowed, position - WINDOW_SIZE + 1, 0)
    offs = tl.arange(0, KEYS)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, padded_dim(DIM_V)], tl.float32)
    for i in tl.range(first, tl.minimum(first + share, num_tiles), num_stages=STAGES):
        selected = tl.load(indices_ptr + i // PARTS, mask=windowed == 0, other=0)
        block = tl.where(windowed, first_block + i // PARTS, selected)
        # geometry.first_token_of_block
        start = block * BLOCK_SIZE + i % PARTS * KEYS
        key = start + offs
        page = tl.load(page_table_ptr + start // page_size)
        there = (key >= oldest) & (key <= position) & (page >= 0) & (page < num_pages)
        if BLOCK_SIZE % KEYS != 0:
            there = there & (i % PARTS * KEYS + offs < BLOCK_SIZE)
        in_page = (start % page_size).to(tl.int64)
        k_tile = k_ptr + page.to(tl.int64) * k_page + in_page * k_row
        v_tile = v_ptr + page.to(tl.int64) * v_page + in_page * v_row
        k = load_rows(k_tile, offs.to(tl.int64) * k_row, there, DIM_K, padded_dim(DIM_K))  # [KEYS, DK]
        v = load_rows(v_tile, offs.to(tl.int64) * v_row, there, DIM_V, padded_dim(DIM_V))  # [KEYS, DV]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS]
        products = tl.where(there[None, :], products, -float("inf"))
        out, total, largest = _softmax_step(products, v, out, total, largest, scale, EXACT)
    parts = splits + selected_splits + window_splits
    at = (token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + q_head) * parts + splits + tl.program_id(1)
    _store_part(partial_ptr, partial_lse_ptr, at, mask, out, total, largest, DIM_V)


@triton.jit
def _weights(lse, mine, gate):
    """What the partial outputs that are `mine`, those of a branch, count for: their shares of it, times its gate."""
    lse = tl.where(mine, lse, -float("inf"))
    largest = tl.max(lse, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    p = tl.exp2((lse - largest) * LOG2_E)
    total = tl.sum(p, 0)
    return p * (tl.sigmoid(gate.to(tl.float32)) / tl.where(total == 0.0, 1.0, total))


@triton.jit(do_not_specialize=["capacity", "back", "tokens", "splits", "selected_splits", "window_splits"])
def _decode_merge_kernel(
    partial_ptr,
    partial_lse_ptr,
    gates_ptr,
    seq_lens_ptr,
    out_ptr,
    capacity,
    back,
    tokens,
    splits,
    selected_splits,
    window_splits,
    NUM_HEADS: tl.constexpr,
    GATE_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW_SIZE: tl.constexpr,
    STEP: tl.constexpr,
    LEAST_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
):
    """The gated sum of the branches of a (token, head), each of them the merge of its parts. Others are not read.

    Grid: (head, fastest, then token,).
    Owns: out of its token and head, by plain stores.
    Invariant: no loop.
    """
    row = tl.program_id(0).to(tl.int64)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    oldest = _length(seq_lens_ptr, token // tokens, capacity) - back
    position = oldest + (token % tokens).to(tl.int32)
    num_chunks = _chunk_end(oldest + tokens - 1, KERNEL_SIZE, KERNEL_STRIDE)
    num_selected, _, num_window = _tiles_of(position, SLOTS, BLOCK_SIZE, WINDOW_SIZE, KEYS)
    _, compressed = _share(num_chunks, splits, STEP, LEAST_KEYS)
    _, selected = _share(num_selected, selected_splits, 1, 1)
    _, window = _share(num_window, window_splits, 1, 1)
    part = tl.arange(0, PARTS_PADDED)
    # A token at a negative position has no part, and its gates may be anything.
    seen = position >= 0
    is_compressed = seen & (part < compressed)
    is_selected = seen & (part >= splits) & (part < splits + selected)
    first_window = splits + selected_splits
    is_window = seen & (part >= first_window) & (part < first_window + window)
    there = is_compressed | is_selected | is_window
    parts = splits + selected_splits + window_splits
    lse = tl.load(partial_lse_ptr + row * parts + part, mask=there, other=-float("inf"))
    rows = (row * parts + part) * DIM
    tile = load_rows(partial_ptr, rows, there, DIM, padded_dim(DIM))  # [PARTS, DV]
    gates_ptr += (token * GATE_HEADS + head % GATE_HEADS) * 3
    weight = _weights(lse, is_compressed, tl.load(gates_ptr, mask=seen, other=0.0))
    weight += _weights(lse, is_selected, tl.load(gates_ptr + 1, mask=seen, other=0.0))
    weight += _weights(lse, is_window, tl.load(gates_ptr + 2, mask=seen, other=0.0))
    out = tl.sum(tile * weight[:, None], 0)
    offs = tl.arange(0, padded_dim(DIM))
    tl.store(out_ptr + row * DIM + offs, out.to(out_ptr.dtype.element_ty), mask=offs < DIM)
