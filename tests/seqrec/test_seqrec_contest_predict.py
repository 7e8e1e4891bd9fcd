"""Test users, candidates and cold items of the contest form, against a slow reader of dictionaries."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.seqrec import contest
from apps.seqrec.contest import Contest, prepare_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_lines import ITEM_FIELDS
from apps.seqrec.formats import DataError
from shared.pickles import load_pickle
from tests.seqrec.test_seqrec_contest import GOOD, RAW, clean, event, hand_made, read_users, slow_users


def candidate(creative: Any, retrieval: Any, features: Any = ...) -> dict[str, Any]:
    return {
        "creative_id": creative,
        "retrieval_id": retrieval,
        "features": {"101": 1} if features is ... else features,
    }


def add_lines(source: Path, name: str, lines: list[Any]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text(text, encoding="utf-8")


def slow_candidates(source: Path) -> list[dict[str, Any]]:
    """Every candidate, with the row of the embeddings that a dictionary filled line by line gives it."""
    indexer = load_pickle(source / "indexer.pkl")
    vocab = {field: len(values) for field, values in indexer["f"].items()}
    rows = dict(indexer["i"])
    found = []
    for line in (source / "predict_set.jsonl").read_text(encoding="utf-8").splitlines():
        if line.strip():
            record = json.loads(line)
            creative = int(record["creative_id"])
            rows.setdefault(creative, len(rows) + 1)
            found.append(
                {
                    "creative": creative,
                    "retrieval": record["retrieval_id"],
                    "item": indexer["i"].get(creative, 0),
                    "row": rows[creative],
                    "feature": [clean(record["features"].get(f, 0), vocab[f]) for f in ITEM_FIELDS if f in vocab],
                }
            )
    return found


def read_candidates(data: Contest) -> list[dict[str, Any]]:
    """The same, from the tensors."""
    assert data.candidates is not None
    columns = {name: values.tolist() for name, values in vars(data.candidates).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("block_bytes", [3000, 1 << 20])
def test_test_users_and_candidates_are_those_of_the_slow_reader(
    irregular: bool, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_contest(tmp_path / "in", num_users=30, num_items=90, mean_length=9, seed=3, irregular=irregular)
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.queries is not None
    expected = slow_users(source, "predict_seq.jsonl")
    for user in expected:
        user.pop("profile")
    assert read_users(data.queries) == expected
    assert {user["number"] == 0 for user in expected} == {False, True}
    assert {item == 0 for user in expected for _, item, _, _ in user["events"]} == {False, True}
    assert any(own for user in expected for _, item, _, own in user["events"] if item == 0)
    candidates = slow_candidates(source)
    assert read_candidates(data) == candidates
    assert data.num_extra == max(entry["row"] for entry in candidates) - 90 == 5


@pytest.mark.parametrize("block_bytes", [60, 1 << 20])
def test_odd_candidates_are_read(block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = hand_made(tmp_path / "in", [GOOD])
    lines: list[Any] = [
        candidate(RAW + 3, 7, {"101": 3, "102": 5}),
        candidate(900, 0, {}),
        "",
        candidate(-5, 3, {"101": "x", "102": 6, "999": 1}),
        candidate(str(RAW + 1), 1, {"101": None, "102": 2.5}),
        " ",
        candidate(900, (1 << 63) - 1, {"101": True, "102": 1}),
        candidate(1 << 40, 2, {"101": [4], "102": -1}),
        {**candidate("900", 4), "more": 1},  # the item of line 2 as text
    ]
    add_lines(source, "predict_set.jsonl", lines)
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    said: list[str] = []
    data = prepare_contest(source, tmp_path / "out", workers=1, say=said.append)
    assert data.candidates is not None
    assert read_candidates(data) == slow_candidates(source)
    assert data.candidates.row.tolist() == [3, 5, 6, 1, 5, 7, 5]
    assert data.candidates.item.tolist() == [3, 0, 0, 1, 0, 0, 0]
    assert data.candidates.feature[0].tolist() == [3, 5]
    assert data.num_extra == 3
    assert "predict_set.jsonl: 7 candidates, 5 of them cold: the indexer lacks them" in said
    assert "predict_set.jsonl: 5 unseen feature values" in said
    assert any(line.startswith("predict_set.jsonl: item features left out") and '"999"' in line for line in said)


def test_candidates_of_an_indexer_without_numbers_are_all_cold(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    indexer = pickle.loads((source / "indexer.pkl").read_bytes())
    indexer["i"] = {f"ad {n}": n for n in range(1, 5)}
    (source / "indexer.pkl").write_bytes(pickle.dumps(indexer))
    add_lines(source, "predict_set.jsonl", [candidate(5, 0), candidate(3, 1), candidate(5, 2)])
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.candidates is not None
    assert data.candidates.row.tolist() == [5, 6, 5]
    assert data.num_extra == 2


def test_candidates_without_a_cold_one_add_no_rows(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    add_lines(source, "predict_set.jsonl", [candidate(RAW + 2, 0)])
    add_lines(source, "creative_emb/emb_82_2/a.json", [{"anonymous_cid": 7, "emb": [1, 2]}])
    said: list[str] = []
    data = prepare_contest(source, tmp_path / "out", workers=1, say=said.append)
    assert data.num_extra == 0
    assert data.embeddings["82"].value.shape == (5, 2)
    assert "family 82: 1 embeddings of unknown items" in said


def test_cold_candidates_have_embeddings_and_other_unknown_items_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = hand_made(tmp_path / "in", [GOOD])
    add_lines(source, "predict_set.jsonl", [candidate(800, 0), candidate(RAW + 1, 1), candidate(700, 2)])
    lines = [(700, [1, 2]), (RAW + 1, [3, 4]), (600, [5, 6]), ("x", [5, 6]), (700, [7, 8]), (RAW + 4, None)]
    add_lines(source, "creative_emb/emb_82_2/part-0", [{"anonymous_cid": raw, "emb": emb} for raw, emb in lines])
    (source / "creative_emb/emb_83_1.pkl").write_bytes(pickle.dumps({800: [1.0], RAW + 2: [2.0], 5: [3.0]}))
    monkeypatch.setattr(contest, "_BLOCK_BYTES", 40)  # so that the two lines of 700 are in different blocks
    said: list[str] = []
    data = prepare_contest(source, tmp_path / "out", workers=1, say=said.append)
    assert data.candidates is not None
    assert data.candidates.row.tolist() == [5, 1, 6]
    assert data.embeddings["82"].value.tolist() == [[0, 0], [3, 4], [0, 0], [0, 0], [0, 0], [0, 0], [7, 8]]
    assert data.embeddings["82"].present.tolist() == [False, True, False, False, False, False, True]
    assert data.embeddings["83"].value.flatten().tolist() == [0, 0, 2, 0, 0, 1, 0]
    for part in (
        "family 82: 1 of 4 items have an embedding, 2 wide",
        "family 82: 1 of 2 cold items have an embedding",
        "family 82: 2 embeddings of unknown items",
        "family 83: 1 of 2 cold items have an embedding",
        "family 83: 1 embeddings of unknown items",
    ):
        assert part in said


@pytest.mark.parametrize("irregular", [False, True])
@pytest.mark.parametrize("block_bytes", [2000, 1 << 20])
def test_events_of_cold_candidates_have_their_rows(
    irregular: bool, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = write_contest(tmp_path / "in", num_users=40, num_items=90, mean_length=12, seed=3, irregular=irregular)
    with (source / "seq.jsonl").open("a", encoding="utf-8") as file:  # in training too, and out of order of time
        records = [event(1, 25_000_000_020, 9), event(1, 5, 8), event(1, "25000000000", 7, 0, {}), event(1, 99, 6)]
        file.write(json.dumps(records) + "\n")
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.queries is not None
    rows = {entry["creative"]: entry["row"] for entry in slow_candidates(source) if not entry["item"]}
    for events, name in ((data, "seq.jsonl"), (data.queries, "predict_seq.jsonl")):
        expected = {}
        number = 0
        for line in (source / name).read_text().splitlines():
            last_time = 0
            timed = []
            for _, item, _, features, _, time in json.loads(line):
                if item is not None or features is not None:
                    last_time = last_time if time is None else time
                    timed.append((last_time, item))
            for _, item in sorted(timed, key=lambda entry: entry[0]):
                if int(item) in rows:
                    expected[number] = rows[int(item)]
                number += 1
        assert number == events.item.numel()
        assert dict(zip(events.cold_event.tolist(), events.cold_row.tolist(), strict=True)) == expected
        assert len(expected) > 1
        assert events.cold_event.tolist() == sorted(expected)


def test_known_events_point_into_all_events(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=30, num_items=50, mean_length=8, seed=1, irregular=True)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.queries is not None
    for events in (data, data.queries):
        assert events.known_event is not None
        known = [n for n, item in enumerate(events.item.tolist()) if item]
        assert events.known_event.tolist() == known
        assert events.sequences.item.tolist() == [int(events.item[n]) for n in known]
        owner = events.history.user_of_event[events.known_event]
        assert torch.equal(events.sequences.user_of_event, owner)
    assert data.queries.sequences.item_ids is data.sequences.item_ids
    assert data.queries.sequences.name == "in/predict_seq.jsonl"


def test_prediction_files_may_be_absent(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=8, num_items=20, mean_length=4, seed=3)
    whole = prepare_contest(source, tmp_path / "whole", workers=1)
    assert whole.queries is not None
    (source / "predict_seq.jsonl").unlink()
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.queries is None
    assert data.candidates is not None
    assert data.num_extra == 1
    (source / "predict_set.jsonl").unlink()
    data = prepare_contest(source, tmp_path / "out", workers=1)
    assert data.candidates is None
    assert data.num_extra == 0
    assert data.embeddings["81"].value.shape == (21, 32)
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["emb_81", "items", "seq"]
    # a training run can be resumed whichever files for prediction are there
    assert data.sequences.fingerprint == whole.sequences.fingerprint != whole.queries.sequences.fingerprint


BAD_CANDIDATES: dict[str, tuple[Any, str]] = {
    "cut": (json.dumps(candidate(1, 5))[:-9], "complete JSON"),
    "no object": ([1, 2], 'expected {"creative_id": id, "retrieval_id": row, "features": {...}}, found [1, 2]'),
    "no id": ({"retrieval_id": 5, "features": {}}, 'creative_id: expected {"creative_id"'),
    "no row": ({"creative_id": 5, "features": {}}, 'retrieval_id: expected {"creative_id"'),
    "no features": ({"creative_id": 5, "retrieval_id": 5}, 'features: expected {"creative_id"'),
    "id as a name": (candidate("ad", 5), 'creative_id: expected an integer, found "ad"'),
    "id as a fraction": (candidate(1.5, 5), "creative_id: expected an integer, found 1.5"),
    "huge id": (candidate(1 << 63, 5), "creative_id: expected an integer"),
    "true as an id": (candidate(True, 5), "creative_id: expected an integer, found true"),
    "row as text": (candidate(1, "5"), 'retrieval_id: expected an integer from 0, found "5"'),
    "negative row": (candidate(1, -1), "retrieval_id: expected an integer from 0, found -1"),
    "huge row": (candidate(1, 1 << 63), "retrieval_id: expected an integer from 0"),
    "features of another kind": (candidate(1, 5, None), "features: expected an object, found null"),
    "row twice": (candidate(1, 2), "retrieval_id: expected each id once, found 2 again"),
    "NaN": (candidate(1, 5, {"101": float("nan")}), "finite numbers"),
}


@pytest.mark.parametrize("name", BAD_CANDIDATES)
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_bad_candidate_is_refused_with_its_line(
    name: str, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    line, part = BAD_CANDIDATES[name]
    monkeypatch.setattr(contest, "_BLOCK_BYTES", block_bytes)
    source = hand_made(tmp_path / "in", [GOOD])
    add_lines(source, "predict_set.jsonl", [candidate(9, 2), "", candidate(8, 0), line, candidate(7, 3)])
    with pytest.raises(DataError) as caught:
        prepare_contest(source, tmp_path / "out", workers=1)
    assert "predict_set.jsonl:4: error: " in str(caught.value)
    assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_test_user_is_refused_with_its_line(tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    add_lines(source, "predict_seq.jsonl", [GOOD, "[[1]]"])
    with pytest.raises(DataError, match=r"predict_seq\.jsonl:2: .*records of 6 values"):
        prepare_contest(source, tmp_path / "out", workers=1)


@pytest.mark.parametrize(
    ("name", "part"),
    [("seq.jsonl", "one user"), ("predict_seq.jsonl", "one user"), ("predict_set.jsonl", "one candidate")],
)
def test_file_of_nothing_is_refused(name: str, part: str, tmp_path: Path):
    source = hand_made(tmp_path / "in", [GOOD])
    for text in ("", "\n\n"):
        (source / name).write_text(text)
        with pytest.raises(DataError, match=f"{name}: error: expected at least {part}, found none"):
            prepare_contest(source, tmp_path / "out", workers=1)


def test_test_users_go_on_where_the_training_users_stop(tmp_path: Path):
    source = write_contest(tmp_path / "in", num_users=40, num_items=200, mean_length=20, seed=3)
    data = prepare_contest(source, tmp_path / "out", workers=1)
    queries = data.queries
    assert queries is not None
    assert len(queries.user_ids) == 40
    for u, name in enumerate(queries.user_ids):
        assert name == (f"newcomer_{u + 1}" if u % 4 == 0 else data.user_ids[u])
        times = queries.time[queries.ptr[u] : queries.ptr[u + 1]].tolist()
        last = int(data.time[data.ptr[u + 1] - 1])
        assert times == sorted(set(times))
        assert times[-1] > last
        assert (times[0] > last) == (u % 4 == 0)
        assert torch.equal(queries.user_feature[u], data.user_feature[u])
        if u % 4:
            before = dict(zip(data.time[data.ptr[u] : data.ptr[u + 1]].tolist(), range(99), strict=False))
            shared = [time for time in times if time <= last]
            assert 0 < len(shared) < len(times)
            assert [before[time] for time in shared] == list(range(len(before) - len(shared), len(before)))
