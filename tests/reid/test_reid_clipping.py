"""Adaptive clipping against the intended rule in a loop, and against the three ways in which it went wrong before."""

import copy
import statistics

import pytest
import torch
from torch import Tensor, nn

from apps.reid.clipping import FACTOR, AdaptiveClip, make_clip
from shared.amp import AmpConfig, TrainState, amp_step, make_state, raise_if_nonfinite

CPU = torch.device("cpu")


def clip_of(*, window: int = 20, quantile: float = 0.7, first: float = 1.0) -> AdaptiveClip:
    return make_clip(first=first, window=window, quantile=quantile, low=0.5, high=3.0, device=CPU)


def gradients(norm: float, seed: int) -> list[Tensor]:
    """Some tensors of that norm together."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 1, 2))]
    total = torch.cat([part.flatten() for part in parts]).norm()
    return [(part * (norm / total)).float() for part in parts]


def slow_limit(norms: list[float], *, window: int, quantile: float, first: float) -> float:
    """The rule: the quantile of the last norms times 1.15, within 0.5 and 3, once ten or a whole window are known."""
    last = norms[-window:]
    if len(last) < min(10, window):
        return first
    cut = statistics.quantiles(last, n=1000, method="inclusive")[round(quantile * 1000) - 1]
    return min(3.0, max(0.5, 1.15 * cut))


@pytest.mark.parametrize(("window", "quantile", "first"), [(20, 0.7, 1.0), (100, 0.5, 0.8), (4, 0.9, 2.0)])
def test_limits_and_clipped_gradients_are_those_of_the_rule_in_a_loop(window, quantile, first):
    clip = clip_of(window=window, quantile=quantile, first=first)
    draw = torch.Generator().manual_seed(1)
    norms: list[float] = []
    limits = set()
    for step in range(60):
        norm = float(torch.rand((), generator=draw, dtype=torch.float64)) * (0.5 if step < 30 else 4.0) + 0.1
        parts = gradients(norm, step)
        before = torch.cat([part.double().flatten() for part in parts])
        limit = slow_limit(norms, window=window, quantile=quantile, first=first)
        assert float(clip(parts)) == pytest.approx(norm, rel=1e-5)
        assert float(clip.limit) == pytest.approx(limit, rel=1e-5)
        after = torch.cat([part.double().flatten() for part in parts])
        torch.testing.assert_close(after, before * min(1.0, limit / norm), rtol=1e-5, atol=1e-7)
        norms.append(norm)
        limits.add(round(limit, 4))
    assert len(limits) > 5
    assert FACTOR == 1.15


def test_the_limit_stays_between_its_bounds():
    for norm, expected in ((0.01, 0.5), (50.0, 3.0)):
        clip = clip_of()
        for step in range(11):
            clip(gradients(norm, step))
        assert float(clip.limit) == expected


def test_a_norm_that_is_not_finite_is_counted_and_forgotten():
    clip = clip_of(window=3)
    for norm in (0.6, 0.7, 0.8):
        clip(gradients(norm, 0))
    kept = clip.norm_W.clone()
    for bad in (float("nan"), float("inf")):
        assert not torch.isfinite(clip([torch.tensor([1.0, bad])]))
    assert torch.equal(clip.norm_W, kept)
    assert int(clip.skipped) == 2
    assert int(clip.known) == 3


def test_a_restored_clip_goes_on_bit_for_bit():
    clip = clip_of(window=12)
    for step in range(17):
        clip(gradients(0.1 + step / 10, step))
    other = clip_of(window=12)
    other.load(copy.deepcopy(clip.tree()))
    for step in range(17, 22):
        first, second = gradients(0.1 + step / 10, step), gradients(0.1 + step / 10, step)
        assert torch.equal(clip(first), other(second))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(value, other.tree()[name]) for name, value in clip.tree().items())


def test_bounds_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match=r"clip_low 2 is above clip_high 1; lower --clip-low"):
        make_clip(first=1.0, window=10, quantile=0.5, low=2.0, high=1.0, device=CPU)


def test_nothing_is_read_from_the_device(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("clipping asked the device for a number")

    clip = clip_of(window=5)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(7):
        clip([torch.ones(4), torch.ones(2, 3)])


# As part of a step


def make(*, precision: str = "fp32", optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> TrainState:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    made = optimizer(model.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
    return make_state(model, [made], precision=precision, device=CPU, ema_decay=0.9)


def loss_fn(model: nn.Module, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (model(torch.ones(2, 4)).square().mean() * scale, {})


def weights(state: TrainState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_every_optimizer_step_leaves_one_norm_however_many_batches_it_takes(accumulate):
    state, clip = make(), clip_of(window=30)
    for step in range(12):
        state, output = amp_step(state, [torch.ones(())] * accumulate, loss_fn, amp=AmpConfig(), clip=clip)
        assert output.grad_norm is not None
        assert int(clip.known) == step + 1
    assert float(clip.limit) != 1.0  # it has enough to go by


class Broken(torch.autograd.Function):
    """Finite forwards, not a number backwards."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * float("nan")


def broken(model: nn.Module, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return (Broken.apply(model(torch.ones(2, 4))).square().mean() * scale, {})


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(optimizer):
    state, clip = make(optimizer=optimizer), clip_of()
    state, _ = amp_step(state, [torch.ones(())], loss_fn, amp=AmpConfig(), clip=clip)
    before, moments = weights(state), copy.deepcopy(state.optimizers[0].state_dict()["state"])
    state, output = amp_step(state, [torch.ones(())], broken, amp=AmpConfig(), clip=clip)
    assert output.grad_norm is not None
    assert torch.isnan(output.grad_norm)
    assert torch.isfinite(output.loss)
    assert torch.equal(weights(state), before)
    after = state.optimizers[0].state_dict()["state"]
    assert all(torch.equal(after[i][name], value) for i, part in moments.items() for name, value in part.items())
    assert int(clip.skipped) == 1
    raise_if_nonfinite(state, checkpoint=None)  # the run goes on
    state, _ = amp_step(state, [torch.ones(())], loss_fn, amp=AmpConfig(), clip=clip)
    assert not torch.equal(weights(state), before)


def test_under_fp16_clipping_sees_unscaled_gradients_and_the_scaler_skips():
    state, clip = make(precision="fp16"), clip_of()
    plain_state, plain = make(), clip_of()
    state, output = amp_step(state, [torch.ones(())], loss_fn, amp=AmpConfig(), clip=clip)
    plain_state, expected = amp_step(plain_state, [torch.ones(())], loss_fn, amp=AmpConfig(), clip=plain)
    assert output.grad_norm is not None
    assert expected.grad_norm is not None
    torch.testing.assert_close(output.grad_norm, expected.grad_norm)
    torch.testing.assert_close(weights(state), weights(plain_state))
    before, scale = weights(state), state.scaler.get_scale()
    state, _ = amp_step(state, [torch.ones(())], broken, amp=AmpConfig(), clip=clip)
    assert torch.equal(weights(state), before)
    assert state.scaler.get_scale() == scale / 2
    assert int(clip.skipped) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_clipping_on_cuda_waits_for_nothing():
    device = torch.device("cuda")
    clip = make_clip(first=1.0, window=5, quantile=0.7, low=0.5, high=3.0, device=device)
    parts = [part.to(device) for part in gradients(4.0, 0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            clip(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(clip.known) == 7
