"""diagnose names what was planted, recommends what was measured and writes nothing; tune-speed only prints."""

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from apps.clcrec import demo, main
from apps.clcrec import train as training
from apps.clcrec.config import Config
from apps.clcrec.diagnose import candidates, dials, open_piece, subject
from shared.config import Resolved, resolve
from shared.diagnosis import Diagnosis, diagnose
from shared.log import SilentLog
from shared.negatives import pool_epoch
from shared.trials import Steps, changed
from tests.clcrec.test_clcrec_train import topical_data

FLAGS: dict[str, Any] = {"embed_dim": 8, "hidden_dim": 16, "word_dim": 4, "batch_size": 32, "num_negatives": 8}
FLAGS |= {"log_every": 100, "norm_every": 100, "epochs": 20, "device": "cpu"}
WORDS = ("--embed-dim", "8", "--hidden-dim", "8", "--batch-size", "32", "--num-negatives", "4", "--device", "cpu")


class Clock:
    """Advances by a microsecond whenever it is read, and by what a plant adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def settings(**flags: Any) -> Resolved[Config]:
    return resolve(Config, flags={**FLAGS, **flags})


def examined(clock: Clock, **flags: Any) -> tuple[Diagnosis, list[str]]:
    """A diagnosis without trials, and what it said."""
    said: list[str] = []
    found = diagnose(subject(topical_data()), settings(**flags), say=said.append, budget_s=0.0, clock=clock)
    return found, said


@pytest.mark.parametrize("flags", [{}, {"negatives": "pool"}, {"scores": "gather"}])
def test_a_healthy_run_waits_for_the_device_only_when_something_is_due(clock: Clock, flags: dict[str, Any]):
    found, said = examined(clock, **flags)
    assert found.reads == ()
    assert found.evaluation.is_whole
    assert [line for line in said if line.startswith("Bottleneck: ")] == [f"Bottleneck: {found.findings[0].line()}"]


def test_a_slow_batch_maker_is_named_first(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    step_batches = training.step_batches

    def slow_step_batches(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return step_batches(*args, **given)

    monkeypatch.setattr(training, "step_batches", slow_step_batches)
    first = examined(clock)[0].findings[0]
    assert first.kind == "input"
    assert "slow_step_batches (tests/clcrec/test_clcrec_diagnose.py:" in first.text
    assert "(the input in all 100%)" in first.text
    assert "Do it once before training" in first.remedy


def test_a_sampler_in_python_is_named_first(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    generator = random.Random(0)

    def python_sampler(c: Any, permutations: Any, pair_R: torch.Tensor, *, epoch: int) -> torch.Tensor:
        rows, warm = [], set(range(c.data.num_warm))
        lists = c.data.trained
        for user in c.user_P[pair_R].tolist():
            clock.now += 0.1
            seen = set(lists.item[lists.ptr[user] : lists.ptr[user + 1]].tolist())
            rows.append(generator.sample(list(warm - seen), c.config.training.num_negatives))
        return torch.tensor(rows)

    monkeypatch.setattr(training, "DRAWN_ROWS", 32)  # in every step, as the original does
    monkeypatch.setattr(training, "draw", python_sampler)
    first = examined(clock)[0].findings[0]
    assert first.kind == "input"
    assert "python_sampler (tests/clcrec/test_clcrec_diagnose.py:" in first.text
    assert "loop over samples in Python" in first.remedy


def test_a_read_in_every_step_is_named_first(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    loss_fn = training.loss_fn

    def reading_loss(*args: Any, **given: Any) -> Any:
        loss, scalars = loss_fn(*args, **given)
        scalars["copy"] = torch.tensor(loss.item())
        return loss, scalars

    monkeypatch.setattr(training, "loss_fn", reading_loss)
    found, _ = examined(clock)
    assert found.findings[0].kind == "reads"
    assert "reading_loss (tests/clcrec/test_clcrec_diagnose.py:" in found.findings[0].text
    assert "Keep the value on the device" in found.findings[0].remedy
    assert [read.per_step for read in found.reads] == [1]


def test_logging_in_every_step_is_named_with_its_flag(clock: Clock):
    found, _ = examined(clock, log_every=1)
    assert found.findings[0].kind == "due"
    assert "--log-every 50" in found.findings[0].remedy


def test_a_slow_loss_is_bound_by_its_computation(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    loss_fn = training.loss_fn

    def slow_loss(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return loss_fn(*args, **given)

    monkeypatch.setattr(training, "loss_fn", slow_loss)
    assert examined(clock)[0].findings[0].kind == "compute"


@pytest.mark.parametrize("negatives", ["device", "pool"])
def test_a_piece_trains_what_training_trains(negatives: str):
    """The same steps through several epochs, in several calls, with a pool for every epoch."""
    config = settings(negatives=negatives, resample_epochs=1, batch_size=64).config
    data = topical_data()
    piece = open_piece(config, data)
    c = training.build(config, data)
    count = 2 * c.steps_per_epoch
    for steps in (count - 3, 3):
        piece.train(Steps(steps - 1, device=piece.device))
    state, meter = c.state, training.fresh_meter(c.device)
    for epoch in range(2):
        pool = None
        if negatives == "pool":
            pool = training.draw_pool(c, pool_epoch(epoch, 1), log=SilentLog(), on_rows=lambda done: None)
        run = Steps(c.steps_per_epoch - 1, device=c.device)
        state, meter = training.train_epoch(c, state, meter, pool_PN=pool, **run.hooks)
        state = replace(state, epoch=epoch + 1)
    expected = torch.cat([p.detach().flatten() for p in state.model.parameters()])
    assert torch.equal(torch.cat([p.detach().flatten() for p in piece.model.parameters()]), expected)


def test_every_candidate_is_another_configuration_that_can_be_built():
    data = topical_data()
    for flags in (
        {},
        {"log_every": 1, "norm_every": 1, "accumulate": 2, "scores": "gather", "content_input": "batch"},
        {"negatives": "pool", "neg_power": 0.5},
        {"negatives": "shared"},
        {"replacement": "legacy"},
    ):
        config = settings(**flags).config
        found = candidates(config, data)
        assert found
        assert len(found) <= 10
        for candidate in found:
            other = changed(config, candidate.values)
            assert other != config
            training.build(other, data)
        names = {name for candidate in found for name in candidate.values}
        assert set(flags) - {"negatives", "replacement"} <= names


def test_a_batch_larger_than_the_data_is_neither_candidate_nor_tried():
    data = topical_data()
    config = settings(batch_size=data.num_pairs).config
    assert all("batch_size" not in candidate.values for candidate in candidates(config, data))
    batch, accumulate = dials(config, data)
    assert not batch.values
    assert batch.down == [data.num_pairs >> i for i in (1, 2, 3)]
    assert accumulate.values == [2, 4, 8]


# The command line


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(tmp_path: Path) -> Callable[..., Ended]:
    """A function that runs the command line in an empty folder that holds a small source, `data`."""
    small = demo.demo_data(num_users=40, num_warm=30, num_cold=10)
    with mock.patch.object(demo, "demo_data", return_value=small):
        demo.write_demo(tmp_path / "data")

    def run(*words: str) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(tmp_path),
            mock.patch.dict(os.environ, {"COLUMNS": "250"}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main.app([*words])
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, out.getvalue(), err.getvalue())

    return run


def test_diagnose_writes_nothing(invoke: Callable[..., Ended], tmp_path: Path):
    ended = invoke("diagnose", "--data-path", "data", *WORDS, "--budget", "0")
    assert ended.code == 0, ended
    assert "Bottleneck: " in ended.out
    assert "--negatives pool" in ended.out
    assert not (tmp_path / "runs").exists()


def test_diagnose_writes_the_trace_that_is_asked_for(invoke: Callable[..., Ended], tmp_path: Path):
    ended = invoke("diagnose", "--data-path", "data", *WORDS, "--budget", "0", "--trace", "t.json")
    assert ended.code == 0, ended
    assert (tmp_path / "t.json").is_file()


def test_tune_speed_remembers_its_answer_and_applies_nothing(invoke: Callable[..., Ended], tmp_path: Path):
    words = ("tune-speed", "--data-path", "data", *WORDS)
    first = invoke(*words, "--budget", "0")
    assert first.code == 0, first
    (path,) = (tmp_path / "runs/clcrec").iterdir()
    assert path.name.startswith("tuned-")
    assert "python -m apps.clcrec train --data-path data --embed-dim 8" in first.out
    second = invoke(*words)
    assert second.code == 0, second
    assert "remembered in" in second.out


@pytest.mark.parametrize("verb", ["bench", "diagnose", "tune-speed"])
def test_several_processes_are_refused(invoke: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, verb: str):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = invoke(verb, "--data-path", "data", *WORDS)
    assert ended.code == 2
    assert "start this without torchrun" in ended.err
    assert sys.getprofile() is None
