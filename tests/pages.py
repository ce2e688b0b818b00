"""Caches for tests: pages in any order, filled from whole sequences, with NaN wherever nothing was written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_sparse_attention import KVPages, NSAConfig, SequenceLayout, compress, nsa_attention
from flash_sparse_attention.types import Place

SMALL = NSAConfig(
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    num_selected_blocks=5,
    num_init_blocks=1,
    num_local_blocks=2,
    window_size=21,
    branch_kv="independent",
)


class Filled:
    """Random keys and values of whole sequences, and a cache that holds them.

    Attributes:
        layout: of all tokens.
        pages: the cache.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        config: NSAConfig = SMALL,
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (16, 16),
        page_size: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout, self.config, self.heads = SequenceLayout.from_lengths(lengths, device), config, heads
        tokens = self.layout.total_tokens

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        (num_heads, kv_heads), (dim, dim_v) = heads, dims
        self.q, self.gates = random(tokens, num_heads, dim), random(tokens, num_heads, 3)
        self.k, self.k_window = random(tokens, kv_heads, dim), random(tokens, kv_heads, dim)
        self.v, self.v_window = random(tokens, kv_heads, dim_v), random(tokens, kv_heads, dim_v)
        windows = {"kernel_size": config.kernel_size, "kernel_stride": config.kernel_stride}
        self.k_compressed = compress(random(*self.k.shape), **windows, cu_seqlens=self.layout, impl="reference")
        self.v_compressed = compress(random(*self.v.shape), **windows, cu_seqlens=self.layout, impl="reference")

        longest = max(1, *lengths)
        whole = -(-longest // config.block_size) * config.block_size
        page_size = whole if page_size is None else page_size
        columns = -(-longest // page_size) + 1
        count = sum(-(-length // page_size) for length in lengths) + 2
        order = torch.randperm(count, generator=generator).to(device, torch.int32)
        # What is behind the last page of a sequence is no page.
        table = torch.full((len(lengths), columns), -1, dtype=torch.int32, device=device)
        used = 0
        for b, length in enumerate(lengths):
            pages = -(-length // page_size)
            table[b, :pages] = order[used : used + pages]
            used += pages

        def pool(rows: int, width: int) -> Tensor:
            return torch.full((count, rows, kv_heads, width), torch.nan, dtype=dtype, device=device)

        rows = page_size // config.kernel_stride
        sizes = ((page_size, dim), (page_size, dim_v)) * 2 + ((rows, dim), (rows, dim_v))
        lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.pages = KVPages(*(pool(*size) for size in sizes), table, lens)
        place = self.pages.place(self.layout.sequence_ids(), self.layout.positions())
        for name in ("k", "v", "k_window", "v_window"):
            self._put(name, place)
        compressed = self.layout.compressed(**windows)
        place = self.pages.compressed_place(compressed.sequence_ids(), compressed.positions(), **windows)
        for name in ("k_compressed", "v_compressed"):
            self._put(name, place)

    def _put(self, name: str, place: Place) -> None:
        assert bool(place.exists.all())
        getattr(self.pages, name)[place.page, place.row] = getattr(self, name)

    def last(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Queries and gates of the last tokens of each sequence, `[B, tokens, ...]`; NaN where there are fewer."""
        taken = []
        for x in (self.q, self.gates):
            parts = []
            for own in x.split(self.layout.lengths):
                missing = x.new_full((max(0, tokens - len(own)), *x.shape[1:]), torch.nan)
                parts.append(torch.cat([missing, own[max(0, len(own) - tokens) :]]))
            taken.append(torch.stack(parts))
        return taken[0], taken[1]

    def expected(self, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Output and selection of the last tokens by the whole attention of the reference, zeros and -1 where none."""
        names = ("q", "k", "v", "gates", "k_compressed", "v_compressed", "k_window", "v_window")
        tensors = {name: getattr(self, name).to(dtype) for name in names}
        whole = nsa_attention(**tensors, config=self.config, cu_seqlens=self.layout, impl="reference")
        results = []
        for x, nothing in zip(whole, (0, -1), strict=True):
            parts = []
            for own in x.split(self.layout.lengths):
                missing = x.new_full((max(0, tokens - len(own)), *x.shape[1:]), nothing)
                parts.append(torch.cat([missing, own[max(0, len(own) - tokens) :]]))
            results.append(torch.stack(parts))
        return results[0], results[1]
