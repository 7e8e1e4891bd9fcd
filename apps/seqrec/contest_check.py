"""Everything that is wrong with a folder of the contest's files, found in one pass over each in bounded memory.

What `prepare_contest` raises for is an error, and so is a pickle that wants more than data, wherever it is; what
`prepare_contest` can live with is a warning. A warning is given once per file and field, for its first line, with the
number of all: in a file of a million lines it has rarely one cause per line.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apps.seqrec import contest_lines
from apps.seqrec.contest import (
    CANDIDATES_FILE,
    EVENTS_FILE,
    INDEXER_FILE,
    ITEMS_FILE,
    PREDICT_FILE,
    REQUIRED_FILES,
    indexer_faults,
    read_indexer,
)
from apps.seqrec.contest_embeddings import EMBEDDINGS_FOLDER, Family, find_families, is_family, object_vectors
from apps.seqrec.contest_join import FaultError, repeated_retrieval
from apps.seqrec.contest_lines import (
    ITEM_FIELDS,
    USER_ARRAYS,
    USER_FIELDS,
    BadLine,
    Schema,
    candidate_of,
    columns_of,
    item_pairs,
    lines_of,
    parse_json,
    quote,
)
from shared.faults import DataError, Fault, Findings, Severity
from shared.pickles import UnsafePickleError, load_pickle

_OFFSETS = {EVENTS_FILE: "seq_offsets.pkl", PREDICT_FILE: "predict_seq_offsets.pkl"}
_OPTIONAL = {
    "seq_offsets.pkl": "nothing to do: lines are found by their ends",
    PREDICT_FILE: "nothing to do unless you want to predict for the test users",
    "predict_seq_offsets.pkl": "nothing to do: lines are found by their ends",
    CANDIDATES_FILE: "nothing to do unless you want to rank the contest's candidates",
    EMBEDDINGS_FOLDER: "nothing to do: items are then known by id and features alone",
}
_ACTIONS = (0, 1, 2)
_DOWNLOAD = "download the file again"


def check_contest(source: Path, *, limit: int = 20) -> list[Fault]:
    """Everything that is wrong with a contest folder, errors first: at most `limit` faults, then one for the rest."""
    findings = _Findings(source, limit=limit)
    if not source.is_dir():
        findings.add(source, "a folder with the contest's files", "no folder at this path", "check the spelling")
        return findings.listing()
    for name in REQUIRED_FILES:
        if not (source / name).is_file():
            findings.add(source / name, "the file", "no such file", f"download it into {source}")
    for name, repair in _OPTIONAL.items():
        if not (source / name).exists():
            findings.warn(source / name, None, None, "the file", "no such file", repair)
    known = _check_indexer(source / INDEXER_FILE, findings)
    if (source / ITEMS_FILE).is_file():
        _check_items(source / ITEMS_FILE, known, findings)
    for name, offsets in _OFFSETS.items():
        if (source / name).is_file():
            count = _check_events(source / name, known, findings)
            if (source / offsets).is_file():
                _check_offsets(source / offsets, source / name, count, findings)
    cold: frozenset[str] = frozenset()
    if (source / CANDIDATES_FILE).is_file():
        cold = _check_candidates(source / CANDIDATES_FILE, known, findings)
    if (source / EMBEDDINGS_FOLDER).is_dir():
        _check_families(source, known, cold, findings)
    return findings.listing()


# Faults, collected


class _Findings(Findings):
    """Faults as they are found, changed in place: the first errors, and every kind of warning with its number."""

    def __init__(self, path: Path, *, limit: int) -> None:
        super().__init__(path, limit=limit)
        self.kinds: dict[tuple[Path, str | None, str], tuple[Fault, int]] = {}

    def bad_line(self, file: Path, error: BadLine) -> None:
        self.add(file, error.expected, error.found, error.repair, line=error.line, field=error.field)

    def warn(
        self, file: Path, line: int | None, field: str | None, expected: str, found: str, repair: str, count: int = 1
    ) -> None:
        key = (file, field, expected)
        fault, so_far = self.kinds.get(key, (None, 0))
        if fault is None:
            fault = Fault(str(file), line, field, expected, found, repair, "warning")
        self.kinds[key] = (fault, so_far + count)

    def listing(self) -> list[Fault]:
        warnings = []
        for fault, count in self.kinds.values():
            found = fault.found if count == 1 else f"{fault.found} ({count:,} times in the file)"
            warnings.append(Fault(fault.file, fault.line, fault.field, fault.expected, found, fault.repair, "warning"))
        shown = (self.errors + warnings)[: self.limit]
        errors = self.total["error"] - sum(fault.severity == "error" for fault in shown)
        kinds = len(warnings) - sum(fault.severity == "warning" for fault in shown)
        if errors or kinds:
            found = " and ".join(f"{n:,} more {what}" for n, what in ((errors, "errors"), (kinds, "warnings")) if n)
            severity: Severity = "error" if errors else "warning"
            repair = "repair these first, or raise the limit"
            shown.append(Fault(str(self.path), None, None, f"at most {self.limit} faults", found, repair, severity))
        return shown


# The files


class _Known(NamedTuple):
    """What the indexer knows."""

    schema: Schema
    users: Mapping[str, int]
    num_users: int
    creative: frozenset[str]


def _check_indexer(file: Path, findings: _Findings) -> _Known | None:
    """What the indexer says; None where it cannot be used, and nothing can be compared with it."""
    if not file.is_file():
        return None
    try:
        content = load_pickle(file)
    except UnsafePickleError as error:
        _add_unsafe(file, error, findings)
        return None
    faults = list(indexer_faults(file, content))
    for fault in faults:
        findings.add(file, fault.expected, fault.found, fault.repair, field=fault.field)
    if faults:
        return None
    form = {*ITEM_FIELDS, *USER_FIELDS, *USER_ARRAYS}
    for field in content["f"]:
        if field not in form:
            repair = "nothing to do: the feature is left out"
            findings.warn(file, None, "f", "feature ids of the contest form", quote(field), repair)
    indexer = read_indexer(file, content)
    num_users = max(indexer.users.values(), default=0)
    return _Known(indexer.schema, indexer.users, num_users, frozenset(indexer.item_ids))


def _add_unsafe(file: Path, error: UnsafePickleError, findings: _Findings) -> None:
    found = str(error).removeprefix(f"{file}: ")
    findings.add(file, "a pickle of plain data", found, "do not open it with pickle; download it from its owner")


def _check_items(file: Path, known: _Known | None, findings: _Findings) -> None:
    count = 0
    try:
        for line, key, features in item_pairs(file):
            if known is None:
                continue
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and 0 < int(key) <= known.schema.num_items):
                expected = f"items 1..{known.schema.num_items}"
                findings.warn(file, line, "item", expected, quote(key), "nothing to do: the entry is left out")
                continue
            count += 1
            _check_features(file, line, features, known, ITEM_FIELDS, (), findings)
    except BadLine as error:
        findings.bad_line(file, error)
        return
    if known is not None and count < known.schema.num_items:
        found = f"{known.schema.num_items - count:,} items of the indexer without features"
        findings.warn(file, None, None, "every item of the indexer", found, "nothing to do: they have no features")


def _check_features(
    file: Path,
    line: int,
    features: Mapping[str, Any],
    known: _Known,
    fields: tuple[str, ...],
    arrays: tuple[str, ...],
    findings: _Findings,
) -> None:
    for field, value in features.items():
        size = known.schema.vocab.get(field)
        if size is None or field not in fields + arrays:
            listed = ", ".join(fields + arrays)
            repair = "nothing to do: the feature is left out"
            findings.warn(file, line, None, f"feature ids that have a vocabulary, of {listed}", quote(field), repair)
            continue
        for element in value if field in arrays and type(value) is list else (value,):
            if type(element) is not int or not 0 < element <= size:
                expected = f"values 1..{size}"
                findings.warn(file, line, field, expected, quote(element), "nothing to do: it counts as missing")


def _lines(file: Path, findings: _Findings) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that can be read as lines; blank ones are empty."""
    try:
        yield from lines_of(file, 0, file.stat().st_size)
    except BadLine as error:
        findings.bad_line(file, error)


