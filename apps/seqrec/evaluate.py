"""Leave-one-out evaluation over all users, baselines for comparison, and top-k prediction.

Legend: B users of a chunk, D embedding dim, I items + 1 (row 0 is padding), E pairs of user and seen item.

Protocol: a user's last event is the test target, the one before it the validation target (Kang and McAuley 2018);
every other item of the catalogue competes (full ranking, Krichene and Rendle 2020), except, in the filtered protocol,
those the user has met before. Ties count against the model. The same metric differs three-fold between protocols,
so `protocol_text` goes with every number.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from apps.seqrec.config import Config
from apps.seqrec.dataset import (
    ACTIONS,
    MIN_EVENTS,
    Batch,
    Sequences,
    Spans,
    Stage,
    asked_times,
    compact,
    draw_unseen,
    history_end,
    item_counts,
    make_batch,
    number_within,
    query_spans,
    seen_items,
)
from apps.seqrec.model import SeqRec
from shared.amp import evaluation_mode
from shared.device import to_device
from shared.distributed import Group, place
from shared.ranking import Lists, added, finish, metric_sums, rank_relevant, sampled_candidates_rank, top_k
from shared.seed import make_generator

USERS_PER_CHUNK = 512
SAMPLED_NEGATIVES = 100
SAMPLE_STREAM = 6
MISSED = 1 << 40  # a rank that is within no k
HR_SHARE = 0.31  # of the contest's score; the rest is NDCG
CONTEST_WEIGHTS = (0.0, 1.0, 2.5)  # of a target that was shown, clicked, converted
WEIGHTED = ("weight", "weighted HR@10", "weighted NDCG@10")


def protocol_text(sequences: Sequences, stage: Stage, config: Config) -> str:
    """What a metric of `evaluate` means, in a sentence."""
    users = query_spans(sequences, stage, max_len=1).user.numel()
    target = {"valid": "second to last", "test": "last"}[stage]
    competitors = {
        "filtered": f"full ranking over {sequences.num_items:,} items, history filtered (a target in it is missed)",
        "unfiltered": f"full ranking over {sequences.num_items:,} items, history not filtered",
        "sampled": f"ranked among {SAMPLED_NEGATIVES} sampled unseen items: not comparable with a full ranking",
    }[config.training.protocol]
    split = f"leave-one-out, {stage} ({target} event)"
    if sequences.held_out is not None:
        split = f"{sequences.held_out.text}, {stage}"
    told = ""
    if config.model.next_action and sequences.action is not None:
        told += f", asked for a {config.training.query_action}"
    if config.model.query_time and sequences.time is not None:
        told += ", TOLD THE TARGET'S OWN TIME, which no real query knows"
    return f"{split}, all {users:,} users, {competitors}, ties against the model{told}"


def evaluated_spans(sequences: Sequences, stage: Stage, *, max_len: int) -> Spans:
    """The queries of `stage`; data in which nobody can be evaluated is refused."""
    spans = query_spans(sequences, stage, max_len=max_len)
    if not spans.user.numel():
        if sequences.held_out is not None:
            raise ValueError(
                f"{sequences.name}: {sequences.held_out.text} leaves no user for {stage}, so there is nothing to "
                "measure; change --held-out-share or --split"
            )
        raise ValueError(
            f"{sequences.name}: no user has the {MIN_EVENTS} events it takes to be evaluated (one each to train, "
            "validate and test on), so there is nothing to measure; add data"
        )
    return spans


def histories(sequences: Sequences, spans: Spans) -> Lists:
    """Every event before each query, whole histories rather than the window the model sees: CSR over the queries."""
    first = sequences.ptr[:-1][spans.user]
    length = spans.end - first
    ptr = torch.zeros(length.numel() + 1, dtype=torch.int64)
    torch.cumsum(length, 0, out=ptr[1:])
    query, step = number_within(length)
    return Lists(ptr, sequences.item[first[query] + step].long())


def encode(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states of all tokens of a batch, flattened [R L, D], and the vectors of its rows [C, D]."""
    assert isinstance(model, SeqRec)
    vector_CD = model.vectors(batch.rows)
    hidden_RLD = model(
        batch.item,
        batch.segment,
        batch.position,
        batch.time,
        packed=batch.packed,
        vector_CD=vector_CD,
        action_RL=batch.action,
        front_B=batch.front,
        user_B=batch.user,
    )
    return hidden_RLD.flatten(0, 1), vector_CD


