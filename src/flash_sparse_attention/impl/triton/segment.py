"""What the programs that own a segment of a bucket share; see `inverted_index`.

These functions serve Triton and Gluon, whose tensors have layouts: they make no tensors but scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .inverted_index import SEGMENT_FIELDS
from .primitives import block_bounds, bounds_of_keys, keys_ahead

FIELDS = tl.constexpr(SEGMENT_FIELDS)


@triton.jit
def segment_of_program(table_ptr, ends_ptr, first_place, places):
    """First pair (of all, and of the chunk), pairs, bucket and tile of this program's segment; it may have no pairs.

    The chunk has `places` ends, the first at `first_place`.
    """
    segment = tl.program_id(0) + tl.load(ends_ptr + first_place - 1, mask=first_place > 0, other=0)
    exists = segment < tl.load(ends_ptr + first_place + places - 1)
    row = table_ptr + segment.to(tl.int64) * FIELDS  # see Segments
    first_pair = tl.load(row, mask=exists, other=0)
    in_chunk = first_pair - tl.load(row + 1, mask=exists, other=0)
    pairs = tl.load(row + 2, mask=exists, other=0)
    bucket = tl.load(row + 3, mask=exists, other=0)
    tile = tl.load(row + 4, mask=exists, other=0)
    return first_pair, in_chunk, pairs, bucket, tile


@triton.jit
def keys_of_bucket(block, cu_seqlens_ptr, cu_seqlens_k_ptr, num_sequences, BLOCK_SIZE: tl.constexpr):
    """First key of a block of the pack, one past its last, and how far keys are ahead of queries; see `keys_ahead`."""
    bounds_ptr = bounds_of_keys(cu_seqlens_ptr, cu_seqlens_k_ptr)
    start, end, sequence = block_bounds(block, bounds_ptr, num_sequences, BLOCK_SIZE)
    return start, tl.minimum(end, start + BLOCK_SIZE), keys_ahead(sequence, cu_seqlens_ptr, cu_seqlens_k_ptr)


@triton.jit
def _mask(mask_rows, offs, DIM: tl.constexpr):
    """The mask of a tile, of which `offs` are the columns; those past `DIM` are not there."""
    mask = mask_rows[:, None]
    if offs.shape[0] != DIM:
        mask = mask & (offs < DIM)[None, :]
    return mask


@triton.jit
def _load(x_ptr, rows, mask_rows, offs, DIM: tl.constexpr):
    """`primitives.load_rows` of the columns `offs`."""
    mask = _mask(mask_rows, offs, DIM)
    return tl.load(x_ptr + rows[:, None] + offs[None, :], mask=mask, other=0.0)


@triton.jit
def _store(x_ptr, rows, mask_rows, offs, tile, DIM: tl.constexpr):
    """`primitives.store_rows` of the columns `offs`."""
    mask = _mask(mask_rows, offs, DIM)
    tl.store(x_ptr + rows[:, None] + offs[None, :], tile.to(x_ptr.dtype.element_ty), mask=mask)


# What rounding leaves of a number lies between -127 and 127 units, and is stored on top of this.
REST_OF_ZERO = tl.constexpr(128.0)


@triton.jit
def _rest_unit(x):
    """What 1 stands for in what rounding left of the numbers `x`, in half precision: half of their last bit / 127."""
    FLOAT16: tl.constexpr = x.dtype == tl.float16
    exponent = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    power = exponent.to(tl.float32, bitcast=True)
    # Smaller ones have the last bit of the smallest that is normal; of bfloat16, of one that is as good as 0.
    least: tl.constexpr = 2.0**-14 if FLOAT16 else 2.0**-100
    half_of_last: tl.constexpr = 2.0**-11 if FLOAT16 else 2.0**-8
    return tl.maximum(power, least) * (half_of_last / 127)


@triton.jit
def add_up(
    total, sum_ptr, grad_ptr, key, offs, mask, head, first_head, chunk_heads, add, last, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Adds what the chunks of tokens before have of the keys, and stores the sum, or after the last the gradient.

    The sum is in float32 where that is the dtype of `sum_ptr`; otherwise in the gradient, and in `sum_ptr` what
    rounding it left, 8 more bits. `total` is [KEYS, columns], of the keys `key` and the columns `offs`.
    """
    if sum_ptr.dtype.element_ty == tl.float32:
        sum_rows = (key.to(tl.int64) * chunk_heads + head - first_head) * DIM
        total += _load(sum_ptr, sum_rows, mask & (add != 0), offs, DIM)
        if last != 0:
            _store(grad_ptr, (key.to(tl.int64) * HEADS + head) * DIM, mask, offs, total * scale, DIM)
        else:
            _store(sum_ptr, sum_rows, mask, offs, total, DIM)
    else:
        grad_rows = (key.to(tl.int64) * HEADS + head) * DIM
        sum_rows = (key.to(tl.int64) * chunk_heads + head - first_head) * DIM
        total *= scale
        if add != 0:
            grad = _load(grad_ptr, grad_rows, mask, offs, DIM)
            rest = _load(sum_ptr, sum_rows, mask, offs, DIM).to(tl.float32) - REST_OF_ZERO
            total += rest * _rest_unit(grad) + grad.to(tl.float32)
        grad = total.to(grad_ptr.dtype.element_ty)
        if last == 0:
            rest = (total - grad.to(tl.float32)) / _rest_unit(grad)
            _store(sum_ptr, sum_rows, mask, offs, rest + (REST_OF_ZERO + 0.5), DIM)
        _store(grad_ptr, grad_rows, mask, offs, grad, DIM)
