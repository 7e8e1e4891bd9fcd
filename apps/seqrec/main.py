"""The verbs of seqrec, and the only file that knows about flags: builds, then calls.

torch is imported inside the verbs, so that `--help` answers at once.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from apps.seqrec.config import ALIASES, Config
from shared import cli
from shared.config import ConfigError, Resolved, dump_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from apps.seqrec.contest import Contest
    from apps.seqrec.dataset import Sequences
    from apps.seqrec.model import SeqRec
    from apps.seqrec.train import Components, Start
    from shared.distributed import Group

APP = "seqrec"
PROG = f"python -m apps.{APP}"
PRESETS = Path(__file__).parent / "configs"
VERBS = ("train", "evaluate", "predict", "prepare", "check", "export", "bench", "diagnose", "tune-speed")
# flags of the verbs, beside those of the configuration, that the original scripts spelled differently
VERB_ALIASES = {"state-dict-path": "weights"}
DEMO_NOTE = "demo data: generated sequences with a hidden structure, not a real data set"
DEMO_MARK = " (demo data)"
MAX_COLUMNS = 6  # of metrics: what fits a terminal

typer_app = cli.make_app(
    APP, "Train, evaluate and use sequential recommenders: SASRec and HSTU blocks in plain PyTorch."
)
options = cli.config_options(Config, presets=PRESETS, aliases=ALIASES)

RunsDir = Annotated[
    Path, typer.Option("--runs-dir", help="Folder that run folders are made in.", rich_help_panel="Run")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Weights or checkpoint to use (.safetensors, or a .pt state dict); none: the run's best.",
        rich_help_panel="Run",
    ),
]
RunArgument = Annotated[
    Path | None, typer.Argument(help="Run folder, as `train` printed it; none: configuration flags and --weights.")
]


def app(argv: Sequence[str] | None = None) -> None:
    """Run the command line; accepts the original scripts' spellings and exits with 0, 1, 2, 130 or 143."""
    cli.run(
        typer_app,
        inference_only_as_verb(cli.without_local_rank(sys.argv[1:] if argv is None else argv)),
        prog_name=PROG,
        flags_bool=cli.bool_flags(Config),
        aliases={**ALIASES, **VERB_ALIASES},
        default_verb="train",
        verbs=VERBS,
    )


def inference_only_as_verb(argv: Sequence[str]) -> list[str]:
    """The words, with the original's `--inference_only [True|False]` turned into the verb `predict`."""
    words = list(argv)
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("_", "-") != "--inference-only":
            continue
        del words[index]
        if not value and index < len(words) and words[index].lower() in ("true", "false"):
            value = words.pop(index)
        if value.lower() == "false":
            return words
        return ["predict", *(words[1:] if words[:1] == ["train"] else words)]
    return words


@typer_app.command()
@options
def train(
    resolved: Resolved[Config],
    name: Annotated[str, typer.Option(help="Name of the run, part of its folder.", rich_help_panel="Run")] = "run",
    runs_dir: RunsDir = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Run folder to go on with, with its own configuration.", rich_help_panel="Run"),
    ] = None,
) -> None:
    """Train a model; without --data-path on built-in demo data. Under torchrun its processes share each step."""
    from shared import distributed

    if resume is not None:
        resolved = cli.configuration_of(resume, resolved, aliases=ALIASES)
    try:
        group = distributed.join(resolved.config.training.device)
        run_training(resolved, group, name=name, runs_dir=runs_dir, resume=resume)
    except distributed.LostPeerError as error:  # before there was a run to go on with
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(1) from None


