"""The demo data is made from its arguments alone, looks like real data, and has a structure worth learning."""

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch

from apps.seqrec.demo import demo_sequences, write_demo
from apps.seqrec.formats import check_source, detect_format, read_sequences


@pytest.fixture(scope="module")
def demo():
    return demo_sequences()


def histories(sequences):
    return [part.tolist() for part in sequences.item.split(sequences.ptr.diff().tolist())]


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ptr", "item", "time"))


def test_demo_data_is_a_function_of_its_arguments():
    first = demo_sequences(num_users=50, num_items=90, seed=3)
    torch.manual_seed(99)
    second = demo_sequences(num_users=50, num_items=90, seed=3)
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    for other in ({"seed": 4}, {"num_users": 51}, {"num_items": 120}):
        changed = demo_sequences(**{"num_users": 50, "num_items": 90, "seed": 3, **other})
        assert changed.fingerprint != first.fingerprint
        assert not same(changed, first)


def test_demo_data_has_the_shape_of_real_data(demo):
    length = demo.ptr.diff()
    assert demo.num_users == 2500
    assert 850 <= demo.num_items <= 900
    assert int(length.min()) >= 5
    assert int(length.max()) <= 200
    assert 35 < float(length.double().mean()) < 45
    assert float(length.double().mean()) > 1.2 * float(length.median())  # a long tail
    counts = torch.bincount(demo.item.long())[1:].sort(descending=True).values
    assert int(counts.min()) >= 1
    assert float(counts[:90].sum() / counts.sum()) > 0.25  # the most popular tenth


def test_nobody_meets_an_item_twice_and_time_moves_on(demo):
    assert all(len(set(items)) == len(items) for items in histories(demo))
    ends = demo.ptr[1:-1]
    inside = torch.ones(demo.num_events - 1, dtype=torch.bool).index_fill_(0, ends - 1, False)
    assert bool((demo.time.diff()[inside] > 0).all())


def hit_rate(ranked_of, sequences) -> float:
    """Share of users whose last item is among the 10 best of those they have not seen."""
    hits = 0.0
    for *history, target in histories(sequences):
        seen = set(history)
        best = [item for item in ranked_of(history) if item not in seen][:10]
        hits += target in best
    return hits / len(sequences.user_ids)


def test_what_came_before_tells_much_more_than_popularity_or_recency(demo):
    popular = Counter(item for items in histories(demo) for item in items[:-1])
    ranking = [item for item, _ in popular.most_common()]
    following: dict[int, Counter[int]] = defaultdict(Counter)
    for *items, _ in histories(demo):
        for last, item in pairwise(items):
            following[last][item] += 1

    by_popularity = hit_rate(lambda history: ranking, demo)
    by_recency = hit_rate(lambda history: history[::-1], demo)  # all seen, as nobody repeats
    by_last = hit_rate(lambda history: [item for item, _ in following[history[-1]].most_common()] + ranking, demo)
    assert 0.02 < by_popularity < 0.15
    assert by_recency == 0
    assert by_last > 4 * by_popularity
    assert by_last < 0.9  # noise


def test_the_item_before_the_last_says_which_successor_follows(demo):
    pairs: dict[int, Counter[int]] = defaultdict(Counter)
    triples: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for items in histories(demo):
        for before, last, following in zip(items, items[1:], items[2:], strict=False):
            pairs[last][following] += 1
            triples[before, last][following] += 1
    frequent = [key for key, counter in triples.items() if sum(counter.values()) >= 12]
    assert len(frequent) > 100
    alone = sum(max(pairs[last].values()) / sum(pairs[last].values()) for _, last in frequent) / len(frequent)
    together = sum(max(triples[key].values()) / sum(triples[key].values()) for key in frequent) / len(frequent)
    assert together > alone + 0.1


def test_the_file_holds_exactly_the_demo_data(tmp_path, demo):
    path = write_demo(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "demo.txt"
    sequences = read_sequences(path)
    assert same(sequences, demo)
    assert sequences.item_ids == demo.item_ids
    assert sequences.user_ids == demo.user_ids
    assert detect_format(path)[0] == "pairs"
    assert check_source(path) == []


def test_an_equal_file_is_left_alone_and_another_replaced(tmp_path):
    path = write_demo(tmp_path)
    written, content = path.stat(), path.read_bytes()
    again = write_demo(tmp_path).stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    path.write_bytes(content[:-1])
    assert write_demo(tmp_path).read_bytes() == content


@pytest.mark.parametrize("arguments", [{"num_users": 0}, {"num_items": 20}])
def test_demo_data_that_would_hold_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="is too small; take at least"):
        demo_sequences(**arguments)
