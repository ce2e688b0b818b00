"""`NSAConfig`: every hyper-parameter of Native Sparse Attention, validated when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

CompressionKind = Literal["mean", "linear", "mlp", "weighted"]
PositionEmbedding = Literal["none", "k", "kv"]
BranchKV = Literal["shared", "independent"]
GateKind = Literal["per_head", "per_token"]
CompressedRope = Literal["after", "before"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "compression": get_args(CompressionKind),
    "position_embedding": get_args(PositionEmbedding),
    "branch_kv": get_args(BranchKV),
    "gate": get_args(GateKind),
    "rope": get_args(CompressedRope),
}

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "compression": "mlp",
        "position_embedding": "kv",
        "branch_kv": "independent",
        "gate": "per_head",
        "rope": "after",
    },
    "fsa": {
        "compression": "linear",
        "position_embedding": "k",
        "branch_kv": "shared",
        "gate": "per_token",
        "rope": "after",
    },
    "fla": {
        "kernel_size": 64,
        "kernel_stride": 64,
        "block_size": 64,
        "compression": "mean",
        "position_embedding": "none",
        "branch_kv": "shared",
        "gate": "per_head",
        "rope": "before",
    },
}


@dataclass(frozen=True)
class NSAConfig:
    """Hyper-parameters of Native Sparse Attention (NSA, arXiv 2502.11089).

    The defaults are the paper's. All sizes are counted in tokens, all `num_*` in blocks.

    Attributes:
        kernel_size: l, tokens that one compressed token summarises; a multiple of `kernel_stride`.
        kernel_stride: d, tokens between the starts of neighbouring compression windows.
        block_size: l', tokens of a selection block; a multiple of `kernel_stride`.
        num_selected_blocks: T, blocks that a query keeps, the forced ones included.
        num_init_blocks: first blocks of the sequence that every query keeps.
        num_local_blocks: newest blocks that every query keeps, its own included.
        window_size: w, tokens of the sliding window, the query's own included.
        compression: how a window becomes one token: `mean`, `linear` (one matrix a head), `mlp` (two layers a
            head) or `weighted` (a softmax weight for each position of the window).
        position_embedding: learned embedding of the position in the window, added before compression: to
            nothing (`none`), to keys (`k`) or to keys and values (`kv`).
        branch_kv: one key/value pair for the three branches (`shared`) or one for each (`independent`).
        gate: one gate per branch and head (`per_head`) or per branch only (`per_token`).
        rope: `after`: keys are compressed first and a compressed key is rotated as if it stood at the start of
            its window; `before`: rotated keys are compressed.

    Raises:
        ValueError: on construction, for any value or combination that the algorithm does not define.

    Example:
        >>> NSAConfig(block_size=32, num_selected_blocks=8).block_size
        32
        >>> NSAConfig.preset("fsa", window_size=256).compression
        'linear'
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compression: CompressionKind = "mlp"
    position_embedding: PositionEmbedding = "kv"
    branch_kv: BranchKV = "independent"
    gate: GateKind = "per_head"
    rope: CompressedRope = "after"

    def __post_init__(self) -> None:
        for name in ("kernel_size", "kernel_stride", "block_size", "num_selected_blocks", "window_size"):
            _check_int(name, getattr(self, name), minimum=1)
        for name in ("num_init_blocks", "num_local_blocks"):
            _check_int(name, getattr(self, name), minimum=0)
        for name in ("kernel_size", "block_size"):
            if getattr(self, name) % self.kernel_stride:
                raise ValueError(
                    f"{name} must be a multiple of kernel_stride={self.kernel_stride}, got {getattr(self, name)}: "
                    f"windows and blocks are both made of whole strides"
                )
        forced = self.num_init_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            raise ValueError(
                f"num_selected_blocks must be at least num_init_blocks + num_local_blocks = {forced}, "
                f"got {self.num_selected_blocks}: raise it, or force fewer blocks"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NSAConfig:
        """The configuration called `paper`, `fsa` or `fla`, with `overrides` put in.

        `paper` follows the NSA paper; `fsa` the published FSA module (arXiv 2508.18224); `fla` the pooling variant
        of flash-linear-attention, where windows and blocks coincide.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls.from_dict({**_PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NSAConfig:
        """The configuration with these values; unknown names are an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"NSAConfig has no field {', '.join(map(repr, unknown))}: known fields are {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, of types that JSON and TOML know."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> NSAConfig:
        """A copy with `changes`, validated again."""
        return self.from_dict({**self.to_dict(), **changes})


def config_or_default(config: NSAConfig | None) -> NSAConfig:
    """`config`; for None the default, `NSAConfig()`.

    Raises:
        ValueError: if it is something else, such as the name of a preset.
    """
    if config is None:
        return NSAConfig()
    if not isinstance(config, NSAConfig):
        raise ValueError(
            f"config must be an NSAConfig or None, got {type(config).__name__}: NSAConfig.preset makes one of a name, "
            "NSAConfig.from_dict of a dictionary"
        )
    return config


def preset_names() -> tuple[str, ...]:
    """Names that `NSAConfig.preset` takes."""
    return tuple(_PRESETS)


def compression_kinds() -> tuple[str, ...]:
    """Values of `NSAConfig.compression`."""
    return _CHOICES["compression"]


def _check_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
