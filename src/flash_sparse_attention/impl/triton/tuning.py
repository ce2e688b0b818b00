"""Loop orders and tiles of the kernels, with the measurements that chose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .primitives import padded


class SelectedShape(NamedTuple):
    """What the speed of selected attention depends on."""

    total_tokens: int
    num_kv_heads: int
    group: int
    slots: int
    block_size: int
    dim_k: int
    dim_v: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int) -> SelectedShape:
        """The shape of a call."""
        heads = k.shape[1]
        return cls(
            q.shape[0], heads, q.shape[1] // heads, block_indices.shape[2], block_size, q.shape[2], v.shape[2], q.dtype
        )


@dataclass(frozen=True)
class KvOuterTiles:
    """Tile sizes of a KV-outer kernel.

    Attributes:
        rows: (token, head) rows of a tile.
        keys: tokens of a block that are held at once.
        segment_pairs: (token, slot) pairs of a segment at most.
        warps, stages: of the launch.
        registers: of a thread at most, or None.
    """

    rows: int
    keys: int
    segment_pairs: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class QueryOuterTiles:
    """Tile sizes of the query-outer kernels: see `KvOuterTiles`."""

    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class SelectedTiles:
    """Tiles of all kernels of selected attention."""

    kv_outer_forward: KvOuterTiles
    kv_outer_backward: KvOuterTiles
    query_outer: QueryOuterTiles


def tiles_of(shape: SelectedShape) -> SelectedTiles:
    """The tiles for a shape."""
    dim = padded(max(shape.dim_k, shape.dim_v))
    block, group = padded(shape.block_size), shape.group
    if shape.dtype == torch.float32:
        # For tests rather than for speed: twice the bytes, and products outside of the matrix units.
        narrow = 32 if dim > 128 else 64
        forward = KvOuterTiles(32, min(narrow, block), max(1, 2048 // group), 4, 1)
        backward = KvOuterTiles(32, min(32, block), max(1, 4096 // group), 4, 1)
        return SelectedTiles(forward, backward, QueryOuterTiles(min(32, block), 2, 1))
    if dim > 128:
        forward = KvOuterTiles(64, min(64, block), max(1, 4096 // group), 4, 1)
        backward = KvOuterTiles(32, min(32, block), max(1, 8192 // group), 4, 1)
        return SelectedTiles(forward, backward, QueryOuterTiles(min(32, block), 2, 2))
    # 65,536 tokens, 32/8 heads of 128, T = 16 on an H200, main kernel. Forward: 4.30 ms so, 4.48 without the bound of
    # registers, 4.36 with 2 stages, 7.9 with 32 rows; backward: 9.46 so, 10.9 with 1 stage, 10.3 with 32 rows, 13.6
    # with 8 warps.
    forward = KvOuterTiles(64, min(128, block), max(1, 4096 // group), 4, 1, 128 if block <= 64 else None)
    backward = KvOuterTiles(64, min(64, block), max(1, 8192 // group), 4, 2)
    return SelectedTiles(forward, backward, QueryOuterTiles(min(64, block), 2, 2))


def loop_order_of(shape: SelectedShape, loop_order: str) -> str:
    """The loop order that a choice (`auto`, `kv_outer` or `query_outer`) means for a shape."""
    if loop_order != "auto":
        return loop_order
    return "kv_outer"
