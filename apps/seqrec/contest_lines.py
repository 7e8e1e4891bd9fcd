"""Blocks of contest files, turned into flat arrays by worker processes; torch is never imported here.

A block is a range of bytes and means the lines that begin in it. What a worker makes of a block is a part: one small
file of arrays with a checksum, written whole or not at all, so that a killed conversion keeps what it has finished. A
part depends on its block and the schema alone, never on the worker or on earlier blocks.

Loops over records stay inside C where they can: columns by zip, features by one comprehension per field, ranges by min
and max. Only what is irregular is looked at value by value.
"""

import codecs
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import signal
import struct
import threading
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

USER_FIELDS = ("103", "104", "105", "109")
USER_ARRAYS = ("106", "107", "108", "110")
ITEM_FIELDS = ("100", "101", "102", "111", "112", "114", "115", "116", "117", "118", "119", "120", "121", "122")
RECORD = ("user_id", "item_id", "user_feat", "item_feat", "action_type", "timestamp")
CANDIDATE = ("creative_id", "retrieval_id", "features")
CREATIVE_KEYS = ("anonymous_cid", "creative_id")  # what embedding files call the item

MAX_LINE_BYTES = 64 << 20
_FLUSH_EVENTS = 8192  # dictionaries that wait to be encoded; they are most of a worker's memory
_READ_BYTES = 1 << 20
_LONGEST_TOKEN = 16  # characters of a literal or an escape; a number is never at fault for its length
_MAX_NAMES = 20  # of unknown features that a block reports
_INT32 = 1 << 31
_INT64 = 1 << 63
_SPACE = re.compile(r"[ \t\n\r]*")
_NOTHING: dict[str, Any] = {}


class BadLine(ValueError):
    """What cannot be read, in the words of a fault; the line counts from 1 within the block."""

    def __init__(self, line: int | None, field: str | None, expected: str, found: str, repair: str) -> None:
        super().__init__(line, field, expected, found, repair)
        self.line, self.field, self.expected, self.found, self.repair = line, field, expected, found, repair


class Schema(NamedTuple):
    """What the indexer says: how many items there are, and how many values each feature has."""

    num_items: int
    vocab: dict[str, int]

    def fields(self, ids: Sequence[str]) -> tuple[str, ...]:
        """Those of the ids that have a vocabulary."""
        return tuple(field for field in ids if field in self.vocab)


class Report(NamedTuple):
    """What a worker found in a block, besides its arrays."""

    lines: int
    counts: dict[str, int]
    unknown: dict[str, list[str]]  # feature ids without a vocabulary, of "user" and "item"


