"""Lists, events, folders and packs are read as a few lines of plain Python would read them."""

import dataclasses
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.graphrec import formats
from apps.graphrec.dataset import Interactions
from apps.graphrec.formats import DataError, check_source, cut_validation, prepare_source, read_data
from shared.ranking import Lists
from shared.tokens import tokenise

Table = dict[int, list[int]]  # user -> items


def write_lists(folder: Path, **parts: Table) -> Path:
    """A folder in LightGCN's form."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in parts.items():
        rows = [" ".join(map(str, [user, *items])) for user, items in table.items()]
        (folder / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


def make_parts(seed: int = 0, *, num_users: int = 12, num_items: int = 30) -> dict[str, Table]:
    """Three parts that share no pair; users in any order, some without an item, some without a line."""
    draw = random.Random(seed)
    parts: dict[str, Table] = {"train": {}, "valid": {}, "test": {}}
    for user in draw.sample(range(num_users), num_users - 2):
        mine = draw.sample(range(num_items), draw.randint(3, 12))
        parts["train"][user] = mine[2:]
        parts["valid"][user] = mine[:1]
        if draw.random() < 0.8:
            parts["test"][user] = mine[1:2] if draw.random() < 0.8 else []
    parts["test"].setdefault(0, [])
    parts["test"][num_users - 1] = [num_items - 1]
    return parts


def sets_of(lists: Lists) -> list[set[int]]:
    """The items of every user; asserts that they are rising."""
    assert lists.ptr.dtype == torch.int64
    assert lists.item.dtype == torch.int32
    rows = [part.tolist() for part in torch.split(lists.item, lists.ptr.diff().tolist())]
    assert all(row == sorted(set(row)) for row in rows)
    return [set(row) for row in rows]


def raw_pairs(data: Interactions, *names: str) -> set[tuple[str, str]]:
    """The pairs of some parts by the ids of the source."""
    return {
        (data.user_ids[user], data.item_ids[item])
        for name in names or ("train", "valid", "test")
        for user, items in enumerate(sets_of(getattr(data, name)))
        for item in items
    }


def table_pairs(*tables: Table) -> set[tuple[str, str]]:
    return {(str(user), str(item)) for table in tables for user, items in table.items() for item in items}


def assert_same(a: Interactions, b: Interactions) -> None:
    """Every value of both is equal, types included."""
    for field in dataclasses.fields(Interactions):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, dict):
            assert list(left) == list(right)
            left, right = list(left.values()), list(right.values())
        for x, y in zip(flat(left), flat(right), strict=True):
            assert type(x) is type(y), field.name
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype, field.name
                assert torch.equal(x, y), field.name
            else:
                assert x == y, field.name


def flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value]


def num_held_out(count: int, share: float, taken: int = 0) -> int:
    """Rounded down, but at least one, and one is always left to train on."""
    return max(0, min(max(1, math.floor(share * count + 1e-9)) if share else 0, count - taken - 1))


# ---------------------------------------------------------------------------------------------------------------------
# LightGCN's folder


@pytest.mark.parametrize("block", [1, 5, 64, 1 << 20])
def test_a_folder_is_read_as_the_obvious_reader_reads_it(tmp_path, monkeypatch, block):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
    for seed in range(3):
        parts = make_parts(seed)
        data = read_data(write_lists(tmp_path / str(seed), **parts))
        for name, table in parts.items():
            assert raw_pairs(data, name) == table_pairs(table)
        assert (data.num_users, data.num_items) == (12, 30)
        assert data.user_ids == tuple(map(str, range(12)))
        assert data.item_ids == tuple(map(str, range(30)))
        assert (data.content, data.is_cold, data.name) == ({}, None, str(seed))
        assert data.split == "the source's train.txt, valid.txt and test.txt"


@pytest.mark.parametrize("block", [3, 10, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_marks_blanks_and_empty_ends_change_nothing(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
    parts = make_parts(4)
    plain = read_data(write_lists(tmp_path / "plain", **parts))
    folder = write_lists(tmp_path / "other", **parts)
    for n, path in enumerate(sorted(folder.iterdir())):
        rows = path.read_text().splitlines()
        blanks = [row.replace(" ", "\t" if n % 2 else "  ") + " " * (n % 3) for row in rows]
        path.write_bytes(b"\xef\xbb\xbf" * (n % 2) + end.join(blanks).encode() + end.encode() * (2 * n))
    other = read_data(folder)
    assert_same(dataclasses.replace(other, fingerprint=plain.fingerprint, name=plain.name), plain)
    assert {fault.severity for fault in check_source(folder)} <= {"warning"}


def test_users_and_items_are_counted_by_the_largest_id_of_any_part(tmp_path):
    data = read_data(write_lists(tmp_path, train={0: [1], 2: [0, 5]}, test={0: [7], 4: [], 2: [3]}, valid={6: [2]}))
    assert (data.num_users, data.num_items) == (7, 8)
    assert sets_of(data.train) == [{1}, set(), {0, 5}, set(), set(), set(), set()]
    assert sets_of(data.test) == [{7}, set(), {3}, set(), set(), set(), set()]
    assert sets_of(data.valid)[6] == {2}


def test_repeated_items_and_several_lines_of_a_user_are_joined(tmp_path):
    (tmp_path / "train.txt").write_text("0 1 2 1\n1 3\n0 4 2\n")
    (tmp_path / "test.txt").write_text("0 3 3\n")
    data = read_data(tmp_path, valid_share=0)
    assert sets_of(data.train) == [{1, 2, 4}, {3}]
    assert sets_of(data.test) == [{3}, set()]


def test_lists_of_names_give_the_raw_ids_and_the_sizes(tmp_path):
    folder = write_lists(tmp_path, train={0: [1, 0], 1: [2]}, test={0: [2]}, valid={1: [1]})
    (folder / "user_list.txt").write_text("org_id remap_id\nanna 1\nbert 0\ncleo 2\n")
    (folder / "item_list.txt").write_text("remap_id org_id note\n2 B00 x\n0 A17 y\n1 17 z\n3 C z\n")
    data = read_data(folder)
    assert data.user_ids == ("bert", "anna", "cleo")
    assert data.item_ids == ("A17", "17", "B00", "C")
    assert raw_pairs(data, "train") == {("bert", "17"), ("bert", "A17"), ("anna", "B00")}
    assert len(data.train.ptr) == 4


def test_without_valid_txt_the_cut_is_that_of_cut_validation(tmp_path):
    parts = make_parts(1)
    del parts["valid"]
    folder = write_lists(tmp_path, **parts)
    whole = read_data(folder, valid_share=0)
    assert raw_pairs(whole, "train") == table_pairs(parts["train"])
    assert whole.valid.item.numel() == 0
    assert whole.split == "the source's train.txt and test.txt"
    data = read_data(folder, valid_share=0.3, seed=5)
    assert_same(data, cut_validation(whole, share=0.3, seed=5))
    assert raw_pairs(data, "train", "valid") == table_pairs(parts["train"])
    assert not raw_pairs(data, "train") & raw_pairs(data, "valid")
    assert raw_pairs(data, "test") == table_pairs(parts["test"])
    assert "0.3 of each user's training items cut for validation (seed 5)" in data.split


def test_the_fingerprint_follows_content_and_cut_but_not_the_folder(tmp_path):
    parts = make_parts(2)
    del parts["valid"]
    first = write_lists(tmp_path / "a", **parts)
    second = shutil.copytree(first, tmp_path / "b")
    assert read_data(first).fingerprint == read_data(second).fingerprint
    found = {read_data(first, valid_share=share, seed=seed).fingerprint for share in (0, 0.1, 0.2) for seed in (1, 2)}
    assert len(found) == 5  # nothing is drawn for a share of 0
    (second / "test.txt").write_text("0 3\n")
    assert read_data(first).fingerprint != read_data(second).fingerprint


# The cut


def make_interactions(rows: list[list[int]], *, num_items: int = 100) -> Interactions:
    ptr = torch.tensor([0, *map(len, rows)]).cumsum(0)
    empty = Lists(torch.zeros_like(ptr), torch.empty(0, dtype=torch.int32))
    train = Lists(ptr, torch.tensor([item for row in rows for item in sorted(row)], dtype=torch.int32))
    ids = tuple(map(str, range(num_items)))
    users = tuple(map(str, range(len(rows))))
    return Interactions(train, empty, empty, {}, None, ids, users, "0" * 32, "small", "given")


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.99])
def test_the_cut_takes_the_share_of_each_user_and_leaves_one_item(share):
    draw = random.Random(0)
    rows = [draw.sample(range(100), n) for n in (0, 1, 2, 3, 5, 9, 10, 11, 50, 100)]
    cut = cut_validation(make_interactions(rows), share=share, seed=3)
    for row, train, valid in zip(rows, sets_of(cut.train), sets_of(cut.valid), strict=True):
        assert train | valid == set(row)
        assert not train & valid
        assert len(valid) == num_held_out(len(row), share)


def test_a_users_cut_depends_on_the_seed_and_the_user_alone():
    draw = random.Random(1)
    rows = [draw.sample(range(100), 20) for _ in range(30)]
    first = sets_of(cut_validation(make_interactions(rows), share=0.25, seed=3).valid)
    changed = [row if user == 7 else draw.sample(range(100), draw.randint(0, 40)) for user, row in enumerate(rows)]
    assert sets_of(cut_validation(make_interactions(changed), share=0.25, seed=3).valid)[7] == first[7]
    state = torch.get_rng_state()
    again = cut_validation(make_interactions(rows), share=0.25, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert sets_of(again.valid) == first
    other = sets_of(cut_validation(make_interactions(rows), share=0.25, seed=4).valid)
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 25
    same = [rows[0]] * 30  # users with equal items have cuts of their own
    assert (
        len({tuple(sorted(row)) for row in sets_of(cut_validation(make_interactions(same), share=0.25, seed=3).valid)})
        > 25
    )


def test_every_place_of_a_list_is_cut_equally_often():
    rows = [list(range(10))] * 4000
    valid = cut_validation(make_interactions(rows), share=0.2, seed=0).valid.item
    counts = torch.bincount(valid.long(), minlength=10).double()
    assert int(counts.sum()) == 8000
    chi_square = float(((counts - 800) ** 2 / 800).sum())
    assert 1 < chi_square < 27.9  # 9 degrees of freedom: 0.1 % either way


def test_a_share_of_zero_cuts_nothing_and_a_second_cut_is_refused():
    data = make_interactions([[1, 2, 3], [4, 5]])
    assert cut_validation(data, share=0, seed=1) is data
    with pytest.raises(DataError, match="has a validation part already"):
        cut_validation(cut_validation(data, share=0.5, seed=1), share=0.5, seed=1)


# ---------------------------------------------------------------------------------------------------------------------
# Events


def make_events(seed: int, *, num_users: int = 9, num_items: int = 25) -> list[tuple[str, str, float, int]]:
    """Events of all users in random order, some repeated, times with ties."""
    draw = random.Random(seed)
    events = []
    for user in range(num_users):
        for item in draw.choices(range(num_items), k=draw.randint(1, 30)):
            events.append((str(user * 3), f"{item + 5}", draw.randint(1, 10) / 2, draw.randint(0, 60)))
    draw.shuffle(events)
    return events


def write_text(path: Path, events: list[tuple[str, str, float, int]], *, fields: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, event[:fields])) + "\n" for event in events))
    return path


def write_inter(path: Path, events: list[tuple[str, str, float, int]]) -> Path:
    """Columns in another order than ours, and one more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{rating}\t{item}\tx y\t{time}\t{user}\n" for user, item, rating, time in events]
    path.write_text("rating:float\titem_id:token\tnote:token_seq\ttimestamp:float\tuser_id:token\n" + "".join(rows))
    return path


