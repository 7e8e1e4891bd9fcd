"""shared.report: a whole page whatever the folder holds, which loads nothing and shows the numbers that are there."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from shared import report
from shared.report import axis, build_report, thin

VOID = {"meta", "br", "hr", "img", "input", "link", "line"}  # <line/> closes itself in SVG
HOSTILE = "\"><script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>&amp;"


class Page(HTMLParser):
    """Checks that tags balance, and keeps what the tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag and css in (attrs.get("class") or "").split(" ")]


def build(run_dir, records=None, result=None, config=None) -> Page:
    """The parsed page of a folder that holds the given files, after the checks that every page must pass."""
    run_dir.mkdir(exist_ok=True)
    if records is not None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run_dir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if result is not None:
        (run_dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    if config is not None:
        (run_dir / "config.yaml").write_text(config, encoding="utf-8")
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    check_nothing_is_loaded(html, page)
    check_coordinates(page)
    return page


def check_nothing_is_loaded(html: str, page: Page) -> None:
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    for tag, attrs in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
        assert not loading & set(attrs), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
    assert "url(" not in html
    assert "@import" not in html


def check_coordinates(page: Page) -> None:
    width, height = 540.0, 250.0
    number = re.compile(r"-?\d+(\.\d+)?")
    for tag, attrs in page.elements:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "points"):
            for text in re.split("[ ,]", attrs.get(name) or "0"):
                assert number.fullmatch(text), (tag, name, text)
                limit = width if name in ("x", "x1", "x2", "cx") else max(width, height)
                assert -5 <= float(text) <= limit + 5, (tag, name, text)
        for share in re.findall(r"width:([^;%]*)%", attrs.get("style") or ""):
            assert 0 <= float(share) <= 100


def train(step, **values):
    return {"kind": "train", "step": step, "epoch": 0, "time": "2024-05-06T12:00:00+02:00", **values}


def valid(step, **values):
    return {"kind": "valid", "step": step, "epoch": 0, "time": "2024-05-06T12:34:56+02:00", **values}


RESULT = {
    "app": "seqrec",
    "title": "seqrec on tiny data",
    "protocol": "leave-one-out, full ranking",
    "table": [
        {"model": "ours", "NDCG@10": 0.25, "HR@10": 0.4, "loss": 2.5},
        {"model": "popularity", "NDCG@10": 0.125, "HR@10": 0.5, "loss": 3.5},
    ],
    "table_columns": ["model", "NDCG@10", "HR@10", "loss"],
    "speed": {"samples_per_s": 1234.5, "training_s": 3.25, "includes_evaluation": False},
    "time_split": {"data_wait": 0.25, "forward": 0.25, "backward": 0.5},
    "machine": {"cpu": "Some Chip", "cores": "2"},
    "versions": {"torch": "2.13.0"},
    "data": {"fingerprint": "abc123", "users": 6040},
    "git": "deadbeef",
    "command": "python -m apps.seqrec train",
    "notes": ["demo data"],
}


def test_a_full_folder_shows_every_part(tmp_path):
    records = [train(step, loss=5 / step, lr=1e-3, samples_per_s=100.0) for step in range(1, 9)]
    records += [valid(step, loss=1.0, **{"NDCG@10": 0.125 * step}) for step in (4, 8)]
    page = build(tmp_path, records, RESULT, "training:\n  lr: 1.0e-3  # flag\n")
    for words in (
        ["seqrec on tiny data", "demo data", "steps 8", "2024-05-06 12:00", "2024-05-06 12:34"],
        ["leave-one-out, full ranking", "ours", "popularity", "0.2500", "Speed on Some Chip", "samples/s 1,234"],
        ["Loss", "Validation metrics", "NDCG@10", "Learning rate", "Throughput, samples per second"],
        ["waiting for data 25.0%", "backward 50.0%", "abc123", "6,040", "deadbeef", "python -m apps.seqrec train"],
        ["lr: 1.0e-3 # flag", "2.13.0", "training (s) 3.25", "includes evaluation no"],
    ):
        for word in words:
            assert word in page.text
    assert len(page.all("svg")) == 4
    assert page.all("p", "missing") == []


def test_the_protocol_stands_right_above_the_table(tmp_path):
    build(tmp_path, result=RESULT)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    between = html[html.index("leave-one-out, full ranking") : html.index('<table class="metrics">')]
    assert Page("<p>" + between.partition("</p>")[2].replace('<div class="wide">', "") + "</p>").text == ""


def test_a_missing_protocol_is_said(tmp_path):
    page = build(tmp_path, result={"table": [{"model": "a", "x": 1.5}]})
    assert "Protocol not recorded" in page.text


def test_the_best_row_of_each_column_is_marked_also_where_lower_is_better(tmp_path):
    build(tmp_path, result=RESULT)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    marked = [re.sub(r"&[^;]*; ", "", cell) for cell in re.findall(r'<strong class="best"[^>]*>([^<]*)<', html)]
    assert marked == ["0.2500", "2.5000", "0.5000"]


