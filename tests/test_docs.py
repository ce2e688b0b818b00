"""What the documents show works: Python runs, TOML is a configuration, `fsa` takes the options, links lead on."""

from __future__ import annotations

import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from flash_sparse_attention.cli import app
from flash_sparse_attention.training import TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHELLS = ("bash", "sh", "console")


def commands_of(group: Any, before: str = "") -> dict[str, Any]:
    """All commands by name, those of a group as `bench report`."""
    found = {}
    for word, command in group.commands.items():
        found[before + word] = command
        if hasattr(command, "commands"):
            found |= commands_of(command, f"{before}{word} ")
    return found


COMMANDS = commands_of(typer.main.get_command(app))


def blocks(document: Path, *languages: str) -> list[tuple[int, str]]:
    """(line number of the first line, text) of the fenced blocks in these languages."""
    found, start, lines = [], None, document.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, language = number, line[3:].strip()
        else:
            if language in languages:
                found.append((start + 1, "\n".join(lines[start : number - 1]) + "\n"))
            start = None
    assert start is None, f"{document.name}: a block without an end at line {start}"
    return found


def commands(text: str, prompt: str = "") -> list[list[str]]:
    """The `fsa` command lines in a shell script; lines of a session that begin with no prompt are output."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix(prompt), comments=True) for line in lines if line.startswith(prompt)]
    return [
        list(itertools.takewhile(lambda word: word not in (">", "|"), line[1:]))
        for line in words
        if line[:1] == ["fsa"]
    ]


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def documents_with(*languages: str) -> list:
    return [pytest.param(path, id=name(path)) for path in DOCUMENTS if blocks(path, *languages)]


@pytest.mark.parametrize("document", documents_with("python"))
def test_python_runs(document, tmp_path, monkeypatch):
    """The blocks of a file share their names, as a reader would type them in one after the other."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__document__"}
    for line, text in blocks(document, "python"):
        # Blank lines above, so that a traceback has the line number of the document.
        exec(compile("\n" * (line - 1) + text, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", documents_with("toml"))
def test_toml_is_a_configuration(document):
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    for _, text in blocks(document, "toml"):
        TrainConfig.from_dict(toml.loads(text))


@pytest.mark.parametrize("document", documents_with(*SHELLS))
def test_commands_take_their_options(document):
    scripts = [text for _, text in blocks(document, "bash", "sh")]
    lines = [line for text in scripts for line in commands(text)]
    lines += [line for _, text in blocks(document, "console") for line in commands(text, prompt="$ ")]
    for arguments in lines:
        parse(arguments)


def parse(arguments: list[str]) -> None:
    """Reads the options of a command without running it."""
    if arguments[:1] in ([], ["--help"]):
        return
    words = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 1)
    command, rest = " ".join(arguments[:words]), arguments[words:]
    assert command in COMMANDS, f"there is no `fsa {command}`"
    try:
        COMMANDS[command].make_context(command, rest)
    except typer.Exit:
        assert "--help" in rest
    except Exception as error:  # of click, or of typer's copy of it
        pytest.fail(f"fsa {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize(
    "arguments", [["inspect", "--nonsense"], ["generate"], ["train", "--steps", "many"], ["bench", "compare", "a"]]
)
def test_parse_refuses(arguments):
    """The test above can fail."""
    with pytest.raises(pytest.fail.Exception):
        parse(arguments)


def command_sections() -> dict[str, dict[str, str]]:
    """The options in docs/cli.md: command -> option -> default."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ `fsa ([\w ]+)`\n(.*?)(?=^##+ |\Z)", text, flags=re.M | re.S))
    row = re.compile(r"^\| `(--[\w-]+)[^|]*\| *([^|]*?) *\|", flags=re.M)
    return {command: dict(row.findall(section)) for command, section in sections.items()}


def test_every_option_is_documented():
    """A section for each command, with a row for each option, and nothing else."""
    sections = command_sections()
    assert sections.keys() == COMMANDS.keys()
    for command, documented in sections.items():
        options = {parameter.opts[0] for parameter in COMMANDS[command].params if parameter.opts[0].startswith("--")}
        assert documented.keys() == options, command


def test_documented_defaults_of_training():
    values = TrainConfig().to_dict()
    defaults = {**values["model"]["nsa"], **values["model"], **values}
    named = {
        option.removeprefix("--").replace("-", "_"): shown for option, shown in command_sections()["train"].items()
    }
    fields = named.keys() & defaults.keys()
    assert len(fields) > 30
    assert {field: named[field] for field in fields} == {field: str(defaults[field]) for field in fields}


@pytest.mark.parametrize("document", [pytest.param(path, id=name(path)) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
