"""The losses as functions of features, labels and masks.

Legend: B samples of a batch, C subsets of the modalities beside RGB, F = 1 + C features of a sample (RGB first),
P identities, N features of a batch, E embedding dim.

    identity   cross-entropy with label smoothing: target (1 - e) y + e / P, as in TransReID
    sdm        similarity distribution matching between RGB and a subset; p = softmax of cosines over the temperature,
               q = the same identity over their number. kl: sum p log(p / (q + 1e-8)) in both directions (IRRA, Jiang
               and Ye 2023). ce: -sum q log p, the mean of both directions
    triplet    hardest positive and negative (Hermans et al. 2017): relu(m + d_p - d_n), or softplus(d_p - d_n)
    circle     pairwise (Sun et al. 2020): softplus(lse(-g a_p (s_p - 1 + m)) + lse(g a_n (s_n - m))) with
               a_p = relu(1 + m - s_p) and a_n = relu(s_n + m), which get no gradient

What a sample lacks is left out by multiplication and by logits of -1e9, whose exponential is exactly 0: nothing is read
back to the host. Cosines are computed in single precision at least, also under autocast: a temperature of 0.02 would
multiply bf16's rounding by 50.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.reid.config import TrainConfig

EXCLUDED = -1e9
KL_FLOOR = 1e-8  # added to q, which is 0 for other identities


class Output(Protocol):
    """What the model says about a batch."""

    @property
    def rgb_BE(self) -> Tensor: ...
    @property
    def query_CBE(self) -> Tensor: ...
    @property
    def has_CB(self) -> Tensor: ...  # bool
    @property
    def logits_FBP(self) -> Tensor: ...


class Losses(NamedTuple):
    """Scalars; a part whose weight is 0 is 0."""

    total: Tensor
    identity: Tensor
    sdm: Tensor
    triplet: Tensor
    circle: Tensor


def total(output: Output, label_B: Tensor, training: TrainConfig, subset_sizes: Sequence[int]) -> Losses:
    """The weighted sum of the losses, and each of them.

    subset_sizes: how many modalities each of the C subsets has. SDM is the sum of its means over the subsets of each
    size (ReID5o); identity, triplet and circle take all features of all samples.
    """
    rgb_BE, query_CBE, has_CB = output.rgb_BE, output.query_CBE, output.has_CB
    has_FB = torch.cat([torch.ones_like(label_B, dtype=torch.bool)[None], has_CB])
    zero = output.logits_FBP.new_zeros((), dtype=_exact(output.logits_FBP).dtype)
    identity = sdm_sum = triplet_mean = circle_mean = zero
    if training.id_weight:
        identity = identity_loss(output.logits_FBP, label_B, has_FB, smoothing=training.label_smoothing)
    if training.sdm_weight and len(subset_sizes):
        sdm_C = sdm(rgb_BE, query_CBE, label_B, has_CB, temperature=training.temperature, form=training.sdm_form)
        share = [1 / subset_sizes.count(size) for size in subset_sizes]
        sdm_sum = torch.stack([loss * part for loss, part in zip(sdm_C.unbind(0), share, strict=True)]).sum()
    if training.triplet_weight or training.circle_weight:
        feature_NE = torch.cat([rgb_BE[None], query_CBE]).flatten(0, 1)
        label_N, has_N = label_B.expand_as(has_FB).flatten(), has_FB.flatten()
        if training.triplet_weight:
            triplet_mean = triplet(feature_NE, label_N, has_N, margin=training.triplet_margin)
        if training.circle_weight:
            circle_mean = circle(feature_NE, label_N, has_N, margin=training.circle_margin, scale=training.circle_scale)
    weighted = (
        training.id_weight * identity
        + training.sdm_weight * sdm_sum
        + training.triplet_weight * triplet_mean
        + training.circle_weight * circle_mean
    )
    return Losses(weighted, identity, sdm_sum, triplet_mean, circle_mean)


def identity_loss(logits_FBP: Tensor, label_B: Tensor, has_FB: Tensor, *, smoothing: float) -> Tensor:
    """Mean cross-entropy over the features that are there ([F, B] bool); `smoothing` of it is spread over all classes.

    torchreid and TransReID spread over all classes, fast-reid over the others.
    """
    label_N = label_B.expand_as(has_FB).flatten()
    loss_N = F.cross_entropy(_exact(logits_FBP).flatten(0, 1), label_N, label_smoothing=smoothing, reduction="none")
    return _mean(loss_N, has_FB.flatten())


def sdm(rgb_BE: Tensor, query_CBE: Tensor, label_B: Tensor, has_CB: Tensor, *, temperature: float, form: str) -> Tensor:
    """Similarity distribution matching of RGB with each subset, [C]; 0 for a subset that no sample has.

    A sample without the subset takes no part in it, neither its query nor its RGB feature. form: kl or ce.
    """
    rgb_CBE = rgb_BE.expand_as(query_CBE)
    logits_CBB = _cosine(rgb_CBE, query_CBE) / temperature
    has_C1B = has_CB[:, None]  # of what a row is compared with; rows without are left out of the mean
    same_CBB = ((label_B[:, None] == label_B) & has_C1B).to(logits_CBB.dtype)
    target_CBB = same_CBB / same_CBB.sum(-1, keepdim=True).clamp(min=1)  # the same in both directions
    losses = []
    for direction_CBB in (logits_CBB, logits_CBB.transpose(1, 2)):
        log_p = F.log_softmax(direction_CBB.masked_fill(~has_C1B, EXCLUDED), dim=-1)
        if form == "kl":
            loss_CB = (log_p.exp() * (log_p - torch.log(target_CBB + KL_FLOOR))).sum(-1)
        else:
            loss_CB = -(target_CBB * log_p).sum(-1)
        losses.append(_mean(loss_CB, has_CB))
    return losses[0] + losses[1] if form == "kl" else (losses[0] + losses[1]) / 2


def triplet(feature_NE: Tensor, label_N: Tensor, has_N: Tensor, *, margin: float) -> Tensor:
    """Mean over anchors of the triplet loss with their farthest positive and nearest negative; margin 0 is soft.

    Distances are Euclidean between unit vectors, since the ranking is by cosine. Anchors without a positive do not
    count; where all are of one identity, the loss is 0.
    """
    positive_NN, negative_NN = _pairs(label_N, has_N)
    distance_NN = (2 - 2 * _cosine(feature_NE, feature_NE)).clamp(min=1e-6).sqrt()
    farthest_N = distance_NN.masked_fill(~positive_NN, EXCLUDED).amax(1)
    nearest_N = distance_NN.masked_fill(~negative_NN, -EXCLUDED).amin(1)
    gap_N = farthest_N - nearest_N
    return _mean(F.relu(gap_N + margin) if margin else F.softplus(gap_N), positive_NN.any(1))


def circle(feature_NE: Tensor, label_N: Tensor, has_N: Tensor, *, margin: float, scale: float) -> Tensor:
    """Mean over anchors of the pairwise circle loss; anchors without a positive do not count."""
    positive_NN, negative_NN = _pairs(label_N, has_N)
    cosine_NN = _cosine(feature_NE, feature_NE)
    fixed_NN = cosine_NN.detach()
    pull_NN = -scale * F.relu(1 + margin - fixed_NN) * (cosine_NN - 1 + margin)
    push_NN = scale * F.relu(fixed_NN + margin) * (cosine_NN - margin)
    pull_N = torch.logsumexp(pull_NN.masked_fill(~positive_NN, EXCLUDED), dim=1)
    push_N = torch.logsumexp(push_NN.masked_fill(~negative_NN, EXCLUDED), dim=1)
    return _mean(F.softplus(pull_N + push_N), positive_NN.any(1))


def _pairs(label_N: Tensor, has_N: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of features are of the same identity (itself excepted), and which are of two; [N, N] bool."""
    both_NN = has_N[:, None] & has_N
    same_NN = label_N[:, None] == label_N
    itself_NN = torch.eye(label_N.numel(), dtype=torch.bool, device=label_N.device)
    return both_NN & same_NN & ~itself_NN, both_NN & ~same_NN


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosines between all rows of [..., N, E] and [..., M, E], [..., N, M]."""
    with torch.autocast(left.device.type, enabled=False):
        return F.normalize(_exact(left), dim=-1) @ F.normalize(_exact(right), dim=-1).transpose(-1, -2)


def _mean(loss: Tensor, counts: Tensor) -> Tensor:
    """The mean over the last axis where `counts` is True; 0 where it never is. Losses elsewhere get no gradient."""
    return torch.where(counts, loss, 0).sum(-1) / counts.sum(-1).clamp(min=1)