@pytest.mark.parametrize("block", [7, 100, 1 << 20])
@pytest.mark.parametrize("fields", [2, 3, 4])
def test_text_is_split_into_parts_that_hold_every_pair_once(tmp_path, monkeypatch, fields, block):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
    for seed in range(2):
        events = make_events(seed)
        data = read_data(write_text(tmp_path / f"{seed}.txt", events, fields=fields), valid_share=0.2)
        assert raw_pairs(data) == {event[:2] for event in events}
        train, valid, test = (sets_of(part) for part in (data.train, data.valid, data.test))
        for parts in zip(train, valid, test, strict=True):
            count = sum(map(len, parts))
            num_test = num_held_out(count, 0.1)
            sizes = [
                count - num_test - num_held_out(count, 0.2, num_test),
                num_held_out(count, 0.2, num_test),
                num_test,
            ]
            assert [len(part) for part in parts] == sizes
        assert data.user_ids == tuple(sorted({user for user, *_ in events}, key=int))
        assert data.item_ids == tuple(sorted({item for _, item, *_ in events}, key=int))
        assert data.name == f"{seed}.txt"
        assert data.split == "0.1 of each user's items for the test, 0.2 for validation, at random (seed 42)"


def test_an_inter_file_is_read_as_text_with_the_same_events_is(tmp_path):
    events = make_events(3)
    text, inter = write_text(tmp_path / "a.txt", events), write_inter(tmp_path / "b" / "b.inter", events)
    for options in ({}, {"split": "time"}, {"min_rating": 3.0, "seed": 1}):
        expected, found = read_data(text, **options), read_data(inter.parent, **options)
        assert_same(dataclasses.replace(found, fingerprint=expected.fingerprint, name=expected.name), expected)


