"""Features are those of CLIP computed slowly from its formulas; modalities have patches and experts of their own."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apps.reid.augment import CLIP_MEAN, CLIP_STD
from apps.reid.clip import TINY, VIT_B16, Clip, ExpertLinear, ImageTower, TowerConfig, resize_position
from apps.reid.clip_weights import towers_state

SMALL = TowerConfig(
    width=24,
    layers=2,
    heads=3,
    patch=4,
    grid=(3, 3),
    embed_dim=10,
    text_width=16,
    text_layers=2,
    text_heads=2,
    vocab_size=30,
    context=8,
)


def hugging_face_state(config: TowerConfig = SMALL, seed: int = 0, grid: int = 3) -> dict[str, Tensor]:
    """Random weights under Hugging Face's names, written down from its published layout."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.5 / math.sqrt(shape[-1])

    wide, narrow, patch = config.width, config.text_width, config.patch
    state = {
        "logit_scale": torch.tensor(4.6),
        "vision_model.embeddings.class_embedding": draw(wide),
        "vision_model.embeddings.patch_embedding.weight": draw(wide, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": draw(1 + grid * grid, wide),
        "visual_projection.weight": draw(config.embed_dim, wide),
        "text_model.embeddings.token_embedding.weight": draw(config.vocab_size, narrow),
        "text_model.embeddings.position_embedding.weight": draw(config.context, narrow),
        "text_projection.weight": draw(config.embed_dim, narrow),
    }
    norms = {"vision_model.pre_layrnorm": wide, "vision_model.post_layernorm": wide}
    norms["text_model.final_layer_norm"] = narrow
    towers = (("vision_model", wide, config.layers), ("text_model", narrow, config.text_layers))
    for tower, width, layers in towers:
        for i in range(layers):
            name = f"{tower}.encoder.layers.{i}"
            sizes = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
            sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            for layer, (outputs, inputs) in sizes.items():
                state[f"{name}.{layer}.weight"] = draw(outputs, inputs) * 3
                state[f"{name}.{layer}.bias"] = draw(outputs)
            norms |= {f"{name}.layer_norm1": width, f"{name}.layer_norm2": width}
    for name, width in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + draw(width), draw(width)
    return state


def slow_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def slow_layer(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def slow_tower(x_TD: Tensor, state: dict[str, Tensor], name: str, *, heads: int, layers: int, causal: bool) -> Tensor:
    """One row through the blocks; every head and every token by itself."""
    length, width = x_TD.shape
    each = width // heads
    for i in range(layers):
        block = f"{name}.encoder.layers.{i}"
        source = slow_norm(x_TD, state, f"{block}.layer_norm1")
        query, key, value = (slow_layer(source, state, f"{block}.self_attn.{part}_proj") for part in "qkv")
        mixed = torch.zeros_like(x_TD)
        for head in range(heads):
            columns = slice(head * each, (head + 1) * each)
            for t in range(length):
                seen = t + 1 if causal else length
                score = (key[:seen, columns] @ query[t, columns]) / math.sqrt(each)
                weight = (score - score.max()).exp()
                mixed[t, columns] = (weight / weight.sum()) @ value[:seen, columns]
        x_TD = x_TD + slow_layer(mixed, state, f"{block}.self_attn.out_proj")
        hidden = slow_layer(slow_norm(x_TD, state, f"{block}.layer_norm2"), state, f"{block}.mlp.fc1")
        x_TD = x_TD + slow_layer(hidden / (1 + (-1.702 * hidden).exp()), state, f"{block}.mlp.fc2")
    return x_TD


def slow_position(position: Tensor, side: int, rows: int, columns: int) -> Tensor:
    """Bilinear interpolation between the centres of patches, one value at a time."""
    grid = position[1:].reshape(side, side, -1)

    def place(i: int, count: int) -> tuple[int, int, float]:
        at = min(max((i + 0.5) * side / count - 0.5, 0.0), side - 1.0)
        low = int(at)
        return low, min(low + 1, side - 1), at - low

    result = [position[0]]
    for row in range(rows):
        top, bottom, down = place(row, rows)
        for column in range(columns):
            left, right, across = place(column, columns)
            upper = grid[top, left] * (1 - across) + grid[top, right] * across
            lower = grid[bottom, left] * (1 - across) + grid[bottom, right] * across
            result.append(upper * (1 - down) + lower * down)
    return torch.stack(result)


def slow_image(image: Tensor, state: dict[str, Tensor], config: TowerConfig = SMALL, side: int = 3) -> Tensor:
    """Every projected token of one normalised image [3, height, width], in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    image, patch = image.double(), config.patch
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    tokens = [state["vision_model.embeddings.class_embedding"]]
    for row in range(rows):
        for column in range(columns):
            cut = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append((state["vision_model.embeddings.patch_embedding.weight"] * cut).sum((1, 2, 3)))
    position = state["vision_model.embeddings.position_embedding.weight"]
    x = torch.stack(tokens) + slow_position(position, side, rows, columns)
    x = slow_norm(x, state, "vision_model.pre_layrnorm")
    x = slow_tower(x, state, "vision_model", heads=config.heads, layers=config.layers, causal=False)
    return slow_norm(x, state, "vision_model.post_layernorm") @ state["visual_projection.weight"].T


def slow_text(tokens: list[int], state: dict[str, Tensor], config: TowerConfig = SMALL) -> Tensor:
    """Every projected token of one text, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x = state["text_model.embeddings.token_embedding.weight"][tokens]
    x = x + state["text_model.embeddings.position_embedding.weight"][: len(tokens)]
    x = slow_tower(x, state, "text_model", heads=config.text_heads, layers=config.text_layers, causal=True)
    return slow_norm(x, state, "text_model.final_layer_norm") @ state["text_projection.weight"].T


def make_clip(*, modalities: int = 1, rank: int = 0, config: TowerConfig = SMALL, **options) -> Clip:
    """Towers with the random weights; experts, where there are any, that do something."""
    torch.manual_seed(3)
    clip = Clip(config, modalities=modalities, rank=rank, **options)
    clip.load_state_dict(clip.state_dict() | towers_state(hugging_face_state(), clip, name="random weights"))
    return clip.eval()


def train_something(clip: Clip) -> None:
    """Other patches for each modality, and experts that are no longer zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        clip.image.patch_weight.add_(0.05 * torch.randn(clip.image.patch_weight.shape, generator=generator))
        for module in clip.image.modules():
            if isinstance(module, ExpertLinear) and module.up is not None:
                module.up.add_(0.3 * torch.randn(module.up.shape, generator=generator))


def draw_images(rows: int, height: int = 12, width: int = 12, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (rows, channels, height, width), generator=generator, dtype=torch.uint8)


def normalise(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
    return ((image.double() / 255 - mean) / std).float()


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize(("height", "width"), [(12, 12), (20, 8), (24, 12)])
def test_image_tokens_are_those_of_the_formulas_on_any_grid(height, width):
    image = draw_images(2, height, width)
    encoded = make_clip().image(image, torch.zeros(2, dtype=torch.int64))
    expected = torch.stack([slow_image(normalise(one), hugging_face_state()) for one in image])
    assert_near(encoded.token, expected)
    assert torch.equal(encoded.feature, encoded.token[:, 0])


def test_text_feature_is_that_of_the_end_token_by_the_formulas():
    texts = torch.tensor([[28, 5, 6, 29, 0, 0, 0, 0], [28, 1, 2, 3, 4, 5, 6, 29], [28, 29, 0, 0, 0, 0, 0, 0]])
    encoded = make_clip().text(texts)
    expected = torch.stack([slow_text(row, hugging_face_state()) for row in texts.tolist()])
    assert_near(encoded.token, expected)
    assert_near(encoded.feature, expected[range(3), [3, 7, 1]])


def test_a_text_feature_does_not_depend_on_the_padding_behind_it():
    texts = torch.tensor([[28, 5, 6, 29, 0, 0, 0, 0], [28, 9, 29, 0, 0, 0, 0, 0]])
    text = make_clip().text
    assert_near(text(texts[:, :4]).feature, text(texts).feature, 1e-6)


def test_bytes_give_the_features_of_normalised_images():
    image, rgb = draw_images(3), torch.zeros(3, dtype=torch.int64)
    tower = make_clip().image
    assert_near(tower(image, rgb).token, tower(normalise(image), rgb).token)


def test_one_grey_channel_gives_the_features_of_three_equal_ones():
    grey, modality = draw_images(3, channels=1), torch.tensor([0, 1, 2])
    clip = make_clip(modalities=3, rank=2)
    train_something(clip)
    tower = clip.image
    assert_near(tower(grey, modality).token, tower(grey.expand(-1, 3, -1, -1), modality).token)
    floats = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert_near(tower(floats, modality).token, tower(floats.expand(-1, 3, -1, -1), modality).token)


def test_modalities_and_experts_begin_as_plain_clip_to_the_last_bit():
    image, modality = draw_images(5), torch.tensor([0, 3, 1, 2, 3])
    plain = make_clip().image(image, torch.zeros(5, dtype=torch.int64))
    extended = make_clip(modalities=4, rank=2, alpha=8.0).image(image, modality)
    assert torch.equal(extended.token, plain.token)


def test_a_mixed_batch_gives_each_row_what_its_modality_alone_gives():
    clip = make_clip(modalities=4, rank=2, alpha=3.0)
    train_something(clip)
    image, modality = draw_images(6), torch.tensor([2, 0, 3, 1, 0, 2])
    mixed = clip.image(image, modality).token
    # the slow way: the experts added to the shared matrices, one plain tower per modality
    for row, m in enumerate(modality.tolist()):
        state = hugging_face_state()
        state["vision_model.embeddings.patch_embedding.weight"] = clip.image.patch_weight[m].detach()
        names = {"out": ["self_attn.out_proj"], "expand": ["mlp.fc1"], "contract": ["mlp.fc2"]}
        names["qkv"] = [f"self_attn.{part}_proj" for part in "qkv"]
        for i, block in enumerate(clip.image.blocks):
            for layer, theirs in names.items():
                module = getattr(block, layer)
                down = module.down.detach().view(len(theirs), 4, 2, -1)  # part, modality, rank
                up = module.up.detach().view(len(theirs), -1, 4, 2)
                for part, their in enumerate(theirs):
                    change = 3.0 / 2 * up[part, :, m] @ down[part, m]
                    assert change.abs().max() > 0.01
                    state[f"vision_model.encoder.layers.{i}.{their}.weight"] += change
        assert_near(mixed[row], slow_image(normalise(image[row]), state))


def test_only_the_modalities_of_the_batch_get_gradients():
    clip = make_clip(modalities=3, rank=2)
    train_something(clip)
    clip.image(draw_images(2), torch.tensor([2, 0])).feature.square().sum().backward()
    patch = clip.image.patch_weight.grad
    assert patch is not None
    assert [bool(patch[m].abs().sum() > 0) for m in range(3)] == [True, False, True]
    for module in clip.image.modules():
        if isinstance(module, ExpertLinear):
            assert module.down is not None
            assert module.up is not None
            down, up = module.down.grad, module.up.grad
            assert down is not None
            assert up is not None
            for m, used in enumerate([True, False, True]):
                assert bool((down.view(module.parts, 3, 2, -1)[:, m].abs().sum((1, 2)) > 0).all()) == used
                assert bool((up.view(module.parts, -1, 3, 2)[:, :, m].abs().sum((1, 2)) > 0).all()) == used


def test_experts_learn_although_they_begin_with_zeros():
    clip = make_clip(modalities=2, rank=2)
    image, modality = draw_images(2), torch.tensor([0, 1])
    experts = [p for name, p in clip.image.named_parameters() if name.endswith((".up", ".down"))]
    before = clip.image(image, modality).feature.detach()
    clip.image(image, modality).feature.square().sum().backward()
    with torch.no_grad():
        for parameter in experts:
            assert parameter.grad is not None
            parameter.sub_(0.1 * parameter.grad)
    after = clip.image(image, modality).feature.detach()
    assert not torch.allclose(before, after, atol=1e-3)


def test_checkpoints_run_blocks_again_and_leave_gradients_as_they_are():
    grads = []
    for grad_checkpoint in (False, True):
        clip = make_clip(modalities=2, rank=2, grad_checkpoint=grad_checkpoint).train()
        runs: list[object] = []
        for block in (*clip.image.blocks, *clip.text.blocks):
            block.register_forward_pre_hook(lambda block, _, runs=runs: runs.append(block))
        train_something(clip)
        image = clip.image(draw_images(2), torch.tensor([1, 0])).feature
        text = clip.text(torch.tensor([[28, 5, 29], [28, 6, 29]])).feature
        (image * text).sum().backward()
        assert len(runs) == (8 if grad_checkpoint else 4)
        grads.append([p.grad for p in clip.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.equal(plain, again)


def test_bf16_autocast_stays_near_fp32_and_its_residuals_are_fp32():
    clip = make_clip(modalities=2, rank=2)
    train_something(clip)
    image, modality = draw_images(4), torch.tensor([1, 0, 1, 0])
    text = torch.tensor([[28, 5, 6, 29]])
    exact_image, exact_text = clip.image(image, modality).feature, clip.text(text).feature
    inputs = []
    handle = clip.image.blocks[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low_image, low_text = clip.image(image, modality).feature, clip.text(text).feature
    handle.remove()
    assert inputs == [torch.float32]
    assert low_image.dtype == torch.bfloat16
    assert (F.cosine_similarity(low_image.float(), exact_image) > 0.999).all()
    assert (F.cosine_similarity(low_text.float(), exact_text) > 0.999).all()
    low_image.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.image.parameters())


def test_positions_of_the_grid_they_were_made_for_are_taken_as_they_are():
    position = torch.randn(1 + 6, 4)
    assert resize_position(position, (2, 3), (2, 3)) is position


class _Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_and_no_operator_is_added_by_more_rows():
    clip = make_clip(modalities=4, rank=2)
    counts = []
    for rows in (2, 9):
        image, modality, token = draw_images(rows), torch.arange(rows) % 4, torch.full((rows, 3), 29)
        with _Calls() as calls:
            encoded, text = clip.image(image, modality), clip.text(token)
            (encoded.feature.sum() + text.feature.sum()).backward()
        assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


def test_a_second_call_gives_the_same_features():
    tower = make_clip(modalities=4, rank=2).image
    image, modality = draw_images(4), torch.arange(4)
    assert torch.equal(tower(image, modality).feature, tower(image, modality).feature)


@pytest.mark.parametrize(
    ("image", "message"),
    [(torch.zeros(1, 3, 10, 12), "images of 10 x 12 .* patches of 4 x 4"), (torch.zeros(1, 3, 12, 3), "multiples")],
)
def test_images_that_cannot_be_cut_are_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        make_clip().image(image, torch.zeros(1, dtype=torch.int64))


def test_texts_longer_than_the_positions_are_an_error():
    with pytest.raises(ValueError, match="texts of 9 tokens are longer than the 8"):
        make_clip().text(torch.zeros(1, 9, dtype=torch.int64))


def test_a_width_that_heads_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width 24 cannot have 5 heads"):
        Clip(dataclasses.replace(SMALL, heads=5))


def test_the_real_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        clip = Clip(VIT_B16)
    # 149,620,737 are published, the temperature among them
    assert sum(p.numel() for p in clip.parameters()) == 149_620_737 - 1


def test_the_tiny_model_tells_images_and_texts_apart_from_the_start():
    torch.manual_seed(0)
    clip = Clip(TINY, modalities=4, rank=4).eval()
    with torch.no_grad():
        image = clip.image(draw_images(4, 256, 128), torch.arange(4)).feature
        text = clip.text(torch.tensor([[256, 97, 98, 257], [256, 99, 100, 257]])).feature
    assert image.shape == (4, TINY.embed_dim)
    assert torch.pdist(image).min() > 1e-3
    assert torch.pdist(text).min() > 1e-3


def test_all_modalities_of_a_fresh_model_begin_with_the_same_patches():
    tower = ImageTower(SMALL, modalities=3)
    assert torch.equal(tower.patch_weight, tower.patch_weight[:1].expand_as(tower.patch_weight))
    assert tower.patch_weight[0].std() > 0


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 16)])
def test_features_equal_those_of_transformers(height, width):
    transformers = pytest.importorskip("transformers")
    config = TowerConfig(
        width=64,
        layers=3,
        heads=4,
        patch=8,
        grid=(height // 8, width // 8),
        embed_dim=32,
        text_width=48,
        text_layers=3,
        text_heads=3,
        vocab_size=100,
        context=16,
    )
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    text = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    text |= {"vocab_size": 100, "max_position_embeddings": 16, "projection_dim": 32, "eos_token_id": 99}
    torch.manual_seed(1)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # their initial biases and norms would hide mistakes
            parameter += 0.05 * torch.randn(parameter.shape)
    embeddings = theirs.vision_model.embeddings
    embeddings.interpolate_pos_encoding = lambda x, height, width: resize_position(
        embeddings.position_embedding.weight, (4, 4), (height // 8, width // 8)
    )
    clip = Clip(config).eval()
    clip.load_state_dict(towers_state(theirs.state_dict(), clip, name="transformers"))
    image = torch.randn(3, 3, height, width)
    tokens = torch.randint(1, 98, (4, 16))
    tokens[range(4), [5, 15, 9, 1]] = 99
    with torch.no_grad():
        their_image = theirs.get_image_features(pixel_values=image, interpolate_pos_encoding=True).pooler_output
        their_text = theirs.get_text_features(input_ids=tokens).pooler_output
        assert_near(clip.image(image, torch.zeros(3, dtype=torch.int64)).feature, their_image)
        assert_near(clip.text(tokens).feature, their_text)
