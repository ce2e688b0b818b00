"""Draws what `benchmarks/nsa_attention.py` measured by length: time against full attention, and memory.

    python benchmarks/plot_lengths.py benchmarks/results/h200/nsa_attention.json

writes a picture of the same name beside the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS_OF_TICKS = {8192: "8K", 16384: "16K", 32768: "32K", 65536: "64K", 131072: "128K", 262144: "256K", 524288: "512K"}
TOKENS_OF_TICKS[1048576] = "1M"


def main(file: Path) -> Path:
    """Draws the lengths of a file of results; returns the picture's path."""
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = sorted(report["lengths"], key=lambda row: row["sizes"]["tokens"])
    tokens = [row["sizes"]["tokens"] for row in rows]
    figure, (times, ratios, memory) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for run, colour in (("nsa", "tab:blue"), ("cudnn", "tab:orange")):
        for way, style in (("forward", "-"), ("backward", "--")):
            points = [
                (n, row["median_ms"][run][way]) for n, row in zip(tokens, rows, strict=True) if run in row["median_ms"]
            ]
            name = "sparse" if run == "nsa" else "full, cuDNN"
            times.plot(*zip(*points, strict=True), style, color=colour, marker="o", label=f"{name}, {way}")
    times.set(yscale="log", ylabel="ms", title="Time")
    for way in ("forward", "backward", "both"):
        points = [
            (n, row["speedup_over"]["cudnn"][way])
            for n, row in zip(tokens, rows, strict=True)
            if "cudnn" in row["speedup_over"]
        ]
        ratios.plot(*zip(*points, strict=True), marker="o", label=way)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    ratios.set(ylabel="times faster than full attention", title="Gain over full attention (cuDNN)")
    for part, label in (
        ("peak_mib", "peak of forward and backward"),
        ("kept_mib", "kept between the passes"),
        ("inputs_mib", "inputs"),
    ):
        memory.plot(tokens, [row["memory"][part] / 1024 for row in rows], marker="o", label=label)
    memory.set(yscale="log", ylabel="GiB", title="Memory")
    sizes = rows[0]["sizes"]
    for axes in (times, ratios, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [TOKENS_OF_TICKS.get(n, str(n)) for n in tokens])
        axes.minorticks_off()
        axes.set_xlabel("tokens of one sequence")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    heads = f"{sizes['heads']}/{sizes['kv_heads']} heads of {sizes['head_dim']}"
    context = f"{report['device']}, {report['dtype']}, {heads}, commit {report['commit']}"
    figure.suptitle(f"Whole attention: {context}")
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
