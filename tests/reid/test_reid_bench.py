"""The ladder of reid: what it compares computes the same, and it says what the notes promise and what it measured."""

import contextlib
import io
import itertools
import json
import pickle
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.reid import bench, main
from apps.reid.augment import draw_augment
from apps.reid.bench import SWITCHES, Arrangement, Setting
from apps.reid.config import Config
from apps.reid.dataset import RGB, Batch, Frame, ImageFiles, People, make_texts
from apps.reid.evaluate import evaluate, list_metrics
from apps.reid.images import png_bytes
from apps.reid.originals import OneByOne, cached_batches, inferring_batches, rows_by_modality, sorted_metrics
from apps.reid.train import AUGMENT_STREAM, augmented, build, epoch_keys
from shared.ladder import Ladder
from shared.seed import make_generator
from tests.reid.test_reid_train import FRAME, configure, made_up

CLAIMS = ("S4-1", "S4-2", "S4-3", "S4-5", "S4-6", "S4-7", "S4-15", "S4-18", "S4-21", "S4-22", "S4-32", "S4-33")
STEP = frozenset(SWITCHES)


class Repeating(OneByOne):
    """Draws what is given, one row after another."""

    rows: Iterator[list[int]]

    def draw(self) -> list[int]:
        return next(self.rows)


def transform_of(setting: Setting, batches: int) -> OneByOne:
    """The original's transform with the draws that ours makes for the first batches."""
    training = setting.config.training
    rows: list[list[int]] = []
    for number in range(batches):
        key = setting.keys[number % len(setting.keys)]
        batch = setting.batches(STEP)[key]
        plan = draw_augment(
            make_generator(training.seed, epoch=0, step=number, stream=AUGMENT_STREAM),
            len(batch.image),
            source=(batch.image.shape[2], batch.image.shape[3]),
            target=FRAME[:2],
            flip=training.flip,
            pad=training.pad,
            erase=training.erase,
        )
        # the original asks sample by sample: RGB, near infra-red, sketch, colour pencil
        asked = torch.tensor([0, 1, 3, 2])[batch.modality]
        rows += plan[(batch.slot * 4 + asked).argsort()].tolist()
    found = Repeating(setting.people.images.frame, training.flip, training.pad, training.erase)
    object.__setattr__(found, "rows", iter(rows))
    return found


def setting_of(people: People | None = None, **training: Any) -> Setting:
    return Setting(configure(**{"warmup_steps": 0, "lr": 1e-2, **training}), people or made_up())


def gradients(setting: Setting, on: frozenset[str]) -> Tensor:
    """What the optimizer of an arrangement gets in the first step, clipped."""
    random.seed(0)
    found = Arrangement(setting, on, transform=transform_of(setting, 1))
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        parameters = (value for value in found.model.parameters() if value.requires_grad)
        seen.append(
            torch.cat(
                [torch.zeros(value.numel()) if value.grad is None else value.grad.flatten() for value in parameters]
            )
        )

    found.state.optimizers[0].register_step_pre_hook(look)
    assert found.run(1) == (8, 1)
    assert len(seen) == 1
    return seen[0]


def check_same(found: Tensor, expected: Tensor, on: object = "") -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5, msg=lambda text: f"{on}: {text}")


ALONE = [frozenset[str](), *(frozenset({name}) for name in SWITCHES)]
TOGETHER = [frozenset(itertools.islice(SWITCHES, count)) for count in range(2, len(SWITCHES) + 1)]


@pytest.mark.parametrize("options", [{}, {"clip": "fixed"}, {"clip": "off"}], ids=str)
def test_every_arrangement_of_a_step_trains_the_same(options: dict[str, Any]):
    setting = setting_of(made_up(partial=True), prefer_complete="any", **options)
    expected = gradients(setting, STEP)
    is_clipped = abs(float(expected.norm()) - 1.0) < 1e-3
    assert is_clipped == (options.get("clip") != "off")
    for on in (ALONE + TOGETHER) if not options else ALONE[:1]:
        check_same(gradients(setting, on), expected, sorted(on))


def test_fused_tokens_and_rgb_alone_train_the_same_too():
    tokens = Setting(configure(model={"fusion": "tokens"}, lr=1e-2), made_up())
    alone = setting_of(made_up(others=False))
    for setting in (tokens, alone):
        check_same(gradients(setting, frozenset()), gradients(setting, STEP))


