"""Index, data stage, clipping and host reads of reid against the arrangement it replaces, alternating in one run.

    python -m benchmarks.reid_data                         # 14,910 RGB samples, 34,750 JPEGs, made where there are none
    python -m benchmarks.reid_data --quick                 # 600 samples, few repeats
    python -m benchmarks.reid_data --equal-work            # also the other side with our list of augmentations

The other side is apps/reid/originals.py, written anew from a description, with Pillow transforms that are written here.

index        a dictionary per annotation, nine globs each; ours: read_data of the same folder and make_samples, without
             tokens: the other side makes them in every step, ours once
data stage   from 8 x 4 samples with four images each to a batch on the device.
             theirs: every JPEG decoded; resized crop (.8-1) to 224 x 224, flip .5, brightness and contrast .2, float,
             normalised, erasing (.3, area .02-.2), collated; 0 and 2 workers.
             equal work (--equal-work): the same per image, with our size and our augmentations instead.
             ours: gathered from the pack that `prepare` wrote, beside a GPU by a thread; on the device flip .5, crop to
             256 x 128 from 8 + 10 rows and 4 + 10 columns around, erasing (.5, area .02-.4) of the whole batch as
             uint8, and normalised floats. The model reads the uint8, for normalising is a part of its patch weights;
             hence rows for both.
clip         gradients searched for what is not finite, measured and clipped by loops over parameters; ours: one pass
host reads   how often a step asks the device for a value. theirs: the loops and the figures of the log, with 583
             parameters; what else its model and losses may ask for is not known and not counted. ours: the whole step

A run of a data row is a few batches that are not timed and then those that are. A ratio is the median of those of the
repeats, with the lowest and the highest. Planning an epoch is benchmarks/pk_sampler.py. Prints tables and, as its last
line, everything as JSON. Needs NumPy and Pillow.
"""

import argparse
import io
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from apps.reid import originals
from apps.reid.augment import CLIP_MEAN, CLIP_STD, MEAN_COLOUR, augment, draw_augment
from apps.reid.clipping import make_clip
from apps.reid.config import Config, ModelConfig, TrainConfig
from apps.reid.dataset import CP, MODALITIES, NIR, SK, TEXT, People, Samples, make_samples
from apps.reid.formats import prepare_source, read_data
from apps.reid.loaders import Batches, Loader, resolve_loader
from apps.reid.model import ReID, choose_subsets
from apps.reid.tokenizer import ByteTokenizer
from apps.reid.train import augmented, build, epoch_keys, loss_fn
from shared.amp import amp_step
from shared.device import describe_machine, pick_device, to_device
from shared.pk_sampler import make_pk_sampler, plan_epoch
from shared.seed import make_generator

np: Any = import_module("numpy")  # the extra `formats`, which the checks of types do without

Results = dict[str, Any]

SAMPLES, IDENTITIES = 14_910, 320
IMAGES = {"nir": 26, "cp": 18, "sk": 18}  # of each identity beside its RGB images
IDENTITIES_PER_BATCH, NUM_INSTANCES = 8, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SIZE, STORED, TARGET = (224, 224), (272, 136), (256, 128)
PAD = 10
BASES = 64  # distinct pictures; every file has its number in a comment, so that no two are equal
UNTIMED = 2  # batches of a run: as many as two workers have ready
OUR_FACTOR = 4  # our runs are shorter, hence more batches
FLOAT_ROWS = 4  # images that are made floats at a time on a CPU: they stay in its cache
STEP_STREAM = 90


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_tree(root: Path, num_samples: int) -> None:
    """A tree of JPEGs of 256 x 128 pixels and some 15 KB with text_annos.json, in the proportions of the real one."""
    whole = root / "whole.json"  # written last
    shape = {"samples": num_samples, "identities": num_identities(num_samples)}
    if whole.is_file() and json.loads(whole.read_text()) == shape:
        return
    bases = [base_picture(place) for place in range(BASES)]
    count = 0

    def write(path: str) -> None:
        nonlocal count
        base = bases[count % BASES]
        note = f"picture {count}".encode()
        comment = b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note
        (root / path).write_bytes(base[:2] + comment + base[2:])
        count += 1

    annotations = []
    for person in range(1, shape["identities"] + 1):
        folder = f"{person:04d}"
        for modality in ("vis", *IMAGES):
            (root / modality / folder).mkdir(parents=True, exist_ok=True)
        own = num_samples // shape["identities"] + (person <= num_samples % shape["identities"])
        for i in range(own):
            path = f"vis/{folder}/{folder}_sysu_{i // 20:04d}_cam{i % 4 + 1}_{i:04d}_vis.jpg"
            write(path)
            caption = f"Person {person} in picture {i} wears a dark coat, blue trousers and shoes, and carries a bag."
            annotations.append({"id": person, "file_path": path, "caption": caption, "split": "train"})
        for i in range(IMAGES["nir"]):
            write(f"nir/{folder}/{folder}_sysu_{i // 20:04d}_cam{5 + i % 2}_{i:04d}_nir.jpg")
        for modality, word in (("cp", "colorpencil"), ("sk", "sketch")):
            for i in range(IMAGES[modality]):
                view = originals.VIEWS[i % 3]
                write(f"{modality}/{folder}/{folder}_sysu_0001_{view}_{i // 3}_{word}.jpg")
    (root / originals.ANNOTATIONS).write_text(json.dumps(annotations))
    whole.write_text(json.dumps(shape))


