"""Recommendation without training: filters of the graph, and the singular vectors they are made of.

Legend: U users, I items, K rank, b users of a block, c of them at a time, r a user's row of zeros and ones.

R = D_U^-1/2 (rows r) D_I^-1/2 is [U, I] with the degrees D; S = R^T R is [I, I] with eigenvalues in [0, 1]; V [I, K]
are its leading eigenvectors; the low-pass part of a user's scores is r D_I^-1/2 V V^T D_I^1/2.

GF-CF (Shen et al., CIKM 2021)                r S + alpha low-pass
BSPM (Choi et al., SIGIR 2023, early merge)   (r S + beta low-pass) p(S): blurred scores y, sharpened by one Runge-Kutta
    step of y' = -y S; p(s) is the exponential series of -step s up to the power `order` (4 in the authors' code)

No user-item or item-item matrix is ever made: S is two sparse products for a few users at a time, V V^T two factors. A
user without interactions gets zero scores everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.graphrec.graph import Graph, Matrix, halves, product
from shared.ranking import Lists, take_rows
from shared.seed import make_generator

OVERSAMPLE = 32  # directions carried beyond the rank: the weakest ones that are kept converge faster
USER_COLUMNS = 32  # users filtered at a time on a CPU, as many columns as the sparse product takes at a time
SPECTRAL_STREAM = 41  # of the first directions

Say = Callable[[str], None]


class Factors(NamedTuple):
    """Leading singular vectors of R in columns, by falling singular value."""

    user_UK: Tensor
    value_K: Tensor
    item_IK: Tensor


@dataclass(frozen=True)
class Filter:
    """Scores r (w_1 S + w_2 S^2 + ...) + (r left) right^T for the users of the graph, all float32 on one device."""

    users: Matrix  # R
    items: Matrix  # R^T
    powers: tuple[float, ...]  # w_1, w_2, ...
    left_IK: Tensor
    right_IK: Tensor
    kernel: str = "auto"  # of the sparse products

    @torch.no_grad()
    def scores(self, user_rows: Tensor) -> Tensor:
        """Scores of all items for the given users ([b] int64), [b, I] float32; training items are not left out.

        Beside the result this takes a few blocks of max(U, I) rows of c floats, with c = 32 on a CPU and b on CUDA.
        """
        device = self.left_IK.device
        ptr, item = take_rows(Lists(self.users.ptr, self.users.column), user_rows.to(device))
        items = Lists(ptr, item.long())
        with torch.autocast(device.type, enabled=False):
            score_bI = self.left_IK.new_empty(len(user_rows), len(self.left_IK))
            step = USER_COLUMNS if device.type == "cpu" else max(1, len(user_rows))
            for begin in range(0, len(user_rows), step):
                rows = torch.arange(begin, min(begin + step, len(user_rows)), device=device)
                score_bI[begin : begin + step] = self._filtered(take_rows(items, rows)).t()
            query_bK = F.embedding_bag(items.item, self.left_IK, items.ptr, mode="sum", include_last_offset=True)
            return score_bI.addmm_(query_bK, self.right_IK.t())

    def tensors(self) -> dict[str, Tensor]:
        """What fitting found, for a file of weights; the graph is data."""
        return {
            "left": self.left_IK,
            "right": self.right_IK,
            "powers": torch.tensor(self.powers, dtype=torch.float64),
        }

    def _filtered(self, rows: Lists) -> Tensor:
        """The polynomial of S applied to c users' rows, [I, c], by Horner's rule in the space of users."""
        count = len(rows.ptr) - 1
        column = torch.repeat_interleave(torch.arange(count, device=rows.item.device), rows.ptr.diff())
        row_Ic = self.left_IK.new_zeros(len(self.left_IK), count)
        row_Ic[rows.item, column] = 1
        first_Uc = product(self.users, row_Ic, kernel=self.kernel)
        total_Uc = self.powers[-1] * first_Uc
        for weight in reversed(self.powers[:-1]):
            total_Uc = product(self.users, product(self.items, total_Uc, kernel=self.kernel), kernel=self.kernel)
            total_Uc.add_(first_Uc, alpha=weight)
        return product(self.items, total_Uc, kernel=self.kernel)


def restore_filter(tensors: Mapping[str, Tensor], graph: Graph, *, kernel: str = "auto") -> Filter:
    """The filter whose `tensors()` these are, on the graph it was fitted to and on that graph's device."""
    users, items = halves(graph)
    left, right = (tensors[name].to(graph.weight.device) for name in ("left", "right"))
    return Filter(users, items, tuple(tensors["powers"].tolist()), left, right, kernel)


