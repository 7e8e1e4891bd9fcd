"""The rungs of seqrec's ladder: what is switched, in which order, and what the notes promise of it.

Legend: B sequences of a step, N targets, D embedding dim, I items + 1.

Training starts from the contest's arrangement (originals.py) with this app's model: one negative per position, rows of
max_len columns. Every switch replaces one thing, and all but the last leave what is computed as it is: with equal
negatives and without dropout the losses are equal (the tests say so).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.seqrec import losses
from apps.seqrec.config import Config
from apps.seqrec.contest import prepare_contest, read_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_features import training_sequences
from apps.seqrec.dataset import (
    Batch,
    HeldOut,
    Sequences,
    Spans,
    draw_unseen,
    epoch_order,
    number_within,
    query_spans,
    training_spans,
    without_features,
)
from apps.seqrec.evaluate import evaluate
from apps.seqrec.model import SeqRec
from apps.seqrec.originals import (
    Dictionaries,
    Padded,
    as_batch,
    gathered,
    padded_loss,
    sorted_metrics,
    use_manual_attention,
    use_plain_dropout,
)
from apps.seqrec.train import (
    DROPOUT_STREAM,
    UNSEEN_STREAM,
    Components,
    build,
    loss_fn,
    make_model,
    make_optimizers,
    step_batches,
    targets_of,
    use_packed,
)
from shared.amp import AmpConfig, amp_step, make_state, resolve_precision
from shared.device import pick_device, to_device
from shared.faults import DataError
from shared.ladder import Epoch, Ladder, Part, Run, Rung, Switch, Unmeasured, Work, both_ways, endless
from shared.log import due
from shared.seed import make_generator, seed_step

NOTES_BATCH, NOTES_LENGTH = 128, 101  # sequences a step and events a sequence, as in the contest
NOTES_USERS, NOTES_ITEMS, NOTES_MEAN = 2000, 58_734, 91  # as many items and events a user as there; fewer users
QUICK_BATCH = 32  # sequences a step with --quick, so that the slowest rows fit
CHUNKS = 8  # steps' worth of users that every row goes round in
USERS_ALONE, USERS_TOGETHER = 32, 512  # users of a step of evaluation: the original's loop, and ours

SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "tensors",
            "batches gathered from prepared tensors; the original parses a line and fills a dictionary per position",
            "S3-1, S3-4, S3-26: +20-30 % loading speed",
        ),
        Switch(
            "rows",
            "features looked up once for the distinct rows of a step; the original fills a tensor per feature and "
            "looks up every position",
            "S3-8: batched feature processor",
        ),
        Switch(
            "attention",
            "fused attention instead of written-out softmax",
            "S3-6, S3-25: flash attention, +30-50 % training speed",
        ),
        Switch("dropout", "eight masks from one random word instead of torch's dropout"),
        Switch("layout", "", alone=False),
        Switch("optimizer", "fused Adam instead of Adam as it comes"),
        Switch("logging", "the loss read every --log-every steps instead of every step"),
        Switch("precision", ""),
        Switch("loss", "", alone=False),
    )
}

UNMEASURED = (
    Unmeasured("S3-2, S3-3, S3-7, S3-9", "features, validation, norm order and initialisation promise no speed"),
    Unmeasured("S3-5: data cache", "packs are made once by `prepare`, before any step; nothing of it is in a step"),
    Unmeasured("S3-28: convergence +20 %, accuracy +5-10 %", "a matter of quality, which whole trainings would show"),
)


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    config: Config  # as asked
    plain: Config  # with the original's loss
    sequences: Sequences
    device: torch.device
    chunks: tuple[Spans, ...]  # steps of the training pieces
    data: Dictionaries


def ladder(config: Config, sequences: Sequences) -> Ladder:
    """Everything that `bench` measures under this configuration, on this data."""
    if config.model.attention != "softmax":
        raise ValueError(
            f"bench compares kernels of softmax attention, but attention is {config.model.attention}; "
            "use --attention softmax"
        )
    setting = make_setting(comparable(config), sequences)
    spans = query_spans(sequences, "valid", max_len=1)
    evaluations = spans.user.numel() // config.training.eval_every
    num_spans = training_spans(sequences, max_len=config.data.max_len, window=config.data.window).user.numel()
    return Ladder(
        (
            input_part(setting),
            *both_ways(
                "a dictionary per position, softmax written out, one negative, Adam, the loss read every step",
                switches_of(setting),
                partial(trainer, setting),
                unit="sequences",
            ),
            memory_part(setting),
            loss_part(setting),
            evaluation_part(setting),
        ),
        UNMEASURED,
        Epoch("cumulative", num_spans, "evaluation", evaluations),
    )


def notes_shape(config: Config, folder: Path) -> tuple[Config, Sequences]:
    """The configuration and made-up data with the contest's sizes; the data is written into `folder` once."""
    source = write_contest(
        folder / "notes-data", num_users=NOTES_USERS, num_items=NOTES_ITEMS, mean_length=NOTES_MEAN, seed=1
    )
    try:
        contest = read_contest(folder / "notes-pack")
    except DataError:  # absent, or made of other data
        contest = prepare_contest(source, folder / "notes-pack", workers=1)
    return (
        replace(
            config,
            data=replace(config.data, max_len=NOTES_LENGTH),
            training=replace(config.training, batch_size=NOTES_BATCH),
        ),
        training_sequences(contest),
    )


