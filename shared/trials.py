"""A short piece of a run, and whether another configuration does the same work faster: for `diagnose` and `tune-speed`.

A piece is a run without its folder: the app builds it as `train` would and trains through its own train_epoch for as
many steps as it is asked. Two pieces are compared by turns in one process, on the same number of samples.
"""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from shared.config import Resolved, knobs
from shared.ladder import FASTER, Memory, Spread, finish, quotients, spread, turn, verdict, watched
from shared.log import SilentLog
from shared.timing import RateMeter, StepTimer

C = TypeVar("C")

REPEATS = 5  # of either side in a comparison
LEAST_S = 0.5  # what is left of a budget must be at least this for one more comparison to be begun
NO_MEMORY = "does not fit into memory"


class Steps:
    """A number of steps to train: `hooks` makes an app's train_epoch stop after them; then it says how fast they were.

    `warm_up` further steps come first and are in no figure. `on_step` is told the note of every step, None where
    nothing was due.
    """

    def __init__(
        self,
        steps: int,
        *,
        device: torch.device,
        timer: StepTimer | None = None,
        warm_up: int = 1,
        on_step: Callable[[str | None], None] = lambda note: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert steps >= 1
        assert warm_up >= 1
        self.warm_up = warm_up
        self.ended_s: list[float] = []  # when each step ended, on the host
        self.samples: list[int] = []  # of each step
        self.due: list[bool] = []  # whether something was due in it
        self.hooks: dict[str, Any] = {  # the keyword arguments of every app's train_epoch
            "log": SilentLog(),
            "timer": timer or StepTimer(device),
            "rates": _Counter(self.samples),
            "check": lambda state: None,
            "save": lambda state, meter: None,
            "stopping": lambda state: self.done,
            "on_step": self._end_step,
        }
        self._total = warm_up + steps
        self._device = device
        self._on_step = on_step
        self._clock = clock

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return len(self.ended_s) >= self._total

    @property
    def seconds(self) -> float:
        """How long the steps behind the warm-up took; the device had finished them."""
        return self.ended_s[-1] - self.ended_s[self.warm_up - 1]

    @property
    def samples_per_s(self) -> float:
        """Samples a second behind the warm-up."""
        return sum(self.samples[self.warm_up :]) / max(self.seconds, 1e-9)

    @property
    def steps_per_s(self) -> float:
        """Steps a second behind the warm-up."""
        return (len(self.ended_s) - self.warm_up) / max(self.seconds, 1e-9)

    def step_seconds(self) -> list[tuple[int, float]]:
        """Index and seconds, on the host, of the steps behind the warm-up in which nothing was due."""
        return [
            (i, self.ended_s[i] - self.ended_s[i - 1])
            for i in range(self.warm_up, len(self.ended_s))
            if not self.due[i]
        ]

    def _end_step(self, note: str | None) -> None:
        self._on_step(note)
        if len(self.ended_s) + 1 in (self.warm_up, self._total):
            finish(self._device)  # sync: what is queued belongs to the steps so far
        self.ended_s.append(self._clock())
        self.due.append(note is not None)


class _Counter(RateMeter):
    """Takes down the samples of each step."""

    def __init__(self, samples: list[int]) -> None:
        super().__init__()
        self._counts = samples

    def add(self, samples: int) -> None:
        super().add(samples)
        self._counts.append(samples)


@dataclass(frozen=True)
class Piece:
    """A run that can be trained a little, and evaluated."""

    device: torch.device
    model: nn.Module
    train: Callable[[Steps], None]  # calls train_epoch(..., **steps.hooks) until steps.done, through epochs if need be
    evaluate: Callable[[Callable[[int], None]], None]  # one validation; calls its argument with how many are done
    evaluated: int  # how many one validation evaluates
    steps_per_epoch: int
    eval_every: int = 1  # epochs between validations
    warm_up: int = 1  # steps until every buffer exists and every queue is as full as it will be


@dataclass(frozen=True)
class Candidate:
    """Other values of a few knobs, worth a trial."""

    values: Mapping[str, Any]  # field -> value
    reason: str
    changes: str = ""  # what it changes about the result; none: nothing but its last bits

    @property
    def flags(self) -> str:
        """As typed: "--batch-size 512"."""
        return shlex.join(flag_words(self.values))


@dataclass(frozen=True)
class Dial:
    """A knob that tune-speed turns: values in the order in which they are tried, until one brings no gain."""

    name: str
    values: Sequence[Any]  # upwards from the present value
    down: Sequence[Any] = ()  # tried where the first of `values` brings no gain
    changes: str = ""  # as of a Candidate


@dataclass(frozen=True)
class Subject(Generic[C]):
    """What `diagnose` and `tune-speed` have to know of an app, with its data loaded."""

    prog: str  # "python -m apps.seqrec"
    unit: str  # of samples: "sequences"
    data: str  # the data's fingerprint, or whatever tells data apart
    open: Callable[[C], Piece]
    candidates: Callable[[C], Sequence[Candidate]]
    dials: Callable[[C], Sequence[Dial]]
    # a piece whose input runs in this thread and whose model is not compiled, so that both can be watched; None: the
    # one that `open` gives is such a piece
    open_inline: Callable[[C], Piece | None] = lambda config: None


class Trial(NamedTuple):
    """How a candidate did against the present configuration."""

    candidate: Candidate
    gain: Spread | None = None  # quotients of samples/s; None where it could not be measured
    samples_per_s: float = 0.0
    fault: str = ""  # why it could not be measured

    @property
    def is_gain(self) -> bool:
        """Whether it was faster every time, and by more than noise."""
        return self.gain is not None and verdict(self.gain) == FASTER


def changed(config: C, values: Mapping[str, Any]) -> C:
    """The configuration with other values of the named knobs."""
    sections = {}
    for section in dataclasses.fields(config):  # type: ignore[arg-type]
        part = getattr(config, section.name)
        own = {
            name: value for name, value in values.items() if name in {field.name for field in dataclasses.fields(part)}
        }
        sections[section.name] = dataclasses.replace(part, **own)
    return dataclasses.replace(config, **sections)  # type: ignore[type-var]


def flag_words(values: Mapping[str, Any]) -> list[str]:
    """The words that give the knobs these values on the command line."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", ",".join(map(str, value))]
        else:
            words += [f"--{flag}", "none" if value is None else str(value)]
    return words


def train_command(prog: str, resolved: Resolved[Any], values: Mapping[str, Any]) -> str:
    """The command line that trains the resolved configuration with other values of some knobs."""
    given: dict[str, Any] = {}
    files = []
    for item in knobs(type(resolved.config)).values():
        source = resolved.sources[item.key]
        if source.startswith("flag "):
            given[item.name] = getattr(getattr(resolved.config, item.section), item.name)
        elif source != "default":
            files.append(source.removeprefix("preset ").removesuffix(".yaml") if source[:7] == "preset " else source)
    words = [*(["--config", files[0]] if files else []), *flag_words({**given, **values})]
    return f"{prog} train {shlex.join(words)}".rstrip()


def compare(
    candidate: Candidate,
    present: Piece,
    other: Piece,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """How `other`, the candidate's piece, does against `present`, by turns, in about `budget_s` seconds."""
    pieces = (present, other)
    begin = clock()
    looks = [_run(piece, 1, clock) for piece in pieces]
    sizes = [look.samples[-1] for look in looks]
    warm_up_s = sum(piece.warm_up / look.steps_per_s for piece, look in zip(pieces, looks, strict=True))
    left_s = (budget_s - (clock() - begin)) / REPEATS - warm_up_s
    samples = max(left_s, 0.0) / sum(1 / look.samples_per_s for look in looks)
    # as many samples for either: whole steps of the larger batch, and what comes nearest to them of the smaller one
    samples = max(1, int(samples / max(sizes))) * max(sizes)
    counts = [max(1, round(samples / size)) for size in sizes]

    rates: list[list[float]] = [[], []]
    for repeat in range(REPEATS):
        for i in turn(2, repeat):
            rates[i].append(_run(pieces[i], counts[i], clock).samples_per_s)
    gain = spread(quotients(rates[1], rates[0]))
    return Trial(candidate, gain, spread(rates[1]).median)


def _run(piece: Piece, steps: int, clock: Callable[[], float]) -> Steps:
    run = Steps(steps, device=piece.device, warm_up=piece.warm_up, clock=clock)
    piece.train(run)
    return run


def open_warm(open_piece: Callable[[], Piece], device: torch.device) -> tuple[Piece, Memory]:
    """The piece after its first steps, and the memory that it takes in all, beside the data."""
    with watched(device) as memory:
        piece = open_piece()
        piece.train(Steps(1, device=device, warm_up=piece.warm_up))
    return piece, memory()


class CannotRunError(ValueError):
    """A configuration that cannot be tried here; the message says why."""


@contextlib.contextmanager
def tried() -> Iterator[None]:
    """Inside, what shows that a configuration cannot be run here is a CannotRunError."""
    try:
        yield
    except ValueError as error:
        raise CannotRunError(str(error).splitlines()[0]) from error
    except torch.OutOfMemoryError as error:
        raise CannotRunError(NO_MEMORY) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # the words of the CPU's allocator, which has no error of its own
            raise
        raise CannotRunError(NO_MEMORY) from error


def try_all(
    subject: Subject[C],
    config: C,
    present: Piece,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """A Trial of each of the app's candidates, the largest gain first and those without one last.

    Each gets an equal part of what is left of the time; candidates for which none is left are not tried, and one that
    cannot be built or does not fit into memory has a fault instead of a gain.
    """
    begin, trials = clock(), []
    candidates = subject.candidates(config)
    for index, candidate in enumerate(candidates):
        start = clock()
        left_s = (budget_s - (start - begin)) / (len(candidates) - index)
        if left_s < LEAST_S:
            trials.append(Trial(candidate, fault="no time left (--budget)"))
            continue
        try:
            with tried():
                other = subject.open(changed(config, candidate.values))
                left_s -= clock() - start
                trials.append(compare(candidate, present, other, budget_s=left_s, clock=clock))
        except CannotRunError as error:
            trials.append(Trial(candidate, fault=str(error)))
    return sorted(trials, key=lambda trial: trial.gain.median if trial.gain is not None else 0.0, reverse=True)
