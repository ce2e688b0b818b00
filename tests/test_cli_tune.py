"""`fsa tune`, with measurements that are fakes, and the loop orders that `fsa inspect` shows."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from flash_sparse_attention import cli
from flash_sparse_attention.cli.tune import describe
from flash_sparse_attention.impl.triton import measure, tuning
from flash_sparse_attention.impl.triton.tuning import (
    KvOuterTiles,
    LoopOrders,
    QueryOuterTiles,
    TunedEntry,
    built_in_tiles,
    read_entries,
    store,
)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A file of tuned choices that does not exist yet."""
    monkeypatch.setenv("FSA_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tuning.reset_tuning()
    yield tuning.tuning_file()
    tuning.reset_tuning()


@pytest.fixture
def calls(monkeypatch):
    """A device that is not there, and a measurement that takes no time; the arguments it was called with."""
    found = []

    def fake(shape, layout=None, device="cuda", seconds=60.0, progress=None):
        found.append((shape, torch.device(device), seconds))
        tiles = built_in_tiles(shape)
        progress(measure.Step("kv_outer_forward", 1, 9, tiles.kv_outer_forward, 1.25))
        progress(measure.Step("kv_outer_backward", 2, 9, tiles.kv_outer_backward, None, "[too] large"))
        progress(measure.Step("query_outer", 2, 9, tiles.query_outer, 1.5))
        ms = {"kv_outer": {"forward": 1.125, "backward": 2.25}, "query_outer": {"forward": 3.5, "backward": 4.75}}
        ms["built_in"] = {"forward": 1.375, "backward": 2.875}
        orders = LoopOrders("kv_outer", "kv_outer")
        if shape.total_tokens == 65536:
            orders = LoopOrders("query_outer", "kv_outer")
            ms[str(orders)] = {"forward": 3.5, "backward": 2.625}
        return TunedEntry("GPU", "3.4.0", shape, orders, tiles, ms)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(measure, "tune", fake)
    return found


def run(*arguments):
    """What `fsa` prints; what it raises is raised."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_defaults(calls, file):
    shown = run("tune")
    shapes = [tuning.SelectedShape(n, 8, 4, 16, 64, 128, 128, torch.bfloat16) for n in (8192, 65536)]
    assert calls == [(shape, torch.device("cuda", 0), 60.0) for shape in shapes]
    assert [entry.shape for entry in read_entries(file)] == shapes
    assert f"Stored in {file}" in shown
    for text in ("8,192", "65,536", "kv_outer (taken)", "query_outer", "default", "backward (taken)", "those of each"):
        assert text in shown
    for time in ("1.125", "2.250", "3.500", "4.750", "1.375", "2.875", "2.625"):
        assert time in shown
    built_in = built_in_tiles(shapes[1])
    for tiles in (built_in.kv_outer_forward, built_in.kv_outer_backward, built_in.query_outer):
        assert describe(tiles) in shown
    assert "left out: kv_outer_backward" in shown
    assert "[too] large" in shown


def test_tiles_in_words():
    assert (
        describe(KvOuterTiles(64, 32, 512, 8, 1, 128)) == "64 rows, 32 keys, 512 pairs, 8 warps, 1 stage, 128 registers"
    )
    assert describe(KvOuterTiles(64, 32, 512, 1, 2)) == "64 rows, 32 keys, 512 pairs, 1 warp, 2 stages"
    specialized = KvOuterTiles(64, 64, 512, 4, 2, specialized=True)
    assert describe(specialized) == "64 rows, 64 keys, 512 pairs, specialized warps"
    dense = KvOuterTiles(64, 32, 512, 4, 1, dense_near=True)
    assert describe(dense) == "64 rows, 32 keys, 512 pairs, 4 warps, 1 stage, near blocks dense"
    assert describe(QueryOuterTiles(64, 2, 3)) == "64 keys, 2 warps, 3 stages"


def test_options(calls, file):
    arguments = "--heads 6 --kv-heads 2 --head-dim 96 --head-dim-v 64 --block-size 32 --slots 8 --dtype float16"
    run("tune", *arguments.split(), "--lengths", 100, "--lengths", 50, "--lengths", 100, "--seconds", 1.5)
    shapes = [tuning.SelectedShape(n, 2, 3, 8, 32, 96, 64, torch.float16) for n in (100, 50)]
    assert calls == [(shape, torch.device("cuda", 0), 1.5) for shape in shapes]


def test_a_dry_run_stores_nothing(calls, file):
    shown = run("tune", "--dry-run", "--lengths", 64)
    assert len(calls) == 1
    assert "dry run" in shown
    assert not file.exists()


def test_what_was_measured_is_kept_when_a_later_length_fails(calls, file, monkeypatch):
    fake = measure.tune

    def fail_at_length(shape, **options):
        if shape.total_tokens > 100:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return fake(shape, **options)

    monkeypatch.setattr(measure, "tune", fail_at_length)
    with pytest.raises(ValueError, match="of tokens that the device has memory for, got 200: measure"):
        run("tune", "--lengths", 100, "--lengths", 200)
    assert [entry.shape.total_tokens for entry in read_entries(file)] == [100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "5"], "--heads must be a multiple of --kv-heads=8, got 5"),
        (["--heads", "0"], "--heads must be an integer of at least 1, got 0"),
        (["--kv-heads", "0"], "--kv-heads must be an integer of at least 1, got 0"),
        (["--head-dim", "-1"], "--head-dim must be an integer of at least 1, got -1"),
        (["--head-dim-v", "0"], "--head-dim-v must be an integer of at least 1, got 0"),
        (["--block-size", "0"], "--block-size must be"),
        (["--slots", "0"], "--slots must be"),
        (["--lengths", "64", "--lengths", "0"], "--lengths must be an integer of at least 1, got 0"),
        (["--dtype", "float64"], "--dtype must be one of float32, bfloat16, float16, got 'float64'"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0"),
        (["--seconds", "nan"], "--seconds must be more than 0, got nan"),
        (["--head-dim", "512"], "head dimensions up to 256, not 512"),
    ],
)
def test_what_is_refused(calls, file, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("tune", *arguments)
    assert not calls
    assert not file.exists()


def test_a_foreign_file_is_refused_before_the_work(calls, file):
    file.write_text("precious")
    with pytest.raises(ValueError, match="the tuning file must be one that `fsa tune` wrote"):
        run("tune")
    assert not calls
    assert file.read_text() == "precious"


def test_kernels_in_the_interpreter_are_refused(calls, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set: unset it"):
        run("tune")


def exit_code(monkeypatch, capsys, *arguments):
    """What the command `fsa` itself makes of it: exit code, and standard error in one line."""
    monkeypatch.setattr(sys, "argv", ["fsa", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def test_without_a_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error = exit_code(monkeypatch, capsys, "tune")
    assert code == 2
    assert "PyTorch finds none: run it on the machine" in error


def test_without_triton(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )
    code, error = exit_code(monkeypatch, capsys, "tune")
    assert code == 2
    assert "pip install 'flash-sparse-attention[triton]'" in error
    assert "loop_order" not in run("inspect", "--device", "cpu")


def test_bad_sizes_end_in_code_2(monkeypatch, capsys):
    code, error = exit_code(monkeypatch, capsys, "tune", "--heads", "7")
    assert code == 2
    assert "--heads must be a multiple of --kv-heads=8, got 7" in error


def test_inspect_shows_loop_orders(calls, file):
    shown = run("inspect", "--device", "cpu")
    assert 'loop_order="auto"' in shown
    assert shown.count("built in") == 10
    # Of groups of 32 heads, on a device that has the kernels for Hopper.
    assert shown.count("query_outer forward, kv_outer") == 2
    shape = tuning.SelectedShape(16384, 8, 4, 16, 64, 128, 128, torch.bfloat16)
    store(TunedEntry("GPU", "3.4.0", shape, LoopOrders("query_outer", "query_outer"), built_in_tiles(shape)))
    shown = run("inspect", "--device", "cpu")
    assert shown.count("tuned at 16,384 tokens") == shown.count("query_outer") - 2 == 2
    assert shown.count("built in") == 8
    assert f"Tuned choices are in {file}" in shown
