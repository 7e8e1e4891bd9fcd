"""Reads of the device are counted at their line, hot functions are found, and ranges have the sections' names."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.timing import StepTimer
from shared.watch import HostReads, HotFunctions, Ranges, is_own, profiler_ranges

CPU = torch.device("cpu")


def line_of(text: str) -> int:
    """The line of this file that ends in the comment `# text`."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.endswith(f"  # {text}"))


class Clock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def reads_of(model: nn.Module, step, *, steps: int = 4, due: tuple[int, ...] = ()) -> HostReads:
    """What is found in steps that call step(index)."""
    reads = HostReads(CPU, model.parameters())
    timer = StepTimer(CPU, watch=reads)
    with reads:
        for index in range(steps):
            timer.start()
            step(index)
            timer.finish()
            reads.end_of_step(index in due)
    return reads


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_a_number_read_in_every_step_is_counted_at_its_line(model):
    def step(index: int) -> None:
        loss = model(torch.ones(4, 3)).sum()
        loss.backward()
        for _ in range(3):
            loss.item()  # read here

    (found,) = reads_of(model, step).found()
    assert found.place.line == line_of("read here")
    assert found.place.file == "tests/shared/test_shared_watch.py"
    assert "step" in found.place.function
    assert found.what == "reads a number"
    assert found.per_step == 3


WAITS: dict[str, Callable[[Tensor], object]] = {
    "float": lambda t: float(t.detach().sum()),
    "bool": lambda t: bool((t > 0).any()),
    "tolist of a number": lambda t: t.sum().tolist(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "cpu": lambda t: t.detach().cpu(),
    "nonzero": lambda t: torch.nonzero(t),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: torch.masked_select(t, t > 0),
    "unique": lambda t: torch.unique(t.detach()),
    "equal": lambda t: torch.equal(t, t),
    "repeat_interleave": lambda t: torch.repeat_interleave(t[0], (t[0] > 0).long()),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait_is_counted_once(model, name):
    (found,) = reads_of(model, lambda index: WAITS[name](model(torch.ones(4, 3)))).found()
    assert found.per_step == 1


def test_work_that_stays_on_the_device_and_the_inputs_own_tensors_are_no_reads(model):
    batches = torch.arange(12.0).view(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(index: int) -> None:
        rows = torch.nonzero(batches[:, 0] >= 0).squeeze(1)  # the input's own
        assert int(rows.sum()) == 6
        assert batches.sum().item() == 66
        loss = model(batches[rows]).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    assert reads_of(model, step).found() == []


def test_reading_a_batch_that_the_model_has_met_is_a_read(model):
    def step(index: int) -> None:
        batch = torch.ones(4, 3)
        model(batch)
        batch.sum().item()

    assert [found.per_step for found in reads_of(model, step).found()] == [1]


def test_steps_in_which_something_is_due_are_left_out(model):
    def step(index: int) -> None:
        if index % 2:
            model(torch.ones(1, 3)).sum().item()

    assert reads_of(model, step, due=(1, 3)).found() == []
    everything_due = reads_of(model, step, due=(0, 1, 2, 3))
    assert everything_due.always_due
    assert everything_due.found() == []
    assert not reads_of(model, step, due=(1, 3)).always_due


def test_a_read_in_backward_is_found(model):
    def step(index: int) -> None:
        hidden = model(torch.ones(2, 3))
        hidden.register_hook(lambda gradient: gradient * gradient.sum().item())
        hidden.sum().backward()

    assert [found.per_step for found in reads_of(model, step).found()] == [1]


def test_reads_between_the_steps_do_not_count(model):
    reads = HostReads(CPU, model.parameters())
    with reads:
        for _ in range(2):
            reads("")
            loss = model(torch.ones(1, 3)).sum()
            reads.end_of_step(False)
            loss.item()
    assert reads.found() == []


def test_the_function_that_the_input_waits_for_is_the_hottest():
    clock = Clock()

    def slow() -> None:
        clock.now += 9.0

    def batch() -> None:
        clock.now += 1.0
        slow()

    hot = HotFunctions(clock=clock)
    timer = StepTimer(CPU, watch=hot)
    for _ in range(2):
        timer.start()
        batch()
        timer.mark("data_wait")
        clock.now += 100.0  # not the input
        timer.finish()
    first, second = [found for found in hot.found() if found.share > 0]
    assert first.place.function.endswith("slow")
    assert first.place.line == line_of_def("slow")
    assert [first.share, second.share] == pytest.approx([0.9, 0.1])
    assert second.place.function.endswith("batch")


def line_of_def(name: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(f"def {name}("))


def test_what_a_library_does_counts_for_its_caller():
    hot = HotFunctions(clock=iter(range(10**9)).__next__)
    timer = StepTimer(CPU, watch=hot)
    draw = random.Random(0)

    def sampler() -> list[list[int]]:
        return [draw.sample(range(1000), 50) for _ in range(20)]

    timer.start()
    sampler()
    timer.mark("data_wait")
    timer.finish()
    found = hot.found()[0]
    assert "sampler" in found.place.function
    assert found.share > 0.9
    assert found.calls_per_step > 20 * 50  # the library draws one by one


def test_the_profile_function_of_before_is_put_back():
    def before(frame, event, argument) -> None:
        pass

    hot = HotFunctions()
    sys.setprofile(before)
    try:
        hot("")
        hot("data_wait")
        assert sys.getprofile() is before
        hot("forward")
        assert sys.getprofile() is before
    finally:
        sys.setprofile(None)


def test_code_of_libraries_is_not_the_users(tmp_path):
    assert is_own(__file__)
    assert is_own(str(tmp_path / "sampler.py"))
    assert not is_own(torch.__file__)
    assert not is_own(json.__file__)
    assert not is_own("<frozen importlib>")
    assert not is_own(str(Path(pytest.__file__)))


def range_names(steps: list[list[str]]) -> list[str]:
    """The names of the ranges that torch.profiler sees in steps of these marks."""
    ranges = profiler_ranges()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        for marks in steps:
            ranges("")
            for name in marks:
                ranges(name)
    names = ("data_wait", "forward", "backward", "sync", "other")
    events = [event for event in profiler.events() if event.name in names]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def test_ranges_have_the_names_of_the_sections():
    step = ["data_wait", "forward", "backward", "forward", "backward", "other"]
    assert range_names([step, step, step]) == step + step  # the first step teaches the names


def test_ranges_find_back_after_a_section_that_the_step_before_did_not_have():
    usual, due = ["data_wait", "forward", "backward", "other"], ["data_wait", "forward", "backward", "sync", "other"]
    assert range_names([usual, due, usual, usual])[4:] == [
        *("other",),  # what follows sync; sync itself was begun as "other"
        *("data_wait", "forward", "backward", "sync"),  # as the step before had it
        *usual,
    ]


def test_every_range_that_begins_ends():
    told: list[str] = []
    ranges = Ranges(told.append, lambda: told.append("end"))
    for marks in (["forward", "other"], ["forward", "other"], ["sync", "forward", "other"], ["forward", "other"]):
        ranges("")
        for name in marks:
            ranges(name)
    assert told[1::2] == ["end"] * (len(told) // 2)
    assert "end" not in told[::2]
    assert told[:4:2] == ["forward", "other"]
