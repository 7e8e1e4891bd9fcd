"""The arrangements of the original scripts, written anew from their description: what `bench` compares ours with.

Legend: U users, I items, W warm items, B pairs, N negatives, M = 1 + N, F features, D embedding dim, P training pairs.

For every pair a set difference, a random.sample of it and two tensors made from lists; one table of users and items;
the encoder over all items, their features put side by side in every step; users repeated 1 + N times, products of
gathered vectors, exp without a maximum; a step that keeps its graph; full rankings with Python loops over all users for
every block of 2,000. Items are numbered behind the users. Nothing that trains reaches this module.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from apps.clcrec import losses
from apps.clcrec.config import TrainConfig
from apps.clcrec.dataset import GROUPS, STAGES, Batch, ColdStart, Group, group_part
from apps.clcrec.evaluate import LEGACY_MASK, held_out
from apps.clcrec.model import CLCRec
from shared.amp import DTYPES, LossFn, TrainState
from shared.ranking import Lists

B = TypeVar("B")

USERS_PER_BLOCK = 2000  # of a ranking


# Data


class Plain(NamedTuple):
    """A batch as the original has it."""

    user: Tensor  # [B, M] int64, the user of the pair in every column
    item: Tensor  # [B, M] int64, the positive and its negatives, numbered behind the users
    place: Tensor  # [R] int64, drawn flat positions to replace by content, with repeats


def sets_of(lists: Lists, first: int) -> dict[int, set[int]]:
    """The items of every user as a set of numbers from `first` on."""
    ptr, item = lists.ptr.tolist(), (lists.item.long() + first).tolist()
    return {user: set(item[ptr[user] : ptr[user + 1]]) for user in range(len(ptr) - 1)}


class Integers(Protocol):
    """A sequence of integers of any kind."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class PlainPairs(Dataset[tuple[Tensor, Tensor]]):
    """A training pair with its negatives by index: its user 1 + N times, and its items, both [1 + N] int64.

    NumPy's integers, which the original has, make slower tensors than Python's.
    `exclude` are the warm items, numbered from 0, that each user's negatives must not be.
    """

    def __init__(self, user: Integers, item: Integers, exclude: Lists, *, num_warm: int, num_negatives: int) -> None:
        self.user, self.item, self.first = user, item, exclude.ptr.numel() - 1
        self.warm = set(range(self.first, self.first + num_warm))
        self.positives = sets_of(exclude, self.first)
        self.num_negatives = num_negatives

    def __len__(self) -> int:
        return len(self.user)

    def negatives(self, user: int) -> list[int]:
        """Drawn from what the set difference leaves; a list of it, since newer Pythons sample from sequences alone."""
        return random.sample(list(self.warm - self.positives[user]), self.num_negatives)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        user = self.user[index]
        items = [self.item[index] + self.first, *self.negatives(user)]
        return torch.LongTensor([user] * (1 + self.num_negatives)), torch.LongTensor(items)


class StoredPairs(Dataset[tuple[Tensor, Tensor]]):
    """The same with negatives that were drawn before training ([P, N] integers): `TrainingDatasetOptimized`."""

    def __init__(self, data: ColdStart, negative_PN: Tensor) -> None:
        self.user, self.item, self.first, self.negative = data.user, data.item, data.num_users, negative_PN

    def __len__(self) -> int:
        return self.user.numel()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        user = self.user[index].long().expand(1 + self.negative.shape[1])
        items = torch.cat([self.item[index : index + 1].long(), self.negative[index].long()])
        return user, items + self.first


def drawn_places(item_BM: Tensor, num_sample: float, generator: torch.Generator) -> Tensor:
    """Flat positions of a batch to replace, [R] int64, with repeats."""
    count = (math.floor(item_BM.numel() * num_sample),)
    return torch.randint(item_BM.numel(), count, generator=generator, device=generator.device)


def as_plain(batch: Batch, num_users: int) -> Plain:
    """Our batch in the original's form."""
    place = torch.arange(batch.item.numel(), device=batch.item.device)
    place = place.repeat_interleave(batch.content_times.flatten().long())
    return Plain(batch.user.unsqueeze(1).expand_as(batch.item).contiguous(), batch.item + num_users, place)


def as_batch(plain: Plain, num_users: int) -> Batch:
    """The original's batch in our form."""
    times = torch.bincount(plain.place, minlength=plain.item.numel()).clamp(max=255).to(torch.uint8)
    return Batch(plain.user[:, 0], plain.item - num_users, times.view_as(plain.item), None, None, None)


