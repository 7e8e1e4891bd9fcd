"""The demo data is made from its arguments alone, has ORBench's form, and is learnt rather than matched by pixels."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.reid import demo as module
from apps.reid.dataset import CP, NIR, QUERY_LISTS, RGB, SK, TEXT, People
from apps.reid.demo import captions, draw_people, material_map, picture, write_demo
from apps.reid.formats import check_source, read_data
from shared.seed import make_generator

SMALL = (20, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo with fewer people."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_TRAIN", SMALL[0])
        patch.setattr(module, "NUM_TEST", SMALL[1])
        yield write_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_TRAIN", 3)
    monkeypatch.setattr(module, "NUM_TEST", 2)


@pytest.fixture(scope="module")
def people(folder: Path) -> People:
    return read_data(folder, val_share=0, height=64, width=32, margin=0)


# People


def test_people_are_a_function_of_count_and_seed():
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first = draw_people(12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_people(12, seed=3) == first
    assert draw_people(12, seed=4) != first


def test_no_two_people_wear_the_same():
    everybody = draw_people(module.NUM_TRAIN + module.NUM_TEST)
    assert len({(p.top, p.pattern, p.bottom, p.bottom_kind) for p in everybody}) == len(everybody)
    assert 40 <= module.NUM_TRAIN <= 60
    assert module.NUM_TEST == 20


def test_what_people_of_the_test_wear_was_seen_in_training():
    everybody = draw_people(module.NUM_TRAIN + module.NUM_TEST)
    train, test = everybody[: module.NUM_TRAIN], everybody[module.NUM_TRAIN :]
    for name in ("top", "second", "pattern", "bottom_kind", "bottom", "shoes", "hair", "bag", "bag_colour"):
        assert {getattr(person, name) for person in test} <= {getattr(person, name) for person in train}


def test_pictures_differ_but_show_the_same_person():
    person = draw_people(1)[0]
    maps = material_map(person, torch.tensor([0, 0, 1, 2]), make_generator(1))
    assert not torch.equal(maps[0], maps[1])
    assert int((maps[0] != maps[2]).sum()) > 20  # the back shows hair instead of a face
    assert float((maps[3] > 0).sum()) < 0.9 * float((maps[0] > 0).sum())  # narrower from the side
    for found in maps:
        assert {1, 3, 5, 6} <= set(found.unique().tolist())
        share = float((found > 0).float().mean())
        assert 0.1 < share < 0.6


@pytest.mark.parametrize("modality", [RGB, NIR, CP, SK])
def test_modalities_look_as_they_should(modality: int):
    image, camera, view = picture(draw_people(3)[2], modality, make_generator(2))
    assert image.dtype == torch.uint8
    assert image.shape == (module._PER_MODALITY[modality], 3 if modality in (RGB, CP) else 1, 128, 64)
    corner = image[:, :, :6, :6].float().mean((1, 2, 3))
    if modality in (CP, SK):  # on paper
        assert view.tolist() == [0, 0, 1, 1, 2, 2]
        assert float(corner.min()) > 235
        assert float((image.amin(1) < 90).float().mean()) > 0.02  # edges
    else:
        assert len(camera.unique()) == (4 if modality == RGB else 2)
        assert float(corner.std()) > 20  # in front of anything


def test_captions_name_what_the_person_wears():
    for person in draw_people(6):
        described = captions(person, 8, make_generator(0))
        assert len(set(described)) > 1
        for text in described:
            assert person.top in text
            assert f"{person.bottom} {person.bottom_kind}" in text
            assert ("striped" in text) == (person.pattern in ("striped", "pinstriped"))


# Files


def test_demo_is_sound_orbench_data(folder: Path):
    assert check_source(folder) == []


def test_demo_has_everybody_in_every_modality_and_all_lists(people: People):
    num_people = sum(SMALL)
    assert (people.num_identities, people.num_valid, len(people.identity_ids)) == (SMALL[0], 0, num_people)
    counts = torch.bincount(people.identity * 4 + people.modality, minlength=4 * num_people).view(num_people, 4)
    assert counts.unique(dim=0).tolist() == [[10, 5, 6, 6]]
    assert people.test is not None
    assert list(people.test.queries) == list(QUERY_LISTS)
    assert people.test.gallery.numel() == 10 * SMALL[1]
    for name, order in QUERY_LISTS.items():
        count = {NIR: 5, CP: 6, SK: 6, TEXT: 10}[order[0]]
        assert people.test.queries[name].item.shape == (count * SMALL[1], len(order))
    rgb = people.modality == RGB
    assert people.camera[rgb].unique().tolist() == [0, 1, 2, 3]
    assert people.camera[people.modality == NIR].unique().tolist() == [4, 5]
    assert people.view[(people.modality == CP) | (people.modality == SK)].unique().tolist() == [0, 1, 2]
    trained = rgb & (people.identity < SMALL[0])
    assert bool((people.caption[trained] >= 0).all())


def test_drawings_of_a_query_show_the_same_view(people: People):
    assert people.test is not None
    view = people.view[people.test.queries["CP+SK"].item]
    assert torch.equal(view[:, 0], view[:, 1])


@pytest.mark.usefixtures("few")
def test_equal_folder_is_left_alone(tmp_path: Path):
    folder = write_demo(tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for path in before:
        os.utime(path, ns=(1, 1))
    assert write_demo(folder) == folder
    assert {path.stat().st_mtime_ns for path in before} == {1}


@pytest.mark.usefixtures("few")
def test_demo_is_the_same_wherever_it_is_written(tmp_path: Path):
    left, right = write_demo(tmp_path / "a"), write_demo(tmp_path / "b")
    names = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
    assert all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


@pytest.mark.usefixtures("few")
def test_changed_folder_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_demo(tmp_path / "demo")
    expected = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    image = next(iter((folder / "sk" / "0002").iterdir()))
    image.write_bytes(b"something else")
    (folder / "train_annos.json").unlink()
    write_demo(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == expected
    monkeypatch.setattr(module, "NUM_TEST", 1)
    write_demo(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "demo.json").read_text()) != json.loads((folder / "demo.json").read_text())


# What there is to learn


def mean_average_precision(query: Tensor, gallery: Tensor, is_match: Tensor) -> float:
    """Of cosines, query by query."""
    score = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    total = 0.0
    for one, match in zip(score, is_match, strict=True):
        hits = match[one.argsort(descending=True)]
        places = hits.nonzero().flatten() + 1
        total += float((torch.arange(1, len(places) + 1) / places).mean())
    return total / len(score)


def bands(image: Tensor) -> Tensor:
    """Mean colours of the middle of a picture from head to foot, less what they have in common, and their products."""
    strip = F.adaptive_avg_pool2d(image[:, :, 4:-4, 9:-9], (8, 2)).flatten(1)
    strip = strip - strip.mean(1, keepdim=True)
    strip = strip / strip.std(1, keepdim=True)
    return torch.cat([strip, strip.clamp(min=0), torch.ones(len(strip), 1)], dim=1)


def test_equal_pixels_do_not_find_a_person_and_a_little_learning_does(people: People):
    """A linear map from pencil to RGB, learnt from people of the training, ranks people of the test."""
    assert people.test is not None
    rows = {modality: (people.modality == modality).nonzero().flatten() for modality in (RGB, CP)}
    image = {modality: people.images.load(rows[modality]).float() / 255 for modality in rows}
    identity = {modality: people.identity[rows[modality]] for modality in rows}
    is_test = {modality: identity[modality] >= SMALL[0] for modality in rows}
    is_match = identity[CP][is_test[CP], None] == identity[RGB][is_test[RGB]]

    def rank(feature: dict[int, Tensor]) -> float:
        return mean_average_precision(feature[CP][is_test[CP]], feature[RGB][is_test[RGB]], is_match)

    pixels = {modality: image[modality].flatten(1) for modality in rows}
    centred = {modality: pixels[modality] - pixels[modality].mean(1, keepdim=True) for modality in rows}
    raw = max(rank(pixels), rank(centred))

    target = torch.stack([bands(image[CP][identity[CP] == person]).mean(0) for person in range(SMALL[0])])
    trained = bands(image[RGB][~is_test[RGB]]).double()
    wanted = target[identity[RGB][~is_test[RGB]]].double()
    ridge = trained.T @ trained + 3.0 * torch.eye(trained.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(ridge, trained.T @ wanted).float()
    learnt = rank({CP: bands(image[CP]), RGB: bands(image[RGB]) @ weight})
    chance = 10 / is_match.shape[1]
    assert raw < 0.35
    assert learnt > 1.5 * raw
    assert learnt > 3 * chance


def test_a_changed_person_changes_the_picture():
    person = draw_people(1)[0]
    other = dataclasses.replace(person, top="green" if person.top != "green" else "red")
    left, right = (picture(who, CP, make_generator(5))[0] for who in (person, other))
    assert int((left != right).any(1).sum()) > 500
