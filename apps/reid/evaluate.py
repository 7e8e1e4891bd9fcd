"""Retrieval of people: features made once each, ranks of the right gallery images, and means over lists of queries.

Legend: N images of the data, C captions, R images that are encoded, X captions that are encoded, T tokens, E embedding
dim, G gallery images, Q queries of a list, B queries of a block, K modalities of a query, P gallery images of a block's
people (padded to the longest), W bins of a row.

Protocol (ReID5o, Zuo et al. 2025; camera rule of Market-1501, Zheng et al. 2015): the gallery is ranked by falling
cosine. A query's average precision is the mean of precision at its right images, over all of them; Rk is whether one
is among the first k; INP is the number of right ones divided by the rank of the last. A list's mAP, Rk and mINP are
means over its queries, MM-k those over the lists of k modalities, and MM is the mean of MM-1 to MM-4. Queries without
a right image enter no mean. A wrong image with the score of a right one stands before it, so that a collapsed model
cannot look good; among right ones the order is of no consequence.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.reid.augment import centre_crop
from apps.reid.clip import Encoded
from apps.reid.config import Config
from apps.reid.dataset import MODALITIES, QUERY_LISTS, RGB, TEXT, People, Queries, Retrieval, Stage
from apps.reid.model import ReID
from apps.reid.rerank import ScoreOf, rerank_scores
from shared.amp import evaluation_mode
from shared.device import to_device
from shared.files import read_pack, tensor_crc32, write_pack

CHUNK = 128  # images or captions encoded at a time
QUERIES_PER_CHUNK = 1024  # whose features are fused at a time
TOKEN_QUERIES_PER_CHUNK = 32  # the same where tokens are fused, hundreds of each query
TOKEN_BYTES = 2 << 30  # of tokens kept on the host; where they are more, each query's are made when it is its turn
RERANKED = " re-ranked"  # behind the name of a list or mean: "MM re-ranked/mAP"
PIXELS = (32, 16)  # size of the baseline's images
CACHE_KIND = "reid-features"

_BINS = 1024  # between the scores of a row's worst and best right image
_BYTES_PER_SCORE = 48  # of a block, where every score needs a closer look

OnImages = Callable[[int], None]


class Encodings(NamedTuple):
    """Features of images and captions; those that were not asked for have the place -1."""

    image_place: Tensor  # [N] int64 on the host
    caption_place: Tensor  # [C] int64 on the host
    image: Tensor  # [R, E] float32 on the device, in the order asked for
    caption: Tensor  # [X, E] float32 on the device, likewise
    token_place: Tensor  # [N] int64 on the host, of images in `image_token`
    image_token: Tensor | None  # [R less RGB, T, E] on the host, where they are fused and fit into TOKEN_BYTES
    caption_token: Tensor | None  # [X, T, E] on the host


class Truth(NamedTuple):
    """Which gallery images are right for the queries of a list, and which do not count."""

    column: Tensor  # [G] int64, the gallery by identity
    camera: Tensor  # [G] int64, of `column`
    start: Tensor  # [Q] int64, the query's person is column[start : end]
    end: Tensor  # [Q] int64
    own_camera: Tensor  # [Q] int64: images of it and of the query's person do not count; -1 for none


class Ranked(NamedTuple):
    """A query and the first images of the gallery as they were ranked for it."""

    modalities: tuple[int, ...]
    item: tuple[int, ...]  # one per modality: rows of images; where it is text, places of captions
    identity: int
    gallery: tuple[int, ...]  # rows of images
    score: tuple[float, ...]
    is_right: tuple[bool, ...]


# ---------------------------------------------------------------------------------------------------------------------
# What is searched for


def retrieval_of(people: People, stage: Stage) -> Retrieval | None:
    """What is searched for in that part of the data; None where the data have no such part."""
    return people.valid if stage == "valid" else people.test


def held_out(people: People, stage: Stage) -> Retrieval:
    """Gallery and queries of that stage; raises ValueError where there is nothing to search for or in."""
    retrieval = retrieval_of(people, stage)
    if retrieval is None:
        repair = "hold some out with --val-share" if stage == "valid" else "use data with a test part"
        raise ValueError(f"{people.name} has nobody for {stage}, so that nothing can be measured; {repair}")
    if not retrieval.gallery.numel():
        raise ValueError(f"the {stage} gallery of {people.name} is empty; add RGB images of the people to search for")
    return retrieval


def query_lists(people: People, stage: Stage, config: Config) -> dict[str, Queries]:
    """The lists whose modalities are all used, by name; raises ValueError where there is none."""
    used = {MODALITIES.index(name) for name in config.data.modalities} | {RGB}
    every = held_out(people, stage).queries
    chosen = {name: queries for name, queries in every.items() if used.issuperset(queries.modalities)}
    if not any(queries.identity.numel() for queries in chosen.values()):
        raise ValueError(
            f"{people.name} has no {stage} query of {', '.join(config.data.modalities)}; its lists are "
            f"{', '.join(every) or 'none'}: use more --modalities or other data"
        )
    return chosen


def uses_camera_rule(retrieval: Retrieval, config: Config) -> bool:
    """Whether gallery images of the query's own person and camera do not count."""
    choice = config.training.camera_rule
    return retrieval.camera_rule if choice == "auto" else choice == "on"


