"""The training loop: it learns, divides without a difference, propagates once a step, stops, saves and resumes."""

import functools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import apps.graphrec.model
from apps.graphrec.advice import memory_text, warnings, without_effect
from apps.graphrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.graphrec.dataset import Interactions
from apps.graphrec.evaluate import baselines, evaluate
from apps.graphrec.model import GraphFilter, GraphRec
from apps.graphrec.objective import Step, loss_fn
from apps.graphrec.train import (
    Components,
    Outcome,
    build,
    epoch_batches,
    fit,
    learning_rate_factor,
    make_model,
    peak_lr,
    restore,
    write_result,
)
from shared.amp import NonFiniteError, amp_step
from shared.checkpoint import MismatchError, load_checkpoint, load_weights, newest_checkpoint
from shared.log import RunLog, StopSignal, read_metrics
from shared.ranking import Lists
from tests.graphrec.test_graphrec_losses import clcrec_loop, cross_entropy_of_lists

TOPICS = 4
CPU = torch.device("cpu")


def lists_of(user: Tensor, item: Tensor, num_users: int) -> Lists:
    key = torch.unique(user * 10_000 + item)
    ptr = torch.searchsorted(key, torch.arange(num_users + 1) * 10_000)
    return Lists(ptr, (key % 10_000).int())


def topical_data(
    num_users: int = 60, num_items: int = 40, *, num_cold: int = 0, has_valid: bool = True, seed: int = 0
) -> Interactions:
    """Users who like the items of one topic each; content tells the topic of an item, but for some noise."""
    g = torch.Generator().manual_seed(seed)
    topic_U, topic_I = torch.arange(num_users) % TOPICS, torch.arange(num_items) % TOPICS
    user, item = ((topic_U[:, None] == topic_I) & (torch.rand(num_users, num_items, generator=g) < 0.8)).nonzero().t()
    draw = torch.rand(user.numel(), generator=g)
    stage = (draw > 0.6).long() + (draw > 0.8).long()
    is_cold = torch.zeros(num_items, dtype=torch.bool)
    is_cold[num_items - num_cold :] = True
    stage = torch.where(is_cold[item], 1 + (draw > 0.5).long(), stage)
    stage[torch.cat([torch.ones(1, dtype=torch.bool), user.diff() > 0])] = 0  # everybody trains on an item
    if not has_valid:
        stage[stage == 1] = 0
    one_hot = F.one_hot(topic_I, TOPICS).float()
    content = {name: one_hot + 0.3 * torch.randn(num_items, TOPICS, generator=g) for name in "va"}
    train, valid, test = (lists_of(user[stage == s], item[stage == s], num_users) for s in range(3))
    return Interactions(
        train=train,
        valid=valid,
        test=test,
        content=content,
        is_cold=is_cold if num_cold else None,
        item_ids=tuple(f"i{i}" for i in range(num_items)),
        user_ids=tuple(f"u{u}" for u in range(num_users)),
        fingerprint="topical",
        name="topical",
        split="by dice",
    )


def configure(
    kind: str = "lightgcn", *, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any
) -> Config:
    base = {"epochs": 3, "batch_size": 64, "lr": 0.01, "device": "cpu", "precision": "fp32", "log_every": 3}
    base |= {"ks": (5,), "select": "Recall@5", "baselines": "popularity"}
    sizes = {"model": kind, "embed_dim": 8, "hidden_dim": 16, "layers": 2, "filter_rank": 8}
    return Config(
        data=replace(DataConfig(), **(data or {})),
        model=replace(ModelConfig(), **{**sizes, **(model or {})}),
        training=replace(TrainConfig(), **{**base, **training}),
    )


