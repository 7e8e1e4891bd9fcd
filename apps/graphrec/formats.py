"""Readers of every accepted form of interactions, the one validator behind them, and our own packed form.

Legend: U users, I items, E events or pairs, L lines of a block, N tokens that are asked for.

    lightgcn   a folder with train.txt and test.txt, `user item item ...` per line, ids from 0; valid.txt where it is
               there, and user_list.txt and item_list.txt (`org_id remap_id`) where they are
    clcrec     a folder in CLCRec's layout (shared/clcrec_folder.py)
    inter      RecBole's atomic file: tab separated, columns user_id:token item_id:token
               [rating:float] [timestamp:float]
    text       `user item`, `user item rating` or `user item rating time` per line
    pack       a .safetensors file written by `prepare`, mapped into memory

The first two are split already; where they have no validation part it is cut from the training items. Events of the
next two are split here. Text is taken apart some megabytes at a time on whole tensors of bytes, and every rule is a
mask over those. `read_data` raises the first error that `check_source` lists: both walk through the same rules.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.graphrec.dataset import MODALITIES, SPLIT_STREAM, Interactions
from shared import clcrec_folder
from shared.faults import DataError as DataError
from shared.faults import Fault as Fault
from shared.faults import Findings, many, one_line, places, quote, shape_text
from shared.files import bytes_to_ids, ids_to_bytes, write_pack
from shared.packs import (
    Source,
    check_pack_paths,
    fault_of_sources,
    joined_fingerprint,
    open_pack,
    source_records,
    sources_of,
    write_again,
)
from shared.ranking import Lists
from shared.seed import fold
from shared.tokens import Table, integers, tokenise

FORMATS = ("auto", "lightgcn", "clcrec", "inter", "text", "pack")
TEST_SHARE = 0.1  # of the events that are split here

_APP = "graphrec"
_PACK_KIND = "graphrec data"
_PACK_LAYOUT = 1  # changes whenever a pack's tensors change their meaning
_PARTS = ("train.txt", "valid.txt", "test.txt")
_ID_LISTS = ("user_list.txt", "item_list.txt")
_FILE_SUFFIXES = (".inter", ".safetensors", ".txt")
_TEXT_COLUMNS = ("user", "item", "rating", "time")
_INTER_COLUMNS = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float"}
_MAX_ID = 1 << 31
_MAX_IDS_PER_PAIR = 100  # more, and the ids have gaps that would fill the memory
_BLOCK_BYTES = 4 << 20  # of text: what is made of them stays in memory that the allocator keeps
_EXACT_DIGITS = 15  # every integer of so many digits is a float64
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the constants of splitmix64 as signed numbers
_FACTOR_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_FACTOR_2 = 0x94D049BB133111EB - (1 << 64)

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# What callers use


def read_data(
    path: Path,
    *,
    format: str = "auto",  # noqa: A002 - the flag's name
    valid_share: float = 0.1,
    seed: int = 42,
    min_rating: float | None = None,
    split: str = "random",
) -> Interactions:
    """The interactions of a source in any of the forms, with a validation and a test part.

    A part that the source has is kept. Where it has no validation part, `cut_validation` makes one. Events that are not
    split at all are: of each user's items a tenth goes to the test and `valid_share` to validation, both rounded down
    but at least one while one is left to train on; the items are drawn from (seed, user), or (split "time") are the
    last ones for the test and those before for validation. Ratings below `min_rating` do not count; of repeated events
    the first does. Raises DataError with the first error that `check_source` would list.
    """
    findings = Findings(path, limit=1)
    options = _Options(format, valid_share, seed, min_rating, split)
    found = _load(path, options, findings, say=lambda line: None)
    findings.raise_first()
    assert found is not None
    return found.data


def check_source(path: Path, *, format: str = "auto", limit: int = 20) -> list[Fault]:  # noqa: A002
    """Everything that is wrong with a source, errors first: at most `limit` faults, then one that counts the rest.

    What `read_data` raises for is an error, what it can live with a warning.
    """
    findings = Findings(path, limit=limit)
    found = _load(path, _Options(format), findings, say=lambda line: None)
    if found is not None:
        _check_quality(found, findings)
    return findings.listing()


def prepare_source(
    source: Path,
    output: Path,
    *,
    format: str = "auto",  # noqa: A002
    valid_share: float = 0.1,
    seed: int = 42,
    min_rating: float | None = None,
    split: str = "random",
    say: Say = lambda line: None,
) -> Interactions:
    """Write a pack of what `read_data` would read; give what is in it.

    `say` hears, line by line, what was left out and why.
    """
    check_pack_paths(source, output)
    findings = Findings(source, limit=1)
    found = _load(source, _Options(format, valid_share, seed, min_rating, split), findings, say=say)
    findings.raise_first()
    assert found is not None
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_pack(output, found)
    return found.data


def cut_validation(data: Interactions, *, share: float, seed: int) -> Interactions:
    """The data with a share of each user's training items moved to its validation part, which must be empty so far.

    The share is rounded down, but at least one item is moved and at least one stays: users with a single item give
    none. Which ones is a function of the seed, the user's number and the user's own items. A share of 0 cuts none.
    """
    if data.valid.item.numel():
        raise DataError(f"{data.name} has a validation part already; leave the share at 0")
    if not share:
        return data
    user, item = data.user_of_pair, data.train.item
    count = data.train.ptr.diff()
    place = _random_places(user, count, seed=seed)
    is_valid = place >= (count - _num_held_out(count, share))[user]
    return dataclasses.replace(
        data,
        train=_lists(user[~is_valid], item[~is_valid], data.num_users),
        valid=_lists(user[is_valid], item[is_valid], data.num_users),
        fingerprint=joined_fingerprint((), [data.fingerprint, share, seed]),
        split=f"{data.split}; {share:g} of each user's training items cut for validation (seed {seed})",
    )


# ---------------------------------------------------------------------------------------------------------------------
# From a path to data


class _Options(NamedTuple):
    """What the caller chose."""

    format: str
    valid_share: float = 0.1
    seed: int = 42
    min_rating: float | None = None
    split: str = "random"


@dataclass(frozen=True)
class _Loaded:
    """Data, and what a pack or a fault says of where it came from."""

    data: Interactions
    format: str
    sources: tuple[Source, ...]  # none for a pack
    choices: dict[str, Any] | None  # flags of `prepare` that the split depends on; None where it is the source's own
    files: dict[str, Path]  # "train", "valid", "test", "content" -> where faults of that part are told


def _load(path: Path, options: _Options, findings: Findings, *, say: Say) -> _Loaded | None:
    """What the source holds, or None where errors were found on the way."""
    if options.format not in FORMATS:
        raise DataError(f"--format is {options.format!r}; it must be one of {', '.join(FORMATS)}")
    if not 0 <= options.valid_share < 1:
        raise DataError(f"--valid-share is {options.valid_share:g}; it must be at least 0 and below 1, as 0.1")
    if options.split not in ("random", "time"):
        raise DataError(f"--split is {options.split!r}; it must be random or time")
    place = _find(path, options.format, findings)
    if place is None:
        return None
    file, form = place
    if form in ("text", "inter"):
        found = _load_events(file, form, options, findings, say=say)
    else:
        if options.min_rating is not None and form != "pack":
            raise DataError(f"{path} holds no ratings, so that a smallest one means nothing; leave --min-rating out")
        if options.split != "random" and form != "pack":
            raise DataError(f"{path} is split already and holds no times; leave --split out")
        load = {"lightgcn": _load_lists, "clcrec": _load_clcrec, "pack": _load_pack}[form]
        found = load(file, options, findings, say=say)
    if found is not None and not (found.data.test.item.numel() or findings.total["error"]):
        repair = "hold some pairs out: without them nothing is measured"
        findings.add(found.files["test"], "at least one pair to test on", "none", repair)
    return None if findings.total["error"] else found


def _find(path: Path, format: str, findings: Findings) -> tuple[Path, str] | None:  # noqa: A002
    """The file or folder to read, and its form."""
    if not path.exists():
        repair = "check the spelling, or download the data first"
        findings.add(path, "an existing file or folder", "nothing at this path", repair)
        return None
    if path.is_dir():
        return _find_in_folder(path, format, findings)
    if format in ("lightgcn", "clcrec"):
        repair = f"give the folder {path.parent} that it is in, or another format"
        findings.add(path, f"a folder, as the format {format} is", f"the file {path.name}", repair)
        return None
    if format != "auto":
        return path, format
    if path.name in _PARTS and all((path.parent / name).is_file() for name in ("train.txt", "test.txt")):
        repair = f"give the folder: {path.parent}"
        findings.add(path, "the folder of train.txt and test.txt", "one file of it", repair)
        return None
    return path, {".safetensors": "pack", ".inter": "inter"}.get(path.suffix, "text")


def _find_in_folder(folder: Path, format: str, findings: Findings) -> tuple[Path, str] | None:  # noqa: A002
    if format == "lightgcn" or (format == "auto" and (folder / "train.txt").is_file()):
        return folder, "lightgcn"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if format == "clcrec" or (format == "auto" and any(name in clcrec_folder.INTERACTIONS for name in names)):
        return folder, "clcrec"
    suffixes = {"inter": (".inter",), "pack": (".safetensors",), "text": (".txt",)}.get(format, _FILE_SUFFIXES)
    files = [folder / name for name in names if name.endswith(suffixes) and (folder / name).is_file()]
    if len(files) == 1:
        return _find(files[0], format, findings)
    expected = f"exactly one {' or '.join(suffixes)} file"
    if format == "auto":
        expected = f"train.txt and test.txt, CLCRec's files (train.npy, ...), or {expected}"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    found = f"{len(files)} such files ({one_line(shown) or 'the folder is empty'})"
    findings.add(folder, expected, found, "give the folder or the file to read")
    return None


def _name(path: Path) -> str:
    return path.resolve().name or "data"


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of text, numbers and ids


def _blocks(file: Path, findings: Findings) -> Iterator[tuple[int, bytes]]:
    """The number of its first line and some megabytes of whole lines, again and again; only line feeds end lines.

    Empty lines at the end of the file are left out. What is no UTF-8 text is a fault and the end.
    """
    line, rest = 1, b""
    with file.open("rb") as stream:
        if stream.read(3) != b"\xef\xbb\xbf":  # what some editors write first
            stream.seek(0)
        while True:
            block = stream.read(_BLOCK_BYTES)
            if block.endswith(b"\r"):
                block += stream.read(1)
            data = rest + block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            whole = data if not block else data[: max(data.rfind(b"\n"), 0)]
            whole = whole.rstrip(b"\n")
            if whole:
                if not _is_text(file, line, whole, findings):
                    return
                yield line, whole
                line += whole.count(b"\n") + 1
                rest = data[len(whole) + 1 :]
            elif not block:
                break
            else:
                rest = data
    if line == 1:
        found = "only line ends" if rest else "no bytes at all"
        findings.add(file, "at least one line", found, "write or download the file again")


def _is_text(file: Path, line: int, data: bytes, findings: Findings) -> bool:
    position = data.find(b"\0")
    if position >= 0:
        repair = "the file is binary, damaged or UTF-16: restore it, or save it as UTF-8"
        findings.add(file, "text", "a NUL byte", repair, line=line + data.count(b"\n", 0, position))
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        found, repair = f"byte 0x{data[error.start]:02x}", "save the file as UTF-8"
        findings.add(file, "UTF-8", found, repair, line=line + data.count(b"\n", 0, error.start))
        return False
    return True


def _numbers(table: Table, tokens: Tensor) -> Tensor:
    """The tokens as Python's float reads them, [N] float64; NaN for those that are no number."""
    start, width = table.start[tokens], table.end[tokens] - table.start[tokens]
    is_negative = table.byte[start] == ord("-")
    start, width = start + is_negative, width - is_negative.long()
    digits, scale = torch.zeros_like(start), torch.ones_like(start)
    dots = torch.zeros_like(start)
    is_plain = (width >= 1) & (width <= _EXACT_DIGITS + 1)
    longest = int(width.clamp(max=_EXACT_DIGITS + 1).max()) if width.numel() else 0
    for k in range(longest):
        inside = width > k
        byte = table.byte[(start + k).clamp(max=table.byte.numel() - 1)].long()
        is_dot = inside & (byte == ord("."))
        is_digit = inside & (byte >= ord("0")) & (byte <= ord("9"))
        is_plain &= ~inside | is_digit | is_dot
        digits = torch.where(is_digit, digits * 10 + byte - ord("0"), digits)
        scale = torch.where(is_digit & (dots > 0), scale * 10, scale)
        dots += is_dot
    is_plain &= (dots <= 1) & (width > dots) & (width - dots <= _EXACT_DIGITS)
    # both are exact, so that their quotient is rounded once, as float() rounds
    value = digits.double() / scale.double()
    value = torch.where(is_negative, -value, value)
    odd = places(~is_plain)
    if odd.numel():
        value[odd] = torch.tensor([_number(text) for text in table.texts(tokens[odd])], dtype=torch.float64)
    return value


