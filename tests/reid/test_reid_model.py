"""Features are those of CLIP, missing modalities touch nothing else, and training takes the way of evaluation."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apps.reid.clip import Block, Clip, Encoded, ExpertLinear, ImageTower, TowerConfig
from apps.reid.config import ModelConfig, TrainConfig
from apps.reid.losses import total
from apps.reid.model import Neck, Output, ReID, TokenFusion, choose_subsets, parameter_groups

SMALL = ModelConfig(
    embed_dim=16,
    tower_width=24,
    tower_layers=2,
    tower_heads=3,
    patch=4,
    text_width=16,
    text_layers=2,
    text_heads=2,
    rank=2,
    fusion_heads=2,
)
FUSIONS = ("pooled", "tokens")
ALL = choose_subsets("all", range(5))
END = 29
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal", "_by_mask")


class Batch(NamedTuple):
    image: Tensor
    modality: Tensor
    slot: Tensor
    present: Tensor
    token: Tensor


def make_model(subsets=ALL, *, seed: int = 0, **changes) -> ReID:
    """A model whose experts, null tokens and classifier do something."""
    torch.manual_seed(seed)
    model = ReID(
        dataclasses.replace(SMALL, **changes), vocab_size=30, context=8, num_identities=5, grid=(3, 2), subsets=subsets
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ExpertLinear) and module.up is not None:
                module.up.normal_(std=0.2)
        model.null.normal_()
        model.classifier.weight.normal_(std=0.3)
    return model


def make_batch(present=None, *, size: int = 4, seed: int = 1) -> Batch:
    """Samples that lack what `present` says; images in the order of modalities, then samples."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 4, 3, 12, 8), generator=generator, dtype=torch.uint8)
    length = torch.randint(2, 8, (size,), generator=generator)
    token = torch.randint(1, END - 1, (size, 8), generator=generator)
    place = torch.arange(8)
    token[place == length[:, None]] = END
    token[place > length[:, None]] = 0
    present = torch.ones(size, 5, dtype=torch.bool) if present is None else present
    modality, slot = present[:, :4].t().nonzero().unbind(1)
    return Batch(image[slot, modality], modality, slot, present, token * present[:, 4:])


def some_missing() -> Tensor:
    """Four samples: complete, without sketch and text, with RGB alone, without NIR."""
    present = torch.ones(4, 5, dtype=torch.bool)
    present[1, [3, 4]] = False
    present[2, 1:] = False
    present[3, 1] = False
    return present


def one_missing_each() -> Tensor:
    """Four samples, of which each lacks another modality beside RGB."""
    present = torch.ones(4, 5, dtype=torch.bool)
    present[range(4), range(1, 5)] = False
    return present


def slowly(model: ReID, batch: Batch, subset: tuple[int, ...]) -> Tensor:
    """Features of a subset, one sample and one image at a time through the calls of evaluation."""
    rows = []
    for sample in range(len(batch.present)):
        parts = []
        for modality in subset:
            own = (batch.slot == sample) & (batch.modality == modality)
            if modality == 4:
                parts.append(model.encode_texts(batch.token[sample : sample + 1]))
            elif own.any():
                parts.append(model.encode_images(batch.image[own], batch.modality[own]))
            else:
                parts.append(Encoded(torch.full((1, 16), 7.0), torch.full((1, 7, 16), 7.0)))  # not to be looked at
        rows.append(model.fuse(subset, parts, batch.present[sample : sample + 1, list(subset)]))
    return torch.cat(rows)


