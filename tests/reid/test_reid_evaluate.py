"""Every image is encoded once, ranks are those of a slow loop, and lists and means are what they are called."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.overrides import TorchFunctionMode

from apps.reid import evaluate as module
from apps.reid.clip import Encoded
from apps.reid.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.reid.dataset import (
    CP,
    NIR,
    QUERY_LISTS,
    RGB,
    SK,
    TEXT,
    Frame,
    PackedImages,
    People,
    Queries,
    Retrieval,
    lists_by_rule,
    make_texts,
)
from apps.reid.evaluate import (
    Truth,
    baselines,
    chance,
    cosine_scores,
    count_not_below,
    encode_people,
    evaluate,
    list_metrics,
    needed_items,
    protocol_text,
    query_features,
    query_lists,
    rank_gallery,
    with_means,
)
from apps.reid.model import ReID, choose_subsets
from apps.reid.rerank import rerank_scores

HEIGHT, WIDTH, PATCH, EMBED, CONTEXT = 16, 8, 8, 8, 6
MODEL = ModelConfig(
    embed_dim=EMBED, tower_width=8, tower_layers=1, tower_heads=2, patch=PATCH, text_width=8, text_layers=1,
    text_heads=2, rank=2, fusion_layers=1, fusion_heads=2,
)  # fmt: skip
KS = (1, 3)
CONFIG = Config(data=DataConfig(height=HEIGHT, width=WIDTH), model=MODEL, training=TrainConfig(ks=KS))


def people_of(*, identities: int = 5, mixed: bool = True, cameras: int = 2, margin: int = 1, seed: int = 0) -> People:
    """People of whom the last three are to test on; each image is noise around a colour of its person."""
    draw = torch.Generator().manual_seed(seed)
    rows: list[tuple[int, int, int, int]] = []
    for person in range(identities):
        for kind, count in ((RGB, 4), *(((NIR, 2), (CP, 3), (SK, 3)) if mixed else ())):
            rows += [(person, kind, i % cameras, i % 3 if kind in (CP, SK) else -1) for i in range(count)]
    identity, modality, camera, view = torch.tensor(rows).unbind(1)
    is_rgb = modality == RGB
    has_caption = is_rgb & (torch.arange(len(rows)) % 2 == 0) if mixed else torch.zeros_like(is_rgb)
    caption = torch.where(has_caption, has_caption.cumsum(0) - 1, -1)
    frame = Frame(HEIGHT, WIDTH, margin, margin)
    colour = torch.randint(60, 190, (identities, 3, 1, 1), generator=draw)[identity]
    noise = torch.randint(-60, 60, (len(rows), 3, *frame.stored), generator=draw)
    people = People(
        identity=identity,
        camera=camera,
        modality=modality,
        view=view,
        caption=caption,
        captions=make_texts([f"caption {place}" for place in range(int(has_caption.sum()))]),
        path=make_texts([f"{row}.png" for row in range(len(rows))]),
        images=PackedImages(Path("none"), frame, (colour + noise).to(torch.uint8)),
        identity_ids=tuple(f"p{number}" for number in range(identities)),
        num_identities=identities - 3,
        num_valid=0,
        valid=None,
        test=None,
        fingerprint="abc",
        name="made up",
        split="by hand",
    )
    return dataclasses.replace(people, test=lists_by_rule(people, identities - 3, identities))


def tokens_of(people: People) -> Tensor:
    """Tokens of captions: numbers below the one that ends each."""
    draw = torch.Generator().manual_seed(1)
    token = torch.randint(1, 9, (len(people.captions), CONTEXT), generator=draw)
    token[:, 4] = 9
    token[:, 5] = 0
    return token


class Watched(ReID):
    """A model that notes what it encodes."""

    seen: Counter[bytes]

    def encode_images(self, image_RCHW: Tensor, modality_R: Tensor) -> Encoded:
        assert not self.training
        assert image_RCHW.dtype == torch.uint8
        assert image_RCHW.shape[1:] == (3, HEIGHT, WIDTH)
        for image, modality in zip(image_RCHW, modality_R.tolist(), strict=True):
            self.seen[bytes([modality, *image.flatten().tolist()])] += 1
        return super().encode_images(image_RCHW, modality_R)

    def encode_texts(self, token_NL: Tensor) -> Encoded:
        assert not self.training
        for row in token_NL.tolist():
            self.seen[repr(row).encode()] += 1
        return super().encode_texts(token_NL)


def model_of(config: Config = CONFIG, *, seed: int = 3) -> Watched:
    torch.manual_seed(seed)
    model = Watched(
        config.model,
        vocab_size=10,
        context=CONTEXT,
        num_identities=2,
        grid=(HEIGHT // PATCH, WIDTH // PATCH),
        subsets=choose_subsets("all", (RGB, NIR, CP, SK, TEXT)),
    )
    for parameter in model.parameters():  # such that modalities, experts and fusion all differ
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.seen = Counter()
    return model


@pytest.fixture(scope="module")
def people() -> People:
    return people_of()


# Ranks


def slow_metrics(
    score_QG: Tensor, gallery: Tensor, query: Tensor, cameras: tuple[Tensor, Tensor], ks: Sequence[int], rule: bool
) -> dict[str, float]:
    """One query after another, one gallery image after another, in Python's floats."""
    values: list[list[float]] = []
    for q, row in enumerate(score_QG.tolist()):
        ranked = []
        for g, score in enumerate(row):
            is_same = int(gallery[g]) == int(query[q])
            camera = int(cameras[1][q])
            if rule and is_same and camera >= 0 and int(cameras[0][g]) == camera:
                continue
            ranked.append((-score, is_same))  # False before True: ties against the model
        ranked.sort()
        hits = [rank for rank, (_, is_same) in enumerate(ranked, 1) if is_same]
        if hits:
            precision = [place / rank for place, rank in enumerate(hits, 1)]
            reached = [float(hits[0] <= k) for k in ks]
            values.append([sum(precision) / len(hits), *reached, len(hits) / hits[-1]])
    means = [sum(column) / len(values) for column in zip(*values, strict=True)]
    return dict(zip(["mAP", *(f"R{k}" for k in ks), "mINP"], means, strict=True))


