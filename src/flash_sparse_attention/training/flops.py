"""How much a model computes in training, and how much a GPU can: model FLOPs utilisation (MFU).

A multiplication with an addition is 2 FLOPs, and the backward pass has twice those of the forward pass. Counted are

- products with weights: 6 for each trained number and token; none for the input embedding, unless it is the output
  layer too;
- attention: 12 Hq D for each layer, query and visible key. Full attention sees the keys up to the query, or those in
  its window; sparse attention sees compressed ones, those of the selected blocks, and its window.

What is computed again (activation checkpointing), norms, softmax and the optimizer do not count: MFU is about the work
that the model needs, not about what is done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config import NSAConfig
from ..geometry import Interval
from ..nn import Compressor

# Peak of dense bf16 products, FLOP/s: vendors' data sheets. The first name that the device's contains counts.
_BF16_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 5090", 209e12),
)


@dataclass(frozen=True)
class AttentionCost:
    """What the FLOPs of one layer's attention depend on.

    Attributes:
        channels: query heads times channels of a head.
        nsa: of sparse attention; None for full attention.
        window_size: tokens that full attention sees at the most; None for all.
    """

    channels: int
    nsa: NSAConfig | None = None
    window_size: int | None = None

    def visible_keys(self, length: int) -> int:
        """The pairs of a query and a key that it sees, over all queries of a sequence.

        >>> AttentionCost(64).visible_keys(4), AttentionCost(64, window_size=2).visible_keys(4)
        (10, 7)
        """
        return _visible_keys(self, length)


@dataclass(frozen=True)
class ModelCost:
    """What the FLOPs of a training step depend on.

    Attributes:
        weights: trained numbers that take part in products.
        attention: of each layer.
    """

    weights: int
    attention: tuple[AttentionCost, ...]

    def training_flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of the forward and backward pass over sequences of these lengths (tokens).

        >>> ModelCost(1000, (AttentionCost(64),)).training_flops([4]) == 6 * 1000 * 4 + 12 * 64 * 10
        True
        """
        layers: dict[AttentionCost, int] = {}
        for layer in self.attention:
            layers[layer] = layers.get(layer, 0) + 1
        pairs = sum(
            count * layer.channels * layer.visible_keys(length) for layer, count in layers.items() for length in lengths
        )
        return 6.0 * self.weights * sum(lengths) + 12.0 * pairs


def unused_weights(model: nn.Module) -> int:
    """Numbers of compressors that are not there for every token: a window comes every `kernel_stride` tokens."""
    compressors = [module for module in model.modules() if isinstance(module, Compressor)]
    sizes = [(sum(x.numel() for x in one.parameters() if x.requires_grad), one.kernel_stride) for one in compressors]
    return sum(numbers - numbers // stride for numbers, stride in sizes)


def peak_flops(device: torch.device) -> float | None:
    """Peak of dense bf16 products of a device, FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    return _peak_of(torch.cuda.get_device_name(device))


def _peak_of(name: str, known: Iterable[tuple[str, float]] = _BF16_PEAKS) -> float | None:
    return next((peak for part, peak in known if part in name), None)


@functools.lru_cache(maxsize=1 << 14)
def _visible_keys(cost: AttentionCost, length: int) -> int:
    if cost.nsa is None:
        branches = [Interval(window_size=cost.window_size)]
    else:
        nsa = cost.nsa
        branches = [
            Interval(kernel_size=nsa.kernel_size, kernel_stride=nsa.kernel_stride),
            # As many keys as a window over the tokens of all selected blocks has.
            Interval(window_size=nsa.num_selected_blocks * nsa.block_size),
            Interval(window_size=nsa.window_size),
        ]
    queries = torch.arange(length)
    return sum(int((branch.end(queries) - branch.start(queries)).sum()) for branch in branches)
