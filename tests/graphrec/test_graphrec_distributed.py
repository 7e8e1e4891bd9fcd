"""Training by several processes, which divide the pairs or the columns: the same losses, weights and metrics as one.

Run by torchrun, this file trains: `FILE FOLDER` runs every scenario below in a folder of its own.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.graphrec.config import Config
from apps.graphrec.train import Outcome, build, epoch_batches, fit, restore
from shared import distributed
from shared.checkpoint import load_checkpoint, newest_checkpoint
from shared.distributed import Group
from shared.log import RunLog, SilentLog, StopSignal, read_metrics
from tests.graphrec.test_graphrec_train import MODES, configured, data_for, loss_and_gradients, topical_data

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"epochs": 6, "log_every": 1, "norm_every": 3, "eval_every": 3, "save_every": 4}
HALF = 11  # steps before a run changes hands

# name -> (mode, training options): the pairs of a step are divided
BY_PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "lightgcn": ("lightgcn, softmax", {"accumulate": 2, "ema_decay": 0.5}),
    "own negatives": ("lightgcn, bpr", {"propagate_every": 2, "batch_size": 37}),
    "in batch": ("lightgcn, inbatch", {"clip_norm": 0.5}),
    "uniformity": ("lightgcn, directau", {}),
    "noise": ("xsimgcl", {}),
    "clcrec-graph": ("clcrec-graph", {}),
}
# the columns of the table are divided
BY_COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "columns": ("lightgcn, softmax", {"ema_decay": 0.5, "accumulate": 2, "weight_decay": 0.01, "optimizer": "adamw"}),
    "columns, mf": ("mf, bpr", {"propagate_every": 2, "batch_size": 37}),
    "columns, own negatives": ("lightgcn, bpr", {}),
    "columns, own softmax": ("lightgcn, own softmax", {}),
    "columns, cosine": ("lightgcn, cosine", {}),
    "columns, own cosine": ("lightgcn, own cosine", {}),
    "columns, shared bpr": ("lightgcn, shared bpr", {}),
}
SCENARIOS = BY_PAIRS | BY_COLUMNS
RESUMED = ("lightgcn", "columns")  # these also change hands in the middle


def config_of(name: str) -> Config:
    mode, options = SCENARIOS[name]
    parallel = "dims" if name in BY_COLUMNS else "data"
    return configured(mode, **{**OPTIONS, "reg_weight": 0.01, "parallel": parallel, **options})


def train(name: str, run_dir: Path, group: Group | None, *, max_steps: int = 0) -> Outcome:
    """A run, or the rest of the one that is in the folder."""
    config = config_of(name)
    config = replace(config, training=replace(config.training, max_steps=max_steps))
    c = build(config, data_for(config), group=group)
    found = newest_checkpoint(run_dir / "checkpoints", warn=print)
    start = None if found is None else restore(c, *found)
    step = None if start is None else start.state.step
    writes = distributed.place(group)[0] == 0
    log = RunLog(run_dir, say=lambda line: None, resume_step=step) if writes else SilentLog()
    with log, StopSignal(say=print) as stop:
        return fit(c, run_dir, log=log, stop=stop, start=start)


def group(rank: int, world: int) -> Group:
    return Group(rank=rank, world=world, device=CPU)


# Without a second process


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", MODES)
def test_the_parts_of_a_step_add_up_to_the_step_of_one_process(name, world):
    config = configured(name, accumulate=2, reg_weight=0.1)
    c = build(config, data_for(config))
    whole_loss, whole_terms, whole_gradients = loss_and_gradients(c, next(epoch_batches(c, epoch=1)))
    parts = []
    for rank in range(world):
        one = replace(c, group=group(rank, world))
        parts.append(loss_and_gradients(one, next(epoch_batches(one, epoch=1))))
    torch.testing.assert_close(sum(loss for loss, _, _ in parts), whole_loss, rtol=1e-5, atol=1e-6)
    for term, value in whole_terms.items():
        torch.testing.assert_close(sum(terms[term] for _, terms, _ in parts), value, rtol=1e-5, atol=1e-6)
    for i, gradient in enumerate(whole_gradients):
        torch.testing.assert_close(sum(part[2][i] for part in parts), gradient, rtol=1e-4, atol=1e-7)


def test_a_process_without_a_pair_computes_one_for_nothing():
    config = configured("lightgcn, softmax", batch_size=331)
    data = topical_data()
    left = data.num_pairs % 331
    assert left == 3
    for rank in range(7):
        c = replace(build(config, data), group=group(rank, 7))
        (part,) = list(epoch_batches(c, epoch=0))[-1].parts
        assert part.batch.user.numel() == 1
        assert part.share == (pytest.approx(1 / left) if rank < left else 0.0)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("xsimgcl", {}, "does not go with --model xsimgcl"),
        ("lightgcn, inbatch", {}, "does not go with --loss inbatch"),
        ("lightgcn, softmax", {"clip_norm": 1.0}, "does not go with --clip-norm: no process sees the whole gradient"),
        ("lightgcn, softmax", {"world": 9}, "9 processes: there are 8 columns"),
    ],
)
def test_what_columns_cannot_do_is_refused(mode, options, message):
    world = options.pop("world", 2)
    with pytest.raises(ValueError, match=message):
        build(configured(mode, parallel="dims", **options), topical_data(), group=group(0, world))


# Two processes


class Runs:
    """Every scenario by one process and by two; some also begun by one and ended by two, and the other way round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in RESUMED:
            train(name, folder / "one-two" / name, None, max_steps=HALF)
        self.launched = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                __file__,
                str(folder),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        self.one = {name: train(name, folder / "one" / name, None) for name in SCENARIOS}
        if not self.launched.returncode:
            for name in RESUMED:
                train(name, folder / "two-one" / name, None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    assert runs.launched.returncode == 0, runs.launched.stderr
    return runs


def newest(run_dir: Path) -> dict[str, Any]:
    return load_checkpoint(sorted((run_dir / "checkpoints").glob("step-*"))[-1])


def numbers(run_dir: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The values of each record, without what depends on the clock."""
    return {
        (line["kind"], line["step"]): {
            k: v for k, v in line.items() if isinstance(v, float) and not k.startswith("time") and "_per_s" not in k
        }
        for line in read_metrics(run_dir / "metrics.jsonl")
    }


def check_equal(run_dir: Path, expected: Path) -> None:
    """The same steps with the same losses and norms, the same metrics, and nearly the same weights."""
    found, wanted = numbers(run_dir), numbers(expected)
    assert found.keys() == wanted.keys()
    assert sum(kind == "train" for kind, _ in wanted) > 20
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, abs=1e-9 if key[0] == "valid" else 1e-5), key
    ours, theirs = newest(run_dir), newest(expected)
    for part in ("model", "ema"):
        for name, value in (theirs[part] or {}).items():
            assert ours[part][name].shape == value.shape
            assert float((ours[part][name] - value).abs().max()) < 1e-5, name
    for one, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        for index, slots in other["state"].items():
            for slot, value in slots.items():
                torch.testing.assert_close(one["state"][index][slot], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_and_measure_like_one(runs, name):
    check_equal(runs.folder / "two" / name, runs.folder / "one" / name)
    final = load_checkpoint(runs.folder / "two" / name / "final.safetensors")
    assert final["metrics"] == runs.one[name].metrics


@pytest.mark.parametrize("way", ["one-two", "two-one"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_changes_hands_between_one_and_two_processes(runs, name, way):
    check_equal(runs.folder / way / name, runs.folder / "one" / name)


def main(folder: Path) -> None:
    joined = distributed.join("cpu")
    assert joined is not None
    from shared.checkpoint import save_checkpoint

    for name in SCENARIOS:
        outcome = train(name, folder / "two" / name, joined)
        if joined.rank == 0:
            save_checkpoint(folder / "two" / name / "final.safetensors", {"metrics": outcome.metrics})
        if name in RESUMED:
            train(name, folder / "two-one" / name, joined, max_steps=HALF)
            train(name, folder / "one-two" / name, joined)
    distributed.leave(joined)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
