"""The contest's files, converted once into memory-mapped packs, and those packs as frozen tensors.

Legend: U users, E events, K events of known items, D events with features of their own, I items, C candidates,
X cold items (among the candidates, not in the indexer), N events of cold items, F sparse features.

    SOURCE/seq.jsonl             one user per line: [user, item, user features, item features, action, time] records
    SOURCE/indexer.pkl           how many items and values there are, and what they were called
    SOURCE/item_feat_dict.json   every item's features
    SOURCE/creative_emb/         families of embeddings: emb_81_32/ with JSON lines, emb_81_32.pkl or 81.npy
    SOURCE/predict_seq.jsonl     the test users, in the form of seq.jsonl; may be absent
    SOURCE/predict_set.jsonl     the candidates, cold items among them; may be absent

    OUTPUT/seq.safetensors          events in CSR form, users' features
    OUTPUT/items.safetensors        items' features as an integer table
    OUTPUT/emb_81.safetensors       a family in half precision, with a presence bit
    OUTPUT/predict_seq.safetensors  the test users' events and features
    OUTPUT/candidates.safetensors   ids and features of the candidates

Blocks of lines are encoded by processes (contest_lines.py) into parts in a hidden folder beside the output, which is
named after the source's fingerprint: what a killed conversion has finished, the next one finds. The parts are joined in
the order of the source (contest_join.py), so the packs do not depend on the number of processes or of kills.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.seqrec import contest_lines
from apps.seqrec.contest_embeddings import Embedding, Family, JoinedVectors, choose_families
from apps.seqrec.contest_join import (
    FaultError,
    Joined,
    JoinedCandidates,
    JoinedEvents,
    Rows,
    Say,
    Task,
    blocks,
    encode_blocks,
    fault_of,
    mapped,
    tell_counts,
    worker_count,
)
from apps.seqrec.contest_lines import ITEM_FIELDS, USER_ARRAYS, USER_FIELDS, BadLine, Schema
from apps.seqrec.dataset import Sequences
from shared.faults import DataError, Fault
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
from shared.packs import write_again
from shared.pickles import UnsafePickleError, load_pickle
from shared.ranking import Lists

EVENTS_FILE, INDEXER_FILE, ITEMS_FILE = "seq.jsonl", "indexer.pkl", "item_feat_dict.json"
PREDICT_FILE, CANDIDATES_FILE = "predict_seq.jsonl", "predict_set.jsonl"
REQUIRED_FILES = (EVENTS_FILE, INDEXER_FILE, ITEMS_FILE)

_KIND = {
    "seq": "seqrec contest events",
    "items": "seqrec contest items",
    "emb": "seqrec contest embeddings",
    "predict_seq": "seqrec contest test users",
    "candidates": "seqrec contest candidates",
}
_USERS = {"seq": EVENTS_FILE, "predict_seq": PREDICT_FILE}  # packs of events and what they are made from
_PACK_NAME = re.compile(r"(seq|items|predict_seq|candidates|emb_\d+)\.safetensors")
_LAYOUT = 2  # changes whenever a pack's tensors or a part's arrays change their meaning
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Events:
    """What the users of one file did, and their profiles, as memory-mapped tensors.

    Feature values are 1..vocab[field]; 0 stands for missing and for values that the indexer does not know. Item 0
    stands for an item that it does not know: such an event has its features in `own_feature`.
    """

    sequences: Sequences  # the events of known items; its tensors are those below where all items are known
    known_event: Tensor | None  # [K] int64, rising: which events `sequences` holds; None: all of them
    ptr: Tensor  # [U + 1] int64, events of user u are ptr[u]:ptr[u + 1], in order of time
    item: Tensor  # [E] int32, 0..I
    action: Tensor  # [E] int8, 0 exposure, 1 click, 2 conversion
    time: Tensor  # [E] int64 seconds
    own_event: Tensor  # [D] int64, rising: events whose features differ from their item's row
    own_feature: Tensor  # [D, F] int32, what they are instead
    cold_event: Tensor  # [N] int64, rising: events of unknown items that are among the candidates
    cold_row: Tensor  # [N] int32, I + 1..I + X: the row of the embeddings that those items have
    user: Tensor  # [U] int32 re-id, 0 where the indexer does not know the user
    user_feature: Tensor  # [U, F] int32, columns Contest.user_fields
    user_lists: dict[str, Lists]  # the array features: one list of values per user
    profile_time: Tensor  # [U] int64 seconds of the profile record, 0 without one: later than all events, so it leaks

    @property
    def user_ids(self) -> tuple[str, ...]:
        """The users' raw ids."""
        return self.sequences.user_ids

    @property
    def history(self) -> Sequences:
        """Every event, those of unknown items as item 0 (padding) too: for prediction, and aligned with `action`."""
        known = self.sequences
        return Sequences(self.ptr, self.item, self.time, known.item_ids, known.user_ids, known.fingerprint, known.name)


