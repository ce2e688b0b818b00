"""Text from a language model: temperature, nucleus sampling, and the loop that continues a prompt."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..validation import bad, check_positive
from .data import END_OF_TEXT

NextLogits = Callable[[Tensor], Tensor]


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
    next_logits: NextLogits,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[int]:
    """Continues a prompt, token after token, up to and including `END_OF_TEXT`.

    The whole prefix goes through the model for each token.

    Args:
        next_logits: tokens so far, int64 `[N]` on the CPU -> logits of the next one, `[V]`.
        prompt: tokens to begin with, at least one. A new document begins with `END_OF_TEXT`.
        max_new_tokens: where to stop.
        temperature: see `next_token_probabilities`.
        top_p: see `next_token_probabilities`.
        seed: of the draws.

    Raises:
        ValueError: for an empty prompt, or numbers out of range.
    """
    check_positive("max_new_tokens", max_new_tokens)
    check_sampling(temperature, top_p)
    if not prompt:
        raise bad("prompt", "at least one token", "none", "begin a document with END_OF_TEXT")
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        probabilities = next_token_probabilities(
            next_logits(torch.tensor(tokens)), temperature=temperature, top_p=top_p
        )
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        yield token
        if token == END_OF_TEXT:
            return
        tokens.append(token)


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
