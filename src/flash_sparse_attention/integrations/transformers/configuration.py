"""Configurations of transformers' models with sparse attention: those of the base model and four fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...config import NSAConfig
from ...nn.attention import BRANCHES
from ...nn.attention import check_options as check_layer_options
from ...validation import bad

# Weights of the compressed, the selected and the window branch that a converted model starts with. They sum to 1, as
# the last two are full attention where they cover everything. Measured on a trained model, see docs/transformers.md.
START_OF_GATES = (0.02, 0.49, 0.49)
# Frequencies that depend on the length of the text would rotate keys of a cache in two ways.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def conversion_config(**changes: Any) -> NSAConfig:
    """The `NSAConfig` that pretrained models are converted to: shared keys and values, and means of windows.

    Compression is `weighted`, which starts as the mean and can be trained.

    Args:
        **changes: fields of `NSAConfig` that differ.

    Raises:
        ValueError: for fields that do not exist or do not fit each other.

    Example:
        >>> conversion_config(window_size=1024).compression
        'weighted'
    """
    start = {"compression": "weighted", "position_embedding": "none", "branch_kv": "shared", "gate": "per_head"}
    return NSAConfig.from_dict(start | changes)


@dataclass(kw_only=True)
class SparseFields:
    """What the configuration of a model with sparse attention has beside that of its base model.

    Attributes:
        nsa: fields of `NSAConfig`, those of `conversion_config()` by default.
        nsa_layers: numbers of the layers with sparse attention; None for all.
        nsa_gates: weights that the branches start with, compressed, selected, window.
        nsa_options: of the layers: `impl`, `loop_order` and `recompute` of `nn.NativeSparseAttention`.

    Raises:
        ValueError: on construction, for values that the layers do not take.
    """

    if TYPE_CHECKING:  # a field of the base model's configuration, and not of this class
        num_hidden_layers: int

    nsa: dict[str, Any] | None = None
    nsa_layers: list[int] | None = None
    nsa_gates: list[float] = field(default_factory=lambda: list(START_OF_GATES))
    nsa_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.nsa = (conversion_config() if self.nsa is None else NSAConfig.from_dict(self.nsa)).to_dict()
        count = self.num_hidden_layers
        if self.nsa_layers is not None:
            self.nsa_layers = check_layers(self.nsa_layers, count)
        if len(self.nsa_gates) != len(BRANCHES) or not all(0 < x < 1 for x in self.nsa_gates):
            raise bad("nsa_gates", f"a number between 0 and 1 for each of {', '.join(BRANCHES)}", self.nsa_gates)
        check_options(**self.nsa_options)
        rope = getattr(self, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in _ROPE_TYPES:
            raise bad("rope_type", f"one of {', '.join(_ROPE_TYPES)}", repr(rope["rope_type"]))

    @property
    def nsa_config(self) -> NSAConfig:
        """`nsa` as the layers take it."""
        return NSAConfig.from_dict(self.nsa or {})

    @property
    def sparse_layers(self) -> list[int]:
        """Numbers of the layers with sparse attention."""
        count = self.num_hidden_layers
        return list(range(count)) if self.nsa_layers is None else list(self.nsa_layers)


def check_options(impl: str = "auto", loop_order: str = "auto", recompute: Sequence[str] = (), **others: Any) -> None:
    """The options of a layer exist.

    Raises:
        ValueError: if they do not.
    """
    if others:
        raise bad("nsa_options", "of impl, loop_order and recompute", ", ".join(sorted(others)))
    check_layer_options(impl, loop_order, [recompute] if isinstance(recompute, str) else recompute)


def check_layers(layers: Sequence[int], count: int) -> list[int]:
    """These layers of a model of `count`, in ascending order.

    Raises:
        ValueError: for numbers of layers that do not exist, the same twice, or none.
    """
    numbers = list(layers)
    good = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < count for x in numbers)
    if not numbers or not good or len(set(numbers)) != len(numbers):
        raise bad("layers", f"different numbers from 0 to {count - 1}, at least one", numbers)
    return sorted(numbers)
