"""The cache of a transformers model with sparse layers: transformers' `Cache` outside, `NSACache` inside.

`generate` and its users hold an ordinary `DynamicCache` or `StaticCache`; the model replaces, while it is empty, those
of its layers that are sparse. All sparse layers of a device share one `NSACache`, which keeps the real tokens of each
sequence alone: padding on the left or on the right takes no room and is never attended to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from ...cache import LayerCache, NSACache
from ...types import SequenceLayout
from ...validation import bad


class SparseCaches:
    """What the sparse layers of a model keep, one `NSACache` for each device.

    Args:
        layers: numbers of the sparse layers in the model.
        make: (device, layers on it, sequences, capacity, dtype) -> their cache.
        devices: where each of them runs.
        capacity: tokens that a sequence may have, padding counted; None to grow as needed.

    Attributes:
        columns: tokens of each row that were read, padding counted.
        batch: rows, 0 before the first.
        dtype: of keys and values, or None for that of the layers' own weights.
        extending: whether new tokens are being read.
    """

    def __init__(
        self,
        layers: Sequence[int],
        make: Callable[[torch.device, Sequence[int], int, int | None, torch.dtype | None], NSACache],
        devices: Sequence[torch.device],
        capacity: int | None,
    ) -> None:
        self.layers, self.capacity = list(layers), capacity
        self.columns = self.batch = 0
        self.extending = False
        self.dtype: torch.dtype | None = None
        self._make = make
        self._places: dict[torch.device, list[int]] = {}
        for layer, device in zip(layers, devices, strict=True):
            self._places.setdefault(device, []).append(layer)
        self._caches: dict[torch.device, NSACache] = {}

    @contextlib.contextmanager
    def extend(self, layout: SequenceLayout, columns: int) -> Iterator[Tensor]:
        """Makes room for new tokens in all layers; an exception takes them back. See `NSACache.extend`.

        Yields:
            The positions of the new tokens, int64 `[N]`.
        """
        if self.batch != layout.batch:
            if self.columns:
                cure = "make a new cache, or reset this one"
                raise bad("past_key_values", f"of {layout.batch} sequences", self.batch, cure)
            self._caches.clear()
        if self.capacity is not None and self.columns + columns > self.capacity:
            got = self.columns + columns
            raise bad("past_key_values", f"of at least {got} tokens", self.capacity, "make a longer static cache")
        for device, layers in self._places.items():
            if device not in self._caches:
                self._caches[device] = self._make(device, layers, layout.batch, self.capacity, self.dtype)
        with contextlib.ExitStack() as stack:
            for device, cache in self._caches.items():
                on_device = layout
                if layout.device != cache.device:
                    on_device = SequenceLayout.from_lengths(layout.lengths, device)
                positions = stack.enter_context(cache.extend(on_device)).positions
            self.extending = True
            stack.callback(setattr, self, "extending", False)
            yield positions
        self.batch, self.columns = layout.batch, self.columns + columns

    def of_layer(self, number: int) -> LayerCache:
        """What this layer of the model keeps."""
        device = next(device for device, layers in self._places.items() if number in layers)
        return self._caches[device].layers[self._places[device].index(number)]

    def crop(self, columns: int) -> None:
        """Takes back the newest tokens of each row, so many that this number is left."""
        removed = self.columns - columns
        if removed <= 0:
            return
        for cache in self._caches.values():
            cache.crop([max(0, length - removed) for length in cache.lengths])
        self.columns = columns

    def reset(self) -> None:
        """Empties all sequences."""
        for cache in self._caches.values():
            cache.crop(0)
        self.columns = 0

    def select(self, order: Tensor | Sequence[int]) -> None:
        """Sequence b becomes what sequence `order[b]` was, for any number of sequences."""
        numbers = [int(x) for x in order]
        for cache in self._caches.values():
            cache.select(numbers)
        self.batch = len(numbers) if self._caches else 0


class SparseCacheLayer(CacheLayerMixin):
    """A sparse layer's place in a transformers `Cache`. The first of the sparse layers acts for all of them.

    Attributes:
        caches: of all sparse layers.
        number: of the layer in the model.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, caches: SparseCaches, number: int) -> None:
        super().__init__()
        self.caches, self.number = caches, number
        self._acts = number == caches.layers[0]

    def _is_compileable(self) -> bool:
        """Before a forward pass: nothing is to be compiled. Within one: static layers beside this one have rows that
        are not written yet, which transformers masks where a cache is compileable."""
        return self.caches.extending and self.caches.capacity is not None

    is_compileable: Any = property(_is_compileable)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the model makes the caches."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sparse layers do not keep keys this way.

        Raises:
            ValueError: always.
        """
        raise bad("past_key_values", f"one whose layer {self.number} has full attention", "a sparse one")

    def get_seq_length(self) -> int:
        """Tokens of each row, padding counted."""
        return self.caches.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys, as full layers beside this one have them."""
        return self.caches.capacity or self.caches.columns + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that a row may have, or -1."""
        return self.caches.capacity or -1

    # The name of `get_max_length` before transformers 5.10.
    get_max_cache_shape = get_max_length

    @property
    def max_batch_size(self) -> int:
        """Rows."""
        return self.caches.batch

    def offload(self) -> None:
        """Sparse layers stay where they are."""

    def prefetch(self) -> None:
        """Sparse layers stay where they are."""

    def reset(self) -> None:
        """Empties the cache."""
        if self._acts:
            self.caches.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back -tokens_to_remove tokens; a positive number is the length that is left, as in older versions."""
        if self._acts:
            # Older versions pass a tensor.
            tokens, columns = int(tokens_to_remove), self.caches.columns
            self.caches.crop(tokens if tokens > 0 else max(0, columns + tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives each row the past of another one."""
        if self._acts:
            self.caches.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        if self._acts:
            self.caches.select([row for row in range(self.caches.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows: their numbers, or a bool for each."""
        if self._acts:
            self.caches.select(torch.arange(self.caches.batch)[indices.cpu()].tolist())


def adopt(cache: Cache, num_layers: int, make: Callable[[int | None], SparseCaches]) -> SparseCaches:
    """The caches of the sparse layers in a transformers `Cache`; replaces these layers while it is empty.

    Args:
        cache: dynamic or static.
        num_layers: of the model.
        make: capacity, None to grow -> the caches of its sparse layers.

    Raises:
        ValueError: for a cache of another kind (quantized, offloaded), or one that full attention has written to.
    """
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise bad("past_key_values", "a DynamicCache or a StaticCache that is not offloaded", type(cache).__name__)
    for layer in cache.layers:
        if isinstance(layer, SparseCacheLayer):
            return layer.caches
    replicated = cache.layer_class_to_replicate
    while replicated is not None and len(cache.layers) < num_layers:
        cache.layers.append(replicated())
    if len(cache.layers) != num_layers:
        raise bad("past_key_values", f"of {num_layers} layers", len(cache.layers))
    # The length of a sliding layer is that of its window.
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    caches = make(max(layer.get_max_length() for layer in static) if static else None)
    for number in caches.layers:
        old = cache.layers[number]
        if type(old).__name__.startswith("Quantized") or not isinstance(old, (DynamicLayer, StaticLayer)):
            raise bad("past_key_values", "of dynamic or static layers", type(old).__name__)
        if int(old.get_seq_length()):
            raise bad("past_key_values", "empty before the first tokens", f"{int(old.get_seq_length())} tokens")
    for number in caches.layers:
        cache.layers[number] = SparseCacheLayer(caches, number)
    return caches
