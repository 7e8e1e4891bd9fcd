"""shared.report: the page of a ladder shows every row, draws every factor, and loads nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shared.report import build_report, log_axis
from tests.shared.test_shared_report import HOSTILE, Page, check_nothing_is_loaded


def spread(median: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"median": median, "low": median if low is None else low, "high": median if high is None else high}


def row(name: str, factor: dict[str, float | None] | None, verdict: str = "faster", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "text": f"how {name} does it",
        "claim": "",
        "steps": 3,
        "samples_per_s": spread(1200.0, 1100.0, 1300.0),
        "steps_per_s": spread(9.375),
        "factor": factor,
        "gain": None,
        "verdict": verdict,
        "host_bytes": 3 << 20,
        "device_bytes": None,
        **more,
    }


def part(*rows: dict[str, Any], title: str = "training, each alone") -> dict[str, Any]:
    return {"name": "alone", "title": title, "kind": "train", "unit": "pairs", "cumulative": False, "rows": list(rows)}


ORIGINAL = row("original", None, "the original")


def record(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "app": "toy",
        "title": "toy: the ladder",
        "notes": ["demo data"],
        "protocol": "5 repeats of every row",
        "parts": list(parts),
        "unmeasured": [],
        "projection": None,
        "machine": {"cpu": "a CPU"},
        "command": "python -m apps.toy bench",
        "git": None,
        **more,
    }


def check_coordinates(page: Page) -> None:
    """Everything drawn stands inside its picture."""
    width = height = 0.0
    for tag, attrs in page.elements:
        if tag == "svg":
            _, _, width, height = map(float, str(attrs["viewbox"]).split())
        for names, limit in ((("x", "x1", "x2"), width), (("y", "y1", "y2"), height)):
            for name in names:
                assert 0 <= float(attrs.get(name) or 0) <= limit, (tag, attrs)
        if tag == "rect":
            assert float(str(attrs["x"])) + float(str(attrs["width"])) <= width


def bars(page: Page) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in page.elements if tag == "rect"]


def build(folder: Path, found: object) -> Page:
    text = found if isinstance(found, str) else json.dumps(found)
    (folder / "bench.json").write_text(text, encoding="utf-8")
    html = build_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    check_nothing_is_loaded(html, page)
    check_coordinates(page)
    return page


def test_every_row_has_its_numbers_its_words_and_its_claim(tmp_path: Path):
    faster = row("attention", spread(1.34, 1.3, 1.5), claim="S3-25: +30-50 %")
    slower = row("other", spread(0.5, 0.4, 0.6), "slower", device_bytes=5 << 20)
    page = build(tmp_path, record(part(ORIGINAL, faster, slower)))
    for words in (
        "training, each alone",
        "5 repeats of every row",
        "pairs/s",
        "attention how attention does it 1,200 1,100 .. 1,300 9.375",
        "1.34 1.3 .. 1.5",
        "faster",
        "S3-25: +30-50 %",
        "slower",
        "3.0 MiB",
        "5.0 MiB",
        "not measured",
        "python -m apps.toy bench",
        "a CPU",
        "demo data",
    ):
        assert words in page.text, words


def test_a_bar_begins_at_one_and_ends_at_its_factor_on_a_logarithmic_axis(tmp_path: Path):
    page = build(
        tmp_path,
        record(part(ORIGINAL, row("four", spread(4.0)), row("two", spread(2.0)), row("half", spread(0.5), "slower"))),
    )
    four, two, half = ((float(str(bar["x"])), float(str(bar["width"]))) for bar in bars(page))
    assert four[0] == two[0]
    assert four[1] == pytest.approx(2 * two[1], abs=0.2)
    assert half[1] == pytest.approx(two[1], abs=0.2)
    assert half[0] + half[1] == pytest.approx(two[0], abs=0.2)


def test_bars_of_other_verdicts_have_other_colours(tmp_path: Path):
    verdicts = ("faster", "no gain on this machine", "slower")
    rows = [row(str(i), spread(1.0 + i), verdict) for i, verdict in enumerate(verdicts)]
    page = build(tmp_path, record(part(ORIGINAL, *rows)))
    assert len({bar["class"] for bar in bars(page)}) == 3


def test_a_whisker_spans_the_repeats(tmp_path: Path):
    page = build(tmp_path, record(part(ORIGINAL, row("two", spread(2.0, 1.0, 4.0)))))
    (bar,) = bars(page)
    whisker = [line for line in page.all("line", "axis") if line["y1"] == line["y2"]][-1]
    begin, width = float(str(bar["x"])), float(str(bar["width"]))
    assert float(str(whisker["x1"])) == pytest.approx(begin, abs=0.2)
    assert float(str(whisker["x2"])) == pytest.approx(begin + 2 * width, abs=0.2)


def test_a_chart_for_every_part(tmp_path: Path):
    parts = [part(ORIGINAL, row("a", spread(2.0)), title=title) for title in ("first", "second")]
    page = build(tmp_path, record(*parts))
    assert len(page.all("svg")) == 2
    assert "first" in page.text
    assert "second" in page.text


def test_what_a_step_of_a_cumulative_part_adds_is_a_column(tmp_path: Path):
    gained = row("b", spread(2.0), gain=spread(1.6, 1.5, 1.7))
    page = build(tmp_path, record(part(ORIGINAL, gained)))
    assert "of this step" in page.text
    assert "1.6 1.5 .. 1.7" in page.text
    assert "of this step" not in build(tmp_path, record(part(ORIGINAL, row("b", spread(2.0))))).text


def test_a_projection_and_what_is_not_measured_are_told(tmp_path: Path):
    hours = {"train_h": 10.5, "evaluation_h": 2.25, "total_h": 12.75}
    projection = {"epochs": 1000, "samples": 922007, "evaluated": 5, "original": hours, "ours": hours, "factor": 1.0}
    unmeasured = [{"claim": "S3-28: accuracy", "why": "it takes whole trainings"}]
    page = build(tmp_path, record(part(ORIGINAL), projection=projection, unmeasured=unmeasured))
    assert "1,000 epochs of 922,007 samples" in page.text
    assert "12.75" in page.text
    assert "S3-28: accuracy: it takes whole trainings" in page.text


@pytest.mark.parametrize("found", ["{", "[]", "{}", '{"parts": 3}', '{"parts": [{"rows": [1, {"factor": 2}]}]}'])
def test_a_damaged_record_still_makes_a_page(tmp_path: Path, found: str):
    assert build(tmp_path, found).all("h1")


def test_factors_that_cannot_be_drawn_are_left_out_of_the_chart(tmp_path: Path):
    strange = [row("zero", spread(0.0)), row("none", spread(1.0, None, math.inf)), row("huge", spread(1e99))]
    page = build(tmp_path, record(part(ORIGINAL, *strange)))
    assert len(bars(page)) == 1
    assert "zero" in page.text


def test_hostile_names_stay_text(tmp_path: Path):
    page = build(tmp_path, record(part(ORIGINAL, row(HOSTILE, spread(2.0), HOSTILE, claim=HOSTILE), title=HOSTILE)))
    assert HOSTILE in "".join(page.words)


@pytest.mark.parametrize(
    ("low", "high", "powers"), [(1.0, 1.0, (0, 1)), (0.3, 0.9, (-2, 0)), (1.1, 5.0, (0, 3)), (0.5, 2.0, (-1, 1))]
)
def test_the_axis_holds_one_and_all_factors(low: float, high: float, powers: tuple[int, int]):
    assert log_axis(low, high) == powers


def test_a_folder_of_a_run_keeps_its_own_page(tmp_path: Path):
    (tmp_path / "result.json").write_text('{"title": "a run"}', encoding="utf-8")
    page = Page(build_report(tmp_path).read_text(encoding="utf-8"))
    assert "Curves" in page.text