def _number(text: str) -> float:
    try:
        return math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan


class _Ids:
    """Raw ids of a column, block after block, changed in place."""

    def __init__(self) -> None:
        self._parts: list[Tensor | list[str]] = []

    def add(self, table: Table, tokens: Tensor) -> None:
        value, is_plain = integers(table, tokens)
        self._parts.append(value if bool(is_plain.all()) else table.texts(tokens))

    def numbered(self) -> tuple[Tensor, tuple[str, ...]]:
        """The place of every event's id among the distinct ones ([E] int64), and those, in order.

        Ids are in order of value where all are integers, else of their text.
        """
        if all(isinstance(part, Tensor) for part in self._parts):
            value = torch.cat([part for part in self._parts if isinstance(part, Tensor)])
            distinct, code = torch.unique(value, return_inverse=True)
            return code, tuple(map(str, distinct.tolist()))
        number: dict[str, int] = {}
        codes = []
        for part in self._parts:
            if isinstance(part, Tensor):
                distinct, code = torch.unique(part, return_inverse=True)
                names = [number.setdefault(str(value), len(number)) for value in distinct.tolist()]
                codes.append(torch.tensor(names)[code])
            else:
                codes.append(torch.tensor([number.setdefault(text, len(number)) for text in part]))
        ordered = sorted(number)
        place = torch.empty(len(number), dtype=torch.int64)
        place[torch.tensor([number[name] for name in ordered])] = torch.arange(len(number))
        return place[torch.cat(codes)], tuple(ordered)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs to lists, and who is held out


