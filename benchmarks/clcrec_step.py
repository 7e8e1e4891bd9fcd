"""One training step and one evaluation of clcrec against the original's pipeline, alternating in one process.

    python -m benchmarks.clcrec_step --data-path FOLDER [--quick]

The original's side is apps/clcrec/originals.py, written from its description: a set difference and random.sample for
every pair, two tensors made from lists, the default collation; the encoder over all items with the features
concatenated in every step, users repeated 1 + N times, products of gathered vectors, exp without a maximum, four
.item() and retain_graph, Adam as it comes; six full rankings with a Python loop over all users for every block of
2,000, and one over users for the metrics.
Its negatives are drawn from Python integers and it has no worker processes, which would go on working during our turns.

Both sides have the same data, the same widths, the same negatives left out (every known positive), the same share of
replaced positions asked for, and the same allocator: on Linux compare runs under glibc's defaults and under

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864

Without any feat_* file in the folder, random features of the original's widths on Movielens take their place.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from apps.clcrec.bench import NOTES_WIDTHS
from apps.clcrec.config import Config, TrainConfig
from apps.clcrec.dataset import STAGES, ColdStart
from apps.clcrec.evaluate import LEGACY_MASK, evaluate_stages, matrices
from apps.clcrec.formats import read_data
from apps.clcrec.originals import (
    Plain,
    PlainModel,
    PlainPairs,
    drawn_places,
    plain_evaluation,
    plain_features,
    plain_splits,
    plain_step,
    sets_of,
)
from apps.clcrec.train import DRAWN_ROWS, Components, build, epoch_batches, loss_fn, make_model
from shared.amp import amp_step, make_state, resolve_precision
from shared.device import describe_machine, pick_device

TOP = 10
LARGEST_GAP = 1e-4  # between metrics: items of equal content tie, and the original leaves the order of ties to topk
MATRIX = 2048  # rows and columns of the product that the machine's rate is measured with
SETTINGS = TrainConfig(device="cpu", neg_exclude="all", ks=(TOP,), mask_value="legacy")
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
ENVIRONMENT = (*ALLOCATOR, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


# The original's side


def plain_pairs(data: ColdStart, num_negatives: int) -> PlainPairs:
    """The original's data set, whose pairs are NumPy's integers."""
    user, item = data.user.long().numpy(), data.item.long().numpy()
    return PlainPairs(user, item, data.known, num_warm=data.num_warm, num_negatives=num_negatives)


def plain_batches(data: ColdStart, *, batch_size: int, num_negatives: int) -> Iterator[list[Tensor]]:
    """The original's batches, epoch after epoch."""
    loader = DataLoader(plain_pairs(data, num_negatives), batch_size, shuffle=True, num_workers=0)
    while True:
        yield from loader


