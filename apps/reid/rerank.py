"""k-reciprocal re-ranking (Zhong et al., CVPR 2017), exact and sparse: nothing of queries + gallery squared is stored.

Legend: N queries and gallery images, the queries first; Q queries, G gallery images, E embedding dim, T images of a
top list, H images of half a list, B rows of a block, C candidates of a row, Z weights of all rows.

The distance d of two images is 1 - cosine, as a share of the first one's largest to any image (the squared Euclidean
distance of unit vectors, scaled, is the same number). With top lists of k1 + 1 images, each image's own among them:

1. R(i): the images of i's list whose own lists hold i. R'(c): the same with lists of k1 / 2 + 1 images.
2. R(i) grows by R'(c) of each c in R(i) of which more than two thirds lie in R(i).
3. V(i): exp(-d(i, j)) for every j of R(i), in sum 1; with k2 above 1 the mean of V over the first k2 of i's list.
4. Jaccard distance: 1 - m / (2 - m), where m is the sum over all images j of the smaller of V(q, j) and V(g, j).
5. The final distance is (1 - lambda) times the Jaccard distance plus lambda times d(q, g).

Top lists are of falling cosine, equal ones by rising place. A row of V holds some dozens of weights, so that all of V
is a few lists; the formula with N x N matrices takes 16 bytes per pair.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from shared.ranking import top_k

ScoreOf = Callable[[Tensor], Tensor]  # rows of queries [B] int64 -> scores of the whole gallery [B, G] float32


class Weights(NamedTuple):
    """A sparse matrix: row i has weight[ptr[i] : ptr[i + 1]] in the columns of the same places, which rise."""

    ptr: Tensor  # [N + 1] int64
    column: Tensor  # [Z] int64
    weight: Tensor  # [Z] float32


def rerank_scores(
    query_QE: Tensor, gallery_GE: Tensor, *, k1: int, k2: int, lambda_: float, budget_bytes: int
) -> ScoreOf:
    """Scores 1 - final distance, which are 1 at best and 0 at worst, of unit vectors; computed when rows are asked for.

    Beside the lists (some hundred bytes to a few thousand per image, by k1) and the rows that are asked for, work stays
    within about `budget_bytes`.
    """
    num_queries, num_gallery = query_QE.shape[0], gallery_GE.shape[0]
    if not num_gallery:
        raise ValueError("the gallery is empty, so that there is nothing to re-rank")
    x_NE = torch.cat([query_QE, gallery_GE]).float()
    count = x_NE.shape[0]
    top_NT = top_k(x_NE, x_NE, k=min(max(k1 + 1, k2), count), budget_bytes=budget_bytes)[1]
    # the largest distance is that of the smallest cosine; where all vectors are one, there is only rounding to divide
    farthest_N = (1 + top_k(x_NE, -x_NE, k=1, budget_bytes=budget_bytes)[0][:, 0]).clamp(min=1e-6)
    half = min(round(k1 / 2) + 1, count)
    weights = reciprocal_weights(x_NE, top_NT[:, : k1 + 1], farthest_N, half=half, budget_bytes=budget_bytes)
    if k2 > 1:
        weights = mean_weights(weights, top_NT[:, :k2], budget_bytes=budget_bytes)
    number_N = torch.arange(count, device=x_NE.device)
    by_column = transposed(rows_of(weights, number_N[num_queries:]), columns=count)
    weights = rows_of(weights, number_N[:num_queries])

    def score_of(rows_B: Tensor) -> Tensor:
        rows_B = rows_B.to(x_NE.device)
        overlap_BG = overlaps(rows_of(weights, rows_B), by_column, num_gallery, budget_bytes=budget_bytes)
        query_BE = x_NE[rows_B]
        plain_BG = (1 - query_BE @ x_NE[num_queries:].T).div_(farthest_N[rows_B, None])
        jaccard_BG = 1 - overlap_BG / (2 - overlap_BG)
        return 1 - torch.lerp(jaccard_BG, plain_BG, lambda_)

    return score_of


def rows_of(weights: Weights, rows_B: Tensor) -> Weights:
    """Those rows of the matrix, in that order."""
    length_B = weights.ptr[rows_B + 1] - weights.ptr[rows_B]
    ptr = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
    place_Z = (weights.ptr[rows_B] - ptr[:-1]).repeat_interleave(length_B)
    place_Z += torch.arange(place_Z.numel(), device=place_Z.device)
    return Weights(ptr, weights.column[place_Z], weights.weight[place_Z])


def blocks(count: int, bytes_per_row: int, budget_bytes: int) -> Iterator[slice]:
    """Slices of so many rows, each within the budget where a row is."""
    step = max(1, budget_bytes // max(1, bytes_per_row))
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def reciprocal(top_NT: Tensor, rows_B: Tensor, size: int) -> Tensor:
    """Which of the first `size` images of each row's list have the row in the first `size` of their own; [B, size]."""
    short_NT = top_NT[:, :size]
    return (short_NT[short_NT[rows_B]] == rows_B[:, None, None]).any(-1)


