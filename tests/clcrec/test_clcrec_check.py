"""Each fault a source can have is found where it is, says what to do, and stops the reader when it is an error."""

import dataclasses
import io
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.clcrec.formats import DataError, Fault, check_source, prepare_source, read_content, read_data
from shared.files import read_pack, read_safetensors, write_pack, write_safetensors
from tests.clcrec.test_clcrec_formats import Files, make_events, objects, write_files, write_ratings

np = pytest.importorskip("numpy")


def make_small() -> Files:
    """Users 0..2, warm items 3..6, cold items 7 and 8; small enough to see that nothing is wrong."""
    train = [(0, 3), (0, 4), (1, 4), (1, 5), (2, 6), (2, 3)]
    return {
        "train.npy": np.array(train),
        "user_item_train_dict.npy": {0: {3, 4}, 1: {4, 5}, 2: {6, 3}},
        "user_item_all_dict.npy": {0: {3, 4, 5, 7}, 1: {4, 5, 3, 8}, 2: {6, 3, 7, 5}},
        "warm_set.npy": np.array([3, 4, 5, 6]),
        "cold_set.npy": np.array([7, 8]),
        "val_full.npy": [[0, 5, 7], [1, 3], [2]],
        "val_warm.npy": [[0, 5], [1, 3], [2]],
        "val_cold.npy": [[0, 7], [1], [2]],
        "test_full.npy": [[0], [1, 8], [2, 5, 7]],
        "test_warm.npy": [[0], [1], [2, 5]],
        "test_cold.npy": [[0], [1, 8], [2, 7]],
        "feat_v.npy": np.arange(12, dtype="f4").reshape(6, 2),
        "feat_t.pt": torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 1, 2, 2, 0]]),
    }


PARTS = ("val_warm.npy", "val_cold.npy", "test_warm.npy", "test_cold.npy")
DICTS = ("user_item_all_dict.npy", "user_item_train_dict.npy")
BARE = (*DICTS, *PARTS)  # what a folder can do without


@dataclasses.dataclass(frozen=True)
class Case:
    """What is written over a sound folder, and parts of the fault that must be found."""

    files: dict[str, Any]  # None: the file is left out
    file: str
    expected: str
    found: str
    repair: str
    severity: str = "error"
    row: int | None = None
    field: str | None = None
    drop: tuple[str, ...] = BARE  # what else is left out, so that no other file has the fault too
    more: int = 0  # further faults


