"""Batches are made by index arithmetic that agrees with slow loops, and their draws depend on what they should."""

import os
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from apps.reid.dataset import (
    CP,
    IMAGE_MODALITIES,
    MODALITIES,
    NIR,
    QUERY_LISTS,
    RGB,
    SK,
    TEXT,
    VIEWS,
    Batch,
    Frame,
    ImageFiles,
    PackedImages,
    People,
    Samples,
    draw_images,
    draw_rows,
    group_images,
    hash_numbers,
    lists_by_rule,
    make_samples,
    make_texts,
)
from apps.reid.images import png_bytes
from apps.reid.loaders import collate

Row = tuple[int, int, int, int, str | None]  # identity, modality, view, camera, caption


def people_of(rows: list[Row], *, num_identities: int, images: Any = None) -> People:
    """People of rows in this order; each image is a 4 x 2 picture that shows its row's number."""
    captions = sorted({row[4] for row in rows if row[4] is not None})
    count = max(row[0] for row in rows) + 1
    picture = torch.arange(len(rows)).view(-1, 1, 1, 1).expand(-1, 3, 4, 2).to(torch.uint8)
    return People(
        identity=torch.tensor([row[0] for row in rows]),
        camera=torch.tensor([row[3] for row in rows]),
        modality=torch.tensor([row[1] for row in rows]),
        view=torch.tensor([row[2] for row in rows]),
        caption=torch.tensor([-1 if row[4] is None else captions.index(row[4]) for row in rows]),
        captions=make_texts(captions),
        path=make_texts([f"{row}.png" for row in range(len(rows))]),
        images=images or PackedImages(Path("none"), Frame(4, 2, 0, 0), picture),
        identity_ids=tuple(f"p{identity}" for identity in range(count)),
        num_identities=num_identities,
        num_valid=0,
        valid=None,
        test=None,
        fingerprint="",
        name="made up",
        split="",
    )


