"""What an optimizer step minimises: micro-batches of pairs and whole batches, joined with the model's vectors.

Legend: B pairs of a batch, K negatives, M = 1 + K places of a pair (0 is the positive), R rows, C candidate items, N
nodes, D embedding dim.

Terms that are means over pairs are computed for each micro-batch. Terms that compare the nodes of a batch with each
other (contrasts, uniformity) need the whole batch: they are computed once for it, by every process alike, so that
neither the number of micro-batches nor that of processes changes them.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apps.graphrec import losses
from apps.graphrec.columns import Columns, total
from apps.graphrec.config import Config, TrainConfig
from apps.graphrec.dataset import Batch
from apps.graphrec.model import FILTERS, NOISY, GraphRec, Views
from shared import negatives

SMALLEST_SQUARE = 1e-24  # of a product of squared lengths: shorter vectors get no gradient
OWN_COUNT = {"bpr": 1, "softmax": 512, "clcrec": 128}  # negatives where the number is left to the loss


class Plan(NamedTuple):
    """The loss, after everything that is left to it has been decided."""

    loss: str  # bpr, softmax, inbatch, directau or clcrec
    shared: bool  # negatives are shared by a batch
    num_negatives: int
    weights: dict[str, float]  # of the terms of the total: those of pairs first, then those of whole batches


class Part(NamedTuple):
    """A micro-batch of this process."""

    batch: Batch
    replaced: Tensor | None  # [B, M or 1] bool, items replaced by their content (clcrec)
    replaced_shared: Tensor | None  # [K] bool, the same of shared negatives
    share: float  # of all pairs of the step


class Step(NamedTuple):
    """What one optimizer step is made of, for this process."""

    parts: list[Part]
    wholes: list[tuple[Tensor, Tensor]]  # users and items ([B] int64) of each whole batch, where a term needs them
    whole_share: float  # weight of each of them: all processes compute all of them
    noise: torch.Generator | None  # for simgcl and xsimgcl


def check_model(config: Config) -> None:
    """Refuse layers that mean nothing."""
    model = config.model
    if model.model in NOISY and model.layers < 1:
        raise ValueError(f"--model {model.model} adds noise to layers, but --layers is 0; use at least 1")
    if model.model == "clcrec-graph" and model.score != "dot":
        raise ValueError("--model clcrec-graph scores by dot products, as its losses do; leave out --score cosine")
    if model.model == "xsimgcl" and model.contrast_layer > model.layers:
        raise ValueError(
            f"--contrast-layer {model.contrast_layer} is none of the {model.layers} layers; lower it, or raise --layers"
        )


def make_plan(config: Config, sampler: negatives.NegativeSampler) -> Plan:
    """The loss with its negatives and the weights of its terms; refuses what does not fit together."""
    training, kind = config.training, config.model.model
    check_model(config)
    loss = training.loss
    if loss == "auto":
        loss = "clcrec" if kind == "clcrec-graph" else "softmax"
    if kind not in FILTERS and (loss == "clcrec") != (kind == "clcrec-graph"):
        raise ValueError(f"--loss {loss} does not fit --model {kind}: clcrec and clcrec-graph go together")
    shared = training.negatives == "shared" or (training.negatives == "auto" and loss == "softmax")
    count = 0
    if loss in OWN_COUNT and kind not in FILTERS:
        most = sampler.candidates.numel() if shared else sampler.max_negatives
        count = training.num_negatives or max(1, min(OWN_COUNT[loss], most))
        if not shared:
            negatives.require_candidates(sampler, count)
        elif count > most:
            raise ValueError(f"--num-negatives is {count}, but there are {most} items to draw from; lower it")
    if loss == "clcrec":
        weights = {"contrast": training.lr_lambda, "preference": 1 - training.lr_lambda, "reg": training.reg_weight}
    else:
        weights = {"pairs": 1.0} | ({"reg": training.reg_weight} if training.reg_weight else {})
    of_batches = {
        "graph": training.graph_lambda if kind == "clcrec-graph" else 0.0,
        "views": training.contrast_weight if kind in NOISY else 0.0,
        "uniformity": training.gamma if loss == "directau" else 0.0,
    }
    return Plan(loss, shared, count, weights | {name: weight for name, weight in of_batches.items() if weight})


def needs_wholes(plan: Plan) -> bool:
    """Whether a term compares the nodes of a whole batch."""
    return not plan.weights.keys().isdisjoint(("graph", "views", "uniformity"))


def loss_fn(
    model: nn.Module,
    step: Step,
    *,
    training: TrainConfig,
    plan: Plan,
    log_q_I: Tensor | None = None,
    columns: Columns | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss of a step and its terms by name, from one propagation."""
    assert isinstance(model, GraphRec)
    views: Views = model(step.noise)
    if plan.loss == "clcrec":
        of_part = functools.partial(clcrec_terms, model, temperature=training.temperature)
    else:
        of_part = functools.partial(
            pair_terms, model, views, training=training, plan=plan, log_q_I=log_q_I, columns=columns
        )
    if len(step.parts) == 1:
        terms = of_part(step.parts[0]) * step.parts[0].share
    else:  # the scores of one micro-batch exist at a time: they are computed again in backward
        found = [checkpoint(of_part, part, use_reentrant=False, preserve_rng_state=False) for part in step.parts]
        terms = torch.stack([value * part.share for value, part in zip(found, step.parts, strict=True)]).sum(0)
    values = dict(zip(plan.weights, terms.unbind(), strict=False))
    for user_B, item_B in step.wholes:
        for name, value in batch_terms(model, views, user_B, item_B, training=training, plan=plan).items():
            values[name] = values.get(name, 0.0) + value * step.whole_share
    weighted = [weight * values[name] for name, weight in plan.weights.items()]
    return torch.stack(weighted).sum(), values


