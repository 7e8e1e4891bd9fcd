"""Atomic writing, fingerprints, safetensors and packs: against the standard library and safetensors."""

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shared import files
from shared.files import (
    DamagedFileError,
    atomic_write_bytes,
    atomic_write_text,
    fingerprint,
    read_pack,
    read_safetensors,
    remove_stale_temporaries,
    replace,
    tensor_crc32,
    write_pack,
    write_safetensors,
)

posix_only = pytest.mark.skipif(os.name == "nt", reason="file modes and process numbers are POSIX's")


def read_with_library(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert bytes(files._raw(files._on_host(a))) == bytes(files._raw(files._on_host(b)))


# Atomic writing


def test_written_file_holds_the_data_and_leaves_no_temporary(tmp_path):
    atomic_write_bytes(tmp_path / "a.bin", b"first")
    atomic_write_bytes(tmp_path / "a.bin", b"second")
    atomic_write_text(tmp_path / "b.txt", "zwei\nZeilen \u00e4\n")
    assert (tmp_path / "a.bin").read_bytes() == b"second"
    assert (tmp_path / "b.txt").read_bytes() == "zwei\nZeilen \u00e4\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.txt"]


def test_failure_while_writing_keeps_the_old_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write_bytes(path, b"old")

    def write_half() -> None:
        with files.atomic_writer(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_file_and_folder_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []

    def noted(name: str, real):
        def call(*arguments):
            events.append(name)
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    atomic_write_bytes(tmp_path / "a.bin", b"x")
    assert events == (["fsync", "replace"] if os.name == "nt" else ["fsync", "replace", "fsync"])


@posix_only
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_replace_survives_two_permission_errors(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    calls: list[Path] = []
    pauses: list[float] = []
    real = os.replace

    def held_twice(src, dst):
        calls.append(src)
        if len(calls) <= 2:
            raise PermissionError(13, "held by a scanner")
        real(src, dst)

    monkeypatch.setattr(os, "replace", held_twice)
    monkeypatch.setattr(time, "sleep", pauses.append)
    replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert len(calls) == 3
    assert len(pauses) == 2


def test_replace_gives_up_in_the_end_and_the_old_file_stays(tmp_path, monkeypatch):
    def held(src, dst):
        raise PermissionError(13, "held for ever")

    (tmp_path / "a.bin").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError, match="held for ever"):
        atomic_write_bytes(tmp_path / "a.bin", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"old"


@posix_only
def test_only_temporaries_of_dead_processes_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    dead = process.pid
    stale = tmp_path / f".step-00000001.safetensors.{dead}.tmp"
    kept = [f".a.{os.getpid()}.tmp", f".a.{os.getppid()}.tmp", ".a.tmp", f"a.{dead}.tmp", f".a.{dead}.tmp2", ".a.0.tmp"]
    for name in [stale.name, *kept]:
        (tmp_path / name).touch()
    assert remove_stale_temporaries(tmp_path) == [stale]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


# Fingerprints


def test_fingerprint_changes_with_name_size_contents_and_order_and_not_with_the_folder(tmp_path):
    def make(folder: str, name: str, data: bytes) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        path: Path = tmp_path / folder / name
        path.write_bytes(data)
        return path

    a, b = make("one", "a", b"12345"), make("one", "b", b"678")
    prints = [
        fingerprint([a, b]),
        fingerprint([b, a]),
        fingerprint([a]),
        fingerprint([]),
        fingerprint([make("two", "c", b"12345"), b]),
        fingerprint([make("three", "a", b"12346"), b]),
        fingerprint([make("four", "a", b"1234"), make("four", "b", b"5678")]),
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 32 and int(text, 16) >= 0 for text in prints)
    assert fingerprint([make("elsewhere", "a", b"12345"), make("elsewhere", "b", b"678")]) == prints[0]


def test_large_files_are_sampled_from_the_first_byte_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WHOLE_BELOW_BYTES", 1000)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 4)
    path = tmp_path / "big"
    data = bytearray(2000)
    path.write_bytes(data)
    whole = fingerprint([path])

    def changed(position: int) -> bool:
        other = bytearray(data)
        other[position] = 1
        path.write_bytes(other)
        return fingerprint([path]) != whole

    starts = [i * (2000 - 4) // 63 for i in range(64)]
    read = {start + offset for start in starts for offset in range(4)}
    assert {0, 1999} <= read
    assert all(changed(position) == (position in read) for position in [0, 3, 4, 31, 35, 1000, 1995, 1996, 1999])


# Safetensors

DTYPES = [*files._DTYPE_NAMES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_back_by_the_library(tmp_path, dtype):
    raw = torch.arange(48, dtype=torch.uint8) % (2 if dtype is torch.bool else 251)
    tensor = raw.view(dtype).reshape(2, -1)
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor}, {"note": "hello"})
    tensors, metadata = read_with_library(tmp_path / "a.safetensors")
    assert metadata == {"note": "hello"}
    assert tensors["x"].shape == tensor.shape
    assert tensors["x"].dtype is dtype
    assert torch.equal(tensors["x"].view(torch.uint8), tensor.view(torch.uint8))
    assert_same(read_safetensors(tmp_path / "a.safetensors")[0]["x"], tensor)


def test_views_shared_memory_and_odd_sizes_are_written_in_full(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(3, 6),
        "whole": base,
        "again": base,
        "parameter": torch.nn.Parameter(base + 0.5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 5, dtype=torch.int64),
        "three bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "half": torch.tensor([1.5], dtype=torch.float16),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    found, metadata = read_with_library(tmp_path / "a.safetensors")
    assert metadata == {}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name


def test_header_is_padded_and_every_tensor_is_aligned(tmp_path):
    tensors = {f"t{i}": torch.ones(24, dtype=torch.uint8).view(dtype)[:1] for i, dtype in enumerate(DTYPES)}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"k": "v"})
    data = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"k": "v"}
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(data) - 8 - length
    for name, entry in header.items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name_and_nothing_is_written(tmp_path, tensor, words):
    with pytest.raises(ValueError, match=rf"'layer\.weight'.*{words}.*convert it"):
        write_safetensors(tmp_path / "a.safetensors", {"fine": torch.ones(1), "layer.weight": tensor}, {})
    assert not list(tmp_path.iterdir())


