"""User and item embeddings and the content encoder of CLCRec (Wei et al., ACM MM 2021): tensors in, tensors out.

Legend: U users, I items, W warm items, C encoded items, F features, D embedding dim, Z words of all items.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.clcrec.config import ModelConfig
from shared.ranking import Lists, take_rows


class WordLists(NamedTuple):
    """The words of every item, as CSR over items."""

    ptr: Tensor  # [I + 1] int64
    word: Tensor  # [Z] int64, 0..num_words-1
    num_words: int


class Vectors(NamedTuple):
    """What the losses compare: a batch's users and a set of candidate items, each item twice."""

    user_BD: Tensor
    id_CD: Tensor  # the items' own embeddings
    content_CD: Tensor  # the items' encoded content


def normalised_content(parts: Sequence[Tensor]) -> Tensor:
    """The modalities ([I, F_m] float) side by side, [I, F] float32, rows of each of length 1, or zero."""
    tiny = torch.finfo(torch.float32).tiny
    # rows are divided by their largest value first, so that no square over- or underflows
    scaled = [part.float() / part.float().abs().amax(1, keepdim=True).clamp(min=tiny) for part in parts]
    return torch.cat([F.normalize(part, dim=1) for part in scaled], dim=1)


class CLCRec(nn.Module):
    """Embeddings of users and warm items, and an encoder that maps content to the same space.

    Content is a buffer that checkpoints leave out: it is data. Words come behind the numeric features (v, a, t).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_users: int,
        num_items: int,
        num_warm: int,
        content_IF: Tensor,
        words: WordLists | None = None,
    ) -> None:
        super().__init__()
        width = config.embed_dim
        # Xavier over the original's one table of users and items (its rows of cold items are never used)
        std = math.sqrt(2.0 / (num_users + num_items + width))
        self.user = nn.Parameter(torch.empty(num_users, width).normal_(std=std))
        self.item = nn.Parameter(torch.empty(num_warm, width).normal_(std=std))
        self.word = None
        word_dim = 0
        if words is not None:
            word_dim = config.word_dim
            self.word = nn.Parameter(nn.init.xavier_normal_(torch.empty(words.num_words, word_dim)))
        self.hidden = nn.Linear(content_IF.shape[1] + word_dim, config.hidden_dim)
        self.output = nn.Linear(config.hidden_dim, width)
        self.content: Tensor
        self.register_buffer("content", content_IF, persistent=False)
        self.word_ptr: Tensor | None
        self.word_of: Tensor  # only where there are words
        self.register_buffer("word_ptr", None if words is None else words.ptr, persistent=False)
        self.register_buffer("word_of", None if words is None else words.word, persistent=False)
        self.num_warm_words = 0 if words is None else int(words.ptr[num_warm])

    @property
    def num_warm(self) -> int:
        return self.item.shape[0]

    @property
    def num_items(self) -> int:
        return self.content.shape[0]

    def encode(self, content_CF: Tensor) -> Tensor:
        """Vectors of items from their normalised content (with the words' part), [C, D]."""
        hidden = F.leaky_relu(self.hidden(content_CF))
        encoded: Tensor = self.output(hidden)
        return encoded

    def encode_warm(self) -> Tensor:
        """Vectors of all warm items from their content, [W, D]."""
        content = self.content[: self.num_warm]
        if self.word_ptr is not None:
            content = self._with_words(content, self.word_of[: self.num_warm_words], self.word_ptr[: self.num_warm + 1])
        return self.encode(content)

    def encode_cold(self) -> Tensor:
        """Vectors of all cold items from their content, [I - W, D]."""
        content = self.content[self.num_warm :]
        if self.word_ptr is not None:
            ptr = self.word_ptr[self.num_warm :] - self.num_warm_words
            content = self._with_words(content, self.word_of[self.num_warm_words :], ptr)
        return self.encode(content)

    def encode_rows(self, rows_C: Tensor) -> Tensor:
        """Vectors of the items `rows_C` (int64) from their content, [C, D]."""
        content = self.content.index_select(0, rows_C)
        if self.word_ptr is not None:
            lists = take_rows(Lists(self.word_ptr, self.word_of), rows_C)
            content = self._with_words(content, lists.item, lists.ptr)
        return self.encode(content)

    def _with_words(self, content_CF: Tensor, word_Z: Tensor, ptr: Tensor) -> Tensor:
        assert self.word is not None
        mean = F.embedding_bag(word_Z, self.word, ptr, mode="mean", include_last_offset=True)
        return torch.cat([content_CF, F.normalize(mean, dim=1).to(content_CF.dtype)], dim=1)

    def forward(self, user_B: Tensor, rows_C: Tensor | None) -> Vectors:
        """The vectors of a batch's users and of the warm items `rows_C` (int64), or of all warm items where None."""
        user_BD = F.embedding(user_B, self.user)
        if rows_C is None:
            return Vectors(user_BD, self.item, self.encode_warm())
        return Vectors(user_BD, F.embedding(rows_C, self.item), self.encode_rows(rows_C))

    def all_items(self, *, cold_scale: float = 1.0) -> Tensor:
        """Final vectors of all items, [I, D] float32: embeddings of warm ones, encoded content of cold ones, scaled."""
        return torch.cat([self.item.float(), self.encode_cold().float() * cold_scale])
