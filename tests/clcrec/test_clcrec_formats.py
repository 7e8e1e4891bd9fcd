"""Folders, packs and ratings are read as a few lines of NumPy and plain Python would read them."""

import csv
import dataclasses
import io
import os
import pickle
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.clcrec.dataset import MODALITIES, ColdStart, Words
from apps.clcrec.formats import DataError, check_source, prepare_source, read_content, read_data
from shared.files import fingerprint

np = pytest.importorskip("numpy")

Files = dict[str, Any]


def write_npy(path: Path, value: Any, *, protocol: int = 4) -> None:
    """A .npy file as numpy.save writes it, with any protocol for objects."""
    array = np.asanyarray(value)
    with path.open("wb") as file:
        if array.dtype != object:
            np.save(file, array)
            return
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol)


def write_files(folder: Path, files: Files, *, protocol: int = 4) -> Path:
    """Lists become arrays of lists, dictionaries arrays of one object, bytes are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif name.endswith(".pt"):
            torch.save(value, folder / name)
        else:
            write_npy(folder / name, objects(value) if isinstance(value, list) else value, protocol=protocol)
    return folder


def objects(rows: list[Any]) -> Any:
    """The rows as an array of objects with one axis, whatever their lengths are."""
    array = np.empty(len(rows), dtype=object)
    for n, row in enumerate(rows):
        array[n] = row
    return array


def grouped(pairs: list[tuple[int, int]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = defaultdict(set)
    for user, item in pairs:
        found[user].add(item)
    return dict(found)


def make_files(*, seed: int = 0, warm_first: bool = True, num_users: int = 9, num_warm: int = 12) -> Files:
    """A sound folder: every user trains, no pair is in two splits; cold items are the last ones, or anywhere."""
    draw = random.Random(seed)
    num_items = num_warm + 5
    raw = list(range(num_users, num_users + num_items))
    cold = raw[num_warm:] if warm_first else sorted(draw.sample(raw, 5))
    warm = [item for item in raw if item not in cold]
    pairs: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for user in range(num_users):
        mine = draw.sample(warm, draw.randint(3, len(warm)))
        pairs["train"] += [(user, item) for item in mine[2:]]
        pairs["val"] += [(user, item) for item in mine[:1]]
        pairs["test"] += [(user, item) for item in mine[1 : draw.randint(1, 2)]]
        for item in draw.sample(cold, draw.randint(1, len(cold))):
            pairs[draw.choice(["val", "test"])].append((user, item))
    draw.shuffle(pairs["train"])
    files: Files = {
        "train.npy": np.array(pairs["train"]),
        "user_item_train_dict.npy": grouped(pairs["train"]),
        "user_item_all_dict.npy": grouped(pairs["train"] + pairs["val"] + pairs["test"]),
        "warm_set.npy": np.array(warm),
        "cold_set.npy": np.array(cold),
    }
    for stage in ("val", "test"):
        users = list(range(num_users))
        draw.shuffle(users)
        for name, group in (("full", raw), ("warm", warm), ("cold", cold)):
            rows = [[u, *(i for v, i in pairs[stage] if v == u and i in group)] for u in users]
            files[f"{stage}_{name}.npy"] = rows
    rng = np.random.default_rng(seed)
    files["feat_v.npy"] = rng.normal(size=(num_items, 4)).astype("f4")
    files["feat_a.npy"] = rng.normal(size=(num_items, 3))
    files["feat_t.npy"] = rng.normal(size=(num_items, 2)).astype("f2")
    return files


def slow_read(folder: Path) -> dict[str, Any]:
    """Everything in the folder by its global ids: the obvious reader."""
    arrays = {path.name: np.load(path, allow_pickle=True) for path in folder.glob("*.npy")}
    warm, cold = ({int(i) for i in arrays[f"{group}_set.npy"]} for group in ("warm", "cold"))
    first = min(warm | cold)
    found: dict[str, Any] = {"users": first, "warm": sorted(warm), "cold": sorted(cold)}
    found["train"] = [(int(user), int(item)) for user, item in arrays["train.npy"]]
    for stage, prefix in (("valid", "val"), ("test", "test")):
        found[stage] = {(int(row[0]), int(item)) for row in arrays[f"{prefix}_full.npy"] for item in row[1:]}
    found["known"] = {*found["train"], *found["valid"], *found["test"]}
    found["content"] = {
        m: {first + n: [float(np.float32(x)) for x in row] for n, row in enumerate(arrays[f"feat_{m}.npy"])}
        for m in MODALITIES
        if f"feat_{m}.npy" in arrays
    }
    return found


def as_raw(data: ColdStart) -> dict[str, Any]:
    """The tensors in the same form, by the ids in the source."""
    user, item = [int(u) for u in data.user_ids], [int(i) for i in data.item_ids]
    found: dict[str, Any] = {"users": len(user), "warm": item[: data.num_warm], "cold": item[data.num_warm :]}
    found["train"] = [(user[u], item[i]) for u, i in zip(data.user.tolist(), data.item.tolist(), strict=True)]
    for name in ("known", "valid", "test"):
        ptr, items = getattr(data, name).ptr.tolist(), getattr(data, name).item.tolist()
        rows = [(user[u], items[ptr[u] : ptr[u + 1]]) for u in range(len(user))]
        assert all(row == sorted(set(row)) for _, row in rows)
        found[name] = {(u, item[i]) for u, row in rows for i in row}
    found["content"] = {m: dict(zip(item, matrix.tolist(), strict=True)) for m, matrix in data.content.items()}
    return found


def assert_well_formed(data: ColdStart) -> None:
    assert data.user.dtype == data.item.dtype == torch.int32
    assert len(data.user) == len(data.item)
    assert 0 < data.num_warm < data.num_items
    assert int(data.item.max()) < data.num_warm
    for lists in (data.known, data.valid, data.test):
        assert lists.ptr.dtype == torch.int64
        assert lists.item.dtype == torch.int32
        assert len(lists.ptr) == data.num_users + 1
    for matrix in data.content.values():
        assert matrix.dtype == torch.float32
        assert matrix.shape[0] == data.num_items
    if data.words is not None:
        assert data.words.item.dtype == data.words.word.dtype == torch.int64
        assert (data.words.item.diff() >= 0).all()
        assert set(data.words.word.tolist()) <= set(range(data.words.num_words))
    assert len(set(data.item_ids)) == data.num_items
    assert len(set(data.user_ids)) == data.num_users


def assert_same(a: ColdStart, b: ColdStart) -> None:
    """Every value of both is equal, types included."""
    for field in dataclasses.fields(ColdStart):
        x, y = getattr(a, field.name), getattr(b, field.name)
        for left, right in zip(flat(x), flat(y), strict=True):
            if isinstance(left, torch.Tensor):
                assert left.dtype == right.dtype, field.name
                assert torch.equal(left, right), field.name
            else:
                assert left == right, field.name


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for key in value for part in (key, value[key])]
    return list(value) if isinstance(value, tuple) else [value]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("warm_first", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_folder_is_read_as_the_obvious_reader_reads_it(tmp_path, protocol, warm_first):
    for seed in range(3):
        folder = tmp_path / str(seed)
        write_files(folder, make_files(seed=seed, warm_first=warm_first), protocol=protocol)
        data = read_data(folder)
        assert_well_formed(data)
        assert as_raw(data) == slow_read(folder)
        assert data.user_ids == tuple(map(str, range(9)))
        assert data.name == str(seed)
        assert data.modalities == ("v", "a", "t")
        assert data.words is None
        assert check_source(folder) == []


def test_sizes_come_from_the_data(tmp_path):
    for num_users, num_warm in ((4, 3), (30, 4), (5, 60)):
        folder = tmp_path / f"movielens-{num_users}"
        write_files(folder, make_files(num_users=num_users, num_warm=num_warm))
        data = read_data(folder)
        assert (data.num_users, data.num_warm, data.num_items) == (num_users, num_warm, num_warm + 5)
        assert as_raw(data) == slow_read(folder)


def test_what_follows_from_other_files_may_be_absent(tmp_path):
    files = make_files(warm_first=False)
    folder = write_files(tmp_path / "whole", files)
    whole = dataclasses.replace(read_data(folder), fingerprint="", name="")
    optional = [
        ["user_item_train_dict.npy", "user_item_all_dict.npy"],
        ["val_warm.npy", "val_cold.npy", "test_warm.npy"],
        ["val_full.npy", "test_full.npy"],
        ["val_full.npy", "test_cold.npy", "user_item_all_dict.npy"],
    ]
    for n, names in enumerate(optional):
        part = write_files(tmp_path / str(n), {name: value for name, value in files.items() if name not in names})
        assert_same(dataclasses.replace(read_data(part), fingerprint="", name=""), whole)
        assert check_source(part) == []


def test_without_train_npy_the_pairs_are_those_of_the_dictionary_by_user_and_item(tmp_path):
    files = make_files()
    expected = sorted(map(tuple, files.pop("train.npy").tolist()))
    folder = write_files(tmp_path / "data", files)
    assert as_raw(read_data(folder))["train"] == expected
    (fault,) = check_source(folder)
    assert (fault.severity, Path(fault.file).name) == ("warning", "train.npy")


def test_the_dictionary_of_all_positives_has_a_second_name(tmp_path):
    files = make_files()
    files["user_item_dict.npy"] = files.pop("user_item_all_dict.npy")
    folder = write_files(tmp_path / "data", files)
    assert as_raw(read_data(folder)) == slow_read(folder)
    assert check_source(folder) == []


@pytest.mark.parametrize(
    "convert",
    [
        lambda ids: ids.astype("i4"),
        lambda ids: ids.astype(">i8"),
        lambda ids: ids[::-1],
        lambda ids: objects(ids.tolist()),
        lambda ids: objects(list(ids)),
        lambda ids: np.array(set(ids.tolist()), dtype=object),
        lambda ids: objects([set(ids.tolist())]),
        lambda ids: objects([frozenset(ids.tolist())]),
        lambda ids: objects([ids.tolist()]),
        lambda ids: objects([ids]),
    ],
    ids=[
        "int32",
        "big-endian",
        "falling",
        "objects",
        "scalars",
        "set",
        "row-set",
        "frozenset",
        "row-list",
        "row-array",
    ],
)
def test_item_sets_may_be_arrays_lists_or_sets(tmp_path, convert):
    files = make_files(seed=2)
    expected = as_raw(read_data(write_files(tmp_path / "a", files)))
    for name in ("warm_set.npy", "cold_set.npy"):
        files[name] = convert(files[name])
    assert as_raw(read_data(write_files(tmp_path / "b", files))) == expected


@pytest.mark.parametrize(
    "convert",
    [tuple, np.array, lambda row: np.array(row, dtype="i4"), lambda row: [np.int64(value) for value in row]],
    ids=["tuple", "array", "int32", "scalars"],
)
def test_rows_and_sets_may_be_of_any_kind_that_lists_integers(tmp_path, convert):
    files = make_files(seed=2)
    expected = as_raw(read_data(write_files(tmp_path / "a", files)))
    for name in ("val_full.npy", "test_full.npy"):
        files[name] = [convert(row) for row in files[name]]
    for name in ("user_item_train_dict.npy", "user_item_all_dict.npy"):
        files[name] = {np.int64(user): convert(sorted(items)) for user, items in files[name].items()}
    folder = write_files(tmp_path / "b", files)
    assert as_raw(read_data(folder)) == expected
    assert check_source(folder) == []


def test_rows_of_one_length_are_an_array_with_two_axes(tmp_path):
    files = make_files()
    users = range(9)
    files["val_full.npy"] = np.array([[user, 21] for user in users])
    files["test_full.npy"] = np.array([[user, 22] for user in users], dtype=object)
    for name in ("val_warm.npy", "val_cold.npy", "test_warm.npy", "test_cold.npy", "user_item_all_dict.npy"):
        del files[name]
    data = as_raw(read_data(write_files(tmp_path / "data", files)))
    assert data["valid"] == {(user, 21) for user in users}
    assert data["test"] == {(user, 22) for user in users}


def test_pickles_of_python_2_are_read(tmp_path):
    """The opcodes that Python 2 wrote: byte strings, `__builtin__ set` of a list, and NumPy's modules of old."""
    files = make_files()
    expected = as_raw(read_data(write_files(tmp_path / "data", files)))
    head = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb"
    sets = b"".join(
        b"K" + bytes([user]) + b"c__builtin__\nset\n](" + b"".join(b"K" + bytes([i]) for i in items) + b"e\x85R"
        for user, items in files["user_item_train_dict.npy"].items()
    )
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    old = header.getvalue() + head + b"(K\x01)" + kind + b"\x89](}(" + sets + b"uetb."
    (tmp_path / "data" / "user_item_train_dict.npy").write_bytes(old)
    assert as_raw(read_data(tmp_path / "data")) == expected
    assert check_source(tmp_path / "data") == []
    path = tmp_path / "data" / "val_full.npy"
    write_npy(path, objects(files["val_full.npy"]), protocol=2)
    old = path.read_bytes().replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core.multiarray" in old
    assert b"_codecs\nencode" in old
    path.write_bytes(old)
    assert as_raw(read_data(tmp_path / "data")) == expected


