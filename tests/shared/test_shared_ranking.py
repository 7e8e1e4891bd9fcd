"""Top-k lists, counted ranks and their metrics against slow loops over plain Python lists.

Embeddings are small integers wherever results are compared exactly: all scores are then exact and many are tied.
Axes as in shared/ranking.py: B rows, I items, D embedding dimension, N negatives.
"""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shared.ranking import (
    DEFAULT_BUDGET_BYTES,
    Lists,
    finish,
    metric_sums,
    metrics_from_ranks,
    rank_relevant,
    sampled_candidates_rank,
    take_rows,
    top_k,
)

NAN, INF = math.nan, math.inf
# From one score per chunk over cut items and whole rows to everything at once.
BUDGETS = (1, 16 * 2, 16 * 7, 16 * 40, 16 * 150, 16 * 500, 16 * 700, DEFAULT_BUDGET_BYTES)


def lists(rows: list[list[int]], *, dtype: torch.dtype = torch.int64) -> Lists:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return Lists(ends, torch.tensor([item for row in rows for item in row], dtype=dtype))


def plain_scores(query_BD: Tensor, item_ID: Tensor, bias_I: Tensor | None = None) -> list[list[float]]:
    bias = [0.0] * len(item_ID) if bias_I is None else bias_I.tolist()
    return [
        [sum(a * b for a, b in zip(query, item, strict=True)) + bias[i] for i, item in enumerate(item_ID.tolist())]
        for query in query_BD.tolist()
    ]


def plain_top_k(scores, exclude, k, first_item, candidates):
    result = []
    for row, seen in zip(scores, exclude, strict=True):
        open_items = [
            i
            for i in range(first_item, len(row))
            if candidates[i] and i not in seen and not math.isnan(row[i]) and row[i] > -INF
        ]
        best = sorted(open_items, key=lambda i: (-row[i], i))[:k]
        result.append([(row[i], i) for i in best] + [(-INF, -1)] * (k - len(best)))
    return result


def plain_ranks(scores, relevant, exclude, first_item, candidates):
    ranks = []
    for row, wanted, seen in zip(scores, relevant, exclude, strict=True):
        for target in wanted:
            rank = 1
            for i in range(len(row)):
                eligible = i in wanted or (i >= first_item and candidates[i] and i not in seen)
                if i != target and eligible and not row[i] < row[target]:
                    rank += 1
            ranks.append(rank)
    return ranks


def plain_metrics(rank_rows: list[list[int]], ks) -> dict[str, float]:
    rows = [row for row in rank_rows if row]
    result = {"users": float(len(rows))}
    for k in ks:
        hits = [[r for r in row if r <= k] for row in rows]
        ideal = [sum(1 / math.log2(1 + i) for i in range(1, min(k, len(row)) + 1)) for row in rows]
        gains = [sum(1 / math.log2(1 + r) for r in hit) for hit in hits]
        per_row = {
            "HR": [1.0 if hit else 0.0 for hit in hits],
            "NDCG": [gain / best for gain, best in zip(gains, ideal, strict=True)],
            "MRR": [1 / min(hit) if hit else 0.0 for hit in hits],
            "Recall": [len(hit) / len(row) for hit, row in zip(hits, rows, strict=True)],
            "Precision": [len(hit) / k for hit in hits],
        }
        result |= {f"{name}@{k}": sum(values) / len(rows) for name, values in per_row.items()}
    return result


@dataclass(frozen=True)
class Case:
    query: Tensor
    item: Tensor
    bias: Tensor | None
    relevant: list[list[int]]
    exclude: list[list[int]]
    first_item: int
    candidates: Tensor

    @property
    def options(self) -> dict[str, Any]:
        return {
            "exclude": lists(self.exclude),
            "first_item": self.first_item,
            "candidates": self.candidates,
            "bias_I": self.bias,
        }

    @property
    def scores(self) -> list[list[float]]:
        return plain_scores(self.query, self.item, self.bias)

    @property
    def restrictions(self) -> tuple[int, list[bool]]:
        return self.first_item, self.candidates.tolist()


