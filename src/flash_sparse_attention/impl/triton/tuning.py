"""Loop orders and tiles of the kernels, with the measurements that chose them.

What `fsa tune` measured on a machine is kept in a file of its user, and comes before the built-in choices. A choice is
taken for calls of the same shape on a device of the same name, at lengths up to a factor of 4 away:

    entries measured at     8,192 tokens                    65,536 tokens
    calls of                2,048 ... 23,170                23,171 ... 262,144           others: built-in
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...config import NSAConfig
from ...validation import bad, check_choice, check_positive
from .primitives import padded

LOOP_ORDERS = ("kv_outer", "query_outer")
FILE_VERSION = 1
# Lengths that an entry speaks for: those up to this factor longer or shorter.
LENGTH_FACTOR = 4


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


# Kernels are built for these sizes, not for a length.
_FIXED_SIZES = tuple(name for name in SelectedShape._fields if name not in ("total_tokens", "dtype"))


@dataclass(frozen=True)
class KvOuterTiles:
    """Tile sizes of a KV-outer kernel.

    Attributes:
        rows: (token, head) rows of a tile.
        keys: tokens of a block that are held at once.
        segment_pairs: (token, slot) pairs of a segment at most.
        warps, stages: of the launch.
        registers: of a thread at most, or None.
        specialized: by the kernels of `selected_hopper`, on devices that have them: tiles of 64 rows and 64 keys, and
            warps, stages and registers of their own; 128 keys by those of `selected_wide_hopper`.
        dense_near: forward, near blocks by a kernel of their own (`selected_near`).
    """

    rows: int
    keys: int
    segment_pairs: int
    warps: int
    stages: int
    registers: int | None = None
    specialized: bool = False
    dense_near: bool = False


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


@dataclass(frozen=True)
class IntervalTiles:
    """Tile sizes of a kernel of interval attention: (token, head) rows and keys of a tile; see `KvOuterTiles`.

    `specialized`: by the kernels of `interval_hopper`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    specialized: bool = False


@dataclass(frozen=True)
class ScoreTiles:
    """Tile sizes of the kernel of block scores.

    Attributes:
        tokens: of a tile.
        keys: windows of a tile.
        warps, stages: of the launch.
        resident: heads of a group up to which the queries of all are held at once; at most 4.
        specialized: by the kernel of `block_scores_hopper`, for groups, windows and lengths that it is for.
    """

    tokens: int
    keys: int
    warps: int
    stages: int
    resident: int
    specialized: bool = False


# Programs that the work of a few new tokens is cut into at most: 3 on each of the 132 multiprocessors of an H200, which
# is what fits there at a time. Not measured yet, nor are the tiles below.
DECODE_PROGRAMS = 396
# Compressed keys of a share at least: fewer cost more to merge than they save.
LEAST_SHARE = 128
# Shares of the compressed keys, and of the blocks and the window, at most: all are merged by one program a row.
MOST_COMPRESSED_SHARES, MOST_TOKEN_SHARES = 64, 64
# Of the selection: chunks of a tile, about 8 scores of each head a thread; and blocks that are ranked at once.
SELECT_CHUNKS, SELECT_COLUMNS = 2048, 1024


