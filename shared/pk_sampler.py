"""P x K batches: P identities of K samples each, planned for a whole epoch as one tensor, exact and repeatable.

Axes: N samples, G identities, T batches of an epoch, P identities of a batch, K samples (instances) of an identity in a
batch, S batches of one rank, V visits. A visit is one identity's turn in one batch, so that an epoch has V = T * P.

What holds in every epoch:
- the P identities of a batch differ;
- a visit has min(K, n) different samples of the n that its identity has;
- with ensure_rgb, a visit to an identity that has both (a pairable one) has an RGB sample and another one;
- with the length "samples" every sample is drawn, and so with a number of batches that is at least as large;
- the plan depends on (seed, epoch) and the data alone. Ranks take turns in it, and to resume is to skip batches.

How. Each identity gets a number of visits, at most T: as few as cover its samples, and the rest of the epoch goes to
those with the fewest. Its samples are shuffled, RGB apart from the others, and its visits read both lists on and on in
circles. RGB's part in a visit is its part among the samples as far as the rules allow, rounded at random. The visits,
identity after identity, are then laid down in P columns of T batches: since nobody has more than T visits, nobody
stands twice in a batch. Each column is shuffled for itself, so that an identity meets other partners at each visit; an
identity whose visits begin in one column and end in the next is kept out of the batches that it has in the first.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Subset

from shared.seed import make_generator

RGB = 0  # the modality that ensure_rgb and prefer_complete are about; every other number is another modality

Length = Literal["identities", "samples"] | int
Preference = Literal["any", "first", "only"]

_STREAM = (1 << 20) + 8  # far from the small numbers that callers give their own streams
_RANDOM_BITS = 38  # of a sort key, below the number of the list that a sample belongs to
_CELLS = 1 << 19  # samples of a plan that are looked up at once: their buffers stay small


@dataclass(frozen=True)
class Summary:
    """What an epoch is made of."""

    num_samples: int
    num_identities: int
    num_pairable: int  # identities that have RGB and another modality
    num_batches: int
    identities_per_batch: int
    num_instances: int
    elapsed_s: float  # that looking through labels and modalities took

    def lines(self) -> list[str]:
        """The summary in English, two lines."""
        draws = self.num_batches * self.identities_per_batch * self.num_instances
        return [
            f"{self.num_samples} samples of {self.num_identities} identities, of which {self.num_pairable} "
            f"({self.num_pairable / self.num_identities:.1%}) have RGB and another modality ({self.elapsed_s:.2f} s)",
            f"an epoch has {self.num_batches} batches of {self.identities_per_batch} identities x "
            f"{self.num_instances} samples: {draws} draws, {draws / self.num_samples:.2f} for each sample there is",
        ]

    def original_lines(self) -> list[str]:
        """The summary as the original sampler logs it, five lines in Chinese."""
        # The escapes spell: start of caching, caching done, identities, pairable identities, expected batches.
        share = f"{self.num_pairable / self.num_identities:.1%}"
        return [
            "\u5f00\u59cb\u7f13\u5b58\u6570\u636e\u96c6\u5143\u4fe1\u606f\uff0c"
            f"\u5171{self.num_samples}\u4e2a\u6837\u672c...",
            f"\u2705 \u5143\u4fe1\u606f\u7f13\u5b58\u5b8c\u6210 ({self.elapsed_s:.1f}s):",
            f"  \u603bID\u6570: {self.num_identities}",
            f"  \u53ef\u914d\u5bf9ID\u6570: {self.num_pairable} ({share})",
            f"  \u9884\u671fbatch\u6570: {self.num_batches}",
        ]


@dataclass(frozen=True)
class PKSampler:
    """What plan_epoch needs, made by make_pk_sampler; identities are numbered 0 .. G - 1 in the order of their labels.

    A list is the samples of an identity, or its RGB samples and its others where both are needed in each visit.
    """

    sample_N: Tensor  # [N] int64, positions in the labels given, list after list
    list_N: Tensor  # [N] int64, rising: twice the identity, plus 1 for the list of the others
    start_G: Tensor  # [G] int64, where in sample_N the identity begins
    first_G: Tensor  # [G] int64, samples in the first list
    second_G: Tensor  # [G] int64, samples in the second list, 0 where there is none
    visits_G: Tensor  # [G] int64, visits in every epoch
    may_add_G: Tensor  # [G] bool, who may be visited once more
    num_added: int  # so many of them are in every epoch
    is_pairable_G: Tensor  # [G] bool
    prefer_complete: Preference
    summary: Summary

    @property
    def num_batches(self) -> int:
        """The batches of an epoch, over all ranks."""
        return self.summary.num_batches


def make_pk_sampler(
    label_N: Tensor,
    modality_N: Tensor,
    *,
    identities_per_batch: int,
    num_instances: int,
    length: Length = "samples",
    ensure_rgb: bool = True,
    prefer_complete: Preference = "first",
    clock: Callable[[], float] = time.perf_counter,
) -> PKSampler:
    """The sampler of these samples, whose plans hold positions in the two tensors.

    label_N ([N] integers) tells whose a sample is; modality_N ([N] integers) what it shows, RGB or another modality.
    For a subset pass the two tensors of the subset.

    The length of an epoch is "identities" (each is visited once; of G identities G modulo P, others in every epoch,
    find no place), "samples" (the fewest batches that hold every sample) or a number of batches over all ranks. If it
    is too small for all samples, visits are dealt evenly to the identities that have samples left.

    prefer_complete "only" leaves out the identities that are not pairable. With "first" they come last: no batch has
    more pairable identities than the one before it, and where an epoch is too short for one more visit to everybody,
    the pairable ones have it.
    """
    begin = clock()
    label_N, modality_N = label_N.cpu(), modality_N.cpu()
    _check_tensors(label_N, modality_N)
    if identities_per_batch < 1 or num_instances < 1:
        raise ValueError(
            f"a batch of {identities_per_batch} identities x {num_instances} samples is empty; "
            "identities_per_batch and num_instances must be at least 1"
        )
    identity_N, is_rgb_N = torch.unique(label_N, return_inverse=True)[1], modality_N == RGB
    size_G = identity_N.bincount()
    num_rgb_G = identity_N[is_rgb_N].bincount(minlength=len(size_G))
    is_pairable_G = (num_rgb_G > 0) & (num_rgb_G < size_G)
    num_samples, num_all, num_pairable = len(label_N), len(size_G), int(is_pairable_G.sum())

    if prefer_complete == "only":
        keep_N = is_pairable_G[identity_N].nonzero().squeeze(1)
        identity_N, is_rgb_N = is_pairable_G.long().cumsum(0).sub(1)[identity_N[keep_N]], is_rgb_N[keep_N]
        size_G, num_rgb_G = size_G[is_pairable_G], num_rgb_G[is_pairable_G]
        is_pairable_G = is_pairable_G[is_pairable_G]
    else:
        keep_N = torch.arange(num_samples)
    _check_identities(len(size_G), identities_per_batch, num_all, prefer_complete)
    if ensure_rgb and num_pairable and num_instances < 2:
        raise ValueError(
            f"num_instances 1 leaves no place for an RGB sample and another one of the {num_pairable} identities that "
            "have both; raise num_instances to 2, or switch ensure_rgb off"
        )

    is_split_G = is_pairable_G if ensure_rgb else torch.zeros_like(is_pairable_G)
    first_G = torch.where(is_split_G, num_rgb_G, size_G)
    second_G = size_G - first_G
    # Every plan sorts the samples again, which costs less when the lists are in order already.
    list_N, by_list_N = (2 * identity_N + (is_split_G[identity_N] & ~is_rgb_N)).sort(stable=True)
    # Of a list that shares its visits at most K - 1 samples fit in one.
    split_cover_G = _ceil_div(torch.maximum(first_G, second_G), max(1, num_instances - 1))
    cover_G = _ceil_div(size_G, num_instances)
    cover_G = torch.where(is_split_G, torch.maximum(cover_G, split_cover_G), cover_G)

    num_batches, need_G = _length(length, cover_G, identities_per_batch)
    total = num_batches * identities_per_batch
    none_G, all_G = torch.zeros_like(need_G), torch.full_like(need_G, num_batches)
    low_G, high_G = (none_G, need_G) if int(need_G.sum()) >= total else (need_G, all_G)
    visits_G, may_add_G = _even(low_G, high_G, total)
    summary = Summary(
        num_samples, num_all, num_pairable, num_batches, identities_per_batch, num_instances, clock() - begin
    )
    return PKSampler(
        sample_N=keep_N[by_list_N],
        list_N=list_N,
        start_G=size_G.cumsum(0) - size_G,
        first_G=first_G,
        second_G=second_G,
        visits_G=visits_G,
        may_add_G=may_add_G,
        num_added=total - int(visits_G.sum()),
        is_pairable_G=is_pairable_G,
        prefer_complete=prefer_complete,
        summary=summary,
    )


def plan_epoch(sampler: PKSampler, *, seed: int, epoch: int) -> Tensor:
    """All batches of an epoch, [T, P, K] int64 positions of samples; where both are needed, RGB stands first of the K.

    It is the same for every rank; rank_batches takes a rank's part.
    """
    generator = make_generator(seed, epoch=epoch, stream=_STREAM)
    order_G = torch.randperm(len(sampler.start_G), generator=generator)
    if sampler.prefer_complete == "first":
        is_pairable_G = sampler.is_pairable_G[order_G]
        order_G = torch.cat([order_G[is_pairable_G], order_G[~is_pairable_G]])
    visits_G = sampler.visits_G.clone()
    visits_G[order_G[sampler.may_add_G[order_G]][: sampler.num_added]] += 1

    if int(visits_G.max()) > 1:  # else the batches are stretches of the order, which keeps the pairable ones first
        order_G = order_G[torch.randperm(len(order_G), generator=generator)]
    count_G = visits_G[order_G]
    start_G = count_G.cumsum(0) - count_G
    identity_V = order_G.repeat_interleave(count_G)
    turn_V = torch.arange(len(identity_V)) - start_G.repeat_interleave(count_G)  # which of its identity's visits
    visit_TP = _deal(start_G, count_G, sampler, generator)
    if sampler.prefer_complete == "first":
        num_pairable_T = sampler.is_pairable_G[identity_V[visit_TP]].sum(1)
        visit_TP = visit_TP.index_select(0, num_pairable_T.argsort(descending=True, stable=True))
    visit_V = visit_TP.flatten()
    identity_V, turn_V = identity_V.index_select(0, visit_V), turn_V.index_select(0, visit_V)
    return _look_up(sampler, visits_G, identity_V, turn_V, generator)


def steps_per_rank(num_batches: int, *, world: int) -> int:
    """How many batches of an epoch each rank takes: as many as every other."""
    return -(-num_batches // world)


def rank_batches(plan_TPK: Tensor, *, rank: int, world: int, start: int = 0) -> Tensor:
    """A rank's batches of a plan from its step `start` on, [S, P, K]: batches rank, rank + world, ...

    Where the world does not divide the batches, the last ranks end with the plan's first batches.
    """
    steps = steps_per_rank(len(plan_TPK), world=world)
    if not (0 <= rank < world and 0 <= start <= steps):
        raise ValueError(
            f"rank {rank} of {world} from step {start}: expected a rank below {world} and a step of 0 .. {steps}; "
            "is the checkpoint of another epoch length?"
        )
    return plan_TPK[(torch.arange(start, steps) * world + rank) % len(plan_TPK)]


class Labelled(Protocol):
    """What a dataset tells about its samples: [N] integers each, in the order of its positions."""

    @property
    def labels(self) -> Tensor:
        """Whose each sample is."""

    @property
    def modalities(self) -> Tensor:
        """What each sample shows: RGB (0) or another modality."""


class CachedModalAwarePKSampler:
    """The batches of the same plans as lists of positions, with the arguments of the original sampler of this name.

    The dataset, or the dataset behind (nested) Subsets, has the attributes `labels` and `modalities` of Labelled; each
    is read once, here, and never per batch; positions are those in what is given. batch_size is P * K. prefer_complete
    leaves out identities that are not pairable; if too few are, it takes everybody, the pairable ones first.

    Every iteration is the next epoch; set_epoch tells which. `len` is the number of batches that this rank gets.
    """

    def __init__(
        self,
        dataset: Labelled | Subset[Any],
        batch_size: int,
        num_instances: int = 4,
        ensure_rgb: bool = True,
        prefer_complete: bool = True,
        seed: int = 42,
        *,
        length: Length = "identities",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if num_instances < 1 or batch_size < num_instances or batch_size % num_instances:
            raise ValueError(
                f"batch_size {batch_size} is no multiple of num_instances {num_instances}; "
                "pass P * K, as 32 for 8 identities with 4 samples each"
            )
        label_N, modality_N = _labels_of(dataset)
        make = partial(
            make_pk_sampler,
            label_N,
            modality_N,
            identities_per_batch=batch_size // num_instances,
            num_instances=num_instances,
            length=length,
            ensure_rgb=ensure_rgb,
        )
        self.sampler = make(prefer_complete="first" if prefer_complete else "any")
        if prefer_complete and self.sampler.summary.num_pairable >= batch_size // num_instances:
            self.sampler = make(prefer_complete="only")
        self.seed, self.epoch, self.rank, self.world = seed, 0, rank, world

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return steps_per_rank(self.sampler.num_batches, world=self.world)

    def __iter__(self) -> Iterator[list[int]]:
        plan_TPK = plan_epoch(self.sampler, seed=self.seed, epoch=self.epoch)
        self.epoch += 1
        batch_SB: list[list[int]] = rank_batches(plan_TPK, rank=self.rank, world=self.world).flatten(1).tolist()
        return iter(batch_SB)


def _length(length: Length, cover_G: Tensor, identities_per_batch: int) -> tuple[int, Tensor]:
    """The batches of an epoch, and the visits that each identity should have, at most one in each batch."""
    if length == "identities":
        return len(cover_G) // identities_per_batch, torch.ones_like(cover_G)
    if length == "samples":
        return max(int(cover_G.max()), -(-int(cover_G.sum()) // identities_per_batch)), cover_G
    if not isinstance(length, int) or length < 1:
        raise ValueError(f'length is {length!r}; expected "identities", "samples" or a number of batches, 1 or more')
    return length, cover_G.clamp(max=length)


def _even(low_G: Tensor, high_G: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Numbers from low to high, as even as can be, that sum to total or to less where a sum is skipped.

    Also who may then have one more; there are enough of them to make up for the difference.
    """
    level, above = 0, int(high_G.max()) + 1
    while above - level > 1:
        middle = (level + above) // 2
        if int(low_G.clamp(min=middle).minimum(high_G).sum()) <= total:
            level = middle
        else:
            above = middle
    count_G = low_G.clamp(min=level).minimum(high_G)
    return count_G, (count_G == level) & (count_G < high_G)


