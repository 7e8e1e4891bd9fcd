"""Old pickles and .npy files, read as data only: nothing in them is imported, called or believed.

pickletools reads the opcodes; a small machine below carries out those that plain data needs and refuses all others.
No name in the file is ever imported: a name is looked up in a fixed table of frozen stand-ins defined here, none of
which is NumPy's or the standard library's own object, and only a REDUCE of a stand-in's own function, with arguments
that it checks, makes anything. The C unpickler is not used even with such a table: a tuple nested a million deep and
used as a dictionary key crashes it inside hash(); here keys are measured before they are hashed.
"""

from __future__ import annotations

import ast
import io
import itertools
import math
import os
import pickletools
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

StrPath: TypeAlias = str | os.PathLike[str]


class UnsafePickleError(ValueError):
    """The file asks for something other than plain data, or is no readable pickle."""


MAX_PICKLE_BYTES = 1 << 30
_MAX_DEPTH = 100  # of nested containers in the result
_MAX_KEY_DEPTH = 16
_MAX_KEY_NODES = 1000  # tuples that share parts could otherwise take years to hash
_MAX_MEMO_SLACK = 1 << 16
_MAX_EMPTY_LISTS = 1 << 16
_MAX_LIST_AXES = 8
_MAX_UNPACKING = 4  # times the file's size: what arrays and sets may copy, for they may share one memoized argument
_MAX_NPY_HEADER_BYTES = 10_000
_MAX_DESCRIBED_OPCODES = 1_000_000
_REPAIR = "Convert it with a tool you trust, on a machine you can spare, to .json or to .npy without objects."

_NUMERIC = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}
_KEY_TYPES = {type(None), bool, int, float, str, bytes}
_LEAF_TYPES = _KEY_TYPES | {bytearray, Tensor, set, frozenset}  # a set's elements have been checked as keys
_NESTING_TYPES = {list, tuple, dict}


class _RefusedError(Exception):
    """Why a file is refused; becomes UnsafePickleError once the path is known."""


def _refuse(reason: str) -> NoReturn:
    raise _RefusedError(reason)


@dataclass(frozen=True, slots=True, eq=False)
class _StandIn:
    """What a file gets for an allowed name: a frozen value that knows the one thing it may be used for."""

    name: str
    make: Callable[[tuple[Any, ...]], Any] | None  # None: may be named, as in defaultdict(list), but never called


@dataclass(slots=True, eq=False)
class _DType:
    """Stand-in for a NumPy dtype: one simple element type and its byte order."""

    code: str
    order: str = "="
    is_built: bool = False

    @property
    def width(self) -> int:
        """Bytes per element."""
        return int(self.code[1:]) * (4 if self.code[0] == "U" else 1)


@dataclass(slots=True, eq=False)
class _Array:
    """Stand-in for an array between its creation and the BUILD that brings its contents."""

    value: Any = None
    is_built: bool = False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def load_pickle(path: StrPath, *, max_bytes: int = MAX_PICKLE_BYTES) -> Any:
    """The data in a pickle: containers, numbers, strings and arrays, read without importing or running anything.

    Dictionaries of every kind come back as dict in their order, NumPy arrays as tensors, object and string arrays as
    nested lists, NumPy scalars as Python numbers, Python 2 strings as Latin-1 text. Anything else in it, more than
    `max_bytes`, or damage raises UnsafePickleError. Slow, seconds per million values: convert once, keep the result.
    """
    data = _read_whole(path, max_bytes)
    return _load(path, data, 0)


