"""Checkpoints come back to the last bit or not at all: damage, crashes, retention, identity, foreign weights."""

import contextlib
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from shared.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    MismatchError,
    check_identity,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_best,
    save_checkpoint,
    save_step,
    save_weights,
)
from shared.files import write_safetensors


def assert_equal(found: Any, expected: Any, where: str = "tree") -> None:
    """Equal in type and value to the last bit; every mapping comes back as a dict in its order."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        mine, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
        assert torch.equal(mine, theirs), where
    elif isinstance(expected, dict | OrderedDict):
        assert type(found) is dict, where
        assert list(map(repr, found)) == list(map(repr, expected)), where
        for a, b in zip(found.items(), expected.items(), strict=True):
            assert_equal(a[1], b[1], f"{where}.{b[0]}")
    elif isinstance(expected, list | tuple):
        assert type(found) is (tuple if isinstance(expected, tuple) else list), where
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_equal(a, b, f"{where}.{i}")
    elif isinstance(expected, float):
        assert type(found) is float, where
        assert (math.isnan(found) and math.isnan(expected)) or (found == expected and repr(found) == repr(expected)), (
            where
        )
    else:
        assert type(found) is type(expected), where
        assert found == expected, where


def is_equal(found: Any, expected: Any) -> bool:
    try:
        assert_equal(found, expected)
    except AssertionError:
        return False
    return True


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.output = nn.Linear(4, 7, bias=True)
        self.output.weight = self.embedding.weight

    def forward(self, ids_B: torch.Tensor) -> torch.Tensor:
        logits_BI: torch.Tensor = self.output(self.norm(self.embedding(ids_B)))
        return logits_BI


def trained() -> tuple[Tied, torch.optim.AdamW]:
    torch.manual_seed(1)
    model = Tied()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2, betas=(0.9, 0.98), fused=True)
    step(model, optimizer, 3)
    return model, optimizer


def step(model: Tied, optimizer: torch.optim.AdamW, count: int) -> None:
    for i in range(count):
        ids_B = torch.arange(6) + i % 2
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids_B), ids_B).backward()
        optimizer.step()


def training_tree() -> dict[str, Any]:
    model, optimizer = trained()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": random.Random(3).getstate()},
        "config": {"app": "seqrec", "lr": 1e-2, "names": ["a", "b"], "empty": {}, "nothing": None, "flag": True},
        "step": 3,
        "best": -math.inf,
        "history": [(1, 0.25), (2, math.nan), (3, -0.0)],
    }


# Round trips


def test_training_state_comes_back_to_the_last_bit(tmp_path):
    tree = training_tree()
    save_checkpoint(tmp_path / "c.safetensors", tree)
    assert_equal(load_checkpoint(tmp_path / "c.safetensors"), tree)


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "c.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    step(model, optimizer, 4)
    resumed, other = trained()
    step(resumed, other, 2)  # somewhere else, so that loading has to bring it back
    found = load_checkpoint(tmp_path / "c.safetensors")
    resumed.load_state_dict(found["model"])
    other.load_state_dict(found["optimizer"])
    step(resumed, other, 4)
    assert_equal(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_equal(other.state_dict(), optimizer.state_dict())


TREES: dict[str, dict[str, Any]] = {
    "empty": {},
    "plain": {"a": None, "b": True, "c": 0, "d": -1.5, "e": 'text \u00e4 \U0001f600 \x00 \\ " \n', "f": 2**80, "g": ""},
    "floats": {"x": [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e308, 1.0]},
    "nested": {"a": [[], {}, (), [()], ({},), {"b": {"c": [1, (2, [3])]}}]},
    "int keys": {"state": {0: {"step": 1}, 5: [2], -1: None}},
    "odd keys": {"x": {1: "int", "1": "str", False: "bool", None: 0, (1, "a"): 2, 1.5: 3, math.inf: 4, ((), (2,)): 5}},
    "keys like tags": {"$tensor": "model", "x": {"$tuple": [1]}, "y": {"$items": 3, "z": 1}, "w": [{"$float": "nan"}]},
    "tensors": {
        "bf16": torch.tensor([1.5, -0.0, math.nan]).bfloat16(),
        "half": torch.tensor(2.5).half(),
        "bool": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(3, 0, dtype=torch.int64),
        "scalar": torch.tensor(7),
        "complex": torch.tensor([1 + 2j]),
        "nan payload": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
    },
    "tensors anywhere": {
        "l": [torch.ones(1), (torch.zeros(2), {"k": torch.arange(3)})],
        "int": {3: torch.tensor(1)},
        "t": (torch.ones(1),),
    },
    "names that collide": {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "a.b~2": torch.tensor(3),
        "": torch.tensor(4),
    },
    "reserved names": {"__metadata__": torch.tensor(1), "weights": {"__metadata__": torch.tensor(2)}, "pack": "x"},
}


@pytest.mark.parametrize("name", TREES)
def test_trees_of_every_shape_come_back(tmp_path, name):
    save_checkpoint(tmp_path / "c.safetensors", TREES[name])
    assert_equal(load_checkpoint(tmp_path / "c.safetensors"), TREES[name])


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    weight = nn.Parameter(torch.randn(100, 50))
    tree = {
        "a": weight,
        "b": weight,
        "state": nn.ParameterDict({"w": weight}).state_dict(),
        "part": weight[:10],
        "t": weight.T,
    }
    save_checkpoint(tmp_path / "c.safetensors", tree)
    found = load_checkpoint(tmp_path / "c.safetensors")
    assert_equal(found, tree)
    assert found["a"] is found["b"] is found["state"]["w"]
    size = (tmp_path / "c.safetensors").stat().st_size
    assert 2.1 * weight.nbytes < size < 2.1 * weight.nbytes + 2000  # once, a tenth, and once transposed


def test_equal_but_separate_tensors_and_conjugates_stay_separate(tmp_path):
    values = torch.tensor([1 + 2j, 3 - 1j])
    tree = {
        "a": torch.ones(2),
        "b": torch.ones(2),
        "z": values,
        "conjugate": values.conj(),
        "e": torch.empty(0),
        "f": torch.empty(0),
    }
    save_checkpoint(tmp_path / "c.safetensors", tree)
    found = load_checkpoint(tmp_path / "c.safetensors")
    assert found["a"] is not found["b"]
    assert torch.equal(found["conjugate"], values.conj())
    assert torch.equal(found["z"], values)


def test_tensors_stand_under_dotted_names_beside_format_and_torch_version(tmp_path):
    save_checkpoint(tmp_path / "c.safetensors", {"model": {"block.0.weight": torch.ones(2)}, "step": 5})
    data = (tmp_path / "c.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) == {"__metadata__", "model.block.0.weight"}
    document = json.loads(header["__metadata__"]["pack"])
    assert document["format"] == 1
    assert document["meta"]["torch"] == torch.__version__
    assert document["meta"]["tree"]["step"] == 5


def test_loaded_tensors_do_not_hold_the_file(tmp_path):
    path = tmp_path / "held.safetensors"
    save_checkpoint(path, {"x": torch.zeros(1000)})
    found = load_checkpoint(path)
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()
    save_checkpoint(path, {"x": torch.ones(1000)})
    assert torch.equal(found["x"], torch.zeros(1000))


class Pair(NamedTuple):
    x: int


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        b"bytes",
        Path("x"),
        torch.float32,
        object(),
        Pair(1),
        1j,
        torch.eye(2).to_sparse(),
        torch.ones(1, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_stored_is_named_by_its_place_and_nothing_is_written(tmp_path, value):
    with pytest.raises(
        CheckpointError, match=r"^config\.inner\.1: .* stored|^config\.inner\.1: a checkpoint cannot hold"
    ):
        save_checkpoint(tmp_path / "c.safetensors", {"config": {"inner": [0, value]}})
    assert not list(tmp_path.iterdir())


# Damage


def loaded_or_fault(path: Path) -> dict[str, Any] | str:
    """The tree, or the message of the one error that damage may raise."""
    try:
        return load_checkpoint(path)
    except DamagedCheckpointError as error:
        return str(error)


def test_every_flip_in_a_small_file_is_refused_or_changes_nothing(tmp_path):
    tree = {"model": {"w": torch.arange(3, dtype=torch.int16)}, "t": (1, math.nan), "k": {2: "x"}}
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, tree)
    data = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        found = loaded_or_fault(path)
        assert isinstance(found, str) or is_equal(found, tree), position
        assert not isinstance(found, str) or "c.safetensors" in found


def damaged_at_100_places(data: bytes, kind: str) -> list[bytes]:
    """The file cut, or with one bit flipped, at 100 places from its first byte to its last."""
    rng = random.Random(7)
    places = [i * (len(data) - 1) // 99 for i in range(100)]
    if kind == "cut":
        return [data[:place] for place in places]
    flipped = []
    for place in places:
        other = bytearray(data)
        other[place] ^= 1 << rng.randrange(8)
        flipped.append(bytes(other))
    return flipped


@pytest.mark.parametrize("kind", ["cut", "flipped"])
def test_a_training_checkpoint_damaged_at_100_places_is_never_loaded_wrongly(tmp_path, kind):
    tree = training_tree()
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, tree)
    faults = []
    for contents in damaged_at_100_places(path.read_bytes(), kind):
        path.write_bytes(contents)
        found = loaded_or_fault(path)
        if isinstance(found, str):
            faults.append(found)
        else:
            assert is_equal(found, tree)
    assert len(faults) >= 99
    assert all("c.safetensors" in fault and "write it again" in fault for fault in faults)


def test_other_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "c.safetensors"
    write_safetensors(path, {"x": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="not one of ours"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(DamagedCheckpointError, match=r"c\.safetensors"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "absent.safetensors")


def test_saving_survives_two_permission_errors(tmp_path, monkeypatch):
    failures = [PermissionError(13, "held"), PermissionError(13, "held")]
    real = os.replace

    def held_twice(src, dst):
        if failures:
            raise failures.pop()
        real(src, dst)

    monkeypatch.setattr(os, "replace", held_twice)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path = save_step(tmp_path, {"x": torch.ones(1)}, step=1, keep=1)
    assert not failures
    assert_equal(load_checkpoint(path), {"x": torch.ones(1)})


# A folder of checkpoints


def no_warning(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}.safetensors" for number in numbers]


def test_the_newest_steps_are_kept_and_the_best_one_too(tmp_path):
    folder = tmp_path / "checkpoints"
    for number in (5, 10, 15, 20, 25):
        path = save_step(folder, {"step": number}, step=number, keep=2)
        assert path == folder / f"step-{number:08d}.safetensors"
    assert names(folder) == steps(20, 25)
    save_best(folder, {"step": 15})
    save_step(folder, {"step": 30}, step=30, keep=1)
    assert names(folder) == ["best.safetensors", *steps(30)]


def test_later_steps_of_a_run_that_went_further_are_not_deleted(tmp_path):
    for number in (10, 20, 90):
        save_step(tmp_path, {"step": number}, step=number, keep=9)
    save_step(tmp_path, {"step": 30}, step=30, keep=1)
    assert names(tmp_path) == steps(30, 90)


def test_other_files_and_living_temporaries_survive_pruning(tmp_path):
    for name in ("notes.txt", "step-1.safetensors", "step-00000001.safetensors.bak", f".x.{os.getppid()}.tmp"):
        (tmp_path / name).touch()
    before = names(tmp_path)
    save_step(tmp_path, {}, step=2, keep=1)
    assert names(tmp_path) == sorted([*before, *steps(2)])


@pytest.mark.parametrize(("step", "keep"), [(1, 0), (-1, 1)])
def test_impossible_retention_is_refused_before_anything_is_written(tmp_path, step, keep):
    with pytest.raises(ValueError, match=r"keep 0|step -1"):
        save_step(tmp_path / "new", {}, step=step, keep=keep)
    assert not (tmp_path / "new").exists()


def test_newest_is_the_highest_step_and_none_without_checkpoints(tmp_path):
    assert newest_checkpoint(tmp_path / "absent", warn=no_warning) is None
    assert newest_checkpoint(tmp_path, warn=no_warning) is None
    for number in (9, 100_000_000, 10):
        save_step(tmp_path, {"step": number}, step=number, keep=9)
    save_best(tmp_path, {"step": 5})
    found = newest_checkpoint(tmp_path, warn=no_warning)
    assert found == (tmp_path / "step-100000000.safetensors", {"step": 100_000_000})


@pytest.mark.parametrize(
    ("best", "file"),
    [
        ({"step": 9}, "best.safetensors"),  # killed between the two saves of step 9
        ({"step": 8, "from": "best"}, steps(8)[0]),
        ({"step": 7}, steps(8)[0]),
        ({}, steps(8)[0]),
        ({"step": 9.0}, steps(8)[0]),
        ({"step": True}, steps(8)[0]),
    ],
)
def test_the_best_one_is_taken_where_its_step_is_the_highest(tmp_path, best, file):
    for number in (4, 8):
        save_step(tmp_path, {"step": number}, step=number, keep=9)
    save_best(tmp_path, best)
    expected = best if file == "best.safetensors" else {"step": 8}
    assert newest_checkpoint(tmp_path, warn=no_warning) == (tmp_path / file, expected)


def test_the_best_one_is_used_before_an_older_step_when_the_newest_is_damaged(tmp_path):
    for number in (4, 8):
        save_step(tmp_path, {"step": number}, step=number, keep=9)
    save_best(tmp_path, {"step": 6})
    (tmp_path / steps(8)[0]).write_bytes(b"")
    warned: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warned.append) == (tmp_path / "best.safetensors", {"step": 6})
    assert len(warned) == 1
    assert warned[0].endswith("Going back to best.safetensors")


def test_a_damaged_best_one_is_named_even_where_a_step_is_used(tmp_path):
    save_step(tmp_path, {"step": 7}, step=7, keep=1)
    data = bytearray(save_best(tmp_path, {"step": 4, "x": torch.ones(9)}).read_bytes())
    data[-1] ^= 1
    (tmp_path / "best.safetensors").write_bytes(data)
    warned: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warned.append) == (tmp_path / steps(7)[0], {"step": 7})
    assert len(warned) == 1
    assert "best.safetensors" in warned[0]
    assert warned[0].endswith("Going on without it")


def test_damaged_ones_are_named_and_the_previous_good_one_is_used(tmp_path):
    for number in (1, 2, 3, 4):
        save_step(tmp_path, {"step": number}, step=number, keep=9)
    (tmp_path / steps(4)[0]).write_bytes(b"")
    data = bytearray((tmp_path / steps(3)[0]).read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / steps(3)[0]).write_bytes(data)
    warned: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warned.append) == (tmp_path / steps(2)[0], {"step": 2})
    assert [steps(4)[0] in warned[0], f"Going back to {steps(3)[0]}" in warned[0]] == [True, True]
    assert [steps(3)[0] in warned[1], f"Going back to {steps(2)[0]}" in warned[1]] == [True, True]
    assert len(warned) == 2


@pytest.mark.parametrize("best", [{"step": 4}, {}])
def test_the_best_one_is_the_last_resort(tmp_path, best):
    save_step(tmp_path, {"step": 7}, step=7, keep=1)
    save_best(tmp_path, best)
    (tmp_path / steps(7)[0]).write_bytes(b"\0" * 100)
    warned: list[str] = []
    assert newest_checkpoint(tmp_path, warn=warned.append) == (tmp_path / "best.safetensors", best)
    assert len(warned) == 1
    assert warned[0].endswith("Going back to best.safetensors")


def test_when_none_can_be_read_all_are_named(tmp_path):
    for name in [*steps(1, 2), "best.safetensors"]:
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(DamagedCheckpointError) as caught:
        newest_checkpoint(tmp_path, warn=lambda text: None)
    assert all(name in str(caught.value) for name in [*steps(1, 2), "best.safetensors"])


WRITER = """
import os, sys
import torch
from shared.checkpoint import save_step
torch.set_num_threads(1)
for start in (1000, 2000, 3000):  # one import of torch for all rounds
    sys.stdin.readline()
    pid = os.fork()
    step = start
    while pid == 0:
        step += 1
        value = torch.full((50_000,), float(step))
        save_step(sys.argv[1], {"x": value, "again": [value + 1], "step": step}, step=step, keep=2)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.001)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_writer_killed_at_any_moment_leaves_a_whole_newest_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-W", "ignore", "-c", WRITER, str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for start in (1000, 2000, 3000):
            server.stdin.write("go\n")
            server.stdin.flush()
            writer = int(server.stdout.readline())
            last = start + 3 + start // 1000
            try:
                wait_for(folder / f"step-{last:08d}.safetensors")
            finally:
                os.kill(writer, signal.SIGKILL)
            assert server.stdout.readline() == "gone\n"
            found = newest_checkpoint(folder, warn=no_warning)
            assert found is not None
            path, tree = found
            assert tree["step"] >= last
            assert path.name == f"step-{tree['step']:08d}.safetensors"
            assert torch.equal(tree["x"], torch.full((50_000,), float(tree["step"])))
            assert torch.equal(tree["again"][0], tree["x"] + 1)
    save_step(folder, {}, step=9999, keep=1)
    assert names(folder) == steps(9999)  # what the killed ones left in the middle of writing is gone too