def _deal(start_G: Tensor, count_G: Tensor, sampler: PKSampler, generator: torch.Generator) -> Tensor:
    """Which visit stands where in the batches, [T, P]: a shuffled column each for the first T visits, the next T, ...

    Identity g's visits are the count_G from start_G on.
    """
    num_batches, num_columns = sampler.num_batches, sampler.summary.identities_per_batch
    if int(count_G.max()) <= 1:
        return torch.arange(num_batches * num_columns).view(num_batches, num_columns)
    begin_P = torch.arange(num_columns) * num_batches
    at_P = torch.searchsorted(start_G + count_G, begin_P, right=True)  # whose visit begins the column
    before_P = (begin_P - start_G[at_P]).tolist()  # how many of them stand in the column before
    after_P = (start_G[at_P] + count_G[at_P] - begin_P).tolist()
    columns: list[Tensor] = []
    for before, after in zip(before_P, after_P, strict=True):
        visit_T = torch.randperm(num_batches, generator=generator)
        if before:
            is_taken_T, is_same_T = columns[-1] >= num_batches - before, visit_T < after
            clash = (is_taken_T & is_same_T).nonzero().squeeze(1)
            if len(clash):
                # before + after is at most T, so that at least as many batches as clashes are without this identity.
                free = (~is_taken_T & ~is_same_T).nonzero().squeeze(1)
                free = free[torch.randperm(len(free), generator=generator)[: len(clash)]]
                visit_T[clash], visit_T[free] = visit_T[free], visit_T[clash]
        columns.append(visit_T)
    return torch.stack(columns, 1) + begin_P


