"""Losses over a catalogue, as functions of queries and an item matrix.

Legend: N positions with a target, D embedding dim, I items (row 0 is padding), K shared negatives, C candidate rows.

None of them gathers many negatives per position, which costs many times a matrix product with negatives that all
positions share. Scores are dot products; cosine and temperature are applied to both sides before.

Positions may have weights: the loss is then the sum of weight times loss over the number of positions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

EXCLUDED = -1e9  # logit of a shared negative that is the position's own target: exp() of it is exactly 0
CPU_CHUNK_BYTES = 4 << 20  # of logits: a chunk stays in the cache between its passes
CUDA_CHUNK_BYTES = 256 << 20
SHARED_CHUNK_BYTES = 256 << 20  # of logits against shared negatives; beyond it they are recomputed in backward


def chunk_rows(columns: int, device: torch.device) -> int:
    """How many rows of logits of that width to compute at a time."""
    budget = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(16, budget // (4 * max(1, columns)))


class _CrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; forward computes both gradients too, so that each chunk of logits is made once."""

    @staticmethod
    def forward(
        ctx: Any,
        query_ND: Tensor,
        item_CD: Tensor,
        target_N: Tensor,
        bias_C: Tensor | None,
        weight_N: Tensor | None,
    ) -> Tensor:
        device = query_ND.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_ND.dtype
        query, item = query_ND.to(low), item_CD.to(low)
        grad_query = torch.empty_like(query_ND)
        grad_item = torch.zeros_like(item_CD)
        total = query_ND.new_zeros((), dtype=torch.float32)
        wants_gradient = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            rows = chunk_rows(item.shape[0], query.device)
            for begin in range(0, query.shape[0], rows):
                part, target = query[begin : begin + rows], target_N[begin : begin + rows, None]
                logits = torch.mm(part, item.t()).float()
                if bias_C is not None:
                    logits += bias_C
                log_p = torch.log_softmax(logits, dim=1)
                weight = None if weight_N is None else weight_N[begin : begin + rows, None]
                total -= weighted(log_p.gather(1, target), weight).sum()
                if wants_gradient:  # d loss / d logits = softmax - onehot
                    residual = log_p.exp_()
                    residual.scatter_add_(1, target, residual.new_full((1, 1), -1.0).expand_as(target))
                    residual = weighted(residual, weight).to(low)
                    grad_query[begin : begin + rows] = torch.mm(residual, item)
                    grad_item += torch.mm(residual.t(), part)
        ctx.save_for_backward(grad_query, grad_item)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_query, grad_item = ctx.saved_tensors
        return grad_query * grad, grad_item * grad, None, None, None


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """The values times their weights, where there are any."""
    return x if weight is None else x * weight


