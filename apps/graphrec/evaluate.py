"""Full ranking of all items for every user, baselines for comparison, and exact top-k prediction.

Legend: U users, I items, B users of a chunk, D embedding dim, K list length, E held-out pairs of a chunk.

Protocol (the LightGCN family): every user with a held-out item ranks all items except those of its training (at test
also of its validation) part; recall is hits / held-out items, NDCG has the ideal over min(k, held-out items), both are
means over those users. Ties count against the model. Where the source has cold items, each user also ranks the warm
ones alone and the cold ones alone, as in CLCRec (Wei et al., ACM MM 2021).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.graphrec.config import Config
from apps.graphrec.dataset import Group, Interactions, Stage
from apps.graphrec.graph import make_graph
from apps.graphrec.model import FILTERS, GraphFilter, GraphRec
from shared import distributed
from shared.amp import evaluation_mode
from shared.device import to_device
from shared.ranking import Lists, added, finish, metric_sums, take_rows, top_k

USERS_PER_CHUNK = 1024
SHOWN = ("Recall", "NDCG", "Precision", "HR")
GROUPS: tuple[Group, ...] = ("all", "warm", "cold")


class Vectors(NamedTuple):
    """Scores that are dot products."""

    user_UD: Tensor
    item_ID: Tensor


Scorer = Vectors | Callable[[Tensor], Tensor]  # or the scores [B, I] float32 of users ([B] int64, on their device)
Sums = dict[str, Tensor]
Gather = Callable[[Tensor], Tensor]


class DeadModelError(ValueError):
    """Every score of a model is zero: nothing can be ranked by it."""


def held_out(data: Interactions, stage: Stage) -> Lists:
    """Each user's items of that stage."""
    return data.valid if stage == "valid" else data.test


def left_out(data: Interactions, stage: Stage) -> Lists:
    """What a user's ranking of that stage leaves out: training items, at test also validation items."""
    return data.train if stage == "valid" else joined(data.train, data.valid, num_items=data.num_items)


def joined(first: Lists, second: Lists, *, num_items: int) -> Lists:
    """For every row the distinct items of both, rising."""
    if not second.item.numel():
        return first
    num_rows = first.ptr.numel() - 1
    row = torch.cat([torch.repeat_interleave(lists.ptr.diff()) for lists in (first, second)])
    key = torch.unique(row * num_items + torch.cat([first.item, second.item]))
    ptr = torch.searchsorted(key, torch.arange(num_rows + 1) * num_items)
    return Lists(ptr, (key % num_items).to(first.item.dtype))


def known(data: Interactions) -> Lists:
    """Every item of each user, in training, validation or test."""
    return joined(left_out(data, "test"), data.test, num_items=data.num_items)


def groups_of(data: Interactions) -> dict[Group, Tensor | None]:
    """Which items ([I] bool; None: all) each group ranks; without cold items there is one group."""
    if data.is_cold is None:
        return {"all": None}
    return {"all": None, "warm": ~data.is_cold, "cold": data.is_cold}


def kept(lists: Lists, keep_I: Tensor | None) -> Lists:
    """The items of every list for which `keep_I` says so."""
    if keep_I is None:
        return lists
    keep = keep_I[lists.item.long()]
    before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
    return Lists(before[lists.ptr], lists.item[keep])


def metric_name(group: Group, name: str, data: Interactions) -> str:
    """ "Recall@20", or "all/Recall@20" and so on where there are cold items."""
    return name if data.is_cold is None else f"{group}/{name}"


def protocol_text(data: Interactions, stage: Stage) -> str:
    """What a metric of `evaluate` means, in a sentence."""
    parts = []
    for group, mask in groups_of(data).items():
        users = int((kept(held_out(data, stage), mask).ptr.diff() > 0).sum())
        items = data.num_items if mask is None else int(mask.sum())
        parts.append(f"{'' if data.is_cold is None else group + ': '}{users:,} users, {items:,} items")
    excluded = "training" if stage == "valid" else "training and validation"
    return (
        f"{stage} items, full ranking ({'; '.join(parts)}), {excluded} items left out, ties against the model; "
        f"split: {data.split}"
    )


@torch.no_grad()
def scorer_of(model: nn.Module, *, gather: Gather = lambda own: own) -> Scorer:
    """How to score with a model: vectors after one propagation, or a filter's blocks of scores."""
    if isinstance(model, GraphFilter):
        return model.filter().scores
    return Vectors(*matrices(model, gather=gather))


@torch.no_grad()
def matrices(model: nn.Module, *, gather: Gather = lambda own: own) -> tuple[Tensor, Tensor]:
    """The float32 vectors whose dot products are the scores: users [U, D] and items [I, D], unit ones for cosine.

    `gather` makes whole matrices of those of a process that owns some columns.
    """
    assert isinstance(model, GraphRec)
    with evaluation_mode(model):
        # detached, since even where no gradient is taken a view of a weight asks for one
        user_UD, item_ID = (gather(part.detach().float()) for part in model.final())
    if model.config.score == "cosine" and model.config.rank_by == "score":
        return F.normalize(user_UD, dim=1), F.normalize(item_ID, dim=1)
    return user_UD, item_ID


