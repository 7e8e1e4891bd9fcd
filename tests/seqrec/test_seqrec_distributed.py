"""Training by several processes: the same plan, losses and metrics as one; stopped, killed and resumed by any number.

Run by torchrun, this file is the command line of seqrec with a signal planted: `FILE RANK STEP SIGNAL WORDS...` sends
the signal to itself in the process of that rank, at that call of amp_step.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import apps.seqrec.evaluate
import apps.seqrec.train
import shared.amp
from apps.seqrec import main
from apps.seqrec.dataset import training_spans
from apps.seqrec.evaluate import evaluate, evaluation_sums
from apps.seqrec.train import build, loss_fn, own_rows, step_batches, step_shares
from shared import cli
from shared.checkpoint import load_checkpoint
from shared.distributed import Group
from shared.log import read_metrics
from shared.ranking import finish
from tests.seqrec.test_seqrec_train import LOSSES, configure, cycling_sequences

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NUM_USERS = 65  # the last of five steps of 16 has one sequence: the second process then has none
FLAGS = (
    "--epochs 20 --eval-every 10 --batch-size 16 --max-len 12 --embed-dim 16 --dropout 0 --lr 0.01 --log-every 1 "
    "--save-every 3 --loss sampled --num-negatives 6 --ema-decay 0.5 --norm-every 7 --device cpu --precision fp32"
)
KILLED_AT, STOPPED_AT = 33, 21  # calls of amp_step in their process


def group(rank: int, world: int) -> Group:
    return Group(rank=rank, world=world, device=CPU)


# The plan, without a second process


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_sequence_of_a_step_is_computed_by_one_process(world):
    count = torch.randint(1, 50, (20,), generator=torch.Generator().manual_seed(1))
    parts = [own_rows(count, group(rank, world)) for rank in range(world)]
    assert sorted(torch.cat(parts).tolist()) == list(range(20))
    assert all(part.diff().gt(0).all() for part in parts)
    work = [int(count[part].sum()) for part in parts]
    assert max(work) - min(work) <= int(count.max())


def test_a_process_without_a_sequence_computes_the_shortest_for_nothing():
    config = configure(model={"dropout": 0.0})
    c = build(config, cycling_sequences())
    spans = training_spans(c.sequences, max_len=10).take(torch.tensor([3, 8]))
    for rank in range(4):
        one = replace(c, group=group(rank, 4))
        batches = step_batches(one, spans, epoch=0, index=0)
        shares = step_shares(batches, spans, one.group)
        assert len(batches) == len(shares) == 1
        assert (sum(shares) > 0) == (rank < 2)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_parts_of_a_step_add_up_to_the_step_of_one_process(name, world):
    config = configure(model={"dropout": 0.0}, accumulate=2, **LOSSES[name])
    c = build(config, cycling_sequences())
    spans = training_spans(c.sequences, max_len=10).take(torch.arange(10, 27))

    def loss_and_gradient(one: Any) -> tuple[float, torch.Tensor]:
        one.state.model.zero_grad()
        batches = step_batches(one, spans, epoch=1, index=2)
        shares = step_shares(batches, spans, one.group)
        parts = [
            share * loss_fn(one.state.model, batch, training=config.training, log_q_I=one.log_q_I)[0]
            for batch, share in zip(batches, shares, strict=True)
        ]
        total = torch.stack(parts).sum()
        total.backward()
        gradients = [p.grad.flatten() for p in one.state.model.parameters() if p.grad is not None]
        return float(total.detach()), torch.cat(gradients)

    whole_loss, whole_gradient = loss_and_gradient(c)
    parts = [loss_and_gradient(replace(c, group=group(rank, world))) for rank in range(world)]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole_loss, abs=1e-6)
    total = torch.stack([gradient for _, gradient in parts]).sum(0)
    assert float((total - whole_gradient).abs().max()) < 1e-6


@pytest.mark.parametrize("world", [2, 3])
def test_targets_meet_the_same_negatives_in_every_division(world):
    c = build(configure(loss="bce"), cycling_sequences())
    spans = training_spans(c.sequences, max_len=10).take(torch.arange(5, 25))

    def unseen_by_user(one: Any) -> dict[int, list[int]]:
        (batch,) = step_batches(one, spans, epoch=1, index=2)
        assert batch.unseen is not None
        user = batch.user[batch.segment.flatten()[batch.place] - 1]
        return {u: batch.unseen[user == u].tolist() for u in batch.user.tolist()}

    divided: dict[int, list[int]] = {}
    for rank in range(world):
        divided |= unseen_by_user(replace(c, group=group(rank, world)))
    assert divided == unseen_by_user(c)


@pytest.mark.parametrize("protocol", ["filtered", "unfiltered", "sampled"])
@pytest.mark.parametrize("world", [1, 2, 5, 9])
def test_metrics_of_divided_users_are_those_of_one_process_to_the_last_bit(world, protocol, monkeypatch):
    monkeypatch.setattr(apps.seqrec.evaluate, "USERS_PER_CHUNK", 8)  # eight chunks of 60 users
    config = configure(protocol=protocol)
    c = build(config, cycling_sequences())
    arguments: dict[str, Any] = {"config": config, "packed": True}
    whole = evaluate(c.state.model, c.sequences, "test", **arguments)
    parts = [
        evaluation_sums(c.state.model, c.sequences, "test", group=group(rank, world), **arguments)
        for rank in range(world)
    ]
    assert finish({name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}) == whole
    assert whole["users"] == 60
    if world <= 5:
        assert all(part["users"] > 0 for part in parts)


# The command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--local-rank=1", "train", "--lr", "1"], ["train", "--lr", "1"]),
        (["--local_rank", "1", "--lr", "1"], ["--lr", "1"]),
        (["train", "--lr=1"], ["train", "--lr=1"]),
    ],
)
def test_the_word_that_the_old_launcher_adds_is_ignored(words, expected):
    assert cli.without_local_rank(words) == expected


def test_verbs_that_do_not_share_their_work_refuse_several_processes(tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.pt").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="2"):
        main.app(["evaluate", "--weights", str(tmp_path / "weights.pt")])
    assert "start this without torchrun, as python -m apps.seqrec" in capsys.readouterr().err


# Two processes


def launch(words: list[str], *, module: str = "torch.distributed.run") -> subprocess.CompletedProcess[str]:
    """Two processes of this file or of `-m apps.seqrec`."""
    return subprocess.run(
        [sys.executable, "-m", module, "--standalone", "--nproc_per_node=2", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def alone(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.app(words)


def only(runs: Path) -> Path:
    (run_dir,) = (runs / "seqrec").iterdir()
    return run_dir


def newest(run_dir: Path) -> dict[str, Any]:
    return load_checkpoint(sorted((run_dir / "checkpoints").glob("step-*"))[-1])


def numbers(run_dir: Path, kind: str) -> dict[int, dict[str, float]]:
    """The values of each step's record, without what depends on the clock."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind]
    return {
        line["step"]: {
            k: v for k, v in line.items() if isinstance(v, float) and not k.startswith("time") and "_per_s" not in k
        }
        for line in lines
    }


