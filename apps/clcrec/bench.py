"""The rungs of clcrec's ladder: what is switched, in which order, and what the notes promise of it.

Legend: U users, I items, W warm items, B pairs of a step, N negatives, M = 1 + N, D embedding dim, P training pairs.

Training starts from the original scripts' arrangement (originals.py). Every switch replaces one thing, and all but the
last leave what is computed as it is: with equal negatives and equal positions replaced by content, losses and gradients
are equal (the tests say so). The last one has more pairs in a step, as the notes recommend.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from apps.clcrec.config import Config, TrainConfig
from apps.clcrec.dataset import STAGES, Batch, ColdStart, Stage, epoch_order, lists_of
from apps.clcrec.evaluate import evaluate_stages, matrices
from apps.clcrec.model import CLCRec
from apps.clcrec.originals import (
    USERS_PER_BLOCK,
    Plain,
    PlainModel,
    PlainPairs,
    StoredPairs,
    as_batch,
    as_plain,
    drawn_places,
    plain_evaluation,
    plain_features,
    plain_splits,
    plain_step,
    sets_of,
)
from apps.clcrec.train import (
    REPLACE_STREAM,
    Components,
    build,
    compile_or_say_why,
    encoded_items,
    epoch_batches,
    loss_fn,
    make_model,
    make_optimizer,
    uses_matrix,
)
from shared import negatives
from shared.amp import AmpConfig, amp_step, make_state, resolve_precision
from shared.device import to_device
from shared.ladder import Epoch, Ladder, Part, Run, Rung, Switch, Unmeasured, Work, both_ways, endless
from shared.log import SilentLog, due
from shared.ranking import Lists
from shared.seed import make_generator, seed_everything

QUICK_BATCH = 64  # pairs a step with --quick, so that the slowest rows fit
LARGER = 4  # times as many pairs in a step: 256 -> 1024 in the notes
SHARED = 1024  # negatives that a step's pairs share
TOP = 10  # of the original's metrics
USERS_TOGETHER = 4096  # users of a step of our evaluation
POOL_ROWS = 1 << 16  # pairs of a step of drawing our pool
POOL_PAIRS = 64  # of drawing the fork's
WORKERS = (4, 8)  # processes of the original's loader, before and after the notes

# What the notes were measured on; features of the original's widths.
NOTES_USERS, NOTES_WARM, NOTES_COLD, NOTES_PAIRS = 55_485, 5_119, 867, 922_007
NOTES_WIDTHS = {"v": 2048, "a": 128, "t": 100}
NOTES_HELD_OUT = 60_000  # pairs of either stage with warm items, and as many with cold ones: made up

NOTHING: Mapping[str, Any] = MappingProxyType({})

Source = Callable[[int], Iterator[Plain | list[Batch]]]  # so many steps' input on the host or device

SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "stored",
            "negatives drawn for all pairs before training and read by index, instead of a set difference and "
            "random.sample for every pair",
            "S0-7, S0-8, S0-12, S0-28, S0-39, S2-9: 1.5-2x, pairs/s 3,400 -> 5,000-6,000 (S0-24)",
        ),
        Switch(
            "device",
            "fresh exact negatives for thousands of pairs at once, batches by index arithmetic; no data set, no "
            "collation, no pool",
            "S0-11, S0-13, S2-10: 7-10 minutes of an epoch saved; experimental in the notes",
        ),
        Switch("graph", "the graph freed in backward instead of kept", "S2-4: retain_graph removed, 1.05x"),
        Switch("logging", "losses read every --log-every steps instead of four .item() in every step"),
        Switch(
            "encoder",
            "features put side by side once, and only items that can occur encoded, instead of all in every step",
        ),
        Switch(
            "lookups",
            "a user looked up once a pair instead of 1 + N times, no copied positives, log-softmax instead of exp",
        ),
        Switch("matrix", "scores by products with all candidates instead of products of gathered vectors"),
        Switch("tables", "users and warm items in tables of their own", alone=False),
        Switch("optimizer", "fused Adam instead of Adam as it comes"),
        Switch("precision", ""),
        Switch("batch", ""),
    )
}

OURS = frozenset(SWITCHES) - {"batch", "precision"}  # what `train` has on wherever it runs

AMP_CLAIM = "S2-1, S2-2: AMP, 1.5-2x"
BATCH_CLAIM = "S0-26, S0-28, S2-8: 1.5-2x; all together S0-25, S0-28, S2-7: 2-4.5x, 10,000-15,000 pairs/s"

UNMEASURED = (
    Unmeasured(
        "S2-5: cudnn.benchmark, 1.1-1.2x",
        "cuDNN chooses among convolutions and this model has none, so the flag cannot change anything",
    ),
    Unmeasured(
        "S0-28: 8 workers instead of 4, 1.2x of a whole step",
        "measured on the input alone (workers-4, workers-8): ours has no work for them",
    ),
    Unmeasured(
        "S0-29: an epoch 8-12 -> 2-3 minutes, 1,000 epochs 130-200 -> 30-50 hours",
        "projected from the first and last rows with --project-epochs 1000",
    ),
    Unmeasured(
        "S0-30, S0-31: a pool of 940 MB fits the host",
        "arithmetic: `train --negatives pool` prints the size before it is allocated",
    ),
    Unmeasured(
        "S2-14, S2-20, S2-21: GPU utilisation 50-70 % -> 90-100 %, 8 GB -> 10-15 GB",
        "`diagnose` says on CUDA how busy the device is, and the memory of a step stands beside each row",
    ),
    Unmeasured(
        "S0-32: reused negatives cost no quality",
        "a matter of quality, which whole trainings show: docs/performance.md has them",
    ),
)


class Setting:
    """What all rows share; what takes long is made when it is first asked for."""

    def __init__(self, config: Config, data: ColdStart) -> None:
        self.config, self.data = config, data
        self.ours = build(config, data)
        self.device = self.ours.device
        precision, _ = resolve_precision(config.training.precision, self.device)
        self.precision = precision if precision != "fp32" else half_of(config.training, self.device)
        self.is_half = precision != "fp32"  # as configured

    @property
    def exclude(self) -> Lists:
        """What no negative of a user is."""
        return self.data.known if self.config.training.neg_exclude == "all" else self.data.trained

    @cached_property
    def features(self) -> list[Tensor]:
        """Those of each modality."""
        return plain_features(self.data, self.ours.modalities, self.device)

    @cached_property
    def pairs(self) -> PlainPairs:
        """The original's data set, of Python integers."""
        return PlainPairs(
            self.data.user.tolist(),
            self.data.item.tolist(),
            self.exclude,
            num_warm=self.data.num_warm,
            num_negatives=self.config.training.num_negatives,
        )

    @cached_property
    def pool_PN(self) -> Tensor:
        """Negatives of all pairs, [P, N] on the device."""
        training = self.config.training
        return negatives.draw_pool(
            self.ours.sampler, self.ours.user_P, training.num_negatives, seed=training.seed, epoch=0
        )

    @cached_property
    def stored(self) -> StoredPairs:
        """The data set that reads them."""
        return StoredPairs(self.data, self.pool_PN.cpu())


