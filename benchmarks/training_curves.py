"""The demo's model trained on a GPU with each implementation: the same loss curve within noise?

    python benchmarks/training_curves.py --output benchmarks/results/h200

Trains `examples/demo.toml` for some steps three times at once, each in a process of its own: on the Triton kernels, on
the blockwise operators with the same seed (so the same text in the same order, and the same first weights), and on the
Triton kernels with another seed, whose distance from the first is the noise of a run. Writes the held-out losses and
mean training losses as JSON, and a plot. With `--runs`, runs are kept there, and continued if they were stopped.
`--plot-only` draws the JSON again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from contextlib import nullcontext
from datetime import date
from pathlib import Path

import tomllib
import torch
import triton

import flash_sparse_attention as fsa
from flash_sparse_attention.bench.machine import source_commit
from flash_sparse_attention.training import TrainConfig, log, train
from flash_sparse_attention.training.trainer import LOG_FILE

CONFIG = Path(__file__).parent.parent / "examples" / "demo.toml"
RUNS = {"triton": ("triton", 0), "blockwise": ("blockwise", 0), "triton, another seed": ("triton", 1)}
MEAN_OF = 50  # steps


def one_run(name: str, steps: int, folder: str) -> dict[str, object]:
    """A run's curves."""
    impl, seed = RUNS[name]
    settings = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    settings |= {"steps": steps, "eval_every": 200, "save_every": 100, "device": "cuda", "impl": impl, "seed": seed}
    run = Path(folder) / name.replace(", ", "-").replace(" ", "-")
    train(TrainConfig.from_dict(settings), run, resume=any(run.glob("step-*")))
    records = log.read(run / LOG_FILE)
    losses = [record.loss for record in records]
    return {
        "held_out": [[r.step, r.eval_loss] for r in records if r.eval_loss is not None],
        f"training_mean_of_{MEAN_OF}": [
            [i + MEAN_OF, sum(losses[i : i + MEAN_OF]) / MEAN_OF] for i in range(0, len(losses) - MEAN_OF + 1, MEAN_OF)
        ],
    }


def distances(curves: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, float]]:
    """Largest and mean difference of the held-out losses from those of the first run, nats, from step 500 on."""
    first = dict(curves["triton"]["held_out"])
    found = {}
    for name in RUNS:
        if name != "triton":
            gaps = [abs(loss - first[step]) for step, loss in curves[name]["held_out"] if step >= 500]
            if gaps:
                found[name] = {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "last": gaps[-1]}
    return found


def draw(report: dict, path: Path) -> None:
    """The curves of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = dict(zip(RUNS, (("#0072B2", "-"), ("#D55E00", "--"), ("#6B7278", ":")), strict=True))
    for name, (colour, style) in styles.items():
        curves = report["curves"][name]
        axes.plot(*zip(*curves[f"training_mean_of_{MEAN_OF}"], strict=True), style, color=colour, alpha=0.5)
        axes.plot(*zip(*curves["held_out"], strict=True), style, color=colour, marker="o", ms=3, label=name)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1, 3))
    axes.set_title("Held-out loss (marks) and training loss, the demo's model")
    axes.grid(axis="y", color="#ECEEF0")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Trains, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--commit", default=source_commit(), help="what is measured, where there is no repository")
    parser.add_argument("--runs", type=Path, help="folder for the runs; a temporary one by default")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "training_curves.json"
    if not arguments.plot_only:
        with (
            nullcontext(arguments.runs) if arguments.runs else tempfile.TemporaryDirectory() as folder,
            multiprocessing.get_context("spawn").Pool(len(RUNS)) as pool,
        ):
            curves = pool.starmap(one_run, [(name, arguments.steps, str(folder)) for name in RUNS])
        by_name = dict(zip(RUNS, curves, strict=True))
        report = {
            "command": "python benchmarks/training_curves.py " + " ".join(sys.argv[1:]),
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "flash_sparse_attention": fsa.__version__,
            "commit": arguments.commit,
            "curves": by_name,
            "distance_from_triton": distances(by_name),
        }
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    report = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps(report["distance_from_triton"], indent=2))
    draw(report, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
