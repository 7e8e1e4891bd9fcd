"""Where the time of a run goes on this machine and data, what limits it, and what would make it faster.

`diagnose` trains a few steps of the very configuration through the app's own train_epoch. Different questions get
different steps, so that no answer disturbs another: timed steps (every second one; the others show what timing costs),
steps whose operations are watched, steps whose input is profiled, and on CUDA steps under torch.profiler. Then every
change that the app thinks worth a trial is tried against the present configuration, by turns.
"""

import contextlib
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from shared.config import Resolved
from shared.device import describe_machine
from shared.files import replace
from shared.ladder import NOISE, Memory, watched
from shared.log import LOG_NAME, METRICS_NAME, read_metrics
from shared.timing import SECTIONS, StepRecorder, StepTimer, TimeSplit
from shared.trials import Piece, Steps, Subject, Trial, train_command, tried, try_all
from shared.watch import HostRead, HostReads, HotFunction, HotFunctions, nvtx_ranges, profiler_ranges

C = TypeVar("C")

BUDGET_S = 60.0
# Shares of the time budget; trials of candidates get the rest.
TIMING_SHARE, EVALUATION_SHARE, WATCH_SHARE = 0.15, 0.1, 0.05
LEAST_STEPS, MOST_STEPS = 6, 200  # timed in all: below, a median says little; above, nothing new is learnt
WATCHED_STEPS = 4  # whose operations and functions are watched; reads and hot functions are the same in every step
TRACED_STEPS = 3  # behind those that teach the ranges their names; a trace of a few steps opens anywhere
MOST_RECOMMENDED = 5

# Thresholds, as shares of a typical step.
INPUT_RULES = 0.5  # waiting for batches takes most of the step: nothing else is worth a look before
INPUT_COUNTS = 0.2  # taking it away altogether would make the run 1.25 times faster
COPY_COUNTS = 0.2
SYNC_COUNTS = 0.1  # the host waits; a step that is not due has no reason to wait at all
OPTIMIZER_COUNTS = 0.4  # its cost per step is the same for any batch size
OTHER_COUNTS = 0.2  # Python between the sections
COMPUTE_RULES = 0.6  # forward and backward
EVALUATION_COUNTS = 0.3  # of an epoch with its validations
BUSY = 0.8  # below this share of the time the device waits for the host (S2-14 of the notes: 80 %)


class Finding(NamedTuple):
    """Something that limits the run, and what to do about it."""

    kind: str  # input, reads, due, copy, sync, optimizer, other, evaluation, launch, compute, none
    text: str
    remedy: str

    def line(self) -> str:
        """Both in one line."""
        return f"{self.text}. {self.remedy}" if self.remedy else self.text


class Overhead(NamedTuple):
    """What timing the steps costs."""

    hooks_s: float  # of a step, the hooks run alone
    share: float  # of a typical step, from hooks_s
    by_turns: float  # timed steps against the untimed ones between them: a quotient less 1, with the noise of steps


class Timing(NamedTuple):
    """What the timed steps showed."""

    typical: TimeSplit  # medians over the timed steps
    samples_per_s: float
    steps_per_s: float
    samples_per_step: float
    memory: Memory
    overhead: Overhead


class Evaluation(NamedTuple):
    """What a validation costs."""

    seconds: float  # of a whole one
    is_whole: bool  # whether all of it was run; else `seconds` is extrapolated
    share: float  # of an epoch with its validations


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    timing: Timing
    evaluation: Evaluation
    reads: tuple[HostRead, ...]
    hot: tuple[HotFunction, ...]
    busy: float | None  # share of the time in which the device computes; None on a CPU
    findings: tuple[Finding, ...]  # the bottleneck first
    trials: tuple[Trial, ...]  # the largest gain first


