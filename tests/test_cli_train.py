"""`fsa train`: flags, the TOML file, what it prints, and Ctrl-C in a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from flash_sparse_attention.cli import app
from flash_sparse_attention.cli.train import _Bar
from flash_sparse_attention.training import TrainConfig, load_model, log
from flash_sparse_attention.training.checkpoint import read_state
from training_runs import TINY_MODEL, write_texts

TOML = """
held_out_fraction = 0.2
sequence_length = 64
steps = 4
warmup_steps = 2
eval_every = 2
eval_packs = 2
save_every = 2

[model]
hidden_size = 32
intermediate_size = 48
num_layers = 1
num_heads = 4
num_kv_heads = 1
head_dim = 8

[model.nsa]
kernel_size = 8
kernel_stride = 4
block_size = 8
num_selected_blocks = 4
window_size = 16
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with texts and a configuration, which is the working directory."""
    write_texts(tmp_path / "texts")
    (tmp_path / "run.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fsa(*arguments: str):
    """The command in this process; errors come out as exceptions, as `main` gets them."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def config_of(run) -> TrainConfig:
    return TrainConfig.from_dict(read_state(max(run.glob("step-*"))).train_config)


def test_trains_and_says_what_came_of_it(project):
    result = fsa("train", "texts", "--config", "run.toml")
    assert result.exit_code == 0
    run = project / "runs" / "nsa"
    assert sorted(x.name for x in run.iterdir()) == [
        *("log.jsonl", "loss.png", "run.json", "step-00000002", "step-00000004"),
    ]
    records = log.read(run / "log.jsonl")
    assert f"held-out loss    {records[-1].eval_loss:.4f} nats per token" in result.stdout
    assert f"{records[-1].eval_bits_per_byte:.4f} bits per byte" in result.stdout
    assert f"{json.loads((run / 'run.json').read_text())['unigram_entropy']:.4f} nats" in result.stdout
    for shown in ("step 4/4", "tokens/s", "step-00000004", "loss.png", "log.jsonl", "fsa generate runs/nsa --prompt"):
        assert shown in result.stdout
    assert "nsa attention, on cpu in fp32, into runs/nsa" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200


class TestOptions:
    def test_flags_come_before_the_file_and_the_file_before_the_defaults(self, project):
        fsa("train", "texts", "--config", "run.toml", "--steps", "2", "--window-size", "24", "--output", "out")
        config = config_of(project / "out")
        assert config.steps == 2
        assert config.model.nsa.window_size == 24
        assert (config.warmup_steps, config.model.hidden_size, config.model.nsa.block_size) == (2, 32, 8)
        assert config.keep_last == TrainConfig().keep_last
        assert config.model.nsa.compression == TrainConfig().model.nsa.compression
        assert config.paths == ("texts",)

    def test_full_attention_goes_into_a_run_of_its_own(self, project):
        fsa("train", "texts", "--config", "run.toml", "--steps", "1", "--attention", "full")
        assert config_of(project / "runs" / "full").model.attention == "full"

    def test_every_field_has_a_flag(self):
        shown = " ".join(fsa("train", "--help").stdout.split())
        config = TrainConfig().to_dict()
        fields = [*config, *config["model"], *config["model"]["nsa"]]
        elsewhere = {"paths", "suffixes", "model", "nsa", "vocab_size", "norm_eps", "epsilon"}
        missing = [x for x in fields if x not in elsewhere and f"--{x[:14].replace('_', '-')}" not in shown]
        assert not missing
        for panel in ("Run", "Text", "Model", "Sparse attention", "Optimizer", "Machine"):
            assert f"─ {panel} ─" in shown

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("stepz = 3", r"run\.toml: the configuration has no field 'stepz': known fields are .*steps"),
            ("[model]\nlayers = 3", r"run\.toml: model has no field 'layers': known fields are .*num_layers"),
            ("[model.nsa]\nwindow = 3", r"run\.toml: model\.nsa has no field 'window': known fields are .*window_size"),
            ("steps = 'many'", r"run\.toml: steps must be an integer of at least 1, got 'many'"),
            ("steps = ", "--config must be a TOML file, got 'run.toml'"),
        ],
    )
    def test_a_bad_file(self, project, text, message):
        (project / "run.toml").write_text(text)
        with pytest.raises(ValueError, match=message):
            fsa("train", "texts", "--config", "run.toml")
        assert not (project / "runs").exists()

    def test_a_missing_file(self, project):
        with pytest.raises(
            ValueError, match=r"--config must be a file that can be read, got 'no\.toml' \(No such file"
        ):
            fsa("train", "texts", "--config", "no.toml")

    def test_suffixes(self, project):
        with pytest.raises(ValueError, match=r"end with \.md, \.rst"):
            fsa("train", "texts", "--suffix", ".md", "--suffix", ".rst")


