"""diagnose names what was planted, recommends what was measured and writes nothing; tune-speed only prints."""

import contextlib
import io
import json
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
from torch import Tensor

from apps.graphrec import main
from apps.graphrec import train as training
from apps.graphrec.config import Config
from apps.graphrec.diagnose import candidates, dials, has_own_negatives, open_piece, subject
from apps.graphrec.objective import loss_fn
from shared import negatives
from shared.config import Resolved, resolve
from shared.diagnosis import Diagnosis, diagnose
from shared.trials import Steps, changed
from tests.graphrec.test_graphrec_train import topical_data

FLAGS = {"embed_dim": 8, "hidden_dim": 8, "layers": 2, "batch_size": 64, "log_every": 100, "ks": (5,), "device": "cpu"}
WORDS = ("--embed-dim", "8", "--layers", "2", "--batch-size", "32", "--num-negatives", "8")


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
    data = topical_data(num_cold=6)
    found = diagnose(subject(data), settings(**flags), say=said.append, budget_s=0.0, clock=clock)
    return found, said


def test_a_healthy_run_waits_for_the_device_only_when_something_is_due(clock):
    found, said = examined(clock)
    assert found.reads == ()
    assert found.evaluation.is_whole
    assert [line for line in said if line.startswith("Bottleneck: ")] == [f"Bottleneck: {found.findings[0].line()}"]


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "bpr"},
        {"loss": "inbatch"},
        {"model": "xsimgcl"},
        {"model": "content", "loss": "directau"},
        {"model": "clcrec-graph", "num_negatives": 5, "graph_lambda": 0.0},
        {"propagate_every": 2, "accumulate": 2},
    ],
)
def test_no_model_and_no_loss_waits_for_the_device(clock, flags):
    assert examined(clock, **flags)[0].reads == ()


def test_the_graph_term_waits_for_the_number_of_its_neighbours(clock):
    (read,) = examined(clock, model="clcrec-graph", num_negatives=5)[0].reads
    assert read.per_step == 1
    assert read.place.file == "shared/ranking.py"  # take_rows: a shape that follows from the batch's users


def test_a_slow_batch_maker_is_named_first(clock, monkeypatch):
    step_batches = training.step_batches

    def slow_step_batches(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return step_batches(*args, **given)

    monkeypatch.setattr(training, "step_batches", slow_step_batches)
    found, _ = examined(clock)
    first = found.findings[0]
    assert first.kind == "input"
    assert "slow_step_batches (tests/graphrec/test_graphrec_diagnose.py:" in first.text
    assert "(the input in all 100%)" in first.text
    assert "Do it once before training" in first.remedy


def test_a_sampler_in_python_is_named_first(clock, monkeypatch):
    draw, shared_ones = random.Random(0), negatives.draw_shared

    def python_sampler(sampler: Any, tables: Any, position: int, count: int) -> Tensor:
        for _ in range(64):
            clock.now += 0.1
            draw.sample(range(1000), 20)
        return shared_ones(sampler, tables, position, count)

    monkeypatch.setattr(negatives, "draw_shared", python_sampler)
    first = examined(clock, num_negatives=8)[0].findings[0]
    assert first.kind == "input"
    assert "python_sampler (tests/graphrec/test_graphrec_diagnose.py:" in first.text
    assert "loop over samples in Python" in first.remedy


def test_a_read_in_every_step_is_named_first(clock, monkeypatch):
    def reading_loss(*args: Any, **given: Any) -> Any:
        loss, scalars = loss_fn(*args, **given)
        scalars["copy"] = torch.tensor(loss.item())
        return loss, scalars

    monkeypatch.setattr(training, "loss_fn", reading_loss)
    found, _ = examined(clock)
    assert found.findings[0].kind == "reads"
    assert "reading_loss (tests/graphrec/test_graphrec_diagnose.py:" in found.findings[0].text
    assert "Keep the value on the device" in found.findings[0].remedy
    assert [read.per_step for read in found.reads] == [1]


def test_logging_in_every_step_is_named_with_its_flag(clock):
    found, _ = examined(clock, log_every=1)
    assert found.findings[0].kind == "due"
    assert "--log-every 50" in found.findings[0].remedy


def test_a_slow_loss_is_bound_by_its_computation(clock, monkeypatch):
    def slow_loss(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return loss_fn(*args, **given)

    monkeypatch.setattr(training, "loss_fn", slow_loss)
    assert examined(clock)[0].findings[0].kind == "compute"


@pytest.mark.parametrize("kind", ["gfcf", "bspm"])
def test_a_filter_has_no_steps_to_look_at(clock, kind):
    with pytest.raises(ValueError, match=f"{kind} is a filter of the graph and takes no training steps"):
        examined(clock, model=kind)


def test_data_without_a_validation_part_have_nothing_to_evaluate():
    piece = open_piece(settings().config, topical_data(has_valid=False))
    piece.evaluate(lambda done: pytest.fail("there is nobody"))
    assert piece.evaluated == 0


def test_a_piece_trains_what_training_trains():
    """The same steps through several epochs, in several calls."""
    config, data = settings(num_negatives=8).config, topical_data()
    piece = open_piece(config, data)
    for count in (3, 5, 2):
        piece.train(Steps(count - 1, device=piece.device))
    c = training.build(config, data)
    state, meter = c.state, training.fresh_meter(c)
    done = 0
    while done < 10:
        run = Steps(min(c.steps_per_epoch, 10 - done) - 1, device=c.device)
        state, meter = training.train_epoch(c, state, meter, **run.hooks)
        done += len(run.samples)
        state = replace(state, epoch=state.epoch + 1)
    assert done == 10
    expected = torch.cat([p.detach().flatten() for p in c.state.model.parameters()])
    assert torch.equal(torch.cat([p.detach().flatten() for p in piece.model.parameters()]), expected)


@pytest.mark.parametrize(
    "flags",
    [
        {"batch_size": 32},
        {"log_every": 1, "norm_every": 1, "accumulate": 2, "kernel": "bag"},
        {"model": "simgcl", "contrast_nodes": 0},
        {"loss": "bpr", "negatives": "device"},
        {"model": "clcrec-graph", "num_negatives": 5, "negatives": "device"},
    ],
)
def test_every_candidate_is_another_configuration_that_can_be_built(flags):
    config, data = settings(**flags).config, topical_data(num_cold=6)
    found = candidates(config, data)
    assert found
    for candidate in found:
        other = changed(config, candidate.values)
        assert other != config
        training.build(other, data)
    names = {name for candidate in found for name in candidate.values}
    assert set(flags) - {"loss"} <= names | {"model"}


def test_what_cannot_help_is_no_candidate():
    config, data = settings(batch_size=64, bf16_rows=True).config, topical_data()
    names = [name for candidate in candidates(config, data) for name in candidate.values]
    assert not {"bf16_rows", "kernel", "accumulate", "log_every", "contrast_nodes", "model", "negatives"} & {*names}
    whole = replace(config, training=replace(config.training, batch_size=data.num_pairs))
    assert all("batch_size" not in candidate.values for candidate in candidates(whole, data))
    assert all("propagate_every" not in candidate.values for candidate in candidates(whole, data))
    assert "propagate_every" not in {dial.name for dial in dials(settings(model="mf").config, data)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, False),
        ({"loss": "bpr"}, True),
        ({"loss": "bpr", "negatives": "shared"}, False),
        ({"negatives": "device"}, True),
        ({"loss": "inbatch", "negatives": "device"}, False),
        ({"model": "clcrec-graph"}, True),
        ({"model": "clcrec-graph", "negatives": "shared"}, False),
    ],
)
def test_own_negatives_are_those_of_the_plan(flags, expected):
    config = settings(num_negatives=3, **flags).config
    assert has_own_negatives(config) is expected
    plan = training.build(config, topical_data()).plan
    assert expected is (plan.num_negatives > 0 and not plan.shared)


