"""What is known of items and users beside their ids, and the tower that makes vectors of it.

Legend: U users, I items, X rows beyond the items', F and G sparse features of items and users, M values of a list,
D embedding dim, W width of an embedding, C rows asked for, B users asked for.

A row's vector is the sum of its id's, of its features' and of its projected embeddings. A sum of vectors of width D can
say all that a concatenation of narrower ones under a linear layer can, and is one pass over one table. There is no ReLU
behind it: scores of one sign only are what lets a model of this form die (all logits 0).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """Features as integers, ready for one table; nothing in it changes after construction.

    Rows 0..I are padding and the items. Those beyond are items without an id, and events whose features differ from
    their item's. Value 0 stands for missing in every column.
    """

    item: Tensor  # [I + 1 + X, F] int32
    item_id: Tensor  # [I + 1 + X] int32, the item whose id's vector the row has part in; 0 for none
    embedding_row: Tensor  # [I + 1 + X] int32, the row of `embeddings` that is its own
    item_sizes: tuple[int, ...]  # largest value of each column
    embeddings: dict[str, Tensor]  # family -> [I + 1 or more, W] float16, zeros where an item has none
    user: Tensor  # [U, G] int32
    user_sizes: tuple[int, ...]
    user_lists: tuple[Tensor, ...]  # each [U, M] int32: features with several values, 0 behind the last one
    list_sizes: tuple[int, ...]  # largest value of each

    def __deepcopy__(self, memo: object) -> "Features":
        """Itself: a copy of a model needs no copy of what does not change."""
        return self

    def to(self, device: torch.device) -> "Features":
        """The same on `device`."""
        if self.item.device == device:
            return self
        return replace(
            self,
            item=self.item.to(device),
            item_id=self.item_id.to(device),
            embedding_row=self.embedding_row.to(device),
            embeddings={name: value.to(device) for name, value in self.embeddings.items()},
            user=self.user.to(device),
            user_lists=tuple(values.to(device) for values in self.user_lists),
        )

    def with_families(self, wanted: Sequence[str], *, name: str) -> "Features":
        """Only the embeddings of the families named, or all of them for "all"; refuses those that `name` lacks."""
        if list(wanted) == ["all"]:
            return self
        missing = [family for family in wanted if family not in self.embeddings]
        if missing:
            raise ValueError(
                f"{name} has no embeddings of family {missing[0]}; it has {', '.join(self.embeddings) or 'none'}: "
                "change --embeddings, or prepare it with --families"
            )
        return replace(self, embeddings={family: self.embeddings[family] for family in wanted})


class Tower(nn.Module):
    """Vectors of rows and of users, from one table for all sparse features and a projection per embedding family."""

    def __init__(self, features: Features, width: int) -> None:
        super().__init__()
        self.features = features
        self.item_offsets: Tensor
        self.user_offsets: Tensor
        self.list_offsets: Tensor
        sizes = (*features.item_sizes, *features.user_sizes, *features.list_sizes)
        groups = [len(features.item_sizes), len(features.user_sizes), len(features.list_sizes)]
        offsets = torch.split(torch.tensor([0, *sizes]).cumsum(0).int()[: len(sizes)], groups)
        for name, offset in zip(("item_offsets", "user_offsets", "list_offsets"), offsets, strict=True):
            self.register_buffer(name, offset, persistent=False)
        self.table = nn.Embedding(1 + sum(sizes), width, padding_idx=0)
        self.project = nn.ModuleDict(
            {name: nn.Linear(part.shape[1], width, bias=False) for name, part in features.embeddings.items()}
        )

    def rows(self, row_C: Tensor) -> Tensor:
        """What features and embeddings say of the rows ([C] int64), [C, D]."""
        known = self.features
        found = pooled(known.item.index_select(0, row_C), self.item_offsets, self.table, mode="sum")
        embedding_row_C = known.embedding_row.index_select(0, row_C)
        for name, layer in self.project.items():
            value = known.embeddings[name].index_select(0, embedding_row_C)
            found = found + layer(F.normalize(value.float(), dim=1))
        return found

    def users(self, user_B: Tensor) -> Tensor:
        """What the profiles of the users ([B] int64) say, [B, D]: a list counts as the mean of its values."""
        known = self.features
        found = pooled(known.user.index_select(0, user_B), self.user_offsets, self.table, mode="sum")
        for values, offset in zip(known.user_lists, self.list_offsets.unbind(), strict=True):
            found = found + pooled(values.index_select(0, user_B), offset, self.table, mode="mean")
        return found


def pooled(value: Tensor, offset: Tensor, table: nn.Embedding, *, mode: str) -> Tensor:
    """The sum or mean of the vectors of each row's values, [C, D]; value 0 counts for nothing."""
    if not value.shape[1]:
        return table.weight.new_zeros(value.shape[0], table.weight.shape[1])
    return F.embedding_bag(torch.where(value > 0, value + offset, 0), table.weight, mode=mode, padding_idx=0)
