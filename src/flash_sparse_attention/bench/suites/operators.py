"""Every operator by itself, beside full attention on the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import functional, geometry
from ...accuracy import plain
from ...accuracy.budgets import compare_selection
from ...geometry import Interval
from ...selections import neighbour_overlap
from ...types import SequenceLayout
from .. import baselines, costs, inputs
from ..cases import Bench, Case, Refusal, Variant
from ..checks import keep_worst, layout_of, pieces, share
from ..results import FULL
from ..shapes import Shape

Tensors = Mapping[str, Tensor]
ATTENTION_DIRECTIONS = ("forward", "backward")
WORKSPACE_MIB = 1024  # what `selected_attention` takes by itself
# The reference takes every window of the keys by itself, with gradients 20 GiB at this length with 8 kv heads. Longer
# sequences of fewer heads take no more.
GRADIENTS_UP_TO, HEADS_THERE, KV_HEADS_THERE = 131072, 32, 8


def cases(shape: Shape, bench: Bench, compile_baselines: bool, recorded: Tensor | None = None) -> list[Case]:
    """All operators on a shape.

    Args:
        shape: sizes.
        bench: what measures.
        compile_baselines: whether baselines that are compiled for each shape take part.
        recorded: a selection of a trained model, int32 `[N, Hk, T]`, for selected attention alone.
    """
    x = inputs.draw(shape, bench.device)
    q, k, v = x.q.detach(), x.k.detach(), x.v.detach()
    found = [full_case(shape, x, bench, compile_baselines)]
    random = inputs.random_selection(shape, bench.device)
    found += [index_case(shape, random), selected_case(shape, x, random)]
    if recorded is not None:
        found += [
            dataclasses.replace(index_case(shape, recorded), origin="recorded"),
            dataclasses.replace(selected_case(shape, x, recorded), origin="recorded"),
        ]
    windows: dict[str, Any] = {"kernel_size": shape.nsa.kernel_size, "kernel_stride": shape.nsa.kernel_stride}
    k_compressed, v_compressed = functional.compress(k, **windows), functional.compress(v, **windows)
    if shape.windows:
        compressed = {"q": q, "k": k_compressed, "v": v_compressed}
        found += [compressed_case(shape, compressed), selection_case(shape, q, k_compressed)]
        found.append(compress_case(shape, k))
    found += [window_case(shape, x, bench, compile_baselines), combine_case(shape, x)]
    return found


def gradients_are_checked(shape: Shape) -> bool:
    """Whether the reference can compute the gradients of a shape."""
    of_heads = shape.tokens * shape.heads <= GRADIENTS_UP_TO * HEADS_THERE
    of_kv_heads = shape.tokens * shape.kv_heads <= GRADIENTS_UP_TO * KV_HEADS_THERE
    return shape.tokens <= GRADIENTS_UP_TO or (of_heads and of_kv_heads)


def full_case(shape: Shape, x: inputs.Inputs, bench: Bench, compile_baselines: bool) -> Case:
    """Full attention, by all that there is for it."""
    found = [
        _baseline(one, shape, compile_baselines)
        for one in baselines.full_attention(bench.device)
        if bench.full_attention is None or one.name in bench.full_attention
    ]
    return Case(
        FULL, shape.dense(), shape.heads, _leaves(x.q, x.k, x.v), found,
        {way: costs.full(shape, way) for way in ATTENTION_DIRECTIONS}, _interval_expected(Interval()),
        check_gradients=gradients_are_checked(shape),
    )  # fmt: skip


def index_case(shape: Shape, block_indices: Tensor) -> Case:
    """The inverted index, which only the Triton kernels have."""

    def run(given: Tensors) -> Tensor:
        chosen = given["block_indices"]
        if chosen.device.type != "cuda":
            raise Refusal("the other implementations sort a selection as they go")
        from ...impl.triton.inverted_index import build_index
        from ...impl.triton.ops.selected import chunks_of
        from ...impl.triton.tuning import SelectedShape

        nsa, bounds = shape.nsa, SequenceLayout.uniform(1, shape.tokens, chosen.device).cu_seqlens
        sizes = (nsa.num_selected_blocks, nsa.block_size, shape.head_dim, shape.head_dim_v, shape.dtype)
        selected = SelectedShape(shape.tokens, shape.kv_heads, shape.group, *sizes)
        chunks = chunks_of(selected, chosen, shape.tokens, bounds, WORKSPACE_MIB)
        return build_index(chosen, bounds, nsa.block_size, chunks).place

    def verify(place: Tensor) -> dict[str, float]:
        # Every entry of these selections is valid or unused, and gets a place of its own or none.
        used = place[place >= 0]
        each = torch.equal(used.sort().values, torch.arange(len(used), device=used.device, dtype=used.dtype))
        return {"places": 0.0 if each and torch.equal(place >= 0, block_indices >= 0) else float("inf")}

    return Case(
        "inverted index", shape.selected(), shape.heads, {"block_indices": block_indices},
        [Variant("triton", run)], {"forward": costs.index(shape)}, verify=verify,
    )  # fmt: skip


def selected_case(shape: Shape, x: inputs.Inputs, block_indices: Tensor) -> Case:
    """Selected attention in both loop orders."""
    size = shape.nsa.block_size

    def run(given: Tensors, **options: Any) -> Tensor:
        tensors = given["q"], given["k"], given["v"], given["block_indices"]
        return functional.selected_attention(*tensors, block_size=size, **options).out

    def expected(given: Tensors, first: int, last: int, layout: SequenceLayout) -> Tensor:
        operator = partial(functional.selected_attention, block_size=size)
        rows = given["q"][first:last], given["k"][:last], given["v"][:last], given["block_indices"][first:last]
        return plain.attend(operator, *rows, layout, "reference").out

    nsa = {name: getattr(shape.nsa, name) for name in ("block_size", "num_init_blocks", "num_local_blocks")}
    notes = f"neighbouring queries share {neighbour_overlap(block_indices, **nsa):.0%} of the blocks that they choose"
    cost = {way: costs.selected(shape, block_indices, way) for way in ATTENTION_DIRECTIONS}
    if x.q.device.type == "cuda":
        moved = {way: costs.selected(shape, block_indices, way, kv_outer=True) for way in ATTENTION_DIRECTIONS}
        found = [
            Variant("kv_outer", partial(run, impl="triton", loop_order="kv_outer"), costs=moved, notes=notes),
            Variant("query_outer", partial(run, impl="triton", loop_order="query_outer"), ours=False, strict=True),
        ]
        fla = baselines.selected_by_fla(block_indices, size)
        found.append(_baseline(fla, shape, True))
    else:
        found = [Variant("blockwise", partial(run, impl="blockwise"), notes=notes)]
    leaves = {**_leaves(x.q, x.k, x.v), "block_indices": block_indices}
    return Case("selected attention", shape.selected(), shape.heads, leaves, found, cost, expected)


def compressed_case(shape: Shape, given: Tensors) -> Case:
    """Attention to the compressed tokens."""
    windows = Interval(shape.nsa.kernel_size, shape.nsa.kernel_stride)
    return Case(
        "compressed attention", shape.compressed(), shape.heads, _leaves(given["q"], given["k"], given["v"]),
        [_ours(given["q"], _interval_run(windows))],
        {way: costs.compressed(shape, way) for way in ATTENTION_DIRECTIONS}, _interval_expected(windows),
    )  # fmt: skip


def window_case(shape: Shape, x: inputs.Inputs, bench: Bench, compile_baselines: bool) -> Case:
    """The sliding window, beside those of libraries."""
    window = Interval(window_size=shape.nsa.window_size)
    found = [_ours(x.q, _interval_run(window))]
    found += [_baseline(one, shape, compile_baselines) for one in baselines.sliding_windows(shape, bench.device)]
    return Case(
        "sliding window", shape.window(), shape.heads, _leaves(x.q, x.k, x.v), found,
        {way: costs.window(shape, way) for way in ATTENTION_DIRECTIONS}, _interval_expected(window),
    )  # fmt: skip


def selection_case(shape: Shape, q: Tensor, k_compressed: Tensor) -> Case:
    """Block scores, and the blocks that they choose."""
    nsa = shape.nsa
    lse = functional.compressed_attention(
        q, k_compressed, k_compressed, kernel_size=nsa.kernel_size, kernel_stride=nsa.kernel_stride
    ).lse
    sizes = ("kernel_size", "kernel_stride", "block_size", "num_selected_blocks", "num_init_blocks", "num_local_blocks")

    def run(given: Tensors) -> Tensor:
        return functional.select_blocks(given["q"], given["k"], given["lse"], **plain.sizes(nsa, *sizes))

    def verify(indices: Tensor) -> dict[str, float]:
        return selection_errors(shape, q, k_compressed, lse, indices)

    return Case(
        "block selection", shape.sizes("kernel_size", "kernel_stride", "block_size", "slots"), shape.heads,
        {"q": q, "k": k_compressed, "lse": lse}, [_ours(q, run)], {"forward": costs.selection(shape)}, verify=verify,
    )  # fmt: skip


def selection_errors(shape: Shape, q: Tensor, k_compressed: Tensor, lse: Tensor, indices: Tensor) -> dict[str, float]:
    """Errors of a selection on some rows, by importance; see `accuracy.budgets.compare_selection`."""
    nsa = shape.nsa
    worst: dict[str, float] = {}
    for first, last in pieces(shape.tokens, shape.heads):
        layout = layout_of(first, last, q.device)
        windows = geometry.num_compressed_tokens(last, nsa.kernel_size, nsa.kernel_stride)
        keys, chosen = k_compressed[:windows], indices[first:last]

        def importance(
            dtype: torch.dtype, rows: slice = slice(first, last), keys: Tensor = keys, layout: SequenceLayout = layout
        ) -> Tensor:
            return plain.importance(q[rows].to(dtype), keys.to(dtype), lse[rows], nsa, layout)

        errors = compare_selection(chosen, importance(q.dtype), importance(torch.float64), nsa, layout)
        keep_worst(worst, {name: share(error) for name, error in errors.items()})
    return worst


def compress_case(shape: Shape, k: Tensor) -> Case:
    """Means of windows, of the keys."""
    windows: dict[str, Any] = {"kernel_size": shape.nsa.kernel_size, "kernel_stride": shape.nsa.kernel_stride}

    def run(given: Tensors) -> Tensor:
        return functional.compress(given["k"], **windows)

    def expected(given: Tensors, first: int, last: int, layout: SequenceLayout) -> Tensor:
        rows = slice(first * shape.nsa.kernel_stride, (last - 1) * shape.nsa.kernel_stride + shape.nsa.kernel_size)
        return functional.compress(given["k"][rows], **windows, impl="reference")

    return Case(
        "compress", shape.compressed(), shape.heads, {"k": _leaf(k)}, [_ours(k, run)],
        {way: costs.compress(shape, way) for way in ATTENTION_DIRECTIONS}, expected,
    )  # fmt: skip


def combine_case(shape: Shape, x: inputs.Inputs) -> Case:
    """The gated sum."""
    device, size = x.q.device, (shape.tokens, shape.heads, shape.head_dim_v)
    generator = torch.Generator(device).manual_seed(1)
    branches = {
        name: _leaf(torch.randn(size, device=device, dtype=shape.dtype, generator=generator))
        for name in ("compressed", "selected", "window")
    }

    def run(given: Tensors, impl: str = "auto") -> Tensor:
        return functional.combine(given["compressed"], given["selected"], given["window"], given["gates"], impl=impl)

    def expected(given: Tensors, first: int, last: int, layout: SequenceLayout) -> Tensor:
        return run({name: tensor[first:last] for name, tensor in given.items()}, "reference")

    return Case(
        "combine", shape.dense(), shape.heads, {**branches, "gates": _leaf(x.gates)}, [_ours(x.q, run)],
        {way: costs.combine(shape, way) for way in ATTENTION_DIRECTIONS}, expected,
    )  # fmt: skip


def _interval_run(interval: Interval) -> Callable[[Tensors], Tensor]:
    return lambda given: functional.interval_attention(given["q"], given["k"], given["v"], interval).out


def _interval_expected(interval: Interval) -> Callable[[Tensors, int, int, SequenceLayout], Tensor]:
    def expected(given: Tensors, first: int, last: int, layout: SequenceLayout) -> Tensor:
        keys = interval.num_keys(last)
        rows = given["q"][first:last], given["k"][:keys], given["v"][:keys]
        return plain.attend(functional.interval_attention, *rows, interval, layout, "reference").out

    return expected


def _ours(x: Tensor, run: Callable[[Tensors], Tensor]) -> Variant:
    """What the library takes on the device of x."""
    return Variant("triton" if x.device.type == "cuda" else "blockwise", run)


def _baseline(one: baselines.Baseline, shape: Shape, compile_it: bool) -> Variant:
    made: dict[str, baselines.Attention] = {}

    def run(given: Tensors) -> Tensor:
        if one.compiles and not compile_it:
            raise Refusal("compiled anew for every shape; --compile-baselines measures it on all of them")
        if not made:
            made[""] = one.make(shape)
        return made[""](given["q"], given["k"], given["v"])

    return Variant(one.name, run, ours=False)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _leaves(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return {"q": _leaf(q), "k": _leaf(k), "v": _leaf(v)}


def groups(
    shapes: list[Shape], bench: Bench, compile_baselines: bool, recorded: Callable[[Shape], Tensor | None]
) -> Iterator[tuple[str, list[Case]]]:
    """A group of cases for each shape; compiled baselines on the first one, or on all."""
    for number, shape in enumerate(shapes):
        yield str(shape), cases(shape, bench, compile_baselines or number == 0, recorded(shape))
