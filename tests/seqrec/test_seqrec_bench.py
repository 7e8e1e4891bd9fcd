"""The ladder of seqrec: what it compares computes the same, and it says what the notes promise and what it measured."""

import contextlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.seqrec import bench, losses, main
from apps.seqrec.config import Config
from apps.seqrec.contest import Contest, prepare_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.dataset import (
    Batch,
    Sequences,
    Spans,
    compact,
    make_batch,
    query_spans,
    training_spans,
    without_features,
)
from apps.seqrec.evaluate import evaluate
from apps.seqrec.model import SeqRec
from apps.seqrec.originals import (
    Dictionaries,
    Padded,
    as_batch,
    gathered,
    inside_of,
    padded_loss,
    sorted_metrics,
    use_manual_attention,
    use_plain_dropout,
)
from apps.seqrec.train import build, loss_fn
from shared.ladder import Ladder
from tests.seqrec.test_seqrec_contest_train import settle
from tests.seqrec.test_seqrec_features import make_world, sequences_of
from tests.seqrec.test_seqrec_train import configure

LENGTHS = [5, 1, 9, 17, 3, 2, 14, 25, 6]
NUM_ITEMS = 40
MAX_LEN = 10
CLAIMS = ("S3-1", "S3-4", "S3-6", "S3-8", "S3-10", "S3-25", "S3-26", "S3-27")
SMALL = ("--max-len=10", "--embed-dim=8", "--num-blocks=1", "--batch-size=4", "--num-negatives=8", "--budget=0")


def world_sequences(*, seed: int = 0) -> Sequences:
    """Users with profiles, items with features and embeddings, some events with features of their own."""
    return sequences_of(make_world(LENGTHS, num_items=NUM_ITEMS, seed=seed))


def plain_sequences() -> Sequences:
    """Ids alone."""
    return sequences_of(make_world(LENGTHS, num_items=NUM_ITEMS), features=False, times=False, actions=False)


def config_of(**model: Any) -> Config:
    config: Config = configure(model={"dropout": 0.0, "next_action": True, **model}, loss="bce", batch_size=4)
    return replace(config, data=replace(config.data, max_len=MAX_LEN))


class Prepared:
    """A model and the original's objects on the same data, and one step."""

    def __init__(self, sequences: Sequences, config: Config) -> None:
        self.sequences, self.config = sequences, config
        self.c = build(config, sequences)
        assert isinstance(self.c.state.model, SeqRec)
        self.model = self.c.state.model
        settle(self.model)
        self.spans: Spans = training_spans(sequences, max_len=MAX_LEN)
        self.data = Dictionaries(sequences, self.spans.user, max_len=MAX_LEN, front=self.c.front)
        self.original: Padded = self.data.batch(self.spans)
        self.unseen_N: Tensor = self.original.id[2][inside_of(self.original)]

    def ours(self, *, packed: bool) -> Batch:
        """The step as training makes it, with the original's negatives."""
        batch = make_batch(
            self.sequences, self.spans, packed=packed, row_len=MAX_LEN + int(self.c.front), front=self.c.front
        )._replace(unseen=self.unseen_N)
        return compact(batch, num_items=self.sequences.num_items, whole=False) if self.c.compact else batch

    def loss(self, batch: Batch) -> Tensor:
        return loss_fn(self.model, batch, training=self.config.training, log_q_I=None)[0]


def gradients(model: SeqRec, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in found.keys() | expected.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["features", "ids"])
def test_gathered_tensors_equal_those_of_the_dictionaries(kind: str):
    p = Prepared(world_sequences() if kind == "features" else plain_sequences(), config_of())
    found = gathered(p.data, p.spans, p.unseen_N)
    assert torch.equal(found.id, p.original.id)
    assert torch.equal(found.row, p.original.row)
    assert torch.equal(found.targets, p.original.targets)
    assert (found.mark is None) == (kind == "ids")
    if found.mark is not None:
        assert p.original.mark is not None
        assert torch.equal(found.mark, p.original.mark)
    for part in range(3):
        expected = p.original.column[part]
        for name, value in found.column[part].items():
            # lists are as wide as the longest of all users here, as the longest of the step there
            width = expected[name].shape[2] if name.startswith("list") else None
            assert torch.equal(value[..., :width] if width else value, expected[name]), (part, name)
            assert not width or not value[..., width:].any()
        assert found.column[part].keys() == expected.keys()


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("kind", ["features", "ids"])
def test_every_arrangement_of_a_step_has_the_same_loss_and_gradients(kind: str, score: str):
    p = Prepared(world_sequences() if kind == "features" else plain_sequences(), config_of(score=score))
    first = padded_loss(p.model, p.data, p.original)
    expected = gradients(p.model, first)
    others = {
        "gathered": padded_loss(p.model, p.data, gathered(p.data, p.spans, p.unseen_N)),
        "rows": p.loss(as_batch(p.data, p.original)),
        "padded": p.loss(p.ours(packed=False)),
        "packed": p.loss(p.ours(packed=True)),
    }
    for name, loss in others.items():
        assert float(loss.detach()) == pytest.approx(float(first.detach()), rel=1e-5), name
        check_same_gradients(gradients(p.model, loss), expected)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_written_out_equals_the_fused_kernel(packed: bool, position: str):
    p = Prepared(world_sequences(), config_of(position=position))
    batch = p.ours(packed=packed)
    fused = p.loss(batch)
    expected = gradients(p.model, fused)
    use_manual_attention(p.model)
    written_out = p.loss(batch)
    assert float(written_out.detach()) == pytest.approx(float(fused.detach()), rel=1e-5)
    check_same_gradients(gradients(p.model, written_out), expected)


