"""Readers of the original's folders and of plain ratings, the one validator behind them, and our own packed form.

Legend: U users, I items, W warm items, E pairs, R rows of a file, F features, Z words of all items.

    folder   the original's layout: arrays, rows of held-out items and dictionaries as .npy, features as .npy or .pt
    pack     a .safetensors file written by `prepare`, mapped into memory
    ratings  MovieLens' ratings or RecBole's atomic files: not split yet, so only `prepare` reads them, and splits them

In a folder users are 0..U-1 and items U..U+I-1 (global ids); both sizes follow from warm_set.npy and cold_set.npy.
Python objects in .npy files are turned into flat tensors first, and every rule is a mask over those. `read_data` raises
the first error that `check_source` lists: both walk through the same rules.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import pickle
import shlex
import struct
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apps.clcrec.dataset import MODALITIES, ColdStart, Group, Words, group_part, lists_of
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
from shared.pickles import UnsafePickleError, load_npy
from shared.ranking import Lists
from shared.seed import make_generator

COLD_STREAM, COIN_STREAM, WARM_STREAM = 101, 102, 103  # of the split's draws: cold items, their pairs, warm pairs

_PREPARE = "python -m apps.clcrec prepare"
_PACK_KIND = "clcrec data"
_PACK_LAYOUT = 1  # changes whenever a pack's tensors change their meaning
_TRAIN_DICT, _ALL_DICTS = "user_item_train_dict.npy", ("user_item_all_dict.npy", "user_item_dict.npy")
_HELD_OUT = ("val_full.npy", "val_warm.npy", "val_cold.npy", "test_full.npy", "test_warm.npy", "test_cold.npy")
_INTERACTIONS = ("train.npy", _TRAIN_DICT, *_ALL_DICTS, *_HELD_OUT, "warm_set.npy", "cold_set.npy")
_FEATURE_SUFFIXES = (".npy", ".pt")
_FEATURES = tuple(f"feat_{modality}{suffix}" for modality in MODALITIES for suffix in _FEATURE_SUFFIXES)
_INT64 = 1 << 63
_MAX_USERS_PER_PAIR = 100  # more, and the item ids do not belong to these users; tables of U would fill the memory
_MAX_ID = _MAX_WORDS = 1 << 31
_BLOCK_ROWS = 4096  # of features that are looked at at a time

# What torch.load raises for files that are damaged or want more than tensors.
_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    OverflowError,
    AssertionError,
    MemoryError,
    struct.error,
)

Severity = Literal["error", "warning"]
Say = Callable[[str], None]


class DataError(ValueError):
    """The source cannot be read; the text is that of its first fault."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a source: where, what belongs there, what stands there, and what to do."""

    file: str
    line: int | None  # of a text file, counted from 1
    field: str | None
    expected: str
    found: str
    repair: str
    severity: Severity = "error"
    row: int | None = None  # of an array, counted from 0 as NumPy does; of a dictionary, the key

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        place = place if self.row is None else f"{place}[{self.row}]"
        field = "" if self.field is None else f"{self.field}: "
        return f"{place}: {self.severity}: {field}expected {self.expected}, found {self.found}; {self.repair}"


# ---------------------------------------------------------------------------------------------------------------------
# What callers use


def read_data(path: Path) -> ColdStart:
    """Interactions and content of a folder in the original's layout, or of a pack.

    A folder may lack what follows from the rest: the dictionaries, train.npy where user_item_train_dict.npy is there,
    and of full, warm and cold held-out files either the full one or the other two. Raises DataError with the first
    error that `check_source` would list.
    """
    findings = _Findings(path, limit=1)
    data = _load(path, findings)
    findings.raise_first()
    assert data is not None
    return data


def check_source(path: Path, *, limit: int = 20) -> list[Fault]:
    """Everything that is wrong with a source, errors first: at most `limit` faults, then one that counts the rest.

    What `read_data` raises for is an error, what it can live with a warning. Ratings that are not split yet are an
    error that gives the command, followed by what is wrong with them.
    """
    findings = _Findings(path, limit=limit)
    data = _load(path, findings)
    if data is not None:
        _check_quality(path, data, findings)
    elif (form := _form_of(path)) is not None:
        _read_ratings(form, findings)
    return findings.listing()


def prepare_source(
    source: Path,
    output: Path,
    *,
    cold_share: float = 0.2,
    seed: int = 42,
    min_rating: float | None = None,
    say: Say = lambda line: None,
) -> ColdStart:
    """Write a pack of a folder in the original's layout, or of ratings that are split here; give what is in it.

    The split: a share of the items, drawn from the seed, is cold, and each of their pairs goes to validation or test by
    a fair coin. Of each user's other pairs a tenth, rounded down, goes to validation and as many to the test. Pairs
    rated below `min_rating` do not count. `say` hears, line by line, what was left out and why.
    """
    if output.suffix != ".safetensors":
        raise DataError(
            f"{output}: a pack's name must end in .safetensors; write to {output.with_suffix('.safetensors')}"
        )
    if source.suffix == ".safetensors":
        raise DataError(f"{source} is already a pack; copy it, or prepare the folder that it was made from")
    findings = _Findings(source, limit=1)
    form = _form_of(source)
    if form is None:
        sources = _sources(_files_of(source))
        data = _load(source, findings)
        findings.raise_first()
        assert data is not None
        if min_rating is not None:
            raise DataError(f"{source} holds no ratings, so that a smallest one means nothing; leave --min-rating out")
        say(f"{source} is split already; its split is kept, --cold-share and --seed change nothing")
        split = None
    else:
        if not 0 < cold_share < 1:
            raise DataError(f"--cold-share is {cold_share:g}; it must be between 0 and 1, as 0.2")
        sources = _sources([file for file in (form.events, form.items) if file.is_file()])
        ratings = _read_ratings(form, findings)
        findings.raise_first()
        assert ratings is not None
        split = _Split(cold_share, seed, min_rating)
        data = _split_ratings(ratings, split, fingerprint=_joined(sources, split), name=_name(source), say=say)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_pack(output, data, sources, split)
    return data


