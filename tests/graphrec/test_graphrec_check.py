"""Each fault a source can have is found where it is, says what to do, and stops the reader when it is an error."""

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.graphrec import formats
from apps.graphrec.formats import DataError, check_source, prepare_source, read_data
from shared.files import read_pack, write_pack

LISTS = {"train.txt": "0 1 2\n1 0 3\n2 3 1\n", "valid.txt": "0 3\n1 2\n2 0\n", "test.txt": "0 0\n1 1\n2 2\n"}
TEXT = {
    "ratings.txt": "".join(f"{u} {i} {(u + i) % 5 + 1} {100 + u * i}\n" for u in range(12) for i in range(5) if u != i)
}
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
INTER = {"a.inter": HEADER + TEXT["ratings.txt"].replace(" ", "\t")}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is written over sound files, and parts of the fault that must be found."""

    files: dict[str, str | bytes | None]  # None: the file is left out
    file: str
    expected: str
    found: str
    repair: str
    line: int | None = None
    field: str | None = None
    severity: str = "error"
    base: dict[str, str] = dataclasses.field(default_factory=lambda: LISTS)
    more: int = 0  # further faults
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def lines(base: dict[str, str], changes: dict[int, str]) -> str:
    """The text of the one file of a base with some lines, counted from 1, replaced."""
    rows = next(iter(base.values())).split("\n")
    for number, row in changes.items():
        rows[number - 1] = row
    return "\n".join(rows)


def text_case(changes: dict[int, str], expected: str, found: str, repair: str, **more: Any) -> Case:
    return Case({"ratings.txt": lines(TEXT, changes)}, "ratings.txt", expected, found, repair, base=TEXT, **more)


def inter_case(changes: dict[int, str], expected: str, found: str, repair: str, **more: Any) -> Case:
    return Case({"a.inter": lines(INTER, changes)}, "a.inter", expected, found, repair, base=INTER, **more)


CASES: dict[str, Case] = {
    # LightGCN's files
    "no train": Case(
        {"train.txt": None}, "train.txt", "the file", "no such file", "copy it", options={"format": "lightgcn"}
    ),
    "no test": Case({"test.txt": None}, "test.txt", "the file", "no such file", "copy it into the folder"),
    "empty train": Case({"train.txt": ""}, "train.txt", "at least one line", "no bytes at all", "again"),
    "line ends": Case({"test.txt": "\n\r\n\n"}, "test.txt", "at least one line", "only line ends", "again"),
    "nothing to train on": Case({"train.txt": "0\n1\n"}, "train.txt", "at least one training pair", "none", "again"),
    "nothing to test on": Case(
        {"test.txt": "0\n1\n"}, "test.txt", "one pair to test on", "none", "hold some pairs out"
    ),
    "empty line": Case(
        {"train.txt": "0 1 2\n\n1 0 3\n2 3 1\n"}, "train.txt", "user item item", "an empty line", "delete", 2
    ),
    "blank line": Case(
        {"train.txt": "0 1 2\n1 0 3\n \t\n2 3 1"}, "train.txt", "user item item", "an empty line", "delete", 3
    ),
    "word as item": Case(
        {"train.txt": "0 1 2\n1 zero 3\n2 3 1\n"},
        "train.txt",
        "integers from 0 up",
        "'zero'",
        "ids of any kind",
        2,
        "item",
    ),
    "word as user": Case(
        {"test.txt": "0 0\n1 1\nuser 1\n2 2\n"},
        "test.txt",
        "integers from 0 up",
        "'user'",
        "ids of any kind",
        3,
        "user",
    ),
    "header": Case(
        {"train.txt": "user items\n0 1 2\n1 0 3\n2 3 1\n"},
        "train.txt",
        "integers",
        "'user'",
        "number",
        1,
        "user",
        more=1,
    ),
    "negative item": Case(
        {"train.txt": "0 1 2\n1 0 3\n2 -3 1\n"}, "train.txt", "integers from 0 up", "'-3'", "from 0 on", 3, "item"
    ),
    "negative user": Case(
        {"valid.txt": "0 3\n-1 2\n2 0\n"}, "valid.txt", "integers from 0 up", "'-1'", "from 0", 2, "user"
    ),
    "float": Case(
        {"train.txt": "0 1 2.0\n1 0 3\n2 3 1\n"}, "train.txt", "integers from 0 up", "'2.0'", "number", 1, "item"
    ),
    "leading zero": Case(
        {"train.txt": "0 1 02\n1 0 3\n2 3 1\n"}, "train.txt", "integers", "'02'", "without leading zeros", 1, "item"
    ),
    "huge": Case(
        {"train.txt": f"0 1 {10**30}\n1 0 3\n2 3 1\n"}, "train.txt", "integers", "'1000000", "below 2**31", 1, "item"
    ),
    "above int32": Case(
        {"train.txt": f"0 1 {2**31}\n1 0 3\n2 3 1\n"}, "train.txt", "integers", "'2147483648'", "below 2**31", 1, "item"
    ),
    "commas": Case(
        {"train.txt": "0,1,2\n1 0 3\n2 3 1\n"}, "train.txt", "integers", "'0,1,2'", "separate ids by blanks", 1, "user"
    ),
    "far apart": Case(
        {"train.txt": "0 1 2\n1 0 3000\n2 3 1\n"},
        "train.txt",
        "items numbered from 0",
        "item 3000 among 12 pairs",
        "gaps",
        field="item",
    ),
    "users far apart": Case(
        {"test.txt": "0 0\n1 1\n200000000 2\n"},
        "train.txt",
        "users numbered",
        "user 200000000 among",
        "gaps",
        field="user",
    ),
    "tested and trained": Case(
        {"test.txt": "0 0\n1 3 1\n2 2\n"},
        "test.txt",
        "a pair that train.txt does not have",
        "user 1 with item 3, which train.txt has too",
        "delete it from one",
        2,
        "item",
    ),
    "validated and trained": Case(
        {"valid.txt": "0 3\n1 2\n2 0 1\n"},
        "valid.txt",
        "that train.txt does not",
        "user 2 with item 1",
        "delete it",
        3,
        "item",
    ),
    "tested and validated": Case(
        {"test.txt": "0 0 3\n1 1\n2 2\n"},
        "test.txt",
        "that valid.txt does not",
        "user 0 with item 3",
        "delete it",
        1,
        "item",
    ),
    "item twice": Case(
        {"train.txt": "0 1 2\n1 0 3 0 0\n2 3 1\n"},
        "train.txt",
        "each item of a user once",
        "2 repeated items (first: user 1 with item 0)",
        "nothing to do",
        2,
        "item",
        "warning",
    ),
    "user twice": Case(
        {"train.txt": "0 1 2\n1 0 3\n2 3\n2 1\n0 3\n", "valid.txt": "1 2\n2 0\n"},
        "train.txt",
        "one line per user",
        "2 further lines (first: user 2 again, as on line 3)",
        "lines are joined",
        4,
        "user",
        "warning",
    ),
    "tested but not trained": Case(
        {"test.txt": "0 0\n1 1\n2 2\n3 1\n"},
        "test.txt",
        "a training item of each user here",
        "1 of 4 without (first: '3')",
        "nothing to do",
        severity="warning",
    ),
    "idle user": Case(
        {"train.txt": "0 1 2\n1 0 3\n2 3 1\n5\n"},
        "train.txt",
        "an item of each user",
        "3 of 6 without (first: '3')",
        "nothing is learnt or measured",
        severity="warning",
    ),
    "idle item": Case(
        {"test.txt": "0 0\n1 1\n2 2 5\n"},
        "train.txt",
        "a training pair of each item",
        "2 of 6 without (first: '4')",
        "nothing is learnt of them",
        severity="warning",
    ),
    "Latin-1": Case(
        {"train.txt": b"0 1 2\n1 0 \xe9\n"}, "train.txt", "UTF-8", "byte 0xe9", "save the file as UTF-8", 2
    ),
    "NUL": Case({"test.txt": b"0 0\n1 1\n2 \x002\n"}, "test.txt", "text", "a NUL byte", "UTF-16", 3),
    "UTF-16": Case({"train.txt": "0 1 2\n".encode("utf-16-le")}, "train.txt", "text", "a NUL byte", "UTF-16", 1),
    # names of users and items
    "unnamed item": Case(
        {"item_list.txt": "org_id remap_id\na 0\nb 1\nc 2\n"},
        "train.txt",
        "a remap_id of item_list.txt, which has 0..2",
        "3",
        "add its line to item_list.txt",
        2,
        "item",
        more=2,
    ),
    "unnamed user": Case(
        {"user_list.txt": "org_id remap_id\na 0\nb 1\n"},
        "train.txt",
        "which has 0..1",
        "2",
        "add its line",
        3,
        "user",
        more=2,
    ),
    "no header of names": Case(
        {"item_list.txt": "a 0\nb 1\n"},
        "item_list.txt",
        "one column org_id",
        "'a 0'",
        "write the header",
        1,
        "org_id",
        more=1,
    ),
    "no name": Case(
        {"user_list.txt": "org_id remap_id\n"}, "user_list.txt", "from 0 on", "only the header", "add", field="remap_id"
    ),
    "name missing": Case(
        {"user_list.txt": "org_id remap_id\na 0\nc 2\n"},
        "user_list.txt",
        "every remap_id",
        "no 1",
        "add",
        field="remap_id",
    ),
    "name twice": Case(
        {"user_list.txt": "org_id remap_id\na 0\na 1\nc 2\n"},
        "user_list.txt",
        "once",
        "'a' again",
        "delete",
        3,
        "org_id",
    ),
    "number twice": Case(
        {"user_list.txt": "org_id remap_id\na 0\nb 0\nc 2\n"},
        "user_list.txt",
        "once",
        "'0' again",
        "delete",
        3,
        "remap_id",
    ),
    "name without number": Case(
        {"user_list.txt": "org_id remap_id\na 0\nb\nc 2\n"}, "user_list.txt", "2 fields", "1 field ('b')", "complete", 3
    ),
    "word as number": Case(
        {"user_list.txt": "org_id remap_id\na 0\nb x\nc 2\n"},
        "user_list.txt",
        "integer",
        "'x'",
        "correct",
        3,
        "remap_id",
    ),
    # text
    "empty text": Case({"ratings.txt": ""}, "ratings.txt", "at least one line", "no bytes", "again", base=TEXT),
    "short line": text_case(
        {3: "0 3"}, "4 fields (user item rating time)", "2 fields ('0 3')", "complete or delete", line=3
    ),
    "long line": text_case({3: "0 3 1 100 7"}, "4 fields", "5 fields ('0 3 1 100 7')", "one event per line", line=3),
    "hole": text_case({3: ""}, "4 fields", "an empty line", "delete the line", line=3),
    "MovieLens": text_case({3: "0::3::1::100"}, "4 fields", "1 field", "replace each '::' by a blank", line=3),
    "all MovieLens": Case(
        {"ratings.txt": "1::2::3::4\n1::3::3::4\n"},
        "ratings.txt",
        "2 fields (user item)",
        "1 field",
        "replace each '::'",
        1,
        base=TEXT,
        more=1,
    ),
    "rating word": text_case(
        {3: "0 3 good 100"}, "a rating as a finite number", "'good'", "write a number", line=3, field="rating"
    ),
    "time word": text_case(
        {4: "0 4 1 now"}, "a time as a finite number", "'now'", "write a number", line=4, field="time"
    ),
    "infinite": text_case({4: "0 4 inf 100"}, "a rating as a finite number", "'inf'", "write", line=4, field="rating"),
    "no number": text_case({4: "0 4 1 nan"}, "a time as a finite number", "'nan'", "write", line=4, field="time"),
    "both words": text_case({4: "0 4 a b"}, "a rating as a", "'a'", "write", line=4, field="rating", more=1),
    "header of text": Case(
        {"ratings.txt": "user item\n0 1\n0 2\n1 2\n"},
        "ratings.txt",
        "an event",
        "a header line ('user item')",
        "delete",
        1,
        base=TEXT,
    ),
    "lists as text": Case(
        {"ratings.txt": "0 1 2 3 4 5\n1 2 3\n2 4 6 7\n"},
        "ratings.txt",
        "3 fields",
        "6 fields",
        "train.txt and test.txt",
        1,
        base=TEXT,
        more=1,
    ),
    "one item": Case(
        {"ratings.txt": "0 7\n1 7\n2 7\n"},
        "ratings.txt",
        "at least two items",
        "the one item '7'",
        "second column",
        base=TEXT,
    ),
    "one item each": Case(
        {"ratings.txt": "0 7\n1 8\n2 7\n"},
        "ratings.txt",
        "users with at least two items",
        "none",
        "add events",
        base=TEXT,
    ),
    "event twice": text_case(
        {3: "0 1 1 100"},
        "each pair once",
        "1 repeated event (first: user '0' with item '1')",
        "the first counts",
        line=3,
        severity="warning",
    ),
    "Latin-1 text": Case(
        {"ratings.txt": b"0 1\n0 \xe9\n1 2\n"}, "ratings.txt", "UTF-8", "byte 0xe9", "as UTF-8", 2, base=TEXT
    ),
    # RecBole's files
    "short row": inter_case({3: "0\t2\t3"}, "4 tab-separated fields (user_id:token", "3 fields", "single tabs", line=3),
    "blanks": inter_case({3: "0 2 3 100"}, "4 tab-separated fields", "1 field ('0 2 3 100')", "single tabs", line=3),
    "empty row": inter_case({3: ""}, "4 tab-separated fields", "an empty line", "delete the line", line=3),
    "no id": inter_case({3: "0\t\t3\t100"}, "an id", "an empty field", "fill it in", line=3, field="item"),
    "no rating": inter_case(
        {3: "0\t2\t\t100"}, "a rating as", "an empty field", "write a number", line=3, field="rating"
    ),
    "no item column": inter_case(
        {1: "user_id:token\titem:token\trating:float\ttimestamp:float"},
        "one column item_id:token",
        "'user_id:token item:token",
        "name one column item_id:token",
        line=1,
        field="item_id",
    ),
    "column twice": inter_case(
        {1: "user_id:token\titem_id:token\trating:float\trating:float"},
        "one column rating:float",
        "'user_id",
        "name one",
        line=1,
        field="rating",
    ),
    "wrong kind": inter_case(
        {1: "user_id:token\titem_id:token\trating:token\ttimestamp:float"},
        "rating:float",
        "'rating:token'",
        "type float",
        line=1,
        field="rating",
    ),
    "only a header": Case({"a.inter": HEADER}, "a.inter", "at least one event", "none", "again", base=INTER),
}


def write(folder: Path, base: dict[str, str], changes: dict[str, str | bytes | None]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**base, **changes}.items():
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.mark.parametrize("base", [LISTS, TEXT, INTER], ids=["lists", "text", "inter"])
def test_sound_files_have_no_fault(tmp_path, base):
    folder = write(tmp_path, base, {})
    assert check_source(folder) == []
    read_data(folder)


SEEN_IN_THE_FIRST_BLOCK = ("lists as text", "header of text", "short line")  # the number of fields, and a header


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in CASES for block in (9, 1 << 20) if block > 9 or name not in SEEN_IN_THE_FIRST_BLOCK],
)
def test_the_fault_is_found(tmp_path, monkeypatch, name, block):
    case = CASES[name]
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
    folder = write(tmp_path / "data", case.base, case.files)
    fault, *more = check_source(folder, **case.options)
    assert Path(fault.file) == folder / case.file
    assert (fault.line, fault.field, fault.severity, fault.row) == (case.line, case.field, case.severity, None)
    assert case.expected in fault.expected
    assert case.found in fault.found
    assert case.repair in fault.repair
    assert len([other for other in more if other.severity == case.severity]) == case.more
    assert str(fault).isascii()
    if case.severity == "warning":
        read_data(folder)
        return
    with pytest.raises(DataError) as raised:
        read_data(folder, **case.options)
    assert str(raised.value) == str(fault)


def test_faults_are_listed_up_to_the_limit_and_the_rest_is_counted(tmp_path):
    rows = "".join(f"{user} x{user} y\n" for user in range(30))
    folder = write(tmp_path, LISTS, {"train.txt": rows + "0 1\n0 2\n1 0 3\n2 3 1\n"})
    faults = check_source(folder, limit=5)
    assert [fault.line for fault in faults] == [1, 1, 2, 2, 3, None]
    assert faults[-1].found == "55 more errors and 1 more warning"
    assert len(check_source(folder, limit=1000)) == 61


def test_errors_stand_before_warnings(tmp_path):
    folder = write(tmp_path, LISTS, {"train.txt": "0 1 2 2\n1 0 3\n2 3 1\n", "test.txt": "0 0\n1 1\n2 2 3\n"})
    assert [fault.severity for fault in check_source(folder)] == ["error", "warning"]


# What is no source


def test_a_path_without_a_source_is_told_with_what_is_there(tmp_path):
    missing = tmp_path / "nothing"
    (fault,) = check_source(missing)
    assert fault.found == "nothing at this path"
    (fault,) = check_source(tmp_path)
    assert fault.found == "0 such files (the folder is empty)"
    write(tmp_path, {}, {"a.txt": "x", "b.txt": "y", "notes.md": "z"})
    (fault,) = check_source(tmp_path)
    assert "exactly one .inter or .safetensors or .txt file" in fault.expected
    assert fault.found == "2 such files (a.txt, b.txt, notes.md)"
    with pytest.raises(DataError, match="CLCRec's files"):
        read_data(tmp_path)
    (fault,) = check_source(tmp_path, format="inter")
    assert fault.found == "0 such files (a.txt, b.txt, notes.md)"


def test_one_file_of_a_folder_is_not_taken_for_text(tmp_path):
    folder = write(tmp_path / "lists", LISTS, {})
    (fault,) = check_source(folder / "train.txt")
    assert fault.repair == f"give the folder: {folder}"
    for format in ("lightgcn", "clcrec"):  # noqa: A001
        (fault,) = check_source(folder / "train.txt", format=format)
        assert fault.found == "the file train.txt"
        assert str(folder) in fault.repair


def test_a_broken_clcrec_folder_is_told_as_its_reader_tells_it(tmp_path):
    write(tmp_path, {}, {"train.npy": b"0 3\n"})
    faults = check_source(tmp_path)
    assert {Path(fault.file).name for fault in faults} >= {"train.npy", "warm_set.npy", "val_full.npy", "test_full.npy"}
    with pytest.raises(DataError) as raised:
        read_data(tmp_path)
    assert str(raised.value) == str(faults[0])


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (LISTS, {"format": "csv"}, "--format is 'csv'; it must be one of auto, lightgcn,"),
        (LISTS, {"valid_share": 1.0}, "--valid-share is 1; it must be at least 0 and below 1"),
        (LISTS, {"valid_share": -0.1}, "--valid-share is -0.1"),
        (LISTS, {"split": "global"}, "--split is 'global'; it must be random or time"),
        (LISTS, {"min_rating": 3}, "holds no ratings, so that a smallest one means nothing; leave --min-rating out"),
        (LISTS, {"split": "time"}, "is split already and holds no times; leave --split out"),
        ({"a.txt": "0 1\n0 2\n"}, {"min_rating": 3}, "a.txt has no ratings; leave --min-rating out"),
        ({"a.txt": "0 1 5\n0 2 5\n"}, {"split": "time"}, "a.txt has no times to split by; leave --split out"),
        ({"a.txt": "0 1 5\n0 2 5\n"}, {"min_rating": 6}, "a.txt has no rating of at least 6; lower --min-rating"),
        (
            {"a.txt": "0 1 5\n0 2 4\n"},
            {"min_rating": 5},
            "expected users with at least two items, found none; add events",
        ),
    ],
)
def test_choices_that_mean_nothing_are_refused(tmp_path, base, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_data(write(tmp_path, base, {}), **options)


# Packs


def test_an_output_that_is_no_pack_and_a_source_that_is_one_are_refused(tmp_path):
    folder = write(tmp_path / "lists", LISTS, {})
    with pytest.raises(DataError, match=r"must end in \.safetensors; write to .*out\.safetensors"):
        prepare_source(folder, tmp_path / "out.pack")
    prepare_source(folder, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="is already a pack"):
        prepare_source(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_source_with_errors_is_not_prepared(tmp_path):
    folder = write(tmp_path / "lists", LISTS, {"train.txt": "0 -1\n"})
    with pytest.raises(DataError, match="'-1'"):
        prepare_source(folder, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_a_damaged_or_foreign_pack_is_refused(tmp_path):
    pack = tmp_path / "a.safetensors"
    prepare_source(write(tmp_path / "lists", LISTS, {}), pack)
    sound = pack.read_bytes()
    flipped = bytearray(sound)
    flipped[-3] ^= 1
    for content, expected in (
        (bytes(flipped), "an undamaged pack"),
        (sound[:-9], "an undamaged pack"),
        (b"", "an undam"),
    ):
        pack.write_bytes(content)
        (fault,) = check_source(pack)
        assert expected in fault.expected
        assert "python -m apps.graphrec prepare SOURCE" in fault.repair
    write_pack(pack, {"x": torch.ones(2)}, {"kind": "clcrec data"})
    (fault,) = check_source(pack)
    assert fault.expected == "a pack of graphrec"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train_ptr", None, "a tensor train_ptr"),
        ("train_item", torch.zeros(6), "train_item as a row of torch.int32"),
        ("test_ptr", torch.tensor([0, 1, 3]), "test_ptr of 4 numbers"),
        ("test_ptr", torch.tensor([0, 2, 1, 3]), "test_ptr that rises from 0 to 3"),
        ("test_ptr", torch.tensor([1, 1, 2, 3]), "test_ptr that rises from 0 to 3"),
        ("valid_item", torch.tensor([3, 2, 4], dtype=torch.int32), "valid_item in 0..3"),
        ("valid_item", torch.tensor([3, -1, 0], dtype=torch.int32), "valid_item in 0..3"),
        ("train_item", torch.tensor([2, 1, 0, 3, 1, 3], dtype=torch.int32), "train_item that rises within a user"),
        ("train_item", torch.tensor([1, 1, 0, 3, 1, 3], dtype=torch.int32), "train_item that rises within a user"),
        ("is_cold", torch.zeros(3, dtype=torch.bool), "is_cold of 4 items"),
        ("feat_v", torch.zeros(3, 2), "feat_v as float32 (4, features)"),
        ("feat_t", torch.zeros(4, 2, dtype=torch.float64), "feat_t as float32 (4, features)"),
    ],
)
def test_a_pack_whose_tensors_describe_no_data_is_refused(tmp_path, name, value, expected):
    pack = tmp_path / "a.safetensors"
    prepare_source(write(tmp_path / "lists", LISTS, {}), pack)
    tensors, meta = read_pack(pack, kind="graphrec data")
    tensors = {key: tensor.clone() for key, tensor in tensors.items() if key != name}
    write_pack(pack, tensors if value is None else {**tensors, name: value}, meta)
    (fault,) = check_source(pack)
    assert expected in fault.expected
    with pytest.raises(DataError):
        read_data(pack)


def test_a_pack_of_another_layout_is_refused(tmp_path):
    pack = tmp_path / "a.safetensors"
    prepare_source(write(tmp_path / "lists", LISTS, {}), pack)
    tensors, meta = read_pack(pack, kind="graphrec data")
    write_pack(pack, {key: tensor.clone() for key, tensor in tensors.items()}, {**meta, "layout": 99})
    (fault,) = check_source(pack)
    assert fault.found == "layout 99 of another version"


# Anything at all


@pytest.mark.parametrize("base", [LISTS, TEXT, INTER], ids=["lists", "text", "inter"])
def test_no_garbled_file_makes_the_checker_fail(tmp_path, base):
    draw = random.Random(0)
    stuff = [b" ", b"\n", b"\t", b"\r", b"-", b"0", b"99999999999", b"x", b".", b"\xff", b"\0", b"\n\n", b"1e9", b":"]
    for n in range(60):
        folder = write(tmp_path / str(n), base, {})
        path = folder / draw.choice(list(base))
        data = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.randint(0, 3)] = draw.choice(stuff)
        path.write_bytes(data)
        faults = check_source(folder)
        errors = [str(fault) for fault in faults if fault.severity == "error"]
        if errors:
            with pytest.raises(DataError) as raised:
                read_data(folder)
            assert str(raised.value) == errors[0]
        else:
            read_data(folder)
