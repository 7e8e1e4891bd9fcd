"""What one negative costs, for a whole epoch of MovieLens-shaped pairs, beside the bounds and the usual arrangement.

    python -m benchmarks.negative_sampling                     # made-up pairs of that shape
    python -m benchmarks.negative_sampling --data-path FOLDER  # the original's train.npy and warm_set.npy
    python -m benchmarks.negative_sampling --large             # 2 M users, 1 M items, 40 M pairs

Every row of the table is the same work: so many negatives for each pair of the epoch, in shuffled order, the tables of
the epoch included. Bounds: drawing one random number per negative, and writing the result, each alone. The usual
arrangement is that of apps/clcrec/originals.py: per pair the set difference of all items and the user's positives, a
random.sample of it as a list, and two LongTensors; it is timed on some pairs and multiplied. Prints a table and, as its
last line, everything as JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apps.clcrec.bench import NOTES_COLD, NOTES_PAIRS, NOTES_USERS, NOTES_WARM, made_pairs, weighted_items
from apps.clcrec.originals import PlainPairs
from shared.device import describe_machine
from shared.negatives import (
    NegativeSampler,
    Permutations,
    draw,
    draw_pool,
    draw_popular,
    make_sampler,
    permutations,
    popularity,
    require_candidates,
)
from shared.pickles import load_npy
from shared.ranking import Lists


class Pairs(NamedTuple):
    """Training pairs and what to draw negatives from."""

    name: str
    user: Tensor  # [P] int64
    item: Tensor  # [P] int64
    exclude: Lists
    num_items: int
    num_warm: int


def exclusions(key: Tensor, num_users: int, num_items: int) -> Lists:
    """Lists of the distinct pairs user * num_items + item, which rise."""
    ptr = torch.zeros(num_users + 1, dtype=torch.int64)
    ptr[1:] = torch.bincount(key // num_items, minlength=num_users).cumsum(0)
    return Lists(ptr, (key % num_items).int())


def movielens_shape() -> Pairs:
    """Made-up pairs with the sizes of CLCRec's Movielens and lognormal numbers of positives per user."""
    num_items = NOTES_WARM + NOTES_COLD
    key = made_pairs(NOTES_USERS, NOTES_WARM, num_items, torch.Generator().manual_seed(0))[:NOTES_PAIRS].sort().values
    return Pairs(
        "Movielens-shaped, made up",
        key // num_items,
        key % num_items,
        exclusions(key, NOTES_USERS, num_items),
        num_items,
        NOTES_WARM,
    )


