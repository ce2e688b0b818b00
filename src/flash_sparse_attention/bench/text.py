"""How results are written: figures of three digits with their units, shapes in words, tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Sizes in the order in which they are named and sorted; others stand before the dtype, by name.
_FIRST = ("model", "layers", "batch", "tokens", "new_tokens", "heads", "kv_heads", "head_dim", "head_dim_v")
_LAST = ("block_size", "slots", "window_size", "kernel_size", "kernel_stride")
_WORDS = {
    "tokens": "{} tokens",
    "new tokens": "{} new tokens",
    "heads": "{} heads",
    "head dim": "head dimension {}",
    "layers": "{} layers",
    "block size": "blocks of {}",
    "slots": "{} slots",
    "window size": "window of {}",
    "kernel size": "kernel of {}",
    "kernel stride": "stride {}",
    "model": "{}",
    "dtype": "{}",
}
_BYTES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def is_number(value: object) -> bool:
    """A finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def digits(value: float | None) -> str:
    """Three significant digits, `0.0123`, `1.20`, `59.3`, `1,230`; nothing for None and for what is no number."""
    if value is None or not is_number(value):
        return ""
    if value == 0:
        return "0"
    # Rounding may add a digit, as in 9.996.
    rounded = float(f"{value:.2e}")
    exponent = math.floor(math.log10(abs(rounded)))
    return f"{rounded:.2e}" if exponent < -4 else f"{rounded:,.{max(0, 2 - exponent)}f}"


def duration(ms: float | None, *also: float) -> str:
    """`20.7 ms`; microseconds below 0.1 ms, seconds from 1,000 ms on. More times follow as `(20.5 to 20.8)`."""
    if ms is None or not is_number(ms):
        return ""
    scale, unit = (1e3, "us") if ms < 0.1 else (1.0, "ms") if ms < 1000 else (1e-3, "s")
    rest = f" ({' to '.join(digits(time * scale) or '?' for time in also)})" if also else ""
    return f"{digits(ms * scale)} {unit}{rest}"


def ratio(value: float | None) -> str:
    """`2.64x`. What is below 1 is never rounded up to it."""
    if value is None or not is_number(value):
        return ""
    return f"{digits(min(value, 0.999) if 0.999 < value < 1 else value)}x"


def share(value: float | None) -> str:
    """`34.2 %`."""
    return "" if value is None or not is_number(value) else f"{digits(100 * value)} %"


def size(count: float | None) -> str:
    """Bytes, as `4.90 GiB`."""
    if count is None or not is_number(count):
        return ""
    unit, scale = next(((unit, scale) for unit, scale in _BYTES if count >= scale), _BYTES[-1])
    return f"{digits(count / scale)} {unit}"


def value_text(value: Any) -> str:
    """Anything of an environment; floats with three digits."""
    if isinstance(value, float):
        return digits(value) or str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {value_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


def labels(shape: Mapping[str, int | str]) -> dict[str, str]:
    """What the columns of a table are called -> what they say: heads as `32/8`, thousands apart.

    >>> labels({"heads": 32, "kv_heads": 8, "tokens": 65536, "head_dim": 128, "head_dim_v": 128})
    {'tokens': '65,536', 'heads': '32/8', 'head dim': '128'}
    """
    found: dict[str, str] = {}
    for name in _ordered(shape):
        value = shape[name]
        text = f"{value:,}" if isinstance(value, int) else str(value)
        if name == "kv_heads" and "heads" in shape:
            found["heads"] += f"/{text}"
        elif name == "head_dim_v" and "head_dim" in shape:
            found["head dim"] += "" if value == shape["head_dim"] else f"/{text}"
        else:
            found[name.replace("_", " ")] = text
    return found


def in_words(texts: Mapping[str, str]) -> str:
    """What `labels` gave as a phrase; a batch of one goes without saying.

    >>> in_words({"batch": "1", "tokens": "65,536", "heads": "32/8", "head dim": "128", "slots": "16"})
    '65,536 tokens, 32/8 heads of 128, 16 slots'
    """
    words = {label: _WORDS.get(label, f"{label} {{}}").format(text) for label, text in texts.items()}
    if texts.get("batch") == "1":
        del words["batch"]
    if texts.get("new tokens") == "1":
        words["new tokens"] = "1 new token"
    if "heads" in texts and "head dim" in texts:
        words["heads"] += f" of {texts['head dim']}"
        del words["head dim"]
    return ", ".join(words.values())


def common(shapes: Iterable[Mapping[str, int | str]]) -> tuple[dict[str, str], list[str]]:
    """(labels with the one text that all of these shapes share, labels of what differs), in order."""
    found = [labels(shape) for shape in shapes]
    merged = {name: value for shape in found for name, value in shape.items()}
    # The order of a shape that has all of them.
    names = sorted(merged, key=lambda label: _rank(label.replace(" ", "_")))
    same = {name: merged[name] for name in names if all(shape.get(name) == merged[name] for shape in found)}
    return same, [name for name in names if name not in same]


def order(shape: Mapping[str, int | str]) -> tuple[Any, ...]:
    """Sorts shapes: by model, batch, tokens and so on, numbers by size."""
    names = (*_FIRST, *_LAST, *sorted(shape.keys() - {*_FIRST, *_LAST}))
    values = (shape.get(name) for name in names)
    return tuple(
        (0, 0, "") if value is None else (1, value, "") if isinstance(value, int | float) else (2, 0, str(value))
        for value in values
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without the columns that are empty in all rows, and with a line break at its end."""
    rows = [[cell(text) for text in row] for row in rows]
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    lines = [[cell(header[column]) for column in kept], ["---"] * len(kept)]
    lines += [[row[column] for column in kept] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: str) -> str:
    """A text without what would end a cell or begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def listed(texts: Iterable[str], most: int | None = None) -> str:
    """`a, b and c`, each once; beyond `most` their number."""
    names = list(dict.fromkeys(texts))
    if most is not None and len(names) > most:
        names = [*names[:most], f"{len(names) - most} more"]
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def counted(number: int, what: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _ordered(shape: Mapping[str, int | str]) -> list[str]:
    return sorted(shape, key=_rank)


def _rank(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return _FIRST.index(name), ""
    if name in _LAST:
        return len(_FIRST) + _LAST.index(name), ""
    return len(_FIRST) + len(_LAST) + (name == "dtype"), name
