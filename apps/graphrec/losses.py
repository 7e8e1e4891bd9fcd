"""The losses as functions of vectors and scores.

Legend: B pairs, K negatives of a pair or shared by all, M = 1 + K places of a pair (0 is the positive), C candidate
items, R rows, D embedding dim, N users and items.

    bpr        softplus(s_n - s_p), the mean over pairs and their negatives (Rendle et al. 2009)
    softmax    cross-entropy of the positive among itself and the negatives (InfoNCE)
    in batch   the same, with the distinct positives of the batch as negatives and log q(item) subtracted
    directau   |u - i|^2 of unit vectors + gamma log-mean-exp(-2 |x - x'|^2) (Wang et al., KDD 2022)
    contrast   InfoNCE of two views of the same nodes, each node against all of them
    clcrec     lam L1 + (1 - lam) L2 (Wei et al., ACM MM 2021): item against content, user against item

s is a score over the temperature. Negatives shared by a batch make the scores one matrix product, which costs a small
part of gathering each pair's own. A shared negative that is a positive of the pair's user is left out.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK_BYTES = 4 << 20  # of scores: a chunk stays in the cache between its passes
CUDA_CHUNK_BYTES = 256 << 20
EXCLUDED = -1e9  # logit of a shared negative that is left out: exp() of it is exactly 0
CHEAP_MATRIX = 128  # a product with C candidates costs less than gathering M of them up to C = 128 M


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of that type are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(columns: int, device: torch.device) -> int:
    """How many rows of scores of that width to compute at a time."""
    budget = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    return max(16, budget // (4 * max(1, columns)))


def low_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products take where autocast is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _SharedSoftmax(torch.autograd.Function):
    """Sum of cross-entropies; forward computes the gradients too, so that each chunk of scores is made once."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BD: Tensor,
        positive_BD: Tensor,
        negative_KD: Tensor,
        excluded_BK: Tensor,
        bias_B: Tensor | None,
        bias_K: Tensor | None,
        temperature: float,
    ) -> Tensor:
        low, exact = low_dtype(query_BD), exact_dtype(query_BD.dtype)
        query, negative = query_BD.to(low), negative_KD.to(low)
        positive_B = (query_BD * positive_BD).sum(1).to(exact) / temperature
        if bias_B is not None:
            positive_B = positive_B + bias_B
        grad_query = torch.empty_like(query_BD, dtype=exact)
        grad_negative = torch.zeros_like(negative_KD, dtype=exact)
        residual_B = torch.empty_like(positive_B)  # d loss / d positive score
        total = positive_B.new_zeros(())
        rows = chunk_rows(negative.shape[0], query.device)
        with torch.autocast(query.device.type, enabled=False):
            for begin in range(0, query.shape[0], rows):
                part, end = query[begin : begin + rows], begin + rows
                logits = torch.mm(part, negative.t()).to(exact).div_(temperature)
                if bias_K is not None:
                    logits += bias_K
                logits.masked_fill_(excluded_BK[begin:end], EXCLUDED)
                positive = positive_B[begin:end]
                log_sum = torch.logaddexp(torch.logsumexp(logits, dim=1), positive)
                total += (log_sum - positive).sum()
                residual_B[begin:end] = torch.expm1(positive - log_sum) / temperature
                share = logits.sub_(log_sum.unsqueeze(1)).exp_().div_(temperature).to(low)
                grad_query[begin:end] = torch.mm(share, negative)
                grad_negative += torch.mm(share.t(), part)
        grad_query += residual_B.unsqueeze(1) * positive_BD
        ctx.save_for_backward(grad_query, residual_B.unsqueeze(1) * query_BD, grad_negative)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, positive, negative = (saved * grad for saved in ctx.saved_tensors)
        return query, positive, negative, None, None, None, None


