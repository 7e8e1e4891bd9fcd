"""The contest form through the command line: checked, converted once, trained on."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.seqrec import main
from apps.seqrec.contest import read_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.vectors import read_fbin, read_u64bin

SMALL = ("--embed-dim", "8", "--batch-size", "16", "--max-steps", "3", "--ks", "5", "--select", "NDCG@5")


def invoke(folder: Path, *words: str) -> int:
    with contextlib.chdir(folder), pytest.raises(SystemExit) as end:
        main.app(words)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def contest(tmp_path: Path) -> Path:
    """A folder with a small contest folder in it, written in every irregular way."""
    write_contest(tmp_path / "contest", num_users=40, num_items=50, mean_length=12, seed=3, irregular=True)
    return tmp_path


def test_a_contest_folder_is_converted_once_and_trained_on(contest, capsys):
    assert invoke(contest, "prepare", "contest", "pack", "--workers", "1") == 0
    said = capsys.readouterr().out
    assert "pack: 40 users, 50 items" in said
    assert "embeddings 81" in said
    assert invoke(contest, "train", "--data-path", "pack", *SMALL) == 0
    (result,) = contest.glob("runs/seqrec/*/result.json")
    assert json.loads(result.read_text())["data"]["items"] == 50
    (run,) = contest.glob("runs/seqrec/*-run")
    assert invoke(contest, "predict", str(run.relative_to(contest)), "--k", "3", "--output", "top3.jsonl") == 0
    assert len((contest / "top3.jsonl").read_text().splitlines()) > 0


def test_training_on_the_source_names_the_command_that_converts_it(contest, capsys):
    assert invoke(contest, "train", "--data-path", "contest") == 2
    assert "python -m apps.seqrec prepare contest contest-pack" in capsys.readouterr().err
    assert not (contest / "runs").exists()


def test_check_names_file_line_and_repair_and_exits_with_2(contest, capsys):
    path = contest / "contest" / "seq.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:30] + "\n", *lines[5:]]))
    assert invoke(contest, "check", "contest") == 2
    said = capsys.readouterr().out
    assert "seq.jsonl:5: error:" in said
    assert "contest: cannot be read as it is" in said


def test_check_of_a_sound_folder_ends_well(tmp_path, capsys):
    write_contest(tmp_path / "contest", num_users=10, num_items=20, mean_length=8, seed=1)
    assert invoke(tmp_path, "check", "contest") == 0
    said = capsys.readouterr().out
    assert "error" not in said
    assert "contest: can be read" in said  # the candidates have cold items, which is a warning


TINY = ("--embed-dim", "8", "--batch-size", "16", "--max-steps", "3", "--ks", "10", "--max-len", "8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on small demo data, and nothing else."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apps.seqrec.demo.CONTEST_USERS", 60)
        patch.setattr("apps.seqrec.demo.CONTEST_ITEMS", 40)
        assert invoke(folder, "train", *TINY) == 0
    (run,) = folder.glob("runs/seqrec/*-run")
    source, pack = folder / "runs" / "seqrec" / "demo-data", folder / "runs" / "seqrec" / "demo-pack"
    assert source.is_dir()
    # from here on the demo is like anybody's data
    pack.rename(folder / "pack")
    source.rename(folder / "demo-data")
    assert invoke(folder, "prepare", "demo-data", "pack", "--workers", "1") == 0
    run.rename(folder / "run")
    return folder


def predicted(folder: Path, *words: str) -> list[dict[str, Any]]:
    words = ("predict", "run", "--data-path", "pack", "--k", "5", "--output", "found.jsonl", *words)
    assert invoke(folder, *words) == 0
    return [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()]


def test_the_default_run_measures_the_contest_score_beside_the_metrics(demo):
    result = json.loads((demo / "run" / "result.json").read_text())
    row = result["table"][0]
    assert row["Score"] == pytest.approx(0.31 * row["HR@10"] + 0.69 * row["NDCG@10"])
    assert "Weighted score" in row
    assert "asked for a click" in result["protocol"]


def test_predictions_are_the_candidates_of_every_test_user_without_what_they_have_seen(demo):
    lines = (demo / "demo-data" / "predict_set.jsonl").read_text().splitlines()
    candidates = {str(json.loads(line)["creative_id"]) for line in lines}
    histories = {}
    for line in (demo / "demo-data" / "predict_seq.jsonl").read_text().splitlines():
        records = json.loads(line)
        histories[str(records[0][0])] = {record[1] for record in records if record[1] is not None}
    names = dict(enumerate(read_contest(demo / "pack").sequences.item_ids, 1))
    found = predicted(demo)
    assert [record["user"] for record in found] == list(histories)
    for record in found:
        seen = {names.get(item, str(item)) for item in histories[record["user"]]}
        assert set(record["items"]) <= candidates - seen
        assert len(record["items"]) == min(5, len(candidates - seen))
    with_seen = predicted(demo, "--keep-seen")
    assert any(set(record["items"]) & {names.get(i, str(i)) for i in histories[record["user"]]} for record in with_seen)


def test_cold_candidates_can_be_left_out(demo):
    known = set(read_contest(demo / "pack").sequences.item_ids)
    everything = {item for record in predicted(demo, "--k", "1000") for item in record["items"]}
    assert everything - known
    assert {item for record in predicted(demo, "--k", "1000", "--no-cold") for item in record["items"]} <= known


def test_training_users_and_all_items_can_be_asked_for_instead(demo):
    contest = read_contest(demo / "pack")
    found = predicted(demo, "--training-users", "--all-items")
    assert [record["user"] for record in found] == list(contest.sequences.user_ids)
    assert {item for record in found for item in record["items"]} <= set(contest.sequences.item_ids)


def test_vectors_for_a_search_engine_give_the_same_ranking(demo):
    found = predicted(demo, "--vectors", "vectors", "--keep-seen")
    query, item = read_fbin(demo / "vectors" / "queries.fbin"), read_fbin(demo / "vectors" / "items.fbin")
    retrieval = read_u64bin(demo / "vectors" / "items.u64bin")
    candidates = read_contest(demo / "pack").candidates
    assert candidates is not None
    assert torch.equal(retrieval, candidates.retrieval)
    best = (query @ item.t()).topk(5).values
    assert torch.allclose(best, torch.tensor([record["scores"] for record in found]), atol=1e-5)


def test_inference_only_reaches_the_same_predictions(demo):
    expected = predicted(demo)
    weights = max((demo / "run" / "checkpoints").iterdir()).relative_to(demo)
    words = ("--inference_only", "--state_dict_path", str(weights), "--data_path", "pack")
    assert invoke(demo, *words, *TINY[:2], *TINY[-2:], "--k", "5", "--output", "again.jsonl") == 0
    assert [json.loads(line) for line in (demo / "again.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize("split", ["user", "time"])
def test_a_held_out_split_is_named_in_the_protocol(demo, split):
    words = ("--data-path", "pack", "--split", split, "--held-out-share", "0.4", "--name", split, *TINY)
    assert invoke(demo, "train", *words) == 0
    (path,) = demo.glob(f"runs/seqrec/*-{split}/result.json")
    assert "held out" in json.loads(path.read_text())["protocol"]


def test_query_time_says_that_it_leaks(demo, capsys):
    assert invoke(demo, "train", "--data-path", "pack", "--query-time", "--name", "leak", *TINY) == 0
    said = capsys.readouterr().out
    assert "--query-time" in said
    assert "no real query knows" in said
