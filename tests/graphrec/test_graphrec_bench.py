"""The ladder of graphrec: what it compares computes the same; it says what the notes promise and what it measured."""

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.graphrec import bench, demo, main
from apps.graphrec.bench import OURS, LightGCN, Notes, Sizes
from apps.graphrec.config import Config
from apps.graphrec.dataset import STAGES, Interactions
from apps.graphrec.evaluate import evaluate, held_out, kept
from apps.graphrec.model import GraphRec
from apps.graphrec.objective import Step
from apps.graphrec.originals import (
    Plain,
    PlainLightGCN,
    PlainPairs,
    as_part,
    as_plain,
    drawn_places,
    lists_of,
    plain_metrics,
    plain_ranking,
    plain_splits,
    plain_step,
    plain_triples,
)
from apps.graphrec.train import build, epoch_batches
from shared.amp import amp_step, evaluation_mode
from shared.ladder import Ladder
from shared.ranking import Lists
from tests.graphrec.test_graphrec_train import configure, topical_data

CPU = torch.device("cpu")
SMALL = ("--embed-dim=4", "--hidden-dim=8", "--layers=1", "--batch-size=64", "--device=cpu", "--budget=0")
PARTS = [
    "input",
    "notes-alone",
    "notes",
    "presets",
    "evaluation",
    "lightgcn-alone",
    "lightgcn",
    "propagation",
    "lightgcn-evaluation",
]
MEASURED = {f"S1-{i}" for i in (1, 3, 4, 7, 10, 11, 12, 13, 14, 15, 16, 17, 19, 25)} | {"T-6", "T-16", "T-17"}
SAID = {f"S1-{i}" for i in (9, 23, 24, 26)}


def notes_of(data: Interactions | None = None, **training: Any) -> Notes:
    data = topical_data(num_cold=6) if data is None else data
    return Notes(bench.notes_config(configure("clcrec-graph", num_negatives=5, **training), data), data)


def lightgcn_of(**training: Any) -> LightGCN:
    return LightGCN(bench.lightgcn_config(configure("lightgcn", **training)), topical_data(num_cold=6))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By the names of our model's parameters, whichever model it is."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, PlainLightGCN):
        found = {"table": torch.cat([found["user"], found["item"]])}
    return found


def check_same(sides: dict[str, tuple[float, dict[str, Tensor]]]) -> None:
    """All sides have the loss and the gradients of the first."""
    (expected_loss, expected), *_ = sides.values()
    assert expected["table"].abs().max() > 1e-4
    for name, (value, found) in sides.items():
        assert value == pytest.approx(expected_loss, rel=1e-5), name
        assert found.keys() == expected.keys(), name
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-6, msg=f"{key}, {name}")


# The notes' side


@pytest.mark.parametrize("view", ["fast", "full"])
@pytest.mark.parametrize("cold", [0, 6])
def test_every_arrangement_of_the_notes_step_has_the_same_loss_and_gradients(view: str, cold: int):
    notes = notes_of(topical_data(num_cold=cold), graph_view=view)
    assert notes.c.plan.weights.keys() == {"contrast", "preference", "reg", "graph"}
    assert len(notes.features) == 2
    step = next(epoch_batches(notes.c, epoch=0))
    replaced = step.parts[0].replaced
    assert replaced is not None
    assert 0 < int(replaced.sum()) < replaced.numel()
    plain = as_plain(step.parts[0], notes.data.num_users)
    sides = {}
    names = ("views", "encoder", "scores")
    for on in (frozenset(chosen) for count in range(4) for chosen in combinations(names, count)):
        for form in (plain, step):
            c = notes.components(on)
            loss, terms = bench.notes_loss(c.state.model, form, notes=notes, c=c, on=on)
            assert terms.keys() >= notes.c.plan.weights.keys()
            sides[f"{sorted(on)}, {type(form).__name__}"] = loss.item(), gradients(c.state.model, loss)
    assert len(sides) == 16
    check_same(sides)


def test_a_batch_keeps_its_meaning_in_either_form():
    notes = notes_of()
    part = next(epoch_batches(notes.c, epoch=0)).parts[0]
    again = as_part(as_plain(part, notes.data.num_users), notes.data.num_users)
    for name in ("user", "item", "negative"):
        assert torch.equal(getattr(again.batch, name), getattr(part.batch, name)), name
    assert again.replaced is not None
    assert part.replaced is not None
    assert torch.equal(again.replaced, part.replaced)


