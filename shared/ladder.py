"""The ladder of `bench`: arrangements of the same work measured in turn, each against the one it started from.

A part is a list of rungs. Its first is the original arrangement; every other one is either one optimisation alone, or
(`cumulative`) one more than the rung before. All rungs of a part are prepared and warmed up in one process and then
take turns, forwards and backwards, so that whatever else the machine does meets all of them alike. Every rung has the
same number of repeats; how many steps a repeat has follows from the time there is.

Rates are of samples and of steps, since "it/s" has meant both. A spread is the lowest and the highest of the repeats. A
factor is the quotient of the samples/s of the same repeat, so that a slow moment of the machine mostly cancels.
"""

import ctypes
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from shared.device import describe_machine
from shared.files import atomic_write_text

BENCH_NAME = "bench.json"
REPEATS = 5
NOISE = 0.03  # a median within this share of 1 is no difference
DEMO_MARK = " (demo data)"
LARGEST_REPEAT = 10_000  # steps, for work that takes no time at all

FASTER, NO_GAIN, SLOWER, ORIGINAL = "faster", "no gain on this machine", "slower", "the original"

Kind = Literal["train", "input", "evaluation"]

_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Work(NamedTuple):
    """What a run has done."""

    samples: int
    steps: int


Run = Callable[[int], Work]  # does so many steps


@dataclass(frozen=True)
class Rung:
    """One arrangement: `make` prepares it (untimed) and gives what runs it."""

    name: str  # short, for tables and --only
    text: str  # what it does instead of what
    make: Callable[[], Run]
    claim: str = ""  # what the notes promise, with the ids of the requirements, as "S3-25: +30-50 %"; none: ours


@dataclass(frozen=True)
class Part:
    """Arrangements of the same work, the original first."""

    name: str
    title: str
    kind: Kind  # input: sampling and loading alone
    unit: str  # what a sample is: "sequences"
    rungs: tuple[Rung, ...]
    cumulative: bool = False  # every rung adds to the one before it


class Switch(NamedTuple):
    """An optimisation that an app can turn on by its name."""

    name: str
    text: str
    claim: str = ""
    alone: bool = True  # whether it can be turned on without those before it


class Unmeasured(NamedTuple):
    """A promise that this command cannot check."""

    claim: str
    why: str


class Epoch(NamedTuple):
    """What an epoch consists of, for the projection: of a part, the first row is the original and the last one ours."""

    train: str  # name of the part that trains
    samples: int  # of an epoch of training
    evaluation: str = ""  # name of the part that evaluates; "" where an epoch has no evaluation
    evaluated: int = 0  # samples that the evaluations of an epoch go through


@dataclass(frozen=True)
class Ladder:
    """All that an app measures."""

    parts: tuple[Part, ...]
    unmeasured: tuple[Unmeasured, ...] = ()
    epoch: Epoch | None = None


class Spread(NamedTuple):
    """The median of the repeats, and the lowest and highest of them."""

    median: float
    low: float
    high: float


class Memory(NamedTuple):
    """By how much a step's peak exceeds what was held before it; None where that cannot be measured."""

    host_bytes: int | None
    device_bytes: int | None


@dataclass(frozen=True)
class Row:
    """A measured rung."""

    rung: Rung
    steps: int  # of each repeat
    samples_per_s: Spread
    steps_per_s: Spread
    factor: Spread | None  # against the original; None for the original
    gain: Spread | None  # against the row before, in a cumulative part
    verdict: str
    memory: Memory


@dataclass(frozen=True)
class Measured:
    """A part and its rows, in the order of its rungs."""

    part: Part
    rows: tuple[Row, ...]


class Hours(NamedTuple):
    """How long so many epochs take."""

    train: float
    evaluation: float

    @property
    def total(self) -> float:
        """Both."""
        return self.train + self.evaluation


class Projection(NamedTuple):
    """What the measured rates mean for a long run."""

    epochs: int
    samples: int  # of an epoch
    evaluated: int
    original: Hours
    ours: Hours


