"""Batches and training steps on contest data: prepared tensors against Python dictionaries for every position.

    python -m benchmarks.contest_step --folder contest --users 2000 --items 58734 --families 81:32,82:1024

Makes contest data in --folder where there is none, prepares it once, and then alternates, on the same users, with the
same weights, negatives and loss (BCE with one negative):

dictionaries   the arrangement of the contest's baseline, written here anew from a description of it: a line of JSON is
               parsed per user, a dictionary of features completed for every position of sequence, positive and
               negative, features are moved into tensors one by one, and the item tower runs on every position
ours           rows gathered from the prepared tensors, the tower run once on the distinct rows of the step

Both run the same blocks on padded rows; ours also packed, as it trains by default. Losses must agree to 1e-5.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.contest import Contest, prepare_contest, read_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_features import training_sequences
from apps.seqrec.dataset import Spans, compact, epoch_order, make_batch, training_spans
from apps.seqrec.model import SeqRec
from apps.seqrec.train import Components, build, loss_fn, step_batches
from shared.amp import amp_step
from shared.device import describe_machine
from shared.seed import seed_step

np: Any = import_module("numpy")  # the extra `formats`, which the checks of types do without
Record = dict[str, Any]


class Dictionaries:
    """The original's data set: lines, dictionaries of features and of embeddings, all of them Python objects."""

    def __init__(self, folder: Path, contest: Contest, max_len: int) -> None:
        self.lines = (folder / "seq.jsonl").read_bytes().splitlines()
        self.features = json.loads((folder / "item_feat_dict.json").read_bytes())
        # the embeddings as the pack has them, so that both sides compute with the same half-precision numbers
        self.vectors = {name: dict(enumerate(part.value.float().numpy())) for name, part in contest.embeddings.items()}
        self.item_fields, self.user_fields = contest.item_fields, contest.user_fields
        self.list_fields = tuple(contest.user_lists)
        self.num_items = contest.sequences.num_items
        self.max_len = max_len

    def completed(self, features: Mapping[str, Any], item: int) -> Record:
        """A position's dictionary with a value for every feature."""
        found: Record = dict(features)
        for field in (*self.item_fields, *self.user_fields):
            if field not in found:
                found[field] = 0
        for field in self.list_fields:
            if field not in found:
                found[field] = [0]
        for name, vectors in self.vectors.items():
            found[f"emb_{name}"] = vectors[item]
        return found

    def sample(self, user: int, events: int, rng: Any) -> tuple[Any, ...]:
        """Padded ids and dictionaries of a user's first `events` events, at most the last `max_len` + 1 of them."""
        profile: Mapping[str, Any] = {}
        past: list[tuple[int, Mapping[str, Any], int, int]] = []
        for _, item, user_features, item_features, action, at in json.loads(self.lines[user]):
            if user_features:
                profile = user_features
            else:
                past.append((item, item_features, action, at))
        past = past[max(0, events - self.max_len - 1) : events]
        seen = {item for item, *_ in past}
        width = self.max_len + 1
        ids = np.zeros((3, width), dtype=np.int64)  # sequence, positive, negative
        marks = np.zeros((2, width), dtype=np.int64)  # action of the token, action of the target
        default = self.completed({}, 0)
        dictionaries: list[list[Record]] = [[default] * width for _ in range(3)]
        dictionaries[0][0] = self.completed(profile, 0)
        for place, (item, features, action, _) in enumerate(past):
            if place + 1 < len(past):
                ids[0, place + 1] = item
                marks[0, place + 1] = action + 1
                dictionaries[0][place + 1] = self.completed(features, item)
            ids[1, place] = item
            marks[1, place] = action + 1
            dictionaries[1][place] = self.completed(features, item)
            negative = int(rng.integers(1, self.num_items + 1))
            while negative in seen:
                negative = int(rng.integers(1, self.num_items + 1))
            ids[2, place] = negative
            dictionaries[2][place] = self.completed(self.features[str(negative)], negative)
        return ids, marks, dictionaries, len(past)

    def columns(self, dictionaries: list[list[Record]]) -> dict[str, Tensor]:
        """Tensors of every feature, [B, L] or [B, L, M]: a loop over users, positions and features."""
        rows, length = len(dictionaries), len(dictionaries[0])
        found = {}
        for field in (*self.item_fields, *self.user_fields):
            values = np.zeros((rows, length), dtype=np.int64)
            for i, row in enumerate(dictionaries):
                values[i] = [record[field] for record in row]
            found[field] = torch.from_numpy(values)
        for field in self.list_fields:
            longest = max(len(record[field]) for row in dictionaries for record in row)
            lists = np.zeros((rows, length, longest), dtype=np.int64)
            for i, row in enumerate(dictionaries):
                for j, record in enumerate(row):
                    lists[i, j, : len(record[field])] = record[field]
            found[field] = torch.from_numpy(lists)
        for name in self.vectors:
            width = len(self.vectors[name][0])
            vectors = np.zeros((rows, length, width), dtype=np.float32)
            for i, row in enumerate(dictionaries):
                for j, record in enumerate(row):
                    vectors[i, j] = record[f"emb_{name}"]
            found[f"emb_{name}"] = torch.from_numpy(vectors)
        return found


