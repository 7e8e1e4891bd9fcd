"""Every accepted form is read as a few lines of plain Python would read it, on generated and on real data."""

import dataclasses
import os
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from apps.seqrec.dataset import Sequences
from apps.seqrec.formats import DataError, detect_format, read_sequences, write_sequences
from shared.files import fingerprint


def slow_read(path: Path, form: str) -> dict[str, list[tuple[str, float | None]]]:
    """Item and time of each event of each user, in time order: the obvious reader."""
    events = defaultdict(list)
    lines = path.read_text(encoding="utf-8-sig").strip().split("\n")
    if form == "inter":
        names = [field.split(":")[0] for field in lines[0].split("\t")]
        for line in lines[1:]:
            row = dict(zip(names, line.split("\t"), strict=True))
            events[row["user_id"]].append((row["item_id"], float(row["timestamp"]) if "timestamp" in row else None))
    for line in lines if form == "pairs" else []:
        user, item, *time = line.split()
        events[user].append((item, float(time[0]) if time else None))
    for line in lines if form == "lines" else []:
        user, *items = line.split()
        events[user] += [(item, None) for item in items]
    for user in events:
        events[user].sort(key=lambda event: event[1] or 0)  # Python's sort is stable; without times all are equal
    return dict(events)


def as_dict(sequences: Sequences) -> dict[str, list[tuple[str, float | None]]]:
    """The tensors in the same form, times in whole seconds."""
    ptr, item = sequences.ptr.tolist(), sequences.item.tolist()
    time = [None] * len(item) if sequences.time is None else sequences.time.tolist()
    return {
        user: [(sequences.item_ids[item[e] - 1], time[e]) for e in range(ptr[u], ptr[u + 1])]
        for u, user in enumerate(sequences.user_ids)
    }


