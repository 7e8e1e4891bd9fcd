"""The demo data is made from its arguments alone, looks like real data, and has a structure worth learning."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from apps.seqrec.contest_check import check_contest
from apps.seqrec.dataset import Sequences
from apps.seqrec.demo import demo_sequences, write_demo, write_text
from apps.seqrec.formats import check_source, detect_format, read_sequences


@pytest.fixture(scope="module")
def demo() -> Sequences:
    return demo_sequences()


@pytest.fixture(scope="module")
def small() -> Sequences:
    return demo_sequences(num_users=2000)


def histories(sequences: Sequences) -> list[list[int]]:
    return [part.tolist() for part in torch.split(sequences.item, sequences.ptr.diff().tolist())]


def same(a: Sequences, b: Sequences) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ptr", "item", "time"))


@pytest.mark.parametrize("other", [{"seed": 4}, {"num_users": 51}, {"num_items": 240}])
def test_demo_data_is_a_function_of_its_arguments(other: dict[str, int]):
    arguments = {"num_users": 50, "num_items": 200, "seed": 3}
    first = demo_sequences(**arguments)
    torch.manual_seed(99)
    second = demo_sequences(**arguments)
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    changed = demo_sequences(**{**arguments, **other})
    assert changed.fingerprint != first.fingerprint
    assert not same(changed, first)


def test_demo_data_has_the_shape_of_real_data(demo: Sequences):
    length = demo.ptr.diff()
    assert demo.num_users == 8000
    assert 380 <= demo.num_items <= 400
    assert int(length.min()) >= 5
    assert int(length.max()) <= 200
    assert 35 < float(length.double().mean()) < 45
    assert float(length.double().mean()) > 1.2 * float(length.median())  # a long tail
    counts = torch.bincount(demo.item.long())[1:].sort(descending=True).values
    assert int(counts.min()) >= 1
    assert float(counts[:40].sum() / counts.sum()) > 0.2  # the most popular tenth


def test_nobody_meets_an_item_twice_and_time_moves_on(demo: Sequences):
    assert all(len(set(items)) == len(items) for items in histories(demo))
    assert demo.time is not None
    ends = demo.ptr[1:-1]
    inside = torch.ones(demo.num_events - 1, dtype=torch.bool).index_fill_(0, ends - 1, False)
    assert bool((demo.time.diff()[inside] > 0).all())


def hit_rate(ranked_of: Callable[[list[int]], Iterable[int]], cases: list[list[int]], *, k: int = 10) -> float:
    """Share of the users whose last item is among the k best of those they had not met before it."""
    hits = 0
    for *history, target in cases:
        seen = set(history)
        hits += target in [item for item in ranked_of(history) if item not in seen][:k]
    return hits / len(cases)


def test_what_came_before_tells_much_more_than_popularity_or_recency(small: Sequences):
    users = histories(small)
    popular = Counter(item for items in users for item in items[:-1])
    ranking = [item for item, _ in popular.most_common()]
    following: dict[int, Counter[int]] = defaultdict(Counter)
    for *items, _ in users:
        for last, item in pairwise(items):
            following[last][item] += 1

    by_popularity = hit_rate(lambda history: ranking, users)
    by_recency = hit_rate(lambda history: history[::-1], users)  # all seen, as nobody repeats
    by_last = hit_rate(lambda history: [item for item, _ in following[history[-1]].most_common()] + ranking, users)
    assert 0.02 < by_popularity < 0.15
    assert by_recency == 0
    assert by_last > 4 * by_popularity
    assert by_last < 0.9  # noise


def signature_items(sequences: Sequences) -> dict[int, int]:
    """The kind that each signature item shows (named by its lowest item), found from who met what alone.

    Nobody meets signature items of two kinds, so that each of them shares no user with dozens of items; two of one kind
    share users, and so do nearly all pairs with an ordinary item.
    """
    user = torch.repeat_interleave(torch.arange(sequences.num_users), sequences.ptr.diff())
    met_UI = torch.zeros(sequences.num_users, sequences.num_items + 1)
    met_UI[user, sequences.item.long()] = 1
    together_II = (met_UI.t() @ met_UI)[1:, 1:] > 0
    apart_from_many = [i + 1 for i, apart in enumerate((~together_II).sum(1).tolist()) if apart >= 60]
    kind: dict[int, int] = {}
    for item in apart_from_many:
        group = {other for other in apart_from_many if together_II[item - 1, other - 1]}
        kind[item] = min(group)
    return kind


def test_a_user_meets_signature_items_of_one_kind_only(small: Sequences):
    kind = signature_items(small)
    assert sorted(Counter(kind.values()).values()) == [30, 30, 30, 30]
    shown = [{kind[item] for item in items if item in kind} for items in histories(small)]
    assert max(len(kinds) for kinds in shown) == 1
    assert sum(len(kinds) for kinds in shown) > 0.8 * small.num_users


def test_the_kind_that_the_history_shows_predicts_the_successor_better_than_the_last_item_alone(small: Sequences):
    kind = signature_items(small)

    def kind_of(history: list[int]) -> int | None:
        return next((kind[item] for item in history if item in kind), None)

    by_item: dict[int, Counter[int]] = defaultdict(Counter)
    by_kind: dict[tuple[int | None, int], Counter[int]] = defaultdict(Counter)
    users = histories(small)
    for *items, _ in users:  # the last event of each user is only asked for
        for length in range(1, len(items)):
            by_item[items[length - 1]][items[length]] += 1
            by_kind[kind_of(items[:length]), items[length - 1]][items[length]] += 1
    cases = [items for items in users if kind_of(items[:-1]) is not None]
    assert len(cases) > 1000
    alone = hit_rate(lambda history: [item for item, _ in by_item[history[-1]].most_common()], cases, k=1)
    together = hit_rate(
        lambda history: [item for item, _ in by_kind[kind_of(history), history[-1]].most_common()], cases, k=1
    )
    assert together > 1.5 * alone
    assert together < 0.7  # no better than the share of steps that follow a successor


def test_the_file_holds_exactly_the_demo_data(tmp_path: Path, small: Sequences, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("apps.seqrec.demo.demo_sequences", lambda: small)
    path = write_text(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "demo.txt"
    sequences = read_sequences(path)
    assert same(sequences, small)
    assert sequences.item_ids == small.item_ids
    assert sequences.user_ids == small.user_ids
    assert detect_format(path)[0] == "pairs"
    assert check_source(path) == []


def test_an_equal_file_is_left_alone_and_another_replaced(
    tmp_path: Path, small: Sequences, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("apps.seqrec.demo.demo_sequences", lambda: small)
    path = write_text(tmp_path)
    written, content = path.stat(), path.read_bytes()
    again = write_text(tmp_path).stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    path.write_bytes(content[:-1])
    assert write_text(tmp_path).read_bytes() == content


def test_the_demo_is_a_whole_contest_folder_that_is_left_alone_once_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("apps.seqrec.demo.CONTEST_USERS", 20)
    monkeypatch.setattr("apps.seqrec.demo.CONTEST_ITEMS", 30)
    folder = write_demo(tmp_path / "new" / "folder")
    expected = {"seq.jsonl", "seq_offsets.pkl", "predict_seq.jsonl", "predict_seq_offsets.pkl", "predict_set.jsonl"}
    expected |= {"indexer.pkl", "item_feat_dict.json", "creative_emb", "contest_demo.json"}
    assert {entry.name for entry in folder.iterdir()} == expected
    written = (folder / "seq.jsonl").stat()
    again = (write_demo(folder) / "seq.jsonl").stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert [fault for fault in check_contest(folder) if fault.severity == "error"] == []


@pytest.mark.parametrize("arguments", [{"num_users": 0}, {"num_items": 179}])
def test_demo_data_that_would_hold_nothing_is_refused(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="is too small; take at least"):
        demo_sequences(**arguments)
