"""Training: build -> Components, loss_fn, train_epoch (the loop) and fit (epochs, validation, checkpoints, result).

Legend: P training pairs, B pairs of a batch, K negatives, R pairs whose negatives are drawn together, U users, I items,
N users and items, D embedding dim.

The graph is propagated once per optimizer step, whatever the number of batches (propagate_every) and micro-batches
(accumulate) in it: their losses hang on the same propagated table, and one backward pass takes the sum of their
gradients through the graph. Pairs are drawn uniformly, every training pair once an epoch; the samplers of
LightGCN-PyTorch draw users uniformly instead.

Everything drawn is a function of (seed, epoch, step in the epoch, training pair), so that a run that was killed and
resumed ends with the weights of one that was not (bit for bit on a CPU in fp32). Several processes (torchrun) share the
pairs of each batch, or own columns of the table each; what is drawn does not depend on their number.
"""

import contextlib
import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apps.graphrec.advice import behind_filter
from apps.graphrec.columns import Columns, check_columns, own_tree, total, whole, whole_tree
from apps.graphrec.config import Config, TrainConfig
from apps.graphrec.dataset import MODALITIES, STAGES, Batch, Interactions, Stage, epoch_order
from apps.graphrec.evaluate import (
    baselines,
    evaluation_sums,
    finished,
    groups_of,
    kept,
    known,
    metric_name,
    protocol_text,
    scorer_of,
)
from apps.graphrec.graph import choose_kernel, make_graph
from apps.graphrec.model import (
    ENCODED,
    FILTERS,
    GraphFilter,
    GraphRec,
    normalised_content,
    spectral_embeddings,
)
from apps.graphrec.objective import Part, Plan, Step, loss_fn, make_plan, needs_wholes
from shared import distributed, negatives
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
from shared.distributed import Group, place
from shared.files import atomic_write_text
from shared.log import RunLog, StopSignal, due, read_metrics
from shared.schedule import lr_factor
from shared.seed import make_generator, seed_everything
from shared.timing import RateMeter, StepTimer

APP = "graphrec"
REPLACE_STREAM = 3
NOISE_STREAM = 4
DRAWN_ROWS = 4096  # pairs whose own negatives are drawn at once, at least: small batches together cost far less
DRAWN_CELLS = 1 << 16  # negatives drawn at once, at least

# may differ between a checkpoint and the run that resumes it: they change no weight (device, kernel and a division
# among processes only its last bits)
VOLATILE = frozenset(
    {"data.data_path", "data.format"}
    | {f"training.{name}" for name in ("log_every", "norm_every", "save_every", "keep", "max_steps", "memory_mib")}
    | {f"training.{name}" for name in ("device", "kernel", "parallel", "tensorboard", "num_workers", "baselines")}
)


@dataclass(frozen=True)
class Components:
    """Everything a run is made of; nothing here changes except what `state` says it changes in place."""

    config: Config
    data: Interactions
    device: torch.device
    state: TrainState
    amp: AmpConfig
    precision_reason: str
    kernel_reason: str
    plan: Plan
    steps_per_epoch: int  # 0 for a filter
    user_P: Tensor  # [P] int64 on the device
    item_P: Tensor  # [P] int64 on the device
    sampler: negatives.NegativeSampler
    log_q_I: Tensor | None  # [I] float32 on the device, log of each item's share of the pairs; None: no correction
    group: Group | None = None  # the processes that train together; None: this one alone
    columns: Columns | None = None  # those of this process, where the processes divide the table, not the pairs


class Meter(NamedTuple):
    """Sums since the last line of metrics; the tensor stays on the device until the line is due."""

    sums: Tensor  # [1 + terms] float64: the loss, then its terms in the order of Plan.weights
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
    metrics: dict[Stage, dict[str, float]] | None  # "valid" (where there is such a part), "test" of the best checkpoint


