"""Pretrained CLIP weights, as Hugging Face or as OpenAI names them, into the towers of `clip`."""

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from apps.reid.clip import Clip, resize_position
from shared.checkpoint import CheckpointError, load_weights

_SHOWN = 10  # faults per message

# Names of a block's tensors, ours and theirs; query, key and value stand in one tensor of ours.
_HF_BLOCK = {
    "norm_1": "layer_norm1",
    "out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "expand": "mlp.fc1",
    "contract": "mlp.fc2",
}
_OPENAI_BLOCK = {
    "norm_1": "ln_1",
    "out": "attn.out_proj",
    "norm_2": "ln_2",
    "expand": "mlp.c_fc",
    "contract": "mlp.c_proj",
}

_HF_TOP = {
    "image.class_token": "vision_model.embeddings.class_embedding",
    "image.patch_weight": "vision_model.embeddings.patch_embedding.weight",
    "image.position": "vision_model.embeddings.position_embedding.weight",
    "image.projection.weight": "visual_projection.weight",
    "text.token.weight": "text_model.embeddings.token_embedding.weight",
    "text.position": "text_model.embeddings.position_embedding.weight",
    "text.projection.weight": "text_projection.weight",
}
_OPENAI_TOP = {
    "image.class_token": "visual.class_embedding",
    "image.patch_weight": "visual.conv1.weight",
    "image.position": "visual.positional_embedding",
    "image.projection.weight": "visual.proj",
    "text.token.weight": "token_embedding.weight",
    "text.position": "positional_embedding",
    "text.projection.weight": "text_projection",
}
_HF_NORMS = {
    "image.pre_norm": "vision_model.pre_layrnorm",  # their spelling
    "image.post_norm": "vision_model.post_layernorm",
    "text.post_norm": "text_model.final_layer_norm",
}
_OPENAI_NORMS = {"image.pre_norm": "visual.ln_pre", "image.post_norm": "visual.ln_post", "text.post_norm": "ln_final"}

# Beside the towers: a temperature that re-identification does not use, numbers that say what the shapes say already.
_IGNORED = re.compile(r"logit_scale|.*\.position_ids|input_resolution|context_length|vocab_size")


class WeightsError(ValueError):
    """The file does not hold the weights of these towers."""


def load_clip(clip: Clip, path: Path) -> None:
    """Give both towers the weights of a .safetensors, .pt or .pth file, in place.

    All modalities begin with the patch weights of the RGB one; experts stay as they are. Positions are interpolated to
    the image tower's grid. Raises WeightsError that names every tensor that is missing, unexpected or of another shape,
    and CheckpointError for a file that cannot be read.
    """
    state = towers_state(_read(path), clip, name=str(path))
    own = clip.state_dict()
    own.update(state)
    clip.load_state_dict(own)