def test_a_random_split_does_not_depend_on_the_order_of_the_lines(tmp_path):
    events = make_events(4)
    first = read_data(write_text(tmp_path / "a.txt", events))
    second = read_data(write_text(tmp_path / "b.txt", sorted(events)))
    assert_same(dataclasses.replace(second, fingerprint=first.fingerprint, name=first.name), first)
    other = read_data(tmp_path / "a.txt", seed=43)
    assert raw_pairs(other) == raw_pairs(first)
    assert raw_pairs(other, "test") != raw_pairs(first, "test")


def test_a_split_by_time_tests_on_each_users_last_items(tmp_path):
    for seed in range(3):
        events = make_events(seed)
        data = read_data(write_text(tmp_path / f"{seed}.txt", events), split="time", valid_share=0.2)
        parts: dict[str, set[tuple[str, str]]] = {"train": set(), "valid": set(), "test": set()}
        for user in {event[0] for event in events}:
            ordered = sorted((event for event in events if event[0] == user), key=lambda event: event[3])
            items = list(dict.fromkeys(item for _, item, _, _ in ordered))  # of repeated ones the first
            num_test = num_held_out(len(items), 0.1)
            num_valid = num_held_out(len(items), 0.2, num_test)
            names = ["train"] * (len(items) - num_test - num_valid) + ["valid"] * num_valid + ["test"] * num_test
            for name, item in zip(names, items, strict=True):
                parts[name].add((user, item))
        for name, pairs in parts.items():
            assert raw_pairs(data, name) == pairs
        assert data.split.endswith("0.2 for validation, by time")