def num_identities(num_samples: int) -> int:
    """As many as the real tree has for so many samples."""
    return max(IDENTITIES_PER_BATCH, round(num_samples * IDENTITIES / SAMPLES))


def base_picture(place: int) -> bytes:
    """A JPEG with soft shapes and noise."""
    rng = np.random.default_rng(place)
    y, x = np.mgrid[:256, :128]
    waves = [128 + 60 * np.sin(y / 40 + place + channel) + 40 * np.cos(x / 20 + channel) for channel in range(3)]
    noise = rng.normal(0, 12, (256, 128, 1)) + rng.normal(0, 4, (256, 128, 3))
    pixels = np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90)
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The other side's transforms


def resized_crop(image: Any) -> Any:
    """A crop of .8 to 1 of the area and an aspect of 3/4 to 4/3, resized to 224 x 224."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.8, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = random.randint(0, width - wide), random.randint(0, height - tall)
            break
    else:  # the middle, with the nearest aspect that is allowed
        aspect = min(max(width / height, 3 / 4), 4 / 3)
        wide, tall = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - wide) // 2, (height - tall) // 2
    return image.crop((left, top, left + wide, top + tall)).resize(SIZE[::-1], Image.Resampling.BILINEAR)


def jittered(image: Any) -> Any:
    """Brightness and contrast by .8 to 1.2 in any order."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast]
    random.shuffle(enhancers)
    for enhancer in enhancers:
        image = enhancer(image).enhance(random.uniform(0.8, 1.2))
    return image


def to_floats(image: Any) -> Tensor:
    """[3, H, W] float32, normalised."""
    pixel_HWC = torch.from_numpy(np.array(image))
    value_CHW = pixel_HWC.permute(2, 0, 1).contiguous().float().div(255)
    return value_CHW.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def erased(value_CHW: Tensor, probability: float, area: tuple[float, float]) -> Tensor:
    """The image with a rectangle of zeros, or without."""
    _, height, width = value_CHW.shape
    if random.random() >= probability:
        return value_CHW
    for _ in range(10):
        share = height * width * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        tall, wide = round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))
        if tall < height and wide < width:
            top, left = random.randint(0, height - tall), random.randint(0, width - wide)
            value_CHW[:, top : top + tall, left : left + wide] = 0
            break
    return value_CHW


def usual_transform(file: Path) -> Tensor:
    """The image of a file as the other side trains with it."""
    with Image.open(file) as opened:
        image = resized_crop(opened.convert("RGB"))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    return erased(to_floats(jittered(image)), 0.3, (0.02, 0.2))


