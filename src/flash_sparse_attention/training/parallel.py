"""Several processes that train one model: PyTorch's `fully_shard` (FSDP2), started by `torchrun`.

Every process has a share of all weights, gradients and optimizer state, and its own packs of each step. What is said
here of a group of processes holds for one as well, which then talks to nobody.
"""

from __future__ import annotations

import atexit
import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..validation import bad

# The others wait while one writes a checkpoint.
_TIMEOUT = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Group:
    """The processes of a run, and which of them this is.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        local_rank: its number on its machine, and that of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Group:
        """The group that `torchrun` has started; a single process without it.

        Raises:
            ValueError: if the variables of the environment are not those of `torchrun`.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name, "") for name in names]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            got = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
            raise bad("the environment", "that of torchrun", got, "start with torchrun, or unset WORLD_SIZE")
        return cls(*map(int, values))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process, of the type of `device`."""
        if device.type != "cuda" or self.size == 1:
            return device
        if self.local_rank >= torch.cuda.device_count():
            got = f"{self.local_rank + 1} on a machine with {torch.cuda.device_count()}"
            raise bad("processes", "at most as many as there are GPUs", got, "lower --nproc-per-node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device) -> None:
        """Lets the processes find each other, where that is still to be done.

        They stay connected until they end: to meet a second time, at the place that torchrun has named, they would find
        there what they left the first time.
        """
        if self.size == 1 or dist.is_initialized():
            return
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=_TIMEOUT,
            device_id=torch.device("cuda", self.local_rank) if cuda else None,
        )
        atexit.register(_disconnect)

    def share(self, items: Sequence[int]) -> Sequence[int]:
        """The part of this process of what is dealt to all in turn."""
        return items[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, value: int, device: torch.device) -> int:
        """The largest of the numbers of all processes. Waits for the device."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def shard(
        self, model: nn.Module, layers: Iterable[nn.Module], device: torch.device, dtype: torch.dtype | None
    ) -> None:
        """Spreads weights over the processes: those of each layer together, and those of the rest.

        Args:
            model: to be sharded, on the CPU or on `device`.
            layers: of the model.
            device: of this process.
            dtype: of weights and activations in computation; None for that of the weights. Gradients are summed in
                float32.
        """
        if self.size == 1:
            return
        options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (self.size,))}
        if dtype is not None:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def whole(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """All of a tensor that may be spread over processes, on the CPU if it is; None if it is not to be kept.

    All processes must call this for the same tensors in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor if keep else None
    full = tensor.full_tensor()
    return full.cpu() if keep else None


def spread_as(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, spread over processes as `like` is."""
    if not isinstance(like, DTensor):
        return full
    # None: each process takes its part of what it has, and nothing is sent.
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """A tensor that is no DTensor: the value that all processes have in common."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