# Identity

FOUND = {
    "app": "seqrec",
    "data": {"fingerprint": "abc", "path": "x"},
    "model": {"dim": 64, "sizes": (1, 2), "p": math.nan},
}


def test_the_same_identity_passes_and_lists_equal_tuples(tmp_path):
    same = {
        "app": "seqrec",
        "data": {"path": "x", "fingerprint": "abc"},
        "model": {"dim": 64, "sizes": [1, 2], "p": math.nan},
    }
    check_identity(FOUND, same, path="c")


def test_every_differing_key_is_listed_with_both_values():
    expected = {
        "app": "reid",
        "data": {"fingerprint": "abd", "path": "x"},
        "model": {"dim": "64", "sizes": (1, 3), "extra": {}},
    }
    with pytest.raises(MismatchError) as caught:
        check_identity(FOUND, expected, path="runs/c.safetensors")
    message = str(caught.value)
    assert message.startswith("runs/c.safetensors: ")
    assert "\n  app: 'seqrec' in the checkpoint, 'reid' now\n" in message
    assert "\n  data.fingerprint: 'abc' in the checkpoint, 'abd' now\n" in message
    assert "\n  model.dim: 64 in the checkpoint, '64' now\n" in message
    assert "\n  model.sizes: [1, 2] in the checkpoint, [1, 3] now\n" in message
    assert "\n  model.p: nan in the checkpoint, (absent) now\n" in message
    assert "\n  model.extra: (absent) in the checkpoint, {} now\n" in message
    assert "data.path" not in message
    assert "start a new run" in message


