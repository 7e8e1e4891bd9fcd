"""Generated interactions whose items' content tells who will like them, in the original's own folder layout.

Legend: U users, I items, W warm items, C cold items, K hidden factors, F features, P training pairs, R rows, N numbers.

Items have hidden factors and users have tastes for them. What a user meets is drawn by taste and, among warm items, by
popularity too; cold items are all alike in that, for nobody has met them yet. Each modality is a noisy view of its own
part of the factors, so that each helps and none is enough.

The files are such as NumPy writes, made without it: a header and the raw numbers, or a header and the pickle of an
array of Python objects, whose few opcodes stand at the end of this file.
"""

import pickle  # the names of its opcodes alone
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from apps.clcrec.dataset import GROUPS, ColdStart, group_part, lists_of
from shared.files import atomic_write_bytes, tensor_crc32
from shared.ranking import Lists
from shared.seed import make_generator

_FACTORS = 12
_VIEWS = {"v": (slice(0, 5), 32), "a": (slice(5, 8), 16), "t": (slice(8, 12), 24)}  # factors seen, features made
_FEATURE_NOISE = 0.7  # beside a signal of spread 1
_FEATURE_STEP = 2.0**-10
_TASTE = 3.0  # spread of what taste adds to the logarithm of a chance; pure chance has 1.3
_ZIPF = 0.7  # popularity of warm items falls with rank to this power
_MEAN_LOG_MET, _LOG_MET_SPREAD = 3.3, 0.5  # how many items a user meets
_MIN_MET, _MAX_MET = 10, 150
_HELD_OUT_SHARE = 0.1  # of a user's warm items, for validation and again for the test


