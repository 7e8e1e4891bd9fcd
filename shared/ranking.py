"""Exact top-k lists, ranks of held-out items and the metrics made from them, in bounded memory.

Axes: B rows (users, queries), I items, D embedding dimension, E list entries of all rows, K the asked list length;
b rows and C items of one chunk, N sampled negatives. A score is the dot product of a row's query and an item's vector,
plus the item's bias where there is one, always computed in float32.

Protocols
- Leave-one-out, full ranking (the protocol of published SASRec-like results on ML-1M and Beauty): each user's last item
  is held out and ranked among all items, usually without those of the user's history (`exclude`).
- Many held-out items per user (LightGCN, CLCRec): the same functions with longer lists in `relevant`.
- Leave-one-out among 100 sampled negatives (NCF, He et al. 2017; SASRec, Kang and McAuley 2018), by
  sampled_candidates_rank. Krichene and Rendle, "On Sampled Metrics for Item Recommendation" (KDD 2020), show that its
  figures need not order models as full ranking does; they are never comparable with those of full ranking.

Eligible items of a row: every id from `first_item` on that is a candidate and not in the row's exclusions, and all
relevant items of the row, which are eligible whatever the candidates and exclusions say. So all pairs of a row are
judged within one and the same ranked list, and NDCG cannot pass 1.

Ties and broken scores count against the model, so that a collapsed model cannot look good (Sun et al., "A Re-evaluation
of Knowledge Graph Completion Methods", ACL 2020, show how it otherwise does):
- rank = 1 + the number of other eligible items of the row whose score is not below that of the relevant item. A NaN is
  below nothing and nothing is below a NaN: a competitor with a NaN score stands ahead, and a relevant item with a NaN
  score gets the worst rank, the number of eligible items.
- top_k orders by falling score, equal scores by rising id; items with a score of NaN or -inf are never returned.
A relevant item's score is read from the chunk, like its competitors'. All chunks of a row are computed in one shape,
and a single row as two: in what order a matrix product adds up depends on its shape, and in a matrix-vector product
even on the column. So equal vectors get equal scores (seen with MKL; no BLAS library promises it).

Metrics of one row with m relevant items (binary gains), averaged over the rows that have any:
HR@k      1 where any relevant item has rank <= k
Recall@k  relevant items with rank <= k, divided by m
Precision@k  the same, divided by k
NDCG@k    sum of 1 / log2(1 + rank) over ranks <= k, divided by sum of 1 / log2(1 + i) for i = 1 .. min(k, m)
MRR@k     1 / best rank where that is <= k, else 0
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_BUDGET_BYTES = 32 << 20  # chunks that outgrow the caches of a CPU cost more per score, not less

_BYTES_PER_SCORE = 16  # float32 score, bool mask, float32 comparison; in top_k the keys of tied rows instead
_MIN_ROWS = 16  # with fewer whole rows than this in the budget, the items are cut into spans as well
_WIDE_ROWS = 256  # rows per chunk where the items are cut
_MAX_SPAN = 1 << 24  # float32 counts are exact up to here
_GRID = 2.0**36  # a row's metrics are multiples of 1 / _GRID: float64 sums of up to 2**17 rows are then exact


class Lists(NamedTuple):
    """One list of item ids per row, end to end: row r holds item[ptr[r] : ptr[r + 1]]."""

    ptr: Tensor  # [B + 1] int64, starts at 0
    item: Tensor  # [E] int64 or int32


def take_rows(lists: Lists, rows: Tensor) -> Lists:
    """The lists of the given rows ([b] int64, any order, repeats allowed), in that order."""
    _, entry = _entries(lists.ptr, rows)
    length = lists.ptr[rows + 1] - lists.ptr[rows]
    return Lists(torch.cat([length.new_zeros(1), length.cumsum(0)]), lists.item[entry])


def top_k(
    query_BD: Tensor,
    item_ID: Tensor,
    *,
    k: int,
    exclude: Lists | None = None,
    first_item: int = 0,
    candidates: Tensor | None = None,
    bias_I: Tensor | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k best items of every row: (score [B, k] float32, item [B, k] int64), by falling score, then rising id.

    Ids below first_item, ids in the row's exclusions and ids whose entry in candidates ([I] bool) is False are never
    returned; where fewer than k items are left, the rest is filled with id -1 and score -inf. Working memory beside
    the arguments stays within budget_bytes (plus a float32 copy of item_ID if that has another dtype).
    """
    if k < 1:
        raise ValueError(f"k is {k}; a top-k list needs k >= 1")
    with torch.no_grad():
        num_rows = query_BD.shape[0]
        work = _workspace(query_BD, item_ID, bias_I, first_item, candidates, budget_bytes)
        if exclude is not None:
            _check_lists("exclude", exclude, num_rows, num_items=item_ID.shape[0], first_item=0)
        score_BK = torch.full((num_rows, k), -torch.inf, device=query_BD.device)
        id_BK = torch.full((num_rows, k), -1, device=query_BD.device)
        for rows in _row_chunks(torch.arange(num_rows, device=query_BD.device), work.row_step):
            query_bD = query_BD[rows].float()
            excluded = _pairs(exclude, rows)
            for low, high in work.spans:
                score_bC = _score(work, query_bD, low, high)
                score_bC.masked_fill_(_closed(work, len(rows), low, high, excluded, kept=None), -torch.inf)
                value_bk, index_bk = _largest(score_bC, min(k, high - low))
                score_BK[rows], id_BK[rows] = _merge(score_BK[rows], id_BK[rows], value_bk, index_bk + low)
        return score_BK, id_BK