def equal_transform(file: Path) -> Tensor:
    """The image of a file at our size with our augmentations, by the other side's means."""
    with Image.open(file) as opened:
        image = opened.convert("RGB").resize(STORED[::-1], Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    image = ImageOps.expand(image, PAD, fill=MEAN_COLOUR)
    top, left = (random.randint(0, image.size[1 - axis] - TARGET[axis]) for axis in range(2))
    return erased(to_floats(image.crop((left, top, left + TARGET[1], top + TARGET[0]))), 0.5, (0.02, 0.4))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def usual_loader(records: originals.Records, plan: Sequence[list[int]], workers: int) -> DataLoader[Any]:
    """The other side's loader, workers kept."""
    parallel: Results = {"persistent_workers": True, "prefetch_factor": 1} if workers else {}
    return DataLoader(
        records,
        batch_sampler=plan,
        collate_fn=originals.collate_records,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **parallel,
    )


def usual_batches(loader: DataLoader[Any], device: torch.device) -> Iterator[Any]:
    """Its batches on the device."""
    for batch in loader:
        yield originals.move_batch(batch, device)


def our_batches(
    loader: Loader, plan: Sequence[list[int]], device: torch.device, *, floats: bool
) -> Iterator[tuple[Tensor, ...]]:
    """Images, labels and tokens of our batches on the device."""
    out = None
    for step, batch in enumerate(loader.run([(0, places) for places in plan])):
        batch = to_device(batch, device)
        rows, height, width = len(batch.image), batch.image.shape[2], batch.image.shape[3]
        generator = make_generator(0, step=step, stream=STEP_STREAM)
        drawn = draw_augment(generator, rows, source=(height, width), target=TARGET, pad=PAD)
        image = augment(batch.image, to_device(drawn, device), target=TARGET)
        if floats:
            out = normalised(image, out)
        yield image if out is None else out[:rows], batch.label, batch.token


def normalised(image_RCHW: Tensor, out_RCHW: Tensor | None = None) -> Tensor:
    """Bytes as normalised floats, by blocks that stay in the cache of a CPU; written over `out` where it is given."""
    if out_RCHW is None or len(out_RCHW) < len(image_RCHW):
        out_RCHW = torch.empty(image_RCHW.shape, device=image_RCHW.device)
    mean, std = (torch.tensor(values, device=image_RCHW.device) for values in (CLIP_MEAN, CLIP_STD))
    scale, shift = (1 / (255 * std))[:, None, None], (-mean / std)[:, None, None]
    rows = FLOAT_ROWS if image_RCHW.device.type == "cpu" else len(image_RCHW)
    for first in range(0, len(image_RCHW), rows):
        part = image_RCHW[first : first + rows]
        out_RCHW[first : first + len(part)].copy_(part).mul_(scale).add_(shift)
    return out_RCHW


def seconds_per_batch(batches: Iterable[Any], device: torch.device) -> float:
    """What a batch takes once those that were ready have gone."""
    begin, count = 0.0, 0
    for _ in batches:
        count += 1
        if count == UNTIMED:
            wait_for(device)
            begin = time.perf_counter()
    wait_for(device)
    return (time.perf_counter() - begin) / (count - UNTIMED)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def adapter_parameters() -> list[nn.Parameter]:
    """What a frozen CLIP B/16 with low-rank experts of four modalities trains: 583 tensors."""
    width, hidden, rank, embed = 768, 3072, 4, 512
    linears = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
    experts = [shape for inputs, outputs in linears for shape in ((rank, inputs), (outputs, rank))]
    shapes = [*experts * 12 * 4, (embed,), (400, embed), *[(embed,)] * 5]  # neck, classifier and null tokens
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


def with_gradients(parameters: Iterable[nn.Parameter], device: torch.device) -> list[nn.Parameter]:
    """The parameters on the device, with gradients that are drawn."""
    generator = torch.Generator().manual_seed(0)
    found = [nn.Parameter(parameter.detach().to(device)) for parameter in parameters]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-2).to(device)
    return found


