"""Text as tokens: finds files, splits them into training and held-out texts, and cuts them into packs.

A token is a byte, 0 to 255, or `END_OF_TEXT`, which closes every document. Documents follow one another in a stream,
and the model learns to predict each of its tokens once an epoch. What it sees at a position is the token before; before
the first byte of a document that is the `END_OF_TEXT` of the document before, which is how every text begins:

    stream of targets     a b c $ d e $ f ...         $ is END_OF_TEXT
    tokens the model sees $ a b c $ d e $ ...
    sequences             [0----] [1--] [2 ...        no sequence holds parts of two documents
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..types import SequenceLayout
from ..validation import bad

END_OF_TEXT = 256
VOCAB_SIZE = 257
ALL_SUFFIXES = "*"
DEFAULT_SUFFIXES = (
    *(
        ".c",
        ".cc",
        ".cfg",
        ".cpp",
        ".css",
        ".cu",
        ".cuh",
        ".go",
        ".h",
        ".hpp",
        ".html",
        ".java",
        ".js",
        ".json",
        ".jsonl",
    ),
    *(
        ".kt",
        ".lua",
        ".md",
        ".php",
        ".pl",
        ".py",
        ".pyi",
        ".r",
        ".rb",
        ".rs",
        ".rst",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
    ),
    *(".tex", ".toml", ".ts", ".txt", ".xml", ".yaml", ".yml"),
)
# Of the standard library: what is not part of it, its tests, and tables that nobody wrote by hand.
_STDLIB_SKIPPED = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
        *("encodings", "pydoc_data"),
    )
)


class Pack(NamedTuple):
    """Sequences of text, one behind the other.

    Attributes:
        tokens: what the model sees, int64 `[N]`, values below `VOCAB_SIZE`.
        targets: the token that follows each of them, int64 `[N]`. There always is one (nothing is masked): a document
            that goes on in the next pack has its next byte here, and the last target of a document is `END_OF_TEXT`.
        layout: bounds of the sequences; each is one document, or the part of one that fell into this pack.
    """

    tokens: Tensor
    targets: Tensor
    layout: SequenceLayout

    def to(self, device: torch.device) -> Pack:
        """The pack on another device; does not wait for the copy."""
        if device.type == "cpu":
            return self
        move = (self.tokens.pin_memory(), self.targets.pin_memory()) if device.type == "cuda" else self[:2]
        tokens, targets = (x.to(device, non_blocking=True) for x in move)
        return Pack(tokens, targets, SequenceLayout.from_lengths(self.layout.lengths, device))


@dataclass(frozen=True, eq=False)
class Documents:
    """Texts as tokens, each closed by a token that says so: `END_OF_TEXT` where tokens are bytes.

    Attributes:
        names: name of each document, for messages; empty where they have none.
        tokens: what holds all documents, uint16 or uint32 `[M]`; may be a file mapped into memory.
        bounds: where each would begin if they stood one behind the other, and the end of the last, int64 `[D + 1]`.
        starts: where each begins in `tokens`, int64 `[D]`.
        beginning: token that the model sees before the first one of a document.
        unit: what a token is, for messages.
    """

    names: tuple[str, ...]
    tokens: npt.NDArray[np.unsignedinteger[Any]] = field(repr=False)
    bounds: npt.NDArray[np.int64] = field(repr=False)
    starts: npt.NDArray[np.int64] = field(repr=False)
    beginning: int = END_OF_TEXT
    unit: str = "bytes"

    @classmethod
    def from_texts(cls, texts: Iterable[tuple[str, bytes]]) -> Documents:
        """Documents of these (name, content), with bytes as tokens."""
        names, parts = [], [np.zeros(0, np.uint16)]
        for name, content in texts:
            names.append(name)
            parts.append(np.append(np.frombuffer(content, np.uint8).astype(np.uint16), np.uint16(END_OF_TEXT)))
        bounds = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return cls(tuple(names), np.concatenate(parts), bounds, bounds[:-1])

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents, those that close them included."""
        return int(self.bounds[-1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, the one that closes it included."""
        return np.diff(self.bounds)


@dataclass(frozen=True, eq=False)
class Corpus:
    """The text of a run: what is trained on, and what is held out.

    Attributes:
        train: documents to train on.
        held_out: documents that the loss is measured on.
        fingerprint: changes with any byte of either, and with their order.
        max_token: the largest token.
    """

    train: Documents
    held_out: Documents
    fingerprint: str
    max_token: int = END_OF_TEXT


def read_corpus(
    paths: Sequence[str | Path] = (),
    *,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    held_out_fraction: float = 0.05,
) -> Corpus:
    """Reads text files and splits them.

    A file is held out if the hash of its content says so: the split depends on nothing else, and copies of a file fall
    on one side. At least one file is held out and one trained on; of a single file the end is held out.

    Args:
        paths: files, taken whatever their suffix, and folders, searched to the bottom for files with one of `suffixes`
            (hidden ones and empty ones are passed over). None: the Python sources of the standard library of the
            interpreter that runs this, without tests and tables.
        suffixes: what the names of files in folders end with; `("*",)` for any file.
        held_out_fraction: share of the files that is held out, more than 0 and less than 1.

    Raises:
        ValueError: for a path that does not exist, is neither file nor folder, cannot be read, is empty, or is a folder
            without a matching file; for text that cannot be split; for a fraction out of range.
    """
    if not 0 < held_out_fraction < 1:
        raise bad("held_out_fraction", "more than 0 and less than 1", held_out_fraction)
    texts = [(name, _read(path)) for path, name in find_files(paths, suffixes)]
    texts = [(name, content) for name, content in texts if content]
    if not texts:
        raise bad("paths", "files with text in them", "only empty files", PATHS_CURE)
    if len(texts) == 1:
        train, held_out = split_one(*texts[0], held_out_fraction)
    else:
        train, held_out = _split(texts, held_out_fraction)
    digest = hashlib.sha256()
    for side in (train, held_out):
        for _, content in side:
            digest.update(hashlib.sha256(content).digest())
        digest.update(b"|")
    return Corpus(Documents.from_texts(train), Documents.from_texts(held_out), digest.hexdigest()[:16])


class TrainingPacks:
    """Training text, shuffled and cut: pack i is a pure function of the documents, the seed and i.

    Every epoch puts the documents into a new order; the epochs follow one another without a gap, and this stream is cut
    every `sequence_length` tokens: each token of each document is a target exactly once an epoch. The packs that begin
    in an epoch come in an order drawn anew: those of a long document one after the other make the loss wander.

    Args:
        documents: the text.
        sequence_length: tokens of a pack.
        seed: of the orders.

    Raises:
        ValueError: if the text is shorter than a pack.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int) -> None:
        if documents.total_tokens < sequence_length:
            raise bad(
                "paths",
                f"at least sequence_length={sequence_length} {documents.unit} of text to train on",
                documents.total_tokens,
                "name more text, or lower sequence_length",
            )
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self._epochs: dict[int, _Epoch] = {}

    def pack(self, index: int) -> Pack:
        """Pack `index`, 0 and up without end, of exactly `sequence_length` tokens."""
        start = self.place(index) * self.sequence_length
        return _assemble(self.documents, self._pieces(start, start + self.sequence_length))

    def place(self, index: int) -> int:
        """How many packs of the stream lie before pack `index`."""
        epoch = index * self.sequence_length // self.documents.total_tokens
        first = self._first_pack(epoch)
        return first + int(self._epoch(epoch).packs[index - first])

    def _first_pack(self, epoch: int) -> int:
        """First of the packs that begin in the epoch."""
        return -(-epoch * self.documents.total_tokens // self.sequence_length)

    def _pieces(self, start: int, stop: int) -> Iterator[_Piece]:
        """What lies in [start, stop) of the stream of epochs."""
        size = self.documents.total_tokens
        while start < stop:
            epoch, offset = divmod(start, size)
            drawn = self._epoch(epoch)
            end = min(offset + stop - start, size)
            yield from _cut(drawn.documents, drawn.bounds, offset, end)
            start += end - offset

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            random = np.random.default_rng((self.seed, epoch))
            documents = random.permutation(len(self.documents))
            packs = random.permutation(self._first_pack(epoch + 1) - self._first_pack(epoch))
            # A pack lies in one epoch or at the bound of two; older ones are not asked for again.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            bounds = np.append(0, np.cumsum(self.documents.lengths[documents]))
            self._epochs[epoch] = _Epoch(documents, bounds, packs)
        return self._epochs[epoch]


def held_out_packs(documents: Documents, sequence_length: int, count: int) -> list[Pack]:
    """`count` packs of `sequence_length` tokens, evenly spread over the documents; all of the text if it is shorter.

    They do not depend on a seed, so that runs can be compared.
    """
    size = documents.total_tokens
    if size <= count * sequence_length:
        starts = list(range(0, size, sequence_length))
    else:
        starts = [i * (size // sequence_length) // count * sequence_length for i in range(count)]
    order = np.arange(len(documents))
    return [
        _assemble(documents, _cut(order, documents.bounds, start, min(start + sequence_length, size)))
        for start in starts
    ]


def byte_unigram_entropy(targets: Tensor) -> float:
    """Entropy (nats) of the distribution of `targets`, int64 `[N]`, values below `VOCAB_SIZE`.

    It is the loss of the best model that looks at no context at all, so a model that has learnt anything is below it.

    >>> byte_unigram_entropy(torch.tensor([7, 7, 8, 8])) / math.log(2)
    1.0
    """
    counts = torch.bincount(targets, minlength=VOCAB_SIZE).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def encode(text: str) -> list[int]:
    """The tokens of a text: its UTF-8 bytes. Bytes of a command line that were no UTF-8 come out as they were."""
    return list(text.encode("utf-8", errors="surrogateescape"))


class _Epoch(NamedTuple):
    """The orders of an epoch: of the documents, where each of them begins and the last ends, and of the packs."""

    documents: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]
    packs: npt.NDArray[np.int64]


class _Piece(NamedTuple):
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def _cut(order: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], start: int, stop: int) -> Iterator[_Piece]:
    """The pieces of documents in [start, stop) of a stream of documents in this order, with these bounds."""
    place = int(np.searchsorted(bounds, start, side="right")) - 1
    while start < stop:
        first, end = int(bounds[place]), min(int(bounds[place + 1]), stop)
        yield _Piece(int(order[place]), start - first, end - first)
        start, place = end, place + 1


def _assemble(documents: Documents, pieces: Iterable[_Piece]) -> Pack:
    tokens, targets, lengths = [], [], []
    for document, start, stop in pieces:
        first = int(documents.starts[document])
        targets.append(documents.tokens[first + start : first + stop])
        before = int(documents.tokens[first + start - 1]) if start else documents.beginning
        tokens.append(np.append(before, targets[-1][:-1]))
        lengths.append(stop - start)
    return Pack(
        torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        SequenceLayout.from_lengths(lengths),
    )


PATHS_CURE = "name other files or folders, or none for the sources of Python's standard library"


def find_files(
    paths: Sequence[str | Path], suffixes: Sequence[str], is_whole: Callable[[Path], bool] = lambda folder: False
) -> list[tuple[Path, str]]:
    """The files to read, each once, with the names they go by; in the order of these names.

    Folders of which `is_whole` says so stand for themselves.

    Raises:
        ValueError: see `read_corpus`.
    """
    if isinstance(paths, (str, Path)) or isinstance(suffixes, str):
        raise bad("paths and suffixes", "lists", "one string", "put it in brackets")
    found: dict[Path, str] = {}
    if not paths:
        root = Path(sysconfig.get_path("stdlib"))
        if not root.is_dir():
            raise bad("paths", "given where Python has no standard library on disk", "none", "name files or folders")
        paths, suffixes, skipped = (root,), (".py",), _STDLIB_SKIPPED
    else:
        skipped = frozenset()
    for given in paths:
        path = Path(given).expanduser()
        try:
            if path.is_dir() and is_whole(path):
                files = [(path, path.name)]
            elif path.is_dir():
                files = list(_walk(path, tuple(suffixes), skipped, is_whole))
                if not files:
                    wanted = f"folders with files that end with {', '.join(suffixes)}"
                    raise bad("paths", wanted, repr(str(path)), "name other suffixes, or '*' for all files")
            elif path.is_file():
                if path.stat().st_size == 0:
                    raise bad("paths", "files with text in them", f"{str(path)!r}, which is empty", PATHS_CURE)
                files = [(path, path.name)]
            else:
                what = "which is neither" if path.exists() else "which does not exist"
                raise bad("paths", "files or folders", f"{str(path)!r}, {what}", PATHS_CURE)
        except OSError as error:
            raise unreadable(path, error) from error
        for file, name in files:
            found.setdefault(file.resolve(), name)
    return sorted(found.items(), key=lambda item: (item[1], item[0]))


def _walk(
    root: Path, suffixes: tuple[str, ...], skipped: frozenset[str], is_whole: Callable[[Path], bool]
) -> Iterator[tuple[Path, str]]:
    def stop(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=stop):
        # os.walk goes on with what is left in the list.
        folders[:] = [x for x in folders if x not in skipped and x != "__pycache__" and not x.startswith(".")]
        for name in [x for x in folders if is_whole(Path(folder, x))]:
            folders.remove(name)
            yield Path(folder, name), Path(folder, name).relative_to(root).as_posix()
        for file in files:
            path = Path(folder, file)
            wanted = ALL_SUFFIXES in suffixes or file.lower().endswith(suffixes)
            if wanted and not file.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ValueError:
    """The error for a file that the system refuses to give."""
    return bad("paths", "files and folders that can be read", f"{str(path)!r} ({error.strerror})", PATHS_CURE)


def draw(content: bytes) -> float:
    """A number from 0 to 1 out of the hash of a document, which decides on which side of the split it falls."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def held_out_limit(draws: npt.NDArray[np.float64], held_out_fraction: float) -> float:
    """Documents whose draw is below this are held out: about this share of them, but not none and not all.

    Copies have one draw, so all of them move to the side that would be empty.

    Raises:
        ValueError: if all documents are copies of one.
    """
    lowest, highest = float(draws.min()), float(draws.max())
    if lowest == highest:
        raise bad("paths", "at least two files that differ", f"{len(draws)} copies of one", "name more text")
    return min(max(held_out_fraction, math.nextafter(lowest, 1)), highest)


def _split(
    texts: list[tuple[str, bytes]], held_out_fraction: float
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """Training and held-out texts. Contents whose hash, as a number from 0 to 1, is below the fraction are held out."""
    draws = [draw(content) for _, content in texts]
    limit = held_out_limit(np.array(draws), held_out_fraction)
    pairs = list(zip(draws, texts, strict=True))
    return [text for draw, text in pairs if draw >= limit], [text for draw, text in pairs if draw < limit]


def split_one(
    name: str, content: bytes, held_out_fraction: float
) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """The beginning of a text and its end, cut behind a line where one ends nearby."""
    wanted = max(1, int(len(content) * held_out_fraction))
    cut = len(content) - wanted
    cut = content.rfind(b"\n", max(0, cut - wanted), cut) + 1 or cut
    if cut == 0:
        raise bad("paths", "text that can be split", f"{len(content)} bytes", "name more text")
    return [(name, content[:cut])], [(f"{name} (end)", content[cut:])]