def truth_by_loop(gallery: Tensor, query: Tensor, cameras: tuple[Tensor, Tensor], rule: bool) -> Truth:
    order = gallery.argsort(stable=True)
    bounds = [[int((gallery < q).sum()), int((gallery <= q).sum())] for q in query.tolist()]
    start, end = torch.tensor(bounds).unbind(1)
    own = cameras[1] if rule else torch.full_like(cameras[1], -1)
    return Truth(order, cameras[0][order], start, end, own)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 60), st.integers(1, 6)),
    levels=st.sampled_from([1, 2, 5, 50, 10**6]),
    rule=st.booleans(),
    budget=st.sampled_from([1, 5000, 1 << 20]),
)
def test_metrics_are_those_of_a_slow_loop_for_any_scores_and_ties(seed, sizes, levels, rule, budget):
    draw = torch.Generator().manual_seed(seed)
    num_queries, num_gallery, people = sizes
    gallery = torch.randint(people, (num_gallery,), generator=draw)
    query = torch.randint(people + 1, (num_queries,), generator=draw)
    cameras = torch.randint(-1, 3, (num_gallery,), generator=draw), torch.randint(-1, 3, (num_queries,), generator=draw)
    score = torch.randint(levels, (num_queries, num_gallery), generator=draw) / levels - 0.5
    truth = truth_by_loop(gallery, query, cameras, rule)
    if not bool((module.count_own(truth)[0] > 0).any()):
        return
    found = list_metrics(lambda rows: score[rows], truth, ks=(1, 5, 10), budget_bytes=budget)
    expected = slow_metrics(score, gallery, query, cameras, (1, 5, 10), rule)
    assert found == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40),
    picked=st.lists(st.integers(0, 39), min_size=1, max_size=8),
    scale=st.sampled_from([1.0, 1e-4, 1e-7]),
)
def test_scores_not_below_a_value_are_counted_to_the_last_bit(scores, picked, scale):
    score = torch.tensor([scores, scores[::-1]]) * scale
    value = score[:, [place % len(scores) for place in picked]].sort(dim=1).values
    padded = torch.cat([value, torch.full((2, 3), torch.inf)], dim=1)
    found = count_not_below(score, padded, torch.tensor([len(picked)] * 2))
    assert torch.equal(found[:, : len(picked)], (score[:, None] >= value[..., None]).sum(-1))


