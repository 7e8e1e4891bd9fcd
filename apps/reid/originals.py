"""The arrangements of the pipeline that this app replaces, written anew from a description of it.

Measuring alone uses them, as what ours is compared with; nothing that trains imports this module.

Legend: B samples of a batch, R images, M image modalities, C channels, H and W height and width, P identities,
E feature width, D width of a tower, Q queries, G gallery images.

    index      a dictionary per annotation, whose other images are found by nine globs over the person's folders
    sampler    batches drawn one after the other in Python, every candidate asked for its modalities
    records    a dictionary per sample with every image opened and transformed on its own, joined by a collate function
               that looks at the pixels to tell images from placeholders
    step       gradients are looked through, measured and clipped one parameter after another, and every figure of the
               log is read from the device in every step
    model      the image tower is called for one modality after another, patches are a convolution of floats
    ranking    all scores of a query are sorted, and a loop goes through the queries
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from apps.reid.augment import ASPECT, CLIP_MEAN, CLIP_STD, augment, fold_normalisation
from apps.reid.clip import Encoded, ImageTower, cut_patches
from apps.reid.dataset import Frame
from apps.reid.images import load_image
from apps.reid.model import NUM_IMAGES, ReID, TokenFusion

Record: TypeAlias = dict[str, Any]

ANNOTATIONS = "text_annos.json"
PATTERNS = ("*.jpg", "*.jpeg", "*.png")
MODALITIES = ("vis", "nir", "sk", "cp")
DRAWN = ("sk", "cp")
VIEWS = ("front", "back", "side")
MAX_NORM = 1.0  # the rule for adaptive clipping never has enough norms to say anything else


# ---------------------------------------------------------------------------------------------------------------------
# Index


def index_by_globs(root: Path) -> list[Record]:
    """A dictionary per annotation of an RGB image, with all other images of its person, found again for each."""
    samples = []
    for annotation in json.loads((root / ANNOTATIONS).read_text(encoding="utf-8")):
        path = Path(annotation["file_path"])
        person = path.parts[1]
        images = {"vis": [root / path]}
        by_view: dict[str, dict[str, list[Path]]] = {}
        for modality in MODALITIES[1:]:
            found: list[Path] = []
            for pattern in PATTERNS:
                found.extend((root / modality / person).glob(pattern))
            images[modality] = sorted(found)
            if modality in DRAWN:
                by_view[modality] = {view: [] for view in VIEWS}
                for file in images[modality]:
                    by_view[modality][view_of(file)].append(file)
        samples.append(
            {
                "person_id": int(person),
                "pid": person,
                "images": images,
                "images_by_view": by_view,
                "modality_mask": {modality: float(bool(files)) for modality, files in images.items()},
                "text": annotation["caption"],
                "text_description": annotation["caption"],
                "file_path": annotation["file_path"],
                "anchor_vis": images["vis"][0],
            }
        )
    return samples


def view_of(file: Path) -> str:
    """The view that the name of a drawing tells; the front where it tells none."""
    words = file.stem.lower().split("_")
    return next((view for view in VIEWS if view in words), VIEWS[0])


# ---------------------------------------------------------------------------------------------------------------------
# Sampler


def modalities_of(record: Record) -> set[str]:
    """What a sample shows, from an entry of the index or from a loaded sample."""
    return {name for name, has in record["modality_mask"].items() if has}


def inferring_batches(
    labels: Sequence[int], infer: Callable[[int], set[str]], *, identities: int, instances: int
) -> Iterator[list[int]]:
    """Batches of positions without end; `infer` is asked what each candidate shows, whenever it is one."""
    owned = positions_by_person(labels)
    while True:
        people = random.sample(sorted(owned), len(owned))
        for first in range(0, len(people) - identities + 1, identities):
            batch: list[int] = []
            for person in people[first : first + identities]:
                own = random.sample(owned[person], len(owned[person]))
                shown = [(place, infer(place)) for place in own[:instances]]
                rgb = next((place for place, names in shown if "vis" in names), None)
                other = next((place for place, names in shown if names - {"vis"} and place != rgb), None)
                drawn = [place for place in (rgb, other) if place is not None]
                while len(drawn) < instances:
                    drawn.append(own[len(drawn) % len(own)])
                batch += drawn
            yield batch


def cached_batches(
    labels: Sequence[int], infer: Callable[[int], set[str]], *, identities: int, instances: int
) -> Iterator[list[int]]:
    """Batches of positions without end; every sample is asked once, and people have lists with and without RGB."""
    rgb: dict[int, list[int]] = {}
    other: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        (rgb if "vis" in infer(place) else other).setdefault(label, []).append(place)
    everybody = sorted(rgb.keys() | other.keys())
    while True:
        people = random.sample(everybody, len(everybody))
        for first in range(0, len(people) - identities + 1, identities):
            batch: list[int] = []
            for person in people[first : first + identities]:
                with_rgb, without = rgb.get(person, []), other.get(person, [])
                pool = with_rgb + without
                drawn = []
                if with_rgb and without:
                    drawn = [random.choice(with_rgb), *random.sample(without, min(instances - 1, len(without)))]
                elif len(pool) >= instances:
                    drawn = random.sample(pool, instances)
                while len(drawn) < instances:
                    drawn.append(random.choice(pool))
                batch += drawn
            yield batch


def positions_by_person(labels: Sequence[int]) -> dict[int, list[int]]:
    """The positions of each person's samples."""
    owned: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        owned.setdefault(label, []).append(place)
    return owned


