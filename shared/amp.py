"""The optimizer step every project gets wrong once, written once: one call of `amp_step` is one optimizer step.

Order of a step: autocast forward and backward of every micro-batch, unscale, clip, step, update the scaler, zero the
gradients, average. In fp32 and bf16 nothing is copied to the host; in fp16 the scaler may copy its overflow flag.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

B = TypeVar("B")
LossFn = Callable[[nn.Module, B], tuple[Tensor, dict[str, Tensor]]]

SMALLEST_SCALE = 2.0**-10  # of the fp16 scaler; it starts at 2 ** 16 and halves whenever a step overflows
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(ArithmeticError):
    """Training produced a loss or gradient that is not a number; the message says when and how to go on."""


@dataclass(frozen=True)
class AmpConfig:
    """How a step computes: precision is "fp32", "bf16" or "fp16"; clip_norm 0 does not clip."""

    precision: str = "fp32"
    clip_norm: float = 0.0


@dataclass(frozen=True)
class TrainState:
    """All that training changes. A step returns a new value; model, optimizers, scaler and ema change in place."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    scaler: torch.amp.GradScaler  # enabled for fp16 alone
    ema: nn.Module | None  # average of the weights, for evaluation
    ema_decay: float
    first_bad_step: Tensor  # scalar int64 on the device: first step with a non-finite loss or gradient, -1 for none
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs completed


class StepOutput(NamedTuple):
    """What a step measured, still on the device."""

    loss: Tensor  # scalar float32, weighted over the micro-batches
    scalars: dict[str, Tensor]  # what loss_fn returned beside the loss, weighted alike
    grad_norm: Tensor | None  # before clipping; None where neither clipping nor the norm was wanted


def resolve_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision to use on `device` and the reason in a sentence.

    "auto" asks the hardware: bf16 on CUDA devices that have it, fp16 on older ones, fp32 on a CPU (where models of a
    few dozen columns gain nothing from bf16 even on CPUs built for it). Raises ValueError for bf16 or fp16 on a CPU
    without the units for it, where they are a hundred times slower.
    """
    if name not in ("auto", *DTYPES):
        raise ValueError(f'precision is "{name}"; it must be auto, fp32, bf16 or fp16')
    if device.type == "cuda":
        if name != "auto":
            return name, "as asked"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU computes bf16"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "this GPU has fp16 tensor cores but no bf16"
        return "fp32", "this GPU has no units for half precision"
    if name in ("auto", "fp32"):
        return "fp32", "as asked" if name == "fp32" else "the device is a CPU"
    capabilities = torch.cpu.get_capabilities()
    if name == "bf16" and not any(map(capabilities.get, ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))):
        raise ValueError(
            "this CPU has no bf16 units, where bf16 is about 100 times slower than fp32; use --precision fp32"
        )
    if name == "fp16" and not any(map(capabilities.get, ("avx512_fp16", "amx_fp16", "fp16_arith"))):
        raise ValueError(
            "this CPU has no fp16 units, where fp16 is about 100 times slower than fp32; use --precision fp32"
        )
    return name, "as asked"


def make_state(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    precision: str,
    device: torch.device,
    ema_decay: float = 0.0,
) -> TrainState:
    """A state at step 0. Each optimizer's present learning rates become the peaks that `lr_factor` scales."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    ema = None
    if ema_decay > 0:
        ema = copy.deepcopy(model).eval().requires_grad_(False)
    return TrainState(
        model=model,
        optimizers=tuple(optimizers),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        ema=ema,
        ema_decay=ema_decay,
        first_bad_step=torch.full((), -1, dtype=torch.int64, device=device),
    )


def no_mark(name: str) -> None:
    """A timer that is off."""


