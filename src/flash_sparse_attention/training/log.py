"""The log of a run, a line of JSON for each step, and the loss curve that is drawn from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..validation import bad
from .documents import optional
from .files import named, replaced


@dataclass(frozen=True)
class StepRecord:
    """A line of the log.

    Attributes:
        step: counted from 1.
        loss: mean over the targets of the step, nats per token, before the step.
        lr: learning rate of the step.
        grad_norm: length of the gradient before it was clipped.
        tokens_per_s: tokens of the step over the seconds that it took, evaluation and checkpoint left out.
        total_tokens: tokens trained on since the run began.
        elapsed_s: seconds since the run began, those before it was resumed included.
        eval_loss: mean over the held-out targets, nats per token, after the step; None where it was not measured.
        eval_bits_per_byte: the same in bits, over the bytes; None where it was not measured, and for tokens.
        mfu: model FLOPs utilisation, a share of the peak of the devices, see `flops`; None where that is not known.
        peak_memory_gib: the most memory that tensors have taken on the first GPU in this process; None on the CPU.
        perplexity_by_position: exp of the mean held-out loss of targets by the number of tokens before them in their
            sequence, from 0, from 512, from 1024 and on in powers of two; None where it was not measured.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    total_tokens: int
    elapsed_s: float
    eval_loss: float | None = None
    eval_bits_per_byte: float | None = None
    mfu: float | None = None
    peak_memory_gib: float | None = None
    perplexity_by_position: dict[str, float] | None = None


def append(path: Path, record: StepRecord) -> None:
    """Adds a line to the log."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def read(path: Path) -> list[StepRecord]:
    """The lines of a log; none if there is no such file. What a killed run left of a last line is passed over.

    Raises:
        ValueError: for any other line that is no record.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise bad(
                f"{path} line {number}", "a record of a step in JSON", repr(line[:80]), "remove the line"
            ) from error
    return records


def keep_until(path: Path, step: int) -> None:
    """Drops the records behind `step`, which a resumed run will write again."""
    kept = [record for record in read(path) if record.step <= step] if step else []
    with replaced(path) as beside:
        beside.write_text("".join(map(_line, kept)), encoding="utf-8")


def significant(value: float) -> float:
    """The number with four significant digits: decimals would make nothing of small ones.

    >>> significant(0.412345), significant(0.0000412345)
    (0.4123, 4.123e-05)
    """
    return float(f"{value:.4g}")


def draw_loss_curve(
    records: Sequence[StepRecord], unigram_entropy: float | None, path: Path, unit: str = "byte"
) -> None:
    """Draws training and held-out loss over the steps as a PNG, with the entropy of single bytes (nats) as a mark.

    A model below that line uses context. Without an entropy there is no mark.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    steps, losses = [x.step for x in records], [x.loss for x in records]
    ax.plot(steps, losses, color="#0072B2", alpha=0.3, linewidth=0.8)
    ax.plot(steps, _smoothed(losses), color="#0072B2", linewidth=1.8, label="training")
    measured = [(x.step, x.eval_loss) for x in records if x.eval_loss is not None]
    if measured:
        ax.plot(*zip(*measured, strict=True), color="#D55E00", marker="o", markersize=4, label="held out")
    if unigram_entropy is not None:
        ax.axhline(unigram_entropy, color="#6B7278", linestyle="--", linewidth=1)
        ax.annotate(
            f"entropy of single bytes, {unigram_entropy:.2f}: no context used",
            (1, unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#6B7278",
        )
    ax.set(xlabel="step", ylabel=f"loss (nats per {unit})", ylim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#ECEEF0")
    ax.set_axisbelow(True)
    if records:
        ax.legend(frameon=False)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


def draw_perplexity_by_position(records: Sequence[StepRecord], path: Path) -> None:
    """Draws held-out perplexity over the position as a PNG: the first measurement, the last, and some between.

    A model that uses a long context becomes better with the position.
    """
    from matplotlib.figure import Figure

    measured = [x for x in records if x.perplexity_by_position]
    shown = [measured[round(i * (len(measured) - 1) / 4)] for i in range(5)] if len(measured) > 5 else measured
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    for number, record in enumerate(shown):
        assert record.perplexity_by_position is not None
        places = sorted(record.perplexity_by_position.items(), key=lambda item: int(item[0]))
        share = (number + 1) / len(shown)
        ax.plot(
            [_position_name(int(start)) for start, _ in places],
            [value for _, value in places],
            color="#D55E00",
            alpha=0.25 + 0.75 * share,
            marker="o",
            markersize=4,
            label=f"step {record.step}",
        )
    ax.set(xlabel="tokens before, from", ylabel="held-out perplexity", yscale="log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", which="both", color="#ECEEF0")
    ax.set_axisbelow(True)
    if shown:
        ax.legend(frameon=False)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150, format="png")


class Board:
    """The log for TensorBoard, in a folder.

    Args:
        folder: where TensorBoard looks.
        first_step: what the folder holds from here on is no longer shown: a resumed run writes it again.

    Raises:
        ValueError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        optional("tensorboard", "train", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, record: StepRecord) -> None:
        """A line of the log: its numbers as scalars, each under its name."""
        for name, value in dataclasses.asdict(record).items():
            if isinstance(value, dict):
                for key, part in value.items():
                    self._writer.add_scalar(f"{name}/{key}", part, record.step)
            elif value is not None and name != "step":
                side = "held_out" if name.startswith("eval_") else "train"
                self._writer.add_scalar(f"{side}/{name}", value, record.step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def _position_name(start: int) -> str:
    return f"{start // 1024}K" if start >= 1024 else str(start)


def _line(record: StepRecord) -> str:
    return json.dumps(dataclasses.asdict(record)) + "\n"


def _smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """Moving mean of the newest values, over a window that grows to about 20 values."""
    smooth: list[float] = []
    for value in values:
        weight = max(share, 1 / (len(smooth) + 1))
        smooth.append(value if not smooth else smooth[-1] + weight * (value - smooth[-1]))
    return smooth