@dataclass(frozen=True)
class Candidates:
    """The ads to rank, in the order of their file, as memory-mapped tensors."""

    creative: Tensor  # [C] int64 raw id
    retrieval: Tensor  # [C] int64, each once
    item: Tensor  # [C] int32, 0..I; 0 for a cold one, which the indexer does not know
    row: Tensor  # [C] int32, 1..I + X, of the embeddings: the item, or a row behind the items' for each cold raw id
    feature: Tensor  # [C, F] int32, columns Contest.item_fields: its own, whatever the item's row says


@dataclass(frozen=True)
class Contest(Events):
    """The training users' events, and beside them items, test users and candidates; nothing changes after construction.

    The embeddings' rows behind the items' belong to the cold ones among the candidates, by first appearance.
    """

    item_feature: Tensor  # [I + 1, F] int32, columns item_fields; row 0 is padding
    embeddings: dict[str, Embedding]  # by family, e.g. "81"; I + 1 + X rows
    user_fields: tuple[str, ...]
    item_fields: tuple[str, ...]
    vocab: dict[str, int]  # the largest value of each feature, sparse and array
    num_extra: int  # X
    queries: Events | None  # the test users
    candidates: Candidates | None


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


def contest_bytes(source: Path, *, families: Sequence[str] | None = None) -> int:
    """How much `prepare_contest` will read line by line, the total of what it tells `on_bytes`."""
    chosen = choose_families(source, families, num_items=0, say=lambda line: None)
    files = [source / name for name in (EVENTS_FILE, PREDICT_FILE, CANDIDATES_FILE)]
    files += [file for family in chosen if family.form == "lines" for file in family.files]
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
) -> Contest:
    """Write the folder of packs `output` of a contest folder, and give what is in it.

    Lines are read once, by `workers` processes (None: one per core), in memory that does not grow with the file.
    `on_bytes` hears how many bytes are done in all (of `contest_bytes`), `say` what was chosen and what is irregular.
    families: of embeddings, e.g. ("81", "82"); None takes those up to 1,024 numbers wide. Raises DataError with file
    and line of the first thing that cannot be read. What was finished before an interruption is not read again.
    """
    _check_output(output)
    for name in REQUIRED_FILES:
        if not (source / name).is_file():
            raise DataError(f"{source / name}: no such file; the contest form needs it: download it into {source}")
    indexer = read_indexer(source / INDEXER_FILE)
    schema = indexer.schema
    chosen = choose_families(source, families, num_items=schema.num_items, say=say)
    origins = {name: _Origin.of(source / name) for name in (*REQUIRED_FILES, PREDICT_FILE, CANDIDATES_FILE)}
    work = _work_folder(output, _digest([_LAYOUT, _BLOCK_BYTES, *(origin.key for origin in origins.values())]))
    table = _item_table(source / ITEMS_FILE, work, schema, say)
    family_origins = {family.id: [_Origin.of(file) for file in family.files] for family in chosen}
    events = {name: JoinedEvents(work / "raw" / name, indexer.users) for name in _USERS if origins[_USERS[name]].exists}
    candidates = JoinedCandidates(work / "raw" / "candidates") if origins[CANDIDATES_FILE].exists else None
    vectors = {family.id: JoinedVectors(work / "raw" / f"emb_{family.id}") for family in chosen}
    joined: dict[str, Joined] = {**events, **{f"emb_{family}": parts for family, parts in vectors.items()}}
    tasks = [task for name in events for task in _users_tasks(source, name, work, table, schema)]
    if candidates is not None:
        joined["candidates"] = candidates
        tasks += _candidates_tasks(source, work, schema)
    for family in chosen:
        tasks += _family_tasks(family, family_origins[family.id], work)
    with ExitStack() as stack:
        for parts in joined.values():
            stack.enter_context(closing(parts))
        done = 0
        for task, report, arrays in encode_blocks(tasks, worker_count(workers, len(tasks)), say):
            joined[task.pack].add(report, arrays)
            done += task.end - task.start
            on_bytes(done)
    for origin in (*origins.values(), *(origin for found in family_origins.values() for origin in found)):
        if not origin.is_unchanged():
            raise DataError(f"{origin.path} has changed while it was read; run the command again")

    pack = work / "pack"
    common = {"layout": _LAYOUT, "fingerprint": _digest([origin.content for origin in origins.values()])}
    for name, users in events.items():
        users.tell(source / _USERS[name], say)
    rows, num_extra = Rows.of_indexer(indexer.item_ids), 0
    if candidates is not None:
        candidates.tell(source / CANDIDATES_FILE, rows, say)
        rows, num_extra = rows.with_extra(candidates.creative, schema.num_items)
        meta = {**common, "kind": _KIND["candidates"]}
        write_pack(pack / "candidates.safetensors", candidates.tensors(schema, rows), meta)
    _write_items(pack / "items.safetensors", table, indexer, common)
    for family in chosen:
        meta = {**common, "kind": _KIND["emb"], "family": family.id}
        meta["sources"] = [origin.record(output) for origin in family_origins[family.id]]
        embedding = vectors[family.id].table(family, schema.num_items, num_extra, rows, say)
        write_pack(pack / f"emb_{family.id}.safetensors", embedding._asdict(), meta)
        del embedding  # its file is mapped, and Windows keeps mapped files
    for name, users in events.items():
        content = [origins[file].content for file in (_USERS[name], INDEXER_FILE, ITEMS_FILE)]
        meta = {**common, "kind": _KIND[name], "content": _digest(content)}
        if name == "seq":
            meta |= {
                "name": source.resolve().name,
                "vocab": schema.vocab,
                "user_fields": schema.fields(USER_FIELDS),
                "user_arrays": schema.fields(USER_ARRAYS),
                "families": [family.id for family in chosen],
                "num_extra": num_extra,
                "packs": [other for other in ("predict_seq", "candidates") if other in joined],
                "sources": [origin.record(output) for origin in origins.values()],
            }
        write_pack(pack / f"{name}.safetensors", users.tensors(schema, rows), meta)
    if output.exists():
        replace(output, work / "old")
    replace(pack, output)
    shutil.rmtree(work)
    return read_contest(output)


