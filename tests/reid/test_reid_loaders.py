"""Batches made ahead: the same ones whoever makes them, errors that arrive, and nothing that is left running."""

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.reid.config import TrainConfig
from apps.reid.dataset import (
    MODALITIES,
    RGB,
    TEXT,
    Batch,
    Frame,
    ImageFiles,
    Images,
    PackedImages,
    People,
    make_batch,
    make_samples,
    make_texts,
)
from apps.reid.images import ImageError, png_bytes
from apps.reid.loaders import WINDOWS_LINE, Batches, Key, Loader, LoaderConfig, kept_modalities, resolve_loader
from shared.files import write_safetensors

CPU = torch.device("cpu")
EVERY = tuple(range(len(MODALITIES)))
FRAME = Frame(8, 4, 0, 0)
THREAD = LoaderConfig(workers=0, prefetch=2, pinned=False, start_method=None, reason="")
KEYS: list[Key] = [(epoch, places) for epoch in (0, 1) for places in ([0, 1, 2], [5, 4], [3], [2, 2, 0])]


def people_of(images: Images) -> People:
    """Three people with two RGB images and one of each other modality; nobody knows a caption of the last one."""
    modality = torch.tensor([RGB, RGB, 1, 2, 3] * 3)
    is_rgb = modality == RGB
    caption = torch.where(is_rgb, is_rgb.long().cumsum(0) - 1, -1)
    caption[-5:] = -1
    return People(
        identity=torch.arange(3).repeat_interleave(5),
        camera=torch.zeros(15, dtype=torch.int64),
        modality=modality,
        view=torch.full((15,), -1),
        caption=caption,
        captions=make_texts(["one", "two", "three", "four"]),
        path=make_texts([f"{i}.png" for i in range(15)]),
        images=images,
        identity_ids=("a", "b", "c"),
        num_identities=3,
        num_valid=0,
        valid=None,
        test=None,
        fingerprint="",
        name="made up",
        split="",
    )


def pixels() -> Tensor:
    return torch.randint(256, (15, 3, *FRAME.stored), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def batches_of(images: Images, *, modalities: tuple[int, ...] = EVERY, dropout: float = 0.0) -> Batches:
    token = torch.arange(1, 13, dtype=torch.int32).view(4, 3)
    return Batches(make_samples(people_of(images), token, seed=3), modalities, dropout)


@pytest.fixture
def pack(tmp_path: Path) -> PackedImages:
    file = tmp_path / "images.safetensors"
    write_safetensors(file, {"image": pixels()}, {})
    return PackedImages(file, FRAME, pixels())


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    for i, image in enumerate(pixels()):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(image))
    return ImageFiles(tmp_path, FRAME, make_texts([f"{i}.png" for i in range(15)]))


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")] == []
    assert multiprocessing.active_children() == []


def made(batches: Batches, settings: LoaderConfig, *runs: list[Key]) -> list[Batch]:
    with Loader(batches, settings, CPU) as loader:
        return [batch for keys in runs for batch in loader.run(keys)]