def build(config: Config, data: Interactions, *, group: Group | None = None) -> Components:
    """Model, optimizer, negative sampler and everything else that follows from the configuration and the data.

    Processes of a group get equal models, or columns of one, each on its own device.
    """
    training = config.training
    if not data.num_pairs:
        raise ValueError(f"{data.name} holds no training pair; add data")
    check_selection(config, data)
    device = pick_device(training.device) if group is None else group.device
    precision, reason = resolve_precision(training.precision, device)
    torch.backends.cudnn.deterministic = training.deterministic
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(training.deterministic)
    warm = None if data.is_cold is None else torch.nonzero(~data.is_cold).squeeze(1)
    sampler = negatives.make_sampler(
        known(data) if training.neg_exclude == "all" else data.train,
        num_items=data.num_items,
        candidates=warm,
        device=device,
    )
    plan = make_plan(config, sampler)
    columns = None
    if group is not None and training.parallel == "dims":
        columns = Columns(group, config.model.embed_dim)
        check_columns(config, loss=plan.loss, precision=precision, columns=columns)
    seed_everything(training.seed)
    model, kernel_reason = make_model(config, data, device, fresh=True)
    if columns is not None:
        assert isinstance(model, GraphRec)
        model.table = nn.Parameter(model.table.detach()[:, columns.own].clone())
    is_filter = isinstance(model, GraphFilter)
    optimizers = [] if is_filter else [make_optimizer(model, training)]
    state = make_state(
        model, optimizers, precision=precision, device=device, ema_decay=0.0 if is_filter else training.ema_decay
    )
    if state.ema is not None:
        share_data(model, state.ema)
    share = torch.bincount(data.train.item.long(), minlength=data.num_items).clamp(min=1).double() / data.num_pairs
    components = Components(
        config=config,
        data=data,
        device=device,
        state=state,
        amp=AmpConfig(precision=precision, clip_norm=training.clip_norm),
        precision_reason=reason,
        kernel_reason=kernel_reason,
        plan=plan,
        steps_per_epoch=0 if is_filter else -(-data.num_pairs // (training.batch_size * training.propagate_every)),
        user_P=data.user_of_pair.to(device),
        item_P=data.train.item.long().to(device),
        sampler=sampler,
        log_q_I=share.log().float().to(device) if plan.loss == "inbatch" and training.logq else None,
        group=group,
        columns=columns,
    )
    if not is_filter:
        learning_rate_factor(components, 0)  # refuses an impossible schedule before anything is written
    return components


def selected(config: Config, data: Interactions) -> str:
    """The name of the metric that selects: "all/" is understood with cold items, and left out without.

    A name without a cut-off means the largest one.
    """
    name = config.training.select
    if "@" not in name and config.training.ks:
        name = f"{name}@{max(config.training.ks)}"
    if data.is_cold is None:
        return name.removeprefix("all/")
    return name if "/" in name else f"all/{name}"


def check_selection(config: Config, data: Interactions) -> None:
    """Refuse to select by what is not measured."""
    training = config.training
    if not training.ks or min(training.ks) < 1:
        raise ValueError(f"ks are {list(training.ks)}; --ks needs at least one k, each at least 1, as --ks 10,20")
    if not data.test.item.numel():
        raise ValueError(f"{data.name} holds no test item, so there is nothing to measure; hold some out")
    if not data.valid.item.numel():
        return
    there = [part for part, mask in groups_of(data).items() if kept(data.valid, mask).item.numel()]
    names = [f"{name}@{k}" for name in ("Recall", "NDCG", "Precision", "HR") for k in training.ks]
    measured = [metric_name(part, name, data) for part in there for name in names]
    if selected(config, data) not in measured:
        raise ValueError(
            f'select is "{training.select}" and ks are {list(training.ks)}; --select must be one of '
            f"{', '.join(measured)}, or change --ks"
        )


def chosen_modalities(config: Config, data: Interactions) -> tuple[str, ...]:
    """The modalities asked for, or all that the data has when none is; asking for one it lacks is an error."""
    flags = (config.data.has_v, config.data.has_a, config.data.has_t)
    asked = tuple(m for m, wanted in zip(MODALITIES, flags, strict=True) if wanted)
    there = tuple(m for m in MODALITIES if m in data.content)
    missing = [m for m in asked if m not in there]
    if missing:
        raise ValueError(
            f"{data.name} has no {' and no '.join(f'feat_{m}' for m in missing)}, but "
            f"{' '.join(f'--has-{m}' for m in missing)} asks for it; it has "
            f"{', '.join(f'feat_{m}' for m in there) or 'no content'}: add the file, or leave the flag out"
        )
    return asked or there


def make_model(
    config: Config, data: Interactions, device: torch.device, *, fresh: bool = False
) -> tuple[GraphRec | GraphFilter, str]:
    """The model for that data on `device`, and why its kernel was chosen.

    Without `fresh` a spectral start is left out: weights are about to be loaded. A filter is not fitted here.
    """
    graph = make_graph(data.train, num_items=data.num_items, device=device)
    kernel, reason = config.training.kernel, f"kernel {config.training.kernel}, as asked"
    if kernel == "auto":
        kernel, reason = choose_kernel(graph, config.model.embed_dim, device)
    if config.model.bf16_rows and kernel == "csr" and device.type == "cpu":
        raise ValueError("--kernel csr has no bfloat16 rows on a CPU; use --kernel bag, or leave out --bf16-rows")
    if config.model.model in FILTERS:
        return GraphFilter(config.model, graph=graph, kernel=kernel), reason
    content = None
    if config.model.model in ENCODED:
        chosen = chosen_modalities(config, data)
        if not chosen:
            raise ValueError(
                f"--model {config.model.model} encodes content, but {data.name} has none (feat_v, feat_a or feat_t); "
                "add it, or use --model lightgcn"
            )
        content = normalised_content([data.content[name] for name in chosen])
    first_ND = None
    if config.model.init == "spectral" and fresh:
        first_ND = spectral_embeddings(graph, config.model, seed=config.training.seed, kernel=kernel).cpu()
    model = GraphRec(
        config.model, graph=graph, kernel=kernel, first_ND=first_ND, content_IF=content, is_cold_I=data.is_cold
    )
    return model.to(device), reason


def share_data(model: nn.Module, copy: nn.Module) -> None:
    """Let the copy of a model use the same graph and content, in place."""
    kept_names = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in kept_names:
            setattr(copy, name, buffer)


def peak_lr(training: TrainConfig) -> float:
    """The learning rate after warm-up."""
    return training.lr * (math.sqrt(training.batch_size / 256) if training.lr_scale == "sqrt" else 1.0)


def make_optimizer(model: nn.Module, training: TrainConfig) -> Optimizer:
    """Fused Adam or AdamW over everything, with PyTorch's betas as the originals."""
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=peak_lr(training), weight_decay=training.weight_decay, fused=True)


