"""Interval attention in tiles with a running softmax, forward and backward.

Shape suffixes: T queries of a tile, S keys, K key/value heads, R (query, head of the group) rows, D head dimension, V
head dimension of the values.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Interval
from ...precision import no_autocast
from ...types import AttentionOutput, SequenceLayout
from .common import (
    LN_2,
    LOG2_E,
    SCORE_TILE,
    Scratch,
    empty_outputs,
    head_major,
    larger_tiles,
    layout_of,
    normaliser_log2,
    rows,
    save_attention,
    softmax_shift,
    token_major,
    unrows,
)

QUERY_TILE, KEY_TILE = 256, 256  # tokens, keys
# Of a sliding window: fewer queries, so that more of what their keys give is visible, and all their keys at once.
WINDOW_QUERY_TILE, LARGEST_WINDOW_TILE = 128, 1024


class Tile(NamedTuple):
    """Consecutive queries, and the consecutive keys that any of them sees (both may belong to several sequences)."""

    queries: slice
    keys: slice
    start_T: Tensor
    end_T: Tensor
    seen_by_all: slice
    one_sequence: bool
    key_tile: int

    def spans(self) -> Iterator[slice]:
        """The keys, in spans that keep the scores of the tile small."""
        for first in range(self.keys.start, self.keys.stop, self.key_tile):
            yield slice(first, min(first + self.key_tile, self.keys.stop))

    def hide_(self, scores_KRS: Tensor, span: slice) -> Tensor:
        """Sets the scores of invisible pairs to -inf, in place; rows are (query, head of the group)."""
        scores_KTGS = scores_KRS.unflatten(1, (len(self.start_T), -1))
        seen_begin = min(max(self.seen_by_all.start, span.start), span.stop)
        seen_end = min(max(self.seen_by_all.stop, seen_begin), span.stop)
        # What all queries see needs no mask: in most tiles that leaves a few keys at either end.
        for first, last in ((span.start, seen_begin), (seen_end, span.stop)):
            if first < last:
                key_S = torch.arange(first, last, device=scores_KRS.device)
                hidden_TS = (self.start_T[:, None] > key_S) | (key_S >= self.end_T[:, None])
                edge_KTGS = scores_KTGS[..., first - span.start : last - span.start]
                edge_KTGS.masked_fill_(hidden_TS[None, :, None], -math.inf)
        return scores_KRS


def tiles(interval: Interval, layout: SequenceLayout, num_heads: int) -> Iterator[Tile]:
    """All queries in tiles. Keys are those of the pack: bounds of packed sequences grow, so a tile sees one range."""
    key_bounds = layout.compressed(interval.kernel_size, interval.kernel_stride).cu_seqlens
    first_key_T, position_T = key_bounds[layout.sequence_ids()], layout.positions()
    start_T, end_T = first_key_T + interval.start(position_T), first_key_T + interval.end(position_T)
    more_queries, more_keys = larger_tiles(layout.device)
    size, key_tile, window_tile = QUERY_TILE * more_queries, KEY_TILE * more_keys, WINDOW_QUERY_TILE * more_queries
    if interval.window_size is not None and interval.window_size + window_tile <= LARGEST_WINDOW_TILE * more_queries:
        size, key_tile = window_tile, interval.window_size + window_tile
    size = max(1, min(size, SCORE_TILE * more_queries * more_keys // (key_tile * num_heads)))
    firsts = torch.arange(0, layout.total_tokens, size, device=layout.device)
    lasts = (firsts + size).clamp(max=layout.total_tokens) - 1
    sequence_T = layout.sequence_ids()
    columns = [firsts, lasts, start_T[firsts], end_T[firsts], start_T[lasts], end_T[lasts]]
    columns.append(sequence_T[firsts] == sequence_T[lasts])
    for first, last, oldest, all_end, all_start, newest, one in torch.stack(columns, 1).tolist():
        queries, seen_by_all = slice(first, last + 1), slice(all_start, all_end)
        yield Tile(queries, slice(oldest, newest), start_T[queries], end_T[queries], seen_by_all, bool(one), key_tile)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, interval: Interval, layout: SequenceLayout, softmax_scale: float
) -> AttentionOutput:
    """As `reference.interval_attention`, in tiles with a running softmax."""
    sizes = interval.kernel_size, interval.kernel_stride, interval.window_size or 0
    return AttentionOutput(
        *_interval_attention(q, k, v, layout.cu_seqlens, layout.keys.cu_seqlens, *sizes, softmax_scale)
    )


@torch.library.custom_op("flash_sparse_attention::interval_attention_blockwise", mutates_args=())
def _interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """`window_size` 0 stands for no bound."""
    interval, layout = Interval(kernel_size, kernel_stride, window_size or None), layout_of(cu_seqlens, cu_seqlens_k)
    out, lse = empty_outputs(q, v)
    with no_autocast(q):
        k_KSD, v_KSV = head_major(k), head_major(v)
        scratch = Scratch(k_KSD)
        for tile in tiles(interval, layout, q.shape[1]):
            q_KRD = rows(q[tile.queries], k.shape[1]).mul_(softmax_scale * LOG2_E)
            running: _Running | None = None
            for span in tile.spans():
                scores_KRS = tile.hide_(scratch.product("scores", q_KRD, k_KSD[:, span].mT), span)
                running = _attend(scores_KRS, v_KSV[:, span], running, scratch)
            if running is None:
                out[tile.queries], lse[tile.queries] = 0.0, -math.inf
                continue
            max_KR1, sum_KR1, out_KRV = running
            # Where no key was seen the sum is 0: output 0, lse -inf.
            out_KRV.div_(sum_KR1.clamp(min=torch.finfo(sum_KR1.dtype).tiny))
            out[tile.queries] = unrows(out_KRV, q.shape[1])
            lse[tile.queries] = unrows((max_KR1 + sum_KR1.log2()).mul_(LN_2), q.shape[1]).squeeze(-1)
    return out, lse


class _Running(NamedTuple):
    """A softmax over the keys up to here: maximum (log2 units), sum, weighted sum of the values."""

    max_KR1: Tensor
    sum_KR1: Tensor
    out_KRV: Tensor


def _attend(scores_KRS: Tensor, v_KSV: Tensor, before: _Running | None, scratch: Scratch) -> _Running:
    """The softmax with these keys too. Writes over the scores, and over what it goes on from."""
    max_KR1 = scores_KRS.amax(-1, keepdim=True)
    if before is not None:
        max_KR1 = torch.maximum(max_KR1, before.max_KR1)
    # A row that has seen no key yet keeps the maximum -inf, and any finite one serves it.
    finite_KR1 = max_KR1.masked_fill(max_KR1 == -math.inf, 0.0)
    p_KRS = scores_KRS.sub_(finite_KR1).exp2_()
    sum_KR1 = p_KRS.sum(-1, keepdim=True)
    if before is None:
        return _Running(max_KR1, sum_KR1, scratch.product("out", p_KRS, v_KSV))
    shrink_KR1 = (before.max_KR1 - finite_KR1).exp2_()
    sum_KR1.addcmul_(before.sum_KR1, shrink_KR1)
    return _Running(max_KR1, sum_KR1, before.out_KRV.mul_(shrink_KR1).baddbmm_(p_KRS, v_KSV))


@torch.library.custom_op("flash_sparse_attention::interval_attention_blockwise_backward", mutates_args=())
def _interval_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    kernel_size: int,
    kernel_stride: int,
    window_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again from lse."""
    interval, layout = Interval(kernel_size, kernel_stride, window_size or None), layout_of(cu_seqlens, cu_seqlens_k)
    dq = torch.empty_like(q)
    with no_autocast(q):
        k_KSD, v_KSV = head_major(k), head_major(v)
        dk_KSD, dv_KSV = torch.zeros_like(k_KSD), torch.zeros_like(v_KSV)
        scratch = Scratch(k_KSD)
        shift, normaliser = softmax_shift(d_out, d_lse, out), normaliser_log2(lse)
        for tile in tiles(interval, layout, q.shape[1]):
            at = tile.queries
            q_KRD, dout_KRV = rows(q[at], k.shape[1]).mul_(softmax_scale * LOG2_E), rows(d_out[at], k.shape[1])
            normaliser_KR1, shift_KR1 = rows(normaliser[at, :, None], k.shape[1]), rows(shift[at, :, None], k.shape[1])
            dq_KRD: Tensor | None = None
            for span in tile.spans():
                scores_KRS = tile.hide_(scratch.product("scores", q_KRD, k_KSD[:, span].mT), span)
                p_KRS = scores_KRS.sub_(normaliser_KR1).exp2_()
                dv_KSV[:, span].baddbmm_(p_KRS.mT, dout_KRV)
                ds_KRS = scratch.product("ds", dout_KRV, v_KSV[:, span].mT).sub_(shift_KR1).mul_(p_KRS)
                dk_KSD[:, span].baddbmm_(ds_KRS.mT, q_KRD)
                if dq_KRD is None:
                    dq_KRD = scratch.product("dq", ds_KRS, k_KSD[:, span])
                else:
                    dq_KRD.baddbmm_(ds_KRS, k_KSD[:, span])
            dq[at] = 0.0 if dq_KRD is None else unrows(dq_KRD.mul_(softmax_scale), q.shape[1])
        # The rows of q held softmax_scale * log2(e); dk wants softmax_scale.
        dk_KSD.mul_(LN_2)
    return dq, token_major(dk_KSD, k), token_major(dv_KSV, v)


def _differentiate_interval(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    q, k, v, *bounds, out, lse = ctx.saved_tensors
    grads = _interval_attention_backward(d_out, d_lse, q, k, v, out, lse, *bounds, *ctx.sizes)
    return (*grads, None, None, *(None for _ in ctx.sizes))


_interval_attention.register_fake(lambda q, k, v, *_: empty_outputs(q, v))
_interval_attention_backward.register_fake(
    lambda d_out, d_lse, q, k, v, *_: (torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape))
)
_interval_attention.register_autograd(_differentiate_interval, setup_context=save_attention)
