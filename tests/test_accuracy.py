"""The judge, judged: what is right passes, and each kind of wrong fails. And `fsa verify`, which runs it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from flash_sparse_attention import AttentionOutput, NSAConfig, SequenceLayout
from flash_sparse_attention.accuracy import FLAVOURS, FULL, QUICK, Case, Row, compare, compare_selection, judge
from flash_sparse_attention.accuracy.inputs import attention_inputs, hostile_indices
from flash_sparse_attention.accuracy.problems import problems
from flash_sparse_attention.cli import verify
from flash_sparse_attention.impl import OPERATORS, blockwise, reference

CONFIG = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, num_selected_blocks=4, window_size=10)
CASE = Case((60, 0, 1, 25), head_dim=16, head_dim_v=8, config=CONFIG)
HALF = dataclasses.replace(CASE, dtype=torch.bfloat16)


def failures(case: Case, operator: str) -> set[str]:
    return {row.tensor for row in judge(case, operators=[operator]) if not row.ok}


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Puts something else in the place of an operator of the blockwise implementation."""

    def put(name: str, function: Callable[..., Any]) -> None:
        # The whole, as one operator, takes the others by itself.
        for module in (blockwise, blockwise.attention):
            monkeypatch.setattr(module, name, function, raising=module is blockwise)

    return put


# Comparisons of tensors.


def test_errors_and_budgets_by_hand():
    exact = torch.tensor([1.0, -2.0, 4.0, 1.0], dtype=torch.float64)
    plain = torch.tensor([1.5, -2.0, 4.0, 1.0])
    got = torch.tensor([1.0, -2.0, 3.0, 1.0])
    assert compare(got, plain, exact) == (1.0, 0.25, 1.0, 0.25)
    # Plain PyTorch is exact: 2 half ulps of bfloat16, which has 8 bits, at the largest and at the mean element.
    half = compare(got.bfloat16(), exact.bfloat16(), exact)
    assert half == (1.0, 0.25, 2 * 2**-8 * 4, 2 * 2**-8 * 2)
    # And 32 of float32, which has 24.
    assert compare(got, exact.float(), exact) == (1.0, 0.25, 32 * 2**-24 * 4, 32 * 2**-24 * 2)
    terms = [torch.tensor([8.0, 0.0])]
    assert compare(got, exact.float(), exact, terms=terms)[2:] == (2**-24 * (32 * 4 + 4 * 8), 2**-24 * (32 * 2 + 4 * 4))
    assert compare(exact, exact, exact) == (0, 0, 4e-11, 2e-11)


@pytest.mark.parametrize(
    "got",
    [
        torch.tensor([math.nan, 1.0]),
        torch.tensor([math.inf, 1.0]),
        torch.tensor([-math.inf, 1.0]),
        torch.tensor([1.0]),
        torch.tensor([1.0, 1.0, 1.0]),
        torch.tensor([1.0, 1.0], dtype=torch.float64),
    ],
)
def test_what_is_no_number_or_of_another_form_fails(got: Tensor):
    exact = torch.ones(2, dtype=torch.float64)
    assert not Row("", "", "", CASE, "", *compare(got, torch.full((2,), 100.0), exact)).ok


def test_minus_infinity_must_stand_where_it_stands():
    exact = torch.tensor([-math.inf, 1.0], dtype=torch.float64)
    plain = exact.float()
    assert compare(plain, plain, exact).max_error == 0
    for got in ([1.0, 1.0], [-1e30, 1.0], [math.nan, 1.0], [-math.inf, -math.inf], [1.0, -math.inf]):
        assert compare(torch.tensor(got), plain, exact).max_error == math.inf


def test_a_measure_that_is_not_finite_allows_nothing():
    exact = torch.ones(2, dtype=torch.float64)
    overflown = compare(torch.ones(2), torch.tensor([1.0, math.inf]), exact)
    assert not Row("", "", "", CASE, "", *overflown).ok


