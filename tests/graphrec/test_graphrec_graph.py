"""The graph and its propagation against dense float64 matrices and plain autograd."""

import pytest
import torch

from apps.graphrec import graph as graphs
from shared.ranking import Lists
from shared.seed import make_generator

CPU = torch.device("cpu")
USERS, ITEMS = 23, 17
NODES = USERS + ITEMS
DIM = 70  # more than two blocks of columns


def lists_of(interacted_UI):
    """Lists from a bool matrix."""
    degree = interacted_UI.sum(1)
    return Lists(torch.cat([degree.new_zeros(1), degree.cumsum(0)]), interacted_UI.nonzero()[:, 1].int())


def random_pairs(seed=0, users=USERS, items=ITEMS):
    """A bool matrix in which the first and last user and item have no interactions."""
    interacted = torch.rand(users, items, generator=torch.Generator().manual_seed(seed)) < 0.3
    interacted[[0, -1]] = False
    interacted[:, [0, -1]] = False
    return interacted


def dense_adjacency(interacted_UI):
    """A in float64, entry by entry."""
    users, items = interacted_UI.shape
    adjacency = torch.zeros(users + items, users + items, dtype=torch.float64)
    for user, item in interacted_UI.nonzero().tolist():
        weight = 1 / (int(interacted_UI[user].sum()) * int(interacted_UI[:, item].sum())) ** 0.5
        adjacency[user, users + item] = weight
        adjacency[users + item, user] = weight
    return adjacency


def dense_propagation(adjacency, x, layers, combine):
    powers = [x]
    for _ in range(layers):
        powers.append(adjacency @ powers[-1])
    return powers[-1] if combine == "last" else torch.stack(powers).mean(0)


def as_dense(graph):
    """A as the kernel sees it."""
    return graphs.multiply(graph, torch.eye(graph.num_nodes))


@pytest.fixture
def interacted():
    return random_pairs()


@pytest.fixture
def graph(interacted):
    return graphs.make_graph(lists_of(interacted), num_items=ITEMS, device=CPU)


@pytest.fixture
def x():
    return torch.randn(NODES, DIM, generator=torch.Generator().manual_seed(1))


def test_the_graph_is_the_normalised_adjacency(graph, interacted):
    torch.testing.assert_close(as_dense(graph), dense_adjacency(interacted).float())
    assert graph.ptr.dtype == graph.column.dtype == torch.int32
    assert graph.weight.dtype == torch.float32
    assert (graph.num_users, graph.num_nodes) == (USERS, NODES)


def test_the_graph_is_symmetric_with_empty_diagonal_blocks_and_spectral_norm_one(graph):
    adjacency = as_dense(graph).double()
    assert torch.equal(adjacency, adjacency.T)
    assert not adjacency[:USERS, :USERS].any()
    assert not adjacency[USERS:, USERS:].any()
    vector = torch.rand(NODES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(200):
        vector = adjacency @ (adjacency @ vector)
        vector /= vector.norm()
    assert float((adjacency @ vector).norm()) == pytest.approx(1, abs=1e-6)


def test_neighbours_are_rising_in_both_directions(graph):
    for node in range(NODES):
        neighbours = graph.column[graph.ptr[node] : graph.ptr[node + 1]].tolist()
        assert neighbours == sorted(set(neighbours))


def test_halves_are_the_matrix_and_its_transpose(graph, interacted):
    users, items = graphs.halves(graph)
    expected = dense_adjacency(interacted)[:USERS, USERS:].float()
    torch.testing.assert_close(graphs.product(users, torch.eye(ITEMS)), expected)
    torch.testing.assert_close(graphs.product(items, torch.eye(USERS)), expected.T)
    torch.testing.assert_close(graphs.product(users, torch.eye(ITEMS), kernel="csr"), expected)


@pytest.mark.parametrize("kernel", ["auto", "bag", "csr"])
@pytest.mark.parametrize("combine", ["mean", "last"])
@pytest.mark.parametrize("layers", range(5))
def test_propagation_equals_the_dense_polynomial(graph, interacted, x, layers, combine, kernel):
    found = graphs.propagate(graph, x, layers=layers, combine=combine, kernel=kernel)
    expected = dense_propagation(dense_adjacency(interacted), x.double(), layers, combine)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["bag", "csr"])
