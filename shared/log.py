"""What a run says and keeps: train.log, metrics.jsonl, TensorBoard when asked; and how it is asked to stop."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from shared.files import atomic_write_text, remove_stale_temporaries

MetricValue = float | int | str | bool | None

LOG_NAME = "train.log"
METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tb"

_OWN_KEYS = ("kind", "step", "epoch", "time")


def due(step: int, every: int) -> bool:
    """Whether what is done every `every` steps is done at `step`, counted from 1; never where `every` is 0 or less."""
    return every > 0 and step > 0 and step % every == 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; a last line torn by a killed process is left out.

    Raises ValueError with file and line where any other line is not a JSON object.
    """
    return [record for _, record in _read_lines(path)]


class RunLog:
    """The log of one run: lines to the user and train.log, numbers to metrics.jsonl and, if asked, TensorBoard."""

    def __init__(
        self,
        run_dir: Path,
        *,
        say: Callable[[str], None],
        tensorboard: bool = False,
        resume_step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        """Opens the files of `run_dir` for appending.

        With `resume_step` every record of a later step is removed first: the resumed run writes them again, and the
        file ends up as the uninterrupted run's, times apart. What the run measures again at the step it resumes from is
        not written twice. `say` shows a line to the user; `clock` counts seconds.
        """
        self._say = say
        self._clock = clock
        self._now = now
        self._limited: dict[str, _Limit] = {}
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(run_dir)  # of a process that was killed while it wrote one of the run's files
        self._tensorboard = _open_tensorboard(run_dir / TENSORBOARD_NAME, resume_step) if tensorboard else None
        metrics_path = run_dir / METRICS_NAME
        self._written_before = _cut_metrics(metrics_path, resume_step) if metrics_path.exists() else frozenset()
        # Line-buffered: a killed process loses at most the line it was writing. A file name need not be valid text.
        self._log_file = open(  # noqa: SIM115 - closed by close()
            run_dir / LOG_NAME, "a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n"
        )
        self._metrics_file = open(metrics_path, "a", buffering=1, encoding="utf-8", newline="\n")  # noqa: SIM115

    def info(self, msg: str) -> None:
        """Says a line, and writes it to train.log with the local time."""
        self._say(msg)
        self._log_file.write(f"{self._now().isoformat(sep=' ', timespec='seconds')} {msg}\n")

    def warn(self, msg: str) -> None:
        """Says a line that begins with "warning:", and writes it to train.log."""
        self.info(f"warning: {msg}")

    def limited(self, key: str, msg: str, every_s: float = 10.0) -> None:
        """Says the line, but only counts it where one of the same `key` was said in the last `every_s` seconds."""
        time_s = self._clock()
        last = self._limited.get(key)
        if last is not None and time_s - last.said_s < every_s:
            last.suppressed += 1
            return
        self._limited[key] = _Limit(said_s=time_s)
        missed = last.suppressed if last is not None else 0
        self.info(f"{msg} (+{_similar_lines(missed)} suppressed)" if missed else msg)

    def metrics(self, kind: str, step: int, epoch: int, values: Mapping[str, MetricValue]) -> None:
        """Appends one record to metrics.jsonl, flushed; a value that is not finite is written as null.

        Does nothing where the file held a record of this kind and step when it was opened.
        """
        taken = [name for name in _OWN_KEYS if name in values]
        if taken:
            raise ValueError(
                f"a metric cannot be called {taken[0]!r}: metrics.jsonl has its own {', '.join(_OWN_KEYS)}"
            )
        if (kind, step) in self._written_before:
            return
        finite = {name: None if _is_non_finite(value) else value for name, value in values.items()}
        time_text = self._now().isoformat(timespec="seconds")
        record = {"kind": kind, "step": step, "epoch": epoch, "time": time_text, **finite}
        self._metrics_file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            for name, value in finite.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Says what is still suppressed and closes the files; closing twice does no harm."""
        for key, limit in self._limited.items():
            if limit.suppressed:
                self.info(f"{key}: {_similar_lines(limit.suppressed)} suppressed since the last one shown")
        self._limited.clear()
        self._log_file.close()
        self._metrics_file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SilentLog(RunLog):
    """Says and keeps nothing: the log of every process but the first."""

    def __init__(self) -> None:
        pass

    def info(self, msg: str) -> None:
        pass

    def limited(self, key: str, msg: str, every_s: float = 10.0) -> None:
        pass

    def metrics(self, kind: str, step: int, epoch: int, values: Mapping[str, MetricValue]) -> None:
        pass

    def close(self) -> None:
        pass


class StopSignal:
    """Turns the first SIGINT, SIGTERM or Windows' SIGBREAK into a request that the loop asks for after each step.

    Use as a context manager. Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._old: dict[signal.Signals, Any] = {}
        self.requested: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """The shell's code for the signal (130 for SIGINT, 143 for SIGTERM), 0 where none came."""
        return 0 if self.requested is None else 128 + self.requested.value

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last is Ctrl+Break, which only Windows has
                number = getattr(signal, name, None)
                if number is not None:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            # None stands for a handler that was not set from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signal.Signals(number)
        line = f"{self.requested.name}: stopping after this step; press Ctrl+C again to stop at once"
        try:
            self._say(line)
        except RuntimeError:
            # The signal came in the middle of a write to the same stream, which Python refuses to enter twice.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{line}\n".encode())


@dataclass
class _Limit:
    """When a key was last said, and how many lines of it were held back since."""

    said_s: float
    suppressed: int = 0


def _similar_lines(count: int) -> str:
    return f"{count} similar line{'' if count == 1 else 's'}"


def _is_non_finite(value: MetricValue) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _read_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line of a metrics.jsonl with what it says, without a torn last one."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if not lines[-1]:
        lines.pop()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            kept.append((line, record))
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: expected one JSON object, found {line[:60]!r}; remove that line")
    return kept


def _cut_metrics(path: Path, resume_step: int | None) -> frozenset[tuple[str, int]]:
    """Removes, atomically, a torn last line and the records after `resume_step`; returns (kind, step) of the others."""
    kept = [
        (line, record)
        for line, record in _read_lines(path)
        if resume_step is None or not isinstance(record.get("step"), int) or record["step"] <= resume_step
    ]
    text = "".join(f"{line}\n" for line, _ in kept)
    if path.read_bytes() != text.encode("utf-8"):
        atomic_write_text(path, text)
    named = ((record.get("kind"), record.get("step")) for _, record in kept)
    return frozenset((kind, step) for kind, step in named if isinstance(kind, str) and isinstance(step, int))


def _open_tensorboard(folder: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "TensorBoard is asked for but not installed; pip install tensorboard (or this project's extra `board`), "
            "or switch it off"
        ) from error
    # purge_step hides what an interrupted run wrote after the checkpoint.
    return SummaryWriter(str(folder), purge_step=None if resume_step is None else resume_step + 1)