def some_rows(*, seed: int = 0, identities: int = 9) -> list[Row]:
    """People of whom some lack a modality, a view or captions, in any order."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for identity in range(identities):
        for i in range(draw.randint(1, 4)):
            caption = f"{identity} looks like {i % 2}" if draw.random() < 0.7 else None
            rows.append((identity, RGB, -1, draw.randint(-1, 3), caption))
        for modality in (NIR, CP, SK):
            for _ in range(draw.choice((0, 1, 3, 5))):
                view = -1 if modality == NIR else draw.choice((-1, 0, 1, 2))
                rows.append((identity, modality, view, -1, None))
    draw.shuffle(rows)
    return rows


def tokens_of(people: People) -> Tensor:
    """Tokens that tell the captions apart."""
    return torch.arange(1, len(people.captions) * 3 + 1, dtype=torch.int32).view(-1, 3)


@pytest.fixture
def people() -> People:
    return people_of(some_rows(), num_identities=7)


@pytest.fixture
def samples(people: People) -> Samples:
    return make_samples(people, tokens_of(people), seed=5)


# Texts


def test_texts_are_given_back_one_by_one_and_all_together():
    texts = ["", "a man", "two\nlines", "gr\u00fcn", "a name of other bytes \udcff", ""]
    found = make_texts(texts)
    assert [found[place] for place in range(len(found))] == list(found) == texts
    assert list(pickle.loads(pickle.dumps(found))) == texts
    assert list(make_texts([])) == []


# Draws


def test_numbers_depend_on_every_id_and_are_spread_evenly():
    number = torch.arange(20_000)
    first = hash_numbers(number, 1, 2, 3)
    assert torch.equal(first[100:200], hash_numbers(number[100:200], 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert int((hash_numbers(number, *other) == first).sum()) == 0
    assert int(first.min()) >= 0
    for size in (2, 3, 10):
        counts = torch.bincount(first % size, minlength=size)
        assert float((counts - 20_000 / size).abs().max()) < 5 * (20_000 / size) ** 0.5


@pytest.mark.parametrize("seed", range(5))
def test_draws_are_what_a_slow_loop_allows(seed: int):
    rows = some_rows(seed=seed)
    people = people_of(rows, num_identities=7)
    groups = group_images(people, people.identity >= 0)
    identity = torch.arange(9).repeat(40)
    drawn = draw_images(groups, identity, torch.arange(360), seed=1, epoch=0)
    for person, found in zip(identity.tolist(), drawn.tolist(), strict=True):
        own = {m: [row for row, known in enumerate(rows) if known[:2] == (person, m)] for m in (NIR, CP, SK)}
        views = {m: {rows[row][2] for row in own[m]} - {-1} for m in (CP, SK)}
        shared = (views[CP] & views[SK]) or (views[CP] | views[SK])
        assert (found[0] in own[NIR]) if own[NIR] else found[0] == -1
        allowed = set()
        for view in shared or {99}:  # no view that anything has
            pools = [[row for row in own[m] if rows[row][2] == view] or own[m] or [-1] for m in (CP, SK)]
            allowed |= {(left, right) for left in pools[0] for right in pools[1]}
        assert tuple(found[1:]) in allowed


def test_every_image_of_a_person_is_drawn_sooner_or_later_and_equally_often():
    rows: list[Row] = [(0, RGB, -1, 0, None)]
    rows += [(0, NIR, -1, 0, None) for _ in range(4)]
    rows += [(0, modality, view, -1, None) for modality in (CP, SK) for view in range(3) for _ in range(2)]
    samples = make_samples(people_of(rows, num_identities=1), torch.zeros(0, 2, dtype=torch.int32), seed=3)
    drawn = torch.cat([draw_rows(samples, torch.zeros(1, dtype=torch.int64), epoch=epoch) for epoch in range(1200)])
    for modality, size in ((NIR, 4), (CP, 6), (SK, 6)):
        counts = Counter(drawn[:, modality].tolist())
        assert sorted(counts) == [row for row, known in enumerate(rows) if known[1] == modality]
        assert max(abs(count - 1200 / size) for count in counts.values()) < 5 * (1200 / size) ** 0.5


def test_pencil_and_sketch_show_the_same_view_where_there_is_one():
    rows: list[Row] = [(0, RGB, -1, 0, None)]
    rows += [(0, modality, view, -1, None) for modality in (CP, SK) for view in (0, 1, 2, -1)]
    rows += [(1, RGB, -1, 0, None), (1, CP, 0, -1, None), (1, CP, 2, -1, None), (1, SK, 2, -1, None)]
    samples = make_samples(people_of(rows, num_identities=2), torch.zeros(0, 2, dtype=torch.int32), seed=3)
    seen = set()
    for epoch in range(60):
        for cp, sk in draw_rows(samples, torch.tensor([0, 1]), epoch=epoch)[:, 2:].tolist():
            assert rows[cp][2] == rows[sk][2] >= 0
            seen.add((rows[cp][0], rows[cp][2]))
    assert seen == {(0, 0), (0, 1), (0, 2), (1, 2)}


def test_a_wanted_view_is_kept():
    rows: list[Row] = [
        (0, modality, view, -1, None) for modality, view in ((CP, 0), (CP, 1), (CP, 2), (SK, 0), (SK, 1))
    ]
    people = people_of(rows, num_identities=1)
    groups = group_images(people, people.identity >= 0)
    wanted = torch.tensor([0, 1, 2, -1] * 10)
    drawn = draw_images(groups, torch.zeros(40, dtype=torch.int64), torch.arange(40), seed=0, epoch=0, view_B=wanted)
    for view, (nir, cp, sk) in zip(wanted.tolist(), drawn.tolist(), strict=True):
        assert nir == -1
        if view >= 0:
            assert rows[cp][2] == view
            assert rows[sk][2] == view if view < 2 else sk in (3, 4)
        else:
            assert rows[cp][2] == rows[sk][2]


def test_draws_depend_on_seed_epoch_and_sample_alone(people: People, samples: Samples):
    places = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1))
    whole = draw_rows(samples, places, epoch=4)
    torch.manual_seed(77)
    parts = [draw_rows(samples, part, epoch=4) for part in places.split(3)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, draw_rows(samples, places, epoch=5))
    other = make_samples(people, tokens_of(people), seed=6)
    assert not torch.equal(whole, draw_rows(other, places, epoch=4))


# Samples and batches


def test_samples_are_the_rgb_images_of_those_to_train_on(people: People, samples: Samples):
    expected = [row for row in range(people.num_images) if people.modality[row] == RGB and people.identity[row] < 7]
    assert samples.row.tolist() == expected
    assert len(samples) == len(expected)
    assert samples.label.tolist() == people.identity[expected].tolist()
    drawn = set(samples.groups.member.tolist())
    assert drawn == set((people.identity < 7).nonzero().flatten().tolist())


def test_batch_holds_what_a_loop_collects(people: People, samples: Samples):
    places = [3, 0, 5, 5, len(samples) - 1]
    batch = samples[2, places]
    rows = draw_rows(samples, torch.tensor(places), epoch=2).tolist()
    images, modalities, slots = [], [], []
    for modality in range(len(IMAGE_MODALITIES)):
        for slot, row in enumerate(rows):
            if row[modality] >= 0:
                images.append(row[modality])
                modalities.append(modality)
                slots.append(slot)
    assert batch.image.dtype == torch.uint8
    assert batch.image[:, 0, 0, 0].tolist() == images
    assert batch.image.shape == (len(images), 3, 4, 2)
    assert (batch.modality.tolist(), batch.slot.tolist()) == (modalities, slots)
    tokens = tokens_of(people)
    for slot, row in enumerate(rows):
        caption = int(people.caption[row[0]])
        assert batch.present[slot].tolist() == [value >= 0 for value in row] + [caption >= 0]
        assert batch.token[slot].tolist() == (tokens[caption].tolist() if caption >= 0 else [0, 0, 0])
        assert batch.label[slot] == people.identity[row[0]]
        assert batch.camera[slot] == people.camera[row[0]]
        for modality in range(1, 4):
            assert row[modality] == -1 or people.identity[row[modality]] == batch.label[slot]
            assert row[modality] == -1 or people.modality[row[modality]] == modality
    assert all(tensor.dtype == torch.int64 for tensor in (batch.token, batch.label, batch.camera, batch.slot))


def test_tokens_must_be_of_all_captions(people: People):
    with pytest.raises(ValueError, match="tokenise all of them"):
        make_samples(people, torch.zeros(len(people.captions) - 1, 3), seed=0)


def test_people_without_other_modalities_make_batches_of_rgb_alone():
    people = people_of([(0, RGB, -1, 0, None), (1, RGB, -1, 0, None)], num_identities=2)
    batch = make_samples(people, torch.zeros(0, 4, dtype=torch.int32), seed=0)[0, [1, 0]]
    assert batch.image[:, 0, 0, 0].tolist() == [1, 0]
    assert batch.present.tolist() == [[True, False, False, False, False]] * 2
    assert batch.token.tolist() == [[0] * 4] * 2


@pytest.fixture
def from_files(tmp_path: Path) -> Samples:
    """Samples whose images are files that are decoded on demand."""
    rows = some_rows()
    paths = [f"{row}.png" for row in range(len(rows))]
    for row, path in enumerate(paths):
        (tmp_path / path).write_bytes(png_bytes(torch.full((3, 4, 2), row, dtype=torch.uint8)))
    images = ImageFiles(tmp_path, Frame(4, 2, 0, 0), make_texts(paths))
    people = people_of(rows, num_identities=7, images=images)
    return make_samples(people, tokens_of(people), seed=5)


def equal(left: Batch, right: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_files_give_the_batches_of_the_pack(samples: Samples, from_files: Samples):
    for epoch in range(3):
        assert equal(samples[epoch, [0, 4, 2]], from_files[epoch, [0, 4, 2]])


class Plan:
    """A sampler of whole batches: it carries the epoch, so that workers need not know of it."""

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        yield from [(1, [0, 1, 2]), (1, [3, 4, 5]), (1, [6, 0])]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a worker")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on forks of processes with threads
def test_worker_processes_make_the_same_batches(from_files: Samples):
    expected = [from_files[key] for key in Plan()]
    options: dict[str, Any] = {"batch_size": None, "sampler": Plan(), "collate_fn": collate}
    found = list(DataLoader(from_files, num_workers=1, multiprocessing_context="fork", **options))  # type: ignore[arg-type]
    assert len(found) == 3
    assert all(equal(left, right) for left, right in zip(expected, found, strict=True))


def test_pickled_samples_make_the_same_batches(from_files: Samples):
    copy = pickle.loads(pickle.dumps(from_files))
    assert len(copy) == len(from_files)
    assert equal(copy[3, [1, 0, 6]], from_files[3, [1, 0, 6]])


def test_samples_of_a_large_data_set_are_small_when_pickled():
    """As many images as ORBench's training part has, with names and captions like its own."""
    draw = random.Random(0)
    words = [
        f"{colour} {garment}"
        for colour in ("black", "dark blue", "pale grey", "red", "olive", "white")
        for garment in ("coat", "trousers", "backpack", "trainers", "shirt", "skirt", "cap", "hair")
    ]
    word_number = {word: draw.randrange(300, 49_000) for word in words}
    rows: list[Row] = []
    paths, tokens = [], []
    for identity in range(320):
        for modality, count in ((RGB, 46 + (identity < 190)), (NIR, 26), (CP, 18), (SK, 18)):
            for i in range(count):
                view = i % 3 if modality in (CP, SK) else -1
                chosen = draw.sample(words, 5)
                caption = f"{identity} {i}" if modality == RGB else None
                if modality == RGB:
                    tokens.append([49406, *(word_number[word] for word in chosen), draw.randrange(49_000), 49407])
                rows.append((identity, modality, view, i % 6, caption))
                source = draw.randrange(10_000)
                name = f"{identity:04d}_sysu_{source:04d}_cam{i % 6}_{draw.randrange(10_000):04d}"
                paths.append(f"{MODALITIES[modality]}/{identity:04d}/{name}_{MODALITIES[modality]}.jpg")
    assert len(rows) == 34_750
    images = ImageFiles(Path("/data"), Frame(256, 128, 8, 4), make_texts(paths))
    people = people_of(rows, num_identities=320, images=images)
    token = torch.zeros(len(tokens), 77, dtype=torch.int32)
    token[:, :8] = torch.tensor(tokens, dtype=torch.int32)
    samples = make_samples(people, token, seed=1)
    assert len(samples) == 14_910
    data = pickle.dumps(samples)
    assert len(data) < 1_000_000
    copy = pickle.loads(data)
    assert copy.images.path[34_000] == paths[34_000]
    assert torch.equal(copy.token, samples.token)
    places = torch.arange(0, 14_910, 97)
    assert torch.equal(draw_rows(copy, places, epoch=1), draw_rows(samples, places, epoch=1))