def _look_up(
    sampler: PKSampler, visits_G: Tensor, identity_V: Tensor, turn_V: Tensor, generator: torch.Generator
) -> Tensor:
    """The samples of the visits, [T, P, K], where an identity's visits number 0 .. visits_G - 1."""
    num_instances = sampler.summary.num_instances
    key_N = torch.randint(1 << _RANDOM_BITS, sampler.list_N.shape, generator=generator)
    key_N.add_(sampler.list_N, alpha=1 << _RANDOM_BITS)
    shuffled_N = sampler.sample_N.index_select(0, key_N.sort().indices)
    num_first_G = _num_first(sampler, visits_G, torch.rand(len(visits_G), generator=generator, dtype=torch.float64))

    # On CPUs index_select costs a fraction of indexing.
    visits_V, num_first_V = visits_G.index_select(0, identity_V), num_first_G.index_select(0, identity_V)
    begin_V = turn_V * num_first_V // visits_V  # what earlier visits took from the first list
    take_V = (turn_V + 1) * num_first_V // visits_V - begin_V
    size_V = sampler.first_G.index_select(0, identity_V)
    other_size_V = sampler.second_G.index_select(0, identity_V).clamp_(min=1)
    other_V = (turn_V * num_instances - begin_V - take_V) % other_size_V  # as if it went on where the first ends
    begin_V %= size_V
    start_V = sampler.start_G.index_select(0, identity_V)
    other_start_V = start_V + size_V

    # Slots stand in rows here: torch is slow along an axis as short as K.
    k_K1 = torch.arange(num_instances).unsqueeze(1)
    plan_VK = torch.empty(len(identity_V), num_instances, dtype=torch.int64)
    step = max(1, _CELLS // num_instances)
    for low in range(0, len(plan_VK), step):
        part = slice(low, low + step)
        is_first_KV = k_K1 < take_V[part]
        index_KV = torch.where(is_first_KV, begin_V[part], other_V[part]).add_(k_K1)
        index_KV %= torch.where(is_first_KV, size_V[part], other_size_V[part])
        index_KV += torch.where(is_first_KV, start_V[part], other_start_V[part])
        plan_VK[part] = shuffled_N.index_select(0, index_KV.view(-1)).view(num_instances, -1).t()
    return plan_VK.view(-1, sampler.summary.identities_per_batch, num_instances)


def _num_first(sampler: PKSampler, visits_G: Tensor, random_G: Tensor) -> Tensor:
    """How many samples of all visits to an identity come from its first list, [G].

    Dealt evenly to the visits, that many give all that is promised; every list is read on and on in circles.
    """
    num_instances, first_G, second_G = sampler.summary.num_instances, sampler.first_G, sampler.second_G
    draws_G, size_G = visits_G * num_instances, first_G + second_G
    # Rounded up or down, the share of at least as many draws as there are samples leaves no list fewer than it has.
    share_G = draws_G * first_G // size_G
    share_G += random_G * size_G < draws_G * first_G % size_G
    # In a visit no more than a list has, or with fewer than K samples no less, and at least one of each.
    bound_G = num_instances - second_G
    low_G = torch.minimum(first_G, bound_G).clamp(min=1)
    high_G = torch.maximum(first_G, bound_G).clamp(max=num_instances - 1)
    share_G = share_G.clamp(min=visits_G * low_G).minimum(visits_G * high_G)
    return torch.where(second_G > 0, share_G, draws_G)


def _ceil_div(count_G: Tensor, divisor: int) -> Tensor:
    return (count_G + divisor - 1) // divisor


def _labels_of(dataset: Labelled | Subset[Any]) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, Subset):
        index_N = torch.as_tensor(dataset.indices, dtype=torch.int64)
        whole_label_N, whole_modality_N = _labels_of(dataset.dataset)  # type: ignore[arg-type]  # checked there
        return whole_label_N[index_N], whole_modality_N[index_N]
    label_N: object = getattr(dataset, "labels", None)
    modality_N: object = getattr(dataset, "modalities", None)
    if not (isinstance(label_N, Tensor) and isinstance(modality_N, Tensor)):
        raise ValueError(
            f"{type(dataset).__name__} has labels of type {type(label_N).__name__} and modalities of type "
            f"{type(modality_N).__name__}; expected tensors of one integer per sample (modality {RGB} is RGB)"
        )
    return label_N.cpu(), modality_N.cpu()


def _check_tensors(label_N: Tensor, modality_N: Tensor) -> None:
    for name, value_N in (("label_N", label_N), ("modality_N", modality_N)):
        if value_N.dim() != 1 or value_N.is_floating_point() or value_N.shape != label_N.shape or not len(value_N):
            raise ValueError(
                f"{name} has shape {tuple(value_N.shape)} and type {value_N.dtype}; expected one integer per sample, "
                f"at least one and as many as label_N has ({label_N.numel()})"
            )


def _check_identities(num_identities: int, identities_per_batch: int, num_all: int, prefer_complete: str) -> None:
    if prefer_complete not in ("any", "first", "only"):
        raise ValueError(f'prefer_complete is {prefer_complete!r}; expected "any", "first" or "only"')
    if num_identities >= identities_per_batch:
        return
    if prefer_complete == "only" and num_all >= identities_per_batch:
        raise ValueError(
            f"{num_identities} of {num_all} identities have RGB and another modality, fewer than the "
            f'{identities_per_batch} of a batch; lower identities_per_batch or set prefer_complete to "first"'
        )
    raise ValueError(
        f"{num_identities} identities are fewer than the {identities_per_batch} of a batch; "
        "lower identities_per_batch or add identities"
    )