def test_a_collapsed_model_is_worst_of_all():
    gallery, query = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1])
    truth = truth_by_loop(gallery, query, (torch.zeros(6).long(), torch.zeros(2).long()), rule=False)
    found = list_metrics(lambda rows: torch.ones(len(rows), 6), truth, ks=(1, 4), budget_bytes=1 << 20)
    # ranks 5, 6 of two right images, and 4, 5, 6 of three
    expected = ((1 / 5 + 2 / 6) / 2 + (1 / 4 + 2 / 5 + 3 / 6) / 3) / 2
    assert found == pytest.approx({"mAP": expected, "R1": 0, "R4": 0.5, "mINP": (2 / 6 + 3 / 6) / 2})


def test_equal_vectors_tie_wherever_they_stand_in_the_gallery():
    draw = torch.Generator().manual_seed(0)
    row = torch.nn.functional.normalize(torch.randn(1, 33, generator=draw), dim=1)
    query = torch.nn.functional.normalize(torch.randn(1, 33, generator=draw), dim=1)
    assert cosine_scores(query, row.expand(37, -1).contiguous())(torch.tensor([0])).unique().numel() == 1


def test_ranking_takes_no_more_memory_than_it_may():
    largest = 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.untyped_storage().nbytes())
            return found

    draw = torch.Generator().manual_seed(0)
    query, gallery = (torch.randn(count, 4, generator=draw) for count in (500, 2000))
    of_gallery, of_query = torch.arange(2000) % 100, torch.arange(500) % 100
    truth = truth_by_loop(of_gallery, of_query, (torch.zeros(2000).long(), torch.zeros(500).long()), rule=False)
    with Watch():
        list_metrics(cosine_scores(query, gallery), truth, ks=(1,), budget_bytes=1 << 20)
    assert largest <= 1 << 18


# Features


def test_every_image_and_caption_is_encoded_once_and_the_mode_restored(people: People):
    model = model_of().train()
    done: list[int] = []
    evaluate(model, people, "test", config=CONFIG, token_CL=tokens_of(people), on_images=done.append)
    assert model.training
    assert set(model.seen.values()) == {1}
    assert people.test is not None
    images = {int(row) for row in people.test.gallery} | {
        int(item)
        for queries in people.test.queries.values()
        for column, modality in zip(queries.item.unbind(1), queries.modalities, strict=True)
        if modality != TEXT
        for item in column
    }
    captions = {item for queries in people.test.queries.values() if queries.modalities == (TEXT,)
                for item in queries.item.flatten().tolist()}  # fmt: skip
    assert sum(model.seen.values()) == len(images) + len(captions) == max(done)
    assert done == sorted(done)


def direct_feature(model: ReID, people: People, modalities: tuple[int, ...], item: Sequence[int]) -> Tensor:
    """The feature of one query, encoded and fused alone."""
    parts = []
    for modality, place in zip(modalities, item, strict=True):
        if modality == TEXT:
            parts.append(model.encode_texts(tokens_of(people)[place][None]))
        else:
            image = people.images.load(torch.tensor([place]))[:, :, 1 : 1 + HEIGHT, 1 : 1 + WIDTH]
            parts.append(model.encode_images(image, torch.tensor([modality])))
    return torch.nn.functional.normalize(model.fuse(modalities, parts)[0], dim=0)


