"""The arrangements of the original scripts, written anew from their description: what `bench` compares ours with.

Legend: B sequences of a step, L columns (max_len and a front token), D embedding dim, H heads, W head width, N targets,
I items + 1, M values of a list.

A line of JSON is parsed per user, a dictionary of features completed for every position of sequence, positive and
negative, features are moved into tensors one by one, and the tower runs on every position; attention is written out,
evaluation ranks user by user. Nothing that trains reaches this module.
"""

import json
import math
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.seqrec.config import Config
from apps.seqrec.dataset import Batch, Sequences, Spans, compact, number_within
from apps.seqrec.evaluate import queries
from apps.seqrec.model import Context, SeqRec, SoftmaxAttention, rotate
from shared.amp import evaluation_mode

Record = dict[str, Any]


class Padded(NamedTuple):
    """A step in rows of one width, with a column for every feature of every position."""

    id: Tensor  # [3, B, L] int64: items of sequence, positive and negative; 0 at the front token and at padding
    row: Tensor  # [B, L] int64, rows of features of the sequence
    mark: Tensor | None  # [2, B, L] int64, 1 + what was done at the token and at its target; 0 for none
    column: tuple[dict[str, Tensor], ...]  # of sequence, positive and negative; empty where the tower needs none
    targets: Tensor  # [B] int64, how many targets each sequence has
    user: Tensor  # [B] int64


