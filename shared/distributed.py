"""Data parallelism: which of the processes that torchrun started this one is, and the few things they exchange.

Started without torchrun, or with one process, there is no group: it is None, every function gives back what it was
given, and torch.distributed is left alone. All processes of a group call the same functions in the same order.

Tensors travel where they are, through NCCL between GPUs and gloo between CPUs; flags, metrics and texts always through
gloo, so that asking for them never waits for a device, and a process that was killed is noticed at the next one.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shared.device import pick_device

TIMEOUT = timedelta(minutes=10)  # longest wait for a process that lives but does not come, say while it saves


class LostPeerError(RuntimeError):
    """Another process of the group ended or does not answer: this one cannot go on either."""


@dataclass(frozen=True)
class Group:
    """The processes that train one model together, seen from one of them."""

    rank: int  # of this process, from 0
    world: int  # number of processes, at least 2
    device: torch.device  # of this process: a GPU has one process


def join(device_name: str) -> Group | None:
    """Meet the other processes that torchrun started; None where there are none.

    `device_name` is "auto", "cpu" or "cuda"; on CUDA each process takes the GPU of its local rank. Reads the
    environment that torchrun and the older torch.distributed.launch set.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if world < 2:
        return None
    if not dist.is_available():
        raise ValueError("this torch was built without torch.distributed; start one process, without torchrun")
    # Its functions have the group as a default value: imported later, as optimizers do, they would keep it alive after
    # leave(), and its threads with it, which can abort a process that ends.
    import torch.distributed.nn

    device = _own_device(device_name, local_rank=int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch's Windows builds come without it, yet ask for it
    nccl = device.type == "cuda" and dist.is_nccl_available()
    with _noticing_losses():
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=TIMEOUT)
    return Group(rank=int(os.environ["RANK"]), world=world, device=device)


def _own_device(name: str, *, local_rank: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    if name not in ("auto", "cuda"):
        raise ValueError(
            f"device {name!r} is one GPU for several processes; use cuda: each takes that of its local rank"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"this machine has {count} GPU(s) and more processes, which need one each; "
            f"use torchrun --nproc-per-node {count}, or --device cpu"
        )
    return pick_device(f"cuda:{local_rank}")


def leave(group: Group | None) -> None:
    """Part from the others after a run that ended well. After an error a process just ends, and the others notice."""
    if group is not None:
        dist.destroy_process_group()


def place(group: Group | None) -> tuple[int, int]:
    """Rank of this process and number of processes: (0, 1) without a group."""
    return (0, 1) if group is None else (group.rank, group.world)


def sum_(group: Group | None, tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in place; all tensors in one exchange.

    Every process gets the same bits, so that copies of a model that start equal stay equal.
    """
    if group is None or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    with _noticing_losses():
        dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def any_of(group: Group | None, flag: bool) -> bool:
    """Whether the flag is set in any process. No process goes on before all have asked."""
    if group is None:
        return flag
    number = torch.tensor(int(flag))
    with _noticing_losses():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return bool(number)


def wait_for_all(group: Group | None) -> None:
    """Go on once all processes have come here."""
    any_of(group, False)


def added_up(group: Group | None, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all processes, name by name: float64 scalars on the CPU, with the same names in every process."""
    if group is None:
        return dict(sums)
    total = torch.stack(list(sums.values()))
    with _noticing_losses():
        dist.all_reduce(total)
    return dict(zip(sums, total.unbind(), strict=True))


def text_of_first(group: Group | None, text: str) -> str:
    """The text that the first process passes; what the others pass is ignored."""
    if group is None:
        return text
    content = torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
    length = torch.tensor(content.numel())
    with _noticing_losses():
        dist.broadcast(length, src=0)
        if group.rank > 0:
            content = torch.empty(int(length), dtype=torch.uint8)
        if int(length):
            dist.broadcast(content, src=0)
    return bytes(content.tolist()).decode("utf-8", "surrogateescape")


def same_everywhere(group: Group | None, text: str) -> bool:
    """Whether all processes pass the same text."""
    if group is None:
        return True
    digest = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=7).digest(), "big")
    bounds = torch.tensor([digest, -digest])
    with _noticing_losses():
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
    return int(bounds[0]) == -int(bounds[1])


@contextmanager
def first_before_others(group: Group | None) -> Iterator[None]:
    """The block, in the first process before it begins in the others: what it writes, they find."""
    if place(group)[0] > 0:
        wait_for_all(group)
    yield
    if place(group)[0] == 0:
        wait_for_all(group)


@contextmanager
def _noticing_losses() -> Iterator[None]:
    """Turns what an exchange raises when a process is missing into LostPeerError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of gloo and of the store; torch has no narrower class for a closed connection
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]  # without gloo's file and advice
        raise LostPeerError(f"another process of this run ended or does not answer ({reason})") from error
