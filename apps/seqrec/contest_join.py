"""Blocks of the contest's files, sent to processes, and what comes back, joined into mapped tensors.

Legend: U users, E events, D events with features of their own, N events of unknown items, C candidates,
F sparse features of items.

The processes run contest_lines.py and leave parts in a folder. Parts are joined in the order of the source: every array
is appended to a raw file of its own, which is mapped in the end and never held.
"""

import hashlib
import math
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from apps.seqrec import contest_lines
from apps.seqrec.contest_lines import ITEM_FIELDS, USER_ARRAYS, USER_FIELDS, BadLine, Report, Schema
from shared.faults import DataError, Fault

Say = Callable[[str], None]
Arrays = dict[str, "array[Any]"]


class FaultError(DataError):
    """A DataError that keeps its fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class Task(NamedTuple):
    """A block of a file, and the part it becomes."""

    encode: Callable[..., Report]
    file: Path
    start: int
    end: int
    part: Path
    arguments: tuple[Any, ...]
    pack: str  # the name of the pack it will be in

    def run(self) -> Report:
        return self.encode(self.file, self.start, self.end, self.part, *self.arguments)


def blocks(
    file: Path, name: Path, encode: Callable[..., Report], arguments: tuple[Any, ...], *, pack: str, block_bytes: int
) -> list[Task]:
    """The file cut into blocks; `name` is how their parts' names begin."""
    size = file.stat().st_size
    starts = range(0, size, block_bytes)
    parts = [name.with_name(f"{name.name}.{n:07d}.part") for n in range(len(starts))]
    return [
        Task(encode, file, start, min(start + block_bytes, size), part, arguments, pack)
        for start, part in zip(starts, parts, strict=True)
    ]


