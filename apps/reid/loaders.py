"""Batches made ahead of the training step: by one thread, or by worker processes that stay for the whole run.

Legend: B samples of a batch, R images of a batch.

A batch is a function of (seed, epoch, places of its samples) alone, so that it does not matter who makes it. From a
pack a batch is one gather of bytes, during which Python's lock is free: a thread does it beside the step, and nothing
is copied between processes. Decoding files keeps that lock for much of the time: that is what workers are for.
"""

import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.reid.config import TrainConfig
from apps.reid.dataset import MODALITIES, RGB, Batch, ImageFiles, Images, Samples, hash_numbers, make_batch

Key: TypeAlias = tuple[int, list[int]]  # epoch, and the places of a batch's samples

DROP_STREAM = 31  # and the three after it: nir, cp, sk, text
WINDOWS_WORKERS = 2
PREFETCH = 2  # batches ahead, where nothing else is asked for
WINDOWS_PREFETCH = 1
# The original's line: Windows optimisation, num_workers is limited to 2 to save what more processes cost.
WINDOWS_LINE = (
    f"Windows\u4f18\u5316\uff1a\u9650\u5236num_workers={WINDOWS_WORKERS}"
    "\u4ee5\u907f\u514d\u591a\u8fdb\u7a0b\u5f00\u9500"
)


# ---------------------------------------------------------------------------------------------------------------------
# What a batch is


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """`batches[epoch, places]` is a Batch without what is not used or dropped, here or in a worker process."""

    samples: Samples
    modalities: tuple[int, ...]  # of MODALITIES, those that are used
    modality_dropout: float

    def __getitem__(self, key: Key) -> Batch:
        epoch, places = key
        samples, place_B = self.samples, torch.tensor(places, dtype=torch.int64)
        keep_B5 = kept_modalities(place_B, self.modality_dropout, seed=samples.seed, epoch=epoch)
        keep_B5 &= torch.isin(torch.arange(len(MODALITIES)), torch.tensor(self.modalities))
        return make_batch(samples, place_B, epoch=epoch, keep_B5=keep_B5)


def kept_modalities(place_B: Tensor, dropout: float, *, seed: int, epoch: int) -> Tensor:
    """Which modalities of each sample stay in this epoch, [B, 5] bool: RGB always, every other with 1 - dropout."""
    keep_B5 = torch.ones(len(place_B), len(MODALITIES), dtype=torch.bool)
    if dropout > 0:
        for modality in range(RGB + 1, len(MODALITIES)):
            number_B = hash_numbers(place_B, seed, epoch, DROP_STREAM + modality - 1)
            keep_B5[:, modality] = (number_B >> 31) >= round(dropout * 2**32)
    return keep_B5


# ---------------------------------------------------------------------------------------------------------------------
# How batches are made


class LoaderConfig(NamedTuple):
    """Who makes batches, how far ahead, and why so."""

    workers: int  # processes; 0: one thread of this process
    prefetch: int  # batches ahead, of the thread or of each worker; 0: no thread, made when they are asked for
    pinned: bool  # in memory from which copies to the GPU do not hold the host up
    start_method: str | None  # of the processes; None: the platform's
    reason: str

    def line(self) -> str:
        """The settings and the reason, for the log."""
        parts = [f"workers={self.workers}", f"prefetch={self.prefetch}"]
        if self.workers:
            parts += [
                "persistent",
                f"started by {self.start_method}" if self.start_method else "started as is usual here",
            ]
        if self.pinned:
            parts.append("pinned")
        return f"loader: {', '.join(parts)}: {self.reason}"


