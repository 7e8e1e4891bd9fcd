"""Batches with front tokens, actions, times and rows of features, and splits by user and by time, event by event."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from apps.seqrec.dataset import (
    Batch,
    HeldOut,
    Sequences,
    Spans,
    Stage,
    asked_times,
    compact,
    hold_out_time,
    hold_out_users,
    item_counts,
    leave_one_out,
    make_batch,
    query_spans,
    seen_items,
    training_spans,
)
from tests.seqrec.test_seqrec_features import Event, World, make_world, sequences_of

LENGTHS = [0, 1, 2, 3, 4, 0, 9, 17, 3, 40, 25, 0, 6, 0]
MAX_LEN = 8
USERS = range(len(LENGTHS))


class Token(NamedTuple):
    """One place of a sequence as the contest's baseline lays it out: the profile first, then events."""

    event: Event | None  # None: the profile
    row: int  # of features
    following: Event | None


def numbered_rows(world: World) -> list[list[int]]:
    """The row of features of every event."""
    rows: list[list[int]] = []
    own = len(world.items)
    for history in world.histories:
        rows.append([])
        for event in history:
            own += event.own is not None
            rows[-1].append(event.item if event.own is None else own)
    return rows


def slow_tokens(world: World, user: int, start: int, end: int, *, front: bool) -> list[Token]:
    """The piece `start`..`end` of a user's history, counted from its beginning, and what follows each token."""
    history, rows = world.histories[user], numbered_rows(world)[user]

    def at(place: int) -> Event | None:
        return history[place] if place < len(history) else None

    tokens = [Token(None, 0, at(start))] if front else []
    return tokens + [Token(history[i], rows[i], at(i + 1)) for i in range(start, end)]


def check_batch(batch: Batch, pieces: list[list[Token]], users: list[int], *, front: bool) -> None:
    """Every field of the batch, token by token."""
    columns = batch.item.shape[1]
    assert batch.user.tolist() == users
    flat: dict[str, Any] = {
        name: value.flatten().tolist()
        for name in ("item", "segment", "position", "time", "action")
        if (value := getattr(batch, name)) is not None
    }
    targets: list[tuple[int, Event]] = []
    for index, tokens in enumerate(pieces):
        places = [p for p, segment in enumerate(flat["segment"]) if segment == index + 1]
        assert places == list(range(places[0], places[0] + len(tokens)))
        assert places[0] // columns == places[-1] // columns
        assert int(batch.last[index]) == places[-1]
        if front:
            assert batch.front is not None
            assert int(batch.front[index]) == places[0]
        for n, (place, token) in enumerate(zip(places, tokens, strict=True)):
            assert flat["item"][place] == token.row
            assert flat["position"][place] == len(tokens) - 1 - n
            if "action" in flat:
                assert flat["action"][place] == (0 if token.event is None else 1 + token.event.action)
            if "time" in flat and token.event is not None:
                assert flat["time"][place] == token.event.time
            if token.following is not None:
                targets.append((place, token.following))
    assert batch.target.tolist() == [event.item for _, event in targets]
    assert batch.place.tolist() == [place for place, _ in targets]
    assert (batch.next_action is not None) == ("action" in flat)
    if batch.next_action is not None:
        assert batch.next_action.tolist() == [1 + event.action for _, event in targets]
    assert (batch.next_time is not None) == ("time" in flat)
    if batch.next_time is not None:
        assert batch.next_time.tolist() == [event.time for _, event in targets]
    assert sum(segment > 0 for segment in flat["segment"]) == sum(map(len, pieces))
    for name, values in flat.items():
        assert not any(v for v, segment in zip(values, flat["segment"], strict=True) if segment == 0), name
    assert (batch.front is None) == (not front)


def pieces_of(world: World, sequences: Sequences, spans: Spans, *, front: bool) -> list[list[Token]]:
    begin = sequences.ptr.tolist()
    return [
        slow_tokens(world, user, start - begin[user], end - begin[user], front=front)
        for user, start, end in zip(*(column.tolist() for column in spans), strict=True)
    ]


