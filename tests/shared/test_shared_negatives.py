"""Sampled negatives against a slow reader of the same streams and against the exact laws on tiny domains.

Chi-square statistics are compared with their mean plus some standard deviations of the distribution they should have;
all seeds are fixed, so that a test passes or fails for good. Axes as in shared/negatives.py.
"""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared import negatives
from shared.negatives import (
    NegativeSampler,
    Permutations,
    Popularity,
    draw,
    draw_pool,
    draw_popular,
    draw_shared,
    is_excluded,
    make_sampler,
    permutations,
    pool_bytes,
    pool_epoch,
    popularity,
    require_candidates,
    shared_excluded,
)
from shared.ranking import Lists
from shared.seed import fold

WRAP = 2**64


def lists(rows: list[list[int]], *, dtype: torch.dtype = torch.int32) -> Lists:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Lists(ends, torch.tensor([item for row in rows for item in sorted(row)], dtype=dtype))


def random_rows(num_rows: int, num_items: int, most: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.sample(range(num_items), rng.randint(0, most)) for _ in range(num_rows)]


def small(seed: int = 0, *, num_items: int = 40, most: int = 20) -> tuple[NegativeSampler, list[list[int]], list[int]]:
    """A sampler of 12 rows, their exclusions, and the candidates: 4 of 5 items."""
    rows = random_rows(12, num_items, most, seed=seed)
    candidates = [item for item in range(num_items) if item % 5 != 2]
    return make_sampler(lists(rows), num_items=num_items, candidates=torch.tensor(candidates)), rows, candidates


def batch(num_rows: int, size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and positions of a batch, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_rows, (size,), generator=generator), torch.randperm(10 * size, generator=generator)[:size]


# Slow readers of the same streams


def mixed(number: int) -> int:
    number %= WRAP
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % WRAP
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % WRAP
    return number ^ (number >> 31)


def hashed(key: int, position: int) -> int:
    return mixed(position * 0x9E3779B97F4A7C15 + key)


def plain_stream(tables: Permutations, position: int) -> list[int]:
    count = len(tables.first) // 2
    first, second, third = (table[:count].tolist() for table in (tables.first, tables.second, tables.third))
    number = hashed(tables.key, position)
    a, b = (number % 2**32 * count) >> 32, ((number >> 32) * count) >> 32
    c = (mixed(number + 0x9E3779B97F4A7C15) % 2**32 * count) >> 32
    return [third[(second[(first[(x + a) % count] + b) % count] + c) % count] for x in range(count)]


def plain_draw(tables: Permutations, excluded: list[int], position: int, num_negatives: int) -> list[int]:
    stream = plain_stream(tables, position)
    allowed = [item for item in stream if item not in excluded][:num_negatives]
    behind = [item for item in allowed if item not in stream[:num_negatives]]
    return [behind.pop() if item in excluded else item for item in stream[:num_negatives]]


