"""Every form of a source gives the people it describes; a pack gives the same, however often its making was killed."""

import csv
import json
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apps.reid import formats as module
from apps.reid.dataset import CP, NIR, QUERY_LISTS, RGB, SK, TEXT, ImageFiles, PackedImages, People, make_samples
from apps.reid.formats import DataError, prepare_source, read_data
from apps.reid.images import load_image, png_bytes

FOLDERS = {RGB: "vis", NIR: "nir", CP: "cp", SK: "sk"}
SMALL: dict[str, Any] = {"height": 16, "width": 8, "margin": 0.125}


def write_image(path: Path, number: int, *, height: int = 16, width: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(number)
    path.write_bytes(png_bytes(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)))


def write_people(root: Path, people: range) -> dict[int, dict[int, list[str]]]:
    """Images of people in folders, by person and modality."""
    found: dict[int, dict[int, list[str]]] = {}
    for person in people:
        found[person] = {}
        for modality, folder in FOLDERS.items():
            names = (
                [f"{person:04d}_sysu_0001_cam{i % 2 + 1}_{i}_{folder}.png" for i in range(3)]
                if modality in (RGB, NIR)
                else [f"{person:04d}_sysu_0001_{view}_1_{folder}.png" for view in ("front", "back", "side")]
            )
            found[person][modality] = [f"{folder}/{person:04d}/{name}" for name in names]
            for i, path in enumerate(found[person][modality]):
                write_image(root / path, person * 100 + modality * 10 + i)
    return found


class Annotated(NamedTuple):
    root: Path
    files: dict[int, dict[int, list[str]]]
    lists: dict[str, list[list[Any]]]


def write_orbench(root: Path, *, num_train: int = 5, num_test: int = 2) -> Annotated:
    files = write_people(root, range(1, num_train + num_test + 1))
    annotations = [
        {"id": person, "file_path": path, "caption": f"person {person}, picture {i}"}
        for person in range(1, num_train + 1)
        for i, path in enumerate(files[person][RGB])
    ]
    (root / "train_annos.json").write_text(json.dumps(annotations))
    lists: dict[str, list[list[Any]]] = {"RGB_GALLERY": []}
    for person in range(num_train + 1, num_train + num_test + 1):
        lists["RGB_GALLERY"] += [[person, path] for path in files[person][RGB]]
        items = {**files[person], TEXT: [f"a test of {person}", f"another of {person}", f"a third of {person}"]}
        for name, order in QUERY_LISTS.items():
            rows = [[person, *(items[modality][i] for modality in order)] for i in range(3)]
            lists[name] = [*lists.get(name, []), *rows]
    (root / "test_gallery_and_queries.json").write_text(json.dumps(lists))
    return Annotated(root, files, lists)


@pytest.fixture
def orbench(tmp_path: Path) -> Annotated:
    return write_orbench(tmp_path / "ORBench")


def remove(*files: Path) -> None:
    for file in files:
        file.unlink()


def rows_of(people: People) -> set[tuple[str, str, int, int, int, str | None]]:
    """What is known of each image, in words."""
    columns = (people.identity, people.modality, people.camera, people.view, people.caption)
    return {
        (
            people.path[row],
            people.identity_ids[identity],
            modality,
            camera,
            view,
            None if caption < 0 else people.captions[caption],
        )
        for row, (identity, modality, camera, view, caption) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    }


def same(left: People, right: People) -> bool:
    """Whether two sources hold the same people; their images may be stored differently."""
    tensors = ("identity", "camera", "modality", "view", "caption")
    words = ("identity_ids", "num_identities", "num_valid", "fingerprint", "name", "split")
    return (
        all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
        and all(getattr(left, name) == getattr(right, name) for name in words)
        and (list(left.path), list(left.captions)) == (list(right.path), list(right.captions))
        and all(same_lists(getattr(left, stage), getattr(right, stage)) for stage in ("valid", "test"))
    )