# Layout


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("window", ["last", "random", "all"])
def test_a_training_batch_holds_what_the_baseline_would_for_every_token(window, front, packed):
    world = make_world(LENGTHS)
    sequences = sequences_of(world)
    spans = training_spans(sequences, max_len=MAX_LEN, window=window, seed=1, epoch=2)
    batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + int(front), front=front)
    check_batch(batch, pieces_of(world, sequences, spans, front=front), spans.user.tolist(), front=front)
    assert batch.item.shape[1] == MAX_LEN + int(front)


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_inputs_and_their_targets_are_those_of_the_training_history(packed):
    world = make_world(LENGTHS)
    sequences = sequences_of(world)
    spans = training_spans(sequences, max_len=MAX_LEN)
    batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + 1, front=True)
    expected, users = [], []
    for user, history in enumerate(world.histories):
        train = history[:-2] if len(history) >= 3 else history
        if len(train) >= 2:
            begin = max(0, len(train) - 1 - MAX_LEN)
            expected.append(slow_tokens(world, user, begin, len(train) - 1, front=True))
            users.append(user)
    check_batch(batch, expected, users, front=True)
    first_events = [tokens[1].event for tokens in expected]
    assert batch.target[torch.isin(batch.place, batch.front)].tolist() == [e.item for e in first_events if e]  # type: ignore[arg-type]
    assert batch.target.numel() == sum(map(len, expected))  # each token has one, the front token too


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("missing", ["times", "actions", "features"])
def test_what_the_data_lacks_the_batch_lacks(missing, packed):
    world = make_world(LENGTHS, own_share=0.0)
    sequences = sequences_of(world, **{missing: False})
    spans = training_spans(sequences, max_len=MAX_LEN)
    batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + 1, front=True)
    check_batch(batch, pieces_of(world, sequences, spans, front=True), spans.user.tolist(), front=True)
    assert (batch.time is None) == (missing == "times")
    assert (batch.action is None) == (missing == "actions")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("front", [True, False])
def test_queries_hold_the_events_before_the_one_to_rank(front, packed):
    world = make_world(LENGTHS)
    sequences = sequences_of(world)
    cases: tuple[tuple[Stage, int], ...] = (("valid", 2), ("test", 1))
    for stage, held in cases:
        spans = query_spans(sequences, stage, max_len=MAX_LEN, front=front)
        users = [user for user in USERS if LENGTHS[user] >= 3]
        batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + 1, front=front)
        expected = []
        for user in users:
            end = LENGTHS[user] - held
            expected.append(slow_tokens(world, user, max(0, end - MAX_LEN), end, front=front))
        check_batch(batch, expected, users, front=front)


@pytest.mark.parametrize("packed", [True, False])
def test_everybody_with_a_front_token_is_asked_about_even_without_a_history(packed):
    world = make_world(LENGTHS)
    sequences = sequences_of(world)
    spans = query_spans(sequences, "all", max_len=MAX_LEN, front=True)
    batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + 1, front=True)
    expected = [slow_tokens(world, u, max(0, LENGTHS[u] - MAX_LEN), LENGTHS[u], front=True) for u in USERS]
    check_batch(batch, expected, list(USERS), front=True)
    for user in (0, 5, 11, 13):
        assert len(expected[user]) == 1
        assert batch.front is not None
        assert int(batch.front[user]) == int(batch.last[user])
        assert int(batch.last[user]) not in batch.place.tolist()
    without = query_spans(sequences, "all", max_len=MAX_LEN)
    assert without.user.tolist() == [user for user in USERS if LENGTHS[user] > 0]


def test_rows_of_events_stay_with_the_inputs_and_items_with_the_targets():
    world = make_world([30, 30], own_share=1.0)
    sequences = sequences_of(world)
    batch = make_batch(sequences, training_spans(sequences, max_len=40), packed=True, row_len=41, front=True)
    is_event = (batch.segment > 0).flatten()
    assert batch.front is not None
    is_event[batch.front] = False
    assert bool((batch.item.flatten()[is_event] > sequences.num_items).all())
    assert bool((batch.target <= sequences.num_items).all())


# Rows that a batch uses


