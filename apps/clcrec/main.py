"""The verbs of clcrec, and the only file that knows about flags: builds, then calls.

torch is imported inside the verbs, so that `--help` answers at once.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from apps.clcrec.config import ALIASES, Config, TrainConfig
from shared import cli
from shared.config import BOOL_WORDS, ConfigError, Resolved, dump_yaml

if TYPE_CHECKING:
    from torch import Tensor

    from apps.clcrec.dataset import ColdStart, Group
    from apps.clcrec.model import CLCRec
    from apps.clcrec.train import Components
    from shared.log import RunLog
    from shared.progress import Bar
    from shared.ranking import Lists

APP = "clcrec"
PROG = f"python -m apps.{APP}"
PRESETS = Path(__file__).parent / "configs"
VERBS = ("train", "evaluate", "predict", "prepare", "check", "export", "bench", "diagnose", "tune-speed")
# flags of the verbs, beside those of the configuration, that the original scripts spelled differently
VERB_ALIASES = {"model-name": "name"}
DEMO_NOTE = "demo data: generated users and items with a hidden structure, not a real data set"
DEMO_MARK = " (demo data)"
LEAK_NOTE = "--neg-exclude all: held-out pairs were never drawn as negatives, so training knew something of them"

typer_app = cli.make_app(APP, "Train, evaluate and use a contrastive cold-start recommender: CLCRec in plain PyTorch.")
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
        amp_as_precision(sys.argv[1:] if argv is None else argv),
        prog_name=PROG,
        flags_bool=cli.bool_flags(Config),
        aliases={**ALIASES, **VERB_ALIASES},
        default_verb="train",
        verbs=VERBS,
    )


def amp_as_precision(argv: Sequence[str]) -> list[str]:
    """The words, with `--amp [True|False]` and `--no-amp` turned into `--precision auto` or `--precision fp32`."""
    words, result = list(argv), list[str]()
    while words:
        word = words.pop(0)
        name, _, value = word.replace("_", "-").partition("=")
        if name not in ("--amp", "--no-amp"):
            result.append(word)
            continue
        if not value and words and words[0].lower() in BOOL_WORDS:
            value = words.pop(0)
        if (value.lower() or "true") not in BOOL_WORDS:
            result.append(word)  # left for the parser to refuse
            continue
        is_on = (name == "--amp") == BOOL_WORDS[value.lower() or "true"]
        result.append(f"--precision={'auto' if is_on else 'fp32'}")
    return result


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

    from apps.clcrec import train as training
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
    data, is_demo = load_data(resolved.config, runs_dir)
    c = training.build(resolved.config, data)  # before there is a folder: what cannot be built leaves none
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
        say_what_has_no_effect(resolved.config, log)
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

            def on_rows(done: int) -> None:
                bar.note(f"drawing negatives: {done:,} of {data.num_pairs:,} pairs")
                bar.advance(0)

            try:
                outcome = training.fit(c, run_dir, log=log, stop=stop, start=start, on_step=on_step, on_rows=on_rows)
            except NonFiniteError as error:
                log.warn(str(error))
                raise typer.Exit(1) from None
            except torch.OutOfMemoryError as error:
                log.warn(f"{error}\nout of memory: try --batch-size 256 or 128, --num-negatives 64, or --accumulate 2")
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
            notes=notes_on(resolved.config, is_demo=is_demo),
            command=shown_command(),
            git=cli.git_revision(),
        )
        build_report(run_dir)
        log.info(f"run folder: {run_dir}; look at it: open {run_dir / 'report.html'} in a browser")
    print_table(console, result)


def describe_run(c: "Components", run_dir: Path) -> str:
    """One paragraph on what is about to be trained."""
    data = c.data
    weights = sum(p.numel() for p in c.state.model.parameters())
    return (
        f"{data.name}: {data.num_users:,} users, {data.num_warm:,} warm and {data.num_items - data.num_warm:,} cold "
        f"items, {data.num_pairs:,} training pairs, content {', '.join(f'feat_{m}' for m in c.modalities)}; "
        f"{weights:,} weights; {c.steps_per_epoch} steps per epoch on {c.device}, "
        f"{c.amp.precision} ({c.precision_reason}); run folder {run_dir}"
    )


def say_what_has_no_effect(config: Config, log: "RunLog") -> None:
    """One line for each setting that was asked for and does nothing, or takes the effect of something else."""
    training = config.training
    if training.num_workers:
        log.info(
            f"--num-workers {training.num_workers} is not used: batches are made from tensors in this process, "
            "where workers would only cost"
        )
    if training.resample_epochs != TrainConfig().resample_epochs and training.negatives != "pool":
        log.info(f"--resample-epochs {training.resample_epochs} is about --negatives pool, and changes nothing here")
    if training.scores != "auto" and training.negatives == "shared":
        log.info(f"--scores {training.scores} is about negatives of each pair's own, and changes nothing here")
    if training.lr_lambda in (0.0, 1.0):
        loss = "user-item" if training.lr_lambda else "item-content"
        log.warn(
            f"lr_lambda {training.lr_lambda:g} multiplies the {loss} loss by zero, so that nothing learns from it; "
            "use a value between 0 and 1, as --lr-lambda 0.5"
        )


def notes_on(config: Config, *, is_demo: bool) -> list[str]:
    """What has to stand beside every number of a model trained like this."""
    return [DEMO_NOTE] * is_demo + [LEAK_NOTE] * (config.training.neg_exclude == "all")


def load_data(config: Config, runs_dir: Path) -> tuple["ColdStart", bool]:
    """The data of --data-path, or the demo data; and whether they are demo data."""
    from apps.clcrec.demo import write_demo
    from apps.clcrec.formats import read_data

    if config.data.data_path is None:
        return read_data(write_demo(runs_dir / APP / "demo-data")), True
    return read_data(Path(config.data.data_path)), False


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
    """Measure a model on validation and test data, beside the baselines: all, warm and cold items."""
    from apps.clcrec.dataset import STAGES
    from apps.clcrec.evaluate import baselines, evaluate_stages, protocol_text
    from apps.clcrec.train import result_table
    from shared.files import atomic_write_text
    from shared.progress import Bar

    console = Console(highlight=False, soft_wrap=True)
    if output is not None:
        cli.output_file(output)
    config, data, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    result: dict[str, Any] = {"app": APP, "weights": str(path), "data": data.name, "stages": {}}
    with Bar(total=data.num_users, description="evaluate", unit="users") as bar:
        metrics = evaluate_stages(model, data, STAGES, config=config, on_users=bar.reach)
        bar.reach(data.num_users)  # those without held-out items were not measured
    for stage in STAGES:
        columns, rows = result_table(metrics[stage], baselines(data, stage, model.content.cpu(), config=config))
        part = {
            "title": f"{stage}, {path}",
            "protocol": protocol_text(data, stage, config.training),
            "table_columns": columns,
            "table": rows,
            "notes": notes_on(config, is_demo=is_demo),
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
    k: Annotated[
        int, typer.Option("--k", min=1, help="Items per user, or users per item.", rich_help_panel="Run")
    ] = 10,
    group: Annotated[
        str | None,
        typer.Option(
            "--group", help="Items to choose from: all, warm or cold.", show_default="all", rich_help_panel="Run"
        ),
    ] = None,
    users_for: Annotated[
        str | None,
        typer.Option(
            "--users-for",
            help="Turn it round: the best users for the items that are all, warm or cold.",
            show_default="none",
            rich_help_panel="Run",
        ),
    ] = None,
    new_items: Annotated[
        Path | None,
        typer.Option(
            "--new-items",
            help="The best users for items that are not in the data: a folder with their feat_v, feat_a, feat_t.",
            rich_help_panel="Run",
        ),
    ] = None,
    keep_seen: Annotated[
        bool,
        typer.Option("--keep-seen/--drop-seen", help="Also recommend what is known already.", rich_help_panel="Run"),
    ] = False,
) -> None:
    """Write the k best items of every user, or the k best users of every item, exactly ranked."""
    from apps.clcrec.evaluate import predict_items, predict_users
    from shared.progress import Bar

    if users_for is not None and new_items is not None:
        raise ConfigError("--users-for takes items of the data and --new-items those of a folder; give one of them")
    if group is not None and (users_for is not None or new_items is not None):
        raise ConfigError("--group is about items for users; --users-for names the items that users are wanted for")
    wanted = group_named("--group", group or "all")
    asked = None if users_for is None else group_named("--users-for", users_for)
    cli.output_file(output)
    config, data, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    items = None
    if asked is not None:
        items = items_of_data(asked, model, config, data)
    elif new_items is not None:
        items = items_of_folder(new_items, model, config, data)
    query: tuple[str, Sequence[str]]
    if items is None:
        query, best, num_ranked = ("user", data.user_ids), ("items", data.item_ids), len(rows_of(wanted, data))
        bar = Bar(total=data.num_users, description="predict", unit="users")
        chunks = predict_items(model, data, k=k, config=config, group=wanted, keep_seen=keep_seen, on_users=bar.reach)
    else:
        query, best, num_ranked = ("item", items.names), ("users", data.user_ids), data.num_users
        bar = Bar(total=len(items.names), description="predict", unit="items")
        known = None if keep_seen else items.known
        chunks = predict_users(model, items.vectors, k=k, config=config, known=known, on_items=bar.reach)
    write_ranked(output, bar, chunks, query=query, best=best)
    typer.echo(
        f"{output}: the best {k} or fewer for {len(query[1]):,} {query[0]}s, exact over {num_ranked:,} {best[0]}, "
        f"from {path}{DEMO_MARK if is_demo else ''}"
    )


class Items(NamedTuple):
    """Items to find users for."""

    names: Sequence[str]
    vectors: "Tensor"  # [N, D] float32
    known: "Lists | None"  # users of each, not to be found again


def rows_of(group: "Group", data: "ColdStart") -> range:
    """The numbers of a group's items."""
    return range(data.num_warm if group == "cold" else 0, data.num_warm if group == "warm" else data.num_items)


