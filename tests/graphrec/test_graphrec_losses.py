"""Every loss against loops over pairs in float64, values and gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.graphrec import losses


def rows(count: int, width: int = 5, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).requires_grad_()


def mask(height: int, width: int, *, seed: int = 9) -> Tensor:
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.3


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


def assert_same(found: Tensor, wanted: Tensor, *inputs: Tensor) -> None:
    """The same value and the same gradients."""
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(found, *inputs), gradients(wanted, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def cross_entropy_of_lists(lists: list[list[Tensor]]) -> Tensor:
    """The mean over lists of -log of the first one's share of the exponentials."""
    return torch.stack([-torch.log(x[0].exp() / torch.stack(x).exp().sum()) for x in lists]).mean()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, the fewest there are."""
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("biased", [False, True])
def test_shared_softmax_is_the_loop_over_pairs_and_negatives(biased):
    query, positive, negative = rows(37, seed=1), rows(37, seed=2), rows(11, seed=3)
    excluded = mask(37, 11)
    bias_B = rows(37, 1, seed=4).detach()[:, 0] if biased else None
    bias_K = rows(11, 1, seed=5).detach()[:, 0] if biased else None
    found = losses.shared_softmax(query, positive, negative, excluded, temperature=0.7, bias_B=bias_B, bias_K=bias_K)
    lists = []
    for b in range(37):
        mine = [query[b] @ positive[b] / 0.7 + (bias_B[b] if bias_B is not None else 0)]
        for k in range(11):
            if not excluded[b, k]:
                mine.append(query[b] @ negative[k] / 0.7 + (bias_K[k] if bias_K is not None else 0))
        lists.append(mine)
    assert_same(found, cross_entropy_of_lists(lists), query, positive, negative)


def test_shared_softmax_over_all_items_is_the_full_softmax():
    query, item = rows(8, seed=1), rows(12, seed=2)
    target = torch.tensor([0, 3, 3, 5, 11, 7, 1, 2])
    excluded = F.one_hot(target, 12).bool()
    found = losses.shared_softmax(query, F.embedding(target, item), item, excluded, temperature=0.5)
    assert_same(found, F.cross_entropy(query @ item.t() / 0.5, target), query, item)


def test_shared_softmax_with_every_negative_left_out_is_zero():
    query, positive, negative = rows(3, seed=1), rows(3, seed=2), rows(4, seed=3)
    everything = torch.ones(3, 4, dtype=torch.bool)
    value = losses.shared_softmax(query, positive, negative, everything, temperature=1.0)
    assert value.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(value, query, positive, negative))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("limit", [0, 1000], ids=["gathered", "by matrix"])
def test_picked_scores_are_dot_products_either_way(limit, monkeypatch):
    monkeypatch.setattr(losses, "CHEAP_MATRIX", limit)
    query, table = rows(33, seed=1), rows(9, seed=2)
    index = torch.randint(9, (33, 4), generator=torch.Generator().manual_seed(3))
    weight = rows(33, 4, seed=4).detach()
    found = losses.picked_scores(query, table, index)
    wanted = torch.stack([torch.stack([query[b] @ table[i] for i in index[b].tolist()]) for b in range(33)])
    torch.testing.assert_close(found, wanted)
    assert_same((found * weight).sum(), (wanted * weight).sum(), query, table)


def test_softmax_and_bpr_leave_excluded_negatives_out():
    score, excluded = rows(6, 8, seed=1), mask(6, 7)
    allowed = [[k for k in range(7) if not excluded[b, k]] for b in range(6)]
    wanted = cross_entropy_of_lists([[score[b, 0], *(score[b, 1 + k] for k in allowed[b])] for b in range(6)])
    assert_same(losses.softmax(score[:, 0], score[:, 1:], excluded), wanted, score)
    pairs = [
        torch.stack([torch.log1p((score[b, 1 + k] - score[b, 0]).exp()) for k in allowed[b]]).mean() for b in range(6)
    ]
    assert_same(losses.bpr(score[:, 0], score[:, 1:], excluded), torch.stack(pairs).mean(), score)


def test_softmax_and_bpr_of_all_negatives():
    score = rows(6, 8, seed=1)
    nothing = torch.zeros(6, 7, dtype=torch.bool)
    for loss in (losses.softmax, losses.bpr):
        assert_same(loss(score[:, 0], score[:, 1:], None), loss(score[:, 0], score[:, 1:], nothing), score)


def test_losses_stay_finite_for_huge_scores():
    score = torch.tensor([[0.0, 1e5, -1e5], [-1e5, 1e5, 0.0]], dtype=torch.float64, requires_grad=True)
    for value in (losses.softmax(score[:, 0], score[:, 1:], None), losses.bpr(score[:, 0], score[:, 1:], None)):
        assert math.isfinite(float(value.detach()))
        assert gradients(value, score)[0].isfinite().all()


def test_alignment_is_the_mean_squared_distance_of_unit_vectors():
    user, item = rows(7, seed=1), rows(7, seed=2)
    pairs = [(F.normalize(user[b], dim=0) - F.normalize(item[b], dim=0)).square().sum() for b in range(7)]
    assert_same(losses.alignment(user, item), torch.stack(pairs).mean(), user, item)


def test_uniformity_is_the_log_of_the_mean_kernel_over_pairs_of_rows():
    x = rows(7, seed=1)
    unit = [F.normalize(row, dim=0) for row in x]
    kernels = [(-2 * (a - b).square().sum()).exp() for a, b in itertools.combinations(unit, 2)]
    assert_same(losses.uniformity(x), torch.log(torch.stack(kernels).mean()), x)


def test_uniformity_of_one_vector_is_zero():
    assert losses.uniformity(rows(1, seed=1)).item() == 0.0


def test_contrast_is_the_cross_entropy_of_a_nodes_own_other_view():
    anchor, view = rows(6, seed=1), rows(6, seed=2)
    a, v = F.normalize(anchor, dim=1), F.normalize(view, dim=1)
    lists = [[a[r] @ v[r] / 0.3, *(a[r] @ v[s] / 0.3 for s in range(6) if s != r)] for r in range(6)]
    assert_same(losses.contrast(anchor, view, temperature=0.3), cross_entropy_of_lists(lists), anchor, view)


def test_penalties_are_means_over_the_rows_of_a_batch():
    table, user = rows(9, seed=1), rows(4, seed=2)
    first, second = torch.tensor([0, 0, 3]), torch.tensor([[5, 8], [1, 5]])
    squares = [[table[i].square().sum() for i in part.flatten().tolist()] for part in (first, second)]
    wanted = 0.5 * (torch.stack(squares[0]).mean() + torch.stack(squares[1]).mean())
    assert_same(losses.half_square_norm(table, first, second), wanted, table)
    norms = [torch.stack([row.norm() for row in part]).mean() for part in (user, table[second.flatten()])]
    assert_same(losses.mean_norm(user, table, second), 0.5 * (norms[0] + norms[1]), user, table)


def test_penalty_of_a_zero_vector_has_a_zero_gradient():
    table = torch.zeros(3, 2, requires_grad=True)
    user = torch.zeros(2, 2, requires_grad=True)
    value = losses.mean_norm(user, table, torch.tensor([[0], [2]]))
    assert all(not gradient.any() for gradient in gradients(value, user, table))


def clcrec_loop(
    user: Tensor, ids: Tensor, content: Tensor, item: Tensor, replaced: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """L1 and L2 over lists of items, one pair at a time."""
    unit_content = F.normalize(content, dim=1)
    first, second = [], []
    for b, places in enumerate(item.tolist()):
        anchor = F.normalize(ids[places[0]], dim=0)
        first.append([anchor @ unit_content[i] / temperature for i in places])
        mixed = [content[i] if replaced[b, m] else ids[i] for m, i in enumerate(places)]
        second.append([user[b] @ vector / temperature for vector in mixed])
    return cross_entropy_of_lists(first), cross_entropy_of_lists(second)


@pytest.mark.parametrize("limit", [0, 1000], ids=["gathered", "by matrix"])
def test_clcrec_is_the_loop_over_pairs_and_places(limit, monkeypatch):
    monkeypatch.setattr(losses, "CHEAP_MATRIX", limit)
    user, ids, content = rows(6, seed=1), rows(8, seed=2), rows(8, seed=3)
    item = torch.randint(8, (6, 4), generator=torch.Generator().manual_seed(4))
    replaced = mask(6, 4)
    found = losses.clcrec(user, ids, content, item, replaced, temperature=0.4)
    contrast, preference = clcrec_loop(user, ids, content, item, replaced, 0.4)
    torch.testing.assert_close(found.norm, losses.mean_norm(user, ids, item))
    assert_same(found.contrast, contrast, ids, content)
    assert_same(found.preference, preference, user, ids, content)


def test_shared_clcrec_equals_own_negatives_that_happen_to_be_the_same():
    user, ids, content = rows(6, seed=1), rows(8, seed=2), rows(8, seed=3)
    item, shared = torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([4, 7, 3])
    replaced, replaced_shared = mask(6, 1)[:, 0], torch.tensor([True, False, True])
    nothing = torch.zeros(6, 3, dtype=torch.bool)
    found = losses.shared_clcrec(user, ids, content, item, replaced, shared, replaced_shared, nothing, temperature=0.4)
    places = torch.cat([item[:, None], shared.expand(6, -1)], dim=1)
    both = torch.cat([replaced[:, None], replaced_shared.expand(6, -1)], dim=1)
    wanted = losses.clcrec(user, ids, content, places, both, temperature=0.4)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted))
    assert_same(torch.stack(found) @ weight, torch.stack(wanted) @ weight, user, ids, content)


def test_shared_clcrec_leaves_excluded_negatives_out():
    user, ids, content = rows(2, seed=1), rows(5, seed=2), rows(5, seed=3)
    item, shared = torch.tensor([0, 1]), torch.tensor([2, 3])
    keep = torch.zeros(2, dtype=torch.bool)
    excluded = torch.tensor([[True, False], [True, False]])
    found = losses.shared_clcrec(user, ids, content, item, keep, shared, keep, excluded, temperature=1.0)
    fewer = losses.shared_clcrec(user, ids, content, item, keep, shared[1:], keep[1:], excluded[:, 1:], temperature=1.0)
    torch.testing.assert_close(found.contrast, fewer.contrast)
    torch.testing.assert_close(found.preference, fewer.preference)


def test_under_autocast_products_are_low_and_sums_are_not():
    query, positive, negative = (rows(n, seed=s).detach().float().requires_grad_() for n, s in ((9, 1), (9, 2), (6, 3)))
    nothing = torch.zeros(9, 6, dtype=torch.bool)
    exact = losses.shared_softmax(query, positive, negative, nothing, temperature=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = losses.shared_softmax(query, positive, negative, nothing, temperature=0.5)
        scores = losses.picked_scores(query, negative, torch.zeros(9, 2, dtype=torch.int64))
    assert low.dtype == scores.dtype == torch.float32
    assert float((low - exact).detach().abs()) < 0.05
    assert float((low - exact).detach().abs()) > 0
    assert all(g.dtype == torch.float32 for g in gradients(low, query, positive, negative))