class Lookup(NamedTuple):
    """The vectors that a micro-batch compares."""

    user_BD: Tensor
    item_RD: Tensor | None  # of the positives, then of the shared negatives; None with negatives of each pair's own
    table_CD: Tensor
    rows: tuple[Tensor, ...]  # of that table: those of the positives, then those of the negatives if there are any


def pair_terms(
    model: GraphRec,
    views: Views,
    part: Part,
    *,
    training: TrainConfig,
    plan: Plan,
    log_q_I: Tensor | None,
    columns: Columns | None,
) -> Tensor:
    """The ranking loss, and the penalty if it has a weight: means over a micro-batch, [1 or 2]."""
    found = lookup(model, views, part.batch)
    ranking = ranking_loss(
        found,
        part.batch,
        training=training,
        plan=plan,
        cosine=model.config.score == "cosine",
        log_q_I=log_q_I,
        columns=columns,
    )
    if "reg" not in plan.weights:
        return ranking.unsqueeze(0)
    if model.config.model == "content":
        penalty = losses.half_square_norm(model.table, part.batch.user)
        penalty = penalty + losses.half_square_norm(found.table_CD, *found.rows)
    else:  # nodes are the same rows of the final vectors and of the table
        penalty = losses.half_square_norm(model.table, part.batch.user, *found.rows)
    if columns is not None:
        (penalty,) = total(columns, penalty)
    return torch.stack([ranking, penalty])


def lookup(model: GraphRec, views: Views, batch: Batch) -> Lookup:
    """The vectors of a micro-batch's users and items."""
    others = batch.shared if batch.shared is not None else batch.negative
    items = [batch.item] if others is None else [batch.item, others.flatten()]
    sizes = [item.numel() for item in items]
    if model.config.model == "content":
        item_C, row_R = model.distinct(torch.cat(items))
        table_CD, user_BD = model.encode_items(item_C), F.embedding(batch.user, views.final_ND)
        item_RD = F.embedding(row_R, table_CD) if batch.negative is None else None
        return Lookup(user_BD, item_RD, table_CD, torch.split(row_R, sizes))
    row_R = torch.cat(items) + model.num_users
    if batch.negative is not None:
        user_BD, item_RD = F.embedding(batch.user, views.final_ND), None
    else:  # one lookup, hence one dense gradient
        user_BD, item_RD = F.embedding(torch.cat([batch.user, row_R]), views.final_ND).tensor_split([sizes[0]])
    return Lookup(user_BD, item_RD, views.final_ND, torch.split(row_R, sizes))


def ranking_loss(
    found: Lookup,
    batch: Batch,
    *,
    training: TrainConfig,
    plan: Plan,
    cosine: bool,
    log_q_I: Tensor | None,
    columns: Columns | None,
) -> Tensor:
    """bpr, softmax, inbatch, or the alignment of directau, the mean over a micro-batch."""
    user_BD, item_RD = found.user_BD, found.item_RD
    if item_RD is None:
        index_BM = torch.cat([found.rows[0].unsqueeze(1), found.rows[1].view(len(user_BD), -1)], dim=1)
        scores_BM = own_scores(user_BD, found.table_CD, index_BM, cosine=cosine, columns=columns)
    elif plan.loss == "directau":
        return losses.alignment(user_BD, item_RD)
    else:
        positive_BD, negative_KD = item_RD.tensor_split([len(user_BD)])
        if plan.loss != "bpr" and columns is None:
            assert batch.shared is not None
            assert batch.excluded is not None
            if cosine:
                user_BD, positive_BD, negative_KD = (F.normalize(x, dim=1) for x in (user_BD, positive_BD, negative_KD))
            return losses.shared_softmax(
                user_BD,
                positive_BD,
                negative_KD,
                batch.excluded,
                temperature=training.temperature,
                bias_B=None if log_q_I is None else -log_q_I[batch.item],
                bias_K=None if log_q_I is None else -log_q_I[batch.shared],
            )
        scores_BM = shared_scores(user_BD, positive_BD, negative_KD, cosine=cosine, columns=columns)
    scores_BM = scores_BM / training.temperature
    of_scores = losses.bpr if plan.loss == "bpr" else losses.softmax
    return of_scores(scores_BM[:, 0], scores_BM[:, 1:], batch.excluded)


