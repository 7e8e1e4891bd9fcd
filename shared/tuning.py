"""The fastest batch size, micro-batches or workers on this machine: tried in turn, verified, remembered, never applied.

Each knob is turned upwards until a value brings no gain or does not fit, or downwards where upwards brings none. Every
value is compared by turns with the best so far. The answer is a command line; a later call shows it again.
"""

import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from shared.config import Resolved, as_dict
from shared.device import describe_machine
from shared.files import atomic_write_text
from shared.ladder import Memory, Spread
from shared.trials import (
    LEAST_S,
    Candidate,
    CannotRunError,
    Dial,
    Piece,
    Subject,
    Trial,
    changed,
    compare,
    open_warm,
    train_command,
    tried,
)

C = TypeVar("C")

BUDGET_S = 120.0
VERIFY_SHARE = 0.25  # of the budget, for the answer against the present configuration
COMPARISONS = 8  # that the rest is meant for; what the first ones leave over is not used up

_MEMINFO = Path("/proc/meminfo")


def tune(
    subject: Subject[C],
    resolved: Resolved[C],
    *,
    folder: Path,
    say: Callable[[str], None],
    limit_mib: int = 0,
    budget_s: float = BUDGET_S,
    again: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
) -> dict[str, Any]:
    """The answer for this configuration, data and machine, said line by line and kept in a file of `folder`.

    An answer of before is only shown, unless `again`.
    """
    machine = describe_machine()
    path = folder / f"tuned-{_digest(machine)}.json"
    key = _digest([as_dict(resolved.config), subject.data, limit_mib])
    answers = _remembered(path)
    if key in answers and not again:
        answer = answers[key]
        say(f"Found on {answer['when']}, remembered in {path}; measure it again with --again:")
        for line in _answer_lines(answer):
            say(line)
        return answer

    begin, config = clock(), resolved.config
    with tried():
        present = subject.open(config)
    limit_bytes = (limit_mib << 20) or _default_limit(present.device)
    say(f"Memory limit: {_mib(limit_bytes)}" if limit_bytes else "Memory limit: what the device has")
    best: dict[str, Any] = {}
    best_piece = present
    changes: list[str] = []
    each_s = (1 - VERIFY_SHARE) * budget_s / COMPARISONS

    def beats(dial: Dial, value: Any) -> bool:
        """Whether this value is faster than the best so far, which it then becomes."""
        nonlocal best, best_piece
        left_s = (1 - VERIFY_SHARE) * budget_s - (clock() - begin)
        if left_s < LEAST_S:
            say(f"  --{dial.name.replace('_', '-')} {value}: not tried, no time left (--budget)")
            return False
        candidate = Candidate({**best, dial.name: value}, "", dial.changes)
        try:
            trial, piece, memory = _attempt(
                subject,
                candidate,
                config,
                best_piece,
                limit_bytes=limit_bytes,
                budget_s=min(each_s, left_s),
                clock=clock,
            )
        except CannotRunError as error:
            say(f"  {candidate.flags}: {error}")
            return False
        assert trial.gain is not None
        say(f"  {candidate.flags}: {_gain_text(trial.gain)} against the best so far, {_memory_text(memory)}")
        if trial.is_gain:
            best, best_piece = dict(candidate.values), piece
            if dial.changes and dial.changes not in changes:
                changes.append(dial.changes)
        return trial.is_gain

    for dial in subject.dials(config):
        for values in (dial.values, dial.down):
            if list(itertools.takewhile(functools.partial(beats, dial), values)):
                break

    answer = {"values": {}, "gain": None, "changes": ""}
    if best:
        candidate = Candidate(best, "")
        left_s = max(VERIFY_SHARE * budget_s, budget_s - (clock() - begin))
        trial = compare(candidate, present, best_piece, budget_s=left_s, clock=clock)
        assert trial.gain is not None
        say(f"Verified by a longer run, by turns against the present configuration: {_gain_text(trial.gain)}")
        if trial.is_gain:
            answer = {"values": best, "gain": list(trial.gain), "changes": "; ".join(changes)}
    answer |= {
        "command": train_command(subject.prog, resolved, answer["values"]),
        "when": now().isoformat(sep=" ", timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "answers": {**answers, key: answer}}, indent=2, allow_nan=False)
    atomic_write_text(path, text + "\n")
    for line in _answer_lines(answer):
        say(line)
    say(f"Remembered in {path}; `train` never applies it by itself")
    return answer


def _attempt(
    subject: Subject[C],
    candidate: Candidate,
    config: C,
    best: Piece,
    *,
    limit_bytes: int,
    budget_s: float,
    clock: Callable[[], float],
) -> tuple[Trial, Piece, Memory]:
    """The candidate against the best so far; raises CannotRunError where it does not fit."""
    begin = clock()
    with tried():
        piece, memory = open_warm(lambda: subject.open(changed(config, candidate.values)), best.device)
        needed = _needed(memory)
        if limit_bytes and needed is not None and needed > limit_bytes:
            raise CannotRunError(f"takes {_mib(needed)}, more than the limit of {_mib(limit_bytes)}")
        return compare(candidate, best, piece, budget_s=budget_s - (clock() - begin), clock=clock), piece, memory


def _needed(memory: Memory) -> int | None:
    return memory.host_bytes if memory.device_bytes is None else memory.device_bytes


def _default_limit(device: torch.device) -> int:
    """Half of the host's free memory, as a value may need twice that of the one before; 0: a device refuses itself."""
    if device.type == "cuda" or not _MEMINFO.is_file():
        return 0
    lines = _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
    free = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(free[0][1]) * 1024 // 2 if free else 0


def _remembered(path: Path) -> dict[str, Any]:
    """The answers in the file; none where there is no file, or one of which nothing can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    answers = found.get("answers") if isinstance(found, dict) else None
    return answers if isinstance(answers, dict) else {}


def _answer_lines(answer: dict[str, Any]) -> list[str]:
    if not answer["values"]:
        return ["The present settings are as fast as any that were tried:", f"  {answer['command']}"]
    changes = f"; changes {answer['changes']}" if answer["changes"] else ""
    return [f"Faster on this machine, {_gain_text(Spread(*answer['gain']))}{changes}:", f"  {answer['command']}"]


def _gain_text(gain: Spread) -> str:
    return f"{gain.median:.2f}x ({gain.low:.2f} .. {gain.high:.2f})"


def _memory_text(memory: Memory) -> str:
    needed = _needed(memory)
    return "memory unknown" if needed is None else _mib(needed)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
