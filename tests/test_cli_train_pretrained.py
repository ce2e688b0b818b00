"""`fsa train --model`: flags, what it prints, resuming; and that other commands say what such a run is."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from flash_sparse_attention.cli import app
from flash_sparse_attention.cli.layers import layer_numbers
from flash_sparse_attention.training import TrainConfig, log
from flash_sparse_attention.training.checkpoint import read_state
from pretrained_runs import texts, write_jsonl, write_model

COMMON = (
    *("--sequence-length", "64", "--batch-size", "1", "--steps", "2", "--held-out-fraction", "0.2"),
    *("--eval-packs", "2", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with text, which is the working directory."""
    write_jsonl(tmp_path / "corpus.jsonl", texts(), field="body")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fsa(*arguments: str):
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def config_of(run) -> TrainConfig:
    return TrainConfig.from_dict(read_state(max(run.glob("step-*"))).train_config)


def test_trains_resumes_and_says_what_came_of_it(project, model):
    result = fsa("train", "corpus.jsonl", "--model", model, "--text-field", "body", *COMMON)
    assert result.exit_code == 0
    run = project / "runs" / "tiny-llama"
    config = config_of(run)
    assert (config.pretrained, config.text_field, config.learning_rate) == (str(model), "body", 5e-5)
    assert "tokenised 24 documents" in result.stdout
    assert f"M parameters, {model}, on cpu in fp32, into runs/tiny-llama" in result.stdout
    records = log.read(run / "log.jsonl")
    perplexity = records[-1].perplexity_by_position["0"]
    assert f"perplexity       {perplexity:.2f} from 0" in result.stdout
    assert "AutoModelForCausalLM.from_pretrained('runs/tiny-llama/step-00000002')" in result.stdout
    assert "bits per byte" not in result.stdout
    assert "fsa generate" not in result.stdout

    resumed = fsa("train", "--resume", "--output", run, "--steps", "3", "--learning-rate", "1e-3")
    assert resumed.exit_code == 0
    assert "tokenised" not in resumed.stdout
    assert [x.step for x in log.read(run / "log.jsonl")] == [1, 2, 3]

    with pytest.raises(ValueError, match=r"of a model of transformers: use transformers: AutoModelForCausalLM"):
        fsa("generate", run)
    with pytest.raises(ValueError, match="of a model of transformers"):
        fsa("inspect", run, "--prompt", "x")


def test_flags_of_sparse_attention_are_for_the_conversion(project, model, monkeypatch):
    seen = []
    # The module; as an attribute of the package, the name is the command's.
    module = sys.modules["flash_sparse_attention.cli.train"]
    monkeypatch.setattr(module, "run_training", lambda config, *args, **options: seen.append(config) or 1 / 0)
    (project / "run.toml").write_text(f'pretrained = "{model}"\nconvert = true\n[nsa]\nblock_size = 32\n')
    for arguments in (
        ["--model", model, "--convert", "--convert-layers", "0-1,3", "--window-size", "128", "--gate", "per_token"],
        ["--config", "run.toml", "--window-size", "128", "--compile", "--tensorboard"],
        ["--window-size", "128"],
    ):
        with pytest.raises(ZeroDivisionError):
            fsa("train", "corpus.jsonl", *arguments)
    assert seen[0].nsa == {"window_size": 128, "gate": "per_token"}
    assert (seen[0].convert, seen[0].convert_layers) == (True, (0, 1, 3))
    assert seen[0].model == TrainConfig().model
    assert seen[1].nsa == {"block_size": 32, "window_size": 128}
    assert (seen[1].compile, seen[1].tensorboard) == (True, True)
    assert seen[2].model.nsa.window_size == 128
    assert (seen[2].nsa, seen[2].learning_rate) == ({}, TrainConfig().learning_rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--convert"], "convert must be left out without pretrained"),
        (["--model", "nowhere"], "a folder that `save_pretrained` wrote, got 'nowhere'"),
        (["--model", "m", "--hidden-size", "64"], "model must be left out with pretrained"),
        (["--model", "m", "--window-size", "64"], "nsa must be left out without convert"),
        (["--model", "m", "--convert", "--convert-layers", "0-"], "--convert-layers must be numbers and ranges"),
    ],
)
def test_bad_flags(project, arguments, message):
    with pytest.raises(ValueError, match=message):
        fsa("train", "corpus.jsonl", *arguments)


def test_layers():
    assert layer_numbers("--convert-layers", "0-3, 7") == [0, 1, 2, 3, 7]
    for text in ("", "a", "-3", "1-x", "3-1"):
        with pytest.raises(ValueError, match="--convert-layers must be"):
            layer_numbers("--convert-layers", text)
