"""Files that are whole or absent, and files of tensors that can vouch for themselves.

Three things live here. Atomic writing: temporary name, fsync, replace, fsync of the folder. A fingerprint of what files
contain. And safetensors files with the packs made of them: tensors plus one JSON record that knows every tensor's type,
shape and checksum.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# What json.dumps accepts. The exact recursive type would refuse a plain dict[str, int]: this is a name for the reader.
JSON: TypeAlias = Any
StrPath: TypeAlias = str | os.PathLike[str]


class DamagedFileError(ValueError):
    """The file's bytes are not those that were written."""


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writing

_REPLACE_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)  # Windows refuses while a virus scanner or a reader holds the file
_TEMPORARY = re.compile(r"\..+\.([1-9]\d{0,8})\.tmp", re.DOTALL)


def replace(src: StrPath, dst: StrPath) -> None:
    """Rename src over dst; a PermissionError is retried for about a second and a half before it is raised."""
    for pause in _REPLACE_PAUSES_S:
        try:
            os.replace(src, dst)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    os.replace(src, dst)


def fsync_folder(path: StrPath) -> None:
    """Make renames inside the folder durable; nothing to do on Windows, which cannot open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: StrPath) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well, and leaves no trace when it does not."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:  # open() gives 0666 & ~umask, so a group can read it
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


def atomic_write_bytes(path: StrPath, data: bytes) -> None:
    """Write the file so that a crash at any moment leaves the old contents or the new, never a mixture."""
    with atomic_writer(path) as file:
        file.write(data)


def atomic_write_text(path: StrPath, text: str) -> None:
    """Write UTF-8 text with its line ends unchanged, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode("utf-8"))


def remove_stale_temporaries(folder: StrPath) -> list[Path]:
    """Delete what writers killed in the middle left behind in the folder, and return those paths.

    A temporary file belongs to the process in its name and is kept while a process with that number lives on this
    machine. Where several machines write into one folder, call this from one that knows the others are idle.
    """
    removed = []
    for path in sorted(Path(folder).iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or int(match[1]) == os.getpid() or _is_alive(int(match[1])):
            continue
        try:
            path.unlink(missing_ok=True)
        except PermissionError:  # Windows: its writer lives and holds it open
            continue
        removed.append(path)
    return removed


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl+C there; a living writer's file cannot be deleted anyway
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints

_WHOLE_BELOW_BYTES = 256 << 20
_SAMPLE_BLOCKS = 64
_BLOCK_BYTES = 1 << 20


def fingerprint(paths: Sequence[StrPath]) -> str:
    """32 hexadecimal digits that change when a file's name, size or contents change, or the order of the files.

    The folder does not count, so moved data keeps its fingerprint. Of a file larger than 256 MiB only 64 evenly spaced
    blocks of 1 MiB (the first and the last among them) and the size are read: a change that keeps the size and falls
    between the blocks goes unnoticed, which is the price of not reading 100 GB at every start.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in map(Path, paths):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode() + b"\n")
        with path.open("rb") as file:
            if size <= _WHOLE_BELOW_BYTES:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
            else:
                for i in range(_SAMPLE_BLOCKS):
                    file.seek(i * (size - _BLOCK_BYTES) // (_SAMPLE_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors. The library's own save_file needs NumPy, holds everything in memory, writes mode 0600 and does not fsync.

_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
}
_MAX_HEADER_BYTES = 100_000_000  # readers refuse more


def _on_host(tensor: Tensor) -> Tensor:
    """The tensor's values as contiguous CPU memory; the tensor itself where it is that already."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _raw(host: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; valid while the tensor lives."""
    num_bytes = host.numel() * host.element_size()
    if num_bytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(host.data_ptr()))


def tensor_crc32(tensor: Tensor) -> int:
    """CRC-32 of the tensor's values in C order, as zlib computes it over their bytes."""
    host = _on_host(tensor)
    return zlib.crc32(_raw(host))


def _stored_shape(tensor: Tensor) -> list[int]:
    """The shape as the format counts it: a byte of float4_e2m1fn_x2 is one element for torch and two for the format."""
    packed = 2 if tensor.dtype is torch.float4_e2m1fn_x2 else 1
    return [*tensor.shape[:-1], *(size * packed for size in tensor.shape[-1:])]


def _check_storable(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "without data (device meta)" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        raise ValueError(f"tensor {name!r} is {kind}; only plain dense tensors can be written: convert it first")
    if tensor.dtype not in _DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_NAMES)
        raise ValueError(
            f"tensor {name!r} has dtype {tensor.dtype}, which the format lacks; convert it to one of {known}"
        )


