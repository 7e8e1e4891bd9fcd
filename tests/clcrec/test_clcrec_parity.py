"""Loss, its three returned values, every gradient and the metrics against the re-statement of the original."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.clcrec import losses
from apps.clcrec.config import Config, ModelConfig, TrainConfig
from apps.clcrec.dataset import GROUPS, STAGES, Batch, ColdStart, Group, group_part, lists_of
from apps.clcrec.evaluate import ranking_metrics
from apps.clcrec.model import CLCRec, WordLists
from apps.clcrec.train import loss_fn, replaced_times
from tests.clcrec import original

RELATIVE = 1e-6


def draw_case(seed: int) -> dict[str, Any]:
    """Sizes and settings that differ in everything, from a seed."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=g))]

    return {
        "batch": int(pick(1, 2, 5)),
        "negatives": int(pick(1, 3, 6)),
        "lr_lambda": pick(0.0, 0.5, 0.9, 1.0),
        "temperature": pick(0.1, 0.5, 2.0),
        "reg_weight": pick(0.0, 0.1),
        "num_sample": pick(0.0, 0.5, 1.0),
        "scale": pick(0.1, 1.0, 20.0),  # the largest gives scores far above 88
        "words": bool(pick(0, 1)),
        "zero_row": bool(pick(0, 1)),
        "generator": g,
    }


