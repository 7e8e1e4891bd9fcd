"""The arrangements of the original scripts, written anew from their description: what `bench` compares ours with.

Legend: U users, I items, N = U + I nodes with the users first, P training pairs, B pairs of a batch, K negatives of a
pair, M = 1 + K, F content features, D embedding dim, R flat positions.

Two of them. LightGCN's usual one: a Python loop draws a user, one of its items and a negative by rejection; the
adjacency of users and items is a coalesced COO matrix, multiplied layer by layer under autograd, and the layers are
stacked and averaged; BPR with L2 of the batch's rows; evaluation in batches of 100 users, each of which propagates the
whole graph again, with Python loops for masks and hits (its sigmoid, which turns close scores into ties, is left out).

That of the notes, CLCRec with a graph contrast: a set difference and a random.sample of it for every pair; content of
all items encoded in every step; users repeated 1 + K times, products of gathered vectors, exp without a maximum; two
views of every user from all pairs, of which the batch's are kept; a step that keeps its graph; full rankings with
Python loops over all users for every block of 2,000. Nothing that trains reaches this module.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from apps.graphrec.dataset import STAGES, Batch, Interactions
from apps.graphrec.evaluate import groups_of, held_out, kept
from apps.graphrec.model import GraphRec
from apps.graphrec.objective import Part
from shared.amp import DTYPES, LossFn, TrainState
from shared.ranking import Lists

B = TypeVar("B")

USERS_PER_BATCH = 100  # of LightGCN's evaluation
USERS_PER_BLOCK = 2000  # of the notes' rankings
LEGACY_MASK = 1e-15  # score of what is left out of the notes' rankings


# LightGCN


class Triples(NamedTuple):
    """A user, one of its items and an item it has not met, [B] int64 each."""

    user: Tensor
    positive: Tensor
    negative: Tensor


class PlainLightGCN(nn.Module):
    """Tables of users and items, propagated by a sparse COO matrix; it starts with copies of our model's weights."""

    def __init__(self, ours: GraphRec, adjacency: Tensor) -> None:
        super().__init__()
        table_ND = ours.table.detach()
        self.layers = ours.config.layers
        self.user = nn.Parameter(table_ND[: ours.num_users].clone())
        self.item = nn.Parameter(table_ND[ours.num_users :].clone())
        self.adjacency = adjacency

    def propagated(self) -> tuple[Tensor, Tensor]:
        """Vectors of users [U, D] and items [I, D] after all layers."""
        layer = torch.cat([self.user, self.item])
        found = [layer]
        for _ in range(self.layers):
            layer = torch.sparse.mm(self.adjacency, layer)
            found.append(layer)
        users, items = torch.split(torch.stack(found, dim=1).mean(dim=1), [len(self.user), len(self.item)])
        return users, items

    def losses(self, batch: Triples) -> dict[str, Tensor]:
        """BPR, and the penalty."""
        return plain_bpr(*self.propagated(), self.user, self.item, batch)


def coo_adjacency(data: Interactions, device: torch.device) -> Tensor:
    """The normalised adjacency of users and items as a coalesced sparse COO tensor, [N, N]."""
    user, item = data.user_of_pair, data.train.item.long() + data.num_users
    row, column = torch.cat([user, item]), torch.cat([item, user])
    size = data.num_users + data.num_items
    degree = torch.bincount(row, minlength=size).float()
    weight = (degree[row] * degree[column]).rsqrt()
    index = torch.stack([row, column])
    return torch.sparse_coo_tensor(index, weight, (size, size), check_invariants=False).coalesce().to(device)


def plain_bpr(users_UD: Tensor, items_ID: Tensor, own_UD: Tensor, own_ID: Tensor, batch: Triples) -> dict[str, Tensor]:
    """BPR of the propagated vectors, and half the mean square of the unpropagated rows."""
    first = (users_UD[batch.user] * items_ID[batch.positive]).sum(1)
    second = (users_UD[batch.user] * items_ID[batch.negative]).sum(1)
    rows = (own_UD[batch.user], own_ID[batch.positive], own_ID[batch.negative])
    size = 0.5 * torch.stack([row.norm(2).pow(2) for row in rows]).sum() / len(batch.user)
    return {"pairs": F.softplus(second - first).mean(), "reg": size}


def plain_triples(
    positives: Sequence[Collection[int]], num_items: int, count: int, *, draw: Callable[[int], int] = random.randrange
) -> list[list[int]]:
    """At most `count` triples drawn in a Python loop; `draw` gives a number below its argument.

    `positives` has the items of each user, as lists or as NumPy's arrays; users with none or with all are passed over.
    """
    found = []
    for _ in range(count):
        user = draw(len(positives))
        own: Any = positives[user]
        if not 0 < len(own) < num_items:  # without a positive, or without a negative
            continue
        positive = own[draw(len(own))]
        while True:
            negative = draw(num_items)
            if negative not in own:
                break
        found.append([user, positive, negative])
    return found


def lists_of(lists: Lists) -> list[list[int]]:
    """The items of every user, as Python integers."""
    ptr, item = lists.ptr.tolist(), lists.item.tolist()
    return [item[begin:end] for begin, end in pairwise(ptr)]


