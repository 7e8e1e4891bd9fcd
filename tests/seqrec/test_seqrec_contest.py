"""The contest's files become packs that say what a slow reader of dictionaries says, however irregular they are."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.seqrec import contest
from apps.seqrec.contest import (
    Contest,
    Events,
    contest_bytes,
    is_contest,
    is_contest_pack,
    prepare_contest,
    read_contest,
)
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_lines import ITEM_FIELDS, USER_ARRAYS, USER_FIELDS, BadLine, object_pairs
from apps.seqrec.dataset import query_spans, training_spans
from apps.seqrec.formats import DataError
from shared.files import read_pack, write_pack
from shared.pickles import load_npy, load_pickle

ROOT = Path(__file__).parents[2]
FORMS = ((81, 32), (82, 6), (83, 5), (84, 4))  # one family in each form that files have
RAW = 20_000_000_000  # raw id of item i is RAW + i in hand-made folders


def hand_made(folder: Path, lines: list[Any], *, num_items: int = 4, num_users: int = 9) -> Path:
    """A folder of the contest with these lines, given as values or as text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "seq.jsonl").write_text(text, encoding="utf-8")
    features: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for field, size in {"101": 9, "102": 5, "103": 3, "104": 2, "106": 4}.items():
        features[field] = {1000 + n: n for n in range(1, size + 1)}
    indexer = {
        "u": {f"user_{n}": n for n in range(1, num_users + 1)},
        "i": {RAW + n: n for n in range(1, num_items + 1)},
        "f": features,
        "a": {0: 1, 1: 2},
    }
    (folder / "indexer.pkl").write_bytes(pickle.dumps(indexer))
    table = {str(n): {"101": n, "102": 1 + n % 5} for n in range(1, num_items + 1)}
    (folder / "item_feat_dict.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


def item_features(item: int) -> dict[str, int]:
    return {"101": item, "102": 1 + item % 5}


def event(user: Any, item: Any, time: Any, action: Any = 0, features: Any = ...) -> list[Any]:
    return [user, item, None, item_features(item) if features is ... else features, action, time]


def profile(user: Any, features: Any, time: Any = 500) -> list[Any]:
    return [user, None, features, None, None, time]


# The slow reader


def clean(value: Any, size: int) -> int:
    return value if isinstance(value, int) and 0 <= value <= size else 0


def slow_users(source: Path, file: str = "seq.jsonl") -> list[dict[str, Any]]:
    """Every line as dictionaries, record by record, with the rules as the documentation words them."""
    indexer = load_pickle(source / "indexer.pkl")
    table = json.loads((source / "item_feat_dict.json").read_text(encoding="utf-8"))
    vocab = {field: len(values) for field, values in indexer["f"].items()}
    raw_user = {user: raw for raw, user in indexer["u"].items()}

    def row(features: dict[str, Any]) -> list[int]:
        return [clean(features.get(f, 0), vocab[f]) for f in ITEM_FIELDS if f in vocab]

    users = []
    for line in (source / file).read_text(encoding="utf-8").splitlines():
        records = json.loads(line)
        if not records:
            continue
        given = records[0][0]
        number = indexer["u"].get(given, 0) if isinstance(given, str) else given if given in raw_user else 0
        found: dict[str, Any] = {"id": raw_user.get(number, str(given)), "number": number, "profile": {}, "at": 0}
        events = []
        last_time = 0
        for _, item, user_feat, item_feat, action, time in records:
            if user_feat is not None:
                found |= {"profile": user_feat, "at": time or 0}
            if item is None and item_feat is None:
                continue
            last_time = last_time if time is None else int(time)
            known = clean(item, len(indexer["i"]))
            own = row(item_feat) if item_feat else None
            usual = row(table.get(str(known), {}))
            events.append((last_time, known, action or 0, own if own != usual else None))
        found["events"] = sorted(events, key=lambda entry: entry[0])
        found["row"] = [clean(found["profile"].get(f, 0), vocab[f]) for f in USER_FIELDS if f in vocab]
        found["lists"] = {}
        for field in USER_ARRAYS:
            if field in vocab:
                values = found["profile"].get(field, [])
                values = values if isinstance(values, list) else [values]
                found["lists"][field] = [clean(value, vocab[field]) for value in values]
        users.append(found)
    return users


def read_users(data: Events) -> list[dict[str, Any]]:
    """The same, from the tensors."""
    own = dict(zip(data.own_event.tolist(), data.own_feature.tolist(), strict=True))
    users = []
    for u, name in enumerate(data.user_ids):
        begin, end = int(data.ptr[u]), int(data.ptr[u + 1])
        columns = (data.time, data.item, data.action)
        events = zip(*(column[begin:end].tolist() for column in columns), strict=True)
        users.append(
            {
                "id": name,
                "number": int(data.user[u]),
                "at": int(data.profile_time[u]),
                "row": data.user_feature[u].tolist(),
                "lists": {f: x.item[int(x.ptr[u]) : int(x.ptr[u + 1])].tolist() for f, x in data.user_lists.items()},
                "events": [(*columns, own.get(begin + n)) for n, columns in enumerate(events)],
            }
        )
    return users


def assert_as_the_slow_reader(data: Contest, source: Path) -> None:
    expected = slow_users(source)
    for user in expected:
        user.pop("profile")
    assert read_users(data) == expected
    table = json.loads((source / "item_feat_dict.json").read_text(encoding="utf-8"))
    rows = [
        [clean(table.get(str(i), {}).get(f, 0), data.vocab[f]) for f in data.item_fields]
        for i in range(len(data.item_feature))
    ]
    assert data.item_feature.tolist() == rows
    raw = load_pickle(source / "indexer.pkl")["i"]
    assert data.sequences.item_ids == tuple(map(str, sorted(raw, key=raw.__getitem__)))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# Against the slow reader


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("block_bytes", [3000, 1 << 20])
def test_events_profiles_and_items_are_those_of_the_slow_reader(
    irregular: bool, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_contest(tmp_path / "in", num_users=60, num_items=80, mean_length=9, seed=3, irregular=irregular)
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.own_event.numel() > 0 if irregular else data.own_event.numel() == 0
    assert_as_the_slow_reader(data, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("irregular", [False, True])
def test_embeddings_of_every_form_are_those_in_the_files(irregular: bool, tmp_path: Path):
    source = write_contest(
        tmp_path / "in", num_users=3, num_items=70, mean_length=5, seed=3, families=FORMS, irregular=irregular
    )
    data = prepare_contest(source, tmp_path / "out", workers=1, families=("81", "82", "83", "84"))
    expected: dict[str, dict[int, Any]] = {family: {} for family in data.embeddings}
    for family, folder in (("81", "emb_81_32"), ("82", "emb_82_6")):
        for path in (source / "creative_emb" / folder).iterdir():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                if "emb" in record:
                    expected[family][record["anonymous_cid"]] = record["emb"]
    expected["83"] = load_pickle(source / "creative_emb/emb_83_5.pkl")
    matrix = load_npy(source / "creative_emb/emb_84_4.npy")
    expected["84"] = {int(raw): matrix[i].tolist() for i, raw in enumerate(data.sequences.item_ids, 1)}
    assert data.candidates is not None
    raws = [*map(int, data.sequences.item_ids), *data.candidates.creative[data.candidates.item == 0].tolist()]
    assert len(raws) == 70 + data.num_extra == 74
    for (number, width), (value, present) in zip(FORMS, data.embeddings.values(), strict=True):
        assert value.shape == (75, width)
        for row, raw in enumerate(raws, 1):
            vector = expected[str(number)].get(raw)
            assert bool(present[row]) == (vector is not None)
            assert torch.equal(value[row], torch.tensor(vector or [0.0] * width).half())
        assert not bool(present[0])
        assert int(present[71:].sum()) == (0 if number == 84 else 4)  # an array has rows of the indexer's items alone
    assert int(data.embeddings["81"].present[:71].sum()) == (62 if irregular else 70)


def test_todays_training_can_use_the_sequences(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=40, num_items=50, mean_length=8, seed=1, irregular=True)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    known = data.sequences
    assert int(known.item.min()) >= 1
    assert known.time is not None
    assert known.num_events == int((data.item > 0).sum()) < data.history.num_events == data.item.numel()
    for u in range(known.num_users):
        whole = data.item[data.ptr[u] : data.ptr[u + 1]]
        assert torch.equal(known.item[known.ptr[u] : known.ptr[u + 1]], whole[whole > 0])
    assert training_spans(known, max_len=5).user.numel() == known.num_users
    assert query_spans(data.history, "all", max_len=5).user.numel() == known.num_users


def test_without_unknown_items_nothing_is_held_twice(tmp_path: Path):
    data = prepare_contest(
        hand_made(tmp_path / "in", [[event(1, 1, 5)], [event(2, 2, 6)]]), tmp_path / "out", workers=1
    )
    assert data.sequences.item.data_ptr() == data.item.data_ptr()


def test_the_real_sample_parses_exactly(real_data, tmp_path: Path):
    sample = real_data("tencentgr-sample")
    source = tmp_path / "in"
    source.mkdir()
    for name in ("indexer.pkl", "seq_offsets.pkl"):
        shutil.copyfile(sample / name, source / name)
    line, rest = (sample / "seq.txt").read_text(encoding="utf-8").split("\n")
    (source / "seq.jsonl").write_text(line + "\n", encoding="utf-8")
    assert load_pickle(source / "seq_offsets.pkl")[:2] == [0, len(line) + 1]
    cut = (sample / "item_feat_dict.txt").read_text(encoding="utf-8")
    complete = cut[: cut.rindex("}, ")] + "}}"
    (source / "item_feat_dict.json").write_text(complete, encoding="utf-8")
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert_as_the_slow_reader(data, source)
    assert (data.sequences.num_items, data.sequences.num_users, data.history.num_events) == (58734, 1, 97)
    assert (int(data.user[0]), int(data.profile_time[0])) == (640, 1748049465)
    assert data.user_fields == USER_FIELDS
    assert data.item_fields == ITEM_FIELDS
    assert data.user_feature[0].tolist() == [46, 2, 5, 1]
    assert data.user_lists["106"].item.tolist() == [4]
    assert data.vocab["121"] == 49079
    (source / "seq.jsonl").write_text(f"{line}\n{rest}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"seq\.jsonl:2: .*complete JSON"):
        prepare_contest(source, tmp_path / "out", workers=1)


# Irregular variants, one by one

VARIANTS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "profile first": ([profile(1, {"103": 2}), event(1, 1, 5)], {"row": [2, 0], "at": 500}),
    "profile between": ([event(1, 1, 5), profile(1, {"104": 1}), event(1, 2, 6)], {"row": [0, 1]}),
    "no profile": ([event(1, 1, 5)], {"row": [0, 0], "at": 0, "lists": {"106": []}}),
    "the last profile counts": (
        [profile(1, {"103": 1}, 7), event(1, 1, 5), profile(1, {"103": 3}, 9)],
        {"row": [3, 0], "at": 9},
    ),
    "profile and event in one record": ([[1, 2, {"103": 3}, None, 1, 9]], {"row": [3, 0], "events": [(9, 2, 1, None)]}),
    "array feature": ([profile(1, {"106": [4, 2, "x", 99]})], {"lists": {"106": [4, 2, 0, 0]}, "events": []}),
    "array feature of one value": ([profile(1, {"106": 3})], {"lists": {"106": [3]}}),
    "list where one value belongs": ([profile(1, {"103": [1]})], {"row": [0, 0]}),
    "re-id": ([event(3, 1, 5)], {"id": "user_3", "number": 3}),
    "raw user": ([event("user_4", 1, 5)], {"id": "user_4", "number": 4}),
    "unseen raw user": ([event("stranger", 1, 5)], {"id": "stranger", "number": 0}),
    "unseen re-id": ([event(77, 1, 5)], {"id": "77", "number": 0}),
    "huge user": ([event(1 << 70, 1, 5)], {"id": str(1 << 70), "number": 0}),
    "raw item": ([event(1, RAW + 99, 5, 1, {"101": 3})], {"events": [(5, 0, 1, [3, 0])]}),
    "huge item": ([event(1, 1 << 70, 5, 1, None)], {"events": [(5, 0, 1, None)]}),
    "text item": ([event(1, "x", 5, 1, None)], {"events": [(5, 0, 1, None)]}),
    "no item but its features": ([event(1, None, 5, 0, {"101": 3})], {"events": [(5, 0, 0, [3, 0])]}),
    "no features": ([event(1, 2, 5, 0, None)], {"events": [(5, 2, 0, None)]}),
    "empty features": ([event(1, 2, 5, 0, {})], {"events": [(5, 2, 0, None)]}),
    "changed feature": ([event(1, 2, 5, 0, {"101": 2, "102": 5})], {"events": [(5, 2, 0, [2, 5])]}),
    "text value": ([event(1, 2, 5, 0, {"101": "x", "102": 3})], {"events": [(5, 2, 0, [0, 3])]}),
    "null value": ([event(1, 2, 5, 0, {"101": None, "102": 3})], {"events": [(5, 2, 0, [0, 3])]}),
    "value beyond the vocabulary": ([event(1, 2, 5, 0, {"101": 10, "102": 3})], {"events": [(5, 2, 0, [0, 3])]}),
    "negative value": ([event(1, 2, 5, 0, {"101": 2, "102": -1})], {"events": [(5, 2, 0, [2, 0])]}),
    "unknown feature": ([event(1, 2, 5, 0, {**item_features(2), "999": 1})], {"events": [(5, 2, 0, None)]}),
    "no action": ([event(1, 2, 5, None)], {"events": [(5, 2, 0, None)]}),
    "no time": (
        [event(1, 2, 5), event(1, 1, None), event(1, 3, 6)],
        {"events": [(5, 2, 0, None), (5, 1, 0, None), (6, 3, 0, None)]},
    ),
    "time with a fraction": ([event(1, 2, 5.9)], {"events": [(5, 2, 0, None)]}),
    "times out of order": (
        [event(1, 2, 7, 1), event(1, 1, 5), event(1, 3, 7)],
        {"events": [(5, 1, 0, None), (7, 2, 1, None), (7, 3, 0, None)]},
    ),
    "a record of nothing": ([[1, None, None, None, None, 3], event(1, 2, 5)], {"events": [(5, 2, 0, None)]}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_read(name: str, tmp_path: Path):
    records, expected = VARIANTS[name]
    data = prepare_contest(hand_made(tmp_path / "in", [[event("other", 1, 1)], records]), tmp_path / "out", workers=1)
    found = read_users(data)[1]
    assert {key: found[key] for key in expected} == expected


def test_what_is_irregular_is_told(tmp_path: Path):
    lines = [
        [event(1, 99, 5), event(1, 1, 4, 0, {"999": 1})],
        [],
        [event("user_1", 1, 1)],
        [profile("x", {"103": "y", "998": 1})],
    ]
    said: list[str] = []
    prepare_contest(hand_made(tmp_path / "in", lines), tmp_path / "out", workers=1, say=said.append)
    text = "\n".join(said)
    for part in (
        "seq.jsonl: 3 users, 3 events",
        "1 events of unknown items",
        "2 events with features of their own",
        "1 lines without records",
        "1 lines of users that had one before: both are kept",
        "2 unseen feature values",
        "1 users that the indexer lacks",
        "1 users without events",
        'item features left out, because the indexer or the contest form lacks them: "999"',
        'user features left out, because the indexer or the contest form lacks them: "998"',
        "no embeddings; items are known by id and features alone",
    ):
        assert part in text, part


def test_line_ends_count_and_offsets_do_not(tmp_path: Path):
    source = hand_made(tmp_path / "in", [[event(1, 1, 5)], [event(2, 2, 6)]])
    expected = content_of(source, tmp_path / "out")
    for offsets in ([0, 61], {0: 0, 1: 61}, [5, 1 << 40], "nonsense"):
        (source / "seq_offsets.pkl").write_bytes(pickle.dumps(offsets))
        assert content_of(source, tmp_path / "out") == expected


def content_of(source: Path, output: Path) -> dict[str, bytes]:
    prepare_contest(source, output, workers=1)
    return content(output)


@pytest.mark.parametrize("text", ["\r\n", "\n\n \n", ""])
def test_other_line_ends_change_nothing(text: str, tmp_path: Path):
    lines = [[event(1, 1, 5)], [event(2, 2, 6)]]
    source = hand_made(tmp_path / "in", lines)
    expected = read_users(prepare_contest(source, tmp_path / "out", workers=1))
    joined = text.join(map(json.dumps, lines)) if text else "\n".join(map(json.dumps, lines))
    (source / "seq.jsonl").write_bytes(b"\xef\xbb\xbf" + joined.encode())
    assert read_users(prepare_contest(source, tmp_path / "out", workers=1)) == expected


def test_items_come_in_any_layout_of_json(tmp_path: Path):
    path = tmp_path / "a.json"
    value = {str(n): {"101": n, "t": "}, {\u00e9"} for n in range(1, 20000)}
    for text in (
        json.dumps(value),
        json.dumps(value, indent=1),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    ):
        path.write_text(f" {text}\n", encoding="utf-8")
        assert {key: features for _, key, features in object_pairs(path)} == value
    path.write_text("{}", encoding="utf-8")
    assert list(object_pairs(path)) == []


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "end of the file"),
        ("[1]", 1, '"["'),
        ('{"1": {"101": 1}', 1, "end of the file"),
        ('{"1": {"101": 1},\n "2": {"10', 2, "unterminated"),
        ('{"1": {"101": NaN}}', 1, "NaN"),
        ('{"1": {"101": 1}} x', 1, '"x"'),
        ('{1: {"101": 1}}', 1, "1"),
        ('{"1" {"101": 1}}', 1, '"{"'),
        ('{"1": ' + "[" * 100_000, 1, "nested"),
    ],
)
def test_damaged_items_are_refused_where_they_are(text: str, line: int, found: str, tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadLine) as caught:
        list(object_pairs(path))
    assert caught.value.line == line
    assert found in caught.value.found


# What cannot be read

GOOD = [event(1, 1, 5), profile(1, {"103": 2})]
BAD: dict[str, tuple[Any, str]] = {
    "cut": (json.dumps(GOOD)[:-9], "complete JSON"),
    "no list": ({"a": 1}, "expected a list of records"),
    "record of another length": ([GOOD[0][:5]], "records of 6 values"),
    "record of another kind": (["abcdef"], "records of 6 values"),
    "two users": ([event(1, 1, 5), event(2, 1, 5)], "one user per line"),
    "user of another kind": ([event(1.5, 1, 5, 0, None)], "user_id: expected an integer or a string"),
    "user with a line end": ([event("a\nb", 1, 5)], "id of one line"),
    "user that cannot be written": ('[["\\ud800", 1, null, null, 0, 5]]', "printable"),
    "features of another kind": ([event(1, 1, 5, 0, [1])], "item_feat: expected an object"),
    "profile of another kind": ([profile(1, "x")], "user_feat: expected an object"),
    "action of another kind": ([event(1, 1, 5, "click")], "action_type: expected 0, 1 or 2"),
    "huge action": ([event(1, 1, 5, 300)], "action_type"),
    "time of another kind": ([event(1, 1, "yesterday")], "timestamp: expected a time in seconds"),
    "huge time": ([event(1, 1, 1 << 64)], "timestamp"),
    "NaN": ("[[1, 1, null, null, 0, NaN]]", "finite numbers"),
    "infinite time": ("[[1, 1, null, null, 0, 1e999]]", "timestamp"),
    "nested": ("[" * 100_000, "nested too deep"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_bad_line_is_refused_with_its_number(
    name: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line, part = BAD[name]
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    source = hand_made(tmp_path / "in", [GOOD, "", GOOD, line, "neither this"])
    with pytest.raises(DataError) as caught:
        prepare_contest(source, tmp_path / "out", workers=1)
    assert "seq.jsonl:4: error: " in str(caught.value)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    (source / "seq.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n[["\xff"]]\n')
    with pytest.raises(DataError, match=r"seq\.jsonl:2: .*UTF-8.*0xff"):
        prepare_contest(source, tmp_path / "out", workers=1)


@pytest.mark.parametrize("name", ["seq.jsonl", "indexer.pkl", "item_feat_dict.json"])
def test_missing_file_is_named(name: str, tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    (source / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such file"):
        prepare_contest(source, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"u": {}, "i": {}},
        {"u": {}, "i": {5: 2}, "f": {}},
        {"u": {}, "i": {5: 1}, "f": {"101": 3}},
        {"u": {"a\nb": 1}, "i": {}, "f": {}},
    ],
)
def test_indexer_of_another_form_is_refused(value: Any, tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    (source / "indexer.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=r"indexer\.pkl"):
        prepare_contest(source, tmp_path / "out", workers=1)


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("true",))


@pytest.mark.parametrize("name", ["indexer.pkl", "creative_emb/emb_81_32.pkl"])
def test_hostile_pickle_is_refused(name: str, tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    (source / "creative_emb").mkdir()
    (source / name).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match=r"refused.*system"):
        prepare_contest(source, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"anonymous_cid": 1, "emb": [1, 2]}', "expected 3 numbers, found 2 numbers"),
        ('{"anonymous_cid": 1, "emb": [1, NaN, 2]}', "finite numbers"),
        ('{"anonymous_cid": 1, "emb": [1, 1e999, 2]}', "finite numbers"),
        ('{"anonymous_cid": 1, "emb": [1, "x", 2]}', 'numbers only, found "x"'),
        ('{"anonymous_cid": 1, "emb": [1, 70000, 2]}', "up to 65504"),
        ('{"emb": [1, 2, 3]}', "the item's id"),
        ("[1]", "anonymous_cid"),
        ('{"anonymous_cid": 1, "emb": [1', "complete JSON"),
    ],
)
def test_bad_embedding_is_refused_with_its_line(line: str, part: str, tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    folder = source / "creative_emb" / "emb_82_3"
    folder.mkdir(parents=True)
    good = json.dumps({"anonymous_cid": RAW + 1, "emb": [1, 2, 3]})
    (folder / "part-00000").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare_contest(source, tmp_path / "out", workers=1)
    assert "part-00000:2: " in str(caught.value)
    assert part in str(caught.value)


def test_embeddings_of_unknown_items_and_second_ones(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    folder = source / "creative_emb" / "emb_82_2"
    folder.mkdir(parents=True)
    records = [
        (RAW + 1, [1, 2]),
        (7, [3, 4]),
        (str(RAW + 2), [5, 6]),
        (RAW + 1, [7, 8]),
        ("x", [1, 1]),
        (RAW + 3, None),
    ]
    text = "".join(json.dumps({"anonymous_cid": raw, "emb": emb}) + "\n" for raw, emb in records)
    (folder / "a.json").write_text(text, encoding="utf-8")
    said: list[str] = []
    data = prepare_contest(source, tmp_path / "out", workers=1, say=said.append)
    assert data.embeddings["82"].value.tolist() == [[0, 0], [7, 8], [5, 6], [0, 0], [0, 0]]
    assert data.embeddings["82"].present.tolist() == [False, True, True, False, False]
    assert "family 82: 2 of 4 items have an embedding, 2 wide" in said
    assert "family 82: 2 embeddings of unknown items" in said


def test_wide_families_are_left_out_unless_asked_for(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    folder = source / "creative_emb" / "emb_83_3584"
    folder.mkdir(parents=True)
    (folder / "part-0").write_text(json.dumps({"anonymous_cid": RAW + 1, "emb": [0.5] * 3584}), encoding="utf-8")
    said: list[str] = []
    assert prepare_contest(source, tmp_path / "out", workers=1, say=said.append).embeddings == {}
    assert any("family 83 left out: it is 3,584 wide and would take 0.0 GiB" in line for line in said)
    data = prepare_contest(source, tmp_path / "out", workers=1, families=("83",))
    assert data.embeddings["83"].value[1].tolist() == [0.5] * 3584
    with pytest.raises(DataError, match="no embeddings of family '85'; there is 83"):
        prepare_contest(source, tmp_path / "out", workers=1, families=("85",))


def test_mangled_lines_raise_nothing_but_data_errors(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=3, num_items=20, mean_length=4, seed=3, irregular=True)
    for name in ("predict_seq.jsonl", "predict_set.jsonl"):
        (source / name).unlink()
    files = [source / "seq.jsonl", source / "item_feat_dict.json", *(source / "creative_emb/emb_81_32").glob("*.json")]
    good = {path: path.read_bytes() for path in files}
    generator = random.Random(5)
    outcomes = set()
    for attempt in range(120):
        path = files[attempt % len(files)]
        data = bytearray(good[path])
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data))
            if generator.random() < 0.3:
                del data[place : place + generator.randint(1, 40)]
            else:
                data[place : place + 1] = generator.choice(
                    [b"[", b"]", b"{", b'"', b"\xff", b"9" * 30, b"null", b"\n", b"-", b"1e9"]
                )
        path.write_bytes(data)
        try:
            prepare_contest(source, tmp_path / "out", workers=1)
            outcomes.add("read")
        except DataError as error:
            outcomes.add("refused" if str(tmp_path) in str(error) else str(error))
        path.write_bytes(good[path])
    assert outcomes == {"read", "refused"}


# Processes, kills, memory


def test_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_contest(tmp_path / "in", num_users=80, num_items=60, mean_length=6, seed=3, irregular=True)
    monkeypatch.setattr(contest, "_BLOCK_BYTES", 10_000)
    heard: dict[int, list[int]] = {1: [], 2: []}
    for workers, calls in heard.items():
        prepare_contest(source, tmp_path / str(workers), workers=workers, on_bytes=calls.append)
    one, two = content(tmp_path / "1"), content(tmp_path / "2")
    assert one == two
    assert heard[1] == heard[2] == sorted(heard[1])
    assert heard[1][-1] == contest_bytes(source)
    assert len(heard[1]) > 5


def test_fault_in_a_worker_arrives_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = hand_made(tmp_path / "in", [*[GOOD] * 50, "[[1]]", *[GOOD] * 50, "worse"])
    monkeypatch.setattr(contest, "_BLOCK_BYTES", 500)
    with pytest.raises(DataError, match=r"seq\.jsonl:51: .*records of 6 values"):
        prepare_contest(source, tmp_path / "out", workers=2)


def test_workers_import_neither_torch_nor_the_terminal():
    code = "import sys, apps.seqrec.contest_lines; print({'torch', 'typer', 'rich', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


KILLED = """
import os, signal, sys
from pathlib import Path
from apps.seqrec import contest

source, output, calls, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
contest._BLOCK_BYTES = 8_000
heard = []

def on_bytes(done):
    heard.append(done)
    if len(heard) == calls:
        os.kill(os.getpid(), signal.SIGKILL)

if calls == 0:  # while the packs are written
    contest.write_pack = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
contest.prepare_contest(source, output, on_bytes=on_bytes, workers=workers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills with SIGKILL")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_conversion_goes_on_and_ends_in_the_same_bytes(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_contest(tmp_path / "in", num_users=80, num_items=60, mean_length=6, seed=3, irregular=True)
    monkeypatch.setattr(contest, "_BLOCK_BYTES", 8_000)
    prepare_contest(source, tmp_path / "whole", workers=1)
    output = tmp_path / "out"
    moment = random.Random(workers).randint(2, 8)
    for calls in (moment, 0):
        command = [sys.executable, "-c", KILLED, *map(str, (source, output, calls, workers))]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert found.returncode == -9, found.stderr
        assert not output.exists()
        if calls:
            (work,) = tmp_path.glob(".out.*.work")
            assert len(list(work.glob("seq.*.part"))) >= moment
            next(work.glob("seq.*.part")).write_bytes(b"half")  # as a crash of the machine may leave it
    said: list[str] = []
    prepare_contest(source, output, workers=1, say=said.append)
    assert any("blocks were finished before" in line for line in said)
    assert content(output) == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out.*"))


def test_work_of_another_source_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = hand_made(tmp_path / "in", [GOOD] * 20 + ["bad"])
    monkeypatch.setattr(contest, "_BLOCK_BYTES", 200)
    with pytest.raises(DataError):
        prepare_contest(source, tmp_path / "out", workers=1)
    (work,) = tmp_path.glob(".out.*.work")
    hand_made(source, [[event(2, 2, 5)]] * 20)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert set(data.item.tolist()) == {2}
    assert not work.exists()


MEASURED = """
import resource, sys
from pathlib import Path
from apps.seqrec.contest import prepare_contest

for source in sys.argv[1:]:
    prepare_contest(Path(source), Path(source + ".out"), workers=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB there")
def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """Parsed whole, the larger file's records would be some 200 MB of dictionaries; what may grow is 13 bytes per event
    of mapped arrays, under 2 MB, and the allocator's slack."""
    for name, num_users in (("small", 200), ("large", 2000)):
        write_contest(tmp_path / name, num_users=num_users, num_items=300, mean_length=60, seed=3)
        features = json.dumps(dict.fromkeys(ITEM_FIELDS, 1))
        with (tmp_path / name / "predict_set.jsonl").open("w") as file:
            for n in range(num_users * 20):
                file.write(f'{{"creative_id": {10**10 + n}, "retrieval_id": {n}, "features": {features}}}\n')
    assert (tmp_path / "large/seq.jsonl").stat().st_size > 18 << 20
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = map(int, found.stdout.split())
    assert large - small < 40 << 10


# Packs


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Path]:
    source = write_contest(tmp_path / "in", num_users=8, num_items=20, mean_length=4, seed=3)
    prepare_contest(source, tmp_path / "out", workers=1)
    return source, tmp_path / "out"


def test_folders_are_told_apart(packed: tuple[Path, Path], tmp_path: Path):
    source, output = packed
    assert is_contest(source)
    assert is_contest_pack(output)
    assert not is_contest_pack(source)
    assert not is_contest(output)
    assert not is_contest(tmp_path / "nowhere")


def test_pack_does_not_need_its_source(packed: tuple[Path, Path]):
    source, output = packed
    before = read_users(read_contest(output))
    shutil.rmtree(source)
    assert read_users(read_contest(output)) == before


@pytest.mark.parametrize(
    "name",
    [
        "seq.jsonl",
        "indexer.pkl",
        "item_feat_dict.json",
        "creative_emb/emb_81_32/emb_81_0.json",
        "predict_seq.jsonl",
        "predict_set.jsonl",
    ],
)
def test_changed_source_is_noticed(name: str, packed: tuple[Path, Path]):
    source, output = packed
    path = source / name
    data = path.read_bytes()
    path.write_bytes(data)  # a new time alone is no change
    os.utime(path, ns=(1, 1))
    read_contest(output)
    path.write_bytes(data + b"\n")
    with pytest.raises(DataError, match=f"stale pack, .*{path.name} has changed since"):
        read_contest(output)


@pytest.mark.parametrize("name", ["predict_seq.jsonl", "predict_set.jsonl"])
def test_added_file_is_noticed(name: str, packed: tuple[Path, Path]):
    source, output = packed
    data = (source / name).read_bytes()
    (source / name).unlink()
    read_contest(output)  # whoever has only the packs can use them
    prepare_contest(source, output, workers=1)
    (source / name).write_bytes(data)
    with pytest.raises(DataError, match=f"stale pack, .*{name} has been added since; write it again: .*prepare"):
        read_contest(output)


@pytest.mark.parametrize("name", ["seq", "items", "emb_81", "predict_seq", "candidates"])
def test_pack_of_an_older_layout_is_refused_with_the_command(name: str, packed: tuple[Path, Path]):
    path = packed[1] / f"{name}.safetensors"
    tensors, meta = read_pack(path, kind=contest._KIND[name.removesuffix("_81")])
    write_pack(path, {key: value.clone() for key, value in tensors.items()}, {**meta, "layout": 1})
    with pytest.raises(DataError, match=rf"{name}\.safetensors: layout 1 of .*prepare SOURCE .*out"):
        read_contest(packed[1])


def change_tensor(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][...] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("candidates", change_tensor("row", 99), r"candidates' rows in 1\.\.21"),
        ("candidates", change_tensor("item", -1), r"candidates' items in 0\.\.20"),
        ("candidates", lambda tensors: tensors.update(item=torch.zeros(1)), "expected item as"),
        ("predict_seq", change_tensor("item", 21), r"items in 0\.\.20"),
        ("predict_seq", change_tensor("cold_row", 20), r"cold rows in 21\.\.21"),
        ("predict_seq", change_tensor("ptr", 1), "ptr to rise"),
        ("emb_81", lambda tensors: tensors.update(present=torch.zeros(21)), "22 embeddings of family 81"),
    ],
)
def test_tensors_of_another_form_are_refused(
    name: str, change: Callable[[dict[str, torch.Tensor]], None], part: str, packed: tuple[Path, Path]
):
    path = packed[1] / f"{name}.safetensors"
    tensors, meta = read_pack(path, kind=contest._KIND[name.removesuffix("_81")])
    tensors = {key: value.clone() for key, value in tensors.items()}
    change(tensors)
    write_pack(path, tensors, meta)
    with pytest.raises(DataError, match=part):
        read_contest(packed[1])


@pytest.mark.parametrize("name", ["seq", "items", "predict_seq", "candidates"])
def test_flipped_bit_is_noticed(name: str, packed: tuple[Path, Path]):
    path = packed[1] / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="does not match its checksum"):
        read_contest(packed[1])


def test_packs_of_two_sources_are_not_mixed(packed: tuple[Path, Path], tmp_path: Path):
    other = write_contest(tmp_path / "other", num_users=8, num_items=20, mean_length=4, seed=4)
    prepare_contest(other, tmp_path / "second", workers=1)
    shutil.copyfile(tmp_path / "second/items.safetensors", packed[1] / "items.safetensors")
    with pytest.raises(DataError, match=r"items\.safetensors: of another source"):
        read_contest(packed[1])
    (packed[1] / "items.safetensors").unlink()
    with pytest.raises(DataError, match=r"items\.safetensors: no such file"):
        read_contest(packed[1])


def test_output_takes_the_place_of_packs_only(packed: tuple[Path, Path], tmp_path: Path):
    source, output = packed
    before = content(output)
    prepare_contest(source, output, workers=1)
    assert content(output) == before
    (output / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"holds thesis\.txt"):
        prepare_contest(source, output, workers=1)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        prepare_contest(source, tmp_path / "file", workers=1)


def test_contest_is_frozen(packed: tuple[Path, Path]):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_contest(packed[1]).item = torch.zeros(1)  # type: ignore[misc]


# The generator


def test_generated_files_are_a_function_of_the_arguments(tmp_path: Path):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        write_contest(folder, num_users=5, num_items=30, mean_length=5, seed=seed, families=FORMS, irregular=True)
    texts = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert texts[0] == texts[1]
    assert texts[0].keys() == texts[2].keys()
    assert texts[0][Path("seq.jsonl")] != texts[2][Path("seq.jsonl")]
    (folders[0] / "seq.jsonl").write_text("mine", encoding="utf-8")
    write_contest(folders[0], num_users=5, num_items=30, mean_length=5, seed=3, families=FORMS, irregular=True)
    assert (folders[0] / "seq.jsonl").read_text() == "mine"


@pytest.mark.parametrize("irregular", [False, True])
def test_generated_pickles_are_those_that_pickle_reads(irregular: bool, tmp_path: Path):
    source = write_contest(
        tmp_path / "in", num_users=9, num_items=30, mean_length=5, seed=3, families=FORMS, irregular=irregular
    )
    for path in source.rglob("*.pkl"):
        value = pickle.loads(path.read_bytes())
        assert value == load_pickle(path)
    indexer = pickle.loads((source / "indexer.pkl").read_bytes())
    assert type(indexer["f"]) is defaultdict
    assert indexer["f"]["nothing"] == {}
    for name in ("seq", "predict_seq"):
        offsets = load_pickle(source / f"{name}_offsets.pkl")
        assert isinstance(offsets, dict) == irregular
        data = (source / f"{name}.jsonl").read_bytes()
        ends = [n + 1 for n, byte in enumerate(data) if byte == 10]
        assert (list(offsets.values()) if irregular else offsets) == [0, *ends[:-1]]
    rows = [json.loads(line) for line in (source / "predict_set.jsonl").read_text().splitlines()]
    assert [row["retrieval_id"] for row in rows] == list(range(len(rows)))


def test_the_structure_can_be_learnt(tmp_path: Path):
    """Who knows kind, action and cluster of the last item meets the next cluster far more often than who guesses, of
    training and of test users."""
    source = write_contest(tmp_path / "in", num_users=400, num_items=200, mean_length=20, seed=3)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    key, following = steps(data, data)
    assert data.queries is not None
    test_key, test_following = steps(data, data.queries)
    table = torch.zeros(int(max(key.max(), test_key.max())) + 1, int(following.max()) + 1)
    half = len(key) // 2
    table.index_put_((key[:half], following[:half]), torch.ones(half), accumulate=True)
    for where, what in ((key[half:], following[half:]), (test_key, test_following)):
        right = (table[where].argmax(1) == what).float().mean()
        assert right > 0.5
        blind = (table.sum(0).argmax() == what).float().mean()
        assert blind < 0.3
    vectors = data.embeddings["81"].value.float()
    cluster = data.item_feature[1:, data.item_fields.index("102")].long()
    assert cluster_mean_distance(vectors[1:201], cluster) < 0.7
    assert data.candidates is not None
    cold = data.candidates.item == 0
    twins = data.candidates.feature[cold, data.item_fields.index("102")].long()
    rows = data.candidates.row[cold].long()
    assert len(rows) == 10
    assert cluster_mean_distance(torch.cat([vectors[1:201], vectors[rows]]), torch.cat([cluster, twins])) < 0.7


def steps(data: Contest, events: Events) -> tuple[torch.Tensor, torch.Tensor]:
    """Kind of the user, action and cluster of the item as one number, and the cluster of the next item; of all pairs of
    events of known items that follow one another."""
    cluster = data.item_feature[:, data.item_fields.index("102")].long()[events.item.long()]
    owner = events.history.user_of_event
    kind = events.user_feature[:, data.user_fields.index("105")].long()[owner]
    key = (kind * 2 + (events.action > 0)) * 1000 + cluster
    is_pair = (owner[1:] == owner[:-1]) & (events.item[1:] > 0) & (events.item[:-1] > 0)
    return key[:-1][is_pair], cluster[1:][is_pair]


def cluster_mean_distance(vectors: torch.Tensor, cluster: torch.Tensor) -> float:
    """Distance of vectors to the mean of their cluster, as a share of that to the mean of all."""
    size = int(cluster.max()) + 1
    count = torch.bincount(cluster, minlength=size).clamp(min=1)
    mean = torch.zeros(size, vectors.shape[1]).index_add_(0, cluster, vectors) / count[:, None]
    return float((vectors - mean[cluster]).norm(dim=1).mean() / (vectors - vectors.mean(0)).norm(dim=1).mean())
