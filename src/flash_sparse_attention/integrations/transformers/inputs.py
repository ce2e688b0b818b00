"""`SparseInputs`: which tokens of a batch are real, where their sequences begin, how they are rotated.

transformers gives a model rows of equal length with a mask of padding, or one row of packed sequences. Sparse attention
takes the real tokens alone, packed: the layers gather them, and put what they make of them back in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...nn.rotary import Rotary, Rotation
from ...types import SequenceLayout
from ...validation import bad
from .cache import SparseCaches


@dataclass(frozen=True, eq=False)
class SparseInputs:
    """One forward pass, the same for all layers.

    Attributes:
        layout: of the real tokens.
        tokens: where they stand among the B * S of the batch, int64 `[N]`; None where all of them are real.
        rotary: of these tokens.
        caches: that the tokens extend, or None.
        elsewhere: the same on other devices, for models that are spread over several.
    """

    layout: SequenceLayout
    tokens: Tensor | None
    rotary: Rotary
    caches: SparseCaches | None = None
    elsewhere: dict[torch.device, SparseInputs] = field(default_factory=dict)

    def pack(self, hidden_states: Tensor) -> Tensor:
        """The real tokens `[N, C]` of `[B, S, C]`."""
        hidden = hidden_states.flatten(0, 1)
        return hidden if self.tokens is None else hidden.index_select(0, self.tokens)

    def unpack(self, hidden: Tensor, like: Tensor) -> Tensor:
        """`[N, C]` in their places in `[B, S, C]`, zeros elsewhere."""
        if self.tokens is not None:
            hidden = hidden.new_zeros(like.shape[0] * like.shape[1], hidden.shape[-1]).index_copy(
                0, self.tokens, hidden
            )
        return hidden.view(*like.shape[:2], -1)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SparseInputs:
        """The same on this device. Libraries that spread a model over devices call it for each layer."""
        place = torch.device(device)
        if place == self.layout.device:
            return self
        if place not in self.elsewhere:
            by = self.rotary.tokens
            moved = Rotation(*(x.to(place, non_blocking=non_blocking) for x in by))
            self.elsewhere[place] = SparseInputs(
                SequenceLayout.from_lengths(self.layout.lengths, place),
                None if self.tokens is None else self.tokens.to(place, non_blocking=non_blocking),
                Rotary(moved, lambda positions: _moved(self.rotary.at(positions.to(self.layout.device)), place)),
                self.caches,
            )
        return self.elsewhere[place]


def _moved(by: Rotation, place: torch.device) -> Rotation:
    return Rotation(*(x.to(place) for x in by))


def is_packed(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    layout: SequenceLayout | None,
    cu_seq_lens: Tensor | None,
) -> bool:
    """Whether rows pack sequences, from the arguments of `layout_of`."""
    if layout is not None or cu_seq_lens is not None:
        return True
    return attention_mask is None and position_ids is not None and bool((position_ids.diff(dim=-1) != 1).any())


def layout_of(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    layout: SequenceLayout | None,
    cu_seq_lens: Tensor | None,
    past: int | None,
) -> tuple[SequenceLayout, Tensor | None]:
    """The layout of the real tokens of a batch, and where they stand in it (None: all are real).

    In this order: a `layout`; bounds in `cu_seq_lens`; the zeros of `attention_mask`; `position_ids` that begin anew
    within a row. All but the first are copied to the host, where sizes are decided.

    Args:
        shape: B rows of S tokens.
        device: of the tokens.
        attention_mask: 1 for real tokens, 0 for padding, `[B, past + S]`.
        position_ids: `[B, S]` or `[1, S]`.
        layout: of one row of packed sequences, or of rows that are sequences.
        cu_seq_lens: bounds of the packed sequences of one row, int32 `[sequences + 1]`.
        past: tokens that a cache holds before these, padding counted; None without a cache.

    Raises:
        ValueError: for masks or bounds that do not fit the batch, or packed sequences with a cache.
    """
    rows, columns = shape
    if past is not None and is_packed(attention_mask, position_ids, layout, cu_seq_lens):
        raise bad("layout", "left out with a cache", "packed sequences", "pad them, and pass attention_mask")
    if layout is not None:
        if layout.total_tokens != rows * columns:
            raise bad("layout", f"of the {rows} x {columns} tokens", layout.total_tokens)
        return layout, None
    if cu_seq_lens is not None:
        bounds = cu_seq_lens.to(device=device, dtype=torch.int32)
        return SequenceLayout.of("input_ids", torch.empty(rows * columns, 0, device=device), False, bounds), None
    if attention_mask is not None:
        return _layout_of_mask(attention_mask, rows, columns, past or 0, device)
    if attention_mask is None and position_ids is not None and past is None:
        return SequenceLayout.from_lengths(_restarts(position_ids.expand(rows, -1)), device), None
    return SequenceLayout.uniform(rows, columns, device), None


def _layout_of_mask(
    mask: Any, rows: int, columns: int, past: int, device: torch.device
) -> tuple[SequenceLayout, Tensor | None]:
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows or mask.shape[1] < columns:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        cure = "1 for tokens and 0 for padding; sparse attention makes its own causal mask"
        raise bad("attention_mask", f"[B={rows}, {past + columns}]", got, cure)
    real = mask[:, mask.shape[1] - columns :].to(device=device, dtype=torch.bool)
    lengths = real.sum(1).tolist()
    if all(length == columns for length in lengths):
        return SequenceLayout.uniform(rows, columns, device), None
    return SequenceLayout.from_lengths(lengths, device), real.flatten().nonzero().flatten()


def _restarts(position_ids: Tensor) -> list[int]:
    """Lengths of the runs of positions that count up by one, in all rows."""
    rows, columns = position_ids.shape
    begins = torch.ones(rows, columns, dtype=torch.bool, device=position_ids.device)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.flatten().nonzero().flatten()
    return torch.diff(starts, append=starts.new_tensor([rows * columns])).tolist()


def rotations_of(rotary_emb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dtype: torch.dtype) -> Any:
    """Positions -> `Rotation` by a transformers rotary embedding, in float32 (float64 for float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def compute(positions: Tensor) -> Rotation:
        like = torch.empty(0, device=positions.device, dtype=wide)
        # Of a model that is spread over devices it may be on another one than the first layers.
        cos, sin = (x.to(positions.device) for x in rotary_emb(like, positions[None]))
        # It holds every angle twice, for both halves of the channels.
        half = cos.shape[-1] // 2
        return Rotation(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())

    return compute
