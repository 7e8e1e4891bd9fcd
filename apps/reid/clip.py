"""CLIP's image and text towers, with patches and low-rank experts of their own for each image modality.

Legend: R images, N texts, L tokens of a text, T tokens of an image (1 + patches), D width of a tower, I and O widths
into and out of a layer, H heads, W head width, M image modalities, Q parts of a fused layer, K rank of an expert,
E embedding dim, C channels, P patch size.

All images go through one call, whatever their modalities: what a modality has of its own is computed for every row and
multiplied by 0 where it is another's. For the patches that is a few percent of a block's work, for the experts less;
nothing is sorted, gathered or read back to the host.

Sources: CLIP (Radford et al. 2021), LoRA (Hu et al. 2021), experts per modality as in ReID5o (Zuo et al. 2025).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apps.reid.augment import CLIP_MEAN, CLIP_STD, fold_normalisation


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of both towers."""

    width: int = 768  # of the image tower
    layers: int = 12
    heads: int = 12
    patch: int = 16  # side of a patch, pixels
    grid: tuple[int, int] = (14, 14)  # patches down and across that have positions; others are interpolated
    embed_dim: int = 512
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vocab_size: int = 49408
    context: int = 77  # tokens of the longest text


VIT_B16 = TowerConfig()
TINY = TowerConfig(  # for two cores and the byte-level tokenizer
    width=128, layers=3, heads=4, grid=(16, 8), embed_dim=128, text_width=128, text_layers=2, text_heads=4,
    vocab_size=258, context=160,
)  # fmt: skip


class Encoded(NamedTuple):
    """What a tower says about each of its inputs."""

    feature: Tensor  # [R or N, E], of the class token or of the end-of-text token
    token: Tensor  # [R, T, E] or [N, L, E], of every token; the class token is the first


