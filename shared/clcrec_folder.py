"""Readers of folders in the layout of CLCRec's original: interactions of warm and cold items, and the items' content.

Legend: U users, I items, W warm items, E pairs, R rows of a file, F features, Z words of all items.

    train.npy                    the training pairs, or the dictionary user_item_train_dict.npy
    val_*.npy, test_*.npy        rows [user, item, item, ...]: full, or both of warm and cold
    warm_set.npy, cold_set.npy   the ids of all items
    feat_v, feat_a, feat_t       features, as .npy or .pt; feat_t may be lists of words

Users are 0..U-1 and items U..U+I-1 (global ids); both sizes follow from the two sets. Python objects in .npy files are
turned into flat tensors first, and every rule is a mask over those. What is wrong goes to a Findings, with the file and
the row; nothing is raised.
"""

import itertools
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from shared.faults import Findings, Severity, many, one_line, places, quote, shape_text
from shared.pickles import UnsafePickleError, load_npy

MODALITIES = ("v", "a", "t")  # visual, acoustic, textual: feat_v, feat_a, feat_t

TRAIN_DICT, _ALL_DICTS = "user_item_train_dict.npy", ("user_item_all_dict.npy", "user_item_dict.npy")
_HELD_OUT = ("val_full.npy", "val_warm.npy", "val_cold.npy", "test_full.npy", "test_warm.npy", "test_cold.npy")
INTERACTIONS = ("train.npy", TRAIN_DICT, *_ALL_DICTS, *_HELD_OUT, "warm_set.npy", "cold_set.npy")
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

_Group = Literal["all", "warm", "cold"]


class Pairs(NamedTuple):
    """Pairs of a user and an item."""

    user: Tensor  # [E] int64
    item: Tensor  # [E] int64, item numbers


class WordLists(NamedTuple):
    """Text features as lists of words instead of numbers (the original's tiktok folder)."""

    item: Tensor  # [Z] int64, rising
    word: Tensor  # [Z] int64, 0..num_words-1
    num_words: int


@dataclass(frozen=True)
class Folder:
    """What a folder holds, with its items numbered 0..I-1, warm ones first."""

    num_users: int
    num_warm: int
    item_id: Tensor  # [I] int64, global id of item i
    train: Pairs  # all warm; in the order of train.npy, or by user and item where they are from the dictionary
    valid: Pairs
    test: Pairs
    content: dict[str, Tensor]  # modality -> [I, F] float32; "t" may be in `words` instead
    words: WordLists | None


def files_of(folder: Path) -> tuple[Path, ...]:
    """The files of this layout that a folder has."""
    return tuple(folder / name for name in (*INTERACTIONS, *_FEATURES) if (folder / name).is_file())


def read_folder(folder: Path, findings: Findings, *, repair_of_none: str = "list the items") -> Folder | None:
    """What the folder holds, or None where errors were found on the way.

    A folder may lack what follows from the rest: the dictionaries, train.npy where user_item_train_dict.npy is there,
    and of full, warm and cold held-out files either the full one or the other two.
    `repair_of_none` is what to do where warm_set.npy or cold_set.npy lists no item.
    """
    items = _read_items(folder, findings, repair_of_none)
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
    return Folder(
        num_users=items.num_users,
        num_warm=items.num_warm,
        item_id=items.raw,
        train=_numbered((train,), items),
        valid=_numbered(valid, items),
        test=_numbered(test, items),
        content=content,
        words=words,
    )


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
class _FilePairs:
    """Pairs of a user and a global item id, and where they stand."""

    file: Path
    user: Tensor  # [E] int64
    item: Tensor  # [E] int64
    row: Tensor  # [E] int64, row of the file or key of the dictionary

    def keep(self, mask: Tensor) -> "_FilePairs":
        return _FilePairs(self.file, self.user[mask], self.item[mask], self.row[mask])

    def keys(self, items: _Items) -> Tensor:
        """One number per pair, the same for equal pairs; all ids must be in range."""
        return self.user * items.end + self.item


