"""Each fault a source can have is found where it is, says what to do, and stops the reader when it is an error."""

import dataclasses
import random
import struct
from typing import Any

import pytest
import torch

from apps.seqrec.formats import DataError, Fault, check_source, read_sequences, write_sequences
from shared.files import read_pack, read_safetensors, write_pack, write_safetensors

GOOD_PAIRS = "".join(f"{u} {i}\n" for u in (1, 2, 3) for i in (4, 5, 6))
GOOD_TIMED = "".join(f"{u} {i} {1000 + i}\n" for u in (1, 2, 3) for i in (4, 5, 6))
GOOD_LINES = "1 4 5 6\n2 4 5 6 7\n3 7 6 5\n"
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
GOOD_INTER = HEADER + "".join(f"{u}\t{i}\t3\t{1000 + i}\n" for u in (1, 2, 3) for i in (4, 5, 6))

# name of the case: file, contents, severity, line, field, expected, found, repair (each a part of that text)
CASES: dict[str, tuple[Any, ...]] = {
    "empty file": ("a.txt", "", "error", None, None, "at least one event", "no bytes", "write or download"),
    "blank file": ("a.txt", " \n\n", "error", None, None, "at least one event", "only blanks", "write or download"),
    "NUL byte": ("a.txt", "1 2\n1 \0\n", "error", 2, None, "text", "NUL byte at offset 6 (1 NUL byte", "UTF-16"),
    "not UTF-8": ("a.txt", b"1 2\n1 3\n1 caf\xe9\n", "error", 3, None, "UTF-8", "byte 0xe9", "save the file as UTF-8"),
    "pairs: too few fields": (
        "a.txt",
        GOOD_PAIRS + "7\n",
        "error",
        10,
        None,
        "2 fields (user item)",
        "1 field ('7')",
        "complete or delete",
    ),
    "pairs: too many fields": (
        "a.txt",
        "1 4\n1 5 6 7\n" + GOOD_PAIRS,
        "error",
        2,
        None,
        "2 fields (user item)",
        "4 fields ('1 5 6 7')",
        "one event per line, or read the file as lines",
    ),
    "timed pairs: no time": (
        "a.txt",
        GOOD_TIMED + "1 4\n",
        "error",
        10,
        None,
        "3 fields (user item time)",
        "2 fields ('1 4')",
        "complete or delete",
    ),
    "pairs: empty line inside": (
        "a.txt",
        GOOD_PAIRS + "\n3 4\n",
        "error",
        10,
        None,
        "2 fields (user item)",
        "an empty line",
        "delete the line",
    ),
    "pairs: header": (
        "a.txt",
        "user item\n" + GOOD_PAIRS,
        "error",
        1,
        None,
        "an event",
        "a header line ('user item')",
        "delete the line",
    ),
    "timed pairs: header": (
        "a.txt",
        "user item time\n" + GOOD_TIMED,
        "error",
        1,
        None,
        "an event",
        "a header line",
        "delete the line",
    ),
    "lines: header": (
        "a.txt",
        "user items\n" + GOOD_LINES,
        "error",
        1,
        None,
        "an event",
        "a header line",
        "delete the line",
    ),
    "pairs: item 0": (
        "a.txt",
        GOOD_PAIRS + "3 0\n3 0\n3 0\n",
        "error",
        10,
        "item",
        "item ids from 1 up",
        "item 0 (3 lines), but 0 is the padding id of that format",
        "adding 1",
    ),
    "one item": (
        "a.txt",
        "1 5\n1 5\n1 5\n",
        "error",
        None,
        None,
        "at least two items",
        "the one item '5'",
        "second column",
    ),
    "lines: comma separated": (
        "a.txt",
        GOOD_LINES + "4,4,5\n",
        "error",
        4,
        None,
        "at least one item",
        "user '4,4,5' without items",
        "replace each ',' by a blank",
    ),
    "lines: user without items": (
        "a.txt",
        GOOD_LINES + "9\n",
        "error",
        4,
        None,
        "at least one item after the user",
        "user '9' without items",
        "complete or delete",
    ),
    "lines: empty line inside": (
        "a.txt",
        "1 4 5 6\n\n2 4 5 6 7\n",
        "error",
        2,
        None,
        "user item item",
        "an empty line",
        "delete the line",
    ),
    "lines: user again": (
        "a.txt",
        GOOD_LINES + "2 5 6 4 4 4\n",
        "error",
        4,
        "user",
        "one line per user",
        "user '2' again (first on line 2)",
        "join the user's lines",
    ),
    "time: not a number": (
        "a.txt",
        GOOD_TIMED + "1 4 soon\n",
        "error",
        10,
        "time",
        "a time in seconds as a number",
        "'soon'",
        "write seconds since 1970",
    ),
    "time: underscore": (
        "a.txt",
        GOOD_TIMED + "1 4 1_000\n",
        "error",
        10,
        "time",
        "a time in seconds as a number",
        "'1_000'",
        "write seconds since 1970",
    ),
    "time: NaN": (
        "a.txt",
        GOOD_TIMED + "1 4 nan\n",
        "error",
        10,
        "time",
        "a finite time",
        "'nan'",
        "give the event a time",
    ),
    "time: infinite": (
        "a.txt",
        GOOD_TIMED + "1 4 -inf\n",
        "error",
        10,
        "time",
        "a finite time",
        "'-inf'",
        "give the event a time",
    ),
    "time: negative": (
        "a.txt",
        GOOD_TIMED + "1 4 -5\n",
        "error",
        10,
        "time",
        "a time of 0 or later",
        "'-5'",
        "shift all times",
    ),
    "time: negative fraction": (
        "a.txt",
        GOOD_TIMED + "1 4 -0.5\n",
        "error",
        10,
        "time",
        "a time of 0 or later",
        "'-0.5'",
        "shift all times",
    ),
    "time: too large": (
        "a.txt",
        GOOD_TIMED + "1 4 1e300\n",
        "error",
        10,
        "time",
        "a time below 9e+18",
        "'1e300'",
        "write seconds since 1970",
    ),
    "time: mixed units": (
        "a.txt",
        GOOD_TIMED + "1 7 1500000000000\n2 7 1500000000001\n",
        "error",
        10,
        "time",
        "times in one unit (seconds, as on line 1)",
        "1500000000000, which looks like milliseconds (2 such lines)",
        "convert all times to seconds",
    ),
    "time: all milliseconds": (
        "a.txt",
        "".join(f"{u} {i} 15000000000{i:02d}\n" for u in (1, 2) for i in (4, 5, 6)),
        "warning",
        None,
        "time",
        "times in seconds",
        "times from 1500000000004 on, which look like milliseconds",
        "convert them",
    ),
    "time: ratings": (
        "a.txt",
        "".join(f"{u} {i} {i - 1}\n" for u in (1, 2) for i in (4, 5, 6)),
        "warning",
        None,
        "time",
        "times in seconds",
        "no time above 5, which looks like ratings",
        "put the time",
    ),
    "time: out of order": (
        "a.txt",
        GOOD_TIMED + "2 9 1001\n2 8 1000\n3 9 2000\n",
        "warning",
        10,
        "time",
        "each user's events in time order",
        "2 events earlier than the one before, first of user '2'",
        "they are sorted by time",
    ),
    "pairs: users come and go": (
        "a.txt",
        GOOD_PAIRS + "2 7\n1 8\n2 9\n",
        "warning",
        10,
        "user",
        "each user's lines together",
        "user '2' again after others (2 such users)",
        "add times as a third column",
    ),
    "event repeated": (
        "a.txt",
        GOOD_TIMED + "3 6 1006\n1 7 2000\n1 8 2000\n3 6 1006\n",
        "warning",
        10,
        None,
        "each event once",
        "2 repeated events, first user '3' with item '6' at 1006",
        "delete the copies",
    ),
    "few events": (
        "a.txt",
        GOOD_PAIRS + "8 4\n9 4\n9 5\n",
        "warning",
        None,
        None,
        "at least 3 events per user",
        "2 of 5 users with fewer, e.g. user '8' with 1",
        "not evaluated",
    ),
    "pairs: user 0": (
        "a.txt",
        "0 4\n0 5\n0 6\n" + GOOD_PAIRS,
        "warning",
        1,
        "user",
        "ids from 1 up",
        "1 id of 0 or below, e.g. 0",
        "nothing to do if they are names",
    ),
    "pairs: negative item": (
        "a.txt",
        GOOD_PAIRS + "3 -1\n",
        "warning",
        10,
        "item",
        "ids from 1 up",
        "1 id of 0 or below, e.g. -1",
        "if they mean 'missing'",
    ),
    "lines: item 0": (
        "a.txt",
        GOOD_LINES + "4 5 0 -3 4\n",
        "warning",
        4,
        "item",
        "ids from 1 up",
        "2 ids of 0 or below, e.g. -3",
        "nothing to do if they are names",
    ),
    "inter: no user column": (
        "a.inter",
        GOOD_INTER.replace("user_id", "uid"),
        "error",
        1,
        "user_id",
        "a column user_id:token in the header",
        "'uid:token item_id:token",
        "rename or add the column",
    ),
    "inter: no item column": (
        "a.inter",
        GOOD_INTER.replace("item_id", "iid"),
        "error",
        1,
        "item_id",
        "a column item_id:token in the header",
        "iid:token",
        "rename or add the column",
    ),
    "inter: column twice": (
        "a.inter",
        GOOD_INTER.replace("rating:float", "item_id:token"),
        "error",
        1,
        "item_id",
        "one column item_id",
        "2 columns item_id",
        "remove or rename all but one",
    ),
    "inter: wrong type": (
        "a.inter",
        GOOD_INTER.replace("timestamp:float", "timestamp:token"),
        "error",
        1,
        "timestamp",
        "timestamp:float",
        "'timestamp:token'",
        "give the column the type float",
    ),
    "inter: no type": (
        "a.inter",
        GOOD_INTER.replace("user_id:token", "user_id"),
        "error",
        1,
        "user_id",
        "user_id:token",
        "'user_id'",
        "give the column the type token",
    ),
    "inter: too few fields": (
        "a.inter",
        GOOD_INTER + "1\t4\t3\n",
        "error",
        11,
        None,
        "4 tab-separated fields as in the header",
        "3 fields ('1\\t4\\t3')",
        "single tabs",
    ),
    "inter: too many fields": (
        "a.inter",
        GOOD_INTER + "1\t4\t3\t1000\t\n",
        "error",
        11,
        None,
        "4 tab-separated fields as in the header",
        "5 fields",
        "single tabs",
    ),
    "inter: empty line inside": (
        "a.inter",
        GOOD_INTER + "\n1\t4\t3\t2000\n",
        "error",
        11,
        None,
        "4 tab-separated fields",
        "an empty line",
        "delete the line",
    ),
    "inter: empty user": (
        "a.inter",
        GOOD_INTER + "\t4\t3\t2000\n",
        "error",
        11,
        "user_id",
        "a value",
        "an empty field",
        "fill it in",
    ),
    "inter: empty time": (
        "a.inter",
        GOOD_INTER + "1\t4\t3\t\n",
        "error",
        11,
        "timestamp",
        "a value",
        "an empty field",
        "fill it in",
    ),
    "inter: only a header": (
        "a.inter",
        HEADER,
        "error",
        1,
        None,
        "rows below the header",
        "only the header",
        "write or download",
    ),
    "inter: time is no number": (
        "a.inter",
        GOOD_INTER + "1\t4\t3\tnever\n",
        "error",
        11,
        "timestamp",
        "a time in seconds as a number",
        "'never'",
        "write seconds since 1970",
    ),
}


