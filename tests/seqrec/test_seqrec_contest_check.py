"""Each fault of a contest folder is found where it is, and what `prepare` refuses is exactly what is an error."""

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apps.seqrec.contest import prepare_contest
from apps.seqrec.contest_check import check_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.formats import DataError, Fault

RAW = 20_000_000_000


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound folder whose first user and item are known."""
    families = ((81, 32), (82, 4), (83, 3), (84, 2))
    return write_contest(tmp_path / "in", num_users=6, num_items=30, mean_length=5, seed=3, families=families)


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def edit(change: Callable[[Any], Any], name: str = "seq.jsonl", line: int = 2) -> Callable[[Path], None]:
    """Change a line of a file, counted from 1, given as a value; the change gives a value or text."""

    def apply(folder: Path) -> None:
        path = folder / name
        lines = path.read_text(encoding="utf-8").splitlines()
        changed = change(json.loads(lines[line - 1]))
        lines[line - 1] = changed if isinstance(changed, str) else json.dumps(changed)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        if name.endswith(".jsonl"):
            (folder / name.replace(".jsonl", "_offsets.pkl")).unlink(missing_ok=True)

    return apply


def put(record: int, column: int, value: Any) -> Callable[[Path], None]:
    """Replace a value of a record of line 2; every record of it where the column is the user's."""

    def change(records: Any) -> Any:
        for n, row in enumerate(records):
            if n == record or column == 0:
                row[column] = value
        return records

    return edit(change)


def feature(field: str, value: Any, column: int = 3, record: int = 0) -> Callable[[Path], None]:
    def change(records: Any) -> Any:
        records[record][column][field] = value
        return records

    return edit(change)


