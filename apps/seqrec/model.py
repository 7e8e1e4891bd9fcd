"""Causal sequence encoder: SASRec's softmax blocks (pre- or post-norm) or HSTU's pointwise blocks.

Legend: R rows, L row length, D embedding dim, H heads, W head width (D / H), I items + 1 (row 0 is padding).

The model sees rows of tokens and the segment each token belongs to; whether a row holds one sequence or several makes
no difference to a token's output. There is no dropout inside attention: on a CPU it would cost the fused kernel; it is
applied to the outputs instead.

Sources: SASRec (Kang and McAuley 2018), HSTU (Zhai et al. 2024, eq. 1-3), RoPE (Su et al. 2021), SwiGLU (Shazeer 2020).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apps.seqrec.config import ModelConfig

ROPE_BASE = 10_000.0
TIME_BUCKETS = 64  # bucket = floor(log2(1 + seconds)): 64 of them cover every int64


class Dropout(nn.Module):
    """Dropout that costs a fraction of F.dropout on a CPU; there, the rate is rounded to a multiple of 1/256.

    One 64-bit random word gives the masks of eight values. Draws come from torch's global generator, which the
    training loop seeds from (seed, epoch, step), so that gradient checkpointing recomputes the same masks.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        threshold = round(self.p * 256)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        keep = (words.view(torch.uint8)[: x.numel()] >= threshold).to(x.dtype)
        return x * keep.mul_(256 / (256 - threshold)).view(x.shape)


class Context(NamedTuple):
    """What all blocks of one forward pass share."""

    mask_RLL: Tensor | None  # bool, True where a token may attend; None: causal, one sequence per row
    rotation_LW: tuple[Tensor, Tensor] | None  # cosine and sine, for RoPE
    distance_LL: Tensor | None  # int64, columns from a token to the one it attends to, 0 above the diagonal (HSTU)
    time_bucket_RLL: Tensor | None  # int64, logarithmic gap in seconds (HSTU, where times exist)


def attention_mask(segment_RL: Tensor) -> Tensor:
    """True where a token may attend: to itself and earlier tokens of its own segment, [R, L, L] bool.

    Padding attends to earlier padding, so that no row of weights is empty.
    """
    length = segment_RL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_RL.device).tril()
    return (segment_RL[:, :, None] == segment_RL[:, None, :]) & causal


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: each pair (x[w], x[w + W/2]) of `x` [..., L, W] turned by the angle of its column.

    Attention then depends on the distance of two columns only, so that a sequence may start anywhere in a row.
    """
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class SoftmaxAttention(nn.Module):
    """Multi-head causal self-attention through the fused kernel; an L x L weight is never materialised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.out = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x_RLD: Tensor, context: Context) -> Tensor:
        rows, length, width = x_RLD.shape
        qkv = self.qkv(x_RLD).view(rows, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [R, H, L, W]
        if context.rotation_LW is not None:
            query, key = rotate(query, context.rotation_LW), rotate(key, context.rotation_LW)
        mask = context.mask_RLL
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=None if mask is None else mask[:, None], is_causal=mask is None
        )
        return self.out(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    """Two layers with GELU, or the gated SwiGLU of about the same number of parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.ffn == "swiglu"
        hidden = config.embed_dim * config.ffn_mult
        if self.gated:
            hidden = max(1, 2 * hidden // 3)
        self.expand = nn.Linear(config.embed_dim, 2 * hidden if self.gated else hidden)
        self.contract = nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return self.contract(F.silu(gate) * hidden)
        return self.contract(F.gelu(hidden))


class TransformerBlock(nn.Module):
    """Attention and feed-forward with residuals; LayerNorm before each (`norm_first`) or after the addition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = SoftmaxAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.embed_dim)
        self.feed_forward_norm = nn.LayerNorm(config.embed_dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_RLD: Tensor, context: Context) -> Tensor:
        if self.norm_first:
            x_RLD = x_RLD + self.dropout(self.attention(self.attention_norm(x_RLD), context))
            return x_RLD + self.dropout(self.feed_forward(self.feed_forward_norm(x_RLD)))
        x_RLD = self.attention_norm(x_RLD + self.dropout(self.attention(x_RLD, context)))
        return self.feed_forward_norm(x_RLD + self.dropout(self.feed_forward(x_RLD)))


