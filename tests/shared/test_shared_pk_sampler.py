"""P x K plans against properties checked one batch at a time, brute force for lengths, and exact laws for the draws.

Chi-square statistics are compared with their mean plus some standard deviations of the distribution they should have;
all seeds are fixed, so that a test passes or fails for good. Axes as in shared/pk_sampler.py.
"""

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from shared import pk_sampler
from shared.pk_sampler import (
    RGB,
    CachedModalAwarePKSampler,
    PKSampler,
    Summary,
    make_pk_sampler,
    plan_epoch,
    rank_batches,
    steps_per_rank,
)

# One identity each: how many RGB samples it has, and how many others.
Sizes = list[tuple[int, int]]


def samples_of(sizes: Sizes, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels and modalities of such identities in a random order; identity i has the label 10 * i - 7."""
    pairs = [
        (10 * i - 7, modality)
        for i, (num_rgb, num_other) in enumerate(sizes)
        for modality in [RGB] * num_rgb + [1 + j % 3 for j in range(num_other)]
    ]
    random.Random(seed).shuffle(pairs)
    return torch.tensor([label for label, _ in pairs]), torch.tensor([modality for _, modality in pairs])


def sampler_of(sizes: Sizes, identities_per_batch: int, num_instances: int, **options: Any) -> PKSampler:
    return make_pk_sampler(
        *samples_of(sizes), identities_per_batch=identities_per_batch, num_instances=num_instances, **options
    )


def plan_of(sampler: PKSampler, epoch: int = 0, *, seed: int = 1) -> list[list[list[int]]]:
    return plan_epoch(sampler, seed=seed, epoch=epoch).tolist()


def is_pairable(size: tuple[int, int]) -> bool:
    return size[0] > 0 and size[1] > 0


def fewest_visits(size: tuple[int, int], num_instances: int, *, is_split: bool) -> int:
    """Found by trying: so many visits have room for all samples, with an RGB sample and another one in each."""
    num_rgb, num_other = size
    for visits in itertools.count(1):
        need = max(num_rgb, visits) + max(num_other, visits) if is_split else num_rgb + num_other
        if need <= visits * num_instances:
            return visits
    raise AssertionError


@dataclass(frozen=True)
class Case:
    sizes: Sizes
    identities_per_batch: int
    num_instances: int
    length: Any
    ensure_rgb: bool
    prefer_complete: Any


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ensure_rgb = draw(st.booleans())
    num_instances = draw(st.integers(2 if ensure_rgb else 1, 5))
    count = st.integers(0, 6)
    sizes = draw(st.lists(st.tuples(count, count).filter(any), min_size=1, max_size=9))
    if draw(st.booleans()):
        sizes.append((draw(st.integers(0, 40)), draw(st.integers(1, 40))))  # a giant
    prefer_complete = draw(st.sampled_from(["any", "first", "only"]))
    if prefer_complete == "only" and not any(map(is_pairable, sizes)):
        prefer_complete = "first"
    admitted = len([size for size in sizes if is_pairable(size) or prefer_complete != "only"])
    identities_per_batch = draw(st.integers(1, admitted))
    length = draw(st.sampled_from(["identities", "samples"]) | st.integers(1, 30))
    return Case(sizes, identities_per_batch, num_instances, length, ensure_rgb, prefer_complete)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 5))
def test_every_plan_has_all_that_is_promised(case: Case, epoch: int):
    label_N, modality_N = samples_of(case.sizes, seed=epoch)
    labels, modalities = [(label + 7) // 10 for label in label_N.tolist()], modality_N.tolist()
    p, k = case.identities_per_batch, case.num_instances
    sampler = make_pk_sampler(
        label_N,
        modality_N,
        identities_per_batch=p,
        num_instances=k,
        length=case.length,
        ensure_rgb=case.ensure_rgb,
        prefer_complete=case.prefer_complete,
    )
    plan_TPK = plan_epoch(sampler, seed=3, epoch=epoch)

    admitted = [i for i, size in enumerate(case.sizes) if is_pairable(size) or case.prefer_complete != "only"]
    split = {i: case.ensure_rgb and is_pairable(case.sizes[i]) for i in admitted}
    cover = {i: fewest_visits(case.sizes[i], k, is_split=split[i]) for i in admitted}
    all_batches = max(max(cover.values()), math.ceil(sum(cover.values()) / p))
    num_batches = {"identities": len(admitted) // p, "samples": all_batches}.get(case.length, case.length)
    assert plan_TPK.dtype == torch.int64
    assert plan_TPK.shape == (num_batches, p, k)
    assert sampler.num_batches == num_batches

    visits: Counter[int] = Counter()
    draws: Counter[int] = Counter()
    pairable_in_batch = []
    for batch in plan_TPK.tolist():
        owners = [{labels[sample] for sample in group} for group in batch]
        assert all(len(owner) == 1 for owner in owners)
        identities = [owner.pop() for owner in owners]
        assert len(set(identities)) == p
        assert set(identities) <= set(admitted)
        visits.update(identities)
        pairable_in_batch.append(sum(is_pairable(case.sizes[i]) for i in identities))
        for identity, group in zip(identities, batch, strict=True):
            draws.update(group)
            assert len(set(group)) == min(k, sum(case.sizes[identity]))
            kinds = [modalities[sample] == RGB for sample in group]
            if split[identity]:
                assert any(kinds)
                assert not all(kinds)
                assert kinds == sorted(kinds, reverse=True)

    if num_batches >= all_batches:
        assert set(draws) == {sample for sample, label in enumerate(labels) if label in admitted}
    if case.length == "identities":
        assert set(visits.values()) <= {1}
    if case.prefer_complete == "first":
        assert pairable_in_batch == sorted(pairable_in_batch, reverse=True)

    # Visits are even: whoever has fewer has all that he can use, and whoever has more needs them.
    can_all_be_used = sum(min(cover[i], num_batches) for i in admitted) >= num_batches * p
    for i, j in itertools.permutations(admitted, 2):
        if visits[i] > visits[j] + 1:
            if can_all_be_used or case.length == "identities":
                assert visits[j] == min(cover[j], num_batches)
            else:
                assert visits[j] == num_batches or visits[i] <= min(cover[i], num_batches)
    # No sample is drawn twice more often than another of its list.
    for i in admitted:
        for kind in (True, False) if split[i] else (None,):
            counts = [
                draws[sample]
                for sample, (label, modality) in enumerate(zip(labels, modalities, strict=True))
                if label == i and kind in (None, modality == RGB)
            ]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("sizes", "num_instances"),
    [
        ([(1, 0)] * 4, 3),
        ([(0, 1)] * 4, 1),
        ([(1, 1)] * 4, 4),
        ([(200, 0), (1, 0), (0, 1), (1, 1)], 4),
        ([(1, 200), (200, 1), (1, 1), (3, 3)], 2),
        ([(9, 9), (9, 9), (9, 9), (9, 9)], 4),
    ],
    ids=["one RGB sample", "one other sample", "one of each", "a giant", "lopsided giants", "equals"],
)
def test_exactly_p_identities_are_all_in_every_batch(sizes: Sizes, num_instances: int):
    sampler = sampler_of(sizes, 4, num_instances)
    label_N, _ = samples_of(sizes)
    plan_TPK = plan_epoch(sampler, seed=0, epoch=0)
    assert plan_TPK.unique().numel() == len(label_N)
    assert all(set(row) == {-7, 3, 13, 23} for row in label_N[plan_TPK[:, :, 0]].tolist())


def test_one_identity_alone_gives_batches_of_itself():
    plan = plan_of(sampler_of([(7, 0)], 1, 3))
    assert len(plan) == 3
    assert {sample for batch in plan for sample in batch[0]} == set(range(7))


def test_a_giant_identity_is_in_every_batch_and_the_others_share_the_rest_evenly():
    sizes = [(400, 0)] + [(4, 0)] * 20
    sampler = sampler_of(sizes, 4, 4)
    label_N, _ = samples_of(sizes)
    visits = Counter(label_N[plan_epoch(sampler, seed=0, epoch=0)[:, :, 0]].flatten().tolist())
    assert sampler.num_batches == visits.pop(-7) == 100
    assert set(visits.values()) == {100 * 3 // 20}


def test_too_few_identities_say_what_to_change():
    with pytest.raises(ValueError, match="3 identities are fewer than the 8 of a batch; lower identities_per_batch"):
        sampler_of([(2, 2)] * 3, 8, 4)
    with pytest.raises(
        ValueError, match=r'2 of 9 identities have RGB and another modality.*prefer_complete to "first"'
    ):
        sampler_of([(2, 0)] * 7 + [(2, 2)] * 2, 8, 4, prefer_complete="only")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identities_per_batch": 0}, "must be at least 1"),
        ({"num_instances": 0}, "must be at least 1"),
        ({"num_instances": 1}, "raise num_instances to 2, or switch ensure_rgb off"),
        ({"length": 0}, "length is 0; expected"),
        ({"length": "epochs"}, "length is 'epochs'; expected"),
        ({"prefer_complete": "yes"}, "prefer_complete is 'yes'; expected"),
        ({"label_N": torch.zeros(4)}, "label_N has shape .4,. and type torch.float32; expected"),
        ({"modality_N": torch.zeros(3, dtype=torch.int64)}, "modality_N has shape .3,."),
        (dict.fromkeys(("label_N", "modality_N"), torch.zeros(0, dtype=torch.int64)), "at least one"),
    ],
)
def test_impossible_arguments_say_what_is_expected(options: dict[str, Any], message: str):
    good: dict[str, Any] = {"label_N": torch.tensor([0, 0, 1, 1]), "modality_N": torch.tensor([0, 1, 0, 1])}
    good |= {"identities_per_batch": 2, "num_instances": 2}
    make_pk_sampler(**good)
    with pytest.raises(ValueError, match=message):
        make_pk_sampler(**(good | options))


def test_one_sample_each_needs_no_room_for_pairs_where_nobody_has_both():
    assert len(plan_of(sampler_of([(3, 0), (0, 3)], 2, 1))) == 3


# What a plan depends on


def test_a_plan_depends_on_seed_and_epoch_alone():
    sampler = sampler_of([(5, 4)] * 12, 4, 3)
    want = plan_of(sampler, 2, seed=7)
    state = torch.random.get_rng_state()
    plan_of(sampler, 3, seed=7)
    assert plan_of(sampler, 2, seed=7) == want
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert plan_of(sampler_of([(5, 4)] * 12, 4, 3), 2, seed=7) == want
    assert plan_of(sampler, 3, seed=7) != want
    assert plan_of(sampler, 2, seed=8) != want


def test_only_the_order_of_labels_and_whether_a_sample_is_rgb_matter():
    sizes = [(5, 4), (1, 0), (0, 3), (2, 2), (8, 1)]
    label_N, modality_N = samples_of(sizes)
    make = partial(make_pk_sampler, identities_per_batch=3, num_instances=3)
    want = plan_of(make(label_N, modality_N))
    assert plan_of(make((label_N * 1000 - 10**12), (modality_N != RGB).int() * 4)) == want


def test_plans_looked_up_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch):
    sampler = sampler_of([(9, 7), (30, 2), (1, 1), (4, 0), (5, 5)], 3, 4)
    want = plan_of(sampler)
    for cells in (1, 20):
        monkeypatch.setattr(pk_sampler, "_CELLS", cells)
        assert plan_of(sampler) == want


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
def test_ranks_take_turns_and_have_equally_many_batches(world: int):
    plan_TPK = plan_epoch(sampler_of([(9, 9)] * 8, 4, 3), seed=0, epoch=0)
    num_batches = len(plan_TPK)
    assert num_batches == 12
    steps = steps_per_rank(num_batches, world=world)
    assert (steps - 1) * world < num_batches <= steps * world
    ranks = [rank_batches(plan_TPK, rank=rank, world=world).tolist() for rank in range(world)]
    assert {len(batches) for batches in ranks} == {steps}
    turns = [batch for step in zip(*ranks, strict=True) for batch in step]
    want = plan_TPK.tolist()
    assert turns == list(itertools.islice(itertools.cycle(want), steps * world))
    assert ranks[world - 1][: num_batches // world] == want[world - 1 :: world]


def test_a_resumed_rank_goes_on_with_the_batches_it_would_have_had():
    sampler = sampler_of([(9, 9)] * 9, 4, 3)
    whole_SPK = rank_batches(plan_epoch(sampler, seed=4, epoch=6), rank=1, world=3)
    for start in range(len(whole_SPK) + 1):
        again = sampler_of([(9, 9)] * 9, 4, 3)
        rest_SPK = rank_batches(plan_epoch(again, seed=4, epoch=6), rank=1, world=3, start=start)
        assert torch.equal(rest_SPK, whole_SPK[start:])


@pytest.mark.parametrize(("rank", "world", "start"), [(2, 2, 0), (-1, 2, 0), (0, 2, 7), (0, 1, -1)])
def test_ranks_and_steps_that_do_not_exist_are_errors(rank: int, world: int, start: int):
    plan_TPK = torch.zeros(12, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected a rank below"):
        rank_batches(plan_TPK, rank=rank, world=world, start=start)


# How draws are distributed


def chi_square(counts: list[int], *, variance: float = 1.0) -> float:
    """Standard deviations by which the statistic of equal chances exceeds its mean.

    Counts whose variance is not the mean but a part of it, as without replacement, give that part.
    """
    expected = sum(counts) / len(counts)
    statistic = sum((count - expected) ** 2 for count in counts) / expected / variance
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("ensure_rgb", [True, False])
def test_every_sample_of_an_identity_is_drawn_equally_often(ensure_rgb: bool):
    sizes = [(8, 12), (10, 10), (20, 0), (0, 20)]  # 4 of 20: the rules never bind
    sampler = sampler_of(sizes, 4, 4, length="identities", ensure_rgb=ensure_rgb)
    drawn = torch.stack([plan_epoch(sampler, seed=0, epoch=epoch) for epoch in range(1500)])
    counts = drawn.flatten().bincount(minlength=80).tolist()
    assert -4 < chi_square(counts, variance=1 - 4 / 20) < 4


def test_rgb_has_its_share_of_the_draws_where_the_rules_leave_room():
    sizes = [(13, 27)] * 4
    _, modality_N = samples_of(sizes)
    sampler = sampler_of(sizes, 4, 4, length="identities")
    num_rgb = sum(
        int((modality_N[plan_epoch(sampler, seed=0, epoch=epoch)] == RGB).sum(2).flatten().sum())
        for epoch in range(1000)
    )
    # 1.3 of 4 in each of 4000 visits: 1 or 2
    assert abs(num_rgb - 1.3 * 4000) < 4 * math.sqrt(4000 * 0.3 * 0.7)


def test_identities_that_find_no_place_are_others_every_epoch():
    sampler = sampler_of([(2, 2)] * 11, 4, 2, length="identities")
    label_N, _ = samples_of([(2, 2)] * 11)
    missing = [
        set(range(11))
        - {(label + 7) // 10 for label in label_N[plan_epoch(sampler, seed=0, epoch=epoch)[:, :, 0]].flatten().tolist()}
        for epoch in range(800)
    ]
    assert {len(left) for left in missing} == {3}
    counts = Counter(identity for left in missing for identity in left)
    assert -4 < chi_square([counts[i] for i in range(11)], variance=1 - 3 / 11) < 4


def test_an_identity_is_in_any_batch_with_equal_chances():
    sizes = [(5, 0), (9, 0), (13, 0), (2, 0), (17, 0), (6, 0), (6, 0)]
    sampler = sampler_of(sizes, 3, 2, prefer_complete="any")
    label_N, _ = samples_of(sizes)
    has_TG = torch.zeros(sampler.num_batches, len(sizes))
    for epoch in range(600):
        identity_TP = (label_N[plan_epoch(sampler, seed=0, epoch=epoch)[:, :, 0]] + 7) // 10
        has_TG += torch.nn.functional.one_hot(identity_TP, len(sizes)).sum(1)
    for count_T in has_TG.t().tolist():
        share = sum(count_T) / len(count_T) / 600
        assert chi_square(count_T, variance=max(1e-9, 1 - share)) < 4 or share == 1


def partners(plans: list[Tensor], label_N: Tensor) -> dict[int, set[int]]:
    met: dict[int, set[int]] = {}
    for plan_TPK in plans:
        for identities in label_N[plan_TPK[:, :, 0]].tolist():
            for identity in identities:
                met.setdefault(identity, set()).update(identities)
    return {identity: others - {identity} for identity, others in met.items()}


def test_identities_meet_nearly_as_many_partners_as_in_batches_drawn_blindly():
    sizes = [(12, 36)] * 160
    sampler = sampler_of(sizes, 8, 4)
    label_N, _ = samples_of(sizes)
    assert sampler.num_batches == 12 * 160 // 8
    for num_epochs in (1, 4):
        plans = [plan_epoch(sampler, seed=0, epoch=epoch) for epoch in range(num_epochs)]
        met = [len(others) for others in partners(plans, label_N).values()]
        blind = 159 * (1 - (1 - 7 / 159) ** (12 * num_epochs))
        assert sum(met) / 160 > 0.95 * blind
        assert min(met) > 0.75 * blind


@pytest.mark.parametrize("sizes", [[(4, 8)] * 10, [(4, 8)] * 5 + [(12, 0)] * 5], ids=["all pairable", "half of them"])
def test_every_pair_of_identities_meets_equally_often(sizes: Sizes):
    sampler = sampler_of(sizes, 3, 4, prefer_complete="first")
    label_N, _ = samples_of(sizes)
    counts: Counter[tuple[int, ...]] = Counter()
    for epoch in range(400):
        for identities in label_N[plan_epoch(sampler, seed=0, epoch=epoch)[:, :, 0]].tolist():
            counts.update(itertools.combinations(sorted(identities), 2))
    assert len(counts) == 45
    assert chi_square(list(counts.values())) < 4


# Identities that have both


def test_pairable_identities_come_before_all_others_when_each_is_visited_once():
    sizes = [(2, 2) if i % 3 else (4, 0) for i in range(30)]
    label_N, _ = samples_of(sizes)
    for length in ("identities", 7):
        plan_TPK = plan_epoch(sampler_of(sizes, 4, 2, length=length), seed=0, epoch=0)
        order = [is_pairable(sizes[(label + 7) // 10]) for label in label_N[plan_TPK[:, :, 0]].flatten().tolist()]
        assert order == [True] * 20 + [False] * 8


def test_an_epoch_too_short_for_all_visits_pairable_identities_more_often():
    sizes = [(4, 4) if i < 6 else (8, 0) for i in range(12)]
    label_N, _ = samples_of(sizes)
    plan_TPK = plan_epoch(sampler_of(sizes, 3, 2, length=6), seed=0, epoch=0)
    visits = Counter(((label_N[plan_TPK[:, :, 0]] + 7) // 10).flatten().tolist())
    assert visits == {i: 2 if i < 6 else 1 for i in range(12)}


def test_only_pairable_identities_are_drawn_where_asked():
    sizes = [(4, 4) if i % 2 else (8, 0) for i in range(12)]
    label_N, _ = samples_of(sizes)
    plan_TPK = plan_epoch(sampler_of(sizes, 3, 2, prefer_complete="only"), seed=0, epoch=0)
    assert sorted(set(label_N[plan_TPK].flatten().tolist())) == [10 * i - 7 for i in range(1, 12, 2)]
    assert plan_TPK.unique().numel() == 6 * 8


# What is printed


def with_285_of_320() -> Sizes:
    return [(40, 7)] * 285 + [(43, 0)] * 35


def test_the_summary_counts_what_an_epoch_is_made_of():
    ticks = iter([100.0, 102.34])
    sampler = sampler_of(with_285_of_320(), 8, 4, length="identities", clock=lambda: next(ticks))
    num_samples = 285 * 47 + 35 * 43
    assert replace(sampler.summary, elapsed_s=0) == Summary(num_samples, 320, 285, 40, 8, 4, 0)
    assert sampler.summary.elapsed_s == pytest.approx(2.34)
    assert sampler.summary.lines() == [
        f"{num_samples} samples of 320 identities, of which 285 (89.1%) have RGB and another modality (2.34 s)",
        f"an epoch has 40 batches of 8 identities x 4 samples: 1280 draws, {1280 / num_samples:.2f} for each sample "
        "there is",
    ]


def test_the_original_lines_are_those_of_the_notes():
    assert Summary(14910, 320, 285, 35, 8, 4, 2.345).original_lines() == [
        "\u5f00\u59cb\u7f13\u5b58\u6570\u636e\u96c6\u5143\u4fe1\u606f\uff0c\u517114910\u4e2a\u6837\u672c...",
        "\u2705 \u5143\u4fe1\u606f\u7f13\u5b58\u5b8c\u6210 (2.3s):",
        "  \u603bID\u6570: 320",
        "  \u53ef\u914d\u5bf9ID\u6570: 285 (89.1%)",
        "  \u9884\u671fbatch\u6570: 35",
    ]


# The original's spelling


class Photos(Dataset[tuple[int, int]]):
    """A dataset that counts how often its labels are read."""

    def __init__(self, sizes: Sizes) -> None:
        self._label_N, self._modality_N = samples_of(sizes)
        self.reads: Counter[str] = Counter()

    @property
    def labels(self) -> Tensor:
        self.reads["labels"] += 1
        return self._label_N

    @property
    def modalities(self) -> Tensor:
        self.reads["modalities"] += 1
        return self._modality_N

    def __len__(self) -> int:
        return len(self._label_N)

    def __getitem__(self, index: int) -> tuple[int, int]:
        self.reads["samples"] += 1
        return int(self._label_N[index]), int(self._modality_N[index])


def test_modalities_are_looked_up_once_and_never_per_batch():
    photos = Photos([(5, 5)] * 12)
    sampler = CachedModalAwarePKSampler(photos, 16, 4, length="samples")
    for _ in range(3):
        assert len(list(sampler)) == len(sampler)
    assert photos.reads == {"labels": 1, "modalities": 1}


def test_the_original_arguments_give_the_batches_of_the_plan():
    sizes = with_285_of_320()
    photos = Photos(sizes)
    sampler = CachedModalAwarePKSampler(photos, batch_size=32, num_instances=4, ensure_rgb=True, seed=42)
    assert len(sampler) == 35
    assert sampler.sampler.summary.num_samples == len(photos)
    assert sampler.sampler.summary.num_pairable == 285
    core = sampler_of(sizes, 8, 4, length="identities", prefer_complete="only")
    want = plan_epoch(core, seed=42, epoch=0).flatten(1).tolist()
    assert list(sampler) == want
    assert all(type(index) is int for index in want[0])


def test_every_iteration_is_the_next_epoch_unless_told_otherwise():
    sampler = CachedModalAwarePKSampler(Photos([(5, 5)] * 12), 16)
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]
    assert list(sampler) == epochs[2]


def test_positions_are_those_of_the_subset_even_of_a_subset_of_one():
    photos = Photos([(6, 6)] * 10)
    rng = random.Random(0)
    outer = Subset(photos, rng.sample(range(120), 80))
    subset = Subset(outer, rng.sample(range(80), 60))
    sampler = CachedModalAwarePKSampler(subset, 8, 2, length="samples", prefer_complete=False)
    batches = list(sampler)
    assert {index for batch in batches for index in batch} == set(range(60))
    for batch in batches:
        labels = [subset[index][0] for index in batch]
        assert labels[::2] == labels[1::2]
        assert len(set(labels)) == 4


def test_the_ranks_share_an_epoch():
    photos = Photos([(5, 5)] * 11)
    make = partial(CachedModalAwarePKSampler, photos, 16, length="samples")
    whole = list(make())
    assert len(whole) == 9
    ranks = [make(rank=rank, world=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [5, 5]
    assert [list(rank) for rank in ranks] == [whole[::2], [*whole[1::2], whole[0]]]


@pytest.mark.parametrize(("batch_size", "num_instances"), [(32, 4), (48, 4), (48, 3), (64, 4)])
def test_a_data_loader_takes_it_with_batches_of_any_form(batch_size: int, num_instances: int):
    photos = Photos([(4, 4)] * 20)
    sampler = CachedModalAwarePKSampler(photos, batch_size, num_instances)
    loader = DataLoader(photos, batch_sampler=sampler)
    batches = list(loader)
    assert len(batches) == len(loader) == len(sampler) == 20 * num_instances // batch_size
    for label_B, modality_B in batches:
        label_PK, is_rgb_PK = label_B.view(-1, num_instances), modality_B.view(-1, num_instances) == RGB
        assert (label_PK == label_PK[:, :1]).all()
        assert label_PK[:, 0].unique().numel() == batch_size // num_instances
        assert is_rgb_PK.any(1).all()
        assert not is_rgb_PK.all(1).any()


@pytest.mark.parametrize("num_pairable", [0, 3])
def test_with_too_few_pairable_identities_everybody_is_drawn(num_pairable: int):
    photos = Photos([(2, 2)] * num_pairable + [(4, 0)] * (12 - num_pairable))
    sampler = CachedModalAwarePKSampler(photos, 16, 4)
    batches = list(sampler)
    assert len(batches) == 3
    assert len({photos[index][0] for batch in batches for index in batch}) == 12
    assert len({photos[index][0] for index in batches[0] if photos[index][1] != RGB}) == num_pairable


def test_what_the_original_spelling_cannot_use_is_named():
    photos = Photos([(2, 2)] * 12)
    with pytest.raises(ValueError, match="batch_size 30 is no multiple of num_instances 4"):
        CachedModalAwarePKSampler(photos, 30, 4)
    with pytest.raises(ValueError, match="batch_size 2 is no multiple of num_instances 4"):
        CachedModalAwarePKSampler(photos, 2, 4)
    unlabelled: Any = list(range(5))
    with pytest.raises(ValueError, match="list has labels of type NoneType and modalities of type NoneType; expected"):
        CachedModalAwarePKSampler(Subset(unlabelled, [1, 2]), 8)
    with pytest.raises(ValueError, match="12 identities are fewer than the 16 of a batch"):
        CachedModalAwarePKSampler(photos, 64)
