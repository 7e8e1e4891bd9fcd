"""Ranked galleries are written whole and escaped, and the page shows right and wrong without loading anything."""

import base64
import csv
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from apps.reid.dataset import NIR, RGB, TEXT, Frame, PackedImages, People, make_texts
from apps.reid.evaluate import Ranked
from apps.reid.images import read_image
from apps.reid.sheet import choose_queries, write_ranking, write_sheet


@pytest.fixture
def people() -> People:
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (6, 3, 6, 4), generator=generator).to(torch.uint8)
    return People(
        identity=torch.tensor([0, 0, 1, 1, 2, 2]),
        camera=torch.full((6,), -1),
        modality=torch.tensor([RGB, NIR, RGB, NIR, RGB, NIR]),
        view=torch.full((6,), -1),
        caption=torch.tensor([0, -1, 1, -1, -1, -1]),
        captions=make_texts(['a man, "tall" <b>& bold</b>', "a woman"]),
        path=make_texts(["a,b.png", "b.png", 'c"<d>.png', "d.png", "e\udcff.png", "f.png"]),
        images=PackedImages(Path("none"), Frame(4, 2, 1, 1), picture),
        identity_ids=("<one>", "two", "three"),
        num_identities=0,
        num_valid=0,
        valid=None,
        test=None,
        fingerprint="",
        name="made up",
        split="",
    )


RANKED = (
    Ranked((NIR, TEXT), (1, 0), 0, (0, 2, 4), (0.9, 0.5, -0.25), (True, False, False)),
    Ranked((NIR, TEXT), (3, 1), 1, (4, 0, 2), (0.8, 0.7, 0.6), (False, False, True)),
    Ranked((NIR, TEXT), (5, 1), 2, (0, 2), (0.4, 0.3), (False, False)),
)


def test_table_has_a_line_per_gallery_image(people: People, tmp_path: Path):
    file = tmp_path / "ranking.csv"
    assert write_ranking(file, people, iter(RANKED)) == 3
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as text:
        rows = list(csv.DictReader(text))
    assert len(rows) == 8
    assert rows[0] == {
        "number": "1",
        "query": 'b.png + a man, "tall" <b>& bold</b>',
        "rank": "1",
        "gallery": "a,b.png",
        "score": "0.900000",
        "right": "right",
    }
    assert [row["gallery"] for row in rows[3:6]] == ["e\udcff.png", "a,b.png", 'c"<d>.png']
    assert [row["right"] for row in rows[3:6]] == ["wrong", "wrong", "right"]
    assert [(row["number"], row["rank"]) for row in rows[6:]] == [("3", "1"), ("3", "2")]


def test_table_of_no_query_is_a_head(people: People, tmp_path: Path):
    assert write_ranking(tmp_path / "ranking.csv", people, []) == 0
    assert (tmp_path / "ranking.csv").read_text() == "number,query,rank,gallery,score,right\n"


class Page(HTMLParser):
    """Tags, sources and words of a page; raises where tags do not match."""

    VOID = ("img", "meta", "br")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def every(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_shows_every_image_within_itself(people: People, tmp_path: Path):
    file = tmp_path / "sheet.html"
    assert write_sheet(file, people, RANKED, title="NIR+TEXT <test>", notes=["demo & more"]) == 3
    page = Page(file)
    text = file.read_text(encoding="utf-8")
    assert not page.every("script")
    assert not page.every("link")
    assert not re.search(r"https?:|url\(|@import", text)
    sources = [str(image["src"]) for image in page.every("img")]
    assert len(sources) == 3 + 8
    prefix = "data:image/png;base64,"
    expected = [row for query in RANKED for row in (query.item[0], *query.gallery)]
    for source, row in zip(sources, expected, strict=True):
        assert source.startswith(prefix)
        (tmp_path / "one.png").write_bytes(base64.b64decode(source.removeprefix(prefix)))
        shown = people.images.load(torch.tensor([row]))[0, :, 1:5, 1:3]
        assert torch.equal(read_image(tmp_path / "one.png"), shown)


def test_page_says_right_and_wrong_in_words_and_in_shape(people: People, tmp_path: Path):
    file = tmp_path / "sheet.html"
    write_sheet(file, people, RANKED, title="t")
    page = Page(file)
    kinds = [figure["class"] for figure in page.every("figure") if "class" in figure]
    assert kinds == ["right", "wrong", "wrong", "wrong", "wrong", "right", "wrong", "wrong"]
    assert page.words.count("right") - page.words.count(".right") >= 2
    assert "1. right" in page.words
    assert "2. wrong" in page.words
    assert ["right" in str(image["alt"]) for image in page.every("img")].count(True) == 2
    style = re.search(r"\.wrong img \{[^}]*\}", file.read_text())
    assert style is not None
    assert "dashed" in style[0]


def test_page_escapes_what_comes_from_data(people: People, tmp_path: Path):
    file = tmp_path / "sheet.html"
    write_sheet(file, people, RANKED, title="NIR+TEXT <test>", notes=["demo & more"])
    page = Page(file)
    for words in ('a man, "tall" <b>& bold</b>', "<one>", "NIR+TEXT <test>", "demo & more", "3 of 3 queries"):
        assert words in page.words
    assert {image["title"] for image in page.every("img")} >= {'c"<d>.png', "e?.png"}


def test_queries_are_chosen_evenly_or_the_worst_first():
    first = [0, 3, 1, 0, 9, 2]  # wrong images before a right one; 9: none is right
    ranked = [
        Ranked((NIR,), (0,), 0, (0,) * 5, (0.0,) * 5, tuple(rank == wrong for rank in range(5))) for wrong in first
    ]
    assert choose_queries(ranked, limit=4, first="wrong") == [4, 1, 5, 2]
    assert choose_queries(ranked, limit=3, first="mixed") == [0, 2, 4]
    assert choose_queries(ranked, limit=9, first="mixed") == [0, 1, 2, 3, 4, 5]
    assert choose_queries([], limit=9, first="mixed") == []


def test_page_holds_as_many_queries_as_asked_for(people: People, tmp_path: Path):
    file = tmp_path / "sheet.html"
    assert write_sheet(file, people, RANKED, title="t", limit=1, first="wrong") == 1
    page = Page(file)
    assert len(page.every("section")) == 1
    assert "query 3: three" in page.words
    assert "1 of 3 queries" in page.words


def test_large_images_are_shown_smaller(people: People, tmp_path: Path):
    picture = torch.zeros(6, 3, 300, 150, dtype=torch.uint8)
    large = dataclasses.replace(people, images=PackedImages(Path("none"), Frame(256, 128, 22, 11), picture))
    file = tmp_path / "sheet.html"
    write_sheet(file, large, RANKED[:1], title="t")
    source = str(Page(file).every("img")[0]["src"]).partition(",")[2]
    (tmp_path / "one.png").write_bytes(base64.b64decode(source))
    assert read_image(tmp_path / "one.png").shape == (3, 128, 64)
