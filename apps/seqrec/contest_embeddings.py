"""Families of items' embeddings: the forms their files have, and the tables they become.

Legend: I items, X cold candidates (rows behind the items'), N vectors, W width of an embedding.

    creative_emb/emb_81_32/      folders with JSON lines in *.json or part-00000
    creative_emb/emb_81_32.pkl   a dictionary {creative id: vector}
    creative_emb/81.npy          an array with a row per item
"""

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apps.seqrec import contest_lines
from apps.seqrec.contest_join import FaultError, Joined, Rows, Say
from apps.seqrec.contest_lines import BadLine
from shared.faults import DataError, Fault
from shared.pickles import UnsafePickleError, load_npy, load_pickle

EMBEDDINGS_FOLDER = "creative_emb"
SMALL_WIDTH = 1024  # families up to this width are converted unless others are asked for

_ROWS = 4096  # of embeddings that are converted at a time
_FAMILY = re.compile(r"(?:emb_)?(\d+)(?:_(\d+))?(\.pkl|\.npy)?")
_WIDTHS = {"81": 32, "82": 1024, "83": 3584, "84": 4096, "85": 3584, "86": 3584}


# ---------------------------------------------------------------------------------------------------------------------
# Files


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
# Vectors


class Embedding(NamedTuple):
    """A family of items' embeddings; row 0 is padding."""

    value: Tensor  # [I + 1 or more, W] float16, zeros where the item has none
    present: Tensor  # the same rows, bool


class JoinedVectors(Joined):
    """The lines of a family's files, joined; of families in other forms there are none."""

    def table(self, family: Family, num_items: int, num_extra: int, rows: Rows, say: Say) -> Embedding:
        """A family's table, in a mapped file, from its parts or from its one array or dictionary.

        Row 0 is padding, rows 1..I are the items', and the X behind them those of cold candidates.
        """
        if family.form == "lines":
            assert family.width is not None
            width, chunks = family.width, self._vectors(family.width)
        else:
            width, chunks = object_vectors(family, num_items)
        num_rows = num_items + 1 + num_extra
        path = self.folder / "table"
        value = torch.from_file(str(path), shared=True, size=num_rows * width, dtype=torch.float16)
        value = value.view(num_rows, width)
        present = torch.zeros(num_rows, dtype=torch.bool)
        for ids, vectors, is_row in chunks:
            row = ids if is_row else rows.find(ids)
            last = {r: n for n, r in enumerate(row.tolist())}  # of an item that comes twice the last one counts
            if not is_row:
                self.counts["embeddings of unknown items"] += int((row == 0).sum())
            last.pop(0, None)
            place = torch.tensor(list(last), dtype=torch.int64)
            value[place] = vectors[torch.tensor(list(last.values()), dtype=torch.int64)]
            present[place] = True
        found = int(present[: num_items + 1].sum())
        say(f"family {family.id}: {found:,} of {num_items:,} items have an embedding, {width:,} wide")
        if num_extra:
            found = int(present[num_items + 1 :].sum())
            say(f"family {family.id}: {found:,} of {num_extra:,} cold items have an embedding")
        self.tell_counts(f"family {family.id}", say)
        return Embedding(value, present)

    def _vectors(self, width: int) -> "Iterator[_Vectors]":
        creative = self.raw("creative", torch.int64, -1)
        vector = self.raw("vector", torch.float16, -1, width)
        for start in range(0, creative.numel(), _ROWS):
            yield _Vectors(creative[start : start + _ROWS], vector[start : start + _ROWS], False)


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