def comparable(config: Config) -> Config:
    """The configuration without what the original arrangement has no counterpart of."""
    kind = "adamw" if config.training.optimizer == "muon" else config.training.optimizer
    return replace(
        config,
        model=replace(config.model, time_input=False, query_time=False, grad_checkpoint=False),
        training=replace(config.training, accumulate=1, ema_decay=0.0, optimizer=kind, action_weights=(1.0, 1.0, 1.0)),
    )


def left_out(config: Config) -> list[str]:
    """Sentences on what of the configuration is not in the measurements."""
    sides = (config, comparable(config))
    flags = [
        f"--{name.replace('_', '-')}"
        for section in ("model", "training")
        for name, value in vars(getattr(sides[0], section)).items()
        if value != getattr(getattr(sides[1], section), name)
    ]
    flags += ["--compile"] if config.training.compile != "off" else []
    return [f"measured without {', '.join(flags)}, which the original has no counterpart of"] if flags else []


def make_setting(config: Config, sequences: Sequences) -> Setting:
    """The steps and the original's objects that the rows share; the same for the same arguments."""
    device = pick_device(config.training.device)
    if not config.model.features:
        sequences = without_features(sequences)
    elif sequences.features is not None:
        wanted = sequences.features.with_families(config.model.embeddings, name=sequences.name)
        sequences = replace(sequences, features=wanted)
    spans = training_spans(sequences, max_len=config.data.max_len, window=config.data.window)
    size = min(config.training.batch_size, spans.user.numel())
    order = epoch_order(spans.user.numel(), seed=config.training.seed, epoch=0)
    chunks = tuple(spans.take(rows) for rows in torch.split(order, size)[:CHUNKS] if rows.numel() == size)
    plain = replace(config, training=replace(config.training, loss="bce"))
    front = make_model(config, sequences, torch.device("cpu")).front is not None
    users = torch.cat([chunk.user for chunk in chunks])
    data = Dictionaries(sequences, users, max_len=config.data.max_len, front=front, seed=config.training.seed)
    return Setting(config, plain, sequences, device, chunks, data)


def switches_of(setting: Setting) -> list[Switch]:
    """The switches that change anything here, in their order."""
    training, found = setting.config.training, dict(SWITCHES)
    precision, _ = resolve_precision(training.precision, setting.device)
    packed = use_packed(setting.config.data.layout, setting.device)
    found["layout"] = found["layout"]._replace(
        text="several sequences in a row" if packed else "rows as long as the longest sequence of the step"
    )
    found["precision"] = found["precision"]._replace(text=f"{precision} instead of fp32")
    found["loss"] = found["loss"]._replace(
        text=f"--loss {training.loss} instead of one negative per position: another objective"
    )
    needless = [
        name
        for name, is_needless in (
            ("rows", setting.sequences.features is None),
            ("dropout", setting.config.model.dropout == 0 or setting.device.type != "cpu"),
            ("precision", precision == "fp32"),
            ("loss", training.loss == "bce"),
        )
        if is_needless
    ]
    return [switch for name, switch in found.items() if name not in needless]


# Training


def components(setting: Setting, on: frozenset[str]) -> Components:
    """Model, optimizer and state of an arrangement; equal weights for all of them."""
    c = build(setting.config if "loss" in on else setting.plain, setting.sequences)
    model = c.state.model
    assert isinstance(model, SeqRec)
    if "attention" not in on:
        use_manual_attention(model)
    if "dropout" not in on:
        use_plain_dropout(model)
    precision = c.amp.precision if "precision" in on else "fp32"
    training = setting.config.training
    optimizers = make_optimizers(model, training)
    if "optimizer" not in on:
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        optimizers = [kind(model.parameters(), training.lr, (0.9, 0.98), weight_decay=training.weight_decay)]
    state = make_state(model, optimizers, precision=precision, device=c.device)
    return replace(c, state=state, amp=AmpConfig(precision=precision, clip_norm=training.clip_norm))


