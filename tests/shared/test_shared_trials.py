"""Pieces stop after their steps, and configurations are compared by turns on the same number of samples."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from shared.config import knob, resolve
from shared.trials import (
    Candidate,
    Piece,
    Steps,
    Subject,
    changed,
    compare,
    flag_words,
    open_warm,
    train_command,
    try_all,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class DataConfig:
    data_path: str | None = knob(None, "Data.")


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = knob(8, "Samples a step.", minimum=1)
    ks: tuple[int, ...] = knob((1, 5), "Cut-offs.")
    packed: bool = knob(False, "Packed.")
    speed: float = knob(1.0, "Samples a second.")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Toy:
    """An app whose samples take 1 / speed seconds of a clock; it takes down the steps it trains."""

    def __init__(self, candidates: tuple[Candidate, ...] = ()) -> None:
        self.clock = Clock()
        self.trained: list[tuple[Config, int]] = []  # configuration and steps of each call
        self.subject = Subject(
            prog="python -m apps.toy",
            unit="samples",
            data="toy",
            open=self.open,
            candidates=lambda config: candidates,
            dials=lambda config: (),
        )

    def open(self, config: Config) -> Piece:
        if config.training.batch_size == 13:
            raise ValueError("13 is unlucky; take 12\nor 14")
        if config.training.batch_size == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if config.training.batch_size == 15:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        if config.training.batch_size == 16:
            raise RuntimeError("a fault of the program")

        def train(steps: Steps) -> None:
            hooks, count = steps.hooks, 0
            while not steps.done:
                hooks["timer"].start()
                self.clock.now += config.training.batch_size / config.training.speed
                hooks["timer"].finish()
                hooks["rates"].add(config.training.batch_size)
                count += 1
                hooks["on_step"](None)
            self.trained.append((config, count))

        return Piece(CPU, nn.Linear(1, 1), train, lambda on_units: on_units(1), 1, steps_per_epoch=10)


def test_steps_stop_after_the_warm_up_and_their_number():
    clock = Clock()
    notes: list[str | None] = []
    steps = Steps(3, device=CPU, warm_up=2, on_step=notes.append, clock=clock)
    hooks = steps.hooks
    for index, seconds in enumerate((100.0, 100.0, 1.0, 2.0, 3.0)):
        assert not hooks["stopping"](None)
        clock.now += seconds
        hooks["rates"].add(4 + index)
        hooks["on_step"]("due" if index == 3 else None)
    assert steps.done
    assert hooks["stopping"](None)
    assert steps.seconds == 6.0
    assert steps.samples_per_s == (6 + 7 + 8) / 6
    assert steps.steps_per_s == 3 / 6
    assert steps.step_seconds() == [(2, 1.0), (4, 3.0)]  # without the one in which something was due
    assert notes == [None, None, None, "due", None]


def test_other_values_of_knobs_find_their_sections():
    config = changed(Config(), {"batch_size": 4, "data_path": "x"})
    assert config == Config(DataConfig(data_path="x"), TrainConfig(batch_size=4))


def test_flags_are_written_as_they_are_typed():
    values = {"batch_size": 4, "packed": True, "ks": (1, 2), "data_path": None, "speed": 0.5}
    words = ["--batch-size", "4", "--packed", "--ks", "1,2", "--data-path", "none", "--speed", "0.5"]
    assert flag_words(values) == words
    assert flag_words({"packed": False}) == ["--no-packed"]
    assert Candidate({"data_path": "a b"}, "").flags == "--data-path 'a b'"


def test_the_command_keeps_what_was_given_and_replaces_what_is_changed(tmp_path):
    resolved = resolve(Config, flags={"batch_size": 4, "data_path": "a b"})
    command = train_command("python -m apps.toy", resolved, {"batch_size": 64, "packed": True})
    assert command == "python -m apps.toy train --data-path 'a b' --batch-size 64 --packed"
    assert train_command("python -m apps.toy", resolve(Config), {}) == "python -m apps.toy train"
    path = tmp_path / "fast.yaml"
    path.write_text("training:\n  speed: 2.0\n")
    preset = resolve(Config, yaml_path=path, yaml_label="preset fast.yaml")
    assert train_command("p", preset, {"packed": True}) == "p train --config fast --packed"
    assert train_command("p", resolve(Config, yaml_path=path), {}) == f"p train --config {path}"


@pytest.mark.parametrize("size", [8, 64, 2])
def test_the_gain_is_of_samples_a_second_whatever_the_batch_size(size):
    toy = Toy()
    other = toy.open(changed(Config(), {"batch_size": size, "speed": 3.0}))
    trial = compare(Candidate({}, ""), toy.open(Config()), other, budget_s=10_000.0, clock=toy.clock)
    assert trial.gain is not None
    assert tuple(trial.gain) == pytest.approx((3.0, 3.0, 3.0))
    assert trial.is_gain
    assert trial.samples_per_s == pytest.approx(3.0)
    rounds = [(config.training.batch_size, count - 1) for config, count in toy.trained[2:]]
    assert {steps * batch for batch, steps in rounds} == {rounds[0][0] * rounds[0][1]}  # as many samples for both
    assert 8_000 < toy.clock.now < 11_000


def test_the_sides_take_turns_in_both_orders():
    toy = Toy()
    present, other = toy.open(Config()), toy.open(changed(Config(), {"speed": 2.0}))
    compare(Candidate({}, ""), present, other, budget_s=0.0, clock=toy.clock)
    assert [config.training.speed for config, _ in toy.trained[2:]] == [1, 2, 2, 1, 1, 2, 2, 1, 1, 2]


@pytest.mark.parametrize("speed", [1.0, 1.02, 0.5])
def test_less_than_the_noise_is_no_gain(speed):
    toy = Toy()
    other = toy.open(changed(Config(), {"speed": speed}))
    assert not compare(Candidate({}, ""), toy.open(Config()), other, budget_s=0.0, clock=toy.clock).is_gain


def test_trials_are_ordered_by_their_measured_gain():
    speeds = (0.5, 3.0, 1.0, 7.0)
    toy = Toy(tuple(Candidate({"speed": speed}, f"{speed}") for speed in speeds))
    trials = try_all(toy.subject, Config(), toy.open(Config()), budget_s=1e3, clock=toy.clock)
    assert [trial.candidate.reason for trial in trials] == ["7.0", "3.0", "1.0", "0.5"]
    assert [trial.is_gain for trial in trials] == [True, True, False, False]


def test_what_cannot_be_tried_says_why():
    toy = Toy(tuple(Candidate({"batch_size": size}, "") for size in (13, 14, 15)))
    trials = try_all(toy.subject, Config(), toy.open(Config()), budget_s=1e3, clock=toy.clock)
    assert [trial.gain for trial in trials] == [None] * 3
    memory = "does not fit into memory"
    assert [trial.fault for trial in trials] == ["13 is unlucky; take 12", memory, memory]


def test_a_fault_of_the_program_is_not_hidden():
    toy = Toy((Candidate({"batch_size": 16}, ""),))
    with pytest.raises(RuntimeError, match="a fault of the program"):
        try_all(toy.subject, Config(), toy.open(Config()), budget_s=1e3, clock=toy.clock)


def test_without_time_nothing_is_tried():
    toy = Toy((Candidate({"speed": 2.0}, ""),))
    (trial,) = try_all(toy.subject, Config(), toy.open(Config()), budget_s=0.1, clock=toy.clock)
    assert "no time left" in trial.fault
    assert toy.trained == []


def test_a_warm_piece_has_trained():
    toy = Toy()
    piece, _ = open_warm(lambda: toy.open(Config()), CPU)
    assert [count for _, count in toy.trained] == [1 + piece.warm_up]
