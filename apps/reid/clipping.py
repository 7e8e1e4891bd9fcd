"""Adaptive clipping of gradients: to a quantile of the last norms, without asking the device for any of them.

Legend: W norms that are remembered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FACTOR = 1.15  # what the quantile is multiplied by
ENOUGH = 10  # norms before the quantile counts; all of the window where it is shorter


@dataclass(frozen=True)
class AdaptiveClip:
    """Clips to FACTOR times a quantile of the norms of past steps, between two limits; call it once per optimizer step.

    Norms that are not finite are neither remembered nor clipped to: those steps are counted. The tensors are on the
    device and change in place.
    """

    first: float  # largest norm until enough are known
    quantile: float
    low: float
    high: float
    norm_W: Tensor  # [W] float32, a ring of the last norms before clipping, infinite where there is none yet
    known: Tensor  # scalar int64, norms ever remembered
    skipped: Tensor  # scalar int64, norms ever that were not finite
    limit: Tensor  # scalar float32, what the last step was clipped to

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, which are clipped in place by what was known before."""
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        self.limit.copy_(self.largest_norm())
        # torch's own clipping with a limit on the device reads it
        torch._foreach_mul_(list(gradients), (self.limit / (norm + 1e-6)).clamp(max=1.0))
        is_finite = torch.isfinite(norm)
        place_W = torch.arange(self.norm_W.numel(), device=norm.device)
        is_next_W = place_W == self.known % self.norm_W.numel()
        self.norm_W.copy_(torch.where(is_next_W & is_finite, norm, self.norm_W))
        self.known.add_(is_finite)
        self.skipped.add_(~is_finite)
        return norm

    def largest_norm(self) -> Tensor:
        """What the next step is clipped to, a scalar on the device."""
        window = self.norm_W.numel()
        last = self.known.clamp(min=1, max=window) - 1
        place = last * self.quantile
        below = place.floor().long()
        pair = self.norm_W.sort().values.gather(0, torch.stack([below, torch.minimum(below + 1, last)]))
        between = torch.lerp(pair[0], pair[1], (place - below).float())  # as torch.quantile
        is_enough = self.known >= min(ENOUGH, window)
        return torch.where(is_enough, (FACTOR * between).clamp(self.low, self.high), self.first)

    def tree(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of it (no copies)."""
        return {"norms": self.norm_W, "known": self.known, "skipped": self.skipped, "limit": self.limit}

    def load(self, tree: Mapping[str, Tensor]) -> None:
        """As it was when `tree` was taken, in place."""
        for name, value in self.tree().items():
            value.copy_(tree[name])


def make_clip(
    *, first: float, window: int, quantile: float, low: float, high: float, device: torch.device
) -> AdaptiveClip:
    """A clip that knows no norm yet."""
    if low > high:
        raise ValueError(f"clip_low {low:g} is above clip_high {high:g}; lower --clip-low or raise --clip-high")
    count = torch.zeros((), dtype=torch.int64, device=device)
    return AdaptiveClip(
        first=first,
        quantile=quantile,
        low=low,
        high=high,
        norm_W=torch.full((window,), torch.inf, device=device),
        known=count,
        skipped=count.clone(),
        limit=torch.full((), first, device=device),
    )