def _users_tasks(source: Path, name: str, work: Path, table: Path, schema: Schema) -> list[Task]:
    encode = contest_lines.encode_events
    return blocks(source / _USERS[name], work / name, encode, (schema, table), pack=name, block_bytes=_BLOCK_BYTES)


def _candidates_tasks(source: Path, work: Path, schema: Schema) -> list[Task]:
    file, name, encode = source / CANDIDATES_FILE, work / "candidates", contest_lines.encode_candidates
    return blocks(file, name, encode, (schema,), pack="candidates", block_bytes=_BLOCK_BYTES)


def _family_tasks(family: Family, origins: Sequence["_Origin"], work: Path) -> list[Task]:
    tasks = []
    pack, encode = f"emb_{family.id}", contest_lines.encode_embeddings
    for origin in origins if family.form == "lines" else ():
        key = hashlib.blake2b(json.dumps(origin.key).encode(), digest_size=8).hexdigest()
        name = work / f"{pack}_{family.width}_{key}"
        tasks += blocks(origin.path, name, encode, (family.width,), pack=pack, block_bytes=_BLOCK_BYTES)
    return tasks


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


def _item_table(source: Path, work: Path, schema: Schema, say: Say) -> Path:
    """The raw table of every item's features, made or found."""
    table, part = work / "items.table", work / "items.part"
    found = contest_lines.read_part(part)
    if found is None or not table.is_file() or contest_lines.crc_of(table) != found[1].counts["crc"]:
        try:
            report = contest_lines.encode_items(source, table, part, schema)
        except BadLine as error:
            raise FaultError(fault_of(source, error)) from None
    else:
        report = found[1]
    counts = dict(report.counts)
    counts.pop("crc")
    say(f"{source.name}: features of {counts.pop('items with features', 0):,} of {schema.num_items:,} items")
    tell_counts(source.name, Counter(counts), report.unknown, say)
    return table


def _write_items(path: Path, table: Path, indexer: Indexer, common: Mapping[str, Any]) -> None:
    fields = indexer.schema.fields(ITEM_FIELDS)
    rows = mapped(table, torch.int32, (indexer.schema.num_items + 1, len(fields)))
    meta = {**common, "kind": _KIND["items"], "fields": fields}
    write_pack(path, {"feature": rows, "item_ids": ids_to_bytes(indexer.item_ids)}, meta)


