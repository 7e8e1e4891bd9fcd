"""shared.seed: draws depend on (seed, epoch, step, stream) alone."""

import itertools
import random

import pytest
import torch

from shared.seed import fold, make_generator, seed_everything, seed_step


def splitmix_reference(*ids: int) -> int:
    """The same recipe written with 64-bit wrap-around spelled out as modulo."""
    modulus = 2**64
    state = len(ids)
    for value in ids:
        state = ((state ^ (value % modulus)) + 0x9E3779B97F4A7C15) % modulus
        state = ((state ^ (state // 2**30)) * 0xBF58476D1CE4E5B9) % modulus
        state = ((state ^ (state // 2**27)) * 0x94D049BB133111EB) % modulus
        state = state ^ (state // 2**31)
    return state // 2


@pytest.mark.parametrize("ids", [(), (0,), (1, 2, 3, 4), (-1, -(2**63)), (2**64 + 5,), (2**63, 0, 0)])
def test_fold_equals_the_recipe_in_plain_arithmetic(ids):
    assert fold(*ids) == splitmix_reference(*ids)


def test_fold_fits_63_bits_and_spreads_over_them():
    values = [fold(seed, 0, step) for seed in range(8) for step in range(500)]
    assert all(0 <= value < 2**63 for value in values)
    for bit in range(63):
        ones = sum(value >> bit & 1 for value in values)
        assert 1800 < ones < 2200, f"bit {bit} is set in {ones} of {len(values)}"


def test_nearby_ids_never_share_the_32_bits_that_the_cpu_generator_uses():
    ids = itertools.product(range(5), range(10), range(40), range(3))
    low_bits = [fold(*group) & 0xFFFFFFFF for group in ids]
    assert len(set(low_bits)) == len(low_bits)


def test_order_and_count_of_ids_matter():
    assert fold(1, 2) != fold(2, 1)
    assert len({fold(), fold(0), fold(0, 0), fold(0, 0, 0)}) == 4


def test_a_generator_is_the_same_whatever_was_drawn_before():
    want = torch.rand(5, generator=make_generator(3, epoch=1, step=7, stream=2))
    torch.rand(1000)
    torch.rand(17, generator=make_generator(3, epoch=1, step=6, stream=2))
    assert torch.equal(torch.rand(5, generator=make_generator(3, epoch=1, step=7, stream=2)), want)


@pytest.mark.parametrize(
    "other",
    [
        make_generator(4, epoch=1, step=7, stream=2),
        make_generator(3, epoch=2, step=7, stream=2),
        make_generator(3, epoch=1, step=8, stream=2),
        make_generator(3, epoch=1, step=7, stream=3),
    ],
    ids=["seed", "epoch", "step", "stream"],
)
def test_each_of_the_four_numbers_changes_the_draws(other):
    base = torch.rand(4, generator=make_generator(3, epoch=1, step=7, stream=2))
    assert not torch.equal(torch.rand(4, generator=other), base)


def test_making_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    make_generator(1, step=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_step_does_not_depend_on_earlier_steps():
    dropout = torch.nn.Dropout(0.5)
    ones = torch.ones(64)
    seed_step(0, 0, 0)
    dropout(ones)
    seed_step(0, 0, 1)
    after_a_step = dropout(ones)
    seed_step(0, 0, 1)
    resumed = dropout(ones)
    seed_step(0, 0, 2)
    assert torch.equal(after_a_step, resumed)
    assert not torch.equal(dropout(ones), resumed)


def test_seed_everything_repeats_torch_and_python():
    seed_everything(11)
    first = (torch.rand(3).tolist(), random.random())
    seed_everything(11)
    assert (torch.rand(3).tolist(), random.random()) == first
    seed_everything(12)
    assert torch.rand(3).tolist() != first[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_repeat_too():
    draws = [torch.rand(4, device="cuda", generator=make_generator(1, step=2, device="cuda")) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])
    masks = []
    for _ in range(2):
        seed_step(5, 0, 9)
        masks.append(torch.nn.functional.dropout(torch.ones(64, device="cuda")))
    assert torch.equal(masks[0], masks[1])
