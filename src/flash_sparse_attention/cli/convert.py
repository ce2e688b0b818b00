"""`fsa convert`: gives a transformers model sparse attention and saves it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..validation import bad


def convert(
    model: Annotated[str, typer.Argument(help="Name or folder of a causal language model of transformers.")],
    output: Annotated[Path, typer.Option(help="Folder to save to; new or empty.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers that become sparse, such as 0-3,6. Default: all.", show_default=False),
    ] = None,
    kernel_size: Annotated[int, typer.Option(help="Tokens that a compressed token summarises.")] = 32,
    kernel_stride: Annotated[int, typer.Option(help="Tokens between windows of compression.")] = 16,
    block_size: Annotated[int, typer.Option(help="Tokens of a selection block.")] = 64,
    num_selected_blocks: Annotated[int, typer.Option(help="Blocks that a query keeps.")] = 16,
    window_size: Annotated[int, typer.Option(help="Tokens of the sliding window.")] = 512,
    compression: Annotated[str, typer.Option(help="mean, weighted, linear or mlp.")] = "weighted",
    rope: Annotated[str, typer.Option(help="Rotation of keys after or before their compression.")] = "after",
    gates: Annotated[
        str | None,
        typer.Option(
            help="Weights that the compressed, the selected and the window branch start with, such as 0.02,0.49,0.49.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto: as they are saved.")] = "auto",
) -> None:
    """Give a transformers model sparse attention: all weights are kept, what is new starts close to the original."""
    # Takes seconds, and what does not need it should not wait for it.
    from transformers import AutoTokenizer

    from ..integrations.transformers import START_OF_GATES, conversion_config
    from ..integrations.transformers import convert as run

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise bad("--output", "a new or an empty folder", repr(str(output)), "choose another, or remove it")
    nsa = conversion_config(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        window_size=window_size,
        compression=compression,
        rope=rope,
    )
    start = START_OF_GATES if gates is None else _numbers(gates)
    chosen = None if layers is None else _layers(layers)
    converted: Any = run(model, nsa, layers=chosen, gates=start, dtype=dtype)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    try:
        converted.save_pretrained(output)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    sparse, total = len(converted.config.sparse_layers), converted.config.num_hidden_layers
    console = Console(highlight=False)
    console.print(f"{type(converted).__name__}, {sparse} of {total} layers sparse, in {output}")
    if tokenizer is None:
        console.print("without a tokenizer: there is none beside the model")
    console.print("load it: import flash_sparse_attention.integrations.transformers")
    console.print(f"         AutoModelForCausalLM.from_pretrained({str(output)!r})", markup=False)


def _layers(text: str) -> list[int]:
    """The numbers in `0-3,6`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise bad("--layers", "numbers and ranges such as 0-3,6", repr(text))
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    return found


def _numbers(text: str) -> list[float]:
    """The numbers in `0.02,0.49,0.49`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise bad("--gates", "three numbers with commas between them", repr(text)) from error