def test_ratings_below_the_smallest_do_not_count(tmp_path):
    events = [*make_events(5), ("77", "99", 1.0, 3)]
    lines: list[str] = []
    path = write_text(tmp_path / "a.txt", events)
    data = prepare_source(path, tmp_path / "a.safetensors", min_rating=3, say=lines.append)
    kept = [event for event in events if event[2] >= 3]
    assert raw_pairs(data) == {event[:2] for event in kept}
    assert "77" not in data.user_ids
    assert "99" not in data.item_ids
    assert "ratings from 3" in data.split
    below, repeated = len(events) - len(kept), len(kept) - len(raw_pairs(data))
    assert lines[0] == f"{below} ratings of {len(events)} below 3 left out"
    assert lines[1] == f"{repeated} repeated events left out"
    for line, ids, kind in zip(lines[2:], (data.user_ids, data.item_ids), (0, 1), strict=True):
        gone = {event[kind] for event in events} - set(ids)
        assert (
            line == f"{len(gone)} {('user', 'item')[kind]}{'s' * (len(gone) > 1)} left out: nothing of theirs is left"
        )


def test_ids_are_ordered_by_value_where_all_are_integers_and_else_by_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("10 9\n-2 10\n10 10\n9 9\n9 11\n")
    data = read_data(path)
    assert data.user_ids == ("-2", "9", "10")
    assert data.item_ids == ("9", "10", "11")
    rows = ["10 b", "9 7", "9 b", "10 07", "x 7", "x 07", "10 7", "u\u00e9 7", "u\u00e9 b"]
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    for block in (4, 12, 1 << 20):
        monkeypatch.setattr(formats, "_BLOCK_BYTES", block)
        data = read_data(path)
        assert data.user_ids == ("10", "9", "u\u00e9", "x")
        assert data.item_ids == ("07", "7", "b")
        assert raw_pairs(data) == {(user, item) for user, item in (row.split() for row in rows)}