def check_equal(run_dir: Path, expected: Path) -> None:
    """The same steps with the same losses, the same metrics, and nearly the same weights."""
    for kind, within in (("train", 1e-5), ("norm", 1e-4), ("valid", 1e-9)):
        found, wanted = numbers(run_dir, kind), numbers(expected, kind)
        assert found.keys() == wanted.keys()
        for step, values in wanted.items():
            assert found[step] == pytest.approx(values, abs=within), (kind, step)
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (run_dir, expected)]
    assert results[0]["metrics"] == results[1]["metrics"]
    ours, theirs = newest(run_dir), newest(expected)
    for part in ("model", "ema"):
        for name, value in theirs[part].items():
            if not name.endswith("qkv.bias"):  # a key's bias moves no output: nothing but rounding drives it
                assert float((ours[part][name] - value).abs().max()) < 1e-3, name
    assert not list(run_dir.rglob("*.tmp"))


class Runs:
    """One run by one process; one by two; one by two that lost a process and was resumed in different ways."""

    def __init__(self, folder: Path) -> None:
        sequences = cycling_sequences(NUM_USERS)
        rows = zip(sequences.user_of_event.tolist(), sequences.item.tolist(), strict=True)
        data = folder / "walk.txt"
        data.write_text("".join(f"{user + 1} {item}\n" for user, item in rows), encoding="utf-8")
        words = ["train", "--data-path", str(data), *FLAGS.split(), "--runs-dir"]

        alone([*words, str(folder / "one")])
        self.one = only(folder / "one")

        self.by_two = launch(["-m", "apps.seqrec", *words, str(folder / "two")])
        self.two = only(folder / "two")

        self.kill = launch([__file__, "1", str(KILLED_AT), "SIGKILL", *words, str(folder / "killed")])
        self.killed = only(folder / "killed")
        self.killed_step = newest(self.killed)["step"]
        self.resumed_by_one = folder / "resumed-by-one"
        shutil.copytree(self.killed, self.resumed_by_one)
        alone(["train", "--resume", str(self.resumed_by_one)])

        self.resumed_by_two = folder / "resumed-by-two"
        shutil.copytree(self.killed, self.resumed_by_two)
        again = ["train", "--resume", str(self.resumed_by_two)]
        self.stop = launch([__file__, "1", str(STOPPED_AT), "SIGTERM", *again])
        self.stopped_step = newest(self.resumed_by_two)["step"]
        self.last = launch(["-m", "apps.seqrec", *again], module="torch.distributed.launch")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("needs SIGKILL")
    return Runs(tmp_path_factory.mktemp("runs"))