def load_npy(path: StrPath, *, max_bytes: int = MAX_PICKLE_BYTES) -> Any:
    """The contents of a .npy file: a memory-mapped tensor for numbers, nested lists for strings and objects.

    A file of one object (`np.save(path, a_dict)`) gives that object. Objects are read as `load_pickle` reads them.
    Writing into a mapped tensor never reaches the file; while it lives, Windows will not let the file be replaced.
    `max_bytes` limits string and object arrays, which are held in memory.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        head = file.read(12 + _MAX_NPY_HEADER_BYTES)
    try:
        start, dtype, is_fortran, shape = _parse_npy_header(head)
        if dtype.code == "O":
            data = _read_whole(path, max_bytes)
            if math.prod(max(length, 1) for length in shape) > max(size, _MAX_EMPTY_LISTS):
                _refuse("its header gives more objects than the file can hold")
            value = _load(path, data, start)
            _check_nesting(value, shape)
            return value
        _check_array_bytes(shape, dtype, size - start)
        if dtype.code in _NUMERIC:
            return _arrange(_typed(_map_bytes(path, start, size, dtype.width), dtype), shape, _axes(shape, is_fortran))
        data = _read_whole(path, max_bytes)
        return _array(data[start:], shape, dtype, _axes(shape, is_fortran))
    except _RefusedError as error:
        raise UnsafePickleError(f"{path}: refused: {error}. {_REPAIR}") from None
    except UnsafePickleError:
        raise
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UnsafePickleError(f"{path}: not a readable .npy file ({_first_line(error)}). {_REPAIR}") from None


def describe_pickle(path: StrPath) -> list[str]:
    """The names a pickle or object .npy would import, sorted, without loading it; of a huge file, of its first part.

    Names come from the file and are escaped and cut, so that they are safe to print.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_PICKLE_BYTES)
    start = 0
    if data.startswith(b"\x93NUMPY"):
        try:
            start = _parse_npy_header(data[: 12 + _MAX_NPY_HEADER_BYTES])[0]
        except (_RefusedError, ValueError, SyntaxError, MemoryError, RecursionError):
            return []
    return _describe(data, start)


def _read_whole(path: StrPath, max_bytes: int) -> bytes:
    size = os.stat(path).st_size
    if size > max_bytes:
        raise UnsafePickleError(f"{path}: refused: {size} bytes are more than the limit of {max_bytes}. {_REPAIR}")
    with open(path, "rb") as file:
        return file.read()


def _load(path: StrPath, data: bytes, start: int) -> Any:
    reason = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged escapes in old string opcodes only warn
        try:
            value = _run(data, start)
            _check_data(value)
            return value
        except _RefusedError as error:
            reason = f"refused: {error}"
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
            reason = f"not a readable pickle ({type(error).__name__}: {_first_line(error)})"
        names = _describe(data, start)
    listed = f" Names in it: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}." if names else ""
    raise UnsafePickleError(f"{path}: {reason}.{listed} {_REPAIR}")


def _describe(data: bytes, start: int) -> list[str]:
    """Names in the pickle from `start` on, followed through the memo, until its end or its first fault."""
    names, recent, memo = set(), ["?", "?"], dict[Any, str]()
    stream = io.BytesIO(data)
    stream.seek(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for op, arg, _ in itertools.islice(pickletools.genops(stream), _MAX_DESCRIBED_OPCODES):
                if op.name in ("GLOBAL", "INST"):
                    names.add(_printable(str(arg).replace(" ", ".", 1)))
                elif op.name == "STACK_GLOBAL":
                    names.add(_printable(".".join(recent)))
                elif op.name == "MEMOIZE":
                    memo[len(memo)] = recent[1]
                elif "PUT" in op.name:
                    memo[arg] = recent[1]
                elif "GET" in op.name:
                    recent = [recent[1], memo.get(arg, "?")]
                elif isinstance(arg, str):
                    recent = [recent[1], arg]
        except (ValueError, IndexError, KeyError, OverflowError, struct.error):
            pass
    return sorted(names)


def _printable(name: str) -> str:
    return name[:100].encode("unicode_escape").decode("ascii")


# Opcodes whose argument is the value they push.
_PUSHES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)


