"""What limits a run is named first with its remedy, and what is recommended is ordered by what was measured."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from shared import diagnosis
from shared.config import knob, resolve
from shared.diagnosis import (
    covered,
    diagnose,
    findings,
    run_lines,
    time_evaluation,
    time_steps,
    trial_lines,
)
from shared.ladder import Spread
from shared.timing import SECTIONS, TimeSplit
from shared.trials import Candidate, Piece, Steps, Subject, Trial
from shared.watch import HostRead, HotFunction, Place

CPU = torch.device("cpu")


def split(**shares: float) -> TimeSplit:
    """A typical step with these percentages; forward and backward get the rest."""
    rest = (100 - sum(shares.values())) / 2
    return TimeSplit(1, {name: shares.get(name, rest if name in ("forward", "backward") else 0.0) for name in SECTIONS})


READ = HostRead(Place("apps/a/train.py", 7, "train_epoch"), "reads a number", 2.0)
LOOP = HotFunction(Place("mine.py", 3, "slow_collate"), 0.9, 4000.0)
TENSORS = HotFunction(Place("mine.py", 9, "make_batch"), 0.5, 12.0)


def kinds(*args, **given) -> list[str]:
    return [finding.kind for finding in findings(*args, **given)]


def test_a_run_without_faults_is_bound_by_its_computation():
    (found,) = findings(split(data_wait=1.0, optimizer=4.0))
    assert found.kind == "compute"
    assert "compute-bound: 95% of the step is forward and backward" in found.text
    assert "another device" in found.remedy


def test_an_input_that_rules_the_step_is_named_first_by_its_function():
    found = findings(split(data_wait=80.0), hot=[LOOP], reads=[READ], samples_per_step=128)
    assert [finding.kind for finding in found][:2] == ["input", "reads"]
    assert "slow_collate (mine.py:3) takes 72% of the step (the input in all 80%)" in found[0].text
    assert "loop over samples in Python" in found[0].remedy


def test_an_input_of_few_calls_is_no_loop_over_samples():
    found = findings(split(data_wait=80.0), hot=[TENSORS], samples_per_step=128)
    assert "make_batch (mine.py:9) takes 40%" in found[0].text
    assert "loop" not in found[0].remedy
    assert "worker processes" in found[0].remedy


def test_a_read_in_every_step_comes_before_an_input_that_only_counts():
    found = findings(split(data_wait=30.0), hot=[LOOP], reads=[READ])
    assert [finding.kind for finding in found] == ["reads", "compute", "input"]
    assert "2 times a step: train_epoch (apps/a/train.py:7) reads a number" in found[0].text
    assert "free on this CPU" in found[0].text
    assert "Keep the value on the device" in found[0].remedy
    assert "free on this CPU" not in findings(split(), reads=[READ], on_cuda=True)[0].text


def test_a_read_now_and_then_is_no_fault():
    assert kinds(split(), reads=[READ._replace(per_step=0.25)]) == ["compute"]


def test_logging_in_every_step_is_a_fault():
    found = findings(split(), always_due=True)
    assert found[0].kind == "due"
    assert "--log-every 50" in found[0].remedy


@pytest.mark.parametrize(
    ("name", "remedy"), [("copy", "int32"), ("sync", "--log-every"), ("optimizer", "larger batch"), ("other", "trace")]
)
def test_a_section_that_takes_most_of_the_step_is_named_first(name, remedy):
    found = findings(split(**{name: 70.0}))
    assert found[0].kind == name
    assert "70% of the step" in found[0].text
    assert remedy in found[0].remedy


def test_validation_that_takes_most_of_an_epoch_is_named_first():
    found = findings(split(), evaluation_share=0.97)
    assert [finding.kind for finding in found] == ["evaluation", "compute"]
    assert "--eval-every" in found[0].remedy


def test_a_device_that_waits_for_the_host_is_not_compute_bound():
    found = findings(split(), busy=0.3, on_cuda=True)
    assert [finding.kind for finding in found] == ["launch"]
    assert "30% of the time" in found[0].text
    assert kinds(split(), busy=0.95, on_cuda=True) == ["compute"]


def test_nothing_that_stands_out_is_still_an_answer():
    assert kinds(split(data_wait=15.0, copy=15.0, optimizer=25.0)) == ["compute"]
    assert kinds(TimeSplit(0, dict.fromkeys(SECTIONS, 0.0))) == ["compute"]


def test_spans_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(8, 10), (0, 2), (1, 3), (1, 2)]) == 5


# A whole diagnosis, of an app whose steps take the seconds that a clock says


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = knob(4, "Samples a step.")
    gain: float = knob(1.0, "How much faster it is.")


@dataclass(frozen=True)
class Config:
    training: TrainConfig = field(default_factory=TrainConfig)


class Clock:
    """Advances by a microsecond whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


