"""The optimizer step: accumulation, clipping, precision, non-finite numbers, averages and its checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.amp import (
    AmpConfig,
    NonFiniteError,
    TrainState,
    amp_step,
    load_state_tree,
    make_state,
    raise_if_nonfinite,
    resolve_precision,
    state_tree,
)

CPU = torch.device("cpu")


def make(*, lr: float = 0.1, precision: str = "fp32", ema_decay: float = 0.0, sgd: bool = False) -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(model.named_parameters(), lr=lr, fused=True)
    return make_state(model, [optimizer], precision=precision, device=CPU, ema_decay=ema_decay)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = batch
    error = model(x).squeeze(1) - y
    return error.square().mean(), {"mae": error.abs().mean()}


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_a_step_equals_plain_torch():
    state, x_y = make(), data()
    plain = copy.deepcopy(state.model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        state, output = amp_step(state, [x_y], squared, amp=AmpConfig())
        loss = squared(plain, x_y)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert output.loss == loss.detach()
    assert torch.equal(weights(state), torch.cat([p.detach().flatten() for p in plain.parameters()]))
    assert state.step == 3


@pytest.mark.parametrize("sizes", [(6, 6), (5, 4, 3), (11, 1)])
def test_accumulation_over_uneven_parts_equals_one_whole_batch(sizes):
    x, y = data()
    whole, _ = amp_step(make(sgd=True), [(x, y)], squared, amp=AmpConfig(clip_norm=0.5))
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    state, output = amp_step(
        make(sgd=True), parts, squared, amp=AmpConfig(clip_norm=0.5), shares=[size / 12 for size in sizes]
    )
    torch.testing.assert_close(weights(state), weights(whole), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.scalars["mae"], squared(make().model, (x, y))[1]["mae"].detach())


def test_gradients_are_clipped_to_the_norm_and_the_norm_is_that_before_clipping():
    before = weights(make(sgd=True, lr=1.0))
    free, unclipped = amp_step(make(sgd=True, lr=1.0), [data()], squared, amp=AmpConfig(), want_norm=True)
    clipped, output = amp_step(make(sgd=True, lr=1.0), [data()], squared, amp=AmpConfig(clip_norm=0.01))
    assert unclipped.grad_norm is not None
    assert output.grad_norm == pytest.approx(float(unclipped.grad_norm))
    assert float((weights(free) - before).norm()) == pytest.approx(float(unclipped.grad_norm), rel=1e-4)
    assert float((weights(clipped) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_norm_is_not_computed_unless_wanted():
    assert amp_step(make(), [data()], squared, amp=AmpConfig())[1].grad_norm is None


def test_the_learning_rate_factor_scales_the_peak_and_not_the_last_value():
    state = make()
    for factor in (0.5, 0.25):
        state, _ = amp_step(state, [data()], squared, amp=AmpConfig(), lr_factor=factor)
        assert state.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * factor)


def test_fp16_scales_skips_an_overflow_and_keeps_the_scaler_in_the_checkpoint():
    def overflowing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = squared(model, batch)
        return loss * 1e34, extra  # finite, but not after scaling by 65536

    state = make(precision="fp16")
    start = weights(state)
    state, _ = amp_step(state, [data()], overflowing, amp=AmpConfig(precision="fp32", clip_norm=1.0))
    assert torch.equal(weights(state), start)
    assert state.scaler.get_scale() == 32768.0
    other = load_state_tree(make(precision="fp16"), state_tree(state))
    assert other.scaler.get_scale() == 32768.0
    state, _ = amp_step(state, [data()], squared, amp=AmpConfig(precision="fp32"))
    assert not torch.equal(weights(state), start)


def test_the_scaler_is_off_outside_fp16():
    assert not make().scaler.is_enabled()
    assert not make(precision="bf16").scaler.is_enabled()


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_checkpoint(clip_norm):
    def broken(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = squared(model, batch)
        return loss * float("nan"), extra

    state = make()
    state, _ = amp_step(state, [data()], squared, amp=AmpConfig(clip_norm=clip_norm))
    raise_if_nonfinite(state, checkpoint=None)
    state, _ = amp_step(state, [data()], broken, amp=AmpConfig(clip_norm=clip_norm))
    state, _ = amp_step(state, [data()], squared, amp=AmpConfig(clip_norm=clip_norm))
    with pytest.raises(NonFiniteError, match=r"since step 2; the last good checkpoint is .*step-1"):
        raise_if_nonfinite(state, checkpoint=Path("step-1"))


def test_an_infinite_gradient_with_a_finite_loss_is_found_through_the_norm():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.sqrt() * x.sum()  # the slope of a square root at 0 is infinite

    model = Root()
    state = make_state(model, [torch.optim.SGD(model.parameters(), lr=0.1)], precision="fp32", device=CPU)
    state, output = amp_step(state, [torch.ones(2)], lambda m, x: (m(x).sum(), {}), amp=AmpConfig(clip_norm=1.0))
    assert torch.isfinite(output.loss)
    with pytest.raises(NonFiniteError, match="since step 1; no checkpoint"):
        raise_if_nonfinite(state, checkpoint=None)


def test_a_gradient_that_broke_the_weights_is_found_without_clipping():
    state = make()
    with torch.no_grad():
        next(state.model.parameters())[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="at step 0; no checkpoint"):
        raise_if_nonfinite(state, checkpoint=None)


def test_fp16_that_overflows_in_every_step_stops():
    def overflowing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, extra = squared(model, batch)
        weight = next(model.parameters())[0, 0]
        return loss + (weight - weight.detach()).sqrt(), extra  # the slope of a square root at 0 is infinite

    state = make(precision="fp16")
    with pytest.raises(NonFiniteError, match="every gradient overflows in fp16 at step"):  # noqa: PT012
        for _ in range(40):
            state, _ = amp_step(state, [data()], overflowing, amp=AmpConfig(clip_norm=1.0))
            raise_if_nonfinite(state, checkpoint=None)


def test_the_average_follows_its_formula():
    state = make(ema_decay=0.9)
    expected = weights(state)
    for _ in range(3):
        state, _ = amp_step(state, [data()], squared, amp=AmpConfig())
        expected = 0.9 * expected + 0.1 * weights(state)
    assert state.ema is not None
    torch.testing.assert_close(torch.cat([p.flatten() for p in state.ema.parameters()]), expected)
    assert not any(p.requires_grad for p in state.ema.parameters())


def test_a_restored_state_goes_on_bit_for_bit():
    state = make(ema_decay=0.9)
    state, _ = amp_step(state, [data()], squared, amp=AmpConfig(clip_norm=1.0))
    other = load_state_tree(make(ema_decay=0.9), copy.deepcopy(state_tree(state)))
    for _ in range(2):
        state, _ = amp_step(state, [data()], squared, amp=AmpConfig(clip_norm=1.0))
        other, _ = amp_step(other, [data()], squared, amp=AmpConfig(clip_norm=1.0))
    assert torch.equal(weights(state), weights(other))
    assert other.step == 3
    assert other.ema is not None
    assert state.ema is not None
    assert all(torch.equal(a, b) for a, b in zip(state.ema.parameters(), other.ema.parameters(), strict=True))


def test_no_host_copy_in_a_step(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the step asked the device for a number")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    amp_step(make(ema_decay=0.5), [data()], squared, amp=AmpConfig(clip_norm=1.0), want_norm=True)


def test_precision_asks_the_hardware(monkeypatch):
    assert resolve_precision("auto", CPU)[0] == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    for name in ("bf16", "fp16"):
        with pytest.raises(ValueError, match="--precision fp32"):
            resolve_precision(name, CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert resolve_precision("bf16", CPU)[0] == "bf16"
    with pytest.raises(ValueError, match="must be auto"):
        resolve_precision("half", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_cuda_lowers_the_loss(precision):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    state = make_state(model, [optimizer], precision=precision, device=device)
    batch = tuple(part.to(device) for part in data())
    found = []
    for _ in range(20):
        state, output = amp_step(state, [batch], squared, amp=AmpConfig(precision=precision, clip_norm=1.0))  # type: ignore[arg-type]
        found.append(float(output.loss))
    assert found[-1] < found[0]
    raise_if_nonfinite(state, checkpoint=None)