def _check_events(file: Path, known: _Known | None, findings: _Findings) -> int:
    """Check a file of users' lines and give their number."""
    users: set[int | str] = set()
    number = 0
    num_users = 0
    for number, line in _lines(file, findings):
        if not line:
            findings.warn(file, number, None, "a user on every line", "a blank line", "nothing to do: it is left out")
            continue
        num_users += 1
        try:
            columns = columns_of(parse_json(line, number), number)
            _check_user(file, number, columns, known, users, findings)
        except BadLine as error:
            findings.bad_line(file, error)
    if not num_users:
        findings.add(file, "at least one user", "none", _DOWNLOAD)
    return number


def _check_user(
    file: Path,
    number: int,
    columns: list[tuple[Any, ...]],
    known: _Known | None,
    users: set[int | str],
    findings: _Findings,
) -> None:
    """Check one user's columns; raises BadLine for the first thing that cannot be read."""

    def warn(field: str | None, expected: str, found: str, repair: str) -> None:
        findings.warn(file, number, field, expected, found, repair)

    if not columns:
        warn(None, "records of a user", "an empty list", "nothing to do: the line is left out")
        return
    given, items, profiles, features, actions, times = columns
    user: int | str = given[0]
    contest_lines.check_user(user, number)
    if known is not None:
        is_known = user in known.users if isinstance(user, str) else 0 < user <= known.num_users
        if not is_known and file.name == EVENTS_FILE:
            expected = f"users of the indexer, 1..{known.num_users} or raw ids"
            warn("user_id", expected, quote(user), "nothing to do: the id is kept as it is")
        user = known.users.get(user, user) if isinstance(user, str) else user
    if user in users:
        warn("user_id", "each user on one line", f"user {quote(user)} again", "join the lines: both count as users")
    users.add(user)

    at = [n for n, item in enumerate(items) if item is not None or features[n] is not None]
    event_times = contest_lines.times_of([times[n] for n in at], number)
    contest_lines.actions_of([actions[n] for n in at], number)
    if not at:
        warn(None, "events of a user", f"none of user {quote(user)}", "nothing to do: there is nothing to learn from")
    if any(later < earlier for earlier, later in itertools.pairwise(event_times)):
        expected = "events in order of time"
        warn(
            "timestamp",
            expected,
            f"an earlier one after a later one, of user {quote(user)}",
            "nothing to do: they are sorted",
        )
    at_profile = [n for n, profile in enumerate(profiles) if profile is not None]
    if len(at_profile) != 1:
        repair = "nothing to do: without a profile all features are missing, of several the last counts"
        warn("user_feat", "one profile per user", f"{len(at_profile)} of user {quote(user)}", repair)
    for n in at_profile:
        contest_lines.times_of([times[n]], number)
        if known is not None:
            _check_features(file, number, profiles[n], known, USER_FIELDS, USER_ARRAYS, findings)
    for n in range(len(items)):
        if n not in at_profile and items[n] is None and features[n] is None:
            warn(None, "an item or a profile in every record", "neither", "nothing to do: the record is left out")
    for n in at:
        if times[n] is None or type(times[n]) is float:
            warn(
                "timestamp",
                "whole seconds",
                quote(times[n]),
                "nothing to do: it is rounded, or that of the event before",
            )
        if type(actions[n]) is not int or actions[n] not in _ACTIONS:
            expected = "0 exposure, 1 click or 2 conversion"
            warn("action_type", expected, quote(actions[n]), "nothing to do: null counts as 0, numbers stay")
        if known is not None:
            item = items[n]
            if type(item) is not int or not 0 < item <= known.schema.num_items:
                expected = f"items 1..{known.schema.num_items}"
                warn(
                    "item_id", expected, quote(item), "nothing to do: only its features count, or what a candidate has"
                )
            if features[n]:
                _check_features(file, number, features[n], known, ITEM_FIELDS, (), findings)


