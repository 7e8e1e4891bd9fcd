"""The verbs of reid, and the only file that knows about flags: builds, then calls.

torch is imported inside the verbs, so that `--help` answers at once.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from apps.reid.config import ALIASES, Config
from shared import cli
from shared.config import ConfigError, Resolved, dump_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from apps.reid.dataset import People, Stage
    from apps.reid.model import ReID
    from apps.reid.train import Components
    from shared.log import RunLog

APP = "reid"
PROG = f"python -m apps.{APP}"
PRESETS = Path(__file__).parent / "configs"
VERBS = ("train", "evaluate", "predict", "prepare", "check", "export", "bench", "diagnose", "tune-speed")
DEMO_NOTE = "demo data: generated people in five modalities, not a real data set"
DEMO_MARK = " (demo data)"
DEMO_SIZE = (64, 32)  # half of what the demo draws: enough to tell its people apart, and a quarter of the work
# What belongs to weights and comes with their file, None for all of it; also what says who was held out from training.
KEPT = {
    "model": None,
    "data": ("vocab", "max_tokens", "modalities", "val_share"),
    "training": ("subsets", "seed"),
}

typer_app = cli.make_app(
    APP, "Train, evaluate and use a person re-identification model for RGB, NIR, colour pencil, sketch and text."
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
Form = Annotated[
    str,
    typer.Option("--format", help="How to read it: auto, orbench, tree, market, csv or pack.", rich_help_panel="Data"),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder to keep features in; they are used again for the same weights and data alone.",
        show_default="none",
        rich_help_panel="Run",
    ),
]


def app(argv: Sequence[str] | None = None) -> None:
    """Run the command line; accepts the original scripts' spellings and exits with 0, 1, 2, 130 or 143."""
    cli.run(
        typer_app,
        sys.argv[1:] if argv is None else list(argv),
        prog_name=PROG,
        flags_bool=cli.bool_flags(Config),
        aliases=ALIASES,
        default_verb="train",
        verbs=VERBS,
    )


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
    """Train a model; without --data-path on built-in demo data."""
    import torch

    from apps.reid import train as training
    from shared.amp import NonFiniteError
    from shared.checkpoint import newest_checkpoint
    from shared.files import atomic_write_text
    from shared.log import RunLog, StopSignal
    from shared.progress import Bar
    from shared.report import build_report

    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)

    if resume is not None:
        resolved = cli.configuration_of(resume, resolved, aliases=ALIASES)
    people, is_demo = load_data(resolved.config, runs_dir_of(resume, runs_dir), say=say)
    c = training.build(resolved.config, people)  # before there is a folder: what cannot be built leaves none
    run_dir = resume or cli.new_run_dir(runs_dir, APP, ("demo-" if is_demo else "") + name, now=datetime.now())
    start, resume_step = None, None
    if resume is not None:
        found = newest_checkpoint(run_dir / "checkpoints", warn=say)
        start = training.restore(c, *found) if found is not None else None
        resume_step = start.state.step if start is not None else 0
        del found  # as large as the model and its optimizers
    if start is None:  # a new run, or one that was stopped before its first checkpoint
        atomic_write_text(run_dir / "config.yaml", dump_yaml(resolved))

    settings = resolved.config.training
    with (
        RunLog(run_dir, say=say, tensorboard=settings.tensorboard, resume_step=resume_step) as log,
        StopSignal(say=say) as stop,
    ):
        if is_demo:
            log.info(f"This is {DEMO_NOTE}; use --data-path for your own.")
        log.info(describe_run(c, run_dir))
        say_what_has_no_effect(c, log)
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

            def on_images(done: int) -> None:
                bar.note(f"evaluating: {done:,} images and captions")
                bar.advance(0)

            try:
                outcome = training.fit(
                    c, run_dir, log=log, stop=stop, start=start, on_step=on_step, on_images=on_images
                )
            except NonFiniteError as error:
                log.warn(str(error))
                raise typer.Exit(1) from None
            except torch.OutOfMemoryError as error:
                log.warn(
                    f"{error}\nout of memory: try --identities-per-batch {max(2, settings.identities_per_batch // 2)} "
                    "with --accumulate 2, --grad-checkpoint, or --subsets single"
                )
                raise typer.Exit(1) from None
        if outcome.metrics is None:
            log.info(
                f"stopped at step {outcome.state.step}; resume with: {PROG} train --resume {shlex.quote(str(run_dir))}"
            )
            raise typer.Exit(stop.exit_code)
        result = training.write_result(
            c,
            run_dir,
            outcome,
            notes=notes_on(is_demo=is_demo),
            command=shown_command(),
            git=cli.git_revision(),
        )
        build_report(run_dir)
        log.info(f"run folder: {run_dir}; look at it: open {run_dir / 'report.html'} in a browser")
    print_table(console, result)