def build_case(case: dict[str, Any]) -> tuple[CLCRec, original.Features, Tensor, Tensor]:
    g = case["generator"]
    num_users, num_items, num_warm, width, hidden, word_dim, num_words = 4, 12, 9, 3, 5, 2, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    content = {"v": normal(num_items, 4), "a": normal(num_items, 2)}
    words = None
    if case["words"]:
        words = [torch.randint(num_words, (1 + i % 3,), generator=g).tolist() for i in range(num_items)]
    else:
        content["t"] = normal(num_items, 3)
    if case["zero_row"]:
        content["v"][2] = 0.0
    lists = None
    if words is not None:
        ptr = torch.tensor([0, *(len(row) for row in words)]).cumsum(0)
        lists = WordLists(ptr, torch.tensor([w for row in words for w in row]), num_words)
    model = CLCRec(
        ModelConfig(embed_dim=width, hidden_dim=hidden, word_dim=word_dim),
        num_users=num_users,
        num_items=num_items,
        num_warm=num_warm,
        content_IF=torch.cat([F.normalize(part, dim=1) for part in content.values()], dim=1),
        words=lists,
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(normal(*parameter.shape) * 0.5)
        model.user.mul_(case["scale"])
        model.item.mul_(case["scale"])
        if case["zero_row"]:
            model.item[1] = 0.0
            model.user[0] = 0.0
    user = torch.randint(num_users, (case["batch"],), generator=g)
    item = torch.stack([torch.randperm(num_warm, generator=g)[: 1 + case["negatives"]] for _ in range(case["batch"])])
    if case["zero_row"]:
        user[0], item[0, 0] = 0, 1
    return model, original.Features(content, words), user, item


def params_of(model: CLCRec) -> dict[str, Tensor]:
    names = {"user": model.user, "item": model.item, "w1": model.hidden.weight, "b1": model.hidden.bias}
    names |= {"w2": model.output.weight, "b2": model.output.bias}
    if model.word is not None:
        names["words"] = model.word
    return names


@pytest.mark.parametrize("by_matrix", [True, False])
@pytest.mark.parametrize("encodes_batch", [True, False])
@pytest.mark.parametrize("seed", range(24))
def test_loss_and_every_gradient_equal_the_originals(seed: int, encodes_batch: bool, by_matrix: bool):
    case = draw_case(seed)
    model, features, user_B, item_BM = build_case(case)
    training = TrainConfig(
        replacement="legacy",
        num_sample=case["num_sample"],
        lr_lambda=case["lr_lambda"],
        temperature=case["temperature"],
        reg_weight=case["reg_weight"],
    )
    times = replaced_times(training, item_BM.numel(), torch.Generator().manual_seed(seed))
    replaced = torch.repeat_interleave(torch.arange(item_BM.numel()), times.long())
    assert replaced.numel() == math.floor(item_BM.numel() * case["num_sample"])
    names = params_of(model)
    expected = original.original_loss(
        {name: value.detach() for name, value in names.items()},
        features,
        user_B,
        item_BM,
        replaced,
        temperature=training.temperature,
        lr_lambda=training.lr_lambda,
        reg_weight=training.reg_weight,
    )

    batch = Batch(user_B, item_BM, times.view_as(item_BM), None, None, None)
    total, scalars = loss_fn(model, batch, training=training, by_matrix=by_matrix, encodes_batch=encodes_batch)
    grads = dict(zip(names, torch.autograd.grad(total, list(names.values()), allow_unused=True), strict=True))

    assert total.item() == pytest.approx(expected.total, rel=RELATIVE, abs=1e-12)
    preference = scalars["preference"].item()
    penalty = total.item() - training.lr_lambda * scalars["contrast"].item() - (1 - training.lr_lambda) * preference
    returned = (total.item(), preference + penalty, penalty)
    assert returned == pytest.approx(expected.returned, rel=RELATIVE, abs=1e-9)
    for name, value in expected.grads.items():
        found = torch.zeros_like(value) if grads[name] is None else grads[name]
        assert found.isfinite().all(), name
        torch.testing.assert_close(found, value, rtol=RELATIVE, atol=RELATIVE * max(1e-9, value.abs().max().item()))


def test_repeated_draws_change_the_encoders_gradient_and_not_the_loss():
    case = draw_case(0) | {
        "batch": 5,
        "negatives": 6,
        "num_sample": 1.0,
        "scale": 1.0,
        "lr_lambda": 0.5,
        "words": False,
    }
    model, _, user_B, item_BM = build_case(case)
    training = TrainConfig(replacement="legacy", num_sample=1.0, temperature=1.0)
    times = replaced_times(training, item_BM.numel(), torch.Generator().manual_seed(1)).view_as(item_BM)
    assert times.max() > 1, "nothing was drawn twice, so there is nothing to see"
    found = []
    for repeated in (times, times.clamp(max=1)):
        batch = Batch(user_B, item_BM, repeated, None, None, None)
        total, _ = loss_fn(model, batch, training=training, by_matrix=True, encodes_batch=False)
        found.append((total.item(), torch.autograd.grad(total, model.output.weight)[0]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert (found[0][1] - found[1][1]).norm() > 0.01 * found[1][1].norm()


def test_scores_far_above_88_stay_finite_in_float32():
    user, item = torch.full((2, 3), 30.0), torch.full((4, 3), 30.0)
    index = torch.tensor([[0, 1, 2], [3, 0, 1]])
    parts = losses.pair_losses(
        user, item, item, index, torch.zeros(2, 3, dtype=torch.uint8), temperature=0.1, by_matrix=True
    )
    assert parts.preference.item() == pytest.approx(math.log(3), abs=0.01)  # scores of 27,000 in float32


def small_data(g: torch.Generator) -> tuple[ColdStart, Tensor, Tensor, dict[str, list[set[int]]], list[set[int]]]:
    num_users, num_items, num_warm = 15, 40, 28
    trained, valid, test = [], [], []
    for _ in range(num_users):
        warm = torch.randperm(num_warm, generator=g).tolist()
        cold = (num_warm + torch.randperm(num_items - num_warm, generator=g)).tolist()
        n = [int(torch.randint(1, 9, (), generator=g)), *torch.randint(0, 4, (4,), generator=g).tolist()]
        trained.append(set(warm[: n[0]]))
        valid.append(set(warm[n[0] : n[0] + n[1]]) | set(cold[: n[2]]))
        test.append(set(warm[n[0] + n[1] : n[0] + n[1] + n[3]]) | set(cold[n[2] : n[2] + n[4]]))

    def columns(sets: list[set[int]]) -> tuple[Tensor, Tensor]:
        pairs = [(u, i) for u, items in enumerate(sets) for i in sorted(items)]
        return torch.tensor([u for u, _ in pairs]), torch.tensor([i for _, i in pairs])

    user, item = columns(trained)
    data = ColdStart(
        num_warm=num_warm,
        user=user.int(),
        item=item.int(),
        known=lists_of(*columns([a | b | c for a, b, c in zip(trained, valid, test, strict=True)]), num_users),
        valid=lists_of(*columns(valid), num_users),
        test=lists_of(*columns(test), num_users),
        content={},
        words=None,
        item_ids=tuple(map(str, range(num_items))),
        user_ids=tuple(map(str, range(num_users))),
        fingerprint="f",
        name="small",
    )
    users = torch.randn(num_users, 6, generator=g)
    items = torch.randn(num_items, 6, generator=g)
    return data, users, items, {"valid": valid, "test": test}, trained


@pytest.mark.parametrize("mask_value", ["inf", "legacy"])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_the_originals_under_both_masks(seed: int, mask_value: str):
    data, users, items, relevant, trained = small_data(torch.Generator().manual_seed(seed))
    config = Config(training=TrainConfig(ks=(3, 10), mask_value=mask_value, memory_mib=1))
    both = ranking_metrics(users.__getitem__, items, data, STAGES, config=config)
    for stage, found in both.items():
        assert found == ranking_metrics(users.__getitem__, items, data, (stage,), config=config)[stage]
        for group in GROUPS:
            wanted = [
                {i for i in row if group == "all" or (i < data.num_warm) == (group == "warm")}
                for row in relevant[stage]
            ]
            for k in (3, 10):
                expected = original.original_metrics(
                    users,
                    items,
                    trained,
                    wanted,
                    group=group,
                    num_warm=data.num_warm,
                    k=k,
                    mask_value=-math.inf if mask_value == "inf" else original.LEGACY_MASK,
                )
                for ours, theirs in (("Recall", "recall"), ("Precision", "precision"), ("NDCG", "ndcg")):
                    assert found[f"{group}/{ours}@{k}"] == pytest.approx(expected[theirs], abs=1e-9), (group, ours, k)


def test_the_legacy_mask_makes_a_difference_where_scores_are_negative():
    data, users, items, _, _ = small_data(torch.Generator().manual_seed(0))
    config = Config(training=TrainConfig(ks=(10,)))
    legacy = Config(training=replace(config.training, mask_value="legacy"))
    honest = ranking_metrics(users.__getitem__, items, data, ("test",), config=config)["test"]
    masked = ranking_metrics(users.__getitem__, items, data, ("test",), config=legacy)["test"]
    assert all(masked[name] <= honest[name] for name in honest)
    assert masked["cold/Recall@10"] < honest["cold/Recall@10"]


def test_groups_divide_the_held_out_items():
    data, _, _, relevant, trained = small_data(torch.Generator().manual_seed(3))
    groups: dict[Group, range] = {"warm": range(data.num_warm), "cold": range(data.num_warm, data.num_items)}
    for group, keep in groups.items():
        part = group_part(data.test, group, data.num_warm)
        found = [set(part.item[a:b].tolist()) for a, b in zip(part.ptr[:-1], part.ptr[1:], strict=True)]
        assert found == [row & set(keep) for row in relevant["test"]]
    lists = data.trained
    assert [set(lists.item[a:b].tolist()) for a, b in zip(lists.ptr[:-1], lists.ptr[1:], strict=True)] == trained