def read_content(path: Path, *, modalities: Sequence[str], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Features of new items, modality -> [N, F] float32, from a folder with one feat_* file per modality.

    The files have the form of the original's folders, one row per new item, and as many columns as those that the
    model was trained on (`widths`).
    """
    findings = _Findings(path, limit=1)
    content: dict[str, Tensor] = {}
    for modality in modalities:
        if modality not in widths:
            raise DataError(
                f"{path}: the model was trained on feat_{modality} as lists of words, and new items can only be given "
                "by numbers: train it on a matrix of text features instead"
            )
        file = _feature_file(path, modality, findings)
        if file is None:
            expected = f"feat_{modality} of the new items, as .npy or .pt"
            findings.add(path / f"feat_{modality}.npy", expected, "no such file", "add it: the model was trained on it")
        findings.raise_first()
        assert file is not None
        tensor = _load_tensor(file, findings)
        if tensor is not None and modality == "t" and not tensor.is_floating_point():
            repair = "give numbers of the kind that the model was trained on"
            findings.add(file, "a matrix of floats", f"integers, {_shape(tensor)}: words are not read here", repair)
            tensor = None
        rows = next(iter(content.values())).shape[0] if content else None
        matrix = None if tensor is None else _matrix(file, tensor, rows, findings)
        if matrix is not None and matrix.shape[1] != widths[modality]:
            repair = "make the features exactly as those of the training data"
            found = _many(matrix.shape[1], "column")
            findings.add(file, f"{widths[modality]} columns, as the model was trained on", found, repair)
        findings.raise_first()
        assert matrix is not None
        content[modality] = matrix
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Faults, collected


class _Findings:
    """Faults as the rules find them, changed in place: the first `limit` of either severity, and the number of all."""

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.errors: list[Fault] = []
        self.warnings: list[Fault] = []
        self.total = {"error": 0, "warning": 0}

    def add(
        self,
        file: Path,
        expected: str,
        found: str,
        repair: str,
        *,
        line: int | None = None,
        row: int | None = None,
        field: str | None = None,
        severity: Severity = "error",
    ) -> None:
        self.total[severity] += 1
        kept = self.errors if severity == "error" else self.warnings
        if len(kept) < self.limit:
            kept.append(Fault(str(file), line, field, expected, found, repair, severity, row))

    def each(self, places: Tensor, describe: Callable[[int], None]) -> None:
        """Have `describe` add one error for each of the places ([N] int64); only the first `limit` are visited."""
        for place in places[: self.limit].tolist():
            describe(place)
        self.total["error"] += max(0, places.numel() - self.limit)

    def raise_first(self) -> None:
        if self.errors:
            raise DataError(str(self.errors[0]))

    def listing(self) -> list[Fault]:
        shown = (self.errors + self.warnings)[: self.limit]
        errors = self.total["error"] - sum(fault.severity == "error" for fault in shown)
        warnings = self.total["warning"] - sum(fault.severity == "warning" for fault in shown)
        if errors or warnings:
            counts = ((errors, "more error"), (warnings, "more warning"))
            found = " and ".join(_many(count, noun) for count, noun in counts if count)
            repair = "repair these first, or raise the limit"
            severity: Severity = "error" if errors else "warning"
            shown.append(Fault(str(self.path), None, None, f"at most {self.limit} faults", found, repair, severity))
        return shown


def _quote(text: str) -> str:
    """The text on one line, in ASCII, cut where it is long."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _kind(value: Any) -> str:
    """What a value out of a file is, in a few words."""
    if isinstance(value, Tensor):
        return f"an array of {_shape(value)}"
    if type(value) is int:
        return str(value) if -_INT64 <= value < _INT64 else "an integer of more than 64 bits"
    if isinstance(value, bool | float):
        return f"{type(value).__name__} {value}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} {_quote(str(value))}"
    if isinstance(value, list | tuple | set | frozenset | dict):
        return f"a {type(value).__name__} of {_many(len(value), 'value')}"
    return type(value).__name__


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _places(mask: Tensor) -> Tensor:
    """Where the mask ([N] bool) is true, rising."""
    return torch.nonzero(mask).squeeze(1)


def _one_line(text: str) -> str:
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"


# ---------------------------------------------------------------------------------------------------------------------
# From a path to data


def _load(path: Path, findings: _Findings) -> ColdStart | None:
    """What the source holds, or None where errors were found on the way."""
    form = _form_of(path)
    if not path.exists():
        repair = "check the spelling, or download the data first"
        findings.add(path, "an existing folder or pack", "nothing at this path", repair)
    elif path.suffix == ".safetensors" and path.is_file():
        return _load_pack(path, findings)
    elif not path.is_dir():
        repair = f"give the folder {path.parent} that it is in"
        findings.add(path, "a folder, or a pack that ends in .safetensors", f"the file {path.name}", repair)
    elif form is not None:
        command = f"{_PREPARE} {shlex.quote(str(path))} {shlex.quote(_name(path) + '.safetensors')} --cold-share 0.2"
        expected = "a folder in the original's layout, or a pack"
        found = f"ratings that are not split yet ({form.events.name})"
        findings.add(path, expected, found, f"split them and write a pack with: {command}")
    elif not _files_of(path):
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        expected = f"the original's files ({', '.join(_INTERACTIONS[:2])}, ...), MovieLens' ratings, or one .inter file"
        findings.add(
            path, expected, f"none of them ({_one_line(shown) or 'it is empty'})", "give the folder they are in"
        )
    else:
        return _load_folder(path, findings)
    return None


def _files_of(folder: Path) -> tuple[Path, ...]:
    """The files of the original's layout that a folder has."""
    return tuple(folder / name for name in (*_INTERACTIONS, *_FEATURES) if (folder / name).is_file())


class _Source(NamedTuple):
    """A file as it was when it was read."""

    file: Path
    size: int
    mtime_ns: int
    fingerprint: str


def _sources(files: Sequence[Path]) -> tuple[_Source, ...]:
    stats = [file.stat() for file in files]
    return tuple(_Source(f, s.st_size, s.st_mtime_ns, fingerprint([f])) for f, s in zip(files, stats, strict=True))


class _Split(NamedTuple):
    """What the split of ratings depends on beside them."""

    cold_share: float
    seed: int
    min_rating: float | None


def _joined(sources: Sequence[_Source], split: _Split | None) -> str:
    """32 hexadecimal digits that change with any of the files and with the split made of them."""
    text = json.dumps([[source.fingerprint for source in sources], split])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The original's folder


@dataclass(frozen=True)
class _Items:
    """The items of a folder, and how their global ids become numbers."""

    num_users: int
    num_warm: int
    raw: Tensor  # [I] int64, global id of item i, warm ones first
    number: Tensor  # [I] int64, item number of the global id U + n at [n]
    in_order: bool  # whether the folder has the warm items first too

    @property
    def num_items(self) -> int:
        return self.raw.numel()

    @property
    def end(self) -> int:
        """One more than the largest global id."""
        return self.num_users + self.num_items


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a user and a global item id, and where they stand."""

    file: Path
    user: Tensor  # [E] int64
    item: Tensor  # [E] int64
    row: Tensor  # [E] int64, row of the file or key of the dictionary

    def keep(self, mask: Tensor) -> "_Pairs":
        return _Pairs(self.file, self.user[mask], self.item[mask], self.row[mask])

    def keys(self, items: _Items) -> Tensor:
        """One number per pair, the same for equal pairs; all ids must be in range."""
        return self.user * items.end + self.item


def _load_folder(folder: Path, findings: _Findings) -> ColdStart | None:
    sources = _sources(_files_of(folder))
    items = _read_items(folder, findings)
    train = _read_train(folder, items, findings)
    valid = _read_held_out(folder, "val", items, findings)
    test = _read_held_out(folder, "test", items, findings)
    if items is not None and train is not None:
        for pairs in (*valid, *test):
            repair = "delete it from the row, or from the training pairs"
            _check_apart(pairs, (train,), items, findings, "a pair that is not trained on", repair)
        for pairs in test:
            _check_apart(pairs, valid, items, findings, "a pair of one split", "delete it from one of the two rows")
    for file in (folder / name for name in _ALL_DICTS if (folder / name).is_file()):
        found = _read_dict(file, findings)
        if found is not None and items is not None and train is not None and not findings.total["error"]:
            expected = "the pairs of training, validation and test together"
            repair = "nothing to do, as those are used instead; delete the file or write it again"
            _check_equal(found, (train, *valid, *test), items, findings, expected, repair, severity="warning")
    content, words = _read_features(folder, items, findings)
    if findings.total["error"]:
        return None
    assert items is not None
    assert train is not None
    held_out = [_joined_pairs(pairs, items) for pairs in (valid, test)]
    user, item = _joined_pairs((train,), items)
    known = [torch.cat(parts) for parts in zip((user, item), *held_out, strict=True)]
    return ColdStart(
        num_warm=items.num_warm,
        user=user.to(torch.int32),
        item=item.to(torch.int32),
        known=lists_of(known[0], known[1], items.num_users),
        valid=lists_of(*held_out[0], items.num_users),
        test=lists_of(*held_out[1], items.num_users),
        content=content,
        words=words,
        item_ids=tuple(map(str, items.raw.tolist())),
        user_ids=tuple(map(str, range(items.num_users))),
        fingerprint=_joined(sources, None),
        name=_name(folder),
    )


def _joined_pairs(parts: Sequence[_Pairs], items: _Items) -> tuple[Tensor, Tensor]:
    """Users and item numbers, both [E] int64, of several files."""
    raw = torch.cat([pairs.item for pairs in parts])
    return torch.cat([pairs.user for pairs in parts]), items.number[raw - items.num_users]


# Python objects and arrays as flat tensors


def _load_objects(file: Path, findings: _Findings) -> Any:
    """What a .npy file holds; None where it is missing or unreadable, which is then a fault."""
    if not file.is_file():
        findings.add(file, "the file", "no such file", "copy it into the folder; the original's data has it")
        return None
    try:
        value = load_npy(file)
    except UnsafePickleError as error:
        expected = "arrays, lists, sets and dictionaries of numbers"
        found = _one_line(str(error).removeprefix(f"{file}: ")).removesuffix(".")
        findings.add(file, expected, found, "copy the file again, or write it anew")
        return None
    if value is None:
        findings.add(file, "an array", "None", "write it anew")
    return value


def _is_int64(value: Any) -> bool:
    return type(value) is int and -_INT64 <= value < _INT64


def _are_int64(values: Sequence[Any]) -> bool:
    """Whether all are integers (True and 1.0 are not) that fit."""
    return not values or (set(map(type, values)) == {int} and min(values) >= -_INT64 and max(values) < _INT64)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _listed(value: Any) -> Sequence[Any] | set[Any] | frozenset[Any] | None:
    """A list, tuple, set or row of integers of an array as something to iterate over, else None."""
    if isinstance(value, Tensor):
        return value.tolist() if value.ndim == 1 and _is_integer(value) else None
    return value if isinstance(value, list | tuple | set | frozenset) else None


def _jagged(
    file: Path, rows: Sequence[Any], name_row: Callable[[int], int], findings: _Findings
) -> tuple[Tensor, Tensor, Tensor]:
    """Length of each row ([R] int64), the values of all rows ([E] int64), and which rows are sound; others are empty.

    A row is a list, tuple, set or array of integers; `name_row` gives what a fault calls a row.
    """
    broken: dict[int, str] = {}
    if not set(map(type, rows)) <= {list, tuple, set, frozenset}:
        listed = [_listed(row) for row in rows]
        broken = {n: _kind(rows[n]) for n, row in enumerate(listed) if row is None}
        rows = [() if row is None else row for row in listed]
    flat = list(itertools.chain.from_iterable(rows))
    if not _are_int64(flat):
        wrong = {n: [value for value in row if not _is_int64(value)] for n, row in enumerate(rows)}
        broken |= {n: _kind(values[0]) for n, values in wrong.items() if values}
        rows = [() if n in broken else row for n, row in enumerate(rows)]
        flat = list(itertools.chain.from_iterable(rows))
    sound = torch.ones(len(rows), dtype=torch.bool)
    if broken:
        places = torch.tensor(sorted(broken))
        sound[places] = False

        def describe(n: int) -> None:
            repair = "write ids as plain integers"
            findings.add(file, "a list or set of integers", broken[n], repair, row=name_row(n))

        findings.each(places, describe)
    length = torch.tensor(list(map(len, rows)), dtype=torch.int64)
    return length, torch.tensor(flat, dtype=torch.int64), sound


def _read_dict(file: Path, findings: _Findings) -> _Pairs | None:
    """The pairs of a dictionary of users' items, in its order."""
    value = _load_objects(file, findings)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 1:  # an array of one object instead of the object itself
        value = value[0]
    if not isinstance(value, dict):
        repair = "save the dictionary with numpy.save(path, a_dict)"
        findings.add(file, "a dictionary from each user to a set of items", _kind(value), repair)
        return None
    keys = list(value)
    if not _are_int64(keys):
        odd = [key for key in keys if not _is_int64(key)]
        found = f"{_kind(odd[0])} ({_many(len(odd), 'such key')})"
        findings.add(file, "users as plain integers", found, "write keys as integers", field="key")
        return None
    length, item, _ = _jagged(file, list(value.values()), lambda n: keys[n], findings)
    user = torch.repeat_interleave(torch.tensor(keys, dtype=torch.int64), length)
    return _Pairs(file, user, item, user)


# Rules


def _read_items(folder: Path, findings: _Findings) -> _Items | None:
    """The items, from warm_set.npy and cold_set.npy."""
    warm_file, cold_file = folder / "warm_set.npy", folder / "cold_set.npy"
    warm, cold = _read_ids(warm_file, findings), _read_ids(cold_file, findings)
    if warm is None or cold is None:
        return None
    both = cold[torch.isin(cold, warm)]

    def describe(raw: int) -> None:
        findings.add(cold_file, "items that are not in warm_set.npy", f"item {raw}", "delete it from one of the two")

    findings.each(both, describe)
    ids = torch.unique(torch.cat([warm, cold]))
    num_users = int(ids[0])
    if num_users < 1:
        found = f"an item with id {num_users}"
        repair = "add the number of users to every item id, in all files"
        findings.add(warm_file if bool((warm == num_users).any()) else cold_file, "ids above all users'", found, repair)
        return None
    if int(ids[-1]) >= _MAX_ID:
        found = f"item {int(ids[-1])}"
        repair = "number users and items without gaps, in all files"
        findings.add(warm_file if bool((warm == ids[-1]).any()) else cold_file, "ids below 2**31", found, repair)
        return None
    missing = int(ids[-1]) - num_users + 1 - ids.numel()
    if missing:
        before = int(ids[:-1][ids.diff() > 1][0])
        repair = "add the missing ids to one of the two files, or renumber the items in all files"
        expected = f"every id from {num_users} to {int(ids[-1])} in warm_set.npy or cold_set.npy"
        findings.add(warm_file, expected, f"no {before + 1} ({_many(missing, 'id')} missing)", repair)
        return None
    if both.numel():
        return None
    raw = torch.cat([warm, cold])
    number = torch.empty_like(raw)
    number[raw - num_users] = torch.arange(raw.numel())
    return _Items(num_users, warm.numel(), raw, number, in_order=torch.equal(raw, ids))


def _read_ids(file: Path, findings: _Findings) -> Tensor | None:
    """The distinct ids of an array, a list or a set, rising."""
    value = _load_objects(file, findings)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):  # an array of one set
        value = value[0]
    values = _listed(value)
    repair = "write the global item ids as an int64 array"
    if values is None:
        findings.add(file, "a row of integers", _kind(value), repair)
        return None
    values = list(values)
    if not values:
        repair = "list the items; ratings without cold items get some from `prepare --cold-share`"
        findings.add(file, "at least one item", "no id at all", repair)
        return None
    if not _are_int64(values):
        n = next(n for n, value in enumerate(values) if not _is_int64(value))
        findings.add(file, "integers", _kind(values[n]), repair, row=n)
        return None
    listed = torch.tensor(values, dtype=torch.int64)
    ids = torch.unique(listed)
    if ids.numel() < listed.numel():
        count = listed.numel() - ids.numel()
        repair = "nothing to do: an item counts once"
        findings.add(file, "each id once", _many(count, "repeated id"), repair, severity="warning")
    return ids