def _numbered(parts: Sequence[_FilePairs], items: _Items) -> Pairs:
    """The pairs of several files by item number."""
    raw = torch.cat([pairs.item for pairs in parts])
    return Pairs(torch.cat([pairs.user for pairs in parts]), items.number[raw - items.num_users])


# Python objects and arrays as flat tensors


def _load_objects(file: Path, findings: Findings) -> Any:
    """What a .npy file holds; None where it is missing or unreadable, which is then a fault."""
    if not file.is_file():
        findings.add(file, "the file", "no such file", "copy it into the folder; the original's data has it")
        return None
    try:
        value = load_npy(file)
    except UnsafePickleError as error:
        expected = "arrays, lists, sets and dictionaries of numbers"
        found = one_line(str(error).removeprefix(f"{file}: ")).removesuffix(".")
        findings.add(file, expected, found, "copy the file again, or write it anew")
        return None
    if value is None:
        findings.add(file, "an array", "None", "write it anew")
    return value


def _kind(value: Any) -> str:
    """What a value out of a file is, in a few words."""
    if isinstance(value, Tensor):
        return f"an array of {shape_text(value)}"
    if type(value) is int:
        return str(value) if -_INT64 <= value < _INT64 else "an integer of more than 64 bits"
    if isinstance(value, bool | float):
        return f"{type(value).__name__} {value}"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} {quote(str(value))}"
    if isinstance(value, list | tuple | set | frozenset | dict):
        return f"a {type(value).__name__} of {many(len(value), 'value')}"
    return type(value).__name__


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
    file: Path, rows: Sequence[Any], name_row: Callable[[int], int], findings: Findings
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


def _read_dict(file: Path, findings: Findings) -> _FilePairs | None:
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
        found = f"{_kind(odd[0])} ({many(len(odd), 'such key')})"
        findings.add(file, "users as plain integers", found, "write keys as integers", field="key")
        return None
    length, item, _ = _jagged(file, list(value.values()), lambda n: keys[n], findings)
    user = torch.repeat_interleave(torch.tensor(keys, dtype=torch.int64), length)
    return _FilePairs(file, user, item, user)


# Rules


def _read_items(folder: Path, findings: Findings, repair_of_none: str) -> _Items | None:
    """The items, from warm_set.npy and cold_set.npy."""
    warm_file, cold_file = folder / "warm_set.npy", folder / "cold_set.npy"
    warm, cold = (_read_ids(file, findings, repair_of_none) for file in (warm_file, cold_file))
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
        findings.add(warm_file, expected, f"no {before + 1} ({many(missing, 'id')} missing)", repair)
        return None
    if both.numel():
        return None
    raw = torch.cat([warm, cold])
    number = torch.empty_like(raw)
    number[raw - num_users] = torch.arange(raw.numel())
    return _Items(num_users, warm.numel(), raw, number, in_order=torch.equal(raw, ids))


def _read_ids(file: Path, findings: Findings, repair_of_none: str) -> Tensor | None:
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
        findings.add(file, "at least one item", "no id at all", repair_of_none)
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
        findings.add(file, "each id once", many(count, "repeated id"), repair, severity="warning")
    return ids


def _read_train(folder: Path, items: _Items | None, findings: Findings) -> _FilePairs | None:
    """The training pairs in the order of train.npy; without that file, by user and item from the dictionary."""
    file, dict_file = folder / "train.npy", folder / TRAIN_DICT
    train = _read_array(file, findings) if file.is_file() or not dict_file.is_file() else None
    listed = _read_dict(dict_file, findings) if dict_file.is_file() else None
    if listed is not None and not file.is_file():
        repair = "nothing to do: the pairs are taken from the dictionary, by user and item"
        findings.add(file, "the training pairs", f"only {TRAIN_DICT}", repair, severity="warning")
        order = torch.sort(listed.item, stable=True).indices
        train = listed.keep(order[torch.sort(listed.user[order], stable=True).indices])
    if train is None or items is None:
        return None
    if not train.user.numel():
        findings.add(train.file, "at least one training pair", "none", "copy the file again, or write it anew")
        return None
    if items.num_users > _MAX_USERS_PER_PAIR * train.user.numel():
        found = f"items from {items.num_users} on, and {many(train.user.numel(), 'training pair')}"
        repair = "check that the items' ids follow those of the users, and that the files belong together"
        findings.add(folder / "warm_set.npy", "items numbered from the number of users on", found, repair)
        return None
    sound = _check_users(train.file, train.user, train.row, items, findings)
    sound &= _check_group(train, items, "warm", findings)
    if listed is not None and train.file == file and bool(sound.all()):
        repair = "delete the dictionary if train.npy is right: it is not needed"
        _check_equal(listed, (train.keep(sound),), items, findings, "the pairs of train.npy", repair)
    return train.keep(sound)