def trainer(setting: Setting, on: frozenset[str], *, grad_checkpoint: bool = False) -> Run:
    """Training steps with the switches of those names on."""
    if grad_checkpoint:
        setting = replace(setting, plain=with_checkpoint(setting.plain), config=with_checkpoint(setting.config))
    c = components(setting, on)
    state = c.state
    state.model.train()
    next_chunk = endless(setting.chunks)
    every = setting.config.training.log_every
    total = torch.zeros((), device=c.device)

    def run(steps: int) -> Work:
        nonlocal state, total
        samples = 0
        for _ in range(steps):
            spans = next_chunk()
            batches = [moved(batch, c.device) for batch in inputs(setting, c, on, spans, index=state.step)]
            seed_step(c.config.training.seed, 0, state.step, DROPOUT_STREAM)
            state, output = amp_step(state, batches, partial(loss_of, setting, c), amp=c.amp)
            total += output.loss
            if "logging" not in on or due(state.step, every):
                float(total)  # sync: what the log would show
                total = torch.zeros_like(total)
            samples += spans.user.numel()
        return Work(samples, steps)

    return run


def with_checkpoint(config: Config) -> Config:
    """The configuration with --grad-checkpoint."""
    return replace(config, model=replace(config.model, grad_checkpoint=True))


def inputs(
    setting: Setting, c: Components, on: frozenset[str], spans: Spans, *, index: int
) -> Sequence[Padded | Batch]:
    """A step's input on the host, by the arrangement with these switches on."""
    if "layout" in on:
        return step_batches(c, spans, epoch=0, index=index)
    columns = "rows" not in on and setting.sequences.features is not None
    if "tensors" in on:
        padded = gathered(setting.data, spans, unseen_items(c, spans, index=index), columns=columns)
    else:
        padded = setting.data.batch(spans, columns=columns)
    return [padded if "rows" not in on and columns else as_batch(setting.data, padded)]


def unseen_items(c: Components, spans: Spans, *, index: int) -> Tensor:
    """An item that its user has not seen for every target of a step, as training draws them, [N] int64."""
    assert c.seen is not None
    sequence, _ = number_within(targets_of(spans, c.front))
    generator = make_generator(c.config.training.seed, epoch=0, step=index, stream=UNSEEN_STREAM)
    return draw_unseen(c.seen, spans.user[sequence], generator)


def loss_of(setting: Setting, c: Components, model: nn.Module, batch: Padded | Batch) -> tuple[Tensor, dict[str, Any]]:
    """The loss of either form of input."""
    if isinstance(batch, Batch):
        return loss_fn(model, batch, training=c.config.training, log_q_I=c.log_q_I)
    assert isinstance(model, SeqRec)
    return padded_loss(model, setting.data, batch), {}


def moved(batch: Padded | Batch, device: torch.device) -> Padded | Batch:
    """Either form of input on `device`."""
    if isinstance(batch, Batch):
        return to_device(batch, device)
    column = tuple({name: to_device(value, device) for name, value in part.items()} for part in batch.column)
    return to_device(batch, device)._replace(column=column)


# Input alone


def input_part(setting: Setting) -> Part:
    """Making batches, without any model."""

    def make(form: str) -> Run:
        c = build(setting.plain, setting.sequences)
        on = {
            "original": frozenset[str](),
            "gathered": frozenset({"tensors"}),
            "as trained": frozenset({"tensors", "rows", "layout"}),
        }[form]
        next_chunk, index = endless(setting.chunks), 0

        def run(steps: int) -> Work:
            nonlocal index
            samples = 0
            for _ in range(steps):
                spans = next_chunk()
                inputs(setting, c, on, spans, index=index)
                index += 1
                samples += spans.user.numel()
            return Work(samples, steps)

        return run

    claim = SWITCHES["tensors"].claim
    return Part(
        "input",
        "input alone: batches with their negatives, without any model",
        "input",
        "sequences",
        (
            Rung(
                "original",
                "lines parsed, a dictionary per position, tensors filled by feature",
                partial(make, "original"),
            ),
            Rung("gathered", "the same tensors by index arithmetic", partial(make, "gathered"), claim),
            Rung("as trained", "distinct rows of features instead of columns", partial(make, "as trained"), claim),
        ),
    )


# Memory


def memory_part(setting: Setting) -> Part:
    """What recomputing the blocks saves, and costs."""
    on = frozenset(switch.name for switch in switches_of(setting))
    return Part(
        "memory",
        "memory: all switches on, blocks recomputed in backward or not",
        "train",
        "sequences",
        (
            Rung("kept", "every activation kept for backward", partial(trainer, setting, on)),
            Rung(
                "grad-checkpoint",
                "--grad-checkpoint: blocks recomputed",
                partial(trainer, setting, on, grad_checkpoint=True),
                "S3-10, S3-27: memory -15-25 %",
            ),
        ),
    )


# Losses


