"""What a person sees of a loop, on a terminal and in a log file; the clock is a list of numbers."""

import io
import threading

import pytest
from rich.console import Console

from shared.progress import PLAIN_EVERY_S, Bar


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=False, width=20), file


def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Console, io.StringIO]:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    return Console(file=file, force_terminal=True, force_jupyter=False, legacy_windows=False, width=100), file


def steps(bar: Bar, clock: Clock, count: int, *, each_s: float) -> None:
    for _ in range(count):
        clock.now_s += each_s
        bar.advance()


def test_plain_line_every_ten_seconds_with_count_rate_and_remaining_time() -> None:
    clock = Clock()
    console, file = plain()
    with Bar(total=480, description="epoch 1", console=console, clock=clock) as bar:
        bar.note("loss 5.31")
        steps(bar, clock, 480, each_s=0.125)
    lines = file.getvalue().splitlines()
    assert lines[0] == "epoch 1 80/480 16% 8.00 steps/s eta 0:00:50 loss 5.31"
    assert [int(line.split()[2].split("/")[0]) for line in lines] == [80, 160, 240, 320, 400, 480, 480]
    assert lines[-1] == "epoch 1 480/480 100% 8.00 steps/s eta 0:00:00 loss 5.31"


def test_loop_shorter_than_the_first_interval_prints_nothing() -> None:
    clock = Clock()
    console, file = plain()
    with Bar(total=10, description="tiny", console=console, clock=clock) as bar:
        steps(bar, clock, 10, each_s=PLAIN_EVERY_S / 10 - 0.01)
    assert file.getvalue() == ""


def test_long_line_is_not_wrapped_in_a_log_file() -> None:
    clock = Clock()
    console, file = plain()
    with Bar(total=2, description="a long description", console=console, clock=clock) as bar:
        bar.note("recall 0.1 " * 20)
        steps(bar, clock, 1, each_s=PLAIN_EVERY_S)
    assert len(set(file.getvalue().splitlines())) == 1


def test_rate_of_a_resumed_epoch_counts_only_what_was_done_now() -> None:
    clock = Clock()
    console, _ = plain()
    with Bar(total=100, done=50, description="epoch", unit="batches", console=console, clock=clock) as bar:
        assert bar.line() == "epoch 50/100 50% - batches/s eta -"
        steps(bar, clock, 10, each_s=2.0)
        assert bar.line() == "epoch 60/100 60% 0.50 batches/s eta 0:01:20"


def test_units_may_be_counted_many_at_a_time() -> None:
    clock = Clock()
    console, _ = plain()
    with Bar(total=100_000, description="users", unit="users", console=console, clock=clock) as bar:
        clock.now_s += 2.0
        bar.advance(5000)
        assert bar.line() == "users 5000/100000 5% 2,500 users/s eta 0:00:38"


def test_nothing_to_do_and_more_than_promised_are_no_error() -> None:
    clock = Clock()
    console, _ = plain()
    with Bar(total=0, description="none", console=console, clock=clock) as bar:
        assert bar.line() == "none 0/0 100% - steps/s eta -"
        steps(bar, clock, 2, each_s=1.0)
        assert bar.line().endswith("eta 0:00:00")


def test_terminal_bar_is_redrawn_by_time_and_not_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    console, file = terminal(monkeypatch)
    threads = threading.active_count()
    with Bar(total=100, description="train", every_s=0.5, console=console, clock=clock) as bar:
        steps(bar, clock, 100, each_s=0.0625)
        assert threading.active_count() == threads
    drawn = file.getvalue().count("train ")
    assert drawn == 1 + 12 + 1 + 1  # at the start, every 8 steps, at the end, once more by rich when it stops


def test_terminal_bar_shows_share_and_note_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    console, file = terminal(monkeypatch)
    with Bar(total=4, description="caf\xe9 [bold]", console=console, clock=clock) as bar:
        bar.note("loss 1.5 \u2713")
        steps(bar, clock, 2, each_s=1.0)
    text = file.getvalue()
    assert "[############------------] caf? [bold] 2/4 50% 1.00 steps/s eta 0:00:02 loss 1.5 ?" in text
    assert text.isascii()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_stream_that_knows_only_ascii_is_enough(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock()
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    console = Console(file=stream, force_terminal=is_terminal, legacy_windows=False, width=40)
    with Bar(total=3, description="train " * 20, console=console, clock=clock) as bar:
        steps(bar, clock, 3, each_s=PLAIN_EVERY_S)
    stream.seek(0)
    assert "train" in stream.read()


def test_two_bars_on_one_terminal_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    console, file = terminal(monkeypatch)
    with Bar(total=2, description="outer", console=console, clock=clock) as outer:
        with Bar(total=2, description="inner", console=console, clock=clock) as inner:
            steps(inner, clock, 2, each_s=PLAIN_EVERY_S)
        steps(outer, clock, 2, each_s=1.0)
    assert "inner 2/2" in file.getvalue()
    assert "outer 2/2" in file.getvalue()


def test_terminal_is_given_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), Bar(total=2, description="train", console=console, clock=Clock()):
        raise ZeroDivisionError
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is shown again


def test_a_loop_may_say_how_far_it_is_in_all() -> None:
    with Bar(total=10, description="rank", unit="users", console=Console(file=io.StringIO())) as bar:
        bar.reach(4)
        bar.reach(9)
    assert bar.done == 9