@pytest.mark.parametrize("combine", ["mean", "last"])
def test_gradients_are_those_of_plain_autograd(graph, interacted, x, combine, kernel):
    x = x.requires_grad_()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    found = graphs.propagate(graph, x, layers=3, combine=combine, kernel=kernel)
    expected = dense_propagation(dense_adjacency(interacted).float(), x, 3, combine)
    found_gradient, expected_gradient = (
        torch.autograd.grad(((z - target) ** 3).sum(), x)[0] for z in (found, expected)
    )
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["bag", "csr"])
@pytest.mark.parametrize("combine", ["mean", "last"])
def test_first_and_second_derivatives_pass_the_numerical_check(combine, kernel):
    graph = graphs.make_graph(lists_of(random_pairs(users=6, items=5)), num_items=5, device=CPU)
    graph = graph._replace(weight=graph.weight.double())
    x = torch.randn(11, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def cubed(value):  # linear maps have no second derivatives of their own
        return graphs.propagate(graph, value, layers=2, combine=combine, kernel=kernel) ** 3

    assert torch.autograd.gradcheck(cubed, x)
    assert torch.autograd.gradgradcheck(cubed, x)


def test_no_layer_is_kept_for_the_backward_pass(graph, x):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graphs.propagate(graph, x.requires_grad_(), layers=3)
        graphs.propagate_noisy(graph, x, layers=3, eps=0.1, generator=make_generator(0))
    assert not kept


def test_gradients_that_are_views_of_one_number_propagate(graph, interacted, x):
    x = x.requires_grad_()
    gradient = torch.autograd.grad(graphs.propagate(graph, x, layers=2).sum(), x)[0]  # an expanded scalar
    expected = dense_propagation(dense_adjacency(interacted), torch.ones(NODES, DIM, dtype=torch.float64), 2, "mean")
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_nodes_without_interactions_keep_their_own_embedding_alone(graph, x):
    lonely = [0, USERS - 1, USERS, NODES - 1]
    torch.testing.assert_close(graphs.propagate(graph, x, layers=3)[lonely], x[lonely] / 4)
    assert not graphs.propagate(graph, x, layers=3, combine="last")[lonely].any()
    mean, contrast = graphs.propagate_noisy(graph, x, layers=2, eps=0.1, generator=make_generator(0))
    assert not mean[lonely].any()
    assert not contrast[lonely].any()


@pytest.mark.parametrize("kernel", ["bag", "csr"])
def test_a_graph_without_pairs_leaves_layer_zero(kernel):
    graph = graphs.make_graph(lists_of(torch.zeros(3, 2, dtype=torch.bool)), num_items=2, device=CPU)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graphs.propagate(graph, x, layers=1, kernel=kernel), x / 2)


@pytest.mark.parametrize("combine", ["mean", "last"])
def test_bfloat16_rows_stay_within_a_few_thousandths(graph, x, combine):
    x = x.requires_grad_()
    exact = graphs.propagate(graph, x, layers=3, combine=combine)
    rounded = graphs.propagate(graph, x, layers=3, combine=combine, low_precision=True)
    assert rounded.dtype == torch.float32
    exact_gradient = torch.autograd.grad(exact, x, x)[0]
    rounded_gradient = torch.autograd.grad(rounded, x, x)[0]
    for found, expected in ((rounded.detach(), exact.detach()), (rounded_gradient, exact_gradient)):
        assert 0 < float((found - expected).norm() / expected.norm()) < 5e-3


def test_bfloat16_rows_are_added_up_in_float32():
    # in bfloat16 a running sum of equal terms stops growing after 256 of them
    users = 800
    graph = graphs.make_graph(lists_of(torch.ones(users, 1, dtype=torch.bool)), num_items=1, device=CPU)
    found = graphs.propagate(graph, torch.ones(users + 1, 8), layers=1, combine="last", low_precision=True)
    assert float(found[-1, 0]) == pytest.approx(users**0.5, rel=5e-3)


