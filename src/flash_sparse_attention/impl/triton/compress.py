"""Compression of windows, forward and backward: weighted sums of their tokens, or products with a matrix.

    tokens      | d tokens | d tokens | d tokens | ...        window m of a sequence: chunks m .. m + l/d - 1
    forward     tile of windows, position p of all of them:   rows x[m * d + p] against weight[p], summed over p
    dx          tile of chunks c, token r of all of them:     rows d_out[c - i] against weight[i * d + r], over i < l/d
    dweight     position p, all windows:                      rows x[m * d + p] against rows d_out[m], summed over m

Windows overlap, and are never laid out one after another: rows of x are gathered where they lie. Each element of a
result is summed by one program in a fixed order, or from shares that are added up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import load_rows, pack_blocks, padded, padded_dim, sequence_of, store_rows, tile_of_rows

# Sequences that the one program of `_key_bounds_kernel` sums at a time.
BOUNDS_TILE = 1024
# Windows of a program of `_window_starts_kernel`.
STARTS_TILE = 256
# Elements of the rows that a program of the pooling kernels holds; dweight has one warp, so that its sums need no
# barrier.
POOL_TILE, POOL_DWEIGHT_TILE = 2048, 1024
POOL_WARPS, POOL_DWEIGHT_WARPS = 4, 1
# Programs that dweight of the matrix is cut into at least, where a GPU would be left idle by fewer.
DWEIGHT_PROGRAMS = 256


class ProductTiles(NamedTuple):
    """Tile sizes of the products with a matrix: [rows, depth] @ [depth, columns], summed over steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Half precisions for matrix units; products in float32 take none, and their tiles must fit the registers.
HALF_TILES = ProductTiles(rows=128, columns=128, depth=64, warps=8, stages=3)
SINGLE_TILES = ProductTiles(rows=64, columns=64, depth=32, warps=8, stages=2)


class Windows(NamedTuple):
    """The windows of a pack.

    Attributes:
        cu_seqlens: bounds of the tokens of each sequence, int32 `[B + 1]`.
        bounds: bounds of its windows, int32 `[B + 1]`; see `launch_key_bounds`.
        total_tokens: N, of all sequences.
        num_windows: M, of all sequences.
        kernel_size, kernel_stride: l and d.
    """

    cu_seqlens: Tensor
    bounds: Tensor
    total_tokens: int
    num_windows: int
    kernel_size: int
    kernel_stride: int

    @property
    def num_sequences(self) -> int:
        """B, empty ones included."""
        return self.cu_seqlens.numel() - 1


