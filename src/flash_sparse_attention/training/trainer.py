"""The training loop. A run is a directory:

runs/nsa/run.json         what is trained on what: `RunInfo`
         log.jsonl        a line for each step: `log.StepRecord`
         loss.png         the loss curve
         step-00000100/   checkpoints, see `checkpoint`

and for a model of transformers

         perplexity_by_position.png
         tokens/          the text as tokens, see `tokens`
         tensorboard/     the log again, if that is wanted
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..nn.causal_attention import CausalAttention
from ..validation import bad
from . import checkpoint as checkpoints
from . import log
from .checkpoint import CheckpointState
from .config import FIXED_ON_RESUME, TrainConfig, differences
from .data import Corpus, TrainingPacks, held_out_packs
from .evaluation import Evaluation, autocast, evaluate_packs
from .files import replaced
from .flops import peak_flops
from .parallel import Group, local
from .pretrained import TransformersTask, nsa_of
from .tasks import ByteTask, Task

RUN_FILE, LOG_FILE, CURVE_FILE = "run.json", "log.jsonl", "loss.png"
POSITIONS_FILE, BOARD_FOLDER = "perplexity_by_position.png", "tensorboard"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step.

    Attributes:
        output: directory of the run.
        config: its options.
        device: where it computes, `cpu` or `cuda`.
        precision: of products, `bf16` or `fp32`.
        num_parameters: numbers that are trained.
        first_step: step that it begins with, counted from 1.
        train_documents: documents to train on.
        train_tokens: their tokens.
        held_out_documents: documents held out.
        held_out_tokens: tokens of these that the loss is measured on.
        unigram_entropy: nats per token of the best model without context on the held-out tokens; None for tokens of a
            tokenizer, which are too many kinds to tell.
        unit: what a token is, `byte` or `token`.
        processes: that train together.
    """

    output: Path
    config: TrainConfig
    device: str
    precision: str
    num_parameters: int
    first_step: int
    train_documents: int
    train_tokens: int
    held_out_documents: int
    held_out_tokens: int
    unigram_entropy: float | None
    unit: str = "byte"
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, of types that JSON knows."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {"output": str(self.output), "config": self.config.to_dict()}


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        step: steps done in all.
        evaluation: loss on held-out text after the last step; None if the run was interrupted where it measures none.
        unigram_entropy: nats per token of the best model without context on the same text; None for tokens of a
            tokenizer.
        tokens_per_s: median over the steps of this call; nan if there was none.
        checkpoint: the newest checkpoint.
        interrupted: the signal that ended the run early, or None.
    """

    step: int
    evaluation: Evaluation | None
    unigram_entropy: float | None
    tokens_per_s: float
    checkpoint: Path
    interrupted: signal.Signals | None


class Progress:
    """Hears what a run does, in the first process of several. The methods do nothing; override those of interest."""

    def tokenised(self, documents: int, tokens: int) -> None:
        """So much of the text is tokenised, before the first step."""

    def started(self, run: RunInfo) -> None:
        """The first step begins."""

    def stepped(self, record: log.StepRecord) -> None:
        """A step is done, and its evaluation, if it has one."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is in place."""

    def stopping(self) -> None:
        """A signal came: the run ends after this step. Called in the signal's handler, where `print` may fail."""


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains a language model on text.

    Under `torchrun`, all processes call this: weights are sharded, and the packs of a step are dealt to them.

    The first SIGINT (Ctrl-C) or SIGTERM ends the run after the current step, with a checkpoint; the second aborts it at
    once. Signals are caught in the main thread only.

    A resumed run continues exactly: on the CPU its losses are, bit for bit, those that the run would have had without
    the interruption. What is not in `FIXED_ON_RESUME` may be changed then: with another `config.steps`, the learning
    rate follows the schedule of that number from there on.

    Args:
        config: all options.
        output: directory of the run.
        resume: continue from the newest checkpoint in `output`.
        overwrite: replace the run in `output`; it is removed when the first step of the new one has worked.
        progress: hears what happens.

    Raises:
        ValueError: for text, a device or an implementation that cannot be had; if `output` has checkpoints and neither
            `resume` nor `overwrite` is set; if `resume` finds none, or one of another model or text; for a package that
            is missing.
        OSError: if the disk is full or cannot be written. Earlier checkpoints stay.
        FloatingPointError: if the loss or the gradient is not finite. Nothing of that step is saved.

    Example:
        >>> result = train(TrainConfig(steps=20, sequence_length=512), "runs/example")  # doctest: +SKIP
    """
    return Trainer(config, output, resume=resume, overwrite=overwrite, progress=progress).run()


class Trainer:
    """A run that is ready to begin; see `train`."""

    def __init__(
        self,
        config: TrainConfig,
        output: str | Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.output = Path(output).expanduser()
        self.group = Group.of_environment()
        if config.batch_size % self.group.size:
            expected = f"a multiple of the {self.group.size} processes, which share the packs of a step"
            raise bad("batch_size", expected, config.batch_size)
        self.progress = progress if progress is not None and self.group.first else Progress()
        self.device = self.group.device(config.resolve_device())
        self.autocast_dtype = config.autocast_dtype(self.device)
        self._board: log.Board | None = None
        self._overwrite = overwrite
        begun_from = _check_output(self.output, resume, overwrite, config.pretrained)
        self.task = _task(config, begun_from, self.group)

        # Before the processes meet, where those that wait for the text would run out of time.
        self.corpus = self.task.read_corpus(self.output, self.group.local_rank == 0, self.progress.tokenised)
        self.packs = TrainingPacks(self.corpus.train, config.sequence_length, config.seed)
        self.held_out = held_out_packs(self.corpus.held_out, config.sequence_length, config.eval_packs)
        self.unigram_entropy = self.task.unigram_entropy(torch.cat([pack.targets for pack in self.held_out]))
        state = None
        if begun_from is not None:
            state = checkpoints.read_state(begun_from)
            _check_resumable(config, self.corpus, state, begun_from)

        self.model = self.task.build(begun_from, self.corpus.max_token)
        self._cost = self.task.cost(self.model)
        self._peak_flops = peak_flops(self.device)
        self.group.connect(self.device)
        layers = self.task.layers(self.model)
        self.group.shard(self.model, layers, self.device, self.autocast_dtype)
        if self.group.size > 1:
            # Weights and activations are in that dtype already.
            self.autocast_dtype = None
        if config.compile:
            _compile(layers)
        self.model.to(self.device).train()
        self.optimizer = _optimizer(self.model, config, self.device)
        self.step = self.total_tokens = 0
        self._elapsed_before = 0.0
        self._checkpoint = begun_from
        if begun_from is not None and state is not None:
            checkpoints.load_optimizer(begun_from, state, self.task.saved(self.model), self.optimizer)
            self.step, self.total_tokens, self._elapsed_before = state.step, state.total_tokens, state.elapsed_s

        self.output.mkdir(parents=True, exist_ok=True)
        checkpoints.check_space(self.output / f"step-{config.steps:08d}", checkpoints.checkpoint_bytes(self.model))

    def info(self) -> RunInfo:
        """What is known now."""
        return RunInfo(
            output=self.output,
            config=self.config,
            device=self.device.type,
            precision="fp32" if self.config.autocast_dtype(self.device) is None else "bf16",
            num_parameters=sum(x.numel() for x in self.model.parameters() if x.requires_grad),
            first_step=self.step + 1,
            train_documents=len(self.corpus.train),
            train_tokens=self.corpus.train.total_tokens,
            held_out_documents=len(self.corpus.held_out),
            held_out_tokens=sum(len(pack.targets) for pack in self.held_out),
            unigram_entropy=self.unigram_entropy,
            unit=self.task.unit,
            processes=self.group.size,
        )

    def run(self) -> TrainResult:
        """Does the steps that are left; see `train`."""
        try:
            return self._run()
        finally:
            if self._board is not None:
                self._board.close()

    def _run(self) -> TrainResult:
        config = self.config
        info = self.info()
        self._started = time.perf_counter()
        evaluation: Evaluation | None = None
        rates: list[float] = []
        self.progress.started(info)
        with _caught_signals(self.progress, patient=self.group.size > 1) as caught:
            while self.step < config.steps:
                record = self._do_step(self.step + 1)
                if not rates:
                    self._begin_files(info)
                rates.append(record.tokens_per_s)
                evaluation = None
                if record.step % config.eval_every == 0 or record.step == config.steps:
                    evaluation = self.evaluate()
                    record = dataclasses.replace(
                        record,
                        eval_loss=evaluation.loss,
                        eval_bits_per_byte=evaluation.bits_per_byte,
                        perplexity_by_position={str(x): y for x, y in evaluation.perplexity_by_position.items()},
                    )
                record = dataclasses.replace(record, elapsed_s=self._elapsed())
                self._note(record)
                self.progress.stepped(record)
                # All processes end behind the same step, whichever of them the signal has reached.
                number = self.group.largest(caught.signal or 0, self.device) if self.step < config.steps else 0
                interrupted = signal.Signals(number) if number else None
                if record.step % config.save_every == 0 or record.step == config.steps or interrupted:
                    self._save()
                if interrupted:
                    break
            else:
                interrupted = None
                # A run that had been finished already.
                evaluation = evaluation or self.evaluate()
        assert self._checkpoint is not None
        return TrainResult(
            step=self.step,
            evaluation=evaluation,
            unigram_entropy=self.unigram_entropy,
            tokens_per_s=statistics.median(rates) if rates else math.nan,
            checkpoint=self._checkpoint,
            interrupted=interrupted,
        )

    def evaluate(self) -> Evaluation:
        """The loss on the held-out packs now."""
        return evaluate_packs(self.task, self.model, self.held_out, self.autocast_dtype, self.group)

    def _do_step(self, step: int) -> log.StepRecord:
        """One optimizer step: the gradients of `batch_size` packs, summed."""
        began = time.perf_counter()
        config = self.config
        learning_rate = config.learning_rate_at(step)
        tokens = config.batch_size * config.sequence_length
        loss = torch.zeros((), device=self.device)
        flops = 0.0
        for index in self.group.share(range((step - 1) * config.batch_size, step * config.batch_size)):
            pack = self.packs.pack(index).to(self.device)
            flops += self._cost.training_flops(pack.layout.lengths)
            with autocast(self.device, self.autocast_dtype):
                part = self.task.loss_sum(self.model, pack) / tokens
            # `fully_shard` takes the mean over the processes, with every pack: gradients that wait are not sharded.
            (part * self.group.size).backward()
            loss += part.detach()
        sums = self.group.sum(torch.stack([loss.double(), torch.full_like(loss, flops, dtype=torch.float64)]))
        norm = local(nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm))
        # The one wait for the device in a step.
        loss_value, flops, norm_value = torch.cat([sums, norm.double()[None]]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            kept = f"the newest checkpoint is {self._checkpoint}" if self._checkpoint else "there is no checkpoint yet"
            raise FloatingPointError(
                f"loss and gradient must be finite, got loss {loss_value}, gradient norm {norm_value} at step {step} "
                f"({kept}): lower learning_rate, which is {config.learning_rate}, or warm up for longer"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = step
        self.total_tokens += tokens
        seconds = time.perf_counter() - began
        return log.StepRecord(
            step=step,
            loss=loss_value,
            lr=learning_rate,
            grad_norm=norm_value,
            tokens_per_s=round(tokens / seconds, 1),
            total_tokens=self.total_tokens,
            elapsed_s=0.0,
            mfu=self._peak_flops and log.significant(flops / seconds / self._peak_flops / self.group.size),
            peak_memory_gib=_peak_memory_gib(self.device),
        )

    def _note(self, record: log.StepRecord) -> None:
        if not self.group.first:
            return
        log.append(self.output / LOG_FILE, record)
        if self._board is not None:
            self._board.add(record)

    def _elapsed(self) -> float:
        return round(self._elapsed_before + time.perf_counter() - self._started, 3)

    def _begin_files(self, info: RunInfo) -> None:
        """Writes `run.json`, and drops from the directory what the run replaces."""
        if not self.group.first:
            return
        if self._overwrite:
            for old in checkpoints.checkpoints(self.output):
                checkpoints.remove_checkpoint(old)
        log.keep_until(self.output / LOG_FILE, info.first_step - 1)
        with replaced(self.output / RUN_FILE) as beside:
            text = json.dumps({**info.to_dict(), "versions": checkpoints.versions()}, indent=1)
            beside.write_text(text + "\n", encoding="utf-8")
        if self.config.tensorboard:
            self._board = log.Board(self.output / BOARD_FOLDER, info.first_step)

    def _save(self) -> None:
        state = CheckpointState(
            step=self.step,
            train_config=self.config.to_dict(),
            model_config=self.task.model_config(self.model),
            text_fingerprint=self.corpus.fingerprint,
            total_tokens=self.total_tokens,
            elapsed_s=self._elapsed(),
        )
        self._checkpoint = checkpoints.save_checkpoint(
            self.output,
            state,
            self.task.saved(self.model),
            self.optimizer,
            keep_last=self.config.keep_last,
            write_model=lambda weights, folder: self.task.write_model(self.model, weights, folder),
            writes=self.group.first,
        )
        if self.group.first:
            draw_curve(self.output)
            self.progress.saved(self._checkpoint)
        self.group.wait()


def draw_curve(output: Path) -> Path:
    """Draws `loss.png` of a run from its log, and what else there is to draw, and returns where it is."""
    info = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    records, unit = log.read(output / LOG_FILE), info.get("unit", "byte")
    log.draw_loss_curve(records, info["unigram_entropy"], output / CURVE_FILE, unit)
    if unit == "token":
        log.draw_perplexity_by_position(records, output / POSITIONS_FILE)
    return output / CURVE_FILE


def _task(config: TrainConfig, checkpoint: Path | None, group: Group) -> Task:
    if checkpoint is not None:
        before = checkpoints.read_state(checkpoint).train_config.get("pretrained")
        if (before is None) != (config.pretrained is None):
            expected = f"{'left out' if before is None else 'given'}, as for {checkpoint}"
            raise bad("pretrained", expected, repr(config.pretrained), "start a new run")
    if config.pretrained is None:
        return ByteTask(config)
    return TransformersTask(config, config.pretrained if checkpoint is None else checkpoint, group)


def _compile(layers: Sequence[nn.Module]) -> None:
    """Compiles the forward passes of the layers, but for attention of this library.

    Sequences in a pack are of other lengths each time, which that attention reads on the host: it would be compiled
    anew for every pack.
    """
    for layer in layers:
        for module in layer.children():
            if nsa_of(module) is not None or isinstance(module, CausalAttention):
                module.forward = torch.compiler.disable(module.forward)
        # Not `layer.compile()`, which would take hooks of `fully_shard` in.
        layer.forward = torch.compile(layer.forward, dynamic=False)


def _peak_memory_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


def _optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Compressors have biases and embeddings with a row a head or a position, which are no matrices of a layer.
            matrix = parameter.dim() >= 2 and name.rpartition(".")[2].startswith("weight")
            (decayed if matrix else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type == "cuda",
    )


def _check_output(output: Path, resume: bool, overwrite: bool, pretrained: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start."""
    if resume and overwrite:
        raise bad("resume and overwrite", "not both set", "both", "continue the run or replace it")
    if output.exists() and not output.is_dir():
        raise bad("output", "a directory", f"{str(output)!r}, which is a file", "choose another --output")
    found = checkpoints.checkpoints(output)
    if overwrite and pretrained and Path(pretrained).expanduser().resolve().is_relative_to(output.resolve()):
        cure = "choose another --output"
        raise bad("pretrained", "outside of the run that is replaced", repr(pretrained), cure)
    if resume:
        if not found:
            raise bad(
                "output", "the directory of a run with a checkpoint, to resume", repr(str(output)), "start it first"
            )
        return found[-1]
    if found and not overwrite:
        raise bad(
            "output",
            "a directory without checkpoints",
            f"{str(output)!r}, which has {found[-1].name}",
            "continue that run (--resume), replace it (--overwrite) or choose another --output",
        )
    return None