def test_a_step_that_keeps_its_graph_ends_with_the_same_weights():
    notes = notes_of()
    step = next(epoch_batches(notes.c, epoch=0))
    tables = []
    for on in (frozenset[str](), OURS):
        c = notes.components(on)
        loss_of = partial(bench.notes_loss, notes=notes, c=c, on=on)
        if on:
            amp_step(c.state, [step], loss_of, amp=c.amp)
        else:
            plain_step(c.state, as_plain(step.parts[0], notes.data.num_users), loss_of, precision="fp32")
        assert isinstance(c.state.model, GraphRec)
        tables.append(c.state.model.table.detach())
    assert (tables[0] - bench.fresh_model(notes.c).table).abs().max() > 1e-3
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-3, atol=1e-5)


def test_the_notes_last_rung_is_a_step_of_train():
    notes = notes_of()
    on = OURS | {"batch", "shared"}
    theirs = build(
        replace(
            notes.config,
            training=replace(
                notes.config.training, batch_size=2 * notes.config.training.batch_size, negatives="shared"
            ),
        ),
        notes.data,
    )
    check_same_components(notes.components(on), theirs)
    assert not notes.components(OURS - {"optimizer"}).state.optimizers[0].defaults["fused"]
    assert notes.components(OURS).plan.shared is False


def check_same_components(found: Any, theirs: Any) -> None:
    for name in ("config", "plan", "amp", "steps_per_epoch"):
        assert getattr(found, name) == getattr(theirs, name), name
    assert found.state.optimizers[0].defaults == theirs.state.optimizers[0].defaults
    weights = theirs.state.model.state_dict()
    assert weights.keys() == found.state.model.state_dict().keys()
    for name, value in found.state.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_models_of_all_rows_share_the_graph_and_no_weight():
    notes = notes_of()
    first, second = bench.fresh_model(notes.c), bench.fresh_model(notes.c)
    assert first.graph_column.data_ptr() == second.graph_column.data_ptr()
    assert first.content.data_ptr() == second.content.data_ptr()
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr(), name


def test_the_notes_pairs_have_distinct_warm_negatives_that_were_not_met():
    data = topical_data(num_cold=6)
    pairs = PlainPairs(data, 5)
    warm = set(range(data.num_items - 6))
    seen = []
    for index in range(len(pairs)):
        user_M, item_M = pairs[index]
        (user,) = set(user_M.tolist())
        item, *negatives = (item_M - data.num_users).tolist()
        seen.append((user, item))
        assert len(set(negatives)) == 5
        assert set(negatives) <= warm - set(lists_of(data.train)[user])
    assert seen == [(user, item) for user, items in enumerate(lists_of(data.train)) for item in items]


def test_places_are_drawn_with_repeats():
    places = drawn_places(torch.zeros(100, 6), 0.5, torch.Generator().manual_seed(0))
    assert places.numel() == 300
    assert places.unique().numel() < 300
    assert int(places.max()) < 600


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_as_many_batches_as_a_run_takes(workers: int):
    notes = notes_of()
    steps_of = notes.source(notes.components(()), (), workers=workers)
    size, pairs = notes.config.training.batch_size, notes.data.num_pairs
    found = [list(steps_of(count)) for count in (1, 3)]
    assert [len(steps) for steps in found] == [1, 3]
    batches = [step for steps in found for step in steps]
    assert all(isinstance(step, Plain) and step.user.shape == step.item.shape for step in batches)
    assert [bench.pairs_of(step) for step in batches] == [min(size, pairs - i * size) for i in range(4)]


def test_worker_processes_get_several_batches_to_make():
    notes = notes_of(batch_size=16)
    c = notes.components(())
    assert len(list(notes.source(c, (), workers=1, least=4)(1))) == 4
    work = bench.trainer(notes, (), workers=1)(1)
    assert (work.steps, work.samples) == (bench.WORKED_STEPS, 16 * bench.WORKED_STEPS)
    assert bench.trainer(notes, ())(1).steps == 1


# LightGCN's side


