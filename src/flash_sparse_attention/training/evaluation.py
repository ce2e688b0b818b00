"""The loss on held-out text, over all of it and by how much a token can look back on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .config import TrainConfig
from .data import Pack
from .parallel import Group
from .tasks import ByteTask, Task

# [0, 512), [512, 1024), [1024, 2048), and on in powers of two; more than any pack holds.
_POSITIONS = (0, *(512 << i for i in range(32)))
# JSON has no infinity, which a model that knows nothing might have as perplexity.
_MOST_NATS = 700.0


class Evaluation(NamedTuple):
    """Loss on held-out text.

    Attributes:
        loss: mean over all targets, nats per token.
        bits_per_byte: the same sum in bits, over the targets that are bytes; None for tokens of a tokenizer.
        perplexity_by_position: exp of the mean loss of the targets with at least this many tokens before them in their
            sequence, and fewer than the next key says: 0, 512, 1024 and on in powers of two, as far as there are any.
    """

    loss: float
    bits_per_byte: float | None
    perplexity_by_position: dict[int, float]


def evaluate(model: nn.Module, packs: Sequence[Pack], *, autocast_dtype: torch.dtype | None = None) -> Evaluation:
    """The loss of a language model of bytes on `packs`, which are moved to its device. Leaves it in its mode.

    Args:
        model: (tokens, layout) -> logits.
        packs: see `data.held_out_packs`.
        autocast_dtype: of products; None for the dtype of the model.
    """
    return evaluate_packs(ByteTask(TrainConfig()), model, packs, autocast_dtype, Group())


def evaluate_packs(
    task: Task, model: nn.Module, packs: Sequence[Pack], autocast_dtype: torch.dtype | None, group: Group
) -> Evaluation:
    """The loss of the model of a task; all processes of the group must call this with the same packs."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = torch.tensor(_POSITIONS)
    nats, counts = (torch.zeros(len(_POSITIONS), dtype=torch.float64, device=device) for _ in range(2))
    with torch.no_grad():
        # A process without a pack of its own takes part in the others' all the same.
        for first in range(0, len(packs), group.size):
            mine = first + group.rank
            pack = packs[mine if mine < len(packs) else first]
            moved = pack.to(device)
            with autocast(device, autocast_dtype):
                losses = task.losses(model, moved).double().cpu()
            if mine < len(packs):
                bucket = torch.bucketize(pack.layout.positions(), starts, right=True) - 1
                nats += torch.bincount(bucket, losses, len(starts)).to(device)
                counts += torch.bincount(bucket, minlength=len(starts)).to(device)
    model.train(was_training)
    nats, counts = group.sum(nats).cpu(), group.sum(counts).cpu()
    whole, bytes_ = nats.sum().item(), task.num_bytes(torch.cat([pack.targets for pack in packs]))
    return Evaluation(
        loss=whole / counts.sum().item(),
        bits_per_byte=None if bytes_ is None else whole / math.log(2) / max(1, bytes_),
        perplexity_by_position={
            start: math.exp(min(part / count, _MOST_NATS))
            for start, part, count in zip(_POSITIONS, nats.tolist(), counts.tolist(), strict=True)
            if count
        },
    )


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Products in this dtype; None for the dtype of the model."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