class TestRuns:
    def test_a_run_is_kept_resumed_and_replaced(self, project):
        fsa("train", "texts", "--config", "run.toml")
        with pytest.raises(ValueError, match=r"'runs/nsa', which has step-00000004: .*--resume.*--overwrite"):
            fsa("train", "texts", "--config", "run.toml")
        # Paths and sizes come from the run itself.
        resumed = fsa("train", "--resume", "--steps", "6")
        assert resumed.exit_code == 0
        assert config_of(project / "runs" / "nsa").paths == ("texts",)
        assert [x.step for x in log.read(project / "runs" / "nsa" / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
        with pytest.raises(ValueError, match=r"model\.num_layers \(1, now 2\)"):
            fsa("train", "--resume", "--num-layers", "2")
        fsa("train", "texts", "--config", "run.toml", "--overwrite", "--steps", "1")
        assert [x.step for x in log.read(project / "runs" / "nsa" / "log.jsonl")] == [1]

    def test_nothing_to_resume(self, project):
        with pytest.raises(ValueError, match=r"got 'runs/nsa', which does not exist"):
            fsa("train", "texts", "--resume")

    def test_a_loss_that_is_not_finite_is_an_error_of_one_line(self, project):
        with pytest.raises(ValueError, match="loss and gradient must be finite"):
            fsa("train", "texts", "--config", "run.toml", "--learning-rate", "1e30", "--warmup-steps", "0")


def test_the_bar_shows_loss_and_speed(project):
    from rich.console import Console

    from flash_sparse_attention.training import train

    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    bar = _Bar(console)
    config = TrainConfig.from_dict(
        {"paths": ["texts"], "held_out_fraction": 0.2, "sequence_length": 64, "model": TINY_MODEL, "steps": 2}
    )
    train(config, project / "out", progress=bar)
    bar.close()
    console.file.close()
    shown = console.export_text()
    assert "2/2" in shown
    assert "tokens/s" in shown
    assert "held out" in shown


class TestProcess:
    """As a user starts it."""

    command = (sys.executable, "-m", "flash_sparse_attention.cli")

    def start(self, *arguments):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*self.command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def test_ctrl_c_saves_and_says_how_to_go_on(self, project):
        process = self.start("train", "texts", "--config", "run.toml", "--steps", "100000", "--output", "my run")
        written = project / "my run" / "log.jsonl"
        deadline = time.monotonic() + 60
        while not (written.exists() and written.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Ctrl-C again aborts" in err
        assert "Traceback" not in err
        assert "fsa train --resume --output 'my run'" in out
        _, state = load_model(project / "my run")
        assert state.step == log.read(written)[-1].step < 100_000
        resumed = fsa("train", "--resume", "--output", "my run", "--steps", str(state.step + 1))
        assert resumed.exit_code == 0
        assert [x.step for x in log.read(written)] == [*range(1, state.step + 2)]

    def test_a_mistake_is_one_line(self, project):
        process = self.start("train", "no such folder")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.startswith("error: paths must be files or folders, got 'no such folder', which does not exist:")
        assert len(err.splitlines()) == 1
        assert not out