class Dictionaries:
    """The original's data set: a line of text for a user, a dictionary for every item, all of it Python objects.

    Only the users ([B] int64) can be asked for.
    """

    def __init__(self, sequences: Sequences, users: Tensor, *, max_len: int, front: bool, seed: int = 0) -> None:
        known = sequences.features
        self.sequences, self.max_len, self.front = sequences, max_len, front
        self.item_fields = [f"item{i}" for i in range(len(known.item_sizes))] if known else []
        self.user_fields = [f"user{i}" for i in range(len(known.user_sizes))] if known else []
        self.list_fields = [f"list{i}" for i in range(len(known.list_sizes))] if known else []
        self.families = list(known.embeddings) if known else []
        self.features = [self.item_features(row) for row in range(sequences.num_items + 1)]
        self.vectors = {name: list(known.embeddings[name].float().unbind()) for name in self.families} if known else {}
        self.lines = {user: self.line(user) for user in set(users.tolist())}
        self.random = random.Random(seed)

    def item_features(self, row: int) -> Record:
        """What a row of features says, without the values it lacks."""
        known = self.sequences.features
        values = known.item[row].tolist() if known else []
        return {field: value for field, value in zip(self.item_fields, values, strict=True) if value}

    def line(self, user: int) -> bytes:
        """A user's profile and events as [item, row, user features, item features, action] in a line of JSON."""
        data, known = self.sequences, self.sequences.features
        profile: Record = {}
        if known is not None:
            values = known.user[user].tolist()
            profile = {field: value for field, value in zip(self.user_fields, values, strict=True) if value}
            for field, lists in zip(self.list_fields, known.user_lists, strict=True):
                profile[field] = lists[user][lists[user] > 0].tolist()
        begin, end = int(data.ptr[user]), int(data.ptr[user + 1])
        items = data.item[begin:end].tolist()
        rows = items if data.row is None else data.row[begin:end].tolist()
        actions = [0] * len(items) if data.action is None else data.action[begin:end].tolist()
        records: list[list[Any]] = [[0, 0, profile, None, 0]]
        for item, row, action in zip(items, rows, actions, strict=True):
            features = self.features[item] if row == item else self.item_features(row)
            records.append([item, row, None, features, action])
        return json.dumps(records).encode()

    def completed(self, features: Mapping[str, Any], item: int) -> Record:
        """A position's dictionary with a value for every feature."""
        found: Record = dict(features)
        for field in (*self.item_fields, *self.user_fields):
            if field not in found:
                found[field] = 0
        for field in self.list_fields:
            if not found.get(field):
                found[field] = [0]
        for name, vectors in self.vectors.items():
            found[f"emb_{name}"] = vectors[item]
        return found

    def sample(self, user: int, first: int, inputs: int) -> tuple[Any, ...]:
        """Padded ids, rows, marks and dictionaries of `inputs` events of a user, from event number `first` on."""
        profile, *events = json.loads(self.lines[user])
        events = events[first : first + inputs + 1]
        seen = {event[0] for event in events}
        lead, width = int(self.front), self.max_len + int(self.front)
        ids = [[0] * width for _ in range(3)]
        marks = [[0] * width for _ in range(2)]
        rows = [0] * width
        default = self.completed({}, 0)
        dictionaries = [[default] * width for _ in range(3)]
        if lead:
            dictionaries[0][0] = self.completed(profile[2], 0)
        for place, (item, row, _, features, action) in enumerate(events):
            column = place + lead
            if place + 1 < len(events):
                ids[0][column], rows[column], marks[0][column] = item, row, action + 1
                dictionaries[0][column] = self.completed(features, item)
            if column:
                ids[1][column - 1], marks[1][column - 1] = item, action + 1
                dictionaries[1][column - 1] = self.completed(self.features[item], item)
                negative = self.random.randint(1, self.sequences.num_items)
                while negative in seen and len(seen) < self.sequences.num_items:
                    negative = self.random.randint(1, self.sequences.num_items)
                ids[2][column - 1] = negative
                dictionaries[2][column - 1] = self.completed(self.features[negative], negative)
        return ids, rows, marks, dictionaries, len(events) - 1 + lead

    def batch(self, spans: Spans, *, columns: bool = True) -> Padded:
        """The pieces of a step; features are moved into tensors where the tower wants them as `columns`."""
        first = (spans.start - self.sequences.ptr[spans.user]).tolist()
        inputs = (spans.end - spans.start).tolist()
        samples = [
            self.sample(user, begin, length)
            for user, begin, length in zip(spans.user.tolist(), first, inputs, strict=True)
        ]
        mark = torch.tensor([sample[2] for sample in samples]).transpose(0, 1)
        return Padded(
            id=torch.tensor([sample[0] for sample in samples]).transpose(0, 1),
            row=torch.tensor([sample[1] for sample in samples]),
            mark=None if self.sequences.action is None else mark,
            column=tuple(self.columns([sample[3][part] for sample in samples]) for part in range(3)) if columns else (),
            targets=torch.tensor([sample[4] for sample in samples]),
            user=spans.user,
        )

    def columns(self, dictionaries: list[list[Record]]) -> dict[str, Tensor]:
        """Tensors of every feature, [B, L], [B, L, M] or [B, L, width]: a loop over users, positions and features."""
        found = {}
        for field in (*self.item_fields, *self.user_fields):
            found[field] = torch.tensor([[record[field] for record in row] for row in dictionaries])
        for field in self.list_fields:
            longest = max(len(record[field]) for row in dictionaries for record in row)
            padded = [[record[field] + [0] * (longest - len(record[field])) for record in row] for row in dictionaries]
            found[field] = torch.tensor(padded)
        for name in self.families:
            found[f"emb_{name}"] = torch.stack(
                [torch.stack([record[f"emb_{name}"] for record in row]) for row in dictionaries]
            )
        return found


def gathered(data: Dictionaries, spans: Spans, unseen_N: Tensor, *, columns: bool = True) -> Padded:
    """What `Dictionaries.batch` gives, by index arithmetic on prepared tensors; `unseen_N` are the negatives."""
    known, lead = data.sequences, int(data.front)
    width, size = data.max_len + lead, spans.user.numel()
    count = spans.end - spans.start + lead
    sequence, step = number_within(count)
    place = sequence * width + step
    source = (spans.start - lead)[sequence] + step  # of a front token: the event before the first
    is_event = (step >= lead).long()

    def rows_of(values: Tensor) -> Tensor:
        return torch.zeros(size * width, dtype=torch.int64).index_copy_(0, place, values).view(size, width)

    def of_sequence(values: Tensor, *, plus: int = 0) -> Tensor:
        return rows_of((values[source.clamp(min=0)].long() + plus) * is_event)

    ids = torch.stack([of_sequence(known.item), rows_of(known.item[source + 1].long()), rows_of(unseen_N)])
    row = ids[0] if known.row is None else of_sequence(known.row)
    mark = None
    if known.action is not None:
        mark = torch.stack([of_sequence(known.action, plus=1), rows_of(known.action[source + 1].long() + 1)])
    column: tuple[dict[str, Tensor], ...] = ()
    if columns:
        parts = ((row, ids[0], spans.user), (ids[1], ids[1], None), (ids[2], ids[2], None))
        column = tuple(gathered_columns(data, part, item, user) for part, item, user in parts)
    return Padded(ids, row, mark, column, count, spans.user)


