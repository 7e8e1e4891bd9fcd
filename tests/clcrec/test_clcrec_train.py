"""The training loop: it learns warm and cold items, splits without a difference, stops, saves and resumes exactly."""

import functools
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.clcrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.clcrec.dataset import Batch, ColdStart, Words, lists_of
from apps.clcrec.model import CLCRec
from apps.clcrec.train import (
    Components,
    Outcome,
    build,
    draw_pool,
    encoded_items,
    epoch_batches,
    fit,
    learning_rate_factor,
    loss_fn,
    replaced_times,
    restore,
    uses_matrix,
)
from shared.amp import NonFiniteError, amp_step
from shared.checkpoint import MismatchError, load_checkpoint, newest_checkpoint
from shared.log import RunLog, StopSignal, read_metrics

TOPICS = 4


def topical_data(num_users: int = 60, num_warm: int = 40, num_cold: int = 12, seed: int = 0) -> ColdStart:
    """Users who like the items of one topic each; content tells the topic of an item, but for some noise."""
    g = torch.Generator().manual_seed(seed)
    num_items = num_warm + num_cold
    topic_U, topic_I = torch.arange(num_users) % TOPICS, torch.arange(num_items) % TOPICS
    chosen = (topic_U[:, None] == topic_I) & (torch.rand(num_users, num_items, generator=g) < 0.8)
    user, item = chosen.nonzero(as_tuple=True)
    draw = torch.rand(user.numel(), generator=g)
    is_warm = item < num_warm
    stage = torch.where(is_warm, (draw > 0.7).long() + (draw > 0.85).long(), 1 + (draw > 0.5).long())
    stage[torch.cat([torch.ones(1, dtype=torch.bool), user.diff() > 0])] = 0  # everybody trains on an item (all warm)
    columns = [lists_of(user[stage == s], item[stage == s], num_users) for s in (1, 2)]
    one_hot = torch.nn.functional.one_hot(topic_I, TOPICS).float()
    content = {name: one_hot + 0.3 * torch.randn(num_items, TOPICS, generator=g) for name in "va"}
    return ColdStart(
        num_warm=num_warm,
        user=user[stage == 0].int(),
        item=item[stage == 0].int(),
        known=lists_of(user, item, num_users),
        valid=columns[0],
        test=columns[1],
        content=content,
        words=Words(torch.arange(num_items), topic_I, TOPICS),
        item_ids=tuple(str(num_users + i) for i in range(num_items)),
        user_ids=tuple(str(u) for u in range(num_users)),
        fingerprint="topical",
        name="topical",
    )


def configure(*, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any) -> Config:
    base = {"epochs": 3, "batch_size": 64, "lr": 0.01, "device": "cpu", "precision": "fp32", "log_every": 3}
    base |= {"num_negatives": 8, "temperature": 0.2, "reg_weight": 0.001, "ks": (5,), "select": "all/Recall@5"}
    return Config(
        data=replace(DataConfig(), **(data or {})),
        model=replace(ModelConfig(embed_dim=8, hidden_dim=16, word_dim=4), **(model or {})),
        training=replace(TrainConfig(), **{**base, **training}),
    )


def run(config: Config, run_dir: Path, data: ColdStart | None = None, *, resume: bool = False) -> Outcome:
    c = build(config, data or topical_data())
    found = newest_checkpoint(run_dir / "checkpoints", warn=print) if resume else None
    start = restore(c, *found) if found else None
    step = start.state.step if start else None
    with RunLog(run_dir, say=lambda line: None, resume_step=step) as log, StopSignal(say=print) as stop:
        return fit(c, run_dir, log=log, stop=stop, start=start)


def weights(outcome: Outcome) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in outcome.state.model.parameters()])


def pool_for(c: Components, epoch: int = 0) -> torch.Tensor | None:
    if c.config.training.negatives != "pool":
        return None
    return draw_pool(c, epoch, log=SilentLog(), on_rows=lambda done: None)  # type: ignore[arg-type]


class SilentLog:
    def info(self, line: str) -> None:
        pass


def first_batches(c: Components) -> list[Batch]:
    return next(epoch_batches(c, epoch=0, pool_PN=pool_for(c)))