def _lists(user: Tensor, item: Tensor, num_users: int) -> Lists:
    """The lists of pairs that are in rising order of user and item, each once."""
    ptr = torch.zeros(num_users + 1, dtype=torch.int64)
    ptr[1:] = torch.cumsum(torch.bincount(user, minlength=num_users), 0)
    return Lists(ptr, item.to(torch.int32))


def _lists_of_keys(key: Tensor, num_users: int, num_items: int) -> Lists:
    """The lists of pairs given as rising, distinct user * I + item."""
    return _lists(key // num_items, key % num_items, num_users)


def _distinct(key: Tensor) -> Tensor:
    """The different keys, rising."""
    ordered = torch.sort(key).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered.diff() != 0
    return ordered[first]


def _is_in(key: Tensor, ordered: Tensor) -> Tensor:
    """Which keys are among the ordered ones, [E] bool."""
    if not ordered.numel():
        return torch.zeros_like(key, dtype=torch.bool)
    return ordered[torch.searchsorted(ordered, key).clamp(max=ordered.numel() - 1)] == key


def _num_held_out(count: Tensor, share: float, taken: Tensor | int = 0) -> Tensor:
    """How many of each user's items ([U] int64) the share is: rounded down, but at least one while another is left."""
    if not share:
        return torch.zeros_like(count)
    wanted = (share * count.double() + 1e-9).floor().long().clamp(min=1)  # 0.29 * 100 is a little below 29
    return torch.minimum(wanted, count - taken - 1).clamp(min=0)


def _random_places(user: Tensor, count: Tensor, *, seed: int) -> Tensor:
    """A random order of each user's pairs, [E] int64 places from 0 on, drawn from (seed, user) alone.

    `user` ([E] int64) rises, `count` ([U] int64) is how often each is in it.
    """
    nth = torch.arange(user.numel()) - (torch.cumsum(count, 0) - count)[user]
    draw = _mixed(nth * _GOLDEN + _mixed(user * _GOLDEN + fold(seed, SPLIT_STREAM)))
    return _places_by(draw, user, count)


def _places_by(value: Tensor, user: Tensor, count: Tensor) -> Tensor:
    """The place of each pair among those of its user by the value, from 0 on; ties in their order."""
    order = torch.sort(value, stable=True).indices
    order = order[torch.sort(user[order], stable=True).indices]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    return place - (torch.cumsum(count, 0) - count)[user]


def _mixed(number: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 that wrap around, in place; masks take away the sign that >> brings in."""
    number ^= (number >> 30) & ((1 << 34) - 1)
    number *= _FACTOR_1
    number ^= (number >> 27) & ((1 << 37) - 1)
    number *= _FACTOR_2
    number ^= (number >> 31) & ((1 << 33) - 1)
    return number


# ---------------------------------------------------------------------------------------------------------------------
# LightGCN's folder


@dataclass(frozen=True)
class _Part:
    """The pairs of one file of lists, and where they stand."""

    file: Path
    user: Tensor  # [E] int32
    item: Tensor  # [E] int32
    line: Tensor  # [E] int32, counted from 1
    line_user: Tensor  # [L] int32, user of every sound line, also of those without items
    line_number: Tensor  # [L] int32

    def key(self, num_items: int) -> Tensor:
        """One number per pair, [E] int64."""
        return self.user.long() * num_items + self.item


def _load_lists(folder: Path, options: _Options, findings: Findings, *, say: Say) -> _Loaded | None:
    files = {name: folder / f"{name}.txt" for name in ("train", "valid", "test")}
    absent = [files[name] for name in ("train", "test") if not files[name].is_file()]
    for file in absent:
        repair = "copy it into the folder, or give events that are not split as one file of `user item` lines"
        findings.add(file, "the file", "no such file", repair)
    if absent:
        return None
    has_valid = files["valid"].is_file()
    sources = sources_of(_list_files(folder))
    parts = {name: _read_part(file, findings) for name, file in files.items() if file.is_file()}
    num_users, user_ids = _read_names(folder, "user", list(parts.values()), findings)
    num_items, item_ids = _read_names(folder, "item", list(parts.values()), findings)
    if not (parts["train"].user.numel() or findings.total["error"]):
        findings.add(files["train"], "at least one training pair", "none", "write or download the file again")
    if not num_users or not num_items:
        return None
    keys: dict[str, Tensor] = {}
    for name, part in parts.items():
        _check_lines(part, findings)
        keys[name] = _distinct(part.key(num_items))
        _check_repeats(part, keys[name].numel(), num_items, findings)
        for other in list(keys)[:-1]:
            _check_apart(part, keys[other], files[other].name, num_items, findings)
    if findings.total["error"]:
        return None
    valid = keys.get("valid", torch.empty(0, dtype=torch.int64))
    data = Interactions(
        train=_lists_of_keys(keys["train"], num_users, num_items),
        valid=_lists_of_keys(valid, num_users, num_items),
        test=_lists_of_keys(keys["test"], num_users, num_items),
        content={},
        is_cold=None,
        item_ids=item_ids,
        user_ids=user_ids,
        fingerprint=joined_fingerprint(sources, None),
        name=_name(folder),
        split=f"the source's {'train.txt, valid.txt' if has_valid else 'train.txt'} and test.txt",
    )
    choices = None
    if has_valid:
        say(f"{folder} is split already; its split is kept, --valid-share and --seed change nothing")
    elif options.valid_share:
        choices = {"valid_share": options.valid_share, "seed": options.seed}
        data = cut_validation(data, share=options.valid_share, seed=options.seed)
        say(f"{many(data.valid.item.numel(), 'pair')} of train.txt cut for validation: the folder has no valid.txt")
    return _Loaded(data, "lightgcn", sources, choices, files)


def _list_files(folder: Path) -> tuple[Path, ...]:
    """The files of LightGCN's layout that a folder has."""
    return tuple(folder / name for name in (*_PARTS, *_ID_LISTS) if (folder / name).is_file())


def _read_part(file: Path, findings: Findings) -> _Part:
    """The sound pairs of lines `user item item ...`; what is wrong with the others goes to the findings."""
    columns: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int32)] for _ in range(5)]
    for first_line, data in _blocks(file, findings):
        for column, part in zip(columns, _read_lines(file, first_line, data, findings), strict=True):
            column.append(part.to(torch.int32))
    return _Part(file, *(torch.cat(column) for column in columns))