# name -> (model, its settings, those of training)
MODES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mf, softmax": ("mf", {}, {"num_negatives": 16}),
    "mf, bpr": ("mf", {}, {"loss": "bpr"}),
    "lightgcn, softmax": ("lightgcn", {}, {"num_negatives": 16}),
    "lightgcn, bpr": ("lightgcn", {}, {"loss": "bpr", "num_negatives": 3}),
    "lightgcn, shared bpr": ("lightgcn", {}, {"loss": "bpr", "negatives": "shared", "num_negatives": 10}),
    "lightgcn, own softmax": ("lightgcn", {}, {"negatives": "device", "num_negatives": 6}),
    "lightgcn, cosine": ("lightgcn", {"score": "cosine"}, {"num_negatives": 16, "temperature": 0.2}),
    "lightgcn, own cosine": (
        "lightgcn",
        {"score": "cosine"},
        {"negatives": "device", "num_negatives": 6, "temperature": 0.2},
    ),
    "lightgcn, inbatch": ("lightgcn", {}, {"loss": "inbatch"}),
    "lightgcn, directau": ("lightgcn", {"score": "cosine"}, {"loss": "directau", "gamma": 0.3}),
    "simgcl": ("simgcl", {}, {"contrast_weight": 0.02, "num_negatives": 16}),
    "xsimgcl": ("xsimgcl", {}, {"contrast_weight": 0.02, "contrast_nodes": 20, "loss": "bpr"}),
    "content, softmax": ("content", {}, {"num_negatives": 16}),
    "content, bpr": ("content", {}, {"loss": "bpr", "num_negatives": 2}),
    "clcrec-graph": ("clcrec-graph", {}, {"num_negatives": 8, "temperature": 0.2}),
    "clcrec-graph, shared, full": (
        "clcrec-graph",
        {},
        {"num_negatives": 16, "negatives": "shared", "temperature": 0.2, "graph_view": "full"},
    ),
}


def configured(name: str, **training: Any) -> Config:
    kind, model, own = MODES[name]
    return configure(kind, model=model, **{**own, **training})


def data_for(config: Config) -> Interactions:
    return topical_data(num_cold=8 if config.model.model in ("content", "clcrec-graph") else 0)


def run(config: Config, run_dir: Path, data: Interactions | None = None, *, resume: bool = False) -> Outcome:
    c = build(config, data or data_for(config))
    found = newest_checkpoint(run_dir / "checkpoints", warn=print) if resume else None
    start = restore(c, *found) if found else None
    step = start.state.step if start else None
    with RunLog(run_dir, say=lambda line: None, resume_step=step) as log, StopSignal(say=print) as stop:
        return fit(c, run_dir, log=log, stop=stop, start=start)


def weights(outcome: Outcome) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in outcome.state.model.state_dict().values()])


def table_of(c: Components) -> Tensor:
    assert isinstance(c.state.model, GraphRec)
    return c.state.model.table.detach().double()


def objective(c: Components) -> functools.partial[tuple[Tensor, dict[str, Tensor]]]:
    return functools.partial(loss_fn, training=c.config.training, plan=c.plan, log_q_I=c.log_q_I, columns=c.columns)


def loss_and_gradients(c: Components, step: Step) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    c.state.model.zero_grad()
    loss, terms = objective(c)(c.state.model, step)
    loss.backward()
    gradients = [p.grad.clone() for p in c.state.model.parameters() if p.grad is not None]
    return loss.detach(), {name: value.detach() for name, value in terms.items()}, gradients


@pytest.mark.parametrize("name", MODES)
def test_every_mode_ranks_items_of_the_users_topic_first(name, tmp_path):
    config = configured(name, epochs=30, eval_every=100)
    data = data_for(config)
    outcome = run(config, tmp_path, data)
    assert outcome.metrics is not None
    key = "Recall@5" if data.is_cold is None else "all/Recall@5"
    popularity = baselines(data, ("test",), config=config, device=CPU)["popularity"]["test"][key]
    assert outcome.metrics["test"][key] > max(0.6, 2 * popularity)
    if data.is_cold is not None:
        assert outcome.metrics["test"]["cold/Recall@5"] > 0.9  # 2 of 8 cold items are of the topic
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.05 * abs(losses[0])


@pytest.mark.parametrize("name", MODES)
def test_micro_batches_change_neither_loss_nor_gradients(name):
    found = []
    for accumulate in (1, 3):
        c = build(configured(name, accumulate=accumulate, reg_weight=0.1), data_for(configured(name)))
        step = next(epoch_batches(c, epoch=0))
        assert len(step.parts) == accumulate
        found.append(loss_and_gradients(c, step))
    (loss, terms, gradients), (other_loss, other_terms, other_gradients) = found
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    assert list(terms) == list(other_terms)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def shared_by_batch(c: Components, epoch: int = 0) -> list[Step]:
    return list(epoch_batches(c, epoch=epoch))