def _check_output(output: Path) -> None:
    """Refuse to put the packs where something else is."""
    if output.is_dir():
        foreign = [entry.name for entry in output.iterdir() if not _PACK_NAME.fullmatch(entry.name)]
        if foreign:
            raise DataError(f"{output} holds {sorted(foreign)[0]}, which is no pack; give the name of a new folder")
    elif output.exists():
        raise DataError(f"{output} is a file; the contest form makes a folder: give the name of a new one")


class _Origin(NamedTuple):
    """A source file and the state it was read in; None where it does not exist."""

    path: Path
    size: int | None
    mtime_ns: int | None
    fingerprint: str | None

    @classmethod
    def of(cls, path: Path) -> "_Origin":
        if not path.is_file():
            return cls(path, None, None, None)
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns, fingerprint([path]))

    @property
    def exists(self) -> bool:
        return self.size is not None

    def is_unchanged(self) -> bool:
        if not self.path.is_file():
            return not self.exists
        stat = self.path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)

    @property
    def key(self) -> list[Any]:
        return [self.path.name, self.size, self.mtime_ns, self.fingerprint]

    @property
    def content(self) -> list[Any]:
        return [self.path.name, self.size, self.fingerprint]

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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_contest(path: Path) -> Contest:
    """The memory-mapped contents of undamaged packs whose source has not changed; raises DataError.

    Checksums of all but the embeddings are compared; those, which may be many times larger, are mapped as they are.
    """
    seq, meta = _read_pack(path, "seq", common=None)
    items, items_meta = _read_pack(path, "items", common=meta)
    embeddings = {}
    for family in meta["families"]:
        tensors, emb_meta = _read_pack(path, f"emb_{family}", common=meta)
        embeddings[family] = Embedding(tensors["value"], tensors["present"])
        _refuse_stale(path, emb_meta["sources"])
    _refuse_stale(path, meta["sources"])
    item_ids, fields, num_extra = bytes_to_ids(items["item_ids"]), tuple(items_meta["fields"]), meta["num_extra"]
    _check_items(path, items["feature"], embeddings, num_items=len(item_ids), width=len(fields), num_extra=num_extra)

    def events_of(tensors: Mapping[str, Tensor], content: str, name: str) -> Events:
        user_ids = bytes_to_ids(tensors["user_ids"])
        _check_events(path, tensors, meta, num_users=len(user_ids), num_items=len(item_ids), width=len(fields))
        return _events(tensors, meta["user_arrays"], item_ids, user_ids, content, name)

    queries = candidates = None
    if "predict_seq" in meta["packs"]:
        tensors, queries_meta = _read_pack(path, "predict_seq", common=meta)
        queries = events_of(tensors, queries_meta["content"], f"{meta['name']}/{PREDICT_FILE}")
    if "candidates" in meta["packs"]:
        tensors, _ = _read_pack(path, "candidates", common=meta)
        _check_candidates(path, tensors, num_items=len(item_ids), width=len(fields), num_extra=num_extra)
        candidates = Candidates(**tensors)
    return Contest(
        **vars(events_of(seq, meta["content"], meta["name"])),
        item_feature=items["feature"],
        embeddings=embeddings,
        user_fields=tuple(meta["user_fields"]),
        item_fields=fields,
        vocab=dict(meta["vocab"]),
        num_extra=num_extra,
        queries=queries,
        candidates=candidates,
    )


def _events(
    tensors: Mapping[str, Tensor],
    user_arrays: Sequence[str],
    item_ids: tuple[str, ...],
    user_ids: tuple[str, ...],
    content: str,
    name: str,
) -> Events:
    """The events of a pack, and those of known items once more."""
    ptr, item, time = tensors["ptr"], tensors["item"], tensors["time"]
    is_known = item > 0
    known_event = None
    if not bool(is_known.all()):
        known_event = is_known.nonzero().squeeze(1)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), is_known.cumsum(0)])
        ptr, item, time = before[ptr], item[known_event], time[known_event]
    return Events(
        sequences=Sequences(ptr, item, time, item_ids, user_ids, content, name),
        known_event=known_event,
        ptr=tensors["ptr"],
        item=tensors["item"],
        action=tensors["action"],
        time=tensors["time"],
        own_event=tensors["own_event"],
        own_feature=tensors["own_feature"],
        cold_event=tensors["cold_event"],
        cold_row=tensors["cold_row"],
        user=tensors["user"],
        user_feature=tensors["user_feature"],
        user_lists={field: Lists(tensors[f"user_{field}_ptr"], tensors[f"user_{field}"]) for field in user_arrays},
        profile_time=tensors["profile_time"],
    )


