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
from ...precision import no_autocast, wide
from ...types import AttentionOutput, SequenceLayout
from .common import (
    LN_2,
    LOG2_E,
    SCORE_TILE,
    Scratch,
    Softmax,
    Visible,
    by_group,
    empty_outputs,
    head_major,
    larger_tiles,
    layout_of,
    rows,
    save_attention,
    token_major,
)

QUERY_TILE, KEY_TILE = 256, 256  # tokens, keys
# Of a sliding window: fewer queries, so that more of what their keys give is visible, and all their keys at once.
WINDOW_QUERY_TILE, LARGEST_WINDOW_TILE = 128, 1024
# Masks of the latest edges: of both ends of a tile, and of tiles whose phase differs.
KEPT_MASKS = 4


class Tile(NamedTuple):
    """Consecutive queries, and the consecutive keys that any of them sees (both may belong to several sequences)."""

    queries: slice
    keys: slice
    start_T: Tensor
    end_T: Tensor
    seen_by_all: slice
    one_sequence: bool
    key_tile: int
    phase: int  # of the first query's position, in strides of the keys
    masks: dict[tuple[int, ...], Visible]  # of the latest tiles

    def spans(self) -> Iterator[slice]:
        """The keys, in spans that keep the scores of the tile small."""
        for first in range(self.keys.start, self.keys.stop, self.key_tile):
            yield slice(first, min(first + self.key_tile, self.keys.stop))

    def hide_(self, scores_KRS: Tensor, span: slice) -> Tensor:
        """Sets the scores of invisible pairs to -inf, in place; rows are (query, head of the group)."""
        for edge_KTGS, visible_TS in self._edges(scores_KRS, span):
            visible_TS.hide_(edge_KTGS)
        return scores_KRS

    def clear_(self, p_KRS: Tensor, span: slice) -> Tensor:
        """Sets the probabilities of invisible pairs to 0, in place."""
        for edge_KTGS, visible_TS in self._edges(p_KRS, span):
            visible_TS.clear_(edge_KTGS)
        return p_KRS

    def _edges(self, x_KRS: Tensor, span: slice) -> Iterator[tuple[Tensor, Visible]]:
        """What all queries see needs no mask: in most tiles that leaves a few keys at either end."""
        seen_begin = min(max(self.seen_by_all.start, span.start), span.stop)
        seen_end = min(max(self.seen_by_all.stop, seen_begin), span.stop)
        for first, last in ((span.start, seen_begin), (seen_end, span.stop)):
            if first < last:
                x_KTGS = x_KRS.unflatten(1, (len(self.start_T), -1))
                yield x_KTGS[..., first - span.start : last - span.start], self._visible(first, last, x_KRS)

    def _visible(self, first: int, last: int, like: Tensor) -> Visible:
        """Which of the keys `first .. last - 1` each query sees, `[T, 1, S]`."""
        # Within a sequence these tell where each query's keys start and end: they move on by strides, or stand still at
        # the oldest key. Most tiles find the mask of the one before.
        bounds = self.keys.start, self.keys.stop, self.seen_by_all.start, self.seen_by_all.stop, last
        at = (len(self.start_T), self.phase, *(bound - first for bound in bounds))
        if not self.one_sequence or at not in self.masks:
            key_S = torch.arange(first, last, device=like.device)
            visible_TS = (self.start_T[:, None] <= key_S) & (key_S < self.end_T[:, None])
            visible = Visible.of(visible_TS[:, None], like)
            if not self.one_sequence:
                return visible
            while len(self.masks) >= KEPT_MASKS:
                del self.masks[next(iter(self.masks))]
            self.masks[at] = visible
        return self.masks[at]


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
    columns += [sequence_T[firsts] == sequence_T[lasts], position_T[firsts] % interval.kernel_stride]
    masks: dict[tuple[int, ...], Visible] = {}
    for first, last, oldest, all_end, all_start, newest, one, phase in torch.stack(columns, 1).tolist():
        queries, keys, seen_by_all = slice(first, last + 1), slice(oldest, newest), slice(all_start, all_end)
        bounds = start_T[queries], end_T[queries], seen_by_all
        yield Tile(queries, keys, *bounds, bool(one), key_tile, phase, masks)


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
        num_kv_heads = k.shape[1]
        k_KSD, v_KSV = head_major(k) * (softmax_scale * LOG2_E), head_major(v)
        out_KTGV, lse_KTG = by_group(out, num_kv_heads), by_group(lse, num_kv_heads)
        scratch = Scratch(k_KSD)
        for tile in tiles(interval, layout, q.shape[1]):
            at = tile.queries
            q_KRD = scratch.rows("q", q[at], num_kv_heads)
            running: _Running | None = None
            for span in tile.spans():
                scores_KRS = tile.hide_(scratch.product("scores", q_KRD, k_KSD[:, span].mT), span)
                running = _attend(scores_KRS, v_KSV[:, span], running, scratch)
            if running is None:
                out[at], lse[at] = 0.0, -math.inf
                continue
            max_KTG1, sum_KTG1, part_KTGV = (x.unflatten(1, (len(tile.start_T), -1)) for x in running)
            # Where no key was seen the sum is 0: output 0, lse -inf.
            torch.div(part_KTGV, sum_KTG1.clamp(min=torch.finfo(sum_KTG1.dtype).tiny), out=out_KTGV[:, at])
            torch.mul(sum_KTG1.log2().add_(max_KTG1).squeeze(-1), LN_2, out=lse_KTG[:, at])
    return out, lse