def _read_lines(file: Path, first_line: int, data: bytes, findings: Findings) -> tuple[Tensor, ...]:
    """The five columns of a _Part of some lines."""
    table = tokenise(data, tabs=False)
    begin, count = table.ptr[:-1], table.ptr.diff()
    row = torch.repeat_interleave(torch.arange(count.numel()), count)
    value, is_sound = integers(table, torch.arange(row.numel()))
    is_sound &= (value >= 0) & (value < _MAX_ID)
    user_token = begin[row]
    is_item = user_token != torch.arange(row.numel())

    def describe_empty(n: int) -> None:
        findings.add(file, "user item item ...", "an empty line", "delete the line", line=first_line + n)

    def describe_id(n: int) -> None:
        text, field = table.text(n), "item" if bool(is_item[n]) else "user"
        expected, line = "ids as integers from 0 up", first_line + int(row[n])
        findings.add(file, expected, quote(text), _repair_of_id(text), line=line, field=field)

    findings.each(places(count == 0), describe_empty)
    findings.each(places(~is_sound), describe_id)
    keep = is_item & is_sound & is_sound[user_token]
    line = places(count > 0)
    line = line[is_sound[begin[line]]]
    return value[user_token[keep]], value[keep], row[keep] + first_line, value[begin[line]], line + first_line


def _repair_of_id(text: str) -> str:
    if any(separator in text for separator in ",;|:"):
        return "separate ids by blanks"
    if text.removeprefix("-").isdecimal():
        return "number users and items from 0 on, below 2**31, without leading zeros"
    return "number users and items from 0 on; lines `user item` in one file may have ids of any kind"


def _read_names(folder: Path, kind: str, parts: Sequence[_Part], findings: Findings) -> tuple[int, tuple[str, ...]]:
    """How many users or items there are, and their raw ids: of user_list.txt or item_list.txt, else their numbers."""
    file = folder / f"{kind}_list.txt"
    named = [part.line_user if kind == "user" else part.item for part in parts]
    highest = max((int(numbers.max()) for numbers in named if numbers.numel()), default=-1)
    if file.is_file():
        names = _read_id_list(file, findings)
        if names is None:
            return 0, ()
        for part, numbers in zip(parts, named, strict=True):
            _check_named(part, numbers, kind, len(names), file, findings)
        return (len(names), names) if highest < len(names) else (0, ())
    num_pairs = sum(part.item.numel() for part in parts)
    if highest >= _MAX_IDS_PER_PAIR * max(num_pairs, 1):
        repair = "number them without gaps; lines `user item` in one file may have ids of any kind"
        found = f"{kind} {highest} among {many(num_pairs, 'pair')}"
        findings.add(parts[0].file, f"{kind}s numbered from 0 on", found, repair, field=kind)
        return 0, ()
    return highest + 1, tuple(map(str, range(highest + 1)))


def _check_named(part: _Part, numbers: Tensor, kind: str, num_names: int, file: Path, findings: Findings) -> None:
    """An error for each of the part's numbers that the file of names does not have."""
    lines = part.line_number if kind == "user" else part.line

    def describe(n: int) -> None:
        expected = f"a remap_id of {file.name}, which has 0..{num_names - 1}"
        repair = f"add its line to {file.name}, or delete that file"
        findings.add(part.file, expected, str(int(numbers[n])), repair, line=int(lines[n]), field=kind)

    findings.each(places(numbers >= num_names), describe)