def _read_train(folder: Path, items: _Items | None, findings: _Findings) -> _Pairs | None:
    """The training pairs in the order of train.npy; without that file, by user and item from the dictionary."""
    file, dict_file = folder / "train.npy", folder / _TRAIN_DICT
    train = _read_array(file, findings) if file.is_file() or not dict_file.is_file() else None
    listed = _read_dict(dict_file, findings) if dict_file.is_file() else None
    if listed is not None and not file.is_file():
        repair = "nothing to do: the pairs are taken from the dictionary, by user and item"
        findings.add(file, "the training pairs", f"only {_TRAIN_DICT}", repair, severity="warning")
        order = torch.sort(listed.item, stable=True).indices
        train = listed.keep(order[torch.sort(listed.user[order], stable=True).indices])
    if train is None or items is None:
        return None
    if not train.user.numel():
        findings.add(train.file, "at least one training pair", "none", "copy the file again, or write it anew")
        return None
    if items.num_users > _MAX_USERS_PER_PAIR * train.user.numel():
        found = f"items from {items.num_users} on, and {_many(train.user.numel(), 'training pair')}"
        repair = "check that the items' ids follow those of the users, and that the files belong together"
        findings.add(folder / "warm_set.npy", "items numbered from the number of users on", found, repair)
        return None
    sound = _check_users(train.file, train.user, train.row, items, findings)
    sound &= _check_group(train, items, "warm", findings)
    if listed is not None and train.file == file and bool(sound.all()):
        repair = "delete the dictionary if train.npy is right: it is not needed"
        _check_equal(listed, (train.keep(sound),), items, findings, "the pairs of train.npy", repair)
    return train.keep(sound)