def reciprocal_weights(x_NE: Tensor, top_NT: Tensor, farthest_N: Tensor, *, half: int, budget_bytes: int) -> Weights:
    """V before it is averaged: steps 1 to 3."""
    count, length = top_NT.shape
    everyone = torch.arange(count, device=top_NT.device)
    # of a row: ids of neighbours' lists and the comparisons, ids and their sorting, gathered vectors of candidates
    candidates = length * (1 + half)
    row_bytes = 12 * length * length + (16 + length) * length * half + 48 * candidates
    half_NH = torch.empty(count, half, dtype=torch.bool, device=top_NT.device)
    for part in blocks(count, row_bytes, budget_bytes):
        half_NH[part] = reciprocal(top_NT, everyone[part], half)
    parts = []
    for part in blocks(count, row_bytes, budget_bytes):
        rows_B, top_BT = everyone[part], top_NT[part]
        is_near_BT = reciprocal(top_NT, rows_B, length)
        near_BT = top_BT.masked_fill(~is_near_BT, -1)
        other_BTH, is_other_BTH = top_NT[top_BT, :half], half_NH[top_BT]
        common_BT = (is_other_BTH & (other_BTH[..., None] == near_BT[:, None, None]).any(-1)).sum(-1)
        grows_BT = is_near_BT & (3 * common_BT > 2 * is_other_BTH.sum(-1))
        other_BTH = other_BTH.masked_fill(~(is_other_BTH & grows_BT[..., None]), -1)
        id_BC = torch.cat([near_BT, other_BTH.flatten(1)], dim=1).sort(dim=1).values
        is_first_BC = id_BC >= 0
        is_first_BC[:, 1:] &= id_BC[:, 1:] != id_BC[:, :-1]
        row_Z, place_Z = is_first_BC.nonzero().unbind(1)  # sync on CUDA
        column_Z = id_BC[row_Z, place_Z]
        cosine_Z = torch.empty(column_Z.numel(), device=x_NE.device)
        for some in blocks(column_Z.numel(), 12 * x_NE.shape[1], budget_bytes):
            cosine_Z[some] = (x_NE[rows_B[row_Z[some]]] * x_NE[column_Z[some]]).sum(1)
        weight_Z = torch.exp((cosine_Z - 1) / farthest_N[rows_B[row_Z]])
        length_B = is_first_BC.sum(1)
        total_B = torch.zeros(len(rows_B), device=x_NE.device).index_add_(0, row_Z, weight_Z)
        parts.append((length_B, column_Z, weight_Z / total_B[row_Z]))
    return joined(parts)


def joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Weights:
    """The matrix of blocks of rows: weights per row, columns, weights."""
    length, column, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    return Weights(torch.cat([length.new_zeros(1), length.cumsum(0)]), column, weight)


def mean_weights(weights: Weights, top_NK: Tensor, *, budget_bytes: int) -> Weights:
    """Rows that are the means of those rows, as many as `top_NK` has columns."""
    count, size = top_NK.shape
    longest = int(weights.ptr.diff().max())  # sync
    parts = []
    for part in blocks(count, 64 * size * longest, budget_bytes):
        rows_B = top_NK[part]
        several = rows_of(weights, rows_B.flatten())
        owner = torch.arange(len(rows_B), device=rows_B.device).repeat_interleave(size)
        key, order = (owner.repeat_interleave(several.ptr.diff()) * count + several.column).sort(stable=True)
        key, place = torch.unique_consecutive(key, return_inverse=True)
        total = torch.zeros(key.numel(), device=key.device).index_add_(0, place, several.weight[order])
        length = torch.bincount(key // count, minlength=len(rows_B))
        parts.append((length, key % count, total / size))
    return joined(parts)


def transposed(weights: Weights, *, columns: int) -> Weights:
    """The matrix by its columns; what was a row is a column."""
    row = torch.arange(weights.ptr.numel() - 1, device=weights.ptr.device).repeat_interleave(weights.ptr.diff())
    column, order = weights.column.sort(stable=True)
    ptr = torch.searchsorted(column, torch.arange(columns + 1, device=column.device))
    return Weights(ptr, row[order], weights.weight[order])


def overlaps(rows: Weights, by_column: Weights, num_columns: int, *, budget_bytes: int) -> Tensor:
    """Sums of the smaller of two weights over all columns, for each of the rows and each row of the other; [B, G]."""
    count = rows.ptr.numel() - 1
    found = torch.zeros(count * num_columns, device=rows.weight.device)
    row_Z = torch.arange(count, device=found.device).repeat_interleave(rows.ptr.diff())
    length_Z = by_column.ptr[rows.column + 1] - by_column.ptr[rows.column]
    work_Z = length_Z.cumsum(0)
    begin, total = 0, int(work_Z[-1]) if work_Z.numel() else 0  # sync
    step = max(1, budget_bytes // 48)
    while total and begin < work_Z.numel():
        done = int(work_Z[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(work_Z, done + step, right=True)))
        some = slice(begin, end)
        others = rows_of(by_column, rows.column[some])
        cell = (row_Z[some] * num_columns).repeat_interleave(length_Z[some]) + others.column
        smaller = torch.minimum(rows.weight[some].repeat_interleave(length_Z[some]), others.weight)
        found.index_add_(0, cell, smaller)
        begin = end
    return found.view(count, num_columns)
