"""The contest's files, converted once into memory-mapped packs, and those packs as frozen tensors.

Legend: U users, E events, D events with features of their own, I items, F sparse features, W width of an embedding.

    SOURCE/seq.jsonl             one user per line: [user, item, user features, item features, action, time] records
    SOURCE/indexer.pkl           how many items and values there are, and what they were called
    SOURCE/item_feat_dict.json   every item's features
    SOURCE/creative_emb/         families of embeddings: emb_81_32/ with JSON lines, emb_81_32.pkl or 81.npy

    OUTPUT/seq.safetensors       events in CSR form, users' features
    OUTPUT/items.safetensors     items' features as an integer table
    OUTPUT/emb_81.safetensors    a family in half precision, with a presence bit

Blocks of lines are encoded by processes (contest_lines.py) into parts in a hidden folder beside the output, which is
named after the source's fingerprint: what a killed conversion has finished, the next one finds. The parts are joined in
the order of the source, so the packs do not depend on the number of processes or of kills.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor

from apps.seqrec import contest_lines
from apps.seqrec.contest_lines import ITEM_FIELDS, USER_ARRAYS, USER_FIELDS, BadLine, Report, Schema
from apps.seqrec.dataset import Sequences
from apps.seqrec.formats import DataError, Fault
from shared.files import (
    DamagedFileError,
    bytes_to_ids,
    changed_fingerprint,
    fingerprint,
    ids_to_bytes,
    read_pack,
    relative_path,
    remove_stale_temporaries,
    replace,
    write_pack,
)
from shared.pickles import UnsafePickleError, load_npy, load_pickle
from shared.ranking import Lists

EVENTS_FILE, INDEXER_FILE, ITEMS_FILE, EMBEDDINGS_FOLDER = (
    "seq.jsonl",
    "indexer.pkl",
    "item_feat_dict.json",
    "creative_emb",
)
SMALL_WIDTH = 1024  # families up to this width are converted unless others are asked for

_PREPARE = "python -m apps.seqrec prepare"
_KIND = {"seq": "seqrec contest events", "items": "seqrec contest items", "emb": "seqrec contest embeddings"}
_LAYOUT = 1  # changes whenever a pack's tensors or a part's arrays change their meaning
_BLOCK_BYTES = 8 << 20
_ROWS = 4096  # of embeddings that are converted at a time
_DTYPES = {"b": torch.int8, "i": torch.int32, "q": torch.int64, "B": torch.uint8}
_FAMILY = re.compile(r"(?:emb_)?(\d+)(?:_(\d+))?(\.pkl|\.npy)?")
_WIDTHS = {"81": 32, "82": 1024, "83": 3584, "84": 4096, "85": 3584, "86": 3584}

Say = Callable[[str], None]


class FaultError(DataError):
    """A DataError that keeps its fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Embedding(NamedTuple):
    """A family of items' embeddings; row 0 is padding."""

    value: Tensor  # [I + 1, W] float16, zeros where the item has none
    present: Tensor  # [I + 1] bool


@dataclass(frozen=True)
class Contest:
    """Events, users and items of the contest as memory-mapped tensors; nothing in it changes after construction.

    Feature values are 1..vocab[field]; 0 stands for missing and for values that the indexer does not know. Item 0
    stands for an item that it does not know: such an event has its features in `own_feature`.
    """

    sequences: Sequences  # the events of known items; its tensors are those below where all items are known
    ptr: Tensor  # [U + 1] int64, events of user u are ptr[u]:ptr[u + 1], in order of time
    item: Tensor  # [E] int32, 0..I
    action: Tensor  # [E] int8, 0 exposure, 1 click, 2 conversion
    time: Tensor  # [E] int64 seconds
    own_event: Tensor  # [D] int64, rising: events whose features differ from their item's row
    own_feature: Tensor  # [D, F] int32, what they are instead
    user: Tensor  # [U] int32 re-id, 0 where the indexer does not know the user
    user_feature: Tensor  # [U, F] int32, columns user_fields
    user_lists: dict[str, Lists]  # the array features: one list of values per user
    profile_time: Tensor  # [U] int64 seconds of the profile record, 0 without one: later than all events, so it leaks
    item_feature: Tensor  # [I + 1, F] int32, columns item_fields; row 0 is padding
    embeddings: dict[str, Embedding]  # by family, e.g. "81"
    user_fields: tuple[str, ...]
    item_fields: tuple[str, ...]
    vocab: dict[str, int]  # the largest value of each feature, sparse and array

    @property
    def history(self) -> Sequences:
        """Every event, those of unknown items as item 0 (padding) too: for prediction, and aligned with `action`."""
        known = self.sequences
        return Sequences(self.ptr, self.item, self.time, known.item_ids, known.user_ids, known.fingerprint, known.name)


class Indexer(NamedTuple):
    """What indexer.pkl says, of re-ids 1.. that leave none out."""

    schema: Schema
    item_ids: tuple[str, ...]  # raw id of item i at [i - 1]
    users: dict[str, int]  # raw id -> re-id


