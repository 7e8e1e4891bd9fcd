"""Models against dense matrices in float64, loops and each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.graphrec.config import ModelConfig
from apps.graphrec.graph import Graph, make_graph
from apps.graphrec.model import GraphFilter, GraphRec, normalised_content, spectral_embeddings
from apps.graphrec.spectral import fit_bspm, fit_gfcf
from shared.ranking import Lists

CPU = torch.device("cpu")
USERS, ITEMS = 7, 6
LISTS = [[0, 2, 3], [1], [0, 1, 2, 3], [2, 3], [0], [1, 3], [0, 2]]  # items 4 and 5 have no pair: 5 is cold


def graph() -> Graph:
    ptr = torch.tensor([0, *(len(items) for items in LISTS)]).cumsum(0)
    return make_graph(
        Lists(ptr, torch.tensor([i for items in LISTS for i in items]).int()), num_items=ITEMS, device=CPU
    )


def dense() -> Tensor:
    """A, made from its definition."""
    ones = torch.zeros(USERS, ITEMS, dtype=torch.float64)
    for user, items in enumerate(LISTS):
        ones[user, items] = 1
    degree = torch.cat([ones.sum(1), ones.sum(0)])
    whole = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    whole[:USERS, USERS:], whole[USERS:, :USERS] = ones, ones.t()
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    return scale[:, None] * whole * scale


def make(kind: str, **settings: Any) -> GraphRec:
    torch.manual_seed(0)
    config = replace(ModelConfig(model=kind, embed_dim=4, hidden_dim=5), **settings)
    is_cold = torch.arange(ITEMS) == 5
    return GraphRec(config, graph=graph(), content_IF=content(), is_cold_I=is_cold)


def content() -> Tensor:
    return normalised_content([torch.randn(ITEMS, 3, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])


def table(model: GraphRec) -> Tensor:
    return model.table.detach().double()


def final(model: GraphRec) -> Tensor:
    with torch.no_grad():
        return torch.cat(model.final())


@pytest.mark.parametrize("layers", [1, 3])
def test_lightgcn_is_the_mean_of_the_powers_of_the_dense_matrix(layers):
    model = make("lightgcn", layers=layers)
    terms = [torch.linalg.matrix_power(dense(), k) @ table(model) for k in range(layers + 1)]
    torch.testing.assert_close(final(model).double(), torch.stack(terms).mean(0), rtol=1e-5, atol=1e-7)


def test_lightgcn_with_the_last_layer_alone():
    model = make("lightgcn", layers=2, combine="last")
    torch.testing.assert_close(final(model).double(), dense() @ dense() @ table(model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combine", ["mean", "last"])
def test_lightgcn_without_layers_is_mf(combine):
    assert torch.equal(final(make("lightgcn", layers=0, combine=combine)), final(make("mf")))


@pytest.mark.parametrize("kind", ["simgcl", "xsimgcl"])
def test_contrastive_models_are_evaluated_without_noise_and_without_layer_0(kind):
    model = make(kind, layers=3)
    terms = [torch.linalg.matrix_power(dense(), k) @ table(model) for k in (1, 2, 3)]
    torch.testing.assert_close(final(model).double(), torch.stack(terms).mean(0), rtol=1e-5, atol=1e-7)
    assert model(None).contrast is None


def test_simgcl_scores_clean_vectors_and_contrasts_two_noisy_views():
    model = make("simgcl", layers=2, noise_eps=0.3)
    views = model(torch.Generator().manual_seed(1))
    torch.testing.assert_close(views.final_ND, final(model))
    first, second = (view.detach() for view in views.contrast)
    assert not torch.equal(first, second)
    has_pairs = dense().sum(1) > 0
    for view in (first, second):
        distance = (view - final(model)).norm(dim=1)
        assert distance[has_pairs].min() > 0.01
        assert distance.max() <= 0.3 * 1.5  # half of (noise 1 + A noise 1 + noise 2), A of norm 1
    again = model(torch.Generator().manual_seed(1))
    assert torch.equal(again.contrast[0], views.contrast[0])
    assert torch.equal(again.contrast[1], views.contrast[1])


def test_xsimgcl_scores_noisy_vectors_and_contrasts_them_with_one_layer():
    model = make("xsimgcl", layers=2, contrast_layer=1, noise_eps=0.3)
    views = model(torch.Generator().manual_seed(1))
    assert views.contrast[0] is views.final_ND
    assert not torch.equal(views.final_ND.detach(), final(model))
    quiet = make("xsimgcl", layers=2, contrast_layer=1, noise_eps=0.0)(torch.Generator().manual_seed(1))
    torch.testing.assert_close(quiet.contrast[1].detach().double(), dense() @ table(model), rtol=1e-5, atol=1e-7)


def test_content_ranks_users_against_encoded_items():
    model = make("content")
    assert model.table.shape == (USERS, 4)
    user, item = model.final()
    assert torch.equal(user, model.table)
    hidden = content() @ model.hidden.weight.t() + model.hidden.bias
    hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    torch.testing.assert_close(item, hidden @ model.output.weight.t() + model.output.bias)


def test_clcrec_graph_ranks_warm_items_by_embedding_and_cold_ones_by_content():
    model = make("clcrec-graph")
    user, item = (part.detach() for part in model.final())
    assert torch.equal(user, model.table[:USERS].detach())
    assert torch.equal(item[:5], model.table[USERS : USERS + 5].detach())
    torch.testing.assert_close(item[5:], model.encode(content()[5:]).detach())


@pytest.mark.parametrize("count", [3, 20])
def test_encoded_items_stand_in_the_rows_that_are_told(count):
    model = make("content")
    wanted = torch.randint(ITEMS, (count,), generator=torch.Generator().manual_seed(1))
    items, row = model.distinct(wanted)
    assert items.numel() <= ITEMS
    assert torch.equal(items[row], wanted)
    torch.testing.assert_close(model.encode_items(items)[row], model.encode(content()[wanted]))


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
def test_views_of_users_are_the_means_of_their_neighbourhoods(full):
    model = make("clcrec-graph").double()
    users = torch.tensor([0, 2, 5])
    ids = model.table.detach().requires_grad_()
    neighbour = [torch.stack([ids[USERS + i] for i in LISTS[u]]).mean(0) for u in users.tolist()]
    fans = [[v for v in range(USERS) if i in LISTS[v]] for i in range(ITEMS)]
    fan_mean = [torch.stack([ids[v] for v in fans[i]]).mean(0) if fans[i] else None for i in range(ITEMS)]
    cooccur = [torch.stack([fan_mean[i] for i in LISTS[u]]).mean(0) for u in users.tolist()]  # type: ignore[misc]
    own = [ids[u] for u in users.tolist()]
    wanted = (neighbour, cooccur) if full else (own, neighbour)
    found = model.user_views(users, full=full)
    weight = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))
    (torch.stack(found) * weight).sum().backward()
    (torch.stack([torch.stack(view) for view in wanted]) * weight).sum().backward()
    assert model.table.grad is not None
    assert ids.grad is not None
    torch.testing.assert_close(model.table.grad, ids.grad)


def test_gradients_of_the_table_go_through_the_graph():
    model = make("lightgcn", layers=2)
    weight = torch.randn(USERS + ITEMS, 4, generator=torch.Generator().manual_seed(3))
    (model(None).final_ND * weight).sum().backward()
    powers = [torch.linalg.matrix_power(dense(), k) @ weight.double() for k in range(3)]
    assert model.table.grad is not None
    torch.testing.assert_close(model.table.grad.double(), torch.stack(powers).mean(0), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_holds_weights_and_no_data():
    assert set(make("lightgcn").state_dict()) == {"table"}
    names = {"table", "hidden.weight", "hidden.bias", "output.weight", "output.bias"}
    assert set(make("clcrec-graph").state_dict()) == names


def test_first_embeddings_follow_the_configuration():
    wide = ModelConfig(model="mf", embed_dim=2000, init_scale=0.3)
    torch.manual_seed(0)
    assert float(GraphRec(wide, graph=graph()).table.detach().std()) == pytest.approx(0.3, rel=0.02)
    xavier = GraphRec(replace(wide, init="xavier"), graph=graph()).table.detach()
    assert float(xavier.std()) == pytest.approx((2 / (USERS + ITEMS + 2000)) ** 0.5, rel=0.02)


def test_spectral_first_embeddings_rank_like_the_low_pass_filter():
    config = ModelConfig(model="mf", embed_dim=4, init="spectral", init_scale=0.2)
    found = spectral_embeddings(graph(), config, seed=1, kernel="auto").double()
    for half in (found[:USERS], found[USERS:]):
        assert float(half.square().mean().sqrt()) == pytest.approx(0.2)
    normalised = dense()[:USERS, USERS:]
    left, value, right = torch.linalg.svd(normalised)
    # users' rows of R V V^T, without the roots of the items' degrees that R divides by
    degree = (normalised > 0).sum(0).double()
    wanted = left[:, :4] * value[:4] @ right[:4] * degree.sqrt()
    scores = found[:USERS] @ found[USERS:].t()
    factor = float((scores * wanted).sum() / wanted.square().sum())
    torch.testing.assert_close(scores, factor * wanted, rtol=1e-3, atol=1e-4)


def test_more_spectral_columns_than_there_are_items_are_refused():
    config = ModelConfig(model="mf", embed_dim=ITEMS + 1, init="spectral")
    with pytest.raises(ValueError, match=r"at most 6 columns .* lower it, or use --init normal"):
        spectral_embeddings(graph(), config, seed=1, kernel="auto")


@pytest.mark.parametrize("kind", ["gfcf", "bspm"])
def test_a_filter_scores_like_the_one_it_fitted_before_and_behind_a_checkpoint(kind):
    config = ModelConfig(model=kind, filter_rank=3, filter_alpha=0.4, filter_beta=0.1, filter_step=1.5)
    model = GraphFilter(config, graph=graph())
    model.fit(seed=5)
    users = torch.tensor([3, 0, 6])
    if kind == "gfcf":
        wanted = fit_gfcf(graph(), rank=3, alpha=0.4, seed=5).scores(users)
    else:
        wanted = fit_bspm(graph(), rank=3, beta=0.1, step=1.5, seed=5).scores(users)
    torch.testing.assert_close(model.filter().scores(users), wanted)
    copy = GraphFilter(config, graph=graph())
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.filter().scores(users), model.filter().scores(users))


def test_content_parts_have_unit_rows_or_none():
    parts = [torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e30, 1e30]]), torch.tensor([[2.0], [-1e-30], [0.0]])]
    found = normalised_content(parts)
    wanted = torch.tensor([[0.6, 0.8, 1.0], [0.0, 0.0, -1.0], [0.5**0.5, 0.5**0.5, 0.0]])
    torch.testing.assert_close(found, wanted)


def test_bf16_rows_change_little():
    exact, rounded = make("lightgcn"), make("lightgcn", bf16_rows=True)
    rounded.load_state_dict(exact.state_dict())
    error = float((final(rounded) - final(exact)).norm() / final(exact).norm())
    assert 0 < error < 1e-2
    assert F.cosine_similarity(final(rounded), final(exact)).min() > 0.999