def _read_id_list(file: Path, findings: Findings) -> tuple[str, ...] | None:
    """The raw ids by number, from a file with the columns org_id and remap_id."""
    before = findings.total["error"]
    names: dict[int, str] = {}
    number_of: dict[str, int] = {}
    header: list[str] = []
    for first_line, data in _blocks(file, findings):
        for line, row in enumerate(data.decode().split("\n"), first_line):
            fields = row.split()
            if line == 1:
                header = fields
                missing = [name for name in ("org_id", "remap_id") if header.count(name) != 1]
                for name in missing:
                    repair = "write the header `org_id remap_id`, or delete the file: it is not needed"
                    findings.add(file, f"one column {name}", quote(row), repair, line=1, field=name)
                if missing:
                    return None
                continue
            if len(fields) != len(header):
                found = f"{many(len(fields), 'field')} ({quote(row)})"
                findings.add(file, many(len(header), "field"), found, "complete or delete the line", line=line)
                continue
            name, text = fields[header.index("org_id")], fields[header.index("remap_id")]
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                findings.add(file, "an integer from 0 up", quote(text), "correct it", line=line, field="remap_id")
            elif int(text) in names or name in number_of:
                field, again = ("remap_id", text) if int(text) in names else ("org_id", name)
                found = f"{quote(again)} again"
                findings.add(file, "each id once", found, "delete one of the two lines", line=line, field=field)
            else:
                names[int(text)] = name
                number_of[name] = int(text)
    if findings.total["error"] > before:
        return None
    absent = next((n for n in range(len(names)) if n not in names), None)
    if absent is not None or not names:
        found = f"no {absent}" if names else "only the header"
        repair = "add the missing lines, or delete the file: it is not needed"
        findings.add(file, "every remap_id from 0 on", found, repair, field="remap_id")
        return None
    return tuple(names[n] for n in range(len(names)))


def _check_lines(part: _Part, findings: Findings) -> None:
    """Warn of users on several lines."""
    order = torch.sort(part.line_user, stable=True).indices
    again = order[1:][part.line_user[order].diff() == 0]
    if again.numel():
        n = int(again.min())
        user = int(part.line_user[n])
        first = int(part.line_number[places(part.line_user == user)[0]])
        found = f"{many(again.numel(), 'further line')} (first: user {user} again, as on line {first})"
        repair = "nothing to do: a user's lines are joined"
        line = int(part.line_number[n])
        findings.add(part.file, "one line per user", found, repair, line=line, field="user", severity="warning")


def _check_repeats(part: _Part, num_distinct: int, num_items: int, findings: Findings) -> None:
    """Warn of items that a user has twice."""
    repeated = part.user.numel() - num_distinct
    if repeated:
        n = _first_repeat(part.key(num_items))
        found = f"{many(repeated, 'repeated item')} (first: user {int(part.user[n])} with item {int(part.item[n])})"
        repair, line = "nothing to do: an item counts once", int(part.line[n])
        findings.add(part.file, "each item of a user once", found, repair, line=line, field="item", severity="warning")


def _first_repeat(key: Tensor) -> int:
    """The first place whose key was there before."""
    order = torch.sort(key, stable=True).indices
    return int(order[1:][key[order].diff() == 0].min())


def _check_apart(part: _Part, others: Tensor, name: str, num_items: int, findings: Findings) -> None:
    """An error for each of the pairs that is in an earlier part as well."""

    def describe(n: int) -> None:
        found = f"user {int(part.user[n])} with item {int(part.item[n])}, which {name} has too"
        repair = "delete it from one of the two files"
        line = int(part.line[n])
        findings.add(part.file, f"a pair that {name} does not have", found, repair, line=line, field="item")

    findings.each(places(_is_in(part.key(num_items), others)), describe)


# ---------------------------------------------------------------------------------------------------------------------
# CLCRec's folder


def _load_clcrec(folder: Path, options: _Options, findings: Findings, *, say: Say) -> _Loaded | None:
    sources = sources_of(clcrec_folder.files_of(folder))
    found = clcrec_folder.read_folder(folder, findings)
    if found is None:
        return None
    num_items = found.item_id.numel()
    parts = [_distinct(user * num_items + item) for user, item in (found.train, found.valid, found.test)]
    train, valid, test = (_lists_of_keys(key, found.num_users, num_items) for key in parts)
    data = Interactions(
        train=train,
        valid=valid,
        test=test,
        content=found.content,
        is_cold=torch.arange(num_items) >= found.num_warm,
        item_ids=tuple(map(str, found.item_id.tolist())),
        user_ids=tuple(map(str, range(found.num_users))),
        fingerprint=joined_fingerprint(sources, None),
        name=_name(folder),
        split="the folder's train, val and test files",
    )
    if found.words is not None:
        # the graph needs no content, and the encoder of content takes numbers: so leave them out, but never in silence
        file = clcrec_folder.feature_file(folder, "t", findings) or folder / "feat_t.npy"
        repair = "nothing to do: they are left out; give a matrix of text features to use them"
        lists = f"lists of {many(found.words.num_words, 'word')}"
        findings.add(file, "features that are numbers", lists, repair, severity="warning")
        say(f"{file.name} left out: it holds lists of words, and only numbers are read as content here")
    say(f"{folder} is split already; its split is kept, --valid-share and --seed change nothing")
    files = {
        "train": folder / ("train.npy" if (folder / "train.npy").is_file() else clcrec_folder.TRAIN_DICT),
        "valid": folder / "val_full.npy",
        "test": folder / "test_full.npy",
        "content": folder / "feat_v.npy",
    }
    return _Loaded(data, "clcrec", sources, None, files)


# ---------------------------------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True)
class _Events:
    """Events in the order of the file."""

    user: Tensor  # [E] int64, index into user_ids
    item: Tensor  # [E] int64, index into item_ids
    rating: Tensor | None  # [E] float64
    time: Tensor | None  # [E] float64
    line: Tensor  # [E] int64, counted from 1
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]


