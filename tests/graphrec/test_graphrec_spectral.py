"""The training-free filters against dense float64 matrices and torch.linalg.svd."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from apps.graphrec import spectral
from apps.graphrec.graph import make_graph
from shared.ranking import Lists

CPU = torch.device("cpu")
SIZES = [(60, 45), (45, 60)]  # the iteration runs on the smaller side


def random_pairs(users, items, seed=0):
    """A bool matrix in which the first and last user and item have no interactions."""
    interacted = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < 0.15
    interacted[[0, -1]] = False
    interacted[:, [0, -1]] = False
    return interacted


def graph_of(interacted_UI):
    degree = interacted_UI.sum(1)
    train = Lists(torch.cat([degree.new_zeros(1), degree.cumsum(0)]), interacted_UI.nonzero()[:, 1].int())
    return make_graph(train, num_items=interacted_UI.shape[1], device=CPU)


def dense_parts(interacted_UI):
    """(rows, R, D_I^1/2, D_I^-1/2), zero where a degree is zero, in float64."""
    rows = interacted_UI.double()

    def inverse_root(degree):
        return torch.tensor([0.0 if d == 0 else d**-0.5 for d in degree.tolist()], dtype=torch.float64)

    users, items = inverse_root(rows.sum(1)), inverse_root(rows.sum(0))
    return rows, users[:, None] * rows * items, torch.diag(rows.sum(0).sqrt()), torch.diag(items)


def dense_scores(interacted_UI, rank, weight, series):
    """(r S + weight low-pass) p(S), from the definition."""
    rows, matrix, root, inverse = dense_parts(interacted_UI)
    gram = matrix.T @ matrix
    vectors = torch.linalg.svd(matrix).Vh[:rank].T
    blurred = rows @ gram + weight * rows @ inverse @ vectors @ vectors.T @ root
    return sum(c * blurred @ torch.linalg.matrix_power(gram, power) for power, c in enumerate(series))


@pytest.mark.parametrize("sizes", SIZES)
def test_singular_vectors_are_those_of_the_dense_matrix(sizes):
    interacted = random_pairs(*sizes)
    factors = spectral.top_singular(graph_of(interacted), 6, iterations=60, seed=1)
    left, value, right = torch.linalg.svd(dense_parts(interacted)[1])
    torch.testing.assert_close(factors.value_K.double(), value[:6], rtol=1e-5, atol=1e-5)
    for found, expected in ((factors.user_UK, left[:, :6]), (factors.item_IK, right[:6].T)):
        overlap = (expected.T @ found.double()).abs()  # signs are free
        torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)
    fitted = factors.user_UK * factors.value_K @ factors.item_IK.T
    expected = (left[:, :6] * value[:6] @ right[:6]).float()
    torch.testing.assert_close(fitted, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_rank_beyond_the_matrix_gives_all_of_it(sizes):
    interacted = random_pairs(*sizes)
    factors = spectral.top_singular(graph_of(interacted), 1000, iterations=1, seed=1)
    assert factors.value_K.shape == (45,)
    for vectors in (factors.user_UK, factors.item_IK):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(45), rtol=0, atol=1e-5)
    fitted = factors.user_UK * factors.value_K @ factors.item_IK.T
    torch.testing.assert_close(fitted.double(), dense_parts(interacted)[1], rtol=0, atol=1e-5)


def test_more_iterations_come_closer():
    interacted = random_pairs(300, 250)
    graph = graph_of(interacted)
    exact = torch.linalg.svdvals(dense_parts(interacted)[1])[:20].float()
    errors = [
        float((spectral.top_singular(graph, 20, iterations=count, seed=1).value_K - exact).norm())
        for count in (1, 3, 9)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_singular_vectors_are_a_function_of_the_seed():
    graph = graph_of(random_pairs(120, 100))
    first, again, other = (spectral.top_singular(graph, 4, iterations=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.item_IK, again.item_IK)
    assert not torch.equal(first.item_IK, other.item_IK)


def test_every_iteration_is_announced():
    lines: list[str] = []
    spectral.fit_gfcf(graph_of(random_pairs(20, 15)), rank=3, iterations=2, say=lines.append)
    assert lines == [f"singular vectors: block iteration {nth} of 2" for nth in (1, 2)]


@pytest.mark.parametrize("kernel", ["bag", "csr"])
@pytest.mark.parametrize("sizes", SIZES)
def test_gfcf_equals_the_dense_formula(sizes, kernel):
    interacted = random_pairs(*sizes)
    found = spectral.fit_gfcf(graph_of(interacted), rank=5, alpha=0.7, iterations=60, kernel=kernel)
    expected = dense_scores(interacted, 5, 0.7, [1])
    scores = found.scores(torch.arange(sizes[0]))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("order", "series"),
    [
        (0, [1]),
        (1, [1, -1.5]),
        (2, [1, -1.5, 1.5**2 / 2]),
        (4, [1, -1.5, 1.5**2 / 2, -(1.5**3) / 6, 1.5**4 / 24]),
    ],
)
@pytest.mark.parametrize("sizes", SIZES)
def test_bspm_equals_the_dense_formula(sizes, order, series):
    interacted = random_pairs(*sizes)
    found = spectral.fit_bspm(graph_of(interacted), rank=5, beta=0.7, step=1.5, order=order, iterations=60)
    expected = dense_scores(interacted, 5, 0.7, series)
    torch.testing.assert_close(found.scores(torch.arange(sizes[0])).double(), expected, rtol=1e-4, atol=1e-4)


def test_bspm_of_order_four_is_one_runge_kutta_step():
    interacted = random_pairs(60, 45)
    rows, matrix, root, inverse = dense_parts(interacted)
    gram, step = matrix.T @ matrix, 2.5
    vectors = torch.linalg.svd(matrix).Vh[:5].T
    blurred = rows @ gram + 0.2 * rows @ inverse @ vectors @ vectors.T @ root
    k1 = -blurred @ gram
    k2 = -(blurred + step / 2 * k1) @ gram
    k3 = -(blurred + step / 2 * k2) @ gram
    k4 = -(blurred + step * k3) @ gram
    expected = blurred + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    found = spectral.fit_bspm(graph_of(interacted), rank=5, iterations=60)
    torch.testing.assert_close(found.scores(torch.arange(60)).double(), expected, rtol=1e-4, atol=1e-4)


def test_users_and_items_without_interactions_get_zero_scores():
    scores = spectral.fit_bspm(graph_of(random_pairs(60, 45)), rank=5).scores(torch.arange(60))
    assert scores.isfinite().all()
    assert not scores[[0, -1]].any()
    assert not scores[:, [0, -1]].any()
    assert scores[1:-1, 1:-1].any(1).all()


@pytest.mark.parametrize("block", [1, 31, 32, 33])
def test_scores_do_not_depend_on_the_block_of_users(block):
    fitted = spectral.fit_bspm(graph_of(random_pairs(90, 45)), rank=5)
    whole = fitted.scores(torch.arange(90))
    parts = torch.cat([fitted.scores(rows) for rows in torch.arange(90).split(block)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    some = torch.tensor([7, 80, 7, 3])
    torch.testing.assert_close(fitted.scores(some), whole[some], rtol=1e-5, atol=1e-6)
    assert fitted.scores(some[:0]).shape == (0, 45)


def test_scores_are_float32_under_autocast():
    fitted = spectral.fit_gfcf(graph_of(random_pairs(60, 45)), rank=5)
    expected = fitted.scores(torch.arange(60))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted.scores(torch.arange(60)), expected)


def test_a_stored_filter_gives_the_same_scores():
    graph = graph_of(random_pairs(60, 45))
    fitted = spectral.fit_bspm(graph, rank=5)
    restored = spectral.restore_filter(load(save(fitted.tensors())), graph)
    assert torch.equal(restored.scores(torch.arange(60)), fitted.scores(torch.arange(60)))


def test_low_rank_embeddings_rank_as_the_low_pass_part_does():
    interacted = random_pairs(60, 45)
    user, item = spectral.low_rank_embeddings(graph_of(interacted), 5, scale=0.1, iterations=60)
    rows, matrix, root, inverse = dense_parts(interacted)
    vectors = torch.linalg.svd(matrix).Vh[:5].T
    expected = rows @ inverse @ vectors @ vectors.T @ root
    found = (user @ item.T).double()[1:-1]
    torch.testing.assert_close(F.normalize(found, dim=1), F.normalize(expected[1:-1], dim=1), rtol=1e-4, atol=1e-4)
    for part in (user, item):
        assert float(part.square().mean().sqrt()) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kernel", ["bag", "csr"])
def test_filters_on_cuda_equal_the_dense_formula(kernel):
    interacted = random_pairs(60, 45)
    graph = graph_of(interacted)
    on_device = graph._replace(ptr=graph.ptr.cuda(), column=graph.column.cuda(), weight=graph.weight.cuda())
    fitted = spectral.fit_bspm(on_device, rank=5, iterations=60, kernel=kernel)
    expected = spectral.fit_bspm(graph, rank=5, iterations=60).scores(torch.arange(60))
    torch.testing.assert_close(fitted.scores(torch.arange(60)).cpu(), expected, rtol=1e-3, atol=1e-3)
