"""The inputs on which implementations are judged, and two grids of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..config import NSAConfig
from ..impl import OPERATORS
from ..types import SequenceLayout
from ..validation import FLOAT_DTYPES, bad, check_choice, check_heads

Flavour = Literal[
    "plain",
    "large queries",
    "loud first token",
    "quiet first token",
    "hostile indices",
    "fused projection",
    "independent branches",
    "ties",
]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

_ATTENTION = ("interval_attention", "select_blocks", "selected_attention")
# What a flavour changes; the other operators would only repeat the plain case.
OPERATORS_OF_FLAVOUR: dict[Flavour, tuple[str, ...]] = {
    "plain": (*OPERATORS, "nsa_attention"),
    "large queries": (*_ATTENTION, "nsa_attention"),
    "loud first token": _ATTENTION,
    "quiet first token": _ATTENTION,
    "hostile indices": ("selected_attention",),
    "fused projection": ("compress", *_ATTENTION, "nsa_attention"),
    "independent branches": ("nsa_attention",),
    "ties": ("select_blocks",),
}


def _sizes(windows_and_blocks: tuple[int, int, int], selected: tuple[int, int, int], window_size: int) -> NSAConfig:
    """(l, d, l'), (T, of them the first, of them the newest), w."""
    kernel_size, kernel_stride, block_size = windows_and_blocks
    num_selected_blocks, num_init_blocks, num_local_blocks = selected
    return NSAConfig(
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        num_selected_blocks=num_selected_blocks,
        num_init_blocks=num_init_blocks,
        num_local_blocks=num_local_blocks,
        window_size=window_size,
    )


# Few blocks are kept of sequences of a few hundred tokens, so that there is something to reject; `_PAPER` keeps more
# than there are.
_DEFAULT = _sizes((32, 16, 64), (4, 1, 2), 48)
_COINCIDING = _sizes((16, 16, 16), (6, 2, 1), 20)
_POOLING = _sizes((64, 64, 64), (3, 1, 1), 64)
_FINE = _sizes((32, 8, 32), (5, 0, 0), 100)
_PAPER = _sizes((32, 16, 64), (16, 1, 2), 512)


@dataclass(frozen=True)
class Case:
    """Inputs on which implementations are judged. The same case makes the same inputs on every device.

    Attributes:
        lengths: tokens of each sequence of the pack that have queries; 0 is allowed.
        num_heads: Hq.
        num_kv_heads: Hk, divides Hq.
        head_dim: Dk.
        head_dim_v: Dv.
        config: sizes of windows, blocks and selection; what it says of learned parts does not matter.
        dtype: of all inputs.
        flavour: `plain` (standard normal), or one thing that is out of the ordinary:
            `large queries`: 12 times larger, so that few keys take all of the probability;
            `loud first token`, `quiet first token`: the first key of a sequence scores about 100 nats above, or below;
            `hostile indices`: entries negative, huge, in the future and repeated (`selected_attention`);
            `fused projection`: tensors are slices of wider ones, so not contiguous;
            `independent branches`: every branch has keys and values of its own (`nsa_attention`);
            `ties`: importances are small integers, so that ties abound and are exact (`select_blocks`).
        seed: of the random numbers.
        past: tokens of each sequence before those, which have keys only; none by default.

    Raises:
        ValueError: for heads that do not divide, an unknown dtype or flavour, or a past of other sequences.

    Example:
        >>> print(Case((130, 0, 1), num_heads=10, num_kv_heads=2, dtype=torch.bfloat16))
        lengths 130,0,1 | heads 10/2 | dims 64/64 | l=32 d=16 l'=64 T=4 w=48 | bfloat16 | plain
    """

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 64
    config: NSAConfig = _DEFAULT
    dtype: torch.dtype = torch.float32
    flavour: Flavour = "plain"
    seed: int = 0
    past: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_heads(self.num_heads, self.num_kv_heads)
        check_choice("flavour", self.flavour, FLAVOURS)
        check_choice("dtype", dtype_name(self.dtype), map(dtype_name, FLOAT_DTYPES))
        if self.past and len(self.past) != len(self.lengths):
            raise bad("past", f"of the {len(self.lengths)} sequences of lengths", len(self.past))

    def __str__(self) -> str:
        config = self.config
        windows = f"l={config.kernel_size} d={config.kernel_stride} l'={config.block_size}"
        parts = (
            f"lengths {','.join(map(str, self.lengths))}",
            f"heads {self.num_heads}/{self.num_kv_heads}",
            f"dims {self.head_dim}/{self.head_dim_v}",
            f"{windows} T={config.num_selected_blocks} w={config.window_size}",
            dtype_name(self.dtype),
            self.flavour,
            *([f"past {','.join(map(str, self.past))}"] if self.past else []),
        )
        return " | ".join(parts)

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators that the flavour concerns."""
        return OPERATORS_OF_FLAVOUR[self.flavour]

    def layout(self, device: torch.device | str = "cpu") -> SequenceLayout:
        """The layout of the queries, which knows that of the keys."""
        layout = SequenceLayout.from_lengths(self.lengths, device)
        if not self.past:
            return layout
        keys = [past + length for past, length in zip(self.past, self.lengths, strict=True)]
        return layout.after(SequenceLayout.from_lengths(keys, device))


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


# Seconds on two cores of a CPU.
QUICK: tuple[Case, ...] = (
    Case((1,), config=_COINCIDING, dtype=torch.bfloat16),
    Case((257, 0, 1, 130), dtype=torch.bfloat16),
    Case((300,), 5, 1, 80, 80, config=_FINE, dtype=torch.float16),
    Case((199, 65), 2, 2, 96, 96, config=_POOLING),
    Case((64, 97), 14, 2, 192, 128, config=_COINCIDING, dtype=torch.bfloat16),
    Case((150,), 4, 1, config=_PAPER, dtype=torch.float64),
    Case((310, 41), config=_COINCIDING, dtype=torch.bfloat16, flavour="ties"),
    Case((1, 130, 0, 61, 40), dtype=torch.bfloat16, past=(200, 71, 33, 0, 300)),
    *(
        Case((310, 41), dtype=torch.bfloat16, flavour=flavour)
        for flavour in FLAVOURS
        if flavour not in ("plain", "ties")
    ),
)

# A minute or two.
FULL: tuple[Case, ...] = (
    *QUICK,
    # Sequences of the lengths at which something begins, each many times, since a budget needs more than a few elements
    # to be one: with two visible keys and one sequence, plain PyTorch is as likely lucky as not.
    *(
        Case((length,) * 12, config=config, dtype=dtype, seed=1)
        for length in (1, 2, 16, 31, 32, 33, 64, 65)
        for config, dtype in ((_DEFAULT, torch.bfloat16), (_COINCIDING, torch.float32))
    ),
    # Every size of group, every pair of dimensions and every geometry in every dtype.
    *(
        Case((130, 0, 1, 61), kv_heads * group, kv_heads, dim, dim_v, config, dtype, seed=2)
        for dtype in FLOAT_DTYPES
        for kv_heads, group, dim, dim_v, config in (
            (2, 1, 64, 64, _FINE),
            (1, 2, 80, 80, _COINCIDING),
            (1, 4, 96, 96, _DEFAULT),
            (1, 5, 128, 128, _POOLING),
            (1, 7, 192, 128, _DEFAULT),
            (1, 16, 64, 128, _PAPER),
        )
    ),
    *(
        Case((333,), config=config, dtype=dtype, flavour=flavour, seed=3)
        for flavour in FLAVOURS
        for config, dtype in (
            (_COINCIDING, torch.float32),
            (_FINE, torch.float16),
            (_POOLING, torch.bfloat16),
            (_DEFAULT, torch.float64),
        )
    ),
    Case((1100, 37), 4, 1, 128, 128, config=_PAPER, dtype=torch.bfloat16, seed=4),
)
