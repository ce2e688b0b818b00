"""Text as tokens: every kind of file, what cannot be read, the split, and the store on disk."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from flash_sparse_attention.training import documents, tokens
from flash_sparse_attention.training.data import DEFAULT_SUFFIXES, TrainingPacks, held_out_packs
from flash_sparse_attention.training.documents import find_sources, read_documents
from flash_sparse_attention.training.tokens import Tokenizer, read_tokens
from pretrained_runs import texts, write_jsonl, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load_tokenizer(folder, **options) -> Tokenizer:
    from transformers import AutoTokenizer

    write_tokenizer(folder, **options)
    return Tokenizer(AutoTokenizer.from_pretrained(folder), str(folder))


def read(paths, tokenizer, cache, **options):
    options = {"suffixes": DEFAULT_SUFFIXES, "held_out_fraction": 0.2} | options
    return read_tokens([str(path) for path in paths], tokenizer=tokenizer, cache=cache, **options)


def all_texts(corpus, tokenizer) -> list[str]:
    """The documents of both sides, without the tokens that close them."""
    found = []
    for side in (corpus.train, corpus.held_out):
        for start, length in zip(side.starts, side.lengths, strict=True):
            document = side.tokens[start : start + length].tolist()
            assert document[-1] == tokenizer.end
            found.append(tokenizer.tokenizer.decode(document[:-1]))
    return sorted(found)


def write_as(kind, folder, rows):
    """The rows as documents of a kind; returns the path to name."""
    if kind == "text":
        folder.mkdir()
        for index, row in enumerate(rows):
            (folder / f"{index:03}.txt").write_text(row, encoding="utf-8")
        return folder
    if kind == "jsonl":
        return write_jsonl(folder.with_suffix(".jsonl"), rows)
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"id": list(range(len(rows))), "text": rows}).save_to_disk(folder)
        return folder
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder.mkdir()
    for part in range(2):
        table = arrow.table({"id": list(range(len(rows)))[part::2], "text": rows[part::2]})
        parquet.write_table(table, folder / f"{part}.parquet", row_group_size=5)
    return folder


class TestKinds:
    @pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "dataset"])
    def test_all_documents_and_nothing_else(self, tmp_path, tokenizer, kind):
        path = write_as(kind, tmp_path / "corpus", texts())
        corpus = read([path], tokenizer, tmp_path / "cache")
        assert all_texts(corpus, tokenizer) == sorted(texts())
        assert len(corpus.held_out) > 0
        # The split and the fingerprint depend on texts alone, whatever holds them in which order.
        again = read([write_as("jsonl", tmp_path / "again", texts())], tokenizer, tmp_path / "cache")
        assert len(again.train) == len(corpus.train)
        if kind not in ("parquet",):
            assert again.fingerprint == corpus.fingerprint

    def test_folders_hold_any_mixture(self, tmp_path):
        rows = texts(8)
        folder = tmp_path / "all"
        folder.mkdir()
        write_as("dataset", folder / "saved", rows[:2])
        write_as("parquet", folder / "tables", rows[2:4])
        write_jsonl(folder / "lines.ndjson", rows[4:6])
        (folder / "book.md").write_text(rows[6])
        sources = find_sources([str(folder)], DEFAULT_SUFFIXES)
        names = [name for _, name in sources]
        assert names == ["book.md", "lines.ndjson", "saved", "tables/0.parquet", "tables/1.parquet"]
        found = [text for path, _ in sources for text in read_documents(path, "text")]
        assert sorted(found) == sorted(rows[:7])
        assert [name for _, name in find_sources([str(folder)], (".md",))] == ["book.md", "saved"]

    def test_another_field_and_rows_without_text(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"body": "one"}\n\n{"body": null}\n{"body": ""}\n{"body": "\\ud800 two"}\n')
        assert list(read_documents(path, "body")) == ["one", "? two"]

    def test_bytes_that_are_no_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a\xffb")
        assert list(read_documents(tmp_path / "a.txt", "text")) == ["a\ufffdb"]


class TestBadText:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"rows\.jsonl line 2 must be JSON, got '\{'"),
            ("[1]", r"rows\.jsonl line 2 must be an object with a text in 'text'"),
            ('{"text": 3}', r"rows\.jsonl line 2 must be an object with a text in 'text'"),
            ('{"body": "x"}', r"rows\.jsonl line 2 must be with text in 'text', got the fields 'body': .*--text-field"),
        ],
    )
    def test_lines(self, tmp_path, line, message):
        (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / "rows.jsonl", "text"))

    @pytest.mark.parametrize("kind", ["parquet", "dataset"])
    def test_tables_without_the_column(self, tmp_path, kind):
        path = write_as(kind, tmp_path / "corpus", texts(4))
        ((source, _), *_) = find_sources([str(path)], DEFAULT_SUFFIXES)
        with pytest.raises(ValueError, match="must be with text in 'body', got the fields 'id', 'text'"):
            list(read_documents(source, "body"))
        with pytest.raises(ValueError, match="column 'id' must be of text, got 0"):
            list(read_documents(source, "id"))

    def test_what_is_no_parquet(self, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "a.parquet").write_bytes(b"text")
        with pytest.raises(ValueError, match=r"a\.parquet must be a Parquet file, got"):
            list(read_documents(tmp_path / "a.parquet", "text"))

    def test_a_dataset_of_several_splits(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        part = datasets.Dataset.from_dict({"text": ["a", "b"]})
        datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
        with pytest.raises(ValueError, match=r"the folder of one split of a dataset, got .*name one of .*both/train"):
            list(read_documents(tmp_path / "both", "text"))
        assert list(read_documents(tmp_path / "both" / "train", "text")) == ["a", "b"]

    def test_a_package_that_is_missing(self, tmp_path, monkeypatch):
        write_as("parquet", tmp_path / "corpus", texts(4))
        monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(
            ValueError, match=r"needs the package pyarrow.*pip install 'flash-sparse-attention\[train\]'"
        ):
            list(read_documents(tmp_path / "corpus" / "0.parquet", "text"))

    @pytest.mark.parametrize("rows", [[], ["", ""]])
    def test_nothing(self, tmp_path, tokenizer, rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n" + "".join(json.dumps({"text": row}) + "\n" for row in rows))
        with pytest.raises(ValueError, match="only empty documents"):
            read([path], tokenizer, tmp_path / "cache")
        assert not any((tmp_path / "cache").glob("*"))

    def test_copies_of_one(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "rows.jsonl", ["same", "same"])
        with pytest.raises(ValueError, match="at least two files that differ, got 2 copies"):
            read([path], tokenizer, tmp_path / "cache")

    def test_a_tokenizer_without_an_end(self, tmp_path):
        with pytest.raises(ValueError, match="pretrained must be a model whose tokenizer has an eos_token"):
            load_tokenizer(tmp_path, eos=False)


class TestStore:
    def test_is_read_again_and_not_made_again(self, tmp_path, tokenizer, monkeypatch):
        path = write_jsonl(tmp_path / "rows.jsonl", texts())
        heard = []
        first = read([path], tokenizer, tmp_path / "cache", tokenised=lambda *counts: heard.append(counts))
        assert heard == [(24, first.train.total_tokens + first.held_out.total_tokens)]
        with monkeypatch.context() as patch:
            patch.setattr(Tokenizer, "encode", None)
            second = read([path], tokenizer, tmp_path / "cache")
        assert second.fingerprint == first.fingerprint
        assert isinstance(second.train.tokens, np.memmap)
        assert second.train.tokens.dtype == np.uint16
        assert all_texts(first, tokenizer) == all_texts(second, tokenizer)
        assert first.max_token == second.max_token == int(first.train.tokens.max())

    def test_text_that_has_changed_is_tokenised_again(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "rows.jsonl", texts())
        first = read([path], tokenizer, tmp_path / "cache")
        write_jsonl(path, [*texts()[1:], "another one"])
        second = read([path], tokenizer, tmp_path / "cache")
        assert second.fingerprint != first.fingerprint
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_batches_and_pieces_change_nothing(self, tmp_path, tokenizer, monkeypatch):
        rows = [*texts(), "a line\n" * 500, "x" * 1000]
        whole = read([write_jsonl(tmp_path / "a.jsonl", rows)], tokenizer, tmp_path / "cache")
        monkeypatch.setattr(tokens, "_BATCH_TEXTS", 3)
        monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 300)
        batches = read([write_jsonl(tmp_path / "b.jsonl", rows)], tokenizer, tmp_path / "cache")
        assert np.array_equal(batches.train.tokens, whole.train.tokens)
        # A cut within a line may cut tokens too, the text stays.
        monkeypatch.setattr(tokens, "_PIECE_CHARACTERS", 100)
        pieces = read([write_jsonl(tmp_path / "c.jsonl", rows)], tokenizer, tmp_path / "cache")
        assert all_texts(pieces, tokenizer) == all_texts(whole, tokenizer) == sorted(rows)

    def test_of_one_document_the_end_is_held_out(self, tmp_path, tokenizer):
        (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(100)))
        corpus = read([tmp_path / "book.txt"], tokenizer, tmp_path / "cache", held_out_fraction=0.1)
        assert len(corpus.train) == len(corpus.held_out) == 1
        tail, head = all_texts(corpus, tokenizer)[::-1]
        assert (head + tail).count("\n") == 100
        assert tail.endswith("line 99\n")

    def test_a_failure_leaves_nothing(self, tmp_path, tokenizer):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in texts()) + "{\n")
        with pytest.raises(ValueError, match="line 25 must be JSON"):
            read([path], tokenizer, tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())

    def test_a_damaged_store_is_named(self, tmp_path, tokenizer):
        path = write_jsonl(tmp_path / "rows.jsonl", texts())
        read([path], tokenizer, tmp_path / "cache")
        (place,) = (tmp_path / "cache").iterdir()
        (place / "tokens.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"must be tokenised text, got .*damaged; remove the folder"):
            read([path], tokenizer, tmp_path / "cache")
        shutil.rmtree(place)
        read([path], tokenizer, tmp_path / "cache")

    def test_another_process_waits_for_it(self, tmp_path, tokenizer, monkeypatch):
        path = write_jsonl(tmp_path / "rows.jsonl", texts())
        waited = []

        def write_meanwhile(seconds):
            waited.append(seconds)
            read([path], tokenizer, tmp_path / "cache")

        monkeypatch.setattr(tokens.time, "sleep", write_meanwhile)
        corpus = read([path], tokenizer, tmp_path / "cache", writes=False)
        assert len(waited) == 1
        assert len(corpus.train) + len(corpus.held_out) == 24


class TestPacks:
    @pytest.mark.parametrize("bos", [False, True])
    def test_documents_begin_and_end_as_the_model_knows_it(self, tmp_path, bos):
        tokenizer = load_tokenizer(tmp_path / "tokenizer", bos=bos)
        corpus = read([write_jsonl(tmp_path / "rows.jsonl", texts())], tokenizer, tmp_path / "cache")
        assert (tokenizer.beginning == tokenizer.end) is not bos
        packs = TrainingPacks(corpus.train, 64, 0)
        seen = 0
        for index in range(corpus.train.total_tokens // 64):
            pack = packs.pack(index)
            inputs, targets = pack.tokens.split(pack.layout.lengths), pack.targets.split(pack.layout.lengths)
            for number, (tokens_in, out) in enumerate(zip(inputs, targets, strict=True)):
                assert tokens_in[1:].tolist() == out[:-1].tolist()
                # The first one may go on from another pack, the last one into another.
                if number:
                    assert tokens_in[0] == tokenizer.beginning
                if number < len(inputs) - 1:
                    assert out[-1] == tokenizer.end
                seen += number > 0
        assert seen > 5

    def test_too_short_a_text(self, tmp_path, tokenizer):
        corpus = read([write_jsonl(tmp_path / "rows.jsonl", ["a", "b", "c"])], tokenizer, tmp_path / "cache")
        with pytest.raises(ValueError, match="sequence_length=64 tokens of text"):
            TrainingPacks(corpus.train, 64, 0)
        assert held_out_packs(corpus.held_out, 64, 2)[0].layout.total_tokens < 64


def test_nothing_is_imported_before_it_is_needed():
    assert not {"pyarrow", "datasets"} & vars(documents).keys()


def test_how_a_tokenizer_was_left_does_not_matter(tmp_path):
    """Training cuts and pads nothing, and saves the tokenizer so; it resumes from what it saved."""
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = Tokenizer(tokenizer, "model").fingerprint
    tokenizer.backend_tokenizer.enable_truncation(7)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    assert Tokenizer(tokenizer, "model").fingerprint == plain