class Toy:
    """An app: `collate` and `loss` are what its user may plant faults in."""

    def __init__(self, *candidates: Candidate, log_every: int = 3) -> None:
        self.clock = Clock()
        self.log_every = log_every
        self.evaluated = 0
        self.subject = Subject(
            prog="python -m apps.toy",
            unit="samples",
            data="toy",
            open=self.open,
            candidates=lambda config: candidates,
            dials=lambda config: (),
        )

    def collate(self, config: Config) -> torch.Tensor:
        return torch.ones(config.training.batch_size, 2)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        self.clock.now += 0.01
        return model(batch).square().mean()

    def open(self, config: Config) -> Piece:
        model = nn.Linear(2, 1)
        numbers = itertools.count(1)

        def train(steps: Steps) -> None:
            timer, hooks = steps.hooks["timer"], steps.hooks
            while not steps.done:
                timer.start()
                batch = self.collate(config)
                timer.mark("data_wait")
                loss = self.loss(model, batch)
                self.clock.now += 1.0 / config.training.gain
                timer.mark("forward")
                loss.backward()
                model.zero_grad()
                timer.mark("backward")
                hooks["rates"].add(config.training.batch_size)
                note = str(loss.item()) if next(numbers) % self.log_every == 0 else None
                timer.finish()
                hooks["on_step"](note)

        def evaluate(on_units) -> None:
            for done in range(10, 101, 10):
                self.clock.now += 2.0
                self.evaluated = done
                on_units(done)

        return Piece(CPU, model, train, evaluate, evaluated=100, steps_per_epoch=1000)

    def diagnose(self, **given) -> tuple[diagnosis.Diagnosis, list[str]]:
        said: list[str] = []
        found = diagnose(self.subject, resolve(Config), say=said.append, clock=self.clock, **given)
        return found, said


def test_a_whole_diagnosis_of_a_healthy_run():
    found, said = Toy().diagnose()
    assert found.findings[0].kind == "compute"
    assert found.reads == ()
    assert found.timing.typical.shares()["forward"] == pytest.approx(1.0, abs=0.01)
    assert found.timing.samples_per_s == pytest.approx(4 / 1.01, rel=0.01)
    assert found.timing.steps_per_s == pytest.approx(1 / 1.01, rel=0.01)
    assert abs(found.timing.overhead.by_turns) < 0.001
    assert found.timing.overhead.share < 0.05
    text = "\n".join(said)
    assert "torch " in text
    assert f"Bottleneck: {found.findings[0].line()}" in said
    assert "There is nothing to try" in text


class SlowCollate(Toy):
    def collate(self, config: Config) -> torch.Tensor:
        self.clock.now += 50.0
        return super().collate(config)


class ReadInLoss(Toy):
    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss = super().loss(model, batch)
        assert loss.item() >= 0
        return loss


def test_a_slow_collate_is_named_first():
    found, said = SlowCollate().diagnose()
    assert found.findings[0].kind == "input"
    assert "SlowCollate.collate (tests/shared/test_shared_diagnosis.py:" in found.findings[0].text
    assert any(line.startswith("Bottleneck: the input: SlowCollate.collate") for line in said)


def test_a_read_in_every_step_is_named_first_with_its_line():
    found, _ = ReadInLoss().diagnose()
    assert [finding.kind for finding in found.findings] == ["reads", "compute"]
    assert found.reads[0].place.function == "ReadInLoss.loss"
    assert found.reads[0].per_step == 1


def test_logging_in_every_step_is_named_first():
    found, _ = Toy(log_every=1).diagnose()
    assert found.findings[0].kind == "due"


def test_recommendations_are_command_lines_ordered_by_measured_gain():
    candidates = [
        Candidate({"gain": 2.0}, "twice", "the loss"),
        Candidate({"gain": 5.0}, "five times"),
        Candidate({"gain": 0.5}, "half"),
    ]
    found, said = Toy(*candidates).diagnose(budget_s=400.0)
    assert [trial.candidate.reason for trial in found.trials] == ["five times", "twice", "half"]
    start = next(i for i, line in enumerate(said) if line.startswith("Faster here"))
    assert said[start + 1].startswith("  --gain 5.0: 4.8")
    assert said[start + 1].endswith("five times; the same result")
    assert said[start + 2] == "    python -m apps.toy train --gain 5.0"
    assert said[start + 3].endswith("twice; changes the loss")
    assert "No gain here" in said[start + 5]
    assert "--gain 0.5 (0.5" in said[start + 5]