def shared_scores(
    user_BD: Tensor, positive_BD: Tensor, negative_KD: Tensor, *, cosine: bool, columns: Columns | None
) -> Tensor:
    """Scores of each pair's positive and of the shared negatives, [B, 1 + K] float32."""
    positive_B = (user_BD * positive_BD).sum(1)
    negative_BK = torch.mm(user_BD, negative_KD.t()).to(positive_B.dtype)
    square_B, square_K = positive_BD.square().sum(1), negative_KD.square().sum(1)
    user_square_B = user_BD.square().sum(1)
    if columns is not None:
        positive_B, negative_BK, square_B, square_K, user_square_B = total(
            columns, positive_B, negative_BK, square_B, square_K, user_square_B
        )
    scores_BM = torch.cat([positive_B.unsqueeze(1), negative_BK], dim=1)
    square_BM = torch.cat([square_B.unsqueeze(1), square_K.expand_as(negative_BK)], dim=1)
    return as_cosine(scores_BM, user_square_B, square_BM) if cosine else scores_BM


def own_scores(user_BD: Tensor, table_CD: Tensor, index_BM: Tensor, *, cosine: bool, columns: Columns | None) -> Tensor:
    """Scores of each pair's own rows of the table, [B, M] float32."""
    scores_BM = losses.picked_scores(user_BD, table_CD, index_BM).to(user_BD.dtype)
    if not cosine and columns is None:
        return scores_BM
    user_square_B, square_C = user_BD.square().sum(1), table_CD.square().sum(1)
    if columns is not None:
        scores_BM, user_square_B, square_C = total(columns, scores_BM, user_square_B, square_C)
    return as_cosine(scores_BM, user_square_B, square_C[index_BM]) if cosine else scores_BM


def as_cosine(scores_BM: Tensor, user_square_B: Tensor, square_BM: Tensor) -> Tensor:
    """Dot products divided by the lengths of both sides; from their squares, which may be sums over processes."""
    return scores_BM * (user_square_B.unsqueeze(1) * square_BM).clamp(min=SMALLEST_SQUARE).rsqrt()


def clcrec_terms(model: GraphRec, part: Part, *, temperature: float) -> Tensor:
    """L1, L2 and R of CLCRec over a micro-batch, [3]."""
    batch, size = part.batch, part.batch.item.numel()
    others = batch.shared if batch.shared is not None else batch.negative
    assert others is not None
    assert part.replaced is not None
    item_C, row_R = model.distinct(torch.cat([batch.item, others.flatten()]))
    content_CD = model.encode_items(item_C)
    id_CD = F.embedding(item_C + model.num_users, model.table)
    user_BD = F.embedding(batch.user, model.table)
    row_B, rows = row_R[:size], row_R[size:]
    if batch.negative is not None:
        row_BM = torch.cat([row_B.unsqueeze(1), rows.view(size, -1)], dim=1)
        parts = losses.clcrec(user_BD, id_CD, content_CD, row_BM, part.replaced, temperature=temperature)
    else:
        assert batch.excluded is not None
        assert part.replaced_shared is not None
        parts = losses.shared_clcrec(
            user_BD,
            id_CD,
            content_CD,
            row_B,
            part.replaced[:, 0],
            rows,
            part.replaced_shared,
            batch.excluded,
            temperature=temperature,
        )
    return torch.stack(parts)


def batch_terms(
    model: GraphRec, views: Views, user_B: Tensor, item_B: Tensor, *, training: TrainConfig, plan: Plan
) -> dict[str, Tensor]:
    """The terms of a whole batch that the plan gives a weight."""
    found = {}
    if "graph" in plan.weights:
        pair = model.user_views(torch.unique(user_B), full=training.graph_view == "full")
        found["graph"] = losses.contrast(*pair, temperature=training.graph_temp)
    if "views" in plan.weights:
        assert views.contrast is not None
        most = training.contrast_nodes or user_B.numel()
        # those of the first pairs, which are in random order
        sides = [torch.unique(user_B[:most]), torch.unique(item_B[:most]) + model.num_users]
        found["views"] = torch.stack(
            [
                losses.contrast(
                    *(F.embedding(node_R, view_ND) for view_ND in views.contrast),
                    temperature=training.contrast_temperature,
                )
                for node_R in sides
            ]
        ).sum()
    if "uniformity" in plan.weights:
        user_BD = F.embedding(user_B, views.final_ND)
        if model.config.model == "content":
            item_C, row_B = model.distinct(item_B)
            table_CD = model.encode_items(item_C)
        else:
            table_CD, row_B = views.final_ND, item_B + model.num_users
        item_BD = F.embedding(row_B, table_CD)
        found["uniformity"] = (losses.uniformity(user_BD) + losses.uniformity(item_BD)) / 2
    return found