def gathered_columns(data: Dictionaries, row_BL: Tensor, item_BL: Tensor, user_B: Tensor | None) -> dict[str, Tensor]:
    """The columns of `Dictionaries.columns`; profiles stand in the first column of sequences, and nowhere else."""
    known = data.sequences.features
    found: dict[str, Tensor] = {}
    if known is None:
        return found
    is_profiled = user_B is not None and data.front
    table_BLF = known.item[row_BL].long()
    for i, field in enumerate(data.item_fields):
        found[field] = table_BLF[..., i]
    for i, field in enumerate(data.user_fields):
        found[field] = torch.zeros_like(row_BL)
        if is_profiled:
            found[field][:, 0] = known.user[user_B, i].long()
    for field, lists in zip(data.list_fields, known.user_lists, strict=True):
        found[field] = torch.zeros(*row_BL.shape, lists.shape[1], dtype=torch.int64)
        if is_profiled:
            found[field][:, 0] = lists[user_B].long()
    for name, value in known.embeddings.items():
        found[f"emb_{name}"] = value[item_BL].float()
    return found


def position_vectors(
    model: SeqRec, data: Dictionaries, id_BL: Tensor, column: Mapping[str, Tensor], *, users: bool
) -> Tensor:
    """The tower on every position, field by field, [B, L, D]."""
    found = F.embedding(id_BL, model.item.weight, padding_idx=0)
    tower = model.tower
    if tower is None:
        return found
    sides = [(data.item_fields, tower.item_offsets)]
    if users:
        sides.append((data.user_fields, tower.user_offsets))
    for fields, offsets in sides:
        for field, offset in zip(fields, offsets.tolist(), strict=True):
            value = column[field]
            found = found + F.embedding(torch.where(value > 0, value + offset, 0), tower.table.weight, padding_idx=0)
    if users:
        for field, offset in zip(data.list_fields, tower.list_offsets.tolist(), strict=True):
            value = column[field]
            total = F.embedding(torch.where(value > 0, value + offset, 0), tower.table.weight, padding_idx=0).sum(2)
            found = found + total / (value > 0).sum(2, keepdim=True).clamp(min=1)
    for name, layer in tower.project.items():
        found = found + layer(F.normalize(column[f"emb_{name}"], dim=-1))
    return found


def inside_of(batch: Padded) -> Tensor:
    """Which columns hold a token, [B, L] bool."""
    length = batch.id.shape[2]
    return torch.arange(length, device=batch.id.device) < batch.targets[:, None]


def padded_loss(model: SeqRec, data: Dictionaries, batch: Padded) -> Tensor:
    """BCE with one negative of a padded step, the tower run on every position."""
    size, length = batch.id.shape[1:]
    device = batch.id.device
    vectors = [
        position_vectors(model, data, batch.id[k], batch.column[k], users=k == 0 and data.front) for k in range(3)
    ]
    sequence = vectors[0]
    if model.front is not None:
        is_front = (torch.arange(length, device=device) == 0)[None, :, None]
        sequence = sequence + torch.where(is_front, model.front, torch.zeros((), device=device))
    inside = inside_of(batch)
    owner, position = segments(batch)
    hidden = model(
        (torch.arange(size * length, device=device) + 1).view(size, length) * inside,
        owner,
        position,
        None,
        packed=False,
        vector_CD=torch.cat([torch.zeros(1, sequence.shape[-1], device=device), sequence.flatten(0, 1)]),
        action_RL=None if batch.mark is None else batch.mark[0],
    )
    query = model.query(hidden[inside], action_N=None if batch.mark is None else batch.mark[1][inside])
    positive = (query * model.candidates(vectors[1][inside])).sum(1)
    negative = (query * model.candidates(vectors[2][inside])).sum(1)
    return (F.softplus(-positive) + F.softplus(negative)).mean()