def slow_block(x_TD: Tensor, block: Block, seen: list[bool]) -> Tensor:
    """One row through a block, every head and token by itself; tokens that are not seen are no keys."""
    length, width = x_TD.shape
    each = width // block.heads

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    qkv = norm(x_TD, block.norm_1) @ block.qkv.weight.T + block.qkv.bias
    mixed = torch.zeros_like(x_TD)
    keys = [t for t in range(length) if seen[t]]
    for head, t in itertools.product(range(block.heads), range(length)):
        columns = slice(head * each, (head + 1) * each)
        query, key, value = qkv[t, :width][columns], qkv[keys, width : 2 * width], qkv[keys, 2 * width :]
        weight = (key[:, columns] @ query / math.sqrt(each)).exp()
        mixed[t, columns] = (weight / weight.sum()) @ value[:, columns]
    x_TD = x_TD + mixed @ block.out.weight.T + block.out.bias
    hidden = norm(x_TD, block.norm_2) @ block.expand.weight.T + block.expand.bias
    return x_TD + (hidden / (1 + (-1.702 * hidden).exp())) @ block.contract.weight.T + block.contract.bias


def features(output: Output) -> Tensor:
    return torch.cat([output.rgb_BE[None], output.query_CBE])


# Subsets


def test_all_subsets_are_fifteen_by_size_and_singles_are_four():
    assert choose_subsets("single", range(5)) == ((1,), (2,), (3,), (4,))
    assert ALL[:6] == ((1,), (2,), (3,), (4,), (1, 2), (1, 3))
    assert len(ALL) == len(set(ALL)) == 15
    assert ALL[-1] == (1, 2, 3, 4)
    assert {frozenset(subset) for subset in ALL} == {
        frozenset(m for m in range(1, 5) if bits >> m & 1) for bits in range(2, 32, 2)
    }


def test_subsets_are_of_the_modalities_there_are():
    assert choose_subsets("all", [4, 0, 2]) == ((2,), (4,), (2, 4))
    assert choose_subsets("all", [0]) == ()


# Features


def test_rgb_features_of_a_fresh_model_are_those_of_plain_clip():
    torch.manual_seed(0)
    config = TowerConfig(24, 2, 3, 4, (3, 2), 16, 16, 2, 2, 30, 8)
    plain = Clip(config).eval()
    model = ReID(SMALL, vocab_size=30, context=8, num_identities=5, grid=(3, 2), subsets=ALL).eval()
    state = model.clip.state_dict() | plain.state_dict()
    state["image.patch_weight"] = plain.image.patch_weight.expand(4, -1, -1, -1, -1)
    model.clip.load_state_dict(state)
    batch = make_batch()
    output = model(batch)
    rgb = batch.image[batch.modality == 0]
    assert torch.equal(output.rgb_BE, plain.image(rgb, torch.zeros(4, dtype=torch.int64)).feature)
    text = output.query_CBE[ALL.index((4,))]
    torch.testing.assert_close(text, plain.text(batch.token).feature)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("present", [None, some_missing()], ids=["complete", "incomplete"])
def test_forward_gives_what_encoding_and_fusing_one_by_one_gives(fusion, present):
    model, batch = make_model(fusion=fusion).double().eval(), make_batch(present)
    output = model(batch)
    torch.testing.assert_close(output.rgb_BE, slowly(model, batch, (0,)))
    assert torch.equal(output.has_CB, torch.stack([batch.present[:, list(c)].any(1) for c in ALL]))
    for c, subset in enumerate(ALL):
        torch.testing.assert_close(output.query_CBE[c], slowly(model, batch, subset), msg=str(subset))


def test_pooled_fusion_is_that_of_the_formulas():
    model = make_model(fusion_layers=2).double().eval()
    parts = [Encoded(torch.randn(2, 16).double(), torch.empty(0)) for _ in range(2)]
    fused = model.fuse((3, 1), parts)
    for q in range(2):
        x = model.null.detach().clone()
        x[2], x[0] = parts[0].feature[q], parts[1].feature[q]
        for block in model.fusion.blocks:
            assert isinstance(block, Block)
            x = slow_block(x, block, [True] * 4)
        torch.testing.assert_close(fused[q], (x[0] + x[2]) / 2)