@torch.no_grad()
def plain_ranking(
    propagated: Callable[[], tuple[Tensor, Tensor]],
    users: Sequence[int],
    positives: Sequence[Sequence[int]],
    tests: Sequence[Sequence[int]],
    *,
    k: int,
) -> dict[str, float]:
    """Recall and NDCG of those users in batches of 100, by loops; `propagated` is called for every batch."""
    recall = gain = 0.0
    for begin in range(0, len(users), USERS_PER_BATCH):
        batch = users[begin : begin + USERS_PER_BATCH]
        user_vectors, item_vectors = propagated()
        rating = user_vectors[torch.tensor(batch)] @ item_vectors.t()
        rows: list[int] = []
        columns: list[int] = []
        for i, user in enumerate(batch):
            rows.extend([i] * len(positives[user]))
            columns.extend(positives[user])
        rating[rows, columns] = -(1 << 10)
        _, best = torch.topk(rating, k=k)
        for user, ranked in zip(batch, best.tolist(), strict=True):
            truth = tests[user]
            hits = [item in truth for item in ranked]
            recall += sum(hits) / len(truth)
            ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(truth))))
            gain += sum(1 / math.log2(i + 2) for i, hit in enumerate(hits) if hit) / ideal
    return {f"Recall@{k}": recall / len(users), f"NDCG@{k}": gain / len(users)}


# The notes: input


class Plain(NamedTuple):
    """A batch as the notes' scripts have it."""

    user: Tensor  # [B, M] int64, the user of the pair in every column
    item: Tensor  # [B, M] int64, the positive and its negatives, numbered behind the users
    place: Tensor  # [R] int64, flat positions of `item` to replace by content, with repeats


class PlainPairs(Dataset[tuple[Tensor, Tensor]]):
    """A training pair with its negatives by index: its user 1 + K times, and its items, both [M] int64."""

    def __init__(self, data: Interactions, num_negatives: int) -> None:
        first = data.num_users
        self.pairs = list(zip(data.user_of_pair.tolist(), (data.train.item + first).tolist(), strict=True))
        is_warm = torch.ones(data.num_items, dtype=torch.bool) if data.is_cold is None else ~data.is_cold
        self.warm = set((is_warm.nonzero().squeeze(1) + first).tolist())
        self.met = [{item + first for item in own} for own in lists_of(data.train)]
        self.num_negatives = num_negatives

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        user, item = self.pairs[index]
        # a list of the difference, since newer Pythons sample from sequences alone
        negatives = random.sample(list(self.warm - self.met[user]), self.num_negatives)
        return torch.LongTensor([user] * (1 + self.num_negatives)), torch.LongTensor([item, *negatives])


def drawn_places(item_BM: Tensor, num_sample: float, generator: torch.Generator) -> Tensor:
    """Flat positions of a batch to replace, [R] int64, with repeats."""
    count = (int(item_BM.numel() * num_sample),)
    return torch.randint(item_BM.numel(), count, generator=generator, device=generator.device)


def as_plain(part: Part, num_users: int) -> Plain:
    """Our micro-batch, whose pairs have negatives of their own, in the notes' form."""
    batch = part.batch
    assert batch.negative is not None
    assert part.replaced is not None
    item_BM = torch.cat([batch.item.unsqueeze(1), batch.negative], dim=1) + num_users
    user_BM = batch.user.unsqueeze(1).expand_as(item_BM).contiguous()
    return Plain(user_BM, item_BM, part.replaced.flatten().nonzero().squeeze(1))


def as_part(plain: Plain, num_users: int) -> Part:
    """The notes' batch in our form."""
    replaced = torch.zeros(plain.item.numel(), dtype=torch.bool, device=plain.item.device)
    replaced[plain.place] = True
    item_BM = plain.item - num_users
    batch = Batch(plain.user[:, 0], item_BM[:, 0], item_BM[:, 1:], None, None)
    return Part(batch, replaced.view_as(plain.item), None, 1.0)


# The notes: model and step


class Edges(NamedTuple):
    """The training pairs as the notes' graph has them: every pair an edge."""

    user: Tensor  # [P] int64
    item: Tensor  # [P] int64, numbered from 0
    user_degree: Tensor  # [U, 1] float32, at least 1
    item_degree: Tensor  # [I, 1] float32, at least 1


def edges_of(data: Interactions, device: torch.device) -> Edges:
    """All training pairs."""
    user, item = data.user_of_pair, data.train.item.long()
    degrees = [
        torch.bincount(end, minlength=count).clamp(min=1).float().unsqueeze(1).to(device)
        for end, count in ((user, data.num_users), (item, data.num_items))
    ]
    return Edges(user.to(device), item.to(device), *degrees)