def _read_array(file: Path, findings: _Findings) -> _Pairs | None:
    value = _load_objects(file, findings)
    if value is None:
        return None
    if not isinstance(value, Tensor) or not _is_integer(value) or value.ndim != 2 or value.shape[1] != 2:
        repair = "write one row (user, global item id) per pair, as int64"
        findings.add(file, "integers of shape (pairs, 2)", _kind(value), repair)
        return None
    value = value.to(torch.int64)
    return _Pairs(file, value[:, 0], value[:, 1], torch.arange(value.shape[0]))


def _read_held_out(folder: Path, stage: str, items: _Items | None, findings: _Findings) -> tuple[_Pairs, ...]:
    """The sound pairs of a split, of its full file or else of its warm and its cold one; nothing without items."""
    file = folder / f"{stage}_full.npy"
    parts: dict[Group, Path] = {"warm": folder / f"{stage}_warm.npy", "cold": folder / f"{stage}_cold.npy"}
    has_full = file.is_file() or not all(part.is_file() for part in parts.values())
    full = _read_rows(file, items, findings) if has_full else None
    rows = {group: _read_rows(part, items, findings) for group, part in parts.items() if part.is_file()}
    if items is None:
        return ()
    if has_full:
        if full is None:
            return ()
        sound = _check_group(full, items, "all", findings)
        full = full.keep(sound)
        is_warm = items.number[full.item - items.num_users] < items.num_warm
        for group, found in rows.items():
            if found is not None and bool(sound.all()):
                expected, repair = f"the {group} items of {file.name}", "delete the file, which is not needed"
                _check_equal(found, (full.keep(is_warm == (group == "warm")),), items, findings, expected, repair)
        return (full,)
    read = [(group, found) for group, found in rows.items() if found is not None]
    return tuple(found.keep(_check_group(found, items, group, findings)) for group, found in read)


def _read_rows(file: Path, items: _Items | None, findings: _Findings) -> _Pairs | None:
    """The pairs of rows [user, item, item, ...] whose users are sound."""
    value = _load_objects(file, findings)
    rows = value.tolist() if isinstance(value, Tensor) and value.ndim == 2 and _is_integer(value) else value
    if rows is None:
        return None
    if not isinstance(rows, list):
        findings.add(file, "rows [user, item, item, ...]", _kind(value), "write an object array of lists")
        return None
    if any(isinstance(row, set | frozenset) for row in rows):
        n = next(n for n, row in enumerate(rows) if isinstance(row, set | frozenset))
        repair = "write an object array of lists: a set has no first element"
        findings.add(file, "rows [user, item, item, ...]", _kind(rows[n]), repair, row=n)
        return None
    length, flat, sound = _jagged(file, rows, lambda n: n, findings)

    def describe(n: int) -> None:
        findings.add(file, "a row that begins with its user", "an empty row", "write its user, or delete it", row=n)

    findings.each(_places(sound & (length == 0)), describe)
    row = _places(length > 0)
    count = length[row] - 1
    start = torch.cumsum(length, 0)[row] - length[row]
    user = flat[start]
    is_item = torch.ones(flat.numel(), dtype=torch.bool).index_fill_(0, start, False)
    sound = torch.ones_like(user, dtype=torch.bool)
    if items is not None:
        sound &= _check_users(file, user, row, items, findings)
    order = torch.sort(user, stable=True).indices
    again = order[1:][user[order].diff() == 0]

    def describe_again(n: int) -> None:
        first = int(row[_places(user == user[n])[0]])
        found = f"user {int(user[n])} again (first in row {first})"
        findings.add(file, "one row per user", found, "join the user's rows", row=int(row[n]), field="user")

    findings.each(torch.sort(again[sound[again]]).values, describe_again)
    user, row, sound = (torch.repeat_interleave(of_row, count) for of_row in (user, row, sound))
    pairs = _Pairs(file, user, flat[is_item], row).keep(sound)
    if items is not None:
        _check_repeats(pairs, items, findings)
    return pairs


def _check_users(file: Path, user: Tensor, row: Tensor, items: _Items, findings: _Findings) -> Tensor:
    """Which users exist."""
    sound = (user >= 0) & (user < items.num_users)

    def describe(n: int) -> None:
        expected = f"a user in 0..{items.num_users - 1}, as the items begin at {items.num_users}"
        repair = "correct the user; if all items are numbered too low, correct warm_set.npy"
        findings.add(file, expected, str(int(user[n])), repair, row=int(row[n]), field="user")

    findings.each(_places(~sound), describe)
    return sound


def _check_group(pairs: _Pairs, items: _Items, group: Group, findings: _Findings) -> Tensor:
    """Whose items exist and belong to the group."""
    exists = (pairs.item >= items.num_users) & (pairs.item < items.end)
    number = items.number[(pairs.item - items.num_users).where(exists, 0)]
    sound = exists if group == "all" else exists & ((number < items.num_warm) == (group == "warm"))

    def describe(n: int) -> None:
        raw, row = int(pairs.item[n]), int(pairs.row[n])
        if bool(exists[n]):
            other = "cold" if group == "warm" else "warm"
            expected, found = f"an item of {group}_set.npy", f"item {raw} of {other}_set.npy"
            repair = f"take the pair out of this file, or move the item to {group}_set.npy"
        else:
            expected, found = f"an item in {items.num_users}..{items.end - 1}", str(raw)
            repair = "delete the pair, or add the item to warm_set.npy or cold_set.npy"
            if 0 <= raw < items.num_users:
                repair = f"add the number of users, {items.num_users}, to the item's number"
        findings.add(pairs.file, expected, found, repair, row=row, field="item")

    findings.each(_places(~sound), describe)
    return sound


def _check_repeats(pairs: _Pairs, items: _Items, findings: _Findings) -> None:
    """Warn of an item that a row names twice."""
    exists = (pairs.item >= items.num_users) & (pairs.item < items.end)
    key, count = torch.unique(pairs.keep(exists).keys(items), return_counts=True)
    twice = key[count > 1]
    if twice.numel():
        found = f"{_many(int((count - 1).sum()), 'repeated item')} (first: {_text_of(int(twice[0]), items)})"
        repair = "nothing to do: an item counts once"
        findings.add(pairs.file, "each item of a row once", found, repair, severity="warning")


def _check_apart(
    pairs: _Pairs, others: Sequence[_Pairs], items: _Items, findings: _Findings, expected: str, repair: str
) -> None:
    """An error for each of the pairs that is in one of the others as well."""
    for other in others:
        shared = torch.isin(pairs.keys(items), other.keys(items))
        name = other.file.name

        def describe(n: int, name: str = name) -> None:
            found = f"user {int(pairs.user[n])} with item {int(pairs.item[n])}, which {name} has too"
            findings.add(pairs.file, expected, found, repair, row=int(pairs.row[n]), field="item")

        findings.each(_places(shared), describe)


def _check_equal(
    found: _Pairs,
    expected: Sequence[_Pairs],
    items: _Items,
    findings: _Findings,
    text: str,
    repair: str,
    *,
    severity: Severity = "error",
) -> None:
    """One fault that counts the pairs by which a file differs from what follows from others."""
    user_exists = (found.user >= 0) & (found.user < items.num_users)
    exists = user_exists & (found.item >= 0) & (found.item < items.end)
    key = torch.unique(found.keep(exists).keys(items))
    wanted = torch.unique(torch.cat([pairs.keys(items) for pairs in expected]))
    strange = found.keep(~exists)
    if not strange.user.numel() and torch.equal(key, wanted):
        return
    more = [_text_of(k, items) for k in key[~torch.isin(key, wanted)].tolist()]
    more += [f"user {u} with item {i}" for u, i in zip(strange.user.tolist(), strange.item.tolist(), strict=True)]
    fewer = [_text_of(k, items) for k in wanted[~torch.isin(wanted, key)].tolist()]
    counts = ((more, "more"), (fewer, "fewer"))
    parts = [f"{_many(len(pairs), 'pair')} {word} (first: {pairs[0]})" for pairs, word in counts if pairs]
    findings.add(found.file, text, " and ".join(parts), repair, severity=severity)


