"""Generated sequences with a hidden structure that a sequence model can learn and a count of items cannot.

Legend: U users, I items, C clusters, K successors of an item, T steps.

Items live in clusters ("genres"), some far more popular than others. A user has a few favourite clusters, and is of
one of a few kinds. Most of the time the next item is a hidden successor of the last one, and which of its successors
depends on the user's kind; otherwise the user jumps to an item of a favourite cluster, by popularity, usually after a
longer pause, and now and then to a signature item, which only users of this kind meet. So the last item alone leaves
several items to choose from, and the rest of the history tells which. Nobody meets an item twice, as in ratings data.
"""

from pathlib import Path

import torch
from torch import Tensor

from apps.seqrec.contest_demo import write_contest
from apps.seqrec.dataset import Sequences
from shared.files import atomic_write_text, tensor_crc32
from shared.seed import make_generator

NAME = "demo.txt"
CONTEST_USERS, CONTEST_ITEMS, CONTEST_LENGTH, CONTEST_SEED = 4000, 1000, 40, 7

_CLUSTER_ITEMS = 30
_FAVOURITES = 3
_FAVOURITE_SHARE = 0.9  # of the jumps; the rest go anywhere
_SUCCESSORS = 8
_KINDS = 4  # of users; the kind picks the successor of an item
_SIGNATURE_ITEMS = 30  # of each kind
_SIGNATURE_SHARE = 0.3  # of the jumps
_FOLLOW_SHARE = 0.7  # of the steps follow a successor, the rest jump: no model can be right about all
_ZIPF = 1.1  # popularity falls with rank to this power
_MEAN_LOG_LENGTH, _LOG_LENGTH_SPREAD = 3.35, 0.8  # mean about 39 events
_MIN_LENGTH, _MAX_LENGTH = 5, 200
_FIRST_TIME = 1_577_836_800  # 2020-01-01
_FIRST_TIMES_SPREAD_S = 2 * 365 * 86_400.0
_FOLLOW_PAUSE_S, _JUMP_PAUSE_S = 600.0, 86_400.0


