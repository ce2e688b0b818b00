"""The gated sum of the branches."""

from torch import Tensor

from ...precision import wide


def combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    """As `reference.combine`, without stacking the branches."""
    weights_THX = wide(gates).sigmoid()
    # In place: the product is fresh, and no gradient needs its first value.
    total = wide(out_compressed) * weights_THX[..., 0:1]
    total.addcmul_(wide(out_selected), weights_THX[..., 1:2])
    total.addcmul_(wide(out_window), weights_THX[..., 2:3])
    return total.to(out_window.dtype)
