"""The re-identification model: CLIP's towers, fusion of what a query has, and a classifier behind a neck.

Legend: R images of a batch, B samples of a batch, N texts, L tokens of a text, C subsets of the modalities beside RGB,
S those of several modalities, F = 1 + C features of a sample (RGB first), P identities, Q queries, K modalities of a
query, M = 4 modalities beside RGB, T tokens, E embedding dim, A rows of a fusion.

Training and evaluation take the same way: `encode_images`, `encode_texts`, `fuse`. What features are compared by is the
cosine; they are not normalised here. Nothing is read back to the host and no shape depends on which modalities are
present: what is missing is a null token, in queries alone. RGB features never meet one.

Sources: CLIP (Radford et al. 2021), BNNeck (Luo et al. 2019), subsets of modalities as in ReID5o (Zuo et al. 2025).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.reid.clip import Block, Clip, Encoded, ExpertLinear, TowerConfig
from apps.reid.config import ModelConfig

RGB, TEXT = 0, 4  # in the data's order of modalities; between them are the other images
NUM_IMAGES = 4  # modalities that are images
NUM_OTHERS = 4  # modalities beside RGB
NECK_SCALE = 8.0  # length of what the classifier sees
MOMENTUM = 0.1  # of the running statistics

Subset = tuple[int, ...]


class Batch(Protocol):
    """Samples with all their images."""

    @property
    def image(self) -> Tensor: ...  # [R, 3, H, W] uint8, one row per image, at the size the model sees
    @property
    def modality(self) -> Tensor: ...  # [R] int64
    @property
    def slot(self) -> Tensor: ...  # [R] int64, which of the B samples the image belongs to
    @property
    def present(self) -> Tensor: ...  # [B, 5] bool; an image that is not, has no row or one that is not looked at
    @property
    def token(self) -> Tensor: ...  # [B, L] int64


class Output(NamedTuple):
    """Features of a training batch."""

    rgb_BE: Tensor  # [B, E] of RGB, not normalised
    query_CBE: Tensor  # [C, B, E] of every subset of the other modalities, in the order of `subsets`
    has_CB: Tensor  # [C, B] bool: the sample has at least one modality of the subset; missing ones are null tokens
    logits_FBP: Tensor  # [1 + C, B, P] of RGB and of each subset, behind the neck
    neck_FBE: Tensor  # [1 + C, B, E] behind the batch norm


class Trainable(NamedTuple):
    """A parameter that learns."""

    name: str
    parameter: nn.Parameter
    depth: int  # blocks of its tower above it: 0 in the last block, behind it, and outside the towers


def choose_subsets(kind: str, modalities: Sequence[int]) -> tuple[Subset, ...]:
    """What RGB is matched with: the non-empty subsets of the modalities beside it, or each of them alone.

    By size, then in order. kind: all or single; modalities: indexes, with or without RGB.
    """
    others = sorted(set(modalities) - {RGB})
    largest = {"all": len(others), "single": 1}[kind]
    return tuple(subset for size in range(1, largest + 1) for subset in itertools.combinations(others, size))


class Neck(nn.Module):
    """Batch norm without a bias, of the rows that count: BNNeck (Luo et al. 2019).

    RGB and queries share the statistics on purpose. Statistics per modality would take the distance between modalities
    away before the classifier sees it, and the identity loss would no longer ask the features, which are what is
    compared, to close it.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x_FBE: Tensor, has_FB: Tensor) -> Tensor:
        """[F, B, E], in single precision at least. Rows without are normalised too but enter no statistic."""
        x = x_FBE.to(torch.promote_types(x_FBE.dtype, self.weight.dtype))
        mean, var = self.mean, self.var
        if self.training:
            # sums with weights of 0 and 1: a batch of the rows that count would have a shape that the host must know
            weight = has_FB[..., None].to(x.dtype)
            count = weight.sum().clamp(min=1)
            mean = (x * weight).sum((0, 1)) / count
            var = ((x - mean).square() * weight).sum((0, 1)) / count
            with torch.no_grad():
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.mean.lerp_(mean.to(self.mean.dtype), MOMENTUM)
                self.var.lerp_(unbiased.to(self.var.dtype), MOMENTUM)
        return (x - mean) * (torch.rsqrt(var + 1e-5) * self.weight)


