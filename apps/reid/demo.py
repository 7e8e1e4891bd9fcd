"""Drawn people in five modalities, in the folders and lists of ORBench.

Legend: P identities, N images of an identity, H height, W width, M materials.

A person is a body, clothes and what is carried; an image is a map of materials (skin, hair, top, ...) of that person in
some pose, seen from the front, the back or the side. The modalities show that map each in its own way: RGB in the light
and colour cast of a camera, near infra-red as one channel in which a dye has another brightness than to the eye, colour
pencil as flat pale colour with dark edges, sketch as edges and hatching that tells dark from light, and captions in
words. Nobody of the test is trained on, but all are made of the same colours and clothes; so what is learnt carries
over, while equal pixels hardly ever mean the same person.

The files are PNG, written without any imaging library.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apps.reid.dataset import CP, NIR, QUERY_LISTS, RGB, SK, TEXT, VIEWS
from apps.reid.formats import ANNOTATIONS, GALLERY, TEST_LISTS
from apps.reid.images import png_bytes
from shared.files import atomic_write_text, fingerprint
from shared.seed import make_generator

HEIGHT, WIDTH = 128, 64
NUM_TRAIN, NUM_TEST = 60, 20

_VERSION = 1  # changes whenever other files are made
_RECORD = "demo.json"
_SEED = 11
_PER_MODALITY = {RGB: 10, NIR: 5, CP: 6, SK: 6}  # images of a person
_FOLDERS = {RGB: "vis", NIR: "nir", CP: "cp", SK: "sk"}
_ENDINGS = {RGB: "vis", NIR: "nir", CP: "colorpencil", SK: "sketch"}
_CAMERAS = {RGB: (1, 2, 3, 4), NIR: (5, 6)}

# name: as the eye sees it, brightness in near infra-red
_COLOURS: dict[str, tuple[tuple[float, float, float], float]] = {
    "black": ((0.08, 0.08, 0.09), 0.70),
    "white": ((0.93, 0.93, 0.91), 0.95),
    "grey": ((0.50, 0.50, 0.52), 0.45),
    "red": ((0.80, 0.12, 0.13), 0.85),
    "green": ((0.15, 0.52, 0.20), 0.55),
    "blue": ((0.12, 0.22, 0.70), 0.30),
    "yellow": ((0.92, 0.82, 0.18), 0.90),
    "orange": ((0.92, 0.48, 0.10), 0.80),
    "purple": ((0.45, 0.15, 0.58), 0.60),
    "brown": ((0.40, 0.24, 0.12), 0.40),
    "pink": ((0.95, 0.58, 0.70), 0.75),
}
_HAIR = {"black": (0.07, 0.06, 0.06), "brown": (0.33, 0.20, 0.10), "blond": (0.85, 0.70, 0.38)}
_HAIR_NIR = {"black": 0.35, "brown": 0.50, "blond": 0.75}
_SKIN, _SKIN_NIR = (0.85, 0.64, 0.52), 0.80
_PATTERNS = ("plain", "striped", "pinstriped", "checked")
_BOTTOMS = ("trousers", "shorts", "skirt")
_BAGS = ("", "backpack", "handbag")
_BACKGROUND, _BARE, _HEAD_HAIR, _TOP, _SECOND, _BOTTOM, _SHOES, _BAG = range(8)  # materials

_RGB_GAIN = ((1.15, 1.00, 0.80), (0.70, 0.80, 1.05), (1.25, 1.22, 1.15), (0.55, 0.56, 0.60))  # of the cameras
_RGB_GROUND = ((0.45, 0.50, 0.42), (0.55, 0.52, 0.50), (0.75, 0.78, 0.82), (0.30, 0.28, 0.33))
_NIR_GAIN, _NIR_GROUND = (1.0, 0.70), (0.30, 0.15)
_PAPER = 0.97


@dataclass(frozen=True)
class Person:
    """What somebody looks like."""

    top: str
    second: str  # colour of the pattern
    pattern: str
    long_sleeves: bool
    bottom_kind: str
    bottom: str
    shoes: str
    hair: str
    long_hair: bool
    bag: str
    bag_colour: str
    tall: float  # share of the picture's height
    broad: float  # half the shoulders, in body lengths
    shade: float  # how far all colours are from what they are called


def draw_people(count: int, *, seed: int = _SEED) -> list[Person]:
    """People of whom no two share top, pattern and bottom; a function of its arguments."""
    generator = make_generator(seed)
    colours = tuple(_COLOURS)
    sizes = (len(colours), len(_PATTERNS), len(colours), len(_BOTTOMS))
    codes = torch.randperm(math.prod(sizes), generator=generator)[:count].tolist()

    def one_of(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    people = []
    for code in codes:
        places = []
        for size in sizes:
            code, place = divmod(code, size)
            places.append(place)
        top, pattern, bottom, kind = places
        people.append(
            Person(
                top=colours[top],
                second=one_of([colour for colour in ("white", "black", "yellow", "blue") if colour != colours[top]]),
                pattern=_PATTERNS[pattern],
                long_sleeves=between(0, 1) < 0.5,
                bottom_kind=_BOTTOMS[kind],
                bottom=colours[bottom],
                shoes=one_of(("black", "white", "red", "brown")),
                hair=one_of(tuple(_HAIR)),
                long_hair=between(0, 1) < 0.5,
                bag=one_of(_BAGS),
                bag_colour=one_of(colours),
                tall=between(0.66, 0.94),
                broad=between(0.075, 0.145),
                shade=between(-0.05, 0.05),
            )
        )
    return people


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def material_map(person: Person, view_N: Tensor, generator: torch.Generator) -> Tensor:
    """What each pixel of some pictures of the person shows, [N, H, W] int64; places and poses are drawn."""

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(view_N), 1, 1, generator=generator)

    length = person.tall * drawn(0.96, 1.03)
    y_H1 = (torch.arange(HEIGHT) + 0.5)[:, None] / HEIGHT
    x_W = (torch.arange(WIDTH) + 0.5 - WIDTH / 2) / HEIGHT
    t = (y_H1 - 0.5 + drawn(-0.03, 0.03)) / length + 0.5  # 0 at the crown, 1 at the soles
    x = (x_W + drawn(-0.03, 0.03)) / length
    stride, swing = drawn(-0.16, 0.16), drawn(-0.15, 0.15)
    is_front, is_side = (view_N == 0)[:, None, None], (view_N == 2)[:, None, None]
    broad = torch.where(is_side, 0.62, 1.0) * person.broad

    found = torch.zeros(len(view_N), HEIGHT, WIDTH, dtype=torch.int64)

    def paint(material: int, *conditions: Tensor) -> None:
        mask = conditions[0]
        for condition in conditions[1:]:
            mask = mask & condition
        found.masked_fill_(mask, material)

    hem = {"trousers": 0.94, "shorts": 0.68, "skirt": 0.72}[person.bottom_kind]
    apart = torch.where(is_side, 0.0, 0.045)
    for side in (-1, 1):
        leg = (x - side * (apart + stride * (t - 0.5))).abs() < 0.036 * (0.6 + 4 * person.broad)
        paint(_BARE, leg, t > 0.5, t < 0.96)
        paint(_BOTTOM, leg, t > 0.5, t < (hem if person.bottom_kind != "skirt" else 0.5))
        paint(_SHOES, leg, t > 0.95, t < 1.0)
    if person.bottom_kind == "skirt":
        paint(_BOTTOM, x.abs() < broad * (0.55 + 1.9 * (t - 0.42)), t > 0.5, t < hem)

    torso = (x.abs() < broad * (1.0 - 0.6 * (t - 0.15))) & (t > 0.145) & (t < 0.52)
    cuff = 0.46 if person.long_sleeves else 0.27
    for side in (-1, 1):
        arm = (x - side * (broad + 0.012 + 0.05 * (t - 0.15)) - swing * (t - 0.15)).abs() < 0.024
        paint(_BARE, arm, t > 0.16, t < 0.5)
        paint(_TOP, arm, t > 0.155, t < cuff)
    paint(_TOP, torso)
    rows, columns = ((t * 26).floor() % 2).bool(), (((x + 1) * 34).floor() % 2).bool()
    pattern = {"striped": rows, "pinstriped": columns, "checked": rows ^ columns}.get(person.pattern)
    if pattern is not None:
        paint(_SECOND, torso, pattern)

    head = (x / 0.050) ** 2 + ((t - 0.075) / 0.070) ** 2 < 1
    paint(_BARE, head)
    paint(_BARE, x.abs() < 0.022, t > 0.1, t < 0.16)
    paint(_HEAD_HAIR, head, torch.where(is_front, t < 0.045, torch.where(is_side, (x < -0.012) | (t < 0.04), t < 0.12)))
    if person.long_hair:
        mane = (x.abs() < 0.066) & (t > 0.05) & (t < 0.22)
        paint(_HEAD_HAIR, mane, torch.where(is_front, x.abs() > 0.042, torch.where(is_side, x < -0.02, True)))
    if person.bag == "backpack":
        strap = ((x.abs() - broad * 0.6).abs() < 0.013) & (t > 0.15) & (t < 0.42)
        back = (x.abs() < broad * 0.78) & (t > 0.18) & (t < 0.43)
        beside = (x < -broad * 0.7) & (x > -broad * 1.9) & (t > 0.18) & (t < 0.43)
        paint(_BAG, torch.where(is_front, strap, torch.where(is_side, beside, back)))
    elif person.bag == "handbag":
        paint(_BAG, (x - broad - 0.05).abs() < 0.045, t > 0.47, t < 0.59)
    return found


def _palette(person: Person) -> tuple[Tensor, Tensor]:
    """What the materials look like to the eye, [M, 3], and in near infra-red, [M]; the background has no meaning."""
    worn = (person.top, person.second, person.bottom, person.shoes, person.bag_colour)
    seen = [(0.0, 0.0, 0.0), _SKIN, _HAIR[person.hair], *(_COLOURS[colour][0] for colour in worn)]
    near = [0.0, _SKIN_NIR, _HAIR_NIR[person.hair], *(_COLOURS[colour][1] for colour in worn)]
    return (torch.tensor(seen) + person.shade).clamp(0, 1), torch.tensor(near)


def _edges(material_NHW: Tensor) -> Tensor:
    """Pixels on either side of a border between materials, [N, H, W] bool."""
    edge_NHW = torch.zeros_like(material_NHW, dtype=torch.bool)
    for dim in (1, 2):
        size = edge_NHW.shape[dim] - 1
        differs = material_NHW.narrow(dim, 1, size) != material_NHW.narrow(dim, 0, size)
        edge_NHW.narrow(dim, 0, size).logical_or_(differs)
        edge_NHW.narrow(dim, 1, size).logical_or_(differs)
    return edge_NHW


def _scenery(count: int, generator: torch.Generator) -> Tensor:
    """Soft light and dark places behind people, [N, 1, H, W] around 0."""
    coarse = torch.randn(count, 1, 8, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")


def picture(person: Person, modality: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """All pictures of the person in a modality: [N, C, H, W] uint8, cameras [N], and views [N]."""
    count = _PER_MODALITY[modality]
    number_N = torch.arange(count)
    if modality in (CP, SK):
        view_N = number_N // (count // len(VIEWS))
    else:
        view_N = torch.randint(len(VIEWS), (count,), generator=generator)
    camera_N = number_N % len(_CAMERAS.get(modality, (1,)))
    material_NHW = material_map(person, view_N, generator)
    is_ground_N1HW = material_NHW[:, None] == _BACKGROUND
    seen_M3, near_M = _palette(person)
    colour_N3HW = seen_M3[material_NHW].permute(0, 3, 1, 2)

    def noise(spread: float, channels: int) -> Tensor:
        return spread * torch.randn(count, channels, HEIGHT, WIDTH, generator=generator)

    def strength(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    if modality == RGB:
        ground = torch.tensor(_RGB_GROUND)[camera_N][:, :, None, None] + 0.22 * _scenery(count, generator)
        gain = torch.tensor(_RGB_GAIN)[camera_N][:, :, None, None] * strength(0.8, 1.2)
        slope = 1 + strength(-0.4, 0.4) * (torch.arange(WIDTH) / WIDTH - 0.5)
        image = torch.where(is_ground_N1HW, ground, colour_N3HW) * gain * slope + noise(0.03, 3)
    elif modality == NIR:
        ground = torch.tensor(_NIR_GROUND)[camera_N][:, None, None, None] + 0.12 * _scenery(count, generator)
        gain = torch.tensor(_NIR_GAIN)[camera_N][:, None, None, None] * strength(0.9, 1.1)
        image = torch.where(is_ground_N1HW, ground, near_M[material_NHW][:, None]) * gain + noise(0.04, 1)
    else:
        edge_N1HW = _edges(material_NHW)[:, None]
        hatch_HW = (torch.arange(HEIGHT)[:, None] + torch.arange(WIDTH)) % 3 == 0
        if modality == CP:
            flat = torch.where(is_ground_N1HW, _PAPER, 0.3 + 0.7 * colour_N3HW + 0.06 * hatch_HW)
        else:
            tone_N1HW = colour_N3HW.mean(1, keepdim=True)
            flat = torch.where(hatch_HW & ~is_ground_N1HW, _PAPER * tone_N1HW, torch.tensor(_PAPER))
        image = torch.where(edge_N1HW, strength(0.1, 0.3), flat) + noise(0.02, 1)
    return (image * 255).round().clamp(0, 255).to(torch.uint8), camera_N, view_N


def captions(person: Person, count: int, generator: torch.Generator) -> list[str]:
    """Descriptions of the person, in several ways and never all of it."""
    cloth = {"plain": "", "striped": "striped ", "pinstriped": "pinstriped ", "checked": "checked "}[person.pattern]
    top = f"{'long' if person.long_sleeves else 'short'}-sleeved {cloth}{person.top} top"
    if person.pattern != "plain":
        top += f" with {person.second}"
    bottom = f"{person.bottom} {person.bottom_kind}"
    hair = f"{'long' if person.long_hair else 'short'} {person.hair} hair"
    bag = f"a {person.bag_colour} {person.bag}" if person.bag else "no bag"
    shoes = f"{person.shoes} shoes"
    skirted = "a " if person.bottom_kind == "skirt" else ""
    forms = (
        f"A person with {hair} wears a {top}, {skirted}{bottom} and {shoes}, and carries {bag}.",
        f"This pedestrian is dressed in a {top} and {skirted}{bottom}, carrying {bag}.",
        f"Someone in {skirted}{bottom} and {shoes}; the person has {hair} and a {top}.",
        f"The person carries {bag} and has {hair}; a {top} is worn over {skirted}{bottom}.",
    )
    return [forms[place] for place in torch.randint(len(forms), (count,), generator=generator).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_demo(folder: Path) -> Path:
    """The folder, with the demo data in it as ORBench's files; where they are there and equal, nothing is written."""
    record = folder / _RECORD
    if record.is_file() and record.read_text(encoding="utf-8") == _record_of(folder):
        return folder
    people = draw_people(NUM_TRAIN + NUM_TEST)
    items = [_write_person(folder, number, person) for number, person in enumerate(people, 1)]
    train = [
        {"id": number, "file_path": path, "caption": caption}
        for number, found in enumerate(items[:NUM_TRAIN], 1)
        for path, caption in zip(found[RGB], found[TEXT], strict=True)
    ]
    test = list(enumerate(items[NUM_TRAIN:], NUM_TRAIN + 1))
    lists = {GALLERY: [[number, path] for number, found in test for path in found[RGB]]}
    for name, modalities in QUERY_LISTS.items():
        lists[name] = [
            [number, *(_companion(found, modalities[0], place, modality) for modality in modalities)]
            for number, found in test
            for place in range(len(found[modalities[0]]))
        ]
    atomic_write_text(folder / ANNOTATIONS["orbench"], json.dumps(train, indent=0) + "\n")
    atomic_write_text(folder / TEST_LISTS, json.dumps(lists) + "\n")
    atomic_write_text(record, _record_of(folder))
    return folder


