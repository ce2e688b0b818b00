"""Rows and reports: what they say, what is comparable, and what files hold."""

from __future__ import annotations

import json
import math

import pytest

from bench_runs import everything, operator_rows, row, run, timing
from flash_sparse_attention.bench.results import FULL, Report, Roofline, Row, Timing


def test_a_report_comes_back_as_it_was(tmp_path):
    report, file = everything(), tmp_path / "new" / "bench.json"
    report.save(file)
    assert Report.load(file) == report
    assert [path.name for path in file.parent.iterdir()] == ["bench.json"]


def test_fields_that_are_empty_or_absent(tmp_path):
    """Nothing is written for them, and what a shorter file lacks is empty."""
    run([row("combine", "forward", "triton", 1.0)]).save(tmp_path / "bench.json")
    content = json.loads((tmp_path / "bench.json").read_text())
    assert next(iter(content)) == "schema"
    assert not {"skipped", "flops", "memory", "check", "notes"} & content["rows"][0].keys()
    assert content["rows"][0]["ours"] is True
    (loaded,) = Report.load(tmp_path / "bench.json").rows
    assert (loaded.skipped, loaded.flops, loaded.memory, loaded.check) == ("", None, {}, {})
    assert Report("", "", {}, Roofline(), ()).device == "unknown device"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "no rows"),
        ('{"rows": []}', "no rows"),
        ('{"schema": 99, "rows": []}', "of schema 1, got .* of schema 99"),
        ('{"schema": 1, "rows": []}', "does not fit"),
        ('{"schema": 1, "rows": [{"suite": "x"}]}', "does not fit"),
        ('{"schema": 1, "rows": ["x"]}', "does not fit"),
        ('{"schema": 1, "rows": [], "roofline": {"speed": 1}}', "does not fit"),
    ],
)
def test_what_is_no_report(content, message, tmp_path):
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"FILE must be a result of `fsa bench`.*{message}"):
        Report.load(file)


def test_rates_and_roofline():
    some = row("combine", "forward", "triton", 2.0, flops=4e12, bytes=6e9)
    assert some.tflop_per_s == pytest.approx(2000)
    assert some.tb_per_s == pytest.approx(3)
    moved = row("combine", "forward", "triton", 2.0, bytes=6e9, moved_bytes=8e9)
    assert moved.tb_per_s == pytest.approx(4)
    assert moved.tflop_per_s is None
    roofline = Roofline(3.0, {"bfloat16": 4000.0})
    assert roofline.ms(some) == pytest.approx(2.0)
    assert roofline.fraction(some) == pytest.approx(1.0)
    # Intermediate results are no excuse: the least traffic counts.
    assert roofline.fraction(moved) == pytest.approx(1.0)
    assert Roofline().fraction(some) is None
    assert roofline.fraction(row("combine", "forward", "triton", None, bytes=1.0, skipped="no")) is None
    assert timing(2.0, 0.25).spread == pytest.approx(0.25)
    assert math.isnan(Timing(0.0, 0.0, 0.0, 1).spread)


def test_gains_are_over_the_same_work_and_over_full_attention():
    found = {
        (gain.ours.direction, gain.ours.shape["tokens"], gain.other.operator, gain.other.variant): gain.ratio
        for gain in run(operator_rows()).gains()
        if gain.ours.operator == "selected attention"
    }
    assert len(found) == 2 * 2 * 3
    assert found["forward", 65536, FULL, "cudnn"] == pytest.approx(6.5)
    assert found["backward", 8192, FULL, "flash"] == pytest.approx(1.0)
    assert found["forward", 8192, "selected attention", "query_outer"] == pytest.approx(1.25)
    # Another attention of the same heads and length has full attention as its baseline too, and nothing else.
    window = row("sliding window", "forward", "triton", 1.0, tokens=65536, window_size=512)
    others = [gain.other for gain in run([*operator_rows(), window]).gains() if gain.ours is window]
    assert [other.operator for other in others] == [FULL, FULL]
    # What is no attention does not take the place of one.
    assert "combine" not in {gain.ours.operator for gain in run(operator_rows()).gains()}


@pytest.mark.parametrize(
    "change", [{"tokens": 1}, {"heads": 4}, {"dtype": "float16"}, {"new_tokens": 4}, {"suite": "attention"}]
)
def test_full_attention_of_other_sizes_is_no_baseline(change):
    ours = row("whole attention", "forward", "triton", 1.0, tokens=64, window_size=8)
    assert list(run([ours, row(FULL, "forward", "cudnn", 2.0, tokens=64)]).gains())
    assert not list(run([ours, row(FULL, "forward", "cudnn", 2.0, **({"tokens": 64} | change))]).gains())
    assert not list(run([ours, row(FULL, "backward", "cudnn", 2.0, tokens=64)]).gains())


def test_rows_without_sizes_and_errors_that_are_no_numbers_come_back(tmp_path):
    refused = Row("model", "training step", "step", "blockwise", True, {}, skipped="no transformers")
    wrong = row("combine", "forward", "triton", None, skipped="failed: wrong out", check={"out": math.inf, "lse": 0.5})
    report = run([refused, wrong])
    report.save(tmp_path / "bench.json")
    assert "Infinity" not in (tmp_path / "bench.json").read_text()
    assert Report.load(tmp_path / "bench.json") == report


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"FILE must be a result of `fsa bench`, got '.*nowhere.json', which does not"):
        Report.load(tmp_path / "nowhere.json")