def launch_key_bounds(cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> Tensor:
    """The bounds of the compressed tokens of each sequence, int32 `[B + 1]`, without waiting for the device."""
    num_sequences = cu_seqlens.numel() - 1
    bounds = cu_seqlens.new_empty(num_sequences + 1)
    _key_bounds_kernel[(1,)](cu_seqlens, bounds, num_sequences, kernel_size, kernel_stride, BOUNDS_TILE)
    return bounds


@triton.jit(do_not_specialize=["num_sequences"])
def _key_bounds_kernel(
    cu_seqlens_ptr,
    bounds_ptr,
    num_sequences,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Running sum of geometry.num_compressed_tokens over the sequences, with a leading 0.

    Grid: (1,).
    Owns: all bounds, by plain stores.
    Invariant: after n steps, the first n * TILE bounds are stored, and `total` is the last of them.
    """
    total = tl.zeros([], tl.int32)
    for first in range(0, num_sequences + 1, TILE):
        # Bound i counts the windows of the sequences before i.
        bound = first + tl.arange(0, TILE)
        mask = (bound > 0) & (bound <= num_sequences)
        start = tl.load(cu_seqlens_ptr + bound - 1, mask=mask, other=0)
        length = tl.load(cu_seqlens_ptr + bound, mask=mask, other=0) - start
        # The quotient of a negative number would be rounded towards 0.
        count = tl.where(length >= KERNEL_SIZE, (length - KERNEL_SIZE) // KERNEL_STRIDE + 1, 0)
        tl.store(bounds_ptr + bound, total + tl.cumsum(count, 0), mask=bound <= num_sequences)
        total += tl.sum(count, 0)


@triton.jit
def _window_starts(window, bounds_ptr, cu_seqlens_ptr, num_sequences, KERNEL_STRIDE: tl.constexpr):
    """First token in the pack of each window of a tile, which are windows of the pack."""
    sequence = sequence_of(window, bounds_ptr, num_sequences, 0)
    in_sequence = window - tl.load(bounds_ptr + sequence)
    # geometry.window_start
    return tl.load(cu_seqlens_ptr + sequence) + in_sequence * KERNEL_STRIDE


@triton.jit
def _windows_of(sequence, bounds_ptr):
    """First window in the pack, and number of windows, of a sequence."""
    first_window = tl.load(bounds_ptr + sequence)
    return first_window, tl.load(bounds_ptr + sequence + 1) - first_window


@triton.jit
def _load_part(x_ptr, rows, mask_rows, first, DIM: tl.constexpr, TILE: tl.constexpr):
    """Elements [first, first + TILE) of rows of DIM contiguous elements that start at the offsets `rows`: [ROWS, TILE],
    0 beyond the end of a row, and where masked. `mask_rows` None stands for rows that are all there."""
    offs = first + tl.arange(0, TILE)[None, :]
    x_ptrs = x_ptr + rows[:, None] + offs
    if mask_rows is None:
        if DIM % TILE == 0:
            tile = tl.load(x_ptrs)
        else:
            tile = tl.load(x_ptrs, mask=offs < DIM, other=0.0)
    else:
        mask = mask_rows[:, None]
        if DIM % TILE != 0:
            mask = mask & (offs < DIM)
        tile = tl.load(x_ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _store_part(x_ptr, rows, mask_rows, first, tile, DIM: tl.constexpr, TILE: tl.constexpr):
    """Stores a tile [ROWS, TILE] where `_load_part` would load it."""
    offs = first + tl.arange(0, TILE)[None, :]
    mask = mask_rows[:, None] & (offs < DIM)
    tl.store(x_ptr + rows[:, None] + offs, tile.to(x_ptr.dtype.element_ty), mask=mask)


def launch_compress_pooled(x: Tensor, weight: Tensor | None, bias: Tensor | None, windows: Windows) -> Tensor:
    """out `[M, Hk, D]`, the dtype of x: sums of the tokens of each window, plus `bias` float32 `[Hk, D]`.

    `weight` is float32 `[Hk, l]`; without it, sums are means.
    """
    _, num_heads, dim = x.shape
    out = x.new_empty(windows.num_windows, num_heads, dim)
    rows = max(1, POOL_TILE // padded(dim))
    _compress_pooled_kernel[(triton.cdiv(windows.num_windows, rows), num_heads)](
        x, out if weight is None else weight, out if bias is None else bias, out, windows.bounds, windows.cu_seqlens,
        windows.num_windows, windows.num_sequences, x.stride(0), num_heads, dim,
        windows.kernel_size, windows.kernel_stride, weight is not None, bias is not None, rows,
        num_warps=POOL_WARPS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_windows", "num_sequences"])
def _compress_pooled_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_windows,
    num_sequences,
    STRIDE_X: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Weighted sums of the tokens of windows.

    Grid: (tile of windows, kv head).
    Owns: out of its windows and head, by plain stores.
    Invariant: after n steps, `total` is the weighted sum of the first n tokens of each window.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    head = tl.program_id(1)
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = window < num_windows
    # Rows that are not there repeat the last window.
    start = _window_starts(
        tl.minimum(window, num_windows - 1), bounds_ptr, cu_seqlens_ptr, num_sequences, KERNEL_STRIDE
    )
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for position in tl.range(0, KERNEL_SIZE, loop_unroll_factor=4):
        rows = (start + position).to(tl.int64) * STRIDE_X + head * DIM
        x = load_rows(x_ptr, rows, mask, DIM, PADDED).to(tl.float32)  # [ROWS, D]
        if WITH_WEIGHT:
            x *= tl.load(weight_ptr + head * KERNEL_SIZE + position)
        total += x
    if not WITH_WEIGHT:
        total *= 1.0 / KERNEL_SIZE
    if WITH_BIAS:
        offs = tl.arange(0, PADDED)
        total += tl.load(bias_ptr + head * DIM + offs, mask=offs < DIM, other=0.0)[None, :]
    store_rows(out_ptr, (window.to(tl.int64) * NUM_HEADS + head) * DIM, mask, total, DIM, PADDED)


def launch_compress_pooled_dx(d_out: Tensor, weight: Tensor | None, windows: Windows) -> Tensor:
    """Gradient of x `[N, Hk, D]`, the dtype of `d_out` `[M, Hk, D]`; 0 for tokens that no window covers."""
    _, num_heads, dim = d_out.shape
    dx = d_out.new_empty(windows.total_tokens, num_heads, dim)
    rows = max(1, POOL_TILE // padded(dim))
    _compress_pooled_dx_kernel[(pack_blocks(windows.total_tokens, windows.num_sequences, rows), num_heads)](
        d_out, dx if weight is None else weight, dx, windows.bounds, windows.cu_seqlens, windows.num_sequences,
        d_out.stride(0), num_heads, dim, windows.kernel_size, windows.kernel_stride, weight is not None, rows,
        num_warps=POOL_WARPS,
    )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["num_sequences"])
def _compress_pooled_dx_kernel(
    d_out_ptr,
    weight_ptr,
    dx_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_sequences,
    STRIDE_DO: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums over the windows that cover a token.

    Grid: (tile of tokens of a sequence, kv head); ids that name no tile leave.
    Owns: dx of its tokens and head, by plain stores.
    Invariant: after n steps, `total` holds the n newest windows that begin at or before the chunk of each token.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    head = tl.program_id(1)
    sequence, start, length, first_token = tile_of_rows(tl.program_id(0), cu_seqlens_ptr, num_sequences, 1, ROWS)
    if first_token >= length:
        return
    first_window, num_windows = _windows_of(sequence, bounds_ptr)
    token = first_token + tl.arange(0, ROWS)
    mask = token < length
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for index in tl.range(0, KERNEL_SIZE // KERNEL_STRIDE):
        window = token // KERNEL_STRIDE - index
        exists = mask & (window >= 0) & (window < num_windows)
        rows = (first_window + window).to(tl.int64) * STRIDE_DO + head * DIM
        d_out = load_rows(d_out_ptr, rows, exists, DIM, PADDED).to(tl.float32)  # [ROWS, D]
        if WITH_WEIGHT:
            position = index * KERNEL_STRIDE + token % KERNEL_STRIDE
            d_out *= tl.load(weight_ptr + head * KERNEL_SIZE + position)[:, None]
        total += d_out
    if not WITH_WEIGHT:
        total *= 1.0 / KERNEL_SIZE
    store_rows(dx_ptr, ((start + token).to(tl.int64) * NUM_HEADS + head) * DIM, mask, total, DIM, PADDED)


def launch_compress_pooled_dweight(d_out: Tensor, x: Tensor, windows: Windows) -> Tensor:
    """Gradient of the weights of the positions, float32 `[Hk, l]`."""
    _, num_heads, dim = x.shape
    rows = max(1, POOL_DWEIGHT_TILE // padded(dim))
    tiles = triton.cdiv(windows.num_windows, rows)
    partial = x.new_empty(tiles, num_heads, windows.kernel_size, dtype=torch.float32)
    _compress_pooled_dweight_kernel[(tiles, num_heads)](
        d_out, x, partial, windows.bounds, windows.cu_seqlens, windows.num_windows, windows.num_sequences,
        d_out.stride(0), x.stride(0), num_heads, dim, windows.kernel_size, windows.kernel_stride, rows,
        num_warps=POOL_DWEIGHT_WARPS,
    )  # fmt: skip
    return partial.sum(0)


@triton.jit(do_not_specialize=["num_windows", "num_sequences"])
def _compress_pooled_dweight_kernel(
    d_out_ptr,
    x_ptr,
    partial_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_windows,
    num_sequences,
    STRIDE_DO: tl.constexpr,
    STRIDE_X: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Products of d_out with the tokens at each position, summed over a tile of windows.

    Grid: (tile of windows, kv head).
    Owns: partial[tile, head], by plain stores.
    Invariant: after n steps, the sums of the first n positions are stored.
    """
    PADDED: tl.constexpr = padded_dim(DIM)
    tile, head = tl.program_id(0), tl.program_id(1)
    window = tile * ROWS + tl.arange(0, ROWS)
    mask = window < num_windows
    start = _window_starts(
        tl.minimum(window, num_windows - 1), bounds_ptr, cu_seqlens_ptr, num_sequences, KERNEL_STRIDE
    )
    d_out = load_rows(d_out_ptr, window.to(tl.int64) * STRIDE_DO + head * DIM, mask, DIM, PADDED).to(tl.float32)
    partial_ptr += (tile.to(tl.int64) * NUM_HEADS + head) * KERNEL_SIZE
    for position in tl.range(0, KERNEL_SIZE, loop_unroll_factor=4):
        rows = (start + position).to(tl.int64) * STRIDE_X + head * DIM
        x = load_rows(x_ptr, rows, mask, DIM, PADDED).to(tl.float32)  # [ROWS, D]
        tl.store(partial_ptr + position, tl.sum(tl.sum(d_out * x, 1), 0))


def product_tiles(dtype: torch.dtype, rows: int, columns: int, depth: int) -> ProductTiles:
    """The tiles of a product; those of `columns`, and of `depth` and `rows` unless 0, cover a size with the least
    padding."""
    tiles = SINGLE_TILES if dtype == torch.float32 else HALF_TILES
    return tiles._replace(
        rows=_covering(rows, tiles.rows) if rows else tiles.rows,
        columns=_covering(columns, tiles.columns),
        depth=_covering(depth, tiles.depth) if depth else tiles.depth,
    )


def _covering(size: int, largest: int) -> int:
    """`largest` or half of it, whichever covers `size` with less padding; no more than `padded` of it."""
    half = max(16, largest // 2)
    tile = largest if triton.cdiv(size, largest) * largest <= triton.cdiv(size, half) * half else half
    return min(tile, padded(size))


def launch_compress_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, dtype: torch.dtype
) -> Tensor:
    """out `[M, Hk, E]` in `dtype`: each window, flattened to l * D, times `weight`, plus `bias` float32 `[Hk, E]`.

    `weight` is `[Hk, l * D, E]`, of the dtype of x.
    """
    _, num_heads, dim = x.shape
    width = weight.shape[2]
    out = x.new_empty(windows.num_windows, num_heads, width, dtype=dtype)
    tiles = product_tiles(x.dtype, 0, width, dim)
    programs = triton.cdiv(windows.num_windows, tiles.rows) * triton.cdiv(width, tiles.columns)
    _compress_linear_kernel[(programs, num_heads)](
        x, weight, out if bias is None else bias, out, windows.bounds, windows.cu_seqlens,
        windows.num_windows, windows.num_sequences, x.stride(0), num_heads, dim, width,
        windows.kernel_size, windows.kernel_stride, bias is not None,
        tiles.rows, tiles.columns, tiles.depth, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return out


@triton.jit
def _add_product(a, b, part, total, whole):
    """Adds a product to a sum; for float32 in two levels, `part` joining `total` where it is whole.

    A sum of thousands of terms one by one is several times less exact.
    """
    part = tl.dot(a, b, part, input_precision="ieee")
    if a.dtype == tl.float32:
        total += tl.where(whole, part, 0.0)
        part = tl.where(whole, 0.0, part)
    return part, total


@triton.jit(do_not_specialize=["num_windows", "num_sequences"])
def _compress_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_windows,
    num_sequences,
    STRIDE_X: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Windows, flattened, times the matrix of their head.

    Grid: (tile of windows and, fastest, of columns; kv head).
    Owns: out of its windows, head and columns, by plain stores.
    Invariant: after n steps, `total` is the product over the first n parts of the windows; a token has PARTS of them.
    """
    PARTS: tl.constexpr = (DIM + DEPTH - 1) // DEPTH
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    head = tl.program_id(1)
    first_column = tl.program_id(0) % COLUMN_TILES * COLUMNS
    window = tl.program_id(0) // COLUMN_TILES * ROWS + tl.arange(0, ROWS)
    # Rows that are not there repeat the last window.
    start = _window_starts(
        tl.minimum(window, num_windows - 1), bounds_ptr, cu_seqlens_ptr, num_sequences, KERNEL_STRIDE
    )
    x_rows = start.to(tl.int64) * STRIDE_X + head * DIM
    weight_ptr += head.to(tl.int64) * (KERNEL_SIZE * DIM * WIDTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    part = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, KERNEL_SIZE * PARTS, num_stages=STAGES):
        position = step // PARTS
        first = step % PARTS * DEPTH
        offs = first + tl.arange(0, DEPTH)
        x = _load_part(x_ptr + position.to(tl.int64) * STRIDE_X, x_rows, None, first, DIM, DEPTH)  # [ROWS, DEPTH]
        weight_rows = (position * DIM + offs) * WIDTH
        if DIM % DEPTH == 0:
            weight = _load_part(weight_ptr, weight_rows, None, first_column, WIDTH, COLUMNS)  # [DEPTH, COLUMNS]
        else:
            weight = _load_part(weight_ptr, weight_rows, offs < DIM, first_column, WIDTH, COLUMNS)
        part, total = _add_product(x, weight, part, total, step % PARTS == PARTS - 1)
    total += part
    if WITH_BIAS:
        column = first_column + tl.arange(0, COLUMNS)
        total += tl.load(bias_ptr + head * WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]
    out_rows = (window.to(tl.int64) * NUM_HEADS + head) * WIDTH
    _store_part(out_ptr, out_rows, window < num_windows, first_column, total, WIDTH, COLUMNS)


def launch_compress_linear_dx(d_out: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """Gradient of x `[N, Hk, D]`; 0 for tokens that no window covers.

    `d_out` `[M, Hk, E]` and `weight` `[Hk, l * D, E]` have its dtype.
    """
    _, num_heads, width = d_out.shape
    dim = weight.shape[1] // windows.kernel_size
    dx = d_out.new_empty(windows.total_tokens, num_heads, dim)
    tiles = product_tiles(d_out.dtype, 0, dim, width)
    stride = windows.kernel_stride
    token_tiles = pack_blocks(windows.total_tokens, windows.num_sequences, tiles.rows * stride)
    _compress_linear_dx_kernel[(token_tiles * stride * triton.cdiv(dim, tiles.columns), num_heads)](
        d_out, weight, dx, windows.bounds, windows.cu_seqlens, windows.num_sequences,
        d_out.stride(0), num_heads, dim, width, windows.kernel_size, windows.kernel_stride,
        tiles.rows, tiles.columns, tiles.depth, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return dx


@triton.jit(do_not_specialize=["num_sequences"])
def _compress_linear_dx_kernel(
    d_out_ptr,
    weight_ptr,
    dx_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_sequences,
    STRIDE_DO: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of one token of each chunk: d_out of the windows that cover the chunk, times matrices transposed.

    Grid: (tile of chunks of a sequence, the last one perhaps not whole, then token of the chunk, then, fastest, tile of
        columns; kv head); ids that name no tile leave.
    Owns: dx of its tokens, head and columns, by plain stores.
    Invariant: after n steps, `total` is the product over the first n parts; a window has PARTS of them, and newer
        windows come first.
    """
    PARTS: tl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
    COLUMN_TILES: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    head = tl.program_id(1)
    first_column = tl.program_id(0) % COLUMN_TILES * COLUMNS
    in_chunk = tl.program_id(0) // COLUMN_TILES % KERNEL_STRIDE
    tile = tl.program_id(0) // (COLUMN_TILES * KERNEL_STRIDE)
    sequence, start, length, first_token = tile_of_rows(tile, cu_seqlens_ptr, num_sequences, 1, ROWS * KERNEL_STRIDE)
    if first_token + in_chunk >= length:
        return
    first_window, num_windows = _windows_of(sequence, bounds_ptr)
    chunk = first_token // KERNEL_STRIDE + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    weight_ptr += head.to(tl.int64) * (KERNEL_SIZE * DIM * WIDTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, KERNEL_SIZE // KERNEL_STRIDE * PARTS, num_stages=STAGES):
        index = step // PARTS
        first = step % PARTS * DEPTH
        window = chunk - index
        exists = (window >= 0) & (window < num_windows)
        d_out_rows = (first_window + window).to(tl.int64) * STRIDE_DO + head * WIDTH
        d_out = _load_part(d_out_ptr, d_out_rows, exists, first, WIDTH, DEPTH)  # [ROWS, DEPTH]
        weight_rows = ((index * KERNEL_STRIDE + in_chunk) * DIM + column) * WIDTH
        if DIM % COLUMNS == 0:
            weight = _load_part(weight_ptr, weight_rows, None, first, WIDTH, DEPTH)  # [COLUMNS, DEPTH]
        else:
            weight = _load_part(weight_ptr, weight_rows, column < DIM, first, WIDTH, DEPTH)
        total = tl.dot(d_out, tl.trans(weight), total, input_precision="ieee")
    token = chunk * KERNEL_STRIDE + in_chunk
    dx_rows = ((start + token).to(tl.int64) * NUM_HEADS + head) * DIM
    _store_part(dx_ptr, dx_rows, token < length, first_column, total, DIM, COLUMNS)


def launch_compress_linear_dweight(d_out: Tensor, x: Tensor, windows: Windows) -> Tensor:
    """Gradient of the matrices `[Hk, l * D, E]`, the dtype of x; `d_out` `[M, Hk, E]` has it too.

    Windows are cut into shares where there are few tiles; how many there are does not depend on a length.
    """
    (_, num_heads, dim), width = x.shape, d_out.shape[2]
    tiles = product_tiles(x.dtype, dim, width, 0)
    programs = triton.cdiv(dim, tiles.rows) * triton.cdiv(width, tiles.columns) * windows.kernel_size
    shares = max(1, DWEIGHT_PROGRAMS // (programs * num_heads))
    share_windows = triton.cdiv(triton.cdiv(windows.num_windows, shares), tiles.depth) * tiles.depth
    starts = windows.bounds.new_empty(windows.num_windows)
    _window_starts_kernel[(triton.cdiv(windows.num_windows, STARTS_TILE),)](
        starts, windows.bounds, windows.cu_seqlens, windows.num_windows, windows.num_sequences,
        windows.kernel_stride, STARTS_TILE,
    )  # fmt: skip
    dtype = torch.float32 if shares > 1 else x.dtype
    dweight = x.new_empty(shares, num_heads, windows.kernel_size * dim, width, dtype=dtype)
    _compress_linear_dweight_kernel[(programs * shares, num_heads)](
        d_out, x, dweight, starts, windows.num_windows, share_windows,
        d_out.stride(0), x.stride(0), num_heads, dim, width, windows.kernel_size,
        tiles.rows, tiles.columns, tiles.depth, tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return dweight.sum(0).to(x.dtype) if shares > 1 else dweight[0]


@triton.jit(do_not_specialize=["num_windows", "num_sequences"])
def _window_starts_kernel(
    starts_ptr,
    bounds_ptr,
    cu_seqlens_ptr,
    num_windows,
    num_sequences,
    KERNEL_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """First token in the pack of each window.

    Grid: (tile of windows,).
    Owns: starts of its windows, by plain stores.
    Invariant: no loop.
    """
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = window < num_windows
    start = _window_starts(
        tl.minimum(window, num_windows - 1), bounds_ptr, cu_seqlens_ptr, num_sequences, KERNEL_STRIDE
    )
    tl.store(starts_ptr + window, start, mask=mask)


@triton.jit(do_not_specialize=["num_windows", "share_windows"])
def _compress_linear_dweight_kernel(
    d_out_ptr,
    x_ptr,
    dweight_ptr,
    starts_ptr,
    num_windows,
    share_windows,
    STRIDE_DO: tl.constexpr,
    STRIDE_X: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The tokens at one position of the windows, transposed, times d_out.

    Grid: (share of the windows, then position, then tile of the rows of its matrix, then, fastest, tile of columns; kv
        head).
    Owns: dweight of its share, head, position and tile, by plain stores.
    Invariant: after n steps, `total` is the product over the first n * DEPTH windows of the share.
    """
    ROW_TILES: tl.constexpr = (DIM + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    head = tl.program_id(1)
    first_column = tl.program_id(0) % COLUMN_TILES * COLUMNS
    first_row = tl.program_id(0) // COLUMN_TILES % ROW_TILES * ROWS
    position = tl.program_id(0) // (COLUMN_TILES * ROW_TILES) % KERNEL_SIZE
    share = tl.program_id(0) // (COLUMN_TILES * ROW_TILES * KERNEL_SIZE)
    begin = share * share_windows
    end = tl.minimum(begin + share_windows, num_windows)
    x_ptr += position.to(tl.int64) * STRIDE_X + head * DIM
    d_out_ptr += head * WIDTH
    offs = tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    start_next = tl.load(starts_ptr + tl.minimum(begin + offs, num_windows - 1))
    for first in tl.range(begin, end, DEPTH, num_stages=STAGES):
        window = first + offs
        # Loaded one step ahead, as the rows of x cannot be asked for before. Those that are not there repeat the last
        # window, and meet rows of 0.
        start = start_next
        start_next = tl.load(starts_ptr + tl.minimum(window + DEPTH, num_windows - 1))
        x = _load_part(x_ptr, start.to(tl.int64) * STRIDE_X, None, first_row, DIM, ROWS)  # [DEPTH, ROWS]
        d_out_rows = window.to(tl.int64) * STRIDE_DO
        d_out = _load_part(d_out_ptr, d_out_rows, window < end, first_column, WIDTH, COLUMNS)  # [DEPTH, COLUMNS]
        total = tl.dot(tl.trans(x), d_out, total, input_precision="ieee")
    row = first_row + tl.arange(0, ROWS)
    dweight_ptr += (share.to(tl.int64) * NUM_HEADS + head) * (KERNEL_SIZE * DIM * WIDTH)
    dweight_rows = (position * DIM + row).to(tl.int64) * WIDTH
    _store_part(dweight_ptr, dweight_rows, row < DIM, first_column, total, WIDTH, COLUMNS)
