"""Decoding on a GPU: attention of one layer over a cache, for a batch of sequences, beside torch's dense attention.

    python benchmarks/decode.py --output benchmarks/results/h200

For each context it first checks some sequences against the reference in float64, given what they selected, and the
selection by importance. Then it times replays of CUDA graphs by CUDA events, in turn, 4 GiB written before each: the
median of the repeats after a warm-up, and the first and last tenth. The cache holds random keys and values of all
branches, as that of a layer with independent branches does. Dense baselines have as many tokens, `[B, Hk, N, D]`;
those that refuse are left out. Bytes are what a call has to read of its cache, and its scores, written and read.

"nsa, step" is what a layer does besides its projections: in an `NSACache`, keys and values of the new tokens are kept,
windows that they fill are compressed (mean), and the attention follows. "nsa, places" is what all layers of a model
share: where new tokens go, which windows they fill.

`--prefill` reads a prompt of so many tokens with a layer of 4,096 hidden channels, at once and in pieces of 8,192, into
a cache, beside the same layer's forward pass without one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import commit, header, kernels, milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_sparse_attention as fsa
from flash_sparse_attention import Interval, KVPages, NSACache, NSAConfig, SequenceLayout
from flash_sparse_attention.accuracy.budgets import compare, compare_selection
from flash_sparse_attention.cache import Branches
from flash_sparse_attention.impl import reference
from flash_sparse_attention.nn import NativeSparseAttention

CONFIG = NSAConfig()
DTYPE = torch.bfloat16
FILLED_AT_ONCE = 4096  # tokens of a sequence
HIDDEN, PIECE = 4096, 8192  # channels of the layer that reads a prompt, tokens of a piece
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def draw_pages(batch: int, context: int, kv_heads: int, dim: int, page_size: int | None) -> KVPages:
    """Random keys and values of `context` tokens of each sequence, in pages that lie in any order."""
    whole = -(-context // CONFIG.block_size) * CONFIG.block_size
    size = whole if page_size is None else page_size
    columns = -(-context // size)

    def pool(rows: int) -> Tensor:
        return torch.randn(batch * columns, rows, kv_heads, dim, device="cuda", dtype=DTYPE)

    order = torch.randperm(batch * columns, device="cuda").to(torch.int32).view(batch, columns)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    rows = size // CONFIG.kernel_stride
    return KVPages(*(pool(size) for _ in range(4)), pool(rows), pool(rows), order, lens)


def check(q: Tensor, gates: Tensor, pages: KVPages, out: Tensor, indices: Tensor, sequence: int) -> dict[str, float]:
    """Errors of a sequence relative to what they may be, at most 1."""
    length, scale = int(pages.seq_lens[sequence]), q.shape[-1] ** -0.5
    layout = SequenceLayout.from_lengths([q.shape[1]], "cuda").after(SequenceLayout.from_lengths([length], "cuda"))
    which = torch.tensor(sequence, device="cuda")
    place = pages.place(which, torch.arange(length, device="cuda"))
    windows = Interval(CONFIG.kernel_size, CONFIG.kernel_stride)
    sizes = CONFIG.kernel_size, CONFIG.kernel_stride
    compressed = pages.compressed_place(which, torch.arange(windows.num_keys(length), device="cuda"), *sizes)

    def attended(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        own = q[sequence].to(dtype)
        k, v, k_window, v_window = (
            x[place.page, place.row].to(dtype) for x in (pages.k, pages.v, pages.k_window, pages.v_window)
        )
        keys, values = (x[compressed.page, compressed.row].to(dtype) for x in (pages.k_compressed, pages.v_compressed))
        first = reference.interval_attention(own, keys, values, windows, layout, scale)
        importance = reference.block_importance(own, keys, first.lse, *sizes, CONFIG.block_size, layout, scale)
        chosen = indices[sequence]
        second = reference.selected_attention(own, k, v, chosen, CONFIG.block_size, layout, scale).out
        recent = Interval(window_size=CONFIG.window_size)
        third = reference.interval_attention(own, k_window, v_window, recent, layout, scale).out
        return reference.combine(first.out, second, third, gates[sequence]), importance

    plain, exact = attended(DTYPE), attended(torch.float64)
    found = compare_selection(indices[sequence], plain[1], exact[1], CONFIG, layout)
    found["out"] = compare(out[sequence], plain[0], exact[0])
    return {name: e.max_error / e.max_budget if e.max_budget else e.max_error for name, e in found.items()}


def layer_steps(
    batch: int, context: int, tokens: int, heads: int, kv_heads: int, dim: int, repeats: int
) -> dict[str, Callable[[], None]]:
    """A step of a layer over a cache that holds `context` tokens, and what layers share of it; graphs that replay."""
    config = CONFIG.replace(compression="mean", position_embedding="none")
    sizes = {"num_kv_heads": kv_heads, "head_dim": dim, "device": "cuda", "dtype": DTYPE}
    cache = NSACache(config, num_layers=1, batch=batch, capacity=context + tokens * (repeats + 20), **sizes)
    layer = cache.layers[0]

    def draw(count: int) -> Branches:
        return Branches(*(torch.randn(count, kv_heads, dim, device="cuda", dtype=DTYPE) for _ in range(3)))

    mean = fsa.Compression(), fsa.Compression()
    for begin in range(0, context, FILLED_AT_ONCE):
        count = min(FILLED_AT_ONCE, context - begin)
        with cache.extend(SequenceLayout.uniform(batch, count, "cuda")):
            layer.append(draw(batch * count), draw(batch * count), *mean)
    q, gates = (torch.randn(batch, tokens, heads, x, device="cuda", dtype=DTYPE) for x in (dim, 3))
    k, v = draw(batch * tokens), draw(batch * tokens)
    angle = torch.zeros(batch * -(-tokens // config.kernel_stride), dim // 2, device="cuda")
    rotation = angle.cos(), angle.sin()
    layout = SequenceLayout.uniform(batch, tokens, "cuda")

    def step() -> Tensor:
        with cache.extend(layout):
            layer.append(k, v, *mean, rotation if cache.capturing() else None)
            return fsa.nsa_attention_with_kvcache(q, gates, layer.pages, config).out

    def places() -> None:
        with cache.extend(layout):
            pass

    return {"nsa, step": captured(step), "nsa, places": captured(places)}


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """Replays of a graph of the run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: object = (run, kept)) -> None:
        """What the graph reads and writes lives as long as this."""
        graph.replay()

    return replay