# Model and step


def plain_features(data: ColdStart, modalities: Sequence[str], device: torch.device) -> list[Tensor]:
    """The numeric features of each modality, rows of length 1; one without columns where there are words alone."""
    found = [F.normalize(data.content[name].float().to(device), dim=1) for name in modalities if name in data.content]
    return found or [torch.zeros(data.num_items, 0, device=device)]


class PlainModel(nn.Module):
    """One table of users and items, and the encoder of content; it starts with copies of our model's weights.

    `features` are those of each modality, [I, F_m] float32 with rows of length 1.
    """

    def __init__(self, ours: CLCRec, features: Sequence[Tensor]) -> None:
        super().__init__()
        device = ours.user.device
        self.num_users, self.num_warm, self.num_items = len(ours.user), ours.num_warm, ours.num_items
        self.features, self.prepared = features, ours.content
        cold = torch.zeros(self.num_items - self.num_warm, ours.user.shape[1], dtype=ours.user.dtype, device=device)
        self.table = nn.Parameter(torch.cat([ours.user.detach(), ours.item.detach(), cold]))
        self.word = None if ours.word is None else nn.Parameter(ours.word.detach().clone())
        self.word_ptr, self.word_of = ours.word_ptr, getattr(ours, "word_of", None)
        self.encoder = nn.Sequential(
            nn.Linear(ours.hidden.in_features, ours.hidden.out_features),
            nn.LeakyReLU(),
            nn.Linear(ours.output.in_features, ours.output.out_features),
        ).to(ours.user)
        self.encoder.load_state_dict(
            {
                f"{place}.{k}": v
                for place, part in ((0, ours.hidden), (2, ours.output))
                for k, v in part.state_dict().items()
            }
        )
        self.result = torch.empty(0)

    def encode(self, parts: Sequence[Tensor], num_items: int) -> Tensor:
        """Encoded content of the first items, [num_items, D]."""
        parts = [part[:num_items] for part in parts]
        if self.word is not None:
            assert self.word_ptr is not None
            assert self.word_of is not None
            ptr = self.word_ptr[: num_items + 1]
            words = self.word_of[: int(ptr[-1])]
            mean = F.embedding_bag(words, self.word, ptr, mode="mean", include_last_offset=True)
            parts.append(F.normalize(mean, dim=1))
        encoded: Tensor = self.encoder(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        return encoded

    def by_vectors(self, batch: Plain, *, training: TrainConfig, is_prepared: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The total loss, and its parts L1, L2 and weighted R; `is_prepared` as in `contents`."""
        columns = batch.item.shape[1]
        content = self.contents(is_prepared=is_prepared)
        user, item = batch.user.view(-1), batch.item.view(-1)
        positive = batch.item[:, :1].repeat(1, columns).view(-1)
        user_vector, positive_vector, item_vector = self.table[user], self.table[positive], self.table[item]
        content_vector = content[item - self.num_users]
        mixed = item_vector.clone()
        mixed[batch.place] = content_vector[batch.place].clone().to(mixed.dtype)  # of two types under autocast

        def contrastive(anchor: Tensor, candidate: Tensor) -> Tensor:
            score = torch.exp((anchor * candidate).sum(1) / training.temperature).view(-1, columns)
            return (-torch.log(score[:, 0] / score.sum(1))).mean()

        contrast = contrastive(F.normalize(positive_vector, dim=1), F.normalize(content_vector, dim=1))
        preference = contrastive(user_vector, mixed)
        user_norm = torch.sqrt((user_vector**2).sum(1)).mean()
        item_norm = torch.sqrt((item_vector**2).sum(1)).mean()
        penalty = training.reg_weight * (user_norm + item_norm) / 2
        if not is_prepared:
            self.result = torch.cat([self.table[: self.num_users + self.num_warm], content[self.num_warm :]])
        total = training.lr_lambda * contrast + (1 - training.lr_lambda) * preference + penalty
        return total, {"contrast": contrast, "preference": preference, "penalty": penalty}

    def contents(self, *, is_prepared: bool) -> Tensor:
        """Encoded content of all items; `is_prepared`: of the warm ones, from features put side by side beforehand."""
        return (
            self.encode([self.prepared], self.num_warm) if is_prepared else self.encode(self.features, self.num_items)
        )

    def by_lookups(
        self, batch: Batch, *, training: TrainConfig, is_prepared: bool, by_matrix: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same loss by our formulas: users looked up once, and scores gathered or by matrix products."""
        parts = losses.pair_losses(
            F.embedding(batch.user, self.table),
            self.table[self.num_users : self.num_users + self.num_warm],
            self.contents(is_prepared=is_prepared)[: self.num_warm],
            batch.item,
            batch.content_times,
            temperature=training.temperature,
            by_matrix=by_matrix,
            repeats=training.replacement == "legacy",
        )
        total = losses.total(parts, lr_lambda=training.lr_lambda, reg_weight=training.reg_weight)
        penalty = training.reg_weight * parts.norm
        return total, {"contrast": parts.contrast, "preference": parts.preference, "penalty": penalty}


def plain_step(
    state: TrainState, batch: B, loss_of: LossFn[B], *, precision: str = "fp32"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the batch and its parts after one step that keeps its graph, in place on model and optimizer."""
    optimizer, device = state.optimizers[0], state.first_bad_step.device
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        loss, parts = loss_of(state.model, batch)
    state.scaler.scale(loss).backward(None, True)  # type: ignore[no-untyped-call]  # True: what the original asks for
    state.scaler.step(optimizer)
    state.scaler.update()
    return loss, parts


# Evaluation


class PlainSplit(NamedTuple):
    """Held-out positives as the original has them: [user, item, item, ...] of every user."""

    rows: list[list[int]]
    masked: Tensor | None  # items of the other group, numbered from 0


def plain_splits(data: ColdStart) -> dict[str, PlainSplit]:
    """The six splits by name: "valid/all" and so on."""
    warm, cold = torch.arange(data.num_warm), torch.arange(data.num_warm, data.num_items)
    masked: dict[Group, Tensor | None] = {"all": None, "warm": cold, "cold": warm}
    splits = {}
    for stage in STAGES:
        for group in GROUPS:
            sets = sets_of(group_part(held_out(data, stage), group, data.num_warm), data.num_users)
            rows = [[user, *sorted(items)] for user, items in sets.items()]
            splits[f"{stage}/{group}"] = PlainSplit(rows, masked[group])
    return splits


@torch.no_grad()
def plain_metrics(
    result: Tensor, num_users: int, trained: Mapping[int, set[int]], split: PlainSplit, users: range, *, k: int
) -> tuple[float, float, float]:
    """Precision, recall and NDCG at k of a stretch of users in one split, from a full ranking of its own."""
    user_vectors, item_vectors = result[:num_users], result[num_users:]
    blocks = []
    for begin in range(users.start, users.stop, USERS_PER_BLOCK):
        end = min(begin + USERS_PER_BLOCK, users.stop)
        score = torch.matmul(user_vectors[begin:end], item_vectors.t())
        for user, seen in trained.items():
            if begin <= user < end:
                score[user - begin][torch.LongTensor(list(seen)) - num_users] = LEGACY_MASK
        if split.masked is not None:
            score[:, split.masked] = LEGACY_MASK
        blocks.append(torch.topk(score, k).indices + num_users)
    ranked = torch.cat(blocks).cpu()
    precision = recall = ndcg = 0.0
    measured = 0
    for user, *items in split.rows[users.start : users.stop]:
        if not items:
            continue
        wanted, top = set(items), ranked[user - users.start].tolist()
        hits = len(wanted & set(top))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(top) if item in wanted)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(len(wanted), k)))
        precision, recall, ndcg = precision + hits / k, recall + hits / len(wanted), ndcg + gain / ideal
        measured += 1
    count = max(1, measured)
    return precision / count, recall / count, ndcg / count


def plain_evaluation(
    result: Tensor,
    num_users: int,
    trained: Mapping[int, set[int]],
    splits: Mapping[str, PlainSplit],
    *,
    k: int,
    users: range | None = None,
) -> dict[str, float]:
    """All metrics of the six splits, as "valid/all/Recall@10", of all users or of a stretch of them."""
    users = range(num_users) if users is None else users
    return {
        f"{name}/{metric}@{k}": value
        for name, split in splits.items()
        for metric, value in zip(
            ("Precision", "Recall", "NDCG"), plain_metrics(result, num_users, trained, split, users, k=k), strict=True
        )
    }
