"""The original CLCRec's mathematics, written again from its formulas: slow loops in float64, to compare with.

Legend: U users, I items, W warm items, B pairs of a batch, M = 1 + N columns (0 the positive), F features, H hidden, D
embedding dim. Items are rows 0..I-1 with the warm ones first: the original's item ids less U. Nothing here imports the
app. Parameters are a dictionary of float64 tensors:

    user [U, D], item [I, D] (or [W, D]: no cold item is ever looked up), w1 [H, F], b1 [H], w2 [D, H], b2 [D],
    and words [num_words, any], where text comes as lists of words
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Params = Mapping[str, Tensor]

NORMALIZE_EPS = 1e-12  # vectors shorter than this are divided by it instead of by their length
LEAKY_SLOPE = 0.01
LEGACY_MASK = 1e-15  # what the original writes over scores that must not be recommended


@dataclass(frozen=True)
class Features:
    """Content as the source has it, not normalised."""

    content: Mapping[str, Tensor] = field(default_factory=dict)  # modality (v, a or t) -> [I, any] float64
    words: Sequence[Sequence[int]] | None = None  # t as words: of every item, with repeats


class Parts(NamedTuple):
    """The terms of the loss, float64 scalars."""

    item_content: Tensor  # L1
    user_item: Tensor  # L2
    norms: Tensor  # R, without its weight
    total: Tensor


class Result(NamedTuple):
    """What the original's loss gives, and its gradients."""

    total: float
    returned: tuple[float, float, float]  # (total, L2 + reg_weight R, reg_weight R)
    grads: dict[str, Tensor]  # of the total, one of the parameter's shape for every parameter; zeros where unused


# The encoder


def length(vector: Tensor) -> Tensor:
    """The Euclidean norm; of a vector of zeros it is a constant zero, whose gradient is zero and not NaN."""
    squares = (vector * vector).sum()
    return torch.sqrt(squares) if squares.item() > 0 else torch.zeros((), dtype=torch.float64)


def unit(vector: Tensor) -> Tensor:
    """The vector at length 1."""
    norm = length(vector)
    return vector / norm if norm.item() > NORMALIZE_EPS else vector / NORMALIZE_EPS


def input_row(params: Params, features: Features, item: int) -> Tensor:
    """What the encoder sees of an item, [F]: every modality at length 1, in the order v, a, t."""
    parts = [unit(features.content[name][item]) for name in ("v", "a", "t") if name in features.content]
    if features.words is not None:
        mean = torch.zeros(params["words"].shape[1], dtype=torch.float64)
        for word in features.words[item]:
            mean = mean + params["words"][word] / len(features.words[item])
        parts.append(unit(mean))
    return torch.cat(parts)


def encode(params: Params, features: Features) -> list[Tensor]:
    """Feat of every item, I vectors of [D]: W2 LeakyReLU(W1 x + b1) + b2."""
    num_items = len(features.words) if features.words is not None else len(next(iter(features.content.values())))
    encoded = []
    for item in range(num_items):
        x = input_row(params, features, item)
        hidden = []
        for weight, bias in zip(params["w1"], params["b1"], strict=True):
            y = (weight * x).sum() + bias
            hidden.append(y if y.item() > 0 else LEAKY_SLOPE * y)
        h = torch.stack(hidden)
        encoded.append(
            torch.stack([(weight * h).sum() + bias for weight, bias in zip(params["w2"], params["b2"], strict=True)])
        )
    return encoded


def final_items(params: Params, features: Features, num_warm: int) -> Tensor:
    """What users are scored against, [I, D]: embeddings of warm items, content of cold ones."""
    encoded = encode(params, features)
    return torch.stack([params["item"][i] if i < num_warm else encoded[i] for i in range(len(encoded))]).detach()


# The loss


def drawn_positions(batch_size: int, columns: int, num_sample: float, generator: torch.Generator) -> list[int]:
    """Flat positions of a batch to replace: floor(B M num_sample) of them, uniform, with repeats, positives too."""
    count = math.floor(batch_size * columns * num_sample)
    return torch.randint(batch_size * columns, (count,), generator=generator).tolist()


def contrastive(scores_BM: Sequence[Sequence[Tensor]]) -> Tensor:
    """mean_b(log sum_j exp s[b, j] - s[b, 0])."""
    losses = []
    for scores in scores_BM:
        top = max(s.item() for s in scores)  # a constant: exp stays finite, value and gradient stay the same
        losses.append(torch.log(torch.stack([torch.exp(s - top) for s in scores]).sum()) + top - scores[0])
    return torch.stack(losses).mean()


