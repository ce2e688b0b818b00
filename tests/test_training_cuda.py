"""Training on a CUDA device: the same start as on the CPU, bf16, resuming."""

from __future__ import annotations

import pytest
import torch

import pretrained_runs
from flash_sparse_attention.training import Progress, load_model, log, train
from training_runs import tiny_config, write_texts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class PowerCut(Progress):
    """Ends a run behind its checkpoint of step 3."""

    def stepped(self, record):
        if record.step == 4:
            raise RuntimeError("power cut")


def losses(output):
    return [record.loss for record in log.read(output / "log.jsonl")]


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_fp32_agrees_with_the_cpu(tmp_path, attention):
    config = tiny_config(write_texts(tmp_path / "texts"), precision="fp32").replace(model={"attention": attention})
    train(config, tmp_path / "cpu")
    train(config.replace(device="cuda"), tmp_path / "cuda")
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_bf16_resumes_on_the_gpu_and_loads_on_the_cpu(tmp_path, attention):
    config = tiny_config(write_texts(tmp_path / "texts"), device="cuda").replace(model={"attention": attention})
    train(config, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, tmp_path / "parts", progress=PowerCut())
    train(config, tmp_path / "parts", resume=True)
    # Sums on a GPU may be taken in another order.
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)
    model, _ = load_model(tmp_path / "parts")
    assert {x.device.type for x in model.parameters()} == {"cpu"}
    assert {x.dtype for x in model.parameters()} == {torch.float32}


def test_a_model_of_transformers(tmp_path):
    """bf16 with the fused optimizer, MFU and memory in the log, resuming, and the loss of the CPU."""
    config = pretrained_runs.tiny_config(
        pretrained_runs.write_model(tmp_path / "model"),
        pretrained_runs.write_jsonl(tmp_path / "corpus.jsonl", pretrained_runs.texts()),
        steps=6,
        save_every=3,
    )
    train(config, tmp_path / "cpu")
    train(config.replace(device="cuda", precision="fp32"), tmp_path / "cuda")
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config.replace(device="cuda"), tmp_path / "parts", progress=PowerCut())
    train(config.replace(device="cuda"), tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "cpu"), rel=2e-2)
    record = log.read(tmp_path / "parts" / "log.jsonl")[-1]
    assert record.peak_memory_gib > 0
    assert record.mfu is None or 0 < record.mfu < 1