def test_token_fusion_is_that_of_the_formulas():
    model = make_model(fusion="tokens", fusion_layers=2).double().eval()
    fusion = model.fusion
    assert isinstance(fusion, TokenFusion)
    image = Encoded(torch.randn(2, 16).double(), torch.randn(2, 7, 16).double())
    text = Encoded(torch.randn(2, 16).double(), torch.randn(2, 5, 16).double())
    text.token[0, 3:] = 0  # padding
    fused = model.fuse((4, 2), [text, image], torch.tensor([[True, True], [True, False]]))
    for q, (rows, count) in enumerate([(image.token[0], 3), (model.null[1:2].detach(), 5)]):
        x = fusion.pre_norm(torch.cat([rows, text.token[q, :count]]))
        for block in fusion.blocks:
            assert isinstance(block, Block)
            x = slow_block(x, block, [True] * len(x))
        mean = (image.feature[q] + text.feature[q]) / 2 if q == 0 else text.feature[q]
        torch.testing.assert_close(fused[q], mean + fusion.post_norm(x).mean(0) @ fusion.output.weight.T)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_of_complete_samples_differ_and_none_is_a_null_token(fusion):
    model = make_model(fusion=fusion).eval()
    found = features(model(make_batch()))
    for feature_BE in found:
        assert torch.pdist(feature_BE).min() > 1e-2
        assert torch.cdist(feature_BE, model.null).min() > 1e-2


def test_the_null_token_never_enters_rgb_features():
    model = make_model()
    with torch.no_grad():
        model.null.fill_(float("nan"))
    output = model(make_batch(some_missing()))
    assert output.rgb_BE.isfinite().all()
    assert output.query_CBE.isnan().any()
    image = torch.zeros(2, 3, 12, 8, dtype=torch.uint8)
    encoded = model.encode_images(image, torch.zeros(2, dtype=torch.int64))
    assert model.fuse((0,), [encoded]).isfinite().all()