def same_lists(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return (
        torch.equal(left.gallery, right.gallery)
        and (left.camera_rule, left.rule, list(left.queries)) == (right.camera_rule, right.rule, list(right.queries))
        and all(
            a.modalities == b.modalities and torch.equal(a.item, b.item) and torch.equal(a.identity, b.identity)
            for a, b in zip(left.queries.values(), right.queries.values(), strict=True)
        )
    )


# ORBench


def test_orbench_gives_every_image_of_training_and_test(orbench: Annotated):
    people = read_data(orbench.root)
    expected = set()
    for person, files in orbench.files.items():
        for modality, paths in files.items():
            for i, path in enumerate(paths):
                is_photo = modality in (RGB, NIR)
                caption = f"person {person}, picture {i}" if modality == RGB and person <= 5 else None
                camera, view = (i % 2, -1) if is_photo else (-1, i)
                expected.add((path, f"{person:04d}", modality, camera, view, caption))
    assert rows_of(people) == expected
    assert people.num_images == len(expected)
    assert (people.num_identities, people.num_valid, len(people.identity_ids)) == (4, 1, 7)
    assert people.identity_ids[5:] == ("0006", "0007")
    assert people.name == "ORBench"


def test_official_lists_are_kept_row_by_row(orbench: Annotated):
    people = read_data(orbench.root)
    assert people.test is not None
    gallery = [
        (people.identity_ids[int(people.identity[row])], people.path[row]) for row in people.test.gallery.tolist()
    ]
    assert gallery == [(f"{person:04d}", path) for person, path in orbench.lists["RGB_GALLERY"]]
    assert list(people.test.queries) == [name for name in QUERY_LISTS if name in orbench.lists]
    for name, order in QUERY_LISTS.items():
        queries = people.test.queries[name]
        assert queries.modalities == order
        found = [
            [int(people.identity_ids[identity])]
            + [
                people.captions[i] if modality == TEXT else people.path[i]
                for modality, i in zip(order, items, strict=True)
            ]
            for identity, items in zip(queries.identity.tolist(), queries.item.tolist(), strict=True)
        ]
        assert found == orbench.lists[name]
    assert not people.test.camera_rule
    assert "test_gallery_and_queries.json" in people.test.rule


def test_unlisted_images_of_the_test_are_left_out(orbench: Annotated):
    write_image(orbench.root / "nir/0006/new.png", 1)
    write_image(orbench.root / "vis/0006/new.png", 1)
    write_image(orbench.root / "nir/0001/new.png", 1)
    paths = list(read_data(orbench.root).path)
    assert "nir/0001/new.png" in paths
    assert "nir/0006/new.png" not in paths
    assert "vis/0006/new.png" not in paths


def test_orbench_without_test_lists_has_no_test(orbench: Annotated):
    (orbench.root / "test_gallery_and_queries.json").unlink()
    people = read_data(orbench.root)
    assert people.test is None
    assert len(people.identity_ids) == 5


def test_people_of_the_queries_who_are_not_in_the_gallery_are_still_somebody(orbench: Annotated):
    lists = {**orbench.lists, "TEXT": [*orbench.lists["TEXT"], [77, "nobody has seen this person"]]}
    (orbench.root / "test_gallery_and_queries.json").write_text(json.dumps(lists))
    people = read_data(orbench.root)
    assert people.test is not None
    queries = people.test.queries["TEXT"]
    assert people.identity_ids[int(queries.identity[-1])] == "person 77"
    assert int((people.identity == queries.identity[-1]).sum()) == 0


def test_paths_of_windows_and_other_names_of_folders_are_understood(orbench: Annotated):
    for old, new in (("nir", "IR"), ("cp", "colorpencil"), ("sk", "Sketch")):
        (orbench.root / old).rename(orbench.root / new)
    (orbench.root / "test_gallery_and_queries.json").unlink()
    text = (orbench.root / "train_annos.json").read_text().replace("/", "\\\\")
    (orbench.root / "train_annos.json").write_text(text)
    people = read_data(orbench.root)
    assert people.num_images == 5 * 12
    assert torch.bincount(people.modality).tolist() == [15, 15, 15, 15]


# Trees with text_annos.json


def write_tree(root: Path, *, splits: dict[int, str] | None = None) -> dict[int, dict[int, list[str]]]:
    files = write_people(root, range(1, 7))
    rows = [
        {"id": n, "file_path": path, "caption": f"caption {n}", "split": (splits or {}).get(person, "train")}
        for n, (person, path) in enumerate((person, path) for person in files for path in files[person][RGB])
    ]
    (root / "text_annos.json").write_text(json.dumps(rows))
    return files


def test_tree_is_divided_by_share_and_seed(tmp_path: Path):
    write_tree(tmp_path)
    parts = {}
    for seed in range(8):
        people = read_data(tmp_path, val_share=0.34, seed=seed)
        again = read_data(tmp_path, val_share=0.34, seed=seed)
        assert same(people, again)
        assert (people.num_identities, people.num_valid, people.test) == (4, 2, None)
        assert sorted(people.identity_ids) == [f"{person:04d}" for person in range(1, 7)]
        parts[seed] = people.identity_ids[4:]
        assert people.fingerprint == read_data(tmp_path, val_share=0.34, seed=seed).fingerprint
    assert len(set(parts.values())) > 1
    assert len({read_data(tmp_path, val_share=0.34, seed=seed).fingerprint for seed in range(8)}) == 8


def test_nobody_to_train_on_is_validated_on(tmp_path: Path):
    write_tree(tmp_path)
    people = read_data(tmp_path, val_share=0.34)
    assert people.valid is not None
    label = make_samples(people, torch.zeros(len(people.captions), 2, dtype=torch.int32), seed=0).label
    assert set(label.tolist()) == set(range(4))
    assert people.identity[people.valid.gallery].unique().tolist() == [4, 5]
    assert set(people.valid.queries) == set(QUERY_LISTS)
    for queries in people.valid.queries.values():
        assert queries.identity.unique().tolist() == [4, 5]


def test_share_of_nothing_holds_nobody_out(tmp_path: Path):
    write_tree(tmp_path)
    people = read_data(tmp_path, val_share=0)
    assert (people.num_identities, people.num_valid, people.valid) == (6, 0, None)


def test_splits_of_the_annotations_are_kept(tmp_path: Path):
    write_tree(tmp_path, splits={2: "val", 4: "test", 5: "test"})
    people = read_data(tmp_path, seed=1)
    assert people.identity_ids == ("0001", "0003", "0006", "0002", "0004", "0005")
    assert (people.num_identities, people.num_valid) == (3, 1)
    assert people.test is not None
    assert people.identity[people.test.gallery].unique().tolist() == [4, 5]
    assert same(people, read_data(tmp_path, seed=2, val_share=0.5))


def test_other_modalities_are_found_by_their_folders(tmp_path: Path):
    files = write_tree(tmp_path)
    shutil.rmtree(tmp_path / "nir/0003")
    shutil.rmtree(tmp_path / "cp")
    (tmp_path / "sk/0002/notes.txt").write_text("no image")
    people = read_data(tmp_path, val_share=0)
    expected = {
        path for found in files.values() for modality, paths in found.items() if modality != CP for path in paths
    }
    assert set(people.path) == {path for path in expected if not path.startswith("nir/0003")}


def test_one_listing_per_folder_and_no_image_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tree(tmp_path)
    scan, listed = os.scandir, []

    def counted(path: Any) -> Any:
        listed.append(str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", counted)
    monkeypatch.setattr(module, "read_image", None)
    monkeypatch.setattr(module, "load_image", None)
    read_data(tmp_path)
    assert len(listed) == len(set(listed)) == 1 + 4 + 4 * 6


# Market-1501


def write_market(root: Path) -> None:
    names = {
        "bounding_box_train": [
            "0002_c1s1_000451_03.png",
            "0002_c2s1_000776_01.png",
            "0007_c3s1_1_1.png",
            "0010_c1s2_1_1.png",
        ],
        "query": ["0001_c1s1_001051_00.png", "0003_c4s1_1_0.png", "0001_c2s1_1_0.png"],
        "bounding_box_test": [
            "-1_c1s1_000401_03.png",
            "0000_c1s1_000151_01.png",
            "0001_c1s1_001051_01.png",
            "0001_c3s1_1_1.png",
            "0003_c2s1_1_1.png",
        ],
    }
    for folder, listed in names.items():
        for number, name in enumerate(listed):
            write_image(root / folder / name, number)


def test_market_folders_are_training_queries_and_gallery(tmp_path: Path):
    write_market(tmp_path)
    people = read_data(tmp_path, val_share=0)
    assert people.identity_ids == ("0002", "0007", "0010", "0000", "0001", "0003")
    assert people.num_identities == 3
    assert people.test is not None
    assert people.test.camera_rule
    gallery = [people.path[row] for row in people.test.gallery.tolist()]
    assert [Path(path).name[:7] for path in gallery] == ["0000_c1", "0001_c1", "0001_c3", "0003_c2"]  # no junk
    queries = people.test.queries["RGB"]
    assert [people.identity_ids[identity] for identity in queries.identity.tolist()] == ["0001", "0001", "0003"]
    assert people.camera[queries.item[:, 0]].tolist() == [0, 1, 3]
    assert people.modality.unique().tolist() == [RGB]
    assert len(people.captions) == 0


def test_market_junk_is_told(tmp_path: Path):
    write_market(tmp_path / "source")
    said: list[str] = []
    prepare_source(tmp_path / "source", tmp_path / "pack.safetensors", say=said.append, **SMALL)
    assert "1 image of nobody (-1) left out" in said


# Tables


def write_table(file: Path, header: list[str], rows: list[list[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *rows])


def test_table_gives_what_its_lines_say(tmp_path: Path):
    rows: list[list[str]] = []
    for person in ("ann", "bob", "cy"):
        for modality, camera, caption in (
            ("rgb", "north", f"{person}, tall"),
            ("vis", "", ""),
            ("infrared", "south", ""),
        ):
            path = f"images/{person}/{modality}.png"
            write_image(tmp_path / path, len(rows))
            rows.append([path, person, camera, modality, caption])
    write_table(tmp_path / "people.csv", ["path", "identity", "camera", "modality", "caption"], rows)
    people = read_data(tmp_path / "people.csv", val_share=0.33)
    places = {"rgb": RGB, "vis": RGB, "infrared": NIR}
    cameras = {"north": 0, "south": 1, "": -1}
    expected = {(p, who, places[m], cameras[camera], -1, text or None) for p, who, camera, m, text in rows}
    assert rows_of(people) == expected
    assert (people.num_identities, people.num_valid, people.test) == (2, 1, None)


def test_table_may_have_path_and_identity_alone(tmp_path: Path):
    for person in range(12):
        write_image(tmp_path / f"{person}.png", person)
    write_table(tmp_path / "people.csv", ["identity", "path"], [[person, f"{person}.png"] for person in range(12)])
    people = read_data(tmp_path / "people.csv", val_share=0)
    assert people.identity_ids == tuple(str(person) for person in range(12))  # 2 before 10
    assert people.camera.unique().tolist() == [-1]


def test_table_may_name_queries_and_gallery(tmp_path: Path):
    rows: list[list[Any]] = []
    for person in range(4):
        for i in range(3):
            write_image(tmp_path / f"{person}_{i}.png", len(rows))
            split = "train" if person < 2 else ("query" if i == 0 else "gallery")
            rows.append([f"{person}_{i}.png", person, f"c{i}", split])
    write_table(tmp_path / "people.csv", ["path", "identity", "camera", "split"], rows)
    people = read_data(tmp_path / "people.csv", val_share=0)
    assert people.test is not None
    assert [people.path[row] for row in people.test.gallery.tolist()] == ["2_1.png", "2_2.png", "3_1.png", "3_2.png"]
    assert [people.path[row] for row in people.test.queries["RGB"].item[:, 0].tolist()] == ["2_0.png", "3_0.png"]
    assert people.test.camera_rule


def test_real_faces_are_read_by_a_table(tmp_path: Path, real_data):
    root = real_data("orl-faces")
    rows = [[str(root / f"s{person}" / f"{i}.pgm"), f"s{person}"] for person in range(1, 6) for i in range(1, 4)]
    write_table(tmp_path / "faces.csv", ["path", "identity"], rows)
    people = read_data(tmp_path / "faces.csv", val_share=0.2, height=56, width=46, margin=0)
    assert (people.num_images, people.num_identities, people.num_valid) == (15, 4, 1)
    image = people.images.load(torch.tensor([0]))
    assert torch.equal(image[0], load_image(root / "s1" / "1.pgm", 56, 46))
    assert 40 < float(image.float().mean()) < 200


# Sizes


def test_images_are_seen_in_the_size_asked_for(orbench: Annotated):
    people = read_data(orbench.root)
    assert people.images.frame == (256, 128, 8, 4)
    assert people.images.load(torch.tensor([1, 0])).shape == (2, 3, 272, 136)
    people = read_data(orbench.root, height=16, width=8, margin=0)
    assert isinstance(people.images, ImageFiles)
    assert torch.equal(people.images.load(torch.tensor([3]))[0], load_image(orbench.root / people.path[3], 16, 8))


@pytest.mark.parametrize(
    "sizes", [{"height": 0}, {"width": 5000}, {"margin": -0.1}, {"margin": 0.6}, {"val_share": 1.0}]
)
def test_impossible_sizes_and_shares_are_refused(orbench: Annotated, sizes: dict[str, Any]):
    with pytest.raises(DataError, match="--"):
        read_data(orbench.root, **sizes)


# Packs


@pytest.fixture
def pack(orbench: Annotated, tmp_path: Path) -> Path:
    return tmp_path / "packs" / "orbench.safetensors"


def images_of(people: People) -> Tensor:
    return people.images.load(torch.arange(people.num_images))


def test_pack_holds_the_source_with_its_images_resized(orbench: Annotated, pack: Path):
    made = prepare_source(orbench.root, pack, **SMALL)
    read = read_data(pack)
    source = read_data(orbench.root, **SMALL)
    assert isinstance(read.images, PackedImages)
    assert read.images.frame == (16, 8, 2, 1)
    assert same(made, source)
    assert same(read, source)
    assert torch.equal(images_of(read), images_of(source))
    assert images_of(read).shape == (84, 3, 20, 10)
    other = read_data(pack, val_share=0.5, seed=3)
    assert same(other, read_data(orbench.root, val_share=0.5, seed=3, **SMALL))
    assert sorted(path.name for path in pack.parent.iterdir()) == ["orbench.images.safetensors", "orbench.safetensors"]


@pytest.mark.parametrize("form", ["tree", "market", "csv"])
def test_every_form_can_be_packed(tmp_path: Path, form: str):
    source = tmp_path / "source"
    if form == "tree":
        write_tree(source)
    elif form == "market":
        write_market(source)
    else:
        for person in range(3):
            write_image(source / f"{person}.png", person)
        write_table(source / "t.csv", ["path", "identity"], [[f"{person}.png", person] for person in range(3)])
        source /= "t.csv"
    prepare_source(source, tmp_path / "pack.safetensors", **SMALL)
    read, expected = read_data(tmp_path / "pack.safetensors"), read_data(source, **SMALL)
    assert same(read, expected)
    assert torch.equal(images_of(read), images_of(expected))


def test_pack_has_one_size(orbench: Annotated, pack: Path):
    prepare_source(orbench.root, pack, **SMALL)
    assert read_data(pack, **SMALL).images.frame == (16, 8, 2, 1)
    for other in ({"height": 32}, {"width": 9}, {"margin": 0.0}):
        with pytest.raises(DataError, match="prepare another pack"):
            read_data(pack, **other)


def test_pack_can_be_moved_and_lives_without_its_source(orbench: Annotated, pack: Path, tmp_path: Path):
    prepare_source(orbench.root, pack, **SMALL)
    expected = read_data(pack)
    pack.parent.rename(tmp_path / "elsewhere")
    shutil.rmtree(orbench.root)
    assert same(read_data(tmp_path / "elsewhere" / pack.name), expected)


def test_pack_of_a_changed_source_is_refused(orbench: Annotated, pack: Path):
    prepare_source(orbench.root, pack, **SMALL)
    image = orbench.root / orbench.files[1][NIR][0]
    stat = image.stat()
    changes = {
        "1 image new since": lambda: write_image(orbench.root / "nir/0001/new.png", 5),
        "1 image gone since": lambda: remove(orbench.root / "nir/0001/new.png", image),
        "images or lists have changed since": lambda: write_image(image, 77),
    }
    for found, change in changes.items():
        change()
        with pytest.raises(DataError, match="a stale pack") as caught:
            read_data(pack)
        assert found in str(caught.value)
        assert "prepare" in str(caught.value)
        assert "--format orbench --height 16 --width 8" in str(caught.value)
    write_image(image, 110)
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    read_data(pack)
    annotations = json.loads((orbench.root / "train_annos.json").read_text())
    annotations[0]["caption"] = "something else"
    (orbench.root / "train_annos.json").write_text(json.dumps(annotations))
    with pytest.raises(DataError, match="images or lists have changed since"):
        read_data(pack)


def test_pack_and_images_must_belong_together(orbench: Annotated, pack: Path):
    prepare_source(orbench.root, pack, **SMALL)
    images = pack.with_name("orbench.images.safetensors")
    other = pack.with_name("other.safetensors")
    prepare_source(orbench.root, other, height=8, width=8, margin=0)
    shutil.copy(other.with_name("other.images.safetensors"), images)
    with pytest.raises(DataError, match="those of another one"):
        read_data(pack)
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(DataError, match="a damaged file"):
        read_data(pack)
    images.unlink()
    with pytest.raises(DataError, match="no such file"):
        read_data(pack)


def test_another_pack_takes_the_place_of_the_first(orbench: Annotated, pack: Path):
    prepare_source(orbench.root, pack, **SMALL)
    prepare_source(orbench.root, pack, height=8, width=4, margin=0)
    assert read_data(pack).images.frame == (8, 4, 0, 0)
    assert len(list(pack.parent.iterdir())) == 2


@pytest.mark.parametrize(("output", "found"), [("pack.bin", "must end in .safetensors"), ("pack", "must end in")])
def test_outputs_have_the_name_of_packs(orbench: Annotated, tmp_path: Path, output: str, found: str):
    with pytest.raises(DataError, match=found):
        prepare_source(orbench.root, tmp_path / output, **SMALL)


def test_progress_counts_images_and_size_is_told_first(orbench: Annotated, pack: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK_IMAGES", 10)
    heard: list[Any] = []
    prepare_source(orbench.root, pack, say=heard.append, on_images=lambda *counts: heard.append(counts), **SMALL)
    assert heard[0].startswith("84 images of 20 x 10 pixels take 0.1 MB; ")
    assert heard[1:] == [(0, 84), *((done, 84) for done in range(10, 81, 10)), (84, 84)]


def test_small_disk_is_refused_before_anything_is_written(
    orbench: Annotated, pack: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(orbench.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=84 * 600 + (64 << 20) - 1))
    with pytest.raises(DataError, match=r"take 0\.1 MB, and 67\.2 MB are free"):
        prepare_source(orbench.root, pack, **SMALL)
    assert list(pack.parent.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=84 * 600 + (64 << 20)))
    prepare_source(orbench.root, pack, **SMALL)


def test_unreadable_image_stops_the_work_with_its_name(orbench: Annotated, pack: Path):
    image = orbench.root / orbench.files[3][SK][1]
    image.write_bytes(image.read_bytes()[:40])
    with pytest.raises(DataError, match="ends too early") as caught:
        prepare_source(orbench.root, pack, **SMALL)
    assert str(image) in str(caught.value)
    assert not pack.exists()


def test_source_that_changes_meanwhile_is_noticed(orbench: Annotated, pack: Path):
    def change(done: int, total: int) -> None:
        write_image(orbench.root / "nir/0001/new.png", 5)

    with pytest.raises(DataError, match="has changed while it was read"):
        prepare_source(orbench.root, pack, on_images=change, **SMALL)
    assert not pack.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_work_is_taken_up_where_it_stopped(orbench: Annotated, pack: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK_IMAGES", 10)
    decode, calls = module.write_block, []

    def counted(*args: Any) -> int:
        calls.append(args)
        return decode(*args)

    monkeypatch.setattr(module, "write_block", counted)
    for stop in (30, 50):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks of processes with threads
            pid = os.fork()
        if pid == 0:

            def kill(done: int, total: int, stop: int = stop) -> None:
                if done == stop:
                    os.kill(os.getpid(), signal.SIGKILL)

            prepare_source(orbench.root, pack, on_images=kill, **SMALL)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert not pack.exists()
    (work,) = pack.parent.iterdir()
    with (work / "images.safetensors").open("r+b") as file:  # a finished block that did not reach the disk
        file.seek(-84 * 600 + 10 * 600, os.SEEK_END)
        file.write(bytes(50))
    with (work / "finished").open("a") as ledger:
        ledger.write("7 12")  # a killed writer's last line
    said: list[str] = []
    made = prepare_source(orbench.root, pack, say=said.append, **SMALL)
    assert "40 images were decoded before" in said
    assert sorted(len(call[1]) for call in calls) == [4, 10, 10, 10, 10]
    assert torch.equal(images_of(made), images_of(read_data(orbench.root, **SMALL)))
    assert len(list(pack.parent.iterdir())) == 2


def test_worker_processes_write_the_same_pack(orbench: Annotated, pack: Path, monkeypatch: pytest.MonkeyPatch):
    made = prepare_source(orbench.root, pack, workers=2, **SMALL)
    assert torch.equal(images_of(made), images_of(read_data(orbench.root, **SMALL)))
    with pytest.raises(DataError, match="0 workers cannot do anything"):
        prepare_source(orbench.root, pack.with_name("b.safetensors"), workers=0, **SMALL)


def test_fault_found_by_a_worker_is_told(orbench: Annotated, pack: Path, monkeypatch: pytest.MonkeyPatch):
    (orbench.root / orbench.files[3][SK][1]).write_bytes(b"no image")
    pytest.importorskip("PIL")
    with pytest.raises(DataError, match="what Pillow cannot read"):
        prepare_source(orbench.root, pack, workers=2, **SMALL)
