"""`fsa generate`: continues a text with a trained model."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from ..training import END_OF_TEXT, VOCAB_SIZE, TrainConfig, load_model, resolve_device
from ..training.data import encode
from ..training.sampling import check_sampling, decode_stream, generate_tokens
from ..validation import bad

_DEFAULT_TEMPERATURE = 0.8


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a run, or of one of its checkpoints.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="How the text begins. Default: nothing, a new document.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File with the beginning of the text.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens (bytes) to add at the most.")] = 200,
    temperature: Annotated[
        float | None,
        typer.Option(
            help=f"Less is more predictable; 0 takes the likeliest token. Default: {_DEFAULT_TEMPERATURE}.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Draws from the likeliest tokens that have this share together.")] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token: --temperature 0.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    impl: Annotated[str, typer.Option(help="Implementation: auto, reference, blockwise or triton.")] = "auto",
) -> None:
    """Continue a text with a trained model."""
    if greedy and temperature is not None:
        raise bad("--temperature", "left out with --greedy", temperature, "give one of them")
    if temperature is None:
        temperature = 0.0 if greedy else _DEFAULT_TEMPERATURE
    check_sampling(temperature, top_p)
    # Every document begins behind the end of the one before, so this is what the model knows as a beginning.
    tokens = [END_OF_TEXT, *_prompt_tokens(prompt, prompt_file)]
    where = resolve_device(device)
    model, state = load_model(checkpoint, device=where, impl=impl)
    if model.config.vocab_size != VOCAB_SIZE:
        raise bad("checkpoint", f"of a model of bytes, with {VOCAB_SIZE} tokens", f"{model.config.vocab_size} tokens")
    autocast_dtype = TrainConfig.from_dict(state.train_config).autocast_dtype(where)

    def next_logits(prefix: Tensor) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(where.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        ):
            return model(prefix.to(where))[-1]

    drawn = generate_tokens(
        next_logits, tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    new: list[int] = []

    def noted() -> Iterator[int]:
        for token in drawn:
            new.append(token)
            yield token

    began = time.perf_counter()
    # One decoder for both: a character may begin in the prompt and end in what is added.
    for text in decode_stream(itertools.chain(tokens, noted())):
        _write(text)
    _write("\n")
    speed = len(new) / (time.perf_counter() - began)
    ended = ", the end of the text," if new[-1] == END_OF_TEXT else ""
    typer.echo(f"{len(new)} tokens{ended} at {speed:.1f} tokens/s", err=True)


def _prompt_tokens(prompt: str | None, prompt_file: Path | None) -> list[int]:
    if prompt_file is None:
        return encode(prompt or "")
    if prompt is not None:
        raise bad("--prompt-file", "left out with --prompt", repr(str(prompt_file)), "give one of them")
    try:
        return list(prompt_file.read_bytes())
    except OSError as error:
        raise bad("--prompt-file", "a file that can be read", f"{str(prompt_file)!r} ({error.strerror})") from error


def _write(text: str) -> None:
    """Writes to standard output, at once, as UTF-8 whatever the locale."""
    if sys.stdout.isatty():
        # Any byte may come out of a model, and control characters could do things to a terminal.
        text = "".join(x if x.isprintable() or x in "\n\t" else "\ufffd" for x in text)
    typer.echo(text.encode(), nl=False)