# Features


@pytest.mark.parametrize(
    "write",
    [
        lambda path, t: torch.save(t, path),
        lambda path, t: torch.save(t, path, _use_new_zipfile_serialization=False),
        lambda path, t: torch.save(torch.nn.Parameter(t), path),
        lambda path, t: torch.save(t.double(), path),
        lambda path, t: torch.save(t.bfloat16(), path),
        lambda path, t: torch.save(t.t().contiguous().t(), path),
        lambda path, t: np.save(path.with_suffix(".npy"), t.numpy()),
        lambda path, t: np.save(path.with_suffix(".npy"), t.double().numpy()),
        lambda path, t: np.save(path.with_suffix(".npy"), np.asfortranarray(t.numpy())),
    ],
    ids=["pt", "old pt", "parameter", "double", "bfloat16", "strided", "npy", "float64", "fortran"],
)
def test_features_of_every_form_become_float32(tmp_path, write):
    files = make_files(warm_first=False)
    del files["feat_v.npy"]
    folder = write_files(tmp_path / "data", files)
    features = torch.randint(-8, 8, (17, 6)).float() / 4  # exact in every type
    write(folder / "feat_v.pt", features)
    data = read_data(folder)
    assert_well_formed(data)
    order = torch.tensor([int(i) - 9 for i in data.item_ids])
    assert torch.equal(data.content["v"], features[order])
    assert not data.content["v"].requires_grad
    assert check_source(folder) == []


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_text_features_may_be_words(tmp_path, suffix):
    files = make_files(warm_first=False, seed=4)
    del files["feat_t.npy"]
    draw = random.Random(0)
    pairs = [(item, draw.randrange(6)) for item in range(17) for _ in range(draw.randint(1, 4))] + [(3, 11)]
    draw.shuffle(pairs)
    both = torch.tensor(pairs).t().contiguous()
    files[f"feat_t{suffix}"] = both if suffix == ".pt" else both.numpy()
    data = read_data(write_files(tmp_path / "data", files))
    assert_well_formed(data)
    assert data.words is not None
    assert data.words.num_words == 12
    assert data.modalities == ("v", "a", "t")
    assert set(data.content) == {"v", "a"}
    found = Counter(
        (int(data.item_ids[i]) - 9, w) for i, w in zip(data.words.item.tolist(), data.words.word.tolist(), strict=True)
    )
    assert found == Counter(pairs)
    assert check_source(tmp_path / "data") == []


