"""The command `fsa`: train, generate, inspect, verify, tune, convert, bench."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from .bench import bench_app
from .convert import convert
from .generate import generate
from .inspect import inspect
from .train import train
from .tune import tune
from .verify import verify

app = typer.Typer(
    name="fsa",
    help="Flash Sparse Attention: Native Sparse Attention for long contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, generate, inspect, verify, tune, convert):
    app.command()(command)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Entry point of `fsa`. What a user can mend ends in one line and exit code 2, not in a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print("[bold red]error:[/]", end=" ")
        Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True).print(str(error))
        sys.exit(2)