def write(name: str, data: Any) -> Callable[[Path], None]:
    """Replace a file, by bytes, text or the pickle of a value."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(data, str):
            path.write_text(data, encoding="utf-8")
        else:
            path.write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change_indexer(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = pickle.loads((folder / "indexer.pkl").read_bytes())
        change(value)
        (folder / "indexer.pkl").write_bytes(pickle.dumps(value))

    return apply


PREDICT = ("predict_seq.jsonl", "predict_set.jsonl")
E81, E82 = "creative_emb/emb_81_32/emb_81_0.json", "creative_emb/emb_82_4/part-00001"

# change, severity, file, line, field, expected, found, repair (each a part of that text)
CASES: dict[str, tuple[Callable[[Path], None], str, str, int | None, str | None, str, str, str]] = {
    "truncated line": (
        edit(lambda r: json.dumps(r)[:-7]),
        "error",
        "seq.jsonl",
        2,
        None,
        "one complete JSON",
        "expecting",
        "restore",
    ),
    "wrong type of line": (
        edit(lambda r: {"a": 1}),
        "error",
        "seq.jsonl",
        2,
        None,
        "a list of records",
        '{"a": 1}',
        "one list per user",
    ),
    "wrong length of record": (
        edit(lambda r: [r[0][:4]]),
        "error",
        "seq.jsonl",
        2,
        None,
        "6 values",
        "as record 0",
        "complete the record",
    ),
    "wrong type of user": (put(0, 0, 1.5), "error", "seq.jsonl", 2, "user_id", "integer or a string", "1.5", "re-id"),
    "wrong type of features": (put(0, 3, [1]), "error", "seq.jsonl", 2, "item_feat", "an object", "[1]", "feature id"),
    "wrong type of action": (
        put(0, 4, "click"),
        "error",
        "seq.jsonl",
        2,
        "action_type",
        "0, 1 or 2",
        '"click"',
        "0 exposure",
    ),
    "wrong type of time": (
        put(0, 5, "now"),
        "error",
        "seq.jsonl",
        2,
        "timestamp",
        "a time in seconds",
        '"now"',
        "since 1970",
    ),
    "two users on a line": (
        edit(lambda r: [[9, *r[0][1:]], *r[1:]]),
        "error",
        "seq.jsonl",
        2,
        "user_id",
        "one user per line",
        "users 9 and 2",
        "split",
    ),
    "NaN time": (
        edit(lambda r: "[[1, 1, null, null, 0, NaN]]"),
        "error",
        "seq.jsonl",
        2,
        None,
        "finite numbers",
        "NaN",
        "replace",
    ),
    "no user": (write("seq.jsonl", "\n"), "error", "seq.jsonl", None, None, "at least one user", "none", "download"),
    "empty user": (
        edit(lambda r: []),
        "warning",
        "seq.jsonl",
        2,
        None,
        "records of a user",
        "an empty list",
        "left out",
    ),
    "user without events": (
        edit(lambda r: r[-1:]),
        "warning",
        "seq.jsonl",
        2,
        None,
        "events of a user",
        "none of user 2",
        "nothing",
    ),
    "user without profile": (
        edit(lambda r: r[:-1]),
        "warning",
        "seq.jsonl",
        2,
        "user_feat",
        "one profile",
        "0 of user 2",
        "missing",
    ),
    "user with two profiles": (
        edit(lambda r: [r[-1], *r]),
        "warning",
        "seq.jsonl",
        2,
        "user_feat",
        "one profile",
        "2 of user 2",
        "last",
    ),
    "user twice": (put(0, 0, 1), "warning", "seq.jsonl", 2, "user_id", "each user on one line", "user 1 again", "join"),
    "user twice, raw": (
        put(0, 0, "user_00000001"),
        "warning",
        "seq.jsonl",
        2,
        "user_id",
        "each user on one line",
        "user 1 again",
        "join",
    ),
    "unknown user": (put(0, 0, 99), "warning", "seq.jsonl", 2, "user_id", "users of the indexer, 1..6", "99", "kept"),
    "unknown raw user": (put(0, 0, "me"), "warning", "seq.jsonl", 2, "user_id", "users of the indexer", '"me"', "kept"),
    "item out of range": (
        put(0, 1, 31),
        "warning",
        "seq.jsonl",
        2,
        "item_id",
        "items 1..30",
        "31",
        "only its features",
    ),
    "item 0": (put(0, 1, 0), "warning", "seq.jsonl", 2, "item_id", "items 1..30", "0", "only its features"),
    "item as text": (put(0, 1, "x"), "warning", "seq.jsonl", 2, "item_id", "items 1..30", '"x"', "only its features"),
    "unknown action": (
        put(0, 4, 7),
        "warning",
        "seq.jsonl",
        2,
        "action_type",
        "0 exposure, 1 click",
        "7",
        "numbers stay",
    ),
    "no action": (
        put(0, 4, None),
        "warning",
        "seq.jsonl",
        2,
        "action_type",
        "0 exposure, 1 click",
        "null",
        "counts as 0",
    ),
    "no time": (put(1, 5, None), "warning", "seq.jsonl", 2, "timestamp", "whole seconds", "null", "event before"),
    "times out of order": (
        put(0, 5, 1 << 40),
        "warning",
        "seq.jsonl",
        2,
        "timestamp",
        "in order of time",
        "of user 2",
        "sorted",
    ),
    "a record of nothing": (
        edit(lambda r: [*r, [2, None, None, None, None, 1]]),
        "warning",
        "seq.jsonl",
        2,
        None,
        "item or a profile",
        "neither",
        "left out",
    ),
    "blank line": (edit(lambda r: ""), "warning", "seq.jsonl", 2, None, "a user on every line", "blank", "left out"),
    "unknown item feature": (feature("999", 1), "warning", "seq.jsonl", 2, None, "feature ids", '"999"', "left out"),
    "user feature of an item": (feature("103", 1), "warning", "seq.jsonl", 2, None, "feature ids", '"103"', "left out"),
    "value beyond the vocabulary": (feature("100", 7), "warning", "seq.jsonl", 2, "100", "values 1..6", "7", "missing"),
    "value as text": (feature("100", "x"), "warning", "seq.jsonl", 2, "100", "values 1..6", '"x"', "missing"),
    "true as a value": (feature("100", True), "warning", "seq.jsonl", 2, "100", "values 1..6", "true", "missing"),
    "user value beyond": (feature("104", 3, 2, -1), "warning", "seq.jsonl", 2, "104", "values 1..2", "3", "missing"),
    "array value beyond": (
        feature("106", [1, 99], 2, -1),
        "warning",
        "seq.jsonl",
        2,
        "106",
        "values 1..13",
        "99",
        "missing",
    ),
    "test users too": (
        edit(lambda r: "[[", "predict_seq.jsonl"),
        "error",
        "predict_seq.jsonl",
        2,
        None,
        "complete JSON",
        "expecting",
        "restore",
    ),
    "offset beyond the file": (
        write("seq_offsets.pkl", [0, 1 << 40]),
        "warning",
        "seq_offsets.pkl",
        None,
        None,
        "within the",
        "offset 1 is 1099511627776",
        "written again",
    ),
    "offset inside a line": (
        write("seq_offsets.pkl", [0, 5]),
        "warning",
        "seq_offsets.pkl",
        None,
        None,
        "at which lines begin",
        "offset 1 is 5, in the middle",
        "written again",
    ),
    "too few offsets": (
        write("seq_offsets.pkl", {0: 0}),
        "warning",
        "seq_offsets.pkl",
        None,
        None,
        "an offset for every line",
        "1 offsets of 6 lines",
        "written again",
    ),
    "offsets of another kind": (
        write("seq_offsets.pkl", 5),
        "warning",
        "seq_offsets.pkl",
        None,
        None,
        "a list of integers",
        "something else",
        "written again",
    ),
    "offsets with other keys": (
        write("seq_offsets.pkl", {3: 0}),
        "warning",
        "seq_offsets.pkl",
        None,
        None,
        "keys 0, 1, 2",
        "others",
        "written again",
    ),
    "hostile offsets": (
        write("seq_offsets.pkl", Hostile()),
        "error",
        "seq_offsets.pkl",
        None,
        None,
        "plain data",
        "system",
        "do not open",
    ),
    "hostile indexer": (
        write("indexer.pkl", Hostile()),
        "error",
        "indexer.pkl",
        None,
        None,
        "plain data",
        "system",
        "do not open",
    ),
    "hostile embeddings": (
        write("creative_emb/emb_83_3.pkl", Hostile()),
        "error",
        "creative_emb/emb_83_3.pkl",
        None,
        None,
        "plain data",
        "system",
        "do not open",
    ),
    "indexer of another form": (
        write("indexer.pkl", [1]),
        "error",
        "indexer.pkl",
        None,
        None,
        "a dictionary",
        "list",
        "restore",
    ),
    "indexer without items": (
        change_indexer(lambda x: x.pop("i")),
        "error",
        "indexer.pkl",
        None,
        "i",
        "a dictionary",
        "NoneType",
        "restore",
    ),
    "indexer with a gap": (
        change_indexer(lambda x: x["i"].update({7: 99})),
        "error",
        "indexer.pkl",
        None,
        "i",
        "each once",
        "31 different re-ids up to 99",
        "restore",
    ),
    "indexer with text": (
        change_indexer(lambda x: x["f"]["101"].update({7: "x"})),
        "error",
        "indexer.pkl",
        None,
        "f['101']",
        "re-ids from 1",
        '"x"',
        "restore",
    ),
    "indexer with a strange name": (
        change_indexer(lambda x: x["u"].update({"a\nb": 7})),
        "error",
        "indexer.pkl",
        None,
        "u",
        "one line of text",
        '"a\\nb"',
        "restore",
    ),
    "indexer with another feature": (
        change_indexer(lambda x: x["f"].update({"999": {1: 1}})),
        "warning",
        "indexer.pkl",
        None,
        "f",
        "of the contest form",
        '"999"',
        "left out",
    ),
    "items cut": (
        write("item_feat_dict.json", '{"1": {"100": 1}, "2'),
        "error",
        "item_feat_dict.json",
        1,
        None,
        "complete JSON",
        "unterminated",
        "restore",
    ),
    "items of another kind": (
        write("item_feat_dict.json", '{"1": 5}'),
        "error",
        "item_feat_dict.json",
        1,
        "1",
        "an object",
        "5",
        "feature id",
    ),
    "items missing": (
        write("item_feat_dict.json", '{"1": {}}'),
        "warning",
        "item_feat_dict.json",
        None,
        None,
        "every item",
        "29 items",
        "no features",
    ),
    "items unknown": (
        write("item_feat_dict.json", '{"31": {}}'),
        "warning",
        "item_feat_dict.json",
        1,
        "item",
        "items 1..30",
        '"31"',
        "left out",
    ),
    "items with unknown values": (
        write("item_feat_dict.json", '{\n"1": {"100": 9}}'),
        "warning",
        "item_feat_dict.json",
        2,
        "100",
        "values 1..6",
        "9",
        "missing",
    ),
    "wrong width": (
        edit(lambda r: {**r, "emb": r["emb"][:31]}, E81),
        "error",
        E81,
        2,
        "emb",
        "32 numbers",
        "31 numbers",
        "export",
    ),
    "NaN in an embedding": (
        edit(lambda r: {**r, "emb": [float("nan")] * 4}, E82),
        "error",
        E82,
        2,
        None,
        "finite",
        "NaN",
        "replace",
    ),
    "infinity in an embedding": (
        edit(
            lambda r: json.dumps({**r, "emb": [1, 2, 3, 7e77]}).replace("7e+77", "1e999"),
            E82,
        ),
        "error",
        E82,
        2,
        "emb",
        "finite",
        "infinity",
        "delete",
    ),
    "text in an embedding": (
        edit(lambda r: {**r, "emb": [1, 2, 3, "x"]}, E82),
        "error",
        E82,
        2,
        "emb",
        "numbers only",
        '"x"',
        "export",
    ),
    "embedding of an unknown item": (
        edit(lambda r: {**r, "anonymous_cid": 7}, E82),
        "warning",
        E82,
        2,
        "anonymous_cid",
        "items of the indexer",
        "7",
        "left out",
    ),
    "no embedding": (
        edit(lambda r: {"anonymous_cid": r["anonymous_cid"]}, E82),
        "warning",
        E82,
        2,
        "emb",
        "an embedding",
        "none",
        "without one",
    ),
    "embedding without its item": (
        edit(lambda r: {"emb": r["emb"]}, E82),
        "error",
        E82,
        2,
        "anonymous_cid",
        "the item's id",
        '["emb"]',
        "creative id",
    ),
    "wrong width in a pickle": (
        write("creative_emb/emb_83_3.pkl", {5: [1.0]}),
        "error",
        "creative_emb/emb_83_3.pkl",
        None,
        "5",
        "3 numbers",
        "1 numbers",
        "export",
    ),
    "wrong shape of an array": (
        write(
            "creative_emb/emb_84_2.npy",
            b"\x93NUMPY\x01\x00\x76\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }".ljust(117)
            + b"\n"
            + bytes(8),
        ),
        "error",
        "creative_emb/emb_84_2.npy",
        None,
        None,
        "(30 or 31, width)",
        "(1, 2) of float32",
        "one row",
    ),
    "strange file among embeddings": (
        write("creative_emb/notes.txt", "x"),
        "warning",
        "creative_emb/notes.txt",
        None,
        None,
        "emb_ID_WIDTH",
        "another name",
        "left out",
    ),
    "candidate cut": (
        edit(lambda r: '{"a', "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        None,
        "complete JSON",
        "unterminated",
        "restore",
    ),
    "candidate of another kind": (
        edit(lambda r: [r], "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        None,
        "creative_id",
        '[{"creative_id"',
        "one object per line",
    ),
    "candidate without id": (
        edit(lambda r: {"a": 1}, "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        "creative_id",
        '{"creative_id": id',
        'keys ["a"]',
        "complete",
    ),
    "candidate with a name": (
        edit(lambda r: {**r, "creative_id": "x"}, "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        "creative_id",
        "an integer",
        '"x"',
        "raw id",
    ),
    "candidate without features": (
        edit(lambda r: {**r, "features": 1}, "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        "features",
        "an object",
        "1",
        "feature id",
    ),
    "candidate with a negative row": (
        edit(lambda r: {**r, "retrieval_id": -1}, "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        "retrieval_id",
        "an integer from 0",
        "-1",
        "number",
    ),
    "candidate with another's row": (
        edit(lambda r: {**r, "retrieval_id": 0}, "predict_set.jsonl"),
        "error",
        "predict_set.jsonl",
        2,
        "retrieval_id",
        "each id once",
        "0 again",
        "number",
    ),
    "candidate twice": (
        edit(lambda r: {**r, "creative_id": 25_000_000_020}, "predict_set.jsonl"),
        "warning",
        "predict_set.jsonl",
        13,
        "creative_id",
        "each item once",
        "25000000020 again",
        "both are ranked",
    ),
    "candidate with an unseen value": (
        edit(lambda r: {**r, "features": {"100": 7}}, "predict_set.jsonl"),
        "warning",
        "predict_set.jsonl",
        2,
        "100",
        "values 1..6",
        "7",
        "missing",
    ),
    "blank candidate": (
        edit(lambda r: "", "predict_set.jsonl", line=17),
        "warning",
        "predict_set.jsonl",
        17,
        None,
        "a candidate on every line",
        "blank",
        "left out",
    ),
    "no candidate": (
        write("predict_set.jsonl", "\n"),
        "error",
        "predict_set.jsonl",
        None,
        None,
        "at least one candidate",
        "none",
        "download",
    ),
    "no test user": (
        write("predict_seq.jsonl", ""),
        "error",
        "predict_seq.jsonl",
        None,
        None,
        "at least one user",
        "none",
        "download",
    ),
    "offsets of test users": (
        write("predict_seq_offsets.pkl", [0]),
        "warning",
        "predict_seq_offsets.pkl",
        None,
        None,
        "an offset for every line",
        "1 offsets of 6 lines",
        "written again",
    ),
    "candidate in another row": (
        edit(lambda r: {**r, "retrieval_id": 99}, "predict_set.jsonl"),
        "warning",
        "predict_set.jsonl",
        2,
        "retrieval_id",
        "counted from 0",
        "99 in row 1",
        "numbered again",
    ),
    **{
        f"no {name}": (remove(name), "error", name, None, None, "the file", "no such file", "download")
        for name in ("seq.jsonl", "indexer.pkl", "item_feat_dict.json")
    },
    **{
        f"no {name}": (remove(name), "warning", name, None, None, "the file", "no such file", "nothing to do")
        for name in ("seq_offsets.pkl", "predict_seq.jsonl", "predict_seq_offsets.pkl", "predict_set.jsonl")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_fault_is_found(name: str, folder: Path, tmp_path: Path):
    change, severity, file, line, field, expected, found, repair = CASES[name]
    change(folder)
    faults = check_contest(folder, limit=1000)
    hits = [
        fault
        for fault in faults
        if (fault.severity, fault.file, fault.line, fault.field) == (severity, str(folder / file), line, field)
        and (expected in fault.expected and found in fault.found and repair in fault.repair)
    ]
    assert len(hits) == 1, "\n".join(map(str, faults))
    assert str(hits[0]).isascii()
    if severity == "warning":
        assert not any(fault.severity == "error" for fault in faults), "\n".join(map(str, faults))
        prepare_contest(folder, tmp_path / "out", workers=1)
    elif not file.endswith("_offsets.pkl"):  # which prepare does not read
        with pytest.raises(DataError):
            prepare_contest(folder, tmp_path / "out", workers=1)


def test_sound_folder_has_only_the_candidates_news(folder: Path):
    faults = check_contest(folder)
    news = {"item_id", "102", "111"}  # test users and candidates are made with items and values that nobody has seen
    assert {fault.field for fault in faults} == news
    assert {Path(fault.file).name for fault in faults} == set(PREDICT)


def test_irregular_folder_has_warnings_alone(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=60, num_items=40, mean_length=9, seed=3, irregular=True)
    faults = check_contest(source, limit=100)
    fields = {fault.field for fault in faults if Path(fault.file).name == "seq.jsonl"}
    assert {"102", "122", "103", "106", "item_id", "user_id", "user_feat", "action_type", "timestamp"} <= fields
    assert all(fault.severity == "warning" for fault in faults), "\n".join(map(str, faults))


def test_real_sample_has_no_error(real_data, tmp_path: Path):
    sample = real_data("tencentgr-sample")
    line = (sample / "seq.txt").read_text(encoding="utf-8").split("\n")[0]
    (tmp_path / "seq.jsonl").write_text(line + "\n", encoding="utf-8")
    for name in ("indexer.pkl", "seq_offsets.pkl"):
        (tmp_path / name).write_bytes((sample / name).read_bytes())
    cut = (sample / "item_feat_dict.txt").read_text(encoding="utf-8")
    (tmp_path / "item_feat_dict.json").write_text(cut[: cut.rindex("}, ")] + "}}", encoding="utf-8")
    faults = check_contest(tmp_path)
    assert {fault.severity for fault in faults} == {"warning"}
    assert not [fault for fault in faults if fault.file.endswith("/seq.jsonl")]
    assert any("865 offsets of 1 lines" in fault.found for fault in faults)


def test_errors_come_first_and_the_rest_is_counted(folder: Path):
    lines = ["[[", *(json.dumps([[n, 99, None, {"100": "x"}, None, 5]]) for n in range(1, 5)), "x", "{}"]
    write("seq.jsonl", "\n".join(lines))(folder)
    faults = check_contest(folder, limit=2)
    assert [(fault.severity, fault.line) for fault in faults[:2]] == [("error", 1), ("error", 6)]
    assert faults[2].severity == "error"
    assert faults[2].found.startswith("1 more errors and ")
    whole = check_contest(folder, limit=100)
    assert [fault.severity for fault in whole] == sorted(fault.severity for fault in whole)
    (item,) = [fault for fault in whole if fault.field == "item_id" and fault.file.endswith("in/seq.jsonl")]
    assert item.found == "99 (4 times in the file)"
    assert item.line == 2


def test_folder_that_is_not_there(tmp_path: Path):
    (fault,) = check_contest(tmp_path / "nowhere")
    assert isinstance(fault, Fault)
    assert (fault.severity, fault.found) == ("error", "no folder at this path")


def test_prepare_refuses_what_is_an_error_and_nothing_else(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=3, num_items=12, mean_length=4, seed=3, irregular=True)
    names = ("seq.jsonl", "item_feat_dict.json", "creative_emb/emb_81_32/emb_81_1.json", *PREDICT)
    files = [source / name for name in names]
    good = {path: path.read_bytes() for path in files}
    generator = random.Random(11)
    outcomes = {True: 0, False: 0}
    pieces = [b"[", b"]", b"{", b'"', b"\xff", b"9" * 30, b"null", b"\n", b"-", b"1e9", b"true", b'"a"', b", "]
    for attempt in range(110):
        path = files[attempt % len(files)]
        data = bytearray(good[path])
        place = generator.randrange(len(data))
        data[place : place + generator.randint(0, 3)] = generator.choice(pieces)
        path.write_bytes(data)
        errors = [fault for fault in check_contest(source, limit=5) if fault.severity == "error"]
        try:
            prepare_contest(source, tmp_path / "out", workers=1)
            is_read = True
        except DataError as error:
            is_read = False
            assert str(error) == str(errors[0]) if errors else False, f"{error}\n{data!r}"  # noqa: PT017
        assert is_read == (not errors), f"{errors}\n{data!r}"
        outcomes[is_read] += 1
        path.write_bytes(good[path])
    assert min(outcomes.values()) > 10