@pytest.mark.parametrize("fusion", ["pooled", "tokens", "tokens that do not fit"])
def test_query_features_are_those_of_each_query_alone(people: People, monkeypatch: pytest.MonkeyPatch, fusion: str):
    if fusion.endswith("fit"):
        monkeypatch.setattr(module, "TOKEN_BYTES", 100)
    monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(module, "TOKEN_QUERIES_PER_CHUNK", 3)
    monkeypatch.setattr(module, "QUERIES_PER_CHUNK", 4)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, fusion=fusion.split()[0]))
    model = model_of(config).eval()
    tokens = tokens_of(people)
    encodings = encode_people(model, people, *needed_items(people, "test", config), tokens, config=config)
    assert (encodings.image_token is None) == (fusion != "tokens")
    for name in ("NIR", "TEXT", "SK+NIR", "TEXT+NIR+CP", "CP+NIR+SK+TEXT"):
        queries = query_lists(people, "test", config)[name]
        found = query_features(model, people, encodings, queries, tokens, config=config)
        for row in (0, len(found) - 1):
            with torch.no_grad():
                expected = direct_feature(model, people, queries.modalities, queries.item[row].tolist())
            assert torch.allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("fusion", ["pooled", "tokens"])
def test_features_stand_in_the_order_asked_for(people: People, fusion: str):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, fusion=fusion))
    model, tokens = model_of(config).eval(), tokens_of(people)
    rows, places = torch.tensor([7, 40, 12, 13, 25, 2]), torch.tensor([5, 0, 3])
    found = encode_people(model, people, rows, places, tokens, config=config)
    with torch.no_grad():
        for row, feature in zip(rows.tolist(), found.image, strict=True):
            expected = direct_feature(model, people, (int(people.modality[row]),), [row])
            assert torch.allclose(torch.nn.functional.normalize(feature, dim=0), expected, atol=1e-5)
        assert torch.allclose(found.caption, model.encode_texts(tokens[places]).feature, atol=1e-5)
    assert found.image_place[rows].tolist() == [0, 1, 2, 3, 4, 5]
    assert int((found.image_place >= 0).sum()) == 6


def test_features_differ_between_images_and_between_modalities(people: People):
    model = model_of()
    encodings = encode_people(model, people, *needed_items(people, "test", CONFIG), tokens_of(people), config=CONFIG)
    for feature in (encodings.image, encodings.caption):
        assert float(feature.std(0).min()) > 1e-3
        distance = torch.cdist(feature, feature) + torch.eye(len(feature))
        assert float(distance.min()) > 1e-3


def test_features_that_are_not_finite_are_an_error(people: People):
    model = model_of()
    with torch.no_grad():
        model.clip.image.class_token.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, people, "test", config=CONFIG, token_CL=tokens_of(people))


# The cache


def test_cached_features_are_used_again_for_the_same_weights_and_data_alone(people: People, tmp_path: Path):
    model, tokens = model_of(), tokens_of(people)

    def measure(model: Watched, people: People, config: Config = CONFIG) -> tuple[dict[str, float], int]:
        model.seen.clear()
        metrics = evaluate(model, people, "test", config=config, token_CL=tokens, cache=tmp_path / "features")
        return metrics, sum(model.seen.values())

    first, count = measure(model, people)
    assert count > 0
    assert measure(model, people) == (first, 0)
    assert measure(model_of(seed=4), people)[1] == count
    with torch.no_grad():
        model.clip.image.position[0, 0] += 1e-3
    changed, again = measure(model, people)
    assert again == count
    assert measure(model, dataclasses.replace(people, fingerprint="abd"))[1] == count
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, alpha=3.0))
    assert measure(model_of(other), people, other)[1] == count
    assert measure(model, people) == (changed, 0)
    fewer = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, modalities=("rgb", "nir")))
    assert 0 < measure(model, people, fewer)[1] < count
    model.seen.clear()
    cache = tmp_path / "features"
    assert list(rank_gallery(model, people, "test", "SK", k=1, config=CONFIG, token_CL=tokens, cache=cache))
    assert not model.seen


# Lists and means


