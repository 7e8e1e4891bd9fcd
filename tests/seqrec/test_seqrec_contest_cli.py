"""The contest form through the command line: checked, converted once, trained on."""

import contextlib
import json
from pathlib import Path

import pytest

from apps.seqrec import main
from apps.seqrec.contest_demo import write_contest

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