def batch_with_negatives(seed: int = 0, *, own_share: float = 0.3) -> tuple[Sequences, Batch]:
    sequences = sequences_of(make_world(LENGTHS, num_items=200, own_share=own_share, seed=seed))
    spans = training_spans(sequences, max_len=MAX_LEN)
    batch = make_batch(sequences, spans, packed=True, row_len=MAX_LEN + 1, front=True)
    generator = torch.Generator().manual_seed(seed)
    unseen = torch.randint(1, 201, batch.target.shape, generator=generator)
    return sequences, batch._replace(unseen=unseen, shared=torch.tensor([7, 9, 7, 200, 1]))


@pytest.mark.parametrize("kinds", [{"unseen", "shared"}, {"unseen"}, {"shared"}, set()])
def test_a_compact_batch_names_each_row_once_and_means_the_same(kinds):
    _, batch = batch_with_negatives()
    absent: dict[str, Any] = dict.fromkeys({"unseen", "shared"} - kinds)
    batch = batch._replace(**absent)
    found = compact(batch, num_items=200, whole=False)
    assert found.rows is not None
    used = {0, *batch.item.flatten().tolist(), *batch.target.tolist()}
    for name in kinds:
        used |= set(getattr(batch, name).tolist())
    assert found.rows.tolist() == sorted(used)
    assert max(used) > 200
    for name in ("item", "target", *kinds):
        index, expected = getattr(found, name), getattr(batch, name)
        assert index.shape == expected.shape
        assert torch.equal(found.rows[index], expected), name
    for name in absent:
        assert getattr(found, name) is None
    unchanged = set(Batch._fields) - {"item", "target", "unseen", "shared", "rows"}
    assert all(getattr(found, name) is getattr(batch, name) for name in unchanged)


@pytest.mark.parametrize("own_share", [0.3, 0.0])
def test_a_compact_batch_of_all_items_keeps_their_ids(own_share):
    _, batch = batch_with_negatives(own_share=own_share)
    batch = batch._replace(unseen=None, shared=None)
    found = compact(batch, num_items=200, whole=True)
    assert found.rows is not None
    beyond = sorted({row for row in batch.item.flatten().tolist() if row > 200})
    assert (len(beyond) > 3) == (own_share > 0)
    assert found.rows.tolist() == [*range(201), *beyond]
    assert torch.equal(found.rows[found.item], batch.item)
    assert torch.equal(found.target, batch.target)


def test_sorted_candidates_stay_sorted_in_a_compact_batch():
    _, batch = batch_with_negatives()
    found = compact(batch._replace(unseen=None, shared=torch.unique(batch.target)), num_items=200, whole=False)
    assert found.shared is not None
    assert bool((found.shared.diff() > 0).all())
    assert torch.equal(torch.unique(found.target), found.shared)


# When the next item is asked for


def test_an_event_that_follows_tells_when_it_was_asked_for():
    world = make_world(LENGTHS)
    sequences = replace(sequences_of(world), asked_time=torch.full((len(LENGTHS),), 5))
    for stage, held in (("valid", 2), ("test", 1)):
        spans = query_spans(sequences, stage, max_len=MAX_LEN)  # type: ignore[arg-type]
        found = asked_times(sequences, spans)
        assert found is not None
        assert found.tolist() == [h[-held].time for h in world.histories if len(h) >= 3]


def test_after_a_whole_history_the_known_moment_counts_or_the_last_event():
    world = make_world([3, 1, 7, 4])
    sequences = sequences_of(world)
    spans = query_spans(sequences, "all", max_len=MAX_LEN, front=True)
    last = [history[-1].time for history in world.histories]
    found = asked_times(sequences, spans)
    assert found is not None
    assert found.tolist() == last
    asked = [last[0] + 60, 0, last[2] + 9, 0]  # 0: not known
    found = asked_times(replace(sequences, asked_time=torch.tensor(asked)), spans)
    assert found is not None
    assert found.tolist() == [asked[0], last[1], asked[2], last[3]]
    assert asked_times(replace(sequences, time=None), spans) is None


# What is held out


def training_targets(sequences: Sequences, *, window: str) -> set[int]:
    """Every event that some token of an epoch is asked for, or sees."""
    spans = training_spans(sequences, max_len=4, window=window)
    events: set[int] = set()
    for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True):
        events |= set(range(start, end + 1))
    return events


