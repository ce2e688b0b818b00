"""The suites `decode` and `model` of `fsa bench`, on tiny sizes on the CPU."""

from __future__ import annotations

import dataclasses
import math
import sys
import types

import pytest
import torch

from flash_sparse_attention import functional
from flash_sparse_attention.bench.cases import Bench
from flash_sparse_attention.bench.results import FULL, Report, Roofline
from flash_sparse_attention.bench.run import Options, run
from flash_sparse_attention.bench.suites import decode, model
from flash_sparse_attention.bench.timing import Effort, Taken

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DECODE = {"lengths": (160,), "heads": 4, "kv_heads": 2, "head_dim": 16, "prefill": 0}


class SteadyClock:
    """Runs once, and says that it took a millisecond."""

    def time(self, run, host_ms):
        run()
        return Taken(1.0, 1.0)


@pytest.fixture
def bench() -> Bench:
    effort = Effort(warm_up_ms=0.0, target_ms=2.0, min_repeats=2, max_repeats=2, more=1)
    return Bench(CPU, SteadyClock(), effort)


def by_operator(rows) -> dict[str, list]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row.operator, []).append(row)
    return found


@pytest.mark.parametrize("given", [{}, {"new_tokens": 3, "page_size": 64}])
def test_decoding_has_times_checks_and_gains(bench: Bench, given):
    rows = decode.rows(decode.options(True, CPU, **DECODE, **given), bench)
    assert [row.skipped for row in rows] == [""] * 3
    found = {operator: row for operator, (row,) in by_operator(rows).items()}
    attention, step, full = found["decode attention"], found["decode step"], found[FULL]
    for row in rows:
        assert row.ms is not None
        assert row.bytes
        assert row.check
        assert all(0 <= error <= 1 for error in row.check.values()), row.check
        assert "no CUDA graph" in row.notes
    assert attention.check.keys() == {"out", "structure", "importance"}
    # Tokens 160 is where a window of 32 tokens by 16 becomes full.
    assert step.check.keys() == attention.check.keys() | {"kept", "windows"}
    assert not full.ours
    assert full.variant == "sdpa"
    assert attention.shape.get("page_size") == given.get("page_size")
    report = Report("", "", {}, Roofline(), tuple(rows))
    assert {(gain.ours.operator, gain.other.variant) for gain in report.gains()} == {
        ("decode attention", "sdpa"),
        ("decode step", "sdpa"),
    }


def test_a_step_is_taken_at_the_same_place_each_time():
    filled = decode.Filled(decode.options(True, CPU, **DECODE), 160, CPU)
    run = filled.rewound(decode.Replayed(filled.step, CPU, filled.rewind))
    first = run({})
    assert filled.cache.lengths == (160, 160)
    assert torch.equal(run({}), first)
    filled.rewind()
    assert filled.cache.lengths == (159, 159)
    assert torch.equal(run({}), first)


def test_a_layer_reads_a_prompt_in_three_ways(bench: Bench):
    options = decode.options(
        True, CPU, **DECODE | {"prefill": 96}, hidden_size=32, piece=40, presets=("fsa", "fla", "paper")
    )
    rows = [row for preset in options.presets for row in decode._prefilled(options, preset, bench)]
    assert [row.variant for row in rows] == ["forward", "into a cache", "in pieces"] * 3
    assert all(row.ms is not None and row.flops and max(row.check.values()) < 1 for row in rows)
    # Not beside the decoding of as many tokens.
    assert len({row.key for row in rows}) == 9


def test_wrong_decoding_has_no_time(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    right = functional.nsa_attention_with_kvcache

    def wrong(*args, **options):
        out, indices = right(*args, **options)
        return out * 1.05, indices

    monkeypatch.setattr(decode.functional, "nsa_attention_with_kvcache", wrong)
    rows = by_operator(decode.rows(decode.options(True, CPU, **DECODE), bench))
    for operator in ("decode attention", "decode step"):
        (row,) = rows[operator]
        assert row.ms is None
        assert row.skipped.startswith("failed: wrong out")
    assert rows[FULL][0].ms is not None


def test_a_wrong_selection_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    # More blocks than slots, or all are kept.
    config = decode.CONFIG.replace(num_selected_blocks=4, block_size=16)
    monkeypatch.setattr(decode, "CONFIG", config)
    filled = decode.Filled(decode.options(True, CPU, **DECODE), 160, CPU)
    out = filled.attend()
    assert max(filled.attention_errors(out).values()) <= 1
    filled.chosen = filled.chosen.clone()
    middle = filled.chosen[..., 1]
    filled.chosen[..., 1] = torch.where(middle == 1, 2, 1).where(filled.chosen[..., 2] > 2, middle)
    assert max(filled.attention_errors(out).values()) > 1


def test_what_the_cache_does_not_keep_is_found():
    filled = decode.Filled(decode.options(True, CPU, **DECODE), 160, CPU)
    out = filled.attend()
    layer = filled.cache.layers[0]
    # Its newest chunk has the number of the window.
    layer.k_compressed[1, 9] += 0.1
    assert filled.step_errors(out)["windows"] > 1
    layer.v_window[0, 159, 0, 0] = 3.0
    assert filled.step_errors(out)["kept"] == math.inf


def test_baselines_that_refuse_say_why(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **options):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(decode.F, "scaled_dot_product_attention", refuse)
    rows = by_operator(decode.rows(decode.options(True, CPU, **DECODE), bench))
    assert rows[FULL][0].skipped == "refused: RuntimeError: No available kernel."
    assert rows["decode attention"][0].ms is not None


def test_dense_attention_on_a_gpu_has_all_backends():
    assert set(decode._BACKENDS) == {"cudnn", "flash", "efficient", "math"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"new_tokens": 17}, "new_tokens must be at most 16"),
        ({"new_tokens": 8, "lengths": (8,)}, "lengths must be longer than new_tokens=8"),
        ({"page_size": 100}, "page_size"),
        ({"presets": ("mine",)}, "presets"),
        ({"heads": 6, "kv_heads": 4}, "kv_heads|num_heads|heads"),
    ],
)
def test_decoding_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        decode.DecodeOptions(**given)


