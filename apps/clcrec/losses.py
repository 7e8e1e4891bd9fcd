"""The losses of CLCRec (Wei et al., ACM MM 2021) as functions of vectors.

Legend: B pairs, M = 1 + N positions of a pair (0 is the positive), C candidate items, D embedding dim, K shared
negatives.

    L1  item embedding against content: cosine of the positive's embedding and each candidate's content, over T
    L2  user against item: dot product with each candidate's embedding, some replaced by its content, over T
    R   half the sum of the mean norms of the batch's user and item embeddings

Both are cross-entropies of the positive among the pair's M positions, through log-softmax: no score overflows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK_BYTES = 8 << 20  # of scores: a chunk stays in the cache between its passes
CUDA_CHUNK_BYTES = 256 << 20
EXCLUDED = -1e9  # logit of a shared negative that is a positive of the user: exp() of it is exactly 0


class Parts(NamedTuple):
    """Scalars, means over the batch."""

    contrast: Tensor  # L1
    preference: Tensor  # L2
    norm: Tensor  # R


def total(parts: Parts, *, lr_lambda: float, reg_weight: float) -> Tensor:
    """lam L1 + (1 - lam) L2 + reg R."""
    return lr_lambda * parts.contrast + (1 - lr_lambda) * parts.preference + reg_weight * parts.norm


def first_of(logits_BM: Tensor) -> Tensor:
    """Mean cross-entropy of column 0, in float32 at least."""
    logits = logits_BM.float() if logits_BM.dtype in (torch.float16, torch.bfloat16) else logits_BM
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def mean_norm(user_BD: Tensor, id_CD: Tensor, item_BM: Tensor) -> Tensor:
    """R: norms, not squares; zero vectors get a zero gradient."""
    user = torch.linalg.vector_norm(user_BD, dim=1).mean()
    item = torch.linalg.vector_norm(id_CD, dim=1).gather(0, item_BM.flatten()).mean()
    return 0.5 * (user + item)


class _FirstOfPicked(torch.autograd.Function):
    """Sum of cross-entropies; forward computes both gradients too, so that each chunk of scores is made once."""

    @staticmethod
    def forward(
        ctx: Any, query_BD: Tensor, table_CD: Tensor, index_BM: Tensor, times_BM: Tensor | None, temperature: float
    ) -> Tensor:
        device = query_BD.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_BD.dtype
        query, table = query_BD.to(low), table_CD.to(low)
        exact = torch.float64 if low == torch.float64 else torch.float32
        grad_query = torch.empty_like(query_BD)
        grad_table = torch.zeros_like(table_CD, dtype=exact)  # of many chunks: their sum must not lose digits
        total = query_BD.new_zeros((), dtype=exact)
        wants_gradient = any(ctx.needs_input_grad)
        budget = CUDA_CHUNK_BYTES if device == "cuda" else CPU_CHUNK_BYTES
        rows = max(16, budget // (4 * table.shape[0]))
        with torch.autocast(device, enabled=False):
            for begin in range(0, query.shape[0], rows):
                part, index_bM = query[begin : begin + rows], index_BM[begin : begin + rows]
                score_bC = torch.mm(part, table.t())
                log_p = torch.log_softmax(score_bC.gather(1, index_bM).to(exact) / temperature, dim=1)
                total -= log_p[:, 0].sum()
                if wants_gradient:  # d loss / d score = (softmax - first) / T at the picked places, zero elsewhere
                    residual = log_p.exp_()
                    residual[:, 0] -= 1
                    residual /= temperature
                    spread_bC = score_bC.zero_().scatter_add_(1, index_bM, residual.to(low))
                    grad_query[begin : begin + rows] = torch.mm(spread_bC, table)
                    if times_BM is not None:
                        residual *= times_BM[begin : begin + rows].to(exact).clamp(min=1)
                        spread_bC.zero_().scatter_add_(1, index_bM, residual.to(low))
                    grad_table += torch.mm(spread_bC.t(), part)
        ctx.save_for_backward(grad_query, grad_table.to(table_CD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_query, grad_table = ctx.saved_tensors
        return grad_query * grad, grad_table * grad, None, None, None


def first_of_picked(
    query_BD: Tensor, table_CD: Tensor, index_BM: Tensor, *, temperature: float, times_BM: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of column 0 among the rows `index_BM` of the table, scores dot products over the temperature.

    By products with the whole table, a chunk of rows at a time: no more memory than a chunk and the gradients. With
    `times_BM` ([B, M] integer) the table's gradient counts a place that often, at least once.
    """
    total: Tensor = _FirstOfPicked.apply(  # type: ignore[no-untyped-call]
        query_BD, table_CD, index_BM, times_BM, temperature
    )
    return total / query_BD.shape[0]


