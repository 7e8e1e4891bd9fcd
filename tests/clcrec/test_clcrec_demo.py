"""The demo data is made from its arguments alone, is laid out as the original's, and is worth learning from content."""

import pickle
import pickletools
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apps.clcrec import demo as module
from apps.clcrec.dataset import MODALITIES, ColdStart
from apps.clcrec.demo import demo_data, write_demo
from apps.clcrec.formats import check_source, read_data
from shared.files import atomic_write_bytes
from shared.pickles import describe_pickle, load_npy
from shared.ranking import Lists

SMALL = {"num_users": 60, "num_warm": 40, "num_cold": 12, "seed": 3}
TENSORS = ("user", "item", "known.ptr", "known.item", "valid.ptr", "valid.item", "test.ptr", "test.item")
SPLITS = [f"{stage}_{group}.npy" for stage in ("val", "test") for group in ("full", "warm", "cold")]
PLAIN = ["train.npy", "warm_set.npy", "cold_set.npy", "feat_v.npy", "feat_a.npy", "feat_t.npy"]
DICTIONARIES = ["user_item_train_dict.npy", "user_item_all_dict.npy"]


@pytest.fixture(scope="module")
def data() -> ColdStart:
    return demo_data()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ColdStart:
    """A small data set, which `write_demo` writes as well."""
    made = demo_data(**SMALL)
    monkeypatch.setattr(module, "demo_data", lambda: made)
    return made


@pytest.fixture
def folder(tmp_path: Path, small: ColdStart) -> Path:
    return write_demo(tmp_path / "new" / "folder")


def tensors_of(data: ColdStart) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in TENSORS:
        value: Any = data
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found | {f"feat_{modality}": tensor for modality, tensor in data.content.items()}


def same(a: ColdStart, b: ColdStart) -> bool:
    """Equal in types, shapes and every value."""
    left, right = tensors_of(a), tensors_of(b)
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def sets_of(lists: Lists) -> list[set[int]]:
    ptr, item = lists.ptr.tolist(), lists.item.tolist()
    return [set(item[begin:end]) for begin, end in pairwise(ptr)]


def trained_on(data: ColdStart) -> list[set[int]]:
    items: list[set[int]] = [set() for _ in range(data.num_users)]
    for user, item in zip(data.user.tolist(), data.item.tolist(), strict=True):
        items[user].add(item)
    return items


# The data


@pytest.mark.parametrize("other", [{"seed": 4}, {"num_users": 61}, {"num_warm": 41}, {"num_cold": 13}])
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


def test_types_and_shapes_are_those_that_the_app_expects(data: ColdStart):
    assert (data.num_users, data.num_warm, data.num_items) == (1500, 600, 750)
    assert 20_000 < data.num_pairs < 40_000
    assert data.user.shape == data.item.shape
    assert {data.user.dtype, data.item.dtype} == {torch.int32}
    for lists in (data.known, data.valid, data.test):
        assert (lists.ptr.dtype, lists.item.dtype) == (torch.int64, torch.int32)
        assert len(lists.ptr) == data.num_users + 1
    assert {m: tuple(x.shape) for m, x in data.content.items()} == {"v": (750, 32), "a": (750, 16), "t": (750, 24)}
    assert {x.dtype for x in data.content.values()} == {torch.float32}
    assert data.modalities == MODALITIES
    assert data.words is None
    assert data.item_ids == tuple(str(i) for i in range(1500, 2250))
    assert data.user_ids == tuple(str(u) for u in range(1500))


@pytest.mark.parametrize("arguments", [{}, {"seed": 8}, SMALL, {"num_users": 300, "num_warm": 2, "num_cold": 60}])
def test_training_validation_and_test_share_nothing_and_training_is_warm(arguments: dict[str, int]):
    data = demo_data(**arguments)
    train, valid, test = trained_on(data), sets_of(data.valid), sets_of(data.test)
    assert sum(map(len, train)) == data.num_pairs  # no pair twice
    assert min(map(len, train)) >= 1
    assert min(map(min, train)) >= 0
    assert max(map(max, train)) < data.num_warm
    for known, parts in zip(sets_of(data.known), zip(train, valid, test, strict=True), strict=True):
        assert known == set.union(*parts)
        assert len(known) == sum(map(len, parts))
        assert known <= set(range(data.num_items))