def test_rows():
    row = Row("compress", "mean", "blockwise", CASE, "out", 1.0, 0.5, 2.0, 2.0)
    assert row.ok
    assert row.strain == 0.5
    assert row.label == "compress (mean)"
    for errors in ((3.0, 0.5), (1.0, 3.0), (math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)):
        assert not dataclasses.replace(row, max_error=errors[0], mean_error=errors[1]).ok
    assert dataclasses.replace(row, max_error=0.0, mean_error=0.0, max_budget=0.0, mean_budget=0.0).strain == 0
    assert dataclasses.replace(row, max_budget=0.0).strain == math.inf
    assert dataclasses.replace(row, mean_error=4.0).strain == 2
    assert dataclasses.replace(row, variant="").label == "compress"


# Comparisons of selections.

# Token 39 of a sequence, in blocks of 8: blocks 0 and 4 are forced, and one of 1, 2, 3 may be kept.
SELECTING = NSAConfig(kernel_size=8, kernel_stride=8, block_size=8, num_selected_blocks=3, num_local_blocks=1)
LAYOUT = SequenceLayout.from_lengths([40])
IMPORTANCE = torch.zeros(40, 1, 5, dtype=torch.float64)
IMPORTANCE[39, 0] = torch.tensor([0.0, 0.5, 0.5 - 1e-9, 0.25, 0.0], dtype=torch.float64)
EXACT_CHOICE = [0, 1, 4]