def position_vectors(
    model: SeqRec, data: Dictionaries, id_BL: Tensor, columns: Mapping[str, Tensor], *, users: bool
) -> Tensor:
    """The tower on every position, field by field, [B, L, D]."""
    tower = model.tower
    assert tower is not None
    found = F.embedding(id_BL, model.item.weight, padding_idx=0)
    sides = [(data.item_fields, tower.item_offsets)]
    if users:
        sides.append((data.user_fields, tower.user_offsets))
    for fields, offsets in sides:
        for field, offset in zip(fields, offsets.tolist(), strict=True):
            value = columns[field]
            found = found + F.embedding(torch.where(value > 0, value + offset, 0), tower.table.weight, padding_idx=0)
    if users:
        for field, offset in zip(data.list_fields, tower.list_offsets.tolist(), strict=True):
            value = columns[field]
            total = F.embedding(torch.where(value > 0, value + offset, 0), tower.table.weight, padding_idx=0).sum(2)
            found = found + total / (value > 0).sum(2, keepdim=True).clamp(min=1)
    for name in data.vectors:
        found = found + tower.project[name](F.normalize(columns[f"emb_{name}"], dim=-1))
    return found


def dictionary_batch(
    data: Dictionaries, contest: Contest, spans: Spans, rng: Any
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], Tensor]:
    """Ids [3, B, L], actions [2, B, L], features of sequence, positive and negative, and numbers of targets [B]."""
    ends = (spans.end - contest.ptr[spans.user] + 1).tolist()
    samples = [data.sample(user, events, rng) for user, events in zip(spans.user.tolist(), ends, strict=True)]
    ids = torch.from_numpy(np.stack([sample[0] for sample in samples], axis=1))
    marks = torch.from_numpy(np.stack([sample[1] for sample in samples], axis=1))
    columns = [data.columns([sample[2][part] for sample in samples]) for part in range(3)]
    return ids, marks, columns, torch.tensor([sample[3] for sample in samples])


def dictionary_loss(model: SeqRec, data: Dictionaries, batch: tuple[Any, ...]) -> Tensor:
    """The loss of a batch of dictionaries."""
    ids, marks, columns, count = batch
    size, length = ids.shape[1:]
    vectors = [position_vectors(model, data, ids[part], columns[part], users=part == 0) for part in range(3)]
    assert model.front is not None
    is_front = (torch.arange(length) == 0)[None, :, None]
    sequence = vectors[0] + torch.where(is_front, model.front, torch.zeros(()))
    place = torch.arange(length).expand(size, length)
    owner = torch.arange(1, size + 1)[:, None].expand(size, length)
    inside = place < count[:, None]
    hidden = model(
        (torch.arange(size * length) + 1).view(size, length) * inside,
        owner * inside,
        (count[:, None] - 1 - place).clamp(min=0) * inside,
        None,
        packed=False,
        vector_CD=torch.cat([torch.zeros(1, sequence.shape[-1]), sequence.flatten(0, 1)]),
        action_RL=marks[0] * inside,
    )
    query = model.query(hidden[inside], action_N=marks[1][inside])
    positive = (query * vectors[1][inside]).sum(1)
    negative = (query * vectors[2][inside]).sum(1)
    return (F.softplus(-positive) + F.softplus(negative)).mean()


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def loss_gap(c: Components, contest: Contest, data: Dictionaries, spans: Spans) -> tuple[float, float]:
    """The two losses of one batch with equal negatives."""
    model = c.state.model
    assert isinstance(model, SeqRec)
    batch = dictionary_batch(data, contest, spans, np.random.default_rng(5))
    inside = torch.arange(batch[0].shape[2]) < batch[3][:, None]
    ours = make_batch(
        c.sequences, spans, packed=c.packed, row_len=c.config.data.max_len + int(c.front), front=c.front
    )._replace(unseen=batch[0][2][inside])
    assert torch.equal(ours.target, batch[0][1][inside]), "the two sides disagree about the targets"
    ours = compact(ours, num_items=c.sequences.num_items, whole=False)
    with torch.no_grad():
        own, _ = loss_fn(model, ours, training=c.config.training, log_q_I=None)
        other = dictionary_loss(model, data, batch)
    return float(own), float(other)


