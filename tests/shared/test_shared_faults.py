"""A fault says where and what; a list of them is cut at its limit, errors first, and counts what it leaves out."""

from pathlib import Path

import pytest
import torch

from shared.faults import DataError, Fault, Findings, many, one_line, places, quote, shape_text

FILE = Path("data/train.txt")


def findings_of(*severities: str, limit: int) -> Findings:
    """Findings to which faults of these severities were added, numbered by their lines."""
    findings = Findings(Path("data"), limit=limit)
    for line, severity in enumerate(severities, 1):
        findings.add(FILE, "x", "y", "z", line=line, severity="error" if severity == "e" else "warning")
    return findings


def test_a_fault_names_place_field_expected_found_and_repair():
    fault = Fault("a.txt", 3, "user", "an id", "'x'", "write one")
    assert str(fault) == "a.txt:3: error: user: expected an id, found 'x'; write one"
    array = Fault("a.npy", None, None, "an id", "-1", "write one", "warning", row=7)
    assert str(array) == "a.npy[7]: warning: expected an id, found -1; write one"
    assert str(Fault("a", None, None, "x", "y", "z")) == "a: error: expected x, found y; z"


@pytest.mark.parametrize(
    ("severities", "limit", "shown", "rest"),
    [
        ("", 3, "", None),
        ("we", 3, "ew", None),
        ("wew", 3, "eww", None),
        ("wewe", 3, "eew", "1 more warning"),
        ("eewew", 2, "ee", "1 more error and 2 more warnings"),
        ("wwww", 1, "w", "3 more warnings"),
        ("eeee", 4, "eeee", None),
    ],
)
def test_a_listing_has_errors_first_and_counts_the_rest(severities, limit, shown, rest):
    listing = findings_of(*severities, limit=limit).listing()
    kept = listing if rest is None else listing[:-1]
    assert "".join(fault.severity[0] for fault in kept) == shown
    assert [fault.line for fault in kept if fault.severity == "error"] == [
        line for line, severity in enumerate(severities, 1) if severity == "e"
    ][: shown.count("e")]
    if rest is not None:
        assert listing[-1].found == rest
        assert listing[-1].expected == f"at most {limit} faults"
        assert listing[-1].severity == ("error" if "error" in rest else "warning")
        assert listing[-1].file == "data"


def test_only_the_first_places_are_described_but_all_are_counted():
    findings = Findings(Path("data"), limit=3)
    visited: list[int] = []

    def describe(place: int) -> None:
        visited.append(place)
        findings.add(FILE, "x", str(place), "z")

    findings.each(torch.arange(5, 15), describe)
    findings.each(torch.empty(0, dtype=torch.int64), describe)
    assert visited == [5, 6, 7]
    assert findings.total == {"error": 10, "warning": 0}
    assert findings.listing()[-1].found == "7 more errors"


def test_the_first_error_is_raised_and_warnings_are_not():
    findings = findings_of("w", "w", limit=5)
    findings.raise_first()
    findings.add(FILE, "an id", "none", "write one")
    findings.add(FILE, "another", "none", "write one")
    with pytest.raises(DataError) as raised:
        findings.raise_first()
    assert str(raised.value) == str(findings.errors[0])
    assert isinstance(raised.value, ValueError)


def test_words_for_counts_texts_and_shapes():
    assert [many(n, "pair") for n in (0, 1, 2, 1234)] == ["0 pairs", "1 pair", "2 pairs", "1,234 pairs"]
    assert quote("caf\u00e9\n") == "'caf\\xe9\\n'"
    assert quote("x" * 41) == "'" + "x" * 37 + "...'"
    assert one_line(" a\n\tb  caf\u00e9 ") == "a b caf\\xe9"
    assert shape_text(torch.zeros(2, 3, dtype=torch.int32)) == "int32 (2, 3)"
    assert places(torch.tensor([False, True, True, False, True])).tolist() == [1, 2, 4]
    assert places(torch.zeros(3, dtype=torch.bool)).tolist() == []
