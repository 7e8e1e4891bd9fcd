"""shared.log: what is written, what is held back, what a resume cuts, and how signals ask to stop."""

import json
import os
import signal
import sys
import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest

from shared.log import RunLog, StopSignal, due, read_metrics

NOON = datetime(2024, 5, 6, 12, 0, 0, 987654, tzinfo=timezone(timedelta(hours=2)))


class Clock:
    """A clock that shows what the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def open_log(run_dir, said=None, **options):
    """A RunLog whose lines go to the list `said` and whose local time is always noon."""
    lines = [] if said is None else said
    return RunLog(run_dir, say=lines.append, now=lambda: NOON, **options)


def metrics_text(run_dir) -> str:
    return str((run_dir / "metrics.jsonl").read_text(encoding="utf-8"))


@pytest.mark.parametrize("every", [-1, 0, 1, 3, 10])
def test_due_steps_are_the_multiples_counted_from_one(every):
    multiples = set(range(every, 31, every)) if every > 0 else set()
    assert {step for step in range(31) if due(step, every)} == multiples


def test_lines_reach_the_user_and_the_file_with_local_time(tmp_path):
    said: list[str] = []
    with open_log(tmp_path / "new" / "run", said) as log:
        log.info("hello \u00fc")
        log.warn("careful")
        on_disk = (tmp_path / "new" / "run" / "train.log").read_bytes()  # before close: line-buffered
    assert said == ["hello \u00fc", "warning: careful"]
    assert on_disk.decode("utf-8") == (
        "2024-05-06 12:00:00+02:00 hello \u00fc\n2024-05-06 12:00:00+02:00 warning: careful\n"
    )


def test_a_file_name_that_is_not_valid_text_can_be_logged(tmp_path):
    with open_log(tmp_path) as log:
        log.info("reading bad\udcff.txt")
    assert "reading bad\\udcff.txt" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_train_log_of_a_resumed_run_is_appended(tmp_path):
    for word in ("first", "second"):
        with open_log(tmp_path) as log:
            log.info(word)
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_limited_lines_pass_once_per_interval_and_say_how_many_did_not(tmp_path):
    said: list[str] = []
    clock = Clock()
    with open_log(tmp_path, said, clock=clock) as log:
        for second in range(38):
            clock.now = float(second)
            log.limited("slow", f"slow step {second}", every_s=18.0)
    assert said == [
        "slow step 0",
        "slow step 18 (+17 similar lines suppressed)",
        "slow step 36 (+17 similar lines suppressed)",
        "slow: 1 similar line suppressed since the last one shown",
    ]


def test_limited_keys_do_not_hold_each_other_back(tmp_path):
    said: list[str] = []
    with open_log(tmp_path, said, clock=Clock()) as log:
        for key in ("a", "b", "a"):
            log.limited(key, key)
        log.info("a")
    assert said == ["a", "b", "a", "a: 1 similar line suppressed since the last one shown"]


def test_closing_twice_says_suppressed_counts_once(tmp_path):
    said: list[str] = []
    log = open_log(tmp_path, said, clock=Clock())
    log.limited("k", "x")
    log.limited("k", "x")
    log.close()
    log.close()
    assert len(said) == 2


def test_metrics_are_one_object_a_line_in_order_and_already_on_disk(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics("train", 3, 1, {"loss": 0.1, "lr": 1e-05, "ok": True, "note": "a\nb", "none": None, "n": 7})
        text = metrics_text(tmp_path)
    assert text == (
        '{"kind": "train", "step": 3, "epoch": 1, "time": "2024-05-06T12:00:00+02:00", '
        '"loss": 0.1, "lr": 1e-05, "ok": true, "note": "a\\nb", "none": null, "n": 7}\n'
    )


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with open_log(tmp_path) as log:
        log.metrics("train", 1, 0, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert [record[name] for name in "abcd"] == [None, None, None, 0.5]


def test_a_metric_may_not_take_the_name_of_a_records_own_key(tmp_path):
    with open_log(tmp_path) as log, pytest.raises(ValueError, match="cannot be called 'epoch'"):
        log.metrics("train", 1, 0, {"epoch": 2})


def write_steps(log, steps) -> None:
    for step in steps:
        log.metrics("train", step, step // 4, {"loss": 1.0 / step})
        if step % 4 == 0:
            log.metrics("valid", step, step // 4, {"NDCG@10": step / 100})


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "ste', '{"kind": "train", "step": 12, "epoch": 3}', "\0\0\0"])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path, torn):
    with open_log(tmp_path / "whole") as log:
        write_steps(log, range(1, 16))
    with open_log(tmp_path / "killed") as log:
        write_steps(log, range(1, 12))
    with open(tmp_path / "killed" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(torn)
    with open_log(tmp_path / "killed", resume_step=8) as log:
        write_steps(log, range(9, 16))
    assert metrics_text(tmp_path / "killed") == metrics_text(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["metrics.jsonl", "train.log"]


def test_reopening_without_a_resume_step_drops_only_a_torn_line(tmp_path):
    with open_log(tmp_path) as log:
        write_steps(log, range(1, 4))
    whole = metrics_text(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(whole + '{"kind": "tr', encoding="utf-8", newline="\n")
    with open_log(tmp_path) as log:
        log.metrics("test", 3, 0, {"HR@10": 0.5})
    assert metrics_text(tmp_path).startswith(whole + '{"kind": "test", "step": 3')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_what_a_resumed_run_measures_again_at_its_first_step_is_not_written_twice(tmp_path):
    with open_log(tmp_path) as log:
        write_steps(log, range(1, 11))
    before = metrics_text(tmp_path).splitlines()
    with open_log(tmp_path, resume_step=8) as log:
        log.metrics("valid", 8, 2, {"NDCG@10": 0.75})
        log.metrics("train", 8, 2, {"loss": 0.75})
        log.metrics("norm", 8, 2, {"grad_norm": 1.0})  # another kind at that step
        log.metrics("train", 9, 2, {"loss": 0.5})  # was there, but cut
    lines = metrics_text(tmp_path).splitlines()
    assert lines[:-2] == before[:-2]
    assert [(json.loads(line)["kind"], json.loads(line)["step"]) for line in lines[-2:]] == [("norm", 8), ("train", 9)]
    assert json.loads(lines[-1])["loss"] == 0.5


def test_a_record_repeated_by_the_same_run_is_written_each_time(tmp_path):
    with open_log(tmp_path) as log:
        for value in (0.1, 0.2):
            log.metrics("train", 1, 0, {"loss": value})
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0.1, 0.2]


def test_foreign_records_do_not_stand_in_the_way_of_a_resume(tmp_path):
    foreign = '{"kind": ["train"], "step": 1}\n{"step": 1}\n{"kind": "train", "step": null}\n'
    (tmp_path / "metrics.jsonl").write_text(foreign, encoding="utf-8", newline="\n")
    with open_log(tmp_path, resume_step=1) as log:
        log.metrics("train", 1, 0, {"loss": 0.5})
    assert metrics_text(tmp_path).startswith(foreign + '{"kind": "train", "step": 1')


def test_a_whole_last_record_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}', encoding="utf-8", newline="\n")
    with open_log(tmp_path, resume_step=5):
        pass
    assert metrics_text(tmp_path) == '{"step": 1}\n{"step": 2}\n'


def test_reading_ignores_a_torn_last_line_at_every_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "x": 0.25}) + "\n" for step in (1, 2)]
    text = "".join(lines)
    for cut in range(len(text) + 1):
        path.write_text(text[:cut], encoding="utf-8", newline="\n")
        whole = sum(cut >= len("".join(lines[:count])) - 1 for count in (1, 2))  # the newline itself may be missing
        assert [record["step"] for record in read_metrics(path)] == [1, 2][:whole]


@pytest.mark.parametrize("bad", ["{oops", "[1, 2]", ""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n', encoding="utf-8", newline="\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected one JSON object, found .*; remove that line"):
        read_metrics(path)


def test_missing_tensorboard_is_named_with_the_repair(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install tensorboard .*`board`"):
        open_log(tmp_path, tensorboard=True)


def test_tensorboard_gets_numbers_under_kind_and_name_and_forgets_later_steps(tmp_path, monkeypatch):
    calls: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, log_dir, purge_step=None):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def close(self):
            calls.append(("close",))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with open_log(tmp_path, tensorboard=True, resume_step=6) as log:
        log.metrics("train", 7, 0, {"loss": 0.5, "bad": float("nan"), "word": "x", "flag": True, "count": 3})
    assert calls == [
        ("open", str(tmp_path / "tb"), 7),
        ("train/loss", 0.5, 7),
        ("train/count", 3, 7),
        ("close",),
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request_and_says_so_once(number, code):
    said: list[str] = []
    with StopSignal(said.append) as stop:
        assert (stop.requested, stop.exit_code) == (None, 0)
        signal.raise_signal(number)
        assert (stop.requested, stop.exit_code) == (number, code)
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, stop.exit_code) == (number, code)
    assert said == [f"{number.name}: stopping after this step; press Ctrl+C again to stop at once"]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_a_request_stops_at_once(first):
    with StopSignal(print):
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_handlers_from_before_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal(print):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_ctrl_break_is_a_request_where_there_is_one(monkeypatch):
    number = signal.SIGTERM if sys.platform == "win32" else signal.SIGUSR1
    monkeypatch.setattr(signal, "SIGBREAK", number, raising=False)
    before = signal.getsignal(number)
    with StopSignal(print) as stop:
        assert signal.getsignal(number) != before
        signal.raise_signal(number)
        assert stop.requested is number
    assert signal.getsignal(number) == before


def test_outside_the_main_thread_no_handler_is_installed():
    seen = []

    def work() -> None:
        with StopSignal(print) as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.requested))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_a_signal_during_a_write_still_becomes_a_request(capfd, monkeypatch):
    def reentrant(line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with os.fdopen(os.dup(2), "w") as stderr:
        monkeypatch.setattr(sys, "__stderr__", stderr)
        with StopSignal(reentrant) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.requested is signal.SIGTERM
    assert "SIGTERM: stopping after this step" in capfd.readouterr().err
