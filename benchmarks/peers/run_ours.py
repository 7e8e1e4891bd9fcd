"""Train and test one model with the project, and print what was measured as a line of JSON.

Started by compare.py; the one argument is the job as JSON: compare.py's Job. Like run_recbole.py, line for line.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from apps.graphrec import config as graph_config
from apps.graphrec import train as graph
from apps.graphrec.dataset import Interactions
from apps.graphrec.evaluate import evaluate as evaluate_graph
from apps.graphrec.formats import read_data
from apps.seqrec import config as sequence_config
from apps.seqrec import train as sequential
from apps.seqrec.dataset import Sequences, query_spans, training_spans
from apps.seqrec.evaluate import evaluate as evaluate_sequences
from apps.seqrec.formats import read_sequences
from shared.log import SilentLog
from shared.ranking import Lists
from shared.timing import RateMeter, StepTimer

Pairs = Iterator[tuple[str, str]]


class Side(NamedTuple):
    """What is timed."""

    train: Callable[[int, int], None]  # the epochs first .. end - 1
    evaluate: Callable[[str], dict[str, float]]
    steps: int
    users: int
    items: int
    parts: list[list[Any]]
    parameters: int


def silent(log: SilentLog) -> dict[str, Any]:
    """What the apps' train_epoch reports to and asks, which here is nobody."""
    return {
        "log": log,
        "timer": StepTimer(torch.device("cpu")),
        "rates": RateMeter(),
        "check": lambda state: None,
        "save": lambda state, meter: None,
        "stopping": lambda state: False,
        "on_step": lambda note: None,
    }


def part_of(pairs: Pairs) -> list[Any]:
    """How many targets a part holds, and a digest of who has which as a target."""
    lines = sorted(f"{user} {item}" for user, item in pairs)
    return [len(lines), hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()]


def sasrec(job: Mapping[str, Any], sequences: Sequences) -> Side:
    """SASRec as RecBole has it: post-norm, cross-entropy over all items, a constant learning rate, no clipping."""
    data = sequence_config.DataConfig(max_len=job["max_len"], window="all")
    spans = training_spans(sequences, max_len=job["max_len"], window="all")
    targets = int((spans.end - spans.start).sum())
    config = sequence_config.Config(
        data,
        sequence_config.ModelConfig(
            embed_dim=job["embed_dim"],
            num_blocks=job["layers"],
            num_heads=job["heads"],
            dropout=job["dropout"],
            norm_first=False,
        ),
        sequence_config.TrainConfig(
            epochs=job["epochs"],
            # as many pieces as hold that many targets
            batch_size=max(1, round(job["batch_size"] * spans.user.numel() / targets)),
            lr=job["lr"],
            lr_scheduler="constant",
            clip_norm=0.0,
            norm_every=0,
            seed=job["seed"],
            device="cpu",
            ks=(job["k"],),
            select=f"NDCG@{job['k']}",
            protocol="unfiltered",
        ),
    )
    c = sequential.build(config, sequences)
    state = c.state

    def train(first: int, end: int) -> None:
        nonlocal state
        for epoch in range(first, end):
            state, _ = sequential.train_epoch(
                c, replace(state, epoch=epoch), sequential.fresh_meter(c.device), **silent(SilentLog())
            )

    def evaluate(stage: str) -> dict[str, float]:
        return evaluate_sequences(state.model, sequences, stage, config=config, packed=c.packed)  # type: ignore[arg-type]

    def of_events(event: torch.Tensor) -> Pairs:
        users = torch.searchsorted(sequences.ptr, event, right=True) - 1
        for user, item in zip(users.tolist(), sequences.item[event].tolist(), strict=True):
            yield sequences.user_ids[user], sequences.item_ids[item - 1]

    trained = [
        torch.arange(start + 1, end + 1) for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)
    ]
    held_out = [query_spans(sequences, stage, max_len=1).end for stage in sequential.STAGES]
    return Side(
        train,
        evaluate,
        c.steps_per_epoch,
        sequences.num_users,
        sequences.num_items,
        [part_of(of_events(event)) for event in (torch.cat(trained), *held_out)],
        sum(p.numel() for p in state.model.parameters()),
    )


def lightgcn(job: Mapping[str, Any], data: Interactions) -> Side:
    """LightGCN with BPR and one negative of each pair's own."""
    config = graph_config.Config(
        graph_config.DataConfig(),
        graph_config.ModelConfig(embed_dim=job["embed_dim"], layers=job["layers"], init="xavier"),
        graph_config.TrainConfig(
            epochs=job["epochs"],
            batch_size=job["batch_size"],
            loss="bpr",
            num_negatives=1,
            reg_weight=job["reg_weight"],
            lr=job["lr"],
            norm_every=0,
            seed=job["seed"],
            device="cpu",
            ks=(job["k"],),
            select=f"NDCG@{job['k']}",
        ),
    )
    c = graph.build(config, data)
    state = c.state

    def train(first: int, end: int) -> None:
        nonlocal state
        for epoch in range(first, end):
            state, _ = graph.train_epoch(c, replace(state, epoch=epoch), graph.fresh_meter(c), **silent(SilentLog()))

    def evaluate(stage: str) -> dict[str, float]:
        return evaluate_graph(state.model, data, stage, config=config)  # type: ignore[arg-type]

    def of_lists(lists: Lists) -> Pairs:
        users = torch.repeat_interleave(lists.ptr.diff())
        for user, item in zip(users.tolist(), lists.item.tolist(), strict=True):
            yield data.user_ids[user], data.item_ids[item]

    return Side(
        train,
        evaluate,
        c.steps_per_epoch,
        data.num_users,
        data.num_items,
        [part_of(of_lists(lists)) for lists in (data.train, data.valid, data.test)],
        sum(p.numel() for p in state.model.parameters()),
    )


def main() -> None:
    """Print the line."""
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"]) / job["dataset"]
    begin = time.perf_counter()
    if job["model"] == "SASRec":
        sequences = read_sequences(folder / f"{job['dataset']}.inter")
        reading_s = time.perf_counter() - begin
        side = sasrec(job, sequences)
    else:
        data = read_data(folder, format="lightgcn")
        reading_s = time.perf_counter() - begin
        side = lightgcn(job, data)

    side.train(0, job["warm_up"])
    side.evaluate("valid")  # the first one is slower on both sides
    begin = time.perf_counter()
    side.train(job["warm_up"], job["epochs"])
    training_s = time.perf_counter() - begin
    begin = time.perf_counter()
    found = side.evaluate("test")
    evaluation_s = time.perf_counter() - begin
    result = {
        "reading_s": reading_s,
        "epoch_s": training_s / (job["epochs"] - job["warm_up"]),
        "evaluation_s": evaluation_s,
        "steps": side.steps,
        "NDCG": found[f"NDCG@{job['k']}"],
        "Recall": found[f"Recall@{job['k']}"],
        "users": side.users,
        "items": side.items,
        "parts": side.parts,
        "parameters": side.parameters,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