def check_split(sequences: Sequences, split: HeldOut, trains: list[int]) -> None:
    """`trains[u]` events of user u train, and nothing else does in spans, counts and seen items."""
    held = replace(sequences, held_out=split)
    begin = sequences.ptr.tolist()
    items = sequences.item.tolist()
    assert split.train_end.tolist() == [b + n for b, n in zip(begin, trains, strict=False)]
    allowed = {e for b, n in zip(begin, trains, strict=False) for e in range(b, b + n)}
    for window in ("last", "random", "all"):
        assert training_targets(held, window=window) <= allowed
    reached = training_targets(held, window="all")
    alone = {b for b, n in zip(begin, trains, strict=False) if n == 1}  # a single event has no pair to train on
    assert reached == allowed - alone
    counts = [0] * (sequences.num_items + 1)
    for event in allowed:
        counts[items[event]] += 1
    assert item_counts(held).tolist() == counts
    seen = seen_items(held)
    distinct = [len({items[e] for e in range(b, b + n)}) for b, n in zip(begin, trains, strict=False)]
    assert seen.ptr.diff().tolist() == distinct


def test_leave_one_out_is_what_data_without_a_split_has():
    sequences = sequences_of(make_world(LENGTHS))
    split = leave_one_out(sequences)
    check_split(sequences, split, [n - 2 if n >= 3 else n for n in LENGTHS])
    explicit = replace(sequences, held_out=split)
    stages: tuple[Stage, ...] = ("valid", "test")
    for stage in stages:
        for mine, theirs in zip(*(query_spans(s, stage, max_len=3) for s in (explicit, sequences)), strict=True):
            assert torch.equal(mine, theirs)


def test_held_out_users_never_train_and_are_ranked_on_their_last_event():
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(0, 6, (400,), generator=draw).tolist()
    sequences = sequences_of(make_world(lengths))
    split = hold_out_users(sequences, share=0.3, seed=5)
    valid = set(torch.nonzero(split.valid >= 0).flatten().tolist())
    test = set(torch.nonzero(split.test >= 0).flatten().tolist())
    assert not valid & test
    check_split(sequences, split, [0 if user in valid | test else n for user, n in enumerate(lengths)])
    ends = sequences.ptr[1:].tolist()
    for part, event in ((valid, split.valid), (test, split.test)):
        assert all(int(event[user]) == ends[user] - 1 for user in part)
        assert all(lengths[user] >= 2 for user in part)
        assert len(part) / sum(n >= 2 for n in lengths) == pytest.approx(0.15, abs=0.05)
    held = replace(sequences, held_out=split)
    stages: tuple[tuple[Stage, set[int]], ...] = (("valid", valid), ("test", test))
    for stage, users in stages:
        spans = query_spans(held, stage, max_len=3)
        assert spans.user.tolist() == sorted(users)
        assert torch.equal(spans.end, sequences.ptr[1:][spans.user] - 1)
        assert torch.equal(spans.start, torch.maximum(sequences.ptr[:-1][spans.user], spans.end - 3))


def test_which_users_are_held_out_depends_on_the_seed_and_nothing_else():
    lengths = [5] * 100
    sequences, other = (sequences_of(make_world(lengths, seed=seed)) for seed in (0, 1))
    first, again = (hold_out_users(s, share=0.3, seed=5) for s in (sequences, other))
    assert torch.equal(first.train_end, again.train_end)
    assert not torch.equal(first.train_end, hold_out_users(sequences, share=0.3, seed=6).train_end)
    more = hold_out_users(sequences, share=0.5, seed=5)  # a larger share holds out the same users and others
    assert bool(((first.train_end == sequences.ptr[1:]) | (more.train_end == sequences.ptr[:-1])).all())


def slow_time_split(times: list[list[int]], share: float) -> tuple[list[int], list[int], list[int]]:
    """Events of each user that train, and the place of the one that validates and tests in its history, or -1."""
    everything = sorted(time for history in times for time in history)
    cuts = [everything[round(len(everything) * (1 - part))] for part in (share, share / 2)]
    trains, valid, test = [], [], []
    for history in times:
        trains.append(sum(time < cuts[0] for time in history))
        between = [i for i, time in enumerate(history) if cuts[0] <= time < cuts[1] and i > 0]
        behind = [i for i, time in enumerate(history) if time >= cuts[1] and i > 0]
        valid.append(between[0] if between and trains[-1] > 0 else -1)
        test.append(behind[0] if behind and sum(time < cuts[1] for time in history) > 0 else -1)
    return trains, valid, test


