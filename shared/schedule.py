"""The learning rate as a pure function of the step: nothing to save, nothing to restore. Imports no torch."""

import math
from typing import Literal

ScheduleKind = Literal["constant", "cosine", "step"]


def lr_factor(
    step: int,
    *,
    kind: ScheduleKind,
    total_steps: int,
    warmup_steps: int = 0,
    min_factor: float = 0.0,
    step_size: int = 0,
    gamma: float = 0.1,
) -> float:
    """The factor on the base learning rate at `step`, counted from 0.

    The first `warmup_steps` steps rise linearly from 1 / warmup_steps to 1. Then "constant" stays at 1; "cosine" falls
    to `min_factor`, reached at `total_steps` and kept from there on; "step" multiplies by `gamma` after every
    `step_size` steps.
    """
    if step < 0:
        raise ValueError(f"step {step} is negative; steps count from 0")
    if total_steps < 1:
        raise ValueError(f"total_steps {total_steps} is not positive; train for at least one step")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} is not between 0 and the {total_steps} steps of the run; "
            "lower warmup_steps or train longer"
        )
    if kind not in ("constant", "cosine", "step"):
        raise ValueError(f"schedule {kind!r} is not known; use constant, cosine or step")
    if not 0.0 <= min_factor <= 1.0:
        raise ValueError(f"min_factor {min_factor} is not between 0 and 1; it is a fraction of the base learning rate")
    if kind == "step" and step_size < 1:
        raise ValueError(f"step_size {step_size} is not positive; the step schedule needs the steps between two decays")
    if kind == "step" and not 0.0 < gamma <= 1.0:
        raise ValueError(f"gamma {gamma} is not above 0 and at most 1; the step schedule multiplies the rate by it")

    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    if kind == "step":
        return float(gamma ** ((step - warmup_steps) // step_size))
    if step >= total_steps:
        return min_factor
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))
