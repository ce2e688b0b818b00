"""Random inputs for a case, of every flavour."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from .. import geometry
from ..types import SequenceLayout
from .cases import Case

Tensors = dict[str, Tensor]


class Random:
    """Standard normal numbers in the dtype of a case, the same on every device.

    Args:
        case: its seed and dtype count, and whether it wants slices.
        device: where the tensors shall be.
        purpose: numbers for different purposes differ.
    """

    def __init__(self, case: Case, device: torch.device, purpose: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{case.seed} {purpose}".encode()))
        self.case, self.device = case, device

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.case.dtype)

    def tokens(self, layout: SequenceLayout, heads: int, dim: int) -> Tensor:
        """`[N, heads, dim]`, a slice of something wider if the case wants that."""
        width = heads * dim
        if self.case.flavour == "fused projection":
            return self(layout.total_tokens, width + 64)[:, 16 : 16 + width].unflatten(1, (heads, dim))
        return self(layout.total_tokens, heads, dim)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in [low, high), int64."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def attention_inputs(case: Case, layout: SequenceLayout, keys: SequenceLayout) -> Tensors:
    """`q` for the tokens of `layout`, `k` and `v` for those of `keys`."""
    random = Random(case, layout.device, "attention")
    q = random.tokens(layout, case.num_heads, case.head_dim)
    k = random.tokens(keys, case.num_kv_heads, case.head_dim)
    v = random.tokens(keys, case.num_kv_heads, case.head_dim_v)
    if case.flavour == "large queries":
        q *= 12.0
    if case.flavour in ("loud first token", "quiet first token"):
        # One component of every query, times the same of the first key, times the softmax scale, makes the 100 nats.
        component = math.sqrt(100.0 * math.sqrt(case.head_dim))
        q[..., 0] = component
        k[keys.positions() == 0, :, 0] = component if case.flavour == "loud first token" else -component
    if case.flavour == "ties":
        # Every other score is 0, the rest so far below that exp makes 0 of it.
        q[..., 0], q[..., 1:] = 1.0, 0.0
        k[..., 0] = k[..., 0].sign().clamp(max=0) * 3e4
    return {"q": q, "k": k, "v": v}


def whole_inputs(case: Case, layout: SequenceLayout) -> Tensors:
    """`q`, `k`, `v` and `gates`; where the case wants it, `k_compressed`, `v_compressed`, `k_window` and `v_window`."""
    inputs = attention_inputs(case, layout, layout.keys)
    random = Random(case, layout.device, "branches")
    inputs["gates"] = random.tokens(layout, case.num_heads, 3)
    if case.flavour == "independent branches":
        compressed = layout.compressed(case.config.kernel_size, case.config.kernel_stride)
        for branch, keys in (("compressed", compressed), ("window", layout.keys)):
            inputs[f"k_{branch}"] = random.tokens(keys, case.num_kv_heads, case.head_dim)
            inputs[f"v_{branch}"] = random.tokens(keys, case.num_kv_heads, case.head_dim_v)
    return inputs


def compress_inputs(kind: str, case: Case, layout: SequenceLayout) -> Tensors:
    """`x`, and all weights that the kind of compression takes, scaled so that the results are about as large as `x`."""
    random = Random(case, layout.device, f"compress {kind}")
    heads, dim, window, hidden = case.num_kv_heads, case.head_dim, case.config.kernel_size, case.head_dim + 8
    inputs = {"x": random.tokens(layout, heads, dim), "position_embedding": random(window, dim)}
    if kind == "weighted":
        inputs["weight"] = random(heads, window) * window**-0.5
    elif kind == "linear":
        inputs["weight"] = random(heads, window * dim, dim) * (window * dim) ** -0.5
    elif kind == "mlp":
        inputs["weight"] = random(heads, window * dim, hidden) * (window * dim) ** -0.5
        inputs["bias"] = random(heads, hidden)
        inputs["weight_out"] = random(heads, hidden, dim) * hidden**-0.5
        inputs["bias_out"] = random(heads, dim)
    return inputs


def combine_inputs(case: Case, layout: SequenceLayout, gate_heads: int) -> Tensors:
    """The outputs of three branches, and `gates`."""
    random = Random(case, layout.device, "combine")
    names = ("out_compressed", "out_selected", "out_window")
    outs = {name: random.tokens(layout, case.num_heads, case.head_dim_v) for name in names}
    return {**outs, "gates": random.tokens(layout, gate_heads, 3)}


def hostile_indices(case: Case, layout: SequenceLayout) -> Tensor:
    """Valid, future and absurd blocks in any order, some repeated; int32 `[N, Hk, T]`. Some rows are all -1."""
    random = Random(case, layout.device, "hostile indices")
    shape = layout.total_tokens, case.num_kv_heads, case.config.num_selected_blocks
    indices = random.integers(0, geometry.num_blocks(layout.keys.max_length, case.config.block_size) + 2, *shape)
    kind = random.integers(0, 10, *shape)
    # In 32 bits, the first tokens of the last two wrap round to -2**31 and to 0.
    block_size = case.config.block_size
    absurd = (-1, -7, -(2**31), 2**31 - 1, 2**31 // block_size, 2**32 // block_size)
    for index, value in enumerate(absurd):
        indices = indices.masked_fill(kind == index, value)
    indices = torch.where(kind == len(absurd), indices[..., :1], indices)
    return indices.masked_fill(random.integers(0, 8, *shape[:2], 1) == 0, -1).to(torch.int32)