def items_of_data(group: "Group", model: "CLCRec", config: Config, data: "ColdStart") -> Items:
    """The items of a group, with the users that have them in training, validation or test."""
    import torch

    from apps.clcrec.evaluate import matrices, users_of_items
    from shared.ranking import take_rows

    rows = rows_of(group, data)
    known = take_rows(users_of_items(data.known, data.num_items), torch.arange(rows.start, rows.stop))
    _, item_ID = matrices(model, cold_scale=config.training.cold_scale)
    return Items(data.item_ids[rows.start : rows.stop], item_ID[rows.start : rows.stop], known)


def items_of_folder(folder: Path, model: "CLCRec", config: Config, data: "ColdStart") -> Items:
    """The items whose content is in a folder, named by their rows."""
    import torch

    from apps.clcrec.dataset import chosen_modalities
    from apps.clcrec.formats import read_content
    from apps.clcrec.model import normalised_content

    chosen = chosen_modalities(data, has_v=config.data.has_v, has_a=config.data.has_a, has_t=config.data.has_t)
    widths = {name: features.shape[1] for name, features in data.content.items()}
    content = read_content(folder, modalities=chosen, widths=widths)
    content_NF = normalised_content([content[name] for name in chosen]).to(model.content.device)
    with torch.no_grad():
        item_ND = model.encode(content_NF).float() * config.training.cold_scale
        return Items([str(row) for row in range(item_ND.shape[0])], item_ND, None)


