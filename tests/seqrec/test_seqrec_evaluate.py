"""Metrics, baselines and predictions against loops over users, Python lists and scores one user at a time."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from apps.seqrec import evaluate as module
from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.dataset import Sequences, Stage, query_spans
from apps.seqrec.evaluate import baselines, evaluate, predict, protocol_text, sampled_negatives
from apps.seqrec.model import SeqRec

KS = (1, 3, 10, 40)
HELD_OUT: dict[Stage, int] = {"valid": 2, "test": 1}
STAGES = tuple(HELD_OUT)
PROTOCOLS = ("filtered", "unfiltered", "sampled")
LENGTHS = [1, 2, 3, 4, 9, 17, 3, 40, 25, 6, 2, 33, 12, 5, 8]
MAX_LEN = 6
SAME_BELOW = 2e-6  # scores of one item differ by less when they are computed in another order; those of two by more


def make_sequences(histories: list[list[int]], num_items: int) -> Sequences:
    items = [item for history in histories for item in history]
    generator = torch.Generator().manual_seed(8)
    return Sequences(
        ptr=torch.tensor([0, *torch.tensor([len(history) for history in histories]).cumsum(0).tolist()]),
        item=torch.tensor(items, dtype=torch.int32),
        time=torch.randint(0, 50_000, (len(items),), generator=generator).cumsum(0),
        item_ids=tuple(f"i{i}" for i in range(1, num_items + 1)),
        user_ids=tuple(f"u{u}" for u in range(len(histories))),
        fingerprint="test",
        name="test",
    )


@cache
def random_histories(num_items: int = 45, seed: int = 0) -> list[list[int]]:
    """Users who meet items again and again, so that many a target is in its own history."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(1, num_items + 1, (length,), generator=generator).tolist() for length in LENGTHS]
    draws[4][-1], draws[7][-2], draws[8][-1] = draws[4][0], draws[7][0], draws[8][1]  # long before the window
    return draws


def configure(*, model: dict[str, Any] | None = None, **training: Any) -> Config:
    return Config(
        data=DataConfig(max_len=MAX_LEN),
        model=replace(ModelConfig(embed_dim=16, num_heads=2, ffn_mult=2), **(model or {})),
        training=replace(TrainConfig(ks=KS, seed=5), **training),
    )


def make_model(config: Config, num_items: int = 45, *, seed: int = 0) -> SeqRec:
    """A model with some items that have the very same vector, and so the very same score."""
    torch.manual_seed(seed)
    model = SeqRec(config.model, num_items=num_items, max_len=MAX_LEN)
    with torch.no_grad():
        model.item.weight.mul_(3.0)
        for copy, original in ((2, 1), (3, 1), (20, 30), (21, 30), (11, 44), (45, 44)):
            model.item.weight[copy] = model.item.weight[original]
    return model


def scores_after(model: SeqRec, sequences: Sequences, user: int, length: int) -> list[float]:
    """The score of every item after the first `length` events of one user alone; padding gets -inf."""
    first = int(sequences.ptr[user])
    end = first + length
    begin = max(first, end - MAX_LEN)
    assert sequences.time is not None
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model(
            sequences.item[None, begin:end].long(),
            torch.ones(1, end - begin, dtype=torch.int64),
            torch.arange(end - begin - 1, -1, -1)[None],
            sequences.time[None, begin:end],
            packed=False,
        )
        state = model.query(hidden)[0, -1]
        scores = [float((state * vector).sum()) for vector in model.candidates()]
    model.train(was_training)
    return [-math.inf, *scores[1:]]


def rank(scores: list[float], target: int, rivals: list[int]) -> int:
    """1 + the rivals other than the target that are not below it."""
    others = [scores[item] for item in rivals if item != target]
    gaps = [abs(score - scores[target]) for score in others if score != scores[target]]
    assert min(gaps, default=1.0) > SAME_BELOW, "two scores are too near to call; choose another seed"
    return 1 + sum(score >= scores[target] for score in others)


def rivals_of(protocol: str, seen: list[int], num_items: int, sampled: list[int]) -> list[int]:
    if protocol == "sampled":
        return sampled
    return [item for item in range(1, num_items + 1) if protocol == "unfiltered" or item not in seen]


