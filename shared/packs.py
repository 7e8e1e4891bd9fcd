"""What a pack records of the files that it was made from, and what can be wrong with one when it is read again.

An app decides what is in its packs; here is what must not differ between apps: a pack that is damaged, foreign or of
another layout is told from one that is fine, and one whose sources have changed since is never served in silence.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from shared.faults import DataError, Findings, one_line
from shared.files import JSON, DamagedFileError, changed_fingerprint, fingerprint, read_pack, relative_path


class Source(NamedTuple):
    """A file as it was when it was read."""

    file: Path
    size: int
    mtime_ns: int
    fingerprint: str


def sources_of(files: Sequence[Path]) -> tuple[Source, ...]:
    """The files as they are now."""
    stats = [file.stat() for file in files]
    return tuple(Source(f, s.st_size, s.st_mtime_ns, fingerprint([f])) for f, s in zip(files, stats, strict=True))


def joined_fingerprint(sources: Sequence[Source], choices: JSON) -> str:
    """32 hexadecimal digits that change with any of the files and with the choices made beside them."""
    text = json.dumps([[source.fingerprint for source in sources], choices])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def source_records(sources: Sequence[Source], folder: Path) -> list[JSON]:
    """What a pack in this folder says of its sources, for `meta["sources"]`."""
    return [{**source._asdict(), "file": relative_path(source.file, folder)} for source in sources]


def check_pack_paths(source: Path, output: Path) -> None:
    """Raise DataError where the output's name is not that of a pack, or the source is a pack already."""
    if output.suffix != ".safetensors":
        raise DataError(
            f"{output}: a pack's name must end in .safetensors; write to {output.with_suffix('.safetensors')}"
        )
    if source.suffix == ".safetensors":
        raise DataError(f"{source} is already a pack; copy it, or prepare the folder that it was made from")


def open_pack(
    file: Path, findings: Findings, *, app: str, kind: str, layout: int
) -> tuple[dict[str, Tensor], dict[str, JSON]] | None:
    """The memory-mapped tensors and the description of an app's undamaged pack; None with a fault for anything else."""
    again = write_again(app, file)
    try:
        tensors, meta = read_pack(file, kind=kind, verify=True)
    except DamagedFileError as error:
        findings.add(file, "an undamaged pack", one_line(_without_path(error, file)), again)
        return None
    except ValueError as error:
        repair = "give the pack that `prepare` wrote, or its source"
        findings.add(file, f"a pack of {app}", one_line(_without_path(error, file)), repair)
        return None
    if meta.get("layout") != layout:
        found = f"layout {meta.get('layout')!r} of another version"
        findings.add(file, f"a pack of layout {layout}", found, again)
        return None
    return tensors, meta


def write_again(app: str, file: Path) -> str:
    """The repair of a pack whose source is not known."""
    return f"write it again: {_prepare(app)} SOURCE {shlex.quote(str(file))}"


def fault_of_sources(
    file: Path,
    meta: Mapping[str, Any],
    *,
    app: str,
    flags: Mapping[str, Any],
    files_of: Callable[[Path], Sequence[Path]] | None,
) -> tuple[str, str, str] | None:
    """Expected, found and repair where the files that a pack was made from are still there and have changed since.

    `flags` are those of `prepare` that made the pack, None for one that was left out. `files_of` gives the files of a
    folder that count, where a new one would be read as well.
    """
    recorded = {file.parent / source["file"]: source for source in meta["sources"]}
    present = {path: source for path, source in recorded.items() if path.is_file()}
    if not present:
        return None
    first = next(iter(present))
    changed = [f"{path.name} has changed" for path, source in present.items() if changed_fingerprint(path, source)]
    if files_of is not None:
        known = {path.name for path in recorded}
        changed += [f"{path.name} is new" for path in files_of(first.parent) if path.name not in known]
    if not changed:
        return None
    source = first.parent if len(recorded) > 1 else first
    command = f"{_prepare(app)} {shlex.quote(str(source))} {shlex.quote(str(file))}"
    given = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if value is not None}
    command += "".join(f" {flag} {value}" for flag, value in given.items())
    return f"a pack of {source} as it is now", f"a stale pack: {', '.join(changed)} since", f"write it again: {command}"


def _prepare(app: str) -> str:
    return f"python -m apps.{app} prepare"


def _without_path(error: ValueError, file: Path) -> str:
    return str(error).removeprefix(f"{file}: ")