def test_users_with_few_items_train_first_and_are_tested_next(tmp_path):
    rows = [(user, item) for user, count in enumerate((1, 2, 3, 4)) for item in range(count)]
    (tmp_path / "a.txt").write_text("".join(f"{user} {item}\n" for user, item in rows))
    data = read_data(tmp_path / "a.txt")
    sizes = [[len(items) for items in sets_of(part)] for part in (data.train, data.valid, data.test)]
    assert sizes == [[1, 1, 1, 2], [0, 0, 1, 1], [0, 1, 1, 1]]
    without = read_data(tmp_path / "a.txt", valid_share=0)
    assert without.valid.item.numel() == 0
    assert sets_of(without.test) == sets_of(data.test)


def test_numbers_are_those_that_python_reads():
    texts = ["0", "1", "-1", "3.5", "-0.25", "5.", ".5", "007", "12345678901234567890", "0.1", "881250949", "4.35"]
    texts += [
        "123456789012345",
        "1234567890123456",
        "1e3",
        "-1E-2",
        "+7",
        "1.7976931348623157e308",
        "0.30000000000000004",
    ]
    odd = ["", "-", ".", "-.", "1.2.3", "1_000", "abc", "--1", "1-", "nan"]
    table = tokenise("\t".join([*texts, *odd]).encode(), tabs=True)
    found = formats._numbers(table, torch.arange(len(texts) + len(odd)))
    assert found[: len(texts)].tolist() == [float(text) for text in texts]
    assert bool(found[len(texts) :].isnan().all())


# ---------------------------------------------------------------------------------------------------------------------
# CLCRec's folder


@pytest.fixture
def clcrec(tmp_path):
    """A function that writes a small folder in CLCRec's layout, and the obvious reader of it."""
    pytest.importorskip("numpy")
    from tests.clcrec.test_clcrec_formats import make_files, slow_read, write_files

    def write(name: str = "cold", **files: Any) -> Path:
        made = make_files(warm_first=False) | {f"{key}.npy": value for key, value in files.items()}
        return write_files(tmp_path / name, {key: value for key, value in made.items() if value is not None})

    return write, slow_read


def test_a_clcrec_folder_is_read_with_its_own_parts_cold_items_and_content(clcrec):
    write, slow_read = clcrec
    folder = write()
    data, expected = read_data(folder), slow_read(folder)
    for name in ("train", "valid", "test"):
        assert raw_pairs(data, name) == {(str(user), str(item)) for user, item in expected[name]}
    assert data.is_cold is not None
    groups = {
        group: sorted(
            int(i) for i, cold in zip(data.item_ids, data.is_cold.tolist(), strict=True) if cold == (group == "cold")
        )
        for group in ("warm", "cold")
    }
    assert groups == {"warm": expected["warm"], "cold": expected["cold"]}
    for modality, matrix in data.content.items():
        rows = dict(zip(map(int, data.item_ids), matrix.tolist(), strict=True))
        assert rows == expected["content"][modality]
    assert list(data.content) == ["v", "a", "t"]
    assert data.user_ids == tuple(map(str, range(9)))
    assert data.split == "the folder's train, val and test files"
    assert check_source(folder) == []


def test_words_are_left_out_with_a_warning(clcrec, tmp_path):
    import numpy as np

    write, _ = clcrec
    folder = write(feat_t=np.array([[0, 1, 16], [4, 2, 4]]))
    assert list(read_data(folder).content) == ["v", "a"]
    (fault,) = check_source(folder)
    assert (fault.severity, Path(fault.file).name) == ("warning", "feat_t.npy")
    assert "left out" in fault.repair
    lines: list[str] = []
    prepare_source(folder, tmp_path / "a.safetensors", say=lines.append)
    assert lines[0].startswith("feat_t.npy left out: it holds lists of words")