def test_the_last_rung_is_a_step_of_train():
    setting = setting_of()
    ours = Arrangement(setting, STEP)
    theirs = build(setting.config, setting.people)
    assert ours.c.amp == theirs.amp
    assert ours.c.clip is not None
    assert ours.calls is None
    (optimizer,) = ours.state.optimizers
    assert optimizer.defaults["fused"] is True
    assert not Arrangement(setting, frozenset()).state.optimizers[0].defaults["fused"]
    for key, value in theirs.state.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[key], value), key
    found, expected = ours.batches[setting.keys[0]], setting.c.samples[0, setting.keys[0][1]]
    for name, part in found._asdict().items():
        assert torch.equal(part, getattr(expected, name)), name
    assert setting.keys[0] == epoch_keys(theirs, epoch=0)[0]


def test_records_make_the_same_batch_with_rows_for_what_is_absent():
    setting = setting_of(made_up(partial=True), prefer_complete="any")
    key = setting.keys[0]
    ours: Batch = augmented(setting.c, setting.batches(STEP)[key], epoch=0, number=0)
    theirs = setting.batches(frozenset({"tokens", "bytes"}), transform_of(setting, 1))[key]
    assert rows_by_modality(theirs.modality) == [8, 8, 8, 8]
    assert torch.equal(theirs.present, ours.present)
    assert not ours.present.all()
    assert torch.equal(theirs.label, ours.label)
    assert torch.equal(theirs.token, ours.token)
    where = {pair: row for row, pair in enumerate(zip(theirs.modality.tolist(), theirs.slot.tolist(), strict=True))}
    for row, pair in enumerate(zip(ours.modality.tolist(), ours.slot.tolist(), strict=True)):
        assert torch.equal(theirs.image[where[pair]], ours.image[row])


def test_files_of_a_folder_are_read_where_they_are(tmp_path: Path):
    packed = made_up()
    for row in range(packed.num_images):
        (tmp_path / f"{row}.png").write_bytes(png_bytes(packed.images.load(torch.tensor([row]))[0]))
    names = make_texts([f"{row}.png" for row in range(packed.num_images)])
    people = replace(packed, images=ImageFiles(tmp_path, FRAME, names))
    setting = setting_of(people)
    assert setting.records[0]["images"]["vis"][0].parent == tmp_path
    assert "prepare" in bench.left_out(setting.config, people)[0]
    check_same(gradients(setting, frozenset()), gradients(setting_of(), STEP))


def test_written_files_go_with_the_setting():
    setting = setting_of()
    file = setting.records[0]["anchor_vis"]
    assert file.is_file()
    del setting
    assert not file.exists()


# Sampling


@pytest.mark.parametrize("sampler", [inferring_batches, cached_batches])
def test_samplers_in_python_give_batches_of_p_times_k(sampler):
    labels = [place // 5 for place in range(30)]
    shows = [{"vis"} if place % 5 < 2 else {"nir"} for place in range(30)]
    asked: list[int] = []

    def infer(place: int) -> set[str]:
        asked.append(place)
        return shows[place]

    random.seed(0)
    source = sampler(labels, infer, identities=3, instances=4)
    for number in range(10):
        batch = next(source)
        drawn = [labels[place] for place in batch]
        assert [drawn.count(label) for label in sorted(set(drawn))] == [4, 4, 4]
        if sampler is cached_batches:
            assert all(len({labels[p] for p in batch[i : i + 4]}) == 1 for i in range(0, 12, 4))
            assert all(shows[batch[i]] == {"vis"} and shows[batch[i + 1]] == {"nir"} for i in range(0, 12, 4))
        assert len(asked) == (30 if sampler is cached_batches else 12 * (number + 1))


def test_images_drawn_one_by_one_stay_inside_the_frame():
    random.seed(0)
    transform = OneByOne(Frame(16, 8, 2, 1), 0.5, 3, 0.7)
    rows = torch.tensor([transform.draw() for _ in range(500)])
    assert set(rows[:, 0].tolist()) == {0, 1}
    assert (int(rows[:, 1].min()), int(rows[:, 1].max())) == (-3, 2 * (2 + 3) - 3)
    assert (int(rows[:, 2].min()), int(rows[:, 2].max())) == (-3, 2 * (1 + 3) - 3)
    erased = rows[rows[:, 5] > 0]
    assert 300 < len(erased) < 400
    area = (erased[:, 5] - erased[:, 3]) * (erased[:, 6] - erased[:, 4])
    assert area.min() >= 1
    assert area.max() <= 0.45 * 16 * 8
    assert erased[:, 5].max() <= 16
    assert erased[:, 6].max() <= 8


# Ranking


@pytest.mark.parametrize("together", [False, True])
def test_sorting_everything_gives_the_metrics_that_are_counted(together: bool):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randint(6, (size,), generator=generator) for size in (40, 70))
    queries[0] = 6  # nobody
    score = torch.rand(40, 70, generator=generator, dtype=torch.float64)
    none = torch.zeros(40, 70, dtype=torch.bool)
    found = sorted_metrics(score, queries, gallery, none, ks=(1, 5), together=together)
    truth = bench.truth_of(queries, gallery)
    expected = list_metrics(lambda rows: score[rows], truth, ks=(1, 5), budget_bytes=1 << 20)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("together", [False, True])
