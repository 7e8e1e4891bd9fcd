"""The project beside RecBole: the same data, split, hyper-parameters and number of epochs, alternating in one run.

    python -m benchmarks.peers.make_venv
    python -m benchmarks.peers.compare --data-path ml-100k

SASRec and LightGCN. Each side runs in a process and a virtual environment of its own and measures itself, by the clock
around its own training of whole epochs and around one evaluation of the test part. How much longer a process takes than
that, to start and to read the data, is in the line of JSON alone (reading_s).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apps.graphrec.formats import read_data
from apps.seqrec.formats import read_sequences
from benchmarks.peers.make_venv import DEFAULT, interpreter
from shared.device import describe_machine
from shared.ranking import Lists

HERE = Path(__file__).parent
PARTS = ("train", "valid", "test")

# SASRec: steps of 512 targets instead of RecBole's 2048, so that a few epochs are steps enough to compare the quality.
# LightGCN: an epoch is short, hence the warm-up.
CHOSEN: dict[str, dict[str, Any]] = {
    "SASRec": {"epochs": 2, "warm_up": 0, "batch_size": 512, "layers": 2, "lr": 1e-3},
    "LightGCN": {"epochs": 11, "warm_up": 1, "batch_size": 2048, "layers": 3, "lr": 1e-3},
}
NOTES = {
    "SASRec": (
        "the last event of a user is the test target, the one before it the validation target; all items ranked, the "
        "history not left out",
        "cross-entropy over all items; Adam, constant rate, no clipping; blocks of equal widths, LayerNorm after the "
        "addition, GELU",
        "a sample is a target, and both sides have the same ones; RecBole encodes up to max_len events anew for each, "
        "ours cuts a history into pieces of max_len and encodes each once for all of its targets, which see the "
        "events of the piece alone; a step of ours has as many pieces as hold batch_size targets on average",
        "RecBole counts positions from the oldest event, adds a LayerNorm to the input, starts at normal(.02), has "
        "padding among the classes, Adam's second beta .999; ours counts from the latest, scales the input by "
        "sqrt(d), starts at Xavier, .98",
        "no dropout on attention weights: RecBole's default is .5, ours has none",
    ),
    "LightGCN": (
        "of each user's items a tenth at random is the test part, a tenth the validation part; all items ranked, "
        "except those of the two other parts",
        "BPR with one negative of each pair's own, never a training item; half the mean square norm of a batch's rows "
        "times reg_weight (RecBole's require_pow); Adam with the same betas; a sample is a pair",
        "Xavier: RecBole's is uniform and of users and items apart, ours normal and of the whole table",
        "eval_batch_size lets RecBole score as many users at a time as ours; its default of 4,096 scores would be two",
    ),
}
COMMON_NOTES = (
    "ties: ours count against the model, RecBole's fall as torch.topk takes them",
    "not timed: the warm-up epochs, a validation before the evaluation, saving; fp32; RecBole without worker "
    "processes, its default",
)


@dataclass(frozen=True)
class Job:
    """What both sides are told to do."""

    model: str
    dataset: str
    folder: str  # where the data is, in both sides' forms
    num_items: int
    seed: int
    epochs: int
    warm_up: int  # the first epochs, which are not timed
    batch_size: int  # targets, or pairs, of a step
    layers: int
    lr: float
    max_len: int
    embed_dim: int = 64
    heads: int = 2
    dropout: float = 0.2
    reg_weight: float = 1e-4
    k: int = 10
    eval_users: int = 1024  # scored at a time


def write_sequences(source: Path, folder: Path) -> int:
    """Write the events for both sides and give the number of items.

    For a time there is an event's number within its user, since RecBole holds times as 32-bit floats: seconds since
    1970 would have a step of 64, and within it the order of the file would decide which event is the last.
    """
    sequences = read_sequences(source)
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    ptr, items = sequences.ptr.tolist(), sequences.item.tolist()
    for user, name in enumerate(sequences.user_ids):
        for number, item in enumerate(items[ptr[user] : ptr[user + 1]], start=1):
            lines.append(f"{name}\t{sequences.item_ids[item - 1]}\t{number}")
    (folder / f"{folder.name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sequences.num_items


def write_pairs(source: Path, folder: Path) -> int:
    """Split the pairs once, write each part for both sides, and give the number of items."""
    data = read_data(source)
    folder.mkdir(parents=True)
    parts: Sequence[Lists] = (data.train, data.valid, data.test)
    for name, lists in zip(PARTS, parts, strict=True):
        lines, rows = [], ["user_id:token\titem_id:token"]
        for user, own in enumerate(torch.split(lists.item, lists.ptr.diff().tolist())):
            lines.append(" ".join(map(str, [user, *own.tolist()])))
            rows += [f"{user}\t{item}" for item in own.tolist()]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{folder.name}.{name}.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return data.num_items


def measure(command: Sequence[str], job: Job, *, cwd: Path, threads: int) -> dict[str, Any]:
    """What one side says it measured."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, json.dumps(asdict(job))], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def middle(values: Sequence[float], form: str) -> str:
    """The median with the smallest and the largest."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} .. {high:{form}})"


def mean(values: Sequence[float]) -> str:
    """The mean with the standard deviation between seeds."""
    spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def check_same(results: dict[str, list[dict[str, Any]]]) -> None:
    """Stop where the two sides did not have the same users, items and targets."""
    for name in ("users", "items", "parts", "threads"):
        found = {side: [run[name] for run in runs] for side, runs in results.items()}
        first = next(iter(found.values()))[0]
        if any(value != first for values in found.values() for value in values):
            sys.exit(f"the two sides differ in {name}, so their figures would not compare: {found}")


def print_table(job: Job, results: dict[str, list[dict[str, Any]]]) -> None:
    """Print the rows of one model."""
    first = next(iter(results.values()))[0]
    counts = ", ".join(f"{part[0]:,} {name}" for name, part in zip(PARTS, first["parts"], strict=True))
    print(f"\n{job.model}: {first['users']:,} users, {first['items']:,} items, targets: {counts}")
    own = ("heads", "dropout", "max_len") if job.model == "SASRec" else ("reg_weight",)
    chosen = ("epochs", "warm_up", "batch_size", "embed_dim", "layers", "lr", *own)
    print(", ".join(f"{name} {getattr(job, name)}" for name in chosen))
    heads = ("s / epoch", "samples/s", "s / evaluation", f"NDCG@{job.k}", f"Recall@{job.k}", "steps", "weights")
    print(f"{'':8s}" + "".join(f"{head:>32s}" for head in heads[:3]) + "".join(f"{head:>18s}" for head in heads[3:]))
    for side, runs in results.items():
        epoch_s, evaluation_s = ([run[name] for run in runs] for name in ("epoch_s", "evaluation_s"))
        rate = [run["parts"][0][0] / run["epoch_s"] for run in runs]
        print(
            f"{side:8s}{middle(epoch_s, '.3f'):>32s}{middle(rate, ',.0f'):>32s}{middle(evaluation_s, '.4f'):>32s}"
            + "".join(f"{mean([run[name] for run in runs]):>18s}" for name in ("NDCG", "Recall"))
            + f"{runs[0]['steps']:>18,}{runs[0]['parameters']:>18,}"
        )
    base, ours = results.values()
    for name, text in (("epoch_s", "an epoch"), ("evaluation_s", "an evaluation")):
        ratio = [one[name] / other[name] for one, other in zip(base, ours, strict=True)]
        print(f"{text} of ours is {middle(ratio, '.1f')} times as fast")
    for note in (*NOTES[job.model], *COMMON_NOTES):
        print(f"- {note}")
    sys.stdout.flush()


def main() -> None:
    """Print the tables, and everything once more as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="events with times, as ml-100k")
    parser.add_argument("--venv", type=Path, default=DEFAULT, help="made by make_venv (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=tuple(NOTES), default=tuple(NOTES))
    parser.add_argument("--epochs", type=int, help="of each run (default: SASRec 2, LightGCN 11)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, with seeds 1, 2, ...")
    parser.add_argument("--max-len", type=int, default=20, help="events that SASRec sees (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: all cores")
    options = parser.parse_args()
    python = interpreter(options.venv.absolute())
    if not python.is_file():
        sys.exit(f"{python} is not there; make it with `python -m benchmarks.peers.make_venv`")
    if options.epochs is not None and options.epochs < 2:
        sys.exit("--epochs must be at least 2: the first one may be a warm-up")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the process at work too
    machine = describe_machine()
    threads = options.threads or int(machine["cores"])
    machine["threads"] = str(threads)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))

    sides = {
        "RecBole": [str(python), str(HERE / "run_recbole.py")],
        "ours": [sys.executable, "-m", "benchmarks.peers.run_ours"],
    }
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write = {"SASRec": (write_sequences, "events"), "LightGCN": (write_pairs, "pairs")}
        for model in options.models:
            writer, dataset = write[model]
            num_items = writer(options.data_path, folder / dataset)
            results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for seed in range(1, options.repeats + 1):
                chosen = CHOSEN[model] | ({"epochs": options.epochs} if options.epochs else {})
                job = Job(model, dataset, work, num_items, seed, max_len=options.max_len, **chosen)
                for side, command in sides.items():
                    cwd = folder if side == "RecBole" else HERE.parents[1]  # RecBole writes where it stands
                    results[side].append(measure(command, job, cwd=cwd, threads=threads))
                    print(f"{model}, seed {seed}, {side}: {results[side][-1]['epoch_s']:.3f} s/epoch", file=sys.stderr)
            check_same(results)
            print_table(job, results)
            tables[model] = results
    versions = {side: runs[0]["versions"] for side, runs in next(iter(tables.values())).items()}
    print(json.dumps({"machine": machine, "versions": versions, "models": tables}))


if __name__ == "__main__":
    main()
