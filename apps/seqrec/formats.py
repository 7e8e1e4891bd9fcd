"""Readers of every accepted form of plain item sequences, the one validator behind them, and our own packed form.

Legend: T tokens of a file, L its lines, E events, U users.

    pairs   SASRec text: `user item` or `user item time` per line
    lines   S3-Rec text: `user item item ...`, one line per user
    inter   RecBole's atomic file: tab separated, header `user_id:token  item_id:token  timestamp:float` in any order
    pack    a .safetensors file written by `prepare`, mapped into memory

Text is taken apart on whole tensors of bytes: a token is a pair of offsets, plain integers are computed digit by digit
for all tokens at once, and a rule is a mask over lines, so that locating a fault costs no second pass. `read_sequences`
raises the first error that `check_source` lists: both walk through the same rules.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.seqrec.dataset import MIN_EVENTS, Sequences
from shared.faults import DataError as DataError
from shared.faults import Fault as Fault
from shared.faults import Findings, many, places, quote
from shared.files import (
    DamagedFileError,
    bytes_to_ids,
    changed_fingerprint,
    fingerprint,
    ids_to_bytes,
    read_pack,
    relative_path,
    write_pack,
)
from shared.packs import write_again
from shared.tokens import Table, integers, tokenise

FORMATS = ("auto", "pairs", "lines", "inter", "pack")

_PREPARE = "python -m apps.seqrec prepare"
_PACK_KIND = "seqrec sequences"
_PACK_LAYOUT = 1  # changes whenever a pack's tensors change their meaning
_FOLDER_SUFFIXES = (".inter", ".safetensors", ".txt")
_COLUMNS = {"user_id": "token", "item_id": "token", "timestamp": "float"}  # the columns of an .inter file that are read
_MAX_TIME = 9e18
_UNIT_BOUNDS = (
    1e11,
    1e14,
    1e17,
)  # seconds stay below the first until the year 5138, milliseconds are above it since 1973
_UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
_MAX_RATING = 10


# ---------------------------------------------------------------------------------------------------------------------
# What callers use


def read_sequences(path: Path, *, format: str = "auto") -> Sequences:  # noqa: A002 - the flag's name
    """All users' sequences of a file, or of the one readable file in a folder.

    Events are in time order within a user: sorted stably where the source has times, as they stand in it otherwise.
    Ids are arbitrary tokens; a column of integers is numbered by value, any other by first appearance. Raises DataError
    with the first error that `check_source` would list.
    """
    findings = Findings(path, limit=1)
    sequences, _, reading = _load(path, format, findings)
    if findings.errors:
        note = reading if format == "auto" else ""
        raise DataError(f"{findings.errors[0]}{note}")
    assert sequences is not None
    return sequences


def check_source(path: Path, *, format: str = "auto", limit: int = 20) -> list[Fault]:  # noqa: A002
    """Everything that is wrong with a source, errors first: at most `limit` faults, then one that counts the rest.

    What `read_sequences` raises for is an error, what it can live with a warning.
    """
    findings = Findings(path, limit=limit)
    _, events, _ = _load(path, format, findings)
    if events is not None:
        _check_quality(events, findings)
    return findings.listing()


def detect_format(path: Path) -> tuple[str, str]:
    """The format that "auto" takes for a file or folder, and a sentence that says why and how to force another one."""
    findings = Findings(path, limit=1)
    file = _resolve(path, findings)
    source = None if file is None else _open(file, "auto", findings)
    if source is None:
        raise DataError(str(findings.errors[0]))
    return source.format, source.reason


def write_sequences(path: Path, sequences: Sequences, *, source: Path) -> None:
    """Write a pack that records the fingerprint, size and time of its source, by which a changed source is noticed."""
    file = _source_file(source)
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: a pack's name must end in .safetensors; write to {path.with_suffix('.safetensors')}")
    if file.suffix == ".safetensors":
        raise DataError(f"{file} is already a pack; copy it, or prepare the file that it was made from")
    stat = file.stat()
    current = fingerprint([file])
    if current != sequences.fingerprint:
        raise DataError(
            f"{file} has fingerprint {current}, but the sequences were read from content with fingerprint "
            f"{sequences.fingerprint}: it changed in between; read it again"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "ptr": sequences.ptr,
        "item": sequences.item,
        "item_ids": ids_to_bytes(sequences.item_ids),
        "user_ids": ids_to_bytes(sequences.user_ids),
    }
    if sequences.time is not None:
        tensors["time"] = sequences.time
    meta = {
        "kind": _PACK_KIND,
        "layout": _PACK_LAYOUT,
        "name": sequences.name,
        "fingerprint": sequences.fingerprint,
        "source": {"path": relative_path(file, path.parent), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns},
    }
    write_pack(path, tensors, meta)


# ---------------------------------------------------------------------------------------------------------------------
# From a path to events


@dataclass(frozen=True)
class _Events:
    """Events in the order of the source, before they are sorted."""

    user: Tensor  # [E] int64, index into user_ids
    item: Tensor  # [E] int64, index into item_ids
    time: Tensor | None  # [E] int64, or float64 where the source has fractions
    line: Tensor | None  # [E] int64, counted from 1; None in a pack
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    format: str

    def line_of(self, event: int) -> int | None:
        return None if self.line is None else int(self.line[event])


@dataclass(frozen=True)
class _Source:
    """A file, what it is to be read as, and its bytes unless it is a pack."""

    format: str
    reason: str
    data: bytes


def _load(
    path: Path,
    format: str,  # noqa: A002
    findings: Findings,
) -> tuple[Sequences | None, _Events | None, str]:
    """The sequences, the events they were made from, None where errors were found on the way; and how it was read."""
    if format not in FORMATS:
        raise DataError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    file = _resolve(path, findings)
    source = None if file is None else _open(file, format, findings)
    if file is None or source is None:
        return None, None, ""
    reading = f" (read as {source.format}, because {source.reason})"
    sequences = _load_pack(file, findings) if source.format == "pack" else None
    if source.format == "pack":
        events = None if sequences is None else _events_of(sequences)
    else:
        events = _PARSERS[source.format](source.data, findings)
    if events is not None and len(events.item_ids) == 1:
        findings.add(
            file,
            "at least two items to rank",
            f"the one item {quote(events.item_ids[0])} in all events",
            "check that the second column holds items, not ratings or flags",
        )
    if events is None or findings.errors:
        return None, events, reading
    return sequences or _sequences_of(events, fingerprint([file]), file.name), events, reading


def _resolve(path: Path, findings: Findings) -> Path | None:
    """The file itself, or the one readable file of a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        repair = "check the spelling, or download the data first"
        findings.add(path, "an existing file or folder", "nothing at this path", repair)
        return None
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    readable = [name for name in names if Path(name).suffix in _FOLDER_SUFFIXES and (path / name).is_file()]
    kinds = ", ".join(_FOLDER_SUFFIXES)
    if len(readable) != 1:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        found = f"{len(readable)} of them in this folder ({shown or 'it is empty'})"
        findings.add(path, f"exactly one {kinds} file", found, "give the path of the file to read")
        return None
    findings.path = path / readable[0]
    return findings.path