@pytest.mark.parametrize("name", ["lightgcn, softmax", "lightgcn, bpr", "lightgcn, inbatch", "lightgcn, directau"])
def test_batches_that_share_a_propagation_are_the_mean_of_their_losses_at_the_same_weights(name):
    together = build(configured(name, propagate_every=3), topical_data())
    apart = build(configured(name), topical_data())
    step = next(epoch_batches(together, epoch=1))
    assert len(step.parts) == 3
    loss, _, (gradient,) = loss_and_gradients(together, step)
    singles = [loss_and_gradients(apart, single) for single in shared_by_batch(apart, epoch=1)[:3]]
    torch.testing.assert_close(loss, torch.stack([single[0] for single in singles]).mean())
    mean = torch.stack([single[2][0] for single in singles]).mean(0)
    torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-8)
    assert together.steps_per_epoch == -(-apart.steps_per_epoch // 3)


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize(("kind", "times"), [("lightgcn", 1), ("simgcl", 3), ("xsimgcl", 1), ("mf", 0)])
def test_a_step_propagates_once_whatever_is_in_it(kind, times, accumulate, every, monkeypatch):
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    for name in ("propagate", "propagate_noisy"):
        monkeypatch.setattr(apps.graphrec.model, name, counted(getattr(apps.graphrec.model, name)))
    c = build(configure(kind, accumulate=accumulate, propagate_every=every, num_negatives=8), topical_data())
    step = next(epoch_batches(c, epoch=0))
    assert len(step.parts) == accumulate * every
    loss_and_gradients(c, step)
    assert calls == times


def propagated(c: Components, table: Tensor) -> Tensor:
    """LightGCN over the dense matrix."""
    users, items = c.data.num_users, c.data.num_items
    ones = torch.zeros(users + items, users + items, dtype=torch.float64)
    ones[c.user_P, users + c.item_P] = 1
    ones += ones.t().clone()
    scale = torch.where(ones.sum(1) > 0, ones.sum(1).rsqrt(), 0)
    matrix = scale[:, None] * ones * scale
    layers = c.config.model.layers
    return torch.stack([torch.linalg.matrix_power(matrix, k) @ table for k in range(layers + 1)]).mean(0)


@pytest.mark.parametrize("name", [name for name in MODES if name.startswith(("mf", "lightgcn"))])
def test_a_step_is_the_loop_over_pairs_and_negatives_on_the_dense_graph(name):
    config = configured(name, reg_weight=0.05)
    c = build(config, topical_data())
    step = next(epoch_batches(c, epoch=2))
    (part,) = step.parts
    batch, users = part.batch, c.data.num_users
    table = table_of(c).requires_grad_()
    vectors = propagated(c, table) if config.model.model == "lightgcn" else table
    unit = F.normalize(vectors, dim=1)
    chosen = unit if config.model.score == "cosine" else vectors

    def score(user: int, item: int) -> Tensor:
        return chosen[user] @ chosen[users + item] / config.training.temperature

    lists, negatives = [], []
    share = torch.bincount(c.item_P, minlength=c.data.num_items).double() / c.data.num_pairs
    for b, (user, item) in enumerate(zip(batch.user.tolist(), batch.item.tolist(), strict=True)):
        if batch.negative is not None:
            rivals = batch.negative[b].tolist()
        elif batch.shared is not None:
            mine = set(c.item_P[c.user_P == user].tolist())
            rivals = [i for i in batch.shared.tolist() if i not in mine]
        else:
            rivals = []
        correct = share.log() if c.plan.loss == "inbatch" else torch.zeros_like(share)
        lists.append([score(user, i) - correct[i] for i in (item, *rivals)])
        negatives.append(rivals)
    if c.plan.loss == "directau":
        pairs = [(unit[u] - unit[users + i]).square().sum() for u, i in zip(batch.user, batch.item, strict=True)]
        ranking = torch.stack(pairs).mean()
        for side in (batch.user, batch.item + users):
            distance = torch.cdist(unit[side], unit[side]).square()
            upper = torch.ones_like(distance).triu(1) > 0
            ranking = ranking + 0.3 * 0.5 * torch.log((-2 * distance[upper]).exp().mean())
    elif c.plan.loss == "bpr":
        ranking = torch.stack([torch.stack([F.softplus(s - x[0]) for s in x[1:]]).mean() for x in lists]).mean()
    else:
        ranking = cross_entropy_of_lists(lists)
    rows = [batch.user, batch.item + users]
    if batch.negative is not None:
        rows.append(batch.negative.flatten() + users)
    elif batch.shared is not None:
        rows.append(batch.shared + users)
    penalty = torch.stack([0.5 * table[row].square().sum(1).mean() for row in rows]).sum()
    wanted = ranking + 0.05 * penalty
    wanted.backward()
    loss, _, (gradient,) = loss_and_gradients(c, step)
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert table.grad is not None
    torch.testing.assert_close(gradient.double(), table.grad, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("view", ["fast", "full"])
def test_clcrec_graph_is_the_sum_of_its_four_terms(view):
    config = configured(
        "clcrec-graph", graph_view=view, lr_lambda=0.3, reg_weight=0.05, graph_lambda=0.7, graph_temp=0.4
    )
    c = build(config, data_for(config))
    (part,) = (step := next(epoch_batches(c, epoch=0))).parts
    batch, users, table = part.batch, c.data.num_users, table_of(c)
    assert batch.negative is not None
    assert part.replaced is not None
    model = c.state.model
    assert isinstance(model, GraphRec)
    ids, content = table[users:], model.encode(model.content).detach().double()
    places = torch.cat([batch.item[:, None], batch.negative], dim=1)
    contrast, preference = clcrec_loop(table[batch.user], ids, content, places, part.replaced, 0.2)
    norm = 0.5 * (table[batch.user].norm(dim=1).mean() + ids[places.flatten()].norm(dim=1).mean())
    items_of = [c.item_P[c.user_P == u] for u in range(users)]
    users_of = [c.user_P[c.item_P == i] for i in range(c.data.num_items)]
    unique = sorted(set(batch.user.tolist()))
    neighbour = torch.stack([ids[items_of[u]].mean(0) for u in unique])
    cooccur = torch.stack([torch.stack([table[users_of[i]].mean(0) for i in items_of[u]]).mean(0) for u in unique])
    first, second = (neighbour, cooccur) if view == "full" else (table[unique], neighbour)
    similar = F.normalize(first, dim=1) @ F.normalize(second, dim=1).t() / 0.4
    graph = F.cross_entropy(similar, torch.arange(len(unique)))
    loss, terms, _ = loss_and_gradients(c, step)
    wanted = {"contrast": contrast, "preference": preference, "reg": norm, "graph": graph}
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-5
    )
    total = 0.3 * contrast + 0.7 * preference + 0.05 * norm + 0.7 * graph
    assert float(loss) == pytest.approx(float(total), rel=1e-5)


def test_without_a_graph_weight_clcrec_graph_is_clcrec():
    config = configured("clcrec-graph", graph_lambda=0.0)
    c = build(config, data_for(config))
    step = next(epoch_batches(c, epoch=0))
    assert step.wholes == []
    assert set(loss_and_gradients(c, step)[1]) == {"contrast", "preference", "reg"}


def test_views_are_contrasted_over_no_more_nodes_than_allowed():
    for most, expected in ((5, 5), (0, 64)):
        c = build(configured("xsimgcl", contrast_nodes=most, contrast_temperature=0.3), topical_data())
        step = next(epoch_batches(c, epoch=0))
        user, item = step.wholes[0]
        model = c.state.model
        assert step.noise is not None
        state = step.noise.get_state()
        views = model(step.noise)
        wanted = torch.zeros(())
        for rows in (user[:expected].unique(), item[:expected].unique() + c.data.num_users):
            a, b = (F.normalize(view.detach()[rows], dim=1) for view in views.contrast)
            wanted += F.cross_entropy(a @ b.t() / 0.3, torch.arange(rows.numel()))
        step.noise.set_state(state)
        assert float(loss_and_gradients(c, step)[1]["views"]) == pytest.approx(float(wanted), rel=1e-5)


def test_every_training_pair_is_met_once_an_epoch_and_no_negative_is_a_positive():
    data = topical_data()
    positives = [set(data.train.item[a:b].tolist()) for a, b in zip(data.train.ptr, data.train.ptr[1:], strict=False)]
    for every in (1, 2):
        c = build(configured("lightgcn, bpr", propagate_every=every, batch_size=50), data)
        seen = []
        for step in epoch_batches(c, epoch=0):
            for part in step.parts:
                batch = part.batch
                assert batch.negative is not None
                for user, item, row in zip(
                    batch.user.tolist(), batch.item.tolist(), batch.negative.tolist(), strict=True
                ):
                    assert item in positives[user]
                    assert len(set(row)) == len(row)
                    assert not set(row) & positives[user]
                    seen.append((user, item))
            assert sum(part.share for part in step.parts) == pytest.approx(1)
        assert sorted(seen) == sorted(zip(c.user_P.tolist(), c.item_P.tolist(), strict=True))


def test_shared_negatives_are_marked_where_they_are_positives_of_the_user():
    data = topical_data()
    c = build(configured("lightgcn, softmax"), data)
    steps = shared_by_batch(c)
    for step in steps:
        batch = step.parts[0].batch
        assert batch.shared is not None
        assert batch.excluded is not None
        assert batch.shared.unique().numel() == 16
        for user, row in zip(batch.user.tolist(), batch.excluded.tolist(), strict=True):
            mine = set(data.train.item[data.train.ptr[user] : data.train.ptr[user + 1]].tolist())
            assert row == [item in mine for item in batch.shared.tolist()]
    first, second = (step.parts[0].batch.shared for step in steps[:2])
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_cold_items_are_never_drawn():
    config = configured("clcrec-graph", num_negatives=12)
    data = data_for(config)
    c = build(config, data)
    assert data.is_cold is not None
    for step in epoch_batches(c, epoch=0):
        assert step.parts[0].batch.negative is not None
        assert not data.is_cold[step.parts[0].batch.negative].any()


def test_held_out_items_can_be_drawn_unless_all_are_excluded():
    data = topical_data()
    held = {
        (u, i)
        for part in (data.valid, data.test)
        for u in range(data.num_users)
        for i in part.item[part.ptr[u] : part.ptr[u + 1]].tolist()
    }

    def drawn(exclude: str) -> int:
        c = build(configured("lightgcn, bpr", neg_exclude=exclude, num_negatives=20), data)
        found = 0
        for step in epoch_batches(c, epoch=0):
            batch = step.parts[0].batch
            assert batch.negative is not None
            rows = zip(batch.user.tolist(), batch.negative.tolist(), strict=True)
            found += sum((user, item) in held for user, row in rows for item in row)
        return found

    assert drawn("train") > 0
    assert drawn("all") == 0


@pytest.mark.parametrize("name", ["lightgcn, bpr", "lightgcn, softmax", "clcrec-graph", "xsimgcl"])
def test_an_epoch_begun_in_the_middle_has_the_same_steps(name):
    config = configured(name, batch_size=20)
    c = build(config, data_for(config))
    whole = list(epoch_batches(c, epoch=4))
    for one, other in zip(whole[3:], epoch_batches(c, epoch=4, first_step=3), strict=True):
        for part, again in zip(one.parts, other.parts, strict=True):
            assert_equal(part, again)
        assert_equal(one.wholes, other.wholes)
        assert (one.noise is None) == (other.noise is None)
        if one.noise is not None and other.noise is not None:
            assert torch.equal(one.noise.get_state(), other.noise.get_state())


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, tuple | list):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again, other = (run(configure(seed=seed), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.metrics == again.metrics


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lightgcn": ("lightgcn, softmax", {}),
    "own negatives drawn far ahead": ("lightgcn, bpr", {"batch_size": 16}),
    "average, two batches a step": ("lightgcn, softmax", {"ema_decay": 0.9, "propagate_every": 2, "batch_size": 24}),
    "noise": ("simgcl", {"optimizer": "adamw", "lr_scheduler": "step", "lr_step_epochs": 1, "warmup_steps": 2}),
    "clcrec-graph, accumulated": ("clcrec-graph", {"accumulate": 2, "clip_norm": 1.0}),
    "in batch": ("lightgcn, inbatch", {"lr_scheduler": "cosine"}),
}


def cut_by_signal(config: Config, run_dir: Path, at: int, *, name: int = signal.SIGTERM) -> Outcome:
    """A run that gets a signal after that many steps."""
    steps = 0
    c = build(config, data_for(config))
    with RunLog(run_dir, say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:

        def count(note: str | None) -> None:
            nonlocal steps
            steps += 1
            if steps == at:
                signal.raise_signal(name)

        return fit(c, run_dir, log=log, stop=stop, on_step=count)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_like_one_that_was_not(name, tmp_path):
    mode, options = VARIANTS[name]
    config = configured(mode, **{"epochs": 2, "save_every": 3, "norm_every": 2, **options})
    whole = run(config, tmp_path / "whole")
    cut_at = build(config, data_for(config)).steps_per_epoch + 2
    cut = cut_by_signal(config, tmp_path / "cut", cut_at)
    assert cut.metrics is None
    assert cut.state.step == cut_at
    resumed = run(config, tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert whole.progress == resumed.progress
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time") and not k.endswith("_per_s")} for line in lines]


class Killed(BaseException):
    """Stands for a process that ended without a word."""


def test_a_run_killed_between_two_steps_ends_like_one_that_was_not(tmp_path):
    config = configured("lightgcn, softmax", epochs=3, save_every=2)
    whole = run(config, tmp_path / "whole")
    steps = 0

    def kill(note: str | None) -> None:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise Killed

    c = build(config, topical_data())
    with (
        pytest.raises(Killed),
        RunLog(tmp_path / "cut", say=lambda line: None) as log,
        StopSignal(say=print) as stop,
    ):
        fit(c, tmp_path / "cut", log=log, stop=stop, on_step=kill)
    found = newest_checkpoint(tmp_path / "cut" / "checkpoints", warn=print)
    assert found is not None
    assert found[1]["step"] < 8
    resumed = run(config, tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_a_signal_during_validation_saves_and_resumes_with_the_validation(tmp_path):
    config = configured("lightgcn, softmax", epochs=2)
    whole = run(config, tmp_path / "whole")
    c = build(config, topical_data())
    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:
        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_users=lambda done: signal.raise_signal(signal.SIGINT))
    assert cut.metrics is None
    resumed = run(config, tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_early_stopping_and_the_best_checkpoint_follow_validation(tmp_path):
    outcome = run(configured("lightgcn, softmax", epochs=80, patience=2, lr=0.1), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    values = [line["Recall@5"] for line in lines]
    best = values.index(max(values))
    assert len(values) == best + 3 < 80
    assert outcome.progress.best_epoch == lines[best]["epoch"]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.safetensors")["progress"]["best"] == max(values)
    assert outcome.metrics is not None
    assert outcome.metrics["valid"]["Recall@5"] == max(values)


def test_without_a_validation_part_all_epochs_run_and_the_last_weights_are_tested(tmp_path):
    config = configured("lightgcn, softmax", epochs=4, patience=1)
    data = topical_data(has_valid=False)
    outcome = run(config, tmp_path, data)
    assert outcome.metrics is not None
    assert list(outcome.metrics) == ["test"]
    assert outcome.state.epoch == 4
    assert outcome.metrics["test"] == evaluate(outcome.state.model, data, "test", config=config)
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()
    assert "testing the last weights" in (tmp_path / "train.log").read_text()


def test_the_average_is_what_is_measured(tmp_path):
    config = configured("lightgcn, softmax", epochs=1, ema_decay=0.5)
    outcome = run(config, tmp_path)
    assert outcome.state.ema is not None
    assert outcome.metrics is not None
    assert outcome.metrics["test"] == evaluate(outcome.state.ema, topical_data(), "test", config=config)
    assert isinstance(outcome.state.ema, GraphRec)
    assert isinstance(outcome.state.model, GraphRec)
    assert outcome.state.ema.graph_column is outcome.state.model.graph_column
    assert outcome.state.ema.table is not outcome.state.model.table


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 0.02}, "config.training.lr: 0.01 in the checkpoint, 0.02 now"),
        ({"model": {"embed_dim": 4}}, "config.model.embed_dim"),
        ({"propagate_every": 2}, "config.training.propagate_every"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_differing_key(change, key, tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=key):
        run(configure(epochs=1, **change), tmp_path, resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=r"data\.fingerprint"):
        run(configure(epochs=1), tmp_path, replace(topical_data(), fingerprint="other"), resume=True)


def test_what_changes_no_weight_may_differ_on_resume(tmp_path):
    run(configure(epochs=1), tmp_path)
    run(configure(epochs=1, log_every=7, keep=5, memory_mib=1, num_workers=4, baselines="all"), tmp_path, resume=True)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = configured("lightgcn, softmax")
    c = build(config, topical_data())
    done = 0

    def poison(note: str | None) -> None:
        nonlocal done
        done += 1
        if done == c.steps_per_epoch + 1:
            with torch.no_grad():
                next(c.state.model.parameters()).fill_(float("nan"))

    with (
        RunLog(tmp_path, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
        pytest.raises(NonFiniteError, match=r"the last good checkpoint is .*step-"),
    ):
        fit(c, tmp_path, log=log, stop=stop, on_step=poison)
    found = newest_checkpoint(tmp_path / "checkpoints", warn=print)
    assert found is not None
    assert all(torch.isfinite(value).all() for value in found[1]["model"].values())


def test_the_logged_loss_is_made_of_its_terms(tmp_path):
    run(configured("clcrec-graph", epochs=1, reg_weight=0.5, lr_lambda=0.25, graph_lambda=0.2), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert lines
    for line in lines:
        total = 0.25 * line["contrast"] + 0.75 * line["preference"] + 0.5 * line["reg"] + 0.2 * line["graph"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_metrics_lines_are_json_with_finite_values_or_null(tmp_path):
    run(configure(epochs=1, norm_every=1), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = {json.loads(line, parse_constant=lambda name: pytest.fail(name))["kind"] for line in lines}
    assert kinds == {"train", "norm", "valid"}


def test_the_learning_rate_is_a_function_of_the_step():
    c = build(configure(epochs=4, lr_scheduler="cosine", warmup_steps=4, min_lr=0.1), topical_data())
    factors = [learning_rate_factor(c, step) for step in range(4 * c.steps_per_epoch + 1)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)


def test_the_learning_rate_can_follow_the_root_of_the_batch_size():
    assert peak_lr(TrainConfig(lr=1e-3, batch_size=1024)) == 1e-3
    scaled = TrainConfig(lr=1e-3, batch_size=1024, lr_scale="sqrt")
    assert peak_lr(scaled) == pytest.approx(2e-3)
    c = build(configure(lr=1e-3, batch_size=1024, lr_scale="sqrt"), topical_data())
    assert c.state.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-3)


@pytest.mark.parametrize("kind", ["gfcf", "bspm"])
def test_a_filter_is_fitted_measured_and_loaded_again_without_a_step(kind, tmp_path):
    config, data = configure(kind), topical_data()
    outcome = run(config, tmp_path)
    assert outcome.metrics is not None
    assert outcome.state.step == 0
    assert outcome.metrics["test"]["Recall@5"] > 0.6
    (path,) = (tmp_path / "checkpoints").glob("step-*.safetensors")
    state, _ = load_weights(path)
    model, _ = make_model(config, data, CPU)
    model.load_state_dict(state)
    assert evaluate(model, data, "test", config=config) == outcome.metrics["test"]
    c = build(config, data)
    with RunLog(tmp_path, say=print) as log, StopSignal(say=print) as stop:
        result = write_result(c, tmp_path, outcome, notes=[], command="as typed", git=None)
        again = fit(c, tmp_path, log=log, stop=stop, start=restore(c, path, load_checkpoint(path)))
    assert again.metrics == outcome.metrics
    assert [row["model"] for row in result["table"]] == [kind, "popularity"]
    assert "block iteration" in (tmp_path / "train.log").read_text()


def test_a_result_says_what_was_measured_and_against_what(tmp_path):
    config = configured("lightgcn, softmax", epochs=1, lr=1e-6, baselines="all")
    outcome = run(config, tmp_path)
    c = build(config, topical_data())
    result = write_result(c, tmp_path, outcome, notes=["a note"], command="as typed", git=None)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert [row["model"] for row in result["table"]] == ["lightgcn", "popularity", "gfcf"]
    assert result["table"][0]["Recall@5"] == result["metrics"]["test"]["Recall@5"]
    assert result["notes"][0] == "a note"
    (warning,) = result["notes"][1:]  # one epoch at that rate teaches nothing
    assert warning.startswith("WARNING: lightgcn reaches validation Recall@5")
    assert "gfcf, which needs no training" in warning
    assert "by dice" in result["protocol"]


def test_a_spectral_start_knows_the_graph_before_the_first_step_and_is_left_out_before_loading(monkeypatch):
    config = configured("lightgcn, softmax")
    warm = replace(config, model=replace(config.model, init="spectral"))
    data = topical_data()
    recalls = [evaluate(build(c, data).state.model, data, "test", config=c)["Recall@5"] for c in (config, warm)]
    assert recalls[1] > recalls[0] + 0.2
    monkeypatch.delattr(apps.graphrec.model, "low_rank_embeddings")
    make_model(warm, data, CPU)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lightgcn", {"loss": "clcrec"}, "clcrec and clcrec-graph go together"),
        ("clcrec-graph", {"loss": "bpr"}, "clcrec and clcrec-graph go together"),
        ("clcrec-graph", {"model": {"score": "cosine"}}, "leave out --score cosine"),
        ("simgcl", {"model": {"layers": 0}}, "--layers is 0; use at least 1"),
        ("xsimgcl", {"model": {"contrast_layer": 3}}, "--contrast-layer 3 is none of the 2 layers"),
        ("lightgcn", {"num_negatives": 41}, "--num-negatives is 41, but there are 40 items"),
        ("lightgcn", {"loss": "bpr", "num_negatives": 39}, "num_negatives is 39, but 60 of 60 rows"),
        ("lightgcn", {"select": "MRR@5"}, r"--select must be one of Recall@5, NDCG@5"),
        ("lightgcn", {"select": "cold/Recall@5"}, r"--select must be one of Recall@5, NDCG@5"),
        ("lightgcn", {"ks": (0, 5)}, r"ks are \[0, 5\]; --ks needs"),
        ("lightgcn", {"model": {"bf16_rows": True}, "kernel": "csr"}, "use --kernel bag, or leave out --bf16-rows"),
        ("lightgcn", {"warmup_steps": 10_000}, "warmup_steps"),
        ("content", {"data": {"has_t": True}}, r"topical has no feat_t, but --has-t asks for it"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_the_repair(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(configure(kind, **options), topical_data())


def test_missing_parts_of_the_data_are_named():
    data = topical_data()
    nothing = Lists(torch.zeros(data.num_users + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    with pytest.raises(ValueError, match="topical holds no training pair"):
        build(configure(), replace(data, train=nothing))
    with pytest.raises(ValueError, match="topical holds no test item"):
        build(configure(), replace(data, test=nothing))
    with pytest.raises(ValueError, match="encodes content, but topical has none"):
        build(configure("content"), replace(data, content={}))


def test_the_selected_group_is_all_items_unless_one_is_named():
    config = configured("content, softmax")
    data = data_for(config)
    build(config, data)
    build(replace(config, training=replace(config.training, select="cold/NDCG@5")), data)
    build(configure(select="all/Recall@5"), topical_data())


def test_the_loss_decides_on_its_negatives_where_they_are_left_to_it():
    data = topical_data()
    plans = {name: build(configure(loss=name), data).plan for name in ("bpr", "softmax", "inbatch", "directau")}
    assert (plans["bpr"].shared, plans["bpr"].num_negatives) == (False, 1)
    assert (plans["softmax"].shared, plans["softmax"].num_negatives) == (True, 40)  # of 512, all that there are
    assert plans["inbatch"].num_negatives == plans["directau"].num_negatives == 0
    assert build(configure(), data).plan.loss == "softmax"


def test_modalities_are_selected():
    data = topical_data(num_cold=8)
    both, one = (build(configure("content", data=chosen), data).state.model for chosen in ({}, {"has_a": True}))
    assert isinstance(both, GraphRec)
    assert isinstance(one, GraphRec)
    assert (both.hidden.in_features, one.hidden.in_features) == (2 * TOPICS, TOPICS)


def test_settings_that_do_nothing_are_told():
    config = configure("mf", num_workers=8, graph_lambda=0.3, gamma=2.0, model={"layers": 4})
    lines = without_effect(config, loss="softmax", precision="fp32")
    for words in (
        "--num-workers 8 is not used",
        "--graph-lambda is about clcrec-graph",
        "--gamma is about the losses directau",
        "--layers is about lightgcn, simgcl, xsimgcl",
    ):
        assert sum(words in line for line in lines) == 1
    assert without_effect(Config(), loss="softmax", precision="fp32") == []
    amp, small = without_effect(configure(model={"hidden_dim": 256}), loss="softmax", precision="bf16")
    assert "bf16 acts on the products of scores alone" in amp
    assert "a propagation costs the same" in small
    (only,) = without_effect(configure("gfcf", model={"layers": 3}), loss="softmax", precision="fp32")
    assert "takes no training steps" in only


def test_a_loss_multiplied_by_zero_is_warned_of():
    assert warnings(configure("clcrec-graph")) == []
    for value, name in ((0.0, "item-content"), (1.0, "user-item")):
        (line,) = warnings(configure("clcrec-graph", lr_lambda=value))
        assert f"multiplies the {name} loss by zero" in line
    assert warnings(configure("mf", lr_lambda=1.0)) == []


def test_memory_is_a_formula_of_the_sizes():
    text = memory_text(Config(), num_users=1000, num_items=500, num_pairs=9000, weights=96_000)
    assert text.startswith("memory: 4 x 96,000 weights x 4 bytes = 2 MB, graph and propagation ")


def test_the_optimizer_step_is_adam_on_the_steps_gradient():
    config = configured("lightgcn, bpr", lr=0.01)
    c = build(config, topical_data())
    before, step = table_of(c).clone(), next(epoch_batches(c, epoch=0))
    _, _, (gradient,) = loss_and_gradients(c, step)
    c.state.model.zero_grad()
    amp_step(c.state, [step], objective(c), amp=c.amp)
    moved = gradient.double() / (gradient.double().abs() + 1e-8)  # the first step of Adam
    torch.testing.assert_close(table_of(c), before - 0.01 * moved, rtol=1e-4, atol=1e-5)


def test_low_precision_changes_the_loss_little():
    c = build(configured("lightgcn, softmax"), topical_data())
    step = next(epoch_batches(c, epoch=0))
    exact, _, _ = loss_and_gradients(c, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _, gradients = loss_and_gradients(c, step)
    assert low.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert float((low - exact).abs()) < 1e-3


def test_filters_are_no_modules_with_parameters():
    model, _ = make_model(configure("gfcf"), topical_data(), CPU)
    assert isinstance(model, GraphFilter)
    assert list(model.parameters()) == []