def describe_run(c: "Components", run_dir: Path) -> str:
    """One paragraph on what is about to be trained."""
    from apps.reid.dataset import IMAGE_MODALITIES

    people = c.people
    weights = sum(p.numel() for p in c.state.model.parameters())
    counts = people.modality.bincount(minlength=len(IMAGE_MODALITIES)).tolist()
    shown = ", ".join(f"{count:,} {name}" for name, count in zip(IMAGE_MODALITIES, counts, strict=True) if count)
    height, width = people.images.frame[:2]
    return (
        f"{people.name}: {len(people.identity_ids):,} people ({people.num_identities:,} to train on, "
        f"{people.num_valid:,} to validate on), {shown} images seen in {height} x {width}, {len(people.captions):,} "
        f"captions; {people.split}; {weights:,} weights; {c.steps_per_epoch} steps per epoch on {c.device}, "
        f"{c.amp.precision} ({c.precision_reason}); run folder {run_dir}"
    )


def say_what_has_no_effect(c: "Components", log: "RunLog") -> None:
    """One line for each setting that was asked for and does nothing, and for images that are decoded in every step."""
    from apps.reid.dataset import ImageFiles

    data = c.config.data
    if data.max_tokens and not len(c.people.captions):
        log.info(f"--max-tokens {data.max_tokens} changes nothing: {c.people.name} has no captions")
    if isinstance(c.people.images, ImageFiles):
        height, width = c.people.images.frame[:2]
        form = "" if data.format == "auto" else f" --format {data.format}"
        log.info(
            "images are decoded whenever they are needed, which costs far more than the rest of the input; once for "
            f"all: {PROG} prepare {shlex.quote(str(data.data_path))} people.safetensors{form} --height {height} "
            f"--width {width}"
        )


def notes_on(*, is_demo: bool) -> list[str]:
    """What has to stand beside every number of a model trained like this."""
    return [DEMO_NOTE] * is_demo


def load_data(
    config: Config, runs_dir: Path, *, say: Callable[[str], None] = lambda line: None
) -> tuple["People", bool]:
    """The people of --data-path, or those of the demo as a pack; and whether they are the demo's."""
    from apps.reid.demo import write_demo
    from apps.reid.formats import DataError, prepare_source, read_data

    data = config.data
    if data.data_path is not None:
        people = read_data(
            Path(data.data_path),
            format=data.format,
            val_share=data.val_share,
            seed=config.training.seed,
            height=data.height,
            width=data.width,
        )
        return people, False
    folder = runs_dir / APP / "demo-data"
    if not folder.is_dir():
        say(f"drawing people into {folder}, which is done once{DEMO_MARK}")
    write_demo(folder)
    height, width = data.height or DEMO_SIZE[0], data.width or DEMO_SIZE[1]
    pack = runs_dir / APP / f"demo-data-{height}x{width}.safetensors"
    try:
        return read_data(pack, val_share=data.val_share, seed=config.training.seed), True
    except DataError:  # not there yet, or damaged, or of another version of the demo
        prepare_source(
            folder,
            pack,
            format="orbench",
            height=height,
            width=width,
            workers=1,
            say=lambda line: say(f"{line}{DEMO_MARK}"),
        )
    return read_data(pack, val_share=data.val_share, seed=config.training.seed), True


def runs_dir_of(run: Path | None, runs_dir: Path) -> Path:
    """The folder that a run was made in, since its demo data are there; else what the flag says."""
    return run.parent.parent if run is not None and run.parent.name == APP else runs_dir


