"""Checkpoints: whole or not at all, whatever fails, and clear words about what cannot be loaded."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig
from flash_sparse_attention.training.checkpoint import (
    CheckpointState,
    checkpoint_bytes,
    checkpoints,
    find_checkpoint,
    load_model,
    load_optimizer,
    load_weights,
    read_state,
    save_checkpoint,
)
from training_runs import TINY_MODEL


def make_model(**changes: object) -> LanguageModel:
    return LanguageModel(LanguageModelConfig.from_dict(TINY_MODEL | {"vocab_size": 257} | changes))


def make_optimizer(model: nn.Module, steps: int = 2) -> torch.optim.AdamW:
    """An optimizer that has done some steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def state_of(model: LanguageModel, step: int) -> CheckpointState:
    return CheckpointState(step, {}, model.config.to_dict(), "abc", 10 * step, 0.5)


def save(directory: Path, step: int, keep_last: int = 2, model: LanguageModel | None = None) -> Path:
    model = model or make_model()
    return save_checkpoint(directory, state_of(model, step), model, make_optimizer(model), keep_last=keep_last)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestRoundTrip:
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_weights_optimizer_and_state(self, tmp_path, tie_embeddings):
        model = make_model(tie_embeddings=tie_embeddings)
        optimizer = make_optimizer(model)
        place = save_checkpoint(tmp_path, state_of(model, 7), model, optimizer, keep_last=1)
        assert names(place) == ["model.safetensors", "optimizer.safetensors", "state.json"]
        size = sum(file.stat().st_size for file in place.iterdir())
        assert size <= checkpoint_bytes(model) <= size + (1 << 20)

        loaded, state = load_model(tmp_path)
        assert not loaded.training
        written = dataclasses.replace(state_of(model, 7), optimizer_scalars=state.optimizer_scalars)
        assert state == written
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])

        restored = torch.optim.AdamW(loaded.parameters())
        load_optimizer(place, state, loaded, restored)
        before, after = optimizer.state_dict()["state"], restored.state_dict()["state"]
        assert before.keys() == after.keys()
        for index in before:
            assert before[index].keys() == after[index].keys()
            assert all(torch.equal(before[index][key], after[index][key]) for key in before[index])

    def test_an_optimizer_that_has_done_no_step(self, tmp_path):
        model = make_model()
        place = save_checkpoint(tmp_path, state_of(model, 0), model, make_optimizer(model, steps=0), keep_last=1)
        restored = make_optimizer(model)
        load_optimizer(place, read_state(place), model, restored)
        assert not restored.state_dict()["state"]

    def test_one_tensor_with_two_names_stays_one(self, tmp_path):
        def tied():
            model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
            model[1].weight = model[0].weight
            return model

        model = tied()
        place = save_checkpoint(
            tmp_path, CheckpointState(1, {}, {}, "", 0, 0.0), model, make_optimizer(model), keep_last=1
        )
        other = tied()
        load_weights(place, other)
        assert torch.equal(other[1].weight, model[0].weight)
        assert other[1].weight is other[0].weight

    def test_a_transposed_weight(self, tmp_path):
        model = nn.Linear(3, 5, bias=False)
        model.weight = nn.Parameter(torch.randn(3, 5).T)
        place = save_checkpoint(
            tmp_path, CheckpointState(1, {}, {}, "", 0, 0.0), model, make_optimizer(model), keep_last=1
        )
        other = nn.Linear(3, 5, bias=False)
        other.weight = nn.Parameter(torch.zeros(3, 5).T)
        load_weights(place, other)
        load_optimizer(place, read_state(place), other, torch.optim.AdamW(other.parameters()))
        assert torch.equal(other.weight, model.weight)


def test_the_last_are_kept_and_the_newest_is_found_by_number(tmp_path):
    for step in (8, 9, 99_999_999, 100_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert find_checkpoint(tmp_path).name == "step-100000000"
    assert find_checkpoint(tmp_path / "step-99999999").name == "step-99999999"


def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path, ignore_errors=False):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(UserWarning, match="step-00000001 could not be removed"):
        save(tmp_path, 2, keep_last=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="1, whose checkpoint is"):
        save(tmp_path, 1)


FULL = OSError(errno.ENOSPC, "No space left on device")
# As safetensors reports it.
FULL_IN_RUST = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_at(monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException) -> None:
    """The next save fails at a point, with part of a file written."""
    save_file, write_text = safetensors.torch.save_file, Path.write_text

    def failing_save_file(tensors, filename, metadata=None):
        if Path(filename).name == point:
            Path(filename).write_bytes(b"half")
            raise error
        save_file(tensors, filename, metadata)

    def failing_write_text(self, *args, **kwargs):
        write_text(self, "ha")
        raise error

    def failing(*args, **kwargs):
        raise error

    if point.endswith(".safetensors"):
        monkeypatch.setattr(safetensors.torch, "save_file", failing_save_file)
    elif point == "state.json":
        monkeypatch.setattr(Path, "write_text", failing_write_text)
    elif point == "fsync":
        monkeypatch.setattr(os, "fsync", failing)
    elif point == "rename":
        monkeypatch.setattr(os, "replace", failing)
    else:
        raise AssertionError(point)


