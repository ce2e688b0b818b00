"""What the blockwise operators share: layouts of rows, the bookkeeping of a softmax, the size of the working set."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...precision import wide
from ...types import SequenceLayout

# Elements of a tile of scores, the widest temporary of the inner loops: 4 MiB of float32, which caches still hold.
SCORE_TILE = 1 << 20
# Where launches cost more than caches save, tiles have so many times as many queries and keys.
DEVICE_QUERIES, DEVICE_KEYS = 16, 4
SHIFT_TILE = 1024  # tokens

# Scores are kept in log2 units: exp2 is 1.5x faster than exp, and exp slows down 10x where its result underflows.
LOG2_E, LN_2 = math.log2(math.e), math.log(2)

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def larger_tiles(device: torch.device) -> tuple[int, int]:
    """How many times as many queries, and keys, a tile has on this device."""
    return (1, 1) if device.type == "cpu" else (DEVICE_QUERIES, DEVICE_KEYS)


class Scratch:
    """Buffers by name, which the inner loops write into again and again.

    On a CPU, memory of megabytes that is allocated anew comes page by page through faults and goes back when it is
    freed, which took a third of the time of selected attention.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape with anything in it; what was there under this name before is gone."""
        size = math.prod(shape)
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(size)
        elif self._buffers[name].numel() < size:
            # Somewhat more, as what grows once grows again.
            self._buffers[name] = self._like.new_empty(size + size // 8)
        return self._buffers[name][:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """The batched matrix product, and `plus` added, which costs less so than after it."""
        out = self.empty(name, a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=out) if plus is None else torch.baddbmm(plus, a, b, out=out)

    def rows(self, name: str, x: Tensor, num_kv_heads: int) -> Tensor:
        """Tokens and the heads of a group as rows: `[T, H, D]` -> `[K, T * G, D]`, a copy."""
        x_KTGD = by_group(x, num_kv_heads)
        return self.empty(name, *x_KTGD.shape).copy_(x_KTGD).flatten(1, 2)

    def gather(self, name: str, x: Tensor, rows_SP: Tensor, dim: int) -> Tensor:
        """The named rows of `x`, whose columns are those of several heads: `[S, P * heads, dim]`."""
        # index_select copies whole rows, several times faster than advanced indexing on a CPU.
        out = self.empty(name, rows_SP.numel(), x.shape[1])
        return torch.index_select(x, 0, rows_SP.flatten(), out=out).view(len(rows_SP), -1, dim)


def layout_of(cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> SequenceLayout:
    """The layout of queries, and of the tokens that have keys."""
    layout = SequenceLayout.from_cu_seqlens(cu_seqlens)
    return layout if _same(cu_seqlens, cu_seqlens_k) else layout.after(SequenceLayout.from_cu_seqlens(cu_seqlens_k))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Storage for out `[N, Hq, Dv]` and lse `[N, Hq]`."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)


def head_major(x: Tensor) -> Tensor:
    """`[S, K, D]` -> `[K, S, D]`, wide."""
    return wide(x).transpose(0, 1).contiguous()


def token_major(x_KSD: Tensor) -> Tensor:
    return x_KSD.transpose(0, 1).contiguous()


def by_group(x: Tensor, num_kv_heads: int) -> Tensor:
    """`[T, H, D]` -> `[K, T, G, D]`, a view."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)


def rows(x: Tensor, num_kv_heads: int) -> Tensor:
    """A number of each token and head as rows: `[T, H]` -> `[K, T * G, 1]`."""
    return by_group(x, num_kv_heads).flatten(1, 2).unsqueeze(-1)


class Visible(NamedTuple):
    """Which scores are visible, as masks of the bits of floats, whatever is hidden: inf and NaN too.

    On a CPU `masked_fill_` takes several times as long.
    """

    kept: Tensor  # all bits of what is visible
    hidden: Tensor  # the bits of -inf of what is not

    @classmethod
    def of(cls, visible: Tensor, like: Tensor) -> "Visible":
        """For scores in the dtype of `like`."""
        hidden = like.new_full((), -math.inf).view(_BITS[like.dtype])
        kept = visible.to(hidden.dtype).neg_()
        return cls(kept, kept.bitwise_not().bitwise_and_(hidden))

    def hide_(self, scores: Tensor) -> None:
        """Sets hidden scores to -inf, in place."""
        scores.view(self.kept.dtype).bitwise_and_(self.kept).bitwise_or_(self.hidden)

    def clear_(self, p: Tensor) -> None:
        """Sets hidden probabilities to 0, in place."""
        p.view(self.kept.dtype).bitwise_and_(self.kept)


def softmax_shift(d_out: Tensor, d_lse: Tensor, out: Tensor) -> Tensor:
    """What the backward pass of softmax subtracts from dP, `[N, H]`.

    With P the probabilities and dP their gradient, dS = P * (dP - shift), shift = sum(dP * P) - d_lse, and
    sum(dP * P) = sum(d_out * out) over the head dimension.
    """
    shift = torch.empty_like(d_lse)
    # In parts, since a product as large as the output would be fresh memory, which costs more than the product.
    for first in range(0, len(out), SHIFT_TILE):
        part = slice(first, first + SHIFT_TILE)
        torch.sum(wide(d_out[part]) * wide(out[part]), -1, out=shift[part])
    return shift.sub_(d_lse)


def normaliser_log2(lse: Tensor) -> Tensor:
    """lse in log2 units, such that exp2(score - normaliser) is 0 where a query sees no key."""
    return lse.masked_fill(lse == -math.inf, math.inf) * LOG2_E


class Softmax(NamedTuple):
    """What the gradients of attention need of its softmax, `[N, H]`: probabilities are exp2(scores + less_normaliser),
    and dP + less_shift is what they are multiplied with."""

    less_normaliser: Tensor
    less_shift: Tensor

    @classmethod
    def of(cls, d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor) -> "Softmax":
        return cls(normaliser_log2(lse).neg_(), softmax_shift(d_out, d_lse, out).neg_())


def save_attention(ctx, inputs, output):  # type: ignore[no-untyped-def]
    """Keeps all inputs and outputs: tensors for the backward operator, and the sizes that follow them."""
    ctx.num_tensors = sum(isinstance(value, Tensor) for value in inputs)
    ctx.save_for_backward(*inputs[: ctx.num_tensors], *output)
    ctx.sizes = inputs[ctx.num_tensors :]
