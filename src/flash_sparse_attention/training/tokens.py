"""Text as the tokens of a tokenizer, computed once and kept on disk: text may be larger than memory.

    runs/qwen/tokens/0f3c.../tokens.bin      all documents one behind the other, uint16 or uint32
                             documents.npy   where each ends, and a number out of its hash
                             info.json       what it was made of: `TokenInfo`

The name of the folder is a hash of the files (places, sizes, times of change), the tokenizer and what else decides what
is in it, so that text which has changed is tokenised again. The split of held-out documents is that of bytes: by the
hash of each text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..validation import bad
from .data import PATHS_CURE, Corpus, Documents, draw, held_out_limit, split_one
from .documents import find_sources, read_documents
from .files import named

_FORMAT = 1
_TOKENS, _DOCUMENTS, _INFO = "tokens.bin", "documents.npy", "info.json"
_DOCUMENT = np.dtype([("end", np.int64), ("draw", np.float64)])
# What is tokenised at once; tokenizers hold some 100 bytes for a token. Longer texts are cut at ends of lines.
_BATCH_TEXTS, _BATCH_CHARACTERS = 1024, 1 << 22
_PIECE_CHARACTERS = 1 << 20
_POLL_S = 0.2

# Documents and tokens so far.
Tokenised = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenInfo:
    """What is known of tokenised text.

    Attributes:
        dtype: of the tokens, `uint16` or `uint32`.
        total_tokens: tokens of all documents.
        max_token: the largest of them.
        fingerprint: of all texts in their order, and the tokenizer.
    """

    dtype: str
    total_tokens: int
    max_token: int
    fingerprint: str


class Tokenizer:
    """A tokenizer of transformers, as training takes it.

    Args:
        tokenizer: what `AutoTokenizer.from_pretrained` returns.
        source: where it is from, for messages.

    Attributes:
        end: token that closes a document.
        beginning: token that the model sees before the first one of a document: that for the beginning of a text if
            there is one, else `end`.
        fingerprint: changes with what the tokenizer does.

    Raises:
        ValueError: if it has no token for the end of a text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        if tokenizer.eos_token_id is None:
            raise bad("pretrained", "a model whose tokenizer has an eos_token", f"{source!r}, whose has none")
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        self.beginning = self.end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        # The largest token, which need not be the last.
        self.max_token = max(tokenizer.get_vocab().values())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # What was left on when the tokenizer was saved, is off in training, and is saved off with checkpoints.
            backend.no_truncation()
            backend.no_padding()
        rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        self.fingerprint = _hash(rules, self.end, self.beginning)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype that holds all tokens."""
        return np.dtype(np.uint16 if self.max_token < 1 << 16 else np.uint32)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts, without those for beginning and end."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        return [list(itertools.chain.from_iterable(itertools.islice(encoded, len(text)))) for text in pieces]


def read_tokens(
    paths: Sequence[str],
    *,
    tokenizer: Tokenizer,
    cache: Path,
    suffixes: Sequence[str],
    text_field: str = "text",
    held_out_fraction: float = 0.05,
    writes: bool = True,
    tokenised: Tokenised = lambda documents, tokens: None,
) -> Corpus:
    """The text in files and folders as tokens; tokenises what `cache` does not hold yet.

    Args:
        paths: see `data.read_corpus` and `documents`.
        tokenizer: of the model.
        cache: folder for tokenised text.
        suffixes: what the names of files in folders end with.
        text_field: where the text is in JSONL and tables.
        held_out_fraction: share of the documents that is held out.
        writes: whether this process is to tokenise; another one waits until the text is there.
        tokenised: hears of progress, now and then.

    Raises:
        ValueError: for text that cannot be found, read or split.
        OSError: if the disk is full or cannot be written.
    """
    sources = find_sources(paths, suffixes)
    stats = [(str(file), *_stat(file)) for path, _ in sources for file in _files(path)]
    key = _hash(_FORMAT, stats, tokenizer.fingerprint, text_field, held_out_fraction)
    place = cache / key
    if writes and not place.is_dir():
        texts = (text for path, _ in sources for text in read_documents(path, text_field))
        _write(place, _split_if_one(texts, held_out_fraction), tokenizer, tokenised)
    while not place.is_dir():
        time.sleep(_POLL_S)
    return _read(place, tokenizer, held_out_fraction)


def _write(place: Path, texts: Iterator[tuple[str, float]], tokenizer: Tokenizer, tokenised: Tokenised) -> None:
    """Tokenises (text, draw) into a folder, which is there in whole or not at all."""
    unfinished = place.with_name(f".unfinished-{place.name}-{uuid.uuid4().hex[:8]}")
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    documents: list[npt.NDArray[Any]] = []
    end, largest = 0, 0
    try:
        with named(place):
            unfinished.mkdir(parents=True)
            with (unfinished / _TOKENS).open("wb") as file:
                for batch in _batches(texts):
                    rows = np.zeros(len(batch), _DOCUMENT)
                    encoded = tokenizer.encode([text for text, _ in batch])
                    for row, (text, number), tokens in zip(rows, batch, encoded, strict=True):
                        digest.update(hashlib.sha256(text.encode()).digest())
                        values = np.array([*tokens, tokenizer.end], tokenizer.dtype)
                        end += len(values)
                        largest = max(largest, int(values.max()))
                        row["end"], row["draw"] = end, number
                        file.write(values.tobytes())
                    documents.append(rows)
                    tokenised(sum(map(len, documents)), end)
            np.save(unfinished / _DOCUMENTS, np.concatenate(documents))
            info = TokenInfo(tokenizer.dtype.name, end, largest, digest.hexdigest()[:16])
            (unfinished / _INFO).write_text(json.dumps(dataclasses.asdict(info), indent=1) + "\n", encoding="utf-8")
            try:
                os.replace(unfinished, place)
            except OSError:
                # Another run with the same cache was faster.
                if not place.is_dir():
                    raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(place: Path, tokenizer: Tokenizer, held_out_fraction: float) -> Corpus:
    """The two sides of the split, with tokens mapped into memory."""
    try:
        info = TokenInfo(**json.loads((place / _INFO).read_text(encoding="utf-8")))
        documents = np.load(place / _DOCUMENTS)
        tokens = np.memmap(place / _TOKENS, dtype=info.dtype, mode="r", shape=(info.total_tokens,))
    except (OSError, ValueError, TypeError) as error:
        raise bad(str(place), "tokenised text", str(error), "it is damaged; remove the folder") from error
    held_out = documents["draw"] < held_out_limit(documents["draw"], held_out_fraction)
    starts = np.append(0, documents["end"][:-1])
    lengths = documents["end"] - starts

    def side(chosen: npt.NDArray[np.bool_]) -> Documents:
        bounds = np.append(0, np.cumsum(lengths[chosen]))
        return Documents((), tokens, bounds, starts[chosen], tokenizer.beginning, "tokens")

    return Corpus(side(~held_out), side(held_out), _hash(info.fingerprint, held_out_fraction), info.max_token)


def _split_if_one(texts: Iterator[str], held_out_fraction: float) -> Iterator[tuple[str, float]]:
    """Each text with the number that decides on its side; of a single text, the end is held out."""
    first = list(itertools.islice(texts, 2))
    if not first:
        raise bad("paths", "files with text in them", "only empty documents", PATHS_CURE)
    if len(first) == 1:
        train, held_out = split_one("", first[0].encode(), held_out_fraction)
        # Where a text without lines is cut within a character, that one is lost.
        yield train[0][1].decode(errors="ignore"), 1.0
        yield held_out[0][1].decode(errors="ignore"), 0.0
        return
    for text in itertools.chain(first, texts):
        yield text, draw(text.encode())


def _batches(texts: Iterable[tuple[str, float]]) -> Iterator[list[tuple[str, float]]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text[0])
        if len(batch) == _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with lines, where it is long."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1 or start + _PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _stat(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _hash(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode(errors="backslashreplace")).hexdigest()[:16]