def _open(file: Path, format: str, findings: Findings) -> _Source | None:  # noqa: A002
    """The file's text, cleaned of what only editors see, with the format it is to be read in."""
    if format == "pack" or (format == "auto" and file.suffix == ".safetensors"):
        return _Source("pack", "its name ends in .safetensors", b"")
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        found = "no bytes at all" if not raw else "only blanks and line ends"
        findings.add(file, "at least one event", found, "write or download the file again")
        return None
    position = raw.find(b"\0")
    if position >= 0:
        findings.add(
            file,
            "text",
            f"a NUL byte at offset {position} ({many(raw.count(0), 'NUL byte')} in all)",
            "the file is binary, damaged or UTF-16: restore it, or save it as UTF-8",
            line=raw.count(b"\n", 0, position) + 1,
        )
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        findings.add(
            file,
            "UTF-8",
            f"byte 0x{raw[error.start]:02x} at offset {error.start}",
            "save the file as UTF-8",
            line=raw.count(b"\n", 0, error.start) + 1,
        )
        return None
    data = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if format != "auto":
        return _Source(format, "it was asked for", data)
    return _Source(*_detect(file, data), data)


def _detect(file: Path, data: bytes) -> tuple[str, str]:
    first_line = data.partition(b"\n")[0]
    if file.suffix == ".inter":
        return "inter", "its name ends in .inter"
    if b":token" in first_line and b"\t" in first_line:
        return "inter", "its first line is a header of name:type columns"
    table = tokenise(data.rstrip(), tabs=False)
    count = table.ptr.diff()
    named = places(count > 0)
    users = len(_ids(table, table.ptr[:-1][named]).names)
    repeated = users < named.numel()
    if (count == 2).all():
        return "pairs", "every line has 2 fields; force another format where this is wrong"
    if (count == 3).all() and repeated:
        return (
            "pairs",
            "every line has 3 fields and users repeat, so the third is a time; force lines where it is an item",
        )
    if (count == 3).all():
        return "lines", "every line has 3 fields and no user repeats; force pairs where the third is a time"
    # in the lines form no user repeats, so users that repeat on lines of mostly one short length are broken pairs
    for width in (2, 3):
        if repeated and 2 * int((count == width).sum()) > count.numel():
            return (
                "pairs",
                f"most lines have {width} fields and users repeat; force lines where each is one user's history",
            )
    return "lines", "the number of fields varies; force pairs where each line is one event"