def test_at_most_five_are_recommended_and_the_others_without_gain_take_one_line():
    trials = [Trial(Candidate({"n": n}, ""), Spread(9.0 - n, 8.0 - n, 10.0 - n), 1.0) for n in range(7)]
    trials += [Trial(Candidate({"n": n}, ""), Spread(1.5, 0.9, 2.0), 1.0) for n in (7, 8)]
    trials += [Trial(Candidate({"n": 9}, ""), fault="why"), Trial(Candidate({"n": 10}, ""), fault="why")]
    lines = trial_lines(trials, lambda trial: "command")
    assert lines.count("    command") == 5
    assert lines[-2] == "No gain here (less than 1.03x, or not every time): --n 7 (1.50x), --n 8 (1.50x)"
    assert lines[-1] == "Not measured: --n 9, --n 10: why"


def test_a_long_validation_is_cut_short_and_extrapolated():
    toy = Toy()
    piece = toy.open(Config())
    timing = time_steps(piece, budget_s=0.0, clock=toy.clock)
    cut = time_evaluation(piece, timing, budget_s=5.0, clock=toy.clock)
    assert toy.evaluated == 30
    assert not cut.is_whole
    assert cut.seconds == pytest.approx(20.0, rel=0.01)
    assert cut.share == pytest.approx(20 / (20 + 1010), rel=0.01)
    whole = time_evaluation(piece, timing, budget_s=100.0, clock=toy.clock)
    assert whole.is_whole
    assert whole.seconds == pytest.approx(20.0, rel=0.01)


def test_only_the_trace_is_written_and_it_has_the_sections_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Toy().diagnose(budget_s=1.0, trace=Path("trace.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {"data_wait", "forward", "backward", "other"} <= names


def test_what_is_watched_is_the_inline_piece():
    toy, inline = Toy(), ReadInLoss()
    inline.clock = toy.clock
    subject = replace(toy.subject, open_inline=inline.open)
    found = diagnose(subject, resolve(Config), say=lambda line: None, clock=toy.clock)
    assert [read.place.function for read in found.reads] == ["ReadInLoss.loss"]


def test_a_configuration_that_does_not_fit_says_so():
    toy = Toy()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    toy.loss = loss  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="does not fit into memory"):
        toy.diagnose()


# Runs of the past


def write_run(folder: Path, *records: Mapping[str, object]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"kind": "train", "step": 50 * (i + 1), "epoch": 0, **r}) for i, r in enumerate(records)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "valid", "step": 1}', ""]))
    return folder


def test_a_past_run_tells_where_its_time_went(tmp_path):
    shares = {f"time_{name}": 0.0 for name in SECTIONS} | {"samples_per_s": 1000.0, "steps_per_s": 10.0}
    records = [{**shares, "time_data_wait": 0.7, "time_forward": 0.3} for _ in range(3)]
    run = write_run(tmp_path / "run", {"loss": 1.0}, *records)
    lines = run_lines(run)
    assert "3 logged intervals up to step 200" in lines[0]
    assert "1,000 samples/s, 10 steps/s" in lines[0]
    assert any(line.startswith("Bottleneck: the input takes 70% of the step") for line in lines)
    assert run_lines(run / "train.log") == lines  # any file of the run stands for it


def test_lines_that_a_healthy_log_has_are_looked_for(tmp_path):
    shares = {f"time_{name}": 0.0 for name in SECTIONS} | {"time_forward": 1.0}
    run = write_run(tmp_path / "run", shares)
    (run / "train.log").write_text("2026-01-01 10:00:00 cached 14,910 samples\n")
    lines = run_lines(run, expected=("cached 14,910", "workers 2"))
    assert lines[-2].endswith("has the line 'cached 14,910'")
    assert lines[-1].endswith("LACKS the line 'workers 2'")


def test_a_folder_without_records_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics.jsonl; give the run folder"):
        run_lines(tmp_path)
    with pytest.raises(ValueError, match="holds no time split yet"):
        run_lines(write_run(tmp_path / "run", {"loss": 1.0}))