def selection(*kept: int) -> Tensor:
    indices = torch.full((40, 1, 3), -1, dtype=torch.int32)
    for token in range(39):
        of_token = sorted({0, min(1, token // 8), token // 8})
        indices[token, 0, : len(of_token)] = torch.tensor(of_token, dtype=torch.int32)
    indices[39, 0] = torch.tensor(kept)
    return indices


def selection_verdict(indices: Tensor, plain: Tensor) -> tuple[float, bool]:
    """(entries out of form, whether the importance passes)"""
    errors = compare_selection(indices, plain, IMPORTANCE, SELECTING, LAYOUT)
    return errors["structure"].max_error, Row("", "", "", CASE, "", *errors["importance"]).ok


def test_selection_by_hand():
    float32 = IMPORTANCE.float()
    assert selection_verdict(selection(0, 1, 4), IMPORTANCE) == (0, True)
    # In float64 block 1 is the right one; in float32 it ties with block 2, so either will do; block 3 never will.
    assert selection_verdict(selection(0, 2, 4), IMPORTANCE) == (0, False)
    assert selection_verdict(selection(0, 2, 4), float32) == (0, True)
    assert selection_verdict(selection(0, 3, 4), float32) == (0, False)
    errors = compare_selection(selection(0, 3, 4), float32, IMPORTANCE, SELECTING, LAYOUT)["importance"]
    assert errors.max_error == 0.5
    assert errors.mean_error == pytest.approx(0.5 / 40)


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        ((1, 0, 4), 1),  # not ascending
        ((0, 4, 4), 1),  # repeated
        ((0, 1, -1), 2),  # a slot unused, block 4 not kept
        ((0, 1, 5), 2),  # not eligible, block 4 not kept
        ((1, 2, 4), 1),  # block 0 not kept
        ((0, 1, 2), 1),  # block 4 not kept
        ((-1, 0, 4), 1),  # unused, but not at the end
    ],
)
def test_selections_out_of_form(kept: tuple[int, ...], wrong: int):
    assert selection_verdict(selection(*kept), IMPORTANCE.float())[0] == wrong


def test_of_blocks_without_importance_the_lower():
    importance = IMPORTANCE.clone()
    importance[39] = 0.0
    for kept, wrong in ((1, 0), (2, 1), (3, 1)):
        errors = compare_selection(selection(0, kept, 4), importance.float(), importance, SELECTING, LAYOUT)
        assert errors["structure"].max_error == wrong
        assert errors["importance"].max_error == 0


def test_selections_of_another_shape_or_dtype():
    for indices in (selection(0, 1, 4).long(), selection(0, 1, 4)[..., :2], selection(0, 1, 4)[:39]):
        errors = compare_selection(indices, IMPORTANCE, IMPORTANCE, SELECTING, LAYOUT)
        assert errors["structure"].max_error == math.inf


# The judge.


@pytest.mark.parametrize("operator", [*OPERATORS, "nsa_attention"])
@pytest.mark.parametrize("case", [CASE, HALF], ids=["float32", "bfloat16"])
def test_blockwise_passes(operator: str, case: Case):
    rows = list(judge(case, operators=[operator]))
    assert rows
    assert all(row.ok for row in rows)
    assert {row.impl for row in rows} == {"blockwise"}


def test_every_gradient_is_judged():
    tensors: dict[str, set[str]] = {}
    for row in judge(CASE):
        tensors.setdefault(row.label, set()).add(row.tensor)
    attention = {"out", "lse", "grad q", "grad k", "grad v"}
    linear = {"out", "grad x", "grad position_embedding", "grad weight"}
    combine = {"out", "grad out_compressed", "grad out_selected", "grad out_window", "grad gates"}
    assert tensors == {
        "compress (mean)": {"out", "grad x", "grad position_embedding"},
        "compress (linear)": linear,
        "compress (weighted)": linear,
        "compress (mlp)": {*linear, "grad bias", "grad weight_out", "grad bias_out"},
        "interval_attention (compressed)": attention,
        "interval_attention (window)": attention,
        "select_blocks": {"structure", "importance"},
        "selected_attention": attention,
        "combine (a gate per head)": combine,
        "combine (a gate per token)": combine,
        "nsa_attention": {"out", "grad q", "grad k", "grad v", "grad gates", "structure", "importance"},
    }
    independent = dataclasses.replace(CASE, flavour="independent branches")
    rows = {row.tensor for row in judge(independent)}
    assert {"grad k_compressed", "grad v_compressed", "grad k_window", "grad v_window"} <= rows


def attention_with(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., AttentionOutput]:
    """The reference, with `out` and `lse` changed."""
    return lambda *args: AttentionOutput(*change(*reference.interval_attention(*args)))


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def at(x: Tensor, index: int, value: float) -> Tensor:
    return x.index_fill(0, torch.tensor([index]), value)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda out, lse: (at(out, 30, math.nan), lse), {"out"}),
        (lambda out, lse: (at(out, 0, 1e-6), lse), {"out"}),  # the first query sees no compressed token
        (lambda out, lse: (out * (1 + 1e-4), lse), {"out"}),
        (lambda out, lse: (out, lse + 1e-4), {"lse"}),
        (lambda out, lse: (out, lse / math.log(2)), {"lse"}),
        (lambda out, lse: (out, lse.clamp(min=-1e30)), {"lse"}),
        (lambda out, lse: (out, lse.double()), {"lse"}),
        (lambda out, lse: (out, lse.detach()), {"grad q", "grad k"}),
        (lambda out, lse: (out.detach(), lse), {"grad q", "grad k", "grad v"}),
        (lambda out, lse: (ScaleGradient.apply(out, 1.001), lse), {"grad q", "grad k", "grad v"}),
    ],
)
def test_wrong_attention_fails(replace: Callable[..., None], change: Callable[..., Any], wrong: set[str]):
    replace("interval_attention", attention_with(change))
    assert wrong <= failures(CASE, "interval_attention")


def test_gradient_of_a_query_that_sees_no_key_must_be_nothing(replace: Callable[..., None]):
    def leaking(q: Tensor, *others: Any) -> AttentionOutput:
        out, lse = reference.interval_attention(q, *others)
        return AttentionOutput(out + 1e-7 * (q - q.detach()).sum(-1, keepdim=True), lse)

    replace("interval_attention", leaking)
    assert "grad q" in failures(CASE, "interval_attention")


def test_a_missing_gradient_fails(replace: Callable[..., None]):
    replace("combine", lambda a, b, c, gates: reference.combine(a, b, c, gates.detach()))
    assert failures(CASE, "combine") == {"grad gates"}