def half_of(training: TrainConfig, device: torch.device) -> str:
    """The half precision that could be asked for here; fp32 where there is none, or where fp32 was asked for."""
    if training.precision != "auto":
        return "fp32"
    try:
        return resolve_precision("bf16", device)[0]
    except ValueError:
        return "fp32"


def ladder(config: Config, data: ColdStart, *, quick: bool = False, only: Collection[str] = ()) -> Ladder:
    """Everything that `bench` measures under this configuration, on this data.

    Worker processes are left out of a quick look, and torch.compile is there when `only` names it.
    """
    setting = Setting(comparable(config), data)
    unmeasured = list(UNMEASURED)
    if setting.device.type != "cuda":
        unmeasured.append(
            Unmeasured("S2-3: pin_memory, 1.2-1.5x with workers", "it speeds up copies to a GPU; this device is a CPU")
        )
    if setting.precision == "fp32":
        unmeasured.append(Unmeasured(AMP_CLAIM, "fp32 as asked, or no units for half precision here"))
    alone, cumulative = both_ways(
        "a set difference and random.sample a pair (S0-1, S0-2), collation, all items encoded, gathered vectors, exp, "
        "four .item(), graph kept, Adam",
        switches_of(setting),
        partial(trainer, setting),
        unit="pairs",
    )
    if setting.precision != "fp32" and not setting.is_half:
        make = partial(trainer, setting, frozenset({"precision"}))
        rung = Rung("precision", f"{setting.precision} instead of fp32", make, AMP_CLAIM)
        alone = replace(alone, rungs=(*alone.rungs, rung))
    parts = [input_part(setting), pool_part(setting), alone, cumulative, flags_part(setting), evaluation_part(setting)]
    if quick and not only:
        names = {f"workers-{count}" for count in WORKERS}
        parts[0] = replace(parts[0], rungs=tuple(rung for rung in parts[0].rungs if rung.name not in names))
        unmeasured.append(
            Unmeasured(
                "S0-26, S0-28, S2-3: 4 and 8 workers, 1.2x, 1.2-1.5x",
                "too long for a quick look: without --quick, or with --only workers-4 --only workers-8",
            )
        )
    compiled = compile_part(setting)
    if {compiled.name, *(rung.name for rung in compiled.rungs)} & set(only):
        parts.append(compiled)
    else:
        unmeasured.append(
            Unmeasured(
                "S2-12: torch.compile, mode max-autotune, 1.2-1.5x",
                "compiling takes long: only with --only compile",
            )
        )
    return Ladder(tuple(parts), tuple(unmeasured), Epoch("cumulative", data.num_pairs, "evaluation", data.num_users))