def both_ways(
    original: str, switches: Sequence[Switch], make: Callable[[frozenset[str]], Run], *, unit: str
) -> tuple[Part, Part]:
    """The parts "alone" and "cumulative" of training: each switch by itself, and all of them in their order.

    `make` prepares the arrangement with the switches of those names on; with none it is what `original` describes.
    """

    def rung(switch: Switch, names: Sequence[str]) -> Rung:
        return Rung(switch.name, switch.text, partial(make, frozenset(names)), switch.claim)

    first = Rung("original", original, partial(make, frozenset()))
    alone = [rung(switch, [switch.name]) for switch in switches if switch.alone]
    names = [switch.name for switch in switches]
    steps = [rung(switch, names[: i + 1]) for i, switch in enumerate(switches)]
    return (
        Part("alone", "training, each alone against the original", "train", unit, (first, *alone)),
        Part("cumulative", "training, one after the other", "train", unit, (first, *steps), cumulative=True),
    )


def endless(batches: Sequence[Any]) -> Callable[[], Any]:
    """A function that gives one batch after the other, from the first again behind the last."""
    source = cycle(batches)
    return lambda: next(source)


def chosen(ladder: Ladder, names: Sequence[str]) -> Ladder:
    """The ladder with the named parts, and with the named rungs beside their originals; all of it without names.

    Of a cumulative part nothing is taken unless the part itself is named: its rungs stand on each other. Without the
    parts that the projection takes there is no `epoch`.
    """
    if not names:
        return ladder
    known = [name for part in ladder.parts for name in (part.name, *(rung.name for rung in part.rungs[1:]))]
    for name in names:
        if name not in known:
            raise ValueError(
                f'the ladder has nothing called "{name}"; --only takes a part or a row: '
                f"{', '.join(dict.fromkeys(known))}"
            )
    parts = []
    for part in ladder.parts:
        kept = [rung for rung in part.rungs[1:] if not part.cumulative and rung.name in names]
        if part.name in names:
            parts.append(part)
        elif kept:
            parts.append(replace(part, rungs=(part.rungs[0], *kept)))
    kept_names = {part.name for part in parts}
    epoch = ladder.epoch
    if epoch is not None and not {epoch.train, epoch.evaluation or epoch.train} <= kept_names:
        epoch = None
    return replace(ladder, parts=tuple(parts), epoch=epoch)


def total_runs(ladder: Ladder, *, repeats: int = REPEATS) -> int:
    """How often `measure` will call `on_run`."""
    return sum(len(part.rungs) * (2 + repeats) for part in ladder.parts)


def measure(
    ladder: Ladder,
    *,
    device: torch.device,
    budget_s: float,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[str], None] = lambda name: None,
) -> tuple[Measured, ...]:
    """Every part, measured in turn within about `budget_s` seconds, preparation included.

    Where the time does not hold the repeats, they have fewer steps, down to one; they never become fewer. `on_run` is
    told the rung that has just run. The device has finished whenever the clock is read.
    """
    assert repeats >= 1
    begin, measured = clock(), []
    for index, part in enumerate(ladder.parts):
        rest = sum(len(later.rungs) for later in ladder.parts[index:])
        share = (budget_s - (clock() - begin)) * len(part.rungs) / rest
        measured.append(measure_part(part, device=device, budget_s=share, repeats=repeats, clock=clock, on_run=on_run))
    return tuple(measured)