class ExpertLinear(nn.Linear):
    """A layer shared by all rows plus a low-rank one of each row's modality m: W x + b + alpha / rank up_m down_m x.

    A layer that computes several things at once (query, key, value) has low-rank parts for each. `up` begins with
    zeros, so that the experts change nothing until they are trained.
    """

    def __init__(self, inputs: int, outputs: int, *, experts: int = 0, rank: int = 0, parts: int = 1) -> None:
        super().__init__(inputs, outputs)
        columns = experts * rank
        self.parts = parts
        self.down = nn.Parameter(torch.empty(parts * columns, inputs)) if columns else None
        self.up = nn.Parameter(torch.zeros(parts, outputs // parts, columns)) if columns else None
        if self.down is not None:
            nn.init.uniform_(self.down, -(inputs**-0.5), inputs**-0.5)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[R, T, O] of x [R, T, I]. gate: [R, M * K], alpha / rank in the columns of a row's own expert, else 0."""
        plain = super().forward(x)
        if self.down is None or self.up is None or gate is None:
            return plain
        inner = F.linear(x, self.down).view(*x.shape[:-1], self.parts, -1)  # [R, T, Q, M * K]
        inner = (inner * gate[:, None, None].to(inner.dtype)).flatten(-2)
        own_part = torch.eye(self.parts, dtype=self.up.dtype, device=self.up.device)[:, None, :, None]
        up = (self.up[:, :, None] * own_part).flatten(2).flatten(0, 1)  # [O, Q * M * K], blocks on the diagonal
        return plain + F.linear(inner, up)


class Block(nn.Module):
    """Attention and a feed-forward layer of four times the width, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int, *, causal: bool, experts: int = 0, rank: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = ExpertLinear(width, 3 * width, experts=experts, rank=rank, parts=3)
        self.out = ExpertLinear(width, width, experts=experts, rank=rank)
        self.norm_2 = nn.LayerNorm(width)
        self.expand = ExpertLinear(width, 4 * width, experts=experts, rank=rank)
        self.contract = ExpertLinear(4 * width, width, experts=experts, rank=rank)

    def forward(
        self, x: Tensor, gate: Tensor | None = None, share: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """[R, T, D] of x [R, T, D]; what the block adds is multiplied by each row's `share` ([R, 1, 1]).

        mask: [R, T] bool, False for tokens that nobody attends to.
        """
        rows, length, width = x.shape
        qkv = self.qkv(self.norm_1(x), gate).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [R, H, T, W]
        attends = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attends, is_causal=self.causal)
        change = self.out(mixed.transpose(1, 2).reshape(rows, length, width), gate)
        x = x + (change if share is None else change * share)
        hidden = self.expand(self.norm_2(x), gate)
        change = self.contract(hidden * torch.sigmoid(1.702 * hidden), gate)  # QuickGELU, as CLIP was trained
        return x + (change if share is None else change * share)

    def reset_parameters(self, depth: int) -> None:
        """CLIP's initial values for what is shared, in a tower of `depth` blocks; in place."""
        width = self.out.in_features
        residual = width**-0.5 * (2 * depth) ** -0.5
        for layer, std in (
            (self.qkv, width**-0.5),
            (self.out, residual),
            (self.expand, (2 * width) ** -0.5),
            (self.contract, residual),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


class Tower(nn.Module):
    """Blocks, a final LayerNorm and a projection."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        *,
        causal: bool,
        experts: int = 0,
        rank: int = 0,
        drop_path: float = 0.0,
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"{'a text' if causal else 'an image'} tower of width {width} cannot have {heads} heads; the width "
                "must be a multiple of them"
            )
        self.drop_path = drop_path
        self.grad_checkpoint = grad_checkpoint
        self.blocks = nn.ModuleList(
            Block(width, heads, causal=causal, experts=experts, rank=rank) for _ in range(layers)
        )
        self.post_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def run(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[R, T, E] of embedded tokens [R, T, D]."""
        for i, block in enumerate(self.blocks):
            share = self.draw_share(x, i) if self.training and self.drop_path > 0 and i else None
            if self.grad_checkpoint and self.training:
                # nothing is drawn inside
                x = checkpoint(block, x, gate, share, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, gate, share)
        return self.projection(self.post_norm(x))

    def draw_share(self, x: Tensor, i: int) -> Tensor:
        """0 for rows that skip block i, for others what makes up for it on average, [R, 1, 1].

        Stochastic depth (Huang et al. 2016): the first block is never skipped, the last one most often. Drawn from
        torch's global generator, which the training loop seeds.
        """
        skipped = self.drop_path * i / (len(self.blocks) - 1)
        draw = torch.rand(x.shape[0], 1, 1, device=x.device)
        return ((draw >= skipped) / (1 - skipped)).to(x.dtype)

    def reset_blocks(self) -> None:
        """CLIP's initial values for what is shared; in place."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters(len(self.blocks))
        nn.init.normal_(self.projection.weight, std=self.projection.in_features**-0.5)


class ImageTower(Tower):
    """A vision transformer that reads images of several modalities at once."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: TowerConfig,
        *,
        modalities: int = 1,
        rank: int = 0,
        alpha: float = 1.0,
        drop_path: float = 0.0,
        grad_checkpoint: bool = False,
    ) -> None:
        """rank: of the experts in every layer, 0 for none; alpha / rank: what they are multiplied by."""
        width = config.width
        super().__init__(
            width,
            config.layers,
            config.heads,
            config.embed_dim,
            causal=False,
            experts=modalities,
            rank=rank,
            drop_path=drop_path,
            grad_checkpoint=grad_checkpoint,
        )
        self.patch = config.patch
        self.grid = config.grid
        self.rank = rank
        self.alpha = alpha
        self.patch_weight = nn.Parameter(torch.empty(modalities, width, 3, config.patch, config.patch))
        self.class_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(1 + config.grid[0] * config.grid[1], width))
        self.pre_norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initial values but for positions, the same patches for every modality; in place."""
        self.reset_blocks()
        first = self.patch_weight[0]
        nn.init.normal_(first, std=first[0].numel() ** -0.5)
        with torch.no_grad():
            self.patch_weight.copy_(first.clone().expand_as(self.patch_weight))
        nn.init.normal_(self.class_token, std=self.class_token.shape[0] ** -0.5)
        # As large as embedded patches, where CLIP's are smaller: heads tell places apart from the first step, and a
        # model that begins without pretrained weights learns from far fewer of them.
        nn.init.normal_(self.position)

    def forward(self, image: Tensor, modality_R: Tensor) -> Encoded:
        """Features and tokens of images [R, C, height, width], each with an index 0 .. M - 1 of its modality.

        uint8 images are normalised here, in the weights; floating ones are taken to be normalised. Height and width are
        any multiples of the patch. One channel is grey: it gives what three equal channels give.
        """
        rows, _, height, width = image.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images of {height} x {width} cannot be cut into patches of {self.patch} x {self.patch}; "
                "use multiples of it"
            )
        is_own_RM = modality_R[:, None] == torch.arange(self.patch_weight.shape[0], device=image.device)
        x = self.embed_patches(image, is_own_RM)
        position = resize_position(self.position, self.grid, (height // self.patch, width // self.patch))
        x = torch.cat([self.class_token.to(x.dtype).expand(rows, 1, -1), x], dim=1) + position
        gate_RK = (is_own_RM * (self.alpha / self.rank)).repeat_interleave(self.rank, dim=1) if self.rank else None
        token = self.run(self.pre_norm(x), gate_RK)
        return Encoded(token[:, 0], token)

    def embed_patches(self, image: Tensor, is_own_RM: Tensor) -> Tensor:
        """Patches through the weights of each image's own modality, [R, patches, D]."""
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.patch_weight.dtype
        weight: Tensor = self.patch_weight
        bias: Tensor | None = None
        if not image.is_floating_point():  # every byte is exact in half precision too
            weight, bias = fold_normalisation(weight, self.mean, self.std)
        if image.shape[1] == 1:
            weight = weight.sum(2, keepdim=True)  # the sum, since the same value came in three times
        patches = cut_patches(image, self.patch).to(dtype)
        x = patches.new_zeros(())
        for modality in range(weight.shape[0]):  # all rows each time: selecting them would need their number
            own = F.linear(patches, weight[modality].flatten(1), None if bias is None else bias[modality])
            x = torch.where(is_own_RM[:, modality, None, None], own, x)
        return x


class TextTower(Tower):
    """A causal transformer over tokens."""

    def __init__(self, config: TowerConfig, *, grad_checkpoint: bool = False) -> None:
        width = config.text_width
        super().__init__(
            width,
            config.text_layers,
            config.text_heads,
            config.embed_dim,
            causal=True,
            grad_checkpoint=grad_checkpoint,
        )
        self.token = nn.Embedding(config.vocab_size, width)
        self.position = nn.Parameter(torch.empty(config.context, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLIP's initial values; in place."""
        self.reset_blocks()
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, token_NL: Tensor) -> Encoded:
        """Features and tokens of texts, [N, L] int64 with L up to the context.

        The feature is that of the end-of-text token, which has the highest number. Being causal, it does not depend on
        what follows, so that columns which are padding in all rows can be cut off.
        """
        rows, length = token_NL.shape
        if length > self.position.shape[0]:
            raise ValueError(
                f"texts of {length} tokens are longer than the {self.position.shape[0]} the model has positions for; "
                "tokenise them with the model's context"
            )
        token = self.run(self.token(token_NL) + self.position[:length])
        return Encoded(token[torch.arange(rows, device=token.device), token_NL.argmax(1)], token)


class Clip(nn.Module):
    """Both towers: `image` and `text`."""

    def __init__(
        self,
        config: TowerConfig,
        *,
        modalities: int = 1,
        rank: int = 0,
        alpha: float = 1.0,
        drop_path: float = 0.0,
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.image = ImageTower(
            config, modalities=modalities, rank=rank, alpha=alpha, drop_path=drop_path, grad_checkpoint=grad_checkpoint
        )
        self.text = TextTower(config, grad_checkpoint=grad_checkpoint)


def cut_patches(image: Tensor, patch: int) -> Tensor:
    """The image as rows of C * P * P values, one per patch, in the order of a patch weight; [R, patches, C * P * P]."""
    rows, channels, height, width = image.shape
    cut = image.reshape(rows, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * patch * patch)


def resize_position(position_TD: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Positions of the class token and of a grid of patches, for another grid; [1 + target patches, D].

    Bilinear, as person re-identification resizes them, and not bicubic as transformers does.
    """
    if grid == target:
        return position_TD
    old = position_TD[1:].T.reshape(1, -1, *grid)
    new = F.interpolate(old, size=target, mode="bilinear", align_corners=False)
    return torch.cat([position_TD[:1], new.reshape(new.shape[1], -1).T])