def _load_events(file: Path, form: str, options: _Options, findings: Findings, *, say: Say) -> _Loaded | None:
    sources = sources_of([file])
    events = (_read_inter if form == "inter" else _read_text)(file, findings)
    if events is None:
        return None
    _check_events(file, events, findings)
    if findings.total["error"]:
        return None
    choices = {name: getattr(options, name) for name in ("valid_share", "seed", "min_rating", "split")}
    data = _split_events(events, options, fingerprint=joined_fingerprint(sources, choices), name=_name(file), say=say)
    if not data.test.item.numel():
        repair = "add events, or lower --min-rating: of a single one there is nothing to hold out"
        findings.add(file, "users with at least two items", "none", repair)
    files = dict.fromkeys(("train", "valid", "test", "content"), file)
    return _Loaded(data, form, sources, choices, files)


def _read_text(file: Path, findings: Findings) -> _Events | None:
    """The events of lines `user item [rating [time]]`, as many fields as most of the first lines have."""
    columns = _Columns(file, findings)
    names: Sequence[str] = ()
    for first_line, data in _blocks(file, findings):
        table = tokenise(data, tabs=False)
        count = table.ptr.diff()
        names = names or _TEXT_COLUMNS[: 2 + int(torch.bincount(count.clamp(max=5), minlength=6)[2:5].argmax())]
        rows = _whole_rows(file, table, first_line, names, findings, tabs=False)
        if first_line == 1 and _has_header(table, rows):
            text = quote(table.row_text(int(rows[0])))
            findings.add(file, "an event", f"a header line ({text})", "delete the line", line=1 + int(rows[0]))
            rows = rows[1:]
        columns.add(table, rows + first_line, {name: table.ptr[rows] + n for n, name in enumerate(names)})
    return columns.events()


def _whole_rows(
    file: Path, table: Table, first_line: int, names: Sequence[str], findings: Findings, *, tabs: bool
) -> Tensor:
    """The rows with as many fields as there are names, an error for each other one."""
    count = table.ptr.diff()

    def describe(row: int) -> None:
        text = table.row_text(row)
        found = f"{many(int(count[row]), 'field')} ({quote(text)})" if text else "an empty line"
        repair = _repair_of_fields(text, int(count[row]), len(names), tabs=tabs)
        expected = f"{len(names)} {'tab-separated ' if tabs else ''}fields ({' '.join(names)})"
        findings.add(file, expected, found, repair, line=first_line + row)

    findings.each(places(count != len(names)), describe)
    return places(count == len(names))


def _repair_of_fields(text: str, count: int, width: int, *, tabs: bool) -> str:
    if not text:
        return "delete the line"
    if tabs:
        return "separate the line's fields by single tabs, or delete it"
    for separator in ("::", ",", ";", "|"):
        if separator in text and count < width:
            return f"replace each {separator!r} by a blank"
    if count < width:
        return "complete or delete the line"
    return "keep one event per line; one line per user is read from a folder with train.txt and test.txt"


def _has_header(table: Table, rows: Tensor) -> bool:
    """Whether the first of the rows is words above nothing but integers: a header, which would become an event."""
    begin = table.ptr[:-1][rows]
    if rows.numel() < 3 or bool(integers(table, begin[:1])[1]):
        return False
    is_word = [~integers(table, begin + column)[1] for column in range(2)]
    return all(bool(word[0]) and int(word.sum()) == 1 for word in is_word)


def _read_inter(file: Path, findings: Findings) -> _Events | None:
    """The events of a RecBole file."""
    columns = _Columns(file, findings)
    header: list[str] = []
    wanted: dict[str, int] | None = None
    for first_line, data in _blocks(file, findings):
        table = tokenise(data, tabs=True)
        if wanted is None:
            header = [table.text(token) for token in range(int(table.ptr[1]))]
            wanted = _inter_columns(file, header, findings)
            if wanted is None:
                return None
        rows = _whole_rows(file, table, first_line, header, findings, tabs=True)
        rows = rows[1:] if first_line == 1 else rows
        columns.add(table, rows + first_line, {name: table.ptr[rows] + column for name, column in wanted.items()})
    return columns.events()


def _inter_columns(file: Path, header: list[str], findings: Findings) -> dict[str, int] | None:
    """Where the columns that are read stand, by our names; None where the header is at fault."""
    names = [field.partition(":")[0] for field in header]
    wrong = False
    for name, kind in _INTER_COLUMNS.items():
        if name not in names and kind == "float":
            continue
        if names.count(name) != 1:
            repair = f"name one column {name}:{kind}; fields are separated by tabs"
            findings.add(file, f"one column {name}:{kind}", quote(" ".join(header)), repair, line=1, field=name)
            wrong = True
        elif header[names.index(name)] != f"{name}:{kind}":
            found = quote(header[names.index(name)])
            findings.add(file, f"{name}:{kind}", found, f"give the column the type {kind}", line=1, field=name)
            wrong = True
    if wrong:
        return None
    ours = dict(zip(_INTER_COLUMNS, _TEXT_COLUMNS, strict=True))
    return {ours[name]: names.index(name) for name in _INTER_COLUMNS if name in names}


