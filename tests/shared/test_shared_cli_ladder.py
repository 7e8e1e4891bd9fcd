"""What `bench` shares in every app beside the measuring: options, folder, and how the ladder is printed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shared import cli
from shared.config import ConfigError
from shared.ladder import Epoch, Ladder, Part, Run, Rung, Unmeasured, Work


def rung(name: str, claim: str = "") -> Rung:
    def make() -> Run:
        return lambda steps: Work(10 * steps, steps)

    return Rung(name, f"how {name} [does] it", make, claim)


LADDER = Ladder(
    (
        Part("alone", "training, alone", "train", "pairs", (rung("original"), rung("fast", "S0-12: 1.5-2x"))),
        Part("sum", "training, summed", "train", "pairs", (rung("original"), rung("fast")), cumulative=True),
    ),
    (Unmeasured("S3-28: accuracy", "takes whole trainings"),),
    Epoch("sum", 3600),
)


def run(folder: Path, ladder: Ladder = LADDER, *, demo: bool = True, **more: Any) -> tuple[Path, dict[str, Any]]:
    options: dict[str, Any] = {"quick": True, "budget": 0.0, "project_epochs": 10, "on_run": lambda name: None, **more}
    return cli.run_ladder(
        ladder,
        app="toy",
        data={"name": "toys", "demo": demo},
        device=torch.device("cpu"),
        notes=["a note"],
        command="python -m apps.toy bench",
        runs_dir=folder,
        **options,
    )


def printed(found: dict[str, Any], *, terminal: bool) -> str:
    file = io.StringIO()
    cli.print_ladder(Console(file=file, force_terminal=terminal, width=200, no_color=True, soft_wrap=True), found)
    return file.getvalue()


@pytest.mark.parametrize(("demo", "name"), [(True, "demo-bench"), (False, "bench")])
def test_a_ladder_leaves_a_folder_with_its_record(tmp_path: Path, demo: bool, name: str):
    run_dir, found = run(tmp_path, demo=demo)
    assert run_dir.parent == tmp_path / "toy"
    assert run_dir.name.partition("-")[2].partition("-")[2] == name
    assert json.loads((run_dir / "bench.json").read_text(encoding="utf-8")) == found
    assert found["command"] == "python -m apps.toy bench"


def test_the_budget_is_what_was_asked_for_or_the_one_of_quick(tmp_path: Path):
    single = Ladder((Part("alone", "alone", "train", "pairs", (rung("original"),)),))
    assert run(tmp_path, single, budget=0.25)[1]["budget_s"] == 0.25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "QUICK_BUDGET_S", 0.125)
        patch.setattr(cli, "BUDGET_S", 0.375)
        assert run(tmp_path, single, budget=None, quick=True)[1]["budget_s"] == 0.125
        assert run(tmp_path, single, budget=None, quick=False)[1]["budget_s"] == 0.375


def test_a_budget_that_did_not_hold_and_a_projection_that_is_missing_are_told(tmp_path: Path):
    _, found = run(tmp_path, Ladder(LADDER.parts))
    assert any("a repeat has one step at least" in note for note in found["notes"])
    assert any("no projection" in note for note in found["notes"])
    assert found["notes"][0] == "a note"


def test_elsewhere_than_on_a_terminal_every_row_is_a_line_that_says_demo_data(tmp_path: Path):
    lines = printed(run(tmp_path)[1], terminal=False).splitlines()
    (fast,) = [line for line in lines if "S0-12" in line]
    for words in ("fast (how fast [does] it)", "pairs/s", "steps/s", "x", "memory", "1.5-2x"):
        assert words in fast
    assert [line for line in lines if "demo data" not in line] == []
    assert any("not measured: S3-28" in line for line in lines)
    assert any("10 epochs of 3,600 samples, ours" in line for line in lines)
    assert "demo data" not in printed(run(tmp_path, demo=False)[1], terminal=False)


def test_on_a_terminal_every_part_is_a_table(tmp_path: Path):
    said = printed(run(tmp_path)[1], terminal=True)
    for words in ("training, alone (demo data)", "training, summed (demo data)", "of this step", "how fast [does] it"):
        assert words in said
    assert said.count("of this step") == 1


def test_a_shape_is_own_or_of_the_notes():
    assert [cli.wants_notes(shape) for shape in ("own", "notes")] == [False, True]
    with pytest.raises(ConfigError, match="must be own or notes"):
        cli.wants_notes("large")