def is_contest(folder: Path) -> bool:
    """Whether a folder looks like the contest's, complete or not."""
    return any((folder / name).is_file() for name in (EVENTS_FILE, INDEXER_FILE, ITEMS_FILE))


def is_contest_pack(folder: Path) -> bool:
    """Whether a folder is what `prepare_contest` wrote."""
    return (folder / "seq.safetensors").is_file() and (folder / "items.safetensors").is_file()


def contest_bytes(source: Path, *, families: Sequence[str] | None = None, events_file: str = EVENTS_FILE) -> int:
    """How much `prepare_contest` will read line by line, the total of what it tells `on_bytes`."""
    chosen = choose_families(source, families, num_items=0, say=lambda line: None)
    files = [source / events_file, *(file for family in chosen if family.form == "lines" for file in family.files)]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Converting


def prepare_contest(
    source: Path,
    output: Path,
    *,
    workers: int | None = None,
    on_bytes: Callable[[int], None] = lambda done: None,
    say: Say = lambda line: None,
    families: Sequence[str] | None = None,
    events_file: str = EVENTS_FILE,
) -> Contest:
    """Write the folder of packs `output` of a contest folder, and give what is in it.

    Lines are read once, by `workers` processes (None: one per core), in memory that does not grow with the file.
    `on_bytes` hears how many bytes are done in all (of `contest_bytes`), `say` what was chosen and what is irregular.
    families: of embeddings, e.g. ("81", "82"); None takes those up to 1,024 numbers wide. Raises DataError with file
    and line of the first thing that cannot be read. What was finished before an interruption is not read again.
    """
    _check_output(output)
    for name in (events_file, INDEXER_FILE, ITEMS_FILE):
        if not (source / name).is_file():
            raise DataError(f"{source / name}: no such file; the contest form needs it: download it into {source}")
    indexer = read_indexer(source / INDEXER_FILE)
    schema = indexer.schema
    chosen = choose_families(source, families, num_items=schema.num_items, say=say)
    origins = [_Origin.of(source / name) for name in (events_file, INDEXER_FILE, ITEMS_FILE)]
    work = _work_folder(output, _digest([_LAYOUT, _BLOCK_BYTES, *(origin.key for origin in origins)]))
    table = _item_table(source / ITEMS_FILE, work, schema, say)
    tasks, embedding_origins = _tasks(source / events_file, chosen, work, table, schema)
    with _Joiner(work / "raw", indexer) as joiner:
        done = 0
        for task, report, arrays in _encode(tasks, _worker_count(workers, len(tasks)), say):
            joiner.add(task, report, arrays)
            done += task.end - task.start
            on_bytes(done)
    joiner.tell(source / events_file, say)
    for origin in (*origins, *(origin for found in embedding_origins.values() for origin in found)):
        if not origin.is_unchanged():
            raise DataError(f"{origin.path} has changed while it was read; run the command again")

    pack = work / "pack"
    common = {"layout": _LAYOUT, "fingerprint": _digest([[o.path.name, o.size, o.fingerprint] for o in origins])}
    _write_items(pack / "items.safetensors", table, indexer, common)
    for family in chosen:
        meta = {**common, "kind": _KIND["emb"], "family": family.id}
        meta["sources"] = [origin.record(output) for origin in embedding_origins[family.id]]
        embedding = joiner.embedding(family, schema.num_items, say)
        write_pack(pack / f"emb_{family.id}.safetensors", embedding._asdict(), meta)
        del embedding  # its file is mapped, and Windows keeps mapped files
    meta = {
        **common,
        "kind": _KIND["seq"],
        "name": source.resolve().name,
        "vocab": schema.vocab,
        "user_fields": schema.fields(USER_FIELDS),
        "user_arrays": schema.fields(USER_ARRAYS),
        "families": [family.id for family in chosen],
        "sources": [origin.record(output) for origin in origins],
    }
    write_pack(pack / "seq.safetensors", joiner.tensors(schema), meta)
    if output.exists():
        replace(output, work / "old")
    replace(pack, output)
    shutil.rmtree(work)
    return read_contest(output)


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _work_folder(output: Path, key: str) -> Path:
    """The hidden folder for this source and output, nothing half-made in it; those of other sources go."""
    output.parent.mkdir(parents=True, exist_ok=True)
    name = re.compile(re.escape(f".{output.name}.") + r"[0-9a-f]{32}\.work")
    work = output.with_name(f".{output.name}.{key}.work")
    for entry in output.parent.iterdir():
        if entry != work and name.fullmatch(entry.name):
            shutil.rmtree(entry)
    work.mkdir(exist_ok=True)
    remove_stale_temporaries(work)
    for part in ("pack", "raw", "old"):
        if (work / part).is_dir():
            shutil.rmtree(work / part)
        (work / part).mkdir()
    (work / "old").rmdir()
    return work


