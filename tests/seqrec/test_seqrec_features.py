"""Features of items and users as one table, and the tower's vectors, against dictionaries looked up one by one."""

import copy
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from apps.seqrec import model as model_module
from apps.seqrec.config import ModelConfig
from apps.seqrec.dataset import Sequences
from apps.seqrec.features import Features, Tower
from apps.seqrec.model import SeqRec

ITEM_SIZES = {"100": 3, "112": 9, "117": 5}
USER_SIZES = {"103": 6, "105": 2}
LIST_SIZES = {"106": 4, "110": 7}
WIDTHS = {"81": 3, "82": 5}


class Event(NamedTuple):
    item: int
    action: int
    time: int
    own: dict[str, int] | None  # features where they are not the item's


class World(NamedTuple):
    """What a contest folder says, as dictionaries; a value that is missing has no entry."""

    items: list[dict[str, int]]  # features of item i at [i - 1]
    vectors: dict[str, dict[int, list[float]]]  # family -> item -> embedding
    profiles: list[dict[str, Any]]  # by user: field -> value, or values
    histories: list[list[Event]]


def some(sizes: dict[str, int], draw: random.Random, *, share: float = 0.8) -> dict[str, int]:
    return {field: draw.randint(1, size) for field, size in sizes.items() if draw.random() < share}


def make_world(lengths: list[int], *, num_items: int = 20, seed: int = 0, own_share: float = 0.2) -> World:
    """Random users; the last item has no features and item 2 no embeddings, and so has the last user no profile."""
    draw = random.Random(seed)
    items = [some(ITEM_SIZES, draw) for _ in range(num_items - 1)] + [{}]
    vectors = {
        family: {i: [draw.gauss(0, 1) for _ in range(width)] for i in range(1, num_items + 1) if i != 2}
        for family, width in WIDTHS.items()
    }
    profiles: list[dict[str, Any]] = [
        {
            **some(USER_SIZES, draw),
            **{field: draw.sample(range(1, size + 1), draw.randint(0, 3)) for field, size in LIST_SIZES.items()},
        }
        for _ in lengths
    ]
    if profiles:
        profiles[-1] = {}
    histories = []
    for length in lengths:
        time = 1_700_000_000 + draw.randint(0, 1_000_000)
        history = []
        for _ in range(length):
            time += draw.choice([0, 1, 30, 5_000, 90_000])
            own = some(ITEM_SIZES, draw) if draw.random() < own_share else None
            history.append(Event(draw.randint(1, num_items), draw.randint(0, 2), time, own))
        histories.append(history)
    return World(items, vectors, profiles, histories)


def number(features: dict[str, Any], sizes: dict[str, int]) -> list[int]:
    return [features.get(field, 0) for field in sizes]


def features_of(world: World) -> Features:
    """The world's features: rows of the items, then one for every event with features of its own."""
    events = [event for history in world.histories for event in history if event.own is not None]
    rows = [{}, *world.items, *(event.own for event in events)]
    row_items = [*range(len(world.items) + 1), *(event.item for event in events)]
    lists = []
    for field in LIST_SIZES:
        values = [profile.get(field, []) for profile in world.profiles]
        width = max((len(v) for v in values), default=0)
        padded = [v + [0] * (width - len(v)) for v in values]
        lists.append(torch.tensor(padded, dtype=torch.int32).view(len(values), width))
    return Features(
        item=torch.tensor([number(row or {}, ITEM_SIZES) for row in rows], dtype=torch.int32),
        item_id=torch.tensor(row_items, dtype=torch.int32),
        embedding_row=torch.tensor(row_items, dtype=torch.int32),
        item_sizes=tuple(ITEM_SIZES.values()),
        embeddings={
            family: torch.tensor(
                [known.get(i, [0.0] * WIDTHS[family]) for i in range(len(world.items) + 1)], dtype=torch.float16
            )
            for family, known in world.vectors.items()
        },
        user=torch.tensor([number(profile, USER_SIZES) for profile in world.profiles], dtype=torch.int32),
        user_sizes=tuple(USER_SIZES.values()),
        user_lists=tuple(lists),
        list_sizes=tuple(LIST_SIZES.values()),
    )