def run_training(
    resolved: Resolved[Config], group: "Group | None", *, name: str, runs_dir: Path, resume: Path | None
) -> None:
    """What `train` does once it knows which processes take part; all but the first of them are silent."""
    import torch

    from apps.seqrec import train as training
    from shared import distributed
    from shared.amp import NonFiniteError
    from shared.files import atomic_write_text
    from shared.log import RunLog, SilentLog, StopSignal
    from shared.progress import Bar
    from shared.report import build_report

    rank, world = distributed.place(group)
    console = Console(highlight=False, soft_wrap=True, quiet=rank > 0)

    def say(line: str) -> None:
        console.print(line, markup=False)

    with distributed.first_before_others(group):
        sequences, is_demo = load_data(resolved.config, runs_dir)
    # before there is a folder: what cannot be built leaves none
    c = training.build(resolved.config, sequences, group=group)
    run_dir = resume
    if run_dir is None:
        new = (
            cli.new_run_dir(runs_dir, APP, ("demo-" if is_demo else "") + name, now=datetime.now()) if rank == 0 else ""
        )
        run_dir = Path(distributed.text_of_first(group, str(new)))
    start = None if resume is None else newest_start(c, run_dir, say=say)
    resume_step = None if resume is None else start.state.step if start is not None else 0
    if not distributed.same_everywhere(group, f"{resolved.config} {sequences.fingerprint} {resume_step}"):
        raise ValueError("the processes differ in configuration, data or checkpoint; give all of them the same files")
    if start is None and rank == 0:  # a new run, or one that was stopped before its first checkpoint
        atomic_write_text(run_dir / "config.yaml", dump_yaml(resolved))

    settings = resolved.config.training
    again = f"{launcher(world)} train --resume {shlex.quote(str(run_dir))}"
    with (
        SilentLog()
        if rank > 0
        else RunLog(run_dir, say=say, tensorboard=settings.tensorboard, resume_step=resume_step) as log,
        StopSignal(say=say) as stop,
    ):

        def complain(line: str) -> None:
            """Log a warning, from any process."""
            log.warn(line)
            if rank > 0:
                sys.stderr.write(f"warning: process {rank}: {line}\n")

        if is_demo:
            log.info(f"This is {DEMO_NOTE}; use --data-path for your own.")
        log.info(describe_run(c, run_dir))
        for warning in warnings_on(c):
            log.warn(warning)
        if resume is not None and start is None:
            log.warn(f"{run_dir} holds no checkpoint yet: starting from step 0")
        total = settings.max_steps or settings.epochs * c.steps_per_epoch
        with Bar(
            total=total,
            done=resume_step or 0,
            description="train (demo data)" if is_demo else "train",
            console=console,
        ) as bar:

            def on_step(note: str | None) -> None:
                bar.advance(1)
                if note is not None:
                    bar.note(note)

            try:
                outcome = training.fit(c, run_dir, log=log, stop=stop, start=start, on_step=on_step)
            except (NonFiniteError, training.DeadModelError) as error:  # in all processes alike
                log.warn(str(error))
                distributed.leave(group)
                raise typer.Exit(1) from None
            except torch.OutOfMemoryError as error:
                complain(f"{error}\nout of memory: try --accumulate 2, a smaller --batch-size, or --grad-checkpoint")
                raise typer.Exit(1) from None
            except distributed.LostPeerError as error:
                complain(f"{error}; go on from the last checkpoint with: {again}")
                raise typer.Exit(1) from None
        distributed.leave(group)
        if outcome.metrics is None:
            log.info(f"stopped at step {outcome.state.step}; resume with: {again}")
            raise typer.Exit(stop.exit_code)
        if rank > 0:
            return
        notes = ([DEMO_NOTE] if is_demo else []) + ([f"trained by {world} processes"] if world > 1 else [])
        result = training.write_result(
            c, run_dir, outcome, notes=notes, command=shown_command(world), git=cli.git_revision()
        )
        build_report(run_dir)
        log.info(f"run folder: {run_dir}; look at it: open {run_dir / 'report.html'} in a browser")
    print_table(console, result)


def warnings_on(c: "Components") -> list[str]:
    """What the configuration asks for that misleads, or that the data has not got."""
    config, sequences = c.config, c.sequences
    found = []
    if config.model.query_time and sequences.time is not None:
        found.append(
            "--query-time tells the model when the next item is asked for. In validation and test that is the target's "
            "own time, which leaks: compare such metrics with no others"
        )
    if config.model.query_time and sequences.time is None:
        found.append(f"--query-time has no effect: {sequences.name} has no times")
    if config.model.time_input and sequences.time is None:
        found.append(f"--time-input has no effect: {sequences.name} has no times")
    if sequences.action is None and len(set(config.training.action_weights)) > 1:
        found.append(f"--action-weights has no effect: {sequences.name} has no actions")
    return found