@typer_app.command()
@options
def evaluate(
    resolved: Resolved[Config],
    run: RunArgument = None,
    weights: Weights = None,
    runs_dir: RunsDir = Path("runs"),
    cache: Cache = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write the result here, as JSON.", rich_help_panel="Run")
    ] = None,
) -> None:
    """Measure a model on validation and test people, list by list, beside raw pixels and chance."""
    from apps.reid.dataset import STAGES
    from apps.reid.evaluate import baselines, needed_items, protocol_text, retrieval_of
    from apps.reid.evaluate import evaluate as measure
    from apps.reid.train import result_table
    from shared.files import atomic_write_text
    from shared.progress import Bar

    console = Console(highlight=False, soft_wrap=True)
    if output is not None:
        cli.output_file(output)
    loaded = load_model(resolved, run, weights, runs_dir)
    config, people = loaded.config, loaded.people
    mark = DEMO_MARK if loaded.is_demo else ""
    result: dict[str, Any] = {"app": APP, "weights": str(loaded.path), "data": people.name, "stages": {}}
    for stage in STAGES:
        if retrieval_of(people, stage) is None:
            console.print(f"{people.name} has nobody for {stage}{mark}", markup=False)
            continue
        total = sum(map(len, needed_items(people, stage, config)))
        with Bar(total=total, description=f"evaluate {stage}", unit="images") as bar:
            metrics = measure(
                loaded.model,
                people,
                stage,
                config=config,
                token_CL=loaded.token_CL,
                cache=cache,
                rerank=config.training.rerank,
                on_images=bar.reach,
            )
        columns, rows = result_table(metrics, baselines(people, stage, config))
        part = {
            "title": f"{stage}, {loaded.path}",
            "protocol": protocol_text(people, stage, config),
            "table_columns": columns,
            "table": rows,
            "metrics": metrics,
            "notes": notes_on(is_demo=loaded.is_demo),
        }
        result["stages"][stage] = part
        print_lists(console, metrics, title=f"{stage}{mark}")
        print_table(console, part)
    if not result["stages"]:
        raise ConfigError(f"{people.name} has nobody to measure on; hold some out with --val-share, as 0.2")
    if output is not None:
        atomic_write_text(output, json.dumps(result, indent=2, allow_nan=False) + "\n")


@typer_app.command()
@options
def predict(
    resolved: Resolved[Config],
    run: RunArgument = None,
    weights: Weights = None,
    runs_dir: RunsDir = Path("runs"),
    cache: Cache = None,
    output: Annotated[Path, typer.Option("--output", help="CSV file to write.", rich_help_panel="Run")] = Path(
        "ranking.csv"
    ),
    sheet: Annotated[
        Path | None,
        typer.Option(
            "--sheet",
            help="Also write an HTML page of queries and found images, right and wrong ones marked.",
            show_default="none",
            rich_help_panel="Run",
        ),
    ] = None,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Queries on that page.", rich_help_panel="Run")] = 40,
    wrong_first: Annotated[
        bool,
        typer.Option(
            "--wrong-first/--mixed", help="Show queries whose first hit is wrong first.", rich_help_panel="Run"
        ),
    ] = False,
    list_name: Annotated[
        str | None,
        typer.Option(
            "--list", help="List of queries, as NIR+SK.", show_default="the first there is", rich_help_panel="Run"
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", help="valid or test.", show_default="test, where there is one", rich_help_panel="Run"),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Gallery images per query.", rich_help_panel="Run")] = 10,
) -> None:
    """Write the ranked gallery of every query of a list as CSV, and as a page of images where asked."""
    from apps.reid.evaluate import needed_items, query_lists, rank_gallery
    from apps.reid.sheet import write_ranking, write_sheet
    from shared.progress import Bar

    cli.output_file(output)
    if sheet is not None:
        cli.output_file(sheet, suffix=".html")
    loaded = load_model(resolved, run, weights, runs_dir)
    config, people = loaded.config, loaded.people
    asked = stage_named(stage, people)
    names = list(query_lists(people, asked, config))
    name = names[0] if list_name is None else list_name.upper()
    if name not in names:
        raise ConfigError(f"--list is {list_name}; {people.name} has for {asked}: {', '.join(names)}")
    only = name if cache is None else None  # what is cached serves all lists
    total = sum(map(len, needed_items(people, asked, config, only=only)))
    with Bar(total=total, description="predict", unit="images") as bar:
        ranked = list(
            rank_gallery(
                loaded.model,
                people,
                asked,
                name,
                k=k,
                config=config,
                token_CL=loaded.token_CL,
                cache=cache,
                rerank=config.training.rerank,
                on_images=bar.reach,
            )
        )
        count = write_ranking(output, people, ranked)
    mark = DEMO_MARK if loaded.is_demo else ""
    if sheet is not None:
        title = f"{name}, {asked} people of {people.name}"
        order: Literal["wrong", "mixed"] = "wrong" if wrong_first else "mixed"
        notes = [*notes_on(is_demo=loaded.is_demo), f"weights: {loaded.path}"]
        shown = write_sheet(sheet, people, ranked, title=title, notes=notes, limit=queries, first=order)
        typer.echo(f"{sheet}: {shown:,} queries to look at{mark}")
    typer.echo(f"{output}: the best {k} gallery images of {count:,} {name} queries, from {loaded.path}{mark}")