def plain_views(table_ND: Tensor, edges: Edges, *, full: bool) -> tuple[Tensor, Tensor]:
    """Two views of every user, [U, D] each, summed over all pairs.

    The user's own embedding and n_u, the mean over its items; or, with `full`, n_u and c_u, the mean over its items of
    the mean over their users.
    """
    num_users = len(edges.user_degree)
    user_UD, item_ID = table_ND[:num_users], table_ND[num_users:]

    def of_users(vector_ID: Tensor) -> Tensor:
        return torch.zeros_like(user_UD).index_add(0, edges.user, vector_ID[edges.item]) / edges.user_degree

    if not full:
        return user_UD, of_users(item_ID)
    users_of_item = torch.zeros_like(item_ID).index_add(0, edges.item, user_UD[edges.user]) / edges.item_degree
    return of_users(item_ID), of_users(users_of_item)


def plain_contrast(table_ND: Tensor, edges: Edges, user_BM: Tensor, *, full: bool, temperature: float) -> Tensor:
    """The contrast of the batch's users, from the views of all users."""
    node = torch.unique(user_BM)
    first, second = (F.normalize(view[node], dim=1) for view in plain_views(table_ND, edges, full=full))
    score = torch.exp(torch.matmul(first, second.t()) / temperature)
    return (-torch.log(torch.diagonal(score) / score.sum(1))).mean()


def plain_clcrec(
    table_ND: Tensor, content_CD: Tensor, batch: Plain, row_BM: Tensor, *, temperature: float
) -> dict[str, Tensor]:
    """CLCRec's parts by products of gathered vectors; `row_BM` ([B, M] int64) are the items' rows of the content."""
    columns = batch.item.shape[1]
    user, item = batch.user.view(-1), batch.item.view(-1)
    positive = batch.item[:, :1].repeat(1, columns).view(-1)
    user_vector, positive_vector, item_vector = table_ND[user], table_ND[positive], table_ND[item]
    content_vector = content_CD[row_BM.reshape(-1)]
    mixed = item_vector.clone()
    mixed[batch.place] = content_vector[batch.place].clone().to(mixed.dtype)  # of two types under autocast

    def contrastive(anchor: Tensor, candidate: Tensor) -> Tensor:
        score = torch.exp((anchor * candidate).sum(1) / temperature).view(-1, columns)
        return (-torch.log(score[:, 0] / score.sum(1))).mean()

    contrast = contrastive(F.normalize(positive_vector, dim=1), F.normalize(content_vector, dim=1))
    preference = contrastive(user_vector, mixed)
    user_norm = torch.sqrt((user_vector**2).sum(1)).mean()
    item_norm = torch.sqrt((item_vector**2).sum(1)).mean()
    return {"contrast": contrast, "preference": preference, "reg": (user_norm + item_norm) / 2}


def plain_step(state: TrainState, batch: B, loss_of: LossFn[B], *, precision: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the batch and its parts after one step that keeps its graph, in place on model and optimizer."""
    optimizer, device = state.optimizers[0], state.first_bad_step.device
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        loss, parts = loss_of(state.model, batch)
    state.scaler.scale(loss).backward(None, True)  # type: ignore[no-untyped-call]  # True: what the notes' code asks for
    state.scaler.step(optimizer)
    state.scaler.update()
    return loss, parts


# The notes: evaluation


class PlainSplit(NamedTuple):
    """Held-out positives of every user, and what this ranking leaves out for all of them."""

    items: list[list[int]]
    masked: Tensor | None  # items of the other group


def plain_splits(data: Interactions) -> dict[str, PlainSplit]:
    """The rankings of an epoch by name: "valid/all" and so on; two, or six where there are cold items."""
    return {
        f"{stage}/{group}": PlainSplit(
            lists_of(kept(held_out(data, stage), mask)), None if mask is None else (~mask).nonzero().squeeze(1)
        )
        for stage in STAGES
        for group, mask in groups_of(data).items()
    }


@torch.no_grad()
def plain_metrics(
    user_UD: Tensor,
    item_ID: Tensor,
    trained: Mapping[int, Sequence[int]],
    split: PlainSplit,
    users: range,
    *,
    k: int,
) -> dict[str, float]:
    """Precision, recall and NDCG at k of a stretch of users in one split, from a full ranking of its own."""
    blocks = []
    for begin in range(users.start, users.stop, USERS_PER_BLOCK):
        end = min(begin + USERS_PER_BLOCK, users.stop)
        score = torch.matmul(user_UD[begin:end], item_ID.t())
        for user, seen in trained.items():
            if begin <= user < end:
                score[user - begin][torch.LongTensor(seen)] = LEGACY_MASK
        if split.masked is not None:
            score[:, split.masked] = LEGACY_MASK
        blocks.append(torch.topk(score, k).indices)
    ranked = torch.cat(blocks)
    precision = recall = ndcg = 0.0
    measured = 0
    for user in users:
        wanted = set(split.items[user])
        if not wanted:
            continue
        top = ranked[user - users.start].tolist()
        hits = len(wanted & set(top))
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(top) if item in wanted)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(len(wanted), k)))
        precision, recall, ndcg = precision + hits / k, recall + hits / len(wanted), ndcg + gain / ideal
        measured += 1
    count = max(1, measured)
    return {f"Precision@{k}": precision / count, f"Recall@{k}": recall / count, f"NDCG@{k}": ndcg / count}