def test_nothing_is_marked_where_rows_cannot_be_compared(tmp_path):
    table = [{"model": "a", "x": 0.5, "y": None, "z": 3}, {"model": "b", "x": 0.5, "y": 0.1, "z": "high"}]
    page = build(tmp_path, result={"protocol": "p", "table": table})
    assert page.all("strong", "best") == []
    assert "model x y z a 0.5000 \u2013 3 b 0.5000 0.1000 high" in page.text


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path):
    page = build(tmp_path)
    for words in ("no result.json", "no metrics.jsonl", "No step was timed", "No command", "no config.yaml"):
        assert words in page.text
    assert len(page.all("p", "missing")) == 5


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; name a folder that `train` has made"):
        build_report(tmp_path / "nowhere")


def test_no_result_yet_still_shows_the_curves(tmp_path):
    page = build(tmp_path, [train(1, loss=2.0), train(2, loss=1.0)])
    assert "the run has not reached its end" in page.text
    assert "has no such numbers: validation metrics, learning rate, throughput." in page.text
    assert len(page.all("svg")) == 1


@pytest.mark.parametrize("step", [0, 1, 10**7])
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-30, 1e99, 5e-324])
def test_a_single_point_makes_a_chart(tmp_path, step, value):
    page = build(tmp_path, [train(step, loss=value, lr=value)])
    assert len(page.all("svg")) == 2
    assert len(page.all("circle", "mark")) >= 2
    assert page.all("polygon", "mark") == []  # no largest and smallest of one value


def test_null_values_leave_a_gap_in_the_curve(tmp_path):
    records = [train(step, loss=None if step in (4, 5) else 1.0 / step) for step in range(1, 9)]
    page = build(tmp_path, records)
    assert [len((line["points"] or "").split()) for line in page.all("polyline", "curve")] == [3, 3]
    assert "(2 not finite)" in page.text


def test_a_curve_of_nulls_alone_is_left_out(tmp_path):
    page = build(tmp_path, [train(1, loss=None), train(2, loss=None)])
    assert "has no such numbers: loss," in page.text


@pytest.mark.parametrize(
    "values",
    [
        [1e300, -1e300, 1.0],
        [float("nan"), float("inf"), 2.0],
        [1e99, -1e99],
        [1.0, 1.0 + 1e-15],
        [0.0, 5e-324],
        [10**400, 1],
        ["text", True, [1], {"a": 1}, 4],
        [1e-30, 1e30],
    ],
)
def test_odd_numbers_never_reach_a_coordinate(tmp_path, values):
    build(tmp_path, [train(step, loss=value, lr=value) for step, value in enumerate(values)])


@pytest.mark.parametrize("steps", [[None, 1], ["3", 4], [True, 2], [1e300, 5], [7, 7, 7], [9, 3], [10**15, 10**15 + 1]])
def test_odd_steps_never_reach_a_coordinate(tmp_path, steps):
    build(tmp_path, [train(step, loss=1.0 + index) for index, step in enumerate(steps)])


def test_hostile_strings_stay_text_wherever_they_come_from(tmp_path):
    hostile: dict[str, object] = dict.fromkeys(("app", "title", "protocol", "command", "git"), HOSTILE)
    hostile |= {key: {HOSTILE: HOSTILE} for key in ("speed", "machine", "versions", "data")}
    hostile |= {"notes": [HOSTILE], "table": [{HOSTILE: HOSTILE}, {HOSTILE: 1}], "machine": {"gpu": HOSTILE}}
    hostile |= {"table_columns": [HOSTILE, "x"], "time_split": {HOSTILE: 0.5, "forward": 0.5}}
    records = [train(1, loss=1.0) | {"time": HOSTILE}, valid(1, **{HOSTILE: 0.5}), valid(2, **{HOSTILE: 40.5})]
    page = build(tmp_path / "run<b>", records, hostile, HOSTILE)  # build() checks that no element came of it
    assert page.text.count("<script>alert('x')</script>") >= 15
    assert "run run<b>" in page.text


@pytest.mark.parametrize(
    "result",
    [
        {"table": "no list", "table_columns": 3, "speed": [1], "time_split": "x", "machine": None, "notes": {"a": 1}},
        {"table": [1, None, {"a": {"b": [1, None]}}], "data": {"nested": {"x": [1, 2]}}, "title": 5, "protocol": []},
        {"time_split": {"forward": -1, "copy": None, "other": float("nan"), "sync": "x"}},
        {"title": "lone \ud800 surrogate", "command": "\udfff"},
        {"title": "{title} {style} {body} %s"},
    ],
)
def test_a_result_of_odd_shape_still_gives_a_page(tmp_path, result):
    build(tmp_path, result=result)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nan", "\0"])
def test_a_damaged_result_is_said(tmp_path, text):
    (tmp_path / "result.json").write_text(text, encoding="utf-8")
    assert "The result is left out: result.json" in build(tmp_path).text


def test_damaged_metrics_are_said_with_their_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n', encoding="utf-8")
    assert "metrics.jsonl:2: expected one JSON object" in build(tmp_path).text