def test_ignored_keys_exempt_themselves_and_what_is_below():
    expected = {"app": "seqrec", "data": {"fingerprint": "other"}, "model": {**FOUND["model"], "dim": 65}}  # type: ignore[dict-item]
    check_identity(FOUND, expected, path="c", ignore=["data", "model.dim"])
    with pytest.raises(MismatchError, match=r"model\.dim"):
        check_identity(FOUND, expected, path="c", ignore=["data", "model.di", "mode"])


# Weights alone


def test_weights_come_back_with_their_meta_and_have_plain_names_for_others(tmp_path):
    model, _ = trained()
    meta = {"config": {"dim": 4}, "metrics": [0.5, None], "note": "x"}
    save_weights(tmp_path / "w.safetensors", model.state_dict(), meta)
    state, found = load_weights(tmp_path / "w.safetensors")
    assert_equal(state, dict(model.state_dict()))
    assert found == meta
    data = (tmp_path / "w.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header) - {"__metadata__"} == set(model.state_dict()) - {"output.weight"}  # tied to the embedding


def test_a_whole_checkpoint_gives_its_averaged_weights_else_its_model(tmp_path):
    path = tmp_path / "c.safetensors"
    tree = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "optimizer": {"m": torch.ones(1)}, "step": 3}
    save_checkpoint(path, tree)
    state, meta = load_weights(path)
    assert_equal(state, {"w": torch.zeros(2)})
    assert meta == {"step": 3}
    for absent in (None, dict[str, Any]()):
        save_checkpoint(path, {**tree, "ema": absent})
        assert_equal(load_weights(path)[0], {"w": torch.ones(2)})