def sequences_of(world: World, *, features: bool = True, times: bool = True, actions: bool = True) -> Sequences:
    """The world as the trainer gets it."""
    events = [event for history in world.histories for event in history]
    own_row = len(world.items)
    rows = []
    for event in events:
        own_row += event.own is not None
        rows.append(event.item if event.own is None else own_row)
    return Sequences(
        ptr=torch.tensor([0, *torch.tensor([len(h) for h in world.histories]).cumsum(0).tolist()]),
        item=torch.tensor([event.item for event in events], dtype=torch.int32),
        time=torch.tensor([event.time for event in events]) if times else None,
        item_ids=tuple(f"i{i}" for i in range(1, len(world.items) + 1)),
        user_ids=tuple(f"u{u}" for u in range(len(world.histories))),
        fingerprint="world",
        name="world",
        action=torch.tensor([event.action for event in events], dtype=torch.int8) if actions else None,
        row=torch.tensor(rows, dtype=torch.int32) if features else None,
        features=features_of(world) if features else None,
    )


class SlowTower:
    """Vectors from dictionaries, in float64 and with gradients, of the parameters that a tower has."""

    def __init__(self, tower: Tower, world: World) -> None:
        self.world = world
        self.table = tower.table.weight.double()
        self.project: dict[str, Tensor] = {
            family: tower.get_parameter(f"project.{family}.weight").double() for family in tower.project
        }
        self.numbers: dict[tuple[str, int], int] = {}
        for sizes in (ITEM_SIZES, USER_SIZES, LIST_SIZES):
            for field, size in sizes.items():
                for value in range(1, size + 1):
                    self.numbers[field, value] = len(self.numbers) + 1

    def features(self, found: dict[str, int]) -> Tensor:
        total = torch.zeros(self.table.shape[1], dtype=torch.float64)
        for field, value in found.items():
            total = total + self.table[self.numbers[field, value]]
        return total

    def item(self, item: int, own: dict[str, int] | None = None) -> Tensor:
        """Without the id's own vector."""
        total = self.features(self.world.items[item - 1] if own is None else own)
        for family, weight in self.project.items():
            if item in self.world.vectors[family]:
                vector = torch.tensor(self.world.vectors[family][item], dtype=torch.float16).double()
                total = total + weight @ (vector / vector.square().sum().sqrt())
        return total

    def user(self, user: int) -> Tensor:
        profile = self.world.profiles[user]
        total = self.features({field: profile[field] for field in USER_SIZES if field in profile})
        for field in LIST_SIZES:
            values = profile.get(field, [])
            if values:
                total = total + sum(self.table[self.numbers[field, value]] for value in values) / len(values)
        return total


def slow_vector(model: SeqRec, world: World, item: int, own: dict[str, int] | None = None) -> Tensor:
    """What tokens and scores of an event are made of, in float64."""
    return model.item.weight[item].double() + slow_tower(model, world).item(item, own)


def slow_tower(model: SeqRec, world: World) -> SlowTower:
    assert model.tower is not None
    return SlowTower(model.tower, world)


def make_tower(features: Features, width: int = 8) -> Tower:
    torch.manual_seed(3)
    tower = Tower(features, width)
    with torch.no_grad():
        tower.table.weight.normal_()[0].zero_()
    return tower


LENGTHS = [4, 9, 0, 3, 6]


