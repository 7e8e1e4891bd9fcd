"""Readers of every accepted form of images of people, the one validator behind them, and our own packed form.

Legend: N images, P identities, Q queries, K modalities of a query, V identities to validate on.

    orbench  a folder with vis/ nir/ cp/ sk/ (a folder per person in each), train_annos.json and
             test_gallery_and_queries.json
    tree     the same folders with text_annos.json, which describes RGB images; all identities are to train on, unless
             a "split" of the rows says otherwise
    market   a folder with bounding_box_train, query and bounding_box_test (Market-1501 and its like)
    csv      a table with the columns path and identity, and perhaps camera, modality, caption and split
    pack     a .safetensors file written by `prepare`, with NAME.images.safetensors beside it, mapped into memory

A folder is listed once; no image is opened to read a source. `read_data` raises the first error that `check_source`
lists: both walk through the same rules.
"""

import csv
import dataclasses
import difflib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import struct
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from apps.reid.dataset import (
    IMAGE_MODALITIES,
    MODALITIES,
    NIR,
    QUERY_LISTS,
    RGB,
    TEXT,
    VIEWS,
    Frame,
    ImageFiles,
    Images,
    PackedImages,
    People,
    Queries,
    Retrieval,
    Texts,
    lists_by_rule,
    make_texts,
    open_images,
)
from apps.reid.images import SUFFIXES, ImageError, load_image, read_image
from shared.faults import DataError as DataError
from shared.faults import Fault as Fault
from shared.faults import Findings, Severity, many, one_line, quote
from shared.files import (
    DamagedFileError,
    fingerprint,
    fsync_folder,
    read_safetensors,
    relative_path,
    remove_stale_temporaries,
    replace,
    write_pack,
)
from shared.packs import check_pack_paths, joined_fingerprint, open_pack, write_again
from shared.seed import make_generator

FORMATS = ("auto", "orbench", "tree", "market", "csv", "pack")
HEIGHT, WIDTH = 256, 128
MARGIN = 1 / 32  # of height and width, on each side: 8 rows and 4 columns
ALIASES = {
    **{name: place for place, name in enumerate(MODALITIES)},
    **dict.fromkeys(("vis", "visible"), RGB),
    **dict.fromkeys(("ir", "infrared"), MODALITIES.index("nir")),
    **dict.fromkeys(("colorpencil", "cpencil"), MODALITIES.index("cp")),
    "sketch": MODALITIES.index("sk"),
    **dict.fromkeys(("txt", "caption"), TEXT),
}

ANNOTATIONS = {"orbench": "train_annos.json", "tree": "text_annos.json"}
TEST_LISTS = "test_gallery_and_queries.json"
GALLERY = "RGB_GALLERY"
MARKET_TRAIN, MARKET_QUERY, MARKET_GALLERY = "bounding_box_train", "query", "bounding_box_test"
COLUMNS = ("path", "identity", "camera", "modality", "caption", "split")

_APP = "reid"
_PACK_KIND = "reid images"
_PACK_LAYOUT = 1  # changes whenever a pack's tensors change their meaning
_SPLIT_STREAM = 20
_TRAIN, _VALID, _TEST = range(3)
_PARTS = {"train": _TRAIN, "val": _VALID, "valid": _VALID, "test": _TEST}
_CSV_PARTS = {**_PARTS, "query": _TEST, "gallery": _TEST}
_CAMERA = re.compile(r"[^_]*_([^_]*)_.*cam(\d+)_")  # 0941_sysu_0470_cam5_0007_vis.jpg
_VIEW = re.compile(r"_(front|back|side)_")  # 0941_sysu_0470_front_1_sketch.jpg
_MARKET = re.compile(r"(-1|\d+)_c(\d+)")  # 0001_c1s1_001051_00.jpg
_MARKET_JUNK = "-1"
_MIN_SIDE, _MAX_SIDE, _MAX_RATIO = 16, 4096, 6  # of an image of a person, in pixels

_BLOCK_IMAGES = 64  # some megabytes: memory that the allocator keeps
_IMAGES_PER_WORKER = 1024  # fewer are not worth a process, which imports torch first
_SPARE_BYTES = 64 << 20  # for the lists beside the images, and so that a disk is not filled to the brim

Say = Callable[[str], None]
OnImages = Callable[[int, int], None]


# ---------------------------------------------------------------------------------------------------------------------
# What callers use


def read_data(
    path: Path,
    *,
    format: str = "auto",  # noqa: A002 - the flag's name
    val_share: float = 0.2,
    seed: int = 42,
    height: int | None = None,
    width: int | None = None,
    margin: float | None = None,
) -> People:
    """The people of a source in any of the forms, divided into those to train on, to validate on and to test on.

    The test part is the source's; so is the validation part where the source names one. Otherwise `val_share` of the
    other identities, drawn from the seed, are to validate on. Official lists of queries are kept, others are made by
    `lists_by_rule`. Images are seen in `height` x `width` (256 x 128) with `margin` of either (1/32) on each side; a
    pack has its own size, and another one is refused. Raises DataError with the first error that `check_source` would
    list.
    """
    findings = Findings(path, limit=1)
    wanted = _Size(height, width, margin)
    found = _load(path, format, findings)
    findings.raise_first()
    assert found is not None
    return _divide(found, wanted, path, val_share=val_share, seed=seed)


def check_source(path: Path, *, format: str = "auto", limit: int = 20) -> list[Fault]:  # noqa: A002
    """Everything that is wrong with a source, errors first: at most `limit` faults, then one that counts the rest.

    What `read_data` or `prepare_source` raises for is an error, what they can live with a warning. Every image is
    decoded, so this takes as long as preparing with one process.
    """
    findings = Findings(path, limit=limit)
    found = _load(path, format, findings)
    if found is not None:
        num_trained = int((found.part == _TRAIN).sum())
        if num_trained < 2:
            _add_too_few(findings, path, num_trained)
        _check_images(found, findings)
    return findings.listing()


def prepare_source(
    source: Path,
    output: Path,
    *,
    format: str = "auto",  # noqa: A002
    height: int = HEIGHT,
    width: int = WIDTH,
    margin: float = MARGIN,
    workers: int | None = None,
    on_images: OnImages = lambda done, total: None,
    say: Say = lambda line: None,
) -> People:
    """Write a pack of what `read_data` would read, images decoded and resized once, and give what is in it.

    The pack is two files: `output` with all lists, and NAME.images.safetensors beside it with the images. `workers`
    processes decode (None: one per core, fewer for few images). `on_images` hears how many images are done, and of how
    many; `say` how much will be written, and what was left out. What was finished before an interruption is not done
    again. Raises DataError, before anything is written where the disk is too small.
    """
    check_pack_paths(source, output)
    findings = Findings(source, limit=20)
    found = _load(source, format, findings)
    findings.raise_first()
    assert found is not None
    for line in (*found.notes, *map(str, findings.warnings)):
        say(line)
    frame = _frame(height, width, margin)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = _Work.open(output, found, frame)
    work.forecast(say)
    done = work.num_done
    if done:
        say(f"{many(done, 'image')} were decoded before")
    on_images(done, work.num_images)
    for block, crc in _decode_blocks(found, frame, work, workers):
        work.finish(block, crc)
        done += len(work.rows(block))
        on_images(done, work.num_images)
    again = _load(source, format, Findings(source, limit=1))
    if again is None or again.fingerprint != found.fingerprint:
        raise DataError(f"{source} has changed while it was read; run the command again")
    work.write(output, found)
    return read_data(output)