def slow_ranks(
    sequences: Sequences,
    stage: Stage,
    protocol: str,
    scores_of: Callable[[int, list[int]], list[float]],
    *,
    filter_last: int | None = None,
) -> list[int]:
    """The rank of every evaluated user's target, by `scores_of`(user, history); history filtered from its start on."""
    spans = query_spans(sequences, stage, max_len=MAX_LEN)
    sampled = sampled_negatives(sequences, stage, spans, seed=5).tolist() if protocol == "sampled" else []
    ranks: list[int] = []
    for user, whole in enumerate(histories_of(sequences)):
        if len(whole) < 3:
            continue
        history, target = whole[: -HELD_OUT[stage]], whole[-HELD_OUT[stage]]
        seen = history if filter_last is None else history[-filter_last:]
        negatives = sampled[len(ranks)] if sampled else []
        if protocol == "filtered" and target in seen:
            ranks.append(10**9)
            continue
        rivals = rivals_of(protocol, seen, sequences.num_items, negatives)
        ranks.append(rank(scores_of(user, history), target, rivals))
    return ranks


def histories_of(sequences: Sequences) -> list[list[int]]:
    items = sequences.item.tolist()
    return [items[a:b] for a, b in pairwise(sequences.ptr.tolist())]


def model_scores(model: SeqRec, sequences: Sequences) -> Callable[[int, list[int]], list[float]]:
    return lambda user, history: scores_after(model, sequences, user, len(history))


def metrics_of(ranks: list[int], ks: tuple[int, ...] = KS) -> dict[str, float]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(ranks)

    found: dict[str, float] = {"users": len(ranks)}
    for k in ks:
        hits = [float(r <= k) for r in ranks]
        found[f"HR@{k}"] = found[f"Recall@{k}"] = mean(hits)
        found[f"Precision@{k}"] = mean(hits) / k
        found[f"NDCG@{k}"] = mean([hit / math.log2(1 + r) for hit, r in zip(hits, ranks, strict=True)])
        found[f"MRR@{k}"] = mean([hit / r for hit, r in zip(hits, ranks, strict=True)])
    return found


def approximately(metrics: dict[str, float]) -> Any:
    return pytest.approx(metrics, rel=1e-9, abs=1e-10)


# Metrics of a model


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_metrics_equal_a_loop_over_users_under_every_protocol(stage, protocol, score):
    sequences, config = make_sequences(random_histories(), 45), configure(protocol=protocol, model={"score": score})
    model = make_model(config)
    found = evaluate(model, sequences, stage, config=config, packed=True)
    ranks = slow_ranks(sequences, stage, protocol, model_scores(model, sequences))
    assert found == approximately(metrics_of(ranks))
    assert 1 < len(set(ranks)) < 45


@pytest.mark.parametrize("stage", STAGES)
def test_the_protocol_may_be_given_beside_the_configuration(stage):
    sequences, config = make_sequences(random_histories(), 45), configure(protocol="filtered")
    model = make_model(config)
    found = [evaluate(model, sequences, stage, config=config, packed=True, protocol=name) for name in PROTOCOLS]
    expected = [evaluate(model, sequences, stage, config=configure(protocol=name), packed=True) for name in PROTOCOLS]
    assert found == expected
    assert found[0] != found[1]
    assert found[1] != found[2]


def test_the_whole_history_is_filtered_and_not_only_what_the_model_sees():
    sequences, config = make_sequences(random_histories(), 45), configure()
    model = make_model(config)
    ranks = slow_ranks(sequences, "test", "filtered", model_scores(model, sequences))
    of_window = slow_ranks(sequences, "test", "filtered", model_scores(model, sequences), filter_last=MAX_LEN)
    assert sum(a < b for a, b in zip(ranks, of_window, strict=True)) >= 3
    assert metrics_of(ranks) != metrics_of(of_window)
    assert evaluate(model, sequences, "test", config=config, packed=True) == approximately(metrics_of(ranks))