def test_rows_of_items_are_sums_over_their_features_and_projected_embeddings():
    world = make_world(LENGTHS)
    tower = make_tower(features_of(world))
    slow = SlowTower(tower, world)
    rows = torch.tensor([5, 1, 20, 2, 5])
    expected = torch.stack([slow.item(item) for item in rows.tolist()])
    torch.testing.assert_close(tower.rows(rows).double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_events_have_their_own_features_and_their_items_embeddings():
    world = make_world(LENGTHS)
    tower = make_tower(features_of(world))
    slow = SlowTower(tower, world)
    own = [event for history in world.histories for event in history if event.own is not None]
    assert len(own) >= 2
    found = tower.rows(torch.arange(21, 21 + len(own)))
    expected = torch.stack([slow.item(event.item, event.own) for event in own])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert any(event.own != world.items[event.item - 1] for event in own)


def test_profiles_are_sums_in_which_a_list_counts_as_the_mean_of_its_values():
    world = make_world(LENGTHS)
    tower = make_tower(features_of(world))
    slow = SlowTower(tower, world)
    assert {len(profile.get("106", [])) for profile in world.profiles} >= {0, 1, 2}
    users = torch.tensor([4, 0, 1, 3, 2, 0])
    expected = torch.stack([slow.user(user) for user in users.tolist()])
    found = tower.users(users)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found[0].any()  # no profile at all


def test_gradients_equal_those_of_the_lookups_one_by_one():
    world = make_world(LENGTHS)
    tower = make_tower(features_of(world))
    weight = torch.randn(21 + 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slow = SlowTower(tower, world)
    parts = [slow.item(item) @ weight[item] for item in range(1, 21)]
    parts += [slow.user(user) @ weight[21 + user] for user in range(5)]
    parameters = list(tower.parameters())
    expected = torch.autograd.grad(torch.stack(parts).sum(), parameters)
    found = (tower.rows(torch.arange(1, 21)) * weight[1:21].float()).sum()
    found = found + (tower.users(torch.arange(5)) * weight[21:].float()).sum()
    for mine, theirs in zip(torch.autograd.grad(found, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_every_value_of_every_field_has_a_vector_of_its_own_and_missing_has_none():
    sizes = (*ITEM_SIZES.values(), *USER_SIZES.values(), *LIST_SIZES.values())
    tower = make_tower(features_of(make_world(LENGTHS)))
    assert tower.table.num_embeddings == 1 + sum(sizes)
    used: list[int] = []
    for field, size in enumerate(ITEM_SIZES.values()):
        for value in range(1, size + 1):
            row = torch.zeros(1, 3, dtype=torch.int32)
            row[0, field] = value
            features = features_of(make_world(LENGTHS, own_share=0.0))
            features.item[1] = row
            tower.features = features
            tower.zero_grad()
            tower.rows(torch.tensor([1])).sum().backward()
            assert tower.table.weight.grad is not None
            used += tower.table.weight.grad.any(1).nonzero().squeeze(1).tolist()
    assert len(used) == len(set(used)) == sum(ITEM_SIZES.values())
    assert 0 not in used


def test_an_embeddings_length_is_nothing_and_neither_overflows_in_half_precision():
    world = make_world(LENGTHS)
    one, large = features_of(world), features_of(world)
    large.embeddings["82"].mul_(8192.0)  # their squares overflow float16
    assert torch.isinf(large.embeddings["82"].square().sum(1)).any()
    tower = make_tower(one)
    rows = torch.arange(21)
    expected = tower.rows(rows)
    tower.features = large
    torch.testing.assert_close(tower.rows(rows), expected)


def test_an_item_without_an_embedding_adds_nothing_and_its_gradient_is_finite():
    world = make_world(LENGTHS)
    tower = make_tower(features_of(world))
    found = tower.rows(torch.tensor([2]))
    torch.testing.assert_close(found[0].double(), SlowTower(tower, world).features(world.items[1]), rtol=1e-5, atol=0)
    found.sum().backward()
    for family in WIDTHS:
        gradient = tower.get_parameter(f"project.{family}.weight").grad
        assert gradient is not None
        assert not gradient.any()


def test_items_without_an_id_have_features_and_embeddings_alone():
    """Row 21 is a candidate that training never met, with an embedding in a row of its own."""
    world = make_world(LENGTHS, own_share=0.0)
    known = features_of(world)
    cold_vector = torch.tensor([[1.0, -2.0, 2.0]], dtype=torch.float16)
    features = Features(
        item=torch.cat([known.item, torch.tensor([[1, 0, 5]], dtype=torch.int32)]),
        item_id=torch.cat([known.item_id, torch.zeros(1, dtype=torch.int32)]),
        embedding_row=torch.arange(22, dtype=torch.int32),
        item_sizes=known.item_sizes,
        embeddings={"81": torch.cat([known.embeddings["81"], cold_vector])},
        user=known.user,
        user_sizes=known.user_sizes,
        user_lists=known.user_lists,
        list_sizes=known.list_sizes,
    )
    model = SeqRec(ModelConfig(embed_dim=8), num_items=20, max_len=5, features=features)
    assert model.tower is not None
    slow = SlowTower(model.tower, world)
    expected = slow.features({"100": 1, "117": 5}) + slow.project["81"] @ torch.tensor([1.0, -2.0, 2.0]).double() / 3
    found = model.vectors(torch.tensor([0, 21, 4]))
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2].double(), slow_vector(model, world, 4), rtol=1e-5, atol=1e-6)
    assert not found[0].any()
    assert model.vectors().shape == (21, 8)  # unknown items are no part of the catalogue


def test_padding_has_no_vector_whatever_its_features():
    features = features_of(make_world(LENGTHS))
    features.item[0] = 1
    features.embeddings["81"][0] = 1.0
    model = SeqRec(ModelConfig(embed_dim=8), num_items=20, max_len=5, features=features)
    found = model.vectors()
    assert not found[0].any()
    assert found[1:].abs().sum(1).all()
    (gradient,) = torch.autograd.grad(found[0].sum(), model.tower.table.weight)  # type: ignore[union-attr]
    assert not gradient.any()


@pytest.mark.parametrize("rows", [1, 6, 21])
def test_a_catalogue_encoded_in_pieces_has_the_same_vectors(monkeypatch, rows):
    world = make_world(LENGTHS)
    model = SeqRec(ModelConfig(embed_dim=8), num_items=20, max_len=5, features=features_of(world))
    with torch.no_grad():
        whole = model.vectors()
    monkeypatch.setattr(model_module, "CATALOGUE_ROWS", rows)
    with torch.no_grad():
        torch.testing.assert_close(model.vectors(), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.vectors().detach(), whole, rtol=1e-6, atol=1e-6)
    expected = torch.stack([slow_vector(model, world, item) for item in range(1, 21)])
    torch.testing.assert_close(whole[1:].double(), expected, rtol=1e-5, atol=1e-6)


def test_data_may_lack_every_kind_of_feature():
    nothing = Features(
        item=torch.zeros(6, 0, dtype=torch.int32),
        item_id=torch.arange(6, dtype=torch.int32),
        embedding_row=torch.arange(6, dtype=torch.int32),
        item_sizes=(),
        embeddings={},
        user=torch.zeros(2, 0, dtype=torch.int32),
        user_sizes=(),
        user_lists=(torch.zeros(2, 0, dtype=torch.int32),),
        list_sizes=(3,),
    )
    tower = Tower(nothing, 4)
    assert not tower.rows(torch.arange(6)).any()
    assert not tower.users(torch.arange(2)).any()
    model = SeqRec(ModelConfig(embed_dim=4), num_items=5, max_len=5, features=nothing)
    assert torch.equal(model.vectors(), model.item.weight)


# Families


def test_only_the_families_asked_for_are_used():
    features = features_of(make_world(LENGTHS))
    assert features.with_families(["all"], name="x") is features
    assert features.with_families(("all",), name="x") is features
    one = features.with_families(["82"], name="x")
    assert list(one.embeddings) == ["82"]
    assert one.embeddings["82"] is features.embeddings["82"]
    assert list(Tower(one, 4).project) == ["82"]
    assert not features.with_families([], name="x").embeddings
    assert list(features.embeddings) == ["81", "82"]


@pytest.mark.parametrize("wanted", [["83"], ["81", "83"]])
def test_a_family_that_the_data_lacks_is_named_with_those_it_has(wanted):
    features = features_of(make_world(LENGTHS))
    with pytest.raises(ValueError, match="demo has no embeddings of family 83; it has 81, 82: change --embeddings"):
        features.with_families(wanted, name="demo")
    with pytest.raises(ValueError, match="it has none"):
        features.with_families([], name="demo").with_families(["81"], name="demo")


# What is constant


def test_a_copy_of_a_model_shares_the_features_and_copies_the_weights():
    model = SeqRec(ModelConfig(embed_dim=8), num_items=20, max_len=5, features=features_of(make_world(LENGTHS)))
    twin = copy.deepcopy(model)
    assert model.tower is not None
    assert twin.tower is not None
    assert twin.tower.features is model.tower.features
    assert twin.tower.table.weight is not model.tower.table.weight
    assert torch.equal(twin.vectors(), model.vectors())
    with torch.no_grad():
        twin.tower.table.weight.add_(1.0)
    assert not torch.equal(twin.vectors(), model.vectors())


def test_a_checkpoint_holds_weights_and_no_features():
    tower = Tower(features_of(make_world(LENGTHS)), 8)
    assert sorted(tower.state_dict()) == ["project.81.weight", "project.82.weight", "table.weight"]


def test_features_on_the_device_already_are_not_copied():
    features = features_of(make_world(LENGTHS))
    assert features.to(torch.device("cpu")) is features


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_tower_on_cuda_equals_the_cpu():
    features = features_of(make_world(LENGTHS))
    tower = make_tower(features)
    expected = tower.rows(torch.arange(21)), tower.users(torch.arange(5))
    tower = tower.cuda()
    tower.features = features.to(torch.device("cuda"))
    found = tower.rows(torch.arange(21).cuda()), tower.users(torch.arange(5).cuda())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-4, atol=1e-4)
