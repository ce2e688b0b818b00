"""Recorded selections: which blocks the queries of a trained model chose, as a small file and for benchmarks.

Neighbouring queries of a model choose many of the same blocks, those of a random index tensor few: what gathers blocks
or queries may be faster or slower on the one than on the other. `fsa inspect RUN --text FILE --dump FILE.npz` records
them, `load_selections` reads them, `recorded_selections` those that come with the package.

A record holds one sequence, so token t stands at position t. The file is an .npz of numpy with two arrays:

    header   JSON as bytes: format, version, config, tokens, layers (name and heads of each), origin
    gaps     uint8 [bytes of a gap, heads of all layers, N, slots], the least significant bytes first

A row of gaps says in which blocks a selection departs from the forced ones: the distance of each from the one before,
of the first from block -1, and 0 where there are no more. For a query in block 9, with 0, 8 and 9 forced:

    selected 0 2 3 7 8 9  ->  departs in 2 3 7  ->  gaps 3 1 4 0 0 ...

Of the encodings that were tried on 16,384 tokens x 8 heads x 16 slots of a model that had learnt a little, this one is
the smallest under zlib, 0.54 MB. int16 indices take 0.74 MB, gaps of whole selections 0.62 MB, bits by block along the
tokens 0.63 MB (0.64 MB where they say what changes), lists of what changes from token to token 0.76 MB.
LZMA, which a zip archive may have as well, takes a tenth less than zlib, and numpy reads it.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import geometry
from .config import NSAConfig
from .validation import bad, check_positive, check_tensor

PACKAGED_FILE = Path(__file__).parent / "data" / "selections.npz"
_FORMAT, _VERSION = "flash-sparse-attention selections", 1
_SHAPE: dict[str, int | None] = {"N": None, "Hk": None, "T": None}
# Greater than any block: sorts behind all of them.
_NONE = torch.iinfo(torch.int32).max
# Tokens whose selections are compared at once, so that memory stays linear in N.
_TOKENS_AT_ONCE = 1024
_CURE = "fsa inspect RUN --text FILE --dump FILE.npz writes such files"


@dataclass(frozen=True, eq=False)
class RecordedSelections:
    """What the layers of a model selected over one sequence of N tokens.

    Attributes:
        config: sizes of the sparse attention: block size, slots, which blocks are forced.
        layers: name of the layer -> the blocks that each query selected, int32 `[N, Hk, T]`, T slots as in `config`.
            Layers may differ in Hk.
        origin: where they come from, of types that JSON knows: of `fsa inspect` the sizes of the model (`model`), its
            `step`, the SHA-256 of the text it read (`text_sha256`), `device`, `dtype`, `versions`.

    Raises:
        ValueError: on construction, if there is no layer, or one of a wrong shape, dtype or length.
    """

    config: NSAConfig
    layers: dict[str, Tensor] = field(repr=False)
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_layers("layers", self.layers, self.config.num_selected_blocks)

    @property
    def total_tokens(self) -> int:
        """N, the tokens of the sequence."""
        return next(iter(self.layers.values())).shape[0]


def save_selections(path: str | Path, selections: RecordedSelections) -> None:
    """Writes selections into one file; makes its folder where it is missing.

    They are kept as sets: a block that a row repeats counts once, and entries that are negative, out of range or in the
    future are unused, as in `selected_attention`.

    Args:
        path: of the file, taken as it is, whatever its suffix.
        selections: on any device.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> config = NSAConfig(block_size=16, num_selected_blocks=4)
        >>> indices = torch.tensor([[[0, -1, -1, -1]]] * 16 + [[[1, 0, 0, -1]]] * 16, dtype=torch.int32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_selections(f"{folder}/a.npz", RecordedSelections(config, {"layers.0": indices}))
        ...     loaded = load_selections(f"{folder}/a.npz")
        >>> loaded.layers["layers.0"].shape, loaded.layers["layers.0"][-1].tolist()
        (torch.Size([32, 1, 4]), [[0, 1, -1, -1]])
    """
    import numpy as np

    config = selections.config
    forced = _forced_blocks(selections.total_tokens, config)
    departures = [
        _unshared(_sorted_sets(indices[:, head].cpu(), config.block_size), forced)
        for indices in selections.layers.values()
        for head in range(indices.shape[1])
    ]
    slots = max(int((rows != _NONE).sum(1).max()) for rows in departures)
    gaps = torch.stack([_gaps(rows[:, :slots]) for rows in departures])
    planes = max(1, (int(gaps.max().item() if gaps.numel() else 0).bit_length() + 7) // 8)
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config.to_dict(),
        "tokens": selections.total_tokens,
        "layers": [[name, indices.shape[1]] for name, indices in selections.layers.items()],
        "origin": selections.origin,
    }
    gap_bytes = torch.stack([(gaps >> 8 * plane & 255).to(torch.uint8) for plane in range(planes)])
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8), "gaps": gap_bytes.numpy()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.getvalue())


def load_selections(path: str | Path) -> RecordedSelections:
    """Selections that `save_selections` wrote: ascending, unused slots -1 at the end, on the CPU.

    Raises:
        ValueError: if there is no such file, it is damaged, or it is of another format or version.
    """
    header, gaps = _read(Path(path).expanduser())
    try:
        config = NSAConfig.from_dict(header["config"])
        tokens, heads = int(header["tokens"]), {str(name): int(count) for name, count in header["layers"]}
        origin = dict(header["origin"])
        forced = _forced_blocks(tokens, config)
        if gaps.dim() != 4 or tuple(gaps.shape[1:3]) != (sum(heads.values()), tokens) or not 1 <= len(gaps) <= 4:
            raise ValueError(f"gaps are {list(gaps.shape)}")
        rows = iter([_selection(gaps[:, head], forced, config) for head in range(gaps.shape[1])])
        layers = {name: torch.stack([next(rows) for _ in range(count)], 1) for name, count in heads.items()}
        return RecordedSelections(config, layers, origin)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _not_selections(path, f"whose contents do not fit together ({error})") from error


def recorded_selections() -> RecordedSelections:
    """The selections that come with the package; `origin` says of which model, `benchmarks/recorded_selections.py` how.

    Example:
        >>> recorded = recorded_selections()
        >>> widened(recorded.layers, num_kv_heads=4, total_tokens=1000).shape
        torch.Size([1000, 4, 16])
    """
    return load_selections(PACKAGED_FILE)


def widened(layers: Mapping[str, Tensor], *, num_kv_heads: int, total_tokens: int) -> Tensor:
    """An index tensor for a benchmark: the heads of all layers one behind the other, over the first tokens.

    Where more heads are wanted than were recorded they begin again: head i is the recorded head i modulo their number.

    Args:
        layers: name of the layer -> int32 `[N, Hk, T]`, of one N and T.
        num_kv_heads: heads that are wanted.
        total_tokens: tokens that are wanted, at most N. A query selects nothing behind it, so the first rows are the
            selection of a shorter text.

    Returns:
        int32 `[total_tokens, num_kv_heads, T]`, contiguous, on the device of the layers.

    Raises:
        ValueError: for more tokens than were recorded, no layer, or one of a wrong shape, dtype or length.

    Example:
        >>> layers = {name: torch.full((8, 2, 1), i, dtype=torch.int32) for i, name in enumerate("ab")}
        >>> widened(layers, num_kv_heads=6, total_tokens=3)[0, :, 0].tolist()
        [0, 0, 1, 1, 0, 0]
    """
    _check_layers("layers", layers)
    check_positive("num_kv_heads", num_kv_heads)
    check_positive("total_tokens", total_tokens)
    heads = torch.cat([indices[:total_tokens] for indices in layers.values()], 1)
    if heads.shape[0] < total_tokens:
        expected = f"at most the {heads.shape[0]:,} tokens that were recorded"
        raise bad("total_tokens", expected, total_tokens, "record a longer text, or measure fewer tokens")
    return heads[:, torch.arange(num_kv_heads, device=heads.device) % heads.shape[1]]


def neighbour_overlap(block_indices: Tensor, *, block_size: int, num_init_blocks: int, num_local_blocks: int) -> float:
    """Mean share of the blocks that a query chose which the query before it, of the same head, chose too.

    Forced blocks count for neither. A block that was among the newest for token t and is not for token t + 1 counts as
    one that only t + 1 chose. Queries that chose nothing are left out of the mean.

    Args:
        block_indices: int32 `[N, Hk, T]`, the selection of one sequence; entries that are negative or in the future
            count as unused, repeated ones once.
        block_size: l', tokens of a block.
        num_init_blocks: first blocks that the selection was forced to keep.
        num_local_blocks: newest blocks that it was forced to keep, the query's own included.

    Returns:
        0 to 1; NaN if no query but the first chose anything.

    Raises:
        ValueError: for a wrong shape, dtype or size.

    Example:
        Blocks of one token, the query's own forced. Tokens 1 and 2 chose block 0, token 3 chose 0 and 2: the mean of 0,
        1 and 1/2.

        >>> indices = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1], [0, 2, 3]], dtype=torch.int32)
        >>> neighbour_overlap(indices[:, None], block_size=1, num_init_blocks=0, num_local_blocks=1)
        0.5
    """
    check_tensor("block_indices", block_indices, _SHAPE, (torch.int32,))
    check_positive("block_size", block_size)
    check_positive("num_init_blocks", num_init_blocks, 0)
    check_positive("num_local_blocks", num_local_blocks, 0)
    tokens = block_indices.shape[0]
    total, queries = 0.0, 0
    for start in range(0, tokens - 1, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, tokens - 1)
        position_N11 = torch.arange(start, stop + 1, device=block_indices.device)[:, None, None]
        sets_NHT = _sorted_sets(block_indices[start : stop + 1], block_size, start)
        is_chosen_NHT = (sets_NHT >= num_init_blocks) & (
            sets_NHT < geometry.first_local_block(position_N11, block_size, num_local_blocks)
        )
        chosen_NHT = sets_NHT.masked_fill(~is_chosen_NHT, _NONE).sort(-1).values
        counts_NH, departures_NH = (
            (sets != _NONE).sum(-1) for sets in (chosen_NHT, _unshared(chosen_NHT[1:], chosen_NHT[:-1]))
        )
        shared_NH, counts_NH = (counts_NH[1:] + counts_NH[:-1] - departures_NH) // 2, counts_NH[1:]
        total += (shared_NH.double() / counts_NH.clamp(min=1)).sum().item()
        queries += int((counts_NH > 0).sum())
    return total / queries if queries else float("nan")


def _check_layers(argument: str, layers: Mapping[str, Tensor], slots: int | None = None) -> None:
    """There are layers, all int32 `[N, Hk, T]` of the same N and T."""
    if not layers:
        raise bad(argument, "at least one layer", "none")
    tokens = None
    for name, indices in layers.items():
        check_tensor(f"{argument}[{name!r}]", indices, {"N": tokens, "Hk": None, "T": slots}, (torch.int32,))
        tokens, slots = indices.shape[0], indices.shape[2]
    if not tokens:
        raise bad(argument, "of at least one token", "none")


def _sorted_sets(block_indices: Tensor, block_size: int, first_token: int = 0) -> Tensor:
    """Rows `[N, ..., T]` as sets: ascending, `_NONE` for what is unused, repeated or in the future."""
    position = torch.arange(first_token, first_token + len(block_indices), device=block_indices.device)
    eligible = geometry.num_eligible_blocks(position, block_size).view(-1, *[1] * (block_indices.dim() - 1))
    values = block_indices.masked_fill((block_indices < 0) | (block_indices >= eligible), _NONE).sort(-1).values
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[..., 1:] = values[..., 1:] == values[..., :-1]
    return values.masked_fill(repeated, _NONE).sort(-1).values


def _forced_blocks(tokens: int, config: NSAConfig) -> Tensor:
    """The forced blocks of every token as sets, int32 `[N, F]`."""
    position_N1 = torch.arange(tokens)[:, None]
    newest = geometry.first_local_block(position_N1, config.block_size, config.num_local_blocks)
    blocks = [torch.arange(config.num_init_blocks).expand(tokens, -1), newest + torch.arange(config.num_local_blocks)]
    return _sorted_sets(torch.cat(blocks, 1).int(), config.block_size)


def _unshared(first: Tensor, second: Tensor) -> Tensor:
    """The blocks that are in one of two sets and not in both, as sets; of this and `second` again it is `first`."""
    values = torch.cat([first, second], -1).sort(-1).values
    twice = values[..., 1:] == values[..., :-1]
    values[..., 1:].masked_fill_(twice, _NONE)
    values[..., :-1].masked_fill_(twice, _NONE)
    return values.sort(-1).values


def _gaps(sets: Tensor) -> Tensor:
    """Distances of the blocks of a set `[N, S]` from one another, the first one's from block -1; 0 where none is."""
    before = torch.cat([torch.full_like(sets[:, :1], -1), sets[:, :-1]], 1)
    return (sets - before).masked_fill(sets == _NONE, 0)


