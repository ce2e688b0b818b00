"""Selected attention in both loop orders against full attention, on a GPU: time, workspace, parts.

    python benchmarks/selected_attention.py --output benchmarks/results/h200

For each shape it first checks the output and the gradients of both loop orders against float64 on a sample of rows,
then times forward and backward of either order and of torch's full causal attention with the cuDNN back end, in turn,
by CUDA events: the median of the repeats after a warm-up. Before each run 4 GiB are written, so that no cache holds its
inputs and its launches are queued when it begins: the times are the GPU's. The forward pass includes building the
inverted index, the backward pass takes the one that was kept. Block indices are random: block 0 and the two newest
blocks forced, the rest drawn from all blocks before the query.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import commit, header, kernels, milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_sparse_attention as fsa

# tokens, query heads, kv heads, head dimension, block size, blocks a query keeps
SHAPES = [
    (65536, 32, 8, 128, 64, 16),
    (65536, 4, 4, 128, 64, 16),
    (65536, 32, 4, 128, 64, 16),
    (65536, 64, 4, 128, 64, 16),
    (65536, 16, 4, 128, 128, 8),
    (32768, 32, 8, 128, 64, 16),
    (8192, 32, 8, 128, 64, 16),
    (8192, 64, 4, 128, 64, 16),
    (131072, 32, 8, 128, 64, 16),
]
LOOP_ORDERS = ("kv_outer", "query_outer")
SAMPLED_ROWS = 64


def random_blocks(tokens: int, kv_heads: int, block_size: int, slots: int) -> Tensor:
    """Block 0, the two newest blocks, others at random: int32 `[N, Hk, T]`, ascending, -1 where there are no more."""
    blocks = torch.arange(-(-tokens // block_size), device="cuda")
    parts = []
    for first in range(0, tokens, 2048):
        own = torch.arange(first, min(first + 2048, tokens), device="cuda")[:, None] // block_size
        ranking = torch.rand(len(own), kv_heads, max(len(blocks), slots), device="cuda")
        eligible = torch.zeros_like(ranking, dtype=torch.bool)
        eligible[..., : len(blocks)] = (blocks <= own)[:, None]
        forced = (blocks == 0) | (blocks == own) | (blocks == own - 1)
        ranking[..., : len(blocks)] += forced[:, None]
        top = ranking.masked_fill(~eligible, -1.0).topk(slots, -1)
        unused = len(blocks) + slots
        chosen = top.indices.masked_fill(top.values < 0, unused).sort(-1).values
        parts.append(chosen.masked_fill(chosen == unused, -1).int())
    return torch.cat(parts)


def expected_rows(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, rows: Tensor) -> Tensor:
    """The output of some tokens, `[R, Hq, D]` in float64, differentiable; indices ascend and do not repeat."""
    blocks = indices[rows].long()
    key = (blocks.clamp(min=0).unsqueeze(-1) * block_size + torch.arange(block_size, device="cuda")).flatten(2)
    visible = (key <= rows[:, None, None]) & (blocks >= 0).repeat_interleave(block_size, -1)
    head = torch.arange(k.shape[1], device="cuda")[None, :, None]
    key = key.clamp(max=len(k) - 1)
    scores = torch.einsum("rkgd,rksd->rkgs", q[rows].unflatten(1, (k.shape[1], -1)), k[key, head]) * q.shape[-1] ** -0.5
    p = scores.masked_fill(~visible.unsqueeze(2), -torch.inf).softmax(-1)
    return torch.einsum("rkgs,rksv->rkgv", p, v[key, head]).flatten(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int) -> dict[str, dict[str, float]]:
    """Largest error of the output and the gradients, relative to their largest element, where only a sample counts."""
    rows = torch.randperm(len(q), device="cuda")[:SAMPLED_ROWS]
    d_rows = torch.randn(len(rows), q.shape[1], v.shape[2], device="cuda", dtype=q.dtype)
    d_out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], device="cuda", dtype=q.dtype).index_copy(0, rows, d_rows)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = expected_rows(*wide, indices, block_size, rows)
    exact = [expected.detach(), *torch.autograd.grad(expected, wide, d_rows.double())]
    errors = {}
    for order in LOOP_ORDERS:
        out = fsa.selected_attention(q, k, v, indices, block_size=block_size, impl="triton", loop_order=order).out
        got = [out.detach()[rows], *torch.autograd.grad(out, (q, k, v), d_out)]
        names = ("out", "grad q", "grad k", "grad v")
        errors[order] = {
            name: ((a.double() - b).abs().max() / b.abs().max()).item()
            for name, a, b in zip(names, got, exact, strict=True)
        }
        worst = max(errors[order].values())
        # bfloat16 has 8 bits; what plain PyTorch reaches is the business of the tests.
        if not worst < 2e-2:
            raise SystemExit(f"{order} is wrong: {errors[order]}")
    return errors


def measure(shape: tuple[int, ...], repeats: int) -> dict[str, object]:
    """One shape: errors, times of all, ratios to full attention, kernels and memory of the KV-outer order."""
    tokens, heads, kv_heads, dim, block_size, slots = shape
    torch.manual_seed(0)
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(tokens, h, dim, **draw).requires_grad_() for h in (heads, kv_heads, kv_heads))
    d_out = torch.randn(tokens, heads, dim, **draw)
    indices = random_blocks(tokens, kv_heads, block_size, slots)
    errors = check(q, k, v, indices, block_size)

    def sparse(order: str) -> Tensor:
        return fsa.selected_attention(q, k, v, indices, block_size=block_size, impl="triton", loop_order=order).out

    def full(_: str) -> Tensor:
        batch = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).squeeze(0)

    runs = {**dict.fromkeys(LOOP_ORDERS, sparse), "cudnn": full}
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in runs}
    flush = torch.empty(1 << 28, device="cuda")
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            forward = milliseconds(lambda run=run, name=name: run(name), flush)
            out = run(name)
            backward = milliseconds(lambda out=out: torch.autograd.grad(out, (q, k, v), d_out), flush)
            del out
            if repeat >= 2:
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    medians = {name: {way: statistics.median(ms) for way, ms in ways.items()} for name, ways in times.items()}
    ratios = {
        name: {way: medians["cudnn"][way] / medians[name][way] for way in ("forward", "backward")}
        for name in LOOP_ORDERS
    }
    del flush
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out = sparse("kv_outer")
    kept = torch.cuda.memory_allocated() - held
    peak_forward = torch.cuda.max_memory_allocated() - held
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    gradient_bytes = sum(x.numel() * x.element_size() for x in grads)
    memory = {
        "kept_mib": kept / 2**20,
        "forward_workspace_mib": (peak_forward - kept) / 2**20,
        "backward_workspace_mib": (torch.cuda.max_memory_allocated() - held - gradient_bytes) / 2**20,
    }
    parts = {
        order: kernels(lambda order=order: torch.autograd.grad(sparse(order), (q, k, v), d_out), 0.004)
        for order in LOOP_ORDERS
    }
    name = f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}, {slots} blocks of {block_size}"
    print(name)
    for run, ways in medians.items():
        ratio = "" if run == "cudnn" else "   {forward:.2f}x {backward:.2f}x".format(**ratios[run])
        print(f"    {run:12} forward {ways['forward']:8.3f} ms  backward {ways['backward']:8.3f} ms{ratio}")
    print("    " + ", ".join(f"{what} {mib:.0f}" for what, mib in memory.items()), flush=True)
    return {
        "shape": name,
        "sizes": dict(zip(("tokens", "heads", "kv_heads", "head_dim", "block_size", "slots"), shape, strict=True)),
        "relative_errors": errors,
        "median_ms": medians,
        "speedup_over_cudnn": ratios,
        "memory": memory,
        "kernels_ms": parts,
        "all_ms": times,
    }


def main() -> None:
    """Measures every shape and writes the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    sizes = "tokens,heads,kv_heads,head_dim,block_size,slots"
    parser.add_argument("--shapes", nargs="*", help=f"other shapes, each as {sizes}")
    parser.add_argument("--name", default="selected_attention", help="name of the file, without .json")
    parser.add_argument("--commit", default=commit(), help="what is measured, where there is no repository")
    parser.add_argument("--output", type=Path, help="folder for the file")
    arguments = parser.parse_args()
    chosen = SHAPES if arguments.shapes is None else [tuple(map(int, shape.split(","))) for shape in arguments.shapes]
    report = {
        **header(arguments.commit, "bfloat16"),
        "shapes": [measure(shape, arguments.repeats) for shape in chosen],
    }
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / f"{arguments.name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
