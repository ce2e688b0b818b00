"""The writing of a cache: keys and values go to their places in pages, windows that became full are put together."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...types import Place
from .primitives import dense_rows, on_its_device, padded


@on_its_device
def _launch_store(
    k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, place: Place, cos: Tensor | None, sin: Tensor | None
) -> None:
    count, heads, dim_k = k.shape
    k, v = dense_rows(k), dense_rows(v)
    _store_pair_kernel[(count, heads)](
        k, v, cos, sin, place.page, place.row, place.exists, k_pool, v_pool,
        k.stride(0), v.stride(0), k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
        dim_k, v.shape[2], padded(dim_k), padded(v.shape[2]),
    )  # fmt: skip


def store_rows(
    pools: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], place: Place, by: tuple[Tensor, Tensor] | None
) -> None:
    """As `functional.store_rows`; a token's heads are adjacent in all of them."""
    if len(rows[0]):
        _launch_store(*rows, *pools, place, *(by or (None, None)))


@on_its_device
def _launch_gather(
    k_new: Tensor, v_new: Tensor, k_tail: Tensor, v_tail: Tensor, tail: Place, new: Tensor, is_new: Tensor
) -> tuple[Tensor, Tensor]:
    count, heads, dim_k = new.numel(), *k_new.shape[1:]
    k_new, v_new = dense_rows(k_new), dense_rows(v_new)
    k, v = k_new.new_empty(count, heads, dim_k), v_new.new_empty(count, heads, v_new.shape[2])
    _gather_pair_kernel[(count, heads)](
        k_new, v_new, k_tail, v_tail, tail.page, tail.row, new, is_new, k, v,
        k_new.stride(0), v_new.stride(0), k_tail.stride(0), k_tail.stride(1), v_tail.stride(0), v_tail.stride(1),
        heads, dim_k, v.shape[2], padded(dim_k), padded(v.shape[2]),
    )  # fmt: skip
    return k, v


def gather_windows(
    tails: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], tail: Place, new: Tensor, is_new: Tensor
) -> tuple[Tensor, Tensor]:
    """As `functional.gather_windows`."""
    return _launch_gather(*rows, *tails, tail, new, is_new)


@triton.jit
def _store_pair_kernel(
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    page_ptr,
    row_ptr,
    exists_ptr,
    k_pool_ptr,
    v_pool_ptr,
    k_stride,
    v_stride,
    k_page_stride,
    k_row_stride,
    v_page_stride,
    v_row_stride,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Copies a key and a value to their place; the key is rotated first, where `cos_ptr` `[N, DIM_K / 2]` is given.

    Grid: (row, kv head).
    Owns: this head of the row's place, if it has one.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exists = tl.load(exists_ptr + number) != 0
    page, row = tl.load(page_ptr + number), tl.load(row_ptr + number)
    offs = tl.arange(0, PADDED_K)
    mask = (offs < DIM_K) & exists
    k_row = k_ptr + number * k_stride + head * DIM_K
    key = tl.load(k_row + offs, mask=mask)
    if cos_ptr is not None:
        # rotary.rotate: channel c turns together with channel c + D / 2.
        HALF: tl.constexpr = DIM_K // 2
        is_first = offs < HALF
        pair = tl.where(is_first, offs, offs - HALF)
        cos, sin = (
            tl.load(cos_ptr + number * HALF + pair, mask=mask),
            tl.load(sin_ptr + number * HALF + pair, mask=mask),
        )
        other = tl.load(k_row + tl.where(is_first, offs + HALF, offs - HALF), mask=mask)
        key = key.to(cos.dtype) * cos + other.to(cos.dtype) * tl.where(is_first, -sin, sin)
    k_to = k_pool_ptr + page * k_page_stride + row * k_row_stride + head * DIM_K
    tl.store(k_to + offs, key.to(k_pool_ptr.dtype.element_ty), mask=mask)
    offs = tl.arange(0, PADDED_V)
    mask = (offs < DIM_V) & exists
    value = tl.load(v_ptr + number * v_stride + head * DIM_V + offs, mask=mask)
    tl.store(v_pool_ptr + page * v_page_stride + row * v_row_stride + head * DIM_V + offs, value, mask=mask)


@triton.jit
def _gather_pair_kernel(
    k_new_ptr,
    v_new_ptr,
    k_tail_ptr,
    v_tail_ptr,
    page_ptr,
    row_ptr,
    new_ptr,
    is_new_ptr,
    k_ptr,
    v_ptr,
    k_new_stride,
    v_new_stride,
    k_page_stride,
    k_row_stride,
    v_page_stride,
    v_row_stride,
    heads,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Puts together the tokens of windows, from the tail and from the new ones.

    Grid: (token of a window, kv head).
    Owns: this head of the token.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_new = tl.load(is_new_ptr + number) != 0
    page, row, new = tl.load(page_ptr + number), tl.load(row_ptr + number), tl.load(new_ptr + number)
    offs = tl.arange(0, PADDED_K)
    mask = offs < DIM_K
    from_new = k_new_ptr + new * k_new_stride + head * DIM_K
    from_tail = k_tail_ptr + page * k_page_stride + row * k_row_stride + head * DIM_K
    key = tl.load(tl.where(is_new, from_new, from_tail) + offs, mask=mask)
    tl.store(k_ptr + (number * heads + head) * DIM_K + offs, key, mask=mask)
    offs = tl.arange(0, PADDED_V)
    mask = offs < DIM_V
    from_new = v_new_ptr + new * v_new_stride + head * DIM_V
    from_tail = v_tail_ptr + page * v_page_stride + row * v_row_stride + head * DIM_V
    value = tl.load(tl.where(is_new, from_new, from_tail) + offs, mask=mask)
    tl.store(v_ptr + (number * heads + head) * DIM_V + offs, value, mask=mask)
