"""What `diagnose` and `tune-speed` have to know of reid: how to run a piece, and which flags are worth a trial."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch

from apps.reid.config import Config
from apps.reid.dataset import Batch, ImageFiles, People
from apps.reid.evaluate import evaluate as measured
from apps.reid.evaluate import needed_items
from apps.reid.loaders import Batches, Key, Loader
from apps.reid.model import ReID
from apps.reid.train import build, compile_or_say_why, fresh_meter, train_epoch
from shared.amp import resolve_precision
from shared.device import pick_device
from shared.log import SilentLog
from shared.trials import Candidate, Dial, Piece, Steps, Subject, changed

PROG = "python -m apps.reid"
LARGER_STEPS = "the optimisation: fewer, larger steps with more to compare in each, so retune --lr"
TWO_BATCHES = "the optimisation: fewer, larger steps, so retune --lr"
LARGEST_BATCH = 1 << 12  # samples; more never fills a device better
# In train.log where the samples were looked through once: "starting to cache", "cached" (the original's lines).
EXPECTED = (
    "\u5f00\u59cb\u7f13\u5b58\u6570\u636e\u96c6\u5143\u4fe1\u606f",
    "\u2705 \u5143\u4fe1\u606f\u7f13\u5b58\u5b8c\u6210",
)


class InThisThread(Loader):
    """Makes each batch when it is asked for."""

    def run(self, keys: Sequence[Key]) -> Generator[Batch]:
        for key in keys:
            yield self._make(key)


def subject(people: People) -> Subject[Config]:
    """The app on these people."""
    return Subject(
        prog=PROG,
        unit="samples",
        data=people.fingerprint,
        open=lambda config: open_piece(config, people),
        candidates=lambda config: candidates(config, people),
        dials=lambda config: dials(config, people),
        open_inline=lambda config: open_piece(changed(config, {"compile": "off"}), people, loader_kind=InThisThread),
    )


def open_piece(config: Config, people: People, *, loader_kind: type[Loader] = Loader) -> Piece:
    """A run of this configuration that trains as many steps as it is asked, and leaves no folder."""
    c = build(config, people)
    if config.training.compile != "off":
        compile_or_say_why(c, SilentLog())
    state, meter = c.state, fresh_meter(c.device)
    # its processes, where it has any, end with it
    loader = loader_kind(Batches(c.samples, c.modalities, config.training.modality_dropout), c.loader, c.device)

    def train(steps: Steps) -> None:
        nonlocal state, meter
        while not steps.done:
            state, meter = train_epoch(c, state, meter, loader=loader, **steps.hooks)
            if state.step == (state.epoch + 1) * c.steps_per_epoch:
                state = replace(state, epoch=state.epoch + 1)

    def evaluate(on_images: Callable[[int], None]) -> None:
        model = state.ema or state.model
        assert isinstance(model, ReID)
        if people.valid is not None:
            measured(model, people, "valid", config=config, token_CL=c.token_CL, on_images=on_images)

    return Piece(
        device=c.device,
        model=c.state.model,
        train=train,
        evaluate=evaluate,
        evaluated=sum(map(len, needed_items(people, "valid", config))) if people.valid is not None else 0,
        steps_per_epoch=c.steps_per_epoch,
        eval_every=config.training.eval_every,
        warm_up=1 if loader_kind is InThisThread else c.loader.prefetch * max(1, c.loader.workers) + 1,
    )


def candidates(config: Config, people: People) -> list[Candidate]:
    """Changes worth a trial, those that leave the result alone first."""
    training, device = config.training, pick_device(config.training.device)
    found = []
    if training.log_every < 50:
        found.append(Candidate({"log_every": 50}, "fewer reads of the device"))
    if 0 < training.norm_every < 200:
        found.append(Candidate({"norm_every": 200}, "fewer reads of the device"))
    if isinstance(people.images, ImageFiles):
        if training.num_workers < 2:
            found.append(Candidate({"num_workers": 2}, "images decoded by two processes beside the step"))
        if training.num_workers and training.prefetch < 4:
            found.append(Candidate({"prefetch": 4}, "more batches ready when one of them took long"))
    elif training.num_workers:
        found.append(Candidate({"num_workers": 0}, "a thread reads the pack; processes only copy its bytes once more"))
    if config.model.grad_checkpoint:
        found.append(Candidate({"grad_checkpoint": False}, "nothing is computed twice, for more memory"))
    if training.deterministic:
        found.append(Candidate({"deterministic": False}, "kernels may add up in any order", "rounding"))
    found += [
        Candidate({"precision": name}, "half the bytes, and units built for it", "rounding")
        for name in ("bf16", "fp16")
        if resolve_precision(training.precision, device)[0] == "fp32" and can_compute(name, device)
    ]
    if training.compile == "off" and device.type == "cuda":
        found.append(Candidate({"compile": "reduce-overhead"}, "fewer, larger kernels", "rounding"))
    found += [
        Candidate({"identities_per_batch": count}, "more work a step", LARGER_STEPS)
        for count in (2 * training.identities_per_batch, 4 * training.identities_per_batch)
        if count <= largest_count(config, people)
    ]
    if training.subsets == "all":
        text = "each modality alone is matched with RGB, and nothing is fused"
        found.append(Candidate({"subsets": "single"}, text, "the objective: queries of several modalities"))
    return found


def largest_count(config: Config, people: People) -> int:
    """The most identities a batch may have."""
    return min(LARGEST_BATCH // config.training.num_instances, people.num_identities)


def can_compute(precision: str, device: torch.device) -> bool:
    """Whether the device has units for it."""
    try:
        resolve_precision(precision, device)
    except ValueError:
        return False
    return True


def dials(config: Config, people: People) -> Sequence[Dial]:
    """Identities of a batch by doubling and halving, then batches a step, then who makes them and how far ahead."""
    training, largest = config.training, largest_count(config, people)
    count = training.identities_per_batch
    up = [count << i for i in range(1, 12) if count << i <= largest]
    down = [count >> i for i in range(1, 4) if count >> i >= 2]
    found = [
        Dial("identities_per_batch", up, down=down, changes=LARGER_STEPS),
        Dial("accumulate", [n for n in (2, 4) if n > training.accumulate], changes=TWO_BATCHES),
    ]
    if isinstance(people.images, ImageFiles):
        found.append(Dial("num_workers", [n for n in (1, 2, 4, 8) if n > training.num_workers]))
    if training.num_workers or training.device != "cpu":
        found.append(Dial("prefetch", [n for n in (4, 8) if n > training.prefetch]))
    return found