def test_safetensors_of_another_program_are_read(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(
        path, {"module._orig_mod.a.weight": torch.ones(2), "module._orig_mod.b": torch.zeros(1)}, {"format": "pt"}
    )
    state, meta = load_weights(path)
    assert_equal({name: state[name] for name in sorted(state)}, {"a.weight": torch.ones(2), "b": torch.zeros(1)})
    assert meta == {"format": "pt"}


def test_damaged_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"w": torch.ones(2)}, {})
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(DamagedCheckpointError, match="checksum"):
        load_weights(path)
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"w\.safetensors"):
        load_weights(path)


STATE = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_old_torch_files_are_read_from_every_place(tmp_path, suffix, key, prefix):
    state: Any = OrderedDict((prefix + name, tensor) for name, tensor in STATE.items())
    path = tmp_path / f"old{suffix}"
    torch.save(state if key is None else {"epoch": 3, "optimizer": {"m": torch.ones(1)}, key: state}, path)
    found, meta = load_weights(path)
    assert_equal(found, STATE)
    assert meta == ({} if key is None else {"epoch": 3})


def test_only_wrappers_are_stripped_from_names(tmp_path):
    state = {
        "module.a": torch.ones(1),
        "head.module.b": torch.ones(2),
        "blocks.0._orig_mod.w": torch.ones(3),
        "x_orig_mod.y": torch.ones(4),
    }
    torch.save(state, tmp_path / "old.pt")
    assert list(load_weights(tmp_path / "old.pt")[0]) == ["module.a", "head.module.b", "blocks.0.w", "x_orig_mod.y"]
    torch.save({"w": torch.ones(1), "_orig_mod.w": torch.zeros(1)}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="same name"):
        load_weights(tmp_path / "old.pt")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["zip", "zip, nested", "plain pickle", "plain pickle, protocol 4"])