def _text_of(key: int, items: _Items) -> str:
    user, item = divmod(key, items.end)
    return f"user {user} with item {item}"


# Features


def _read_features(folder: Path, items: _Items | None, findings: _Findings) -> tuple[dict[str, Tensor], Words | None]:
    content: dict[str, Tensor] = {}
    words = None
    for modality in MODALITIES:
        file = _feature_file(folder, modality, findings)
        tensor = None if file is None else _load_tensor(file, findings)
        if file is None or tensor is None:
            continue
        if modality == "t" and not tensor.is_floating_point():
            words = _read_words(file, tensor, items, findings)
            continue
        matrix = _matrix(file, tensor, None if items is None else items.num_items, findings)
        if matrix is not None and items is not None:
            content[modality] = matrix if items.in_order else matrix[items.raw - items.num_users]
    return content, words


def _feature_file(folder: Path, modality: str, findings: _Findings) -> Path | None:
    files = [folder / f"feat_{modality}{suffix}" for suffix in _FEATURE_SUFFIXES]
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        found = " and ".join(file.name for file in files)
        findings.add(files[0], f"one file with feat_{modality}", found, "delete one of the two")
        return None
    return files[0] if files else None


def _load_tensor(file: Path, findings: _Findings) -> Tensor | None:
    """The plain tensor of a .npy or .pt file."""
    value: Any = None
    if file.suffix == ".npy":
        value = _load_objects(file, findings)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old protocols; what it reads is checked below
                value = torch.load(file, map_location="cpu", weights_only=True)
        except _TORCH_LOAD_ERRORS as error:
            reason = next((part for part in str(error).split("\n\n") if "weights_only" not in part), "")
            found = f"an unreadable file ({type(error).__name__}: {_one_line(reason)[:200] or 'more than tensors'})"
            repair = "save a plain tensor with torch.save, or the features as .npy"
            findings.add(file, "a tensor saved by torch", found, repair)
            return None
    if value is None:
        return None
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_quantized
        or value.is_meta
        or value.untyped_storage().nbytes() < value.numel() * value.element_size()  # few bytes that pose as many
    ):
        findings.add(file, "a plain dense tensor", _kind(value), "save the matrix itself, dense, one row per item")
        return None
    return value.detach()


def _matrix(file: Path, tensor: Tensor, num_rows: int | None, findings: _Findings) -> Tensor | None:
    """The features as [I, F] float32, all finite; the tensor itself where it is that already."""
    if not tensor.is_floating_point() or tensor.ndim != 2 or 0 in tensor.shape:
        findings.add(file, "floats of shape (items, features)", _shape(tensor), "write one row per item, as float32")
        return None
    if num_rows is not None and tensor.shape[0] != num_rows:
        repair = "write one row for each item, in the order of the ids"
        findings.add(file, f"{_many(num_rows, 'row')}, one per item", f"{tensor.shape[0]:,}", repair)
        return None
    matrix = tensor.to(torch.float32)
    is_finite = torch.cat([block.isfinite().all(1) for block in _blocks(matrix)])

    def describe(row: int) -> None:
        column = int(_places(~matrix[row].isfinite())[0])
        found = f"{tensor[row, column].item():g}"
        repair = "repair the features: nothing is put in the place of a missing value"
        findings.add(file, "a finite number of 32 bits", found, repair, row=row, field=f"column {column}")

    broken = _places(~is_finite)
    findings.each(broken, describe)
    return None if broken.numel() else matrix


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """The rows, some at a time, so that what is made of them stays small."""
    for low in range(0, matrix.shape[0], _BLOCK_ROWS):
        yield matrix[low : low + _BLOCK_ROWS]


