"""The demo data is made from its arguments alone, is laid out as LightGCN's, and has paths worth following."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from apps.graphrec import demo as module
from apps.graphrec.dataset import Interactions
from apps.graphrec.demo import demo_data, write_demo
from apps.graphrec.formats import check_source, read_data
from shared.ranking import Lists

SMALL = {"num_users": 50, "num_items": 80, "seed": 3}
PARTS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def data() -> Interactions:
    return demo_data()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Interactions:
    """A small data set, which `write_demo` writes as well."""
    made = demo_data(**SMALL)
    monkeypatch.setattr(module, "demo_data", lambda: made)
    return made


def same(a: Interactions, b: Interactions) -> bool:
    return (a.item_ids, a.user_ids) == (b.item_ids, b.user_ids) and all(
        torch.equal(left, right)
        for name in PARTS
        for left, right in zip(getattr(a, name), getattr(b, name), strict=True)
    )


def dense(lists: Lists, num_items: int) -> Tensor:
    """Who has what, [U, I] bool."""
    length = lists.ptr.diff()
    met = torch.zeros(len(length), num_items, dtype=torch.bool)
    met[torch.repeat_interleave(torch.arange(len(length)), length), lists.item.long()] = True
    return met


def recall(score_UI: Tensor, data: Interactions, *, k: int = 20) -> float:
    """Mean share of a user's test items among the k best that it has not in training or validation."""
    seen_UI = dense(data.train, data.num_items) | dense(data.valid, data.num_items)
    test_UI = dense(data.test, data.num_items)
    best_Uk = score_UI.masked_fill(seen_UI, -torch.inf).topk(k).indices
    return float((test_UI.gather(1, best_Uk).sum(1) / test_UI.sum(1)).mean())


# The data


@pytest.mark.parametrize("other", [{"seed": 4}, {"num_users": 51}, {"num_items": 81}])
def test_demo_data_is_a_function_of_its_arguments(other: dict[str, int]):
    first = demo_data(**SMALL)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = demo_data(**SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    changed = demo_data(**{**SMALL, **other})
    assert changed.fingerprint != first.fingerprint
    assert not same(changed, first)


def test_demo_data_has_the_shape_of_sparse_real_data(data: Interactions):
    assert data.num_users == 3000
    assert 1400 <= data.num_items <= 1500
    per_user = torch.stack([getattr(data, name).ptr.diff() for name in PARTS]).sum(0)
    assert int(per_user.min()) == 4
    assert int(per_user.max()) <= 60
    assert 7 < float(per_user.double().mean()) < 11
    assert float(per_user.double().mean()) > 1.1 * float(per_user.median())  # a long tail
    assert data.item_ids == tuple(map(str, range(data.num_items)))
    assert data.user_ids == tuple(map(str, range(3000)))
    assert (data.content, data.is_cold) == ({}, None)


@pytest.mark.parametrize("arguments", [{}, SMALL])
def test_the_parts_share_nothing_and_nobody_lacks_one(arguments: dict[str, int]):
    made = demo_data(**arguments)
    parts = [dense(getattr(made, name), made.num_items) for name in PARTS]
    assert int(torch.stack(parts).sum(0).max()) == 1
    assert [int(part.sum(1).min()) for part in parts] == [2, 1, 1]
    assert sum(int(part.sum()) for part in parts) == sum(getattr(made, name).item.numel() for name in PARTS)
    for name in PARTS:
        lists = getattr(made, name)
        assert (lists.ptr.dtype, lists.item.dtype) == (torch.int64, torch.int32)
        starts = torch.zeros(lists.item.numel(), dtype=torch.bool).index_fill_(0, lists.ptr[:-1], True)
        assert bool(((lists.item.diff() > 0) | starts[1:]).all())
    assert bool(torch.stack(parts).any(0).any(0).all())  # every item was met


def test_longer_paths_tell_more_than_vectors_of_pairs_and_popularity_tells_little(data: Interactions):
    met_UI = dense(data.train, data.num_items).float()
    count_U1, count_I = met_UI.sum(1, keepdim=True), met_UI.sum(0)
    popular = recall(count_I.expand_as(met_UI), data)
    # what the best factors of this rank remember of the pairs themselves
    torch.manual_seed(0)
    factors_ID = torch.svd_lowrank(met_UI, q=64, niter=2)[2]
    factorised = recall(met_UI @ factors_ID @ factors_ID.T, data)
    step_UI = met_UI / count_U1.sqrt() / count_I.clamp(min=1).sqrt()
    step_II = step_UI.T @ step_UI
    three_steps = step_UI @ step_II
    seven_steps = three_steps @ step_II @ step_II
    assert popular < 0.08
    assert recall(three_steps, data) > 3 * popular
    assert recall(seven_steps, data) > 1.2 * recall(three_steps, data)
    assert recall(seven_steps, data) > 1.1 * factorised
    assert recall(seven_steps, data) < 0.6  # noise


@pytest.mark.parametrize("arguments", [{"num_users": 0}, {"num_items": 59}])
def test_demo_data_that_would_hold_nothing_is_refused(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="is too small; take at least 1 user and 60 items"):
        demo_data(**{**SMALL, **arguments})


# The files


def test_the_files_hold_exactly_the_demo_data(tmp_path: Path, small: Interactions):
    folder = write_demo(tmp_path / "new" / "folder")
    assert folder == tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["test.txt", "train.txt", "valid.txt"]
    found = read_data(folder)
    assert same(found, small)
    assert found.split == small.split
    assert (folder / "train.txt").read_text().splitlines()[0].split()[0] == "0"


def test_the_files_of_the_whole_demo_have_no_fault(tmp_path: Path, data: Interactions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "demo_data", lambda: data)
    folder = write_demo(tmp_path)
    assert check_source(folder) == []
    assert same(read_data(folder), data)


def test_equal_files_are_left_alone_and_others_replaced(tmp_path: Path, small: Interactions):
    folder = write_demo(tmp_path)
    files = sorted(folder.iterdir())
    written = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    content = [path.read_bytes() for path in files]
    write_demo(tmp_path)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == written
    files[0].write_bytes(content[0][:-1])
    files[1].unlink()
    write_demo(tmp_path)
    assert [path.read_bytes() for path in files] == content
    assert (files[2].stat().st_ino, files[2].stat().st_mtime_ns) == written[2]