def plain_popular(table: Popularity, candidates: list[int], excluded: list[int], number: int, num_negatives: int):
    """Skip what is excluded or repeated; when the draws are used up, draw the rest from the weights that are left."""
    end = table.end.tolist()
    taken: list[int] = []
    num_draws = (num_negatives + num_negatives // 2 + 16) * 2 ** (negatives._ROUNDS - 1)
    for draw_index in range(num_draws):
        point = mixed(number + draw_index * 0x9E3779B97F4A7C15) >> 24
        item = next(item for item, stop in zip(candidates, end, strict=True) if point < stop)
        if item not in excluded and item not in taken and len(taken) < num_negatives:
            taken.append(item)
    while len(taken) < num_negatives:
        weight = {
            item: stop - start
            for item, start, stop in zip(candidates, [0, *end], end, strict=False)
            if item not in excluded and item not in taken
        }
        point = mixed(number + (2 * num_draws + len(taken)) * 0x9E3779B97F4A7C15) >> 1
        point %= sum(weight.values())
        for item in weight:
            if point < weight[item]:
                taken.append(item)
                break
            point -= weight[item]
    return taken


def test_negatives_are_the_first_allowed_items_of_the_rows_stream():
    sampler, rows, _ = small()
    tables = permutations(sampler, seed=3, epoch=2)
    row_B, position_B = batch(len(rows), 60)
    for num_negatives in (1, 5, sampler.max_negatives):
        want = [
            plain_draw(tables, rows[row], position, num_negatives)
            for row, position in zip(row_B.tolist(), position_B.tolist(), strict=True)
        ]
        got = draw(sampler, tables, row_B, position_B, num_negatives)
        assert got.dtype == torch.int32
        assert got.tolist() == want


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_exclusions_and_candidates_give_the_first_allowed_items(data):
    num_items = data.draw(st.integers(1, 14))
    candidates = data.draw(st.sets(st.integers(0, num_items - 1), min_size=1))
    rows = data.draw(st.lists(st.sets(st.integers(0, num_items - 1)).map(list), min_size=1, max_size=5))
    sampler = make_sampler(lists(rows), num_items=num_items, candidates=torch.tensor(sorted(candidates)))
    if sampler.max_negatives < 1:
        with pytest.raises(ValueError, match="have fewer candidates left"):
            require_candidates(sampler, 1)
        return
    num_negatives = data.draw(st.integers(1, sampler.max_negatives))
    row_B = torch.tensor(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)), dtype=torch.int64)
    position_B = torch.tensor(data.draw(st.permutations(range(-4, 2**40, 2**37)))[: len(row_B)], dtype=torch.int64)
    tables = permutations(sampler, seed=data.draw(st.integers(-(2**70), 2**70)), epoch=data.draw(st.integers(0, 9)))
    got = draw(sampler, tables, row_B, position_B, num_negatives)
    assert got.shape == (len(row_B), num_negatives)
    for row, position, item_N in zip(row_B.tolist(), position_B.tolist(), got.tolist(), strict=True):
        assert item_N == plain_draw(tables, rows[row], position, num_negatives)
        assert len(set(item_N)) == num_negatives
        assert set(item_N) <= candidates - set(rows[row])


def test_popular_negatives_are_those_of_a_slow_reader_even_when_their_draws_are_used_up():
    sampler, rows, candidates = small(1)
    count_I = torch.arange(sampler.num_items) ** 4  # so uneven that rare items hardly ever come up
    table = popularity(sampler, count_I, 1.5)
    row_B, position_B = batch(len(rows), 40, seed=1)
    finished = 0
    for num_negatives in (1, 4, sampler.max_negatives):
        got = draw_popular(sampler, table, row_B, position_B, num_negatives, seed=5, epoch=6)
        key = fold(5, 6, negatives._WEIGHTED)
        want = [
            plain_popular(table, candidates, rows[row], hashed(key, position), num_negatives)
            for row, position in zip(row_B.tolist(), position_B.tolist(), strict=True)
        ]
        assert got.dtype == torch.int32
        assert got.tolist() == want
        finished += sum(len(set(item_N)) == num_negatives for item_N in want)
    assert finished == 3 * len(row_B)


# Exact laws on tiny domains


