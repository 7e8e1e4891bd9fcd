"""Frozen tensors of all events, and batches made from them by index arithmetic.

Legend: U users, E events, B sequences of a batch, R rows, L row length (tokens), N targets, K shared negatives.

A batch is a gather: nothing is looped over per event, and nothing is drawn here except through a generator that is a
pure function of (seed, epoch). Two layouts hold the same sequences and give the same losses:

    padded   one sequence per row, from column 0, padding behind it
    packed   several sequences per row, best fit; a token attends to earlier tokens of its own segment only
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.seed import make_generator

PADDING = 0  # item id 0 never occurs in data: it fills rows
MIN_EVENTS = 3  # leave-one-out needs one event each to train, validate and test on

ORDER_STREAM = 1  # streams keep the draws of one (seed, epoch, step) apart
WINDOW_STREAM = 2

Stage = Literal["valid", "test", "all"]


@dataclass(frozen=True)
class Sequences:
    """All users' events as CSR tensors, in time order within a user; nothing in it changes after construction."""

    ptr: Tensor  # [U + 1] int64, events of user u are ptr[u]:ptr[u + 1]
    item: Tensor  # [E] int32, 1..num_items; 0 is padding and never occurs
    time: Tensor | None  # [E] int64 seconds, None where the source has no times
    item_ids: tuple[str, ...]  # raw id of item i at [i - 1]
    user_ids: tuple[str, ...]  # raw id of user u at [u]
    fingerprint: str  # of the source's content
    name: str  # what to call this data in messages, e.g. "ml-1m.txt"

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_events(self) -> int:
        return self.item.numel()

    @property
    def user_of_event(self) -> Tensor:
        """[E] int64."""
        return number_within(self.ptr.diff())[0]

    @property
    def item_digest(self) -> str:
        """Which items there are and how they are numbered, 32 hex digits: weights fit no other numbering."""
        return hashlib.blake2b("\n".join(self.item_ids).encode(), digest_size=16).hexdigest()


class Spans(NamedTuple):
    """Pieces of users' histories: the inputs of piece b are the events start[b]:end[b] of user[b]."""

    user: Tensor  # [B] int64
    start: Tensor  # [B] int64, index into the events
    end: Tensor  # [B] int64, one past the last input; the event at `end` is the last target (where there is one)

    def take(self, rows: Tensor) -> "Spans":
        """The pieces at `rows` (int64)."""
        return Spans(self.user[rows], self.start[rows], self.end[rows])


class Batch(NamedTuple):
    """Sequences laid out in rows."""

    item: Tensor  # [R, L] int64, 0 is padding
    segment: Tensor  # [R, L] int64, 1 + index of the token's sequence in `user`; 0 is padding
    position: Tensor  # [R, L] int64, steps from the token to the last token of its sequence; 0 at padding
    time: Tensor | None  # [R, L] int64 seconds
    target: Tensor  # [N] int64, the items that followed, in order of sequence and time
    place: Tensor  # [N] int64, index into the flattened rows of the token each target followed
    last: Tensor  # [B] int64, index into the flattened rows of each sequence's last token
    user: Tensor  # [B] int64
    unseen: Tensor | None  # [N] int64, an item each target's user has not seen (bce)
    shared: Tensor | None  # [K] int64, items that all targets of the step are compared with (sampled, inbatch, gbce)
    packed: bool  # whether rows may hold several sequences


def number_within(length: Tensor) -> tuple[Tensor, Tensor]:
    """For lists of the given lengths ([B] int64) laid end to end: each element's list and its place there, from 0."""
    owner = torch.repeat_interleave(torch.arange(length.numel()), length)
    return owner, torch.arange(owner.numel()) - (torch.cumsum(length, 0) - length)[owner]


def history_end(sequences: Sequences, stage: Stage | Literal["train"]) -> Tensor:
    """One past the last event of each user that may be used as input at `stage`, [U] int64.

    Leave-one-out: a user's last event is the test target, the one before it the validation target. Users with fewer
    than three events are never evaluated, so all of their events train. "all" is the whole history (prediction).
    """
    ends = sequences.ptr[1:]
    held_out = {"train": 2, "valid": 2, "test": 1, "all": 0}[stage]
    if stage == "all":
        return ends
    return torch.where(ends - sequences.ptr[:-1] >= MIN_EVENTS, ends - held_out, ends)


def training_spans(sequences: Sequences, *, max_len: int, window: str = "last", seed: int = 0, epoch: int = 0) -> Spans:
    """The pieces of history to train on, at most `max_len` inputs each.

    window: "last" takes each user's most recent inputs (as SASRec does), "random" a piece of that length that ends
    anywhere, drawn anew each epoch from (seed, epoch, user), "all" cuts the whole history into pieces from the end.
    """
    first = sequences.ptr[:-1]
    last_target = history_end(sequences, "train") - 1
    inputs = last_target - first
    users = torch.nonzero(inputs >= 1).squeeze(1)
    first, last_target, inputs = first[users], last_target[users], inputs[users]
    if window == "all":
        pieces = (inputs + max_len - 1) // max_len
        owner, nth = number_within(pieces)
        end = last_target[owner] - nth * max_len
        return Spans(users[owner], torch.maximum(first[owner], end - max_len), end)
    if window == "random":
        slack = (inputs - max_len).clamp(min=0)
        draw = torch.rand(sequences.num_users, generator=make_generator(seed, epoch=epoch, stream=WINDOW_STREAM))
        last_target = last_target - (draw[users].double() * (slack + 1)).long().clamp(max=slack)
    elif window != "last":
        raise ValueError(f'window is "{window}"; it must be last, random or all')
    return Spans(users, torch.maximum(first, last_target - max_len), last_target)


