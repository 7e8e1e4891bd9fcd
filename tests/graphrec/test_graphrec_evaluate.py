"""Metrics against a double loop over users and sorted lists, for vectors and for blocks of scores; prediction."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import apps.graphrec.evaluate
from apps.graphrec.config import Config, ModelConfig, TrainConfig
from apps.graphrec.dataset import Interactions, Stage
from apps.graphrec.evaluate import (
    DeadModelError,
    Vectors,
    baselines,
    best_names,
    evaluate,
    evaluate_stages,
    evaluation_sums,
    finished,
    joined,
    matrices,
    predict,
    protocol_text,
    scorer_of,
)
from apps.graphrec.graph import make_graph
from apps.graphrec.model import GraphFilter, GraphRec
from shared.distributed import Group
from shared.ranking import Lists

CPU = torch.device("cpu")
USERS, ITEMS = 23, 19


def csr(rows: list[list[int]]) -> Lists:
    ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Lists(ptr, torch.tensor([item for row in rows for item in row], dtype=torch.int32))


def lists(data: Lists) -> list[list[int]]:
    return [data.item[a:b].tolist() for a, b in zip(data.ptr[:-1], data.ptr[1:], strict=True)]


def random_data(*, cold: bool = False, has_valid: bool = True, seed: int = 0) -> Interactions:
    """Users with one to nine items in random parts; cold items, if there are any, are never in training."""
    g = torch.Generator().manual_seed(seed)
    is_cold = torch.arange(ITEMS) % 4 == 3
    parts: tuple[list[list[int]], ...] = ([], [], [])
    for user in range(USERS):
        for rows in parts:
            rows.append([])
        items = torch.randperm(ITEMS, generator=g)[: 1 + user % 9].sort().values.tolist()
        for item in items:
            part = int(torch.randint(3, (1,), generator=g))
            if cold and is_cold[item]:
                part = max(1, part)
            parts[0 if part == 1 and not has_valid else part][user].append(item)
    return Interactions(
        train=csr(parts[0]),
        valid=csr(parts[1]),
        test=csr(parts[2]),
        content={},
        is_cold=is_cold if cold else None,
        item_ids=tuple(f"i{i}" for i in range(ITEMS)),
        user_ids=tuple(f"u{u}" for u in range(USERS)),
        fingerprint="random",
        name="random",
        split="by dice",
    )


def configure(kind: str = "mf", **training: Any) -> Config:
    base = {"ks": (1, 4), "device": "cpu"}
    return Config(
        model=ModelConfig(model=kind, embed_dim=3, filter_rank=5, layers=2),
        training=replace(TrainConfig(), **{**base, **training}),
    )


def make(kind: str, data: Interactions) -> nn.Module:
    graph = make_graph(data.train, num_items=ITEMS, device=CPU)
    torch.manual_seed(1)
    if kind in ("gfcf", "bspm"):
        model = GraphFilter(configure(kind).model, graph=graph)
        model.fit(seed=3)
        return model
    return GraphRec(configure(kind).model, graph=graph)


def all_scores(model: nn.Module) -> Tensor:
    scorer = scorer_of(model)
    if isinstance(scorer, Vectors):
        return scorer.user_UD @ scorer.item_ID.t()
    return scorer(torch.arange(USERS))


def by_loop(
    score_UI: Tensor, data: Interactions, stage: Stage, ks: tuple[int, ...], items: set[int]
) -> dict[str, float]:
    """The metrics one user at a time; equal scores stand in front of a held-out item."""
    train, valid, test = lists(data.train), lists(data.valid), lists(data.test)
    found: dict[str, list[float]] = {}
    for user in range(USERS):
        wanted = set(test[user] if stage == "test" else valid[user]) & items
        if not wanted:
            continue
        gone = set(train[user]) | (set(valid[user]) if stage == "test" else set())
        open_items = sorted(items - gone)
        ranks = sorted(sum(float(score_UI[user, j]) >= float(score_UI[user, i]) for j in open_items) for i in wanted)
        for k in ks:
            hits = [rank for rank in ranks if rank <= k]
            ideal = sum(1 / math.log2(1 + i) for i in range(1, min(k, len(wanted)) + 1))
            values = {
                "Recall": len(hits) / len(wanted),
                "NDCG": sum(1 / math.log2(1 + rank) for rank in hits) / ideal,
                "Precision": len(hits) / k,
                "HR": float(bool(hits)),
            }
            for name, value in values.items():
                found.setdefault(f"{name}@{k}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("kind", ["mf", "lightgcn", "gfcf", "bspm"])
@pytest.mark.parametrize("stage", ["valid", "test"])
def test_metrics_are_those_of_a_loop_over_users(kind, stage):
    data = random_data()
    model = make(kind, data)
    found = evaluate(model, data, stage, config=configure(kind))
    assert found == pytest.approx(by_loop(all_scores(model), data, stage, (1, 4), set(range(ITEMS))), abs=1e-9)


@pytest.mark.parametrize("kind", ["mf", "gfcf"])
def test_cold_items_make_three_rankings(kind):
    data = random_data(cold=True)
    model = make(kind, data)
    found = evaluate_stages(model, data, ("valid", "test"), config=configure(kind))
    cold = {i for i in range(ITEMS) if i % 4 == 3}
    groups = {"all": set(range(ITEMS)), "warm": set(range(ITEMS)) - cold, "cold": cold}
    for stage, metrics in found.items():
        wanted = {
            f"{name}/{metric}": value
            for name, items in groups.items()
            for metric, value in by_loop(all_scores(model), data, stage, (1, 4), items).items()
        }
        assert metrics == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("blocks", [False, True], ids=["vectors", "blocks"])
def test_ties_count_against_the_model(blocks):
    data = random_data()
    user, item = torch.ones(USERS, 1), torch.tensor([2.0, 1.0] * ITEMS)[:ITEMS, None]
    scores = user @ item.t()
    scorer: Any = (lambda rows: scores[rows]) if blocks else Vectors(user, item)
    found = finished(evaluation_sums(scorer, data, ("test",), config=configure()), data)["test"]
    assert found == pytest.approx(by_loop(scores, data, "test", (1, 4), set(range(ITEMS))), abs=1e-9)


@pytest.mark.parametrize("blocks", [False, True], ids=["vectors", "blocks"])
def test_scores_that_are_no_numbers_rank_nothing(blocks):
    data = random_data()
    user, item = torch.ones(USERS, 1), torch.full((ITEMS, 1), torch.nan)
    item[0] = 1.0
    scorer: Any = (lambda rows: (user @ item.t())[rows]) if blocks else Vectors(user, item)
    found = finished(evaluation_sums(scorer, data, ("test",), config=configure()), data)["test"]
    only = finished(evaluation_sums(Vectors(user, (item == 1).float()), data, ("test",), config=configure()), data)
    assert found["HR@1"] == only["test"]["HR@1"]
    assert found["HR@4"] == found["HR@1"]


def test_vectors_trained_with_cosine_are_ranked_by_it_or_by_their_dot_products_as_asked():
    data = random_data()
    config = configure("lightgcn")
    graph = make_graph(data.train, num_items=ITEMS, device=CPU)
    tables = {}
    for score, rank_by in (("dot", "score"), ("cosine", "score"), ("cosine", "dot")):
        torch.manual_seed(3)
        model = GraphRec(replace(config.model, score=score, rank_by=rank_by), graph=graph)
        user_UD, item_ID = matrices(model)
        tables[score, rank_by] = user_UD @ item_ID.t()
    dot, cosine, lengths = tables.values()
    assert torch.equal(lengths, dot)
    assert float(cosine.abs().max()) <= 1 + 1e-6
    assert not torch.allclose(cosine, dot, atol=1e-3)


def test_k_beyond_the_number_of_items_finds_everything():
    data = random_data()
    found = evaluate(make("mf", data), data, "test", config=configure(ks=(500,)))
    assert found["Recall@500"] == 1.0


@pytest.mark.parametrize("kind", ["mf", "gfcf"])
def test_chunks_and_processes_change_nothing(kind, monkeypatch):
    data, config = random_data(cold=True), configure(kind)
    model = make(kind, data)
    whole = evaluate_stages(model, data, ("valid", "test"), config=config)
    monkeypatch.setattr(apps.graphrec.evaluate, "USERS_PER_CHUNK", 4)
    assert evaluate_stages(model, data, ("valid", "test"), config=config) == whole
    sums = [
        evaluation_sums(scorer_of(model), data, ("valid", "test"), config=config, group=Group(rank, 3, CPU))
        for rank in range(3)
    ]
    added = {key: {name: sum(part[key][name] for part in sums) for name in sums[0][key]} for key in sums[0]}
    assert finished(added, data) == whole  # type: ignore[arg-type]


def test_a_filter_is_asked_for_blocks_that_fit_the_memory():
    data, config = random_data(), configure("gfcf", memory_mib=1)
    seen: list[int] = []
    wide = 1 << 15  # items; a block then has 4 users

    def scores(rows: Tensor) -> Tensor:
        seen.append(rows.numel())
        return torch.ones(rows.numel(), wide)

    large = replace(data, item_ids=tuple(map(str, range(wide))))
    evaluation_sums(scores, large, ("test",), config=config)
    assert max(seen) == 4


def test_a_model_whose_every_score_is_zero_is_refused():
    data = random_data()
    model = make("mf", data)
    nn.init.zeros_(model.table)  # type: ignore[arg-type]
    with pytest.raises(DeadModelError, match="every score of the model is zero"):
        evaluate(model, data, "test", config=configure())
    unfitted = GraphFilter(configure("gfcf").model, graph=make_graph(data.train, num_items=ITEMS, device=CPU))
    with pytest.raises(DeadModelError, match="every score of the model is zero"):
        evaluate(unfitted, data, "test", config=configure("gfcf"))


def test_the_popularity_baseline_counts_training_pairs():
    data = random_data()
    found = baselines(data, ("valid", "test"), config=configure(baselines="popularity"), device=CPU)
    assert list(found) == ["popularity"]
    count = torch.bincount(data.train.item.long(), minlength=ITEMS).float()
    for stage, metrics in found["popularity"].items():
        wanted = by_loop(count.expand(USERS, -1), data, stage, (1, 4), set(range(ITEMS)))
        assert metrics == pytest.approx(wanted, abs=1e-9)


def test_the_filter_baseline_is_left_out_beside_a_filter():
    data = random_data()
    found = baselines(data, ("test",), config=configure("mf"), device=CPU)
    assert list(found) == ["popularity", "gfcf"]
    filtered = make("gfcf", data)
    assert isinstance(filtered, GraphFilter)
    filtered.fit(seed=configure().training.seed)
    assert found["gfcf"]["test"] == evaluate(filtered, data, "test", config=configure("gfcf"))
    assert list(baselines(data, ("test",), config=configure("bspm"), device=CPU)) == ["popularity"]


@pytest.mark.parametrize("kind", ["lightgcn", "gfcf"])
@pytest.mark.parametrize("keep_seen", [False, True])
@pytest.mark.parametrize("group", ["all", "warm", "cold"])
def test_prediction_is_the_sorted_list_of_open_items(kind, keep_seen, group, monkeypatch):
    monkeypatch.setattr(apps.graphrec.evaluate, "USERS_PER_CHUNK", 5)
    data, k = random_data(cold=True), 4
    model = make(kind, data)
    score = all_scores(model)
    parts = [lists(part) for part in (data.train, data.valid, data.test)]
    done: list[int] = []
    chunks = list(
        predict(model, data, k=k, config=configure(kind), group=group, keep_seen=keep_seen, on_users=done.append)
    )
    assert done[-1] == USERS
    assert torch.cat([users for users, _, _ in chunks]).tolist() == list(range(USERS))
    for users, items, values in chunks:
        for user, row, given in zip(users.tolist(), items.tolist(), values.tolist(), strict=True):
            gone = set() if keep_seen else {i for part in parts for i in part[user]}
            eligible = [
                i for i in range(ITEMS) if i not in gone and (group == "all" or (i % 4 == 3) == (group == "cold"))
            ]
            best = sorted(eligible, key=lambda i: -float(score[user, i]))[:k]
            assert row[: len(best)] == best
            assert given[: len(best)] == pytest.approx([float(score[user, i]) for i in best], abs=1e-6)
            assert all(i == -1 for i in row[len(best) :])


def test_groups_of_items_are_those_of_the_data():
    data = random_data()
    with pytest.raises(ValueError, match="knows no cold items"):
        next(predict(make("mf", data), data, k=3, config=configure(), group="cold"))


def test_the_protocol_names_split_exclusion_users_and_ties():
    data = random_data()
    users = sum(bool(row) for row in lists(data.test))
    text = protocol_text(data, "test")
    for words in (f"{users} users, {ITEMS} items", "training and validation items left out", "ties against", "by dice"):
        assert words in text
    assert "training items left out" in protocol_text(data, "valid")
    assert "cold: " in protocol_text(random_data(cold=True), "test")


def test_joined_lists_rise_and_hold_every_item_once():
    first, second = csr([[1, 4], [], [0]]), csr([[0, 4, 5], [2], []])
    assert lists(joined(first, second, num_items=6)) == [[0, 1, 4, 5], [2], [0]]


def test_users_done_are_told_between_chunks(monkeypatch):
    monkeypatch.setattr(apps.graphrec.evaluate, "USERS_PER_CHUNK", 7)
    data = random_data()
    done: list[int] = []
    evaluate(make("mf", data), data, "test", config=configure(), on_users=done.append)
    users = sum(bool(row) for row in lists(data.test))
    assert done == [*range(7, users, 7), users]


def test_best_names_are_recall_and_ndcg_at_the_largest_k():
    names = [f"{group}/{name}@{k}" for group in ("all", "cold") for name in ("Recall", "HR", "NDCG") for k in (5, 20)]
    assert best_names(names) == ["all/Recall@20", "all/NDCG@20", "cold/Recall@20", "cold/NDCG@20"]