def plain_steps(data: ColdStart, config: Config, *, batch_size: int, num_negatives: int) -> Iterator[float]:
    """The original's training, one step at a time."""
    training = config.training
    features = plain_features(data, data.modalities, torch.device("cpu"))
    model = PlainModel(make_model(config, data), features)
    optimizer = torch.optim.Adam(model.parameters(), lr=training.lr)
    state = make_state(model, [optimizer], precision="fp32", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def loss_of(_: nn.Module, batch: Plain) -> tuple[Tensor, dict[str, Tensor]]:
        return model.by_vectors(batch, training=training, is_prepared=False)

    sums = [0.0] * 4
    for user_BM, item_BM in plain_batches(data, batch_size=batch_size, num_negatives=num_negatives):
        batch = Plain(user_BM, item_BM, drawn_places(item_BM, training.num_sample, generator))
        loss, parts = plain_step(state, batch, loss_of)
        sums = [total + part.item() for total, part in zip(sums, (loss, *parts.values()), strict=True)]
        yield sums[0]


# Our side


def our_steps(c: Components) -> Iterator[object]:
    """Our training, one step at a time."""
    state = c.state
    loss_of = partial(loss_fn, training=c.config.training, by_matrix=c.by_matrix, encodes_batch=c.encodes_batch)
    state.model.train()
    epoch = 0
    while True:
        for batches in epoch_batches(c, epoch=epoch):
            state, output = amp_step(state, batches, loss_of, amp=c.amp)
            yield output
        epoch += 1


def our_batches(c: Components) -> Iterator[object]:
    """Our batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from epoch_batches(c, epoch=epoch)
        epoch += 1


def our_evaluation(model: nn.Module, data: ColdStart, config: Config) -> dict[str, float]:
    """All metrics of the six splits, as "valid/all/Recall@10"."""
    found = evaluate_stages(model, data, STAGES, config=config)
    return {f"{stage}/{name}": value for stage, metrics in found.items() for name, value in metrics.items()}


# Measuring


@dataclass
class Row:
    """A line of the table and what was measured for it."""

    name: str
    source: Iterator[object]  # one step (or batch) each time it is advanced
    batch_size: int
    block: int  # steps timed together
    gflop: float = 0.0  # of encoder and scores in a step, forward and backward; 0: no step
    seconds: list[float] = field(default_factory=list)  # per step, one for every round

    def time_block(self) -> float:
        """Seconds per step of one block."""
        begin = time.perf_counter()
        for _ in range(self.block):
            next(self.source)
        return (time.perf_counter() - begin) / self.block


def block_of(batch_size: int) -> int:
    """Steps that draw their negatives together, so that a block pays for all that it uses."""
    return max(1, DRAWN_ROWS // batch_size)


def count_products(row: Row) -> float:
    """GFLOP of the matrix products of one step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        next(row.source)
    for _ in range(row.block - 1):  # to where a block begins
        next(row.source)
    return counter.get_total_flops() / 1e9


def time_product(matrix: Tensor, count: int = 4) -> float:
    """GFLOP/s of a large square product."""
    begin = time.perf_counter()
    for _ in range(count):
        torch.mm(matrix, matrix)
    return count * 2 * MATRIX**3 / 1e9 / (time.perf_counter() - begin)


def with_features(data: ColdStart) -> tuple[ColdStart, str]:
    """The data with content to encode, and a sentence on where it is from."""
    if data.words is not None:
        raise ValueError(f"{data.name} has its text as lists of words; this benchmark needs numbers in feat_t")
    if data.content:
        return data, "features of the data: " + ", ".join(
            f"{name} {data.content[name].shape[1]}" for name in data.modalities
        )
    generator = torch.Generator().manual_seed(0)
    content = {name: torch.randn(data.num_items, width, generator=generator) for name, width in NOTES_WIDTHS.items()}
    widths = ", ".join(f"{name} {width}" for name, width in NOTES_WIDTHS.items())
    return replace(data, content=content), (
        f"*** NO feat_* FILE IN THE FOLDER: RANDOM FEATURES ({widths}). Times mean something, metrics do not. ***"
    )


def load() -> str:
    """Processes that computed in the last minute, on average, where the system says so."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "not known"


def spread(values: Sequence[float], digits: int) -> str:
    """Median (lowest .. highest)."""
    shown = [f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} .. {shown[2]})"


def print_rows(title: str, rows: Sequence[Row], rates: Sequence[float]) -> None:
    """One part of the table; the first row is what the others are compared with."""
    base = rows[0]
    print(f"\n{title}")
    for row in rows:
        speed = [row.batch_size / s for s in row.seconds]
        ratio = [
            (row.batch_size / mine) / (base.batch_size / theirs)
            for mine, theirs in zip(row.seconds, base.seconds, strict=True)
        ]
        share = ""
        if row.gflop:
            reached = [row.gflop / s / rate for s, rate in zip(row.seconds, rates, strict=True)]
            share = f"{row.gflop:8.1f} GFLOP/step, {statistics.median(reached):4.0%} of mm"
        print(
            f"  {row.name:52s} {spread(speed, 0):>32s} samples/s {1 / statistics.median(row.seconds):9.2f} steps/s "
            f" x{spread(ratio, 2):22s}{share}"
        )


def step_rows(data: ColdStart, config: Config, *, quick: bool) -> dict[str, list[Row]]:
    """Every training row by the title of its part, ours behind the original's."""

    def ours(name: str, batch_size: int, num_negatives: int, **choice: str) -> Row:
        training = replace(
            config.training,
            batch_size=batch_size,
            num_negatives=num_negatives,
            **choice,  # type: ignore[arg-type]
        )
        c = build(replace(config, training=training), data)
        form = "matrix" if c.by_matrix else "gather"
        if choice.get("negatives") == "shared":
            form = "shared"
        return Row(f"{name} [{form}]", our_steps(c), batch_size, block_of(batch_size))

    def original(num_negatives: int, block: int) -> Row:
        steps = plain_steps(data, config, batch_size=256, num_negatives=num_negatives)
        # its scores are no matrix products, so they are counted here: two losses, 2 D forward and 4 D backward each
        gflop = 12 * config.model.embed_dim * 256 * (1 + num_negatives) / 1e9
        return Row(f"original, batch 256, N {num_negatives}", steps, 256, block, gflop)

    larger = (4096,) if quick else (512, 1024, 2048, 4096)
    shared = (4096,) if quick else (256, 1024, 4096)
    try:
        resolve_precision("bf16", pick_device(config.training.device))
        in_bf16 = () if quick else (256, 1024)
    except ValueError:  # no units for it: a hundred times slower
        in_bf16 = ()
    return {
        "whole step, N 128: batches, loss, gradients, optimizer": [
            original(128, 4),
            ours("ours, batch 256, N 128", 256, 128),
            ours("ours, batch 256, N 128, legacy replacement", 256, 128, replacement="legacy"),
            *(ours(f"ours, batch {size}, N 128", size, 128) for size in larger),
            *(ours(f"ours in bf16, batch {size}, N 128", size, 128, precision="bf16") for size in in_bf16),
            *(ours(f"another estimator: batch {b}, 1,024 shared", b, 1024, negatives="shared") for b in shared),
        ],
        "whole step, N 512": [original(512, 2), ours("ours, batch 256, N 512", 256, 512)],
    }


def data_rows(data: ColdStart, config: Config) -> list[Row]:
    """Batches alone; ours come with their replaced positions drawn, which the original draws in its model."""
    rows = []
    for num_negatives, block in ((128, 4), (512, 2)):
        plain = plain_batches(data, batch_size=256, num_negatives=num_negatives)
        rows.append(Row(f"original, batch 256, N {num_negatives}", plain, 256, block))
        c = build(replace(config, training=replace(config.training, num_negatives=num_negatives)), data)
        rows.append(Row(f"ours, batch 256, N {num_negatives}", our_batches(c), 256, 4 * block_of(256)))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder in the original's layout, or a pack")
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of training (with --quick 3)")
    parser.add_argument("--eval-rounds", type=int, default=5, help="alternations of evaluation (with --quick 1)")
    options = parser.parse_args()
    rounds, eval_rounds = (3, 1) if options.quick else (options.rounds, options.eval_rounds)

    data, features = with_features(read_data(options.data_path))
    config = Config(training=SETTINGS)
    torch.manual_seed(0)
    random.seed(0)
    print(
        f"{data.name}: {data.num_users:,} users, {data.num_warm:,} warm and {data.num_items - data.num_warm:,} cold "
        f"items, {data.num_pairs:,} pairs; embed_dim {config.model.embed_dim}, hidden_dim {config.model.hidden_dim}"
    )
    print(features)
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    settings = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in (*ENVIRONMENT, *THREADS))
    print(f"one process for both sides, hence one allocator and one number of threads: {settings}")
    print(f"load of the machine at the start: {load()}; above 0 others compute, and threads that wait cost most")

    batches = data_rows(data, config)
    parts = step_rows(data, config, quick=options.quick)
    steps = [row for part in parts.values() for row in part]
    rows = batches + steps
    for row in steps:
        row.gflop += count_products(row)
    for row in rows:
        row.time_block()  # warm-up
    matrix = torch.randn(MATRIX, MATRIX)
    time_product(matrix)
    rates = []
    for _ in range(rounds):
        rates.append(time_product(matrix))
        for row in rows:
            row.seconds.append(row.time_block())

    print(
        f"\nmedians of {rounds} alternating rounds (lowest .. highest); ratios within a round, to the part's first row"
    )
    print(f"fp32 matrix product {MATRIX} x {MATRIX}: {spread(rates, 0)} GFLOP/s")
    print_rows("batches alone, N 128", batches[:2], rates)
    print_rows("batches alone, N 512", batches[2:], rates)
    for title, part in parts.items():
        print_rows(title, part, rates)

    c = build(config, data)
    trained_steps = our_steps(c)
    for _ in range(50):  # metrics of untrained weights would hardly differ from zero
        next(trained_steps)
    user_UD, item_ID = matrices(c.state.model)
    trained, splits = sets_of(data.trained, data.num_users), plain_splits(data)
    sides: dict[str, Callable[[], dict[str, float]]] = {
        "original": partial(plain_evaluation, torch.cat([user_UD, item_ID]), data.num_users, trained, splits, k=TOP),
        "ours": partial(our_evaluation, c.state.model, data, config),
    }
    found: dict[str, dict[str, float]] = {}
    elapsed: dict[str, list[float]] = {name: [] for name in sides}
    sides["ours"]()  # warm-up
    for _ in range(eval_rounds):
        for name, measure in sides.items():
            begin = time.perf_counter()
            found[name] = measure()
            elapsed[name].append(time.perf_counter() - begin)
    ratios = [theirs / mine for theirs, mine in zip(elapsed["original"], elapsed["ours"], strict=True)]
    print(f"\nevaluation, six figures, masked scores {LEGACY_MASK} on both sides, {eval_rounds} alternating rounds")
    for name, seconds in elapsed.items():
        print(f"  {name:12s} {spread(seconds, 2)} s")
    print(f"  ratio x{spread(ratios, 1)}")
    for name, value in found["original"].items():
        print(f"  {name:24s} original {value:.6f}   ours {found['ours'][name]:.6f}")
    gap = max(abs(value - found["ours"][name]) for name, value in found["original"].items())
    print(f"  largest difference {gap:.2g}")
    if gap > LARGEST_GAP:
        raise SystemExit("the two sides do not measure the same: no ratio above counts")
    print(f"load of the machine at the end: {load()}")


if __name__ == "__main__":
    main()
