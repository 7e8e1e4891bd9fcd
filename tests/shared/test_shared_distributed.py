"""Processes that train together: what they exchange, that one step of theirs is one step, and that a loss is noticed.

Run by torchrun, this file is one of two processes: it writes what it saw to rank-N.json in the folder it is given.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from shared import distributed
from shared.amp import AmpConfig, TrainState, amp_step, make_state
from shared.distributed import Group, LostPeerError

ROOT = Path(__file__).parents[2]
WORDS = "Stra\u00dfe \u20ac \udcff"  # the last is a byte of a file name that is no text


def metric_parts() -> list[dict[str, torch.Tensor]]:
    """Two processes' sums: multiples of 2 ** -36, whose sum has no rounding."""
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(0, 2**50, (2, 3), generator=generator).double() / 2**36
    return [dict(zip(("users", "HR", "NDCG"), row.unbind(), strict=True)) for row in numbers]


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x, y = batch
    error = model(x) - y
    return error.square().mean(), {"mean": error.mean()}


def one_step(part: slice, group: Group | None, *, scale: float = 1.0) -> tuple[TrainState, dict[str, Any]]:
    """A clipped step on rows of the same ten, each row with the same weight whoever computes it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    x, y = torch.randn(10, 4), torch.randn(10, 2)
    state = make_state(
        model, [torch.optim.SGD(model.parameters(), lr=1.0)], precision="fp32", device=torch.device("cpu")
    )
    state, output = amp_step(
        state,
        [(x[part] * scale, y[part])],
        squared,
        amp=AmpConfig(clip_norm=0.5),
        shares=[len(x[part]) / len(x)],
        reduce=None if group is None else lambda tensors: distributed.sum_(group, tensors),
    )
    assert output.grad_norm is not None
    return state, {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "loss": float(output.loss),
        "mean": float(output.scalars["mean"]),
        "norm": float(output.grad_norm),
        "bad": int(state.first_bad_step),
    }


def process(folder: Path) -> None:
    """What each of the two processes does; the second then kills itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the first once the second is dead
    group = distributed.join("cpu")
    assert group is not None
    rank = group.rank
    seen: dict[str, Any] = {"place": distributed.place(group), "device": str(group.device)}
    tensors = [torch.full((2, 3), 1.0 + rank).T, torch.tensor(0.1 * (1 + rank)), torch.tensor([rank == 1]).float()]
    distributed.sum_(group, tensors)
    seen["sum"] = [tensor.tolist() for tensor in tensors]
    seen["any"] = [distributed.any_of(group, False), distributed.any_of(group, rank == 1)]
    seen["added"] = {n: float(v) for n, v in distributed.added_up(group, metric_parts()[rank]).items()}
    seen["text"] = [ascii(distributed.text_of_first(group, text if rank == 0 else "mine")) for text in (WORDS, "")]
    seen["same"] = [distributed.same_everywhere(group, "a"), distributed.same_everywhere(group, f"a{rank}")]
    with distributed.first_before_others(group):
        seen["first"] = (folder / "first").exists()
        (folder / "first").touch()
    seen["step"] = one_step(slice(0, 3) if rank == 0 else slice(3, 10), group)[1]
    seen["broken step"] = one_step(
        slice(0, 3) if rank == 0 else slice(3, 10), group, scale=float("inf") if rank == 1 else 1.0
    )[1]["bad"]
    if rank == 0:
        try:
            distributed.any_of(group, False)
        except LostPeerError as error:
            seen["lost"] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes saw."""
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("needs SIGKILL")
    folder = tmp_path_factory.mktemp("ranks")
    found = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(__file__, str(folder)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode != 0
    paths = [folder / "rank-0.json", folder / "rank-1.json"]
    assert all(path.is_file() for path in paths), found.stderr
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_each_process_knows_its_place(ranks):
    assert [seen["place"] for seen in ranks] == [[0, 2], [1, 2]]
    assert [seen["device"] for seen in ranks] == ["cpu", "cpu"]


def test_tensors_of_any_shape_are_replaced_by_their_sums(ranks):
    block, scalar, single = ranks[0]["sum"]
    assert block == [[3.0, 3.0]] * 3
    assert scalar == pytest.approx(0.3)
    assert single == [1.0]
    assert ranks[1]["sum"] == ranks[0]["sum"]  # to the last bit


def test_a_flag_of_one_process_is_seen_by_all(ranks):
    assert [seen["any"] for seen in ranks] == [[False, True]] * 2


def test_metric_sums_are_added_without_rounding(ranks):
    first, second = metric_parts()
    total = {name: int(first[name] * 2**36) + int(second[name] * 2**36) for name in first}
    for seen in ranks:
        assert {name: int(value * 2**36) for name, value in seen["added"].items()} == total
        assert list(seen["added"]) == list(first)


def test_every_process_gets_the_text_of_the_first(ranks):
    assert [seen["text"] for seen in ranks] == [[ascii(WORDS), "''"]] * 2


def test_a_difference_is_noticed_everywhere(ranks):
    assert [seen["same"] for seen in ranks] == [[True, False]] * 2


def test_the_others_find_what_the_first_process_wrote(ranks):
    assert [seen["first"] for seen in ranks] == [False, True]


def test_a_step_of_two_processes_is_the_step_of_one(ranks):
    _, whole = one_step(slice(0, 10), None)
    assert ranks[0]["step"] == ranks[1]["step"]
    assert ranks[0]["step"]["weights"] == pytest.approx(whole["weights"], abs=1e-6)
    assert whole["norm"] > 0.5  # it was clipped
    for name in ("loss", "mean", "norm"):
        assert ranks[0]["step"][name] == pytest.approx(whole[name], abs=1e-6)


def test_a_loss_that_broke_in_one_process_is_broken_in_all(ranks):
    assert [seen["step"]["bad"] for seen in ranks] == [-1, -1]
    assert [seen["broken step"] for seen in ranks] == [1, 1]


def test_a_killed_process_is_noticed_at_the_next_exchange(ranks):
    words = ranks[0]["lost"]
    assert words.startswith("another process of this run ended or does not answer (")
    assert words.isascii()
    assert "\n" not in words
    assert "gloo" not in words


def test_without_torchrun_there_is_no_group_and_nothing_is_started(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.join("cpu") is None
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a cluster that names its machines so: no launcher, no group
    assert distributed.join("cpu") is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed.join("cpu") is None
    assert not dist.is_initialized()


def test_without_a_group_everything_is_given_back():
    tensor = torch.tensor([1.0, 2.0])
    distributed.sum_(None, [tensor])
    assert tensor.tolist() == [1.0, 2.0]
    assert distributed.place(None) == (0, 1)
    assert distributed.any_of(None, True) is True
    assert distributed.any_of(None, False) is False
    assert distributed.added_up(None, {"users": tensor}) == {"users": tensor}
    assert distributed.text_of_first(None, "text") == "text"
    assert distributed.same_everywhere(None, "text")
    with distributed.first_before_others(None):
        distributed.wait_for_all(None)
    distributed.leave(None)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:0", "device 'cuda:0' is one GPU for several processes; use cuda"),
        ("cuda", "1 GPU.* use torchrun --nproc-per-node 1, or --device cpu"),
        ("auto", "1 GPU.* use torchrun --nproc-per-node 1, or --device cpu"),
    ],
)
def test_a_device_that_the_processes_cannot_share_is_refused(device, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=words):
        distributed.join(device)
    assert not dist.is_initialized()


if __name__ == "__main__":
    process(Path(sys.argv[1]))