def worker_count(workers: int | None, num_tasks: int) -> int:
    """How many processes to use: one per core unless a number is given, and not more than there is work for."""
    if workers is not None and workers < 1:
        raise DataError(f"{workers} workers cannot do anything; use at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(workers or cores, num_tasks))


def encode_blocks(tasks: Sequence[Task], workers: int, say: Say) -> Iterator[tuple[Task, Report, Arrays]]:
    """Every block's report and arrays, in order, from the parts that are there and from the workers."""
    lines: Counter[Path] = Counter()  # before the block, for the faults' line numbers
    with ExitStack() as stack:
        pool = None
        waiting: deque[tuple[Task, Future[Report] | None]] = deque()
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
                raise FaultError(fault_of(task.file, error, lines[task.file])) from None
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


def fault_of(file: Path, error: BadLine, lines_before: int = 0) -> Fault:
    """The fault that a bad line of a block is."""
    line = None if error.line is None else error.line + lines_before
    return Fault(str(file), line, error.field, error.expected, error.found, error.repair)


def tell_counts(name: str, counts: Counter[str], unknown: Mapping[str, Sequence[str]], say: Say) -> None:
    """Say how often something irregular was found, and which features are left out."""
    for what, count in sorted(counts.items()):
        if count:
            say(f"{name}: {count:,} {what}")
    for kind, ids in unknown.items():
        if ids:
            listed = ", ".join(contest_lines.quote(field) for field in ids)
            say(f"{name}: {kind} features left out, because the indexer or the contest form lacks them: {listed}")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of raw ids


class Rows(NamedTuple):
    """Which row of the items' tables a raw id has."""

    creative: Tensor  # [N] int64, rising
    row: Tensor  # [N] int64, from 1

    @classmethod
    def of_indexer(cls, item_ids: Sequence[str]) -> "Rows":
        """The rows of items whose raw ids are numbers; the others cannot be asked for by number."""
        ids, rows = array("q"), array("q")
        for row, text in enumerate(item_ids, 1):
            creative = contest_lines.as_creative(text)
            if creative is not None:
                ids.append(creative)
                rows.append(row)
        return _sorted_rows(_int64(ids), _int64(rows))

    def with_extra(self, creative: Tensor, num_items: int) -> tuple["Rows", int]:
        """The same with rows behind the items' for ids that have none, by first appearance; and how many those are."""
        new = creative[self.find(creative) == 0]
        distinct, place = torch.unique(new, return_inverse=True)
        first = torch.full_like(distinct, new.numel()).scatter_reduce(0, place, torch.arange(new.numel()), "amin")
        extra = distinct[first.argsort()]
        row = torch.arange(num_items + 1, num_items + 1 + extra.numel())
        return _sorted_rows(torch.cat([self.creative, extra]), torch.cat([self.row, row])), extra.numel()

    def find(self, creative: Tensor) -> Tensor:
        """Rows of raw ids, [N] int64; 0 for unknown ones."""
        if not self.creative.numel():
            return torch.zeros_like(creative)
        place = torch.searchsorted(self.creative, creative).clamp(max=self.creative.numel() - 1)
        return torch.where(self.creative[place] == creative, self.row[place], 0)


def _sorted_rows(creative: Tensor, row: Tensor) -> Rows:
    creative_sorted, order = creative.sort(stable=True)
    return Rows(creative_sorted, row[order])


def _int64(values: "array[int]") -> Tensor:
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Joining


class Joined:
    """The parts of one pack, appended array by array to raw files in a folder of its own; changed in place."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.files: dict[str, BinaryIO] = {}
        self.counts: Counter[str] = Counter()
        self.unknown: dict[str, set[str]] = {}

    def close(self) -> None:
        """Finish the files; only then can they be mapped."""
        for file in self.files.values():
            file.close()

    def add(self, report: Report, arrays: Arrays) -> None:
        """Take one part."""
        self.counts.update(report.counts)
        for kind, ids in report.unknown.items():
            self.unknown.setdefault(kind, set()).update(ids)
        for name, values in arrays.items():
            if name not in self.files:
                self.files[name] = (self.folder / name).open("wb")
            self.files[name].write(values)

    def tell_counts(self, name: str, say: Say) -> None:
        """Say what was irregular in the parts."""
        tell_counts(name, self.counts, {kind: sorted(ids) for kind, ids in self.unknown.items()}, say)

    def raw(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """What was appended under a name, mapped; -1 in the shape stands for the length that fits."""
        path = self.folder / name
        width = math.prod(size for size in shape if size >= 0)
        size = path.stat().st_size // (dtype.itemsize * width) if path.is_file() and width else 0
        return mapped(path, dtype, [size if length < 0 else length for length in shape])


class JoinedEvents(Joined):
    """Users' lines, joined."""

    def __init__(self, folder: Path, users: Mapping[str, int]) -> None:
        super().__init__(folder)
        self.users = users
        self.raw_users = [""] * (max(users.values(), default=0) + 1)
        for raw, user in users.items():
            self.raw_users[user] = raw
        self.user_digests = array("q")  # to notice users that come twice, without holding their ids
        self.num_events = 0

    def add(self, report: Report, arrays: Arrays) -> None:
        """Take one part."""
        arrays["user"], arrays["user_ids"] = self._name_users(arrays["user"], arrays.pop("user_text"))
        for name in ("own_event", "unknown_event"):
            arrays[name] = array("q", [event + self.num_events for event in arrays[name]])
        self.num_events += len(arrays["item"])
        self.counts["events with features of their own"] += len(arrays["own_event"])
        super().add(report, arrays)

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
        """Say what is irregular in the events; raises DataError where there is no user."""
        num_users = len(self.user_digests)
        if not num_users:
            raise FaultError(Fault(str(file), None, None, "at least one user", "none", "download the file again"))
        say(f"{file.name}: {num_users:,} users, {self.num_events:,} events")
        repeated = num_users - torch.unique(torch.frombuffer(self.user_digests, dtype=torch.int64)).numel()
        self.counts["lines of users that had one before: both are kept, as two users"] = repeated
        self.tell_counts(file.name, say)

    def tensors(self, schema: Schema, rows: Rows) -> dict[str, Tensor]:
        """The tensors of the events' pack; `rows` has those of candidates too."""
        num_users = len(self.user_digests)
        found = {
            "ptr": _ptr_of(self.raw("length", torch.int32, num_users)),
            "item": self.raw("item", torch.int32, -1),
            "action": self.raw("action", torch.int8, -1),
            "time": self.raw("time", torch.int64, -1),
            "own_event": self.raw("own_event", torch.int64, -1),
            "user": self.raw("user", torch.int32, num_users),
            "user_ids": self.raw("user_ids", torch.uint8, -1),
            "user_feature": self.raw("user_feature", torch.int32, num_users, len(schema.fields(USER_FIELDS))),
            "profile_time": self.raw("profile_time", torch.int64, num_users),
        }
        num_own = found["own_event"].numel()
        found["own_feature"] = self.raw("own_feature", torch.int32, num_own, len(schema.fields(ITEM_FIELDS)))
        row = rows.find(self.raw("unknown_item", torch.int64, -1))
        is_candidate = row > schema.num_items
        found["cold_event"] = self.raw("unknown_event", torch.int64, -1)[is_candidate]
        found["cold_row"] = row[is_candidate].int()
        for field in schema.fields(USER_ARRAYS):
            found[f"user_{field}_ptr"] = _ptr_of(self.raw(f"user_{field}_length", torch.int32, num_users))
            found[f"user_{field}"] = self.raw(f"user_{field}", torch.int32, -1)
        return found


class JoinedCandidates(Joined):
    """Candidates' lines, joined."""

    @property
    def creative(self) -> Tensor:
        """[C] int64 raw ids."""
        return self.raw("creative", torch.int64, -1)

    def tell(self, file: Path, rows: Rows, say: Say) -> None:
        """Say what is irregular; raises DataError where there is no candidate, or a retrieval id that comes twice."""
        creative = self.creative
        if not creative.numel():
            raise FaultError(Fault(str(file), None, None, "at least one candidate", "none", "download the file again"))
        retrieval = self.raw("retrieval", torch.int64, -1)
        rising, order = retrieval.sort(stable=True)
        again = order[1:][rising[1:] == rising[:-1]]
        if again.numel():
            place = int(again.min())
            raise FaultError(repeated_retrieval(file, _line_of(file, place), int(retrieval[place])))
        cold = creative[rows.find(creative) == 0]
        say(f"{file.name}: {creative.numel():,} candidates, {cold.numel():,} of them cold: the indexer lacks them")
        self.tell_counts(file.name, say)

    def tensors(self, schema: Schema, rows: Rows) -> dict[str, Tensor]:
        """The tensors of the candidates' pack; `rows` has a row for each of them."""
        creative = self.creative
        row = rows.find(creative).int()
        return {
            "creative": creative,
            "retrieval": self.raw("retrieval", torch.int64, -1),
            "item": torch.where(row <= schema.num_items, row, 0),
            "row": row,
            "feature": self.raw("feature", torch.int32, creative.numel(), len(schema.fields(ITEM_FIELDS))),
        }


def repeated_retrieval(file: Path, line: int | None, value: int) -> Fault:
    """The fault of a candidate whose retrieval id another one had before."""
    return Fault(str(file), line, "retrieval_id", "each id once", f"{value} again", "number the rows again, from 0")


def _line_of(file: Path, place: int) -> int | None:
    """The number of a file's line that is the place-th, from 0, of those that are not blank."""
    for number, line in contest_lines.lines_of(file, 0, file.stat().st_size):
        place -= bool(line)
        if place < 0:
            return number
    return None


def mapped(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The numbers of a raw file."""
    size = math.prod(shape)
    if not size:
        return torch.empty(*shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(*shape)


def _ptr_of(length: Tensor) -> Tensor:
    ptr = torch.zeros(length.numel() + 1, dtype=torch.int64)
    torch.cumsum(length, 0, out=ptr[1:])
    return ptr