class _Columns:
    """The columns of events, block after block, changed in place; what is wrong with a line goes to the findings."""

    def __init__(self, file: Path, findings: Findings) -> None:
        self._file, self._findings = file, findings
        self._ids = {"user": _Ids(), "item": _Ids()}
        self._numbers: dict[str, list[Tensor]] = {"rating": [], "time": []}
        self._line: list[Tensor] = []

    def add(self, table: Table, line: Tensor, tokens: Mapping[str, Tensor]) -> None:
        """Take in lines whose fields are these tokens, column by column; a line with a fault is left out."""
        is_sound = torch.ones_like(line, dtype=torch.bool)
        numbers: dict[str, Tensor] = {}
        for name, column in tokens.items():
            if name in self._numbers:
                numbers[name] = _numbers(table, column)
                is_good = numbers[name].isfinite()
                texts = (f"a {name} as a finite number", "write a number, or delete the line")
            else:
                is_good = table.end[column] > table.start[column]
                texts = ("an id", "fill it in or delete the line")
            self._check(table, line, name, column, is_good, texts)
            is_sound &= is_good
        for name, ids in self._ids.items():
            ids.add(table, tokens[name][is_sound])
        for name, value in numbers.items():
            self._numbers[name].append(value[is_sound])
        self._line.append(line[is_sound])

    def _check(
        self, table: Table, line: Tensor, name: str, column: Tensor, is_good: Tensor, texts: tuple[str, str]
    ) -> None:
        """An error for each field that is not good; `texts` say what is expected and what to do."""

        def describe(n: int) -> None:
            text = table.text(int(column[n]))
            found = quote(text) if text else "an empty field"
            self._findings.add(self._file, texts[0], found, texts[1], line=int(line[n]), field=name)

        self._findings.each(places(~is_good), describe)

    def events(self) -> _Events | None:
        """All that was taken in; None, and an error, where that is nothing."""
        if not sum(line.numel() for line in self._line):
            if not self._findings.total["error"]:
                self._findings.add(self._file, "at least one event", "none", "write or download the file again")
            return None
        (user, user_ids), (item, item_ids) = (self._ids[name].numbered() for name in ("user", "item"))
        rating, time = (torch.cat(parts) if parts else None for parts in self._numbers.values())
        return _Events(user, item, rating, time, torch.cat(self._line), user_ids, item_ids)


def _check_events(file: Path, events: _Events, findings: Findings) -> None:
    """What only all events together show."""
    num_items = len(events.item_ids)
    if num_items == 1 and not findings.total["error"]:  # else the others may be on lines with faults
        found = f"the one item {quote(events.item_ids[0])} in all events"
        repair = "check that the second column holds items, not ratings or flags"
        findings.add(file, "at least two items to rank", found, repair)
    key = events.user * num_items + events.item
    repeated = key.numel() - _distinct(key).numel()
    if repeated:
        n = _first_repeat(key)
        user, item = events.user_ids[int(events.user[n])], events.item_ids[int(events.item[n])]
        found = f"{many(repeated, 'repeated event')} (first: user {quote(user)} with item {quote(item)})"
        repair = "nothing to do: of repeated events the first counts"
        findings.add(file, "each pair once", found, repair, line=int(events.line[n]), severity="warning")