def make_case(seed: int, *, rows: int = 40, items: int = 23, longest: int = 4, nan: bool = False) -> Case:
    """Tied scores; exclusions with repeats, the padding id and relevant items in them; some lists empty."""
    draw = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    first_item = min(seed % 3, items - 1)
    query = torch.randint(-2, 3, (rows, 3), generator=g).float()
    item = torch.randint(-2, 3, (items, 3), generator=g).float()
    if nan:
        item[torch.rand(items, generator=g) < 0.2] = NAN
        query[torch.rand(rows, generator=g) < 0.1, 0] = NAN
    return Case(
        query,
        item,
        torch.randint(-1, 2, (items,), generator=g).float() if seed % 2 else None,
        [draw.sample(range(first_item, items), min(draw.randint(0, longest), items - first_item)) for _ in range(rows)],
        [draw.choices(range(items), k=draw.choice((0, 3, items // 2, 2 * items))) for _ in range(rows)],
        first_item,
        torch.rand(items, generator=g) < (0.8 if seed % 4 else 2.0),
    )


def as_pairs(score_BK: Tensor, id_BK: Tensor) -> list[list[tuple[float, int]]]:
    return [list(zip(s, i, strict=True)) for s, i in zip(score_BK.tolist(), id_BK.tolist(), strict=True)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_top_k_equals_a_sorted_list_for_every_chunk_shape(budget, nan, k):
    case = make_case(3 if nan else 4, nan=nan)
    found = top_k(case.query, case.item, k=k, **case.options, budget_bytes=budget)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == torch.int64
    assert as_pairs(*found) == plain_top_k(case.scores, case.exclude, k, *case.restrictions)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("longest", [1, 6])
def test_ranks_equal_a_double_loop_for_every_chunk_shape(budget, nan, longest):
    case = make_case(5 if nan else 7, nan=nan, longest=longest)
    rank = rank_relevant(case.query, case.item, lists(case.relevant), **case.options, budget_bytes=budget)
    assert rank.dtype == torch.int64
    assert rank.tolist() == plain_ranks(case.scores, case.relevant, case.exclude, *case.restrictions)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 25),
    items=st.integers(1, 12),
    longest=st.integers(0, 8),
    nan=st.booleans(),
    k=st.integers(1, 14),
    cells=st.integers(0, 400),
)
def test_any_small_case_equals_the_loops(seed, rows, items, longest, nan, k, cells):
    case = make_case(seed, rows=rows, items=items, longest=longest, nan=nan)
    found = top_k(case.query, case.item, k=k, **case.options, budget_bytes=16 * cells)
    assert as_pairs(*found) == plain_top_k(case.scores, case.exclude, k, *case.restrictions)
    rank = rank_relevant(case.query, case.item, lists(case.relevant), **case.options, budget_bytes=16 * cells)
    assert rank.tolist() == plain_ranks(case.scores, case.relevant, case.exclude, *case.restrictions)


def test_nothing_larger_than_the_budget_is_allocated():
    class Largest(TorchFunctionMode):
        num_bytes = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else (result,):
                if isinstance(x, Tensor):
                    self.num_bytes = max(self.num_bytes, x.numel() * x.element_size())
            return result

    case = make_case(4, rows=50, items=200)  # tied, so that top_k's rows are done twice
    budget = 8_000
    assert 4 * budget < 4 * 50 * 200
    with Largest() as seen:
        top_k(case.query, case.item, k=5, candidates=case.candidates, budget_bytes=budget)
        rank_relevant(case.query, case.item, lists([[5]] * 50), candidates=case.candidates, budget_bytes=budget)
    assert 0 < seen.num_bytes <= budget


def test_top_k_prefers_the_smaller_of_tied_ids_inside_and_at_the_end_of_the_list():
    item_ID = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 3.0, 1.0])[:, None].repeat(300, 1)  # far beyond one vector of topk
    score, item = top_k(torch.ones(3, 1), item_ID, k=902)
    threes, twos = range(5, 2100, 7), sorted([*range(1, 2100, 7), *range(3, 2100, 7)])
    assert item.tolist() == [[*threes, *twos, 0, 2]] * 3
    assert score[0].tolist() == [3.0] * 300 + [2.0] * 600 + [1.0] * 2


def test_infinite_and_nan_scores_keep_their_place():
    bias = torch.tensor([1.0, INF, NAN, -INF, 2.0, INF])
    args = (torch.zeros(1, 2), torch.zeros(6, 2))
    score, item = top_k(*args, k=6, bias_I=bias)
    assert item.tolist() == [[1, 5, 4, 0, -1, -1]]
    assert score.tolist() == [[INF, INF, 2.0, 1.0, -INF, -INF]]
    ranks = [rank_relevant(*args, lists([[i]]), bias_I=bias).item() for i in range(6)]
    assert ranks == [5, 3, 6, 6, 4, 3]


def test_nan_target_gets_the_number_of_eligible_items_as_rank():
    bias = torch.tensor([0.0, NAN, 0.0, 1.0, 2.0])
    rank = rank_relevant(torch.zeros(1, 1), torch.zeros(5, 1), lists([[1]]), bias_I=bias, exclude=lists([[2, 2, 3]]))
    assert rank.tolist() == [3]


def test_target_in_its_own_exclusions_or_outside_the_candidates_is_ranked():
    query_BD, item_ID = torch.ones(2, 1), torch.tensor([[9.0], [3.0], [2.0], [1.0]])
    rank = rank_relevant(query_BD, item_ID, lists([[2], [2]]), exclude=lists([[2, 1], [2, 2]]), first_item=1)
    assert rank.tolist() == [1, 2]
    candidates = torch.tensor([True, False, False, True])
    assert rank_relevant(query_BD, item_ID, lists([[2], [1]]), candidates=candidates).tolist() == [2, 2]


def test_all_relevant_items_of_a_row_share_one_ranked_list_even_if_excluded():
    query_BD, item_ID = torch.ones(1, 1), torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    rank = rank_relevant(query_BD, item_ID, lists([[0, 1, 3]]), exclude=lists([[0, 1, 2]]))
    assert rank.tolist() == [1, 2, 3]
    assert metrics_from_ranks(rank, torch.tensor([0, 3]), ks=[3])["NDCG@3"] == 1.0


def test_tied_relevant_items_stand_in_each_others_way():
    rank = rank_relevant(torch.ones(1, 1), torch.ones(3, 1), lists([[0, 2]]))
    assert rank.tolist() == [3, 3]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("budget", BUDGETS)
def test_model_that_gives_all_items_one_vector_ranks_last(rows, budget):
    g = torch.Generator().manual_seed(rows)
    item_ID = torch.randn(1, 50, generator=g).repeat(101, 1)
    targets = lists([[100 - r] for r in range(rows)])
    rank = rank_relevant(torch.randn(rows, 50, generator=g), item_ID, targets, budget_bytes=budget)
    assert rank.tolist() == [101] * rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("budget", [16 * 50, DEFAULT_BUDGET_BYTES])
def test_other_float_types_are_scored_in_float32(dtype, budget):
    g = torch.Generator().manual_seed(1)
    query_BD, item_ID = (torch.randn(n, 16, generator=g).to(dtype) for n in (9, 31))
    bias_I = torch.randn(31, generator=g).to(dtype)
    relevant = lists([[i] for i in range(9)], dtype=torch.int32)
    same = (query_BD.float(), item_ID.float())
    score, item = top_k(query_BD, item_ID, k=7, bias_I=bias_I, budget_bytes=budget)
    expected_score, expected_item = top_k(*same, k=7, bias_I=bias_I.float(), budget_bytes=budget)
    assert torch.equal(score, expected_score)
    assert torch.equal(item, expected_item)
    assert score.dtype == torch.float32
    rank = rank_relevant(query_BD, item_ID, relevant, bias_I=bias_I, budget_bytes=budget)
    assert torch.equal(rank, rank_relevant(*same, relevant, bias_I=bias_I.float(), budget_bytes=budget))


@pytest.mark.parametrize("rows", [1, 6])
def test_autocast_and_gradients_change_nothing(rows):
    g = torch.Generator().manual_seed(2)
    query_BD, item_ID = torch.randn(rows, 16, generator=g), torch.randn(31, 16, generator=g)
    relevant = lists([[i] for i in range(rows)])
    expected = (*top_k(query_BD, item_ID, k=5), rank_relevant(query_BD, item_ID, relevant))
    weight = torch.nn.Parameter(item_ID)
    with torch.autocast("cpu", torch.bfloat16):
        found = (*top_k(query_BD, weight, k=5), rank_relevant(query_BD, weight, relevant))
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(found, expected, strict=True))


