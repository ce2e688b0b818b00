"""Decoding: attention of the newest tokens of a batch over its caches, beside full attention; and a prompt of a layer.

    decode attention    of the new tokens, over a cache that holds them
    decode step         what a layer does besides its projections: new keys and values are kept, the windows that they
                        fill are compressed (means), and the attention follows
    decode plan         of that what all layers of a model share: where new tokens go, which windows they fill
    full attention      the same tokens over as many, by all that PyTorch has for it: k and v [B, Hk, N, D]
    prefill of a layer  with its projections: without a cache, into one, and in pieces

On a GPU all but prefill are replays of CUDA graphs. A step is taken at the same place each time, where new tokens fill
windows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import functional, geometry
from ...accuracy import plain
from ...accuracy.budgets import compare, compare_selection
from ...cache import FEW_TOKENS, Branches, NSACache
from ...config import NSAConfig, preset_names
from ...geometry import Interval
from ...nn import NativeSparseAttention
from ...types import Compression, SequenceLayout
from ...validation import bad, check_choice, check_multiple, check_positive
from .. import costs
from ..cases import Bench, Case, Refusal, Variant, close
from ..checks import layout_of, share
from ..costs import Cost
from ..results import FULL, Row
from ..shapes import Shape
from ..timing import Clock, Run, Taken

SUITE = "decode"
Tensors = Mapping[str, Tensor]
# As that of the layers whose branches have keys of their own, with the compression that takes no products.
CONFIG = NSAConfig(compression="mean", position_embedding="none")
FILLED_AT_ONCE = 4096  # tokens of a sequence
PREFIX = 1024  # tokens of a prompt that are compared with the reference
# Relative to the mean element; another order of the sums in bfloat16 is 0.005 off.
SAME = 2e-2
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# A device without a GPU gets what small models have.
_ON_CPU: dict[str, Any] = {
    "lengths": (4096, 16384),
    "batch": 2,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "dtype": torch.float32,
    "prefill": 4096,
    "hidden_size": 512,
    "piece": 1024,
}
_QUICK: dict[str, dict[str, Any]] = {
    "cuda": {"lengths": (8192,), "prefill": 8192, "piece": 2048, "presets": ("fsa",)},
    "cpu": {"lengths": (1024,), "prefill": 512, "piece": 256, "presets": ("fsa",), "hidden_size": 64},
}


@dataclass(frozen=True)
class DecodeOptions:
    """What to measure.

    Attributes:
        lengths: tokens that each sequence has with the new ones.
        batch: sequences.
        new_tokens: of each sequence.
        page_size: tokens of a page of the cache; None for a page for each sequence.
        heads, kv_heads, head_dim: of queries, keys and values.
        dtype: of the cache.
        prefill: tokens of the prompt that a layer reads; 0 for none.
        presets: of `NSAConfig`, of the layers that read it.
        hidden_size: of these layers.
        piece: tokens that they read at once where they read in pieces.
    """

    lengths: tuple[int, ...] = (8192, 65536)
    batch: int = 16
    new_tokens: int = 1
    page_size: int | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    prefill: int = 65536
    presets: tuple[str, ...] = preset_names()
    hidden_size: int = 4096
    piece: int = 8192

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "hidden_size", "piece"):
            check_positive(name, getattr(self, name))
        if self.new_tokens > FEW_TOKENS:
            raise bad("new_tokens", f"at most {FEW_TOKENS}", self.new_tokens, "more are a piece of a prompt")
        shortest = min(self.lengths)
        if self.new_tokens >= shortest:
            raise bad("lengths", f"longer than new_tokens={self.new_tokens}", shortest)
        if self.page_size is not None:
            check_multiple("page_size", check_positive("page_size", self.page_size), "block_size", CONFIG.block_size)
        check_positive("prefill", self.prefill, 0)
        for preset in self.presets:
            check_choice("presets", preset, preset_names())
        for length in self.lengths:
            self.shape(length)

    def shape(self, length: int) -> Shape:
        """One sequence."""
        return Shape(length, self.heads, self.kv_heads, self.head_dim, self.head_dim, CONFIG, self.dtype)

    def dense(self, length: int) -> dict[str, int | str]:
        """The sizes that full attention has."""
        return {**self.shape(length).dense(), "batch": self.batch, "new_tokens": self.new_tokens}

    def sparse(self, length: int) -> dict[str, int | str]:
        """The sizes that ours has."""
        pages: dict[str, int | str] = {} if self.page_size is None else {"page_size": self.page_size}
        return {**self.dense(length), **self.shape(length).whole(), **pages}


def options(quick: bool, device: torch.device, **given: Any) -> DecodeOptions:
    """The options for a device; `given` are fields that were asked for."""
    fields = dict(_ON_CPU) if device.type == "cpu" else {}
    if quick:
        fields |= _QUICK[device.type]
    return DecodeOptions(**fields | given)


def rows(options: DecodeOptions, bench: Bench) -> list[Row]:
    """All rows of the suite."""
    return [row for _, found in groups(options, bench) for row in found]


def groups(options: DecodeOptions, bench: Bench) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each context, then those of each preset that reads a prompt."""
    for length in options.lengths:
        heads = f"{options.heads}/{options.kv_heads} heads of {options.head_dim}"
        new = "1 new token" if options.new_tokens == 1 else f"{options.new_tokens} new tokens"
        title = f"{options.batch} sequences of {length:,} tokens, {new} each, {heads}"
        bench.announce(title)
        yield title, _decoded(options, length, bench)
    if options.prefill:
        title = f"a layer of {options.hidden_size:,} channels reads {options.prefill:,} tokens"
        bench.announce(title)
        yield title, [row for preset in options.presets for row in _prefilled(options, preset, bench)]


