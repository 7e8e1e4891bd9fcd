"""Frozen tensors of interactions, and batches made from them by index arithmetic.

Legend: U users, I items, P training pairs, B pairs of a batch, K negatives, F features.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.clcrec_folder import MODALITIES as MODALITIES
from shared.ranking import Lists
from shared.seed import make_generator

ORDER_STREAM = 1  # streams keep the draws of one (seed, epoch, step) apart
SPLIT_STREAM = 2

Stage = Literal["valid", "test"]
STAGES: tuple[Stage, ...] = ("valid", "test")
Group = Literal["all", "warm", "cold"]


@dataclass(frozen=True)
class Interactions:
    """Who interacted with what, and what is held out; nothing in it changes after construction."""

    train: Lists  # per user, training items, rising: ptr [U + 1] int64, item [P] int32
    valid: Lists  # per user, items held out for validation, rising: int64, int32; empty lists where there is none
    test: Lists  # the same for the test
    content: dict[str, Tensor]  # modality -> [I, F] float32 features of the items; empty where the source has none
    is_cold: Tensor | None  # [I] bool, items that never train by design; None where the source knows no cold items
    item_ids: tuple[str, ...]  # raw id of item i at [i]
    user_ids: tuple[str, ...]  # raw id of user u at [u]
    fingerprint: str  # of the source's content (and of the cut, where the validation part was cut here)
    name: str  # what to call this data in messages
    split: str  # how it was divided, a phrase for protocol texts, e.g. "the source's train.txt and test.txt"

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_pairs(self) -> int:
        return self.train.item.numel()

    @cached_property
    def user_of_pair(self) -> Tensor:
        """[P] int64, user of every training pair."""
        return torch.repeat_interleave(torch.arange(self.num_users), self.train.ptr.diff())

    @cached_property
    def item_digest(self) -> str:
        """Which users and items there are and how they are numbered, 32 hex digits: weights fit no other numbering."""
        text = "\n".join((*self.user_ids, "--", *self.item_ids))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Batch(NamedTuple):
    """Training pairs with their negatives, on the training device."""

    user: Tensor  # [B] int64
    item: Tensor  # [B] int64, the positives
    negative: Tensor | None  # [B, K] int64, negatives of each pair's own (bpr, clcrec); None with shared ones
    shared: Tensor | None  # [K] int64, negatives that all pairs of the step are compared with
    excluded: Tensor | None  # [B, K] bool, shared negatives that are positives of the pair's user


def epoch_order(num_pairs: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the pairs, [P] int64: a function of (seed, epoch) alone."""
    return torch.randperm(num_pairs, generator=make_generator(seed, epoch=epoch, stream=ORDER_STREAM))
