"""Steps, sampling and evaluation of graphrec's LightGCN against the usual PyTorch arrangement, alternating in one run.

    python -m benchmarks.graphrec_step --data-path gowalla

The usual arrangement is apps/graphrec/originals.py, written from a description of LightGCN-PyTorch: a Python loop draws
a user, one of its items and a negative by rejection against an array; the adjacency of users and items is a coalesced
COO matrix, multiplied by torch.sparse.mm layer by layer; the layers are stacked and averaged; BPR with L2 of the
batch's rows; Adam as it comes; evaluation in batches of 100 users, each of which propagates the whole graph again, with
Python loops for masks and hits (its sigmoid, which turns close scores into ties, is left out). Both: the same width,
layers, batch size, one negative, and the same weights, with which the metrics of the evaluation must agree.
Needs NumPy, whose arrays and numbers the usual sampler draws from.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.graphrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.graphrec.dataset import Interactions
from apps.graphrec.demo import write_demo
from apps.graphrec.evaluate import evaluate
from apps.graphrec.formats import read_data
from apps.graphrec.model import GraphRec
from apps.graphrec.objective import loss_fn
from apps.graphrec.originals import PlainLightGCN, Triples, coo_adjacency, lists_of, plain_ranking, plain_triples
from apps.graphrec.train import build, epoch_batches
from shared.amp import amp_step
from shared.device import describe_machine
from shared.ranking import Lists

np: Any = import_module("numpy")  # the extra `formats`, which the checks of types do without


def quartiles(seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    return f"{middle:8.1f} ms ({low:.1f} .. {high:.1f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="LightGCN folder (default: demo data)")
    parser.add_argument("--embed-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--users", type=int, default=3000, help="test users of the evaluation")
    options = parser.parse_args()

    path = options.data_path or write_demo(Path("runs") / "graphrec" / "demo-data")
    data = read_data(path, valid_share=0.0)
    nothing = Lists(torch.zeros_like(data.valid.ptr), data.valid.item[:0])
    data = replace(data, valid=nothing)  # both sides leave out training items alone
    machine = describe_machine()
    print(f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {data.num_pairs:,} training pairs")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))

    def config(**model: Any) -> Config:
        return Config(
            DataConfig(valid_share=0.0),
            ModelConfig(embed_dim=options.embed_dim, layers=options.layers, **model),
            TrainConfig(loss="bpr", num_negatives=1, batch_size=options.batch_size, device="cpu", ks=(20,)),
        )

    exact = build(config(), data)
    model = exact.state.model
    assert isinstance(model, GraphRec)
    usual = PlainLightGCN(model, coo_adjacency(data, exact.device))
    adam = torch.optim.Adam(usual.parameters(), lr=1e-3)

    # sampling, a whole epoch
    arrays = [items.numpy() for items in torch.split(data.train.item.long(), data.train.ptr.diff().tolist())]
    np.random.seed(0)
    begin = time.perf_counter()
    triples = np.array(plain_triples(arrays, data.num_items, data.num_pairs, draw=np.random.randint))
    usual_sampling_s = time.perf_counter() - begin
    drawn_s = []
    for epoch in range(3):
        begin = time.perf_counter()
        pairs = sum(part.batch.user.numel() for step in epoch_batches(exact, epoch=epoch) for part in step.parts)
        drawn_s.append(time.perf_counter() - begin)
    assert pairs == data.num_pairs
    sampling_s = statistics.median(drawn_s)
    print(f"\nsampling one epoch, {data.num_pairs:,} pairs with one negative each")
    print(f"usual, Python loop         {usual_sampling_s:8.2f} s")
    print(f"ours, order and batches in {sampling_s:8.3f} s  x{usual_sampling_s / sampling_s:.0f}")

    # steps
    ours = {"ours": exact, "ours, bf16 rows": build(config(bf16_rows=True), data)}
    states = {name: c.state for name, c in ours.items()}
    sources = {name: epoch_batches(c, epoch=0) for name, c in ours.items()}
    elapsed: dict[str, list[float]] = {"usual": [], **{name: [] for name in ours}}
    for index in range(options.warm_up + options.steps):
        rows = torch.from_numpy(triples[index * options.batch_size : (index + 1) * options.batch_size])
        begin = time.perf_counter()
        terms = usual.losses(Triples(*rows.unbind(1)))
        adam.zero_grad()
        (terms["pairs"] + 1e-4 * terms["reg"]).backward()  # type: ignore[no-untyped-call]
        adam.step()
        elapsed["usual"].append(time.perf_counter() - begin)
        for name, c in ours.items():
            begin = time.perf_counter()
            step = next(sources[name])
            loss_of = partial(loss_fn, training=c.config.training, plan=c.plan, log_q_I=c.log_q_I)
            states[name], _ = amp_step(states[name], [step], loss_of, amp=c.amp)
            elapsed[name].append(time.perf_counter() - begin)
    steps = -(-data.num_pairs // options.batch_size)
    print(f"\na step of {options.batch_size} pairs, d {options.embed_dim}, {options.layers} layers, BPR, one negative")
    base = 0.0
    for name, seconds in elapsed.items():
        timed = seconds[options.warm_up :]
        epoch_s = steps * statistics.median(timed) + (usual_sampling_s if name == "usual" else 0.0)
        base = base or epoch_s
        print(f"{name:20s} {quartiles(timed)}; {steps} steps and the sampling {epoch_s:7.1f} s  x{base / epoch_s:.1f}")

    # evaluation with the same weights
    with torch.no_grad():
        model.table.copy_(torch.cat([usual.user, usual.item]))
    users = data.test.ptr.diff().nonzero().squeeze(1)[: options.users]
    positives, tests = lists_of(data.train), lists_of(data.test)
    begin = time.perf_counter()
    slow = plain_ranking(usual.propagated, users.tolist(), positives, tests, k=20)
    usual_s = time.perf_counter() - begin
    few = first_tests(data, users)
    own_s = []
    for _ in range(3):
        begin = time.perf_counter()
        fast = evaluate(model, few, "test", config=exact.config)
        own_s.append(time.perf_counter() - begin)
    evaluation_s = statistics.median(own_s)
    print(f"\nevaluation of {users.numel():,} users over {data.num_items:,} items; the same weights")
    print(
        f"usual, batches of 100 {usual_s:8.2f} s  " + ", ".join(f"{name} {value:.6f}" for name, value in slow.items())
    )
    print(
        f"ours                  {evaluation_s:8.2f} s  "
        + ", ".join(f"{name} {fast[name]:.6f}" for name in slow)
        + f"  x{usual_s / evaluation_s:.1f}"
    )
    assert all(abs(fast[name] - value) < 1e-6 for name, value in slow.items())


def first_tests(data: Interactions, users: Tensor) -> Interactions:
    """The data with the test items of these users alone, which are the first that have any."""
    end = int(users[-1]) + 1
    ptr = data.test.ptr.clamp(max=int(data.test.ptr[end]))
    return replace(data, test=type(data.test)(ptr, data.test.item[: int(ptr[-1])]))


if __name__ == "__main__":
    main()
