"""The rows of the notes' table (workers, batch size, negatives, AMP) for CLCRec with a graph term, in one run.

    python -m benchmarks.graphrec_notes --data-path Data/movielens

Content is random, of the real widths (acoustic 128, text 100), where the folder has none: it does not change the speed.
First the input alone: the usual per-sample sampling (apps/graphrec/originals.py) in a DataLoader with 0, 1 and 2
workers, beside ours. Then whole training steps of ours, one row per setting. samples/s are positives per second.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader

from apps.graphrec.bench import with_content
from apps.graphrec.config import Config, ModelConfig, TrainConfig
from apps.graphrec.formats import read_data
from apps.graphrec.objective import loss_fn
from apps.graphrec.originals import PlainPairs
from apps.graphrec.train import Components, build, epoch_batches
from shared.amp import amp_step
from shared.device import describe_machine


def loader_rate(data: PlainPairs, batch_size: int, workers: int, batches: int) -> float:
    """Samples per second of the usual loader, without its start."""
    context = "fork" if workers else None
    source = iter(DataLoader(data, batch_size, shuffle=True, num_workers=workers, multiprocessing_context=context))
    for _ in range(2 * max(1, workers)):  # what was prefetched while the processes started
        next(source)
    begin = time.perf_counter()
    for _ in range(batches):
        next(source)
    return batches * batch_size / (time.perf_counter() - begin)


def steps_of(c: Components) -> Iterator[object]:
    """Steps without end."""
    epoch = 0
    while True:
        yield from epoch_batches(c, epoch=epoch)
        epoch += 1


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="folder in CLCRec's layout")
    parser.add_argument("--batches", type=int, default=12, help="timed batches of each loader")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each setting")
    parser.add_argument("--warm-up", type=int, default=3)
    options = parser.parse_args()

    data = with_content(read_data(options.data_path))
    print(f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {data.num_pairs:,} training pairs")
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))

    def components(
        batch_size: int, num_negatives: int, *, negatives: str = "device", precision: str = "fp32"
    ) -> Components:
        training = TrainConfig(
            batch_size=batch_size,
            num_negatives=num_negatives,
            negatives=negatives,
            precision=precision,
            lr_scale="sqrt",
            device="cpu",
            select="all/Recall@20" if data.is_cold is not None else "Recall@20",
        )
        return build(Config(model=ModelConfig(model="clcrec-graph"), training=training), data)

    print("\ninput alone, batches of 256 with 512 negatives")
    usual = PlainPairs(data, 512)
    first = 0.0
    for workers in (0, 1, 2):
        rate = loader_rate(usual, 256, workers, options.batches)
        first = first or rate
        print(f"usual loader, {workers} workers {rate:12,.0f} samples/s  x{rate / first:.2f}", flush=True)
    source = steps_of(components(256, 512))
    for _ in range(3):
        next(source)
    begin = time.perf_counter()
    for _ in range(20 * options.batches):
        next(source)
    rate = 20 * options.batches * 256 / (time.perf_counter() - begin)
    print(f"ours, no workers         {rate:12,.0f} samples/s  x{rate / first:.1f}")

    rows = {
        "batch 256, 512 negatives (quality)": components(256, 512),
        "batch 512, 512 negatives (balanced)": components(512, 512),
        "batch 1024, 512 negatives": components(1024, 512),
        "batch 256, 256 negatives": components(256, 256),
        "batch 1024, 256 negatives (turbo)": components(1024, 256),
        "balanced, bf16 autocast": components(512, 512, precision="bf16"),
        "turbo, bf16 autocast": components(1024, 256, precision="bf16"),
        "balanced, shared negatives": components(512, 512, negatives="shared"),
        "turbo, shared negatives": components(1024, 256, negatives="shared"),
    }
    states = {name: c.state for name, c in rows.items()}
    sources = {name: steps_of(c) for name, c in rows.items()}
    elapsed: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.warm_up + options.steps):
        for name, c in rows.items():
            states[name].model.train()
            begin = time.perf_counter()
            step = next(sources[name])
            loss_of = partial(loss_fn, training=c.config.training, plan=c.plan, log_q_I=c.log_q_I)
            states[name], _ = amp_step(states[name], [step], loss_of, amp=c.amp)
            elapsed[name].append(time.perf_counter() - begin)
    print("\nwhole training steps of ours, clcrec-graph; evaluation not in it")
    first = 0.0
    for name, c in rows.items():
        middle = statistics.median(elapsed[name][options.warm_up :])
        rate = c.config.training.batch_size / middle
        first = first or rate
        epoch_min = data.num_pairs / rate / 60
        print(
            f"{name:36s} {1 / middle:6.2f} steps/s {rate:8,.0f} samples/s  x{rate / first:.2f}  "
            f"epoch {epoch_min:.1f} min, 1,000 epochs {1000 * epoch_min / 60:.0f} h"
        )


if __name__ == "__main__":
    main()