def test_a_target_that_the_history_already_holds_is_missed_because_it_would_never_be_recommended():
    # everybody ends with the item they began with; without a history to filter it would come first
    config = configure(model={"num_blocks": 0, "position": "none"})
    sequences = make_sequences([[7, 1 + u, 9 + u, 7] for u in range(6)], 45)
    model = make_model(config)
    with torch.no_grad():
        model.item.weight.copy_(torch.ones(46, 1) * torch.randn(16)).mul_(torch.arange(46)[:, None] == 7)
    found = evaluate(model, sequences, "test", config=config, packed=True)
    assert found == approximately(metrics_of([10**9] * 6))
    others = baselines(sequences, "test", config=config)
    assert [row["HR@40"] for row in others.values()] == [0, 0, 0]


def test_a_model_that_gives_every_item_the_same_score_finds_nothing():
    sequences, config = make_sequences(random_histories(), 45), configure(protocol="unfiltered")
    model = make_model(config)
    with torch.no_grad():
        model.item.weight.fill_(0.25)
    found = evaluate(model, sequences, "test", config=config, packed=True)
    assert found == approximately(metrics_of([45] * int(found["users"])))
    assert found["HR@40"] == 0


def test_users_with_fewer_than_three_events_are_never_evaluated():
    short, long = [[1], [2, 3], [44, 45], [9]], [[4, 5, 6], [7, 8, 9, 10]]
    mixed = make_sequences([short[0], long[0], short[1], short[2], long[1], short[3]], 45)
    alone = replace(make_sequences(long, 45), time=torch.cat([mixed.time[1:4], mixed.time[8:12]]))  # type: ignore[index]
    config = configure(protocol="unfiltered")
    model = make_model(config)
    for stage in STAGES:
        found = evaluate(model, mixed, stage, config=config, packed=True)
        assert found["users"] == 2
        assert found == evaluate(model, alone, stage, config=config, packed=True)
        assert {m["users"] for m in baselines(mixed, stage, config=config).values()} == {2}


@pytest.mark.parametrize("stage", STAGES)
def test_data_without_anyone_to_evaluate_is_named(stage):
    sequences, config = make_sequences([[1, 2], [2, 3], [4]], 45), configure()
    with pytest.raises(ValueError, match="test: no user has the 3 events it takes"):
        evaluate(make_model(config), sequences, stage, config=config, packed=True)
    with pytest.raises(ValueError, match="test: no user has the 3 events it takes"):
        baselines(sequences, stage, config=config)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_the_number_of_users_in_a_chunk_changes_nothing(monkeypatch, protocol, chunk):
    sequences, config = make_sequences(random_histories(), 45), configure(protocol=protocol)
    model = make_model(config)
    whole = evaluate(model, sequences, "test", config=config, packed=True)
    reported: list[int] = []
    monkeypatch.setattr(module, "USERS_PER_CHUNK", chunk)
    assert evaluate(model, sequences, "test", config=config, packed=True, on_users=reported.append) == whole
    users = int(whole["users"])
    assert reported == [*range(chunk, users, chunk), users]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_memory_for_a_chunk_of_scores_changes_nothing(protocol):
    num_items = 5000  # 1 MiB holds the scores of 13 users, so that items are cut as well
    histories = [[1 + (731 * (u + 1) * i) % num_items for i in range(1, 9)] for u in range(20)]
    sequences = make_sequences(histories, num_items)
    ks = (1, 10, 100, 1000, 5000)
    small, large = (configure(protocol=protocol, memory_mib=mib, ks=ks) for mib in (1, 512))
    model = make_model(small, num_items)
    ranks = slow_ranks(sequences, "test", protocol, model_scores(model, sequences))
    for config in (small, large):
        assert evaluate(model, sequences, "test", config=config, packed=True) == approximately(metrics_of(ranks, ks))
    assert baselines(sequences, "test", config=small) == baselines(sequences, "test", config=large)
    found = [
        torch.cat([items for _, items, _ in predict(model, sequences, k=5, config=c, packed=True)])
        for c in (small, large)
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("attention", ["softmax", "hstu"])
def test_packed_and_padded_rows_give_the_same_metrics(protocol, attention):
    config = configure(protocol=protocol, model={"attention": attention})
    sequences, model = make_sequences(random_histories(), 45), make_model(config)
    packed, padded = (evaluate(model, sequences, "test", config=config, packed=packed) for packed in (True, False))
    assert packed == padded


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_and_prediction_leave_the_model_in_its_mode_and_without_gradients(training):
    config = configure(model={"dropout": 0.5})
    sequences, model = make_sequences(random_histories(), 45), make_model(config).train(training)
    first = evaluate(model, sequences, "test", config=config, packed=True)
    assert model.training is training
    assert all(part.training is training for part in model.modules())
    assert evaluate(model, sequences, "test", config=config, packed=True) == first  # no dropout
    for _, _, score in predict(model, sequences, k=3, config=config, packed=True):
        assert not score.requires_grad
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_cut_short_leaves_the_model_in_its_mode():
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    config = configure()
    sequences, model = make_sequences(random_histories(), 45), make_model(config).train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, sequences, "test", config=config, packed=True, on_users=interrupt)
    assert model.training