def first_step(config: Config) -> tuple[float, torch.Tensor]:
    """Loss and weights after one step from the same start."""
    c = build(config, topical_data())
    batches = first_batches(c)
    sizes = [batch.user.numel() for batch in batches]
    loss_of = functools.partial(loss_fn, training=config.training, by_matrix=c.by_matrix, encodes_batch=c.encodes_batch)
    _, output = amp_step(c.state, batches, loss_of, amp=c.amp, shares=[n / sum(sizes) for n in sizes])
    return float(output.loss), torch.cat([p.detach().flatten() for p in c.state.model.parameters()])


MODES: dict[str, dict[str, Any]] = {
    "device": {"negatives": "device"},
    "pool": {"negatives": "pool", "resample_epochs": 2},
    "shared": {"negatives": "shared", "num_negatives": 16},
    "popularity": {"negatives": "device", "neg_power": 0.75},
    "popularity pool": {"negatives": "pool", "neg_power": 0.75, "resample_epochs": 0},
    "legacy replacement": {"replacement": "legacy"},
    "all positives excluded": {"neg_exclude": "all"},
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_ranks_warm_and_cold_items_of_the_users_topic_first(name, tmp_path):
    outcome = run(configure(epochs=25, eval_every=100, **MODES[name]), tmp_path)
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["cold/Recall@5"] > 0.9  # 3 of 12 cold items are of the topic
    assert outcome.metrics["test"]["warm/Recall@5"] > 0.6  # by chance 0.13
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]


def first_gradients(config: Config) -> list[torch.Tensor]:
    """The gradients of a whole step, by parameter."""
    c = build(config, topical_data())
    batches = first_batches(c)
    total = sum(batch.user.numel() for batch in batches)
    for batch in batches:
        loss, _ = loss_fn(
            c.state.model, batch, training=config.training, by_matrix=c.by_matrix, encodes_batch=c.encodes_batch
        )
        (loss * (batch.user.numel() / total)).backward()
    return [p.grad for p in c.state.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MODES)
def test_micro_batches_change_neither_loss_nor_gradients(name):
    options = {**MODES[name], "reg_weight": 0.1}
    whole, split = (first_step(configure(accumulate=n, **options))[0] for n in (1, 3))
    assert split == pytest.approx(whole, rel=1e-5)
    gradients = [first_gradients(configure(accumulate=n, **options)) for n in (1, 3)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["device", "shared"])
def test_ways_to_compute_give_the_same_loss(name):
    options: list[dict[str, Any]] = [
        {"scores": s, "content_input": i} for s in ("matrix", "gather") for i in ("warm", "batch")
    ]
    found = [first_step(configure(**MODES[name], **option))[0] for option in options]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_batches_hold_what_they_say():
    data = topical_data()
    trained = data.trained
    positives = [set(trained.item[a:b].tolist()) for a, b in zip(trained.ptr[:-1], trained.ptr[1:], strict=True)]
    for name in ("device", "pool", "popularity"):
        c = build(configure(**MODES[name]), data)
        seen = []
        for batches in epoch_batches(c, epoch=0, pool_PN=pool_for(c)):
            for batch in batches:
                for user, row in zip(batch.user.tolist(), batch.item.tolist(), strict=True):
                    assert row[0] in positives[user]
                    assert len(set(row)) == len(row)
                    assert not set(row[1:]) & positives[user]
                    assert max(row) < data.num_warm
                    seen.append((user, row[0]))
        assert sorted(seen) == sorted(zip(data.user.tolist(), data.item.tolist(), strict=True))


def test_shared_negatives_are_distinct_and_marked_where_they_are_positives():
    data = topical_data()
    trained = data.trained
    c = build(configure(**MODES["shared"]), data)
    batch = first_batches(c)[0]
    assert batch.shared is not None
    assert batch.excluded is not None
    assert batch.shared.unique().numel() == 16
    for user, row in zip(batch.user.tolist(), batch.excluded.tolist(), strict=True):
        mine = set(trained.item[trained.ptr[user] : trained.ptr[user + 1]].tolist())
        assert row == [item in mine for item in batch.shared.tolist()]
    second = list(epoch_batches(c, epoch=0))[1][0]
    assert second.shared is not None
    assert not torch.equal(second.shared, batch.shared)