def fit_gfcf(
    graph: Graph,
    *,
    rank: int = 256,
    alpha: float = 0.3,
    iterations: int = 3,
    seed: int = 42,
    kernel: str = "auto",
    say: Say = lambda line: None,
) -> Filter:
    """GF-CF on the graph's device; the defaults are the published ones for gowalla. The rest as in `top_singular`."""
    return _fit(graph, (1.0,), rank, alpha, iterations, seed, kernel, say)


def fit_bspm(
    graph: Graph,
    *,
    rank: int = 448,
    beta: float = 0.2,
    step: float = 2.5,
    order: int = 4,
    iterations: int = 3,
    seed: int = 42,
    kernel: str = "auto",
    say: Say = lambda line: None,
) -> Filter:
    """BSPM on the graph's device; the defaults are the published ones for gowalla. The rest as in `top_singular`."""
    series = tuple((-step) ** power / factorial(power) for power in range(order + 1))
    return _fit(graph, series, rank, beta, iterations, seed, kernel, say)


def top_singular(
    graph: Graph, rank: int, *, iterations: int, seed: int, kernel: str = "auto", say: Say = lambda line: None
) -> Factors:
    """The leading singular vectors of R, at most min(U, I) of them, on the graph's device in float32.

    Randomised block iteration (Halko, Martinsson and Tropp 2011) on the smaller side: random directions, multiplied by
    R R^T or R^T R and made orthogonal again, `iterations` (1 or more) times. More of them bring the weak vectors closer
    to the true ones. `say` gets a line after each.
    """
    assert iterations >= 1, iterations
    users, items = halves(graph)
    to_large, to_small = (items, users) if users.num_columns >= items.num_columns else (users, items)
    size = to_large.num_columns
    generator = make_generator(seed, stream=SPECTRAL_STREAM)
    basis = torch.randn(size, min(size, rank + OVERSAMPLE), generator=generator).to(graph.weight.device)
    for iteration in range(1, iterations + 1):
        large = product(to_large, basis, kernel=kernel)
        basis, _ = torch.linalg.qr(product(to_small, large, kernel=kernel))
        say(f"singular vectors: block iteration {iteration} of {iterations}")
    orthogonal, triangle = torch.linalg.qr(product(to_large, basis, kernel=kernel))
    left, value, right = torch.linalg.svd(triangle)
    large, small = (orthogonal @ left)[:, :rank], (basis @ right.t())[:, :rank]
    user, item = (small, large) if to_large is items else (large, small)
    return Factors(user, value[:rank], item)


def low_rank_embeddings(
    graph: Graph, dim: int, *, scale: float, iterations: int = 3, seed: int = 42, kernel: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Users [U, D] and items [I, D] whose dot products rank like the low-pass part, each of root mean square `scale`.

    A start for training. D is `dim`, or min(U, I) where that is less; the rest as in `top_singular`.
    """
    factors = top_singular(graph, dim, iterations=iterations, seed=seed, kernel=kernel)
    degree_I1 = graph.ptr[graph.num_users :].diff()[:, None]
    # r D_I^-1/2 V is the user's left vector times the values, up to the root of the user's degree
    user_UD, item_ID = factors.user_UK * factors.value_K, degree_I1.sqrt() * factors.item_IK
    return user_UD * (scale / user_UD.square().mean().sqrt()), item_ID * (scale / item_ID.square().mean().sqrt())


def _fit(
    graph: Graph, series: Sequence[float], rank: int, weight: float, iterations: int, seed: int, kernel: str, say: Say
) -> Filter:
    """(r S + weight low-pass) p(S) with p(s) = series[0] + series[1] s + ..."""
    users, items = halves(graph)
    vectors_IK = top_singular(graph, rank, iterations=iterations, seed=seed, kernel=kernel, say=say).item_IK
    root_I1 = items.ptr.diff().float().sqrt()[:, None]
    inverse_I1 = torch.where(root_I1 > 0, 1 / root_I1, 0)
    first_IK = weight * root_I1 * vectors_IK
    right_IK = series[-1] * first_IK
    for factor in reversed(series[:-1]):
        right_IK = product(items, product(users, right_IK, kernel=kernel), kernel=kernel).add_(first_IK, alpha=factor)
    return Filter(users, items, tuple(series), inverse_I1 * vectors_IK, right_IK, kernel)