# ---------------------------------------------------------------------------------------------------------------------
# From a path to records


@dataclass(frozen=True)
class _Records:
    """A source before its identities are divided and numbered anew."""

    form: str
    root: Path  # of the images' paths
    origin: Path  # what was given
    path: Texts
    identity: Tensor  # [N] int64 into `names`
    camera: Tensor  # [N] int64, -1 unknown
    modality: Tensor  # [N] int64
    view: Tensor  # [N] int64, -1 unknown
    caption: Tensor  # [N] int64, -1 none
    captions: Texts
    names: tuple[str, ...]  # raw ids
    part: Tensor  # [P] int64 of names: _TRAIN (perhaps to validate on), _VALID, _TEST
    gallery: Tensor | None  # [G] int64 rows, None without lists of the source's own
    queries: dict[str, Tensor]  # name -> [Q, 1 + K] int64: identity, then images or captions
    camera_rule: bool
    rule: str
    fingerprint: str
    name: str
    notes: tuple[str, ...] = ()  # what was left out by the rules of the form
    packed: PackedImages | None = None
    block_crc: Tensor | None = None  # [blocks] int64, of a pack


class _Size(NamedTuple):
    height: int | None
    width: int | None
    margin: float | None


def _load(path: Path, form: str, findings: Findings) -> _Records | None:
    """What the source holds, or None where errors were found on the way."""
    if form not in FORMATS:
        raise DataError(f"--format is {form!r}; it must be one of {', '.join(FORMATS)}")
    form = _form_of(path, findings) if form == "auto" else form
    readers: dict[str, Callable[[Path, Findings], _Records | None]] = {
        "orbench": _read_orbench,
        "tree": _read_tree,
        "market": _read_market,
        "csv": _read_csv,
        "pack": _read_pack,
    }
    found = None
    if form and not path.exists():
        findings.add(path, "a source of images", "no such file or folder", "give the path of the data")
    elif form and path.is_dir() != (form in ("orbench", "tree", "market")):
        expected = "a file" if path.is_dir() else "a folder"
        found_text = "a folder" if path.is_dir() else "a file"
        findings.add(path, f"{expected}, as {form} data are", found_text, "give the right path or --format")
    elif form:
        found = readers[form](path, findings)
    return None if findings.errors else found


def _form_of(path: Path, findings: Findings) -> str:
    """The form that a path looks like; "" with a fault for none."""
    if path.is_dir():
        marks = {form: path / name for form, name in ANNOTATIONS.items()} | {"market": path / MARKET_TRAIN}
        for form, mark in marks.items():
            if mark.exists():
                return form
        expected = f"a folder with {', '.join(mark.name for mark in marks.values())}; or a .csv file; or a pack"
        names = sorted(entry.name for entry in path.iterdir())
        found = f"{', '.join(names[:5]) + (', ...' if len(names) > 5 else '')}" if names else "an empty folder"
        findings.add(path, expected, one_line(found), "give the folder that holds one of them")
    elif not path.exists():
        findings.add(path, "a source of images", "no such file or folder", "give the path of the data")
    elif path.suffix.lower() in (".csv", ".safetensors"):
        return "csv" if path.suffix.lower() == ".csv" else "pack"
    else:
        findings.add(path, "a folder, a .csv file or a pack", f"a {path.suffix} file", "give the path of the data")
    return ""


_Stat: TypeAlias = tuple[int, int]  # size and mtime_ns; plain tuples of numbers do not occupy the garbage collector
Files: TypeAlias = dict[str, _Stat]  # by name, sorted


def _listed(folder: Path) -> tuple[list[str], Files]:
    """The folders and the image files in a folder."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(SUFFIXES):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # a link to nothing
                    continue
                files.append((entry.name, (stat.st_size, stat.st_mtime_ns)))
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(folders), dict(sorted(files))


class _Builder:
    """Images as a reader finds them, changed in place: columns, for rows would occupy the garbage collector."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.stats = array("q")  # size and time of each
        self.identities: list[str] = []
        self.modalities: list[int] = []
        self.cameras: list[str | None] = []
        self.views: list[int] = []
        self.places: list[int] = []  # of their captions
        self.captions: dict[str, int] = {}

    def add(
        self,
        path: str,
        stat: _Stat,
        identity: str,
        modality: int,
        *,
        camera: str | None = None,
        view: int = -1,
        caption: str | None = None,
    ) -> int:
        """The row of an image that is added; a blank caption is none."""
        self.paths.append(path)
        self.stats.extend(stat)
        self.identities.append(identity)
        self.modalities.append(modality)
        self.cameras.append(camera)
        self.views.append(view)
        self.places.append(self.caption(caption) if caption and not caption.isspace() else -1)
        return len(self.paths) - 1

    def caption(self, text: str) -> int:
        """The place of a caption; equal ones share it."""
        return self.captions.setdefault(text, len(self.captions))

    def finish(
        self,
        form: str,
        root: Path,
        origin: Path,
        parts: Mapping[str, int],
        *,
        lists: Sequence[Path],
        gallery: Sequence[int] | None = None,
        queries: Mapping[str, Sequence[tuple[str, Sequence[int]]]] | None = None,
        camera_rule: bool = False,
        rule: str = "",
        notes: Sequence[str] = (),
    ) -> _Records:
        """The records; `parts` has every identity, `lists` are the files that describe the images."""
        names = sorted(parts, key=_by_number)
        number = {name: place for place, name in enumerate(names)}
        cameras = sorted({camera for camera in self.cameras if camera is not None}, key=_by_number)
        camera_number: dict[str | None, int] = {camera: place for place, camera in enumerate(cameras)} | {None: -1}
        state = hashlib.blake2b("\0".join(self.paths).encode("utf-8", "surrogateescape"), digest_size=16)
        state.update(self.stats.tobytes())
        return _Records(
            form=form,
            root=root,
            origin=origin,
            path=make_texts(self.paths),
            identity=torch.tensor([number[name] for name in self.identities], dtype=torch.int64),
            camera=torch.tensor([camera_number[camera] for camera in self.cameras], dtype=torch.int64),
            modality=torch.tensor(self.modalities, dtype=torch.int64),
            view=torch.tensor(self.views, dtype=torch.int64),
            caption=torch.tensor(self.places, dtype=torch.int64),
            captions=make_texts(list(self.captions)),
            names=tuple(names),
            part=torch.tensor([parts[name] for name in names], dtype=torch.int64),
            gallery=None if gallery is None else torch.tensor(gallery, dtype=torch.int64),
            queries={
                name: torch.tensor([[number[identity], *items] for identity, items in rows], dtype=torch.int64)
                for name, rows in (queries or {}).items()
                if rows
            },
            camera_rule=camera_rule,
            rule=rule,
            fingerprint=joined_fingerprint((), [form, [fingerprint([file]) for file in lists], state.hexdigest()]),
            name=origin.resolve().name,
            notes=tuple(notes),
        )


