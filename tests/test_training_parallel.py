"""Several processes: FSDP2 over gloo gives the losses of one process, and checkpoints that any number goes on from."""

from __future__ import annotations

import pytest
import torch
import transformers

from flash_sparse_attention.training import Trainer, load_model, train
from flash_sparse_attention.training.parallel import Group
from parallel_runs import NAMES, configs, losses, make_runs, numbers, records, torchrun, train_by_torchrun
from training_runs import tiny_config as tiny_byte_config
from training_runs import write_texts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one process and of two."""
    return make_runs(tmp_path_factory.mktemp("runs"), "cpu")


@pytest.mark.parametrize("name", ["pretrained", "checkpointed", "converted", "bytes"])
def test_two_processes_compute_what_one_does(runs, name):
    one, two = runs / "one" / name, runs / "two" / name
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)
    assert [x.total_tokens for x in records(two)] == [x.total_tokens for x in records(one)]
    assert records(two)[-1].perplexity_by_position == pytest.approx(records(one)[-1].perplexity_by_position, rel=1e-4)


def test_bf16(runs):
    one, two = runs / "one" / "bf16", runs / "two" / "bf16"
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)
    assert numbers(two) != numbers(runs / "two" / "pretrained")[: len(numbers(two))]


def test_a_checkpoint_is_whole(runs):
    for name in ("one", "two"):
        checkpoint = runs / name / "pretrained" / "step-00000004"
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
        if name == "one":
            expected = model.state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
        assert value.dtype == torch.float32
    files = [sorted(x.name for x in (runs / name / "bytes" / "step-00000004").iterdir()) for name in ("one", "two")]
    assert files[0] == files[1]
    assert torch.isfinite(load_model(runs / "two" / "bytes")[0].embed_tokens.weight).all()


def test_two_processes_go_on_from_one_and_one_from_two(runs, tmp_path):
    longer = numbers(runs / "one" / "longer")
    assert numbers(runs / "one" / "handed-over") == pytest.approx(longer, rel=1e-4)
    train(configs(runs, "cpu")["pretrained"].replace(steps=6), runs / "two" / "pretrained", resume=True)
    assert numbers(runs / "two" / "pretrained") == pytest.approx(longer, rel=1e-4)


def test_a_signal_to_any_process_ends_all_behind_one_step(runs):
    assert [x.step for x in records(runs / "two" / "stopped")] == [1, 2]


def test_a_loss_that_is_no_number_in_one_process_ends_all(runs):
    assert not (runs / "two" / "not-a-number" / "log.jsonl").exists()


def test_processes_agree_on_how_logits_are_computed(runs):
    """A process that computed them in another way than the others would wait for weights that nobody sends."""
    assert numbers(runs / "two" / "of-two-minds") == pytest.approx(numbers(runs / "one" / "pretrained"), rel=1e-4)


class TestGroup:
    def test_of_one_process(self, monkeypatch):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        assert Group.of_environment() == Group()
        Group().connect(torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert Group().share(range(5)) == range(5)

    def test_of_torchrun(self, monkeypatch):
        for name, value in zip(NAMES, "352", strict=True):
            monkeypatch.setenv(name, value)
        group = Group.of_environment()
        assert (group.rank, group.size, group.local_rank, group.first) == (3, 5, 2, False)
        assert group.share(range(12)) == range(3, 12, 5)

    @pytest.mark.parametrize("values", [("", "2", "0"), ("2", "2", "0"), ("0", "x", "0"), ("0", "2", "-1")])
    def test_of_something_else(self, monkeypatch, values):
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="the environment must be that of torchrun"):
            Group.of_environment()

    def test_the_batch_is_shared(self, monkeypatch, tmp_path):
        for name, value in zip(NAMES, "020", strict=True):
            monkeypatch.setenv(name, value)
        config = tiny_byte_config(write_texts(tmp_path / "texts"), batch_size=3)
        with pytest.raises(ValueError, match=r"batch_size must be a multiple of the 2 processes.*, got 3"):
            Trainer(config, tmp_path / "run")

    def test_more_processes_than_devices(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="processes must be at most as many as there are GPUs, got 2"):
            Group(1, 2, 1).device(torch.device("cuda"))


@pytest.mark.slow
def test_torchrun(tmp_path):
    """As a user starts it."""
    done = train_by_torchrun(tmp_path, "cpu")
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu in fp32, into runs/model" in done.stdout
    assert done.stdout.count("held-out loss") == 1
    assert [x.step for x in records(tmp_path / "runs" / "model")] == [1, 2]


@pytest.mark.slow
def test_several_runs_of_a_group(tmp_path):
    """The processes of torchrun meet once, for all runs that they do."""
    write_texts(tmp_path / "texts")
    (tmp_path / "several.py").write_text(
        "from flash_sparse_attention.training import TrainConfig, train\n"
        "for number in range(4):\n"
        "    train(TrainConfig.from_dict(CONFIG), f'run-{number}')\n".replace(
            "CONFIG", repr(tiny_byte_config(tmp_path / "texts", batch_size=2, steps=2).to_dict())
        )
    )
    done = torchrun(tmp_path, "several.py")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run-3") == losses(tmp_path / "run-0")