def shared_softmax(
    query_BD: Tensor,
    positive_BD: Tensor,
    negative_KD: Tensor,
    excluded_BK: Tensor,
    *,
    temperature: float,
    bias_B: Tensor | None = None,
    bias_K: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of each pair's positive among itself and K shared negatives, a chunk of scores at a time.

    `excluded_BK` (bool) leaves negatives out; the biases (minus log q) are added to the logits of the positives and of
    the negatives. With all items as negatives, the positives excluded, it is the full cross-entropy.
    """
    total: Tensor = _SharedSoftmax.apply(  # type: ignore[no-untyped-call]
        query_BD, positive_BD, negative_KD, excluded_BK, bias_B, bias_K, temperature
    )
    return total / query_BD.shape[0]


class _PickedScores(torch.autograd.Function):
    """Scores at picked places of the matrix of all scores, of which a chunk exists at a time."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, table_CD: Tensor, index_BM: Tensor) -> Tensor:
        low = low_dtype(query_BD)
        query, table = query_BD.to(low), table_CD.to(low)
        score_BM = torch.empty(index_BM.shape, dtype=exact_dtype(query_BD.dtype), device=query.device)
        rows = chunk_rows(table.shape[0], query.device)
        with torch.autocast(query.device.type, enabled=False):
            for begin in range(0, query.shape[0], rows):
                score_bC = torch.mm(query[begin : begin + rows], table.t())
                score_BM[begin : begin + rows] = score_bC.gather(1, index_BM[begin : begin + rows])
        ctx.save_for_backward(query, table, index_BM)
        ctx.dtypes = query_BD.dtype, table_CD.dtype
        return score_BM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor, Tensor, None]:
        query, table, index_BM = ctx.saved_tensors
        exact = exact_dtype(table.dtype)
        grad_query = torch.empty_like(query)
        grad_table = torch.zeros_like(table, dtype=exact)  # of many chunks: their sum must not lose digits
        rows = chunk_rows(table.shape[0], query.device)
        spread = torch.empty(min(rows, query.shape[0]), table.shape[0], dtype=query.dtype, device=query.device)
        for begin in range(0, query.shape[0], rows):
            part = query[begin : begin + rows]
            spread_bC = spread[: part.shape[0]].zero_()
            spread_bC.scatter_add_(1, index_BM[begin : begin + rows], grad_BM[begin : begin + rows].to(query.dtype))
            grad_query[begin : begin + rows] = torch.mm(spread_bC, table)
            grad_table += torch.mm(spread_bC.t(), part)
        return grad_query.to(ctx.dtypes[0]), grad_table.to(ctx.dtypes[1]), None


def picked_scores(query_BD: Tensor, table_CD: Tensor, index_BM: Tensor) -> Tensor:
    """Dot products of each query with its own rows `index_BM` ([B, M] int64) of the table, [B, M].

    By products with the whole table where it has few rows, else by gathering: the same values up to rounding.
    """
    if table_CD.shape[0] <= CHEAP_MATRIX * index_BM.shape[1]:
        scores: Tensor = _PickedScores.apply(query_BD, table_CD, index_BM)  # type: ignore[no-untyped-call]
        return scores
    return torch.bmm(F.embedding(index_BM, table_CD), query_BD.unsqueeze(2)).squeeze(2)