def query_spans(sequences: Sequences, stage: Stage, *, max_len: int) -> Spans:
    """The history from which each evaluated user's next item is predicted, most recent `max_len` events.

    For "valid" and "test" only users with at least three events; for "all" every user with any.
    """
    count = sequences.ptr[1:] - sequences.ptr[:-1]
    users = torch.nonzero(count >= (1 if stage == "all" else MIN_EVENTS)).squeeze(1)
    end = history_end(sequences, stage)[users]
    return Spans(users, torch.maximum(sequences.ptr[:-1][users], end - max_len), end)


def epoch_order(num_spans: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits its pieces, [num_spans] int64: a function of (seed, epoch) alone."""
    return torch.randperm(num_spans, generator=make_generator(seed, epoch=epoch, stream=ORDER_STREAM))


def best_fit_rows(lengths: Sequence[int], row_len: int) -> tuple[list[int], list[int], int]:
    """Row and first column for every sequence, and the number of rows.

    Longest first, each into the fullest row that it fits (best fit decreasing). The only Python loop of the data path:
    once per step over sequences, never over events.
    """
    row = [0] * len(lengths)
    column = [0] * len(lengths)
    spaces: list[tuple[int, int]] = []  # (columns left, row), sorted
    num_rows = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[i]
        k = bisect_left(spaces, (length, -1))
        if k < len(spaces):
            space, row[i] = spaces.pop(k)
        else:
            space, row[i] = row_len, num_rows
            num_rows += 1
        column[i] = row_len - space
        if space > length:
            insort(spaces, (space - length, row[i]))
    return row, column, num_rows


def make_batch(sequences: Sequences, spans: Spans, *, packed: bool, row_len: int) -> Batch:
    """The events of `spans` laid out in rows of `row_len` columns (padded rows are only as long as the longest piece).

    Targets are the following events; the very last event of a user has none. Negatives are the trainer's to add.
    """
    length = spans.end - spans.start
    size = spans.user.numel()
    sequence, step = number_within(length)
    source = spans.start[sequence] + step

    if packed:
        rows, columns, num_rows = best_fit_rows(length.tolist(), row_len)
        begin = torch.tensor(rows) * row_len + torch.tensor(columns)
    else:
        num_rows, row_len = size, int(length.max()) if size else 0
        begin = torch.arange(size) * row_len
    place = begin[sequence] + step

    followed = source + 1 < sequences.ptr[spans.user + 1][sequence]

    def rows_of(values: Tensor) -> Tensor:
        return values.new_zeros(num_rows * row_len).index_copy_(0, place, values).view(num_rows, row_len)

    return Batch(
        item=rows_of(sequences.item[source].long()),
        segment=rows_of(sequence + 1),
        position=rows_of(length[sequence] - 1 - step),
        time=None if sequences.time is None else rows_of(sequences.time[source]),
        target=sequences.item[source[followed] + 1].long(),
        place=place[followed],
        last=begin + length - 1,
        user=spans.user,
        unseen=None,
        shared=None,
        packed=packed,
    )


def item_counts(sequences: Sequences) -> Tensor:
    """How often each item occurs in the training events, [num_items + 1] int64; 0 at padding."""
    ends = history_end(sequences, "train")
    trains = torch.arange(sequences.num_events) < ends[sequences.user_of_event]
    return torch.bincount(sequences.item[trains].long(), minlength=sequences.num_items + 1)


class SeenItems(NamedTuple):
    """Each user's distinct items in a form that lets unseen ones be drawn by one binary search."""

    key: Tensor  # [P] int64, user * (num_items + 1) + number of unseen items below the seen one; sorted
    ptr: Tensor  # [U + 1] int64 into key
    num_items: int


def seen_items(sequences: Sequences, stage: Stage | Literal["train"] = "train") -> SeenItems:
    """The distinct items of each user's history at `stage`."""
    ends = history_end(sequences, stage)
    user = sequences.user_of_event
    keep = torch.arange(sequences.num_events) < ends[user]
    width = sequences.num_items + 1
    pair = torch.unique(user[keep] * width + sequences.item[keep])
    owner, item = pair // width, pair % width
    ptr = torch.zeros(sequences.num_users + 1, dtype=torch.int64)
    ptr[1:] = torch.cumsum(torch.bincount(owner, minlength=sequences.num_users), 0)
    nth = torch.arange(pair.numel()) - ptr[owner]
    return SeenItems(owner * width + (item - 1 - nth), ptr, sequences.num_items)


def draw_unseen(seen: SeenItems, user: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform item per entry of `user` ([N] int64) that this user has not seen, [N] int64; exact, without a loop.

    The r-th unseen item is 1 + r + the number of seen items with at most r unseen ones below them.
    """
    unseen = seen.num_items - (seen.ptr[user + 1] - seen.ptr[user])
    draw = torch.rand(user.shape, dtype=torch.float64, generator=generator, device=user.device)
    nth = torch.minimum((draw * unseen).long(), unseen - 1).clamp(min=0)
    below = torch.searchsorted(seen.key, user * (seen.num_items + 1) + nth, right=True) - seen.ptr[user]
    return (1 + nth + below).clamp(max=seen.num_items)
