"""diagnose names what was planted, recommends what was measured and writes nothing; tune-speed only prints."""

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from apps.reid import dataset, loaders, main
from apps.reid import diagnose as app
from apps.reid import train as training
from apps.reid.config import Config
from apps.reid.dataset import ImageFiles, People, draw_rows, make_texts
from apps.reid.diagnose import InThisThread, candidates, dials, open_piece, subject
from apps.reid.loaders import Batches, Key
from shared.config import Resolved, resolve
from shared.diagnosis import Diagnosis, diagnose
from shared.trials import Steps, Subject, changed
from tests.reid.test_reid_train import FRAME, made_up

FLAGS = {
    "identities_per_batch": 4, "num_instances": 2, "log_every": 100, "epochs": 2, "eval_every": 1, "device": "cpu",
    "patch": 8, "embed_dim": 16, "tower_width": 16, "tower_layers": 1, "text_width": 16, "text_layers": 1, "ks": (1,),
    "val_share": 0.0, "warmup_steps": 1,
}  # fmt: skip
WORDS = [word for name, value in FLAGS.items() if name != "ks" for word in (f"--{name.replace('_', '-')}", str(value))]


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
    """A diagnosis without trials, and what it said.

    Batches are made by this thread throughout: the clock does not know in which thread a plant has moved it.
    """
    said: list[str] = []
    people = made_up()
    whole = subject(people)
    inline = Subject(
        prog=whole.prog,
        unit=whole.unit,
        data=whole.data,
        open=lambda config: open_piece(config, people, loader_kind=InThisThread),
        candidates=whole.candidates,
        dials=whole.dials,
    )
    found = diagnose(inline, settings(**flags), say=said.append, budget_s=0.0, clock=clock)
    return found, said


def test_a_healthy_run_waits_for_the_device_only_when_something_is_due(clock):
    found, said = examined(clock)
    assert found.reads == ()
    assert found.evaluation.seconds > 0
    assert [line for line in said if line.startswith("Bottleneck: ")] == [f"Bottleneck: {found.findings[0].line()}"]


@pytest.mark.parametrize(
    "flags",
    [{"subsets": "single"}, {"fusion": "tokens"}, {"clip": "fixed"}, {"triplet_weight": 1.0, "sdm_form": "ce"}],
    ids=str,
)
def test_no_loss_fusion_or_clipping_waits_for_the_device(clock, flags):
    assert examined(clock, **flags)[0].reads == ()


def test_a_slow_batch_maker_is_named_first(clock, monkeypatch):
    make = Batches.__getitem__

    def slow_collate(self: Batches, key: Key) -> Any:
        clock.now += 10.0
        return make(self, key)

    monkeypatch.setattr(Batches, "__getitem__", slow_collate)
    first = examined(clock)[0].findings[0]
    assert first.kind == "input"
    assert "slow_collate (tests/reid/test_reid_diagnose.py:" in first.text
    assert "(the input in all 100%)" in first.text
    assert "Do it once before training" in first.remedy


def test_a_sampler_in_python_is_named_first(clock, monkeypatch):
    epoch_keys = training.epoch_keys
    draw = random.Random(0)

    def python_sampler(*args: Any, **given: Any) -> Iterator[Key]:
        for epoch, places in epoch_keys(*args, **given):
            for _ in places:
                clock.now += 0.1
                draw.sample(range(1000), 20)
            yield epoch, places

    monkeypatch.setattr(training, "epoch_keys", python_sampler)
    first = examined(clock)[0].findings[0]
    assert first.kind == "input"
    assert "python_sampler (tests/reid/test_reid_diagnose.py:" in first.text
    assert "loop over samples in Python" in first.remedy


def test_images_drawn_in_python_are_named_first(clock, monkeypatch):
    draw = random.Random(0)

    def python_draws(samples: Any, place_B: torch.Tensor, *, epoch: int) -> torch.Tensor:
        for _ in range(place_B.numel()):
            clock.now += 0.1
            draw.sample(range(1000), 20)
        return draw_rows(samples, place_B, epoch=epoch)

    monkeypatch.setattr(dataset, "draw_rows", python_draws)
    first = examined(clock)[0].findings[0]
    assert first.kind == "input"
    assert "python_draws (tests/reid/test_reid_diagnose.py:" in first.text
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
    assert "reading_loss (tests/reid/test_reid_diagnose.py:" in found.findings[0].text
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


@pytest.mark.parametrize("kind", [loaders.Loader, InThisThread])
def test_a_piece_trains_what_training_trains(kind):
    """The same steps through several epochs, in several calls, whoever makes the batches."""
    config = settings(epochs=3, modality_dropout=0.2).config
    piece = open_piece(config, made_up(), loader_kind=kind)
    for count in (3, 5, 2):
        piece.train(Steps(count - 1, device=piece.device))
    c = training.build(config, made_up())
    state, meter, done = c.state, training.fresh_meter(c.device), 0
    loader = loaders.Loader(Batches(c.samples, c.modalities, 0.2), c.loader, c.device)
    while done < 10:
        run = Steps(min(c.steps_per_epoch, 10 - done) - 1, device=c.device)
        state, meter = training.train_epoch(c, state, meter, loader=loader, **run.hooks)
        done += len(run.samples)
        state = replace(state, epoch=state.epoch + 1)
    assert done == 10
    expected = torch.cat([p.detach().flatten() for p in c.state.model.parameters()])
    assert torch.equal(torch.cat([p.detach().flatten() for p in piece.model.parameters()]), expected)


