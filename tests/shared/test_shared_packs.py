"""A pack tells when its sources have changed since, and a damaged or foreign one is told from one that is fine."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.faults import DataError, Findings
from shared.files import write_pack
from shared.packs import check_pack_paths, fault_of_sources, joined_fingerprint, open_pack, source_records, sources_of


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(name)
    return [folder / "a.txt", folder / "b.txt"]


def meta_of(files: list[Path], pack: Path) -> dict[str, Any]:
    return {"kind": "test data", "layout": 2, "sources": source_records(sources_of(files), pack.parent)}


def stale(pack: Path, meta: dict[str, Any], **more: Any) -> tuple[str, str, str] | None:
    return fault_of_sources(pack, meta, app="some", **{"flags": {}, "files_of": None, **more})


def test_the_joined_fingerprint_follows_files_and_choices(files):
    first = joined_fingerprint(sources_of(files), {"seed": 1})
    assert len(first) == 32
    assert joined_fingerprint(sources_of(files), {"seed": 1}) == first
    assert joined_fingerprint(sources_of(files), {"seed": 2}) != first
    assert joined_fingerprint(sources_of(files[::-1]), {"seed": 1}) != first
    files[0].write_text("other")
    assert joined_fingerprint(sources_of(files), {"seed": 1}) != first


def test_sources_that_are_equal_moved_along_or_gone_are_no_fault(tmp_path, files):
    pack = tmp_path / "packs" / "a.safetensors"
    meta = meta_of(files, pack)
    assert not Path(meta["sources"][0]["file"]).is_absolute()
    os.utime(files[0], (1, 1))  # touched, not changed
    assert stale(pack, meta) is None
    moved = tmp_path / "moved"
    shutil.copytree(files[0].parent, moved / "data")
    (moved / "packs").mkdir()
    assert stale(moved / "packs" / "a.safetensors", meta) is None
    (moved / "data" / "b.txt").write_text("other")
    fault = stale(moved / "packs" / "a.safetensors", meta)
    assert fault is not None
    assert "b.txt has changed" in fault[1]
    shutil.rmtree(files[0].parent)
    assert stale(pack, meta) is None


def test_a_changed_source_gives_the_command_that_made_the_pack(tmp_path, files):
    pack = tmp_path / "a b.safetensors"
    meta = meta_of(files, pack)
    files[1].write_text("other")
    folder = files[0].parent
    expected, found, repair = stale(pack, meta, flags={"min_rating": None, "valid_share": 0.1}) or ("", "", "")
    assert expected == f"a pack of {folder} as it is now"
    assert found == "a stale pack: b.txt has changed since"
    assert repair == f"write it again: python -m apps.some prepare {folder} '{pack}' --valid-share 0.1"


def test_the_source_of_a_pack_of_one_file_is_that_file(tmp_path, files):
    pack = tmp_path / "a.safetensors"
    meta = meta_of(files[:1], pack)
    files[0].write_text("other")
    fault = stale(pack, meta)
    assert fault is not None
    assert fault[2] == f"write it again: python -m apps.some prepare {files[0]} {pack}"


def test_a_new_file_counts_where_the_folder_does(tmp_path, files):
    pack = tmp_path / "a.safetensors"
    meta = meta_of(files, pack)
    (files[0].parent / "c.txt").write_text("c")
    assert stale(pack, meta) is None
    fault = stale(pack, meta, files_of=lambda folder: sorted(folder.iterdir()))
    assert fault is not None
    assert fault[1] == "a stale pack: c.txt is new since"


def test_a_sound_pack_is_opened(tmp_path, files):
    pack = tmp_path / "a.safetensors"
    write_pack(pack, {"x": torch.arange(5)}, meta_of(files, pack))
    findings = Findings(pack, limit=5)
    opened = open_pack(pack, findings, app="some", kind="test data", layout=2)
    assert opened is not None
    assert torch.equal(opened[0]["x"], torch.arange(5))
    assert opened[1]["layout"] == 2
    assert findings.listing() == []


@pytest.mark.parametrize(
    ("damage", "kind", "layout", "expected", "repair"),
    [
        (True, "test data", 2, "an undamaged pack", "python -m apps.some prepare SOURCE"),
        (False, "other data", 2, "a pack of some", "give the pack that `prepare` wrote"),
        (False, "test data", 3, "a pack of layout 3", "python -m apps.some prepare SOURCE"),
    ],
)
def test_a_pack_that_is_not_what_was_asked_for_is_a_fault(tmp_path, files, damage, kind, layout, expected, repair):
    pack = tmp_path / "a.safetensors"
    write_pack(pack, {"x": torch.arange(5)}, meta_of(files, pack))
    if damage:
        data = bytearray(pack.read_bytes())
        data[-1] ^= 1
        pack.write_bytes(data)
    findings = Findings(pack, limit=5)
    assert open_pack(pack, findings, app="some", kind=kind, layout=layout) is None
    (fault,) = findings.listing()
    assert fault.expected == expected
    assert repair in fault.repair


def test_names_that_prepare_cannot_use_are_refused(tmp_path):
    check_pack_paths(tmp_path / "data", tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="must end in"):
        check_pack_paths(tmp_path / "data", tmp_path / "a.pack")
    with pytest.raises(DataError, match="is already a pack"):
        check_pack_paths(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
