"""Text: which files, which side of the split, and packs that hold every token once an epoch."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_sparse_attention.training import data
from flash_sparse_attention.training.data import (
    END_OF_TEXT,
    Documents,
    TrainingPacks,
    byte_unigram_entropy,
    held_out_packs,
    read_corpus,
)
from training_runs import write_texts


def documents(*lengths: int) -> Documents:
    """Documents of these many bytes; no two are alike."""
    random = np.random.default_rng(0)
    return Documents.from_texts((str(i), random.bytes(length)) for i, length in enumerate(lengths))


def contents(found: Documents) -> list[bytes]:
    return [
        bytes(found.tokens[a : b - 1].astype(np.uint8)) for a, b in zip(found.bounds, found.bounds[1:], strict=False)
    ]


class TestFiles:
    def test_folders_are_searched_for_suffixes_and_named_files_are_taken_as_they_are(self, tmp_path):
        for name in ("b.py", "a/z.py", "a/deep/y.PY", "a/x.bin", ".hidden/h.py", ".h.py", "__pycache__/c.py"):
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        (tmp_path / "root" / "empty.py").touch()
        odd = tmp_path / "odd.dat"
        odd.write_bytes(b"odd")
        # One file under two names is read once.
        (tmp_path / "link.py").symlink_to(tmp_path / "root" / "b.py")
        corpus = read_corpus([tmp_path / "root", odd, tmp_path / "link.py"], suffixes=(".py",))
        assert sorted(corpus.train.names + corpus.held_out.names) == ["a/deep/y.PY", "a/z.py", "b.py", "odd.dat"]
        everything = read_corpus([tmp_path / "root"], suffixes=("*",))
        assert "a/x.bin" in everything.train.names + everything.held_out.names

    def test_by_default_the_standard_library(self):
        names = [name for _, name in data.find_files((), ())]
        assert {"os.py", "json/decoder.py"} <= set(names)
        assert names == sorted(names)
        assert not [name for name in names if "site-packages" in name or "/test" in name or not name.endswith(".py")]

    @pytest.mark.parametrize(
        ("make", "what"),
        [
            (lambda p: None, "does not exist"),
            (lambda p: p.touch(), "empty"),
            (lambda p: p.mkdir(), "folders with files that end with"),
            (os.mkfifo, "neither"),
        ],
    )
    def test_what_cannot_be_text_is_named(self, tmp_path, make, what):
        path = tmp_path / "it"
        make(path)
        with pytest.raises(ValueError, match=f"^paths must be .*{what}") as raised:
            read_corpus([write_texts(tmp_path / "texts"), path])
        assert what.startswith("folders") or "it'" in str(raised.value)

    def test_what_cannot_be_read_is_named(self, tmp_path, monkeypatch):
        texts = write_texts(tmp_path / "texts")

        def refuse(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"paths must be .* can be read, got '.*00\.txt' \(Permission denied\)"):
            read_corpus([texts])

    def test_a_folder_of_empty_files(self, tmp_path):
        (tmp_path / "a.txt").touch()
        with pytest.raises(ValueError, match="only empty files"):
            read_corpus([tmp_path])

    def test_one_string_is_not_a_list_of_paths(self):
        with pytest.raises(ValueError, match="brackets"):
            read_corpus("src")


class TestSplit:
    def test_depends_on_contents_only(self, tmp_path):
        here = read_corpus([write_texts(tmp_path / "here")], held_out_fraction=0.3)
        write_texts(tmp_path / "there" / "below")
        there = read_corpus([tmp_path / "there"], held_out_fraction=0.3)
        assert contents(here.held_out) == contents(there.held_out)
        assert here.fingerprint == there.fingerprint
        assert len(here.train) + len(here.held_out) == 12
        assert not set(contents(here.train)) & set(contents(here.held_out))

    def test_fingerprint_sees_a_changed_byte(self, tmp_path):
        before = read_corpus([write_texts(tmp_path)]).fingerprint
        with (tmp_path / "03.txt").open("a") as file:
            file.write("x")
        assert read_corpus([tmp_path]).fingerprint != before

    def test_fraction(self, tmp_path):
        texts = write_texts(tmp_path, count=400)
        assert 60 < len(read_corpus([texts], held_out_fraction=0.2).held_out) < 100

    @pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
    def test_no_side_is_empty(self, tmp_path, fraction):
        corpus = read_corpus([write_texts(tmp_path, count=2)], held_out_fraction=fraction)
        assert len(corpus.train) == len(corpus.held_out) == 1

    def test_copies_fall_on_one_side(self, tmp_path):
        for index in range(60):
            (tmp_path / f"{index}.txt").write_text(f"text {index // 3}")
        corpus = read_corpus([tmp_path], held_out_fraction=0.3)
        assert corpus.held_out.names
        assert not set(contents(corpus.train)) & set(contents(corpus.held_out))

    def test_of_one_file_the_end_is_held_out(self, tmp_path):
        text = b"".join(b"line %d\n" % i for i in range(100))
        (tmp_path / "book").write_bytes(text)
        corpus = read_corpus([tmp_path / "book"], held_out_fraction=0.1)
        (head,), (tail,) = contents(corpus.train), contents(corpus.held_out)
        assert head + tail == text
        assert head.endswith(b"\n")
        assert 0.1 * len(text) <= len(tail) < 0.2 * len(text)

    def test_too_little_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"x")
        with pytest.raises(ValueError, match="can be split"):
            read_corpus([tmp_path])
        (tmp_path / "b.txt").write_bytes(b"x")
        with pytest.raises(ValueError, match="two files that differ"):
            read_corpus([tmp_path])

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, math.nan])
    def test_fraction_out_of_range(self, tmp_path, fraction):
        with pytest.raises(ValueError, match="held_out_fraction must be"):
            read_corpus([write_texts(tmp_path)], held_out_fraction=fraction)


# Lengths that a pack holds many of, that are cut, that fill packs exactly, and texts shorter than two packs.
@pytest.mark.parametrize("lengths", [(5, 1, 30, 2, 9, 4), (200, 3), (15, 15, 31), (17,)])
class TestPacks:
    length = 16

    def stream(self, found, epochs, seed=3):
        """The packs that begin in the first epochs, put back into the order that they were cut in."""
        packs = TrainingPacks(found, self.length, seed)
        count = math.ceil(epochs * found.total_tokens / self.length)
        return [pack for _, pack in sorted((packs.place(index), packs.pack(index)) for index in range(count))]

    def test_the_packs_of_an_epoch_are_taken_once_each_in_any_order(self, lengths):
        found = documents(*lengths)
        packs = TrainingPacks(found, self.length, 3)
        bounds = [math.ceil(epoch * found.total_tokens / self.length) for epoch in range(6)]
        orders = [[packs.place(i) for i in range(a, b)] for a, b in itertools.pairwise(bounds)]
        assert [sorted(order) for order in orders] == [[*range(a, b)] for a, b in itertools.pairwise(bounds)]
        assert any(order != sorted(order) for order in orders) or max(map(len, orders)) < 3

    def test_every_token_is_a_target_once_an_epoch(self, lengths):
        found = documents(*lengths)
        targets = torch.cat([pack.targets for pack in self.stream(found, epochs=4)]).numpy()
        orders = set()
        for epoch in range(4):
            part = targets[epoch * found.total_tokens : (epoch + 1) * found.total_tokens]
            ends = np.flatnonzero(part == END_OF_TEXT)
            seen = [bytes(x[x != END_OF_TEXT].astype(np.uint8)) for x in np.split(part, ends + 1)[:-1]]
            assert sorted(seen) == sorted(contents(found))
            orders.add(tuple(seen))
        assert len(orders) > 1 or len(lengths) < 3

    def test_a_token_is_followed_by_its_target_and_sequences_are_documents(self, lengths):
        found = documents(*lengths)
        before = END_OF_TEXT
        for pack in self.stream(found, epochs=3):
            assert pack.tokens.dtype == pack.targets.dtype == torch.int64
            assert pack.tokens.shape == pack.targets.shape == (self.length,)
            assert pack.layout.total_tokens == self.length
            assert 0 not in pack.layout.lengths
            # The stream goes on in the next pack where this one cuts it.
            assert pack.tokens.tolist() == [before, *pack.targets[:-1].tolist()]
            before = pack.targets[-1].item()
            # A sequence ends where a document does, or at the end of the pack.
            ends = (pack.layout.cu_seqlens[1:] - 1).tolist()
            assert {*np.flatnonzero(pack.targets == END_OF_TEXT).tolist(), self.length - 1} == set(ends)

    def test_a_pack_is_a_pure_function_of_seed_and_index(self, lengths):
        found = documents(*lengths)
        packs = TrainingPacks(found, self.length, 3)
        in_order = [packs.pack(index) for index in range(20)]
        for index in (19, 0, 10):
            alone = TrainingPacks(found, self.length, 3).pack(index)
            assert torch.equal(alone.tokens, in_order[index].tokens)
            assert torch.equal(alone.targets, in_order[index].targets)
            assert alone.layout.lengths == in_order[index].layout.lengths

    def test_the_seed_orders_the_documents(self, lengths):
        found = documents(*lengths)
        streams = {
            tuple(torch.cat([pack.targets for pack in self.stream(found, 4, seed)]).tolist()) for seed in range(4)
        }
        assert len(streams) > 1 or len(lengths) == 1


def test_text_shorter_than_a_pack():
    with pytest.raises(ValueError, match=r"paths must be at least sequence_length=17 bytes .*, got 16: name more text"):
        TrainingPacks(documents(15), 17, 0)


class TestHeldOut:
    def test_all_of_a_short_text(self):
        found = documents(20, 30)
        packs = held_out_packs(found, 16, 8)
        assert [pack.layout.total_tokens for pack in packs] == [16, 16, 16, 4]
        assert torch.cat([pack.targets for pack in packs]).tolist() == found.tokens.tolist()

    def test_spread_over_a_long_one(self):
        found = documents(*[99] * 10)
        packs = held_out_packs(found, 16, 4)
        starts = [0, 15 * 16, 31 * 16, 46 * 16]
        assert [pack.targets.tolist() for pack in packs] == [found.tokens[a : a + 16].tolist() for a in starts]


def test_unigram_entropy_by_hand():
    # Half of the targets are of one kind, two kinds have a quarter each: 1.5 bits.
    targets = torch.tensor([65, 65, 66, END_OF_TEXT])
    assert byte_unigram_entropy(targets) == pytest.approx(1.5 * math.log(2))
    assert byte_unigram_entropy(torch.zeros(9, dtype=torch.int64)) == 0