def _run(data: bytes, start: int) -> Any:
    """The value of the pickle that begins at `start` and ends with the data, stand-ins not yet looked for."""
    stream = io.BytesIO(data)
    stream.seek(start)
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each MARK
    memo: dict[int, Any] = {}
    budget = _MAX_UNPACKING * len(data) + (1 << 16)
    events: Iterator[Any] = pickletools.genops(stream)
    for op, arg, position in events:
        name = op.name
        if name in _PUSHES:
            stack.append(arg)
            continue
        match name:
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                if not 0 <= arg <= 2 * len(memo) + _MAX_MEMO_SLACK:
                    _refuse(f"memo index {arg} at byte {position} is out of proportion")
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(_settled(memo[arg]))
            case "MARK":
                marks.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(set())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop(stack, int(name[-1]))))
            case "APPEND":
                (item,) = _pop(stack, 1)
                _top(stack, list).append(item)
            case "SETITEM":
                pair = _pop(stack, 2)
                _fill(_top(stack, dict), pair)
            case "APPENDS" | "SETITEMS" | "ADDITEMS" | "TUPLE" | "LIST" | "DICT" | "FROZENSET" | "POP_MARK":
                items, stack = stack, marks.pop()
                if name == "APPENDS":
                    _top(stack, list).extend(items)
                elif name == "SETITEMS":
                    _fill(_top(stack, dict), items)
                elif name == "ADDITEMS":
                    _check_keys(items)
                    _top(stack, set).update(items)
                elif name == "TUPLE":
                    stack.append(tuple(items))
                elif name == "LIST":
                    stack.append(items)
                elif name == "DICT":
                    stack.append(_fill({}, items))
                elif name == "FROZENSET":
                    stack.append(_make_frozenset((items,)))
            case "GLOBAL":
                stack.append(_look_up(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_look_up(*_pop(stack, 2)))
            case "REDUCE":
                function, arguments = _pop(stack, 2)
                budget -= _cost(arguments)
                stack.append(_call(function, arguments, budget))
            case "BUILD":
                target, state = _pop(stack, 2)
                budget -= _cost(state)
                stack.append(_build(target, state, budget))
            case "POP":
                _pop(stack, 1)
            case "PROTO":
                if arg > 5:
                    _refuse(f"pickle protocol {arg} is unknown")
            case "FRAME":
                pass
            case "STOP":
                if len(stack) != 1 or marks:
                    _refuse("it ends with values left over")
                if position + 1 != len(data):
                    _refuse(f"{len(data) - position - 1} bytes follow its end")
            case _:
                _refuse(f"opcode {name} at byte {position} is nothing plain data needs")
    return _settled(stack[-1])


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("an opcode finds too few values")
    items = stack[-count:]
    del stack[-count:]
    return items


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        _refuse(f"items are added to something that is no {kind.__name__}")
    return stack[-1]


def _settled(value: Any) -> Any:
    """The array itself where the memo remembers the stand-in that came before it."""
    if type(value) is _Array:
        if not value.is_built:
            _refuse("an array is used before it has contents")
        return value.value
    return value


def _fill(target: dict[Any, Any], items: Sequence[Any]) -> dict[Any, Any]:
    """The dictionary, with the alternating keys and values added in place."""
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values):
        _refuse("a dictionary key has no value")
    _check_keys(keys)
    target.update(zip(keys, values, strict=True))
    return target


def _check_keys(keys: Sequence[Any]) -> None:
    """Refuse, before they are hashed, keys that are no plain values or whose hash would recurse deeply or take long."""
    if set(map(type, keys)) <= _KEY_TYPES:
        return
    for key in keys:
        level, nodes = [key], 1
        for _ in range(_MAX_KEY_DEPTH):
            nested = [node for node in level if type(node) in (tuple, frozenset)]
            if any(type(node) not in _KEY_TYPES for node in level if type(node) not in (tuple, frozenset)):
                _refuse("a dictionary key or set element is no number, string or tuple of them")
            nodes += sum(map(len, nested))
            if nodes > _MAX_KEY_NODES:
                _refuse(f"a dictionary key or set element has more than {_MAX_KEY_NODES} parts")
            level = [child for node in nested for child in node]
            if not level:
                break
        else:
            _refuse(f"a dictionary key or set element is nested deeper than {_MAX_KEY_DEPTH}")


