"""The whole attention against full attention on a CPU: time forward plus backward, and peak memory.

    python benchmarks/cpu_attention.py --output benchmarks/results/cpu

For each length it times `nsa_attention` and `scaled_dot_product_attention(is_causal=True)` in turn, in one process, on
random float32 inputs of 8 query heads and 2 key/value heads of 64, and reports the median of the repeats and their
ratio. Both are run once before. Memory is the peak resident size of a process of its own that runs the attention
forward and backward once, inputs and gradients included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import flash_sparse_attention as fsa
from flash_sparse_attention.bench.machine import device_name, peak_memory, source_commit

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


def inputs(length: int) -> tuple[torch.Tensor, ...]:
    """Random q, k, v and gates `[1, S, H, D]`, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_HEADS, HEAD_DIM), (NUM_KV_HEADS, HEAD_DIM), (NUM_KV_HEADS, HEAD_DIM), (NUM_HEADS, 3)]
    leaves = [torch.randn(1, length, *shape, generator=generator).requires_grad_() for shape in shapes]
    return *leaves, torch.randn(1, length, NUM_HEADS, HEAD_DIM, generator=generator)


def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, d_out: torch.Tensor) -> None:
    """NSA, forward and backward."""
    fsa.nsa_attention(q, k, v, gates).out.backward(d_out)


def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor, d_out: torch.Tensor) -> None:
    """Full causal attention, forward and backward."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    out.transpose(1, 2).backward(d_out)


def seconds(run: Callable[..., None], tensors: tuple[torch.Tensor, ...]) -> float:
    """Seconds of one run, gradients cleared before."""
    for tensor in tensors:
        tensor.grad = None
    start = time.perf_counter()
    run(*tensors)
    return time.perf_counter() - start


def compare(length: int, repeats: int) -> dict[str, object]:
    """Median seconds of both attentions at this length, run in turn."""
    tensors = inputs(length)
    times: dict[str, list[float]] = {"nsa": [], "sdpa": []}
    for repeat in range(repeats + 1):
        for name, run in (("nsa", sparse), ("sdpa", full)):
            elapsed = seconds(run, tensors)
            if repeat > 0:
                times[name].append(elapsed)
    nsa, sdpa = statistics.median(times["nsa"]), statistics.median(times["sdpa"])
    print(f"{length:>8} tokens   nsa {nsa:7.2f} s   sdpa {sdpa:7.2f} s   {sdpa / nsa:5.2f}x", flush=True)
    return {"length": length, "nsa_s": nsa, "sdpa_s": sdpa, "speedup": sdpa / nsa, "all_s": times}


def memory_of(length: int) -> dict[str, object]:
    """Peak resident GiB of a process that runs NSA forward and backward at this length."""
    command = [sys.executable, __file__, "--memory-of", str(length), "--threads", str(torch.get_num_threads())]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{length:>8} tokens   nsa forward and backward: peak {peak:.2f} GiB", flush=True)
    return {"length": length, "nsa_peak_gib": peak}


def main() -> None:
    """Runs the comparison and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="folder for attention.json")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of is not None:
        sparse(*inputs(arguments.memory_of))
        print(peak_memory() / 2**30)
        return
    report = {
        "command": "python benchmarks/cpu_attention.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": device_name(torch.device("cpu")),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "flash_sparse_attention": fsa.__version__,
        "commit": source_commit(),
        "shape": f"float32, {NUM_HEADS}/{NUM_KV_HEADS} heads of {HEAD_DIM}, {fsa.NSAConfig()}",
        "speed": [compare(length, arguments.repeats) for length in arguments.lengths],
        "memory": [memory_of(length) for length in arguments.memory_lengths],
    }
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "attention.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
