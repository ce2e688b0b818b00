"""Sampling: the distribution of the next token, the loop, and text as it streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flash_sparse_attention import NSAConfig
from flash_sparse_attention.nn import LanguageModel, LanguageModelConfig
from flash_sparse_attention.training import END_OF_TEXT, VOCAB_SIZE
from flash_sparse_attention.training.sampling import (
    Read,
    cached,
    decode_stream,
    generate_tokens,
    next_token_probabilities,
    uncached,
)

SHARES = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1.0, [0.1, 0.4, 0.2, 0.3]),
        (0.95, [0.1, 0.4, 0.2, 0.3]),
        (0.85, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.65, [0, 4 / 7, 0, 3 / 7]),
        (0.35, [0, 1, 0, 0]),
        (1e-9, [0, 1, 0, 0]),
    ],
)
def test_nucleus_by_hand(top_p, kept):
    got = next_token_probabilities(SHARES.log(), top_p=top_p)
    torch.testing.assert_close(got, torch.tensor(kept, dtype=torch.float64), rtol=1e-6, atol=0)


def test_nucleus_takes_no_token_more_than_it_needs_and_equals_by_their_number():
    assert next_token_probabilities(torch.zeros(4), top_p=0.5).tolist() == [0.5, 0.5, 0, 0]


def test_temperature():
    got = next_token_probabilities(SHARES.log(), temperature=0.5)
    torch.testing.assert_close(got, (SHARES**2 / (SHARES**2).sum()).double(), rtol=1e-6, atol=0)
    assert next_token_probabilities(SHARES.log(), temperature=0).tolist() == [0, 1, 0, 0]
    assert next_token_probabilities(SHARES.log(), temperature=1e-310).tolist() == [0, 1, 0, 0]
    assert next_token_probabilities(torch.zeros(3), temperature=0).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"top_p": float("nan")}, "top_p must be"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        next_token_probabilities(SHARES.log(), **options)


def test_logits_that_are_not_finite():
    with pytest.raises(ValueError, match="logits must be finite"):
        next_token_probabilities(torch.tensor([0.0, float("nan")]))


def one_more(new: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of a model that counts, and ends the text behind 5."""
    following = [END_OF_TEXT if tokens[-1] == 5 else (tokens[-1] + 1) % VOCAB_SIZE for tokens in new]
    return torch.nn.functional.one_hot(torch.tensor(following), VOCAB_SIZE).float()


def continued(read: Read, prompt: Sequence[int], **options: Any) -> list[int | None]:
    """What follows one prompt."""
    return [token for (token,) in generate_tokens(read, [prompt], **options)]


class TestGenerate:
    def test_greedy(self):
        assert continued(one_more, [10, 1], max_new_tokens=3, temperature=0) == [2, 3, 4]

    def test_stops_at_the_end_of_text(self):
        assert continued(one_more, [3], max_new_tokens=9, temperature=0) == [4, 5, END_OF_TEXT]

    def test_a_seed_repeats(self):
        runs = [continued(one_more, [3], max_new_tokens=20, temperature=1, seed=s) for s in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_draws_have_the_distribution(self):
        options = {"max_new_tokens": 4000, "temperature": 1, "top_p": 0.85, "seed": 0}
        tokens = continued(lambda _: SHARES.log()[None], [0], **options)
        shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
        assert shares[0] == 0
        torch.testing.assert_close(shares, torch.tensor([0, 4, 2, 3]) / 9, rtol=0, atol=0.03)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="prompt must be"):
            next(generate_tokens(one_more, [[1], []], max_new_tokens=1))
        with pytest.raises(ValueError, match="prompt must be"):
            next(generate_tokens(one_more, [], max_new_tokens=1))
        with pytest.raises(ValueError, match="max_new_tokens must be"):
            next(generate_tokens(one_more, [[1]], max_new_tokens=0))

    def test_prompts_end_one_by_one(self):
        steps = list(generate_tokens(one_more, [[3], [9, 2], [7]], max_new_tokens=4, temperature=0))
        assert steps == [[4, 3, 8], [5, 4, 9], [END_OF_TEXT, 5, 10], [None, END_OF_TEXT, 11]]

    @pytest.mark.parametrize("attention", ["nsa", "full"])
    def test_together_as_alone_with_a_cache_as_without(self, attention: str):
        torch.manual_seed(0)
        nsa = NSAConfig.preset("fsa", kernel_size=8, kernel_stride=4, block_size=16, num_selected_blocks=4)
        model = LanguageModel(LanguageModelConfig(VOCAB_SIZE, 32, 32, 2, head_dim=8, attention=attention, nsa=nsa))
        prompts = [[END_OF_TEXT, *b"a text that is longer than the other"], [END_OF_TEXT], list(b"short")]
        options = {"max_new_tokens": 30, "temperature": 1.0}

        def reader(count: int) -> Read:
            return cached(model, count, 70) if attention == "nsa" else uncached(model, count)

        together = list(zip(*generate_tokens(reader(3), prompts, seed=5, **options), strict=True))
        for number, (prompt, tokens) in enumerate(zip(prompts, together, strict=True)):
            alone = continued(uncached(model, 1), prompt, seed=5 + number, **options)
            assert [token for token in tokens if token is not None] == alone


class TestDecode:
    def test_characters_come_when_they_are_whole(self):
        text = "aé€🙂"
        stream = decode_stream(text.encode())
        assert list(stream) == list(text)

    def test_what_is_no_utf8(self):
        assert "".join(decode_stream(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"

    def test_end_of_text_has_no_text(self):
        assert "".join(decode_stream([END_OF_TEXT, 97, END_OF_TEXT])) == "a"