def newest_start(c: "Components", run_dir: Path, *, say: Callable[[str], None]) -> "Start | None":
    """Where a stopped run goes on, in all processes alike; None where it has saved nothing yet."""
    from apps.seqrec.train import restore
    from shared.checkpoint import load_checkpoint, newest_checkpoint
    from shared.distributed import place, text_of_first

    found = newest_checkpoint(run_dir / "checkpoints", warn=say) if place(c.group)[0] == 0 else None
    path = text_of_first(c.group, str(found[0]) if found is not None else "")
    if not path:
        return None
    return restore(c, *(found or (Path(path), load_checkpoint(path))))


def launcher(world: int) -> str:
    """The words before the verb, as they would be typed for so many processes."""
    return PROG if world == 1 else f"torchrun --nproc-per-node {world} -m apps.{APP}"


def describe_run(c: "Components", run_dir: Path) -> str:
    """One paragraph on what is about to be trained."""
    data = c.sequences
    processes = "" if c.group is None else f" in {c.group.world} processes"
    weights = sum(p.numel() for p in c.state.model.parameters())
    return (
        f"{data.name}: {data.num_users:,} users, {data.num_items:,} items, {data.num_events:,} events; "
        f"{weights:,} weights; {c.steps_per_epoch} steps per epoch on {c.device}{processes}, "
        f"{c.amp.precision} ({c.precision_reason}), {'packed' if c.packed else 'padded'} rows; run folder {run_dir}"
    )


def load_data(config: Config, runs_dir: Path) -> tuple["Sequences", bool]:
    """The sequences of --data-path, or the demo data, with what is held out; and whether they are demo data."""
    from apps.seqrec.contest_features import training_sequences
    from apps.seqrec.dataset import hold_out_time, hold_out_users, without_features
    from apps.seqrec.formats import read_sequences

    contest = load_contest(config, runs_dir)
    if contest is not None:
        sequences = training_sequences(contest)
        if not config.model.features:
            sequences = without_features(sequences)
    else:
        sequences = read_sequences(Path(str(config.data.data_path)), format=config.data.format)
    if config.data.split == "user":
        held_out = hold_out_users(sequences, share=config.data.held_out_share, seed=config.training.seed)
        sequences = replace(sequences, held_out=held_out)
    elif config.data.split == "time":
        sequences = replace(sequences, held_out=hold_out_time(sequences, share=config.data.held_out_share))
    return sequences, config.data.data_path is None


def load_contest(config: Config, runs_dir: Path) -> "Contest | None":
    """The packs of a contest folder at --data-path, or of the demo data; None where the path is something else."""
    from apps.seqrec.contest import is_contest, is_contest_pack, prepare_contest, read_contest
    from apps.seqrec.demo import write_demo
    from apps.seqrec.formats import DataError

    if config.data.data_path is None:
        source, pack = write_demo(runs_dir / APP / "demo-data"), runs_dir / APP / "demo-pack"
        try:
            return read_contest(pack)
        except DataError:  # absent, or made of other demo data
            return prepare_contest(source, pack, workers=1)
    path = Path(config.data.data_path)
    if is_contest_pack(path):
        return read_contest(path)
    if is_contest(path):
        output = shlex.quote(f"{path.name or 'contest'}-pack")
        raise ConfigError(
            f"{path} is in the contest form, which is converted once: "
            f"{PROG} prepare {shlex.quote(str(path))} {output}; then train with --data-path {output}"
        )
    return None


