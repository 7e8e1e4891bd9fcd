"""Frozen tensors of interactions and content, and batches made from them by index arithmetic.

Legend: U users, I items, W warm items, P training pairs, B pairs of a batch, N negatives, M = 1 + N, F features.

Items are numbered 0..I-1 with the warm ones first: an item is warm (it has training pairs, or could have) when its
number is below `num_warm`, and cold otherwise. Cold items are known by their content alone.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.clcrec_folder import MODALITIES as MODALITIES
from shared.clcrec_folder import WordLists
from shared.ranking import Lists
from shared.seed import make_generator

ORDER_STREAM = 1  # streams keep the draws of one (seed, epoch, step) apart

Stage = Literal["valid", "test"]
STAGES: tuple[Stage, ...] = ("valid", "test")
Group = Literal["all", "warm", "cold"]
GROUPS: tuple[Group, ...] = ("all", "warm", "cold")
Words = WordLists  # by another name, as WordLists of model.py are those words in another form


@dataclass(frozen=True)
class ColdStart:
    """Interactions and content of warm and cold items; nothing in it changes after construction."""

    num_warm: int
    user: Tensor  # [P] int32, users of the training pairs, in the source's order
    item: Tensor  # [P] int32, their items, all warm
    known: Lists  # per user, every positive of training, validation and test, rising: [U + 1] int64, [K] int32
    valid: Lists  # per user, positives held out for validation, rising: [U + 1] int64, int32
    test: Lists  # the same for the test
    content: dict[str, Tensor]  # modality -> [I, F] float32 as the source has it; "t" may be in `words` instead
    words: Words | None
    item_ids: tuple[str, ...]  # raw id of item i at [i]
    user_ids: tuple[str, ...]  # raw id of user u at [u]
    fingerprint: str  # of the source's content
    name: str  # what to call this data in messages

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_pairs(self) -> int:
        return self.user.numel()

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those with content, in the order v, a, t."""
        return tuple(m for m in MODALITIES if m in self.content or (m == "t" and self.words is not None))

    @cached_property
    def trained(self) -> Lists:
        """Each user's training positives, rising."""
        return lists_of(self.user, self.item, self.num_users)

    @cached_property
    def item_digest(self) -> str:
        """Which users and items there are and how they are numbered, 32 hex digits: weights fit no other numbering."""
        text = "\n".join((*self.user_ids, f"--{self.num_warm}", *self.item_ids))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Batch(NamedTuple):
    """Training pairs with their negatives, on the training device."""

    user: Tensor  # [B] int64
    item: Tensor  # [B, M] int64, column 0 the positive, the rest its own negatives (none with shared ones)
    content_times: Tensor  # [B, M] uint8, how often the position was drawn to be replaced by content; 0: it is not
    shared: Tensor | None  # [K] int64, negatives that all pairs of the step are compared with
    shared_times: Tensor | None  # [K] uint8, as content_times
    excluded: Tensor | None  # [B, K] bool, shared negatives that are positives of the pair's user


def lists_of(user: Tensor, item: Tensor, num_users: int) -> Lists:
    """The distinct items of every user in rising order, as CSR over all users, from pairs in any order."""
    width = int(item.max()) + 1 if item.numel() else 1
    key = torch.unique(user.long() * width + item.long())
    ptr = torch.zeros(num_users + 1, dtype=torch.int64)
    ptr[1:] = torch.cumsum(torch.bincount(key // width, minlength=num_users), 0)
    return Lists(ptr, (key % width).to(torch.int32))


def group_part(lists: Lists, group: Group, num_warm: int) -> Lists:
    """The warm or the cold items of every list, or all of them."""
    if group == "all":
        return lists
    keep = (lists.item < num_warm) == (group == "warm")
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return Lists(before[lists.ptr], lists.item[keep])


def epoch_order(num_pairs: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the pairs, [P] int64: a function of (seed, epoch) alone."""
    return torch.randperm(num_pairs, generator=make_generator(seed, epoch=epoch, stream=ORDER_STREAM))


def chosen_modalities(data: ColdStart, *, has_v: bool, has_a: bool, has_t: bool) -> tuple[str, ...]:
    """The modalities asked for, or all that the data has when none is; asking for one it lacks is an error."""
    asked = tuple(m for m, wanted in zip(MODALITIES, (has_v, has_a, has_t), strict=True) if wanted)
    missing = [m for m in asked if m not in data.modalities]
    if missing:
        raise ValueError(
            f"{data.name} has no {' and no '.join(f'feat_{m}' for m in missing)}, but "
            f"{' '.join(f'--has-{m}' for m in missing)} asks for it; it has "
            f"{', '.join(f'feat_{m}' for m in data.modalities) or 'no content'}: add the file, or leave the flag out"
        )
    if not data.modalities:
        raise ValueError(f"{data.name} has no content (feat_v, feat_a or feat_t): a cold item cannot be ranked without")
    return asked or data.modalities