def count_reads(step: Callable[[], object]) -> int:
    """How often a step asks the device for a value."""
    with originals.HostReads() as reads:
        step()
    return reads.count


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def compare(ways: Mapping[str, Callable[[], float]], repeats: int, show: Callable[[float], str]) -> Results:
    """Runs of all ways, alternating; a line for each with its median, and for ours how much faster than each other."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(run())
    results: Results = {}
    others = {name: f"({letter})" for name, letter in zip(ways, "abcd", strict=False) if not name.startswith("ours")}
    for name, own in seconds.items():
        middle = statistics.median(own)
        print(f"{others.get(name, ''):3s} {name:40s} {show(middle)} ({show(min(own))} .. {show(max(own))})")
        results[name] = {"median_s": middle, "all_s": own}
        for other, letter in others.items() if name.startswith("ours") else ():
            ratios = [theirs / ours for theirs, ours in zip(seconds[other], own, strict=True)]
            ratio = (statistics.median(ratios), min(ratios), max(ratios))
            print(f"    {'':40s} x{ratio[0]:.1f} of {letter} ({ratio[1]:.1f} .. {ratio[2]:.1f})")
            results[name][f"times as fast as {other}"] = ratio
    return results


def measure_index(tree: Path, repeats: int) -> Results:
    """From a folder to what batches are drawn from."""

    def ours() -> Samples:
        people = read_data(tree, val_share=0.0)
        return make_samples(people, torch.zeros(len(people.captions), 77, dtype=torch.int16), seed=0)

    def timed(make: Callable[[], object]) -> float:
        begin = time.perf_counter()
        make()
        return time.perf_counter() - begin

    print("\nindex")
    ways = {"nine globs per annotation": partial(timed, partial(originals.index_by_globs, tree))}
    return compare({**ways, "ours": partial(timed, ours)}, repeats, lambda value: f"{value:8.3f} s")


def measure_batches(
    tree: Path, people: People, *, device: torch.device, batches: int, repeats: int, equal_work: bool
) -> Results:
    """From a plan's batches to images on the device."""
    tokenizer = ByteTokenizer()
    samples = make_samples(people, tokenizer.encode_batch(people.captions), seed=0)
    sampler = make_pk_sampler(
        samples.label,
        torch.zeros_like(samples.label),  # every sample has an RGB image
        identities_per_batch=IDENTITIES_PER_BATCH,
        num_instances=NUM_INSTANCES,
    )
    plan = plan_epoch(sampler, seed=0, epoch=0).flatten(1).tolist()
    plan = list(itertools.islice(itertools.cycle(plan), OUR_FACTOR * batches + UNTIMED))
    records = originals.index_by_globs(tree)
    ways: dict[str, Callable[[], float]] = {}
    transforms = {"theirs": (usual_transform, SIZE)}
    if equal_work:
        transforms["theirs, equal work"] = (equal_transform, TARGET)
    for name, (transform, size) in transforms.items():
        for workers in (0, 2):
            data = originals.Records(records, transform, size)
            loader = usual_loader(data, plan[: batches + UNTIMED], workers)
            ways[f"{name}, {workers} workers"] = partial(usual_run, loader, device)
    settings = resolve_loader(TrainConfig(), people.images, device=device, platform=sys.platform)
    ours = Loader(Batches(samples, tuple(range(len(MODALITIES))), 0.0), settings, device)
    for name, floats in (("ours, augmented uint8", False), ("ours, normalised floats", True)):
        ways[name] = partial(our_run, ours, plan, device, floats)
    per_batch = 4 * IDENTITIES_PER_BATCH * NUM_INSTANCES
    print(
        f"\na batch of {per_batch} images on {device}, of {batches} batches a run ({OUR_FACTOR} times as many of ours)"
    )
    for run in ways.values():  # starts workers, and has every file in the page cache
        run()
    return compare(ways, repeats, milliseconds)


def usual_run(loader: DataLoader[Any], device: torch.device) -> float:
    return seconds_per_batch(usual_batches(loader, device), device)


def our_run(loader: Loader, plan: Sequence[list[int]], device: torch.device, floats: bool) -> float:
    return seconds_per_batch(our_batches(loader, plan, device, floats=floats), device)


