"""What one layer keeps of the tokens that a model has read, and the new tokens of a step; see `nsa_cache`.

Shapes: N new tokens, W windows that became full, L tokens of a window, B sequences, P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import geometry
from ..config import NSAConfig
from ..functional import compress
from ..impl import GATHER_WINDOWS, POOL_WINDOWS, STORE_ROWS, available, load, resolve
from ..types import Compression, KVPages, Place, SequenceLayout
from ..validation import FLOAT_DTYPES, bad, check_tensor


class Branches(NamedTuple):
    """A tensor for each branch, `[N, Hk, D]`; the same one where the branches share keys and values."""

    compressed: Tensor
    selected: Tensor
    window: Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """Compression windows that become full, and where their tokens are.

    Attributes:
        layout: of their tokens, `W` sequences of l tokens.
        starts: position of the first token of each, int64 `[W]`.
        place: where the compressed tokens go.
        tail: where tokens stand in the tail, `[W, L]`.
        new: their number among the new tokens, int64 `[W, L]`, where they are new.
        is_new: which of them are, bool `[W, L]`.
    """

    layout: SequenceLayout
    starts: Tensor
    place: Place
    tail: Place
    new: Tensor
    is_new: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens that are being appended, the same for all layers.

    Attributes:
        new_layout: of the new tokens alone.
        lengths: tokens of each sequence with the new ones, as far as the host knows.
        seq_lens: the same on the device.
        positions: of the new tokens, int64 `[N]`.
        place: where they go.
        tail: where those go that the tail keeps.
        windows: that become full, or None if there is none.
        fresh: whether the cache was empty, and is filled with more than a few tokens.
        tokens: new tokens of each sequence, if that is one number; otherwise None.
        memory: what a layer computed and others can use.
    """

    new_layout: SequenceLayout
    lengths: tuple[int, ...]
    seq_lens: Tensor
    positions: Tensor
    place: Place
    tail: Place
    windows: Windows | None
    fresh: bool
    tokens: int | None
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def layout(self) -> SequenceLayout:
        """Of the new tokens, behind those that the cache holds."""
        if "layout" not in self.memory:
            bounds = torch.cat([self.seq_lens.new_zeros(1), self.seq_lens.cumsum(0, dtype=torch.int32)])
            keys = SequenceLayout(self.lengths, bounds)
            self.memory["layout"] = SequenceLayout(self.new_layout.lengths, self.new_layout.cu_seqlens, keys)
        return self.memory["layout"]


@dataclass(eq=False)
class Shared:
    """What the layers of a cache have in common.

    Layers know this, not the cache: memory is free when the last name of the cache is gone, not when Python next looks
    for cycles.

    Attributes:
        config, dtype, rotary, max_crop: as `NSACache` was given them.
        paged, growing: of which kind it is.
        seq_lens, page_table: as `NSACache` has them.
        step: the tokens that are being appended, or None.
    """

    config: NSAConfig
    dtype: torch.dtype
    rotary: bool
    max_crop: int | None
    paged: bool
    growing: bool
    seq_lens: Tensor
    page_table: Tensor
    step: Step | None = None

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.seq_lens.device

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: nothing is computed, and nothing of the device is known."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def tail_rows(self) -> int | None:
        """Rows of the tail of a page: what windows that are not full need, and what may be taken back."""
        return None if self.max_crop is None else self.config.kernel_size + self.max_crop


