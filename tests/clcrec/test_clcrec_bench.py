"""The ladder of clcrec: what it compares computes the same, and it says what the notes promise and what it measured."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.clcrec import bench, demo, main
from apps.clcrec.bench import OURS, Setting
from apps.clcrec.config import Config
from apps.clcrec.dataset import STAGES, Batch, ColdStart, epoch_order
from apps.clcrec.evaluate import evaluate_stages, matrices
from apps.clcrec.model import CLCRec
from apps.clcrec.originals import (
    Plain,
    PlainModel,
    StoredPairs,
    as_batch,
    as_plain,
    drawn_places,
    plain_evaluation,
    plain_splits,
    plain_step,
    sets_of,
)
from apps.clcrec.train import build, epoch_batches
from shared.amp import amp_step
from shared.ladder import Ladder
from shared.ranking import Lists
from tests.clcrec.test_clcrec_train import configure, topical_data

ORDER = list(bench.SWITCHES)
SMALL = ("--embed-dim=4", "--hidden-dim=8", "--batch-size=32", "--num-negatives=4", "--device=cpu", "--budget=0")
PROMISES = {f"S0-{i}" for i in (1, 2, 5, *range(7, 14), *range(19, 27), 28, 29, 30, 31, 32, 39)} | {
    f"S2-{i}" for i in (1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 17, 20, 21)
}
GPU_ONLY = {"S2-14", "S2-20", "S2-21", "S2-5"}


def without_words(data: ColdStart) -> ColdStart:
    return replace(data, words=None)


def setting_of(*, words: bool = True, **training: Any) -> Setting:
    data = topical_data() if words else without_words(topical_data())
    return Setting(bench.comparable(configure(**training)), data)


def arrangements() -> list[frozenset[str]]:
    """Every switch alone, and all of them one after the other."""
    alone = [frozenset({name}) for name in ORDER if bench.SWITCHES[name].alone]
    return [frozenset(), *alone, *(frozenset(ORDER[: i + 1]) for i in range(len(ORDER)))]


def gradients(model: nn.Module, num_users: int, num_warm: int) -> dict[str, Tensor]:
    """By the names of our model's parameters, whichever model it is."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if not isinstance(model, PlainModel):
        return found
    table = found.pop("table")
    assert not table[num_users + num_warm :].any(), "cold items' rows have no gradient"
    names = {"encoder.0": "hidden", "encoder.2": "output"}
    ours = {re.sub(r"^encoder\.\d", lambda m: names[m[0]], name): grad for name, grad in found.items()}
    return {**ours, "user": table[:num_users], "item": table[num_users : num_users + num_warm]}


@pytest.mark.parametrize("replacement", ["bernoulli", "legacy"])
@pytest.mark.parametrize("words", [False, True])
def test_every_arrangement_of_a_step_has_the_same_loss_and_gradients(words: bool, replacement: str):
    setting = setting_of(words=words, replacement=replacement)
    training = setting.config.training
    batch = next(epoch_batches(setting.ours, epoch=0))[0]
    assert batch.content_times.max() > (replacement == "legacy")
    sides = {}
    for on in arrangements():
        c = bench.components(setting, on, training)
        plain = as_plain(batch, setting.data.num_users)
        loss, _ = bench.loss_by(c.state.model, batch if "device" in on else plain, on=on, c=c)
        loss.backward()
        sides[on] = loss.item(), gradients(c.state.model, setting.data.num_users, setting.data.num_warm)
    expected_loss, expected = sides[frozenset()]
    assert expected["user"].abs().max() > 1e-3
    for on, (value, found) in sides.items():
        assert value == pytest.approx(expected_loss, rel=1e-5), sorted(on)
        assert found.keys() == expected.keys(), sorted(on)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=f"{name}, {sorted(on)}")