def _look_up(module: Any, name: Any = "") -> _StandIn:
    if type(module) is not str or type(name) is not str:
        _refuse("a name is no string")
    found = _TABLE.get((module, name))
    if found is None:
        _refuse(f"the file wants {_printable(f'{module}.{name}')}, which is code and not data")
    return found


def _cost(arguments: Any) -> int:
    """How much a call with these arguments may copy."""
    if type(arguments) is not tuple:
        return 0
    return sum(len(value) for value in arguments if type(value) in (str, bytes, bytearray, list))


def _call(function: Any, arguments: Any, budget: int) -> Any:
    if type(arguments) is not tuple:
        _refuse("it makes a call whose arguments are no tuple")
    if type(function) is not _StandIn or function.make is None:
        _refuse(f"it calls {function.name if type(function) is _StandIn else 'a value'}, which is no function here")
    _check_budget(budget)
    return function.make(arguments)


def _build(target: Any, state: Any, budget: int) -> Any:
    _check_budget(budget)
    if type(target) is _DType:
        return _build_dtype(target, state)
    if type(target) is _Array:
        return _build_array(target, state)
    _refuse("it sets the inner state of something that is no array")


def _check_budget(budget: int) -> None:
    if budget < 0:
        _refuse("it would unpack to many times its size")


def _check_data(root: Any) -> None:
    """Refuse a result that holds a stand-in, contains itself, or nests deeper than any data does."""
    height: dict[int, int] = {}  # of containers that have been left
    entered: set[int] = set()
    todo: list[tuple[Any, list[Any] | None]] = [([root], None)]
    while todo:
        node, children = todo.pop()
        if children is not None:
            height[id(node)] = 1 + max((height[id(child)] for child in children), default=0)
            if height[id(node)] > _MAX_DEPTH + 1:
                _refuse(f"its data is nested deeper than {_MAX_DEPTH} levels")
            continue
        if id(node) in height:
            continue
        if id(node) in entered:
            _refuse("its data contains itself")
        entered.add(id(node))
        items = node.values() if type(node) is dict else node
        types = set(map(type, items)) - _LEAF_TYPES
        if types - _NESTING_TYPES:
            _refuse("it holds a type or a function where data should be")
        children = [child for child in items if type(child) in _NESTING_TYPES] if types else []
        todo.append((node, children))
        todo.extend((child, None) for child in children)


# Arrays


def _parse_dtype(text: Any) -> _DType:
    """The dtype of a NumPy code such as "<i8" or "U5"; refuses structures, dates, complex and long double numbers."""
    if type(text) is not str or len(text) > 12:
        _refuse("it holds a structured array")
    order, code = (text[0], text[1:]) if text[:1] in "<>|=" and text else ("=", text)
    if code in ("O", "O4", "O8"):
        return _DType("O", order)
    if code in _NUMERIC or re.fullmatch(r"[SU][1-9]\d{0,4}", code):
        return _DType(code, order)
    _refuse(f"array type {_printable(text)} is not supported; supported are {' '.join(_NUMERIC)}, S, U and objects")


def _build_dtype(dtype: _DType, state: Any) -> _DType:
    """The same dtype, given in place the byte order of the pickled state; the rest of that state must be ordinary."""
    if type(state) is not tuple or len(state) != 8 or dtype.is_built:
        _refuse("an array type has a state of the wrong form")
    version, order, subtype, names, fields, width, alignment, flags = state
    if subtype is not None or names is not None or fields is not None:
        _refuse("it holds a structured array")
    if any(type(number) is not int for number in (version, width, alignment, flags)) or version != 3:
        _refuse("an array type has a state of the wrong form")
    if type(order) is not str or order not in ("<", ">", "|", "="):
        _refuse("an array type has no byte order")
    if dtype.code != "O" and width not in (-1, dtype.width):
        _refuse(f"an array type claims {width} bytes for {dtype.code}")
    dtype.order, dtype.is_built = order, True
    return dtype