def comparable(config: Config) -> Config:
    """The configuration without what the original arrangement has no counterpart of."""
    training = replace(
        config.training,
        negatives="device",
        neg_power=0.0,
        accumulate=1,
        ema_decay=0.0,
        clip_norm=0.0,
        cold_scale=1.0,
        compile="off",
    )
    return replace(config, training=training)


def left_out(config: Config) -> list[str]:
    """Sentences on what of the configuration is not in the measurements."""
    asked, kept = vars(config.training), vars(comparable(config).training)
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in asked.items() if value != kept[name]]
    return [f"measured without {', '.join(flags)}, which the original has no counterpart of"] if flags else []


def switches_of(setting: Setting) -> list[Switch]:
    """The switches that change anything here, in their order."""
    size, found = setting.config.training.batch_size, dict(SWITCHES)
    found["precision"] = found["precision"]._replace(text=f"{setting.precision} instead of fp32", claim=AMP_CLAIM)
    found["batch"] = found["batch"]._replace(
        text=f"{LARGER * size} pairs in a step instead of {size}: fewer, larger steps", claim=BATCH_CLAIM
    )
    needless = {
        name
        for name, is_needless in (("precision", not setting.is_half), ("matrix", not setting.ours.by_matrix))
        if is_needless
    }
    return [switch for name, switch in found.items() if name not in needless]


# Training