def evaluate(
    model: nn.Module,
    data: Interactions,
    stage: Stage,
    *,
    config: Config,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Recall, NDCG, precision and hit rate at every k: "Recall@20" and so on, with cold items "all/Recall@20", ....

    Groups without a held-out item are left out. `on_users` is called between chunks with the number of users done.
    """
    return evaluate_stages(model, data, (stage,), config=config, on_users=on_users)[stage]


def evaluate_stages(
    model: nn.Module,
    data: Interactions,
    stages: Sequence[Stage],
    *,
    config: Config,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[Stage, dict[str, float]]:
    """What `evaluate` gives, for several stages from one propagation, or one pass over a filter's scores."""
    sums = evaluation_sums(scorer_of(model), data, stages, config=config, device=device_of(model), on_users=on_users)
    return finished(sums, data)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's state is."""
    return next(iter(model.state_dict().values())).device


def finished(
    sums: dict[tuple[Stage, Group], Sums], data: Interactions, *, group: distributed.Group | None = None
) -> dict[Stage, dict[str, float]]:
    """The means of what all processes of `group` summed, by stage."""
    found: dict[Stage, dict[str, float]] = {stage: {} for stage, _ in sums}
    for (stage, part), total in sums.items():
        total = distributed.added_up(group, total)
        if total["users"]:
            means = finish(total)
            found[stage] |= {metric_name(part, name, data): means[name] for name in means if name.startswith(SHOWN)}
    return found


@torch.no_grad()
def evaluation_sums(
    scorer: Scorer,
    data: Interactions,
    stages: Sequence[Stage],
    *,
    config: Config,
    device: torch.device | None = None,
    group: distributed.Group | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[tuple[Stage, Group], Sums]:
    """What `evaluate` averages, summed over the users that this process of `group` measures.

    Whole chunks are dealt to the processes in turn, so that a user's chunk is computed alike for any number of
    processes. Vectors tell the device themselves; otherwise it is `device`, by default the CPU.
    """
    training = config.training
    device = scorer.user_UD.device if isinstance(scorer, Vectors) else device or torch.device("cpu")
    longest = max(training.ks)
    masks = groups_of(data)
    wanted = {(stage, part): kept(held_out(data, stage), mask) for stage in stages for part, mask in masks.items()}
    candidates = {part: None if mask is None else mask.to(device) for part, mask in masks.items()}
    excluded = {stage: left_out(data, stage) for stage in stages}
    nobody = metric_sums(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), ks=training.ks)
    sums = dict.fromkeys(wanted, nobody)
    has_any = torch.stack([lists.ptr.diff() > 0 for lists in wanted.values()]).any(0)
    users = torch.nonzero(has_any).squeeze(1)
    process, processes = distributed.place(group)
    rows = chunk_users(scorer, data.num_items, config)
    largest = torch.zeros((), device=device)
    for begin in range(process * rows, users.numel(), processes * rows):
        part_B = users[begin : begin + rows]
        rank = ranker(scorer, part_B.to(device), budget_bytes=training.memory_mib << 20)
        for (stage, part), lists in wanted.items():
            relevant = take_rows(lists, part_B)
            if relevant.item.numel():
                exclude = to_device(take_rows(excluded[stage], part_B), device)
                score_BK, item_BK = rank(min(longest + 1, data.num_items), exclude=exclude, candidates=candidates[part])
                largest = torch.maximum(largest, score_BK.masked_fill(item_BK < 0, 0).abs().max())
                rank_E = ranks_in(score_BK, item_BK, to_device(relevant, device))
                sums[stage, part] = added(sums[stage, part], metric_sums(rank_E, relevant.ptr, ks=training.ks))
        on_users(begin + part_B.numel())
    if process * rows < users.numel() and not largest:  # sync
        raise DeadModelError(
            "every score of the model is zero, so that it ranks nothing: its vectors are zero or cancel out; "
            "lower --lr or --reg-weight, or check that the weights are those of this model"
        )
    return sums


def chunk_users(scorer: Scorer, num_items: int, config: Config) -> int:
    """How many users to rank at a time: blocks of scores must fit the memory, dot products are cut further inside."""
    if isinstance(scorer, Vectors):
        return USERS_PER_CHUNK
    cells = (config.training.memory_mib << 20) // 8  # scores and a copy of them
    return max(1, min(USERS_PER_CHUNK, cells // num_items))


Ranker = Callable[..., tuple[Tensor, Tensor]]  # (k, *, exclude, candidates) -> score [B, k] float32, item [B, k]


def ranker(scorer: Scorer, user_B: Tensor, *, budget_bytes: int) -> Ranker:
    """The best items of those users, as shared.ranking.top_k gives them; a filter's scores are made once."""
    if isinstance(scorer, Vectors):
        query_BD = scorer.user_UD.index_select(0, user_B)

        def by_vectors(k: int, *, exclude: Lists | None, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
            return top_k(
                query_BD, scorer.item_ID, k=k, exclude=exclude, candidates=candidates, budget_bytes=budget_bytes
            )

        return by_vectors
    score_BI = scorer(user_B).float()

    def by_scores(k: int, *, exclude: Lists | None, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
        score = score_BI.clone()
        if candidates is not None:
            score.masked_fill_(~candidates, -torch.inf)
        if exclude is not None:
            row = torch.repeat_interleave(exclude.ptr.diff())
            score.view(-1).index_fill_(0, row * score.shape[1] + exclude.item, -torch.inf)
        return largest(score.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), k)

    return by_scores


def largest(score_BI: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row, (score, item), by falling score, then rising id; item -1 where the score is -inf."""
    value_BK, item_BK = score_BI.topk(min(k + 1, score_BI.shape[1]), dim=1)
    cut = value_BK[:, k - 1 : k] == value_BK[:, k:]  # topk leaves open which of equal scores it takes
    redo = (cut & (value_BK[:, k:] > -torch.inf)).any(1).nonzero().squeeze(1)  # sync on CUDA
    value_BK, item_BK = value_BK[:, :k], item_BK[:, :k]
    for row in redo.tolist():
        value, item = score_BI[row].sort(descending=True, stable=True)
        value_BK[row], item_BK[row] = value[:k], item[:k]
    item_BK, by_id = item_BK.sort(dim=1)
    value_BK, by_score = value_BK.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return value_BK, item_BK.gather(1, by_score).masked_fill(value_BK == -torch.inf, -1)


def ranks_in(score_BK: Tensor, item_BK: Tensor, relevant: Lists) -> Tensor:
    """The rank of every relevant item in its row's list, [E] int64: how many scores there are not below its own.

    Exact up to K - 1; an item that is not in the list, or that ties with the last one, has at least rank K.
    """
    row_E = torch.repeat_interleave(relevant.ptr.diff())
    item_EK, score_EK = item_BK[row_E], score_BK[row_E]
    own_EK = item_EK == relevant.item.unsqueeze(1)
    score_E = torch.where(own_EK, score_EK, -torch.inf).amax(1)
    rank_E = (score_EK >= score_E.unsqueeze(1)).sum(1)
    return torch.where(own_EK.any(1), rank_E, torch.iinfo(torch.int32).max)


@torch.no_grad()
def baselines(
    data: Interactions,
    stages: Sequence[Stage],
    *,
    config: Config,
    device: torch.device,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[Stage, dict[str, float]]]:
    """What needs no training, under the same protocol: metrics by name of the baseline and stage.

    "popularity" ranks items by training pairs; "gfcf", the filter with the configuration's settings, is left out where
    the model itself is a filter or --baselines is popularity. Neither knows cold items.
    """
    count_I = torch.bincount(data.train.item.long(), minlength=data.num_items).float()
    popular = Vectors(torch.ones(data.num_users, 1), count_I.unsqueeze(1))
    found = {"popularity": finished(evaluation_sums(popular, data, stages, config=config), data)}
    if config.training.baselines == "all" and config.model.model not in FILTERS:
        graph = make_graph(data.train, num_items=data.num_items, device=device)
        filtered = GraphFilter(replace(config.model, model="gfcf"), graph=graph)
        filtered.fit(seed=config.training.seed)
        sums = evaluation_sums(scorer_of(filtered), data, stages, config=config, device=device, on_users=on_users)
        found["gfcf"] = finished(sums, data)
    return found


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Interactions,
    *,
    k: int,
    config: Config,
    group: Group = "all",
    keep_seen: bool = False,
    on_users: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (user [B], item [B, k] int64, score [B, k] float32): each user's best items of a group, exactly ranked.

    Every known item (training, validation, test) is left out unless `keep_seen`; where fewer than k items remain, item
    is -1 and score -inf. A k beyond the number of items is that number.
    """
    masks = groups_of(data)
    if group not in masks:
        raise ValueError(f"{data.name} knows no cold items, so that there is no group {group}; ask for all")
    scorer = scorer_of(model)
    device = device_of(model)
    mask = masks[group]
    candidates = None if mask is None else mask.to(device)
    seen = known(data)
    rows = chunk_users(scorer, data.num_items, config)
    k = min(k, data.num_items if mask is None else int(mask.sum()))
    for begin in range(0, data.num_users, rows):
        part_B = torch.arange(begin, min(begin + rows, data.num_users))
        rank = ranker(scorer, part_B.to(device), budget_bytes=config.training.memory_mib << 20)
        exclude = None if keep_seen else to_device(take_rows(seen, part_B), device)
        score, item = rank(k, exclude=exclude, candidates=candidates)
        yield part_B, item.cpu(), score.cpu()
        on_users(begin + part_B.numel())


def best_names(metrics: Collection[str]) -> list[str]:
    """The metrics that fit a terminal: recall and NDCG of every group at the largest k."""
    largest = max((int(name.partition("@")[2]) for name in metrics), default=0)
    return [name for name in metrics if name.endswith((f"Recall@{largest}", f"NDCG@{largest}"))]
