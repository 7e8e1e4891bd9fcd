"""Training: build -> Components, loss_fn, train_epoch (the loop) and fit (epochs, validation, checkpoints, result).

Legend: P training pairs, B pairs of a batch, N negatives, M = 1 + N, K shared negatives, W warm items, C encoded items.

Everything drawn is a function of (seed, epoch, step in the epoch, training pair), so that a run that was killed and
resumed ends with the weights of one that was not (bit for bit on a CPU in fp32), whatever holds its negatives.
"""

import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apps.clcrec import losses
from apps.clcrec.config import Config, TrainConfig
from apps.clcrec.dataset import (
    GROUPS,
    STAGES,
    Batch,
    ColdStart,
    Stage,
    chosen_modalities,
    epoch_order,
    group_part,
)
from apps.clcrec.evaluate import baselines, evaluate, evaluate_stages, protocol_text
from apps.clcrec.model import CLCRec, Vectors, WordLists, normalised_content
from shared import negatives
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
from shared.device import describe_machine, pick_device
from shared.files import atomic_write_text
from shared.log import RunLog, StopSignal, due, read_metrics
from shared.schedule import lr_factor
from shared.seed import make_generator, seed_everything
from shared.timing import RateMeter, StepTimer

APP = "clcrec"
REPLACE_STREAM = 3
DRAWN_ROWS = 4096  # pairs whose negatives are drawn at once: several small batches together cost far less

# may differ between a checkpoint and the run that resumes it: they change no weight (the device only its last bits)
VOLATILE = frozenset(
    {"data.data_path"}
    | {f"training.{name}" for name in ("log_every", "norm_every", "save_every", "keep", "max_steps", "memory_mib")}
    | {f"training.{name}" for name in ("device", "tensorboard", "num_workers")}
)


@dataclass(frozen=True)
class Components:
    """Everything a run is made of; nothing here changes except what `state` says it changes in place."""

    config: Config
    data: ColdStart
    modalities: tuple[str, ...]
    device: torch.device
    state: TrainState
    amp: AmpConfig
    precision_reason: str
    steps_per_epoch: int
    user_P: Tensor  # [P] int64 on the device
    item_P: Tensor  # [P] int64 on the device
    sampler: negatives.NegativeSampler
    popularity: negatives.Popularity | None  # for --neg-power above 0
    by_matrix: bool  # scores by matrix products, not by gathered vectors
    encodes_batch: bool  # a step encodes its batch's distinct items, not all warm ones


class Meter(NamedTuple):
    """Sums since the last line of metrics; the tensors stay on the device until the line is due."""

    loss: Tensor  # scalar float64, sum of losses
    contrast: Tensor  # the same of the item-content loss
    preference: Tensor  # the same of the user-item loss
    steps: int


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