def test_kernel_csr_refuses_bfloat16_rows_on_a_cpu(graph, x):
    with pytest.raises(ValueError, match="use kernel bag"):
        graphs.propagate(graph, x, layers=1, kernel="csr", low_precision=True)


def test_autocast_has_no_effect(graph, x):
    x = x.requires_grad_()
    expected = graphs.propagate(graph, x, layers=2)
    expected_noisy = graphs.propagate_noisy(graph, x, layers=2, eps=0.1, generator=make_generator(0))[0]
    for kernel in ("bag", "csr"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = graphs.propagate(graph, x, layers=2, kernel=kernel)
            gradient = torch.autograd.grad(found, x, x)[0]
            noisy = graphs.propagate_noisy(graph, x, layers=2, eps=0.1, generator=make_generator(0), kernel=kernel)[0]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, expected.detach())
        torch.testing.assert_close(noisy, expected_noisy)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_noise_has_length_eps_and_points_away_from_zero(graph, x, layers):
    def layer(k):
        return graphs.propagate_noisy(graph, x, layers=k, eps=0.2, generator=make_generator(7), contrast_layer=k)[1]

    before = x if layers == 1 else layer(layers - 1)
    clean = graphs.multiply(graph, before)
    noise = layer(layers) - clean
    connected = clean.any(1)
    assert int(connected.sum()) == NODES - 4
    torch.testing.assert_close(noise[connected].norm(dim=1), torch.full((NODES - 4,), 0.2), rtol=1e-4, atol=1e-4)
    assert (noise * clean)[connected].ge(-1e-7).all()
    assert not torch.allclose(noise[connected][0].abs(), noise[connected][1].abs())


def test_the_noisy_mean_leaves_out_layer_zero(graph, x):
    layers = [
        graphs.propagate_noisy(graph, x, layers=3, eps=0.1, generator=make_generator(7), contrast_layer=k)
        for k in (1, 2, 3)
    ]
    torch.testing.assert_close(layers[0][0], torch.stack([contrast for _, contrast in layers]).mean(0))
    clean, _ = graphs.propagate_noisy(graph, x, layers=3, eps=0.0, generator=make_generator(7))
    torch.testing.assert_close(clean, (4 * graphs.propagate(graph, x, layers=3) - x) / 3)


def test_noise_is_a_function_of_the_generator(graph, x):
    def view(seed):
        return graphs.propagate_noisy(graph, x, layers=2, eps=0.1, generator=make_generator(seed))[0]

    assert torch.equal(view(1), view(1))
    assert not torch.equal(view(1), view(2))


def test_noise_directions_are_uniform_bytes():
    draws = graphs._positive_noise(torch.Size((333, 77)), make_generator(0))
    count = torch.bincount((draws - 0.5).long().flatten(), minlength=256)
    expected = 333 * 77 / 256
    chi_square = float(((count - expected) ** 2 / expected).sum())
    assert len(count) == 256
    assert 160 < chi_square < 370  # 255 degrees of freedom: within five standard deviations


@pytest.mark.parametrize("contrast_layer", [1, 2, 3])
@pytest.mark.parametrize("used", ["mean", "contrast", "both"])
def test_noisy_gradients_are_those_of_constant_noise(graph, interacted, x, contrast_layer, used):
    x = x.requires_grad_()
    generator = torch.Generator().manual_seed(5)
    weights = [
        torch.randn(x.shape, generator=generator) if used in (name, "both") else None for name in ("mean", "contrast")
    ]

    def gradient(outputs):
        return torch.autograd.grad(
            sum((w * z).sum() for w, z in zip(weights, outputs, strict=True) if w is not None), x
        )[0]

    adjacency, value, layers = dense_adjacency(interacted).float(), x, []
    for _ in range(3):
        value = adjacency @ value + 0.1  # any constant
        layers.append(value)
    expected = gradient([torch.stack(layers).mean(0), layers[contrast_layer - 1]])
    found = gradient(
        graphs.propagate_noisy(graph, x, layers=3, eps=0.1, generator=make_generator(0), contrast_layer=contrast_layer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "contrast_layer"), [(2, 3), (2, 0), (0, 1)])