def test_scores_rounded_to_bfloat16_fail(replace: Callable[..., None]):
    exact_scores = reference._scores

    def rounded(*args: Any) -> AttentionOutput:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_scores", lambda *qk: exact_scores(*qk).bfloat16().float())
            return reference.selected_attention(*args)

    replace("selected_attention", rounded)
    assert "lse" in failures(HALF, "selected_attention")


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda indices: indices.flip(-1), "structure"),
        (lambda indices: indices.clamp(min=0), "structure"),
        (lambda indices: indices.where(indices != 1, -1), "structure"),
    ],
)
def test_wrong_selections_fail(replace: Callable[..., None], change: Callable[..., Any], wrong: str):
    replace("select_blocks", lambda *args: change(reference.select_blocks(*args)).int())
    assert wrong in failures(CASE, "select_blocks")
    assert wrong in failures(CASE, "nsa_attention")


def test_selection_by_the_first_head_alone_fails(replace: Callable[..., None]):
    def of_first_head(q: Tensor, k: Tensor, lse: Tensor, *others: Any) -> Tensor:
        first = slice(None, None, q.shape[1] // k.shape[1])
        return reference.select_blocks(q[:, first], k, lse[:, first], *others)

    replace("select_blocks", of_first_head)
    assert failures(CASE, "select_blocks") == {"importance"}
    assert "importance" in failures(HALF, "nsa_attention")


def test_ties_that_go_to_the_higher_block_fail(replace: Callable[..., None]):
    def to_the_higher(*args: Any) -> Tensor:
        sort = torch.sort

        def flipped(x: Tensor, dim: int = -1, **how: Any) -> Any:
            if not how.get("descending"):
                return sort(x, dim=dim, **how)
            values, indices = sort(x.flip(-1), dim=dim, **how)
            return torch.return_types.sort((values, x.shape[-1] - 1 - indices))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "sort", flipped)
            return reference.select_blocks(*args)

    replace("select_blocks", to_the_higher)
    ties = dataclasses.replace(CASE, flavour="ties")
    assert "block_indices" in failures(ties, "select_blocks")


def test_case_makes_the_same_inputs_every_time_and_others_for_another_seed():
    layout = SequenceLayout.from_lengths(CASE.lengths)
    first, again = (attention_inputs(CASE, layout, layout) for _ in range(2))
    other = attention_inputs(dataclasses.replace(CASE, seed=1), layout, layout)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])