def test_reserved_tensor_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="__metadata__"):
        write_safetensors(tmp_path / "a.safetensors", {"__metadata__": torch.ones(1)}, {})


def test_writing_into_a_read_tensor_does_not_reach_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.zeros(1000)}, {})
    before = path.read_bytes()
    tensors, _ = read_safetensors(path)
    tensors["x"].fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(read_safetensors(path)[0]["x"], torch.zeros(1000))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_read_tensors_are_memory_mapped(tmp_path):
    path = tmp_path / "mapped.safetensors"
    write_safetensors(path, {"x": torch.zeros(1000)}, {})
    tensors, _ = read_safetensors(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    del tensors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_truncated_and_foreign_files_are_named_as_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.arange(5), "y": torch.ones(3)}, {"k": "v"})
    data = path.read_bytes()
    faulty = [data[:length] for length in range(len(data))]
    faulty += [data + b"\0", b"\x80\x04K\x01.", b"\xff" * 100, struct.pack("<Q", 1 << 62) + data[8:]]
    for contents in faulty:
        path.write_bytes(contents)
        with pytest.raises(DamagedFileError, match=r"a\.safetensors: not a readable safetensors file"):
            read_safetensors(path)


def test_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_safetensors(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_are_written_and_summed_like_cpu_ones(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert tensor_crc32(tensor.cuda()) == tensor_crc32(tensor)
    write_safetensors(tmp_path / "a.safetensors", {"x": tensor.cuda()}, {})
    assert torch.equal(read_with_library(tmp_path / "a.safetensors")[0]["x"], tensor)


# Checksums and packs


def test_checksum_is_that_of_the_values_in_c_order():
    values = [1, -2, 3, 40000, 5, 6]
    expected = zlib.crc32(struct.pack("<6i", *values))
    tensor = torch.tensor(values, dtype=torch.int32).reshape(2, 3)
    assert tensor_crc32(tensor) == expected
    assert tensor_crc32(tensor.T.contiguous().T) == expected
    assert tensor_crc32(torch.tensor([1.5, -0.0], requires_grad=True)) == zlib.crc32(struct.pack("<2f", 1.5, -0.0))
    assert tensor_crc32(torch.empty(0)) == zlib.crc32(b"")
    assert tensor_crc32(torch.tensor(7, dtype=torch.uint8)) == zlib.crc32(b"\x07")


def test_pack_returns_tensors_in_order_and_the_description(tmp_path):
    tensors = {"offsets": torch.tensor([0, 2, 5]), "a": torch.tensor([1.0, 2.0]).bfloat16(), "items": torch.arange(5)}
    meta = {"kind": "events", "fingerprint": fingerprint([]), "names": ["x", None, {"n": 1.5}], "unicode": "\u00e4"}
    write_pack(tmp_path / "p.safetensors", tensors, meta)
    found, described = read_pack(tmp_path / "p.safetensors", kind="events", verify=True)
    assert described == meta
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


def test_pack_of_another_kind_or_format_or_program_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    write_pack(path, {"x": torch.ones(2)}, {"kind": "events"})
    with pytest.raises(ValueError, match=r"holds 'events', expected 'items'"):
        read_pack(path, kind="items")
    monkeypatch.setattr(files, "_PACK_FORMAT", 2)
    with pytest.raises(ValueError, match="pack format 1, this program reads 2"):
        read_pack(path, kind="events")
    write_safetensors(path, {"x": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="not one of ours"):
        read_pack(path, kind="events")


@pytest.mark.parametrize("meta", [{}, {"kind": 3}, {"kind": "k", "x": float("nan")}])
def test_pack_without_a_kind_or_with_values_json_lacks_is_not_written(tmp_path, meta):
    with pytest.raises(ValueError, match=r"kind|JSON compliant"):
        write_pack(tmp_path / "p.safetensors", {}, meta)
    assert not list(tmp_path.iterdir())


def test_no_flipped_bit_of_a_pack_goes_unnoticed(tmp_path):
    path = tmp_path / "p.safetensors"
    tensors = {"x": torch.arange(6, dtype=torch.int32), "y": torch.tensor([0.5, -1.0], dtype=torch.float64)}
    write_pack(path, tensors, {"kind": "k", "n": 12})
    data = path.read_bytes()
    refused = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            found, meta = read_pack(path, kind="k", verify=True)
        except ValueError:
            refused += 1
        else:
            assert meta == {"kind": "k", "n": 12}
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert refused >= len(data) - 8


def test_without_verify_a_flip_in_a_tensor_passes_and_one_in_its_record_does_not(tmp_path):
    path = tmp_path / "p.safetensors"
    write_pack(path, {"x": torch.zeros(4)}, {"kind": "k"})
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    read_pack(path, kind="k")
    with pytest.raises(DamagedFileError, match="tensor 'x' does not match its checksum"):
        read_pack(path, kind="k", verify=True)
    assert data.count(b"kind") == 1
    path.write_bytes(data.replace(b"kind", b"kinD"))
    with pytest.raises(DamagedFileError, match="description does not match"):
        read_pack(path, kind="k")


def test_a_changed_source_is_told_by_its_content_and_an_untouched_one_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "source"
    path.write_bytes(b"one")
    stat = path.stat()
    recorded = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "fingerprint": files.fingerprint([path])}
    with monkeypatch.context() as patched:
        patched.setattr(files, "fingerprint", lambda paths: pytest.fail("the content was read"))
        assert files.changed_fingerprint(path, recorded) is None
    os.utime(path, ns=(0, 0))
    assert files.changed_fingerprint(path, recorded) is None  # touched, with the same content
    path.write_bytes(b"two")
    os.utime(path, ns=(0, 0))
    assert files.changed_fingerprint(path, recorded) == files.fingerprint([path])


def test_a_path_leads_from_the_folder_to_the_file(tmp_path, monkeypatch):
    assert files.relative_path(tmp_path / "a" / "x", tmp_path / "b") == "../a/x"

    def other_drive(*words: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert files.relative_path(tmp_path / "x", tmp_path / "b") == (tmp_path / "x").as_posix()


def test_ids_survive_as_bytes_and_a_line_end_in_one_is_refused():
    names = ("7", "07", "\u00e9t\u00e9", "")
    assert files.bytes_to_ids(files.ids_to_bytes(names)) == names
    assert files.bytes_to_ids(files.ids_to_bytes(())) == ()
    with pytest.raises(ValueError, match="contains a line end"):
        files.ids_to_bytes(("a\nb",))