def assert_law(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> None:
    """Chi-square of the counts within 4 standard deviations of its mean, nothing outside the law."""
    total = sum(counts.values())
    assert set(counts) <= set(law)
    assert min(law.values()) * total > 5  # expected counts for which chi-square is chi-square
    statistic = sum((counts[key] - total * share) ** 2 / (total * share) for key, share in law.items())
    freedom = len(law) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def uniform_law(allowed: list[int], num_negatives: int) -> dict[tuple[int, ...], float]:
    outcomes: list[tuple[int, ...]] = list(itertools.permutations(allowed, num_negatives))
    return dict.fromkeys(outcomes, 1 / len(outcomes))


def successive_law(weight: dict[int, float], num_negatives: int) -> dict[tuple[int, ...], float]:
    law = {}
    for outcome in itertools.permutations(list(weight), num_negatives):
        share, left = 1.0, sum(weight.values())
        for item in outcome:
            share *= weight[item] / left
            left -= weight[item]
        law[outcome] = share
    return law


def test_chi_square_bound_catches_a_law_that_is_slightly_off():
    rng = random.Random(0)
    biased: Counter[tuple[int, ...]] = Counter()
    biased.update((item,) for item in rng.choices(range(10), [1.15, *[1.0] * 9], k=20_000))
    with pytest.raises(AssertionError):
        assert_law(biased, uniform_law(list(range(10)), 1))


def test_every_ordered_sample_is_equally_likely_even_when_hardly_anything_is_allowed():
    rows = [[], [0, 4, 7], [1, 2, 3, 5, 6, 9]]
    sampler = make_sampler(lists(rows), num_items=10, candidates=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in rows]
    for epoch in range(1800):  # one draw of a row per epoch: samples that are independent of one another
        tables = permutations(sampler, seed=11, epoch=epoch)
        for row, item_N in enumerate(draw(sampler, tables, torch.arange(3), torch.arange(3), 2).tolist()):
            counts[row][tuple(item_N)] += 1
    for count, excluded in zip(counts, rows, strict=True):
        assert_law(count, uniform_law([item for item in range(8) if item not in excluded], 2))


def test_all_allowed_items_come_in_uniformly_random_order():
    sampler = make_sampler(lists([[0, 2, 4, 6, 8]]), num_items=9)
    counts: Counter[tuple[int, ...]] = Counter()
    for epoch in range(1000):
        tables = permutations(sampler, seed=0, epoch=epoch)
        counts[tuple(draw(sampler, tables, torch.tensor([0]), torch.tensor([epoch % 7]), 4)[0].tolist())] += 1
    assert_law(counts, uniform_law([1, 3, 5, 7], 4))


def test_within_one_epoch_every_column_is_uniform_over_the_allowed_items():
    rows = [[0, 3, 4, 10, 17, 18], [1, 2]]
    sampler = make_sampler(lists(rows), num_items=23)
    tables = permutations(sampler, seed=4, epoch=0)
    size = 30_000
    got = draw(sampler, tables, torch.arange(size) % 2, torch.arange(size), 6)
    for row, excluded in enumerate(rows):
        law = uniform_law([item for item in range(23) if item not in excluded], 1)
        for column in range(6):
            assert_law(Counter((item,) for item in got[row::2, column].tolist()), law)


def test_two_rows_of_an_epoch_overlap_as_much_as_independent_ones():
    count, num_negatives = 60, 15
    sampler = make_sampler(lists([[]]), num_items=count)
    overlap = []
    for epoch in range(40):
        tables = permutations(sampler, seed=1, epoch=epoch)
        got = draw(sampler, tables, torch.zeros(200, dtype=torch.int64), torch.arange(200), num_negatives)
        has_BI = torch.zeros(200, count).scatter_(1, got.long(), 1.0)
        overlap.append((has_BI @ has_BI.T)[tuple(torch.triu_indices(200, 200, 1))])
    values = torch.cat(overlap).double()
    mean = num_negatives**2 / count
    variance = mean * (1 - num_negatives / count) ** 2 * count / (count - 1)  # hypergeometric
    assert abs(values.mean().item() - mean) < 0.02
    # One pair in count ** 2 has streams that are moved copies of each other, which shows a little at so few items.
    assert abs(values.var().item() / variance - 1) < 0.03


@pytest.mark.parametrize("power", [0.0, 0.75, 2.0])
def test_popular_negatives_follow_successive_sampling(power):
    count_I = torch.tensor([9, 0, 3, 1, 5, 2, 2])
    rows = [[], [4, 1]]
    sampler = make_sampler(lists(rows), num_items=7, candidates=torch.tensor([1, 2, 3, 4, 5, 6]))
    table = popularity(sampler, count_I, power)
    size = 40_000
    got = draw_popular(sampler, table, torch.arange(size) % 2, torch.arange(size), 2, seed=0, epoch=0)
    for row, excluded in enumerate(rows):
        weight = {item: max(int(count_I[item]), 1) ** power for item in range(1, 7) if item not in excluded}
        assert_law(Counter(tuple(pair) for pair in got[row::2].tolist()), successive_law(weight, 2))


def test_items_drawn_one_by_one_after_the_stream_follow_the_same_law(monkeypatch):
    monkeypatch.setattr(negatives, "_ROUNDS", 0)
    weight = {0: 1.0, 1: 2.0, 2: 4.0, 4: 8.0}
    sampler = make_sampler(lists([[3]]), num_items=5)
    table = popularity(sampler, torch.tensor([1, 2, 4, 100, 8]), 1.0)
    size = 20_000
    row_B = torch.zeros(size, dtype=torch.int64)
    got = draw_popular(sampler, table, row_B, torch.arange(size), 2, seed=1, epoch=0)
    assert_law(Counter(tuple(pair) for pair in got.tolist()), successive_law(weight, 2))


def test_a_stream_cut_off_anywhere_and_finished_one_by_one_has_the_law_of_the_whole(monkeypatch):
    def few_draws(*args):
        return real_draws(*args)[:, :2].contiguous()

    real_draws = negatives._weighted_draws
    monkeypatch.setattr(negatives, "_weighted_draws", few_draws)
    sampler = make_sampler(lists([[1]]), num_items=5)
    table = popularity(sampler, torch.tensor([1, 30, 2, 3, 6]), 1.0)
    size = 30_000
    row_B = torch.zeros(size, dtype=torch.int64)
    got = draw_popular(sampler, table, row_B, torch.arange(size), 3, seed=2, epoch=0)
    assert_law(Counter(tuple(item_N) for item_N in got.tolist()), successive_law({0: 1, 2: 2, 3: 3, 4: 6}, 3))


def test_weights_fill_the_range_and_slots_name_their_only_item():
    sampler = make_sampler(lists([[]]), num_items=300, candidates=torch.arange(0, 300, 2))
    count_I = torch.arange(300) % 37
    table = popularity(sampler, count_I, 0.75)
    weight = count_I[::2].double().clamp(min=1) ** 0.75
    got = table.end.diff(prepend=torch.tensor([0])).double() / 2**40
    assert table.end[-1] == 2**40
    assert torch.allclose(got, weight / weight.sum(), rtol=0, atol=2**-38 + 150 * 2**-40)
    size = 2**40 // len(table.slot)
    for slot, item in enumerate(table.slot.tolist()):
        first, last = torch.searchsorted(table.end, torch.tensor([slot * size, (slot + 1) * size - 1]), right=True)
        assert item == (2 * int(first) if first == last else -1)


def test_huge_counts_and_powers_leave_every_candidate_a_weight():
    sampler = make_sampler(lists([[]]), num_items=4)
    table = popularity(sampler, torch.tensor([10**12, 1, 0, 10**6]), 30.0)
    assert table.end.tolist() == [2**40 - 3, 2**40 - 2, 2**40 - 1, 2**40]
    got = draw_popular(sampler, table, torch.tensor([0, 0]), torch.tensor([0, 1]), 4, seed=0, epoch=0)
    assert got[:, 0].tolist() == [0, 0]
    assert got.sort(1).values.tolist() == [[0, 1, 2, 3]] * 2


# What a row's negatives do not depend on


def draws(sampler: NegativeSampler, row_B: Tensor, position_B: Tensor, num_negatives: int = 6) -> tuple[Tensor, Tensor]:
    tables = permutations(sampler, seed=9, epoch=1)
    table = popularity(sampler, torch.arange(sampler.num_items), 1.0)
    uniform = draw(sampler, tables, row_B, position_B, num_negatives)
    return uniform, draw_popular(sampler, table, row_B, position_B, num_negatives, seed=9, epoch=1)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cells", [1, 7, 50, 301])
def test_the_size_of_the_blocks_inside_changes_nothing(cells, monkeypatch):
    sampler, rows, _ = small()
    row_B, position_B = batch(len(rows), 90)
    want = draws(sampler, row_B, position_B)
    monkeypatch.setattr(negatives, "_CPU_CELLS", cells)
    assert_same(draws(sampler, row_B, position_B), want)


def test_order_and_company_of_the_rows_change_nothing():
    sampler, rows, _ = small()
    row_B, position_B = batch(len(rows), 90)
    want = draws(sampler, row_B, position_B)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    assert_same(draws(sampler, row_B[order], position_B[order]), (want[0][order], want[1][order]))
    for row in (0, 41, 89):
        alone = draws(sampler, row_B[row : row + 1], position_B[row : row + 1])
        assert_same(alone, (want[0][row : row + 1], want[1][row : row + 1]))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_draws_the_same_epoch(world):
    sampler, rows, _ = small()
    row_B, position_B = batch(len(rows), 90)
    want = draws(sampler, row_B, position_B)
    for rank in range(world):
        part = draws(sampler, row_B[rank::world], position_B[rank::world])
        assert_same(part, (want[0][rank::world], want[1][rank::world]))


def test_rows_searched_for_hits_get_the_same_as_rows_whose_exclusions_are_all_sent_back():
    rows = random_rows(12, 400, 300)
    lonely = make_sampler(lists(rows), num_items=400)
    # A thousand rows without exclusions tip the balance between the two ways, and change nothing else.
    crowd = make_sampler(lists(rows + [[]] * 1000), num_items=400)
    row_B, position_B = batch(len(rows), 200)
    for num_negatives in (1, 3):
        assert_same(
            draws(lonely, row_B, position_B, num_negatives)[:1] * 2,
            draws(crowd, row_B, position_B, num_negatives)[:1] * 2,
        )


def test_types_and_order_of_the_arguments_change_nothing():
    sampler, rows, candidates = small()
    row_B, position_B = batch(len(rows), 30)
    shuffled = torch.tensor(candidates[::-1], dtype=torch.int32)
    other = make_sampler(lists(rows, dtype=torch.int64), num_items=sampler.num_items, candidates=shuffled)
    assert_same(draws(other, row_B, position_B), draws(sampler, row_B, position_B))


def test_global_generators_are_neither_used_nor_moved():
    sampler, rows, _ = small()
    row_B, position_B = batch(len(rows), 30)
    torch.manual_seed(1)
    want = draws(sampler, row_B, position_B)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(draws(sampler, row_B, position_B), want)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_epoch_and_position_all_matter():
    sampler = make_sampler(lists([[]]), num_items=1000)
    table = popularity(sampler, torch.ones(1000), 1.0)
    row_B = torch.zeros(3, dtype=torch.int64)
    seen = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        tables = permutations(sampler, seed=seed, epoch=epoch)
        for item_N in draw(sampler, tables, row_B, torch.tensor([0, 1, 2**40]), 20).tolist():
            seen.add(tuple(item_N))
        for item_N in draw_popular(sampler, table, row_B, torch.tensor([0, 1, 2]), 20, seed=seed, epoch=epoch).tolist():
            seen.add(tuple(item_N))
    assert len(seen) == 2 * 3 * 3 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_bits_as_the_cpu():
    rows = random_rows(50, 700, 600)
    row_B, position_B = batch(len(rows), 300)
    host = make_sampler(lists(rows), num_items=700)
    device = make_sampler(lists(rows), num_items=700, device="cuda")
    for num_negatives in (1, 90):
        want = draws(host, row_B, position_B, num_negatives)
        got = draws(device, row_B.cuda(), position_B.cuda(), num_negatives)
        assert_same((got[0].cpu(), got[1].cpu()), want)
    tables, host_tables = (permutations(sampler, seed=0, epoch=0) for sampler in (device, host))
    item_N = draw_shared(device, tables, 3, 64)
    assert torch.equal(item_N.cpu(), draw_shared(host, host_tables, 3, 64))
    assert torch.equal(shared_excluded(device, row_B.cuda(), item_N).cpu(), shared_excluded(host, row_B, item_N.cpu()))


# Large, small and empty


def test_a_million_items_and_long_lists():
    num_items = 1_000_000
    rows = [sorted(random.Random(row).sample(range(num_items), size)) for row, size in enumerate((0, 1, 30, 20_000))]
    sampler = make_sampler(lists(rows), num_items=num_items, candidates=torch.arange(1000, num_items))
    tables = permutations(sampler, seed=1, epoch=0)
    row_B = torch.arange(64) % 4
    got = draw(sampler, tables, row_B, torch.arange(64), 300)
    for row, item_N in zip(row_B.tolist(), got.tolist(), strict=True):
        assert len(set(item_N) - set(rows[row])) == 300
    assert got.min() >= 1000
    assert got.max() < num_items
    assert abs(got.double().mean().item() - (num_items + 1000) / 2) < 5 * num_items / math.sqrt(12 * got.numel())
    assert got[8:12].tolist() == draw(sampler, tables, row_B[8:12], torch.arange(8, 12), 300).tolist()


def test_many_items_by_popularity():
    num_items = 200_000
    count_I = torch.ones(num_items)
    count_I[:100] = 200_000.0
    rows = [[], list(range(0, 100, 2))]
    sampler = make_sampler(lists(rows), num_items=num_items)
    got = draw_popular(
        sampler, popularity(sampler, count_I, 1.0), torch.arange(40) % 2, torch.arange(40), 8, seed=0, epoch=0
    )
    assert not is_excluded(sampler, torch.arange(40) % 2, got).any()
    assert (got.sort(1).values.diff(dim=1) > 0).all()
    assert (got < 100).double().mean() > 0.9  # 99 % of the weight, a little less after some are taken


def test_no_exclusions_at_all():
    sampler = make_sampler(Lists(torch.zeros(5, dtype=torch.int64), torch.empty(0, dtype=torch.int32)), num_items=10)
    assert sampler.max_negatives == 10
    uniform, popular = draws(sampler, torch.tensor([0, 3]), torch.tensor([5, 6]), 10)
    assert uniform.sort(1).values.tolist() == popular.sort(1).values.tolist() == [list(range(10))] * 2
    assert not is_excluded(sampler, torch.tensor([0, 3]), uniform).any()
    assert not shared_excluded(sampler, torch.tensor([0, 3]), torch.arange(4)).any()


def test_an_empty_batch_gives_an_empty_result():
    sampler, _, _ = small()
    empty = torch.empty(0, dtype=torch.int64)
    uniform, popular = draws(sampler, empty, empty, 7)
    assert uniform.shape == popular.shape == (0, 7)


# Exclusions themselves


def test_is_excluded_equals_looking_it_up():
    for seed, most in ((0, 20), (1, 3), (2, 1)):
        sampler, rows, candidates = small(seed, most=most)
        row_B = torch.arange(12).repeat(3)
        item_BN = torch.tensor(candidates, dtype=torch.int32).repeat(36, 1)
        want = [[item in rows[row] for item in candidates] for row in row_B.tolist()]
        assert is_excluded(sampler, row_B, item_BN).tolist() == want


def test_shared_negatives_are_distinct_candidates_and_marked_where_excluded():
    sampler, rows, candidates = small()
    tables = permutations(sampler, seed=2, epoch=3)
    row_B, _ = batch(len(rows), 20)
    for num_negatives in (1, 9, len(candidates)):
        item_N = draw_shared(sampler, tables, 4, num_negatives)
        assert item_N.dtype == torch.int32
        assert len(set(item_N.tolist())) == num_negatives
        assert set(item_N.tolist()) <= set(candidates)
        want = [[item in rows[row] for item in item_N.tolist()] for row in row_B.tolist()]
        assert shared_excluded(sampler, row_B, item_N).tolist() == want
        assert is_excluded(sampler, row_B, item_N.expand(20, -1)).tolist() == want


def test_shared_negatives_are_uniform_over_steps_and_apart_from_those_of_rows():
    sampler = make_sampler(lists([[0, 1]]), num_items=21)
    tables = permutations(sampler, seed=0, epoch=0)
    counts: Counter[tuple[int, ...]] = Counter()
    for step in range(3000):
        counts.update((item,) for item in draw_shared(sampler, tables, step, 3).tolist())
    assert_law(counts, uniform_law(list(range(21)), 1))
    free = make_sampler(lists([[]]), num_items=21)
    of_row = draw(free, permutations(free, seed=0, epoch=0), torch.tensor([0]), torch.tensor([5]), 12)[0]
    assert of_row.tolist() != draw_shared(free, permutations(free, seed=0, epoch=0), 5, 12).tolist()


# Pools


@pytest.mark.parametrize("chunk", [1, 13, 4096])
def test_a_pool_equals_what_is_drawn_for_the_same_rows(chunk):
    sampler, rows, _ = small()
    row_P, _ = batch(len(rows), 100)
    table = popularity(sampler, torch.arange(sampler.num_items), 1.0)
    uniform, popular = draws(sampler, row_P, torch.arange(100))
    done: list[int] = []
    pool = draw_pool(sampler, row_P.int(), 6, seed=9, epoch=1, chunk=chunk, on_rows=done.append)
    assert pool.dtype == torch.int16
    assert torch.equal(pool.int(), uniform)
    assert done == [*range(chunk, 100, chunk), 100]
    assert torch.equal(draw_pool(sampler, row_P, 6, seed=9, epoch=1, chunk=chunk, table=table).int(), popular)


def test_pools_of_many_items_are_int32():
    sampler = make_sampler(lists([[3]]), num_items=32768)
    pool = draw_pool(sampler, torch.zeros(3, dtype=torch.int32), 32000, seed=0, epoch=0)
    assert pool.dtype == torch.int32
    assert pool.max() > 32700
    assert pool.nbytes == pool_bytes(3, 32000, 32768)


def test_pool_bytes_of_the_movielens_pairs():
    as_int64 = 922_007 * 128 * 8
    assert as_int64 == 944_135_168
    assert pool_bytes(922_007, 128, 5_986) == as_int64 // 4 == 236_033_792
    assert pool_bytes(922_007, 128, 32_767) == as_int64 // 4
    assert pool_bytes(922_007, 128, 32_768) == as_int64 // 2 == 472_067_584


def test_pools_are_drawn_once_or_every_so_many_epochs():
    assert [pool_epoch(epoch, 0) for epoch in range(4)] == [0, 0, 0, 0]
    assert [pool_epoch(epoch, 1) for epoch in range(4)] == [0, 1, 2, 3]
    assert [pool_epoch(epoch, 3) for epoch in range(8)] == [0, 0, 0, 3, 3, 3, 6, 6]


# Errors


def test_too_few_candidates_name_how_many_rows_and_what_would_work():
    rows = [[], [0, 1, 2, 3], [1, 2, 3, 4, 5], [9]]
    sampler = make_sampler(lists(rows), num_items=10, candidates=torch.arange(8))
    require_candidates(sampler, 3)
    assert sampler.max_negatives == 3
    with pytest.raises(ValueError, match=r"^num_negatives is 5, but 2 of 4 rows \(users\) .* least: 3 of 8.* lower"):
        require_candidates(sampler, 5)


def test_a_batch_is_refused_only_for_its_own_rows():
    rows = [[], [0, 1, 2, 3], list(range(8))]
    sampler = make_sampler(lists(rows), num_items=8)
    table = popularity(sampler, torch.ones(8), 1.0)
    tables = permutations(sampler, seed=0, epoch=0)
    fine = torch.tensor([0, 1, 1])
    assert draw(sampler, tables, fine, torch.arange(3), 4)[1:].sort(1).values.tolist() == [[4, 5, 6, 7]] * 2
    draw_popular(sampler, table, fine, torch.arange(3), 4, seed=0, epoch=0)
    bad = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"1 of 2 rows .* least: 0 of 8.* leave out"):
        draw(sampler, tables, bad, torch.arange(2), 4)
    with pytest.raises(ValueError, match="1 of 2 rows"):
        draw_popular(sampler, table, bad, torch.arange(2), 4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="2 of 2 rows"):
        draw(sampler, tables, bad, torch.arange(2), 9)


