"""Text from a language model: temperature, nucleus sampling, and the loop that continues prompts."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..geometry import windows_reach
from ..impl import WITH_KVCACHE, resolve
from ..nn import LanguageModel, NativeSparseAttention
from ..types import SequenceLayout
from ..validation import bad, check_positive
from .data import END_OF_TEXT

# New tokens of each sequence -> logits `[B, V]` of what follows, all that was read before remembered.
Read = Callable[[Sequence[Sequence[int]]], Tensor]


def check_sampling(temperature: float, top_p: float) -> None:
    """The numbers are ones that `next_token_probabilities` takes.

    Raises:
        ValueError: if not.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise bad("temperature", "a number of at least 0", temperature, "0 always takes the likeliest token")
    if not 0 < top_p <= 1:
        raise bad("top_p", "more than 0 and at most 1", top_p, "1 leaves all tokens in")


def next_token_probabilities(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The distribution to draw the next token from.

    Logits are divided by the temperature. Of the distribution that results, the nucleus stays: the fewest tokens, the
    likeliest first and equals by their number, whose probabilities sum to `top_p` or more.

    Args:
        logits: `[V]`, any floating dtype.
        temperature: 0 for the likeliest token alone, the lowest of equals; 1 for the distribution of the model.
        top_p: more than 0, at most 1; 1 keeps all tokens.

    Returns:
        Probabilities, float64 `[V]` on the CPU.

    Raises:
        ValueError: for numbers out of range, or logits that are not finite.

    Example:
        >>> next_token_probabilities(torch.tensor([0.5, 0.3, 0.2]).log(), top_p=0.6)
        tensor([0.6250, 0.3750, 0.0000], dtype=torch.float64)
    """
    check_sampling(temperature, top_p)
    # On the CPU and in double precision, so that a seed draws the same text everywhere.
    scores = logits.detach().double().cpu()
    if not scores.isfinite().all():
        raise bad("logits", "finite", "nan or inf", "the weights of the model are damaged")
    if temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(), len(scores)).double()
    # The maximum goes first: a tiny temperature makes the others -inf, not nan.
    probabilities = ((scores - scores.max()) / temperature).softmax(0)
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities[tokens[before >= top_p]] = 0
    return probabilities / probabilities.sum()


def generate_tokens(
    read: Read,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Continues prompts together, token after token, each up to and including `END_OF_TEXT`.

    Args:
        read: new tokens of each sequence -> logits of the next one, `[B, V]`. It is called with the prompts, then with
            one token a sequence, and keeps what it has read; see `cached` and `uncached`.
        prompts: tokens to begin with, at least one in each. A new document begins with `END_OF_TEXT`.
        max_new_tokens: where to stop.
        temperature: see `next_token_probabilities`.
        top_p: see `next_token_probabilities`.
        seed: of the draws for the first prompt; the next one has the next seed.

    Yields:
        The next token of each sequence, None where it has ended.

    Raises:
        ValueError: for no or an empty prompt, or numbers out of range.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_p)
    if not prompts or not all(map(len, prompts)):
        raise bad("prompt", "at least one token", "none", "begin a document with END_OF_TEXT")
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    new, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(max_new_tokens):
        drawn: list[int | None] = []
        for number, logits in enumerate(read(new)):
            if ended[number]:
                drawn.append(None)
                continue
            probabilities = next_token_probabilities(logits, temperature=temperature, top_p=top_p)
            drawn.append(int(torch.multinomial(probabilities, 1, generator=generators[number])))
        yield drawn
        ended = [end or token == END_OF_TEXT for end, token in zip(ended, drawn, strict=True)]
        if all(ended):
            return
        # What has ended goes on with anything, since the others need its place.
        new = [[END_OF_TEXT if token is None else token] for token in drawn]


def cached(
    model: LanguageModel,
    batch: int,
    capacity: int,
    autocast_dtype: torch.dtype | None = None,
    *,
    capture: bool = True,
) -> Read:
    """Reads with a cache: each token once. On CUDA devices, steps of one token are captured in a graph.

    Args:
        model: with sparse attention.
        batch: sequences.
        capacity: tokens that the longest one may have in the end.
        autocast_dtype: of products under autocast, or None for none.
        capture: whether to capture a graph where that is possible.
    """
    return _CachedRead(model, batch, capacity, autocast_dtype, capture).read


class _CachedRead:
    """A model, a cache, and on CUDA devices the graph of a step of one token a sequence."""

    def __init__(
        self, model: LanguageModel, batch: int, capacity: int, autocast_dtype: torch.dtype | None, capture: bool
    ) -> None:
        self.model, self.batch, self.autocast_dtype = model, batch, autocast_dtype
        self.device = model.embed_tokens.weight.device
        with self.context():
            self.cache = model.new_cache(batch, capacity)
        self.capture = capture and self.device.type == "cuda" and self._on_kernels()
        # The first step compiles kernels, which a capture must not.
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None

    def _on_kernels(self) -> bool:
        """Whether attention runs on kernels that wait for nothing."""
        layer = next(x for x in self.model.modules() if isinstance(x, NativeSparseAttention))
        config = self.model.config.nsa
        reach = windows_reach(config.kernel_size, config.kernel_stride, config.block_size)
        sizes = self.model.config.head_dim, reach, config.num_selected_blocks
        return resolve(WITH_KVCACHE, layer.impl, self.device, self.cache.dtype, *sizes).impl == "triton"

    def context(self) -> torch.autocast:
        # Weights that were cast are not kept, since a graph would keep those of its own memory.
        enabled = self.autocast_dtype is not None
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=enabled, cache_enabled=False)

    def read(self, new: Sequence[Sequence[int]]) -> Tensor:
        """The logits behind the new tokens."""
        with torch.inference_mode(), self.context():
            if any(len(tokens) != 1 for tokens in new) or not self.capture:
                layout = SequenceLayout.from_lengths([len(tokens) for tokens in new], self.device)
                packed = torch.tensor([token for tokens in new for token in tokens]).to(self.device)
                return self.model(packed, layout, self.cache, last_logits=True)
            self.tokens.copy_(torch.tensor(new))
            if not self.warm:
                self.warm = True
                return self.model(self.tokens, cache=self.cache, last_logits=True)
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.logits = self.model(self.tokens, cache=self.cache, last_logits=True)
            self.cache.replayed()
            self.graph.replay()
            assert self.logits is not None
            return self.logits


def uncached(model: LanguageModel, batch: int, autocast_dtype: torch.dtype | None = None) -> Read:
    """Reads everything again for each token, for attention that has no cache."""
    device = model.embed_tokens.weight.device
    prefixes: list[list[int]] = [[] for _ in range(batch)]

    def read(new: Sequence[Sequence[int]]) -> Tensor:
        for prefix, tokens in zip(prefixes, new, strict=True):
            prefix.extend(tokens)
        layout = SequenceLayout.from_lengths([len(prefix) for prefix in prefixes], device)
        packed = torch.tensor([token for prefix in prefixes for token in prefix]).to(device)
        enabled = autocast_dtype is not None
        with torch.inference_mode(), torch.autocast(device.type, dtype=autocast_dtype, enabled=enabled):
            return model(packed, layout, last_logits=True)

    return read


def decode_stream(tokens: Iterable[int]) -> Iterator[str]:
    """Text of the tokens as soon as it is complete: valid UTF-8, with U+FFFD for bytes that are none.

    `END_OF_TEXT` has no text.

    >>> list(decode_stream("aé".encode() + b"\\xe2"))
    ['a', 'é', '\ufffd']
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        text = decoder.decode(bytes([token])) if token < END_OF_TEXT else ""
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
