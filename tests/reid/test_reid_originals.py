"""The arrangements that ours is measured against compute what ours computes; and reads of the host are counted."""

import ast
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.reid import originals
from apps.reid.clipping import make_clip
from apps.reid.dataset import CP, NIR, SK, VIEWS, People, Samples, make_samples
from apps.reid.formats import read_data
from apps.reid.images import png_bytes, read_image
from apps.reid.originals import HostReads, Records, choose_files, clip_by_loops, collate_records, index_by_globs

APP = Path(originals.__file__).parent
FOLDERS = {"nir": NIR, "cp": CP, "sk": SK}


def write_tree(root: Path) -> None:
    """Four people: the second without near infra-red, the third with sketches of one view, the last with RGB alone."""
    annotations = []
    image = png_bytes(torch.full((3, 8, 4), 7, dtype=torch.uint8))
    for person in range(1, 5):
        names = [f"vis/{person:04d}/{person:04d}_sysu_0001_cam{i}_{i}_vis.png" for i in range(person + 1)]
        annotations += [
            {"id": person, "file_path": name, "caption": f"{name} told", "split": "train"} for name in names
        ]
        if person not in (2, 4):
            names += [f"nir/{person:04d}/{person:04d}_sysu_0001_cam5_{i}_nir.png" for i in range(3)]
        for folder, word in (("cp", "colorpencil"), ("sk", "sketch")) if person != 4 else ():
            views = VIEWS if (person, folder) != (3, "sk") else VIEWS[1:2]
            names += [
                f"{folder}/{person:04d}/{person:04d}_sysu_0001_{view}_{i}_{word}.png"
                for view in views
                for i in range(2)
            ]
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(image)
    (root / originals.ANNOTATIONS).write_text(json.dumps(annotations))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals") / "tree"
    write_tree(root)
    return root


@pytest.fixture(scope="module")
def people(tree: Path) -> People:
    return read_data(tree, val_share=0.0)


@pytest.fixture(scope="module")
def samples(people: People) -> Samples:
    return make_samples(people, torch.zeros(len(people.captions), 1, dtype=torch.int16), seed=0)


def candidates(samples: Samples, people: People, label: int, modality: int, view: int | None = None) -> list[str]:
    """The images that ours may draw, found by looking at every image."""
    member = samples.groups.member.tolist()
    return sorted(
        people.path[row]
        for row in member
        if people.identity[row] == label
        and people.modality[row] == modality
        and (view is None or people.view[row] == view)
    )


def test_the_index_by_globs_holds_the_anchors_and_candidates_of_ours(tree: Path, people: People, samples: Samples):
    index = {str(sample["anchor_vis"].relative_to(tree).as_posix()): sample for sample in index_by_globs(tree)}
    assert sorted(index) == sorted(people.path[row] for row in samples.row.tolist())

    def names(files: list[Path]) -> list[str]:
        return [file.relative_to(tree).as_posix() for file in files]

    for row, label in zip(samples.row.tolist(), samples.label.tolist(), strict=True):
        sample = index[people.path[row]]
        assert sample["pid"] == people.identity_ids[label]
        assert sample["text"] == people.captions[int(people.caption[row])]
        for folder, modality in FOLDERS.items():
            expected = candidates(samples, people, label, modality)
            assert names(sample["images"][folder]) == expected
            assert sample["modality_mask"][folder] == float(bool(expected))
            for view, name in enumerate(VIEWS) if folder != "nir" else ():
                expected = candidates(samples, people, label, modality, view)
                assert names(sample["images_by_view"][folder][name]) == expected


def test_every_sample_has_lists_of_its_own(tree: Path):
    first, second = index_by_globs(tree)[:2]
    assert first["pid"] == second["pid"]
    assert first["images"]["nir"] == second["images"]["nir"]
    assert first["images"]["nir"] is not second["images"]["nir"]


def test_a_drawing_without_a_view_counts_as_one_from_the_front():
    assert originals.view_of(Path("0001_sysu_0001_side_1_sketch.jpg")) == "side"
    assert originals.view_of(Path("0001_sysu_0001_1_sketch.jpg")) == "front"