def test_flavours_are_what_they_say():
    def inputs(flavour: Any) -> dict[str, Tensor]:
        case = dataclasses.replace(CASE, flavour=flavour)
        layout = SequenceLayout.from_lengths(case.lengths)
        return attention_inputs(case, layout, layout)

    def first_score(flavour: str) -> Tensor:
        x = inputs(flavour)
        return (x["q"][:60, 0] @ x["k"][:60, 0].T / 4)[1:]

    rest = slice(1, None)
    loud, quiet = first_score("loud first token"), first_score("quiet first token")
    assert 90 < (loud[:, 0].mean() - loud[:, rest].mean()) < 110
    assert 90 < (quiet[:, rest].mean() - quiet[:, 0].mean()) < 110
    assert inputs("large queries")["q"].std() > 10
    assert not inputs("fused projection")["q"].is_contiguous()
    assert inputs("plain")["q"].is_contiguous()

    layout = SequenceLayout.from_lengths(CASE.lengths)
    entries = hostile_indices(CASE, layout)
    newest = (layout.positions() // 8)[:, None, None]
    assert entries.dtype == torch.int32
    assert (entries < -1).any()
    assert (entries == 2**31 - 1).any()
    assert (entries == -(2**31)).any()
    assert ((entries > newest) & (entries < 10)).any()
    assert (entries == -1).all(-1).any()
    ordered = entries.sort(-1).values
    assert ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()


def test_grids_cover_what_the_house_asks_for():
    for grid in (QUICK, FULL):
        assert {case.flavour for case in grid} == set(FLAVOURS)
        assert {case.dtype for case in grid} == {torch.float16, torch.bfloat16, torch.float32, torch.float64}
        assert (1,) in [case.lengths for case in grid]
        assert any(0 in case.lengths for case in grid)
        assert any(case.head_dim != case.head_dim_v for case in grid)
    assert {case.num_heads // case.num_kv_heads for case in FULL} >= {1, 2, 4, 5, 7, 16}
    assert {case.head_dim for case in FULL} >= {64, 80, 96, 128, 192}
    sizes = {(case.config.kernel_size, case.config.kernel_stride, case.config.block_size) for case in FULL}
    assert sizes >= {(32, 16, 64), (16, 16, 16), (64, 64, 64), (32, 8, 32)}


def test_a_past_has_keys_and_no_queries():
    case = Case((2, 0), past=(3, 4))
    assert str(case).endswith("| plain | past 3,4")
    assert case.layout().positions().tolist() == [3, 4]
    shapes = {
        name: len(x)
        for problem in problems("nsa_attention", case, torch.device("cpu"))
        for name, x in problem.inputs.items()
    }
    assert shapes == {"q": 2, "k": 9, "v": 9, "gates": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads=2, got 5"),
        ({"flavour": "loud"}, "flavour must be one of plain, large queries"),
        ({"dtype": torch.int32}, "dtype must be one of float32, bfloat16, float16, float64, got 'int32'"),
        ({"past": (1, 2)}, "past must be of the 1 sequences of lengths, got 2"),
    ],
)
def test_case_refuses(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Case((3,), **values)


# `fsa verify`.

runner = CliRunner()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command alone, over two small cases."""
    module = sys.modules["flash_sparse_attention.cli.verify"]
    monkeypatch.setattr(module, "QUICK", (CASE, HALF))
    monkeypatch.setattr(module, "FULL", (CASE,))
    app = typer.Typer()
    app.command()(verify)
    return app


def test_verify_passes_and_reports(app: typer.Typer, tmp_path: Path):
    result = runner.invoke(app, ["--quick", "--device", "cpu", "--json", str(tmp_path / "new" / "report.json")])
    assert result.exit_code == 0, result.output
    assert "of 2 cases on cpu: all within budget." in result.output
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["passed"] is True
    assert report["grid"] == "quick"
    assert report["device"] == "cpu"
    assert {row["operator"] for row in report["rows"]} == {*OPERATORS, "nsa_attention"}
    assert all(row["ok"] and row["max_error"] <= row["max_budget"] for row in report["rows"])
    # A line for each tensor of each operator in each dtype, none wrapped or cut off.
    wanted = {(row["operator"], row["variant"], row["dtype"], row["tensor"]) for row in report["rows"]}
    lines = [line for line in result.output.splitlines() if line.startswith("blockwise ")]
    assert len(lines) == len(wanted)
    assert all(line.endswith("%") for line in lines)


def test_verify_fails_with_the_case(app: typer.Typer, replace: Callable[..., None], tmp_path: Path):
    def broken(*args: Any) -> AttentionOutput:
        out, lse = reference.selected_attention(*args)
        return AttentionOutput(out * math.nan, lse)

    def raising(*args: Any) -> Tensor:
        raise RuntimeError("no such kernel")

    replace("selected_attention", broken)
    replace("combine", raising)
    result = runner.invoke(app, ["--full", "--impl", "blockwise", "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 1, result.output
    assert "FAILED blockwise: selected_attention, out: error nan (budget" in result.output
    assert str(CASE) in result.output
    assert "RAISED combine: RuntimeError: no such kernel, case lengths 60,0,1,25" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False
    assert any(row["tensor"] == "out" and not row["ok"] and row["max_error"] is None for row in report["rows"])
    assert report["raised"][0]["error"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--impl", "reference"], "--impl must be other than the reference, got 'reference'"),
        (["--impl", "cuda"], "impl must be one of reference, blockwise, triton, got 'cuda'"),
        (["--impl", "triton", "--device", "cpu"], "--impl must be an implementation that runs on cpu, got 'triton'"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_verify_refuses(app: typer.Typer, options: list[str], message: str):
    result = runner.invoke(app, options)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_verify_says_when_there_is_nothing_to_verify(app: typer.Typer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flash_sparse_attention.accuracy.verdicts.available", lambda *args: ["reference"])
    result = runner.invoke(app, ["--device", "cpu"])
    assert result.exit_code == 0
    assert "Nothing to verify: on cpu there is no implementation but the reference." in result.output