def build(config: Config, data: ColdStart) -> Components:
    """Model, optimizer, negative sampler and everything else that follows from the configuration and the data."""
    training = config.training
    check_selection(training, data)
    if not data.num_pairs:
        raise ValueError(f"{data.name} holds no training pair; add data")
    device = pick_device(training.device)
    precision, reason = resolve_precision(training.precision, device)
    torch.backends.cudnn.benchmark = training.cudnn_benchmark
    torch.backends.cudnn.deterministic = training.deterministic
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(training.deterministic)
    sampler = negatives.make_sampler(
        data.known if training.neg_exclude == "all" else data.trained,
        num_items=data.num_items,
        candidates=torch.arange(data.num_warm, dtype=torch.int32),
        device=device,
    )
    if training.negatives != "shared":
        negatives.require_candidates(sampler, training.num_negatives)
    elif training.num_negatives > data.num_warm:
        raise ValueError(
            f"--num-negatives is {training.num_negatives}, but {data.name} has {data.num_warm} warm items to draw from"
        )
    if training.negatives == "shared" and (training.neg_power > 0 or training.replacement == "legacy"):
        asked = "--neg-power" if training.neg_power > 0 else "--replacement legacy"
        raise ValueError(f"{asked} is about negatives of each pair's own; use it with --negatives device or pool")
    popularity = None
    if training.neg_power > 0:
        count_I = torch.bincount(data.item.long(), minlength=data.num_items)
        popularity = negatives.popularity(sampler, count_I.to(device), training.neg_power)
    modalities = chosen_modalities(data, has_v=config.data.has_v, has_a=config.data.has_a, has_t=config.data.has_t)
    seed_everything(training.seed)
    model = make_model(config, data).to(device)
    state = make_state(
        model, [make_optimizer(model, training)], precision=precision, device=device, ema_decay=training.ema_decay
    )
    if isinstance(state.ema, CLCRec):  # content is the same data, and much of it
        state.ema.content, state.ema.word_of, state.ema.word_ptr = model.content, model.word_of, model.word_ptr
    size = -(-min(training.batch_size, data.num_pairs) // training.accumulate)
    candidates, encodes_batch = encoded_items(training, size, data.num_warm)
    components = Components(
        config=config,
        data=data,
        modalities=modalities,
        device=device,
        state=state,
        amp=AmpConfig(precision=precision, clip_norm=training.clip_norm),
        precision_reason=reason,
        steps_per_epoch=-(-data.num_pairs // training.batch_size),
        user_P=data.user.long().to(device),
        item_P=data.item.long().to(device),
        sampler=sampler,
        popularity=popularity,
        by_matrix=uses_matrix(training, candidates),
        encodes_batch=encodes_batch,
    )
    learning_rate_factor(components, 0)  # refuses an impossible schedule before anything is written
    return components


def check_selection(training: TrainConfig, data: ColdStart) -> None:
    """Refuse to select by what is not measured."""
    if not training.ks or min(training.ks) < 1:
        raise ValueError(f"ks are {list(training.ks)}; --ks needs at least one k, each at least 1, as --ks 10,20")
    for stage, lists in (("validation", data.valid), ("test", data.test)):
        if not lists.item.numel():
            raise ValueError(f"{data.name} holds no {stage} positives, so there is nothing to measure; hold some out")
    there = [group for group in GROUPS if group_part(data.valid, group, data.num_warm).item.numel()]
    measured = [
        f"{group}/{name}@{k}" for group in there for name in ("Recall", "NDCG", "Precision", "HR") for k in training.ks
    ]
    if training.select not in measured:
        raise ValueError(
            f'select is "{training.select}" and ks are {list(training.ks)}; --select must be one of '
            f"{', '.join(measured)}, or change --ks"
        )


def make_model(config: Config, data: ColdStart) -> CLCRec:
    """A model with fresh weights for that data's users, items and chosen content, on the CPU."""
    modalities = chosen_modalities(data, has_v=config.data.has_v, has_a=config.data.has_a, has_t=config.data.has_t)
    words = None
    if "t" in modalities and data.words is not None:
        ptr = torch.searchsorted(data.words.item, torch.arange(data.num_items + 1))
        words = WordLists(ptr, data.words.word, data.words.num_words)
    return CLCRec(
        config.model,
        num_users=data.num_users,
        num_items=data.num_items,
        num_warm=data.num_warm,
        content_IF=content_of(data, modalities),
        words=words,
    )


def content_of(data: ColdStart, modalities: tuple[str, ...]) -> Tensor:
    """The numeric content of the modalities, [I, F] float32 (no column where there are words alone)."""
    parts = [data.content[name] for name in modalities if name in data.content]
    return normalised_content(parts) if parts else torch.zeros(data.num_items, 0)


def encoded_items(training: TrainConfig, size: int, num_warm: int) -> tuple[int, bool]:
    """About how many items a micro-batch of `size` pairs encodes, and whether they are the batch's distinct ones."""
    drawn = size + training.num_negatives if training.negatives == "shared" else size * (1 + training.num_negatives)
    distinct = math.ceil(num_warm * -math.expm1(-drawn / num_warm))
    by_batch = training.content_input == "batch" or (training.content_input == "auto" and distinct < 0.8 * num_warm)
    return (distinct, True) if by_batch else (num_warm, False)


def uses_matrix(training: TrainConfig, candidates: int) -> bool:
    """Whether a product with all candidates is cheaper than gathering each pair's own (docs/performance.md)."""
    if training.scores == "auto":
        return candidates <= 128 * (1 + training.num_negatives)
    return training.scores == "matrix"


def make_optimizer(model: nn.Module, training: TrainConfig) -> Optimizer:
    """Fused Adam or AdamW over everything, with PyTorch's betas as the original."""
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)


def loss_fn(
    model: nn.Module, batch: Batch, *, training: TrainConfig, by_matrix: bool, encodes_batch: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss of a micro-batch, and its two contrastive parts."""
    assert isinstance(model, CLCRec)
    rows_C, item_BM, shared_K = None, batch.item, batch.shared
    if encodes_batch:
        is_used = torch.zeros(model.num_warm, dtype=torch.bool, device=item_BM.device)
        is_used[item_BM.flatten()] = True
        if shared_K is not None:
            is_used[shared_K] = True
        rows_C = is_used.nonzero().squeeze(1)  # sync on CUDA: their number is the shape of what follows
        place_W = is_used.cumsum(0) - 1
        item_BM = place_W[item_BM]
        shared_K = None if shared_K is None else place_W[shared_K]
    vectors: Vectors = model(batch.user, rows_C)
    if shared_K is not None:
        assert batch.shared_times is not None
        assert batch.excluded is not None
        parts = losses.shared_losses(
            vectors.user_BD,
            vectors.id_CD,
            vectors.content_CD,
            item_BM[:, 0],
            batch.content_times[:, 0],
            shared_K,
            batch.shared_times,
            batch.excluded,
            temperature=training.temperature,
        )
    else:
        parts = losses.pair_losses(
            vectors.user_BD,
            vectors.id_CD,
            vectors.content_CD,
            item_BM,
            batch.content_times,
            temperature=training.temperature,
            by_matrix=by_matrix,
            repeats=training.replacement == "legacy",
        )
    total = losses.total(parts, lr_lambda=training.lr_lambda, reg_weight=training.reg_weight)
    return total, {"contrast": parts.contrast, "preference": parts.preference}


def epoch_batches(
    c: Components, *, epoch: int, first_step: int = 0, pool_PN: Tensor | None = None
) -> Iterator[list[Batch]]:
    """The micro-batches of every step of an epoch from `first_step` on, on the device.

    A pair's negatives depend on (seed, epoch, pair) alone, its replaced positions on (seed, epoch, step). `pool_PN`
    holds the negatives of all pairs (--negatives pool); otherwise those of some steps ahead are drawn together.
    """
    training = c.config.training
    size = training.batch_size
    order_P = epoch_order(c.data.num_pairs, seed=training.seed, epoch=epoch).to(c.device)
    permutations = None
    if training.negatives != "pool":
        permutations = negatives.permutations(c.sampler, seed=training.seed, epoch=epoch)
    ahead = max(1, DRAWN_ROWS // size) * size
    drawn_RN, drawn_from = None, 0
    for step in range(first_step, c.steps_per_epoch):
        begin = step * size
        rows_B = order_P[begin : begin + size]
        shared_K, own_BN = None, None
        if training.negatives == "pool":
            assert pool_PN is not None
            own_BN = pool_PN.index_select(0, rows_B)
        elif training.negatives == "shared":
            assert permutations is not None
            shared_K = negatives.draw_shared(c.sampler, permutations, step, training.num_negatives)
        else:
            assert permutations is not None
            if drawn_RN is None or begin >= drawn_from + drawn_RN.shape[0]:
                drawn_RN, drawn_from = draw(c, permutations, order_P[begin : begin + ahead], epoch=epoch), begin
            own_BN = drawn_RN[begin - drawn_from :][: rows_B.numel()]
        yield step_batches(c, rows_B, own_BN, shared_K, epoch=epoch, step=step)


def draw(c: Components, permutations: negatives.Permutations, pair_R: Tensor, *, epoch: int) -> Tensor:
    """Negatives of the training pairs `pair_R` ([R] int64) in an epoch, [R, N] int32."""
    training = c.config.training
    user_R = c.user_P[pair_R]
    if c.popularity is None:
        return negatives.draw(c.sampler, permutations, user_R, pair_R, training.num_negatives)
    return negatives.draw_popular(
        c.sampler, c.popularity, user_R, pair_R, training.num_negatives, seed=training.seed, epoch=epoch
    )


def step_batches(
    c: Components, rows_B: Tensor, own_BN: Tensor | None, shared_K: Tensor | None, *, epoch: int, step: int
) -> list[Batch]:
    """The micro-batches of one step: the pairs `rows_B` with their own negatives, or with shared ones."""
    training = c.config.training
    user_B, item_BM = c.user_P[rows_B], c.item_P[rows_B].unsqueeze(1)
    if own_BN is not None:
        item_BM = torch.cat([item_BM, own_BN.long()], dim=1)
    count = item_BM.numel() + (0 if shared_K is None else shared_K.numel())
    generator = make_generator(training.seed, epoch=epoch, step=step, stream=REPLACE_STREAM, device=c.device)
    times = replaced_times(training, count, generator)
    times_BM = times[: item_BM.numel()].view_as(item_BM)
    shared_times, excluded_BK = None, None
    if shared_K is not None:
        shared_times = times[item_BM.numel() :]
        excluded_BK = negatives.shared_excluded(c.sampler, user_B, shared_K)
        shared_K = shared_K.long()
    size = -(-rows_B.numel() // training.accumulate)
    parts = [None] * training.accumulate if excluded_BK is None else torch.split(excluded_BK, size)
    return [
        Batch(user, item, times, shared_K, shared_times, excluded)
        for user, item, times, excluded in zip(
            torch.split(user_B, size), torch.split(item_BM, size), torch.split(times_BM, size), parts, strict=False
        )
    ]


def replaced_times(training: TrainConfig, count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` positions is replaced by content, [count] uint8.

    bernoulli: 1 with probability num_sample (as a multiple of 2**-16: four positions share one 64-bit draw, since the
    draws are what costs). legacy: floor(count num_sample) draws with repeats, as the original, which replace a share of
    1 - exp(-num_sample).
    """
    device = generator.device
    if training.replacement == "bernoulli":
        bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(
            -(2**63), None, generator=generator
        )
        below = round(training.num_sample * 2**16) - 2**15
        return (bits.view(torch.int16)[:count].int() < below).to(torch.uint8)
    place = torch.randint(count, (math.floor(count * training.num_sample),), generator=generator, device=device)
    return torch.bincount(place, minlength=count).clamp(max=255).to(torch.uint8)


def train_epoch(
    c: Components,
    state: TrainState,
    meter: Meter,
    *,
    pool_PN: Tensor | None,
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
    loss_of = functools.partial(loss_fn, training=training, by_matrix=c.by_matrix, encodes_batch=c.encodes_batch)
    state.model.train()
    first = state.step - state.epoch * c.steps_per_epoch
    source = epoch_batches(c, epoch=state.epoch, first_step=first, pool_PN=pool_PN)
    for index in range(first, c.steps_per_epoch):
        timer.start()
        batches = next(source)
        timer.mark("data_wait")

        sizes = [batch.user.numel() for batch in batches]
        state, output = amp_step(
            state,
            batches,
            loss_of,
            amp=c.amp,
            lr_factor=learning_rate_factor(c, state.step),
            shares=[size / sum(sizes) for size in sizes],
            want_norm=due(state.step + 1, training.norm_every),
            mark=timer.mark,
        )
        meter = Meter(
            meter.loss + output.loss,
            meter.contrast + output.scalars["contrast"],
            meter.preference + output.scalars["preference"],
            meter.steps + 1,
        )
        rates.add(sum(sizes))

        note = None
        if due(state.step, training.log_every) or index + 1 == c.steps_per_epoch:
            sums = torch.stack(meter[:3]).tolist()  # sync: one copy for the interval
            loss, contrast, preference = (value / meter.steps for value in sums)
            values: dict[str, float] = {
                "loss": loss,
                "contrast": contrast,
                "preference": preference,
                "lr": training.lr * learning_rate_factor(c, state.step - 1),
            }
            timer.mark("sync")
            split = timer.summary()
            values |= rates.read()._asdict()
            if split.steps:  # of the steps before this one
                values |= {f"time_{name}": share for name, share in split.shares().items()}
            note = f"loss {loss:.4f} ({split.line()})"
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
    """Nothing measured yet."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return Meter(zero, zero, zero, 0)


def learning_rate_factor(c: Components, step: int) -> float:
    """What scales the peak learning rate at `step`."""
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
    return {"app": APP, "data": {"fingerprint": c.data.fingerprint}, "config": asdict(c.config)}


def checkpoint_tree(c: Components, state: TrainState, meter: Meter, progress: Progress) -> dict[str, Any]:
    """A whole checkpoint as nested dictionaries."""
    return {
        **state_tree(state),
        "identity": identity(c),
        "meter": meter._asdict(),
        "progress": progress._asdict(),
        "items": c.data.item_digest,
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
    saved = tree["meter"]
    loss, contrast, preference = (saved[name].to(c.device) for name in ("loss", "contrast", "preference"))
    meter = Meter(loss, contrast, preference, saved["steps"])
    return Start(load_state_tree(c.state, tree), meter, Progress(**tree["progress"]), path)


def draw_pool(c: Components, epoch: int, *, log: RunLog, on_rows: Callable[[int], None]) -> Tensor:
    """The negatives of all training pairs for the epochs that share a pool with `epoch`, [P, N] on the device."""
    training = c.config.training
    pairs, count = c.data.num_pairs, training.num_negatives
    size = negatives.pool_bytes(pairs, count, c.data.num_items)
    log.info(
        f"pool of negatives for epoch {epoch + 1} on: {pairs:,} x {count} x {size // (pairs * count)} bytes = "
        f"{size / 1e6:,.0f} MB on {c.device} (8-byte integers would take {pairs * count * 8 / 1e6:,.0f} MB)"
    )
    return negatives.draw_pool(
        c.sampler, c.user_P, count, seed=training.seed, epoch=epoch, table=c.popularity, on_rows=on_rows
    )


def fit(
    c: Components,
    run_dir: Path,
    *,
    log: RunLog,
    stop: StopSignal,
    start: Start | None = None,
    on_step: Callable[[str | None], None] = lambda note: None,
    on_users: Callable[[int], None] = lambda done: None,
    on_rows: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Train until the epochs or max_steps are done, validation stops improving, or a signal asks to stop.

    Checkpoints go to `run_dir`/checkpoints; `start` is where a resumed run goes on. The best
    checkpoint is chosen by the validation metric alone; test data is touched once, at the end, with that checkpoint.
    A signal ends the step at hand, saves, and returns an Outcome without metrics.
    """
    training = c.config.training
    folder = run_dir / "checkpoints"
    state, meter = c.state, fresh_meter(c.device)
    progress = Progress(best=-1.0, best_epoch=-1, stale=0)
    last_saved: Path | None = None
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
        tree = checkpoint_tree(c, state, meter, progress)
        last_saved = save_step(folder, tree, step=state.step, keep=training.keep)

    def stopping(state: TrainState) -> bool:
        return stop.requested is not None or 0 < training.max_steps <= state.step

    def ended(state: TrainState) -> bool:
        stale = 0 < training.patience <= progress.stale
        return state.epoch >= training.epochs or stale or 0 < training.max_steps <= state.step

    if start is not None:  # puts right what a kill in a save left behind: a missing step file, old ones, temporaries
        save(state, meter)
    timer, rates = StepTimer(c.device), RateMeter()
    pool_PN, pool_of = None, -1
    while not ended(state):
        epoch = state.epoch
        if training.negatives == "pool" and pool_of != negatives.pool_epoch(epoch, training.resample_epochs):
            pool_PN = None  # frees the old one before the new one is drawn
            pool_of = negatives.pool_epoch(epoch, training.resample_epochs)
            rates.pause()
            pool_PN = draw_pool(c, pool_of, log=log, on_rows=on_rows)
            rates.resume()
        state, meter = train_epoch(
            c,
            state,
            meter,
            pool_PN=pool_PN,
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
        metrics = None
        if stop.requested is None and scheduled:
            metrics = evaluate_unless_stopped(c, state, stop, on_users)
        if stop.requested is not None:  # resuming starts where this step ended, validation included
            save(state, meter)
            return Outcome(state, progress, None)
        if whole:
            state = replace(state, epoch=epoch + 1)
        if metrics is not None:
            value = metrics[training.select]
            log.metrics("valid", state.step, epoch, {training.select: value, **metrics})
            better = value > progress.best
            progress = Progress(value, epoch, 0) if better else progress._replace(stale=progress.stale + 1)
            name = training.select.partition("/")[2]
            words = ", ".join(
                f"{group} {metrics[f'{group}/{name}']:.4f}" for group in GROUPS if f"{group}/{name}" in metrics
            )
            log.info(f"epoch {epoch + 1}: validation {name} {words}{' (best so far)' if better else ''}")
            if better:
                save_best(folder, checkpoint_tree(c, state, meter, progress))
        save(state, meter)
        rates.resume()

    model = state.ema or state.model
    try:
        best = load_checkpoint(folder / "best.safetensors") if progress.best_epoch >= 0 else None
    except (CheckpointError, FileNotFoundError) as error:
        log.warn(f"{error}. Testing the last weights instead")
        best, progress = None, progress._replace(best_epoch=state.epoch - 1)
    if best is not None:
        model.load_state_dict(best["ema"] if best["ema"] is not None else best["model"])
        log.info(f"testing the checkpoint of epoch {progress.best_epoch + 1}, the best by validation {training.select}")
    try:
        final = evaluate_stages(model, c.data, STAGES, config=c.config, on_users=checked(stop, on_users))
    except Stopped:
        return Outcome(state, progress, None)
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
    c: Components, state: TrainState, stop: StopSignal, on_users: Callable[[int], None]
) -> dict[str, float] | None:
    """Validation metrics of the state's weights (the average where there is one); None when a signal cut it short."""
    model = state.ema or state.model
    try:
        return evaluate(model, c.data, "valid", config=c.config, on_users=checked(stop, on_users))
    except Stopped:
        return None


def compile_or_say_why(c: Components, log: RunLog) -> None:
    """Compile the model in place after trying it on some pairs; where that fails, say why once and go on eagerly."""
    model = c.state.model
    model.compile(dynamic=True, mode=c.config.training.compile)
    zeros = torch.zeros(8, dtype=torch.int64, device=c.device)
    try:
        sum(part.sum() for part in model(zeros, zeros if c.encodes_batch else None)).backward()
    except RuntimeError as error:
        model._compiled_call_impl = None
        log.warn(f"--compile has no effect here, training goes on without it: {str(error).splitlines()[0]}")
    model.zero_grad(set_to_none=True)


def result_table(
    metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows: the model first, the baselines below it."""
    rows = [{"model": name, **row} for name, row in {APP: metrics, **others}.items()]
    return list(rows[0]), rows


def write_result(
    c: Components, run_dir: Path, outcome: Outcome, *, notes: list[str], command: str, git: str | None
) -> dict[str, Any]:
    """Write result.json: metrics with their protocol, speed, machine, versions and data; returns what was written."""
    assert outcome.metrics is not None
    training = c.config.training
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    others = baselines(c.data, "test", content_of(c.data, c.modalities), config=c.config)
    columns, rows = result_table(outcome.metrics["test"], others)

    def typical(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return statistics.median(values) if values else None

    sections = sorted({name for line in lines for name in line if name.startswith("time_")})
    machine = describe_machine()
    result = {
        "app": APP,
        "title": f"{APP} on {c.data.name}",
        "protocol": protocol_text(c.data, "test", training),
        "metrics": {
            stage: {"protocol": protocol_text(c.data, stage, training), **values}
            for stage, values in outcome.metrics.items()
        },
        "table_columns": columns,
        "table": rows,
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.state.step,
        "speed": {
            "pairs/s": typical("samples_per_s"),
            "steps/s": typical("steps_per_s"),
        },
        "speed_measured": "median over the logged intervals of training; evaluation and saving are not in it",
        "time_split": {name.removeprefix("time_"): typical(name) for name in sections},
        "machine": machine,
        "versions": {"torch": machine["torch"], "python": machine["python"]},
        "data": {
            "name": c.data.name,
            "users": c.data.num_users,
            "warm items": c.data.num_warm,
            "cold items": c.data.num_items - c.data.num_warm,
            "pairs": c.data.num_pairs,
            "content": list(c.modalities),
            "fingerprint": c.data.fingerprint,
        },
        "precision": c.amp.precision,
        "git": git,
        "command": command,
        "notes": notes,
    }
    atomic_write_text(run_dir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
