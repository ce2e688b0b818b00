"""Numbers from recorded attention: which blocks queries select and how far back, and how open the gates are.

A record holds one sequence, so token t stands at position t. The drawings are in `plots`.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import geometry
from .nn.attention import BRANCHES, AttentionRecord
from .validation import FLOAT_DTYPES, check_positive, check_tensor

_SELECTION_SHAPE: dict[str, int | None] = {"N": None, "Hk": None, "T": None}


class Category(enum.IntEnum):
    """What a block is to a query, the codes of `selection_map`."""

    FUTURE = 0
    """Behind the causal frontier: it starts after the query."""
    UNUSED = 1
    """Eligible and not selected."""
    INIT = 2
    """Selected, and forced: one of the first blocks."""
    LOCAL = 3
    """Selected, and forced: one of the newest blocks, and none of the first."""
    CHOSEN = 4
    """Selected for its score."""


class Distances(NamedTuple):
    """How far back the blocks lie that score chose, for each KV head; the distance of a forced block is not counted.

    Attributes:
        shares: float64 `[Hk, J]`, the share of the chosen blocks that lie j blocks before the block of their query;
            a row sums to 1, or to 0 where nothing was chosen.
        mean: float64 `[Hk]`, mean distance in blocks; NaN where nothing was chosen.
        per_query: float64 `[Hk]`, mean number of blocks that a query chose.
    """

    shares: Tensor
    mean: Tensor
    per_query: Tensor


def selection_map(block_indices: Tensor, *, block_size: int, num_init_blocks: int, num_local_blocks: int) -> Tensor:
    """What every block is to every query, as codes of `Category`.

    Args:
        block_indices: int32 `[N, Hk, T]`, the selection of the N tokens of one sequence. Entries that are negative, out
            of range or in the future count as unused, as they do in `selected_attention`.
        block_size: l', tokens of a block.
        num_init_blocks: first blocks that the selection was forced to keep.
        num_local_blocks: newest blocks that it was forced to keep, the query's own included.

    Returns:
        uint8 `[Hk, N, J]` on the CPU, J = ceil(N / l') blocks.

    Raises:
        ValueError: for a wrong shape, dtype or size.

    Example:
        Four tokens in blocks of 1, one block forced at either end; the last query chose block 1.

        >>> indices = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 1, 3]], dtype=torch.int32)
        >>> selection_map(indices[:, None], block_size=1, num_init_blocks=1, num_local_blocks=1)[0].tolist()
        [[2, 0, 0, 0], [2, 3, 0, 0], [2, 1, 3, 0], [2, 4, 1, 3]]
    """
    check_tensor("block_indices", block_indices, _SELECTION_SHAPE, (torch.int32,))
    check_positive("block_size", block_size)
    check_positive("num_init_blocks", num_init_blocks, 0)
    check_positive("num_local_blocks", num_local_blocks, 0)
    tokens, kv_heads, _ = block_indices.shape
    blocks = geometry.num_blocks(tokens, block_size)
    named_NHT = block_indices.detach().cpu().long()
    # Column `blocks` collects the indices that name no block.
    named_NHT = named_NHT.masked_fill((named_NHT < 0) | (named_NHT >= blocks), blocks)
    selected_NHJ = torch.zeros(tokens, kv_heads, blocks + 1, dtype=torch.bool).scatter(2, named_NHT, True)[..., :-1]
    pos_N11, blocks_J = torch.arange(tokens)[:, None, None], torch.arange(blocks)
    first_local_N11 = geometry.first_local_block(pos_N11, block_size, num_local_blocks)
    codes = torch.full((tokens, kv_heads, blocks), int(Category.UNUSED), dtype=torch.uint8)
    codes.masked_fill_(selected_NHJ, int(Category.CHOSEN))
    codes.masked_fill_(selected_NHJ & (blocks_J >= first_local_N11), int(Category.LOCAL))
    codes.masked_fill_(selected_NHJ & (blocks_J < num_init_blocks), int(Category.INIT))
    codes.masked_fill_(blocks_J >= geometry.num_eligible_blocks(pos_N11, block_size), int(Category.FUTURE))
    return codes.transpose(0, 1)


def chosen_distances(codes: Tensor, *, block_size: int) -> Distances:
    """How far back the chosen blocks lie.

    Args:
        codes: of `selection_map`, uint8 `[Hk, N, J]`.
        block_size: l', tokens of a block.

    Example:
        >>> codes = torch.tensor([[[2, 0], [3, 0], [4, 3], [4, 3]]], dtype=torch.uint8)
        >>> distances = chosen_distances(codes, block_size=2)
        >>> distances.shares.tolist(), distances.mean.tolist(), distances.per_query.tolist()
        ([[0.0, 1.0]], [1.0], [0.5])
    """
    check_tensor("codes", codes, {"Hk": None, "N": None, "J": None}, (torch.uint8,))
    kv_heads, tokens, blocks = codes.shape
    counts = torch.zeros(kv_heads, blocks, dtype=torch.float64)
    for head in range(kv_heads):
        token, block = (codes[head] == Category.CHOSEN).nonzero(as_tuple=True)
        counts[head] = torch.bincount(geometry.block_of(token, block_size) - block, minlength=blocks)
    chosen = counts.sum(1)
    shares = counts / chosen.clamp(min=1)[:, None]
    mean = (counts @ torch.arange(blocks, dtype=torch.float64)) / chosen
    return Distances(shares, mean, chosen / max(tokens, 1))


def mean_gates(gates: Tensor) -> Tensor:
    """Mean over the tokens of gates after the sigmoid, `[N, Hq, 3]` (or `[N, 1, 3]`): float64 `[Hq, 3]` on the CPU."""
    check_tensor("gates", gates, {"N": None, "Hq": None, "branches": len(BRANCHES)}, FLOAT_DTYPES)
    return gates.detach().cpu().double().mean(0)


def summarize(
    records: Mapping[str, AttentionRecord], *, block_size: int, num_init_blocks: int, num_local_blocks: int
) -> dict[str, Any]:
    """The numbers of every layer, of types that JSON knows.

    Args:
        records: of `nn.record_attention`, over one sequence.
        block_size: l', tokens of a block.
        num_init_blocks: first blocks that the selection was forced to keep.
        num_local_blocks: newest blocks that it was forced to keep, the query's own included.

    Returns:
        Name of the layer -> `gates`: mean by branch, for each query head (one for `[N, 1, 3]`); `chosen`: for each KV
        head `per_query` (blocks), `mean_distance` (blocks, None if nothing was chosen) and `share_by_distance`, whose
        entry j is the share of the chosen blocks that lie j blocks before the block of their query.

    Raises:
        ValueError: for a record of a wrong shape or dtype.
    """
    summary = {}
    for name, record in records.items():
        indices = check_tensor("block_indices", record.block_indices, _SELECTION_SHAPE, (torch.int32,))
        chosen = []
        # One head at a time, as a map has N x J entries.
        for of_head in indices.split(1, dim=1):
            codes = selection_map(
                of_head, block_size=block_size, num_init_blocks=num_init_blocks, num_local_blocks=num_local_blocks
            )
            distances = chosen_distances(codes, block_size=block_size)
            mean = distances.mean.item()
            chosen.append(
                {
                    "per_query": distances.per_query.item(),
                    "mean_distance": None if math.isnan(mean) else mean,
                    "share_by_distance": distances.shares[0].tolist(),
                }
            )
        gates = [dict(zip(BRANCHES, head, strict=True)) for head in mean_gates(record.gates).tolist()]
        summary[name] = {"gates": gates, "chosen": chosen}
    return summary


def layer_labels(names: Iterable[str]) -> list[str]:
    """`layer 3` for `blocks.3.attention` where such numbers tell the layers apart, the names themselves otherwise.

    >>> layer_labels(["layers.0.self_attn", "layers.1.self_attn"]), layer_labels(["encoder.0", "decoder.0"])
    (['layer 0', 'layer 1'], ['encoder.0', 'decoder.0'])
    """
    names = list(names)
    numbers = [re.findall(r"\d+", name) for name in names]
    if all(len(found) == 1 for found in numbers) and len({found[0] for found in numbers}) == len(names):
        return [f"layer {found[0]}" for found in numbers]
    return names