def test_two_processes_train_and_measure_like_one(runs):
    assert runs.by_two.returncode == 0, runs.by_two.stderr
    assert len(numbers(runs.one, "train")) == 100
    check_equal(runs.two, runs.one)


def test_only_the_first_process_speaks_and_writes(runs):
    lines = runs.by_two.stdout.splitlines()
    assert sum("run folder:" in line for line in lines) == 1
    assert sum(line.startswith("epoch 10:") for line in lines) == 1
    assert "in 2 processes" in runs.by_two.stdout
    result = json.loads((runs.two / "result.json").read_text(encoding="utf-8"))
    assert result["notes"] == ["trained by 2 processes"]
    assert result["command"].startswith("torchrun --nproc-per-node 2 -m apps.seqrec train --data-path ")
    steps = [line["step"] for line in read_metrics(runs.two / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 101))


def test_a_run_that_lost_a_process_ends_with_the_command_that_goes_on(runs):
    assert runs.kill.returncode != 0
    (line,) = [line for line in runs.kill.stdout.splitlines() if "another process of this run ended" in line]
    assert line.endswith(f"with: torchrun --nproc-per-node 2 -m apps.seqrec train --resume {runs.killed}")
    assert line in (runs.killed / "train.log").read_text(encoding="utf-8").replace(" warning:", "\nwarning:")
    assert not (runs.killed / "result.json").exists()
    assert runs.killed_step == KILLED_AT - 3  # killed in step 33, before it was done; saved at 30, the end of an epoch


def test_one_process_goes_on_with_the_run_of_two(runs):
    check_equal(runs.resumed_by_one, runs.one)


def test_a_signal_to_one_process_stops_both_after_the_same_step(runs):
    assert runs.stop.returncode != 0
    assert runs.stopped_step == runs.killed_step + STOPPED_AT
    assert f"stopped at step {runs.stopped_step}; resume with: torchrun --nproc-per-node 2" in runs.stop.stdout


def test_two_processes_go_on_with_a_run_under_the_old_launcher(runs):
    assert runs.last.returncode == 0, runs.last.stderr
    check_equal(runs.resumed_by_two, runs.one)


def plant(rank: int, call: int, name: str) -> None:
    """Make the process of that rank send itself a signal at that call of amp_step."""
    original = shared.amp.amp_step
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    apps.seqrec.train.amp_step = counted  # type: ignore[attr-defined]


if __name__ == "__main__":
    plant(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    main.app(sys.argv[4:])
