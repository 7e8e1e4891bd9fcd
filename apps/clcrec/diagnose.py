"""What `diagnose` and `tune-speed` have to know of clcrec: how to run a piece, and which flags are worth a trial."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apps.clcrec.config import Config
from apps.clcrec.dataset import ColdStart
from apps.clcrec.evaluate import evaluate as ranked
from apps.clcrec.train import build, compile_or_say_why, draw_pool, fresh_meter, train_epoch
from shared import negatives
from shared.amp import resolve_precision
from shared.device import pick_device
from shared.log import SilentLog
from shared.trials import Candidate, Dial, Piece, Steps, Subject, changed

PROG = "python -m apps.clcrec"
LARGER_STEPS = "the optimisation: fewer, larger steps, so retune --lr"
LARGEST_BATCH = 1 << 15  # pairs; more never fills a device better
RARELY = {"log_every": 50, "norm_every": 200}  # steps between what reads the device
SHARED = 1024  # negatives that a step's pairs share


def subject(data: ColdStart) -> Subject[Config]:
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


def open_piece(config: Config, data: ColdStart) -> Piece:
    """A run of this configuration that trains as many steps as it is asked, and leaves no folder."""
    c = build(config, data)
    training, log = config.training, SilentLog()
    if training.compile != "off":
        compile_or_say_why(c, log)
    state, meter = c.state, fresh_meter(c.device)
    pool_PN: Tensor | None = None
    pool_of = -1

    def train(steps: Steps) -> None:
        nonlocal state, meter, pool_PN, pool_of
        while not steps.done:
            wanted = negatives.pool_epoch(state.epoch, training.resample_epochs)
            if training.negatives == "pool" and pool_of != wanted:
                pool_PN = None  # frees the old one before the new one is drawn
                pool_PN, pool_of = draw_pool(c, wanted, log=log, on_rows=lambda done: None), wanted
            state, meter = train_epoch(c, state, meter, pool_PN=pool_PN, **steps.hooks)
            if state.step == (state.epoch + 1) * c.steps_per_epoch:
                state = replace(state, epoch=state.epoch + 1)

    def evaluate(on_users: Callable[[int], None]) -> None:
        ranked(state.ema or state.model, data, "valid", config=config, on_users=on_users)

    return Piece(
        device=c.device,
        model=c.state.model,
        train=train,
        evaluate=evaluate,
        evaluated=int((data.valid.ptr.diff() > 0).sum()),
        steps_per_epoch=c.steps_per_epoch,
        eval_every=training.eval_every,
    )


def open_eager(config: Config, data: ColdStart) -> Piece | None:
    """The same without --compile; None where it is not compiled anyway."""
    return None if config.training.compile == "off" else open_piece(changed(config, {"compile": "off"}), data)


def candidates(config: Config, data: ColdStart) -> list[Candidate]:
    """Changes worth a trial, those that leave the result alone first."""
    training, device = config.training, pick_device(config.training.device)
    found = []
    rarer = {name: value for name, value in RARELY.items() if 0 < getattr(training, name) < value}
    if rarer:
        found.append(Candidate(rarer, "fewer reads of the device"))
    if training.accumulate > 1:
        found.append(Candidate({"accumulate": 1}, "one larger micro-batch instead of several"))
    if training.scores != "auto":
        found.append(Candidate({"scores": "auto"}, "scores made the way that should cost less"))
    if training.content_input != "auto":
        found.append(Candidate({"content_input": "auto"}, "fewer items encoded"))
    if training.negatives == "pool":
        found.append(Candidate({"negatives": "device"}, "negatives drawn as they are needed", "the negatives' draws"))
    elif training.negatives == "device":
        found.append(Candidate({"negatives": "pool"}, "negatives drawn ahead of training", "the negatives' draws"))
    found += [
        Candidate({"precision": name}, "half the bytes, and units built for it", "rounding")
        for name in ("bf16", "fp16")
        if resolve_precision(training.precision, device)[0] == "fp32" and can_compute(name, device)
    ]
    if training.compile == "off" and device.type == "cuda":
        found.append(Candidate({"compile": "default"}, "fewer, larger kernels", "rounding"))
    found += [
        Candidate({"batch_size": factor * training.batch_size}, "more work a step", LARGER_STEPS)
        for factor in (2, 4)
        if factor * training.batch_size <= data.num_pairs
    ]
    if training.neg_power > 0:
        text = "uniform draws cost less than draws by popularity"
        found.append(Candidate({"neg_power": 0.0}, text, "the negatives: compare its metrics"))
    elif training.negatives != "shared" and training.replacement != "legacy":
        count = min(SHARED, data.num_warm)
        text = f"{count} negatives a step instead of {training.num_negatives} a pair"
        values = {"negatives": "shared", "num_negatives": count}
        found.append(Candidate(values, text, "the estimator: compare its metrics"))
    return found


def can_compute(precision: str, device: torch.device) -> bool:
    """Whether the device has units for it."""
    try:
        resolve_precision(precision, device)
    except ValueError:
        return False
    return True


def dials(config: Config, data: ColdStart) -> Sequence[Dial]:
    """Batch size by doubling and halving, then micro-batches."""
    size, largest = config.training.batch_size, min(LARGEST_BATCH, data.num_pairs)
    up = [size << i for i in range(1, 16) if size << i <= largest]
    down = [size >> i for i in range(1, 4) if size >> i >= 1]
    return (
        Dial("batch_size", up, down=down, changes=LARGER_STEPS),
        Dial("accumulate", [n for n in (2, 4, 8) if n > config.training.accumulate]),
    )
