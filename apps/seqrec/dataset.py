"""Frozen tensors of all events, and batches made from them by index arithmetic.

Legend: U users, E events, B sequences of a batch, R rows, L row length (tokens), N targets, K shared negatives,
C rows of features that a batch uses.

A batch is a gather: nothing is looped over per event, and nothing is drawn here except through a generator that is a
pure function of (seed, epoch). Two layouts hold the same sequences and give the same losses:

    padded   one sequence per row, from column 0, padding behind it
    packed   several sequences per row, best fit; a token attends to earlier tokens of its own segment only

A sequence may begin with a front token, which stands for the user's profile and is followed by the first event.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apps.seqrec.features import Features
from shared.seed import make_generator

PADDING = 0  # item id 0 never occurs in data: it fills rows
MIN_EVENTS = 3  # leave-one-out needs one event each to train, validate and test on
ACTIONS = ("exposure", "click", "conversion")  # what action 0, 1 and 2 mean

ORDER_STREAM = 1  # streams keep the draws of one (seed, epoch, step) apart
WINDOW_STREAM = 2
SPLIT_STREAM = 7

Stage = Literal["valid", "test", "all"]


class HeldOut(NamedTuple):
    """Which events train and which are ranked, for every user."""

    train_end: Tensor  # [U] int64, one past the last event to train on
    valid: Tensor  # [U] int64, the event that validation ranks; -1 for none
    test: Tensor  # [U] int64, the same for the test
    text: str  # how it was divided, for protocol texts


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
    action: Tensor | None = None  # [E] int8, index into ACTIONS
    row: Tensor | None = None  # [E] int32, row of `features` where that is not the item's; None: it always is
    features: Features | None = None
    asked_time: Tensor | None = None  # [U] int64 seconds, when the item after the last event is asked for; 0: unknown
    held_out: HeldOut | None = None  # None: leave-one-out

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

    item: Tensor  # [R, L] int64, 0 is padding and the front token
    segment: Tensor  # [R, L] int64, 1 + index of the token's sequence in `user`; 0 is padding
    position: Tensor  # [R, L] int64, steps from the token to the last token of its sequence; 0 at padding
    time: Tensor | None  # [R, L] int64 seconds
    action: Tensor | None  # [R, L] int64, 1 + what was done at the event; 0 at padding and at front tokens
    target: Tensor  # [N] int64, the items that followed, in order of sequence and time
    place: Tensor  # [N] int64, index into the flattened rows of the token each target followed
    last: Tensor  # [B] int64, index into the flattened rows of each sequence's last token
    user: Tensor  # [B] int64
    front: Tensor | None  # [B] int64, index into the flattened rows of each sequence's front token; None without
    next_action: Tensor | None  # [N] int64, 1 + what was done at each target
    next_time: Tensor | None  # [N] int64 seconds of each target
    rows: Tensor | None  # [C] int64, rising: `item`, `target` and the negatives index these rows; None: all items
    unseen: Tensor | None  # [N] int64, an item each target's user has not seen (bce)
    shared: Tensor | None  # [K] int64, items that all targets of the step are compared with (sampled, inbatch, gbce)
    packed: bool  # whether rows may hold several sequences


def without_features(sequences: Sequences) -> Sequences:
    """The sequences with ids alone: items that have none are padding."""
    item = sequences.item
    if bool((item > sequences.num_items).any()):
        item = torch.where(item > sequences.num_items, PADDING, item)
    return replace(sequences, item=item, row=None, features=None)


def number_within(length: Tensor) -> tuple[Tensor, Tensor]:
    """For lists of the given lengths ([B] int64) laid end to end: each element's list and its place there, from 0."""
    owner = torch.repeat_interleave(torch.arange(length.numel()), length)
    return owner, torch.arange(owner.numel()) - (torch.cumsum(length, 0) - length).index_select(0, owner)