def _sequences_of(events: _Events, source: str, name: str) -> Sequences:
    """Events grouped by user, in time order; those of one moment stay in the order of the source."""
    order = torch.arange(events.user.numel()) if events.time is None else torch.sort(events.time, stable=True).indices
    order = order[torch.sort(events.user[order], stable=True).indices]
    ptr = torch.zeros(len(events.user_ids) + 1, dtype=torch.int64)
    ptr[1:] = torch.cumsum(torch.bincount(events.user, minlength=len(events.user_ids)), 0)
    return Sequences(
        ptr=ptr,
        item=(events.item[order] + 1).to(torch.int32),
        time=None if events.time is None else events.time[order].floor().to(torch.int64),
        item_ids=events.item_ids,
        user_ids=events.user_ids,
        fingerprint=source,
        name=name,
    )


def _events_of(sequences: Sequences) -> _Events:
    return _Events(
        user=sequences.user_of_event,
        item=sequences.item.long() - 1,
        time=sequences.time,
        line=None,
        user_ids=sequences.user_ids,
        item_ids=sequences.item_ids,
        format="pack",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to ids and times


@dataclass(frozen=True)
class _Ids:
    code: Tensor  # [N] int64, index into names
    names: tuple[str, ...]


def _ids(table: Table, tokens: Tensor) -> _Ids:
    """Numbers for the tokens: by value where all are plain integers, else by first appearance."""
    value, is_plain = integers(table, tokens)
    if is_plain.all():
        distinct, code = torch.unique(value, return_inverse=True)
        return _Ids(code, tuple(map(str, distinct.tolist())))
    names: dict[bytes, int] = {}
    spans = zip(table.start[tokens].tolist(), table.end[tokens].tolist(), strict=True)
    codes = [names.setdefault(table.data[start:end], len(names)) for start, end in spans]
    return _Ids(torch.tensor(codes), tuple(name.decode() for name in names))


def _times(table: Table, tokens: Tensor, rows: Tensor, field: str, findings: Findings) -> tuple[Tensor, Tensor]:
    """The tokens as times ([N] int64, or float64 where any is no plain integer), and which are sound ([N] bool)."""
    time, is_sound = integers(table, tokens)
    odd = places(~is_sound)
    if odd.numel():
        numbers = [_number(text) for text in table.texts(tokens[odd])]
        time = time.double().index_copy(0, odd, torch.tensor(numbers, dtype=torch.float64))
    is_sound = (time >= 0) & (time <= _MAX_TIME)  # false for NaN, which also stands for what is no number

    def describe(n: int) -> None:
        text, value = table.text(int(tokens[n])), float(time[n])
        if math.isnan(value) and not _is_float(text):
            expected, repair = "a time in seconds as a number", "write seconds since 1970, e.g. 978300760"
        elif not math.isfinite(value):
            expected, repair = "a finite time", "give the event a time or delete the line"
        elif value < 0:
            expected, repair = "a time of 0 or later", "shift all times so that none is negative, or delete the line"
        else:
            expected, repair = f"a time below {_MAX_TIME:.0e}", "write seconds since 1970, e.g. 978300760"
        findings.add(findings.path, expected, quote(text), repair, line=int(rows[n]) + 1, field=field)

    findings.each(places(~is_sound), describe)
    return time, is_sound


def _number(text: str) -> float:
    return float(text) if _is_float(text) else math.nan


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the text forms


def _parse_pairs(data: bytes, findings: Findings) -> _Events | None:
    """The events of the sound lines of SASRec text; what is wrong with the others goes to the findings."""
    table = tokenise(data.rstrip(), tabs=False)
    count = table.ptr.diff()
    width = 3 if int((count == 3).sum()) > int((count == 2).sum()) else 2
    form = "user item time" if width == 3 else "user item"

    def describe(row: int) -> None:
        text = table.row_text(row)
        found = f"{many(int(count[row]), 'field')} ({quote(text)})" if text else "an empty line"
        findings.add(
            findings.path,
            f"{width} fields ({form})",
            found,
            _repair_of_fields(text, int(count[row]), width),
            line=row + 1,
        )

    findings.each(places(count != width), describe)
    rows = places(count == width)
    user = table.ptr[:-1][rows]
    if _has_header(table, rows, user, rows, user + 1, findings):
        rows, user = rows[1:], user[1:]
    time = None
    if width == 3:
        time, is_sound = _times(table, user + 2, rows, "time", findings)
        rows, user, time = rows[is_sound], user[is_sound], time[is_sound]
        _check_units(time, rows, "time", findings)
    if not rows.numel():
        return None
    users, items = _ids(table, user), _ids(table, user + 1)
    if "0" in items.names:
        padding = places(items.code == items.names.index("0"))
        findings.add(
            findings.path,
            "item ids from 1 up",
            f"item 0 ({many(padding.numel(), 'line')}), but 0 is the padding id of that format",
            "number the items from 1, e.g. by adding 1 to every item id",
            line=int(rows[padding[0]]) + 1,
            field="item",
        )
    return _Events(users.code, items.code, time, rows + 1, users.names, items.names, "pairs")


def _repair_of_fields(text: str, count: int, width: int) -> str:
    if not text:
        return "delete the line"
    for separator in ("::", ",", ";", "|"):
        if separator in text and count < width:
            return f"replace each {separator!r} by a blank"
    if count < width:
        return "complete or delete the line"
    return "keep one event per line, or read the file as lines if each line is one user's history"


def _parse_lines(data: bytes, findings: Findings) -> _Events | None:
    """The events of the sound lines of S3-Rec text; what is wrong with the others goes to the findings."""
    table = tokenise(data.rstrip(), tabs=False)
    count = table.ptr.diff()

    def describe_short(row: int) -> None:
        text = table.row_text(row)
        if not text:
            findings.add(findings.path, "user item item ...", "an empty line", "delete the line", line=row + 1)
            return
        expected, found = "at least one item after the user", f"user {quote(text)} without items"
        findings.add(findings.path, expected, found, _repair_of_fields(text, 1, 2), line=row + 1)

    findings.each(places(count < 2), describe_short)
    rows = places(count >= 2)
    tokens, owner = _items_of_rows(table, rows)
    if _has_header(table, rows, table.ptr[:-1][rows], rows[owner], tokens, findings):
        rows = rows[1:]
        tokens, owner = _items_of_rows(table, rows)
    if not rows.numel():
        return None

    users = _ids(table, table.ptr[:-1][rows])
    order = torch.sort(users.code, stable=True).indices
    again = places(users.code[order].diff() == 0) + 1
    duplicate = torch.sort(order[again]).values

    def describe_duplicate(n: int) -> None:
        before = int(torch.nonzero(users.code == users.code[n])[0])
        findings.add(
            findings.path,
            "one line per user",
            f"user {quote(users.names[int(users.code[n])])} again (first on line {int(rows[before]) + 1})",
            "join the user's lines in time order, or read the file as pairs if each line is one event",
            line=int(rows[n]) + 1,
            field="user",
        )

    findings.each(duplicate, describe_duplicate)
    items = _ids(table, tokens)
    return _Events(users.code[owner], items.code, None, rows[owner] + 1, users.names, items.names, "lines")


def _items_of_rows(table: Table, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens after the first of each row, and which of the rows they belong to."""
    start, count = table.ptr[rows] + 1, table.ptr[rows + 1] - table.ptr[rows] - 1
    owner = torch.repeat_interleave(torch.arange(rows.numel()), count)
    return start[owner] + torch.arange(owner.numel()) - (torch.cumsum(count, 0) - count)[owner], owner


def _has_header(
    table: Table, rows: Tensor, users: Tensor, item_rows: Tensor, items: Tensor, findings: Findings
) -> bool:
    """Whether the first row is words above nothing but integers: a header, which would become an event of its own."""
    if rows.numel() < 3 or integers(table, users[:1])[1]:
        return False
    is_word_user, is_word_item = ~integers(table, users)[1], ~integers(table, items)[1]
    if not (is_word_user[0] and int(is_word_user.sum()) == 1 and torch.equal(is_word_item, item_rows == rows[0])):
        return False
    text = quote(table.row_text(int(rows[0])))
    findings.add(findings.path, "an event", f"a header line ({text})", "delete the line", line=int(rows[0]) + 1)
    return True


def _parse_inter(data: bytes, findings: Findings) -> _Events | None:
    """The events of the sound rows of a RecBole file; what is wrong with the others goes to the findings."""
    table = tokenise(data.rstrip(b"\n"), tabs=True)
    header = [table.text(token) for token in range(int(table.ptr[1]))]
    columns = _inter_columns(header, findings)
    if columns is None:
        return None
    count = table.ptr.diff()

    def describe_count(row: int) -> None:
        text = table.row_text(row)
        findings.add(
            findings.path,
            f"{len(header)} tab-separated fields as in the header",
            f"{many(int(count[row]), 'field')} ({quote(text)})" if text else "an empty line",
            "separate the row's fields by single tabs" if text else "delete the line",
            line=row + 1,
        )

    findings.each(places(count != len(header)), describe_count)
    rows = places(count == len(header))[1:]
    if count.numel() == 1:
        repair = "write or download the file again"
        findings.add(findings.path, "rows below the header", "only the header", repair, line=1)

    for name, column in columns.items():
        token = table.ptr[:-1][rows] + column
        is_empty = table.start[token] == table.end[token]

        def describe_empty(n: int, rows: Tensor = rows, name: str = name) -> None:
            repair = "fill it in or delete the row"
            findings.add(findings.path, "a value", "an empty field", repair, line=int(rows[n]) + 1, field=name)

        findings.each(places(is_empty), describe_empty)
        rows = rows[~is_empty]

    time = None
    first = table.ptr[:-1][rows]
    if "timestamp" in columns:
        time, is_timed = _times(table, first + columns["timestamp"], rows, "timestamp", findings)
        rows, first, time = rows[is_timed], first[is_timed], time[is_timed]
        _check_units(time, rows, "timestamp", findings)
    if not rows.numel():
        return None
    users, items = _ids(table, first + columns["user_id"]), _ids(table, first + columns["item_id"])
    return _Events(users.code, items.code, time, rows + 1, users.names, items.names, "inter")


def _inter_columns(header: list[str], findings: Findings) -> dict[str, int] | None:
    """Where the columns that are read stand, or None where the header is at fault."""
    names = [field.partition(":")[0] for field in header]
    shown = quote(" ".join(header))
    wrong = False
    for name, kind in _COLUMNS.items():
        if name not in names:
            if name != "timestamp":
                repair = "rename or add the column; fields are separated by tabs"
                findings.add(findings.path, f"a column {name}:{kind} in the header", shown, repair, line=1, field=name)
                wrong = True
        elif names.count(name) > 1:
            found = f"{names.count(name)} columns {name}"
            findings.add(findings.path, f"one column {name}", found, "remove or rename all but one", line=1, field=name)
            wrong = True
        elif header[names.index(name)] != f"{name}:{kind}":
            found = quote(header[names.index(name)])
            findings.add(findings.path, f"{name}:{kind}", found, f"give the column the type {kind}", line=1, field=name)
            wrong = True
    return None if wrong else {name: names.index(name) for name in _COLUMNS if name in names}


def _check_units(time: Tensor, rows: Tensor, field: str, findings: Findings) -> None:
    """Error where some times can only be seconds and others only milliseconds (or finer)."""
    unit = torch.bucketize(time.double(), torch.tensor(_UNIT_BOUNDS, dtype=torch.float64))
    counts = torch.bincount(unit, minlength=len(_UNITS)).tolist()
    if sum(count > 0 for count in counts) < 2:
        return
    usual = counts.index(max(counts))
    odd, even = int(torch.nonzero(unit != usual)[0]), int(torch.nonzero(unit == usual)[0])
    findings.add(
        findings.path,
        f"times in one unit ({_UNITS[usual]}, as on line {int(rows[even]) + 1})",
        f"{time[odd].item():.0f}, which looks like {_UNITS[int(unit[odd])]} "
        f"({many(int((unit != usual).sum()), 'such line')})",
        "convert all times to seconds",
        line=int(rows[odd]) + 1,
        field=field,
    )


_PARSERS = {"pairs": _parse_pairs, "lines": _parse_lines, "inter": _parse_inter}


# ---------------------------------------------------------------------------------------------------------------------
# Rules about events: what a reader can live with, and a user should know


def _check_quality(events: _Events, findings: Findings) -> None:
    """Warnings about ids, times, repeated events and short histories."""
    _check_ids(events, "user", events.user, events.user_ids, findings)
    _check_ids(events, "item", events.item, events.item_ids, findings)
    if events.time is not None:
        _check_order(events, events.time, findings)
        _check_scale(events.time, findings)
        _check_repeats(events, events.time, findings)
    elif events.format == "pairs":
        _check_contiguous(events, findings)
    count_U = torch.bincount(events.user, minlength=len(events.user_ids))
    short = places(count_U < MIN_EVENTS)
    if short.numel():
        example = int(short[0])
        findings.add(
            findings.path,
            f"at least {MIN_EVENTS} events per user",
            f"{short.numel():,} of {many(len(events.user_ids), 'user')} with fewer, e.g. user "
            f"{quote(events.user_ids[example])} with {int(count_U[example])}",
            "nothing to do: they are trained on, but not evaluated",
            severity="warning",
        )


def _check_ids(events: _Events, field: str, code: Tensor, names: tuple[str, ...], findings: Findings) -> None:
    """Integers of 0 or below are often meant as padding or as missing; as names they are harmless."""
    is_error = events.format == "pairs" and field == "item"  # there 0 has been reported as an error
    odd = [i for i, name in enumerate(names) if _is_nonpositive(name) and not (is_error and name == "0")]
    if odd:
        findings.add(
            findings.path,
            "ids from 1 up",
            f"{many(len(odd), 'id')} of 0 or below, e.g. {names[odd[0]]}",
            "nothing to do if they are names, as ids are renumbered; delete their events if they mean 'missing'",
            line=events.line_of(int(torch.nonzero(code == odd[0])[0])),
            field=field,
            severity="warning",
        )


def _is_nonpositive(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and int(name) <= 0


def _check_contiguous(events: _Events, findings: Findings) -> None:
    """Where order in the file is the only order there is, users that come and go may mean that it is not time."""
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), places(events.user.diff()) + 1])
    order = torch.sort(events.user[begin], stable=True).indices
    again = begin[order[1:][events.user[begin][order].diff() == 0]]
    if again.numel():
        first = int(again.min())
        count = torch.unique(events.user[again]).numel()
        findings.add(
            findings.path,
            "each user's lines together, in time order",
            f"user {quote(events.user_ids[int(events.user[first])])} again after others ({many(count, 'such user')})",
            "check that each user's lines are in time order, or add times as a third column",
            line=events.line_of(first),
            field="user",
            severity="warning",
        )


def _check_order(events: _Events, time: Tensor, findings: Findings) -> None:
    order = torch.sort(events.user, stable=True).indices
    goes_back = (events.user[order].diff() == 0) & (time[order].diff() < 0)
    late = order[1:][goes_back]
    if late.numel():
        first = int(late.min())
        findings.add(
            findings.path,
            "each user's events in time order",
            f"{many(late.numel(), 'event')} earlier than the one before, first of user "
            f"{quote(events.user_ids[int(events.user[first])])}",
            "nothing to do: they are sorted by time, ties in the order of the file",
            line=events.line_of(first),
            field="time",
            severity="warning",
        )


def _check_scale(time: Tensor, findings: Findings) -> None:
    """Times that are all in milliseconds, or that are ratings."""
    smallest, largest = float(time.min()), float(time.max())
    unit = sum(smallest > bound for bound in _UNIT_BOUNDS)
    if unit:
        findings.add(
            findings.path,
            "times in seconds",
            f"times from {smallest:.0f} on, which look like {_UNITS[unit]}",
            "convert them to seconds; their order is right in any case",
            field="time",
            severity="warning",
        )
    elif largest <= _MAX_RATING:
        findings.add(
            findings.path,
            "times in seconds",
            f"no time above {largest:g}, which looks like ratings",
            "put the time into that column, or leave it out where the events are in time order already",
            field="time",
            severity="warning",
        )


def _check_repeats(events: _Events, time: Tensor, findings: Findings) -> None:
    order = torch.sort(time, stable=True).indices
    pair = events.user * len(events.item_ids) + events.item
    order = order[torch.sort(pair[order], stable=True).indices]
    again = order[1:][(pair[order].diff() == 0) & (time[order].diff() == 0)]
    if again.numel():
        first = int(again.min())
        findings.add(
            findings.path,
            "each event once",
            f"{many(again.numel(), 'repeated event')}, first user {quote(events.user_ids[int(events.user[first])])} "
            f"with item {quote(events.item_ids[int(events.item[first])])} at {time[first].item():.0f}",
            "delete the copies unless the event did happen twice in one second",
            line=events.line_of(first),
            severity="warning",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def _load_pack(file: Path, findings: Findings) -> Sequences | None:
    """The memory-mapped sequences of an undamaged pack whose source has not changed."""
    again = write_again("seqrec", file)
    try:
        tensors, meta = read_pack(file, kind=_PACK_KIND, verify=True)
    except DamagedFileError as error:
        findings.add(file, "an undamaged pack", _without_path(error, file), again)
        return None
    except ValueError as error:
        findings.add(
            file, "a pack of sequences", _without_path(error, file), "give the pack that `prepare` wrote, or its source"
        )
        return None
    if meta.get("layout") != _PACK_LAYOUT:
        findings.add(
            file, f"a pack of layout {_PACK_LAYOUT}", f"layout {meta.get('layout')!r} of another version", again
        )
        return None
    fault = _fault_of_tensors(tensors)
    if fault is not None:
        findings.add(file, *fault, again)
        return None
    stale = _fault_of_source(file, meta)
    if stale is not None:
        findings.add(file, *stale)
        return None
    return Sequences(
        ptr=tensors["ptr"],
        item=tensors["item"],
        time=tensors.get("time"),
        item_ids=bytes_to_ids(tensors["item_ids"]),
        user_ids=bytes_to_ids(tensors["user_ids"]),
        fingerprint=meta["fingerprint"],
        name=meta["name"],
    )


def _fault_of_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """What is expected and what is found where the tensors do not describe sequences."""
    kinds = {
        "ptr": torch.int64,
        "item": torch.int32,
        "time": torch.int64,
        "item_ids": torch.uint8,
        "user_ids": torch.uint8,
    }
    for name, dtype in kinds.items():
        if name not in tensors:
            if name != "time":
                return f"a tensor {name}", "none"
        elif tensors[name].dtype != dtype or tensors[name].ndim != 1:
            return f"{name} as a row of {dtype}", f"{list(tensors[name].shape)} of {tensors[name].dtype}"
    ptr, item, time = tensors["ptr"], tensors["item"], tensors.get("time")
    num_users, num_items = len(bytes_to_ids(tensors["user_ids"])), len(bytes_to_ids(tensors["item_ids"]))
    if ptr.numel() != num_users + 1:
        return f"ptr of {num_users + 1} numbers, one more than users", f"{ptr.numel()}"
    if int(ptr[0]) != 0 or int(ptr[-1]) != item.numel():
        return f"ptr from 0 to the {item.numel()} events", f"{int(ptr[0])} to {int(ptr[-1])}"
    back = places(ptr.diff() < 0)
    if back.numel():
        user = int(back[0])
        return "ptr that never falls", f"{int(ptr[user])} before {int(ptr[user + 1])} at user {user}"
    outside = places((item < 1) | (item > num_items))
    if outside.numel():
        return f"items in 1..{num_items}", f"{int(item[outside[0]])} at event {int(outside[0])}"
    if time is None:
        return None
    if time.numel() != item.numel():
        return f"a time for each of {item.numel()} events", f"{time.numel()} times"
    starts_user = torch.zeros(item.numel() + 1, dtype=torch.bool).index_fill_(0, ptr, True)[1:-1]
    back = places((time.diff() < 0) & ~starts_user)
    if back.numel():
        return (
            "times in order within a user",
            f"{int(time[back[0] + 1])} after {int(time[back[0]])} at event {int(back[0])}",
        )
    return None


def _fault_of_source(file: Path, meta: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Expected, found and repair where the file that a pack was made from is still there and has changed since."""
    source = file.parent / meta["source"]["path"]
    if not source.is_file():
        return None
    current = changed_fingerprint(source, {**meta["source"], "fingerprint": meta["fingerprint"]})
    if current is None:
        return None
    return (
        f"a pack of {source} as it is now, fingerprint {current}",
        f"a stale pack, made when its fingerprint was {meta['fingerprint']}",
        f"write it again: {_PREPARE} {shlex.quote(str(source))} {shlex.quote(str(file))}",
    )


def _without_path(error: ValueError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")


def _source_file(path: Path) -> Path:
    findings = Findings(path, limit=1)
    file = _resolve(path, findings)
    if file is None:
        raise DataError(str(findings.errors[0]))
    return file
