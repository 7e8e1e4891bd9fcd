"""Both published layouts load to the same model, from every kind of file; what does not fit is named."""

import dataclasses
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from apps.reid.clip import Clip, resize_position
from apps.reid.clip_weights import WeightsError, load_clip, towers_state
from shared.checkpoint import CheckpointError
from tests.reid.test_reid_clip import SMALL, draw_images, hugging_face_state

TEXTS = torch.tensor([[28, 5, 6, 29, 0], [28, 1, 29, 0, 0]])


def openai_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in OpenAI's layout, written down from its published names."""
    names = {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "visual_projection.weight": "visual.proj",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    }
    parts = {
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
        "layer_norm": "ln_",
        "self_attn": "attn",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        other = names.get(name, name)
        for old, new in parts.items():
            other = other.replace(old, new) if name not in names else other
        if other in ("visual.proj", "text_projection"):
            tensor = tensor.T.contiguous()
        if ".attn.q_proj." in other:
            others = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            result[other.replace(".q_proj.", ".in_proj_")] = torch.cat(others)
        elif not any(f".attn.{part}_proj." in other for part in "kv"):
            result[other] = tensor
    return result


def features(clip: Clip) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        image = clip.eval().image(draw_images(3), torch.zeros(3, dtype=torch.int64)).feature
        return image, clip.text(TEXTS).feature


def test_both_layouts_from_every_kind_of_file_give_the_same_features(tmp_path):
    hugging_face = hugging_face_state()
    openai = openai_state(hugging_face)
    assert not set(openai) & set(hugging_face) - {"logit_scale"}
    paths = [tmp_path / name for name in ("hf.safetensors", "hf.pt", "openai.safetensors", "openai.pth")]
    save_file(hugging_face, paths[0])
    torch.save({"state_dict": hugging_face}, paths[1])
    save_file(openai, paths[2])
    torch.save({f"module.{name}": tensor for name, tensor in openai.items()}, paths[3])
    found = []
    for path in paths:
        clip = Clip(SMALL)
        load_clip(clip, path)
        found.append(features(clip))
    for image, text in found[1:]:
        assert torch.equal(image, found[0][0])
        assert torch.equal(text, found[0][1])
    assert torch.pdist(found[0][0]).min() > 0.01


def test_what_belongs_to_no_tower_is_ignored():
    state = hugging_face_state()
    without = {name: tensor for name, tensor in state.items() if name != "logit_scale"}
    with_ids = state | {
        f"{tower}.embeddings.position_ids": torch.arange(9)[None] for tower in ("vision_model", "text_model")
    }
    numbers = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    clip = Clip(SMALL)
    expected = towers_state(state, clip, name="x")
    for other in (without, with_ids, openai_state(state) | numbers):
        found = towers_state(other, clip, name="x")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_modality_begins_with_the_rgb_patches_and_experts_stay():
    torch.manual_seed(0)
    clip = Clip(SMALL, modalities=4, rank=2)
    down = {name: p.clone() for name, p in clip.named_parameters() if name.endswith((".down", ".up"))}
    state = hugging_face_state()
    clip.load_state_dict(clip.state_dict() | towers_state(state, clip, name="x"))
    for m in range(4):
        assert torch.equal(clip.image.patch_weight[m], state["vision_model.embeddings.patch_embedding.weight"])
    assert down
    assert all(torch.equal(clip.get_parameter(name), before) for name, before in down.items())


def test_loading_moves_every_shared_tensor(tmp_path):
    path = tmp_path / "hf.safetensors"
    save_file(hugging_face_state(), path)
    clip = Clip(SMALL, modalities=2)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    load_clip(clip, path)
    same = [name for name, tensor in clip.state_dict().items() if torch.equal(tensor, before[name])]
    assert not same
    assert all(p.requires_grad for p in clip.parameters())


def test_query_key_and_value_keep_their_order():
    clip = Clip(SMALL)
    state = hugging_face_state()
    found = towers_state(state, clip, name="x")["text.blocks.1.qkv.weight"]
    names = [f"text_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in ("q", "k", "v")]
    assert [torch.equal(found[16 * i : 16 * i + 16], state[name]) for i, name in enumerate(names)] == [True] * 3


def test_square_projections_are_turned_by_layout_and_not_by_shape():
    config = dataclasses.replace(SMALL, embed_dim=SMALL.text_width)
    state, clip = hugging_face_state(config), Clip(config)
    for layout in (state, openai_state(state)):
        found = towers_state(layout, clip, name="x")["text.projection.weight"]
        assert torch.equal(found, state["text_projection.weight"])


def test_positions_are_interpolated_to_the_grid_of_the_model():
    state = hugging_face_state(grid=4)
    position = state["vision_model.embeddings.position_embedding.weight"]
    for grid in ((4, 4), (3, 3), (6, 2)):
        clip = Clip(dataclasses.replace(SMALL, grid=grid))
        found = towers_state(state, clip, name="x")["image.position"]
        assert torch.equal(found, resize_position(position, (4, 4), grid))
        assert found.shape == (1 + grid[0] * grid[1], SMALL.width)


def test_a_grid_with_as_many_patches_is_still_another_grid():
    state = hugging_face_state(grid=4)
    clip = Clip(dataclasses.replace(SMALL, grid=(8, 2)))
    position = state["vision_model.embeddings.position_embedding.weight"]
    found = towers_state(state, clip, name="x")["image.position"]
    assert torch.equal(found, resize_position(position, (4, 4), (8, 2)))
    assert not torch.equal(found, position)


def test_half_precision_weights_become_float32():
    half = {name: tensor.half() for name, tensor in hugging_face_state().items()}
    found = towers_state(half, Clip(SMALL), name="x")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert torch.equal(found["image.class_token"], half["vision_model.embeddings.class_embedding"].float())


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path):
    state = hugging_face_state()
    del state["vision_model.pre_layrnorm.weight"]
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    state["vision_model.head.weight"] = torch.zeros(3)
    state["visual_projection.weight"] = state["visual_projection.weight"].T.contiguous()
    state["vision_model.embeddings.position_embedding.weight"] = torch.zeros(1 + 7, SMALL.width)
    state["text_model.encoder.layers.0.self_attn.q_proj.weight"] = torch.zeros(5, 16)
    path = tmp_path / "hf.safetensors"
    save_file(state, path)
    clip = Clip(SMALL)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_clip(clip, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: not the weights of this model (Hugging Face names):")
    for line in (
        "vision_model.pre_layrnorm.weight: missing",
        "text_model.encoder.layers.1.self_attn.k_proj.bias: missing",
        "vision_model.head.weight: unexpected",
        "visual_projection.weight: shape (24, 10), expected (10, 24)",
        "vision_model.embeddings.position_embedding.weight: shape (8, 24), expected (10, 24)",
        "text_model.encoder.layers.0.self_attn.q_proj.weight: shape (5, 16), expected (16, 16)",
    ):
        assert f"\n  {line}\n" in message
    assert message.count("\n  ") == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())


def test_faults_of_the_other_layout_have_its_names():
    state = openai_state(hugging_face_state())
    state["visual.proj"] = state["visual.proj"].T
    state["transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(16, 16)
    del state["ln_final.bias"]
    with pytest.raises(WeightsError) as caught:
        towers_state(state, Clip(SMALL), name="weights.pt")
    message = str(caught.value)
    assert "weights.pt: not the weights of this model (OpenAI names)" in message
    assert "visual.proj: shape (10, 24), expected (24, 10)" in message
    assert "transformer.resblocks.0.attn.in_proj_weight: shape (16, 16), expected (48, 16)" in message
    assert "ln_final.bias: missing" in message


@pytest.mark.parametrize("layers", [1, 3])
def test_another_depth_is_an_error_that_lists_some_and_counts_the_rest(layers):
    state = hugging_face_state(dataclasses.replace(SMALL, layers=layers))
    with pytest.raises(
        WeightsError, match=r"(?s)layers\.\d.*  and 6 more\nGive a file of the same architecture"
    ) as caught:
        towers_state(state, Clip(SMALL), name="x")
    assert ("missing" if layers == 1 else "unexpected") in str(caught.value)


def test_a_file_of_another_kind_of_model_is_an_error_that_says_what_it_holds(tmp_path):
    path = tmp_path / "resnet.pt"
    torch.save({"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"resnet\.pt: no CLIP model: .*found conv1\.weight, fc\.bias"):
        load_clip(Clip(SMALL), path)


def test_a_torchscript_archive_is_refused_with_the_way_to_convert_it(tmp_path):
    path = tmp_path / "ViT-B-16.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT-B-16/code/__torch__.py", "")
        archive.writestr("ViT-B-16/constants.pkl", b"\x80\x02).")
        archive.writestr("ViT-B-16/data.pkl", b"\x80\x02).")
        archive.writestr("ViT-B-16/version", "3\n")
    with pytest.raises(CheckpointError, match=r"ViT-B-16\.pt: a TorchScript archive, .*state_dict\(\)"):
        load_clip(Clip(SMALL), path)


def test_a_pickle_that_wants_code_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match="which is code and not tensors"):
        load_clip(Clip(SMALL), path)
