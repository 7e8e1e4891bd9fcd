"""The rungs of graphrec's ladder: what is switched, in which order, and what the notes promise of it.

Legend: U users, I items, P training pairs, B pairs of a step, K negatives, M = 1 + K, C candidate items, F content
features, D embedding dim.

There are two sides. The notes' is CLCRec with a graph contrast (`clcrec-graph`), whatever the configuration's model is;
its content is made up where the data have none, which does not change the speed. LightGCN's is what LightGCN-PyTorch
does. Either starts from its own original arrangement (originals.py), and every switch replaces one thing: with equal
draws losses and gradients are equal (the tests say so), but for the switches whose text says otherwise.
"""

import copy
import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from apps.graphrec import losses
from apps.graphrec.config import Config, ModelConfig, TrainConfig
from apps.graphrec.dataset import STAGES, Batch, Interactions, Stage, epoch_order
from apps.graphrec.evaluate import evaluate_stages, matrices
from apps.graphrec.model import ENCODED, FILTERS, GraphRec, normalised_content
from apps.graphrec.objective import Part as MicroBatch
from apps.graphrec.objective import Step, loss_fn, make_plan
from apps.graphrec.originals import (
    USERS_PER_BATCH,
    USERS_PER_BLOCK,
    Edges,
    Plain,
    PlainLightGCN,
    PlainPairs,
    Triples,
    as_part,
    as_plain,
    coo_adjacency,
    drawn_places,
    edges_of,
    lists_of,
    plain_bpr,
    plain_clcrec,
    plain_contrast,
    plain_metrics,
    plain_ranking,
    plain_splits,
    plain_step,
    plain_triples,
)
from apps.graphrec.train import (
    REPLACE_STREAM,
    Components,
    build,
    chosen_modalities,
    epoch_batches,
    make_optimizer,
    peak_lr,
)
from shared.amp import AmpConfig, amp_step, make_state, resolve_precision
from shared.device import to_device
from shared.ladder import Epoch, Ladder, Part, Run, Rung, Switch, Unmeasured, Work, both_ways, endless
from shared.log import due
from shared.ranking import Lists
from shared.seed import make_generator
from shared.trials import changed

NOTES_BATCH, NOTES_NEGATIVES = 256, 512  # pairs a step and negatives a pair, as in the notes
QUICK_PAIRS = 32  # a step of the notes' side with --quick, so that the slowest rows fit
QUICK_BATCH = 512  # and of LightGCN's
SHARED = 512  # negatives that a batch of LightGCN shares
LARGER = 4  # times as many pairs in a step of LightGCN
WORKERS = (1, 4, 8)  # processes of the notes' loader
WORKED_STEPS = 3  # least of a repeat with worker processes: they load while the step before computes
USERS_TOGETHER = 8192  # users of a step of our evaluation

# What the notes were measured on; features of the original's widths.
NOTES_USERS, NOTES_WARM, NOTES_COLD, NOTES_PAIRS = 55_485, 5_119, 867, 922_007
NOTES_WIDTHS = {"a": 128, "t": 100}
NOTES_HELD_OUT = 60_000  # pairs of either stage with warm items, and as many with cold ones: made up

MORE_THAN_CORES = "This DataLoader will create"  # begins a warning of torch's; but so many workers the notes say

NOTHING: Mapping[str, Any] = MappingProxyType({})

Source = Callable[[int], Iterator[Plain | Step]]  # so many steps' input

WORKERS_CLAIM = "S1-3, S1-4: workers 1 -> 4 -> 8, +30-50 %, 4,500-5,000 samples/s"
BATCH_CLAIM = "S1-7: batches of 512, 1024, +20-40 %"
AMP_CLAIM = "S1-10, S1-11, T-16: AMP, +30-50 % speed, -30-40 % memory"
HALF_CLAIM = "S1-12: half the negatives, +40-50 %"
EVALUATION_CLAIM = "T-6: in no note"

SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "input",
            "fresh exact negatives for thousands of pairs at once, batches by index arithmetic; no data set, no "
            "collation, no workers",
            WORKERS_CLAIM,
        ),
        Switch("graph", "the graph freed in backward instead of kept"),
        Switch("logging", "losses read every --log-every steps instead of five .item() in every step"),
        Switch(
            "views", "two views of the batch's users from their own rows, instead of those of all users from all pairs"
        ),
        Switch(
            "encoder", "features put side by side once, and only items that can occur encoded, instead of all each step"
        ),
        Switch(
            "scores",
            "a user looked up once a pair instead of 1 + K times, products with all candidates instead of gathered "
            "vectors, log-softmax instead of exp",
        ),
        Switch("optimizer", "fused Adam instead of Adam as it comes"),
        Switch("precision", "", AMP_CLAIM),
        Switch("batch", "", BATCH_CLAIM),
        Switch("shared", "negatives shared by a batch: scores are one matrix product; another estimator", alone=False),
    )
}
OURS = frozenset(SWITCHES) - {"precision", "batch", "shared"}  # what `train` has on wherever it runs

