"""What the kernels share: index arithmetic of packed sequences and of (token, head) rows, launch helpers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


def padded(size: int, at_least: int = 16) -> int:
    """The power of two that a tile of `size` takes; matrix units want 16 at least."""
    return max(at_least, triton.next_power_of_2(size))


@triton.constexpr_function
def padded_dim(dim):
    """`padded`, inside a kernel."""
    return max(16, 1 << (dim - 1).bit_length())


def dense_rows(x: Tensor) -> Tensor:
    """`x` if its heads are adjacent and their elements contiguous, as in a slice of a fused projection; or a copy."""
    adjacent = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if adjacent and x.stride(0) >= x.shape[1] * x.shape[2] else x.contiguous()


def tile_descriptor(x: Tensor, rows: int) -> TensorDescriptor | None:
    """By which devices that can (sm_90 on) copy tiles of so many rows of a head of `x` `[N, H, D]` as a whole.

    None where that is not possible: a copy starts at a multiple of 16 bytes, its width is a power of two, and it has
    256 rows at most.
    """
    (length, heads, dim), size = x.shape, x.element_size()
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * size % 16 == 0
    if dim != padded(dim) or not aligned or length == 0 or rows > 256:
        return None
    return TensorDescriptor(x, [length, heads * dim], [x.stride(0), 1], [rows, dim])


def on_its_device(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function with the device of its first argument as the current one: kernels are launched there."""

    @functools.wraps(compute)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return compute(x, *args, **kwargs)

    return run


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale, so that the largest product is the largest score."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (-q, -softmax_scale) if softmax_scale < 0 else (torch.zeros_like(q), 1.0)


def pack_blocks(total_tokens: int, num_sequences: int, block_size: int) -> int:
    """Upper bound of the block ids of a pack; see `sequence_of`."""
    return total_tokens // block_size + num_sequences


# Multiprocessors where there is no device to ask, as when kernels are compiled alone: those of an H200.
MULTIPROCESSORS = 132


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Of a device."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def sequence_of(x, cu_seqlens_ptr, num_sequences, BLOCK_SIZE: tl.constexpr, SCALE: tl.constexpr = 1):
    """The sequence of token `x` of the pack (BLOCK_SIZE 0), or of block `x` of the pack.

    With SCALE, a block holds BLOCK_SIZE rows, of which a token has SCALE.
    Block j of sequence s has the id cu_seqlens[s] // BLOCK_SIZE + s + j in the pack. A sequence of L tokens has at most
    L // BLOCK_SIZE + 1 blocks, so ids of two sequences never meet, some ids name no block, and nothing must be summed
    to know them. Worked example, blocks of 4, lengths 5 and 6: ids 0, 1 and, as 5 // 4 + 1 = 2, the ids 2, 3.
    """
    low = x * 0
    high = low + num_sequences
    width = num_sequences
    # Invariant: the first id of `low` is <= x, that of `high` is > x.
    while width > 1:
        middle = (low + high) // 2
        first = tl.load(cu_seqlens_ptr + middle)
        if BLOCK_SIZE > 0:
            first = first * SCALE // BLOCK_SIZE + middle
        after = first <= x
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
        width = (width + 1) // 2
    return low


@triton.jit
def keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr):
    """How much further the key of a token stands in the pack of keys than its query does in that of queries.

    `cu_seqlens_k_ptr` bounds the tokens that have keys, of which the last ones of a sequence have queries; None stands
    for one pack of both. Worked example, bounds of queries 0, 2, 3 and of keys 0, 5, 7: of the first sequence the
    queries 0 and 1 are the tokens 3 and 4, which is 3 ahead; of the second the query 2 is the token 6, 4 ahead.
    """
    ahead = sequence * 0
    if cu_seqlens_k_ptr is not None:
        ahead = tl.load(cu_seqlens_k_ptr + sequence + 1) - tl.load(cu_seqlens_ptr + sequence + 1)
    return ahead


@triton.jit
def bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr):
    """Bounds of the tokens that have keys; see `keys_ahead`."""
    return cu_seqlens_ptr if cu_seqlens_k_ptr is None else cu_seqlens_k_ptr


