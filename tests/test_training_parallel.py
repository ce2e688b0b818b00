"""Several processes: FSDP2 over gloo gives the losses of one process, and checkpoints that any number goes on from."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers

from flash_sparse_attention.training import Trainer, load_model, log, train
from flash_sparse_attention.training.parallel import Group
from pretrained_runs import texts, tiny_config, write_jsonl, write_model
from training_runs import tiny_config as tiny_byte_config
from training_runs import write_texts

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def configs(root: Path):
    """The runs that are done by one process and by two."""
    corpus, model, byte_texts = root / "corpus.jsonl", root / "model", root / "texts"
    # At one learning rate, so that the number of steps decides on nothing but the end.
    pretrained = tiny_config(model, corpus, batch_size=4, final_lr_fraction=1.0)
    return {
        "pretrained": pretrained,
        "checkpointed": pretrained.replace(gradient_checkpointing=True, steps=2),
        "bf16": pretrained.replace(precision="bf16", steps=2),
        "bytes": tiny_byte_config(byte_texts, batch_size=2, steps=4).replace(model={"attention": "nsa"}),
    }


def work(rank: int, root: str, size: int) -> None:
    """A process of a group of two: the runs of `configs`, one that goes on, and one that a signal ends."""
    torch.set_num_threads(1)
    os.environ.update(zip(NAMES, (str(rank), str(size), str(rank)), strict=True))
    folder = Path(root)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    for name, config in configs(folder).items():
        train(config, folder / "two" / name)
    # Begun by one process.
    train(configs(folder)["pretrained"].replace(steps=6), folder / "one" / "handed-over", resume=True)

    run = Trainer(configs(folder)["bytes"], folder / "two" / "stopped")
    note = run._note

    def signalled(record: log.StepRecord) -> None:
        note(record)
        # The one that neither writes nor speaks gets the signal, and a second one of another kind.
        if rank == 1 and record.step == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    run._note = signalled
    result = run.run()
    assert (result.step, result.interrupted) == (2, signal.SIGINT)
    assert result.checkpoint == folder / "two" / "stopped" / "step-00000002"
    integrated(folder, "two")
    dist.destroy_process_group()


def integrated(folder: Path, place: str) -> None:
    """A converted model."""
    sizes = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "num_selected_blocks": 4, "window_size": 16}
    train(configs(folder)["pretrained"].replace(convert=True, nsa=sizes), folder / place / "converted")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one process and of two."""
    root = tmp_path_factory.mktemp("runs")
    write_model(root / "model", "qwen3")
    write_jsonl(root / "corpus.jsonl", texts())
    write_texts(root / "texts")
    for name, config in configs(root).items():
        train(config, root / "one" / name)
    train(configs(root)["pretrained"], root / "one" / "handed-over")
    train(configs(root)["pretrained"].replace(steps=6), root / "one" / "longer")
    integrated(root, "one")
    mp.spawn(work, (str(root), 2), nprocs=2)
    return root


def records(folder: Path) -> list[log.StepRecord]:
    return log.read(folder / "log.jsonl")


def numbers(folder: Path) -> list[float]:
    """Losses, held-out losses and lengths of gradients, one behind the other."""
    found = [(x.loss, x.grad_norm, x.eval_loss) for x in records(folder)]
    return [value for record in found for value in record if value is not None]


@pytest.mark.parametrize("name", ["pretrained", "checkpointed", "bytes"])
def test_two_processes_compute_what_one_does(runs, name):
    one, two = runs / "one" / name, runs / "two" / name
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-4)
    assert [x.total_tokens for x in records(two)] == [x.total_tokens for x in records(one)]
    assert records(two)[-1].perplexity_by_position == pytest.approx(records(one)[-1].perplexity_by_position, rel=1e-4)


def test_bf16(runs):
    one, two = runs / "one" / "bf16", runs / "two" / "bf16"
    assert [x.loss for x in records(two)] == pytest.approx([x.loss for x in records(one)], rel=1e-2)
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
    train(configs(runs)["pretrained"].replace(steps=6), runs / "two" / "pretrained", resume=True)
    assert numbers(runs / "two" / "pretrained") == pytest.approx(longer, rel=1e-4)


def test_a_signal_to_any_process_ends_all_behind_one_step(runs):
    assert [x.step for x in records(runs / "two" / "stopped")] == [1, 2]


def test_converted(runs):
    assert numbers(runs / "two" / "converted") == pytest.approx(numbers(runs / "one" / "converted"), rel=1e-3)


class TestGroup:
    def test_of_one_process(self, monkeypatch):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        assert Group.of_environment() == Group()
        assert not Group().connect(torch.device("cpu"))
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
    import subprocess

    write_model(tmp_path / "model")
    write_jsonl(tmp_path / "corpus.jsonl", texts())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flash_sparse_attention.cli", "train", "corpus.jsonl", "--model", "model", "--device", "cpu"]
    command += ["--sequence-length", "64", "--batch-size", "2", "--steps", "2", "--held-out-fraction", "0.2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu in fp32, into runs/model" in done.stdout
    assert done.stdout.count("held-out loss") == 1
    assert [x.step for x in records(tmp_path / "runs" / "model")] == [1, 2]
