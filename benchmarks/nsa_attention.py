"""The whole attention, and each of its parts, against full attention on a GPU: time and memory by length.

    python benchmarks/nsa_attention.py --output benchmarks/results/h200

From q, k and v, with keys and values compressed to the mean of their windows, T = 16 blocks of 64, a window of 512. For
each length it first checks the output of a sample of rows, given the blocks that they selected, and the selection
itself against float64, up to 131,072 tokens the gradients as well; then it times forward and backward in turn with
torch's full causal attention (cuDNN, FlashAttention-2), by CUDA events: the median of the repeats after a warm-up, 4
GiB written before each run. `--parts` times the operators one by one, the sliding window beside torch's own.
"""

from __future__ import annotations

import argparse
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
from flash_sparse_attention import NSAConfig

CONFIG = NSAConfig()
SAMPLED_ROWS = 48
GRADIENTS_UP_TO = 131072  # tokens
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def windowed_means(x: Tensor) -> Tensor:
    """The mean of each compression window of one sequence, `[M, Hk, D]`."""
    return x.unfold(0, CONFIG.kernel_size, CONFIG.kernel_stride).mean(-1)


def attend(q_rows: Tensor, k: Tensor, v: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
    """Attention of rows `[R, Hq, D]` to keys by number, `[R, Hk, S]`, where they are visible."""
    head = torch.arange(k.shape[1], device=k.device)[None, :, None]
    q_RKGD = q_rows.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("rkgd,rksd->rkgs", q_RKGD, k[keys, head]) * k.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    return torch.einsum("rkgs,rksv->rkgv", p, v[keys, head]).flatten(1, 2)


def expected_rows(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """The output of some rows in the dtype of the inputs, given the selection."""
    kv_heads = k.shape[1]
    k_compressed, v_compressed = windowed_means(k), windowed_means(v)
    ends = (rows + 1 - CONFIG.kernel_size) // CONFIG.kernel_stride + 1
    windows = torch.arange(max(int(ends.max()), 1), device=k.device)
    keys = windows.expand(len(rows), kv_heads, -1)
    # Some rows at a time, as every window is gathered for each.
    compressed = torch.cat(
        [
            attend(
                q[rows[i : i + 4]],
                k_compressed,
                v_compressed,
                keys[i : i + 4],
                keys[i : i + 4] < ends[i : i + 4, None, None],
            )
            for i in range(0, len(rows), 4)
        ]
    )
    blocks = indices[rows].long()
    keys = (
        blocks.clamp(min=0)[..., None] * CONFIG.block_size + torch.arange(CONFIG.block_size, device=k.device)
    ).flatten(2)
    visible = (keys <= rows[:, None, None]) & (blocks >= 0).repeat_interleave(CONFIG.block_size, -1)
    selected = attend(q[rows], k, v, keys.clamp(max=len(k) - 1), visible)
    keys = (rows[:, None] - torch.arange(CONFIG.window_size, device=k.device))[:, None].expand(-1, kv_heads, -1)
    window = attend(q[rows], k, v, keys.clamp(min=0), keys >= 0)
    weights = gates[rows].sigmoid()
    return sum(weights[..., i : i + 1] * x for i, x in enumerate((compressed, selected, window)))


def selection_shortfall(q: Tensor, k: Tensor, indices: Tensor, rows: Tensor) -> float:
    """Best rejected minus worst chosen importance, relative to the largest, at most over the rows; 0 is perfect."""
    k_compressed = fsa.compress(k).double()
    worst = 0.0
    for row in rows.tolist():
        end = (row + 1 - CONFIG.kernel_size) // CONFIG.kernel_stride + 1
        if end < 1:
            continue
        q_KGD = q[row].double().unflatten(0, (k.shape[1], -1))
        p = (torch.einsum("kgd,skd->kgs", q_KGD, k_compressed[:end]) * q.shape[-1] ** -0.5).softmax(-1).sum(1)
        own = row // CONFIG.block_size
        window, block = torch.arange(end, device=q.device)[:, None], torch.arange(own + 1, device=q.device)
        importance = (
            p
            @ fsa.geometry.overlap(window, block, CONFIG.kernel_size, CONFIG.kernel_stride, CONFIG.block_size).double()
        )
        kept = torch.zeros(k.shape[1], own + 2, dtype=torch.bool, device=q.device)
        chosen = indices[row].long()
        kept.scatter_(1, chosen.masked_fill(chosen < 0, own + 1), True)
        kept = kept[:, :-1]
        forced = (block < CONFIG.num_init_blocks) | (block > own - CONFIG.num_local_blocks)
        if not kept[:, forced].all():
            raise SystemExit(f"row {row} does not keep a forced block")
        best_rejected = importance.masked_fill(kept | forced, -torch.inf).amax(-1)
        worst_chosen = importance.masked_fill(~kept | forced, torch.inf).amin(-1)
        shortfall = ((best_rejected - worst_chosen) / importance.amax(-1)).max().item()
        # Not the larger of the two, which might lose a NaN.
        worst = worst if shortfall <= worst else shortfall
    return worst


def check(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> dict[str, float]:
    """Largest errors relative to the largest element, on a sample of rows."""
    tokens = len(q)
    rows = torch.randperm(tokens, device="cuda")[:SAMPLED_ROWS]
    gradients = tokens <= GRADIENTS_UP_TO
    names, inputs = ("q", "k", "v", "gates"), (q, k, v, gates)
    with torch.set_grad_enabled(gradients):
        out, indices = fsa.nsa_attention(q, k, v, gates, CONFIG)
        wide = [x.detach().double().requires_grad_(gradients) for x in inputs]
        expected = expected_rows(*wide, indices, rows)
    got = {"out": (out.detach()[rows], expected.detach())}
    if gradients:
        d_rows = torch.randn(expected.shape, device="cuda", dtype=q.dtype)
        d_out = torch.zeros_like(out).index_copy(0, rows, d_rows)
        exact = torch.autograd.grad(expected, wide, d_rows.double())
        for name, a, b in zip(names, torch.autograd.grad(out, inputs, d_out), exact, strict=True):
            got[f"grad {name}"] = (a, b)
    errors = {name: ((a.double() - b).abs().max() / b.abs().max()).item() for name, (a, b) in got.items()}
    errors["selection"] = selection_shortfall(q.detach(), k.detach(), indices, rows)
    # bfloat16 has 8 bits; what plain PyTorch reaches is the business of the tests.
    if not (all(error < 2e-2 for error in errors.values()) and errors["selection"] < 1e-4):
        raise SystemExit(f"wrong at {tokens} tokens: {errors}")
    return errors


def both_passes(
    runs: dict[str, Callable[[], Tensor]], inputs: dict[str, tuple[Tensor, ...]], repeats: int, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Median milliseconds of forward and backward of each run, taken in turn; `inputs` are differentiated."""
    flush = torch.empty(1 << 28, device="cuda")
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in runs}
    for repeat in range(repeats + warm_up):
        for name, run in runs.items():
            with torch.no_grad():
                forward = milliseconds(run, flush)
            if repeat >= warm_up:
                times[name]["forward"].append(forward)
            if name in inputs:
                out = run()
                d_out = torch.randn_like(out)
                backward = milliseconds(
                    lambda out=out, d_out=d_out, name=name: torch.autograd.grad(out, inputs[name], d_out), flush
                )
                del out
                if repeat >= warm_up:
                    times[name]["backward"].append(backward)
    return {name: {way: statistics.median(ms) for way, ms in ways.items() if ms} for name, ways in times.items()}


def full_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """torch's causal attention, `[N, Hq, D]`."""
    batch = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True).transpose(1, 2).squeeze(0)


def draw(tokens: int, heads: int, kv_heads: int, dim: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and gates, wanting gradients."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(tokens, h, dim, **options).requires_grad_() for h in (heads, kv_heads, kv_heads))
    return q, k, v, torch.randn(tokens, heads, 3, **options).requires_grad_()


def measure(tokens: int, heads: int, kv_heads: int, repeats: int, baselines: list[str]) -> dict[str, object]:
    """One length: errors, times, ratios, kernels and memory."""
    x = draw(tokens, heads, kv_heads)
    q, k, v = x[:3]
    errors = check(*x)
    torch.cuda.empty_cache()
    runs: dict[str, Callable[[], Tensor]] = {"nsa": lambda: fsa.nsa_attention(*x, CONFIG).out}
    for backend in baselines:
        runs[backend] = lambda backend=backend: full_attention(q, k, v, backend)
    inputs = {name: x if name == "nsa" else (q, k, v) for name in runs}
    medians = both_passes(runs, inputs, repeats)
    ratios = {
        backend: {
            **{way: medians[backend][way] / medians["nsa"][way] for way in ("forward", "backward")},
            "both": sum(medians[backend].values()) / sum(medians["nsa"].values()),
        }
        for backend in baselines
    }
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = runs["nsa"]()
    kept, forward_peak = torch.cuda.memory_allocated() - held, torch.cuda.max_memory_allocated() - held
    d_out = torch.randn_like(out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(out, x, d_out)
    gradient_bytes = sum(g.numel() * g.element_size() for g in gradients)
    memory = {
        "inputs_mib": held / 2**20,
        "kept_mib": kept / 2**20,
        "forward_workspace_mib": (forward_peak - kept) / 2**20,
        "backward_workspace_mib": (torch.cuda.max_memory_allocated() - before - gradient_bytes) / 2**20,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }
    finite = all(bool(torch.isfinite(g).all()) for g in gradients)
    del out, gradients, d_out
    if not finite:
        raise SystemExit(f"gradients at {tokens} tokens are not finite")
    parts = kernels(lambda: torch.autograd.grad(runs["nsa"](), x, torch.ones_like(q)), 0.01)
    name = f"{tokens} tokens, {heads}/{kv_heads} heads of 128"
    print(name, {key: f"{value:.1e}" for key, value in errors.items()})
    for run, ways in medians.items():
        ratio = "" if run == "nsa" else "   {forward:.2f}x {backward:.2f}x, both {both:.2f}x".format(**ratios[run])
        print(f"    {run:8} forward {ways['forward']:9.3f} ms  backward {ways['backward']:9.3f} ms{ratio}")
    print("    " + ", ".join(f"{what} {mib:.0f}" for what, mib in memory.items()), flush=True)
    return {
        "shape": name,
        "sizes": {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": 128},
        "relative_errors": errors,
        "median_ms": medians,
        "speedup_over": ratios,
        "memory": memory,
        "kernels_ms": parts,
    }


def measure_parts(tokens: int, heads: int, kv_heads: int, repeats: int) -> dict[str, object]:
    """The operators one by one, full attention, and torch's own sliding windows."""
    q, k, v, gates = draw(tokens, heads, kv_heads)
    with torch.no_grad():
        k_compressed, v_compressed = fsa.compress(k).requires_grad_(), fsa.compress(v).requires_grad_()
        outer = fsa.compressed_attention(q, k_compressed, v_compressed)
        indices = fsa.select_blocks(q, k_compressed, outer.lse)
    branches = tuple(torch.randn_like(q).requires_grad_() for _ in range(3))
    runs: dict[str, Callable[[], Tensor]] = {
        "compress": lambda: fsa.compress(k),
        "compressed attention": lambda: fsa.compressed_attention(q, k_compressed, v_compressed).out,
        "block scores and selection": lambda: fsa.select_blocks(q, k_compressed, outer.lse),
        "selected attention": lambda: fsa.selected_attention(q, k, v, indices).out,
        "window": lambda: fsa.sliding_window_attention(q, k, v, window_size=CONFIG.window_size).out,
        "combine": lambda: fsa.combine(*branches, gates),
        "cudnn": lambda: full_attention(q, k, v, "cudnn"),
    }
    inputs = {
        "compress": (k,),
        "compressed attention": (q, k_compressed, v_compressed),
        "selected attention": (q, k, v),
        "window": (q, k, v),
        "combine": (*branches, gates),
        "cudnn": (q, k, v),
    }
    for name, window in library_windows(q, k, v).items():
        runs[name], inputs[name] = window, (q, k, v)
    medians = both_passes(runs, inputs, repeats, warm_up=2)
    full = medians["cudnn"]
    print(f"parts at {tokens} tokens, {heads}/{kv_heads} heads")
    for name, ways in medians.items():
        numbers = "  ".join(f"{way} {ms:8.3f} ms {full[way] / ms:7.2f}x" for way, ms in ways.items())
        print(f"    {name:28} {numbers}", flush=True)
    return {
        "sizes": {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": 128},
        "median_ms": medians,
        "speedup_over_cudnn": {
            name: {way: full[way] / ms for way, ms in ways.items()} for name, ways in medians.items()
        },
    }


def library_windows(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's sliding windows of the same size: varlen (FlashAttention-2) and compiled flex_attention."""
    size, tokens = CONFIG.window_size, len(q)
    windows: dict[str, Callable[[], Tensor]] = {}
    try:
        from torch.nn.attention.varlen import varlen_attn

        bounds = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        options = {"window_size": (size - 1, 0), "enable_gqa": True}

        def varlen() -> Tensor:
            return varlen_attn(q, k, v, bounds, bounds, tokens, tokens, **options)

        varlen()
        windows["window, torch varlen"] = varlen
    except (ImportError, TypeError, RuntimeError) as error:
        print(f"    no torch varlen window: {str(error)[:200]}")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < size), None, None, tokens, tokens, device="cuda"
        )
        compiled = torch.compile(flex_attention)

        def flex() -> Tensor:
            batch = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
            return compiled(*batch, block_mask=mask, enable_gqa=True).transpose(1, 2).squeeze(0)

        flex()
        windows["window, compiled flex"] = flex
    except Exception as error:
        print(f"    no flex window: {str(error)[:200]}")
    return windows


def main() -> None:
    """Measures and writes the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2**n for n in range(13, 21)])
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("HQ", "HK"))
    parser.add_argument("--baselines", nargs="*", default=["cudnn"], choices=BACKENDS)
    parser.add_argument("--baselines-up-to", type=int, default=262144, help="tokens; full attention takes long beyond")
    parser.add_argument("--parts", type=int, nargs="*", default=[], help="lengths at which parts are timed")
    parser.add_argument("--name", default="nsa_attention", help="name of the file, without .json")
    parser.add_argument("--commit", default=commit(), help="what is measured, where there is no repository")
    parser.add_argument("--output", type=Path, help="folder for the file")
    arguments = parser.parse_args()
    report = {
        **header(arguments.commit, "bfloat16"),
        "parts": [measure_parts(tokens, *arguments.heads, arguments.repeats) for tokens in arguments.parts],
        "lengths": [],
    }
    for tokens in arguments.lengths:
        baselines = arguments.baselines if tokens <= arguments.baselines_up_to else []
        repeats = arguments.repeats if tokens <= 131072 else 2
        report["lengths"].append(measure(tokens, *arguments.heads, repeats, baselines))
        torch.cuda.empty_cache()
        if arguments.output is not None:
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
