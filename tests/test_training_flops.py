"""The FLOPs of a training step, by hand, and the peaks of devices."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig
from flash_sparse_attention.training import TrainConfig, flops
from flash_sparse_attention.training.flops import AttentionCost, ModelCost, peak_flops
from flash_sparse_attention.training.log import significant
from flash_sparse_attention.training.tasks import ByteTask

NSA = NSAConfig(kernel_size=8, kernel_stride=4, block_size=8, num_selected_blocks=3, window_size=5)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 24, 25, 100])
def test_visible_keys_by_counting(length):
    full = sum(t + 1 for t in range(length))
    assert AttentionCost(1).visible_keys(length) == full
    assert AttentionCost(1, window_size=9).visible_keys(length) == sum(min(9, t + 1) for t in range(length))
    compressed = sum(1 for t in range(length) for first in range(0, length, 4) if first + 8 - 1 <= t)
    selected = sum(min(24, t + 1) for t in range(length))
    window = sum(min(5, t + 1) for t in range(length))
    assert AttentionCost(1, NSA).visible_keys(length) == compressed + selected + window


def test_a_step_is_weights_and_attention():
    cost = ModelCost(1000, (AttentionCost(64), AttentionCost(64), AttentionCost(64, NSA)))
    pairs = 2 * (10 + 3) + AttentionCost(1, NSA).visible_keys(4) + AttentionCost(1, NSA).visible_keys(2)
    assert cost.training_flops([4, 2]) == 6 * 1000 * 6 + 12 * 64 * pairs


@pytest.mark.parametrize(("attention", "tie"), [("nsa", True), ("full", False)])
def test_a_model_of_bytes(attention, tie):
    sizes = LanguageModelConfig(vocab_size=257, num_layers=2, attention=attention, tie_embeddings=tie, nsa=NSA)
    model = LanguageModel(sizes)
    cost = ByteTask(TrainConfig(model=sizes)).cost(model)
    table = model.embed_tokens.weight.numel()
    # One window of a compressor in every kernel_stride=4 tokens.
    idle = sum(x.numel() * 3 / 4 for name, x in model.named_parameters() if "compressor" in name)
    assert idle or attention == "full"
    assert cost.weights == pytest.approx(model.num_parameters() - (0 if tie else table) - idle, abs=4)
    assert cost.attention == (AttentionCost(256, NSA if attention == "nsa" else None),) * 2


def test_peaks():
    assert peak_flops(torch.device("cpu")) is None
    assert flops._peak_of("NVIDIA H200") == flops._peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert flops._peak_of("NVIDIA H100 PCIe") == 756e12
    assert flops._peak_of("NVIDIA GB200") == 2.5e15
    assert flops._peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops._peak_of("Some other device") is None


@pytest.mark.parametrize(("value", "expected"), [(0.412345, 0.4123), (0.0000412345, 0.00004123), (0.0, 0.0)])
def test_a_small_share_is_not_nothing(value, expected):
    assert significant(value) == expected