class PooledFusion(nn.Module):
    """Attention between the features of the modalities, each in its place; the mean of those that are there.

    Every row has all M places and missing ones hold their null token, so that rows of any subsets make one batch and
    attention needs no mask. Without blocks it is the mean of the features.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.blocks = _blocks(width, heads, layers)

    def forward(self, x_AME: Tensor, has_AM: Tensor) -> Tensor:
        for block in self.blocks:
            x_AME = block(x_AME)
        return _masked_mean(x_AME, has_AM)


class TokenFusion(nn.Module):
    """The mean of the features plus what attention between all their tokens adds.

    ReID5o's attention in front of the blocks is here that of the first block, and the features' mean is ours: fusion
    begins with what single modalities have learned.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.blocks = _blocks(width, heads, layers)
        self.post_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.output.weight, std=0.1 * width**-0.5)

    def forward(self, x_AKE: Tensor, has_AK: Tensor, token_ATE: Tensor) -> Tensor:
        """[A, E] of features, which of them are there, and tokens; tokens of zeros are padding."""
        is_token_AT = (token_ATE != 0).any(-1)
        token_ATE = self.pre_norm(token_ATE)
        for block in self.blocks:
            token_ATE = block(token_ATE, mask=is_token_AT)
        return _masked_mean(x_AKE, has_AK) + self.output(_masked_mean(self.post_norm(token_ATE), is_token_AT))


def _blocks(width: int, heads: int, layers: int) -> nn.ModuleList:
    if width % heads:
        raise ValueError(
            f"features of width {width} cannot be fused by {heads} heads; embed_dim must be a multiple of fusion_heads"
        )
    blocks = [Block(width, heads, causal=False) for _ in range(layers)]
    for block in blocks:
        block.reset_parameters(layers)
    return nn.ModuleList(blocks)


