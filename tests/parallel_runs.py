"""Runs of one process and of two, on CPUs or on GPUs: what they write is to be compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flash_sparse_attention
from flash_sparse_attention.training import TrainConfig, Trainer, log, train
from flash_sparse_attention.training.parallel import Group
from pretrained_runs import texts, tiny_config, write_jsonl, write_model
from training_runs import tiny_config as tiny_byte_config
from training_runs import write_texts

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SIZES = {"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "num_selected_blocks": 4, "window_size": 16}


def configs(root: Path, device: str) -> dict[str, TrainConfig]:
    """The runs that are done by one process and by two."""
    corpus, model, byte_texts = root / "corpus.jsonl", root / "model", root / "texts"
    options = {"device": device, "precision": "fp32"}
    # At one learning rate, so that the number of steps decides on nothing but the end.
    pretrained = tiny_config(model, corpus, batch_size=4, final_lr_fraction=1.0, **options)
    converted = pretrained.replace(convert=True, nsa=SIZES)
    return {
        "pretrained": pretrained,
        "checkpointed": converted.replace(gradient_checkpointing=True, steps=2),
        "bf16": pretrained.replace(precision="bf16", steps=2),
        "converted-bf16": converted.replace(precision="bf16", steps=2),
        "converted": converted,
        "bytes": tiny_byte_config(byte_texts, batch_size=2, steps=4, **options).replace(model={"attention": "nsa"}),
    }


def make_runs(root: Path, device: str) -> Path:
    """A folder with the runs of one process and of two."""
    write_model(root / "model", "qwen3")
    write_jsonl(root / "corpus.jsonl", texts())
    write_texts(root / "texts")
    for name, config in configs(root, device).items():
        train(config, root / "one" / name)
    train(configs(root, device)["pretrained"], root / "one" / "handed-over")
    train(configs(root, device)["pretrained"].replace(steps=6), root / "one" / "longer")
    mp.spawn(work, (str(root), 2, device), nprocs=2)
    return root


def work(rank: int, root: str, size: int, device: str) -> None:
    """A process of a group of two: the runs of `configs`, one that goes on, and some that end or disagree."""
    torch.set_num_threads(1)
    os.environ.update(zip(NAMES, (str(rank), str(size), str(rank)), strict=True))
    folder = Path(root)
    place = Group.of_environment().device(torch.device(device))
    options = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": size}
    if device == "cuda":
        dist.init_process_group("nccl", device_id=place, **options)
    else:
        dist.init_process_group("gloo", **options)
    try:
        for name, config in configs(folder, device).items():
            train(config, folder / "two" / name)
        # Begun by one process.
        train(configs(folder, device)["pretrained"].replace(steps=6), folder / "one" / "handed-over", resume=True)
        stopped(folder, rank, device)
        not_a_number(folder, rank, device)
        of_two_minds(folder, rank, device)
    finally:
        dist.destroy_process_group()


def stopped(folder: Path, rank: int, device: str) -> None:
    """A run that a signal to one process ends."""
    run = Trainer(configs(folder, device)["bytes"], folder / "two" / "stopped")
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


def not_a_number(folder: Path, rank: int, device: str) -> None:
    """A run whose loss is no number in one of the processes ends in both."""
    run = Trainer(configs(folder, device)["converted"], folder / "two" / "not-a-number")
    if rank == 1:
        run.model.model.model.norm.register_forward_hook(lambda module, inputs, hidden: hidden * float("nan"))
    with pytest.raises(FloatingPointError, match="loss nan, gradient norm nan at step 1"):
        run.run()


def of_two_minds(folder: Path, rank: int, device: str) -> None:
    """A run in which one process finds that logits are not those of the output layer."""
    run = Trainer(configs(folder, device)["pretrained"], folder / "two" / "of-two-minds")

    def shifted(module, inputs, output):
        output.logits = output.logits + 1
        return output

    if rank == 1:
        run.model.model.register_forward_hook(shifted)
    run.run()
    assert run.model._plain_head is False


def torchrun(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """A command in two processes, as a user starts it."""
    # The package that is tested, also where it runs from its sources and the path to them is a relative one.
    path = os.pathsep.join([str(Path(flash_sparse_attention.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)}
    # Of a run within a run.
    for name in NAMES:
        environment.pop(name, None)
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    return subprocess.run(started, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


def train_by_torchrun(folder: Path, device: str) -> subprocess.CompletedProcess:
    """`fsa train` of a tiny model."""
    write_model(folder / "model")
    write_jsonl(folder / "corpus.jsonl", texts())
    command = ["-m", "flash_sparse_attention.cli", "train", "corpus.jsonl", "--model", "model", "--convert"]
    command += ["--sequence-length", "64", "--batch-size", "2", "--steps", "2", "--held-out-fraction", "0.2"]
    return torchrun(folder, *command, "--device", device, "--precision", "fp32")


def records(folder: Path) -> list[log.StepRecord]:
    """The log of a run."""
    return log.read(folder / "log.jsonl")


def losses(folder: Path) -> list[float]:
    """Of each step."""
    return [record.loss for record in records(folder)]


def numbers(folder: Path) -> list[float]:
    """Losses, held-out losses and lengths of gradients, one behind the other."""
    found = [(x.loss, x.grad_norm, x.eval_loss) for x in records(folder)]
    return [value for record in found for value in record if value is not None]
