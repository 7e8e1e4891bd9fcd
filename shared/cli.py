"""The command line of an app: flags and help from its Config, presets, original spellings, exit codes, run folders.

Only names of typer are used, never those of the parser behind it, which differs between typer releases. This module
must not import torch: `--help` has to answer at once.
"""

import difflib
import functools
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shared.config import BOOL_WORDS, ConfigError, Knob, Resolved, knobs, resolve

if TYPE_CHECKING:
    import torch

    from shared.ladder import Ladder

C = TypeVar("C")
T = TypeVar("T")

_NO_ALIASES: Mapping[str, str] = MappingProxyType({})
_HELP_WORDS = ("--help", "-h")
_NAME_LENGTH = 60  # characters of a run's name, so that paths stay below the 260 of Windows
_METAVARS: Mapping[type, str] = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}


# the options of `bench`, the same in every app
QUICK_BUDGET_S, BUDGET_S = 25.0, 240.0
Quick = Annotated[
    bool, typer.Option("--quick", help="A short look: the whole command in under a minute.", rich_help_panel="Bench")
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        min=0.0,
        help=f"Time for the measurements (seconds); none: {BUDGET_S:.0f}, or {QUICK_BUDGET_S:.0f} with --quick.",
        show_default="none",
        rich_help_panel="Bench",
    ),
]
ProjectEpochs = Annotated[
    int,
    typer.Option(
        "--project-epochs", min=0, help="Also say how long so many epochs take; 0: do not.", rich_help_panel="Bench"
    ),
]
Shape = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="own|notes",
        help="Sizes: own, of the data and flags given, or notes, those that the notes speak of, on made-up data.",
        rich_help_panel="Bench",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        help="Only this part, or this row beside its original; may be given several times.",
        show_default="none",
        rich_help_panel="Bench",
    ),
]

# the options of `diagnose` and `tune-speed`, the same in every app
SpeedBudget = Annotated[
    float, typer.Option("--budget", min=0.0, help="Time for all of it (seconds).", rich_help_panel="Speed")
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="Also write a Chrome trace of a few steps here (.json).",
        show_default="none",
        rich_help_panel="Speed",
    ),
]
PastRun = Annotated[
    Path | None,
    typer.Option(
        "--log",
        help="Measure nothing; say where the time of this run folder went, or of the folder of this train.log.",
        show_default="none",
        rich_help_panel="Speed",
    ),
]
LimitMib = Annotated[
    int,
    typer.Option(
        "--limit-mib",
        min=0,
        help="Memory that training may take beside Python and the data, on the device or else on the host (MiB); "
        "0: what the device has, or half of what is free on the host.",
        rich_help_panel="Speed",
    ),
]
Again = Annotated[
    bool, typer.Option("--again", help="Measure anew what this machine has answered before.", rich_help_panel="Speed")
]


def make_app(name: str, help: str) -> typer.Typer:  # noqa: A002
    """Return an empty Typer app; it keeps its verbs as words even while it has only one."""
    app = typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_show_locals=False,  # locals hold whole tensors
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def group() -> None:
        pass

    return app


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """The words without the `--local-rank=N` of torch.distributed.launch, which also sets it in the environment."""
    words = list(argv)
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name.replace("_", "-") == "--local-rank":
            del words[index : index + (1 if equals else 2)]
            break
    return words


def bool_flags(config_type: type) -> set[str]:
    """Return the names of the on/off flags of a Config in kebab-case, without dashes: {"norm-first", ...}."""
    return {item.flag.removeprefix("--") for item in knobs(config_type).values() if _is_switch(item)}


