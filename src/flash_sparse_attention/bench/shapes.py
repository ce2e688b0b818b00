"""Sizes that benchmarks run on: those of models, of papers, and any other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .. import geometry
from ..config import NSAConfig
from ..validation import FLOAT_DTYPES, bad, check_choice, check_heads, check_positive


@dataclass(frozen=True)
class Shape:
    """One sequence and the heads that attend to it.

    Attributes:
        tokens: N.
        heads, kv_heads: Hq, Hk.
        head_dim: of queries and keys.
        head_dim_v: of values.
        nsa: sizes of the sparse attention.
        dtype: of the inputs.
    """

    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 128
    nsa: NSAConfig = dataclasses.field(default_factory=NSAConfig)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "kv_heads", "head_dim", "head_dim_v"):
            check_positive(name, getattr(self, name))
        check_heads(self.heads, self.kv_heads)
        check_choice("dtype", str(self.dtype), tuple(map(str, FLOAT_DTYPES)))

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads

    @property
    def windows(self) -> int:
        """Compressed tokens of the sequence."""
        return geometry.num_compressed_tokens(self.tokens, self.nsa.kernel_size, self.nsa.kernel_stride)

    def dense(self) -> dict[str, int | str]:
        """The sizes that full attention has."""
        return {
            "tokens": self.tokens,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "head_dim_v": self.head_dim_v,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def sizes(self, *names: str) -> dict[str, int | str]:
        """The dense sizes, and these of the sparse attention (`slots` is its number of selected blocks)."""
        nsa = {"slots": self.nsa.num_selected_blocks, **self.nsa.to_dict()}
        return {**self.dense(), **{name: nsa[name] for name in names}}

    def selected(self) -> dict[str, int | str]:
        """The sizes that selected attention has."""
        return self.sizes("block_size", "slots")

    def compressed(self) -> dict[str, int | str]:
        """The sizes that the compressed branch has."""
        return self.sizes("kernel_size", "kernel_stride")

    def window(self) -> dict[str, int | str]:
        """The sizes that the sliding window has."""
        return self.sizes("window_size")

    def whole(self) -> dict[str, int | str]:
        """The sizes that the whole attention has."""
        return self.sizes("kernel_size", "kernel_stride", "block_size", "slots", "window_size")

    def __str__(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        blocks = f"{self.nsa.num_selected_blocks} blocks of {self.nsa.block_size}"
        return f"{self.tokens:,} tokens, {self.heads}/{self.kv_heads} heads of {dims}, {blocks}"


# Heads by model. nsa-27b is the model of the NSA paper, whose queries and keys are wider than its values.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"heads": 32, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "qwen3-14b": {"heads": 40, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "qwen2.5-32b": {"heads": 40, "kv_heads": 8, "head_dim": 128, "head_dim_v": 128},
    "nsa-27b": {"heads": 64, "kv_heads": 4, "head_dim": 192, "head_dim_v": 128},
}
# The kernel figures of the FSA paper: 16 blocks of 64 and 8 of 128, groups of 1 to 8.
_PAPER_GROUPS = ((4, 4), (8, 4), (16, 4), (32, 4))
_PAPER_BLOCKS = ((64, 16), (128, 8))
PRESETS = ("default", "paper", *MODELS)


def operator_shapes(preset: str, lengths: tuple[int, ...] | None = None, **changes: Any) -> list[Shape]:
    """The shapes of the suite `operators`.

    Args:
        preset: `default`: the shapes whose times docs/benchmarks.md tells; `paper`: those of the FSA paper's figures;
            or a model.
        lengths: tokens, instead of the preset's.
        changes: other sizes, fields of `Shape`.
    """
    check_choice("preset", preset, PRESETS)
    if preset == "default" and lengths is None and not changes:
        coarse = NSAConfig(block_size=128, num_selected_blocks=8)
        return [
            Shape(65536),
            Shape(65536, 4, 4),
            Shape(65536, 32, 4),
            Shape(65536, 16, 4, nsa=coarse),
            Shape(65536, 64, 4),
            Shape(32768),
            Shape(8192),
        ]
    lengths = lengths or ((65536, 32768, 8192) if preset == "default" else (65536, 32768, 16384, 8192))
    if preset == "paper":
        shapes = [
            Shape(n, heads, kv_heads, nsa=NSAConfig(block_size=size, num_selected_blocks=slots))
            for n in lengths
            for size, slots in _PAPER_BLOCKS
            for heads, kv_heads in _PAPER_GROUPS
        ]
    else:
        shapes = [Shape(n, **MODELS.get(preset, {})) for n in lengths]
    return [dataclasses.replace(shape, **changes) for shape in shapes]


def attention_shapes(preset: str, lengths: tuple[int, ...] | None = None, **changes: Any) -> list[Shape]:
    """The shapes of the suite `attention`: by length, and by heads of a group."""
    check_choice("preset", preset, PRESETS)
    base = Shape(65536, **MODELS.get(preset, {}))
    by_length = [dataclasses.replace(base, tokens=n, **changes) for n in lengths or [1 << n for n in range(13, 19)]]
    if preset not in ("default", "paper") or lengths is not None or changes:
        return by_length
    groups = [dataclasses.replace(base, kv_heads=base.heads // g) for g in (1, 2, 8)]
    return [*by_length, *groups, Shape(65536, 64, 4)]


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths from a list such as `8192,64K,1M`.

    >>> parse_lengths("8192,64K,1M")
    (8192, 65536, 1048576)
    """
    units = {"K": 1 << 10, "M": 1 << 20}
    lengths = []
    for part in text.replace(" ", "").upper().split(","):
        number, unit = (part[:-1], units[part[-1]]) if part[-1:] in units else (part, 1)
        if not number.isdigit() or int(number) < 1:
            raise bad("--lengths", "numbers of tokens such as 8192,64K,1M", repr(text))
        lengths.append(int(number) * unit)
    return tuple(lengths)