@pytest.mark.parametrize("number", [0, -3])
def test_fewer_than_one_negative_is_an_error(number):
    sampler, _, _ = small()
    tables = permutations(sampler, seed=0, epoch=0)
    one = torch.zeros(1, dtype=torch.int64)
    for call in (
        lambda: require_candidates(sampler, number),
        lambda: draw(sampler, tables, one, one, number),
        lambda: draw_shared(sampler, tables, 0, number),
    ):
        with pytest.raises(ValueError, match=f"num_negatives is {number}"):
            call()
    with pytest.raises(ValueError, match="from 32 candidates"):
        draw_shared(sampler, tables, 0, 33)


@pytest.mark.parametrize(
    ("ptr", "item", "message"),
    [
        ([0, 1, 3], [1, 5], "must rise from 0 to the 2 items"),
        ([1, 2], [1, 5], "must rise from 0"),
        ([0, 2, 1, 2], [1, 5], "must rise from 0"),
        ([0, 0, 2, 3], [5, 1, 2], "does not rise within row 1"),
        ([0, 1, 4], [7, 1, 3, 3], "does not rise within row 1"),
        ([0, 2], [1, 8], "exclude.item holds id 8, expected 0 .. 7"),
        ([0, 2], [-1, 3], "exclude.item holds id -1"),
        ([0, 2], [1, 2**32 + 3], "exclude.item holds id 4294967299"),
    ],
)
def test_broken_exclusions_are_refused(ptr, item, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(Lists(torch.tensor(ptr), torch.tensor(item)), num_items=8)


@pytest.mark.parametrize(
    ("candidates", "message"),
    [([], "candidates is empty"), ([1, 2, 1], "an id twice"), ([3, 8], "holds id 8"), ([-2, 3], "holds id -2")],
)
def test_broken_candidates_are_refused(candidates, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(lists([[0]]), num_items=8, candidates=torch.tensor(candidates, dtype=torch.int64))


def test_impossible_sizes_and_powers_are_refused():
    with pytest.raises(ValueError, match="num_items is 0"):
        make_sampler(lists([[]]), num_items=0)
    sampler, _, _ = small()
    with pytest.raises(ValueError, match=r"count_I has shape \(3,\)"):
        popularity(sampler, torch.ones(3), 1.0)
    for power in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="power is"):
            popularity(sampler, torch.ones(sampler.num_items), power)