def test_pairs_that_a_folder_repeats_count_once(clcrec):
    import numpy as np

    write, slow_read = clcrec
    train = np.load(write("first") / "train.npy")
    folder = write(train=np.concatenate([train, train[:3]]))
    assert read_data(folder).num_pairs == len(set(slow_read(folder)["train"]))


# ---------------------------------------------------------------------------------------------------------------------
# Packs


@pytest.fixture
def lists(tmp_path) -> Path:
    parts = make_parts(6)
    del parts["valid"]
    return write_lists(tmp_path / "lists", **parts)


def test_a_pack_holds_what_was_read(tmp_path, clcrec, lists):
    write, _ = clcrec
    sources: dict[str, tuple[Path, dict[str, Any]]] = {
        "lists": (lists, {"valid_share": 0.3, "seed": 1}),
        "text": (write_text(tmp_path / "a.txt", make_events(1)), {"min_rating": 2, "split": "time"}),
        "inter": (write_inter(tmp_path / "a.inter", make_events(2)), {}),
        "clcrec": (write(), {}),
    }
    for name, (source, options) in sources.items():
        pack = tmp_path / "packs" / f"{name}.safetensors"
        made = prepare_source(source, pack, **options)
        assert_same(made, read_data(source, **options))
        assert_same(read_data(pack), made)
        assert {fault.severity for fault in check_source(pack)} <= {"warning"}
    assert_same(
        read_data(tmp_path / "packs" / "text.safetensors", min_rating=2, split="time"),
        read_data(sources["text"][0], min_rating=2, split="time"),
    )


def test_a_pack_needs_its_source_no_more(tmp_path, lists):
    made = prepare_source(lists, tmp_path / "a.safetensors")
    shutil.rmtree(lists)
    assert_same(read_data(tmp_path / "a.safetensors"), made)


def test_a_pack_and_its_source_can_be_moved_together(tmp_path, lists):
    prepare_source(lists, tmp_path / "packs" / "a.safetensors")
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(lists, moved / "lists")
    shutil.move(tmp_path / "packs", moved / "packs")
    read_data(moved / "packs" / "a.safetensors")
    with (moved / "lists" / "train.txt").open("a") as file:
        file.write("9 1\n")
    with pytest.raises(DataError, match=r"train\.txt has changed"):
        read_data(moved / "packs" / "a.safetensors")


def test_a_touched_but_equal_source_is_no_change(tmp_path, lists):
    prepare_source(lists, tmp_path / "a.safetensors")
    os.utime(lists / "train.txt", (1, 1))
    read_data(tmp_path / "a.safetensors")


def test_the_command_that_renews_a_pack_repeats_its_choices(tmp_path, lists):
    pack = tmp_path / "a b.safetensors"
    prepare_source(lists, pack, valid_share=0.2, seed=9)
    (lists / "valid.txt").write_text("0 3\n")
    with pytest.raises(DataError) as raised:
        read_data(pack)
    text = str(raised.value)
    assert "valid.txt is new" in text
    command = f"python -m apps.graphrec prepare {lists} '{pack}' --format lightgcn --valid-share 0.2 --seed 9"
    assert text.endswith(f"write it again: {command}")
    text_file = write_text(tmp_path / "events.txt", make_events(0))
    prepare_source(text_file, pack, min_rating=2.5, split="time")
    write_text(text_file, make_events(1))
    (fault,) = check_source(pack)
    flags = "--format text --valid-share 0.1 --seed 42 --min-rating 2.5 --split time"
    assert fault.repair == f"write it again: python -m apps.graphrec prepare {text_file} '{pack}' {flags}"


def test_choices_that_a_pack_was_not_made_with_are_refused(tmp_path):
    source = write_text(tmp_path / "a.txt", make_events(0))
    prepare_source(source, tmp_path / "a.safetensors", min_rating=2)
    for options in ({"min_rating": 3}, {"split": "time"}):
        with pytest.raises(DataError, match="made with --min-rating 2 and --split random"):
            read_data(tmp_path / "a.safetensors", **options)


def test_what_prepare_did_is_said(tmp_path, lists):
    lines: list[str] = []
    data = prepare_source(lists, tmp_path / "a.safetensors", say=lines.append)
    assert lines == [f"{data.valid.item.numel()} pairs of train.txt cut for validation: the folder has no valid.txt"]
    (lists / "valid.txt").write_text("11 3\n")
    prepare_source(lists, tmp_path / "a.safetensors", say=lines.append)
    assert "is split already; its split is kept" in lines[1]