# The command line


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(tmp_path) -> Callable[..., Ended]:
    """A function that runs the command line in an empty folder that holds walk.txt."""
    rows = [(user, step % 12 + user % 3) for user in range(1, 41) for step in range(user % 5 + 6)]
    (tmp_path / "walk.txt").write_text("".join(f"{user} {item}\n" for user, item in rows))

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


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_diagnose_writes_nothing(invoke, tmp_path):
    ended = invoke("diagnose", "--data-path", "walk.txt", *WORDS, "--budget", "0")
    assert ended.code == 0, ended
    assert "Bottleneck: " in ended.out
    assert "--batch-size 64" in ended.out
    assert "no time left (--budget)" in ended.out
    assert files(tmp_path) == ["walk.txt"]
    assert not (tmp_path / "runs").exists()


def test_diagnose_writes_the_trace_that_is_asked_for(invoke, tmp_path):
    ended = invoke("diagnose", "--data-path", "walk.txt", *WORDS, "--budget", "0", "--trace", "traces/t.json")
    assert ended.code == 0, ended
    assert files(tmp_path) == ["traces/t.json", "walk.txt"]
    events = json.loads((tmp_path / "traces/t.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"data_wait", "forward", "backward", "optimizer"} <= names


def test_diagnose_reads_a_run_of_the_past(invoke, tmp_path):
    few = ("--epochs", "2", "--log-every", "2", "--baselines", "popularity")
    assert invoke("train", "--data-path", "walk.txt", *WORDS, *few).code == 0
    (run,) = (tmp_path / "runs/graphrec").iterdir()
    before = files(tmp_path)
    ended = invoke("diagnose", "--log", str(run / "train.log"))
    assert ended.code == 0, ended
    assert "logged intervals up to step" in ended.out
    assert "Bottleneck: " in ended.out
    assert files(tmp_path) == before
    assert invoke("diagnose", "--log", "nowhere").code == 2


def test_tune_speed_remembers_its_answer_and_applies_nothing(invoke, tmp_path):
    words = ("tune-speed", "--data-path", "walk.txt", *WORDS)
    first = invoke(*words, "--budget", "0")
    assert first.code == 0, first
    (path,) = (tmp_path / "runs/graphrec").iterdir()
    assert path.name.startswith("tuned-")
    assert "python -m apps.graphrec train --data-path walk.txt" in first.out
    second = invoke(*words)
    assert second.code == 0, second
    assert "remembered in" in second.out
    assert "--again" in second.out
    assert [name for name in files(tmp_path) if not name.endswith(".json")] == ["walk.txt"]


@pytest.mark.parametrize("verb", ["diagnose", "tune-speed", "bench"])
def test_several_processes_are_refused(invoke, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = invoke(verb, "--data-path", "walk.txt", *WORDS)
    assert ended.code == 2
    assert "start this without torchrun" in ended.err
    assert sys.getprofile() is None


@pytest.mark.parametrize("verb", ["diagnose", "tune-speed"])
def test_filters_are_refused(invoke, verb):
    ended = invoke(verb, "--data-path", "walk.txt", *WORDS, "--model", "gfcf")
    assert ended.code == 2
    assert "use --model lightgcn" in ended.err