def test_a_tenth_of_a_users_warm_items_is_held_out_twice_and_the_cold_ones_are_halved(data: ColdStart):
    num_warm = data.num_warm
    with_cold = 0
    extra = 0
    for train, valid, test in zip(trained_on(data), sets_of(data.valid), sets_of(data.test), strict=True):
        warm = [len({item for item in part if item < num_warm}) for part in (train, valid, test)]
        cold = [len({item for item in part if item >= num_warm}) for part in (valid, test)]
        assert warm[1] == warm[2] == round(0.1 * sum(warm))
        assert abs(cold[0] - cold[1]) <= 1
        extra += cold[0] - cold[1]
        with_cold += sum(cold) > 0
    assert with_cold > 0.9 * data.num_users
    assert abs(extra) < 0.1 * data.num_users  # neither validation nor test is favoured


def test_a_few_warm_items_are_met_by_many(data: ColdStart):
    counts = torch.bincount(data.item.long(), minlength=data.num_warm).sort(descending=True).values
    assert float(counts[:60].sum() / counts.sum()) > 0.2  # the most popular tenth
    assert int(counts.min()) >= 1
    per_user = torch.bincount(data.user.long()).double()
    assert float(per_user.max()) > 4 * float(per_user.median())  # a long tail


def test_neighbouring_pairs_do_not_belong_to_one_user(data: ColdStart):
    assert float((data.user.diff() == 0).double().mean()) < 0.01


@pytest.mark.parametrize(
    "arguments", [{"num_users": 0}, {"num_warm": 0}, {"num_cold": 0}, {"num_warm": 10, "num_cold": 9}]
)
def test_demo_data_that_would_hold_nothing_is_refused(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="is too small; take at least"):
        demo_data(**arguments)


def test_the_smallest_demo_data_can_be_made():
    data = demo_data(num_users=1, num_warm=10, num_cold=10)
    assert (data.num_users, data.num_items) == (1, 20)
    assert data.num_pairs >= 1


# What can be learned


def marks(rows: Iterable[Iterable[int]], num_items: int) -> Tensor:
    """[U, I] bool, true where the row names the item."""
    sets = [set(row) for row in rows]
    return torch.tensor([[item in row for item in range(num_items)] for row in sets])


class Ranked:
    """Recall@10 on the test, by ranking all items of a group that the user was not trained on."""

    def __init__(self, data: ColdStart) -> None:
        self.train_UI = marks(trained_on(data), data.num_items)
        self.test_UI = marks(sets_of(data.test), data.num_items)
        self.is_cold_I = torch.arange(data.num_items) >= data.num_warm

    def recall(self, score_UI: Tensor, *, cold: bool) -> float:
        group_I = self.is_cold_I == cold
        relevant_UI = self.test_UI & group_I
        best_UK = score_UI.masked_fill(self.train_UI | ~group_I, -torch.inf).topk(10).indices
        num_relevant_U = relevant_UI.sum(1)
        users = num_relevant_U > 0
        hits_U = relevant_UI.gather(1, best_UK).sum(1)
        return float((hits_U[users] / num_relevant_U[users]).mean())


@pytest.fixture(scope="module")
def ranked(data: ColdStart) -> Ranked:
    return Ranked(data)