def write_ranked(
    output: Path,
    bar: "Bar",
    chunks: "Iterator[tuple[Tensor, Tensor, Tensor]]",
    *,
    query: tuple[str, Sequence[str]],
    best: tuple[str, Sequence[str]],
) -> None:
    """Write rankings as JSONL: a key and its names for what was asked, a key and its names for what was found."""
    from shared.files import atomic_writer

    with atomic_writer(output) as file, bar:
        for asked, found, scores in chunks:
            for row, places, values in zip(asked.tolist(), found.tolist(), scores.tolist(), strict=True):
                kept = [(best[1][place], value) for place, value in zip(places, values, strict=True) if place >= 0]
                record = {
                    query[0]: query[1][row],
                    best[0]: [name for name, _ in kept],
                    "scores": [round(value, 6) for _, value in kept],
                }
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def group_named(flag: str, name: str) -> "Group":
    """The group of items that a flag names."""
    from apps.clcrec.dataset import GROUPS

    for group in GROUPS:
        if group == name:
            return group
    raise ConfigError(f"{flag} is {name}; expected one of {', '.join(GROUPS)}")


@typer_app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Folder in the original's layout, MovieLens ratings, or RecBole.")],
    output: Annotated[Path, typer.Argument(help="Pack to write, a .safetensors file.")],
    cold_share: Annotated[
        float,
        typer.Option(help="Share of items made cold, where ratings are split here.", rich_help_panel="Data"),
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that split.", rich_help_panel="Data")] = 42,
    min_rating: Annotated[
        float | None,
        typer.Option(help="Ratings below it are left out.", show_default="none", rich_help_panel="Data"),
    ] = None,
) -> None:
    """Convert a source once into a pack that every later run maps into memory; ratings are split here."""
    from apps.clcrec.formats import prepare_source

    data = prepare_source(source, output, cold_share=cold_share, seed=seed, min_rating=min_rating, say=typer.echo)
    typer.echo(
        f"{output}: {data.num_users:,} users, {data.num_warm:,} warm and {data.num_items - data.num_warm:,} cold "
        f"items, {data.num_pairs:,} training pairs; train on it with: {PROG} train --data-path {output}"
    )