def test_hostile_torch_file_is_refused_with_what_it_wants_and_runs_nothing(tmp_path, place):
    canary = tmp_path / "canary"
    path = tmp_path / "bad.pt"
    match place:
        case "zip":
            torch.save(Attack(canary), path)
        case "zip, nested":
            torch.save({"model": STATE, "epoch": Attack(canary)}, path)
        case "plain pickle":
            path.write_bytes(pickle.dumps({"model": Attack(canary)}, 2))
        case "plain pickle, protocol 4":
            path.write_bytes(pickle.dumps({"model": Attack(canary)}, 4))
    with pytest.raises(CheckpointError, match=r"bad\.pt: (refused: the file wants|not readable as tensors)") as caught:
        load_weights(path)
    assert f"{os.mkdir.__module__}.mkdir" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "a program you trust" in str(caught.value)
    assert not canary.exists()
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):  # of a plain pickle torch complains afterwards
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert canary.is_dir()  # the file was dangerous indeed


def test_whole_modules_and_arrays_in_torch_files_are_refused_by_name(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"refused: the file wants torch\.nn\.modules\.linear\.Linear"):
        load_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("contents", [b"", b"abc", b"PK\x03\x04" + bytes(60), b"\x80\x02.", b"}q\x00."], ids=repr)
def test_files_that_are_no_torch_files_are_refused(tmp_path, contents):
    (tmp_path / "x.pt").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"x\.pt: not readable as tensors") as caught:
        load_weights(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)


def test_torch_file_damaged_anywhere_loads_or_is_refused(tmp_path):
    torch.save({"model": STATE}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for contents in damaged_at_100_places(data, "cut") + damaged_at_100_places(data, "flipped"):
        (tmp_path / "x.pt").write_bytes(contents)
        try:
            state, _ = load_weights(tmp_path / "x.pt")
        except CheckpointError:
            continue
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def test_files_without_a_state_say_what_they_hold(tmp_path):
    torch.save({"epoch": 3, "net": STATE}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no model state found.* it holds epoch, net"):
        load_weights(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no model state found.* it holds a list"):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pt and \.pth files, not from '\.npz'"):
        load_weights(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "absent.pt")
