"""How much each operator computes and moves: the models behind TFLOP/s, TB/s and the share of the roofline.

FLOPs count a multiplication with an addition as 2, and only products of matrices. Of a pair of a query row (token and
query head) and a key that it sees, attention takes two products of Dk and Dv numbers forward, and five backward:

    forward    S = q k^T, out = P v                                            2 (Dk + Dv)
    backward   S again, dP = dO v^T, dV = P^T dO, dK = dS^T q, dQ = dS k       2 (3 Dk + 2 Dv)

What a kernel computes beyond that (masked halves of tiles, products that two passes take twice) does not count.

Bytes are the least that has to move: each input read once and each output written once. `moved_bytes` are those that
the schedule moves, where it writes down intermediate results.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import geometry
from ..geometry import Interval
from .shapes import Shape

_LSE_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of a run; see `results.Row`."""

    flops: float
    bytes: float
    moved_bytes: float | None = None

    def __add__(self, other: Cost) -> Cost:
        """Both, one behind the other."""
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def interval_pairs(tokens: int, interval: Interval) -> int:
    """Pairs of a token and a key that it sees, in one sequence.

    >>> interval_pairs(4, Interval()), interval_pairs(4, Interval(window_size=2))
    (10, 7)
    """
    token = torch.arange(tokens)
    return int((interval.end(token) - interval.start(token)).clamp(min=0).sum())


def selected_pairs(block_indices: Tensor, block_size: int) -> int:
    """Pairs of a token and a key that it sees in the blocks it selected, over all kv heads; one sequence.

    >>> selected_pairs(torch.tensor([[[0, -1]], [[0, -1]], [[0, 1]]]), 2)
    6
    """
    token = torch.arange(len(block_indices), device=block_indices.device)[:, None, None]
    seen = (token + 1 - block_indices.long() * block_size).clamp(0, block_size)
    return int(seen.where(block_indices >= 0, 0).sum())


def attention(shape: Shape, pairs: int, keys: int, direction: str) -> Cost:
    """Softmax attention of all tokens to `keys` keys.

    Args:
        shape: sizes.
        pairs: of a token and a key that it sees, for one query head.
        keys: rows of k and v.
        direction: `forward` or `backward`.
    """
    dk, dv, rows = shape.head_dim, shape.head_dim_v, shape.tokens * shape.heads
    q_and_out = rows * (dk + dv) * shape.dtype.itemsize + rows * _LSE_BYTES
    k_and_v = keys * shape.kv_heads * (dk + dv) * shape.dtype.itemsize
    if direction == "forward":
        return Cost(2.0 * (dk + dv) * shape.heads * pairs, q_and_out + k_and_v)
    # Also dO, dQ, dK and dV.
    return Cost(2.0 * (3 * dk + 2 * dv) * shape.heads * pairs, 2 * (q_and_out + k_and_v))


def full(shape: Shape, direction: str) -> Cost:
    """Full causal attention."""
    return attention(shape, shape.tokens * (shape.tokens + 1) // 2, shape.tokens, direction)


def window(shape: Shape, direction: str) -> Cost:
    """The sliding window."""
    interval = Interval(window_size=shape.nsa.window_size)
    return attention(shape, interval_pairs(shape.tokens, interval), shape.tokens, direction)


def compressed(shape: Shape, direction: str) -> Cost:
    """Attention to the compressed tokens."""
    interval = Interval(shape.nsa.kernel_size, shape.nsa.kernel_stride)
    return attention(shape, interval_pairs(shape.tokens, interval), shape.windows, direction)


def selected(shape: Shape, block_indices: Tensor, direction: str, kv_outer: bool = False) -> Cost:
    """Selected attention.

    In the KV-outer order each entry of the selection costs a row of q, and a partial row of out with its lse, written
    and read once, for every head of the group; backward the same for q, dO and a partial row of dQ.
    """
    pairs = selected_pairs(block_indices, shape.nsa.block_size)
    least = attention(shape, pairs // shape.kv_heads, shape.tokens, direction)
    if not kv_outer:
        return least
    rows = int((block_indices >= 0).sum()) * shape.group
    dk, dv, size = shape.head_dim, shape.head_dim_v, shape.dtype.itemsize
    if direction == "forward":
        return Cost(least.flops, least.bytes, rows * ((dk + 2 * dv) * size + 2 * _LSE_BYTES) + least.bytes)
    return Cost(least.flops, least.bytes, rows * ((3 * dk + dv) * size + 2 * _LSE_BYTES) + least.bytes)


def index(shape: Shape) -> Cost:
    """The inverted index: reads the selection, writes a pair and a place for each of its entries."""
    return Cost(0.0, 3.0 * 4 * shape.tokens * shape.kv_heads * shape.nsa.num_selected_blocks)


def selection(shape: Shape) -> Cost:
    """Block scores and the choice of blocks: the scores of the compressed keys once more, nothing else written."""
    interval = Interval(shape.nsa.kernel_size, shape.nsa.kernel_stride)
    pairs = interval_pairs(shape.tokens, interval)
    q = shape.tokens * shape.heads * (shape.head_dim * shape.dtype.itemsize + _LSE_BYTES)
    k = shape.windows * shape.kv_heads * shape.head_dim * shape.dtype.itemsize
    chosen = 4 * shape.tokens * shape.kv_heads * shape.nsa.num_selected_blocks
    return Cost(2.0 * shape.head_dim * shape.heads * pairs, q + k + chosen)


def compress(shape: Shape, direction: str) -> Cost:
    """Means of the windows of one tensor of keys or values: no product, and the same traffic in both directions."""
    rows = shape.tokens + shape.windows
    return Cost(0.0, rows * shape.kv_heads * shape.head_dim * shape.dtype.itemsize)


def combine(shape: Shape, direction: str) -> Cost:
    """The gated sum of three branches."""
    outs = shape.tokens * shape.heads * shape.head_dim_v * shape.dtype.itemsize
    gates = shape.tokens * shape.heads * 3 * shape.dtype.itemsize
    return Cost(0.0, 4 * outs + gates if direction == "forward" else 7 * outs + 2 * gates)


def whole(shape: Shape, direction: str) -> Cost:
    """The whole attention: compression of k and v, three branches, the selection (forward), the gated sum.

    Every query keeps as many blocks as it may; bytes are those of the parts, of which a fused kernel could save some.
    """
    blocks = torch.arange(shape.tokens) + 1
    kept = shape.nsa.num_selected_blocks * shape.nsa.block_size
    missing = geometry.num_blocks(blocks, shape.nsa.block_size) * shape.nsa.block_size - blocks
    pairs = int(torch.minimum(blocks, kept - missing).sum())
    values = dataclasses.replace(shape, head_dim=shape.head_dim_v)
    parts = compress(shape, direction) + compress(values, direction)
    parts = parts + compressed(shape, direction) + window(shape, direction) + combine(shape, direction)
    parts = parts + attention(shape, pairs, shape.tokens, direction)
    return parts + selection(shape) if direction == "forward" else parts
