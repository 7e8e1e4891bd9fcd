"""Training and evaluation with front tokens, features, actions and times, against loops over events in float64.

Run by torchrun, this file trains one model in several processes: `FILE FOLDER`.
"""

import copy
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apps.seqrec.evaluate
from apps.seqrec import losses
from apps.seqrec.config import Config
from apps.seqrec.dataset import (
    Batch,
    Sequences,
    Spans,
    Stage,
    compact,
    hold_out_time,
    hold_out_users,
    make_batch,
    training_spans,
)
from apps.seqrec.evaluate import baselines, encode, evaluate, evaluation_sums, finish_scores, predict, protocol_text
from apps.seqrec.model import Moment, SeqRec
from apps.seqrec.train import (
    Components,
    DeadModelError,
    Outcome,
    build,
    fit,
    loss_fn,
    restore,
    step_batches,
    step_shares,
)
from shared import distributed
from shared.checkpoint import newest_checkpoint
from shared.distributed import Group
from shared.log import RunLog, SilentLog, StopSignal, read_metrics
from tests.seqrec.test_seqrec_features import (
    Event,
    World,
    features_of,
    make_world,
    sequences_of,
    slow_tower,
    slow_vector,
)
from tests.seqrec.test_seqrec_train import LOSSES, configure, numbers, weights

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LENGTHS = [5, 1, 9, 0, 17, 3, 2, 14, 25, 6]
NUM_ITEMS = 20
MAX_LEN = 10
EVERYTHING = {"action_input": True, "time_input": True, "next_action": True, "query_time": True}
WEIGHTS = (0.5, 1.0, 2.5)


def settle(model: nn.Module) -> None:
    """Move every weight in place, so that what begins as zero hides no mistake; padding stays zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0


def components(
    sequences: Sequences, *, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training: Any
) -> Components:
    c = build(configure(model={"dropout": 0.0, **(model or {})}, data=data, **training), sequences)
    settle(c.state.model)
    return c


def model_of(c: Components) -> SeqRec:
    assert isinstance(c.state.model, SeqRec)
    return c.state.model


def encoded(c: Components, sequences: Sequences, spans: Spans, *, packed: bool = False) -> tuple[Batch, Tensor]:
    """The batch of the pieces, and the hidden state of each of its tokens, flattened."""
    batch = make_batch(sequences, spans, packed=packed, row_len=MAX_LEN + int(c.front), front=c.front)
    if c.compact:
        batch = compact(batch, num_items=sequences.num_items, whole=False)
    return batch, encode(c.state.model, batch)[0].detach()


# One event at a time


def slow_moment(moment: Moment, pause: int, time: int) -> Tensor:
    bucket = (max(0, pause) + 1).bit_length() - 1
    angles = [2 * math.pi * (time % period) * n / period for period in (86_400, 604_800) for n in (1, 2, 3)]
    circle = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    weight, bias = moment.cycle.weight.double(), moment.cycle.bias.double()
    return moment.pause.weight[bucket].double() + weight @ circle + bias


def slow_hidden(model: SeqRec, world: World, user: int, start: int, end: int) -> Tensor:
    """Hidden states of a user's events start..end and of the front token before them, alone in a row."""
    events = world.histories[user][start:end]
    root = math.sqrt(model.config.embed_dim)
    tokens, times = [], []
    if model.front is not None:
        tokens.append(root * (slow_tower(model, world).user(user) + model.front.double()))
        times.append(world.histories[user][start].time)
    for event in events:
        own = model.item.weight[event.item].double()
        x = root * (own if model.tower is None else slow_vector(model, world, event.item, event.own))
        if model.action is not None:
            x = x + model.action.weight[1 + event.action].double()
        if model.moment is not None:
            x = x + slow_moment(model.moment, event.time - times[-1] if times else 0, event.time)
        tokens.append(x)
        times.append(event.time)
    if model.position is not None:
        tokens = [x + model.position.weight[len(tokens) - 1 - n].double() for n, x in enumerate(tokens)]
    x = torch.stack(tokens)[None]
    context = model.context(torch.ones(1, len(tokens), dtype=torch.int64), torch.tensor([times]), packed=False)
    for block in copy.deepcopy(model.blocks).double():
        x = block(x, context)
    return copy.deepcopy(model.final_norm).double()(x)[0]


def slow_query(model: SeqRec, hidden: Tensor, *, action: int, asked: int, last: int) -> Tensor:
    """A hidden state on its way to the scores: what is asked for scales and shifts it."""
    condition = torch.zeros_like(hidden)
    if model.next_action is not None:
        condition = condition + model.next_action.weight[1 + action].double()
    if model.next_moment is not None:
        condition = condition + slow_moment(model.next_moment, asked - last, asked)
    if model.condition is not None:
        both = model.condition.weight.double() @ condition + model.condition.bias.double()
        width = hidden.numel()
        hidden = hidden * (1 + both[:width]) + both[width:]
    if model.config.score == "cosine":
        return hidden / hidden.square().sum().sqrt() / model.config.temperature
    return hidden


