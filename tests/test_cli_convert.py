"""`fsa convert` and the examples with models of transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from flash_sparse_attention.cli import app
from pretrained_runs import texts, write_jsonl, write_model

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = [
    *("--kernel-size", "8", "--kernel-stride", "4", "--block-size", "8", "--num-selected-blocks", "4"),
    *("--window-size", "16"),
]


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_converts_and_warms_up(tmp_path: Path):
    model, corpus = write_model(tmp_path / "model"), write_jsonl(tmp_path / "corpus.jsonl", texts())
    output = tmp_path / "sparse"
    output.mkdir()
    warm_up = ["--warm-up-steps", 3, "--new-steps", 2, "--text", corpus, "--sequence-length", 64]
    result = run(model, "--output", output, "--layers", "0", "--gates", "0.1,0.6,0.3", *SIZES, *warm_up)
    assert result.exit_code == 0, result.output
    assert "step 3/3" in result.output
    assert "1 of 2 layers sparse" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"model", "corpus.jsonl", "sparse"}
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.sparse_layers == [0]
    assert loaded.config.nsa_config.window_size == 16
    assert loaded.config.nsa_gates == [0.1, 0.6, 0.3]
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    changed = {name for name, x in before.items() if not x.equal(loaded.state_dict()[name])}
    # The last step trains the projections of the sparse layer, and nothing else of the original.
    assert changed
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)
    assert AutoTokenizer.from_pretrained(output).eos_token == AutoTokenizer.from_pretrained(model).eos_token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0-x"], "--layers must be numbers and ranges"),
        (["--layers", "1-0"], "--layers must be numbers and ranges"),
        (["--layers", "7"], "layers must be"),
        (["--gates", "a,b,c"], "--gates must be three numbers"),
        (["--gates", "0.5,0.5"], "must be a number between 0 and 1 for each"),
        (["--warm-up-steps", "3"], "both given, or none"),
        (["--text", "corpus.jsonl"], "both given, or none"),
        (["--block-size", "60"], "block_size must be a multiple"),
        (["--warm-up-steps", "-1"], "--warm-up-steps must be"),
    ],
)
def test_refuses(tmp_path: Path, arguments: list[str], message: str):
    output = tmp_path / "sparse"
    result = run(write_model(tmp_path / "model"), "--output", output, *arguments)
    assert result.exit_code != 0
    assert message in str(result.exception)
    assert not output.exists()


def test_keeps_what_is_there(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    result = run(write_model(tmp_path / "model"), "--output", tmp_path / "full")
    assert "--output must be a new or an empty folder" in str(result.exception)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "arguments", "printed"),
    [
        ("convert.py", ["--steps", "2", "--length", "256"], "distance from full attention"),
        ("trainer.py", ["--steps", "2", "--length", "256"], "loss "),
    ],
)
def test_examples_run(name: str, arguments: list[str], printed: str, tmp_path: Path):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert printed in found.stdout