def _check_shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > 64 or not all(type(size) is int and size >= 0 for size in shape):
        _refuse("an array has an impossible shape")
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        _refuse("an array has an impossible size")
    return shape


def _check_array_bytes(shape: tuple[int, ...], dtype: _DType, num_bytes: int) -> None:
    expected = math.prod(shape) * dtype.width
    if num_bytes != expected:
        _refuse(f"an array of shape {shape} and type {dtype.code} needs {expected} bytes and has {num_bytes}")


def _axes(shape: tuple[int, ...], is_fortran: bool) -> tuple[int, ...] | None:
    return tuple(reversed(range(len(shape)))) if is_fortran else None


def _arrange(flat: Tensor, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> Tensor:
    """The flat values as an array of this shape whose axes lie in memory in the order that `axes` inverts."""
    if axes is None:
        return flat.reshape(shape)
    stored = [0] * len(shape)
    for axis, position in enumerate(axes):
        stored[position] = shape[axis]
    return flat.reshape(stored).permute(axes)


def _typed(raw: Tensor, dtype: _DType) -> Tensor:
    """Flat bytes as flat numbers, swapped where the file has the other byte order."""
    if dtype.code == "b1":
        return raw != 0  # a byte other than 0 and 1 is no valid bool
    if dtype.width > 1 and dtype.order == (">" if sys.byteorder == "little" else "<"):
        raw = raw.reshape(-1, dtype.width).flip(1).reshape(-1)
    return raw.view(_NUMERIC[dtype.code])


def _array(data: bytes | bytearray, shape: tuple[int, ...], dtype: _DType, axes: tuple[int, ...] | None) -> Any:
    """A tensor of numbers or nested lists of strings from the bytes of an array."""
    _check_array_bytes(shape, dtype, len(data))
    if dtype.code in _NUMERIC:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return _arrange(_typed(raw, dtype), shape, axes)
    cells = [bytes(data[i : i + dtype.width]) for i in range(0, len(data), dtype.width)]
    items: list[Any] = [cell.rstrip(b"\0") for cell in cells]
    if dtype.code[0] == "U":
        is_big = dtype.order == ">" or (dtype.order != "<" and sys.byteorder == "big")
        items = [cell.decode("utf-32-be" if is_big else "utf-32-le").rstrip("\0") for cell in cells]
    if axes is not None:
        items = [items[i] for i in _arrange(torch.arange(len(items)), shape, axes).flatten().tolist()]
    return _nest(items, shape)


def _nest(items: list[Any], shape: tuple[int, ...]) -> Any:
    """The items, in C order, as lists in lists of this shape; the one item itself for an array without axes."""
    if not shape:
        return items[0]
    if len(shape) > _MAX_LIST_AXES:
        _refuse(f"an array of strings or objects has more than {_MAX_LIST_AXES} axes")
    if 0 in shape:
        shape = shape[: shape.index(0)]
        if math.prod(shape) > _MAX_EMPTY_LISTS:
            _refuse("an empty array has an impossible shape")
        items = [[] for _ in range(math.prod(shape))]
        if not shape:
            return []
    for size in reversed(shape[1:]):
        items = [items[i : i + size] for i in range(0, len(items), size)]
    return items


def _check_nesting(value: Any, shape: tuple[int, ...]) -> None:
    """Refuse an object array whose nested lists are not of the shape that the header of its .npy file gives."""
    level = [value]
    for size in shape:
        if any(type(items) is not list or len(items) != size for items in level):
            _refuse("its header and its contents disagree about the shape")
        level = [item for items in level for item in items]


def _build_array(array: _Array, state: Any) -> Any:
    if type(state) is not tuple or len(state) != 5 or array.is_built:
        _refuse("an array has a state of the wrong form")
    version, shape, dtype, is_fortran, data = state
    shape = _check_shape(shape)
    if version != 1 or type(dtype) is not _DType or type(is_fortran) not in (bool, int):
        _refuse("an array has a state of the wrong form")
    if type(data) is str:  # Python 2
        data = data.encode("latin-1")
    if dtype.code == "O":
        if type(data) is not list or len(data) != math.prod(shape):
            _refuse("an object array does not fill its shape")
        value = _nest(list(data), shape)  # NumPy pickles objects in C order whatever the array's own order
    else:
        if type(data) not in (bytes, bytearray):
            _refuse("an array has a state of the wrong form")
        value = _array(data, shape, dtype, _axes(shape, bool(is_fortran)))
    array.value, array.is_built = value, True
    return value


def _map_bytes(path: StrPath, start: int, size: int, width: int) -> Tensor:
    """The file's bytes from `start` on as a private memory map, or as a copy where they are not aligned to `width`."""
    if size == start:
        return torch.empty(0, dtype=torch.uint8)
    mapped = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)[start:]
    return mapped if start % width == 0 else mapped.clone()