def _masked_mean(x_ATE: Tensor, mask_AT: Tensor) -> Tensor:
    """Means of the rows where the mask is True, [A, E]; zeros where it never is."""
    weight = mask_AT.to(x_ATE.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
    return (x_ATE * weight[..., None]).sum(1)


class ReID(nn.Module):
    """Features of images, of texts and of queries made of several of them; in training also identity logits.

    subsets: of the modalities beside RGB (1..4), which `forward` matches with RGB. Where none has several modalities,
    nothing would train a fusion: several features then give their mean. Texts without a subset leave the text tower
    frozen, for the same reason.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocab_size: int,
        context: int,
        num_identities: int,
        grid: tuple[int, int],
        subsets: Sequence[Subset],
    ) -> None:
        """grid: patches down and across; context: tokens of the longest text."""
        super().__init__()
        self.subsets = tuple(tuple(subset) for subset in subsets)
        width = config.embed_dim
        towers = TowerConfig(
            width=config.tower_width,
            layers=config.tower_layers,
            heads=config.tower_heads,
            patch=config.patch,
            grid=grid,
            embed_dim=width,
            text_width=config.text_width,
            text_layers=config.text_layers,
            text_heads=config.text_heads,
            vocab_size=vocab_size,
            context=context,
        )
        self.clip = Clip(
            towers,
            modalities=NUM_IMAGES,
            rank=config.rank,
            alpha=config.alpha,
            drop_path=config.drop_path,
            grad_checkpoint=config.grad_checkpoint,
        )
        several = [subset for subset in self.subsets if len(subset) > 1]
        layers = config.fusion_layers if several else 0
        self.fusion: PooledFusion | TokenFusion
        if config.fusion == "tokens" and several:
            self.fusion = TokenFusion(width, config.fusion_heads, layers)
        else:
            self.fusion = PooledFusion(width, config.fusion_heads, layers)
        self.null = nn.Parameter(torch.empty(NUM_OTHERS, width), requires_grad=bool(several))
        nn.init.normal_(self.null, std=0.02)
        self.neck = Neck(width)
        self.dropout = config.dropout
        self.classifier = nn.Linear(width, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=width**-0.5)  # rows of about length 1
        self.has_text = any(TEXT in subset for subset in self.subsets)
        if not self.has_text:
            self.clip.text.requires_grad_(False)
        is_in = [[other + 1 in subset for other in range(NUM_OTHERS)] for subset in self.subsets]
        self.is_in_CM: Tensor
        is_in_CM = torch.tensor(is_in, dtype=torch.bool).view(-1, NUM_OTHERS)
        self.register_buffer("is_in_CM", is_in_CM, persistent=False)

    def encode_images(self, image_RCHW: Tensor, modality_R: Tensor) -> Encoded:
        """Features and tokens of uint8 images, each with an index 0..3 of its modality."""
        feature, token = self.clip.image(image_RCHW, modality_R)
        return Encoded(feature.to(self.null.dtype), token)  # fp32 under autocast too: rankings see small differences

    def encode_texts(self, token_NL: Tensor) -> Encoded:
        """Features and tokens of texts; tokens behind the end of a text are zeros, however many there are."""
        feature, token = self.clip.text(token_NL)
        place_L = torch.arange(token_NL.shape[1], device=token_NL.device)
        return Encoded(feature.to(self.null.dtype), token * (place_L <= token_NL.argmax(1)[:, None])[..., None])

    def fuse(self, modalities: Sequence[int], parts: Sequence[Encoded], has_QK: Tensor | None = None) -> Tensor:
        """One feature per query from those of its modalities, [Q, E]; of a single modality, that modality's.

        modalities: K of 1..4, in any order, with what was encoded of each for all queries; or RGB alone, which has no
        null token. Tokens are looked at where tokens are fused, and may have different lengths. has_QK: where False,
        the null token stands in for what was encoded; without it, every query has every modality.
        """
        first = parts[0].feature
        has_K = [torch.ones_like(first[:, 0], dtype=torch.bool)] * len(parts) if has_QK is None else has_QK.unbind(1)
        if len(modalities) == 1:
            null = first if modalities[0] == RGB else self.null[modalities[0] - 1]
            return torch.where(has_K[0][:, None], first, null)
        by_modality = {modality: (part, has) for modality, part, has in zip(modalities, parts, has_K, strict=True)}
        if isinstance(self.fusion, TokenFusion):
            return self._fuse_tokens({modality: by_modality[modality] for modality in sorted(by_modality)})
        absent = Encoded(torch.zeros_like(first), first), torch.zeros_like(has_K[0])
        every = [by_modality.get(modality, absent) for modality in range(1, 1 + NUM_OTHERS)]
        return self._fuse_features(
            torch.stack([part.feature for part, _ in every], dim=1), torch.stack([has for _, has in every], dim=1)
        )

    def _fuse_features(self, x_AME: Tensor, has_AM: Tensor) -> Tensor:
        """[A, E] of all modalities' features beside RGB, of which those without are not looked at."""
        return self.fusion(torch.where(has_AM[..., None], x_AME, self.null), has_AM)

    def _fuse_tokens(self, by_modality: Mapping[int, tuple[Encoded, Tensor]]) -> Tensor:
        """[Q, E] of what was encoded of each modality, and which queries ([Q] bool) have it."""
        token_K = []
        for modality, (part, has_Q) in by_modality.items():
            # a missing modality is one token and padding
            null_TE = F.pad(self.null[modality - 1, None], (0, 0, 0, part.token.shape[1] - 1))
            token_K.append(torch.where(has_Q[:, None, None], part.token, null_TE))
        x_QKE = torch.stack([part.feature for part, _ in by_modality.values()], dim=1)
        has_QK = torch.stack([has for _, has in by_modality.values()], dim=1)
        return self.fusion(x_QKE, has_QK, torch.cat(token_K, dim=1))

    def forward(self, batch: Batch) -> Output:
        """Features and logits of a batch's RGB images and of every subset of its other modalities."""
        size = batch.present.shape[0]
        images = self.encode_images(batch.image, batch.modality)
        place_R = batch.slot * NUM_IMAGES + batch.modality

        def by_modality(x_R: Tensor) -> Sequence[Tensor]:
            """Of rows [R, ...], four times [B, ...]; zeros where there is no image."""
            rows = x_R.new_zeros(size * NUM_IMAGES, *x_R.shape[1:]).index_copy(0, place_R, x_R)
            return rows.view(size, NUM_IMAGES, *x_R.shape[1:]).unbind(1)

        features = by_modality(images.feature)
        tokens = by_modality(images.token) if isinstance(self.fusion, TokenFusion) else features  # not looked at
        parts = [Encoded(feature, token) for feature, token in zip(features, tokens, strict=True)]
        parts.append(self.encode_texts(batch.token) if self.has_text else parts[RGB])  # in no subset
        has_CB = (batch.present[:, 1:] & self.is_in_CM[:, None]).any(-1)
        rgb_BE = parts[RGB].feature
        query_CBE = self._fuse_subsets(parts, batch.present)
        has_FB = torch.cat([torch.ones_like(batch.present[:, RGB])[None], has_CB])
        neck_FBE = self.neck(torch.cat([rgb_BE[None], query_CBE]), has_FB)
        seen_FBE = F.dropout(NECK_SCALE * F.normalize(neck_FBE, dim=-1), self.dropout, self.training)
        return Output(rgb_BE, query_CBE, has_CB, self.classifier(seen_FBE), neck_FBE)

    def _fuse_subsets(self, parts: Sequence[Encoded], present_B5: Tensor) -> Tensor:
        """What `fuse` says of every subset, [C, B, E]; features are fused in one call."""
        several = [c for c, subset in enumerate(self.subsets) if len(subset) > 1]
        query_C: dict[int, Tensor] = {}
        if several and isinstance(self.fusion, PooledFusion):
            x_BME = torch.stack([part.feature for part in parts[1:]], dim=1)
            has_SBM = torch.stack([self.is_in_CM[c] for c in several])[:, None] & present_B5[:, 1:]
            x_SBME = x_BME.expand(len(several), *x_BME.shape)
            fused_AE = self._fuse_features(x_SBME.flatten(0, 1), has_SBM.flatten(0, 1))
            query_C = dict(zip(several, fused_AE.view(len(several), -1, fused_AE.shape[1]).unbind(0), strict=True))
        for c, subset in enumerate(self.subsets):
            if c not in query_C:
                has_BK = torch.stack([present_B5[:, modality] for modality in subset], dim=1)
                query_C[c] = self.fuse(subset, [parts[modality] for modality in subset], has_BK)
        empty = parts[RGB].feature.new_zeros(0, *parts[RGB].feature.shape)
        return torch.stack([query_C[c] for c in range(len(self.subsets))]) if self.subsets else empty


def parameter_groups(model: ReID) -> dict[str, list[Trainable]]:
    """Every parameter that learns, once: "towers" (what modalities share), "experts", "head".

    Experts are what a modality has of its own: patches, low-rank experts, null tokens. The head is fusion, neck and
    classifier. Membership goes by module, so that no name can be misspelt.
    """
    own = {id(model.null), id(model.clip.image.patch_weight)}
    for module in model.clip.image.modules():
        if isinstance(module, ExpertLinear):
            own |= {id(parameter) for parameter in (module.down, module.up) if parameter is not None}
    depth: dict[int, int] = {}
    for tower in (model.clip.image, model.clip.text):
        layers = len(tower.blocks)
        behind = {id(parameter) for module in (tower.post_norm, tower.projection) for parameter in module.parameters()}
        depth |= {id(parameter): 0 if id(parameter) in behind else layers for parameter in tower.parameters()}
        for i, block in enumerate(tower.blocks):
            depth |= {id(parameter): layers - 1 - i for parameter in block.parameters()}
    groups: dict[str, list[Trainable]] = {"towers": [], "experts": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "experts" if id(parameter) in own else "towers" if id(parameter) in depth else "head"
            groups[group].append(Trainable(name, parameter, depth[id(parameter)] if group == "towers" else 0))
    return groups