def stage_named(name: str | None, people: "People") -> "Stage":
    """The stage that a flag names, or the last one that the data have."""
    from apps.reid.dataset import STAGES
    from apps.reid.evaluate import retrieval_of

    there = [stage for stage in STAGES if retrieval_of(people, stage) is not None]
    for stage in there:
        if name == stage or (name is None and stage == there[-1]):
            return stage
    raise ConfigError(f"--stage is {name or 'not given'}; {people.name} has {' and '.join(there) or 'neither part'}")


@typer_app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Folder or table with images of people.")],
    output: Annotated[Path, typer.Argument(help="Pack to write, a .safetensors file; the images lie beside it.")],
    format: Form = "auto",  # noqa: A002 - the flag's name
    height: Annotated[int, typer.Option(min=16, help="Height of the images (pixels).", rich_help_panel="Data")] = 256,
    width: Annotated[int, typer.Option(min=16, help="Width of the images (pixels).", rich_help_panel="Data")] = 128,
    margin: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.5,
            help="Margin for crops on each side, as a share of height and width.",
            rich_help_panel="Data",
        ),
    ] = 1 / 32,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that decode.", show_default="one per core", rich_help_panel="Data"),
    ] = None,
) -> None:
    """Decode and resize all images once into a pack that every later run maps into memory; may be interrupted."""
    from apps.reid.formats import prepare_source
    from shared.progress import Bar

    with Bar(total=0, description="prepare", unit="images") as bar:

        def on_images(done: int, total: int) -> None:
            bar.total = total
            bar.reach(done)

        people = prepare_source(
            source,
            output,
            format=format,
            height=height,
            width=width,
            margin=margin,
            workers=workers,
            on_images=on_images,
            say=typer.echo,
        )
    typer.echo(
        f"{output}: {people.num_images:,} images of {len(people.identity_ids):,} people, {len(people.captions):,} "
        f"captions; train on it with: {PROG} train --data-path {shlex.quote(str(output))}"
    )