def test_arguments_are_left_as_they_were():
    case = make_case(7)
    before = [x.clone() for x in (case.query, case.item, case.candidates)]
    top_k(case.query, case.item, k=3, **case.options)
    rank_relevant(case.query, case.item, lists(case.relevant), **case.options)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.query, case.item, case.candidates), strict=True))


def test_without_ties_a_rank_is_the_place_in_the_top_k_list():
    g = torch.Generator().manual_seed(3)
    query_BD, item_ID = torch.randn(20, 8, generator=g), torch.randn(50, 8, generator=g)
    relevant = lists([[(7 * r) % 49 + 1] for r in range(20)])
    _, item = top_k(query_BD, item_ID, k=49, first_item=1)
    place = (item == relevant.item[:, None]).int().argmax(1) + 1
    assert torch.equal(rank_relevant(query_BD, item_ID, relevant, first_item=1), place)


def test_no_rows_no_relevant_items_and_no_items_give_empty_results():
    item_ID = torch.ones(4, 2)
    assert rank_relevant(torch.ones(2, 2), item_ID, lists([[], []])).shape == (0,)
    assert rank_relevant(torch.ones(0, 2), item_ID, lists([])).shape == (0,)
    assert [x.shape for x in top_k(torch.ones(0, 2), item_ID, k=3)] == [(0, 3), (0, 3)]
    assert top_k(torch.ones(1, 2), torch.ones(0, 2), k=2)[1].tolist() == [[-1, -1]]
    assert sampled_candidates_rank(torch.ones(0, 2), item_ID, torch.ones(0).long(), torch.ones(0, 9).long()).shape == (
        0,
    )


