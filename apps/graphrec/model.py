"""Embeddings of users and items, propagated, contrasted or encoded from content: tensors in, tensors out.

Legend: U users, I items, N = U + I nodes with the users first, D embedding dim, F content features, R rows, C candidate
items.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.graphrec.config import ModelConfig
from apps.graphrec.graph import Graph, propagate, propagate_noisy
from apps.graphrec.spectral import Filter, Say, fit_bspm, fit_gfcf, low_rank_embeddings, restore_filter
from shared.ranking import Lists, take_rows

NOISY = ("simgcl", "xsimgcl")
PROPAGATED = ("lightgcn", *NOISY)
ENCODED = ("content", "clcrec-graph")
FILTERS = ("gfcf", "bspm")
BSPM_ORDER = 4  # of its Runge-Kutta step, as in the authors' code


class Views(NamedTuple):
    """What the losses of a step see."""

    final_ND: Tensor  # vectors that scores are made of; without the items for `content`, which encodes what it needs
    contrast: tuple[Tensor, Tensor] | None  # two views [N, D] of all nodes (simgcl, xsimgcl)


def normalised_content(parts: Sequence[Tensor]) -> Tensor:
    """The modalities ([I, F_m] float) side by side, [I, F] float32, rows of each of length 1, or zero."""
    tiny = torch.finfo(torch.float32).tiny
    # rows are divided by their largest value first, so that no square over- or underflows
    scaled = [part.float() / part.float().abs().amax(1, keepdim=True).clamp(min=tiny) for part in parts]
    return torch.cat([F.normalize(part, dim=1) for part in scaled], dim=1)


class GraphRec(nn.Module):
    """A table of embeddings and what makes vectors of it: nothing (mf), the graph, or an encoder of content.

    Graph and content are data: buffers that checkpoints leave out.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        graph: Graph,
        kernel: str = "auto",
        first_ND: Tensor | None = None,
        content_IF: Tensor | None = None,
        is_cold_I: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.kernel = kernel
        self.num_users = graph.num_users
        self.graph_ptr: Tensor
        self.graph_column: Tensor
        self.graph_weight: Tensor
        self.is_cold: Tensor | None
        self.register_buffer("graph_ptr", graph.ptr, persistent=False)
        self.register_buffer("graph_column", graph.column, persistent=False)
        self.register_buffer("graph_weight", graph.weight, persistent=False)
        self.register_buffer("is_cold", is_cold_I, persistent=False)
        if first_ND is None:
            first_ND = random_embeddings(config, graph.num_nodes)
        self.content: Tensor  # only for models that encode it
        if config.model in ENCODED:
            assert content_IF is not None
            self.register_buffer("content", content_IF, persistent=False)
            self.hidden = nn.Linear(content_IF.shape[1], config.hidden_dim)
            self.output = nn.Linear(config.hidden_dim, config.embed_dim)
        # items of the model `content` have no embedding
        self.table = nn.Parameter(first_ND[: self.num_users].clone() if config.model == "content" else first_ND)

    @property
    def graph(self) -> Graph:
        return Graph(self.graph_ptr, self.graph_column, self.graph_weight, self.num_users)

    @property
    def num_items(self) -> int:
        return self.graph.num_nodes - self.num_users

    def forward(self, noise: torch.Generator | None = None) -> Views:
        """The views of a training step, from one propagation (simgcl: three); `noise` is for simgcl and xsimgcl."""
        kind = self.config.model
        if kind not in NOISY or noise is None:
            return Views(self._clean(), None)
        first = self._noisy(noise)
        if kind == "simgcl":
            return Views(self._clean(), (first[0], self._noisy(noise)[0]))
        return Views(first[0], first)

    def _clean(self) -> Tensor:
        """Vectors of all nodes without noise, [N, D]."""
        config = self.config
        if config.model not in PROPAGATED:
            return self.table
        combine = "mean" if config.model in NOISY else config.combine
        mean_ND = propagate(
            self.graph,
            self.table,
            layers=config.layers,
            combine=combine,
            low_precision=config.bf16_rows,
            kernel=self.kernel,
        )
        if config.model not in NOISY:
            return mean_ND
        return ((config.layers + 1) * mean_ND - self.table) / config.layers  # these two leave layer 0 out

    def _noisy(self, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        return propagate_noisy(
            self.graph,
            self.table,
            layers=config.layers,
            eps=config.noise_eps,
            generator=noise,
            contrast_layer=config.contrast_layer if config.model == "xsimgcl" else 1,
            low_precision=config.bf16_rows,
            kernel=self.kernel,
        )

    def encode(self, content_CF: Tensor) -> Tensor:
        """Vectors of items from their normalised content, [C, D]: the content encoder of CLCRec."""
        hidden = F.leaky_relu(self.hidden(content_CF))
        encoded: Tensor = self.output(hidden)
        return encoded

    def encode_items(self, item_C: Tensor) -> Tensor:
        """Vectors of items of the data from their content, [C, D], in the dtype of the table."""
        content = self.content if item_C.numel() == self.num_items else self.content.index_select(0, item_C)
        return self.encode(content).to(self.table.dtype)

    def distinct(self, item_R: Tensor) -> tuple[Tensor, Tensor]:
        """(the distinct items of `item_R`, or all where those are fewer than R, and the row of each among them)."""
        if item_R.numel() >= self.num_items:
            return torch.arange(self.num_items, device=item_R.device), item_R
        item_C, row_R = torch.unique(item_R, return_inverse=True)  # sync on CUDA: their number is a shape
        return item_C, row_R

    def final(self) -> tuple[Tensor, Tensor]:
        """The vectors that evaluation compares: users [U, D] and items [I, D]."""
        clean = self._clean()
        user_UD, item_ID = clean[: self.num_users], clean[self.num_users :]
        if self.config.model == "content":
            item_ID = self.encode_items(torch.arange(self.num_items))
        elif self.config.model == "clcrec-graph" and self.is_cold is not None:
            cold = self.is_cold.nonzero().squeeze(1)
            item_ID = item_ID.index_copy(0, cold, self.encode_items(cold))
        return user_UD, item_ID

    def user_views(self, user_R: Tensor, *, full: bool) -> tuple[Tensor, Tensor]:
        """Two views of users, [R, D] each, from the embeddings of their training items alone (clcrec-graph).

        The mean n_u over the user's items of their embeddings, and the user's own embedding; or, with `full`, n_u first
        and c_u second: the mean over the user's items of the mean embedding of the item's users. Only what the given
        users need is computed.
        """
        lists = Lists(self.graph_ptr, self.graph_column)
        items = take_rows(lists, user_R)
        mean_RD = bag_mean(self.table, items)
        if not full:
            return F.embedding(user_R, self.table), mean_RD
        node_C, row = torch.unique(items.item, return_inverse=True)  # sync on CUDA
        users_CD = bag_mean(self.table, take_rows(lists, node_C.long()))
        return mean_RD, bag_mean(users_CD, Lists(items.ptr, row))


def bag_mean(table_ND: Tensor, lists: Lists) -> Tensor:
    """The mean of the table's rows in each list, zero for an empty one; differentiable in the table."""
    index = lists.item.long()
    return F.embedding_bag(index, table_ND, lists.ptr.long(), mode="mean", include_last_offset=True)


def random_embeddings(config: ModelConfig, num_nodes: int) -> Tensor:
    """First embeddings from torch's generator: normal as LightGCN's, or Xavier over the whole table as CLCRec's."""
    std = config.init_scale if config.init == "normal" else math.sqrt(2.0 / (num_nodes + config.embed_dim))
    return torch.empty(num_nodes, config.embed_dim).normal_(std=std)


def spectral_embeddings(graph: Graph, config: ModelConfig, *, seed: int, kernel: str) -> Tensor:
    """First embeddings [N, D] whose dot products rank like the low-pass filter, of the size `init_scale`."""
    most = min(graph.num_users, graph.num_nodes - graph.num_users)
    if config.embed_dim > most:
        raise ValueError(
            f"--init spectral gives at most {most} columns here, as many as there are users or items, but --embed-dim "
            f"is {config.embed_dim}; lower it, or use --init normal"
        )
    halves = low_rank_embeddings(
        graph,
        config.embed_dim,
        scale=config.init_scale,
        iterations=config.filter_iterations,
        seed=seed,
        kernel=kernel,
    )
    return torch.cat(halves)


class GraphFilter(nn.Module):
    """GF-CF or BSPM: what fitting finds is its state, so that it is saved and loaded like a trained model."""

    def __init__(self, config: ModelConfig, *, graph: Graph, kernel: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.graph = graph
        self.kernel = kernel
        num_items = graph.num_nodes - graph.num_users
        rank = min(config.filter_rank, graph.num_users, num_items)
        count = 1 if config.model == "gfcf" else 1 + BSPM_ORDER
        device = graph.weight.device
        self.register_buffer("left", torch.zeros(num_items, rank, device=device))
        self.register_buffer("right", torch.zeros(num_items, rank, device=device))
        self.register_buffer("powers", torch.zeros(count, dtype=torch.float64, device=device))

    def fit(self, *, seed: int, say: Say = lambda line: None) -> None:
        """Find the filter of the graph, in place."""
        config = self.config
        settings: dict[str, Any] = {
            "rank": config.filter_rank,
            "iterations": config.filter_iterations,
            "seed": seed,
            "kernel": self.kernel,
            "say": say,
        }
        if config.model == "gfcf":
            found = fit_gfcf(self.graph, alpha=config.filter_alpha, **settings)
        else:
            found = fit_bspm(self.graph, beta=config.filter_beta, step=config.filter_step, order=BSPM_ORDER, **settings)
        self.load_state_dict(found.tensors())

    def filter(self) -> Filter:
        """The filter, ready to score."""
        return restore_filter(self.state_dict(), self.graph, kernel=self.kernel)