@typer_app.command()
@options
def evaluate(
    resolved: Resolved[Config],
    run: RunArgument = None,
    weights: Weights = None,
    runs_dir: RunsDir = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result here, as JSON.", rich_help_panel="Run")
    ] = None,
) -> None:
    """Measure a model on validation and test data, beside the baselines; --protocol chooses how."""
    from apps.seqrec.evaluate import baselines, protocol_text
    from apps.seqrec.evaluate import evaluate as measure
    from apps.seqrec.train import result_table, use_packed
    from shared.files import atomic_write_text
    from shared.progress import Bar

    console = Console(highlight=False, soft_wrap=True)
    if output is not None:
        cli.output_file(output)
    config, sequences, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    packed = use_packed(config.data.layout, model.item.weight.device)
    result: dict[str, Any] = {"app": APP, "weights": str(path), "data": sequences.name, "stages": {}}
    for stage in ("valid", "test"):
        with Bar(total=sequences.num_users, description=stage, unit="users") as bar:
            metrics = measure(model, sequences, stage, config=config, packed=packed, on_users=bar.reach)
        columns, rows = result_table(metrics, baselines(sequences, stage, config=config))
        part = {
            "title": f"{stage}, {path}",
            "protocol": protocol_text(sequences, stage, config),
            "table_columns": columns,
            "table": rows,
            "notes": [DEMO_NOTE] if is_demo else [],
        }
        result["stages"][stage] = part
        print_table(console, part)
    if output is not None:
        atomic_write_text(output, json.dumps(result, indent=2, allow_nan=False) + "\n")


@typer_app.command()
@options
def predict(
    resolved: Resolved[Config],
    run: RunArgument = None,
    weights: Weights = None,
    runs_dir: RunsDir = Path("runs"),
    output: Annotated[Path, typer.Option("--output", help="JSONL file to write.", rich_help_panel="Run")] = Path(
        "predictions.jsonl"
    ),
    k: Annotated[int, typer.Option("--k", min=1, help="Items per user.", rich_help_panel="Run")] = 10,
    keep_seen: Annotated[
        bool,
        typer.Option("--keep-seen/--drop-seen", help="Also recommend items of the history.", rich_help_panel="Run"),
    ] = False,
    test_users: Annotated[
        bool,
        typer.Option(
            "--test-users/--training-users",
            help="For the users of predict_seq.jsonl, where the data has them.",
            rich_help_panel="Run",
        ),
    ] = True,
    candidates: Annotated[
        bool,
        typer.Option(
            "--candidates/--all-items",
            help="Rank the candidates of predict_set.jsonl, where the data has them.",
            rich_help_panel="Run",
        ),
    ] = True,
    cold: Annotated[
        bool,
        typer.Option("--cold/--no-cold", help="Also rank candidates that training never met.", rich_help_panel="Run"),
    ] = True,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Folder for queries.fbin, items.fbin and items.u64bin as well, for use with faiss.",
            rich_help_panel="Run",
        ),
    ] = None,
) -> None:
    """Write the k best next items of every user, exactly ranked, after the whole history."""
    from apps.seqrec.contest_features import chosen_candidates, query_sequences
    from apps.seqrec.dataset import without_features
    from apps.seqrec.evaluate import predict as ranked
    from apps.seqrec.train import use_packed
    from shared.files import atomic_writer
    from shared.progress import Bar

    cli.output_file(output)
    if vectors is not None:
        cli.output_file(vectors / "queries.fbin")
    config, sequences, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    contest = load_contest(config, runs_dir)
    if test_users and contest is not None and contest.queries is not None:
        sequences = query_sequences(contest)
        if model.tower is None:
            sequences = without_features(sequences)
        model.use_features(sequences.features)
    items = Items(None, None, sequences.item_ids, f"{sequences.num_items:,} items")
    if candidates and contest is not None and contest.candidates is not None:
        # without features nothing is known of a cold one
        chosen = chosen_candidates(contest.candidates, cold=cold and model.tower is not None)
        names = tuple(str(raw) for raw in contest.candidates.creative[chosen].tolist())
        retrieval = contest.candidates.retrieval[chosen]
        items = Items(contest.candidates.row[chosen].long(), retrieval, names, f"{len(names):,} candidates")
    packed = use_packed(config.data.layout, model.item.weight.device)
    lines = 0
    with atomic_writer(output) as file, Bar(total=sequences.num_users, description="predict", unit="users") as bar:
        chunks = ranked(
            model,
            sequences,
            k=k,
            config=config,
            packed=packed,
            keep_seen=keep_seen,
            row_C=items.row,
            on_users=bar.reach,
        )
        first = 1 if items.row is None else 0
        for users, ids, scores in chunks:
            for user, row, values in zip(users.tolist(), ids.tolist(), scores.tolist(), strict=True):
                found = [(items.name[i - first], value) for i, value in zip(row, values, strict=True) if i >= 0]
                record = {
                    "user": sequences.user_ids[user],
                    "items": [item for item, _ in found],
                    "scores": [round(value, 6) for _, value in found],
                }
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                lines += 1
    mark = DEMO_MARK if is_demo else ""
    typer.echo(f"{output}: the best {k} or fewer for {lines:,} users, exact over {items.text}, from {path}{mark}")
    if vectors is not None:
        write_vectors(vectors, model, sequences, items, config=config, packed=packed)
        typer.echo(f"{vectors}: queries.fbin in the order of {output}, items.fbin and their ids in items.u64bin{mark}")


