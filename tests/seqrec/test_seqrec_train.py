"""The training loop: it learns, it is split and laid out without a difference, it stops, saves and resumes exactly."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.dataset import Sequences, training_spans
from apps.seqrec.train import Components, Outcome, build, fit, learning_rate_factor, loss_fn, restore, step_batches
from shared.amp import amp_step
from shared.checkpoint import MismatchError, load_checkpoint, newest_checkpoint
from shared.log import RunLog, StopSignal, read_metrics


def cycling_sequences(num_users: int = 60, num_items: int = 12, seed: int = 0) -> Sequences:
    """Users who walk through the items in a circle from a random start: the next item follows from the last one."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 24, (num_users,), generator=generator)
    starts = torch.randint(0, num_items, (num_users,), generator=generator)
    items = [(torch.arange(int(n)) + s) % num_items + 1 for n, s in zip(lengths, starts, strict=True)]
    return Sequences(
        ptr=torch.tensor([0, *lengths.cumsum(0).tolist()]),
        item=torch.cat(items).int(),
        time=None,
        item_ids=tuple(str(i) for i in range(1, num_items + 1)),
        user_ids=tuple(str(u) for u in range(num_users)),
        fingerprint="cycling",
        name="cycling",
    )


def configure(*, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any) -> Config:
    base = {"epochs": 3, "batch_size": 16, "lr": 0.01, "device": "cpu", "precision": "fp32", "log_every": 3}
    return Config(
        data=replace(DataConfig(max_len=10), **(data or {})),
        model=replace(ModelConfig(embed_dim=16, num_heads=2, ffn_mult=2), **(model or {})),
        training=replace(TrainConfig(), **{**base, **training}),
    )


def run(config: Config, run_dir: Path, sequences: Sequences | None = None, *, resume: bool = False) -> Outcome:
    c = build(config, sequences or cycling_sequences())
    found = newest_checkpoint(run_dir / "checkpoints", warn=print) if resume else None
    start = restore(c, *found) if found else None
    step = start.state.step if start else None
    with RunLog(run_dir, say=lambda line: None, resume_step=step) as log, StopSignal(say=print) as stop:
        return fit(c, run_dir, log=log, stop=stop, start=start)


def weights(outcome: Outcome) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in outcome.state.model.parameters()])


def first_step(config: Config) -> tuple[Components, float, torch.Tensor]:
    """Loss and weights after one step from the same start."""
    c = build(config, cycling_sequences())
    spans = training_spans(c.sequences, max_len=config.data.max_len).take(torch.arange(16))
    batches = step_batches(c, spans, epoch=0, index=0)
    targets = [batch.target.numel() for batch in batches]
    c.state.model.train()
    _, output = amp_step(
        c.state,
        batches,
        lambda model, batch: loss_fn(model, batch, training=config.training, log_q_I=c.log_q_I),
        amp=c.amp,
        shares=[n / sum(targets) for n in targets],
    )
    return c, float(output.loss), torch.cat([p.detach().flatten() for p in c.state.model.parameters()])


LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce"},
    "sampled": {"loss": "sampled", "num_negatives": 6},
    "sampled by popularity": {"loss": "sampled", "num_negatives": 6, "negatives": "popularity"},
    "sampled without logq": {"loss": "sampled", "num_negatives": 6, "logq": False},
    "inbatch": {"loss": "inbatch"},
    "bce": {"loss": "bce"},
    "gbce": {"loss": "gbce", "num_negatives": 6},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_learns_the_successor_of_each_item(name, tmp_path):
    options = {"epochs": 40, "eval_every": 100, "protocol": "unfiltered", **LOSSES[name]}
    outcome = run(configure(model={"dropout": 0.0}, **options), tmp_path, cycling_sequences(num_items=40))
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["HR@5"] > 0.7
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("attention", ["softmax", "hstu"])
def test_layouts_give_the_same_loss_and_step(name, attention):
    model = {"dropout": 0.0, "attention": attention}
    _, packed, packed_weights = first_step(configure(model=model, data={"layout": "packed"}, **LOSSES[name]))
    _, padded, padded_weights = first_step(configure(model=model, data={"layout": "padded"}, **LOSSES[name]))
    assert packed == pytest.approx(padded, abs=1e-5)
    assert float((packed_weights - padded_weights).abs().max()) < 0.011  # Adam's first step is lr times a sign


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_change_nothing(name):
    _, whole, _ = first_step(configure(model={"dropout": 0.0}, **LOSSES[name]))
    _, split, _ = first_step(configure(model={"dropout": 0.0}, accumulate=3, **LOSSES[name]))
    assert split == pytest.approx(whole, abs=1e-5)