def test_a_folder_without_features_can_be_read(tmp_path):
    files = {name: value for name, value in make_files().items() if not name.startswith("feat")}
    data = read_data(write_files(tmp_path / "data", files))
    assert data.modalities == ()
    (fault,) = check_source(tmp_path / "data")
    assert fault.severity == "warning"
    assert "content of the items" in fault.expected


def test_the_fingerprint_changes_with_every_file_and_with_nothing_else(tmp_path):
    files = make_files()
    seen = {read_data(write_files(tmp_path / "a", files)).fingerprint}
    assert read_data(write_files(tmp_path / "b", files)).fingerprint in seen
    (tmp_path / "b" / "notes.txt").write_text("x")
    assert read_data(tmp_path / "b").fingerprint in seen
    for n, name in enumerate(["train.npy", "val_full.npy", "feat_v.npy"]):
        changed = files[name][::-1] if name != "feat_v.npy" else files[name] * 2
        found = read_data(write_files(tmp_path / f"c{n}", {**files, name: changed})).fingerprint
        assert found not in seen
        assert re.fullmatch("[0-9a-f]{32}", found)
        seen.add(found)


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def make_pack(tmp_path: Path, *, words: bool = False) -> tuple[Path, Path, ColdStart]:
    files = make_files(warm_first=False)
    if words:
        del files["feat_t.npy"]
        files["feat_t.pt"] = torch.stack([torch.arange(17).repeat(2), torch.arange(34) % 5])
    folder, pack = write_files(tmp_path / "data", files), tmp_path / "packs" / "a.safetensors"
    return folder, pack, prepare_source(folder, pack)


