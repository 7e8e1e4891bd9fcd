"""Losses against plain torch and slow loops, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from apps.seqrec import losses

N, D, ITEMS = 300, 12, 50


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    item = torch.randn(ITEMS + 1, D, generator=generator, dtype=dtype).requires_grad_()
    target = torch.randint(1, ITEMS + 1, (N,), generator=generator)
    return query, item, target


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk_bytes", [4 * ITEMS * 16, 4 * ITEMS * 70, 1 << 30])
def test_full_cross_entropy_equals_torch_whatever_the_chunk(monkeypatch, chunk_bytes):
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", chunk_bytes)
    query, item, target = inputs(torch.float32)
    found = losses.full_cross_entropy(query, item, target)
    expected = F.cross_entropy(query @ item[1:].t(), target - 1)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients(3 * found, query, item), gradients(3 * expected, query, item), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not gradients(losses.full_cross_entropy(query, item, target), item)[0][0].any()


def test_full_cross_entropy_survives_huge_logits():
    query, item, target = inputs(torch.float32)
    found = losses.full_cross_entropy(query * 1e4, item, target)
    torch.testing.assert_close(found, F.cross_entropy((query * 1e4) @ item[1:].t(), target - 1))
    assert torch.isfinite(gradients(found, query)[0]).all()


def test_full_cross_entropy_computes_no_gradient_where_none_is_wanted():
    query, item, target = (t.detach() for t in inputs(torch.float32))
    assert not losses.full_cross_entropy(query, item, target).requires_grad


def test_full_cross_entropy_under_bf16_stays_close():
    query, item, target = inputs(torch.float32)
    expected = losses.full_cross_entropy(query, item, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses.full_cross_entropy(query, item, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found_gradient, expected_gradient = gradients(found, query)[0], gradients(expected, query)[0]
    assert float((found_gradient - expected_gradient).norm() / expected_gradient.norm()) < 0.02


def test_sampled_softmax_with_all_items_is_the_full_cross_entropy():
    query, item, target = inputs()
    found = losses.sampled_softmax(query, item, target, torch.arange(1, ITEMS + 1))
    expected = F.cross_entropy(query @ item[1:].t(), target - 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(found, query, item), gradients(expected, query, item), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_sampled_softmax_equals_a_slow_loop_with_logq_and_accidental_hits():
    query, item, target = inputs()
    negative = torch.tensor([3, 3, 9, 14, 50, 1])
    log_q = torch.linspace(-3, 0, ITEMS + 1, dtype=torch.float64)
    found = losses.sampled_softmax(query, item, target, negative, log_q_I=log_q)
    query, item = query.detach(), item.detach()
    total = 0.0
    for n in range(N):
        logits = [float(query[n] @ item[target[n]])]
        logits += [float(query[n] @ item[k] - log_q[k]) for k in negative if k != target[n]]
        total += math.log(sum(math.exp(x) for x in logits)) - logits[0]
    assert float(found.detach()) == pytest.approx(total / N, rel=1e-5)


def test_logq_makes_a_popularity_sample_estimate_the_full_softmax():
    query, item, target = (t.detach() * 0.3 if t.is_floating_point() else t for t in inputs())
    share = torch.arange(1, ITEMS + 1, dtype=torch.float64)
    share = share / share.sum()
    log_q = torch.cat((torch.zeros(1), share.log()))
    generator = torch.Generator().manual_seed(1)
    count = 4096
    negative = 1 + torch.multinomial(share, count, replacement=True, generator=generator)
    full = float(losses.full_cross_entropy(query.float(), item.float(), target))
    corrected = float(losses.sampled_softmax(query, item, target, negative, log_q_I=log_q + math.log(count)))
    assert corrected == pytest.approx(full, abs=0.1)


def test_in_batch_candidates_are_the_distinct_targets():
    query, item, target = inputs(torch.float32)
    target = target % 7 + 1
    log_q = torch.linspace(-3, 0, ITEMS + 1)
    for correction in (None, log_q):
        found = losses.in_batch_cross_entropy(query, item, target, torch.arange(1, 8), log_q_I=correction)
        logits = query @ item[1:8].t() - (0 if correction is None else correction[1:8])
        expected = F.cross_entropy(logits, target - 1)
        torch.testing.assert_close(found, expected)
        for mine, theirs in zip(gradients(found, query, item), gradients(expected, query, item), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_bce_is_two_logistic_losses_per_position_and_2_ln_2_at_zero_logits():
    query, item, target = inputs()
    negative = target.flip(0)
    found = losses.binary_cross_entropy(query, item, target, negative)
    positive_score, negative_score = (query * item[target]).sum(1), (query * item[negative]).sum(1)
    ones = torch.ones(N, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(positive_score, ones) + F.binary_cross_entropy_with_logits(
        negative_score, 0 * ones
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    zero = losses.binary_cross_entropy(0 * query, item, target, negative)
    assert float(zero.detach()) == pytest.approx(2 * math.log(2))


def test_gbce_equals_its_formula_and_plain_bce_at_t_zero():
    query, item, target = inputs()
    negative = torch.tensor([3, 9, 14, 50, 1])
    for t in (0.0, 0.75, 1.0):
        found = losses.generalised_bce(query, item, target, negative, num_items=ITEMS, t=t)
        rate = len(negative) / (ITEMS - 1)
        beta = rate * (t * (1 - 1 / rate) + 1 / rate)
        assert t > 0 or beta == pytest.approx(1.0)
        total = 0.0
        query, item = query.detach(), item.detach()
        for n in range(N):
            total -= beta * float(F.logsigmoid(query[n] @ item[target[n]]))
            total -= sum(float(F.logsigmoid(-(query[n] @ item[k]))) for k in negative if k != target[n])
        assert float(found.detach()) == pytest.approx(total / N, rel=1e-5)


def test_chunked_shared_negatives_equal_whole_ones(monkeypatch):
    query, item, target = inputs()
    negative = torch.arange(1, 41)
    whole = losses.sampled_softmax(query, item, target, negative)
    expected = gradients(whole, query, item)
    monkeypatch.setattr(losses, "SHARED_CHUNK_BYTES", 4 * 40 * 64)
    chunked = losses.sampled_softmax(query, item, target, negative)
    torch.testing.assert_close(chunked, whole)
    for mine, theirs in zip(gradients(chunked, query, item), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_targets_is_no_loss():
    query, item = (tensor.detach() for tensor in inputs(torch.float32)[:2])
    nothing = torch.zeros(0, dtype=torch.int64)
    assert float(losses.full_cross_entropy(query[:0], item, nothing)) == 0.0
    assert float(losses.sampled_softmax(query[:0], item, nothing, torch.tensor([1]))) == 0.0
