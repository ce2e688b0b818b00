"""Tables and figures in documents, between comments that say which: nobody types a result.

    <!-- bench:attention heads=32 kv_heads=8 -->
    a table, with what was compared and where the numbers are
    <!-- /bench -->

    at 65,536 tokens <!-- bench:value of=gain operator="whole attention" tokens=65536 -->2.64x<!-- /bench -->

    of two runs <!-- bench:repeats total=yes -->240 of 241<!-- /bench --> rows agree

What stands between the comments is replaced. Comments in code are left alone. An option `name=a|b` takes both; with
`over`, the baseline of a table's gains, each has a column. `mean=yes` adds a line with means, of gains that all have.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from . import agreement, text
from .report import largest_error, links_from
from .results import FULL, Gain, Row
from .sources import Device, direction_order, distinct

_MARKER = re.compile(r"<!--\s*(?:bench:(?P<name>[\w-]*)(?P<options>[^>]*?)|(?P<end>/bench))\s*-->")
_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)", re.M | re.S)
_ATTRIBUTES = ("suite", "operator", "direction", "variant", "inputs")
_RATES = ("ms", "spread", "gain", "tflop_per_s", "tb_per_s", "roofline", "error")


@dataclass(frozen=True)
class _Table:
    """Which rows of ours a table has: those of these operators, on a GPU or on a CPU."""

    suite: str
    operators: tuple[str, ...]
    cpu: bool = False
    memory: bool = False


TABLES = {
    "attention": _Table("attention", ("whole attention",), memory=True),
    "selected": _Table("operators", ("selected attention",)),
    "decode": _Table("decode", ("decode attention", "decode step")),
    "model": _Table("model", ("training step", "prefill"), memory=True),
    "cpu": _Table("attention", ("whole attention",), cpu=True, memory=True),
}


def filled(document: Path, devices: Sequence[Device]) -> str:
    """The text of a document with all its tables and figures as the results have them.

    Raises:
        ValueError: for a comment without its end, an unknown name or option, and what there is no row for.
        OSError: if the document cannot be read.
    """
    with document.open(encoding="utf-8", newline="") as file:
        content = file.read()
    code = [match.span() for match in _CODE.finditer(content)]
    markers = [
        match for match in _MARKER.finditer(content) if not any(first <= match.start() < last for first, last in code)
    ]
    parts, kept, begun = [], 0, None
    for marker in markers:
        where = f"{document}, line {content.count(chr(10), 0, marker.start()) + 1}"
        if marker["end"] is None:
            if begun is not None:
                raise ValueError(f"{where}: {begun[0]} before this has no end: <!-- /bench -->")
            name = f"bench:{marker['name']}"
            begun = name, _content(f"{where}, {name}", document, content, marker, devices)
            parts.append(content[kept : marker.end()])
        else:
            if begun is None:
                raise ValueError(f"{where}: <!-- /bench --> ends what has no beginning")
            parts.append(begun[1])
            begun = None
        kept = marker.end() if marker["end"] is None else marker.start()
    if begun is not None:
        raise ValueError(f"{document}: {begun[0]}, the last one, has no end: <!-- /bench -->")
    return "".join([*parts, content[kept:]])


def _content(where: str, document: Path, content: str, marker: re.Match[str], devices: Sequence[Device]) -> str:
    """What stands behind a comment."""
    name = marker["name"]
    options = _options(where, marker["options"])
    total = name == "repeats" and _switch(where, options, "total")
    if name == "value" or total:
        if content[: marker.start()].rpartition("\n")[2].strip(" \t") == "":
            # A comment at the beginning of a line makes the whole line HTML.
            raise ValueError(f"{where}: must not be the first on its line, where Markdown ends the paragraph")
        return agreement.total(_repeated(where, options, devices)) if total else _value(where, options, devices)
    if name == "repeats":
        body = agreement.table(_repeated(where, options, devices), links_from(document))
    elif name in TABLES:
        body = _table(where, TABLES[name], options, devices, document)
    else:
        raise ValueError(f"{where}: there is no such table; there are {', '.join([*TABLES, 'repeats', 'value'])}")
    newline = "\r\n" if "\r\n" in content else "\n"
    return f"\n\n{body}\n".replace("\n", newline)


def _options(where: str, words: str) -> dict[str, str]:
    try:
        pairs = [word.partition("=") for word in shlex.split(words)]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for name, equals, value in pairs:
        if not name or not equals or not value:
            raise ValueError(f'{where}: options are name=value or name="several words", got {name + equals + value!r}')
    return {name: value for name, _, value in pairs}


def _table(where: str, table: _Table, options: dict[str, str], devices: Sequence[Device], document: Path) -> str:
    """Shape by shape the times of ours and the gains, then the memory, and a line that says what was compared."""
    overs: list[str | None] = [*options.pop("over").split("|")] if "over" in options else [None]
    with_mean = _switch(where, options, "mean")
    fixed = {"suite": table.suite} | options
    found = []
    for device, rows in _rows(where, fixed, [device for device in devices if (device.kind == "cpu") == table.cpu]):
        rows = [row for row in rows if row.operator in table.operators]
        if any(row.ms is not None for row in rows):
            found.append((device, rows))
    if not found:
        kind = "a CPU" if table.cpu else "a GPU"
        raise ValueError(f"{where}: no row of {text.listed(table.operators)} in the suite {table.suite!r} on {kind}")
    if len(found) > 1:
        names = text.listed(device.name for device, _ in found)
        raise ValueError(f"{where}: there are rows of {names}: choose with device=")
    ((device, rows),) = found

    timed = [row for row in rows if row.ms is not None]
    columns = sorted(
        {(row.operator, row.direction) for row in timed},
        key=lambda column: (table.operators.index(column[0]), direction_order(column[1])),
    )
    same, varying = text.common(row.shape for row in timed)
    several_inputs = len(distinct(timed, "inputs")) > 1
    lines: dict[tuple[str, ...], Row] = {}
    cells: dict[tuple[tuple[str, ...], tuple[str, str]], Row] = {}
    for row in sorted(timed, key=lambda row: (text.order(row.shape), row.inputs)):
        line, column = row.key[4:], (row.operator, row.direction)
        if (line, column) in cells:
            variants = f"{cells[line, column].variant} and {row.variant}"
            raise ValueError(f"{where}: {row.operator} has rows of {variants}: choose with variant=")
        lines.setdefault(line, row)
        cells[line, column] = row

    gains: dict[tuple[tuple[str, str], str | None], list[Gain]] = {
        (column, over): [] for column in columns for over in overs
    }
    body = []
    for line, first in lines.items():
        labels = text.labels(first.shape)
        texts = [labels.get(name, "") for name in varying] + ([first.inputs] if several_inputs else [])
        for column in columns:
            cell = cells.get((line, column))
            texts.append(text.duration(None if cell is None or cell.ms is None else cell.ms.median))
            for over in overs:
                gain = None if cell is None else device.gain(cell, over)
                gains[column, over] += [] if gain is None else [gain]
                texts.append("" if gain is None else text.ratio(gain.ratio))
        texts.append(text.size(_peak(device, table, first)) if table.memory else "")
        body.append(texts)
    for over in overs:
        if over is not None and not any(gains[column, over] for column in columns):
            names = text.listed(gain.other.variant for row in timed for gain in device.gains_of(row))
            raise ValueError(f"{where}: no baseline {over!r}; these rows have {names or 'none'}")
    header = [*varying, *(["inputs"] if several_inputs else [])]
    if with_mean and len(lines) > 1:
        # Where a line has none there is no mean, which would be of other lines than those beside it.
        means = ["mean", *[""] * (len(header) - 1)]
        for column in columns:
            found_gains = [[gain.ratio for gain in gains[column, over]] for over in overs]
            means += ["", *(text.ratio(mean(some)) if len(some) == len(lines) else "" for some in found_gains)]
        body.append([*means, ""])
    operators = [operator for operator, _ in columns]
    for operator, direction in columns:
        if len(set(operators)) == 1:
            title = direction
        else:
            title = operator if operators.count(operator) == 1 else f"{operator}, {direction}"
        header += [title, *(["gain"] if len(overs) == 1 else [f"gain over {over}" for over in overs])]
    header.append("peak memory")
    all_gains = [gain for some in gains.values() for gain in some]
    return text.table(header, body) + "\n" + _caption(device, same, timed, all_gains, len(overs) > 1, document)


def _repeated(where: str, options: dict[str, str], devices: Sequence[Device]) -> Device:
    """The one device that has second runs."""
    name = options.pop("device", "")
    if options:
        raise ValueError(f"{where}: takes device= and total= alone, got {', '.join(options)}")
    found = [device for device in devices if device.repeats and name.lower() in device.name.lower()]
    if len(found) != 1:
        names = text.listed(device.name for device in found)
        none = f"no second runs of {name or 'any device'}: --repeats gives them"
        raise ValueError(f"{where}: " + (f"there are {names}: choose with device=" if found else none))
    return found[0]


def _switch(where: str, options: dict[str, str], name: str) -> bool:
    """An option that is yes or no; no where it is not given. It is taken out."""
    value = options.pop(name, "no")
    if value not in ("yes", "no"):
        raise ValueError(f"{where}: {name} is yes or no, got {value!r}")
    return value == "yes"


def _caption(
    device: Device, same: Mapping[str, str], rows: Sequence[Row], gains: Sequence[Gain], named: bool, document: Path
) -> str:
    """Where, on what, against what, unless the columns name it, and where the numbers are."""
    link = links_from(document)
    sources = {source.path: source for row in rows for source in [device.source_of(row)]}
    versions = []
    for name in ("torch", "triton", "commit"):
        values = [source.report.environment.get(name) for source in sources.values()]
        if any(values):
            versions.append(f"{name} {text.listed(str(value) for value in values if value)}")
    where = device.name + (f" ({', '.join(versions)})" if versions else "")
    sentences = [f"{where}: {text.in_words(same)}." if same else f"{where}.", "Times are medians."]
    names = Counter(gain.other.variant for gain in gains)
    if named:
        sentences.append("Gains are over these in the same run.")
    elif names:
        common = text.listed(name for name, _ in names.most_common())
        full = all(gain.other.operator == FULL for gain in gains)
        fastest = "the fastest of them for each row" if len(names) > 1 else ""
        over = f"full attention ({common})" if full else common
        sentences.append(f"A gain is over {over} in the same run{', ' + fastest if fastest else ''}.")
    files = text.listed(f"[{path.name}]({link(path)})" for path in sources)
    return " ".join([*sentences, f"Numbers: {files}."]) + "\n"


def _peak(device: Device, table: _Table, row: Row) -> int | None:
    """The largest peak that rows of this shape have, in any suite: those of this variant, else any of ours."""
    rows = [other for other in device.rows if other.ours and other.operator in table.operators]
    rows = [other for other in rows if other.key[4:] == row.key[4:] and text.is_number(other.memory.get("peak"))]
    rows = [other for other in rows if other.variant == row.variant] or rows
    return max((other.memory["peak"] for other in rows), default=None)


def _value(where: str, options: dict[str, str], devices: Sequence[Device]) -> str:
    """A figure of the one row that fits the options."""
    what, over = options.pop("of", "ms"), options.pop("over", None)
    found = [(device, row) for device, rows in _rows(where, options, devices) for row in rows]
    # A row that has the figure; of memory there may be one without a time, beside the one with it.
    shown = [(device, row, _figure(device, row, what, over)) for device, row in found]
    having = [entry for entry in shown if entry[2]]
    if not having:
        known = dict.fromkeys([*_RATES, *(name for _, row in found for name in row.memory)])
        against = f" over {over!r}" if over else ""
        raise ValueError(f"{where}: no such row has {what!r}{against}; there are {', '.join(known)}")
    if len(having) > 1:
        raise ValueError(f"{where}: {len(having)} rows fit, which differ in {_differences(having)}")
    return having[0][2]


def _figure(device: Device, row: Row, what: str, over: str | None) -> str:
    """Empty where the row has none."""
    if what == "ms":
        return "" if row.ms is None else text.duration(row.ms.median)
    if what == "spread":
        return "" if row.ms is None else text.share(row.ms.spread)
    if what == "gain":
        gain = device.gain(row, over)
        return "" if gain is None else text.ratio(gain.ratio)
    if what in ("tflop_per_s", "tb_per_s"):
        value, unit = (row.tflop_per_s, "TFLOP/s") if what == "tflop_per_s" else (row.tb_per_s, "TB/s")
        return f"{text.digits(value)} {unit}" if text.digits(value) else ""
    if what == "roofline":
        return text.share(device.of_roofline(row))
    if what == "error":
        return text.share(largest_error(row))
    return text.size(row.memory.get(what))


def _rows(where: str, options: Mapping[str, str], devices: Sequence[Device]) -> list[tuple[Device, list[Row]]]:
    """The rows of each device that fit all options; only ours unless a variant is among them."""
    wanted = dict(options)
    device_name = wanted.pop("device", "")
    chosen = [device for device in devices if device_name.lower() in device.name.lower()]
    if not chosen:
        names = text.listed(device.name for device in devices) or "none"
        raise ValueError(f"{where}: no device {device_name!r}; there are {names}")
    found = [(device, [row for row in device.rows if "variant" in wanted or row.ours]) for device in chosen]
    for name, value in wanted.items():
        values = value.split("|")
        left = [(device, [row for row in rows if _attribute(row, name) in values]) for device, rows in found]
        if not any(rows for _, rows in left):
            there = {_attribute(row, name) for _, rows in found for row in rows} - {None}
            names = text.listed(sorted(map(str, there)), most=12)
            hint = f"it is {names}" if there else "none has it"
            raise ValueError(f"{where}: no row has {name}={value}; with the options before it {hint}")
        found = left
    return found


def _attribute(row: Row, name: str) -> str | None:
    if name in _ATTRIBUTES:
        return str(getattr(row, name))
    value = row.shape.get(name)
    return None if value is None else str(value)


def _differences(found: Sequence[tuple[Device, Row, str]]) -> str:
    """What would tell these rows apart, with its values."""
    names = ["device", *_ATTRIBUTES, *sorted({name for _, row, _ in found for name in row.shape})]
    texts = []
    for name in names:
        values = dict.fromkeys(
            device.name if name == "device" else str(_attribute(row, name)) for device, row, _ in found
        )
        if len(values) > 1:
            texts.append(f"{name} ({text.listed(values, most=8)})")
    return text.listed(texts)
