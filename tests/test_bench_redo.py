"""`fsa bench redo`: which commands it runs, what it keeps, and the exit code."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from typer.testing import CliRunner

from bench_runs import operator_rows, run
from flash_sparse_attention import cli
from flash_sparse_attention.bench.results import Report
from flash_sparse_attention.cli import bench_redo

# What stands for `fsa bench`: writes its arguments to the output, before it sleeps or fails where it is told to.
STUB = """
import json, sys, time
words = sys.argv[1:]
with open(words[words.index("--output") + 1], "w") as file:
    json.dump(words, file)
if "--sleeps" in words:
    time.sleep(60)
sys.exit(3 if "--fails" in words else 0)
"""


@pytest.fixture
def redo(tmp_path, monkeypatch):
    """Redoes results of such commands by names; its output."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(bench_redo, "_BENCH", (sys.executable, str(stub)))
    (tmp_path / "new").mkdir()

    def redo(commands, *options, code=0, folder=tmp_path / "new"):
        for name, command in commands.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            dataclasses.replace(run(operator_rows()), command=command).save(tmp_path / name)
        files = [str(tmp_path / name) for name in commands]
        result = CliRunner().invoke(cli.app, ["bench", "redo", *files, "--folder", str(folder), *options])
        assert result.exit_code == code, (result.output, result.exception)
        return " ".join((result.output or str(result.exception)).split())

    return redo


def words(path):
    return json.loads(path.read_text())


def test_runs_what_the_results_say(redo, tmp_path):
    shown = redo(
        {
            "a.json": "fsa bench --output old.json --suites operators --lengths 64K --commit abc --overwrite",
            "b.json": "fsa bench --suites=decode --output=old.json --models 'llama 3'",
        },
        "--commit", "def",
    )  # fmt: skip
    new = tmp_path / "new"
    tail = ["--commit", "def", "--output"]
    a, b = ["--suites", "operators", "--lengths", "64K"], ["--suites=decode", "--models", "llama 3"]
    assert words(new / "a.json") == [*a, *tail, str(new / "a.json"), "--overwrite"]
    assert words(new / "b.json") == [*b, *tail, str(new / "b.json"), "--overwrite"]
    assert "a.json: fsa bench --suites operators --lengths 64K a.json: done after" in shown
    assert Report.load(tmp_path / "a.json").command.startswith("fsa bench --output old.json")


def test_goes_on_after_a_failure_and_says_so(redo, tmp_path):
    shown = redo({"a.json": "fsa bench --fails", "b.json": "fsa bench"}, code=1)
    assert "a.json: failed with exit code 3" in shown
    assert (tmp_path / "new" / "b.json").exists()
    assert shown.endswith(f"Not finished: {tmp_path / 'a.json'}")


def test_stops_in_time_and_keeps_what_there_is(redo, tmp_path):
    shown = redo({"a.json": "fsa bench --sleeps", "b.json": "fsa bench"}, "--seconds", "2", code=1)
    assert "a.json: stopped after 2 s" in shown
    assert "b.json: not begun" in shown
    assert "--sleeps" in words(tmp_path / "new" / "a.json")
    assert not (tmp_path / "new" / "b.json").exists()


@pytest.mark.parametrize(
    ("commands", "options", "message"),
    [
        ({"a.json": "fsa train --output x"}, [], "a result whose command is `fsa bench`"),
        ({"a.json": "fsa bench", "there/a.json": "fsa bench"}, [], "two named 'a.json'"),
        ({"a.json": "fsa bench"}, ["--seconds", "0"], "--seconds must be more than 0"),
    ],
)
def test_what_cannot_be_redone(redo, tmp_path, commands, options, message):
    assert message in redo(commands, *options, code=1)
    assert not list((tmp_path / "new").iterdir())


def test_results_are_replaced_only_if_asked_for_and_never_by_a_part(redo, tmp_path):
    kept = (tmp_path / "new" / "a.json", tmp_path / "a.json")
    kept[0].write_text("kept")
    assert "--overwrite replaces it" in redo({"a.json": "fsa bench --fails"}, code=1)
    assert kept[0].read_text() == "kept"
    shown = redo({"a.json": "fsa bench"}, "--overwrite", "--seconds", "9", code=1, folder=tmp_path)
    assert "would replace a result by a part of it" in shown
    assert Report.load(kept[1]).command == "fsa bench"
    redo({"a.json": "fsa bench"}, "--overwrite")
    assert "--overwrite" in words(kept[0])
