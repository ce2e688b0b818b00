"""The training loop: options, what it writes, resuming bit for bit, and every way in which a run ends early."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F

from flash_sparse_attention.training import (
    END_OF_TEXT,
    Progress,
    TrainConfig,
    Trainer,
    checkpoint,
    evaluate,
    load_model,
    log,
    train,
    trainer,
)
from flash_sparse_attention.training.checkpoint import read_state
from training_runs import tiny_config, write_texts


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts")


def steps_of(output):
    return log.read(output / "log.jsonl")


def losses(output):
    """All that the log holds but times."""
    return [(x.step, x.loss, x.lr, x.grad_norm, x.total_tokens, x.eval_loss) for x in steps_of(output)]


def names(output):
    return sorted(path.name for path in output.iterdir())


SPARSE = {"attention": "nsa"}


class Recorder(Progress):
    """Notes what happens; runs `then` after a step."""

    def __init__(self, step=None, then=None):
        self.events = []
        self._at = (step, then)

    def started(self, run):
        self.events.append("started")
        self.run = run

    def stepped(self, record):
        self.events.append(record.step)
        step, then = self._at
        if record.step == step:
            then()

    def saved(self, place):
        self.events.append(place.name)

    def stopping(self):
        self.events.append("stopping")


class TestConfig:
    def test_survives_json(self):
        config = TrainConfig(paths=("a",), steps=7).replace(model={"num_layers": 2, "nsa": {"window_size": 17}})
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.model.nsa.window_size == 17
        assert config.model.hidden_size == TrainConfig().model.hidden_size

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"stepz": 1}, "the configuration has no field 'stepz': known fields are batch_size, .*warmup_steps"),
            ({"model": {"layers": 1}}, "model has no field 'layers': known fields are attention, .*vocab_size"),
            ({"model": {"nsa": {"window": 1}}}, r"model\.nsa has no field 'window': known fields are block_size"),
            ({"model": {"nsa": 3}}, r"model\.nsa must be a table of fields, got 3"),
            ({"model": 3}, "model must be a table of fields, got 3"),
        ],
    )
    def test_unknown_names(self, values, message):
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_dict(values)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("paths", "src"),
            ("paths", [1]),
            ("suffixes", ".py"),
            ("held_out_fraction", 0),
            ("held_out_fraction", 1),
            ("sequence_length", 0),
            ("batch_size", 1.5),
            ("steps", 0),
            ("steps", "100"),
            ("steps", True),
            ("seed", -1),
            ("learning_rate", 0),
            ("learning_rate", math.nan),
            ("learning_rate", "1e-3"),
            ("warmup_steps", -1),
            ("final_lr_fraction", 1.1),
            ("weight_decay", -0.1),
            ("beta1", 1),
            ("beta2", 1),
            ("epsilon", 0),
            ("max_grad_norm", 0),
            ("keep_last", 0),
            ("device", "tpu"),
            ("precision", "fp8"),
            ("impl", None),
            ("gradient_checkpointing", 1),
            ("model", {"vocab_size": 256}),
            ("model", {"attention": "flash"}),
        ],
    )
    def test_values_out_of_range(self, name, value):
        with pytest.raises(ValueError, match=f"{name}|vocab_size|attention") as raised:
            TrainConfig.from_dict({name: value})
        assert "must be" in str(raised.value)

    def test_learning_rate(self):
        config = TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, final_lr_fraction=0.25)
        rates = [config.learning_rate_at(step) for step in range(1, 111)]
        assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
        assert rates[59] == pytest.approx(0.5 + 1.5 / 2)
        assert rates[-1] == pytest.approx(0.5)
        assert rates[9:] == sorted(rates[9:], reverse=True)
        # Nothing is divided by zero where there is no warm-up, or nothing else.
        assert TrainConfig(steps=1, warmup_steps=0).learning_rate_at(1) > 0
        assert TrainConfig(steps=5, warmup_steps=9).learning_rate_at(5) == pytest.approx(2e-3 * 5 / 9)

    def test_small_model_is_sparse_and_small(self):
        model = TrainConfig().model
        assert model.num_heads == 4 * model.num_kv_heads
        selected = model.nsa.block_size * model.nsa.num_selected_blocks
        assert selected + model.nsa.window_size + 4096 // model.nsa.kernel_stride <= 1024

    def test_cuda_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device must be one that this machine has, got 'cuda'"):
            TrainConfig(device="cuda").resolve_device()
        assert TrainConfig().resolve_device().type == "cpu"


class TestRun:
    @pytest.mark.parametrize("attention", ["nsa", "full"])
    def test_writes_what_it_says(self, tmp_path, texts, attention):
        output = tmp_path / "runs" / "it"
        config = tiny_config(texts, steps=7, keep_last=2).replace(model={"attention": attention})
        recorder = Recorder()
        result = train(config, output, progress=recorder)
        assert names(output) == ["log.jsonl", "loss.png", "run.json", "step-00000006", "step-00000007"]
        assert recorder.events == [
            *("started", 1, 2, 3, "step-00000003", 4, 5, 6, "step-00000006", 7, "step-00000007"),
        ]
        assert result.checkpoint == output / "step-00000007"
        assert (result.step, result.interrupted) == (7, None)
        assert (output / "loss.png").read_bytes()[:4] == b"\x89PNG"

        records = steps_of(output)
        assert [x.step for x in records] == [*range(1, 8)]
        assert [x.step for x in records if x.eval_loss is not None] == [3, 6, 7]
        assert [x.total_tokens for x in records] == [64 * x.step for x in records]
        assert [x.lr for x in records] == [config.learning_rate_at(x.step) for x in records]
        assert all(x.tokens_per_s > 0 and x.grad_norm > 0 for x in records)
        assert records[0].loss == pytest.approx(math.log(257), rel=0.1)
        assert [x.elapsed_s for x in records] == sorted(x.elapsed_s for x in records)

        info = json.loads((output / "run.json").read_text())
        assert TrainConfig.from_dict(info["config"]) == config
        assert info["unigram_entropy"] == result.unigram_entropy == recorder.run.unigram_entropy
        assert info["versions"]["torch"] == torch.__version__
        assert info["num_parameters"] == recorder.run.num_parameters

    def test_learns(self, tmp_path, texts):
        result = train(
            tiny_config(texts, steps=80, learning_rate=1e-2, eval_every=100, save_every=100), tmp_path / "run"
        )
        assert result.evaluation.loss < result.unigram_entropy
        assert steps_of(tmp_path / "run")[-1].loss < steps_of(tmp_path / "run")[0].loss - 1

    def test_held_out_loss_is_that_of_the_checkpoint(self, tmp_path, texts):
        run = Trainer(tiny_config(texts, eval_packs=8), tmp_path / "run")
        result = run.run()
        model, state = load_model(tmp_path / "run")
        assert evaluate(model, run.held_out) == result.evaluation
        assert not model.training
        assert run.model.training
        assert state.step == 6
        # By hand: nats over all targets; bits over those that are bytes.
        with torch.no_grad():
            nats = sum(
                F.cross_entropy(model(x.tokens, x.layout), x.targets, reduction="sum").item() for x in run.held_out
            )
        targets = torch.cat([x.targets for x in run.held_out])
        assert result.evaluation.loss == pytest.approx(nats / len(targets))
        bytes_ = int((targets != END_OF_TEXT).sum())
        assert bytes_ < len(targets)
        assert result.evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / bytes_)

    def test_the_gradients_of_the_packs_of_a_step_are_summed(self, tmp_path, texts):
        config = tiny_config(texts, batch_size=3, steps=1, max_grad_norm=1e9)
        run = Trainer(config, tmp_path / "run")
        packs = [run.packs.pack(index) for index in range(3)]
        loss = sum(F.cross_entropy(run.model(x.tokens, x.layout), x.targets) for x in packs) / 3
        gradients = torch.autograd.grad(loss, list(run.model.parameters()), allow_unused=True)
        norm = torch.stack([x.norm() for x in gradients if x is not None]).norm()
        run.run()
        (record,) = steps_of(tmp_path / "run")
        assert record.loss == pytest.approx(loss.item(), rel=1e-5)
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert record.total_tokens == 3 * 64

    def test_the_optimizer_gets_the_scheduled_rate_and_a_clipped_gradient(self, tmp_path, texts):
        config = tiny_config(texts, max_grad_norm=0.01)
        run = Trainer(config, tmp_path / "run")
        seen = []

        def look(optimizer, *_):
            norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
            seen.append(({group["lr"] for group in optimizer.param_groups}, norm.item()))

        run.optimizer.register_step_pre_hook(look)
        run.run()
        assert [rates for rates, _ in seen] == [{config.learning_rate_at(step)} for step in range(1, 7)]
        assert [norm for _, norm in seen] == pytest.approx([0.01] * 6, rel=1e-3)

    def test_only_matrices_decay(self, tmp_path, texts):
        nsa = {"compression": "mlp", "position_embedding": "kv"}
        config = tiny_config(texts, weight_decay=0.3).replace(model={"attention": "nsa", "nsa": nsa})
        run = Trainer(config, tmp_path / "run")
        decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
        kinds: dict[float, set[str]] = {0.3: set(), 0.0: set()}
        for name, parameter in run.model.named_parameters():
            kinds[decay[id(parameter)]].add(".".join(name.split(".")[-2:]))
        assert {x.split(".")[1] for x in kinds[0.3]} == {"weight", "weight_out"}
        assert {x.split(".")[1] for x in kinds[0.0]} == {"weight", "bias", "bias_out", "position_embedding"}
        assert {"norm.weight", "input_layernorm.weight", "branch_gate_proj.bias"} <= kinds[0.0]
        assert {"embed_tokens.weight", "q_proj.weight", "down_proj.weight", "compressor_k.weight"} <= kinds[0.3]

    def test_bf16(self, tmp_path, texts):
        result = train(tiny_config(texts, precision="bf16", steps=2).replace(model=SPARSE), tmp_path / "run")
        assert math.isfinite(result.evaluation.loss)
        model, _ = load_model(tmp_path / "run")
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_gradient_checkpointing_changes_no_bit(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "a")
        train(tiny_config(texts, gradient_checkpointing=True), tmp_path / "b")
        assert losses(tmp_path / "a") == losses(tmp_path / "b")

    def test_the_seed_decides_and_the_callers_generator_is_left_alone(self, tmp_path, texts):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        train(tiny_config(texts, steps=2), tmp_path / "a")
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        train(tiny_config(texts, steps=2), tmp_path / "b")
        train(tiny_config(texts, steps=2, seed=1), tmp_path / "c")
        assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")

    def test_in_a_thread(self, tmp_path, texts):
        thread = threading.Thread(target=train, args=(tiny_config(texts, steps=1), tmp_path / "run"))
        thread.start()
        thread.join()
        assert (tmp_path / "run" / "step-00000001").is_dir()


class TestResume:
    @pytest.mark.parametrize("attention", ["nsa", "full"])
    def test_is_bit_for_bit_what_an_uninterrupted_run_is(self, tmp_path, texts, attention):
        config = tiny_config(texts, steps=9, batch_size=2).replace(model={"attention": attention})
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        train(config, whole)

        def crash():
            raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            train(config, parts, progress=Recorder(5, crash))
        assert [x.step for x in steps_of(parts)] == [1, 2, 3, 4, 5]
        with (parts / "log.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')  # torn by the power cut
        recorder = Recorder()
        result = train(config, parts, resume=True, progress=recorder)
        assert recorder.run.first_step == 4
        assert losses(parts) == losses(whole)
        assert result.evaluation == train(config, whole, resume=True).evaluation
        for name in ("model", "optimizer"):
            file = f"step-00000009/{name}.safetensors"
            assert (parts / file).read_bytes() == (whole / file).read_bytes()
        assert read_state(result.checkpoint).total_tokens == 9 * 2 * 64
        assert [x.elapsed_s for x in steps_of(parts)] == sorted(x.elapsed_s for x in steps_of(parts))

    def test_goes_on_past_the_end_with_more_steps(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        longer = tiny_config(texts, steps=8)
        assert train(longer, tmp_path / "run", resume=True).step == 8
        assert [x.lr for x in steps_of(tmp_path / "run")][6:] == [longer.learning_rate_at(x) for x in (7, 8)]

    def test_a_finished_run_is_measured_again(self, tmp_path, texts):
        first = train(tiny_config(texts), tmp_path / "run")
        before = losses(tmp_path / "run")
        again = train(tiny_config(texts), tmp_path / "run", resume=True)
        assert again.evaluation == first.evaluation
        assert math.isnan(again.tokens_per_s)
        assert losses(tmp_path / "run") == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"model": {"hidden_size": 40, "head_dim": 10}},
                r"model\.head_dim \(8, now 10\), model\.hidden_size \(32,",
            ),
            ({"model": {"nsa": {"window_size": 8}}}, r"model\.nsa\.window_size \(16, now 8\)"),
            ({"model": {"attention": "nsa"}}, r"model\.attention \('full', now 'nsa'\)"),
            ({"sequence_length": 32, "seed": 1}, r"seed \(0, now 1\), sequence_length \(64, now 32\)"),
            ({"held_out_fraction": 0.6}, r"held_out_fraction \(0\.2, now 0\.6\)"),
            ({"steps": 5}, "steps must be at least the 6"),
        ],
    )
    def test_another_model_or_text_is_an_error_that_names_it(self, tmp_path, texts, change, message):
        train(tiny_config(texts), tmp_path / "run")
        before = losses(tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            train(tiny_config(texts).replace(**change), tmp_path / "run", resume=True)
        assert losses(tmp_path / "run") == before

    def test_a_changed_file_is_an_error(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        (texts / "03.txt").write_text("something else")
        with pytest.raises(ValueError, match="files that have changed since"):
            train(tiny_config(texts), tmp_path / "run", resume=True)

    def test_the_text_may_have_moved(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        moved = texts.rename(tmp_path / "moved")
        assert train(tiny_config(moved, steps=7), tmp_path / "run", resume=True).step == 7

    def test_nothing_to_resume(self, tmp_path, texts):
        with pytest.raises(ValueError, match="output must be the directory of a run with a checkpoint"):
            train(tiny_config(texts), tmp_path / "run", resume=True)
        with pytest.raises(ValueError, match="not both"):
            train(tiny_config(texts), tmp_path / "run", resume=True, overwrite=True)
        (tmp_path / "file").write_text("kept")
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"output must be a directory, got '.*file', which is a file: choose"):
                train(tiny_config(texts), tmp_path / "file", resume=resume)
        assert (tmp_path / "file").read_text() == "kept"


class TestOverwrite:
    def test_a_run_is_not_replaced_by_accident(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        before = losses(tmp_path / "run")
        with pytest.raises(ValueError, match=r"got '.*run', which has step-00000006: continue .*--resume.*--overwrite"):
            train(tiny_config(texts, seed=1), tmp_path / "run")
        assert losses(tmp_path / "run") == before

    def test_is_replaced_on_request(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        train(tiny_config(texts, seed=1, steps=2), tmp_path / "run", overwrite=True)
        assert names(tmp_path / "run") == ["log.jsonl", "loss.png", "run.json", "step-00000002"]
        assert len(losses(tmp_path / "run")) == 2

    @pytest.mark.parametrize(
        "change", [{"impl": "?", "model": {"attention": "nsa"}}, {"sequence_length": 10**9}, {"paths": ["/nowhere"]}]
    )
    def test_a_run_that_cannot_start_replaces_nothing(self, tmp_path, texts, change):
        train(tiny_config(texts), tmp_path / "run")
        with pytest.raises(ValueError, match="must be"):
            train(tiny_config(texts).replace(**change), tmp_path / "run", overwrite=True)
        load_model(tmp_path / "run" / "step-00000006")
        assert len(losses(tmp_path / "run")) == 6

    def test_other_files_are_left_alone(self, tmp_path, texts):
        (tmp_path / "notes.txt").write_text("mine")
        train(tiny_config(texts, steps=1), tmp_path, overwrite=True)
        assert (tmp_path / "notes.txt").read_text() == "mine"


class TestEarlyEnds:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_the_run_with_a_checkpoint(self, tmp_path, texts, number):
        before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
        recorder = Recorder(4, lambda: signal.raise_signal(number))
        result = train(tiny_config(texts), tmp_path / "run", progress=recorder)
        assert recorder.events[-3:] == [4, "stopping", "step-00000004"]
        assert (result.step, result.interrupted, result.evaluation) == (4, number, None)
        assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
        train(tiny_config(texts), tmp_path / "run", resume=True)
        train(tiny_config(texts), tmp_path / "whole")
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def test_a_signal_in_the_last_step_is_no_interruption(self, tmp_path, texts):
        recorder = Recorder(6, lambda: signal.raise_signal(signal.SIGINT))
        result = train(tiny_config(texts), tmp_path / "run", progress=recorder)
        assert result.interrupted is None
        assert result.evaluation is not None

    def test_the_second_signal_aborts_at_once(self, tmp_path, texts):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(texts), tmp_path / "run", progress=Recorder(4, twice))
        assert [x for x in names(tmp_path / "run") if "step" in x] == ["step-00000003"]
        assert signal.getsignal(signal.SIGINT) == before

    def test_a_loss_that_is_not_finite(self, tmp_path, texts):
        run = Trainer(tiny_config(texts), tmp_path / "run")

        def break_it():
            with torch.no_grad():
                run.model.norm.weight.fill_(math.nan)

        run.progress = Recorder(4, break_it)
        with pytest.raises(
            FloatingPointError, match=r"got loss nan.* at step 5 \(the newest checkpoint is .*00000003\)"
        ):
            run.run()
        assert [x.step for x in steps_of(tmp_path / "run")] == [1, 2, 3, 4]
        assert read_state(tmp_path / "run" / "step-00000003").step == 3

    def test_a_disk_that_fills_up(self, tmp_path, texts, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        def fill():
            monkeypatch.setattr(os, "fsync", full)

        with pytest.raises(OSError, match=r"step-00000006 could not be written \(No space left"):
            train(tiny_config(texts), tmp_path / "run", progress=Recorder(5, fill))
        assert [x for x in names(tmp_path / "run") if "step" in x] == ["step-00000003"]
        monkeypatch.undo()
        assert train(tiny_config(texts), tmp_path / "run", resume=True).step == 6

    def test_a_disk_without_room_is_seen_before_the_first_step(self, tmp_path, texts, monkeypatch):
        monkeypatch.setattr(checkpoint, "check_space", lambda place, needed: (_ for _ in ()).throw(OSError("no room")))
        recorder = Recorder()
        with pytest.raises(OSError, match="no room"):
            train(tiny_config(texts), tmp_path / "run", progress=recorder)
        assert not recorder.events

    def test_a_log_that_cannot_be_written_is_named(self, tmp_path, texts):
        (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
        with pytest.raises(OSError, match=r"log\.jsonl could not be written"):
            train(tiny_config(texts), tmp_path / "run")
        assert not list((tmp_path / "run").glob(".*"))


class TestLog:
    record = log.StepRecord(1, 2.0, 0.1, 3.0, 4.0, 5, 6.0)

    def test_a_line_that_is_no_record(self, tmp_path):
        path = tmp_path / "log.jsonl"
        log.append(path, self.record)
        with path.open("a") as file:
            file.write('{"step": 2}\n')
        with pytest.raises(ValueError, match=r"log\.jsonl line 2 must be a record"):
            log.read(path)

    def test_round_trip_and_cut(self, tmp_path):
        path = tmp_path / "log.jsonl"
        assert log.read(path) == []
        for step in (1, 2, 3):
            log.append(path, log.StepRecord(step, 2.0, 0.1, 3.0, 4.0, 5, 6.0))
        log.keep_until(path, 2)
        assert [x.step for x in log.read(path)] == [1, 2]

    def test_the_curve_of_no_step_and_of_one(self, tmp_path):
        for records in ([], [self.record]):
            log.draw_loss_curve(records, 3.0, tmp_path / "loss.png")
            assert names(tmp_path) == ["loss.png"]

    def test_the_curve_is_drawn_again_from_the_log(self, tmp_path, texts):
        train(tiny_config(texts), tmp_path / "run")
        first = (tmp_path / "run" / "loss.png").read_bytes()
        (tmp_path / "run" / "loss.png").unlink()
        assert trainer.draw_curve(tmp_path / "run").read_bytes() == first
