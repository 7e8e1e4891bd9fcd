"""Randomness as a function of (seed, epoch, step, stream), never of history: resuming restores integers."""

import random

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio; keeps runs of zeros from staying zero


def fold(*ids: int) -> int:
    """A well-mixed number in 0 .. 2**63 - 1 that depends on every id, their order and their count.

    Ids are taken modulo 2**64, so negative ones are fine. The mixing is splitmix64's finaliser after each id; the low
    32 bits are as good as the high ones, which matters because torch's CPU generator uses only those.
    """
    state = len(ids)
    for value in ids:
        state = ((state ^ (value & _MASK)) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def make_generator(
    seed: int, *, epoch: int = 0, step: int = 0, stream: int = 0, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh generator on `device` whose draws depend on these four numbers alone.

    `stream` keeps uses apart that share seed, epoch and step (shuffling, negatives, masks). CPU and CUDA generators
    draw different numbers from the same seed.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(fold(seed, epoch, step, stream))
    return generator


def seed_step(seed: int, epoch: int, step: int, stream: int = 0) -> None:
    """Seeds torch's global generators on all devices in place; this step's dropout is then the same after a resume."""
    torch.manual_seed(fold(seed, epoch, step, stream))


def seed_everything(seed: int) -> None:
    """Seeds Python's and torch's global generators in place; the initial weights then depend on `seed` alone."""
    random.seed(seed)
    torch.manual_seed(fold(seed))