LIGHTGCN_SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "sampler",
            "every pair once an epoch, exact negatives for thousands of pairs at once, instead of a Python loop over "
            "users, items and rejections",
        ),
        Switch(
            "operator",
            "one symmetric operator over compressed rows, the same forward and backward, which keeps nothing, instead "
            "of COO products under autograd, stacked and averaged",
        ),
        Switch("lookups", "rows looked up by embedding and squares of norms by node, not by indexing", alone=False),
        Switch("optimizer", "fused Adam instead of Adam as it comes"),
        Switch("shared", "", alone=False),
        Switch("batch", "", "T-17, S1-7: batches of 512, 1024, +20-40 %", alone=False),
    )
}

UNMEASURED = (
    Unmeasured(
        "S1-12, S1-14: half the negatives cost 1-3 % accuracy", "a matter of quality, which whole trainings show"
    ),
    Unmeasured(
        "S1-23: the GPU waits on one worker, small batches make many transfers",
        "`diagnose` says how much of a step waits for input; ours has neither workers nor transfers of batches",
    ),
    Unmeasured(
        "S1-26: an epoch 4.5 -> 2.5-3 minutes, 1,000 epochs 75 -> 42-50 hours",
        "projected from the first and last rows with --project-epochs 1000",
    ),
)
UNMEASURED_ON_CPU = (
    Unmeasured("S1-9, S1-17: pin_memory, +5-10 %", "it speeds up copies to a GPU; this device is a CPU"),
    Unmeasured("S1-24: GPU utilisation over 90 %", "this device is a CPU; on CUDA `diagnose` says how busy it is"),
)


def ladder(config: Config, data: Interactions, *, quick: bool = False, only: Collection[str] = ()) -> Ladder:
    """Everything that `bench` measures under this configuration, on this data.

    `quick` makes batches small; worker processes are then left out, but for rows and parts that `only` names.
    """
    notes = Notes(notes_config(config, data, quick=quick), data)
    lightgcn = LightGCN(lightgcn_config(config, quick=quick), data, shared=config.training.num_negatives or SHARED)
    unmeasured = list(UNMEASURED)
    if notes.device.type != "cuda":
        unmeasured += UNMEASURED_ON_CPU
    if notes.half == "fp32":
        unmeasured.append(Unmeasured(AMP_CLAIM, "fp32 as asked, or no units for half precision here"))
    parts = [
        input_part(notes),
        *notes_parts(notes),
        recipe_part(notes, quick=quick),
        presets_part(notes, quick=quick),
        evaluation_part(notes),
        *lightgcn_parts(lightgcn),
        propagation_part(lightgcn),
        lightgcn_evaluation_part(lightgcn),
    ]
    if quick and not only:
        names = {f"workers-{count}" for count in WORKERS}
        parts[0] = replace(parts[0], rungs=tuple(rung for rung in parts[0].rungs if rung.name not in names))
        parts = [part for part in parts if part.name != "recipe"]
        unmeasured.append(
            Unmeasured(
                "S1-1, S1-3, S1-4, S1-16, S1-19, S1-25: 1, 4 and 8 workers, and the notes' own table",
                "too long for a quick look: without --quick, or with --only recipe --only workers-8",
            )
        )
    return Ladder(tuple(parts), tuple(unmeasured), Epoch("notes", data.num_pairs, "evaluation", data.num_users))


# Configurations


def neutral(training: TrainConfig) -> TrainConfig:
    """The settings of training without what the original arrangements have no counterpart of."""
    return replace(
        training,
        loss="auto",
        negatives="device",
        neg_exclude="train",
        accumulate=1,
        propagate_every=1,
        ema_decay=0.0,
        clip_norm=0.0,
        compile="off",
    )


def notes_config(config: Config, data: Interactions, *, quick: bool = False) -> Config:
    """The configuration with the notes' model; batch and negatives are the notes', unless it has that model already."""
    model, training = config.model, neutral(config.training)
    size, count = NOTES_BATCH, NOTES_NEGATIVES
    if model.model == "clcrec-graph":
        size, count = training.batch_size, training.num_negatives or count
    warm = data.num_items if data.is_cold is None else int((~data.is_cold).sum())
    most = warm - int(data.train.ptr.diff().max())
    training = replace(
        training, batch_size=min(size, QUICK_PAIRS) if quick else size, num_negatives=max(1, min(count, most))
    )
    init = "normal" if model.init == "spectral" else model.init
    return replace(config, model=replace(model, model="clcrec-graph", score="dot", init=init), training=training)


def lightgcn_config(config: Config, *, quick: bool = False) -> Config:
    """The configuration with LightGCN, BPR and one negative a pair; its batch, unless its model is another kind."""
    model, training = config.model, neutral(config.training)
    size = TrainConfig().batch_size if model.model in (*ENCODED, *FILTERS) else training.batch_size
    training = replace(
        training,
        loss="bpr",
        num_negatives=1,
        temperature=1.0,
        precision="fp32",
        batch_size=min(size, QUICK_BATCH) if quick else size,
    )
    init = "normal" if model.init == "spectral" else model.init
    model = replace(model, model="lightgcn", score="dot", combine="mean", bf16_rows=False, init=init)
    return replace(config, model=model, training=training)