# ---------------------------------------------------------------------------------------------------------------------
# Which form a path has


def test_the_form_follows_from_the_files(tmp_path, clcrec):
    write, _ = clcrec
    events = make_events(0)
    for name in ("ratings.txt", "ratings.dat", "ratings"):
        assert read_data(write_text(tmp_path / name, events)).num_users == 9
    only = tmp_path / "only"
    write_text(only / "ratings.txt", events)
    (only / "notes.md").write_text("x")
    (only / ".hidden.txt").write_text("x")
    assert raw_pairs(read_data(only)) == raw_pairs(read_data(only / "ratings.txt"))
    prepare_source(only, tmp_path / "packed" / "a.safetensors")
    assert_same(read_data(tmp_path / "packed"), read_data(only))
    assert read_data(write()).is_cold is not None


def test_a_form_can_be_forced(tmp_path):
    events = make_events(0)
    path = write_inter(tmp_path / "a.txt", events)
    assert raw_pairs(read_data(path, format="inter")) == {event[:2] for event in events}
    mixed = write_lists(tmp_path / "mixed", **make_parts(0))
    write_inter(mixed / "b.inter", events)
    assert read_data(mixed).num_users == 12
    assert read_data(mixed, format="inter").num_users == 9


# ---------------------------------------------------------------------------------------------------------------------
# Real data


def test_gowalla_has_the_published_sizes(real_data):
    data = read_data(real_data("gowalla"), valid_share=0)
    assert (data.num_users, data.num_items) == (29_858, 40_981)
    assert (data.num_pairs, data.test.item.numel()) == (810_128, 217_242)
    cut = cut_validation(data, share=0.1, seed=42)
    count = data.train.ptr.diff()
    assert torch.equal(cut.valid.ptr.diff(), (count // 10).clamp(min=1))
    assert int(cut.train.ptr.diff().min()) >= 7
    with (real_data("gowalla") / "train.txt").open() as file:
        for user, line in zip(range(200), file, strict=False):
            assert set(map(int, line.split()[1:])) == set(
                data.train.item[data.train.ptr[user] : data.train.ptr[user + 1]].tolist()
            )


def test_gowalla_has_no_fault(real_data):
    assert check_source(real_data("gowalla")) == []


def test_citeulike_is_read_with_cold_items_and_content(real_data):
    data = read_data(real_data("citeulike-clcrec"))
    assert (data.num_users, data.num_items, data.num_pairs) == (5_551, 16_980, 132_073)
    assert data.is_cold is not None
    assert int(data.is_cold.sum()) == 3_396
    assert not bool(data.is_cold[data.train.item.long()].any())
    assert {m: tuple(x.shape) for m, x in data.content.items()} == {"a": (16_980, 64), "t": (16_980, 200)}
    assert check_source(real_data("citeulike-clcrec")) == []


def test_movielens_is_read_without_content_and_without_what_follows_from_the_rest(real_data, tmp_path):
    source = real_data("movielens-clcrec")
    for name in ("train", "val_full", "test_full", "warm_set", "cold_set"):
        (tmp_path / f"{name}.npy").symlink_to(source / f"{name}.npy")
    data = read_data(tmp_path)
    assert (data.num_users, data.num_items, data.num_pairs) == (55_485, 5_986, 922_007)
    assert data.is_cold is not None
    assert int(data.is_cold.sum()) == 867
    assert data.content == {}


def test_ml_100k_is_split_by_user(real_data):
    data = read_data(real_data("ml-100k"))
    assert (data.num_users, data.num_items) == (943, 1_682)
    assert data.num_pairs + data.valid.item.numel() + data.test.item.numel() == 100_000
    count = data.train.ptr.diff() + data.valid.ptr.diff() + data.test.ptr.diff()
    for part in (data.valid, data.test):
        assert torch.equal(part.ptr.diff(), count // 10)
    liked = read_data(real_data("ml-100k"), min_rating=4, split="time")
    assert liked.num_pairs + liked.valid.item.numel() + liked.test.item.numel() == 55_375
