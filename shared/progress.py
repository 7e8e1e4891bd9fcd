"""How far a loop has come: a bar that redraws itself on a terminal, a plain line now and then elsewhere. ASCII only.

Nothing here runs in a second thread and nothing asks the device for a number: the caller passes what it already has.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.errors import LiveError
from rich.live import Live
from rich.text import Text

PLAIN_EVERY_S = 10.0  # between two lines where there is no terminal; a loop that is shorter prints nothing
_BAR_WIDTH = 24


class Bar:
    """A context manager that shows the progress of a loop as long as it calls advance().

    done is where the loop starts, for an epoch that is resumed in its middle; the rate counts only what came after it.
    """

    def __init__(
        self,
        *,
        total: int,
        description: str,
        unit: str = "steps",
        done: int = 0,
        every_s: float = 0.5,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.done = done
        self._first = done
        self._description = _ascii(description)
        self._unit = unit
        self._note = ""
        self._clock = clock
        self._console = Console(stderr=True) if console is None else console
        self._live: Live | None = None
        self._every_s = every_s
        self._start_s = 0.0
        self._due_s = 0.0
        self._has_printed = False

    def __enter__(self) -> Self:
        self._start_s = self._clock()
        self._live = _start_live(self._console)
        if self._live is None:
            self._every_s = max(self._every_s, PLAIN_EVERY_S)
        else:
            self._show()
        self._due_s = self._start_s + self._every_s
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._show()
            self._live.stop()
            self._live = None
        elif self._has_printed:
            self._show()

    def advance(self, n: int = 1) -> None:
        """Count n units; draw where the last drawing is long enough ago. Costs one look at the clock."""
        self.done += n
        now_s = self._clock()
        if now_s >= self._due_s:
            self._due_s = now_s + self._every_s
            self._show()

    def reach(self, done: int) -> None:
        """Say how many units are done in all; for loops that count them themselves."""
        self.advance(done - self.done)

    def note(self, text: str) -> None:
        """Set the words behind the bar, shown from the next drawing on; made from numbers the host has already."""
        self._note = _ascii(text)

    def line(self) -> str:
        """Return the progress in words: "train 120/480 25% 14.2 steps/s eta 0:00:25 loss 5.31"."""
        elapsed_s = self._clock() - self._start_s
        counted = self.done - self._first
        percent = 100 * self.done // self.total if self.total else 100
        rate, eta = "-", "-"
        if counted > 0 and elapsed_s > 0:
            rate = _number(counted / elapsed_s)
            eta = _duration(max(self.total - self.done, 0) * elapsed_s / counted)
        words = f"{self._description} {self.done}/{self.total} {percent}% {rate} {self._unit}/s eta {eta} {self._note}"
        return words.rstrip()

    def _show(self) -> None:
        if self._live is not None:
            filled = min(_BAR_WIDTH * self.done // self.total, _BAR_WIDTH) if self.total else _BAR_WIDTH
            bar = "[" + "#" * filled + "-" * (_BAR_WIDTH - filled) + "] "
            self._live.update(Text(bar + self.line(), no_wrap=True, overflow="crop"), refresh=True)
        else:
            self._has_printed = True
            self._console.print(Text(self.line()), soft_wrap=True)


def _start_live(console: Console) -> Live | None:
    """Return a started one-line display, None where the console is no terminal or shows another bar already."""
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    live = Live(
        console=console,
        auto_refresh=False,
        vertical_overflow="crop",
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # what is piped to a file stays in the file
    )
    try:
        live.start()
    except LiveError:
        return None
    return live


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")


def _number(rate: float) -> str:
    """Return a rate with three digits that matter, and no exponent."""
    if rate >= 100:
        return f"{rate:,.0f}"
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
