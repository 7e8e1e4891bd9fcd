"""Splits, windows, packing and batches, against slow loops over Python lists."""

import random
from itertools import pairwise

import pytest
import torch

from apps.seqrec.dataset import (
    Sequences,
    Stage,
    best_fit_rows,
    draw_unseen,
    epoch_order,
    history_end,
    item_counts,
    make_batch,
    query_spans,
    seen_items,
    training_spans,
)


def make_sequences(lengths: list[int], num_items: int = 30, seed: int = 0, times: bool = True) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    events = int(ptr[-1])
    return Sequences(
        ptr=ptr,
        item=torch.randint(1, num_items + 1, (events,), generator=generator, dtype=torch.int32),
        time=torch.arange(events) * 60 if times else None,
        item_ids=tuple(f"i{i}" for i in range(1, num_items + 1)),
        user_ids=tuple(f"u{u}" for u in range(len(lengths))),
        fingerprint="test",
        name="test",
    )


LENGTHS = [1, 2, 3, 4, 9, 17, 3, 40, 25, 6]


def histories(sequences: Sequences) -> list[list[int]]:
    ptr = sequences.ptr.tolist()
    items = sequences.item.tolist()
    return [items[a:b] for a, b in pairwise(ptr)]


@pytest.mark.parametrize("packed", [True, False])
def test_a_training_batch_holds_each_users_last_inputs_and_the_items_that_followed(packed):
    sequences = make_sequences(LENGTHS)
    max_len = 8
    spans = training_spans(sequences, max_len=max_len)
    batch = make_batch(sequences, spans, packed=packed, row_len=max_len)
    expected = {}
    for user, history in enumerate(histories(sequences)):
        train = history[:-2] if len(history) >= 3 else history
        if len(train) >= 2:
            expected[user] = (train[:-1][-max_len:], train[1:][-max_len:])
    assert batch.user.tolist() == list(expected)
    item, segment = batch.item.flatten(), batch.segment.flatten()
    for index, user in enumerate(expected):
        places = torch.nonzero(segment == index + 1).squeeze(1)
        inputs, targets = expected[user]
        assert places.tolist() == list(range(int(places[0]), int(places[0]) + len(inputs)))
        assert int(places[0]) // batch.item.shape[1] == int(places[-1]) // batch.item.shape[1]
        assert item[places].tolist() == inputs
        assert batch.position.flatten()[places].tolist() == list(range(len(inputs)))[::-1]
        assert int(batch.last[index]) == int(places[-1])
        mine = torch.isin(batch.place, places)
        assert batch.place[mine].tolist() == places.tolist()
        assert batch.target[mine].tolist() == targets
        assert batch.time is not None
        steps = batch.time.flatten()[places]
        assert bool((steps[1:] - steps[:-1] == 60).all())
    assert bool((item[segment == 0] == 0).all())
    assert int((segment > 0).sum()) == sum(len(inputs) for inputs, _ in expected.values())


def test_validation_and_test_queries_end_before_their_targets():
    sequences = make_sequences(LENGTHS)
    cases: tuple[tuple[Stage, int], ...] = (("valid", 2), ("test", 1))
    for stage, held_out in cases:
        spans = query_spans(sequences, stage, max_len=5)
        users = [u for u, n in enumerate(LENGTHS) if n >= 3]
        assert spans.user.tolist() == users
        batch = make_batch(sequences, spans, packed=True, row_len=5)
        for index, user in enumerate(users):
            history = histories(sequences)[user]
            assert int(sequences.item[spans.end[index]]) == history[-held_out]
            places = torch.nonzero(batch.segment.flatten() == index + 1).squeeze(1)
            assert batch.item.flatten()[places].tolist() == history[:-held_out][-5:]


def test_prediction_sees_the_whole_history_of_every_user_and_has_no_target_at_its_end():
    sequences = make_sequences(LENGTHS)
    spans = query_spans(sequences, "all", max_len=50)
    batch = make_batch(sequences, spans, packed=True, row_len=50)
    assert spans.end.tolist() == sequences.ptr[1:].tolist()
    assert batch.target.numel() == sequences.num_events - len(LENGTHS)
    assert not bool(torch.isin(batch.last, batch.place).any())