def _read_words(file: Path, tensor: Tensor, items: _Items | None, findings: _Findings) -> Words | None:
    """The words of all items, by item."""
    if not _is_integer(tensor) or tensor.ndim != 2 or tensor.shape[0] != 2 or not tensor.shape[1]:
        expected = "floats of shape (items, features), or integers of shape (2, words): item indices above word ids"
        findings.add(file, expected, _shape(tensor), "write the features in one of the two forms")
        return None
    index, word = tensor.to(torch.int64)
    is_word = (word >= 0) & (word < _MAX_WORDS)
    is_item = index >= 0 if items is None else (index >= 0) & (index < items.num_items)

    def describe_item(n: int) -> None:
        expected = "an item index" if items is None else f"an item index in 0..{items.num_items - 1}"
        repair = "count items from 0, without the number of users"
        findings.add(file, expected, str(int(index[n])), repair, row=0, field=f"column {n}")

    def describe_word(n: int) -> None:
        repair = "number the words from 0 on"
        findings.add(file, "a word id from 0 to 2**31 - 1", str(int(word[n])), repair, row=1, field=f"column {n}")

    findings.each(_places(~is_item), describe_item)
    findings.each(_places(~is_word), describe_word)
    if items is None or not bool((is_item & is_word).all()):
        return None
    item, order = torch.sort(items.number[index], stable=True)
    return Words(item, word[order], int(word.max()) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Rules about data that can be read: what a user should know


def _check_quality(path: Path, data: ColdStart, findings: _Findings) -> None:
    """Warnings about users, items and features that will not be learnt from or not be judged."""

    def warn(name: str, expected: str, found: str, repair: str, row: int | None = None) -> None:
        findings.add(path / name if path.is_dir() else path, expected, found, repair, row=row, severity="warning")

    def warn_idle(count: Tensor, ids: Sequence[str], name: str, expected: str, repair: str) -> None:
        idle = _places(count == 0)
        if idle.numel():
            found = f"{idle.numel():,} of {len(ids):,} without (first: {ids[int(idle[0])]})"
            warn(name, expected, found, repair)

    train = "train.npy" if (path / "train.npy").is_file() else _TRAIN_DICT
    key = data.user.long() * data.num_items + data.item
    order = torch.sort(key, stable=True).indices
    again = order[1:][key[order].diff() == 0]
    if again.numel():
        n = int(again.min())
        first = f"user {data.user_ids[int(data.user[n])]} with item {data.item_ids[int(data.item[n])]}"
        found = f"{_many(again.numel(), 'repeated pair')} (first: {first})"
        repair = "delete the copies, unless a pair shall be trained on as often as it stands there"
        warn(train, "each pair once", found, repair, n if train == "train.npy" else None)
    per_user = torch.bincount(data.user, minlength=data.num_users)
    repair = "nothing to do: nothing is learnt of them, and what they are recommended is chance"
    warn_idle(per_user, data.user_ids, train, "a training pair of each user", repair)
    per_item = torch.bincount(data.item, minlength=data.num_warm)
    repair = "put them into cold_set.npy: a warm item is ranked by its embedding, and theirs is never trained"
    warn_idle(per_item, data.item_ids[: data.num_warm], train, "a training pair of each warm item", repair)

    stages = {"val_full.npy": data.valid, "test_full.npy": data.test}
    for name, lists in stages.items():
        if not lists.item.numel():
            warn(name, "held-out pairs", "none", "hold some pairs out: without them nothing is measured")
    cold = torch.cat([group_part(lists, "cold", data.num_warm).item for lists in stages.values()]) - data.num_warm
    per_item = torch.bincount(cold, minlength=data.num_items - data.num_warm)
    repair = "nothing to do: they only compete"
    warn_idle(per_item, data.item_ids[data.num_warm :], "cold_set.npy", "a held-out pair of each cold item", repair)

    if not data.modalities:
        repair = "add one of them: cold items cannot be ranked without, and training stops"
        warn("feat_v.npy", "content of the items (feat_v, feat_a or feat_t)", "none", repair)
    names = {m: file.name for m in MODALITIES if (file := _feature_file(path, m, findings)) is not None}
    for modality, matrix in data.content.items():
        limits = [block.aminmax(dim=1) for block in _blocks(matrix)]
        low, high = torch.cat([limit.min for limit in limits]), torch.cat([limit.max for limit in limits])
        is_zero = (low == 0) & (high == 0)
        same = _places(is_zero if matrix.shape[1] == 1 else low == high)
        if same.numel():
            found = (
                f"{_many(same.numel(), 'row')} of one value throughout, {int(is_zero.sum()):,} of them zero "
                f"(first: item {data.item_ids[int(same[0])]})"
            )
            repair = "check that these items' features were computed"
            warn(names.get(modality, ""), "rows that tell items apart", found, repair)
    if data.words is not None:
        per_item = torch.bincount(data.words.item, minlength=data.num_items)
        repair = "give them words: nothing else tells of cold items"
        warn_idle(per_item, data.item_ids, names.get("t", ""), "words of each item", repair)


# ---------------------------------------------------------------------------------------------------------------------
# Ratings


class _Form(NamedTuple):
    """One kind of ratings: its two files, what separates their fields, and their columns where they name none."""

    events: Path
    items: Path
    separators: tuple[str, str]
    event_columns: tuple[str, ...] | None
    item_columns: tuple[str, ...] | None
    names: tuple[str, str, str]  # of the columns that hold user, item and rating

    @property
    def is_atomic(self) -> bool:
        return self.events.suffix == ".inter"


# Columns of content are "name:kind"; RecBole's kinds are token, token_seq, float and float_seq, bars separates by "|",
# and a flag is 1 where the name itself applies.
_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_ML_EVENT = ("user", "item", "rating", "timestamp")
_ML_ITEM = ("item", "title:token_seq", "genres:bars")
_ML_100K_ITEM = ("item", "title:token_seq", "release:", "video:", "url:", *(f"{genre}:flag" for genre in _GENRES))
_ML_CSV_KINDS = {"movieId": "item", "title": "title:token_seq", "genres": "genres:bars"}
_NO_GENRES = "(no genres listed)"
_PUNCTUATION = ".,:;!?()[]\"'"


def _form_of(folder: Path) -> _Form | None:
    """Which kind of ratings a folder holds; None where it holds none, or files that are split already."""
    if not folder.is_dir() or any((folder / name).is_file() for name in _INTERACTIONS):
        return None
    if (folder / "ratings.dat").is_file():
        return _Form(folder / "ratings.dat", folder / "movies.dat", ("::", "::"), _ML_EVENT, _ML_ITEM, _ML_EVENT[:3])
    if (folder / "u.data").is_file():
        return _Form(folder / "u.data", folder / "u.item", ("\t", "|"), _ML_EVENT, _ML_100K_ITEM, _ML_EVENT[:3])
    if (folder / "ratings.csv").is_file():
        names = ("userId", "movieId", "rating")
        return _Form(folder / "ratings.csv", folder / "movies.csv", (",", ","), None, None, names)
    inter = sorted(folder.glob("*.inter"))
    if len(inter) != 1:
        return None
    names = ("user_id:token", "item_id:token", "rating:float")
    return _Form(inter[0], inter[0].with_suffix(".item"), ("\t", "\t"), None, None, names)


@dataclass(frozen=True)
class _Ratings:
    """Events and the words of their items; ids are numbered by value where all are integers, else by their text."""

    user: Tensor  # [E] int64, index into user_ids
    item: Tensor  # [E] int64, index into item_ids
    rating: Tensor | None  # [E] float64
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    words: Mapping[str, Sequence[str]]  # raw item id -> words, each once
    left_out: tuple[str, ...]  # columns of content that are numbers


def _read_ratings(form: _Form, findings: _Findings) -> _Ratings | None:
    """The ratings and their items' words, or None where errors were found on the way."""
    before = findings.total["error"]
    words, left_out = _read_item_words(form, findings)
    header, rows = _table(form.events, form.separators[0], form.event_columns, findings)
    needed = form.names if not form.is_atomic or form.names[2] in header else form.names[:2]
    columns = _find_columns(form.events, header, needed, findings)
    if columns is None:
        return None
    users, items = dict[str, int](), dict[str, int]()
    user, item, rating, line_of = array("q"), array("q"), array("d"), array("q")
    at_user, at_item, at_rating = columns[0], columns[1], columns[2] if len(columns) > 2 else None
    for line, row in rows:
        value = 0.0 if at_rating is None else _number(row[at_rating])
        if not (row[at_user] and row[at_item] and math.isfinite(value)):
            _describe_event(form, header, columns, line, row, findings)
            continue
        user.append(users.setdefault(row[at_user], len(users)))
        item.append(items.setdefault(row[at_item], len(items)))
        rating.append(value)
        line_of.append(line)
    if not user and findings.total["error"] == before:
        findings.add(form.events, "at least one rating", "none", "download the file again")
    unknown = [] if words is None else [name for name in items if name not in words]

    def describe(n: int) -> None:
        line = line_of[item.index(items[unknown[n]])]
        found = f"no line of item {_quote(unknown[n])}, which line {line} of {form.events.name} rates"
        findings.add(form.items, "a line of each rated item", found, "add it, or delete the item's ratings")

    findings.each(torch.arange(len(unknown)), describe)
    if words is None or findings.total["error"] > before:
        return None
    user_ids, user_code = _sorted_ids(users)
    item_ids, item_code = _sorted_ids(items)
    return _Ratings(
        user=user_code[torch.tensor(user)],
        item=item_code[torch.tensor(item)],
        rating=None if at_rating is None else torch.tensor(rating, dtype=torch.float64),
        user_ids=user_ids,
        item_ids=item_ids,
        words=words,
        left_out=left_out,
    )


def _describe_event(
    form: _Form, header: Sequence[str], columns: Sequence[int], line: int, row: Sequence[str], findings: _Findings
) -> None:
    for column in columns[:2]:
        if not row[column]:
            repair = "fill it in or delete the line"
            findings.add(form.events, "an id", "an empty field", repair, line=line, field=header[column])
            return
    found, repair = _quote(row[columns[2]]), "write a number, or delete the line"
    findings.add(form.events, "a rating as a finite number", found, repair, line=line, field=header[columns[2]])


def _read_item_words(form: _Form, findings: _Findings) -> tuple[dict[str, tuple[str, ...]] | None, tuple[str, ...]]:
    """Raw item id -> its distinct words, and the columns that are left out because they are numbers."""
    header, rows = _table(form.items, form.separators[1], form.item_columns, findings)
    is_csv = form.items.suffix == ".csv"
    needed = tuple(_ML_CSV_KINDS) if is_csv else form.names[1:2]
    columns = _find_columns(form.items, header, needed, findings)
    if columns is None:
        return None, ()
    typed = [_ML_CSV_KINDS.get(name, "") for name in header] if is_csv else header
    kinds = [(n, *name.rpartition(":")[::2]) for n, name in enumerate(typed) if n != columns[0]]
    if form.is_atomic:
        known = ("token", "token_seq", "float", "float_seq")
        for n, name in enumerate(header):
            if name.rpartition(":")[2] not in known:
                repair = f"give the column a kind: name:{', name:'.join(known)}"
                findings.add(form.items, "columns name:kind", _quote(name), repair, line=1, field=f"column {n + 1}")
    if not any(kind in ("token", "token_seq", "bars", "flag") for _, _, kind in kinds):
        repair = "add a column such as title:token_seq: cold items are known by their content alone"
        findings.add(form.items, "a token or token_seq column beside the id", "none", repair, line=1)
    words: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        name = row[columns[0]]
        if not name or name in words:
            found = f"item {_quote(name)} again" if name else "an empty field"
            repair = "join or delete the lines" if name else "fill it in or delete the line"
            findings.add(form.items, "one line per item", found, repair, line=line, field=header[columns[0]])
            continue
        found_words = (word for n, column, kind in kinds for word in _words_of(column, kind, row[n]))
        words[name] = tuple(dict.fromkeys(found_words))
    return words, tuple(name for _, name, kind in kinds if kind.startswith("float"))


def _words_of(column: str, kind: str, text: str) -> list[str]:
    """The words of one field, each told apart from those of other columns."""
    match kind:
        case "token":
            parts = [text]
        case "token_seq":
            parts = [part.strip(_PUNCTUATION) for part in text.lower().split()]
        case "bars":
            parts = [] if text == _NO_GENRES else text.split("|")
        case "flag":
            parts = ["1"] if text == "1" else []
        case _:
            parts = []
    return [f"{column}={part}" for part in parts if part]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _sorted_ids(names: Mapping[str, int]) -> tuple[tuple[str, ...], Tensor]:
    """The ids in order, and for each code of `names` its place there."""
    plain = all(len(name) <= 18 and name.isascii() and name.isdecimal() and name == str(int(name)) for name in names)
    ordered = sorted(names, key=int) if plain else sorted(names)
    place = torch.empty(len(names), dtype=torch.int64)
    place[torch.tensor([names[name] for name in ordered])] = torch.arange(len(names))
    return tuple(ordered), place


def _table(
    file: Path, separator: str, columns: tuple[str, ...] | None, findings: _Findings
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header (the given columns where the file has none), and the sound rows with their lines, as they are read."""
    text = _read_text(file, is_old=columns is not None, findings=findings)
    if text is None:
        return [], iter(())
    lines = io.StringIO(text, newline=None)  # all line ends become one
    rows: Iterator[list[str]]
    if separator == ",":
        rows = csv.reader(lines)
    else:
        rows = (line.rstrip("\n").split(separator) for line in lines)
    header = list(columns) if columns else next(rows, [""])
    return header, _sound_rows(file, rows, len(header), 1 if columns else 2, findings)


def _sound_rows(
    file: Path, rows: Iterator[list[str]], width: int, first_line: int, findings: _Findings
) -> Iterator[tuple[int, list[str]]]:
    line = first_line - 1
    try:
        for line, row in enumerate(rows, first_line):
            if len(row) == width:
                yield line, row
            elif row and row != [""]:  # an empty line, as at the end of many files, is no row
                found = f"{_many(len(row), 'field')} ({_quote(row[0])}, ...)"
                findings.add(file, _many(width, "field"), found, "complete or delete the line", line=line)
    except csv.Error as error:
        findings.add(file, "comma-separated fields", _one_line(str(error)), "close all quotes", line=line + 1)


def _read_text(file: Path, *, is_old: bool, findings: _Findings) -> str | None:
    """The text of a UTF-8 file, of MovieLens' older files also in Latin-1."""
    if not file.is_file():
        repair = "copy it into the folder; it comes with the ratings"
        findings.add(file, "the file", "no such file", repair)
        return None
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not is_old:
            found, line = f"byte 0x{raw[error.start]:02x}", raw.count(b"\n", 0, error.start) + 1
            findings.add(file, "UTF-8", found, "save the file as UTF-8", line=line)
            return None
        text = raw.decode("latin-1")
    if "\0" in text:
        repair = "the file is binary, damaged or UTF-16: restore it, or save it as UTF-8"
        findings.add(file, "text", "a NUL byte", repair, line=text.count("\n", 0, text.index("\0")) + 1)
        return None
    return text


def _find_columns(file: Path, header: Sequence[str], wanted: Sequence[str], findings: _Findings) -> list[int] | None:
    """Where the wanted columns stand, or None where the header is at fault; one that is missing has been reported."""
    if not header:
        return None
    missing = [name for name in wanted if header.count(name) != 1]
    for name in missing:
        repair = "name the columns in the first line, each once"
        findings.add(file, f"one column {name}", _quote(" ".join(header)), repair, line=1, field=name)
    return None if missing else [list(header).index(name) for name in wanted]


# The split


def _split_ratings(ratings: _Ratings, split: _Split, *, fingerprint: str, name: str, say: Say) -> ColdStart:
    """Cold items, and held-out pairs of both groups, drawn as `prepare_source` says."""
    user, item = ratings.user, ratings.item
    if split.min_rating is not None:
        if ratings.rating is None:
            raise DataError(f"{name} has no column rating:float; leave --min-rating out")
        keep = ratings.rating >= split.min_rating
        say(f"{_many(int((~keep).sum()), 'rating')} of {keep.numel():,} below {split.min_rating:g} left out")
        user, item = user[keep], item[keep]
        if not user.numel():
            raise DataError(f"{name} has no rating of at least {split.min_rating:g}; lower --min-rating")
    for column in ratings.left_out:
        say(f"column {column} left out: only words and categories are read as content, not numbers")
    seen_items, item = torch.unique(item, return_inverse=True)
    num_items = seen_items.numel()
    num_cold = round(split.cold_share * num_items)
    if not 0 < num_cold < num_items:
        raise DataError(
            f"--cold-share {split.cold_share:g} of {_many(num_items, 'item')} makes {num_cold} of them cold; "
            "choose a share that leaves both cold and warm ones"
        )
    key = torch.unique(user * num_items + item)
    if key.numel() < user.numel():
        say(f"{_many(user.numel() - key.numel(), 'repeated pair')} of user and item left out")
    user, item = key // num_items, key % num_items

    drawn = torch.randperm(num_items, generator=make_generator(split.seed, stream=COLD_STREAM))
    order = torch.cat([drawn[num_cold:].sort().values, drawn[:num_cold].sort().values])  # item number -> index
    number = torch.empty_like(order)
    number[order] = torch.arange(num_items)
    num_warm = num_items - num_cold
    item = number[item]
    part = _draw_parts(user, item >= num_warm, seed=split.seed)

    trained = torch.unique(user[part == 0])
    if not trained.numel():
        raise DataError(f"{name}: no pair is left to train on; lower --cold-share or --min-rating")
    keep = torch.isin(user, trained)
    dropped = torch.unique(user[~keep]).numel()
    if dropped:
        say(f"{_many(dropped, 'user')} left out: they rated cold items only, so that nothing of theirs is trained on")
    user, item, part = torch.searchsorted(trained, user[keep]), item[keep], part[keep]
    raw_ids = [ratings.item_ids[n] for n in seen_items[order].tolist()]
    words = _encode_words([ratings.words[raw] for raw in raw_ids], say)
    if len(ratings.words) > num_items:
        say(f"{_many(len(ratings.words) - num_items, 'item')} left out: nobody rated them")
    return ColdStart(
        num_warm=num_warm,
        user=user[part == 0].to(torch.int32),
        item=item[part == 0].to(torch.int32),
        known=lists_of(user, item, trained.numel()),
        valid=lists_of(user[part == 1], item[part == 1], trained.numel()),
        test=lists_of(user[part == 2], item[part == 2], trained.numel()),
        content={},
        words=words,
        item_ids=tuple(raw_ids),
        user_ids=tuple(ratings.user_ids[n] for n in trained.tolist()),
        fingerprint=fingerprint,
        name=name,
    )


def _draw_parts(user: Tensor, is_cold: Tensor, *, seed: int) -> Tensor:
    """What each pair is for, [E] int64: 0 trains, 1 validates, 2 tests."""
    cold, warm = _places(is_cold), _places(~is_cold)
    coin = torch.randint(0, 2, cold.shape, generator=make_generator(seed, stream=COIN_STREAM))
    warm = warm[torch.randperm(warm.numel(), generator=make_generator(seed, stream=WARM_STREAM))]
    warm = warm[torch.sort(user[warm], stable=True).indices]  # by user, at random within
    count = torch.bincount(user[warm])
    place = torch.arange(warm.numel()) - (torch.cumsum(count, 0) - count)[user[warm]]
    tenth = (count // 10)[user[warm]]  # at most a fifth is held out, so that something of each user always stays
    part = torch.empty(user.numel(), dtype=torch.int64)
    part[cold] = coin + 1
    part[warm] = torch.where(place < tenth, 1, torch.where(place < 2 * tenth, 2, 0))
    return part


def _encode_words(words: Sequence[Sequence[str]], say: Say) -> Words:
    """The words by item, numbered as they appear; those of one item only are dropped, unless it has no others."""
    items_with = Counter(itertools.chain.from_iterable(words))
    shared = [[word for word in own if items_with[word] > 1] or own for own in words]
    number: dict[str, int] = {}
    word = torch.tensor([number.setdefault(w, len(number)) for own in shared for w in own], dtype=torch.int64)
    item = torch.repeat_interleave(torch.arange(len(words)), torch.tensor(list(map(len, shared))))
    if not number:
        raise DataError("no item has a word in any of its columns; cold items are known by their content alone")
    silent = sum(not own for own in shared)
    if silent:
        say(f"{_many(silent, 'item')} without any word: nothing tells of them if they are cold")
    return Words(item, word, len(number))


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def _write_pack(file: Path, data: ColdStart, sources: Sequence[_Source], split: _Split | None) -> None:
    """Write a pack that records the fingerprint, size and time of its sources, by which a changed one is noticed."""
    tensors = {"user": data.user, "item": data.item}
    for name in ("known", "valid", "test"):
        lists: Lists = getattr(data, name)
        tensors |= {f"{name}_ptr": lists.ptr, f"{name}_item": lists.item}
    tensors |= {f"feat_{modality}": matrix for modality, matrix in data.content.items()}
    if data.words is not None:
        tensors |= {"words_item": data.words.item, "words_word": data.words.word}
    tensors |= {"item_ids": ids_to_bytes(data.item_ids), "user_ids": ids_to_bytes(data.user_ids)}
    meta = {
        "kind": _PACK_KIND,
        "layout": _PACK_LAYOUT,
        "name": data.name,
        "fingerprint": data.fingerprint,
        "num_warm": data.num_warm,
        "num_words": 0 if data.words is None else data.words.num_words,
        "split": None if split is None else split._asdict(),
        "sources": [{**source._asdict(), "file": relative_path(source.file, file.parent)} for source in sources],
    }
    write_pack(file, tensors, meta)


def _load_pack(file: Path, findings: _Findings) -> ColdStart | None:
    """The memory-mapped contents of an undamaged pack whose sources have not changed."""
    again = f"write it again: {_PREPARE} SOURCE {shlex.quote(str(file))}"
    try:
        tensors, meta = read_pack(file, kind=_PACK_KIND, verify=True)
    except DamagedFileError as error:
        findings.add(file, "an undamaged pack", _one_line(_without_path(error, file)), again)
        return None
    except ValueError as error:
        repair = "give the pack that `prepare` wrote, or its source"
        findings.add(file, "a pack of clcrec", _one_line(_without_path(error, file)), repair)
        return None
    if meta.get("layout") != _PACK_LAYOUT:
        found = f"layout {meta.get('layout')!r} of another version"
        findings.add(file, f"a pack of layout {_PACK_LAYOUT}", found, again)
        return None
    fault = _fault_of_tensors(tensors, meta)
    if fault is not None:
        findings.add(file, *fault, again)
        return None
    stale = _fault_of_sources(file, meta)
    if stale is not None:
        findings.add(file, *stale)
        return None
    words = None
    if "words_item" in tensors:
        words = Words(tensors["words_item"], tensors["words_word"], meta["num_words"])
    return ColdStart(
        num_warm=meta["num_warm"],
        user=tensors["user"],
        item=tensors["item"],
        known=Lists(tensors["known_ptr"], tensors["known_item"]),
        valid=Lists(tensors["valid_ptr"], tensors["valid_item"]),
        test=Lists(tensors["test_ptr"], tensors["test_item"]),
        content={m: tensors[f"feat_{m}"] for m in MODALITIES if f"feat_{m}" in tensors},
        words=words,
        item_ids=bytes_to_ids(tensors["item_ids"]),
        user_ids=bytes_to_ids(tensors["user_ids"]),
        fingerprint=meta["fingerprint"],
        name=meta["name"],
    )


def _fault_of_tensors(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is expected and what is found where the tensors do not describe data."""
    row = {"user": torch.int32, "item": torch.int32, "item_ids": torch.uint8, "user_ids": torch.uint8}
    for name in ("known", "valid", "test"):
        row |= {f"{name}_ptr": torch.int64, f"{name}_item": torch.int32}
    if "words_item" in tensors or "words_word" in tensors:
        row |= {"words_item": torch.int64, "words_word": torch.int64}
    for name, dtype in row.items():
        if name not in tensors:
            return f"a tensor {name}", "none"
        if tensors[name].dtype != dtype or tensors[name].ndim != 1:
            return f"{name} as a row of {dtype}", _shape(tensors[name])
    num_users, num_items = (len(bytes_to_ids(tensors[name])) for name in ("user_ids", "item_ids"))
    num_warm = meta.get("num_warm")
    if not isinstance(num_warm, int) or not 0 < num_warm < num_items:
        return f"between 1 and {num_items - 1} warm items", f"{num_warm!r}"
    same_length = {"user": "item", **({"words_item": "words_word"} if "words_item" in tensors else {})}
    for name, other in same_length.items():
        if tensors[name].numel() != tensors[other].numel() or not tensors[name].numel():
            return f"as many {name} as {other}", f"{tensors[name].numel()} and {tensors[other].numel()}"
    limits = {"user": num_users, "item": num_warm, "known_item": num_items, "valid_item": num_items}
    limits |= {"test_item": num_items, "words_item": num_items, "words_word": meta.get("num_words", 0)}
    for name, limit in limits.items():
        value = tensors.get(name)
        if value is not None and value.numel() and not (int(value.min()) >= 0 and int(value.max()) < limit):
            return f"{name} in 0..{limit - 1}", f"{int(value.min())} to {int(value.max())}"
    for name in ("known", "valid", "test"):
        ptr, count = tensors[f"{name}_ptr"], tensors[f"{name}_item"].numel()
        if ptr.numel() != num_users + 1:
            return f"{name}_ptr of {num_users + 1} numbers, one more than users", f"{ptr.numel()}"
        if int(ptr[0]) != 0 or int(ptr[-1]) != count or bool((ptr.diff() < 0).any()):
            return f"{name}_ptr that rises from 0 to {count}", f"{int(ptr[0])} to {int(ptr[-1])}, or a fall between"
    if "words_item" in tensors and bool((tensors["words_item"].diff() < 0).any()):
        return "words_item that never falls", "a fall"
    for name in (f"feat_{modality}" for modality in MODALITIES):
        matrix = tensors.get(name)
        if matrix is not None and (matrix.dtype != torch.float32 or matrix.ndim != 2 or matrix.shape[0] != num_items):
            return f"{name} as float32 ({num_items}, features)", _shape(matrix)
    return None


def _fault_of_sources(file: Path, meta: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Expected, found and repair where the files that a pack was made from are still there and have changed since."""
    recorded = {file.parent / source["file"]: source for source in meta["sources"]}
    present = {path: source for path, source in recorded.items() if path.is_file()}
    if not present:
        return None
    folder = next(iter(present)).parent
    changed = [f"{path.name} has changed" for path, source in present.items() if changed_fingerprint(path, source)]
    if meta["split"] is None:
        known = {path.name for path in recorded}
        changed += [f"{path.name} is new" for path in _files_of(folder) if path.name not in known]
    if not changed:
        return None
    command = f"{_PREPARE} {shlex.quote(str(folder))} {shlex.quote(str(file))}"
    if meta["split"] is not None:
        flags = {f"--{name.replace('_', '-')}": value for name, value in meta["split"].items() if value is not None}
        command += "".join(f" {flag} {value}" for flag, value in flags.items())
    return f"a pack of {folder} as it is now", f"a stale pack: {', '.join(changed)} since", f"write it again: {command}"


def _without_path(error: ValueError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")