def _read_array(file: Path, findings: Findings) -> _FilePairs | None:
    value = _load_objects(file, findings)
    if value is None:
        return None
    if not isinstance(value, Tensor) or not _is_integer(value) or value.ndim != 2 or value.shape[1] != 2:
        repair = "write one row (user, global item id) per pair, as int64"
        findings.add(file, "integers of shape (pairs, 2)", _kind(value), repair)
        return None
    value = value.to(torch.int64)
    return _FilePairs(file, value[:, 0], value[:, 1], torch.arange(value.shape[0]))


def _read_held_out(folder: Path, stage: str, items: _Items | None, findings: Findings) -> tuple[_FilePairs, ...]:
    """The sound pairs of a split, of its full file or else of its warm and its cold one; nothing without items."""
    file = folder / f"{stage}_full.npy"
    parts: dict[_Group, Path] = {"warm": folder / f"{stage}_warm.npy", "cold": folder / f"{stage}_cold.npy"}
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


def _read_rows(file: Path, items: _Items | None, findings: Findings) -> _FilePairs | None:
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

    findings.each(places(sound & (length == 0)), describe)
    row = places(length > 0)
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
        first = int(row[places(user == user[n])[0]])
        found = f"user {int(user[n])} again (first in row {first})"
        findings.add(file, "one row per user", found, "join the user's rows", row=int(row[n]), field="user")

    findings.each(torch.sort(again[sound[again]]).values, describe_again)
    user, row, sound = (torch.repeat_interleave(of_row, count) for of_row in (user, row, sound))
    pairs = _FilePairs(file, user, flat[is_item], row).keep(sound)
    if items is not None:
        _check_repeats(pairs, items, findings)
    return pairs


def _check_users(file: Path, user: Tensor, row: Tensor, items: _Items, findings: Findings) -> Tensor:
    """Which users exist."""
    sound = (user >= 0) & (user < items.num_users)

    def describe(n: int) -> None:
        expected = f"a user in 0..{items.num_users - 1}, as the items begin at {items.num_users}"
        repair = "correct the user; if all items are numbered too low, correct warm_set.npy"
        findings.add(file, expected, str(int(user[n])), repair, row=int(row[n]), field="user")

    findings.each(places(~sound), describe)
    return sound


def _check_group(pairs: _FilePairs, items: _Items, group: _Group, findings: Findings) -> Tensor:
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

    findings.each(places(~sound), describe)
    return sound


def _check_repeats(pairs: _FilePairs, items: _Items, findings: Findings) -> None:
    """Warn of an item that a row names twice."""
    exists = (pairs.item >= items.num_users) & (pairs.item < items.end)
    key, count = torch.unique(pairs.keep(exists).keys(items), return_counts=True)
    twice = key[count > 1]
    if twice.numel():
        found = f"{many(int((count - 1).sum()), 'repeated item')} (first: {_text_of(int(twice[0]), items)})"
        repair = "nothing to do: an item counts once"
        findings.add(pairs.file, "each item of a row once", found, repair, severity="warning")


def _check_apart(
    pairs: _FilePairs, others: Sequence[_FilePairs], items: _Items, findings: Findings, expected: str, repair: str
) -> None:
    """An error for each of the pairs that is in one of the others as well."""
    for other in others:
        shared = torch.isin(pairs.keys(items), other.keys(items))
        name = other.file.name

        def describe(n: int, name: str = name) -> None:
            found = f"user {int(pairs.user[n])} with item {int(pairs.item[n])}, which {name} has too"
            findings.add(pairs.file, expected, found, repair, row=int(pairs.row[n]), field="item")

        findings.each(places(shared), describe)


