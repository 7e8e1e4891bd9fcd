"""Which device to train on, how a batch gets there, and what the machine is."""

import os
import platform
from pathlib import Path
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")

_CPUINFO = Path("/proc/cpuinfo")


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name ("auto", "cpu", "cuda", "cuda:1"); "auto" is CUDA if there is any, else the CPU.

    A CUDA device comes back with its index, so that it compares equal to the device of the tensors on it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    if device.type == "mps":
        raise ValueError(f"device {name!r} cannot be used: it has no float64, which losses are summed in; use cpu")
    if device.type != "cuda":
        raise ValueError(f"device {name!r} cannot be used here; use auto or cpu")
    if not torch.cuda.is_available():
        why = "this torch was built without it" if torch.version.cuda is None else "torch finds no usable GPU or driver"
        raise ValueError(f"device {name!r} asks for CUDA, but {why}; use auto or cpu, or install a CUDA build of torch")
    index = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device {name!r} does not exist: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor on `device`; tensors already there are the same objects, not copies.

    Towards CUDA the host does not wait for the copies: its tensors are copied to pinned memory first, and from there.
    Goes into NamedTuples and tuples; everything else (None, numbers, strings) stays as it is.
    """
    moved: Batch = _move(batch, device)
    return moved


def describe_machine() -> dict[str, str]:
    """What a measured number needs beside it: CPU, cores, threads, OS, Python, torch, and the GPUs if there are any."""
    facts = {
        "cpu": _cpu_model(),
        "cores": str(_usable_cores()),
        "threads": str(torch.get_num_threads()),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = ", ".join(gpu.name for gpu in gpus)
        facts["gpu_memory"] = ", ".join(f"{gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # from pageable memory even a non-blocking copy makes the host wait
        # Only towards CUDA: a non-blocking copy to the CPU could be read before it has arrived.
        return value.to(device, non_blocking=device.type == "cuda")
    if isinstance(value, tuple):
        moved = [_move(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _cpu_model() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, text = line.partition(":")
            if key.strip() == "model name" and text.strip():
                return " ".join(text.split())
    return platform.processor() or platform.machine() or "unknown"


def _usable_cores() -> int:
    # The cores this process may use, which in a container or under taskset are fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
