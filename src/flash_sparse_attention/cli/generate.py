"""`fsa generate`: continues a text with a trained model."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..training import END_OF_TEXT, VOCAB_SIZE, TrainConfig, load_model, resolve_device
from ..training.data import encode
from ..training.sampling import cached, check_sampling, decode_stream, generate_tokens, uncached
from ..validation import bad, check_positive

_DEFAULT_TEMPERATURE = 0.8


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a run, or of one of its checkpoints.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="How the text begins; several are continued together. Default: nothing, a new document.",
            show_default=False,
        ),
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
    prompts = [[END_OF_TEXT, *tokens] for tokens in _prompt_tokens(prompt, prompt_file)]
    where = resolve_device(device)
    model, state = load_model(checkpoint, device=where, impl=impl)
    if model.config.vocab_size != VOCAB_SIZE:
        raise bad("checkpoint", f"of a model of bytes, with {VOCAB_SIZE} tokens", f"{model.config.vocab_size} tokens")
    autocast_dtype = TrainConfig.from_dict(state.train_config).autocast_dtype(where)
    batch, longest = len(prompts), max(map(len, prompts))
    if model.config.attention == "nsa":
        read = cached(model, batch, longest + check_positive("max_new_tokens", max_new_tokens), autocast_dtype)
    else:
        read = uncached(model, batch, autocast_dtype)
    steps = generate_tokens(
        read, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    clock, texts = _Clock(), [list(tokens) for tokens in prompts]

    def drawn() -> Iterator[int]:
        """The tokens of the first sequence, as they come; those of all are noted."""
        for tokens in clock.over(steps):
            for text, token in zip(texts, tokens, strict=True):
                if token is not None:
                    text.append(token)
            if tokens[0] is not None:
                yield tokens[0]

    # One decoder for both: a character may begin in the prompt and end in what is added.
    stream = decode_stream(itertools.chain(prompts[0], drawn()))
    if batch == 1:
        for text in stream:
            _write(text)
        _write("\n")
    else:
        for _ in stream:
            pass
        for number, tokens in enumerate(texts, start=1):
            _write(f"--- {number} of {batch}\n{''.join(decode_stream(tokens))}\n")
    new = sum(map(len, texts)) - sum(map(len, prompts))
    ended = ", the end of the text," if all(text[-1] == END_OF_TEXT for text in texts) else ""
    read_first = f"{sum(map(len, prompts))} of the prompt{'s' if batch > 1 else ''}"
    typer.echo(
        f"{new} tokens{ended} at {new / clock.total:.1f} tokens/s; the first after {clock.first:.3f} s "
        f"({read_first}), then {clock.per_step_ms:.1f} ms a step",
        err=True,
    )


class _Clock:
    """Seconds to the first step, and from there on."""

    def __init__(self) -> None:
        self.first = self.total = 0.0
        self.steps = 0

    def over(self, steps: Iterator[list[int | None]]) -> Iterator[list[int | None]]:
        """The steps, timed."""
        began = time.perf_counter()
        for step in steps:
            self.steps += 1
            self.total = time.perf_counter() - began
            self.first = self.first or self.total
            yield step

    @property
    def per_step_ms(self) -> float:
        """Of the steps after the first."""
        return 1000 * (self.total - self.first) / max(1, self.steps - 1)


def _prompt_tokens(prompts: list[str] | None, prompt_file: Path | None) -> list[list[int]]:
    if prompt_file is None:
        return [encode(prompt) for prompt in prompts or [""]]
    if prompts:
        raise bad("--prompt-file", "left out with --prompt", repr(str(prompt_file)), "give one of them")
    try:
        return [list(prompt_file.read_bytes())]
    except OSError as error:
        raise bad("--prompt-file", "a file that can be read", f"{str(prompt_file)!r} ({error.strerror})") from error


def _write(text: str) -> None:
    """Writes to standard output, at once, as UTF-8 whatever the locale."""
    if sys.stdout.isatty():
        # Any byte may come out of a model, and control characters could do things to a terminal.
        text = "".join(x if x.isprintable() or x in "\n\t" else "\ufffd" for x in text)
    typer.echo(text.encode(), nl=False)