def equal(left: list[Batch], right: list[Batch]) -> bool:
    pairs = [(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# Batches


def test_a_batch_is_that_of_its_samples_in_its_epoch(pack: PackedImages):
    batches = batches_of(pack)
    for epoch, places in KEYS:
        assert equal([batches[epoch, places]], [make_batch(batches.samples, torch.tensor(places), epoch=epoch)])


def test_what_is_dropped_or_not_used_has_neither_image_nor_token_nor_mark(pack: PackedImages):
    batches = batches_of(pack, modalities=(0, 1, 3, 4), dropout=0.5)
    whole = batches_of(pack)
    marks = set()
    for epoch in range(12):
        places = [5, 0, 3, 1]
        batch, full = batches[epoch, places], whole[epoch, places]
        keep = kept_modalities(torch.tensor(places), 0.5, seed=3, epoch=epoch)
        keep[:, 2] = False
        assert torch.equal(batch.present, full.present & keep)
        found = set(zip(batch.slot.tolist(), batch.modality.tolist(), strict=True))
        assert found == {(slot, m) for slot in range(4) for m in range(4) if batch.present[slot, m]}
        assert bool(batch.present[:, RGB].all())
        assert torch.equal(batch.token, full.token * batch.present[:, TEXT, None])
        of = {(s, m): image for s, m, image in zip(full.slot.tolist(), full.modality.tolist(), full.image, strict=True)}
        for slot, modality, image in zip(batch.slot.tolist(), batch.modality.tolist(), batch.image, strict=True):
            assert torch.equal(image, of[slot, modality])
        marks |= found
    assert {m for _, m in marks} == {0, 1, 3}


def test_dropout_has_its_rate_never_takes_rgb_and_goes_by_sample_and_epoch():
    place = torch.arange(20_000)
    keep = kept_modalities(place, 0.3, seed=1, epoch=2)
    assert bool(keep[:, RGB].all())
    share = keep[:, 1:].double().mean(0)
    assert share.tolist() == pytest.approx([0.7] * 4, abs=0.015)
    both = (~keep[:, 1] & ~keep[:, 2]).double().mean()
    assert float(both) == pytest.approx(0.09, abs=0.01)  # modalities for themselves
    assert torch.equal(keep[100:200], kept_modalities(place[100:200], 0.3, seed=1, epoch=2))
    assert not torch.equal(keep, kept_modalities(place, 0.3, seed=1, epoch=3))
    assert bool(kept_modalities(place, 0.0, seed=1, epoch=2).all())


# Loaders


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_a_thread_makes_the_batches_of_the_keys_in_order(prefetch: int, pack: PackedImages):
    batches = batches_of(pack, dropout=0.3)
    found = made(batches, THREAD._replace(prefetch=prefetch), KEYS, [], KEYS[3:5])
    assert equal(found, [batches[key] for key in KEYS + KEYS[3:5]])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_make_the_same_batches_over_several_runs(method: str, pack: PackedImages):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform cannot fork")
    batches = batches_of(pack, dropout=0.3)
    before = torch.get_rng_state()
    settings = THREAD._replace(workers=2, prefetch=1, start_method=method)
    found = made(batches, settings, KEYS, KEYS[3:5])
    assert equal(found, [batches[key] for key in KEYS + KEYS[3:5]])
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from there


def test_the_thread_is_not_further_ahead_than_asked(pack: PackedImages):
    batches = batches_of(pack)
    asked: list[Key] = []

    class Watched(Batches):
        def __getitem__(self, key: Key) -> Batch:
            asked.append(key)
            return super().__getitem__(key)

    with closing(Loader(Watched(batches.samples, EVERY, 0.0), THREAD, CPU).run(KEYS)) as source:
        next(source)
        next(source)
    assert len(asked) <= 2 + THREAD.prefetch


def test_a_run_that_is_left_early_leaves_nothing_behind(pack: PackedImages):
    for settings in (THREAD, THREAD._replace(workers=1, start_method="fork")):
        if settings.workers and sys.platform == "win32":
            continue
        with Loader(batches_of(pack), settings, CPU) as loader:
            with closing(loader.run(KEYS)) as source:
                next(source)
            with closing(loader.run(KEYS)):
                pass  # never begun


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_in_the_main_process(workers: int, files: ImageFiles):
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform cannot fork")
    batches = batches_of(files)
    (files.root / "6.png").write_bytes(b"nothing")
    settings = THREAD._replace(workers=workers, start_method="fork" if workers else None)
    with Loader(batches, settings, CPU) as loader, closing(loader.run([(0, [0]), (0, [3]), (0, [1])])) as source:
        next(source)
        with pytest.raises(ValueError, match=r"6\.png: expected a readable image") as caught:
            next(source)
        assert "Traceback" not in str(caught.value)
    if not workers:
        assert isinstance(caught.value, ImageError)


def test_a_fault_of_the_program_arrives_from_the_thread_too(pack: PackedImages):
    with pytest.raises(IndexError):
        made(batches_of(pack), THREAD, [(0, [99])])


# Settings


def resolved(images: Images, *, platform: str = "linux", **training: Any) -> LoaderConfig:
    return resolve_loader(replace(TrainConfig(), **training), images, device=CPU, platform=platform)


def test_a_thread_is_the_default_beside_a_gpu_alone_and_the_reason_is_told(pack: PackedImages, files: ImageFiles):
    packed = resolved(pack)
    assert packed[:4] == (0, 0, False, None)
    assert packed.line().startswith("loader: workers=0, prefetch=0: batches are made when they are asked for")
    assert "--num-workers 2" in resolved(files).line()
    assert resolved(pack, prefetch=3).line().startswith("loader: workers=0, prefetch=3: a thread reads the pack")
    beside = resolve_loader(TrainConfig(), pack, device=torch.device("cuda"), platform="linux")
    assert beside[:4] == (0, 2, True, None)
    assert beside.line().startswith("loader: workers=0, prefetch=2, pinned: a thread reads the pack")


def test_without_a_thread_a_batch_is_made_when_it_is_asked_for(pack: PackedImages):
    batches = batches_of(pack, dropout=0.3)
    asked: list[Key] = []

    class Watched(Batches):
        def __getitem__(self, key: Key) -> Batch:
            asked.append(key)
            return super().__getitem__(key)

    watched = Watched(batches.samples, EVERY, 0.3)
    with closing(Loader(watched, THREAD._replace(prefetch=0), CPU).run(KEYS)) as source:
        first = next(source)
        assert asked == KEYS[:1]
        assert equal([first, *source], [batches[key] for key in KEYS])


def test_windows_means_two_workers_that_stay_where_workers_are_used(pack: PackedImages, files: ImageFiles):
    for images, workers in ((files, 0), (files, 4), (pack, 4), (pack, 2)):
        found = resolved(images, windows=True, num_workers=workers, prefetch=4)
        assert found[:4] == (2, 1, False, "spawn")
        assert found.line().startswith("loader: workers=2, prefetch=1, persistent, started by spawn: --windows")
    assert resolved(pack, windows=True, num_workers=1).workers == 1
    assert resolved(pack, windows=True, num_workers=2, start_method="fork").start_method == "fork"
    asked_for = resolved(pack, windows=True)
    assert asked_for[:4] == (0, 0, False, None)
    assert "--windows has no say here: batches are made when they are asked for" in asked_for.line()
    assert WINDOWS_LINE.isascii() is False
    assert "num_workers=2" in WINDOWS_LINE


def test_batches_are_pinned_for_a_gpu_alone(pack: PackedImages):
    found = resolve_loader(TrainConfig(num_workers=3), pack, device=torch.device("cuda"), platform="linux")
    assert found[:4] == (3, 2, True, None)
    assert found.line() == "loader: workers=3, prefetch=2, persistent, started as is usual here, pinned: as asked"


def test_forking_on_windows_is_refused(pack: PackedImages):
    with pytest.raises(ValueError, match="use --start-method spawn or auto"):
        resolved(pack, platform="win32", start_method="fork")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_thread_pins_what_goes_to_a_gpu(pack: PackedImages):
    with Loader(batches_of(pack), THREAD._replace(pinned=True), torch.device("cuda:0")) as loader:
        batches = list(loader.run(KEYS))
    assert all(tensor.is_pinned() for batch in batches for tensor in batch)