class Queries(NamedTuple):
    """A chunk of users to rank for."""

    spans: Spans
    state_BD: Tensor  # their last hidden states, as they enter the dot product
    seen: Lists  # every item before the query


def queries(
    model: nn.Module, sequences: Sequences, spans: Spans, *, config: Config, packed: bool, device: torch.device
) -> Iterator[Queries]:
    """The users of `spans` in chunks, encoded without gradient by `model` in evaluation mode."""
    assert isinstance(model, SeqRec)
    front = model.front is not None
    action = 1 + ACTIONS.index(config.training.query_action)
    for begin in range(0, spans.user.numel(), USERS_PER_CHUNK):
        part = Spans(*(column[begin : begin + USERS_PER_CHUNK] for column in spans))
        batch = make_batch(sequences, part, packed=packed, row_len=config.data.max_len + int(front), front=front)
        if model.tower is not None:
            batch = compact(batch, num_items=sequences.num_items, whole=False)
        batch = to_device(batch, device)
        hidden, _ = encode(model, batch)
        asked, pause = None, None
        if model.next_moment is not None:
            times = asked_times(sequences, part)
            assert times is not None
            assert batch.time is not None
            asked = times.to(device)
            pause = asked - batch.time.flatten().index_select(0, batch.last)
        state_BD = model.query(
            hidden.index_select(0, batch.last),
            action_N=torch.full_like(batch.last, action),
            asked_N=asked,
            pause_N=pause,
        )
        yield Queries(part, state_BD, to_device(histories(sequences, part), device))


