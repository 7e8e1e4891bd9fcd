"""One file is one whole checkpoint: a nested tree of tensors and plain values, checksummed, atomic, no pickle.

The file is a pack of `files` (safetensors plus one JSON record). Tensors stand under dotted names such as
`model.blocks.0.weight`; everything else is a JSON tree in which a small tag marks what JSON lacks: tensors, tuples,
dictionaries with other keys than strings, and numbers that are not finite.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.files import (
    JSON,
    PACK_KEY,
    DamagedFileError,
    StrPath,
    read_pack,
    read_safetensors,
    remove_stale_temporaries,
    write_pack,
)
from shared.pickles import describe_pickle

_KIND = "checkpoint"
_BEST = "best.safetensors"
_STEP = re.compile(r"step-(\d{8,})\.safetensors")
_WEIGHTS = "weights"  # its tensors are stored without this prefix, under the names that other programs expect


class CheckpointError(ValueError):
    """The file cannot be used as a checkpoint here."""


class DamagedCheckpointError(CheckpointError):
    """The file's bytes are not those that were written."""


class MismatchError(CheckpointError):
    """The checkpoint belongs to another app, configuration or data."""


# ---------------------------------------------------------------------------------------------------------------------
# One file


def save_checkpoint(path: StrPath, tree: Mapping[str, Any]) -> None:
    """Write the tree as one file, atomically: after a crash at any moment the old file or the new one is there.

    The tree may nest mappings, lists, tuples, tensors, numbers, strings, booleans and None; keys are any of the plain
    values. Tensors that share their memory in full, as tied weights do, are stored once and come back tied.
    """
    store = _Store()
    document = _encode(dict(tree), (), store)
    write_pack(path, store.tensors, {"kind": _KIND, "torch": str(torch.__version__), "tree": document})


def load_checkpoint(path: StrPath) -> dict[str, Any]:
    """The tree that was saved, equal to the last bit, its tensors on the CPU and independent of the file.

    Raises DamagedCheckpointError where a single bit differs from what was written, CheckpointError for another kind of
    file, FileNotFoundError for none.
    """
    try:
        mapped, meta = read_pack(path, kind=_KIND, verify=True)
    except DamagedFileError as error:
        raise DamagedCheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # Windows cannot replace a mapped file
    try:
        return dict(_decode(meta["tree"], tensors))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{path}: damaged: its tree cannot be understood ({error!r}); restore it"
        ) from error


@dataclass(slots=True)
class _Store:
    """Tensors collected while a tree is encoded, in the order they are met."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def add(self, keys: tuple[Any, ...], tensor: Tensor) -> str:
        """The name the tensor is stored under; that of an earlier one where both are the same memory."""
        layout = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        identity = (tensor.data_ptr(), tensor.device, *layout)
        if tensor.numel() and identity in self.names:
            return self.names[identity]
        plain = ".".join(str(key) for key in (keys[1:] if keys[0] == _WEIGHTS else keys)) or "tensor"
        name, number = plain, 1
        while name in self.tensors or name == "__metadata__":  # {"a.b": x, "a": {"b": y}}
            number += 1
            name = f"{plain}~{number}"
        self.tensors[name] = tensor
        self.names[identity] = name
        return name


def _encode(value: Any, keys: tuple[Any, ...], store: _Store) -> JSON:
    """The value as JSON. Tags are objects with one key that begins with "$"; an object that could be taken for one is
    written as a list of pairs."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return {"$tensor": store.add(keys, _plain(value, keys))}
    if type(value) is list:
        return [_encode(item, (*keys, i), store) for i, item in enumerate(value)]
    if type(value) in (tuple, torch.Size):
        return {"$tuple": [_encode(item, (*keys, i), store) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item, (*keys, key), store) for key, item in value.items()}
        pairs = [[_encode_key(key, keys), _encode(item, (*keys, key), store)] for key, item in value.items()]
        return {"$items": pairs}
    raise CheckpointError(
        f"{_dotted(keys)}: a checkpoint cannot hold a {type(value).__name__}; "
        "store tensors, numbers, strings, lists, tuples and mappings of them"
    )


def _encode_key(key: Any, keys: tuple[Any, ...]) -> JSON:
    if isinstance(key, Tensor | Mapping | list):
        raise CheckpointError(f"{_dotted(keys)}: a key of type {type(key).__name__} cannot be stored")
    if type(key) is tuple:
        return {"$tuple": [_encode_key(part, keys) for part in key]}
    return _encode(key, (*keys, key), _Store())


