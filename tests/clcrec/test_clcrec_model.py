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


@pytest.mark.parametrize("by_matrix", [True, False])
def test_both_forms_of_the_scores_have_the_same_gradients(by_matrix: bool):
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(n, 4, generator=g, dtype=torch.float64, requires_grad=True) for n in (3, 7, 7)]
    index = torch.stack([torch.randperm(7, generator=g)[:4] for _ in range(3)])
    times = torch.randint(0, 3, (3, 4), generator=g).byte()

    def gradients(matrix: bool) -> tuple[torch.Tensor, ...]:
        parts = losses.pair_losses(*tensors, index, times, temperature=0.7, by_matrix=matrix, repeats=True)
        return torch.autograd.grad(losses.total(parts, lr_lambda=0.3, reg_weight=0.1), tensors)

    for one, other in zip(gradients(by_matrix), gradients(not by_matrix), strict=True):
        torch.testing.assert_close(one, other)