def evaluate(
    model: nn.Module,
    sequences: Sequences,
    stage: Stage,
    *,
    config: Config,
    packed: bool,
    protocol: str | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """HR, NDCG, MRR, recall and precision at every k of the configuration, over all users that `stage` has.

    Where the data has actions there is the contest's score too (`finish_scores`). `protocol` defaults to the
    configuration's; `protocol_text` says what it means. `on_users` is called between chunks with the number of users
    done. The model is left in the mode it was in.
    """
    return finish_scores(
        evaluation_sums(model, sequences, stage, config=config, packed=packed, protocol=protocol, on_users=on_users)
    )


def missed_if_seen(rank_B: Tensor, target_B: Tensor, seen: Lists) -> Tensor:
    """The ranks, MISSED where the target is in the history: filtered out, it would never be recommended."""
    query = torch.repeat_interleave(torch.arange(rank_B.numel(), device=rank_B.device), seen.ptr.diff())
    again = torch.zeros_like(rank_B).index_add_(0, query, (seen.item == target_B[query]).to(rank_B.dtype))
    return torch.where(again > 0, MISSED, rank_B)


def weighted_sums(rank: Tensor, action: Tensor) -> dict[str, Tensor]:
    """HR@10 and NDCG@10 of targets by the contest's weights of their actions, summed, and the sum of the weights."""
    weight = torch.tensor(CONTEST_WEIGHTS, dtype=torch.float64)
    total = {name: torch.zeros((), dtype=torch.float64) for name in WEIGHTED}
    for kind in range(len(ACTIONS)):
        own = rank[action == kind]
        sums = metric_sums(own, torch.arange(own.numel() + 1), ks=(10,))
        for name, metric in zip(WEIGHTED, ("users", "HR@10", "NDCG@10"), strict=True):
            total[name] += weight[kind] * sums[metric]
    return total


def finish_scores(sums: dict[str, Tensor]) -> dict[str, float]:
    """`finish` with the contest's score, plain and with its weights of actions, where the sums tell them.

    The score is .31 HR@10 + .69 NDCG@10; weights are 0 for an exposure, 1 for a click, 2.5 for a conversion.
    """
    plain = finish({name: value for name, value in sums.items() if name not in WEIGHTED})
    if WEIGHTED[0] not in sums:
        return plain
    weight, hits, gain = (float(sums[name]) for name in WEIGHTED)
    if "HR@10" in plain:
        plain["Score"] = HR_SHARE * plain["HR@10"] + (1 - HR_SHARE) * plain["NDCG@10"]
    plain["Weighted score"] = (HR_SHARE * hits + (1 - HR_SHARE) * gain) / weight if weight else 0.0
    return plain


@torch.no_grad()
def evaluation_sums(
    model: nn.Module,
    sequences: Sequences,
    stage: Stage,
    *,
    config: Config,
    packed: bool,
    protocol: str | None = None,
    group: Group | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """What `evaluate` averages, summed over the users that this process of `group` measures.

    Whole chunks are dealt to the processes in turn, so that a user's chunk is computed alike for any number of
    processes; the sums of all of them are then those of one process to the last bit.
    """
    assert isinstance(model, SeqRec)
    training = config.training
    protocol = protocol or training.protocol
    device = model.item.weight.device
    spans = evaluated_spans(sequences, stage, max_len=config.data.max_len)
    sampled = sampled_negatives(sequences, stage, spans, seed=training.seed) if protocol == "sampled" else None
    process, processes = place(group)
    chunk_B = torch.arange(spans.user.numel()) // USERS_PER_CHUNK
    own = torch.nonzero(chunk_B % processes == process).squeeze(1)
    spans = spans.take(own)
    nobody = torch.zeros(0, dtype=torch.int64)
    sums = metric_sums(nobody, torch.zeros(1, dtype=torch.int64), ks=training.ks)
    if sequences.action is not None:
        sums |= weighted_sums(nobody, nobody)
    done = 0
    with evaluation_mode(model):
        item_ID = model.candidates()
        for chunk in queries(model, sequences, spans, config=config, packed=packed, device=device):
            size = chunk.spans.user.numel()
            target = sequences.item[chunk.spans.end].long().to(device)
            relevant = Lists(torch.arange(size + 1, device=device), target)
            if sampled is not None:
                negatives = sampled[own[done : done + size]].to(device)
                rank = sampled_candidates_rank(chunk.state_BD, item_ID, target, negatives)
            else:
                exclude = chunk.seen if protocol == "filtered" else None
                rank = rank_relevant(
                    chunk.state_BD,
                    item_ID,
                    relevant,
                    exclude=exclude,
                    first_item=1,
                    budget_bytes=training.memory_mib << 20,
                )
                if protocol == "filtered":
                    rank = missed_if_seen(rank, target, chunk.seen)
            part = metric_sums(rank, relevant.ptr, ks=training.ks)
            if sequences.action is not None:
                part |= weighted_sums(rank.cpu(), sequences.action[chunk.spans.end])
            sums = added(sums, part)
            done += size
            on_users(done)
    return sums


def sampled_negatives(sequences: Sequences, stage: Stage, spans: Spans, *, seed: int) -> Tensor:
    """100 items per user, uniform among those the user never met (target included among the met), [B, 100] int64."""
    met = seen_items(sequences, "all")
    user = spans.user[:, None].expand(-1, SAMPLED_NEGATIVES).reshape(-1)
    generator = make_generator(seed, stream=SAMPLE_STREAM)
    return draw_unseen(met, user, generator).view(-1, SAMPLED_NEGATIVES)


@torch.no_grad()
def baselines(sequences: Sequences, stage: Stage, *, config: Config) -> dict[str, dict[str, float]]:
    """What needs no model, under the same protocol: metrics by name of the baseline.

    "popularity" ranks items by training events; "most recent" ranks a user's own items, latest first (all of them are
    left out under the filtered protocol, where it scores nothing); "successor" ranks items by how often they directly
    followed the user's most recent item in training, then by popularity.
    """
    training = config.training
    spans = evaluated_spans(sequences, stage, max_len=config.data.max_len)
    count_I = item_counts(sequences).double()
    follow = follow_counts(sequences)
    sampled = sampled_negatives(sequences, stage, spans, seed=training.seed) if training.protocol == "sampled" else None
    sums: dict[str, dict[str, Tensor]] = {"popularity": {}, "most recent": {}, "successor": {}}
    rows = max(1, (training.memory_mib << 20) // (8 * 4 * count_I.numel()))
    for begin in range(0, spans.user.numel(), rows):
        part = Spans(*(column[begin : begin + rows] for column in spans))
        seen = histories(sequences, part)
        size = part.user.numel()
        target = sequences.item[part.end].long()
        owner, age = number_within(seen.ptr.diff())
        recent_BI = torch.zeros(size, count_I.numel(), dtype=torch.float64)
        recent_BI.view(-1).scatter_reduce_(0, owner * count_I.numel() + seen.item, (age + 1).double(), "amax")
        last = sequences.item[part.end - 1].long()
        owner_of_follow, step = number_within(follow.ptr[last + 1] - follow.ptr[last])
        source = follow.ptr[last][owner_of_follow] + step
        successor_BI = (count_I / (count_I.max() + 1)).repeat(size, 1)
        successor_BI[owner_of_follow, follow.item[source]] += follow.times[source]
        scores = {"popularity": count_I.expand(size, -1), "most recent": recent_BI, "successor": successor_BI}
        for name, score_BI in scores.items():
            own = score_BI.gather(1, target[:, None])
            if sampled is not None:
                negatives = sampled[begin : begin + rows]
                # the target is no rival of itself where a user has met everything and only met items could be drawn
                rivals = score_BI.gather(1, negatives).masked_fill_(negatives == target[:, None], -torch.inf)
            else:
                rivals = score_BI.clone()
                rivals[:, 0] = -torch.inf
                if training.protocol == "filtered":
                    rivals[owner, seen.item] = -torch.inf
                rivals.scatter_(1, target[:, None], -torch.inf)
            rank = 1 + (rivals >= own).sum(1)
            if training.protocol == "filtered":
                rank = missed_if_seen(rank, target, seen)
            found = metric_sums(rank, torch.arange(size + 1), ks=training.ks)
            if sequences.action is not None:
                found |= weighted_sums(rank, sequences.action[part.end])
            sums[name] = added(sums[name], found)
    return {name: finish_scores(total) for name, total in sums.items()}


class FollowCounts(NamedTuple):
    """How often each item directly followed each other one in the training events."""

    ptr: Tensor  # [I + 1] int64 into item and count
    item: Tensor  # [P] int64
    times: Tensor  # [P] float64, how often


def follow_counts(sequences: Sequences) -> FollowCounts:
    """Counts of direct successors, sorted by item."""
    width = sequences.num_items + 1
    index = torch.arange(sequences.num_events)
    index = index[index + 1 < history_end(sequences, "train")[sequences.user_of_event]]
    pair, count = torch.unique(sequences.item[index].long() * width + sequences.item[index + 1], return_counts=True)
    ptr = torch.searchsorted(pair, torch.arange(width + 1) * width)
    return FollowCounts(ptr, pair % width, count.double())


def candidates_seen(seen: Lists, row_C: Tensor) -> Lists:
    """The seen rows of every query as places among the candidates' rows ([C] int64), rising; others are left out."""
    rising, order = torch.sort(row_C, stable=True)
    low = torch.searchsorted(rising, seen.item)
    count = torch.searchsorted(rising, seen.item, right=True) - low
    entry, step = number_within(count)
    owner, _ = number_within(seen.ptr.diff())
    width = row_C.numel()
    pair = torch.unique(owner[entry] * width + order[low[entry] + step])
    ptr = torch.searchsorted(pair, torch.arange(seen.ptr.numel()) * width)
    return Lists(ptr, pair % width)


@torch.no_grad()
def predict(
    model: nn.Module,
    sequences: Sequences,
    *,
    k: int,
    config: Config,
    packed: bool,
    keep_seen: bool = False,
    row_C: Tensor | None = None,
    on_users: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of (user [B], item [B, k] int64, score [B, k] float32): the next items after each user's whole history.

    Exact: every item is scored, in chunks of the configured memory; or every candidate, whose rows of features `row`
    ([C] int64) are, and then `item` is the place among them. Items of the history are left out unless `keep_seen`;
    where fewer than k items remain, item is -1 and score -inf. The model is in evaluation mode until the last chunk was
    taken.
    """
    assert isinstance(model, SeqRec)
    device = model.item.weight.device
    spans = query_spans(sequences, "all", max_len=config.data.max_len, front=model.front is not None)
    done = 0
    with evaluation_mode(model):
        item_CD = model.candidates(None if row_C is None else model.vectors(row_C.to(device)))
        for chunk in queries(model, sequences, spans, config=config, packed=packed, device=device):
            seen = None if keep_seen else chunk.seen
            if seen is not None and row_C is not None:
                seen = to_device(candidates_seen(Lists(seen.ptr.cpu(), seen.item.cpu()), row_C), device)
            score, item = top_k(
                chunk.state_BD,
                item_CD,
                k=k,
                exclude=seen,
                first_item=0 if row_C is not None else 1,
                budget_bytes=config.training.memory_mib << 20,
            )
            yield chunk.spans.user, item.cpu(), score.cpu()
            done += chunk.spans.user.numel()
            on_users(done)
