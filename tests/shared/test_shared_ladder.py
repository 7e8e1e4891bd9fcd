"""shared.ladder: rungs take turns, every repeat is kept, words follow from the numbers; a fake clock tells the time."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import ladder as ladders
from shared.ladder import (
    FASTER,
    LARGEST_REPEAT,
    NO_GAIN,
    ORIGINAL,
    SLOWER,
    Epoch,
    Ladder,
    Measured,
    Memory,
    Part,
    Run,
    Rung,
    Spread,
    Switch,
    Unmeasured,
    Work,
    both_ways,
    chosen,
    endless,
    measure,
    plan_steps,
    project,
    record,
    rows_of,
    status_bytes,
    total_runs,
    verdict,
    watched,
    write_record,
)

CPU = torch.device("cpu")


class Bench:
    """A clock that moves only while a rung runs, and a diary of what ran."""

    def __init__(self) -> None:
        self.now = 100.0
        self.diary: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def rung(self, name: str, *step_s: float, samples: int = 10, claim: str = "", prepare_s: float = 0.0) -> Rung:
        """A rung whose runs cost step_s a step, in turn; the last one from then on."""

        def make() -> Run:
            self.now += prepare_s
            costs = list(step_s)

            def run(steps: int) -> Work:
                self.now += steps * (costs.pop(0) if len(costs) > 1 else costs[0])
                self.diary.append((name, steps))
                return Work(steps * samples, steps)

            return run

        return Rung(name, f"how {name} does it", make, claim)

    def measure(self, ladder: Ladder, budget_s: float, repeats: int = 5) -> tuple[Measured, ...]:
        return measure(ladder, device=CPU, budget_s=budget_s, repeats=repeats, clock=self.clock)


def part(*rungs: Rung, name: str = "alone", cumulative: bool = False) -> Part:
    return Part(name, f"the part {name}", "train", "pairs", rungs, cumulative)


def found_record(
    ladder: Ladder, measured: tuple[Measured, ...], *, demo: bool = True, epochs: int = 0
) -> dict[str, Any]:
    return record(
        ladder,
        measured,
        app="toy",
        data={"name": "toys", "demo": demo},
        device=CPU,
        command="python -m toy bench",
        git=None,
        budget_s=1.0,
        elapsed_s=2.0,
        project_epochs=epochs,
    )


def test_rungs_take_turns_forwards_and_backwards_after_warming_up():
    bench = Bench()
    names = ("a", "b", "c")
    bench.measure(Ladder((part(*(bench.rung(name, 1.0) for name in names)),)), 0.0, repeats=3)
    warm, turns = bench.diary[:6], bench.diary[6:]
    assert [name for name, _ in warm] == ["a", "a", "b", "b", "c", "c"]
    assert [name for name, _ in turns] == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_rates_are_the_median_and_the_extremes_of_the_timed_repeats():
    bench = Bench()
    step_s = [9.0, 9.0, 1.0, 2.0, 4.0, 5.0, 8.0]  # warm-up and calibration first: they must not count
    one = bench.rung("original", *step_s, samples=40)
    (measured,) = bench.measure(Ladder((part(one),)), 0.0)
    (row,) = measured.rows
    assert row.samples_per_s == Spread(10.0, 5.0, 40.0)
    assert row.steps_per_s == Spread(0.25, 0.125, 1.0)
    assert (row.factor, row.gain, row.verdict) == (None, None, ORIGINAL)


def test_a_factor_compares_repeats_of_the_same_round():
    rates = [[(10.0, 1.0), (20.0, 1.0), (40.0, 1.0)], [(30.0, 1.0), (40.0, 1.0), (60.0, 1.0)]]
    bench = Bench()
    rows = rows_of(part(bench.rung("original", 1.0), bench.rung("b", 1.0)), rates, [1, 1], [Memory(None, None)] * 2)
    assert rows[1].factor == Spread(2.0, 1.5, 3.0)


def test_samples_decide_a_factor_and_not_steps():
    bench = Bench()
    rungs = (bench.rung("original", 1.0, samples=10), bench.rung("large", 2.0, samples=100))
    (measured,) = bench.measure(Ladder((part(*rungs),)), 0.0)
    row = measured.rows[1]
    assert row.factor == Spread(5.0, 5.0, 5.0)
    assert row.steps_per_s.median == 0.5
    assert row.verdict == FASTER


def test_rungs_of_a_cumulative_part_are_judged_by_what_they_add():
    bench = Bench()
    rungs = (bench.rung("original", 4.0), bench.rung("good", 1.0), bench.rung("bad", 2.0))
    (measured,) = bench.measure(Ladder((part(*rungs, cumulative=True),)), 0.0)
    bad = measured.rows[2]
    assert bad.factor is not None
    assert bad.gain is not None
    assert (bad.factor.median, bad.gain.median, bad.verdict) == (2.0, 0.5, SLOWER)


@pytest.mark.parametrize(
    ("factor", "word"),
    [
        (Spread(1.5, 1.2, 1.8), FASTER),
        (Spread(1.5, 0.9, 1.8), NO_GAIN),  # one repeat says otherwise
        (Spread(1.02, 1.01, 1.04), NO_GAIN),  # too little to matter
        (Spread(1.0, 1.0, 1.0), NO_GAIN),
        (Spread(0.98, 0.97, 0.99), NO_GAIN),
        (Spread(0.8, 0.7, 1.1), NO_GAIN),
        (Spread(0.8, 0.7, 0.9), SLOWER),
    ],
)
def test_a_verdict_needs_all_repeats_and_more_than_noise(factor: Spread, word: str):
    assert verdict(factor) == word


def test_time_is_divided_equally_among_rungs():
    assert plan_steps([0.1, 0.2, 0.5], budget_s=15.0, repeats=5) == [10, 5, 2]


def test_a_rung_too_slow_for_its_share_gets_one_step_and_the_others_what_is_left():
    steps = plan_steps([2.0, 0.1, 0.1], budget_s=15.0, repeats=5)
    assert steps == [1, 5, 5]


def test_without_time_there_are_fewer_steps_and_never_fewer_repeats():
    bench = Bench()
    bench.measure(Ladder((part(bench.rung("original", 3.0), bench.rung("b", 1.0)),)), 0.0)
    assert bench.diary.count(("original", 1)) == bench.diary.count(("b", 1)) == 2 + 5


def test_work_that_takes_no_time_has_a_limit():
    assert plan_steps([0.0, 1e-9], budget_s=1e6, repeats=5) == [LARGEST_REPEAT] * 2


@pytest.mark.parametrize("budget_s", [30.0, 300.0])
def test_a_ladder_keeps_to_its_budget_with_preparation_and_several_parts(budget_s: float):
    bench = Bench()
    parts = [
        part(*(bench.rung(f"{name}{i}", 0.01 * (i + 1), prepare_s=0.5) for i in range(4)), name=name) for name in "xy"
    ]
    bench.measure(Ladder(tuple(parts)), budget_s)
    assert 0.9 * budget_s <= bench.now - 100.0 <= budget_s


def test_every_run_is_told():
    bench = Bench()
    ladder = Ladder((part(bench.rung("original", 1.0), bench.rung("b", 1.0)), part(bench.rung("original", 1.0))))
    told: list[str] = []
    measure(ladder, device=CPU, budget_s=0.0, clock=bench.clock, on_run=told.append)
    assert told == [name for name, _ in bench.diary]
    assert len(told) == total_runs(ladder)


def test_switches_are_measured_alone_and_on_top_of_each_other():
    made: list[frozenset[str]] = []

    def make(on: frozenset[str]) -> Run:
        made.append(on)
        return lambda steps: Work(steps, steps)

    switches = [Switch("a", "text a", "S0-1: 2x"), Switch("b", "text b", alone=False), Switch("c", "text c")]
    alone, cumulative = both_ways("as it was", switches, make, unit="pairs")
    for one in (alone, cumulative):
        for rung in one.rungs:
            rung.make()
    none = frozenset[str]()
    assert made == [none, {"a"}, {"c"}, none, {"a"}, {"a", "b"}, {"a", "b", "c"}]
    assert [rung.name for rung in cumulative.rungs] == ["original", "a", "b", "c"]
    assert (alone.cumulative, cumulative.cumulative) == (False, True)
    assert alone.rungs[1].claim == "S0-1: 2x"


def three_parts(bench: Bench) -> Ladder:
    def rungs(*names: str) -> tuple[Rung, ...]:
        return tuple(bench.rung(name, 1.0) for name in ("original", *names))

    return Ladder(
        (
            part(*rungs("a", "b")),
            part(*rungs("a", "b"), name="cumulative", cumulative=True),
            part(*rungs("ranks"), name="evaluation"),
        ),
        epoch=Epoch("cumulative", 1000, "evaluation", 50),
    )


def names_of(ladder: Ladder) -> list[list[str]]:
    return [[one.name, *(rung.name for rung in one.rungs)] for one in ladder.parts]


def test_a_named_row_comes_with_its_original_and_without_cumulative_parts():
    ladder = chosen(three_parts(Bench()), ["b"])
    assert names_of(ladder) == [["alone", "original", "b"]]
    assert ladder.epoch is None


def test_named_parts_come_whole_and_keep_the_projection_if_it_has_all_it_takes():
    ladder = chosen(three_parts(Bench()), ["evaluation", "cumulative"])
    assert names_of(ladder) == [["cumulative", "original", "a", "b"], ["evaluation", "original", "ranks"]]
    assert ladder.epoch is not None
    assert chosen(three_parts(Bench()), []).epoch is not None


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r'nothing called "c".*alone, a, b, cumulative, evaluation, ranks'):
        chosen(three_parts(Bench()), ["a", "c"])


def test_a_projection_is_samples_times_epochs_over_the_measured_rate():
    bench = Bench()
    train = part(bench.rung("original", 1.0), bench.rung("a", 0.7), bench.rung("b", 0.25), cumulative=True)
    ranks = part(bench.rung("original", 2.0), bench.rung("ranks", 0.5), name="evaluation")
    measured = bench.measure(Ladder((train, ranks)), 0.0)
    found = project(measured, Epoch("alone", 3600, "evaluation", 720), epochs=1000)
    # 10 samples a step: 10 and 40 samples/s of training, 5 and 20 of evaluation
    assert list(found.original) == pytest.approx([1000 * 3600 / 10 / 3600, 1000 * 720 / 5 / 3600])
    assert list(found.ours) == pytest.approx([1000 * 3600 / 40 / 3600, 1000 * 720 / 20 / 3600])
    assert found.original.total == pytest.approx(140.0)
    without = project(measured, Epoch("alone", 3600), epochs=1000)
    assert (without.original.evaluation, without.ours.evaluation) == (0.0, 0.0)


def test_a_record_is_strict_json_with_origin_and_claims(tmp_path: Path):
    bench = Bench()
    ladder = Ladder(
        (part(bench.rung("original", 1.0), bench.rung("b", 0.5, claim="S0-12: 1.5-2x")),),
        (Unmeasured("S3-28: accuracy", "takes whole trainings"),),
        Epoch("alone", 3600),
    )
    found = found_record(ladder, bench.measure(ladder, 0.0), epochs=10)
    path = write_record(tmp_path, found)
    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert path.name == "bench.json"
    assert read == found
    row = read["parts"][0]["rows"][1]
    assert (row["claim"], row["verdict"]) == ("S0-12: 1.5-2x", FASTER)
    assert row["factor"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert row["samples_per_s"]["median"] == 20.0
    assert row["steps_per_s"]["median"] == 2.0
    assert read["unmeasured"] == [{"claim": "S3-28: accuracy", "why": "takes whole trainings"}]
    assert read["projection"]["original"]["total_h"] == pytest.approx(1.0)
    assert read["projection"]["factor"] == pytest.approx(2.0)
    assert {"torch", "python"} <= set(read["versions"])
    assert read["command"] == "python -m toy bench"
    assert read["machine"]["threads"] == str(torch.get_num_threads())
    assert "(demo data)" in read["title"]
    assert "(demo data)" not in found_record(ladder, (), demo=False)["title"]


def test_a_number_that_json_does_not_have_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, {"rate": math.nan})
    assert list(tmp_path.iterdir()) == []


def test_work_without_samples_or_time_breaks_nothing():
    bench = Bench()
    idle = [bench.rung(name, 0.0, samples=0) for name in ("original", "b")]
    ladder = Ladder((part(*idle),), epoch=None)
    (measured,) = bench.measure(ladder, 0.0)
    assert measured.rows[1].verdict == NO_GAIN
    json.dumps(found_record(ladder, (measured,)), allow_nan=False)


def test_batches_come_round_again():
    following = endless(["a", "b"])
    assert [following() for _ in range(5)] == ["a", "b", "a", "b", "a"]


@pytest.mark.skipif(status_bytes("VmHWM") is None, reason="only Linux tells a process its peak")
def test_memory_is_what_a_step_takes_beyond_what_was_held():
    size = 32 << 20
    kept = bytearray(size)  # held before: it must not count

    def peak_of(size: int) -> int | None:
        with watched(CPU) as watch:
            torch.ones(size, dtype=torch.uint8)
        return watch().host_bytes

    peak_of(1)
    small, large = peak_of(1), peak_of(size)
    if small is None or large is None:
        pytest.skip("this system does not let a process reset its peak")
    assert len(kept) == size
    assert small < size / 4
    assert size * 0.9 <= large <= size * 1.5


def test_a_system_that_does_not_tell_gives_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(ladders, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(ladders, "_REFS", tmp_path / "none" / "clear_refs")
    with watched(CPU) as watch:
        pass
    assert watch() == Memory(None, None)


def test_the_device_is_waited_for_before_and_after_every_timed_run(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    log: list[str] = []
    monkeypatch.setattr(ladders, "finish", lambda device: log.append("wait"))

    def make() -> Callable[[int], Work]:
        def run(steps: int) -> Work:
            log.append("run")
            return Work(steps, steps)

        return run

    rung = replace(bench.rung("original", 1.0), make=make)
    bench.measure(Ladder((part(rung),)), 0.0, repeats=2)
    assert log == ["run", *["wait", "run", "wait"] * 3]


def test_the_median_of_an_even_number_of_repeats_lies_between():
    assert ladders.spread([1.0, 2.0, 4.0, 8.0]) == (statistics.median([1, 2, 4, 8]), 1.0, 8.0)