@typer_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="Folder or pack to check.")],
    limit: Annotated[int, typer.Option(min=1, help="Most faults to print.", rich_help_panel="Data")] = 20,
) -> None:
    """Look for every fault a source can have: file, line, field, expected, found, repair; exit code 2 on any error."""
    from apps.clcrec.formats import check_source

    faults = check_source(source, limit=limit)
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
    """Write the vectors of all users and items with the encoder, configuration and ids, for use elsewhere."""
    from apps.clcrec.dataset import chosen_modalities
    from apps.clcrec.evaluate import matrices
    from shared.checkpoint import save_weights
    from shared.config import as_dict

    cli.output_file(output, suffix=".safetensors")
    config, data, model, path, is_demo = load_model(resolved, run, weights, runs_dir)
    chosen = chosen_modalities(data, has_v=config.data.has_v, has_a=config.data.has_a, has_t=config.data.has_t)
    user_UD, item_ID = matrices(model, cold_scale=config.training.cold_scale)
    meta = {
        "app": APP,
        "config": as_dict(config),
        "items": data.item_digest,
        "content": list(chosen),
        "num_warm": data.num_warm,
        "user_ids": list(data.user_ids),
        "item_ids": list(data.item_ids),
        "from": str(path),
    }
    save_weights(output, {**model.state_dict(), "user": user_UD, "item": item_ID}, meta)
    typer.echo(
        f"{output}: {data.num_users:,} users and {data.num_items:,} items in {user_UD.shape[1]} dimensions, with the "
        f"encoder, from {path}{DEMO_MARK if is_demo else ''}"
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
    from apps.clcrec.bench import QUICK_BATCH, ladder, left_out, notes_data
    from shared.device import pick_device
    from shared.ladder import chosen, total_runs
    from shared.progress import Bar
    from shared.report import build_report

    config, console = resolved.config, Console(highlight=False, soft_wrap=True)
    cli.refuse_torchrun(PROG)
    if cli.wants_notes(shape):
        if config.data.data_path is not None:
            raise ConfigError("--shape notes makes its own data; leave --data-path out")
        data, is_demo = notes_data(), True
    else:
        data, is_demo = load_data(config, runs_dir)
    notes = ([DEMO_NOTE] if is_demo else []) + left_out(config)
    if quick and config.training.batch_size > QUICK_BATCH:
        notes.append(f"--quick: {QUICK_BATCH} pairs a step instead of {config.training.batch_size}")
        config = replace(config, training=replace(config.training, batch_size=QUICK_BATCH))
    rungs = chosen(ladder(config, data, quick=quick, only=only or ()), only or ())
    description = f"bench{DEMO_MARK if is_demo else ''}"
    with Bar(total=total_runs(rungs), description=description, unit="runs", console=console) as bar:

        def on_run(name: str) -> None:
            bar.note(name)
            bar.advance()

        run_dir, result = cli.run_ladder(
            rungs,
            app=APP,
            data={
                "name": data.name,
                "demo": is_demo,
                "users": data.num_users,
                "warm items": data.num_warm,
                "cold items": data.num_items - data.num_warm,
                "pairs": data.num_pairs,
                "batch_size": config.training.batch_size,
                "num_negatives": config.training.num_negatives,
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
    from apps.clcrec.diagnose import subject
    from shared.diagnosis import diagnose as examine
    from shared.diagnosis import run_lines

    if log is not None:
        for line in run_lines(log):
            typer.echo(line)
        return
    cli.refuse_torchrun(PROG)
    if trace is not None:
        cli.output_file(trace, suffix=".json")
    data, is_demo = load_data(resolved.config, runs_dir)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    examine(subject(data), resolved, say=typer.echo, budget_s=budget, trace=trace)


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
    from apps.clcrec.diagnose import subject
    from shared.tuning import tune

    cli.refuse_torchrun(PROG)
    data, is_demo = load_data(resolved.config, runs_dir)
    if is_demo:
        typer.echo(f"This is {DEMO_NOTE}; use --data-path for your own.")
    tune(
        subject(data),
        resolved,
        folder=runs_dir / APP,
        say=typer.echo,
        limit_mib=limit_mib,
        budget_s=budget,
        again=again,
    )


def load_model(
    resolved: Resolved[Config], run: Path | None, weights: Path | None, runs_dir: Path
) -> tuple[Config, "ColdStart", "CLCRec", Path, bool]:
    """Configuration, data, model with weights, where they came from, and whether the data is the demo's."""
    from apps.clcrec.train import make_model
    from shared.checkpoint import load_weights
    from shared.device import pick_device

    if run is not None:
        resolved = cli.configuration_of(run, resolved, aliases=ALIASES)
    if run is None and weights is None:
        raise ConfigError("which model? give a run folder, or --weights FILE with the flags it was trained with")
    path = weights or cli.checkpoint_of(run or Path(), prog=PROG)
    config = resolved.config
    state, meta = load_weights(path)
    data, is_demo = load_data(config, runs_dir)
    check_origin(meta, config, data, path)
    config = as_trained(meta, resolved)
    model = make_model(config, data)
    if "num_warm" in meta and "item" in state:  # an export, whose item matrix ends with the vectors of the cold ones
        state["item"] = state["item"][: data.num_warm]
    cli.check_shapes(model.state_dict(), state, path)
    model.load_state_dict(state)
    return config, data, model.to(pick_device(config.training.device)).eval(), path, is_demo


def as_trained(meta: Mapping[str, Any], resolved: Resolved[Config]) -> Config:
    """The configuration with what belongs to the weights' numbers from their file, unless flags say otherwise."""
    stored = meta.get("identity", meta).get("config", {}).get("training", {})
    kept = {
        name: stored[name]
        for name in ("neg_exclude", "cold_scale")
        if name in stored and resolved.sources[f"training.{name}"] == "default"
    }
    return replace(resolved.config, training=replace(resolved.config.training, **kept))


def check_origin(meta: Mapping[str, Any], config: Config, data: "ColdStart", path: Path) -> None:
    """Refuse weights of another model or of other items; a foreign file does not say, its shapes are all there is."""
    from apps.clcrec.dataset import MODALITIES
    from shared.checkpoint import check_identity
    from shared.config import as_dict

    origin = meta.get("identity", meta)
    if not isinstance(origin.get("config"), Mapping) or "items" not in meta:
        return

    def part(app: str, settings: Mapping[str, Any], items: str) -> dict[str, Any]:
        asked = [m for m in MODALITIES if settings["data"][f"has_{m}"]]
        return {"app": app, "model": settings["model"], "content": asked or list(data.modalities), "items": items}

    check_identity(
        part(origin["app"], origin["config"], meta["items"]), part(APP, as_dict(config), data.item_digest), path=path
    )


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The metrics with their protocol, the model beside the baselines; the best of each column in bold."""
    from apps.clcrec.evaluate import best_names

    for note in result["notes"]:
        console.print(note, markup=False)
    console.print(result["protocol"], markup=False)
    columns = best_names(result["table_columns"][1:])  # what fits a terminal
    table = Table()
    table.add_column("model")
    for column in columns:
        table.add_column(column.replace("/", "\n").replace("@", "\n@"), justify="right")  # three short lines
    for row in result["table"]:
        cells = []
        for column in columns:
            best = max(other[column] for other in result["table"]) == row[column] > 0
            cells.append(f"[bold]{row[column]:.4f}[/bold]" if best else f"{row[column]:.4f}")
        table.add_row(row["model"], *cells)
    console.print(table)


def shown_command() -> str:
    """The command line of this process, as it would be typed."""
    return shlex.join([*PROG.split(), *sys.argv[1:]])