@dataclass(frozen=True)
class DecodeTiles:
    """Tile sizes of the decoding kernels, and into how many shares they cut their work.

    Attributes:
        rows: (token, head) rows of a tile at most.
        compressed_keys: compressed tokens of a tile that lies in one page; shares are multiples of it.
        scattered_keys, scattered_stages: of tiles of several pages, whose keys are looked up one by one.
        keys: tokens of a block that are held at once.
        least_keys: compressed tokens of a share at least.
        compressed_splits, selected_splits, window_splits: shares of each branch at most.
        warps, stages: of the kernels that read the cache.
        blocks: of a tile of block importances.
        columns: blocks that are ranked at once.
        select_warps, merge_warps: of the kernels between and after.
        registers: of a thread of the kernels that read the cache at most, or None.
    """

    rows: int
    compressed_keys: int
    scattered_keys: int
    scattered_stages: int
    keys: int
    least_keys: int
    compressed_splits: int
    selected_splits: int
    window_splits: int
    warps: int
    stages: int
    blocks: int
    columns: int
    select_warps: int
    merge_warps: int
    registers: int | None

    @property
    def parts(self) -> int:
        """Partial outputs of a row at most."""
        return self.compressed_splits + self.selected_splits + self.window_splits

    @classmethod
    def of(
        cls,
        batch: int,
        tokens: int,
        num_kv_heads: int,
        group: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        chunks: int,
        config: NSAConfig,
        capability: int | None = None,
    ) -> DecodeTiles:
        """The tiles for a call.

        Args:
            batch, tokens: sequences, and new tokens of each.
            num_kv_heads, group, dims, dtype: heads, query heads of each, Dk and Dv, and of what type.
            chunks: that a sequence may have.
            config: the sizes.
            capability: of the device, 90 for sm_90; that of the current one by default.
        """
        capability = capability or device_capability()
        return _decode_tiles(batch, tokens, num_kv_heads, group, dims, dtype, chunks, config, capability)


