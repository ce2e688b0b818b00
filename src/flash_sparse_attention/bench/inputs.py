"""Inputs of benchmarks: random tensors, random selections, and those that a trained model made."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import geometry
from .shapes import Shape

_TOKENS_AT_ONCE = 2048


class Inputs(NamedTuple):
    """q `[N, Hq, Dk]`, k `[N, Hk, Dk]`, v `[N, Hk, Dv]`, gates `[N, Hq, 3]` before the sigmoid; all want gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor


def draw(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Normal random numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = (
        (shape.heads, shape.head_dim),
        (shape.kv_heads, shape.head_dim),
        (shape.kv_heads, shape.head_dim_v),
        (shape.heads, 3),
    )
    options: dict[str, Any] = {"device": device, "dtype": shape.dtype, "generator": generator}
    return Inputs(*(torch.randn(shape.tokens, *size, **options).requires_grad_() for size in sizes))


def random_selection(shape: Shape, device: torch.device, seed: int = 0) -> Tensor:
    """Forced blocks as the specification has them, the others drawn from all blocks before the query.

    Returns:
        int32 `[N, Hk, T]`, ascending, -1 where there are no more blocks.
    """
    nsa, generator = shape.nsa, torch.Generator(device).manual_seed(seed)
    slots = nsa.num_selected_blocks
    blocks = torch.arange(geometry.num_blocks(shape.tokens, nsa.block_size), device=device)
    width = max(len(blocks), slots)
    parts = []
    for first in range(0, shape.tokens, _TOKENS_AT_ONCE):
        token = torch.arange(first, min(first + _TOKENS_AT_ONCE, shape.tokens), device=device)[:, None]
        eligible = blocks < geometry.num_eligible_blocks(token, nsa.block_size)
        local = blocks >= geometry.first_local_block(token, nsa.block_size, nsa.num_local_blocks)
        ranking = torch.rand(len(token), shape.kv_heads, width, device=device, generator=generator)
        ranking[..., : len(blocks)] += ((blocks < nsa.num_init_blocks) | local)[:, None]
        ranking[..., : len(blocks)].masked_fill_(~eligible[:, None], -1.0)
        ranking[..., len(blocks) :] = -1.0
        top = ranking.topk(slots, -1)
        unused = len(blocks)
        chosen = top.indices.masked_fill(top.values < 0, unused).sort(-1).values
        parts.append(chosen.masked_fill(chosen == unused, -1).int())
    return torch.cat(parts)
