"""Generated interactions of few per user, between neighbours on a hidden map, so that paths tell more than pairs.

Legend: U users, I items, K most items that a user may meet.

Users and items live on a map without borders (what leaves it on one side comes back on the other). A user meets items
near by, popular ones first, and now and then one from anywhere. With so few items per user, and so few users per item,
hardly two users have two items in common, so that vectors of their own are learnt badly; but who met what was met by
those who met the same is near by too. That is what propagation over the graph finds.
"""

from pathlib import Path

import torch
from torch import Tensor

from apps.graphrec.dataset import Interactions
from shared.files import atomic_write_bytes, tensor_crc32
from shared.ranking import Lists
from shared.seed import make_generator

_REACH = 0.06  # of a user, as a share of the map's width: the standard deviation of where it meets items
_STRAY_SHARE = 0.1  # of what a user meets is from anywhere
_ZIPF = 0.4  # popularity falls with rank to this power
_MEAN_LOG_MET, _LOG_MET_SPREAD = 2.0, 0.6  # how many items a user meets
_MIN_MET, _MAX_MET = 4, 60
_VALID_SHARE, _TEST_SHARE = 0.1, 0.2  # of what a user met, at least one each


def demo_data(*, num_users: int = 3000, num_items: int = 1500, seed: int = 7) -> Interactions:
    """What made-up users met of so many items, in three parts; a pure function of its arguments."""
    if num_users < 1 or num_items < _MAX_MET:
        raise ValueError(
            f"demo data of {num_users} users and {num_items} items is too small; take at least 1 user and {_MAX_MET} "
            "items"
        )
    generator = make_generator(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    popularity_I = torch.randperm(num_items, generator=generator).double().add(1).pow(-_ZIPF)
    item_I2, user_U2 = uniform(num_items, 2), uniform(num_users, 2)
    square_UI = torch.zeros(num_users, num_items, dtype=torch.float64)
    for axis in range(2):
        apart_UI = (user_U2[:, axis, None] - item_I2[:, axis]).abs_()
        square_UI += torch.minimum(apart_UI, 1 - apart_UI).square_()
    near_UI = popularity_I * torch.exp(-square_UI / (2 * _REACH**2))
    chance_UI = (1 - _STRAY_SHARE) * near_UI / near_UI.sum(1, keepdim=True)
    chance_UI += _STRAY_SHARE * popularity_I / popularity_I.sum()
    # the largest sums with Gumbel noise are draws without replacement, in proportion to the chances
    wish_UI = chance_UI.log() - torch.log(-torch.log(uniform(num_users, num_items)))
    met_UK = wish_UI.topk(_MAX_MET).indices
    normal_U = torch.randn(num_users, dtype=torch.float64, generator=generator)
    count_U1 = (_MEAN_LOG_MET + _LOG_MET_SPREAD * normal_U).exp().long().clamp(_MIN_MET, _MAX_MET)[:, None]
    is_met_UK = torch.arange(_MAX_MET) < count_U1
    # items that nobody met do not exist, so that files of these pairs give the same data
    met, item = torch.unique(met_UK[is_met_UK], return_inverse=True)
    met_UK[is_met_UK] = item

    place_UK = uniform(num_users, _MAX_MET).masked_fill(~is_met_UK, 2.0).argsort(dim=1).argsort(dim=1)
    num_test_U1 = (_TEST_SHARE * count_U1).round().long().clamp(min=1)
    num_valid_U1 = (_VALID_SHARE * count_U1).round().long().clamp(min=1)
    is_test_UK = place_UK < num_test_U1
    is_valid_UK = ~is_test_UK & (place_UK < num_test_U1 + num_valid_U1)
    is_train_UK = is_met_UK & ~is_test_UK & ~is_valid_UK
    train, valid, test = (_lists(met_UK, part_UK) for part_UK in (is_train_UK, is_valid_UK, is_test_UK))
    drawn = (*train, *valid, *test)
    return Interactions(
        train=train,
        valid=valid,
        test=test,
        content={},
        is_cold=None,
        item_ids=tuple(map(str, range(met.numel()))),
        user_ids=tuple(map(str, range(num_users))),
        fingerprint="demo-" + "".join(f"{tensor_crc32(tensor):08x}" for tensor in drawn),
        name="demo data",
        split="the source's train.txt, valid.txt and test.txt",
    )


def _lists(met_UK: Tensor, part_UK: Tensor) -> Lists:
    """The items of one part, rising."""
    ptr = torch.zeros(len(met_UK) + 1, dtype=torch.int64)
    ptr[1:] = part_UK.sum(1).cumsum(0)
    ordered_UK = met_UK.masked_fill(~part_UK, torch.iinfo(torch.int64).max).sort(dim=1).values
    is_kept_UK = torch.arange(met_UK.shape[1]) < part_UK.sum(1, keepdim=True)
    return Lists(ptr, ordered_UK[is_kept_UK].to(torch.int32))


def write_demo(folder: Path) -> Path:
    """The folder, with the demo data in it as LightGCN's files; those that are there and equal are left alone."""
    data = demo_data()
    folder.mkdir(parents=True, exist_ok=True)
    for name, lists in (("train", data.train), ("valid", data.valid), ("test", data.test)):
        parts = torch.split(lists.item, lists.ptr.diff().tolist())
        rows = [" ".join(map(str, [user, *part.tolist()])) for user, part in enumerate(parts)]
        content = "".join(f"{row}\n" for row in rows).encode("ascii")
        path = folder / f"{name}.txt"
        if not path.is_file() or path.read_bytes() != content:
            atomic_write_bytes(path, content)
    return folder
