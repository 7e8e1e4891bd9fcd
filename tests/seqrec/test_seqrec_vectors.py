"""The files for faiss users, against struct."""

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apps.seqrec.vectors import read_fbin, read_u64bin, write_fbin, write_u64bin


def values(num_rows: int, dim: int) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(num_rows))


@pytest.mark.parametrize(("sizes", "dim"), [([3, 0, 4], 5), ([1], 1), ([], 3), ([7], 2)])
def test_vectors_are_written_as_struct_writes_them(sizes: list[int], dim: int, tmp_path: Path):
    whole = values(sum(sizes), dim)
    path = tmp_path / "a.fbin"
    write_fbin(path, iter(whole.split(sizes)) if sizes else iter([]), num_rows=len(whole), dim=dim)
    numbers = whole.flatten().tolist()
    assert path.read_bytes() == struct.pack(f"<ii{len(numbers)}f", len(whole), dim, *numbers)
    found = read_fbin(path)
    assert found.shape == (len(whole), dim)
    assert torch.equal(found, whole)


def test_vectors_of_other_types_and_layouts_become_float32(tmp_path: Path):
    whole = values(4, 6)
    write_fbin(tmp_path / "a.fbin", [whole.t().half(), whole.t().double()], num_rows=12, dim=4)
    assert torch.equal(read_fbin(tmp_path / "a.fbin"), torch.cat([whole.t().half().float(), whole.t()]))


def test_vectors_of_a_model_are_written_without_their_history(tmp_path: Path):
    write_fbin(tmp_path / "a.fbin", [values(2, 3).requires_grad_()], num_rows=2, dim=3)
    assert torch.equal(read_fbin(tmp_path / "a.fbin"), values(2, 3))


@pytest.mark.parametrize("ids", [[], [0], [5, 1 << 40, 7, (1 << 63) - 1]])
def test_ids_are_written_as_struct_writes_them(ids: list[int], tmp_path: Path):
    path = tmp_path / "a.u64bin"
    write_u64bin(path, torch.tensor(ids, dtype=torch.int64))
    assert path.read_bytes() == struct.pack(f"<ii{len(ids)}Q", len(ids), 1, *ids)
    assert read_u64bin(path).tolist() == ids


def test_small_integers_become_ids(tmp_path: Path):
    write_u64bin(tmp_path / "a.u64bin", torch.tensor([3, 4], dtype=torch.int32))
    assert read_u64bin(tmp_path / "a.u64bin").tolist() == [3, 4]


def test_writing_into_what_was_read_never_reaches_the_file(tmp_path: Path):
    write_fbin(tmp_path / "a.fbin", [values(2, 3)], num_rows=2, dim=3)
    read_fbin(tmp_path / "a.fbin").zero_()
    assert torch.equal(read_fbin(tmp_path / "a.fbin"), values(2, 3))


@pytest.mark.parametrize(
    ("chunks", "num_rows", "dim", "part"),
    [
        ([values(2, 3)], 3, 3, "3 rows were announced and 2 came"),
        ([values(2, 3)], 1, 3, "1 rows were announced and 2 came"),
        ([values(2, 3)], 2, 4, r"chunks of shape \(rows, 4\), found \(2, 3\)"),
        ([values(2, 3)[0]], 1, 3, r"found \(3,\)"),
        ([], -1, 3, "-1 rows"),
        ([], 1 << 31, 3, "split the file"),
        ([], 0, 0, "at least 1"),
    ],
)
def test_vectors_that_do_not_fit_leave_the_old_file(
    chunks: list[Tensor], num_rows: int, dim: int, part: str, tmp_path: Path
):
    path = tmp_path / "a.fbin"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=part):
        write_fbin(path, chunks, num_rows=num_rows, dim=dim)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_chunks_are_taken_one_at_a_time(tmp_path: Path):
    taken: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for n in range(4):
            taken.append(n)
            (temporary,) = tmp_path.iterdir()  # nothing has its name before all is there
            assert temporary.name != "a.fbin"
            yield torch.full((1, 2), float(n))

    write_fbin(tmp_path / "a.fbin", chunks(), num_rows=4, dim=2)
    assert taken == [0, 1, 2, 3]
    assert read_fbin(tmp_path / "a.fbin")[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (torch.tensor([1, -2]), "the id -2 is negative"),
        (torch.tensor([1.0]), "ids as integers"),
        (torch.tensor([[1]]), r"found \(1, 1\)"),
        (torch.tensor([True]), "ids as integers"),
    ],
)
def test_other_ids_are_refused(ids: Tensor, part: str, tmp_path: Path):
    with pytest.raises(ValueError, match=part):
        write_u64bin(tmp_path / "a.u64bin", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "header of 8 bytes, found 0"),
        (bytes(7), "header of 8 bytes, found 7"),
        (struct.pack("<ii", 2, 3) + bytes(23), "expected 32 bytes for 2 rows of 3, found 31"),
        (struct.pack("<ii", 2, 3) + bytes(25), "found 33"),
        (struct.pack("<ii", -1, 3), "the header says -1 rows of 3"),
        (struct.pack("<ii", 1, 0), "1 rows of 0"),
    ],
)
def test_cut_or_odd_vectors_are_refused(data: bytes, part: str, tmp_path: Path):
    path = tmp_path / "a.fbin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=part) as caught:
        read_fbin(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (struct.pack("<iiQ", 1, 2, 0), "expected 24 bytes for 1 rows of 2"),
        (struct.pack("<iiQQ", 1, 2, 0, 0), "ids in 1 column, found 2"),
        (struct.pack("<iiQ", 1, 1, 1 << 63), f"an id is {1 << 63}"),
        (struct.pack("<ii", 1, 1), "found 8"),
    ],
)
def test_cut_or_odd_ids_are_refused(data: bytes, part: str, tmp_path: Path):
    path = tmp_path / "a.u64bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=part):
        read_u64bin(path)


def test_missing_files_are_named(tmp_path: Path):
    for read in (read_fbin, read_u64bin):
        with pytest.raises(ValueError, match="nowhere: no such file"):
            read(tmp_path / "nowhere")


def test_numpy_is_not_needed(tmp_path: Path):
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from pathlib import Path; import torch; from apps.seqrec.vectors import *\n"
        "path = Path(sys.argv[1]); write_fbin(path, [torch.ones(2, 3)], num_rows=2, dim=3)\n"
        "print(read_fbin(path).sum())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "a.fbin")]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "tensor(6.)"
