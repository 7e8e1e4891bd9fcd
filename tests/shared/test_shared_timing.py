"""shared.timing: sections add up, unfinished steps are forgotten, paused time does not count."""

import pytest
import torch

from shared.timing import SECTIONS, RateMeter, StepRecorder, StepTimer, TimeSplit

CPU = torch.device("cpu")


class Clock:
    """A clock that shows what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_step(timer: StepTimer, clock: Clock, **durations: float) -> None:
    """One step whose sections take the given seconds; `rest` passes after the last mark."""
    rest = durations.pop("rest", 0.0)
    timer.start()
    for name, seconds in durations.items():
        clock.now += seconds
        timer.mark(name)
    clock.now += rest
    timer.finish()


def test_each_section_is_charged_what_passed_since_the_mark_before():
    clock = Clock()
    timer = StepTimer(CPU, clock=clock)
    run_step(timer, clock, data_wait=1.0, copy=2.0, forward=4.0, backward=8.0, optimizer=16.0, sync=32.0, rest=64.0)
    clock.now += 1000.0  # between steps: nobody's
    run_step(timer, clock, forward=3.0, backward=5.0, rest=1.0)
    split = timer.summary()
    assert split.steps == 2
    assert split.seconds == {
        "data_wait": 1.0,
        "copy": 2.0,
        "forward": 7.0,
        "backward": 13.0,
        "optimizer": 16.0,
        "sync": 32.0,
        "other": 65.0,
    }
    assert split.total == 136.0


def test_a_section_marked_twice_in_a_step_gets_both_times():
    clock = Clock()
    timer = StepTimer(CPU, clock=clock)
    timer.start()
    for name in ("forward", "backward", "forward", "backward"):
        clock.now += 1.5
        timer.mark(name)
    timer.finish()
    seconds = timer.summary().seconds
    assert (seconds["forward"], seconds["backward"], seconds["other"]) == (3.0, 3.0, 0.0)


def test_a_summary_starts_a_new_count():
    clock = Clock()
    timer = StepTimer(CPU, clock=clock)
    run_step(timer, clock, forward=1.0)
    timer.summary()
    assert timer.summary() == TimeSplit(0, dict.fromkeys(SECTIONS, 0.0))


def test_a_step_that_never_finished_is_not_counted():
    clock = Clock()
    timer = StepTimer(CPU, clock=clock)
    timer.start()
    clock.now += 50.0
    timer.mark("data_wait")  # the epoch was over: no batch came
    run_step(timer, clock, forward=2.0)
    split = timer.summary()
    assert (split.steps, split.seconds["data_wait"], split.total) == (1, 0.0, 2.0)


def test_a_summary_in_the_middle_of_a_step_leaves_that_step_whole():
    clock = Clock()
    timer = StepTimer(CPU, clock=clock)
    timer.start()
    clock.now += 2.0
    timer.mark("forward")
    assert timer.summary().steps == 0
    clock.now += 3.0
    timer.finish()
    assert timer.summary().total == 5.0


def test_an_unknown_section_is_a_programmers_error():
    timer = StepTimer(CPU, clock=Clock())
    timer.start()
    with pytest.raises(AssertionError, match="forwards"):
        timer.mark("forwards")


def test_shares_add_up_to_one_and_the_line_shows_them():
    seconds = dict.fromkeys(SECTIONS, 0.0) | {"data_wait": 1.0, "forward": 41.0, "backward": 57.8, "other": 0.2}
    split = TimeSplit(3, seconds)
    assert sum(split.shares().values()) == pytest.approx(1.0)
    assert split.shares()["forward"] == pytest.approx(0.41)
    assert split.line() == "data 1 %, forward 41 %, backward 58 %, other <1 %"


def test_nothing_timed_has_shares_of_zero_and_says_so():
    split = StepTimer(CPU).summary()
    assert set(split.shares().values()) == {0.0}
    assert split.line() == "no step was timed"


def test_rates_are_per_second_of_unpaused_time():
    clock = Clock()
    meter = RateMeter(clock=clock)
    for samples in (32, 32, 16):
        clock.now += 1.0
        meter.add(samples)
    meter.pause()
    clock.now += 500.0
    meter.resume()
    clock.now += 1.0
    assert meter.read() == (80 / 4.0, 3 / 4.0)


def test_reading_rates_starts_a_new_count_also_while_paused():
    clock = Clock()
    meter = RateMeter(clock=clock)
    clock.now += 2.0
    meter.add(10)
    meter.pause()
    clock.now += 7.0
    assert meter.read() == (5.0, 0.5)
    clock.now += 7.0
    meter.resume()
    clock.now += 4.0
    meter.add(8)
    assert meter.read() == (2.0, 0.25)


def test_rates_without_elapsed_time_are_zero():
    meter = RateMeter(clock=Clock())
    meter.add(5)
    assert meter.read() == (0.0, 0.0)


def test_pausing_twice_is_a_programmers_error():
    meter = RateMeter(clock=Clock())
    with pytest.raises(AssertionError):
        meter.resume()
    meter.pause()
    with pytest.raises(AssertionError):
        meter.pause()


class FakeEvent:
    """A CUDA event that passes one millisecond after the one recorded before it; counts the waits."""

    recorded = 0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        FakeEvent.recorded += 1
        self.at_ms = float(FakeEvent.recorded)

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at_ms - self.at_ms

    def synchronize(self) -> None:
        FakeEvent.waits += 1


def test_on_cuda_marks_never_wait_and_a_summary_waits_once(monkeypatch):
    monkeypatch.setattr(FakeEvent, "recorded", 0)
    monkeypatch.setattr(FakeEvent, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    timer = StepTimer(torch.device("cuda", 0))
    for _ in range(3):
        timer.start()
        timer.mark("forward")
        timer.mark("backward")
        timer.finish()
    assert FakeEvent.waits == 0
    split = timer.summary()
    assert FakeEvent.waits == 1
    assert split.seconds["forward"] == pytest.approx(0.003)
    assert split.total == pytest.approx(0.009)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_sections_are_measured_by_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    timer = StepTimer(device)
    x = torch.randn(2048, 2048, device=device)
    for _ in range(3):
        timer.start()
        timer.mark("data_wait")
        y = x
        for _ in range(20):
            y = y @ x
        timer.mark("forward")
        timer.finish()
    split = timer.summary()
    assert split.steps == 3
    assert split.seconds["forward"] > split.seconds["other"] >= 0.0
    assert split.seconds["backward"] == 0.0


def test_a_watcher_is_told_where_steps_begin_and_sections_end():
    told: list[str] = []
    timer = StepTimer(CPU, clock=Clock(), watch=told.append)
    run_step(timer, Clock(), data_wait=1.0, forward=1.0)
    assert told == ["", "data_wait", "forward", "other"]


def test_a_recorder_keeps_each_step_and_sums_nothing_up():
    clock = Clock()
    recorder = StepRecorder(CPU, clock=clock)
    for seconds in (1.0, 2.0):
        run_step(recorder, clock, forward=seconds)
        assert recorder.summary() == TimeSplit(0, dict.fromkeys(SECTIONS, 0.0))
    assert [split.seconds["forward"] for split in recorder.splits()] == [1.0, 2.0]
    assert [split.steps for split in recorder.splits()] == [1, 1]


def test_a_recorder_of_every_second_step_leaves_the_others_untimed_and_unwatched():
    clock, told = Clock(), list[str]()
    recorder = StepRecorder(CPU, every=2, clock=clock, watch=told.append)
    for seconds in (1.0, 2.0, 4.0, 8.0, 16.0):
        run_step(recorder, clock, forward=seconds)
    assert [split.seconds["forward"] for split in recorder.splits()] == [1.0, 4.0, 16.0]
    assert told == ["", "forward", "other"] * 3
