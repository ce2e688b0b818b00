"""The specification in PyTorch: dense, in any dtype up to float64, differentiated by autograd.

Nothing here is fast, and memory grows with N^2. It is meant to be read from top to bottom, and every other
implementation is held against it. Scores, softmax and sums are float32 or better; probabilities are rounded to the
dtype of the inputs before they meet the values, as matrix units want them, so that the same code in bf16 tells how
exact plain PyTorch is and in float64 what is right.

Shape suffixes: T query tokens, S key tokens (or compressed tokens), H query heads, K key/value heads, G query heads of
a group, D head dimension, V head dimension of the values, M compressed tokens, L tokens of a window, E hidden width,
J blocks, X branches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import geometry
from ..config import NSAConfig
from ..geometry import Interval
from ..precision import wide
from ..types import AttentionOutput, Compression, KVPages, NSAOutput, SequenceLayout


def compress(
    x: Tensor, compression: Compression, kernel_size: int, kernel_stride: int, layout: SequenceLayout
) -> Tensor:
    """Compressed token i of a sequence summarises its tokens [i * d, i * d + l). `[N, K, D]` -> `[M, K, D]`."""
    starts_M = layout.window_starts(kernel_size, kernel_stride)
    tokens_ML = starts_M[:, None] + torch.arange(kernel_size, device=x.device)
    x_MLKD = wide(x)[tokens_ML]
    if compression.position_embedding is not None:
        x_MLKD = x_MLKD + wide(compression.position_embedding)[:, None]
    if compression.kind == "mean":
        return x_MLKD.mean(1).to(x.dtype)
    weight = wide(_given(compression.weight))
    if compression.kind == "weighted":
        return torch.einsum("mlkd,kl->mkd", x_MLKD, weight).to(x.dtype)
    flat_MKW = x_MLKD.transpose(1, 2).flatten(2)
    hidden_MKE = torch.einsum("mkw,kwe->mke", flat_MKW, weight)
    if compression.kind == "linear":
        return hidden_MKE.to(x.dtype)
    hidden_MKE = F.gelu(hidden_MKE + _bias(compression.bias))
    out_MKD = torch.einsum("mke,ked->mkd", hidden_MKE, wide(_given(compression.weight_out)))
    return (out_MKD + _bias(compression.bias_out)).to(x.dtype)


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, interval: Interval, layout: SequenceLayout, softmax_scale: float
) -> AttentionOutput:
    """Query t attends to the keys [start(t), end(t)) of its own sequence."""
    keys = layout.compressed(interval.kernel_size, interval.kernel_stride)
    pos_T, pos_S = layout.positions()[:, None], keys.positions()[None, :]
    same_TS = layout.sequence_ids()[:, None] == keys.sequence_ids()[None, :]
    visible_TS = same_TS & (interval.start(pos_T) <= pos_S) & (pos_S < interval.end(pos_T))
    return _masked_attention(q, k, v, visible_TS[:, None, :], softmax_scale)


def block_importance(
    q: Tensor,
    k_compressed: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    layout: SequenceLayout,
    softmax_scale: float,
) -> Tensor:
    """importance[t, kv, j]: probability of the compressed tokens that overlap block j, summed over the heads."""
    keys = layout.compressed(kernel_size, kernel_stride)
    interval = Interval(kernel_size, kernel_stride)
    pos_T, pos_S = layout.positions()[:, None], keys.positions()
    same_TS = layout.sequence_ids()[:, None] == keys.sequence_ids()[None, :]
    visible_TS = same_TS & (pos_S[None, :] < interval.end(pos_T))
    scores_TKGS = _scores(q, k_compressed, softmax_scale)
    lse_TKG1 = lse.reshape(scores_TKGS.shape[:3]).unsqueeze(-1).to(scores_TKGS.dtype)
    p_TKGS = (scores_TKGS - lse_TKG1).exp().where(visible_TS[:, None, None, :], 0.0)
    blocks_J = torch.arange(geometry.num_blocks(layout.keys.max_length, block_size), device=q.device)
    overlap_SJ = geometry.overlap(pos_S[:, None], blocks_J[None, :], kernel_size, kernel_stride, block_size)
    return torch.einsum("tkgs,sj->tkj", p_TKGS, overlap_SJ.to(p_TKGS.dtype))


def select_blocks(
    q: Tensor,
    k_compressed: Tensor,
    lse: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
    layout: SequenceLayout,
    softmax_scale: float,
) -> Tensor:
    """The T blocks that each (token, kv head) keeps, int32 `[N, K, T]`, ascending, -1 in unused slots."""
    importance_TKJ = block_importance(
        q.detach(), k_compressed.detach(), lse.detach(), kernel_size, kernel_stride, block_size, layout, softmax_scale
    )
    pos_T11 = layout.positions()[:, None, None]
    blocks_J = torch.arange(importance_TKJ.shape[-1], device=q.device)
    eligible_T1J = blocks_J < geometry.num_eligible_blocks(pos_T11, block_size)
    local_T1J = blocks_J >= geometry.first_local_block(pos_T11, block_size, num_local_blocks)
    forced_T1J = (blocks_J < num_init_blocks) | local_T1J
    ranking_TKJ = importance_TKJ.where(~forced_T1J, math.inf).where(eligible_T1J, -math.inf)
    # A stable sort keeps the lower block where two tie.
    ordered = torch.sort(ranking_TKJ, dim=-1, descending=True, stable=True)
    chosen = ordered.indices.masked_fill(ordered.values == -math.inf, blocks_J.numel())[..., :num_selected_blocks]
    chosen = F.pad(chosen.sort(-1).values, (0, num_selected_blocks - chosen.shape[-1]), value=blocks_J.numel())
    return chosen.masked_fill(chosen == blocks_J.numel(), -1).to(torch.int32)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: SequenceLayout,
    softmax_scale: float,
) -> AttentionOutput:
    """Query t of head h attends to the tokens s <= t whose block is among block_indices[t, h // G]."""
    pos_T1, pos_S = layout.positions()[:, None], layout.keys.positions()
    blocks = geometry.num_blocks(layout.keys.max_length, block_size)
    # Column `blocks` collects the indices that name no block.
    named = block_indices.long().masked_fill((block_indices < 0) | (block_indices >= blocks), blocks)
    selected_TKJ = torch.zeros(*named.shape[:2], blocks + 1, dtype=torch.bool, device=q.device)
    selected_TKJ = selected_TKJ.scatter(2, named, True)
    same_TS = layout.sequence_ids()[:, None] == layout.keys.sequence_ids()
    causal_TS = same_TS & (pos_S <= pos_T1)
    visible_TKS = selected_TKJ[..., geometry.block_of(pos_S, block_size)] & causal_TS[:, None]
    return _masked_attention(q, k, v, visible_TKS, softmax_scale)


def combine(out_compressed: Tensor, out_selected: Tensor, out_window: Tensor, gates: Tensor) -> Tensor:
    """Sum over the branches of sigmoid(gate) times the branch's output. gates: `[N, H, 3]` or `[N, 1, 3]`."""
    outs_THVX = torch.stack([out_compressed, out_selected, out_window], dim=-1)
    return (wide(outs_THVX) * wide(gates).sigmoid()[:, :, None]).sum(-1).to(out_window.dtype)


def nsa_attention_with_kvcache(
    q: Tensor, gates: Tensor, pages: KVPages, config: NSAConfig, softmax_scale: float
) -> NSAOutput:
    """The new tokens `[B, T, H, D]` are the last ones of their sequences: the operators in a row, sequence by sequence.

    Token i of sequence b stands at position seq_lens[b] - T + i; one at a negative position sees nothing.
    Every token has a page here.
    """
    q, gates, pages = q.detach(), gates.detach(), pages.within_capacity()
    tokens, windows = q.shape[1], Interval(config.kernel_size, config.kernel_stride)
    out = q.new_zeros(*q.shape[:3], pages.v.shape[-1])
    indices = torch.full((*q.shape[:2], pages.k.shape[2], config.num_selected_blocks), -1, device=q.device)
    for b, length in enumerate(pages.seq_lens.tolist()):
        asked = min(tokens, length)
        if asked == 0:
            continue
        keys = SequenceLayout.uniform(1, length, q.device)
        layout = SequenceLayout.uniform(1, asked, q.device).after(keys)
        here, sequence = slice(tokens - asked, None), torch.tensor(b, device=q.device)
        place = pages.place(sequence, torch.arange(length, device=q.device))
        k, v, k_window, v_window = (
            x[place.page, place.row] for x in (pages.k, pages.v, pages.k_window, pages.v_window)
        )
        window_M = torch.arange(windows.num_keys(length), device=q.device)
        place = pages.compressed_place(sequence, window_M, config.kernel_size, config.kernel_stride)
        k_compressed, v_compressed = (x[place.page, place.row] for x in (pages.k_compressed, pages.v_compressed))
        q_b = q[b, here]
        compressed = interval_attention(q_b, k_compressed, v_compressed, windows, layout, softmax_scale)
        chosen = select_blocks(
            q_b, k_compressed, compressed.lse, config.kernel_size, config.kernel_stride, config.block_size,
            config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks, layout, softmax_scale,
        )  # fmt: skip
        selected = selected_attention(q_b, k, v, chosen, config.block_size, layout, softmax_scale)
        recent = Interval(window_size=config.window_size)
        window = interval_attention(q_b, k_window, v_window, recent, layout, softmax_scale)
        out[b, here] = combine(compressed.out, selected.out, window.out, gates[b, here])
        indices[b, here] = chosen.long()
    return NSAOutput(out, indices.to(torch.int32))


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible_TKS: Tensor, softmax_scale: float) -> AttentionOutput:
    """Softmax attention over the visible keys; output 0, lse -inf and gradient 0 where a query sees none."""
    scores_TKGS = _scores(q, k, softmax_scale)
    visible_TKGS = visible_TKS.unsqueeze(2)
    blind_TKG1 = ~visible_TKGS.any(-1, keepdim=True)
    # Rows without a key get finite scores, so that neither softmax nor its gradient makes a NaN, and are cleared later.
    scores_TKGS = scores_TKGS.masked_fill(~visible_TKGS, -math.inf).masked_fill(blind_TKG1, 0.0)
    lse_TKG1 = scores_TKGS.logsumexp(-1, keepdim=True)
    p_TKGS = (scores_TKGS - lse_TKG1).exp().masked_fill(blind_TKG1, 0.0)
    out_TKGV = torch.einsum("tkgs,skv->tkgv", wide(p_TKGS.to(v.dtype)), wide(v))
    lse = lse_TKG1.masked_fill(blind_TKG1, -math.inf).reshape(q.shape[:2])
    return AttentionOutput(out_TKGV.reshape(*q.shape[:2], v.shape[-1]).to(q.dtype), lse)


def _scores(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """softmax_scale * q . k for every pair, `[T, K, G, S]`; query head h belongs to key/value head h // G."""
    q_TKGD = wide(q).unflatten(1, (k.shape[1], -1))
    return torch.einsum("tkgd,skd->tkgs", q_TKGD, wide(k)) * softmax_scale


def _given(x: Tensor | None) -> Tensor:
    assert x is not None, "validated at the public boundary"
    return x


def _bias(x: Tensor | None) -> Tensor | float:
    return 0.0 if x is None else wide(x)
