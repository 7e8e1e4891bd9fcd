"""One self-contained HTML page about a run, made from the files in its folder; it loads nothing and runs no script.

A run of `train` gets its curves, metrics and split of time; one of `bench` its ladder, from bench.json.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from shared.files import atomic_write_text
from shared.ladder import BENCH_NAME, FASTER, ORIGINAL, SLOWER
from shared.log import METRICS_NAME, read_metrics
from shared.timing import SECTIONS

REPORT_NAME = "report.html"
RESULT_NAME = "result.json"
CONFIG_NAME = "config.yaml"

MAX_POINTS = 400  # per line; more would only paint the same pixels again
MAX_LINES = 8  # per chart: as many as there are colours that can be told apart
_DOTTED = 60  # a line of at most this many points shows each of them, with its value on hover
_LARGEST = 1e100  # larger numbers are treated as missing, so that no coordinate can overflow
_SMALLEST = 1e-80  # smaller ones as 0, so that none can underflow

_WIDTH, _HEIGHT = 540, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 62, 12, 42  # margins around the plot

_TIME_TITLE = "Where a step's time goes"
_SECTION_WORDS = {
    "data_wait": "waiting for data",
    "copy": "copy to the device",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "sync": "reading numbers back",
    "other": "other",
}
_BARS_WIDTH, _BARS_LEFT, _BARS_RIGHT, _BARS_TOP, _BAR_STEP = 900, 190, 62, 26, 28
_VERDICT_COLOURS, _UNDECIDED_COLOUR = {FASTER: 2, SLOWER: 1}, 7  # of _COLOURS
_PROJECTED = {"training": "train", "evaluation": "evaluation", "together": "total"}
_NOT_MEASURES = ("time_", "num_", "elapsed")  # a validation record's own bookkeeping, not a metric


def build_report(run_dir: Path) -> Path:
    """The path of the run's report.html, made from those of metrics.jsonl, result.json and config.yaml that exist."""
    if not run_dir.is_dir():
        raise ValueError(f"run folder {run_dir} does not exist; name a folder that `train` has made")
    if (run_dir / BENCH_NAME).is_file():
        return _build_bench(run_dir)
    records, metrics_fault = _load_metrics(run_dir / METRICS_NAME)
    result, result_fault = _load_result(run_dir / RESULT_NAME)
    config_path = run_dir / CONFIG_NAME
    config = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else None
    body = [
        _header(run_dir.resolve().name, result, records),
        _result_section(result, result_fault),
        _curves_section(records, metrics_fault),
        _time_section(result, records),
        _facts_section(result),
        _config_section(config),
    ]
    return _write_page(run_dir, result, body)


def _build_bench(run_dir: Path) -> Path:
    """The page of a ladder."""
    found, fault = _load_object(run_dir / BENCH_NAME)
    parts = [_mapping(part) for part in _sequence(found.get("parts"))]
    body = [
        _header(run_dir.resolve().name, found, []),
        *([_section("Ladder", _missing(f"The ladder is left out: {fault}"))] if fault else []),
        f'<p class="protocol"><b>Protocol</b> {_text(found.get("protocol"))}</p>',
        *(_ladder_section(part) for part in parts),
        _unmeasured_section(found),
        _projection_section(_mapping(found.get("projection"))),
        _facts_section(found),
    ]
    return _write_page(run_dir, found, body)


def _write_page(run_dir: Path, result: Mapping[str, Any], body: Sequence[str]) -> Path:
    title = escape(str(result.get("title") or run_dir.resolve().name))
    page = _PAGE.format(title=title, style=_STYLE, body="\n".join(body))
    path = run_dir / REPORT_NAME
    # A lone surrogate from a JSON escape cannot be written as UTF-8: it becomes a question mark.
    atomic_write_text(path, page.encode("utf-8", errors="replace").decode("utf-8"))
    return path


# Reading the folder