def trainer(setting: Setting, on: Collection[str], values: Mapping[str, Any] = NOTHING) -> Run:
    """Training steps with the switches of those names on, and with other values of some knobs."""
    training = replace(setting.config.training, **values)
    if "batch" in on:
        training = replace(training, batch_size=LARGER * training.batch_size)
    c = components(setting, on, training)
    if training.compile != "off":
        compile_or_say_why(c, RefusingLog())
    state = c.state
    state.model.train()
    steps_of = source(setting, c, on)
    loss_of = partial(loss_by, on=frozenset(on), c=c)
    sums: dict[str, Tensor] = {}

    def run(steps: int) -> Work:
        nonlocal state, sums
        samples = done = 0
        for found in steps_of(steps):
            batches = [to_device(found, c.device)] if isinstance(found, Plain) else found
            sizes = [len(batch.item) for batch in batches]
            samples += sum(sizes)
            done += 1
            if "graph" in on:
                shares = [size / sum(sizes) for size in sizes]
                state, output = amp_step(state, batches, loss_of, amp=c.amp, shares=shares)
                parts = {"loss": output.loss, **output.scalars}
            else:
                (batch,) = batches
                loss, scalars = plain_step(state, batch, loss_of, precision=c.amp.precision)
                state = replace(state, step=state.step + 1)
                parts = {"loss": loss.detach(), **{name: value.detach() for name, value in scalars.items()}}
            sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
            if "logging" not in on:
                for value in parts.values():
                    value.item()  # sync: one for each
                sums = {}
            elif due(state.step, training.log_every):
                torch.stack(list(sums.values())).tolist()  # sync: one copy for all
                sums = {}
        return Work(samples, done)

    return run


class RefusingLog(SilentLog):
    """Makes an error of a warning: what cannot be compiled is not measured as if it were."""

    def warn(self, msg: str) -> None:
        raise ValueError(msg)