def epoch_batches(c: Components, *, epoch: int, first_step: int = 0) -> Iterator[Step]:
    """What this process computes in every step of an epoch from `first_step` on, on the device.

    A pair's own negatives depend on (seed, epoch, pair) alone, shared ones on (seed, epoch, batch). Own ones of some
    steps ahead are drawn together.
    """
    training, plan = c.config.training, c.plan
    size = training.batch_size * training.propagate_every
    order_P = epoch_order(c.data.num_pairs, seed=training.seed, epoch=epoch).to(c.device)
    tables = negatives.permutations(c.sampler, seed=training.seed, epoch=epoch) if plan.num_negatives else None
    ahead = max(1, max(DRAWN_ROWS, DRAWN_CELLS // max(1, plan.num_negatives)) // size) * size
    drawn_RK, drawn_from = None, 0
    for step in range(first_step, c.steps_per_epoch):
        begin = step * size
        pair_R = order_P[begin : begin + size]
        own_RK = None
        if tables is not None and not plan.shared:
            if drawn_RK is None or begin >= drawn_from + drawn_RK.shape[0]:
                rows_R, drawn_from = order_P[begin : begin + ahead], begin
                drawn_RK = negatives.draw(c.sampler, tables, c.user_P[rows_R], rows_R, plan.num_negatives)
            own_RK = drawn_RK[begin - drawn_from :][: pair_R.numel()]
        yield step_batches(c, pair_R, own_RK, tables, epoch=epoch, step=step)


def step_batches(
    c: Components,
    pair_R: Tensor,
    own_RK: Tensor | None,
    tables: negatives.Permutations | None,
    *,
    epoch: int,
    step: int,
) -> Step:
    """One step of this process: its micro-batches of the pairs `pair_R`, which may be those of several batches.

    Everything is drawn for whole batches, of all processes, and then divided.
    """
    training, plan = c.config.training, c.plan
    process, processes = place(c.group if c.columns is None else None)
    parts: list[Part] = []
    wholes = []
    for j, rows_B in enumerate(torch.split(pair_R, training.batch_size)):
        number, offset = step * training.propagate_every + j, j * training.batch_size
        user_B, item_B = c.user_P.index_select(0, rows_B), c.item_P.index_select(0, rows_B)
        shared_K, replaced_BM, replaced_K = None, None, None
        if plan.loss == "inbatch":
            shared_K = torch.unique(item_B)  # sync on CUDA
        elif plan.shared and tables is not None:
            shared_K = negatives.draw_shared(c.sampler, tables, number, plan.num_negatives).long()
        if plan.loss == "clcrec":
            width = 1 if plan.shared else 1 + plan.num_negatives
            count = 0 if shared_K is None else shared_K.numel()
            generator = make_generator(training.seed, epoch=epoch, step=number, stream=REPLACE_STREAM, device=c.device)
            draw = torch.rand(rows_B.numel() * width + count, generator=generator, device=c.device)
            replaced = draw < training.num_sample
            replaced_BM = replaced[: rows_B.numel() * width].view(-1, width)
            replaced_K = None if shared_K is None else replaced[rows_B.numel() * width :]
        mine = torch.arange(rows_B.numel(), device=c.device)[process::processes]
        weight = mine.numel() / pair_R.numel()
        if not mine.numel():  # fewer pairs than processes: one for nothing, so that all have the same gradients
            mine, weight = torch.zeros(1, dtype=torch.int64, device=c.device), 0.0
        for part in torch.split(mine, -(-mine.numel() // training.accumulate)):
            own = None if own_RK is None else own_RK.index_select(0, offset + part).long()
            excluded = None if shared_K is None else negatives.shared_excluded(c.sampler, user_B[part], shared_K)
            parts.append(
                Part(
                    Batch(user_B.index_select(0, part), item_B.index_select(0, part), own, shared_K, excluded),
                    None if replaced_BM is None else replaced_BM[part],
                    replaced_K,
                    weight * part.numel() / mine.numel(),
                )
            )
        wholes.append((user_B, item_B))
    noise = None
    if "views" in plan.weights or c.config.model.model == "xsimgcl":  # which trains on noisy vectors
        noise = make_generator(training.seed, epoch=epoch, step=step, stream=NOISE_STREAM, device=c.device)
    return Step(parts, wholes if needs_wholes(plan) else [], 1 / (processes * len(wholes)), noise)


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
    loss_of = functools.partial(loss_fn, training=training, plan=c.plan, log_q_I=c.log_q_I, columns=c.columns)
    divides_pairs = c.group is not None and c.columns is None
    size = training.batch_size * training.propagate_every
    state.model.train()
    first = state.step - state.epoch * c.steps_per_epoch
    source = epoch_batches(c, epoch=state.epoch, first_step=first)
    for index in range(first, c.steps_per_epoch):
        timer.start()
        step = next(source)
        timer.mark("data_wait")

        state, output = amp_step(
            state,
            [step],
            loss_of,
            amp=c.amp,
            lr_factor=learning_rate_factor(c, state.step),
            want_norm=due(state.step + 1, training.norm_every),
            reduce=functools.partial(distributed.sum_, c.group) if divides_pairs else None,
            mark=timer.mark,
        )
        terms = torch.stack([output.loss, *(output.scalars[name] for name in c.plan.weights)])
        meter = Meter(meter.sums + terms, meter.steps + 1)
        rates.add(min(size, c.data.num_pairs - index * size))

        note = None
        if due(state.step, training.log_every) or index + 1 == c.steps_per_epoch:
            sums = meter.sums.tolist()  # sync: one copy for the interval
            names = ("loss", *c.plan.weights)
            values = {name: value / meter.steps for name, value in zip(names, sums, strict=True)}
            values["lr"] = peak_lr(training) * learning_rate_factor(c, state.step - 1)
            timer.mark("sync")
            split = timer.summary()
            values |= rates.read()._asdict()
            if split.steps:  # of the steps before this one
                values |= {f"time_{name}": share for name, share in split.shares().items()}
            note = f"loss {values['loss']:.4f} ({split.line()})"
            log.metrics("train", state.step, state.epoch, values)
            check(state)
            meter = fresh_meter(c)
        if due(state.step, training.norm_every) and output.grad_norm is not None:
            norm = output.grad_norm
            if c.columns is not None:
                norm = total(c.columns, norm.square())[0].sqrt()
            log.metrics("norm", state.step, state.epoch, {"grad_norm": float(norm)})  # sync
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


def fresh_meter(c: Components) -> Meter:
    """Nothing measured yet."""
    return Meter(torch.zeros(1 + len(c.plan.weights), dtype=torch.float64, device=c.device), 0)


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
    """A whole checkpoint as nested dictionaries; processes that own columns call this at once, and get all of them."""
    tree = state_tree(state)
    return {
        **(tree if c.columns is None else whole_tree(c.columns, tree)),
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
    meter = Meter(tree["meter"]["sums"].to(c.device), tree["meter"]["steps"])
    own = tree if c.columns is None else own_tree(c.columns, tree)
    return Start(load_state_tree(c.state, own), meter, Progress(**tree["progress"]), path)


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

    Checkpoints go to `run_dir`/checkpoints; `start` is where a resumed run goes on. The best checkpoint is chosen by
    the validation metric alone, and is the last where there is no validation part; test data is touched once, at the
    end, with that checkpoint. A signal ends the step at hand, saves, and returns an Outcome without metrics. In a
    group, whose processes all call this with the same `start`, the first one alone writes, and a signal to any of them
    stops all after the same step. A filter is fitted, saved and measured: it has no steps.
    """
    training = c.config.training
    folder = run_dir / "checkpoints"
    has_valid = bool(c.data.valid.item.numel())
    name = selected(c.config, c.data)
    state, meter = c.state, fresh_meter(c)
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

    def save(state: TrainState, meter: Meter, *, best: bool = False) -> None:
        nonlocal last_saved
        if not is_filter:
            check(state)
        if writes or c.columns is not None:
            tree = checkpoint_tree(c, state, meter, progress)
            if writes and best:
                save_best(folder, tree)
            elif writes:
                last_saved = save_step(folder, tree, step=state.step, keep=training.keep)

    def asked() -> bool:
        return distributed.any_of(c.group, stop.requested is not None)

    def stopping(state: TrainState) -> bool:
        return asked() or 0 < training.max_steps <= state.step

    def ended(state: TrainState) -> bool:
        stale = 0 < training.patience <= progress.stale
        return is_filter or state.epoch >= training.epochs or stale or 0 < training.max_steps <= state.step

    is_filter = isinstance(state.model, GraphFilter)
    if isinstance(state.model, GraphFilter) and start is None:
        state.model.fit(seed=training.seed, say=log.info)
        save(state, meter)
    elif start is not None:  # puts right what a kill in a save left behind: a missing step file, old ones, temporaries
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
        whole_epoch = state.step == (epoch + 1) * c.steps_per_epoch
        scheduled = whole_epoch and (due(epoch + 1, training.eval_every) or epoch + 1 == training.epochs)
        metrics, halted = None, asked()
        if not halted and scheduled and has_valid:
            metrics = evaluate_unless_stopped(c, state, ("valid",), stop=stop, on_users=on_users)
            halted = asked()
        if halted:  # resuming starts where this step ended, validation included
            save(state, meter)
            return Outcome(state, progress, None)
        if whole_epoch:
            state = replace(state, epoch=epoch + 1)
        if metrics is not None:
            found = metrics["valid"]
            value = found[name]
            log.metrics("valid", state.step, epoch, {name: value, **found})
            better = value > progress.best
            progress = Progress(value, epoch, 0) if better else progress._replace(stale=progress.stale + 1)
            log.info(f"epoch {epoch + 1}: validation {in_words(name, found)}{' (best so far)' if better else ''}")
            if better:
                save(state, meter, best=True)
        save(state, meter)
        rates.resume()

    distributed.wait_for_all(c.group)  # until the best checkpoint is there for all to read
    try:
        best = load_checkpoint(folder / "best.safetensors") if progress.best_epoch >= 0 else None
    except (CheckpointError, FileNotFoundError) as error:
        log.warn(f"{error}. Testing the last weights instead")
        best, progress = None, progress._replace(best_epoch=state.epoch - 1)
    if best is not None:
        weights = best["ema"] if best["ema"] is not None else best["model"]
        (state.ema or state.model).load_state_dict(weights if c.columns is None else own_tree(c.columns, weights))
        log.info(f"testing the checkpoint of epoch {progress.best_epoch + 1}, the best by validation {name}")
    elif not is_filter:
        why = "no validation came before the end" if has_valid else "nothing is held out for validation to choose by"
        log.info(f"testing the last weights: {why}")
        progress = progress._replace(best_epoch=state.epoch - 1)
    stages: tuple[Stage, ...] = STAGES if has_valid else ("test",)
    return Outcome(state, progress, evaluate_unless_stopped(c, state, stages, stop=stop, on_users=on_users))


def in_words(selected_name: str, metrics: Mapping[str, float]) -> str:
    """The selected metric, of every group of items where there are groups."""
    name = selected_name.rpartition("/")[2]
    if name == selected_name:
        return f"{name} {metrics[name]:.4f}"
    return f"{name} " + ", ".join(
        f"{key.partition('/')[0]} {value:.4f}" for key, value in metrics.items() if key.endswith(f"/{name}")
    )


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
    c: Components, state: TrainState, stages: Sequence[Stage], *, stop: StopSignal, on_users: Callable[[int], None]
) -> dict[Stage, dict[str, float]] | None:
    """Metrics of the state's weights (the average where there is one); None when a signal to any process came first.

    The users are divided among the processes, which give one another the columns they own.
    """
    model = state.ema or state.model
    scorer = scorer_of(model) if c.columns is None else scorer_of(model, gather=functools.partial(whole, c.columns))
    sums = None
    with contextlib.suppress(Stopped):
        sums = evaluation_sums(
            scorer,
            c.data,
            stages,
            config=c.config,
            device=c.device,
            group=c.group,
            on_users=checked(stop, on_users),
        )
    if distributed.any_of(c.group, sums is None) or sums is None:
        return None
    return finished(sums, c.data, group=c.group)


def compile_or_say_why(c: Components, log: RunLog) -> None:
    """Compile the model in place after trying it once; where that fails, say why once and go on eagerly."""
    model = c.state.model
    model.compile(dynamic=True, mode=c.config.training.compile)
    try:
        model(None).final_ND.sum().backward()
    except RuntimeError as error:
        model._compiled_call_impl = None
        log.warn(f"--compile has no effect here, training goes on without it: {str(error).splitlines()[0]}")
    model.zero_grad(set_to_none=True)


def result_table(
    name: str, metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows: the model first, the baselines below it."""
    rows = [{"model": label, **row} for label, row in {name: metrics, **others}.items()]
    return list(rows[0]), rows


def write_result(
    c: Components, run_dir: Path, outcome: Outcome, *, notes: list[str], command: str, git: str | None
) -> dict[str, Any]:
    """Write result.json: metrics with their protocol, speed, machine, versions and data; returns what was written."""
    assert outcome.metrics is not None
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    name = c.config.model.model
    stages = list(outcome.metrics)
    others = baselines(c.data, stages, config=c.config, device=c.device)
    columns, rows = result_table(name, outcome.metrics["test"], {label: row["test"] for label, row in others.items()})
    if "valid" in stages:
        by_valid = {label: row["valid"] for label, row in others.items()}
        notes = [*notes, *behind_filter(c.config, outcome.metrics["valid"], by_valid)]

    def typical(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return statistics.median(values) if values else None

    sections = sorted({name for line in lines for name in line if name.startswith("time_")})
    machine = describe_machine()
    result = {
        "app": APP,
        "title": f"{APP} ({name}) on {c.data.name}",
        "protocol": protocol_text(c.data, "test"),
        "metrics": {
            stage: {"protocol": protocol_text(c.data, stage), **values} for stage, values in outcome.metrics.items()
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
            "items": c.data.num_items,
            "pairs": c.data.num_pairs,
            "split": c.data.split,
            "fingerprint": c.data.fingerprint,
        },
        "precision": c.amp.precision,
        "git": git,
        "command": command,
        "notes": notes,
    }
    atomic_write_text(run_dir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