def _check_resumable(config: TrainConfig, corpus: Corpus, state: CheckpointState, place: Path) -> None:
    """The checkpoint is of this model and this text, and no further than the run shall go."""
    # Options that came later have their defaults in older checkpoints.
    old, new = {**TrainConfig().to_dict(), **state.train_config}, config.to_dict()
    differing = differences({x: old.get(x) for x in FIXED_ON_RESUME}, {x: new[x] for x in FIXED_ON_RESUME})
    if differing:
        raise bad(
            "config",
            f"that of {place} where the model and the text are concerned",
            ", ".join(differing),
            "start a new run",
        )
    if state.text_fingerprint != corpus.fingerprint:
        names = ("paths", "suffixes", "held_out_fraction", "text_field")
        differing = differences({x: old.get(x) for x in names}, {x: new[x] for x in names})
        what = ", ".join(differing) or f"files that have changed since (fingerprint {corpus.fingerprint})"
        raise bad("paths", f"the text that {place} was trained on", what, "put it back, or start a new run")
    if config.steps < state.step:
        raise bad("steps", f"at least the {state.step} that {place} has done", config.steps, "raise it")


class _Caught:
    """Whether a signal came."""

    signal: signal.Signals | None = None


@contextlib.contextmanager
def _caught_signals(progress: Progress, *, patient: bool) -> Iterator[_Caught]:
    """Notes the first SIGINT or SIGTERM; raises KeyboardInterrupt at the second.

    Where `torchrun` started the process, it sends a SIGTERM behind the SIGINT of the terminal; `patient` waits for a
    second one of the same kind.
    """
    caught = _Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if caught.signal == number or (caught.signal is not None and not patient):
            raise KeyboardInterrupt
        if caught.signal is not None:
            return
        caught.signal = signal.Signals(number)
        progress.stopping()

    before = {number: signal.signal(number, handle) for number in _STOP_SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
