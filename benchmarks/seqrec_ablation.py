"""What each part of the contest form is worth: one change at a time, several seeds, mean and spread on test.

    python -m benchmarks.seqrec_ablation                                  # on the demo data
    python -m benchmarks.seqrec_ablation --users 6000 --items 10000 --loss sampled

Every row is trained anew with its own seeds; the checkpoint with the best validation NDCG@10 is tested once. The data
is generated in the contest form (apps/seqrec/contest_demo.py), below --folder.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.contest import prepare_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_features import training_sequences
from apps.seqrec.dataset import Sequences
from apps.seqrec.demo import CONTEST_ITEMS, CONTEST_LENGTH, CONTEST_SEED, CONTEST_USERS
from apps.seqrec.evaluate import evaluate
from apps.seqrec.train import build, fit
from shared.device import describe_machine
from shared.log import SilentLog, StopSignal

COLUMNS = ("NDCG@10", "HR@10", "Score", "Weighted score")


def variants(base: Config) -> dict[str, Config]:
    """The rows of the table: all parts, then one left out or changed at a time."""

    def model(**changes: Any) -> Config:
        return replace(base, model=replace(base.model, **changes))

    def training(**changes: Any) -> Config:
        return replace(base, training=replace(base.training, **changes))

    def cosine(temperature: float) -> Config:
        return model(score="cosine", temperature=temperature)

    return {
        "all parts": base,
        "without features and embeddings": model(features=False),
        "without embeddings": model(embeddings=()),
        "without the user token": model(user_token=False),
        "without actions as input": model(action_input=False),
        "without next-action condition": model(next_action=False),
        "without any action": model(action_input=False, next_action=False),
        "asked for an exposure": training(query_action="exposure"),
        "targets weighted .5, 1, 2.5": training(action_weights=(0.5, 1.0, 2.5)),
        "with pauses and time of day": model(time_input=True),
        "cosine, temperature .05": cosine(0.05),
        "cosine, temperature .1": cosine(0.1),
        "HSTU blocks": model(attention="hstu"),
        "RoPE": model(position="rope"),
        "sampled, 512 shared negatives": training(loss="sampled", num_negatives=512),
        "in-batch, logQ": training(loss="inbatch"),
        "in-batch, no logQ": training(loss="inbatch", logq=False),
        "in-batch, logQ, cosine .05": replace(cosine(0.05), training=replace(base.training, loss="inbatch")),
        "BCE, 1 negative": training(loss="bce"),
    }


def measure(config: Config, sequences: Sequences) -> tuple[dict[str, float], dict[str, float], float]:
    """Test metrics, history filtered and not, and the seconds of training."""
    begin = time.perf_counter()
    c = build(config, sequences)
    with tempfile.TemporaryDirectory() as folder, StopSignal(say=print) as stop:
        outcome = fit(c, Path(folder), log=SilentLog(), stop=stop)
    assert outcome.metrics is not None
    elapsed_s = time.perf_counter() - begin
    model = outcome.state.ema or outcome.state.model
    unfiltered = evaluate(model, sequences, "test", config=config, packed=c.packed, protocol="unfiltered")
    return outcome.metrics["test"], unfiltered, elapsed_s


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("contest-ablation"))
    parser.add_argument("--users", type=int, default=CONTEST_USERS)
    parser.add_argument("--items", type=int, default=CONTEST_ITEMS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--loss", default="ce")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    options = parser.parse_args()

    source = write_contest(
        options.folder / "source",
        num_users=options.users,
        num_items=options.items,
        mean_length=CONTEST_LENGTH,
        seed=CONTEST_SEED,
    )
    sequences = training_sequences(prepare_contest(source, options.folder / "pack"))
    base = Config(
        data=DataConfig(max_len=50),
        model=ModelConfig(),
        training=TrainConfig(
            epochs=options.epochs, loss=options.loss, lr=options.lr, num_negatives=1024, eval_every=2, device="cpu"
        ),
    )
    print(
        f"{sequences.num_users:,} users, {sequences.num_items:,} items, {sequences.num_events:,} events; "
        f"loss {base.training.loss}, lr {base.training.lr}, {base.training.epochs} epochs"
    )
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    print(f"{'':34s}" + "".join(f"{name:>20s}" for name in (*COLUMNS, "NDCG@10 unfiltered")) + "    s/run")
    for name, config in variants(base).items():
        if options.only not in name:
            continue
        runs = [
            measure(replace(config, training=replace(config.training, seed=seed)), sequences)
            for seed in range(options.seeds)
        ]
        cells = [[filtered[column] for filtered, _, _ in runs] for column in COLUMNS]
        cells.append([unfiltered["NDCG@10"] for _, unfiltered, _ in runs])
        text = "".join(f"{statistics.mean(cell):13.4f} +-{statistics.pstdev(cell):.4f}" for cell in cells)
        print(f"{name:34s}{text}  {statistics.mean(run[2] for run in runs):7.0f}", flush=True)


if __name__ == "__main__":
    main()
