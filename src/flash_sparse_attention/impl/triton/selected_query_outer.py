"""Selected attention, queries in the outer loop (the NSA paper's order), forward and the gradient of q.

    program (token t, kv head)       Q: the G heads of its group, padded to 16 rows
        for block j of block_indices[t]:   K_j, V_j are loaded;   S = Q K_j^T;   running softmax

A block is read once for every token that selects it, but nothing is stored between kernels. The gradients of k and v
are sums over queries and come from the KV-outer kernel, without its share of dQ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import (
    LN_2,
    LOG2_E,
    bounds_of_keys,
    exp_below,
    exp_shifted,
    keys_ahead,
    load_rows,
    padded,
    padded_dim,
    positive_scale,
    sequence_of,
    store_rows,
)
from .tuning import QueryOuterTiles


def launch_selected_fwd_query_outer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    place: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    tiles: QueryOuterTiles,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out `[N, Hq, Dv]` and lse `[N, Hq]` (natural logarithm, float32). Bounds are as for `build_index`."""
    (total_tokens, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    out = q.new_empty(total_tokens, num_heads, dim_v)
    lse = q.new_empty(total_tokens, num_heads, dtype=torch.float32)
    group = num_heads // num_kv_heads
    q, softmax_scale = positive_scale(q, softmax_scale)
    _selected_fwd_query_outer_kernel[(total_tokens, num_kv_heads)](
        q, k, v, block_indices, place, cu_seqlens, cu_seqlens_k, out, lse,
        cu_seqlens.numel() - 1, q.stride(0), k.stride(0), v.stride(0), softmax_scale,
        num_kv_heads, group, padded(group), block_indices.shape[2], dim_k, dim_v, block_size,
        tiles.keys, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out, lse


def launch_selected_dq_query_outer(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    delta: Tensor,
    block_indices: Tensor,
    place: Tensor,
    cu_seqlens: Tensor,
    block_size: int,
    softmax_scale: float,
    tiles: QueryOuterTiles,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """The gradient of q; `shift` and `delta` are those of `launch_shifts`. Bounds are as for `build_index`."""
    (total_tokens, num_heads, dim_k), (_, num_kv_heads, dim_v) = q.shape, v.shape
    dq = q.new_empty(q.shape)
    group = num_heads // num_kv_heads
    _selected_dq_query_outer_kernel[(total_tokens, num_kv_heads)](
        q, k, v, d_out, shift, delta, block_indices, place, cu_seqlens, cu_seqlens_k, dq,
        cu_seqlens.numel() - 1, q.stride(0), k.stride(0), v.stride(0), d_out.stride(0),
        softmax_scale,
        num_kv_heads, group, padded(group), block_indices.shape[2], dim_k, dim_v, block_size,
        tiles.keys, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return dq


@triton.jit
def _key_bounds(token, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences):
    """First key of the sequence of a token in the pack, and one past that of the token itself."""
    sequence = sequence_of(token, cu_seqlens_ptr, num_sequences, 0)
    start = tl.load(bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr) + sequence)
    return start, token + keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr) + 1


@triton.jit
def _block_keys(i, slots_ptr, place_ptr, start, end, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Tokens of the i-th tile of keys of a selection, and which of them are there: blocks of the sequence in slots.

    A block of BLOCK_SIZE tokens takes ceil(BLOCK_SIZE / KEYS) tiles. A slot that is not valid has no keys.
    """
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    block = tl.load(slots_ptr + i // PARTS)
    counts = tl.load(place_ptr + i // PARTS) >= 0
    in_block = i % PARTS * KEYS + tl.arange(0, KEYS)
    key = start + tl.where(counts, block, 0) * BLOCK_SIZE + in_block
    return key, (key < end) & (in_block < BLOCK_SIZE) & counts


@triton.jit(do_not_specialize=["num_sequences"])
def _selected_fwd_query_outer_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    block_indices_ptr,
    place_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    lse_ptr,
    num_sequences,
    stride_q,
    stride_k,
    stride_v,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of the heads of a group of one token to its blocks, with a running softmax.

    Grid: (token, kv head): neighbouring programs read the same local blocks of one head.
    Owns: out and lse of the token and the group, by plain stores.
    Invariant: after n steps, `out`, `total` and `largest` are the softmax over the first n tiles of keys.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    PADDED_K: tl.constexpr = padded_dim(DIM_K)
    PADDED_V: tl.constexpr = padded_dim(DIM_V)
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    token = tl.program_id(0)
    head = tl.program_id(1)
    start, end = _key_bounds(token, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences)
    g = tl.arange(0, GROUP_PADDED)
    mask = g < GROUP
    q_rows = token.to(tl.int64) * stride_q + (head * GROUP + g) * DIM_K
    q = load_rows(q_ptr, q_rows, mask, DIM_K, PADDED_K)  # [G, DK]
    at = token.to(tl.int64) * HEADS + head
    largest = tl.full([GROUP_PADDED], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    out = tl.zeros([GROUP_PADDED, PADDED_V], tl.float32)
    for i in tl.range(0, SLOTS * PARTS, num_stages=STAGES):
        key, mask_keys = _block_keys(
            i, block_indices_ptr + at * SLOTS, place_ptr + at * SLOTS, start, end, BLOCK_SIZE, KEYS
        )
        k = load_rows(k_ptr, key.to(tl.int64) * stride_k + head * DIM_K, mask_keys, DIM_K, PADDED_K)  # [KEYS, DK]
        v = load_rows(v_ptr, key.to(tl.int64) * stride_v + head * DIM_V, mask_keys, DIM_V, PADDED_V)  # [KEYS, DV]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        products = tl.where(mask_keys[None, :], products, -float("inf"))
        larger = tl.maximum(largest, tl.max(products, 1) * scale)
        # A row that has seen no key keeps -inf, and any finite maximum serves it.
        finite = tl.where(larger == -float("inf"), 0.0, larger)
        p = exp_shifted(products, scale, finite, EXACT)
        shrink = tl.exp2((largest - finite) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = larger
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    row = token.to(tl.int64) * (HEADS * GROUP) + head * GROUP + g
    store_rows(out_ptr, row * DIM_V, mask, out, DIM_V, PADDED_V)
    tl.store(lse_ptr + row, largest + tl.log2(total) * LN_2, mask=mask)


@triton.jit(do_not_specialize=["num_sequences"])
def _selected_dq_query_outer_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    shift_ptr,
    delta_ptr,
    block_indices_ptr,
    place_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    dq_ptr,
    num_sequences,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ of the heads of a group of one token.

    Grid: (token, kv head).
    Owns: dq of the token and the group, by plain stores.
    Invariant: after n steps, `dq` is the sum over the first n tiles of keys.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    PADDED_K: tl.constexpr = padded_dim(DIM_K)
    PADDED_V: tl.constexpr = padded_dim(DIM_V)
    PARTS: tl.constexpr = (BLOCK_SIZE + KEYS - 1) // KEYS
    token = tl.program_id(0)
    head = tl.program_id(1)
    start, end = _key_bounds(token, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences)
    g = tl.arange(0, GROUP_PADDED)
    mask = g < GROUP
    q_rows = token.to(tl.int64) * stride_q + (head * GROUP + g) * DIM_K
    do_rows = token.to(tl.int64) * stride_do + (head * GROUP + g) * DIM_V
    q = load_rows(q_ptr, q_rows, mask, DIM_K, PADDED_K)  # [G, DK]
    do = load_rows(d_out_ptr, do_rows, mask, DIM_V, PADDED_V)  # [G, DV]
    row = token.to(tl.int64) * (HEADS * GROUP) + head * GROUP + g
    shift = tl.load(shift_ptr + row, mask=mask, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=mask, other=0.0)
    at = token.to(tl.int64) * HEADS + head
    dq = tl.zeros([GROUP_PADDED, PADDED_K], tl.float32)
    for i in tl.range(0, SLOTS * PARTS, num_stages=STAGES):
        key, mask_keys = _block_keys(
            i, block_indices_ptr + at * SLOTS, place_ptr + at * SLOTS, start, end, BLOCK_SIZE, KEYS
        )
        k = load_rows(k_ptr, key.to(tl.int64) * stride_k + head * DIM_K, mask_keys, DIM_K, PADDED_K)  # [KEYS, DK]
        v = load_rows(v_ptr, key.to(tl.int64) * stride_v + head * DIM_V, mask_keys, DIM_V, PADDED_V)  # [KEYS, DV]
        p = exp_below(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, shift[:, None], EXACT)
        p = tl.where(mask_keys[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    store_rows(dq_ptr, row * DIM_K, mask, dq * scale, DIM_K, PADDED_K)
