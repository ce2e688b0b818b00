"""The writing of a cache: where new tokens go, keys and values to their places, windows that became full.

plan_step        program (sequence, tile of tokens)     positions, places, windows of a step: once for all layers
store_rows       program (tile of rows, kv head, pair)  keys and values to pages
gather_windows   program (token of a window, head)      tokens of windows, from the tail and from the new ones
pool_windows     program (window, head, k or v)         the same, averaged, rotated and stored
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...types import Compression, Place
from .primitives import dense_rows, on_its_device, padded

Pair = tuple[Tensor, Tensor]

# Rows of a program that stores: many of a prompt, one of a few new tokens, so that there are enough programs.
ROWS, FEW_ROWS = 32, 512
# New tokens of a sequence that a program plans.
PLAN_TOKENS = 128


@on_its_device
def plan_step(
    seq_lens: Tensor,
    page_table: Tensor,
    tokens: int,
    kernel_size: int,
    kernel_stride: int,
    num_pages: int,
    page_size: int,
    tail_rows: int,
) -> tuple[Tensor, Place, Place, Tensor, Place, Place, Tensor, Tensor]:
    """Appends `tokens` to each sequence: adds them to `seq_lens` `[B]`, and says where things go.

    Returns:
        Positions of the new tokens `[B * tokens]`, their places, and those in the tail; then of `ceil(tokens / d)`
        windows of each sequence, those that become full first: positions of their first tokens, places of their
        compressed tokens, and what `gather_windows` takes: where their tokens are kept, which new ones they are, and
        whether they are new.
    """
    batch, slots = len(seq_lens), triton.cdiv(tokens, kernel_stride)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=seq_lens.device)

    def flags(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.bool)

    rows, windows = batch * tokens, batch * slots
    of_windows = windows, kernel_size
    position, page, row, tail_row = (empty(rows) for _ in range(4))
    exists, kept = flags(rows), flags(rows)
    start, to_page, to_row, to_exists = *(empty(windows) for _ in range(3)), flags(windows)
    kept_page, kept_row, new, is_new = *(empty(*of_windows) for _ in range(3)), flags(*of_windows)
    # One program reads the length of a sequence and writes it; several find it written.
    tile = min(padded(tokens, 1), PLAN_TOKENS)
    tiles, slots_of_tile = triton.cdiv(tokens, tile), triton.cdiv(tile, kernel_stride)
    if tiles > 1:
        seq_lens.add_(tokens)
    _plan_step_kernel[(batch, tiles)](
        seq_lens, page_table, position, page, row, tail_row, exists, kept, start, to_page, to_row, to_exists,
        kept_page, kept_row, new, is_new, page_table.shape[1], num_pages, page_size, tail_rows, page_table.stride(0),
        tokens, slots, kernel_size, kernel_stride, tile, slots_of_tile, padded(slots_of_tile, 1),
        padded(kernel_size, 1), tiles > 1, num_warps=1,
    )  # fmt: skip
    place, tail = Place(page, row, exists), Place(page, tail_row, kept)
    return (
        position,
        place,
        tail,
        start,
        Place(to_page, to_row, to_exists),
        Place(kept_page, kept_row, is_new),
        new,
        is_new,
    )


def _angles(by: Pair | None) -> tuple[Tensor | None, Tensor | None]:
    """Cosines and sines as the kernels read them, row behind row; they may be halves of wider rows."""
    return (None, None) if by is None else (by[0].contiguous(), by[1].contiguous())


def store_rows(pairs: list[tuple[Pair, Pair, Place]], by: Pair | None) -> None:
    """As `blockwise.store_rows`; a token's heads are adjacent in all of them."""
    if len(pairs[0][1][0]):
        _launch_store(pairs[0][1][0], pairs, by)


