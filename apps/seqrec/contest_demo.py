"""Generated data in the contest's form: every file it has, with a structure that a model can learn.

Legend: U users of a batch, I items, C clusters, K kinds of users, T steps, W width of an embedding.

The test users are some of the training users, whose histories go on, and newcomers. A few of what they meet, and of the
candidates, are cold items: twins of known ones (same features, embedding of the same cluster) that no indexer has.

Items live in clusters, users are of a few kinds and have favourite clusters. Most of the time the next item comes from
the cluster that follows the last item's, and which one follows depends on the user's kind and on whether the last item
was clicked; otherwise from a favourite cluster, or from anywhere. Within a cluster some items are more popular than
others. Features name the cluster (exactly or roughly), embeddings are its noisy vector, and the profile names the kind.

The pickles are written opcode by opcode: they are read as data only, and so they are made of plain data only.
"""

import itertools
import json
import pickle  # the names of its opcodes alone
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from shared.files import atomic_write_text, atomic_writer
from shared.seed import make_generator

ITEM_STREAM, USER_STREAM, EMBEDDING_STREAM = 201, 202, 203  # of the draws

# Vocabularies of the contest's public sample. 111 is the item's own id there: its size is the number of items.
_FIELDS = "100 101 102 103 104 105 106 107 108 109 110 112 114 115 116 117 118 119 120 121 122"
_SIZES = "6 44 11136 67 2 7 13 17 4 3 2 25 17 187 18 285 745 1745 1343 49079 11151"
VOCAB = dict(zip(_FIELDS.split(), map(int, _SIZES.split()), strict=True))
_MARK = "contest_demo.json"
_VERSION = 2  # of what the same arguments make
_FORMS = ("json", "part", "pkl", "npy")  # of the families of embeddings, in turn
_KINDS = 4
_FAVOURITES = 3
_FOLLOW_SHARE, _FAVOURITE_SHARE = 0.7, 0.7  # of the steps follow; of the others go to a favourite cluster
_CLICK_SHARE, _FAVOURITE_CLICK_SHARE, _CONVERSION_SHARE = 0.05, 0.3, 0.1  # conversions are a share of the clicks
_ITEMS_PER_CLUSTER, _MAX_CLUSTERS = 25, 600
_POPULARITY = 2.0  # of an item within its cluster: the draw's power
_NOISE = 0.5  # of an embedding's numbers, whose cluster's are normal
_BATCH_USERS = 4096
_FIRST_TIME = 1_746_000_000
_REDRAWS = 6  # of an item that was met before
_PAUSE_S = 6 * 3600.0
_PREDICT_USERS = 100  # at most
_PREDICT_STEP = 1 << 30  # of their draws, beyond the batches of training users
_NEW_ITEM = 30_000_000_000  # raw ids from here on are in no indexer and no file of embeddings
_COLD_ITEM = 25_000_000_000  # raw id of item 1's twin
_COLD_EVERY = 20  # items have one with a twin among them
_STEP = 2048  # embeddings are written in steps of 1 / 2048


class _World(NamedTuple):
    """What all users share."""

    cluster: Tensor  # [I] int64
    member: Tensor  # [I] int64, items by cluster, the popular ones first
    start: Tensor  # [C + 1] int64, where a cluster's members begin
    follower: Tensor  # [K, 2, C] int64, the next cluster after one whose item was (1) or was not (0) clicked
    features: list[str]  # of every item, as JSON
    vocab: dict[str, int]
    creative: list[int]  # raw id of every item


class _Users(NamedTuple):
    """A batch of users with their events."""

    kind: Tensor  # [U] int64
    favourite: Tensor  # [U, favourites] int64, clusters
    profile: list[dict[str, Any]]
    length: Tensor  # [U] int64
    item: Tensor  # [U, T] int64, from 1
    action: Tensor  # [U, T] int64
    time: Tensor  # [U, T] int64


