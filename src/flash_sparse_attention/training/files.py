"""Files that are written whole or not at all, and errors of the disk that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` if the body ends well, and is removed if not.

    Raises:
        OSError: if it cannot be written.
    """
    beside = path.with_name(f".{path.name}.unfinished")
    with named(path):
        try:
            yield beside
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the disk in the body name `path`, which those of a full one do not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error


def flush(path: Path) -> None:
    """Waits until the file or directory is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def megabytes(count: int) -> str:
    """`count` bytes for people.

    >>> megabytes(12_345_678)
    '12.3 MB'
    """
    return f"{count / 1e6:,.1f} MB"
