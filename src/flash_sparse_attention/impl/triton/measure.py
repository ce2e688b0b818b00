"""Measures which tiles and which loop order are the fastest for a shape, on the device at hand.

for each kernel:   built-in tiles -> ms          what the others are held against, in time and in value
                   candidate      -> ms | why it is out: does not compile, too large, other values
then each loop order forward with each one backward, with the best tiles, as calls run them
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from ... import geometry
from ...types import SequenceLayout
from ...validation import bad
from .delta import launch_shifts
from .inverted_index import InvertedIndex, build_index, mark_valid
from .ops.selected import chunks_of
from .primitives import padded
from .selected_kv_outer import launch_selected_bwd_kv_outer, launch_selected_fwd_kv_outer
from .selected_query_outer import launch_selected_dq_query_outer, launch_selected_fwd_query_outer
from .tuning import (
    LOOP_ORDERS,
    MOST_NEAR_BLOCK_SIZE,
    WIDE_KEYS,
    WIDE_TILES_OF_OTHERS,
    KvOuterTiles,
    LoopOrders,
    QueryOuterTiles,
    SelectedShape,
    SelectedTiles,
    TunedEntry,
    built_in_loop_orders,
    built_in_tiles,
)

WARM_UPS, REPEATS = 2, 7
WORKSPACE_MIB = 1024
# The largest error of a candidate, as a share of the largest value: rounding differs with the tiles, and no more.
MAX_ERROR = {torch.float32: 1e-4}
MAX_ERROR_HALF = 2e-2
# Share of the time that a candidate must save, as must passes in different loop orders, so that noise does not choose.
MIN_GAIN = 0.02
KERNELS = ("kv_outer_forward", "kv_outer_backward", "query_outer")

Tiles = TypeVar("Tiles", bound=KvOuterTiles | QueryOuterTiles)


class Candidates(NamedTuple):
    """Tiles to try for each kernel, the built-in ones first."""

    kv_outer_forward: list[KvOuterTiles]
    kv_outer_backward: list[KvOuterTiles]
    query_outer: list[QueryOuterTiles]


class Step(NamedTuple):
    """What became of a candidate.

    Attributes:
        kernel: one of `KERNELS`.
        number, total: of the candidates of this kernel, counted from 1.
        tiles: the candidate.
        ms: its time, or None.
        problem: why it has none.
    """

    kernel: str
    number: int
    total: int
    tiles: KvOuterTiles | QueryOuterTiles
    ms: float | None
    problem: str = ""


def candidates(shape: SelectedShape) -> Candidates:
    """Tiles that are worth a try for a shape; those that gain most often come early.

    The keys of the KV-outer kernels stay: those of the backward pass decide how both passes cut the work.
    """
    base = built_in_tiles(shape)
    near = [{"dense_near": not base.kv_outer_forward.dense_near}] if shape.block_size <= MOST_NEAR_BLOCK_SIZE else []
    return Candidates(
        _around(base.kv_outer_forward, near + _kv_outer_changes(base.kv_outer_forward)),
        _around(base.kv_outer_backward, _kv_outer_changes(base.kv_outer_backward, backward=True)),
        _around(base.query_outer, _query_outer_changes(base.query_outer, padded(shape.block_size))),
    )


def _around(base: Tiles, changes: Sequence[dict[str, Any]]) -> list[Tiles]:
    return list(dict.fromkeys([base] + [replace(base, **change) for change in changes]))


def _kv_outer_changes(base: KvOuterTiles, backward: bool = False) -> list[dict[str, Any]]:
    changes: list[dict[str, Any]] = [
        {"stages": 2},
        {"stages": 1},
        {"rows": 128, "warps": 8, "registers": None},
        {"segment_pairs": max(1, base.segment_pairs // 2)},
        {"segment_pairs": base.segment_pairs * 2},
        {"registers": None},
        {"registers": 168},
        {"registers": 128},
        {"stages": 3},
        {"rows": 32, "registers": None},
        {"rows": 64, "warps": 8, "registers": None},
        {"rows": 128, "registers": None},
    ]
    if base.specialized:
        # Tiles of their own are fixed. The other kernels were slower wherever both were measured: few of them.
        factors = 0.5, 2.0, 0.25, 4.0
        segments = [{"segment_pairs": max(1, round(base.segment_pairs * factor))} for factor in factors]
        others = [{}, *changes[:5]]
        if backward and base.keys == WIDE_KEYS:
            others = [{**WIDE_TILES_OF_OTHERS, "stages": stages} for stages in (2, 1)]
        elif base.keys == WIDE_KEYS:
            others.append({"segment_pairs": max(1, base.segment_pairs // 4)})
        return [*segments, *({"specialized": False, "dense_near": False, **change} for change in others)]
    return changes


def _query_outer_changes(base: QueryOuterTiles, block: int) -> list[dict[str, Any]]:
    return [
        {"warps": 4},
        {"stages": 3},
        {"stages": 1},
        {"keys": min(32, block)},
        {"keys": min(128, block), "warps": 4},
        {"warps": 1},
        {"warps": 4, "stages": 3},
        {"keys": min(32, block), "stages": 3},
        {"warps": 8},
    ]


def tune(
    shape: SelectedShape,
    layout: SequenceLayout | None = None,
    device: torch.device | str = "cuda",
    seconds: float = 60.0,
    progress: Callable[[Step], None] | None = None,
) -> TunedEntry:
    """The fastest tiles and loop order for a shape, measured; stores nothing.

    Args:
        shape: sizes and dtype; inputs are random, see `Problem`.
        layout: of its tokens; one sequence by default.
        device: where to measure, the current CUDA device.
        seconds: after which no more candidates are begun. Each kernel has a third, and what those before it left. The
            inputs come on top, and so do the loop orders, which are always measured, as the built-in tiles are.
        progress: called after each candidate.

    Raises:
        ValueError: if `layout` has another number of tokens.
    """
    device = torch.device(device)
    layout = layout or SequenceLayout.uniform(1, shape.total_tokens, device)
    if layout.total_tokens != shape.total_tokens:
        raise bad("layout", f"of the N={shape.total_tokens} tokens of the shape", layout.total_tokens)
    problem = Problem.random(shape, layout.to(device), device)
    built_in, tried = built_in_tiles(shape), candidates(shape)
    begin = time.monotonic()
    ends = [begin + seconds * (i + 1) / len(KERNELS) for i in range(len(KERNELS))]
    report = progress or (lambda step: None)
    tiles = SelectedTiles(
        _Search("kv_outer_forward", problem.kv_outer_forward, shape.dtype, ends[0], report).best(
            tried.kv_outer_forward
        ),
        _Search("kv_outer_backward", problem.kv_outer_backward, shape.dtype, ends[1], report).best(
            tried.kv_outer_backward
        ),
        _Search("query_outer", problem.query_outer, shape.dtype, ends[2], report).best(tried.query_outer),
    )
    forward_ms = {order: time_ms(partial(problem.forward, order, tiles)) for order in LOOP_ORDERS}
    tried_orders = [LoopOrders(*orders) for orders in product(LOOP_ORDERS, repeat=2)]
    ms = {
        str(orders): {"forward": forward_ms[orders.forward], "backward": _backward_ms(problem, orders, tiles)}
        for orders in tried_orders
    }
    orders = built_in_loop_orders(shape)
    ms["built_in"] = {
        "forward": time_ms(lambda: problem.forward(orders.forward, built_in)),
        "backward": _backward_ms(problem, orders, built_in),
    }

    def cost(orders: LoopOrders) -> float:
        same = orders.forward == orders.backward
        return sum(ms[str(orders)].values()) * (1 if same else 1 + MIN_GAIN)

    loop_orders = min(tried_orders, key=cost)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return TunedEntry(name, triton.__version__, shape, loop_orders, tiles, ms)


def time_ms(launch: Callable[[], object]) -> float:
    """Median time of a launch on the current CUDA device, ms."""
    for _ in range(WARM_UPS):
        launch()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


@dataclass
class Problem:
    """Random inputs of a shape, and the launches over them.

    Every token selects the first block of its sequence, its own, the one before that, and blocks at random. Trained
    models choose nearer blocks more often, which makes caches hit more often, in either loop order.

    Attributes:
        shape: sizes and dtype.
        layout: of the tokens.
        q, k, v, d_out: `[N, Hq, Dk]`, `[N, Hk, Dk]`, `[N, Hk, Dv]`, `[N, Hq, Dv]`.
        block_indices: int32 `[N, Hk, T]`.
        index: of `block_indices`.
        lse: of the forward pass, `[N, Hq]`.
        shift, delta: of the backward pass, `[N, Hq]`.
    """

    shape: SelectedShape
    layout: SequenceLayout
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    block_indices: Tensor
    index: InvertedIndex
    lse: Tensor
    shift: Tensor
    delta: Tensor

    @classmethod
    def random(cls, shape: SelectedShape, layout: SequenceLayout, device: torch.device) -> Problem:
        """The problem of a shape; the same each time."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, dim: int) -> Tensor:
            size = shape.total_tokens, heads, dim
            return torch.randn(size, generator=generator, dtype=shape.dtype, device=device)

        heads = shape.num_kv_heads * shape.group
        q, k = normal(heads, shape.dim_k), normal(shape.num_kv_heads, shape.dim_k)
        v, d_out = normal(shape.num_kv_heads, shape.dim_v), normal(heads, shape.dim_v)
        block_indices = random_selection(shape, layout, generator)
        index = build_index(
            block_indices,
            layout.cu_seqlens,
            shape.block_size,
            chunks_of(shape, block_indices, shape.total_tokens, layout.cu_seqlens, WORKSPACE_MIB),
        )
        problem = cls(shape, layout, q, k, v, d_out, block_indices, index, d_out, d_out, d_out)
        out, problem.lse = problem.kv_outer_forward(built_in_tiles(shape).kv_outer_forward)
        problem.shift, problem.delta = launch_shifts(d_out, torch.zeros_like(problem.lse), out, problem.lse)
        return problem

    @property
    def sizes(self) -> tuple[Tensor, int, float]:
        """What all launches take: bounds of the sequences, block size, scale."""
        return self.layout.cu_seqlens, self.shape.block_size, self.shape.dim_k**-0.5

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the launches of the backward pass take."""
        return self.d_out, self.q, self.k, self.v, self.shift, self.delta

    def build(self) -> InvertedIndex:
        """The inverted index, built again."""
        return build_index(self.block_indices, self.layout.cu_seqlens, self.shape.block_size, self.index.chunks)

    def kv_outer_forward(self, tiles: KvOuterTiles) -> tuple[Tensor, ...]:
        """out and lse."""
        given = self.q, self.k, self.v, self.block_indices
        return launch_selected_fwd_kv_outer(*given, self.index, *self.sizes, tiles)

    def kv_outer_backward(self, tiles: KvOuterTiles) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        dq = torch.empty_like(self.q)
        return dq, *launch_selected_bwd_kv_outer(*self.given, self.index, *self.sizes, tiles, dq)

    def query_outer(self, tiles: QueryOuterTiles) -> tuple[Tensor, ...]:
        """out, lse and the gradient of q, by the kernels that share these tiles."""
        given, place = (self.q, self.k, self.v), self.index.place
        out, lse = launch_selected_fwd_query_outer(*given, self.block_indices, place, *self.sizes, tiles)
        return out, lse, launch_selected_dq_query_outer(*self.given, self.block_indices, place, *self.sizes, tiles)

    def forward(self, loop_order: str, tiles: SelectedTiles) -> None:
        """All that a forward pass launches."""
        if loop_order == "query_outer":
            place = mark_valid(self.block_indices, self.layout.cu_seqlens, self.shape.block_size)
            given = self.q, self.k, self.v, self.block_indices, place
            launch_selected_fwd_query_outer(*given, *self.sizes, tiles.query_outer)
        else:
            forward = self.q, self.k, self.v, self.block_indices, self.build()
            launch_selected_fwd_kv_outer(*forward, *self.sizes, tiles.kv_outer_forward)

    def backward(self, loop_orders: LoopOrders, tiles: SelectedTiles) -> None:
        """All that a backward pass launches; behind a forward pass in the query-outer order it builds the index."""
        launch_shifts(self.d_out, torch.zeros_like(self.lse), self.d_out, self.lse)
        index = self.build() if loop_orders.forward == "query_outer" else self.index
        dq = None
        if loop_orders.backward == "query_outer":
            given = *self.given, self.block_indices, index.place
            launch_selected_dq_query_outer(*given, *self.sizes, tiles.query_outer)
        else:
            dq = torch.empty_like(self.q)
        launch_selected_bwd_kv_outer(*self.given, index, *self.sizes, tiles.kv_outer_backward, dq)


def random_selection(shape: SelectedShape, layout: SequenceLayout, generator: torch.Generator) -> Tensor:
    """A selection int32 `[N, Hk, T]`: block 0, the two newest, and eligible blocks at random, which may repeat."""
    position = layout.positions()[:, None, None]
    size = shape.total_tokens, shape.num_kv_heads, shape.slots
    eligible = geometry.num_eligible_blocks(position, shape.block_size)
    drawn = torch.rand(size, generator=generator, device=position.device)
    selection = (drawn * eligible).to(torch.int32)
    newest = eligible[..., 0].to(torch.int32) - 1
    for slot, block in enumerate((torch.zeros_like(newest), newest, newest - 1)[: shape.slots]):
        selection[..., slot] = block
    return selection


@dataclass(frozen=True)
class _Search(Generic[Tiles]):
    """The search for the tiles of one kernel."""

    kernel: str
    launch: Callable[[Tiles], tuple[Tensor, ...]]
    dtype: torch.dtype
    end: float
    report: Callable[[Step], None]

    def best(self, tried: list[Tiles]) -> Tiles:
        """The fastest of the candidates, whose first one is the measure of the others."""
        base, *others = tried
        wanted = self.launch(base)
        base_ms = time_ms(lambda: self.launch(base))
        self.report(Step(self.kernel, 1, len(tried), base, base_ms))
        best, best_ms = base, base_ms * (1 - MIN_GAIN)
        for number, tiles in enumerate(others, start=2):
            if time.monotonic() >= self.end:
                break
            ms, problem = self._measure(tiles, wanted)
            self.report(Step(self.kernel, number, len(tried), tiles, ms, problem))
            if ms is not None and ms < best_ms:
                best, best_ms = tiles, ms
        return best

    def _measure(self, tiles: Tiles, wanted: tuple[Tensor, ...]) -> tuple[float | None, str]:
        # Whatever the compiler or the driver has against a candidate, the next one may do.
        try:
            error = _error(self.launch(tiles), wanted)
            bound = MAX_ERROR.get(self.dtype, MAX_ERROR_HALF)
            if not error <= bound:
                return None, f"differs from the built-in tiles by {error:.1e} of the largest value"
            return time_ms(lambda: self.launch(tiles)), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest error of all tensors, as a share of the largest value of each; NaN or infinite where one is."""
    errors = [_relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    error, largest = (found.float() - wanted.float()).abs().max(), wanted.abs().max().float()
    return float(error / largest) if error != 0 else 0.0


def _backward_ms(problem: Problem, loop_orders: LoopOrders, tiles: SelectedTiles) -> float:
    return time_ms(lambda: problem.backward(loop_orders, tiles))
