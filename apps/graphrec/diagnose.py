"""What `diagnose` and `tune-speed` have to know of graphrec: how to run a piece, and which flags are worth a trial."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from apps.graphrec.config import Config
from apps.graphrec.dataset import Interactions
from apps.graphrec.evaluate import evaluation_sums, scorer_of
from apps.graphrec.model import FILTERS, NOISY, PROPAGATED
from apps.graphrec.train import build, compile_or_say_why, fresh_meter, train_epoch
from shared.amp import resolve_precision
from shared.device import pick_device
from shared.log import SilentLog
from shared.trials import Candidate, Dial, Piece, Steps, Subject, changed

PROG = "python -m apps.graphrec"
LARGER_STEPS = "the optimisation: fewer, larger steps, so retune --lr"
LARGEST_BATCH = 1 << 17  # pairs; more never fills a device better
SHARED = 1024  # negatives that a batch's pairs share
CONTRASTED = 1024  # nodes, as by default


def subject(data: Interactions) -> Subject[Config]:
    """The app on these data."""
    return Subject(
        prog=PROG,
        unit="pairs",
        data=data.fingerprint,
        open=lambda config: open_piece(config, data),
        candidates=lambda config: candidates(config, data),
        dials=lambda config: dials(config, data),
        open_inline=lambda config: open_eager(config, data),
    )


def open_piece(config: Config, data: Interactions) -> Piece:
    """A run of this configuration that trains as many steps as it is asked, and leaves no folder."""
    if config.model.model in FILTERS:
        raise ValueError(
            f"{config.model.model} is a filter of the graph and takes no training steps, so that there is nothing to "
            "look at; use --model lightgcn, or another one that trains"
        )
    c = build(config, data)
    if config.training.compile != "off":
        compile_or_say_why(c, SilentLog())
    state, meter = c.state, fresh_meter(c)

    def train(steps: Steps) -> None:
        nonlocal state, meter
        while not steps.done:
            state, meter = train_epoch(c, state, meter, **steps.hooks)
            if state.step == (state.epoch + 1) * c.steps_per_epoch:
                state = replace(state, epoch=state.epoch + 1)

    def evaluate(on_users: Callable[[int], None]) -> None:
        if data.valid.item.numel():
            scorer = scorer_of(state.ema or state.model)
            evaluation_sums(scorer, data, ("valid",), config=config, device=c.device, on_users=on_users)

    return Piece(
        device=c.device,
        model=c.state.model,
        train=train,
        evaluate=evaluate,
        evaluated=int((data.valid.ptr.diff() > 0).sum()),
        steps_per_epoch=c.steps_per_epoch,
        eval_every=config.training.eval_every,
    )


def open_eager(config: Config, data: Interactions) -> Piece | None:
    """The same without --compile; None where it is not compiled anyway."""
    return None if config.training.compile == "off" else open_piece(changed(config, {"compile": "off"}), data)


def candidates(config: Config, data: Interactions) -> list[Candidate]:
    """Changes worth a trial, those that leave the result alone first."""
    model, training, device = config.model, config.training, pick_device(config.training.device)
    found = []
    if training.log_every < 50:
        found.append(Candidate({"log_every": 50}, "fewer reads of the device"))
    if 0 < training.norm_every < 200:
        found.append(Candidate({"norm_every": 200}, "fewer reads of the device"))
    if training.accumulate > 1:
        found.append(Candidate({"accumulate": 1}, "scores made once, not again in backward"))
    if training.kernel != "auto":
        found.append(Candidate({"kernel": "auto"}, "the kernel that should cost less here"))
    if model.model in PROPAGATED and not model.bf16_rows:
        found.append(Candidate({"bf16_rows": True}, "half the bytes of every row in a propagation", "rounding"))
    found += [
        Candidate({"precision": name}, "half the bytes of scores, and units built for it", "rounding")
        for name in ("bf16", "fp16")
        if resolve_precision(training.precision, device)[0] == "fp32" and can_compute(name, device)
    ]
    if training.compile == "off" and device.type == "cuda":
        found.append(Candidate({"compile": "default"}, "fewer, larger kernels", "rounding"))
    found += [
        Candidate({"batch_size": factor * training.batch_size}, "more pairs a propagation and a step", LARGER_STEPS)
        for factor in (2, 4)
        if factor * training.batch_size <= data.num_pairs
    ]
    if model.model in PROPAGATED and 4 * training.propagate_every * training.batch_size <= data.num_pairs:
        values = {"propagate_every": 4 * training.propagate_every}
        found.append(Candidate(values, "four times as many batches share a propagation", LARGER_STEPS))
    if has_own_negatives(config):
        count = min(SHARED, data.num_items if data.is_cold is None else int((~data.is_cold).sum()))
        text = f"scores with {count} negatives shared by a batch are one matrix product"
        shared = {"negatives": "shared", "num_negatives": count}
        found.append(Candidate(shared, text, "the estimator: compare its metrics"))
    if model.model == "simgcl":
        text = "one propagation a step instead of three"
        found.append(Candidate({"model": "xsimgcl"}, text, "the model: compare its metrics"))
    if model.model in NOISY and not 0 < training.contrast_nodes <= CONTRASTED:
        text = f"at most {CONTRASTED} nodes contrasted with each other"
        found.append(Candidate({"contrast_nodes": CONTRASTED}, text, "the contrast: compare its metrics"))
    return found


def has_own_negatives(config: Config) -> bool:
    """Whether every pair has negatives of its own."""
    training = config.training
    loss = training.loss
    if loss == "auto":
        loss = "clcrec" if config.model.model == "clcrec-graph" else "softmax"
    if loss == "softmax":
        return training.negatives == "device"
    return loss in ("bpr", "clcrec") and training.negatives != "shared"


def can_compute(precision: str, device: torch.device) -> bool:
    """Whether the device has units for it."""
    try:
        resolve_precision(precision, device)
    except ValueError:
        return False
    return True


def dials(config: Config, data: Interactions) -> Sequence[Dial]:
    """Batch size by doubling and halving, then batches for each propagation."""
    size, largest = config.training.batch_size, min(LARGEST_BATCH, data.num_pairs)
    up = [size << i for i in range(1, 18) if size << i <= largest]
    down = [size >> i for i in range(1, 4) if size >> i >= 1]
    found = [Dial("batch_size", up, down=down, changes=LARGER_STEPS)]
    if config.model.model in PROPAGATED:
        every = [n for n in (2, 4, 8) if n > config.training.propagate_every]
        found.append(Dial("propagate_every", every, changes=LARGER_STEPS))
    return found
