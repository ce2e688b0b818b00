"""The specification in plain Python loops over lists of floats: slow, and independent of the package.

Tensors come in as nested lists, `x[token][head][component]`; results are nested lists. A pack is given by the lengths
of its sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

Vector = list[float]
Rows = list[list[Vector]]  # [token][head][component]


def tokens_of(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """(index in the pack, sequence, position in the sequence) of every token."""
    index = 0
    for sequence, length in enumerate(lengths):
        for position in range(length):
            yield index, sequence, position
            index += 1


def windows_of(lengths: list[int], kernel_size: int, kernel_stride: int) -> list[tuple[int, list[int]]]:
    """(sequence, positions of its tokens) of every compression window, sequence after sequence."""
    windows = []
    for sequence, length in enumerate(lengths):
        start = 0
        while start + kernel_size <= length:
            windows.append((sequence, list(range(start, start + kernel_size))))
            start += kernel_stride
    return windows


def compress(
    x: Rows, lengths: list[int], kernel_size: int, kernel_stride: int, summarise: Callable[[list[Vector], int], Vector]
) -> Rows:
    """`summarise(vectors of the window, head)` for every window."""
    place = {(sequence, position): index for index, sequence, position in tokens_of(lengths)}
    heads = range(len(x[0])) if x else range(0)
    return [
        [summarise([x[place[sequence, p]][head] for p in positions], head) for head in heads]
        for sequence, positions in windows_of(lengths, kernel_size, kernel_stride)
    ]


def mean(vectors: list[Vector], head: int) -> Vector:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def matmul(row: Vector, matrix: list[Vector]) -> Vector:
    return [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*matrix, strict=True)]


def gelu(value: float) -> float:
    return 0.5 * value * (1 + math.erf(value / math.sqrt(2)))


def attend(q: Vector, keys: list[Vector], values: list[Vector], scale: float, width: int) -> tuple[Vector, float]:
    """Softmax attention of one query: its output, and the logarithm of the sum of exponentials."""
    if not keys:
        return [0.0] * width, -math.inf
    scores = [scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    out = [sum(w * v[c] for w, v in zip(weights, values, strict=True)) / total for c in range(width)]
    return out, top + math.log(total)


def attention(
    q: Rows,
    k: Rows,
    v: Rows,
    lengths: list[int],
    scale: float,
    width: int,
    visible: Callable[[int, int, int], list[int]],
) -> tuple[Rows, list[Vector]]:
    """Every query t of head h attends to the keys `visible(index of t, sequence, position, kv head)`."""
    outs, lses = [], []
    for index, sequence, position in tokens_of(lengths):
        out_of_token, lse_of_token = [], []
        for head, query in enumerate(q[index]):
            kv_head = head // (len(q[index]) // len(k[0])) if k else 0
            seen = visible(index, sequence, position, kv_head)
            out, lse = attend(query, [k[s][kv_head] for s in seen], [v[s][kv_head] for s in seen], scale, width)
            out_of_token.append(out)
            lse_of_token.append(lse)
        outs.append(out_of_token)
        lses.append(lse_of_token)
    return outs, lses


def visible_windows(lengths: list[int], kernel_size: int, kernel_stride: int) -> Callable[..., list[int]]:
    """Only windows that lie wholly at or before the query."""
    windows = windows_of(lengths, kernel_size, kernel_stride)

    def visible(index: int, sequence: int, position: int, kv_head: int) -> list[int]:
        return [i for i, (owner, tokens) in enumerate(windows) if owner == sequence and max(tokens) <= position]

    return visible


def visible_recent(lengths: list[int], window_size: int) -> Callable[..., list[int]]:
    """The newest `window_size` tokens, the query's own included."""
    tokens = list(tokens_of(lengths))

    def visible(index: int, sequence: int, position: int, kv_head: int) -> list[int]:
        return [s for s, owner, at in tokens if owner == sequence and 0 <= position - at < window_size]

    return visible


def visible_selected(
    lengths: list[int], block_indices: list[list[list[int]]], block_size: int
) -> Callable[..., list[int]]:
    """The tokens s <= t whose block is among those selected."""
    tokens = list(tokens_of(lengths))

    def visible(index: int, sequence: int, position: int, kv_head: int) -> list[int]:
        chosen = block_indices[index][kv_head]
        return [s for s, owner, at in tokens if owner == sequence and at <= position and at // block_size in chosen]

    return visible


def select(
    q: Rows,
    k_compressed: Rows,
    lengths: list[int],
    scale: float,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    num_selected_blocks: int,
    num_init_blocks: int,
    num_local_blocks: int,
) -> list[list[list[int]]]:
    """The blocks that every token and kv head keeps, -1 in unused slots."""
    windows = windows_of(lengths, kernel_size, kernel_stride)
    sees = visible_windows(lengths, kernel_size, kernel_stride)
    selection = []
    for index, sequence, position in tokens_of(lengths):
        kv_heads = len(k_compressed[0]) if k_compressed else 1
        group = len(q[index]) // kv_heads
        of_token = []
        for kv_head in range(kv_heads):
            seen = sees(index, sequence, position, kv_head)
            eligible = [j for j in range(position + 1) if j * block_size <= position]
            importance = dict.fromkeys(eligible, 0.0)
            for head in range(kv_head * group, (kv_head + 1) * group):
                query = q[index][head]
                scores = [
                    scale * sum(a * b for a, b in zip(query, k_compressed[i][kv_head], strict=True)) for i in seen
                ]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for i, score in zip(seen, scores, strict=True):
                    p = math.exp(score - max(scores)) / total
                    chunks = {token // kernel_stride for token in windows[i][1]}
                    for j in eligible:
                        block = {token // kernel_stride for token in range(j * block_size, (j + 1) * block_size)}
                        importance[j] += len(chunks & block) * p
            local = eligible[max(0, len(eligible) - num_local_blocks) :]
            forced = set(eligible[:num_init_blocks]) | set(local)
            rest = sorted((j for j in eligible if j not in forced), key=lambda j: (-importance[j], j))
            kept = sorted([*forced, *rest[: num_selected_blocks - len(forced)]])
            of_token.append(kept + [-1] * (num_selected_blocks - len(kept)))
        selection.append(of_token)
    return selection
