"""Exact top-k over a large catalogue in bounded memory, with every user's history left out.

    python -m benchmarks.exact_top_k --users 1000 --items 660000 --dim 32 --k 10

Random vectors; the answer is compared with one matrix product and torch.topk for the first users. Memory is the growth
of the process' peak over what it held before, in a process of its own per budget.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from shared.device import describe_machine
from shared.ranking import Lists, top_k

SEEN = 100  # items left out for each user


def measure(users: int, items: int, dim: int, k: int, memory_mib: int) -> tuple[float, float]:
    """Median seconds of five runs and MiB of growth."""
    generator = torch.Generator().manual_seed(0)
    query_BD, item_ID = torch.randn(users, dim, generator=generator), torch.randn(items, dim, generator=generator)
    seen = torch.randint(items, (users, SEEN), generator=generator).sort(1).values
    exclude = Lists(torch.arange(users + 1) * SEEN, seen.flatten())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    elapsed = []
    for _ in range(5):
        begin = time.perf_counter()
        score_BK, item_BK = top_k(query_BD, item_ID, k=k, exclude=exclude, budget_bytes=memory_mib << 20)
        elapsed.append(time.perf_counter() - begin)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    few = min(20, users)
    dense = (query_BD[:few] @ item_ID.t()).scatter_(1, seen[:few], -torch.inf).topk(k)
    assert torch.equal(dense.indices, item_BK[:few])
    assert torch.allclose(dense.values, score_BK[:few], rtol=1e-5, atol=1e-5)
    return sorted(elapsed)[2], grown


def main() -> None:
    """Print a row per memory budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--items", type=int, default=660_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--memory-mib", type=int, help="one budget only")
    options = parser.parse_args()
    if options.memory_mib is not None:
        elapsed_s, grown = measure(options.users, options.items, options.dim, options.k, options.memory_mib)
        print(
            f"budget {options.memory_mib:5d} MiB: {elapsed_s:6.2f} s, {1e3 * elapsed_s / options.users:.2f} ms a user, "
            f"process grew by {grown:.0f} MiB"
        )
        return
    print(
        f"{options.users:,} users, {options.items:,} items, d {options.dim}, top {options.k}, {SEEN} left out for each"
    )
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()), flush=True)
    for memory_mib in (8, 32, 128):
        subprocess.run(
            [sys.executable, "-m", "benchmarks.exact_top_k", *sys.argv[1:], f"--memory-mib={memory_mib}"], check=True
        )


if __name__ == "__main__":
    main()