def _write_items(path: Path, table: Path, indexer: Indexer, common: Mapping[str, Any]) -> None:
    fields = indexer.schema.fields(ITEM_FIELDS)
    rows = _mapped(table, torch.int32, (indexer.schema.num_items + 1, len(fields)))
    meta = {**common, "kind": _KIND["items"], "fields": fields}
    write_pack(path, {"feature": rows, "item_ids": ids_to_bytes(indexer.item_ids)}, meta)


def _check_output(output: Path) -> None:
    """Refuse to put the packs where something else is."""
    if output.is_dir():
        foreign = [
            entry.name
            for entry in output.iterdir()
            if not re.fullmatch(r"(seq|items|emb_\d+)\.safetensors", entry.name)
        ]
        if foreign:
            raise DataError(f"{output} holds {sorted(foreign)[0]}, which is no pack; give the name of a new folder")
    elif output.exists():
        raise DataError(f"{output} is a file; the contest form makes a folder: give the name of a new one")


class _Origin(NamedTuple):
    """A source file and the state it was read in."""

    path: Path
    size: int
    mtime_ns: int
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> "_Origin":
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns, fingerprint([path]))

    def is_unchanged(self) -> bool:
        stat = self.path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)

    @property
    def key(self) -> list[Any]:
        return [self.path.name, self.size, self.mtime_ns, self.fingerprint]

    def record(self, folder: Path) -> dict[str, Any]:
        """What a pack remembers; the path leads from the pack's folder to the file, so that both can be moved."""
        path = relative_path(self.path, folder)
        return {"path": path, "size": self.size, "mtime_ns": self.mtime_ns, "fingerprint": self.fingerprint}


def read_indexer(path: Path, content: Any = None) -> Indexer:
    """The sizes and names of a pickled indexer, read as data only unless its content is given; raises DataError."""
    if content is None:
        try:
            content = load_pickle(path)
        except UnsafePickleError as error:
            raise DataError(str(error)) from None
    for fault in indexer_faults(path, content):
        raise FaultError(fault)
    items: list[str] = [""] * len(content["i"])
    for raw, item in content["i"].items():
        items[item - 1] = str(raw)
    vocab = {str(field): max(values.values(), default=0) for field, values in content["f"].items()}
    users = {str(raw): user for raw, user in content["u"].items()}
    return Indexer(Schema(len(items), dict(sorted(vocab.items()))), tuple(items), users)


def indexer_faults(path: Path, content: Any) -> Iterator[Fault]:
    """What keeps an unpickled indexer from being used."""
    repair = "restore the file, or write it again"
    if type(content) is not dict:
        yield Fault(str(path), None, None, "a dictionary with 'u', 'i' and 'f'", type(content).__name__, repair)
        return
    for name in ("u", "i", "f"):
        if type(content.get(name)) is not dict:
            yield Fault(str(path), None, name, "a dictionary", type(content.get(name)).__name__, repair)
            return
    tables = {"u": content["u"], "i": content["i"]} | {
        f"f[{name!r:.40}]": value for name, value in content["f"].items()
    }
    for name, table in tables.items():
        if type(table) is not dict:
            yield Fault(str(path), None, ascii(name)[1:-1], "a dictionary", type(table).__name__, repair)
            continue
        ids = table.values()
        wrong = next((value for value in ids if type(value) is not int or not 0 < value < 1 << 31), None)
        if wrong is not None:
            yield Fault(str(path), None, ascii(name)[1:-1], "re-ids from 1", contest_lines.quote(wrong), repair)
        elif name in ("u", "i") and (len(set(ids)) != len(ids) or max(ids, default=0) != len(ids)):
            found = f"{len(ids)} entries, {len(set(ids))} different re-ids up to {max(ids, default=0)}"
            yield Fault(str(path), None, name, "re-ids 1, 2, 3 ... each once", found, repair)
    for name in ("u", "i"):
        wrong = next((raw for raw in content[name] if not is_name(raw)), None)
        if wrong is not None:
            yield Fault(
                str(path), None, name, "raw ids: integers or one line of text", contest_lines.quote(wrong), repair
            )
    wrong = next((field for field in content["f"] if not is_name(field)), None)
    if wrong is not None:
        yield Fault(str(path), None, "f", "feature ids as strings", contest_lines.quote(wrong), repair)


def is_name(value: Any) -> bool:
    """Whether a raw id can be written into a list of ids, one per line of UTF-8."""
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return type(value) is str and "\n" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


# Families of embeddings


class Family(NamedTuple):
    """The files of one family of embeddings."""

    id: str
    width: int | None  # None where only its contents tell
    form: Literal["lines", "pkl", "npy"]
    files: tuple[Path, ...]


def is_family(entry: Path) -> bool:
    """Whether an entry of creative_emb is named like a family and has one of its forms."""
    match = _FAMILY.fullmatch(entry.name)
    return match is not None and any(_forms(entry, match[1], int(match[2]) if match[2] else None, match[3]))