def large_shape(num_users: int = 2_000_000, num_items: int = 1_000_000, pairs: int = 40_000_000) -> Pairs:
    """Made-up pairs of a large catalogue, made in parts to keep their own memory low."""
    generator = torch.Generator().manual_seed(0)
    parts, mean = [], pairs / num_users
    for low in range(0, num_users, num_users // 20):
        degree = torch.randn(num_users // 20, generator=generator).sub_(0.5).exp_().mul_(mean).add_(0.5).long()
        user = torch.repeat_interleave(degree.clamp_(1, num_items // 100)) + low
        parts.append(torch.unique(user * num_items + weighted_items(num_items, len(user), generator)))
    lists = [exclusions(key, num_users, num_items) for key in parts]
    ptr = torch.stack([part.ptr for part in lists]).sum(0)
    item = torch.cat([part.item for part in lists])
    sample = torch.randint(len(item), (1 << 20,), generator=generator)
    user = torch.searchsorted(ptr, sample, right=True) - 1
    name = f"{num_users} users, {num_items} items, {len(item)} pairs, made up"
    return Pairs(name, user, item[sample].long(), Lists(ptr, item), num_items, num_items)


def read_pairs(folder: Path) -> Pairs:
    """The pairs of a folder in the original's layout."""
    pair = load_npy(folder / "train.npy").long()
    warm, cold = load_npy(folder / "warm_set.npy"), load_npy(folder / "cold_set.npy")
    num_users, num_items = int(warm.min()), warm.numel() + cold.numel()
    user, item = pair[:, 0].contiguous(), pair[:, 1] - num_users
    key = torch.unique(user * num_items + item)
    return Pairs(folder.name, user, item, exclusions(key, num_users, num_items), num_items, warm.numel())


def splitmix(number: Tensor) -> Tensor:
    """One 64-bit hash of every number, in place."""
    number ^= (number >> 30) & ((1 << 34) - 1)
    number *= 0xBF58476D1CE4E5B9 - (1 << 64)
    number ^= (number >> 27) & ((1 << 37) - 1)
    number *= 0x94D049BB133111EB - (1 << 64)
    number ^= (number >> 31) & ((1 << 33) - 1)
    return number


def chunked(work: Callable[[int, int], object], count: int, chunk: int) -> None:
    for low in range(0, count, chunk):
        work(low, min(low + chunk, count))


def usual_seconds(pairs: Pairs, num_negatives: int, samples: int) -> float:
    """Seconds a pair in the usual arrangement: Python sets, random.sample, tensors made from lists."""
    order = torch.randperm(len(pairs.user), generator=torch.Generator().manual_seed(1))[:samples]
    users, positives = pairs.user[order].tolist(), pairs.item[order].tolist()
    usual = PlainPairs(users, positives, pairs.exclude, num_warm=pairs.num_warm, num_negatives=num_negatives)
    random.seed(0)
    begin = time.perf_counter()
    for index in range(samples):
        usual[index]
    return (time.perf_counter() - begin) / samples


def measure(work: Callable[[], object], repeats: int) -> float:
    """The median seconds of some runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def epoch_rows(
    pairs: Pairs, sampler: NegativeSampler, num_negatives: int, repeats: int, is_large: bool
) -> dict[str, float]:
    """Nanoseconds per negative of every way, with the threads that torch has now."""
    count = len(pairs.user)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    user = pairs.user[order]
    candidates = sampler.candidates.numel()
    table = popularity(sampler, torch.bincount(pairs.item, minlength=pairs.num_items), 0.75)
    buffer = torch.empty(4096, num_negatives, dtype=torch.int32)
    number = torch.arange(4096 * num_negatives).view(4096, num_negatives)
    generator = torch.Generator().manual_seed(0)
    cells = count * num_negatives
    part = count // 16  # of the epoch, for what is slow

    def epoch(chunk: int) -> None:
        tables = permutations(sampler, seed=1, epoch=0)
        chunked(lambda low, high: sample(tables, low, high), count, chunk)

    def sample(tables: Permutations, low: int, high: int) -> Tensor:
        return draw(sampler, tables, user[low:high], order[low:high], num_negatives)

    def popular(low: int, high: int) -> Tensor:
        return draw_popular(sampler, table, user[low:high], order[low:high], num_negatives, seed=1, epoch=0)

    def random_numbers(low: int, high: int) -> Tensor:
        return torch.randint(candidates, (high - low, num_negatives), generator=generator)

    rows = {
        f"draw, {chunk} rows at a time": measure(partial(epoch, chunk), repeats) / cells for chunk in (256, 1024, 4096)
    }
    if not is_large:
        rows["draw_pool, kept for the epoch"] = (
            measure(lambda: draw_pool(sampler, user, num_negatives, seed=1, epoch=0), repeats) / cells
        )
    rows["draw_popular, power 0.75 (1/16 of the epoch)"] = measure(lambda: chunked(popular, part, 4096), 1) / (
        part * num_negatives
    )
    rows["bound: randint int64 alone"] = measure(lambda: chunked(random_numbers, count, 4096), repeats) / cells
    rows["bound: one 64-bit hash alone"] = (
        measure(lambda: chunked(lambda low, high: splitmix(number + low), count, 4096), repeats) / cells
    )
    rows["bound: writing int32 alone"] = (
        measure(lambda: chunked(lambda low, high: buffer[: high - low].fill_(low), count, 4096), repeats) / cells
    )
    return {name: 1e9 * seconds for name, seconds in rows.items()}


def tensor_bytes(*groups: Any) -> int:
    """Memory of all tensors in some tuples."""
    return sum(value.nbytes for group in groups for value in group if isinstance(value, Tensor))


def peak_mib() -> float:
    """The largest memory this process has had, MiB; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="folder in the original's layout (default: made-up pairs)")
    parser.add_argument("--threads", default="1,2", help="numbers of torch threads")
    parser.add_argument("--negatives", default="128,512", help="numbers of negatives per pair")
    parser.add_argument("--repeats", type=int, default=3, help="timed epochs of each, of which the median counts")
    parser.add_argument("--samples", type=int, default=3000, help="pairs the usual arrangement is timed on; 0: none")
    parser.add_argument("--large", action="store_true", help="a large catalogue; its epoch is a million of the pairs")
    options = parser.parse_args()

    if options.large:
        pairs = large_shape()
    else:
        pairs = read_pairs(options.data_path) if options.data_path else movielens_shape()
    peak_of_data = peak_mib()
    begin = time.perf_counter()
    sampler = make_sampler(pairs.exclude, num_items=pairs.num_items, candidates=torch.arange(pairs.num_warm))
    make_s = time.perf_counter() - begin
    tables_s = measure(lambda: permutations(sampler, seed=1, epoch=0), 3)
    tables = permutations(sampler, seed=1, epoch=0)
    table_mib = tensor_bytes((sampler.candidates, *sampler.exclude), tables) / (1 << 20)

    print(
        f"{pairs.name}: {len(pairs.user)} pairs an epoch, {len(pairs.exclude.ptr) - 1} users, "
        f"{pairs.num_warm} of {pairs.num_items} items are candidates, {len(pairs.exclude.item)} exclusions"
    )
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items() if key != "threads"))
    print(f"sampler made in {make_s:.2f} s, tables of an epoch in {1e3 * tables_s:.1f} ms, both {table_mib:.1f} MiB")
    print(f"{'threads':>7s} {'N':>5s}  {'':46s} {'ns/negative':>11s} {'s/epoch':>9s}")
    results: list[dict[str, Any]] = []
    for num_negatives in (int(text) for text in options.negatives.split(",")):
        require_candidates(sampler, num_negatives)
        for threads in (int(text) for text in options.threads.split(",")):
            torch.set_num_threads(threads)
            rows = epoch_rows(pairs, sampler, num_negatives, options.repeats, options.large)
            if options.samples and threads == 1 and not options.large:
                seconds = usual_seconds(pairs, num_negatives, options.samples)
                rows[f"usual arrangement ({options.samples} pairs, multiplied)"] = 1e9 * seconds / num_negatives
            for name, ns in rows.items():
                epoch_s = ns * 1e-9 * num_negatives * len(pairs.user)
                print(f"{threads:7d} {num_negatives:5d}  {name:46s} {ns:11.2f} {epoch_s:9.2f}")
                results.append({"threads": threads, "negatives": num_negatives, "way": name, "ns_per_negative": ns})
    print(f"peak memory {peak_mib():.0f} MiB, of which {peak_of_data:.0f} MiB were reached making the pairs")
    print(
        json.dumps(
            {
                "data": pairs.name,
                "pairs": len(pairs.user),
                "machine": describe_machine(),
                "make_sampler_s": make_s,
                "permutations_s": tables_s,
                "tables_mib": table_mib,
                "peak_mib": peak_mib(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