def _check_offsets(file: Path, lines_file: Path, num_lines: int, findings: _Findings) -> None:
    """Offsets are not used by us; wrong ones break other programs, and tell of a file that was changed."""
    repair = "nothing to do for us, as lines are found by their ends; other programs need it written again"
    try:
        content = load_pickle(file)
    except UnsafePickleError as error:
        _add_unsafe(file, error, findings)
        return
    if type(content) is dict:
        if sorted(content, key=str) != sorted(range(len(content)), key=str):
            findings.warn(file, None, None, "keys 0, 1, 2 ...", "others", repair)
        content = list(content.values())
    if type(content) is not list or not all(type(offset) is int for offset in content):
        findings.warn(
            file, None, None, "a list of integers, or a dictionary {0: offset, ...}", "something else", repair
        )
        return
    if len(content) != num_lines:
        found = f"{len(content):,} offsets of {num_lines:,} lines"
        findings.warn(file, None, None, "an offset for every line", found, repair)
    size = lines_file.stat().st_size
    with lines_file.open("rb") as lines:
        for n, offset in enumerate(content):
            if not 0 <= offset < size:
                found = f"offset {n} is {quote(offset)}"
                findings.warn(file, None, None, f"offsets within the {size} bytes of {lines_file.name}", found, repair)
            elif offset:
                lines.seek(offset - 1)
                if lines.read(1) != b"\n":
                    found = f"offset {n} is {offset}, in the middle of a line"
                    findings.warn(file, None, None, "offsets at which lines begin", found, repair)


