"""`check_source` lists what is wrong with a source, by file and place; `read_data` raises the first of its errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.reid import formats as module
from apps.reid.dataset import CP, NIR, QUERY_LISTS, RGB, SK, TEXT
from apps.reid.formats import DataError, Fault, check_source, prepare_source, read_data
from apps.reid.images import png_bytes

FOLDERS = {RGB: "vis", NIR: "nir", CP: "cp", SK: "sk"}
TRAIN, TEST = "train_annos.json", "test_gallery_and_queries.json"


def write_image(path: Path, *, height: int = 32, width: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(torch.full((3, height, width), len(path.name), dtype=torch.uint8)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound source in ORBench's form: people 1 to 3 to train on, 4 and 5 for the test, two images of each kind."""
    annotations: list[dict[str, Any]] = []
    lists: dict[str, list[list[Any]]] = {"RGB_GALLERY": []}
    for person in range(1, 6):
        items: dict[int, list[str]] = {}
        for modality, folder in FOLDERS.items():
            items[modality] = [f"{folder}/{person:04d}/{i}.png" for i in range(2)]
            for path in items[modality]:
                write_image(tmp_path / path)
        items[TEXT] = [f"person {person}, {i}" for i in range(2)]
        if person < 4:
            annotations += [
                {"id": person, "file_path": path, "caption": text}
                for path, text in zip(items[RGB], items[TEXT], strict=True)
            ]
        else:
            lists["RGB_GALLERY"] += [[person, path] for path in items[RGB]]
            for name, order in QUERY_LISTS.items():
                rows = [[person, *(items[modality][i] for modality in order)] for i in range(2)]
                lists[name] = [*lists.get(name, []), *rows]
    (tmp_path / TRAIN).write_text(json.dumps(annotations))
    (tmp_path / TEST).write_text(json.dumps(lists))
    return tmp_path


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file; a list or an object that the change returns takes its place."""
    content = json.loads(file.read_text())
    changed = change(content)
    file.write_text(json.dumps(changed if isinstance(changed, list | dict) else content))


def errors_of(path: Path, **options: Any) -> list[Fault]:
    return [fault for fault in check_source(path, **options) if fault.severity == "error"]


def assert_told(path: Path, *words: str, severity: str = "error") -> Fault:
    """One fault holds all these words; an error is what `read_data` raises, a warning is not."""
    faults = check_source(path)
    matching = [fault for fault in faults if all(word in str(fault) for word in words) and fault.severity == severity]
    assert len(matching) == 1, faults
    assert matching[0].repair
    if severity == "error":
        assert [fault for fault in faults if fault.severity == "error"] == matching
        with pytest.raises(DataError) as caught:
            read_data(path)
        assert str(caught.value) == str(matching[0])
    else:
        read_data(path, val_share=0)
    return matching[0]


def test_sound_source_has_no_faults(root: Path):
    assert check_source(root) == []


# Annotations


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.__setitem__(2, "text"), ["[2]", "an object with file_path and caption", "'text'"]),
        (lambda rows: rows[1].pop("file_path"), ["[1]", "file_path", "the path of an RGB image", "null"]),
        (lambda rows: rows[1].update(file_path=5), ["[1]", "file_path", "int 5"]),
        (lambda rows: rows[3].update(caption=None), ["[3]", "caption: expected a text, found null"]),
        (lambda rows: rows[3].update(caption=["a"]), ["[3]", "caption: expected a text, found a list"]),
        (lambda rows: rows[3].update(id="2"), ["[3]", "id: expected the number of the person, found '2'"]),
        (lambda rows: rows[3].update(id=True), ["[3]", "id: expected the number of the person, found bool True"]),
        (lambda rows: rows[4].update(id=2), ["[4]", "an id that only '0003' has", "2, which '0002' has"]),
        (lambda rows: rows[3].update(id=7), ["[3]", "id 2 for '0002', as before, found 7"]),
        (lambda rows: rows[0].update(file_path="vis/0001/9.png"), ["[0]", "vis/0001/9.png", "which does not exist"]),
        (lambda rows: rows[0].update(file_path="vis/0009/0.png"), ["[0]", "vis/0009/0.png", "which does not exist"]),
        (lambda rows: rows[0].update(file_path="0001/0.png"), ["[0]", "expected vis/PERSON/NAME", "'0001/0.png'"]),
        (lambda rows: rows[0].update(file_path="nir/0001/0.png"), ["[0]", "expected vis/PERSON/NAME"]),
        (lambda rows: rows[0].update(file_path="vis/0004/0.png", id=9), ["[0]", "'0004', who is in", TEST]),
        (lambda rows: [], ["at least one annotation", "none"]),
        (lambda rows: {"a": 1}, ["a list of annotations", "an object"]),
    ],
)
def test_annotations_that_cannot_be_used_are_errors(root: Path, change: Callable[[Any], Any], words: list[str]):
    edit(root / TRAIN, change)
    fault = assert_told(root, *words)
    assert fault.file == str(root / TRAIN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[5].update(caption="  "), ["[5]", "caption: expected words", "a blank text"]),
        (lambda rows: rows.append(rows[1]), ["[6]", "each image once", "'vis/0001/1.png' again, as in row 1"]),
        (lambda rows: [row.update(id=row["id"] * 2) for row in rows], ["ids 1, 2, 3", "3 ids from 2 to 6"]),
        (lambda rows: rows.pop(5), ["an annotation of each RGB image", "1 image without, as '0003/1.png'"]),
    ],
)
def test_annotations_that_are_odd_are_warnings(root: Path, change: Callable[[Any], Any], words: list[str]):
    def changed(rows: Any) -> None:
        change(rows)

    edit(root / TRAIN, changed)
    assert_told(root, *words, severity="warning")


def test_blank_caption_is_none_at_all(root: Path):
    edit(root / TRAIN, lambda rows: rows[5].update(caption="  "))
    people = read_data(root, val_share=0)
    row = list(people.path).index("vis/0003/1.png")
    assert int(people.caption[row]) == -1


def test_broken_json_is_told_with_its_line(root: Path):
    (root / TRAIN).write_text('[\n{"id": 1,\n')
    fault = assert_told(root, "expected JSON")
    assert fault.line == 3
    (root / TRAIN).write_bytes(b'["\xff"]')
    assert_told(root, "JSON in UTF-8")
    (root / TRAIN).write_text("[" * 100_000)
    assert_told(root, "RecursionError")


def test_person_in_two_splits_is_an_error(root: Path):
    (root / TEST).unlink()
    (root / TRAIN).replace(root / "text_annos.json")
    edit(root / "text_annos.json", lambda rows: rows[3].update(split="val"))
    assert_told(root, "[3]", "each person in one split", "'0002' in another split")
    edit(root / "text_annos.json", lambda rows: rows[3].update(split="practice"))
    assert_told(root, "[3]", "train, val or test", "'practice'")


def test_numbers_of_annotations_are_no_identities_in_a_tree(root: Path):
    (root / TEST).unlink()
    (root / TRAIN).replace(root / "text_annos.json")
    edit(root / "text_annos.json", lambda rows: [row.update(id=n % 4) for n, row in enumerate(rows)] and None)
    assert errors_of(root) == []


# Folders


def test_missing_folders_of_modalities(root: Path):
    shutil.rmtree(root / "cp")
    edit(root / TEST, lambda lists: [lists.pop(name) for name in list(lists) if "CP" in name] and None)
    assert_told(root, "images of modality cp in cp/ or colorpencil/ or cpencil/", "no such folder", severity="warning")
    shutil.rmtree(root / "vis")
    assert any("images of modality rgb in rgb/ or vis/" in str(fault) for fault in errors_of(root))


def test_two_folders_of_one_modality(root: Path):
    (root / "infrared").mkdir()
    assert_told(root, "one folder of modality nir", "infrared/")


def test_people_without_rgb_images_are_left_out_and_told(root: Path):
    write_image(root / "sk/0099/0.png")
    fault = assert_told(root, "an RGB image of each person", "1 folder without, as '0099'", severity="warning")
    assert fault.file == str(root / "sk")
    assert "sk/0099/0.png" not in list(read_data(root).path)


def test_official_lists_that_are_not_there_are_missed(root: Path):
    (root / TEST).unlink()
    assert_told(root, "the official gallery and queries", "no such file", severity="warning")


def test_one_person_is_too_few(root: Path):
    edit(root / TRAIN, lambda rows: rows[:2])
    assert any("at least 2 identities to train on" in str(fault) for fault in errors_of(root))
    with pytest.raises(DataError, match="at least 2 identities to train on, found 0"):
        read_data(root)


def test_too_many_held_out_are_told(root: Path):
    with pytest.raises(DataError, match="at least 2 identities to train on, found 1"):
        read_data(root, val_share=0.6)


# Test lists


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lists: lists["NIR"].__setitem__(1, [4]), ["[1]", "NIR", "[person, nir]", "1 values"]),
        (lambda lists: lists["NIR+CP"].__setitem__(0, "a"), ["[0]", "NIR+CP", "[person, nir, cp]", "'a'"]),
        (lambda lists: lists["NIR"][0].__setitem__(0, 4.5), ["[0]", "the number of the person", "float 4.5"]),
        (lambda lists: lists["CP"][0].__setitem__(1, None), ["[0]", "a path for cp", "null"]),
        (lambda lists: lists["TEXT"][0].__setitem__(1, 3), ["[0]", "a caption for text", "int 3"]),
        (lambda lists: lists["SK"][0].__setitem__(1, "sk/0004/9.png"), ["[0]", "that is there, in sk/", "9.png"]),
        (lambda lists: lists["SK"][0].__setitem__(1, "cp/0004/0.png"), ["[0]", "that is there, in sk/"]),
        (lambda lists: lists["SK"][0].__setitem__(1, "sk/0005/0.png"), ["[0]", "images of '0004', as for 4 before"]),
        (lambda lists: lists["SK"][0].__setitem__(0, 44), ["[0]", "person 4 for '0004', as before, found 44"]),
        (lambda lists: lists["RGB_GALLERY"].append(lists["RGB_GALLERY"][0]), ["each image once", "1 image again"]),
        (lambda lists: lists.update({"NIR+SKY": []}), ["perhaps NIR+SK", "'NIR+SKY'"]),
        (lambda lists: lists.update(SK={}), ["SK: expected a list of rows, found an object"]),
        (lambda lists: lists.pop("RGB_GALLERY"), ["an object with RGB_GALLERY"]),
    ],
)
def test_test_lists_that_cannot_be_used_are_errors(root: Path, change: Callable[[Any], Any], words: list[str]):
    def changed(lists: Any) -> None:
        change(lists)

    edit(root / TEST, changed)
    fault = assert_told(root, *words)
    assert fault.file == str(root / TEST)


def test_missing_lists_and_lost_queries_are_warnings(root: Path):
    edit(root / TEST, lambda lists: lists.pop("TEXT+SK") and None)
    assert_told(root, "all 32 lists of queries", "1 list less, as TEXT+SK", severity="warning")
    edit(root / TEST, lambda lists: lists["TEXT"].append([9, "nobody"]))
    assert_told(root, "TEXT: expected people of the gallery", "1 person", "'9'", severity="warning")


# Market-1501


def write_market(root: Path, names: dict[str, list[str]]) -> Path:
    for folder, listed in names.items():
        (root / folder).mkdir(parents=True)
        for name in listed:
            write_image(root / folder / name)
    return root


TRAINED = ["0002_c1s1_1.png", "0003_c1s1_1.png"]


def test_market_faults_are_told(tmp_path: Path):
    names = {"bounding_box_train": TRAINED, "query": ["0007_c1s1_1.png"], "bounding_box_test": ["0007_c2s1_1.png"]}
    assert check_source(write_market(tmp_path / "sound", names)) == []
    bad = {**names, "query": ["0002_c1s1_9.png"]}
    assert_told(write_market(tmp_path / "a", bad), "somebody who is not trained on", "'0002' of bounding_box_train")
    bad = {**names, "bounding_box_train": [*TRAINED, "face.png"]}
    assert_told(write_market(tmp_path / "b", bad), "PERSON_cCAMERA", "'face.png'")
    bad = {name: listed for name, listed in names.items() if name != "query"}
    assert_told(write_market(tmp_path / "c", bad), "query", "a folder of images")
    bad = {**names, "query": ["0007_c1s1_1.png", "0008_c1s1_1.png"]}
    root = write_market(tmp_path / "d", bad)
    assert_told(root, "people of bounding_box_test", "1 person", "'0008'", severity="warning")


def test_market_may_lack_a_test(tmp_path: Path):
    root = write_market(tmp_path, {"bounding_box_train": TRAINED})
    assert [fault.severity for fault in check_source(root)] == ["warning", "warning"]
    assert read_data(root, val_share=0).test is None


# Tables


def write_table(root: Path, text: str) -> Path:
    for person in "abc":
        write_image(root / f"{person}.png")
    file = root / "people.csv"
    file.write_text(text, encoding="utf-8")
    return file


SOUND = "path,identity,modality\na.png,1,rgb\nb.png,2,rgb\nc.png,3,rgb\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, ["a header with path and identity", "an empty file"]),
        ("file,identity\na.png,1\n", 1, ["a header with path and identity", "'file,identity'"]),
        ("path,identity,path\n", 1, ["each once"]),
        (SOUND + "d.png,4\n", 5, ["3 values", "found 2"]),
        (SOUND + ",4,rgb\n", 5, ["path: expected a value, found none"]),
        (SOUND.replace("c.png,3", "c.png,"), 4, ["identity: expected a value, found none"]),
        (SOUND.replace("3,rgb", "3,radar"), 4, ["modality", "rgb, nir, cp, sk", "'radar'"]),
        (SOUND.replace("3,rgb", "3,text"), 4, ["modality", "a caption stands in the line of its RGB image"]),
        (SOUND + "a.png,1,rgb\n", 5, ["each image once", "'a.png' again, as in line 2"]),
        (SOUND + "d.png,3,rgb\n", 5, ["path", "'d.png', which does not exist"]),
        (SOUND + "people.csv,3,rgb\n", 5, ["'people.csv', whose ending is of no known kind"]),
        (SOUND.replace("modality", "split").replace("rgb", "some"), 2, ["split", "'some'"]),
    ],
)
def test_lines_of_tables_that_cannot_be_used_are_errors(tmp_path: Path, text: str, line: int, words: list[str]):
    file = write_table(tmp_path, text)
    faults = [fault for fault in errors_of(file) if all(word in str(fault) for word in words)]
    assert faults
    assert faults[0].line == line
    with pytest.raises(DataError) as caught:
        read_data(file)
    assert str(caught.value) == str(errors_of(file)[0])


def test_tables_with_odd_lines_are_warned_of(tmp_path: Path):
    assert check_source(write_table(tmp_path, SOUND)) == []
    write_image(tmp_path / "n.png")
    text = SOUND + "n.png,4,nir\n"
    assert_told(write_table(tmp_path, text), "an RGB image of each person", "1 person", "'4'", severity="warning")
    text = "path,identity,colour\na.png,1,red\nb.png,2,red\nc.png,3,red\n"
    assert_told(write_table(tmp_path, text), "'colour'", severity="warning")
    text = "path,identity,modality,caption\na.png,1,,\nb.png,2,,\nc.png,3,,\nn.png,3,nir,a man\n"
    assert_told(write_table(tmp_path, text), "captions of RGB images", "one of modality nir", severity="warning")
    text = "path,identity,split\na.png,1,query\nb.png,2,\nc.png,3,\n"
    assert_told(write_table(tmp_path, text), "query and gallery together", "query alone")


def test_table_of_another_encoding_is_told(tmp_path: Path):
    file = write_table(tmp_path, SOUND)
    file.write_bytes("path,identity\nb\u00e4r.png,1\n".encode("latin-1"))
    assert_told(file, "a table in UTF-8", "byte 15")


# Paths and forms


def test_what_is_no_source_is_told(tmp_path: Path):
    assert_told(tmp_path / "nothing", "no such file or folder")
    assert_told(tmp_path, "a folder with train_annos.json, text_annos.json, bounding_box_train", "an empty folder")
    (tmp_path / "notes.txt").write_text("")
    assert_told(tmp_path / "notes.txt", "a folder, a .csv file or a pack", "a .txt file")
    with pytest.raises(DataError, match="--format is 'duke'"):
        read_data(tmp_path, format="duke")
    with pytest.raises(DataError, match="a folder, as market data are, found a file"):
        read_data(tmp_path / "notes.txt", format="market")
    with pytest.raises(DataError, match="a file, as csv data are, found a folder"):
        read_data(tmp_path, format="csv")


# Images


def test_images_that_cannot_be_read_are_errors(root: Path):
    image = root / "sk/0002/1.png"
    image.write_bytes(image.read_bytes()[:30])
    (fault,) = errors_of(root)
    assert (fault.file, fault.expected, fault.found) == (str(image), "a readable image", "a PNG that ends too early")
    image.write_bytes(b"")
    assert len(errors_of(root)) == 1


@pytest.mark.parametrize(("height", "width"), [(8, 8), (15, 40), (120, 17), (20, 5000)])
def test_absurd_sizes_are_warned_of(root: Path, height: int, width: int):
    write_image(root / "cp/0001/0.png", height=height, width=width)
    (fault,) = check_source(root)
    assert (fault.severity, fault.found) == ("warning", f"{width} x {height}")


def test_faults_beyond_the_limit_are_counted(root: Path):
    edit(root / TRAIN, lambda rows: [row.update(caption=7) for row in rows] and None)
    faults = check_source(root, limit=4)
    assert len(faults) == 5
    assert "2 more errors" in str(faults[-1])
    assert len(check_source(root, limit=6)) == 6


# Packs


def test_changed_images_of_a_pack_are_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK_IMAGES", 10)
    pack = tmp_path / "pack.safetensors"
    prepare_source(root, pack, height=16, width=8, margin=0)
    assert check_source(pack) == []
    images = tmp_path / "pack.images.safetensors"
    data = bytearray(images.read_bytes())
    data[-16 * 8 * 3 * 25] ^= 1
    images.write_bytes(data)
    (fault,) = check_source(pack)
    assert (fault.severity, fault.file, fault.found) == ("error", str(images), "others in rows 10 to 19")


def test_damaged_lists_of_a_pack_are_found(root: Path, tmp_path: Path):
    pack = tmp_path / "pack.safetensors"
    prepare_source(root, pack, height=16, width=8, margin=0)
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    assert_told(pack, "an undamaged pack", "prepare")
