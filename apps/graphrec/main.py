"""The verbs of graphrec, and the only file that knows about flags: builds, then calls.

torch is imported inside the verbs, so that `--help` answers at once.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from apps.graphrec.config import ALIASES, Config
from shared import cli
from shared.config import BOOL_WORDS, ConfigError, Resolved, dump_yaml

if TYPE_CHECKING:
    import torch
    from torch import nn

    from apps.graphrec.dataset import Interactions
    from apps.graphrec.model import GraphFilter, GraphRec
    from apps.graphrec.train import Components, Start
    from shared.distributed import Group
    from shared.log import RunLog

APP = "graphrec"
PROG = f"python -m apps.{APP}"
PRESETS = Path(__file__).parent / "configs"
VERBS = ("train", "evaluate", "predict", "prepare", "check", "export", "bench", "diagnose", "tune-speed")
# flags of the verbs, beside those of the configuration, that the original scripts spelled differently
VERB_ALIASES = {"model-name": "name", "dataset": "data-path"}
# switches of the original scripts that choose a value here: what they mean when they are on, and when they are off
SWITCHES = {
    "--amp": ("--precision=auto", "--precision=fp32"),
    "--cuda": ("--device=auto", "--device=cpu"),
    "--enable-user-cooccurrence": ("--graph-view=full", "--graph-view=fast"),
}
ORIGINAL_ROOT = Path("Data")  # where the original scripts look for what --data_path names
MOST_WORKERS = 8
DEMO_NOTE = "demo data: generated users and items on a hidden map, not a real data set"
DEMO_MARK = " (demo data)"
LEAK_NOTE = "--neg-exclude all: held-out pairs were never drawn as negatives, so training knew something of them"
# what belongs to the numbers of weights, and is taken from their file where no flag says otherwise
KEPT = {"data": ("valid_share", "split", "min_rating"), "training": ("seed", "neg_exclude")}
# settings of the model that its finished weights no longer depend on
SPENT = ("init", "init_scale", "noise_eps", "contrast_layer", "bf16_rows", "rank_by")

typer_app = cli.make_app(
    APP, "Train, evaluate and use graph recommenders: the LightGCN family, CLCRec with a graph term, GF-CF and BSPM."
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
        without_brackets(switches_as_choices(cli.without_local_rank(sys.argv[1:] if argv is None else argv))),
        prog_name=PROG,
        flags_bool=cli.bool_flags(Config),
        aliases={**ALIASES, **VERB_ALIASES},
        default_verb="train",
        verbs=VERBS,
    )


def switches_as_choices(argv: Sequence[str]) -> list[str]:
    """The words, with each `--SWITCH [True|False]` and `--no-SWITCH` of SWITCHES turned into what it means here."""
    words, result = list(argv), list[str]()
    while words:
        word = words.pop(0)
        name, _, value = word.replace("_", "-").partition("=")
        positive = name.replace("--no-", "--", 1)
        if positive not in SWITCHES:
            result.append(word)
            continue
        if not value and words and words[0].lower() in BOOL_WORDS:
            value = words.pop(0)
        if (value.lower() or "true") not in BOOL_WORDS:
            result.append(word)  # left for the parser to refuse
            continue
        is_on = (name == positive) == BOOL_WORDS[value.lower() or "true"]
        result.append(SWITCHES[positive][0 if is_on else 1])
    return result


def without_brackets(argv: Sequence[str]) -> list[str]:
    """The words, with lists of numbers as Python writes them (LightGCN-PyTorch's `--topks="[20]"`) as we do."""
    return [re.sub(r"(^|=)\[([0-9, ]+)\]$", r"\1\2", word) for word in argv]


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

    from apps.graphrec import train as training
    from apps.graphrec.evaluate import DeadModelError
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
        data, is_demo = load_data(resolved.config, runs_dir)
    # before there is a folder: what cannot be built leaves none
    c = training.build(resolved.config, data, group=group)
    run_dir = resume
    if run_dir is None:
        new = (
            cli.new_run_dir(runs_dir, APP, ("demo-" if is_demo else "") + name, now=datetime.now()) if rank == 0 else ""
        )
        run_dir = Path(distributed.text_of_first(group, str(new)))
    start = None if resume is None else newest_start(c, run_dir, say=say)
    resume_step = None if resume is None else start.state.step if start is not None else 0
    if not distributed.same_everywhere(group, f"{resolved.config} {data.fingerprint} {resume_step}"):
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
        log.info(describe_graph(c))
        log.info(describe_cores())
        say_what_has_no_effect(c, log)
        if resume is not None and start is None:
            log.warn(f"{run_dir} holds no checkpoint yet: starting from step 0")
        total = c.steps_per_epoch and (settings.max_steps or settings.epochs * c.steps_per_epoch)
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

            def on_users(done: int) -> None:
                bar.note(f"ranking: {done:,} users")
                bar.advance(0)

            try:
                outcome = training.fit(c, run_dir, log=log, stop=stop, start=start, on_step=on_step, on_users=on_users)
            except (NonFiniteError, DeadModelError) as error:  # in all processes alike
                log.warn(str(error))
                distributed.leave(group)
                raise typer.Exit(1) from None
            except torch.OutOfMemoryError as error:
                complain(
                    f"{error}\n{memory_line(c.device)}out of memory: go back to --batch-size 256, lower "
                    "--num-negatives or --embed-dim, or use --accumulate 2"
                )
                raise typer.Exit(1) from None
            except distributed.LostPeerError as error:
                complain(f"{error}; go on from the last checkpoint with: {again}")
                raise typer.Exit(1) from None
        distributed.leave(group)
        if c.device.type == "cuda":
            log.info(memory_line(c.device).strip())
        if outcome.metrics is None:
            log.info(f"stopped at step {outcome.state.step}; resume with: {again}")
            raise typer.Exit(stop.exit_code)
        if rank > 0:
            return
        log.info("measuring the baselines")
        result = training.write_result(
            c,
            run_dir,
            outcome,
            notes=notes_on(resolved.config, is_demo=is_demo, processes=world),
            command=shown_command(world),
            git=cli.git_revision(),
        )
        build_report(run_dir)
        log.info(f"run folder: {run_dir}; look at it: open {run_dir / 'report.html'} in a browser")
    print_table(console, result)


def newest_start(c: "Components", run_dir: Path, *, say: Callable[[str], None]) -> "Start | None":
    """Where a stopped run goes on, in all processes alike; None where it has saved nothing yet."""
    from apps.graphrec.train import restore
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
    name = c.config.model.model
    processes = "" if c.group is None else f" in {c.group.world} processes"
    weights = sum(p.numel() for p in c.state.model.parameters())
    model = f"{name} with {weights:,} weights, {c.steps_per_epoch} steps per epoch"
    if not c.steps_per_epoch:
        model = f"{name}, a filter of rank {rank_of(c.state.model)} that needs no training,"
    return (
        f"{c.data.name}: {describe_data(c.data)}; {model} on {c.device}{processes}, "
        f"{c.amp.precision} ({c.precision_reason}); run folder {run_dir}"
    )


def rank_of(model: "nn.Module") -> int:
    """The number of singular vectors of a filter."""
    return model.state_dict()["left"].shape[1]


def describe_data(data: "Interactions") -> str:
    """How much there is."""
    items = f"{data.num_items:,} items"
    if data.is_cold is not None:
        cold = int(data.is_cold.sum())
        items = f"{data.num_items - cold:,} warm and {cold:,} cold items"
    return f"{data.num_users:,} users, {items}, {data.num_pairs:,} training pairs"


def describe_graph(c: "Components") -> str:
    """The size of the graph, what the run takes by formula, and how the graph is multiplied."""
    from apps.graphrec.advice import memory_text
    from apps.graphrec.graph import graph_bytes

    data = c.data
    sizes = {"num_users": data.num_users, "num_items": data.num_items, "num_pairs": data.num_pairs}
    if c.steps_per_epoch:
        memory = memory_text(c.config, **sizes, weights=sum(p.numel() for p in c.state.model.parameters()))
    else:
        rank = rank_of(c.state.model)
        memory = (
            f"memory: 2 factors of {data.num_items:,} x {rank} x 4 bytes = {8 * data.num_items * rank / 1e6:,.0f} MB, "
            f"graph {graph_bytes(**sizes) / 1e6:,.0f} MB"
        )
    nodes = data.num_users + data.num_items
    return f"graph: {nodes:,} nodes, {2 * data.num_pairs:,} entries; {memory}; {c.kernel_reason}"


def describe_cores() -> str:
    """The CPU cores of this machine, and why none of them loads batches."""
    from shared.device import describe_machine

    machine = describe_machine()
    return (
        f"{machine['cores']} CPU cores, of which torch uses {machine['threads']}; no loader workers are needed: "
        f"batches are index arithmetic in this process (a loader would get min(cores, {MOST_WORKERS}) = "
        f"{loader_workers(int(machine['cores']))})"
    )


def loader_workers(cores: int) -> int:
    """The number of worker processes that a loader should get on a machine with so many cores."""
    return min(cores, MOST_WORKERS)


def memory_line(device: "torch.device") -> str:
    """A line on the GPU's memory, used now and at most; empty on a CPU. Asks nothing of the device."""
    import torch

    if device.type != "cuda":
        return ""
    used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return f"GPU memory: {used / 1e9:.2f} GB used, {peak / 1e9:.2f} GB at the peak\n"


def say_what_has_no_effect(c: "Components", log: "RunLog") -> None:
    """One line for each setting that was asked for and does nothing, or less than one may think."""
    from apps.graphrec.advice import warnings, without_effect
    from apps.graphrec.model import ENCODED

    config = c.config
    for line in without_effect(config, loss=c.plan.loss, precision=c.amp.precision):
        log.info(line)
    if config.training.parallel == "dims" and c.group is None:
        log.info("--parallel dims is about several processes (torchrun), and changes nothing in one")
    if config.model.model not in ENCODED:
        if config.data.has_v or config.data.has_a or config.data.has_t:
            log.info(
                f"--has-v, --has-a and --has-t choose content for {', '.join(ENCODED)}, and change nothing in "
                f"{config.model.model}"
            )
        if c.data.is_cold is not None and c.data.content:
            log.warn(
                f"{config.model.model} knows nothing of cold items and ranks them by chance; --model clcrec-graph "
                "encodes their content"
            )
    for line in warnings(config):
        log.warn(line)


def notes_on(config: Config, *, is_demo: bool, processes: int = 1) -> list[str]:
    """What has to stand beside every number of a model trained like this."""
    notes = [DEMO_NOTE] * is_demo + [LEAK_NOTE] * (config.training.neg_exclude == "all")
    return notes + [f"trained by {processes} processes"] * (processes > 1)


def load_data(config: Config, runs_dir: Path) -> tuple["Interactions", bool]:
    """The data of --data-path, or the demo data; and whether they are demo data."""
    from apps.graphrec.demo import write_demo
    from apps.graphrec.formats import read_data

    settings = config.data
    if settings.data_path is None:
        return read_data(write_demo(runs_dir / APP / "demo-data")), True
    data = read_data(
        data_folder(settings.data_path),
        format=settings.format,
        valid_share=settings.valid_share,
        seed=config.training.seed,
        min_rating=settings.min_rating,
        split=settings.split,
    )
    return data, False


def data_folder(name: str) -> Path:
    """The path as given, or the folder of that name where the original scripts look, if only that is there."""
    path, original = Path(name), ORIGINAL_ROOT / name
    return original if original.exists() and not path.exists() else path


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
    """Measure a model on validation and test data, beside the baselines; with cold items all, warm and cold ones."""
    from apps.graphrec.advice import behind_filter
    from apps.graphrec.dataset import STAGES, Stage
    from apps.graphrec.evaluate import baselines, evaluation_sums, finished, protocol_text, scorer_of
    from apps.graphrec.train import result_table
    from shared.device import pick_device
    from shared.files import atomic_write_text
    from shared.progress import Bar

    console = Console(highlight=False, soft_wrap=True)
    if output is not None:
        cli.output_file(output)
    config, data, model, path, notes = load_model(resolved, run, weights, runs_dir)
    device = pick_device(config.training.device)
    stages: tuple[Stage, ...] = STAGES if data.valid.item.numel() else ("test",)
    result: dict[str, Any] = {"app": APP, "weights": str(path), "data": data.name, "stages": {}}
    with Bar(total=data.num_users, description="evaluate", unit="users") as bar:
        sums = evaluation_sums(scorer_of(model), data, stages, config=config, device=device, on_users=bar.reach)
        metrics = finished(sums, data)
        bar.reach(data.num_users)  # those without held-out items were not measured
    with Bar(total=data.num_users, description="baselines", unit="users") as bar:
        others = baselines(data, stages, config=config, device=device, on_users=bar.reach)
        bar.reach(data.num_users)
    if "valid" in stages:
        notes += behind_filter(config, metrics["valid"], {label: row["valid"] for label, row in others.items()})
    for stage in stages:
        by_stage = {label: row[stage] for label, row in others.items()}
        columns, rows = result_table(config.model.model, metrics[stage], by_stage)
        part = {
            "title": f"{stage}, {path}",
            "protocol": protocol_text(data, stage),
            "table_columns": columns,
            "table": rows,
            "notes": notes,
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
    group: Annotated[
        str,
        typer.Option(
            "--group", help="Items to choose from: all, or where some are cold warm or cold.", rich_help_panel="Run"
        ),
    ] = "all",
    keep_seen: Annotated[
        bool,
        typer.Option("--keep-seen/--drop-seen", help="Also recommend what is known already.", rich_help_panel="Run"),
    ] = False,
) -> None:
    """Write the k best items of every user, exactly ranked."""
    from apps.graphrec.evaluate import GROUPS
    from apps.graphrec.evaluate import predict as ranked
    from shared.files import atomic_writer
    from shared.progress import Bar

    wanted = next((known for known in GROUPS if known == group), None)
    if wanted is None:
        raise ConfigError(f"--group is {group}; expected one of {', '.join(GROUPS)}")
    cli.output_file(output)
    config, data, model, path, _ = load_model(resolved, run, weights, runs_dir)
    lines = 0
    with atomic_writer(output) as file, Bar(total=data.num_users, description="predict", unit="users") as bar:
        for users, items, scores in ranked(
            model, data, k=k, config=config, group=wanted, keep_seen=keep_seen, on_users=bar.reach
        ):
            for user, places, values in zip(users.tolist(), items.tolist(), scores.tolist(), strict=True):
                kept = [
                    (data.item_ids[place], value) for place, value in zip(places, values, strict=True) if place >= 0
                ]
                record = {
                    "user": data.user_ids[user],
                    "items": [item for item, _ in kept],
                    "scores": [round(value, 6) for _, value in kept],
                }
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                lines += 1
    kind = "" if wanted == "all" else f"{wanted} "
    typer.echo(f"{output}: the best {k} or fewer {kind}items for {lines:,} users, exact, from {path}{mark_on(config)}")


@typer_app.command()
def prepare(
    source: Annotated[Path, typer.Argument(help="Folder or file with interactions.")],
    output: Annotated[Path, typer.Argument(help="Pack to write, a .safetensors file.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="auto, lightgcn, clcrec, inter or text.", rich_help_panel="Data")
    ] = "auto",
    valid_share: Annotated[
        float,
        typer.Option(help="Share of each user's training items held out for validation.", rich_help_panel="Data"),
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is held out.", rich_help_panel="Data")] = 42,
    min_rating: Annotated[
        float | None,
        typer.Option(help="Ratings below it are left out.", show_default="none", rich_help_panel="Data"),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="How events are divided: random, or time (the latest are held out).", rich_help_panel="Data"),
    ] = "random",
) -> None:
    """Convert a source once into a pack that every later run maps into memory; events are split here."""
    from apps.graphrec.formats import prepare_source

    data = prepare_source(
        data_folder(str(source)),
        output,
        format=format,
        valid_share=valid_share,
        seed=seed,
        min_rating=min_rating,
        split=split,
        say=typer.echo,
    )
    typer.echo(
        f"{output}: {describe_data(data)}; train on it with: {PROG} train --data-path {shlex.quote(str(output))}"
    )


@typer_app.command()
def check(
    source: Annotated[Path, typer.Argument(help="Folder, file or pack to check.")],
    format: Annotated[  # noqa: A002
        str, typer.Option(help="auto, lightgcn, clcrec, inter, text or pack.", rich_help_panel="Data")
    ] = "auto",
    limit: Annotated[int, typer.Option(min=1, help="Most faults to print.", rich_help_panel="Data")] = 20,
) -> None:
    """Look for every fault a source can have: file, line, field, expected, found, repair; exit code 2 on any error."""
    from apps.graphrec.formats import check_source

    faults = check_source(data_folder(str(source)), format=format, limit=limit)
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
    """Write the final vectors of all users and items (of a filter its factors) with configuration and ids."""
    from apps.graphrec.evaluate import matrices
    from apps.graphrec.model import GraphFilter
    from shared.checkpoint import save_weights
    from shared.config import as_dict

    cli.output_file(output, suffix=".safetensors")
    config, data, model, path, _ = load_model(resolved, run, weights, runs_dir)
    meta = {
        "app": APP,
        "config": as_dict(config),
        "data": {"fingerprint": data.fingerprint},
        "items": data.item_digest,
        "user_ids": list(data.user_ids),
        "item_ids": list(data.item_ids),
        "from": str(path),
    }
    state = model.state_dict()
    if isinstance(model, GraphFilter):
        what = f"factors of rank {rank_of(model)}, to be used with the graph,"
    else:
        user_UD, item_ID = matrices(model)
        state |= {"user": user_UD, "item": item_ID}
        what = f"vectors of {user_UD.shape[1]} dimensions, with the weights they are made of,"
    save_weights(output, state, meta)
    typer.echo(
        f"{output}: {what} for {data.num_users:,} users and {data.num_items:,} items, from {path}{mark_on(config)}"
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
    from apps.graphrec.bench import ladder, left_out, notes_config, notes_data
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
        notes = [f"{data.name}: pairs without a pattern, random content"]
    else:
        data, is_demo = load_data(config, runs_dir)
        notes = [DEMO_NOTE] * is_demo
    rungs = chosen(ladder(config, data, quick=quick, only=only or ()), only or ())
    training = notes_config(config, data, quick=quick).training
    notes += left_out(config, data, quick=quick)
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
                "items": data.num_items,
                "pairs": data.num_pairs,
                "batch_size": training.batch_size,
                "num_negatives": training.num_negatives,
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
    from apps.graphrec.diagnose import subject
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
    """Find the fastest batch size and batches per propagation here by trials; printed and remembered, never applied."""
    from apps.graphrec.diagnose import subject
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
) -> tuple[Config, "Interactions", "GraphRec | GraphFilter", Path, list[str]]:
    """Configuration, data, model with weights, where they came from, and what stands beside their numbers."""
    from apps.graphrec.train import make_model
    from shared.checkpoint import load_weights
    from shared.device import pick_device

    if run is not None:
        resolved = cli.configuration_of(run, resolved, aliases=ALIASES)
    if run is None and weights is None:
        raise ConfigError("which model? give a run folder, or --weights FILE with the flags it was trained with")
    path = weights or cli.checkpoint_of(run or Path(), prog=PROG)
    cli.refuse_torchrun(PROG)
    state, meta = load_weights(path)
    config = as_trained(meta, resolved)
    data, is_demo = load_data(config, runs_dir)
    check_origin(meta, config, data, path)
    model, _ = make_model(config, data, pick_device(config.training.device))
    if "user_ids" in meta:  # an export, which also holds what follows from the weights
        state = {name: value for name, value in state.items() if name not in ("user", "item")}
    cli.check_shapes(model.state_dict(), state, path)
    model.load_state_dict(state)
    notes = notes_on(config, is_demo=is_demo) + notes_on_origin(meta, data)
    return config, data, model.eval(), path, notes


def as_trained(meta: Mapping[str, Any], resolved: Resolved[Config]) -> Config:
    """The configuration with what belongs to the weights' numbers from their file, unless flags say otherwise."""
    stored = meta.get("identity", meta).get("config", {})
    config = resolved.config
    for section, names in KEPT.items():
        part = stored.get(section, {})
        kept = {
            name: part[name] for name in names if resolved.sources[f"{section}.{name}"] == "default" and name in part
        }
        config = replace(config, **{section: replace(getattr(config, section), **kept)})
    return config


def check_origin(meta: Mapping[str, Any], config: Config, data: "Interactions", path: Path) -> None:
    """Refuse weights of another model or of other items; a foreign file does not say, its shapes are all there is."""
    from apps.graphrec.dataset import MODALITIES
    from apps.graphrec.model import ENCODED
    from shared.checkpoint import check_identity
    from shared.config import as_dict

    origin = meta.get("identity", meta)
    if not isinstance(origin.get("config"), Mapping) or "items" not in meta:
        return

    def part(app: str, settings: Mapping[str, Any], items: str) -> dict[str, Any]:
        content: list[str] = []
        if app == APP and settings["model"]["model"] in ENCODED:
            content = [m for m in MODALITIES if settings["data"][f"has_{m}"]] or list(data.content)
        return {"app": app, "model": settings["model"], "content": content, "items": items}

    check_identity(
        part(origin["app"], origin["config"], meta["items"]),
        part(APP, as_dict(config), data.item_digest),
        path=path,
        ignore={f"model.{name}" for name in SPENT},
    )


def notes_on_origin(meta: Mapping[str, Any], data: "Interactions") -> list[str]:
    """What has to stand beside the numbers where the weights were trained on other pairs of the same items."""
    trained_on = meta.get("identity", meta).get("data", {}).get("fingerprint", data.fingerprint)
    if trained_on == data.fingerprint:
        return []
    return [
        f"the weights were trained on another state or another split of {data.name}: what is held out here, they may "
        "have seen"
    ]


def mark_on(config: Config) -> str:
    """What the last line of a verb ends with."""
    return DEMO_MARK if config.data.data_path is None else ""


def print_table(console: Console, result: Mapping[str, Any]) -> None:
    """The metrics with their protocol, the model beside the baselines; the best of each column in bold."""
    from apps.graphrec.evaluate import best_names

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


def shown_command(world: int) -> str:
    """The command line of this run, as it would be typed."""
    return shlex.join([*launcher(world).split(), *cli.without_local_rank(sys.argv[1:])])
