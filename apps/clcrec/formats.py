"""Readers of the original's folders and of plain ratings, the one validator behind them, and our own packed form.

Legend: U users, I items, W warm items, E events, F features, Z words of all items.

    folder   the original's layout (shared/clcrec_folder.py): arrays, rows of held-out items and dictionaries as .npy,
             features as .npy or .pt
    pack     a .safetensors file written by `prepare`, mapped into memory
    ratings  MovieLens' ratings or RecBole's atomic files: not split yet, so only `prepare` reads them, and splits them

`read_data` raises the first error that `check_source` lists: both walk through the same rules.
"""

import csv
import io
import itertools
import math
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.clcrec.dataset import MODALITIES, ColdStart, Words, group_part, lists_of
from shared.clcrec_folder import (
    INTERACTIONS,
    TRAIN_DICT,
    blocks,
    feature_file,
    files_of,
    load_matrix,
    load_tensor,
    read_folder,
)
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
from shared.seed import make_generator

COLD_STREAM, COIN_STREAM, WARM_STREAM = 101, 102, 103  # of the split's draws: cold items, their pairs, warm pairs

_APP = "clcrec"
_PREPARE = f"python -m apps.{_APP} prepare"
_PACK_KIND = "clcrec data"
_PACK_LAYOUT = 1  # changes whenever a pack's tensors change their meaning

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# What callers use


def read_data(path: Path) -> ColdStart:
    """Interactions and content of a folder in the original's layout, or of a pack.

    A folder may lack what follows from the rest: the dictionaries, train.npy where user_item_train_dict.npy is there,
    and of full, warm and cold held-out files either the full one or the other two. Raises DataError with the first
    error that `check_source` would list.
    """
    findings = Findings(path, limit=1)
    data = _load(path, findings)
    findings.raise_first()
    assert data is not None
    return data


