"""A folder in CLCRec's layout becomes neutral tensors; that each fault is found is tested with the apps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.clcrec_folder import files_of, load_matrix, read_folder
from shared.faults import Findings

np = pytest.importorskip("numpy")


def rows(*values: list[int]) -> Any:
    array = np.empty(len(values), dtype=object)
    for n, value in enumerate(values):
        array[n] = value
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Users 0 and 1; items 2 to 6, of which 3 and 6 are cold, so that numbers differ from the order of the ids."""
    files = {
        "train": np.array([[1, 4], [0, 2], [1, 2], [0, 5]]),
        "val_full": rows([0, 4, 3], [1]),
        "test_full": rows([1, 6, 5], [0, 6]),
        "warm_set": np.array([2, 4, 5]),
        "cold_set": np.array([6, 3]),
        "feat_v": np.arange(10, dtype="f4").reshape(5, 2),
    }
    for name, value in files.items():
        np.save(tmp_path / f"{name}.npy", value)
    (tmp_path / "notes.txt").write_text("no file of the layout")
    return tmp_path


def test_items_are_numbered_with_the_warm_ones_first(folder):
    findings = Findings(folder, limit=5)
    found = read_folder(folder, findings)
    assert findings.listing() == []
    assert found is not None
    assert (found.num_users, found.num_warm) == (2, 3)
    assert found.item_id.tolist() == [2, 4, 5, 3, 6]
    assert found.train.user.tolist() == [1, 0, 1, 0]
    assert found.train.item.tolist() == [1, 0, 0, 2]
    assert (found.valid.user.tolist(), found.valid.item.tolist()) == ([0, 0], [1, 3])
    assert (found.test.user.tolist(), found.test.item.tolist()) == ([1, 1, 0], [4, 2, 4])
    assert found.content["v"].tolist() == [[0, 1], [4, 5], [6, 7], [2, 3], [8, 9]]
    assert found.words is None


def test_only_files_of_the_layout_count(folder):
    names = ["train", "val_full", "test_full", "warm_set", "cold_set", "feat_v"]
    assert [path.name for path in files_of(folder)] == [f"{name}.npy" for name in names]


def test_errors_give_no_folder_but_a_list_of_all(folder):
    np.save(folder / "train.npy", np.array([[0, 2], [0, 3], [5, 4]]))
    (folder / "test_full.npy").unlink()
    findings = Findings(folder, limit=5)
    assert read_folder(folder, findings) is None
    faults = findings.listing()
    assert [(Path(fault.file).name, fault.row) for fault in faults] == [
        ("train.npy", 2),
        ("train.npy", 1),
        ("test_full.npy", None),
    ]


def test_what_to_do_where_no_item_is_listed_is_the_callers_to_say(folder):
    np.save(folder / "cold_set.npy", np.array([], dtype="i8"))
    repairs = []
    for options in ({}, {"repair_of_none": "make some up"}):
        findings = Findings(folder, limit=5)
        read_folder(folder, findings, **options)
        repairs += [fault.repair for fault in findings.listing()]
    assert repairs == ["list the items", "make some up"]


def test_a_matrix_with_a_missing_value_is_refused_where_it_is(tmp_path):
    findings = Findings(tmp_path, limit=5)
    matrix = torch.zeros(6, 3, dtype=torch.float64)
    sound = load_matrix(tmp_path / "feat_v.npy", matrix, 6, findings)
    assert sound is not None
    assert sound.dtype == torch.float32
    matrix[4, 1] = torch.nan
    assert load_matrix(tmp_path / "feat_v.npy", matrix, 6, findings) is None
    (fault,) = findings.listing()
    assert (fault.row, fault.field, fault.found) == (4, "column 1", "nan")