def _split_events(events: _Events, options: _Options, *, fingerprint: str, name: str, say: Say) -> Interactions:
    """The three parts as `read_data` says."""
    order = torch.arange(events.user.numel())
    if options.min_rating is not None:
        if events.rating is None:
            raise DataError(f"{name} has no ratings; leave --min-rating out, or add a column of them")
        keep = events.rating >= options.min_rating
        say(f"{many(int((~keep).sum()), 'rating')} of {keep.numel():,} below {options.min_rating:g} left out")
        order = places(keep)
        if not order.numel():
            raise DataError(f"{name} has no rating of at least {options.min_rating:g}; lower --min-rating")
    if options.split == "time":
        if events.time is None:
            raise DataError(f"{name} has no times to split by; leave --split out, or add a column of them")
        order = order[torch.sort(events.time[order], stable=True).indices]
    # pairs by user and item, of equal ones the first
    num_all = order.numel()
    key = events.user[order] * len(events.item_ids) + events.item[order]
    key, by_key = torch.sort(key, stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key.diff() != 0
    key, order = key[first], order[by_key[first]]
    if key.numel() < num_all:
        say(f"{many(num_all - key.numel(), 'repeated event')} left out")
    kept_users, user = torch.unique(key // len(events.item_ids), return_inverse=True)
    kept_items, item = torch.unique(key % len(events.item_ids), return_inverse=True)
    for kept, ids, noun in ((kept_users, events.user_ids, "user"), (kept_items, events.item_ids, "item")):
        if kept.numel() < len(ids):
            say(f"{many(len(ids) - kept.numel(), noun)} left out: nothing of theirs is left")

    count = torch.bincount(user)
    if options.split == "time":
        place = _places_by(by_key[first], user, count)  # where a pair stands among all by time, ties as in the file
    else:
        place = _random_places(user, count, seed=options.seed)
    num_test = _num_held_out(count, TEST_SHARE)
    num_valid = _num_held_out(count, options.valid_share, num_test)
    is_test = place >= (count - num_test)[user]
    is_valid = ~is_test & (place >= (count - num_test - num_valid)[user])
    num_users = kept_users.numel()
    train, valid, test = (
        _lists(user[part], item[part], num_users) for part in (~is_test & ~is_valid, is_valid, is_test)
    )
    by = "by time" if options.split == "time" else f"at random (seed {options.seed})"
    limit = "" if options.min_rating is None else f", ratings from {options.min_rating:g}"
    return Interactions(
        train=train,
        valid=valid,
        test=test,
        content={},
        is_cold=None,
        item_ids=tuple(events.item_ids[n] for n in kept_items.tolist()),
        user_ids=tuple(events.user_ids[n] for n in kept_users.tolist()),
        fingerprint=fingerprint,
        name=name,
        split=f"{TEST_SHARE:g} of each user's items for the test, {options.valid_share:g} for validation, {by}{limit}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rules about data that can be read: what a user should know


def _check_quality(found: _Loaded, findings: Findings) -> None:
    """Warnings about users and items that will not be learnt from or not be judged."""
    data = found.data

    def warn(part: str, expected: str, text: str, repair: str) -> None:
        findings.add(found.files[part], expected, text, repair, severity="warning")

    def warn_idle(idle: Tensor, of: int, ids: Sequence[str], part: str, expected: str, repair: str) -> None:
        if idle.numel():
            text = f"{idle.numel():,} of {of:,} without (first: {quote(ids[int(idle[0])])})"
            warn(part, expected, text, repair)

    trained = data.train.ptr.diff()
    idle = torch.ones(data.num_users, dtype=torch.bool)
    for part, lists in (("valid", data.valid), ("test", data.test)):
        held_out = lists.ptr.diff() > 0
        repair = "nothing to do: they are ranked for as if nothing were known of them"
        expected, of = "a training item of each user here", int(held_out.sum())
        warn_idle(places(held_out & (trained == 0)), of, data.user_ids, part, expected, repair)
        idle &= ~held_out
    repair = "nothing to do: they have no line, or no item on it, and nothing is learnt or measured of them"
    warn_idle(places(idle & (trained == 0)), data.num_users, data.user_ids, "train", "an item of each user", repair)

    per_item = torch.bincount(data.train.item, minlength=data.num_items)
    may_train = torch.ones(data.num_items, dtype=torch.bool) if data.is_cold is None else ~data.is_cold
    repair = "nothing to do: they are ranked, but nothing is learnt of them"
    idle = places((per_item == 0) & may_train)
    warn_idle(idle, int(may_train.sum()), data.item_ids, "train", "a training pair of each item", repair)
    if not data.valid.item.numel():
        repair = "hold some pairs out: without them the best epoch is not known"
        warn("valid", "at least one pair to validate on", "none", repair)
    if data.is_cold is not None and not data.content:
        repair = "nothing to do, if cold items shall be ranked by chance; add features to rank them by content"
        warn("content", "content of the items (feat_v, feat_a or feat_t)", "none", repair)


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def _write_pack(file: Path, found: _Loaded) -> None:
    """Write a pack that records the fingerprint, size and time of its sources, by which a changed one is noticed."""
    data = found.data
    tensors: dict[str, Tensor] = {}
    for name in ("train", "valid", "test"):
        lists: Lists = getattr(data, name)
        tensors |= {f"{name}_ptr": lists.ptr, f"{name}_item": lists.item}
    tensors |= {f"feat_{modality}": matrix for modality, matrix in data.content.items()}
    if data.is_cold is not None:
        tensors["is_cold"] = data.is_cold
    tensors |= {"item_ids": ids_to_bytes(data.item_ids), "user_ids": ids_to_bytes(data.user_ids)}
    meta = {
        "kind": _PACK_KIND,
        "layout": _PACK_LAYOUT,
        "name": data.name,
        "fingerprint": data.fingerprint,
        "split": data.split,
        "format": found.format,
        "choices": found.choices,
        "sources": source_records(found.sources, file.parent),
    }
    write_pack(file, tensors, meta)


def _load_pack(file: Path, options: _Options, findings: Findings, *, say: Say) -> _Loaded | None:
    """The memory-mapped contents of an undamaged pack whose sources have not changed."""
    opened = open_pack(file, findings, app=_APP, kind=_PACK_KIND, layout=_PACK_LAYOUT)
    if opened is None:
        return None
    tensors, meta = opened
    fault = _fault_of_tensors(tensors)
    if fault is not None:
        findings.add(file, *fault, write_again(_APP, file))
        return None
    files_of = {"lightgcn": _list_files, "clcrec": clcrec_folder.files_of}.get(meta["format"])
    flags = {"format": meta["format"], **(meta["choices"] or {})}
    stale = fault_of_sources(file, meta, app=_APP, flags=flags, files_of=files_of)
    if stale is not None:
        findings.add(file, *stale)
        return None
    made = {"min_rating": None, "split": "random", **(meta["choices"] or {})}
    if options.min_rating not in (None, made["min_rating"]) or options.split not in ("random", made["split"]):
        given = f"--min-rating {made['min_rating']} and --split {made['split']}"
        raise DataError(f"{file} was made with {given}; leave both out, or prepare a pack with others")
    train, valid, test = (Lists(tensors[f"{name}_ptr"], tensors[f"{name}_item"]) for name in ("train", "valid", "test"))
    data = Interactions(
        train=train,
        valid=valid,
        test=test,
        content={m: tensors[f"feat_{m}"] for m in MODALITIES if f"feat_{m}" in tensors},
        is_cold=tensors.get("is_cold"),
        item_ids=bytes_to_ids(tensors["item_ids"]),
        user_ids=bytes_to_ids(tensors["user_ids"]),
        fingerprint=meta["fingerprint"],
        name=meta["name"],
        split=meta["split"],
    )
    files = dict.fromkeys(("train", "valid", "test", "content"), file)
    return _Loaded(data, "pack", (), None, files)


def _fault_of_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """What is expected and what is found where the tensors do not describe data."""
    rows = {"item_ids": torch.uint8, "user_ids": torch.uint8}
    for name in ("train", "valid", "test"):
        rows |= {f"{name}_ptr": torch.int64, f"{name}_item": torch.int32}
    if "is_cold" in tensors:
        rows["is_cold"] = torch.bool
    for name, dtype in rows.items():
        if name not in tensors:
            return f"a tensor {name}", "none"
        if tensors[name].dtype != dtype or tensors[name].ndim != 1:
            return f"{name} as a row of {dtype}", shape_text(tensors[name])
    num_users, num_items = (len(bytes_to_ids(tensors[name])) for name in ("user_ids", "item_ids"))
    for name in ("train", "valid", "test"):
        ptr, item = tensors[f"{name}_ptr"], tensors[f"{name}_item"]
        if ptr.numel() != num_users + 1:
            return f"{name}_ptr of {num_users + 1} numbers, one more than users", f"{ptr.numel()}"
        if int(ptr[0]) != 0 or int(ptr[-1]) != item.numel() or bool((ptr.diff() < 0).any()):
            found = f"{int(ptr[0])} to {int(ptr[-1])}, or a fall between"
            return f"{name}_ptr that rises from 0 to {item.numel()}", found
        if item.numel() and not (int(item.min()) >= 0 and int(item.max()) < num_items):
            return f"{name}_item in 0..{num_items - 1}", f"{int(item.min())} to {int(item.max())}"
        starts = torch.zeros(item.numel() + 1, dtype=torch.bool).index_fill_(0, ptr, True)[1:-1]
        if bool(((item.diff() <= 0) & ~starts).any()):
            return f"{name}_item that rises within a user", "a fall, or an item twice"
    if "is_cold" in tensors and tensors["is_cold"].numel() != num_items:
        return f"is_cold of {num_items} items", f"{tensors['is_cold'].numel()}"
    for name in (f"feat_{modality}" for modality in MODALITIES):
        matrix = tensors.get(name)
        if matrix is not None and (matrix.dtype != torch.float32 or matrix.ndim != 2 or matrix.shape[0] != num_items):
            return f"{name} as float32 ({num_items}, features)", shape_text(matrix)
    return None