def whole_seconds(events):
    return {u: [(i, None if t is None else int(t // 1)) for i, t in rows] for u, rows in events.items()}


def assert_well_formed(sequences: Sequences) -> None:
    assert sequences.ptr.dtype == torch.int64
    assert sequences.item.dtype == torch.int32
    assert sequences.time is None or sequences.time.dtype == torch.int64
    assert sequences.ptr[0] == 0
    assert sequences.ptr[-1] == sequences.num_events
    assert sorted(set(sequences.item.tolist())) == list(range(1, sequences.num_items + 1))
    assert len(set(sequences.item_ids)) == sequences.num_items
    assert len(set(sequences.user_ids)) == sequences.num_users


def make_id(draw: random.Random, kind: str, count: int) -> str:
    number = draw.randint(1, count)
    if kind == "integers":
        return str(number * 7)
    if kind == "long":
        return str(10**17 + number)
    if kind == "tokens":
        return f"B{number:04d}x"
    return draw.choice([str(number), f"{number:05d}", f"+{number}", f"u{number}", "\u00e9" * number])


def write_random(path: Path, form: str, *, seed: int, ids: str, timed: bool = False, fractions: bool = False) -> None:
    draw = random.Random(seed)
    rows = [(make_id(draw, ids, 9), make_id(draw, ids, 15)) for _ in range(200)]
    times = [draw.randint(1000, 1020) + (draw.randint(0, 3) / 4 if fractions else 0) for _ in rows]
    if form == "lines":
        users = defaultdict(list)
        for user, item in rows:
            users[user].append(item)
        lines = [" ".join([user, *items]) for user, items in users.items()]
    elif form == "inter":
        columns = ["rating:float", "item_id:token", "user_id:token", *(["timestamp:float"] if timed else [])]
        lines = ["\t".join(columns)]
        for (user, item), time in zip(rows, times, strict=True):
            lines.append("\t".join(["3.5", item, user, *([str(time)] if timed else [])]))
    else:
        lines = [
            f"{user}{draw.choice([' ', '  ', chr(9)])}{item}" + (f" {time}" if timed else "")
            for (user, item), time in zip(rows, times, strict=True)
        ]
    path.write_bytes(("\n".join(lines) + "\n").encode())


FORMS = [
    ("pairs", "a.txt", False, False),
    ("pairs", "a.txt", True, False),
    ("pairs", "a.txt", True, True),
    ("lines", "a.txt", False, False),
    ("inter", "a.inter", False, False),
    ("inter", "a.inter", True, False),
    ("inter", "a.inter", True, True),
]


@pytest.mark.parametrize("ids", ["integers", "long", "tokens", "mixed"])
@pytest.mark.parametrize(("form", "name", "timed", "fractions"), FORMS)
def test_every_form_is_read_as_the_obvious_reader_reads_it(tmp_path, form, name, timed, fractions, ids):
    for seed in range(3):
        path = tmp_path / name
        write_random(path, form, seed=seed, ids=ids, timed=timed, fractions=fractions)
        sequences = read_sequences(path)
        assert_well_formed(sequences)
        assert as_dict(sequences) == whole_seconds(slow_read(path, form))
        assert as_dict(read_sequences(path, format=form)) == as_dict(sequences)
        assert sequences.name == name
        assert sequences.fingerprint == fingerprint([path])
        assert (sequences.time is None) is not timed


def test_integers_are_numbered_by_value_and_other_tokens_by_first_appearance(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("20 zz\n20 b\n3 zz\n100 a\n-4 b\n")
    sequences = read_sequences(path)
    assert sequences.user_ids == ("-4", "3", "20", "100")
    assert sequences.item_ids == ("zz", "b", "a")


@pytest.mark.parametrize(
    "odd", ["07", "+7", "7.0", "-7", "--7", "-07", "7_", "1_0", "7e0", "9" * 19, "1" + "0" * 64 + "7", "\u0667", "-"]
)
def test_spellings_of_one_number_stay_different_ids(tmp_path, odd):
    path = tmp_path / "a.txt"
    path.write_bytes(f"u 7\nu {odd}\nu 10\nu 7\nu {odd}\n".encode())
    assert as_dict(read_sequences(path)) == {"u": [(item, None) for item in ("7", odd, "10", "7", odd)]}


@pytest.mark.parametrize("large", [10**17, 10**18 - 1, 10**18, 2**63 - 1, 2**63, 2**64 + 7, 10**40])
def test_large_integers_stay_exact_as_ids(tmp_path, large):
    path = tmp_path / "a.txt"
    names = [str(large - 1), str(large), str(large + 1), str(-large)]
    path.write_text("".join(f"u {name}\n" for name in names))
    assert as_dict(read_sequences(path))["u"] == [(name, None) for name in names]


def test_ids_of_an_inter_file_may_hold_blanks_and_its_other_columns_anything(tmp_path):
    path = tmp_path / "a.inter"
    rows = "item_id:token\tgenre:token_seq\tuser_id:token\nThe Thing\tsci fi\tann lee\n 5\t\tbob\nThe Thing\t\t\tbob\n"
    path.write_text(rows.replace("\t\t\t", "\tx y\t"))
    sequences = read_sequences(path)
    assert as_dict(sequences) == {"ann lee": [("The Thing", None)], "bob": [(" 5", None), ("The Thing", None)]}


def test_events_of_one_moment_stay_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 9 50\n2 1 50\n1 2 50\n1 5 40\n2 2 50\n1 1 50\n")
    assert as_dict(read_sequences(path)) == {
        "1": [("5", 40), ("9", 50), ("2", 50), ("1", 50)],
        "2": [("1", 50), ("2", 50)],
    }


def test_fractions_of_a_second_order_events_and_are_then_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 3 1000.75\n1 4 1000\n1 5 1000.5\n1 6 1e3\n1 7 999.9\n")
    expected = [("7", 999), ("4", 1000), ("6", 1000), ("5", 1000), ("3", 1000)]
    assert as_dict(read_sequences(path))["1"] == expected


@pytest.mark.parametrize(("form", "name", "timed", "fractions"), FORMS)
def test_other_line_ends_a_byte_order_mark_and_blank_lines_at_the_end_change_nothing(
    tmp_path, form, name, timed, fractions
):
    plain = tmp_path / name
    write_random(plain, form, seed=5, ids="integers", timed=timed, fractions=fractions)
    (tmp_path / "other").mkdir()
    edited = tmp_path / "other" / name
    edited.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    unfinished = tmp_path / "other" / f"unfinished-{name}"
    unfinished.write_bytes(plain.read_bytes().rstrip())
    old = tmp_path / "other" / f"old-{name}"
    old.write_bytes(plain.read_bytes().replace(b"\n", b"\r"))
    expected = as_dict(read_sequences(plain))
    assert [as_dict(read_sequences(path)) for path in (edited, unfinished, old)] == [expected] * 3


def test_reading_twice_gives_equal_tensors(tmp_path):
    path = tmp_path / "a.txt"
    write_random(path, "pairs", seed=1, ids="mixed", timed=True)
    first, second = read_sequences(path), read_sequences(path)
    assert torch.equal(first.item, second.item)
    assert first.item_ids == second.item_ids
    assert first.fingerprint == second.fingerprint


# ---------------------------------------------------------------------------------------------------------------------
# Which form


@pytest.mark.parametrize(
    ("name", "text", "form", "because"),
    [
        ("a.txt", "1 5\n1 6\n", "pairs", "2 fields"),
        ("a.txt", "1 5\n2 6\n", "pairs", "2 fields"),
        ("a.txt", "1 5 100\n1 6 101\n", "pairs", "third is a time; force lines"),
        ("a.txt", "1 5 6\n2 6 5\n", "lines", "no user repeats; force pairs"),
        ("a.txt", "1 5 6\n2 6\n", "lines", "varies"),
        ("a.txt", "1 5\n1 6\n2 5\n2 6 7\n", "pairs", "most lines have 2 fields"),
        ("a.txt", "1 5 9\n1 6 9\n2 5 9\n2 6\n", "pairs", "most lines have 3 fields"),
        ("a.txt", "1 5 6 7 8\n1 6 7\n2 5\n", "lines", "varies"),
        ("a.inter", "user_id:token\titem_id:token\n1\t5\n", "inter", "ends in .inter"),
        ("a.txt", "user_id:token\titem_id:token\n1\t5\n", "inter", "header"),
        ("a.safetensors", "", "pack", "ends in .safetensors"),
    ],
)
def test_the_form_is_found_out_and_the_reason_given(tmp_path, name, text, form, because):
    path = tmp_path / name
    path.write_text(text)
    found, reason = detect_format(path)
    assert found == form
    assert because in reason


def test_a_form_can_be_forced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 5 6\n2 6 5\n")
    assert as_dict(read_sequences(path)) == {"1": [("5", None), ("6", None)], "2": [("6", None), ("5", None)]}
    assert as_dict(read_sequences(path, format="pairs")) == {"1": [("5", 6)], "2": [("6", 5)]}


def test_an_error_says_how_the_file_was_understood(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 5\n1 6\n2 5\n2 6 7\n")
    with pytest.raises(DataError, match=r"a\.txt:4: .*\(read as pairs, because most lines have 2 fields"):
        read_sequences(path)
    with pytest.raises(DataError) as caught:
        read_sequences(path, format="pairs")
    assert "read as" not in str(caught.value)


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(DataError, match="'csv'; it must be one of auto, pairs, lines, inter, pack"):
        read_sequences(tmp_path, format="csv")


def test_detecting_the_form_of_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="expected an existing file or folder"):
        detect_format(tmp_path / "absent.txt")


def test_a_folder_stands_for_its_one_readable_file(tmp_path):
    for name in ("x.inter", "x.item", "x.user", ".hidden.txt"):
        (tmp_path / name).write_text("user_id:token\titem_id:token\n1\t5\n1\t6\n")
    (tmp_path / "sub.txt").mkdir()
    sequences = read_sequences(tmp_path)
    assert sequences.name == "x.inter"
    assert detect_format(tmp_path)[0] == "inter"


# ---------------------------------------------------------------------------------------------------------------------
# Packs


def make_pack(tmp_path: Path, *, timed: bool = True, ids: str = "mixed") -> tuple[Path, Path, Sequences]:
    source, pack = tmp_path / "a.txt", tmp_path / "packs" / "a.safetensors"
    write_random(source, "pairs", seed=3, ids=ids, timed=timed)
    sequences = read_sequences(source)
    write_sequences(pack, sequences, source=source)
    return source, pack, sequences


def assert_same(a: Sequences, b: Sequences) -> None:
    assert torch.equal(a.ptr, b.ptr)
    assert torch.equal(a.item, b.item)
    assert (a.time is None) == (b.time is None)
    if a.time is not None and b.time is not None:
        assert torch.equal(a.time, b.time)
    assert (a.item_ids, a.user_ids, a.fingerprint, a.name) == (b.item_ids, b.user_ids, b.fingerprint, b.name)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("ids", ["integers", "mixed"])
def test_a_pack_gives_back_what_was_written(tmp_path, timed, ids):
    _, pack, sequences = make_pack(tmp_path, timed=timed, ids=ids)
    again = read_sequences(pack)
    assert_same(again, sequences)
    assert_well_formed(again)
    assert_same(read_sequences(pack.parent), sequences)
    assert_same(read_sequences(pack, format="pack"), sequences)


def test_a_pack_lives_without_its_source(tmp_path):
    source, pack, sequences = make_pack(tmp_path)
    source.unlink()
    assert_same(read_sequences(pack), sequences)


def test_a_source_that_was_touched_or_copied_does_not_make_a_pack_stale(tmp_path):
    source, pack, sequences = make_pack(tmp_path)
    os.utime(source, ns=(1, 1))
    assert_same(read_sequences(pack), sequences)


def test_a_pack_of_a_folder_records_the_file_in_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_random(folder / "a.txt", "pairs", seed=3, ids="integers")
    write_sequences(tmp_path / "a.safetensors", read_sequences(folder), source=folder)
    (folder / "a.txt").write_text("1 2\n1 3\n")
    with pytest.raises(DataError, match="stale pack"):
        read_sequences(tmp_path / "a.safetensors")


def test_a_changed_source_makes_a_pack_stale_and_the_message_names_both_and_the_command(tmp_path):
    source, pack, sequences = make_pack(tmp_path)
    source.write_text("1 2\n1 3\n")
    with pytest.raises(DataError) as caught:
        read_sequences(pack)
    text = str(caught.value)
    assert text.startswith(f"{pack}: error: ")
    assert sequences.fingerprint in text
    assert fingerprint([source]) in text
    command = re.search(r"python -m apps\.seqrec prepare (\S+) (\S+)", text)
    assert command is not None
    assert Path(command[1]).resolve() == source.resolve()
    assert command[2].startswith(str(pack))
    write_sequences(pack, read_sequences(source), source=source)  # what the command does
    assert read_sequences(pack).num_events == 2


def test_source_and_pack_can_be_moved_together(tmp_path):
    make_pack(tmp_path)
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert read_sequences(moved / "packs" / "a.safetensors").num_users > 0
    (moved / "a.txt").write_text("1 2\n1 3\n")
    with pytest.raises(DataError, match="stale pack"):
        read_sequences(moved / "packs" / "a.safetensors")


def test_a_pack_is_refused_for_sequences_that_are_not_those_of_the_source(tmp_path):
    source, pack, sequences = make_pack(tmp_path)
    source.write_text("1 2\n1 3\n")
    with pytest.raises(DataError, match="changed in between"):
        write_sequences(pack, sequences, source=source)


def test_a_pack_cannot_take_the_place_of_its_source_or_be_made_from_a_pack(tmp_path):
    source, pack, sequences = make_pack(tmp_path)
    with pytest.raises(DataError, match=r"must end in \.safetensors"):
        write_sequences(source, sequences, source=source)
    with pytest.raises(DataError, match="already a pack"):
        write_sequences(tmp_path / "b.safetensors", sequences, source=pack)
    with pytest.raises(DataError, match="existing file"):
        write_sequences(pack, sequences, source=tmp_path / "absent.txt")
    broken = dataclasses.replace(sequences, item_ids=("two\nlines", *sequences.item_ids[1:]))
    with pytest.raises(ValueError, match="contains a line end"):
        write_sequences(pack, broken, source=source)
    assert slow_read(source, "pairs")


# ---------------------------------------------------------------------------------------------------------------------
# Real data


@pytest.mark.parametrize(
    ("name", "form", "counts"),
    [
        ("ml-1m", "pairs", (6040, 3416, 999_611)),
        ("beauty-5core", "lines", (22_363, 12_101, 198_502)),
        ("ml-100k", "inter", (943, 1682, 100_000)),
    ],
)
def test_real_data_has_the_published_counts(real_data, name, form, counts):
    path = real_data(name)
    sequences = read_sequences(path)
    assert (sequences.num_users, sequences.num_items, sequences.num_events) == counts
    assert detect_format(path)[0] == form


def test_beauty_is_read_as_the_obvious_reader_reads_it(real_data):
    path = real_data("beauty-5core/Beauty.txt")
    assert as_dict(read_sequences(path)) == slow_read(path, "lines")


def test_ml_100k_is_sorted_stably_by_time(real_data):
    path = real_data("ml-100k/ml-100k.inter")
    found, expected = as_dict(read_sequences(path)), slow_read(path, "inter")
    assert list(found) == sorted(expected, key=int)
    for user in list(expected)[:200]:
        assert found[user] == expected[user]
    times = [time for _, time in expected["1"]]
    assert len(set(times)) < len(times)  # ties are what makes stability matter