def loss_part(setting: Setting) -> Part:
    """Losses over the catalogue, forward and backward, of one step's queries."""
    num_items = setting.sequences.num_items
    target_N = step_targets(setting).to(setting.device)
    width = setting.config.model.embed_dim
    generator = make_generator(setting.config.training.seed)

    def make(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        query_ND = torch.randn(target_N.numel(), width, generator=generator).to(setting.device).requires_grad_()
        item_ID = torch.randn(num_items + 1, width, generator=generator).to(setting.device).requires_grad_()

        def run(steps: int) -> Work:
            for _ in range(steps):
                query_ND.grad = item_ID.grad = None
                loss(query_ND, item_ID).backward()  # type: ignore[no-untyped-call]
            return Work(steps * target_N.numel(), steps)

        return run

    shared = min(setting.config.training.num_negatives, num_items)
    negative_K = torch.randint(1, num_items + 1, (shared,), generator=generator).to(setting.device)
    negative_N = torch.randint(1, num_items + 1, target_N.shape, generator=generator).to(setting.device)
    return Part(
        "losses",
        f"losses over {num_items:,} items, forward and backward, {target_N.numel():,} targets a step",
        "train",
        "targets",
        (
            Rung("all logits", "cross-entropy of one matrix of all logits", partial(make, partial(plain_ce, target_N))),
            Rung(
                "chunks",
                "the same, logits made chunk by chunk, both gradients in forward",
                partial(make, lambda query, item: losses.full_cross_entropy(query, item, target_N)),
                "S3-27: memory -15-25 %",
            ),
            Rung(
                "sampled",
                f"softmax over {shared} shared negatives: an estimate",
                partial(make, lambda query, item: losses.sampled_softmax(query, item, target_N, negative_K)),
            ),
            Rung(
                "bce",
                "one negative per position: another objective",
                partial(make, lambda query, item: losses.binary_cross_entropy(query, item, target_N, negative_N)),
            ),
        ),
    )


def step_targets(setting: Setting) -> Tensor:
    """The targets of the first step, [N] int64."""
    spans = setting.chunks[0]
    sequence, step = number_within(targets_of(spans, setting.data.front))
    return setting.sequences.item[(spans.start + 1 - int(setting.data.front))[sequence] + step].long()


def plain_ce(target_N: Tensor, query_ND: Tensor, item_ID: Tensor) -> Tensor:
    """Cross-entropy over the catalogue as it is usually written."""
    return F.cross_entropy(query_ND @ item_ID[1:].t(), target_N - 1)


# Evaluation


def evaluation_part(setting: Setting) -> Part:
    """Ranking users' next items, filtered, over the whole catalogue; encoding them included."""
    config = replace(setting.config, training=replace(setting.config.training, protocol="filtered"))

    def loop(*, together: bool) -> Run:
        model = make_model(config, setting.sequences, setting.device).eval()
        spans = query_spans(setting.sequences, "valid", max_len=config.data.max_len)
        spans = spans.take(torch.arange(min(USERS_ALONE, spans.user.numel())))
        with torch.no_grad():
            item_ID = model.candidates()  # once for all users, so untimed here; ours pays for it in every step

        def run(steps: int) -> Work:
            for _ in range(steps):
                sorted_metrics(model, setting.sequences, spans, item_ID, config=config, k=10, together=together)
            return Work(steps * spans.user.numel(), steps)

        return run

    def counted() -> Run:
        model = make_model(config, setting.sequences, setting.device).eval()
        some, users = first_users(setting.sequences, USERS_TOGETHER)
        packed = use_packed(config.data.layout, setting.device)

        def run(steps: int) -> Work:
            for _ in range(steps):
                evaluate(model, some, "valid", config=config, packed=packed)
            return Work(steps * users, steps)

        return run

    return Part(
        "evaluation",
        f"evaluation: all {setting.sequences.num_items:,} items ranked for every user",
        "evaluation",
        "users",
        (
            Rung("original", "users one by one: encode, score, sort everything", partial(loop, together=False)),
            Rung("together", "users encoded together, sorted one by one", partial(loop, together=True)),
            Rung("counted", "ranks counted in chunks, nothing sorted, metrics on tensors", counted, "T-6: in no note"),
        ),
        cumulative=True,
    )


def first_users(sequences: Sequences, limit: int) -> tuple[Sequences, int]:
    """The sequences with at most `limit` users to validate on, and their number."""
    spans = query_spans(sequences, "valid", max_len=1)
    kept = spans.user[:limit]
    valid = torch.full((sequences.num_users,), -1, dtype=torch.int64)
    valid[kept] = spans.end[:limit]
    none = torch.full_like(valid, -1)
    return replace(sequences, held_out=HeldOut(sequences.ptr[1:], valid, none, "")), kept.numel()