@typer_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="Folder, table or pack to check.")],
    format: Form = "auto",  # noqa: A002 - the flag's name
    limit: Annotated[int, typer.Option(min=1, help="Most faults to print.", rich_help_panel="Data")] = 20,
) -> None:
    """Look for every fault a source can have: file, row, field, expected, found, repair; exit code 2 on any error."""
    from apps.reid.formats import check_source

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
    """Write the model with the unit features of all images and captions, paths and identities, for use elsewhere."""
    import torch

    from apps.reid.evaluate import encode_people
    from shared.checkpoint import save_weights
    from shared.config import as_dict
    from shared.progress import Bar

    cli.output_file(output, suffix=".safetensors")
    loaded = load_model(resolved, run, weights, runs_dir)
    config, people = loaded.config, loaded.people
    rows, places = torch.arange(people.num_images), torch.arange(len(people.captions))
    with Bar(total=rows.numel() + places.numel(), description="export", unit="images") as bar:
        found = encode_people(loaded.model, people, rows, places, loaded.token_CL, config=config, on_images=bar.reach)
    unit = torch.nn.functional.normalize
    meta = {
        "app": APP,
        "config": as_dict(config),
        "identities": people.identity_digest,
        "modalities": list(loaded.modalities),
        "size": list(people.images.frame[:2]),
        "paths": list(people.path),
        "identity_ids": list(people.identity_ids),
        "identity_of_image": people.identity.tolist(),
        "modality_of_image": people.modality.tolist(),
        "captions": list(people.captions),
        "from": str(loaded.path),
    }
    features = {"image": unit(found.image, dim=1), "caption": unit(found.caption, dim=1)}
    save_weights(output, {**loaded.model.state_dict(), **features}, meta)
    typer.echo(
        f"{output}: {rows.numel():,} images and {places.numel():,} captions in {found.image.shape[1]} dimensions, with "
        f"the model, from {loaded.path}{DEMO_MARK if loaded.is_demo else ''}"
    )


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
    from apps.reid.bench import QUICK_SHAPE, ladder, left_out, notes_shape
    from shared.device import pick_device
    from shared.ladder import chosen, total_runs
    from shared.progress import Bar
    from shared.report import build_report

    config, console = resolved.config, Console(highlight=False, soft_wrap=True)
    cli.refuse_torchrun(PROG)
    if cli.wants_notes(shape):
        if config.data.data_path is not None:
            raise ConfigError("--shape notes makes its own data; leave --data-path out")
        config, people = notes_shape(config)
        is_demo = True
    else:
        people, is_demo = load_data(config, runs_dir, say=typer.echo)
    notes = notes_on(is_demo=is_demo) + left_out(config, people)
    identities, instances = config.training.identities_per_batch, config.training.num_instances
    if quick and identities * instances > QUICK_SHAPE[0] * QUICK_SHAPE[1]:
        notes.append(
            f"--quick: {QUICK_SHAPE[0]} x {QUICK_SHAPE[1]} samples a step instead of {identities} x {instances}"
        )
        identities, instances = QUICK_SHAPE
        training = replace(config.training, identities_per_batch=identities, num_instances=instances)
        config = replace(config, training=training)
    whole = ladder(config, people, quick=quick, only=only or ())
    rungs = chosen(whole, only or ())
    description = f"bench{DEMO_MARK if is_demo else ''}"
    with Bar(total=total_runs(rungs), description=description, unit="runs", console=console) as bar:

        def on_run(name: str) -> None:
            bar.note(name)
            bar.advance()

        run_dir, result = cli.run_ladder(
            rungs,
            app=APP,
            data={
                "name": people.name,
                "demo": is_demo,
                "identities": people.num_identities,
                "images": people.num_images,
                "height": people.images.frame.height,
                "width": people.images.frame.width,
                "batch": f"{identities} x {instances}",
                "samples per epoch": whole.epoch.samples if whole.epoch is not None else 0,
            },
            device=pick_device(config.training.device),
            notes=notes,
            command=shown_command(),
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
    from apps.reid.diagnose import EXPECTED, subject
    from shared.diagnosis import diagnose as examine
    from shared.diagnosis import run_lines

    if log is not None:
        for line in run_lines(log, EXPECTED):
            typer.echo(line)
        return
    cli.refuse_torchrun(PROG)
    if trace is not None:
        cli.output_file(trace, suffix=".json")
    people, is_demo = load_data(resolved.config, runs_dir, say=typer.echo)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    examine(subject(people), resolved, say=typer.echo, budget_s=budget, trace=trace)


@typer_app.command()
@options
def tune_speed(
    resolved: Resolved[Config],
    budget: cli.SpeedBudget = 120.0,
    limit_mib: cli.LimitMib = 0,
    again: cli.Again = False,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Find the fastest batch size and loader here by trials; printed and remembered, never applied."""
    from apps.reid.diagnose import subject
    from shared.tuning import tune

    cli.refuse_torchrun(PROG)
    people, is_demo = load_data(resolved.config, runs_dir, say=typer.echo)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    tune(
        subject(people),
        resolved,
        folder=runs_dir / APP,
        say=typer.echo,
        limit_mib=limit_mib,
        budget_s=budget,
        again=again,
    )


class Loaded(NamedTuple):
    """A model with its weights, and the people it is used on."""

    config: Config
    people: "People"
    token_CL: "Tensor"  # of all captions
    model: "ReID"
    path: Path  # where the weights came from
    is_demo: bool
    modalities: tuple[str, ...]  # that it was trained with


def load_model(resolved: Resolved[Config], run: Path | None, weights: Path | None, runs_dir: Path) -> Loaded:
    """A model with its weights on the device. The people may be others than those it was trained on."""
    from apps.reid.dataset import MODALITIES
    from apps.reid.train import chosen_modalities, make_model, tokenizer_of, tokens_of
    from shared.checkpoint import load_weights
    from shared.device import pick_device

    if run is not None:
        resolved = cli.configuration_of(run, resolved, aliases=ALIASES)
    if run is None and weights is None:
        raise ConfigError("which model? give a run folder, or --weights FILE with the flags it was trained with")
    path = weights or cli.checkpoint_of(run or Path(), prog=PROG)
    state, meta = load_weights(path)
    config = as_trained(stored_config(meta, path), resolved)
    people, is_demo = load_data(config, runs_dir_of(run, runs_dir))
    modalities = tuple(meta.get("modalities") or (MODALITIES[number] for number in chosen_modalities(config, people)))
    height, width = people.images.frame[:2]
    if meta.get("size") not in (None, [height, width]):
        rows, columns = meta["size"]
        raise ConfigError(
            f"{path} was trained on images of {rows} x {columns}, and those of {people.name} are seen in {height} x "
            f"{width}; use --height {rows} --width {columns}, or a pack prepared with them"
        )
    is_asked = resolved.sources["data.modalities"].startswith("flag ")
    if not is_asked and meta.get("identities") not in (None, people.identity_digest):  # others may have more of them
        config = replace(config, data=replace(config.data, modalities=modalities))
    num_identities = len(state["classifier.weight"]) if "classifier.weight" in state else people.num_identities
    model = make_model(
        config, people, num_identities=num_identities, modalities=[MODALITIES.index(name) for name in modalities]
    )
    if "paths" in meta:  # an export, which holds features too
        state = {name: value for name, value in state.items() if name not in ("image", "caption")}
    cli.check_shapes(model.state_dict(), state, path)
    model.load_state_dict(state)
    token_CL = tokens_of(people, tokenizer_of(config.data))
    device = pick_device(config.training.device)
    return Loaded(config, people, token_CL, model.to(device).eval(), path, is_demo, modalities)


def stored_config(meta: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The configuration that weights were trained with, empty in a foreign file; refuses weights of another app."""
    from shared.checkpoint import check_identity

    origin = meta.get("identity", meta)
    if not isinstance(origin, Mapping) or not isinstance(origin.get("config"), Mapping):
        return {}
    check_identity({"app": origin.get("app")}, {"app": APP}, path=path)
    return origin["config"]


def as_trained(stored: Mapping[str, Any], resolved: Resolved[Config]) -> Config:
    """The configuration with what belongs to the weights from their file, unless flags say otherwise."""
    config = resolved.config
    for section, names in KEPT.items():
        part = stored.get(section, {})
        kept = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in part.items()
            if (names is None or name in names) and resolved.sources.get(f"{section}.{name}") == "default"
        }
        config = replace(config, **{section: replace(getattr(config, section), **kept)})
    return config


def print_lists(console: Console, metrics: Mapping[str, float], *, title: str) -> None:
    """The model's figures, a line per list of queries."""
    figures = list(dict.fromkeys(name.rpartition("/")[2] for name in metrics))
    table = Table(title=title, title_justify="left")
    table.add_column("queries")
    for figure in figures:
        table.add_column(figure, justify="right")
    for name in dict.fromkeys(name.rpartition("/")[0] for name in metrics):
        table.add_row(name, *(f"{metrics[f'{name}/{figure}']:.4f}" for figure in figures))
    console.print(table)


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """mAP of every mean, and R1 of all, with their protocol, the model beside the baselines; the best ones in bold."""
    for note in result["notes"]:
        console.print(note, markup=False)
    console.print(result["protocol"], markup=False)
    columns = [name for name in result["table_columns"] if name.endswith("/mAP") or name == "MM/R1"]  # fits a terminal
    table = Table()
    table.add_column("model")
    for column in columns:
        table.add_column(column.replace("/", "\n"), justify="right")
    for row in result["table"]:
        cells = []
        for column in columns:
            if column not in row:
                cells.append("-")
                continue
            best = max(other.get(column, 0.0) for other in result["table"]) == row[column] > 0
            cells.append(f"[bold]{row[column]:.4f}[/bold]" if best else f"{row[column]:.4f}")
        table.add_row(row["model"], *cells)
    console.print(table)


def shown_command() -> str:
    """The command line of this process, as it would be typed."""
    return shlex.join([*PROG.split(), *sys.argv[1:]])
