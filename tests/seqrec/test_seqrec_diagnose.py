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

from apps.seqrec import main
from apps.seqrec import train as training
from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.dataset import Sequences, draw_unseen, make_batch
from apps.seqrec.diagnose import candidates, open_piece, subject
from shared.config import Resolved, resolve
from shared.diagnosis import Diagnosis, diagnose
from shared.trials import Steps, changed

FLAGS = {"max_len": 8, "embed_dim": 8, "batch_size": 8, "log_every": 100, "epochs": 2, "device": "cpu"}
WORDS = ("--max-len", "8", "--embed-dim", "8", "--batch-size", "8")


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


def walking(num_users: int = 40, num_items: int = 12) -> Sequences:
    """Users who walk through the items in a circle."""
    lengths = torch.arange(num_users) % 5 + 6
    items = [torch.arange(int(n)) % num_items + 1 for n in lengths]
    return Sequences(
        ptr=torch.tensor([0, *lengths.cumsum(0).tolist()]),
        item=torch.cat(items).int(),
        time=None,
        item_ids=tuple(str(i) for i in range(1, num_items + 1)),
        user_ids=tuple(str(u) for u in range(num_users)),
        fingerprint="walking",
        name="walking",
    )


def settings(**flags: Any) -> Resolved[Config]:
    return resolve(Config, flags={**FLAGS, **flags})


def examined(clock: Clock, **flags: Any) -> tuple[Diagnosis, list[str]]:
    """A diagnosis without trials, and what it said."""
    said: list[str] = []
    found = diagnose(subject(walking()), settings(**flags), say=said.append, budget_s=0.0, clock=clock)
    return found, said


def test_a_healthy_run_waits_for_the_device_only_when_something_is_due(clock):
    found, said = examined(clock)
    assert found.reads == ()
    assert found.evaluation.is_whole
    assert [line for line in said if line.startswith("Bottleneck: ")] == [f"Bottleneck: {found.findings[0].line()}"]


@pytest.mark.parametrize("flags", [{"loss": "sampled"}, {"loss": "bce"}, {"loss": "inbatch"}, {"attention": "hstu"}])
def test_no_loss_and_no_block_waits_for_the_device(clock, flags):
    assert examined(clock, **flags)[0].reads == ()


