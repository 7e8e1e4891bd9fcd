"""What ranking a gallery and re-ranking it cost, beside the usual loops in NumPy, alternating in one run.

    python -m benchmarks.reid_ranking                      # 2,000 queries, 18,000 gallery images of 400 people
    python -m benchmarks.reid_ranking --skip-ranking       # re-ranking of 5,000 images alone

The other two are written here in their usual way. Ranking: all distances, one argsort of the whole matrix, then query
by query what the camera rule leaves, cumulated (TransReID's evaluation, with mINP). Re-ranking: the k-reciprocal
formula with matrices of all pairs (as in its authors' code). Ranking is timed from features and, without the matrix
product that both need, from scores. Figures of both must agree: mAP, R1 and mINP to 6 digits, re-ranked distances to
1e-5. Prints a table and, as its last line, everything as JSON. Needs NumPy.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.reid.evaluate import Truth, cosine_scores, list_metrics
from apps.reid.rerank import rerank_scores
from shared.device import describe_machine

K1, K2, LAMBDA = 20, 6, 0.3
BUDGET = 32 << 20
SHOWN = ("mAP", "R1", "mINP")


def draw_features(queries: int, gallery: int, people: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors of queries and gallery around those of their people, whose they are, and one of six cameras."""
    generator = torch.Generator().manual_seed(0)
    count = queries + gallery
    identity_N = torch.randint(people, (count,), generator=generator)
    camera_N = torch.randint(6, (count,), generator=generator)
    centre = torch.randn(people, dim, generator=generator)
    x_NE = centre[identity_N] + 3 * torch.randn(count, dim, generator=generator)
    return F.normalize(x_NE, dim=1), identity_N, camera_N, torch.arange(count) < queries


def loop_metrics(distance: np.ndarray, of: tuple[np.ndarray, ...]) -> dict[str, float]:
    """mAP, R1 and mINP by a full sort and one query after another."""
    query, gallery, query_camera, gallery_camera = of
    order = np.argsort(distance, axis=1)
    matches = (gallery[order] == query[:, None]).astype(np.int32)
    precisions, firsts, lasts = [], [], []
    for i in range(len(query)):
        places = order[i]
        keep = ~((gallery[places] == query[i]) & (gallery_camera[places] == query_camera[i]))
        hits = matches[i][keep]
        if not hits.any():
            continue
        cumulated = hits.cumsum()
        firsts.append(hits[0])
        lasts.append(hits.sum() / (np.flatnonzero(hits)[-1] + 1.0))
        precision = cumulated / (np.arange(len(cumulated)) + 1.0) * hits
        precisions.append(precision.sum() / hits.sum())
    return {"mAP": float(np.mean(precisions)), "R1": float(np.mean(firsts)), "mINP": float(np.mean(lasts))}


def dense_rerank(x: np.ndarray, num_queries: int) -> np.ndarray:
    """Re-ranked distances of queries to gallery, by matrices of all pairs."""
    plain = np.clip(2 - 2 * x @ x.T, 0, None)
    plain = np.transpose(plain / plain.max(axis=0))
    weights = np.zeros_like(plain)
    order = np.argsort(plain, axis=1)

    def reciprocal(i: int, size: int) -> np.ndarray:
        forward = order[i, :size]
        return forward[(order[forward, :size] == i).any(axis=1)]

    for i in range(len(x)):
        near = reciprocal(i, K1 + 1)
        grown = near
        for candidate in near:
            others = reciprocal(candidate, round(K1 / 2) + 1)
            if len(np.intersect1d(others, near)) > 2 / 3 * len(others):
                grown = np.append(grown, others)
        grown = np.unique(grown)
        weight = np.exp(-plain[i, grown])
        weights[i, grown] = weight / weight.sum()
    weights = np.stack([weights[order[i, :K2]].mean(axis=0) for i in range(len(x))])
    holders = [np.flatnonzero(column) for column in weights.T]
    found = np.empty_like(plain[:num_queries])
    for i in range(num_queries):
        overlap = np.zeros(len(x), dtype=x.dtype)
        for j in np.flatnonzero(weights[i]):
            overlap[holders[j]] += np.minimum(weights[i, j], weights[holders[j], j])
        found[i] = (1 - overlap / (2 - overlap)) * (1 - LAMBDA) + plain[i] * LAMBDA
    return found[:, num_queries:]