class LayerCache:
    """What one layer keeps. Made by `NSACache`.

    Attributes:
        shared: what all layers of the cache have in common.
        index: of the layer.
        k: rotated keys of the selected branch `[P, page_size, Hk, Dk]`; and so are the others.
        tail_rows: tokens of a page that the tail keeps.
        has_tail: whether there is a tail beside `k` and `v`.
    """

    def __init__(
        self,
        shared: Shared,
        index: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int,
        pools: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.shared, self.index = shared, index
        config, size = shared.config, page_size

        def pool(rows: int, dim: int) -> Tensor:
            return torch.zeros(num_pages, rows, num_kv_heads, dim, device=shared.device, dtype=shared.dtype)

        if pools is None:
            self.k, self.v = pool(size, head_dim), pool(size, head_dim_v)
        else:
            for name, value, dim in zip(("k", "v"), pools, (head_dim, head_dim_v), strict=True):
                _check_pool(f"pools[{index}].{name}", value, (num_pages, size, num_kv_heads, dim), shared)
            self.k, self.v = pools
        one = config.branch_kv == "shared"
        self.k_window = self.k if one else pool(size, head_dim)
        self.v_window = self.v if one else pool(size, head_dim_v)
        rows = size // config.kernel_stride
        self.k_compressed, self.v_compressed = pool(rows, head_dim), pool(rows, head_dim_v)
        # Where the compressors read what `k` and `v` hold, those are the tail.
        k_is_tail = one and (not shared.rotary or config.rope == "before")
        self.has_tail = not (k_is_tail and one)
        tail = min(shared.tail_rows() or size, size) if self.has_tail else size
        self.tail_rows = tail
        self.k_tail = self.k if k_is_tail else pool(tail, head_dim)
        # Of values that are shared, all are there, but both tails are read by the same rows.
        v_is_tail = one and (not self.has_tail or (tail == size and not shared.growing))
        self.v_tail = self.v if v_is_tail else pool(tail, head_dim_v)

    @property
    def pages(self) -> KVPages:
        """What attention reads, up to and including the tokens of the step."""
        return self.pages_with(self.shared.seq_lens)

    def pages_with(self, seq_lens: Tensor) -> KVPages:
        """The pages with these lengths, int32 `[B]`."""
        tensors = self.k, self.v, self.k_window, self.v_window, self.k_compressed, self.v_compressed
        return KVPages(*tensors, self.shared.page_table, seq_lens)

    @property
    def step(self) -> Step:
        """The tokens that are being appended.

        Raises:
            ValueError: outside of `NSACache.extend`.
        """
        if self.shared.step is None:
            raise bad(
                "cache", "extended by the new tokens", "not", "call the layer within `with cache.extend(layout):`"
            )
        return self.shared.step

    def append(
        self,
        k: Branches,
        v: Branches,
        compression_k: Compression,
        compression_v: Compression,
        by: tuple[Tensor, Tensor] | None = None,
        impl: str = "auto",
    ) -> None:
        """Keeps the new tokens, and compresses the windows that they fill.

        Args:
            k: keys `[N, Hk, Dk]`: for the compressed branch as they are compressed, for the others rotated.
            v: values `[N, Hk, Dv]`.
            compression_k: how keys are compressed.
            compression_v: how values are.
            by: cosine and sine `[W, Dk / 2]` by which compressed keys are rotated, for the first tokens of
                `step.windows`; None if they are not.
            impl: implementation of `compress`.
        """
        step = self.step
        # The windows before the tail, which new tokens would write over.
        if step.windows is not None:
            self._append_compressed(
                step, step.windows, k.compressed, v.compressed, compression_k, compression_v, by, impl
            )
        pairs = [((self.k, self.v), (k.selected, v.selected), step.place)]
        if self.k_window is not self.k:
            pairs.append(((self.k_window, self.v_window), (k.window, v.window), step.place))
        if self.has_tail:
            pairs.append(((self.k_tail, self.v_tail), (k.compressed, v.compressed), step.tail))
        compute_in_cache(STORE_ROWS, self.k, pairs, None)

    def _append_compressed(
        self,
        step: Step,
        windows: Windows,
        k: Tensor,
        v: Tensor,
        compression_k: Compression,
        compression_v: Compression,
        by: tuple[Tensor, Tensor] | None,
        impl: str,
    ) -> None:
        """Compresses windows of tokens that are in the tail or among the new ones `k` and `v`."""
        config, pools = self.shared.config, (self.k_compressed, self.v_compressed)
        tails, chosen = (self.k_tail, self.v_tail), (windows.tail, windows.new, windows.is_new)
        both = compression_k, compression_v
        pooled = k.dtype != torch.float64 and all(one.kind in ("mean", "weighted") for one in both)
        if pooled and not step.fresh and impl == "auto" and available(POOL_WINDOWS, k.device, k.dtype):
            compute_in_cache(POOL_WINDOWS, k, pools, tails, (k, v), *chosen, windows.place, both, by)
            return
        layout = step.new_layout
        if not step.fresh:
            k, v = compute_in_cache(GATHER_WINDOWS, self.k_tail, tails, (k, v), *chosen)
            layout = windows.layout
        sizes: dict[str, Any] = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
        k_compressed, v_compressed = (
            compress(x, **one._asdict(), **sizes, cu_seqlens=layout, impl=impl)
            for x, one in zip((k, v), both, strict=True)
        )
        compute_in_cache(STORE_ROWS, self.k, [(pools, (k_compressed, v_compressed), windows.place)], by)

    def packed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k, v, k_window, v_window of all tokens `[N, Hk, D]`, packed by `step.layout.keys`."""
        k, v = (self._packed(x, self.step.lengths, 0) for x in (self.k, self.v))
        if self.k_window is self.k:
            return k, v, k, v
        k_window, v_window = (self._packed(x, self.step.lengths, 0) for x in (self.k_window, self.v_window))
        return k, v, k_window, v_window

    def packed_compressed(self) -> tuple[Tensor, Tensor]:
        """Compressed keys and values `[M, Hk, D]`, packed by `step.layout.keys`."""
        sizes = self.shared.config.kernel_size, self.shared.config.kernel_stride
        counts = [geometry.num_compressed_tokens(length, *sizes) for length in self.step.lengths]
        first = geometry.newest_chunk(0, *sizes)
        k, v = (self._packed(x, counts, first) for x in (self.k_compressed, self.v_compressed))
        return k, v

    def _packed(self, pool: Tensor, counts: Sequence[int], first: int) -> Tensor:
        """So many rows of each sequence, from row `first` on, one sequence behind the other."""
        parts = []
        for b, count in enumerate(counts):
            pages = -(-(first + count) // pool.shape[1])
            # A dense cache has one page for each sequence: no copy.
            rows = pool[self.shared.page_table[b, :pages].long()].flatten(0, 1) if self.shared.paged else pool[b]
            parts.append(rows[first : first + count])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pools(self) -> list[Tensor]:
        """All tensors, each once."""
        named = (self.k, self.v, self.k_window, self.v_window, self.k_compressed, self.v_compressed)
        return list({id(x): x for x in (*named, self.k_tail, self.v_tail)}.values())

    def grown(self, page_size: int) -> dict[str, Tensor]:
        """Its tensors by name, moved to larger pages."""

        def larger(name: str, old: Tensor) -> Tensor:
            rows = page_size // self.shared.config.kernel_stride if "compressed" in name else page_size
            if "tail" in name and self.shared.max_crop is not None:
                rows = self.tail_rows
            new = old.new_zeros(old.shape[0], rows, *old.shape[2:])
            new[:, : old.shape[1]] = old
            return new

        return self.mapped(larger)

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """What (name, tensor) -> tensor makes of its tensors, by name; those that are one stay one."""
        changed: dict[int, Tensor] = {}
        named = {}
        for name in ("k", "v", "k_window", "v_window", "k_compressed", "v_compressed", "k_tail", "v_tail"):
            old = getattr(self, name)
            if id(old) not in changed:
                changed[id(old)] = change(name, old)
            named[name] = changed[id(old)]
        return named


def compute_in_cache(operator: str, x: Tensor, *args: Any) -> Any:
    """What writes a cache, by the implementation for tensors like `x`. What a cache keeps has no gradients."""
    with torch.no_grad():
        return load(resolve(operator, "auto", x.device, x.dtype))(*args)


def _check_pool(name: str, pool: Tensor, shape: tuple[int, ...], shared: Shared) -> None:
    names = ("P", "page_size", "Hk", "D")
    check_tensor(name, pool, dict(zip(names, shape, strict=True)), FLOAT_DTYPES)
    if pool.dtype != shared.dtype or pool.device != shared.device:
        raise bad(name, f"{shared.dtype} on {shared.device}", f"{pool.dtype} on {pool.device}")
    if pool.stride(3) != 1 or (pool.shape[2] > 1 and pool.stride(2) != pool.shape[3]):
        raise bad(name, "with adjacent heads", f"strides {pool.stride()}", "[pages, tokens, heads, channels]")