def _by_number(name: str) -> tuple[int, str]:
    """For sorting: 2 before 10, whether or not they are written with zeros in front."""
    return len(name), name


def _read_json(file: Path, findings: Findings) -> Any:
    """What a JSON file holds; None with a fault where it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        findings.add(file, "a file", "none", "put it there, or give the right --format")
    except json.JSONDecodeError as error:
        findings.add(file, "JSON", one_line(error.msg), "restore the file", line=error.lineno)
    except (UnicodeDecodeError, RecursionError) as error:
        findings.add(file, "JSON in UTF-8", type(error).__name__, "restore the file")
    return None


def _kind(value: object) -> str:
    """What a JSON value is, for messages."""
    if value is None:
        return "null"
    if isinstance(value, str | int | float):
        return quote(str(value)) if isinstance(value, str) else f"{type(value).__name__} {value}"
    return {"dict": "an object", "list": "a list"}.get(type(value).__name__, type(value).__name__)


# ---------------------------------------------------------------------------------------------------------------------
# ORBench, and trees like it


class _Tree(NamedTuple):
    """The folders of modalities."""

    folders: dict[int, str]  # by modality, as "vis"
    files: dict[int, dict[str, Files]]  # by modality and identity

    def find(self, path: str, modality: int) -> tuple[str, _Stat] | None:
        """Identity and state of a listed file; None where there is no such file of this modality."""
        parts = path.split("/")
        if len(parts) != 3 or parts[0] != self.folders.get(modality):
            return None
        stat = self.files[modality].get(parts[1], {}).get(parts[2])
        return None if stat is None else (parts[1], stat)


# caption, part, row of the list, and the number of the person where the list has such numbers
_Annotation: TypeAlias = tuple[str, int, int, int | None]


def _read_orbench(root: Path, findings: Findings) -> _Records | None:
    return _read_annotated(root, "orbench", findings)


def _read_tree(root: Path, findings: Findings) -> _Records | None:
    return _read_annotated(root, "tree", findings)


def _read_annotated(root: Path, form: str, findings: Findings) -> _Records | None:
    """Trees whose RGB images are listed with captions; images of the other modalities are found by their folders."""
    file, test_file = root / ANNOTATIONS[form], root / TEST_LISTS
    tree = _scan_tree(root, findings)
    has_test = form == "orbench" and test_file.is_file()
    if form == "orbench" and not has_test:
        expected, repair = "the official gallery and queries", "put the file there, to test as others do"
        findings.add(test_file, expected, "no such file", repair, severity="warning")
    if findings.errors:
        return None
    annotations = _annotations(file, tree, findings, is_official=form == "orbench")
    lists = _test_lists(test_file, tree, findings) if has_test else _TestLists(set(), [], {}, set())
    if annotations is None or lists is None:
        return None
    parts = _parts_of(file, annotations, lists, findings, is_official=form == "orbench")
    _check_others(root, tree, parts, annotations, findings)
    if findings.errors:
        return None

    builder = _Builder()
    rows: dict[str, int] = {}
    for modality, people in tree.files.items():
        for identity, files in people.items():
            is_tested = identity in lists.people
            for name, stat in files.items() if identity in parts else ():
                path = f"{tree.folders[modality]}/{identity}/{name}"
                annotation = annotations.get(path)
                is_used = path in lists.paths if is_tested else modality != RGB or annotation is not None
                if is_used:
                    camera, view = _named(name, modality)
                    caption = None if annotation is None else annotation[0]
                    row = builder.add(path, stat, identity, modality, camera=camera, view=view, caption=caption)
                    if is_tested:
                        rows[path] = row
    queries = {
        name: [
            (
                person,
                [
                    builder.caption(item) if modality == TEXT else rows[item]
                    for modality, item in zip(QUERY_LISTS[name], items, strict=True)
                ],
            )
            for person, items in listed
        ]
        for name, listed in lists.queries.items()
    }
    return builder.finish(
        form,
        root,
        root,
        parts,
        lists=[file, test_file] if has_test else [file],
        gallery=[rows[path] for path in lists.gallery] if has_test else None,
        queries=queries,
        rule=f"gallery and queries of {TEST_LISTS}" if has_test else "",
    )


def _named(name: str, modality: int) -> tuple[str | None, int]:
    """Camera and view of an image as its name tells them: photographs have a camera, drawings a view."""
    if modality in (RGB, NIR):
        match = _CAMERA.match(name)
        return (None if match is None else f"{match[1]} {match[2]}"), -1
    match = _VIEW.search(name)
    return None, -1 if match is None else VIEWS.index(match[1])


def _scan_tree(root: Path, findings: Findings) -> _Tree:
    """All images of the folders of modalities, listed once."""
    tree = _Tree({}, {})
    for folder in _listed(root)[0]:
        modality = ALIASES.get(folder.lower(), TEXT)
        if modality == TEXT:
            continue
        if modality in tree.folders:
            found = f"{tree.folders[modality]}/ and {folder}/"
            expected = f"one folder of modality {MODALITIES[modality]}"
            findings.add(root, expected, found, "move the images of one into the other")
            continue
        tree.folders[modality] = folder
        people = {name: _listed(root / folder / name)[1] for name in _listed(root / folder)[0]}
        tree.files[modality] = people
    for modality, name in enumerate(IMAGE_MODALITIES):
        if modality not in tree.folders:
            names = " or ".join(f"{alias}/" for alias, place in ALIASES.items() if place == modality)
            repair = "put the images there" if modality == RGB else "nothing to do, if there are none"
            severity: Severity = "error" if modality == RGB else "warning"
            found = "no such folder"
            findings.add(root, f"images of modality {name} in {names}", found, repair, severity=severity)
    return _Tree(dict(sorted(tree.folders.items())), dict(sorted(tree.files.items())))


def _annotations(file: Path, tree: _Tree, findings: Findings, *, is_official: bool) -> dict[str, _Annotation] | None:
    """What is said of each listed RGB image, by its path."""
    content = _read_json(file, findings)
    if content is None:
        return None
    if type(content) is not list:
        findings.add(file, "a list of annotations", _kind(content), "restore the file")
        return None
    found: dict[str, _Annotation] = {}
    repair = "correct the annotation, or take it out"
    for row, value in enumerate(content):
        if type(value) is not dict:
            findings.add(file, "an object with file_path and caption", _kind(value), repair, row=row)
            continue
        path, caption, label = value.get("file_path"), value.get("caption"), value.get("id")
        split = value.get("split", "train") if not is_official else "train"
        if type(path) is not str:
            findings.add(file, "the path of an RGB image", _kind(path), repair, row=row, field="file_path")
            continue
        path = path.replace("\\", "/")
        if type(caption) is not str:
            findings.add(file, "a text", _kind(caption), repair, row=row, field="caption")
        elif not caption.strip():
            severity_repair = "write a caption; the image is used without one"
            findings.add(file, "words", "a blank text", severity_repair, row=row, field="caption", severity="warning")
        if is_official and type(label) is not int:
            findings.add(file, "the number of the person", _kind(label), repair, row=row, field="id")
        if type(split) is not str or split.lower() not in _PARTS:
            findings.add(file, "train, val or test", _kind(split), repair, row=row, field="split")
            split = "train"
        if tree.find(path, RGB) is None:
            parts = path.split("/")
            if len(parts) != 3 or ALIASES.get(parts[0].lower()) != RGB:
                expected = f"{tree.folders[RGB]}/PERSON/NAME, an RGB image"
                findings.add(file, expected, quote(path), repair, row=row, field="file_path")
            else:
                found_text = f"{quote(path)}, which does not exist"
                missing = "restore the image, or take out the annotation"
                findings.add(file, "an image that is there", found_text, missing, row=row, field="file_path")
            continue
        if path in found:
            expected, again = "each image once", f"{quote(path)} again, as in row {found[path][2]}"
            taken = "take one out; the first one counts"
            findings.add(file, expected, again, taken, row=row, field="file_path", severity="warning")
            continue
        number = label if is_official and type(label) is int else None
        found[path] = (caption if type(caption) is str else "", _PARTS[split.lower()], row, number)
    if not content:
        findings.add(file, "at least one annotation", "none", "restore the file")
    return found


def _parts_of(
    file: Path, annotations: Mapping[str, _Annotation], lists: "_TestLists", findings: Findings, *, is_official: bool
) -> dict[str, int]:
    """The part of every identity; faults where one is in two, or where its number is not its own."""
    parts = dict.fromkeys(lists.people, _TEST)
    first_part: dict[str, int] = {}
    for path, annotation in annotations.items():
        first_part.setdefault(path.split("/")[1], annotation[1])
    told: set[str] = set()
    for path, (_, part, row, _) in annotations.items():
        identity = path.split("/")[1]
        if identity in told:
            continue
        if identity in lists.people:
            told.add(identity)
            found = f"{quote(identity)}, who is in {TEST_LISTS} too"
            repair = "take the person out of one of them"
            findings.add(file, "somebody who is not tested on", found, repair, row=row, field="file_path")
        elif part != first_part[identity]:
            told.add(identity)
            found = f"{quote(identity)} in another split than before"
            findings.add(file, "each person in one split", found, "correct the split", row=row, field="split")
    if is_official:
        _check_numbers(file, annotations, findings)
    return parts | first_part


def _check_numbers(file: Path, annotations: Mapping[str, _Annotation], findings: Findings) -> None:
    """Faults where a person has two numbers, two have the same, or the numbers leave some out."""
    person_of: dict[int, str] = {}
    number_of: dict[str, int] = {}
    told: set[str] = set()
    repair = "give each folder one id of its own"
    for path, (_, _, row, number) in annotations.items():
        identity = path.split("/")[1]
        if number is None or identity in told:
            continue
        if number_of.setdefault(identity, number) != number:
            told.add(identity)
            expected, found = f"id {number_of[identity]} for {quote(identity)}, as before", f"{number}"
            findings.add(file, expected, found, repair, row=row, field="id")
        elif person_of.setdefault(number, identity) != identity:
            told.add(identity)
            found = f"{number}, which {quote(person_of[number])} has"
            findings.add(file, f"an id that only {quote(identity)} has", found, repair, row=row, field="id")
    if person_of and sorted(person_of) != list(range(1, len(person_of) + 1)):
        found = f"{many(len(person_of), 'id')} from {min(person_of)} to {max(person_of)}"
        repair = "nothing to do: identities are numbered anew"
        findings.add(file, "ids 1, 2, 3 ...", found, repair, field="id", severity="warning")


def _check_others(
    root: Path, tree: _Tree, parts: Mapping[str, int], annotations: Mapping[str, _Annotation], findings: Findings
) -> None:
    """Warnings of images that are there and not used."""
    for modality, people in tree.files.items():
        folder = tree.folders[modality]
        if modality == RGB:
            expected, noun = "an annotation of each RGB image", "image"
            untested = [identity for identity in people if parts.get(identity) != _TEST]
            if sum(len(people[identity]) for identity in untested) == len(annotations):
                continue
            files = [f"{identity}/{name}" for identity in untested for name in people[identity]]
            left_out = [file for file in files if f"{folder}/{file}" not in annotations]
        else:
            expected, noun = "an RGB image of each person", "folder"
            left_out = [identity for identity in people if identity not in parts]
        if left_out:
            found = f"{many(len(left_out), noun)} without, as {quote(left_out[0])}"
            repair = "nothing to do, if they shall be left out"
            findings.add(root / folder, expected, found, repair, severity="warning")


class _TestLists(NamedTuple):
    """What test_gallery_and_queries.json asks for."""

    people: set[str]
    gallery: list[str]
    queries: dict[str, list[tuple[str, list[str]]]]  # identity, and paths or captions
    paths: set[str]


def _test_lists(file: Path, tree: _Tree, findings: Findings) -> _TestLists | None:
    """The official lists, every path of them a file that is there."""
    content = _read_json(file, findings)
    if content is None:
        return None
    if type(content) is not dict or GALLERY not in content:
        findings.add(file, f"an object with {GALLERY} and lists of queries", _kind(content), "restore the file")
        return None
    missing = [name for name in QUERY_LISTS if name not in content]
    if missing:
        found = f"{many(len(missing), 'list')} less, as {missing[0]}"
        repair = "nothing to do, if they shall not be evaluated"
        findings.add(file, f"all {len(QUERY_LISTS)} lists of queries", found, repair, severity="warning")
    person_of: dict[str, str] = {}  # folder by number
    number_of: dict[str, str] = {}
    rows: dict[str, list[tuple[str, list[str]]]] = {}
    for name, listed in content.items():
        modalities = (RGB,) if name == GALLERY else QUERY_LISTS.get(name)
        if modalities is None:
            nearest = difflib.get_close_matches(name, QUERY_LISTS, 1)
            expected = f"{GALLERY} or a list of queries" + (f", perhaps {nearest[0]}" if nearest else "")
            findings.add(file, expected, quote(name), "correct the name, or take the list out")
        elif type(listed) is not list:
            findings.add(file, "a list of rows", _kind(listed), "restore the file", field=name)
        else:
            rows[name] = []
            for row, value in enumerate(listed):
                problem = _row_problem(value, modalities, tree, person_of, number_of)
                if problem is not None:
                    findings.add(file, *problem, "correct the row, or take it out", row=row, field=name)
                else:
                    rows[name].append((str(value[0]), [_path(item) for item in value[1:]]))
    listed_paths = [items[0] for _, items in rows[GALLERY]] if GALLERY in rows else []
    gallery = list(dict.fromkeys(listed_paths))
    if len(gallery) < len(listed_paths):
        found = f"{many(len(listed_paths) - len(gallery), 'image')} again"
        findings.add(file, "each image once", found, "take the repeated rows out", field=GALLERY)
    elif not gallery:
        findings.add(file, "at least one image", "none", "restore the file", field=GALLERY)
    in_gallery = {number for number, _ in rows.get(GALLERY, ())}
    queries = {}
    for name in QUERY_LISTS:
        lost = {number for number, _ in rows.get(name, ())} - in_gallery
        if lost:
            found = f"{many(len(lost), 'person')} who are not there, as {quote(min(lost))}"
            repair = "nothing to do: such queries are left out of every mean"
            findings.add(file, "people of the gallery", found, repair, field=name, severity="warning")
        queries[name] = [(person_of.get(number, f"person {number}"), items) for number, items in rows.get(name, ())]
    paths = {path for listed in rows.values() for _, items in listed for path in items}
    return _TestLists(
        {person for listed in queries.values() for person, _ in listed} | set(person_of.values()),
        gallery,
        queries,
        paths,
    )


def _path(item: str) -> str:
    """A path as this machine's folders are read; captions keep their backslashes."""
    return item.replace("\\", "/") if item.lower().endswith(SUFFIXES) else item