def test_what_does_not_count_is_left_out_of_the_order(together: bool):
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    left_out = torch.tensor([[True, False, True, False, False]])
    found = sorted_metrics(
        score, torch.tensor([1]), torch.tensor([1, 2, 0, 1, 1]), left_out, ks=(1, 2), together=together
    )
    assert found == pytest.approx({"mAP": (1 / 2 + 2 / 3) / 2, "R1": 0.0, "R2": 1.0, "mINP": 2 / 3})


@pytest.mark.parametrize("camera_rule", ["off", "on"])
def test_list_by_list_finds_what_evaluation_finds(camera_rule: str):
    people = made_up()
    people = replace(people, camera=torch.arange(people.num_images) % 3)
    config = configure(camera_rule=camera_rule)
    c = build(config, people)
    expected = evaluate(c.state.model, people, "valid", config=config, token_CL=c.token_CL)
    model: Any = c.state.model
    found = bench.list_by_list(model, people, config=config, token_CL=c.token_CL)
    assert len(found) == 32
    for name, values in found.items():
        assert values == pytest.approx({figure: expected[f"{name}/{figure}"] for figure in values}, abs=1e-6), name


def test_a_few_people_keep_some_of_everything():
    people = made_up()
    some = bench.few_people(people, num_people=2, each=1)
    assert some.valid is not None
    assert people.valid is not None
    assert len(some.valid.gallery) == 2
    assert some.valid.queries.keys() == people.valid.queries.keys()
    assert {len(found.identity) for found in some.valid.queries.values()} == {2}
    assert people.identity[some.valid.gallery].tolist() == some.valid.queries["NIR"].identity.tolist()


# The ladder


def names_of(ladder: Ladder) -> dict[str, list[str]]:
    return {part.name: [rung.name for rung in part.rungs] for part in ladder.parts}


def promises(ladder: Ladder) -> set[str]:
    """The ids that a row, or a sentence on what is not measured, speaks of."""
    texts = [rung.claim for part in ladder.parts for rung in part.rungs] + [one.claim for one in ladder.unmeasured]
    return set(re.findall(r"[ST]\d?-\d+", " ".join(texts)))


def test_every_promise_is_measured_or_said_not_to_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "LARGER", ((6, 2), (8, 2)))
    people = made_up()
    whole = bench.ladder(configure(), people)
    assert set(CLAIMS) <= promises(replace(whole, unmeasured=()))
    every = {f"S4-{i}" for i in (*range(1, 8), 15, 18, 21, 22, 24, 32, 33, 34)}
    for found in (whole, bench.ladder(configure(), people, quick=True), bench.ladder(configure(clip="off"), people)):
        assert every <= promises(found)
    names = names_of(whole)
    assert [*names] == ["sampling", "input", "alone", "cumulative", "ranking", "evaluation", "workers", "batches"]
    assert names["batches"] == ["original", "6x2", "8x2", "accumulate-2"]
    assert whole.epoch is not None
    assert {whole.epoch.train, whole.epoch.evaluation} <= set(names)
    assert (whole.epoch.samples, whole.epoch.evaluated) == (32, sum(len(q.identity) for q in queries_of(people)))
    (epoch,) = [one for one in whole.unmeasured if "S4-24" in one.claim]
    assert "it has 2 batches here; of all samples, 4 with 32 draws" in epoch.why


def queries_of(people: People) -> list[Any]:
    assert people.valid is not None
    return [*people.valid.queries.values()]


def test_what_a_quick_look_leaves_out_can_be_asked_for():
    people = made_up()
    assert not {"workers", "batches", "compile"} & names_of(bench.ladder(configure(), people, quick=True)).keys()
    asked = bench.ladder(configure(), people, quick=True, only=("workers", "reduce-overhead"))
    assert names_of(asked)["workers"] == ["original", "two workers", "pack"]
    assert names_of(asked)["compile"] == ["original", "reduce-overhead"]


def test_switches_that_change_nothing_are_in_no_row():
    ladder = names_of(bench.ladder(configure(clip="off"), made_up(others=False)))
    assert ladder["cumulative"] == [
        "original", "sampling", "logging", "bar", "pack", "bytes", "tower", "optimizer"
    ]  # fmt: skip