def demo_sequences(*, num_users: int = 8000, num_items: int = 400, seed: int = 7) -> Sequences:
    """The sequences of `num_users` made-up users with times, a pure function of its arguments; under 2 seconds."""
    num_signatures = _KINDS * _SIGNATURE_ITEMS
    num_ordinary = num_items - num_signatures
    if num_users < 1 or num_ordinary < 2 * _CLUSTER_ITEMS:
        raise ValueError(
            f"demo data of {num_users} users and {num_items} items is too small; take at least 1 user and "
            f"{2 * _CLUSTER_ITEMS + num_signatures} items"
        )
    generator = make_generator(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    popularity_I = torch.randperm(num_items, generator=generator).double().add(1).pow(-_ZIPF)
    num_clusters = num_ordinary // _CLUSTER_ITEMS
    # the last items are the signatures, a cluster for each kind of user
    signature_cluster = num_clusters + torch.arange(num_signatures) % _KINDS
    cluster_I = torch.cat([torch.arange(num_ordinary) % num_clusters, signature_cluster])
    popularity_I[num_ordinary:] = 1.0
    kind_U = torch.randint(_KINDS, (num_users,), generator=generator)
    # successors are of the same cluster and the more likely the more popular: Gumbel top-k draws without replacement
    gumbel_II = -torch.log(-torch.log(uniform(num_items, num_items)))
    other_cluster_II = cluster_I[:, None] != cluster_I
    score_II = (gumbel_II + popularity_I.log()).masked_fill(other_cluster_II, -torch.inf).fill_diagonal_(-torch.inf)
    successor_IK = score_II.topk(_SUCCESSORS).indices

    favourite_UC = torch.zeros(num_users, num_clusters, dtype=torch.float64)
    favourite_UC.scatter_(1, uniform(num_users, num_clusters).topk(min(_FAVOURITES, num_clusters)).indices, 1.0)
    size_C = torch.zeros(num_clusters + _KINDS, dtype=torch.float64).index_add_(0, cluster_I, popularity_I)
    size_C, signature_size_C = size_C[:num_clusters], size_C[num_clusters:]
    taste_UC = (
        _FAVOURITE_SHARE * favourite_UC / (favourite_UC @ size_C)[:, None] + (1 - _FAVOURITE_SHARE) / size_C.sum()
    )
    own_UC = torch.nn.functional.one_hot(kind_U, _KINDS) / signature_size_C
    taste_UC = torch.cat([(1 - _SIGNATURE_SHARE) * taste_UC, _SIGNATURE_SHARE * own_UC], dim=1)

    normal_U = torch.randn(num_users, dtype=torch.float64, generator=generator)
    longest = min(_MAX_LENGTH, num_items // 2)
    length_U = (_MEAN_LOG_LENGTH + _LOG_LENGTH_SPREAD * normal_U).exp().long().clamp(_MIN_LENGTH, longest)
    # users by falling length: those still active at any step are the first rows, views without a copy
    length_U = length_U.sort(descending=True).values
    wish_UI = taste_UC[:, cluster_I] * popularity_I  # unnormalised; 0 once the user has met the item
    item_UT = torch.zeros(num_users, longest, dtype=torch.int64)
    jumped_UT = torch.ones(num_users, longest, dtype=torch.bool)
    for t in range(int(length_U[0])):
        active = int((length_U > t).sum())
        wish = wish_UI[:active]
        mass = wish.cumsum(1)
        draw = uniform(active, 1) * mass[:, -1:]
        chosen = torch.searchsorted(mass, draw, right=True).squeeze(1).clamp(max=num_items - 1)
        if t:
            last = item_UT[:active, t - 1]
            # the successor that the user's kind picks, or the next one that the user has not met
            nth = (kind_U[:active] * (_SUCCESSORS // _KINDS))[:, None] + torch.arange(_SUCCESSORS)
            candidate = successor_IK[last].gather(1, nth % _SUCCESSORS)
            is_new = wish.gather(1, candidate) > 0
            first_new = candidate.gather(1, is_new.int().argmax(1, keepdim=True)).squeeze(1)
            follows = (uniform(active) < _FOLLOW_SHARE) & is_new.any(1) & (last < num_ordinary)
            chosen = torch.where(follows, first_new, chosen)
            jumped_UT[:active, t] = ~follows
        item_UT[:active, t] = chosen
        wish.scatter_(1, chosen[:, None], 0.0)

    pause_UT = torch.where(jumped_UT, _JUMP_PAUSE_S, _FOLLOW_PAUSE_S) * -torch.log(1 - uniform(num_users, longest))
    begin_U = _FIRST_TIME + (uniform(num_users, 1) * _FIRST_TIMES_SPREAD_S).long()
    time_UT = begin_U + (1 + pause_UT.long()).cumsum(1)

    shuffled = torch.randperm(num_users, generator=generator)
    length_U, item_UT, time_UT = length_U[shuffled], item_UT[shuffled], time_UT[shuffled]
    is_event_UT = torch.arange(longest) < length_U[:, None]
    # items that nobody met do not exist, so that a file of these events gives the same sequences
    met, item = torch.unique(torch.randperm(num_items, generator=generator)[item_UT[is_event_UT]], return_inverse=True)
    ptr = torch.zeros(num_users + 1, dtype=torch.int64)
    ptr[1:] = length_U.cumsum(0)
    item, time = (item + 1).to(torch.int32), time_UT[is_event_UT]
    return Sequences(
        ptr=ptr,
        item=item,
        time=time,
        item_ids=tuple(str(i + 1) for i in range(met.numel())),
        user_ids=tuple(str(u + 1) for u in range(num_users)),
        fingerprint="demo-" + "".join(f"{tensor_crc32(tensor):08x}" for tensor in (ptr, item, time)),
        name="demo data",
    )


def write_text(folder: Path) -> Path:
    """The path of `demo_sequences` as SASRec text with times, in `folder`; an equal file is left alone."""
    sequences = demo_sequences()
    assert sequences.time is not None
    user = sequences.user_of_event + 1
    rows = zip(user.tolist(), sequences.item.tolist(), sequences.time.tolist(), strict=True)
    text = "".join(f"{u} {i} {t}\n" for u, i, t in rows)
    path = folder / NAME
    if not path.is_file() or path.read_bytes() != text.encode():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    return path


def write_demo(folder: Path) -> Path:
    """The folder, with demo data in the form of the contest: events, features, profiles, embeddings, test files.

    Equal data is left alone. contest_demo.py says what can be learned from it.
    """
    return write_contest(
        folder, num_users=CONTEST_USERS, num_items=CONTEST_ITEMS, mean_length=CONTEST_LENGTH, seed=CONTEST_SEED
    )