def _parse_npy_header(head: bytes) -> tuple[int, _DType, bool, tuple[int, ...]]:
    """Where the data begins, and its type, order and shape, from the first bytes of a .npy file."""
    if head[:6] != b"\x93NUMPY":
        _refuse("it is no .npy file")
    version = tuple(head[6:8])
    if version == (1, 0):
        start, length = 10, int.from_bytes(head[8:10], "little")
    elif version in ((2, 0), (3, 0)):
        start, length = 12, int.from_bytes(head[8:12], "little")
    else:
        _refuse(f"its .npy version {'.'.join(map(str, version))} is unknown")
    if length > _MAX_NPY_HEADER_BYTES:
        _refuse(f"its header of {length} bytes is longer than any simple array needs")
    if len(head) < start + length:
        _refuse("it ends inside its header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = ast.literal_eval(
            head[start : start + length].decode("utf-8" if version == (3, 0) else "latin-1").strip()
        )
    if type(header) is not dict or set(header) != {"descr", "fortran_order", "shape"}:
        _refuse("its header is not that of an array")
    if type(header["fortran_order"]) is not bool:
        _refuse("its header does not say the order of the axes")
    return start + length, _parse_dtype(header["descr"]), header["fortran_order"], _check_shape(header["shape"])


# What allowed names make. Each checks its arguments itself: they come from the file.


def _make_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty dict, or that of a list of pairs (OrderedDict as Python 2 wrote it)."""
    if not arguments:
        return {}
    pairs = arguments[0]
    if len(arguments) > 1 or type(pairs) is not list or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs):
        _refuse("OrderedDict has arguments that are no pairs")
    return _fill({}, [part for pair in pairs for part in pair])


def _make_defaultdict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty dict; what the file would make for missing keys is dropped."""
    if len(arguments) > 1 or not all(value is None or type(value) is _StandIn for value in arguments):
        _refuse("defaultdict has arguments of the wrong form")
    return {}


def _elements(arguments: tuple[Any, ...]) -> list[Any]:
    if not arguments:
        return []
    if len(arguments) > 1 or type(arguments[0]) is not list:
        _refuse("a set is not made from a list")
    _check_keys(arguments[0])
    return list(arguments[0])


def _make_set(arguments: tuple[Any, ...]) -> set[Any]:
    return set(_elements(arguments))


def _make_frozenset(arguments: tuple[Any, ...]) -> frozenset[Any]:
    return frozenset(_elements(arguments))