def write_contest(
    folder: Path,
    *,
    num_users: int,
    num_items: int,
    mean_length: int,
    seed: int,
    families: Sequence[tuple[int, int]] = ((81, 32),),
    irregular: bool = False,
) -> Path:
    """The folder, with made-up data in every file of the contest; one with the same arguments is left alone.

    families: (id, width) of the embeddings, written in turn as *.json, as part-*, as .pkl and as .npy. `irregular` adds
    what is found in the wild: profiles anywhere, twice or missing, raw user ids, items and values that nobody knows,
    features that change, times out of order, offsets as a dictionary, items without an embedding.
    """
    arguments = {
        "version": _VERSION,
        "num_users": num_users,
        "num_items": num_items,
        "mean_length": mean_length,
        "seed": seed,
        "families": [list(family) for family in families],
        "irregular": irregular,
    }
    mark = folder / _MARK
    text = json.dumps(arguments) + "\n"
    if mark.is_file() and mark.read_text(encoding="utf-8") == text:
        return folder
    if min(num_users, num_items, mean_length) < 2:
        raise ValueError("contest data needs at least 2 users, 2 items and 2 events per user")
    folder.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    world = _make_world(num_items, seed)
    _write_indexer(folder / "indexer.pkl", world, num_users)
    with atomic_writer(folder / "item_feat_dict.json") as file:
        pairs = (f'"{item}": {features}' for item, features in enumerate(world.features, 1))
        _write_joined(file, pairs, opening="{", closing="}")
    counts = itertools.count(1)
    lines = _training_lines(world, num_users, mean_length, seed, irregular=irregular, counts=counts)
    _write_lines(folder, "seq", lines, irregular=irregular)
    _write_lines(folder, "predict_seq", _predict_lines(world, num_users, mean_length, seed), irregular=irregular)
    with atomic_writer(folder / "predict_set.jsonl") as file:
        for row, line in enumerate(_candidates(world)):
            file.write(json.dumps({**line, "retrieval_id": row}).encode() + b"\n")
    for n, (family, width) in enumerate(families):
        _write_family(folder / "creative_emb", n, family, width, world, seed, irregular=irregular)
    atomic_write_text(mark, text)
    return folder


# What is in the files


