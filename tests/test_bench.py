"""`fsa bench`: timing, models of cost, checks, and the suites of operators, whole attention and memory on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import weakref

import pytest
import torch
from typer.testing import CliRunner

from flash_sparse_attention import NSAConfig, functional
from flash_sparse_attention.bench import baselines, checks, costs, inputs, machine, shapes, timing
from flash_sparse_attention.bench.cases import Bench, Case, Refusal, Variant
from flash_sparse_attention.bench.results import FULL, Report
from flash_sparse_attention.bench.run import Options, run
from flash_sparse_attention.bench.shapes import Shape
from flash_sparse_attention.bench.suites import attention, memory, operators
from flash_sparse_attention.cli import app
from flash_sparse_attention.geometry import Interval

CPU = torch.device("cpu")
NSA = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, num_selected_blocks=4, window_size=12)
SMALL = Shape(75, 4, 2, 16, 8, NSA, torch.float32)
EFFORT = timing.Effort(warm_up_ms=0.0, target_ms=0.0, min_repeats=2, max_repeats=2, more=1)


class FakeClock:
    """Takes as long as the runs say, and remembers their order."""

    def __init__(self):
        self.order = []

    def time(self, run, host_ms):
        name, ms = run()
        self.order.append(name)
        return timing.Taken(ms, host_ms + 1.0)


class QuickClock(timing.CpuClock):
    """That of a CPU, but for how much it writes between runs, which takes longer than all that is timed here."""

    def __init__(self):
        self._flush = torch.empty(1 << 10, dtype=torch.uint8)


@pytest.fixture
def bench():
    return Bench(CPU, QuickClock(), EFFORT)


@pytest.fixture
def quick(monkeypatch):
    """Whole runs take times as `bench` does; `test_the_command` takes them as users do."""
    monkeypatch.setattr("flash_sparse_attention.bench.run.clock_of", lambda device: QuickClock())


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "checked"),
    [
        (131072, 64, 16, True),
        (131073, 32, 8, False),
        (262144, 16, 4, True),
        (262144, 16, 8, False),
        (262144, 32, 4, False),
        (1048576, 4, 1, True),
    ],
)
def test_gradients_are_checked_where_the_reference_fits(tokens: int, heads: int, kv_heads: int, checked: bool):
    assert operators.gradients_are_checked(Shape(tokens, heads, kv_heads)) == checked


def test_long_runs_are_done_less_often_and_all_over_the_time():
    clock = FakeClock()
    effort = timing.Effort(warm_up_ms=0.0, target_ms=100.0, min_repeats=2, max_repeats=10)
    runs = {"short": lambda: ("short", 1.0), "long": lambda: ("long", 25.0), "longest": lambda: ("longest", 90.0)}
    times = timing.interleaved(runs, clock, effort)
    assert {name: one.repeats for name, one in times.items()} == {"short": 10, "long": 4, "longest": 2}
    assert {name: one.median for name, one in times.items()} == {"short": 1.0, "long": 25.0, "longest": 90.0}
    assert len(clock.order) == 3 + 16
    places = [place for place, name in enumerate(clock.order[3:]) if name == "long"]
    assert max(b - a for a, b in itertools.pairwise(places)) <= 6


def test_runs_whose_times_differ_are_done_again_in_turn():
    clock = FakeClock()
    effort = timing.Effort(warm_up_ms=0.0, target_ms=0.0, min_repeats=4, more=3)
    odd, long = itertools.cycle([10.0, 11.0]), itertools.cycle([700.0, 900.0])
    runs = {"same": lambda: ("same", 5.0), "odd": lambda: ("odd", next(odd)), "long": lambda: ("long", next(long))}
    times = timing.interleaved(runs, clock, effort)
    # Three times as often, but for what would then take more than six seconds.
    assert {name: one.repeats for name, one in times.items()} == {"same": 4, "odd": 12, "long": 7}
    assert clock.order[3 + 3 * 4 :] == ["odd", "long"] * 3 + ["odd"] * 5
    assert times["odd"].median == 10.5


def test_a_warm_up_beyond_the_limit_counts():
    clock = FakeClock()
    effort = timing.Effort(warm_up_ms=0.0, limit_ms=6000.0)
    ms = itertools.count(7000.0, 500.0)
    [one] = timing.interleaved({"long": lambda: ("long", next(ms))}, clock, effort).values()
    assert clock.order == ["long"] * 2
    assert (one.repeats, one.median) == (2, 7250.0)


def test_warm_up_is_by_the_wall_clock_and_hands_on_the_time_of_the_host(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) / 1000)
    clock = FakeClock()
    effort = timing.Effort(warm_up_ms=4.0, target_ms=0.0, min_repeats=2)
    [one] = timing.interleaved({"a": lambda: ("a", 2.0)}, clock, effort).values()
    assert len(clock.order) == 4 + 2
    # The fake clock adds 1 to what it is told: four runs before any counts.
    assert one.host_ms == 4.0 + 1.0
    assert timing.interleaved({}, clock, EFFORT) == {}


def test_rests_of_the_device_are_uneven_and_end():
    chance = random.Random(0)
    rests = [timing.rest_s(50.0, chance) for _ in range(50)]
    assert min(rests) >= 0.05
    assert max(rests) <= 0.075
    assert max(rests) - min(rests) >= 0.02
    assert timing.rest_s(0.0, chance) == 0.0
    assert {timing.rest_s(700.0, chance) for _ in range(9)} == {0.5}


def test_quartiles():
    one = timing.timing([4.0, 1.0, 3.0, 2.0, 5.0], [0.5, 1.5])
    assert (one.first_quartile, one.median, one.third_quartile, one.host_ms) == (2.0, 3.0, 4.0, 1.0)
    assert one.spread == pytest.approx(2 / 3)
    assert timing.timing([7.0], [1.0]).spread == 0


def visible(shape, interval):
    """Pairs counted one by one."""
    return sum(max(0, interval.end(t) - interval.start(t)) for t in range(shape.tokens))


@pytest.mark.parametrize("interval", [Interval(), Interval(window_size=12), Interval(8, 4)])
def test_pairs_of_intervals_are_counted(interval):
    assert costs.interval_pairs(75, interval) == visible(SMALL, interval)


def test_pairs_of_selections_are_counted():
    selection = inputs.random_selection(SMALL, CPU)
    seen = sum(
        8 * block + i <= token
        for token, heads in enumerate(selection.tolist())
        for row in heads
        for block in row
        if block >= 0
        for i in range(8)
    )
    assert costs.selected_pairs(selection, 8) == seen
    # Every token keeps as many blocks as it may, so that the sum of the parts is what the whole attention says.
    dims = SMALL.head_dim + SMALL.head_dim_v
    parts = (
        2.0
        * dims
        * SMALL.heads
        * (seen // SMALL.kv_heads + sum(visible(SMALL, one) for one in (Interval(8, 4), Interval(window_size=12))))
    )
    assert costs.whole(SMALL, "forward").flops == parts + costs.selection(SMALL).flops


def test_costs_of_full_attention():
    shape = Shape(4, 2, 1, 16, 8, dtype=torch.bfloat16)
    forward, backward = (costs.full(shape, way) for way in ("forward", "backward"))
    assert forward.flops == 2 * (16 + 8) * 2 * 10
    assert backward.flops == 2 * (3 * 16 + 2 * 8) * 2 * 10
    # q, out, k and v in bfloat16, lse in float32.
    assert forward.bytes == 4 * 2 * (16 + 8) * 2 + 4 * 2 * 4 + 4 * (16 + 8) * 2
    assert backward.bytes == 2 * forward.bytes


def test_random_selections_hold_the_forced_blocks_and_no_future():
    selection = inputs.random_selection(SMALL, CPU)
    assert selection.shape == (75, 2, 4)
    assert selection.dtype == torch.int32
    for token, heads in enumerate(selection.tolist()):
        own = token // 8
        for row in heads:
            kept = [block for block in row if block >= 0]
            assert kept == sorted(set(kept))
            assert len(kept) == min(own + 1, 4)
            assert {0, own, max(own - 1, 0)} <= set(kept)
            assert max(kept) == own
    assert torch.equal(selection, inputs.random_selection(SMALL, CPU))


@pytest.mark.parametrize(("tokens", "heads"), [(1, 4), (20, 4), (75, 4), (100_000, 64), (1 << 20, 64)])
def test_pieces_lie_apart_and_in_the_sequence(tokens, heads):
    pieces = checks.pieces(tokens, heads)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == tokens
    assert all(first < last for first, last in pieces)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
    assert max(last - first for first, last in pieces) * tokens * heads <= max(
        checks._MAX_SCORES, 3 * tokens * heads * 16
    )


def names(rows):
    return {(row.operator, row.variant, row.direction) for row in rows}


def test_the_suite_of_operators(bench):
    [(title, cases)] = operators.groups([SMALL], bench, False, lambda shape: inputs.random_selection(shape, CPU, 3))
    assert title == "75 tokens, 4/2 heads of 16/8, 4 blocks of 8"
    rows = bench.measure("operators", cases)
    with_both = ("selected attention", "compressed attention", "sliding window", "compress", "combine")
    expected = {(operator, "blockwise", way) for operator in with_both for way in ("forward", "backward")}
    expected |= {("block selection", "blockwise", "forward"), ("inverted index", "triton", "forward")}
    expected |= {(FULL, "sdpa", "forward"), (FULL, "sdpa", "backward")}
    assert names(rows) == expected
    for row in rows:
        if row.operator == "inverted index":
            assert row.ms is None
            assert "sort a selection as they go" in row.skipped
            continue
        assert row.ms is not None, row
        assert row.ms.median > 0
        assert row.bytes > 0
        assert row.check
        assert all(0 <= share <= 1 for share in row.check.values()), row
    assert {row.inputs for row in rows if row.operator == "selected attention"} == {"random", "recorded"}
    gradients = {row.operator: set(row.check) for row in rows if row.direction == "backward"}
    assert gradients["selected attention"] == {"finite", "out", "grad q", "grad k", "grad v"}
    assert gradients["combine"] == {"finite", "out", "grad compressed", "grad selected", "grad window", "grad gates"}


def test_a_sequence_without_a_window_has_no_compressed_branch(bench):
    tiny = dataclasses.replace(SMALL, tokens=5)
    [(_, cases)] = operators.groups([tiny], bench, False, lambda shape: None)
    assert not {"compress", "compressed attention", "block selection"} & {case.operator for case in cases}
    assert all(row.ms is not None for row in bench.measure("operators", cases) if row.operator != "inverted index")


@pytest.mark.parametrize("operator", ["selected_attention", "interval_attention", "combine", "compress"])
def test_what_is_wrong_gets_no_time(bench, monkeypatch, operator):
    right = getattr(functional, operator)

    def wrong(*args, impl="auto", **options):
        out = right(*args, impl=impl, **options)
        if impl == "reference":
            return out
        if operator in ("combine", "compress"):
            return out * 1.01
        # One row of the last piece, a little.
        rows = torch.ones(len(out.out), 1, 1)
        rows[-2] = 1.01
        return out._replace(out=out.out * rows)

    monkeypatch.setattr(functional, operator, wrong)
    [(_, cases)] = operators.groups([SMALL], bench, False, lambda shape: None)
    rows = bench.measure("operators", cases)
    failed = [row for row in rows if row.skipped.startswith("failed: wrong")]
    assert failed
    assert all(row.ms is None and max(row.check.values()) > 1 for row in failed)
    touched = {"selected_attention": "selected attention", "interval_attention": "sliding window"}.get(
        operator, operator
    )
    assert touched in {row.operator for row in failed}


def test_a_wrong_selection_gets_no_time(bench, monkeypatch):
    right = functional.select_blocks
    monkeypatch.setattr(functional, "select_blocks", lambda *args, **options: right(*args, **options).flip(0))
    [(_, cases)] = operators.groups([SMALL], bench, False, lambda shape: None)
    [row] = [row for row in bench.measure("operators", cases) if row.operator == "block selection"]
    assert row.ms is None
    assert row.skipped.startswith("failed: wrong structure")


def test_gradients_alone_can_be_wrong(bench):
    x = inputs.draw(SMALL, CPU)

    def run(given):
        out = functional.combine(given["a"], given["a"], given["a"], given["gates"])
        return out + (given["a"] - given["a"].detach())

    def expected(given, first, last, layout):
        a = given["a"][first:last]
        return functional.combine(a, a, a, given["gates"][first:last], impl="reference")

    leaves = {"a": torch.randn(75, 4, 8).requires_grad_(), "gates": x.gates}
    found = checks.check(run, expected, leaves, 4, gradients=True)
    assert found["out"] <= 1
    assert found["grad a"] > 1
    assert found["grad gates"] <= 1


def measured(bench, *variants, **options):
    x = torch.randn(30, 2, 4).requires_grad_()
    case = Case(
        "double", {"tokens": 30}, 2, {"x": x}, variants,
        {"forward": costs.Cost(1.0, 1.0), "backward": costs.Cost(2.0, 1.0)},
        lambda given, first, last, layout: 2 * given["x"][first:last], **options,
    )  # fmt: skip
    return {(row.variant, row.direction): row for row in bench.measure("operators", [case])}


def test_reasons_are_kept(bench):
    def refuse(given):
        raise Refusal("no even heads")

    def crash(given):
        raise RuntimeError("no\n  kernel")

    rows = measured(
        bench,
        Variant("good", lambda given: given["x"] + given["x"]),
        Variant("refuses", refuse, ours=False),
        Variant("crashes", crash, ours=False),
        Variant("ours crashes", crash),
        Variant("near", lambda given: given["x"] * (2 + 4e-6), ours=False),
        Variant("far", lambda given: given["x"] * 2.1, ours=False),
    )
    assert rows["good", "backward"].flops == 2.0
    assert rows["good", "forward"].tflop_per_s > 0
    assert rows["refuses", "backward"].skipped == "no even heads"
    assert rows["crashes", "forward"].skipped == "refused: RuntimeError: no kernel"
    assert rows["ours crashes", "forward"].skipped == "failed: RuntimeError: no kernel"
    assert rows["far", "forward"].skipped.startswith("refused: wrong out")
    assert [name for (name, way), row in rows.items() if row.ms is not None and way == "forward"] == ["good", "near"]


def test_what_does_not_fit_beside_others_is_timed_alone(bench):
    class Held:
        pass

    alive = weakref.WeakSet()

    def differentiate(d_out):
        if len(alive) > 1:
            raise torch.OutOfMemoryError("held by others")

    def run(given):
        out = given["x"] * 2
        out.held = Held()
        alive.add(out.held)
        if out.requires_grad:
            out.register_hook(differentiate)
        return out

    rows = measured(bench, Variant("one", run), Variant("other", run))
    assert {key: row.skipped for key, row in rows.items()} == dict.fromkeys(
        itertools.product(("one", "other"), ("forward", "backward")), ""
    )


def test_what_takes_too_long_is_left_out():
    slow = Bench(CPU, QuickClock(), EFFORT, max_run_s=2.0, flop_per_s=1.0)
    rows = measured(slow, Variant("slow", lambda given: pytest.fail("must not run")))
    assert rows["slow", "forward"].skipped == "takes at least 3 s"


def test_the_suite_of_the_whole_attention(bench):
    [(_, cases)] = attention.groups([SMALL], bench, False)
    rows = bench.measure("attention", cases)
    assert names(rows) == {
        (operator, variant, way)
        for operator, variant in (("whole attention", "blockwise"), (FULL, "sdpa"))
        for way in ("forward", "backward")
    }
    whole = next(row for row in rows if row.operator == "whole attention")
    assert {"finite", "out", "grad q", "grad k", "grad v", "grad gates", "structure", "importance"} == set(whole.check)
    assert max(whole.check.values()) <= 1


def test_full_attention_by_name():
    bench = Bench(CPU, QuickClock(), EFFORT, full_attention=())
    [(_, cases)] = attention.groups([SMALL], bench, False)
    assert [len(case.variants) for case in cases] == [1, 0]
    assert [case.operator for _, cases in memory.groups([SMALL], bench) for case in cases] == ["whole attention"]
    with pytest.raises(ValueError, match="full_attention must be one of sdpa, got 'cudnn'"):
        Options(full_attention=("sdpa", "cudnn"))


def test_runs_that_are_left_out(quick, tmp_path):
    path = tmp_path / "some.json"
    common = ("--quick", "--suites", "attention", "--lengths", "130", *SIZES, "--output", path)
    result = invoke(*common, "--full-attention", "none")
    assert result.exit_code == 0, result.output
    assert {row.operator for row in Report.load(path).rows} == {"whole attention"}
    result = invoke(*common, "--overwrite", "--longest-run", 1e-9)
    assert result.exit_code == 0, result.output
    assert {row.skipped for row in Report.load(path).rows} == {"takes at least 0 s"}
    result = invoke(*common, "--overwrite", "--longest-run", 0)
    for wrong in ("cudnn", "", "none,sdpa"):
        result = invoke(*common, "--overwrite", "--full-attention", wrong)
        assert f"--full-attention must be none, or of sdpa, got {wrong.split(',')[0]!r}" in str(result.exception)
    result = invoke(*common, "--overwrite", "--longest-run", 0)
    assert "--longest-run must be a positive number of seconds, got 0" in str(result.exception)


def test_the_selection_of_the_whole_attention_is_checked(bench, monkeypatch):
    right = functional.nsa_attention

    def wrong(*args, **options):
        chosen = right(*args, **options).block_indices.clone()
        chosen[-1, :, 1:3] = torch.tensor([1, 2])
        out = right(*args, **options)
        return out._replace(block_indices=chosen)

    monkeypatch.setattr(functional, "nsa_attention", wrong)
    rows = bench.measure("attention", [attention.whole_case(SMALL, inputs.draw(SMALL, CPU))])
    assert all(row.ms is None for row in rows)


def test_memory_of_a_process_of_its_own(bench):
    [row] = memory.cpu_rows([SMALL], bench)
    assert row.memory["peak"] > 50 * 2**20
    assert (row.operator, row.direction, row.ms) == ("whole attention", "both", None)


def test_shapes_of_presets():
    assert [str(shape) for shape in shapes.operator_shapes("nsa-27b", (8192,))] == [
        "8,192 tokens, 64/4 heads of 192/128, 16 blocks of 64"
    ]
    assert len(shapes.operator_shapes("paper")) == 4 * 2 * 4
    assert {shape.group for shape in shapes.attention_shapes("default")} == {1, 2, 4, 8, 16}
    assert [shape.tokens for shape in shapes.attention_shapes("qwen3-14b", (16, 32), heads=4, kv_heads=2)] == [16, 32]
    with pytest.raises(ValueError, match="preset must be"):
        shapes.operator_shapes("gpt-2")
    with pytest.raises(ValueError, match="num_heads must be a multiple"):
        Shape(16, 6, 4)
    for text in ("", "1,,2", "8T", "0", "-1"):
        with pytest.raises(ValueError, match="--lengths must be"):
            shapes.parse_lengths(text)


def test_what_a_baseline_refuses():
    with pytest.raises(Refusal, match=r"query heads|not installed"):
        baselines.whole_by_fla(SMALL)
    assert baselines.versions(CPU, SMALL)["sdpa"] == torch.__version__


def test_the_environment():
    found = machine.environment(CPU, commit="abc")
    assert (found["commit"], found["kind"], found["torch"]) == ("abc", "cpu", torch.__version__)
    assert found["method"]
    assert machine.clocks(CPU) == {}
    rates = machine.measure_roofline(CPU, timing.CpuClock(), EFFORT, (torch.float32,))
    assert rates.copy_tb_per_s > 0
    assert rates.product_tflop_per_s["float32"] > 0


@pytest.mark.usefixtures("quick")
def test_a_run_keeps_what_it_has_after_every_group(tmp_path):
    changes = {
        **{"heads": 4, "kv_heads": 2, "head_dim": 16, "head_dim_v": 16},
        **{"block_size": 8, "num_selected_blocks": 4, "window_size": 12, "kernel_size": 8, "kernel_stride": 4},
    }
    options = Options(
        ("attention",), CPU, lengths=(40, 50), changes=changes, quick=True, selections="random", commit="c"
    )
    sizes = []
    report = run(options, "fsa bench", group_done=lambda title, rows, report: sizes.append(len(report.rows)))
    assert sizes == [4, 8]
    assert {row.shape["block_size"] for row in report.rows if row.operator != FULL} == {8}
    assert len(list(report.gains())) == 4
    report.save(tmp_path / "a" / "bench.json")
    assert Report.load(tmp_path / "a" / "bench.json") == report


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


SIZES = ("--heads", 4, "--kv-heads", 2, "--head-dim", 16, "--slots", 4, "--window-size", 32, "--device", "cpu")


def test_the_command(tmp_path):
    file = tmp_path / "b.json"
    common = ("--quick", "--suites", "attention", "--lengths", "130", *SIZES, "--output", file)
    result = invoke(*common)
    assert result.exit_code == 0, result.output
    assert "There is no GPU in use here" in result.output
    assert "whole attention" in result.output
    content = json.loads(file.read_text())
    assert content["environment"]["kind"] == "cpu"
    assert {row["shape"]["tokens"] for row in content["rows"]} == {130}
    again = invoke(*common)
    assert isinstance(again.exception, ValueError)
    assert "--overwrite" in str(again.exception)
    assert json.loads(file.read_text()) == content
    assert invoke(*common, "--overwrite").exit_code == 0


@pytest.mark.usefixtures("quick")
def test_the_command_fails_with_what_is_wrong(tmp_path, monkeypatch):
    right = functional.nsa_attention

    def wrong(*args, **options):
        out = right(*args, **options)
        return out._replace(out=out.out * math.pi)

    monkeypatch.setattr(functional, "nsa_attention", wrong)
    result = invoke("--quick", "--suites", "attention", "--lengths", "130", *SIZES, "--output", tmp_path / "b.json")
    assert result.exit_code == 1
    assert "failed: wrong out" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites", "operators,kernels"], "--suites must be"),
        (["--preset", "gpt-2"], "preset must be"),
        (["--lengths", "many"], "--lengths must be"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--heads", "0"], "heads must be"),
        (["--selections", "real"], "selections must be"),
        (["--layers", "all"], "--layers must be"),
        (["--batch", "0"], "--batch must be"),
        (["--heads", "6", "--kv-heads", "4", "--suites", "attention", "--quick"], "num_heads must be a multiple"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, message):
    file = tmp_path / "b.json"
    result = invoke(*arguments, "--device", "cpu", "--output", file)
    assert isinstance(result.exception, ValueError), result.output
    assert message in str(result.exception)
    assert not file.exists()


def test_a_variant_that_fails_while_it_is_timed_loses_only_itself(bench):
    calls = {"tired": 0}

    def tired(given):
        calls["tired"] += 1
        if calls["tired"] > 2:
            raise torch.OutOfMemoryError("all gone")
        return given["x"] + given["x"]

    rows = measured(bench, Variant("good", lambda given: given["x"] * 2), Variant("tired", tired, ours=False))
    assert rows["good", "forward"].ms is not None
    assert rows["good", "backward"].ms is not None
    assert rows["tired", "forward"].skipped == "out of memory"


def test_numbers_in_rows_that_are_not_compared_are_looked_at():
    def run(given):
        out = given["x"] * 2
        return out.index_fill(0, torch.tensor([40]), math.nan)

    def expected(given, first, last, layout):
        return given["x"][first:last] * 2

    found = checks.check(run, expected, {"x": torch.randn(100, 2, 4)}, 2, gradients=False)
    assert found == {"finite": math.inf, "out": 0.0}


@pytest.mark.parametrize("wrong", [lambda place: place.flip(0), lambda place: place.clamp(max=5)])
def test_places_of_the_index_must_be_distinct(wrong):
    selection = inputs.random_selection(SMALL, CPU)
    case = operators.index_case(SMALL, selection)
    place = torch.full(selection.shape, -1, dtype=torch.int32)
    place[selection >= 0] = torch.arange(int((selection >= 0).sum()), dtype=torch.int32)
    assert case.verify(place) == {"places": 0.0}
    assert case.verify(wrong(place)) == {"places": math.inf}


@pytest.mark.usefixtures("quick")
def test_a_suite_that_raises_ends_neither_the_others_nor_the_report(monkeypatch, tmp_path):
    def broken(*arguments):
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setattr(attention, "groups", broken)
    monkeypatch.setattr(memory, "cpu_rows", lambda shapes, bench: [])
    report = run(Options(("attention", "memory"), CPU, lengths=(40,), quick=True, commit="c"), "fsa bench")
    [row] = report.rows
    assert row.skipped == "failed: the rest of the suite: RuntimeError: no such kernel"
    report.save(tmp_path / "bench.json")
    assert Report.load(tmp_path / "bench.json") == report


def test_shapes_that_changes_make_the_same_are_measured_once():
    options = Options(("operators",), CPU, preset="paper", lengths=(64,), changes={"heads": 4, "kv_heads": 4})
    found = options.shapes("operators")
    assert len(found) == 2
    assert {shape.dtype for shape in found} == {torch.float32}


@pytest.mark.parametrize("arguments", [("--new-tokens", 99), ("--models", "gpt-2"), ("--heads", 31)])
def test_what_a_later_suite_refuses_is_refused_at_once(tmp_path, arguments):
    file = tmp_path / "b.json"
    result = invoke(*arguments, "--device", "cpu", "--output", file)
    assert isinstance(result.exception, ValueError), result.output
    assert "roofline" not in result.output
    assert not file.exists()


def test_the_peak_is_that_of_the_process_itself():
    held = torch.ones(1 << 26)  # 256 MiB
    peak = memory._in_process(print)
    assert peak < held.numel() * 4 + 2**30
    assert memory._in_process(int) is not None


def test_results_are_not_written_into_a_folder(tmp_path):
    result = invoke("--quick", *SIZES, "--output", tmp_path)
    assert "--output must be a file, got the folder" in str(result.exception)


def test_memory_of_full_attention_is_measured_up_to_a_length(bench, monkeypatch):
    monkeypatch.setattr(memory, "FULL_UP_TO", 100)
    shapes = [dataclasses.replace(SMALL, tokens=tokens) for tokens in (100, 101)]
    operators_of = [[case.operator for case in cases] for _, cases in memory.groups(shapes, bench)]
    assert operators_of == [["whole attention", "full attention"], ["whole attention"]]


def test_what_is_held_to_our_bounds_fails_as_ours_does(bench):
    def crash(given):
        raise RuntimeError("no kernel")

    def far(given):
        return given["x"] * 3

    strict = [Variant(run.__name__, run, ours=False, strict=True) for run in (crash, far)]
    rows = measured(bench, *strict)
    assert rows["crash", "forward"].skipped == "failed: RuntimeError: no kernel"
    assert rows["far", "forward"].skipped.startswith("failed: wrong out")