def left_out(config: Config, data: Interactions, *, quick: bool = False) -> list[str]:
    """Sentences on what was asked for and is not in the measurements, and on what --quick makes smaller."""
    sides = [notes_config(config, data), lightgcn_config(config)]
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for section, plain in (("model", ModelConfig()), ("training", TrainConfig()))
        for name, value in vars(getattr(config, section)).items()
        if value != getattr(plain, name)
        and all(value != getattr(getattr(side, section), name) for side in sides)
        and name != "num_negatives"  # the notes' own, or those that a batch of LightGCN shares
    ]
    found = [f"measured without {', '.join(flags)}: what is compared has its own"] if flags else []
    if quick:
        found.append(
            f"--quick: at most {QUICK_PAIRS} pairs a step of the notes' model, and {QUICK_BATCH} of LightGCN's"
        )
    return found


def with_content(data: Interactions) -> Interactions:
    """The data, with random content of the real widths where there is none."""
    if data.content:
        return data
    generator = make_generator(0)
    content = {name: torch.randn(data.num_items, width, generator=generator) for name, width in NOTES_WIDTHS.items()}
    return replace(data, content=content)


def half_of(training: TrainConfig, device: torch.device) -> str:
    """The half precision that could be asked for here; fp32 where there is none, or where fp32 was asked for."""
    asked, _ = resolve_precision(training.precision, device)
    if asked != "fp32" or training.precision != "auto":
        return asked
    try:
        return resolve_precision("bf16", device)[0]
    except ValueError:
        return "fp32"


# Both sides


def fresh_model(c: Components) -> GraphRec:
    """Our model with the weights it starts with, sharing graph and content with all others."""
    assert isinstance(c.state.model, GraphRec)
    return copy.deepcopy(c.state.model, {id(buffer): buffer for buffer in c.state.model.buffers()})