def test_what_the_original_lacks_is_named():
    config = configure(accumulate=2, modality_dropout=0.1, model={"grad_checkpoint": True})
    (note,) = bench.left_out(config, made_up())
    assert all(flag in note for flag in ("--grad-checkpoint", "--accumulate", "--modality-dropout"))
    assert bench.left_out(configure(), made_up()) == []


def test_two_batches_a_step_are_two_batches():
    setting = setting_of()
    found = Arrangement(setting, STEP, {"accumulate": 2})
    assert found.run(2) == (32, 2)
    assert found.state.step == 2


def test_what_makes_batches_can_be_sent_to_a_process(tmp_path: Path):
    setting = setting_of(made_up(tmp_path / "images.safetensors"))
    for on in (frozenset({"tokens"}), frozenset({"bytes"}), frozenset({"pack"})):
        ours, theirs = (made[setting.keys[0]] for made in (setting.batches(on), sent(setting.batches(on))))
        assert ours.image.shape == theirs.image.shape
        assert ours.image.dtype == theirs.image.dtype
        for name in ("modality", "slot", "present", "token", "label", "camera"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def test_a_pack_gives_every_sample():
    setting = setting_of()
    run = {rung.name: rung.make for rung in bench.workers_part(setting).rungs}["pack"]()
    assert run(3) == (24, 3)


def test_the_sizes_of_the_notes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "NOTES_PICTURES", 3)
    monkeypatch.setattr(bench, "NOTES_FRAME", FRAME)
    config, people = bench.notes_shape(Config())
    training = config.training
    assert (training.identities_per_batch, training.num_instances) == (8, 4)
    trained = people.identity < people.num_identities
    assert int((trained & (people.modality == RGB)).sum()) == 14_910
    assert people.num_identities == 320
    assert people.valid is not None
    assert len(people.valid.queries) == 32
    assert people.images.load(torch.tensor([0, 3, 5])).shape == (3, 3, *FRAME.stored)
    assert torch.equal(people.images.load(torch.tensor([0])), people.images.load(torch.tensor([3])))


# The command line


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the command line on made-up people, which it takes for the demo's."""
    monkeypatch.setattr(main, "load_data", lambda config, runs_dir, say: (made_up(), True))
    monkeypatch.setattr(bench, "QUERIES", 20)
    monkeypatch.setattr(bench, "GALLERY", 50)
    words = (
        "--identities-per-batch=4",
        "--num-instances=2",
        "--patch=8",
        "--embed-dim=16",
        "--tower-width=16",
        "--tower-layers=1",
        "--modalities=rgb,nir",
    )

    def run(*given: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(tmp_path),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as end,
        ):
            main.app(["bench", *given, "--budget=0", "--device=cpu", *words])
        assert isinstance(end.value.code, int)
        return end.value.code, out.getvalue(), err.getvalue()

    return run


def test_bench_prints_the_ladder_and_leaves_its_record(invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "switches_of", lambda setting: [SWITCHES["sampling"], SWITCHES["bar"]])
    code, out, err = invoke("--quick", "--project-epochs", "60")
    assert code == 0, err
    (run,) = tmp_path.glob("runs/reid/*-demo-bench")
    for words in ("S4-1", "S4-7", "a tower call per modality", "samples/s", "steps/s", "60 epochs of"):
        assert words in out
    lines = [line for line in out.splitlines() if line.strip()]
    assert [line for line in lines if "demo data" not in line] == []
    found = json.loads((run / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [part["name"] for part in found["parts"]] == [
        "sampling", "input", "alone", "cumulative", "ranking", "evaluation"
    ]  # fmt: skip
    for part in found["parts"]:
        for row in part["rows"]:
            assert 0 < row["samples_per_s"]["low"] <= row["samples_per_s"]["median"] <= row["samples_per_s"]["high"]
    assert found["projection"]["epochs"] == 60
    assert found["data"]["samples per epoch"] == 32
    assert (run / "report.html").is_file()


def test_only_measures_what_is_named(invoke, tmp_path: Path):
    code, out, _ = invoke("--only", "clip", "--project-epochs", "10")
    assert code == 0
    (run,) = tmp_path.glob("runs/reid/*-bench")
    found = json.loads((run / "bench.json").read_text())
    assert [[row["name"] for row in part["rows"]] for part in found["parts"]] == [["original", "clip"]]
    assert "no projection" in out
    code, _, err = invoke("--only", "luck")
    assert code == 2
    assert "takes a part or a row" in err