def _row_problem(
    value: Any, modalities: Sequence[int], tree: _Tree, person_of: dict[str, str], number_of: dict[str, str]
) -> tuple[str, str] | None:
    """What is expected and found where a row cannot be used; notes which folder has which number otherwise."""
    names = [MODALITIES[modality] for modality in modalities]
    if type(value) is not list or len(value) != 1 + len(modalities):
        found = f"{len(value)} values" if type(value) is list else _kind(value)
        return f"[person, {', '.join(names)}]", found
    if type(value[0]) not in (int, str):
        return "the number of the person", _kind(value[0])
    number = str(value[0])
    for modality, item in zip(modalities, value[1:], strict=True):
        if type(item) is not str:
            return f"{'a caption' if modality == TEXT else 'a path'} for {MODALITIES[modality]}", _kind(item)
        if modality == TEXT:
            continue
        if modality not in tree.folders:
            return f"an image of modality {MODALITIES[modality]}", f"{quote(item)}, and no folder of that modality"
        place = tree.find(_path(item), modality)
        if place is None:
            return f"an image that is there, in {tree.folders[modality]}/PERSON/", quote(item)
        identity = place[0]
        if person_of.setdefault(number, identity) != identity:
            return f"images of {quote(person_of[number])}, as for {number} before", quote(item)
        if number_of.setdefault(identity, number) != number:
            return f"person {number_of[identity]} for {quote(identity)}, as before", number
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Market-1501 and its like