def test_take_rows_takes_any_rows_in_any_order():
    rows = [[4, 4], [], [1, 2, 3], [9]]
    taken = take_rows(lists(rows, dtype=torch.int32), torch.tensor([2, 0, 1, 2]))
    assert taken.ptr.tolist() == [0, 3, 5, 5, 8]
    assert taken.item.tolist() == [1, 2, 3, 4, 4, 1, 2, 3]
    assert taken.item.dtype == torch.int32
    none = take_rows(lists(rows), torch.tensor([], dtype=torch.int64))
    assert (none.ptr.tolist(), none.item.tolist()) == ([0], [])


@pytest.mark.parametrize("budget", [1, 16 * 100, DEFAULT_BUDGET_BYTES])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sampled_rank_equals_a_loop(budget, nan, bias):
    case = make_case(9, nan=nan)
    g = torch.Generator().manual_seed(4)
    target_B = torch.randint(0, 23, (40,), generator=g)
    negative_BN = torch.randint(0, 23, (40, 12), generator=g)  # repeats, and the target itself
    bias_I = case.bias if bias else None
    expected = [
        1 + sum(1 for n in negatives if n != target and not row[n] < row[target])
        for row, target, negatives in zip(
            plain_scores(case.query, case.item, bias_I), target_B.tolist(), negative_BN.tolist(), strict=True
        )
    ]
    rank = sampled_candidates_rank(case.query, case.item, target_B, negative_BN, bias_I=bias_I, budget_bytes=budget)
    assert rank.tolist() == expected