def start_worker() -> None:
    """Make this worker process die with its parent: one killed outright cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the pool
        threading.Thread(target=_die_after, args=(parent.sentinel,), daemon=True).start()


def _die_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def write_part(target: Path, arrays: Mapping[str, "array[Any]"], report: Report) -> None:
    """Write arrays and report under a temporary name, then put the file in its place."""
    crc = 0
    for values in arrays.values():
        crc = zlib.crc32(values, crc)
    header = {
        "arrays": [[name, values.typecode, len(values)] for name, values in arrays.items()],
        "crc": crc,
        "report": report._asdict(),
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for values in arrays.values():
            file.write(values)
    os.replace(temporary, target)


def read_part(path: Path) -> tuple[dict[str, "array[Any]"], Report] | None:
    """The arrays and the report of a part; None where it is absent or damaged."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline())
            arrays = {name: array(code) for name, code, _ in header["arrays"]}
            crc = 0
            for name, _, count in header["arrays"]:
                arrays[name].fromfile(file, count)
                crc = zlib.crc32(arrays[name], crc)
            report = Report(**header["report"])
        except (ValueError, KeyError, TypeError, EOFError):
            return None
    return (arrays, report) if crc == header["crc"] else None


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def lines_of(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin at the bytes start..end-1, numbered from 1; blank ones are empty."""
    with path.open("rb") as file:
        position = start
        if start:
            file.seek(start - 1)
            position -= 1
            while piece := file.readline(_READ_BYTES):
                position += len(piece)
                if piece.endswith(b"\n") or position >= end:
                    break
        number = 0
        while position < end and (line := file.readline(MAX_LINE_BYTES + 1)):
            if position == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            number += 1
            if len(line) > MAX_LINE_BYTES:
                repair = "a line end is missing, or the file is of another form: write it again"
                raise BadLine(number, None, f"lines of at most {MAX_LINE_BYTES >> 20} MiB", "a longer one", repair)
            position = file.tell()
            yield number, b"" if line.isspace() else line


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_json(line: bytes, number: int) -> Any:
    """The value of a line of JSON; NaN and Infinity are refused."""
    try:
        return _DECODER.decode(line.decode("utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise BadLine(number, None, "UTF-8", found, "save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        found = f"{error.msg.lower()} (character {error.pos + 1} of {len(error.doc)})"
        raise BadLine(
            number, None, "one complete JSON value", found, "the line is cut or damaged: restore it"
        ) from None
    except RecursionError:
        raise BadLine(number, None, "flat records", "lists nested too deep", "restore the line") from None
    except ValueError as error:
        raise BadLine(number, None, "finite numbers", str(error)[:80], "replace it, or delete the record") from None


def quote(value: object) -> str:
    """A value in a few ASCII characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."


def _is_int(value: object) -> bool:
    """Whether array() would take the value; true and false are 1 and 0 to it."""
    return isinstance(value, int)


def columns_of(records: Any, number: int) -> list[tuple[Any, ...]]:
    """The six columns of a line's records, all of one user; raises BadLine where they have another form."""
    if type(records) is not list:
        raise BadLine(number, None, "a list of records", quote(records), "write one list per user and line")
    for n, record in enumerate(records):
        if type(record) is not list or len(record) != len(RECORD):
            expected = f"records of {len(RECORD)} values ({', '.join(RECORD)})"
            found = f"{quote(record)} as record {n}"
            raise BadLine(number, None, expected, found, "complete the record or delete it")
    columns = list(zip(*records, strict=True))
    user = columns[0][0] if records else 0
    if type(user) not in (int, str):
        raise BadLine(number, "user_id", "an integer or a string", quote(user), "write the re-id or the raw id")
    if columns and columns[0].count(user) != len(records):
        other = next(value for value in columns[0] if value != user)
        found = f"users {quote(user)} and {quote(other)}"
        raise BadLine(number, "user_id", "one user per line", found, "split the line")
    for name, column in zip(RECORD[2:4], columns[2:4], strict=False):
        for value in column:
            if value is not None and type(value) is not dict:
                raise BadLine(number, name, "an object or null", quote(value), "write {feature id: value}")
    return columns


def check_user(user: int | str, number: int) -> bytes:
    """The id as text that can stand in a list of ids, one per line; raises BadLine where it cannot."""
    try:
        text = str(user).encode()
    except UnicodeEncodeError:
        raise BadLine(number, "user_id", "a printable id", quote(user), "rename the user") from None
    if b"\n" in text:
        raise BadLine(number, "user_id", "an id of one line", quote(user), "rename the user")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Events


def encode_events(source: Path, start: int, end: int, target: Path, schema: Schema, table: Path) -> Report:
    """Write the part of a block of users' lines. `table` holds every item's features, as `encode_items` leaves them."""
    with table.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as rows:
        events = _Events(schema, rows)
        number = 0
        for number, line in lines_of(source, start, end):
            if line:
                events.add(columns_of(parse_json(line, number), number), number)
        events.flush()
        arrays = events.arrays()
    report = Report(number, dict(events.counts), {kind: sorted(ids) for kind, ids in events.unknown.items()})
    write_part(target, arrays, report)
    return report


class _Events:
    """The arrays of a block while it is read, changed in place."""

    def __init__(self, schema: Schema, table: mmap.mmap) -> None:
        self.schema = schema
        self.table = table
        self.item_fields = schema.fields(ITEM_FIELDS)
        self.user_fields = schema.fields(USER_FIELDS)
        self.user_arrays = schema.fields(USER_ARRAYS)
        self.counts: Counter[str] = Counter()
        self.unknown: dict[str, set[str]] = {"item": set(), "user": set()}
        self.length, self.user, self.user_text = array("i"), array("i"), array("B")
        self.item, self.action, self.time = array("i"), array("b"), array("q")
        self.profile_time = array("q")
        self.own_event, self.own_feature = array("q"), array("i")
        self.unknown_event, self.unknown_item = array("q"), array("q")  # raw ids, by which candidates are found
        self.waiting: list[dict[str, Any]] = []  # features of the last events
        self.profiles: list[dict[str, Any]] = []

    def add(self, columns: list[tuple[Any, ...]], number: int) -> None:
        """Take one line: a user's events in order of time, those of one moment as they stand, and the last profile."""
        if not columns:
            self.counts["lines without records"] += 1
            return
        users, items, profiles, features, actions, times = columns
        self._add_user(users[0], number)
        is_event = [item is not None or feature is not None for item, feature in zip(items, features, strict=True)]
        event_times: Sequence[Any] = times
        if not all(is_event):
            columns = [tuple(itertools.compress(column, is_event)) for column in columns]
            _, items, _, features, actions, event_times = columns
        found = [n for n, profile in enumerate(profiles) if profile is not None]
        self.counts["users without a profile"] += not found
        self.counts["users with several profiles"] += len(found) > 1
        self.counts["records without item and profile"] += sum(
            not yes and profile is None for yes, profile in zip(is_event, profiles, strict=True)
        )
        self.profiles.append(profiles[found[-1]] if found else _NOTHING)
        self.profile_time.append(times_of([times[found[-1]]], number)[0] if found else 0)

        clean_times = times_of(event_times, number)
        clean_items = self._items(items)
        clean_actions = actions_of(actions, number)
        dicts = [feature or _NOTHING for feature in features]
        order = sorted(range(len(clean_times)), key=clean_times.__getitem__)
        if order != list(range(len(order))):
            self.counts["users out of order of time"] += 1
            clean_times = array("q", [clean_times[n] for n in order])
            clean_items = array("i", [clean_items[n] for n in order])
            clean_actions = array("b", [clean_actions[n] for n in order])
            dicts = [dicts[n] for n in order]
        if 0 in clean_items:
            for n, k in enumerate(order):
                if clean_items[n] == 0 and (raw := as_creative(items[k])) is not None:
                    self.unknown_event.append(len(self.item) + n)
                    self.unknown_item.append(raw)
        self.length.append(len(order))
        self.counts["users without events"] += not order
        self.time.extend(clean_times)
        self.item.extend(clean_items)
        self.action.extend(clean_actions)
        self.waiting += dicts
        if len(self.waiting) >= _FLUSH_EVENTS:
            self.flush()

    def _add_user(self, user: int | str, number: int) -> None:
        is_number = type(user) is int and 0 < user < _INT32
        self.user.append(int(user) if is_number else 0)
        if not is_number:
            self.user_text.extend(check_user(user, number) + b"\n")

    def _items(self, items: Sequence[Any]) -> "array[int]":
        """Rows of the item table; 0 for items that have none."""
        try:
            ids = array("i", items)
            if not ids or (min(ids) > 0 and max(ids) <= self.schema.num_items):
                return ids
        except (TypeError, OverflowError):
            pass
        ids = array("i", [item if _is_int(item) and 0 < item <= self.schema.num_items else 0 for item in items])
        self.counts["events of unknown items"] += ids.count(0)
        return ids

    def flush(self) -> None:
        """Encode the features that wait, and keep those that differ from their item's row of the table."""
        dicts, fields = self.waiting, self.item_fields
        _add_unknown(self.unknown["item"], dicts, fields)
        rows = encode_features(dicts, fields, self.schema.vocab, self.counts)
        width = 4 * len(fields)
        data, table = rows.tobytes(), self.table
        first = len(self.item) - len(dicts)
        for n, (item, feature) in enumerate(zip(self.item[first:], dicts, strict=True)):
            row = data[n * width : (n + 1) * width]
            if feature and row != table[item * width : (item + 1) * width]:
                self.own_event.append(first + n)
                self.own_feature.frombytes(row)
        self.waiting = []

    def arrays(self) -> dict[str, "array[Any]"]:
        _add_unknown(self.unknown["user"], self.profiles, (*self.user_fields, *self.user_arrays))
        found: dict[str, array[Any]] = {
            "length": self.length,
            "user": self.user,
            "user_text": self.user_text,
            "item": self.item,
            "action": self.action,
            "time": self.time,
            "own_event": self.own_event,
            "own_feature": self.own_feature,
            "unknown_event": self.unknown_event,
            "unknown_item": self.unknown_item,
            "profile_time": self.profile_time,
            "user_feature": encode_features(self.profiles, self.user_fields, self.schema.vocab, self.counts),
        }
        for field in self.user_arrays:
            lists = [_as_list(profile.get(field)) for profile in self.profiles]
            values = [{field: value} for value in itertools.chain.from_iterable(lists)]
            found[f"user_{field}_length"] = array("i", map(len, lists))
            found[f"user_{field}"] = encode_features(values, (field,), self.schema.vocab, self.counts)
        return found


def _add_unknown(names: set[str], dicts: Iterable[Mapping[str, Any]], known: Iterable[str]) -> None:
    """Add to `names`, in place, the features of dictionaries that are not known; of very many the first ones."""
    found = set().union(*dicts) - set(known) - names
    names |= set(sorted(found)[: _MAX_NAMES - len(names)])


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if type(value) is list else [value]


def encode_features(
    dicts: Sequence[Mapping[str, Any]], fields: Sequence[str], vocab: Mapping[str, int], counts: Counter[str]
) -> "array[int]":
    """The fields' values row by row, int32: 0 where a value is missing, and where it is none of the vocabulary."""
    rows = array("i", bytes(4 * len(dicts) * len(fields)))
    if not dicts:
        return rows
    for k, field in enumerate(fields):
        size = vocab[field]
        column = [features.get(field, 0) for features in dicts]
        try:
            values = array("i", column)
            is_sound = min(values) >= 0 and max(values) <= size
        except (TypeError, OverflowError):
            is_sound = False
        if not is_sound:
            values = array("i", [value if _is_int(value) and 0 <= value <= size else 0 for value in column])
            counts["unseen feature values"] += sum(
                clean == 0 and value is not None and value != 0 for clean, value in zip(values, column, strict=True)
            )
        rows[k :: len(fields)] = values
    return rows


def times_of(times: Sequence[Any], number: int) -> "array[int]":
    """Seconds; a missing time is that of the record before, 0 for the first."""
    try:
        return array("q", times)
    except (TypeError, OverflowError):
        pass
    clean = array("q")
    for time in times:
        value = (clean[-1] if clean else 0) if time is None else time
        if type(value) is float and math.isfinite(value):
            value = math.floor(value)
        if not _is_int(value) or not -_INT64 <= value < _INT64:
            raise BadLine(number, "timestamp", "a time in seconds", quote(time), "write seconds since 1970")
        clean.append(value)
    return clean


def actions_of(actions: Sequence[Any], number: int) -> "array[int]":
    """Action types; 0 where it is missing."""
    try:
        return array("b", actions)
    except (TypeError, OverflowError):
        pass
    for action in actions:
        if action is not None and not (_is_int(action) and -128 <= action < 128):
            raise BadLine(number, "action_type", "0, 1 or 2", quote(action), "write 0 exposure, 1 click, 2 conversion")
    return array("b", [0 if action is None else action for action in actions])


# ---------------------------------------------------------------------------------------------------------------------
# Items


def encode_items(source: Path, table: Path, target: Path, schema: Schema) -> Report:
    """Write every item's features to `table`, int32 rows from item 0 (padding) on, then the part that vouches for it.

    The file is one JSON object; it is read piece by piece, so that memory does not depend on its size.
    """
    fields = schema.fields(ITEM_FIELDS)
    width = 4 * len(fields)
    counts: Counter[str] = Counter()
    unknown: set[str] = set()
    temporary = table.with_name(f".{table.name}.{os.getpid()}.tmp")
    with temporary.open("w+b") as file:
        file.truncate(max(1, (schema.num_items + 1) * width))
        rows = mmap.mmap(file.fileno(), 0)
    with rows:
        pairs = item_pairs(source)
        while chunk := [pair for _, pair in zip(range(_FLUSH_EVENTS), pairs, strict=False)]:
            dicts = []
            items = []
            for _, key, features in chunk:
                if key.isascii() and key.isdecimal() and len(key) < 10 and 0 < int(key) <= schema.num_items:
                    items.append(int(key))
                    dicts.append(features)
                else:
                    counts["features of unknown items"] += 1
            _add_unknown(unknown, dicts, fields)
            data = encode_features(dicts, fields, schema.vocab, counts).tobytes()
            for n, item in enumerate(items):
                rows[item * width : (item + 1) * width] = data[n * width : (n + 1) * width]
            counts["items with features"] += len(items)
        rows.flush()
    os.replace(temporary, table)
    report = Report(0, {**counts, "crc": crc_of(table)}, {"item": sorted(unknown)})
    write_part(target, {}, report)
    return report


def item_pairs(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(line, item, features) of a file of items; raises BadLine."""
    for line, key, features in object_pairs(path):
        if type(features) is not dict:
            raise BadLine(line, key[:40], "an object", quote(features), "write {feature id: value}")
        yield line, key, features


def crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def object_pairs(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, key, value) of a JSON object in a file of any size, in bounded memory; raises BadLine."""
    with path.open("rb") as file:
        text = _Text(file)
        text.expect("{")
        if text.peek() == "}":
            text.expect("}")
        else:
            while True:
                text.peek()
                line = text.line
                key = text.value()
                if type(key) is not str:
                    raise BadLine(line, None, "a quoted item id", quote(key), "write the item's re-id in quotes")
                text.expect(":")
                yield line, key, text.value()
                if text.peek() == "}":
                    text.expect("}")
                    break
                text.expect(",")
        if text.peek():
            raise BadLine(text.line, None, "the end of the file", quote(text.peek()), "delete what follows the object")


class _Text:
    """A text that is read from a file piece by piece and eaten from the left, changed in place."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.is_whole, self.line = "", 0, False, 1

    def _eat(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self) -> bool:
        """Read another piece and forget what was eaten; False at the end of the file."""
        if self.is_whole:
            return False
        piece = self.file.read(_READ_BYTES)
        self.is_whole = not piece
        try:
            self.text = self.text[self.at :] + self.decoder.decode(piece, final=self.is_whole)
        except UnicodeDecodeError as error:
            found = f"byte 0x{error.object[error.start]:02x}"
            raise BadLine(self.line, None, "UTF-8", found, "save the file as UTF-8") from None
        self.at = 0
        if len(self.text) > MAX_LINE_BYTES:
            raise BadLine(self.line, None, "one small object per item", "a huge value", "write the file again")
        return True

    def peek(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._eat(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            shown = quote(found) if found else "the end of the file"
            repair = "the file is cut or damaged: restore it"
            raise BadLine(self.line, None, f"the character {character}", shown, repair)
        self.at += 1

    def value(self) -> Any:
        while True:
            self.peek()
            fault, is_final = "", False
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.is_whole:  # a number may go on in the next piece
                    self._eat(end)
                    return value
            except RecursionError:
                fault = "lists nested too deep"
            except json.JSONDecodeError as error:
                fault = error.msg.lower()
                is_final = error.pos + _LONGEST_TOKEN < len(self.text) and "Unterminated" not in error.msg
            except ValueError as error:
                fault = str(error)[:80]
            if is_final or not self._more():
                repair = "the file is cut or damaged: restore it"
                raise BadLine(self.line, None, "a complete JSON value", fault, repair)


# ---------------------------------------------------------------------------------------------------------------------
# Candidates


def encode_candidates(source: Path, start: int, end: int, target: Path, schema: Schema) -> Report:
    """Write the part of a block of candidates' lines: raw item ids, retrieval ids and features."""
    fields = schema.fields(ITEM_FIELDS)
    creative, retrieval, feature = array("q"), array("q"), array("i")
    counts: Counter[str] = Counter()
    unknown: set[str] = set()
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        _add_unknown(unknown, waiting, fields)
        feature.extend(encode_features(waiting, fields, schema.vocab, counts))
        waiting.clear()

    number = 0
    for number, line in lines_of(source, start, end):
        if line:
            candidate = candidate_of(parse_json(line, number), number)
            creative.append(candidate.creative)
            retrieval.append(candidate.retrieval)
            waiting.append(candidate.features)
        if len(waiting) == _FLUSH_EVENTS:
            flush()
    flush()
    report = Report(number, dict(counts), {"item": sorted(unknown)})
    write_part(target, {"creative": creative, "retrieval": retrieval, "feature": feature}, report)
    return report


class Candidate(NamedTuple):
    """A line of the file of candidates."""

    creative: int
    retrieval: int
    features: dict[str, Any]


def candidate_of(record: Any, number: int) -> Candidate:
    """The candidate that a line's value describes; raises BadLine."""
    form = '{"creative_id": id, "retrieval_id": row, "features": {...}}'
    if type(record) is not dict:
        raise BadLine(number, None, form, quote(record), "write one object per line")
    for name in CANDIDATE:
        if name not in record:
            raise BadLine(number, name, form, f"keys {quote(sorted(record)[:5])}", "complete the line")
    creative, retrieval, features = (record[name] for name in CANDIDATE)
    raw = as_creative(creative)
    if raw is None or type(creative) is bool:
        raise BadLine(number, "creative_id", "an integer", quote(creative), "write the item's raw id")
    if type(retrieval) is not int or not 0 <= retrieval < _INT64:
        repair = "number the rows again, from 0"
        raise BadLine(number, "retrieval_id", "an integer from 0", quote(retrieval), repair)
    if type(features) is not dict:
        raise BadLine(number, "features", "an object", quote(features), "write {feature id: value}")
    return Candidate(raw, retrieval, features)


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings


def encode_embeddings(source: Path, start: int, end: int, target: Path, width: int) -> Report:
    """Write the part of a block of embedding lines: raw item ids and their vectors in half precision."""
    counts: Counter[str] = Counter()
    vectors: dict[int, bytes] = {}  # of an item that comes twice the last one counts
    number = 0
    for number, line in lines_of(source, start, end):
        if not line:
            continue
        creative, vector = embedding_of(parse_json(line, number), number, width)
        if vector is None:
            counts["lines without an embedding"] += 1
        elif creative is None:
            counts["embeddings of unknown items"] += 1
        else:
            vectors.pop(creative, None)
            vectors[creative] = vector
    report = Report(number, dict(counts), {})
    arrays = {"creative": array("q", vectors), "vector": array("B", b"".join(vectors.values()))}
    write_part(target, arrays, report)
    return report


def embedding_of(record: Any, number: int, width: int) -> tuple[int | None, bytes | None]:
    """The raw item id (None where it is no 64-bit integer) and the vector (None where there is none) of a line."""
    if type(record) is not dict:
        expected = '{"anonymous_cid": id, "emb": [...]}'
        raise BadLine(number, None, expected, quote(record), "write one object per line")
    key = next((key for key in CREATIVE_KEYS if key in record), None)
    if key is None:
        found = f"keys {quote(sorted(record)[:5])}"
        raise BadLine(number, CREATIVE_KEYS[0], "the item's id", found, "write the creative id")
    creative = as_creative(record[key])
    values = record.get("emb")
    if values is None or values == []:
        return creative, None
    return creative, pack_vector(values, number, width)


def as_creative(value: Any) -> int | None:
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) < 19:
        value = int(value)
    return value if _is_int(value) and -_INT64 <= value < _INT64 else None


def pack_vector(values: Any, number: int | None, width: int) -> bytes:
    """The vector in half precision, little-endian; raises BadLine where it is no list of `width` finite numbers."""
    if type(values) is not list or len(values) != width:
        found = f"{len(values)} numbers" if type(values) is list else quote(values)
        raise BadLine(number, "emb", f"{width} numbers", found, "export the line again, or correct the folder's name")
    try:
        if not all(map(math.isfinite, values)):
            repair = "delete the line: the item counts as absent"
            raise BadLine(number, "emb", "finite numbers", "NaN or infinity", repair)
        return struct.pack(f"<{width}e", *values)
    except (TypeError, struct.error, OverflowError):
        wrong = next((value for value in values if not isinstance(value, int | float)), None)
        if wrong is not None or None in values:
            raise BadLine(number, "emb", "numbers only", quote(wrong), "export the line again") from None
        raise BadLine(number, "emb", "numbers up to 65504", "a larger one", "rescale the family") from None
