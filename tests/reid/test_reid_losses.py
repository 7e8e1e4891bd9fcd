"""Losses are those of slow loops over pairs, and what is masked has no influence at all."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.reid.config import TrainConfig
from apps.reid.losses import circle, identity_loss, sdm, total, triplet

TEMPERATURE = 0.1
FORMS = ("kl", "ce")


class Output(NamedTuple):
    rgb_BE: Tensor
    query_CBE: Tensor
    has_CB: Tensor
    logits_FBP: Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_output(batch: int = 6, subsets: int = 3, *, classes: int = 4, seed: int = 0) -> tuple[Output, Tensor]:
    """Features of three identities, of which some samples lack some subsets."""
    has_CB = torch.rand(subsets, batch, generator=torch.Generator().manual_seed(seed)) < 0.7
    output = Output(
        draw(batch, 5, seed=seed), draw(subsets, batch, 5, seed=seed + 1), has_CB, 2 * draw(1 + subsets, batch, classes)
    )
    return output, torch.arange(batch) // 2


def all_features(output: Output, label_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and which of them are there, RGB first."""
    has_FB = torch.cat([torch.ones_like(output.has_CB[:1]), output.has_CB])
    feature = torch.cat([output.rgb_BE[None], output.query_CBE]).flatten(0, 1)
    return feature, label_B.repeat(len(has_FB)), has_FB.flatten()