def resolve_loader(training: TrainConfig, images: Images, *, device: torch.device, platform: str) -> LoaderConfig:
    """The settings that the flags, the kind of images and the platform (`sys.platform`) come to."""
    if training.start_method == "fork" and platform == "win32":
        raise ValueError("start_method is fork, which Windows does not have; use --start-method spawn or auto")
    is_files = isinstance(images, ImageFiles)
    workers, prefetch = training.num_workers, training.prefetch or PREFETCH
    start_method = None if training.start_method == "auto" else training.start_method
    if workers:
        reason = "as asked"
    elif device.type == "cpu" and not training.prefetch:
        # a thread's operations have a team of threads of their own, which fights the step's for the cores
        prefetch = 0
        reason = "batches are made when they are asked for, since the step needs all cores itself"
        if is_files:
            reason += "; --num-workers 2 would decode images beside it, a pack needs no decoding"
    elif is_files:
        reason = "a thread decodes the images; --num-workers 2 would do more of it at a time, a pack needs none of it"
    else:
        reason = "a thread reads the pack beside the step; workers would only copy its bytes once more"
    if training.windows:
        if workers == 0 and is_files:
            workers = WINDOWS_WORKERS
        workers = min(workers, WINDOWS_WORKERS)
        prefetch = WINDOWS_PREFETCH if workers else prefetch
        start_method = start_method or "spawn"
        why = "its workers stay, since starting one takes seconds"
        reason = f"--windows; {why}" if workers else f"--windows has no say here: {reason}"
    return LoaderConfig(workers, prefetch, device.type == "cuda", start_method if workers else None, reason)


class Loader:
    """Makes batches ahead, in the order of their keys; a context manager that ends the processes it has started."""

    def __init__(self, batches: Batches, settings: LoaderConfig, device: torch.device) -> None:
        self._batches = batches
        self._settings = settings
        self._device = device
        self._keys = _Keys()
        self._processes: DataLoader[Batch | str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._processes = None  # which ends the workers

    def run(self, keys: Sequence[Key]) -> Generator[Batch]:
        """The batches of these keys, on the host. Close it where not all of them are taken: one run at a time."""
        if self._settings.workers:
            return self._by_workers(keys)
        return self._by_thread(keys) if self._settings.prefetch else (self._make(key) for key in keys)

    def _by_thread(self, keys: Sequence[Key]) -> Generator[Batch]:
        pool = ThreadPoolExecutor(1, "batches", initializer=_use_device, initargs=(self._device,))
        left = iter(keys)
        try:
            ahead: deque[Future[Batch]] = deque()
            for key in islice(left, self._settings.prefetch):
                ahead.append(pool.submit(self._make, key))
            while ahead:
                batch = ahead.popleft().result()  # raises what was raised in the thread
                for key in islice(left, 1):
                    ahead.append(pool.submit(self._make, key))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _make(self, key: Key) -> Batch:
        batch = self._batches[key]
        return Batch(*(tensor.pin_memory() for tensor in batch)) if self._settings.pinned else batch

    def _by_workers(self, keys: Sequence[Key]) -> Generator[Batch]:
        settings = self._settings
        if self._processes is None:
            self._processes = DataLoader(
                _Reported(self._batches),
                batch_size=None,
                sampler=self._keys,
                collate_fn=collate,
                num_workers=settings.workers,
                prefetch_factor=settings.prefetch,
                persistent_workers=True,
                pin_memory=settings.pinned,
                multiprocessing_context=settings.start_method,
                worker_init_fn=start_worker,
                generator=torch.Generator(),  # else it would take a number from the one that dropout draws from
            )
        self._keys.keys = keys
        for found in self._processes:
            if isinstance(found, str):
                raise ValueError(found)
            yield found


class _Keys:
    """What a loader with processes goes through: the keys of the present run."""

    keys: Sequence[Key] = ()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Reported(Dataset[Batch | str]):
    """Batches in a worker: the message instead of a ValueError, which would arrive as a page of traces."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __getitem__(self, key: Key) -> Batch | str:
        try:
            return self._batches[key]
        except ValueError as error:
            return str(error)


def collate(found: Any) -> Any:
    """What a worker made: whole batches, so there is nothing to join."""
    return found


def start_worker(number: int) -> None:
    """Leave Ctrl+C to the main process, which ends the step at hand and then its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _use_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else pinning would open a context on the first GPU