# Lists by rule


def test_there_are_32_lists_named_as_the_benchmark_names_them():
    assert len(QUERY_LISTS) == 32
    assert [sum(len(order) == size for order in QUERY_LISTS.values()) for size in (1, 2, 3, 4)] == [4, 12, 12, 4]
    for name in ("NIR", "TEXT+SK", "SK+CP+TEXT", "CP+NIR+SK", "TEXT+NIR+CP+SK", "NIR+CP+SK+TEXT"):
        assert name in QUERY_LISTS
    assert QUERY_LISTS["SK+NIR+CP"] == (SK, NIR, CP)


@pytest.mark.parametrize("seed", range(3))
def test_lists_by_rule_have_a_query_for_each_image_of_the_main_modality(seed: int):
    rows = some_rows(seed=seed)
    people = people_of(rows, num_identities=3)
    found = lists_by_rule(people, 3, 8)
    inside = range(3, 8)
    assert found.gallery.tolist() == [row for row, known in enumerate(rows) if known[0] in inside and known[1] == RGB]
    assert not found.camera_rule
    captions = list(people.captions)
    has = {(known[0], known[1]) for known in rows} | {(known[0], TEXT) for known in rows if known[4] is not None}
    for name, order in QUERY_LISTS.items():
        main = order[0]
        expected = [
            captions.index(known[4]) if main == TEXT and known[4] is not None else row
            for row, known in enumerate(rows)
            if known[0] in inside
            and (known[1] == RGB and known[4] is not None if main == TEXT else known[1] == main)
            and all((known[0], modality) in has for modality in order)
        ]
        if not expected:
            assert name not in found.queries
            continue
        queries = found.queries[name]
        assert queries.modalities == order
        assert queries.item[:, 0].tolist() == expected
        for identity, items in zip(queries.identity.tolist(), queries.item.tolist(), strict=True):
            for modality, item in zip(order, items, strict=True):
                if modality == TEXT:
                    assert captions[item].startswith(f"{identity} ")
                else:
                    assert rows[item][:2] == (identity, modality)


