"""Time per token of generation on a CPU, by what was generated before: with the cache, and reading all again.

    python benchmarks/generation.py --output benchmarks/results/cpu

A model of four layers, 8/2 heads of 64 (random weights; the time does not depend on them), the paper's sizes. The
cache is filled with random tokens in pieces of 2,048, and at each length some tokens are read one by one: the median of
their times. Reading everything again is timed up to 4,096 tokens, and its next-token logits are compared with those of
the cache first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import flash_sparse_attention as fsa
from flash_sparse_attention import NSAConfig
from flash_sparse_attention.bench.machine import source_commit
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig

PIECE, TOKENS, CHECKED_UP_TO = 2048, 24, 4096


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.inference_mode()
def measure(model: LanguageModel, lengths: list[int]) -> list[dict[str, float]]:
    """Milliseconds of a token at each length."""
    longest = max(lengths)
    tokens = torch.randint(256, (1, longest + TOKENS * len(lengths)))
    cache = model.new_cache(1, longest + TOKENS)
    rows = []
    for length in sorted(lengths):
        while cache.lengths[0] < length:
            at = cache.lengths[0]
            logits = model(tokens[:, at : min(at + PIECE, length)], cache=cache, last_logits=True)
        times = []
        if length <= CHECKED_UP_TO:
            whole = model(tokens[:, :length], last_logits=True)
            error = ((whole - logits).abs().max() / whole.abs().max()).item()
            if not error < 1e-3:
                raise SystemExit(f"wrong at {length} tokens: {error}")
        for step in range(TOKENS):
            at = length + step
            times.append(seconds(lambda at=at: model(tokens[:, at : at + 1], cache=cache, last_logits=True)))
        row = {"tokens": length, "cached_ms": 1000 * statistics.median(times[4:])}
        if length <= CHECKED_UP_TO:
            again = [seconds(lambda length=length: model(tokens[:, :length], last_logits=True)) for _ in range(3)]
            row["all_again_ms"] = 1000 * statistics.median(again)
        cache.crop(length)
        rows.append(row)
        print({name: round(value, 2) for name, value in row.items()}, flush=True)
    return rows


def draw(report: dict, path: Path) -> None:
    """Both times by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label in (("all_again_ms", "reading all again"), ("cached_ms", "with the cache")):
        points = [(row["tokens"], row[name]) for row in report["lengths"] if name in row]
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="ms per token")
    axes.set_xscale("log", base=2)
    axes.set_title("Generation on a CPU, 4 layers, 8/2 heads of 64")
    axes.grid(color="#ECEEF0")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures and writes the results as JSON, and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(9, 16)])
    parser.add_argument("--output", type=Path, help="folder for the files")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LanguageModelConfig(
        hidden_size=512, intermediate_size=1408, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=64,
        nsa=NSAConfig(),
    )  # fmt: skip
    model = LanguageModel(config).eval()
    report = {
        "command": "python benchmarks/generation.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "flash_sparse_attention": fsa.__version__,
        "commit": source_commit(),
        "lengths": measure(model, arguments.lengths),
    }
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / "generation.json"
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draw(report, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
