"""The main job, from text to pictures: `make demo`, or `python examples/demo.py`.

Trains a small model with Native Sparse Attention and the same model with full attention on the same tokens, checks that
the first learns (its held-out loss is clearly below the entropy of single bytes) and keeps up (within 3 % of full
attention), continues a prompt, and draws the loss curves, the selected blocks and the gates. Each step is a command of
`fsa`, printed before it runs. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from flash_sparse_attention.training import log
from flash_sparse_attention.training.trainer import LOG_FILE, RUN_FILE

HERE = Path(__file__).parent
# Held-out loss over the entropy of single bytes, which a model that learned only letter frequencies would reach.
CLEARLY_BELOW = 0.8
# Held-out loss over that of full attention.
KEEPS_UP = 1.03
PROMPT = "def read_lines(path):\n    "

console = Console(highlight=False, soft_wrap=True)


def fsa(*arguments: str | Path) -> None:
    """Runs a command of `fsa` and ends the demo if it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ fsa {shlex.join(words)}[/]", markup=True)
    code = subprocess.run([sys.executable, "-m", "flash_sparse_attention.cli", *words], check=False).returncode
    if code != 0:
        sys.exit(code)


def final_loss(run: Path) -> float:
    """Held-out loss after the last step, nats per token."""
    return next(r.eval_loss for r in reversed(log.read(run / LOG_FILE)) if r.eval_loss is not None)


def draw(runs: dict[str, Path], unigram_entropy: float, path: Path) -> None:
    """The loss curves of both runs in one picture."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, run), color in zip(runs.items(), ("#0072B2", "#D55E00"), strict=True):
        records = log.read(run / LOG_FILE)
        axes.plot([r.step for r in records], [r.loss for r in records], color=color, alpha=0.3, linewidth=1)
        held_out = [(r.step, r.eval_loss) for r in records if r.eval_loss is not None]
        axes.plot(*zip(*held_out, strict=True), color=color, marker="o", label=f"{name}, held out")
    axes.axhline(unigram_entropy, color="0.4", linestyle="--", linewidth=1, label="entropy of single bytes")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Sparse and full attention on the same text")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for runs and pictures")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (examples/demo.toml has the default)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args()
    output: Path = arguments.output
    began = time.perf_counter()

    runs = {"sparse attention": output / "nsa", "full attention": output / "full"}
    extra = [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    for attention, run in zip(("nsa", "full"), runs.values(), strict=True):
        config = HERE / "demo.toml"
        choices = ["--attention", attention, "--device", arguments.device, *extra]
        fsa("train", "--config", config, *choices, "--output", run, "--overwrite")
    fsa("generate", output / "nsa", "--prompt", PROMPT, "--max-new-tokens", "160", "--device", arguments.device)
    text = Path(shlex.__file__)
    fsa("inspect", output / "nsa", "--text", text, "--output", output / "inspect", "--device", arguments.device)

    entropy = float(json.loads((output / "nsa" / RUN_FILE).read_text(encoding="utf-8"))["unigram_entropy"])
    sparse, full = (final_loss(run) for run in runs.values())
    draw(runs, entropy, output / "loss.png")

    checks = [
        ("below the entropy of single bytes", sparse / entropy, CLEARLY_BELOW),
        ("keeps up with full attention", sparse / full, KEEPS_UP),
    ]
    table = Table("held-out loss", "nats per byte", title="\nWhat it shows", title_justify="left")
    table.add_row("entropy of single bytes", f"{entropy:.4f}")
    table.add_row("full attention", f"{full:.4f}")
    table.add_row("sparse attention", f"{sparse:.4f}")
    console.print(table)
    for name, ratio, bound in checks:
        verdict = "[green]yes[/]" if ratio <= bound else "[red]NO[/]"
        console.print(f"{name}: {verdict} (ratio {ratio:.3f}, at most {bound})")
    pictures = sorted(str(path) for path in output.rglob("*.png"))
    console.print("\nPictures: " + ", ".join(pictures), markup=False)
    console.print(f"Took {time.perf_counter() - began:.0f} s.")
    if any(ratio > bound for _, ratio, bound in checks):
        sys.exit(1)


if __name__ == "__main__":
    main()
