"""Sampling: the distribution of the next token, the loop, and text as it streams."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attention.training import END_OF_TEXT, VOCAB_SIZE
from flash_sparse_attention.training.sampling import decode_stream, generate_tokens, next_token_probabilities

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


def one_more(prefix: torch.Tensor) -> torch.Tensor:
    """Logits of a model that counts, and ends the text behind 5."""
    following = END_OF_TEXT if prefix[-1] == 5 else (int(prefix[-1]) + 1) % VOCAB_SIZE
    return torch.nn.functional.one_hot(torch.tensor(following), VOCAB_SIZE).float()


class TestGenerate:
    def test_greedy(self):
        assert list(generate_tokens(one_more, [10, 1], max_new_tokens=3, temperature=0)) == [2, 3, 4]

    def test_stops_at_the_end_of_text(self):
        assert list(generate_tokens(one_more, [3], max_new_tokens=9, temperature=0)) == [4, 5, END_OF_TEXT]

    def test_a_seed_repeats(self):
        runs = [list(generate_tokens(one_more, [3], max_new_tokens=20, temperature=1, seed=s)) for s in (1, 1, 2)]
        assert runs[0] == runs[1] != runs[2]

    def test_draws_have_the_distribution(self):
        tokens = list(
            generate_tokens(lambda _: SHARES.log(), [0], max_new_tokens=4000, temperature=1, top_p=0.85, seed=0)
        )
        shares = torch.bincount(torch.tensor(tokens), minlength=4) / 4000
        assert shares[0] == 0
        torch.testing.assert_close(shares, torch.tensor([0, 4, 2, 3]) / 9, rtol=0, atol=0.03)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="prompt must be"):
            next(generate_tokens(one_more, [], max_new_tokens=1))
        with pytest.raises(ValueError, match="max_new_tokens must be"):
            next(generate_tokens(one_more, [1], max_new_tokens=0))


class TestDecode:
    def test_characters_come_when_they_are_whole(self):
        text = "aé€🙂"
        stream = decode_stream(text.encode())
        assert list(stream) == list(text)

    def test_what_is_no_utf8(self):
        assert "".join(decode_stream(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"

    def test_end_of_text_has_no_text(self):
        assert "".join(decode_stream([END_OF_TEXT, 97, END_OF_TEXT])) == "a"