def baselines(batch: int, context: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, Callable]:
    """Dense attention of the last tokens to the whole context, by all that torch has for it; graphs that replay."""
    options = {"device": "cuda", "dtype": DTYPE}
    q = torch.randn(batch, heads, tokens, dim, **options)
    k, v = (torch.randn(batch, kv_heads, context, dim, **options) for _ in range(2))
    mask = None
    if tokens > 1:
        last = torch.arange(context - tokens, context, device="cuda")
        mask = torch.arange(context, device="cuda") <= last[:, None]

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    runs: dict[str, Callable[[], Tensor]] = {name: functools.partial(dense, b) for name, b in BACKENDS.items()}
    try:
        from torch.nn.attention.varlen import varlen_attn

        packed = q.transpose(1, 2).flatten(0, 1).contiguous()
        keys, values = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (k, v))
        bounds, key_bounds = (torch.arange(batch + 1, dtype=torch.int32, device="cuda") * n for n in (tokens, context))

        def varlen() -> Tensor:
            causal = {"window_size": (-1, 0), "enable_gqa": True}
            return varlen_attn(packed, keys, values, bounds, key_bounds, tokens, context, **causal)

        runs["varlen"] = varlen
    except ImportError as error:
        print(f"    no varlen: {error}")
    expected, graphs = None, {}
    for name, run in runs.items():
        try:
            out = run()
            out = out.view(batch, tokens, heads, dim).transpose(1, 2) if name == "varlen" else out
            expected = out if expected is None else expected
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
            graphs[name] = captured(run)
        except (RuntimeError, TypeError, torch.OutOfMemoryError) as error:
            print(f"    no {name}: {' '.join(str(error).split())[:160]}")
            torch.cuda.synchronize()
    return graphs