def first_of(logits_BM: Tensor) -> Tensor:
    """Mean cross-entropy of column 0, in float32 at least."""
    logits = logits_BM.to(exact_dtype(logits_BM.dtype))
    return (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()


def softmax(positive_B: Tensor, negative_BK: Tensor, excluded_BK: Tensor | None) -> Tensor:
    """Mean cross-entropy of each pair's positive among itself and its K negatives; `excluded_BK` leaves some out."""
    if excluded_BK is not None:
        negative_BK = negative_BK.masked_fill(excluded_BK, EXCLUDED)
    return first_of(torch.cat([positive_B.unsqueeze(1), negative_BK], dim=1))


def bpr(positive_B: Tensor, negative_BK: Tensor, excluded_BK: Tensor | None) -> Tensor:
    """Mean over pairs of the mean softplus(s_n - s_p) over the pair's negatives that are not left out."""
    loss_BK = F.softplus((negative_BK - positive_B.unsqueeze(1)).to(exact_dtype(positive_B.dtype)))
    if excluded_BK is None:
        return loss_BK.mean()
    allowed = (~excluded_BK).sum(1).clamp(min=1)
    return (loss_BK.masked_fill(excluded_BK, 0.0).sum(1) / allowed).mean()


def alignment(user_BD: Tensor, item_BD: Tensor) -> Tensor:
    """Mean squared distance between the unit vectors of a pair."""
    return (F.normalize(user_BD, dim=1) - F.normalize(item_BD, dim=1)).square().sum(1).mean()


def uniformity(x_RD: Tensor) -> Tensor:
    """log of the mean over pairs of rows of exp(-2 |x - x'|^2), of unit vectors; 0 for a single row."""
    if x_RD.shape[0] < 2:
        return x_RD.sum() * 0.0
    unit = F.normalize(x_RD, dim=1)
    cosine = torch.mm(unit, unit.t()).to(exact_dtype(unit.dtype))
    itself = torch.eye(unit.shape[0], dtype=torch.bool, device=unit.device)
    log_sum = torch.logsumexp((4 * cosine - 4).masked_fill(itself, EXCLUDED).flatten(), dim=0)
    return log_sum - torch.log(log_sum.new_tensor(unit.shape[0] * (unit.shape[0] - 1)))


def contrast(anchor_RD: Tensor, view_RD: Tensor, *, temperature: float) -> Tensor:
    """Mean cross-entropy of each row's other view among the other views of all rows, by cosine."""
    logits = torch.mm(F.normalize(anchor_RD, dim=1), F.normalize(view_RD, dim=1).t())
    logits = logits.to(exact_dtype(logits.dtype)) / temperature
    return F.cross_entropy(logits, torch.arange(logits.shape[0], device=logits.device))


class _SquareNorms(torch.autograd.Function):
    """Squared norms of rows; backward is one pass over the table, where that of products takes several."""

    @staticmethod
    def forward(ctx: Any, table_ND: Tensor) -> Tensor:
        ctx.save_for_backward(table_ND)
        return torch.linalg.vector_norm(table_ND, dim=1).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Tensor:
        (table_ND,) = ctx.saved_tensors
        return (2 * grad_N).unsqueeze(1) * table_ND


def half_square_norm(table_ND: Tensor, *rows: Tensor) -> Tensor:
    """Half the sum over `rows` (int64 of any shape) of the mean squared norm of those rows of the table."""
    square_N: Tensor = _SquareNorms.apply(table_ND)  # type: ignore[no-untyped-call]
    return 0.5 * torch.stack([square_N.index_select(0, row.flatten()).mean() for row in rows]).sum()


def mean_norm(user_BD: Tensor, id_CD: Tensor, item_BM: Tensor) -> Tensor:
    """CLCRec's penalty: half the mean norm of the users plus that of the items; zero vectors get no gradient."""
    item_C = torch.linalg.vector_norm(id_CD, dim=1)
    return 0.5 * (torch.linalg.vector_norm(user_BD, dim=1).mean() + item_C.index_select(0, item_BM.flatten()).mean())


class Parts(NamedTuple):
    """CLCRec's scalars, means over the pairs."""

    contrast: Tensor  # L1, item embedding against content: cosine
    preference: Tensor  # L2, user against item: dot product
    norm: Tensor  # R


def clcrec(
    user_BD: Tensor,
    id_CD: Tensor,
    content_CD: Tensor,
    item_BM: Tensor,
    replaced_BM: Tensor,
    *,
    temperature: float,
) -> Parts:
    """CLCRec's parts with negatives of each pair's own; `item_BM` ([B, M] int64) are rows of the C candidates.

    Where `replaced_BM` (bool) says so, an item's embedding is replaced by its content in L2.
    """
    anchor_BD = F.normalize(F.embedding(item_BM[:, 0], id_CD), dim=1)
    both = torch.cat([id_CD, content_CD.to(id_CD.dtype)])  # rows C..2C-1 are content
    contrast = picked_scores(anchor_BD, F.normalize(content_CD.to(id_CD.dtype), dim=1), item_BM)
    preference = picked_scores(user_BD, both, item_BM + id_CD.shape[0] * replaced_BM)
    return Parts(
        first_of(contrast / temperature), first_of(preference / temperature), mean_norm(user_BD, id_CD, item_BM)
    )


def shared_clcrec(
    user_BD: Tensor,
    id_CD: Tensor,
    content_CD: Tensor,
    item_B: Tensor,
    replaced_B: Tensor,
    shared_K: Tensor,
    replaced_K: Tensor,
    excluded_BK: Tensor,
    *,
    temperature: float,
) -> Parts:
    """The same with K negatives that all pairs share: another estimator of the same mean, one product per part.

    All means run over pairs, as if each had the K negatives as its own.
    """
    content_CD = content_CD.to(id_CD.dtype)
    id_B, content_B = F.embedding(item_B, id_CD), F.embedding(item_B, content_CD)
    id_K, content_K = F.embedding(shared_K, id_CD), F.embedding(shared_K, content_CD)
    contrast = shared_softmax(
        F.normalize(id_B, dim=1),
        F.normalize(content_B, dim=1),
        F.normalize(content_K, dim=1),
        excluded_BK,
        temperature=temperature,
    )
    mixed_B = torch.where(replaced_B.unsqueeze(1), content_B, id_B)
    mixed_K = torch.where(replaced_K.unsqueeze(1), content_K, id_K)
    preference = shared_softmax(user_BD, mixed_B, mixed_K, excluded_BK, temperature=temperature)
    count = shared_K.numel()
    item = torch.linalg.vector_norm(id_B, dim=1).mean() + count * torch.linalg.vector_norm(id_K, dim=1).mean()
    user = torch.linalg.vector_norm(user_BD, dim=1).mean()
    return Parts(contrast, preference, 0.5 * (user + item / (1 + count)))