def _read_market(root: Path, findings: Findings) -> _Records | None:
    """Three folders of RGB images; the number of the person and the camera stand in the names."""
    builder = _Builder()
    parts: dict[str, int] = {}
    gallery: list[int] = []
    queries: list[tuple[str, Sequence[int]]] = []
    junk = 0
    folders = [name for name in (MARKET_TRAIN, MARKET_QUERY, MARKET_GALLERY) if (root / name).is_dir()]
    has_test = MARKET_QUERY in folders and MARKET_GALLERY in folders
    for name in (MARKET_TRAIN, MARKET_QUERY, MARKET_GALLERY):
        if name not in folders:
            needed = name == MARKET_TRAIN or len(folders) == 2
            repair = "put it there" if needed else "nothing to do, if nothing shall be tested"
            if needed:
                findings.add(root / name, "a folder of images", "none", repair)
            else:
                findings.add(root / name, "a folder of images", "none", repair, severity="warning")
    for folder in folders:
        part = _TRAIN if folder == MARKET_TRAIN else _TEST
        files = _listed(root / folder)[1]
        if not files:
            findings.add(root / folder, "at least one image", "none", "restore the folder")
        for name, stat in files.items():
            match = _MARKET.match(name)
            if match is None:
                expected = "PERSON_cCAMERA..., as 0001_c1s1_001051_00.jpg"
                findings.add(root / folder / name, expected, quote(name), "correct the name, or take the file out")
                continue
            person, camera = match[1], match[2]
            if person == _MARKET_JUNK:
                junk += 1
                continue
            if parts.setdefault(person, part) != part:
                found = f"{quote(person)} of {MARKET_TRAIN}"
                repair = "take the images of that person out of one of them"
                findings.add(root / folder / name, "somebody who is not trained on", found, repair)
                continue
            row = builder.add(f"{folder}/{name}", stat, person, RGB, camera=camera)
            if folder == MARKET_QUERY:
                queries.append((person, (row,)))
            elif folder == MARKET_GALLERY:
                gallery.append(row)
    if findings.errors:
        return None
    lost = {person for person, _ in queries} - {builder.identities[row] for row in gallery}
    if lost:
        found = f"{many(len(lost), 'person')} who are not there, as {quote(min(lost))}"
        repair = "nothing to do: such queries are left out of every mean"
        findings.add(root / MARKET_QUERY, f"people of {MARKET_GALLERY}", found, repair, severity="warning")
    return builder.finish(
        "market",
        root,
        root,
        parts,
        lists=(),
        gallery=gallery if has_test else None,
        queries={"RGB": queries},
        camera_rule=True,
        rule=f"queries of {MARKET_QUERY}, gallery of {MARKET_GALLERY}",
        notes=[f"{many(junk, 'image')} of nobody (-1) left out"] if junk else [],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class _Row(NamedTuple):
    """A line of a table; the names of COLUMNS."""

    path: str
    identity: str
    camera: str
    modality: int
    caption: str
    split: str
    line: int


def _read_csv(file: Path, findings: Findings) -> _Records | None:
    """A table with a line per image; paths are relative to its folder."""
    rows = _table(file, findings)
    if rows is None:
        return None
    stats = _stats_of(file.parent, rows, file, findings)
    has_rgb = {row.identity for row in rows if row.modality == RGB}
    without = sorted({row.identity for row in rows} - has_rgb)
    if without:
        found = f"{many(len(without), 'person')} without, as {quote(without[0])}"
        repair = "nothing to do: they are left out"
        findings.add(file, "an RGB image of each person", found, repair, severity="warning")
    if not has_rgb:
        findings.add(file, "at least one RGB image", "none", "name the modalities: rgb, nir, cp, sk", field="modality")
    builder = _Builder()
    parts: dict[str, int] = {}
    gallery: list[int] = []
    queries: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for row in rows:
        part = _CSV_PARTS[row.split]
        if row.identity not in has_rgb:
            continue
        if parts.setdefault(row.identity, part) != part:
            found = f"{quote(row.identity)} in another split than before"
            findings.add(file, "each person in one split", found, "correct it", line=row.line, field="split")
        caption = row.caption if row.modality == RGB else None
        camera = row.camera or None
        image = builder.add(row.path, stats[row.path], row.identity, row.modality, camera=camera, caption=caption)
        if row.split == "gallery" and row.modality == RGB:
            gallery.append(image)
        elif row.split == "query":
            queries.setdefault(MODALITIES[row.modality].upper(), []).append((row.identity, (image,)))
    roles = {row.split for row in rows}
    if len(roles & {"query", "gallery"}) == 1 or (queries and "test" in roles):
        found = "both test and query" if "test" in roles else f"{(roles & {'query', 'gallery'}).pop()} alone"
        findings.add(file, "query and gallery together, or test instead", found, "correct it", field="split")
    if findings.errors:
        return None
    cameras = {builder.cameras[row] for row in gallery}
    return builder.finish(
        "csv",
        file.parent,
        file,
        parts,
        lists=[file],
        gallery=gallery if queries else None,
        queries=queries,
        camera_rule=len(cameras) > 1,
        rule="the table's query and gallery lines" if queries else "",
    )


def _table(file: Path, findings: Findings) -> list[_Row] | None:
    """The usable lines of a table; None where there is no table."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        findings.add(file, "a table in UTF-8", f"byte {error.start} of another encoding", "save it as UTF-8")
        return None
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip().lower() for name in next(reader, [])]
    missing = [name for name in ("path", "identity") if name not in header]
    if missing or len(set(header)) < len(header):
        found = quote(",".join(header)) if header else "an empty file"
        expected = f"a header with path and identity, and perhaps {', '.join(COLUMNS[2:])}, each once"
        findings.add(file, expected, found, "write it into the first line", line=1)
        return None
    for name in header:
        if name not in COLUMNS:
            repair = "nothing to do, if it shall be left out"
            findings.add(file, f"{', '.join(COLUMNS)}", quote(name), repair, line=1, severity="warning")
    rows: list[_Row] = []
    lines: dict[str, int] = {}
    for values in reader:
        line = reader.line_num
        if not values:
            continue
        if len(values) != len(header):
            repair = "correct the line; a value with a comma needs quotes"
            findings.add(file, f"{many(len(header), 'value')}", f"{len(values)}", repair, line=line)
            continue
        given = dict(zip(header, (value.strip() for value in values), strict=True))
        path, identity = given["path"].replace("\\", "/"), given["identity"]
        modality = ALIASES.get(given.get("modality", "").lower() or "rgb")
        split = given.get("split", "").lower() or "train"
        for name, value in (("path", path), ("identity", identity)):
            if not value:
                findings.add(file, "a value", "none", "fill it in", line=line, field=name)
        if modality is None or modality == TEXT:
            repair = "correct it; a caption stands in the line of its RGB image"
            found = quote(given["modality"])
            findings.add(file, ", ".join(IMAGE_MODALITIES), found, repair, line=line, field="modality")
        if split not in _CSV_PARTS:
            findings.add(file, ", ".join(_CSV_PARTS), quote(split), "correct it", line=line, field="split")
        if path in lines:
            found = f"{quote(path)} again, as in line {lines[path]}"
            findings.add(file, "each image once", found, "take one of the lines out", line=line, field="path")
        elif path and identity and modality is not None and modality != TEXT and split in _CSV_PARTS:
            lines[path] = line
            caption = given.get("caption", "")
            if caption and modality != RGB:
                repair = "nothing to do: it is left out"
                found = f"one of modality {MODALITIES[modality]}"
                expected = "captions of RGB images"
                findings.add(file, expected, found, repair, line=line, field="caption", severity="warning")
            rows.append(_Row(path, identity, given.get("camera", ""), modality, caption, split, line))
    return rows


def _stats_of(root: Path, rows: Sequence[_Row], file: Path, findings: Findings) -> dict[str, _Stat]:
    """Size and time of every listed image, folder by folder; faults for those that are not there."""
    folders: dict[str, Files] = {}
    stats: dict[str, _Stat] = {}
    for row in rows:
        folder, _, name = row.path.rpartition("/")
        if folder not in folders:
            folders[folder] = _listed(root / folder)[1] if (root / folder).is_dir() else {}
        stat = folders[folder].get(name)
        if stat is None:
            known = name.lower().endswith(SUFFIXES)
            found = f"{quote(row.path)}, {'which does not exist' if known else 'whose ending is of no known kind'}"
            repair = "restore the image, or take out the line"
            findings.add(file, "an image that is there", found, repair, line=row.line, field="path")
            stat = (0, 0)
        stats[row.path] = stat
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# From records to people


def _frame(height: int, width: int, margin: float) -> Frame:
    for name, value in (("height", height), ("width", width)):
        if not 1 <= value <= _MAX_SIDE:
            raise DataError(f"--{name} is {value}; it must be 1 to {_MAX_SIDE} pixels, as {HEIGHT} x {WIDTH}")
    if not 0 <= margin <= 0.5:
        raise DataError(f"--margin is {margin:g}; it must be 0 to 0.5 of the height and the width, as {MARGIN}")
    return Frame(height, width, round(height * margin), round(width * margin))


def _images_of(found: _Records, wanted: _Size, path: Path) -> Images:
    """The images as they are seen; a pack's are of one size."""
    if found.packed is None:
        frame = _frame(
            HEIGHT if wanted.height is None else wanted.height,
            WIDTH if wanted.width is None else wanted.width,
            MARGIN if wanted.margin is None else wanted.margin,
        )
        return ImageFiles(found.root, frame, found.path)
    frame = found.packed.frame
    height, width = wanted.height or frame.height, wanted.width or frame.width
    if (height, width) != frame[:2] or (wanted.margin is not None and _frame(height, width, wanted.margin) != frame):
        raise DataError(
            f"{path} holds images of {frame.height} x {frame.width} with {frame.rows} rows and {frame.columns} columns "
            "of margin; leave --height, --width and --margin out, or prepare another pack"
        )
    return found.packed


def _add_too_few(findings: Findings, path: Path, count: int) -> None:
    repair = "add people, or hold fewer of them out"
    findings.add(path, "at least 2 identities to train on", f"{count}", repair)


def _divide(found: _Records, wanted: _Size, path: Path, *, val_share: float, seed: int) -> People:
    """People of records, identities of a part numbered together."""
    if not 0 <= val_share < 1:
        raise DataError(f"--val-share is {val_share:g}; it must be at least 0 and below 1, as 0.2")
    images = _images_of(found, wanted, path)
    trained, valid, test = ((found.part == part).nonzero().squeeze(1) for part in range(3))
    split = "the source's own"
    draws = not valid.numel() and val_share > 0
    if draws:
        count = max(1, round(trained.numel() * val_share))
        order = torch.randperm(trained.numel(), generator=make_generator(seed, stream=_SPLIT_STREAM))
        valid, trained = trained[order[:count]].sort().values, trained[order[count:]].sort().values
        split = f"{count} of {count + trained.numel()} training identities drawn to validate on (seed {seed})"
    if trained.numel() < 2:
        findings = Findings(path, limit=1)
        _add_too_few(findings, path, trained.numel())
        findings.raise_first()
    order_P = torch.cat([trained, valid, test])
    number_P = torch.empty_like(order_P)
    number_P[order_P] = torch.arange(order_P.numel())
    choices = [found.fingerprint, *images.frame, *((val_share, seed) if draws else ())]
    people = People(
        identity=number_P[found.identity],
        camera=found.camera,
        modality=found.modality,
        view=found.view,
        caption=found.caption,
        captions=found.captions,
        path=found.path,
        images=images,
        identity_ids=tuple(found.names[place] for place in order_P.tolist()),
        num_identities=trained.numel(),
        num_valid=valid.numel(),
        valid=None,
        test=None,
        fingerprint=joined_fingerprint((), choices),
        name=found.name,
        split=split,
    )
    first, last = people.num_identities, people.num_identities + people.num_valid
    in_valid = lists_by_rule(people, first, last) if people.num_valid else None
    in_test = None
    if found.gallery is not None:
        queries = {
            name: Queries(QUERY_LISTS.get(name, (RGB,)), rows[:, 1:], number_P[rows[:, 0]])
            for name, rows in found.queries.items()
        }
        in_test = Retrieval(found.gallery, queries, found.camera_rule, found.rule)
    elif test.numel():
        in_test = lists_by_rule(people, last, order_P.numel())
    return dataclasses.replace(people, valid=in_valid, test=in_test)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at every image


def _check_images(found: _Records, findings: Findings) -> None:
    """Faults of images that cannot be read, warnings of sizes that no picture of a person has."""
    if found.packed is not None:
        _check_packed(found, found.packed, findings)
        return
    for row in range(len(found.path)):
        file = found.root / found.path[row]
        try:
            height, width = read_image(file).shape[1:]
        except ImageError as error:
            findings.add(file, "a readable image", error.found, error.repair)
            continue
        sides = sorted((height, width))
        if sides[0] < _MIN_SIDE or sides[1] > _MAX_SIDE or sides[1] > _MAX_RATIO * sides[0]:
            expected = f"sides of {_MIN_SIDE} to {_MAX_SIDE} pixels, one at most {_MAX_RATIO} times the other"
            found_size = f"{width} x {height}"
            findings.add(file, expected, found_size, "look at it; take it out if it shows nobody", severity="warning")


def _check_packed(found: _Records, packed: PackedImages, findings: Findings) -> None:
    assert found.block_crc is not None
    for block, crc in enumerate(found.block_crc.tolist()):
        first = block * _BLOCK_IMAGES
        image = packed.image[first : first + _BLOCK_IMAGES]
        if _crc_of(image) != crc:
            last = first + len(image) - 1
            repair = write_again(_APP, found.origin)
            findings.add(packed.file, "the images that were written", f"others in rows {first} to {last}", repair)


def _crc_of(image: Tensor) -> int:
    data = bytearray(image.numel())
    torch.frombuffer(data, dtype=torch.uint8).copy_(image.reshape(-1))
    return zlib.crc32(data)


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def _images_file(pack: Path) -> Path:
    return pack.with_name(f"{pack.stem}.images.safetensors")


class _Work:
    """A pack that is being written, in a hidden folder beside it: images in place, and which blocks are finished."""

    def __init__(self, folder: Path, key: str, frame: Frame, num_images: int) -> None:
        self.folder, self.key, self.frame, self.num_images = folder, key, frame, num_images
        self.image_file, self.ledger = folder / "images.safetensors", folder / "finished"
        height, width = frame.stored
        self.image_bytes = 3 * height * width
        shape = [num_images, 3, height, width]
        entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, num_images * self.image_bytes]}
        text = json.dumps({"__metadata__": {"key": key}, "image": entry}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.finished: dict[int, int] = {}

    @classmethod
    def open(cls, output: Path, found: _Records, frame: Frame) -> "_Work":
        """The work on this pack, new or found; that on packs of another source or size under the same name goes."""
        key = joined_fingerprint((), [_PACK_LAYOUT, _BLOCK_IMAGES, found.fingerprint, *frame])
        name = re.compile(re.escape(f".{output.name}.") + r"[0-9a-f]{32}\.work")
        folder = output.with_name(f".{output.name}.{key}.work")
        for entry in output.parent.iterdir():
            if entry != folder and name.fullmatch(entry.name):
                shutil.rmtree(entry)
        folder.mkdir(exist_ok=True)
        remove_stale_temporaries(folder)
        work = cls(folder, key, frame, len(found.path))
        work._recall()
        return work

    def _recall(self) -> None:
        """Note the blocks that were finished before and are still whole."""
        if not self.ledger.is_file() or not self.image_file.is_file():
            return
        with self.image_file.open("rb") as file:
            if file.read(len(self.header)) != self.header:
                return
            for line in self.ledger.read_text("ascii").splitlines(keepends=True):
                match = re.fullmatch(r"(\d+) (\d+)\n", line)  # the last line of a killed writer may be a part of one
                if match is None or int(match[1]) >= self.num_blocks:
                    continue
                block, crc = int(match[1]), int(match[2])
                file.seek(self.offset(block))
                if zlib.crc32(file.read(len(self.rows(block)) * self.image_bytes)) == crc:
                    self.finished[block] = crc

    @property
    def num_blocks(self) -> int:
        return -(-self.num_images // _BLOCK_IMAGES)

    @property
    def num_done(self) -> int:
        """How many images are finished."""
        return sum(len(self.rows(block)) for block in self.finished)

    def rows(self, block: int) -> range:
        """The images of a block."""
        return range(block * _BLOCK_IMAGES, min((block + 1) * _BLOCK_IMAGES, self.num_images))

    def offset(self, block: int) -> int:
        """Where a block stands in the file."""
        return len(self.header) + block * _BLOCK_IMAGES * self.image_bytes

    def forecast(self, say: Say) -> None:
        """Say how much will be written, and give the file its size; raises DataError where the disk is too small."""
        size = self.num_images * self.image_bytes
        needed = size - self.num_done * self.image_bytes + _SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        height, width = self.frame.stored
        text = f"{many(self.num_images, 'image')} of {height} x {width} pixels take {_gigabytes(size)}"
        say(f"{text}; {_gigabytes(free)} are free")
        if needed > free:
            self._forget()
            raise DataError(
                f"{self.folder.parent}: {text}, and {_gigabytes(free)} are free; give another disk, or a smaller "
                "--height and --width, or train without a pack"
            )
        if not self.finished:
            self.ledger.unlink(missing_ok=True)
            with self.image_file.open("wb") as file:
                file.write(self.header)
                file.truncate(len(self.header) + size)

    def _forget(self) -> None:
        """Take the folder away where nothing is in it."""
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def finish(self, block: int, crc: int) -> None:
        """Note that a block is finished."""
        self.finished[block] = crc
        with self.ledger.open("a", encoding="ascii", newline="") as file:
            file.write(f"{block} {crc}\n")

    def write(self, output: Path, found: _Records) -> None:
        """Put the finished pack in its place."""
        with self.image_file.open("r+b") as file:
            os.fsync(file.fileno())
        crc = torch.tensor([self.finished[block] for block in range(self.num_blocks)], dtype=torch.int64)
        index = self.folder / "index.safetensors"
        _write_index(index, output, found, self.key, self.frame, crc)
        replace(self.image_file, _images_file(output))
        replace(index, output)
        fsync_folder(output.parent)
        shutil.rmtree(self.folder)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _decode_blocks(found: _Records, frame: Frame, work: _Work, workers: int | None) -> Iterator[tuple[int, int]]:
    """Every block that is not finished yet, written, with its checksum."""
    blocks = [block for block in range(work.num_blocks) if block not in work.finished]
    if workers is not None and workers < 1:
        raise DataError(f"{workers} workers cannot do anything; use at least 1")
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, -(-len(blocks) * _BLOCK_IMAGES // _IMAGES_PER_WORKER))
    workers = min(workers, len(blocks))

    def task(block: int) -> tuple[str, list[str], tuple[int, int], str, int]:
        paths = [found.path[row] for row in work.rows(block)]
        return str(found.root), paths, frame.stored, str(work.image_file), work.offset(block)

    try:
        if workers <= 1:
            for block in blocks:
                yield block, write_block(*task(block))
            return
        with ExitStack() as stack:
            pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
            stack.callback(pool.shutdown, cancel_futures=True)
            waiting: deque[tuple[int, Future[int]]] = deque()
            for block in blocks:
                waiting.append((block, pool.submit(write_block, *task(block))))
                if len(waiting) >= 2 * workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
    except ImageError as error:
        raise DataError(f"{error}; `check` lists all such files") from None
    except BrokenProcessPool:
        raise DataError(
            "a worker process was ended from outside, perhaps for lack of memory; run the command again, with fewer "
            "workers: finished blocks are kept"
        ) from None


def write_block(root: str, paths: Sequence[str], size: tuple[int, int], target: str, offset: int) -> int:
    """Decode images of this height and width into their place of a file; gives the checksum of what was written."""
    data = bytearray(len(paths) * 3 * size[0] * size[1])
    image_RCHW = torch.frombuffer(data, dtype=torch.uint8).view(len(paths), 3, *size)
    for place, path in enumerate(paths):
        image_RCHW[place] = load_image(Path(root) / path, *size)
    with open(target, "r+b") as file:
        file.seek(offset)
        file.write(data)
    return zlib.crc32(data)


def start_worker() -> None:
    """Make this worker process use one core, and die with its parent: one killed outright cannot tell its workers."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and stops the pool
        threading.Thread(target=_die_after, args=(parent.sentinel,), daemon=True).start()


def _die_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _write_index(file: Path, output: Path, found: _Records, key: str, frame: Frame, block_crc: Tensor) -> None:
    """Everything of a pack but its images."""
    names = make_texts(found.names)
    tensors = {
        "identity": found.identity,
        "camera": found.camera,
        "modality": found.modality,
        "view": found.view,
        "caption": found.caption,
        "part": found.part,
        "block_crc": block_crc,
        **{f"queries_{name}": rows for name, rows in found.queries.items()},
    }
    for name, texts in (("path", found.path), ("captions", found.captions), ("names", names)):
        tensors |= {f"{name}_data": texts.data, f"{name}_ptr": texts.ptr}
    if found.gallery is not None:
        tensors["gallery"] = found.gallery
    meta = {
        "kind": _PACK_KIND,
        "layout": _PACK_LAYOUT,
        "key": key,
        "frame": list(frame),
        "form": found.form,
        "origin": relative_path(found.origin, output.parent),
        "camera_rule": found.camera_rule,
        "rule": found.rule,
        "fingerprint": found.fingerprint,
        "name": found.name,
        "queries": list(found.queries),
    }
    write_pack(file, tensors, meta)


def _read_pack(file: Path, findings: Findings) -> _Records | None:
    """The memory-mapped contents of an undamaged pack whose source has not changed."""
    opened = open_pack(file, findings, app=_APP, kind=_PACK_KIND, layout=_PACK_LAYOUT)
    if opened is None:
        return None
    tensors, meta = opened
    frame, image_file, again = Frame(*meta["frame"]), _images_file(file), write_again(_APP, file)
    if not image_file.is_file():
        findings.add(image_file, "the images of the pack beside it", "no such file", f"put it there, or {again}")
        return None
    try:
        _, image_meta = read_safetensors(image_file)
        packed = open_images(image_file, frame)
    except DamagedFileError:
        findings.add(image_file, "an undamaged pack of images", "a damaged file", again)
        return None
    if image_meta.get("key") != meta["key"]:
        findings.add(image_file, "the images of the pack beside it", "those of another one", again)
        return None
    path, captions, names = (
        Texts(tensors[f"{name}_data"], tensors[f"{name}_ptr"]) for name in ("path", "captions", "names")
    )
    found = _Records(
        form="pack",
        root=file.parent,
        origin=file,
        path=path,
        identity=tensors["identity"],
        camera=tensors["camera"],
        modality=tensors["modality"],
        view=tensors["view"],
        caption=tensors["caption"],
        part=tensors["part"],
        block_crc=tensors["block_crc"],
        captions=captions,
        names=tuple(names),
        gallery=tensors.get("gallery"),
        queries={name: tensors[f"queries_{name}"] for name in meta["queries"]},
        camera_rule=meta["camera_rule"],
        rule=meta["rule"],
        fingerprint=meta["fingerprint"],
        name=meta["name"],
        packed=packed,
    )
    origin = file.parent / meta["origin"]
    if origin.exists():
        _refuse_stale(file, found, origin, meta, findings)
    return found


def _refuse_stale(file: Path, found: _Records, origin: Path, meta: Mapping[str, Any], findings: Findings) -> None:
    """A fault where the source of a pack is still there and is not what it was."""
    listing = Findings(origin, limit=1)
    now = _load(origin, meta["form"], listing)
    if now is not None and now.fingerprint == found.fingerprint:
        return
    if now is None:
        what = f"its source has a fault now: {listing.errors[0].found}"
    else:
        before, after = set(found.path), set(now.path)
        counts = ((len(after - before), "new"), (len(before - after), "gone"))
        told = [f"{many(count, 'image')} {word}" for count, word in counts if count]
        what = f"{', '.join(told) or 'images or lists have changed'} since"
    frame = found.packed.frame if found.packed is not None else Frame(HEIGHT, WIDTH, 0, 0)
    command = f"python -m apps.{_APP} prepare {shlex.quote(str(origin))} {shlex.quote(str(file))}"
    command += f" --format {meta['form']} --height {frame.height} --width {frame.width}"
    findings.add(file, f"a pack of {origin} as it is now", f"a stale pack: {what}", f"write it again: {command}")