def _selection(gap_bytes: Tensor, forced: Tensor, config: NSAConfig) -> Tensor:
    """The selection int32 `[N, T]` of one head from `gap_bytes`, uint8 `[bytes, N, S]`."""
    gaps = sum(gap_bytes[plane].long() << 8 * plane for plane in range(len(gap_bytes)))
    assert isinstance(gaps, Tensor)
    departures = (gaps.cumsum(1) - 1).masked_fill(gaps == 0, _NONE)
    own = geometry.block_of(torch.arange(len(gaps))[:, None], config.block_size)
    if bool(((gaps > 0) & (departures > own)).any()):
        raise ValueError("a block lies behind its query")
    slots = config.num_selected_blocks
    unused = torch.full((len(gaps), slots), _NONE, dtype=torch.int32)
    selected = torch.cat([_unshared(departures.int(), forced), unused], 1)
    if not bool((selected[:, slots:] == _NONE).all()):
        raise ValueError(f"a query has more than {slots} blocks")
    return selected[:, :slots].masked_fill(selected[:, :slots] == _NONE, -1)


def _read(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Header and gaps of a file; refuses what is not one of selections."""
    import lzma

    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("header", "gaps")}
        header, gaps = json.loads(arrays["header"].tobytes()), torch.from_numpy(arrays["gaps"])
    except OSError as error:
        raise _not_selections(path, f"({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _not_selections(path, f"which is damaged ({error})") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # No archive, one of other arrays, or no JSON.
        raise _not_selections(path, "of another format") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT or gaps.dtype != torch.uint8:
        raise _not_selections(path, "of another format")
    if header.get("version") != _VERSION:
        cure = "another version of this package wrote it"
        got = f"{str(path)!r} of version {header.get('version')}"
        raise bad("path", f"a file of selections of version {_VERSION}", got, cure)
    return header, gaps


def _not_selections(path: str | Path, problem: str) -> ValueError:
    return bad("path", "a file of selections", f"{str(path)!r} {problem}", _CURE)