def test_drawn_files_show_one_view_where_there_is_one(tree: Path):
    random.seed(0)
    index = {sample["pid"]: sample for sample in index_by_globs(tree)}
    views = set()
    for _ in range(50):
        drawn = choose_files(index["0001"])
        assert drawn["cp"] is not None
        assert drawn["sk"] is not None
        assert originals.view_of(drawn["cp"]) == originals.view_of(drawn["sk"])
        views.add(originals.view_of(drawn["cp"]))
        other = choose_files(index["0003"])["sk"]
        assert other is not None
        assert originals.view_of(other) == VIEWS[1]
    assert views == set(VIEWS)
    assert choose_files(index["0002"])["nir"] is None
    assert [name for name, file in choose_files(index["0004"]).items() if file] == ["vis"]


def test_records_have_zeros_for_absent_images(tree: Path):
    random.seed(0)
    index = index_by_globs(tree)
    records = Records(index, lambda file: read_image(file).float(), (8, 4))
    record = records[len(index) - 1]
    assert int(record["person_id"]) == 3
    assert record["modality"] == "vis"
    assert {name: int(image.count_nonzero() > 0) for name, image in record["images"].items()} == record["modality_mask"]
    batch = collate_records([records[place] for place in (0, 2, len(index) - 1)])
    assert batch["person_id"].tolist() == [0, 1, 3]
    assert batch["images"]["nir"].shape == (3, 3, 8, 4)
    assert {name: mask.tolist() for name, mask in batch["modality_mask"].items()} == {
        "vis": [1, 1, 1],
        "nir": [1, 0, 0],
        "sk": [1, 1, 0],
        "cp": [1, 1, 0],
        "text": [1, 1, 1],
    }


def record(**changes: Any) -> dict[str, Any]:
    image = torch.full((3, 2, 2), 0.5)
    return {
        "person_id": torch.tensor(0),
        "images": dict.fromkeys(originals.MODALITIES, image) | changes.get("images", {}),
        "modality_mask": dict.fromkeys(originals.MODALITIES, 1.0) | changes.get("mask", {}),
        "modality": "vis",
        "text_description": [changes.get("text", "words")],
    }


def test_an_image_counts_if_it_is_not_black_and_its_record_says_so():
    black, faint = torch.zeros(3, 2, 2), torch.full((3, 2, 2), 1e-8)
    negative = torch.full((3, 2, 2), -0.5)
    batch = collate_records(
        [
            record(images={"nir": black}, mask={"sk": 0.0}),
            record(images={"nir": faint}, mask={"sk": 0.5}),
            record(images={"nir": negative}, text=" \n"),
        ]
    )
    mask = {name: values.tolist() for name, values in batch["modality_mask"].items()}
    assert mask == {"vis": [1, 1, 1], "nir": [0, 0, 1], "sk": [0, 0, 1], "cp": [1, 1, 1], "text": [1, 1, 0]}


def test_moving_a_batch_keeps_its_nest():
    text = ["a", "b"]
    moved = originals.move_batch({"x": [torch.ones(2), {"y": torch.zeros(1)}], "text": text}, torch.device("meta"))
    assert moved["x"][0].device.type == moved["x"][1]["y"].device.type == "meta"
    assert moved["text"] == text


def parameters(scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    found = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for parameter in found:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*found, nn.Parameter(torch.zeros(2))]  # one that has no gradient


def gradients_of(found: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in found if parameter.grad is not None]


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_by_loops_is_ours(scale: float):
    usual, own = parameters(scale), parameters(scale)
    before = [gradient.clone() for gradient in gradients_of(usual)]
    norm = clip_by_loops(usual)
    clip = make_clip(first=1.0, window=5, quantile=0.7, low=0.5, high=3.0, device=torch.device("cpu"))
    torch.testing.assert_close(clip(gradients_of(own)), torch.tensor(norm))
    slow = math.sqrt(sum(value**2 for gradient in before for value in gradient.flatten().tolist()))
    assert norm == pytest.approx(slow, rel=1e-6)
    for left, right, gradient in zip(gradients_of(usual), gradients_of(own), before, strict=True):
        torch.testing.assert_close(left, right)
        torch.testing.assert_close(left, gradient * min(1.0, 1.0 / slow), rtol=1e-5, atol=0.0)