def write_safetensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, one tensor at a time, so that no second copy of the whole is held.

    Tensors may be strided views, on any device, and may share memory (each is stored in full).
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest elements first keeps every tensor aligned to its element size when the file is mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        if name == "__metadata__":
            raise ValueError("a tensor cannot be called '__metadata__': the format keeps that name; rename it")
        _check_storable(name, tensor)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": _stored_shape(tensor),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(
            f"{path}: the header would take {len(text)} bytes, readers accept {_MAX_HEADER_BYTES}; "
            "store large values as tensors"
        )
    with atomic_writer(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            host = _on_host(tensors[name])
            file.write(_raw(host))


def read_safetensors(path: StrPath) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; the tensors are memory-mapped and read when they are used.

    Writing into such a tensor never reaches the file. While one lives, Windows will not let the file be replaced: clone
    what must outlive the reading. Raises DamagedFileError for a file that is truncated or is no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise DamagedFileError(
            f"{path}: not a readable safetensors file ({_first_line(error)}); "
            "it is truncated, damaged or of another format: restore it or write it again"
        ) from error
    return tensors, metadata


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---------------------------------------------------------------------------------------------------------------------
# Packs: a safetensors file that can vouch for itself. Neither safetensors nor torch.save notices a flipped bit.

PACK_KEY = "pack"
_PACK_CRC_KEY = "pack_crc32"
_PACK_FORMAT = 1


def write_pack(path: StrPath, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
    """Write tensors and a JSON description as one self-checking file; `meta["kind"]` says what it is.

    What was made from other files should carry their `fingerprint` in `meta`, so that a reader notices changed sources.
    """
    if not isinstance(meta.get("kind"), str):
        raise ValueError(f'{path}: a pack needs meta["kind"], a string that says what it holds')
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    record = {name: [_DTYPE_NAMES[t.dtype], list(t.shape), tensor_crc32(t)] for name, t in tensors.items()}
    document = {"format": _PACK_FORMAT, "meta": dict(meta), "tensors": record}
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    write_safetensors(path, tensors, {PACK_KEY: text, _PACK_CRC_KEY: f"{zlib.crc32(text.encode()):08x}"})


def read_pack(path: StrPath, *, kind: str, verify: bool = False) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """The memory-mapped tensors, in the order they were written, and the description of a pack of this kind.

    The description and the names, types and shapes of the tensors are always checked; `verify` also reads every tensor
    and compares its checksum, which finds any flipped bit. Raises DamagedFileError, or ValueError for another kind.
    """
    found, metadata = read_safetensors(path)
    if PACK_KEY not in metadata and _PACK_CRC_KEY not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one of ours: it holds no pack record; write it again")
    text = metadata.get(PACK_KEY, "")
    if metadata.get(_PACK_CRC_KEY) != f"{zlib.crc32(text.encode()):08x}":
        raise _damaged(path, "its description does not match its checksum")
    try:
        number, meta, record = _parse_record(text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its description cannot be understood ({_first_line(error)})") from error
    if number != _PACK_FORMAT:
        raise ValueError(f"{path}: pack format {number}, this program reads {_PACK_FORMAT}; write it again or update")
    if meta.get("kind") != kind:
        raise ValueError(f"{path}: holds {meta.get('kind')!r}, expected {kind!r}; give the path of the right file")
    if set(record) != set(found):
        raise _damaged(path, f"tensors {sorted(set(record) ^ set(found))[:5]} are missing or unknown")
    for name, (dtype, shape, crc) in record.items():
        tensor = found[name]
        if (_DTYPE_NAMES.get(tensor.dtype), list(tensor.shape)) != (dtype, shape):
            raise _damaged(path, f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, written was {dtype} {shape}")
        if verify and tensor_crc32(tensor) != crc:
            raise _damaged(path, f"tensor {name!r} does not match its checksum")
    return {name: found[name] for name in record}, meta


def _parse_record(text: str) -> tuple[Any, dict[str, JSON], dict[str, tuple[str, list[int], int]]]:
    """Format number, description and the tensors' (dtype, shape, checksum); a foreign format's number alone."""
    document = json.loads(text)
    if document["format"] != _PACK_FORMAT:
        return document["format"], {}, {}
    record = {name: (dtype, list(shape), crc) for name, (dtype, shape, crc) in document["tensors"].items()}
    return _PACK_FORMAT, dict(document["meta"]), record


def _damaged(path: StrPath, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path}: damaged: {what}; restore it from a copy or write it again")


def relative_path(file: Path, folder: Path) -> str:
    """How to get from the folder to the file, so that both can be moved together; absolute between Windows drives."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return file.absolute().as_posix()


def changed_fingerprint(path: Path, recorded: Mapping[str, Any]) -> str | None:
    """The fingerprint of a source that is not what a pack recorded of it (size, mtime_ns, fingerprint), else None.

    Size and time of modification answer at once where nothing was touched; only else is the content read.
    """
    stat = path.stat()
    if (stat.st_size, stat.st_mtime_ns) == (recorded["size"], recorded["mtime_ns"]):
        return None
    current = fingerprint([path])
    return None if current == recorded["fingerprint"] else current


def ids_to_bytes(ids: Sequence[str]) -> Tensor:
    """The ids as UTF-8 with a line end behind each, [bytes] uint8: JSON would make a header of millions of names."""
    text = "".join(f"{name}\n" for name in ids)
    if text.count("\n") != len(ids):
        raise ValueError("an id contains a line end; ids are tokens of one line: rename it")
    data = bytearray(text.encode())
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_to_ids(data: Tensor) -> tuple[str, ...]:
    """The ids that `ids_to_bytes` wrote."""
    return tuple(ctypes.string_at(data.data_ptr(), data.numel()).decode().split("\n")[:-1])