@pytest.mark.parametrize("words", [False, True])
def test_a_pack_holds_what_reading_the_folder_gives(tmp_path, words):
    folder, pack, data = make_pack(tmp_path, words=words)
    assert_same(data, read_data(folder))
    assert_same(read_data(pack), data)
    assert_well_formed(read_data(pack))
    assert isinstance(read_data(pack).words, Words if words else type(None))
    assert check_source(pack) == []


def test_preparing_says_that_the_split_is_kept(tmp_path):
    lines: list[str] = []
    prepare_source(write_files(tmp_path / "data", make_files()), tmp_path / "a.safetensors", say=lines.append)
    assert len(lines) == 1
    assert "its split is kept" in lines[0]


def test_a_pack_lives_without_its_source(tmp_path):
    folder, pack, data = make_pack(tmp_path)
    shutil.rmtree(folder)
    assert_same(read_data(pack), data)


def test_a_source_that_was_touched_or_copied_does_not_make_a_pack_stale(tmp_path):
    folder, pack, data = make_pack(tmp_path)
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert_same(read_data(pack), data)


@pytest.mark.parametrize("name", ["train.npy", "cold_set.npy", "feat_v.npy", "user_item_all_dict.npy"])
def test_a_source_that_changed_makes_a_pack_stale_and_the_message_gives_the_command(tmp_path, name):
    folder, pack, _ = make_pack(tmp_path)
    changed = bytearray((folder / name).read_bytes())
    changed[-1] ^= 1
    (folder / name).write_bytes(changed)
    with pytest.raises(DataError, match="stale pack") as caught:
        read_data(pack)
    assert str(caught.value).startswith(f"{pack}: error: ")
    assert f"{name} has changed" in str(caught.value)
    command = re.search(r"python -m apps\.clcrec prepare (\S+) (\S+)$", str(caught.value))
    assert command is not None
    assert Path(command[1]).resolve() == folder.resolve()
    assert Path(command[2]) == pack


def test_a_file_that_was_added_makes_a_pack_stale(tmp_path):
    folder, pack, _ = make_pack(tmp_path)
    (folder / "feat_v.npy").unlink()
    read_data(pack)  # it does not need its source
    prepare_source(folder, pack)
    write_files(folder, {"feat_v.npy": np.ones((17, 2), dtype="f4")})
    with pytest.raises(DataError, match=r"feat_v\.npy is new"):
        read_data(pack)


