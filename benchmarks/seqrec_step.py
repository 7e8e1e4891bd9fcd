"""One training step of seqrec against a plain PyTorch SASRec step, alternating in one process on the same users.

    python -m benchmarks.seqrec_step --data-path ml-1m.txt

The plain step is written here in the usual way: rows padded to L, nn.MultiheadAttention as it comes (need_weights is
True by default and materialises the weights) with dropout inside, F.dropout everywhere, one gathered negative per
position, Adam as it comes. Its batches are made beforehand, so that it pays for no input; ours pays for making its
batch, packing it and drawing its negatives. Both: BCE with one negative, the same width and number of blocks.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.seqrec.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.seqrec.dataset import Sequences, Spans, epoch_order, make_batch, training_spans
from apps.seqrec.demo import demo_sequences
from apps.seqrec.formats import read_sequences
from apps.seqrec.train import build, loss_fn, step_batches
from shared.amp import amp_step
from shared.device import describe_machine
from shared.seed import seed_step


class PlainBlock(nn.Module):
    """Pre-norm self-attention and a feed-forward layer of the same width, with dropout in all the usual places."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, width)
        self.contract = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x_BLD: Tensor, causal_LL: Tensor) -> Tensor:
        query = self.attention_norm(x_BLD)
        mixed, _ = self.attention(query, query, query, attn_mask=causal_LL)
        x_BLD = x_BLD + mixed
        hidden = F.dropout(self.expand(self.feed_forward_norm(x_BLD)), self.dropout, self.training)
        return x_BLD + F.dropout(self.contract(F.relu(hidden)), self.dropout, self.training)


class PlainSASRec(nn.Module):
    """Item and position embeddings, blocks, final norm; scores by dot product with the item embeddings."""

    def __init__(self, num_items: int, width: int, heads: int, blocks: int, length: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.position = nn.Embedding(length + 1, width, padding_idx=0)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.dropout = dropout
        self.register_buffer("causal", ~torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, item_BL: Tensor) -> Tensor:
        column = torch.arange(1, item_BL.shape[1] + 1, device=item_BL.device) * (item_BL != 0)
        x = self.item(item_BL) * self.item.embedding_dim**0.5 + self.position(column)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, self.causal)
        hidden: Tensor = self.norm(x)
        return hidden


def plain_step(
    model: PlainSASRec, optimizer: torch.optim.Optimizer, item_BL: Tensor, positive_BL: Tensor, negative_BL: Tensor
) -> None:
    """The usual step, in place."""
    hidden = model(item_BL)
    positive = (hidden * model.item(positive_BL)).sum(-1)
    negative = (hidden * model.item(negative_BL)).sum(-1)
    valid = positive_BL != 0
    loss = F.binary_cross_entropy_with_logits(positive[valid], torch.ones_like(positive[valid]))
    loss = loss + F.binary_cross_entropy_with_logits(negative[valid], torch.zeros_like(negative[valid]))
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def padded_rows(sequences: Sequences, spans: Spans, length: int) -> tuple[Tensor, Tensor]:
    """Items and targets, padded on the right to `length`, [B, L] int64."""
    batch = make_batch(sequences, spans, packed=False, row_len=length)
    positive = torch.zeros_like(batch.item).flatten().index_copy(0, batch.place, batch.target).view_as(batch.item)
    missing = length - batch.item.shape[1]
    return F.pad(batch.item, (0, missing)), F.pad(positive, (0, missing))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="sequences (default: demo data)")
    parser.add_argument("--max-len", type=int, default=200)
    parser.add_argument("--users", type=int, default=128, help="sequences a step")
    parser.add_argument("--embed-dim", type=int, default=50)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each")
    parser.add_argument("--warm-up", type=int, default=3)
    options = parser.parse_args()

    sequences = read_sequences(options.data_path) if options.data_path else demo_sequences()
    spans = training_spans(sequences, max_len=options.max_len)
    users, steps = options.users, options.warm_up + options.steps
    order = epoch_order(spans.user.numel(), seed=0, epoch=0)
    order = order.repeat(-(-steps * users // order.numel()))
    chunks = [spans.take(order[i * users : (i + 1) * users]) for i in range(steps)]

    torch.manual_seed(0)
    plain = PlainSASRec(sequences.num_items, options.embed_dim, options.heads, 2, options.max_len, options.dropout)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)

    variants: dict[str, dict[str, Any]] = {
        "ours, ce over all items, feed-forward 4 d": {"loss": "ce", "ffn_mult": 4},
        "ours, sampled softmax, 256 shared, feed-forward d": {"loss": "sampled", "ffn_mult": 1},
        "ours, bce 1 negative, feed-forward 4 d": {"loss": "bce", "ffn_mult": 4},
        "ours, bce 1 negative, feed-forward d, padded": {"loss": "bce", "ffn_mult": 1, "layout": "padded"},
        "ours, bce 1 negative, feed-forward d": {"loss": "bce", "ffn_mult": 1},
    }
    ours = {}
    for name, choice in variants.items():
        config = Config(
            data=DataConfig(max_len=options.max_len, layout=choice.get("layout", "packed")),
            model=ModelConfig(
                embed_dim=options.embed_dim,
                num_heads=options.heads,
                dropout=options.dropout,
                ffn_mult=choice["ffn_mult"],
            ),
            training=TrainConfig(loss=choice["loss"], num_negatives=256, device="cpu", batch_size=users),
        )
        components = build(config, sequences)
        components.state.model.train()
        ours[name] = (components, components.state)

    elapsed: dict[str, list[float]] = {"plain PyTorch SASRec, bce 1 negative, feed-forward d": []}
    elapsed |= {name: [] for name in ours}
    for index, chunk in enumerate(chunks):
        items, positives = padded_rows(sequences, chunk, options.max_len)
        negatives = torch.randint(1, sequences.num_items + 1, items.shape, generator=generator)
        begin = time.perf_counter()
        plain.train()
        plain_step(plain, adam, items, positives, negatives)
        elapsed["plain PyTorch SASRec, bce 1 negative, feed-forward d"].append(time.perf_counter() - begin)
        for name, (c, state) in ours.items():
            begin = time.perf_counter()
            batches = step_batches(c, chunk, epoch=0, index=index)
            seed_step(0, 0, index)
            state, _ = amp_step(
                state,
                batches,
                partial(loss_fn, training=c.config.training, log_q_I=c.log_q_I),
                amp=c.amp,
            )
            ours[name] = (c, state)
            elapsed[name].append(time.perf_counter() - begin)

    machine = describe_machine()
    print(
        f"{sequences.name}: {users} users a step, d {options.embed_dim}, 2 blocks, dropout {options.dropout}, "
        f"L {options.max_len}"
    )
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    base = statistics.median(next(iter(elapsed.values()))[options.warm_up :])
    for name, seconds in elapsed.items():
        timed = sorted(seconds[options.warm_up :])
        median = statistics.median(timed)
        low, high = timed[len(timed) // 4], timed[3 * len(timed) // 4]
        print(
            f"{name:55s} {1e3 * median:7.1f} ms/step (quartiles {1e3 * low:.1f} .. {1e3 * high:.1f}) "
            f"{users / median:7.0f} sequences/s  x{base / median:.2f}"
        )


if __name__ == "__main__":
    main()