def cosine(left: Tensor, right: Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def slow_sdm(rgb_BE: Tensor, query_BE: Tensor, label_B: Tensor, has_B: Tensor, form: str) -> float:
    rows = [i for i in range(len(label_B)) if has_B[i]]
    result = 0.0
    for left, right in ((rgb_BE, query_BE), (query_BE, rgb_BE)):
        for i in rows:
            p = softmax([cosine(left[i], right[j]) / TEMPERATURE for j in rows])
            same = [float(label_B[i] == label_B[j]) for j in rows]
            q = [value / sum(same) for value in same]
            if form == "kl":
                loss = sum(a * math.log(a / (b + 1e-8)) for a, b in zip(p, q, strict=True))
            else:  # the mean over the same identity of -log p, and half of each direction
                loss = -sum(b * math.log(a) for a, b in zip(p, q, strict=True)) / 2
            result += loss / len(rows)
    return result


def neighbours(label_N: Tensor, has_N: Tensor, i: int) -> tuple[list[int], list[int]]:
    others = [j for j in range(len(label_N)) if j != i and has_N[i] and has_N[j]]
    return [j for j in others if label_N[i] == label_N[j]], [j for j in others if label_N[i] != label_N[j]]


def slow_triplet(feature_NE: Tensor, label_N: Tensor, has_N: Tensor, margin: float) -> float:
    losses = []
    for i in range(len(label_N)):
        positives, negatives = neighbours(label_N, has_N, i)
        if positives and negatives:
            unit = [x / x.norm() for x in feature_NE]
            gap = max(float((unit[i] - unit[j]).norm()) for j in positives)
            gap -= min(float((unit[i] - unit[j]).norm()) for j in negatives)
            losses.append(max(0.0, margin + gap) if margin else math.log(1 + math.exp(gap)))
    return sum(losses) / len(losses)


def slow_circle(feature_NE: Tensor, label_N: Tensor, has_N: Tensor, margin: float, scale: float) -> float:
    losses = []
    for i in range(len(label_N)):
        positives, negatives = neighbours(label_N, has_N, i)
        if positives and negatives:
            pull = push = 0.0
            for j in positives:
                s = cosine(feature_NE[i], feature_NE[j])
                pull += math.exp(-scale * max(0.0, 1 + margin - s) * (s - 1 + margin))
            for j in negatives:
                s = cosine(feature_NE[i], feature_NE[j])
                push += math.exp(scale * max(0.0, s + margin) * (s - margin))
            losses.append(math.log(1 + pull * push))
    return sum(losses) / len(losses)


# Values


@pytest.mark.parametrize("form", FORMS)
def test_sdm_is_that_of_the_loops(form):
    output, label = make_output()
    assert 0 < int((~output.has_CB).sum()) < output.has_CB.numel()
    found = sdm(output.rgb_BE, output.query_CBE, label, output.has_CB, temperature=TEMPERATURE, form=form)
    for c in range(3):
        expected = slow_sdm(output.rgb_BE, output.query_CBE[c], label, output.has_CB[c], form)
        assert float(found[c]) == pytest.approx(expected, rel=1e-9)


def test_sdm_of_kl_is_a_divergence_of_distributions():
    output, label = make_output()
    has = torch.ones(1, 6, dtype=torch.bool)
    found = sdm(output.rgb_BE, output.query_CBE[:1], label, has, temperature=TEMPERATURE, form="kl")
    logits = F.normalize(output.rgb_BE, dim=1) @ F.normalize(output.query_CBE[0], dim=1).T / TEMPERATURE
    same = (label[:, None] == label).double()
    target = (same / same.sum(1, keepdim=True) + 1e-8).log()
    expected = sum(
        F.kl_div(target, scores.log_softmax(1), log_target=True, reduction="batchmean") for scores in (logits, logits.T)
    )
    torch.testing.assert_close(found[0], expected)


def test_sdm_of_ce_without_partners_is_the_symmetric_contrastive_loss():
    output, _ = make_output()
    has, everybody = torch.ones(1, 6, dtype=torch.bool), torch.arange(6)
    found = sdm(output.rgb_BE, output.query_CBE[:1], everybody, has, temperature=TEMPERATURE, form="ce")
    logits = F.normalize(output.rgb_BE, dim=1) @ F.normalize(output.query_CBE[0], dim=1).T / TEMPERATURE
    expected = (F.cross_entropy(logits, everybody) + F.cross_entropy(logits.T, everybody)) / 2
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_is_torchs_cross_entropy_of_what_is_there(smoothing):
    output, label = make_output()
    _, labels, has = all_features(output, label)
    found = identity_loss(output.logits_FBP, label, has.view(4, 6), smoothing=smoothing)
    logits = output.logits_FBP.flatten(0, 1)[has]
    torch.testing.assert_close(found, F.cross_entropy(logits, labels[has], label_smoothing=smoothing))
    target = torch.full_like(logits, smoothing / 4).scatter_add(
        1, labels[has][:, None], torch.full((len(logits), 1), 1 - smoothing, dtype=torch.float64)
    )
    torch.testing.assert_close(found, -(target * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("margin", [0.3, 0.0], ids=["hard", "soft"])
def test_triplet_is_that_of_the_loops(margin):
    feature, label, has = all_features(*make_output(8))
    label[has.nonzero()[-1]] = 9  # nobody else's
    found = triplet(feature, label, has, margin=margin)
    assert float(found) == pytest.approx(slow_triplet(feature, label, has, margin), rel=1e-9)


def test_circle_is_that_of_the_loops():
    feature, label, has = all_features(*make_output(8))
    label[has.nonzero()[-1]] = 9
    found = circle(feature, label, has, margin=0.25, scale=8.0)
    assert float(found) == pytest.approx(slow_circle(feature, label, has, 0.25, 8.0), rel=1e-9)


def test_the_total_weighs_the_parts_and_averages_sdm_within_sizes():
    output, label = make_output(subsets=5)
    sizes = [1, 1, 2, 2, 2]
    training = TrainConfig(
        id_weight=0.5,
        sdm_weight=2.0,
        triplet_weight=0.25,
        triplet_margin=0.3,
        circle_weight=0.1,
        temperature=TEMPERATURE,
    )
    losses = total(output, label, training, sizes)
    each = sdm(output.rgb_BE, output.query_CBE, label, output.has_CB, temperature=TEMPERATURE, form="kl")
    torch.testing.assert_close(losses.sdm, each[:2].mean() + each[2:].mean())
    feature, labels, has = all_features(output, label)
    torch.testing.assert_close(losses.triplet, triplet(feature, labels, has, margin=0.3))
    torch.testing.assert_close(losses.circle, circle(feature, labels, has, margin=0.25, scale=64.0))
    torch.testing.assert_close(
        losses.identity, identity_loss(output.logits_FBP, label, has.view(6, 6), smoothing=training.label_smoothing)
    )
    expected = 0.5 * losses.identity + 2 * losses.sdm + 0.25 * losses.triplet + 0.1 * losses.circle
    torch.testing.assert_close(losses.total, expected)


@pytest.mark.parametrize("name", ["identity", "sdm", "triplet", "circle"])
def test_a_part_without_weight_is_zero(name):
    output, label = make_output()
    weights = TrainConfig(id_weight=1.0, sdm_weight=1.0, triplet_weight=1.0, circle_weight=1.0)
    field = "id_weight" if name == "identity" else f"{name}_weight"
    everything = total(output, label, weights, [1, 1, 1])
    without = total(output, label, replace(weights, **{field: 0.0}), [1, 1, 1])  # type: ignore[arg-type]
    assert getattr(without, name) == 0
    torch.testing.assert_close(without.total, everything.total - getattr(everything, name))


def test_rgb_alone_is_classified_and_compared_with_rgb():
    output, label = make_output()
    alone = Output(output.rgb_BE, output.query_CBE[:0], output.has_CB[:0], output.logits_FBP[:1])
    losses = total(alone, label, TrainConfig(triplet_weight=1.0, triplet_margin=0.3), [])
    assert losses.sdm == 0
    torch.testing.assert_close(losses.identity, F.cross_entropy(alone.logits_FBP[0], label, label_smoothing=0.1))
    assert float(losses.triplet) == pytest.approx(
        slow_triplet(alone.rgb_BE, label, torch.ones(6, dtype=torch.bool), 0.3), rel=1e-9
    )


# Gradients and masks


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_sdm_are_those_of_differences(form):
    output, label = make_output(4, 2)
    inputs = (output.rgb_BE.requires_grad_(), output.query_CBE.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda rgb, query: sdm(rgb, query, label, output.has_CB, temperature=TEMPERATURE, form=form), inputs
    )


@pytest.mark.parametrize("margin", [0.5, 0.0], ids=["hard", "soft"])
def test_gradients_of_triplet_are_those_of_differences(margin):
    feature, label, has = all_features(*make_output(4, 2))
    assert torch.autograd.gradcheck(lambda x: triplet(x, label, has, margin=margin), feature.requires_grad_())


def test_gradients_of_identity_are_those_of_differences():
    output, label = make_output(4, 2)
    has = torch.cat([torch.ones_like(output.has_CB[:1]), output.has_CB])
    assert torch.autograd.gradcheck(
        lambda logits: identity_loss(logits, label, has, smoothing=0.1), output.logits_FBP.requires_grad_()
    )


def test_gradients_of_circle_are_those_of_differences_with_its_factors_held():
    feature, label, has = all_features(*make_output(4, 2))
    feature.requires_grad_()
    found = torch.autograd.grad(circle(feature, label, has, margin=0.25, scale=8.0), feature)[0]
    fixed = F.normalize(feature.detach(), dim=1) @ F.normalize(feature.detach(), dim=1).T

    def held(x: Tensor) -> float:
        losses = []
        for i in range(len(label)):
            positives, negatives = neighbours(label, has, i)
            if positives and negatives:
                pull = sum(
                    math.exp(-8 * max(0.0, 1.25 - float(fixed[i, j])) * (cosine(x[i], x[j]) - 0.75)) for j in positives
                )
                push = sum(
                    math.exp(8 * max(0.0, float(fixed[i, j]) + 0.25) * (cosine(x[i], x[j]) - 0.25)) for j in negatives
                )
                losses.append(math.log(1 + pull * push))
        return sum(losses) / len(losses)

    for row, column in ((0, 0), (3, 2), (int(has.nonzero()[-1]), 4)):
        step = torch.zeros_like(feature)
        step[row, column] = 1e-5
        difference = (held(feature.detach() + step) - held(feature.detach() - step)) / 2e-5
        assert float(found[row, column]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_masked_has_neither_influence_nor_gradient(form):
    training = TrainConfig(triplet_weight=1.0, circle_weight=1.0, sdm_form=form)
    output, label = make_output()
    missing = ~output.has_CB
    query, logits = output.query_CBE.clone(), output.logits_FBP.clone()
    query[missing] = draw(int(missing.sum()), 5, seed=9) * 1e3
    query[missing.nonzero()[0].unbind()] = 0.0
    logits[1:][missing] = 1e4
    changed = Output(output.rgb_BE.clone(), query, output.has_CB, logits)
    grads, values = [], []
    for each in (output, changed):
        leaves = [t.requires_grad_() for t in (each.rgb_BE, each.query_CBE, each.logits_FBP)]
        losses = total(each, label, training, [1, 1, 2])
        losses.total.backward()
        values.append(torch.stack(losses).detach())
        grads.append([leaf.grad if leaf.grad is not None else torch.empty(0) for leaf in leaves])
    assert torch.equal(*values)
    for rgb, query_grad, logits_grad in grads:
        assert torch.equal(rgb, grads[0][0])
        assert not query_grad[missing].any()
        assert not logits_grad[1:][missing].any()
        assert query_grad[~missing].abs().sum(-1).min() > 0


def test_a_samples_rgb_takes_no_part_in_the_sdm_of_a_subset_it_lacks():
    output, label = make_output()
    has = torch.ones(1, 6, dtype=torch.bool)
    has[0, 2] = False
    rgb = output.rgb_BE.requires_grad_()
    sdm(rgb, output.query_CBE[:1], label, has, temperature=TEMPERATURE, form="kl").sum().backward()
    assert rgb.grad is not None
    assert not rgb.grad[2].any()
    assert rgb.grad[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("label", "has"),
    [([0, 0, 0, 0], True), ([0, 1, 2, 3], True), ([0, 0, 1, 1], False), ([0], True)],
    ids=["one identity", "nobody twice", "nothing there", "one sample"],
)
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_finite(label, has, dtype, form):
    count = len(label)
    tensors = [draw(count, 5), draw(2, count, 5, seed=1), draw(3, count, 4)]
    tensors[1][0, 0] = 0.0
    tensors[1][1] = tensors[0]  # distances of 0
    rgb, query, logits = (tensor.float().requires_grad_() for tensor in tensors)
    output = Output(rgb, query, torch.full((2, count), has), logits.to(dtype))
    losses = total(
        output,
        torch.tensor(label),
        TrainConfig(triplet_weight=1.0, triplet_margin=0.0, circle_weight=1.0, sdm_form=form),
        [1, 2],
    )
    losses.total.backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses)
    for leaf in (rgb, query, logits):
        assert leaf.grad is None or leaf.grad.isfinite().all()
    if not has:
        assert losses.sdm == 0
    if len(set(label)) in (1, len(label)):
        # RGB and queries of a sample are of one person, so that only other people can be lacking
        assert (losses.triplet == 0) == (len(set(label)) == 1)


def test_autocast_does_not_round_cosines():
    output, label = make_output(8)
    low = Output(*(t.float() if t.is_floating_point() else t for t in output))
    training = TrainConfig(triplet_weight=1.0, circle_weight=1.0)
    exact = total(low, label, training, [1, 1, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found = total(low, label, training, [1, 1, 1])
    for part, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(part, expected)


def test_features_of_any_length_give_the_same_comparisons():
    output, label = make_output()
    training = TrainConfig(triplet_weight=1.0, circle_weight=1.0)
    longer = output._replace(rgb_BE=7 * output.rgb_BE, query_CBE=0.1 * output.query_CBE)
    torch.testing.assert_close(
        tuple(total(longer, label, training, [1, 1, 1])), tuple(total(output, label, training, [1, 1, 1]))
    )
