"""The encoder, the vectors and the losses of simple cases whose results are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from apps.clcrec import losses
from apps.clcrec.config import ModelConfig
from apps.clcrec.model import CLCRec, WordLists, normalised_content


def make(words: WordLists | None = None, width: int = 3) -> CLCRec:
    torch.manual_seed(0)
    content = normalised_content([torch.randn(10, 4), torch.randn(10, 2)])
    return CLCRec(
        ModelConfig(embed_dim=width, hidden_dim=6, word_dim=2),
        num_users=5,
        num_items=10,
        num_warm=7,
        content_IF=content,
        words=words,
    )


def word_lists() -> WordLists:
    rows = [[0], [1, 2], [3, 3, 0], [], [4], [1], [2, 0], [3], [0, 1, 2, 3], [4, 4]]
    ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return WordLists(ptr, torch.tensor([word for row in rows for word in row]), 5)


def test_modalities_are_scaled_to_length_1_apart_and_zero_rows_stay_zero():
    v, a = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 1.0]], dtype=torch.float16)
    found = normalised_content([v, a])
    assert found.dtype == torch.float32
    half = math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8, 0.0, 1.0], [0.0, 0.0, half, half]]))


def test_very_large_and_very_small_rows_get_length_1_too():
    found = normalised_content([torch.tensor([[3e30, 4e30], [3e-30, -4e-30], [1e-44, 0.0]])])
    torch.testing.assert_close(found[:2], torch.tensor([[0.6, 0.8], [0.6, -0.8]]))
    assert found.isfinite().all()


def test_initial_embeddings_have_the_spread_of_one_xavier_table():
    torch.manual_seed(0)
    model = CLCRec(ModelConfig(), num_users=4000, num_items=3000, num_warm=2000, content_IF=torch.zeros(3000, 2))
    expected = math.sqrt(2 / (4000 + 3000 + 64))
    assert float(model.user.detach().std()) == pytest.approx(expected, rel=0.02)
    assert float(model.item.detach().std()) == pytest.approx(expected, rel=0.02)
    assert model.item.shape == (2000, 64)


@pytest.mark.parametrize("words", [None, word_lists()], ids=["numbers", "with words"])
def test_rows_are_encoded_as_in_the_whole(words: WordLists | None):
    model = make(words)
    whole = torch.cat([model.encode_warm(), model.encode_cold()])
    rows = torch.tensor([2, 9, 0, 3, 2])
    torch.testing.assert_close(model.encode_rows(rows), whole[rows])
    torch.testing.assert_close(model.all_items(), torch.cat([model.item, whole[7:]]))


def test_an_items_words_count_with_their_repeats_and_no_word_is_zero():
    model = make(word_lists())
    assert model.word is not None
    expected = F.normalize((2 * model.word[3] + model.word[0]) / 3, dim=0)
    found = model._with_words(model.content[2:4], torch.tensor([3, 3, 0]), torch.tensor([0, 3, 3]))
    torch.testing.assert_close(found[0, 6:], expected)
    assert found[1, 6:].tolist() == [0.0, 0.0]


def test_content_is_no_part_of_the_weights():
    assert not any(name.startswith(("content", "word_")) for name in make(word_lists()).state_dict())


def test_equal_scores_cost_the_logarithm_of_their_number():
    zeros = torch.zeros(2, 3)
    parts = losses.pair_losses(
        zeros,
        torch.zeros(5, 3),
        torch.zeros(5, 3),
        torch.tensor([[0, 1, 2], [3, 4, 0]]),
        torch.zeros(2, 3, dtype=torch.uint8),
        temperature=1.0,
        by_matrix=True,
    )
    assert parts.contrast.item() == pytest.approx(math.log(3))
    assert parts.preference.item() == pytest.approx(math.log(3))
    assert parts.norm.item() == 0.0


def test_zero_vectors_have_finite_gradients():
    user, item = torch.zeros(2, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    content = torch.zeros(5, 3, requires_grad=True)
    parts = losses.pair_losses(
        user,
        item,
        content,
        torch.tensor([[0, 1], [2, 3]]),
        torch.ones(2, 2, dtype=torch.uint8),
        temperature=0.1,
        by_matrix=False,
    )
    losses.total(parts, lr_lambda=0.5, reg_weight=1.0).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (user, item, content))


@pytest.mark.parametrize("replaced", [0.0, 0.5, 1.0])
def test_shared_negatives_give_the_loss_of_the_same_negatives_written_out(replaced: float):
    g = torch.Generator().manual_seed(3)
    batch, count, rows, width = 6, 5, 12, 4
    user, item, content = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (batch, rows, rows))
    positive = torch.randint(rows, (batch,), generator=g)
    shared = torch.randperm(rows, generator=g)[:count]
    positive_times = (torch.rand(batch, generator=g) < replaced).byte()
    shared_times = (torch.rand(count, generator=g) < replaced).byte()
    found = losses.shared_losses(
        user,
        item,
        content,
        positive,
        positive_times,
        shared,
        shared_times,
        torch.zeros(batch, count, dtype=torch.bool),
        temperature=0.5,
    )
    expected = losses.pair_losses(
        user,
        item,
        content,
        torch.cat([positive[:, None], shared.expand(batch, -1)], dim=1),
        torch.cat([positive_times[:, None], shared_times.expand(batch, -1)], dim=1),
        temperature=0.5,
        by_matrix=True,
    )
    assert found.contrast.item() == pytest.approx(expected.contrast.item(), rel=1e-6)
    assert found.preference.item() == pytest.approx(expected.preference.item(), rel=1e-6)
    assert found.norm.item() == pytest.approx(expected.norm.item(), rel=1e-6)


def test_an_excluded_shared_negative_changes_nothing():
    g = torch.Generator().manual_seed(4)
    user, item, content = (torch.randn(n, 4, generator=g) for n in (3, 8, 8))
    zero = torch.zeros(3, dtype=torch.uint8)

    def loss(shared: list[int], excluded: list[bool]) -> list[float]:
        parts = losses.shared_losses(
            user,
            item,
            content,
            torch.tensor([0, 1, 2]),
            zero,
            torch.tensor(shared),
            torch.zeros(len(shared), dtype=torch.uint8),
            torch.tensor(excluded).expand(3, -1),
            temperature=0.3,
        )
        return [parts.contrast.item(), parts.preference.item()]

    assert loss([4, 5, 6], [False, False, True]) == pytest.approx(loss([4, 5], [False, False]), rel=1e-6)
    assert loss([4, 5, 6], [False, False, False]) != pytest.approx(loss([4, 5], [False, False]), rel=1e-3)


def test_both_forms_of_the_scores_have_the_same_gradients():
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (3, 7, 7)]
    user, item, content = tensors
    index = torch.stack([torch.randperm(7, generator=g)[:4] for _ in range(3)])
    times = torch.randint(0, 3, (3, 4), generator=g).byte()

    def gradients(matrix: bool) -> tuple[torch.Tensor, ...]:
        parts = losses.pair_losses(user, item, content, index, times, temperature=0.7, by_matrix=matrix, repeats=True)
        return torch.autograd.grad(losses.total(parts, lr_lambda=0.3, reg_weight=0.1), tensors)

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", ["matrix", "gather", "shared"])
def test_gradients_under_bf16_are_those_of_fp32_up_to_its_digits(form: str):
    """Sums over thousands of positions must not run in bf16, which has 8 bits."""
    g = torch.Generator().manual_seed(6)
    batch, rows, width = 2048, 100, 16
    user, item = torch.randn(batch, width, generator=g) * 0.3, torch.randn(rows, width, generator=g) * 0.3
    content = torch.randn(rows, width, generator=g) * 0.3
    index = torch.stack([torch.randperm(rows, generator=g)[:33] for _ in range(batch)])
    times = torch.ones(batch, 33, dtype=torch.uint8)

    def gradient(low: torch.dtype) -> torch.Tensor:
        leaf = content.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low == torch.bfloat16):
            encoded = leaf.to(low)
            if form == "shared":
                none = torch.zeros(batch, 32, dtype=torch.bool)
                parts = losses.shared_losses(
                    user, item, encoded, index[:, 0], times[:, 0], index[0, 1:], times[0, 1:], none, temperature=0.2
                )
            else:
                parts = losses.pair_losses(
                    user, item, encoded, index, times, temperature=0.2, by_matrix=form == "matrix"
                )
        losses.total(parts, lr_lambda=0.5, reg_weight=0.0).backward()
        assert leaf.grad is not None
        return leaf.grad

    exact, low = gradient(torch.float32), gradient(torch.bfloat16)
    assert float((low - exact).norm() / exact.norm()) < 0.02