def make_truth(identity: Tensor, camera: Tensor, is_query: Tensor) -> Truth:
    """Who is right, as the app makes it of its data."""
    gallery, order = identity[~is_query].sort(stable=True)
    query = identity[is_query]
    start, end = torch.searchsorted(gallery, query), torch.searchsorted(gallery, query, right=True)
    return Truth(order, camera[~is_query][order], start, end, camera[is_query])


def alternate(work: dict[str, Callable[[], object]], repeats: int) -> tuple[dict[str, list[float]], dict[str, object]]:
    """Seconds of every way in turn, the first round not counted; and what each has given last."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    given: dict[str, object] = {}
    for _ in range(1 + repeats):
        for name, run in work.items():
            begin = time.perf_counter()
            given[name] = run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: values[1:] for name, values in seconds.items()}, given


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--gallery", type=int, default=18_000)
    parser.add_argument("--people", type=int, default=400)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rerank-images", type=int, default=5000, help="a tenth are queries; 0 leaves re-ranking out")
    parser.add_argument("--skip-ranking", action="store_true", help="time re-ranking alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seconds: dict[str, list[float]] = {}
    figures: dict[str, object] = {}

    if not options.skip_ranking:
        x_NE, identity, camera, is_query = draw_features(options.queries, options.gallery, options.people, options.dim)
        query_QE, gallery_GE = x_NE[is_query], x_NE[~is_query]
        truth = make_truth(identity, camera, is_query)
        masks = ((identity, is_query), (identity, ~is_query), (camera, is_query), (camera, ~is_query))
        of = tuple(values[mask].numpy() for values, mask in masks)
        score_QG = query_QE @ gallery_GE.T
        distance = (-score_QG).numpy()
        work: dict[str, Callable[[], object]] = {
            "loop, from features": lambda: loop_metrics((-(query_QE @ gallery_GE.T)).numpy(), of),
            "ours, from features": lambda: list_metrics(
                cosine_scores(query_QE, gallery_GE), truth, ks=(1,), budget_bytes=BUDGET
            ),
            "loop, from scores": lambda: loop_metrics(distance, of),
            "ours, from scores": lambda: list_metrics(lambda rows: score_QG[rows], truth, ks=(1,), budget_bytes=BUDGET),
        }
        seconds, given = alternate(work, options.repeats)
        figures |= given
        first, *others = ({name: value[name] for name in SHOWN} for value in given.values() if isinstance(value, dict))
        for other in others:
            worst = max(abs(other[name] - first[name]) for name in SHOWN)
            if worst > 1e-6:
                raise SystemExit(f"figures differ by {worst:.2e}: {first} and {other}")

    if options.rerank_images:
        queries = max(1, options.rerank_images // 10)
        people = max(2, options.people * options.rerank_images // 20_000)
        x_NE, _, _, is_query = draw_features(queries, options.rerank_images - queries, people, options.dim)
        x = x_NE.numpy()

        def sparse() -> Tensor:
            score_of = rerank_scores(x_NE[is_query], x_NE[~is_query], k1=K1, k2=K2, lambda_=LAMBDA, budget_bytes=BUDGET)
            return 1 - torch.cat([score_of(rows) for rows in torch.split(torch.arange(queries), 100)])

        more, given = alternate(
            {"dense, re-ranking": lambda: dense_rerank(x, queries), "ours, re-ranking": sparse}, options.repeats
        )
        seconds |= more
        dense, ours = given.values()
        assert isinstance(dense, np.ndarray)
        assert isinstance(ours, Tensor)
        figures["largest difference of re-ranked distances"] = float(np.abs(dense - ours.numpy()).max())

    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
    print(f"{options.queries:,} queries, {options.gallery:,} gallery images; re-ranking of {options.rerank_images:,}")
    peers = {"ours, from features": "loop, from features", "ours, from scores": "loop, from scores"}
    peers |= {"ours, re-ranking": "dense, re-ranking"}
    for name, times in seconds.items():
        ordered, median = sorted(times), statistics.median(times)
        low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
        ratio = f"  x{statistics.median(seconds[peers[name]]) / median:.2f}" if name in peers else ""
        print(f"{name:24s} {median:8.3f} s (quartiles {low:.3f} .. {high:.3f}){ratio}")
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"largest memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    print(json.dumps({"machine": describe_machine(), "seconds": seconds, "figures": figures}, default=str))


if __name__ == "__main__":
    main()