class _Running(NamedTuple):
    """A softmax over the keys up to here: maximum (log2 units), sum, weighted sum of the values."""

    max_KR1: Tensor
    sum_KR1: Tensor
    out_KRV: Tensor


def _attend(scores_KRS: Tensor, v_KSV: Tensor, before: _Running | None, scratch: Scratch) -> _Running:
    """The softmax with these keys too. Writes over the scores, and over what it goes on from."""
    max_KR1 = scores_KRS.amax(-1, keepdim=True)
    # A row that has seen no key yet has the maximum -inf, and any finite one serves it.
    lowest = torch.finfo(max_KR1.dtype).min
    max_KR1 = max_KR1.clamp_(min=lowest) if before is None else torch.maximum(max_KR1, before.max_KR1)
    p_KRS = scores_KRS.sub_(max_KR1).exp2_()
    sum_KR1 = p_KRS.sum(-1, keepdim=True)
    if before is None:
        return _Running(max_KR1, sum_KR1, scratch.product("out", p_KRS, v_KSV))
    shrink_KR1 = before.max_KR1.sub_(max_KR1).exp2_()
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
    dq = torch.zeros(q.shape, dtype=wide(q[:0]).dtype, device=q.device)
    softmax = Softmax.of(d_out, d_lse, out, lse)
    with no_autocast(q):
        dk, dv = differentiate_interval(d_out, q, k, v, softmax, interval, layout, softmax_scale, dq)
    return dq.mul_(LN_2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def differentiate_interval(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax: Softmax,
    interval: Interval,
    layout: SequenceLayout,
    softmax_scale: float,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, wide. That of q is added to `dq`, which is wide, over ln 2."""
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k_KSD, v_KSV = head_major(k) * (softmax_scale * LOG2_E), head_major(v)
    dk_KSD, dv_KSV = torch.zeros_like(k_KSD), torch.zeros_like(v_KSV)
    dq_KTGD = by_group(dq, num_kv_heads)
    less_normaliser_KN1, less_shift_KN1 = (rows(x, num_kv_heads) for x in softmax)
    scratch = Scratch(k_KSD)
    for tile in tiles(interval, layout, q.shape[1]):
        at, at_rows = tile.queries, slice(tile.queries.start * group, tile.queries.stop * group)
        q_KRD, dout_KRV = scratch.rows("q", q[at], num_kv_heads), scratch.rows("dout", d_out[at], num_kv_heads)
        less_normaliser_KR1, less_shift_KR1 = less_normaliser_KN1[:, at_rows], less_shift_KN1[:, at_rows]
        dq_KRD: Tensor | None = None
        for span in tile.spans():
            k_part_KSD, v_part_KSV = k_KSD[:, span], v_KSV[:, span]
            p_KRS = scratch.product("p", q_KRD, k_part_KSD.mT, plus=less_normaliser_KR1).exp2_()
            tile.clear_(p_KRS, span)
            dv_KSV[:, span].baddbmm_(p_KRS.mT, dout_KRV)
            ds_KRS = scratch.product("ds", dout_KRV, v_part_KSV.mT, plus=less_shift_KR1).mul_(p_KRS)
            dk_KSD[:, span].baddbmm_(ds_KRS.mT, q_KRD)
            if dq_KRD is None:
                dq_KRD = scratch.product("dq", ds_KRS, k_part_KSD)
            else:
                dq_KRD.baddbmm_(ds_KRS, k_part_KSD)
        if dq_KRD is not None:
            # The keys held softmax_scale * log2(e).
            dq_KTGD[:, at].add_(dq_KRD.unflatten(1, (-1, group)))
    return token_major(dk_KSD.mul_(softmax_scale)), token_major(dv_KSV)


def _differentiate_interval(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    q, k, v, *bounds, out, lse = ctx.saved_tensors
    grads = _interval_attention_backward(d_out, d_lse, q, k, v, out, lse, *bounds, *ctx.sizes)
    return (*grads, None, None, *(None for _ in ctx.sizes))


_interval_attention.register_fake(lambda q, k, v, *_: empty_outputs(q, v))
_interval_attention_backward.register_fake(
    lambda d_out, d_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
_interval_attention.register_autograd(_differentiate_interval, setup_context=save_attention)
