"""Training: build -> Components, loss_fn, train_epoch (the loop) and fit (epochs, validation, checkpoints, result).

Legend: B sequences of a batch, R rows, L row length, D embedding dim, N targets, K shared negatives, I items + 1.

Everything drawn is a function of (seed, epoch, step in the epoch), so that a run that was killed and resumed ends with
the weights of one that was not (bit for bit on a CPU in fp32).

Several processes (torchrun) share the sequences of each step. What is drawn is drawn for the whole step in each of
them, so that order, windows and negatives do not depend on their number; only the masks of dropout do.
"""

import contextlib
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from apps.seqrec import losses
from apps.seqrec.config import Config, TrainConfig
from apps.seqrec.dataset import (
    ACTIONS,
    Batch,
    SeenItems,
    Sequences,
    Spans,
    Stage,
    compact,
    draw_unseen,
    epoch_order,
    item_counts,
    make_batch,
    number_within,
    seen_items,
    training_spans,
    without_features,
)
from apps.seqrec.evaluate import (
    baselines,
    encode,
    evaluated_spans,
    evaluation_sums,
    finish_scores,
    protocol_text,
)
from apps.seqrec.model import SeqRec
from shared import distributed
from shared.amp import (
    AmpConfig,
    TrainState,
    amp_step,
    load_state_tree,
    make_state,
    raise_if_nonfinite,
    resolve_precision,
    state_tree,
)
from shared.checkpoint import CheckpointError, check_identity, load_checkpoint, save_best, save_step
from shared.device import describe_machine, pick_device, to_device
from shared.distributed import Group, place
from shared.files import atomic_write_text
from shared.log import RunLog, StopSignal, due, read_metrics
from shared.schedule import lr_factor
from shared.seed import make_generator, seed_everything, seed_step
from shared.timing import RateMeter, StepTimer

APP = "seqrec"
NEGATIVE_STREAM = 3
UNSEEN_STREAM = 4
DROPOUT_STREAM = 5
STAGES: tuple[Stage, ...] = ("valid", "test")

# may differ between a checkpoint and the run that resumes it: they change no weight (the device only its last bits)
VOLATILE = frozenset(
    {"data.data_path", "data.format"}
    | {f"training.{name}" for name in ("log_every", "norm_every", "save_every", "keep", "max_steps", "memory_mib")}
    | {f"training.{name}" for name in ("device", "tensorboard")}
)


@dataclass(frozen=True)
class Components:
    """Everything a run is made of; nothing here changes except what `state` says it changes in place."""

    config: Config
    sequences: Sequences
    device: torch.device
    state: TrainState
    amp: AmpConfig
    precision_reason: str
    packed: bool
    front: bool  # whether sequences begin with a front token
    compact: bool  # whether batches name the rows of features they use
    steps_per_epoch: int
    log_q_I: Tensor | None  # [I] float32 on the device, log of each item's sampling rate; None: no correction
    cumulative_I: Tensor  # [I] float64, running sum of training events by item, for draws by popularity
    seen: SeenItems | None  # for bce
    group: Group | None = None  # the processes that train together; None: this one alone


class Meter(NamedTuple):
    """Sums since the last line of metrics; the tensors stay on the device until the line is due."""

    loss: Tensor  # scalar float64, sum of losses
    score_size: Tensor  # scalar float64, sum of the mean sizes of the targets' scores
    steps: int


class DeadModelError(RuntimeError):
    """All scores are 0: nothing that the model computes depends on its input any more."""


class Progress(NamedTuple):
    """What validation has found so far."""

    best: float  # of the selected metric; -1 before the first validation
    best_epoch: int
    stale: int  # validations since


@dataclass(frozen=True)
class Outcome:
    """How `fit` ended. Without `metrics` it was stopped by a signal and can be resumed."""

    state: TrainState
    progress: Progress
    metrics: dict[Stage, dict[str, float]] | None  # "valid", "test" of the best checkpoint