def test_zero_logits_under_bce_cost_2_ln_2():
    c = build(configure(model={"dropout": 0.0}, loss="bce"), cycling_sequences())
    with torch.no_grad():
        c.state.model.item.weight.zero_()  # type: ignore[union-attr, operator]
    batch = step_batches(c, training_spans(c.sequences, max_len=10), epoch=0, index=0)[0]
    loss, _ = loss_fn(c.state.model, batch, training=c.config.training, log_q_I=None)
    assert float(loss.detach()) == pytest.approx(2 * math.log(2))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again, other = (run(configure(seed=seed), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    assert first.metrics == again.metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "adam": {},
    "muon with average": {"optimizer": "muon", "ema_decay": 0.9, "weight_decay": 0.01},
    "adamw, step schedule": {"optimizer": "adamw", "lr_scheduler": "step", "lr_step_epochs": 1, "warmup_steps": 2},
    "random windows, sampled": {"data": {"window": "random"}, "loss": "sampled", "num_negatives": 5},
    "bce, accumulated": {"loss": "bce", "accumulate": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_like_one_that_was_not(name, tmp_path):
    options = {"epochs": 2, "save_every": 3, "norm_every": 2, **VARIANTS[name]}
    whole = run(configure(**options), tmp_path / "whole")
    config = configure(**options)
    c = build(config, cycling_sequences())
    steps = 0

    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:

        def count(note: str | None) -> None:
            nonlocal steps
            steps += 1
            if steps == 6:
                signal.raise_signal(signal.SIGTERM)

        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_step=count)
        assert stop.exit_code == 143
    assert cut.metrics is None
    assert cut.state.step == 6
    assert 6 % c.steps_per_epoch != 0
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
    c = build(configure(epochs=2), cycling_sequences())
    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:
        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_users=lambda done: signal.raise_signal(signal.SIGINT))
        assert stop.exit_code == 130
    assert cut.metrics is None
    # the signal arrived with the last chunk, so the first epoch's validation counts and the next step stops
    resumed = run(configure(epochs=2), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_early_stopping_and_the_best_checkpoint_follow_validation(tmp_path):
    outcome = run(configure(epochs=30, patience=2, lr=0.1), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    values = [line["NDCG@10"] for line in lines]
    best = values.index(max(values))
    assert len(values) == best + 3 < 30
    assert outcome.progress.best_epoch == lines[best]["epoch"]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.safetensors")["progress"]["best"] == max(values)
    assert outcome.metrics is not None
    assert outcome.metrics["valid"]["NDCG@10"] == max(values)


def test_resuming_tidies_what_a_kill_in_the_last_save_left(tmp_path):
    run(configure(epochs=2), tmp_path)
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    last = folder / kept[-1]
    best = load_checkpoint(folder / "best.safetensors")
    assert best["step"] == load_checkpoint(last)["step"]
    (folder / f".{last.name}.999999999.tmp").write_bytes(last.read_bytes()[:100])
    (folder / "step-00000001.safetensors").write_bytes(last.read_bytes())
    (tmp_path / ".metrics.jsonl.999999999.tmp").write_text("")
    last.unlink()  # killed between the best checkpoint and the step's own: the best one is the newest
    run(configure(epochs=2), tmp_path, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    run(configure(epochs=4, keep=2), tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(names) == 3
    assert names[0] == "best.safetensors"
    assert all(name.startswith("step-") for name in names[1:])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 0.02}, "config.training.lr: 0.01 in the checkpoint, 0.02 now"),
        ({"model": {"num_blocks": 1}}, "config.model.num_blocks"),
        ({"data": {"max_len": 7}}, "config.data.max_len"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_differing_key(change, key, tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=key):
        run(configure(epochs=1, **change), tmp_path, resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    run(configure(epochs=1), tmp_path)
    with pytest.raises(MismatchError, match=r"data\.fingerprint"):
        run(configure(epochs=1), tmp_path, replace(cycling_sequences(), fingerprint="other"), resume=True)


def test_what_changes_no_weight_may_differ_on_resume(tmp_path):
    run(configure(epochs=1), tmp_path)
    run(configure(epochs=1, log_every=7, keep=5, memory_mib=1), tmp_path, resume=True)


def test_max_steps_ends_the_run_with_a_result(tmp_path):
    outcome = run(configure(epochs=5, max_steps=5), tmp_path)
    assert outcome.state.step == 5
    assert outcome.metrics is not None


def test_a_run_cut_by_max_steps_goes_on_like_one_that_was_not(tmp_path):
    options: dict[str, Any] = {"epochs": 4, "patience": 1, "eval_every": 2}
    whole = run(configure(**options), tmp_path / "whole")
    cut = run(configure(**options, max_steps=6), tmp_path / "cut")
    assert cut.state.step == 6
    resumed = run(configure(**options), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_a_damaged_best_checkpoint_is_named_and_the_last_weights_are_tested(tmp_path):
    whole = run(configure(epochs=2), tmp_path)
    (tmp_path / "checkpoints" / "best.safetensors").write_bytes(b"no checkpoint")
    resumed = run(configure(epochs=2), tmp_path, resume=True)
    assert resumed.metrics is not None
    assert torch.equal(weights(whole), weights(resumed))
    assert "best.safetensors" in (tmp_path / "train.log").read_text()


def test_a_gradient_that_breaks_the_last_step_is_never_saved(tmp_path):
    from shared.amp import NonFiniteError

    c = build(configure(epochs=1, clip_norm=0.0), cycling_sequences())
    c.state.model.item.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr, operator]
    with (
        RunLog(tmp_path, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
        pytest.raises(NonFiniteError, match="no checkpoint had been written yet"),
    ):
        fit(c, tmp_path, log=log, stop=stop)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    from shared.amp import NonFiniteError

    config = configure(epochs=3, clip_norm=0.0)
    c = build(config, cycling_sequences())
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


def test_the_learning_rate_is_a_function_of_the_step():
    c = build(configure(epochs=4, warmup_steps=4, min_lr=0.1), cycling_sequences())
    factors = [learning_rate_factor(c, step) for step in range(4 * c.steps_per_epoch + 1)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)


def test_data_without_anything_to_train_on_is_named():
    sequences = replace(cycling_sequences(2), ptr=torch.tensor([0, 1, 2]), item=torch.tensor([1, 2]).int())
    with pytest.raises(ValueError, match="cycling holds nothing to train on"):
        build(configure(), sequences)


def test_an_unknown_selection_metric_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'select is "Recall@7".*NDCG@10'):
        run(configure(epochs=1, select="Recall@7"), tmp_path)


def test_compile_that_fails_is_said_once_and_training_goes_on(tmp_path, monkeypatch):
    said: list[str] = []

    def broken(self, *args: object, **kwargs: object) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no compiler here")

        self._compiled_call_impl = fail

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    c = build(configure(epochs=1, compile="reduce-overhead"), cycling_sequences())
    with RunLog(tmp_path, say=said.append) as log, StopSignal(say=print) as stop:
        assert fit(c, tmp_path, log=log, stop=stop).metrics is not None
    assert [line for line in said if "no compiler here" in line] == [
        "warning: --compile has no effect here, training goes on without it: no compiler here"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_cuda_learns(precision, tmp_path):
    config = configure(epochs=12, device="cuda", precision=precision, protocol="unfiltered")
    outcome = run(config, tmp_path, cycling_sequences(num_items=40))
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["HR@1"] > 0.6