POINTS = ["model.safetensors", "optimizer.safetensors", "state.json", "fsync", "rename"]


class TestFailedSave:
    @pytest.mark.parametrize("point", POINTS)
    @pytest.mark.parametrize("error", [FULL, FULL_IN_RUST, PermissionError(errno.EACCES, "Permission denied")])
    def test_harms_nothing_and_says_what_is_missing(self, tmp_path, monkeypatch, point, error):
        model = make_model()
        save(tmp_path, 1, model=model)
        with monkeypatch.context() as patch:
            fail_at(patch, point, error)
            with pytest.raises(
                OSError, match=r"step-00000002 could not be written \(.*\): it needs .* MB, .* MB are free"
            ):
                save(tmp_path, 2, keep_last=1)
        assert names(tmp_path) == ["step-00000001"]
        loaded, _ = load_model(tmp_path)
        assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight)
        save(tmp_path, 2, keep_last=1)
        assert names(tmp_path) == ["step-00000002"]

    @pytest.mark.parametrize("point", POINTS)
    def test_ctrl_c_leaves_nothing(self, tmp_path, monkeypatch, point):
        save(tmp_path, 1)
        fail_at(monkeypatch, point, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
        assert names(tmp_path) == ["step-00000001"]

    def test_too_little_room_is_seen_before_writing(self, tmp_path, monkeypatch):
        save(tmp_path, 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 12_345))
        monkeypatch.setattr(safetensors.torch, "save_file", None)
        with pytest.raises(OSError, match=r"step-00000002 needs 1\.\d MB, but 0\.0 MB are free"):
            save(tmp_path, 2)
        assert names(tmp_path) == ["step-00000001"]

    def test_what_a_killed_run_left_is_removed(self, tmp_path):
        (tmp_path / ".unfinished-step-00000001").mkdir()
        (tmp_path / ".unfinished-step-00000001" / "model.safetensors").write_bytes(b"half")
        save(tmp_path, 2)
        assert names(tmp_path) == ["step-00000002"]

    def test_a_disk_that_really_refuses(self, tmp_path):
        """The kernel refuses files of more than 40 kB: less than the weights, more than nothing."""
        program = f"""
            import resource, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from pathlib import Path
            from test_training_checkpoint import save
            save(Path(sys.argv[1]), 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
            try:
                save(Path(sys.argv[1]), 2, keep_last=1)
            except OSError as error:
                print(error)
        """
        pytest.importorskip("resource")
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True
        )
        assert "step-00000002 could not be written" in done.stdout, done.stderr
        assert "File too large" in done.stdout
        assert names(tmp_path) == ["step-00000001"]
        load_model(tmp_path)


class TestLoading:
    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda p: None, "does not exist"),
            (lambda p: p.touch(), "is a file"),
            (lambda p: p.mkdir(), "holds no step-"),
        ],
    )
    def test_what_is_no_checkpoint(self, tmp_path, make, what):
        path = tmp_path / "run"
        make(path)
        with pytest.raises(ValueError, match=f"checkpoint must be the directory of a run .*run', which {what}"):
            load_model(path)

    def test_a_checkpoint_without_its_state(self, tmp_path):
        (save(tmp_path, 1) / "state.json").unlink()
        with pytest.raises(ValueError, match=r"got '.*step-00000001', which lacks state\.json"):
            load_model(tmp_path / "step-00000001")

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
    @pytest.mark.parametrize(("damage", "what"), [("remove", "no such file"), ("cut", "damaged"), ("empty", "damaged")])
    def test_missing_and_damaged_tensors(self, tmp_path, name, damage, what):
        model = make_model()
        place = save(tmp_path, 1, model=model)
        file = place / name
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: -100 if damage == "cut" else 0])
        state, optimizer = read_state(place), make_optimizer(model)

        def load():
            load_weights(place, model)
            load_optimizer(place, state, model, optimizer)

        with pytest.raises(ValueError, match=f"{name} must be .*{what}"):
            load()

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "step": 1}', "\xff"])
    def test_a_damaged_state(self, tmp_path, text):
        place = save(tmp_path, 1)
        (place / "state.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"state\.json must be"):
            load_model(place)

    def test_another_model_is_told_apart_by_its_first_tensors(self, tmp_path):
        place = save(tmp_path, 1)
        with pytest.raises(ValueError, match="does not hold the weights of this model") as raised:
            load_weights(place, make_model(hidden_size=40))
        message = str(raised.value)
        assert "embed_tokens.weight must be [257, 40], got [257, 32]" in message
        assert message.count("must be") == 4
        assert "more" in message

    def test_missing_and_surplus_tensors(self, tmp_path):
        place = save(tmp_path, 1)
        with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight must be \[32\], got none"):
            load_weights(place, make_model(num_layers=2))
        deep = save(tmp_path, 2, model=make_model(num_layers=2))
        with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight must be absent, got \[32\]"):
            load_weights(deep, make_model())

    def test_no_pickle(self, tmp_path):
        place = save(tmp_path, 1)
        for file in place.glob("*.safetensors"):
            length = int.from_bytes(file.read_bytes()[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + length])
