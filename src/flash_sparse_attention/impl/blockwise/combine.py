"""The gated sum of the branches."""

import torch
from torch import Tensor

from ...precision import wide


def combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    """As `reference.combine`, without stacking the branches."""
    weights_THX = wide(gates).sigmoid()
    total = wide(out_compressed) * weights_THX[..., 0:1]
    total = torch.addcmul(total, wide(out_selected), weights_THX[..., 1:2])
    return torch.addcmul(total, wide(out_window), weights_THX[..., 2:3]).to(out_window.dtype)
