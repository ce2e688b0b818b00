"""What differs between the kinds of run: bytes and `LanguageModel`, or a tokenizer and a model of transformers.

A task knows the text and the model; the rest of training, from packs to checkpoints, is the same for both.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import LanguageModel
from .checkpoint import MODEL_FILE, load_weights
from .config import TrainConfig
from .data import END_OF_TEXT, Corpus, Pack, byte_unigram_entropy, read_corpus
from .flops import AttentionCost, ModelCost, unused_weights


class Task(abc.ABC):
    """A kind of run.

    Args:
        config: of the run.

    Attributes:
        unit: what a token is.
    """

    unit = "token"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def read_corpus(self, output: Path, writes: bool, tokenised: Callable[[int, int], None]) -> Corpus:
        """The text.

        Args:
            output: directory of the run.
            writes: whether this process may write what it makes of the text; another one waits for it.
            tokenised: hears of documents and tokens so far.
        """

    @abc.abstractmethod
    def build(self, checkpoint: Path | None, max_token: int) -> nn.Module:
        """The model on the CPU in float32, with the weights of a checkpoint or those to start with.

        Args:
            checkpoint: to continue from, or None.
            max_token: the largest token of the text, which the model must know.
        """

    @abc.abstractmethod
    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers, which are compiled and sharded one by one."""

    @abc.abstractmethod
    def losses(self, model: nn.Module, pack: Pack) -> Tensor:
        """-log p of each target (nats), float32 `[N]`."""

    @abc.abstractmethod
    def cost(self, model: nn.Module) -> ModelCost:
        """What a step computes."""

    def loss_sum(self, model: nn.Module, pack: Pack) -> Tensor:
        """The sum of `losses`."""
        return self.losses(model, pack).sum()

    def saved(self, model: nn.Module) -> nn.Module:
        """The part of the model that checkpoints hold."""
        return model

    def model_config(self, model: nn.Module) -> dict[str, Any]:
        """The sizes of the model, of types that JSON knows."""
        return self.config.model.to_dict()

    def write_model(self, model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
        """Writes the weights, whole and on the CPU, and what else it takes to load the model."""
        safetensors.torch.save_file(weights, folder / MODEL_FILE, metadata={"format": "pt"})

    def num_bytes(self, targets: Tensor) -> int | None:
        """Bytes of the text that these targets are; None where that is not known."""
        return None

    def unigram_entropy(self, targets: Tensor) -> float | None:
        """Nats per token of the best model without context; None where these are too few to tell."""
        return None


class ByteTask(Task):
    """Bytes, and a `LanguageModel` that begins with random weights."""

    unit = "byte"

    def read_corpus(self, output: Path, writes: bool, tokenised: Callable[[int, int], None]) -> Corpus:
        config = self.config
        return read_corpus(config.paths, suffixes=config.suffixes, held_out_fraction=config.held_out_fraction)

    def build(self, checkpoint: Path | None, max_token: int) -> LanguageModel:
        # On the CPU, so that a seed gives one start on every device; and the caller's generator is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = LanguageModel(self.config.model, impl=self.config.impl)
        model.gradient_checkpointing = self.config.gradient_checkpointing
        if checkpoint is not None:
            load_weights(checkpoint, model)
        return model

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, LanguageModel)
        return list(model.layers)

    def losses(self, model: nn.Module, pack: Pack) -> Tensor:
        return F.cross_entropy(model(pack.tokens, pack.layout).float(), pack.targets, reduction="none")

    def loss_sum(self, model: nn.Module, pack: Pack) -> Tensor:
        return F.cross_entropy(model(pack.tokens, pack.layout).float(), pack.targets, reduction="sum")

    def cost(self, model: nn.Module) -> ModelCost:
        assert isinstance(model, LanguageModel)
        sizes = model.config
        nsa = sizes.nsa if sizes.attention == "nsa" else None
        lookup = 0 if sizes.tie_embeddings else model.embed_tokens.weight.numel()
        layer = AttentionCost(sizes.num_heads * sizes.head_dim, nsa)
        weights = model.num_parameters() - lookup - unused_weights(model)
        return ModelCost(weights, (layer,) * sizes.num_layers)

    def num_bytes(self, targets: Tensor) -> int | None:
        return int((targets != END_OF_TEXT).sum())

    def unigram_entropy(self, targets: Tensor) -> float | None:
        return byte_unigram_entropy(targets)
