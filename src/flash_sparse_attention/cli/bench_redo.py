"""`fsa bench redo`: measures again what results hold."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..bench.sources import read_report
from ..validation import bad

_BENCH = (sys.executable, "-m", "flash_sparse_attention.cli", "bench")
# Those of the earlier run: with a value, and without.
_REPLACED, _DROPPED = ("--output", "--commit"), ("--overwrite",)


def redo(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Results of fsa bench.")],
    folder: Annotated[Path, typer.Option(help="Folder for the new results, each under the name of the old one.")],
    seconds: Annotated[
        float | None, typer.Option(help="When to stop: what is measured up to then is kept.", show_default="never")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replaces results in that folder.")] = False,
    commit: Annotated[
        str | None, typer.Option(help="What is measured, where the sources lie in no repository.")
    ] = None,
) -> None:
    """Run the commands of results again, one after the other, each in a process of its own.

    Exit code 1 if one of them failed or was not finished.
    """
    if seconds is not None and not seconds > 0:
        raise bad("--seconds", "more than 0", seconds)
    arguments = {file: _arguments(file) for file in dict.fromkeys(files)}
    outputs = {file: folder / file.name for file in arguments}
    for file, output in outputs.items():
        if sum(output == other for other in outputs.values()) > 1:
            raise bad("FILE", "files of different names", f"two named {output.name!r}", "both would be written as one")
        if output.exists() and not overwrite:
            raise bad("--folder", "without such results", f"{str(output)!r}, which is there", "--overwrite replaces it")
        if output.exists() and output.samefile(file) and seconds is not None:
            raise bad(
                "--folder", "another folder than that of FILE with --seconds", repr(str(folder)),
                "what is stopped would replace a result by a part of it",
            )  # fmt: skip
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    given = [] if commit is None else ["--commit", commit]
    end = None if seconds is None else time.monotonic() + seconds
    unfinished = []
    for file, words in arguments.items():
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            unfinished.append(file)
            console.print(f"{file.name}: not begun")
            continue
        console.print(f"{file.name}: {shlex.join(['fsa', 'bench', *words])}")
        started = time.monotonic()
        code = _run([*_BENCH, *words, *given, "--output", str(outputs[file]), "--overwrite"], left)
        took = f"after {time.monotonic() - started:.0f} s"
        if code == 0:
            console.print(f"{file.name}: done {took}")
            continue
        unfinished.append(file)
        console.print(f"{file.name}: {f'stopped {took}' if code is None else f'failed with exit code {code} {took}'}")
    if unfinished:
        console.print(f"Not finished: {', '.join(str(file) for file in unfinished)}")
        raise typer.Exit(1)


def _arguments(file: Path) -> list[str]:
    """What `fsa bench` was given for a result, but for where it was written and what was measured."""
    command = read_report(file).command
    words = shlex.split(command)
    if words[:2] != ["fsa", "bench"]:
        raise bad("FILE", "a result whose command is `fsa bench`", f"{str(file)!r}, of `{command}`")
    kept = []
    rest = iter(words[2:])
    for word in rest:
        if word in _REPLACED:
            next(rest, None)
        elif word.partition("=")[0] not in (*_REPLACED, *_DROPPED):
            kept.append(word)
    return kept


def _run(command: list[str], seconds: float | None) -> int | None:
    """Its exit code; None if it was stopped."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Results are written as they come, so that nothing waits for a good end.
            process.kill()
            return None
        except BaseException:
            process.kill()
            raise