def _again(folder: Path) -> str:
    return write_again("seqrec", folder)


def _read_pack(
    folder: Path, name: str, *, common: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A pack of the folder, which must be of this layout and of the same source as the events' pack."""
    kind = _KIND["emb" if name.startswith("emb_") else name]
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
    """Raise where a file that a pack was made from is still there and has changed since, or was not there and is."""
    for source in sources:
        file = folder / source["path"]
        if not file.is_file():
            continue
        if source["fingerprint"] is None:
            raise DataError(f"{folder}: a stale pack, {file} has been added since; {_again(folder)}")
        if changed_fingerprint(file, source) is not None:
            raise DataError(f"{folder}: a stale pack, {file} has changed since; {_again(folder)}")


def _check_items(
    folder: Path,
    feature: Tensor,
    embeddings: Mapping[str, Embedding],
    *,
    num_items: int,
    width: int,
    num_extra: int,
) -> None:
    """Raise where the items' tensors do not describe what their names promise; so do the two functions below."""
    _check_shapes(folder, {"feature": (feature, torch.int32, (num_items + 1, width))})
    num_rows = num_items + 1 + num_extra
    for family, (value, present) in embeddings.items():
        if value.shape[:1] != (num_rows,) or value.dtype != torch.float16 or present.shape != (num_rows,):
            raise DataError(f"{folder}: expected {num_rows} embeddings of family {family}; {_again(folder)}")


def _check_events(
    folder: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    num_users: int,
    num_items: int,
    width: int,
) -> None:
    num_events, num_own = tensors["item"].numel(), tensors["own_event"].numel()
    num_cold = tensors["cold_event"].numel()
    shapes = {
        "ptr": (torch.int64, (num_users + 1,)),
        "item": (torch.int32, (num_events,)),
        "action": (torch.int8, (num_events,)),
        "time": (torch.int64, (num_events,)),
        "own_event": (torch.int64, (num_own,)),
        "own_feature": (torch.int32, (num_own, width)),
        "cold_event": (torch.int64, (num_cold,)),
        "cold_row": (torch.int32, (num_cold,)),
        "user": (torch.int32, (num_users,)),
        "user_feature": (torch.int32, (num_users, len(meta["user_fields"]))),
        "profile_time": (torch.int64, (num_users,)),
        **{f"user_{field}_ptr": (torch.int64, (num_users + 1,)) for field in meta["user_arrays"]},
    }
    _check_shapes(folder, {name: (tensors[name], dtype, shape) for name, (dtype, shape) in shapes.items()})
    rising = {"ptr": num_events, **{f"user_{f}_ptr": tensors[f"user_{f}"].numel() for f in meta["user_arrays"]}}
    for name, count in rising.items():
        ptr = tensors[name]
        if int(ptr[0]) != 0 or int(ptr[-1]) != count or bool((ptr.diff() < 0).any()):
            raise DataError(f"{folder}: expected {name} to rise from 0 to {count}; {_again(folder)}")
    _check_range(folder, "items", tensors["item"], 0, num_items)
    _check_range(folder, "cold rows", tensors["cold_row"], num_items + 1, num_items + meta["num_extra"])


def _check_candidates(
    folder: Path, tensors: Mapping[str, Tensor], *, num_items: int, width: int, num_extra: int
) -> None:
    count = tensors["creative"].numel()
    shapes = {
        "creative": (torch.int64, (count,)),
        "retrieval": (torch.int64, (count,)),
        "item": (torch.int32, (count,)),
        "row": (torch.int32, (count,)),
        "feature": (torch.int32, (count, width)),
    }
    _check_shapes(folder, {name: (tensors[name], dtype, shape) for name, (dtype, shape) in shapes.items()})
    _check_range(folder, "candidates' items", tensors["item"], 0, num_items)
    _check_range(folder, "candidates' rows", tensors["row"], 1, num_items + num_extra)


def _check_shapes(folder: Path, expected: Mapping[str, tuple[Tensor, torch.dtype, tuple[int, ...]]]) -> None:
    for name, (found, dtype, shape) in expected.items():
        if found.dtype != dtype or tuple(found.shape) != shape:
            described = f"{tuple(found.shape)} of {found.dtype}"
            raise DataError(f"{folder}: expected {name} as {shape} of {dtype}, found {described}; {_again(folder)}")


def _check_range(folder: Path, name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise DataError(f"{folder}: expected {name} in {low}..{high}; {_again(folder)}")