def test_held_out_positives_can_be_drawn_unless_all_are_excluded():
    data = topical_data()
    held = {
        (u, int(i))
        for lists in (data.valid, data.test)
        for u in range(data.num_users)
        for i in lists.item[lists.ptr[u] : lists.ptr[u + 1]]
        if i < data.num_warm
    }

    def drawn(exclude: str) -> int:
        c = build(configure(neg_exclude=exclude, num_negatives=20), data)
        batches = [batch for part in epoch_batches(c, epoch=0) for batch in part]
        pairs = [pair for b in batches for pair in zip(b.user.tolist(), b.item.tolist(), strict=True)]
        return sum((user, item) in held for user, row in pairs for item in row[1:])

    assert drawn("train") > 0
    assert drawn("all") == 0


def test_a_pool_is_what_fresh_draws_of_its_epoch_are():
    data = topical_data()
    fresh = build(configure(), data)
    pool = build(configure(negatives="pool", resample_epochs=1), data)
    for epoch in (0, 3):
        pool_PN = pool_for(pool, epoch)
        for a, b in zip(
            epoch_batches(fresh, epoch=epoch), epoch_batches(pool, epoch=epoch, pool_PN=pool_PN), strict=True
        ):
            assert torch.equal(a[0].item, b[0].item)
            assert torch.equal(a[0].content_times, b[0].content_times)