def find_families(source: Path) -> list[Family]:
    """Every family in creative_emb; of one that is there in several forms the best to read, lines first."""
    folder = source / EMBEDDINGS_FOLDER
    found: dict[str, Family] = {}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _FAMILY.fullmatch(entry.name)
        if match is None:
            continue
        number, width, suffix = match.groups()
        for family in _forms(entry, number, int(width) if width else None, suffix):
            best = found.get(number)
            order = ("lines", "pkl", "npy")
            if best is None or order.index(family.form) < order.index(best.form):
                found[number] = family
    return sorted(found.values(), key=lambda family: int(family.id))


def _forms(entry: Path, number: str, width: int | None, suffix: str | None) -> Iterator[Family]:
    if entry.is_file() and suffix is not None:
        yield Family(number, width, "pkl" if suffix == ".pkl" else "npy", (entry,))
    elif entry.is_dir() and suffix is None:
        files = [file for file in sorted(entry.iterdir()) if file.is_file() and file.name[0] not in "._"]
        lines = tuple(file for file in files if file.suffix in (".json", ".jsonl") or file.name.startswith("part-"))
        if lines and width is not None:
            yield Family(number, width, "lines", lines)
        for file in files:
            if file.suffix in (".pkl", ".npy"):
                yield Family(number, width, "pkl" if file.suffix == ".pkl" else "npy", (file,))


def choose_families(source: Path, wanted: Sequence[str] | None, *, num_items: int, say: Say) -> list[Family]:
    """The families asked for, or all small ones; `say` hears what is left out. Raises DataError for absent ones."""
    found = {family.id: family for family in find_families(source)}
    if wanted is not None:
        for name in wanted:
            if name not in found:
                listed = ", ".join(found) or "none"
                raise DataError(f"{source / EMBEDDINGS_FOLDER}: no embeddings of family {name!r}; there is {listed}")
        return [found[name] for name in sorted(set(wanted), key=int)]
    if not found:
        say(f"{source / EMBEDDINGS_FOLDER}: no embeddings; items are known by id and features alone")
    chosen = []
    for family in found.values():
        width = family.width or _WIDTHS.get(family.id, 0)
        if width > SMALL_WIDTH:
            size = (num_items + 1) * width * 2 / (1 << 30)
            reason = f"it is {width:,} wide and would take {size:.1f} GiB; ask for it by name"
            say(f"family {family.id} left out: {reason}")
        else:
            chosen.append(family)
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def _item_table(source: Path, work: Path, schema: Schema, say: Say) -> Path:
    """The raw table of every item's features, made or found."""
    table, part = work / "items.table", work / "items.part"
    found = contest_lines.read_part(part)
    if found is None or not table.is_file() or contest_lines.crc_of(table) != found[1].counts["crc"]:
        try:
            report = contest_lines.encode_items(source, table, part, schema)
        except BadLine as error:
            raise FaultError(_fault(source, error, 0)) from None
    else:
        report = found[1]
    counts = dict(report.counts)
    counts.pop("crc")
    say(f"{source.name}: features of {counts.pop('items with features', 0):,} of {schema.num_items:,} items")
    _tell_counts(source.name, Counter(counts), report.unknown, say)
    return table


def _tell_counts(name: str, counts: Counter[str], unknown: Mapping[str, Sequence[str]], say: Say) -> None:
    for what, count in sorted(counts.items()):
        if count:
            say(f"{name}: {count:,} {what}")
    for kind, ids in unknown.items():
        if ids:
            listed = ", ".join(contest_lines.quote(field) for field in ids)
            say(f"{name}: {kind} features left out, because the indexer or the contest form lacks them: {listed}")


class _Task(NamedTuple):
    """A block of a file, and the part it becomes."""

    encode: Callable[..., Report]
    file: Path
    start: int
    end: int
    part: Path
    arguments: tuple[Any, ...]
    family: str | None  # None for events

    def run(self) -> Report:
        return self.encode(self.file, self.start, self.end, self.part, *self.arguments)


def _tasks(
    events: Path, families: Sequence[Family], work: Path, table: Path, schema: Schema
) -> tuple[list[_Task], dict[str, list[_Origin]]]:
    """The blocks of all files that are read line by line, in order; and the files of every family."""
    tasks = _blocks(events, work / "seq", contest_lines.encode_events, (schema, table), None)
    origins: dict[str, list[_Origin]] = {}
    for family in families:
        origins[family.id] = [_Origin.of(file) for file in family.files]
        for origin in origins[family.id] if family.form == "lines" else ():
            key = hashlib.blake2b(json.dumps(origin.key).encode(), digest_size=8).hexdigest()
            name = work / f"emb_{family.id}_{family.width}_{key}"
            encode = contest_lines.encode_embeddings
            tasks += _blocks(origin.path, name, encode, (family.width,), family.id)
    return tasks, origins