def components(setting: Setting, on: Collection[str], training: TrainConfig) -> Components:
    """Model, optimizer and state of an arrangement; equal weights for all of them."""
    c, config = setting.ours, replace(setting.config, training=training)
    ours = fresh_model(setting)
    model: nn.Module = ours if "tables" in on else PlainModel(ours, setting.features)
    if "optimizer" in on:
        optimizer = make_optimizer(model, training)
    else:
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    precision = setting.precision if "precision" in on else "fp32"
    size = -(-min(training.batch_size, c.data.num_pairs) // training.accumulate)
    candidates, encodes_batch = encoded_items(training, size, c.data.num_warm)
    return replace(
        c,
        config=config,
        by_matrix=uses_matrix(training, candidates),
        encodes_batch=encodes_batch,
        amp=AmpConfig(precision=precision, clip_norm=training.clip_norm),
        state=make_state(model, [optimizer], precision=precision, device=c.device),
        steps_per_epoch=-(-c.data.num_pairs // training.batch_size),
    )


def fresh_model(setting: Setting) -> CLCRec:
    """Our model with the weights it starts with, sharing its content with all others."""
    seed_everything(setting.config.training.seed)
    model = make_model(setting.config, setting.data).to(setting.device)
    known = setting.ours.state.model
    assert isinstance(known, CLCRec)
    model.content = known.content
    return model


def loss_by(
    model: nn.Module, batch: Plain | Batch, *, on: frozenset[str], c: Components
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of either form of input, as the switches say."""
    training, num_users = c.config.training, c.data.num_users
    if isinstance(model, PlainModel) and not {"lookups", "matrix"} & on:
        plain = batch if isinstance(batch, Plain) else as_plain(batch, num_users)
        return model.by_vectors(plain, training=training, is_prepared="encoder" in on)
    ours = as_batch(batch, num_users) if isinstance(batch, Plain) else batch
    if isinstance(model, PlainModel):
        return model.by_lookups(ours, training=training, is_prepared="encoder" in on, by_matrix="matrix" in on)
    return loss_fn(model, ours, training=training, by_matrix=c.by_matrix, encodes_batch=c.encodes_batch)


# Input


def source(setting: Setting, c: Components, on: Collection[str]) -> Source:
    """A run's input with those switches on, step after step and epoch after epoch."""
    if "device" in on:
        return drawn(c, setting.pool_PN if c.config.training.negatives == "pool" else None)
    return collated(setting.stored if "stored" in on else setting.pairs, c.config.training, device=c.device)


def drawn(c: Components, pool_PN: Tensor | None = None) -> Source:
    """Our batches."""

    def epochs() -> Iterator[list[Batch]]:
        epoch = 0
        while True:
            yield from epoch_batches(c, epoch=epoch, pool_PN=pool_PN)
            epoch += 1

    steps = epochs()
    return lambda count: islice(steps, count)


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
    pairs: Dataset[tuple[Tensor, Tensor]], training: TrainConfig, *, device: torch.device, workers: int = 0
) -> Source:
    """The original's batches: a data set read pair by pair and put together by DataLoader, in worker processes or not.

    The processes live as long as what is returned; outside of a run they have nothing to do.
    """
    assert isinstance(pairs, (PlainPairs, StoredPairs))
    turns, generator = Turns(len(pairs), training), make_generator(training.seed, stream=REPLACE_STREAM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores: so the notes say
        loader = DataLoader(
            pairs,
            batch_sampler=turns,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

    def steps_of(count: int) -> Iterator[Plain]:
        turns.count = count
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            batches = iter(loader)
        for user_BM, item_BM in batches:
            yield Plain(user_BM, item_BM, drawn_places(item_BM, training.num_sample, generator))

    return steps_of


def reader(make: Callable[[], Source]) -> Callable[[], Run]:
    """What makes a run that only takes its input."""

    def made() -> Run:
        steps_of = make()

        def run(steps: int) -> Work:
            samples = done = 0
            for batches in steps_of(steps):
                parts = [batches] if isinstance(batches, Plain) else batches
                samples += sum(len(part.item) for part in parts)
                done += 1
            return Work(samples, done)

        return run

    return made


def input_part(setting: Setting) -> Part:
    """Making batches, without any model."""
    training, device = setting.config.training, setting.device

    def plain(workers: int) -> Source:
        return collated(setting.pairs, training, device=device, workers=workers)

    def pooled() -> Source:
        pool = replace(setting.config, training=replace(training, negatives="pool"))
        return drawn(replace(setting.ours, config=pool), setting.pool_PN)

    claims = ("S0-26, S2-3: 1.2-1.5x with workers and pinned memory", "S0-26, S0-28: 8 workers instead of 4, 1.2x")
    return Part(
        "input",
        "input alone: batches with their negatives, without any model",
        "input",
        "pairs",
        (
            Rung(
                "original",
                "a set difference, random.sample and two tensors a pair, collated in this process",
                reader(partial(plain, 0)),
                "S0-1, S0-2, S0-5, S0-23: 0.5-1 ms a pair, 7-10 minutes an epoch",
            ),
            *(
                Rung(f"workers-{count}", f"the same in {count} worker processes", reader(partial(plain, count)), claim)
                for count, claim in zip(WORKERS, claims, strict=True)
            ),
            Rung(
                "stored",
                "negatives drawn beforehand, read pair by pair and collated",
                reader(lambda: collated(setting.stored, training, device=device)),
                "S0-7, S0-8, S0-24: loading takes about no time",
            ),
            Rung(
                "pool",
                "--negatives pool: the same negatives, a batch by one lookup",
                reader(pooled),
                "S0-9, S2-11: drawn again every N epochs",
            ),
            Rung(
                "device",
                "--negatives device: fresh exact ones, thousands of pairs at once",
                reader(lambda: drawn(setting.ours)),
                "S0-11, S0-13, S2-10: 7-10 minutes of an epoch saved",
            ),
        ),
    )


def pool_part(setting: Setting) -> Part:
    """Drawing all pairs' negatives before training."""
    training, count = setting.config.training, setting.data.num_pairs

    def original() -> Run:
        next_pairs = endless(torch.split(torch.arange(count), POOL_PAIRS)[: max(1, count // POOL_PAIRS)])

        def run(steps: int) -> Work:
            done = 0
            for _ in range(steps):
                users = [setting.pairs.user[i] for i in next_pairs().tolist()]
                torch.tensor([setting.pairs.negatives(user) for user in users])
                done += len(users)
            return Work(done, steps)

        return run

    def ours() -> Run:
        user_R = setting.ours.user_P[:POOL_ROWS]

        def run(steps: int) -> Work:
            for epoch in range(steps):
                negatives.draw_pool(
                    setting.ours.sampler, user_R, training.num_negatives, seed=training.seed, epoch=epoch
                )
            return Work(steps * len(user_R), steps)

        return run

    return Part(
        "construction",
        f"drawing a pool of negatives before training, for {count:,} pairs of this data",
        "input",
        "pairs",
        (
            Rung("original", "a set difference and random.sample a pair (the fork's constructor)", original),
            Rung("drawn", "by index arithmetic, thousands of pairs at once", ours, "S0-10: 20-30 s for 922,007 pairs"),
        ),
    )


# Flags


def flags_part(setting: Setting) -> Part:
    """What flags of `train` do to our arrangement, each alone."""
    size, shared = setting.config.training.batch_size, min(SHARED, setting.data.num_warm)
    on = ours(setting)

    def rung(name: str, text: str, claim: str = "", **values: Any) -> Rung:
        return Rung(name, text, partial(trainer, setting, on, values), claim)

    rungs = [
        rung("as configured", f"all of ours, {size} pairs in a step"),
        rung(
            "pooled",
            "--negatives pool: a pool instead of fresh negatives",
            "S0-19, S0-20, S0-21, S0-22, S2-11",
            negatives="pool",
        ),
        rung(
            "shared",
            f"--negatives shared: {shared} negatives shared by a step: another estimator",
            negatives="shared",
            num_negatives=shared,
            replacement="bernoulli",
        ),
        rung(
            f"batch-{2 * size}",
            f"--batch-size {2 * size}: fewer, larger steps",
            "S2-8, S2-17: 1.5-2x (S0-28)",
            batch_size=2 * size,
        ),
        rung(
            f"batch-{4 * size}",
            f"--batch-size {4 * size}: fewer, larger steps",
            "S0-16, S0-26, S2-8",
            batch_size=4 * size,
        ),
        rung(
            "accumulate-4",
            f"--batch-size {4 * size} --accumulate 4: 4 micro-batches a step, less memory",
            "S2-13: gradient accumulation",
            batch_size=4 * size,
            accumulate=4,
        ),
    ]
    if setting.precision != "fp32":
        other = "fp32" if setting.is_half else setting.precision
        make = partial(trainer, setting, on ^ {"precision"})
        rungs.append(Rung(other, f"--precision {other}", make, AMP_CLAIM))
    return Part("flags", "training, flags of `train` each alone against ours", "train", "pairs", tuple(rungs))


def ours(setting: Setting) -> frozenset[str]:
    """The switches that are on in `train` as it is configured."""
    return OURS | {"precision"} if setting.is_half else OURS


def compile_part(setting: Setting) -> Part:
    """What torch.compile does to our arrangement."""
    claim, mode, on = "S2-12: max-autotune, 1.2-1.5x", "max-autotune", ours(setting)
    return Part(
        "compile",
        "training, compiled or not",
        "train",
        "pairs",
        (
            Rung("eager", "all of ours", partial(trainer, setting, on)),
            Rung("compiled", "--compile default", partial(trainer, setting, on, {"compile": "default"}), claim),
            Rung("max-autotune", "--compile max-autotune", partial(trainer, setting, on, {"compile": mode}), claim),
        ),
    )


# Evaluation


def evaluation_part(setting: Setting) -> Part:
    """What an epoch's evaluation costs a user: six rankings, and in ours those of validation alone."""
    data = setting.data

    def original() -> Run:
        model = fresh_model(setting).eval()
        result = torch.cat(matrices(model))
        trained, splits = sets_of(data.trained, data.num_users), plain_splits(data)
        blocks = [
            range(begin, min(begin + USERS_PER_BLOCK, data.num_users))
            for begin in range(0, data.num_users, USERS_PER_BLOCK)
        ]
        next_block = endless(blocks)

        def run(steps: int) -> Work:
            users = 0
            for _ in range(steps):
                block = next_block()
                plain_evaluation(result, data.num_users, trained, splits, k=min(TOP, data.num_items), users=block)
                users += len(block)
            return Work(users, steps)

        return run

    def ours(stages: Sequence[Stage]) -> Run:
        model = fresh_model(setting).eval()
        some, users = first_users(data, USERS_TOGETHER)

        def run(steps: int) -> Work:
            for _ in range(steps):
                evaluate_stages(model, some, stages, config=setting.config)
            return Work(steps * users, steps)

        return run

    return Part(
        "evaluation",
        f"evaluation: all {data.num_items:,} items ranked for every user, for validation and test, all, warm and cold",
        "evaluation",
        "users",
        (
            Rung(
                "original",
                "six full rankings, Python loops over all users for every block of them",
                original,
                "T-6: in no note",
            ),
            Rung(
                "counted",
                "three sets of scores, positives' ranks counted, metrics on tensors",
                partial(ours, STAGES),
                "T-6: in no note",
            ),
            Rung(
                "validation",
                "validation alone, as `train` does: the test data is touched once, at the end",
                partial(ours, ("valid",)),
            ),
        ),
        cumulative=True,
    )


def first_users(data: ColdStart, limit: int) -> tuple[ColdStart, int]:
    """The data with what the first `limit` users at most have held out, and their number."""

    def cut(lists: Lists) -> Lists:
        ptr = lists.ptr.clamp(max=int(lists.ptr[min(limit, data.num_users)]))
        return Lists(ptr, lists.item[: int(ptr[-1])])

    return replace(data, valid=cut(data.valid), test=cut(data.test)), min(limit, data.num_users)


# The sizes of the notes


def weighted_items(num_warm: int, count: int, generator: torch.Generator) -> Tensor:
    """Items whose popularity falls with their number as a lognormal sample's does, [count] int64."""
    weight = torch.randn(num_warm, generator=generator).mul_(1.5).exp_().sort(descending=True).values
    share = (weight.cumsum(0) / weight.sum())[:-1]
    return torch.searchsorted(share, torch.rand(count, generator=generator))


def made_pairs(num_users: int, num_warm: int, num_items: int, generator: torch.Generator) -> Tensor:
    """Distinct pairs as user * num_items + warm item, in random order; lognormal numbers of items a user."""
    degree = torch.randn(num_users, generator=generator).add_(math.log(10)).exp_().mul_(1.5).long().clamp_(1, 638)
    user = torch.repeat_interleave(degree)
    key = torch.unique(user * num_items + weighted_items(num_warm, len(user), generator))
    return key[torch.randperm(len(key), generator=generator)]


def notes_data(
    *,
    num_users: int = NOTES_USERS,
    num_warm: int = NOTES_WARM,
    num_cold: int = NOTES_COLD,
    num_pairs: int = NOTES_PAIRS,
    held_out: int = NOTES_HELD_OUT,
) -> ColdStart:
    """Made-up data with the sizes that the notes speak of: pairs without a pattern, random content."""
    generator, num_items = make_generator(0), num_warm + num_cold
    key = made_pairs(num_users, num_warm, num_items, generator)[: num_pairs + 2 * held_out]
    train, valid, test = torch.split(key, [num_pairs, held_out, held_out])

    def cold(count: int) -> Tensor:
        user = torch.randint(num_users, (count,), generator=generator)
        return user * num_items + torch.randint(num_warm, num_items, (count,), generator=generator)

    valid, test = torch.cat([valid, cold(held_out)]), torch.cat([test, cold(held_out)])
    known, valid_lists, test_lists = (
        lists_of(part // num_items, part % num_items, num_users)
        for part in (torch.cat([key, valid, test]), valid, test)
    )
    return ColdStart(
        num_warm=num_warm,
        user=(train // num_items).int(),
        item=(train % num_items).int(),
        known=known,
        valid=valid_lists,
        test=test_lists,
        content={name: torch.randn(num_items, width, generator=generator) for name, width in NOTES_WIDTHS.items()},
        words=None,
        item_ids=tuple(str(num_users + i) for i in range(num_items)),
        user_ids=tuple(str(u) for u in range(num_users)),
        fingerprint=f"made-up-{num_users}-{num_warm}-{num_cold}-{num_pairs}",
        name="made-up data of the notes' sizes",
    )