def config_options(
    config_type: type,
    *,
    presets: Path,
    aliases: Mapping[str, str] = _NO_ALIASES,
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that gives a verb one flag per knob and `--config`, and calls it with the configuration.

    The verb's first parameter receives the Resolved; its other parameters are its own typer options. `--config NAME` is
    presets/NAME.yaml, `--config PATH` any file. Only flags given on the command line override the file. The wrapped
    verb raises ConfigError for values that cannot be used; run() prints it.
    """
    table = knobs(config_type)

    def decorate(verb: Callable[..., T]) -> Callable[..., T]:
        _, *own = inspect.signature(verb, eval_str=True).parameters.values()
        clash = {parameter.name for parameter in own} & {*table, "config", "ctx"}
        assert not clash, f"{verb.__name__}: {sorted(clash)} would be two flags of the same name"

        @functools.wraps(verb)
        def wrapper(**given: Any) -> T:
            ctx: typer.Context = given.pop("ctx")
            name: str | None = given.pop("config")
            values = {field: given.pop(field) for field in table}
            flags = {field: value for field, value in values.items() if _was_given(ctx, field)}
            path = None if name is None else find_preset(name, presets)
            label = None if path is None else f"preset {path.name}" if path.parent == presets else str(path)
            resolved: Resolved[Any] = resolve(
                config_type, yaml_path=path, yaml_label=label, flags=flags, aliases=aliases
            )
            return verb(resolved, **given)

        parameters = [
            _parameter("ctx", typer.Context),
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            _parameter("config", Annotated[str | None, _config_option(presets)], None),
            *(_flag_parameter(item) for item in table.values()),
        ]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapper

    return decorate


def find_preset(name: str, presets: Path) -> Path:
    """Return the YAML file that `--config NAME|PATH` means: an existing path, else the preset of that name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    preset = presets / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.name == name and preset.is_file():
        return preset
    known = _preset_names(presets)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"--config {name}: no such preset or YAML file; {hint}presets: {', '.join(known) or 'none'}; "
        "a path must end in .yaml"
    )


def normalise_argv(
    argv: Sequence[str],
    *,
    flags_bool: Collection[str],
    aliases: Mapping[str, str],
    default_verb: str,
    verbs: Collection[str],
) -> list[str]:
    """Return the words with the original scripts' spellings turned into ours: `--l_r=0.1 --has_a True` and the like.

    Underscores in flag names become hyphens, names of the past are looked up in aliases (old -> new), a truth value
    after an on/off flag in flags_bool selects `--flag` or `--no-flag`, and default_verb is put before a first word that
    is an option. Values and everything after `--` stay as they are.
    """
    assert default_verb in verbs
    words = list(argv)
    result: list[str] = []
    if words and words[0].startswith("-") and words[0] not in _HELP_WORDS:
        result.append(default_verb)
    elif words and words[0].replace("_", "-") in verbs:
        result.append(words.pop(0).replace("_", "-"))
    renamed = {_kebab(old): _kebab(new) for old, new in aliases.items()}
    while words:
        word = words.pop(0)
        if word == "--":
            return [*result, word, *words]
        if not word.startswith("--"):
            result.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = _renamed(_kebab(name), renamed, flags_bool)
        positive = name.removeprefix("no-") if name not in flags_bool else name
        if positive not in flags_bool:
            result.append(f"--{name}{equals}{value}")
            continue
        if not equals and words and words[0].lower() in BOOL_WORDS:
            equals, value = "=", words.pop(0)
        if equals and value.lower() not in BOOL_WORDS:
            result.append(f"--{name}={value}")  # left for the parser to refuse
            continue
        is_on = (name == positive) == (not equals or BOOL_WORDS[value.lower()])
        result.append(f"--{positive}" if is_on else f"--no-{positive}")
    return result