# Sampled negatives


@pytest.mark.parametrize("stage", STAGES)
def test_sampled_negatives_are_a_hundred_items_the_user_never_met(stage):
    sequences = make_sequences(random_histories(), 45)
    spans = query_spans(sequences, stage, max_len=MAX_LEN)
    negatives = sampled_negatives(sequences, stage, spans, seed=5)
    assert negatives.shape == (spans.user.numel(), 100)
    for user, drawn in zip(spans.user.tolist(), negatives.tolist(), strict=True):
        unmet = set(range(1, 46)) - set(histories_of(sequences)[user])
        assert set(drawn) <= unmet
        assert len(set(drawn)) > 0.7 * len(unmet)
    assert torch.equal(negatives, sampled_negatives(sequences, stage, spans, seed=5))
    assert not torch.equal(negatives, sampled_negatives(sequences, stage, spans, seed=6))


# Baselines


def slow_baselines(sequences: Sequences) -> dict[str, Callable[[int, list[int]], list[float]]]:
    """Scores of every item (padding first) by (user, history), from the training events alone."""
    train = [whole[:-2] if len(whole) >= 3 else whole for whole in histories_of(sequences)]
    count = Counter(item for events in train for item in events)
    followed = Counter(pair for events in train for pair in pairwise(events))
    largest = max(count.values())
    items = range(sequences.num_items + 1)

    def most_recent(user: int, history: list[int]) -> list[float]:
        return [1.0 + max(i for i, x in enumerate(history) if x == item) if item in history else 0.0 for item in items]

    def successor(user: int, history: list[int]) -> list[float]:
        return [followed[history[-1], item] + count[item] / (largest + 1) for item in items]

    return {
        "popularity": lambda user, history: [float(count[item]) for item in items],
        "most recent": most_recent,
        "successor": successor,
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_baselines_equal_a_loop_over_users_under_every_protocol(stage, protocol):
    # walks with noise: successors repeat, users come back to items
    histories = [
        [(item // 2 if i % 3 else item) % 25 + 1 for i, item in enumerate(history)] for history in random_histories()
    ]
    sequences = make_sequences(histories, 30)  # items 26 to 30 are never met
    found = baselines(sequences, stage, config=configure(protocol=protocol))
    slow = slow_baselines(sequences)
    assert list(found) == list(slow)
    for name, scores_of in slow.items():
        ranks = slow_ranks(sequences, stage, protocol, scores_of)
        assert found[name] == approximately(metrics_of(ranks)), name
    assert found["successor"] != found["popularity"]
    assert found["most recent"] != found["popularity"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("protocol", ["filtered", "unfiltered"])
def test_baselines_know_nothing_of_the_held_out_events(stage, protocol):
    # everybody ends 40, 41: by far the most popular items and successors, were the held-out events counted
    histories = [[1 + (7 * u + i) % 35 for i in range(5 + u % 4)] + [40, 41] for u in range(30)]
    sequences = make_sequences(histories, 45)
    found = baselines(sequences, stage, config=configure(protocol=protocol, ks=(1, 20)))
    assert {name: metrics["HR@20"] for name, metrics in found.items()} == dict.fromkeys(found, 0.0)


def test_events_of_users_too_short_to_be_evaluated_count_as_training():
    histories = [[1, 2, 3, 9, 9], *[[1, 9]] * 3]
    sequences = make_sequences(histories, 45)
    found = baselines(sequences, "test", config=configure(protocol="unfiltered"))
    assert found["popularity"]["HR@3"] == 1.0  # 9 occurs three times, 1 four times
    assert found["popularity"]["HR@1"] == 0.0


def test_a_user_who_met_every_item_has_the_same_sampled_rivals_for_model_and_baselines():
    # the draw can only repeat the last item, which is this user's target: no other item competes
    sequences = make_sequences([[*range(1, 46), 45, 44, 45], [5, 6, 45, 7]], 45)
    config = configure(protocol="sampled")
    model = make_model(config)
    expected = metrics_of(slow_ranks(sequences, "test", "sampled", model_scores(model, sequences)))
    assert evaluate(model, sequences, "test", config=config, packed=True) == approximately(expected)
    for name, scores_of in slow_baselines(sequences).items():
        ranks = slow_ranks(sequences, "test", "sampled", scores_of)
        assert baselines(sequences, "test", config=config)[name] == approximately(metrics_of(ranks)), name


# Prediction


def slow_predictions(
    model: SeqRec, sequences: Sequences, k: int, *, keep_seen: bool
) -> dict[int, list[tuple[int, float]]]:
    found = {}
    for user, history in enumerate(histories_of(sequences)):
        if not history:
            continue
        scores = scores_after(model, sequences, user, len(history))
        items = [item for item in range(1, sequences.num_items + 1) if keep_seen or item not in history]
        gaps = [b - a for a, b in pairwise(sorted(scores[item] for item in items)) if b != a]
        assert min(gaps, default=1.0) > SAME_BELOW, "two scores are too near to call; choose another seed"
        best = sorted(items, key=lambda item: (-scores[item], item))[:k]
        found[user] = [(item, scores[item]) for item in best]
    return found


@pytest.mark.parametrize("keep_seen", [False, True])
@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("packed", [True, False])
def test_predictions_are_the_best_items_after_the_whole_history(keep_seen, k, packed, monkeypatch):
    monkeypatch.setattr(module, "USERS_PER_CHUNK", 4)
    sequences, config = make_sequences([*random_histories(), []], 45), configure()
    model = make_model(config, seed=3)
    reported: list[int] = []
    chunks = list(
        predict(
            model,
            sequences,
            k=k,
            config=config,
            packed=packed,
            keep_seen=keep_seen,
            on_users=reported.append,
        )
    )
    expected = slow_predictions(model, sequences, k, keep_seen=keep_seen)
    users = [user for chunk, _, _ in chunks for user in chunk.tolist()]
    items = [row for _, chunk, _ in chunks for row in chunk.tolist()]
    scores = [row for _, _, chunk in chunks for row in chunk.tolist()]
    assert users == list(expected) == list(range(len(LENGTHS)))  # everybody with any event
    assert reported == [4, 8, 12, 15]
    for user, row, values in zip(users, items, scores, strict=True):
        best = expected[user]
        assert row == [item for item, _ in best] + [-1] * (k - len(best))
        assert values[: len(best)] == pytest.approx([score for _, score in best], abs=1e-5)
        assert values[len(best) :] == [-math.inf] * (k - len(best))
        if not keep_seen:
            assert not set(row) & set(histories_of(sequences)[user])


# What a number means


def test_the_protocol_text_says_how_the_number_was_made():
    sequences = make_sequences([*random_histories(), [1], [2]], 45)
    users = sum(length >= 3 for length in LENGTHS)
    texts = {
        (stage, protocol): protocol_text(sequences, stage, configure(protocol=protocol))
        for stage in STAGES
        for protocol in PROTOCOLS
    }
    for (stage, _), text in texts.items():
        for words in ("leave-one-out", f"{stage} (", f"all {users} users", "ties against the model"):
            assert words in text
    assert "(last event)" in texts["test", "filtered"]
    assert "(second to last event)" in texts["valid", "filtered"]
    assert "full ranking over 45 items, history filtered (a target in it is missed)" in texts["test", "filtered"]
    assert "full ranking over 45 items, history not filtered" in texts["test", "unfiltered"]
    assert "100 sampled unseen items: not comparable with a full ranking" in texts["test", "sampled"]
    assert "full ranking over" not in texts["test", "sampled"]
