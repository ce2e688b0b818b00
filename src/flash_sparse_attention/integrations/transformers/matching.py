"""Warm-up of converted models: every sparse layer learns to give what full attention gave in its place.

The hidden states that flow through the network are those of the original model, since in this mode a layer hands on the
output of full attention; beside it, the layer computes its sparse output for the same hidden states, and the distance
of the two is its loss. So all layers learn at once and independently of each other, there is no second model, and
nothing is propagated through the network.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...validation import bad, check_choice, check_positive
from .attention import NSAAttention
from .inputs import SparseInputs

Trained = Literal["new", "attention"]


class WarmUpRecord(NamedTuple):
    """A step of `warm_up`.

    Attributes:
        step: counted from 1.
        loss: mean over the sparse layers of |sparse - full|^2 / |full|^2 of their outputs, before the step.
        layer_losses: the same of each of them.
    """

    step: int
    loss: float
    layer_losses: tuple[float, ...]


class Matching:
    """What `matching` yields: calls run the model, and return how far its sparse layers are from full attention."""

    def __init__(self, model: nn.Module, layers: dict[str, NSAAttention], trained: Trained) -> None:
        self.model, self.layers = model, layers
        # Layers do not depend on each other: the gradient of one can be taken before the next is computed.
        self.takes_gradients = False
        self.new_parameters: list[nn.Parameter] = []
        self.attention_parameters: list[nn.Parameter] = []
        self._losses: dict[int, Tensor] = {}
        # The projections as they were, where they are trained too.
        self._teachers: dict[int, dict[str, nn.Module]] = {}
        for layer in layers.values():
            new = (layer.branch_gate_proj, layer.compressor_k, layer.compressor_v)
            self.new_parameters += [p for module in new for p in module.parameters()]
            if trained == "attention":
                named = {name: module for name, module in layer.named_children() if module not in new}
                self._teachers[id(layer)] = copy.deepcopy(named)
                self.attention_parameters += [p for module in named.values() for p in module.parameters()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self.new_parameters + self.attention_parameters

    def __call__(self, **inputs: Any) -> Tensor:
        """The relative squared error of each sparse layer, `[layers]`, for these inputs of the model."""
        self._losses.clear()
        decoder = getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)
        with torch.no_grad():
            decoder(**inputs, use_cache=False)
        return torch.stack([self._losses[id(layer)] for layer in self.layers.values()])

    def compare(self, layer: NSAAttention, hidden: Tensor, inputs: SparseInputs) -> Tensor:
        """Full attention's output for packed tokens `[N, hidden_size]`; notes how far sparse attention's is."""
        with _replaced(layer, self._teachers.get(id(layer), {})):
            full = layer.full_attention(hidden, inputs)
        with torch.enable_grad():
            sparse = layer._forward(hidden, inputs.layout, inputs.rotary, None)
            scale = full.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            loss = (sparse.float() - full.float()).square().sum() / scale
            if self.takes_gradients:
                (loss / len(self.layers)).backward()
                loss = loss.detach()
        self._losses[id(layer)] = loss
        return full


@contextlib.contextmanager
def matching(model: nn.Module, trained: Trained = "new") -> Iterator[Matching]:
    """While active, the model computes full attention, and its sparse layers are compared with it.

    Args:
        model: with sparse layers.
        trained: what is to be trained: `new`, what only sparse attention has (gates and compressors); or `attention`,
            all of the sparse layers. The latter keeps copies of their projections, to compare with.

    Yields:
        A `Matching`: call it with inputs of the model; its `parameters` are what the losses depend on. No others take
        gradients meanwhile.

    Raises:
        ValueError: for a model without sparse layers, or one that is sharded.

    Example:
        >>> with matching(model) as match:  # doctest: +SKIP
        ...     optimizer = torch.optim.AdamW(match.parameters, lr=1e-2)
        ...     loss = match(input_ids=tokens).mean()
        ...     loss.backward()
    """
    check_choice("trained", trained, ("new", "attention"))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NSAAttention)}
    if not layers:
        raise bad("model", "one with sparse layers", type(model).__name__, "convert makes one")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        # Weights that were gathered for a layer are gone when its loss is differentiated.
        raise bad("model", "whole on one device", "one that is sharded", "warm it up before it is sharded")
    match = Matching(model, layers, trained)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in match.parameters:
        parameter.requires_grad_(True)
    for layer in layers.values():
        layer._matching = match
    try:
        yield match
    finally:
        for layer in layers.values():
            layer._matching = None
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def warm_up(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    new_steps: int | None = None,
    learning_rate: float = 1e-2,
    attention_learning_rate: float = 1e-4,
    max_grad_norm: float = 1.0,
    on_step: Callable[[WarmUpRecord], None] | None = None,
) -> list[WarmUpRecord]:
    """Trains a converted model's sparse layers to give what full attention gives.

    First gates and compressors alone, then the projections of these layers with them. The learning rate falls to zero
    in a straight line over all steps. AdamW without weight decay, on float32 copies of what has less. Gradients are
    taken layer by layer, so no more than one layer's activations are kept.

    Args:
        model: with sparse layers; its other parameters stay as they are.
        batches: inputs of the model, taken anew from the beginning where they end.
        steps: optimizer steps.
        new_steps: of them, those that train gates and compressors alone; all of them by default.
        learning_rate: of gates and compressors at the start.
        attention_learning_rate: of the projections and norms at the start.
        max_grad_norm: gradients are scaled down to this norm.
        on_step: hears of each step.

    Returns:
        A record of each step.

    Raises:
        ValueError: for a model without sparse layers, no batches, or numbers out of range.
        FloatingPointError: if a loss is not finite; the parameters are those of the step before.
    """
    check_positive("steps", steps)
    new_steps = steps if new_steps is None else min(check_positive("new_steps", new_steps, 0), steps)
    source, records = _forever(batches), []
    training = model.training
    model.eval()
    # Gradients of something else would be taken for the first step's.
    model.zero_grad()
    try:
        stages: list[tuple[Trained, range]] = [("new", range(new_steps)), ("attention", range(new_steps, steps))]
        for trained, numbers in stages:
            if not numbers:
                continue
            with matching(model, trained) as match:
                match.takes_gradients = True
                masters = _Masters(match.parameters)
                groups: list[dict[str, Any]] = [
                    {"params": masters.of(match.new_parameters), "initial_lr": learning_rate}
                ]
                if match.attention_parameters:
                    attention = masters.of(match.attention_parameters)
                    groups.append({"params": attention, "initial_lr": attention_learning_rate})
                optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
                for number in numbers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * (1 - number / steps)
                    losses = match(**next(source))
                    norm = nn.utils.clip_grad_norm_(masters.with_gradients(), max_grad_norm)
                    record = WarmUpRecord(number + 1, losses.mean().item(), tuple(losses.tolist()))
                    if not (math.isfinite(record.loss) and norm.isfinite()):
                        raise FloatingPointError(
                            f"loss and gradient must be finite, got {record.loss} and {norm.item()} at step "
                            f"{number + 1}: lower learning_rate, which is {learning_rate}"
                        )
                    optimizer.step()
                    masters.write()
                    # Within autocast, weights that were cast would be taken for those of the next step.
                    torch.clear_autocast_cache()
                    records.append(record)
                    if on_step is not None:
                        on_step(record)
    finally:
        model.train(training)
        model.zero_grad()
    return records


class _Masters:
    """Parameters in float32, where steps as small as those of a warm-up do not round to nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._pairs = {
            id(own): (own, own if own.dtype in (torch.float32, torch.float64) else nn.Parameter(own.detach().float()))
            for own in parameters
        }

    def of(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """Those of these parameters."""
        return [self._pairs[id(own)][1] for own in parameters]

    def with_gradients(self) -> list[nn.Parameter]:
        """All of them, with the gradients of the parameters; each is handed over once."""
        for own, master in self._pairs.values():
            if master is not own:
                master.grad = None if own.grad is None else own.grad.float()
                own.grad = None
        return [master for _, master in self._pairs.values()]

    @torch.no_grad()
    def write(self) -> None:
        """Gives the parameters their new values, and takes the gradients away."""
        for own, master in self._pairs.values():
            if master is not own:
                own.copy_(master)
            master.grad = None


@contextlib.contextmanager
def _replaced(layer: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """While active, the layer has these modules in the place of its own."""
    own = {name: getattr(layer, name) for name in others}
    for name, module in others.items():
        setattr(layer, name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            setattr(layer, name, module)


def _forever(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches, and again from the beginning; an iterator can only be taken once."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise bad("batches", "as many as steps, or a list of at least one", "an end")
