"""Vectors and ids in the files that faiss tools read: .fbin and .u64bin.

Legend: N rows, D dim.

Both begin with two little-endian 32-bit integers, the number of rows and of columns; float32 values (.fbin) or unsigned
64-bit ids in one column (.u64bin) follow row by row. A header is as long as one id or two values, so that a file is
mapped as one flat array whose first elements are skipped.
"""

import ctypes
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from shared.files import atomic_writer

_HEADER = struct.Struct("<ii")
_MAX_ROWS = (1 << 31) - 1


def write_fbin(path: Path, chunks: Iterable[Tensor], *, num_rows: int, dim: int) -> None:
    """Write vectors that come in chunks of rows ([n, D], any float type and device); the file is whole or absent."""
    _check_count(path, num_rows)
    if dim < 1:
        raise ValueError(f"{path}: vectors of {dim} numbers; expected at least 1")
    done = 0
    with atomic_writer(path) as file:
        file.write(_HEADER.pack(num_rows, dim))
        for chunk in chunks:
            if chunk.ndim != 2 or chunk.shape[1] != dim:
                raise ValueError(f"{path}: expected chunks of shape (rows, {dim}), found {tuple(chunk.shape)}")
            done += len(chunk)
            _write_values(file, chunk.float())
        if done != num_rows:
            raise ValueError(f"{path}: {num_rows} rows were announced and {done} came; nothing was written")


def write_u64bin(path: Path, ids: Tensor) -> None:
    """Write ids ([N] integers from 0); the file is whole or absent."""
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ValueError(f"{path}: expected ids as integers [N], found {tuple(ids.shape)} of {ids.dtype}")
    _check_count(path, len(ids))
    if len(ids) and int(ids.min()) < 0:
        raise ValueError(f"{path}: the id {int(ids.min())} is negative; the file holds unsigned ones")
    with atomic_writer(path) as file:
        file.write(_HEADER.pack(len(ids), 1))
        _write_values(file, ids.long())


def read_fbin(path: Path) -> Tensor:
    """The vectors of a file, [N, D] float32, mapped; writing into the tensor never reaches the file."""
    num_rows, dim = _header(path, item_bytes=4)
    return _mapped(path, torch.float32, num_rows * dim, skip=2).view(num_rows, dim)


def read_u64bin(path: Path) -> Tensor:
    """The ids of a file, [N] int64, mapped; ids that do not fit into 63 bits are refused."""
    num_rows, columns = _header(path, item_bytes=8)
    if columns != 1:
        raise ValueError(f"{path}: expected ids in 1 column, found {columns}; give the path of a .u64bin file")
    ids_N = _mapped(path, torch.int64, num_rows, skip=1)
    if num_rows and int(ids_N.min()) < 0:
        raise ValueError(f"{path}: an id is {int(ids_N.min()) + (1 << 64)}; expected ids below {1 << 63}")
    return ids_N


def _check_count(path: Path, num_rows: int) -> None:
    if not 0 <= num_rows <= _MAX_ROWS:
        raise ValueError(f"{path}: {num_rows} rows; the header can count from 0 to {_MAX_ROWS}: split the file")


def _write_values(file: BinaryIO, values: Tensor) -> None:
    host = values.detach().cpu().contiguous()
    num_bytes = host.numel() * host.element_size()
    if num_bytes:
        file.write((ctypes.c_ubyte * num_bytes).from_address(host.data_ptr()))


def _header(path: Path, *, item_bytes: int) -> tuple[int, int]:
    """Rows and columns of a file that is as long as they say."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ValueError(f"{path}: expected a header of {_HEADER.size} bytes, found {size}; write the file again")
    num_rows, dim = _HEADER.unpack(head)
    if num_rows < 0 or dim < 1:
        raise ValueError(f"{path}: the header says {num_rows} rows of {dim}; the file is of another form or damaged")
    expected = _HEADER.size + num_rows * dim * item_bytes
    if size != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for {num_rows} rows of {dim}, found {size}; "
            "it is cut or of another form: write it again"
        )
    return num_rows, dim


def _mapped(path: Path, dtype: torch.dtype, count: int, *, skip: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=count + skip, dtype=dtype)[skip:]
