"""Training: build -> Components, loss_fn, train_epoch (the loop) and fit (epochs, validation, checkpoints, result).

Legend: T batches of an epoch, P identities of a batch, K samples of each, B = P K, R images of a batch, C captions or
subsets of modalities, L tokens of a caption, E embedding dim, F = 1 + C features of a sample.

A step takes `accumulate` batches of P x K; each keeps its losses to itself, since they compare the samples of a batch.
Everything drawn is a function of (seed, epoch, batch in the epoch, sample), so that a run that was killed and resumed
ends with the weights of one that was not (bit for bit on a CPU in fp32), whoever makes the batches. Between the steps
where something is due, nothing is read back from the device.
"""

import functools
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apps.reid import losses
from apps.reid.augment import augment, draw_augment
from apps.reid.clip_weights import load_clip
from apps.reid.clipping import AdaptiveClip, make_clip
from apps.reid.config import Config, DataConfig, TrainConfig
from apps.reid.dataset import MODALITIES, RGB, STAGES, TEXT, Batch, People, Samples, Stage, make_samples
from apps.reid.evaluate import RERANKED, baselines, evaluate, modes_of, protocol_text, query_lists, retrieval_of
from apps.reid.loaders import WINDOWS_LINE, Batches, Key, Loader, LoaderConfig, resolve_loader
from apps.reid.model import Output, ReID, choose_subsets, parameter_groups
from apps.reid.tokenizer import BYTE_CONTEXT, CONTEXT, BytePairTokenizer, ByteTokenizer, read_tokenizer
from shared.amp import (
    AmpConfig,
    NonFiniteError,
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
from shared.files import atomic_write_text
from shared.log import RunLog, StopSignal, due, read_metrics
from shared.pk_sampler import Length, PKSampler, make_pk_sampler, plan_epoch
from shared.schedule import lr_factor
from shared.seed import make_generator, seed_everything, seed_step
from shared.timing import RateMeter, Rates, StepTimer

APP = "reid"
AUGMENT_STREAM = 5
DROPOUT_STREAM = 6
TERMS = ("identity", "sdm", "triplet", "circle")  # of the loss, unweighted
ALL_SKIPPED = 10  # steps in a row without a finite gradient end a run
# what the original notes watch: steps per second, share of identities with RGB and another modality, seconds
WATCHED_STEPS_PER_S, WATCHED_PAIRABLE, WATCHED_INDEX_S = 8.0, 0.8, 5.0

# may differ between a checkpoint and the run that resumes it: they change no weight (the device only its last bits)
VOLATILE = frozenset(
    {"data.data_path", "data.format", "model.grad_checkpoint"}
    | {f"training.{name}" for name in ("log_every", "norm_every", "save_every", "keep", "max_steps", "memory_mib")}
    | {f"training.{name}" for name in ("num_workers", "prefetch", "start_method", "windows", "device", "tensorboard")}
    | {f"training.{name}" for name in ("init", "rerank", "rerank_k1", "rerank_k2", "rerank_lambda")}
)


@dataclass(frozen=True)
class Components:
    """Everything a run is made of; nothing here changes except `clip` and what `state` says it changes in place."""

    config: Config
    people: People
    samples: Samples
    modalities: tuple[int, ...]  # of MODALITIES, those that are used
    token_CL: Tensor  # [C, L] int32, all captions
    device: torch.device
    state: TrainState
    amp: AmpConfig
    precision_reason: str
    clip: AdaptiveClip | None
    sampler: PKSampler
    steps_per_epoch: int
    loader: LoaderConfig


class Meter(NamedTuple):
    """Sums since the last line of metrics; the tensor stays on the device until the line is due."""

    sums: Tensor  # [1 + terms] float64: the loss, then TERMS
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
    metrics: dict[Stage, dict[str, float]] | None  # of the best checkpoint, for the parts that the data have


def build(config: Config, people: People, token_CL: Tensor | None = None) -> Components:
    """Model, optimizer, sampler and everything else that follows from the configuration and the people.

    token_CL: all captions' tokens as `tokens_of` gives them, where the caller has them already.
    """
    training = config.training
    modalities = chosen_modalities(config, people)
    check_selection(config, people)
    device = pick_device(training.device)
    precision, reason = resolve_precision(training.precision, device)
    torch.backends.cudnn.benchmark = training.cudnn_benchmark
    torch.backends.cudnn.deterministic = training.deterministic
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(training.deterministic)
    if token_CL is None:
        token_CL = tokens_of(people, tokenizer_of(config.data))
    samples = make_samples(people, token_CL, seed=training.seed)
    sampler = make_sampler(samples, modalities, training)
    loader = resolve_loader(training, people.images, device=device, platform=sys.platform)
    clip = None
    if training.clip == "adaptive":
        clip = make_clip(
            first=training.clip_norm,
            window=training.clip_window,
            quantile=training.clip_quantile,
            low=training.clip_low,
            high=training.clip_high,
            device=device,
        )
    seed_everything(training.seed)
    model = make_model(config, people)
    if training.init is not None:
        load_clip(model.clip, Path(training.init))
    model = model.to(device)
    state = make_state(
        model, [make_optimizer(model, training)], precision=precision, device=device, ema_decay=training.ema_decay
    )
    components = Components(
        config=config,
        people=people,
        samples=samples,
        modalities=modalities,
        token_CL=token_CL,
        device=device,
        state=state,
        amp=AmpConfig(precision=precision, clip_norm=training.clip_norm if training.clip == "fixed" else 0.0),
        precision_reason=reason,
        clip=clip,
        sampler=sampler,
        steps_per_epoch=-(-sampler.num_batches // training.accumulate),
        loader=loader,
    )
    learning_rate_factor(components, 0)  # refuses an impossible schedule before anything is written
    return components


def check_selection(config: Config, people: People) -> None:
    """Refuse to select by what is not measured."""
    training = config.training
    if not training.ks or min(training.ks) < 1:
        raise ValueError(f"ks are {list(training.ks)}; --ks needs at least one k, each at least 1, as --ks 1,5")
    if not any(retrieval_of(people, stage) for stage in STAGES):
        raise ValueError(
            f"{people.name} has nobody to validate or to test on, so there is nothing to measure; set --val-share "
            "above 0, as --val-share 0.2"
        )
    if people.valid is None:
        return
    found = query_lists(people, "valid", config)
    lists = ["MM", *modes_of(found), *found]
    figures = ["mAP", "mINP", *(f"R{k}" for k in training.ks)]
    name, _, figure = training.select.partition("/")
    if name not in lists or figure not in figures:
        raise ValueError(
            f'select is "{training.select}"; --select must be LIST/FIGURE, as MM/mAP: one of {", ".join(lists)} and '
            f"one of {', '.join(figures)}"
        )


def chosen_modalities(config: Config, people: People) -> tuple[int, ...]:
    """The modalities asked for that somebody to train on has, in the order of MODALITIES; RGB is always one."""
    asked = config.data.modalities
    unknown = [name for name in asked if name not in MODALITIES]
    if unknown or MODALITIES[RGB] not in asked:
        raise ValueError(
            f"modalities are {', '.join(asked) or 'none'}; --modalities takes some of {', '.join(MODALITIES)}, and "
            f"{MODALITIES[RGB]} among them, for it is what everything is compared with"
        )
    trains_N = people.identity < people.num_identities
    there = {int(modality) for modality in people.modality[trains_N].bincount().nonzero()}
    if bool((people.caption[trains_N] >= 0).any()):
        there.add(TEXT)
    return tuple(number for number, name in enumerate(MODALITIES) if name in asked and number in there)


def tokenizer_of(data: DataConfig) -> ByteTokenizer | BytePairTokenizer:
    """CLIP's tokenizer where its vocabulary is given, and that of bytes otherwise."""
    if 0 < data.max_tokens < 3:
        raise ValueError(f"max_tokens is {data.max_tokens}; a caption needs a start, an end and a token between: 3")
    if data.vocab is None:
        return ByteTokenizer(data.max_tokens or BYTE_CONTEXT)
    return read_tokenizer(Path(data.vocab), context=data.max_tokens or CONTEXT)


def tokens_of(people: People, tokenizer: ByteTokenizer | BytePairTokenizer) -> Tensor:
    """The tokens of all captions, [C, L] int32, as long as the longest: what is padding in all of them is cut off."""
    token_CL = tokenizer.encode_batch(people.captions).int()
    longest = int(token_CL.argmax(1).max()) + 1 if len(token_CL) else 1  # the end token has the highest number
    return token_CL[:, :longest].contiguous()


def make_model(
    config: Config,
    people: People,
    *,
    num_identities: int | None = None,
    modalities: Sequence[int] | None = None,
) -> ReID:
    """A model with fresh weights for these people, on the CPU.

    num_identities, modalities: those it was trained on, where these people are others; none: their own.
    """
    tokenizer = tokenizer_of(config.data)
    height, width = people.images.frame[:2]
    patch = config.model.patch
    if height % patch or width % patch:
        raise ValueError(
            f"images of {height} x {width} cannot be cut into patches of {patch} x {patch}; choose a --patch that "
            "divides both, or another --height and --width"
        )
    return ReID(
        config.model,
        vocab_size=tokenizer.vocab_size,
        context=tokenizer.context,
        num_identities=people.num_identities if num_identities is None else num_identities,
        grid=(height // patch, width // patch),
        subsets=choose_subsets(config.training.subsets, modalities or chosen_modalities(config, people)),
    )


def make_sampler(samples: Samples, modalities: Sequence[int], training: TrainConfig) -> PKSampler:
    """The P x K sampler. A person is pairable whose samples show RGB and, some of them, another modality that is used.

    A sample always shows RGB, and others beside it: it counts as another modality, or as RGB where it has RGB alone.
    """
    others = [modality for modality in modalities if modality != RGB]
    has_other_S = samples.present[:, others].any(1)
    identity_S = torch.unique(samples.label, return_inverse=True)[1]
    is_pairable_G = torch.zeros(int(identity_S.max()) + 1, dtype=torch.bool)
    is_pairable_G[identity_S[has_other_S]] = True
    keep_S = torch.arange(len(samples))
    if training.prefer_complete == "only":
        keep_S = is_pairable_G[identity_S].nonzero().squeeze(1)
        count = int(is_pairable_G.sum())
        if count < training.identities_per_batch:
            raise ValueError(
                f"{count} of {len(is_pairable_G)} identities have RGB and another modality, fewer than the "
                f"{training.identities_per_batch} of a batch; lower --identities-per-batch, or use --prefer-complete "
                "first"
            )
        is_pairable_G = is_pairable_G[is_pairable_G]
    sampler = make_pk_sampler(
        samples.label[keep_S],
        has_other_S[keep_S].long(),
        identities_per_batch=training.identities_per_batch,
        num_instances=training.num_instances,
        length=epoch_length(training),
        ensure_rgb=training.ensure_rgb,
        prefer_complete="any",
    )
    return replace(
        sampler,
        sample_N=keep_S[sampler.sample_N],
        is_pairable_G=is_pairable_G,
        prefer_complete="any" if training.prefer_complete == "any" else "first",
        summary=replace(sampler.summary, num_pairable=int(is_pairable_G.sum())),
    )


def epoch_length(training: TrainConfig) -> Length:
    """What --epoch-length says: "samples", "identities", or a number of batches."""
    asked = training.epoch_length
    if asked == "samples":
        return "samples"
    if asked == "identities":
        return "identities"
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(
            f'epoch_length is "{asked}"; --epoch-length must be samples, identities, or a number of batches, as 500'
        )
    return int(asked)


def make_optimizer(model: ReID, training: TrainConfig) -> Optimizer:
    """Fused Adam or AdamW over what learns, in place: towers with a rate of 0 are frozen.

    Rates go by group and, in the towers, by depth; vectors (norms, biases, the class token) do not decay.
    """
    multiple = {"towers": training.tower_lr, "experts": training.expert_lr, "head": 1.0}
    parts: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for group, trainables in parameter_groups(model).items():
        for trainable in trainables:
            if multiple[group] == 0:
                trainable.parameter.requires_grad_(False)
                continue
            rate = training.lr * multiple[group] * training.layer_decay**trainable.depth
            decay = training.weight_decay if trainable.parameter.ndim > 1 else 0.0
            parts[rate, decay].append(trainable.parameter)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(
        [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in parts.items()], fused=True
    )


def loss_fn(
    model: nn.Module, batch: Batch, *, training: TrainConfig, with_norms: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss of a batch of P x K and its terms; also mean norms of features where they are wanted."""
    assert isinstance(model, ReID)
    output: Output = model(batch)
    found = losses.total(output, batch.label, training, [len(subset) for subset in model.subsets])
    scalars = {name: getattr(found, name) for name in TERMS}
    return found.total, scalars | feature_norms(output) if with_norms else scalars


def feature_norms(output: Output) -> dict[str, Tensor]:
    """Mean norms of what queries are made of (RGB where there are none) and of all features behind the neck."""
    has_FB = torch.cat([output.has_CB.new_ones(1, len(output.rgb_BE)), output.has_CB])
    fused_CBE, has_CB = output.query_CBE, output.has_CB
    if not len(fused_CBE):
        fused_CBE, has_CB = output.rgb_BE[None], has_FB

    def mean_norm(x_ABE: Tensor, has_AB: Tensor) -> Tensor:
        return (x_ABE.detach().float().norm(dim=-1) * has_AB).sum() / has_AB.sum().clamp(min=1)

    return {"fused_norm": mean_norm(fused_CBE, has_CB), "neck_norm": mean_norm(output.neck_FBE, has_FB)}


def epoch_keys(c: Components, *, epoch: int, first_step: int = 0) -> list[Key]:
    """What makes the batches of an epoch from `first_step` on: (epoch, places of the samples), `accumulate` a step."""
    plan_TPK = plan_epoch(c.sampler, seed=c.config.training.seed, epoch=epoch)
    rest_TB = plan_TPK[first_step * c.config.training.accumulate :].flatten(1)
    return [(epoch, places) for places in rest_TB.tolist()]


def augmented(c: Components, batch: Batch, *, epoch: int, number: int) -> Batch:
    """The batch on the device, its images flipped, cropped and erased there; `number` counts the epoch's batches."""
    training = c.config.training
    target = c.people.images.frame[:2]
    plan_R7 = draw_augment(
        make_generator(training.seed, epoch=epoch, step=number, stream=AUGMENT_STREAM),
        len(batch.image),
        source=(batch.image.shape[2], batch.image.shape[3]),
        target=target,
        flip=training.flip,
        pad=training.pad,
        erase=training.erase,
    )
    batch, plan_R7 = to_device((batch, plan_R7), c.device)
    return batch._replace(image=augment(batch.image, plan_R7, target=target))


def train_epoch(
    c: Components,
    state: TrainState,
    meter: Meter,
    *,
    loader: Loader,
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
    state.model.train()
    pace = RateMeter()  # of the whole epoch
    first = state.step - state.epoch * c.steps_per_epoch
    with closing(loader.run(epoch_keys(c, epoch=state.epoch, first_step=first))) as source:
        for index in range(first, c.steps_per_epoch):
            timer.start()
            begin = index * training.accumulate
            numbers = range(begin, min(begin + training.accumulate, c.sampler.num_batches))
            made = [next(source) for _ in numbers]
            timer.mark("data_wait")
            batches = [
                augmented(c, batch, epoch=state.epoch, number=number)
                for batch, number in zip(made, numbers, strict=True)
            ]
            timer.mark("copy")

            seed_step(training.seed, state.epoch, index, DROPOUT_STREAM)
            is_norm_due = due(state.step + 1, training.norm_every)
            state, output = amp_step(
                state,
                batches,
                functools.partial(loss_fn, training=training, with_norms=is_norm_due),
                amp=c.amp,
                lr_factor=learning_rate_factor(c, state.step),
                want_norm=is_norm_due,
                clip=c.clip,
                mark=timer.mark,
            )
            terms = torch.stack([output.loss, *(output.scalars[name] for name in TERMS)])
            meter = Meter(meter.sums + terms, meter.steps + 1)
            samples = sum(len(batch.label) for batch in batches)
            rates.add(samples)
            pace.add(samples)

            note = None
            if due(state.step, training.log_every) or index + 1 == c.steps_per_epoch:
                skipped = [] if c.clip is None else [c.clip.skipped.double()]
                sums = torch.stack([*meter.sums.unbind(), *skipped]).tolist()  # sync: one copy for the interval
                values = {name: value / meter.steps for name, value in zip(("loss", *TERMS), sums, strict=False)}
                values["lr"] = training.lr * learning_rate_factor(c, state.step - 1)
                timer.mark("sync")
                split = timer.summary()
                values |= rates.read()._asdict()
                if split.steps:  # of the steps before this one
                    values |= {f"time_{name}": share for name, share in split.shares().items()}
                note = f"loss {values['loss']:.4f} ({split.line()})"
                log.metrics("train", state.step, state.epoch, values)
                check(state)
                if c.clip is not None:
                    say_skipped(int(sums[-1]), meter.steps, state.step, log)
                    c.clip.skipped.zero_()
                meter = fresh_meter(c.device)
            if is_norm_due and output.grad_norm is not None:
                log_norms(c, state, output.grad_norm, output.scalars, batch=index + 1, log=log)
            timer.finish()
            on_step(note)

            if index + 1 == c.steps_per_epoch:
                log.info(health_line(c, pace.read(), epoch=state.epoch))
            elif due(state.step, training.save_every):  # fit saves at the end of an epoch
                check(state)  # also waits for the device, so that the pause holds none of its work
                rates.pause()
                pace.pause()
                save(state, meter)
                rates.resume()
                pace.resume()
            if stopping(state):
                break
    return state, meter


def say_skipped(skipped: int, steps: int, step: int, log: RunLog) -> None:
    """Tell of the steps without a finite gradient among the last `steps`, and end a run that has no others."""
    if not skipped:
        return
    if skipped == steps >= ALL_SKIPPED:
        raise NonFiniteError(
            f"no gradient of the last {steps} steps, up to step {step}, was finite. "
            "Lower --lr, use --precision fp32, or look for bad values in the data."
        )
    log.warn(f"step {step}: {skipped} of the last {steps} steps were skipped, since their gradients were not finite")


def log_norms(
    c: Components, state: TrainState, norm: Tensor, scalars: Mapping[str, Tensor], *, batch: int, log: RunLog
) -> None:
    """Record the norms of the gradients and of features, and what the gradients were clipped to."""
    limit = torch.full_like(norm, c.amp.clip_norm) if c.clip is None else c.clip.limit
    parts = [norm, limit, scalars["fused_norm"], scalars["neck_norm"]]
    grad_norm, clip_limit, fused, neck = torch.stack([part.float() for part in parts]).tolist()  # sync
    values = {"grad_norm": grad_norm, "fused_norm": fused, "neck_norm": neck}
    log.metrics("norm", state.step, state.epoch, values | ({"clip_limit": clip_limit} if clip_limit else {}))
    # the original's line: watching features; features after fusion, features behind batch norm
    log.limited(
        "features",
        f"[\u7279\u5f81\u76d1\u63a7] Epoch {state.epoch + 1}, Batch {batch}: "
        f"\u878d\u5408\u7279\u5f81={fused:.3f}, BN\u7279\u5f81={neck:.3f}",
    )


def health_line(c: Components, rates: Rates, *, epoch: int) -> str:
    """What the original notes tell one to watch at the end of an epoch, and what of it is not as it should be."""
    summary = c.sampler.summary
    pairable = summary.num_pairable / summary.num_identities
    low = []
    if c.device.type == "cuda" and rates.steps_per_s < WATCHED_STEPS_PER_S:  # the notes' figure is of a GPU
        low.append(f"fewer than {WATCHED_STEPS_PER_S:g} steps/s")
    if pairable < WATCHED_PAIRABLE:
        low.append(f"fewer than {WATCHED_PAIRABLE:.0%} pairable")
    if summary.elapsed_s > WATCHED_INDEX_S:
        low.append(f"more than {WATCHED_INDEX_S:g} s for the index")
    return (
        f"epoch {epoch + 1}: {rates.steps_per_s:.2f} steps/s ({rates.samples_per_s:.0f} samples/s); "
        f"{pairable:.1%} of the identities pairable; index {summary.elapsed_s:.2f} s; memory {memory_text(c.device)}"
        + (f"; to look at: {', '.join(low)}" if low else "")
    )


def memory_text(device: torch.device) -> str:
    """The most memory that this process has held so far."""
    parts = []
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:,.0f} MiB")
    if device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB on the GPU")
    return " and ".join(parts) or "not known here"


def fresh_meter(device: torch.device) -> Meter:
    """Nothing measured yet."""
    return Meter(torch.zeros(1 + len(TERMS), dtype=torch.float64, device=device), 0)


def learning_rate_factor(c: Components, step: int) -> float:
    """What scales the peak learning rates at `step`."""
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
    return {"app": APP, "data": {"fingerprint": c.people.fingerprint}, "config": asdict(c.config)}


def checkpoint_tree(c: Components, state: TrainState, meter: Meter, progress: Progress) -> dict[str, Any]:
    """A whole checkpoint as nested dictionaries."""
    return {
        **state_tree(state),
        "clip": None if c.clip is None else c.clip.tree(),
        "identity": identity(c),
        "meter": meter._asdict(),
        "progress": progress._asdict(),
        "identities": c.people.identity_digest,
        "modalities": [MODALITIES[modality] for modality in c.modalities],
        "size": list(c.people.images.frame[:2]),
    }


class Start(NamedTuple):
    """Where training goes on."""

    state: TrainState
    meter: Meter
    progress: Progress
    checkpoint: Path


def restore(c: Components, path: Path, tree: Mapping[str, Any]) -> Start:
    """Everything as it was when the checkpoint was written, in place on the components' model, optimizer and clip.

    Refuses a checkpoint of another app, configuration or data, naming the keys that differ.
    """
    check_identity(tree["identity"], identity(c), path=path, ignore={f"config.{name}" for name in VOLATILE})
    meter = Meter(tree["meter"]["sums"].to(c.device), tree["meter"]["steps"])
    if c.clip is not None:
        c.clip.load(tree["clip"])
    return Start(load_state_tree(c.state, tree), meter, Progress(**tree["progress"]), path)


def fit(
    c: Components,
    run_dir: Path,
    *,
    log: RunLog,
    stop: StopSignal,
    start: Start | None = None,
    on_step: Callable[[str | None], None] = lambda note: None,
    on_images: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Train until the epochs or max_steps are done, validation stops improving, or a signal asks to stop.

    Checkpoints go to `run_dir`/checkpoints; `start` is where a resumed run goes on. The best checkpoint is chosen by
    the validation metric alone, and is the last where nobody is held out to validate on; test people are looked at
    once, at the end, with that checkpoint. A signal ends the step at hand, saves, and returns an Outcome without
    metrics.
    """
    training = c.config.training
    folder = run_dir / "checkpoints"
    state, meter = c.state, fresh_meter(c.device)
    progress = Progress(best=-1.0, best_epoch=-1, stale=0)
    last_saved: Path | None = None
    if start is not None:
        state, meter, progress, last_saved = start
        log.info(f"resuming from {last_saved} at step {state.step}, epoch {state.epoch}")
    for line in (*c.sampler.summary.original_lines(), *c.sampler.summary.lines()):
        log.info(line)
    if training.windows:
        log.info(WINDOWS_LINE)
    log.info(c.loader.line())
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
    batches = Batches(c.samples, c.modalities, training.modality_dropout)
    with Loader(batches, c.loader, c.device) as loader:
        while not ended(state):
            epoch = state.epoch
            state, meter = train_epoch(
                c,
                state,
                meter,
                loader=loader,
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
            if stop.requested is None and scheduled and c.people.valid is not None:
                metrics = evaluate_unless_stopped(c, state, ("valid",), stop=stop, on_images=on_images)
            if stop.requested is not None:  # resuming starts where this step ended, validation included
                save(state, meter)
                return Outcome(state, progress, None)
            if whole:
                state = replace(state, epoch=epoch + 1)
            if metrics is not None:
                found = metrics["valid"]
                value = found[training.select]
                log.metrics("valid", state.step, epoch, {training.select: value, **found})
                better = value > progress.best
                progress = Progress(value, epoch, 0) if better else progress._replace(stale=progress.stale + 1)
                words = in_words(training.select, found)
                log.info(f"epoch {epoch + 1}: validation {words}{' (best so far)' if better else ''}")
                if better:
                    save_best(folder, checkpoint_tree(c, state, meter, progress))
            save(state, meter)
            rates.resume()

    try:
        best = load_checkpoint(folder / "best.safetensors") if progress.best_epoch >= 0 else None
    except (CheckpointError, FileNotFoundError) as error:
        log.warn(f"{error}. Testing the last weights instead")
        best, progress = None, progress._replace(best_epoch=state.epoch - 1)
    if best is not None:
        weights = best["ema"] if best["ema"] is not None else best["model"]
        (state.ema or state.model).load_state_dict(weights)
        log.info(f"testing the checkpoint of epoch {progress.best_epoch + 1}, the best by validation {training.select}")
    elif progress.best_epoch < 0:
        why = "nobody is held out to validate on" if c.people.valid is None else "no validation came before the end"
        log.info(f"testing the last weights: {why}")
        progress = progress._replace(best_epoch=state.epoch - 1)
    if c.people.test is None:
        log.info(f"{c.people.name} has nobody to test on: what is reported is validation, by which weights were chosen")
    stages = [stage for stage in STAGES if retrieval_of(c.people, stage) is not None]
    return Outcome(state, progress, evaluate_unless_stopped(c, state, stages, stop=stop, on_images=on_images))


def in_words(selected: str, metrics: Mapping[str, float]) -> str:
    """The selected metric, and the same of every number of modalities that a query may have."""
    figure = selected.rpartition("/")[2]
    modes = [name for name in (f"MM-{count}/{figure}" for count in range(1, len(MODALITIES))) if name in metrics]
    words = f"{selected} {metrics[selected]:.4f}"
    if len(modes) > 1:
        words += " (" + ", ".join(f"{name.partition('/')[0]} {metrics[name]:.4f}" for name in modes) + ")"
    return words


class Stopped(Exception):
    """A signal arrived during an evaluation."""


def checked(stop: StopSignal, on_images: Callable[[int], None]) -> Callable[[int], None]:
    """`on_images` that also ends an evaluation once a signal has arrived."""

    def between_chunks(done: int) -> None:
        if stop.requested is not None:
            raise Stopped
        on_images(done)

    return between_chunks


def evaluate_unless_stopped(
    c: Components,
    state: TrainState,
    stages: Sequence[Stage],
    *,
    stop: StopSignal,
    on_images: Callable[[int], None],
) -> dict[Stage, dict[str, float]] | None:
    """Metrics of the state's weights (the average where there is one); None when a signal cut it short."""
    model = state.ema or state.model
    assert isinstance(model, ReID)
    try:
        return {
            stage: evaluate(
                model,
                c.people,
                stage,
                config=c.config,
                token_CL=c.token_CL,
                on_images=checked(stop, on_images),
                rerank=c.config.training.rerank and stage == "test",
            )
            for stage in stages
        }
    except Stopped:
        return None


def compile_or_say_why(c: Components, log: RunLog) -> None:
    """Compile the model in place after trying it on a batch; where that fails, say why once and go on eagerly.

    The trial leaves no trace in the neck's statistics.
    """
    model = c.state.model
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    key = epoch_keys(c, epoch=0)[0]
    batch = augmented(c, Batches(c.samples, c.modalities, 0.0)[key], epoch=0, number=0)
    model.train().compile(mode=c.config.training.compile)
    try:
        output: Output = model(batch)
        torch.autograd.backward([output.logits_FBP.sum() + output.query_CBE.sum()])
    except RuntimeError as error:
        model._compiled_call_impl = None
        log.warn(f"--compile has no effect here, training goes on without it: {str(error).splitlines()[0]}")
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def result_table(
    metrics: Mapping[str, float], others: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows: the model first, re-ranked where that was measured, the baselines below it; means of lists."""
    plain = {name: value for name, value in metrics.items() if RERANKED not in name}
    reranked = {name.replace(RERANKED, ""): value for name, value in metrics.items() if RERANKED in name}
    columns = [
        name for name in plain if name.startswith("MM/") or (name.startswith("MM-") and name.endswith(("/mAP", "/R1")))
    ]
    rows = {APP: plain} | ({f"{APP}{RERANKED}": reranked} if reranked else {}) | dict(others)
    return ["model", *columns], [
        {"model": label, **{name: row[name] for name in columns if name in row}} for label, row in rows.items()
    ]


def write_result(
    c: Components, run_dir: Path, outcome: Outcome, *, notes: list[str], command: str, git: str | None
) -> dict[str, Any]:
    """Write result.json: metrics with their protocol, speed, machine, versions and data; returns what was written."""
    assert outcome.metrics is not None
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    last = list(outcome.metrics)[-1]  # test, where there is such a part
    columns, rows = result_table(outcome.metrics[last], baselines(c.people, last, c.config))

    def typical(name: str) -> float | None:
        values = [line[name] for line in lines if line.get(name) is not None]
        return statistics.median(values) if values else None

    sections = sorted({name for line in lines for name in line if name.startswith("time_")})
    machine = describe_machine()
    summary = c.sampler.summary
    result = {
        "app": APP,
        "title": f"{APP} on {c.people.name}",
        "protocol": protocol_text(c.people, last, c.config),
        "metrics": {
            stage: {"protocol": protocol_text(c.people, stage, c.config), **values}
            for stage, values in outcome.metrics.items()
        },
        "table_columns": columns,
        "table": rows,
        "best_epoch": outcome.progress.best_epoch + 1,
        "steps": outcome.state.step,
        "speed": {
            "samples/s": typical("samples_per_s"),
            "steps/s": typical("steps_per_s"),
        },
        "speed_measured": "median over the logged intervals of training; evaluation and saving are not in it",
        "time_split": {name.removeprefix("time_"): typical(name) for name in sections},
        "machine": machine,
        "versions": {"torch": machine["torch"], "python": machine["python"]},
        "data": {
            "name": c.people.name,
            "identities to train on": c.people.num_identities,
            "samples": summary.num_samples,
            "samples per epoch": summary.num_batches * summary.identities_per_batch * summary.num_instances,
            "images": c.people.num_images,
            "captions": len(c.people.captions),
            "modalities": [MODALITIES[modality] for modality in c.modalities],
            "fingerprint": c.people.fingerprint,
        },
        "precision": c.amp.precision,
        "loader": c.loader.line(),
        "git": git,
        "command": command,
        "notes": notes,
    }
    atomic_write_text(run_dir / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result