class Items(NamedTuple):
    """What `predict` ranks."""

    row: "Tensor | None"  # [C] int64 rows of features; None: all items
    id: "Tensor | None"  # [C] int64, what a search engine shall call them; None: their numbers
    name: tuple[str, ...]  # what the output calls them
    text: str


def write_vectors(
    folder: Path, model: "SeqRec", sequences: "Sequences", items: Items, *, config: Config, packed: bool
) -> None:
    """Write the vectors whose dot products are the scores, and the items' ids, in faiss' plain forms."""
    import torch

    from apps.seqrec.dataset import query_spans
    from apps.seqrec.evaluate import queries
    from apps.seqrec.vectors import write_fbin, write_u64bin
    from shared.amp import evaluation_mode

    folder.mkdir(parents=True, exist_ok=True)
    device, dim = model.item.weight.device, config.model.embed_dim
    spans = query_spans(sequences, "all", max_len=config.data.max_len, front=model.front is not None)
    with torch.no_grad(), evaluation_mode(model):
        row_C = torch.arange(1, sequences.num_items + 1) if items.row is None else items.row
        states = (q.state_BD for q in queries(model, sequences, spans, config=config, packed=packed, device=device))
        write_fbin(folder / "queries.fbin", states, num_rows=spans.user.numel(), dim=dim)
        parts = (model.candidates(model.vectors(part.to(device))) for part in torch.split(row_C, 1 << 16))
        write_fbin(folder / "items.fbin", parts, num_rows=row_C.numel(), dim=dim)
        write_u64bin(folder / "items.u64bin", row_C if items.id is None else items.id)


@typer_app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="File or folder with sequences, or a TAAC2025 contest folder.")],
    output: Annotated[Path, typer.Argument(help="Pack to write: a .safetensors file, for a contest folder a folder.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="auto, pairs, lines or inter.", rich_help_panel="Data")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read a contest folder; 0: one per core.", rich_help_panel="Data")
    ] = 0,
    families: Annotated[
        str,
        typer.Option(
            help="Embedding families of a contest folder, as 81,82; none named: those up to 1,024 numbers wide.",
            show_default="none",
            rich_help_panel="Data",
        ),
    ] = "",
) -> None:
    """Convert a source once into a pack that every later run maps into memory."""
    from apps.seqrec.contest import contest_bytes, is_contest, prepare_contest
    from apps.seqrec.formats import read_sequences, write_sequences
    from shared.progress import Bar

    if is_contest(source):
        chosen = tuple(families.split(",")) if families else None
        with Bar(total=contest_bytes(source, families=chosen), description="prepare", unit="bytes") as bar:
            contest = prepare_contest(
                source, output, workers=workers or None, on_bytes=bar.reach, say=typer.echo, families=chosen
            )
        typer.echo(
            f"{output}: {contest.sequences.num_users:,} users, {contest.sequences.num_items:,} items, "
            f"{contest.item.numel():,} events, {len(contest.user_fields)} user and {len(contest.item_fields)} item "
            f"features, embeddings {', '.join(contest.embeddings) or 'none'}; "
            f"train on it with: {PROG} train --data-path {output}"
        )
        return
    sequences = read_sequences(source, format=format)
    write_sequences(output, sequences, source=source)
    typer.echo(
        f"{output}: {sequences.num_users:,} users, {sequences.num_items:,} items, {sequences.num_events:,} events; "
        f"train on it with: {PROG} train --data-path {output}"
    )


