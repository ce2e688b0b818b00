"""`TrainConfig`: every option of a training run, validated when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from ..config import NSAConfig
from ..nn import LanguageModelConfig
from ..validation import bad, check_choice, check_positive
from .data import DEFAULT_SUFFIXES, VOCAB_SIZE

DeviceChoice = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32"]

# What a run was begun with stays: another value would be another model, or other text at a step.
FIXED_ON_RESUME = (
    *("model", "convert", "convert_layers", "nsa"),
    *("sequence_length", "batch_size", "seed", "eval_packs"),
)
# Options of runs with a model of transformers, with the values that say nothing.
_PRETRAINED_ONLY: dict[str, Any] = {"convert": False, "full_attention": None, "token_cache": None}
_CONVERT_ONLY: dict[str, Any] = {"convert_layers": None, "nsa": {}}


def small_model() -> LanguageModelConfig:
    """A model of four million parameters for bytes, which attends to at most a quarter of 4,096 tokens.

    A query sees at the most 8 blocks of 64 tokens, a window of 256 and 255 compressed tokens: 1,023 keys.
    """
    return LanguageModelConfig(
        vocab_size=VOCAB_SIZE,
        nsa=NSAConfig(block_size=64, num_selected_blocks=8, window_size=256, branch_kv="shared"),
    )


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults suit the processor of a laptop.

    Attributes:
        paths: files and folders of text; none for the sources of Python's standard library. See `data.read_corpus`.
        suffixes: what files in folders end with; `("*",)` for all.
        held_out_fraction: share of the files that is not trained on.
        sequence_length: tokens of a pack. A document longer than a pack is cut.
        batch_size: packs of a step; their gradients are summed one after the other, so it costs no memory. Processes
            share them, so it is a multiple of their number.
        seed: of the weights and of the order of the documents.
        model: sizes and attention of the model; not used with `pretrained`.
        pretrained: folder of a model of `transformers` and its tokenizer, to train that one; see `pretrained`. None for
            `model` and bytes.
        convert: whether its attention is made sparse first.
        convert_layers: layers that become sparse; None for all.
        nsa: fields of `NSAConfig` that differ from what the conversion takes by itself.
        full_attention: how layers that stay full compute it, by a name that `transformers` knows: `sdpa`, for one; None
            for its choice.
        text_field: with `pretrained`, where the text is in JSONL, Parquet and folders of `datasets`.
        token_cache: with `pretrained`, folder for tokenised text, which runs may share; None for one in the run.
        steps: optimizer steps in all.
        learning_rate: of AdamW at its highest.
        warmup_steps: steps in which the learning rate rises from 0, in a straight line.
        final_lr_fraction: share of `learning_rate` that is left at the last step, after falling along a cosine.
        weight_decay: of matrices; vectors (norms, biases) have none.
        beta1: AdamW's decay of the mean of the gradient.
        beta2: AdamW's decay of the mean of its square.
        epsilon: AdamW's.
        max_grad_norm: the gradient is scaled down to this norm where it is longer.
        eval_every: steps between measurements of the held-out loss; the end of the run has one in any case.
        eval_packs: packs of `sequence_length` tokens that the held-out loss is measured on.
        save_every: steps between checkpoints; the end of the run has one in any case.
        keep_last: checkpoints that are kept.
        device: `auto` takes CUDA where there is a device.
        impl: implementation of the operators of sparse attention, see `functional`.
        precision: of products: `bf16` by autocast, `fp32`, or `auto`: bf16 on a GPU that has it. Weights and the
            optimizer's state are float32 always.
        gradient_checkpointing: computes the forward pass again in the backward pass: less memory, more time.
        compile: compiles the layers with `torch.compile`; sparse attention stays as it is, see docs/training.md.
        tensorboard: writes the log for TensorBoard too.

    Raises:
        ValueError: on construction, for a value of a wrong type or out of range.

    Example:
        >>> TrainConfig(steps=10).replace(model={"hidden_size": 64, "nsa": {"window_size": 128}}).model.nsa.window_size
        128
    """

    paths: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    held_out_fraction: float = 0.05
    sequence_length: int = 4096
    batch_size: int = 1
    seed: int = 0
    model: LanguageModelConfig = field(default_factory=small_model)
    pretrained: str | None = None
    convert: bool = False
    convert_layers: tuple[int, ...] | None = None
    nsa: Mapping[str, Any] = field(default_factory=dict)
    full_attention: str | None = None
    text_field: str = "text"
    token_cache: str | None = None
    steps: int = 200
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    eval_every: int = 50
    eval_packs: int = 8
    save_every: int = 100
    keep_last: int = 2
    device: DeviceChoice = "auto"
    impl: str = "auto"
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("paths", "suffixes"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(isinstance(x, str) for x in values):
                raise bad(name, "a list of strings", repr(values))
            object.__setattr__(self, name, tuple(values))
        for name in ("sequence_length", "batch_size", "steps", "eval_every", "eval_packs", "save_every", "keep_last"):
            check_positive(name, getattr(self, name))
        for name in ("seed", "warmup_steps"):
            check_positive(name, getattr(self, name), minimum=0)
        for name in ("learning_rate", "epsilon", "max_grad_norm"):
            self._check_number(name, "more than 0", lambda x: x > 0)
        self._check_number("weight_decay", "at least 0", lambda x: x >= 0)
        self._check_number("held_out_fraction", "more than 0 and less than 1", lambda x: 0 < x < 1)
        self._check_number("final_lr_fraction", "from 0 to 1", lambda x: 0 <= x <= 1)
        for name in ("beta1", "beta2"):
            self._check_number(name, "at least 0 and less than 1", lambda x: 0 <= x < 1)
        check_choice("device", self.device, get_args(DeviceChoice))
        check_choice("precision", self.precision, get_args(Precision))
        if not isinstance(self.impl, str):
            raise bad("impl", "the name of an implementation", repr(self.impl))
        for name in ("convert", "gradient_checkpointing", "compile", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise bad(name, "True or False", repr(getattr(self, name)))
        if not isinstance(self.model, LanguageModelConfig):
            raise bad("model", "a LanguageModelConfig", type(self.model).__name__, "use TrainConfig.from_dict")
        if self.model.vocab_size != VOCAB_SIZE:
            raise bad("model.vocab_size", f"{VOCAB_SIZE}, the bytes and the end of text", self.model.vocab_size)
        self._check_pretrained()

    def _check_pretrained(self) -> None:
        for name in ("pretrained", "full_attention", "token_cache"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise bad(name, "a name, or None", repr(value))
        if not isinstance(self.text_field, str) or not self.text_field:
            raise bad("text_field", "a name", repr(self.text_field))
        layers = self.convert_layers
        if layers is not None:
            if not isinstance(layers, (tuple, list)) or not layers or len(set(layers)) < len(layers):
                raise bad("convert_layers", "a list of layers that differ, or None for all", repr(layers))
            for layer in layers:
                check_positive("convert_layers", layer, minimum=0)
            object.__setattr__(self, "convert_layers", tuple(layers))
        if not isinstance(self.nsa, Mapping):
            raise bad("nsa", "a table of fields of NSAConfig", repr(self.nsa))
        NSAConfig.from_dict(dict(self.nsa))
        object.__setattr__(self, "nsa", dict(self.nsa))
        if self.pretrained is not None and self.model != small_model():
            raise bad("model", "left out with pretrained", "other sizes", "the model in that folder has its own")
        for needed, names in (("pretrained", _PRETRAINED_ONLY), ("convert", _CONVERT_ONLY)):
            for name, nothing in names.items():
                if not getattr(self, needed) and getattr(self, name) != nothing:
                    raise bad(name, f"left out without {needed}", repr(getattr(self, name)), f"set {needed}")

    def _check_number(self, name: str, expected: str, holds: Any) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
            or not holds(value)
        ):
            raise bad(name, f"a number {expected}", repr(value))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these values and the defaults for the rest; unknown names are an error.

        `model`, and `nsa` in it, may be dictionaries, which need not be complete either.
        """
        return cls().replace(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, of types that JSON knows; `model` is a dictionary too."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return values | {
            "paths": list(self.paths),
            "suffixes": list(self.suffixes),
            "model": self.model.to_dict(),
            "nsa": dict(self.nsa),
            "convert_layers": None if self.convert_layers is None else list(self.convert_layers),
        }

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with `changes`, validated again; `model`, and `nsa` in it, may hold the changed fields only."""
        # A table of what differs has no fields of its own to compare with.
        whole = {name: changes[name] for name in ("nsa",) if name in changes}
        merged = _merged(self.to_dict(), {name: x for name, x in changes.items() if name not in whole}, "") | whole
        return type(self)(**{**merged, "model": LanguageModelConfig.from_dict(merged["model"])})

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 1: up in a straight line, then down along a cosine.

        >>> config = TrainConfig(steps=100, learning_rate=1.0, warmup_steps=10, final_lr_fraction=0.1)
        >>> [round(config.learning_rate_at(step), 3) for step in (1, 10, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        passed = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        fall = (1 + math.cos(math.pi * min(1.0, passed))) / 2
        return self.learning_rate * (self.final_lr_fraction + (1 - self.final_lr_fraction) * fall)

    def resolve_device(self) -> torch.device:
        """The device to train on.

        Raises:
            ValueError: if CUDA is asked for and there is none.
        """
        return resolve_device(self.device)

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype of products under autocast, or None for none."""
        bf16 = self.precision == "bf16"
        if self.precision == "auto" and device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else None


def resolve_device(choice: str) -> torch.device:
    """The device called `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: for another name, or if CUDA is asked for and there is none.
    """
    check_choice("device", choice, get_args(DeviceChoice))
    if choice == "cuda" and not torch.cuda.is_available():
        raise bad("device", "one that this machine has", "'cuda', which PyTorch does not find", "use 'cpu' or 'auto'")
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(choice)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two dictionaries of the same form: `model.num_layers (4, now 8)`."""
    found = []
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name} ({before!r}, now {after!r})")
    return found


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`base` with `changes`, tables merged."""
    unknown = sorted(set(changes) - set(base))
    if unknown:
        raise ValueError(
            f"{where or 'the configuration'} has no field {', '.join(map(repr, unknown))}: "
            f"known fields are {', '.join(sorted(base))}"
        )
    merged = dict(base)
    for name, value in changes.items():
        path = f"{where}.{name}".lstrip(".")
        if not isinstance(base[name], Mapping):
            merged[name] = value
            continue
        if hasattr(value, "to_dict"):
            value = value.to_dict()
        if not isinstance(value, Mapping):
            raise bad(path, "a table of fields", repr(value))
        merged[name] = _merged(base[name], value, path)
    return merged
