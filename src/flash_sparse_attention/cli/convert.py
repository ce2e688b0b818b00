"""`fsa convert`: gives a transformers model sparse attention and saves it."""

from __future__ import annotations

import functools
import importlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..training import resolve_device
from ..training.data import DEFAULT_SUFFIXES, TrainingPacks
from ..training.documents import optional
from ..training.tokens import Tokenizer, read_tokens
from ..validation import bad, check_positive
from .layers import layer_numbers

_NEW, _WARM_UP = "What is new", "Warm-up"


def convert(
    model: Annotated[str, typer.Argument(help="Name or folder of a causal language model of transformers.")],
    output: Annotated[Path, typer.Option(help="Folder to save to; new or empty.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers that become sparse, such as 0-3,6. Default: all.", rich_help_panel=_NEW),
    ] = None,
    kernel_size: Annotated[
        int, typer.Option(help="Tokens that a compressed token summarises.", rich_help_panel=_NEW)
    ] = 32,
    kernel_stride: Annotated[int, typer.Option(help="Tokens between these windows.", rich_help_panel=_NEW)] = 16,
    block_size: Annotated[int, typer.Option(help="Tokens of a selection block.", rich_help_panel=_NEW)] = 64,
    num_selected_blocks: Annotated[int, typer.Option(help="Blocks that a query keeps.", rich_help_panel=_NEW)] = 16,
    window_size: Annotated[int, typer.Option(help="Tokens of the sliding window.", rich_help_panel=_NEW)] = 512,
    compression: Annotated[str, typer.Option(help="mean, weighted, linear or mlp.", rich_help_panel=_NEW)] = "weighted",
    rope: Annotated[
        str, typer.Option(help="Rotation of keys after or before their compression.", rich_help_panel=_NEW)
    ] = "after",
    gates: Annotated[
        str | None,
        typer.Option(
            help="Weights that the compressed, the selected and the window branch start with, such as 0.02,0.49,0.49.",
            rich_help_panel=_NEW,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: as they are saved.")] = "auto",
    warm_up_steps: Annotated[
        int,
        typer.Option(help="Steps that bring sparse layers close to full attention.", rich_help_panel=_WARM_UP),
    ] = 0,
    new_steps: Annotated[
        int | None,
        typer.Option(
            help="Of these, how many train gates and compressors alone. Default: all.", rich_help_panel=_WARM_UP
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Files and folders, as those of fsa train --model. Several times.", rich_help_panel=_WARM_UP),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Where text is in JSONL and tables.", rich_help_panel=_WARM_UP)
    ] = "text",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a step.", rich_help_panel=_WARM_UP)] = 8192,
    learning_rate: Annotated[
        float, typer.Option(help="Of gates and compressors at the start.", rich_help_panel=_WARM_UP)
    ] = 1e-2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_WARM_UP)] = "auto",
) -> None:
    """Give a transformers model sparse attention: all weights are kept, what is new starts close to the original."""
    # Takes seconds, and what does not need it should not wait for it.
    transformers = optional("transformers", "hf", "conversion")
    integration = importlib.import_module("...integrations.transformers", __name__)

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise bad("--output", "a new or an empty folder", repr(str(output)), "choose another, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_positive("--warm-up-steps", warm_up_steps, 0)
    if bool(warm_up_steps) != bool(text):
        got = "no --text" if warm_up_steps else "--text alone"
        raise bad("--warm-up-steps and --text", "both given, or none of them", got)
    nsa = integration.conversion_config(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window_size=window_size,
        compression=compression,
        rope=rope,
    )
    start = integration.START_OF_GATES if gates is None else _numbers(gates)
    chosen = None if layers is None else layer_numbers("--layers", layers)
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    converted = integration.convert(model, nsa, layers=chosen, gates=start, dtype=dtype)
    console = Console(highlight=False)
    if warm_up_steps:
        if tokenizer is None:
            raise bad("model", "with a tokenizer, to warm up on text", repr(model))
        converted.to(resolve_device(device))
        with tempfile.TemporaryDirectory() as folder:
            corpus = read_tokens(
                text or [],
                tokenizer=Tokenizer(tokenizer, model),
                cache=Path(folder),
                suffixes=DEFAULT_SUFFIXES,
                text_field=text_field,
            )
            packs = TrainingPacks(corpus.train, sequence_length, seed=0)
            integration.warm_up(
                converted,
                _batches(packs, converted.device),
                steps=warm_up_steps,
                new_steps=new_steps,
                learning_rate=learning_rate,
                on_step=functools.partial(_say, console, warm_up_steps),
            )
    # Beside its place, so that what is there is whole.
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output.parent))
    try:
        converted.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.replace(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sparse, total = len(converted.config.sparse_layers), converted.config.num_hidden_layers
    console.print(f"{type(converted).__name__}, {sparse} of {total} layers sparse, in {output}")
    if tokenizer is None:
        console.print("without a tokenizer: there is none beside the model")
    console.print("load it: import flash_sparse_attention.integrations.transformers")
    console.print(f"         AutoModelForCausalLM.from_pretrained({str(output)!r})", markup=False)


def _batches(packs: TrainingPacks, device: torch.device) -> Iterator[dict[str, Any]]:
    for index in itertools.count():
        pack = packs.pack(index).to(device)
        yield {"input_ids": pack.tokens[None], "layout": pack.layout}


def _say(console: Console, steps: int, record: Any) -> None:
    """Twenty lines at the most."""
    if record.step in (1, steps) or record.step % max(1, steps // 20) == 0:
        console.print(f"step {record.step}/{steps}  distance from full attention {record.loss:.4f}")


def _numbers(text: str) -> list[float]:
    """The numbers in `0.02,0.49,0.49`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise bad("--gates", "three numbers with commas between them", repr(text)) from error