def towers_state(found: Mapping[str, Tensor], clip: Clip, *, name: str) -> dict[str, Tensor]:
    """The tensors of a Hugging Face or OpenAI state under the names and in the shapes of `clip`, float32.

    name: what to call the state in an error.
    """
    found = {key: tensor for key, tensor in found.items() if not _IGNORED.fullmatch(key)}
    is_openai = "visual.conv1.weight" in found or any(".resblocks." in key for key in found)
    if not is_openai and not any(key.startswith(("vision_model.", "text_model.")) for key in found):
        raise WeightsError(
            f"{name}: no CLIP model: expected names such as vision_model.pre_layrnorm.weight (Hugging Face) or "
            f"visual.ln_pre.weight (OpenAI), found {', '.join(sorted(found)[:_SHOWN]) or 'nothing'}; "
            "save the state of a whole CLIP model"
        )
    shapes = _shapes(clip)
    sources = _sources(clip, is_openai=is_openai)
    faults = []
    state = {}
    for ours, theirs in sources.items():
        tensors = [found.get(key) for key in theirs]
        faults += [f"{key}: missing" for key, tensor in zip(theirs, tensors, strict=True) if tensor is None]
        parts = [tensor.float() for tensor in tensors if tensor is not None]
        if len(parts) < len(theirs):
            continue
        is_turned = is_openai and ours.endswith("projection.weight")
        expected = _their_shape(shapes[ours], len(theirs), is_turned=is_turned)
        wrong = [
            f"{key}: shape {tuple(part.shape)}, expected {tuple(expected)}"
            for key, part in zip(theirs, parts, strict=True)
            if not (_is_square(part, expected) if ours == "image.position" else part.shape == expected)
        ]
        faults += wrong
        if not wrong:
            state[ours] = parts[0].T if is_turned else torch.cat(parts)
    known = {key for theirs in sources.values() for key in theirs}
    faults += [f"{key}: unexpected" for key in found if key not in known]
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise WeightsError(
            f"{name}: not the weights of this model ({'OpenAI' if is_openai else 'Hugging Face'} names):\n  "
            + "\n  ".join(faults[:_SHOWN])
            + more
            + "\nGive a file of the same architecture, or choose the model that belongs to it."
        )
    side = math.isqrt(state["image.position"].shape[0] - 1)
    state["image.position"] = resize_position(state["image.position"], (side, side), clip.image.grid)
    state["image.patch_weight"] = state["image.patch_weight"].expand_as(clip.image.patch_weight)
    return state


def _sources(clip: Clip, *, is_openai: bool) -> dict[str, list[str]]:
    """Their names of each of our tensors; several are to be joined along the first axis."""
    sources = {ours: [theirs] for ours, theirs in (_OPENAI_TOP if is_openai else _HF_TOP).items()}
    pairs = dict(_OPENAI_NORMS if is_openai else _HF_NORMS)
    for tower in ("image", "text"):
        for i in range(len(getattr(clip, tower).blocks)):
            if is_openai:
                block = f"{'visual.' if tower == 'image' else ''}transformer.resblocks.{i}"
                for kind in ("weight", "bias"):
                    sources[f"{tower}.blocks.{i}.qkv.{kind}"] = [f"{block}.attn.in_proj_{kind}"]
            else:
                block = f"{'vision' if tower == 'image' else 'text'}_model.encoder.layers.{i}"
                for kind in ("weight", "bias"):
                    names = [f"{block}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                    sources[f"{tower}.blocks.{i}.qkv.{kind}"] = names
            for ours, theirs in (_OPENAI_BLOCK if is_openai else _HF_BLOCK).items():
                pairs[f"{tower}.blocks.{i}.{ours}"] = f"{block}.{theirs}"
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            sources[f"{ours}.{kind}"] = [f"{theirs}.{kind}"]
    return sources


def _shapes(clip: Clip) -> dict[str, torch.Size]:
    """Shapes of the towers' tensors with the patch weights of one modality."""
    shapes = {name: tensor.shape for name, tensor in clip.state_dict().items()}
    shapes["image.patch_weight"] = shapes["image.patch_weight"][1:]
    return shapes


def _their_shape(shape: torch.Size, parts: int, *, is_turned: bool) -> torch.Size:
    """What one of their tensors must be to become, turned or joined from so many, one of ours."""
    return torch.Size(reversed(shape)) if is_turned else torch.Size((shape[0] // parts, *shape[1:]))


def _is_square(position: Tensor, expected: torch.Size) -> bool:
    """Whether these are positions of the right width for one class token and a square grid."""
    if position.ndim != 2 or position.shape[1] != expected[1]:
        return False
    patches = position.shape[0] - 1
    return patches > 0 and math.isqrt(patches) ** 2 == patches


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)[0]
    except CheckpointError as error:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any("/code/" in name for name in archive.namelist()):
                    raise CheckpointError(
                        f"{path}: a TorchScript archive, which is a program and not only weights; OpenAI publishes "
                        "CLIP in this form. Convert it once with a program you trust: "
                        "torch.save(torch.jit.load(old).state_dict(), new)"
                    ) from None
        raise error