@pytest.fixture(scope="module")
def chance_UI(data: ColdStart) -> Tensor:
    return torch.rand(data.num_users, data.num_items, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vectors(data: ColdStart, ranked: Ranked) -> tuple[Tensor, Tensor]:
    """Users and warm items as the leading singular vectors of the centred training matrix."""
    train_UW = ranked.train_UI[:, : data.num_warm].double()
    left, value, right = torch.linalg.svd(train_UW - train_UW.mean(0), full_matrices=False)
    return left[:, :12] * value[:12], right[:12].T


def from_content(data: ColdStart, vectors: tuple[Tensor, Tensor], modalities: Iterable[str]) -> Tensor:
    """Scores of all items where the vector of a cold one is what ridge regression makes of its content."""
    user_UD, warm_WD = vectors
    x_IF = torch.cat([normalize(data.content[modality].double(), dim=1) for modality in modalities], dim=1)
    x_WF = x_IF[: data.num_warm]
    weight_FD = torch.linalg.solve(x_WF.T @ x_WF + torch.eye(x_WF.shape[1], dtype=torch.float64), x_WF.T @ warm_WD)
    return user_UD @ torch.cat([warm_WD, x_IF[data.num_warm :] @ weight_FD]).T


def test_popularity_beats_chance_on_warm_items_and_taste_beats_popularity(
    data: ColdStart, ranked: Ranked, chance_UI: Tensor, vectors: tuple[Tensor, Tensor]
):
    popularity_UI = ranked.train_UI.sum(0).double().expand(data.num_users, -1)
    by_chance = ranked.recall(chance_UI, cold=False)
    by_popularity = ranked.recall(popularity_UI, cold=False)
    by_taste = ranked.recall(from_content(data, vectors, MODALITIES), cold=False)
    assert by_popularity > 4 * by_chance
    assert by_taste > 2 * by_popularity
    assert by_taste < 0.8  # noise


def test_content_beats_chance_on_cold_items(
    data: ColdStart, ranked: Ranked, chance_UI: Tensor, vectors: tuple[Tensor, Tensor]
):
    by_content = ranked.recall(from_content(data, vectors, MODALITIES), cold=True)
    assert by_content > 4 * ranked.recall(chance_UI, cold=True)
    assert by_content < 0.8  # noise


def test_every_modality_helps_and_none_is_enough(data: ColdStart, ranked: Ranked, vectors: tuple[Tensor, Tensor]):
    recall = {
        modalities: ranked.recall(from_content(data, vectors, modalities), cold=True)
        for modalities in ("v", "a", "t", "va", "vt", "at", "vat")
    }
    for modality in MODALITIES:
        assert recall[modality] < 0.7 * recall["vat"]
        assert recall["vat".replace(modality, "")] < 0.9 * recall["vat"]  # the other two


# The files


def test_every_file_of_the_original_is_there(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*PLAIN, *DICTIONARIES, *SPLITS])


def expected_files(data: ColdStart) -> dict[str, Any]:
    """What the layout says is in each file, as lists, dictionaries and sets, made pair by pair."""
    u, w, i = data.num_users, data.num_warm, data.num_items
    files: dict[str, Any] = {
        "train.npy": [[user, u + item] for user, item in zip(data.user.tolist(), data.item.tolist(), strict=True)],
        "user_item_train_dict.npy": {user: {u + x for x in items} for user, items in enumerate(trained_on(data))},
        "user_item_all_dict.npy": {user: {u + x for x in items} for user, items in enumerate(sets_of(data.known))},
        "warm_set.npy": list(range(u, u + w)),
        "cold_set.npy": list(range(u + w, u + i)),
    }
    for stage, lists in (("val", data.valid), ("test", data.test)):
        for group, items in (("full", range(i)), ("warm", range(w)), ("cold", range(w, i))):
            files[f"{stage}_{group}.npy"] = [
                [user, *(u + item for item in sorted(held_out & set(items)))]
                for user, held_out in enumerate(sets_of(lists))
            ]
    return files | {f"feat_{modality}.npy": tensor.tolist() for modality, tensor in data.content.items()}


@pytest.mark.parametrize("name", [*PLAIN, *DICTIONARIES, *SPLITS])
def test_numpy_reads_every_value(folder: Path, small: ColdStart, name: str):
    np = pytest.importorskip("numpy")
    expected = expected_files(small)[name]
    array = np.load(folder / name, allow_pickle=name not in PLAIN)
    assert type(array) is np.ndarray
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.dtype == (object if name not in PLAIN else np.float32 if name.startswith("feat") else np.int64)
    assert array.shape == (() if name in DICTIONARIES else (len(expected), *array.shape[1:]))
    assert array.ndim == (0 if name in DICTIONARIES else 2 if name.startswith(("train", "feat")) else 1)
    assert array.tolist() == expected  # of an array without axes: the dictionary itself
    if name in SPLITS:
        assert {type(row) for row in array} == {list}
        assert {type(value) for row in array for value in row} == {int}
    if name in DICTIONARIES:
        assert {type(value) for value in array.item().values()} == {set}


@pytest.mark.parametrize("name", [*PLAIN, *DICTIONARIES, *SPLITS])
def test_the_restricted_reader_reads_every_value(folder: Path, small: ColdStart, name: str):
    value = load_npy(folder / name)
    assert (value.tolist() if isinstance(value, Tensor) else value) == expected_files(small)[name]