# ---------------------------------------------------------------------------------------------------------------------
# Records


def choose_files(sample: Record) -> dict[str, Path | None]:
    """A file per modality: the anchor, any near infra-red image, and drawings of one view where there are any of it."""
    view = random.choice(VIEWS)
    chosen: dict[str, Path | None] = {"vis": sample["anchor_vis"]}
    for modality in MODALITIES[1:]:
        files = sample["images"][modality]
        if modality in DRAWN:
            files = sample["images_by_view"][modality][view] or files
        chosen[modality] = random.choice(files) if files else None
    return chosen


class Records(Dataset[Record]):
    """Samples as dictionaries; each image is opened and transformed when its sample is asked for."""

    def __init__(self, samples: Sequence[Record], transform: Callable[[Path], Tensor], size: tuple[int, int]) -> None:
        self.samples, self.transform, self.size = samples, transform, size
        people = sorted({sample["pid"] for sample in samples})
        self.label = {person: label for label, person in enumerate(people)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Record:
        sample = self.samples[index]
        images, mask = {}, {}
        for modality, file in choose_files(sample).items():
            images[modality] = torch.zeros(3, *self.size) if file is None else self.transform(file)
            mask[modality] = 0.0 if file is None else 1.0
        return {
            "person_id": torch.tensor(self.label[sample["pid"]]),
            "images": images,
            "modality_mask": mask,
            "modality": "vis" if mask["vis"] else next((name for name, has in mask.items() if has), "text"),
            "text_description": [sample["text_description"]],
        }


@dataclass(frozen=True)
class OneByOne:
    """The image of a file, drawn, cropped and made floats by itself: [3, H, W] at the size that the model sees."""

    frame: Frame
    flip: float
    pad: int
    erase: float
    erase_area: tuple[float, float] = (0.02, 0.4)

    def __call__(self, file: Path) -> Tensor:
        """Normalised floats."""
        return normalised(self.pixels(file))

    def pixels(self, file: Path) -> Tensor:
        """uint8."""
        image = load_image(file, *self.frame.stored)
        return augment(image[None], torch.tensor([self.draw()]), target=self.frame[:2])[0]

    def draw(self) -> list[int]:
        """What happens to an image, as a row of apps.reid.augment.draw_augment."""
        height, width = self.frame[:2]
        free_y, free_x = 2 * (self.frame.rows + self.pad), 2 * (self.frame.columns + self.pad)
        shift = [random.randint(0, free_y) - self.pad, random.randint(0, free_x) - self.pad]
        row = [int(random.random() < self.flip), *shift, 0, 0, 0, 0]
        if random.random() >= self.erase:
            return row
        for _ in range(10):
            area = height * width * random.uniform(*self.erase_area)
            aspect = math.exp(random.uniform(*map(math.log, ASPECT)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < tall < height and 0 < wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                return [*row[:3], top, left, top + tall, left + wide]
        return row


def normalised(image: Tensor) -> Tensor:
    """Bytes [..., 3, H, W] as floats, less CLIP's mean and over its deviation."""
    mean, std = (torch.tensor(values, device=image.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return image.float().div_(255).sub_(mean).div_(std)


def collate_records(records: Sequence[Record]) -> Record:
    """Records as one dictionary of tensors; an image that is all zeros is none, whatever its record says."""
    images, mask = {}, {}
    for modality in MODALITIES:
        parts, real = [], []
        for record in records:
            image = record["images"][modality]
            parts.append(image)
            real.append(float(bool(image.abs().sum() > 1e-6) and record["modality_mask"][modality] > 0.5))
        images[modality] = torch.stack(parts)
        mask[modality] = torch.tensor(real)
    texts = [record["text_description"][0] for record in records]
    mask["text"] = torch.tensor([float(isinstance(text, str) and bool(text.strip())) for text in texts])
    return {
        "person_id": torch.stack([record["person_id"] for record in records]),
        "images": images,
        "modality_mask": mask,
        "modality": [record["modality"] for record in records],
        "text_description": texts,
    }


def move_batch(value: Any, device: torch.device) -> Any:
    """The same nest of dictionaries and lists with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: move_batch(item, device) for key, item in value.items()}
    return [move_batch(item, device) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# Step


def clip_by_loops(parameters: Iterable[nn.Parameter], *, max_norm: float = MAX_NORM) -> float:
    """The norm of all gradients, which are repaired and clipped in place; two reads per parameter."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        assert parameter.grad is not None
        if not torch.isfinite(parameter.grad).all():  # a read
            parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
    total = 0.0
    for parameter in parameters:
        assert parameter.grad is not None
        total += parameter.grad.norm(2).item() ** 2  # a read
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return math.sqrt(total)


def log_by_reads(
    losses: Mapping[str, Tensor],
    logits_BP: Tensor,
    label_B: Tensor,
    features: Mapping[str, Tensor],
    modality_B: Sequence[str],
) -> dict[str, float]:
    """The figures that are read in every step: one read per figure, two to check the labels, one per sample for pairs.

    losses: total, ce and sdm, each a scalar. features: [B, E] by name, their mean norms are told.
    """
    assert label_B.min().item() >= 0  # a read
    assert label_B.max().item() < logits_BP.shape[1]  # a read
    told = {
        "loss": losses["total"].item(),
        "ce": losses["ce"].item(),
        "sdm": losses["sdm"].item(),
        "weighted_sdm": (losses["total"] - losses["ce"]).item(),
        "sum_sdm": losses["sdm"].item(),
        "correct": (logits_BP.argmax(1) == label_B).sum().item(),
    }
    for name, feature_BE in features.items():
        told[f"norm_{name}"] = feature_BE.norm(dim=1).mean().item()
    seen: dict[int, set[str]] = {}
    for label, modality in zip(label_B, modality_B, strict=True):
        seen.setdefault(int(label.item()), set()).add(modality)
    # compared with a name that no record carries, hence always 0
    told["pairs"] = float(sum("rgb" in found and len(found) > 1 for found in seen.values()))
    return told


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts in `count` how often the host asks for a value that the device computes, on CUDA a wait for all its work.

    Seen are item(), float(), int(), bool() and comparisons in an if; nonzero and what is built on it, as indexing by a
    mask, and unique; equal; and copies from another device to the CPU that wait. A whole tensor's tolist() and numpy()
    on the CPU pass unseen.
    """

    _READS = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self._READS:
            self.count += 1
        elif name in ("index", "index_put", "index_put_"):
            indexes = [index for index in args[1] if isinstance(index, Tensor)]
            self.count += any(index.dtype in (torch.bool, torch.uint8) for index in indexes)
        elif name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            waits = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            self.count += waits and source.device.type not in ("cpu", "meta") and target.device.type == "cpu"
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Model


class CallsPerModality:
    """Stands in for `encode_images` of a model: a call of the tower for every modality, with its own patches alone.

    The images of a batch stand one modality after another; `rows` says how many each has, before every step.
    """

    def __init__(self, model: ReID) -> None:
        self.rows: list[int] = []
        self._encode = model.encode_images
        self._tower = model.clip.image
        self._keeps_tokens = isinstance(model.fusion, TokenFusion)

    def __call__(self, image_RCHW: Tensor, modality_R: Tensor) -> Encoded:
        parts = []
        for number, (image, modality) in enumerate(
            zip(torch.split(image_RCHW, self.rows), torch.split(modality_R, self.rows), strict=True)
        ):
            if len(image):
                self._tower.embed_patches = partial(own_patches, self._tower, number)  # type: ignore[method-assign]
                parts.append(self._encode(image, modality))
        feature = torch.cat([part.feature for part in parts])
        return Encoded(feature, torch.cat([part.token for part in parts]) if self._keeps_tokens else feature)


def own_patches(tower: ImageTower, modality: int, image_RCHW: Tensor, is_own_RM: Tensor) -> Tensor:
    """Patches of images of that modality, [R, patches, D]: of floats by convolution, of bytes as the tower has them."""
    weight = tower.patch_weight[modality]
    if image_RCHW.is_floating_point():
        return F.conv2d(image_RCHW, weight, stride=tower.patch).flatten(2).transpose(1, 2)
    kind = image_RCHW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    weight, bias = fold_normalisation(weight, tower.mean, tower.std)
    return F.linear(cut_patches(image_RCHW, tower.patch).to(dtype), weight.flatten(1), bias)


def use_calls_per_modality(model: ReID) -> CallsPerModality:
    """Have the model encode one modality after another, in place; weights stay the same."""
    calls = CallsPerModality(model)
    model.encode_images = calls  # type: ignore[method-assign]
    return calls


def rows_by_modality(modality_R: Tensor) -> list[int]:
    """How many images each modality has."""
    found: list[int] = modality_R.bincount(minlength=NUM_IMAGES).tolist()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Ranking


def sorted_metrics(
    score_QG: Tensor, identity_Q: Tensor, identity_G: Tensor, left_out_QG: Tensor, *, ks: Sequence[int], together: bool
) -> dict[str, float]:
    """mAP, R1 and so on, and mINP: all scores are sorted. together: all queries are looked at at once, not in a loop.

    left_out_QG: gallery images that do not count for a query. Queries without a right image enter no mean.
    """
    order_QG = torch.argsort(score_QG, dim=1, descending=True)
    right_QG = (identity_G[order_QG] == identity_Q[:, None]) & ~left_out_QG.gather(1, order_QG)
    counted_QG = ~left_out_QG.gather(1, order_QG)
    found = _all_at_once(right_QG, counted_QG, ks) if together else _one_by_one(right_QG, counted_QG, ks)
    names = ("mAP", *(f"R{k}" for k in ks), "mINP")
    return dict(zip(names, found, strict=True))


def _one_by_one(right_QG: Tensor, counted_QG: Tensor, ks: Sequence[int]) -> list[float]:
    rows = []
    for right_G, counted_G in zip(right_QG, counted_QG, strict=True):
        hits = right_G[counted_G]
        if not hits.any():
            continue
        place = hits.nonzero().squeeze(1) + 1
        precision = torch.arange(1, len(place) + 1).double() / place
        reached = [float(place[0].item() <= k) for k in ks]
        rows.append([precision.mean().item(), *reached, len(place) / place[-1].item()])
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _all_at_once(right_QG: Tensor, counted_QG: Tensor, ks: Sequence[int]) -> list[float]:
    rank_QG, hits_QG = counted_QG.cumsum(1), right_QG.cumsum(1)
    count_Q = hits_QG[:, -1]
    has_Q = count_Q > 0
    precision_Q = (hits_QG.double() / rank_QG.clamp(min=1) * right_QG).sum(1)[has_Q] / count_Q[has_Q]
    first_Q = torch.where(right_QG, rank_QG, right_QG.shape[1] + 1).amin(1)[has_Q]
    last_Q = torch.where(right_QG, rank_QG, 0).amax(1)[has_Q]
    reached = [(first_Q <= k).double() for k in ks]
    means = torch.stack([precision_Q, *reached, count_Q[has_Q].double() / last_Q]).mean(1)
    found: list[float] = means.tolist()
    return found
