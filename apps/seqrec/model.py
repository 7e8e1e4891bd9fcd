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
from apps.seqrec.features import Features, Tower

ROPE_BASE = 10_000.0
TIME_BUCKETS = 64  # bucket = floor(log2(1 + seconds)): 64 of them cover every int64
DAY_S, WEEK_S = 86_400, 604_800
HARMONICS = 3  # of the day and of the week
ACTIONS = 3  # kinds of actions: exposure, click, conversion
CATALOGUE_ROWS = 1 << 16  # encoded at a time where no gradient is wanted


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


class Moment(nn.Module):
    """A vector of a moment: the logarithm of the pause before it, and the time of day and of the week."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pause = nn.Embedding(TIME_BUCKETS, width)
        self.cycle = nn.Linear(4 * HARMONICS, width)

    def forward(self, pause: Tensor, time: Tensor) -> Tensor:
        """[..., D] of pauses and times in seconds, both [...] int64; times are UTC, as in the data."""
        bucket = torch.log2(pause.clamp(min=0).double() + 1).long().clamp(max=TIME_BUCKETS - 1)
        harmonic = torch.arange(1, HARMONICS + 1, device=time.device)
        phase = torch.cat([(time % period)[..., None] * harmonic / period for period in (DAY_S, WEEK_S)], dim=-1)
        angle = 2 * math.pi * phase.float()
        return self.pause(bucket) + self.cycle(torch.cat([angle.sin(), angle.cos()], dim=-1))


class SeqRec(nn.Module):
    """Item and position embeddings, causal blocks, and scores against the same item embeddings.

    features: what is known of items and users (on the device that the model will be on), None where that is nothing;
    has_actions, has_times: whether events come with them. What the configuration asks for and the data lacks is left
    out.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_items: int,
        max_len: int,
        features: Features | None = None,
        has_actions: bool = False,
        has_times: bool = False,
    ) -> None:
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
        self.num_items = num_items
        width = config.embed_dim
        self.item = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.tower = Tower(features, width) if config.features and features is not None else None
        has_profiles = features is not None and (features.user_sizes or features.list_sizes)
        fronted = config.user_token and self.tower is not None and has_profiles
        self.front = nn.Parameter(torch.zeros(width)) if fronted else None
        tokens = max_len + int(self.front is not None)
        # counted back from the last token, so that "most recent" is the same row for every length
        self.position = nn.Embedding(tokens, width) if config.position == "learned" else None
        kinds = ACTIONS + 1  # 0 is none
        self.action = nn.Embedding(kinds, width, padding_idx=0) if config.action_input and has_actions else None
        self.moment = Moment(width) if config.time_input and has_times else None
        self.next_action = nn.Embedding(kinds, width) if config.next_action and has_actions else None
        self.next_moment = Moment(width) if config.query_time and has_times else None
        conditioned = self.next_action is not None or self.next_moment is not None
        self.condition = nn.Linear(width, 2 * width) if conditioned else None
        self.input_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            HSTUBlock(config, tokens) if config.attention == "hstu" else TransformerBlock(config)
            for _ in range(config.num_blocks)
        )
        self.final_norm = nn.LayerNorm(width) if config.norm_first else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for every matrix, zero for biases, for padding and for the condition of queries; in place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.xavier_normal_(module.weight)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])
        if self.condition is not None:  # until training finds a use for it, a condition changes nothing
            nn.init.zeros_(self.condition.weight)

    def use_features(self, features: Features | None) -> None:
        """Look things up in other tables of the same columns from now on: those of other users and candidates."""
        if self.tower is not None and features is not None:
            families = self.tower.features.embeddings
            self.tower.features = features.with_families(list(families), name="the data").to(self.item.weight.device)

    def vectors(self, row_C: Tensor | None = None) -> Tensor:
        """What tokens and scores are made of, [C, D]: of the rows ([C] int64), or of padding and all items."""
        if self.tower is None:
            return self.item.weight if row_C is None else F.embedding(row_C, self.item.weight, padding_idx=0)
        if row_C is None:
            row_C = torch.arange(self.num_items + 1, device=self.item.weight.device)
        if not torch.is_grad_enabled() and row_C.numel() > CATALOGUE_ROWS:
            return torch.cat([self.vectors(part) for part in torch.split(row_C, CATALOGUE_ROWS)])
        known = self.tower.features.item_id.index_select(0, row_C)
        found = F.embedding(known, self.item.weight, padding_idx=0) + self.tower.rows(row_C)
        return found * (row_C > 0)[:, None]  # padding has none, whatever its features

    def forward(
        self,
        item_RL: Tensor,
        segment_RL: Tensor,
        position_RL: Tensor,
        time_RL: Tensor | None,
        *,
        packed: bool,
        vector_CD: Tensor | None = None,
        action_RL: Tensor | None = None,
        front_B: Tensor | None = None,
        user_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden state after each token, [R, L, D]; what it says about padding is to be ignored.

        item, segment, position: [R, L] int64 as in the batch; time: [R, L] int64 seconds or None. With `packed` False
        every row holds one sequence from column 0 on, so that causality alone keeps padding out. `item` indexes
        `vector` ([C, D], as `vectors` gives them; None: of all items). front: [B] int64, where in the flattened rows
        the front tokens of the users ([B] int64) are.
        """
        x = F.embedding(item_RL, self.item.weight if vector_CD is None else vector_CD, padding_idx=0)
        if front_B is not None:
            assert self.front is not None
            assert self.tower is not None
            assert user_B is not None
            profile_BD = (self.tower.users(user_B) + self.front).to(x.dtype)
            x = x.flatten(0, 1).index_copy(0, front_B, profile_BD).view_as(x)
        x = x * math.sqrt(self.config.embed_dim)
        if self.position is not None:
            x = x + self.position(position_RL)
        if self.action is not None:
            assert action_RL is not None
            x = x + self.action(action_RL)
        if self.moment is not None:
            assert time_RL is not None
            follows = segment_RL[:, 1:] == segment_RL[:, :-1]
            pause_RL = F.pad((time_RL[:, 1:] - time_RL[:, :-1]) * follows, (1, 0))
            moment_RLD = self.moment(pause_RL, time_RL)
            if front_B is not None:  # its time is its target's
                moment_RLD = moment_RLD.flatten(0, 1).index_fill(0, front_B, 0).view_as(moment_RLD)
            x = x + moment_RLD
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

    def query(
        self,
        hidden_ND: Tensor,
        *,
        action_N: Tensor | None = None,
        asked_N: Tensor | None = None,
        pause_N: Tensor | None = None,
    ) -> Tensor:
        """Hidden states as they enter a dot product with `candidates`: unit length over temperature for cosine.

        action: [N] int64, 1 + what is to be done with the next item; asked: [N] int64 seconds, when; pause: since the
        last event. They scale and shift each value of the state, where the configuration has them as a condition.
        """
        if self.condition is not None:
            parts = []
            if self.next_action is not None:
                assert action_N is not None
                parts.append(self.next_action(action_N))
            if self.next_moment is not None:
                assert asked_N is not None
                assert pause_N is not None
                parts.append(self.next_moment(pause_N, asked_N))
            scale_ND, shift_ND = self.condition(sum(parts)).chunk(2, dim=-1)
            hidden_ND = hidden_ND * (1 + scale_ND) + shift_ND
        if self.config.score == "cosine":
            return F.normalize(hidden_ND, dim=-1) / self.config.temperature
        return hidden_ND

    def candidates(self, vector_CD: Tensor | None = None) -> Tensor:
        """Items as they enter a dot product with `query`, [C, D], made of their vectors; None: of all."""
        vector_CD = self.vectors() if vector_CD is None else vector_CD
        return F.normalize(vector_CD, dim=-1) if self.config.score == "cosine" else vector_CD