def _decoded(options: DecodeOptions, length: int, bench: Bench) -> list[Row]:
    """Ours and full attention at one length."""
    filled = Filled(options, length, bench.device)
    attention = attention_case(options, filled)
    cases = [attention, step_case(options, filled)]
    if bench.device.type == "cuda":
        cases.append(plan_case(options, filled))
    cases.append(full_case(options, length, bench.device))
    timed = dataclasses.replace(bench, clock=_RewindingClock(bench.clock, filled.rewind))
    found = timed.measure(SUITE, cases)
    if bench.device.type == "cuda" and any(row.operator == attention.operator and row.ms for row in found):
        notes = _kernels(filled.attend)
        found = [
            dataclasses.replace(row, notes=notes) if row.operator == attention.operator and row.ms else row
            for row in found
        ]
    return found


def _prefilled(options: DecodeOptions, preset: str, bench: Bench) -> list[Row]:
    """One layer that reads a prompt."""
    with torch.no_grad():
        case = prefill_case(options, preset, bench.device)
    return bench.measure(SUITE, [case])


class Filled:
    """A cache of one layer, full up to the newest tokens, and the step that appends these, again and again.

    Args:
        options: sizes.
        length: tokens of each sequence with the new ones.
        device: of the cache.

    Attributes:
        q: queries of the new tokens `[B, S, Hq, D]`.
        gates: of the new tokens `[B, S, Hq, 3]`, before the sigmoid.
        chosen: the selection of the newest run, `[B, S, Hk, T]`.
    """

    @torch.no_grad()
    def __init__(self, options: DecodeOptions, length: int, device: torch.device) -> None:
        self.batch, self.new_tokens, self.length = options.batch, options.new_tokens, length
        self.before = length - options.new_tokens
        self._generator = torch.Generator(device).manual_seed(0)
        self._kv_shape = options.kv_heads, options.head_dim
        self._factory: dict[str, Any] = {"device": device, "dtype": options.dtype}
        self.impl = "triton" if device.type == "cuda" else "blockwise"
        self.cache = _empty_cache(options, length, device)
        self._fresh = False
        self._fill()
        sizes = (self.batch, self.new_tokens, options.heads)
        self.q, self.gates = self._draw(*sizes, options.head_dim), self._draw(*sizes, 3)
        self._k, self._v = self._branches(self.new_tokens), self._branches(self.new_tokens)
        self._layout = SequenceLayout.uniform(self.batch, self.new_tokens, device)
        windows = self.batch * -(-self.new_tokens // CONFIG.kernel_stride)
        angle = torch.zeros(windows, options.head_dim // 2, device=device)
        self._rotation = angle.cos(), angle.sin()
        lens = torch.full((self.batch,), length, dtype=torch.int32, device=device)
        self.pages = self.cache.layers[0].pages_with(lens)
        self.chosen = torch.empty(0)
        self.rewind()
        self.step()
        self._fresh = False

    def rewind(self) -> None:
        """Takes the new tokens back."""
        if self.cache.lengths[0] != self.before:
            self.cache.crop(self.before)
        else:
            # What a graph appended, of which the host knows nothing.
            self.cache.seq_lens.fill_(self.before)
        self._fresh = True

    def wipe(self) -> None:
        """Takes the new tokens back, and what the pages hold of them and of the windows that they fill."""
        self.rewind()
        layer, device, sizes = self.cache.layers[0], self.q.device, (CONFIG.kernel_size, CONFIG.kernel_stride)
        new = torch.arange(self.before, self.length, device=device)
        first, last = (geometry.num_compressed_tokens(n, *sizes) for n in (self.before, self.length))
        for sequence in range(self.batch):
            which = torch.tensor(sequence, device=device)
            place = self.pages.place(which, new)
            window = self.pages.compressed_place(which, torch.arange(first, last, device=device), *sizes)
            for pool in (layer.k, layer.v, layer.k_window, layer.v_window):
                pool[place.page, place.row] = math.nan
            for pool in (layer.k_compressed, layer.v_compressed):
                pool[window.page, window.row] = math.nan

    def rewound(self, run: Callable[[], Tensor]) -> Callable[[Tensors], Tensor]:
        """A run that begins where the new tokens are not there; outside of its time if the clock rewinds."""

        def begin(_: Tensors) -> Tensor:
            if not self._fresh:
                self.rewind()
            out = run()
            self._fresh = False
            return out

        return begin

    def attend(self) -> Tensor:
        """Attention of the new tokens, which the cache holds."""
        out, self.chosen = functional.nsa_attention_with_kvcache(self.q, self.gates, self.pages, CONFIG, impl=self.impl)
        return out

    def step(self) -> Tensor:
        """Appends the new tokens, and attends."""
        layer = self.cache.layers[0]
        with self.cache.extend(self._layout):
            # By no angle at all, but with the work of it, as a layer that rotates compressed keys has.
            by = self._rotation if self.cache.capturing() else None
            layer.append(_packed(self._k), _packed(self._v), Compression(), Compression(), by)
            out, self.chosen = functional.nsa_attention_with_kvcache(
                self.q, self.gates, layer.pages, CONFIG, impl=self.impl
            )
        return out

    def plan(self) -> Tensor:
        """Finds the places of the new tokens; their positions."""
        with self.cache.extend(self._layout) as step:
            return step.positions

    def attention_errors(self, out: Tensor) -> dict[str, float]:
        """Errors of an output and its selection, of the first and the last sequence; see `accuracy.budgets`."""
        worst: dict[str, float] = {}
        for sequence in sorted({0, self.batch - 1}):
            own = self._sequence(sequence)
            layout = layout_of(self.before, self.length, out.device)
            chosen = self.chosen[sequence]

            def attended(
                dtype: torch.dtype,
                own: dict[str, Tensor] = own,
                layout: SequenceLayout = layout,
                chosen: Tensor = chosen,
            ) -> tuple[Tensor, Tensor]:
                x = {name: tensor.to(dtype) for name, tensor in own.items()}
                lse = plain.log_sum_exp(x["q"], x["k_compressed"], CONFIG, layout)
                importance = plain.importance(x["q"], x["k_compressed"], lse, CONFIG, layout)
                return plain.attend_sparsely(x, chosen, CONFIG, layout), importance

            simple, exact = attended(out.dtype), attended(torch.float64)
            found = compare_selection(chosen, simple[1], exact[1], CONFIG, layout)
            found["out"] = compare(out[sequence], simple[0], exact[0])
            _keep_worst(worst, {name: share(errors) for name, errors in found.items()})
        return worst

    def step_errors(self, out: Tensor) -> dict[str, float]:
        """The same, and whether the cache holds what it was given, and the means of the windows that are full now."""
        worst = self.attention_errors(out)
        layer, sizes = self.cache.layers[0], (CONFIG.kernel_size, CONFIG.kernel_stride)
        first, last = (geometry.num_compressed_tokens(n, *sizes) for n in (self.before, self.length))
        begin = geometry.window_start(first, CONFIG.kernel_stride)
        for sequence in sorted({0, self.batch - 1}):
            which = torch.tensor(sequence, device=out.device)
            place = self.pages.place(which, torch.arange(self.before, self.length, device=out.device))
            kept = (layer.k, layer.v), (layer.k_window, layer.v_window)
            given = ((self._k.selected, self._v.selected), (self._k.window, self._v.window))
            same = all(
                torch.equal(pool[place.page, place.row], x[sequence])
                for pools, both in zip(kept, given, strict=True)
                for pool, x in zip(pools, both, strict=True)
            )
            _keep_worst(worst, {"kept": 0.0 if same else math.inf})
            if first == last:
                continue
            place = self.pages.compressed_place(which, torch.arange(first, last, device=out.device), *sizes)
            for pool, old, new in (
                (layer.k_compressed, self._history[0], self._k.compressed),
                (layer.v_compressed, self._history[1], self._v.compressed),
            ):
                read = torch.cat([old[sequence], new[sequence]])[begin - self.length :]
                simple, exact = (
                    functional.compress(x, kernel_size=sizes[0], kernel_stride=sizes[1], impl="reference")
                    for x in (read, read.double())
                )
                _keep_worst(worst, {"windows": share(compare(pool[place.page, place.row], simple, exact))})
        return worst

    def _sequence(self, sequence: int) -> dict[str, Tensor]:
        """What a sequence attends to, as `plain.attend_sparsely` takes it."""
        pages, device = self.pages, self.q.device
        which, sizes = torch.tensor(sequence, device=device), (CONFIG.kernel_size, CONFIG.kernel_stride)
        place = pages.place(which, torch.arange(self.length, device=device))
        windows = torch.arange(geometry.num_compressed_tokens(self.length, *sizes), device=device)
        window = pages.compressed_place(which, windows, *sizes)
        found = {"q": self.q[sequence], "gates": self.gates[sequence]}
        for name in ("k", "v", "k_window", "v_window"):
            found[name] = getattr(pages, name)[place.page, place.row]
        for name in ("k_compressed", "v_compressed"):
            found[name] = getattr(pages, name)[window.page, window.row]
        return found

    def _fill(self) -> None:
        """Random keys and values of all tokens before the new ones; the last ones that are compressed are kept."""
        layer, keep = self.cache.layers[0], CONFIG.kernel_size + self.new_tokens
        history = [torch.empty(self.batch, 0, *self._kv_shape, **self._factory) for _ in range(2)]
        for begin in range(0, self.before, FILLED_AT_ONCE):
            count = min(FILLED_AT_ONCE, self.before - begin)
            with self.cache.extend(SequenceLayout.uniform(self.batch, count, self.cache.device)):
                k, v = self._branches(count), self._branches(count)
                layer.append(_packed(k), _packed(v), Compression(), Compression())
            both = zip(history, (k.compressed, v.compressed), strict=True)
            history = [torch.cat([old, new[:, -keep:]], 1)[:, -keep:] for old, new in both]
        self._history = history

    def _branches(self, count: int) -> Branches:
        """`[B, count, Hk, D]` for each branch."""
        return Branches(*(self._draw(self.batch, count, *self._kv_shape) for _ in range(3)))

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, **self._factory)


class Replayed:
    """A run whose launches are captured in a CUDA graph when it is first called, and replayed; elsewhere just run.

    Args:
        run: returns a tensor, which each replay writes anew.
        rewind: called before each run until there is a graph.
    """

    def __init__(self, run: Callable[[], Tensor], device: torch.device, rewind: Callable[[], None] | None = None):
        self._run, self._device, self._rewind = run, device, rewind or (lambda: None)
        self._graph: Any = None
        self._out: Tensor | None = None

    def on(self, _: Tensors) -> Tensor:
        """The run as that of a case, whose inputs it holds itself."""
        return self()

    def __call__(self) -> Tensor:
        if self._device.type != "cuda":
            return self._run()
        with torch.cuda.device(self._device):
            if self._graph is None:
                self._capture()
            self._graph.replay()
        assert self._out is not None
        return self._out

    def _capture(self) -> None:
        # What cannot be run says so before anything is captured.
        self._rewind()
        self._run()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._rewind()
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._run()
        self._graph, self._out = graph, out


@dataclass(frozen=True)
class _RewindingClock:
    """Takes the time of runs before which the cache is rewound."""

    clock: Clock
    rewind: Callable[[], None]

    def time(self, run: Run, host_ms: float) -> Taken:
        """The time of the run alone."""
        self.rewind()
        return self.clock.time(run, host_ms)


def attention_case(options: DecodeOptions, filled: Filled) -> Case:
    """Attention of the new tokens over the cache."""
    run, device = Replayed(filled.attend, filled.q.device), filled.q.device
    return Case(
        "decode attention", options.sparse(filled.length), options.heads, {"q": filled.q},
        [Variant(filled.impl, run.on, notes=_graph_notes(device))],
        {"forward": attention_cost(options, filled.length)}, verify=filled.attention_errors,
    )  # fmt: skip


def step_case(options: DecodeOptions, filled: Filled) -> Case:
    """The writing of the cache as well."""
    device = filled.q.device
    run = filled.rewound(Replayed(filled.step, device, filled.rewind))

    def verify(_: Tensor) -> dict[str, float]:
        # Once more, where nothing is left of a step before.
        filled.wipe()
        return filled.step_errors(run({}))

    sizes = CONFIG.kernel_size, CONFIG.kernel_stride
    new = [geometry.num_compressed_tokens(n, *sizes) for n in (filled.before, filled.length)]
    # Keys and values of three branches are read and written, those of windows read and their means written.
    rows = 6 * options.new_tokens + (new[1] - new[0]) * (CONFIG.kernel_size + 1)
    written = Cost(0.0, float(options.batch * rows * _kv_row(options)))
    cost = attention_cost(options, filled.length)
    assert cost.moved_bytes is not None
    both = dataclasses.replace(cost + written, moved_bytes=cost.moved_bytes + written.bytes)
    return Case(
        "decode step", options.sparse(filled.length), options.heads, {"q": filled.q},
        [Variant(filled.impl, run, notes=_graph_notes(device))], {"forward": both}, verify=verify,
    )  # fmt: skip


def plan_case(options: DecodeOptions, filled: Filled) -> Case:
    """What all layers share of a step."""
    run = filled.rewound(Replayed(filled.plan, filled.q.device, filled.rewind))

    def verify(positions: Tensor) -> dict[str, float]:
        expected = torch.arange(filled.before, filled.length, device=positions.device).repeat(options.batch)
        return {"positions": 0.0 if torch.equal(positions, expected) else math.inf}

    names = ("tokens", "batch", "new_tokens", "page_size")
    shape = {name: size for name, size in options.sparse(filled.length).items() if name in names}
    return Case(
        "decode plan", shape, options.heads, {"q": filled.q},
        [Variant(filled.impl, run, notes=_graph_notes(filled.q.device))], {"forward": Cost(0.0, 0.0)}, verify=verify,
    )  # fmt: skip


def full_case(options: DecodeOptions, length: int, device: torch.device) -> Case:
    """Full attention of the new tokens, by all that PyTorch has for it."""
    batch, new, generator = options.batch, options.new_tokens, torch.Generator(device).manual_seed(1)
    factory: dict[str, Any] = {"device": device, "dtype": options.dtype, "generator": generator}
    q = torch.randn(batch, options.heads, new, options.head_dim, **factory)
    k, v = (torch.randn(batch, options.kv_heads, length, options.head_dim, **factory) for _ in range(2))
    mask = None
    if new > 1:
        last = torch.arange(length - new, length, device=device)
        mask = torch.arange(length, device=device) <= last[:, None]

    def dense(backend: SDPBackend | None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def verify(out: Tensor) -> dict[str, float]:
        worst: dict[str, float] = {}
        for sequence in sorted({0, batch - 1}):
            own = [x[sequence].transpose(0, 1) for x in (q, k, v)]
            simple, exact = (
                _full_by_reference(*(x.to(dtype) for x in own)) for dtype in (options.dtype, torch.float64)
            )
            _keep_worst(worst, {"out": share(compare(out[sequence], simple, exact))})
        return worst

    runs: dict[str, Callable[[], Tensor]] = {"sdpa": partial(dense, None)}
    if device.type == "cuda":
        runs = {name: partial(dense, backend) for name, backend in _BACKENDS.items()}
        runs["varlen"] = _Varlen(q, k, v)
    row = _kv_row(options)
    q_and_out = 2 * q.numel() * q.element_size()
    pairs = batch * options.heads * sum(range(length - new + 1, length + 1))
    cost = Cost(4.0 * options.head_dim * pairs, float(batch * length * row + q_and_out))
    graphs = {name: Replayed(run, device) for name, run in runs.items()}
    found = [Variant(name, graph.on, ours=False, notes=_graph_notes(device)) for name, graph in graphs.items()]
    return Case(FULL, options.dense(length), options.heads, {"q": q}, found, {"forward": cost}, verify=verify)


def _full_by_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of the last tokens `[S, Hq, D]` of a sequence."""
    layout = layout_of(len(k) - len(q), len(k), q.device)
    return plain.attend(functional.interval_attention, q, k, v, Interval(), layout, "reference").out


class _Varlen:
    """`varlen_attn` of torch, of packed keys; they are copied when it is first called."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._batched = q, k, v
        self._packed: list[Tensor] = []

    def __call__(self) -> Tensor:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise Refusal(f"torch {torch.__version__} has no varlen_attn") from error
        (batch, _, new, _), length = self._batched[0].shape, self._batched[1].shape[2]
        if not self._packed:
            self._packed = [x.transpose(1, 2).flatten(0, 1).contiguous() for x in self._batched]
            count = torch.arange(batch + 1, dtype=torch.int32, device=self._packed[0].device)
            self._packed += [count * new, count * length]
        q, k, v, bounds, key_bounds = self._packed
        causal: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True}
        try:
            out: Any = varlen_attn(q, k, v, bounds, key_bounds, new, length, **causal)
        except TypeError as error:
            self._packed.clear()
            raise Refusal(f"varlen_attn of torch {torch.__version__}: {error}") from error
        return out.unflatten(0, (batch, new))


def prefill_case(options: DecodeOptions, preset: str, device: torch.device) -> Case:
    """A layer that reads a prompt: without a cache, into one, and in pieces."""
    torch.manual_seed(0)
    nsa, tokens = NSAConfig.preset(preset), options.prefill
    factory: dict[str, Any] = {"device": device, "dtype": options.dtype}
    layer = NativeSparseAttention(
        options.hidden_size, options.heads, options.kv_heads, nsa, head_dim=options.head_dim, **factory
    )
    x = torch.randn(1, tokens, options.hidden_size, **factory)
    cache = layer.new_cache(1, tokens)

    def read(given: Tensors, piece: int) -> Tensor:
        cache.crop(0)
        outs = []
        for part in given["x"].split(piece, 1):
            with cache.extend(SequenceLayout.uniform(1, part.shape[1], device)):
                outs.append(layer(part, cache=cache.layers[0]))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    reference = copy.copy(layer)
    reference.impl = "reference"
    prefix = min(PREFIX, tokens)
    first_tokens = close(reference(x[:, :prefix]), SAME)
    whole: list[Callable[[Tensor], dict[str, float]]] = []

    def verify(out: Tensor) -> dict[str, float]:
        # The layer without a cache comes first; the others compute the same.
        if not whole:
            whole.append(close(out.clone(), SAME))
        return {"out": first_tokens(out[:, :prefix])["out"], "whole": whole[0](out)["out"]}

    shape = dataclasses.replace(options.shape(tokens), nsa=nsa)
    weights = sum(w.numel() for name, w in layer.named_parameters() if "compressor" not in name)
    flops = costs.whole(shape, "forward").flops + 2.0 * weights * tokens
    sizes = {**shape.whole(), "hidden_size": options.hidden_size, "preset": preset}
    variants = [
        Variant("forward", lambda given: layer(given["x"])),
        Variant("into a cache", partial(read, piece=tokens)),
    ]
    if options.piece < tokens:
        notes = f"pieces of {options.piece:,} tokens"
        variants.append(Variant("in pieces", partial(read, piece=options.piece), notes=notes))
    return Case(
        "prefill of a layer", sizes, options.heads, {"x": x}, variants, {"forward": Cost(flops, 0.0)}, verify=verify
    )


def attention_cost(options: DecodeOptions, length: int) -> Cost:
    """Each new token has a selection of its own, whose keys and values are read; scores are written and read.

    >>> cost = attention_cost(DecodeOptions(), 65536)
    >>> round(cost.bytes / 1e6), round(cost.moved_bytes / 1e6)
    (369, 386)
    """
    batch, new = options.batch, options.new_tokens
    windows = geometry.num_compressed_tokens(length, CONFIG.kernel_size, CONFIG.kernel_stride)
    selected = min(length, CONFIG.num_selected_blocks * CONFIG.block_size)
    read = windows + new * selected + min(length, CONFIG.window_size + new - 1)
    rows = batch * new * options.heads
    least = batch * read * _kv_row(options) + rows * (2 * options.head_dim + 3) * options.dtype.itemsize
    flops = 4.0 * options.head_dim * rows * (windows + selected + min(length, CONFIG.window_size))
    return Cost(flops, float(least), float(least + 8 * rows * windows))


def _empty_cache(options: DecodeOptions, length: int, device: torch.device) -> NSACache:
    """Room for so many tokens of each sequence, in pages that lie in any order."""
    sizes: dict[str, Any] = {"num_kv_heads": options.kv_heads, "head_dim": options.head_dim, "dtype": options.dtype}
    sizes |= {"num_layers": 1, "batch": options.batch, "capacity": length, "device": device}
    if options.page_size is None:
        return NSACache(CONFIG, **sizes)
    columns = -(-length // options.page_size)
    count = options.batch * columns
    cache = NSACache(CONFIG, page_size=options.page_size, num_pages=count, **sizes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cache.set_pages(order.to(torch.int32).view(options.batch, columns))
    return cache


def _packed(x: Branches) -> Branches:
    """`[B, S, Hk, D]` as `[N, Hk, D]`."""
    return Branches(*(tensor.flatten(0, 1) for tensor in x))


def _kv_row(options: DecodeOptions) -> int:
    """Bytes of the keys and values of a token."""
    return 2 * options.kv_heads * options.head_dim * options.dtype.itemsize


def _keep_worst(worst: dict[str, float], found: Mapping[str, float]) -> None:
    for name, error in found.items():
        # One of them may be NaN, which is the worst.
        if not error <= worst.get(name, 0.0) and not math.isnan(worst.get(name, 0.0)):
            worst[name] = error
        worst.setdefault(name, error)


def _graph_notes(device: torch.device) -> str:
    return "CUDA graph" if device.type == "cuda" else "no CUDA graph: launches and checks of Python count"


def _kernels(run: Callable[[], Tensor], repeats: int = 20) -> str:
    """Microseconds of each of our kernels, on average."""
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")

    def several() -> None:
        for _ in range(repeats):
            flush.zero_()
            run()
        torch.cuda.synchronize()

    with torch.no_grad():
        several()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
            several()
    taken = [
        (event.key.removeprefix("_decode_").split("_kernel")[0], event.self_device_time_total / repeats)
        for event in record.key_averages()
        if event.key.startswith("_decode")
    ]
    kernels = ", ".join(f"{name} {us:.1f}" for name, us in taken)
    return f"CUDA graph; kernels, us: {kernels}" if taken else "CUDA graph"