def test_source_and_pack_can_be_moved_together(tmp_path):
    make_pack(tmp_path)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert read_data(moved / "packs" / "a.safetensors").num_users == 9
    write_npy(moved / "data" / "train.npy", np.array([[0, 9]]))
    with pytest.raises(DataError, match="stale pack"):
        read_data(moved / "packs" / "a.safetensors")


def test_what_cannot_be_prepared_is_refused(tmp_path):
    folder, pack, _ = make_pack(tmp_path)
    with pytest.raises(DataError, match=r"must end in \.safetensors"):
        prepare_source(folder, tmp_path / "a.npy")
    with pytest.raises(DataError, match="already a pack"):
        prepare_source(pack, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="leave --min-rating out"):
        prepare_source(folder, tmp_path / "b.safetensors", min_rating=3)
    with pytest.raises(DataError, match="nothing at this path"):
        prepare_source(tmp_path / "absent", tmp_path / "b.safetensors")
    (folder / "train.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.npy: error"):
        prepare_source(folder, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Ratings and their split

TITLES = [
    "Toy Story (1995)",
    "Heat (1995)",
    "Toy Soldiers, The (1991)",
    'Say "Hi" (1989)',
    "Am\u00e9lie (2001)",
    "Heat",
]
GENRES = ["Action|Crime", "Comedy", "Action", "(no genres listed)", "Comedy|Romance"]
Event = tuple[str, str, float]


def make_events(*, seed: int = 0, tokens: bool = False, count: int = 900) -> list[Event]:
    """Ratings in some order, a few pairs twice; user 1 meets item 5 alone."""
    draw = random.Random(seed)
    users = [f"u{n}" if tokens else str(n) for n in range(2, 40)]
    items = [f"B{n}x" if tokens else str(n * 3) for n in range(1, 31)]
    return [
        *((draw.choice(users), draw.choice(items), draw.randint(1, 10) / 2) for _ in range(count)),
        ("u1" if tokens else "1", items[4], 5.0),
    ]


def write_ratings(folder: Path, form: str, events: list[Event]) -> Path:
    """The events and a line for each of their items, and for one more, in the given form."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [*sorted({item for _, item, _ in events}), "7"]
    titles = {item: TITLES[n % len(TITLES)] for n, item in enumerate(items)}
    genres = {item: GENRES[n % len(GENRES)] for n, item in enumerate(items)}
    if form == "dat":
        lines = [f"{u}::{i}::{r}::97830\n" for u, i, r in events]
        (folder / "ratings.dat").write_text("".join(lines))
        lines = [f"{i}::{titles[i]}::{genres[i]}\n" for i in items]
        (folder / "movies.dat").write_text("".join(lines), encoding="latin-1")
    elif form == "data":
        (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t97830\n" for u, i, r in events))
        lines = [f"{i}\t{titles[i]}\t01-Jan\t\turl\t" for i in items]
        flags = ["\t".join("1" if g in genres[i].split("|") else "0" for g in GENRE_COLUMNS) for i in items]
        text = "".join(f"{line}{flag}\n".replace("\t", "|") for line, flag in zip(lines, flags, strict=True))
        (folder / "u.item").write_text(text, encoding="latin-1")
    elif form == "csv":
        with (folder / "ratings.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["userId", "movieId", "rating", "timestamp"], *([*e, 97830] for e in events)])
        with (folder / "movies.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["movieId", "title", "genres"], *([i, titles[i], genres[i]] for i in items)])
    else:
        rows = ["item_id:token\tuser_id:token\trating:float\n", *(f"{i}\t{u}\t{r}\n" for u, i, r in events)]
        (folder / "x.inter").write_text("".join(rows))
        rows = ["title:token_seq\titem_id:token\tyear:token\tprice:float\tgenres:token_seq\n"]
        rows += [f"{titles[i]}\t{i}\t{len(titles[i])}\t2.5\t{genres[i].replace('|', ' ')}\n" for i in items]
        (folder / "x.item").write_text("".join(rows), encoding="utf-8")
    return folder


GENRE_COLUMNS = [
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
]
FORMS = ["dat", "data", "csv", "inter"]


def parts_of(data: ColdStart) -> tuple[set[tuple[str, str]], ...]:
    """The pairs that train, validate and test, by the ids in the source."""
    train = {(data.user_ids[u], data.item_ids[i]) for u, i in zip(data.user.tolist(), data.item.tolist(), strict=True)}
    held_out = []
    for lists in (data.valid, data.test):
        ptr, item = lists.ptr.tolist(), lists.item.tolist()
        rows = ((user, item[ptr[n] : ptr[n + 1]]) for n, user in enumerate(data.user_ids))
        held_out.append({(user, data.item_ids[i]) for user, row in rows for i in row})
    return train, *held_out


def slow_words(data: ColdStart, form: str) -> list[set[str]]:
    """The words of each item as sets of names, made from the titles and genres that `write_ratings` gives items."""
    words = {}
    for n, item in enumerate(sorted(data.item_ids)):
        title, genres = TITLES[n % len(TITLES)], GENRES[n % len(GENRES)]
        own = {f"title {part.strip('(),').strip(chr(34))}" for part in title.lower().split()}
        if form == "inter":
            own |= {f"year {len(title)}"} | {f"genre {g.strip('()')}" for g in genres.lower().replace("|", " ").split()}
        elif genres != "(no genres listed)":
            own |= {f"genre {genre}" for genre in genres.split("|")}
        words[item] = own
    count = Counter(word for own in words.values() for word in own)
    return [{word for word in words[i] if count[word] > 1} or words[i] for i in data.item_ids]


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ratings_is_split_by_the_rules(tmp_path, form, tokens):
    events = make_events(tokens=tokens)
    folder = write_ratings(tmp_path / "data", form, events)
    lines: list[str] = []
    data = prepare_source(folder, tmp_path / "a.safetensors", cold_share=0.2, seed=3, say=lines.append)
    assert_well_formed(data)
    assert data.name == "data"
    assert_same(read_data(tmp_path / "a.safetensors"), data)

    pairs = {(user, item) for user, item, _ in events}
    items = {item for _, item in pairs}
    cold = set(data.item_ids[data.num_warm :])
    assert set(data.item_ids) == items
    assert len(cold) == round(0.2 * len(items))
    for ids in (data.item_ids[: data.num_warm], data.item_ids[data.num_warm :], data.user_ids):
        assert list(ids) == (sorted(ids) if tokens else sorted(ids, key=int))
    train, valid, test = parts_of(data)
    assert len(train) == data.num_pairs
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert train | valid | test == {(user, item) for user, item in pairs if user in data.user_ids}
    for user in {user for user, _ in pairs}:
        mine = {(user, item) for item in items} & pairs
        warm = {pair for pair in mine if pair[1] not in cold}
        assert (user in data.user_ids) is bool(warm)
        if warm:
            assert [len(warm & part) for part in (valid, test)] == [len(warm) // 10, len(warm) // 10]
            assert mine - warm <= valid | test
    assert all(sum(item in cold for _, item in part) > 20 for part in (valid, test))  # of about 150, by a fair coin

    assert data.words is not None
    found: dict[int, set[int]] = {n: set() for n in range(data.num_items)}
    for item, word in zip(data.words.item.tolist(), data.words.word.tolist(), strict=True):
        assert word not in found[item]
        found[item].add(word)
    expected = slow_words(data, form)
    names = {word: frozenset(n for n, own in enumerate(expected) if word in own) for own in expected for word in own}
    numbers = {w: frozenset(n for n, own in found.items() if w in own) for w in range(data.words.num_words)}
    assert Counter(names.values()) == Counter(numbers.values())  # the same words, whatever their numbers
    assert any("1 item left out: nobody rated" in line for line in lines)
    assert any("repeated pair" in line for line in lines)
    assert any("column price left out" in line for line in lines) is (form == "inter")


def test_words_of_one_item_are_dropped_unless_it_has_no_others(tmp_path):
    words = {"a": "common Rare1", "b": "Common.", "c": "rare2 rare3", "d": "", "e": "common rare4"}
    (tmp_path / "x.item").write_text(
        "item_id:token\ttext:token_seq\n" + "".join(f"{i}\t{w}\n" for i, w in words.items())
    )
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\n" + "".join(f"u\t{i}\n" for i in words))
    lines: list[str] = []
    data = prepare_source(tmp_path, tmp_path / "a.safetensors", say=lines.append)
    assert data.words is not None
    found: dict[str, list[int]] = {item: [] for item in words}
    for item, word in zip(data.words.item.tolist(), data.words.word.tolist(), strict=True):
        found[data.item_ids[item]].append(word)
    assert data.words.num_words == 3
    assert found["a"] == found["b"] == found["e"]
    assert [len(found[item]) for item in "abcde"] == [1, 1, 2, 0, 1]
    assert not set(found["a"]) & set(found["c"])
    assert lines == ["1 item without any word: nothing tells of them if they are cold"]


def test_the_split_depends_on_the_seed_and_on_the_content_alone(tmp_path):
    a = write_ratings(tmp_path / "a" / "data", "dat", make_events())
    b = write_ratings(tmp_path / "b" / "data", "dat", make_events())
    os.utime(b / "ratings.dat", ns=(1, 1))
    pack = tmp_path / "x.safetensors"
    first = prepare_source(a, pack, seed=5)
    assert_same(prepare_source(b, pack, seed=5), first)
    other = prepare_source(a, pack, seed=6)
    assert parts_of(other) != parts_of(first)
    assert other.fingerprint != first.fingerprint
    assert prepare_source(a, pack, seed=5, cold_share=0.3).fingerprint != first.fingerprint
    shuffled = make_events()
    random.Random(1).shuffle(shuffled)
    again = prepare_source(write_ratings(tmp_path / "c" / "data", "dat", shuffled), pack, seed=5)
    assert parts_of(again) == parts_of(first)  # the draws do not depend on the order of lines


def test_a_pair_is_cold_valid_or_test_with_the_promised_chances(tmp_path):
    folder = write_ratings(tmp_path / "data", "inter", make_events(count=4000))
    cold: Counter[str] = Counter()
    valid_share = []
    for seed in range(40):
        data = prepare_source(folder, tmp_path / "a.safetensors", cold_share=0.3, seed=seed)
        cold.update(data.item_ids[data.num_warm :])
        held_out = [int((lists.item >= data.num_warm).sum()) for lists in (data.valid, data.test)]
        valid_share.append(held_out[0] / sum(held_out))
    assert len(cold) == 30  # each of the 30 items in some of 40 splits, 12 times on average
    assert max(cold.values()) < 25
    assert abs(sum(valid_share) / len(valid_share) - 0.5) < 0.02


def test_users_of_cold_items_only_are_left_out_with_a_line(tmp_path):
    folder = write_ratings(tmp_path / "data", "dat", make_events())
    for seed in range(20):
        lines: list[str] = []
        data = prepare_source(folder, tmp_path / "a.safetensors", seed=seed, say=lines.append)
        gone = [line for line in lines if "rated cold items only" in line]
        assert ("1" in data.user_ids) is ("15" in data.item_ids[: data.num_warm])
        assert [line.split(" left")[0] for line in gone] == ([] if "1" in data.user_ids else ["1 user"])


def test_ratings_below_the_smallest_do_not_count(tmp_path):
    events = make_events()
    folder = write_ratings(tmp_path / "data", "csv", events)
    lines: list[str] = []
    data = prepare_source(folder, tmp_path / "a.safetensors", min_rating=3.5, say=lines.append)
    kept = {(user, item) for user, item, rating in events if rating >= 3.5}
    assert set().union(*parts_of(data)) == {pair for pair in kept if pair[0] in data.user_ids}
    below = sum(rating < 3.5 for _, _, rating in events)
    assert f"{below} ratings of {len(events)} below 3.5 left out" in lines
    assert data.fingerprint != prepare_source(folder, tmp_path / "b.safetensors").fingerprint


def test_ratings_that_cannot_be_split_as_asked_are_refused(tmp_path):
    folder = write_ratings(tmp_path / "data", "inter", make_events())
    pack = tmp_path / "a.safetensors"
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(DataError, match="--cold-share is"):
            prepare_source(folder, pack, cold_share=share)
    with pytest.raises(DataError, match="makes 0 of them cold"):
        prepare_source(folder, pack, cold_share=0.01)
    with pytest.raises(DataError, match="lower --min-rating"):
        prepare_source(folder, pack, min_rating=6)
    text = (folder / "x.inter").read_text()
    (folder / "x.inter").write_text("\n".join(line.rsplit("\t", 1)[0] for line in text.splitlines()))
    with pytest.raises(DataError, match="no column rating:float"):
        prepare_source(folder, pack, min_rating=3)
    prepare_source(folder, pack)
    (folder / "x.inter").write_text("user_id:token\titem_id:token\n1\t3\n")
    (folder / "x.item").write_text("item_id:token\tclass:token\n3\ta\n")
    with pytest.raises(DataError, match="of 1 item makes 0"):
        prepare_source(folder, pack)
    (folder / "x.inter").write_text("user_id:token\titem_id:token\nu\t3\nv\t4\n")
    (folder / "x.item").write_text("item_id:token\tclass:token\n3\t\n4\t\n")
    with pytest.raises(DataError, match="no item has a word"):
        prepare_source(folder, pack, cold_share=0.5)


def test_ratings_are_not_trained_on_before_they_are_split(tmp_path):
    folder = write_ratings(tmp_path / "my data", "dat", make_events())
    command = f"python -m apps.clcrec prepare '{folder}' 'my data.safetensors' --cold-share 0.2"
    with pytest.raises(DataError, match=re.escape(command)):
        read_data(folder)
    (fault,) = check_source(folder)
    assert command in fault.repair


def test_a_changed_rating_makes_a_pack_stale_and_the_command_repeats_the_split(tmp_path):
    folder = write_ratings(tmp_path / "data", "csv", make_events())
    pack = tmp_path / "a.safetensors"
    prepare_source(folder, pack, cold_share=0.25, seed=9, min_rating=2)
    with (folder / "ratings.csv").open("a") as file:
        file.write("2,3,5.0,97830\n")
    with pytest.raises(DataError, match=r"ratings\.csv has changed") as caught:
        read_data(pack)
    assert re.search(r"prepare \S+ \S+ --cold-share 0.25 --seed 9 --min-rating 2$", str(caught.value))


def test_other_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    pack = tmp_path / "a.safetensors"
    for form in ("csv", "inter"):
        folder = write_ratings(tmp_path / form, form, make_events(tokens=True))
        expected = prepare_source(folder, pack)
        for path in folder.iterdir():
            text = path.read_bytes().replace(b"\r\n", b"\n")
            path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n")
        found = prepare_source(folder, pack)
        assert_same(dataclasses.replace(found, fingerprint=expected.fingerprint), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Features of new items


def test_features_of_new_items_are_read_in_every_form(tmp_path):
    v, a = torch.rand(3, 4), torch.rand(3, 2)
    write_files(tmp_path, {"feat_v.npy": v.double().numpy(), "feat_a.pt": a.bfloat16()})
    content = read_content(tmp_path, modalities=("v", "a"), widths={"v": 4, "a": 2, "t": 9})
    assert list(content) == ["v", "a"]
    assert torch.equal(content["v"], v)
    assert torch.equal(content["a"], a.bfloat16().float())
    assert list(read_content(tmp_path, modalities=("a",), widths={"a": 2})) == ["a"]


@pytest.mark.parametrize(
    ("files", "modalities", "text"),
    [
        ({"feat_v.npy": np.ones((3, 4))}, ("v", "a"), r"feat_a\.npy: error: .*no such file"),
        ({"feat_v.npy": np.ones((3, 4))}, ("v", "t"), "as lists of words"),
        ({"feat_v.npy": np.ones((3, 5))}, ("v",), r"feat_v\.npy: error: expected 4 columns.*found 5 columns"),
        ({"feat_v.npy": np.ones((3, 4)), "feat_a.pt": torch.ones(2, 2)}, ("v", "a"), r"feat_a\.pt.*expected 3 rows"),
        ({"feat_v.npy": np.array([[1, 2, 3, np.nan]])}, ("v",), r"feat_v\.npy\[0\]: error: column 3: .*found nan"),
        ({"feat_v.npy": np.ones((0, 4))}, ("v",), "floats of shape"),
        ({"feat_v.npy": np.ones((3, 4), dtype="i8")}, ("v",), "floats of shape"),
        ({"feat_v.npy": b"damaged"}, ("v",), r"feat_v\.npy: error"),
        ({"feat_v.npy": np.ones((3, 4)), "feat_v.pt": torch.ones(3, 4)}, ("v",), "delete one of the two"),
    ],
)
def test_faults_of_new_items_are_named(tmp_path, files, modalities, text):
    write_files(tmp_path, files)
    with pytest.raises(DataError, match=text):
        read_content(tmp_path, modalities=modalities, widths={"v": 4, "a": 2})


def test_words_of_new_items_are_refused(tmp_path):
    write_files(tmp_path, {"feat_t.pt": torch.zeros(2, 5, dtype=torch.int64)})
    with pytest.raises(DataError, match="words are not read here"):
        read_content(tmp_path, modalities=("t",), widths={"t": 5})
    with pytest.raises(DataError, match=r"feat_v\.npy: error: .*no such file"):
        read_content(tmp_path / "absent", modalities=("v",), widths={"v": 4})


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@pytest.mark.parametrize(
    ("name", "counts", "held_out", "modalities"),
    [
        ("citeulike-clcrec", (5551, 13_584, 3396, 132_073), (36_273, 36_640), ("a", "t")),
        ("movielens-clcrec", (55_485, 5119, 867, 922_007), (149_366, 174_487), ()),
    ],
)
def test_real_folders_have_the_known_counts(real_data, name, counts, held_out, modalities):
    data = read_data(real_data(name))
    assert (data.num_users, data.num_warm, data.num_items - data.num_warm, data.num_pairs) == counts
    assert (data.valid.item.numel(), data.test.item.numel()) == held_out
    assert data.known.item.numel() == counts[3] + sum(held_out)
    assert data.modalities == modalities
    assert_well_formed(data)


def test_citeulike_is_read_as_the_obvious_reader_reads_it(real_data, tmp_path):
    path = real_data("citeulike-clcrec")
    data = read_data(path)
    folder = tmp_path / "without features"
    folder.mkdir()
    for file in path.glob("[!f]*.npy"):  # of the features loops would make millions of numbers
        (folder / file.name).symlink_to(file)
    assert as_raw(dataclasses.replace(data, content={})) == slow_read(folder)
    for modality, matrix in data.content.items():
        assert np.array_equal(matrix.numpy(), np.load(path / f"feat_{modality}.npy"))
    assert all(fault.severity == "warning" for fault in check_source(path))


def test_ml_100k_is_split(real_data, tmp_path):
    path = real_data("ml-100k")
    data = prepare_source(path, tmp_path / "a.safetensors", cold_share=0.2)
    assert (data.num_users, data.num_items, data.num_items - data.num_warm) == (943, 1682, 336)
    assert data.known.item.numel() == 100_000
    assert_same(read_data(tmp_path / "a.safetensors"), data)
    assert all(fault.severity == "warning" for fault in check_source(tmp_path / "a.safetensors"))
    assert fingerprint([path / "ml-100k.inter"]) != data.fingerprint