def test_a_step_that_keeps_its_graph_ends_with_the_same_weights():
    setting = setting_of()
    batch = next(epoch_batches(setting.ours, epoch=0))[0]
    weights = []
    for on in (frozenset[str](), OURS):
        c = bench.components(setting, on, setting.config.training)
        loss_of = partial(bench.loss_by, on=on, c=c)
        model = c.state.model
        if isinstance(model, PlainModel):
            plain_step(c.state, as_plain(batch, setting.data.num_users), loss_of)
            weights.append(model.table[: setting.data.num_users].detach())
        else:
            assert isinstance(model, CLCRec)
            amp_step(c.state, [batch], loss_of, amp=c.amp)
            weights.append(model.user.detach())
    before = bench.fresh_model(setting).user
    assert (weights[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_the_last_rung_is_a_step_of_train():
    setting = setting_of()
    for on, times in ((OURS, 1), (OURS | {"batch"}, bench.LARGER)):
        training = replace(setting.config.training, batch_size=times * setting.config.training.batch_size)
        found = bench.components(setting, on, training)
        theirs = build(replace(setting.config, training=training), setting.data)
        for name in ("by_matrix", "encodes_batch", "steps_per_epoch", "amp", "config"):
            assert getattr(found, name) == getattr(theirs, name), name
        assert found.state.optimizers[0].defaults == theirs.state.optimizers[0].defaults
        weights = theirs.state.model.state_dict()
        for name, value in found.state.model.state_dict().items():
            assert torch.equal(value, weights[name]), name
    plain = bench.components(setting, frozenset(), setting.config.training)
    assert not plain.state.optimizers[0].defaults["fused"]


def test_both_forms_of_a_batch_hold_the_same():
    setting = setting_of(replacement="legacy")
    batch = next(epoch_batches(setting.ours, epoch=0))[0]
    plain = as_plain(batch, setting.data.num_users)
    assert plain.item.min() >= setting.data.num_users
    assert (plain.user == batch.user[:, None]).all()
    again = as_batch(plain, setting.data.num_users)
    assert torch.equal(again.user, batch.user)
    assert torch.equal(again.item, batch.item)
    assert torch.equal(again.content_times, batch.content_times)


# Input


@pytest.mark.parametrize("exclude", ["train", "all"])
def test_the_originals_negatives_are_distinct_warm_and_unknown(exclude: str):
    setting = setting_of(neg_exclude=exclude)
    data = setting.data
    lists = data.known if exclude == "all" else data.trained
    positives = sets_of(lists, data.num_users)
    for index in range(0, data.num_pairs, 7):
        user, item = setting.pairs[index]
        assert user.tolist() == [int(data.user[index])] * 9
        assert item[0] == data.item[index] + data.num_users
        negatives = set(item[1:].tolist())
        assert len(negatives) == 8
        assert not negatives & positives[int(user[0])]
        assert all(data.num_users <= n < data.num_users + data.num_warm for n in negatives)


def test_stored_negatives_are_those_of_the_pool():
    setting = setting_of()
    stored = setting.stored
    assert isinstance(stored, StoredPairs)
    for index in (0, 5, len(stored) - 1):
        user, item = stored[index]
        assert user.tolist() == [int(setting.data.user[index])] * 9
        expected = [int(setting.data.item[index]), *setting.pool_PN[index].tolist()]
        assert (item - setting.data.num_users).tolist() == expected


def positives_of(found: Iterator[Plain | list[Batch]], num_users: int) -> list[tuple[int, int]]:
    """User and positive of every pair."""
    pairs = []
    for step in found:
        for batch in [as_batch(step, num_users)] if isinstance(step, Plain) else step:
            pairs += list(zip(batch.user.tolist(), batch.item[:, 0].tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("on", [frozenset(), {"stored"}, {"device"}])
def test_every_input_goes_through_the_epochs_alike(on: frozenset[str]):
    setting = setting_of(batch_size=100)
    data = setting.data
    steps_of = bench.source(setting, setting.ours, on)
    found = positives_of(steps_of(3), data.num_users) + positives_of(steps_of(6), data.num_users)
    orders = [epoch_order(data.num_pairs, seed=setting.config.training.seed, epoch=epoch) for epoch in range(3)]
    expected = []
    for order in orders:
        expected += [(int(data.user[i]), int(data.item[i])) for i in order.tolist()]
    assert len(found) > data.num_pairs
    assert found == expected[: len(found)]


def test_worker_processes_make_the_same_pairs():
    setting = setting_of(batch_size=100)
    training, device = setting.config.training, setting.device
    sources = [bench.collated(setting.stored, training, device=device, workers=workers) for workers in (0, 2)]
    for count in (2, 3):  # the second time with the processes of the first
        alone, shared = ([*steps_of(count)] for steps_of in sources)
        assert len(alone) == len(shared) == count
        for ours, theirs in zip(alone, shared, strict=True):
            assert isinstance(ours, Plain)
            assert isinstance(theirs, Plain)
            assert torch.equal(ours.item, theirs.item)
            assert torch.equal(ours.place, theirs.place)


def test_places_are_drawn_with_repeats():
    item = torch.zeros(20, 30, dtype=torch.int64)
    place = drawn_places(item, 0.5, torch.Generator().manual_seed(0))
    assert place.numel() == 300
    assert 0 <= int(place.min()) <= int(place.max()) < 600
    assert place.unique().numel() < 300


# Evaluation


@pytest.mark.parametrize("users", [17, 60])
def test_six_rankings_with_loops_give_the_metrics_of_evaluate(users: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("apps.clcrec.originals.USERS_PER_BLOCK", 11)
    setting = setting_of(mask_value="legacy")
    data, model = setting.data, bench.fresh_model(setting)
    user_UD, item_ID = matrices(model)
    found = plain_evaluation(
        torch.cat([user_UD, item_ID]),
        data.num_users,
        sets_of(data.trained, data.num_users),
        plain_splits(data),
        k=5,
        users=range(users),
    )
    some, count = bench.first_users(data, users)
    ours = evaluate_stages(model, some, STAGES, config=setting.config)
    assert count == users
    assert len(found) == 18
    assert max(found.values()) > 0
    for name, value in found.items():
        stage, _, metric = name.partition("/")
        assert value == pytest.approx(ours[stage][metric], abs=1e-6), name  # type: ignore[index]


# The rungs


def names_of(ladder: Ladder) -> dict[str, list[str]]:
    return {part.name: [rung.name for rung in part.rungs] for part in ladder.parts}


def ids_in(texts: list[str]) -> set[str]:
    return set(re.findall(r"[ST]\d?-\d+", " ".join(texts)))


def test_every_promise_is_measured_or_said_not_to_be():
    ladder = bench.ladder(configure(), topical_data(), only=["compile"])
    measured = ids_in([rung.claim for part in ladder.parts for rung in part.rungs])
    said = ids_in([one.claim for one in ladder.unmeasured])
    assert PROMISES - said <= measured
    assert said - measured >= GPU_ONLY
    assert "T-6" in measured
    assert ladder.epoch is not None
    assert (ladder.epoch.samples, ladder.epoch.evaluated) == (topical_data().num_pairs, 60)
    assert {ladder.epoch.train, ladder.epoch.evaluation} <= set(names_of(ladder))


def test_what_takes_long_is_asked_for_by_name():
    data, config = topical_data(), configure()
    quick, whole = bench.ladder(config, data, quick=True), bench.ladder(config, data)
    asked = bench.ladder(config, data, quick=True, only=["workers-8", "max-autotune"])
    assert [name for name in names_of(whole)["input"] if name not in names_of(quick)["input"]] == [
        "workers-4",
        "workers-8",
    ]
    assert names_of(asked)["input"] == names_of(whole)["input"]
    assert names_of(asked)["compile"] == ["eager", "compiled", "max-autotune"]
    assert "compile" not in names_of(whole)
    assert "S2-12" in ids_in([one.claim for one in whole.unmeasured])
    assert "S2-12" not in ids_in([one.claim for one in asked.unmeasured])
    assert "S0-26" in ids_in([one.claim for one in quick.unmeasured])


def test_switches_that_change_nothing_here_are_left_out():
    by_matrix = names_of(bench.ladder(configure(), topical_data()))["cumulative"]
    gathered = names_of(bench.ladder(configure(scores="gather"), topical_data()))["cumulative"]
    assert [name for name in by_matrix if name not in gathered] == ["matrix"]
    assert "precision" not in by_matrix


def test_what_the_original_lacks_is_named():
    (note,) = bench.left_out(configure(negatives="pool", ema_decay=0.9, compile="default"))
    assert all(flag in note for flag in ("--negatives pool", "--ema-decay 0.9", "--compile default"))
    assert bench.left_out(configure()) == []


def test_data_of_the_notes_sizes():
    data = bench.notes_data(num_users=200, num_warm=150, num_cold=20, num_pairs=1000, held_out=50)
    assert (data.num_users, data.num_warm, data.num_items, data.num_pairs) == (200, 150, 170, 1000)
    assert (bench.NOTES_USERS, bench.NOTES_WARM + bench.NOTES_COLD, bench.NOTES_PAIRS) == (55_485, 5_986, 922_007)
    assert {name: value.shape[1] for name, value in data.content.items()} == {"v": 2048, "a": 128, "t": 100}

    def keys(lists: Lists) -> set[int]:
        user = torch.repeat_interleave(torch.arange(200), lists.ptr.diff())
        return set((user * 170 + lists.item).tolist())

    trained, valid, test, known = map(keys, (data.trained, data.valid, data.test, data.known))
    assert len(trained) == 1000
    assert not trained & (valid | test)
    assert known == trained | valid | test
    for held_out in (valid, test):
        assert {key % 170 >= 150 for key in held_out} == {False, True}
    build(configure(), data)


# The command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small source in it; the demo data are as small."""
    small = demo.demo_data(num_users=40, num_warm=30, num_cold=10)
    monkeypatch.setattr(demo, "demo_data", lambda: small)
    demo.write_demo(tmp_path / "data")
    return tmp_path


@pytest.fixture
def invoke(folder: Path) -> Callable[..., int]:
    """A function that runs the command line in the folder and gives its exit code."""

    def run(*words: str) -> int:
        with contextlib.chdir(folder), pytest.raises(SystemExit) as end:
            main.app(words)
        assert isinstance(end.value.code, int)
        return end.value.code

    return run


def test_bench_prints_the_ladder_and_leaves_its_record(
    invoke: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert invoke("bench", "--quick", "--data-path", "data", "--project-epochs", "1000", *SMALL) == 0
    said = capsys.readouterr().out
    (run,) = folder.glob("runs/clcrec/*-bench")
    assert run.name in said
    for words in ("random.sample", "S0-28", "S2-4", "T-6", "pairs/s", "users/s", "steps/s", "1,000 epochs of"):
        assert words in said
    assert "demo data" not in said
    found = json.loads((run / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [part["name"] for part in found["parts"]] == [
        "input",
        "construction",
        "alone",
        "cumulative",
        "flags",
        "evaluation",
    ]
    for part in found["parts"]:
        for row in part["rows"]:
            assert 0 < row["samples_per_s"]["low"] <= row["samples_per_s"]["median"] <= row["samples_per_s"]["high"]
            assert math.isfinite(row["steps_per_s"]["median"])
    assert found["projection"]["epochs"] == 1000
    assert found["projection"]["evaluated"] == 40
    assert (run / "report.html").read_text().count("<svg") == len(found["parts"])


def test_only_measures_what_is_named(invoke: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]):
    words = ("bench", "--data-path", "data", "--project-epochs", "10", *SMALL)
    assert invoke(*words, "--only", "lookups", "--only", "construction") == 0
    (run,) = folder.glob("runs/clcrec/*-bench")
    found = json.loads((run / "bench.json").read_text())
    rows = [[row["name"] for row in part["rows"]] for part in found["parts"]]
    assert rows == [["original", "drawn"], ["original", "lookups"]]
    assert found["projection"] is None
    capsys.readouterr()
    assert invoke(*words, "--only", "luck") == 2
    assert "takes a part or a row" in capsys.readouterr().err


def test_every_line_on_demo_data_says_so(invoke: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]):
    words = [word for word in SMALL if not word.startswith("--batch-size")]
    assert invoke("bench", "--quick", "--only", "construction", *words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert any(f"{bench.QUICK_BATCH} pairs a step instead of 256" in line for line in lines)
    unmarked = [line for line in lines if "demo data" not in line and not line.startswith(("--quick: ", "took "))]
    assert unmarked == []
    assert list(folder.glob("runs/clcrec/*-demo-bench"))


def test_shapes_that_cannot_be_are_refused(invoke: Callable[..., int], capsys: pytest.CaptureFixture[str]):
    assert invoke("bench", "--shape", "huge") == 2
    assert "own or notes" in capsys.readouterr().err
    assert invoke("bench", "--shape", "notes", "--data-path", "data") == 2
    assert "leave --data-path out" in capsys.readouterr().err


def test_a_run_takes_the_steps_it_is_asked_for():
    setting = setting_of(batch_size=100)
    for on in (frozenset[str](), OURS):
        run = bench.trainer(setting, on)
        work = [run(steps) for steps in (1, 2, 1)]
        assert [part.steps for part in work] == [1, 2, 1]
        sizes = [min(100, setting.data.num_pairs - begin) for begin in range(0, setting.data.num_pairs, 100)]
        assert sum(part.samples for part in work) == sum(islice(sizes * 4, 4))


def test_flags_are_those_of_train():
    part = {part.name: part for part in bench.ladder(Config(), demo.demo_data(num_users=60)).parts}["flags"]
    assert [rung.name for rung in part.rungs[:6]] == [
        "as configured",
        "pooled",
        "shared",
        "batch-512",
        "batch-1024",
        "accumulate-4",
    ]