def test_queues_are_full_before_anything_is_timed():
    assert open_piece(settings(prefetch=3).config, made_up()).warm_up == 4
    assert open_piece(settings(prefetch=3, num_workers=2).config, made_up()).warm_up == 7
    inline = subject(made_up()).open_inline(settings(num_workers=2).config)
    assert inline is not None
    assert inline.warm_up == 1


def test_every_candidate_is_another_configuration_that_can_be_built(tmp_path: Path):
    packed = made_up()
    names = make_texts([f"{row}.png" for row in range(packed.num_images)])
    files = replace(packed, images=ImageFiles(tmp_path, FRAME, names))
    cases: list[tuple[People, dict[str, Any], set[str]]] = [
        (packed, {"log_every": 1, "norm_every": 1}, {"log_every", "norm_every", "identities_per_batch", "subsets"}),
        (packed, {"grad_checkpoint": True, "num_workers": 1}, {"grad_checkpoint", "num_workers"}),
        (files, {}, {"num_workers"}),
        (files, {"num_workers": 1}, {"num_workers", "prefetch"}),
    ]
    for people, flags, expected in cases:
        config = settings(**flags).config
        found = candidates(config, people)
        for candidate in found:
            other = changed(config, candidate.values)
            assert other != config
            training.build(other, people)
        assert expected <= {name for candidate in found for name in candidate.values}
    assert "num_workers" in [dial.name for dial in dials(settings().config, files)]
    assert "num_workers" not in [dial.name for dial in dials(settings().config, packed)]


def test_more_identities_than_there_are_is_no_candidate():
    config = settings(identities_per_batch=8, num_instances=2).config
    assert all("identities_per_batch" not in candidate.values for candidate in candidates(config, made_up()))
    (dial,) = [dial for dial in dials(config, made_up()) if dial.name == "identities_per_batch"]
    assert (list(dial.values), list(dial.down)) == ([], [4, 2])


def test_people_without_anybody_to_validate_on_are_examined(clock):
    piece = open_piece(settings().config, made_up(held_out=False))
    piece.evaluate(lambda done: None)
    assert piece.evaluated == 0
    found = diagnose(subject(made_up(held_out=False)), settings(), say=lambda line: None, budget_s=0.0)
    assert found.findings


# The command line


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def invoke(tmp_path, monkeypatch) -> Callable[..., Ended]:
    """A function that runs the command line on made-up people in an empty folder."""
    monkeypatch.setattr(main, "load_data", lambda config, runs_dir, say: (made_up(), False))

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


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_diagnose_writes_nothing(invoke, tmp_path):
    ended = invoke("diagnose", *WORDS, "--budget", "0")
    assert ended.code == 0, ended
    assert "Bottleneck: " in ended.out
    assert "--identities-per-batch 8" in ended.out
    assert "no time left (--budget)" in ended.out
    assert files_in(tmp_path) == []


def test_diagnose_says_whether_the_log_of_a_past_run_is_as_it_should_be(invoke, tmp_path):
    train = invoke("train", *WORDS, "--epochs", "2", "--log-every", "2")
    assert train.code == 0, train
    (run,) = (tmp_path / "runs/reid").iterdir()
    before = files_in(tmp_path)
    ended = invoke("diagnose", "--log", str(run / "train.log"))
    assert ended.code == 0, ended
    assert "Bottleneck: " in ended.out
    assert ended.out.count(" has the line ") == len(app.EXPECTED) == 2
    assert files_in(tmp_path) == before
    (run / "train.log").write_text("nothing of it\n", encoding="utf-8")
    assert invoke("diagnose", "--log", str(run)).out.count(" LACKS the line ") == 2
    assert invoke("diagnose", "--log", "nowhere").code == 2


def test_tune_speed_remembers_its_answer_and_applies_nothing(invoke, tmp_path):
    words = ("tune-speed", *WORDS)
    first = invoke(*words, "--budget", "0")
    assert first.code == 0, first
    (path,) = (tmp_path / "runs/reid").iterdir()
    assert path.name.startswith("tuned-")
    assert "python -m apps.reid train" in first.out
    second = invoke(*words)
    assert second.code == 0, second
    assert "remembered in" in second.out
    assert [name for name in files_in(tmp_path) if not name.endswith(".json")] == []


@pytest.mark.parametrize("verb", ["bench", "diagnose", "tune-speed"])
def test_several_processes_are_refused(invoke, monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    ended = invoke(verb, *WORDS)
    assert ended.code == 2
    assert "start this without torchrun" in ended.err
    assert sys.getprofile() is None