def _plain(tensor: Tensor, keys: tuple[Any, ...]) -> Tensor:
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"{_dotted(keys)}: a {tensor.layout} tensor on {tensor.device} cannot be stored; densify it"
        )
    return tensor.detach()


def _decode(node: JSON, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) == 1:
        ((tag, value),) = node.items()
        match tag:
            case "$tensor":
                return tensors[value]
            case "$tuple":
                return tuple(_decode(item, tensors) for item in value)
            case "$float":
                return float(value)
            case "$items":
                return {_decode(key, tensors): _decode(item, tensors) for key, item in value}
    return {key: _decode(item, tensors) for key, item in node.items()}


def _dotted(keys: tuple[Any, ...]) -> str:
    return ".".join(map(str, keys)) or "the tree"


# ---------------------------------------------------------------------------------------------------------------------
# A folder of them


def save_step(folder: StrPath, tree: Mapping[str, Any], *, step: int, keep: int) -> Path:
    """Write `step-00001234.safetensors` into the folder, delete older ones, and return its path.

    Of this step and the steps before it the newest `keep` stay. Later steps, left by a run that went further, are not
    touched. What writers that were killed left behind is removed.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}: at least the checkpoint just written must stay; use 1 or more")
    if step < 0:
        raise ValueError(f"step {step} is negative")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    save_checkpoint(path, tree)
    older = [(number, file) for number, file in _steps(folder) if number < step]
    for _, file in older[keep - 1 :]:
        with suppress(PermissionError):  # Windows: another program reads it; the next save tries again
            file.unlink(missing_ok=True)
    remove_stale_temporaries(folder)
    return path


def save_best(folder: StrPath, tree: Mapping[str, Any]) -> Path:
    """Write `best.safetensors` into the folder, a whole checkpoint that no retention rule deletes; return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / _BEST, tree)
    return folder / _BEST


def newest_checkpoint(folder: StrPath, *, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Path and tree of the readable checkpoint with the highest step, or None where the folder has none.

    The best one takes part with the "step" of its tree, or as the oldest where that is no integer; at the same step the
    step file is taken. Each one that cannot be read is named through `warn`, a damaged best one even where a later step
    is used. Where there are checkpoints and none can be read, raises DamagedCheckpointError that names them all.
    """
    folder = Path(folder)
    steps = _steps(folder)
    faults = []
    best = folder / _BEST
    if best.exists():
        try:
            # Killed between the two saves of a step, a run leaves a best one that is newer than every step file. Going
            # on from less could, where sums differ from run to run, leave weights beside it that this run never had.
            steps.append((_step_in(best), best))
        except (CheckpointError, OSError) as error:
            faults.append(str(error))
            if steps:
                warn(f"{error}. Going on without it")
    steps.sort(key=lambda entry: (entry[0], entry[1] != best), reverse=True)
    candidates = [path for _, path in steps]
    for i, path in enumerate(candidates):
        try:
            return path, load_checkpoint(path)
        except (CheckpointError, OSError) as error:
            faults.append(str(error))
            if i + 1 < len(candidates):
                warn(f"{error}. Going back to {candidates[i + 1].name}")
    if faults:
        listed = "\n  ".join(faults)
        raise DamagedCheckpointError(
            f"{folder}: none of its {len(faults)} checkpoints can be read:\n  {listed}\n"
            "Restore one from a copy, or start a new run."
        )
    return None


def _step_in(path: Path) -> int:
    """The step that the checkpoint's tree names, -1 where it names none; the tree is not kept, for it may be large."""
    step = load_checkpoint(path).get("step")
    return step if type(step) is int else -1


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The step files of the folder, newest first."""
    if not folder.is_dir():
        return []
    found = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def check_identity(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, path: StrPath, ignore: Collection[str] = ()
) -> None:
    """Raise MismatchError that lists every key whose value in the checkpoint differs from the expected one.

    Nested mappings are compared by dotted keys. A key in `ignore` exempts itself and everything below it. Lists equal
    tuples, since a YAML file cannot tell them apart.
    """
    old, new = _flatten(found, ""), _flatten(expected, "")
    lines = []
    for key in sorted(old.keys() | new.keys()):
        exempt = any(key == name or key.startswith(f"{name}.") for name in ignore)
        if not exempt and old.get(key, _ABSENT) != new.get(key, _ABSENT):
            lines.append(f"  {key}: {old.get(key, _ABSENT)} in the checkpoint, {new.get(key, _ABSENT)} now")
    if lines:
        raise MismatchError(
            f"{path}: the checkpoint belongs to another app, configuration or data; differing keys:\n"
            + "\n".join(lines)
            + "\nSet these to the checkpoint's values, or start a new run."
        )


_ABSENT = "(absent)"


def _flatten(mapping: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Dotted keys and the values as comparable, printable text (so that nan equals nan and 1 is not True)."""
    flat: dict[str, str] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = repr(_as_lists(value))
    return flat


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Weights alone

_TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    ValueError,
    OverflowError,
    AssertionError,
    struct.error,
)
_NESTED_UNDER = (_WEIGHTS, "ema", "model", "state_dict", "model_state_dict")  # the first that is there is taken