def history_end(sequences: Sequences, stage: Stage | Literal["train"]) -> Tensor:
    """One past the last event of each user that may be used as input at `stage`, [U] int64.

    That is the event to rank at "valid" and "test", where a user has one. "all" is the whole history (prediction).
    """
    if stage == "all":
        return sequences.ptr[1:]
    split = sequences.held_out or leave_one_out(sequences)
    if stage == "train":
        return split.train_end
    event = split.valid if stage == "valid" else split.test
    return torch.where(event >= 0, event, split.train_end)


def leave_one_out(sequences: Sequences) -> HeldOut:
    """A user's last event is the test target, the one before it the validation target.

    Users with fewer than three events are never evaluated, so all of their events train.
    """
    first, end = sequences.ptr[:-1], sequences.ptr[1:]
    enough = end - first >= MIN_EVENTS
    return HeldOut(
        torch.where(enough, end - 2, end), torch.where(enough, end - 2, -1), torch.where(enough, end - 1, -1), ""
    )


def hold_out_users(sequences: Sequences, *, share: float, seed: int) -> HeldOut:
    """Whole users are held out, drawn from (seed): half of the share to validate, half to test, on their last event."""
    first, end = sequences.ptr[:-1], sequences.ptr[1:]
    count = end - first
    draw = torch.rand(count.numel(), dtype=torch.float64, generator=make_generator(seed, stream=SPLIT_STREAM))
    held, tests = (draw < share) & (count >= 2), draw < share / 2
    return HeldOut(
        torch.where(held, first, end),
        torch.where(held & ~tests, end - 1, -1),
        torch.where(held & tests, end - 1, -1),
        f"{share:g} of the users held out of training, half to validate",
    )


def hold_out_time(sequences: Sequences, *, share: float) -> HeldOut:
    """The last `share` of all events is held out: a user's first event in its earlier half validates, or tests.

    Everything before such an event is its history; events before both cuts train.
    """
    if sequences.time is None:
        raise ValueError(f"{sequences.name} has no times, so it cannot be split by time; use another --split")
    order = torch.sort(sequences.time).values
    cuts = [order[min(order.numel() - 1, int(order.numel() * (1 - part)))] for part in (share, share / 2)]
    first, end = sequences.ptr[:-1], sequences.ptr[1:]
    user = sequences.user_of_event
    # events are in order of time within a user, so that the events before a cut are a beginning of the history
    ends = [first + torch.bincount(user[sequences.time < cut], minlength=first.numel()) for cut in cuts]
    valid = torch.where((ends[0] < ends[1]) & (ends[0] > first), ends[0], -1)
    test = torch.where((ends[1] < end) & (ends[1] > first), ends[1], -1)
    return HeldOut(ends[0], valid, test, f"the last {share:g} of all events held out, its earlier half to validate")


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


def query_spans(sequences: Sequences, stage: Stage, *, max_len: int, front: bool = False) -> Spans:
    """The history from which each evaluated user's next item is predicted, most recent `max_len` events.

    For "valid" and "test" only users with an event to rank; for "all" every user with any, or, since a front token is
    a history too, every user.
    """
    if stage == "all":
        chosen = sequences.ptr.diff() >= (0 if front else 1)
    else:
        split = sequences.held_out or leave_one_out(sequences)
        chosen = (split.valid if stage == "valid" else split.test) >= 0
    users = torch.nonzero(chosen).squeeze(1)
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