def test_pencil_and_sketch_of_a_query_show_the_same_view():
    rows: list[Row] = [(0, RGB, -1, 0, None)]
    rows += [(0, modality, view, -1, None) for modality in (CP, SK) for view in range(len(VIEWS)) for _ in range(2)]
    found = lists_by_rule(people_of(rows, num_identities=0), 0, 1)
    for name in ("CP+SK", "SK+CP"):
        assert len(found.queries[name].item) == 6
        for left, right in found.queries[name].item.tolist():
            assert rows[left][2] == rows[right][2]


def test_rgb_alone_is_searched_for_in_the_rest_of_rgb():
    rows: list[Row] = [(identity, RGB, -1, camera, None) for identity in (0, 1) for camera in (1, 0, 1, 0, 0)]
    found = lists_by_rule(people_of(rows, num_identities=0), 0, 2)
    assert list(found.queries) == ["RGB"]
    assert found.queries["RGB"].item.tolist() == [[0], [1], [5], [6]]  # the first of each camera
    assert found.queries["RGB"].identity.tolist() == [0, 0, 1, 1]
    assert found.gallery.tolist() == [2, 3, 4, 7, 8, 9]
    assert found.camera_rule
    one_camera = lists_by_rule(people_of([(row[0], RGB, -1, 2, None) for row in rows], num_identities=0), 0, 2)
    assert one_camera.queries["RGB"].item.tolist() == [[0], [5]]
    assert one_camera.gallery.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert not one_camera.camera_rule