def diagnose(
    subject: Subject[C],
    resolved: Resolved[C],
    *,
    say: Callable[[str], None],
    budget_s: float = BUDGET_S,
    trace: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Diagnosis:
    """Everything, said line by line as it is found, in about `budget_s` seconds; writes nothing but `trace`."""
    begin = clock()
    config = resolved.config
    piece = subject.open(config)
    for line in environment(piece.device):
        say(line)
    with tried():
        timing = time_steps(piece, budget_s=TIMING_SHARE * budget_s, clock=clock)
    evaluation = time_evaluation(piece, timing, budget_s=EVALUATION_SHARE * budget_s, clock=clock)
    for line in timing_lines(timing, evaluation, piece, unit=subject.unit):
        say(line)

    inline = subject.open_inline(config) or piece
    reads, always_due = find_reads(inline)
    hot = find_hot(inline, clock=clock)
    busy = None
    if trace is not None or piece.device.type == "cuda":
        device_s = traced(piece, trace)
        if device_s:
            busy = min(1.0, device_s * timing.steps_per_s)
            say(f"The device computes {1e3 * device_s:.2f} ms a step, {busy:.0%} of the time")
    found = findings(
        timing.typical,
        hot=hot,
        reads=reads,
        always_due=always_due,
        evaluation_share=evaluation.share,
        busy=busy,
        samples_per_step=timing.samples_per_step,
        on_cuda=piece.device.type == "cuda",
    )
    say("")
    say(f"Bottleneck: {found[0].line()}")
    for finding in found[1:]:
        say(f"Also: {finding.line()}")
    say("")
    trials = try_all(subject, config, piece, budget_s=budget_s - (clock() - begin), clock=clock)
    for line in trial_lines(trials, lambda trial: train_command(subject.prog, resolved, trial.candidate.values)):
        say(line)
    if trace is not None:
        say(f"{trace}: a trace of {TRACED_STEPS} steps; open it at ui.perfetto.dev or chrome://tracing")
    return Diagnosis(timing, evaluation, tuple(reads), tuple(hot), busy, tuple(found), tuple(trials))


# Measuring


def time_steps(piece: Piece, *, budget_s: float, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Typical step, rates, memory and what timing costs, from as many steps as the budget holds."""
    with watched(piece.device) as memory:
        look = Steps(2, device=piece.device, warm_up=piece.warm_up, clock=clock)
        piece.train(look)
    count = min(max(int(budget_s * look.steps_per_s), LEAST_STEPS), MOST_STEPS)
    watch = nvtx_ranges() if piece.device.type == "cuda" else None  # nsys then shows the sections
    timer = StepRecorder(piece.device, every=2, clock=clock, watch=watch)
    run = Steps(count, device=piece.device, timer=timer, warm_up=piece.warm_up, clock=clock)
    piece.train(run)

    splits = {2 * i: split for i, split in enumerate(timer.splits()) if 2 * i >= piece.warm_up}
    usual = [split for i, split in splits.items() if not run.due[i]] or list(splits.values())
    typical = TimeSplit(
        len(usual), {name: statistics.median(split.seconds[name] for split in usual) for name in SECTIONS}
    )
    timed = [seconds for i, seconds in run.step_seconds() if i % 2 == 0]
    untimed = [seconds for i, seconds in run.step_seconds() if i % 2]
    by_turns = statistics.median(timed) / max(statistics.median(untimed), 1e-9) - 1 if timed and untimed else 0.0
    hooks_s = hooks_cost(StepTimer(piece.device, watch=watch))
    return Timing(
        typical=typical,
        samples_per_s=run.samples_per_s,
        steps_per_s=run.steps_per_s,
        samples_per_step=statistics.median(run.samples),
        memory=memory(),
        overhead=Overhead(hooks_s, hooks_s / max(typical.total, 1e-9), by_turns),
    )


def hooks_cost(timer: StepTimer, *, steps: int = 200) -> float:
    """Seconds that the marks of one step cost the host, measured alone."""
    elapsed_s = []
    for _ in range(steps):
        begin = time.perf_counter()
        timer.start()
        for name in SECTIONS[:-2]:
            timer.mark(name)
        timer.finish()
        elapsed_s.append(time.perf_counter() - begin)
    timer.summary()
    return statistics.median(elapsed_s)


class _Enough(Exception):
    """The time for an evaluation is over."""


def time_evaluation(
    piece: Piece, timing: Timing, *, budget_s: float, clock: Callable[[], float] = time.perf_counter
) -> Evaluation:
    """What a validation takes, extrapolated where the budget does not hold a whole one."""
    begin, reached = clock(), 0

    def on_units(done: int) -> None:
        nonlocal reached
        reached = done
        if clock() - begin > budget_s and done < piece.evaluated:
            raise _Enough

    with contextlib.suppress(_Enough):
        piece.evaluate(on_units)
        reached = piece.evaluated
    seconds = (clock() - begin) * piece.evaluated / max(reached, 1)
    epochs_s = piece.eval_every * piece.steps_per_epoch / max(timing.steps_per_s, 1e-9)
    return Evaluation(seconds, reached >= piece.evaluated, seconds / max(seconds + epochs_s, 1e-9))


def find_reads(piece: Piece) -> tuple[list[HostRead], bool]:
    """The lines that make the host wait in steps where nothing is due, and whether something was due in all of them."""
    reads = HostReads(piece.device, [*piece.model.parameters(), *piece.model.buffers()])
    timer = StepRecorder(piece.device, watch=reads)
    with reads:
        piece.train(
            Steps(
                WATCHED_STEPS,
                device=piece.device,
                timer=timer,
                warm_up=piece.warm_up,
                on_step=lambda note: reads.end_of_step(note is not None),
            )
        )
    return reads.found(), reads.always_due


def find_hot(piece: Piece, *, clock: Callable[[], float] = time.perf_counter) -> list[HotFunction]:
    """The functions that the input spends its time in, the hottest first."""
    hot = HotFunctions(clock=clock)
    timer = StepRecorder(piece.device, watch=hot)
    piece.train(Steps(WATCHED_STEPS, device=piece.device, timer=timer, warm_up=piece.warm_up))
    return hot.found()


def traced(piece: Piece, path: Path | None) -> float | None:
    """The seconds a step in which the device computes or copies, None on a CPU; writes a Chrome trace to `path`.

    Its ranges have the names of the sections, as have those that nsys records of the timed steps.
    """
    from torch.profiler import ProfilerActivity, profile

    piece.train(Steps(1, device=piece.device, warm_up=piece.warm_up))  # the profiler sees no first touches
    on_cuda = piece.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        timer = StepRecorder(piece.device, watch=profiler_ranges())
        run = Steps(TRACED_STEPS, device=piece.device, timer=timer, warm_up=max(piece.warm_up, 2))
        piece.train(run)
    if path is not None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        profiler.export_chrome_trace(str(temporary))
        replace(temporary, path)
    if not on_cuda:
        return None
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and event.name not in SECTIONS
    ]
    return covered(spans) / 1e6 / len(run.samples)  # its times are microseconds


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much time lies in at least one of the spans."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# Judging


def findings(
    split: TimeSplit,
    *,
    hot: Sequence[HotFunction] = (),
    reads: Sequence[HostRead] = (),
    always_due: bool = False,
    evaluation_share: float = 0.0,
    busy: float | None = None,
    samples_per_step: float = 0.0,
    on_cuda: bool = False,
) -> list[Finding]:
    """What limits a run with these typical steps, the bottleneck first; never empty.

    An input that rules the step comes first, then waits that have no reason, then the sections by their shares; a run
    without any of them is bound by its computation.
    """
    shares = split.shares()
    training = 1 - evaluation_share  # of an epoch: what the sections are shares of
    found = []
    input_finding = _input_finding(shares["data_wait"], hot, samples_per_step)
    if shares["data_wait"] >= INPUT_RULES:
        found.append(input_finding)
    found += [_read_finding(read, on_cuda) for read in reads if read.per_step >= 0.5]
    if always_due:
        found.append(
            Finding(
                "due",
                f"something is due in every step, so that the host waits for the device in every step{_free(on_cuda)}",
                "Log less often: --log-every 50",
            )
        )
    by_share = []
    if INPUT_COUNTS <= shares["data_wait"] < INPUT_RULES:
        by_share.append((training * shares["data_wait"], input_finding))
    for name, least, text, remedy in (
        (
            "copy",
            COPY_COUNTS,
            "copying batches to the device",
            "Send smaller types (ids as int32), or draw on the device what can be drawn there",
        ),
        ("sync", SYNC_COUNTS, "waiting for the device or for other processes", "Log less often: --log-every 50"),
        (
            "optimizer",
            OPTIMIZER_COUNTS,
            "the optimizer, whose cost does not depend on the batch",
            "A larger batch has fewer steps a sample (the learning rate may need retuning)",
        ),
        (
            "other",
            OTHER_COUNTS,
            "Python between the sections",
            "Look at a trace (--trace FILE) for what runs between the sections",
        ),
    ):
        if shares[name] >= least:
            text = f"{text} takes {shares[name]:.0%} of the step"
            by_share.append((training * shares[name], Finding(name, text, remedy)))
    if evaluation_share >= EVALUATION_COUNTS:
        text = f"validation takes {evaluation_share:.0%} of an epoch"
        by_share.append((evaluation_share, Finding("evaluation", text, "Validate less often: --eval-every 5")))
    compute = shares["forward"] + shares["backward"]
    if busy is not None and busy < BUSY and shares["data_wait"] < INPUT_RULES:
        text = f"the device computes only {busy:.0%} of the time: the host starts its work too slowly"
        remedy = "More work a step (a larger batch), or fewer and larger kernels (--compile default)"
        by_share.append((training * (1 - busy), Finding("launch", text, remedy)))
    elif compute >= COMPUTE_RULES or not (found or by_share):
        by_share.append((training * compute, _compute_finding(compute)))
    by_share.sort(key=lambda pair: pair[0], reverse=True)
    return found + [finding for _, finding in by_share]


def _compute_finding(share: float) -> Finding:
    return Finding(
        "compute",
        f"this run is compute-bound: {share:.0%} of the step is forward and backward",
        "Only a smaller model, a larger batch, another precision or another device helps",
    )


def _input_finding(share: float, hot: Sequence[HotFunction], samples_per_step: float) -> Finding:
    if not hot:
        return Finding("input", f"the input takes {share:.0%} of the step", "Look for it in a trace (--trace FILE)")
    hottest = hot[0]
    text = (
        f"the input: {hottest.place} takes {share * hottest.share:.0%} of the step (the input in all {share:.0%}), "
        f"with {hottest.calls_per_step:,.0f} calls of functions a step"
    )
    if hottest.calls_per_step >= samples_per_step > 0:
        remedy = (
            "That is a loop over samples in Python: use operations on whole tensors instead, or do it once before "
            "training"
        )
    else:
        remedy = "Do it once before training, with operations on whole tensors, or in worker processes beside the step"
    return Finding("input", text, remedy)


def _read_finding(read: HostRead, on_cuda: bool) -> Finding:
    return Finding(
        "reads",
        f"the host waits for the device {read.per_step:g} times a step: {read.place} {read.what}{_free(on_cuda)}",
        "Keep the value on the device, and read it when something is due (--log-every)",
    )


def _free(on_cuda: bool) -> str:
    return "" if on_cuda else " (free on this CPU; on a GPU its queue runs empty each time)"


# Saying


def timing_lines(timing: Timing, evaluation: Evaluation, piece: Piece, *, unit: str) -> list[str]:
    """The time split with its rates, memory and overhead, as lines."""
    typical, overhead = timing.typical, timing.overhead
    lines = [
        f"{timing.samples_per_s:,.0f} {unit}/s, {timing.steps_per_s:.4g} steps/s, evaluation not included; "
        f"a typical step of {timing.samples_per_step:,.0f} {unit} (median of {typical.steps}):"
    ]
    for name, share in typical.shares().items():
        lines.append(f"  {name:<10}{1e3 * typical.seconds[name]:>10.2f} ms{share:>7.1%}  {'#' * round(40 * share)}")
    about = "" if evaluation.is_whole else "about "
    lines.append(
        f"  evaluation {about}{evaluation.seconds:,.2f} s, once in {piece.eval_every} x {piece.steps_per_epoch:,} "
        f"steps: {evaluation.share:.0%} of that time"
    )
    lines.append(f"Memory that a step needs: {_memory_text(timing.memory, piece.device)}")
    lines.append(
        f"Timing a step costs {1e6 * overhead.hooks_s:.1f} us of its {1e3 * typical.total:.2f} ms "
        f"({overhead.share:.2%}); timed against untimed steps, by turns: {overhead.by_turns:+.1%}, noise included"
    )
    return lines


def _memory_text(memory: Memory, device: torch.device) -> str:
    parts = []
    if memory.host_bytes is not None:
        parts.append(f"host {memory.host_bytes / 2**20:,.0f} MiB")
    if memory.device_bytes is not None:
        peak, whole = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
        parts.append(
            f"device {memory.device_bytes / 2**20:,.0f} MiB (in all {peak / 2**30:.2f} of {whole / 2**30:.2f} GiB)"
        )
    return ", ".join(parts) or "this system does not tell"


def trial_lines(trials: Sequence[Trial], command: Callable[[Trial], str]) -> list[str]:
    """Recommendations by measured gain as command lines, then what brought nothing and what could not be tried."""
    gains = [trial for trial in trials if trial.is_gain]
    lines = []
    if gains:
        lines.append("Faster here, measured by turns against the present configuration:")
    for trial in gains[:MOST_RECOMMENDED]:
        assert trial.gain is not None
        candidate = trial.candidate
        changes = f"changes {candidate.changes}" if candidate.changes else "the same result"
        lines.append(
            f"  {candidate.flags}: {trial.gain.median:.2f}x here ({trial.gain.low:.2f} .. {trial.gain.high:.2f}); "
            f"{candidate.reason}; {changes}"
        )
        lines.append(f"    {command(trial)}")
    without = [
        f"{trial.candidate.flags} ({trial.gain.median:.2f}x)"
        for trial in trials
        if trial.gain is not None and not trial.is_gain
    ]
    if without:
        lines.append(f"No gain here (less than {1 + NOISE:.2f}x, or not every time): {', '.join(without)}")
    for fault in dict.fromkeys(trial.fault for trial in trials if trial.gain is None):
        lines.append(f"Not measured: {', '.join(t.candidate.flags for t in trials if t.fault == fault)}: {fault}")
    if not trials:
        lines.append("There is nothing to try: no flag of this configuration is known to make it faster")
    return lines


# The machine


def environment(device: torch.device) -> list[str]:
    """Versions, device, and who else uses the machine: what to look at first where a run is slow."""
    machine = describe_machine()
    lines = [
        f"torch {machine['torch']}, Python {machine['python']}, {machine['os']}",
        f"{machine['cpu']}: {machine['cores']} cores, {machine['threads']} threads for torch{_load_text()}",
    ]
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        others = whole - free - torch.cuda.memory_reserved(device)
        lines.append(
            f"{torch.cuda.get_device_name(device)}, built for CUDA {torch.version.cuda}, driver {_driver_text()}, "
            f"cuDNN {_cudnn_text()}; {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free "
            f"({others / 2**30:.1f} GiB are the context's and other processes')"
        )
        lines += _other_processes(device)
    elif torch.version.cuda is None:
        lines.append("CPU: this torch was built without CUDA; with a GPU, install a CUDA build of torch")
    else:
        lines.append(f"CPU: asked for, or no GPU that CUDA {torch.version.cuda} can use; compare `nvidia-smi`")
    return lines


def _load_text() -> str:
    """How busy the machine is besides; empty where the system does not tell."""
    if not hasattr(os, "getloadavg"):
        return ""
    load = os.getloadavg()[0]
    others = "; others are computing here, which makes every figure worse" if load > (os.cpu_count() or 1) else ""
    return f", load {load:.1f}{others}"


def _nvidia_smi(query: str) -> list[str]:
    """The lines that nvidia-smi answers; none where it is not there."""
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _driver_text() -> str:
    return next(iter(_nvidia_smi("--query-gpu=driver_version")), "unknown (no nvidia-smi)")


def _cudnn_text() -> str:
    return str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]


def _other_processes(device: torch.device) -> list[str]:
    own = str(os.getpid())
    found = [line for line in _nvidia_smi("--query-compute-apps=pid,used_memory") if line.split(",")[0] != own]
    return [f"Other processes use the GPU (pid, memory): {'; '.join(found)}"] if found else []


# Runs of the past


def run_lines(path: Path, expected: Sequence[str] = ()) -> list[str]:
    """What a run folder, or a file in it, recorded about its speed, with findings; `expected`: lines of its train.log.

    Raises ValueError where nothing was recorded.
    """
    folder = path if path.is_dir() else path.parent
    metrics = folder / METRICS_NAME
    if not metrics.is_file():
        raise ValueError(f"{folder} has no {METRICS_NAME}; give the run folder that `train` printed, or a file in it")
    records = [record for record in read_metrics(metrics) if record.get("kind") == "train" and "time_forward" in record]
    if not records:
        raise ValueError(f"{metrics} holds no time split yet: the run ended before its second line of metrics")

    def typical(name: str) -> float:
        values = [record[name] for record in records if record.get(name) is not None]
        return statistics.median(values) if values else 0.0

    split = TimeSplit(len(records), {name: typical(f"time_{name}") for name in SECTIONS})
    lines = [
        f"{folder}: {len(records)} logged intervals up to step {records[-1]['step']:,}, medians: "
        f"{typical('samples_per_s'):,.0f} samples/s, {typical('steps_per_s'):.4g} steps/s, evaluation not included"
    ]
    lines += [f"  {name:<10}{share:>7.1%}  {'#' * round(40 * share)}" for name, share in split.shares().items()]
    found = findings(split)
    lines.append(f"Bottleneck: {found[0].line()}")
    lines += [f"Also: {finding.line()}" for finding in found[1:]]
    log = folder / LOG_NAME
    if expected:
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        for line in expected:
            lines.append(f"{log}: {'has' if line in text else 'LACKS'} the line {line!r}")
    return lines