def first_of_gathered(
    query_BD: Tensor, table_CD: Tensor, index_BM: Tensor, *, temperature: float, times_BM: Tensor | None = None
) -> Tensor:
    """The same from gathered rows of the table, whatever its size."""
    exact = table_CD if table_CD.dtype == torch.float64 else table_CD.float()  # in which the gradients add up
    picked_BMD = F.embedding(index_BM, exact).to(table_CD.dtype)

    def scores(picked_BMD: Tensor, query_BD: Tensor) -> Tensor:
        return torch.bmm(picked_BMD, query_BD.unsqueeze(2)).squeeze(2) / temperature

    if times_BM is None:
        return first_of(scores(picked_BMD, query_BD))
    theirs_BM = scores(picked_BMD, query_BD.detach())  # adds gradients to the table, nothing to the value
    repeated_BM = (theirs_BM - theirs_BM.detach()) * times_BM.clamp(min=1)
    return first_of(scores(picked_BMD.detach(), query_BD) + repeated_BM)


def pair_losses(
    user_BD: Tensor,
    id_CD: Tensor,
    content_CD: Tensor,
    item_BM: Tensor,
    content_times_BM: Tensor,
    *,
    temperature: float,
    by_matrix: bool,
    repeats: bool = False,
) -> Parts:
    """The losses with negatives of each pair's own; `item_BM` ([B, M] int64) are rows of the C candidates.

    `content_times_BM` ([B, M] integer) says how often a position was drawn to be replaced by content; above 0 it is.
    With `repeats` the content's gradient counts every draw, as in the original (same loss); else once.
    `by_matrix`: scores of all B x C by matrix products and a lookup, else products of gathered vectors: the same
    values up to rounding, cheaper while C is within some tens of times M.
    """
    num_rows = id_CD.shape[0]
    anchor_BD = F.normalize(F.embedding(item_BM[:, 0], id_CD), dim=1).to(content_CD.dtype)
    both = torch.cat([id_CD.to(content_CD.dtype), content_CD])  # rows C..2C-1 are content
    place_BM = item_BM + num_rows * (content_times_BM > 0)
    cross_entropy = first_of_picked if by_matrix else first_of_gathered
    contrast = cross_entropy(anchor_BD, F.normalize(content_CD, dim=1), item_BM, temperature=temperature)
    preference = cross_entropy(
        user_BD.to(both.dtype),
        both,
        place_BM,
        temperature=temperature,
        times_BM=content_times_BM if repeats else None,
    )
    return Parts(contrast, preference, mean_norm(user_BD, id_CD, item_BM))


def shared_losses(
    user_BD: Tensor,
    id_CD: Tensor,
    content_CD: Tensor,
    item_B: Tensor,
    content_times_B: Tensor,
    shared_K: Tensor,
    shared_times_K: Tensor,
    excluded_BK: Tensor,
    *,
    temperature: float,
) -> Parts:
    """The losses with K negatives that all pairs share: another estimator of the same mean, one product per loss.

    `item_B` and `shared_K` (int64) are rows of the C candidates; the content of a replaced shared negative replaces it
    for every pair. `excluded_BK` (bool) leaves out what is a positive of the pair's user. All means run over pairs, as
    if each pair had the K negatives as its own.
    """
    count = shared_K.numel()
    content_B = F.embedding(item_B, content_CD)
    id_B = F.embedding(item_B, id_CD)
    id_K, content_K = F.embedding(shared_K, id_CD), F.embedding(shared_K, content_CD)

    def logits(query_BD: Tensor, positive_BD: Tensor, negative_KD: Tensor) -> Tensor:
        positive = (query_BD * positive_BD).sum(1, keepdim=True).float()
        negative = torch.mm(query_BD, negative_KD.t()).float().masked_fill(excluded_BK, EXCLUDED)
        return torch.cat([positive, negative], dim=1) / temperature

    anchor_BD = F.normalize(id_B, dim=1).to(content_CD.dtype)
    contrast = logits(anchor_BD, F.normalize(content_B, dim=1), F.normalize(content_K, dim=1))
    mixed_B = torch.where((content_times_B > 0).unsqueeze(1), content_B, id_B.to(content_B.dtype))
    mixed_K = torch.where((shared_times_K > 0).unsqueeze(1), content_K, id_K.to(content_K.dtype))
    preference = logits(user_BD.to(mixed_K.dtype), mixed_B, mixed_K)
    user = torch.linalg.vector_norm(user_BD, dim=1).mean()
    item = torch.linalg.vector_norm(id_B, dim=1).mean() + count * torch.linalg.vector_norm(id_K, dim=1).mean()
    return Parts(first_of(contrast), first_of(preference), 0.5 * (user + item / (1 + count)))
