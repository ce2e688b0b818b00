"""Selected attention, key/value blocks in the outer loop (FSA), forward and backward.

    block_indices                 pairs sorted by block           segments of P pairs, padded, computed in batches
    q0: 0          block 0: (q0) (q1) (q2) (q3)     (q0 q1) x block 0
    q1: 0 1   -->  block 1: (q1) (q3)          -->  (q2 q3) x block 0   -->  partial sums, merged by query
    q2: 0 2        block 2: (q2) (q3)               (q1 q3) x block 1
    q3: 0 1 2                                       (q2 q3) x block 2

Shape suffixes: T queries of a chunk, K key/value heads, G query heads of a group, N slots of a selection, B buckets, C
blocks, S segments, P pairs (of a segment, after S), R (pair, head of the group) rows, L tokens of a block, D head
dimension, V head dimension of the values.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import geometry
from ...precision import no_autocast, wide
from ...types import AttentionOutput, SequenceLayout
from .common import (
    LN_2,
    LOG2_E,
    SCORE_TILE,
    Scratch,
    Softmax,
    Visible,
    empty_outputs,
    larger_tiles,
    layout_of,
    save_attention,
)

# Queries are worked through in chunks. Forward keeps their partial sums, at most so many elements (128 MiB of float32);
# backward keeps only their index, at most so many slots, as larger chunks fill their buckets better.
PARTIAL_SUMS = 1 << 25
BACKWARD_SLOTS = 1 << 21
SEGMENT_ROWS = 256
SHORTER = 4  # so many times, the segments of what is left of a bucket


class _Chunk(NamedTuple):
    """Consecutive queries that are worked through together, and their selections."""

    queries: slice
    position_T: Tensor
    first_block_T: Tensor  # of the query's sequence, among the blocks of the pack
    block_indices: Tensor


class _Blocks(NamedTuple):
    """The blocks of all sequences, of `size` tokens each. Those of each kv head are buckets of the inverted index."""

    token_CL: Tensor  # C blocks; where the last one of a sequence is cut short, its last token stands for the rest
    first_token_C: Tensor  # position in the sequence
    num_tokens: int

    @classmethod
    def of(cls, layout: SequenceLayout, block_size: int) -> "_Blocks":
        blocks, bounds = layout.blocks(block_size), layout.keys.cu_seqlens
        sequence_C1, first_token_C = (
            blocks.sequence_ids()[:, None],
            geometry.first_token_of_block(blocks.positions(), block_size),
        )
        token_CL = bounds[sequence_C1] + first_token_C[:, None] + torch.arange(block_size, device=layout.device)
        # What lies beyond the end is masked, and read in bounds.
        return cls(token_CL.minimum(bounds[sequence_C1 + 1] - 1), first_token_C, layout.keys.total_tokens)

    @property
    def size(self) -> int:
        """Tokens of a block."""
        return self.token_CL.shape[1]

    def gather(self, x: Tensor) -> Tensor:
        """`[N, K, D]` -> `[K * C, L * D]`, wide."""
        x_CLKD = wide(x)[self.token_CL]
        return x_CLKD.permute(2, 0, 1, 3).reshape(-1, self.size * x.shape[2])

    def add(self, x_blocks: Tensor, num_kv_heads: int) -> Tensor:
        """The transpose of `gather`."""
        dim = x_blocks.shape[1] // self.size
        x_CLKD = x_blocks.view(num_kv_heads, len(self.token_CL), self.size, dim).permute(1, 2, 0, 3)
        x = x_blocks.new_zeros(self.num_tokens, *x_CLKD.shape[2:])
        return x.index_add_(0, self.token_CL.flatten(), x_CLKD.flatten(0, 1))

    def positions(self, bucket_S: Tensor) -> Tensor:
        """Positions of the keys of buckets, those beyond the end too, `[S, L]`."""
        first_token_S = self.first_token_C[bucket_S % len(self.first_token_C)]
        return first_token_S[:, None] + torch.arange(self.size, device=bucket_S.device)


class _Batch(NamedTuple):
    """Segments of the inverted index that are computed together: S of them, of P pairs each.

    `pairs` is their place among all pairs of the index; `row_SP` counts (query of the chunk, kv head).
    """

    pairs: slice
    row_SP: Tensor
    padding_SP: Tensor
    bucket_S: Tensor
    visible_SP1L: Visible | None

    def hide_(self, scores_SRL: Tensor) -> Tensor:
        """Sets the scores of later tokens to -inf, in place; rows are (pair, head of the group)."""
        if self.visible_SP1L is not None:
            self.visible_SP1L.hide_(scores_SRL.unflatten(1, (self.row_SP.shape[1], -1)))
        return scores_SRL

    def clear_(self, p_SRL: Tensor) -> Tensor:
        """Sets the probabilities of later tokens to 0, in place."""
        if self.visible_SP1L is not None:
            self.visible_SP1L.clear_(p_SRL.unflatten(1, (self.row_SP.shape[1], -1)))
        return p_SRL


class _Segments(NamedTuple):
    """Segments of one size, those that need the causal mask first. `first_pair` is their place among all pairs."""

    row_SP: Tensor
    padding_SP: Tensor
    bucket_S: Tensor
    num_masked: int
    first_pair: int

    @classmethod
    def cut(
        cls,
        chunk: _Chunk,
        first_B: Tensor,
        last_B: Tensor,
        size: int,
        slot_P: Tensor,
        block_TKN: Tensor,
        block_size: int,
        first_pair: int,
    ) -> tuple["_Segments", Tensor]:
        """Cuts up the pairs `first_B .. last_B - 1` of each bucket, and names the slots of all pairs of the segments.

        Padding repeats the last pair of the bucket.
        """
        segments_B = (last_B - first_B + size - 1) // size
        bucket_S = torch.arange(len(first_B), device=first_B.device).repeat_interleave(segments_B)
        rank_S = torch.arange(len(bucket_S), device=first_B.device) - (segments_B.cumsum(0) - segments_B)[bucket_S]
        pair_SP = (first_B[bucket_S] + rank_S * size)[:, None] + torch.arange(size, device=first_B.device)
        last_S1 = last_B[bucket_S, None]
        padding_SP = pair_SP >= last_S1
        slot_SP = slot_P[pair_SP.minimum(last_S1 - 1)]
        # Pairs ascend within a bucket, so a segment needs the causal mask iff its first query stands before the last
        # token of the block.
        slot_S = slot_SP[:, 0]
        last_token_S = geometry.first_token_of_block(block_TKN.flatten()[slot_S] + 1, block_size) - 1
        num_kv_heads, num_slots = block_TKN.shape[1:]
        masked_S = chunk.position_T[slot_S // (num_kv_heads * num_slots)] < last_token_S
        order_S = masked_S.logical_not().long().argsort(stable=True)
        slot_SP, num_masked = slot_SP[order_S], int(masked_S.sum())
        return cls(slot_SP // num_slots, padding_SP[order_S], bucket_S[order_S], num_masked, first_pair), slot_SP

    def batches(self, chunk: _Chunk, blocks: _Blocks, group: int, like: Tensor) -> Iterator[_Batch]:
        """The segments in batches of bounded size, for scores in the dtype of `like`."""
        num_segments, pairs = self.row_SP.shape
        more_queries, more_keys = larger_tiles(like.device)
        batch_size = max(1, SCORE_TILE * more_queries * more_keys // (pairs * group * blocks.size))
        for masked, begin, stop in ((True, 0, self.num_masked), (False, self.num_masked, num_segments)):
            for first in range(begin, stop, batch_size):
                at = slice(first, min(first + batch_size, stop))
                visible_SP1L = None
                if masked:
                    key_position_SL = blocks.positions(self.bucket_S[at])
                    position_SP = chunk.position_T[self.row_SP[at] // chunk.block_indices.shape[1]]
                    visible_SPL = key_position_SL[:, None, :] <= position_SP[:, :, None]
                    visible_SP1L = Visible.of(visible_SPL.unsqueeze(2), like)
                in_all = slice(self.first_pair + at.start * pairs, self.first_pair + at.stop * pairs)
                yield _Batch(in_all, self.row_SP[at], self.padding_SP[at], self.bucket_S[at], visible_SP1L)


class _InvertedIndex(NamedTuple):
    """Which queries of a chunk selected each block.

    A bucket is a block of a key/value head; its pairs (query, slot) are cut into segments of one size, and what is left
    of it into shorter ones, so that little is padded. Worked example: one kv head, blocks of 64 tokens, block 1
    selected by the queries 70, 90, 200, 300 and 400, segments of two pairs: (70, 90), which needs the causal mask,
    since the block ends with token 127, and (200, 300), which does not; and one of one pair, (400).
    """

    segments: list[_Segments]
    num_pairs: int  # padding counted
    pair_TKN: Tensor  # the pair of each slot, and one past the last for an unused slot

    @classmethod
    def build(cls, chunk: _Chunk, num_blocks: int, block_size: int, group: int) -> "_InvertedIndex":
        """Sorts pairs by bucket and cuts them up. Invalid and repeated entries of the selection fall out here."""
        num_kv_heads = chunk.block_indices.shape[1]
        newest_T = geometry.num_eligible_blocks(chunk.position_T, block_size) - 1
        nowhere = torch.iinfo(torch.int64).max
        block_TKN = chunk.block_indices.long()
        invalid_TKN = (block_TKN < 0) | (block_TKN > newest_T[:, None, None])
        block_TKN = block_TKN.masked_fill(invalid_TKN, nowhere).sort(-1).values
        valid_TKN = block_TKN != nowhere
        valid_TKN[..., 1:] &= block_TKN[..., 1:] != block_TKN[..., :-1]
        head_K1 = torch.arange(num_kv_heads, device=block_TKN.device)[:, None]
        bucket_TKN = head_K1 * num_blocks + chunk.first_block_T[:, None, None] + block_TKN
        slot_P = valid_TKN.flatten().nonzero().squeeze(1)
        # Stable, so that the pairs of a bucket stay in the order of their queries.
        bucket_P, order_P = bucket_TKN.flatten()[slot_P].sort(stable=True)
        slot_P = slot_P[order_P]

        count_B = torch.bincount(bucket_P, minlength=num_kv_heads * num_blocks)
        size = _segment_size(count_B, group)
        begin_B, whole_B = count_B.cumsum(0) - count_B, count_B // size * size
        segments, num_pairs = list[_Segments](), 0
        # Padding is sent to a slot behind the last, which is cut off.
        pair_of_slot = torch.full((valid_TKN.numel() + 1,), -1, device=slot_P.device)
        for first_B, last_B, pairs in (
            (begin_B, begin_B + whole_B, size),
            (begin_B + whole_B, begin_B + count_B, max(1, size // SHORTER)),
        ):
            cut, slot_SP = _Segments.cut(chunk, first_B, last_B, pairs, slot_P, block_TKN, block_size, num_pairs)
            to_SP = slot_SP.masked_fill(cut.padding_SP, valid_TKN.numel())
            pair_of_slot[to_SP.flatten()] = num_pairs + torch.arange(to_SP.numel(), device=slot_P.device)
            segments, num_pairs = [*segments, cut], num_pairs + to_SP.numel()
        pair_TKN = pair_of_slot[:-1].view(valid_TKN.shape)
        return cls(segments, num_pairs, pair_TKN.masked_fill_(pair_TKN < 0, num_pairs))

    def batches(self, chunk: _Chunk, blocks: _Blocks, group: int, like: Tensor) -> Iterator[_Batch]:
        """All segments in batches."""
        for segments in self.segments:
            yield from segments.batches(chunk, blocks, group, like)


def _segment_size(count_B: Tensor, group: int) -> int:
    """Pairs of a segment: about `SEGMENT_ROWS` rows, fewer where buckets hold less, so that padding stays small.

    Of the forward pass of 32,768 tokens that select 16 of 512 blocks 3 % of the pairs are padding; 12 % would be with
    segments of one size.
    """
    used_B = count_B[count_B > 0]
    mean = int(used_B.float().mean()) if len(used_B) else 1
    return max(1, min(SEGMENT_ROWS // group, 1 << max(mean - 1, 0).bit_length()))


def _chunks(layout: SequenceLayout, block_indices: Tensor, block_size: int, max_slots: int) -> Iterator[_Chunk]:
    """All queries, in chunks whose selections have at most `max_slots` slots."""
    size = max(1, max_slots // max(1, block_indices.shape[1] * block_indices.shape[2]))
    first_block_T = layout.blocks(block_size).cu_seqlens[layout.sequence_ids()].long()
    position_T = layout.positions()
    for first in range(0, layout.total_tokens, size):
        at = slice(first, min(first + size, layout.total_tokens))
        yield _Chunk(at, position_T[at], first_block_T[at], block_indices[at])


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: SequenceLayout,
    softmax_scale: float,
) -> AttentionOutput:
    """As `reference.selected_attention`, with key/value blocks in the outer loop."""
    bounds = layout.cu_seqlens, layout.keys.cu_seqlens
    return AttentionOutput(*_selected_attention(q, k, v, block_indices, *bounds, block_size, softmax_scale))


@torch.library.custom_op("flash_sparse_attention::selected_attention_blockwise", mutates_args=())
def _selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    layout, group = layout_of(cu_seqlens, cu_seqlens_k), q.shape[1] // k.shape[1]
    blocks = _Blocks.of(layout, block_size)
    out, lse = empty_outputs(q, v)
    with no_autocast(q):
        k_blocks, v_blocks = blocks.gather(k).mul_(softmax_scale * LOG2_E), blocks.gather(v)
        scratch = Scratch(k_blocks)
        for chunk in _chunks(layout, block_indices, block_size, PARTIAL_SUMS // (group * v.shape[2])):
            index = _InvertedIndex.build(chunk, len(blocks.token_CL), block_size, group)
            q_rows = wide(q[chunk.queries]).reshape(-1, group * q.shape[2])
            if chunk.queries.stop < len(q):
                # Later chunks have more blocks to select from, and memory is slow where it is new.
                scratch.empty("partial out", chunk.block_indices.numel() * 9 // 8, group, v.shape[2])
            partial = _PartialSums.empty(scratch, index.num_pairs, group, v.shape[2])
            for batch in index.batches(chunk, blocks, group, k_blocks):
                q_SRD = scratch.gather("q", q_rows, batch.row_SP, q.shape[2])
                k_SLD = scratch.gather("k", k_blocks, batch.bucket_S, k.shape[2])
                v_SLV = scratch.gather("v", v_blocks, batch.bucket_S, v.shape[2])
                scores_SRL = batch.hide_(scratch.product("scores", q_SRD, k_SLD.mT))
                max_SR = torch.amax(scores_SRL, -1, out=partial.max_PG[batch.pairs].view(scores_SRL.shape[:2]))
                p_SRL = scores_SRL.sub_(max_SR.unsqueeze(-1)).exp2_()
                torch.sum(p_SRL, -1, out=partial.sum_PG[batch.pairs].view(scores_SRL.shape[:2]))
                out_SRV = partial.out_PGV[batch.pairs].view(*scores_SRL.shape[:2], -1)
                torch.bmm(p_SRL, v_SLV, out=out_SRV)
            merged = partial.merge(index.pair_TKN)
            out[chunk.queries], lse[chunk.queries] = merged.out, merged.lse
    return out, lse


class _PartialSums(NamedTuple):
    """The softmax of each pair over its block, before division: maximum (log2 units), sum, weighted sum of the values.

    The row behind the last pair belongs to slots that hold no block.
    """

    out_PGV: Tensor
    max_PG: Tensor
    sum_PG: Tensor

    @classmethod
    def empty(cls, scratch: Scratch, pairs: int, group: int, dim: int) -> "_PartialSums":
        """Room for these pairs of `group` heads."""
        out_PGV = scratch.empty("partial out", pairs + 1, group, dim)
        return cls(out_PGV, *(scratch.empty(name, pairs + 1, group) for name in ("partial max", "partial sum")))

    def merge(self, pair_TKN: Tensor) -> AttentionOutput:
        """The attention of each query over all of its blocks, `[T, K * G, V]` and `[T, K * G]`."""
        group, dim = self.out_PGV.shape[1:]
        self.out_PGV[-1], self.max_PG[-1], self.sum_PG[-1] = 0.0, -math.inf, 0.0
        max_TKNG = self.max_PG[pair_TKN]
        max_TK1G = max_TKNG.amax(2, keepdim=True)
        # A query without a block keeps the maximum -inf, and any finite one serves it.
        weight_TKNG = max_TKNG.sub_(max_TK1G.masked_fill(max_TK1G == -math.inf, 0.0)).exp2_()
        sum_TKG = (self.sum_PG[pair_TKN] * weight_TKNG).sum(2)
        lse_TKG = (max_TK1G.squeeze(2) + sum_TKG.log2()).mul_(LN_2)
        weight_TKNG.div_(sum_TKG.clamp(min=torch.finfo(sum_TKG.dtype).tiny).unsqueeze(2))
        # A bag is a (query, head); it sums its rows as it gathers them, in one pass over memory.
        row_TKGN = pair_TKN.unsqueeze(2) * group + torch.arange(group, device=pair_TKN.device)[:, None]
        out_BV = F.embedding_bag(
            row_TKGN.flatten(0, 2),
            self.out_PGV.view(-1, dim),
            mode="sum",
            per_sample_weights=weight_TKNG.transpose(2, 3).flatten(0, 2),
        )
        return AttentionOutput(out_BV.view(len(pair_TKN), -1, dim), lse_TKG.flatten(1))


@torch.library.custom_op("flash_sparse_attention::selected_attention_blockwise_backward", mutates_args=())
def _selected_attention_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are computed again from lse."""
    layout, softmax = layout_of(cu_seqlens, cu_seqlens_k), Softmax.of(d_out, d_lse, out, lse)
    dq = torch.zeros(q.shape, dtype=wide(q[:0]).dtype, device=q.device)
    with no_autocast(q):
        dk, dv = differentiate_selected(d_out, q, k, v, block_indices, softmax, block_size, layout, softmax_scale, dq)
    return dq.mul_(LN_2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def differentiate_selected(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    softmax: Softmax,
    block_size: int,
    layout: SequenceLayout,
    softmax_scale: float,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, wide. That of q is added to `dq`, which is wide, over ln 2."""
    group, blocks = q.shape[1] // k.shape[1], _Blocks.of(layout, block_size)
    k_blocks, v_blocks = blocks.gather(k).mul_(softmax_scale * LOG2_E), blocks.gather(v)
    dk_blocks, dv_blocks = torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    scratch = Scratch(k_blocks)
    for chunk in _chunks(layout, block_indices, block_size, BACKWARD_SLOTS):
        at = chunk.queries
        index = _InvertedIndex.build(chunk, len(blocks.token_CL), block_size, group)
        q_rows = wide(q[at]).reshape(-1, group * q.shape[2])
        dout_rows = wide(d_out[at]).reshape(-1, group * v.shape[2])
        less_normaliser_rows, less_shift_rows = (x[at].reshape(-1, group) for x in softmax)
        dq_rows = dq[at].view(q_rows.shape)
        for batch in index.batches(chunk, blocks, group, k_blocks):
            q_SRD = scratch.gather("q", q_rows, batch.row_SP, q.shape[2])
            dout_SRV = scratch.gather("dout", dout_rows, batch.row_SP, v.shape[2])
            k_SLD = scratch.gather("k", k_blocks, batch.bucket_S, k.shape[2])
            v_SLV = scratch.gather("v", v_blocks, batch.bucket_S, v.shape[2])
            less_shift_SR1 = scratch.gather("shift", less_shift_rows, batch.row_SP, 1)
            less_normaliser_SR1 = scratch.gather("normaliser", less_normaliser_rows, batch.row_SP, 1)
            # Padding has probability 0.
            padding_SP11 = batch.padding_SP[..., None, None]
            less_normaliser_SR1.unflatten(1, (-1, group)).masked_fill_(padding_SP11, -math.inf)
            p_SRL = batch.clear_(scratch.product("p", q_SRD, k_SLD.mT, plus=less_normaliser_SR1).exp2_())
            ds_SRL = scratch.product("ds", dout_SRV, v_SLV.mT, plus=less_shift_SR1).mul_(p_SRL)
            pairs = batch.row_SP.flatten()
            dv_blocks.index_add_(0, batch.bucket_S, scratch.product("dv", p_SRL.mT, dout_SRV).flatten(1))
            dk_blocks.index_add_(0, batch.bucket_S, scratch.product("dk", ds_SRL.mT, q_SRD).flatten(1))
            # The keys held softmax_scale * log2(e).
            dq_rows.index_add_(0, pairs, scratch.product("dq", ds_SRL, k_SLD).view(len(pairs), -1))
    return blocks.add(dk_blocks.mul_(softmax_scale), k.shape[1]), blocks.add(dv_blocks, k.shape[1])


def _differentiate_selected(ctx, d_out, d_lse):  # type: ignore[no-untyped-def]
    q, k, v, block_indices, *bounds, out, lse = ctx.saved_tensors
    saved = (q, k, v, block_indices, out, lse, *bounds)
    grads = _selected_attention_backward(d_out, d_lse, *saved, *ctx.sizes)
    return (*grads, None, None, None, *(None for _ in ctx.sizes))


_selected_attention.register_fake(lambda q, k, v, *_: empty_outputs(q, v))
_selected_attention_backward.register_fake(
    lambda d_out, d_lse, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
_selected_attention.register_autograd(_differentiate_selected, setup_context=save_attention)