def test_every_arrangement_of_lightgcn_has_the_same_loss_and_gradients():
    side = lightgcn_of(batch_size=32)
    step = next(epoch_batches(side.c, epoch=0))
    sides = {}
    for on in (frozenset[str](), frozenset({"operator"}), frozenset({"operator", "lookups"})):
        c = side.components(on)
        loss, _ = bench.lightgcn_loss(c.state.model, step, c=c, on=on)
        sides[str(sorted(on))] = loss.item(), gradients(c.state.model, loss)
    check_same(sides)


def test_lightgcns_last_rung_is_a_step_of_train():
    side = lightgcn_of(batch_size=16)
    training = replace(
        side.config.training, batch_size=64, loss="softmax", negatives="shared", num_negatives=side.data.num_items
    )
    on = frozenset(bench.LIGHTGCN_SWITCHES)
    check_same_components(side.components(on), build(replace(side.config, training=training), side.data))


def test_triples_are_a_users_item_and_one_that_it_has_not_met():
    draws = iter([0, 1, 2, 1, 3, 0, 0, 1, 0, 2])
    positives = [[], [0, 1, 2, 3], [1, 3]]
    # user 0 has no item, user 1 all of them; user 2: its second item, then 1 is met and 0 is not
    assert plain_triples(positives, 4, 3, draw=lambda below: next(draws) % below) == [[2, 3, 0]]
    side = lightgcn_of(batch_size=16)
    met = lists_of(side.data.train)
    (step,) = side.source(side.components(()), ())(1)
    assert isinstance(step, Step)
    batch = step.parts[0].batch
    assert batch.negative is not None
    assert batch.user.numel() == 16
    for user, item, negative in zip(
        *(x.flatten().tolist() for x in (batch.user, batch.item, batch.negative)), strict=True
    ):
        assert item in met[user]
        assert negative not in met[user]


# Evaluation


def test_ranking_by_loops_gives_the_metrics_of_evaluate():
    side = lightgcn_of()
    plain = PlainLightGCN(bench.fresh_model(side.c), side.adjacency)
    users = side.data.test.ptr.diff().nonzero().squeeze(1).tolist()
    found = plain_ranking(plain.propagated, users, side.positives, lists_of(side.data.test), k=5)
    expected = evaluate(side.c.state.model, side.data, "test", config=side.config)
    assert found["Recall@5"] > 0
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)


def test_the_notes_rankings_are_those_of_evaluate_where_scores_are_positive():
    data = topical_data(num_cold=6)
    user, item = torch.rand(60, 4) + 0.1, torch.rand(40, 4) + 0.1
    notes = notes_of(data)
    with mock_matrices(notes, user, item) as model:
        expected = evaluate(model, data, "valid", config=notes.config)
    splits = plain_splits(data)
    assert [*splits] == [f"{stage}/{group}" for stage in STAGES for group in ("all", "warm", "cold")]
    trained = dict(enumerate(lists_of(data.train)))
    for group in ("all", "warm", "cold"):
        found = plain_metrics(user, item, trained, splits[f"valid/{group}"], range(60), k=5)
        assert found == pytest.approx({name: expected[f"{group}/{name}"] for name in found}, abs=1e-6), group


@contextlib.contextmanager
def mock_matrices(notes: Notes, user_UD: Tensor, item_ID: Tensor) -> Any:
    """A model whose final vectors are these."""
    model = bench.fresh_model(notes.c)
    model.final = lambda: (user_UD, item_ID)  # type: ignore[method-assign]
    with evaluation_mode(model):
        yield model