def test_sampled_rank_scores_half_precision_in_float32():
    g = torch.Generator().manual_seed(5)
    query_BD, item_ID = (torch.randn(n, 16, generator=g).half() for n in (9, 31))
    target_B, negative_BN = torch.arange(9), torch.randint(0, 31, (9, 20), generator=g)
    rank = sampled_candidates_rank(query_BD, item_ID, target_B, negative_BN)
    assert torch.equal(rank, sampled_candidates_rank(query_BD.float(), item_ID.float(), target_B, negative_BN))


def test_metrics_of_a_table_made_by_hand():
    # Row 0: one relevant item at rank 2. Row 1: none. Row 2: three relevant items at ranks 7, 1, 3.
    found = metrics_from_ranks(torch.tensor([2, 7, 1, 3]), torch.tensor([0, 1, 1, 4]), ks=[1, 3])
    second, third = 1 / math.log2(3), 1 / 2
    expected = {
        "users": 2.0,
        "HR@1": 0.5,
        "NDCG@1": 0.5,
        "MRR@1": 0.5,
        "Recall@1": (0 + 1 / 3) / 2,
        "Precision@1": 0.5,
        "HR@3": 1.0,
        "NDCG@3": (second + (1 + third) / (1 + second + third)) / 2,
        "MRR@3": (1 / 2 + 1) / 2,
        "Recall@3": (1 + 2 / 3) / 2,
        "Precision@3": (1 / 3 + 2 / 3) / 2,
    }
    assert found == pytest.approx(expected, abs=1e-11)
    assert list(found) == list(expected)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.lists(st.lists(st.integers(1, 30), max_size=5), min_size=1, max_size=12).filter(any))
def test_metrics_equal_a_loop(rows):
    ks = (1, 2, 5, 10, 40)
    given_ranks = lists(rows)
    found = metrics_from_ranks(given_ranks.item, given_ranks.ptr, ks=ks)
    expected = plain_metrics(rows, ks)
    assert found == pytest.approx(expected, abs=1e-11)
    assert all(found[name] == value for name, value in expected.items() if name.startswith(("HR", "users")))


def test_perfect_ranks_score_exactly_one():
    perfect = lists([list(range(1, n + 1)) for n in range(1, 60)])
    found = metrics_from_ranks(perfect.item, perfect.ptr, ks=[1, 10, 100])
    assert [found[f"NDCG@{k}"] for k in (1, 10, 100)] == [1.0, 1.0, 1.0]
    assert found["Recall@100"] == 1.0


def test_sums_of_parts_add_up_to_the_last_bit():
    draw = random.Random(6)
    rows = [[draw.randint(1, 60) for _ in range(draw.randint(0, 7))] for _ in range(500)]
    whole = metric_sums(lists(rows).item, lists(rows).ptr, ks=[5, 20])
    assert all(value.dtype == torch.float64 and value.shape == () for value in whole.values())
    for cuts in ([0, 1, 2, 500], [0, 0, 123, 321, 500], [0, 499, 500]):
        parts = [lists(rows[a:b]) for a, b in itertools.pairwise(cuts)]
        sums = [metric_sums(part.item, part.ptr, ks=[5, 20]) for part in reversed(parts)]
        added = {name: sum((s[name] for s in sums[1:]), sums[0][name]) for name in whole}
        assert finish(added) == finish(whole)


