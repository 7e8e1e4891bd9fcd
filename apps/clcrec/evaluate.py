"""Full ranking of all, warm and cold items for every user, baselines for comparison, and prediction both ways.

Legend: U users, I items, W warm items, B users of a chunk, D embedding dim.

Protocol (Wei et al., ACM MM 2021): every user with a held-out positive in the group ranks all items of the group
(all, the warm ones alone, or the cold ones alone) except those the user has in training; ties count against the model.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.clcrec.config import Config, TrainConfig
from apps.clcrec.dataset import GROUPS, ColdStart, Group, Stage, group_part, lists_of
from apps.clcrec.model import CLCRec
from shared.amp import evaluation_mode
from shared.device import to_device
from shared.ranking import Lists, added, finish, metric_sums, rank_relevant, take_rows, top_k

USERS_PER_CHUNK = 4096
LEGACY_MASK = 1e-15  # the original's score of items that are left out: above every negative score
SHOWN = ("Recall", "NDCG", "Precision", "HR")


def held_out(data: ColdStart, stage: Stage) -> Lists:
    """Each user's positives of that stage."""
    return data.valid if stage == "valid" else data.test


def protocol_text(data: ColdStart, stage: Stage, training: TrainConfig) -> str:
    """What a metric of `evaluate` means, in a sentence."""
    lists = held_out(data, stage)
    users = {group: int((group_part(lists, group, data.num_warm).ptr.diff() > 0).sum()) for group in GROUPS}
    items = {"all": data.num_items, "warm": data.num_warm, "cold": data.num_items - data.num_warm}
    groups = ", ".join(f"{group} ({users[group]:,} users, {items[group]:,} items)" for group in GROUPS)
    masked = {
        "inf": "training positives left out",
        "legacy": f"training positives and other groups scored {LEGACY_MASK} as the original does: not comparable",
    }[training.mask_value]
    scaled = f", cold scores times {training.cold_scale:g}" if training.cold_scale != 1 else ""
    return f"{stage} positives, full ranking of {groups}, {masked}{scaled}, ties against the model"