def check_one(path, severity, line, field, expected, found, repair) -> None:
    """The source has this fault and no other, and the reader's behaviour follows from its severity."""
    faults = check_source(path)
    assert len(faults) == 1, [str(fault) for fault in faults]
    fault = faults[0]
    assert (fault.file, fault.severity, fault.line, fault.field) == (str(path), severity, line, field)
    assert expected in fault.expected
    assert found in fault.found
    assert repair in fault.repair
    assert "\n" not in str(fault)
    assert str(fault).isascii()
    if severity == "warning":
        assert read_sequences(path).num_events > 0
    else:
        with pytest.raises(DataError) as caught:
            read_sequences(path)
        assert str(caught.value).startswith(str(fault))


@pytest.mark.parametrize("case", CASES)
def test_the_fault_is_found(tmp_path, case):
    name, contents, *rest = CASES[case]
    path = tmp_path / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    check_one(path, *rest)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", GOOD_PAIRS), ("a.txt", GOOD_TIMED), ("a.txt", GOOD_LINES), ("a.inter", GOOD_INTER)],
)
def test_a_sound_file_has_no_fault(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert check_source(path) == []
    write_sequences(tmp_path / "pack.safetensors", read_sequences(path), source=path)
    assert check_source(tmp_path / "pack.safetensors") == []


def test_a_file_of_comma_separated_fields_is_told_so_on_every_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1,4,5\n2,4,5\n")
    assert [(fault.line, fault.repair) for fault in check_source(path)] == [
        (1, "replace each ',' by a blank"),
        (2, "replace each ',' by a blank"),
    ]


def test_a_missing_path_is_a_fault(tmp_path):
    check_one(
        tmp_path / "no.txt",
        "error",
        None,
        None,
        "existing file or folder",
        "nothing at this path",
        "check the spelling",
    )


def test_a_folder_without_a_readable_file_is_a_fault(tmp_path):
    check_one(tmp_path, "error", None, None, "exactly one .inter, .safetensors, .txt", "it is empty", "give the path")
    (tmp_path / "x.item").write_text("item_id:token\n")
    check_one(tmp_path, "error", None, None, "exactly one .inter", "0 of them in this folder (x.item)", "give the path")


def test_a_folder_with_two_readable_files_is_a_fault(tmp_path):
    for name in ("test.txt", "train.txt", "notes.md"):
        (tmp_path / name).write_text(GOOD_PAIRS)
    found = "2 of them in this folder (notes.md, test.txt, train.txt)"
    check_one(tmp_path, "error", None, None, "exactly one .inter", found, "give the path")


def test_faults_in_a_folder_name_the_file(tmp_path):
    (tmp_path / "a.txt").write_text(GOOD_PAIRS + "1\n")
    assert check_source(tmp_path)[0].file == str(tmp_path / "a.txt")


def test_a_fault_is_one_line_that_holds_all_it_knows():
    fault = Fault("a.txt", 3, "time", "a number", "'x'", "write one")
    assert str(fault) == "a.txt:3: error: time: expected a number, found 'x'; write one"
    assert str(dataclasses.replace(fault, line=None, field=None, severity="warning")) == (
        "a.txt: warning: expected a number, found 'x'; write one"
    )


def test_what_a_line_holds_is_shown_short_and_in_ascii(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes((GOOD_PAIRS + "1 \u00e9 " + "x" * 1000 + "\n").encode())
    (fault,) = check_source(path)
    assert "'1 \\xe9 xxx" in fault.found
    assert len(fault.found) < 80


def test_all_faults_of_a_file_are_listed_at_once_errors_first(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 4 1000\n1 5 900\n1 5 900\n2 7\n2 4 x\n2 4 -1\n2 4 5 6\n")
    faults = check_source(path, format="pairs")
    assert [(fault.severity, fault.line) for fault in faults] == [
        ("error", 4),
        ("error", 7),
        ("error", 5),
        ("error", 6),
        ("warning", 2),
        ("warning", 3),
    ]


def test_faults_beyond_the_limit_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(GOOD_PAIRS + "1 4 5\n" * 5 + "8 4\n")
    faults = check_source(path, limit=2)
    assert [fault.line for fault in faults] == [10, 11, None]
    assert faults[-1].severity == "error"
    assert faults[-1].found == "3 more errors and 1 more warning"
    assert len(check_source(path, limit=5)) == 6
    assert check_source(path, limit=5)[-1].severity == "warning"
    assert check_source(path, limit=5)[-1].found == "1 more warning"
    assert len(check_source(path, limit=6)) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Packs


@pytest.fixture
def pack(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(GOOD_TIMED)
    path = tmp_path / "a.safetensors"
    write_sequences(path, read_sequences(source), source=source)
    return path


def rewrite(path, *, meta=None, drop=(), **tensors):
    """Write the pack again with other tensors or another description, checksums and all."""
    old, description = read_pack(path, kind="seqrec sequences")
    new = {name: tensor.clone() for name, tensor in {**old, **tensors}.items() if name not in drop}
    write_pack(path, new, {**description, **(meta or {})})


def test_a_flipped_bit_in_any_tensor_of_a_pack_is_a_fault(pack):
    whole = pack.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in (header, (header + len(whole)) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        pack.write_bytes(damaged)
        check_one(pack, "error", None, None, "an undamaged pack", "does not match its checksum", "prepare SOURCE")


def test_a_truncated_pack_is_a_fault(pack):
    whole = pack.read_bytes()
    for size in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        pack.write_bytes(whole[:size])
        check_one(pack, "error", None, None, "an undamaged pack", "not a readable safetensors file", "prepare SOURCE")


def test_a_safetensors_file_of_another_kind_is_a_fault(pack):
    tensors, _ = read_safetensors(pack)
    write_safetensors(pack, {name: tensor.clone() for name, tensor in tensors.items()}, {})
    check_one(pack, "error", None, None, "a pack of sequences", "holds no pack record", "give the pack")
    write_pack(pack, {"x": torch.zeros(2)}, {"kind": "something else"})
    check_one(pack, "error", None, None, "a pack of sequences", "something else", "give the pack")


def test_a_pack_of_another_layout_is_a_fault(pack):
    rewrite(pack, meta={"layout": 2})
    check_one(pack, "error", None, None, "layout 1", "layout 2 of another version", "prepare SOURCE")


def test_a_stale_pack_is_a_fault(pack):
    pack.with_suffix(".txt").write_text(GOOD_TIMED + "1 9 2000\n")
    check_one(pack, "error", None, None, "as it is now, fingerprint", "a stale pack", "python -m apps.seqrec prepare")


@pytest.mark.parametrize(
    ("tensors", "expected", "found"),
    [
        ({"ptr": [0, 3, 6]}, "ptr of 4 numbers", "3"),
        ({"ptr": [0, 3, 6, 8]}, "ptr from 0 to the 9 events", "0 to 8"),
        ({"ptr": [1, 3, 6, 9]}, "ptr from 0 to the 9 events", "1 to 9"),
        ({"ptr": [0, 7, 6, 9]}, "ptr that never falls", "7 before 6 at user 1"),
        ({"item": [1, 2, 3, 1, 4, 3, 1, 2, 3]}, "items in 1..3", "4 at event 4"),
        ({"item": [1, 2, 3, 1, 0, 3, 1, 2, 3]}, "items in 1..3", "0 at event 4"),
        ({"time": [1, 2, 3]}, "a time for each of 9 events", "3 times"),
        ({"time": [1, 2, 3, 0, 5, 4, 1, 2, 3]}, "times in order within a user", "4 after 5 at event 4"),
        ({"item": torch.ones(9)}, "item as a row of torch.int32", "[9] of torch.float32"),
        ({"drop": ["item_ids"]}, "a tensor item_ids", "none"),
    ],
)
def test_tensors_of_a_pack_that_describe_no_sequences_are_a_fault(pack, tensors, expected, found):
    dtypes = {"ptr": torch.int64, "item": torch.int32, "time": torch.int64}
    made = {k: torch.tensor(v, dtype=dtypes[k]) for k, v in tensors.items() if k in dtypes and isinstance(v, list)}
    rewrite(pack, **{**tensors, **made})
    check_one(pack, "error", None, None, expected, found, "write it again")


def test_warnings_about_events_are_given_for_packs_too(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text(GOOD_TIMED + "9 4 5000\n3 6 1006\n")
    path = tmp_path / "b.safetensors"
    write_sequences(path, read_sequences(source), source=source)
    repeated, short = check_source(path)
    assert "1 repeated event, first user '3' with item '6'" in repeated.found
    assert "1 of 4 users with fewer, e.g. user '9' with 1" in short.found
    assert repeated.line is None


def test_reader_and_check_agree_on_mangled_files(tmp_path):
    """Whatever stands in a file, the reader raises the first error that `check` lists, or reads."""
    draw = random.Random(0)
    words = [
        "1",
        "2",
        "3",
        "0",
        "-1",
        "007",
        "x",
        "1e9",
        "nan",
        "\u00e9",
        "_",
        ":",
        "user_id:token",
        "\ufeff",
        "\u2028",
    ]
    blanks = [" ", "\t", "\n", "\r\n", "\r", "\x0c", "\0", ""]
    lines = [HEADER, *["1 2\n", "1 3\n", "2 3 4\n", "1\t2\t3\t4\n", "2\t3\t3\t5\n"] * 8]
    read = 0
    for n in range(400):
        text = "".join(draw.choices(words + blanks + lines, k=draw.randint(1, 12)))
        path = tmp_path / draw.choice(["a.txt", "a.inter", "b"])
        path.write_bytes((HEADER if n % 5 == 0 else "").encode() + text.encode())
        form = draw.choice(["auto", "auto", "pairs", "lines", "inter", "pack"])
        errors = [fault for fault in check_source(path, format=form, limit=100) if fault.severity == "error"]
        if errors:
            with pytest.raises(DataError) as caught:
                read_sequences(path, format=form)
            assert str(caught.value).startswith(str(errors[0]))
        else:
            sequences = read_sequences(path, format=form)
            assert sequences.num_items == int(sequences.item.max())
            read += 1
    assert read > 10