@pytest.mark.parametrize("name", [*DICTIONARIES, "val_full.npy"])
def test_object_arrays_name_numpys_own_functions_and_nothing_else(folder: Path, name: str):
    assert describe_pickle(folder / name) == ["numpy.core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray"]


@pytest.mark.parametrize("name", [*PLAIN, *DICTIONARIES, *SPLITS])
def test_headers_are_version_1_and_aligned(folder: Path, name: str):
    content = (folder / name).read_bytes()
    assert content[:8] == b"\x93NUMPY\x01\x00"
    end = 10 + int.from_bytes(content[8:10], "little")
    assert end % 64 == 0
    pattern = rb"\{'descr': '[<|][a-zO]\d?', 'fortran_order': False, 'shape': \([\d, ]*\), \} *\n"
    assert re.fullmatch(pattern, content[10:end])


def test_rows_without_a_held_out_item_hold_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = demo_data(num_users=40, num_warm=60, num_cold=1)
    monkeypatch.setattr(module, "demo_data", lambda: data)
    rows = load_npy(write_demo(tmp_path) / "val_cold.npy")
    assert [row[0] for row in rows] == list(range(40))
    assert {len(row) for row in rows} == {1, 2}


PLAIN_VALUES = [
    *(None, True, False, 0, -1, 2**31 - 1, -(2**31), "", "a\u20ac", b"", b"b", (), (1, ("x",)), [], [[], [1]]),
    *({}, {1: {2, 3}, 4: set()}, (3, "|", None, None, None, -1, -1, 63)),
]


@pytest.mark.parametrize("value", PLAIN_VALUES, ids=repr)
def test_opcodes_make_the_value(value: object):
    stream = pickle.PROTO + b"\x04" + module._pushes(value) + pickle.STOP
    loaded = pickle.loads(stream)
    assert loaded == value
    assert type(loaded) is type(value)
    assert [op.name for op, _, _ in pickletools.genops(stream)][-1] == "STOP"


def test_a_value_without_opcodes_is_no_plain_value():
    with pytest.raises(TypeError, match="float"):
        module._pushes([1.5])


def test_the_app_reads_the_generated_data(folder: Path, small: ColdStart):
    assert check_source(folder) == []
    data = read_data(folder)
    assert data.num_warm == small.num_warm
    assert same(data, small)
    assert data.words is None
    assert (data.item_ids, data.user_ids) == (small.item_ids, small.user_ids)


# Writing again


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_equal_folder_is_left_alone(folder: Path):
    before = stamps(folder)
    assert write_demo(folder) == folder
    assert stamps(folder) == before


@pytest.mark.parametrize("name", ["train.npy", "user_item_all_dict.npy", "val_cold.npy", "feat_t.npy"])
def test_a_missing_shortened_or_changed_file_is_written_again_and_no_other(folder: Path, name: str):
    good, before = contents(folder), stamps(folder)
    path = folder / name
    flipped = bytearray(good[name])
    flipped[-9] ^= 1
    for damaged in (None, b"", good[name][:-1], bytes(flipped)):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        write_demo(folder)
        assert contents(folder) == good
    after = stamps(folder)
    assert after.pop(name) != before.pop(name)
    assert after == before


def test_writing_that_was_interrupted_is_finished_the_next_time(
    tmp_path: Path, small: ColdStart, monkeypatch: pytest.MonkeyPatch
):
    good = contents(write_demo(tmp_path / "good"))

    def stop_at_the_features(path: Path, content: bytes) -> None:
        if path.name == "feat_a.npy":
            raise KeyboardInterrupt
        atomic_write_bytes(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(module, "atomic_write_bytes", stop_at_the_features)
        with pytest.raises(KeyboardInterrupt):
            write_demo(tmp_path / "again")
    assert "feat_a.npy" not in contents(tmp_path / "again")
    assert contents(write_demo(tmp_path / "again")) == good


def test_another_demos_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for seed in (1, 2):
        made = demo_data(**{**SMALL, "seed": seed})
        monkeypatch.setattr(module, "demo_data", lambda made=made: made)
        write_demo(tmp_path)
        assert torch.equal(load_npy(tmp_path / "feat_v.npy"), made.content["v"])
        assert load_npy(tmp_path / "train.npy")[:, 0].tolist() == made.user.tolist()
