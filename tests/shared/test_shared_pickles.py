"""Old pickles and .npy files are read as data, against pickle and NumPy; nothing in a hostile one ever runs."""

import collections
import contextlib
import os
import pickle
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared import pickles
from shared.pickles import UnsafePickleError, describe_pickle, load_npy, load_pickle

PROTOCOLS = range(6)


def read(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return load_pickle(path)


def read_npy(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "x.npy"
    path.write_bytes(data)
    return load_npy(path)


def as_plain(value: Any) -> Any:
    """The value with every tensor and array as nested lists: what the reader promises for NumPy's objects."""
    if isinstance(value, dict):
        return {as_plain(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(as_plain(item) for item in value)
    if hasattr(value, "tolist"):  # a tensor, an array or a NumPy scalar
        return as_plain(value.tolist())
    return value


# Good files without NumPy

FACTORIES: tuple[Any, ...] = (int, float, str, bool, list, dict, set, tuple)
GOOD: dict[str, Any] = {
    "offsets": [0, 17, 255, 256, 65_535, 65_536, 2**31, 2**40, -1, -(2**33), 2**70, -(2**900)],
    "indexer": {"u": {"user_1": 1}, "i": {10_000_001: 1}, "f": collections.defaultdict(dict, {"100": {"a": 1, 2: 2}})},
    "ordered": collections.OrderedDict([("z", 1), ("a", [2]), ((1, "b"), None)]),
    "scalars": [None, True, False, 0.1, -0.0, float("inf"), 1e-300, "", "\u00e4\u20ac\U0001f600\n\\", b"", b"\x00\xff"],
    "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, set(), {1, "a", (2, 3)}, frozenset([b"x"])],
    "bytearray": bytearray(b"abc\xff"),
    "factories": [collections.defaultdict(f, {1: f()}) for f in FACTORIES],
    "long": list(range(3000)),
    "strings": [f"user_{i}" for i in range(300)] * 2,
    "number": 7,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", GOOD)
def test_plain_data_is_what_pickle_would_give(tmp_path, name, protocol):
    data = pickle.dumps(GOOD[name], protocol)
    found = read(tmp_path, data)
    assert found == pickle.loads(data)
    assert repr(found).replace("'", "") == repr(as_plain(GOOD[name])).replace("'", "") or name in (
        "containers",
        "ordered",
    )


def test_every_dictionary_becomes_a_dict_in_its_order(tmp_path):
    pairs = [("z", 1), ("a", 2), ("m", 3)]
    for made in (dict(pairs), collections.OrderedDict(pairs), collections.defaultdict(int, pairs)):
        found = read(tmp_path, pickle.dumps(made))
        assert type(found) is dict
        assert list(found.items()) == pairs


def test_defaultdict_loses_what_it_would_make(tmp_path):
    found = read(tmp_path, pickle.dumps(collections.defaultdict(list, {1: [2]})))
    with pytest.raises(KeyError):
        found[3]


def test_shared_values_stay_shared(tmp_path):
    inner = [1]
    found = read(tmp_path, pickle.dumps({"a": inner, "b": inner, "c": (inner, inner)}))
    assert found["a"] is found["b"] is found["c"][0]


def test_python_2_text_is_latin_1_and_its_ordered_dict_is_a_dict(tmp_path):
    assert read(tmp_path, b"\x80\x02}q\x00U\x02\xe4bq\x01K\x05s.") == {"\u00e4b": 5}
    assert read(tmp_path, b"ccollections\nOrderedDict\n((l(lS'b'\naI1\naa(lS'a'\naI2\naatR.") == {"b": 1, "a": 2}


def test_size_limit_and_missing_file(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([1] * 100))
    size = path.stat().st_size
    assert load_pickle(path, max_bytes=size) == [1] * 100
    with pytest.raises(
        UnsafePickleError, match=rf"x\.pkl: refused: {size} bytes are more than the limit of {size - 1}"
    ):
        load_pickle(path, max_bytes=size - 1)
    for load in (load_pickle, load_npy, describe_pickle):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "absent")


# Arrays as NumPy wrote them, as bytes, so that these need no NumPy

DTYPE = b"cnumpy\ndtype\n(X\x02\0\0\0%sK\x00K\x01tR(K\x03X\x01\0\0\0%sNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK%stb"
DTYPE_I2, DTYPE_O = DTYPE % (b"i2", b"<", b"\x00"), DTYPE % (b"O8", b"|", b"?")
NEW_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
ARRAY_I2 = NEW_ARRAY + b"(K\x01(K\x02K\x02t" + DTYPE_I2 + b"\x89C\x08\x01\x00\x02\x00\x2c\x01\xff\xfftb"
ARRAY_O = NEW_ARRAY + b"(K\x01(K\x02t" + DTYPE_O + b"\x89](](K\x01K\x02e}X\x01\x00\x00\x00aK\x03setb"
SCALAR_I2 = b"cnumpy.core.multiarray\nscalar\n(" + DTYPE_I2 + b"C\x02\x2c\x01tR"
BUFFER_I2 = b"cnumpy._core.numeric\n_frombuffer\n(\x96\x08\0\0\0\0\0\0\0\x01\0\x02\0\x2c\x01\xff\xff" + DTYPE_I2
NPY_HEADER = b"{'descr': '%s', 'fortran_order': %s, 'shape': %s, }"


def npy(descr: str, shape: str, data: bytes, *, fortran: str = "False", version: int = 1) -> bytes:
    header = NPY_HEADER % (descr.encode(), fortran.encode(), shape.encode())
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def test_arrays_and_scalars_are_rebuilt_without_numpy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", None)  # any import of it fails
    found = read(
        tmp_path, b"\x80\x03](" + ARRAY_I2 + ARRAY_O + SCALAR_I2 + BUFFER_I2 + b"K\x02K\x02\x86X\x01\0\0\0FtRe."
    )
    array, objects, scalar, buffer = found
    assert array.dtype is torch.int16
    assert array.tolist() == [[1, 2], [300, -1]]
    assert buffer.tolist() == [[1, 300], [2, -1]]
    assert objects == [[1, 2], {"a": 3}]
    assert (type(scalar), scalar) == (int, 300)
    assert read_npy(tmp_path, npy("|O", "(2,)", b"\x80\x03" + ARRAY_O + b".")) == [[1, 2], {"a": 3}]
    assert read_npy(tmp_path, npy(">i2", "(2,)", b"\x00\x01\x01\x2c")).tolist() == [1, 300]


def test_arrays_may_stand_in_tuples_and_be_shared(tmp_path):
    found = read(tmp_path, b"\x80\x03" + ARRAY_I2[: -len(b"tb")] + b"tbq\x05h\x05h\x05\x87.")
    assert found[0].tolist() == [[1, 2], [300, -1]]
    assert found[0] is found[1] is found[2]


def test_rebuilt_arrays_can_be_written_and_bytes_other_than_0_and_1_are_true(tmp_path):
    found = read_npy(tmp_path, npy("|b1", "(3,)", b"\x00\x01\xff"))
    assert found.dtype is torch.bool
    assert found.view(torch.uint8).tolist() == [0, 1, 1]
    array = read(tmp_path, b"\x80\x03" + ARRAY_I2 + b".")
    array += 1
    assert array.tolist() == [[2, 3], [301, 0]]


# Arrays that NumPy writes now


def numpy_values() -> dict[str, Any]:
    np = pytest.importorskip("numpy")
    values: dict[str, Any] = {}
    for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        for order in "<>":
            array = (np.arange(24) * 5 % 7).astype(order + code).reshape(2, 3, 4)
            values[f"{order}{code}"] = array
            values[f"{order}{code}-fortran"] = np.asfortranarray(array)
            values[f"{order}{code}-axes"] = array.transpose(1, 2, 0)
            values[f"{order}{code}-strided"] = array[:, ::2, 1:]
            values[f"{order}{code}-scalar"] = array[1, 2, 3]
    values |= {
        "extremes": np.array([-(2**63), 2**63 - 1]),
        "unsigned": np.array([0, 2**64 - 1], dtype="u8"),
        "inf": np.array([np.inf, -np.inf, -0.0, 5e-324]),
        "0-d": np.array(3.5),
        "empty": np.empty((0, 3), dtype="f4"),
        "empty-inside": np.empty((3, 0), dtype="i8"),
        "objects": np.array([1, "b", None, 2.5, [1, 2], {"k": (1,)}], dtype=object),
        "objects-2d": np.array([[1, "b", None], [2, "c", b"d"]], dtype=object),
        "objects-fortran": np.asfortranarray(np.array([[1, "b", None], [2, "c", b"d"]], dtype=object)),
        "objects-empty": np.empty((2, 0), dtype=object),
        "text": np.array([["ab", "c"], ["", "\u00e4\U0001f600"]]),
        "text-swapped": np.array(["ab", "\u00e4"]).astype(">U2"),
        "text-fortran": np.asfortranarray(np.array([["a", "b", "c"], ["d", "e", "f"]])),
        "bytes": np.array([b"ab", b"c", b""]),
        "mixed": {1: np.arange(3), "s": np.str_("x"), "t": (np.float32(1.5), np.array(["q"])), "b": np.bytes_(b"y")},
        "numpy-keys": {np.int64(5): [np.float64(2.5)], (np.int32(1), np.str_("x")): np.bool_(True)},
        "ragged": collections.defaultdict(list, {i: np.arange(i) for i in range(4)}),
        "0-d-object": np.array({"a": [1]}, dtype=object),
    }
    return values


def check_dtypes(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for key in expected:
            check_dtypes(found[key], expected[key])
    elif isinstance(found, torch.Tensor):
        assert str(found.dtype) == f"torch.{expected.dtype.name}"
        assert tuple(found.shape) == expected.shape


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_pickles_become_tensors_lists_and_numbers(tmp_path, protocol):
    for name, value in numpy_values().items():
        found = read(tmp_path, pickle.dumps(value, protocol))
        assert as_plain(found) == as_plain(value), name
        assert repr(as_plain(found)) == repr(as_plain(dict(value) if isinstance(value, dict) else value)), name
        check_dtypes(found, value)


def test_numpy_1_and_numpy_2_module_names_are_the_same(tmp_path):
    np = pytest.importorskip("numpy")
    data = pickle.dumps([np.arange(5), np.int16(7)], 2)
    old = data.replace(b"numpy._core.", b"numpy.core.")
    new = old.replace(b"numpy.core.", b"numpy._core.")
    assert old != new
    assert as_plain(read(tmp_path, old)) == as_plain(read(tmp_path, new)) == [[0, 1, 2, 3, 4], 7]


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_version_and_order(tmp_path, version):
    np = pytest.importorskip("numpy")
    for name, value in numpy_values().items():
        if isinstance(value, np.ndarray):
            path = tmp_path / "a.npy"
            with path.open("wb") as file:
                np.lib.format.write_array(file, value, version=version, allow_pickle=True)
            found = load_npy(path)
            assert as_plain(found) == as_plain(value), name
            check_dtypes(found, value)


def test_npy_of_one_dictionary_gives_the_dictionary(tmp_path):
    np = pytest.importorskip("numpy")
    np.save(tmp_path / "d.npy", {0: [1, 2], 1: {3}}, allow_pickle=True)
    assert load_npy(tmp_path / "d.npy") == {0: [1, 2], 1: {3}}


def test_npy_numbers_are_mapped_and_writing_never_reaches_the_file(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(npy("<i4", "(3,)", struct.pack("<3i", 1, 2, 3)))
    before = path.read_bytes()
    found = load_npy(path)
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    found.fill_(9)
    assert path.read_bytes() == before
    assert load_npy(path, max_bytes=1).tolist() == [1, 2, 3]


def test_npy_whose_data_is_not_aligned_is_read(tmp_path):
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack("<2d", 1.5, -2.5)
    assert (10 + len(header)) % 8 != 0
    assert read_npy(tmp_path, data).tolist() == [1.5, -2.5]


def test_real_contest_pickles_equal_what_pickle_reads(real_data):
    folder = real_data("tencentgr-sample")
    for name in ("indexer.pkl", "seq_offsets.pkl"):
        with (folder / name).open("rb") as file:
            expected = pickle.load(file)
        found = load_pickle(folder / name)
        assert type(found) in (dict, list)
        assert found == expected
        assert not isinstance(expected, dict) or [*map(list, found.values())] == [*map(list, expected.values())]


def test_real_clcrec_dictionary_equals_what_numpy_reads(real_data):
    np = pytest.importorskip("numpy")
    path = real_data("movielens-clcrec") / "user_item_all_dict.npy"
    expected = np.load(path, allow_pickle=True).item()
    found = load_npy(path)
    assert list(found) == list(expected)
    assert all(as_plain(found[user]) == as_plain(expected[user]) for user in expected)


# Hostile files


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def stacked(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def dtype(code: bytes, state: bytes) -> bytes:
    return called(named("numpy.dtype"), code, b"K\x00", b"K\x01") + b"(" + state + b"tb"


def array(shape: bytes, kind: bytes, data: bytes, *, version: bytes = b"K\x01") -> bytes:
    return NEW_ARRAY + b"(" + version + shape + kind + b"\x89" + data + b"tb"


MINUS_1 = b"J\xff\xff\xff\xff"
BYTES_8 = b"C\x08" + bytes(8)
SHAPE_4 = b"K\x04\x85"


CANARY = "canary"  # what the attacks would make in the working folder


def hostile_pickles() -> dict[str, bytes]:
    command, target = text(f"mkdir {CANARY}"), text(CANARY)
    source = text(f"__import__('os').mkdir({CANARY!r})")
    mkdir = called(named("os.mkdir"), target)
    bomb = b")" + b"\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    million = b"\x8e" + struct.pack("<Q", 1 << 20) + bytes(1 << 20)
    bytes_dtype = dtype(text("i1"), b"K\x03" + text("|") + b"NNN" + MINUS_1 + MINUS_1 + b"K\x00")
    many_arrays = (
        million
        + b"\x94"
        + bytes_dtype
        + b"\x94"
        + b"]("
        + ((NEW_ARRAY + b"(K\x01J\x00\x00\x10\x00\x85h\x01\x89h\x00tb") * 100)
        + b"e"
    )
    return {
        # names, in every form that a pickle can spell them
        "GLOBAL os.system": called(named("os.system"), command) + b".",
        "GLOBAL posix.system, protocol 2": b"\x80\x02" + called(named("posix.system"), command) + b".",
        "GLOBAL nt.system": called(named("nt.system"), command) + b".",
        "GLOBAL os.mkdir": mkdir + b".",
        "protocol 0 text": f"cos\nmkdir\n(V{CANARY}\ntR.".encode(),
        "STACK_GLOBAL": b"\x80\x04" + called(stacked("os", "mkdir"), target) + b".",
        "STACK_GLOBAL through the memo": text("os")
        + b"\x94"
        + text("mkdir")
        + b"\x940h\x00h\x01\x93("
        + target
        + b"tR.",
        "STACK_GLOBAL of a dotted name": b"\x80\x04" + called(stacked("numpy", "ndarray.tofile"), target) + b".",
        "STACK_GLOBAL of no strings": b"K\x01K\x02\x93.",
        "INST": f"(V{CANARY}\nios\nmkdir\n.".encode(),
        "OBJ": b"(" + named("os.mkdir") + target + b"o.",
        "NEWOBJ": named("subprocess.Popen") + b"(" + command + b"t\x81.",
        "NEWOBJ of an allowed name": named("builtins.set") + b")\x81.",
        "NEWOBJ_EX": named("subprocess.Popen") + b"(" + command + b"t}\x92.",
        "builtins.eval": called(named("builtins.eval"), source) + b".",
        "builtins.exec": called(named("builtins.exec"), source) + b".",
        "__builtin__.eval": called(named("__builtin__.eval"), source) + b".",
        "builtins.getattr": called(called(named("builtins.getattr"), named("os.path"), text("mkdir")), target) + b".",
        "builtins.__import__": called(named("builtins.__import__"), text("antigravity")) + b".",
        "builtins.open": called(named("builtins.open"), target, text("w")) + b".",
        "builtins.type": called(named("builtins.type"), text("X"), b")", b"}") + b".",
        "functools.partial": called(called(named("functools.partial"), named("os.mkdir"), target)) + b".",
        "operator.methodcaller": called(called(named("operator.methodcaller"), text("mkdir")), target) + b".",
        "importlib.import_module": called(named("importlib.import_module"), text("this")) + b".",
        "runpy": called(named("runpy._run_code"), source, b"}") + b".",
        "copyreg._reconstructor": called(named("copyreg._reconstructor"), named("builtins.object"), b"N") + b".",
        "pickle.loads": called(named("pickle.loads"), b"C" + bytes([len(mkdir) + 1]) + mkdir + b".") + b".",
        "numpy.load": called(named("numpy.load"), target, b"N", b"\x88") + b".",
        "numpy runstring": called(named("numpy.testing._private.utils.runstring"), source, b"}") + b".",
        "numpy.memmap": called(named("numpy.memmap"), target) + b".",
        "numpy.core.records.fromfile": called(named("numpy.core.records.fromfile"), target) + b".",
        "torch.load": called(named("torch.load"), target) + b".",
        "torch storage": called(named("torch.storage._load_from_bytes"), b"C\x01a") + b".",
        "a name of this project": called(named("shared.pickles._StandIn"), text("x"), b"N") + b".",
        "a name deep in a container": b"}" + text("a") + b"](" + mkdir + b"es.",
        "a name as default factory": called(named("collections.defaultdict"), named("os.mkdir")) + b".",
        "a name that is dropped": mkdir + b"0N.",
        "an escape sequence as name": b"c\x1b[2J\nevil\n.",
        # allowed names, misused
        "BUILD on a function": named("_codecs.encode") + b"}" + text("__defaults__") + target + b"sb.",
        "BUILD on a class": named("numpy.ndarray") + b"}" + text("tofile") + named("builtins.list") + b"sb.",
        "BUILD on a dict": b"}}" + text("x") + b"K\x01sb.",
        "BUILD on a list": b"]N}" + text("x") + b"K\x01s\x86b.",
        "SETITEM on a function": named("_codecs.encode") + text("x") + b"K\x01s.",
        "APPEND on a tuple": b")K\x01a.",
        "call of a class that is only named": called(named("builtins.list"), b"(K\x01t") + b".",
        "call of a number": b"K\x01)R.",
        "call without a tuple": named("builtins.set") + b"]R.",
        "bytearray of a size": called(named("builtins.bytearray"), b"J\xff\xff\xff\x7f") + b".",
        "bytes of a size": called(named("builtins.bytes"), b"J\xff\xff\xff\x7f") + b".",
        "set of a string": called(named("builtins.set"), text("abc")) + b".",
        "encode with another codec": called(named("_codecs.encode"), text("abc"), text("zlib")) + b".",
        "encode of other letters": called(named("_codecs.encode"), text("\u20ac"), text("latin1")) + b".",
        "OrderedDict of no pairs": called(named("collections.OrderedDict"), b"](K\x01K\x02e") + b".",
        "defaultdict with a value as factory": called(named("collections.defaultdict"), b"K\x01") + b".",
        # array types and arrays
        "dtype with fields": dtype(text("V4"), b"K\x03" + text("|") + b"N" + text("f") + b"\x85}K\x04K\x01K\x10")
        + b".",
        "dtype with a field out of bounds": dtype(
            text("i4"),
            b"K\x03"
            + text("<")
            + b"N"
            + text("f")
            + b"\x85}"
            + text("f")
            + DTYPE_I2
            + b"M\xff\xff\x86sK\x04K\x01K\x10",
        )
        + b".",
        "dtype with a subarray": dtype(text("i4"), b"K\x03" + text("<") + DTYPE_I2 + b"(K\x09t\x86NNK\x04K\x01K\x00")
        + b".",
        "dtype of another width": dtype(text("i4"), b"K\x03" + text("<") + b"NNNM\xff\xffK\x01K\x00") + b".",
        "dtype of no byte order": dtype(text("i4"), b"K\x03" + text("!") + b"NNN" + MINUS_1 + MINUS_1 + b"K\x00")
        + b".",
        "dtype with a short state": dtype(text("i4"), b"K\x03" + text("<")) + b".",
        "dtype built twice": DTYPE_I2 + b"(K\x03" + text(">") + b"NNN" + MINUS_1 + MINUS_1 + b"K\x00tb.",
        "dtype of pairs": dtype(b"](" + text("a") + text("i4") + b"\x86e", b"") + b".",
        "dtype of a wide string": called(named("numpy.dtype"), text("S999999999"), b"K\x00", b"K\x01") + b".",
        "dtype of dates": called(named("numpy.dtype"), text("M8[ns]"), b"K\x00", b"K\x01") + b".",
        "array larger than its bytes": array(b"J\x00\x00\x00\x7f\x85", DTYPE_I2, BYTES_8) + b".",
        "array smaller than its bytes": array(b"K\x01\x85", DTYPE_I2, BYTES_8) + b".",
        "array of a negative size": array(b"J\xfc\xff\xff\xffJ\xff\xff\xff\xff\x86", DTYPE_I2, BYTES_8) + b".",
        "array of sizes that overflow": array(b"(" + b"\x8a\x05\0\0\0\0\x01" * 2 + b"K\x00t", DTYPE_I2, b"C\x00")
        + b".",
        "array of a size that is no int": array(b"G" + bytes(8) + b"\x85", DTYPE_I2, b"C\x00") + b".",
        "array of 65 axes": array(b"(" + b"K\x01" * 65 + b"t", DTYPE_I2, b"C\x02ab") + b".",
        "objects from bytes": array(b"K\x01\x85", DTYPE_O, BYTES_8) + b".",
        "numbers from a list": array(SHAPE_4, DTYPE_I2, b"](K\x01K\x02K\x03K\x04e") + b".",
        "objects that do not fill their shape": array(SHAPE_4, DTYPE_O, b"](K\x01K\x02e") + b".",
        "a billion empty lists": array(b"J\x00\xca\x9a\x3bK\x00\x86", DTYPE_O, b"]") + b".",
        "nine axes of objects": array(b"(" + b"K\x01" * 9 + b"t", DTYPE_O, b"](K\x01e") + b".",
        "array with a foreign type": array(SHAPE_4, text("i2"), BYTES_8) + b".",
        "array of another version": array(SHAPE_4, DTYPE_I2, BYTES_8, version=b"K\x02") + b".",
        "array of another class": called(
            named("numpy.core.multiarray._reconstruct"), named("builtins.list"), b"K\x00\x85", b"C\x01b"
        )
        + b".",
        "array built twice": ARRAY_I2[:-2] + b"tq\x00bh\x00b.",
        "array before its contents": b"]" + NEW_ARRAY + b"a.",
        "array that holds itself": NEW_ARRAY + b"q\x07(K\x01K\x01\x85" + DTYPE_O + b"\x89](h\x07etb.",
        "buffer that is too short": BUFFER_I2 + b"K\x09\x85" + text("C") + b"tR.",
        "buffer of objects": called(named("numpy.core.numeric._frombuffer"), BYTES_8, DTYPE_O, b"K\x01\x85", text("C"))
        + b".",
        "buffer with impossible axes": BUFFER_I2 + b"K\x02K\x02\x86" + text("K") + b"K\x00K\x00\x86tR.",
        "scalar of a wrong size": called(named("numpy.core.multiarray.scalar"), DTYPE_I2, b"C\x01a") + b".",
        "scalar object": called(named("numpy.core.multiarray.scalar"), DTYPE_O, b"C\x01a") + b".",
        "one megabyte a hundred times": many_arrays + b".",
        # opcodes and forms
        "PERSID": f"P{CANARY}\n.".encode(),
        "BINPERSID": target + b"Q.",
        "EXT1": b"\x82\x01.",
        "EXT2": b"\x83\x01\x00.",
        "EXT4": b"\x84\x01\x00\x00\x00.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "READONLY_BUFFER": b"\x80\x05C\x01a\x98.",
        "DUP": b"K\x012\x86.",
        "protocol 6": b"\x80\x06K\x01.",
        "memo bomb": b"K\x01r\xff\xff\xff\xff.",
        "memo bomb in text": b"I1\np99999999999\n.",
        "memo below zero": b"I1\np-1\n.",
        "memo never filled": b"h\x05.",
        "bytes beyond the end": b"\x8e" + struct.pack("<Q", 1 << 62) + b"a.",
        "text beyond the end": b"X\xff\xff\xff\x7fa.",
        "number of a negative length": b"\x8b\xff\xff\xff\xff.",
        "decimal of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "text that is no UTF-8": b"X\x01\x00\x00\x00\xff.",
        "string without quotes": b"Sabc\n.",
        "string with a bad escape": b"S'\\xZZ'\n.",
        "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
        "deep tuples": b")" + b"\x85" * 100_000 + b".",
        "deep tuple as a key": b"}" + b")" + b"\x85" * 150_000 + b"Ns.",
        "deep tuple in a set": b"\x8f(" + b")" + b"\x85" * 150_000 + b"\x90.",
        "tuple that takes years to hash, as a key": b"(" + bomb + b"1}h\x3cNs.",
        "tuple that takes years to hash, in a frozenset": b"(" + bomb + b"\x91.",
        "tuple that takes years to hash, in set()": called(named("builtins.set"), b"](" + bomb + b"e") + b".",
        "key that is a list": b"}]Ns.",
        "key that is an array": b"}" + ARRAY_I2 + b"Ns.",
        "key that is a type": b"}" + named("builtins.set") + b"Ns.",
        "key without a value": b"}(K\x01u.",
        "list that holds itself": b"]q\x00h\x00a.",
        "dictionary that holds itself": b"}q\x00K\x01h\x00s.",
        "a type as the result": named("builtins.set") + b".",
        "a function in a list": b"](" + named("_codecs.encode") + b"e.",
        "a type in a tuple in a dict": b"}K\x01" + named("numpy.ndarray") + b"\x85s.",
        "an array type as the result": DTYPE_I2 + b".",
        "bytes after the end": b"K\x01.x",
        "a second pickle after the end": b"K\x01." + mkdir + b".",
        "values left over": b"K\x01K\x02.",
        "a mark left over": b"(K\x01.",
        "too few values": b"\x86.",
        "an end without a value": b".",
        "a mark that is missing": b"K\x01t.",
        "no end": b"K\x01",
        "nothing": b"",
        "plain text": b"user item\n1 2\n",
        "a zip file": b"PK\x03\x04" + bytes(60),
        "an unknown opcode": b"\xffK\x01.",
    }


def hostile_npys() -> dict[str, bytes]:
    header = b"{'descr': __import__('os').mkdir(%r), 'fortran_order': False, 'shape': (1,)}\n" % CANARY
    code = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(8)
    return {f"objects: {name}": npy("|O", "()", data) for name, data in hostile_pickles().items()} | {
        "code in the header": code,
        "structure": npy("|V4", "(1,)", bytes(4)),
        "fields": npy("<i4", "(1,)", bytes(4)).replace(b"'<i4'", b"[('a', '<i4')]"),
        "dates": npy("<M8[ns]", "(1,)", bytes(8)),
        "complex": npy("<c8", "(1,)", bytes(8)),
        "too few bytes": npy("<i4", "(2,)", bytes(7)),
        "too many bytes": npy("<i4", "(2,)", bytes(9)),
        "a negative size": npy("<i4", "(-1,)", bytes(4)),
        "sizes that overflow": npy("<i4", "(4294967296, 4294967296, 0)", b""),
        "a shape that is a list": npy("<i4", "[1]", bytes(4)),
        "a shape of truths": npy("<i4", "(True,)", bytes(4)),
        "no order": npy("<i4", "(1,)", bytes(4), fortran="None"),
        "an unknown version": npy("<i4", "(1,)", bytes(4)).replace(b"NUMPY\x01", b"NUMPY\x09"),
        "a header that is too long": npy("<i4", "(1,)" + " " * 20_000, bytes(4)),
        "a header that is cut": npy("<i4", "(1,)", bytes(4))[:40],
        "a header of brackets": npy("<i4", "(" * 5000, bytes(4)),
        "a header with another key": npy("<i4", "(1,), 'x': 1", bytes(4)),
        "objects in another shape": npy("|O", "(3,)", b"\x80\x03" + ARRAY_O + b"."),
        "objects by the billion": npy("|O", "(1000000000, 0)", b"\x80\x03" + ARRAY_O + b"."),
        "objects within objects": npy("|O", "(%s)" % ("300, " * 5), b"]q\x00(" + b"h\x00" * 300 + b"e."),
        "no array at all": b"K\x01.",
        "an archive": b"PK\x03\x04" + bytes(60),
        "nothing": b"",
    }


# Why each of them is refused; all others are refused for the name they want.
REASONS = {
    "a name is no string": ["STACK_GLOBAL of no strings"],
    "opcode INST": ["INST"],
    "opcode NEWOBJ": ["NEWOBJ of an allowed name"],
    "opcode PERSID": ["PERSID"],
    "opcode BINPERSID": ["BINPERSID"],
    "opcode EXT": ["EXT1", "EXT2", "EXT4"],
    "opcode NEXT_BUFFER": ["NEXT_BUFFER"],
    "opcode READONLY_BUFFER": ["READONLY_BUFFER"],
    "opcode DUP": ["DUP"],
    "sets the inner state": [
        "BUILD on a function",
        "BUILD on a class",
        "BUILD on a dict",
        "BUILD on a list",
        "array built twice",
    ],
    "items are added to": ["SETITEM on a function", "APPEND on a tuple"],
    "no function here": ["call of a class that is only named", "call of a number"],
    "arguments are no tuple": ["call without a tuple"],
    "not made from Latin-1 text": ["bytearray of a size", "bytes of a size", "encode with another codec"],
    "a set is not made from a list": ["set of a string"],
    "can't encode character": ["encode of other letters"],
    "arguments that are no pairs": ["OrderedDict of no pairs"],
    "defaultdict has arguments": ["defaultdict with a value as factory"],
    "is not supported": ["dtype with fields", "dtype of a wide string", "dtype of dates"],
    "a structured array": ["dtype with a field out of bounds", "dtype with a subarray", "dtype of pairs"],
    "claims 65535 bytes": ["dtype of another width"],
    "no byte order": ["dtype of no byte order"],
    "an array type has a state": ["dtype with a short state", "dtype built twice"],
    r"needs \d+ bytes and has": [
        "array larger than its bytes",
        "array smaller than its bytes",
        "buffer that is too short",
        "scalar of a wrong size",
    ],
    "impossible shape": [
        "array of a negative size",
        "array of a size that is no int",
        "array of 65 axes",
        "a billion empty lists",
    ],
    "impossible size": ["array of sizes that overflow"],
    "does not fill its shape": ["objects from bytes", "objects that do not fill their shape"],
    "an array has a state": ["numbers from a list", "array with a foreign type", "array of another version"],
    "more than 8 axes": ["nine axes of objects"],
    "another class than numpy.ndarray": ["array of another class"],
    "type or a function": [
        "array before its contents",
        "a type as the result",
        "a function in a list",
        "a type in a tuple in a dict",
        "an array type as the result",
    ],
    "used before it has contents": ["array that holds itself"],
    "made from bytes": ["buffer of objects"],
    "axes in no known order": ["buffer with impossible axes"],
    "a NumPy scalar has arguments": ["scalar object"],
    "many times its size": ["one megabyte a hundred times"],
    "protocol 6 is unknown": ["protocol 6"],
    "out of proportion": ["memo bomb", "memo bomb in text", "memo below zero"],
    "KeyError": ["memo never filled"],
    "remain": ["bytes beyond the end", "text beyond the end"],
    "byte count < 0": ["number of a negative length"],
    "4300 digits": ["decimal of a million digits"],
    "can't decode byte": ["text that is no UTF-8"],
    "no string quotes": ["string without quotes"],
    "escape": ["string with a bad escape"],
    "deeper than 100": ["deep lists", "deep tuples"],
    "deeper than 16": ["deep tuple as a key", "deep tuple in a set"],
    "more than 1000 parts": [
        "tuple that takes years to hash, as a key",
        "tuple that takes years to hash, in a frozenset",
        "tuple that takes years to hash, in set()",
    ],
    "no number, string or tuple": ["key that is a list", "key that is an array", "key that is a type"],
    "key has no value": ["key without a value"],
    "contains itself": ["list that holds itself", "dictionary that holds itself"],
    "follow its end": ["bytes after the end", "a second pickle after the end"],
    "values left over": ["values left over", "a mark left over", "an end without a value"],
    "too few values": ["too few values"],
    "pop from empty list": ["a mark that is missing", "plain text"],
    "exhausted before seeing STOP": ["no end", "nothing"],
    "not a readable pickle": ["a zip file"],
    "unknown": ["an unknown opcode"],
}
REASON_OF = {name: reason for reason, names in REASONS.items() for name in names}
HOSTILE, HOSTILE_NPY = hostile_pickles(), hostile_npys()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    reason = REASON_OF.get(name, r"refused: the file wants \S+, which is code and not data")
    with pytest.raises(UnsafePickleError, match=rf"x\.pkl: .*{reason}.*Convert it with a tool you trust"):
        read(tmp_path, HOSTILE[name])
    assert isinstance(describe_pickle(tmp_path / "x.pkl"), list)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("name", HOSTILE_NPY)
def test_hostile_npy_is_refused_and_runs_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError, match=r"x\.npy: (refused|not a readable).*Convert it with a tool you trust"):
        read_npy(tmp_path, HOSTILE_NPY[name])
    assert isinstance(describe_pickle(tmp_path / "x.npy"), list)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    "name", ["GLOBAL os.mkdir", "protocol 0 text", "STACK_GLOBAL", "INST", "OBJ", "a name that is dropped"]
)
def test_the_corpus_is_dangerous_to_pickle_itself(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(TypeError):
        pickle.loads(HOSTILE[name])
    assert (tmp_path / CANARY).is_dir()


def test_refusal_names_the_file_what_it_wants_all_names_and_the_repair(tmp_path):
    data = (
        b"\x80\x04]("
        + DTYPE_I2
        + named("collections.OrderedDict")
        + b")R"
        + called(stacked("os", "system"), text("x"))
        + b"e."
    )
    with pytest.raises(UnsafePickleError) as caught:
        read(tmp_path, data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'x.pkl'}: refused: the file wants os.system, which is code and not data.")
    assert "Names in it: collections.OrderedDict, numpy.dtype, os.system." in message
    assert message.endswith("to .json or to .npy without objects.")
    assert describe_pickle(tmp_path / "x.pkl") == ["collections.OrderedDict", "numpy.dtype", "os.system"]


def test_names_are_safe_to_print(tmp_path):
    with pytest.raises(UnsafePickleError) as caught:
        read(tmp_path, HOSTILE["an escape sequence as name"])
    assert "\x1b" not in str(caught.value)
    assert describe_pickle(tmp_path / "x.pkl") == ["\\x1b[2J.evil"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_describe_follows_every_protocol_without_loading(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([collections.OrderedDict(a=1), collections.OrderedDict(b=2), os.getcwd], protocol))
    assert describe_pickle(path) == ["collections.OrderedDict", f"{os.getcwd.__module__}.getcwd"]
    path.write_bytes(npy("|O", "()", path.read_bytes()))
    assert describe_pickle(path) == ["collections.OrderedDict", f"{os.getcwd.__module__}.getcwd"]


def test_stand_ins_are_frozen_and_belong_to_nobody_else():
    for stand_in in pickles._TABLE.values():
        assert type(stand_in).__module__ == "shared.pickles"
        assert stand_in.make is None or stand_in.make.__module__ == "shared.pickles"
        with pytest.raises((AttributeError, TypeError)):
            setattr(stand_in, "name", "x")  # noqa: B010 - a plain assignment is what mypy refuses


# Damaged files


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0:
                changed[i : i + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[i : i + 1] = bytes([changed[i] ^ (1 << rng.randrange(8))] if i < len(changed) else [])
            case 2:
                del changed[i : i + rng.randint(1, 8)]
            case 3:
                j = rng.randrange(len(changed) + 1)
                changed[i:i] = changed[j : j + rng.randint(1, 20)]
            case 4:
                changed[i:i] = rng.choice(
                    [b"(", b".", b"R", b"b", b"\x85", b"h\x01", b"0", b"t", b"e", b"a", b"s", b"]"]
                )
    return bytes(changed)


def count_loaded(tmp_path: Path, load: Callable[[Path, bytes], Any], good: list[bytes], count: int, seed: int) -> int:
    rng, loaded = random.Random(seed), 0
    for i in range(count):
        try:
            load(tmp_path, mutated(good[i % len(good)], rng))
        except UnsafePickleError:
            continue
        loaded += 1
    return loaded


def test_damaged_pickles_load_or_are_refused_and_nothing_else(tmp_path):
    small = {name: value for name, value in GOOD.items() if name not in ("long", "strings")}
    good = [pickle.dumps(value, protocol) for value in small.values() for protocol in PROTOCOLS]
    good += [b"\x80\x03](" + ARRAY_I2 + SCALAR_I2 + b"e.", b"\x80\x03" + ARRAY_O + b"."]
    good += [b"\x80\x05" + BUFFER_I2 + b"K\x02K\x02\x86X\x01\0\0\0FtR."]
    loaded = count_loaded(tmp_path, read, good, 2000, seed=1)
    assert 0 < loaded < 2000


def test_damaged_npys_load_or_are_refused_and_nothing_else(tmp_path):
    good = [
        npy("<i4", "(2, 2)", bytes(16)),
        npy("|O", "(2,)", b"\x80\x03" + ARRAY_O + b"."),
        npy("<U2", "(2,)", bytes(16)),
    ]
    loaded = count_loaded(tmp_path, read_npy, good, 1000, seed=2)
    assert 0 < loaded < 1000


def test_damaged_numpy_pickles_load_or_are_refused_and_nothing_else(tmp_path):
    values = numpy_values()
    chosen = ["<i2", ">f4-fortran", "<f8-axes", "<u8-scalar", "objects", "text", "mixed", "numpy-keys", "ragged"]
    good = [pickle.dumps(values[name], protocol) for name in chosen for protocol in PROTOCOLS]
    loaded = count_loaded(tmp_path, read, good, 1000, seed=3)
    assert 0 < loaded < 1000
