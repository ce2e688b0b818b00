"""Selected attention, key/value blocks in the outer loop (FSA), forward and backward.

    bucket of block j:  (t3,h0) (t3,h1) (t9,h0) (t9,h1) | (t12,h0) ...   rows: (token, head of the group)
                        `------ a tile of rows -------'
    program             K_j, V_j stay;   S = Q K_j^T;   P = exp2(S - its row maximum);   P V_j / its row sum
                             |
    partial results     [token, head, slot] -> merged over the slots of a row by their lse

Rows come straight from the inverted index, so that no head grouping is padded. A program owns a segment of a bucket.
These kernels are for any device and shape; `selected_hopper` has others for what most models have, on Hopper.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .inverted_index import InvertedIndex
from .merge import launch_merge
from .primitives import (
    LN_2,
    LOG2_E,
    block_bounds,
    exp_below,
    exp_shifted,
    lift,
    load_rows,
    padded_dim,
    positive_scale,
    store_rows,
    wait_for_the_kernel_before,
)
from .segment import add_up, keys_of_bucket, segment_of_program
from .selected_near import launch_near, split_entries
from .tuning import (
    SEGMENT_ROWS_OF_OTHERS,
    WIDE_KEYS,
    WIDE_TILES_OF_OTHERS,
    KvOuterTiles,
    early_launch,
    launch_options,
    takes_hopper_kernels,
)


def launch_selected_fwd_kv_outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    index: InvertedIndex,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    tiles: KvOuterTiles,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out `[N, Hq, Dv]` and lse `[N, Hq]` (natural logarithm, float32). Bounds are as for `build_index`.

    `block_indices` is what `index` is of.
    """
    (total_tokens, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    group, chunks = num_heads // num_kv_heads, index.chunks
    out = q.new_empty(total_tokens, num_heads, dim_v)
    lse = q.new_empty(total_tokens, num_heads, dtype=torch.float32)
    q, softmax_scale = positive_scale(q, softmax_scale)
    partial = q.new_empty(chunks.pairs * group, dim_v)
    partial_lse = lse.new_empty(chunks.pairs * group)
    specialized = specialized_kernels(tiles, q, k, v)
    descriptor = specialized and specialized.tile_descriptor(partial, 1)
    if tiles.specialized and tiles.keys == WIDE_KEYS and not specialized:
        # Of tensors that are not aligned.
        pairs = max(1, SEGMENT_ROWS_OF_OTHERS // group)
        tiles = replace(tiles, segment_pairs=min(tiles.segment_pairs, pairs))
    bounds = cu_seqlens, cu_seqlens_k
    far = selected = None
    if takes_near_kernels(tiles, q, k, v):
        segments = index.far_segments(tiles.segment_pairs, cu_seqlens, block_size, cu_seqlens_k)
        far, selected = index.far, index.selected
        if far is None or selected is None:
            far, selected = split_entries(block_indices, index, *bounds, block_size)
    else:
        segments = index.segments(tiles.segment_pairs)
    for some in segments:
        places = chunks.buckets * some.classes
        for number, first_head, first_token, tokens in some.chunks:
            grid = (some.most_of_chunk,)
            lists = index.pairs, some.table, some.ends, *bounds
            first_place = (number - some.first_number) * places
            common = cu_seqlens.numel() - 1, chunks.num_blocks, first_place, places
            fresh = int(number == some.first_number)
            strides = q.stride(0), k.stride(0), v.stride(0)
            if specialized:
                kernel, options = _forward_for_hopper(tiles.keys)
                kernel[grid](
                    q, k, v, descriptor, partial, partial_lse, *lists, *common, fresh, softmax_scale, *strides,
                    group, dim_k, block_size, **options, **early_launch(),
                )  # fmt: skip
            else:
                _selected_fwd_kv_outer_kernel[grid](
                    q, k, v, partial, partial_lse, *lists, *common, softmax_scale, *strides, group, dim_k, dim_v,
                    block_size, tiles.rows, tiles.keys, tiles.stages, **launch_options(tiles),
                )  # fmt: skip
            if selected is not None:
                # Just before the merge, which finds the results in L2.
                chunk = first_head, chunks.heads, first_token, tokens
                launch_near(
                    q, k, v, selected, out, lse, *bounds, block_size, softmax_scale, chunk, specialized is not None
                )
            given = partial, partial_lse, index, out, lse
            launch_merge(*given, 1.0, first_head, first_token, tokens, far=far)
    return out, lse


def takes_near_kernels(tiles: KvOuterTiles, *tensors: Tensor) -> bool:
    """Whether the forward pass has near blocks in a kernel of their own."""
    # Tiles for Hopper count on its kernel of near blocks; the other one gains nothing there.
    return tiles.dense_near and (not tiles.specialized or takes_hopper_kernels(tiles, *tensors))


def specialized_kernels(tiles: KvOuterTiles, *tensors: Tensor) -> ModuleType | None:
    """`selected_hopper` if the tiles ask for it, and the device, Triton and the tensors allow it."""
    if not takes_hopper_kernels(tiles, *tensors):
        return None
    # Not every version of Triton has what it needs.
    from . import selected_hopper

    return selected_hopper


@triton.jit
def _pairs_of_rows(first_row, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Pair and head of the group of each row of a tile; rows are (pair, head of the group)."""
    lane = tl.arange(0, ROWS)
    if ROWS % GROUP == 0:
        # The same, as `first_row` is a multiple of ROWS, but most of it does not change from tile to tile.
        return first_row // GROUP + lane // GROUP, lane % GROUP
    return (first_row + lane) // GROUP, (first_row + lane) % GROUP


@triton.jit
def _tokens(pairs_ptr, first_row, num_rows, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Token of each row of a tile, 0 for rows that are not there. Unsigned, so that offsets cost one instruction."""
    pair, _ = _pairs_of_rows(first_row, GROUP, ROWS)
    mask = first_row + tl.arange(0, ROWS) < num_rows
    return tl.load(pairs_ptr + pair, mask=mask, other=0).to(tl.uint32)


@triton.jit
def _gather(
    x_ptr, token, first_row,
    STRIDE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, [ROWS, PADDED]; rows that are not there hold those of token 0."""
    _, g = _pairs_of_rows(first_row, GROUP, ROWS)
    offs = tl.arange(0, PADDED)[None, :]
    x_ptrs = (x_ptr + (g * DIM)[:, None] + offs) + (token.to(tl.int64) * STRIDE)[:, None]
    if PADDED == DIM:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=(token >= 0)[:, None] & (offs < DIM), other=0.0)


@triton.jit
def _first_viewer(key, key_end, ahead):
    """The first query of the sequence's own that sees each key of a tile; none sees those that are not of the block.

    One before the first query of the sequence stands for all of them. `ahead` is that of `keys_ahead`.
    """
    return tl.where(key < key_end, key - ahead, 2147483647)


@triton.jit
def _hide(x, token, first_viewer, other):
    """`x` [ROWS, KEYS], but `other` where the token of the row does not see the key.

    All tiles pay for the comparison, though only the first ones of a bucket need it: a branch is compiled into
    predicates, which cost three times as much.
    """
    return tl.where(first_viewer[None, :] <= token[:, None].to(tl.int32), x, other)


@triton.jit(do_not_specialize=["num_sequences", "num_blocks", "first_place", "places"])
def _selected_fwd_kv_outer_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    scale,
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The softmax of each (token, head, slot) over its block, normalised, with its lse.

    Grid: (segment of the chunk,); programs beyond the last segment leave.
    Owns: the partial results of its pairs, by plain stores.
    Invariant: after n steps, the rows of the first n tiles are stored.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    PADDED_K: tl.constexpr = padded_dim(DIM_K)
    PADDED_V: tl.constexpr = padded_dim(DIM_V)
    first_pair, in_chunk, pairs, bucket = segment_of_program(segments_ptr, segment_ends_ptr, first_place, places)[:4]
    if pairs == 0:
        return
    head = bucket // num_blocks
    key_start, key_end, ahead = keys_of_bucket(
        bucket % num_blocks, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    key = key_start + tl.arange(0, KEYS)
    k_rows = key.to(tl.int64) * STRIDE_K + head * DIM_K
    v_rows = key.to(tl.int64) * STRIDE_V + head * DIM_V
    k = load_rows(k_ptr, k_rows, key < key_end, DIM_K, PADDED_K)  # [KEYS, DK]
    v = load_rows(v_ptr, v_rows, key < key_end, DIM_V, PADDED_V)  # [KEYS, DV]
    num_rows = pairs * GROUP
    first_viewer = _first_viewer(key, key_end, ahead)
    q_head_ptr = q_ptr + head * (GROUP * DIM_K)
    partial_ptr += in_chunk.to(tl.int64) * (GROUP * DIM_V)
    partial_lse_ptr += in_chunk.to(tl.int64) * GROUP
    token_next = _tokens(pairs_ptr + first_pair, 0, num_rows, GROUP, ROWS)
    for first_row in tl.range(0, num_rows, ROWS, num_stages=STAGES):
        # Loaded one step ahead, as the rows of q cannot be asked for before their tokens are there.
        token = token_next
        token_next = _tokens(pairs_ptr + first_pair, first_row + ROWS, num_rows, GROUP, ROWS)
        q = _gather(q_head_ptr, token, first_row, STRIDE_Q, GROUP, DIM_K, PADDED_K, ROWS)  # [ROWS, DK]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = _hide(scores, token, first_viewer, -float("inf"))
        # The first key of a block is visible to all of its rows, so that no maximum is -inf.
        largest = tl.max(scores, 1) * scale
        p = exp_shifted(scores, scale, largest, EXACT)
        total = tl.sum(p, 1)
        if BLOCK_SIZE > KEYS:
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
            for first_key in tl.range(KEYS, BLOCK_SIZE, KEYS):
                more = first_key + key
                k_more = load_rows(k_ptr, k_rows + first_key * STRIDE_K, more < key_end, DIM_K, PADDED_K)
                v_more = load_rows(v_ptr, v_rows + first_key * STRIDE_V, more < key_end, DIM_V, PADDED_V)
                scores = tl.dot(q, tl.trans(k_more), input_precision="ieee")
                scores = _hide(scores, token, _first_viewer(more, key_end, ahead), -float("inf"))
                larger = tl.maximum(largest, tl.max(scores, 1) * scale)
                p = exp_shifted(scores, scale, larger, EXACT)
                shrink = tl.exp2((largest - larger) * LOG2_E)
                total = total * shrink + tl.sum(p, 1)
                out = tl.dot(p.to(v.dtype), v_more, out * shrink[:, None], input_precision="ieee")
                largest = larger
            out = out * (1.0 / total)[:, None]
        else:
            p = p * (1.0 / total)[:, None]
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        row = first_row + tl.arange(0, ROWS)
        mask = row < num_rows
        store_rows(partial_ptr, row.to(tl.int64) * DIM_V, mask, out, DIM_V, PADDED_V, STREAMED=True)
        tl.store(partial_lse_ptr + row, largest + tl.log2(total) * LN_2, mask=mask)


def launch_selected_bwd_kv_outer(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    index: InvertedIndex,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    tiles: KvOuterTiles,
    dq: Tensor | None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, and of q into `dq` if there is one; `shift` and `delta` are those of `launch_shifts`.

    Bounds are as for `build_index`. Every sum runs in an order that the inverted index fixes, so results are bitwise
    equal from run to run.
    """
    (total_tokens, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    group, chunks, parts = num_heads // num_kv_heads, index.chunks, triton.cdiv(block_size, tiles.keys)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    partial = q.new_empty(chunks.pairs * group * parts if dq is not None else 1, dim_k)
    sums_of: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    most_tiles = index.most_tiles(tiles.segment_pairs)
    dk_tiles = torch.empty(most_tiles, parts * tiles.keys, dim_k, **sums_of)
    dv_tiles = torch.empty(most_tiles, parts * tiles.keys, dim_v, **sums_of)
    # Chunks of tokens add up, in float32 if that is not too much: two numbers of fewer bits take the kernel longer.
    many = chunks.token_chunks > 1
    sums = k.shape[0] * chunks.heads * (dim_k + dim_v)
    dtype = torch.uint8 if many and sums > FLOAT32_SUMS and k.dtype != torch.float32 else torch.float32
    key_bounds = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    dk_sum = k.new_empty((k.shape[0], chunks.heads, dim_k) if many else (1,), dtype=dtype)
    dv_sum = v.new_empty((k.shape[0], chunks.heads, dim_v) if many else (1,), dtype=dtype)
    specialized, descriptor = specialized_kernels(tiles, q, k, v, d_out), None
    if specialized and dq is not None:
        descriptor = specialized.tile_descriptor(partial, parts, 2 if tiles.keys == WIDE_KEYS else 1)
    elif tiles.specialized and tiles.keys == WIDE_KEYS and not specialized:
        # Of tensors that are not aligned.
        tiles = replace(tiles, **WIDE_TILES_OF_OTHERS)
    for segments in index.segments(tiles.segment_pairs):
        places = chunks.buckets * segments.classes
        for number, first_head, first_token, tokens in segments.chunks:
            grid = segments.most_of_chunk, parts
            last = int(first_token + tokens == total_tokens)
            given = q, k, v, d_out, shift, delta
            results = partial, dk_tiles, dv_tiles, dk_sum, dv_sum, dk, dv
            lists = index.pairs, segments.table, segments.ends, cu_seqlens, cu_seqlens_k
            blocks, number_here = (cu_seqlens.numel() - 1, chunks.num_blocks), number - segments.first_number
            common = *blocks, number_here * places, places
            share = first_head, chunks.heads, int(first_token > 0), last
            strides = q.stride(0), k.stride(0), v.stride(0), d_out.stride(0)
            if specialized:
                kernel, options = _backward_for_hopper(tiles.keys)
                kernel[grid](
                    *given, descriptor, *results, *lists, *common, *share, softmax_scale, *strides,
                    num_heads, group, dim_k, block_size, dq is not None, **options, **early_launch(),
                )  # fmt: skip
            else:
                _selected_bwd_kv_outer_kernel[grid](
                    *given, *results, *lists, *common, *share, softmax_scale, *strides, num_heads, group, dim_k, dim_v,
                    block_size, dq is not None, tiles.rows, tiles.keys, tiles.stages, **launch_options(tiles),
                )  # fmt: skip
            _sum_segments_kernel[(chunks.buckets, triton.cdiv(block_size, SUM_KEYS), 2)](
                dk_tiles, dv_tiles, dk_sum, dv_sum, dk, dv, segments.ends, key_bounds, *blocks,
                number_here * chunks.buckets, chunks.buckets, *share, segments.classes, segments.flat, softmax_scale,
                num_kv_heads, dim_k, dim_v, block_size, parts * tiles.keys, SUM_KEYS, **early_launch(),
            )  # fmt: skip
            if dq is not None:
                launch_merge(partial, None, index, dq, None, softmax_scale, first_head, first_token, tokens, parts)
    return dk, dv


def _forward_for_hopper(keys: int) -> tuple[Any, dict[str, int]]:
    """The kernel for blocks of so many keys, and how it is launched."""
    # Not every version of Triton has what they need.
    if keys == WIDE_KEYS:
        from . import selected_wide_hopper

        return selected_wide_hopper._selected_fwd_wide_hopper_kernel, selected_wide_hopper.OPTIONS
    from . import selected_hopper

    return selected_hopper._selected_fwd_hopper_kernel, selected_hopper.FORWARD_OPTIONS


def _backward_for_hopper(keys: int) -> tuple[Any, dict[str, int]]:
    """The kernel for parts of so many keys, and how it is launched."""
    # Not every version of Triton has what they need.
    if keys == WIDE_KEYS:
        from . import selected_wide_hopper

        return selected_wide_hopper._selected_bwd_wide_hopper_kernel, selected_wide_hopper.OPTIONS
    from . import selected_hopper

    return selected_hopper._selected_bwd_hopper_kernel, selected_hopper.BACKWARD_OPTIONS


SUM_KEYS = 16
# Elements of dK and dV of a chunk's heads, up to which the sums over chunks of tokens are float32: 131,072 tokens and
# one head of 128.
FLOAT32_SUMS = 1 << 25


@triton.jit(
    do_not_specialize=[
        "num_sequences", "num_blocks", "first_place", "places", "first_head", "chunk_heads", "add", "last"
    ]
)  # fmt: skip
def _selected_bwd_kv_outer_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    shift_ptr,
    delta_ptr,
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
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WITH_DQ: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of a segment, and dQ of each (token, head, slot) before `softmax_scale`.

    Grid: (segment of the chunk, part of its block); programs beyond the last segment leave.
    Owns: by plain stores, the partial dQ of its pairs, and its tile of dk and dv; or, if it is alone in its bucket, the
        gradients of the keys.
    Invariant: after n steps, dk and dv are the sums over the first n tiles of rows.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    PADDED_K: tl.constexpr = padded_dim(DIM_K)
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    PADDED_V: tl.constexpr = padded_dim(DIM_V)
    first_pair, in_chunk, pairs, bucket, tile = segment_of_program(segments_ptr, segment_ends_ptr, first_place, places)
    if pairs == 0:
        return
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    head = bucket // num_blocks
    block_start, key_end, ahead = keys_of_bucket(
        bucket % num_blocks, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE
    )
    key = block_start + part * KEYS + tl.arange(0, KEYS)
    mask_keys = key < key_end
    k = load_rows(k_ptr, key.to(tl.int64) * STRIDE_K + head * DIM_K, mask_keys, DIM_K, PADDED_K)  # [KEYS, DK]
    v = load_rows(v_ptr, key.to(tl.int64) * STRIDE_V + head * DIM_V, mask_keys, DIM_V, PADDED_V)  # [KEYS, DV]
    dk = tl.zeros([KEYS, PADDED_K], tl.float32)
    dv = tl.zeros([KEYS, PADDED_V], tl.float32)
    num_rows = pairs * GROUP
    first_viewer = _first_viewer(key, key_end, ahead)
    q_head_ptr = q_ptr + head * (GROUP * DIM_K)
    do_head_ptr = d_out_ptr + head * (GROUP * DIM_V)
    partial_ptr += (in_chunk.to(tl.int64) * (GROUP * parts) + part) * DIM_K
    token_next = _tokens(pairs_ptr + first_pair, 0, num_rows, GROUP, ROWS)
    for first_row in tl.range(0, num_rows, ROWS, num_stages=STAGES):
        token = token_next
        token_next = _tokens(pairs_ptr + first_pair, first_row + ROWS, num_rows, GROUP, ROWS)
        q = _gather(q_head_ptr, token, first_row, STRIDE_Q, GROUP, DIM_K, PADDED_K, ROWS)  # [ROWS, DK]
        do = _gather(do_head_ptr, token, first_row, STRIDE_DO, GROUP, DIM_V, PADDED_V, ROWS)  # [ROWS, DV]
        row = first_row + tl.arange(0, ROWS)
        mask = row < num_rows
        _, g = _pairs_of_rows(first_row, GROUP, ROWS)
        at_q = token.to(tl.int64) * NUM_HEADS + head * GROUP + g
        # Rows that are not there have probability 0.
        shift = tl.load(shift_ptr + at_q, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + at_q, mask=mask, other=0.0)
        p = exp_below(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, shift[:, None], EXACT)
        p = _hide(p, token, first_viewer, 0.0)  # [ROWS, KEYS]
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        dv = tl.dot(tl.trans((p * lift(do.dtype)).to(do.dtype)), do, dv, input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
        if WITH_DQ:
            dq = tl.dot(ds, k, input_precision="ieee")  # [ROWS, DK]
            store_rows(partial_ptr, row.to(tl.int64) * (parts * DIM_K), mask, dq, DIM_K, PADDED_K, STREAMED=True)
    dv = dv / lift(q_ptr.dtype.element_ty)
    if tile >= 0:
        rows = (tile.to(tl.int64) * parts + part) * KEYS + tl.arange(0, KEYS)
        everywhere = tl.arange(0, KEYS) >= 0
        store_rows(dk_tiles_ptr, rows * DIM_K, everywhere, dk, DIM_K, PADDED_K)
        store_rows(dv_tiles_ptr, rows * DIM_V, everywhere, dv, DIM_V, PADDED_V)
    else:
        own = key, tl.arange(0, PADDED_K), mask_keys, head, first_head, chunk_heads, add, last, scale
        add_up(dk, dk_sum_ptr, dk_ptr, *own, HEADS, DIM_K)
        own = key, tl.arange(0, PADDED_V), mask_keys, head, first_head, chunk_heads, add, last, 1.0
        add_up(dv, dv_sum_ptr, dv_ptr, *own, HEADS, DIM_V)


@triton.jit
def _sum_tiles(
    tiles_ptr, sum_ptr, grad_ptr, begin, end, key, in_block, mask, head, first_head, chunk_heads, add, last, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, TILE_KEYS: tl.constexpr,
):  # fmt: skip
    """The sum of the tiles from `begin` to `end`, to where `add_up` stores it.

    Invariant: after n steps, `total` holds the first n tiles.
    """
    offs = tl.arange(0, padded_dim(DIM))
    total = tl.zeros([key.shape[0], offs.shape[0]], tl.float32)
    for tile in tl.range(begin, end):
        total += load_rows(tiles_ptr, (tile.to(tl.int64) * TILE_KEYS + in_block) * DIM, mask, DIM, offs.shape[0])
    add_up(
        total, sum_ptr, grad_ptr, key, offs, mask, head, first_head, chunk_heads, add, last, scale, HEADS, DIM
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "num_sequences", "num_blocks", "first_flat", "buckets", "first_head", "chunk_heads", "add", "last", "classes",
        "num_flat",
    ]
)  # fmt: skip
def _sum_segments_kernel(
    dk_tiles_ptr,
    dv_tiles_ptr,
    dk_sum_ptr,
    dv_sum_ptr,
    dk_ptr,
    dv_ptr,
    segment_ends_ptr,
    key_bounds_ptr,
    num_sequences,
    num_blocks,
    first_flat,
    buckets,
    first_head,
    chunk_heads,
    add,
    last,
    classes,
    num_flat,
    scale,
    HEADS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Sums the tiles of a bucket's segments, if it has several, or none; a lone one adds up by itself.

    Grid: (bucket of the chunk, tile of the keys of its block, dk or dv).
    Owns: dk or dv at its keys, and their sum, by plain stores.
    Invariant: after n steps, `segments` counts those of the first n classes.
    """
    wait_for_the_kernel_before(EARLY)
    bucket = tl.program_id(0)
    segments = 0
    for i in range(classes):
        last_flat = (first_flat // buckets * classes + i) * buckets + bucket
        segments += tl.load(segment_ends_ptr + last_flat)
        segments -= tl.load(segment_ends_ptr + last_flat - 1, mask=last_flat > 0, other=0)
    if segments == 1:
        return
    block_start, key_end, _ = block_bounds(bucket % num_blocks, key_bounds_ptr, num_sequences, BLOCK_SIZE)
    in_block = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    key = block_start + in_block
    mask = (in_block < BLOCK_SIZE) & (key < key_end)
    tile_ends_ptr = segment_ends_ptr + classes * num_flat
    end = tl.load(tile_ends_ptr + first_flat + bucket) - tl.load(tile_ends_ptr + first_flat - 1)
    head = first_head + bucket // num_blocks
    if tl.program_id(2) == 0:
        _sum_tiles(
            dk_tiles_ptr, dk_sum_ptr, dk_ptr, end - segments, end, key, in_block, mask, head, first_head, chunk_heads,
            add, last, scale, HEADS, DIM_K, TILE_KEYS,
        )  # fmt: skip
    else:
        _sum_tiles(
            dv_tiles_ptr, dv_sum_ptr, dv_ptr, end - segments, end, key, in_block, mask, head, first_head, chunk_heads,
            add, last, 1.0, HEADS, DIM_V, TILE_KEYS,
        )  # fmt: skip