def slow_candidates(model: SeqRec, world: World) -> Tensor:
    """Every item as scores see it, row 0 is padding."""
    rows = [torch.zeros(model.config.embed_dim, dtype=torch.float64)]
    for item in range(1, len(world.items) + 1):
        vector = model.item.weight[item].double() if model.tower is None else slow_vector(model, world, item)
        rows.append(vector / vector.square().sum().sqrt() if model.config.score == "cosine" else vector)
    return torch.stack(rows)


class Asked(NamedTuple):
    """What one target is compared with, and by what."""

    query: Tensor
    event: Event


def slow_training_queries(c: Components, world: World, users: list[int]) -> list[Asked]:
    """Every target of the users' training pieces, in order of user and time."""
    model, asked = model_of(c), []
    for user in users:
        history = world.histories[user]
        train = history[:-2] if len(history) >= 3 else history
        start = max(0, len(train) - 1 - MAX_LEN)
        hidden = slow_hidden(model, world, user, start, len(train) - 1)
        first = start if c.front else start + 1
        for state, place in zip(hidden, range(first, len(train)), strict=True):
            event = train[place]
            last = train[max(place - 1, start)].time  # the front token is no event: nothing has passed since
            query = slow_query(model, state, action=event.action, asked=event.time, last=last)
            asked.append(Asked(query, event))
    return asked