def test_all_lists_are_measured_and_their_means_are_those_of_their_modes(people: People):
    found = evaluate(model_of(), people, "test", config=CONFIG, token_CL=tokens_of(people))
    modes = [f"MM-{count}" for count in range(1, 5)]
    assert {name.partition("/")[0] for name in found} == {"MM", *modes, *QUERY_LISTS}
    assert len(QUERY_LISTS) == 32
    for figure in ("mAP", "R1", "R3", "mINP"):
        for count, mode in enumerate(modes, 1):
            lists = [found[f"{name}/{figure}"] for name in QUERY_LISTS if name.count("+") == count - 1]
            assert len(lists) == (4, 12, 12, 4)[count - 1]
            assert found[f"{mode}/{figure}"] == pytest.approx(sum(lists) / len(lists))
        assert found[f"MM/{figure}"] == pytest.approx(sum(found[f"{mode}/{figure}"] for mode in modes) / 4)
    assert all(0 < found[f"{name}/mAP"] <= 1 for name in QUERY_LISTS)


def test_a_list_is_measured_as_a_loop_over_its_queries_measures_it(people: People):
    model = model_of().eval()
    found = evaluate(model, people, "test", config=CONFIG, token_CL=tokens_of(people))
    assert people.test is not None
    gallery = people.test.gallery
    with torch.no_grad():
        rows = torch.stack([direct_feature(model, people, (RGB,), [row]) for row in gallery.tolist()])
        for name in ("CP", "SK+NIR", "TEXT+NIR+CP"):
            queries = people.test.queries[name]
            asked = [direct_feature(model, people, queries.modalities, item) for item in queries.item.tolist()]
            score = torch.stack(asked).double() @ rows.double().T
            none = torch.zeros(len(gallery)).long(), torch.zeros(len(asked)).long()
            expected = slow_metrics(score, people.identity[gallery], queries.identity, none, KS, rule=False)
            assert {key: found[f"{name}/{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_re_ranked_lists_stand_beside_the_plain_ones(people: People):
    config = dataclasses.replace(CONFIG, training=TrainConfig(ks=KS, rerank_k1=4, rerank_k2=2, rerank_lambda=0.5))
    model, tokens = model_of(), tokens_of(people)
    plain = evaluate(model, people, "test", config=config, token_CL=tokens)
    model.seen.clear()
    both = evaluate(model, people, "test", config=config, token_CL=tokens, rerank=True)
    assert set(model.seen.values()) == {1}
    assert list(both)[: len(plain)] == list(plain)
    assert {name: both[name] for name in plain} == plain
    assert list(both)[len(plain) :] == [name.replace("/", " re-ranked/") for name in plain]
    assert people.test is not None
    gallery, queries = people.test.gallery, people.test.queries["CP+SK"]
    encodings = encode_people(model, people, *needed_items(people, "test", config), tokens, config=config)
    query = query_features(model, people, encodings, queries, tokens, config=config)
    score_of = rerank_scores(
        query, module.gallery_features(encodings, people.test), k1=4, k2=2, lambda_=0.5, budget_bytes=1 << 20
    )
    score = score_of(torch.arange(len(query)))
    none = torch.zeros(len(gallery)).long(), torch.zeros(len(query)).long()
    expected = slow_metrics(score, people.identity[gallery], queries.identity, none, KS, rule=False)
    assert {key: both[f"CP+SK re-ranked/{key}"] for key in expected} == pytest.approx(expected)
    ranked = rank_gallery(model, people, "test", "CP+SK", k=4, config=config, token_CL=tokens, rerank=True)
    for found, row in zip(ranked, score, strict=True):
        assert list(found.score) == pytest.approx(row.sort(descending=True).values[:4].tolist(), abs=1e-5)


def test_modalities_limit_the_lists(people: People):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, modalities=("rgb", "nir", "sk")))
    found = evaluate(model_of(), people, "test", config=config, token_CL=tokens_of(people))
    assert {name.partition("/")[0] for name in found} == {"MM", "MM-1", "MM-2", "NIR", "SK", "NIR+SK", "SK+NIR"}
    alone = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, modalities=("rgb",)))
    with pytest.raises(ValueError, match="no test query of rgb; its lists are NIR"):
        query_lists(people, "test", alone)