def test_long_curves_are_thinned_but_extremes_and_last_are_exact(tmp_path):
    records = [train(step, loss=math.sin(step) + step / 1000) for step in range(1, 5001)]
    records[2500]["loss"] = 77.25
    records[3500]["loss"] = -33.5
    page = build(tmp_path, records)
    (curve,) = page.all("polyline", "curve")
    assert 200 <= len((curve["points"] or "").split()) <= 400
    assert len(page.all("polygon", "band")) == 1
    assert "77.25 at 2,501" in page.text
    assert "-33.5 at 3,501" in page.text
    assert f"last {records[-1]['loss']:.4g} at step 5,000" in page.text


@pytest.mark.parametrize("count", [0, 1, 399, 400, 401, 1000, 4001])
def test_thinning_equals_a_slow_loop_over_neighbours(count):
    points = [(float(i), None if i % 7 == 0 else math.cos(i)) for i in range(count)]
    size = max(1, math.ceil(count / 400))
    want = []
    position = 0
    while position < count:
        xs, ys = [], []
        for i in range(position, min(position + size, count)):
            xs.append(points[i][0])
            if (y := points[i][1]) is not None:
                ys.append(y)
        mean = math.fsum(ys) / len(ys) if ys else None
        want.append((math.fsum(xs) / len(xs), mean, min(ys, default=None), max(ys, default=None)))
        position += size
    got = thin(points)
    assert len(got) <= 400
    for bucket, (x, mean, low, high) in zip(got, want, strict=True):
        assert bucket.x == pytest.approx(x)
        assert bucket.y == (None if mean is None else pytest.approx(mean))
        assert (bucket.low, bucket.high) == (low, high)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.04, 0.187), (-3, 8), (0, 1e-3), (4.6, 8.2), (1e5, 1.001e5), (-1e99, 1e99), (0, 2e-79), (2.5e6, 9e6)],
)
@pytest.mark.parametrize("at_most", [4, 5, 6])
def test_axes_cover_the_data_with_few_round_ticks_and_distinct_labels(low, high, at_most):
    found = axis(low, high, at_most=at_most)
    slack = (found.high - found.low) * 1e-6
    assert found.low <= low + slack
    assert found.high >= high - slack
    assert 2 <= len(found.ticks) <= at_most + 2
    assert len(set(found.labels)) == len(found.labels) == len(found.ticks)
    gap = found.ticks[1] - found.ticks[0]
    assert f"{gap:.6e}"[0] in "125"
    assert f"{gap:.6e}"[2:8] == "000000"
    assert found.high - found.low < 3 * (high - low)


@pytest.mark.parametrize(("low", "high"), [(1, 3), (0, 1), (10, 12000), (7, 7), (10**15, 10**15 + 1)])
def test_step_axes_have_whole_numbers(low, high):
    ticks = axis(low, high, whole=True).ticks
    assert all(tick == round(tick) for tick in ticks)
    assert len(set(ticks)) == len(ticks)


def test_labels_of_close_last_values_do_not_overlap(tmp_path):
    page = build(tmp_path, [valid(1, **{f"metric{i}": 0.5 + i / 1e6 for i in range(8)})])
    heights = sorted(float(attrs["y"] or "nan") for attrs in page.all("text", "end"))
    assert len(heights) == 8
    assert all(upper - lower >= 12 for lower, upper in pairwise(heights))


def test_more_metrics_than_colours_are_named_but_not_drawn(tmp_path):
    page = build(tmp_path, [valid(step, **{f"m{i}": 0.1 for i in range(10)}) for step in (1, 2)])
    assert len(page.all("polyline", "curve")) == report.MAX_LINES
    assert "Also in metrics.jsonl: m8, m9." in page.text


def test_a_metric_beyond_one_has_its_own_chart_and_bookkeeping_has_none(tmp_path):
    values = {"NDCG@10": 0.2, "mean_rank": 500.0, "elapsed_s": 12.0, "num_users": 10, "time_forward": 0.5}
    page = build(tmp_path, [valid(1, **values)])
    assert [attrs["aria-label"] for attrs in page.all("svg")] == [
        "Validation metrics by step: NDCG@10 ends at 0.2",
        "Validation mean rank by step: mean_rank ends at 500",
    ]


def test_steps_per_second_stand_in_where_samples_are_not_known(tmp_path):
    page = build(tmp_path, [train(1, steps_per_s=5.0)])
    assert "Throughput, steps per second" in page.text


def test_the_time_split_comes_from_the_records_where_the_result_has_none(tmp_path):
    records = [train(1, time_forward=0.5, time_backward=0.5), train(2, time_forward=0.7, time_backward=0.3)]
    page = build(tmp_path, records)
    assert "forward 60.0%" in page.text
    assert "backward 40.0%" in page.text
    assert len(page.all("span", "part")) == 2


def test_the_same_folder_gives_the_same_page(tmp_path):
    records = [train(1, loss=1.0), train(2, loss=0.5)]
    build(tmp_path, records, RESULT, "a: 1\n")
    first = (tmp_path / "report.html").read_bytes()
    build(tmp_path, records, RESULT, "a: 1\n")
    assert (tmp_path / "report.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "result.json",
    ]