def test_plain_dropout_is_everywhere_and_drops_as_often():
    p = Prepared(plain_sequences(), config_of(dropout=0.25))
    ours = [type(module).__name__ for module in p.model.modules() if type(module).__name__ == "Dropout"]
    use_plain_dropout(p.model)
    plain = [module for module in p.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(plain) == len(ours) == 1 + p.config.model.num_blocks
    assert {module.p for module in plain} == {0.25}


def test_one_matrix_of_logits_and_chunks_of_them_are_the_same_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", 16 * 4 * 30)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(1, 31, (100,), generator=generator)
    query, item = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (100, 31))
    plain = bench.plain_ce(target, query, item)
    expected = torch.autograd.grad(plain, (query, item))
    chunks = losses.full_cross_entropy(query, item, target)
    assert float(chunks.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for ours, other in zip(torch.autograd.grad(chunks, (query, item)), expected, strict=True):
        torch.testing.assert_close(ours, other)
    assert float(plain.detach()) == pytest.approx(float(F.cross_entropy(query @ item[1:].T, target - 1).detach()))


@pytest.mark.parametrize("together", [False, True])
def test_sorting_user_by_user_gives_the_metrics_that_are_counted(together: bool):
    p = Prepared(world_sequences(), config_of())
    p.model.eval()
    spans = query_spans(p.sequences, "valid", max_len=MAX_LEN)
    item = p.model.candidates().detach()
    hits, gain = sorted_metrics(p.model, p.sequences, spans, item, config=p.config, k=5, together=together)
    found = evaluate(p.model, p.sequences, "valid", config=p.config, packed=True, protocol="filtered")
    users = spans.user.numel()
    assert users > 3
    assert hits > 0
    assert found["HR@5"] == pytest.approx(hits / users)
    assert found["NDCG@5"] == pytest.approx(gain / users, abs=1e-6)


def test_the_first_users_are_evaluated_as_among_all():
    sequences = world_sequences()
    spans = query_spans(sequences, "valid", max_len=MAX_LEN)
    some, count = bench.first_users(sequences, 3)
    found = query_spans(some, "valid", max_len=MAX_LEN)
    assert count == 3
    for ours, all_users in zip(found, spans, strict=True):
        assert torch.equal(ours, all_users[:3])


def names_of(ladder: Ladder) -> dict[str, list[str]]:
    return {part.name: [rung.name for rung in part.rungs] for part in ladder.parts}


def promises(ladder: Ladder) -> set[str]:
    """The ids that a row, or a sentence on what is not measured, speaks of."""
    texts = [rung.claim for part in ladder.parts for rung in part.rungs] + [one.claim for one in ladder.unmeasured]
    return set(re.findall(r"[ST]\d?-\d+", " ".join(texts)))


def test_every_promise_is_measured_or_said_not_to_be():
    sequences = world_sequences()
    config = replace(config_of(dropout=0.2), training=replace(config_of().training, loss="ce", ks=(5,)))
    ladder = bench.ladder(config, sequences)
    measured = promises(replace(ladder, unmeasured=()))
    assert set(CLAIMS) <= measured
    assert {f"S3-{i}" for i in (*range(1, 11), *range(25, 29))} <= promises(ladder)
    assert ladder.epoch is not None
    assert {ladder.epoch.train, ladder.epoch.evaluation} <= set(names_of(ladder))


def test_switches_that_change_nothing_here_are_left_out():
    with_all = bench.ladder(replace(config_of(dropout=0.2)), world_sequences())
    switches = ["original", "tensors", "rows", "attention", "dropout", "layout", "optimizer", "logging"]
    assert names_of(with_all)["cumulative"] == switches  # the loss is the original's, the precision fp32
    plain = names_of(bench.ladder(config_of(dropout=0.0), plain_sequences()))["cumulative"]
    assert plain == ["original", "tensors", "attention", "layout", "optimizer", "logging"]
    features_off = names_of(bench.ladder(config_of(features=False), world_sequences()))["cumulative"]
    assert "rows" not in features_off


def test_pointwise_attention_has_no_kernel_to_compare():
    with pytest.raises(ValueError, match="use --attention softmax"):
        bench.ladder(config_of(attention="hstu"), world_sequences())


def test_what_the_original_lacks_is_named():
    config = config_of(time_input=True, grad_checkpoint=True)
    config = replace(config, training=replace(config.training, optimizer="muon"))
    (note,) = bench.left_out(config)
    assert all(flag in note for flag in ("--time-input", "--grad-checkpoint", "--optimizer"))
    assert bench.left_out(config_of()) == []


def test_the_last_rung_is_a_step_of_train():
    sequences = world_sequences()
    setting = bench.make_setting(config_of(), sequences)
    on = frozenset(switch.name for switch in bench.switches_of(setting))
    c = bench.components(setting, on)
    theirs = build(setting.config, sequences)
    assert [type(o) for o in c.state.optimizers] == [type(o) for o in theirs.state.optimizers]
    assert c.state.optimizers[0].defaults["fused"] is True
    assert c.amp == theirs.amp
    for (name, found), (_, expected) in zip(
        c.state.model.state_dict().items(), theirs.state.model.state_dict().items(), strict=True
    ):
        assert torch.equal(found, expected), name
    plain = bench.components(setting, frozenset())
    assert not plain.state.optimizers[0].defaults["fused"]


@pytest.fixture
def contest(tmp_path: Path) -> Path:
    """A folder with a small pack in it."""
    source = write_contest(tmp_path / "contest", num_users=40, num_items=50, mean_length=12, seed=3)
    made: Contest = prepare_contest(source, tmp_path / "pack", workers=1)
    assert made.sequences.num_users == 40
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


def test_bench_prints_the_ladder_and_leaves_its_record(contest: Path, capsys: pytest.CaptureFixture[str]):
    assert invoke(contest, "bench", "--quick", "--data-path", "pack", "--project-epochs", "1000", *SMALL) == 0
    said = capsys.readouterr().out
    (run,) = contest.glob("runs/seqrec/*-bench")
    assert run.name in said
    for words in ("fused attention", "S3-25", "users/s", "steps/s", "1,000 epochs of", "training", "evaluation"):
        assert words in said
    assert "demo data" not in said
    found = json.loads((run / "bench.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    names = [part["name"] for part in found["parts"]]
    assert names == ["input", "alone", "cumulative", "memory", "losses", "evaluation"]
    for part in found["parts"]:
        for row in part["rows"]:
            assert 0 < row["samples_per_s"]["low"] <= row["samples_per_s"]["median"] <= row["samples_per_s"]["high"]
            assert math.isfinite(row["steps_per_s"]["median"])
    assert found["projection"]["epochs"] == 1000
    assert found["data"]["demo"] is False
    tags = Tags((run / "report.html").read_text()).names
    assert tags.count("svg") == len(names)


def test_only_measures_what_is_named(contest: Path, capsys: pytest.CaptureFixture[str]):
    words = ("bench", "--data-path", "pack", "--only", "attention", "--project-epochs", "10", *SMALL)
    assert invoke(contest, *words) == 0
    (run,) = contest.glob("runs/seqrec/*-bench")
    found = json.loads((run / "bench.json").read_text())
    assert [[row["name"] for row in part["rows"]] for part in found["parts"]] == [["original", "attention"]]
    assert found["projection"] is None
    assert "no projection" in capsys.readouterr().out
    assert invoke(contest, "bench", "--data-path", "pack", "--only", "luck", *SMALL) == 2
    assert "takes a part or a row" in capsys.readouterr().err


def test_every_line_on_demo_data_says_so(contest: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    def small_demo(folder: Path) -> Path:
        return write_contest(folder, num_users=40, num_items=50, mean_length=12, seed=3)

    monkeypatch.setattr("apps.seqrec.demo.write_demo", small_demo)
    assert invoke(contest, "bench", "--only", "losses", "--only", "input", *SMALL) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) > 8
    assert [line for line in lines if "demo data" not in line] == []
    assert list(contest.glob("runs/seqrec/*-demo-bench"))


def test_the_sizes_of_the_notes_are_the_contests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "NOTES_USERS", 30)
    monkeypatch.setattr(bench, "NOTES_ITEMS", 40)
    monkeypatch.setattr(bench, "NOTES_MEAN", 8)
    for _ in range(2):  # made once, then read
        config, sequences = bench.notes_shape(Config(), tmp_path)
    assert (config.training.batch_size, config.data.max_len) == (128, 101)
    assert (sequences.num_users, sequences.num_items) == (30, 40)


def test_shapes_that_cannot_be_are_refused(contest: Path, capsys: pytest.CaptureFixture[str]):
    assert invoke(contest, "bench", "--shape", "huge") == 2
    assert "own or notes" in capsys.readouterr().err
    assert invoke(contest, "bench", "--shape", "notes", "--data-path", "pack") == 2
    assert "leave --data-path out" in capsys.readouterr().err


def test_a_history_that_holds_every_item_ends():
    sequences = without_features(world_sequences())
    few = replace(sequences, item=torch.ones_like(sequences.item), item_ids=("one",))
    spans = training_spans(few, max_len=MAX_LEN)
    data = Dictionaries(few, spans.user, max_len=MAX_LEN, front=False)
    assert int(data.batch(spans).id[2].max()) == 1