class HSTUBlock(nn.Module):
    """Pointwise attention: SiLU instead of softmax, a gate instead of a feed-forward layer, a learned relative bias.

    The bias depends on the distance in events and, where times exist, on the logarithm of the gap between the two
    events. The authors' code takes the gap from the *next* event, which is the target's time; ours takes it from the
    current one, so that nothing of the target is seen.
    """

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.num_heads = config.num_heads
        self.max_len = max_len
        self.uvqk = nn.Linear(config.embed_dim, 4 * config.embed_dim)
        self.out = nn.Linear(config.embed_dim, config.embed_dim)
        self.input_norm = nn.LayerNorm(config.embed_dim)
        self.gate_norm = nn.LayerNorm(config.embed_dim)
        self.distance_bias = nn.Parameter(torch.zeros(max_len))
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_RLD: Tensor, context: Context) -> Tensor:
        rows, length, width = x_RLD.shape
        source = self.input_norm(x_RLD) if self.norm_first else x_RLD
        uvqk = F.silu(self.uvqk(source)).view(rows, length, 4, self.num_heads, width // self.num_heads)
        gate, value, query, key = uvqk.permute(2, 0, 3, 1, 4).unbind(0)  # each [R, H, L, W]
        if context.rotation_LW is not None:
            query, key = rotate(query, context.rotation_LW), rotate(key, context.rotation_LW)
        score_RHLL = query @ key.transpose(-1, -2)
        if context.distance_LL is not None:
            score_RHLL = score_RHLL + self.distance_bias[context.distance_LL]
        if context.time_bucket_RLL is not None:
            score_RHLL = score_RHLL + self.time_bias[context.time_bucket_RLL][:, None]
        mask = context.mask_RLL
        assert mask is not None, "pointwise attention needs an explicit mask"
        weight_RHLL = F.silu(score_RHLL) * mask[:, None] / self.max_len  # mask by zero: there is no softmax to -inf
        mixed = (weight_RHLL @ value).transpose(1, 2).reshape(rows, length, width)
        gate = gate.transpose(1, 2).reshape(rows, length, width)
        x_RLD = x_RLD + self.dropout(self.out(self.gate_norm(mixed) * gate))
        return x_RLD if self.norm_first else self.input_norm(x_RLD)


class SeqRec(nn.Module):
    """Item and position embeddings, causal blocks, and scores against the same item embeddings."""

    def __init__(self, config: ModelConfig, *, num_items: int, max_len: int) -> None:
        super().__init__()
        if config.embed_dim % config.num_heads:
            raise ValueError(
                f"embed_dim {config.embed_dim} is not a multiple of num_heads {config.num_heads}; "
                "change --embed-dim or --num-heads"
            )
        if config.position == "rope" and (config.embed_dim // config.num_heads) % 2:
            raise ValueError(
                f"rope turns pairs of values, but embed_dim / num_heads is {config.embed_dim // config.num_heads}; "
                "make it even or use --position learned"
            )
        self.config = config
        self.max_len = max_len
        self.item = nn.Embedding(num_items + 1, config.embed_dim, padding_idx=0)
        # counted back from the last token, so that "most recent" is the same row for every length
        self.position = nn.Embedding(max_len, config.embed_dim) if config.position == "learned" else None
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            HSTUBlock(config, max_len) if config.attention == "hstu" else TransformerBlock(config)
            for _ in range(config.num_blocks)
        )
        self.final_norm = nn.LayerNorm(config.embed_dim) if config.norm_first else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix, zero for biases and for the padding item; in place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.xavier_normal_(module.weight)
        with torch.no_grad():
            self.item.weight[0].zero_()

    def forward(
        self, item_RL: Tensor, segment_RL: Tensor, position_RL: Tensor, time_RL: Tensor | None, *, packed: bool
    ) -> Tensor:
        """Hidden state after each token, [R, L, D]; what it says about padding is to be ignored.

        item, segment, position: [R, L] int64 as in the batch; time: [R, L] int64 seconds or None. With `packed` False
        every row holds one sequence from column 0 on, so that causality alone keeps padding out.
        """
        x = self.item(item_RL) * math.sqrt(self.config.embed_dim)
        if self.position is not None:
            x = x + self.position(position_RL)
        x = self.input_dropout(x)
        context = self.context(segment_RL, time_RL, packed=packed)
        for block in self.blocks:
            if self.config.grad_checkpoint and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return self.final_norm(x)

    def context(self, segment_RL: Tensor, time_RL: Tensor | None, *, packed: bool) -> Context:
        """Mask, rotation and relative distances, made once per forward pass."""
        hstu = self.config.attention == "hstu"
        length, device = segment_RL.shape[1], segment_RL.device
        column = torch.arange(length, device=device)
        rotation = None
        if self.config.position == "rope":
            width = self.config.embed_dim // self.config.num_heads
            angle = column[:, None] * ROPE_BASE ** (-torch.arange(0, width, 2, device=device) / width)
            rotation = (angle.cos(), angle.sin())
        distance = (column[:, None] - column).clamp(min=0) if hstu and self.config.position == "learned" else None
        time_bucket = None
        if hstu and time_RL is not None:
            gap = (time_RL[:, :, None] - time_RL[:, None, :]).clamp(min=0)
            time_bucket = torch.log2(gap.double() + 1).long().clamp(max=TIME_BUCKETS - 1)
        mask = attention_mask(segment_RL) if packed or hstu else None
        return Context(mask, rotation, distance, time_bucket)

    def query(self, hidden: Tensor) -> Tensor:
        """Hidden states as they enter a dot product with `candidates`: unit length over temperature for cosine."""
        if self.config.score == "cosine":
            return F.normalize(hidden, dim=-1) / self.config.temperature
        return hidden

    def candidates(self) -> Tensor:
        """All items as they enter a dot product with `query`, [I, D]; row 0 is padding."""
        if self.config.score == "cosine":
            return F.normalize(self.item.weight, dim=-1)
        return self.item.weight