def test_the_options_of_a_gpu():
    assert decode.options(False, CUDA) == decode.DecodeOptions()
    assert decode.options(True, CUDA, batch=3).lengths == (8192,)
    assert decode.options(True, CUDA, batch=3).batch == 3
    assert model.options(False, CUDA) == model.ModelOptions()
    assert model.options(True, CUDA, layers=5).layers == 5


class TestModel:
    """Needs transformers."""

    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")

    def test_times_and_checks(self, bench: Bench):
        rows = model.rows(model.options(True, CPU), bench)
        assert [(row.operator, row.variant, row.ours) for row in rows] == [
            ("training step", "blockwise", True),
            ("training step", "sdpa", False),
            ("prefill", "blockwise", True),
            ("prefill", "sdpa", False),
        ]
        for row in rows:
            assert row.skipped == ""
            assert row.ms is not None
            assert row.direction == "step"
            assert row.shape["layers"] == 2
            assert (row.check != {}) == row.ours
            assert max(row.check.values(), default=0) < 0.1
        flops = [row.flops for row in rows]
        # The forward pass is a third of a step, and sparse attention of so few tokens has more to do.
        assert flops[0] == pytest.approx(3 * flops[2])
        assert flops[0] > flops[1] == pytest.approx(3 * flops[3])
        assert len(list(Report("", "", {}, Roofline(), tuple(rows)).gains())) == 2

    def test_all_variants_have_one_set_of_weights(self):
        options = model.options(True, CPU)
        made = model.decoders("tiny", 2, 64, options, CPU)
        sparse, full = (dict(made[variant].named_parameters()) for variant in ("blockwise", "sdpa"))
        assert full.keys() < sparse.keys()
        assert all(sparse[name] is weight for name, weight in full.items())
        assert all(any(x in name for x in ("compressor", "branch_gate")) for name in sparse.keys() - full.keys())
        assert made["blockwise"].layers[0] is not made["sdpa"].layers[0]

    def test_a_wrong_attention_has_no_time(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        from flash_sparse_attention.nn import attention

        right = attention.nsa_attention

        def wrong(*args, **options):
            result = right(*args, **options)
            return result._replace(out=result.out * 1.2)

        monkeypatch.setattr(attention, "nsa_attention", wrong)
        rows = model.rows(model.options(True, CPU), bench)
        for row in rows:
            assert (row.ms is None) == row.ours
            assert row.skipped.startswith("failed: wrong first tokens") == row.ours

    def test_what_raises_says_why(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        from flash_sparse_attention.nn import attention

        def broken(*args, **options):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(attention, "nsa_attention", broken)
        rows = model.rows(model.options(True, CPU, operators=("prefill",)), bench)
        assert rows[0].skipped == "failed: RuntimeError: no such kernel"
        assert rows[1].ms is not None

    def test_what_does_not_fit_is_tried_with_fewer_layers(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        right, tried = model.decoders, []

        def full(name, layers, *args):
            tried.append(layers)
            if layers > 1:
                raise torch.OutOfMemoryError
            return right(name, layers, *args)

        monkeypatch.setattr(model, "decoders", full)
        options = model.options(True, CPU, layers="fit", operators=("prefill",))
        assert {row.shape["layers"] for row in model.rows(options, bench)} == {1}
        assert tried == [2, 1]
        rows = model.rows(dataclasses.replace(options, layers=2), bench)
        assert [row.skipped for row in rows] == ["out of memory"] * 2

    def test_both_loop_orders_fail_where_they_differ(self):
        torch.manual_seed(0)
        x = torch.randn(4, 8)
        seen = dict.fromkeys(("kv_outer", "query_outer", "cudnn", "flash"), model.Seen(x, x, (x, x)))
        assert all(error == 0 for errors in model.errors_of(seen).values() for error in errors.values())
        for what, changed in (("last tokens", model.Seen(1.1 * x, x)), ("gradients", model.Seen(x, x, (x, 1.2 * x)))):
            wrong = model.errors_of(seen | {"query_outer": changed})
            assert wrong["kv_outer"][what] == wrong["query_outer"][what] > 1
            assert max(wrong["flash"].values()) == 0
            wrong = model.errors_of(seen | {"flash": changed})
            assert wrong["flash"][what] > 1
            assert max(wrong["kv_outer"].values()) == 0
        nan = x * math.nan
        assert math.isnan(model.errors_of(seen | {"kv_outer": model.Seen(x, nan)})["kv_outer"]["first tokens"])
        lost = model.errors_of(seen | {"kv_outer": model.Seen(x, x, (nan, x))})
        assert math.isnan(lost["kv_outer"]["gradients"])
        assert math.isnan(lost["query_outer"]["gradients"])

    def test_gradients_of_short_sequences(self):
        x = torch.randn(4, 8)
        seen = {"blockwise": model.Seen(x, x, (1.2 * x,)), "sdpa": model.Seen(x, x, (x,))}
        assert set(model.errors_of(seen)["blockwise"]) == {"first tokens"}
        assert model.errors_of(seen, short=True)["blockwise"]["gradients"] > 1

    def test_wrong_gradients_have_no_time(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        right = model.decoders

        def broken(*args):
            made = right(*args)
            # Of values, whose gradients only v_proj sees; the output stays the same.
            projection = made["blockwise"].layers[0].self_attn.v_proj
            projection.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 1.5,))
            return made

        options = model.options(True, CPU)
        for layers, checked in ((2, True), (5, False)):
            rows = model.rows(dataclasses.replace(options, layers=layers), bench)
            assert all(row.ms is not None for row in rows)
            assert {row.operator for row in rows if "gradients" in row.check} == (
                {"training step"} if checked else set()
            )
        monkeypatch.setattr(model, "decoders", broken)
        training, _, prefill, _ = model.rows(options, bench)
        assert (training.operator, training.variant) == ("training step", "blockwise")
        assert training.skipped.startswith("failed: wrong gradients (")
        assert training.ms is None
        assert prefill.ms is not None

    def test_real_widths_are_for_gpus(self, bench: Bench):
        (row,) = model.rows(model.options(False, CPU), bench)
        assert row.skipped.startswith("the widths of real models are for GPUs")

    @pytest.mark.parametrize(
        ("names", "variants"),
        [
            (None, ("kv_outer", "query_outer", "cudnn", "flash")),
            (("cudnn", "flex"), ("kv_outer", "query_outer", "cudnn")),
            ((), ("kv_outer", "query_outer")),
        ],
    )
    def test_full_attention_by_name(self, names, variants):
        options = model.ModelOptions(full_attention=names)
        assert model.variants_on(torch.device("cuda"), options) == variants

    @pytest.mark.parametrize(("ms", "most", "asked", "repeats"), [(1.0, 30, 2, 8), (1.0, 5, 2, 5), (3.0, 30, 5, 5)])
    def test_short_runs_are_done_more_often(self, bench: Bench, ms: float, most: int, asked: int, repeats: int):
        effort = dataclasses.replace(bench.effort, target_ms=2.0, min_repeats=1, max_repeats=most)
        clock = types.SimpleNamespace(time=lambda run, host_ms: Taken(ms, ms))
        options = model.options(True, CPU, repeats=asked, operators=(model.PREFILL,), full_attention=())
        [row] = model.rows(options, Bench(CPU, clock, effort))
        assert row.ms.repeats == repeats

    def test_sparse_attention_alone(self, bench: Bench):
        options = Options(suites=("model",), device=CPU, quick=True, full_attention=())
        report = run(options, "fsa bench", announce=bench.announce)
        assert {row.variant for row in report.rows} == {"blockwise"}
        assert all(row.ms is not None for row in report.rows)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
    def test_all_layers_run_one_graph(self, bench: Bench, monkeypatch: pytest.MonkeyPatch):
        from torch._dynamo.backends.debugging import aot_eager

        compiled = []

        def counted(graph, inputs):
            compiled.append(graph)
            return aot_eager(graph, inputs)

        monkeypatch.setattr(model, "_inductor", lambda: counted)
        monkeypatch.setattr(model, "variants_on", lambda device, options: ("sdpa", "blockwise"))
        options = model.options(True, CPU, compile_layers=True, layers=5, operators=("training step",))
        assert all(row.ms is not None for row in model.rows(options, bench))
        assert len(compiled) == 2


def test_without_transformers(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    import flash_sparse_attention.integrations as integrations

    monkeypatch.delattr(integrations, "transformers", raising=False)
    monkeypatch.setitem(sys.modules, "flash_sparse_attention.integrations.transformers", None)
    (row,) = model.rows(model.options(True, CPU), bench)
    assert row.skipped.startswith("transformers cannot be used here")
    assert row.ours


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ("mine",)}, "models"),
        ({"layers": 0}, "layers"),
        ({"operators": ("decode",)}, "operators"),
        ({"nsa": decode.CONFIG}, "nsa must be with branch_kv='shared'"),
    ],
)
def test_models_refuse(given, message):
    with pytest.raises(ValueError, match=message):
        model.ModelOptions(**given)
