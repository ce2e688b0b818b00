"""Interval attention: query t attends to the keys [start(t), end(t)) of its sequence. Forward and backward.

    forward, dQ   program (tile of rows, kv head)    rows are (token, head of the group), so every group fills a tile
                      for tile of keys in [start of the first token, end of the last):   S = Q K^T;   running softmax
    dK, dV        program (tile of keys, kv head, share of its rows)
                      for tile of rows that see one of the keys:   S^T = K Q^T;   dV += P^T dO;   dK += dS^T Q

                 keys ->                          keys ->
        rows     ######            rows       ####
         |       ########           |           ####         # computed, masked at the edges only
         v       ##########         v             ####
              compressed                       window

Both passes are free of atomics, so results are bitwise equal from run to run.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    LN_2,
    LOG2_E,
    exp_below,
    exp_shifted,
    lift,
    load_rows,
    padded_dim,
    past_of,
    positive_scale,
    store_rows,
    tile_descriptor,
    tile_of_rows,
)
from .tuning import IntervalTiles, launch_options, takes_hopper_kernels


class IntervalSizes(NamedTuple):
    """Which keys a query sees, as in `geometry.Interval`, and the factor of the scores.

    Attributes:
        kernel_size, kernel_stride: of the windows that keys stand for; 1 and 1 for the tokens themselves.
        window_size: of the newest visible keys; 0 for no bound.
        softmax_scale: factor of the scores.
    """

    kernel_size: int
    kernel_stride: int
    window_size: int
    softmax_scale: float

    @classmethod
    def of(cls, kernel_size: int, kernel_stride: int, window_size: int, softmax_scale: float) -> IntervalSizes:
        """With a window of fewer keys than would overflow, which still is more than there are."""
        return cls(kernel_size, kernel_stride, min(window_size, MOST_TOKENS // kernel_stride), softmax_scale)


MOST_TOKENS = 2**30


def launch_interval_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    sizes: IntervalSizes,
    tiles: IntervalTiles,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out `[N, Hq, Dv]` and lse `[N, Hq]` (natural logarithm, float32).

    `key_bounds` int32 `[B + 1]` bounds the keys of the sequences as `cu_seqlens` bounds their queries, and
    `cu_seqlens_k` their tokens, of which the last ones have queries; None where all have.
    """
    (total_tokens, num_heads, dim_k), (total_keys, num_kv_heads, dim_v) = q.shape, v.shape
    group = num_heads // num_kv_heads
    out = q.new_empty(total_tokens, num_heads, dim_v)
    lse = q.new_empty(total_tokens, num_heads, dtype=torch.float32)
    q, softmax_scale = positive_scale(q, sizes.softmax_scale)
    num_sequences = cu_seqlens.numel() - 1
    enough = group > 1 if sizes.window_size > 0 else total_keys >= LEAST_HOPPER_KEYS
    if enough and (specialized := _specialized_kernels(tiles, q, k, v)):
        rows = total_tokens * group // specialized.FORWARD_ROWS + num_sequences
        specialized._interval_fwd_hopper_kernel[rows, num_kv_heads](
            q, k, v, *specialized.key_descriptors(k, v), cu_seqlens, key_bounds, cu_seqlens_k, out, lse,
            num_sequences, softmax_scale, q.stride(0), k.stride(0), v.stride(0), num_heads, group, dim_k, *sizes[:3],
            **specialized.FORWARD_OPTIONS,
        )  # fmt: skip
        return out, lse
    _interval_fwd_kernel[(total_tokens * group // tiles.rows + num_sequences, num_kv_heads)](
        q, k, v, *_descriptors(k, v, sizes, tiles), cu_seqlens, key_bounds, cu_seqlens_k, out, lse,
        num_sequences, softmax_scale,
        q.stride(0), k.stride(0), v.stride(0), num_heads, group, dim_k, dim_v,
        *sizes[:3], tiles.rows, tiles.keys, tiles.stages, **launch_options(tiles),
    )  # fmt: skip
    return out, lse


def launch_interval_dq(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    sizes: IntervalSizes,
    tiles: IntervalTiles,
    dq: Tensor,
    add: bool = False,
    cu_seqlens_k: Tensor | None = None,
) -> None:
    """The gradient of q into `dq`, `[N, Hq, Dk]`, or added to what is there.

    `shift` and `delta` are those of `launch_shifts`, and bounds are as for `launch_interval_fwd`.
    """
    (total_tokens, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    group, num_sequences = num_heads // num_kv_heads, cu_seqlens.numel() - 1
    if specialized := _specialized_kernels(tiles, q, k, v, d_out):
        rows = total_tokens * group // specialized.BACKWARD_ROWS + num_sequences
        specialized._interval_dq_hopper_kernel[rows, num_kv_heads](
            q, k, v, *specialized.key_descriptors(k, v), d_out, shift, delta, cu_seqlens, key_bounds, cu_seqlens_k,
            dq, num_sequences, sizes.softmax_scale, q.stride(0), k.stride(0), v.stride(0), d_out.stride(0),
            num_heads, group, dim_k, *sizes[:3], add, **specialized.BACKWARD_OPTIONS,
        )  # fmt: skip
        return
    _interval_dq_kernel[(total_tokens * group // tiles.rows + num_sequences, num_kv_heads)](
        q, k, v, *_descriptors(k, v, sizes, tiles), d_out, shift, delta, cu_seqlens, key_bounds, cu_seqlens_k,
        dq, num_sequences, sizes.softmax_scale,
        q.stride(0), k.stride(0), v.stride(0), d_out.stride(0), num_heads, group, dim_k, dim_v,
        *sizes[:3], add, tiles.rows, tiles.keys, tiles.stages, **launch_options(tiles),
    )  # fmt: skip


def launch_interval_dkv(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    key_bounds: Tensor,
    sizes: IntervalSizes,
    tiles: IntervalTiles,
    cu_seqlens_k: Tensor | None = None,
    add_to: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v, in their dtypes; `shift` and `delta` are those of `launch_shifts`.

    They are added to those in `add_to`, in place, if there are any. Bounds are as for `launch_interval_fwd`.
    """
    (num_keys, num_kv_heads, dim_k), dim_v, num_heads = k.shape, v.shape[2], q.shape[1]
    group, num_sequences = num_heads // num_kv_heads, cu_seqlens.numel() - 1
    specialized = _specialized_kernels(tiles, q, k, v, d_out)
    key_tiles = num_keys // (specialized.BACKWARD_ROWS if specialized else tiles.keys) + num_sequences
    elements = num_keys * num_kv_heads * (dim_k + dim_v)
    shares = _shares(key_tiles * num_kv_heads, elements, sizes.window_size > 0, specialized is not None)
    dk, dv = add_to or (k.new_empty(k.shape), v.new_empty(v.shape))
    dk_parts, dv_parts = dk, dv
    if shares > 1:
        dk_parts, dv_parts = (x.new_empty(shares, *x.shape, dtype=torch.float32) for x in (k, v))
    grid, add = (key_tiles, num_kv_heads, shares), add_to is not None and shares == 1
    given = q, k, v, d_out, shift, delta, cu_seqlens, key_bounds, cu_seqlens_k, dk_parts, dv_parts
    common = num_sequences, num_keys, sizes.softmax_scale
    strides = q.stride(0), k.stride(0), v.stride(0), d_out.stride(0)
    if specialized:
        specialized._interval_dkv_hopper_kernel[grid](
            *given, *common, *strides, num_heads, group, dim_k, *sizes[:3], add, **specialized.BACKWARD_OPTIONS
        )
    else:
        _interval_dkv_kernel[grid](
            *given, *common, *strides, num_heads, group, dim_k, dim_v, *sizes[:3], add,
            tiles.rows, tiles.keys, tiles.stages, **launch_options(tiles),
        )  # fmt: skip
    if shares > 1:
        for grad, parts in ((dk, dk_parts), (dv, dv_parts)):
            total = torch.sum(parts, 0, dtype=torch.float32)
            grad.copy_(total if add_to is None else total.add_(grad))
    return dk, dv


# Compressed keys from which the forward kernel for Hopper is the faster one; H200, 32/8 heads of 128, ms, it and the
# other: 511 keys (8,192 tokens) 0.129, 0.134; 4,095 keys 3.76, 4.25. Its tiles of 192 rows reach far where each row has
# a window of its own: 4/4 heads, 65,536 tokens, 0.265, 0.239.
LEAST_HOPPER_KEYS = 500


def _specialized_kernels(tiles: IntervalTiles, *tensors: Tensor) -> ModuleType | None:
    """`interval_hopper` if the tiles ask for it, and the device, Triton and the tensors allow it."""
    # Nothing has no descriptor.
    if not all(x.numel() for x in tensors) or not takes_hopper_kernels(tiles, *tensors):
        return None
    # Not every version of Triton has what it needs.
    from . import interval_hopper

    return interval_hopper


def _descriptors(k: Tensor, v: Tensor, sizes: IntervalSizes, tiles: IntervalTiles):
    """Descriptors of k and v, if both are possible and there are tiles that need no mask.

    Those that need one go without: what lies behind the last key may be anything, and 0 times NaN is NaN.
    """
    both = tile_descriptor(k, tiles.keys), tile_descriptor(v, tiles.keys)
    return (None, None) if sizes.window_size > 0 or None in both else both


# Programs of the dK, dV kernel: enough to fill a device several times, as those of late keys have little to do. Each
# share of the rows costs a float32 copy of both gradients.
DKV_PROGRAMS, MOST_SHARES, SHARE_ELEMENTS = 1024, 32, 1 << 26
LONG_SHARES = 8


def _shares(programs: int, elements: int, windowed: bool, specialized: bool = False) -> int:
    """Into how many parts the rows of a tile of keys are cut."""
    wanted = triton.cdiv(DKV_PROGRAMS, programs)
    if not windowed:
        # The rows of a share should fit caches too, as programs of many keys read them at once. H200, 32/8 heads of
        # 128, ms: at 65,536 tokens 13.3 with 1 share, 10.5 with 2, 9.8 with 4, 9.4 with 8; at 8,192 tokens 0.29 with 7,
        # 0.33 with 26, of which copies take more.
        wanted = min(triton.cdiv(2 * DKV_PROGRAMS, programs), LONG_SHARES)
        wanted = max(wanted, triton.cdiv(DKV_PROGRAMS // 4, programs))
    elif specialized:
        # Half the programs, which load ahead.
        wanted = triton.cdiv(DKV_PROGRAMS // 4, programs)
    return max(1, min(wanted, SHARE_ELEMENTS // max(elements, 1), MOST_SHARES))


@triton.jit
def interval_end(token, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """geometry.Interval.end"""
    # Division truncates: the numerator is at least 0 wherever the result is.
    return tl.maximum((token + 1 - KERNEL_SIZE + KERNEL_STRIDE) // KERNEL_STRIDE, 0)


@triton.jit
def _start(end, WINDOW: tl.constexpr):
    """geometry.Interval.start, from its end; WINDOW 0 stands for no bound."""
    if WINDOW == 0:
        return end * 0
    return tl.maximum(end - WINDOW, 0)


@triton.jit
def _last_token(key, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """geometry.Interval.last_token: the first query that sees the key."""
    return key * KERNEL_STRIDE + KERNEL_SIZE - 1


@triton.jit
def _visible(key, start, end, WINDOW: tl.constexpr):
    """Which keys lie in the intervals; shapes broadcast."""
    if WINDOW == 0:
        return key < end
    return (key >= start) & (key < end)


@triton.jit
def _key_range(
    first_row, num_rows, past, GROUP: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys that a tile of rows sees: the first, the first of those in tiles that need a mask, and one past the last.

    All tiles of a window are masked: it has few.
    """
    newest_row = tl.minimum(first_row + ROWS, num_rows) - 1
    last = interval_end(past + newest_row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    seen_by_all = interval_end(past + first_row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    first = _start(seen_by_all, WINDOW)
    masked = first
    if WINDOW == 0:
        masked = seen_by_all // KEYS * KEYS
    return first, masked, last


@triton.jit
def _load_keys(
    k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, last,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Numbers of a tile of keys [KEYS], the keys [KEYS, DK] and their values [KEYS, DV]; 0 from `last` on if MASKED."""
    key = first_key + tl.arange(0, KEYS)
    if (k_desc is not None) and not MASKED:
        k = k_desc.load([key_start + first_key, head * DIM_K])
        v = v_desc.load([key_start + first_key, head * DIM_V])
    else:
        there = None
        if MASKED:
            there = key < last
        k = load_rows(k_ptr, key.to(tl.int64) * STRIDE_K, there, DIM_K, padded_dim(DIM_K))
        v = load_rows(v_ptr, key.to(tl.int64) * STRIDE_V, there, DIM_V, padded_dim(DIM_V))
    return key, k, v


@triton.jit
def _softmax_step(
    q, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, out, total, largest, scale,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys enters a running softmax."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    key, k, v = _load_keys(
        k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, last, STRIDE_K, STRIDE_V, DIM_K, DIM_V, KEYS, MASKED
    )
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS]
    if MASKED:
        scores = tl.where(_visible(key[None, :], start[:, None], end[:, None], WINDOW), scores, -float("inf"))
    larger = tl.maximum(largest, tl.max(scores, 1) * scale)
    finite = larger
    if MASKED:
        # A row that has seen no key keeps -inf, and any finite maximum serves it.
        finite = tl.where(larger == -float("inf"), 0.0, larger)
    p = exp_shifted(scores, scale, finite, EXACT)
    shrink = tl.exp2((largest - finite) * LOG2_E)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, total, larger


@triton.jit(do_not_specialize=["num_sequences"])
def _interval_fwd_kernel(
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
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a tile of rows to the keys that they see.

    Grid: (tile of rows of the pack, last first, as those see the most keys; kv head).
    Owns: out and lse of its rows, by plain stores.
    Invariant: after n steps, `out`, `total` and `largest` are the softmax over the first n tiles of keys.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence, token_start, length, first_row = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, GROUP, ROWS)
    num_rows = length * GROUP
    if first_row >= num_rows:
        return
    row = first_row + tl.arange(0, ROWS)
    mask = row < num_rows
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    end = interval_end(past + row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    start = _start(end, WINDOW)
    token = (token_start + row // GROUP).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    q = load_rows(q_ptr, token * STRIDE_Q + q_head * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    key_start = tl.load(key_bounds_ptr + sequence)
    k_ptr += key_start.to(tl.int64) * STRIDE_K + head * DIM_K
    v_ptr += key_start.to(tl.int64) * STRIDE_V + head * DIM_V
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, padded_dim(DIM_V)], tl.float32)
    first, masked, last = _key_range(first_row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS, KEYS)
    if WINDOW == 0:
        for first_key in tl.range(first, masked, KEYS, num_stages=STAGES):
            out, total, largest = _softmax_step(
                q, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, out, total, largest,
                scale, STRIDE_K, STRIDE_V, DIM_K, DIM_V, WINDOW, KEYS, False,
            )  # fmt: skip
    for first_key in tl.range(masked, last, KEYS, num_stages=STAGES):
        out, total, largest = _softmax_step(
            q, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, out, total, largest, scale,
            STRIDE_K, STRIDE_V, DIM_K, DIM_V, WINDOW, KEYS, True,
        )  # fmt: skip
    out = out * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    at = token * NUM_HEADS + q_head
    store_rows(out_ptr, at * DIM_V, mask, out, DIM_V, padded_dim(DIM_V))
    tl.store(lse_ptr + at, largest + tl.log2(total) * LN_2, mask=mask)


@triton.jit
def _dq_step(
    q, do, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, shift, delta, dq, scale,
    STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, DIM_K: tl.constexpr, DIM_V: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to dQ, before the scale of the scores."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    key, k, v = _load_keys(
        k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, last, STRIDE_K, STRIDE_V, DIM_K, DIM_V, KEYS, MASKED
    )
    p = exp_below(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, shift[:, None], EXACT)  # [ROWS, KEYS]
    if MASKED:
        p = tl.where(_visible(key[None, :], start[:, None], end[:, None], WINDOW), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["num_sequences"])
def _interval_dq_kernel(
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
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ of a tile of rows.

    Grid: (tile of rows of the pack, last first; kv head).
    Owns: dq of its rows, by plain stores.
    Invariant: after n steps, `dq` is the sum over the first n tiles of keys.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence, token_start, length, first_row = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, GROUP, ROWS)
    num_rows = length * GROUP
    if first_row >= num_rows:
        return
    row = first_row + tl.arange(0, ROWS)
    mask = row < num_rows
    past = past_of(sequence, token_start, cu_seqlens_ptr, cu_seqlens_k_ptr)
    end = interval_end(past + row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
    start = _start(end, WINDOW)
    token = (token_start + row // GROUP).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    at = token * NUM_HEADS + q_head
    q = load_rows(q_ptr, token * STRIDE_Q + q_head * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    do = load_rows(d_out_ptr, token * STRIDE_DO + q_head * DIM_V, mask, DIM_V, padded_dim(DIM_V))  # [ROWS, DV]
    shift = tl.load(shift_ptr + at, mask=mask, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=mask, other=0.0)
    key_start = tl.load(key_bounds_ptr + sequence)
    k_ptr += key_start.to(tl.int64) * STRIDE_K + head * DIM_K
    v_ptr += key_start.to(tl.int64) * STRIDE_V + head * DIM_V
    dq = tl.zeros([ROWS, padded_dim(DIM_K)], tl.float32)
    first, masked, last = _key_range(first_row, num_rows, past, GROUP, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS, KEYS)
    if WINDOW == 0:
        for first_key in tl.range(first, masked, KEYS, num_stages=STAGES):
            dq = _dq_step(
                q, do, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, shift, delta, dq,
                scale, STRIDE_K, STRIDE_V, DIM_K, DIM_V, WINDOW, KEYS, False,
            )  # fmt: skip
    for first_key in tl.range(masked, last, KEYS, num_stages=STAGES):
        dq = _dq_step(
            q, do, k_ptr, v_ptr, k_desc, v_desc, key_start, head, first_key, start, end, last, shift, delta, dq, scale,
            STRIDE_K, STRIDE_V, DIM_K, DIM_V, WINDOW, KEYS, True,
        )  # fmt: skip
    dq *= scale
    if ADD:
        dq += load_rows(dq_ptr, at * DIM_K, mask, DIM_K, padded_dim(DIM_K)).to(tl.float32)
    store_rows(dq_ptr, at * DIM_K, mask, dq, DIM_K, padded_dim(DIM_K))


@triton.jit
def _shift_and_delta(
    shift_ptr, delta_ptr, first_row, rows_end, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Both of a tile of rows; those that are not there have probability 0."""
    row = first_row + tl.arange(0, ROWS)
    at = (row // GROUP).to(tl.int64) * NUM_HEADS + row % GROUP
    mask = row < rows_end
    return tl.load(shift_ptr + at, mask=mask, other=float("inf")), tl.load(delta_ptr + at, mask=mask, other=0.0)


@triton.jit
def _dkv_step(
    k, v, q_ptr, d_out_ptr, shift, delta, first_row, rows_end, past, key, dk, dv, scale,
    STRIDE_Q: tl.constexpr, STRIDE_DO: tl.constexpr, GROUP: tl.constexpr,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What a tile of rows adds to dK (before the scale of the scores) and dV."""
    EXACT: tl.constexpr = k.dtype == tl.float32
    row = first_row + tl.arange(0, ROWS)
    mask = row < rows_end
    token = (row // GROUP).to(tl.int64)
    g = row % GROUP
    q = load_rows(q_ptr, token * STRIDE_Q + g * DIM_K, mask, DIM_K, padded_dim(DIM_K))  # [ROWS, DK]
    do = load_rows(d_out_ptr, token * STRIDE_DO + g * DIM_V, mask, DIM_V, padded_dim(DIM_V))  # [ROWS, DV]
    products = tl.dot(k, tl.trans(q), input_precision="ieee")  # [KEYS, ROWS]
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    p = exp_below(products, scale, shift[None, :], EXACT)
    if MASKED:
        end = interval_end(past + row // GROUP, KERNEL_SIZE, KERNEL_STRIDE)
        p = tl.where(_visible(key[:, None], _start(end, WINDOW)[None, :], end[None, :], WINDOW), p, 0.0)
    dv = tl.dot((p * lift(do.dtype)).to(do.dtype), do, dv, input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["num_sequences", "num_keys"])
def _interval_dkv_kernel(
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
    STRIDE_Q: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_DO: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of a tile of keys, over a share of the rows that see one of them.

    Grid: (tile of keys of the pack, first keys first, as most queries see them; kv head; share of the rows).
    Owns: dk and dv of its keys and share, by plain stores.
    Invariant: after n steps, `dk` and `dv` are the sums over the first n tiles of rows of the share.
    """
    HEADS: tl.constexpr = NUM_HEADS // GROUP
    head = tl.program_id(1)
    share = tl.program_id(2)
    sequence, key_start, keys_of_sequence, first_key = tile_of_rows(
        tl.program_id(0), key_bounds_ptr, num_sequences, 1, KEYS
    )
    if first_key >= keys_of_sequence:
        return
    key = first_key + tl.arange(0, KEYS)
    mask_keys = key < keys_of_sequence
    key_in_pack = (key_start + key).to(tl.int64)
    k = load_rows(k_ptr, key_in_pack * STRIDE_K + head * DIM_K, mask_keys, DIM_K, padded_dim(DIM_K))  # [KEYS, DK]
    v = load_rows(v_ptr, key_in_pack * STRIDE_V + head * DIM_V, mask_keys, DIM_V, padded_dim(DIM_V))  # [KEYS, DV]
    token_start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - token_start.to(tl.int32)
    past = past_of(sequence, token_start.to(tl.int32), cu_seqlens_ptr, cu_seqlens_k_ptr)
    last_key = tl.minimum(first_key + KEYS, keys_of_sequence) - 1
    rows_start = (_last_token(first_key, KERNEL_SIZE, KERNEL_STRIDE) - past) * GROUP
    tokens_end = length
    if WINDOW > 0:
        # The first query that does not see the last key any more is the first to see the one WINDOW keys later.
        tokens_end = tl.minimum(length, _last_token(last_key + WINDOW, KERNEL_SIZE, KERNEL_STRIDE) - past)
    rows_end = tokens_end * GROUP
    if cu_seqlens_k_ptr is not None:
        # A key of the past is seen from the first query on, or by none: windows end, and a sequence may lack queries.
        rows_start = tl.maximum(rows_start, 0)
        rows_end = tl.maximum(rows_end, rows_start)
    steps = tl.cdiv(tl.cdiv(rows_end - rows_start, ROWS), tl.num_programs(2))
    rows_start += share * steps * ROWS
    rows_end = tl.minimum(rows_end, rows_start + steps * ROWS)
    # Rows from here on see all keys of the tile.
    unmasked = rows_end
    if WINDOW == 0:
        see_all = (_last_token(last_key, KERNEL_SIZE, KERNEL_STRIDE) - past) * GROUP
        unmasked = tl.maximum(rows_start + tl.cdiv(tl.maximum(see_all - rows_start, 0), ROWS) * ROWS, rows_start)
        unmasked = tl.minimum(unmasked, rows_end)
    q_ptr += token_start * STRIDE_Q + head * (GROUP * DIM_K)
    d_out_ptr += token_start * STRIDE_DO + head * (GROUP * DIM_V)
    shift_ptr += token_start * NUM_HEADS + head * GROUP
    delta_ptr += token_start * NUM_HEADS + head * GROUP
    dk = tl.zeros([KEYS, padded_dim(DIM_K)], tl.float32)
    dv = tl.zeros([KEYS, padded_dim(DIM_V)], tl.float32)
    # Loaded one step ahead: no matrix unit takes them, so they are not among the loads that Triton issues early.
    shift_next, delta_next = _shift_and_delta(shift_ptr, delta_ptr, rows_start, rows_end, NUM_HEADS, GROUP, ROWS)
    for first_row in tl.range(rows_start, unmasked, ROWS, num_stages=STAGES):
        shift, delta = shift_next, delta_next
        shift_next, delta_next = _shift_and_delta(
            shift_ptr, delta_ptr, first_row + ROWS, rows_end, NUM_HEADS, GROUP, ROWS
        )
        dk, dv = _dkv_step(
            k, v, q_ptr, d_out_ptr, shift, delta, first_row, rows_end, past, key, dk, dv, scale, STRIDE_Q, STRIDE_DO,
            GROUP, DIM_K, DIM_V, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS, True,
        )  # fmt: skip
    if WINDOW == 0:
        for first_row in tl.range(unmasked, rows_end, ROWS, num_stages=STAGES):
            shift, delta = shift_next, delta_next
            shift_next, delta_next = _shift_and_delta(
                shift_ptr, delta_ptr, first_row + ROWS, rows_end, NUM_HEADS, GROUP, ROWS
            )
            dk, dv = _dkv_step(
                k, v, q_ptr, d_out_ptr, shift, delta, first_row, rows_end, past, key, dk, dv, scale, STRIDE_Q,
                STRIDE_DO, GROUP, DIM_K, DIM_V, KERNEL_SIZE, KERNEL_STRIDE, WINDOW, ROWS, False,
            )  # fmt: skip
    at = (share.to(tl.int64) * num_keys + key_in_pack) * HEADS + head
    dk *= scale
    dv = dv / lift(q_ptr.dtype.element_ty)
    if ADD:
        dk += load_rows(dk_ptr, at * DIM_K, mask_keys, DIM_K, padded_dim(DIM_K)).to(tl.float32)
        dv += load_rows(dv_ptr, at * DIM_V, mask_keys, DIM_V, padded_dim(DIM_V)).to(tl.float32)
    store_rows(dk_ptr, at * DIM_K, mask_keys, dk, DIM_K, padded_dim(DIM_K))
    store_rows(dv_ptr, at * DIM_V, mask_keys, dv, DIM_V, padded_dim(DIM_V))
