"""The fastest values are found by doubling within a memory limit, verified, remembered, and only ever printed."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared import tuning
from shared.config import knob, resolve
from shared.ladder import Memory
from shared.trials import Dial, Piece, Steps, Subject, open_warm
from shared.tuning import tune

CPU = torch.device("cpu")
NOW = datetime(2026, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = knob(8, "Samples a step.", minimum=1)
    workers: int = knob(0, "Workers.", minimum=0)


@dataclass(frozen=True)
class Config:
    training: TrainConfig = field(default_factory=TrainConfig)


class Toy:
    """An app of which a step takes 1 s and a sample 0.001 s, workers halving both, and batches above 64 no memory."""

    def __init__(self, *, best_batch: int = 1 << 20) -> None:
        self.now = 0.0
        self.best_batch = best_batch
        self.opened: list[Config] = []

    def clock(self) -> float:
        return self.now

    def open(self, config: Config) -> Piece:
        self.opened.append(config)
        size = config.training.batch_size
        if size > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def train(steps: Steps) -> None:
            while not steps.done:
                extra = 5.0 if size > self.best_batch else 0.0
                self.now += (1.0 + 0.001 * size + extra * size) / (1 + min(config.training.workers, 1))
                steps.hooks["rates"].add(size)
                steps.hooks["on_step"](None)

        return Piece(CPU, nn.Linear(1, 1), train, lambda on_units: None, 1, steps_per_epoch=10)

    def subject(self, data: str = "toy") -> Subject[Config]:
        return Subject(
            prog="python -m apps.toy",
            unit="samples",
            data=data,
            open=self.open,
            candidates=lambda config: (),
            dials=lambda config: (
                Dial("batch_size", (16, 32, 64, 128), down=(4, 2), changes="the optimisation"),
                Dial("workers", (1, 2, 4)),
            ),
        )

    def tune(self, folder: Path, *, data: str = "toy", **given: Any) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        given = {"budget_s": 1e4, "clock": self.clock, "now": lambda: NOW, **given}
        return tune(self.subject(data), resolve(Config), folder=folder, say=said.append, **given), said


def test_values_are_doubled_until_they_do_not_fit_or_bring_nothing(tmp_path):
    answer, said = Toy().tune(tmp_path)
    assert answer["values"] == {"batch_size": 64, "workers": 1}
    assert answer["command"] == "python -m apps.toy train --batch-size 64 --workers 1"
    assert answer["changes"] == "the optimisation"
    text = "\n".join(said)
    assert "--batch-size 128: does not fit into memory" in text
    assert "--workers 4" not in text  # 2 brought nothing
    assert "Verified by a longer run" in text


def test_where_more_brings_nothing_less_is_tried(tmp_path):
    toy = Toy(best_batch=4)
    answer, _ = toy.tune(tmp_path)
    assert answer["values"]["batch_size"] == 4
    assert [config.training.batch_size for config in toy.opened][:4] == [8, 16, 4, 2]


def test_the_answer_is_remembered_per_machine_and_only_shown(tmp_path):
    answer, said = Toy().tune(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("tuned-")
    assert path.suffix == ".json"
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert list(found["answers"].values()) == [answer]
    assert any("never applies it" in line for line in said)

    again = Toy()
    shown, said = again.tune(tmp_path)
    assert shown == answer
    assert again.opened == []
    assert "2026-01-02 03:04:05" in said[0]
    assert "--again" in said[0]
    assert answer["command"] in said[-1]


def test_again_and_other_data_are_measured_anew(tmp_path):
    Toy().tune(tmp_path)
    for given in ({"again": True}, {"data": "other"}):
        toy = Toy()
        toy.tune(tmp_path, **given)
        assert toy.opened
    (path,) = tmp_path.iterdir()
    assert len(json.loads(path.read_text())["answers"]) == 2


def test_another_machine_has_its_own_answers(tmp_path, monkeypatch):
    Toy().tune(tmp_path)
    monkeypatch.setattr(tuning, "describe_machine", lambda: {"cpu": "another"})
    toy = Toy()
    toy.tune(tmp_path)
    assert toy.opened
    assert len(list(tmp_path.iterdir())) == 2


def test_present_settings_that_cannot_be_beaten_are_the_answer(tmp_path):
    class Steady(Toy):
        def subject(self, data: str = "toy") -> Subject[Config]:
            found = super().subject(data)
            return Subject(found.prog, found.unit, data, found.open, found.candidates, lambda config: ())

    answer, said = Steady().tune(tmp_path)
    assert answer["values"] == {}
    assert answer["command"] == "python -m apps.toy train"
    assert "as fast as any" in said[-3]


def test_the_memory_limit_is_kept(tmp_path, monkeypatch):
    def opened(open_piece, device):
        piece, _ = open_warm(open_piece, device)
        return piece, Memory(piece_size[-1] << 20, None)

    toy = Toy()
    piece_size: list[int] = []
    open_before = toy.open

    def open_and_tell(config: Config) -> Piece:
        piece_size.append(config.training.batch_size)
        return open_before(config)

    toy.open = open_and_tell  # type: ignore[method-assign]
    monkeypatch.setattr(tuning, "open_warm", opened)
    answer, said = toy.tune(tmp_path, limit_mib=40)
    assert answer["values"]["batch_size"] == 32
    assert any("--batch-size 64: takes 64 MiB, more than the limit of 40 MiB" in line for line in said)


def test_without_time_nothing_is_tried(tmp_path):
    answer, said = Toy().tune(tmp_path, budget_s=0.0)
    assert answer["values"] == {}
    assert any("no time left (--budget)" in line for line in said)


def test_a_present_configuration_that_cannot_run_is_an_error(tmp_path):
    toy = Toy()
    with pytest.raises(ValueError, match="does not fit into memory"):
        tune(
            toy.subject(),
            resolve(Config, flags={"batch_size": 1000}),
            folder=tmp_path,
            say=lambda line: None,
            clock=toy.clock,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_memory_is_measured_anew(tmp_path):
    Toy().tune(tmp_path)
    (path,) = tmp_path.iterdir()
    for text in ("{", "[]", '{"answers": 3}'):
        path.write_text(text)
        toy = Toy()
        toy.tune(tmp_path)
        assert toy.opened
