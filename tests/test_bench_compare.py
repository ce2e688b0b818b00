"""`fsa bench compare`: which rows agree, which are worse, and the exit code."""

from __future__ import annotations

import dataclasses
import math

import pytest
from typer.testing import CliRunner

from bench_runs import row, run
from flash_sparse_attention import cli
from flash_sparse_attention.bench.compare import compare
from flash_sparse_attention.bench.results import Roofline

BASE = {"ours": ("triton", 1.0), "short": ("kv_outer", 0.125), "other": ("cudnn", 2.0)}


def times(**changes):
    """A run of a row of ours, a short one of ours, and a baseline's."""
    rows = [
        row("combine", "forward", variant, ms * changes.get(name, 1.0), tokens=64)
        for name, (variant, ms) in BASE.items()
    ]
    return run(rows)


def invoke(tmp_path, first, second, *options, code=0):
    for name, report in (("A.json", first), ("B.json", second)):
        report.save(tmp_path / name)
    result = CliRunner().invoke(
        cli.app, ["bench", "compare", *(str(tmp_path / n) for n in ("A.json", "B.json")), *options]
    )
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_a_run_agrees_with_itself(tmp_path):
    shown = invoke(tmp_path, times(), times())
    assert "2 of 2 rows of at least 0.2 ms agree within 3 %; the largest deviation is 0.0 %" in shown
    assert "1 shorter row was not judged." in shown
    assert "warning" not in shown
    assert "regression" not in shown


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"ours": 1.04}, 1, "regression"),
        ({"ours": 1.02}, 0, "agrees"),
        ({"ours": 0.96}, 0, "improvement"),
        ({"short": 1.5}, 0, "slower"),
        ({"short": 2.0}, 1, "regression"),
        ({"other": 1.5}, 0, "slower"),
        ({"other": 0.5}, 0, "faster"),
    ],
)
def test_what_fails(change, code, word, tmp_path):
    """Rows of ours that are long enough, and slower."""
    shown = invoke(tmp_path, times(), times(**change), code=code)
    assert word in shown
    assert ("of ours is slower" in shown) == bool(code)


def test_thresholds(tmp_path):
    slower = times(ours=1.04)
    invoke(tmp_path, times(), slower, "--threshold", "0.05")
    invoke(tmp_path, times(), slower, "--min-ms", "1.5")
    invoke(tmp_path, times(), times(short=1.5), "--min-ms", "0.1", code=1)
    for options in (("--threshold", "0"), ("--min-ms", "-1")):
        invoke(tmp_path, times(), times(), *options, code=1)


def test_quartiles_and_the_largest_deviation():
    comparison = compare(times(), times(ours=1.05, other=0.8))
    ours, short, other = comparison.pairs
    assert (ours.apart, short.apart, other.apart) == (True, False, True)
    # The spread of these rows is 2 %.
    assert [pair.apart for pair in compare(times(), times(ours=1.015)).pairs] == [False] * 3
    assert other.ratio == pytest.approx(0.8)
    assert other.deviation == pytest.approx(0.25)
    assert comparison.summary().startswith(
        "0 of 2 rows of at least 0.2 ms agree within 3 %; the largest deviation is 25.0 % "
        "(operators: combine, forward, cudnn, 64 tokens, 32/8 heads of 128, bfloat16)."
    )


def test_rows_of_one_run_alone(tmp_path):
    more = dataclasses.replace(times(), rows=(*times().rows, row("compress", "forward", "triton", 3.0)))
    shown = invoke(tmp_path, more, times())
    assert f"Only in {tmp_path / 'A.json'}:\n  operators: compress, forward, triton, 32/8 heads" in shown
    assert f"Only in {tmp_path / 'B.json'}:" in invoke(tmp_path, times(), more)
    shown = invoke(tmp_path, times(), run([row("compress", "forward", "triton", 3.0)]))
    assert "No row of at least 0.2 ms is in both runs." in shown


def test_what_ran_and_was_skipped_fails(tmp_path):
    skipped = [dataclasses.replace(row, ms=None, skipped="out of memory") for row in times().rows]
    rows = times().rows
    shown = invoke(tmp_path, times(), run([skipped[0], *rows[1:]]), code=1)
    assert "lost: operators: combine, forward, triton" in shown
    assert "out of memory" in shown
    assert "1 of ours ran before and was skipped." in shown
    # A baseline that did not run, or a row of ours that did not run before either.
    invoke(tmp_path, times(), run([*rows[:2], skipped[2]]))
    invoke(tmp_path, run([skipped[0], *rows[1:]]), times())


def test_warns_of_other_devices_and_versions(tmp_path):
    other = dataclasses.replace(
        times(),
        environment=times().environment
        | {
            "device": "B300",
            "torch": "2.12",
            "commit": None,
            "baselines": {"flash-attn": "3.0"},
            "clocks": {},
            "method": [],
        },
    )
    shown = invoke(tmp_path, times(), other)
    for warning in (
        "device differs: NVIDIA H200 before, B300 after",
        "torch differs: 2.11.0 before, 2.12 after",
        "commit differs: abc1234 before, unknown after",
        "flash-attn differs: 2.8.3 before, 3.0 after",
    ):
        assert f"warning: {warning}" in shown
    assert shown.count("warning") == 4


def test_warns_of_a_device_that_was_slower_as_a_whole(tmp_path):
    first, other = times(), dataclasses.replace(times(), roofline=Roofline(3.98, {"bfloat16": 776.0, "float16": 1.0}))
    shown = invoke(tmp_path, first, other)
    assert "warning: rate of bfloat16 products (TFLOP/s) differs by -3.0 %: 800 before, 776 after" in shown
    assert shown.count("warning") == 1
    slower = dataclasses.replace(times(), roofline=Roofline(3.0))
    assert "rate of copies (TB/s) differs by -25.0 %: 4 before, 3 after" in invoke(tmp_path, first, slower)
    # What is no rate says nothing.
    odd = dataclasses.replace(times(), roofline=Roofline(0.0, {"bfloat16": math.nan}))
    assert "warning" not in invoke(tmp_path, odd, first)


def test_times_that_are_no_numbers(tmp_path):
    broken = dataclasses.replace(
        times(),
        rows=tuple(dataclasses.replace(r, ms=dataclasses.replace(r.ms, median=float("nan"))) for r in times().rows),
    )
    assert "its time is no number" in invoke(tmp_path, times(), broken, code=1)