@triton.jit
def past_of(sequence, start, cu_seqlens_ptr, cu_seqlens_k_ptr):
    """Tokens of a sequence before the first that has a query, which stands at `start` in the pack of queries."""
    past = sequence * 0
    if cu_seqlens_k_ptr is not None:
        past = start + keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr) - tl.load(cu_seqlens_k_ptr + sequence)
    return past


@triton.jit
def block_bounds(block, cu_seqlens_ptr, num_sequences, BLOCK_SIZE: tl.constexpr):
    """First token of a block of the pack, one past the last token of its sequence, and the sequence."""
    sequence = sequence_of(block, cu_seqlens_ptr, num_sequences, BLOCK_SIZE)
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    # geometry.first_token_of_block, in the pack
    return start + (block - start // BLOCK_SIZE - sequence) * BLOCK_SIZE, end, sequence


@triton.jit
def tile_of_rows(tile, cu_seqlens_ptr, num_sequences, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """A tile of ROWS consecutive rows of one sequence, of which a token has GROUP.

    Returns the sequence, its first token in the pack, its length (tokens), and the tile's first row in the sequence.
    Tiles past the last row, which the numbering of `sequence_of` may have, start there or later.
    """
    sequence = sequence_of(tile, cu_seqlens_ptr, num_sequences, ROWS, GROUP)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    return sequence, start, length, (tile - start * GROUP // ROWS - sequence) * ROWS


@triton.jit
def wait_for_the_kernel_before(EARLY: tl.constexpr):
    """What a kernel that is launched by `tuning.early_launch` does before it touches what the one before may touch.

    All of its programs do, those without work as well: the next kernel relies on it that the one before this has ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def take_over(EARLY: tl.constexpr):
    """As `wait_for_the_kernel_before`; and then the next kernel may begin where programs of this one leave room.

    No program has to wait for that one, so no kernel meets more than the end of the one before it.
    """
    wait_for_the_kernel_before(EARLY)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def finite_maximum(largest):
    """A maximum to subtract: any finite one serves a row that has nothing, whose maximum is -inf."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def exp_shifted(products, scale, shift, EXACT: tl.constexpr):
    """exp(scale * products - shift), for `products` [A, B] and `shift` [A] in the units of lse.

    EXACT is for float32: a large shift cancels before it is rounded once more. Half precisions would not notice, and
    save an instruction an element.
    """
    if EXACT:
        return tl.exp2((products * scale - shift[:, None]) * LOG2_E)
    return tl.exp2(products * (scale * LOG2_E) - (shift * LOG2_E)[:, None])


@triton.jit
def exp_below(products, scale, shift, EXACT: tl.constexpr):
    """exp(scale * products - shift) of the backward pass, shapes broadcast; `shift` in log2 units unless EXACT."""
    if EXACT:
        return tl.exp2((products * scale - shift) * LOG2_E)
    return tl.exp2(products * (scale * LOG2_E) - shift)


@triton.constexpr_function
def lift(dtype):
    """A power of two for probabilities, at most 1, that are rounded to float16: gates and long rows make them tiny."""
    return 4096.0 if dtype == tl.float16 else 1.0


@triton.jit
def load_rows(x_ptr, rows, mask_rows, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows of `DIM` contiguous elements that start at the offsets `rows` (64-bit): [ROWS, PADDED], 0 where masked.

    `mask_rows` None stands for rows that are all there.
    """
    offs = tl.arange(0, PADDED)
    mask = None
    if mask_rows is not None:
        mask = mask_rows[:, None]
        if PADDED != DIM:
            mask = mask & (offs < DIM)[None, :]
    elif PADDED != DIM:
        mask = (offs < DIM)[None, :]
    return tl.load(x_ptr + rows[:, None] + offs[None, :], mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_rows(
    x_ptr, rows, mask_rows, tile, DIM: tl.constexpr, PADDED: tl.constexpr, STREAMED: tl.constexpr = False
):  # fmt: skip
    """Stores a tile [ROWS, PADDED] as rows of `DIM` contiguous elements at the offsets `rows` (64-bit).

    STREAMED is for what is too large to be in a cache when it is read: other rows stay there in its place.
    """
    offs = tl.arange(0, PADDED)
    mask = mask_rows[:, None]
    if PADDED != DIM:
        mask = mask & (offs < DIM)[None, :]
    x_ptrs = x_ptr + rows[:, None] + offs[None, :]
    tl.store(x_ptrs, tile.to(x_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs" if STREAMED else "")