def rank_relevant(
    query_BD: Tensor,
    item_ID: Tensor,
    relevant: Lists,
    *,
    exclude: Lists | None = None,
    first_item: int = 0,
    candidates: Tensor | None = None,
    bias_I: Tensor | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Tensor:
    """The 1-based rank of every relevant (row, item) pair, [E] int64 in the order of relevant.item.

    Ranks are counted, not sorted, among the row's eligible items, ties against the model (see the top of this file).
    The ids in one row of `relevant` must differ from each other. Working memory as in top_k. The work is one comparison
    per entry and item, beside the scores; where not even a few rows of scores fit, the scores are computed twice.
    """
    with torch.no_grad():
        num_rows, num_items = query_BD.shape[0], item_ID.shape[0]
        work = _workspace(query_BD, item_ID, bias_I, first_item, candidates, budget_bytes)
        _check_lists("relevant", relevant, num_rows, num_items=num_items, first_item=first_item)
        if exclude is not None:
            _check_lists("exclude", exclude, num_rows, num_items=num_items, first_item=0)
        rank_E = torch.empty(len(relevant.item), dtype=torch.int64, device=query_BD.device)
        # Longest lists first: the rows that have a j-th relevant item are then the first rows of their chunk.
        order = relevant.ptr.diff().argsort(descending=True, stable=True)
        order = order[: int(relevant.ptr.diff().count_nonzero())]
        for rows in _row_chunks(order, work.row_step):
            _, entry_e = _entries(relevant.ptr, rows)
            rank_E[entry_e] = _rank_chunk(
                work, query_BD[rows].float(), take_rows(relevant, rows), _pairs(exclude, rows)
            )
        return rank_E


def sampled_candidates_rank(
    query_BD: Tensor,
    item_ID: Tensor,
    target_B: Tensor,
    negative_BN: Tensor,
    *,
    bias_I: Tensor | None = None,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
) -> Tensor:
    """The 1-based rank of each row's target among itself and its N sampled negatives, [B] int64.

    Ties count against the model. A negative drawn twice counts twice; one that equals the target is not another item
    and does not count.
    """
    with torch.no_grad():
        num_items, dim = item_ID.shape
        id_BM = torch.cat([target_B[:, None], negative_BN], dim=1).long()
        if id_BM.numel():
            low, high = torch.stack(id_BM.aminmax()).tolist()
            _check_range("target and negatives", low, high, num_items, first_item=0)
        rank_B = torch.empty(len(id_BM), dtype=torch.int64, device=query_BD.device)
        row_step = max(1, budget_bytes // (8 * id_BM.shape[1] * dim))  # gathered vectors, once more for half precision
        for rows in _row_chunks(torch.arange(len(id_BM), device=query_BD.device), row_step):
            id_bM = id_BM[rows]
            # A product and a sum instead of a matrix product: every candidate is summed in the same order.
            score_bM = item_ID[id_bM].float().mul_(query_BD[rows, None].float()).sum(-1)
            if bias_I is not None:
                score_bM += bias_I[id_bM].float()
            ahead_bN = ~(score_bM[:, 1:] < score_bM[:, :1]) & (id_bM[:, 1:] != id_bM[:, :1])
            rank_B[rows] = 1 + ahead_bN.sum(1)
        return rank_B


def metrics_from_ranks(rank_E: Tensor, ptr: Tensor, *, ks: Sequence[int]) -> dict[str, float]:
    """The means of HR, NDCG, MRR, Recall and Precision at every k over the rows with a relevant item, and "users"."""
    return finish(metric_sums(rank_E, ptr, ks=ks))


def metric_sums(rank_E: Tensor, ptr: Tensor, *, ks: Sequence[int]) -> dict[str, Tensor]:
    """The sum of every metric over the rows that have a relevant item, and their number "users": float64 on the CPU.

    rank_E and ptr ([B + 1]) are rank_relevant's result and the ptr of its lists. Sums of several chunks or processes
    are added name by name before `finish`. A row's values are rounded to multiples of 2**-36 (7e-12), so that the total
    is the same to the last bit however up to 2**17 rows are divided. Computed on the CPU after one copy of the ranks,
    since some devices have no float64.
    """
    values = _per_row_metrics(rank_E, ptr, ks)
    return {"users": ptr.diff().count_nonzero().cpu().double()} | {name: value.sum() for name, value in values.items()}


def added(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metric sums of both; an empty total is zero."""
    return {name: total[name] + value if total else value for name, value in part.items()}


def finish(sums: dict[str, Tensor]) -> dict[str, float]:
    """The means, and "users", from (added up) metric_sums; one host copy."""
    total = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    if not total["users"]:
        raise ValueError("no row has a relevant item, so there is nothing to average; is the split empty?")
    return {name: value if name == "users" else value / total["users"] for name, value in total.items()}


def _per_row_metrics(rank_E: Tensor, ptr: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Every metric of every row that has a relevant item, [R] float64 on the CPU."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks is {list(ks)}; metrics need at least one k, each >= 1")
    ptr = ptr.cpu()
    if int(ptr[-1]) != len(rank_E):
        raise ValueError(
            f"ptr ends at {int(ptr[-1])} but there are {len(rank_E)} ranks; pass the ptr of the ranked lists"
        )
    rank = rank_E.cpu().double()
    length_R = ptr.diff()
    length_R = length_R[length_R > 0]
    row_E = torch.repeat_interleave(torch.arange(len(length_R)), length_R)
    best_R = torch.full_like(length_R, torch.inf, dtype=torch.float64).scatter_reduce(0, row_E, rank, "amin")
    gain_E = 1 / torch.log2(1 + rank)
    ideal = (1 / torch.log2(1 + torch.arange(1, max(ks) + 1, dtype=torch.float64))).cumsum(0)

    def per_row(value_E: Tensor) -> Tensor:
        return torch.zeros_like(best_R).index_add_(0, row_E, value_E)

    values: dict[str, Tensor] = {}
    for k in ks:
        hit_E = (rank <= k).double()
        hits_R = per_row(hit_E)
        values[f"HR@{k}"] = (hits_R > 0).double()
        values[f"NDCG@{k}"] = per_row(gain_E * hit_E) / ideal[length_R.clamp(max=k) - 1]
        values[f"MRR@{k}"] = (best_R <= k) / best_R
        values[f"Recall@{k}"] = hits_R / length_R
        values[f"Precision@{k}"] = hits_R / k
    return {name: (value * _GRID).round() / _GRID for name, value in values.items()}


class _Pairs(NamedTuple):
    """List entries of one chunk: row within the chunk, item id, both [e] int64."""

    row: Tensor
    item: Tensor


@dataclass(frozen=True)
class _Workspace:
    """What all chunks of one call share; the buffers are overwritten by every chunk."""

    item: Tensor  # [I, D] float32
    bias: Tensor | None  # [I] float32
    closed: Tensor  # [I] bool, True where no row may have the item
    row_step: int
    spans: list[tuple[int, int]]  # of items
    score: Tensor  # float32 buffer of one chunk
    mask: Tensor  # bool buffer of one chunk


def _workspace(
    query_BD: Tensor,
    item_ID: Tensor,
    bias_I: Tensor | None,
    first_item: int,
    candidates: Tensor | None,
    budget_bytes: int,
) -> _Workspace:
    num_items, device = item_ID.shape[0], query_BD.device
    for name, value in (("bias_I", bias_I), ("candidates", candidates)):
        if value is not None and value.shape != (num_items,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; {num_items} items need ({num_items},)")
    closed_I = torch.zeros(num_items, dtype=torch.bool, device=device)
    if candidates is not None:
        closed_I = ~candidates.bool()
    closed_I[:first_item] = True
    row_step, span = _chunk_shape(query_BD.shape[0], num_items, budget_bytes)
    return _Workspace(
        item_ID.float(),
        None if bias_I is None else bias_I.float(),
        closed_I,
        row_step,
        [(low, min(low + span, num_items)) for low in range(0, num_items, span)],
        score=torch.empty(row_step * span, device=device),
        mask=torch.empty(row_step * span, dtype=torch.bool, device=device),
    )


def _chunk_shape(num_rows: int, num_items: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and items per chunk: whole rows of items where a fair number of them fits, else a block of both."""
    cells = max(1, budget_bytes // _BYTES_PER_SCORE)
    span = max(1, min(num_items, _MAX_SPAN))
    if cells // span < min(num_rows, _MIN_ROWS):
        height = max(1, min(num_rows, _WIDE_ROWS, isqrt(cells)))
        return height, min(span, cells // height)
    return max(1, min(num_rows, cells // span)), span


def _row_chunks(rows: Tensor, step: int) -> Iterator[Tensor]:
    for low in range(0, len(rows), step):
        yield rows[low : low + step]


def _entries(ptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For every list entry of the given rows: the place of its row in `rows`, and its own place in the lists."""
    length = ptr[rows + 1] - ptr[rows]
    place = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
    offset = ptr[rows] - (length.cumsum(0) - length)
    return place, torch.arange(len(place), device=rows.device) + offset[place]


def _pairs(lists: Lists | None, rows: Tensor) -> _Pairs:
    if lists is None:
        return _Pairs(rows.new_empty(0), rows.new_empty(0))
    place, entry = _entries(lists.ptr, rows)
    return _Pairs(place, lists.item[entry].long())


def _score(work: _Workspace, query_bD: Tensor, low: int, high: int) -> Tensor:
    """The scores [b, C] of items low .. high - 1; the next call overwrites them."""
    rows, width = query_bD.shape[0], work.spans[0][1]
    start = high - width  # the last span overlaps the one before, to be as wide
    score_bW = work.score[: rows * width].view(rows, width)
    item_WD = work.item[start:high]
    if rows > 1:
        torch.mm(query_bD, item_WD.T, out=score_bW)  # out= is never autocast
    else:
        score_bW.copy_(torch.mm(query_bD.expand(2, -1), item_WD.T, out=score_bW.new_empty(2, width))[:1])
    if work.bias is not None:
        score_bW += work.bias[start:high]
    return score_bW[:, low - start :]


def _closed(work: _Workspace, rows: int, low: int, high: int, excluded: _Pairs, kept: _Pairs | None) -> Tensor:
    """True [b, C] where the item must not appear in the row; the next call overwrites it."""
    mask_bC = work.mask[: rows * (high - low)].view(rows, high - low)
    mask_bC.copy_(work.closed[low:high])
    for pairs, value in ((excluded, True), (kept, False)):
        if pairs is not None:
            row, item = pairs
            if len(work.spans) > 1:
                inside = (item >= low) & (item < high)
                row, item = row[inside], item[inside]
            mask_bC.view(-1).index_fill_(0, row * (high - low) + item - low, value)
    return mask_bC


def _rank_chunk(work: _Workspace, query_bD: Tensor, relevant: Lists, excluded: _Pairs) -> Tensor:
    """The ranks [e] of one chunk of rows whose lists have falling lengths, none empty."""
    rows = query_bD.shape[0]
    wanted = _pairs(relevant, torch.arange(rows, device=query_bD.device))
    target_e = torch.empty(len(wanted.item), device=query_bD.device)
    for low, high in work.spans:
        score_bC = _score(work, query_bD, low, high)
        inside = (wanted.item >= low) & (wanted.item < high)
        found_e = score_bC[wanted.row, (wanted.item - low).clamp(0, high - low - 1)]
        target_e = torch.where(inside, found_e, target_e)

    start_b, length_b = relevant.ptr[:-1], relevant.ptr.diff()
    longest = torch.arange(int(length_b[0]), device=query_bD.device)
    reach = (
        rows - torch.searchsorted(length_b.flip(0), longest, right=True)
    ).tolist()  # rows with a j-th relevant item
    open_b = torch.zeros_like(length_b)
    below_e = torch.zeros_like(wanted.item)
    compared = torch.empty_like(work.score)  # 0.0 or 1.0: on CPUs float comparisons and sums are vectorised best
    for low, high in work.spans:
        if len(work.spans) > 1:
            score_bC = _score(work, query_bD, low, high)  # the same numbers again: same values, shapes and buffers
        closed_bC = _closed(work, rows, low, high, excluded, kept=wanted)
        closed_as_float = compared[: closed_bC.numel()].view_as(closed_bC).copy_(closed_bC)
        open_b += (high - low) - closed_as_float.sum(1).long()
        score_bC.masked_fill_(closed_bC, torch.inf)  # never below a relevant item
        for j, first in enumerate(reach):
            entry = start_b[:first] + j
            below_bC = compared[: first * (high - low)].view(first, high - low)
            torch.lt(score_bC[:first], target_e[entry, None], out=below_bC)
            below_e[entry] += below_bC.sum(1).long()
    return open_b[wanted.row] - below_e


def _largest(score_bC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row (value, index), of equal ones those with the smaller index, NaN as -inf; in no order.

    torch.topk leaves open which of equal values it takes and puts NaN first. Both show in its k + 1 values; only the
    rows where they do are done again.
    """
    rows, width = score_bC.shape
    value, index = score_bC.topk(min(k + 1, width), dim=1)
    redo = value[:, 0].isnan()
    if k < width:
        redo |= (value[:, k - 1] == value[:, k]) & (value[:, k] > -torch.inf)
    value_bk, index_bk = value[:, :k], index[:, :k]
    place_C = torch.arange(width, device=score_bC.device, dtype=torch.int32)
    for part in _row_chunks(redo.nonzero().squeeze(1), -(-rows // 4)):  # sync; a quarter, to keep within the budget
        score = score_bC[part].nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        bound = score.topk(k, dim=1).values[:, -1:]
        key = torch.where(score == bound, place_C, width).masked_fill_(score > bound, -1)  # fewer than k are larger
        pick = key.topk(k, dim=1, largest=False).indices
        value_bk[part], index_bk[part] = score.gather(1, pick), pick
    return value_bk, index_bk


def _merge(score_bK: Tensor, id_bK: Tensor, more_score: Tensor, more_id: Tensor) -> tuple[Tensor, Tensor]:
    """The K best of both, by falling score, then rising id; id -1 where the score is -inf."""
    id_bM, by_id = torch.cat([id_bK, more_id], dim=1).sort(dim=1)
    score_bM = torch.cat([score_bK, more_score], dim=1).gather(1, by_id) + 0.0  # -0.0 and 0.0 are one score
    score_bM, by_score = score_bM.sort(dim=1, descending=True, stable=True)
    score_bK, id_bK = score_bM[:, : score_bK.shape[1]], id_bM.gather(1, by_score)[:, : score_bK.shape[1]]
    return score_bK, id_bK.masked_fill(score_bK == -torch.inf, -1)


def _check_lists(name: str, lists: Lists, num_rows: int, *, num_items: int, first_item: int) -> None:
    ptr, item = lists
    if ptr.shape != (num_rows + 1,):
        raise ValueError(f"{name}.ptr has shape {tuple(ptr.shape)}; {num_rows} rows need ({num_rows + 1},)")
    # One host copy for all that is asked. The checks come before any indexing: out of range on a GPU ends the process.
    ends = [ptr[0], ptr[-1], ptr.diff().amin() if num_rows else ptr[0]]
    limits = [*item.aminmax()] if len(item) else []
    start, end, shortest, *limit = torch.stack([x.long() for x in (*ends, *limits)]).tolist()
    if start != 0 or end != len(item) or shortest < 0:
        raise ValueError(f"{name}.ptr runs from {start} to {end}; it must rise from 0 to the {len(item)} items")
    if limit:
        _check_range(f"{name}.item", limit[0], limit[1], num_items, first_item)


def _check_range(name: str, low: int, high: int, num_items: int, first_item: int) -> None:
    if low < first_item or high >= num_items:
        wrong = low if low < first_item else high
        raise ValueError(
            f"{name} holds id {wrong}, expected {first_item} .. {num_items - 1}; "
            "number the items as the rows of the item matrix and drop the others"
        )