def test_nothing_to_average_is_an_error():
    sums = metric_sums(torch.tensor([], dtype=torch.int64), torch.tensor([0, 0, 0]), ks=[10])
    assert sums["users"] == 0
    with pytest.raises(ValueError, match="no row has a relevant item"):
        finish(sums)


@pytest.mark.parametrize("item", [-1, 5])
def test_item_ids_outside_the_item_matrix_are_named(item):
    args = (torch.ones(1, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match=rf"exclude.item holds id {item}, expected 0 \.\. 4"):
        top_k(*args, k=1, exclude=lists([[2, item]]))
    with pytest.raises(ValueError, match=rf"relevant.item holds id {item}, expected 0 \.\. 4"):
        rank_relevant(*args, lists([[2, item]]))
    with pytest.raises(ValueError, match=rf"target and negatives holds id {item}, expected 0 \.\. 4"):
        sampled_candidates_rank(*args, torch.tensor([2]), torch.tensor([[1, item]]))


def test_padding_as_relevant_item_is_named():
    with pytest.raises(ValueError, match=r"relevant.item holds id 0, expected 1 \.\. 4"):
        rank_relevant(torch.ones(1, 2), torch.ones(5, 2), lists([[0]]), first_item=1)


@pytest.mark.parametrize("ptr", [[0, 2], [0, 1, 3], [1, 1, 2], [0, 3, 2]])
def test_lists_that_do_not_fit_the_rows_are_refused(ptr):
    bad = Lists(torch.tensor(ptr), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"relevant.ptr (has shape|runs from)"):
        rank_relevant(torch.ones(2, 2), torch.ones(5, 2), bad)
    with pytest.raises(ValueError, match=r"exclude.ptr (has shape|runs from)"):
        top_k(torch.ones(2, 2), torch.ones(5, 2), k=1, exclude=bad)


def test_wrong_sizes_are_named():
    args = (torch.ones(1, 2), torch.ones(5, 2))
    with pytest.raises(ValueError, match="k is 0"):
        top_k(*args, k=0)
    with pytest.raises(ValueError, match=r"bias_I has shape \(4,\); 5 items need \(5,\)"):
        top_k(*args, k=1, bias_I=torch.zeros(4))
    with pytest.raises(ValueError, match=r"candidates has shape \(6,\)"):
        rank_relevant(*args, lists([[1]]), candidates=torch.ones(6, dtype=torch.bool))
    for ks in ([], [5, 0]):
        with pytest.raises(ValueError, match="ks is"):
            metrics_from_ranks(torch.tensor([1]), torch.tensor([0, 1]), ks=ks)
    with pytest.raises(ValueError, match="ptr ends at 2 but there are 1 ranks"):
        metrics_from_ranks(torch.tensor([1]), torch.tensor([0, 2]), ks=[5])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("budget", [16 * 7, 16 * 500, DEFAULT_BUDGET_BYTES])
def test_cuda_gives_the_results_of_the_loops(nan, budget):
    case = make_case(3, nan=nan)
    options = {
        "exclude": Lists(*(x.cuda() for x in lists(case.exclude))),
        "first_item": case.first_item,
        "candidates": case.candidates.cuda(),
        "bias_I": case.bias.cuda() if case.bias is not None else None,
        "budget_bytes": budget,
    }
    query_BD, item_ID = case.query.cuda(), case.item.cuda()
    found = top_k(query_BD, item_ID, k=6, **options)
    assert as_pairs(*found) == plain_top_k(case.scores, case.exclude, 6, *case.restrictions)
    relevant = Lists(*(x.cuda() for x in lists(case.relevant)))
    rank = rank_relevant(query_BD, item_ID, relevant, **options)
    expected = plain_ranks(case.scores, case.relevant, case.exclude, *case.restrictions)
    assert rank.tolist() == expected
    on_cpu = metrics_from_ranks(torch.tensor(expected), relevant.ptr.cpu(), ks=[1, 5])
    assert metrics_from_ranks(rank, relevant.ptr, ks=[1, 5]) == on_cpu