def save_weights(path: StrPath, model_state: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
    """Write a model's state for others: a safetensors file with the state's own names, and `meta` in its header."""
    save_checkpoint(path, {_WEIGHTS: dict(model_state), "meta": dict(meta)})


def load_weights(path: StrPath) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model's state and what the file says beside it, from any file that may hold one.

    Accepts what `save_weights` wrote, a whole checkpoint (its averaged weights `ema` where it has them, which are those
    that validation saw, else `model`), any other safetensors file, and `.pt`/`.pth` files, of which only tensors and
    plain values are read. The prefixes that DistributedDataParallel and torch.compile put before names are removed.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        tree, meta = _read_any_safetensors(path)
    elif suffix in (".pt", ".pth"):
        tree = _read_torch_file(path)
        meta = {}
    else:
        raise CheckpointError(f"{path}: weights are read from .safetensors, .pt and .pth files, not from {suffix!r}")
    if _is_state(tree):
        return _strip_prefixes(tree, path), meta
    place = next((key for key in _NESTED_UNDER if isinstance(tree, Mapping) and _is_state(tree.get(key))), None)
    if place is None:
        keys = ", ".join(sorted(map(str, tree))[:10]) if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
        raise CheckpointError(
            f"{path}: no model state found, at the top or under {', '.join(_NESTED_UNDER)}; it holds {keys}. "
            "Save model.state_dict() under one of these keys"
        )
    beside = {key: value for key, value in tree.items() if not _holds_tensors(value)}
    meta = beside["meta"] if place == _WEIGHTS and set(beside) == {"meta"} else beside
    return _strip_prefixes(tree[place], path), meta


def _read_any_safetensors(path: StrPath) -> tuple[Any, dict[str, Any]]:
    """The tree of one of our checkpoints, or the flat tensors and the metadata of another program's file."""
    try:
        mapped, metadata = read_safetensors(path)
    except DamagedFileError as error:
        raise DamagedCheckpointError(str(error)) from error
    if PACK_KEY in metadata:
        return load_checkpoint(path), {}
    return {name: tensor.clone() for name, tensor in mapped.items()}, dict(metadata)


def _read_torch_file(path: StrPath) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old protocols; what it reads is checked below
            return torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_LOAD_ERRORS as error:
        message = str(error)
        names = sorted({name.rstrip(".") for name in re.findall(r"GLOBAL ([\w.]+)", message)})
        if names:
            reason = f"refused: the file wants {', '.join(names)}, which is code and not tensors"
        else:  # torch's own advice to switch its protection off is not passed on
            parts = [part for part in message.split("\n\n") if part.strip() and "weights_only" not in part]
            detail = parts[0].strip()[:300] if parts else "damaged"
            reason = f"not readable as tensors ({type(error).__name__}: {detail})"
            if wanted := describe_pickle(path):
                reason += f"; it names {', '.join(wanted[:20])}"
        raise CheckpointError(
            f"{path}: {reason}. Save model.state_dict() alone, or as safetensors, with a program you trust"
        ) from None


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(type(key) is str and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _strip_prefixes(state: Mapping[str, Tensor], path: StrPath) -> dict[str, Tensor]:
    """The state without `_orig_mod.` at any place, and without `module.` where every name begins with it."""
    names = {name: re.sub(r"(^|\.)_orig_mod\.(?:_orig_mod\.)*", r"\1", name) for name in state}
    while all(name.startswith("module.") for name in names.values()):
        names = {old: name.removeprefix("module.") for old, name in names.items()}
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{path}: two tensors have the same name once wrapper prefixes are removed; save it unwrapped"
        )
    return {names[old]: tensor for old, tensor in state.items()}