def evaluate(
    model: nn.Module,
    data: ColdStart,
    stage: Stage,
    *,
    config: Config,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Recall, NDCG, precision and hit rate at every k, by group: "all/Recall@10", "warm/NDCG@20", "cold/..." and so on.

    Groups without a held-out positive are left out. `on_users` is called between chunks with the number of users done.
    """
    return evaluate_stages(model, data, (stage,), config=config, on_users=on_users)[stage]


@torch.no_grad()
def evaluate_stages(
    model: nn.Module,
    data: ColdStart,
    stages: Sequence[Stage],
    *,
    config: Config,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[Stage, dict[str, float]]:
    """What `evaluate` gives, for several stages from the same three sets of scores."""
    assert isinstance(model, CLCRec)
    with evaluation_mode(model):
        item_ID = model.all_items(cold_scale=config.training.cold_scale)
        user_UD = model.user.detach()
        return ranking_metrics(lambda user_B: user_UD[user_B], item_ID, data, stages, config=config, on_users=on_users)


def ranking_metrics(
    query_of: Callable[[Tensor], Tensor],
    item_ID: Tensor,
    data: ColdStart,
    stages: Sequence[Stage],
    *,
    config: Config,
    bias_I: Tensor | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[Stage, dict[str, float]]:
    """The metrics of scores that are dot products (plus a bias of the items), by stage and group.

    `query_of` gives the vectors [B, D] of users ([B] int64, on the device of `item_ID`).
    """
    training = config.training
    device, num_warm = item_ID.device, data.num_warm
    bounds = {"all": (0, data.num_items), "warm": (0, num_warm), "cold": (num_warm, data.num_items)}
    relevant = {group: [group_part(held_out(data, stage), group, num_warm) for stage in stages] for group in GROUPS}
    trained = data.trained
    sums: dict[tuple[Stage, Group], dict[str, Tensor]] = {(stage, group): {} for stage in stages for group in GROUPS}
    users = torch.nonzero(torch.stack([lists.ptr.diff() for lists in relevant["all"]]).sum(0)).squeeze(1)
    for begin in range(0, users.numel(), USERS_PER_CHUNK):
        part_B = users[begin : begin + USERS_PER_CHUNK]
        query_BD = query_of(part_B.to(device))
        seen = to_device(take_rows(trained, part_B), device)
        for group, parts in relevant.items():
            first, end = bounds[group]
            lists, stage_E = side_by_side([take_rows(part, part_B) for part in parts])
            if not lists.item.numel():
                continue
            wanted = to_device(Lists(lists.ptr, lists.item.long() - first), device)
            rank_E = rank_relevant(
                query_BD,
                item_ID[first:end],
                wanted,
                exclude=None if group == "cold" else seen,
                bias_I=None if bias_I is None else bias_I[first:end],
                budget_bytes=training.memory_mib << 20,
            )
            if training.mask_value == "legacy":
                left_out_B = seen.ptr.diff() if group != "cold" else torch.zeros_like(part_B, device=device)
                left_out_B = left_out_B + data.num_items - (end - first)
                owner = torch.repeat_interleave(torch.arange(part_B.numel(), device=device), wanted.ptr.diff())
                score = (query_BD[owner] * item_ID[first:end][wanted.item]).sum(1)
                score = score if bias_I is None else score + bias_I[first:end][wanted.item]
                rank_E = rank_E + (score <= LEGACY_MASK) * left_out_B[owner]
            rank_E = rank_E.cpu()
            for i, (stage, part) in enumerate(zip(stages, parts, strict=True)):
                values = metric_sums(rank_E[stage_E == i], take_rows(part, part_B).ptr, ks=training.ks)
                sums[stage, group] = added(sums[stage, group], values)
        on_users(begin + part_B.numel())
    found: dict[Stage, dict[str, float]] = {stage: {} for stage in stages}
    for (stage, group), total in sums.items():
        if total and total["users"]:
            means = finish(total)
            found[stage] |= {f"{group}/{name}": means[name] for name in means if name.startswith(SHOWN)}
    return found


def side_by_side(parts: Sequence[Lists]) -> tuple[Lists, Tensor]:
    """For every row the items of all parts, one part behind the other, and which part each item is of ([E] int64)."""
    length = torch.stack([part.ptr.diff() for part in parts], dim=1)  # [B, parts]
    ptr = torch.cat([length.new_zeros(1), length.sum(1).cumsum(0)])
    begin = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    item = parts[0].item.new_empty(int(ptr[-1]))
    part_E = torch.empty(item.numel(), dtype=torch.int64)
    for i, part in enumerate(parts):
        place = torch.repeat_interleave(begin[:, i] - part.ptr[:-1], length[:, i]) + torch.arange(part.item.numel())
        item[place], part_E[place] = part.item, i
    return Lists(ptr, item), part_E


@torch.no_grad()
def baselines(data: ColdStart, stage: Stage, content_IF: Tensor, *, config: Config) -> dict[str, dict[str, float]]:
    """What needs no training, under the same protocol: metrics by name of the baseline.

    "popularity" ranks items by training pairs and knows nothing of cold ones; "content" ranks them by the cosine of
    their content (`content_IF`, normalised) with the mean content of the user's training items; words are not in it,
    and where there is nothing else it is left out.
    """
    count_I = torch.bincount(data.item.long(), minlength=data.num_items).float()
    nothing = torch.zeros(data.num_items, 1)
    popular = ranking_metrics(
        lambda user_B: torch.zeros(user_B.numel(), 1), nothing, data, (stage,), config=config, bias_I=count_I
    )
    found = {"popularity": popular[stage]}
    if content_IF.shape[1]:
        content_IF = F.normalize(content_IF.float(), dim=1)

        def profile(user_B: Tensor) -> Tensor:
            ptr, item = take_rows(data.trained, user_B)
            return F.embedding_bag(item.long(), content_IF, ptr, mode="mean", include_last_offset=True)

        found["content"] = ranking_metrics(profile, content_IF, data, (stage,), config=config)[stage]
    return found


@torch.no_grad()
def matrices(model: nn.Module, *, cold_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The float32 vectors whose dot products are the scores: users [U, D] and items [I, D] (cold ones from content)."""
    assert isinstance(model, CLCRec)
    with evaluation_mode(model):
        return model.user.detach().float(), model.all_items(cold_scale=cold_scale)


@torch.no_grad()
def predict_items(
    model: nn.Module,
    data: ColdStart,
    *,
    k: int,
    config: Config,
    group: Group = "all",
    keep_seen: bool = False,
    on_users: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (user [B], item [B, k] int64, score [B, k] float32): each user's best items of a group, exactly ranked.

    Every known positive is left out unless `keep_seen`; where fewer than k items remain, item is -1 and score -inf. A
    k beyond the number of items of the group is that number.
    """
    user_UD, item_ID = matrices(model, cold_scale=config.training.cold_scale)
    first = data.num_warm if group == "cold" else 0
    end = data.num_warm if group == "warm" else data.num_items
    known = group_part(data.known, group, data.num_warm)
    for begin in range(0, data.num_users, USERS_PER_CHUNK):
        part_B = torch.arange(begin, min(begin + USERS_PER_CHUNK, data.num_users))
        seen = take_rows(known, part_B)
        score, item = top_k(
            user_UD[begin : begin + USERS_PER_CHUNK],
            item_ID[first:end],
            k=min(k, end - first),
            exclude=None if keep_seen else to_device(Lists(seen.ptr, seen.item - first), user_UD.device),
            budget_bytes=config.training.memory_mib << 20,
        )
        yield part_B, torch.where(item < 0, item, item + first).cpu(), score.cpu()
        on_users(begin + part_B.numel())


@torch.no_grad()
def predict_users(
    model: nn.Module,
    item_ND: Tensor,
    *,
    k: int,
    config: Config,
    known: Lists | None = None,
    on_items: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (item [B], user [B, k] int64, score [B, k] float32): the best users for items given by their vectors.

    `item_ND`: encoded content of new items (`CLCRec.encode`) or rows of `matrices`; `known` ([N + 1], users) are left
    out, user is -1 and score -inf where fewer than k remain. Exactly ranked.
    """
    assert isinstance(model, CLCRec)
    user_UD = model.user.detach().float()
    for begin in range(0, item_ND.shape[0], USERS_PER_CHUNK):
        part_B = torch.arange(begin, min(begin + USERS_PER_CHUNK, item_ND.shape[0]))
        score, user = top_k(
            item_ND[begin : begin + USERS_PER_CHUNK],
            user_UD,
            k=min(k, user_UD.shape[0]),
            exclude=None if known is None else to_device(take_rows(known, part_B), user_UD.device),
            budget_bytes=config.training.memory_mib << 20,
        )
        yield part_B, user.cpu(), score.cpu()
        on_items(begin + part_B.numel())


def users_of_items(lists: Lists, num_items: int) -> Lists:
    """The lists turned round: the users of every item, rising."""
    user = torch.repeat_interleave(torch.arange(lists.ptr.numel() - 1), lists.ptr.diff())
    return lists_of(lists.item, user, num_items)


def best_names(metrics: Collection[str]) -> list[str]:
    """The metrics that fit a terminal: recall and NDCG of every group at the largest k."""
    largest = max((int(name.partition("@")[2]) for name in metrics), default=0)
    return [name for name in metrics if name.endswith((f"Recall@{largest}", f"NDCG@{largest}"))]
