"""The whole attention of a few new tokens over a cache: what they select is gathered, nothing else is read.

Shape suffixes: B sequences, T new tokens of each, Q all new tokens, K key/value heads, G query heads of a group, R rows
(token, head of the group), S keys, D head dimension, V head dimension of the values, M compressed tokens, N slots.
"""

import math

import torch
from torch import Tensor

from ... import geometry
from ...config import NSAConfig
from ...geometry import Interval
from ...precision import no_autocast, wide
from ...types import KVPages, NSAOutput, Place
from .block_selection import keep_largest, overlaps_of, shared_chunks
from .combine import combine
from .common import SCORE_TILE


def nsa_attention_with_kvcache(
    q: Tensor, gates: Tensor, pages: KVPages, config: NSAConfig, softmax_scale: float
) -> NSAOutput:
    """As `reference.nsa_attention_with_kvcache`, a few tokens at a time. No gradients."""
    q, gates, pages = q.detach(), gates.detach(), pages.within_capacity()
    batch, tokens, num_heads, _ = q.shape
    longest = int(pages.seq_lens.max())
    keys = max(longest // config.kernel_stride, config.num_selected_blocks * config.block_size, config.window_size, 1)
    step = max(1, 4 * SCORE_TILE // (batch * num_heads * keys))
    first_BT = (pages.seq_lens.long() - tokens)[:, None]
    parts = []
    with no_autocast(q):
        for begin in range(0, tokens, step):
            at = slice(begin, min(begin + step, tokens))
            position_BT = first_BT + torch.arange(at.start, at.stop, device=q.device)
            parts.append(_attend_some(q[:, at], gates[:, at], position_BT, longest, pages, config, softmax_scale))
    return NSAOutput(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def store_rows(
    pairs: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Place]], by: tuple[Tensor, Tensor] | None
) -> None:
    """Writes keys and values to their places in pools; what has no place is dropped.

    Args:
        pairs: at most three of (pools of keys and values `[P, rows, Hk, D]`, keys and values `[N, Hk, D]`, places),
            of the same N, heads and channels. No two rows may have the same place.
        by: cosine and sine `[N, D / 2]` by which keys are rotated first.
    """
    for pools, rows, place in pairs:
        if by is not None:
            (cos, sin), (first, second) = (x[:, None] for x in by), wide(rows[0]).chunk(2, -1)
            rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            rows = rotated.to(rows[0].dtype), rows[1]
        page, row = place.page, place.row
        if not place.exists.all():
            page, row = page[place.exists], row[place.exists]
            rows = rows[0][place.exists], rows[1][place.exists]
        for pool, x in zip(pools, rows, strict=True):
            pool[page, row] = x


def gather_windows(
    tails: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], tail: Place, new: Tensor, is_new: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens of windows, keys and values `[W * L, Hk, D]`, of which some are kept and others new.

    Args:
        tails: pools `[P, rows, Hk, D]` of those that are kept.
        rows: the new keys and values `[N, Hk, D]`.
        tail: where a token is kept, `[W, L]`.
        new: which of the new ones it is, `[W, L]`.
        is_new: whether it is a new one.
    """
    chosen = is_new[..., None, None]
    pairs = zip(tails, rows, strict=True)
    k, v = (torch.where(chosen, x[new], old[tail.page, tail.row]).flatten(0, 1) for old, x in pairs)
    return k, v


def _attend_some(
    q_BTHD: Tensor,
    gates_BTHX: Tensor,
    position_BT: Tensor,
    longest: int,
    pages: KVPages,
    config: NSAConfig,
    softmax_scale: float,
) -> NSAOutput:
    """The attention of tokens at these positions; one at a negative position sees nothing."""
    batch, tokens, num_heads, _ = q_BTHD.shape
    num_kv_heads, dim_v = pages.v.shape[2:]
    num_blocks = max(1, geometry.num_blocks(longest, config.block_size))
    q_BTKGD = (wide(q_BTHD) * softmax_scale).unflatten(2, (num_kv_heads, -1))
    position_Q = position_BT.flatten()
    sequence_Q = torch.arange(batch, device=q_BTHD.device).repeat_interleave(tokens)

    def rows(out: Tensor) -> Tensor:
        """`[X, K, R, V]` with (token, head) in some order of X and R -> `[Q, H, V]`, rounded."""
        out_BKTGV = out.reshape(batch, num_kv_heads, tokens, -1, dim_v)
        return out_BKTGV.transpose(1, 2).reshape(batch * tokens, num_heads, dim_v).to(q_BTHD.dtype)

    # Compressed: all tokens of a sequence see its compressed tokens, so they are rows of one product.
    interval = Interval(config.kernel_size, config.kernel_stride)
    window_M = torch.arange(interval.num_keys(longest), device=q_BTHD.device)
    sequence_B1 = torch.arange(batch, device=q_BTHD.device)[:, None]
    place = pages.compressed_place(sequence_B1, window_M[None], config.kernel_size, config.kernel_stride)
    visible_BTM = (window_M < interval.end(position_BT)[..., None]) & place.exists[:, None]
    q_BKRD = q_BTKGD.transpose(1, 2).flatten(2, 3)
    visible_B1RM = visible_BTM.repeat_interleave(num_heads // num_kv_heads, 1)[:, None]
    k, v = (_there(x[place.page, place.row], place).transpose(1, 2) for x in (pages.k_compressed, pages.v_compressed))
    out_compressed, p_BKRM = _attend(q_BKRD, k, v, visible_B1RM)

    # Selection, from the probabilities summed over the heads of a group.
    p_KQM = p_BKRM.unflatten(2, (tokens, -1)).sum(3).transpose(0, 1).flatten(1, 2)
    sizes = config.kernel_size, config.kernel_stride, config.block_size
    before = config.kernel_size // config.kernel_stride - 1
    columns = before + num_blocks * (config.block_size // config.kernel_stride)
    p_KQM = torch.nn.functional.pad(p_KQM, (before, max(0, columns - before - p_KQM.shape[-1])))
    importance_KQJ = p_KQM.new_zeros(*p_KQM.shape[:2], num_blocks)
    shared_chunks(p_KQM, overlaps_of(*sizes), config.block_size // config.kernel_stride, importance_KQJ)
    chosen_KQN = keep_largest(
        importance_KQJ, position_Q, config.block_size, config.num_init_blocks, config.num_local_blocks,
        config.num_selected_blocks,
    )  # fmt: skip

    # Selected: each (token, kv head) has keys of its own.
    token_KQS = geometry.first_token_of_block(chosen_KQN, config.block_size)[..., None] + torch.arange(
        config.block_size, device=q_BTHD.device
    )
    token_KQS = token_KQS.masked_fill((chosen_KQN < 0)[..., None], -1).flatten(2)
    place = pages.place(sequence_Q[:, None], token_KQS)
    visible_KQS = (token_KQS <= position_Q[:, None]) & place.exists
    head_K11 = torch.arange(num_kv_heads, device=q_BTHD.device)[:, None, None]
    k, v = (_there(x[place.page, place.row, head_K11], place).transpose(0, 1) for x in (pages.k, pages.v))
    q_QKGD = q_BTKGD.flatten(0, 1)
    selected, _ = _attend(q_QKGD, k, v, visible_KQS.transpose(0, 1)[:, :, None])

    # Window: each token has keys of its own.
    token_QS = position_Q[:, None] - torch.arange(config.window_size, device=q_BTHD.device)
    place = pages.place(sequence_Q[:, None], token_QS)
    k, v = (_there(x[place.page, place.row], place).transpose(1, 2) for x in (pages.k_window, pages.v_window))
    window, _ = _attend(q_QKGD, k, v, place.exists[:, None, None])

    # A token that stands nowhere may have any gates.
    gates_QHX = gates_BTHX.flatten(0, 1).masked_fill((position_Q < 0)[:, None, None], 0.0)
    out_selected, out_window = (x.flatten(1, 2).to(q_BTHD.dtype) for x in (selected, window))
    out = combine(rows(out_compressed), out_selected, out_window, gates_QHX)
    indices = chosen_KQN.transpose(0, 1).to(torch.int32)
    return NSAOutput(*(x.unflatten(0, (batch, tokens)) for x in (out, indices)))


def _there(x: Tensor, place: Place) -> Tensor:
    """`x` with 0 where there is no token: memory that nobody wrote may hold NaN."""
    return x.masked_fill(~place.exists.view(*place.exists.shape, *(1 for _ in x.shape[place.exists.dim() :])), 0.0)


def _attend(q_XKRD: Tensor, k_XKSD: Tensor, v_XKSV: Tensor, visible_XKRS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the visible keys, and its probabilities; 0 where none is visible. q is scaled."""
    scores_XKRS = (q_XKRD @ wide(k_XKSD).mT).masked_fill(~visible_XKRS, -math.inf)
    if not scores_XKRS.shape[-1]:
        return scores_XKRS @ wide(v_XKSV), scores_XKRS
    largest = scores_XKRS.amax(-1, keepdim=True)
    p_XKRS = (scores_XKRS - largest.masked_fill(largest == -math.inf, 0.0)).exp()
    p_XKRS = p_XKRS / p_XKRS.sum(-1, keepdim=True).clamp(min=torch.finfo(p_XKRS.dtype).tiny)
    return p_XKRS @ wide(v_XKSV), p_XKRS