@lru_cache(maxsize=1024)
def _decode_tiles(
    batch: int,
    tokens: int,
    num_kv_heads: int,
    group: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    chunks: int,
    config: NSAConfig,
    capability: int,
) -> DecodeTiles:
    """See `DecodeTiles.of`."""
    dim = padded(max(dims))
    rows, keys, stages = 32, 64, 3
    if dtype == torch.float32:
        rows, keys, stages = 16, 16 if dim > 64 else 32, 1
    elif dim > 128 or capability not in (80, *DATA_CENTRE):
        # What fits in registers and shared memory.
        keys = 32
    rows = min(rows, padded(tokens * group))
    programs = batch * num_kv_heads * -(-tokens * group // rows)
    compressed = max(1, min(DECODE_PROGRAMS // programs, -(-chunks // LEAST_SHARE), MOST_COMPRESSED_SHARES))
    # The smallest share of tiles of keys that makes no more programs than wanted.
    in_block = min(keys, padded(config.block_size))
    parts = -(-config.block_size // in_block)
    selected = config.num_selected_blocks * parts
    window = (-(-(config.window_size - 1) // config.block_size) + 1) * parts
    programs = batch * num_kv_heads * tokens * -(-group // rows)
    most = max(2, min(DECODE_PROGRAMS // programs, MOST_TOKEN_SHARES))
    share = next(s for s in range(1, selected + window) if -(-selected // s) - (-window // s) <= most)
    selected_splits, window_splits = -(-selected // share), -(-window // share)
    held = padded(compressed + selected_splits + window_splits) * padded(dims[1])
    blocks = max(4, SELECT_CHUNKS // padded(config.block_size // config.kernel_stride, 1))
    return DecodeTiles(
        rows=rows,
        compressed_keys=keys,
        scattered_keys=min(keys, 32),
        scattered_stages=stages + 2,
        keys=in_block,
        least_keys=LEAST_SHARE,
        compressed_splits=compressed,
        selected_splits=selected_splits,
        window_splits=window_splits,
        warps=4,
        stages=stages,
        blocks=blocks,
        columns=SELECT_COLUMNS,
        select_warps=8,
        merge_warps=max(1, min(held // 2048, 16)),
        registers=168 if keys == 64 and rows == 16 else None,
    )


def launch_options(tiles: KvOuterTiles | IntervalTiles | DecodeTiles) -> dict[str, int]:
    """Warps, and the bound of registers where there is one and the device knows such a bound."""
    options = {"num_warps": tiles.warps}
    if tiles.registers is not None and torch.version.hip is None:
        options["maxnreg"] = tiles.registers
    return options


class IntervalSchedule(NamedTuple):
    """Tiles of the kernels of interval attention: forward, dQ, and dK with dV."""

    forward: IntervalTiles
    dq: IntervalTiles
    dkv: IntervalTiles


class LoopOrders(NamedTuple):
    """The loop order of each pass, of `LOOP_ORDERS`.

    >>> str(LoopOrders("kv_outer", "kv_outer")), str(LoopOrders("query_outer", "kv_outer"))
    ('kv_outer', 'query_outer forward, kv_outer backward')
    """

    forward: str
    backward: str

    def __str__(self) -> str:
        if self.forward == self.backward:
            return self.forward
        return f"{self.forward} forward, {self.backward} backward"


@dataclass(frozen=True)
class TunedEntry:
    """What was measured for a shape on a device.

    Attributes:
        device: name of the device, as PyTorch has it.
        triton: version of Triton, for the reader.
        shape: what was measured.
        loop_orders: those whose forward and backward pass take the least time together.
        tiles: the fastest ones.
        ms: measured times, schedule -> `forward` and `backward` -> ms.
    """

    device: str
    triton: str
    shape: SelectedShape
    loop_orders: LoopOrders
    tiles: SelectedTiles
    ms: dict[str, dict[str, float]] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> tuple[str, SelectedShape]:
        """What a file has one entry for."""
        return self.device, self.shape

    def to_dict(self) -> dict[str, Any]:
        """The entry in types that JSON knows."""
        shape = self.shape._asdict()
        total_tokens = shape.pop("total_tokens")
        return {
            "device": self.device,
            "triton": self.triton,
            "shape": {**shape, "dtype": str(self.shape.dtype).removeprefix("torch.")},
            "total_tokens": total_tokens,
            "loop_order": self.loop_orders._asdict(),
            "tiles": asdict(self.tiles),
            "ms": self.ms,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TunedEntry:
        """The entry that `to_dict` wrote.

        Raises:
            ValueError, TypeError, KeyError: if `values` is not one.
        """
        sizes = dict(values["shape"])
        dtype = getattr(torch, str(sizes.pop("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise bad("dtype", "one of PyTorch", values["shape"]["dtype"])
        shape = SelectedShape(total_tokens=values["total_tokens"], **sizes, dtype=dtype)
        for name, size in shape._asdict().items():
            if name != "dtype":
                check_positive(name, size)
        loop_orders = LoopOrders(values["loop_order"]["forward"], values["loop_order"]["backward"])
        for loop_order in loop_orders:
            check_choice("loop_order", loop_order, LOOP_ORDERS)
        tiles = values["tiles"]
        chosen = SelectedTiles(
            KvOuterTiles(**tiles["kv_outer_forward"]),
            KvOuterTiles(**tiles["kv_outer_backward"]),
            QueryOuterTiles(**tiles["query_outer"]),
        )
        near = shape.block_size <= MOST_NEAR_BLOCK_SIZE
        _check_tiles(chosen.kv_outer_forward, _hopper_keys(shape, False), near)
        _check_tiles(chosen.kv_outer_backward, _hopper_keys(shape, True), False)
        _check_tiles(chosen.query_outer)
        ms = {
            str(schedule): {str(name): float(time) for name, time in times.items()}
            for schedule, times in values["ms"].items()
        }
        return cls(str(values["device"]), str(values["triton"]), shape, loop_orders, chosen, ms)


class Choice(NamedTuple):
    """The schedule of a shape, and the entry that it comes from; None if it is built in."""

    loop_orders: LoopOrders
    tiles: SelectedTiles
    entry: TunedEntry | None


def tiles_of(shape: SelectedShape, device: str | None = None) -> SelectedTiles:
    """The tiles for a shape, on the device of this name (the current one by default)."""
    return choice_of(shape, device).tiles


def loop_orders_of(shape: SelectedShape, loop_order: str, device: str | None = None) -> LoopOrders:
    """The loop orders that a choice (`auto`, `kv_outer` or `query_outer`) means for a shape, on a device."""
    return choice_of(shape, device).loop_orders if loop_order == "auto" else LoopOrders(loop_order, loop_order)


def choice_of(shape: SelectedShape, device: str | None = None) -> Choice:
    """What `auto` takes for a shape, on the device of this name (the current one by default)."""
    device = device_name() if device is None else device
    # Sizes that a compiler leaves open cannot be looked up; they are compared with, which bounds them.
    known = all(isinstance(size, int) for size in shape[:-1])
    return _choice_of(shape, device) if known else _choice_of.__wrapped__(shape, device)


@lru_cache(maxsize=4096)
def _choice_of(shape: SelectedShape, device: str) -> Choice:
    if ranges := _ranges():
        fixed: dict[str, Any] = {name: int(getattr(shape, name)) for name in _FIXED_SIZES}
        for first, last, entry in ranges.get((device, shape._replace(total_tokens=0, **fixed)), ()):
            if first <= shape.total_tokens <= last:
                return Choice(entry.loop_orders, entry.tiles, entry)
    return Choice(built_in_loop_orders(shape), built_in_tiles(shape), None)


# Heads of a group from which the query-outer order is the faster one. It reads each block once for every token and kv
# head, whatever the group, and pads groups to 16 rows; KV-outer's traffic grows with the query heads. An H200 took, ms
# forward + backward, 65,536 tokens, heads of 128, T = 16 (KV-outer | query-outer): G = 1 (4/4 heads) 1.2 + 1.7 | 17.2 +
# 18.0; G = 4 (32/8) 7.9 + 13.6 | 34.6 + 40.2; G = 8 (32/4) 7.8 + 14.7 | 17.1 + 24.1; G = 16 (64/4) 14.8 + 28.8 | 16.7 +
# 30.6; G = 32 (64/2) 14.8 + 32.5 | 11.3 + 26.9; G = 64 (64/1) 15.2 + 37.1 | 9.4 + 36.9. At 4,096 tokens as well: G = 16
# 0.80 + 1.50 | 1.02 + 1.79; G = 32 0.82 + 1.54 | 0.71 + 1.50. With the kernels of `selected_hopper` KV-outer is the
# faster one backward: G = 32 (64/2) 11.6 + 18.8 | 11.1 + 23.8; G = 64 (64/1) 11.7 + 19.2 | 9.2 + 28.6; at 4,096 tokens
# G = 64 0.73 + 1.05 | 0.60 + 1.70.
QUERY_OUTER_FROM_GROUP = 32


def built_in_loop_orders(shape: SelectedShape) -> LoopOrders:
    """The loop orders that `auto` takes where nothing was tuned; measured on sm_90, and taken for all architectures."""
    forward = "query_outer" if shape.group >= QUERY_OUTER_FROM_GROUP else "kv_outer"
    return LoopOrders(forward, "kv_outer" if _specializes(shape) and _knows_gluon() else forward)


# Slots of a selection from which near blocks have a kernel of their own, which costs as much as two slots do with the
# others, or nearly three; measured with 16.
LEAST_NEAR_SLOTS = 8
# Blocks of which the kernel of near blocks holds three at once.
MOST_NEAR_BLOCK_SIZE = 64


def built_in_tiles(shape: SelectedShape) -> SelectedTiles:
    """The tiles for a shape that was not tuned."""
    dim = padded(max(shape.dim_k, shape.dim_v))
    block, group = padded(shape.block_size), shape.group
    if shape.dtype == torch.float32:
        # For tests rather than for speed: twice the bytes, and products outside of the matrix units.
        narrow = 16 if dim > 128 else 64
        forward = KvOuterTiles(32, min(narrow, block), max(1, 2048 // group), 4, 1)
        edge = 16 if dim > 128 else 32
        backward = KvOuterTiles(edge, min(edge, block), max(1, 4096 // group), 4, 1)
        return SelectedTiles(forward, backward, QueryOuterTiles(min(edge, block), 2, 1))
    rows = shape.total_tokens * shape.num_kv_heads * shape.slots * group
    if dim > 128:
        forward = KvOuterTiles(64, min(64, block), max(1, 2048 // group), 4, 1)
        backward = KvOuterTiles(32, min(32, block), max(1, 8192 // group), 4, 1)
        return SelectedTiles(forward, backward, QueryOuterTiles(min(32, block), 2, 2))
    # H200, heads of 128, main kernels, ms. 65,536 tokens, 32/8 heads, T = 16, forward: 4.36 so; registers not bounded
    # 4.48; 2 stages 4.66; rows of a segment 1,024: 4.48, 4,096: 4.48. At 8,192 tokens 1,024 rows: 0.50, 2,048: 0.54,
    # 4,096: 0.67. Blocks of 128 at once: 1.91 with 2 stages, 2.40 with 1 and bounded registers, by halves 3.26.
    segment_rows = 2048 if rows >= 1 << 24 and group < 16 else 1024
    forward = KvOuterTiles(64, min(64, block), max(1, segment_rows // group), 4, 1, 128)
    specialized = _specializes(shape)
    if specialized and shape.block_size == 64:
        # Kernels of `selected_hopper`: 3.58 so; rows of a segment 2,048: 3.68, 8,192: 3.69. At 8,192 tokens 2,048 rows:
        # 0.401, 1,024: 0.404, 4,096: 0.423. With 64/4 heads the whole forward pass 12.00, 2,048 rows: 12.05.
        # Near blocks by a kernel of their own: main kernel 2.95, that kernel 0.51, merge 2.07; without, 3.63 and 2.31.
        # At 8,192 tokens 0.337, 0.068, 0.237; 0.41, 0.26. 64/4 heads 6.5, 0.92, 4.2; 8.2, 4.65. By the kernel for
        # other devices 0.76, which does not pay.
        near = shape.slots >= LEAST_NEAR_SLOTS
        pairs = max(1, (4096 if rows >= 1 << 24 else 2048) // group)
        forward = replace(forward, segment_pairs=pairs, specialized=True, dense_near=near)
    elif block == 128:
        # The kernel of `selected_wide_hopper`, the whole forward pass, 16/4 heads, 8 blocks of 128: 2.104 so, rows of a
        # segment 2,048: 2.155, 4,096: 2.114, 16,384: 2.078, by the kernel for any device 2.562. 64/4 heads 8.43, 8.36,
        # 8.21, 8.42, 9.36; 8,192 tokens of 32/8 heads 0.520, 0.527, 0.523, 0.527, 0.605. Fewer rows were not timed.
        wide = _knows_gluon() and WIDE_KEYS in _hopper_keys(shape, False) and device_capability() == 90
        segment_rows = 8192 if wide and rows >= 1 << 21 else SEGMENT_ROWS_OF_OTHERS
        forward = KvOuterTiles(64, 128, max(1, segment_rows // group), 4, 2, specialized=wide)
    elif block > 128:
        forward = KvOuterTiles(64, 64, max(1, 2048 // group), 4, 1)
    # Backward, main kernel and sum over segments: 10.12 so; rows of a segment 4,096: 10.57, 2,048: 11.55. Main kernel
    # alone: 9.5 to 9.9 so, 1 stage 10.9, 3 stages 15.7, 32 rows 10.8, 8 warps 13.6. At 8,192 tokens, both: 4,096 rows
    # 1.26, 2,048: 1.21, 8,192: 1.57. Kernels of `selected_hopper`, the whole backward pass: 8.83 so, rows of a segment
    # 8,192: 8.95, 4,096: 9.17; at 8,192 tokens 8,192 rows: 1.010, 4,096: 1.024, 2,048: 1.08. That of
    # `selected_wide_hopper`, 16/4 heads, 8 blocks of 128: 3.27 so, 8,192 rows: 3.38, 4,096: 3.48; 32/8 heads, 4 blocks
    # of 256: 6.85 so (8,192), 16,384: 8.02, 4,096: 6.98.
    # The parts of a block have programs of their own.
    enough = rows * (shape.block_size // 64) >= 1 << 24 if specialized else rows >= 1 << 24 and block <= 64
    keys = WIDE_KEYS if specialized and _can_be_wide(shape) and _knows_gluon() else min(64, block)
    segment_rows = (8192 if enough else 4096) * (2 if specialized and shape.block_size == keys else 1)
    backward = KvOuterTiles(64, keys, max(1, segment_rows // group), 4, 2, specialized=specialized)
    return SelectedTiles(forward, backward, QueryOuterTiles(min(64, block), 2, 2))


def _specializes(shape: SelectedShape) -> bool:
    """Whether the built-in tiles of the KV-outer order, backward at the least, are those of `selected_hopper`."""
    return _can_specialize(shape) and device_capability() == 90


def _hopper_keys(shape: SelectedShape, backward: bool) -> tuple[int, ...]:
    """The keys of tiles for which there are kernels for Hopper: forward whole blocks, backward parts of blocks."""
    if not _can_specialize(shape):
        return ()
    if not backward:
        wide = (WIDE_KEYS,) if shape.dim_k == 128 else ()
        return tuple(keys for keys in (64, *wide) if keys == shape.block_size)
    return (64, WIDE_KEYS) if _can_be_wide(shape) else (64,)


def _can_specialize(shape: SelectedShape) -> bool:
    """Whether there are kernels for Hopper for a shape; forward for blocks of 64 and 128 alone."""
    return shape.block_size % 64 == 0 and has_hopper_kernels(shape.dim_k, shape.dim_v, shape.dtype)


def has_hopper_kernels(dim_k: int, dim_v: int, dtype: torch.dtype) -> bool:
    """Whether `selected_hopper`, `interval_hopper`, `block_scores_hopper` and `merge_hopper` are for such heads."""
    return dim_k == dim_v and dim_k in (64, 128) and dtype in (torch.bfloat16, torch.float16)


def _can_be_wide(shape: SelectedShape) -> bool:
    """Whether `selected_wide_hopper` has a backward kernel for a shape."""
    return _can_specialize(shape) and shape.dim_k == 128 and shape.block_size % WIDE_KEYS == 0


# Keys that the kernels of `selected_wide_hopper` hold; and rows and warps with which the backward kernel for any device
# holds dK and dV of so many: compiled for sm_90 it spills 84 bytes so, 4,376 with 64 rows and 4 warps. Not timed.
WIDE_KEYS = 128
WIDE_TILES_OF_OTHERS: dict[str, Any] = {"rows": 32, "warps": 8}
# Rows of a segment of blocks of 128 by the forward kernel for any device.
SEGMENT_ROWS_OF_OTHERS = 2048
# Versions of Triton whose Gluon the kernels for Hopper were tried with, from and below: it changes.
GLUON_VERSIONS = ((3, 6), (3, 8))


def takes_hopper_kernels(tiles: KvOuterTiles | IntervalTiles | ScoreTiles, *tensors: Tensor) -> bool:
    """Whether tiles ask for kernels for Hopper, and the device, Triton and the tensors allow it.

    Their rows are copied 16 bytes at a time.
    """
    return (
        tiles.specialized
        and runs_gluon()
        and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)
    )


def runs_gluon() -> bool:
    """Whether the kernels for Hopper run on the current device: on sm_90, and not in Triton's interpreter."""
    return _knows_gluon() and triton.runtime.driver.active.get_current_target().arch == 90


def _knows_gluon() -> bool:
    """Whether this Triton has the language that the kernels for Hopper are written in."""
    first, end = GLUON_VERSIONS
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return not triton.knobs.runtime.interpret and first <= version < end


def early_launch() -> dict[str, bool]:
    """How kernels are launched that wait for the one before by themselves: on sm_90, before that one has ended.

    CUDA calls it programmatic dependent launch. Between two kernels so is what lies between two launches anyway; with
    `primitives.take_over` in the first one, the programs of the second one begin where the last ones of the first leave
    room, and do what they can before they wait.
    """
    return {"EARLY": True, "launch_pdl": True} if runs_gluon() else {"EARLY": False}


# Compute capabilities with more than 200 KiB of shared memory; most others have about 100.
DATA_CENTRE = (90, 100, 103)


def interval_schedule(
    dim_k: int, dim_v: int, dtype: torch.dtype, windowed: bool, capability: int | None = None
) -> IntervalSchedule:
    """The tiles of interval attention for head dimensions, to all keys so far or to a window of them.

    `capability` is that of the device, 90 for sm_90; that of the current one by default.
    """
    dim = padded(max(dim_k, dim_v))
    if dtype == torch.float32:
        edge = 16 if dim > 128 else 32
        small = IntervalTiles(edge, edge, 4, 1)
        return IntervalSchedule(small, small, small)
    capability = capability or device_capability()
    if dim > 128 and capability not in (80, *DATA_CENTRE):
        small = IntervalTiles(32, 32, 4, 1)
        return IntervalSchedule(small, small, small)
    if dim > 128:
        return IntervalSchedule(IntervalTiles(128, 64, 8, 2), IntervalTiles(64, 32, 8, 2), IntervalTiles(32, 64, 8, 2))
    if capability not in DATA_CENTRE:
        # What fits in registers and shared memory there; not measured.
        return IntervalSchedule(IntervalTiles(64, 64, 4, 2), IntervalTiles(64, 32, 4, 2), IntervalTiles(32, 64, 4, 2))
    # H200, 65,536 tokens, 32/8 heads of 128, ms. Window of 512, forward: 1.98 so; rows, keys, warps, stages 64, 64, 4,
    # 3: 2.23; 128, 64, 8, 3: 2.40. dQ: 2.42 so; 64, 32, 4, 3: 2.47; 128, 64, 8, 3: 2.61. dK and dV: 2.81 so; 32, 128,
    # 8, 3: 3.35; 64, 64, 4, 2: 3.33.
    hopper = capability == 90 and has_hopper_kernels(dim_k, dim_v, dtype)
    if windowed:
        # Kernels of `interval_hopper`: 1.52, 1.76 and 2.15.
        forward, dq, dkv = IntervalTiles(64, 32, 4, 3, 168), IntervalTiles(64, 64, 4, 2), IntervalTiles(32, 64, 4, 3)
        return IntervalSchedule(*(replace(tiles, specialized=hopper) for tiles in (forward, dq, dkv)))
    # Compressed, windows of 32 / 16, forward: 4.32 so, without descriptors 4.95; 128, 128, 8, 3: 4.37; 128, 64, 8, 3:
    # 4.55. dQ: 5.35 so, without descriptors 5.43; 64, 64, 4, 2: 5.52. dK and dV: 9.30 so; 3 stages 9.74; 32, 128, 8, 4:
    # 11.4; 64, 64, 4, 2: 13.1; 128, 128, 8, 2: 18.0. Kernels of `interval_hopper`: 3.76, 4.82 and 7.4.
    forward, dq, dkv = IntervalTiles(64, 64, 4, 3), IntervalTiles(128, 64, 8, 3), IntervalTiles(64, 128, 8, 4)
    return IntervalSchedule(*(replace(tiles, specialized=hopper) for tiles in (forward, dq, dkv)))


def score_tiles(dim: int, dtype: torch.dtype, capability: int | None = None) -> ScoreTiles:
    """The tiles of block scores for a head dimension; `capability` as for `interval_schedule`."""
    if dtype == torch.float32:
        return ScoreTiles(32, 32, 4, 1, 1)
    capability = capability or device_capability()
    if capability not in DATA_CENTRE:
        return ScoreTiles(64, 32 if padded(dim) > 128 else 64, 4, 2, 1)
    if padded(dim) > 128:
        return ScoreTiles(64, 64, 4, 2, 2)
    # H200, 65,536 tokens, 32/8 heads of 128, ms: 2.99 so; with all tiles loaded by threads 3.12; 3 stages 3.92; tokens,
    # keys, warps, stages 128, 64, 8, 2: 3.56; queries loaded for each tile of keys: 4.0.
    specialized = capability == 90 and has_hopper_kernels(dim, dim, dtype)
    return ScoreTiles(64, 64, 4, 2, 4, specialized)


def tuning_file() -> Path:
    """Where choices are kept: `$FSA_TUNING_CACHE`, or a file in the user's folder for caches."""
    if file := os.environ.get("FSA_TUNING_CACHE"):
        return Path(os.path.expanduser(file))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches, "flash-sparse-attention", "tuning.json")


def read_entries(file: Path) -> list[TunedEntry]:
    """The entries of a file; none if it does not exist.

    Raises:
        ValueError: if it holds something else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != FILE_VERSION:
            raise bad("version", str(FILE_VERSION), content["version"])
        return [TunedEntry.from_dict(values) for values in content["entries"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = f"{str(file)!r} ({type(error).__name__}: {error})"
        raise bad("the tuning file", "one that `fsa tune` wrote", got, "delete it, or set FSA_TUNING_CACHE") from error


def store(entry: TunedEntry) -> Path:
    """Adds an entry to the file, in place of one for the same shape and device; others stay. Returns the file.

    The file is replaced at once, so that a reader never finds half of it.

    Raises:
        ValueError: if the file that is there is not one of tuned choices.
        OSError: if it cannot be written.
    """
    file = tuning_file()
    entries = {known.key: known for known in read_entries(file)} | {entry.key: entry}
    content = {"version": FILE_VERSION, "entries": [known.to_dict() for known in entries.values()]}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=file.name, suffix=".tmp", dir=file.parent)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    reset_tuning()
    return file


def reset_tuning() -> None:
    """Forgets the file, which is read once a process, so that the next call reads it again.

    Not between a forward pass and its backward pass, which must cut their work alike.
    """
    for cached in (_choice_of, _ranges, _cuda_name, _has_cuda):
        cached.cache_clear()


def device_name() -> str:
    """Name of the current CUDA device; empty if there is none."""
    return _cuda_name(torch.cuda.current_device()) if _has_cuda() else ""


def device_capability() -> int:
    """Compute capability of the current CUDA device, 90 for 9.0; 90 if there is none."""
    return _cuda_capability(torch.cuda.current_device()) if _has_cuda() else 90


@lru_cache(maxsize=64)
def _cuda_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache(maxsize=1)
def _has_cuda() -> bool:
    return torch.cuda.is_available()


@lru_cache(maxsize=64)
def _cuda_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache(maxsize=1)
def _ranges() -> dict[tuple[str, SelectedShape], list[tuple[int, int, TunedEntry]]]:
    """(device, shape of 0 tokens) -> the entries by length, with the first and last length that each one speaks for."""
    try:
        entries = read_entries(tuning_file())
    except (ValueError, OSError) as error:
        warnings.warn(f"tuned kernels are not used: {error}", stacklevel=2)
        entries = []
    grouped = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry.shape.total_tokens):
        grouped[entry.device, entry.shape._replace(total_tokens=0)].append(entry)
    return {key: list(_by_length(group)) for key, group in grouped.items()}


def _by_length(entries: list[TunedEntry]) -> Iterable[tuple[int, int, TunedEntry]]:
    """Entries of one shape, in the order of their lengths, with the lengths that each one is the nearest to."""
    lengths = [entry.shape.total_tokens for entry in entries]
    # The nearest by ratio: the bound of two lengths is their geometric mean.
    bounds = [math.isqrt(a * b) for a, b in pairwise(lengths)]
    starts, ends = [0, *(bound + 1 for bound in bounds)], [*bounds, lengths[-1] * LENGTH_FACTOR]
    for entry, length, start, end in zip(entries, lengths, starts, ends, strict=True):
        yield max(start, -(-length // LENGTH_FACTOR)), min(end, length * LENGTH_FACTOR), entry


def _check_tiles(
    tiles: KvOuterTiles | QueryOuterTiles, hopper_keys: tuple[int, ...] = (64,), can_near: bool = True
) -> None:
    """Every tile is an integer that a kernel can be built for; `hopper_keys` of those for Hopper."""
    for name, size in asdict(tiles).items():
        if name == "specialized":
            fits = isinstance(tiles, KvOuterTiles) and tiles.rows == 64 and tiles.keys in hopper_keys
            if size is not False and not (size is True and fits):
                raise bad(name, "true only for what there are kernels for Hopper for, false otherwise", size)
            continue
        if name == "dense_near":
            if size is not False and not (size is True and can_near):
                raise bad(name, "true only for the forward pass, of blocks of up to 64, false otherwise", size)
            continue
        if name == "registers" and size is None:
            continue
        check_positive(name, size)
        if name in ("rows", "keys", "warps") and size & (size - 1):
            raise bad(name, "a power of two", size)
        if name in ("rows", "keys") and size < 16:
            raise bad(name, "at least 16", size)
