"""Ranked galleries as files: a table, and a page of images on which right and wrong hits are seen at a glance.

The page is one file without scripts that loads nothing, so that it opens offline and can be sent to somebody.
"""

import base64
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Literal

import torch

from apps.reid.augment import centre_crop
from apps.reid.dataset import MODALITIES, TEXT, People
from apps.reid.evaluate import Ranked
from apps.reid.images import png_bytes, resize
from shared.files import atomic_writer

COLUMNS = ("number", "query", "rank", "gallery", "score", "right")
IMAGE_HEIGHT = 128  # of images on the page, at most

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #1b1f24; background: #fff; }
h1 { font-size: 1.3em; }
section { display: flex; gap: 1.5em; align-items: flex-start; border-top: 1px solid #d0d7de; padding: 1em 0; }
.query { flex: 0 0 17em; display: flex; flex-wrap: wrap; gap: .6em; }
.query h2 { font-size: 1em; margin: 0; flex: 1 0 100%; }
.query blockquote { margin: 0; font-style: italic; }
.found { display: flex; flex-wrap: wrap; gap: .6em; margin: 0; padding: 0; list-style: none; }
figure { margin: 0; text-align: center; font-size: 12px; }
img { display: block; margin: 0 auto; }
.right img { border: 4px solid #1a7f37; }
.wrong img { border: 4px dashed #cf222e; }
.right b { color: #1a7f37; }
.wrong b { color: #cf222e; }
.note { color: #57606a; }
"""


def write_ranking(output: Path, people: People, ranked: Iterable[Ranked]) -> int:
    """The number of queries that were written as a CSV table: COLUMNS, a line per gallery image.

    The items of a query stand behind one another, " + " between them: paths of images, captions as they are.
    """
    count = 0
    with atomic_writer(output) as file:
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for count, query in enumerate(ranked, 1):
            asked = " + ".join(words for _, words in items_of(people, query))
            found = zip(query.gallery, query.score, query.is_right, strict=True)
            for rank, (row, score, is_right) in enumerate(found, 1):
                verdict = "right" if is_right else "wrong"
                table.writerow((count, asked, rank, people.path[row], f"{score:.6f}", verdict))
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # paths may hold any bytes
            text.seek(0)
            text.truncate()
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # of nothing, the columns alone
    return count


def items_of(people: People, query: Ranked) -> Iterator[tuple[int, str]]:
    """The modality of every item of a query, and the path of its image or the caption."""
    for modality, item in zip(query.modalities, query.item, strict=True):
        yield modality, people.captions[item] if modality == TEXT else people.path[item]


def write_sheet(
    output: Path,
    people: People,
    ranked: Sequence[Ranked],
    *,
    title: str,
    notes: Sequence[str] = (),
    limit: int = 40,
    first: Literal["wrong", "mixed"] = "mixed",
) -> int:
    """The number of queries shown, `limit` at most, on a page: the query at the left, beside it what was found for it.

    mixed: queries from all over the list, evenly. wrong: those whose first image is wrong, the worst first.
    """
    chosen = choose_queries(ranked, limit=limit, first=first)
    shown = (
        f"{len(chosen):,} of {len(ranked):,} queries, "
        + {
            "mixed": "evenly from the list",
            "wrong": "those first whose best right image comes late",
        }[first]
    )
    with atomic_writer(output) as file:
        head = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        lines = [f"{head}<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"]
        lines += [f'<p class="note">{escape(note)}</p>' for note in (*notes, shown)]
        for line in lines:
            file.write(encoded(line + "\n"))
        for place in chosen:
            file.write(encoded(_section(people, place + 1, ranked[place])))
        file.write(b"</body>\n</html>\n")
    return len(chosen)


def encoded(text: str) -> bytes:
    """UTF-8; bytes of paths that are none become question marks."""
    return text.encode("utf-8", "replace")


def choose_queries(ranked: Sequence[Ranked], *, limit: int, first: Literal["wrong", "mixed"]) -> list[int]:
    """Places of at most `limit` queries, in the order to show them."""
    count = min(limit, len(ranked))
    if first == "mixed":
        return [place * len(ranked) // count for place in range(count)]

    def first_right(place: int) -> int:
        """How many wrong images come first."""
        is_right = ranked[place].is_right
        return is_right.index(True) if True in is_right else len(is_right) + 1

    return sorted(range(len(ranked)), key=lambda place: (-first_right(place), place))[:count]


def _section(people: People, number: int, query: Ranked) -> str:
    """A query and what was found for it."""
    parts = [f'<section>\n<div class="query"><h2>query {number}: {escape(people.identity_ids[query.identity])}</h2>']
    for item, (modality, words) in zip(query.item, items_of(people, query), strict=True):
        name = MODALITIES[modality]
        if modality == TEXT:
            parts.append(f"<blockquote>{escape(words)}</blockquote>")
        else:
            (source,) = _images(people, [item])
            image = _image(source, f"query, {name}", words)
            parts.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    parts.append('</div>\n<ol class="found">')
    found = zip(query.gallery, query.score, query.is_right, _images(people, query.gallery), strict=True)
    for rank, (row, score, is_right, source) in enumerate(found, 1):
        verdict = "right" if is_right else "wrong"
        who = escape(people.identity_ids[int(people.identity[row])])
        caption = f"<figcaption>{rank}. <b>{verdict}</b><br>{who}<br>{score:.3f}</figcaption>"
        image = _image(source, f"rank {rank}, {verdict}", people.path[row])
        parts.append(f'<li><figure class="{verdict}">{image}{caption}</figure></li>')
    parts.append("</ol>\n</section>\n")
    return "\n".join(parts)


def _images(people: People, rows: Sequence[int]) -> Iterator[str]:
    """The images of these rows as data that stands in the page itself, as large as the page shows them."""
    frame = people.images.frame
    height = min(IMAGE_HEIGHT, frame.height)
    width = max(1, round(frame.width * height / frame.height))
    for image in centre_crop(people.images.load(torch.tensor(rows, dtype=torch.int64)), frame[:2]):
        data = base64.b64encode(png_bytes(resize(image, height, width))).decode("ascii")
        yield f"data:image/png;base64,{data}"


def _image(source: str, words: str, path: str) -> str:
    return f'<img src="{source}" alt="{escape(words)}" title="{escape(path)}">'
