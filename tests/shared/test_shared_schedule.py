"""shared.schedule: equal to torch's schedulers, pure, and free of torch itself."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler

from shared.schedule import lr_factor


def torch_factors(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], steps: int) -> list[float]:
    """The learning rates of `steps` steps under one of torch's own schedulers, starting from 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", ["constant", "cosine", "step"])
def test_warmup_equals_torchs_linear_schedule(kind):
    want = torch_factors(lambda opt: lr_scheduler.LinearLR(opt, start_factor=1 / 10, total_iters=9), 10)
    got = [lr_factor(step, kind=kind, total_steps=100, warmup_steps=10, step_size=5) for step in range(10)]
    assert got == pytest.approx(want, rel=1e-12)
    assert got[0] == pytest.approx(0.1)
    assert got[-1] == 1.0


@pytest.mark.parametrize("min_factor", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 7])
def test_cosine_equals_torchs_from_the_end_of_warmup(warmup, min_factor):
    span = 40
    want = torch_factors(lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=span, eta_min=min_factor), span + 1)
    got = [
        lr_factor(warmup + i, kind="cosine", total_steps=warmup + span, warmup_steps=warmup, min_factor=min_factor)
        for i in range(span + 1)
    ]
    assert got == pytest.approx(want, abs=1e-12)
    assert got[0] == 1.0
    assert got[-1] == min_factor


@pytest.mark.parametrize("warmup", [0, 3])
def test_step_decay_equals_torchs_from_the_end_of_warmup(warmup):
    want = torch_factors(lambda opt: lr_scheduler.StepLR(opt, step_size=6, gamma=0.3), 30)
    got = [
        lr_factor(warmup + i, kind="step", total_steps=33, warmup_steps=warmup, step_size=6, gamma=0.3)
        for i in range(30)
    ]
    assert got == pytest.approx(want, rel=1e-12)


def test_constant_stays_at_one():
    assert {lr_factor(step, kind="constant", total_steps=5) for step in range(9)} == {1.0}


def test_cosine_keeps_its_floor_after_the_last_step():
    assert [lr_factor(step, kind="cosine", total_steps=4, min_factor=0.2) for step in (4, 5, 400)] == [0.2, 0.2, 0.2]


def test_warmup_may_fill_the_whole_run():
    assert [lr_factor(s, kind="cosine", total_steps=4, warmup_steps=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step -1 is negative"),
        ({"total_steps": 0}, "total_steps 0 is not positive"),
        ({"warmup_steps": -2}, "warmup_steps -2 is not between 0 and the 10 steps"),
        ({"warmup_steps": 11}, "warmup_steps 11 is not between 0 and the 10 steps.*lower warmup_steps or train longer"),
        ({"kind": "cosin"}, "schedule 'cosin' is not known; use constant, cosine or step"),
        ({"min_factor": 1.5}, "min_factor 1.5 is not between 0 and 1"),
        ({"min_factor": float("nan")}, "min_factor nan is not between 0 and 1"),
        ({"kind": "step"}, "step_size 0 is not positive"),
        ({"kind": "step", "step_size": 2, "gamma": 0.0}, "gamma 0.0 is not above 0"),
        ({"kind": "step", "step_size": 2, "gamma": 1.1}, "gamma 1.1 is not above 0 and at most 1"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    settings = {"step": 0, "kind": "constant", "total_steps": 10} | changes
    with pytest.raises(ValueError, match=message):
        lr_factor(**settings)


def test_importing_the_schedule_does_not_load_torch():
    code = "import sys, shared.schedule; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