def test_a_contrast_layer_without_noise_is_refused(graph, x, layers, contrast_layer):
    with pytest.raises(ValueError, match=f"contrast_layer {contrast_layer} is none of the layers 1 to {layers}"):
        graphs.propagate_noisy(
            graph, x, layers=layers, eps=0.1, generator=make_generator(0), contrast_layer=contrast_layer
        )


def test_dropped_edges_leave_the_graph_of_the_pairs_that_stay():
    interacted = random_pairs(users=120, items=90)
    graph = graphs.make_graph(lists_of(interacted), num_items=90, device=CPU)
    dropped = graphs.drop_edges(graph, 0.3, make_generator(11))
    kept = as_dense(dropped)[:120, 120:] > 0
    assert torch.equal(as_dense(dropped), as_dense(dropped).T)
    assert not (kept & ~interacted).any()
    assert 0.6 < int(kept.sum()) / int(interacted.sum()) < 0.8
    expected = graphs.make_graph(lists_of(kept), num_items=90, device=CPU)
    for found_part, expected_part in zip(dropped, expected, strict=True):
        torch.testing.assert_close(found_part, expected_part, rtol=0, atol=0)


def test_which_edges_drop_is_a_function_of_the_generator(graph):
    first, again, other = (graphs.drop_edges(graph, 0.5, make_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.column, again.column)
    assert first.column.shape != other.column.shape or not torch.equal(first.column, other.column)
    whole = graphs.drop_edges(graph, 0.0, make_generator(1))
    assert torch.equal(whole.column, graph.column)
    assert torch.equal(whole.weight, graph.weight)


def test_choose_kernel_says_why_on_a_cpu(graph):
    kernel, reason = graphs.choose_kernel(graph, 64, CPU)
    assert kernel == "bag"
    assert "CPU" in reason


def test_graph_bytes_are_those_of_the_tensors(graph, interacted):
    held = sum(part.nbytes for part in (graph.ptr, graph.column, graph.weight))
    sizes = {"num_users": USERS, "num_items": ITEMS, "num_pairs": int(interacted.sum())}
    assert graphs.graph_bytes(**sizes) == held
    assert graphs.graph_bytes(**sizes, dim=64) == held + NODES * (4 * 64 + 3 * graphs.ROW_BYTES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_kernels_agree_with_the_cpu(interacted, x):
    graph = graphs.make_graph(lists_of(interacted), num_items=ITEMS, device=torch.device("cuda"))
    host = graphs.make_graph(lists_of(interacted), num_items=ITEMS, device=CPU)
    kernel, reason = graphs.choose_kernel(graph, DIM, torch.device("cuda"))
    assert kernel in ("bag", "csr")
    assert reason.count(" ms") == 2
    expected = graphs.propagate(host, x, layers=3)
    for name in ("auto", "bag", "csr"):
        on_device = x.cuda().requires_grad_()
        found = graphs.propagate(graph, on_device, layers=3, kernel=name)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        gradient = torch.autograd.grad(found, on_device, on_device)[0]
        torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-4, atol=1e-5)
        rounded = graphs.propagate(graph, x.cuda(), layers=3, kernel=name, low_precision=True).cpu()
        assert float((rounded - expected).norm() / expected.norm()) < 1e-2
    dropped = graphs.drop_edges(graph, 0.5, make_generator(0))
    assert torch.equal(dropped.column.cpu(), graphs.drop_edges(host, 0.5, make_generator(0)).column)
    noisy, _ = graphs.propagate_noisy(graph, x.cuda(), layers=2, eps=0.1, generator=make_generator(0, device="cuda"))
    assert noisy.isfinite().all()