def measure_clip(device: torch.device, repeats: int) -> Results:
    """Repairing, measuring and clipping gradients, as they come from a backward pass."""
    results = {}
    subsets = choose_subsets("all", (NIR, CP, SK, TEXT))
    model = ReID(
        ModelConfig(),
        vocab_size=ByteTokenizer.vocab_size,
        context=160,
        num_identities=320,
        grid=(8, 4),
        subsets=subsets,
    )
    for name, found in (("the default model", model.parameters()), ("adapters of CLIP B/16", adapter_parameters())):
        parameters = with_gradients(found, device)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        drawn = [gradient.clone() for gradient in gradients]
        clip = make_clip(first=1.0, window=100, quantile=0.7, low=0.5, high=3.0, device=device)

        def timed(run: Callable[[], object], gradients: Any = gradients, drawn: Any = drawn) -> float:
            torch._foreach_copy_(gradients, drawn)
            wait_for(device)
            begin = time.perf_counter()
            run()
            wait_for(device)
            return time.perf_counter() - begin

        size = sum(gradient.numel() for gradient in gradients)
        print(f"\nclip, {name}: {len(gradients)} tensors, {size / 1e6:.1f} M numbers")
        ways: dict[str, Callable[[], float]] = {
            "loops over parameters": partial(timed, partial(originals.clip_by_loops, parameters)),
            "ours": partial(timed, partial(clip, gradients)),
        }
        for run in ways.values():
            run()
        results[name] = compare(ways, repeats, milliseconds)
    return results


def measure_reads(pack: Path, device: torch.device) -> Results:
    """Reads of the host in a step: of theirs what is known of it after the backward pass, of ours all of it."""
    parameters = with_gradients(adapter_parameters(), device)
    rows = IDENTITIES_PER_BATCH * NUM_INSTANCES
    logits, label = torch.zeros(rows, 400, device=device), torch.arange(rows, device=device) // NUM_INSTANCES
    losses = {name: torch.ones((), device=device) for name in ("total", "ce", "sdm")}
    features = {name: torch.zeros(rows, 512, device=device) for name in ("vis", "fused", "neck")}

    def theirs() -> None:
        originals.clip_by_loops(parameters)
        originals.log_by_reads(losses, logits, label, features, ["vis"] * rows)

    training = TrainConfig(device=str(device))
    c = build(Config(training=training), read_data(pack))
    batch = Batches(c.samples, c.modalities, 0.0)[epoch_keys(c, epoch=0)[0]]

    def ours() -> None:
        moved = augmented(c, batch, epoch=0, number=0)
        amp_step(c.state, [moved], partial(loss_fn, training=training), amp=c.amp, clip=c.clip)

    results = {"theirs": count_reads(theirs), "ours": count_reads(ours)}
    print("\nhost reads of a step that is not logged")
    print(f"theirs, {len(parameters)} parameters, after the backward pass    {results['theirs']:8d}")
    print(f"ours, the default model, from batch to optimizer     {results['ours']:8d}")
    return results


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:8.2f} ms"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="where the tree and its pack are, or are made (default: below runs/)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="RGB images of the tree")
    parser.add_argument("--batches", type=int, default=12, help="timed batches of a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way; 5 times as many of clip")
    parser.add_argument("--equal-work", action="store_true", help="also the other side with our augmentations")
    parser.add_argument("--quick", action="store_true", help="600 samples, 3 batches, 3 repeats")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: as torch has it)")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.batches, options.repeats = min(options.samples, 600), 3, 3
    if options.threads:
        torch.set_num_threads(options.threads)
    random.seed(0)
    device = pick_device(options.device)
    folder = options.data or Path("runs") / "reid" / "bench-data"
    tree, pack = folder / f"tree-{options.samples}", folder / f"tree-{options.samples}.safetensors"

    begin = time.perf_counter()
    write_tree(tree, options.samples)
    made_s = time.perf_counter() - begin
    begin = time.perf_counter()
    if not pack.is_file():
        prepare_source(tree, pack)
    prepared_s = time.perf_counter() - begin
    people = read_data(pack, val_share=0.0)
    count = people.num_images
    print(f"{options.samples:,} RGB images of {people.num_identities} identities, {count:,} JPEGs")
    print(f"tree {made_s:.0f} s, prepare {prepared_s:.0f} s (0: they were there)")
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    results = {
        "index": measure_index(tree, options.repeats),
        "data": measure_batches(
            tree,
            people,
            device=device,
            batches=options.batches,
            repeats=options.repeats,
            equal_work=options.equal_work,
        ),
        "clip": measure_clip(device, 5 * options.repeats),
        "host_reads": measure_reads(pack, device),
    }
    print(json.dumps({"machine": describe_machine(), "samples": options.samples, "prepare_s": prepared_s, **results}))


if __name__ == "__main__":
    main()