@pytest.mark.parametrize(("resample", "drawn"), [(0, [1]), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (10, [1])])
def test_a_pool_is_drawn_when_resample_epochs_says_so(resample, drawn, tmp_path):
    config = configure(epochs=5, negatives="pool", resample_epochs=resample, eval_every=100)
    run(config, tmp_path)
    lines = [line for line in (tmp_path / "train.log").read_text().splitlines() if "pool of negatives" in line]
    assert [int(line.split("for epoch ")[1].split()[0]) for line in lines] == drawn
    pairs = topical_data().num_pairs
    assert f"{pairs:,} x 8 x 2 bytes" in lines[0]  # 52 items fit into 2 bytes


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again, other = (run(configure(seed=seed), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.metrics == again.metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "device": {},
    "device, drawn far ahead": {"batch_size": 16},
    "pool of several epochs": {"negatives": "pool", "resample_epochs": 3},
    "pool of one epoch": {"negatives": "pool", "resample_epochs": 1},
    "shared, average": {"negatives": "shared", "num_negatives": 10, "ema_decay": 0.9},
    "adamw, step schedule": {"optimizer": "adamw", "lr_scheduler": "step", "lr_step_epochs": 1, "warmup_steps": 2},
    "popularity, legacy, accumulated": {"neg_power": 0.5, "replacement": "legacy", "accumulate": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_like_one_that_was_not(name, tmp_path):
    options = {"epochs": 2, "save_every": 3, "norm_every": 2, **VARIANTS[name]}
    whole = run(configure(**options), tmp_path / "whole")
    config = configure(**options)
    c = build(config, topical_data())
    cut_at = c.steps_per_epoch + 2
    steps = 0

    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:

        def count(note: str | None) -> None:
            nonlocal steps
            steps += 1
            if steps == cut_at:
                signal.raise_signal(signal.SIGTERM)

        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_step=count)
        assert stop.exit_code == 143
    assert cut.metrics is None
    assert cut.state.step == cut_at
    resumed = run(config, tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert whole.progress == resumed.progress
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time") and not k.endswith("_per_s")} for line in lines]


def test_a_signal_during_validation_saves_and_resumes_with_the_validation(tmp_path):
    whole = run(configure(epochs=2), tmp_path / "whole")
    c = build(configure(epochs=2), topical_data())
    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:
        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_users=lambda done: signal.raise_signal(signal.SIGINT))
        assert stop.exit_code == 130
    assert cut.metrics is None
    resumed = run(configure(epochs=2), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_early_stopping_and_the_best_checkpoint_follow_validation(tmp_path):
    outcome = run(configure(epochs=60, patience=2, lr=0.05), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    values = [line["all/Recall@5"] for line in lines]
    best = values.index(max(values))
    assert len(values) == best + 3 < 60
    assert outcome.progress.best_epoch == lines[best]["epoch"]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.safetensors")["progress"]["best"] == max(values)
    assert outcome.metrics is not None
    assert outcome.metrics["valid"]["all/Recall@5"] == max(values)


def test_checkpoints_hold_no_content(tmp_path):
    run(configure(epochs=1), tmp_path)
    tree = load_checkpoint(tmp_path / "checkpoints" / "best.safetensors")
    names = {"user", "item", "word", "hidden.weight", "hidden.bias", "output.weight", "output.bias"}
    assert set(tree["model"]) == names


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 0.02}, "config.training.lr: 0.01 in the checkpoint, 0.02 now"),
        ({"model": {"embed_dim": 4}}, "config.model.embed_dim"),
        ({"data": {"has_v": True}}, "config.data.has_v"),
        ({"negatives": "pool"}, "config.training.negatives"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_differing_key(change, key, tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=key):
        run(configure(epochs=1, **change), tmp_path, resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=r"data\.fingerprint"):
        run(configure(epochs=1), tmp_path, replace(topical_data(), fingerprint="other"), resume=True)


def test_what_changes_no_weight_may_differ_on_resume(tmp_path):
    run(configure(epochs=1), tmp_path)
    run(configure(epochs=1, log_every=7, keep=5, memory_mib=1, num_workers=4), tmp_path, resume=True)


def test_a_run_cut_by_max_steps_goes_on_like_one_that_was_not(tmp_path):
    options: dict[str, Any] = {"epochs": 4, "patience": 1, "eval_every": 2}
    whole = run(configure(**options), tmp_path / "whole")
    cut = run(configure(**options, max_steps=6), tmp_path / "cut")
    assert cut.state.step == 6
    resumed = run(configure(**options), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    c = build(configure(epochs=3), topical_data())
    done = 0

    def poison(note: str | None) -> None:
        nonlocal done
        done += 1
        if done == c.steps_per_epoch + 1:
            with torch.no_grad():
                next(c.state.model.parameters()).fill_(float("nan"))

    with (
        RunLog(tmp_path, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
        pytest.raises(
            NonFiniteError, match=rf"since step {c.steps_per_epoch + 2}; the last good checkpoint is .*step-"
        ),
    ):
        fit(c, tmp_path, log=log, stop=stop, on_step=poison)
    found = newest_checkpoint(tmp_path / "checkpoints", warn=print)
    assert found is not None
    assert all(torch.isfinite(value).all() for value in found[1]["model"].values())


def test_metrics_lines_are_json_with_finite_values_or_null(tmp_path):
    run(configure(epochs=1, norm_every=1), tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = {json.loads(line, parse_constant=lambda name: pytest.fail(name))["kind"] for line in lines}
    assert kinds == {"train", "norm", "valid"}


def test_the_logged_loss_is_made_of_its_parts(tmp_path):
    run(configure(epochs=1, reg_weight=0.0, lr_lambda=0.25), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    for line in lines:
        assert line["loss"] == pytest.approx(0.25 * line["contrast"] + 0.75 * line["preference"], rel=1e-5)


def test_the_learning_rate_is_a_function_of_the_step():
    c = build(configure(epochs=4, lr_scheduler="cosine", warmup_steps=4, min_lr=0.1), topical_data())
    factors = [learning_rate_factor(c, step) for step in range(4 * c.steps_per_epoch + 1)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)


def test_bernoulli_replaces_the_share_asked_for_and_legacy_what_repeats_leave():
    count = 200_000
    g = torch.Generator().manual_seed(0)
    bernoulli = replaced_times(TrainConfig(num_sample=0.5), count, g)
    legacy = replaced_times(TrainConfig(num_sample=0.5, replacement="legacy"), count, g)
    assert set(bernoulli.unique().tolist()) == {0, 1}
    assert float((bernoulli > 0).double().mean()) == pytest.approx(0.5, abs=0.006)
    assert int(legacy.long().sum()) == count // 2
    assert float((legacy > 0).double().mean()) == pytest.approx(0.3935, abs=0.006)  # 1 - exp(-0.5)


def test_the_cheaper_form_is_chosen_by_the_number_of_candidates():
    auto = TrainConfig(num_negatives=128)
    assert uses_matrix(auto, 5_119)
    assert not uses_matrix(auto, 1_000_000)
    assert uses_matrix(replace(auto, scores="matrix"), 1_000_000)
    assert encoded_items(auto, 256, 5_119) == (5_119, False)
    candidates, by_batch = encoded_items(auto, 256, 1_000_000)
    assert by_batch
    assert candidates == pytest.approx(33_024, rel=0.03)


def test_modalities_are_selected_and_a_missing_one_is_named():
    data = topical_data()
    assert build(configure(), data).modalities == ("v", "a", "t")
    c = build(configure(data={"has_a": True}), data)
    assert c.modalities == ("a",)
    assert isinstance(c.state.model, CLCRec)
    assert c.state.model.hidden.in_features == TOPICS  # and no word vectors
    without = replace(data, content={"a": data.content["a"]}, words=None)
    with pytest.raises(ValueError, match=r"topical has no feat_v and no feat_t, but --has-v --has-t asks for it"):
        build(configure(data={"has_v": True, "has_t": True}), without)
    with pytest.raises(ValueError, match="has no content"):
        build(configure(), replace(without, content={}))


def test_more_negatives_than_some_user_has_candidates_are_refused():
    with pytest.raises(ValueError, match=r"60 of 60|60 users"):
        build(configure(num_negatives=40), topical_data())
    with pytest.raises(ValueError, match="40 warm items"):
        build(configure(negatives="shared", num_negatives=41), topical_data())


def test_what_shared_negatives_cannot_do_is_refused():
    for option in ({"neg_power": 0.5}, {"replacement": "legacy"}):
        with pytest.raises(ValueError, match="negatives of each pair's own; use it with --negatives device or pool"):
            build(configure(negatives="shared", **option), topical_data())


def test_impossible_cut_offs_and_missing_held_out_pairs_are_named():
    data = topical_data()
    with pytest.raises(ValueError, match=r"ks are \[0, 5\]; --ks needs"):
        build(configure(ks=(0, 5)), data)
    empty = lists_of(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), data.num_users)
    with pytest.raises(ValueError, match="no validation positives"):
        build(configure(), replace(data, valid=empty))
    with pytest.raises(ValueError, match="no test positives"):
        build(configure(), replace(data, test=empty))


def test_the_average_shares_the_content():
    c = build(configure(ema_decay=0.9), topical_data())
    assert isinstance(c.state.model, CLCRec)
    assert isinstance(c.state.ema, CLCRec)
    assert c.state.ema.content is c.state.model.content
    assert c.state.ema.item is not c.state.model.item


def test_deterministic_runs_write_the_same_lines(tmp_path):
    try:
        for name in ("one", "two"):
            run(configure(deterministic=True, cudnn_benchmark=False), tmp_path / name)
        assert numbers(tmp_path / "one") == numbers(tmp_path / "two")
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unknown_selection_metric_is_named():
    with pytest.raises(ValueError, match=r'select is "Recall@7".*cold/NDCG@5'):
        build(configure(select="Recall@7"), topical_data())


def test_compile_that_fails_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    said: list[str] = []

    def broken(self, *args: object, **kwargs: object) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no compiler here")

        self._compiled_call_impl = fail

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    c = build(configure(epochs=1, compile="max-autotune"), topical_data())
    with RunLog(tmp_path, say=said.append) as log, StopSignal(say=print) as stop:
        assert fit(c, tmp_path, log=log, stop=stop).metrics is not None
    assert [line for line in said if "no compiler here" in line] == [
        "warning: --compile has no effect here, training goes on without it: no compiler here"
    ]


def test_deterministic_kernels_are_asked_for_and_only_then(monkeypatch):
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    build(configure(deterministic=True), topical_data())
    build(configure(), topical_data())
    assert asked == [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["device", "pool", "shared"])
def test_a_run_on_cuda_learns(name, precision, tmp_path):
    outcome = run(configure(epochs=25, device="cuda", precision=precision, **MODES[name]), tmp_path)
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["cold/Recall@5"] > 0.8