def _check_candidates(file: Path, known: _Known | None, findings: _Findings) -> frozenset[str]:
    """Check the file of candidates and give their raw ids."""
    row = -1
    retrieval: set[int] = set()
    creative: set[str] = set()
    for number, line in _lines(file, findings):
        if not line:
            repair = "nothing to do: it is left out"
            findings.warn(file, number, None, "a candidate on every line", "a blank line", repair)
            continue
        row += 1
        try:
            candidate = candidate_of(parse_json(line, number), number)
        except BadLine as error:
            findings.bad_line(file, error)
            continue
        if candidate.retrieval in retrieval:
            fault = repeated_retrieval(file, number, candidate.retrieval)
            findings.add(file, fault.expected, fault.found, fault.repair, line=number, field=fault.field)
        elif candidate.retrieval != row:
            found = f"{candidate.retrieval} in row {row}"
            repair = "nothing to do for us; other programs need the rows numbered again"
            findings.warn(file, number, "retrieval_id", "rows counted from 0", found, repair)
        raw = str(candidate.creative)
        if raw in creative:
            repair = "nothing to do: both are ranked"
            findings.warn(file, number, "creative_id", "each item once", f"{raw} again", repair)
        retrieval.add(candidate.retrieval)
        creative.add(raw)
        if known is not None:
            _check_features(file, number, candidate.features, known, ITEM_FIELDS, (), findings)
    if row < 0:
        findings.add(file, "at least one candidate", "none", _DOWNLOAD)
    return frozenset(creative)


def _check_families(source: Path, known: _Known | None, cold: frozenset[str], findings: _Findings) -> None:
    folder = source / EMBEDDINGS_FOLDER
    items = None if known is None else known.creative | cold
    for entry in sorted(folder.iterdir()):
        if not is_family(entry) and not entry.name.startswith((".", "_")):
            expected = "emb_ID_WIDTH folders with lines, emb_ID_WIDTH.pkl or .npy"
            findings.warn(entry, None, None, expected, "another name or kind", "nothing to do: it is left out")
    families = find_families(source)
    if not families:
        findings.warn(folder, None, None, "families of embeddings", "none", _OPTIONAL[EMBEDDINGS_FOLDER])
    for family in families:
        if family.form == "lines":
            for file in family.files:
                _check_embedding_lines(file, family, items, findings)
        elif known is not None:
            try:
                for _ in object_vectors(family, known.schema.num_items)[1]:
                    pass
            except FaultError as error:
                fault = error.fault
                findings.add(family.files[0], fault.expected, fault.found, fault.repair, field=fault.field)
            except DataError as error:
                _add_unsafe(family.files[0], UnsafePickleError(str(error)), findings)


def _check_embedding_lines(file: Path, family: Family, items: frozenset[str] | None, findings: _Findings) -> None:
    assert family.width is not None
    count = 0
    for number, line in _lines(file, findings):
        if not line:
            continue
        try:
            creative, vector = contest_lines.embedding_of(parse_json(line, number), number, family.width)
        except BadLine as error:
            findings.bad_line(file, error)
            continue
        count += vector is not None
        if vector is None:
            findings.warn(file, number, "emb", "an embedding", "none", "nothing to do: the item counts as without one")
        if items is not None and (creative is None or str(creative) not in items):
            repair = "nothing to do: the line is left out"
            findings.warn(file, number, "anonymous_cid", "items of the indexer or candidates", quote(creative), repair)
    if not count:
        findings.warn(file, None, None, "at least one embedding", "none", _DOWNLOAD)