def build(config: Config, sequences: Sequences, *, group: Group | None = None) -> Components:
    """Model, optimizers and everything else that follows from the configuration and the data.

    Processes of a group get equal models, each on its own device.
    """
    training = config.training
    measured = [f"{name}@{k}" for name in ("NDCG", "HR", "MRR") for k in training.ks]
    if sequences.action is not None:
        measured += (["Score"] if 10 in training.ks else []) + ["Weighted score"]
    if len(training.action_weights) != len(ACTIONS) or min(training.action_weights) < 0:
        raise ValueError(
            f"action_weights are {list(training.action_weights)}; --action-weights takes {len(ACTIONS)} numbers, 0 or "
            f"more, for {', '.join(ACTIONS)}"
        )
    if not training.ks or min(training.ks) < 1 or training.select not in measured:
        raise ValueError(
            f'select is "{training.select}" and ks are {list(training.ks)}; --select must be one of '
            f"{', '.join(measured) or 'the metrics at some k'}, or change --ks"
        )
    if not config.model.features:
        sequences = without_features(sequences)
    device = pick_device(training.device) if group is None else group.device
    precision, reason = resolve_precision(training.precision, device)
    spans = training_spans(sequences, max_len=config.data.max_len, window=config.data.window)
    if not spans.user.numel():
        raise ValueError(f"{sequences.name} holds nothing to train on: no user has two events before the held-out ones")
    for stage in STAGES:  # refuses data without anything to evaluate
        evaluated_spans(sequences, stage, max_len=config.data.max_len)
    seed_everything(training.seed)
    model = make_model(config, sequences, device)
    counts = item_counts(sequences)
    components = Components(
        config=config,
        sequences=sequences,
        device=device,
        state=make_state(
            model, make_optimizers(model, training), precision=precision, device=device, ema_decay=training.ema_decay
        ),
        amp=AmpConfig(precision=precision, clip_norm=training.clip_norm),
        precision_reason=reason,
        packed=use_packed(config.data.layout, device),
        front=model.front is not None,
        compact=model.tower is not None,
        steps_per_epoch=-(-spans.user.numel() // training.batch_size),
        log_q_I=log_rates(training, counts, device),
        cumulative_I=torch.cumsum(counts, 0).double(),
        seen=seen_items(sequences) if training.loss == "bce" else None,
        group=group,
    )
    learning_rate_factor(components, 0)  # refuses an impossible schedule before anything is written
    return components


def make_model(config: Config, sequences: Sequences, device: torch.device) -> SeqRec:
    """The model that the configuration and the data make, with fresh weights."""
    features = None
    if config.model.features and sequences.features is not None:
        features = sequences.features.with_families(config.model.embeddings, name=sequences.name).to(device)
    return SeqRec(
        config.model,
        num_items=sequences.num_items,
        max_len=config.data.max_len,
        features=features,
        has_actions=sequences.action is not None,
        has_times=sequences.time is not None,
    ).to(device)


def log_rates(training: TrainConfig, counts: Tensor, device: torch.device) -> Tensor | None:
    """Log of how often the loss meets each item as a negative, [I] float32; None where nothing is to be corrected.

    In a batch that is the item's share of the training events, among K draws its expected number of draws.
    """
    if not training.logq or training.loss not in ("sampled", "inbatch"):
        return None
    share = torch.log(counts.clamp(min=1).double() / counts.sum())
    if training.loss == "sampled":
        if training.negatives == "uniform":
            share = torch.full_like(share, -math.log(counts.numel() - 1))
        share = share + math.log(training.num_negatives)
    return share.float().to(device)


def use_packed(layout: str, device: torch.device) -> bool:
    """Packed rows on a CPU, which waste few tokens; padded on CUDA, where causal attention needs no mask."""
    return layout == "packed" or (layout == "auto" and device.type == "cpu")


def make_optimizers(model: nn.Module, training: TrainConfig) -> list[Optimizer]:
    """Fused Adam or AdamW over everything, or Muon for the blocks' matrices and AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if training.optimizer == "muon" and "blocks." in name and p.ndim == 2]
    chosen = {name for name, _ in matrices}
    rest = [(name, p) for name, p in named if name not in chosen]
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    optimizers: list[Optimizer] = [
        kind(rest, lr=training.lr, betas=(0.9, 0.98), weight_decay=training.weight_decay, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=training.muon_lr, weight_decay=training.weight_decay))
    return optimizers


def loss_fn(
    model: nn.Module, batch: Batch, *, training: TrainConfig, log_q_I: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over the batch's targets, by the weights of their actions; and the mean size of a target's score."""
    assert isinstance(model, SeqRec)
    hidden_TD, vector_CD = encode(model, batch)
    pause_N = None
    if model.next_moment is not None:
        assert batch.time is not None
        assert batch.next_time is not None
        pause_N = batch.next_time - batch.time.flatten().index_select(0, batch.place)
    query_ND = model.query(
        hidden_TD.index_select(0, batch.place), action_N=batch.next_action, asked_N=batch.next_time, pause_N=pause_N
    )
    item_CD, target_N = model.candidates(vector_CD), batch.target
    with torch.no_grad():
        size = (query_ND.float() * F.embedding(target_N, item_CD).float()).sum(1).abs().mean()
    scalars = {"score_size": size}
    weight_N = None
    if batch.next_action is not None and len(set(training.action_weights)) > 1:
        weight = torch.tensor(training.action_weights, device=query_ND.device)
        weight_N = weight.index_select(0, batch.next_action - 1)
    num_items = model.num_items
    if training.loss == "ce":
        return losses.full_cross_entropy(query_ND, item_CD[: num_items + 1], target_N, weight_N=weight_N), scalars
    if training.loss == "bce":
        assert batch.unseen is not None
        return losses.binary_cross_entropy(query_ND, item_CD, target_N, batch.unseen, weight_N=weight_N), scalars
    assert batch.shared is not None
    if training.loss == "gbce":
        return losses.generalised_bce(
            query_ND, item_CD, target_N, batch.shared, num_items=num_items, t=training.gbce_t, weight_N=weight_N
        ), scalars
    log_q_C = log_q_I if log_q_I is None or batch.rows is None else log_q_I[batch.rows.clamp(max=num_items)]
    if training.loss == "inbatch":
        return losses.in_batch_cross_entropy(
            query_ND, item_CD, target_N, batch.shared, log_q_I=log_q_C, weight_N=weight_N
        ), scalars
    return losses.sampled_softmax(
        query_ND, item_CD, target_N, batch.shared, log_q_I=log_q_C, weight_N=weight_N
    ), scalars


def step_batches(c: Components, spans: Spans, *, epoch: int, index: int) -> list[Batch]:
    """This process's micro-batches of step `index` of an epoch, on the host, with their negatives.

    `spans` are those of the whole step, of all processes. Negatives are drawn for all of them, in order of sequence and
    time, so that neither the layout nor the number of micro-batches or of processes changes what a target is compared
    with.
    """
    training = c.config.training
    count = targets_of(spans, c.front)
    sequence, step = number_within(count)  # of every target of the step
    own = own_rows(count, c.group)
    shared = None
    if training.loss in ("sampled", "gbce"):
        generator = make_generator(training.seed, epoch=epoch, step=index, stream=NEGATIVE_STREAM)
        if training.negatives == "popularity":
            draw = torch.rand(training.num_negatives, dtype=torch.float64, generator=generator)
            shared = torch.searchsorted(c.cumulative_I, draw * c.cumulative_I[-1], right=True)
        else:
            shared = torch.randint(1, c.sequences.num_items + 1, (training.num_negatives,), generator=generator)
    size = -(-own.numel() // training.accumulate)
    batches = [
        make_batch(
            c.sequences, Spans(*part), packed=c.packed, row_len=c.config.data.max_len + int(c.front), front=c.front
        )._replace(shared=shared)
        for part in zip(*(torch.split(column, size) for column in spans.take(own)), strict=True)
    ]
    if training.loss == "inbatch":
        distinct = torch.unique(c.sequences.item[(spans.start + 1 - int(c.front))[sequence] + step].long())
        batches = [b._replace(shared=distinct) for b in batches]
    if c.seen is not None:
        generator = make_generator(training.seed, epoch=epoch, step=index, stream=UNSEEN_STREAM)
        unseen = draw_unseen(c.seen, spans.user[sequence], generator)[torch.isin(sequence, own)]
        parts = torch.split(unseen, [b.target.numel() for b in batches])
        batches = [b._replace(unseen=part) for b, part in zip(batches, parts, strict=True)]
    if c.compact:
        batches = [compact(b, num_items=c.sequences.num_items, whole=training.loss == "ce") for b in batches]
    return batches


def targets_of(spans: Spans, front: bool) -> Tensor:
    """How many targets each training piece has, [B] int64: one for every input, and one for its front token."""
    return spans.end - spans.start + int(front)


def own_rows(count: Tensor, group: Group | None) -> Tensor:
    """Which sequences of a step this process computes, int64 in rising order, given the targets of each ([B]).

    Longest first they are dealt in turn, so that no process waits long for another. One that gets none, in a step of
    fewer sequences than processes, takes the shortest, which `step_shares` then gives no weight.
    """
    rank, world = place(group)
    order = torch.argsort(count, descending=True, stable=True)
    return (order[rank::world] if rank < order.numel() else order[-1:]).sort().values


def step_shares(batches: list[Batch], spans: Spans, group: Group | None, *, front: bool = False) -> list[float]:
    """Each micro-batch's share of the targets of the whole step, so that the loss is the mean over all of them."""
    if place(group)[0] >= spans.user.numel():
        return [0.0] * len(batches)
    total = int(targets_of(spans, front).sum())
    return [batch.target.numel() / total for batch in batches]


def train_epoch(
    c: Components,
    state: TrainState,
    meter: Meter,
    *,
    log: RunLog,
    timer: StepTimer,
    rates: RateMeter,
    check: Callable[[TrainState], None],
    save: Callable[[TrainState, Meter], None],
    stopping: Callable[[TrainState], bool],
    on_step: Callable[[str | None], None],
) -> tuple[TrainState, Meter]:
    """The rest of epoch `state.epoch`, from the step where `state` stands; returns early when `stopping` says so."""
    training = c.config.training
    spans = training_spans(
        c.sequences, max_len=c.config.data.max_len, window=c.config.data.window, seed=training.seed, epoch=state.epoch
    )
    order = epoch_order(spans.user.numel(), seed=training.seed, epoch=state.epoch)
    loss_of = functools.partial(loss_fn, training=training, log_q_I=c.log_q_I)
    state.model.train()
    for index in range(state.step - state.epoch * c.steps_per_epoch, c.steps_per_epoch):
        timer.start()
        rows = order[index * training.batch_size : (index + 1) * training.batch_size]
        step_spans = spans.take(rows)
        host_batches = step_batches(c, step_spans, epoch=state.epoch, index=index)
        timer.mark("data_wait")
        batches = [to_device(batch, c.device) for batch in host_batches]
        timer.mark("copy")

        seed_step(training.seed, state.epoch, index, DROPOUT_STREAM + (place(c.group)[0] << 8))
        state, output = amp_step(
            state,
            batches,
            loss_of,
            amp=c.amp,
            lr_factor=learning_rate_factor(c, state.step),
            shares=step_shares(batches, step_spans, c.group, front=c.front),
            want_norm=due(state.step + 1, training.norm_every),
            reduce=None if c.group is None else functools.partial(distributed.sum_, c.group),
            mark=timer.mark,
        )
        meter = Meter(meter.loss + output.loss, meter.score_size + output.scalars["score_size"], meter.steps + 1)
        rates.add(rows.numel())

        note = None
        if due(state.step, training.log_every) or index + 1 == c.steps_per_epoch:
            loss, score_size = torch.stack([meter.loss, meter.score_size]).tolist()  # sync: one copy for the interval
            if score_size == 0:
                raise DeadModelError(
                    f"every score of the last {meter.steps} steps is 0, so that the model cannot learn any more (its "
                    f"loss is {loss / meter.steps:.4f}); try a smaller --lr, --warmup-steps 100, or other features"
                )
            values: dict[str, float] = {
                "loss": loss / meter.steps,
                "lr": training.lr * learning_rate_factor(c, state.step - 1),
            }
            timer.mark("sync")
            split = timer.summary()
            values |= rates.read()._asdict()
            if split.steps:  # of the steps before this one
                values |= {f"time_{name}": share for name, share in split.shares().items()}
            note = f"loss {values['loss']:.4f} ({split.line()})"
            log.metrics("train", state.step, state.epoch, values)
            check(state)
            meter = fresh_meter(c.device)
        if due(state.step, training.norm_every) and output.grad_norm is not None:
            log.metrics("norm", state.step, state.epoch, {"grad_norm": float(output.grad_norm)})  # sync
        timer.finish()
        on_step(note)

        if due(state.step, training.save_every) and index + 1 < c.steps_per_epoch:  # fit saves at the end of an epoch
            check(state)  # also waits for the device, so that the pause holds none of its work
            rates.pause()
            save(state, meter)
            rates.resume()
        if stopping(state):
            break
    return state, meter


def fresh_meter(device: torch.device) -> Meter:
    """Nothing counted yet."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return Meter(zero, zero, 0)


def learning_rate_factor(c: Components, step: int) -> float:
    """What scales every peak learning rate at `step`."""
    training = c.config.training
    return lr_factor(
        step,
        kind=training.lr_scheduler,  # type: ignore[arg-type]  # the knob's choices are the schedule's kinds
        total_steps=training.epochs * c.steps_per_epoch,
        warmup_steps=training.warmup_steps,
        min_factor=training.min_lr,
        step_size=training.lr_step_epochs * c.steps_per_epoch,
        gamma=training.lr_gamma,
    )


def identity(c: Components) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    return {"app": APP, "data": {"fingerprint": c.sequences.fingerprint}, "config": asdict(c.config)}


def checkpoint_tree(c: Components, state: TrainState, meter: Meter, progress: Progress) -> dict[str, Any]:
    """A whole checkpoint as nested dictionaries."""
    return {
        **state_tree(state),
        "identity": identity(c),
        "meter": meter._asdict(),
        "progress": progress._asdict(),
        "items": c.sequences.item_digest,
    }


class Start(NamedTuple):
    """Where training goes on."""

    state: TrainState
    meter: Meter
    progress: Progress
    checkpoint: Path


def restore(c: Components, path: Path, tree: Mapping[str, Any]) -> Start:
    """Everything as it was when the checkpoint was written, in place on the components' model and optimizers.

    Refuses a checkpoint of another app, configuration or data, naming the keys that differ.
    """
    check_identity(tree["identity"], identity(c), path=path, ignore={f"config.{name}" for name in VOLATILE})
    found = tree["meter"]
    meter = Meter(found["loss"].to(c.device), found["score_size"].to(c.device), found["steps"])
    return Start(load_state_tree(c.state, tree), meter, Progress(**tree["progress"]), path)


def fit(
    c: Components,
    run_dir: Path,
    *,
    log: RunLog,
    stop: StopSignal,
    start: Start | None = None,
    on_step: Callable[[str | None], None] = lambda note: None,
    on_users: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Train until the epochs or max_steps are done, validation stops improving, or a signal asks to stop.

    Checkpoints go to `run_dir`/checkpoints; `start` is where a resumed run goes on. The best
    checkpoint is chosen by the validation metric alone; test data is touched once, at the end, with that checkpoint.
    A signal ends the step at hand, saves, and returns an Outcome without metrics. In a group, whose processes all call
    this with the same `start`, the first one alone writes, and a signal to any of them stops all after the same step.
    """
    training = c.config.training
    folder = run_dir / "checkpoints"
    state, meter = c.state, fresh_meter(c.device)
    progress = Progress(best=-1.0, best_epoch=-1, stale=0)
    last_saved: Path | None = None
    writes = place(c.group)[0] == 0
    if start is not None:
        state, meter, progress, last_saved = start
        log.info(f"resuming from {last_saved} at step {state.step}, epoch {state.epoch}")
    if training.compile != "off":
        compile_or_say_why(c, log)

    def check(state: TrainState) -> None:
        raise_if_nonfinite(state, checkpoint=last_saved)

    def save(state: TrainState, meter: Meter) -> None:
        nonlocal last_saved
        check(state)
        if writes:
            tree = checkpoint_tree(c, state, meter, progress)
            last_saved = save_step(folder, tree, step=state.step, keep=training.keep)

    def asked() -> bool:
        return distributed.any_of(c.group, stop.requested is not None)

    def stopping(state: TrainState) -> bool:
        return asked() or 0 < training.max_steps <= state.step

    def ended(state: TrainState) -> bool:
        stale = 0 < training.patience <= progress.stale
        return state.epoch >= training.epochs or stale or 0 < training.max_steps <= state.step

    if start is not None:  # puts right what a kill in a save left behind: a missing step file, old ones, temporaries
        save(state, meter)
    timer, rates = StepTimer(c.device), RateMeter()
    while not ended(state):
        epoch = state.epoch
        state, meter = train_epoch(
            c,
            state,
            meter,
            log=log,
            timer=timer,
            rates=rates,
            check=check,
            save=save,
            stopping=stopping,
            on_step=on_step,
        )
        check(state)
        rates.pause()
        whole = state.step == (epoch + 1) * c.steps_per_epoch
        scheduled = whole and (due(epoch + 1, training.eval_every) or epoch + 1 == training.epochs)
        metrics, halted = None, asked()
        if not halted and scheduled:
            metrics = evaluate_unless_stopped(c, state.ema or state.model, "valid", stop=stop, on_users=on_users)
            halted = asked()
        if halted:  # resuming starts where this step ended, validation included
            save(state, meter)
            return Outcome(state, progress, None)
        if whole:
            state = replace(state, epoch=epoch + 1)
        if metrics is not None:
            value = metrics[training.select]
            log.metrics("valid", state.step, epoch, {training.select: value, **shown(metrics)})
            better = value > progress.best
            progress = Progress(value, epoch, 0) if better else progress._replace(stale=progress.stale + 1)
            words = ", ".join(f"{name} {metrics[name]:.4f}" for name in ("NDCG@10", "HR@10") if name in metrics)
            log.info(f"epoch {epoch + 1}: validation {words}{' (best so far)' if better else ''}")
            if better and writes:
                save_best(folder, checkpoint_tree(c, state, meter, progress))
        save(state, meter)
        rates.resume()

    model = state.ema or state.model
    distributed.wait_for_all(c.group)  # until the best checkpoint is there for all to read
    try:
        best = load_checkpoint(folder / "best.safetensors") if progress.best_epoch >= 0 else None
    except (CheckpointError, FileNotFoundError) as error:
        log.warn(f"{error}. Testing the last weights instead")
        best, progress = None, progress._replace(best_epoch=state.epoch - 1)
    if best is not None:
        model.load_state_dict(best["ema"] if best["ema"] is not None else best["model"])
        log.info(f"testing the checkpoint of epoch {progress.best_epoch + 1}, the best by validation {training.select}")
    final: dict[Stage, dict[str, float]] = {}
    for stage in STAGES:
        found = evaluate_unless_stopped(c, model, stage, stop=stop, on_users=on_users)
        if found is None:
            return Outcome(state, progress, None)
        final[stage] = found
    return Outcome(state, progress, final)


class Stopped(Exception):
    """A signal arrived during an evaluation."""


def checked(stop: StopSignal, on_users: Callable[[int], None]) -> Callable[[int], None]:
    """`on_users` that also ends an evaluation once a signal has arrived."""

    def between_chunks(done: int) -> None:
        if stop.requested is not None:
            raise Stopped
        on_users(done)

    return between_chunks


def evaluate_unless_stopped(
    c: Components, model: nn.Module, stage: Stage, *, stop: StopSignal, on_users: Callable[[int], None]
) -> dict[str, float] | None:
    """Metrics of `model`, the users divided among the processes; None when a signal to any of them cut it short."""
    sums = None
    with contextlib.suppress(Stopped):
        sums = evaluation_sums(
            model,
            c.sequences,
            stage,
            config=c.config,
            packed=c.packed,
            group=c.group,
            on_users=checked(stop, on_users),
        )
    if distributed.any_of(c.group, sums is None) or sums is None:
        return None
    return finish_scores(distributed.added_up(c.group, sums))


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics worth a curve or a column: with one target a user, recall is HR and precision is HR / k."""
    kept = ("HR@", "NDCG@", "MRR@", "Score", "Weighted score")
    return {name: value for name, value in metrics.items() if name.startswith(kept)}


def compile_or_say_why(c: Components, log: RunLog) -> None:
    """Compile the model in place after trying it on one sequence; where that fails, say why once and go on eagerly."""
    model = c.state.model
    model.compile(dynamic=True, mode=c.config.training.compile)
    spans = training_spans(c.sequences, max_len=c.config.data.max_len).take(torch.zeros(1, dtype=torch.int64))
    batches = step_batches(replace(c, group=None), spans, epoch=0, index=0)
    try:
        encode(model, to_device(batches[0], c.device))[0].sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        model._compiled_call_impl = None
        log.warn(f"--compile has no effect here, training goes on without it: {str(error).splitlines()[0]}")
    model.zero_grad(set_to_none=True)


def result_table(
    metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows: the model first, the baselines below it."""
    rows = [{"model": name, **shown(row)} for name, row in {APP: metrics, **others}.items()]
    return list(rows[0]), rows


def write_result(
    c: Components, run_dir: Path, outcome: Outcome, *, notes: list[str], command: str, git: str | None
) -> dict[str, Any]:
    """Write result.json: metrics with their protocol, speed, machine, versions and data; returns what was written."""
    assert outcome.metrics is not None
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    columns, rows = result_table(outcome.metrics["test"], baselines(c.sequences, "test", config=c.config))

    def typical(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return statistics.median(values) if values else None

    sections = sorted({name for line in lines for name in line if name.startswith("time_")})
    machine = describe_machine()
    result = {
        "app": APP,
        "title": f"{APP} on {c.sequences.name}",
        "protocol": protocol_text(c.sequences, "test", c.config),
        "metrics": {
            stage: {"protocol": protocol_text(c.sequences, stage, c.config), **values}
            for stage, values in outcome.metrics.items()
        },
        "table_columns": columns,
        "table": rows,
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.state.step,
        "speed": {
            "sequences/s": typical("samples_per_s"),
            "steps/s": typical("steps_per_s"),
        },
        "speed_measured": "median over the logged intervals of training; evaluation and saving are not in it",
        "time_split": {name.removeprefix("time_"): typical(name) for name in sections},
        "machine": machine,
        "versions": {"torch": machine["torch"], "python": machine["python"]},
        "data": {
            "name": c.sequences.name,
            "users": c.sequences.num_users,
            "items": c.sequences.num_items,
            "events": c.sequences.num_events,
            "fingerprint": c.sequences.fingerprint,
        },
        "precision": c.amp.precision,
        "git": git,
        "command": command,
        "notes": notes,
    }
    atomic_write_text(run_dir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
