"""Sparse re-ranking gives the distances of the formula with matrices of all pairs, in blocks of any size."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from apps.reid import rerank as module
from apps.reid.rerank import Weights, mean_weights, rerank_scores, transposed

BUDGET = 1 << 20


def dense_distances(query: Tensor, gallery: Tensor, k1: int, k2: int, lambda_: float) -> np.ndarray:
    """The paper's formula one image after another, with matrices of all pairs in float64."""
    x = torch.cat([query, gallery]).double().numpy()
    num_all, num_queries = len(x), len(query)
    plain = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    plain /= plain.max(axis=1, keepdims=True)
    order = np.argsort(plain, axis=1, kind="stable")

    def reciprocal(i: int, size: int) -> list[int]:
        return [j for j in order[i, :size] if i in order[j, :size]]

    v = np.zeros((num_all, num_all))
    for i in range(num_all):
        near = set(reciprocal(i, k1 + 1))
        grown = set(near)
        for j in near:
            others = set(reciprocal(j, round(k1 / 2) + 1))
            if len(others & near) > 2 / 3 * len(others):
                grown |= others
        for j in grown:
            v[i, j] = np.exp(-plain[i, j])
        v[i] /= v[i].sum()
    if k2 > 1:
        v = np.stack([v[order[i, :k2]].mean(axis=0) for i in range(num_all)])
    found = np.empty((num_queries, num_all - num_queries))
    for i in range(num_queries):
        for j in range(num_queries, num_all):
            m = sum(min(a, b) for a, b in zip(v[i], v[j], strict=True))
            found[i, j - num_queries] = (1 - lambda_) * (1 - m / (2 - m)) + lambda_ * plain[i, j]
    return found


def unit_vectors(count: int, *, people: int, seed: int, width: int = 6) -> Tensor:
    """Vectors around those of some people."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(people, width, generator=draw)
    of = torch.randint(people, (count,), generator=draw)
    return torch.nn.functional.normalize(centre[of] + 0.6 * torch.randn(count, width, generator=draw), dim=1)


def scores(query: Tensor, gallery: Tensor, k1: int, k2: int, lambda_: float, budget: int = BUDGET) -> Tensor:
    score_of = rerank_scores(query, gallery, k1=k1, k2=k2, lambda_=lambda_, budget_bytes=budget)
    return score_of(torch.arange(len(query)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 30)),
    k1=st.sampled_from([1, 2, 5, 7, 20]),
    k2=st.sampled_from([1, 2, 6, 9]),
    lambda_=st.sampled_from([0.0, 0.3, 1.0]),
    budget=st.sampled_from([1, 3000, BUDGET]),
)
def test_distances_are_those_of_the_dense_formula(seed, sizes, k1, k2, lambda_, budget):
    x = unit_vectors(sum(sizes), people=4, seed=seed)
    query, gallery = x[: sizes[0]], x[sizes[0] :]
    found = 1 - scores(query, gallery, k1, k2, lambda_, budget).double()
    np.testing.assert_allclose(found.numpy(), dense_distances(query, gallery, k1, k2, lambda_), atol=1e-5)


def test_the_defaults_on_more_images_and_rows_in_any_order():
    x = unit_vectors(90, people=5, seed=1)
    score_of = rerank_scores(x[:20], x[20:], k1=20, k2=6, lambda_=0.3, budget_bytes=20_000)
    expected = dense_distances(x[:20], x[20:], 20, 6, 0.3)
    for rows in ([3], [19, 0, 7], list(range(20))):
        found = 1 - score_of(torch.tensor(rows)).double()
        np.testing.assert_allclose(found.numpy(), expected[rows], atol=1e-5)


def test_neighbours_that_agree_lift_images_that_the_plain_distance_misses():
    people, per_person = 12, 12
    draw = torch.Generator().manual_seed(4)
    # images of a person lie along a line, so that the far ones are reached by way of those between
    start, direction = (torch.randn(people, 12, generator=draw) for _ in range(2))
    step = torch.linspace(0, 2.5, per_person)[:, None, None]
    x = torch.nn.functional.normalize((start + step * direction).flatten(0, 1), dim=1)
    identity = torch.arange(people).repeat(per_person)
    query, gallery = x[:people], x[people:]

    def precision(score_QG: Tensor) -> float:
        is_right = (identity[people:][score_QG.argsort(dim=1, descending=True)] == identity[:people, None]).double()
        at_hit = is_right.cumsum(1) / torch.arange(1, len(gallery) + 1) * is_right
        return float((at_hit.sum(1) / is_right.sum(1)).mean())

    assert precision(scores(query, gallery, 6, 3, 0.3)) > precision(query @ gallery.T) + 0.02


def test_no_tensor_is_as_large_as_all_pairs(monkeypatch: pytest.MonkeyPatch):
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.untyped_storage().nbytes())
            return found

    x = unit_vectors(1500, people=100, seed=2)
    with Watch():
        score_of = rerank_scores(x[:500], x[500:], k1=4, k2=2, lambda_=0.3, budget_bytes=1 << 18)
        score_of(torch.arange(10))
    assert largest < 1500 * 1500 * 4 // 4


def test_equal_images_do_not_divide_by_nothing():
    x = torch.nn.functional.normalize(torch.ones(9, 5), dim=1)
    found = scores(x[:2], x[2:], 3, 2, 0.3)
    assert bool(found.isfinite().all())
    assert float(found.min()) >= -1e-6
    assert float(found.max()) <= 1 + 1e-6


def test_an_empty_gallery_is_an_error():
    with pytest.raises(ValueError, match="gallery is empty"):
        rerank_scores(torch.ones(2, 3), torch.ones(0, 3), k1=2, k2=1, lambda_=0.3, budget_bytes=BUDGET)


# The sparse matrix


def sparse(dense: Tensor) -> Weights:
    row, column = dense.nonzero().unbind(1)
    count = torch.bincount(row, minlength=len(dense))
    return Weights(torch.cat([count.new_zeros(1), count.cumsum(0)]), column, dense[row, column])


def dense(weights: Weights, columns: int) -> Tensor:
    full = torch.zeros(weights.ptr.numel() - 1, columns)
    row = torch.repeat_interleave(weights.ptr.diff())
    full[row, weights.column] = weights.weight
    return full


@pytest.mark.parametrize("budget", [1, BUDGET])
def test_sparse_products_are_those_of_full_matrices(budget: int):
    draw = torch.Generator().manual_seed(0)
    full = torch.rand(7, 7, generator=draw) * (torch.rand(7, 7, generator=draw) < 0.4)
    full[3] = 0
    top = torch.randint(7, (7, 3), generator=draw)
    assert torch.equal(dense(transposed(sparse(full), columns=7), 7), full.T)
    assert torch.allclose(dense(mean_weights(sparse(full), top, budget_bytes=budget), 7), full[top].mean(1))
    found = module.overlaps(sparse(full), transposed(sparse(full), columns=7), 7, budget_bytes=budget)
    assert torch.allclose(found, torch.minimum(full[:, None], full[None]).sum(-1))