def test_a_missing_single_modality_is_its_null_token():
    model = make_model()
    output = model(make_batch(some_missing()))
    assert torch.equal(output.query_CBE[ALL.index((3,))][1], model.null[2])
    assert torch.equal(output.query_CBE[ALL.index((4,))][2], model.null[3])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_other_samples_and_the_order_of_rows_change_no_feature(fusion):
    model = make_model(fusion=fusion).double().eval()
    present = some_missing()
    whole = model(make_batch(present))
    batch = make_batch(present)
    shuffled = torch.tensor([3, 0, 2, 1])
    rows = torch.randperm(len(batch.slot), generator=torch.Generator().manual_seed(0))
    again = model(
        Batch(
            batch.image[rows],
            batch.modality[rows],
            shuffled.argsort()[batch.slot[rows]],
            batch.present[shuffled],
            batch.token[shuffled],
        )
    )
    torch.testing.assert_close(features(again), features(whole)[:, shuffled])
    torch.testing.assert_close(again.logits_FBP, whole.logits_FBP[:, shuffled])
    alone = batch.slot == 1
    one = Batch(batch.image[alone], batch.modality[alone], batch.slot[alone] * 0, present[1:2], batch.token[1:2])
    torch.testing.assert_close(features(model(one)), features(whole)[:, 1:2])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_an_image_that_is_not_present_is_not_looked_at(fusion):
    model = make_model(fusion=fusion).eval()
    complete = make_batch()
    dropped = complete._replace(present=some_missing())
    lacking = make_batch(some_missing())._replace(token=complete.token)
    torch.testing.assert_close(features(model(dropped)), features(model(lacking)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_order_of_a_querys_modalities_changes_nothing(fusion):
    model, batch = make_model(fusion=fusion).eval(), make_batch()
    parts = {m: model.encode_images(batch.image[batch.modality == m], torch.full((4,), m)) for m in (1, 2, 3)}
    parts[4] = model.encode_texts(batch.token)
    orders = [(1, 3, 4), (4, 1, 3), (3, 4, 1)]
    first, *others = (model.fuse(order, [parts[m] for m in order]) for order in orders)
    assert all(torch.equal(other, first) for other in others)


def test_padding_behind_texts_changes_no_fused_feature():
    model = make_model(fusion="tokens").double().eval()
    short = torch.tensor([[3, 4, END, 0], [5, END, 0, 0]])
    image = torch.arange(2 * 3 * 12 * 8).view(2, 3, 12, 8).to(torch.uint8)
    sketch = model.encode_images(image, torch.tensor([3, 3]))
    fused = [model.fuse((3, 4), [sketch, model.encode_texts(F.pad(short, (0, more)))]) for more in (0, 4)]
    torch.testing.assert_close(*fused)


# Training and evaluation


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_are_the_same_in_training_and_in_evaluation(fusion):
    model = make_model(fusion=fusion)
    batch = make_batch(some_missing())
    assert torch.equal(features(model.train()(batch)), features(model.eval()(batch)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_module_that_makes_features_is_used_in_training_only(fusion):
    model = make_model(fusion=fusion)
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    batch = make_batch()
    model.train()(batch)
    trained = {name for name in called if name and name.split(".")[0] not in ("neck", "classifier")}
    called.clear()
    model.eval()
    slowly(model, batch, (1, 2, 3, 4))
    assert called == trained
    assert any(name.startswith("fusion.blocks") for name in trained)


def test_dropout_touches_logits_alone():
    model, batch = make_model(dropout=0.5).train(), make_batch()
    first, second = model(batch), model(batch)
    assert torch.equal(features(first), features(second))
    assert not torch.equal(first.logits_FBP, second.logits_FBP)
    model.eval()
    assert torch.equal(model(batch).logits_FBP, model(batch).logits_FBP)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter_that_learns(fusion):
    model = make_model(fusion=fusion).train()
    # tokens are fused without places for what is missing: null tokens learn where something is
    output = model(make_batch() if fusion == "pooled" else make_batch(one_missing_each()))
    weights = torch.randn(output.query_CBE.shape, generator=torch.Generator().manual_seed(0))
    (output.logits_FBP.square().sum() + (output.query_CBE * weights).sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_neck_is_a_batch_norm_of_the_rows_that_count():
    neck, has = Neck(6), torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    norm = nn.BatchNorm1d(6)
    with torch.no_grad():
        neck.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.weight.copy_(neck.weight)
    for seed in range(3):
        x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 2
        x[~has] *= 1000  # what they are must not matter
        found = neck(x, has)
        torch.testing.assert_close(found[has], norm(x[has]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((neck.mean, neck.var), (norm.running_mean, norm.running_var))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(neck.eval()(x, has[:2]).flatten(0, 1), norm.eval()(x.flatten(0, 1)))


def test_samples_without_a_modality_change_no_running_statistic():
    models = [make_model(choose_subsets("single", range(5))).train() for _ in range(2)]
    with torch.no_grad():
        models[1].null[2] = 100.0  # of the sketch, which nobody has
    for model in models:
        model(make_batch(torch.tensor([[True, True, True, False, True]]).expand(4, -1)))
    assert torch.equal(models[0].neck.mean, models[1].neck.mean)
    assert torch.equal(models[0].neck.var, models[1].neck.var)


# What learns


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("subsets", [ALL, ((1,), (4,)), ((1,), (3,), (1, 3)), ()], ids=len)
def test_everything_that_learns_is_in_one_group(fusion, subsets):
    model = make_model(subsets, fusion=fusion)
    groups = parameter_groups(model)
    found = [trainable for group in groups.values() for trainable in group]
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(expected)
    assert all(trainable.parameter is expected[trainable.name] for trainable in found)


def test_groups_hold_what_their_names_say():
    model = make_model(rank=2)
    names = {group: {trainable.name for trainable in found} for group, found in parameter_groups(model).items()}
    low_rank = {name for name, _ in model.named_parameters() if name.endswith((".up", ".down"))}
    assert len(low_rank) == 2 * 4 * SMALL.tower_layers
    assert names["experts"] == low_rank | {"null", "clip.image.patch_weight"}
    assert {name.split(".")[0] for name in names["head"]} == {"fusion", "neck", "classifier"}
    assert {name.split(".")[0] for name in names["towers"]} == {"clip"}


def test_depth_counts_the_blocks_of_a_tower_above_a_parameter():
    model = make_model(tower_layers=3)
    depth = {trainable.name: trainable.depth for group in parameter_groups(model).values() for trainable in group}
    assert depth["clip.image.position"] == depth["clip.image.class_token"] == depth["clip.image.pre_norm.bias"] == 3
    assert [depth[f"clip.image.blocks.{i}.qkv.weight"] for i in range(3)] == [2, 1, 0]
    assert [depth[f"clip.text.blocks.{i}.norm_1.weight"] for i in range(2)] == [1, 0]
    assert depth["clip.text.token.weight"] == depth["clip.text.position"] == 2
    behind = [f"clip.{tower}.{name}.weight" for tower in ("image", "text") for name in ("post_norm", "projection")]
    assert {depth[name] for name in behind} == {0}
    assert depth["clip.image.blocks.0.qkv.down"] == depth["fusion.blocks.0.qkv.weight"] == depth["null"] == 0


@pytest.mark.parametrize("fusion", FUSIONS)
def test_with_frozen_towers_experts_and_head_still_learn(fusion):
    model = make_model(fusion=fusion).train()
    for trainable in parameter_groups(model)["towers"]:
        trainable.parameter.requires_grad_(False)
    assert not parameter_groups(model)["towers"]
    output = model(make_batch(one_missing_each()))
    output.logits_FBP.square().sum().backward()
    for group in ("experts", "head"):
        learns = parameter_groups(model)[group]
        assert learns
        for trainable in learns:
            assert trainable.parameter.grad is not None, trainable.name
            assert trainable.parameter.grad.abs().sum() > 0, trainable.name
    assert all(p.grad is None for p in model.clip.text.parameters())


def test_without_several_modalities_to_train_on_features_are_averaged():
    model = make_model(choose_subsets("single", range(5)), fusion="tokens").eval()
    assert not list(model.fusion.parameters())
    assert not model.null.requires_grad
    parts = [Encoded(torch.randn(3, 16), torch.empty(3, 0, 16)) for _ in range(2)]
    torch.testing.assert_close(model.fuse((1, 4), parts), (parts[0].feature + parts[1].feature) / 2)


def test_without_texts_the_text_tower_neither_runs_nor_learns():
    model = make_model(choose_subsets("all", [0, 1, 3]))
    assert not any(p.requires_grad for p in model.clip.text.parameters())
    model.clip.text.register_forward_hook(lambda *_: pytest.fail("the text tower ran"))
    assert model(make_batch()).query_CBE.shape == (3, 4, 16)


def test_rgb_alone_gives_its_features_and_logits():
    model = make_model(()).eval()
    output = model(make_batch())
    assert output.query_CBE.shape == (0, 4, 16)
    assert output.has_CB.shape == (0, 4)
    assert output.logits_FBP.shape == (1, 4, 5)
    output.logits_FBP.sum().backward()
    assert {p.grad is not None for p in model.parameters() if p.requires_grad} == {True}


# Speed and precision


class _Calls(TorchDispatchMode):
    """Names of the operators that run; indexing by a mask, which must count on the host, has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("aten.index"):
            index = [i for arg in args if isinstance(arg, list | tuple) for i in arg if isinstance(i, Tensor)]
            name += "_by_mask" * any(i.dtype in (torch.bool, torch.uint8) for i in index)
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def host_reads(names: list[str]) -> list[str]:
    return [name for name in names if any(read in name for read in HOST_READS)]


def test_reads_of_the_host_would_be_noticed():
    x = torch.arange(4.0)

    def fill() -> None:
        x[x > 2] = 0.0

    reads = (lambda: x[x > 1], lambda: x.sum().item(), lambda: bool(x[0] > 1), lambda: (x > 1).nonzero(), fill)
    for read in reads:
        with _Calls() as calls:
            read()
        assert host_reads(calls.names)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_step_reads_nothing_back(fusion):
    model = make_model(fusion=fusion, drop_path=0.2, dropout=0.1).train()
    training = TrainConfig(triplet_weight=1.0, circle_weight=1.0)
    batch, label = make_batch(some_missing()), torch.tensor([0, 0, 1, 2])
    with _Calls() as calls:
        losses = total(model(batch), label, training, [len(subset) for subset in ALL])
        losses.total.backward()
    assert losses.total.isfinite()
    assert len(calls.names) > 100
    assert not host_reads(calls.names)


def test_pooled_features_of_all_subsets_are_fused_in_one_call():
    model = make_model()
    rows: list[int] = []
    model.fusion.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    model(make_batch())
    assert rows == [11 * 4]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_model_compiles_as_one_graph(fusion):
    model = make_model(fusion=fusion, drop_path=0.2).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = make_batch(some_missing())
    torch.testing.assert_close(compiled(batch), model(batch))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_bf16_autocast_stays_near_fp32_and_gives_fp32_features(fusion):
    model, batch = make_model(fusion=fusion).eval(), make_batch(some_missing())
    exact = features(model(batch))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch)
        loss = total(output, torch.tensor([0, 0, 1, 1]), TrainConfig(triplet_weight=1.0), [len(c) for c in ALL]).total
    assert {x.dtype for x in (output.rgb_BE, output.query_CBE, output.neck_FBE)} == {torch.float32}
    has = torch.cat([torch.ones(1, 4, dtype=torch.bool), output.has_CB])
    assert (F.cosine_similarity(features(output), exact, dim=-1)[has] > 0.998).all()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Stochastic depth


def test_rows_skip_blocks_with_rising_probability_and_kept_ones_make_up_for_it():
    torch.manual_seed(0)
    tower = ImageTower(TowerConfig(24, 3, 3, 4, (3, 2), 16), drop_path=0.5).double().train()
    image = torch.arange(3 * 12 * 8).view(1, 3, 12, 8).to(torch.uint8)
    rows = 600
    torch.manual_seed(1)
    found = tower(image.expand(rows, -1, -1, -1), torch.zeros(rows, dtype=torch.int64)).feature
    # the four ways through blocks 1 and 2, skipped a quarter and half of the time
    tower.eval()
    inputs: list[Tensor] = []
    tower.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    tower(image, torch.zeros(1, dtype=torch.int64))
    counts = {}
    for kept in itertools.product((0, 1), repeat=2):
        x = tower.blocks[0](inputs[0])
        for i, (keep, chance) in enumerate(zip(kept, (0.75, 0.5), strict=True), 1):
            block = tower.blocks[i]
            x = block(x, None, torch.full((1, 1, 1), keep / chance, dtype=torch.float64)) if keep else x
        way = tower.projection(tower.post_norm(x))[:, 0]
        counts[kept] = int(((found - way).abs().amax(1) < 1e-6).sum())
    assert sum(counts.values()) == rows
    expected = {(0, 0): 0.125, (0, 1): 0.125, (1, 0): 0.375, (1, 1): 0.375}
    for kept, share in expected.items():
        assert abs(counts[kept] / rows - share) < 4 * math.sqrt(share * (1 - share) / rows)


def test_a_share_scales_what_a_block_adds():
    torch.manual_seed(0)
    block = Block(8, 2, causal=False).double()
    x = torch.randn(3, 5, 8).double()
    nothing, everything = (block(x, None, torch.full((3, 1, 1), share).double()) for share in (0.0, 1.0))
    assert torch.equal(nothing, x)
    assert torch.equal(everything, block(x))


def test_nothing_is_skipped_in_evaluation_and_nothing_drawn_without_drop_path():
    model, batch = make_model(drop_path=0.9).eval(), make_batch()
    assert torch.equal(features(model(batch)), features(model(batch)))
    model = make_model(drop_path=0.0).train()
    state = torch.get_rng_state()
    model(batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpoints_skip_the_same_blocks_again_in_backward():
    grads = []
    for grad_checkpoint in (False, True):
        model = make_model(drop_path=0.5, grad_checkpoint=grad_checkpoint).train()
        torch.manual_seed(5)
        features(model(make_batch(size=8))).square().sum().backward()
        grads.append([p.grad for p in model.clip.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again)


def test_heads_that_do_not_divide_the_features_are_an_error():
    with pytest.raises(ValueError, match="features of width 16 cannot be fused by 3 heads"):
        make_model(fusion_heads=3)