def loss_parts(
    params: Params,
    features: Features,
    user_B: Sequence[int],
    item_BM: Sequence[Sequence[int]],
    replaced_positions: Sequence[int],
    *,
    temperature: float,
    lr_lambda: float,
    reg_weight: float,
) -> Parts:
    """L1, L2, R and the total, on the graph of `params`."""
    encoded = encode(params, features)
    scores_1 = []
    for items in item_BM:
        anchor = unit(params["item"][items[0]])
        scores_1.append([(anchor * unit(encoded[i])).sum() / temperature for i in items])

    columns = len(item_BM[0])
    flat = [i for items in item_BM for i in items]
    # The original's own assignment. Repeats write the same value more than once, but autograd hands the gradient of a
    # written place to every one of its writers in full.
    z = torch.stack([params["item"][i] for i in flat])
    feat = torch.stack([encoded[i] for i in flat])
    index = torch.tensor(list(replaced_positions), dtype=torch.int64)
    z[index] = feat[index]
    scores_2 = []
    for b, user in enumerate(user_B):
        scores_2.append([(params["user"][user] * z[b * columns + j]).sum() / temperature for j in range(columns)])

    users = torch.stack([length(params["user"][u]) for u in user_B]).mean()
    items_mean = torch.stack([length(params["item"][i]) for i in flat]).mean()
    norms = 0.5 * (users + items_mean)

    item_content, user_item = contrastive(scores_1), contrastive(scores_2)
    total = lr_lambda * item_content + (1 - lr_lambda) * user_item + reg_weight * norms
    return Parts(item_content, user_item, norms, total)


def original_loss(
    params: Params,
    features: Features,
    user_B: Sequence[int] | Tensor,
    item_BM: Sequence[Sequence[int]] | Tensor,
    replaced_positions: Sequence[int] | Tensor,
    *,
    temperature: float,
    lr_lambda: float,
    reg_weight: float,
) -> Result:
    """The loss of a batch, the three values that the original returns, and the gradient of every parameter.

    `replaced_positions` are places b M + j of the flattened batch, in any order, repeated as often as they were drawn.
    """
    leaves = {name: value.detach().double().requires_grad_() for name, value in params.items()}
    parts = loss_parts(
        leaves,
        features,
        torch.as_tensor(user_B).tolist(),
        torch.as_tensor(item_BM).tolist(),
        torch.as_tensor(replaced_positions, dtype=torch.int64).tolist(),
        temperature=temperature,
        lr_lambda=lr_lambda,
        reg_weight=reg_weight,
    )
    found = torch.autograd.grad(parts.total, list(leaves.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(leaf) if grad is None else grad.detach()
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    penalty = reg_weight * parts.norms.item()
    return Result(parts.total.item(), (parts.total.item(), parts.user_item.item() + penalty, penalty), grads)


def finite_differences(value_of: Callable[[Params], float], params: Params, *, step: float = 1e-6) -> dict[str, Tensor]:
    """The gradient of `value_of` by central differences, one parameter number at a time.

    A true derivative: it agrees with the original's gradients where no position is replaced twice.
    """
    gradients = {}
    for name, value in params.items():
        gradient = torch.zeros_like(value, dtype=torch.float64)
        for place in range(value.numel()):
            ends = []
            for move in (step, -step):
                moved = value.detach().double().clone()
                moved.view(-1)[place] += move
                ends.append(value_of({**params, name: moved}))
            gradient.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        gradients[name] = gradient
    return gradients


# The metrics


def original_metrics(
    user_factors: Tensor,
    item_factors: Tensor,
    train_sets: Sequence[set[int]] | Mapping[int, set[int]],
    relevant: Sequence[set[int]] | Mapping[int, set[int]],
    *,
    group: str,
    num_warm: int,
    k: int,
    mask_value: float,
) -> dict[str, float]:
    """Means of "precision", "recall" and "ndcg" at k over the users with a relevant item, and "users", their number.

    Every item of the catalogue is ranked by its dot product with the user. The score of the user's training positives,
    and of the cold items (group "warm") or the warm ones (group "cold"), is `mask_value` instead: -inf, which leaves
    them out, or the original's LEGACY_MASK, which still beats every negative score. `relevant` holds what is relevant
    in the split and group asked for. Of equal scores the relevant item stands last: the original leaves their order to
    topk.
    """
    if group not in ("all", "warm", "cold"):
        raise ValueError(f"group is {group}; it must be all, warm or cold")
    user_rows: list[list[float]] = user_factors.double().tolist()
    item_rows: list[list[float]] = item_factors.double().tolist()
    precision, recall, ndcg = [], [], []
    for user, user_row in enumerate(user_rows):
        wanted = _of(relevant, user)
        if not wanted:
            continue
        scores = []
        for item, item_row in enumerate(item_rows):
            masked = (
                item in _of(train_sets, user)
                or (group == "warm" and item >= num_warm)
                or (group == "cold" and item < num_warm)
            )
            score = 0.0
            for a, b in zip(user_row, item_row, strict=True):
                score += a * b
            scores.append(mask_value if masked else score)
        order = sorted((-score, item in wanted, item) for item, score in enumerate(scores) if score > -math.inf)
        ranking = [item for _, _, item in order]
        hits, gain, ideal = 0, 0.0, 0.0
        for place in range(k):
            if place < len(ranking) and ranking[place] in wanted:
                hits += 1
                gain += 1 / math.log2(place + 2)
            if place < len(wanted):
                ideal += 1 / math.log2(place + 2)
        precision.append(hits / k)
        recall.append(hits / len(wanted))
        ndcg.append(gain / ideal)
    users = len(recall)
    return {
        "precision": sum(precision) / users,
        "recall": sum(recall) / users,
        "ndcg": sum(ndcg) / users,
        "users": users,
    }


def _of(sets: Sequence[set[int]] | Mapping[int, set[int]], user: int) -> set[int]:
    if isinstance(sets, Mapping):
        return sets.get(user, set())
    return sets[user]
