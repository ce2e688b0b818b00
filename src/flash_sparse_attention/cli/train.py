"""`fsa train`: trains a language model on text: a small one of bytes, or one of transformers.

By default it is a small one, on the sources of Python's standard library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ..config import NSAConfig
from ..nn import LanguageModelConfig
from ..training import Progress, TrainConfig, TrainResult, find_checkpoint
from ..training import train as run_training
from ..training.checkpoint import read_state
from ..training.log import StepRecord
from ..training.parallel import Group
from ..training.trainer import CURVE_FILE, LOG_FILE, POSITIONS_FILE, RunInfo
from ..validation import bad
from .layers import layer_numbers

_RUN, _TEXT, _MODEL, _PRETRAINED = "Run", "Text", "Model", "Model of transformers"
_SPARSE, _OPTIMIZER, _MACHINE = "Sparse attention", "Optimizer", "Machine"
_MODEL_FIELDS = {item.name for item in dataclasses.fields(LanguageModelConfig)}
_NSA_FIELDS = {item.name for item in dataclasses.fields(NSAConfig)}
_PLAIN_LINES = 20
_TOKENISED_S = 5.0
# What a model that begins with random weights likes would undo what another one has learnt.
_PRETRAINED_LEARNING_RATE = 5e-5


def _flag(panel: str, name: str, text: str, *declarations: str) -> Any:
    """The option for the field `name`: None where it is not given, so its help tells the default itself."""
    defaults = TrainConfig().to_dict()
    flat = {**defaults["model"]["nsa"], **defaults["model"], **defaults}
    return typer.Option(*declarations, help=f"{text} Default: {flat[name]}.", rich_help_panel=panel, show_default=False)


def train(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files and folders of text. Default: the sources of Python's standard library."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run. Default: runs/nsa or runs/full, or runs/NAME for the folder of --model.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of options, named as here but with underscores; those of the model in a table 'model', "
            "those of sparse attention in 'model.nsa'. Flags override it.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output, with its options.", rich_help_panel=_RUN),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output.", rich_help_panel=_RUN)
    ] = False,
    steps: Annotated[int | None, _flag(_RUN, "steps", "Optimizer steps in all.")] = None,
    eval_every: Annotated[
        int | None, _flag(_RUN, "eval_every", "Steps between measurements of the held-out loss.")
    ] = None,
    eval_packs: Annotated[int | None, _flag(_RUN, "eval_packs", "Packs that the held-out loss is measured on.")] = None,
    save_every: Annotated[int | None, _flag(_RUN, "save_every", "Steps between checkpoints.")] = None,
    keep_last: Annotated[int | None, _flag(_RUN, "keep_last", "Checkpoints to keep.")] = None,
    seed: Annotated[int | None, _flag(_RUN, "seed", "Of the weights and the order of the text.")] = None,
    suffixes: Annotated[
        list[str] | None,
        typer.Option(
            "--suffix",
            help="What files in folders end with, '*' for all; may be repeated. Default: text and source code.",
            rich_help_panel=_TEXT,
            show_default=False,
        ),
    ] = None,
    held_out_fraction: Annotated[
        float | None, _flag(_TEXT, "held_out_fraction", "Share of the files that is not trained on.")
    ] = None,
    sequence_length: Annotated[
        int | None, _flag(_TEXT, "sequence_length", "Tokens (bytes) that the model sees at once.")
    ] = None,
    batch_size: Annotated[
        int | None, _flag(_TEXT, "batch_size", "Packs of that length for a step; costs time, not memory.")
    ] = None,
    text_field: Annotated[
        str | None, _flag(_TEXT, "text_field", "With --model: where text is in JSONL, Parquet and folders of datasets.")
    ] = None,
    token_cache: Annotated[
        str | None,
        _flag(_TEXT, "token_cache", "With --model: folder for tokenised text, which runs may share; None: in the run."),
    ] = None,
    pretrained: Annotated[
        str | None,
        _flag(
            _PRETRAINED,
            "pretrained",
            "Folder of a model of transformers and its tokenizer, to train that one.",
            "--pretrained",
            "--model",
        ),
    ] = None,
    convert: Annotated[
        bool | None,
        _flag(_PRETRAINED, "convert", "Make its attention sparse first.", "--convert/--no-convert"),
    ] = None,
    convert_layers: Annotated[
        str | None,
        _flag(_PRETRAINED, "convert_layers", "Layers that become sparse, as 0-11,20; None: all."),
    ] = None,
    full_attention: Annotated[
        str | None,
        _flag(
            _PRETRAINED,
            "full_attention",
            "Name in transformers of what computes attention that stays full, such as flash_attention_2.",
        ),
    ] = None,
    attention: Annotated[str | None, _flag(_MODEL, "attention", "nsa or full.")] = None,
    hidden_size: Annotated[int | None, _flag(_MODEL, "hidden_size", "Channels of the hidden states.")] = None,
    intermediate_size: Annotated[int | None, _flag(_MODEL, "intermediate_size", "Channels inside the MLP.")] = None,
    num_layers: Annotated[int | None, _flag(_MODEL, "num_layers", "Layers.")] = None,
    num_heads: Annotated[int | None, _flag(_MODEL, "num_heads", "Query heads.")] = None,
    num_kv_heads: Annotated[int | None, _flag(_MODEL, "num_kv_heads", "Key/value heads.")] = None,
    head_dim: Annotated[int | None, _flag(_MODEL, "head_dim", "Channels of a head.")] = None,
    rope_theta: Annotated[float | None, _flag(_MODEL, "rope_theta", "Base of the rotary embedding.")] = None,
    tie_embeddings: Annotated[
        bool | None,
        _flag(
            _MODEL,
            "tie_embeddings",
            "One matrix for input and output embedding.",
            "--tie-embeddings/--no-tie-embeddings",
        ),
    ] = None,
    kernel_size: Annotated[int | None, _flag(_SPARSE, "kernel_size", "Tokens of a compression window.")] = None,
    kernel_stride: Annotated[int | None, _flag(_SPARSE, "kernel_stride", "Tokens between such windows.")] = None,
    block_size: Annotated[int | None, _flag(_SPARSE, "block_size", "Tokens of a selection block.")] = None,
    num_selected_blocks: Annotated[
        int | None, _flag(_SPARSE, "num_selected_blocks", "Blocks that a query keeps, the forced ones included.")
    ] = None,
    num_init_blocks: Annotated[
        int | None, _flag(_SPARSE, "num_init_blocks", "First blocks, which every query keeps.")
    ] = None,
    num_local_blocks: Annotated[
        int | None, _flag(_SPARSE, "num_local_blocks", "Newest blocks, which every query keeps.")
    ] = None,
    window_size: Annotated[int | None, _flag(_SPARSE, "window_size", "Tokens of the sliding window.")] = None,
    compression: Annotated[str | None, _flag(_SPARSE, "compression", "mean, linear, mlp or weighted.")] = None,
    position_embedding: Annotated[
        str | None, _flag(_SPARSE, "position_embedding", "In a compression window, of: none, k or kv.")
    ] = None,
    branch_kv: Annotated[
        str | None, _flag(_SPARSE, "branch_kv", "Keys and values of the branches: shared or independent.")
    ] = None,
    gate: Annotated[str | None, _flag(_SPARSE, "gate", "per_head or per_token.")] = None,
    rope: Annotated[str | None, _flag(_SPARSE, "rope", "Of compressed keys, after or before compression.")] = None,
    learning_rate: Annotated[float | None, _flag(_OPTIMIZER, "learning_rate", "AdamW's, at its highest.")] = None,
    warmup_steps: Annotated[
        int | None, _flag(_OPTIMIZER, "warmup_steps", "Steps in which the learning rate rises from 0.")
    ] = None,
    final_lr_fraction: Annotated[
        float | None, _flag(_OPTIMIZER, "final_lr_fraction", "Share of the learning rate at the last step.")
    ] = None,
    weight_decay: Annotated[float | None, _flag(_OPTIMIZER, "weight_decay", "Of matrices.")] = None,
    beta1: Annotated[float | None, _flag(_OPTIMIZER, "beta1", "AdamW's, of the mean.")] = None,
    beta2: Annotated[float | None, _flag(_OPTIMIZER, "beta2", "AdamW's, of the mean square.")] = None,
    max_grad_norm: Annotated[
        float | None, _flag(_OPTIMIZER, "max_grad_norm", "Longer gradients are scaled down to this norm.")
    ] = None,
    device: Annotated[str | None, _flag(_MACHINE, "device", "auto, cpu or cuda.")] = None,
    impl: Annotated[
        str | None, _flag(_MACHINE, "impl", "Implementation of sparse attention: auto, reference, blockwise or triton.")
    ] = None,
    precision: Annotated[str | None, _flag(_MACHINE, "precision", "auto, bf16 or fp32.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        _flag(
            _MACHINE,
            "gradient_checkpointing",
            "Less memory for more time.",
            "--gradient-checkpointing/--no-gradient-checkpointing",
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        _flag(_MACHINE, "compile", "Compile the layers with torch.compile.", "--compile/--no-compile"),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        _flag(_RUN, "tensorboard", "Write the log for TensorBoard too.", "--tensorboard/--no-tensorboard"),
    ] = None,
) -> None:
    """Train a language model on text.

    Without arguments: a sparse model of four million parameters on the sources of Python's standard library. With
    --model, a model of transformers; start it with torchrun for several GPUs.
    """
    flags = dict(locals())
    not_fields = {name: flags.pop(name) for name in ("output", "config", "resume", "overwrite")}
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    if convert_layers is not None:
        given["convert_layers"] = layer_numbers("--convert-layers", convert_layers)
    from_file = _read_toml(config) if config is not None else {}
    directory = not_fields["output"] or Path("runs", _name(given, from_file))
    base = TrainConfig()
    if resume:
        base = TrainConfig.from_dict(read_state(find_checkpoint(directory)).train_config)
    elif given.get("pretrained") or from_file.get("pretrained"):
        base = base.replace(learning_rate=_PRETRAINED_LEARNING_RATE)
    try:
        resolved = base.replace(**from_file)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    resolved = resolved.replace(**_nested(given, resolved))

    # Of several processes, the first one speaks.
    console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not Group.of_environment().first)
    progress = _Bar(console) if console.is_terminal else _Lines(console)
    try:
        result = run_training(resolved, directory, resume=resume, overwrite=overwrite, progress=progress)
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    finally:
        progress.close()
    if result.interrupted is not None:
        console.print(f"Stopped after step {result.step}; {result.checkpoint} has all of it. Continue with:")
        console.print(f"  fsa train --resume --output {shlex.quote(str(directory))}")
        raise typer.Exit(128 + result.interrupted)
    _print_summary(console, result, directory)


def _nested(flags: Mapping[str, Any], base: TrainConfig) -> dict[str, Any]:
    """Flags as a dictionary of the form of `TrainConfig.to_dict`.

    Those of sparse attention are for the conversion where a model of transformers is trained.
    """
    top = {name: value for name, value in flags.items() if name not in _MODEL_FIELDS | _NSA_FIELDS}
    model = {name: value for name, value in flags.items() if name in _MODEL_FIELDS}
    nsa = {name: value for name, value in flags.items() if name in _NSA_FIELDS}
    if nsa and (flags.get("pretrained") or base.pretrained):
        top["nsa"] = {**base.nsa, **nsa}
    elif nsa:
        model["nsa"] = nsa
    return {**top, "model": model} if model else top


def _name(flags: Mapping[str, Any], from_file: Mapping[str, Any]) -> str:
    """What the directory of a run is called where nobody says."""
    pretrained = flags.get("pretrained") or from_file.get("pretrained")
    if isinstance(pretrained, str) and pretrained:
        return Path(pretrained).expanduser().absolute().name
    return flags.get("attention") or _attention(from_file) or "nsa"


def _attention(values: Mapping[str, Any]) -> str | None:
    model = values.get("model")
    attention = model.get("attention") if isinstance(model, Mapping) else None
    # Any other value is an error that the configuration reports.
    return attention if attention in ("nsa", "full") else None


def _read_toml(path: Path) -> dict[str, Any]:
    # Python 3.10 has it as a package of another name.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad("--config", "a file that can be read", f"{str(path)!r} ({error.strerror})") from error
    except ValueError as error:
        raise bad("--config", "a TOML file", f"{str(path)!r} ({error})") from error


def _print_summary(console: Console, result: TrainResult, directory: Path) -> None:
    assert result.evaluation is not None
    rows = [("held-out loss", f"{result.evaluation.loss:.4f} nats per token")]
    if result.evaluation.bits_per_byte is not None:
        rows.append(("", f"{result.evaluation.bits_per_byte:.4f} bits per byte"))
    if result.unigram_entropy is not None:
        rows.append(("without context", f"{result.unigram_entropy:.4f} nats per token (entropy of single bytes)"))
        follow_up = ("try it", f"fsa generate {shlex.quote(str(directory))} --prompt 'import '")
    else:
        by_position = result.evaluation.perplexity_by_position.items()
        rows.append(("perplexity", ", ".join(f"{value:.2f} from {start:,}" for start, value in by_position)))
        rows.append(("", f"by tokens before, see {directory / POSITIONS_FILE}"))
        follow_up = ("load it", f"AutoModelForCausalLM.from_pretrained({str(result.checkpoint)!r})")
    rows += [
        ("speed", "no step was left" if math.isnan(result.tokens_per_s) else f"{result.tokens_per_s:,.0f} tokens/s"),
        ("checkpoint", str(result.checkpoint)),
        ("loss curve", str(directory / CURVE_FILE)),
        ("log", str(directory / LOG_FILE)),
        follow_up,
    ]
    console.print()
    for name, value in rows:
        console.print(f"{name:<16} {value}")


class _Lines(Progress):
    """Prints now and then: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tokenised = -math.inf

    def tokenised(self, documents: int, tokens: int) -> None:
        if time.perf_counter() >= self._tokenised + _TOKENISED_S:
            self._tokenised = time.perf_counter()
            self._console.print(f"tokenised {documents:,} documents, {tokens:,} tokens")

    def started(self, run: RunInfo) -> None:
        self._last, self._first = run.config.steps, run.first_step
        self._every = max(1, run.config.steps // _PLAIN_LINES)
        self._began = time.perf_counter()
        _print_header(self._console, run)

    def stepped(self, record: StepRecord) -> None:
        if record.step % self._every and record.eval_loss is None and record.step != self._first:
            return
        done, left = record.step - self._first + 1, self._last - record.step
        seconds = int((time.perf_counter() - self._began) / done * left)
        parts = [f"step {record.step}/{self._last}", f"loss {record.loss:.4f}"]
        if record.eval_loss is not None:
            parts.append(f"held out {record.eval_loss:.4f}")
        parts.append(f"{record.tokens_per_s:,.0f} tokens/s")
        if record.mfu is not None:
            parts.append(f"MFU {record.mfu:.1%}")
        if record.peak_memory_gib is not None:
            parts.append(f"{record.peak_memory_gib:.1f} GiB")
        parts.append(f"{seconds // 60}:{seconds % 60:02} left")
        self._console.print("  ".join(parts))

    def stopping(self) -> None:
        _say_stopping()

    def close(self) -> None:
        """Nothing is open."""


class _Bar(_Lines):
    """Draws a bar: for terminals."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = ProgressBar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def started(self, run: RunInfo) -> None:
        _print_header(self._console, run)
        self._held_out = ""
        self._task: TaskID = self._bar.add_task("", total=run.config.steps, completed=run.first_step - 1, shown="")
        self._bar.start()

    def stepped(self, record: StepRecord) -> None:
        if record.eval_loss is not None:
            self._held_out = f"  held out {record.eval_loss:.3f}"
        shown = f"loss {record.loss:.3f}{self._held_out}  {record.tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=record.step, shown=shown)

    def stopping(self) -> None:
        _say_stopping()

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        self._bar.stop()


def _print_header(console: Console, run: RunInfo) -> None:
    config = run.config
    text = ", ".join(config.paths) or "the sources of Python's standard library"
    if config.pretrained is None:
        kind = f"{config.model.attention} attention"
    else:
        kind = f"{config.pretrained}, converted to sparse attention" if config.convert else config.pretrained
    where = run.device if run.processes == 1 else f"{run.processes} x {run.device}"
    shape = f"{run.num_parameters / 1e6:.2f} M parameters, {kind}"
    console.print(f"Training {shape}, on {where} in {run.precision}, into {run.output}")
    console.print(
        f"on {text}: {run.train_documents:,} documents, {run.train_tokens:,} {run.unit}s; "
        f"{run.held_out_documents:,} more held out. {config.sequence_length:,} tokens at once; Ctrl-C saves and stops."
    )


def _say_stopping() -> None:
    # In a signal handler: `print` could be entered a second time, while os.write is safe.
    with contextlib.suppress(OSError):
        os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again aborts at once.\n")