def test_held_out_events_never_train():
    sequences = make_sequences(LENGTHS)
    for window in ("last", "random", "all"):
        for epoch in range(5):
            spans = training_spans(sequences, max_len=4, window=window, epoch=epoch)
            last_target = history_end(sequences, "train")[spans.user] - 1
            assert bool((spans.end <= last_target).all())
            assert bool((spans.start >= sequences.ptr[spans.user]).all())
            assert bool((spans.end - spans.start <= 4).all())


def test_all_windows_cover_every_training_target_exactly_once():
    sequences = make_sequences(LENGTHS)
    spans = training_spans(sequences, max_len=4, window="all")
    targets = [t for a, b in zip(spans.start.tolist(), spans.end.tolist(), strict=True) for t in range(a + 1, b + 1)]
    expected = []
    for first, end in zip(sequences.ptr.tolist(), history_end(sequences, "train").tolist(), strict=False):
        expected += list(range(first + 1, end))
    assert sorted(targets) == sorted(expected)


def test_random_windows_change_with_the_epoch_only_for_long_histories_and_reach_every_event():
    sequences = make_sequences(LENGTHS)
    draws = [training_spans(sequences, max_len=10, window="random", seed=3, epoch=e) for e in range(200)]
    again = training_spans(sequences, max_len=10, window="random", seed=3, epoch=7)
    assert torch.equal(draws[7].end, again.end)
    ends = torch.stack([d.end for d in draws])
    longest = draws[0].user.tolist().index(7)
    first, last = int(sequences.ptr[7]) + 10, int(sequences.ptr[8]) - 3
    assert set(ends[:, longest].tolist()) == set(range(first, last + 1))
    short = draws[0].user.tolist().index(4)
    assert len(set(ends[:, short].tolist())) == 1


def test_packing_never_splits_or_overlaps_and_uses_few_rows():
    generator = random.Random(0)
    for _ in range(50):
        row_len = generator.randint(5, 60)
        lengths = [generator.randint(1, row_len) for _ in range(generator.randint(1, 80))]
        row, column, num_rows = best_fit_rows(lengths, row_len)
        used = [[False] * row_len for _ in range(num_rows)]
        for r, c, n in zip(row, column, lengths, strict=True):
            assert c + n <= row_len
            for k in range(c, c + n):
                assert not used[r][k]
                used[r][k] = True
        assert num_rows <= 1 + 1.5 * sum(lengths) / row_len + sum(n > row_len / 2 for n in lengths) * 0.5


def test_an_epoch_visits_every_piece_once_in_an_order_that_depends_on_seed_and_epoch():
    order = epoch_order(100, seed=1, epoch=2)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, epoch_order(100, seed=1, epoch=2))
    assert not torch.equal(order, epoch_order(100, seed=1, epoch=3))
    assert not torch.equal(order, epoch_order(100, seed=2, epoch=2))


def test_item_counts_leave_the_held_out_events_out():
    sequences = make_sequences(LENGTHS)
    expected = [0] * (sequences.num_items + 1)
    for history in histories(sequences):
        for item in history[:-2] if len(history) >= 3 else history:
            expected[item] += 1
    assert item_counts(sequences).tolist() == expected


def test_unseen_draws_are_uniform_over_exactly_the_unseen_items():
    sequences = make_sequences([30, 5, 12], num_items=12, seed=4)
    seen = seen_items(sequences, "train")
    user = torch.arange(3).repeat_interleave(60_000)
    draws = draw_unseen(seen, user, torch.Generator().manual_seed(0))
    for u, history in enumerate(histories(sequences)):
        allowed = sorted(set(range(1, 13)) - set(history[:-2]))
        counts = torch.bincount(draws[user == u], minlength=13).double()
        if not allowed:
            continue
        assert [i for i in range(13) if counts[i]] == allowed
        expected = 60_000 / len(allowed)
        chi_square = float(((counts[allowed] - expected) ** 2 / expected).sum())
        assert chi_square < 3 * len(allowed) + 15


def test_a_user_who_has_seen_everything_gets_an_item_in_range():
    sequences = make_sequences([200], num_items=4)
    draws = draw_unseen(seen_items(sequences), torch.zeros(50, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert bool(((draws >= 1) & (draws <= 4)).all())


def test_an_unknown_window_is_named():
    with pytest.raises(ValueError, match=r'"first".*last, random or all'):
        training_spans(make_sequences([5]), max_len=3, window="first")