def _make_world(num_items: int, seed: int) -> _World:
    generator = make_generator(seed, stream=ITEM_STREAM)
    num_clusters = min(_MAX_CLUSTERS, max(2, num_items // _ITEMS_PER_CLUSTER))

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    cluster = torch.randperm(num_items, generator=generator) % num_clusters
    member = torch.sort(cluster, stable=True).indices
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(cluster, minlength=num_clusters).cumsum(0)])
    follower = torch.stack([torch.randperm(num_clusters, generator=generator) for _ in range(2 * _KINDS)])
    vocab = {field: min(size, max(2, num_items)) for field, size in VOCAB.items()} | {"111": num_items}
    vocab = dict(sorted(vocab.items()))
    roughly = (cluster + (integers(10, num_items) == 0) * integers(num_clusters, num_items)) % num_clusters
    exact = {"102": cluster, "117": cluster // 2, "118": cluster, "119": cluster * 2 + integers(2, num_items)}
    rough = {"101": roughly, "114": roughly // 3, "116": roughly // 7, "120": roughly, "122": roughly}
    own = {"111": torch.arange(num_items), "121": integers(num_items, num_items) // 2}
    noise = {field: integers(vocab[field], num_items) for field in ("100", "112", "115")}
    columns = {field: values % vocab[field] + 1 for field, values in (exact | rough | own | noise).items()}
    is_there = {field: (integers(50, num_items) != 0).tolist() for field in ("112", "117", "118", "119", "120")}
    is_there["115"] = (integers(4, num_items) == 0).tolist()
    texts = [[""] * num_items]
    for field in ("112", "117", "118", "119", "120", "100", "101", "102", "122", "114", "115", "116", "121", "111"):
        mask = is_there.get(field, [True] * num_items)
        values = columns[field].tolist()
        texts.append([f', "{field}": {v}' if yes else "" for v, yes in zip(values, mask, strict=True)])
    features = ["{" + "".join(parts)[2:] + "}" for parts in zip(*texts, strict=True)]
    creative = (20_000_000_000 + 7 * torch.randperm(num_items, generator=generator)).tolist()
    return _World(cluster, member, start, follower.view(_KINDS, 2, -1), features, vocab, creative)


def _make_users(world: _World, num_users: int, mean_length: int, seed: int, batch: int) -> _Users:
    """One batch of users, a function of (seed, batch)."""
    generator = make_generator(seed, step=batch, stream=USER_STREAM)
    kind = torch.randint(_KINDS, (num_users,), generator=generator)
    favourite = torch.randint(len(world.start) - 1, (num_users, _FAVOURITES), generator=generator)
    longest = max(2, round(1.1 * mean_length))
    spread = 1 + 0.12 * torch.randn(num_users, generator=generator, dtype=torch.float64)
    length = (mean_length * spread).round().long().clamp(2, longest)
    item, action = _walk(world, kind, favourite, int(length.max()), generator, after=None)
    pause = _pauses(item.shape, generator)
    first = torch.rand(num_users, 1, generator=generator, dtype=torch.float64) * 30 * 86_400
    time = _FIRST_TIME + first.long() + pause.cumsum(1)
    sizes = world.vocab
    noise = torch.randint(1 << 30, (num_users, 5), generator=generator).tolist()
    profile = [
        {
            "103": (k * 13 + noise[u][0] % 13) % sizes["103"] + 1,
            "106": sorted({c % sizes["106"] + 1 for c in liked}),
            "107": [noise[u][1] % sizes["107"] + 1],
            "109": noise[u][2] % sizes["109"] + 1,
            "105": k % sizes["105"] + 1,
            "104": noise[u][3] % sizes["104"] + 1,
            **({"110": [k % sizes["110"] + 1]} if noise[u][4] % 3 else {}),
            **({"108": sorted({liked[0] % sizes["108"] + 1, 1})} if noise[u][4] % 2 else {}),
        }
        for u, (k, liked) in enumerate(zip(kind.tolist(), favourite.tolist(), strict=True))
    ]
    return _Users(kind, favourite, profile, length, item, action, time)


def _walk(
    world: _World,
    kind: Tensor,
    favourite: Tensor,
    steps: int,
    generator: torch.Generator,
    *,
    after: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Items and actions of so many steps of users, both [U, T], after events of these clusters and actions, if any."""
    num_users, num_clusters = len(kind), len(world.start) - 1

    def uniform() -> Tensor:
        return torch.rand(num_users, generator=generator, dtype=torch.float64)

    item = torch.zeros(num_users, steps, dtype=torch.int64)
    action = torch.empty(num_users, steps, dtype=torch.int64)
    for t in range(steps):
        if after is None:
            cluster = favourite[:, 0]
        else:
            cluster, last_action = after
            some = torch.randint(_FAVOURITES, (num_users, 1), generator=generator)
            anywhere = torch.randint(num_clusters, (num_users,), generator=generator)
            jump = torch.where(uniform() < _FAVOURITE_SHARE, favourite.gather(1, some).squeeze(1), anywhere)
            follow = world.follower[kind, (last_action > 0).long(), cluster]
            cluster = torch.where(uniform() < _FOLLOW_SHARE, follow, jump)
        size = world.start[cluster + 1] - world.start[cluster]
        again = torch.ones(num_users, dtype=torch.bool)
        for _ in range(_REDRAWS):  # most people meet an ad once
            rank = (uniform().pow(_POPULARITY) * size).long().clamp(max=size - 1)
            found = world.member[world.start[cluster] + rank] + 1
            item[:, t] = torch.where(again, found, item[:, t])
            again = (item[:, :t] == item[:, t : t + 1]).any(1)
        is_favourite = (favourite == cluster[:, None]).any(1)
        clicked = uniform() < torch.where(is_favourite, _FAVOURITE_CLICK_SHARE, _CLICK_SHARE)
        action[:, t] = clicked.long() + (clicked & (uniform() < _CONVERSION_SHARE))
        after = cluster, action[:, t]
    return item, action


def _pauses(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Seconds between events."""
    return 1 + (-_PAUSE_S * torch.log1p(-torch.rand(*shape, generator=generator, dtype=torch.float64))).long()


def _gone_on(world: _World, users: _Users, generator: torch.Generator) -> _Users:
    """What the users do after their last events, as many events again."""
    last = (users.length - 1)[:, None]
    item, action, time = (values.gather(1, last) for values in (users.item, users.action, users.time))
    after = world.cluster[item.squeeze(1) - 1], action.squeeze(1)
    item, action = _walk(world, users.kind, users.favourite, users.item.shape[1], generator, after=after)
    return users._replace(item=item, action=action, time=time + _pauses(item.shape, generator).cumsum(1))


def _records(users: _Users, u: int) -> tuple[list[int], list[int], list[int]]:
    """Items, actions and times of a user."""
    n = int(users.length[u])
    return users.item[u, :n].tolist(), users.action[u, :n].tolist(), users.time[u, :n].tolist()


def _training_lines(
    world: _World, num_users: int, mean_length: int, seed: int, *, irregular: bool, counts: Iterator[int]
) -> Iterator[bytes]:
    for batch, first in enumerate(range(0, num_users, _BATCH_USERS)):
        users = _make_users(world, min(_BATCH_USERS, num_users - first), mean_length, seed, batch)
        for u in range(len(users.kind)):
            number = first + u + 1
            items, actions, times = _records(users, u)
            if irregular:
                yield _irregular_line(world, number, users.profile[u], items, actions, times, counts)
                continue
            profile = f"[{number}, null, {json.dumps(users.profile[u])}, null, null, {times[-1] + 86_400}]"
            events = [
                f"[{number}, {item}, null, {world.features[item - 1]}, {action}, {time}]"
                for item, action, time in zip(items, actions, times, strict=True)
            ]
            yield f"[{', '.join([*events, profile])}]\n".encode()


def _irregular_line(
    world: _World,
    number: int,
    profile: dict[str, Any],
    items: list[int],
    actions: list[int],
    times: list[int],
    counts: Iterator[int],
) -> bytes:
    """One user as found in the wild: what is odd about the line follows from the user's and the events' numbers."""
    user: int | str = number
    if number % 3 == 0:
        user = f"user_{number:08d}" if number % 2 else f"somebody_{number}"
    records: list[list[Any]] = []
    for item, action, time in zip(items, actions, times, strict=True):
        n = next(counts)
        features: dict[str, Any] | None = json.loads(world.features[item - 1])
        assert features is not None
        raw = item if n % 17 else _NEW_ITEM + n
        if n % 13 == 0:
            features["102"] = "1020099999"
        if n % 19 == 0:
            features["122"] = world.vocab["122"] + 5
        if n % 31 == 0:
            features["115"] = n % world.vocab["115"] + 1
        records.append([user, raw, None, None if n % 29 == 0 else features, None if n % 9 == 0 else action, time])
    if number % 6 == 5:
        records[0][5], records[-1][5] = records[-1][5], records[0][5]
    if number % 7:
        if number % 4 == 1:
            profile = {**profile, "103": "1030000999", "106": [*profile["106"], "1060000999"]}
        record = [user, None, profile, None, None, times[-1] + 86_400]
        records.insert((0, len(records) // 2, len(records))[number % 3], record)
        if number % 5 == 4:
            records.insert(0, [user, None, {"103": 1}, None, None, times[0]])
    return json.dumps(records).encode() + b"\n"


def _predict_lines(world: _World, num_users: int, mean_length: int, seed: int) -> Iterator[bytes]:
    """Training users some time later, and newcomers; what each does next is a step like all others."""
    users = _make_users(world, min(_BATCH_USERS, num_users), mean_length, seed, 0)
    later = _gone_on(world, users, make_generator(seed, step=_PREDICT_STEP, stream=USER_STREAM))
    for u in range(min(_PREDICT_USERS, num_users)):
        is_new = u % 4 == 0
        user = f"newcomer_{u + 1}" if is_new else f"user_{u + 1:08d}"
        n = int(users.length[u])
        before = zip(*_records(users, u), strict=True)
        events = list(zip(*_records(later, u), strict=True))
        if not is_new:
            events = [*before, *events[: n // 2 + 1]][-n:]
        records: list[list[Any]] = [[user, None, users.profile[u], None, None, events[-1][2] + 86_400]]
        for m, (item, action, time) in enumerate(events):
            raw, features = item, json.loads(world.features[item - 1])
            if (u + m) % 10 == 0:
                raw, features["102"] = _NEW_ITEM + u * 1000 + m, "1020099999"
            elif m % 2 and (item - 1) % _COLD_EVERY == 0:
                raw, features = _twin(world, item - 1)
            records.append([user, raw, None, features, action, time])
        yield json.dumps(records).encode() + b"\n"


def _twin(world: _World, n: int) -> tuple[int, dict[str, Any]]:
    """Raw id and features of the cold item that is like item n + 1."""
    return _COLD_ITEM + n, {**json.loads(world.features[n]), "111": "1110099999"}


def _candidates(world: _World) -> Iterator[dict[str, Any]]:
    """Every second item, and one cold item for every ten of them."""
    for n in range(0, len(world.creative), 2):
        yield {"creative_id": world.creative[n], "features": json.loads(world.features[n])}
        if n % _COLD_EVERY == 0:
            raw, features = _twin(world, n)
            yield {"creative_id": raw, "features": features}


# Files


def _write_lines(folder: Path, name: str, lines: Iterator[bytes], *, irregular: bool) -> None:
    """Write NAME.jsonl and the pickled offsets of its lines."""
    offsets: list[int] = []
    at = 0
    with atomic_writer(folder / f"{name}.jsonl") as file:
        for line in lines:
            offsets.append(at)
            at += file.write(line)
    with atomic_writer(folder / f"{name}_offsets.pkl") as file:
        _write_pickle(file, dict(enumerate(offsets)) if irregular else offsets)


def _write_joined(file: BinaryIO, parts: Iterator[str], *, opening: str, closing: str) -> None:
    file.write(opening.encode())
    for n, part in enumerate(parts):
        file.write((", " if n else "").encode() + part.encode())
    file.write(closing.encode())


def _write_indexer(path: Path, world: _World, num_users: int) -> None:
    features = {
        field: {int(field) * 10_000_000 + 2 * n: n for n in range(1, size + 1)} for field, size in world.vocab.items()
    }
    users = {f"user_{number:08d}": number for number in range(1, num_users + 1)}
    items = {raw: item for item, raw in enumerate(world.creative, 1)}
    with atomic_writer(path) as file:
        file.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK)
        for name, table in (("u", users), ("i", items)):
            file.write(_pushes(name))
            _write_value(file, table)
        # the original's table of features is a defaultdict(dict)
        file.write(_pushes("f") + pickle.GLOBAL + b"collections\ndefaultdict\n" + pickle.MARK)
        file.write(pickle.GLOBAL + b"builtins\ndict\n" + pickle.TUPLE + pickle.REDUCE + pickle.MARK)
        for field, values in features.items():
            file.write(_pushes(field))
            _write_value(file, values)
        file.write(pickle.SETITEMS + _pushes("a"))
        _write_value(file, {1: 1, 0: 2})
        file.write(pickle.SETITEMS + pickle.STOP)


def _write_family(folder: Path, n: int, family: int, width: int, world: _World, seed: int, *, irregular: bool) -> None:
    form = _FORMS[n % len(_FORMS)]
    num_items = len(world.creative)
    ids = world.creative + [_COLD_ITEM + item for item in range(0, num_items, _COLD_EVERY)]
    rows = _embedding_rows(world, family, width, seed)
    folder.mkdir(exist_ok=True)
    if form in ("json", "part"):
        name = folder / f"emb_{family}_{width}"
        name.mkdir(exist_ok=True)
        (name / "_SUCCESS").touch()
        half = (len(ids) + 1) // 2
        for k, share in enumerate((ids[:half], ids[half:])):
            path = name / (f"part-{k:05d}" if form == "part" else f"emb_{family}_{k}.json")
            with atomic_writer(path) as file:
                for m, (creative, values) in enumerate(zip(share, rows, strict=False)):
                    text = f', "emb": [{", ".join(values)}]' if not irregular or m % 10 else ""
                    file.write(f'{{"anonymous_cid": {creative}{text}}}\n'.encode())
    elif form == "pkl":
        with atomic_writer(folder / f"emb_{family}_{width}.pkl") as file:
            _write_pickle(file, {raw: list(map(float, values)) for raw, values in zip(ids, rows, strict=True)})
    else:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({num_items + 1}, {width}), }}"
        header += " " * (-(len(header) + 11) % 64) + "\n"
        name = folder / ("81.npy" if (family, width) == (81, 32) else f"emb_{family}_{width}.npy")
        with atomic_writer(name) as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(4 * width))
            for values in itertools.islice(rows, num_items):
                file.write(struct.pack(f"<{width}f", *map(float, values)))


def _embedding_rows(world: _World, family: int, width: int, seed: int) -> Iterator[list[str]]:
    """Every item's numbers as text, and then every cold one's: the vector of its cluster with noise."""
    texts = [f"{k / _STEP:.6g}" for k in range(-4 * _STEP, 4 * _STEP + 1)]
    vectors = make_generator(seed, epoch=family, stream=EMBEDDING_STREAM)
    centre = torch.randn(len(world.start) - 1, width, generator=vectors)
    cold = world.cluster[::_COLD_EVERY]
    for step, cluster in enumerate([*torch.split(world.cluster, 1024), *torch.split(cold, 1024)]):
        noise = make_generator(seed, epoch=family, step=step + 1, stream=EMBEDDING_STREAM)
        value = centre[cluster] + _NOISE * torch.randn(len(cluster), width, generator=noise)
        for row in ((value.clamp(-4, 4) + 4) * _STEP).round().long().tolist():
            yield [texts[k] for k in row]


# Pickles


def _write_pickle(file: BinaryIO, value: object) -> None:
    file.write(pickle.PROTO + b"\x04")
    _write_value(file, value)
    file.write(pickle.STOP)


def _write_value(file: BinaryIO, value: object) -> None:
    """Write the opcodes of a list or dictionary of any size, and of plain values in it."""
    if isinstance(value, list):
        file.write(pickle.EMPTY_LIST + pickle.MARK)
        for element in value:
            _write_value(file, element)
        file.write(pickle.APPENDS)
    elif isinstance(value, Mapping):
        file.write(pickle.EMPTY_DICT + pickle.MARK)
        for key, element in value.items():
            file.write(_pushes(key))
            _write_value(file, element)
        file.write(pickle.SETITEMS)
    else:
        file.write(_pushes(value))


def _pushes(value: object) -> bytes:
    """The opcodes of pickle protocol 4 that make an integer, a number or a string."""
    match value:
        case int() if -(1 << 31) <= value < 1 << 31:
            return pickle.BININT + struct.pack("<i", value)
        case int():
            return pickle.LONG1 + b"\x08" + struct.pack("<q", value)
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
    raise TypeError(f"no opcodes for {type(value).__name__}")