def _check_equal(
    found: _FilePairs,
    expected: Sequence[_FilePairs],
    items: _Items,
    findings: Findings,
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
    parts = [f"{many(len(pairs), 'pair')} {word} (first: {pairs[0]})" for pairs, word in counts if pairs]
    findings.add(found.file, text, " and ".join(parts), repair, severity=severity)


def _text_of(key: int, items: _Items) -> str:
    user, item = divmod(key, items.end)
    return f"user {user} with item {item}"


# Features


def _read_features(
    folder: Path, items: _Items | None, findings: Findings
) -> tuple[dict[str, Tensor], WordLists | None]:
    content: dict[str, Tensor] = {}
    words = None
    for modality in MODALITIES:
        file = feature_file(folder, modality, findings)
        tensor = None if file is None else load_tensor(file, findings)
        if file is None or tensor is None:
            continue
        if modality == "t" and not tensor.is_floating_point():
            words = _read_words(file, tensor, items, findings)
            continue
        matrix = load_matrix(file, tensor, None if items is None else items.num_items, findings)
        if matrix is not None and items is not None:
            content[modality] = matrix if items.in_order else matrix[items.raw - items.num_users]
    return content, words


def feature_file(folder: Path, modality: str, findings: Findings) -> Path | None:
    files = [folder / f"feat_{modality}{suffix}" for suffix in _FEATURE_SUFFIXES]
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        found = " and ".join(file.name for file in files)
        findings.add(files[0], f"one file with feat_{modality}", found, "delete one of the two")
        return None
    return files[0] if files else None


def load_tensor(file: Path, findings: Findings) -> Tensor | None:
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
            found = f"an unreadable file ({type(error).__name__}: {one_line(reason)[:200] or 'more than tensors'})"
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


def load_matrix(file: Path, tensor: Tensor, num_rows: int | None, findings: Findings) -> Tensor | None:
    """The features as [I, F] float32, all finite; the tensor itself where it is that already."""
    if not tensor.is_floating_point() or tensor.ndim != 2 or 0 in tensor.shape:
        findings.add(
            file, "floats of shape (items, features)", shape_text(tensor), "write one row per item, as float32"
        )
        return None
    if num_rows is not None and tensor.shape[0] != num_rows:
        repair = "write one row for each item, in the order of the ids"
        findings.add(file, f"{many(num_rows, 'row')}, one per item", f"{tensor.shape[0]:,}", repair)
        return None
    matrix = tensor.to(torch.float32)
    is_finite = torch.cat([block.isfinite().all(1) for block in blocks(matrix)])

    def describe(row: int) -> None:
        column = int(places(~matrix[row].isfinite())[0])
        found = f"{tensor[row, column].item():g}"
        repair = "repair the features: nothing is put in the place of a missing value"
        findings.add(file, "a finite number of 32 bits", found, repair, row=row, field=f"column {column}")

    broken = places(~is_finite)
    findings.each(broken, describe)
    return None if broken.numel() else matrix


def blocks(matrix: Tensor) -> Iterator[Tensor]:
    """The rows, some at a time, so that what is made of them stays small."""
    for low in range(0, matrix.shape[0], _BLOCK_ROWS):
        yield matrix[low : low + _BLOCK_ROWS]


def _read_words(file: Path, tensor: Tensor, items: _Items | None, findings: Findings) -> WordLists | None:
    """The words of all items, by item."""
    if not _is_integer(tensor) or tensor.ndim != 2 or tensor.shape[0] != 2 or not tensor.shape[1]:
        expected = "floats of shape (items, features), or integers of shape (2, words): item indices above word ids"
        findings.add(file, expected, shape_text(tensor), "write the features in one of the two forms")
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

    findings.each(places(~is_item), describe_item)
    findings.each(places(~is_word), describe_word)
    if items is None or not bool((is_item & is_word).all()):
        return None
    item, order = torch.sort(items.number[index], stable=True)
    return WordLists(item, word[order], int(word.max()) + 1)