MODELS: dict[str, dict[str, Any]] = {
    "front token": {},
    "front token, times": {"time_input": True},
    "no front token, times": {"user_token": False, "time_input": True},
    "cosine": {"score": "cosine", "temperature": 0.5},
    "hstu": {"attention": "hstu"},
    "rope, post-norm, query time": {"position": "rope", "norm_first": False, "query_time": True},
    "no actions": {"action_input": False, "next_action": False},
    "one family": {"embeddings": ("82",)},
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_equal_those_of_one_sequence_after_another_in_float64(name, packed):
    world = make_world(LENGTHS)
    if name == "one family":
        world.vectors["81"].clear()  # which the model must not notice
    c = components(sequences_of(make_world(LENGTHS)), model=MODELS[name])
    spans = training_spans(c.sequences, max_len=MAX_LEN)
    batch, hidden = encoded(c, c.sequences, spans, packed=packed)
    begin = c.sequences.ptr.tolist()
    for index, (user, start, end) in enumerate(zip(*(column.tolist() for column in spans), strict=True)):
        places = torch.nonzero(batch.segment.flatten() == index + 1).squeeze(1)
        expected = slow_hidden(model_of(c), world, user, start - begin[user], end - begin[user])
        torch.testing.assert_close(hidden[places].double(), expected.detach(), rtol=1e-4, atol=1e-4)


# Nothing of a target is seen


def changed(world: World, user: int, place: int, **what: Any) -> World:
    """The world in which one event is another one."""
    histories = [list(history) for history in world.histories]
    histories[user][place] = histories[user][place]._replace(**what)
    return world._replace(histories=histories)


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_anything_of_its_target_or_of_what_comes_later(name):
    world = make_world(LENGTHS, own_share=1.0)  # all have rows of their own, whose number says nothing
    c = components(sequences_of(world), model=MODELS[name])
    user = 7
    first = int(c.sequences.ptr[user])
    spans = Spans(torch.tensor([user]), torch.tensor([first + 2]), torch.tensor([first + 8]))
    batch, before = encoded(c, c.sequences, spans)
    for place in range(2, 9):
        other = world
        for later in range(place, 14):
            event = world.histories[user][later]
            other = changed(
                other,
                user,
                later,
                item=event.item % NUM_ITEMS + 1,
                action=(event.action + 1) % 3,
                time=event.time + 40_000,
                own={"100": 1 + later % 3, "117": 2},
            )
        sequences = sequences_of(other)
        model_of(c).tower.features = features_of(other)  # type: ignore[union-attr]
        _, after = encoded(c, sequences, spans)
        known = place - 2 + int(c.front)
        torch.testing.assert_close(after[:known], before[:known], rtol=0, atol=1e-6)
        assert not torch.isclose(after[known:], before[known:], atol=1e-4).all(1).any()
    assert batch.item.numel() == 6 + int(c.front)


def target_queries(c: Components, world: World) -> Tensor:
    """The training queries of every user, as the loss gets them."""
    found: list[Tensor] = []
    original = losses.full_cross_entropy

    def spy(query_ND: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(query_ND.detach())
        return original(query_ND, *args, **kwargs)

    c = replace(c, sequences=sequences_of(world))
    batches = step_batches(c, training_spans(c.sequences, max_len=MAX_LEN), epoch=0, index=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "full_cross_entropy", spy)
        for batch in batches:
            loss_fn(c.state.model, batch, training=c.config.training, log_q_I=None)
    return torch.cat(found)


@pytest.mark.parametrize("next_action", [True, False])
@pytest.mark.parametrize("query_time", [True, False])
def test_a_query_knows_of_its_target_only_what_it_is_told(query_time, next_action):
    world = make_world([6, 6], own_share=0.0)
    c = components(sequences_of(world), model={"next_action": next_action, "query_time": query_time})
    before = target_queries(c, world)
    event = world.histories[0][3]  # the last target of the first user: no input anywhere
    told = {
        "item": (False, event.item % NUM_ITEMS + 1),
        "action": (next_action, (event.action + 1) % 3),
        "time": (query_time, event.time + 20_000),
    }
    for name, (matters, value) in told.items():
        after = target_queries(c, changed(world, 0, 3, **{name: value}))
        moved = (after - before).abs().amax(1) > 1e-4
        assert moved.nonzero().flatten().tolist() == ([3] if matters else []), name


@pytest.mark.parametrize("protocol", ["filtered", "unfiltered", "sampled"])
def test_ranks_do_not_depend_on_the_action_or_the_time_of_what_is_ranked(protocol):
    world = make_world([6] * 30, num_items=60)
    c = components(sequences_of(world), protocol=protocol, ks=(1, 2, 5, 10, 20, 30), query_action="conversion")
    other = world
    for user in range(30):
        event = world.histories[user][-1]
        other = changed(other, user, 5, action=(event.action + 1) % 3, time=event.time + 99_999)
    metrics = [evaluate(c.state.model, sequences_of(w), "test", config=c.config, packed=True) for w in (world, other)]
    weighted = [found.pop("Weighted score") for found in metrics]
    assert metrics[0] == metrics[1]
    assert weighted[0] != weighted[1]
    clicks = replace(c.config, training=replace(c.config.training, query_action="click"))
    found = evaluate(c.state.model, c.sequences, "test", config=clicks, packed=True)
    assert {name: found[name] for name in metrics[0]} != metrics[0]  # but on what is asked for


# Losses


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model", ["front token", "cosine", "rope, post-norm, query time"])
def test_a_steps_loss_equals_a_loop_over_targets_with_weights_of_their_actions(name, model):
    world = make_world(LENGTHS)
    c = components(sequences_of(world), model=MODELS[model], action_weights=WEIGHTS, **LOSSES[name])
    spans = training_spans(c.sequences, max_len=MAX_LEN)
    (batch,) = step_batches(c, spans, epoch=1, index=0)
    found, _ = loss_fn(c.state.model, batch, training=c.config.training, log_q_I=c.log_q_I)
    asked = slow_training_queries(c, world, spans.user.tolist())
    assert [query.event.item for query in asked] == batch_items(batch, batch.target).tolist()
    shared = None if batch.shared is None else batch_items(batch, batch.shared).tolist()
    unseen = None if batch.unseen is None else batch_items(batch, batch.unseen).tolist()
    if name == "inbatch":
        assert shared == sorted({query.event.item for query in asked})
    item = slow_candidates(model_of(c), world)
    total = 0.0
    for n, (query, event) in enumerate(asked):
        score = (item @ query).tolist()
        rivals = {"ce": range(1, NUM_ITEMS + 1), "bce": [unseen[n]] if unseen else None}.get(name, shared)
        assert rivals is not None
        loss = slow_loss(score, event.item, list(rivals), c.config, world)
        total += WEIGHTS[event.action] * loss
    assert float(found.detach()) == pytest.approx(total / len(asked), rel=1e-4)


def batch_items(batch: Batch, index: Tensor) -> Tensor:
    return index if batch.rows is None else batch.rows[index]


def slow_loss(score: list[float], target: int, rivals: list[int], config: Config, world: World) -> float:
    """The loss of one target, from the definition."""
    training = config.training
    others = [k for k in rivals if k != target]
    if training.loss == "bce":
        return math.log1p(math.exp(-score[target])) + sum(math.log1p(math.exp(score[k])) for k in rivals)
    if training.loss == "gbce":
        rate = len(rivals) / (NUM_ITEMS - 1)
        beta = rate * (training.gbce_t * (1 - 1 / rate) + 1 / rate)
        return beta * math.log1p(math.exp(-score[target])) + sum(math.log1p(math.exp(score[k])) for k in others)
    events = [e.item for h in world.histories for e in (h[:-2] if len(h) >= 3 else h)]

    def log_q(item: int) -> float:
        if not training.logq or training.loss == "ce":
            return 0.0
        share = max(1, events.count(item)) / len(events)
        if training.loss == "inbatch":
            return math.log(share)
        return math.log(len(rivals) * (share if training.negatives == "popularity" else 1 / NUM_ITEMS))

    own = score[target] - (log_q(target) if training.loss == "inbatch" else 0.0)
    return math.log(math.exp(own) + sum(math.exp(score[k] - log_q(k)) for k in others)) - own


N, D, ITEMS = 40, 6, 12
NEGATIVE = torch.tensor([3, 9, 9, 1, 12])


@cache
def random_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(N, D, generator=generator, dtype=torch.float64)
    item = torch.randn(ITEMS + 1, D, generator=generator, dtype=torch.float64)
    target = torch.randint(1, ITEMS + 1, (N,), generator=generator)
    weight = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)[torch.randint(0, 3, (N,), generator=generator)]
    return query, item, target, weight


LOG_Q = torch.linspace(-3, 0, ITEMS + 1, dtype=torch.float64)


def weighted_loss(name: str, query: Tensor, item: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    if name == "ce":
        return losses.full_cross_entropy(query, item, target, weight_N=weight)
    if name == "inbatch":
        distinct = torch.unique(target)
        return losses.in_batch_cross_entropy(query, item, target, distinct, log_q_I=LOG_Q, weight_N=weight)
    if name == "sampled":
        return losses.sampled_softmax(query, item, target, NEGATIVE, log_q_I=LOG_Q, weight_N=weight)
    if name == "bce":
        return losses.binary_cross_entropy(query, item, target, target.flip(0), weight_N=weight)
    return losses.generalised_bce(query, item, target, NEGATIVE, num_items=ITEMS, t=0.75, weight_N=weight)


def slow_weighted_loss(name: str, query: Tensor, item: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Position after position, each by its definition and times its weight."""
    total = query.new_zeros(())
    for n in range(N):
        own = int(target[n])
        score = [query[n] @ row for row in item]
        others = [k for k in NEGATIVE.tolist() if k != own]
        if name == "ce":
            loss = torch.stack(score[1:]).logsumexp(0) - score[own]
        elif name == "inbatch":
            corrected = [score[k] - LOG_Q[k] for k in range(ITEMS + 1)]
            rivals = sorted(set(target.tolist()))
            loss = torch.stack([corrected[k] for k in rivals]).logsumexp(0) - corrected[own]
        elif name == "sampled":
            rivals_of_n = [score[own], *(score[k] - LOG_Q[k] for k in others)]
            loss = torch.stack(rivals_of_n).logsumexp(0) - score[own]
        elif name == "bce":
            loss = -F.logsigmoid(score[own]) - F.logsigmoid(-score[int(target[N - 1 - n])])
        else:
            rate = len(NEGATIVE) / (ITEMS - 1)
            beta = rate * (0.75 * (1 - 1 / rate) + 1 / rate)
            loss = -beta * F.logsigmoid(score[own]) - sum(F.logsigmoid(-score[k]) for k in others)
        total = total + weight[n] * loss
    return total / N


@pytest.mark.parametrize("chunk_bytes", [4 * ITEMS * 16, 1 << 28])
@pytest.mark.parametrize("name", ["ce", "inbatch", "sampled", "bce", "gbce"])
def test_weighted_losses_and_their_gradients_equal_a_loop_in_float64(monkeypatch, name, chunk_bytes):
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(losses, "SHARED_CHUNK_BYTES", chunk_bytes)
    query, item, target, weight = random_inputs()
    assert weight.unique().tolist() == [0.0, 1.0, 2.5]
    query, item = query.clone().requires_grad_(), item.clone().requires_grad_()
    found = weighted_loss(name, query, item, target, weight)
    expected = slow_weighted_loss(name, query, item, target, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(3 * found, (query, item))
    theirs = torch.autograd.grad(3 * expected, (query, item))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not mine[0][weight == 0].any()  # what was only shown teaches nothing


@pytest.mark.parametrize("name", ["ce", "inbatch", "sampled", "bce", "gbce"])
def test_weights_of_one_are_no_weights(name):
    query, item, target, weight = random_inputs()
    plain = weighted_loss(name, query, item, target, None)
    assert float(weighted_loss(name, query, item, target, torch.ones_like(weight))) == pytest.approx(float(plain))


# Steps


def step_gradient(c: Components, spans: Spans) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step of the pieces and its gradient, over this process's micro-batches."""
    model = c.state.model
    model.zero_grad()
    batches = step_batches(c, spans, epoch=1, index=2)
    shares = step_shares(batches, spans, c.group, front=c.front)
    total = torch.zeros(())
    for batch, share in zip(batches, shares, strict=True):
        loss = share * loss_fn(model, batch, training=c.config.training, log_q_I=c.log_q_I)[0]
        loss.backward()
        total += loss.detach()
    return float(total), {
        name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()
    }


def check_same_step(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("attention", ["softmax", "hstu"])
def test_packed_and_padded_rows_give_the_same_step(name, attention):
    sequences = sequences_of(make_world(LENGTHS))
    options = {"model": {**EVERYTHING, "attention": attention}, "action_weights": WEIGHTS, **LOSSES[name]}
    spans = training_spans(sequences, max_len=MAX_LEN)
    found = [
        step_gradient(components(sequences, data={"layout": layout}, **options), spans)
        for layout in ("packed", "padded")
    ]
    check_same_step(*found)
    assert all(found[0][1][part].any() for part in ("front", "tower.table.weight", "condition.weight", "action.weight"))


@pytest.mark.parametrize("accumulate", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_nothing(name, accumulate):
    sequences = sequences_of(make_world(LENGTHS))
    options = {"model": EVERYTHING, "action_weights": WEIGHTS, **LOSSES[name]}
    spans = training_spans(sequences, max_len=MAX_LEN)
    parts = components(sequences, accumulate=accumulate, **options)
    assert len(step_batches(parts, spans, epoch=1, index=2)) == accumulate
    check_same_step(step_gradient(parts, spans), step_gradient(components(sequences, **options), spans))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_the_parts_of_several_processes_add_up_to_the_step_of_one(name, world_size):
    sequences = sequences_of(make_world(LENGTHS))
    c = components(sequences, model=EVERYTHING, accumulate=2, action_weights=WEIGHTS, **LOSSES[name])
    spans = training_spans(sequences, max_len=MAX_LEN)
    parts = [
        step_gradient(replace(c, group=Group(rank=rank, world=world_size, device=CPU)), spans)
        for rank in range(world_size)
    ]
    total = {key: torch.stack([part[1][key] for part in parts]).sum(0) for key in parts[0][1]}
    check_same_step((sum(part[0] for part in parts), total), step_gradient(c, spans))


# What the configuration and the data leave out

ALL_PARTS = {"tower", "front", "action", "moment", "next_action", "next_moment", "condition"}


def parts_of(model: SeqRec) -> set[str]:
    return {name for name in ALL_PARTS if getattr(model, name) is not None}


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({}, set()),
        ({"features": False}, {"tower", "front"}),
        ({"user_token": False}, {"front"}),
        ({"action_input": False}, {"action"}),
        ({"time_input": False}, {"moment"}),
        ({"next_action": False}, {"next_action"}),
        ({"query_time": False}, {"next_moment"}),
        ({"next_action": False, "query_time": False}, {"next_action", "next_moment", "condition"}),
    ],
)
def test_what_is_switched_off_is_left_out_and_the_rest_trains(options, absent):
    sequences = sequences_of(make_world(LENGTHS, own_share=0.0))
    c = components(sequences, model={**EVERYTHING, **options})
    assert parts_of(model_of(c)) == ALL_PARTS - absent
    assert (c.front, c.compact) == ("front" not in absent, "tower" not in absent)
    _, gradient = step_gradient(c, training_spans(sequences, max_len=MAX_LEN))
    for part in ALL_PARTS - absent:
        assert any(value.any() for name, value in gradient.items() if name.startswith(part)), part
    assert evaluate(c.state.model, sequences, "test", config=c.config, packed=True)["users"] == 7
    tokens = MAX_LEN + int(c.front)
    assert model_of(c).position is not None
    assert model_of(c).position.num_embeddings == tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("missing", "absent"),
    [
        ({"features": False}, {"tower", "front"}),
        ({"actions": False}, {"action", "next_action"}),
        ({"times": False}, {"moment", "next_moment"}),
        ({"features": False, "actions": False, "times": False}, ALL_PARTS),
    ],
)
def test_what_the_data_lacks_is_left_out(missing, absent):
    sequences = sequences_of(make_world(LENGTHS, own_share=0.0), **missing)
    c = components(sequences, model=EVERYTHING, action_weights=WEIGHTS)
    assert parts_of(model_of(c)) == ALL_PARTS - absent
    step_gradient(c, training_spans(sequences, max_len=MAX_LEN))
    metrics = evaluate(c.state.model, sequences, "test", config=c.config, packed=True)
    assert ("Score" in metrics) == ("Weighted score" in metrics) == ("actions" not in missing)


def test_only_the_families_asked_for_are_in_the_model():
    sequences = sequences_of(make_world(LENGTHS))
    c = components(sequences, model={"embeddings": ("81",)})
    names = [name for name, _ in c.state.model.named_parameters() if "project" in name]
    assert names == ["tower.project.81.weight"]
    with pytest.raises(ValueError, match="world has no embeddings of family 86; it has 81, 82"):
        components(sequences, model={"embeddings": ("81", "86")})


def test_until_it_is_trained_a_condition_changes_nothing():
    sequences = sequences_of(make_world(LENGTHS))
    c = build(configure(model={"dropout": 0.0, **EVERYTHING}), sequences)
    hidden = torch.randn(3, 16)
    condition = {"action_N": torch.tensor([1, 2, 3]), "asked_N": torch.arange(3), "pause_N": torch.arange(3)}
    assert torch.equal(model_of(c).query(hidden, **condition), hidden)


@pytest.mark.parametrize("wrong", [(1.0, 1.0), (1.0, 1.0, 1.0, 1.0), (1.0, -0.5, 1.0), ()])
def test_weights_that_fit_no_actions_are_named(wrong):
    with pytest.raises(ValueError, match=r"action_weights are .*--action-weights takes 3 numbers"):
        components(sequences_of(make_world(LENGTHS)), action_weights=wrong)


def test_the_contests_score_may_select_where_there_are_actions():
    world = make_world(LENGTHS)
    for select in ("Score", "Weighted score"):
        assert components(sequences_of(world), select=select).config.training.select == select
        with pytest.raises(ValueError, match=f'select is "{select}"'):
            components(sequences_of(world, actions=False), select=select)
    with pytest.raises(ValueError, match='select is "Score"'):
        components(sequences_of(world), select="Score", ks=(1, 5))


# Evaluation


def slow_ranks(c: Components, world: World, stage: Stage, *, filtered: bool) -> list[tuple[int, int]]:
    """Rank and action of every evaluated user's target, each item scored by itself."""
    model = model_of(c)
    asked_for = ("exposure", "click", "conversion").index(c.config.training.query_action)
    item = slow_candidates(model, world)
    found = []
    for user, history in enumerate(world.histories):
        if len(history) < 3:
            continue
        place = len(history) - (2 if stage == "valid" else 1)
        target = history[place]
        hidden = slow_hidden(model, world, user, max(0, place - MAX_LEN), place)[-1]
        query = slow_query(model, hidden, action=asked_for, asked=target.time, last=history[place - 1].time)
        score = (item @ query).tolist()
        seen = {event.item for event in history[:place]} if filtered else set()
        rivals = [score[k] for k in range(1, len(score)) if k != target.item and k not in seen]
        assert min(abs(value - score[target.item]) for value in rivals) > 1e-5, "too near to call"
        found.append((1 + sum(value >= score[target.item] for value in rivals), target.action))
    return found


def distinct_world(users: int = 25, *, num_items: int = 40) -> World:
    """Users who meet no item twice."""
    world = make_world([4 + user % 11 for user in range(users)], num_items=num_items)
    order = torch.stack([torch.randperm(num_items, generator=torch.Generator().manual_seed(u)) for u in range(users)])
    histories = [
        [event._replace(item=1 + int(order[user, n])) for n, event in enumerate(history)]
        for user, history in enumerate(world.histories)
    ]
    return world._replace(histories=histories)


def gain(rank: int) -> float:
    return 0.31 * (rank <= 10) + 0.69 * (1 / math.log2(1 + rank) if rank <= 10 else 0.0)


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "one family"])
def test_evaluation_equals_scoring_every_item_by_a_loop(model, filtered):
    world = distinct_world()
    protocol = "filtered" if filtered else "unfiltered"
    c = components(
        sequences_of(world), model=MODELS[model], protocol=protocol, ks=(1, 3, 10, 40), query_action="conversion"
    )
    stages: tuple[Stage, ...] = ("valid", "test")
    for stage in stages:
        found = evaluate(c.state.model, c.sequences, stage, config=c.config, packed=True)
        ranks = slow_ranks(c, world, stage, filtered=filtered)
        assert len({rank for rank, _ in ranks}) > 5
        for k in (1, 3, 10, 40):
            assert found[f"HR@{k}"] == pytest.approx(sum(rank <= k for rank, _ in ranks) / len(ranks))
            discounted = [1 / math.log2(1 + rank) for rank, _ in ranks if rank <= k]
            assert found[f"NDCG@{k}"] == pytest.approx(sum(discounted) / len(ranks))
        assert found["Score"] == pytest.approx(sum(gain(rank) for rank, _ in ranks) / len(ranks))
        weight = [(0.0, 1.0, 2.5)[action] for _, action in ranks]
        total = sum(w * gain(rank) for w, (rank, _) in zip(weight, ranks, strict=True))
        assert found["Weighted score"] == pytest.approx(total / sum(weight))
        assert found["users"] == 25
        padded = evaluate(c.state.model, c.sequences, stage, config=c.config, packed=False)
        assert padded == pytest.approx(found)