def amp_step(
    state: TrainState,
    micro_batches: Sequence[B],
    loss_fn: LossFn[B],
    *,
    amp: AmpConfig,
    lr_factor: float = 1.0,
    shares: Sequence[float] | None = None,
    want_norm: bool = False,
    clip: Callable[[Sequence[Tensor]], Tensor] | None = None,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    mark: Callable[[str], None] = no_mark,
) -> tuple[TrainState, StepOutput]:
    """One optimizer step over all of `micro_batches`, in place on the state's model, optimizers, scaler and ema.

    `loss_fn(model, micro_batch)` returns a mean loss and further scalars; `shares` weighs the micro-batches and sums
    to 1 (default: equally; give each its share of the samples that the mean runs over, and the step equals one over
    the whole batch). `lr_factor` scales every learning rate. Gradients are clipped after unscaling.

    `clip` takes the place of the clipping that `amp` asks for: it gets all gradients, clips them in place, and returns
    their norm before. A step whose norm is not finite then changes nothing, which fused optimizers decide on the
    device, as under fp16; others take it. A loss that is not finite still counts as a bad step.

    Where several processes train together, `reduce` replaces tensors by their sums over the processes, in place. It
    gets all gradients, the loss and the scalars at once, before anything looks at them, so that clipping, the scaler
    and the search for bad numbers decide alike everywhere; `shares` then sum to 1 over the processes.
    """
    if not micro_batches:
        raise ValueError("a step needs at least one micro-batch")
    if shares is None:
        shares = [1.0 / len(micro_batches)] * len(micro_batches)
    model, scaler = state.model, state.scaler
    device = state.first_bad_step.device
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor

    loss = torch.zeros((), device=device)
    scalars: dict[str, Tensor] = {}
    for micro_batch, share in zip(micro_batches, shares, strict=True):
        with torch.autocast(device.type, dtype=DTYPES[amp.precision], enabled=amp.precision != "fp32"):
            part, extra = loss_fn(model, micro_batch)
            part = part * share
        mark("forward")
        scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
        for name, value in extra.items():
            scalars[name] = scalars.get(name, 0.0) + value.detach() * share
        mark("backward")

    if reduce is not None:
        reduce([*(p.grad for p in model.parameters() if p.grad is not None), loss, *scalars.values()])
        mark("sync")
    for optimizer in state.optimizers:
        scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = None
    if clip is not None:  # clipping sees unscaled gradients
        norm = clip([p.grad for p in parameters if p.grad is not None])
    elif amp.clip_norm > 0:
        norm = nn.utils.clip_grad_norm_(parameters, amp.clip_norm)
    elif want_norm:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    for optimizer in state.optimizers:
        if clip is None or norm is None or scaler.is_enabled():
            scaler.step(optimizer)
        else:
            step_if_finite_(optimizer, norm)
    scaler.update()
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        update_average_(state.ema, model, state.ema_decay)

    bad = ~torch.isfinite(loss)
    # an overflow under fp16 is skipped and the scale halved; what `clip` sees is skipped too
    if norm is not None and clip is None and not scaler.is_enabled():
        bad = bad | ~torch.isfinite(norm)
    first_bad_step = torch.where((state.first_bad_step < 0) & bad, state.step + 1, state.first_bad_step)
    mark("optimizer")
    return replace(state, step=state.step + 1, first_bad_step=first_bad_step), StepOutput(loss, scalars, norm)


def step_if_finite_(optimizer: Optimizer, norm: Tensor) -> None:
    """Let a fused optimizer step, in place, unless `norm` is infinite or not a number; nothing is asked of the device.

    It leaves weights, moments and counts as they are where `found_inf` is 1: this is how torch's scaler skips a step.
    """
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode inside the block, and in the mode it was in behind it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def update_average_(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move `average` towards `model` in place: a = decay a + (1 - decay) m for floats, a copy for other buffers."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def raise_if_nonfinite(state: TrainState, *, checkpoint: Path | None) -> None:
    """Stop a run whose loss, gradient or weights stopped being numbers; `checkpoint` is the last good one.

    Under fp16 also one whose every step overflows. Asks the device for one number (a sync), so call it where something
    is due anyway, and before anything is saved: a gradient that broke the last step shows in the weights alone.
    """
    healthy = torch.stack([p.isfinite().all() for p in state.model.parameters()]).all()
    verdict = torch.where(healthy & (state.first_bad_step < 0), -1, state.first_bad_step.clamp(min=0))
    bad_step = int(verdict)  # sync
    stuck = state.scaler.is_enabled() and state.scaler.get_scale() < SMALLEST_SCALE
    if bad_step < 0 and not stuck:
        return
    what = (
        "every gradient overflows in fp16" if stuck else "the loss, a gradient or a weight is infinite or not a number"
    )
    when = f"since step {bad_step}" if bad_step > 0 else f"at step {state.step}"
    rescue = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
    raise NonFiniteError(
        f"{what} {when}; {rescue}. "
        "Lower --lr, clip with --clip-norm 1, use --precision fp32 or bf16, or look for bad values in the data."
    )


def state_tree(state: TrainState) -> dict[str, Any]:
    """Everything a checkpoint must hold of `state`, as nested dictionaries of tensors and numbers (no copies)."""
    return {
        "model": state.model.state_dict(),
        "ema": None if state.ema is None else state.ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "epoch": state.epoch,
    }


def load_state_tree(state: TrainState, tree: Mapping[str, Any]) -> TrainState:
    """`state` as it was when `tree` was taken, in place on its model, optimizers, scaler and ema."""
    state.model.load_state_dict(tree["model"])
    if state.ema is not None:
        state.ema.load_state_dict(tree["ema"] if tree["ema"] is not None else tree["model"])
    for optimizer, saved in zip(state.optimizers, tree["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    if tree["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(tree["scaler"])
    return replace(state, step=tree["step"], epoch=tree["epoch"])
