"""What `diagnose` and `tune-speed` have to know of seqrec: how to run a piece, and which flags are worth a trial."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from apps.seqrec.config import Config
from apps.seqrec.dataset import Sequences
from apps.seqrec.evaluate import evaluated_spans, evaluation_sums
from apps.seqrec.train import build, compile_or_say_why, fresh_meter, train_epoch, use_packed
from shared.amp import resolve_precision
from shared.device import pick_device
from shared.log import SilentLog
from shared.trials import Candidate, Dial, Piece, Steps, Subject, changed

PROG = "python -m apps.seqrec"
LARGER_STEPS = "the optimisation: fewer, larger steps, so retune --lr"
LARGEST_BATCH = 1 << 14  # sequences; more never fills a device better


def subject(sequences: Sequences) -> Subject[Config]:
    """The app on these sequences."""
    return Subject(
        prog=PROG,
        unit="sequences",
        data=sequences.fingerprint,
        open=lambda config: open_piece(config, sequences),
        candidates=lambda config: candidates(config, sequences),
        dials=lambda config: dials(config, sequences),
        open_inline=lambda config: open_eager(config, sequences),
    )


def open_piece(config: Config, sequences: Sequences) -> Piece:
    """A run of this configuration that trains as many steps as it is asked, and leaves no folder."""
    c = build(config, sequences)
    if config.training.compile != "off":
        compile_or_say_why(c, SilentLog())
    state, meter = c.state, fresh_meter(c.device)

    def train(steps: Steps) -> None:
        nonlocal state, meter
        while not steps.done:
            state, meter = train_epoch(c, state, meter, **steps.hooks)
            if state.step == (state.epoch + 1) * c.steps_per_epoch:
                state = replace(state, epoch=state.epoch + 1)

    def evaluate(on_users: Callable[[int], None]) -> None:
        evaluation_sums(
            state.ema or state.model, c.sequences, "valid", config=config, packed=c.packed, on_users=on_users
        )

    return Piece(
        device=c.device,
        model=c.state.model,
        train=train,
        evaluate=evaluate,
        evaluated=evaluated_spans(c.sequences, "valid", max_len=config.data.max_len).user.numel(),
        steps_per_epoch=c.steps_per_epoch,
        eval_every=config.training.eval_every,
    )


def open_eager(config: Config, sequences: Sequences) -> Piece | None:
    """The same without --compile; None where there is none."""
    if config.training.compile == "off":
        return None
    return open_piece(changed(config, {"compile": "off"}), sequences)


def candidates(config: Config, sequences: Sequences) -> list[Candidate]:
    """Changes worth a trial, those that leave the result alone first."""
    training, device = config.training, pick_device(config.training.device)
    found = []
    if training.log_every < 50:
        found.append(Candidate({"log_every": 50}, "fewer reads of the device"))
    if 0 < training.norm_every < 200:
        found.append(Candidate({"norm_every": 200}, "fewer reads of the device"))
    other = "padded" if use_packed(config.data.layout, device) else "packed"
    found.append(Candidate({"layout": other}, "the other arrangement of sequences in rows"))
    if training.accumulate > 1:
        found.append(Candidate({"accumulate": 1}, "one larger micro-batch instead of several"))
    else:
        found.append(Candidate({"accumulate": 4}, "micro-batches that stay in the caches", "dropout's draws alone"))
    if config.model.grad_checkpoint:
        found.append(Candidate({"grad_checkpoint": False}, "nothing is computed twice, for more memory"))
    found += [
        Candidate({"precision": name}, "half the bytes, and units built for it", "rounding")
        for name in ("bf16", "fp16")
        if resolve_precision(training.precision, device)[0] == "fp32" and can_compute(name, device)
    ]
    if training.compile == "off" and device.type == "cuda":
        found.append(Candidate({"compile": "default"}, "fewer, larger kernels", "rounding"))
    users = sequences.num_users
    found += [
        Candidate({"batch_size": factor * training.batch_size}, "more work a step", LARGER_STEPS)
        for factor in (2, 4)
        if factor * training.batch_size <= users
    ]
    if training.loss == "ce" and sequences.num_items > training.num_negatives:
        text = f"{training.num_negatives} items a step are scored instead of {sequences.num_items:,}"
        found.append(Candidate({"loss": "sampled"}, text, "the loss: a sampled softmax, compare its metrics"))
    return found


def can_compute(precision: str, device: torch.device) -> bool:
    """Whether the device has units for it."""
    try:
        resolve_precision(precision, device)
    except ValueError:
        return False
    return True


def dials(config: Config, sequences: Sequences) -> Sequence[Dial]:
    """Batch size by doubling and halving, then micro-batches."""
    size, largest = config.training.batch_size, min(LARGEST_BATCH, sequences.num_users)
    up = [size << i for i in range(1, 15) if size << i <= largest]
    down = [size >> i for i in range(1, 4) if size >> i >= 1]
    return (
        Dial("batch_size", up, down=down, changes=LARGER_STEPS),
        Dial("accumulate", [n for n in (2, 4, 8) if n > config.training.accumulate], changes="dropout's draws alone"),
    )
