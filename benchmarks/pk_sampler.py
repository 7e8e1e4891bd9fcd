"""What planning an epoch of P x K batches costs, beside the samplers in use, alternating in one run.

    python -m benchmarks.pk_sampler                        # 14,910 samples of 320 identities, P 8, K 4
    python -m benchmarks.pk_sampler --samples 1000000 --identities 20000

Every row is one epoch as the sampler gives it, from the shuffle to lists of positions or, where it says so, to one
tensor. Epochs differ in length, hence batches/s beside the time; and in what they reach, hence the share of samples
drawn. The other two are written here in their usual way: torchreid's RandomIdentitySampler (every identity's positions
copied, shuffled and cut to pieces of K; identities by random.sample until fewer than P are left) and a sampler of
pairable identities with one RGB sample and K - 1 others each, which NumPy chooses from lists made once. Making each
sampler is timed too. Prints a table and, as its last line, everything as JSON. Needs NumPy.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from shared.device import describe_machine
from shared.pk_sampler import RGB, Length, PKSampler, make_pk_sampler, plan_epoch

Batches = list[list[int]]


class RandomIdentities:
    """Identities at random, each sample at most once; what is left over of an identity, or for less than P, is lost."""

    def __init__(self, labels: list[int], identities_per_batch: int, num_instances: int) -> None:
        self.p, self.k = identities_per_batch, num_instances
        self.of_identity: dict[int, list[int]] = defaultdict(list)
        for position, label in enumerate(labels):
            self.of_identity[label].append(position)

    def __iter__(self) -> Iterator[int]:
        pieces: dict[int, list[list[int]]] = defaultdict(list)
        for label in self.of_identity:
            positions = copy.deepcopy(self.of_identity[label])
            if len(positions) < self.k:
                positions = random.choices(positions, k=self.k)
            random.shuffle(positions)
            piece = []
            for position in positions:
                piece.append(position)
                if len(piece) == self.k:
                    pieces[label].append(piece)
                    piece = []
        available = copy.deepcopy(list(self.of_identity))
        order: list[int] = []
        while len(available) >= self.p:
            for label in random.sample(available, self.p):
                order.extend(pieces[label].pop(0))
                if not pieces[label]:
                    available.remove(label)
        return iter(order)


class CachedModalities:
    """Every pairable identity once: an RGB sample, different others as far as they go, and then anything of it."""

    def __init__(
        self, labels: list[int], modalities: list[int], identities_per_batch: int, num_instances: int, seed: int
    ) -> None:
        self.p, self.k, self.random = identities_per_batch, num_instances, np.random.default_rng(seed)
        self.rgb: dict[int, list[int]] = defaultdict(list)
        self.other: dict[int, list[int]] = defaultdict(list)
        for position, (label, modality) in enumerate(zip(labels, modalities, strict=True)):
            (self.rgb if modality == RGB else self.other)[label].append(position)
        self.pairable = [label for label in self.rgb if label in self.other]

    def __iter__(self) -> Iterator[list[int]]:
        labels = list(self.pairable)
        self.random.shuffle(labels)
        for low in range(0, len(labels) - self.p + 1, self.p):
            batch: list[int] = []
            for label in labels[low : low + self.p]:
                rgb, other = self.rgb[label], self.other[label]
                num_other = min(self.k - 1, len(other))
                batch += self.random.choice(rgb, 1, replace=False).tolist()
                batch += self.random.choice(other, num_other, replace=False).tolist()
                if num_other < self.k - 1:
                    pool = rgb + other
                    rest = self.k - 1 - num_other
                    batch += self.random.choice(pool, rest, replace=len(pool) < rest).tolist()
            yield batch


def samples(num_samples: int, num_identities: int) -> tuple[Tensor, Tensor]:
    """Labels and modalities: identities of uneven sizes, at least 4 samples each, of which two fifths are RGB."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(num_identities, generator=generator).add_(0.5)
    rest = torch.multinomial(weight, num_samples - 4 * num_identities, replacement=True, generator=generator)
    label_N = torch.cat([torch.arange(num_identities).repeat(4), rest])
    modality_N = (torch.rand(num_samples, generator=generator) * 5 - 1).clamp_(min=0).long()
    modality_N[: 2 * num_identities] = torch.tensor([RGB, 1]).repeat_interleave(num_identities)  # all are pairable
    order_N = torch.randperm(num_samples, generator=generator)
    return label_N[order_N], modality_N[order_N]