def make_batch(sequences: Sequences, spans: Spans, *, packed: bool, row_len: int, front: bool = False) -> Batch:
    """The events of `spans` laid out in rows of `row_len` columns (padded rows are only as long as the longest piece).

    Targets are the following events; the very last event of a user has none. With `front` every sequence begins with a
    front token, whose target is the first event of the piece, also where an earlier piece has it as its last target.
    Negatives are the trainer's to add.
    """
    lead = int(front)
    length = spans.end - spans.start + lead
    size = spans.user.numel()
    sequence, step = number_within(length)
    source = (spans.start - lead).index_select(0, sequence) + step  # of a front token: the event before the first

    if packed:
        rows, columns, num_rows = best_fit_rows(length.tolist(), row_len)
        begin = torch.tensor(rows) * row_len + torch.tensor(columns)
    else:
        num_rows, row_len = size, int(length.max()) if size else 0
        begin = torch.arange(size) * row_len
    place = begin.index_select(0, sequence) + step

    follower, followed_place = source + 1, place
    user_end = sequences.ptr[spans.user + 1]
    if not bool((spans.end < user_end).all()):  # no event follows a user's very last one
        followed = (follower < user_end[sequence]).nonzero().squeeze(1)
        follower, followed_place = follower[followed], place[followed]
    known = source.clamp_(min=0) if front else source

    def rows_of(values: Tensor) -> Tensor:
        return values.new_zeros(num_rows * row_len).index_copy_(0, place, values)

    def of_events(values: Tensor, *, plus: int = 0) -> Tensor:
        found = rows_of(values.index_select(0, known).long() + plus)
        return (found.index_fill_(0, begin, 0) if front else found).view(num_rows, row_len)

    time = None
    if sequences.time is not None:
        time = rows_of(sequences.time.index_select(0, known))
        if front:
            time.index_copy_(0, begin, front_times(sequences, spans))
        time = time.view(num_rows, row_len)
    return Batch(
        item=of_events(sequences.item if sequences.row is None else sequences.row),
        segment=rows_of(sequence + 1).view(num_rows, row_len),
        position=rows_of((length - 1).index_select(0, sequence) - step).view(num_rows, row_len),
        time=time,
        action=None if sequences.action is None else of_events(sequences.action, plus=1),
        target=sequences.item.index_select(0, follower).long(),
        place=followed_place,
        last=begin + length - 1,
        user=spans.user,
        front=begin if front else None,
        next_action=None if sequences.action is None else sequences.action.index_select(0, follower).long() + 1,
        next_time=None if sequences.time is None else sequences.time.index_select(0, follower),
        rows=None,
        unseen=None,
        shared=None,
        packed=packed,
    )


def front_times(sequences: Sequences, spans: Spans) -> Tensor:
    """The first event's time of each piece, so that no pause precedes it; of an empty one, when it is asked for."""
    assert sequences.time is not None
    first = sequences.time[spans.start.clamp(max=sequences.num_events - 1)]
    asked = torch.zeros_like(first) if sequences.asked_time is None else sequences.asked_time[spans.user]
    return torch.where(spans.end > spans.start, first, asked)


def compact(batch: Batch, *, num_items: int, whole: bool) -> Batch:
    """The batch with `rows`: the distinct rows of features it uses, which its items, targets and negatives then index.

    So each of them is encoded once a step. With `whole` all items come first, which their ids then index.
    """
    if whole:
        beyond = torch.unique(batch.item[batch.item > num_items])
        number = torch.searchsorted(beyond, batch.item).add_(num_items + 1)
        rows = torch.cat([torch.arange(num_items + 1), beyond])
        return batch._replace(rows=rows, item=torch.where(batch.item > num_items, number, batch.item))
    used = [batch.item.flatten(), batch.target, batch.unseen, batch.shared]
    parts = [torch.zeros(1, dtype=torch.int64), *(part for part in used if part is not None)]
    rows, index = torch.unique(torch.cat(parts), return_inverse=True)
    found = iter(torch.split(index, [part.numel() for part in parts])[1:])
    item, target = next(found).view(batch.item.shape), next(found)
    unseen = None if batch.unseen is None else next(found)
    shared = None if batch.shared is None else next(found)
    return batch._replace(rows=rows, item=item, target=target, unseen=unseen, shared=shared)


def asked_times(sequences: Sequences, spans: Spans) -> Tensor | None:
    """When the item after each piece is asked for, [B] int64 seconds: its own time where it is known, so this leaks.

    After a whole history that is `asked_time`, or the last event's time; without any event and `asked_time`, 0.
    """
    if sequences.time is None:
        return None
    last = sequences.time[(spans.end - 1).clamp(min=0)].masked_fill(spans.end == spans.start, 0)
    asked = last if sequences.asked_time is None else sequences.asked_time[spans.user]
    asked = torch.where(asked > 0, asked, last)
    following = sequences.time[spans.end.clamp(max=sequences.num_events - 1)]
    return torch.where(spans.end < sequences.ptr[spans.user + 1], following, asked)


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
