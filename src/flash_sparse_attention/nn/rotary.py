"""Rotary position embedding in Llama's convention: channel c turns together with channel c + D / 2.

The pair (x[c], x[c + D / 2]) is rotated by the angle position * theta ** (-2 c / D). Angles come from the positions of
the call, so there is no table, nothing in a state dict, and no longest length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import FLOAT_DTYPES, bad, check_same, check_tensor

POSITION_DTYPES = (torch.int64, torch.int32)


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each token and pair of channels, both `[N, D / 2]`, float32 or float64."""

    cos: Tensor
    sin: Tensor

    def at(self, tokens: Tensor) -> Rotation:
        """The rotations of these tokens (indices, int64 `[M]`)."""
        return Rotation(self.cos[tokens], self.sin[tokens])


class Rotary:
    """The rotations of the tokens of a forward pass, and of other positions that it needs, each computed once.

    Args:
        tokens: of its tokens.
        compute: positions, integers `[M]` -> their rotation.
    """

    def __init__(self, tokens: Rotation, compute: Callable[[Tensor], Rotation]) -> None:
        self.tokens, self._compute = tokens, compute
        self._others: list[tuple[Tensor, Rotation]] = []

    def at(self, positions: Tensor) -> Rotation:
        """The rotations of tokens at these positions, kept for whoever asks for the same tensor."""
        for known, found in self._others:
            if known is positions:
                return found
        self._others.append((positions, self._compute(positions)))
        return self._others[-1][1]


def check_rotary(head_dim: int, theta: float) -> None:
    """`head_dim` can be rotated in pairs, and `theta` makes frequencies.

    Raises:
        ValueError: if `head_dim` is odd, or `theta` no positive finite number.
    """
    if head_dim % 2:
        raise bad("head_dim", "even for rotary embedding", head_dim, "channels are rotated in pairs")
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < float("inf"):
        raise bad("rope_theta", "a positive number, or None for no rotary embedding", repr(theta))


def rotation(positions: Tensor, head_dim: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32) -> Rotation:
    """The rotations of tokens at these positions.

    Args:
        positions: int64 or int32 `[N]`, of any size and sign.
        head_dim: D, channels of a head; even.
        theta: base of the frequencies.
        dtype: of the tensor that will be rotated; angles are float64 for float64 and float32 for all others, since
            bfloat16 cannot tell position 256 from 257.

    Returns:
        The `Rotation`, on the device of `positions`.

    Raises:
        ValueError: if `positions` is no integer vector, `head_dim` is odd, or `theta` is not positive.

    Example:
        >>> import torch
        >>> rotation(torch.tensor([0, 1]), head_dim=2).cos.flatten()
        tensor([1.0000, 0.5403])
    """
    check_tensor("positions", positions, {"N": None}, POSITION_DTYPES)
    check_rotary(head_dim, theta)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = torch.arange(0, head_dim, 2, device=positions.device).to(wide)
    # The same operations in the same order as in Llama, so that converted models get the very same angles.
    frequencies = 1.0 / theta ** (channels / head_dim)
    angles = positions.to(wide)[:, None] * frequencies
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """`x` with the pairs of every head rotated.

    Args:
        x: queries or keys `[N, H, D]`, floating.
        by: the rotations of its N tokens.

    Returns:
        `[N, H, D]` in the dtype of `x`; computed in the dtype of `by`.

    Raises:
        ValueError: if the shapes do not fit or the devices differ.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 0.0]]])
        >>> rotate(x, rotation(torch.tensor([1]), head_dim=2))
        tensor([[[0.5403, 0.8415]]])
    """
    tokens, pairs = by.cos.shape
    check_tensor("x", x, {"N": tokens, "H": None, "D": 2 * pairs}, FLOAT_DTYPES)
    check_same("device", x=x, positions=by.cos)
    first, second = x.to(by.cos.dtype).chunk(2, dim=-1)
    cos, sin = by.cos[:, None], by.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def apply_rotary(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """`x` rotated as at these positions: `rotation` and `rotate` in one call.

    Args:
        x: queries or keys `[N, H, D]`, floating; D is even.
        positions: int64 or int32 `[N]`.
        theta: base of the frequencies.

    Returns:
        `[N, H, D]` in the dtype of `x`; angles and products are float32, or float64 for float64.

    Raises:
        ValueError: as `rotation` and `rotate`.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2, 8)
        >>> torch.equal(apply_rotary(x, torch.zeros(5, dtype=torch.int64)), x)
        True
    """
    check_tensor("x", x, {"N": None, "H": None, "D": None}, FLOAT_DTYPES)
    return rotate(x, rotation(positions, x.shape[-1], theta, x.dtype))