def _record_of(folder: Path) -> str:
    """What identifies the files of the folder."""
    files = sorted(folder.rglob("*.png")) + [folder / name for name in (ANNOTATIONS["orbench"], TEST_LISTS)]
    content = fingerprint([file for file in files if file.is_file()])
    return json.dumps({"version": _VERSION, "files": len(files), "fingerprint": content}) + "\n"


def _write_person(folder: Path, number: int, person: Person) -> dict[int, list[str]]:
    """Paths by image modality, and captions, of a person whose images are written."""
    generator = make_generator(_SEED, step=number)
    found: dict[int, list[str]] = {}
    for modality, name in _FOLDERS.items():
        place = folder / name / f"{number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        images, cameras, views = picture(person, modality, generator)
        found[modality] = []
        for i, (image, camera, view) in enumerate(zip(images, cameras.tolist(), views.tolist(), strict=True), 1):
            seen = f"cam{_CAMERAS[modality][camera]}" if modality in _CAMERAS else VIEWS[view]
            file = place / f"{number:04d}_demo_{number:04d}_{seen}_{i:04d}_{_ENDINGS[modality]}.png"
            file.write_bytes(png_bytes(image))
            found[modality].append(f"{name}/{number:04d}/{file.name}")
    found[TEXT] = captions(person, _PER_MODALITY[RGB], generator)
    return found


def _companion(found: dict[int, list[str]], main: int, place: int, modality: int) -> str:
    """The item of a modality that goes with the main one; drawings go with the drawing of the same view."""
    items = found[modality]
    is_same = modality == main or {main, modality} == {CP, SK}
    return items[place if is_same else (place * 7 + modality) % len(items)]