def cut(sampler: RandomIdentities) -> Batches:
    """Its batches as a loader takes them."""
    return list(BatchSampler(sampler, sampler.p * sampler.k, drop_last=True))


def cached_epochs(sampler: CachedModalities, num_batches: int) -> Batches:
    """So many batches, over as many of its short epochs as it takes."""
    batches: Batches = []
    while len(batches) < num_batches:
        batches += sampler
    return batches[:num_batches]


def plan_lists(sampler: PKSampler, epoch: int) -> Batches:
    return plan_epoch(sampler, seed=1, epoch=epoch).flatten(1).tolist()


def plan_tensor(sampler: PKSampler, epoch: int) -> Tensor:
    return plan_epoch(sampler, seed=1, epoch=epoch)


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """The first, the median and the third."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4], statistics.median(ordered), ordered[3 * len(ordered) // 4]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=14_910)
    parser.add_argument("--identities", type=int, default=320)
    parser.add_argument("--identities-per-batch", type=int, default=8)
    parser.add_argument("--num-instances", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30, help="timed epochs of each, after three that are not")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    random.seed(0)
    p, k = options.identities_per_batch, options.num_instances
    label_N, modality_N = samples(options.samples, options.identities)
    labels, modalities = label_N.tolist(), modality_N.tolist()

    def make_ours(length: Length) -> PKSampler:
        return make_pk_sampler(label_N, modality_N, identities_per_batch=p, num_instances=k, length=length)

    making: dict[str, Callable[[], object]] = {
        "ours": partial(make_ours, "samples"),
        "torchreid-style": lambda: RandomIdentities(labels, p, k),
        "cached modalities": lambda: CachedModalities(labels, modalities, p, k, 42),
    }
    reid, cached = RandomIdentities(labels, p, k), CachedModalities(labels, modalities, p, k, 42)
    short, full = make_ours("identities"), make_ours("samples")
    work: dict[str, Callable[[int], Batches | Tensor]] = {
        "torchreid-style, an epoch": lambda epoch: cut(reid),
        "cached modalities, its epoch": lambda epoch: list(cached),
        f"cached modalities, {full.num_batches} batches": lambda epoch: cached_epochs(cached, full.num_batches),
        'ours, "identities", lists': partial(plan_lists, short),
        'ours, "samples", lists': partial(plan_lists, full),
        'ours, "samples", tensor': partial(plan_tensor, full),
    }

    make_s: dict[str, list[float]] = {name: [] for name in making}
    epoch_s: dict[str, list[float]] = {name: [] for name in work}
    reached: dict[str, tuple[int, float]] = {}
    for epoch in range(3 + options.repeats):
        for name, make in making.items():
            begin = time.perf_counter()
            make()
            make_s[name].append(time.perf_counter() - begin)
        for name, run in work.items():
            begin = time.perf_counter()
            batches = run(epoch)
            epoch_s[name].append(time.perf_counter() - begin)
            drawn = torch.as_tensor(batches).unique().numel() / options.samples  # type: ignore[no-untyped-call]
            reached[name] = (len(batches), drawn)

    print(f"{options.samples} samples of {options.identities} identities, {p} identities x {k} samples a batch")
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    for name, seconds in make_s.items():
        low, median, high = quartiles(seconds[3:])
        print(f"making {name:28s} {1e3 * median:8.2f} ms (quartiles {1e3 * low:.2f} .. {1e3 * high:.2f})")
    for name, seconds in epoch_s.items():
        low, median, high = quartiles(seconds[3:])
        count, share = reached[name]
        print(
            f"{name:35s} {1e3 * median:8.2f} ms (quartiles {1e3 * low:.2f} .. {1e3 * high:.2f})  "
            f"{count:6d} batches  {count / median:9.0f} batches/s  {share:6.1%} of the samples"
        )
    results = [
        {"way": name, "quartiles_s": quartiles(seconds[3:]), "batches": reached[name][0], "drawn": reached[name][1]}
        for name, seconds in epoch_s.items()
    ]
    made = {name: quartiles(seconds[3:]) for name, seconds in make_s.items()}
    print(json.dumps({"machine": describe_machine(), "making_quartiles_s": made, "results": results}))


if __name__ == "__main__":
    main()
