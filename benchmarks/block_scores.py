"""Times of block selection: of the two kernels of block scores, for any device and for Hopper, and of the pick.

    python benchmarks/block_scores.py --output benchmarks/results/h200

Each case selects blocks for random bfloat16 queries and compressed keys, with both kernels, whatever group and lengths
each is for. Times are those of kernels alone, by `torch.profiler`: the least of four runs, each after a write of 1 GiB
that empties the caches. Both are to select the same blocks, but for ties of rounding. Needs sm_90.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flash_sparse_attention import SequenceLayout
from flash_sparse_attention.bench.machine import environment
from flash_sparse_attention.impl.triton.tuning import runs_gluon, score_tiles

NAME = "block_scores.json"
PAPER, APART, WHOLE, FINE = (32, 16), (32, 32), (64, 64), (16, 8)
LONG, LONGEST = (65536,), (131072,)
# Lengths, heads, kv heads, windows and their stride.
CASES = [
    *(((length,), *heads, *PAPER) for length in (65536, 32768, 16384, 8192) for heads in ((24, 8), (32, 8), (40, 8))),
    *(((length,), *heads, *PAPER) for length in (65536, 32768, 16384, 8192) for heads in ((16, 8), (64, 4))),
    *((LONG, *heads, *PAPER) for heads in ((64, 8), (32, 4), (32, 1))),
    (LONGEST, 32, 8, *PAPER),
    *((LONG, *heads, *sizes) for sizes in (APART, WHOLE, FINE) for heads in ((40, 8), (64, 4))),
    *((lengths, *heads, *PAPER) for lengths in ((4096,) * 16, (8192,) * 8) for heads in ((40, 8), (64, 4))),
]
DIM, BLOCK_SIZE, SLOTS = 128, 64, 16
RUNS, LEAST_AGREEMENT = 4, 0.999


def least_us(run: Callable[[], Tensor], kernels: str, flush: Tensor) -> float:
    """Microseconds of such kernels of a run."""
    times = []
    for _ in range(RUNS):
        flush.zero_()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        times.append(sum(event.time_range.elapsed_us() for event in events if kernels in event.name))
    return min(times)


def measure(
    lengths: tuple[int, ...], heads: int, kv_heads: int, kernel_size: int, stride: int, flush: Tensor
) -> dict[str, Any]:
    """Times of both kernels for such sequences.

    Raises:
        SystemExit: if they select other blocks.
    """
    block_scores = importlib.import_module("flash_sparse_attention.impl.triton.block_scores")
    torch.manual_seed(0)
    tokens, device = sum(lengths), flush.device
    windows = [max(0, (length - kernel_size) // stride + 1) for length in lengths]
    bounds, key_bounds = (SequenceLayout.from_lengths(x, device).cu_seqlens for x in (list(lengths), windows))
    q = torch.randn(tokens, heads, DIM, device=device).bfloat16()
    k = torch.randn(sum(windows), kv_heads, DIM, device=device).bfloat16()
    position = torch.cat([torch.arange(length, device=device) for length in lengths])
    seen = ((position + 1 - kernel_size) // stride + 1).clamp(1)
    # About what it is for such scores; the kernels take any.
    lse = (seen.float().log() + 0.5)[:, None].expand(-1, heads).contiguous()
    tiles = score_tiles(DIM, q.dtype)

    def select(specialized: bool) -> Tensor:
        return block_scores.launch_select_blocks(
            q, k, lse, bounds, key_bounds, max(lengths), kernel_size, stride, BLOCK_SIZE, SLOTS, 1, 2, DIM**-0.5,
            replace(tiles, specialized=specialized),
        )  # fmt: skip

    agreement = (select(False) == select(True)).all(-1).float().mean().item()
    if agreement < LEAST_AGREEMENT:
        raise SystemExit(f"{lengths}, {heads}/{kv_heads} heads: only {agreement:.4f} of the selections are the same")
    return {
        "lengths": list(lengths),
        "heads": heads,
        "kv_heads": kv_heads,
        "kernel_size": kernel_size,
        "kernel_stride": stride,
        "us": {
            "triton": least_us(lambda: select(False), "block_scores", flush),
            "hopper": least_us(lambda: select(True), "block_scores", flush),
            "pick": least_us(lambda: select(True), "pick_blocks", flush),
        },
        "same_selections": agreement,
    }


def main() -> None:
    """Measures all cases, and writes what there is after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help=f"the folder of {NAME}")
    parser.add_argument("--commit", help="of the source, where there is no git to ask")
    options = parser.parse_args()
    if not (torch.cuda.is_available() and runs_gluon()):
        raise SystemExit("needs a device of sm_90 and the Gluon that its kernels are written in")
    block_scores, hopper = (
        importlib.import_module(f"flash_sparse_attention.impl.triton.{name}")
        for name in ("block_scores", "block_scores_hopper")
    )
    # Whatever it is for.
    block_scores.LEAST_TOKENS = block_scores.LEAST_LENGTH = hopper.LEAST_GROUP = 0
    device = torch.device("cuda")
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    rows: list[dict[str, Any]] = []
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device, options.commit),
        "rows": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        row = measure(*case, flush)
        rows.append(row)
        sequences = f"{len(case[0])} x {case[0][0]:,}"
        print(f"{sequences:12} {row['heads']}/{row['kv_heads']} {case[3:]}", row["us"], flush=True)
        (options.output / NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