def test_clipping_by_loops_takes_out_what_is_not_finite():
    found = parameters(0.1)
    first = gradients_of(found)[0]
    first[0, 0], first[1, 1], first[2, 2] = math.nan, math.inf, -math.inf
    kept = first.clone()
    clip_by_loops(found)
    repaired = gradients_of(found)[0]
    assert repaired[[0, 1, 2], [0, 1, 2]].tolist() == [0, 0, 0]
    assert torch.equal(repaired[0, 1:], kept[0, 1:])


def test_the_figures_of_the_log_cost_a_read_each_and_one_per_sample():
    losses = {"total": torch.tensor(3.0), "ce": torch.tensor(2.0), "sdm": torch.tensor(0.5)}
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 1.0]])
    label = torch.tensor([0, 1, 1])
    features = {"vis": torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])}
    with HostReads() as reads:
        told = originals.log_by_reads(losses, logits, label, features, ["vis", "vis", "nir"])
    assert told == {
        "loss": 3.0,
        "ce": 2.0,
        "sdm": 0.5,
        "weighted_sdm": 1.0,
        "sum_sdm": 0.5,
        "correct": 2.0,
        "norm_vis": 5.0,
        "pairs": 0.0,  # vis and nir of one person: the wrong name finds no pair
    }
    assert reads.count == 2 + 6 + 1 + 3
    with pytest.raises(AssertionError):
        originals.log_by_reads(losses, logits, label + 1, features, ["vis", "vis", "nir"])


def test_clipping_by_loops_reads_twice_per_gradient_and_ours_never():
    with HostReads() as reads:
        clip_by_loops(parameters(10.0))
    assert reads.count == 2 * 3
    clip = make_clip(first=1.0, window=5, quantile=0.7, low=0.5, high=3.0, device=torch.device("cpu"))
    with HostReads() as reads:
        clip(gradients_of(parameters(10.0)))
    assert reads.count == 0


X, MASK = torch.tensor([3.0, 1.0, 1.0]), torch.tensor([True, False, True])
READS = {
    "item": (lambda: X[0].item(), 1),
    "float": (lambda: float(X[1]), 1),
    "int": (lambda: int(X[1]), 1),
    "if": (lambda: 1 if X.sum() > 2 else 0, 1),
    "all": (lambda: bool((X > 0).all()), 1),
    "loop": (lambda: [value.item() for value in X], 3),
    "largest": (lambda: max(X), 2),  # two comparisons
    "nonzero": (lambda: X.nonzero(), 1),
    "mask": (lambda: X[MASK], 1),
    "set by mask": (lambda: X.clone().__setitem__(MASK, torch.tensor([1.0, 2.0])), 1),
    "select": (lambda: X.masked_select(MASK), 1),
    "unique": (lambda: X.unique(), 1),
    "equal": (lambda: torch.equal(X, X + 0), 1),
    "norm": (lambda: X.norm(), 0),
    "where": (lambda: torch.where(MASK, X, 0), 0),
    "index": (lambda: X[torch.tensor([0, 2])], 0),
    "slice": (lambda: X[1:], 0),
    "fill": (lambda: X.masked_fill(MASK, 0.0), 0),
    "cast": (lambda: X.to(torch.float64), 0),
    "copy": (lambda: torch.empty(3).copy_(X), 0),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted_as_by_hand(name: str):
    run, expected = READS[name]
    with HostReads() as reads:
        run()
    assert reads.count == expected


def test_reads_in_a_backward_pass_count():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * gradients[0].sum().item()

    x = torch.ones(2, requires_grad=True)
    with HostReads() as reads:
        Reading.apply(x).sum().backward()
    assert reads.count == 1


def test_nothing_that_trains_imports_the_originals():
    importing = []
    for file in APP.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if origin.endswith("originals") or any(name.split(".")[-1] == "originals" for name in names):
                importing.append(file.name)
    assert set(importing) <= {"bench.py"}