def test_rgb_alone_is_measured_with_the_camera_rule_of_the_data_or_of_the_flag():
    people = people_of(mixed=False)
    assert people.test is not None
    assert people.test.camera_rule
    model = model_of()
    found = {}
    for rule in ("auto", "on", "off"):
        config = dataclasses.replace(CONFIG, training=TrainConfig(ks=KS, camera_rule=rule))
        found[rule] = evaluate(model, people, "test", config=config, token_CL=tokens_of(people))
        assert {name.partition("/")[0] for name in found[rule]} == {"MM", "RGB"}
        assert found[rule]["MM/mAP"] == found[rule]["RGB/mAP"]
        assert ("camera do not count" in protocol_text(people, "test", config)) == (rule != "off")
        items = needed_items(people, "test", config)
        encodings = encode_people(model, people, *items, tokens_of(people), config=config)
        queries, gallery = people.test.queries["RGB"], people.test.gallery
        query = query_features(model, people, encodings, queries, tokens_of(people), config=config)
        score = query.double() @ module.gallery_features(encodings, people.test).double().T
        cameras = people.camera[gallery], people.camera[queries.item[:, 0]]
        expected = slow_metrics(score, people.identity[gallery], queries.identity, cameras, KS, rule=rule != "off")
        assert {key: found[rule][f"RGB/{key}"] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert found["auto"] == found["on"] != found["off"]


def test_queries_of_nobody_in_the_gallery_enter_no_mean_and_are_counted(people: People):
    assert people.test is not None
    strangers = Queries((NIR,), torch.tensor([[4], [5]]), torch.tensor([0, 0]))
    both = people.test.queries["NIR"]
    mixed = Queries((NIR,), torch.cat([both.item, strangers.item]), torch.cat([both.identity, strangers.identity]))
    model, tokens = model_of(), tokens_of(people)

    def with_lists(queries: dict[str, Queries]) -> People:
        assert people.test is not None
        return dataclasses.replace(people, test=dataclasses.replace(people.test, queries=queries))

    plain = evaluate(model, with_lists({"NIR": both}), "test", config=CONFIG, token_CL=tokens)
    more = with_lists({"NIR": mixed, "SK": strangers._replace(modalities=(SK,))})
    assert evaluate(model, more, "test", config=CONFIG, token_CL=tokens) == pytest.approx(plain)
    assert "2 without a right image left out" in protocol_text(with_lists({"NIR": mixed}), "test", CONFIG)
    with pytest.raises(ValueError, match="no test query of made up has a right image"):
        evaluate(model, with_lists({"NIR": strangers}), "test", config=CONFIG, token_CL=tokens)


def test_an_empty_gallery_and_a_missing_part_are_errors(people: People):
    assert people.test is not None
    empty = dataclasses.replace(people.test, gallery=people.test.gallery[:0])
    with pytest.raises(ValueError, match="gallery of made up is empty"):
        evaluate(model_of(), dataclasses.replace(people, test=empty), "test", config=CONFIG, token_CL=tokens_of(people))
    with pytest.raises(ValueError, match="nobody for valid"):
        protocol_text(people, "valid", CONFIG)


def test_means_of_lists_that_exist():
    found = with_means({"NIR": {"mAP": 0.2}, "SK": {"mAP": 0.4}, "NIR+SK": {"mAP": 0.9}}, suffix=" x")
    assert found == pytest.approx(
        {"MM x/mAP": 0.6, "MM-1 x/mAP": 0.3, "MM-2 x/mAP": 0.9, "NIR x/mAP": 0.2, "SK x/mAP": 0.4, "NIR+SK x/mAP": 0.9}
    )


def test_the_protocol_names_what_was_ranked(people: People):
    text = protocol_text(people, "test", CONFIG)
    for words in ("12 RGB images of 3 people", "32 lists", "no camera rule", "ties against", "by hand"):
        assert words in text


# Baselines


@pytest.mark.parametrize(("num_gallery", "num_right"), [(1, 1), (5, 1), (6, 2), (7, 4), (5, 5)])
def test_chance_is_the_mean_over_all_orders(num_gallery: int, num_right: int):
    ks = (1, 2, 8)
    values = []
    for places in itertools.combinations(range(1, num_gallery + 1), num_right):
        precision = [hit / rank for hit, rank in enumerate(places, 1)]
        reached = [float(places[0] <= k) for k in ks]
        values.append([sum(precision) / num_right, *reached, num_right / places[-1]])
    expected = [sum(column) / len(values) for column in zip(*values, strict=True)]
    found = chance(torch.tensor([num_gallery, 3]), torch.tensor([num_right, 0]), ks=ks)
    assert list(found) == ["mAP", "R1", "R2", "R8", "mINP"]
    assert list(found.values()) == pytest.approx(expected)


def test_chance_of_large_galleries_stays_finite():
    found = chance(torch.tensor([20_000, 19_990]), torch.tensor([45, 35]), ks=(1, 10))
    assert all(0 < value < 0.05 and math.isfinite(value) for value in found.values())


def test_pixels_know_colours_and_captions_guess(people: People):
    found = baselines(people, "test", CONFIG)
    assert set(found) == {"pixels", "chance"}
    assert found["pixels"].keys() == found["chance"].keys()
    assert found["pixels"]["TEXT/mAP"] == found["chance"]["TEXT/mAP"]
    assert found["pixels"]["NIR/mAP"] > found["chance"]["NIR/mAP"] + 0.2
    assert found["pixels"]["TEXT+NIR/mAP"] > found["chance"]["TEXT+NIR/mAP"] + 0.2


# Prediction


@pytest.mark.parametrize("rule", ["on", "off"])
def test_ranked_gallery_is_a_full_sort_without_what_does_not_count(rule: str):
    people = people_of(mixed=False)
    config = dataclasses.replace(CONFIG, training=TrainConfig(ks=KS, camera_rule=rule, memory_mib=1))
    model = model_of(config).eval()
    assert people.test is not None
    gallery, queries = people.test.gallery.tolist(), people.test.queries["RGB"]
    found = list(rank_gallery(model, people, "test", "RGB", k=50, config=config, token_CL=tokens_of(people)))
    assert len(found) == len(queries.identity)
    with torch.no_grad():
        rows = {row: direct_feature(model, people, (RGB,), [row]) for row in gallery}
        for query, (item,), identity in zip(found, queries.item.tolist(), queries.identity.tolist(), strict=True):
            asked = direct_feature(model, people, (RGB,), [item])
            kept = [
                row
                for row in gallery
                if rule == "off" or identity != people.identity[row] or people.camera[row] != people.camera[item]
            ]
            expected = sorted(kept, key=lambda row: -float(asked @ rows[row]))
            assert query.item == (item,)
            assert query.identity == identity
            assert list(query.gallery) == expected
            assert list(query.is_right) == [int(people.identity[row]) == identity for row in expected]
            assert list(query.score) == pytest.approx([float(asked @ rows[row]) for row in expected], abs=1e-4)


def test_ranked_gallery_encodes_what_the_list_needs_and_names_the_lists(people: People):
    model = model_of()
    found = list(rank_gallery(model, people, "test", "SK+TEXT", k=3, config=CONFIG, token_CL=tokens_of(people)))
    assert all(len(query.gallery) == 3 for query in found)
    assert {query.modalities for query in found} == {(SK, TEXT)}
    assert people.test is not None
    queries = people.test.queries["SK+TEXT"]
    assert sum(model.seen.values()) == len(people.test.gallery) + sum(
        len(set(column.tolist())) for column in queries.item.unbind(1)
    )
    with pytest.raises(ValueError, match="no test list RGB; take one of NIR, CP, SK"):
        list(rank_gallery(model, people, "test", "RGB", k=3, config=CONFIG, token_CL=tokens_of(people)))


def test_retrieval_of_validation_people_is_measured_too(people: People):
    assert people.test is not None
    turned: Retrieval = people.test
    valid = dataclasses.replace(people, valid=turned, test=None)
    config, tokens = CONFIG, tokens_of(people)
    assert evaluate(model_of(), valid, "valid", config=config, token_CL=tokens) == evaluate(
        model_of(), people, "test", config=config, token_CL=tokens
    )
