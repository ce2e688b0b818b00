"""Inputs of selected attention that the Triton kernels are tested on, in the interpreter and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_sparse_attention import NSAConfig


def config(block_size: int, slots: int) -> NSAConfig:
    """Sizes of which only the blocks and the slots matter here; nothing is forced but the newest block."""
    return NSAConfig(
        kernel_size=8,
        kernel_stride=8,
        block_size=block_size,
        num_selected_blocks=slots,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=8,
    )


def random_selection(tokens: int, num_kv_heads: int, slots: int, blocks: int, device: str = "cpu") -> Tensor:
    """Entries from -2 to past the last block, in any order and repeated: int32 `[N, Hk, T]`."""
    return torch.randint(-2, blocks + 2, (tokens, num_kv_heads, slots), dtype=torch.int32, device=device)


def selected_rows(
    q_rows: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """out and lse of some tokens of one sequence, in float64, by the definition; nothing grows with the sequence."""
    group = q_rows.shape[1] // k.shape[1]
    blocks = block_indices[rows].long()  # [R, K, T]
    valid = (blocks >= 0) & (blocks <= (rows // block_size)[:, None, None])
    ordered, order = blocks.masked_fill(~valid, -1).sort(-1)
    repeated = torch.zeros_like(valid)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    valid = valid & ~torch.zeros_like(valid).scatter(-1, order, repeated)
    key = blocks.unsqueeze(-1) * block_size + torch.arange(block_size, device=k.device)
    visible = (valid.unsqueeze(-1) & (key <= rows[:, None, None, None])).flatten(2)  # [R, K, T * L]
    key = key.flatten(2).clamp(0, len(k) - 1)
    head = torch.arange(k.shape[1], device=k.device)[None, :, None]
    q_RKGD = q_rows.double().unflatten(1, (k.shape[1], group))
    scores_RKGS = torch.einsum("rkgd,rksd->rkgs", q_RKGD, k[key, head].double()) * k.shape[-1] ** -0.5
    scores_RKGS = scores_RKGS.masked_fill(~visible.unsqueeze(2), -torch.inf)
    lse = scores_RKGS.logsumexp(-1)
    p_RKGS = (scores_RKGS - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = torch.einsum("rkgs,rksv->rkgv", p_RKGS, v[key, head].double())
    return out.flatten(1, 2), lse.flatten(1, 2)
