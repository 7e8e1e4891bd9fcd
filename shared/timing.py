"""Where a step's time goes, and how many samples a second pass: for the progress line, `bench` and `diagnose`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

SECTIONS = ("data_wait", "copy", "forward", "backward", "optimizer", "sync", "other")


@dataclass(frozen=True)
class TimeSplit:
    """The seconds that `steps` steps spent in each section."""

    steps: int
    seconds: dict[str, float]  # section -> seconds, every section present

    @property
    def total(self) -> float:
        """The seconds of all sections together."""
        return sum(self.seconds.values())

    def shares(self) -> dict[str, float]:
        """Each section's fraction of the total; all 0 where nothing was measured."""
        total = self.total
        return {name: seconds / total if total else 0.0 for name, seconds in self.seconds.items()}

    def line(self) -> str:
        """The split in words, such as "data 1 %, forward 41 %, backward 58 %", without sections that took no time."""
        parts = [
            f"{name.removesuffix('_wait')} {'<1' if share < 0.005 else f'{share:.0%}'.rstrip('%')} %"
            for name, share in self.shares().items()
            if share > 0
        ]
        return ", ".join(parts) or "no step was timed"


class StepTimer:
    """Splits steps into sections: start(), mark(section) at the end of each section, finish().

    On a CPU the times are the host's. On CUDA they are the device's own, from events put into its queue without waiting
    for it: "data_wait" is then how long the device had nothing to do while the host fetched a batch, and host work done
    while the device is busy counts for nothing.

    `watch` is told "" when a step begins and the name of every section when it ends (shared/watch.py has watchers).
    """

    def __init__(
        self,
        device: torch.device,
        *,
        clock: Callable[[], float] = time.perf_counter,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        self._on_cuda = device.type == "cuda"
        self._device = device
        self._clock = clock
        self._watch = watch
        self._marks: list[tuple[str, Any]] = []  # of the step under way: (section, clock reading or CUDA event)
        self._finished: list[list[tuple[str, Any]]] = []

    def start(self) -> None:
        """Begins a step; one that was begun and never finished is forgotten."""
        if self._watch is not None:
            self._watch("")
        self._marks = [("", self._stamp())]

    def mark(self, name: str) -> None:
        """Charges the time since the previous mark, or since start(), to section `name`."""
        assert name in SECTIONS, name
        self._marks.append((name, self._stamp()))
        if self._watch is not None:
            self._watch(name)

    def finish(self) -> None:
        """Ends the step; what passed since the last mark is charged to "other"."""
        self.mark("other")
        self._finished.append(self._marks)
        self._marks = []

    def summary(self) -> TimeSplit:
        """The split of the steps finished since the last call; they are then forgotten. Waits for the device (sync)."""
        splits = self._splits()
        self._finished = []
        return TimeSplit(len(splits), {name: sum(split.seconds[name] for split in splits) for name in SECTIONS})

    def _splits(self) -> list[TimeSplit]:
        """The split of each finished step."""
        if self._on_cuda and self._finished:
            self._finished[-1][-1][1].synchronize()  # sync: the one wait; all earlier events have passed by then
        splits = []
        for marks in self._finished:
            seconds = dict.fromkeys(SECTIONS, 0.0)
            for (_, before), (name, after) in pairwise(marks):
                seconds[name] += before.elapsed_time(after) / 1000 if self._on_cuda else after - before
            splits.append(TimeSplit(1, seconds))
        return splits

    def _stamp(self) -> Any:
        if not self._on_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class StepRecorder(StepTimer):
    """Keeps the split of each step, of one step in every `every`; the others it leaves untimed and unwatched.

    Sums nothing up: to a loop that asks for a summary no step was timed.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        every: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(device, clock=clock, watch=watch)
        self._every = every
        self._index = 0

    def start(self) -> None:
        """Begins a step."""
        if self._index % self._every == 0:
            super().start()

    def mark(self, name: str) -> None:
        """Charges the time since the previous mark to section `name`, where this step is timed."""
        if self._index % self._every == 0:
            super().mark(name)

    def finish(self) -> None:
        """Ends the step."""
        if self._index % self._every == 0:
            super().finish()
        self._index += 1

    def summary(self) -> TimeSplit:
        """Nothing: the steps stay where they are, for splits()."""
        return TimeSplit(0, dict.fromkeys(SECTIONS, 0.0))

    def splits(self) -> list[TimeSplit]:
        """The split of each timed step, oldest first. Waits for the device (sync)."""
        return self._splits()


class Rates(NamedTuple):
    """How fast training went, in wall-clock time that includes neither evaluation nor saving."""

    samples_per_s: float
    steps_per_s: float


class RateMeter:
    """Samples and steps per second since the last read(), without the time between pause() and resume()."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._paused_at: float | None = None
        self._restart(clock())

    def add(self, samples: int) -> None:
        """Counts one step of `samples` samples."""
        self._samples += samples
        self._steps += 1

    def pause(self) -> None:
        """Stops the clock until resume(), for evaluation and saving."""
        assert self._paused_at is None, "pause() while paused"
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Lets the clock run again."""
        assert self._paused_at is not None, "resume() while running"
        self._since += self._clock() - self._paused_at
        self._paused_at = None

    def read(self) -> Rates:
        """The rates since the last read, which starts a new count; 0 where no time has passed."""
        now = self._clock() if self._paused_at is None else self._paused_at
        elapsed_s = now - self._since
        rates = Rates(self._samples / elapsed_s, self._steps / elapsed_s) if elapsed_s > 0 else Rates(0.0, 0.0)
        self._restart(now)
        return rates

    def _restart(self, now: float) -> None:
        self._since = now
        self._samples = 0
        self._steps = 0
