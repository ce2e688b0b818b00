"""`NSACache`: what a model keeps of the tokens that it has read, so that it can go on without reading them again.

For every layer: rotated keys and values, compressed keys and values, and of the newest tokens what the compressors
will read when a window that they began is full (the *tail*).

    with cache.extend(layout) as step:                the new tokens get their places, or an error changes nothing
        for layer, kept in zip(layers, cache.layers):
            kept.append(...)                          keys, values, and the windows that have become full
            kept.pages                                what attention reads

`nn.NativeSparseAttention` and `nn.LanguageModel` do this when they are given a cache.

Shape suffixes: N new tokens, W windows that became full, L tokens of a window, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import geometry
from ..config import NSAConfig
from ..impl import PLAN_STEP, available
from ..types import KVPages, Place, SequenceLayout
from ..validation import FLOAT_DTYPES, bad, check_positive, check_tensor
from .layer_cache import LayerCache, Shared, Step, Windows, compute_in_cache

# Tokens that `crop` may take back at any time, by default: more than speculative decoding proposes.
MAX_CROP = 64
FIRST_CAPACITY = 1024  # tokens, of a cache that grows
# New tokens of a sequence up to which attention reads the cache where it is; for more, it is read once for all of them.
FEW_TOKENS = 16


class NSACache:
    """Keys and values of a batch of sequences, which may differ in length, for all layers of a model.

    Dense (each sequence has room for `capacity` tokens), dense and growing (`capacity=None`), or paged (`page_size`
    and `num_pages`: sequences own pages of a pool by `set_pages`, and may share those that they have in common).
    Shapes never change but by growing, so a CUDA graph may append: `seq_lens` lives on the device. The host keeps a
    copy, `lengths`, for checks; after replays of a graph tell it with `replayed`.

    Args:
        config: of the attention; sizes, and which branches have keys of their own.
        num_layers: of the model.
        batch: B, sequences.
        num_kv_heads: Hk.
        head_dim: Dk.
        head_dim_v: Dv; head_dim by default.
        capacity: tokens that a sequence may have, None to grow as needed; of a paged cache, pages times page_size.
        page_size: tokens of a page, a multiple of `config.block_size`; None for a dense cache.
        num_pages: P, pages of the pool.
        rotary: whether keys are rotated; where they are not, or before they are compressed, no keys are kept twice.
        max_crop: tokens that `crop` can take back, counted from the longest that the sequence was since it was empty;
            the tails of the compressors are so much longer. None for all, which keeps all that was compressed.
        pools: for a paged cache, the keys and values of the selected branch of each layer, `[P, page_size, Hk, D]` with
            adjacent heads, as a serving engine has them; made here by default.
        device: of all tensors.
        dtype: of keys and values.

    Attributes:
        lengths: tokens of each sequence, on the host.
        seq_lens: the same on the device, int32 `[B]`.
        page_table: int32 `[B, pages]`.
        layers: a `LayerCache` for each layer.

    Raises:
        ValueError: for sizes that do not fit each other.

    Example:
        >>> import torch
        >>> from flash_sparse_attention.nn import NativeSparseAttention
        >>> layer = NativeSparseAttention(64, num_heads=4, num_kv_heads=2, head_dim=16)
        >>> cache, x = layer.new_cache(batch=2, capacity=256), torch.randn(2, 101, 64)
        >>> with cache.extend(SequenceLayout.uniform(2, 100)):
        ...     prompt = layer(x[:, :100], cache=cache.layers[0])
        >>> with cache.extend(SequenceLayout.uniform(2, 1)):
        ...     token = layer(x[:, 100:], cache=cache.layers[0])
        >>> torch.allclose(torch.cat([prompt, token], 1), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        config: NSAConfig,
        *,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        capacity: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        rotary: bool = True,
        max_crop: int | None = MAX_CROP,
        pools: Sequence[tuple[Tensor, Tensor]] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        for name, value in (
            ("num_layers", num_layers),
            ("batch", batch),
            ("num_kv_heads", num_kv_heads),
            ("head_dim", head_dim),
            ("head_dim_v", head_dim_v),
        ):
            check_positive(name, value)
        if max_crop is not None:
            check_positive("max_crop", max_crop, 0)
        if dtype not in FLOAT_DTYPES:
            raise bad("dtype", "a floating dtype", dtype)
        paged, growing = page_size is not None, page_size is None and capacity is None
        # Its tensors are made when their sizes are known.
        none = torch.empty(0, dtype=torch.int32, device=device)
        self._shared = Shared(config, dtype, rotary, max_crop, paged, growing, none, none)
        self.batch = batch
        if page_size is None:
            if pools is not None or num_pages is not None:
                raise bad("page_size", "given with pools or num_pages", None)
            wanted = FIRST_CAPACITY if capacity is None else check_positive("capacity", capacity)
            # A growing cache never has a tail that is shorter than it will be.
            tail = (self._shared.tail_rows() or 1) if capacity is None else 1
            page_size = _whole(max(wanted, tail), config.block_size)
            num_pages, columns = batch, 1
        else:
            if check_positive("page_size", page_size) % config.block_size:
                raise bad("page_size", f"a multiple of block_size={config.block_size}", page_size)
            if num_pages is None:
                raise bad("num_pages", "the number of pages of the pool", None)
            check_positive("num_pages", num_pages)
            most = num_pages * page_size
            wanted = most if capacity is None else check_positive("capacity", capacity)
            columns = -(-min(wanted, most) // page_size)
        self.page_size = page_size
        self._shared.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._shared.page_table = torch.full((batch, columns), -1, dtype=torch.int32, device=device)
        if not self.paged:
            torch.arange(batch, out=self.page_table[:, 0])
        self._pages: list[list[int]] = [[] if self.paged else [b] for b in range(batch)]
        self._lengths = [0] * batch
        # Rows of each page that were written since its first one was: the tail holds the last ones of them.
        self._written: dict[int, int] = {}
        self._users: dict[int, list[int]] = {}
        # Sequences whose tail a failed step has written over.
        self._lost: set[int] = set()
        self._limit = columns * page_size if self.paged or capacity is None else capacity
        if pools is not None and len(pools) != num_layers:
            raise bad("pools", f"one pair for each of num_layers={num_layers}", len(pools))
        shape = num_pages, page_size, num_kv_heads, head_dim, head_dim_v
        self.layers = [
            LayerCache(self._shared, index, *shape, pools[index] if pools is not None else None)
            for index in range(num_layers)
        ]

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self._shared.device

    @property
    def config(self) -> NSAConfig:
        """Of the attention."""
        return self._shared.config

    @property
    def paged(self) -> bool:
        """Whether sequences own pages of a pool."""
        return self._shared.paged

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._shared.dtype

    @property
    def seq_lens(self) -> Tensor:
        """Tokens of each sequence, on the device."""
        return self._shared.seq_lens

    @property
    def page_table(self) -> Tensor:
        """Pages of each sequence."""
        return self._shared.page_table

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as far as the host knows; see `replayed`."""
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have now."""
        return self._limit

    @contextmanager
    def extend(self, layout: SequenceLayout) -> Iterator[Step]:
        """Makes room for new tokens; while active, every layer appends them. An exception takes them back.

        If more tokens than `max_crop` were taken back so, the tail may have lost what the sequence needs to go on: then
        it must be emptied, and `extend` says so.

        Args:
            layout: of the new tokens of the B sequences, 0 allowed; `SequenceLayout.uniform(B, 1)` to decode.

        Yields:
            The `Step`: layout with past, positions, places.

        Raises:
            ValueError: if the layout is of another batch or device, a sequence would pass the capacity, or its next
                page is missing or another sequence's too; nothing has changed then. Within a CUDA graph that is
                captured nothing can be checked: what has no place is dropped.
        """
        self._check_idle()
        if layout.with_past is not None:
            raise bad("layout", "of the new tokens alone", "one with a past", "the cache knows what came before")
        if layout.batch != self.batch:
            raise bad("layout", f"of the B={self.batch} sequences of the cache", layout.batch)
        if layout.device != self.device:
            raise bad("layout", f"on the device of the cache ({self.device})", layout.device)
        capturing = self.capturing()
        if capturing and self._shared.growing:
            raise bad("capacity", "given for a cache of which graphs are captured", None, "growing moves its tensors")
        lengths = [past + new for past, new in zip(self._lengths, layout.lengths, strict=True)]
        if not capturing:
            self._make_room(lengths)
        saved = None if capturing else self.seq_lens.clone()
        try:
            step = self._shared.step = self._step_of(layout, capturing)
            yield step
        except BaseException:
            if saved is not None:
                self.seq_lens.copy_(saved)
                self._note_written(lengths)
                # As when tokens are taken back: what windows need may be gone from the tail.
                for b, (past, new) in enumerate(zip(self._lengths, lengths, strict=True)):
                    if new > past and not self._tail_reaches(self._pages[b], past):
                        self._lost.add(b)
            raise
        else:
            if saved is not None:
                self._note_written(lengths)
                self._lengths = lengths
        finally:
            self._shared.step = None

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured: nothing is computed, and nothing of the device is known."""
        return self._shared.capturing()

    def replayed(self, tokens: int = 1) -> None:
        """Tells the host that a CUDA graph appended so many tokens to each sequence. Call it before the replay.

        Raises:
            ValueError: if they do not fit; nothing has changed then.
        """
        self._check_idle()
        longer = [length + check_positive("tokens", tokens, 0) for length in self._lengths]
        self._make_room(longer)
        self._note_written(longer)
        self._lengths = longer

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Takes back all tokens from these lengths on, as when proposed tokens are rejected. 0 empties a sequence.

        Args:
            lengths: of each sequence, or one for all; a sequence that is shorter stays.

        Raises:
            ValueError: if there are not B lengths, one is negative, or the tail does not reach back so far (see
                `max_crop`); nothing has changed then.
        """
        self._check_idle()
        if isinstance(lengths, int):
            lengths = [lengths] * self.batch
        if len(lengths) != self.batch or any(isinstance(x, bool) or not isinstance(x, int) or x < 0 for x in lengths):
            raise bad("lengths", f"B={self.batch} integers of at least 0", list(lengths))
        shorter = [min(new, old) for new, old in zip(lengths, self._lengths, strict=True)]
        for b, (new, old) in enumerate(zip(shorter, self._lengths, strict=True)):
            if new != old and not self._tail_reaches(self._pages[b], new):
                cure = f"make the cache with a larger max_crop than {self._shared.max_crop}"
                raise bad(f"lengths[{b}]", "0, or a length that the tail reaches back to", new, cure)
        self._lost -= {b for b, length in enumerate(shorter) if length == 0}
        self._set_lengths(shorter)

    def reorder(self, order: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence `order[b]` was, as beam search wants it; copies the cache.

        Raises:
            ValueError: if `order` is no B numbers of sequences, or the cache is paged: change its pages instead.
        """
        self._check_idle()
        if self.paged:
            raise bad("cache", "dense to be reordered", "paged", "set_pages gives sequences other pages")
        numbers = [int(x) for x in order]
        if len(numbers) != self.batch or not all(0 <= x < self.batch for x in numbers):
            raise bad("order", f"B={self.batch} numbers of sequences", numbers)
        index = torch.tensor(numbers).to(self.device, non_blocking=True)
        for layer in self.layers:
            for pool in layer.pools():
                pool.copy_(pool.index_select(0, index))
        self._written = {b: self._written.get(x, 0) for b, x in enumerate(numbers)}
        self._lost = {b for b, x in enumerate(numbers) if x in self._lost}
        self._set_lengths([self._lengths[x] for x in numbers])

    def select(self, order: Sequence[int]) -> None:
        """Sequence b becomes what sequence `order[b]` was, for any number of sequences; copies the cache.

        Raises:
            ValueError: if `order` is not at least one number of a sequence, or the cache is paged.
        """
        self._check_idle()
        if self.paged:
            raise bad("cache", "dense to be selected from", "paged", "set_pages gives sequences other pages")
        numbers = [int(x) for x in order]
        if not numbers or not all(0 <= x < self.batch for x in numbers):
            raise bad("order", f"numbers of sequences from 0 to {self.batch - 1}", numbers)
        if len(numbers) == self.batch:
            self.reorder(numbers)
            return
        index = torch.tensor(numbers).to(self.device, non_blocking=True)
        # All of them before any is replaced, as memory may run out.
        selected = [layer.mapped(lambda _, pool: pool.index_select(0, index)) for layer in self.layers]
        for layer, tensors in zip(self.layers, selected, strict=True):
            vars(layer).update(tensors)
        self.batch = len(numbers)
        self._pages = [[b] for b in range(self.batch)]
        self._shared.page_table = torch.arange(self.batch, dtype=torch.int32, device=self.device)[:, None]
        self._shared.seq_lens = self.seq_lens[index]
        self._written = {b: self._written.get(x, 0) for b, x in enumerate(numbers)}
        self._lost = {b for b, x in enumerate(numbers) if x in self._lost}
        self._lengths = [self._lengths[x] for x in numbers]

    def set_pages(self, page_table: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Gives the sequences of a paged cache their pages, and sets lengths where they differ from what is known.

        A sequence that begins with the pages of another one, and with a length that they fill, goes on from what they
        hold: a prefix is read once. What it appends goes into pages of its own.

        Args:
            page_table: int32 `[B, up to the pages of the cache]`, on any device; -1 where there is none yet.
            lengths: tokens of each sequence that its pages hold already; as they are by default.

        Raises:
            ValueError: if the cache is dense, the table does not fit, names a page that does not exist, lacks one that
                a length needs, names a page twice where it can still be written to, or a sequence would go on in the
                middle of a page that others share; nothing has changed then.
        """
        self._check_idle()
        if not self.paged:
            raise bad("cache", "paged to be given pages", "dense", "pass page_size and num_pages")
        check_tensor("page_table", page_table, {"B": self.batch, "pages": None}, (torch.int32,))
        columns = self.page_table.shape[1]
        if page_table.shape[1] > columns:
            raise bad("page_table", f"of at most {columns} pages a sequence", list(page_table.shape))
        wanted = self._lengths if lengths is None else list(lengths)
        if len(wanted) != self.batch or any(not isinstance(length, int) or length < 0 for length in wanted):
            raise bad("lengths", f"B={self.batch} integers of at least 0", wanted)
        pages = [_until_none(row) for row in page_table.tolist()]
        users = self._check_pages(pages, wanted)
        for b, (own, length) in enumerate(zip(pages, wanted, strict=True)):
            if length and not self._tail_reaches(own, length):
                got = f"{length} tokens in sequence {b}"
                cure = "a sequence goes on where its pages were left, where one of them is full, or max_crop before"
                raise bad("lengths", "such that the tails of the pages reach back so far", got, cure)
        table = torch.full((self.batch, columns), -1, dtype=torch.int32)
        table[:, : page_table.shape[1]] = page_table.cpu()
        self.page_table.copy_(table, non_blocking=True)
        self._pages, self._users, self._lost = pages, users, set()
        self._set_lengths(wanted)

    def _check_idle(self) -> None:
        """No step is under way."""
        if self._shared.step is not None:
            raise bad("extend", "left before the cache is changed or extended again", "still active")

    def _check_pages(self, pages: list[list[int]], lengths: Sequence[int]) -> dict[int, list[int]]:
        """Pages exist, are enough for the lengths, and those that can be written to have one owner; the owners."""
        count = len(self.layers[0].k)
        users: dict[int, list[int]] = {}
        for b, own in enumerate(pages):
            for page in own:
                if page >= count:
                    raise bad("page_table", f"of pages below P={count}", f"{page} in sequence {b}")
                users.setdefault(page, []).append(b)
            needed = -(-lengths[b] // self.page_size)
            if len(own) < needed:
                raise bad("page_table", f"of at least {needed} pages for the {lengths[b]} tokens of sequence {b}", own)
        for b, own in enumerate(pages):
            # Pages that a sequence filled are only read; the others are its own.
            self._check_owners(own[lengths[b] // self.page_size :], users)
        return users

    def _check_owners(self, pages: Sequence[int], users: dict[int, list[int]]) -> None:
        for page in pages:
            if len(users[page]) > 1:
                expected = "of pages with one owner, but for those that are full"
                raise bad("page_table", expected, f"page {page} in sequences {users[page]}")

    def _make_room(self, lengths: Sequence[int]) -> None:
        """Sequences of these lengths have room, and pages."""
        for b, (length, past) in enumerate(zip(lengths, self._lengths, strict=True)):
            if length > past and b in self._lost:
                cure = f"crop it to 0: a step of more than max_crop={self._shared.max_crop} tokens failed"
                raise bad(f"sequence {b}", "whole", "without what its next window needs", cure)
            if length > self._limit and not self._shared.growing:
                cure = "crop it, or make a larger cache"
                raise bad(f"sequence {b}", f"of at most capacity={self._limit} tokens", length, cure)
            needed = -(-length // self.page_size)
            if self.paged and length > past:
                if len(self._pages[b]) < needed:
                    got = f"{len(self._pages[b])} pages for {length} tokens"
                    raise bad(f"sequence {b}", f"of {needed} pages", got, "give it more by set_pages")
                self._check_owners(self._pages[b][past // self.page_size : needed], self._users)
        if self._shared.growing and max(lengths) > self._limit:
            self._grow(max(lengths))

    def _grow(self, tokens: int) -> None:
        """Room for so many tokens at least, and twice as many as there was."""
        size = _whole(max(tokens, 2 * self.page_size), self.config.block_size)
        # All of them before any is replaced, as memory may run out.
        grown = [layer.grown(size) for layer in self.layers]
        for layer, tensors in zip(self.layers, grown, strict=True):
            vars(layer).update(tensors)
            layer.tail_rows = layer.k_tail.shape[1]
        self.page_size = self._limit = size

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self.seq_lens.copy_(torch.tensor(self._lengths, dtype=torch.int32), non_blocking=True)

    def _note_written(self, lengths: Sequence[int]) -> None:
        """Sequences were written to up to these lengths."""
        for own, past, new in zip(self._pages, self._lengths, lengths, strict=True):
            for number in range(past // self.page_size, -(-new // self.page_size)):
                begin, page = number * self.page_size, own[number]
                # A page whose first row is written holds nothing else.
                before = 0 if past <= begin else self._written.get(page, 0)
                self._written[page] = max(before, min(new - begin, self.page_size))

    def _tail_reaches(self, pages: Sequence[int], length: int) -> bool:
        """Whether the tails of the pages hold what windows need that become full behind token `length`."""
        if length == 0 or not self.layers[0].has_tail:
            return True
        rows, sizes = self.layers[0].tail_rows, (self.config.kernel_size, self.config.kernel_stride)
        oldest = geometry.window_start(geometry.num_compressed_tokens(length, *sizes), self.config.kernel_stride)
        for number in range(oldest // self.page_size, -(-length // self.page_size)):
            begin, written = number * self.page_size, self._written.get(pages[number], 0)
            needed = max(oldest - begin, 0), min(length - begin, self.page_size)
            if needed[0] < needed[1] and (needed[1] > written or needed[0] < written - rows):
                return False
        return True

    def _step_of(self, new: SequenceLayout, capturing: bool) -> Step:
        """The places of new tokens; `seq_lens` counts them from now on.

        Within a capture lengths are only known on the device.
        """
        lengths = tuple(past + count for past, count in zip(self._lengths, new.lengths, strict=True))
        fresh = not capturing and not any(self._lengths)
        tokens = new.lengths[0] if len(set(new.lengths)) == 1 else None
        # Its windows are of the cache, those of a fresh one of the new tokens.
        by_kernel = available(PLAN_STEP, self.device, self.dtype)
        if by_kernel and tokens is not None and tokens > 0 and not (fresh and tokens > FEW_TOKENS):
            planned = self._planned(new, tokens, lengths, capturing)
            return Step(new, lengths, self.seq_lens, *planned, False, tokens)
        past_B = self.seq_lens.long()
        self.seq_lens.add_(new.cu_seqlens.diff())
        pages = self.layers[0].pages
        ids_N = new.sequence_ids()
        position_N = new.positions() + past_B[ids_N]
        place = pages.place(ids_N, position_N)
        rows = self.layers[0].tail_rows
        # Of the new tokens of a page the tail keeps the last.
        page_end_N = (position_N // self.page_size + 1) * self.page_size
        kept_N = position_N + rows >= self.seq_lens[ids_N].minimum(page_end_N)
        tail = Place(place.page, place.row % rows, place.exists & kept_N)
        windows = self._windows_of(new, past_B, pages, lengths, capturing)
        return Step(new, lengths, self.seq_lens, position_N, place, tail, windows, fresh, tokens)

    def _planned(
        self, new: SequenceLayout, tokens: int, lengths: tuple[int, ...], capturing: bool
    ) -> tuple[Tensor, Place, Place, Windows | None]:
        """The same by a kernel, for one number of new tokens: as many windows as could become full, where the last of
        a sequence may not exist."""
        first = self.layers[0]
        sizes = self.config.kernel_size, self.config.kernel_stride
        pools = len(first.k), self.page_size, first.tail_rows
        position, place, tail, starts, to, kept, number, is_new = compute_in_cache(
            PLAN_STEP, first.k, self.seq_lens, self.page_table, tokens, *sizes, *pools
        )
        if not capturing and not any(self._filled(lengths)):
            return position, place, tail, None
        of = SequenceLayout.uniform(len(starts), sizes[0], self.device)
        return position, place, tail, Windows(of, starts, to, kept, number, is_new)

    def _filled(self, lengths: Sequence[int]) -> list[int]:
        """Windows of each sequence that become full when it has so many tokens."""
        sizes = self.config.kernel_size, self.config.kernel_stride
        return [
            geometry.num_compressed_tokens(after, *sizes) - geometry.num_compressed_tokens(past, *sizes)
            for after, past in zip(lengths, self._lengths, strict=True)
        ]

    def _windows_of(
        self, new: SequenceLayout, past_B: Tensor, pages: KVPages, lengths: tuple[int, ...], capturing: bool
    ) -> Windows | None:
        """The windows that the new tokens fill; within a capture as many as could be, of which some do not exist."""
        l, d = self.config.kernel_size, self.config.kernel_stride
        most = [-(-count // d) for count in new.lengths] if capturing else self._filled(lengths)
        if not any(most):
            return None
        of = _layout(most, self.device, capturing)
        ids_W = of.sequence_ids()
        window_W = geometry.num_compressed_tokens(past_B, l, d)[ids_W] + of.positions()
        starts_W = geometry.window_start(window_W, d)
        token_WL = starts_W[:, None] + torch.arange(l, device=self.device)
        is_new_WL = token_WL >= past_B[ids_W, None]
        first_B = new.cu_seqlens[:-1].long() - past_B
        new_WL = (token_WL + first_B[ids_W, None]).clamp(0, max(0, new.total_tokens - 1))
        place = pages.place(ids_W[:, None], token_WL)
        tail = Place(place.page, place.row % self.layers[0].tail_rows, place.exists)
        return Windows(
            SequenceLayout.uniform(len(ids_W), l, self.device),
            starts_W,
            pages.compressed_place(ids_W, window_W, l, d),
            tail,
            new_WL.where(is_new_WL, 0),
            is_new_WL,
        )


def _whole(tokens: int, block_size: int) -> int:
    """So many tokens at least, in whole blocks."""
    return -(-tokens // block_size) * block_size


def _until_none(row: list[int]) -> list[int]:
    """The pages before the first entry that is none."""
    return row[: next((i for i, page in enumerate(row) if page < 0), len(row))]


def _layout(lengths: Sequence[int], device: torch.device, capturing: bool) -> SequenceLayout:
    """The layout of these lengths; within a capture, where nothing can be copied from the host, of equal ones."""
    if capturing and len(set(lengths)) == 1:
        return SequenceLayout.uniform(len(lengths), lengths[0], device)
    return SequenceLayout.from_lengths(lengths, device)