def demo_data(*, num_users: int = 1500, num_warm: int = 600, num_cold: int = 150, seed: int = 7) -> ColdStart:
    """What made-up users met of warm and cold items, with the items' content; a pure function of its arguments."""
    num_items = num_warm + num_cold
    if num_users < 1 or num_warm < 1 or num_cold < 1 or num_items < 2 * _MIN_MET:
        raise ValueError(
            f"demo data of {num_users} users, {num_warm} warm and {num_cold} cold items is too small; take at least 1 "
            f"of each, and {2 * _MIN_MET} items"
        )
    generator = make_generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    factor_IK, taste_UK = normal(num_items, _FACTORS), normal(num_users, _FACTORS)
    popularity_W = torch.randperm(num_warm, generator=generator).double().add(1).pow(-_ZIPF)
    popularity_I = torch.cat([popularity_W, popularity_W.mean().expand(num_cold)])
    # the largest sums with Gumbel noise are draws without replacement, in proportion to the exponential of the rest
    gumbel_UI = -torch.log(-torch.log(uniform(num_users, num_items)))
    wish_UI = _TASTE * taste_UK @ factor_IK.T / _FACTORS**0.5 + popularity_I.log() + gumbel_UI
    num_met_U = (_MEAN_LOG_MET + _LOG_MET_SPREAD * normal(num_users)).exp().long()
    num_met_U = num_met_U.clamp(_MIN_MET, min(_MAX_MET, num_items // 2))
    met_UI = _places(wish_UI) < num_met_U[:, None]
    met_UI.scatter_(1, wish_UI[:, :num_warm].argmax(1, keepdim=True), True)  # everybody has something to train on

    # a user's warm items in random order: some for validation, as many for the test, the rest to train on
    warm_UW, cold_UC = met_UI[:, :num_warm], met_UI[:, num_warm:]
    place_UW = _places(uniform(num_users, num_warm).masked_fill(~warm_UW, -1.0))
    num_held_out_U1 = (_HELD_OUT_SHARE * warm_UW.sum(1, keepdim=True)).round()
    # the cold ones by turns, and a coin says which is first
    place_UC = _places(uniform(num_users, num_cold).masked_fill(~cold_UC, -1.0))
    is_first_UC = (place_UC + (uniform(num_users, 1) < 0.5)) % 2 == 0
    valid_UI = met_UI & torch.cat([place_UW < num_held_out_U1, is_first_UC], dim=1)
    test_UI = met_UI & ~valid_UI & torch.cat([place_UW < 2 * num_held_out_U1, ~is_first_UC], dim=1)

    pair_P2 = (met_UI & ~valid_UI & ~test_UI).nonzero()
    pair_P2 = pair_P2[torch.randperm(len(pair_P2), generator=generator)]
    user, item = pair_P2.to(torch.int32).t().contiguous()
    content = {}
    for modality, (part, width) in _VIEWS.items():
        seen_IK = factor_IK[:, part]
        signal_IF = seen_IK @ normal(seen_IK.shape[1], width) / seen_IK.shape[1] ** 0.5
        feature_IF = signal_IF + _FEATURE_NOISE * normal(num_items, width)
        # in steps, lest the last bit of another machine's arithmetic make other data
        content[modality] = ((feature_IF / _FEATURE_STEP).round() * _FEATURE_STEP).float()
    known, valid, test = map(_lists, (met_UI, valid_UI, test_UI))
    drawn = (user, item, valid.ptr, valid.item, test.ptr, test.item, *content.values())
    return ColdStart(
        num_warm=num_warm,
        user=user,
        item=item,
        known=known,
        valid=valid,
        test=test,
        content=content,
        words=None,
        item_ids=tuple(str(num_users + i) for i in range(num_items)),
        user_ids=tuple(str(u) for u in range(num_users)),
        fingerprint="demo-" + "".join(f"{tensor_crc32(tensor):08x}" for tensor in drawn),
        name="demo data",
    )


def _places(value_RN: Tensor) -> Tensor:
    """The place of every value among those of its row, 0 for the largest."""
    order_RN = value_RN.argsort(dim=1, descending=True)
    return torch.empty_like(order_RN).scatter_(1, order_RN, torch.arange(value_RN.shape[1]).expand_as(order_RN))


def _lists(met_UI: Tensor) -> Lists:
    user, item = met_UI.nonzero().unbind(1)
    return lists_of(user, item, len(met_UI))


def write_demo(folder: Path) -> Path:
    """The folder, with the demo data in it as the original's files; those that are there and equal are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in _files(demo_data()).items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            atomic_write_bytes(path, content)
    return folder


# The original's files


def _files(data: ColdStart) -> dict[str, bytes]:
    """The contents of every file by name; item i is called U + i in them, as the original counts."""
    first, after_warm, end = data.num_users, data.num_users + data.num_warm, data.num_users + data.num_items
    files = {
        "train.npy": _numbers(torch.stack([data.user.long(), data.item.long() + first], dim=1)),
        "user_item_train_dict.npy": _objects((), [_sets(data.trained, first)]),
        "user_item_all_dict.npy": _objects((), [_sets(data.known, first)]),
        "warm_set.npy": _numbers(torch.arange(first, after_warm)),
        "cold_set.npy": _numbers(torch.arange(after_warm, end)),
    }
    for stage, lists in (("val", data.valid), ("test", data.test)):
        for group in GROUPS:
            part = _items(group_part(lists, group, data.num_warm), first)
            rows = [[user, *items] for user, items in enumerate(part)]
            files[f"{stage}_{'full' if group == 'all' else group}.npy"] = _objects((len(rows),), rows)
    return files | {f"feat_{modality}.npy": _numbers(feature) for modality, feature in data.content.items()}


def _items(lists: Lists, first: int) -> list[list[int]]:
    return [part.tolist() for part in torch.split(lists.item.long() + first, lists.ptr.diff().tolist())]


def _sets(lists: Lists, first: int) -> dict[int, set[int]]:
    return {user: set(items) for user, items in enumerate(_items(lists, first))}


def _header(descr: str, shape: Sequence[int]) -> bytes:
    """What stands before the data of a .npy file, version 1.0: it ends at a multiple of 64 bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"  # 10 bytes before the text, and the line's end
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("ascii")


def _numbers(tensor: Tensor) -> bytes:
    """The .npy file of an int64 or float32 tensor."""
    descr, code = {torch.int64: ("<i8", "q"), torch.float32: ("<f4", "f")}[tensor.dtype]
    return _header(descr, tensor.shape) + struct.pack(f"<{tensor.numel()}{code}", *tensor.flatten().tolist())


def _objects(shape: tuple[int, ...], items: Sequence[object]) -> bytes:
    """The .npy file of an array of Python objects, with the names of NumPy 1, which NumPy 2 reads too."""
    kind = _name("numpy", "dtype") + _pushes(("O8", False, True)) + pickle.REDUCE
    kind += _pushes((3, "|", None, None, None, -1, -1, 63)) + pickle.BUILD
    array = _name("numpy.core.multiarray", "_reconstruct")
    array += _tuple(_name("numpy", "ndarray"), _pushes((0,)), _pushes(b"b")) + pickle.REDUCE
    array += _tuple(_pushes(1), _pushes(shape), kind, _pushes(False), _pushes(list(items))) + pickle.BUILD
    return _header("|O", shape) + pickle.PROTO + b"\x04" + array + pickle.STOP


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _tuple(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _pushes(value: object) -> bytes:
    """The opcodes of pickle protocol 4 that make a plain value; nothing is shared in it, so there is no memo."""
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return pickle.SHORT_BINBYTES + struct.pack("B", len(value)) + value
        case tuple():
            return _tuple(*map(_pushes, value))
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(_pushes, value)) + pickle.APPENDS
        case set():
            return pickle.EMPTY_SET + pickle.MARK + b"".join(map(_pushes, sorted(value))) + pickle.ADDITEMS
        case dict():
            pairs = b"".join(_pushes(key) + _pushes(item) for key, item in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS
    raise TypeError(f"no opcodes for {type(value).__name__}")