def run(
    app: typer.Typer,
    argv: Sequence[str] | None = None,
    *,
    prog_name: str,
    flags_bool: Collection[str],
    aliases: Mapping[str, str],
    default_verb: str,
    verbs: Collection[str],
) -> NoReturn:
    """Run the app on argv (default: the process's own words) and leave the process.

    Exit code 0 after success; 2 for usage errors and for what the user can repair (ValueError, a file that is missing
    or of the wrong kind), printed as `error: ...`; 130 after Ctrl-C; 1 with a traceback for anything else.
    TYPER_STANDARD_TRACEBACK=1 shows the traceback of a user error as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a character prints "?" instead of failing
    # Before torch loads its OpenMP: threads that spin for milliseconds while they wait make a step many times slower
    # wherever another process wants one of the cores; a shorter spin costs little elsewhere (docs/performance.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    words = normalise_argv(
        sys.argv[1:] if argv is None else argv,
        flags_bool=flags_bool,
        aliases=aliases,
        default_verb=default_verb,
        verbs=verbs,
    )
    try:
        app(args=words, prog_name=prog_name)
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        if os.environ.get("TYPER_STANDARD_TRACEBACK"):
            traceback.print_exc()
        sys.stderr.write(f"error: {_message(error)}\n")  # typer.echo would write UTF-8 where the stream is ASCII
        sys.exit(2)
    sys.exit(0)


def refuse_torchrun(prog: str) -> None:
    """Refuse to go on as one of several processes, for what only one can do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        raise ConfigError(f"only `train` shares its work among processes; start this without torchrun, as {prog} ...")