def test_a_block_of_users_is_measured_as_among_all():
    data = topical_data()
    user, item = torch.rand(60, 4), torch.rand(40, 4)
    split = plain_splits(data)["valid/all"]
    trained = dict(enumerate(lists_of(data.train)))
    parts = [plain_metrics(user, item, trained, split, users, k=5) for users in (range(25), range(25, 60))]
    counts = [sum(bool(items) for items in split.items[part]) for part in (slice(25), slice(25, 60))]
    whole = plain_metrics(user, item, trained, split, range(60), k=5)
    for name, value in whole.items():
        parted = sum(part[name] * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
        assert value == pytest.approx(parted), name


def test_the_first_users_keep_what_they_have_held_out():
    data = topical_data()
    some, count = bench.first_users(data, 7)
    assert count == 7
    for stage in STAGES:
        found, whole = lists_of(held_out(some, stage)), lists_of(kept(held_out(data, stage), None))
        assert found[:7] == whole[:7]
        assert not any(found[7:])


# The ladder


def names_of(ladder: Ladder) -> dict[str, list[str]]:
    return {part.name: [rung.name for rung in part.rungs] for part in ladder.parts}


def promises(ladder: Ladder) -> set[str]:
    """The ids that a row, or a sentence on what is not measured, speaks of."""
    texts = [rung.claim for part in ladder.parts for rung in part.rungs] + [one.claim for one in ladder.unmeasured]
    return set(re.findall(r"[ST]\d?-\d+", " ".join(texts)))


@pytest.fixture
def with_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device with units for half precision."""
    monkeypatch.setattr(bench, "half_of", lambda training, device: "bf16")


def test_every_promise_is_measured_or_said_not_to_be(with_half: None):
    ladder = bench.ladder(configure(), topical_data())
    assert promises(replace(ladder, unmeasured=())) >= MEASURED
    assert promises(ladder) >= MEASURED | SAID
    assert names_of(ladder)["recipe"] == ["current", "workers", "batch", "amp", "extreme"]
    assert ladder.epoch is not None
    assert {ladder.epoch.train, ladder.epoch.evaluation} <= {*names_of(ladder)}
    assert [len(set(names)) for names in names_of(ladder).values()] == [
        len(names) for names in names_of(ladder).values()
    ]


def test_half_precision_that_is_not_there_is_said_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "half_of", lambda training, device: "fp32")
    ladder = bench.ladder(configure(), topical_data())
    assert "amp" not in names_of(ladder)["recipe"]
    assert "precision" not in names_of(ladder)["notes-alone"]
    assert {"S1-11", "T-16"} <= promises(replace(ladder, parts=()))


def test_a_quick_look_has_no_worker_processes_unless_they_are_named():
    quick = names_of(bench.ladder(configure(), topical_data(), quick=True))
    assert list(quick) == PARTS
    assert quick["input"] == ["original", "device", "shared"]
    asked = bench.ladder(configure(), topical_data(), quick=True, only=["recipe"])
    assert {"recipe"} < {*names_of(asked)} - {*quick} | {"input"}
    assert "workers-8" in names_of(asked)["input"]
    assert promises(bench.ladder(configure(), topical_data(), quick=True)) >= MEASURED | SAID


def test_every_model_is_measured_on_both_sides():
    data = replace(topical_data(), content={})
    sizes = {}
    for kind in ("lightgcn", "xsimgcl", "clcrec-graph", "bspm"):
        config = replace(configure(kind, batch_size=48), model=replace(configure(kind).model, init="spectral"))
        notes, lightgcn = bench.notes_config(config, data), bench.lightgcn_config(config)
        assert (notes.model.model, lightgcn.model.model) == ("clcrec-graph", "lightgcn")
        sizes[kind] = notes.training.batch_size, lightgcn.training.batch_size
        assert list(names_of(bench.ladder(config, data, quick=True))) == PARTS
    assert sizes == {"lightgcn": (256, 48), "xsimgcl": (256, 48), "clcrec-graph": (48, 2048), "bspm": (256, 2048)}


def test_negatives_are_as_many_as_the_user_with_the_most_items_leaves():
    data = topical_data(num_cold=6)
    notes = Notes(bench.notes_config(configure(), data), data)
    assert notes.config.training.num_negatives == notes.c.sampler.max_negatives < bench.NOTES_NEGATIVES


def test_what_the_originals_lack_is_named():
    config = configure(accumulate=2, loss="directau", clip_norm=1.0, ema_decay=0.9)
    (note,) = bench.left_out(config, topical_data())
    assert all(flag in note for flag in ("--accumulate 2", "--loss directau", "--clip-norm 1.0", "--ema-decay 0.9"))
    assert bench.left_out(Config(), topical_data()) == []
    assert "--quick" in bench.left_out(Config(), topical_data(), quick=True)[0]


# The command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a small source in it."""
    data = topical_data()
    (tmp_path / "topical").mkdir()
    for name, lists in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        rows = [" ".join(map(str, [user, *items])) for user, items in enumerate(lists_of(lists))]
        (tmp_path / "topical" / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return tmp_path


def invoke(folder: Path, *words: str) -> int:
    with contextlib.chdir(folder), pytest.raises(SystemExit) as end:
        main.app(words)
    assert isinstance(end.value.code, int)
    return end.value.code


class Tags(HTMLParser):
    """The names of all elements of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)


def test_bench_prints_the_ladder_and_leaves_its_record(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert invoke(folder, "bench", "--quick", "--data-path", "topical", "--project-epochs", "1000", *SMALL) == 0
    said = capsys.readouterr().out
    (run,) = folder.glob("runs/graphrec/*-bench")
    assert run.name in said
    for words in ("fused Adam", "S1-12", "users/s", "steps/s", "1,000 epochs of", "training", "evaluation"):
        assert words in said
    assert "demo data" not in said
    found = json.loads((run / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [part["name"] for part in found["parts"]] == PARTS
    for part in found["parts"]:
        for row in part["rows"]:
            assert 0 < row["samples_per_s"]["low"] <= row["samples_per_s"]["median"] <= row["samples_per_s"]["high"]
            assert math.isfinite(row["steps_per_s"]["median"])
    assert found["projection"]["epochs"] == 1000
    assert found["data"]["demo"] is False
    assert Tags((run / "report.html").read_text()).names.count("svg") == len(PARTS)


def test_only_measures_what_is_named(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "WORKERS", (1,))
    words = ("bench", "--data-path", "topical", "--quick", "--only", "recipe", "--only", "views", *SMALL)
    assert invoke(folder, *words) == 0
    (run,) = folder.glob("runs/graphrec/*-bench")
    found = json.loads((run / "bench.json").read_text())
    rows = {part["name"]: [row["name"] for row in part["rows"]] for part in found["parts"]}
    assert rows["notes-alone"] == ["original", "views"]
    assert rows["recipe"][:3] == ["current", "workers", "batch"]
    assert {*rows} == {"notes-alone", "recipe"}
    assert invoke(folder, "bench", "--data-path", "topical", "--only", "luck", *SMALL) == 2
    assert "takes a part or a row" in capsys.readouterr().err


def test_every_line_on_demo_data_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    small: Callable[[], Interactions] = partial(demo.demo_data, num_users=60, num_items=60)
    monkeypatch.setattr(demo, "demo_data", small)
    assert invoke(folder, "bench", "--only", "propagation", "--only", "evaluation", *SMALL) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) > 8
    assert [line for line in lines if "demo data" not in line] == []
    assert list(folder.glob("runs/graphrec/*-demo-bench"))


def test_the_sizes_of_the_notes_can_be_made():
    assert (Sizes().users, Sizes().warm, Sizes().cold, Sizes().pairs) == (55_485, 5_119, 867, 922_007)
    data = bench.notes_data(Sizes(users=80, warm=60, cold=9, pairs=400, held_out=30))
    assert (data.num_users, data.num_items, data.num_pairs) == (80, 69, 400)
    assert {name: value.shape[1] for name, value in data.content.items()} == {"a": 128, "t": 100}
    assert data.is_cold is not None
    assert not data.is_cold[data.train.item.long()].any()
    for lists in (data.train, data.valid, data.test):
        assert all(items == sorted(set(items)) for items in lists_of(lists))
    for lists in (data.valid, data.test):
        cold = int(data.is_cold[lists.item.long()].sum())
        assert 0 < cold <= 30
        assert lists.item.numel() - cold == 30
    assert not pairs_in(data.train) & (pairs_in(data.valid) | pairs_in(data.test))


def pairs_in(lists: Lists) -> set[tuple[int, int]]:
    return {(user, item) for user, items in enumerate(lists_of(lists)) for item in items}


def test_the_notes_shape_is_measured(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "notes_data", lambda: topical_data(num_cold=6))
    assert invoke(folder, "bench", "--shape", "notes", "--only", "propagation", *SMALL) == 0
    assert list(folder.glob("runs/graphrec/*-demo-bench"))


def test_shapes_that_cannot_be_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert invoke(folder, "bench", "--shape", "huge") == 2
    assert "own or notes" in capsys.readouterr().err
    assert invoke(folder, "bench", "--shape", "notes", "--data-path", "topical") == 2
    assert "leave --data-path out" in capsys.readouterr().err