@on_its_device
def _launch_store(k: Tensor, pairs: list[tuple[Pair, Pair, Place]], by: Pair | None) -> None:
    (count, heads, dim_k), dim_v = k.shape, pairs[0][1][1].shape[2]
    # Of less than three pairs the first stands for the others, which have no program.
    three = [*pairs, pairs[0], pairs[0]][:3]
    rows = [tuple(map(dense_rows, rows)) for _, rows, _ in three]
    places = [place for _, _, place in three]
    pools = [pool for pool, _, _ in three]
    tile = 1 if count <= FEW_ROWS else ROWS
    _store_rows_kernel[(triton.cdiv(count, tile), heads, len(pairs))](
        *(tuple(x[i] for x in rows) for i in range(2)), *_angles(by),
        tuple(x.page for x in places), tuple(x.row for x in places), tuple(x.exists for x in places),
        *(tuple(x[i] for x in pools) for i in range(2)),
        *(tuple(x[i].stride(0) for x in rows) for i in range(2)),
        *(tuple(x[i].stride(at) for x in pools) for i in range(2) for at in range(2)),
        count, dim_k, dim_v, padded(dim_k), padded(dim_v), len(pairs), tile,
    )  # fmt: skip


def gather_windows(tails: Pair, rows: Pair, tail: Place, new: Tensor, is_new: Tensor) -> Pair:
    """As `blockwise.gather_windows`."""
    return _launch_gather(*rows, *tails, tail, new, is_new)


@on_its_device
def _launch_gather(
    k_new: Tensor, v_new: Tensor, k_tail: Tensor, v_tail: Tensor, tail: Place, new: Tensor, is_new: Tensor
) -> Pair:
    count, heads, dim_k = new.numel(), *k_new.shape[1:]
    k_new, v_new = dense_rows(k_new), dense_rows(v_new)
    k, v = k_new.new_empty(count, heads, dim_k), v_new.new_empty(count, heads, v_new.shape[2])
    _gather_windows_kernel[(count, heads)](
        k_new, v_new, k_tail, v_tail, tail.page, tail.row, new, is_new, k, v,
        k_new.stride(0), v_new.stride(0), k_tail.stride()[:2], v_tail.stride()[:2],
        heads, dim_k, v.shape[2], padded(dim_k), padded(v.shape[2]),
    )  # fmt: skip
    return k, v


def pool_windows(
    pools: Pair,
    tails: Pair,
    rows: Pair,
    tail: Place,
    new: Tensor,
    is_new: Tensor,
    place: Place,
    compressions: tuple[Compression, Compression],
    by: Pair | None,
) -> None:
    """`gather_windows`, `compress` to (weighted) means, `store_rows`: all in one."""
    _launch_pool(*rows, pools, tails, tail, new, is_new, place, compressions, by)


@on_its_device
def _launch_pool(
    k_new: Tensor,
    v_new: Tensor,
    pools: Pair,
    tails: Pair,
    tail: Place,
    new: Tensor,
    is_new: Tensor,
    place: Place,
    compressions: tuple[Compression, Compression],
    by: Pair | None,
) -> None:
    (count, size), (_, heads, dim_k), dim_v = new.shape, k_new.shape, v_new.shape[2]
    k_new, v_new = dense_rows(k_new), dense_rows(v_new)
    # float32 as `compress` has them, and contiguous.
    weights, embeddings = (
        tuple(None if x is None else x.detach().float().contiguous() for x in values)
        for values in ([c.weight for c in compressions], [c.position_embedding for c in compressions])
    )
    _pool_windows_kernel[(count, heads, 2)](
        (k_new, v_new), tails, tail.page, tail.row, new, is_new, weights, embeddings, *_angles(by),
        place.page, place.row, place.exists, pools,
        (k_new.stride(0), v_new.stride(0)), tails[0].stride()[:2], tails[1].stride()[:2],
        pools[0].stride()[:2], pools[1].stride()[:2],
        size, dim_k, dim_v, padded(size, 1), padded(triton.cdiv(dim_k, 2), 1), padded(triton.cdiv(dim_v, 2), 1),
    )  # fmt: skip