def segments(batch: Padded) -> tuple[Tensor, Tensor]:
    """Owner and position of every column, both [B, L] int64, 0 at padding."""
    size, length = batch.id.shape[1:]
    device, inside = batch.id.device, inside_of(batch)
    owner = torch.arange(1, size + 1, device=device)[:, None] * inside
    place = torch.arange(length, device=device).expand(size, length)
    return owner, (batch.targets[:, None] - 1 - place).clamp(min=0) * inside


def as_batch(data: Dictionaries, batch: Padded) -> Batch:
    """The same step as our trainer takes it, still in rows of one width; the tower then sees each row once."""
    length = batch.id.shape[2]
    inside = inside_of(batch)
    owner, position = segments(batch)
    begin = torch.arange(batch.user.numel(), device=inside.device) * length
    found = Batch(
        item=batch.row,
        segment=owner,
        position=position,
        time=None,
        action=None if batch.mark is None else batch.mark[0],
        target=batch.id[1][inside],
        place=inside.flatten().nonzero().squeeze(1),
        last=begin + batch.targets - 1,
        user=batch.user,
        front=begin if data.front else None,
        next_action=None if batch.mark is None else batch.mark[1][inside],
        next_time=None,
        rows=None,
        unseen=batch.id[2][inside],
        shared=None,
        packed=False,
    )
    if data.sequences.features is None:
        return found
    return compact(found, num_items=data.sequences.num_items, whole=False)


# Model


class ManualAttention(SoftmaxAttention):
    """Attention written out, with all weights in memory; it takes over the layers of ours."""

    def __init__(self, ours: SoftmaxAttention) -> None:
        nn.Module.__init__(self)
        self.num_heads, self.qkv, self.out = ours.num_heads, ours.qkv, ours.out

    def forward(self, x_RLD: Tensor, context: Context) -> Tensor:
        rows, length, width = x_RLD.shape
        qkv = self.qkv(x_RLD).view(rows, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if context.rotation_LW is not None:
            query, key = rotate(query, context.rotation_LW), rotate(key, context.rotation_LW)
        score = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool, device=score.device).tril()
        if context.mask_RLL is not None:
            mask = context.mask_RLL[:, None]
        weight = torch.softmax(score.masked_fill(~mask, -torch.inf), dim=-1)
        return self.out((weight @ value).transpose(1, 2).reshape(rows, length, width))


def use_manual_attention(model: SeqRec) -> None:
    """Write the attention of every block out, in place; weights stay the same."""
    for block in model.blocks:
        block.attention = ManualAttention(block.attention)  # type: ignore[arg-type]


def use_plain_dropout(model: SeqRec) -> None:
    """torch's own dropout everywhere, in place."""
    model.input_dropout = nn.Dropout(model.config.dropout)  # type: ignore[assignment]
    for block in model.blocks:
        block.dropout = nn.Dropout(model.config.dropout)


# Evaluation


@torch.no_grad()
def sorted_metrics(
    model: SeqRec, sequences: Sequences, spans: Spans, item_ID: Tensor, *, config: Config, k: int, together: bool
) -> tuple[float, float]:
    """Sums of HR@k and NDCG@k over the users of `spans`: a sort of all items and a loop in Python for every user.

    `together`: all users are encoded at once, instead of one by one. What a user has met is filtered, as in `evaluate`;
    `item_ID` are the candidates' vectors.
    """
    device, target = item_ID.device, sequences.item[spans.end].tolist()
    parts = [spans] if together else [spans.take(torch.tensor([i])) for i in range(spans.user.numel())]
    hits, gain, done = 0.0, 0.0, 0
    with evaluation_mode(model):
        for part in parts:
            for chunk in queries(model, sequences, part, config=config, packed=False, device=device):
                ends = chunk.seen.ptr.tolist()
                for row, state_D in enumerate(chunk.state_BD):
                    score_I = item_ID @ state_D
                    score_I[0] = -torch.inf
                    score_I[chunk.seen.item[ends[row] : ends[row + 1]]] = -torch.inf
                    order = torch.argsort(score_I, descending=True).tolist()
                    rank = 1 + order.index(target[done])
                    if rank <= k:
                        hits += 1.0
                        gain += 1 / math.log2(1 + rank)
                    done += 1
    return hits, gain
