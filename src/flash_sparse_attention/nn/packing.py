"""Positions of the tokens of a layer's input, packed `[N, ...]` or batched `[B, S, ...]`."""

from __future__ import annotations

from torch import Tensor

from ..types import SequenceLayout
from ..validation import check_same, check_tensor
from .rotary import POSITION_DTYPES


def positions_of(
    argument: str, x: Tensor, token_dims: int, position_ids: Tensor | None, layout: SequenceLayout
) -> Tensor:
    """The position of each token of `x`, integers `[N]`: those given, or counted from the start of its sequence.

    Raises:
        ValueError: if `position_ids` has not the token dimensions of `x`, is not int64 or int32, or is elsewhere.
    """
    if position_ids is None:
        return layout.positions()
    names = ("N",) if token_dims == 1 else ("B", "S")
    shape: dict[str, int | None] = dict(zip(names, x.shape[:token_dims], strict=True))
    check_tensor(
        "position_ids", position_ids, shape, POSITION_DTYPES, cure=f"one position for each token of {argument}"
    )
    check_same("device", **{argument: x}, position_ids=position_ids)
    return position_ids.flatten()