def timed(times: list[list[int]]) -> Sequences:
    world = make_world([len(history) for history in times])
    return replace(sequences_of(world), time=torch.tensor([time for history in times for time in history]))


@pytest.mark.parametrize("distinct", [10_000, 40, 12])  # the fewer times there are, the more events tie at a cut
def test_a_split_by_time_trains_on_nothing_from_its_cut_on(distinct):
    draw = torch.Generator().manual_seed(distinct)
    lengths = [*torch.randint(0, 12, (60,), generator=draw).tolist()]
    lengths.append(400 - sum(lengths) if sum(lengths) < 400 else 0)
    times = [sorted(torch.randint(0, distinct, (n,), generator=draw).tolist()) for n in lengths]
    sequences = timed(times)
    assert sequences.num_events == 400
    split = hold_out_time(sequences, share=0.25)
    trains, valid, test = slow_time_split(times, 0.25)
    check_split(sequences, split, trains)
    begin = sequences.ptr.tolist()
    assert split.valid.tolist() == [-1 if v < 0 else b + v for b, v in zip(begin, valid, strict=False)]
    assert split.test.tolist() == [-1 if t < 0 else b + t for b, t in zip(begin, test, strict=False)]
    assert sum(v >= 0 for v in valid) > 3
    assert sum(t >= 0 for t in test) > 3
    held = [time for history, n in zip(times, trains, strict=True) for time in history[n:]]
    assert len(held) >= 100  # a quarter, and what ties with its first
    assert max(time for history, n in zip(times, trains, strict=True) for time in history[:n]) < min(held)


def test_a_query_of_a_split_by_time_has_everything_before_it_as_its_history():
    times = [[0, 1, 2, 3, 14, 15, 18, 19], [4, 5, 16, 17], [6, 7, 8, 9], [10, 11, 12, 13]]
    sequences = timed(times)
    held = replace(sequences, held_out=hold_out_time(sequences, share=0.3))  # 14..16 validate, 17..19 test
    valid, test = (query_spans(held, stage, max_len=10) for stage in ("valid", "test"))
    assert valid.user.tolist() == test.user.tolist() == [0, 1]
    assert (valid.start.tolist(), valid.end.tolist()) == ([0, 8], [4, 10])
    assert (test.start.tolist(), test.end.tolist()) == ([0, 8], [6, 11])
    assert training_spans(held, max_len=10).end.tolist() == [3, 9, 15, 19]


def test_users_who_begin_after_a_cut_are_not_ranked_without_a_history():
    sequences = timed([[0, 1, 2, 3, 4, 5], [8, 9]])
    split = hold_out_time(sequences, share=0.25)  # cuts at 8 and 9
    assert split.train_end.tolist() == [6, 6]
    assert split.valid.tolist() == [-1, -1]
    assert split.test.tolist() == [-1, 7]  # the event at 8 is its history


def test_a_split_by_time_needs_times():
    with pytest.raises(ValueError, match="world has no times, so it cannot be split by time; use another --split"):
        hold_out_time(sequences_of(make_world(LENGTHS), times=False), share=0.1)


def test_the_whole_history_is_asked_about_whatever_is_held_out():
    sequences = sequences_of(make_world(LENGTHS))
    splits = [None, hold_out_users(sequences, share=0.5, seed=0), hold_out_time(sequences, share=0.5)]
    for split in splits:
        spans = query_spans(replace(sequences, held_out=split), "all", max_len=100)
        pairs = [(b, e) for b, e in pairwise(sequences.ptr.tolist()) if b < e]
        assert list(zip(spans.start.tolist(), spans.end.tolist(), strict=True)) == pairs


def test_batches_leave_the_sequences_as_they_were():
    world = make_world(LENGTHS)
    sequences, again = sequences_of(world), sequences_of(world)
    spans = query_spans(sequences, "all", max_len=MAX_LEN, front=True)
    batch = make_batch(sequences, spans, packed=True, row_len=MAX_LEN + 1, front=True)
    for whole in (True, False):
        compact(batch, num_items=sequences.num_items, whole=whole)
    for name in ("ptr", "item", "time", "action", "row"):
        assert torch.equal(getattr(sequences, name), getattr(again, name))