def _make_bytes(arguments: tuple[Any, ...]) -> bytes:
    """Bytes as Python 3 writes them in protocols that have none: nothing, or text that stands for Latin-1."""
    if not arguments:
        return b""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1"):
        _refuse("bytes are not made from Latin-1 text")
    return arguments[0].encode("latin-1")


def _make_bytearray(arguments: tuple[Any, ...]) -> bytearray:
    if len(arguments) == 1 and type(arguments[0]) is bytes:
        return bytearray(arguments[0])
    return bytearray(_make_bytes(arguments))


def _make_dtype(arguments: tuple[Any, ...]) -> _DType:
    if not 1 <= len(arguments) <= 3 or any(type(flag) not in (bool, int) for flag in arguments[1:]):
        _refuse("an array type is not made from a code")
    return _parse_dtype(arguments[0])


def _make_array(arguments: tuple[Any, ...]) -> _Array:
    if len(arguments) != 3 or arguments[0] is not _NDARRAY:
        _refuse("an array of another class than numpy.ndarray")
    return _Array()


def _make_scalar(arguments: tuple[Any, ...]) -> Any:
    """A NumPy scalar as a Python number or string."""
    if len(arguments) != 2 or type(arguments[0]) is not _DType or arguments[0].code == "O":
        _refuse("a NumPy scalar has arguments of the wrong form")
    dtype, data = arguments
    if type(data) is str:  # Python 2
        data = data.encode("latin-1")
    if type(data) is not bytes:
        _refuse("a NumPy scalar has arguments of the wrong form")
    value = _array(data, (), dtype, None)
    return value.item() if type(value) is Tensor else value


def _make_array_from_buffer(arguments: tuple[Any, ...]) -> Any:
    """An array as protocol 5 writes it; order "K" comes with the places of the stored axes."""
    if len(arguments) not in (4, 5) or type(arguments[0]) not in (bytes, bytearray) or type(arguments[1]) is not _DType:
        _refuse("an array has arguments of the wrong form")
    data, dtype, shape, order = arguments[:4]
    axes = arguments[4] if len(arguments) == 5 else None
    shape = _check_shape(shape)
    if dtype.code == "O":
        _refuse("an object array is made from bytes")
    if (
        order == "K"
        and type(axes) is tuple
        and all(type(i) is int for i in axes)
        and sorted(axes) == list(range(len(shape)))
    ):
        return _array(data, tuple(shape[i] for i in axes), dtype, axes)
    if type(order) is not str or order not in ("C", "F") or axes is not None:
        _refuse("an array has its axes in no known order")
    return _array(data, shape, dtype, _axes(shape, order == "F"))


def _table() -> dict[tuple[str, str], _StandIn]:
    rows: list[tuple[str, str, Callable[[tuple[Any, ...]], Any] | None]] = [
        ("collections", "OrderedDict", _make_dict),
        ("collections", "defaultdict", _make_defaultdict),
        ("_codecs", "encode", _make_bytes),
        ("numpy", "dtype", _make_dtype),
        ("numpy", "ndarray", None),
    ]
    for module in ("builtins", "__builtin__"):
        rows += [(module, "set", _make_set), (module, "frozenset", _make_frozenset)]
        rows += [(module, "bytes", _make_bytes), (module, "bytearray", _make_bytearray)]
        rows += [(module, name, None) for name in ("int", "float", "str", "bool", "list", "dict", "tuple")]
    rows += [("__builtin__", name, None) for name in ("long", "unicode")]  # int and str, as protocols 0 to 2 call them
    for package in ("numpy.core", "numpy._core"):
        rows += [
            (f"{package}.multiarray", "_reconstruct", _make_array),
            (f"{package}.multiarray", "scalar", _make_scalar),
        ]
        rows += [(f"{package}.numeric", "_frombuffer", _make_array_from_buffer)]
    return {(module, name): _StandIn(f"{module}.{name}", make) for module, name, make in rows}


_TABLE = _table()
_NDARRAY = _TABLE["numpy", "ndarray"]