@triton.jit
def _page_of(page_table_ptr, index, columns, num_pages, mask):
    """The page that holds a token, in bounds, and whether it is one; `index` counts pages of the sequence."""
    page = tl.load(page_table_ptr + tl.minimum(index, columns - 1), mask=mask, other=-1).to(tl.int64)
    there = mask & (index < columns) & (page >= 0) & (page < num_pages)
    return tl.where(there, page, 0), there


@triton.jit
def _num_windows(length, KERNEL_SIZE: tl.constexpr, KERNEL_STRIDE: tl.constexpr):
    """geometry.num_compressed_tokens; rounds towards zero, so what is too short is told apart."""
    return tl.where(length >= KERNEL_SIZE, (length - KERNEL_SIZE) // KERNEL_STRIDE + 1, 0)


@triton.jit(do_not_specialize=["columns", "num_pages", "page_size", "tail_rows", "stride_table", "tokens", "slots"])
def _plan_step_kernel(
    seq_lens_ptr,
    page_table_ptr,
    position_ptr,
    page_ptr,
    row_ptr,
    tail_row_ptr,
    exists_ptr,
    kept_ptr,
    start_ptr,
    to_page_ptr,
    to_row_ptr,
    to_exists_ptr,
    kept_page_ptr,
    kept_row_ptr,
    new_ptr,
    is_new_ptr,
    columns,
    num_pages,
    page_size,
    tail_rows,
    stride_table,
    tokens,
    slots,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Where the new tokens of a sequence go, and the windows that they may fill.

    Grid: (sequence, tile of its new tokens and of as many windows as they could fill).
    Owns: what is said of its tokens and windows and, unless they are COUNTED in the length already, the length, by
        plain stores.
    Invariant: after n steps, the first n windows are described.
    """
    sequence = tl.program_id(0)
    tile = tl.program_id(1)
    past = tl.load(seq_lens_ptr + sequence)
    if COUNTED:
        past -= tokens
    after = past + tokens
    if not COUNTED:
        tl.store(seq_lens_ptr + sequence, after)
    page_table_ptr += sequence.to(tl.int64) * stride_table
    i = tile * TOKENS + tl.arange(0, TOKENS)
    mask = i < tokens
    at = sequence * tokens + i
    position = past + i
    page, exists = _page_of(page_table_ptr, position // page_size, columns, num_pages, mask)
    row = position % page_size
    tail_row = row % tail_rows
    # Of the new tokens of a page the tail keeps the last.
    kept = exists & (position + tail_rows >= tl.minimum(after, (position // page_size + 1) * page_size))
    tl.store(position_ptr + at, position.to(tl.int64), mask=mask)
    tl.store(page_ptr + at, page, mask=mask)
    tl.store(row_ptr + at, row.to(tl.int64), mask=mask)
    tl.store(tail_row_ptr + at, tail_row.to(tl.int64), mask=mask)
    tl.store(exists_ptr + at, exists, mask=mask)
    tl.store(kept_ptr + at, kept, mask=mask)

    rows_of_page = page_size // KERNEL_STRIDE
    first, end = _num_windows(past, KERNEL_SIZE, KERNEL_STRIDE), _num_windows(after, KERNEL_SIZE, KERNEL_STRIDE)
    first_slot = tile * SLOTS
    last_slot = tl.minimum(first_slot + SLOTS, slots)
    slot = first_slot + tl.arange(0, SLOTS_PADDED)
    mask_slot = slot < last_slot
    window = first + slot
    # geometry.newest_chunk
    chunk = window + (KERNEL_SIZE // KERNEL_STRIDE - 1)
    page, exists = _page_of(page_table_ptr, chunk // rows_of_page, columns, num_pages, mask_slot)
    at = sequence * slots + slot
    tl.store(start_ptr + at, (window * KERNEL_STRIDE).to(tl.int64), mask=mask_slot)
    tl.store(to_page_ptr + at, page, mask=mask_slot)
    tl.store(to_row_ptr + at, (chunk % rows_of_page).to(tl.int64), mask=mask_slot)
    tl.store(to_exists_ptr + at, exists & (window < end), mask=mask_slot)
    offs = tl.arange(0, SIZE)
    mask = offs < KERNEL_SIZE
    for s in tl.range(first_slot, last_slot):
        token = (first + s) * KERNEL_STRIDE + offs
        kept_page, _ = _page_of(page_table_ptr, token // page_size, columns, num_pages, mask)
        new = sequence * tokens + tl.minimum(tl.maximum(token - past, 0), tokens - 1)
        here = (sequence * slots + s) * KERNEL_SIZE + offs
        tl.store(kept_page_ptr + here, kept_page, mask=mask)
        tl.store(kept_row_ptr + here, (token % page_size % tail_rows).to(tl.int64), mask=mask)
        tl.store(new_ptr + here, new.to(tl.int64), mask=mask)
        tl.store(is_new_ptr + here, token >= past, mask=mask)


@triton.jit
def _store_tile(
    k_ptr, v_ptr, cos_ptr, sin_ptr, page_ptr, row_ptr, exists_ptr, k_pool_ptr, v_pool_ptr,
    count, k_stride, v_stride, k_page, k_row, v_page, v_row,
    DIM_K: tl.constexpr, DIM_V: tl.constexpr, PADDED_K: tl.constexpr, PADDED_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Copies a head of keys and values to their places; with `cos_ptr`, `[N, DIM_K / 2]`, keys are rotated."""
    number, head = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    exists = tl.load(exists_ptr + number, mask=number < count, other=0) != 0
    page = tl.load(page_ptr + number, mask=exists, other=0)
    row = tl.load(row_ptr + number, mask=exists, other=0)
    offs = tl.arange(0, PADDED_K)
    mask = exists[:, None] & (offs < DIM_K)[None, :]
    k_ptr += (number * k_stride + head * DIM_K)[:, None]
    key = tl.load(k_ptr + offs[None, :], mask=mask)  # [ROWS, DK]
    if cos_ptr is not None:
        # rotary.rotate: channel c turns together with channel c + D / 2.
        HALF: tl.constexpr = DIM_K // 2
        is_first = offs < HALF
        pair = (number * HALF)[:, None] + tl.where(is_first, offs, offs - HALF)[None, :]
        cos = tl.load(cos_ptr + pair, mask=mask)
        sin = tl.load(sin_ptr + pair, mask=mask)
        other = tl.load(k_ptr + tl.where(is_first, offs + HALF, offs - HALF)[None, :], mask=mask)
        key = key.to(cos.dtype) * cos + other.to(cos.dtype) * tl.where(is_first[None, :], -sin, sin)
    to = (page * k_page + row * k_row + head * DIM_K)[:, None] + offs[None, :]
    tl.store(k_pool_ptr + to, key.to(k_pool_ptr.dtype.element_ty), mask=mask)
    offs = tl.arange(0, PADDED_V)
    mask = exists[:, None] & (offs < DIM_V)[None, :]
    value = tl.load(v_ptr + (number * v_stride + head * DIM_V)[:, None] + offs[None, :], mask=mask)  # [ROWS, DV]
    tl.store(v_pool_ptr + (page * v_page + row * v_row + head * DIM_V)[:, None] + offs[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _store_rows_kernel(
    k_ptrs,
    v_ptrs,
    cos_ptr,
    sin_ptr,
    page_ptrs,
    row_ptrs,
    exists_ptrs,
    k_pool_ptrs,
    v_pool_ptrs,
    k_strides,
    v_strides,
    k_page_strides,
    k_row_strides,
    v_page_strides,
    v_row_strides,
    count,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Copies keys and values to their places; see `_store_tile`.

    Grid: (tile of rows, kv head, pair of pools).
    Owns: this head of the rows' places in its pools, if they have one.
    Invariant: no loop.
    """
    for i in tl.static_range(PAIRS):
        if tl.program_id(2) == i:
            _store_tile(
                k_ptrs[i], v_ptrs[i], cos_ptr, sin_ptr, page_ptrs[i], row_ptrs[i], exists_ptrs[i],
                k_pool_ptrs[i], v_pool_ptrs[i], count, k_strides[i], v_strides[i], k_page_strides[i],
                k_row_strides[i], v_page_strides[i], v_row_strides[i], DIM_K, DIM_V, PADDED_K, PADDED_V, ROWS,
            )  # fmt: skip


@triton.jit
def _gather_windows_kernel(
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
    k_strides,
    v_strides,
    heads,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """Puts together the tokens of windows, from the tail and from the new ones.

    Grid: (token of a window, kv head).
    Owns: this head of the token.
    Invariant: no loop.
    """
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_new = tl.load(is_new_ptr + number) != 0
    page, row, new = tl.load(page_ptr + number), tl.load(row_ptr + number), tl.load(new_ptr + number)
    offs = tl.arange(0, PADDED_K)
    mask = offs < DIM_K
    from_new = k_new_ptr + new * k_new_stride + head * DIM_K
    from_tail = k_tail_ptr + page * k_strides[0] + row * k_strides[1] + head * DIM_K
    key = tl.load(tl.where(is_new, from_new, from_tail) + offs, mask=mask)
    tl.store(k_ptr + (number * heads + head) * DIM_K + offs, key, mask=mask)
    offs = tl.arange(0, PADDED_V)
    mask = offs < DIM_V
    from_new = v_new_ptr + new * v_new_stride + head * DIM_V
    from_tail = v_tail_ptr + page * v_strides[0] + row * v_strides[1] + head * DIM_V
    value = tl.load(tl.where(is_new, from_new, from_tail) + offs, mask=mask)
    tl.store(v_ptr + (number * heads + head) * DIM_V + offs, value, mask=mask)


@triton.jit
def _pool_half(
    new_ptr, tail_ptr, weight_ptr, embedding_ptr, from_new, from_tail, is_new, offs, mask, first, end,
    SIZE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The weighted sum over the tokens of a window, of the channels from `first` on; rounded as `compress` does."""
    channel = first + offs
    there = mask[:, None] & (channel < end)[None, :]
    at = tl.where(is_new, from_new, from_tail)[:, None] + channel[None, :]
    x = tl.load(tl.where(is_new[:, None], new_ptr, tail_ptr) + at, mask=there, other=0.0)  # [L, D / 2]
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float64) if dtype == tl.float64 else x.to(tl.float32)
    token = tl.arange(0, SIZE)
    if embedding_ptr is not None:
        x += tl.load(embedding_ptr + token[:, None] * end + channel[None, :], mask=there, other=0.0)
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + token, mask=mask, other=0.0)[:, None]
    else:
        x *= SCALE
    return tl.sum(x, 0).to(dtype)


@triton.jit
def _pool_window(
    new_ptr, tail_ptr, page_ptr, row_ptr, index_ptr, is_new_ptr, weight_ptr, embedding_ptr, cos_ptr, sin_ptr,
    to_page_ptr, to_row_ptr, exists_ptr, pool_ptr, stride_new, strides_tail, strides_pool,
    KERNEL_SIZE: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, HALF_PADDED: tl.constexpr,
):  # fmt: skip
    """A head of the compressed key or value of a window, in two halves of its channels."""
    HALF: tl.constexpr = (DIM + 1) // 2
    number, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.arange(0, SIZE)
    mask = token < KERNEL_SIZE
    at = number * KERNEL_SIZE + token
    is_new = tl.load(is_new_ptr + at, mask=mask, other=0) != 0
    from_new = tl.load(index_ptr + at, mask=mask, other=0) * stride_new + head * DIM
    page, row = tl.load(page_ptr + at, mask=mask, other=0), tl.load(row_ptr + at, mask=mask, other=0)
    from_tail = page * strides_tail[0] + row * strides_tail[1] + head * DIM
    if weight_ptr is not None:
        weight_ptr += head * KERNEL_SIZE
    offs = tl.arange(0, HALF_PADDED)
    in_half = offs < HALF
    SCALE: tl.constexpr = 1.0 / KERNEL_SIZE
    first = _pool_half(
        new_ptr, tail_ptr, weight_ptr, embedding_ptr, from_new, from_tail, is_new, tl.where(in_half, offs, DIM), mask,
        0, DIM, SIZE, SCALE,
    )  # fmt: skip
    second = _pool_half(
        new_ptr, tail_ptr, weight_ptr, embedding_ptr, from_new, from_tail, is_new, offs, mask, HALF, DIM, SIZE, SCALE
    )
    if cos_ptr is not None:
        # rotary.rotate
        cos = tl.load(cos_ptr + number * HALF + offs, mask=in_half, other=0.0)
        sin = tl.load(sin_ptr + number * HALF + offs, mask=in_half, other=0.0)
        a, b = first.to(cos.dtype), second.to(cos.dtype)
        first, second = a * cos - b * sin, b * cos + a * sin
    exists = tl.load(exists_ptr + number) != 0
    to = tl.load(to_page_ptr + number) * strides_pool[0] + tl.load(to_row_ptr + number) * strides_pool[1]
    pool_ptr += to + head * DIM
    dtype: tl.constexpr = pool_ptr.dtype.element_ty
    tl.store(pool_ptr + offs, first.to(dtype), mask=exists & in_half)
    tl.store(pool_ptr + HALF + offs, second.to(dtype), mask=exists & (HALF + offs < DIM))


@triton.jit
def _pool_windows_kernel(
    new_ptrs,
    tail_ptrs,
    page_ptr,
    row_ptr,
    index_ptr,
    is_new_ptr,
    weight_ptrs,
    embedding_ptrs,
    cos_ptr,
    sin_ptr,
    to_page_ptr,
    to_row_ptr,
    exists_ptr,
    pool_ptrs,
    strides_new,
    strides_k_tail,
    strides_v_tail,
    strides_k_pool,
    strides_v_pool,
    KERNEL_SIZE: tl.constexpr,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    SIZE: tl.constexpr,
    HALF_K: tl.constexpr,
    HALF_V: tl.constexpr,
):
    """Compresses windows to (weighted) means, rotates those of keys, and stores them; see `_pool_window`.

    Grid: (window, kv head; keys or values).
    Owns: this head of the window's place, if it has one.
    Invariant: no loop.
    """
    if tl.program_id(2) == 0:
        _pool_window(
            new_ptrs[0], tail_ptrs[0], page_ptr, row_ptr, index_ptr, is_new_ptr, weight_ptrs[0], embedding_ptrs[0],
            cos_ptr, sin_ptr, to_page_ptr, to_row_ptr, exists_ptr, pool_ptrs[0], strides_new[0], strides_k_tail,
            strides_k_pool, KERNEL_SIZE, DIM_K, SIZE, HALF_K,
        )  # fmt: skip
    else:
        _pool_window(
            new_ptrs[1], tail_ptrs[1], page_ptr, row_ptr, index_ptr, is_new_ptr, weight_ptrs[1], embedding_ptrs[1],
            None, None, to_page_ptr, to_row_ptr, exists_ptr, pool_ptrs[1], strides_new[1], strides_v_tail,
            strides_v_pool, KERNEL_SIZE, DIM_V, SIZE, HALF_V,
        )  # fmt: skip