def test_a_slow_batch_maker_is_named_first(clock, monkeypatch):
    def slow_make_batch(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return make_batch(*args, **given)

    monkeypatch.setattr(training, "make_batch", slow_make_batch)
    found, _ = examined(clock)
    first = found.findings[0]
    assert first.kind == "input"
    assert "slow_make_batch (tests/seqrec/test_seqrec_diagnose.py:" in first.text
    assert "(the input in all 100%)" in first.text
    assert "Do it once before training" in first.remedy


def test_a_sampler_in_python_is_named_first(clock, monkeypatch):
    draw = random.Random(0)

    def python_sampler(seen: Any, user: Tensor, generator: torch.Generator) -> Tensor:
        for _ in range(user.numel()):
            clock.now += 0.1
            draw.sample(range(1000), 20)
        return draw_unseen(seen, user, generator)

    monkeypatch.setattr(training, "draw_unseen", python_sampler)
    first = examined(clock, loss="bce")[0].findings[0]
    assert first.kind == "input"
    assert "python_sampler (tests/seqrec/test_seqrec_diagnose.py:" in first.text
    assert "loop over samples in Python" in first.remedy


def test_a_read_in_every_step_is_named_first(clock, monkeypatch):
    loss_fn = training.loss_fn

    def reading_loss(*args: Any, **given: Any) -> Any:
        loss, scalars = loss_fn(*args, **given)
        scalars["copy"] = torch.tensor(loss.item())
        return loss, scalars

    monkeypatch.setattr(training, "loss_fn", reading_loss)
    found, _ = examined(clock)
    assert found.findings[0].kind == "reads"
    assert "reading_loss (tests/seqrec/test_seqrec_diagnose.py:" in found.findings[0].text
    assert "Keep the value on the device" in found.findings[0].remedy
    assert [read.per_step for read in found.reads] == [1]


def test_logging_in_every_step_is_named_with_its_flag(clock):
    found, _ = examined(clock, log_every=1)
    assert found.findings[0].kind == "due"
    assert "--log-every 50" in found.findings[0].remedy


def test_a_slow_loss_is_bound_by_its_computation(clock, monkeypatch):
    loss_fn = training.loss_fn

    def slow_loss(*args: Any, **given: Any) -> Any:
        clock.now += 10.0
        return loss_fn(*args, **given)

    monkeypatch.setattr(training, "loss_fn", slow_loss)
    assert examined(clock)[0].findings[0].kind == "compute"


def test_a_piece_trains_what_training_trains():
    """The same steps through several epochs, in several calls."""
    config = settings(epochs=3, dropout=0.0).config
    piece = open_piece(config, walking())
    for count in (3, 5, 2):
        piece.train(Steps(count - 1, device=piece.device))
    c = training.build(config, walking())
    state, meter = c.state, training.fresh_meter(c.device)
    done = 0
    while done < 10:
        run = Steps(c.steps_per_epoch - 1, device=c.device)
        state, meter = training.train_epoch(c, state, meter, **run.hooks)
        done += len(run.samples)
        state = replace(state, epoch=state.epoch + 1)
    assert done == 10
    expected = torch.cat([p.detach().flatten() for p in c.state.model.parameters()])
    assert torch.equal(torch.cat([p.detach().flatten() for p in piece.model.parameters()]), expected)


def test_every_candidate_is_another_configuration_that_can_be_built():
    for flags in (
        {},
        {"log_every": 1, "norm_every": 1, "accumulate": 2},
        {"grad_checkpoint": True, "layout": "padded"},
    ):
        config = settings(num_negatives=4, **flags).config
        found = candidates(config, walking())
        assert found
        for candidate in found:
            other = changed(config, candidate.values)
            assert other != config
            training.build(other, walking())
        names = {name for candidate in found for name in candidate.values}
        assert set(flags) <= names


def test_a_batch_larger_than_the_data_is_no_candidate():
    config = Config(DataConfig(max_len=8), ModelConfig(embed_dim=8), TrainConfig(batch_size=40, device="cpu"))
    assert all("batch_size" not in candidate.values for candidate in candidates(config, walking()))


# The command line


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(tmp_path) -> Callable[..., Ended]:
    """A function that runs the command line in an empty folder that holds walk.txt."""
    rows = [(user, step % 12 + 1) for user in range(1, 41) for step in range(user % 5 + 6)]
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
    assert "--batch-size 16" in ended.out
    assert "no time left (--budget)" in ended.out
    assert files(tmp_path) == ["walk.txt"]
    assert not (tmp_path / "runs").exists()


def test_diagnose_writes_the_trace_that_is_asked_for(invoke, tmp_path):
    ended = invoke("diagnose", "--data-path", "walk.txt", *WORDS, "--budget", "0", "--trace", "traces/t.json")
    assert ended.code == 0, ended
    assert files(tmp_path) == ["traces/t.json", "walk.txt"]
    events = json.loads((tmp_path / "traces/t.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"data_wait", "copy", "forward", "backward", "optimizer"} <= names


def test_diagnose_reads_a_run_of_the_past(invoke, tmp_path):
    train = ("train", "--data-path", "walk.txt", *WORDS, "--epochs", "2", "--log-every", "2")
    assert invoke(*train).code == 0
    (run,) = (tmp_path / "runs/seqrec").iterdir()
    before = files(tmp_path)
    ended = invoke("diagnose", "--log", str(run / "train.log"))
    assert ended.code == 0, ended
    assert "logged intervals up to step 10" in ended.out
    assert "Bottleneck: " in ended.out
    assert files(tmp_path) == before
    assert invoke("diagnose", "--log", "nowhere").code == 2


def test_tune_speed_remembers_its_answer_and_applies_nothing(invoke, tmp_path):
    words = ("tune-speed", "--data-path", "walk.txt", *WORDS)
    first = invoke(*words, "--budget", "0")
    assert first.code == 0, first
    (path,) = (tmp_path / "runs/seqrec").iterdir()
    assert path.name.startswith("tuned-")
    assert "python -m apps.seqrec train --data-path walk.txt --max-len 8" in first.out
    second = invoke(*words)
    assert second.code == 0, second
    assert "remembered in" in second.out
    assert "--again" in second.out
    assert [name for name in files(tmp_path) if not name.endswith(".json")] == ["walk.txt"]


@pytest.mark.parametrize("verb", ["diagnose", "tune-speed"])
def test_several_processes_are_refused(invoke, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = invoke(verb, "--data-path", "walk.txt", *WORDS)
    assert ended.code == 2
    assert "start this without torchrun" in ended.err
    assert sys.getprofile() is None
