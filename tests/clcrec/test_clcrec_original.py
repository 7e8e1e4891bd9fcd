"""The re-statement of the original against cases worked out by hand, so that what compares with it can trust it."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.clcrec.original import (
    LEGACY_MASK,
    Features,
    Params,
    drawn_positions,
    encode,
    final_items,
    finite_differences,
    length,
    loss_parts,
    original_loss,
    original_metrics,
    unit,
)

INF = math.inf

# One user, two items, everything two wide; both weight matrices are the identity, both biases zero.
# Item 0 has features (3, 4): unit (0.6, 0.8), positive, so Feat = (0.6, 0.8).
# Item 1 has features (-5, 0): unit (-1, 0), which the leaky rectifier makes (-0.01, 0) = Feat.
FEATURES = Features({"v": torch.tensor([[3.0, 4.0], [-5.0, 0.0]], dtype=torch.float64)})


def by_hand() -> dict[str, Tensor]:
    params = {
        "user": [[1.0, 1.0]],
        "item": [[1.0, 0.0], [0.0, 2.0]],
        "w1": [[1.0, 0.0], [0.0, 1.0]],
        "b1": [0.0, 0.0],
        "w2": [[1.0, 0.0], [0.0, 1.0]],
        "b2": [0.0, 0.0],
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in params.items()}


def test_encoder_by_hand():
    feat = torch.stack(encode(by_hand(), FEATURES))
    torch.testing.assert_close(feat, torch.tensor([[0.6, 0.8], [-0.01, 0.0]], dtype=torch.float64))


def test_modalities_are_normalised_apart_and_words_averaged_with_their_repeats():
    # words 0, 0, 1 of item 0: mean ((3, 0) + (3, 0) + (0, 9)) / 3 = (2, 3); unit (2, 3) / sqrt(13). Item 1 has none.
    words = {"words": torch.tensor([[3.0, 0.0], [0.0, 9.0]], dtype=torch.float64)}
    identity = torch.eye(3, dtype=torch.float64)
    params = by_hand() | words | {"w1": identity, "b1": torch.zeros(3).double(), "w2": identity[1:]}
    features = Features({"v": torch.tensor([[7.0], [-7.0]], dtype=torch.float64)}, words=[[0, 0, 1], []])
    feat = torch.stack(encode(params, features))
    expected = torch.tensor([[2 / math.sqrt(13), 3 / math.sqrt(13)], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(feat, expected)


# With T = 0.5 and nothing replaced:
# s1 = cos(E_0, Feat_j) / T: cos((1, 0), (0.6, 0.8)) = 0.6 -> 1.2; cos((1, 0), (-0.01, 0)) = -1 -> -2
#   L1 = log(exp(1.2) + exp(-2)) - 1.2 = log(1 + exp(-3.2))
# s2 = <u, E_j> / T: <(1, 1), (1, 0)> = 1 -> 2; <(1, 1), (0, 2)> = 2 -> 4
#   L2 = log(exp(2) + exp(4)) - 2 = log(1 + exp(2))
# R = (|u| + (|E_0| + |E_1|) / 2) / 2 = (sqrt(2) + 1.5) / 2
L1 = math.log(1 + math.exp(-3.2))
L2 = math.log(1 + math.exp(2))
R = (math.sqrt(2) + 1.5) / 2


def test_loss_and_returned_values_by_hand():
    result = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [], temperature=0.5, lr_lambda=0.3, reg_weight=0.1)
    total = 0.3 * L1 + 0.7 * L2 + 0.1 * R
    assert result.total == pytest.approx(total, rel=1e-14)
    assert result.returned == pytest.approx((total, L2 + 0.1 * R, 0.1 * R), rel=1e-14)


def test_a_replaced_position_is_content_not_normalised():
    # position 1 is item 1 as content: <(1, 1), (-0.01, 0)> / 0.5 = -0.02, the positive keeps 2
    result = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [1], temperature=0.5, lr_lambda=0.0, reg_weight=0.0)
    assert result.total == pytest.approx(math.log(1 + math.exp(-2.02)), rel=1e-14)
    # position 0, the positive: <(1, 1), (0.6, 0.8)> / 0.5 = 2.8 against 4
    result = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [0], temperature=0.5, lr_lambda=0.0, reg_weight=0.0)
    assert result.total == pytest.approx(math.log(1 + math.exp(1.2)), rel=1e-14)


def test_the_norms_are_those_of_embeddings_even_where_content_replaces_them():
    result = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [0, 1], temperature=0.5, lr_lambda=0.0, reg_weight=2.0)
    assert result.returned[2] == pytest.approx(2 * R, rel=1e-14)


def test_positions_count_along_the_rows_of_the_batch():
    # two equal pairs; place 3 is row 1, column 1
    result = original_loss(
        by_hand(), FEATURES, [0, 0], [[0, 1], [0, 1]], [3], temperature=0.5, lr_lambda=0.0, reg_weight=0.0
    )
    assert result.total == pytest.approx((L2 + math.log(1 + math.exp(-2.02))) / 2, rel=1e-14)


def test_gradients_of_the_user_item_loss_by_hand():
    # with p = exp(4) / (exp(2) + exp(4)) = exp(2) / (1 + exp(2)) and T = 0.5:
    # dL2/du = p (E_1 - E_0) / T, dL2/dE_0 = -p u / T, dL2/dE_1 = p u / T; the encoder takes no part
    grads = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [], temperature=0.5, lr_lambda=0.0, reg_weight=0.0).grads
    p = math.exp(2) / (1 + math.exp(2))
    torch.testing.assert_close(grads["user"], torch.tensor([[-2 * p, 4 * p]], dtype=torch.float64))
    torch.testing.assert_close(grads["item"], torch.tensor([[-2 * p, -2 * p], [2 * p, 2 * p]], dtype=torch.float64))
    assert not any(grads[name].any() for name in ("w1", "b1", "w2", "b2"))


def test_each_repeat_of_a_position_hands_the_content_the_full_gradient():
    # position 1 replaced: p = exp(-0.02) / (exp(2) + exp(-0.02)); dL2/dFeat_1 = p u / T = (2 p, 2 p) = dL2/db2.
    # Through W2 = identity and the slope 0.01 of the negative side (0 counts as negative): dL2/db1 = 0.01 of it.
    arguments = {"temperature": 0.5, "lr_lambda": 0.0, "reg_weight": 0.0}
    once = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [1], **arguments)
    thrice = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [1, 1, 1], **arguments)
    p = math.exp(-0.02) / (math.exp(2) + math.exp(-0.02))
    expected = torch.tensor([2 * p, 2 * p], dtype=torch.float64)
    torch.testing.assert_close(once.grads["b2"], expected)
    torch.testing.assert_close(once.grads["b1"], 0.01 * expected)
    assert thrice.total == once.total
    for name in ("w1", "b1", "w2", "b2"):
        torch.testing.assert_close(thrice.grads[name], 3 * once.grads[name])
    for name in ("user", "item"):
        torch.testing.assert_close(thrice.grads[name], once.grads[name])
    assert not once.grads["item"][1].any()  # the embedding under a replaced position gets nothing


def test_gradient_of_the_item_content_loss_by_hand():
    # u = E_0 / |E_0| = (1, 0); q = exp(-2) / (exp(1.2) + exp(-2)) weighs item 1: dL1/du = q (f_1 - f_0) / T with
    # f_0 = (0.6, 0.8), f_1 = (-1, 0) the unit Feats; E_0 gets the part across u: (0, q (0 - 0.8) / 0.5)
    grads = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [], temperature=0.5, lr_lambda=1.0, reg_weight=0.0).grads
    q = math.exp(-2) / (math.exp(1.2) + math.exp(-2))
    torch.testing.assert_close(grads["item"], torch.tensor([[0.0, -1.6 * q], [0.0, 0.0]], dtype=torch.float64))
    assert not grads["user"].any()


def test_gradient_of_the_norms_is_the_direction_and_zero_at_zero():
    # R = (|u| + (|E_0| + |E_1|) / 2) / 2: dR/du = unit(u) / 2, dR/dE_j = unit(E_j) / 4
    parts_of = partial(loss_parts, features=FEATURES, user_B=[0], item_BM=[[0, 1]], replaced_positions=[])
    for zeroed in (False, True):
        params = by_hand()
        if zeroed:
            params["item"][1] = 0.0
        leaves = {name: value.requires_grad_() for name, value in params.items()}
        norms = parts_of(leaves, temperature=0.5, lr_lambda=0.5, reg_weight=1.0).norms
        user, item = torch.autograd.grad(norms, (leaves["user"], leaves["item"]))
        torch.testing.assert_close(user, torch.full((1, 2), 0.5 / math.sqrt(2), dtype=torch.float64))
        second = [0.0, 0.0] if zeroed else [0.0, 0.25]
        torch.testing.assert_close(item, torch.tensor([[0.25, 0.0], second], dtype=torch.float64))


def test_a_vector_of_zeros_has_length_zero_and_unit_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    assert float(length(zero)) == 0.0
    assert unit(zero).tolist() == [0.0, 0.0, 0.0]


def random_case(seed: int) -> tuple[Params, Features]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {
        "user": normal(3, 2),
        "item": normal(5, 2),
        "w1": normal(4, 5),
        "b1": normal(4),
        "w2": normal(2, 4),
        "b2": normal(2),
        "words": normal(3, 2),
    }
    return params, Features({"v": normal(5, 2), "a": normal(5, 1)}, words=[[0], [1, 2], [2, 2, 0], [1], [0, 1]])


@pytest.mark.parametrize("positions", [[], [0, 4, 5, 7]])
@pytest.mark.parametrize("lr_lambda", [0.0, 0.4, 1.0])
def test_gradients_are_derivatives_where_no_position_repeats(lr_lambda: float, positions: list[int]):
    params, features = random_case(seed=5)
    user, item = [2, 0, 2], [[0, 1, 3], [2, 0, 1], [1, 3, 2]]
    arguments = {"temperature": 0.7, "lr_lambda": lr_lambda, "reg_weight": 0.3}
    result = original_loss(params, features, user, item, positions, **arguments)

    def total(moved: Params) -> float:
        return loss_parts(moved, features, user, item, positions, **arguments).total.item()

    for name, numeric in finite_differences(total, params).items():
        torch.testing.assert_close(result.grads[name], numeric, rtol=1e-6, atol=1e-8, msg=name)


def test_a_repeated_position_is_no_derivative():
    params, features = random_case(seed=5)
    arguments = {"temperature": 0.7, "lr_lambda": 0.4, "reg_weight": 0.3}
    result = original_loss(params, features, [2, 0], [[0, 1], [2, 0]], [1, 1], **arguments)

    def total(moved: Params) -> float:
        return loss_parts(moved, features, [2, 0], [[0, 1], [2, 0]], [1, 1], **arguments).total.item()

    numeric = finite_differences(total, params)
    assert not torch.allclose(result.grads["w2"], numeric["w2"], rtol=1e-2)
    torch.testing.assert_close(result.grads["user"], numeric["user"], rtol=1e-6, atol=1e-8)


def test_scores_far_above_what_exp_can_hold_stay_finite():
    # s2 = 1 / 0.0001 = 10,000 and 20,000: L2 = 10,000 up to exp(-10,000)
    result = original_loss(by_hand(), FEATURES, [0], [[0, 1]], [], temperature=1e-4, lr_lambda=0.0, reg_weight=0.0)
    assert result.total == pytest.approx(10_000, rel=1e-12)


def test_positions_are_drawn_with_repeats_and_counted_down():
    generator = torch.Generator().manual_seed(0)
    assert len(drawn_positions(3, 5, 0.5, generator)) == 7  # floor(7.5)
    assert drawn_positions(3, 5, 0.0, generator) == []
    positions = drawn_positions(100, 100, 0.5, generator)
    assert min(positions) >= 0
    assert max(positions) < 10_000
    assert len(set(positions)) / 10_000 == pytest.approx(1 - math.exp(-0.5), abs=0.01)


# Five items, the first three warm. Two users; every factor one wide, so that a score is a product.
#   user 0 (1.0): scores 0.1, 0.5, 0.4, 0.3, -0.2; trained on item 1
#   user 1 (-1.0): scores -0.1, -0.5, -0.4, -0.3, 0.2; trained on item 0
USERS = torch.tensor([[1.0], [-1.0], [1.0]])
ITEMS = torch.tensor([[0.1], [0.5], [0.4], [0.3], [-0.2]], dtype=torch.float64)
TRAIN = [{1}, {0}, set()]


def metrics(
    relevant: list[set[int]] | dict[int, set[int]], group: str, *, k: int = 2, mask_value: float = -INF
) -> dict[str, float]:
    return original_metrics(USERS, ITEMS, TRAIN, relevant, group=group, num_warm=3, k=k, mask_value=mask_value)


def test_metrics_over_all_items_by_hand():
    # user 0 ranks 2, 3, 0, 4 (1 is trained on): top 2 = 2, 3. Relevant {3, 0, 4}: one hit at place 2.
    #   precision 1/2, recall 1/3, ndcg (1 / log2 3) / (1 + 1 / log2 3): the ideal has min(3, 2) places
    # user 1 ranks 4, 3, 2, 1: top 2 = 4, 3. Relevant {4}: a hit at place 1: precision 1/2, recall 1, ndcg 1 / 1.
    # user 2 has nothing relevant and is not counted.
    found = metrics([{3, 0, 4}, {4}, set()], "all")
    second = 1 / math.log2(3)
    expected = {"precision": 0.5, "recall": (1 / 3 + 1) / 2, "ndcg": (second / (1 + second) + 1) / 2, "users": 2}
    assert found == pytest.approx(expected, rel=1e-14)


def test_cold_items_are_left_out_of_warm_and_warm_ones_out_of_cold():
    # warm, user 0: 2, 0 of {0, 1, 2}, 1 trained on; relevant {0}: place 2. User 1: 2, 1; relevant {2}: place 1.
    assert metrics([{0}, {2}, set()], "warm") == pytest.approx(
        {"precision": 0.5, "recall": 1.0, "ndcg": (1 / math.log2(3) + 1) / 2, "users": 2}, rel=1e-14
    )
    # cold: user 0 ranks 3, 4, user 1 ranks 4, 3; both relevant to user 1, 4 to user 0; at k = 1 one of two found
    assert metrics({0: {4}, 1: {3, 4}}, "cold", k=1) == pytest.approx(
        {"precision": 0.5, "recall": 0.25, "ndcg": 0.5, "users": 2}, rel=1e-14
    )


def test_masked_items_of_the_original_stand_above_every_negative_score():
    # user 1, relevant {3}: with -inf the ranking is 4, 3; with 1e-15 for item 0 it is 4, 0, 3
    assert metrics({1: {3}}, "all")["recall"] == 1.0
    assert metrics({1: {3}}, "all", mask_value=LEGACY_MASK)["recall"] == 0.0
    # and below every positive one: user 0, relevant {3}: 2, 3, then 0 before item 1
    assert metrics({0: {3}}, "all", mask_value=LEGACY_MASK)["recall"] == 1.0
    assert metrics({0: {0}}, "all", k=3, mask_value=LEGACY_MASK)["recall"] == 1.0


def test_items_left_out_do_not_fill_a_short_list():
    # cold has two items: at k = 5 both are found, precision still counts five places
    found = metrics({0: {3, 4}}, "cold", k=5)
    assert found == pytest.approx({"precision": 0.4, "recall": 1.0, "ndcg": 1.0, "users": 1}, rel=1e-14)


def test_what_is_left_out_is_never_found_even_if_relevant():
    # user 0 is trained on item 1: five places hold all items but that one
    assert metrics({0: {1}}, "all", k=5)["recall"] == 0.0
    assert metrics({0: {1}}, "all", k=5, mask_value=LEGACY_MASK)["recall"] == 1.0


def test_of_equal_scores_the_relevant_item_stands_last():
    same = torch.ones(4, 1)
    found = original_metrics(torch.ones(1, 1), same, [set()], [{0}], group="all", num_warm=4, k=3, mask_value=-INF)
    assert found["recall"] == 0.0


def test_final_items_are_embeddings_where_warm_and_content_where_cold():
    torch.testing.assert_close(
        final_items(by_hand(), FEATURES, num_warm=1), torch.tensor([[1.0, 0.0], [-0.01, 0.0]], dtype=torch.float64)
    )
