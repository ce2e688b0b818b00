"""Numbers of layers on the command line."""

from __future__ import annotations

from ..validation import bad


def layer_numbers(option: str, text: str) -> list[int]:
    """Numbers and ranges of numbers, both ends included.

    Args:
        option: that they were given for, for messages.
        text: what was given.

    Raises:
        ValueError: for anything else, and ranges that run backwards.

    >>> layer_numbers("--layers", "0-3,7")
    [0, 1, 2, 3, 7]
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() if dash else not last) or int(last or first) < int(first):
            raise bad(option, "numbers and ranges, as 0-11,20", repr(text))
        found += range(int(first), int(last or first) + 1)
    return found