def cross_entropy(
    query_ND: Tensor,
    item_CD: Tensor,
    target_N: Tensor,
    *,
    bias_C: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the rows of `item_CD` in bounded memory: logits exist one chunk at a time.

    `target_N` ([N] int64) indexes rows of `item_CD`; `bias_C` is added to the logits (logQ) and gets no gradient.
    """
    total: Tensor = _CrossEntropy.apply(query_ND, item_CD, target_N, bias_C, weight_N)  # type: ignore[no-untyped-call]
    return total / max(1, target_N.numel())


def full_cross_entropy(
    query_ND: Tensor, item_ID: Tensor, target_N: Tensor, *, weight_N: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over the whole catalogue; `target_N` holds item ids, padding is no candidate."""
    return cross_entropy(query_ND, item_ID[1:], target_N - 1, weight_N=weight_N)


def in_batch_cross_entropy(
    query_ND: Tensor,
    item_ID: Tensor,
    target_N: Tensor,
    candidate_C: Tensor,
    *,
    log_q_I: Tensor | None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over the distinct targets of the step, corrected by how often each item is a target.

    `candidate_C` ([C] int64, sorted): those targets, of all micro-batches.

    `log_q_I` ([I] float32): logarithm of each item's share of the training targets; subtracting it makes the sampled
    loss consistent with the full one (Bengio and Senecal 2008; Yi et al. 2019). None leaves the popularity bias in.
    """
    target = torch.searchsorted(candidate_C, target_N)
    bias = None if log_q_I is None else -log_q_I[candidate_C]
    return cross_entropy(query_ND, F.embedding(candidate_C, item_ID), target, bias_C=bias, weight_N=weight_N)


def at_least_fp32(x: Tensor) -> Tensor:
    """Half-precision values as float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def shared_logits(query_ND: Tensor, item_ID: Tensor, target_N: Tensor, negative_K: Tensor) -> Tensor:
    """Scores of K negatives that all positions share, [N, K]; a position's own target among them is excluded."""
    logits = query_ND @ F.embedding(negative_K, item_ID).t()
    return at_least_fp32(logits).masked_fill(negative_K == target_N[:, None], EXCLUDED)


def sampled_softmax(
    query_ND: Tensor,
    item_ID: Tensor,
    target_N: Tensor,
    negative_K: Tensor,
    *,
    log_q_I: Tensor | None = None,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the target among itself and K shared negatives ([K] int64 item ids).

    `log_q_I` ([I] float32): log of each item's expected number of draws among the K, subtracted from the negatives'
    logits. Their sum of exponentials then estimates that of all other items without bias, so that the loss approaches
    the full cross-entropy as K grows (importance sampling, Bengio and Senecal 2008). With all items drawn once and no
    correction it is the full cross-entropy.
    """

    def part(query: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        positive = at_least_fp32((query * F.embedding(target, item_ID)).sum(1, keepdim=True))
        negative = shared_logits(query, item_ID, target, negative_K)
        if log_q_I is not None:
            negative = negative - log_q_I[negative_K]
        loss = torch.logsumexp(torch.cat((positive, negative), dim=1), dim=1) - positive.squeeze(1)
        return weighted(loss, weight).sum()

    return sum_of_chunks(part, query_ND, target_N, weight_N, columns=negative_K.numel()) / max(1, target_N.numel())


def binary_cross_entropy(
    query_ND: Tensor, item_ID: Tensor, target_N: Tensor, negative_N: Tensor, *, weight_N: Tensor | None = None
) -> Tensor:
    """SASRec's loss: one positive and one negative per position, mean over positions.

    One negative per position costs as much as the positive's own lookup; more of them are shared (`gbce`).
    """
    positive = at_least_fp32((query_ND * F.embedding(target_N, item_ID)).sum(1))
    negative = at_least_fp32((query_ND * F.embedding(negative_N, item_ID)).sum(1))
    loss = F.softplus(-positive) + F.softplus(negative)
    return weighted(loss, weight_N).sum() / max(1, target_N.numel())


def generalised_bce(
    query_ND: Tensor,
    item_ID: Tensor,
    target_N: Tensor,
    negative_K: Tensor,
    *,
    num_items: int,
    t: float,
    weight_N: Tensor | None = None,
) -> Tensor:
    """gBCE (Petrov and Macdonald 2023, eq. 12-13): the positive's probability to the power beta, K shared negatives.

    beta = a (t (1 - 1/a) + 1/a) with a = K / (I - 1); t = 0 is plain BCE, t = 1 is calibrated like a full softmax.
    """
    rate = min(1.0, negative_K.numel() / max(1, num_items - 1))
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)

    def part(query: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        positive = at_least_fp32((query * F.embedding(target, item_ID)).sum(1))
        negative = shared_logits(query, item_ID, target, negative_K)
        return weighted(beta * F.softplus(-positive) + F.softplus(negative).sum(1), weight).sum()

    return sum_of_chunks(part, query_ND, target_N, weight_N, columns=negative_K.numel()) / max(1, target_N.numel())


def sum_of_chunks(
    part: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    query_ND: Tensor,
    target_N: Tensor,
    weight_N: Tensor | None,
    *,
    columns: int,
) -> Tensor:
    """Sum of `part(query, target, weight)` over chunks of rows; where they are several, backward makes logits anew."""
    rows = max(16, SHARED_CHUNK_BYTES // (4 * max(1, columns)))
    if target_N.numel() <= rows:
        return part(query_ND, target_N, weight_N)
    weights = [None] * -(-target_N.numel() // rows) if weight_N is None else torch.split(weight_N, rows)
    pieces = zip(torch.split(query_ND, rows), torch.split(target_N, rows), weights, strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()
