"""Documents out of files of many kinds: a text file is one, a line of JSONL is one, a row of a table is one.

    corpus/notes.txt            one document
           articles.jsonl       a document a line, under `text_field`
           web-000.parquet      a document a row, in the column `text_field`
           wiki/state.json      a folder that `datasets` saved; as parquet

Nothing is read whole but text files: tables come in batches.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..validation import bad
from .data import DEFAULT_SUFFIXES, PATHS_CURE, find_files, unreadable

JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIX = ".parquet"
_ROWS = 1024


def find_sources(paths: Sequence[str], suffixes: Sequence[str]) -> list[tuple[Path, str]]:
    """The files and folders of `datasets` to read, each once, with the names they go by; in the order of these names.

    With the default suffixes, folders are searched for tables too.

    Raises:
        ValueError: see `data.read_corpus`.
    """
    if tuple(suffixes) == DEFAULT_SUFFIXES:
        suffixes = (*suffixes, *JSONL_SUFFIXES, PARQUET_SUFFIX)
    return find_files(paths, suffixes, _is_dataset)


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of a source, empty ones left out.

    Args:
        path: a file, or a folder that `datasets` saved.
        text_field: where the text is in a line of JSONL or a row of a table.

    Raises:
        ValueError: for what cannot be read, a line or row without text, a package that is missing.
    """
    if path.is_dir():
        found = _dataset(path, text_field)
    elif path.suffix.lower() in JSONL_SUFFIXES:
        found = _jsonl(path, text_field)
    elif path.suffix.lower() == PARQUET_SUFFIX:
        found = _parquet(path, text_field)
    else:
        found = _text(path)
    try:
        yield from (_valid(text) for text in found if text)
    except OSError as error:
        raise unreadable(path, error) from error


def optional(module: str, extra: str, what: str) -> Any:
    """A module of a package that not everyone has.

    Raises:
        ValueError: if it is missing, naming the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        cure = f"pip install 'flash-sparse-attention[{extra}]'"
        raise ValueError(f"{what} needs the package {package}, which is not installed: {cure}") from error


def _is_dataset(folder: Path) -> bool:
    names = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in names)


def _valid(text: str) -> str:
    """The text without halves of characters, which JSON may hold and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _text(path: Path) -> Iterator[str]:
    # Bytes that are no UTF-8 become U+FFFD: a stray one in a large corpus is no reason to stop.
    yield path.read_text(encoding="utf-8", errors="replace")


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise bad(
                    f"{path} line {number}", "JSON", repr(line.strip()[:80]), "mend or remove the line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(text_field), (str, type(None))):
                raise bad(f"{path} line {number}", f"an object with a text in {text_field!r}", repr(line[:80]))
            if text_field not in row:
                raise _no_field(f"{path} line {number}", text_field, row)
            yield row[text_field] or ""


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    arrow = optional("pyarrow", "train", "reading Parquet")
    parquet = optional("pyarrow.parquet", "train", "reading Parquet")
    try:
        with parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                raise _no_field(str(path), text_field, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field]):
                yield from _texts(str(path), text_field, batch.column(0).to_pylist())
    except arrow.ArrowInvalid as error:
        raise bad(str(path), "a Parquet file", str(error), PATHS_CURE) from error


def _dataset(path: Path, text_field: str) -> Iterator[str]:
    datasets = optional("datasets", "train", "reading a folder that `datasets` saved")
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        cure = f"name one of {', '.join(str(path / split) for split in found)}"
        raise bad("paths", "the folder of one split of a dataset", f"{str(path)!r}, which has several", cure)
    if text_field not in found.column_names:
        raise _no_field(str(path), text_field, found.column_names)
    for batch in found.select_columns([text_field]).iter(batch_size=_ROWS):
        yield from _texts(str(path), text_field, batch[text_field])


def _texts(where: str, text_field: str, values: list[Any]) -> list[str]:
    """A column; rows without a value are empty."""
    for value in values:
        if not isinstance(value, (str, type(None))):
            raise bad(f"{where}, column {text_field!r}", "of text", repr(value)[:80], "name another --text-field")
    return [value or "" for value in values]


def _no_field(where: str, text_field: str, names: Any) -> ValueError:
    return bad(where, f"with text in {text_field!r}", f"the fields {', '.join(map(repr, names))}", "name --text-field")
