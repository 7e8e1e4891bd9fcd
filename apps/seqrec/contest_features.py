"""The contest's packs as the sequences and features that models are trained on and asked about.

Legend: U users, E events, D events with features of their own, I items, X cold candidates, F features, M values of a
list, N events of one kind.

Rows of features: 0..I padding and the items, I + 1..I + X the cold candidates, and behind them one for every event
whose features differ from its item's.
"""

from dataclasses import replace

import torch
from torch import Tensor

from apps.seqrec.contest import Candidates, Contest, Events
from apps.seqrec.dataset import Sequences, number_within
from apps.seqrec.features import Features
from shared.ranking import Lists


def training_sequences(contest: Contest) -> Sequences:
    """The training users' events of known items, with actions and features."""
    if contest.known_event is None:
        kept, own_event, own_feature = None, contest.own_event, contest.own_feature
    else:
        kept = contest.known_event
        is_kept = torch.isin(contest.own_event, kept)
        own_event, own_feature = contest.own_event[is_kept], contest.own_feature[is_kept]
        own_event = torch.searchsorted(kept, own_event)
    known = contest.sequences
    action = contest.action if kept is None else contest.action[kept]
    return with_features(contest, contest, replace(known, action=action), own_event, own_feature)


def query_sequences(contest: Contest) -> Sequences:
    """The test users' whole histories; the item of an unknown one is the row of a cold candidate, or 0."""
    events = contest.queries
    if events is None:
        raise ValueError(f"{contest.sequences.name} has no test users; prepare it from a folder with predict_seq.jsonl")
    item = events.item.clone()
    item[events.cold_event] = events.cold_row
    sequences = replace(events.history, item=item, action=events.action)
    return with_features(contest, events, sequences, events.own_event, events.own_feature)


def with_features(
    contest: Contest, users: Events, sequences: Sequences, own_event: Tensor, own_feature: Tensor
) -> Sequences:
    """The sequences with the features of their items and users; `own_event` ([D] int64) indexes their events."""
    cold = torch.zeros(contest.num_extra, contest.item_feature.shape[1], dtype=torch.int32)
    if contest.candidates is not None:
        is_cold = contest.candidates.item == 0
        place = contest.candidates.row[is_cold].long() - contest.item_feature.shape[0]
        cold[place] = contest.candidates.feature[is_cold]
    shared_rows = contest.item_feature.shape[0] + contest.num_extra
    own_item = sequences.item[own_event]
    num_items = contest.item_feature.shape[0] - 1
    row = None
    if own_event.numel():
        row = sequences.item.clone()
        row[own_event] = torch.arange(shared_rows, shared_rows + own_event.numel(), dtype=torch.int32)
    embedding_row = torch.cat([torch.arange(shared_rows, dtype=torch.int32), own_item])
    lists = {name: padded_lists(values) for name, values in users.user_lists.items()}
    features = Features(
        item=torch.cat([contest.item_feature, cold, own_feature])
        if shared_rows + len(own_item) > num_items + 1
        else contest.item_feature,
        item_id=torch.where(embedding_row <= num_items, embedding_row, 0),
        embedding_row=embedding_row,
        item_sizes=tuple(contest.vocab[field] for field in contest.item_fields),
        embeddings={name: part.value for name, part in contest.embeddings.items()},
        user=users.user_feature,
        user_sizes=tuple(contest.vocab[field] for field in contest.user_fields),
        user_lists=tuple(lists.values()),
        list_sizes=tuple(contest.vocab[field] for field in lists),
    )
    return replace(sequences, row=row, features=features, asked_time=users.profile_time)


def padded_lists(lists: Lists) -> Tensor:
    """The lists as rows, 0 behind the last value, [U, M] int32."""
    length = lists.ptr.diff()
    owner, place = number_within(length)
    rows = torch.zeros(length.numel(), int(length.max()) if length.numel() else 0, dtype=torch.int32)
    rows[owner, place] = lists.item
    return rows


def chosen_candidates(candidates: Candidates, *, cold: bool) -> Tensor:
    """Which candidates to rank, [N] int64 rising: all of them, or those that the training knows."""
    return torch.arange(candidates.item.numel()) if cold else candidates.item.nonzero().squeeze(1)
