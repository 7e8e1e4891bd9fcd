"""What is wrong with a user's files: one fault, the list of them, and the words in which they are told.

A reader and a checker of one form walk through the same rules and hand what they find to one Findings. The reader stops
at the first error (`raise_first`), the checker lists them all (`listing`), so neither can know of a fault that the
other does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Severity = Literal["error", "warning"]


class DataError(ValueError):
    """The source cannot be read; the text is that of its first fault."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a source: where, what belongs there, what stands there, and what to do."""

    file: str
    line: int | None  # of a text file, counted from 1
    field: str | None
    expected: str
    found: str
    repair: str
    severity: Severity = "error"
    row: int | None = None  # of an array, counted from 0 as NumPy does; of a dictionary, the key

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        place = place if self.row is None else f"{place}[{self.row}]"
        field = "" if self.field is None else f"{self.field}: "
        return f"{place}: {self.severity}: {field}expected {self.expected}, found {self.found}; {self.repair}"


class Findings:
    """Faults as the rules find them, changed in place: the first `limit` of either severity, and the number of all."""

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.errors: list[Fault] = []
        self.warnings: list[Fault] = []
        self.total = {"error": 0, "warning": 0}

    def add(
        self,
        file: Path,
        expected: str,
        found: str,
        repair: str,
        *,
        line: int | None = None,
        row: int | None = None,
        field: str | None = None,
        severity: Severity = "error",
    ) -> None:
        """Note one fault, without its text where there are `limit` of its severity already."""
        self.total[severity] += 1
        kept = self.errors if severity == "error" else self.warnings
        if len(kept) < self.limit:
            kept.append(Fault(str(file), line, field, expected, found, repair, severity, row))

    def each(self, where: Tensor, describe: Callable[[int], None]) -> None:
        """Have `describe` add one error for each of the places ([N] int64); only the first `limit` are visited."""
        for place in where[: self.limit].tolist():
            describe(place)
        self.total["error"] += max(0, where.numel() - self.limit)

    def raise_first(self) -> None:
        """Raise DataError with the first error, if there is any."""
        if self.errors:
            raise DataError(str(self.errors[0]))

    def listing(self) -> list[Fault]:
        """Errors, then warnings, at most `limit`; one more counts those left out."""
        shown = (self.errors + self.warnings)[: self.limit]
        errors = self.total["error"] - sum(fault.severity == "error" for fault in shown)
        warnings = self.total["warning"] - sum(fault.severity == "warning" for fault in shown)
        if errors or warnings:
            counts = ((errors, "more error"), (warnings, "more warning"))
            found = " and ".join(many(count, noun) for count, noun in counts if count)
            repair = "repair these first, or raise the limit"
            severity: Severity = "error" if errors else "warning"
            shown.append(Fault(str(self.path), None, None, f"at most {self.limit} faults", found, repair, severity))
        return shown


def quote(text: str) -> str:
    """The text on one line, in ASCII, cut where it is long."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def many(count: int, noun: str) -> str:
    """The count and what is counted, as "1 pair" and "2,000 pairs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def one_line(text: str) -> str:
    """The text in ASCII, every run of blanks and line ends one blank."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())


def shape_text(tensor: Tensor) -> str:
    """Type and shape, as "int64 (5, 2)"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def places(mask: Tensor) -> Tensor:
    """Where the mask ([N] bool) is true, [n] int64, rising."""
    return torch.nonzero(mask).squeeze(1)