@typer_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="File, folder, contest folder or pack to check.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="auto, pairs, lines, inter or pack.", rich_help_panel="Data")
    ] = "auto",
    limit: Annotated[int, typer.Option(min=1, help="Most faults to print.", rich_help_panel="Data")] = 20,
) -> None:
    """Look for every fault a source can have: file, line, field, expected, found, repair; exit code 2 on any error."""
    from apps.seqrec.contest import is_contest
    from apps.seqrec.contest_check import check_contest
    from apps.seqrec.formats import check_source

    if is_contest(source):
        faults = check_contest(source, limit=limit)
    else:
        faults = check_source(source, format=format, limit=limit)
    for fault in faults:
        typer.echo(str(fault))
    broken = any(fault.severity == "error" for fault in faults)
    verdict = (
        "cannot be read as it is" if broken else "can be read, with these warnings" if faults else "no fault found"
    )
    typer.echo(f"{source}: {verdict}")
    if broken:
        raise typer.Exit(2)


@typer_app.command()
@options
def export(
    resolved: Resolved[Config],
    output: Annotated[Path, typer.Argument(help="File to write, .safetensors.")],
    run: Annotated[Path | None, typer.Option("--run", help="Run folder to export from.", rich_help_panel="Run")] = None,
    weights: Weights = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Write the weights with the model's configuration and item ids, without optimizer state, for use elsewhere."""
    from shared.checkpoint import save_weights
    from shared.config import as_dict

    cli.output_file(output, suffix=".safetensors")
    config, sequences, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    meta = {
        "app": APP,
        "config": as_dict(config),
        "items": sequences.item_digest,
        "item_ids": list(sequences.item_ids),
        "from": str(path),
    }
    save_weights(output, model.state_dict(), meta)
    num_weights = sum(p.numel() for p in model.parameters())
    typer.echo(f"{output}: {num_weights:,} weights from {path}{DEMO_MARK if is_demo else ''}")


@typer_app.command()
@options
def bench(
    resolved: Resolved[Config],
    quick: cli.Quick = False,
    budget: cli.Budget = None,
    project_epochs: cli.ProjectEpochs = 0,
    shape: cli.Shape = "own",
    only: cli.Only = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Measure the ladder: every optimisation alone and one after the other, beside what the notes promise of it."""
    from apps.seqrec.bench import QUICK_BATCH, ladder, left_out, notes_shape
    from shared.device import pick_device
    from shared.ladder import chosen, total_runs
    from shared.progress import Bar
    from shared.report import build_report

    config, console = resolved.config, Console(highlight=False, soft_wrap=True)
    cli.refuse_torchrun(PROG)
    if cli.wants_notes(shape):
        if config.data.data_path is not None:
            raise ConfigError("--shape notes makes its own data; leave --data-path out")
        config, sequences = notes_shape(config, runs_dir / APP)
        is_demo = True
    else:
        sequences, is_demo = load_data(config, runs_dir)
    notes = ([DEMO_NOTE] if is_demo else []) + left_out(config)
    if quick and config.training.batch_size > QUICK_BATCH:
        notes.append(f"--quick: {QUICK_BATCH} sequences a step instead of {config.training.batch_size}")
        config = replace(config, training=replace(config.training, batch_size=QUICK_BATCH))
    rungs = chosen(ladder(config, sequences), only or ())
    description = f"bench{DEMO_MARK if is_demo else ''}"
    with Bar(total=total_runs(rungs), description=description, unit="runs", console=console) as bar:

        def on_run(name: str) -> None:
            bar.note(name)
            bar.advance()

        run_dir, result = cli.run_ladder(
            rungs,
            app=APP,
            data={
                "name": sequences.name,
                "demo": is_demo,
                "users": sequences.num_users,
                "items": sequences.num_items,
                "events": sequences.num_events,
                "batch_size": config.training.batch_size,
                "max_len": config.data.max_len,
            },
            device=pick_device(config.training.device),
            notes=notes,
            command=shown_command(1),
            runs_dir=runs_dir,
            quick=quick,
            budget=budget,
            project_epochs=project_epochs,
            on_run=on_run,
        )
    build_report(run_dir)
    cli.print_ladder(console, result)
    typer.echo(f"{run_dir}: bench.json and report.html{DEMO_MARK if is_demo else ''}")


@typer_app.command()
@options
def diagnose(
    resolved: Resolved[Config],
    budget: cli.SpeedBudget = 60.0,
    trace: cli.TraceFile = None,
    log: cli.PastRun = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Say where the time of this very training goes here, what limits it, and which flags make it faster."""
    from apps.seqrec.diagnose import subject
    from shared.diagnosis import diagnose as examine
    from shared.diagnosis import run_lines

    if log is not None:
        for line in run_lines(log):
            typer.echo(line)
        return
    cli.refuse_torchrun(PROG)
    if trace is not None:
        cli.output_file(trace, suffix=".json")
    sequences, is_demo = load_data(resolved.config, runs_dir)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    examine(subject(sequences), resolved, say=typer.echo, budget_s=budget, trace=trace)


@typer_app.command()
@options
def tune_speed(
    resolved: Resolved[Config],
    budget: cli.SpeedBudget = 120.0,
    limit_mib: cli.LimitMib = 0,
    again: cli.Again = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Find the fastest batch size and micro-batches here by trials; printed and remembered, never applied."""
    from apps.seqrec.diagnose import subject
    from shared.tuning import tune

    cli.refuse_torchrun(PROG)
    sequences, is_demo = load_data(resolved.config, runs_dir)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    tune(
        subject(sequences),
        resolved,
        folder=runs_dir / APP,
        say=typer.echo,
        limit_mib=limit_mib,
        budget_s=budget,
        again=again,
    )


def load_model(
    resolved: Resolved[Config], run: Path | None, weights: Path | None, runs_dir: Path
) -> tuple[Config, "Sequences", "SeqRec", Path, bool]:
    """Configuration, data, model with weights, where they came from, and whether the data is the demo's."""
    from apps.seqrec.train import make_model
    from shared.checkpoint import load_weights
    from shared.device import pick_device

    if run is not None:
        resolved = cli.configuration_of(run, resolved, aliases=ALIASES)
    if run is None and weights is None:
        raise ConfigError("which model? give a run folder, or --weights FILE with the flags it was trained with")
    path = weights or cli.checkpoint_of(run or Path(), prog=PROG)
    cli.refuse_torchrun(PROG)
    config = resolved.config
    state, meta = load_weights(path)
    sequences, is_demo = load_data(config, runs_dir)
    check_origin(meta, config, sequences, path)
    model = make_model(config, sequences, pick_device(config.training.device))
    cli.check_shapes(model.state_dict(), state, path)
    model.load_state_dict(state)
    return config, sequences, model.eval(), path, is_demo


def check_origin(meta: Mapping[str, Any], config: Config, sequences: "Sequences", path: Path) -> None:
    """Refuse weights of another model or of other items; a foreign file does not say, its shapes are all there is."""
    from shared.checkpoint import check_identity
    from shared.config import as_dict

    origin = meta.get("identity", meta)
    if not isinstance(origin.get("config"), Mapping) or "items" not in meta:
        return

    def part(app: str, settings: Mapping[str, Any], items: str) -> dict[str, Any]:
        return {"app": app, "model": settings["model"], "max_len": settings["data"]["max_len"], "items": items}

    check_identity(
        part(origin["app"], origin["config"], meta["items"]),
        part(APP, as_dict(config), sequences.item_digest),
        path=path,
        ignore={"model.dropout", "model.grad_checkpoint"},
    )


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The metrics with their protocol, the model beside the baselines; the best of each column in bold."""
    for note in result["notes"]:
        console.print(note, markup=False)
    console.print(result["protocol"], markup=False)
    measured = result["table_columns"][1:]
    kept = [name for name in measured if name.startswith("HR@") or name.endswith("@10") or "score" in name.lower()]
    columns = kept[-MAX_COLUMNS:]
    table = Table()
    table.add_column("model")
    for column in columns:
        table.add_column(column, justify="right")
    for row in result["table"]:
        cells = []
        for column in columns:
            best = max(other[column] for other in result["table"]) == row[column] > 0
            cells.append(f"[bold]{row[column]:.4f}[/bold]" if best else f"{row[column]:.4f}")
        table.add_row(row["model"], *cells)
    console.print(table)


def shown_command(world: int) -> str:
    """The command line of this run, as it would be typed."""
    return shlex.join([*launcher(world).split(), *cli.without_local_rank(sys.argv[1:])])