def check_source(path: Path, *, limit: int = 20) -> list[Fault]:
    """Everything that is wrong with a source, errors first: at most `limit` faults, then one that counts the rest.

    What `read_data` raises for is an error, what it can live with a warning. Ratings that are not split yet are an
    error that gives the command, followed by what is wrong with them.
    """
    findings = Findings(path, limit=limit)
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
    check_pack_paths(source, output)
    findings = Findings(source, limit=1)
    form = _form_of(source)
    if form is None:
        sources = sources_of(files_of(source))
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
        sources = sources_of([file for file in (form.events, form.items) if file.is_file()])
        ratings = _read_ratings(form, findings)
        findings.raise_first()
        assert ratings is not None
        split = _Split(cold_share, seed, min_rating)
        data = _split_ratings(
            ratings, split, fingerprint=joined_fingerprint(sources, split), name=_name(source), say=say
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_pack(output, data, sources, split)
    return data


def read_content(path: Path, *, modalities: Sequence[str], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Features of new items, modality -> [N, F] float32, from a folder with one feat_* file per modality.

    The files have the form of the original's folders, one row per new item, and as many columns as those that the
    model was trained on (`widths`).
    """
    findings = Findings(path, limit=1)
    content: dict[str, Tensor] = {}
    for modality in modalities:
        if modality not in widths:
            raise DataError(
                f"{path}: the model was trained on feat_{modality} as lists of words, and new items can only be given "
                "by numbers: train it on a matrix of text features instead"
            )
        file = feature_file(path, modality, findings)
        if file is None:
            expected = f"feat_{modality} of the new items, as .npy or .pt"
            findings.add(path / f"feat_{modality}.npy", expected, "no such file", "add it: the model was trained on it")
        findings.raise_first()
        assert file is not None
        tensor = load_tensor(file, findings)
        if tensor is not None and modality == "t" and not tensor.is_floating_point():
            repair = "give numbers of the kind that the model was trained on"
            findings.add(file, "a matrix of floats", f"integers, {shape_text(tensor)}: words are not read here", repair)
            tensor = None
        rows = next(iter(content.values())).shape[0] if content else None
        matrix = None if tensor is None else load_matrix(file, tensor, rows, findings)
        if matrix is not None and matrix.shape[1] != widths[modality]:
            repair = "make the features exactly as those of the training data"
            found = many(matrix.shape[1], "column")
            findings.add(file, f"{widths[modality]} columns, as the model was trained on", found, repair)
        findings.raise_first()
        assert matrix is not None
        content[modality] = matrix
    return content


# ---------------------------------------------------------------------------------------------------------------------
# From a path to data


def _load(path: Path, findings: Findings) -> ColdStart | None:
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
    elif not files_of(path):
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        expected = f"the original's files ({', '.join(INTERACTIONS[:2])}, ...), MovieLens' ratings, or one .inter file"
        findings.add(
            path, expected, f"none of them ({one_line(shown) or 'it is empty'})", "give the folder they are in"
        )
    else:
        return _load_folder(path, findings)
    return None


def _load_folder(folder: Path, findings: Findings) -> ColdStart | None:
    sources = sources_of(files_of(folder))
    repair = "list the items; ratings without cold items get some from `prepare --cold-share`"
    found = read_folder(folder, findings, repair_of_none=repair)
    if found is None:
        return None
    user, item = (torch.cat(parts) for parts in zip(found.train, found.valid, found.test, strict=True))
    return ColdStart(
        num_warm=found.num_warm,
        user=found.train.user.to(torch.int32),
        item=found.train.item.to(torch.int32),
        known=lists_of(user, item, found.num_users),
        valid=lists_of(*found.valid, found.num_users),
        test=lists_of(*found.test, found.num_users),
        content=found.content,
        words=found.words,
        item_ids=tuple(map(str, found.item_id.tolist())),
        user_ids=tuple(map(str, range(found.num_users))),
        fingerprint=joined_fingerprint(sources, None),
        name=_name(folder),
    )


class _Split(NamedTuple):
    """What the split of ratings depends on beside them."""

    cold_share: float
    seed: int
    min_rating: float | None


def _name(folder: Path) -> str:
    return folder.resolve().name or "data"


# ---------------------------------------------------------------------------------------------------------------------
# Rules about data that can be read: what a user should know


def _check_quality(path: Path, data: ColdStart, findings: Findings) -> None:
    """Warnings about users, items and features that will not be learnt from or not be judged."""

    def warn(name: str, expected: str, found: str, repair: str, row: int | None = None) -> None:
        findings.add(path / name if path.is_dir() else path, expected, found, repair, row=row, severity="warning")

    def warn_idle(count: Tensor, ids: Sequence[str], name: str, expected: str, repair: str) -> None:
        idle = places(count == 0)
        if idle.numel():
            found = f"{idle.numel():,} of {len(ids):,} without (first: {ids[int(idle[0])]})"
            warn(name, expected, found, repair)

    train = "train.npy" if (path / "train.npy").is_file() else TRAIN_DICT
    key = data.user.long() * data.num_items + data.item
    order = torch.sort(key, stable=True).indices
    again = order[1:][key[order].diff() == 0]
    if again.numel():
        n = int(again.min())
        first = f"user {data.user_ids[int(data.user[n])]} with item {data.item_ids[int(data.item[n])]}"
        found = f"{many(again.numel(), 'repeated pair')} (first: {first})"
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
    names = {m: file.name for m in MODALITIES if (file := feature_file(path, m, findings)) is not None}
    for modality, matrix in data.content.items():
        limits = [block.aminmax(dim=1) for block in blocks(matrix)]
        low, high = torch.cat([limit.min for limit in limits]), torch.cat([limit.max for limit in limits])
        is_zero = (low == 0) & (high == 0)
        same = places(is_zero if matrix.shape[1] == 1 else low == high)
        if same.numel():
            found = (
                f"{many(same.numel(), 'row')} of one value throughout, {int(is_zero.sum()):,} of them zero "
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
    if not folder.is_dir() or any((folder / name).is_file() for name in INTERACTIONS):
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


def _read_ratings(form: _Form, findings: Findings) -> _Ratings | None:
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
        found = f"no line of item {quote(unknown[n])}, which line {line} of {form.events.name} rates"
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
    form: _Form, header: Sequence[str], columns: Sequence[int], line: int, row: Sequence[str], findings: Findings
) -> None:
    for column in columns[:2]:
        if not row[column]:
            repair = "fill it in or delete the line"
            findings.add(form.events, "an id", "an empty field", repair, line=line, field=header[column])
            return
    found, repair = quote(row[columns[2]]), "write a number, or delete the line"
    findings.add(form.events, "a rating as a finite number", found, repair, line=line, field=header[columns[2]])


def _read_item_words(form: _Form, findings: Findings) -> tuple[dict[str, tuple[str, ...]] | None, tuple[str, ...]]:
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
                findings.add(form.items, "columns name:kind", quote(name), repair, line=1, field=f"column {n + 1}")
    if not any(kind in ("token", "token_seq", "bars", "flag") for _, _, kind in kinds):
        repair = "add a column such as title:token_seq: cold items are known by their content alone"
        findings.add(form.items, "a token or token_seq column beside the id", "none", repair, line=1)
    words: dict[str, tuple[str, ...]] = {}
    for line, row in rows:
        name = row[columns[0]]
        if not name or name in words:
            found = f"item {quote(name)} again" if name else "an empty field"
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
    file: Path, separator: str, columns: tuple[str, ...] | None, findings: Findings
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
    file: Path, rows: Iterator[list[str]], width: int, first_line: int, findings: Findings
) -> Iterator[tuple[int, list[str]]]:
    line = first_line - 1
    try:
        for line, row in enumerate(rows, first_line):
            if len(row) == width:
                yield line, row
            elif row and row != [""]:  # an empty line, as at the end of many files, is no row
                found = f"{many(len(row), 'field')} ({quote(row[0])}, ...)"
                findings.add(file, many(width, "field"), found, "complete or delete the line", line=line)
    except csv.Error as error:
        findings.add(file, "comma-separated fields", one_line(str(error)), "close all quotes", line=line + 1)


def _read_text(file: Path, *, is_old: bool, findings: Findings) -> str | None:
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


def _find_columns(file: Path, header: Sequence[str], wanted: Sequence[str], findings: Findings) -> list[int] | None:
    """Where the wanted columns stand, or None where the header is at fault; one that is missing has been reported."""
    if not header:
        return None
    missing = [name for name in wanted if header.count(name) != 1]
    for name in missing:
        repair = "name the columns in the first line, each once"
        findings.add(file, f"one column {name}", quote(" ".join(header)), repair, line=1, field=name)
    return None if missing else [list(header).index(name) for name in wanted]


# The split


def _split_ratings(ratings: _Ratings, split: _Split, *, fingerprint: str, name: str, say: Say) -> ColdStart:
    """Cold items, and held-out pairs of both groups, drawn as `prepare_source` says."""
    user, item = ratings.user, ratings.item
    if split.min_rating is not None:
        if ratings.rating is None:
            raise DataError(f"{name} has no column rating:float; leave --min-rating out")
        keep = ratings.rating >= split.min_rating
        say(f"{many(int((~keep).sum()), 'rating')} of {keep.numel():,} below {split.min_rating:g} left out")
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
            f"--cold-share {split.cold_share:g} of {many(num_items, 'item')} makes {num_cold} of them cold; "
            "choose a share that leaves both cold and warm ones"
        )
    key = torch.unique(user * num_items + item)
    if key.numel() < user.numel():
        say(f"{many(user.numel() - key.numel(), 'repeated pair')} of user and item left out")
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
        say(f"{many(dropped, 'user')} left out: they rated cold items only, so that nothing of theirs is trained on")
    user, item, part = torch.searchsorted(trained, user[keep]), item[keep], part[keep]
    raw_ids = [ratings.item_ids[n] for n in seen_items[order].tolist()]
    words = _encode_words([ratings.words[raw] for raw in raw_ids], say)
    if len(ratings.words) > num_items:
        say(f"{many(len(ratings.words) - num_items, 'item')} left out: nobody rated them")
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
    cold, warm = places(is_cold), places(~is_cold)
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
        say(f"{many(silent, 'item')} without any word: nothing tells of them if they are cold")
    return Words(item, word, len(number))


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def _write_pack(file: Path, data: ColdStart, sources: Sequence[Source], split: _Split | None) -> None:
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
        "sources": source_records(sources, file.parent),
    }
    write_pack(file, tensors, meta)


def _load_pack(file: Path, findings: Findings) -> ColdStart | None:
    """The memory-mapped contents of an undamaged pack whose sources have not changed."""
    opened = open_pack(file, findings, app=_APP, kind=_PACK_KIND, layout=_PACK_LAYOUT)
    if opened is None:
        return None
    tensors, meta = opened
    fault = _fault_of_tensors(tensors, meta)
    if fault is not None:
        findings.add(file, *fault, write_again(_APP, file))
        return None
    split = meta["split"]
    stale = fault_of_sources(file, meta, app=_APP, flags=split or {}, files_of=files_of if split is None else None)
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
            return f"{name} as a row of {dtype}", shape_text(tensors[name])
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
            return f"{name} as float32 ({num_items}, features)", shape_text(matrix)
    return None