def make_data(options: argparse.Namespace) -> Contest:
    """The packs of the generated contest, made where they are missing."""
    pairs = [family.split(":") for family in options.families.split(",")]
    families = [(int(family), int(width)) for family, width in pairs]
    write_contest(
        options.folder,
        num_users=options.users,
        num_items=options.items,
        mean_length=options.mean_length,
        seed=1,
        families=families,
    )
    pack = options.folder.with_name(options.folder.name + "-pack")
    return read_contest(pack) if pack.is_dir() else prepare_contest(options.folder, pack)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("contest"))
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=58_734)
    parser.add_argument("--mean-length", type=int, default=91)
    parser.add_argument("--families", default="81:32,82:1024")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-len", type=int, default=101)
    parser.add_argument("--embed-dim", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--warm-up", type=int, default=2)
    options = parser.parse_args()

    contest = make_data(options)
    sequences = training_sequences(contest)
    data = Dictionaries(options.folder, contest, options.max_len)

    def components(layout: str, *, dropout: float = 0.2, loss: str = "bce", num_negatives: int = 1) -> Components:
        config = Config(
            data=DataConfig(max_len=options.max_len, layout=layout),
            model=ModelConfig(
                embed_dim=options.embed_dim, num_heads=1, num_blocks=options.blocks, ffn_mult=1, dropout=dropout
            ),
            training=TrainConfig(loss=loss, num_negatives=num_negatives, batch_size=options.batch_size, device="cpu"),
        )
        return build(config, sequences)

    spans = training_spans(sequences, max_len=options.max_len)
    steps, size = options.warm_up + options.steps, options.batch_size
    order = epoch_order(spans.user.numel(), seed=0, epoch=0)
    order = order.repeat(-(-steps * size // order.numel()))
    chunks = [spans.take(order[i * size : (i + 1) * size]) for i in range(steps)]

    for layout in ("padded", "packed"):
        own, other = loss_gap(components(layout, dropout=0.0), contest, data, chunks[0])
        print(
            f"loss of one batch, {layout}: ours {own:.7f}, dictionaries {other:.7f}, difference {abs(own - other):.1e}"
        )
        assert abs(own - other) < 1e-5

    reference = components("padded").state.model
    assert isinstance(reference, SeqRec)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-3, betas=(0.9, 0.98))
    rng = np.random.default_rng(0)
    variants = {
        "ours, padded": components("padded"),
        "ours, packed": components("packed"),
        "ours, padded, 512 shared negatives": components("padded", loss="sampled", num_negatives=512),
    }
    states = {name: c.state for name, c in variants.items()}
    base = "dictionaries for every position"
    elapsed: dict[str, list[float]] = {name: [] for name in (base, *variants)}
    inputs: dict[str, list[float]] = {name: [] for name in elapsed}
    bare: list[float] = []
    for index, chunk in enumerate(chunks):
        begin = time.perf_counter()
        batch = dictionary_batch(data, contest, chunk, rng)
        inputs[base].append(time.perf_counter() - begin)
        reference.train()
        seed_step(0, 0, index)
        loss = dictionary_loss(reference, data, batch)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        elapsed[base].append(time.perf_counter() - begin)
        for name, c in variants.items():
            states[name].model.train()
            begin = time.perf_counter()
            batches = step_batches(c, chunk, epoch=0, index=index)
            inputs[name].append(time.perf_counter() - begin)
            seed_step(0, 0, index)
            loss_of = partial(loss_fn, training=c.config.training, log_q_I=c.log_q_I)
            states[name], _ = amp_step(states[name], batches, loss_of, amp=c.amp)
            elapsed[name].append(time.perf_counter() - begin)
        for _ in range(5):
            row_len = options.max_len + 1
            bare.append(timed(lambda: make_batch(sequences, chunk, packed=True, row_len=row_len, front=True)))  # noqa: B023

    machine = describe_machine()
    print(f"{size} users a step, L {options.max_len}, d {options.embed_dim}, families {options.families}")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"batch of {size} users alone, packed: median {1e3 * statistics.median(bare):.2f} ms of {len(bare)}")
    first = statistics.median(elapsed[base][options.warm_up :])
    for name, seconds in elapsed.items():
        middle = statistics.median(seconds[options.warm_up :])
        waits = statistics.median(inputs[name][options.warm_up :])
        print(
            f"{name:40s} {1e3 * middle:8.1f} ms/step ({1e3 * waits:7.1f} of it input) {size / middle:7.0f} sequences/s "
            f"x{first / middle:.2f}"
        )


if __name__ == "__main__":
    main()