def _load_metrics(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records, and what is wrong if there are none to show."""
    if not path.is_file():
        return [], f"This folder has no {METRICS_NAME}, so there are no curves."
    try:
        records = read_metrics(path)
    except ValueError as error:
        return [], f"The curves are left out: {error}"
    return records, "" if records else f"{METRICS_NAME} has no records yet, so there are no curves."


def _load_result(path: Path) -> tuple[dict[str, Any], str]:
    """The result, and what is wrong if there is none."""
    if not path.is_file():
        return {}, f"This folder has no {RESULT_NAME}: the run has not reached its end."
    result, fault = _load_object(path)
    return result, f"The result is left out: {fault}" if fault else ""


def _load_object(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object of a file, and what is wrong if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:
        return {}, f"{path.name} is not valid JSON ({error})."
    if not isinstance(found, dict):
        return {}, f"{path.name} holds no JSON object."
    return found, ""


def _mapping(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def _sequence(value: object) -> list[Any]:
    return list(value) if isinstance(value, list) else []


def _finite(value: object) -> float | None:
    """The number, or None where it is none that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return None
    return float(value) if abs(value) > _SMALLEST else 0.0


# Numbers as text


def _number(value: float) -> str:
    """A number short enough to be read at a glance."""
    size = abs(value)
    if 1e6 <= size < 1e9:
        return f"{value / 1e6:.4g}M"
    if size and (size >= 1e9 or size < 1e-3):
        return f"{value:.3g}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _text(value: object) -> str:
    """Any JSON value as escaped text."""
    if value is None:
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return escape(value)
    return escape(json.dumps(value, ensure_ascii=False))


def _words(name: str) -> str:
    """A key as words: samples_per_s becomes samples/s, training_s becomes training (s)."""
    words = name.replace("_per_s", "/s")
    if words.endswith("_s"):
        words = f"{words.removesuffix('_s')} (s)"
    return escape(words.replace("_", " "))


def _minute(record: Mapping[str, Any]) -> str:
    """When a record was written, to the minute; empty where it does not say."""
    try:
        return datetime.fromisoformat(str(record.get("time"))).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def _missing(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


# Sections


def _section(title: str, *parts: str) -> str:
    return "\n".join(["<section>", f"<h2>{title}</h2>", *parts, "</section>"])


def _header(run_name: str, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    chips = [("run", escape(run_name))]
    if result.get("app"):
        chips.insert(0, ("app", _text(result["app"])))
    steps = [step for record in records if (step := _finite(record.get("step"))) is not None]
    if steps:
        chips.append(("steps", f"{max(steps):,.0f}"))
    stamps = [stamp for record in records if (stamp := _minute(record))]
    if stamps:
        chips += [("first record", stamps[0]), ("last record", stamps[-1])]
    notes = [f"<li>{_text(note)}</li>" for note in _sequence(result.get("notes"))]
    return "\n".join(
        [
            "<header>",
            f"<h1>{_text(result.get('title') or run_name)}</h1>",
            '<p class="chips">',
            *(f'<span class="chip"><span class="key">{key}</span> {value}</span>' for key, value in chips),
            "</p>",
            *(['<ul class="notes">', *notes, "</ul>"] if notes else []),
            "</header>",
        ]
    )


def _result_section(result: Mapping[str, Any], fault: str) -> str:
    if fault:
        return _section("Result", _missing(fault))
    protocol = result.get("protocol")
    said = _text(protocol) if protocol else "not recorded, so these numbers compare with nothing"
    parts = [f'<p class="protocol"><b>Protocol</b> {said}</p>']
    rows = [_mapping(row) for row in _sequence(result.get("table"))]
    columns = [str(column) for column in _sequence(result.get("table_columns"))]
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    parts.append(_table(rows, columns) if rows else _missing(f"{RESULT_NAME} has no table of metrics."))
    speed = _mapping(result.get("speed"))
    if speed:
        machine = _mapping(result.get("machine"))
        where = machine.get("gpu") or machine.get("cpu")
        parts.append(f"<h3>Speed{f' on {_text(where)}' if where else ''}</h3>")
        parts.append('<dl class="tiles">')
        parts += [f"<div><dt>{_words(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in speed.items()]
        parts.append("</dl>")
    return _section("Result", *parts)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, mark_best: bool = True) -> str:
    best = {column: _best_rows(rows, column) if mark_best else set() for column in columns}
    head = "".join(f'<th scope="col"{_numeric(rows, column)}>{escape(column)}</th>' for column in columns)
    body = []
    for index, row in enumerate(rows):
        cells = []
        for column in columns:
            value = row.get(column)
            shown = f"{value:.4f}" if isinstance(value, float) and 1e-3 <= abs(value) < 10 else _text(value)
            if index in best[column]:
                shown = f'<strong class="best" title="best of the column">&#9733; {shown}</strong>'
            cells.append(f"<td{_numeric(rows, column)}>{shown}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    note = '<p class="small">&#9733; best of the column</p>' if any(best.values()) else ""
    return "\n".join(
        [
            '<div class="wide"><table class="metrics">',
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *body,
            "</tbody></table></div>",
            note,
        ]
    )


def _numeric(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    return ' class="num"' if any(_finite(row.get(column)) is not None for row in rows) else ""


def _best_rows(rows: Sequence[Mapping[str, Any]], column: str) -> set[int]:
    """The rows with the column's best number; none where there is nothing to compare with."""
    values = {index: value for index, row in enumerate(rows) if (value := _finite(row.get(column))) is not None}
    if len(values) < 2 or len(set(values.values())) < 2:
        return set()
    lower_is_better = any(word in column.lower() for word in ("loss", "perplexity", "mean_rank", "mean rank"))
    best = min(values.values()) if lower_is_better else max(values.values())
    return {index for index, value in values.items() if value == best}


def _curves_section(records: Sequence[Mapping[str, Any]], fault: str) -> str:
    if fault:
        return _section("Curves", _missing(fault))
    train = [record for record in records if record.get("kind") == "train"]
    valid = [record for record in records if record.get("kind") == "valid"]
    cards = []
    left_out = []

    loss = [_line("training", train, "loss"), _line("validation", valid, "loss")]
    charts: list[tuple[str, list[Line], bool]] = [("Loss", [line for line in loss if line.known], False)]
    metrics = [line for name in _measures(valid) if (line := _line(name, valid, name)).known]
    fractions = [line for line in metrics if all(0 <= y <= 1 for _, y in line.known)]
    charts.append(("Validation metrics", fractions, False))
    charts += [
        (f"Validation {line.name.replace('_', ' ')}", [line], False) for line in metrics if line not in fractions
    ]
    charts.append(("Learning rate", [line for line in [_line("learning rate", train, "lr")] if line.known], True))
    rate = [_line("samples/s", train, "samples_per_s"), _line("steps/s", train, "steps_per_s")]
    charts.append(("Throughput, samples per second", [line for line in rate[:1] if line.known], True))
    if not rate[0].known and rate[1].known:
        charts[-1] = ("Throughput, steps per second", rate[1:], True)

    for title, lines, from_zero in charts:
        if lines:
            cards.append(_card(title, lines, from_zero=from_zero))
        else:
            left_out.append(title.partition(",")[0].lower())
    if left_out:
        cards.append(_missing(f"Left out, since {METRICS_NAME} has no such numbers: {', '.join(left_out)}."))
    legend = "&#9679; last &nbsp; &#9650; largest &nbsp; &#9660; smallest value. Horizontal axes count steps."
    return _section("Curves", f'<p class="small">{legend}</p>', '<div class="cards">', *cards, "</div>")


def _measures(valid: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the validation metrics, in the order in which they first appear."""
    names = dict.fromkeys(name for record in valid for name in record)
    own = {"kind", "step", "epoch", "time", "loss"}
    return [name for name in names if name not in own and not name.startswith(_NOT_MEASURES) and name[-2:] != "_s"]


def _time_section(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    split = {name: share for name, value in _mapping(result.get("time_split")).items() if (share := _finite(value))}
    source = "of the steps timed, from result.json"
    if not split:
        split = _mean_shares(records)
        source = f"mean of the training records in {METRICS_NAME}"
    split = {name: share for name, share in split.items() if share > 0}
    total = sum(split.values())
    if not total:
        return _section(_TIME_TITLE, _missing("No step was timed in this run, so the split is left out."))
    order = sorted(split, key=lambda name: SECTIONS.index(name) if name in SECTIONS else len(SECTIONS))
    bar, legend = [], []
    for index, name in enumerate(order):
        share = split[name] / total
        words = _SECTION_WORDS.get(name, name)
        colour = index % MAX_LINES
        label = f"{share:.0%}" if share >= 0.05 else ""
        bar.append(
            f'<span class="part b{colour}" style="width:{share * 100:.2f}%" title="{escape(words)} {share:.1%}">'
            f"{label}</span>"
        )
        legend.append(
            f'<li><span class="swatch b{colour}"></span>{escape(words)} <span class="num">{share:.1%}</span></li>'
        )
    note = f'<p class="small">Shares {escape(source)}.</p>'
    return _section(_TIME_TITLE, note, '<div class="bar">', *bar, "</div>", '<ul class="key-list">', *legend, "</ul>")


def _mean_shares(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each time_<section> over the training records that have it."""
    shares = {}
    for name in SECTIONS:
        found = [record.get(f"time_{name}") for record in records if record.get("kind") == "train"]
        values = [value for item in found if (value := _finite(item)) is not None]
        if values:
            shares[name] = sum(values) / len(values)
    return shares


def _facts_section(result: Mapping[str, Any]) -> str:
    groups = []
    for name, title in (("data", "Data"), ("machine", "Machine"), ("versions", "Versions")):
        facts = _mapping(result.get(name))
        if facts:
            rows = [
                f"<tr><th scope='row'>{_words(key)}</th><td>{_text(value)}</td></tr>" for key, value in facts.items()
            ]
            groups.append(f'<div class="card"><h3>{title}</h3><table class="facts">{"".join(rows)}</table></div>')
    command = result.get("command")
    origin = []
    if command:
        origin.append(f"<h3>Command</h3>\n<pre>{_text(command)}</pre>")
    if "git" in result:
        revision = result["git"]
        said = f"<code>{_text(revision)}</code>" if revision else "not known: the code was not in a git checkout"
        origin.append(f"<p>Git revision: {said}</p>")
    if not groups and not origin:
        return _section("How it was made", _missing("No command, data, machine or versions are recorded."))
    return _section("How it was made", *origin, '<div class="cards three">', *groups, "</div>")


def _config_section(config: str | None) -> str:
    if config is None:
        shown = _missing(f"This folder has no {CONFIG_NAME}, so the settings are left out.")
    else:
        shown = f'<pre class="long">{escape(config)}</pre>'
    return _section("Configuration", shown)


# The ladder of `bench`


def _ladder_section(part: Mapping[str, Any]) -> str:
    """A part: a bar per row, and the numbers."""
    rows = [_mapping(row) for row in _sequence(part.get("rows"))]
    title = _text(part.get("title") or part.get("name") or "part")
    if not rows:
        return _section(title, _missing("This part has no rows."))
    parts = []
    bars = [bar for row in rows if (bar := _ladder_bar(row)) is not None]
    if bars:
        parts.append(f'<div class="card">{_bars_svg(str(part.get("title")), bars)}</div>')
        parts.append(
            '<p class="small">How many times as many samples per second as the original, on a logarithmic axis; '
            "whiskers reach from the lowest to the highest repeat. Colours are of the verdict: "
            "green faster, orange slower, grey no gain.</p>"
        )
    unit = str(part.get("unit") or "samples")
    steps_in_between = any(_mapping(row.get("gain")) for row in rows)
    head = ["row", f"{unit}/s", "steps/s", "factor", *(["of this step"] if steps_in_between else [])]
    memory = {
        key: name
        for key, name in (("host_bytes", "memory, host"), ("device_bytes", "memory, device"))
        if key == "host_bytes" or any(row.get(key) is not None for row in rows)
    }
    head += ["verdict", *memory.values(), "claim"]
    lines = []
    for row in rows:
        text = f'<b>{_text(row.get("name"))}</b><br><span class="small">{_text(row.get("text"))}</span>'
        numbers = [_spread(row, "samples_per_s"), _spread(row, "steps_per_s"), _spread(row, "factor")]
        numbers += [_spread(row, "gain")] if steps_in_between else []
        verdict = row.get("verdict")
        shown = f'<strong class="best">{_text(verdict)}</strong>' if verdict == FASTER else _text(verdict)
        cells = [f'<td class="num">{number}</td>' for number in numbers]
        cells.append(f"<td>{shown}</td>")
        cells += [f'<td class="num">{_mebibytes(row.get(key))}</td>' for key in memory]
        claim = row.get("claim") or ("" if verdict == ORIGINAL else "ours")
        cells.append(f'<td class="small">{_text(claim)}</td>')
        lines.append(f"<tr><td>{text}</td>{''.join(cells)}</tr>")
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    parts.append(
        f'<div class="wide"><table class="metrics"><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody>'
        "</table></div>"
    )
    return _section(title, *parts)


def _spread(row: Mapping[str, Any], key: str) -> str:
    found = _mapping(row.get(key))
    values = [_finite(found.get(name)) for name in ("median", "low", "high")]
    if any(value is None for value in values):
        return "&ndash;"
    middle, low, high = (_number(value) for value in values if value is not None)
    return f'{middle}<br><span class="small">{low} .. {high}</span>'


def _mebibytes(value: object) -> str:
    found = _finite(value)
    return "not measured" if found is None else f"{found / 2**20:,.1f} MiB"


def _unmeasured_section(found: Mapping[str, Any]) -> str:
    rows = [_mapping(one) for one in _sequence(found.get("unmeasured"))]
    if not rows:
        return ""
    shown = [f"<li>{_text(row.get('claim'))}: {_text(row.get('why'))}</li>" for row in rows]
    return _section("Not measured", "<ul>", *shown, "</ul>")


def _projection_section(projection: Mapping[str, Any]) -> str:
    if not projection:
        return ""
    rows = []
    for side in ("original", "ours"):
        hours = _mapping(projection.get(side))
        rows.append({"": side} | {f"{name} (hours)": hours.get(f"{key}_h") for name, key in _PROJECTED.items()})
    said = (
        f"At the measured rates {_text(projection.get('epochs'))} epochs of {_text(projection.get('samples'))} samples"
        f", each with {_text(projection.get('evaluated'))} to evaluate, take:"
    )
    return _section("Projection", f"<p>{said}</p>", _table(rows, list(rows[0]), mark_best=False))


class Bar(NamedTuple):
    """One row of a chart: a factor with its spread."""

    name: str
    middle: float
    low: float
    high: float
    colour: int


def _ladder_bar(row: Mapping[str, Any]) -> Bar | None:
    """The bar of a row; none for the original, or without a factor that can be drawn."""
    found = _mapping(row.get("factor"))
    values = [value for name in ("median", "low", "high") if (value := _finite(found.get(name))) is not None]
    if len(values) < 3 or min(values) <= 0:
        return None
    colour = _VERDICT_COLOURS.get(str(row.get("verdict")), _UNDECIDED_COLOUR)
    middle, low, high = values
    return Bar(str(row.get("name")), middle, low, high, colour)


def _bars_svg(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from 1 to each factor on a logarithmic axis, with whiskers."""
    low, high = log_axis(min(bar.low for bar in bars), max(bar.high for bar in bars))
    height = _BARS_TOP + _BAR_STEP * len(bars)
    right = _BARS_WIDTH - _BARS_RIGHT

    def left_of(factor: float) -> float:
        return _BARS_LEFT + (math.log2(factor) - low) / (high - low) * (right - _BARS_LEFT)

    summary = "; ".join(f"{bar.name} {_number(bar.middle)} times" for bar in bars)
    parts = [f'<svg viewBox="0 0 {_BARS_WIDTH} {height}" role="img" aria-label="{escape(title)}: {escape(summary)}">']
    every = -(-(high - low) // 10)
    for power in range(low, high + 1):
        css = "axis" if power == 0 else "grid"
        x = left_of(2.0**power)
        if power % every == 0:
            parts.append(f'<line class="{css}" x1="{x:.1f}" y1="{_BARS_TOP}" x2="{x:.1f}" y2="{height}"/>')
            label = f"{2**power:,}" if power >= 0 else f"1/{2**-power:,}"
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_BARS_TOP - 6}" text-anchor="middle">{label}</text>')
    for index, bar in enumerate(bars):
        y = _BARS_TOP + _BAR_STEP * index + 6
        begin, end = sorted((left_of(1.0), left_of(bar.middle)))
        said = f"{bar.name}: {_number(bar.middle)} ({_number(bar.low)} .. {_number(bar.high)})"
        parts.append(
            f'<rect class="b{bar.colour}" x="{begin:.1f}" y="{y}" width="{max(end - begin, 1.0):.1f}" '
            f'height="{_BAR_STEP - 12}" rx="2"><title>{escape(said)}</title></rect>'
        )
        middle = y + (_BAR_STEP - 12) / 2
        parts.append(
            f'<line class="axis" x1="{left_of(bar.low):.1f}" y1="{middle:.1f}" x2="{left_of(bar.high):.1f}" '
            f'y2="{middle:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{_BARS_LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>'
        )
        parts.append(
            f'<text class="end" x="{right + 9}" y="{middle + 4:.1f}" fill="currentColor">x{_number(bar.middle)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def log_axis(low: float, high: float) -> tuple[int, int]:
    """The powers of two that hold the factors and 1 between them, at least one apart."""
    first, last = min(0, math.floor(math.log2(low))), max(0, math.ceil(math.log2(high)))
    return (first, last) if last > first else (first, last + 1)


# Charts


@dataclass(frozen=True)
class Line:
    """One curve: (step, value) in the order recorded, None where the value was not finite."""

    name: str
    points: list[tuple[float, float | None]]

    @property
    def known(self) -> list[tuple[float, float]]:
        """The points that have a value."""
        return [(x, y) for x, y in self.points if y is not None]


class Bucket(NamedTuple):
    """Neighbouring points as one: their mean step, mean value and range; None where none of them has a value."""

    x: float
    y: float | None
    low: float | None
    high: float | None


class Axis(NamedTuple):
    """A range whose ends and ticks are round numbers."""

    low: float
    high: float
    ticks: list[float]
    labels: list[str]


def _line(name: str, records: Sequence[Mapping[str, Any]], key: str) -> Line:
    points = []
    for record in records:
        step = _finite(record.get("step"))
        if step is not None and key in record:
            points.append((step, _finite(record[key])))
    return Line(name, points)


def thin(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[Bucket]:
    """At most `limit` buckets of equally many neighbouring points each (the last may have fewer)."""
    size = -(-len(points) // limit)
    buckets = []
    for start in range(0, len(points), max(size, 1)):
        part = points[start : start + size]
        values = [y for _, y in part if y is not None]
        x = sum(x for x, _ in part) / len(part)
        if values:
            buckets.append(Bucket(x, sum(values) / len(values), min(values), max(values)))
        else:
            buckets.append(Bucket(x, None, None, None))
    return buckets


def axis(low: float, high: float, *, at_most: int = 6, whole: bool = False) -> Axis:
    """An axis of 2 to `at_most` + 2 ticks that covers low .. high; with `whole` the ticks are whole numbers."""
    # A range of less than 1/10000 of the values would need labels too long to read: it is drawn as a flat line.
    if high - low <= (0.0 if whole else 1e-4 * max(abs(low), abs(high))):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = max((high - low) / at_most, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    ticks = [index * gap for index in range(first, last + 1)]
    return Axis(first * gap, last * gap, ticks, _tick_labels(ticks, gap))


def _tick_labels(ticks: Sequence[float], gap: float) -> list[str]:
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e9 or largest < 1e-2:
        digits = max(1, math.ceil(math.log10(largest / gap)) + 1)
        return [f"{tick:.{digits}g}" for tick in ticks]
    unit, suffix = (1e6, "M") if largest >= 1e6 else (1.0, "")
    decimals = max(0, -math.floor(math.log10(gap / unit)))
    return [f"{tick / unit:,.{decimals}f}{suffix}" if tick else "0" for tick in ticks]


def _card(title: str, lines: Sequence[Line], *, from_zero: bool) -> str:
    shown, more = lines[:MAX_LINES], lines[MAX_LINES:]
    rows = []
    for index, line in enumerate(shown):
        smallest, largest = min(line.known, key=_value_of), max(line.known, key=_value_of)
        unknown = len(line.points) - len(line.known)
        note = f' <span class="small">({unknown} not finite)</span>' if unknown else ""
        cells = [_number(line.known[-1][1]), _at(smallest), _at(largest)]
        rows.append(
            f'<tr><th scope="row"><span class="swatch b{index}"></span>{escape(line.name)}{note}</th>'
            + "".join(f'<td class="num">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    parts = [f'<div class="card"><h3>{escape(title)}</h3>', _svg(title, shown, from_zero=from_zero)]
    parts.append('<table class="legend"><thead><tr><th></th><th class="num">&#9679; last</th>')
    parts.append('<th class="num">&#9660; smallest</th><th class="num">&#9650; largest</th></tr></thead><tbody>')
    parts += [*rows, "</tbody></table>"]
    if more:
        parts.append(f'<p class="small">Also in {METRICS_NAME}: {escape(", ".join(line.name for line in more))}.</p>')
    return "\n".join([*parts, "</div>"])


def _value_of(point: tuple[float, float]) -> float:
    return point[1]


def _at(point: tuple[float, float]) -> str:
    return f'{_number(point[1])} <span class="small">at {point[0]:,.0f}</span>'


def _svg(title: str, lines: Sequence[Line], *, from_zero: bool) -> str:
    steps = [x for line in lines for x, _ in line.known]
    values = [y for line in lines for _, y in line.known]
    across = axis(min(steps), max(steps), whole=True)
    up = axis(min([*values, 0.0] if from_zero else values), max([*values, 0.0] if from_zero else values), at_most=5)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    # The horizontal axis ends with the data, not at the next tick: a curve that stops early would look unfinished.
    first, last = (min(steps), max(steps)) if max(steps) > min(steps) else (across.low, across.high)

    def left_of(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (right - _LEFT)

    def top_of(y: float) -> float:
        return bottom - (y - up.low) / (up.high - up.low) * (bottom - _TOP)

    summary = "; ".join(f"{line.name} ends at {_number(line.known[-1][1])}" for line in lines)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} by step: {escape(summary)}">'
    ]
    for tick, label in zip(up.ticks, up.labels, strict=True):
        y = top_of(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick, label in zip(across.ticks, across.labels, strict=True):
        if first <= tick <= last:
            x = left_of(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(f'<text class="tick" x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
    for index, line in enumerate(lines):
        parts += _draw(line, index, left_of, top_of)
    parts += _end_labels([(index, line.known[-1][1], top_of(line.known[-1][1])) for index, line in enumerate(lines)])
    return "\n".join([*parts, "</svg>"])


def _draw(line: Line, index: int, left_of: Callable[[float], float], top_of: Callable[[float], float]) -> list[str]:
    """The band of the ranges, the curve with a gap wherever values are missing, and its three marks."""
    parts = []
    for run in _runs(thin(line.points)):
        curve = [f"{left_of(x):.1f},{top_of(y):.1f}" for x, y, _, _ in run]
        if any(low < high for _, _, low, high in run):
            above = [f"{left_of(x):.1f},{top_of(high):.1f}" for x, _, _, high in run]
            below = [f"{left_of(x):.1f},{top_of(low):.1f}" for x, _, low, _ in reversed(run)]
            parts.append(f'<polygon class="band b{index}" points="{" ".join(above + below)}"/>')
        if len(run) > 1:
            parts.append(f'<polyline class="curve s{index}" points="{" ".join(curve)}"/>')
        else:
            x, y, _, _ = run[0]
            parts.append(f'<circle class="b{index}" cx="{left_of(x):.1f}" cy="{top_of(y):.1f}" r="1.5"/>')
    if len(line.points) <= _DOTTED:
        parts += [_circle(index, left_of(x), top_of(y), 2.4, f"step {x:,.0f}: {_number(y)}") for x, y in line.known]
    smallest, largest = min(line.known, key=_value_of), max(line.known, key=_value_of)
    # Where all values are the same there is nothing to point at.
    for word, turn, point in (("smallest", 1, smallest), ("largest", -1, largest)) if smallest[1] < largest[1] else ():
        x, y = left_of(point[0]), top_of(point[1])
        corners = f"{x - 4.5:.1f},{y - 4 * turn:.1f} {x + 4.5:.1f},{y - 4 * turn:.1f} {x:.1f},{y + 4 * turn:.1f}"
        said = f"{escape(line.name)}: {word} {_number(point[1])} at step {point[0]:,.0f}"
        parts.append(f'<polygon class="mark b{index}" points="{corners}"><title>{said}</title></polygon>')
    x, y = line.known[-1]
    parts.append(_circle(index, left_of(x), top_of(y), 3.6, f"{escape(line.name)}: last {_number(y)} at step {x:,.0f}"))
    return parts


def _circle(index: int, x: float, y: float, radius: float, title: str) -> str:
    return f'<circle class="mark b{index}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{title}</title></circle>'


def _runs(buckets: Sequence[Bucket]) -> list[list[tuple[float, float, float, float]]]:
    """The stretches of neighbouring buckets that have values."""
    runs: list[list[tuple[float, float, float, float]]] = [[]]
    for bucket in buckets:
        if bucket.y is not None and bucket.low is not None and bucket.high is not None:
            runs[-1].append((bucket.x, bucket.y, bucket.low, bucket.high))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _end_labels(ends: Sequence[tuple[int, float, float]]) -> list[str]:
    """The last values at the right edge, pushed apart where they would overlap; takes (line, value, height)."""
    apart = 13.0
    placed: list[tuple[int, float, float]] = []
    for index, value, y in sorted(ends, key=lambda end: end[2]):
        placed.append((index, value, max(y, placed[-1][2] + apart) if placed else y))
    # What went over the lower edge goes back up, taking its neighbours along.
    floor = float(_HEIGHT - _BOTTOM)
    parts = []
    for index, value, y in reversed(placed):
        y = min(y, floor)
        floor = y - apart
        parts.append(f'<text class="end t{index}" x="{_WIDTH - _RIGHT + 9}" y="{y + 4:.1f}">{_number(value)}</text>')
    return parts


# The page

_COLOURS = (  # on a light ground, on a dark one
    ("#2563eb", "#7aa7ff"),
    ("#d1490c", "#ff9a5c"),
    ("#0b8457", "#4fd39a"),
    ("#8b3fd1", "#c79bff"),
    ("#b8245f", "#ff86b0"),
    ("#0a7688", "#56cbdc"),
    ("#8a6a00", "#e2c14f"),
    ("#4b5563", "#a9b4c2"),
)

_LIGHT = "".join(f"--c{i}: {light}; " for i, (light, _) in enumerate(_COLOURS))
_DARK = "".join(f"--c{i}: {dark}; " for i, (_, dark) in enumerate(_COLOURS))
_CLASSES = "\n".join(
    f".s{i} {{ stroke: var(--c{i}); }} .t{i}, .b{i} {{ fill: var(--c{i}); }} .b{i} {{ background: var(--c{i}); }}"
    for i in range(len(_COLOURS))
)

_STYLE = (
    """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1a2029; --soft: #5a6572; --rule: #dfe3e8;
  --tint: #e9f5ee; --best: #0a6b45; --note: #fff4d6; --note-ink: #5e4300; --on-bar: #ffffff; """
    + _LIGHT
    + """}
@media (prefers-color-scheme: dark) {
  :root { --page: #12161c; --card: #1b2129; --ink: #e7ebf0; --soft: #9aa6b4; --rule: #303945;
    --tint: #16352a; --best: #6fe0ae; --note: #3a2f10; --note-ink: #ffe1a0; --on-bar: #12161c; """
    + _DARK
    + """}
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 18px 0 8px; }
p { margin: 8px 0; }
code, pre { font-family: ui-monospace, "SF Mono", Consolas, "Liberation Mono", monospace; font-size: 13px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre.long { white-space: pre; overflow: auto; }
.small, footer { color: var(--soft); font-size: 13px; }
.missing { color: var(--soft); border: 1px dashed var(--rule); border-radius: 8px; padding: 10px 14px; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { background: var(--card); border: 1px solid var(--rule); border-radius: 99px; padding: 2px 11px; font-size: 13px;
  overflow-wrap: anywhere; }
.key { color: var(--soft); }
.notes { background: var(--note); color: var(--note-ink); border-radius: 8px; margin: 14px 0 0;
  padding: 10px 14px; list-style: none; font-weight: 600; }
.protocol { background: var(--card); border: 1px solid var(--rule); border-left: 4px solid var(--c0);
  border-radius: 8px; padding: 10px 14px; }
.protocol b { margin-right: 6px; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th { font-weight: 600; text-align: left; }
td, th { padding: 7px 14px; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.metrics thead th { color: var(--soft); font-size: 13px; border-bottom: 1px solid var(--rule); }
.metrics td:first-child { min-width: 150px; }
.metrics tbody tr + tr td { border-top: 1px solid var(--rule); }
.best { background: var(--tint); color: var(--best); border-radius: 6px; padding: 2px 7px; margin-right: -7px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 0; }
.tiles div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 14px; }
.cards.three { grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); margin-top: 14px; }
.cards > .missing { grid-column: 1 / -1; margin: 0; }
.card { min-width: 0; }
.card h3 { margin: 2px 0 8px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.end { font-size: 12px; font-weight: 600; font-variant-numeric: tabular-nums; }
.curve { fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.band { fill-opacity: 0.18; }
.mark { stroke: var(--card); stroke-width: 1; }
.legend { margin-top: 6px; font-size: 13px; }
.legend td, .legend th { padding: 2px 6px; }
.legend thead th { color: var(--soft); font-weight: 400; font-size: 12px; }
.legend th.num { text-align: right; }
.legend tbody th { font-weight: 500; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
.bar { display: flex; height: 36px; border-radius: 8px; overflow: hidden; gap: 1px; }
.part { color: var(--on-bar); font-size: 13px; font-weight: 600; display: flex; align-items: center;
  justify-content: center; min-width: 2px; overflow: hidden; }
.key-list { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 10px 0 0;
  font-size: 14px; }
.key-list .num { color: var(--soft); margin-left: 4px; }
.facts { font-size: 13px; }
.facts th, .facts td { padding: 3px 0; vertical-align: top; }
.facts th { color: var(--soft); font-weight: 400; padding-right: 14px; white-space: nowrap; width: 1%; }
.facts td { overflow-wrap: anywhere; }
footer { margin-top: 34px; border-top: 1px solid var(--rule); padding-top: 10px; }
@media print { body { background: none; } .card, .wide, pre { break-inside: avoid; } }
"""
    + _CLASSES
)

# The policy in the head is a second lock: even a page damaged by hand could not load or run anything.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
<footer>Made from the files in this run's folder. This page loads nothing from the network and runs no script.</footer>
</main>
</body>
</html>
"""