def make_truth(people: People, retrieval: Retrieval, queries: Queries, *, camera_rule: bool) -> Truth:
    """Who is right for the queries; a query's camera is that of its main image, and captions have none."""
    identity, order = people.identity[retrieval.gallery].sort(stable=True)
    own_camera = torch.full_like(queries.identity, -1)
    if camera_rule and queries.modalities[0] != TEXT:
        own_camera = people.camera[queries.item[:, 0]]
    return Truth(
        order,
        people.camera[retrieval.gallery[order]],
        torch.searchsorted(identity, queries.identity),
        torch.searchsorted(identity, queries.identity, right=True),
        own_camera,
    )


def own_images(truth: Truth, rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gallery columns of the queries' people, which of them are right, and which do not count; each [B, P]."""
    start_B1, end_B1 = truth.start[rows_B, None], truth.end[rows_B, None]
    longest = int((end_B1 - start_B1).max()) if rows_B.numel() else 0
    place_BP = start_B1 + torch.arange(longest)
    is_own_BP = place_BP < end_B1
    place_BP = place_BP.clamp(max=truth.column.numel() - 1)
    camera_B1 = truth.own_camera[rows_B, None]
    is_left_out_BP = is_own_BP & (camera_B1 >= 0) & (truth.camera[place_BP] == camera_B1)
    return truth.column[place_BP], is_own_BP & ~is_left_out_BP, is_left_out_BP


def count_own(truth: Truth) -> tuple[Tensor, Tensor]:
    """How many gallery images are right for each query, and how many do not count; each [Q] int64."""
    right, left_out = [], []
    for rows_B in torch.split(torch.arange(truth.start.numel()), QUERIES_PER_CHUNK):
        _, is_right_BP, is_left_out_BP = own_images(truth, rows_B)
        right.append(is_right_BP.sum(1))
        left_out.append(is_left_out_BP.sum(1))
    return torch.cat(right), torch.cat(left_out)


def protocol_text(people: People, stage: Stage, config: Config) -> str:
    """What a metric of `evaluate` means, in a sentence."""
    retrieval = held_out(people, stage)
    gallery, lists = retrieval.gallery, query_lists(people, stage, config)
    camera_rule = uses_camera_rule(retrieval, config)
    num_queries = num_lost = 0
    for queries in lists.values():
        truth = make_truth(people, retrieval, queries, camera_rule=camera_rule)
        num_queries += queries.identity.numel()
        num_lost += int((count_own(truth)[0] == 0).sum())
    lost = f" ({num_lost:,} without a right image left out)" if num_lost else ""
    rule = "images of the query's person and camera do not count" if camera_rule else "no camera rule"
    modes = list(modes_of(lists))
    means = f", MM the mean of {', '.join(modes)}" if len(modes) > 1 else ", MM the mean of the lists"
    num_people = torch.unique(people.identity[gallery]).numel()
    return (
        f"{stage} people, cosine, full ranking of {gallery.numel():,} RGB images of {num_people:,} people; "
        f"{len(lists)} lists, {num_queries:,} queries{lost}; "
        f"{rule}; mean precision at all right images, ties against the model{means}; {retrieval.rule}; "
        f"split: {people.split}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Features


def needed_items(people: People, stage: Stage, config: Config, *, only: str | None = None) -> tuple[Tensor, Tensor]:
    """Every image ([R] rows) and every caption ([X] places) of gallery and lists, once.

    only: a list, where the others are not wanted.
    """
    image, caption = [held_out(people, stage).gallery], [torch.empty(0, dtype=torch.int64)]
    for name, queries in query_lists(people, stage, config).items():
        if only in (None, name):
            for item_Q, modality in zip(queries.item.unbind(1), queries.modalities, strict=True):
                (caption if modality == TEXT else image).append(item_Q)
    return torch.unique(torch.cat(image)), torch.unique(torch.cat(caption))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def encode_images(model: ReID, people: People, row_B: Tensor) -> Encoded:
    """Features and tokens of images, seen in the middle of what is stored."""
    device = device_of(model)
    image = centre_crop(people.images.load(row_B), people.images.frame[:2]).contiguous()
    return model.encode_images(to_device(image, device), to_device(people.modality[row_B], device))


def encode_captions(model: ReID, token_CL: Tensor, place_B: Tensor) -> Encoded:
    """Features and tokens of captions."""
    return model.encode_texts(to_device(token_CL[place_B].long(), device_of(model)))


def fuses_tokens(model: ReID, config: Config) -> bool:
    """Whether queries of several modalities are made of tokens, and not of features."""
    return config.model.fusion == "tokens" and any(len(subset) > 1 for subset in model.subsets)


@torch.no_grad()
def encode_people(
    model: ReID,
    people: People,
    row_R: Tensor,
    place_X: Tensor,
    token_CL: Tensor,
    *,
    config: Config,
    cache: Path | None = None,
    on_images: OnImages = lambda done: None,
) -> Encodings:
    """Features of these images and captions (`needed_items`), each encoded once; all of them on the model's device.

    token_CL: the tokens of all captions. cache: a folder in which features are kept and found again, for the very same
    weights, settings, data and items. `on_images` is called between chunks with the number of images and captions done.
    """
    image_place = torch.full((people.num_images,), -1).index_copy(0, row_R, torch.arange(row_R.numel()))
    caption_place = torch.full((len(people.captions),), -1).index_copy(0, place_X, torch.arange(place_X.numel()))
    file = (
        None
        if cache is None
        else cache / f"{features_key(model, people, row_R, place_X, token_CL, config)}.safetensors"
    )
    if file is not None and file.is_file():
        found = to_device(tuple(read_pack(file, kind=CACHE_KIND, verify=True)[0].values()), device_of(model))
        on_images(row_R.numel() + place_X.numel())
        return Encodings(image_place, caption_place, found[0], found[1], image_place, None, None)
    has_tokens = fuses_tokens(model, config)
    is_rgb_R = people.modality[row_R] == RGB  # these are never fused: they come last, and their tokens are not kept
    order_R = is_rgb_R.int().argsort(stable=True)
    token_place = torch.full((people.num_images,), -1).index_copy(0, row_R[order_R], torch.arange(row_R.numel()))
    queries = int((~is_rgb_R).sum()) if has_tokens else 0
    with evaluation_mode(model):
        image, image_token = gathered(
            lambda part: encode_images(model, people, part), row_R[order_R], queries, TOKEN_BYTES, on_images
        )
        left = TOKEN_BYTES - (0 if image_token is None else image_token.nbytes)
        caption, caption_token = gathered(
            lambda part: encode_captions(model, token_CL, part),
            place_X,
            place_X.numel() if has_tokens else 0,
            left,
            lambda done: on_images(row_R.numel() + done),
        )
    image, caption = (part if part.numel() else part.new_empty(0, config.model.embed_dim) for part in (image, caption))
    image = image[order_R.argsort().to(image.device)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_pack(file, {"image": image, "caption": caption}, {"kind": CACHE_KIND, "fingerprint": people.fingerprint})
    return Encodings(image_place, caption_place, image, caption, token_place, image_token, caption_token)


def gathered(
    encode: Callable[[Tensor], Encoded], item_R: Tensor, num_tokens: int, budget: int, on_done: OnImages
) -> tuple[Tensor, Tensor | None]:
    """Features of all items, [R, E], and tokens of the first `num_tokens` on the host; None for more than `budget`."""
    features: list[Tensor] = []
    token = None
    for begin in range(0, item_R.numel(), CHUNK):
        encoded = encode(item_R[begin : begin + CHUNK])
        features.append(encoded.feature.float())
        if begin == 0 and 0 < num_tokens * encoded.token[0].numel() * 4 <= budget:
            token = torch.empty(num_tokens, *encoded.token.shape[1:])
        if token is not None and begin < num_tokens:
            token[begin : begin + CHUNK] = encoded.token[: num_tokens - begin]
        on_done(begin + len(encoded.feature))
    feature_RE = torch.cat(features) if features else torch.empty(0)
    if not bool(feature_RE.isfinite().all()):  # sync
        raise ValueError(
            "some features of the model are not finite, so that nothing can be ranked by them; take an earlier "
            "checkpoint, or train with a smaller --lr or in fp32"
        )
    return feature_RE, token


def features_key(model: ReID, people: People, row_R: Tensor, place_X: Tensor, token_CL: Tensor, config: Config) -> str:
    """What features are a function of, 32 hex digits: weights and settings of the model, data, and items."""
    weights = [
        [name, str(value.dtype), [*value.shape], tensor_crc32(value)] for name, value in model.state_dict().items()
    ]
    items = [[item.numel(), tensor_crc32(item)] for item in (row_R, place_X, token_CL)]
    content = [weights, asdict(config.model), people.fingerprint, [*people.images.frame], items]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def query_features(
    model: ReID, people: People, encodings: Encodings, queries: Queries, token_CL: Tensor, *, config: Config
) -> Tensor:
    """Unit vectors of a list's queries, [Q, E]; those of several modalities are fused some at a time."""
    needs_tokens = len(queries.modalities) > 1 and fuses_tokens(model, config)

    def part_of(modality: int, item_B: Tensor) -> Encoded:
        is_text = modality == TEXT
        place_B = (encodings.caption_place if is_text else encodings.image_place)[item_B]
        feature_BE = (encodings.caption if is_text else encodings.image)[place_B.to(encodings.image.device)]
        if not needs_tokens:
            return Encoded(feature_BE, feature_BE[:, None])  # tokens are not looked at
        token = encodings.caption_token if is_text else encodings.image_token
        if token is not None:
            kept_B = place_B if is_text else encodings.token_place[item_B]
            return Encoded(feature_BE, token[kept_B].to(feature_BE.device))
        return encode_captions(model, token_CL, item_B) if is_text else encode_images(model, people, item_B)

    found = []
    size = TOKEN_QUERIES_PER_CHUNK if needs_tokens else QUERIES_PER_CHUNK
    with evaluation_mode(model):
        for item_BK in torch.split(queries.item, size):
            columns = zip(queries.modalities, item_BK.unbind(1), strict=True)
            found.append(model.fuse(queries.modalities, [part_of(modality, item_B) for modality, item_B in columns]))
    return F.normalize(torch.cat(found).float(), dim=1)


def gallery_features(encodings: Encodings, retrieval: Retrieval) -> Tensor:
    """Unit vectors of the gallery, [G, E]."""
    place_G = encodings.image_place[retrieval.gallery]
    return F.normalize(encodings.image[place_G.to(encodings.image.device)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def cosine_scores(query_QE: Tensor, gallery_GE: Tensor) -> ScoreOf:
    """Cosines of unit vectors, computed when rows are asked for."""

    def score_of(rows_B: Tensor) -> Tensor:
        query_BE = query_QE[rows_B.to(query_QE.device)]
        if len(query_BE) == 1:  # a product of a vector adds up differently in every column
            return (query_BE.expand(2, -1) @ gallery_GE.T)[:1]
        return query_BE @ gallery_GE.T

    return score_of


def count_not_below(score_BG: Tensor, value_BP: Tensor, count_B: Tensor) -> Tensor:
    """How many scores of a row are not below each of its values, [B, P] int64, exactly; nothing is sorted.

    value_BP: rising; the first count_B (one at least) of a row are looked at, and those behind them must be larger
    than any score. Scores are dealt into bins that are as wide as each other between a row's first and last value. In
    bins above a value's every score counts; only those in a bin with a value are compared, which are few unless scores
    tie. A full sort is several times slower, above all with the indices that torch.sort always makes.
    """
    num_rows, width = value_BP.shape
    low_B1, high_B1 = value_BP[:, :1], value_BP.gather(1, count_B[:, None] - 1)
    scale_B1 = _BINS / (high_B1 - low_B1).clamp_(min=1e-6)
    num_bins = _BINS + 2
    row_B1 = torch.arange(num_rows, dtype=torch.int32, device=score_BG.device)[:, None]

    def cells(value: Tensor) -> Tensor:
        """The bin of every value, those of all rows behind one another; rounding cannot swap two values."""
        bins = ((value - low_B1) * scale_B1).clamp_(-1, _BINS).add_(1).to(torch.int32)
        return bins.add_(row_B1 * num_bins).view(-1)

    cell, value_cell = cells(score_BG), cells(value_BP)
    in_cell = torch.bincount(cell, minlength=num_rows * num_bins).view(num_rows, num_bins)
    above = (in_cell.flip(1).cumsum(1).flip(1) - in_cell).view(-1)
    values_in_cell = torch.bincount(value_cell, minlength=num_rows * num_bins)
    found = above[value_cell.long()]
    close = (values_in_cell > 0).index_select(0, cell).nonzero().squeeze(1)  # sync on CUDA
    score, cell = score_BG.reshape(-1)[close], cell[close].long()
    value = value_BP.reshape(-1)
    end = values_in_cell.cumsum(0)[cell]  # values of all rows, P each, rise with the cell
    place = end - values_in_cell[cell]
    while place.numel():  # sync on CUDA; once per value in the fullest cell
        is_above = score >= value[place]
        score, place, end = score[is_above], place[is_above], end[is_above]
        found += torch.bincount(place, minlength=found.numel())
        place = place + 1
        goes_on = place < end
        score, place, end = score[goes_on], place[goes_on], end[goes_on]
    return found.view(num_rows, width)


def right_ranks(score_BG: Tensor, truth: Truth, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks of a row's right images, falling, [B, P] int64, and how many there are ([B], one at least).

    Images that do not count are not there for the ranks; the row's ranks behind the last are of no meaning.
    """
    device = score_BG.device
    column_BP, is_right_BP, is_left_out_BP = to_device(own_images(truth, rows_B), device)
    own_BP = score_BG.gather(1, column_BP)
    count_B = is_right_BP.sum(1)
    right_BP = own_BP.masked_fill(~is_right_BP, torch.inf).sort(dim=1).values
    own_BP = own_BP.masked_fill_(~(is_right_BP | is_left_out_BP), torch.inf).sort(dim=1).values
    own_not_below_BP = (is_right_BP | is_left_out_BP).sum(1, keepdim=True) - torch.searchsorted(own_BP, right_BP)
    wrong_BP = count_not_below(score_BG, right_BP, count_B) - own_not_below_BP
    place_P = torch.arange(right_BP.shape[1], device=device)
    return wrong_BP + count_B[:, None] - place_P, count_B


def list_metrics(score_of: ScoreOf, truth: Truth, *, ks: Sequence[int], budget_bytes: int) -> dict[str, float]:
    """mAP, R1 and so on, and mINP of a list, from scores of blocks of rows; one query at least has a right image."""
    num_gallery = truth.column.numel()
    rows_Q = (count_own(truth)[0] > 0).nonzero().squeeze(1)
    names = ("mAP", *(f"R{k}" for k in ks), "mINP")
    total = torch.zeros(len(names), dtype=torch.float64)
    for rows_B in torch.split(rows_Q, max(1, budget_bytes // (_BYTES_PER_SCORE * num_gallery))):
        rank_BP, count_B = right_ranks(score_of(rows_B), truth, rows_B)
        count_B1 = count_B[:, None]
        hits_BP = (count_B1 - torch.arange(rank_BP.shape[1], device=rank_BP.device)).double()  # up to that rank
        precision_B = (hits_BP / rank_BP).masked_fill_(hits_BP < 1, 0).sum(1) / count_B
        first_B = rank_BP.gather(1, count_B1 - 1).squeeze(1)
        reached = [(first_B <= k).double() for k in ks]
        total += torch.stack([precision_B, *reached, count_B / rank_BP[:, 0].double()]).sum(1).cpu()  # sync
    return dict(zip(names, (total / rows_Q.numel()).tolist(), strict=True))


def modes_of(names: Sequence[str] | Mapping[str, object]) -> dict[str, list[str]]:
    """The lists of each number of modalities there is: "MM-1": ["NIR", ...] and so on."""
    modes: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.count("+")):
        if name in QUERY_LISTS:
            modes.setdefault(f"MM-{len(QUERY_LISTS[name])}", []).append(name)
    return modes


def with_means(by_list: Mapping[str, Mapping[str, float]], *, suffix: str = "") -> dict[str, float]:
    """MM, MM-1 and so on, then every list: "MM/mAP", "NIR+SK/R1"; `suffix` stands behind each name.

    MM is the mean of the modes there are, each the mean of its lists; of lists that are none of the benchmark's, the
    mean of the lists.
    """
    modes = {mode: mean_metrics([by_list[name] for name in names]) for mode, names in modes_of(by_list).items()}
    rows = {"MM": mean_metrics([*(modes or by_list).values()])} | modes | dict(by_list)
    return {f"{row}{suffix}/{name}": value for row, values in rows.items() for name, value in values.items()}


def mean_metrics(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric."""
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def metrics_by_list(
    people: People, stage: Stage, config: Config, scores_of: Callable[[Queries], Mapping[str, ScoreOf]]
) -> dict[str, float]:
    """The metrics of every list of which a query has a right image, and their means, for each way to score a list.

    `scores_of` names ways by what stands behind a list's name. Raises ValueError where no list has a right image.
    """
    retrieval, training = held_out(people, stage), config.training
    camera_rule = uses_camera_rule(retrieval, config)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, queries in query_lists(people, stage, config).items():
        truth = make_truth(people, retrieval, queries, camera_rule=camera_rule)
        if not bool((count_own(truth)[0] > 0).any()):
            continue
        for suffix, score_of in scores_of(queries).items():
            values = list_metrics(score_of, truth, ks=training.ks, budget_bytes=training.memory_mib << 20)
            found.setdefault(suffix, {})[name] = values
    if not found:
        raise ValueError(
            f"no {stage} query of {people.name} has a right image in the gallery"
            f"{' that another camera took' if camera_rule else ''}; check that queries and gallery name people alike"
            f"{', or use --camera-rule off' if camera_rule else ''}"
        )
    means = [with_means(by_list, suffix=suffix) for suffix, by_list in found.items()]
    return {name: value for values in means for name, value in values.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    people: People,
    stage: Stage,
    *,
    config: Config,
    token_CL: Tensor,
    cache: Path | None = None,
    rerank: bool = False,
    on_images: OnImages = lambda done: None,
) -> dict[str, float]:
    """mAP, R1 and so on, and mINP: "MM/mAP", "MM-1/R1", ..., then by list, "NIR/mAP", "NIR+SK/mINP", ....

    With `rerank` the same of re-ranked lists follows: "MM re-ranked/mAP" and so on. token_CL: tokens of all captions.
    cache: a folder that keeps features. `on_images` is called between chunks and lists with the number of images and
    captions encoded.
    """
    assert isinstance(model, ReID)
    retrieval = held_out(people, stage)
    row_R, place_X = needed_items(people, stage, config)
    encodings = encode_people(model, people, row_R, place_X, token_CL, config=config, cache=cache, on_images=on_images)
    gallery_GE = gallery_features(encodings, retrieval)

    def scores_of(queries: Queries) -> dict[str, ScoreOf]:
        on_images(row_R.numel() + place_X.numel())
        query_QE = query_features(model, people, encodings, queries, token_CL, config=config)
        found = {"": cosine_scores(query_QE, gallery_GE)}
        return found | {RERANKED: reranked_scores(query_QE, gallery_GE, config)} if rerank else found

    return metrics_by_list(people, stage, config, scores_of)


def reranked_scores(query_QE: Tensor, gallery_GE: Tensor, config: Config) -> ScoreOf:
    """Re-ranked scores as the configuration says."""
    training = config.training
    return rerank_scores(
        query_QE,
        gallery_GE,
        k1=training.rerank_k1,
        k2=training.rerank_k2,
        lambda_=training.rerank_lambda,
        budget_bytes=training.memory_mib << 20,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Baselines


@torch.no_grad()
def baselines(people: People, stage: Stage, config: Config) -> dict[str, dict[str, float]]:
    """What needs no training, under the same protocol: metrics by name of the baseline.

    "pixels" compares small images; of a query it takes the images, and where there are only captions, it guesses.
    "chance" guesses: its figures are the expected ones of a random order, exactly.
    """
    retrieval, ks = held_out(people, stage), config.training.ks
    row_R, _ = needed_items(people, stage, config)
    place_N = torch.full((people.num_images,), -1).index_copy(0, row_R, torch.arange(row_R.numel()))
    pixel_RE = torch.cat([pixel_vectors(people, part) for part in torch.split(row_R, CHUNK)])
    camera_rule = uses_camera_rule(retrieval, config)
    guessed, compared = {}, {}
    for name, queries in query_lists(people, stage, config).items():
        truth = make_truth(people, retrieval, queries, camera_rule=camera_rule)
        right_Q, left_out_Q = count_own(truth)
        if not bool((right_Q > 0).any()):
            continue
        guessed[name] = compared[name] = chance(retrieval.gallery.numel() - left_out_Q, right_Q, ks=ks)
        columns = [column for column, modality in enumerate(queries.modalities) if modality != TEXT]
        if columns:
            query_QE = F.normalize(sum_of([pixel_RE[place_N[queries.item[:, column]]] for column in columns]), dim=1)
            score_of = cosine_scores(query_QE, pixel_RE[place_N[retrieval.gallery]])
            compared[name] = list_metrics(score_of, truth, ks=ks, budget_bytes=config.training.memory_mib << 20)
    return {"pixels": with_means(compared), "chance": with_means(guessed)}


def sum_of(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return torch.stack(list(vectors)).sum(0)


def pixel_vectors(people: People, row_B: Tensor) -> Tensor:
    """Unit vectors of the colours of small images, less each image's mean; [B, E]."""
    image = centre_crop(people.images.load(row_B), people.images.frame[:2]).float()
    small = F.interpolate(image, PIXELS, mode="bilinear", antialias=True)
    return F.normalize((small - small.mean((1, 2, 3), keepdim=True)).flatten(1), dim=1)


def chance(num_counted_Q: Tensor, num_right_Q: Tensor, *, ks: Sequence[int]) -> dict[str, float]:
    """Expected metrics of a random order, of queries with so many images that count and so many right ones among them.

    With n images of which m are right, rank i holds a right one with probability m / n, and of the i - 1 before it then
    (i - 1)(m - 1) / (n - 1) are right ones on average. No right one is among the first k with probability
    C(n - m, k) / C(n, k), and the last one has rank i with probability C(i - 1, m - 1) / C(n, m).
    """
    has_any_Q = num_right_Q > 0
    pair_QV = torch.stack([num_counted_Q, num_right_Q], dim=1)[has_any_Q]
    pair_UV, times_U = torch.unique(pair_QV, dim=0, return_counts=True)
    names = ("mAP", *(f"R{k}" for k in ks), "mINP")
    total = torch.zeros(len(names), dtype=torch.float64)
    for (n, m), times in zip(pair_UV.tolist(), times_U.tolist(), strict=True):
        i = torch.arange(1, n + 1, dtype=torch.float64)
        precision = float(((1 + (i - 1) * ((m - 1) / max(1, n - 1))) / i).mean())
        found = [1 - math.comb(n - m, k) / math.comb(n, k) if k <= n else 1.0 for k in ks]
        late = i[m - 1 :]
        log_share = torch.lgamma(late) - torch.lgamma(late - m + 1) - math.lgamma(m)  # of C(i - 1, m - 1)
        log_all = math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)
        penalty = float((torch.exp(log_share - log_all) * m / late).sum())
        total += times * torch.tensor([precision, *found, penalty], dtype=torch.float64)
    return dict(zip(names, (total / has_any_Q.sum()).tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


@torch.no_grad()
def rank_gallery(
    model: nn.Module,
    people: People,
    stage: Stage,
    name: str,
    *,
    k: int,
    config: Config,
    token_CL: Tensor,
    cache: Path | None = None,
    rerank: bool = False,
    on_images: OnImages = lambda done: None,
) -> Iterator[Ranked]:
    """The k best gallery images of every query of the list `name` ("NIR+SK"), by falling score, then as in the gallery.

    Under the camera rule, what does not count is left out, so that fewer may remain. Scores are cosines; re-ranked ones
    are 1 less the distance. cache: a folder of features, which `evaluate` shares; without it, only what this list needs
    is encoded.
    """
    assert isinstance(model, ReID)
    retrieval, lists = held_out(people, stage), query_lists(people, stage, config)
    if name not in lists:
        raise ValueError(f"{people.name} has no {stage} list {name}; take one of {', '.join(lists)}")
    queries = lists[name]
    row_R, place_X = needed_items(people, stage, config, only=name if cache is None else None)
    encodings = encode_people(model, people, row_R, place_X, token_CL, config=config, cache=cache, on_images=on_images)
    gallery_GE = gallery_features(encodings, retrieval)
    query_QE = query_features(model, people, encodings, queries, token_CL, config=config)
    score_of = reranked_scores(query_QE, gallery_GE, config) if rerank else cosine_scores(query_QE, gallery_GE)
    truth = make_truth(people, retrieval, queries, camera_rule=uses_camera_rule(retrieval, config))
    size = max(1, (config.training.memory_mib << 20) // (_BYTES_PER_SCORE * retrieval.gallery.numel()))
    for rows_B in torch.split(torch.arange(queries.identity.numel()), size):
        column_BP, _, is_left_out_BP = own_images(truth, rows_B)
        row, place = is_left_out_BP.nonzero().unbind(1)
        score_BG = score_of(rows_B)
        score_BG[row.to(score_BG.device), column_BP[row, place].to(score_BG.device)] = -torch.inf
        score_BG, column_BG = score_BG.sort(dim=1, descending=True, stable=True)
        found = zip(rows_B.tolist(), column_BG[:, :k].cpu(), score_BG[:, :k].tolist(), strict=True)
        for query, columns, scores in found:
            gallery = retrieval.gallery[columns]
            is_right = people.identity[gallery] == queries.identity[query]
            kept = [number for number, score in enumerate(scores) if score > -math.inf]
            yield Ranked(
                queries.modalities,
                tuple(queries.item[query].tolist()),
                int(queries.identity[query]),
                tuple(gallery.tolist()[: len(kept)]),
                tuple(scores[: len(kept)]),
                tuple(is_right.tolist()[: len(kept)]),
            )
