"""The encoder: layouts agree, the past alone is seen, every option computes what it says."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.seqrec.config import ModelConfig
from apps.seqrec.dataset import Batch, Sequences, make_batch, training_spans
from apps.seqrec.model import Dropout, HSTUBlock, SeqRec, TransformerBlock, rotate
from shared.device import to_device

LENGTHS = [3, 4, 9, 17, 3, 14, 25, 6]


def make_sequences(lengths: list[int], num_items: int = 40) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    ptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    events = int(ptr[-1])
    gaps = torch.randint(0, 100_000, (events,), generator=generator)
    return Sequences(
        ptr=ptr,
        item=torch.randint(1, num_items + 1, (events,), generator=generator, dtype=torch.int32),
        time=torch.cumsum(gaps, 0),
        item_ids=tuple(str(i) for i in range(num_items)),
        user_ids=tuple(str(u) for u in range(len(lengths))),
        fingerprint="test",
        name="test",
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"norm_first": False},
    "rope": {"position": "rope"},
    "no positions": {"position": "none"},
    "swiglu": {"ffn": "swiglu"},
    "cosine": {"score": "cosine"},
    "hstu": {"attention": "hstu"},
    "hstu post-norm": {"attention": "hstu", "norm_first": False},
    "hstu rope": {"attention": "hstu", "position": "rope"},
}


def make_model(**options: Any) -> SeqRec:
    torch.manual_seed(0)
    config = replace(ModelConfig(embed_dim=16, num_heads=2, dropout=0.0), **options)
    model = SeqRec(config, num_items=40, max_len=20)
    with torch.no_grad():  # zero biases would hide mistakes in them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run(model: SeqRec, batch: Batch) -> Tensor:
    hidden: Tensor = model(batch.item, batch.segment, batch.position, batch.time, packed=batch.packed)
    return hidden.flatten(0, 1)


def batches() -> tuple[Batch, Batch]:
    sequences = make_sequences(LENGTHS)
    spans = training_spans(sequences, max_len=20)
    packed = make_batch(sequences, spans, packed=True, row_len=20)
    assert packed.item.shape[0] < len(spans.user)
    return packed, make_batch(sequences, spans, packed=False, row_len=20)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_and_padded_rows_give_the_same_hidden_states(name):
    packed, padded = batches()
    assert torch.equal(packed.target, padded.target)
    model = make_model(**VARIANTS[name])
    torch.testing.assert_close(run(model, packed)[packed.place], run(model, padded)[padded.place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_sees_nothing_that_comes_after_it(name):
    _, padded = batches()
    model = make_model(**VARIANTS[name])
    before = run(model, padded).view(*padded.item.shape, -1)
    cut = 5
    item = padded.item.clone()
    item[:, cut:] = torch.where(item[:, cut:] > 0, item[:, cut:] % 40 + 1, 0)
    assert padded.time is not None
    time = padded.time.clone()
    time[:, cut:] += 1_000_000
    after = run(model, padded._replace(item=item, time=time)).view_as(before)
    torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, cut:], before[:, cut:], atol=1e-3)


def test_softmax_attention_equals_explicit_weights_in_float64():
    model = make_model(num_blocks=1).double()
    packed, _ = batches()
    block = model.blocks[0]
    assert isinstance(block, TransformerBlock)
    x = torch.randn(*packed.item.shape, 16, dtype=torch.float64)
    context = model.context(packed.segment, None, packed=True)
    found = block.attention(x, context)
    weight, bias = block.attention.qkv.weight, block.attention.qkv.bias
    query, key, value = (x @ weight.t() + bias).chunk(3, dim=-1)
    expected = torch.zeros_like(x)
    for r in range(x.shape[0]):
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            for i in range(x.shape[1]):
                allowed = [j for j in range(i + 1) if packed.segment[r, j] == packed.segment[r, i]]
                score = torch.stack([query[r, i, part] @ key[r, j, part] / math.sqrt(8) for j in allowed])
                share = torch.softmax(score, 0)
                expected[r, i, part] = sum(s * value[r, j, part] for s, j in zip(share, allowed, strict=True))
    expected = expected @ block.attention.out.weight.t() + block.attention.out.bias
    torch.testing.assert_close(found, expected)


def test_hstu_attention_equals_a_slow_double_loop_in_float64():
    model = make_model(num_blocks=1, attention="hstu").double()
    packed, _ = batches()
    block = model.blocks[0]
    assert isinstance(block, HSTUBlock)
    with torch.no_grad():
        block.distance_bias.normal_()
        block.time_bias.normal_()
    x = torch.randn(*packed.item.shape, 16, dtype=torch.float64)
    assert packed.time is not None
    found = block(x, model.context(packed.segment, packed.time, packed=True))
    uvqk = F.silu(block.uvqk(block.input_norm(x)))
    gate, value, query, key = uvqk.chunk(4, dim=-1)
    mixed = torch.zeros_like(x)
    for r in range(x.shape[0]):
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            for i in range(x.shape[1]):
                for j in range(i + 1):
                    if packed.segment[r, j] != packed.segment[r, i]:
                        continue
                    gap = max(0, int(packed.time[r, i] - packed.time[r, j]))
                    bucket = int(math.log2(gap + 1))
                    score = query[r, i, part] @ key[r, j, part] + block.distance_bias[i - j] + block.time_bias[bucket]
                    mixed[r, i, part] += F.silu(score) / 20 * value[r, j, part]
    expected = x + block.out(block.gate_norm(mixed) * gate)
    real = packed.segment > 0
    torch.testing.assert_close(found[real], expected[real])


def test_rotation_keeps_lengths_and_depends_on_the_distance_only():
    column = torch.arange(30, dtype=torch.float64)
    angle = column[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    rotation = (angle.cos(), angle.sin())
    turned_query, turned_key = rotate(query.expand(30, 8), rotation), rotate(key.expand(30, 8), rotation)
    torch.testing.assert_close(turned_query.norm(dim=1), query.norm().expand(30))
    scores = turned_query @ turned_key.t()
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    assert not torch.allclose(scores[5, 2], scores[5, 3])


def test_matrices_are_xavier_biases_zero_and_the_padding_item_zero():
    torch.manual_seed(0)
    model = SeqRec(ModelConfig(), num_items=500, max_len=50)
    assert not model.item.weight[0].any()
    assert float(model.item.weight[1:].detach().std()) == pytest.approx(math.sqrt(2 / (501 + 64)), rel=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert float(module.weight.detach().abs().max()) == pytest.approx(bound, rel=0.02)
            assert not module.bias.any()


def test_gradient_checkpointing_gives_the_same_gradients_with_dropout():
    packed, _ = batches()
    gradients = []
    for grad_checkpoint in (False, True):
        model = make_model(grad_checkpoint=grad_checkpoint, dropout=0.3).train()
        torch.manual_seed(5)
        run(model, packed)[packed.place].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_dropout_keeps_the_mean_drops_its_share_and_follows_the_seed(p):
    dropout = Dropout(p).train()
    x = torch.ones(1001, 100)
    torch.manual_seed(0)
    first = dropout(x)
    torch.manual_seed(0)
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, dropout(x))
    assert float((first == 0).float().mean()) == pytest.approx(p, abs=0.006)
    assert float(first.mean()) == pytest.approx(1.0, abs=0.01)
    by_column = (first == 0).float().mean(0)  # the eight bytes of a word are alike
    assert float(by_column.max() - by_column.min()) < 0.12
    assert dropout.eval()(x) is x


def test_impossible_shapes_are_named():
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of num_heads 4"):
        SeqRec(ModelConfig(embed_dim=10, num_heads=4), num_items=5, max_len=5)
    with pytest.raises(ValueError, match="rope turns pairs"):
        SeqRec(ModelConfig(embed_dim=10, num_heads=2, position="rope"), num_items=5, max_len=5)


def test_scores_of_the_padding_item_are_those_of_a_zero_vector():
    model = make_model()
    packed, _ = batches()
    assert not (run(model, packed) @ model.candidates()[0]).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_equals_the_cpu(name):
    packed, _ = batches()
    model = make_model(**VARIANTS[name])
    expected = run(model, packed)[packed.place]
    moved = to_device(packed, torch.device("cuda"))
    torch.testing.assert_close(run(model.cuda(), moved)[moved.place].cpu(), expected, rtol=1e-3, atol=1e-3)
