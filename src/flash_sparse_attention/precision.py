"""In which dtype things are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once, as torch.compile cannot trace the question in every version.
_AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: scores, softmax, lse and all sums."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off on the device of `x`; it would round the matrix products inside an operator."""
    if x.device.type in _AUTOCAST_DEVICES:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
