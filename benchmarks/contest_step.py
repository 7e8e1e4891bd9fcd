"""Batches and training steps on contest data: prepared tensors against Python dictionaries for every position.

    python -m benchmarks.contest_step --folder contest --users 2000 --items 58734 --families 81:32,82:1024

Makes contest data in --folder where there is none, prepares it once, and then alternates, on the same users, with the
same weights, negatives and loss (BCE with one negative):

dictionaries   the arrangement of the contest's baseline (apps/seqrec/originals.py): a line of JSON is
               parsed per user, a dictionary of features completed for every position of sequence, positive and
               negative, features are moved into tensors one by one, and the item tower runs on every position
ours           rows gathered from the prepared tensors, the tower run once on the distinct rows of the step

Both run the same blocks on padded rows; ours also packed, as it trains by default. Losses must agree to 1e-5.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.contest import Contest, prepare_contest, read_contest
from apps.seqrec.contest_demo import write_contest
from apps.seqrec.contest_features import training_sequences
from apps.seqrec.dataset import Spans, compact, epoch_order, make_batch, training_spans
from apps.seqrec.model import SeqRec
from apps.seqrec.originals import Dictionaries, inside_of, padded_loss
from apps.seqrec.train import Components, build, loss_fn, step_batches
from shared.amp import amp_step
from shared.device import describe_machine
from shared.seed import seed_step


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def loss_gap(c: Components, data: Dictionaries, spans: Spans) -> tuple[float, float]:
    """The two losses of one batch with equal negatives."""
    model = c.state.model
    assert isinstance(model, SeqRec)
    batch = data.batch(spans)
    inside = inside_of(batch)
    ours = make_batch(
        c.sequences, spans, packed=c.packed, row_len=c.config.data.max_len + int(c.front), front=c.front
    )._replace(unseen=batch.id[2][inside])
    assert torch.equal(ours.target, batch.id[1][inside]), "the two sides disagree about the targets"
    ours = compact(ours, num_items=c.sequences.num_items, whole=False)
    with torch.no_grad():
        own, _ = loss_fn(model, ours, training=c.config.training, log_q_I=None)
        other = padded_loss(model, data, batch)
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
    users = torch.cat([chunk.user for chunk in chunks])
    data = Dictionaries(sequences, users, max_len=options.max_len, front=components("padded").front)

    for layout in ("padded", "packed"):
        own, other = loss_gap(components(layout, dropout=0.0), data, chunks[0])
        print(
            f"loss of one batch, {layout}: ours {own:.7f}, dictionaries {other:.7f}, difference {abs(own - other):.1e}"
        )
        assert abs(own - other) < 1e-5

    reference = components("padded").state.model
    assert isinstance(reference, SeqRec)
    adam = torch.optim.Adam(reference.parameters(), lr=1e-3, betas=(0.9, 0.98))
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
        batch = data.batch(chunk)
        inputs[base].append(time.perf_counter() - begin)
        reference.train()
        seed_step(0, 0, index)
        loss = padded_loss(reference, data, batch)
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