def hostile(header: str = "()") -> bytes:
    """A .npy file whose pickle would write a file."""
    text = f"{{'descr': '|O', 'fortran_order': False, 'shape': {header}}}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"cos\nsystem\n(S'touch hacked'\ntR."


def truncated(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()[:-5]


def with_value(row: int, column: int, value: float, dtype: str = "f4") -> Any:
    features = np.arange(12, dtype=dtype).reshape(6, 2)
    features[row, column] = value
    return features


LIST = "a list or set of integers"
ROWS = "rows [user, item, item, ...]"
CASES: dict[str, Case] = {
    # files
    "no warm_set": Case({"warm_set.npy": None}, "warm_set.npy", "the file", "no such file", "copy it"),
    "no cold_set": Case({"cold_set.npy": None}, "cold_set.npy", "the file", "no such file", "copy it"),
    "no train": Case({"train.npy": None}, "train.npy", "the file", "no such file", "copy it"),
    "no val": Case({"val_full.npy": None}, "val_full.npy", "the file", "no such file", "copy it"),
    "no test": Case({"test_full.npy": None}, "test_full.npy", "the file", "no such file", "copy it"),
    "half of test": Case(
        {"test_full.npy": None}, "test_full.npy", "the file", "no such file", "copy it", drop=("test_cold.npy",)
    ),
    "train from dict": Case(
        {"train.npy": None},
        "train.npy",
        "the training pairs",
        "only user_item_train_dict.npy",
        "nothing to do",
        "warning",
        drop=(),
    ),
    "truncated": Case(
        {"train.npy": truncated(np.array([[0, 3], [1, 4]]))},
        "train.npy",
        "arrays, lists, sets and dictionaries",
        "needs 32 bytes and has 27",
        "copy the file again",
    ),
    "not npy": Case({"train.npy": b"0 3\n"}, "train.npy", "arrays, lists", "it is no .npy file", "copy the file again"),
    "empty file": Case({"cold_set.npy": b""}, "cold_set.npy", "arrays, lists", "it is no .npy file", "copy the file"),
    "hostile sets": Case({"warm_set.npy": hostile()}, "warm_set.npy", "arrays, lists", "os.system", "copy the file"),
    "hostile rows": Case({"val_full.npy": hostile("(3,)")}, "val_full.npy", "arrays", "Names in it: os.system", "copy"),
    "hostile dict": Case({"user_item_dict.npy": hostile()}, "user_item_dict.npy", "arrays", "os.system", "copy the"),
    "hostile train": Case({"train.npy": hostile()}, "train.npy", "arrays", "os.system", "copy the file"),
    "hostile features": Case({"feat_v.npy": hostile()}, "feat_v.npy", "arrays", "os.system", "copy the file"),
    "None": Case({"val_full.npy": np.array(None)}, "val_full.npy", "an array", "None", "write it anew"),
    # sets of items
    "floats as ids": Case(
        {"warm_set.npy": np.array([3.0, 4.0])}, "warm_set.npy", "a row of integers", "float64 (2,)", "int64 array"
    ),
    "text as id": Case(
        {"cold_set.npy": objects([7, "8"])}, "cold_set.npy", "integers", "str '8'", "write the global item ids", row=1
    ),
    "huge id": Case(
        {"cold_set.npy": objects([7, 2**70])}, "cold_set.npy", "integers", "more than 64 bits", "int64 array", row=1
    ),
    "table of ids": Case(
        {"cold_set.npy": np.array([[7, 8]])}, "cold_set.npy", "a row of integers", "int64 (1, 2)", "int64 array"
    ),
    "dict of ids": Case(
        {"cold_set.npy": {7: 1}}, "cold_set.npy", "a row of integers", "a dict of 1 value", "int64 array"
    ),
    "no cold item": Case({"cold_set.npy": []}, "cold_set.npy", "at least one item", "no id at all", "--cold-share"),
    "item twice": Case(
        {"warm_set.npy": np.array([3, 4, 4, 5, 6])},
        "warm_set.npy",
        "each id once",
        "1 repeated id",
        "nothing to do",
        "warning",
    ),
    "warm and cold": Case(
        {"cold_set.npy": np.array([6, 7, 8])}, "cold_set.npy", "not in warm_set.npy", "item 6", "delete it from one"
    ),
    "gap": Case(
        {"cold_set.npy": np.array([7, 10])},
        "warm_set.npy",
        "every id from 3 to 10",
        "no 8 (2 ids missing)",
        "renumber the items",
    ),
    "items from 0": Case(
        {"warm_set.npy": np.array([0, 4, 5, 6])}, "warm_set.npy", "above all users'", "id 0", "add the number of users"
    ),
    "negative item": Case(
        {"cold_set.npy": np.array([-7, 8])}, "cold_set.npy", "above all users'", "id -7", "add the number of users"
    ),
    "giant item": Case(
        {"cold_set.npy": np.array([7, 2**40])}, "cold_set.npy", "below 2**31", str(2**40), "number users and items"
    ),
    "items far above users": Case(
        {
            "warm_set.npy": np.arange(10**6, 10**6 + 4),
            "cold_set.npy": np.arange(10**6 + 4, 10**6 + 6),
            "train.npy": np.array([[0, 10**6]]),
            "val_full.npy": [[0, 10**6 + 1]],
            "test_full.npy": [[0, 10**6 + 2]],
        },
        "warm_set.npy",
        "items numbered from the number of users",
        "items from 1000000 on, and 1 training pair",
        "ids follow those of the users",
    ),
    # training pairs
    "floats as pairs": Case(
        {"train.npy": np.array([[0.0, 3.0]])}, "train.npy", "integers of shape (pairs, 2)", "float64 (1, 2)", "int64"
    ),
    "transposed": Case(
        {"train.npy": np.array([[0, 1, 2], [3, 4, 5]])}, "train.npy", "(pairs, 2)", "int64 (2, 3)", "one row (user"
    ),
    "pairs as objects": Case(
        {"train.npy": [[0, 3], [1, 4]]}, "train.npy", "(pairs, 2)", "a list of 2 values", "one row (user"
    ),
    "no pair": Case(
        {"train.npy": np.empty((0, 2), dtype="i8")}, "train.npy", "at least one training pair", "none", "copy the file"
    ),
    "unknown user": Case(
        {"train.npy": np.array([[0, 3], [1, 4], [3, 5], [2, 6]])},
        "train.npy",
        "a user in 0..2, as the items begin at 3",
        "3",
        "correct the user",
        row=2,
        field="user",
    ),
    "negative user": Case(
        {"train.npy": np.array([[-1, 3], [1, 4]])},
        "train.npy",
        "a user in 0..2",
        "-1",
        "correct the user",
        row=0,
        field="user",
    ),
    "item without offset": Case(
        {"train.npy": np.array([[0, 3], [1, 1]])},
        "train.npy",
        "an item in 3..8",
        "1",
        "add the number of users, 3",
        row=1,
        field="item",
    ),
    "unknown item": Case(
        {"train.npy": np.array([[0, 3], [1, 9]])},
        "train.npy",
        "an item in 3..8",
        "9",
        "add the item to warm_set.npy or cold_set.npy",
        row=1,
        field="item",
    ),
    "item at the limit": Case(
        {"train.npy": np.array([[0, 3], [1, -(2**63)]])},
        "train.npy",
        "an item in 3..8",
        str(-(2**63)),
        "delete the pair",
        row=1,
        field="item",
    ),
    "cold item trained": Case(
        {"train.npy": np.array([[0, 3], [2, 8], [1, 4]])},
        "train.npy",
        "an item of warm_set.npy",
        "item 8 of cold_set.npy",
        "move the item to warm_set.npy",
        row=1,
        field="item",
    ),
    "pair twice": Case(
        {"train.npy": np.array([[0, 3], [1, 4], [2, 5], [0, 3], [1, 6]]), "test_full.npy": [[2, 7], [1, 8]]},
        "train.npy",
        "each pair once",
        "1 repeated pair (first: user 0 with item 3)",
        "delete the copies",
        "warning",
        row=3,
    ),
    "idle user": Case(
        {"train.npy": np.array([[0, 3], [0, 4], [1, 5], [1, 6]])},
        "train.npy",
        "a training pair of each user",
        "1 of 3 without (first: 2)",
        "nothing to do",
        "warning",
    ),
    "idle warm item": Case(
        {"train.npy": np.array([[0, 3], [1, 4], [2, 6]])},
        "train.npy",
        "a training pair of each warm item",
        "1 of 4 without (first: 5)",
        "cold_set.npy",
        "warning",
    ),
    # dictionaries
    "dict of text": Case(
        {"user_item_train_dict.npy": {"0": {3}, 1: {4}}},
        "user_item_train_dict.npy",
        "users as plain integers",
        "str '0' (1 such key)",
        "write keys as integers",
        field="key",
    ),
    "dict of numbers": Case(
        {"user_item_train_dict.npy": {0: {3, 4}, 1: 4, 2: {6, 3}}},
        "user_item_train_dict.npy",
        LIST,
        "4",
        "plain integers",
        row=1,
        more=1,
    ),
    "dict of floats": Case(
        {"user_item_dict.npy": {0: {3, 4}, 17: [4, 5.0], 2: {6, 3}}},
        "user_item_dict.npy",
        LIST,
        "float 5.0",
        "plain integers",
        row=17,
    ),
    "no dict": Case(
        {"user_item_train_dict.npy": [[0, 3], [1, 4]]},
        "user_item_train_dict.npy",
        "a dictionary",
        "a list of 2 values",
        "numpy.save",
    ),
    "dict disagrees": Case(
        {"user_item_train_dict.npy": {0: {3, 4, 5}, 1: {4, 5}, 2: {3}, 5: {99}}},
        "user_item_train_dict.npy",
        "the pairs of train.npy",
        "2 pairs more (first: user 0 with item 5) and 1 pair fewer (first: user 2 with item 6)",
        "delete the dictionary",
    ),
    "dict of others": Case(
        {"user_item_train_dict.npy": {0: {3, 4}, 1: {4, 5}, 2: {3, 6}, 5: {99}}},
        "user_item_train_dict.npy",
        "the pairs of train.npy",
        "1 pair more (first: user 5 with item 99)",
        "delete the dictionary",
    ),
    "cold item in dict": Case(
        {"train.npy": None, "user_item_train_dict.npy": {0: {3, 4}, 1: {4, 5}, 2: {6, 3, 8}}},
        "user_item_train_dict.npy",
        "an item of warm_set.npy",
        "item 8 of cold_set.npy",
        "move the item",
        row=2,
        field="item",
        more=1,
    ),
    "all dict disagrees": Case(
        {"user_item_all_dict.npy": {0: {3, 4, 5}, 1: {4, 5, 3, 8}, 2: {6, 3, 7, 5}}},
        "user_item_all_dict.npy",
        "training, validation and test together",
        "1 pair fewer (first: user 0 with item 7)",
        "nothing to do",
        "warning",
    ),
    # held-out pairs
    "no list of rows": Case({"val_full.npy": {0: [3]}}, "val_full.npy", ROWS, "a dict of 1 value", "array of lists"),
    "plain row": Case({"val_full.npy": np.arange(3)}, "val_full.npy", ROWS, "int64 (3,)", "array of lists"),
    "row of a set": Case({"val_full.npy": [[0], {1, 3}]}, "val_full.npy", ROWS, "a set of 2 values", "no first", row=1),
    "no row": Case({"val_full.npy": [[0, 5, 7], 1, [2]]}, "val_full.npy", LIST, "1", "plain integers", row=1),
    "text in a row": Case(
        {"test_full.npy": [[0], [1, "8"], [2, 5, 7]]},
        "test_full.npy",
        LIST,
        "str '8'",
        "plain integers",
        row=1,
    ),
    "True in a row": Case(
        {"test_full.npy": [[0], [True, 8], [2, 5, 7]]}, "test_full.npy", LIST, "bool True", "plain integers", row=1
    ),
    "empty row": Case(
        {"val_full.npy": [[0, 5, 7], [], [2]]},
        "val_full.npy",
        "begins with its user",
        "an empty row",
        "write its user",
        row=1,
    ),
    "row of an unknown user": Case(
        {"val_full.npy": [[0, 5, 7], [3, 4, 5]]},
        "val_full.npy",
        "a user in 0..2",
        "3",
        "correct the user",
        row=1,
        field="user",
    ),
    "rows of one unknown user": Case(
        {"val_full.npy": [[0, 5, 7], [3, 4], [3, 5]]},
        "val_full.npy",
        "a user in 0..2",
        "3",
        "correct the user",
        row=1,
        field="user",
        more=1,
    ),
    "user twice": Case(
        {"val_full.npy": [[0, 5], [1, 3], [0, 7]]},
        "val_full.npy",
        "one row per user",
        "user 0 again (first in row 0)",
        "join the user's rows",
        row=2,
        field="user",
    ),
    "unknown held-out item": Case(
        {"val_full.npy": [[0, 5, 7], [1, 3, 17]]},
        "val_full.npy",
        "an item in 3..8",
        "17",
        "delete the pair",
        row=1,
        field="item",
    ),
    "held-out item twice": Case(
        {"val_full.npy": [[0, 5, 7, 5], [1, 3]]},
        "val_full.npy",
        "each item of a row once",
        "1 repeated item (first: user 0 with item 5)",
        "nothing to do",
        "warning",
    ),
    "held-out pair trained": Case(
        {"val_full.npy": [[0, 5, 7], [1, 3, 4]]},
        "val_full.npy",
        "a pair that is not trained on",
        "user 1 with item 4, which train.npy has too",
        "delete it from the row, or from the training pairs",
        row=1,
        field="item",
    ),
    "validated and tested": Case(
        {"test_full.npy": [[1, 8], [0, 7]]},
        "test_full.npy",
        "a pair of one split",
        "user 0 with item 7, which val_full.npy has too",
        "one of the two rows",
        row=1,
        field="item",
    ),
    "warm file disagrees": Case(
        {"val_warm.npy": [[0, 5], [1, 3], [2, 5]]},
        "val_warm.npy",
        "the warm items of val_full.npy",
        "1 pair more (first: user 2 with item 5)",
        "delete the file",
    ),
    "cold file disagrees": Case(
        {"test_cold.npy": [[0], [1, 8]]},
        "test_cold.npy",
        "the cold items of test_full.npy",
        "1 pair fewer (first: user 2 with item 7)",
        "delete the file",
    ),
    "cold item in the warm half": Case(
        {"val_full.npy": None, "val_warm.npy": [[0, 5], [1, 8]]},
        "val_warm.npy",
        "an item of warm_set.npy",
        "item 8 of cold_set.npy",
        "take the pair out of this file",
        row=1,
        field="item",
        drop=DICTS,
    ),
    "warm item in the cold half": Case(
        {"val_full.npy": None, "val_cold.npy": [[0, 7], [1, 6]]},
        "val_cold.npy",
        "an item of cold_set.npy",
        "item 6 of warm_set.npy",
        "take the pair out of this file",
        row=1,
        field="item",
        drop=DICTS,
    ),
    "nothing held out": Case(
        {"val_full.npy": []}, "val_full.npy", "held-out pairs", "none", "nothing is measured", "warning"
    ),
    "idle cold item": Case(
        {"test_full.npy": [[2, 7]]},
        "cold_set.npy",
        "a held-out pair of each cold item",
        "1 of 2 without (first: 8)",
        "nothing to do",
        "warning",
    ),
    # features
    "rows of features": Case(
        {"feat_v.npy": np.ones((5, 2), dtype="f4")}, "feat_v.npy", "6 rows, one per item", "5", "one row for each item"
    ),
    "integers as features": Case(
        {"feat_v.npy": np.ones((6, 2), dtype="i8")}, "feat_v.npy", "floats of shape", "int64 (6, 2)", "as float32"
    ),
    "a row as features": Case({"feat_v.npy": np.ones(6)}, "feat_v.npy", "floats of shape", "float64 (6,)", "one row"),
    "no columns": Case({"feat_v.npy": np.ones((6, 0))}, "feat_v.npy", "floats of shape", "(6, 0)", "one row per item"),
    "objects as features": Case(
        {"feat_v.npy": [[1.0], [2.0]]}, "feat_v.npy", "a plain dense tensor", "a list of 2 values", "save the matrix"
    ),
    "NaN": Case(
        {"feat_v.npy": with_value(4, 1, np.nan)},
        "feat_v.npy",
        "a finite number",
        "nan",
        "repair the features",
        row=4,
        field="column 1",
    ),
    "infinity": Case(
        {"feat_v.npy": with_value(2, 0, -np.inf)},
        "feat_v.npy",
        "a finite number",
        "-inf",
        "repair the features",
        row=2,
        field="column 0",
    ),
    "too large for float32": Case(
        {"feat_v.npy": with_value(0, 1, 1e300, "f8")},
        "feat_v.npy",
        "a finite number of 32 bits",
        "1e+300",
        "repair the features",
        row=0,
        field="column 1",
    ),
    "NaN in .pt": Case(
        {"feat_a.pt": torch.full((6, 3), torch.nan)},
        "feat_a.pt",
        "a finite number",
        "nan",
        "repair the features",
        row=0,
        field="column 0",
        more=5,
    ),
    "constant rows": Case(
        {"feat_v.npy": np.array([[1, 2], [3, 3], [0, 0], [1, 2], [0, 0], [2, 1]], dtype="f4")},
        "feat_v.npy",
        "rows that tell items apart",
        "3 rows of one value throughout, 2 of them zero (first: item 4)",
        "check that these items' features",
        "warning",
    ),
    "zeros of one column": Case(
        {"feat_v.npy": np.array([[1], [3], [0], [1], [2], [2]], dtype="f4")},
        "feat_v.npy",
        "rows that tell items apart",
        "1 row of one value throughout, 1 of them zero (first: item 5)",
        "check that these items' features",
        "warning",
    ),
    "two files": Case(
        {"feat_v.pt": torch.ones(6, 2)},
        "feat_v.npy",
        "one file with feat_v",
        "feat_v.npy and feat_v.pt",
        "delete one of the two",
    ),
    "damaged .pt": Case({"feat_a.pt": b"PK\x03\x04"}, "feat_a.pt", "saved by torch", "unreadable", "torch.save"),
    "hostile .pt": Case(
        {"feat_a.pt": b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch hacked\x85R."},
        "feat_a.pt",
        "a tensor saved by torch",
        "an unreadable file (UnpicklingError",
        "save a plain tensor",
    ),
    "dict in .pt": Case(
        {"feat_a.pt": {"x": torch.ones(6, 2)}}, "feat_a.pt", "a plain dense tensor", "a dict of 1 value", "save the"
    ),
    "sparse .pt": Case(
        {"feat_a.pt": torch.eye(6).to_sparse()}, "feat_a.pt", "a plain dense tensor", "float32 (6, 6)", "save the"
    ),
    "few bytes that pose as many": Case(
        {"feat_a.pt": torch.ones(1).expand(10**9, 10**6)}, "feat_a.pt", "a plain dense tensor", "(1000000000,", "dense"
    ),
    "words of three rows": Case(
        {"feat_t.pt": torch.ones(3, 5, dtype=torch.int64)}, "feat_t.pt", "shape (2, words)", "int64 (3, 5)", "two forms"
    ),
    "no words": Case(
        {"feat_t.pt": torch.ones(2, 0, dtype=torch.int64)}, "feat_t.pt", "shape (2, words)", "(2, 0)", "two forms"
    ),
    "words of unknown items": Case(
        {"feat_t.pt": torch.tensor([[0, 6, 1], [0, 1, 2]])},
        "feat_t.pt",
        "an item index in 0..5",
        "6",
        "count items from 0",
        row=0,
        field="column 1",
    ),
    "negative words": Case(
        {"feat_t.pt": torch.tensor([[0, 1, 1], [0, 1, -2]])},
        "feat_t.pt",
        "a word id from 0",
        "-2",
        "number the words from 0",
        row=1,
        field="column 2",
    ),
    "giant words": Case(
        {"feat_t.pt": torch.tensor([[0], [2**31]])},
        "feat_t.pt",
        "a word id from 0 to 2**31 - 1",
        str(2**31),
        "number the words from 0",
        row=1,
        field="column 0",
    ),
    "item without words": Case(
        {"feat_t.pt": torch.tensor([[0, 1, 3, 4, 5], [0, 1, 0, 1, 0]])},
        "feat_t.pt",
        "words of each item",
        "1 of 6 without (first: 5)",
        "give them words",
        "warning",
    ),
    "no content": Case(
        {"feat_v.npy": None, "feat_t.pt": None},
        "feat_v.npy",
        "content of the items",
        "none",
        "add one of them",
        "warning",
    ),
}


def check_one(path: Path, case: Case, file: Path) -> None:
    """The source has this fault first and no other than its `more`, and the reader does what the severity says."""
    faults = check_source(path)
    assert len(faults) == 1 + case.more, [str(fault) for fault in faults]
    fault = faults[0]
    assert (fault.file, fault.severity, fault.row, fault.field) == (str(file), case.severity, case.row, case.field)
    assert case.expected in fault.expected
    assert case.found in fault.found
    assert case.repair in fault.repair
    text = str(fault)
    assert "\n" not in text
    assert text.isascii()
    assert text.startswith(f"{file}: " if case.row is None else f"{file}[{case.row}]: ")
    assert text.endswith(fault.repair)
    if case.severity == "warning":
        assert read_data(path).num_pairs > 0
    else:
        with pytest.raises(DataError) as caught:
            read_data(path)
        assert str(caught.value) == text


@pytest.mark.parametrize("name", CASES)
def test_the_fault_is_found(tmp_path, monkeypatch, name):
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    files = {key: value for key, value in make_small().items() if key not in case.drop} | case.files
    folder = write_files(tmp_path / "data", {key: value for key, value in files.items() if value is not None})
    check_one(folder, case, folder / case.file)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # nothing in a hostile file ran


def test_a_sound_folder_has_no_fault(tmp_path):
    folder = write_files(tmp_path / "data", make_small())
    assert check_source(folder) == []
    prepare_source(folder, tmp_path / "a.safetensors")
    assert check_source(tmp_path / "a.safetensors") == []


def test_a_path_that_is_nothing_of_all_that_is_a_fault(tmp_path):
    absent = Case({}, "", "an existing folder or pack", "nothing at this path", "check the spelling")
    check_one(tmp_path / "absent", absent, tmp_path / "absent")
    empty = Case({}, "", "the original's files (train.npy", "none of them (it is empty)", "give the folder")
    check_one(tmp_path, empty, tmp_path)
    (tmp_path / "train.npy.gz").write_text("x")
    packed = Case({}, "", "the original's files (train.npy", "none of them (train.npy.gz)", "give the folder")
    check_one(tmp_path, packed, tmp_path)
    single = Case({}, "", "a folder, or a pack", "the file train.npy.gz", f"give the folder {tmp_path}")
    check_one(tmp_path / "train.npy.gz", single, tmp_path / "train.npy.gz")


def test_a_folder_with_two_files_of_ratings_is_a_fault(tmp_path):
    folder = write_ratings(tmp_path / "data", "inter", make_events())
    (folder / "y.inter").write_text("")
    two = Case({}, "", "or one .inter file", "none of them (x.inter, x.item, y.inter)", "give the folder")
    check_one(folder, two, folder)


def test_missing_files_are_all_named(tmp_path):
    folder = write_files(tmp_path / "data", {"feat_v.npy": np.ones((6, 2))})
    assert [Path(fault.file).name for fault in check_source(folder)] == [
        *("warm_set.npy", "cold_set.npy", "train.npy", "val_full.npy", "test_full.npy")
    ]


def test_all_faults_are_listed_at_once_errors_first(tmp_path):
    files = make_small() | {
        "warm_set.npy": np.array([3, 4, 5, 6, 6]),
        "train.npy": np.array([[0, 3], [9, 4], [1, 8]]),
        "val_full.npy": [[0, 3], [7, 5], [2, 2], []],
        "feat_v.npy": with_value(1, 1, np.nan),
    }
    folder = write_files(tmp_path / "data", {key: value for key, value in files.items() if key not in BARE})
    assert [(fault.severity, Path(fault.file).name, fault.row, fault.field) for fault in check_source(folder)] == [
        ("error", "train.npy", 1, "user"),
        ("error", "train.npy", 2, "item"),
        ("error", "val_full.npy", 3, None),
        ("error", "val_full.npy", 1, "user"),
        ("error", "val_full.npy", 2, "item"),
        ("error", "val_full.npy", 0, "item"),
        ("error", "feat_v.npy", 1, "column 1"),
        ("warning", "warm_set.npy", None, None),
    ]


def test_faults_beyond_the_limit_are_counted(tmp_path):
    files = {key: value for key, value in make_small().items() if key not in BARE}
    files |= {"train.npy": np.array([[0, 3], *[[9, 4]] * 5]), "warm_set.npy": np.array([3, 4, 5, 6, 6])}
    folder = write_files(tmp_path / "data", files)
    faults = check_source(folder, limit=2)
    assert [fault.row for fault in faults] == [1, 2, None]
    assert faults[-1].file == str(folder)
    assert faults[-1].severity == "error"
    assert faults[-1].found == "3 more errors and 1 more warning"
    assert check_source(folder, limit=5)[-1].found == "1 more warning"
    assert len(check_source(folder, limit=6)) == 6


def test_a_fault_is_one_line_that_holds_all_it_knows():
    fault = Fault("train.npy", None, "item", "a warm item", "item 8", "move it", row=3)
    assert str(fault) == "train.npy[3]: error: item: expected a warm item, found item 8; move it"
    fault = Fault("u.item", 3, None, "24 fields", "2 fields", "complete it", "warning")
    assert str(fault) == "u.item:3: warning: expected 24 fields, found 2 fields; complete it"


# ---------------------------------------------------------------------------------------------------------------------
# Ratings

INTER, ITEM = "user_id:token\titem_id:token\trating:float\n", "item_id:token\tclass:token_seq\tyear:float\n"
ITEMS = ITEM + "a\tx y\t1\nb\tx\t2\nc\ty z\t3\nd\tz\t4\n"
EVENTS = INTER + "".join(f"{user}\t{item}\t3\n" for user in (1, 2, 3) for item in "abcd")
# name of the case: file, contents, line, field, parts of expected, found and repair
RATINGS: dict[str, tuple[Any, ...]] = {
    "no items": ("x.item", None, None, None, "the file", "no such file", "copy it into the folder"),
    "empty": ("x.inter", "", 1, "user_id:token", "one column user_id:token", "''", "name the columns"),
    "no events": ("x.inter", INTER, None, None, "at least one rating", "none", "download the file again"),
    "no user": ("x.inter", EVENTS.replace("user_id", "user"), 1, "user_id:token", "one column", "'user:", "name the"),
    "no id": ("x.item", ITEMS.replace("item_id", "id"), 1, "item_id:token", "one column item", "'id:token", "name the"),
    "column twice": (
        "x.item",
        ITEMS.replace("class:token_seq", "item_id:token"),
        1,
        "item_id:token",
        "one",
        "",
        "each",
    ),
    "no kind": (
        "x.item",
        ITEMS.replace("class:token_seq", "class"),
        1,
        "column 2",
        "name:kind",
        "'class'",
        "name:token",
    ),
    "no words": (
        *("x.item", ITEMS.replace("token_seq", "float"), 1, None),
        *("a token or token_seq column", "none", "cold items are known by their content"),
    ),
    "fields": ("x.inter", EVENTS + "1\ta\n", 14, None, "3 fields", "2 fields ('1', ...)", "complete or delete"),
    "item fields": ("x.item", ITEMS + "e\tx\n", 6, None, "3 fields", "2 fields ('e', ...)", "complete or delete"),
    "empty user": ("x.inter", EVENTS + "\ta\t3\n", 14, "user_id:token", "an id", "an empty field", "fill it in"),
    "empty item": ("x.inter", EVENTS + "1\t\t3\n", 14, "item_id:token", "an id", "an empty field", "fill it in"),
    "no number": ("x.inter", EVENTS + "1\ta\tgood\n", 14, "rating:float", "finite number", "'good'", "write a number"),
    "NaN": ("x.inter", EVENTS + "1\ta\tnan\n", 14, "rating:float", "finite number", "'nan'", "write a number"),
    "item twice": ("x.item", ITEMS + "a\tq\t3\n", 6, "item_id:token", "one line per item", "item 'a' again", "join"),
    "no item id": ("x.item", ITEMS + "\tq\t3\n", 6, "item_id:token", "one line per item", "an empty field", "fill"),
    "unknown item": (
        *("x.item", ITEMS.replace("c\ty z\t3\n", ""), None, None),
        *("a line of each rated item", "no line of item 'c', which line 4 of x.inter rates", "add it"),
    ),
    "not UTF-8": ("x.item", ITEMS.encode() + b"e\tcaf\xe9\t5\n", 6, None, "UTF-8", "byte 0xe9", "save the file"),
    "NUL": ("x.inter", EVENTS + "1\ta\0\t3\n", 14, None, "text", "a NUL byte", "UTF-16"),
}


@pytest.mark.parametrize("name", RATINGS)
def test_the_fault_of_ratings_is_found(tmp_path, name):
    file, contents, line, field, expected, found, repair = RATINGS[name]
    for path, text in {"x.inter": EVENTS, "x.item": ITEMS, file: contents}.items():
        if text is not None:
            (tmp_path / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    first, fault, *_ = check_source(tmp_path)
    assert "prepare" in first.repair
    assert (fault.file, fault.line, fault.field, fault.row) == (str(tmp_path / file), line, field, None)
    assert expected in fault.expected
    assert found in fault.found
    assert repair in fault.repair
    assert "\n" not in str(fault)
    assert str(fault).isascii()
    with pytest.raises(DataError) as caught:
        prepare_source(tmp_path, tmp_path / "a.safetensors")
    assert str(caught.value) == str(fault)
    with pytest.raises(DataError) as caught:
        read_data(tmp_path)
    assert str(caught.value) == str(first)


@pytest.mark.parametrize(
    ("name", "text", "line", "found"),
    [
        ("movies.csv", "movieId,title\n3,x\n", 1, "'movieId title'"),
        ("ratings.csv", "userId,movieId\n1,3\n", 1, "'userId movieId'"),
        ("movies.csv", 'movieId,title,genres\n3,"x,Drama\n', 2, "2 fields ('3', ...)"),
        ("movies.csv", 'movieId,title,genres\n3,"' + "x" * 200_000 + '",Drama\n', 2, "field larger than field limit"),
    ],
)
def test_faults_of_comma_separated_ratings_are_found(tmp_path, name, text, line, found):
    folder = write_ratings(tmp_path, "csv", [("1", "3", 4.0), ("1", "6", 3.0)])
    (folder / name).write_text(text)
    fault = next(fault for fault in check_source(folder)[1:] if fault.file.endswith(name))
    assert fault.line == line
    assert found in fault.found


# ---------------------------------------------------------------------------------------------------------------------
# Packs


@pytest.fixture
def pack(tmp_path):
    """A pack whose source is gone."""
    path = tmp_path / "a.safetensors"
    prepare_source(write_files(tmp_path / "data", make_small()), path)
    (tmp_path / "data").rename(tmp_path / "moved")
    return path


def rewrite(path: Path, *, meta: dict[str, Any] | None = None, drop: str = "", **tensors: torch.Tensor) -> None:
    """Write the pack again with other tensors or another description, checksums and all."""
    old, description = read_pack(path, kind="clcrec data")
    new = {name: tensor.clone() for name, tensor in {**old, **tensors}.items() if name != drop}
    write_pack(path, new, {**description, **(meta or {})})


AGAIN = "write it again: python -m apps.clcrec prepare SOURCE"


def test_a_flipped_bit_in_any_tensor_of_a_pack_is_a_fault(pack):
    whole = pack.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in (header, (header + len(whole)) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 16
        pack.write_bytes(damaged)
        check_one(pack, Case({}, "", "an undamaged pack", "does not match its checksum", AGAIN), pack)


def test_a_truncated_pack_is_a_fault(pack):
    whole = pack.read_bytes()
    for size in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        pack.write_bytes(whole[:size])
        check_one(pack, Case({}, "", "an undamaged pack", "not a readable safetensors file", AGAIN), pack)


def test_a_safetensors_file_of_another_kind_is_a_fault(pack):
    tensors, _ = read_safetensors(pack)
    write_safetensors(pack, {name: tensor.clone() for name, tensor in tensors.items()}, {})
    check_one(pack, Case({}, "", "a pack of clcrec", "holds no pack record", "give the pack"), pack)
    write_pack(pack, {"x": torch.zeros(2)}, {"kind": "something else"})
    check_one(pack, Case({}, "", "a pack of clcrec", "something else", "give the pack"), pack)


def test_a_pack_of_another_layout_is_a_fault(pack):
    rewrite(pack, meta={"layout": 2})
    check_one(pack, Case({}, "", "a pack of layout 1", "layout 2 of another version", AGAIN), pack)


def test_a_stale_pack_is_a_fault(pack):
    folder = pack.parent / "data"
    (pack.parent / "moved").rename(folder)
    write_files(folder, {"train.npy": np.array([[0, 3]])})
    case = Case(
        {}, "", "as it is now", "a stale pack: train.npy has changed since", "write it again: python -m apps.cl"
    )
    check_one(pack, case, pack)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "expected", "found"),
    [
        ({"drop": "known_ptr"}, "a tensor known_ptr", "none"),
        ({"drop": "words_word"}, "a tensor words_word", "none"),
        ({"user": torch.zeros(6)}, "user as a row of torch.int32", "float32 (6,)"),
        ({"meta": {"num_warm": 6}}, "between 1 and 5 warm items", "6"),
        ({"meta": {"num_warm": None}}, "between 1 and 5 warm items", "None"),
        ({"user": int32(0, 1)}, "as many user as item", "2 and 6"),
        ({"user": int32(0, 1, 2, 3, 1, 1)}, "user in 0..2", "0 to 3"),
        ({"item": int32(0, 1, 2, 4, 1, 1)}, "item in 0..3", "0 to 4"),
        ({"valid_item": int32(0, -1, 2)}, "valid_item in 0..5", "-1 to 2"),
        ({"test_ptr": torch.tensor([0, 3])}, "test_ptr of 4 numbers", "2"),
        ({"test_ptr": torch.tensor([0, 2, 1, 3])}, "test_ptr that rises from 0 to 3", "a fall between"),
        ({"test_ptr": torch.tensor([0, 1, 2, 4])}, "test_ptr that rises from 0 to 3", "0 to 4"),
        ({"words_item": torch.tensor([0, 2, 1, 3, 4, 5])}, "words_item that never falls", "a fall"),
        ({"words_word": torch.tensor([0, 2, 1, 3, 4, 5])}, "words_word in 0..2", "0 to 5"),
        ({"feat_v": torch.ones(5, 2)}, "feat_v as float32 (6, features)", "float32 (5, 2)"),
    ],
)
def test_tensors_of_a_pack_that_describe_no_data_are_a_fault(pack, changes, expected, found):
    rewrite(pack, **changes)
    check_one(pack, Case({}, "", expected, found, AGAIN), pack)


def test_warnings_are_given_for_packs_too(tmp_path):
    files = make_small() | {"train.npy": np.array([[0, 3], [0, 3], [2, 4]]), "feat_v.npy": np.ones((6, 2))}
    folder = write_files(tmp_path / "data", {key: value for key, value in files.items() if key not in BARE})
    prepare_source(folder, tmp_path / "a.safetensors")
    faults = check_source(tmp_path / "a.safetensors")
    assert {fault.file for fault in faults} == {str(tmp_path / "a.safetensors")}
    assert [(f.expected, f.found, f.repair) for f in faults] == [
        (f.expected, f.found, f.repair) for f in check_source(folder)
    ]
    assert [fault.expected for fault in faults] == [
        "each pair once",
        "a training pair of each user",
        "a training pair of each warm item",
        "rows that tell items apart",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all


def mangled(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 2)):
        place = draw.randrange(len(changed) + 1)
        match draw.randrange(5):
            case 0:
                changed[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del changed[place : place + draw.randint(1, 40)]
            case 2:
                changed[place:place] = draw.randbytes(draw.randint(1, 8))
            case 3:
                changed[place : place + 8] = struct.pack("<q", draw.choice([-1, 0, 5, 2**31, 2**62, -(2**63)]))
            case 4:
                if place < len(changed):
                    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def check_agreement(path: Path) -> bool:
    """The reader raises the first error that `check` lists, or reads; says which."""
    errors = [fault for fault in check_source(path, limit=100) if fault.severity == "error"]
    if not errors:
        assert read_data(path).num_pairs > 0
        return True
    assert all(str(fault).isascii() and "\n" not in str(fault) for fault in errors)
    with pytest.raises(DataError) as caught:
        read_data(path)
    assert without_addresses(str(caught.value)) == without_addresses(str(errors[0]))
    return False


def without_addresses(text: str) -> str:
    return re.sub("0x[0-9a-f]+", "", text)


def test_reader_and_check_agree_on_mangled_folders(tmp_path):
    draw = random.Random(0)
    folders = [write_files(tmp_path / str(protocol), make_small(), protocol=protocol) for protocol in (2, 3, 4, 5)]
    read = 0
    for n in range(150):
        path = draw.choice(sorted(folders[n % 4].iterdir()))
        whole = path.read_bytes()
        path.write_bytes(mangled(whole, draw))
        read += check_agreement(folders[n % 4])
        path.write_bytes(whole)
    assert 2 < read < 140


def test_reader_and_check_agree_on_files_in_the_place_of_others(tmp_path):
    """Every file is sound, and holds something else than its name says."""
    draw = random.Random(1)
    files = {name: value for name, value in make_small().items() if not name.endswith(".pt")}
    odd = [np.arange(4.0), np.array("x"), np.array([b"y"]), np.zeros((0, 2)), np.ones((2, 3, 4)), np.array(5), {}]
    odd += [[None], [[[3]]], {0: None}, {None: [3]}, {(0, 1): {3}}, [{0: [3]}], np.array([True]), np.array(2**63, "u8")]
    folder = write_files(tmp_path / "data", files)
    donors = sorted(write_files(tmp_path / "odd", {f"{n}.npy": value for n, value in enumerate(odd)}).iterdir())
    contents = [path.read_bytes() for path in [*sorted(folder.iterdir()), *donors]]
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for other in draw.sample(contents, 9):
            path.write_bytes(other)
            assert check_agreement(folder) or other != whole
        path.write_bytes(whole)


def test_mangled_ratings_are_prepared_or_refused_and_nothing_else(tmp_path):
    draw = random.Random(2)
    read = 0
    for n in range(160):
        form = ["dat", "data", "csv", "inter"][n % 4]
        folder = write_ratings(tmp_path / form, form, make_events(count=20))
        path = draw.choice(sorted(folder.iterdir()))
        path.write_bytes(mangled(path.read_bytes(), draw))
        faults = check_source(folder, limit=100)[1:]
        if faults:
            with pytest.raises(DataError) as caught:
                prepare_source(folder, tmp_path / "a.safetensors", cold_share=0.5)
            assert str(caught.value) == str(faults[0])
        else:
            assert prepare_source(folder, tmp_path / "a.safetensors", cold_share=0.5).num_pairs > 0
            read += 1
    assert 10 < read < 150


def test_mangled_packs_are_read_or_refused_and_nothing_else(pack):
    draw = random.Random(3)
    whole = pack.read_bytes()
    for _ in range(100):
        pack.write_bytes(mangled(whole, draw))
        check_agreement(pack)


def test_mangled_features_are_read_or_refused_and_nothing_else(tmp_path):
    draw = random.Random(4)
    written = []
    for is_zip in (True, False):
        torch.save(torch.ones(6, 2), tmp_path / "feat_v.pt", _use_new_zipfile_serialization=is_zip)
        written.append((tmp_path / "feat_v.pt").read_bytes())
    refused = []
    for n in range(300):
        (tmp_path / "feat_v.pt").write_bytes(mangled(written[n % 2], draw))
        try:
            read_content(tmp_path, modalities=("v",), widths={"v": 2})
        except DataError as error:
            refused.append(str(error))
    assert 10 < len(refused) < 290
    assert all(text.startswith(str(tmp_path / "feat_v.pt")) and text.isascii() for text in refused)