def _blocks(
    file: Path, name: Path, encode: Callable[..., Report], arguments: tuple[Any, ...], family: str | None
) -> list[_Task]:
    size = file.stat().st_size
    starts = range(0, size, _BLOCK_BYTES)
    parts = [name.with_name(f"{name.name}.{n:07d}.part") for n in range(len(starts))]
    return [
        _Task(encode, file, start, min(start + _BLOCK_BYTES, size), part, arguments, family)
        for start, part in zip(starts, parts, strict=True)
    ]


def _worker_count(workers: int | None, num_tasks: int) -> int:
    if workers is not None and workers < 1:
        raise DataError(f"{workers} workers cannot do anything; use at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(workers or cores, num_tasks))


_Arrays = dict[str, "array[Any]"]


def _encode(tasks: Sequence[_Task], workers: int, say: Say) -> Iterator[tuple[_Task, Report, _Arrays]]:
    """Every block's report and arrays, in order, from the parts that are there and from the workers."""
    lines: Counter[Path] = Counter()  # before the block, for the faults' line numbers
    with ExitStack() as stack:
        pool = None
        waiting: deque[tuple[_Task, Future[Report] | None]] = deque()
        found = sum(task.part.is_file() for task in tasks)
        if found:
            say(f"{found:,} of {len(tasks):,} blocks were finished before")
        ahead = iter(tasks)
        while True:
            while len(waiting) < 2 * workers and (task := next(ahead, None)) is not None:
                if workers == 1 or contest_lines.read_part(task.part) is not None:
                    waiting.append((task, None))
                    continue
                if pool is None:
                    pool = ProcessPoolExecutor(workers, get_context("spawn"), contest_lines.start_worker)
                    stack.callback(pool.shutdown, cancel_futures=True)
                waiting.append((task, pool.submit(task.encode, *task[1:5], *task.arguments)))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                if future is not None:
                    future.result()
                part = contest_lines.read_part(task.part)
                if part is None and future is None:
                    task.run()
                    part = contest_lines.read_part(task.part)
            except BadLine as error:
                raise FaultError(_fault(task.file, error, lines[task.file])) from None
            except BrokenProcessPool:
                raise DataError(
                    "a worker process was ended from outside, perhaps for lack of memory; run the command again, with "
                    "fewer workers: finished blocks are kept"
                ) from None
            if part is None:
                raise DataError(f"{task.part} cannot be read back; check the disk, and run the command again")
            arrays, report = part
            lines[task.file] += report.lines
            yield task, report, arrays


def _fault(file: Path, error: BadLine, lines_before: int) -> Fault:
    line = None if error.line is None else error.line + lines_before
    return Fault(str(file), line, error.field, error.expected, error.found, error.repair)


# ---------------------------------------------------------------------------------------------------------------------
# Joining


class _Joiner:
    """Appends the parts' arrays to raw files, in the order of the source; the files are then mapped, not held."""

    def __init__(self, folder: Path, indexer: Indexer) -> None:
        self.folder = folder
        self.files: dict[str, BinaryIO] = {}
        self.users = indexer.users
        self.creative, self.row = _creative_ids(indexer.item_ids)
        self.raw_users = [""] * (max(indexer.users.values(), default=0) + 1)
        for raw, user in indexer.users.items():
            self.raw_users[user] = raw
        self.user_digests = array("q")  # to notice users that come twice, without holding their ids
        self.num_events = 0
        self.counts: Counter[str] = Counter()
        self.unknown: dict[str, set[str]] = {"user": set(), "item": set()}
        self.family_counts: dict[str, Counter[str]] = {}

    def __enter__(self) -> "_Joiner":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()

    def _append(self, name: str, values: "array[Any]") -> None:
        if name not in self.files:
            self.files[name] = (self.folder / name).open("wb")
        self.files[name].write(values)

    def add(self, task: _Task, report: Report, arrays: _Arrays) -> None:
        """Take one part."""
        if task.family is not None:
            self.family_counts.setdefault(task.family, Counter()).update(report.counts)
            self._append(f"creative_{task.family}", arrays["creative"])
            self._append(f"vector_{task.family}", arrays["vector"])
            return
        self.counts.update(report.counts)
        for kind, ids in report.unknown.items():
            self.unknown[kind].update(ids)
        arrays["user"], arrays["user_ids"] = self._name_users(arrays["user"], arrays.pop("user_text"))
        arrays["own_event"] = array("q", [event + self.num_events for event in arrays["own_event"]])
        self.num_events += len(arrays["item"])
        self.counts["events with features of their own"] += len(arrays["own_event"])
        for name, values in arrays.items():
            self._append(name, values)

    def _name_users(self, numbers: "array[int]", text: "array[int]") -> tuple["array[int]", "array[int]"]:
        """Re-ids (0 where the indexer has none) and raw ids of users given by re-id, or by text where that is 0."""
        given = iter(text.tobytes().decode().split("\n"))
        users, ids = array("i"), array("B")
        for number in numbers:
            if number == 0:
                raw = next(given)
                user = self.users.get(raw, 0)
            else:
                is_known = number < len(self.raw_users)
                raw, user = (self.raw_users[number], number) if is_known else (str(number), 0)
            self.counts["users that the indexer lacks"] += not user
            line = raw.encode() + b"\n"
            users.append(user)
            ids.frombytes(line)
            self.user_digests.append(
                int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little", signed=True)
            )
        return users, ids

    def tell(self, file: Path, say: Say) -> None:
        """Say what is irregular in the events."""
        num_users = len(self.user_digests)
        if not num_users:
            raise DataError(f"{file}: no user in it; write or download the file again")
        say(f"{file.name}: {num_users:,} users, {self.num_events:,} events")
        repeated = num_users - torch.unique(torch.frombuffer(self.user_digests, dtype=torch.int64)).numel()
        self.counts["lines of users that had one before: both are kept, as two users"] = repeated
        _tell_counts(file.name, self.counts, {kind: sorted(ids) for kind, ids in self.unknown.items()}, say)

    def _raw(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """What was appended under a name, mapped; -1 in the shape stands for the length that fits."""
        path = self.folder / name
        width = math.prod(size for size in shape if size >= 0)
        size = path.stat().st_size // (dtype.itemsize * width) if path.is_file() and width else 0
        return _mapped(path, dtype, [size if length < 0 else length for length in shape])

    def tensors(self, schema: Schema) -> dict[str, Tensor]:
        """The tensors of the events' pack."""
        num_users = len(self.user_digests)
        found = {
            "ptr": _ptr_of(self._raw("length", torch.int32, num_users)),
            "item": self._raw("item", torch.int32, -1),
            "action": self._raw("action", torch.int8, -1),
            "time": self._raw("time", torch.int64, -1),
            "own_event": self._raw("own_event", torch.int64, -1),
            "user": self._raw("user", torch.int32, num_users),
            "user_ids": self._raw("user_ids", torch.uint8, -1),
            "user_feature": self._raw("user_feature", torch.int32, num_users, len(schema.fields(USER_FIELDS))),
            "profile_time": self._raw("profile_time", torch.int64, num_users),
        }
        num_own = found["own_event"].numel()
        found["own_feature"] = self._raw("own_feature", torch.int32, num_own, len(schema.fields(ITEM_FIELDS)))
        for field in schema.fields(USER_ARRAYS):
            found[f"user_{field}_ptr"] = _ptr_of(self._raw(f"user_{field}_length", torch.int32, num_users))
            found[f"user_{field}"] = self._raw(f"user_{field}", torch.int32, -1)
        return found

    def embedding(self, family: Family, num_items: int, say: Say) -> Embedding:
        """A family's table, in a mapped file, from its parts or from its one array or dictionary."""
        counts = self.family_counts.get(family.id, Counter())
        if family.form == "lines":
            assert family.width is not None
            width, chunks = family.width, self._vectors(family.id, family.width)
        else:
            width, chunks = object_vectors(family, num_items)
        size = (num_items + 1) * width
        path = self.folder / f"emb_{family.id}"
        value = torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(num_items + 1, width)
        present = torch.zeros(num_items + 1, dtype=torch.bool)
        for ids, vectors, is_row in chunks:
            rows = ids if is_row else self._rows_of(ids)
            last = {row: n for n, row in enumerate(rows.tolist())}  # of an item that comes twice the last one counts
            counts["embeddings of unknown items"] += int((rows == 0).sum())
            last.pop(0, None)
            rows = torch.tensor(list(last), dtype=torch.int64)
            value[rows] = vectors[torch.tensor(list(last.values()), dtype=torch.int64)]
            present[rows] = True
        say(f"family {family.id}: {int(present.sum()):,} of {num_items:,} items have an embedding, {width:,} wide")
        _tell_counts(f"family {family.id}", counts, {}, say)
        return Embedding(value, present)

    def _vectors(self, family: str, width: int) -> "Iterator[_Vectors]":
        creative = self._raw(f"creative_{family}", torch.int64, -1)
        vector = self._raw(f"vector_{family}", torch.float16, -1, width)
        for start in range(0, creative.numel(), _ROWS):
            yield _Vectors(creative[start : start + _ROWS], vector[start : start + _ROWS], False)

    def _rows_of(self, creative: Tensor) -> Tensor:
        """Items of raw ids, [N] int64; 0 for unknown ones."""
        if not self.creative.numel():
            return torch.zeros_like(creative)
        place = torch.searchsorted(self.creative, creative).clamp(max=self.creative.numel() - 1)
        return torch.where(self.creative[place] == creative, self.row[place], 0)


class _Vectors(NamedTuple):
    """Some embeddings and whose they are."""

    id: Tensor  # [N] int64
    vector: Tensor  # [N, W] float16
    is_row: bool  # whether ids are re-ids already, 0 for rows without an embedding


def object_vectors(family: Family, num_items: int) -> tuple[int, Iterator[_Vectors]]:
    """Width and vectors of a pickled dictionary {creative id: vector}, or of an array with a row per item."""
    file = family.files[0]
    try:
        content = load_pickle(file) if family.form == "pkl" else load_npy(file)
    except UnsafePickleError as error:
        raise DataError(str(error)) from None
    if isinstance(content, Tensor):
        if (
            content.ndim != 2
            or not content.dtype.is_floating_point
            or content.shape[0] not in (num_items, num_items + 1)
        ):
            expected = f"floats of shape ({num_items} or {num_items + 1}, width)"
            found = f"{tuple(content.shape)} of {str(content.dtype).removeprefix('torch.')}"
            raise FaultError(Fault(str(file), None, None, expected, found, "export one row per re-id, in order"))
        if family.width not in (None, content.shape[1]):
            found = f"{content.shape[1]}"
            raise FaultError(Fault(str(file), None, None, f"rows of {family.width} numbers", found, "export it again"))
        return content.shape[1], _matrix_vectors(file, content, num_items)
    if type(content) is not dict:
        found = type(content).__name__
        raise FaultError(Fault(str(file), None, None, "a dictionary {creative id: vector}", found, "export it again"))
    first = next(iter(content.values()), ())
    width = family.width or (len(first) if isinstance(first, list | Tensor) and len(first) else 1)
    return width, _dict_vectors(file, content, width)


def _matrix_vectors(file: Path, matrix: Tensor, num_items: int) -> Iterator[_Vectors]:
    """Rows of zeros are items without an embedding."""
    first = num_items + 1 - matrix.shape[0]
    for start in range(0, matrix.shape[0], _ROWS):
        rows = matrix[start : start + _ROWS]
        vector = rows.to(torch.float16)
        wrong = (~vector.isfinite()).any(1).nonzero()
        if wrong.numel():
            row = start + int(wrong[0])
            expected, found = "finite numbers up to 65504", "NaN, infinity or a larger one"
            raise FaultError(Fault(str(file), None, f"row {row}", expected, found, "set the row to zeros"))
        ids = torch.arange(first + start, first + start + rows.shape[0])
        yield _Vectors(torch.where((vector != 0).any(1), ids, 0), vector, True)


def _dict_vectors(file: Path, content: Mapping[Any, Any], width: int) -> Iterator[_Vectors]:
    ids, data = array("q"), bytearray()
    for n, (key, value) in enumerate(content.items(), 1):
        creative = contest_lines.as_creative(key)
        values = value.tolist() if isinstance(value, Tensor) else value
        try:
            vector = contest_lines.pack_vector(values, None, width) if values is not None and values != [] else b""
        except BadLine as error:
            fault = Fault(str(file), None, contest_lines.quote(key), error.expected, error.found, error.repair)
            raise FaultError(fault) from None
        if creative is not None and vector:
            ids.append(creative)
            data += vector
        if ids and (len(ids) == _ROWS or n == len(content)):
            vectors = torch.frombuffer(data, dtype=torch.float16).view(-1, width).clone()
            yield _Vectors(torch.tensor(ids.tolist(), dtype=torch.int64), vectors, False)
            ids, data = array("q"), bytearray()


def _creative_ids(item_ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The raw item ids that are numbers, sorted, and their items; both [N] int64."""
    ids, rows = array("q"), array("q")
    for row, text in enumerate(item_ids, 1):
        creative = contest_lines.as_creative(text)
        if creative is not None:
            ids.append(creative)
            rows.append(row)
    if not ids:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    creative_sorted, order = torch.frombuffer(ids, dtype=torch.int64).sort()
    return creative_sorted, torch.frombuffer(rows, dtype=torch.int64)[order]


def _mapped(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    if not size:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(*shape)


def _ptr_of(length: Tensor) -> Tensor:
    ptr = torch.zeros(length.numel() + 1, dtype=torch.int64)
    torch.cumsum(length, 0, out=ptr[1:])
    return ptr


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_contest(path: Path) -> Contest:
    """The memory-mapped contents of undamaged packs whose source has not changed; raises DataError.

    Checksums of events and items are compared; embeddings, which may be many times larger, are mapped as they are.
    """
    seq, meta = _read_pack(path, "seq", kind=_KIND["seq"], common=None)
    items, items_meta = _read_pack(path, "items", kind=_KIND["items"], common=meta)
    embeddings = {}
    for family in meta["families"]:
        tensors, emb_meta = _read_pack(path, f"emb_{family}", kind=_KIND["emb"], common=meta)
        embeddings[family] = Embedding(tensors["value"], tensors["present"])
        _refuse_stale(path, emb_meta["sources"])
    _refuse_stale(path, meta["sources"])
    user_ids, item_ids = bytes_to_ids(seq["user_ids"]), bytes_to_ids(items["item_ids"])
    _check_tensors(path, seq, items, embeddings, meta, items_meta, len(user_ids), len(item_ids))
    ptr, item, time = seq["ptr"], seq["item"], seq["time"]
    is_known = item > 0
    if not bool(is_known.all()):
        before = torch.cat([torch.zeros(1, dtype=torch.int64), is_known.cumsum(0)])
        ptr, item, time = before[ptr], item[is_known], time[is_known]
    return Contest(
        sequences=Sequences(ptr, item, time, item_ids, user_ids, meta["fingerprint"], meta["name"]),
        ptr=seq["ptr"],
        item=seq["item"],
        action=seq["action"],
        time=seq["time"],
        own_event=seq["own_event"],
        own_feature=seq["own_feature"],
        user=seq["user"],
        user_feature=seq["user_feature"],
        user_lists={f: Lists(seq[f"user_{f}_ptr"], seq[f"user_{f}"]) for f in meta["user_arrays"]},
        profile_time=seq["profile_time"],
        item_feature=items["feature"],
        embeddings=embeddings,
        user_fields=tuple(meta["user_fields"]),
        item_fields=tuple(items_meta["fields"]),
        vocab=dict(meta["vocab"]),
    )


def _again(folder: Path) -> str:
    return f"write it again: {_PREPARE} SOURCE {shlex.quote(str(folder))}"


def _read_pack(
    folder: Path, name: str, *, kind: str, common: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A pack of the folder, which must be of this layout and of the same source as the events' pack."""
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        raise DataError(f"{file}: no such file; {_again(folder)}")
    try:
        tensors, meta = read_pack(file, kind=kind, verify=kind != _KIND["emb"])
    except DamagedFileError as error:
        raise DataError(f"{error}; {_again(folder)}") from None
    except ValueError as error:
        raise DataError(str(error)) from None
    if meta.get("layout") != _LAYOUT:
        raise DataError(f"{file}: layout {meta.get('layout')!r} of another version; {_again(folder)}")
    if common is not None and meta["fingerprint"] != common["fingerprint"]:
        raise DataError(f"{file}: of another source than seq.safetensors beside it; {_again(folder)}")
    return tensors, meta


def _refuse_stale(folder: Path, sources: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a file that a pack was made from is still there and has changed since."""
    for source in sources:
        file = folder / source["path"]
        if file.is_file() and changed_fingerprint(file, source) is not None:
            raise DataError(f"{folder}: a stale pack, {file} has changed since; {_again(folder)}")


def _check_tensors(
    folder: Path,
    seq: Mapping[str, Tensor],
    items: Mapping[str, Tensor],
    embeddings: Mapping[str, Embedding],
    meta: Mapping[str, Any],
    items_meta: Mapping[str, Any],
    num_users: int,
    num_items: int,
) -> None:
    """Raise where the tensors do not describe what their names promise."""
    num_events, num_own = seq["item"].numel(), seq["own_event"].numel()
    width = len(items_meta["fields"])
    expected = {
        "ptr": (seq, torch.int64, (num_users + 1,)),
        "item": (seq, torch.int32, (num_events,)),
        "action": (seq, torch.int8, (num_events,)),
        "time": (seq, torch.int64, (num_events,)),
        "own_event": (seq, torch.int64, (num_own,)),
        "own_feature": (seq, torch.int32, (num_own, width)),
        "user": (seq, torch.int32, (num_users,)),
        "user_feature": (seq, torch.int32, (num_users, len(meta["user_fields"]))),
        "profile_time": (seq, torch.int64, (num_users,)),
        "feature": (items, torch.int32, (num_items + 1, width)),
        **{f"user_{f}_ptr": (seq, torch.int64, (num_users + 1,)) for f in meta["user_arrays"]},
    }
    for name, (tensors, dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            described = f"{tuple(found.shape)} of {found.dtype}"
            raise DataError(f"{folder}: expected {name} as {shape} of {dtype}, found {described}; {_again(folder)}")
    rising = {"ptr": num_events, **{f"user_{f}_ptr": seq[f"user_{f}"].numel() for f in meta["user_arrays"]}}
    for name, count in rising.items():
        ptr = seq[name]
        if int(ptr[0]) != 0 or int(ptr[-1]) != count or bool((ptr.diff() < 0).any()):
            raise DataError(f"{folder}: expected {name} to rise from 0 to {count}; {_again(folder)}")
    if num_events and not 0 <= int(seq["item"].min()) <= int(seq["item"].max()) <= num_items:
        raise DataError(f"{folder}: expected items in 0..{num_items}; {_again(folder)}")
    for family, (value, present) in embeddings.items():
        if value.shape[:1] != (num_items + 1,) or value.dtype != torch.float16 or present.shape != (num_items + 1,):
            raise DataError(f"{folder}: expected {num_items + 1} embeddings of family {family}; {_again(folder)}")