def measure_part(
    part: Part,
    *,
    device: torch.device,
    budget_s: float,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[str], None] = lambda name: None,
) -> Measured:
    """One part; arguments as those of `measure`."""
    begin = clock()

    def timed(run: Run, steps: int) -> tuple[Work, float]:
        finish(device)
        start = clock()
        work = run(steps)
        finish(device)  # sync: what is queued belongs to the step
        return work, clock() - start

    runs, memory, step_s = [], [], []
    for rung in part.rungs:
        run = rung.make()
        run(1)  # first touches, lazily made buffers and states
        on_run(rung.name)
        with watched(device) as watch:
            work, elapsed_s = timed(run, 1)
        on_run(rung.name)
        runs.append(run)
        memory.append(watch())
        step_s.append(elapsed_s / work.steps)
    steps = plan_steps(step_s, budget_s=budget_s - (clock() - begin), repeats=repeats)

    rates: list[list[tuple[float, float]]] = [[] for _ in runs]
    with frozen_heap():
        for repeat in range(repeats):
            for i in turn(len(runs), repeat):
                work, elapsed_s = timed(runs[i], steps[i])
                # a clock may be too coarse for a tiny run: then it took one tick of a nanosecond clock
                rates[i].append((work.samples / max(elapsed_s, 1e-9), work.steps / max(elapsed_s, 1e-9)))
                on_run(part.rungs[i].name)
    return Measured(part, rows_of(part, rates, steps, memory))


def turn(count: int, repeat: int) -> Iterator[int]:
    """In which order the rungs run: forwards and backwards by turns, so that none always follows the same other one."""
    return iter(range(count) if repeat % 2 == 0 else reversed(range(count)))


def plan_steps(step_s: Sequence[float], *, budget_s: float, repeats: int) -> list[int]:
    """How many steps a repeat of each rung has, given the seconds of one step: equal time for all.

    A rung of which one step takes more than its share gets that one step, and the others share what it leaves.
    """
    steps = [1] * len(step_s)
    left = budget_s / repeats
    slowest_first = sorted(range(len(step_s)), key=step_s.__getitem__, reverse=True)
    for place, i in enumerate(slowest_first):
        share = left / (len(step_s) - place)
        if share >= step_s[i] * LARGEST_REPEAT:
            steps[i] = LARGEST_REPEAT
        else:
            steps[i] = max(1, int(share / step_s[i]))
        left -= steps[i] * step_s[i]
    return steps


def rows_of(
    part: Part,
    rates: Sequence[Sequence[tuple[float, float]]],
    steps: Sequence[int],
    memory: Sequence[Memory],
) -> tuple[Row, ...]:
    """The rows of a part from the (samples/s, steps/s) of every rung's repeats."""
    rows = []
    for i, rung in enumerate(part.rungs):
        samples = [rate for rate, _ in rates[i]]
        factor = spread(quotients(samples, [rate for rate, _ in rates[0]])) if i else None
        gain = spread(quotients(samples, [rate for rate, _ in rates[i - 1]])) if i and part.cumulative else None
        rows.append(
            Row(
                rung=rung,
                steps=steps[i],
                samples_per_s=spread(samples),
                steps_per_s=spread([rate for _, rate in rates[i]]),
                factor=factor,
                gain=gain,
                verdict=ORIGINAL if factor is None else verdict(gain or factor),
                memory=memory[i],
            )
        )
    return tuple(rows)


def quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The quotient of every repeat; work without samples has none, which counts as 1."""
    return [a / b if b else 1.0 for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(statistics.median(values), min(values), max(values))


def verdict(factor: Spread) -> str:
    """A factor in words: faster or slower in every repeat, and by more than NOISE in the median; else no gain."""
    if factor.low > 1 and factor.median >= 1 + NOISE:
        return FASTER
    if factor.high < 1 and factor.median <= 1 / (1 + NOISE):
        return SLOWER
    return NO_GAIN


def project(measured: Sequence[Measured], epoch: Epoch, *, epochs: int) -> Projection:
    """Hours of so many epochs at the measured rates of the parts that `epoch` names."""
    found = {one.part.name: one.rows for one in measured}
    train, evaluation = found[epoch.train], found[epoch.evaluation] if epoch.evaluation else None

    def hours(row: int) -> Hours:
        ranking = epochs * epoch.evaluated / evaluation[row].samples_per_s.median / 3600 if evaluation else 0.0
        return Hours(epochs * epoch.samples / train[row].samples_per_s.median / 3600, ranking)

    return Projection(epochs, epoch.samples, epoch.evaluated, hours(0), hours(-1))


def record(
    ladder: Ladder,
    measured: Sequence[Measured],
    *,
    app: str,
    data: Mapping[str, Any],
    device: torch.device,
    command: str,
    git: str | None,
    notes: Sequence[str] = (),
    repeats: int = REPEATS,
    budget_s: float,
    elapsed_s: float,
    project_epochs: int = 0,
) -> dict[str, Any]:
    """What bench.json holds: the rows with machine, versions, command and revision; plain values, no NaN.

    `data` says what was measured on: "name", "demo" (whether it is the built-in demo data), and what else tells its
    size. `notes` are printed above everything.
    """
    machine = describe_machine()
    projection = None
    if project_epochs and ladder.epoch is not None:
        projection = project(measured, ladder.epoch, epochs=project_epochs)
    return {
        "app": app,
        "title": f"{app}: the ladder on {data['name']}{DEMO_MARK if data['demo'] else ''}",
        "notes": list(notes),
        "protocol": (
            f"{repeats} repeats of every row, taking turns in one process after a warm-up; median (lowest .. highest); "
            "factors are of samples/s, against the original of the same repeat; memory is by how much a step's peak "
            "exceeds what was held before it"
        ),
        "data": dict(data),
        "device": str(device),
        "repeats": repeats,
        "budget_s": budget_s,
        "elapsed_s": elapsed_s,
        "parts": [part_record(one) for one in measured],
        "unmeasured": [one._asdict() for one in ladder.unmeasured],
        "projection": None if projection is None else projection_record(projection),
        "machine": machine,
        "versions": {"torch": machine["torch"], "python": machine["python"]},
        "git": git,
        "command": command,
    }


def write_record(run_dir: Path, found: Mapping[str, Any]) -> Path:
    """The path of the folder's bench.json, written; a number that JSON does not have is refused."""
    path = run_dir / BENCH_NAME
    atomic_write_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")
    return path


def part_record(measured: Measured) -> dict[str, Any]:
    """A part as plain values."""
    part = measured.part
    return {
        "name": part.name,
        "title": part.title,
        "kind": part.kind,
        "unit": part.unit,
        "cumulative": part.cumulative,
        "rows": [
            {
                "name": row.rung.name,
                "text": row.rung.text,
                "claim": row.rung.claim,
                "steps": row.steps,
                "samples_per_s": row.samples_per_s._asdict(),
                "steps_per_s": row.steps_per_s._asdict(),
                "factor": None if row.factor is None else row.factor._asdict(),
                "gain": None if row.gain is None else row.gain._asdict(),
                "verdict": row.verdict,
                **row.memory._asdict(),
            }
            for row in measured.rows
        ],
    }


def projection_record(projection: Projection) -> dict[str, Any]:
    """A projection as plain values, with the totals."""
    hours = {
        side: {"train_h": time.train, "evaluation_h": time.evaluation, "total_h": time.total}
        for side, time in (("original", projection.original), ("ours", projection.ours))
    }
    factor = projection.original.total / projection.ours.total if projection.ours.total else math.inf
    return {
        "epochs": projection.epochs,
        "samples": projection.samples,
        "evaluated": projection.evaluated,
        **hours,
        "factor": factor if math.isfinite(factor) else None,
    }


# Device, heap and memory


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside, Python's collector leaves alone what exists already.

    Otherwise one rung's many objects would be walked through again and again in the time of all the others.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def watched(device: torch.device) -> Iterator[Callable[[], Memory]]:
    """Gives a function that says, behind the block, by how much memory inside exceeded what was held before it."""
    host = host_held_after_reset()
    before, found = 0, Memory(None, None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield lambda: found
    peak = None if host is None else status_bytes("VmHWM")
    found = Memory(
        None if host is None or peak is None else max(0, peak - host),
        torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None,
    )


def host_held_after_reset() -> int | None:
    """The bytes this process holds, its peak reset to them; None where the system does not tell (only Linux does)."""
    try:
        # freed memory that the allocator keeps would hide the next one's need for it
        ctypes.CDLL(None).malloc_trim(0)
        _REFS.write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return status_bytes("VmRSS")


def status_bytes(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith(f"{key}:")]
    return int(found[0][1]) * 1024 if found else None