def test_targets_that_were_only_shown_weigh_nothing():
    world = distinct_world()
    shown = world._replace(histories=[[e._replace(action=0) for e in history] for history in world.histories])
    c = components(sequences_of(shown), protocol="unfiltered")
    found = evaluate(c.state.model, c.sequences, "test", config=c.config, packed=True)
    assert found["Score"] > 0
    assert found["Weighted score"] == 0.0


def test_baselines_have_the_contests_score_too():
    world = distinct_world()
    c = components(sequences_of(world), protocol="unfiltered")
    found = baselines(c.sequences, "test", config=c.config)["popularity"]
    counts = [0] * 41
    for history in world.histories:
        for event in history[:-2]:
            counts[event.item] += 1
    targets = [history[-1] for history in world.histories]
    ranks = [1 + sum(counts[k] >= counts[e.item] for k in range(1, 41) if k != e.item) for e in targets]
    assert found["Score"] == pytest.approx(sum(map(gain, ranks)) / 25)
    weight = [(0.0, 1.0, 2.5)[e.action] for e in targets]
    expected = sum(w * gain(rank) for w, rank in zip(weight, ranks, strict=True)) / sum(weight)
    assert found["Weighted score"] == pytest.approx(expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_scores_of_divided_users_are_those_of_one_process_to_the_last_bit(world_size, monkeypatch):
    monkeypatch.setattr(apps.seqrec.evaluate, "USERS_PER_CHUNK", 4)
    c = components(sequences_of(distinct_world()))
    whole = evaluate(c.state.model, c.sequences, "test", config=c.config, packed=True)
    parts = [
        evaluation_sums(
            c.state.model,
            c.sequences,
            "test",
            config=c.config,
            packed=True,
            group=Group(rank=rank, world=world_size, device=CPU),
        )
        for rank in range(world_size)
    ]
    total = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
    assert finish_scores(total) == whole


def test_held_out_users_and_times_are_evaluated_on_their_own_events():
    world = make_world([6] * 40, num_items=30)
    c = components(sequences_of(world), protocol="unfiltered")
    for split in (hold_out_users(c.sequences, share=0.5, seed=1), hold_out_time(c.sequences, share=0.4)):
        held = replace(c.sequences, held_out=split)
        stages: tuple[tuple[Stage, Tensor], ...] = (("valid", split.valid), ("test", split.test))
        for stage, event in stages:
            users = int((event >= 0).sum())
            assert users > 3
            assert evaluate(c.state.model, held, stage, config=c.config, packed=True)["users"] == users
            text = protocol_text(held, stage, c.config)
            assert text.startswith(f"{split.text}, {stage}, all {users} users, full ranking over 30 items")
            assert "leave-one-out" not in text


def test_the_protocol_says_what_queries_are_told():
    sequences = sequences_of(make_world(LENGTHS))
    told = protocol_text(sequences, "test", configure(query_action="conversion"))
    assert "asked for a conversion" in told
    assert "TOLD" not in told
    assert "TOLD THE TARGET'S OWN TIME" in protocol_text(sequences, "test", configure(model={"query_time": True}))
    plain = replace(sequences, action=None, time=None)
    text = protocol_text(plain, "test", configure(model={"query_time": True}))
    assert "asked for" not in text
    assert "TOLD" not in text


# Training


def circling_world(users: int = 50, *, num_items: int = 12) -> World:
    """Users who walk through the items in a circle; an item's features tell which one it is."""
    draw = random.Random(0)
    histories: list[list[Event]] = []
    for _ in range(users):
        begin, time = draw.randrange(num_items), 1_700_000_000
        history = []
        for n in range(draw.randint(6, 20)):
            time += draw.choice([10, 600, 90_000])
            own = {"112": 9} if draw.random() < 0.1 else None
            history.append(Event((begin + n) % num_items + 1, draw.randint(0, 2), time, own))
        histories.append(history)
    world = make_world([0] * users, num_items=num_items)
    items = [{"100": 1 + i % 3, "112": 1 + i // 3} for i in range(num_items)]
    return world._replace(items=items, histories=histories)


def train(
    config: Config, run_dir: Path, sequences: Sequences, *, resume: bool = False, stop_at: int = 0
) -> tuple[Outcome, Components]:
    """A run to its end, or until the signal that it sends itself in step `stop_at`."""
    c = build(config, sequences)
    found = newest_checkpoint(run_dir / "checkpoints", warn=print) if resume else None
    start = restore(c, *found) if found else None
    steps = 0

    def count(note: str | None) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            signal.raise_signal(signal.SIGTERM)

    step = start.state.step if start else None
    with (
        RunLog(run_dir, say=lambda line: None, resume_step=step) as log,
        StopSignal(say=lambda line: None) as stop,
    ):
        return fit(c, run_dir, log=log, stop=stop, start=start, on_step=count), c


@pytest.mark.parametrize("name", ["ce", "sampled", "inbatch", "gbce"])
def test_losses_learn_from_contest_data(name, tmp_path):
    options = {"epochs": 15, "eval_every": 100, "protocol": "unfiltered", "select": "Score", **LOSSES[name]}
    config = configure(model={"dropout": 0.0, **EVERYTHING}, action_weights=WEIGHTS, **options)
    outcome, _ = train(config, tmp_path, sequences_of(circling_world()))
    assert outcome.metrics is not None
    values = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert values[-1] < 0.6 * values[0]
    assert outcome.metrics["test"]["HR@5"] > 0.7
    assert outcome.metrics["test"]["Score"] > 0.6
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    assert line["Score"] == outcome.metrics["valid"]["Score"] == outcome.progress.best
    assert line["Weighted score"] == outcome.metrics["valid"]["Weighted score"]


def test_a_user_without_a_history_gets_what_users_of_the_same_profile_begin_with(tmp_path):
    draw = torch.Generator().manual_seed(2)
    world = make_world([0] * 64, num_items=20, seed=1)
    profiles = [{"103": 1 + user % 4} for user in range(64)]
    histories: list[list[Event]] = []
    for user in range(60):
        items = (5 * (user % 4) + 1 + torch.randint(0, 5, (6,), generator=draw)).tolist()
        histories.append([Event(item, 1, 1_700_000_000 + 60 * n, None) for n, item in enumerate(items)])
    world = world._replace(profiles=profiles, histories=[*histories, [], [], [], []])
    outcome, c = train(configure(epochs=10, eval_every=10), tmp_path, sequences_of(world))
    model = outcome.state.model
    chunks = list(predict(model, c.sequences, k=3, config=c.config, packed=True))
    users, recommended = (torch.cat(columns) for columns in list(zip(*chunks, strict=True))[:2])
    assert users.tolist() == list(range(64))
    for user in range(60, 64):
        assert set(((recommended[user] - 1) // 5).tolist()) == {user % 4}


VARIANTS: dict[str, dict[str, Any]] = {
    "everything, sampled": {"model": EVERYTHING, "loss": "sampled", "num_negatives": 6},
    "averaged, accumulated, bce": {"loss": "bce", "accumulate": 2, "ema_decay": 0.9, "action_weights": WEIGHTS},
    "hstu, muon, inbatch": {"model": {"attention": "hstu"}, "optimizer": "muon", "loss": "inbatch"},
    "random windows, ce": {"data": {"window": "random", "max_len": 6}, "model": EVERYTHING},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_an_epoch_ends_like_one_that_was_not(name, tmp_path):
    sequences = sequences_of(circling_world(60))
    if name.startswith("everything"):
        sequences = replace(sequences, held_out=hold_out_users(sequences, share=0.2, seed=0))
    options = {"epochs": 2, "save_every": 2, "norm_every": 2, "select": "Score", **VARIANTS[name]}
    whole, c = train(configure(**options), tmp_path / "whole", sequences)
    assert 5 % c.steps_per_epoch
    cut, _ = train(configure(**options), tmp_path / "cut", sequences, stop_at=5)
    assert cut.metrics is None
    assert cut.state.step == 5
    resumed, _ = train(configure(**options), tmp_path / "cut", sequences, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics is not None
    assert whole.metrics == resumed.metrics
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_averaged_weights_share_the_features_and_are_what_is_measured(tmp_path):
    outcome, c = train(configure(epochs=1, ema_decay=0.9), tmp_path, sequences_of(circling_world()))
    average, model = outcome.state.ema, outcome.state.model
    assert isinstance(average, SeqRec)
    assert average.tower is not None
    assert average.tower.features is model_of(c).tower.features  # type: ignore[union-attr]
    assert average.tower.features is c.sequences.features
    assert not torch.equal(average.tower.table.weight, model_of(c).tower.table.weight)  # type: ignore[union-attr]
    assert outcome.metrics is not None
    # fit left the best weights in the average
    assert evaluate(average, c.sequences, "test", config=c.config, packed=True) == outcome.metrics["test"]
    assert evaluate(model, c.sequences, "test", config=c.config, packed=True) != outcome.metrics["test"]


@pytest.mark.parametrize("name", ["ce", "bce", "sampled"])
def test_a_model_whose_scores_are_all_zero_is_stopped_and_said_to_be_dead(name, tmp_path, monkeypatch):
    c = build(configure(model={"dropout": 0.0}, log_every=2, **LOSSES[name]), sequences_of(circling_world()))
    model = model_of(c)
    assert model.tower is not None
    with torch.no_grad():  # neither side of the scores moves once both are zero
        for parameter in (model.item.weight, *model.tower.parameters(), *model.final_norm.parameters()):
            parameter.zero_()
    expected = {"ce": math.log(12), "bce": 2 * math.log(2)}.get(name)
    words = r"every score of the last 2 steps is 0.*" + ("" if expected is None else f"loss is {expected:.4f}")
    with (
        RunLog(tmp_path, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
        pytest.raises(DeadModelError, match=words),
    ):
        fit(c, tmp_path, log=log, stop=stop)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_model_that_wakes_up_is_not_dead(tmp_path):
    c = build(configure(model={"dropout": 0.0}, log_every=2, epochs=1), sequences_of(circling_world()))
    with torch.no_grad():  # items have no vectors yet, but hidden states have, so that the first step makes some
        model_of(c).item.weight.zero_()
        for parameter in model_of(c).tower.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    with RunLog(tmp_path, say=lambda line: None) as log, StopSignal(say=print) as stop:
        assert fit(c, tmp_path, log=log, stop=stop).metrics is not None


# Two processes

TWO: dict[str, Any] = {
    "model": {"dropout": 0.0, **EVERYTHING},
    "loss": "sampled",
    "num_negatives": 6,
    "epochs": 4,
    "log_every": 1,
    "ema_decay": 0.5,
    "select": "Score",
    "action_weights": WEIGHTS,
}


def two_sequences() -> Sequences:
    """65 users in steps of 16: the last step has one sequence, so that the second process has none."""
    return sequences_of(circling_world(65))


def test_two_processes_train_and_measure_features_like_one(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    outcome, c = train(configure(**TWO), tmp_path / "one", two_sequences())
    assert c.steps_per_epoch == 5
    one, two = (numbers(tmp_path / name) for name in ("one", "two"))
    assert [(line["kind"], line["step"]) for line in one] == [(line["kind"], line["step"]) for line in two]
    for mine, theirs in zip(two, one, strict=True):
        values = [{k: v for k, v in line.items() if isinstance(v, float)} for line in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-5), theirs["kind"]
    assert outcome.metrics is not None
    assert outcome.metrics["test"] == pytest.approx(torch.load(tmp_path / "metrics.pt", weights_only=True), abs=1e-9)
    twin = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in outcome.state.model.state_dict().items():
        if not name.endswith("qkv.bias"):  # a key's bias moves no output: nothing but rounding drives it
            torch.testing.assert_close(twin[name], value, rtol=0, atol=1e-3)


def train_in_a_group(folder: Path) -> None:
    group = distributed.join("cpu")
    assert group is not None
    torch.set_num_threads(1)
    c = build(configure(**TWO), two_sequences(), group=group)
    run_dir = folder / "two"
    with (
        SilentLog() if group.rank else RunLog(run_dir, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
    ):
        outcome = fit(c, run_dir, log=log, stop=stop)
    if group.rank == 0:
        assert outcome.metrics is not None
        torch.save(outcome.metrics["test"], folder / "metrics.pt")
        torch.save(outcome.state.model.state_dict(), folder / "weights.pt")
    distributed.leave(group)


if __name__ == "__main__":
    train_in_a_group(Path(sys.argv[1]))