def times(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds of each run, taken in turn: the median, and the first and last tenth."""
    flush = torch.empty(1 << 28, device="cuda")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            us = 1000 * milliseconds(run, flush)
            if repeat >= 3:
                taken[name].append(us)
    results = {}
    for name, us in taken.items():
        tenths = statistics.quantiles(us, n=10)
        results[name] = {"median": statistics.median(us), "first_tenth": tenths[0], "last_tenth": tenths[-1]}
    return results


def kernel_times(run: Callable[[], object], repeats: int = 20) -> dict[str, float]:
    """Microseconds of each of our kernels, on average."""
    flush = torch.empty(1 << 28, device="cuda")

    def several() -> None:
        for _ in range(repeats):
            flush.zero_()
            run()

    several()
    taken = kernels(several, 0.0)
    return {name: round(1000 * ms / repeats, 2) for name, ms in taken.items() if name.startswith("_decode")}


def bytes_read(context: int, tokens: int, heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    """For one sequence, by branch; dense is what full attention reads. Each token has a selection of its own."""
    row = 2 * kv_heads * dim * torch.finfo(DTYPE).bits // 8
    windows = Interval(CONFIG.kernel_size, CONFIG.kernel_stride).num_keys(context)
    selected = min(context, CONFIG.num_selected_blocks * CONFIG.block_size)
    return {
        "compressed": windows * row,
        "selected": tokens * selected * row,
        "window": min(context, CONFIG.window_size + tokens - 1) * row,
        "scores": 8 * tokens * heads * windows,
        "dense": context * row,
    }


def measure(arguments: argparse.Namespace, context: int) -> dict[str, object]:
    """One context: errors, times, kernels."""
    torch.manual_seed(0)
    (heads, kv_heads), dim = arguments.heads, arguments.head_dim
    batch, tokens = arguments.batch, arguments.tokens
    pages = draw_pages(batch, context, kv_heads, dim, arguments.page_size)
    q = torch.randn(batch, tokens, heads, dim, device="cuda", dtype=DTYPE)
    gates = torch.randn(batch, tokens, heads, 3, device="cuda", dtype=DTYPE)

    def attend() -> fsa.types.NSAOutput:
        return fsa.nsa_attention_with_kvcache(q, gates, pages, CONFIG, impl="triton")

    out, indices = attend()
    errors: dict[str, float] = {}
    for sequence in sorted({0, batch - 1}):
        for name, error in check(q, gates, pages, out, indices, sequence).items():
            # A sequence may be NaN.
            errors[name] = errors.get(name, 0.0) if error <= errors.get(name, 0.0) else error
    if not all(error <= 1.0 for error in errors.values()):
        raise SystemExit(f"wrong at {context} tokens: {errors}")
    parts = kernel_times(attend)
    runs = {"nsa": captured(attend)}
    if arguments.page_size is None:
        runs |= layer_steps(batch, context, tokens, heads, kv_heads, dim, arguments.repeats)
    runs |= baselines(batch, context, tokens, heads, kv_heads, dim)
    taken = times(runs, arguments.repeats)
    read = {name: batch * size for name, size in bytes_read(context, tokens, heads, kv_heads, dim).items()}
    own = sum(size for name, size in read.items() if name != "dense")
    rates = {
        name: (own if name.startswith("nsa") else read["dense"]) / (us["median"] * 1e-6) / 1e12
        for name, us in taken.items()
    }
    shape = f"{batch} sequences of {context} tokens, {tokens} new, {heads}/{kv_heads} heads of {dim}"
    print(shape, {name: f"{error:.2f}" for name, error in errors.items()}, "of what errors may be")
    for name, us in taken.items():
        ratio = us["median"] / taken["nsa"]["median"]
        spread = f"{us['first_tenth']:.1f} to {us['last_tenth']:.1f}"
        print(f"    {name:11} {us['median']:9.1f} us ({spread})  {rates[name]:5.2f} TB/s  {ratio:6.2f}x")
    print("    kernels, us: " + ", ".join(f"{name} {us:.1f}" for name, us in parts.items()), flush=True)
    return {
        "shape": shape,
        "sizes": {
            "batch": batch,
            "context": context,
            "tokens": tokens,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "page_size": arguments.page_size,
        },
        "errors_of_budgets": errors,
        "us": taken,
        "speedup_over": {
            name: {own: us["median"] / taken[own]["median"] for own in ("nsa", "nsa, step") if own in taken}
            for name, us in taken.items()
            if not name.startswith("nsa")
        },
        "bytes": read,
        "tb_per_s": rates,
        "kernels_us": parts,
    }


def measure_prefill(arguments: argparse.Namespace, tokens: int) -> dict[str, object]:
    """Milliseconds of a layer over a prompt, by preset: without a cache, into one, and in pieces."""
    results: dict[str, object] = {"tokens": tokens, "piece": PIECE, "hidden_size": HIDDEN}
    flush = torch.empty(1 << 28, device="cuda")
    x = torch.randn(1, tokens, HIDDEN, device="cuda", dtype=DTYPE)
    for preset in fsa.config.preset_names():
        heads, kv_heads = arguments.heads
        sizes = {"config": NSAConfig.preset(preset), "head_dim": arguments.head_dim, "device": "cuda", "dtype": DTYPE}
        layer = NativeSparseAttention(HIDDEN, heads, kv_heads, **sizes)
        cache = layer.new_cache(1, tokens)

        def read(piece: int, layer: NativeSparseAttention = layer, cache: NSACache = cache) -> list[Tensor]:
            cache.crop(0)
            outs = []
            for part in x.split(piece, 1):
                with cache.extend(SequenceLayout.uniform(1, part.shape[1], "cuda")):
                    outs.append(layer(part, cache=cache.layers[0]))
            return outs

        runs = {
            "forward": lambda layer=layer: layer(x),
            "prefill": functools.partial(read, tokens),
            "in pieces": functools.partial(read, PIECE),
        }
        whole = runs["forward"]()
        worst = max(
            ((torch.cat(runs[name](), 1) - whole).float().abs().mean() / whole.float().abs().mean()).item()
            for name in ("prefill", "in pieces")
        )
        if not worst < 2e-2:
            raise SystemExit(f"wrong prefill, {preset}: {worst}")
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(8):
            for name, run in runs.items():
                ms = milliseconds(run, flush)
                if repeat > 0:
                    taken[name].append(ms)
        results[preset] = medians = {name: statistics.median(ms) for name, ms in taken.items()}
        print(
            f"layer over {tokens} tokens, {preset}: ",
            {name: round(ms, 2) for name, ms in medians.items()},
            "ms",
            flush=True,
        )
    return results


def main() -> None:
    """Measures and writes the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of each sequence, up to 16")
    parser.add_argument("--prefill", type=int, help="tokens of a prompt whose reading is timed as well")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("HQ", "HK"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, help="tokens of a page; a page for each sequence by default")
    parser.add_argument("--name", default="decode", help="name of the file, without .json")
    parser.add_argument("--commit", default=commit(), help="what is measured, where there is no repository")
    parser.add_argument("--output", type=Path, help="folder for the file")
    arguments = parser.parse_args()
    report = {
        **header(arguments.commit, "bfloat16"),
        "contexts": [],
    }
    for context in arguments.contexts:
        with torch.no_grad():
            report["contexts"].append(measure(arguments, context))
        torch.cuda.empty_cache()
    if arguments.prefill is not None:
        with torch.no_grad():
            report["prefill_ms"] = measure_prefill(arguments, arguments.prefill)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
