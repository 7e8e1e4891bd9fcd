"""Evaluation and prediction against slow loops: groups, baselines, both directions, the factor of cold items."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apps.clcrec.config import Config, TrainConfig
from apps.clcrec.dataset import GROUPS, STAGES, ColdStart, Group, lists_of
from apps.clcrec.evaluate import (
    baselines,
    best_names,
    evaluate,
    evaluate_stages,
    matrices,
    predict_items,
    predict_users,
    protocol_text,
    ranking_metrics,
    side_by_side,
    users_of_items,
)
from apps.clcrec.train import make_model
from shared.ranking import Lists
from tests.clcrec.test_clcrec_train import topical_data

CONFIG = Config(training=TrainConfig(ks=(3,), select="all/Recall@3", memory_mib=1))


def rows_of(lists: Lists) -> list[list[int]]:
    return [lists.item[a:b].tolist() for a, b in zip(lists.ptr[:-1].tolist(), lists.ptr[1:].tolist(), strict=True)]


def slow_recall(user_UD: Tensor, item_ID: Tensor, data: ColdStart, held_out: Lists, group: Group, k: int) -> float:
    """Mean over users of the share of held-out items among the k best of the group, by sorting."""
    ids = {
        "all": range(data.num_items),
        "warm": range(data.num_warm),
        "cold": range(data.num_warm, data.num_items),
    }[group]
    trained = rows_of(lists_of(data.user, data.item, data.num_users))
    found = []
    for user, items in enumerate(rows_of(held_out)):
        wanted = [i for i in items if i in ids]
        if wanted:
            score = {i: float(user_UD[user] @ item_ID[i]) for i in ids if i not in trained[user]}
            best = sorted(score, key=score.__getitem__, reverse=True)[:k]
            found.append(sum(i in best for i in wanted) / len(wanted))
    return sum(found) / len(found)


@pytest.mark.parametrize("cold_scale", [1.0, 1.7])
def test_recall_of_every_group_and_stage_is_that_of_a_slow_loop(cold_scale: float):
    data = topical_data()
    torch.manual_seed(0)
    config = replace(CONFIG, training=replace(CONFIG.training, cold_scale=cold_scale))
    model = make_model(config, data)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    users, items = matrices(model)
    items = torch.cat([items[: data.num_warm], items[data.num_warm :] * cold_scale])
    found = evaluate_stages(model, data, STAGES, config=config)
    for stage in STAGES:
        assert found[stage] == evaluate(model, data, stage, config=config)
        for group in GROUPS:
            expected = slow_recall(users, items, data, data.valid if stage == "valid" else data.test, group, 3)
            assert found[stage][f"{group}/Recall@3"] == pytest.approx(expected, abs=1e-6)


def test_the_factor_of_cold_items_matters_where_they_meet_warm_ones_only():
    data = topical_data()
    torch.manual_seed(0)
    model = make_model(CONFIG, data)
    plain = evaluate(model, data, "test", config=CONFIG)
    larger = evaluate(model, data, "test", config=replace(CONFIG, training=replace(CONFIG.training, cold_scale=50.0)))
    for name, value in plain.items():
        if not name.startswith("all/"):
            assert larger[name] == value
    assert larger["all/Recall@3"] != plain["all/Recall@3"]


def test_a_group_without_held_out_items_is_left_out():
    data = topical_data()
    keep = data.test.item < data.num_warm
    user = torch.repeat_interleave(torch.arange(data.num_users), data.test.ptr.diff())
    warm_only = replace(data, test=lists_of(user[keep], data.test.item[keep], data.num_users))
    found = ranking_metrics(
        torch.randn(data.num_users, 2).__getitem__, torch.randn(data.num_items, 2), warm_only, STAGES, config=CONFIG
    )
    assert {name.partition("/")[0] for name in found["test"]} == {"all", "warm"}
    assert {name.partition("/")[0] for name in found["valid"]} == {"all", "warm", "cold"}


def test_popularity_knows_warm_items_and_nothing_of_cold_ones():
    data = topical_data()
    count = torch.bincount(data.item.long(), minlength=data.num_items).double()
    found = baselines(data, "test", torch.zeros(data.num_items, 0), config=CONFIG)
    assert set(found) == {"popularity"}, "without numbers there is no content baseline"
    assert found["popularity"]["cold/Recall@3"] == 0.0
    trained = rows_of(lists_of(data.user, data.item, data.num_users))
    recalls = []
    for user, items in enumerate(rows_of(data.test)):
        wanted = [i for i in items if i < data.num_warm]
        if wanted:
            rivals = [i for i in range(data.num_warm) if i not in trained[user]]
            ranks = [sum(float(count[r]) >= float(count[i]) for r in rivals) for i in wanted]  # ties are lost
            recalls.append(sum(rank <= 3 for rank in ranks) / len(wanted))
    assert found["popularity"]["warm/Recall@3"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-6)


def test_the_original_mask_hardly_hurts_a_baseline_of_positive_scores():
    data = topical_data()
    settings = [TrainConfig(ks=(20,), mask_value=mask) for mask in ("inf", "legacy")]
    content = torch.zeros(data.num_items, 0)
    honest, masked = (baselines(data, "test", content, config=Config(training=t))["popularity"] for t in settings)
    assert masked["warm/Recall@20"] == honest["warm/Recall@20"] > 0  # every warm count is above 1e-15


def test_content_baseline_ranks_by_the_mean_content_of_the_users_items():
    data = topical_data()
    content = torch.nn.functional.normalize(data.content["v"], dim=1)
    trained = rows_of(lists_of(data.user, data.item, data.num_users))
    profile = torch.stack([content[row].mean(0) for row in trained])
    found = baselines(data, "test", data.content["v"], config=CONFIG)["content"]
    assert found["cold/Recall@3"] == pytest.approx(slow_recall(profile, content, data, data.test, "cold", 3), abs=1e-6)
    assert found["cold/Recall@3"] > 0.4


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("keep_seen", [False, True])
def test_predicted_items_are_the_best_of_the_group(group: Group, keep_seen: bool):
    data = topical_data()
    torch.manual_seed(1)
    model = make_model(CONFIG, data)
    users, items = matrices(model)
    first, end = {"all": (0, data.num_items), "warm": (0, data.num_warm), "cold": (data.num_warm, data.num_items)}[
        group
    ]
    known = rows_of(data.known)
    chunks = list(predict_items(model, data, k=60, config=CONFIG, group=group, keep_seen=keep_seen))
    assert sum(len(user) for user, _, _ in chunks) == data.num_users
    for user_B, item_BK, score_BK in chunks:
        for user, row, score in zip(user_B.tolist(), item_BK.tolist(), score_BK.tolist(), strict=True):
            allowed = [i for i in range(first, end) if keep_seen or i not in known[user]]
            expected = sorted(allowed, key=lambda i: -float(users[user] @ items[i]))
            assert row[: len(expected)] == expected
            assert len(row) == end - first, "k is the number of items at most"
            assert set(row[len(expected) :]) <= {-1}
            assert all(math.isinf(value) for value in score[len(expected) :])


def test_predicted_users_are_the_best_for_each_item():
    data = topical_data()
    torch.manual_seed(2)
    model = make_model(CONFIG, data)
    users, items = matrices(model)
    cold = torch.arange(data.num_warm, data.num_items)
    known = users_of_items(data.known, data.num_items)
    parts = rows_of(known)[data.num_warm :]
    part = Lists(
        torch.tensor([0, *(len(row) for row in parts)]).cumsum(0), torch.tensor([u for row in parts for u in row])
    )
    ((item_B, user_BK, _),) = predict_users(model, items[cold], k=5, config=CONFIG, known=part)
    for row, best in zip(item_B.tolist(), user_BK.tolist(), strict=True):
        allowed = [u for u in range(data.num_users) if u not in parts[row]]
        assert best == sorted(allowed, key=lambda u: -float(users[u] @ items[cold[row]]))[:5]


def test_lists_turned_round_hold_the_same_pairs():
    data = topical_data()
    turned = rows_of(users_of_items(data.known, data.num_items))
    pairs = {(user, item) for user, row in enumerate(rows_of(data.known)) for item in row}
    assert {(user, item) for item, row in enumerate(turned) for user in row} == pairs
    assert all(row == sorted(row) for row in turned)


def test_lists_side_by_side_keep_their_order_and_origin():
    one = Lists(torch.tensor([0, 2, 2, 3]), torch.tensor([5, 6, 7]))
    two = Lists(torch.tensor([0, 0, 1, 3]), torch.tensor([8, 9, 4]))
    lists, part = side_by_side([one, two])
    assert rows_of(lists) == [[5, 6], [8], [7, 9, 4]]
    assert part.tolist() == [0, 0, 1, 0, 1, 1]


def test_the_protocol_names_users_items_and_the_original_mask():
    data = topical_data()
    text = protocol_text(data, "test", TrainConfig())
    users = int((data.test.ptr.diff() > 0).sum())
    assert f"all ({users} users, 52 items)" in text
    assert "ties against the model" in text
    assert "cold scores times 1.2, ties" in protocol_text(data, "test", TrainConfig(cold_scale=1.2))
    assert "not comparable" in protocol_text(data, "test", TrainConfig(mask_value="legacy"))


def test_the_terminal_shows_recall_and_ndcg_at_the_largest_k():
    names = [f"{group}/{name}@{k}" for group in ("all", "cold") for name in ("Recall", "NDCG", "HR") for k in (5, 20)]
    assert best_names(names) == ["all/Recall@20", "all/NDCG@20", "cold/Recall@20", "cold/NDCG@20"]