def arranged(
    c: Components,
    values: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    is_fused: bool = True,
    precision: str = "fp32",
) -> Components:
    """The components with other values of some knobs, a model of their own, and the optimizer as it comes or fused."""
    config = changed(c.config, values)
    if model is None:
        model = fresh_model(c)
        model.config = config.model
    training = config.training
    if is_fused:
        optimizer = make_optimizer(model, training)
    else:
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=peak_lr(training), weight_decay=training.weight_decay)
    return replace(
        c,
        config=config,
        plan=make_plan(config, c.sampler),
        amp=AmpConfig(precision=precision),
        state=make_state(model, [optimizer], precision=precision, device=c.device),
        steps_per_epoch=-(-c.data.num_pairs // (training.batch_size * training.propagate_every)),
    )


def drawn(c: Components) -> Source:
    """Our steps, epoch after epoch."""

    def epochs() -> Iterator[Step]:
        epoch = 0
        while True:
            yield from epoch_batches(c, epoch=epoch)
            epoch += 1

    steps = epochs()
    return lambda count: islice(steps, count)


def pairs_of(step: Plain | Step) -> int:
    """The positives of a step."""
    return len(step.item) if isinstance(step, Plain) else sum(len(part.batch.item) for part in step.parts)


# The notes' side


class Notes:
    """What all rows of the notes' side share; what takes long is made when it is first asked for."""

    def __init__(self, config: Config, data: Interactions) -> None:
        self.data = with_content(data)
        self.c = build(config, self.data)
        self.config, self.device = config, self.c.device
        self.half = half_of(config.training, self.device)
        self.is_half = resolve_precision(config.training.precision, self.device)[0] != "fp32"  # as configured

    @cached_property
    def pairs(self) -> PlainPairs:
        """The original's data set, of Python integers."""
        return PlainPairs(self.data, self.config.training.num_negatives)

    @cached_property
    def features(self) -> list[Tensor]:
        """Normalised features of all items by modality, [I, F] each."""
        names = chosen_modalities(self.config, self.data)
        return [normalised_content([self.data.content[name]]).to(self.device) for name in names]

    @cached_property
    def edges(self) -> Edges:
        """All training pairs."""
        return edges_of(self.data, self.device)

    def components(self, on: Collection[str], values: Mapping[str, Any] = NOTHING) -> Components:
        """Model, optimizer and state of an arrangement; equal weights for all of them."""
        training = self.config.training
        own: dict[str, Any] = {"batch_size": 2 * training.batch_size} if "batch" in on else {}
        own |= {"negatives": "shared"} if "shared" in on else {}
        precision = self.half if "precision" in on else "fp32"
        return arranged(self.c, {**own, **values}, is_fused="optimizer" in on, precision=precision)

    def source(
        self, c: Components, on: Collection[str], *, workers: int = 0, is_pinned: bool = False, least: int = 1
    ) -> Source:
        """A run's input with those switches on; the original's has `least` steps at least."""
        if "input" in on:
            return drawn(c)
        pairs = copy.copy(self.pairs)
        pairs.num_negatives = c.config.training.num_negatives
        return collated(pairs, c.config.training, workers=workers, is_pinned=is_pinned, least=least)


def halved(count: int) -> int:
    """Half as many negatives, one at least."""
    return max(1, count // 2)


def notes_loss(
    model: nn.Module, step: Plain | Step, *, notes: Notes, c: Components, on: frozenset[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of either form of input and its terms, as the switches say."""
    training, weights = c.config.training, c.plan.weights
    if isinstance(step, Step) and on >= {"views", "encoder", "scores"}:
        return loss_fn(model, step, training=training, plan=c.plan)
    assert isinstance(model, GraphRec)
    part = step.parts[0] if isinstance(step, Step) else as_part(step, model.num_users)
    plain = step if isinstance(step, Plain) else as_plain(part, model.num_users)
    terms = clcrec_terms(model, plain, part, notes=notes, training=training, on=on)
    if "graph" in weights:
        full, temperature = training.graph_view == "full", training.graph_temp
        if "views" in on:
            views = model.user_views(torch.unique(part.batch.user), full=full)
            terms["graph"] = losses.contrast(*views, temperature=temperature)
        else:
            terms["graph"] = plain_contrast(model.table, notes.edges, plain.user, full=full, temperature=temperature)
    return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum(), terms


def clcrec_terms(
    model: GraphRec, plain: Plain, part: MicroBatch, *, notes: Notes, training: TrainConfig, on: frozenset[str]
) -> dict[str, Tensor]:
    """The terms of CLCRec from the same batch in both forms."""
    item_BM, first = plain.item - model.num_users, model.num_users
    if "encoder" in on:
        item_C, row_R = model.distinct(item_BM.flatten())
        content_CD, row_BM = model.encode_items(item_C), row_R.view_as(item_BM)
    else:
        content_CD, row_BM = model.encode(torch.cat(notes.features, dim=1)), item_BM
    if "scores" not in on:
        return plain_clcrec(model.table, content_CD, plain, row_BM, temperature=training.temperature)
    assert part.replaced is not None
    parts = losses.clcrec(
        F.embedding(part.batch.user, model.table),
        F.embedding(item_C + first, model.table) if "encoder" in on else model.table[first:],
        content_CD,
        row_BM,
        part.replaced,
        temperature=training.temperature,
    )
    return {"contrast": parts.contrast, "preference": parts.preference, "reg": parts.norm}


def trainer(
    notes: Notes,
    on: Collection[str],
    values: Mapping[str, Any] = NOTHING,
    *,
    workers: int = 0,
    is_pinned: bool = False,
) -> Run:
    """Training steps of the notes' side with the switches of those names on, and other values of some knobs."""
    c = notes.components(on, values)
    steps_of = notes.source(c, on, workers=workers, is_pinned=is_pinned, least=WORKED_STEPS if workers else 1)
    loss_of = partial(notes_loss, notes=notes, c=c, on=frozenset(on))
    state = c.state
    state.model.train()
    sums: dict[str, Tensor] = {}

    def run(steps: int) -> Work:
        nonlocal state, sums
        samples = done = 0
        for found in steps_of(steps):
            step = to_device(found, c.device) if isinstance(found, Plain) else found
            if "graph" in on:
                state, output = amp_step(state, [step], loss_of, amp=c.amp)
                parts = {"loss": output.loss, **output.scalars}
            else:
                loss, terms = plain_step(state, step, loss_of, precision=c.amp.precision)
                state = replace(state, step=state.step + 1)
                parts = {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            if "logging" not in on:
                for value in parts.values():
                    value.item()  # sync: one for each
                sums = {}
            elif due(state.step, c.config.training.log_every):
                torch.stack(list(sums.values())).tolist()  # sync: one copy for all
                sums = {}
            samples += pairs_of(step)
            done += 1
        return Work(samples, done)

    return run


def notes_parts(notes: Notes) -> tuple[Part, Part]:
    """Training, each switch alone and one after the other; alone also the notes' larger batches and fewer negatives."""
    training, found = notes.config.training, dict(SWITCHES)
    size, count = training.batch_size, training.num_negatives
    found["precision"] = found["precision"]._replace(text=f"{notes.half} instead of fp32 around the whole step")
    found["batch"] = found["batch"]._replace(text=f"{2 * size} pairs in a step instead of {size}: fewer, larger steps")
    switches = [switch for name, switch in found.items() if notes.is_half or name != "precision"]
    alone, cumulative = both_ways(
        "a set difference and random.sample a pair, all items encoded, gathered vectors, exp, views of all users from "
        "all pairs, five .item(), graph kept, Adam",
        switches,
        partial(trainer, notes),
        unit="pairs",
    )
    rungs = [
        Rung(
            "batch-4x",
            f"{4 * size} pairs in a step instead of {size}",
            partial(trainer, notes, (), {"batch_size": 4 * size}),
            BATCH_CLAIM,
        ),
        Rung(
            "half",
            f"{halved(count)} negatives a pair instead of {count}",
            partial(trainer, notes, (), {"num_negatives": halved(count)}),
            HALF_CLAIM,
        ),
    ]
    if notes.half != "fp32" and not notes.is_half:
        rungs.append(Rung("precision", found["precision"].text, partial(trainer, notes, {"precision"}), AMP_CLAIM))
    title = "training of CLCRec with a graph contrast"
    return (
        replace(alone, name="notes-alone", title=f"{title}, each alone", rungs=(*alone.rungs, *rungs)),
        replace(cumulative, name="notes", title=f"{title}, one after the other"),
    )


def recipe_part(notes: Notes, *, quick: bool) -> Part:
    """What the notes advise, done to their own arrangement: the rows of their table."""
    size, count = sizes(notes, quick=quick)
    most, larger = WORKERS[-1], {"batch_size": 2 * size}
    base = {"batch_size": size, "num_negatives": count}
    half = {"precision"} if notes.half != "fp32" else set[str]()
    rungs = [
        Rung(
            "current",
            f"the original arrangement, 1 worker, batch {size}, {count} negatives",
            partial(trainer, notes, (), base, workers=1),
            "S1-1, S1-16, S1-19: 3,464 samples/s, 4.5 minutes an epoch",
        ),
        Rung(
            "workers",
            f"{most} workers",
            partial(trainer, notes, (), base, workers=most),
            "S1-4, S1-16, S1-19: +30-50 %, 4,800 samples/s",
        ),
        Rung(
            "batch",
            f"and batches of {2 * size}",
            partial(trainer, notes, (), base | larger, workers=most),
            "S1-7, S1-16, S1-19: 5,600 samples/s; S1-17, S1-25: +50 % from flags alone",
        ),
    ]
    if notes.device.type == "cuda":
        make = partial(trainer, notes, (), base | larger, workers=most, is_pinned=True)
        rungs.append(Rung("pin", "and pinned memory", make, "S1-9, S1-17, S1-19: +5-10 %, 6,000 samples/s"))
    if half:
        make = partial(trainer, notes, half, base | larger, workers=most, is_pinned=notes.device.type == "cuda")
        claim = "S1-11, S1-16, S1-17: +30-50 %, 6,500-7,500 samples/s"
        rungs.append(Rung("amp", f"and {notes.half}", make, claim))
    extreme = {"batch_size": 4 * size, "num_negatives": halved(count)}
    rungs.append(
        Rung(
            "extreme",
            f"and batches of {4 * size} with {halved(count)} negatives",
            partial(trainer, notes, half, extreme, workers=most, is_pinned=notes.device.type == "cuda"),
            "S1-14, S1-16, S1-19: 8,000-10,000 samples/s, 2.4x in all",
        )
    )
    title = "the notes' own advice, one after the other, in the original arrangement"
    return Part("recipe", title, "train", "pairs", tuple(rungs), cumulative=True)


def sizes(notes: Notes, *, quick: bool) -> tuple[int, int]:
    """The notes' batch and number of negatives, as far as the data have them."""
    return QUICK_PAIRS if quick else NOTES_BATCH, min(NOTES_NEGATIVES, notes.c.sampler.max_negatives)


def presets_part(notes: Notes, *, quick: bool) -> Part:
    """The settings of the notes in our arrangement, each against their smallest."""
    size, count = sizes(notes, quick=quick)
    ours = OURS | {"precision"} if notes.is_half else OURS

    def rung(
        name: str, claim: str = "", *, times: int, negatives: int = count, own: bool = True, half: bool = False
    ) -> Rung:
        values = {"batch_size": times * size, "num_negatives": negatives, "negatives": "device" if own else "shared"}
        text = f"batch {times * size}, {negatives} negatives {'a pair' if own else 'shared by a batch'}"
        on = ours | {"precision"} if half else ours
        return Rung(name, f"{text}, {notes.half}" if half else text, partial(trainer, notes, on, values), claim)

    fewer = halved(count)
    rungs = [
        rung("quality", "S1-15: 4,500-5,000 samples/s, 3-3.5 minutes an epoch", times=1),
        rung("balanced", "S1-7: +20-40 %; S1-13, S1-25: 5,000-6,000 samples/s", times=2),
        rung("large", BATCH_CLAIM, times=4),
        rung("fewer", HALF_CLAIM, times=1, negatives=fewer),
        rung("turbo", "S1-14: 8,000-10,000 samples/s, 1.5-2 minutes an epoch", times=4, negatives=fewer),
        rung("balanced-shared", times=2, own=False),
        rung("turbo-shared", times=4, negatives=fewer, own=False),
    ]
    if notes.half != "fp32" and not notes.is_half:
        rungs.append(rung("balanced-amp", AMP_CLAIM, times=2, half=True))
    return Part("presets", "the notes' settings in our arrangement", "train", "pairs", tuple(rungs))


# Input of the notes' side


class Turns(Sampler[list[int]]):
    """The numbers of the pairs of the next `count` batches, epoch after epoch: in a run's time its own work is done."""

    def __init__(self, num_pairs: int, training: TrainConfig) -> None:
        self.count = 0
        self._batches = self._endless(num_pairs, training)

    @staticmethod
    def _endless(num_pairs: int, training: TrainConfig) -> Iterator[list[int]]:
        epoch = 0
        while True:
            order = epoch_order(num_pairs, seed=training.seed, epoch=epoch)
            yield from (part.tolist() for part in torch.split(order, training.batch_size))
            epoch += 1

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._batches, self.count)


def collated(
    pairs: PlainPairs, training: TrainConfig, *, workers: int = 0, is_pinned: bool = False, least: int = 1
) -> Source:
    """The original's batches: a data set read pair by pair and put together by DataLoader, in worker processes or not.

    A run has `least` batches at least. The processes live as long as what is returned; outside of a run they have
    nothing to do.
    """
    turns, generator = Turns(len(pairs), training), make_generator(training.seed, stream=REPLACE_STREAM)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", MORE_THAN_CORES)
        loader = DataLoader(
            pairs, batch_sampler=turns, num_workers=workers, persistent_workers=workers > 0, pin_memory=is_pinned
        )

    def steps_of(count: int) -> Iterator[Plain]:
        turns.count = max(count, least)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", MORE_THAN_CORES)
            batches = iter(loader)
        for user_BM, item_BM in batches:
            yield Plain(user_BM, item_BM, drawn_places(item_BM, training.num_sample, generator))

    return steps_of


def input_part(notes: Notes) -> Part:
    """Making batches, without any model."""

    def reader(on: Collection[str], values: Mapping[str, Any] = NOTHING, *, workers: int = 0) -> Run:
        # every process has two batches to make at least, or they would not be seen at work together
        steps_of = notes.source(notes.components(on, values), on, workers=workers, least=max(1, 2 * workers))

        def run(steps: int) -> Work:
            samples = done = 0
            for step in steps_of(steps):
                samples += pairs_of(step)
                done += 1
            return Work(samples, done)

        return run

    return Part(
        "input",
        "input alone: batches with their negatives, without any model",
        "input",
        "pairs",
        (
            Rung(
                "original",
                "a set difference, random.sample and two tensors a pair, collated in this process",
                partial(reader, ()),
            ),
            *(
                Rung(
                    f"workers-{count}",
                    f"the same in {count} worker process{'es' if count > 1 else ''}",
                    partial(reader, (), workers=count),
                    "S1-1: 3,464 samples/s with one worker" if count == 1 else WORKERS_CLAIM,
                )
                for count in WORKERS
            ),
            Rung(
                "device",
                "--negatives device: fresh exact ones, thousands of pairs at once, no workers",
                partial(reader, {"input"}),
                "S1-3, S1-4, S1-23: workers keep the device busy",
            ),
            Rung(
                "shared",
                "--negatives shared: one set a batch, with what it must not contain for whom",
                partial(reader, {"input"}, {"negatives": "shared"}),
            ),
        ),
    )


# Evaluation of the notes' side


def evaluation_part(notes: Notes) -> Part:
    """What an epoch's evaluation costs a user: all rankings of the original, and in ours those of validation alone."""
    data, config = notes.data, notes.config
    splits = {name: split for name, split in plain_splits(data).items() if any(split.items)}

    def original() -> Run:
        user_UD, item_ID = (part.cpu() for part in matrices(fresh_model(notes.c)))
        trained = dict(enumerate(lists_of(data.train)))
        blocks = [
            range(begin, min(begin + USERS_PER_BLOCK, data.num_users))
            for begin in range(0, data.num_users, USERS_PER_BLOCK)
        ]
        next_block, k = endless(blocks), min(max(config.training.ks), data.num_items)

        def run(steps: int) -> Work:
            users = 0
            for _ in range(steps):
                block = next_block()
                for split in splits.values():
                    plain_metrics(user_UD, item_ID, trained, split, block, k=k)
                users += len(block)
            return Work(users, steps)

        return run

    def ours(stages: Sequence[Stage]) -> Run:
        model = fresh_model(notes.c).eval()
        some, users = first_users(data, USERS_TOGETHER)

        def run(steps: int) -> Work:
            for _ in range(steps):
                evaluate_stages(model, some, stages, config=config)
            return Work(steps * users, steps)

        return run

    there: list[Stage] = [stage for stage in STAGES if any(name.startswith(stage) for name in splits)]
    rungs = [
        Rung(
            "original",
            f"{len(splits)} full rankings of all items, Python loops over all users for every block of them",
            original,
            EVALUATION_CLAIM,
        ),
        Rung("counted", "one pass of scores, metrics on tensors", partial(ours, there), EVALUATION_CLAIM),
    ]
    if len(there) > 1:
        text = "validation alone, as `train` does: the test data is touched once, at the end"
        rungs.append(Rung("validation", text, partial(ours, there[:1])))
    title = f"evaluation of CLCRec with a graph contrast: {data.num_items:,} items ranked for every user"
    return Part("evaluation", title, "evaluation", "users", tuple(rungs), cumulative=True)


def first_users(data: Interactions, limit: int) -> tuple[Interactions, int]:
    """The data with what the first `limit` users at most have held out, and their number."""

    def cut(lists: Lists) -> Lists:
        ptr = lists.ptr.clamp(max=int(lists.ptr[min(limit, data.num_users)]))
        return Lists(ptr, lists.item[: int(ptr[-1])])

    return replace(data, valid=cut(data.valid), test=cut(data.test)), min(limit, data.num_users)


# LightGCN's side


class LightGCN:
    """What all rows of LightGCN's side share; validation items count as not met, cold items as any others."""

    def __init__(self, config: Config, data: Interactions, *, shared: int = SHARED) -> None:
        nothing = Lists(torch.zeros_like(data.valid.ptr), data.valid.item[:0])
        self.data = replace(data, valid=nothing, is_cold=None, content={})
        self.c = build(config, self.data)
        self.config, self.device = config, self.c.device
        self.shared = min(shared, data.num_items)  # negatives, where a batch shares them

    @cached_property
    def adjacency(self) -> Tensor:
        """The original's matrix."""
        return coo_adjacency(self.data, self.device)

    @cached_property
    def positives(self) -> list[list[int]]:
        """Every user's items, as Python integers."""
        return lists_of(self.data.train)

    def components(self, on: Collection[str], values: Mapping[str, Any] = NOTHING) -> Components:
        """Model, optimizer and state of an arrangement; equal weights for all of them."""
        own: dict[str, Any] = {"batch_size": LARGER * self.config.training.batch_size} if "batch" in on else {}
        if "shared" in on:
            own |= {"loss": "softmax", "negatives": "shared", "num_negatives": self.shared}
        model = None if "operator" in on else PlainLightGCN(fresh_model(self.c), self.adjacency)
        return arranged(self.c, {**own, **values}, model=model, is_fused="optimizer" in on)

    def source(self, c: Components, on: Collection[str]) -> Source:
        """A run's input with those switches on."""
        if "sampler" in on:
            return drawn(c)
        draw = random.Random(c.config.training.seed).randrange

        def steps_of(count: int) -> Iterator[Step]:
            for _ in range(count):
                found = plain_triples(self.positives, self.data.num_items, c.config.training.batch_size, draw=draw)
                user, item, negative = torch.tensor(found).t().contiguous().to(c.device)
                batch = Batch(user, item, negative.unsqueeze(1), None, None)
                yield Step([MicroBatch(batch, None, None, 1.0)], [], 1.0, None)

        return steps_of


def lightgcn_loss(
    model: nn.Module, step: Step, *, c: Components, on: frozenset[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and its terms, as the switches say."""
    if "lookups" in on:
        return loss_fn(model, step, training=c.config.training, plan=c.plan)
    batch = step.parts[0].batch
    assert batch.negative is not None
    triples = Triples(batch.user, batch.item, batch.negative[:, 0])
    if isinstance(model, PlainLightGCN):
        terms = model.losses(triples)
    else:
        assert isinstance(model, GraphRec)
        first, final_ND, table_ND = model.num_users, model().final_ND, model.table
        terms = plain_bpr(final_ND[:first], final_ND[first:], table_ND[:first], table_ND[first:], triples)
    return torch.stack([weight * terms[name] for name, weight in c.plan.weights.items()]).sum(), terms


def lightgcn_trainer(side: LightGCN, on: Collection[str], values: Mapping[str, Any] = NOTHING) -> Run:
    """Training steps of LightGCN with the switches of those names on, and other values of some knobs."""
    c = side.components(on, values)
    steps_of = side.source(c, on)
    loss_of = partial(lightgcn_loss, c=c, on=frozenset(on))
    state = c.state
    state.model.train()

    def run(steps: int) -> Work:
        nonlocal state
        samples = done = 0
        for step in steps_of(steps):
            state, _ = amp_step(state, [step], loss_of, amp=c.amp)
            samples += pairs_of(step)
            done += 1
        return Work(samples, done)

    return run


def lightgcn_parts(side: LightGCN) -> tuple[Part, Part]:
    """Training, each switch alone and one after the other."""
    size, found = side.config.training.batch_size, dict(LIGHTGCN_SWITCHES)
    found["shared"] = found["shared"]._replace(
        text=f"softmax over {side.shared} negatives shared by a batch instead of BPR with one a pair: another objective"
    )
    found["batch"] = found["batch"]._replace(
        text=f"{LARGER * size} pairs share a propagation instead of {size}: fewer, larger steps"
    )
    alone, cumulative = both_ways(
        "a Python loop draws triples, COO products under autograd, indexed rows, Adam",
        list(found.values()),
        partial(lightgcn_trainer, side),
        unit="pairs",
    )
    title = f"training of LightGCN, {side.config.model.layers} layers"
    return (
        replace(alone, name="lightgcn-alone", title=f"{title}, each alone"),
        replace(cumulative, name="lightgcn", title=f"{title}, one after the other"),
    )


def propagation_part(side: LightGCN) -> Part:
    """What flags of `train` do to our propagation: more pairs for each, or half the bytes of its rows."""
    size, on = side.config.training.batch_size, frozenset(LIGHTGCN_SWITCHES) - {"shared", "batch"}
    claim = "T-17: larger batches share a propagation"

    def rung(name: str, text: str, claim: str = "", **values: Any) -> Rung:
        return Rung(name, text, partial(lightgcn_trainer, side, on, values), claim)

    rungs = [
        rung("as trained", f"ours, {size} pairs a propagation, BPR with one negative"),
        rung("batch-2x", f"--batch-size {2 * size}", f"{claim}; S1-7: +20-40 %", batch_size=2 * size),
        rung("batch-4x", f"--batch-size {4 * size}", f"{claim}; S1-7: +20-40 %", batch_size=4 * size),
        rung("propagate-every-4", "--propagate-every 4: four batches for a propagation", claim, propagate_every=4),
    ]
    if side.device.type == "cuda" or side.config.training.kernel != "csr":
        text = "--bf16-rows: rows rounded to half the bytes before each product"
        rungs.append(rung("bf16-rows", text, "T-16: AMP does nothing for a propagation", bf16_rows=True))
    return Part("propagation", "LightGCN: flags of `train` each alone against ours", "train", "pairs", tuple(rungs))


def lightgcn_evaluation_part(side: LightGCN) -> Part:
    """Ranking test users as LightGCN-PyTorch does, and as we do."""
    data, config = side.data, side.config
    k = min(max(config.training.ks), data.num_items)

    def loops(*, again: bool) -> Run:
        model = PlainLightGCN(fresh_model(side.c), side.adjacency)
        tests = lists_of(data.test)
        users = data.test.ptr.diff().nonzero().squeeze(1)
        next_users = endless([part.tolist() for part in torch.split(users, USERS_PER_BATCH)])
        with torch.no_grad():
            known = model.propagated()

        def run(steps: int) -> Work:
            done = 0
            for _ in range(steps):
                batch = next_users()
                plain_ranking(model.propagated if again else lambda: known, batch, side.positives, tests, k=k)
                done += len(batch)
            return Work(done, steps)

        return run

    def ours() -> Run:
        model = fresh_model(side.c).eval()
        some, _ = first_users(data, USERS_TOGETHER)
        users = int((some.test.ptr.diff() > 0).sum())

        def run(steps: int) -> Work:
            for _ in range(steps):
                evaluate_stages(model, some, ("test",), config=config)
            return Work(steps * users, steps)

        return run

    return Part(
        "lightgcn-evaluation",
        f"evaluation of LightGCN: {data.num_items:,} items ranked for every user with test items",
        "evaluation",
        "users",
        (
            Rung(
                "original",
                f"the graph propagated again for every {USERS_PER_BATCH} users, Python loops for masks and hits",
                partial(loops, again=True),
                EVALUATION_CLAIM,
            ),
            Rung("propagated once", "the same loops after one propagation for all", partial(loops, again=False)),
            Rung("counted", "large blocks of users, metrics on tensors; its propagation included", ours),
        ),
        cumulative=True,
    )


# The sizes of the notes


@dataclass(frozen=True)
class Sizes:
    """Those of made-up data."""

    users: int = NOTES_USERS
    warm: int = NOTES_WARM
    cold: int = NOTES_COLD
    pairs: int = NOTES_PAIRS
    held_out: int = NOTES_HELD_OUT


def notes_data(sizes: Sizes = Sizes()) -> Interactions:
    """Made-up data with the sizes that the notes speak of: pairs without a pattern, random content."""
    generator, num_items = make_generator(0), sizes.warm + sizes.cold
    wanted = sizes.pairs + 2 * sizes.held_out

    def skewed(below: int, power: float, count: int) -> Tensor:
        return torch.rand(count, generator=generator).pow_(power).mul_(below).long().clamp_(max=below - 1)

    # few users and few items have many pairs
    key = torch.unique(skewed(sizes.users, 1.5, 2 * wanted) * num_items + skewed(sizes.warm, 2.0, 2 * wanted))
    key = key[torch.randperm(len(key), generator=generator)[:wanted]]
    assert len(key) == wanted, "too many pairs for so few users and items"
    train, valid, test = torch.split(key, [sizes.pairs, sizes.held_out, sizes.held_out])

    def with_cold(warm: Tensor) -> Lists:
        user = torch.randint(sizes.users, (sizes.held_out,), generator=generator)
        cold = user * num_items + torch.randint(sizes.warm, num_items, (sizes.held_out,), generator=generator)
        return as_lists(torch.cat([warm, cold]), num_users=sizes.users, num_items=num_items)

    return Interactions(
        train=as_lists(train, num_users=sizes.users, num_items=num_items),
        valid=with_cold(valid),
        test=with_cold(test),
        content={name: torch.randn(num_items, width, generator=generator) for name, width in NOTES_WIDTHS.items()},
        is_cold=torch.arange(num_items) >= sizes.warm,
        item_ids=tuple(str(i) for i in range(num_items)),
        user_ids=tuple(str(u) for u in range(sizes.users)),
        fingerprint=f"made-up-{sizes.users}-{sizes.warm}-{sizes.cold}-{sizes.pairs}",
        name="made-up data of the notes' sizes",
        split="made up",
    )


def as_lists(key: Tensor, *, num_users: int, num_items: int) -> Lists:
    """Pairs given as user * num_items + item, as rising lists of distinct items."""
    key = torch.unique(key)
    return Lists(torch.searchsorted(key, torch.arange(num_users + 1) * num_items), (key % num_items).int())