def output_file(path: Path, *, suffix: str | None = None) -> Path:
    """The path of a file that a verb will write, its folder made; what cannot be written is refused before the work."""
    if path.is_dir():
        name = f"result{suffix or '.json'}"
        raise ConfigError(f"{path} is a folder; name a file to write, such as {path / name}")
    if suffix is not None and path.suffix != suffix:
        raise ConfigError(f"{path}: the name must end in {suffix}; write to {path.with_suffix(suffix)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def new_run_dir(root: Path, app: str, name: str, *, now: datetime) -> Path:
    """Create and return root/<app>/<20261121-041500>-<name>; -2, -3 ... is appended where it exists already.

    The name is reduced to letters, digits, dots and hyphens, so that every system accepts it.
    """
    clean = re.sub(r"[^A-Za-z0-9._]+", "-", name)[:_NAME_LENGTH].strip("-._") or "run"
    parent = root / app
    parent.mkdir(parents=True, exist_ok=True)
    first = f"{now:%Y%m%d-%H%M%S}-{clean}"
    number = 1
    while True:
        path = parent / (first if number == 1 else f"{first}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def configuration_of(run_dir: Path, given: Resolved[C], *, aliases: Mapping[str, str]) -> Resolved[C]:
    """The configuration a run was started with, overridden by the flags given now."""
    path = run_dir / "config.yaml"
    if not path.is_file() or not path.stat().st_size:
        raise ConfigError(
            f"{run_dir} is no run folder: it has no config.yaml, or an empty one; give the folder that `train` printed"
        )
    if any(source != "default" and not source.startswith("flag --") for source in given.sources.values()):
        raise ConfigError(f"--config and a run folder exclude each other: {path} holds the run's configuration")
    flags = {
        key.split(".")[1]: getattr(getattr(given.config, key.split(".")[0]), key.split(".")[1])
        for key, source in given.sources.items()
        if source.startswith("flag ")
    }
    return resolve(type(given.config), yaml_path=path, yaml_label=str(path), flags=flags, aliases=aliases)


def checkpoint_of(run_dir: Path, *, prog: str) -> Path:
    """The run's best checkpoint, or its newest where it ended before the first validation, as its result did."""
    from shared.checkpoint import newest_checkpoint

    best = run_dir / "checkpoints" / "best.safetensors"
    if best.is_file():
        return best
    found = newest_checkpoint(best.parent, warn=typer.echo)
    if found is None:
        again = f"{prog} train --resume {shlex.quote(str(run_dir))}"
        raise ConfigError(f"{run_dir} holds no checkpoint yet; go on with: {again}")
    return found[0]


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that do not fit the model that the flags and the data describe, naming each difference."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not part of this model" for name in found if name not in expected]
    lines += [
        f"{name} is {list(found[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if lines:
        raise ConfigError(
            f"{path} does not fit the model: {'; '.join(lines[:8])}{'; ...' if len(lines) > 8 else ''}. "
            "Give the run folder, or the same model flags and data that it was trained with."
        )


def git_revision() -> str | None:
    """The revision of the code and whether it was changed; None outside a git checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


# What `bench` does in every app


def wants_notes(shape: str) -> bool:
    """Whether --shape asks for the sizes of the notes; refuses words that it does not know."""
    if shape not in ("own", "notes"):
        raise ConfigError(f'--shape is "{shape}"; it must be own or notes')
    return shape == "notes"


def run_ladder(
    ladder: "Ladder",
    *,
    app: str,
    data: Mapping[str, Any],
    device: "torch.device",
    notes: Sequence[str],
    command: str,
    runs_dir: Path,
    quick: bool,
    budget: float | None,
    project_epochs: int,
    on_run: Callable[[str], None],
) -> tuple[Path, dict[str, Any]]:
    """Measure a ladder; the new run folder, with a bench.json in it, and what that holds.

    `data` and `notes` as `shared.ladder.record` wants them; `on_run` is called `shared.ladder.total_runs` times.
    """
    from shared.ladder import measure, record, write_record

    begin = time.perf_counter()
    budget_s = budget if budget is not None else QUICK_BUDGET_S if quick else BUDGET_S
    measured = measure(ladder, device=device, budget_s=budget_s, on_run=on_run)
    elapsed_s = time.perf_counter() - begin
    if elapsed_s > 1.5 * budget_s:
        notes = [*notes, f"took {elapsed_s:.0f} s for a budget of {budget_s:.0f} s: a repeat has one step at least"]
    if project_epochs and ladder.epoch is None:
        notes = [*notes, "no projection: it takes the parts that --only leaves out"]
    found = record(
        ladder,
        measured,
        app=app,
        data=data,
        device=device,
        notes=notes,
        command=command,
        git=git_revision(),
        budget_s=budget_s,
        elapsed_s=elapsed_s,
        project_epochs=project_epochs,
    )
    run_dir = new_run_dir(runs_dir, app, "demo-bench" if data["demo"] else "bench", now=datetime.now())
    write_record(run_dir, found)
    return run_dir, found


def print_ladder(console: Console, found: Mapping[str, Any]) -> None:
    """Print what bench.json holds: a table of each part on a terminal, a line of each row elsewhere.

    On demo data every table, and every line outside of one, says that it is demo data.
    """
    mark = " (demo data)" if found["data"]["demo"] else ""

    def say(line: str) -> None:
        console.print(line if "demo data" in line else line + mark, markup=False)

    for note in found["notes"]:
        say(note)
    say(found["protocol"])
    for part in found["parts"]:
        if console.is_terminal:
            console.print(_ladder_table(part, mark))
        else:
            say(f"{part['title']}, in {part['unit']}:")
            for row in part["rows"]:
                say("  " + _ladder_line(part, row))
    for one in found["unmeasured"]:
        say(f"not measured: {one['claim']}: {one['why']}")
    for line in projection_lines(found["projection"]):
        say(line)


def projection_lines(projection: Mapping[str, Any] | None) -> list[str]:
    """The hours of many epochs in words, training and evaluation apart; no line without a projection."""
    if projection is None:
        return []
    lines = []
    for side in ("original", "ours"):
        hours = projection[side]
        lines.append(
            f"{projection['epochs']:,} epochs of {projection['samples']:,} samples, {side}: {_hours(hours['total_h'])} "
            f"({_hours(hours['train_h'])} training, {_hours(hours['evaluation_h'])} evaluation)"
        )
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 0.1 else f"{3600 * hours:,.1f} s"


def _ladder_table(part: Mapping[str, Any], mark: str) -> Table:
    table = Table(title=f"{part['title']}{mark}", title_justify="left", caption_justify="left")
    table.caption = escape("\n".join(f"{row['name']}: {row['text']}" for row in part["rows"]))
    table.add_column("row", no_wrap=True)
    for name in (f"{part['unit']}/s", "steps/s", "factor", *(("of this step",) if part["cumulative"] else ())):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    table.add_column("memory", justify="right")
    table.add_column("claim", overflow="fold")
    for row in part["rows"]:
        gains = [_factor(row["factor"])] + ([_factor(row["gain"])] if part["cumulative"] else [])
        colour = {"faster": "green", "slower": "red"}.get(row["verdict"])
        table.add_row(
            escape(row["name"]),
            _rate(row["samples_per_s"]),
            _digits(row["steps_per_s"]["median"]),
            *gains,
            f"[{colour}]{row['verdict']}[/{colour}]" if colour else row["verdict"],
            _memory(row),
            escape(row["claim"]),
        )
    return table


def _ladder_line(part: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    steps = row["steps_per_s"]
    words = [f"{_rate(row['samples_per_s'])} {part['unit']}/s", f"{_digits(steps['median'])} steps/s"]
    if row["factor"] is not None:
        words.append(_factor(row["factor"]))
    if row["gain"] is not None:
        words.append(f"this step {_factor(row['gain'])}")
    words += [row["verdict"], f"memory {_memory(row)}"]
    claim = f"; {row['claim']}" if row["claim"] else ""
    return f"{row['name']} ({row['text']}): {', '.join(words)}{claim}"


def _rate(found: Mapping[str, float]) -> str:
    return f"{_digits(found['median'])} ({_digits(found['low'])} .. {_digits(found['high'])})"


def _factor(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"x{found['median']:.2f} ({found['low']:.2f} .. {found['high']:.2f})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _memory(row: Mapping[str, Any]) -> str:
    parts = [
        f"{row[key] / 2**20:,.1f} MiB{words}"
        for key, words in (("host_bytes", ""), ("device_bytes", " on the device"))
        if row[key] is not None
    ]
    return ", ".join(parts) or "not measured"


# Building options


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _config_option(presets: Path) -> Any:
    names = ", ".join(_preset_names(presets)) or "none yet"
    return typer.Option(
        "--config",
        metavar="NAME|PATH",
        help=escape(f"Preset or YAML file to start from; flags override it. Presets: {names}."),
        show_default="built-in defaults",
    )


def _preset_names(presets: Path) -> list[str]:
    return sorted(path.stem for path in presets.glob("*.yaml"))


def _is_switch(item: Knob) -> bool:
    return item.kind is bool and not item.many and not item.optional


def _flag_parameter(item: Knob) -> inspect.Parameter:
    """Return the typer parameter of a knob.

    All but switches reach us as text, because config.py reads values, checks them and words the errors for YAML and
    flags alike.
    """
    limits = f" ({item.limits})" if item.limits else ""
    settings: dict[str, Any] = {
        "help": escape(item.help + limits),
        "rich_help_panel": item.section.replace("_", " ").capitalize(),
    }
    if _is_switch(item):
        option = typer.Option(f"{item.flag}/--no-{item.flag.removeprefix('--')}", **settings)
        return _parameter(item.name, Annotated[bool, option], item.default)
    kind = "|".join(item.choices) or _METAVARS[item.kind]
    default = _default_text(item)
    option = typer.Option(
        item.flag,
        metavar=f"{kind},..." if item.many else kind,
        show_default=default if default in ("none", "empty") else True,
        **settings,
    )
    return _parameter(item.name, Annotated[str | None, option], None if default in ("none", "empty") else default)


def _default_text(item: Knob) -> str:
    """Return the default as it would be typed."""
    if item.default is None:
        return "none"
    if item.many:
        return ",".join(str(element) for element in item.default) or "empty"
    return str(item.default) or "empty"


def _was_given(ctx: typer.Context, field: str) -> bool:
    source = ctx.get_parameter_source(field)
    return source is not None and source.name == "COMMANDLINE"


# Reading words


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _renamed(name: str, renamed: Mapping[str, str], flags_bool: Collection[str]) -> str:
    """Return today's name of a flag; `no-old` follows `old` where that is an on/off flag."""
    if name in renamed:
        return renamed[name]
    positive = renamed.get(name.removeprefix("no-"))
    return f"no-{positive}" if name.startswith("no-") and positive in flags_bool else name


def _message(error: ValueError | OSError) -> str:
    """Return what a user can act on: the text of the error, without errno."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
