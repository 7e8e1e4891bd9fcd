"""The command line as a user meets it: what it writes, what it says, and how it ends."""

import contextlib
import html
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

import apps.clcrec.demo
from apps.graphrec import demo, main
from apps.graphrec import evaluate as evaluation
from apps.graphrec.config import ALIASES, Config
from apps.graphrec.dataset import Interactions
from apps.graphrec.demo import demo_data, write_demo
from apps.graphrec.formats import read_data
from apps.graphrec.train import peak_lr
from shared import cli, progress
from shared.checkpoint import load_checkpoint, load_weights
from shared.config import Resolved, knobs, resolve
from shared.log import read_metrics
from shared.ranking import Lists

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_ITEMS = 60, 60
NUM_WARM, NUM_COLD = 30, 10
SIZES = ("--embed-dim", "8", "--layers", "2", "--hidden-dim", "8", "--filter-rank", "8")
SMALL = (*SIZES, "--batch-size", "128", "--num-negatives", "8")
TRAIN = ("train", "--data-path", "shop", *SMALL, "--epochs", "2", "--log-every", "2", "--lr", "0.05")
MODELS = {  # name -> (its data, flags)
    "lightgcn": ("shop", ()),
    "xsimgcl": ("shop", ("--model", "xsimgcl", "--loss", "bpr")),
    "clcrec-graph": ("cold", ("--model", "clcrec-graph")),
    "bspm": ("shop", ("--model", "bspm")),
}
ENTRY = "--data_path movielens --num_workers 8 --batch_size 512 --l_r 0.0014 --num_neg 512"  # of the notes
LIGHTGCN = '--decay=1e-4 --lr=0.001 --layer=3 --seed=2020 --dataset="shop" --topks="[20]" --recdim=64'  # of its README


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def invoke(folder: Path, *words: str, **environment: str) -> Ended:
    """Run the command line in this process, in `folder`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {"COLUMNS": "250", **environment}),
        mock.patch.object(sys, "argv", ["apps/graphrec/__main__.py", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main.app()
    texts = []
    for stream in (out, err):
        stream.seek(0)
        texts.append(stream.read())
    assert isinstance(end.value.code, int)
    return Ended(end.value.code, *texts)


def succeed(folder: Path, *words: str) -> str:
    """Run a command that has to end well; what it said."""
    ended = invoke(folder, *words)
    assert ended.code == 0, ended
    assert ended.err == ""
    return ended.out


def write_shop(folder: Path, *, seed: int = 7, num_users: int = NUM_USERS) -> None:
    """A small folder in LightGCN's form: what the demo's generator makes, under a name of its own."""
    made = demo_data(num_users=num_users, num_items=NUM_ITEMS, seed=seed)
    with mock.patch.object(demo, "demo_data", return_value=made):
        write_demo(folder)


def write_cold(folder: Path) -> None:
    """A small folder in CLCRec's layout, with cold items and content."""
    made = apps.clcrec.demo.demo_data(num_users=40, num_warm=NUM_WARM, num_cold=NUM_COLD)
    with mock.patch.object(apps.clcrec.demo, "demo_data", return_value=made):
        apps.clcrec.demo.write_demo(folder)


def train_words(name: str) -> tuple[str, ...]:
    """The command that trains a model of MODELS."""
    data, flags = MODELS[name]
    return ("train", "--data-path", data, *TRAIN[3:], *flags)


def run_folder(folder: Path) -> Path:
    """The only run folder below `folder`, as a path to be used there."""
    (config,) = folder.glob("runs/graphrec/*/config.yaml")
    return config.parent.relative_to(folder)


def strict_json(path: Path) -> Any:
    """The content of a JSON file that holds no NaN or Infinity."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def configuration(run_dir: Path) -> Config:
    """The configuration that a run folder says it was started with."""
    found: Resolved[Config] = resolve(Config, yaml_path=run_dir / "config.yaml")
    return found.config


def preset(name: str) -> Config:
    found: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / f"{name}.yaml", aliases=ALIASES)
    return found.config


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Trained(NamedTuple):
    """A folder with data and one finished run."""

    folder: Path
    run: Path  # relative to the folder
    out: str
    model: str

    @property
    def result(self) -> Any:
        return strict_json(self.folder / self.run / "result.json")

    @property
    def source(self) -> str:
        return MODELS[self.model][0]

    @property
    def data(self) -> Interactions:
        return read_data(self.folder / self.source)

    @property
    def weights(self) -> Path:
        """Those that the result was measured with."""
        name = "step-00000000" if self.model == "bspm" else "best"
        return self.run / "checkpoints" / f"{name}.safetensors"


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """A finished run of every model, which nobody may change."""
    runs = {}
    for name, (data, _) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        (write_shop if data == "shop" else write_cold)(folder / data)
        out = succeed(folder, *train_words(name), "--name", "first")
        runs[name] = Trained(folder, run_folder(folder), out, name)
    return runs


@pytest.fixture
def finished(finished_runs: dict[str, Trained]) -> Trained:
    return finished_runs["lightgcn"]


def copied(run: Trained, folder: Path) -> Trained:
    shutil.copytree(run.folder, folder)
    return run._replace(folder=folder)


@pytest.fixture
def trained(finished: Trained, tmp_path: Path) -> Trained:
    """A copy of the finished run of lightgcn, for tests that change it."""
    return copied(finished, tmp_path / "copy")


@pytest.fixture(params=MODELS)
def each_trained(request: pytest.FixtureRequest, finished_runs: dict[str, Trained], tmp_path: Path) -> Trained:
    """A copy of the finished run of every model in turn."""
    return copied(finished_runs[request.param], tmp_path / "copy")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with data and nothing else."""
    write_shop(tmp_path / "shop")
    return tmp_path


def process_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def steps_per_epoch(data: Interactions, batch_size: int = 128) -> int:
    return -(-data.num_pairs // batch_size)


# Help and presets


def test_help_loads_neither_torch_nor_anything_that_does(tmp_path):
    code = """
import sys
from apps.graphrec import main
try:
    main.app(["train", "--help"])
except SystemExit as end:
    print("code", end.code)
print("loaded", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "safetensors"}))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=process_environment(PYTHONIOENCODING="utf-8"),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert "--batch-size" in found.stdout
    assert found.stdout.splitlines()[-2:] == ["code 0", "loaded"]


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "export"])
def test_help_shows_every_knob_with_its_default_in_the_panel_of_its_section(verb, tmp_path):
    panels: dict[str, list[str]] = {}
    for line in succeed(tmp_path, verb, "--help").splitlines():
        if line.startswith("\u256d\u2500"):  # the upper left corner of a panel
            panel = line.strip("\u256d\u2500\u256e ")
            panels[panel] = []
        elif panels:
            panels[panel].append(line)
    assert {"Run", "Data", "Model", "Training"} <= set(panels)
    for knob in knobs(Config).values():
        lines = panels[knob.section.capitalize()]
        (line,) = [text for text in lines if text.lstrip("\u2502 ").startswith(f"{knob.flag} ")]
        default = knob.default
        if isinstance(default, bool):
            shown = knob.flag.removeprefix("--") if default else f"no-{knob.flag.removeprefix('--')}"
        elif isinstance(default, tuple):
            shown = ",".join(map(str, default))
        else:
            shown = "(none)" if default in (None, "none") else str(default)
        assert f"[default: {shown}]" in line


def test_the_default_preset_holds_the_built_in_defaults():
    assert preset("default") == Config()


@pytest.mark.parametrize(
    ("name", "batch_size", "num_negatives", "lr"),
    [("balanced", 512, 512, 1.4142e-3), ("turbo", 1024, 256, 2e-3), ("quality", 256, 512, 1e-3)],
)
def test_the_presets_of_the_notes_have_their_sizes_and_scaled_rates(name, batch_size, num_negatives, lr):
    config = preset(name)
    training = config.training
    assert (training.batch_size, training.num_negatives, training.num_workers) == (batch_size, num_negatives, 8)
    assert config.model.model == "clcrec-graph"
    assert peak_lr(training) == pytest.approx(lr, rel=1e-4)


def test_the_filter_preset_has_the_published_values_and_the_whole_graph():
    config = preset("gowalla-filter")
    model = config.model
    assert (model.model, model.filter_rank, model.filter_beta, model.filter_step) == ("bspm", 448, 0.2, 2.5)
    assert config.data.valid_share == 0


# What training leaves behind


def test_a_run_folder_holds_what_was_promised(finished):
    names = {
        str(path.relative_to(finished.folder / finished.run)) for path in (finished.folder / finished.run).rglob("*")
    }
    epoch = steps_per_epoch(finished.data)
    steps = {f"checkpoints/step-{step:08d}.safetensors" for step in (epoch, 2 * epoch)}
    assert names == steps | {
        "checkpoints",
        "checkpoints/best.safetensors",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "result.json",
        "train.log",
    }
    assert finished.run.name.endswith("-first")


def test_the_configuration_says_where_each_value_came_from(finished):
    text = (finished.folder / finished.run / "config.yaml").read_text(encoding="utf-8")
    for line in (
        "embed_dim: 8  # flag --embed-dim",
        'data_path: "shop"  # flag --data-path',
        f"temperature: {Config().training.temperature}  # default",
    ):
        assert f"  {line}\n" in text
    config = configuration(finished.folder / finished.run)
    assert (config.model.embed_dim, config.training.num_negatives, config.training.epochs) == (8, 8, 2)


def test_a_preset_is_named_as_the_source_and_overridden_by_flags(shop):
    words = ("--data-path", "shop", "--max-steps", "1", "--batch-size", "64", "--num-negatives", "8")
    succeed(shop, "train", "--config", "gowalla", *words, *SIZES)
    text = (shop / run_folder(shop) / "config.yaml").read_text(encoding="utf-8")
    assert "  batch_size: 64  # flag --batch-size\n" in text
    assert f"  lr: {preset('gowalla').training.lr}  # preset gowalla.yaml\n" in text


def test_the_log_and_the_metrics_tell_the_run(finished):
    log = (finished.folder / finished.run / "train.log").read_text(encoding="utf-8")
    data = finished.data
    for words in (
        f"shop: 60 users, {data.num_items} items, {data.num_pairs} training pairs; lightgcn with ",
        "epoch 1: validation Recall@20 ",
        "epoch 2:",
        str(finished.run),
    ):
        assert words in log
        assert words in finished.out
    epoch = steps_per_epoch(data)
    expected = [("train", step, 0) for step in range(2, epoch, 2)]
    expected += [("train", epoch, 0), ("valid", epoch, 0)]
    expected += [("train", step, 1) for step in range(epoch + 1, 2 * epoch) if step % 2 == 0]
    expected += [("train", 2 * epoch, 1), ("valid", 2 * epoch, 1)]
    records = read_metrics(finished.folder / finished.run / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["epoch"]) for line in records] == expected


def test_graph_memory_kernel_and_cores_are_told_before_the_first_step(finished):
    before, _, _ = finished.out.partition("epoch 1:")
    data = finished.data
    nodes = data.num_users + data.num_items
    assert f"graph: {nodes} nodes, {2 * data.num_pairs} entries; memory: 4 x {8 * nodes} weights x 4 bytes" in before
    assert "kernel bag: embedding_bag" in before
    assert "CPU cores, of which torch uses 1; no loader workers are needed" in before
    assert "min(cores, 8)" in before


def test_a_filter_tells_its_factors_and_that_it_needs_no_training(finished_runs):
    run = finished_runs["bspm"]
    data = run.data
    assert "bspm, a filter of rank 8 that needs no training, on cpu" in run.out
    assert f"memory: 2 factors of {data.num_items} x 8 x 4 bytes" in run.out
    assert "block iteration 3 of 3" in run.out
    assert run.result["steps"] == 0
    assert [row["model"] for row in run.result["table"]] == ["bspm", "popularity"]


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (4, 4), (8, 8), (16, 8), (64, 8)])
def test_a_loader_would_get_as_many_workers_as_cores_but_at_most_eight(cores, workers):
    assert main.loader_workers(cores) == workers


def test_the_memory_of_a_gpu_is_told_in_gigabytes_with_two_decimals(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1_234_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 20_006_000_000)
    line = main.memory_line(torch.device("cuda", 0))
    assert line == "GPU memory: 1.23 GB used, 20.01 GB at the peak\n"
    assert main.memory_line(torch.device("cpu")) == ""


def test_the_result_holds_every_metric_with_its_protocol_and_where_it_came_from(finished):
    result = finished.result
    for stage in ("valid", "test"):
        metrics = result["metrics"][stage]
        assert metrics["protocol"].startswith(f"{stage} items, full ranking (60 users, ")
        for name in ("Recall@20", "NDCG@20", "Precision@20", "HR@20"):
            assert 0 < metrics[name] <= 1
    assert result["protocol"] == result["metrics"]["test"]["protocol"]
    assert [row["model"] for row in result["table"]] == ["lightgcn", "popularity", "gfcf"]
    for row in result["table"]:
        assert list(row) == result["table_columns"]
    assert result["table"][0]["NDCG@20"] == result["metrics"]["test"]["NDCG@20"]
    assert result["speed"]["pairs/s"] > 0
    expected = finished.data
    assert result["data"]["fingerprint"] == expected.fingerprint
    assert result["data"]["pairs"] == expected.num_pairs
    assert result["git"] is None or isinstance(result["git"], str)
    assert result["command"] == shlex.join(["python", "-m", "apps.graphrec", *TRAIN, "--name", "first"])
    assert result["steps"] == 2 * steps_per_epoch(expected)


def test_the_console_and_the_report_show_the_table_with_its_protocol(finished_runs):
    for run in finished_runs.values():
        report = html.unescape((run.folder / run.run / "report.html").read_text(encoding="utf-8"))
        protocol = run.result["protocol"]
        said, _, table = run.out.rpartition(protocol)
        assert said
        assert protocol in report
        groups = ("all/", "warm/", "cold/") if run.source == "cold" else ("",)
        for name in (f"{group}{metric}@20" for group in groups for metric in ("Recall", "NDCG")):
            assert f"{run.result['metrics']['test'][name]:.4f}" in table
        for row in run.result["table"]:
            assert row["model"] in table
            assert row["model"] in report
        assert f"open {run.run / 'report.html'}" in run.out


def test_a_model_that_loses_to_the_filter_is_reported_as_such(shop):
    out = succeed(shop, *TRAIN[:-2], "--lr", "0")
    run = run_folder(shop)
    (note,) = strict_json(shop / run / "result.json")["notes"]
    assert note.startswith("WARNING: lightgcn reaches validation Recall@20 0.")
    assert "which needs no training" in note
    assert note in out
    assert note in (shop / run / "report.html").read_text(encoding="utf-8")
    assert succeed(shop, "evaluate", str(run), "--output", "found.json").count(note) == 2
    assert [part["notes"] for part in strict_json(shop / "found.json")["stages"].values()] == [[note], [note]]
    without = succeed(shop, "evaluate", str(run), "--baselines", "popularity")
    assert "WARNING" not in without
    assert "gfcf" not in without


def test_without_a_validation_part_the_last_weights_are_measured_on_the_test_alone(shop):
    (shop / "shop" / "valid.txt").unlink()
    out = succeed(shop, *TRAIN, "--valid-share", "0")
    assert "nothing is held out for validation" in out
    run = run_folder(shop)
    assert list(strict_json(shop / run / "result.json")["metrics"]) == ["test"]
    succeed(shop, "evaluate", str(run), "--output", "found.json")
    stages = strict_json(shop / "found.json")["stages"]
    assert list(stages) == ["test"]
    assert stages["test"]["table"] == strict_json(shop / run / "result.json")["table"]


# The original scripts' spellings


@pytest.mark.parametrize("verb", [["train"], []])
@pytest.mark.parametrize("place", ["movielens", "Data/movielens"])
def test_the_command_of_the_notes_runs_unchanged(verb, place, tmp_path):
    made = apps.clcrec.demo.demo_data(num_users=30, num_warm=600, num_cold=20)
    with mock.patch.object(apps.clcrec.demo, "demo_data", return_value=made):
        apps.clcrec.demo.write_demo(tmp_path / place)
    out = succeed(tmp_path, *verb, *ENTRY.split(), "--max-steps", "1", "--baselines", "popularity")
    config = configuration(tmp_path / run_folder(tmp_path))
    training = config.training
    assert (training.num_workers, training.batch_size, training.lr, training.num_negatives) == (8, 512, 0.0014, 512)
    assert "movielens: 30 users, 600 warm and 20 cold items" in out
    assert "--num-workers 8 is not used: a loader would get min(cores, 8)" in out
    assert "warning: lightgcn knows nothing of cold items" in out
    assert "--model clcrec-graph encodes their content" in out
    for words in (("check", "movielens"), ("prepare", "movielens", "pack.safetensors")):
        succeed(tmp_path, *words)


def test_the_command_of_lightgcn_pytorch_runs_unchanged(shop):
    succeed(shop, *shlex.split(LIGHTGCN), "--max-steps", "1", "--num-negatives", "8")
    config = configuration(shop / run_folder(shop))
    training = config.training
    assert (training.reg_weight, training.lr, training.seed, training.ks) == (1e-4, 1e-3, 2020, (20,))
    assert (config.model.layers, config.model.embed_dim, config.data.data_path) == (3, 64, "shop")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--amp --lr 1", "--precision=auto --lr 1"),
        ("--amp=True --lr 1", "--precision=auto --lr 1"),
        ("train --lr 1 --amp", "train --lr 1 --precision=auto"),
        ("--amp False --lr 1", "--precision=fp32 --lr 1"),
        ("--no-amp --lr 1", "--precision=fp32 --lr 1"),
        ("--no_amp=False", "--precision=auto"),
        ("--amp=maybe", "--amp=maybe"),
        ("--amp some_path", "--precision=auto some_path"),
        ("--no-cuda --lr 1", "--device=cpu --lr 1"),
        ("--enable_user_cooccurrence --lr 1", "--graph-view=full --lr 1"),
        ("--enable_user_cooccurrence=True", "--graph-view=full"),
        ("--enable-user-cooccurrence False", "--graph-view=fast"),
        ("--no-enable-user-cooccurrence", "--graph-view=fast"),
        ("evaluate some_path --l_r 1", "evaluate some_path --l_r 1"),
    ],
)
def test_switches_of_the_original_choose_a_value(given, expected):
    assert main.switches_as_choices(given.split()) == expected.split()


def test_switches_reach_the_configuration(shop):
    write_cold(shop / "cold")
    words = ("--enable_user_cooccurrence", "True", "--amp=False", "--max-steps", "1")
    succeed(shop, *train_words("clcrec-graph"), *words)
    config = configuration(shop / run_folder(shop))
    assert (config.training.graph_view, config.training.precision) == ("full", "fp32")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--topks=[20]"], ["--topks=20"]),
        (["--topks", "[10, 20]", "x"], ["--topks", "10, 20", "x"]),
        (["a[1]", "[x]"], ["a[1]", "[x]"]),
    ],
)
def test_lists_may_be_written_as_python_writes_them(given, expected):
    assert main.without_brackets(given) == expected


@pytest.mark.parametrize("flag", ["--PATH_weight_load", "--save_file", "--max_users_per_item"])
def test_flags_of_the_original_that_have_no_meaning_here_are_named(flag, tmp_path):
    ended = invoke(tmp_path, flag, "1")
    assert ended.code == 2
    assert f"No such option: {flag.replace('_', '-')}" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "loss"), [("0", "item-content"), ("1", "user-item")])
def test_a_loss_that_is_multiplied_by_zero_is_warned_of(value, loss, tmp_path):
    write_cold(tmp_path / "cold")
    out = succeed(tmp_path, *train_words("clcrec-graph"), "--max-steps", "1", "--lr_lambda", value)
    (line,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert f"multiplies the {loss} loss by zero" in line
    assert line in (tmp_path / run_folder(tmp_path) / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--graph-temp", "0.5"), "--graph-temp is about clcrec-graph, and changes nothing in lightgcn"),
        (("--gamma", "2"), "--gamma is about the losses directau"),
        (("--parallel", "dims"), "--parallel dims is about several processes (torchrun)"),
        (("--has_a=True",), "--has-v, --has-a and --has-t choose content for content, clcrec-graph"),
    ],
)
def test_settings_without_effect_are_named(words, expected, shop):
    assert expected in succeed(shop, *TRAIN, "--max-steps", "1", *words)


# Weights of every kind


def weights_file(trained: Trained, kind: str) -> str:
    """A file with the weights that the finished run was measured with; its name."""
    if kind == "checkpoint":
        return str(trained.weights)
    if kind == "export":
        out = succeed(trained.folder, "export", "model.safetensors", "--run", str(trained.run))
        assert f"from {trained.weights}" in out
        return "model.safetensors"
    state, _ = load_weights(trained.folder / trained.weights)
    torch.save(state if kind == "pt" else {"epoch": 3, "state_dict": state}, trained.folder / "model.pt")
    return "model.pt"


@pytest.mark.parametrize("kind", ["checkpoint", "export", "nested pt"])
def test_weights_of_every_kind_of_file_are_measured(kind, each_trained):
    name = weights_file(each_trained, kind)
    flags = (*SIZES, *MODELS[each_trained.model][1])
    words = ("evaluate", "--weights", name, "--data_path", each_trained.source, *flags)
    out = succeed(each_trained.folder, *words, "--output", "found.json")
    found = strict_json(each_trained.folder / "found.json")
    assert found["stages"]["test"]["table"] == each_trained.result["table"]
    assert found["stages"]["test"]["protocol"] == each_trained.result["protocol"]
    assert found["weights"] == name
    assert each_trained.result["protocol"] in out


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_weights_bring_the_split_and_the_notes_that_their_numbers_have(kind, shop):
    (shop / "shop" / "valid.txt").unlink()
    succeed(shop, *TRAIN, "--seed", "5", "--valid-share", "0.3", "--neg-exclude", "all")
    run = run_folder(shop)
    weights = str(run / "checkpoints" / "best.safetensors")
    if kind == "export":
        weights = "model.safetensors"
        succeed(shop, "export", weights, "--run", str(run))
    words = ("evaluate", "--weights", weights, "--data-path", "shop", *SMALL, "--output", "found.json")
    out = succeed(shop, *words)
    assert "0.3 of each user's training items cut for validation (seed 5)" in out
    assert main.LEAK_NOTE in out
    assert "another split" not in out
    part = strict_json(shop / "found.json")["stages"]["test"]
    assert part["table"] == strict_json(shop / run / "result.json")["table"]
    out = succeed(shop, *words, "--seed", "6")
    assert "(seed 6)" in out
    assert "the weights were trained on another state or another split of shop" in out


def test_foreign_weights_that_do_not_fit_are_refused_with_the_tensors_names(trained):
    name = weights_file(trained, "pt")
    words = ("evaluate", "--weights", name, "--data-path", "shop")
    ended = invoke(trained.folder, *words, "--embed-dim", "16")
    assert ended.code == 2
    nodes = trained.data.num_users + trained.data.num_items
    assert f"error: {name} does not fit the model: table is [{nodes}, 8], expected [{nodes}, 16]" in ended.err
    state = torch.load(trained.folder / name, weights_only=True)
    state["embedding"] = state.pop("table")
    torch.save(state, trained.folder / name)
    ended = invoke(trained.folder, *words, "--embed-dim", "8")
    assert ended.code == 2
    assert "table is missing; embedding is not part of this model" in ended.err


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_our_own_weights_are_refused_under_another_model_or_other_items(kind, trained):
    name = weights_file(trained, kind)
    words = ("evaluate", "--weights", name, *SIZES)
    ended = invoke(trained.folder, *words, "--data-path", "shop", "--layers", "3")
    assert ended.code == 2
    assert "model.layers: 2 in the checkpoint, 3 now" in ended.err
    ended = invoke(trained.folder, *words, "--data-path", "shop", "--model", "mf")
    assert ended.code == 2
    assert "model.model: 'lightgcn' in the checkpoint, 'mf' now" in ended.err
    write_shop(trained.folder / "other", num_users=NUM_USERS - 1)
    ended = invoke(trained.folder, *words, "--data-path", "other")
    assert ended.code == 2
    assert name in ended.err
    assert "items:" in ended.err


def test_our_own_weights_are_refused_with_other_content(finished_runs, tmp_path):
    run = copied(finished_runs["clcrec-graph"], tmp_path / "copy")
    words = ("evaluate", "--weights", str(run.weights), "--data-path", "cold", *SIZES, "--model", "clcrec-graph")
    ended = invoke(run.folder, *words, "--has-v", "--has-t")
    assert ended.code == 2
    assert "content: ['v', 'a', 't'] in the checkpoint, ['v', 't'] now" in ended.err


def test_weights_are_used_where_only_the_start_of_training_differed(trained):
    words = ("evaluate", "--weights", str(trained.weights), "--data-path", "shop", *SIZES, "--output", "found.json")
    succeed(trained.folder, *words, "--init", "spectral", "--noise-eps", "0.5")
    assert strict_json(trained.folder / "found.json")["stages"]["test"]["table"] == trained.result["table"]


# The other verbs


def test_evaluating_a_run_gives_the_numbers_of_its_result(each_trained):
    run = each_trained
    out = succeed(run.folder, "evaluate", str(run.run), "--output", "new/folder/found.json")
    found = strict_json(run.folder / "new" / "folder" / "found.json")
    assert found["app"] == "graphrec"
    assert found["data"] == run.source
    assert found["weights"] == str(run.weights)
    assert found["stages"]["test"]["table"] == run.result["table"]
    for stage in ("valid", "test"):
        part, expected = found["stages"][stage], run.result["metrics"][stage]
        assert part["protocol"] == expected["protocol"]
        assert part["protocol"] in out
        row = part["table"][0]
        assert row["model"] == run.model
        assert {name: value for name, value in row.items() if name != "model"} == {
            name: expected[name] for name in row if name != "model"
        }


def test_a_run_that_ended_before_its_first_validation_is_measured_with_its_last_weights(shop):
    succeed(shop, *TRAIN, "--max-steps", "2")
    run = run_folder(shop)
    assert not (shop / run / "checkpoints" / "best.safetensors").exists()
    succeed(shop, "evaluate", str(run), "--output", "found.json")
    found = strict_json(shop / "found.json")
    assert found["weights"] == str(run / "checkpoints" / "step-00000002.safetensors")
    assert found["stages"]["test"]["table"] == strict_json(shop / run / "result.json")["table"]


def test_work_of_one_process_is_refused_under_torchrun(finished):
    ended = invoke(finished.folder, "evaluate", str(finished.run), WORLD_SIZE="2", LOCAL_RANK="0")
    assert ended.code == 2
    assert "only `train` shares its work among processes" in ended.err


def rows_of(lists: Lists) -> list[list[int]]:
    return [part.tolist() for part in torch.split(lists.item, lists.ptr.diff().tolist())]


def dense(data: Interactions) -> Tensor:
    """The interactions of the training part, [U, I] float64 of zeros and ones."""
    matrix = torch.zeros(data.num_users, data.num_items, dtype=torch.float64)
    for user, items in enumerate(rows_of(data.train)):
        matrix[user, items] = 1
    return matrix


def normalised(matrix: Tensor) -> Tensor:
    roots = [matrix.sum(axis).clamp(min=1).rsqrt() for axis in (1, 0)]
    return roots[0][:, None] * matrix * roots[1]


def scores_of(run: Trained) -> Tensor:
    """Every user's score of every item under the weights of the run, [U, I] float64, from dense matrices."""
    data = run.data
    state = {name: value.double() for name, value in load_weights(run.folder / run.weights)[0].items()}
    plain = dense(data)
    half = normalised(plain)
    if run.model == "bspm":
        similar, scores = half.T @ half, plain @ state["left"] @ state["right"].T
        for n, weight in enumerate(state["powers"].tolist(), 1):
            scores = scores + weight * plain @ torch.linalg.matrix_power(similar, n)
        return scores
    table = state["table"]
    if run.model == "clcrec-graph":
        content = torch.cat([F.normalize(data.content[m].double(), dim=1) for m in ("v", "a", "t")], 1)
        hidden = F.leaky_relu(content @ state["hidden.weight"].T + state["hidden.bias"])
        table[data.num_users + NUM_WARM :] = (hidden @ state["output.weight"].T + state["output.bias"])[NUM_WARM:]
        return table[: data.num_users] @ table[data.num_users :].T
    whole = torch.zeros(len(table), len(table), dtype=torch.float64)
    whole[: data.num_users, data.num_users :] = half
    whole[data.num_users :, : data.num_users] = half.T
    layers = [table, whole @ table, whole @ whole @ table]
    final = torch.stack(layers[1:] if run.model == "xsimgcl" else layers).mean(0)
    return final[: data.num_users] @ final[data.num_users :].T


def best_first(values: dict[str, float], k: int) -> list[str]:
    return sorted(values, key=lambda name: -values[name])[:k]


def known_items(data: Interactions) -> list[set[int]]:
    """Per user, the items of training, validation and test."""
    parts = [rows_of(lists) for lists in (data.train, data.valid, data.test)]
    return [set().union(*lists) for lists in zip(*parts, strict=True)]


def test_predictions_are_raw_ids_of_the_best_items_that_are_not_known(each_trained):
    run, k = each_trained, 4
    out = succeed(run.folder, "predict", str(run.run), "--k", str(k), "--output", "new/top.jsonl")
    data, scores = run.data, scores_of(run)
    found = json_lines(run.folder / "new" / "top.jsonl")
    assert [record["user"] for record in found] == list(data.user_ids)
    for user, (record, known) in enumerate(zip(found, known_items(data), strict=True)):
        assert list(record) == ["user", "items", "scores"]
        values = {data.item_ids[item]: float(scores[user, item]) for item in range(data.num_items) if item not in known}
        assert record["items"] == best_first(values, k)
        assert record["scores"] == pytest.approx([values[name] for name in record["items"]], abs=2e-6)
    assert f"new/top.jsonl: the best {k} or fewer items for {data.num_users} users, exact, from {run.weights}" in out


@pytest.mark.parametrize(("group", "size"), [("all", NUM_WARM + NUM_COLD), ("warm", NUM_WARM), ("cold", NUM_COLD)])
def test_items_are_chosen_from_a_group_and_known_ones_kept_when_asked(group, size, finished_runs, tmp_path):
    run = finished_runs["clcrec-graph"]
    output = tmp_path / "all.jsonl"
    words = ("--k", "99", "--keep-seen", "--group", group, "--output", str(output))
    succeed(run.folder, "predict", str(run.run), *words)
    ids = run.data.item_ids
    expected = {"all": ids, "warm": ids[:NUM_WARM], "cold": ids[NUM_WARM:]}[group]
    assert len(expected) == size
    for record in json_lines(output):
        assert sorted(record["items"]) == sorted(expected)


def test_a_prediction_that_fails_leaves_the_old_file_alone(trained, monkeypatch):
    def fails(*args: Any, **options: Any) -> Iterator[Any]:
        yield torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[0.5]])
        raise ValueError("in the middle")

    (trained.folder / "top.jsonl").write_text("old\n", encoding="utf-8")
    before = contents(trained.folder)
    monkeypatch.setattr(evaluation, "predict", fails)
    ended = invoke(trained.folder, "predict", str(trained.run), "--output", "top.jsonl")
    assert (ended.code, ended.err) == (2, "error: in the middle\n")
    assert contents(trained.folder) == before


@pytest.mark.parametrize("name", ["lightgcn", "xsimgcl", "clcrec-graph"])
def test_an_export_holds_the_vectors_whose_products_are_the_scores(name, finished_runs, tmp_path):
    run = finished_runs[name]
    data = run.data
    out = succeed(run.folder, "export", str(tmp_path / "new" / "model.safetensors"), "--run", str(run.run))
    assert f"vectors of 8 dimensions, with the weights they are made of, for {data.num_users} users and" in out
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:  # as other programs read it
        tensors = {name: file.get_tensor(name) for name in ("user", "item")}
        assert {*load_weights(run.folder / run.weights)[0], "user", "item"} == set(file.keys())
    assert {key: (value.dtype, list(value.shape)) for key, value in tensors.items()} == {
        "user": (torch.float32, [data.num_users, 8]),
        "item": (torch.float32, [data.num_items, 8]),
    }
    assert torch.allclose(tensors["user"].double() @ tensors["item"].double().T, scores_of(run), atol=1e-5)
    meta = load_weights(tmp_path / "new" / "model.safetensors")[1]
    assert meta["user_ids"] == list(data.user_ids)
    assert meta["item_ids"] == list(data.item_ids)


def test_the_export_of_a_filter_holds_its_factors(finished_runs, tmp_path):
    run = finished_runs["bspm"]
    out = succeed(run.folder, "export", str(tmp_path / "model.safetensors"), "--run", str(run.run))
    assert "factors of rank 8, to be used with the graph, for 60 users and" in out
    found, meta = load_weights(tmp_path / "model.safetensors")
    expected, _ = load_weights(run.folder / run.weights)
    assert found.keys() == expected.keys() == {"left", "right", "powers"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert meta["item_ids"] == list(run.data.item_ids)


def test_training_on_a_pack_gives_the_result_of_training_on_its_source(trained):
    out = succeed(trained.folder, "prepare", "shop", "packs/shop.safetensors")
    assert "train --data-path packs/shop.safetensors" in out
    assert f"60 users, {trained.data.num_items} items, {trained.data.num_pairs} training pairs" in out
    words = [word.replace("shop", "packs/shop.safetensors") for word in TRAIN]
    succeed(trained.folder, *words, "--runs-dir", "packed/runs")
    run = trained.folder / "packed" / run_folder(trained.folder / "packed")
    result = strict_json(run / "result.json")
    for key in ("metrics", "table", "data", "steps", "best_epoch"):
        assert result[key] == trained.result[key]
    trees = [load_checkpoint(path / "checkpoints" / "best.safetensors") for path in (run, trained.folder / trained.run)]
    assert torch.equal(trees[0]["model"]["table"], trees[1]["model"]["table"])


def write_events(path: Path) -> None:
    """Lines `user item rating time`, each user's in another order of time."""
    lines = [
        f"u{user} i{item} {1 + (user * item) % 5} {1000 + (user * 7 + item * 13) % 97}"
        for user in range(12)
        for item in range(20)
        if (user + item) % 3
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_events_are_split_by_flags_alike_in_a_pack_and_in_a_run(tmp_path):
    write_events(tmp_path / "events.txt")
    flags = ("--split", "time", "--min-rating", "2", "--valid-share", "0.2")
    out = succeed(tmp_path, "prepare", "events.txt", "events.safetensors", *flags)
    assert "below 2 left out" in out
    words = (*SMALL, "--num-negatives", "2", "--epochs", "1")
    results = []
    for number, source in enumerate((("events.txt", *flags), ("events.safetensors",))):
        succeed(tmp_path, "train", "--data-path", *source, *words, "--runs-dir", f"{number}/runs")
        run = tmp_path / str(number) / run_folder(tmp_path / str(number))
        results.append(strict_json(run / "result.json"))
        assert "0.2 for validation, by time, ratings from 2" in results[-1]["protocol"]
    assert results[0]["table"] == results[1]["table"]
    succeed(tmp_path, "predict", str(run.relative_to(tmp_path)), "--output", "top.jsonl")
    assert [record["user"] for record in json_lines(tmp_path / "top.jsonl")] == list(
        read_data(tmp_path / "events.safetensors").user_ids
    )


def test_check_exits_with_2_on_an_error_only(shop):
    assert "shop: no fault found" in succeed(shop, "check", "shop")
    train = shop / "shop" / "train.txt"
    lines = train.read_text(encoding="utf-8").splitlines()
    train.write_text("\n".join([f"{lines[0]} {lines[0].split()[1]}", *lines[1:]]) + "\n", encoding="utf-8")
    said = succeed(shop, "check", "shop")
    assert "train.txt:1: warning: " in said
    assert "can be read, with these warnings" in said
    train.write_text("\n".join(["0 x", *lines[1:]]) + "\n", encoding="utf-8")
    ended = invoke(shop, "check", "shop")
    assert ended.code == 2
    assert "train.txt:1: error: " in ended.out
    assert "shop: cannot be read as it is" in ended.out


# What the user can repair


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --data-path absent", ["absent"]),
        ("train --data-path shop --batch-sise 3", ["--batch-sise", "--batch-size"]),
        ("trian --data-path shop", ["trian"]),
        ("train --data-path shop --config gowala", ["gowala", "did you mean gowalla"]),
        (
            "train --data-path shop --config broken.yaml",
            ["broken.yaml, line 3", "batch_sise", "did you mean batch_size"],
        ),
        ("train --data-path shop --valid-share 1", ["--valid-share", "< 1"]),
        ("train --data-path shop --epochs few", ["--epochs", "few", "an integer"]),
        ("train --data-path shop --model ligthgcn", ["--model", "did you mean lightgcn"]),
        ("train --data-path shop --num-negatives 8 --select Recall@7", ["Recall@7", "Recall@20"]),
        ("train --data-path shop --num-negatives 9999", ["9999"]),
        ("train --data-path shop --model content", ["shop", "--model lightgcn"]),
        ("train --data-path shop --model clcrec-graph --loss bpr", ["clcrec and clcrec-graph go together"]),
        ("train --data-path shop --device cuda:99", ["cuda:99"]),
        ("train --data-path shop --amp=maybe", ["--amp"]),
        ("train --data-path shop/train.txt", ["give the folder"]),
        ("train --data-path shop --min-rating 3", ["shop", "--min-rating"]),
        ("train --resume absent", ["absent is no run folder"]),
        ("evaluate folder", ["folder is no run folder"]),
        ("evaluate --data-path shop", ["which model?"]),
        ("evaluate --weights absent.safetensors --data-path shop", ["absent.safetensors"]),
        ("predict --weights absent.pt --data-path shop", ["absent.pt"]),
        ("predict --group cool --weights absent.pt", ["--group is cool", "all, warm, cold"]),
        ("export out.safetensors", ["which model?"]),
        ("export out.bin --weights absent.pt", ["out.bin", ".safetensors"]),
        ("prepare absent pack.safetensors", ["absent"]),
        ("prepare shop pack.bin", ["pack.bin", ".safetensors"]),
        ("prepare shop pack.safetensors --split weekly", ["--split", "weekly"]),
        ("check absent", ["absent"]),
    ],
)
def test_a_mistake_is_named_with_exit_code_2_and_leaves_nothing_behind(words, expected, shop):
    (shop / "folder").mkdir()
    (shop / "broken.yaml").write_text("training:\n  lr: 0.1\n  batch_sise: 3\n", encoding="utf-8")
    before = sorted(shop.rglob("*"))
    ended = invoke(shop, *words.split())
    assert ended.code == 2
    said = ended.out if words.startswith("check") else ended.err
    for part in expected:
        assert part in said
    assert "Traceback" not in ended.out + ended.err
    assert sorted(shop.rglob("*")) == before


def test_a_group_that_the_data_has_not_got_is_named_and_nothing_is_written(trained):
    before = contents(trained.folder)
    ended = invoke(trained.folder, "predict", str(trained.run), "--group", "cold")
    assert ended.code == 2
    assert "shop knows no cold items" in ended.err
    assert contents(trained.folder) == before


def test_a_run_without_a_checkpoint_says_how_to_go_on(trained):
    shutil.rmtree(trained.folder / trained.run / "checkpoints")
    ended = invoke(trained.folder, "evaluate", str(trained.run))
    assert ended.code == 2
    assert f"{trained.run} holds no checkpoint yet" in ended.err
    assert f"train --resume {trained.run}" in ended.err


# Going on with a run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "gowalla"], ["--config", "exclude each other"]),
        (["--lr", "0.5"], ["config.training.lr: 0.05 in the checkpoint, 0.5 now"]),
        (["--layers", "1"], ["config.model.layers: 2 in the checkpoint, 1 now"]),
    ],
)
def test_a_run_cannot_go_on_with_another_configuration_and_is_left_as_it_was(words, expected, trained):
    before = contents(trained.folder)
    ended = invoke(trained.folder, "train", "--resume", str(trained.run), *words)
    assert ended.code == 2
    for part in expected:
        assert part in ended.err
    assert contents(trained.folder) == before


def test_a_run_cannot_go_on_with_changed_data_and_is_left_as_it_was(trained):
    shutil.rmtree(trained.folder / "shop")
    write_shop(trained.folder / "shop", seed=8)
    before = contents(trained.folder)
    ended = invoke(trained.folder, "train", "--resume", str(trained.run))
    assert ended.code == 2
    assert "data.fingerprint" in ended.err
    assert contents(trained.folder) == before


def test_resuming_a_finished_run_changes_nothing_but_what_tells_of_the_command(each_trained):
    run = each_trained
    before, result = contents(run.folder / run.run), run.result
    out = succeed(run.folder, "train", "--resume", str(run.run))
    after = contents(run.folder / run.run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"train.log", "result.json", "report.html"}
    again = run.result
    assert again.pop("command") == f"python -m apps.graphrec train --resume {run.run}"
    assert {**result, "command": None} == {**again, "command": None}
    assert result["protocol"] in out


def test_a_run_stopped_before_its_first_checkpoint_starts_over(trained):
    expected = trained.result
    for path in (trained.folder / trained.run).iterdir():
        if path.name == "checkpoints":
            shutil.rmtree(path)
        elif path.name != "config.yaml":
            path.unlink()
    out = succeed(trained.folder, "train", "--resume", str(trained.run))
    assert "holds no checkpoint yet: starting from step 0" in out
    assert trained.result["metrics"] == expected["metrics"]


# How a run ends


def test_running_out_of_memory_ends_with_exit_code_1_and_what_to_try(shop, monkeypatch):
    def fails(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("apps.graphrec.train.amp_step", fails)
    ended = invoke(shop, *TRAIN)
    assert ended.code == 1
    for words in ("no memory left", "go back to --batch-size 256", "--num-negatives", "--accumulate 2"):
        assert words in ended.out
    assert "Traceback" not in ended.err


def test_a_diverging_run_ends_with_exit_code_1_and_names_the_step(shop):
    ended = invoke(shop, *TRAIN[:-2], "--lr", "1e30", "--log-every", "1")
    assert ended.code == 1
    run = shop / run_folder(shop)
    (warning,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert "not a number since step " in warning
    assert warning in (run / "train.log").read_text(encoding="utf-8")
    assert "Traceback" not in ended.err
    assert not (run / "result.json").exists()


def test_a_model_that_ranks_nothing_ends_with_exit_code_1(shop, monkeypatch):
    def dead(*args: Any, **options: Any) -> None:
        raise evaluation.DeadModelError("every score of the model is zero")

    monkeypatch.setattr("apps.graphrec.train.evaluation_sums", dead)
    ended = invoke(shop, *TRAIN)
    assert ended.code == 1
    assert "warning: every score of the model is zero" in ended.out
    assert "Traceback" not in ended.err


def resume_words(out: str) -> list[str]:
    """The command line that a stopped run printed."""
    (line,) = [line for line in out.splitlines() if "resume with: python -m apps.graphrec " in line]
    return shlex.split(line.partition("python -m apps.graphrec ")[2])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bspm"])
def test_an_interrupt_ends_with_130_and_the_printed_command_ends_the_run_as_if_it_had_not_been(
    name, finished_runs, tmp_path, monkeypatch
):
    whole, folder, steps = finished_runs[name], tmp_path / "a folder", 0
    shutil.copytree(whole.folder / whole.source, folder / whole.source)
    last = steps_per_epoch(whole.data) + 1  # in the second epoch
    advance = progress.Bar.advance

    def interrupting(self: progress.Bar, n: int = 1) -> None:
        nonlocal steps
        steps += n
        advance(self, n)
        if steps == last and n:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bar, "advance", interrupting)
    ended = invoke(folder, *train_words(name), "--runs-dir", str(folder / "runs"))
    assert ended.code == 130
    assert f"stopped at step {last}" in ended.out
    run = folder / run_folder(folder)
    words = tuple(resume_words(ended.out))
    assert words == ("train", "--resume", str(run))
    assert not (run / "result.json").exists()
    succeed(folder, *words)
    assert strict_json(run / "result.json")["metrics"] == whole.result["metrics"]
    best, *_, newest = sorted((whole.folder / whole.run / "checkpoints").iterdir())
    for path in (best, newest):
        weights, found = (load_weights(parent / path.name)[0] for parent in (best.parent, run / "checkpoints"))
        assert all(torch.equal(weight, found[key]) for key, weight in weights.items())


def test_an_interrupt_while_a_filter_is_measured_keeps_what_was_fitted(finished_runs, tmp_path, monkeypatch):
    whole = finished_runs["bspm"]
    shutil.copytree(whole.folder / "shop", tmp_path / "shop")
    scores, calls = apps.graphrec.spectral.Filter.scores, 0

    def interrupting(self: Any, user_rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            signal.raise_signal(signal.SIGINT)
        return scores(self, user_rows)

    monkeypatch.setattr(apps.graphrec.spectral.Filter, "scores", interrupting)
    ended = invoke(tmp_path, *train_words("bspm"))
    assert ended.code == 130
    out = succeed(tmp_path, *resume_words(ended.out))
    assert "block iteration" not in out
    assert strict_json(tmp_path / run_folder(tmp_path) / "result.json")["table"] == whole.result["table"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM to a process")
def test_a_terminated_process_saves_and_ends_with_143_and_the_command_to_resume(shop):
    words = ["-m", "apps.graphrec", *TRAIN, "--epochs", "100000", "--log-every", "1", "--eval-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=shop,
        env=process_environment(PYTHONIOENCODING="utf-8"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in shop.glob("runs/graphrec/*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (143, "")
    assert "SIGTERM: stopping after this step" in out
    run = run_folder(shop)
    assert resume_words(out) == ["train", "--resume", str(run)]
    (checkpoint,) = sorted((shop / run / "checkpoints").iterdir())[-1:]
    step = load_checkpoint(checkpoint)["step"]
    assert f"stopped at step {step};" in out
    succeed(shop, *resume_words(out), "--max-steps", str(step + 2))
    assert strict_json(shop / run / "result.json")["steps"] == step + 2


# Several processes


def test_two_processes_that_own_columns_end_like_one_and_the_run_goes_on_in_one(trained):
    found = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
            *("apps.graphrec", *TRAIN, "--parallel", "dims", "--runs-dir", "two/runs"),
        ],
        cwd=trained.folder,
        env=process_environment(PYTHONIOENCODING="utf-8"),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("epoch 1:") == 1  # the other process is silent
    assert "on cpu in 2 processes" in found.stdout
    run = Path("two") / run_folder(trained.folder / "two")
    result = strict_json(trained.folder / run / "result.json")
    assert "trained by 2 processes" in result["notes"]
    assert result["command"].startswith("torchrun --nproc-per-node 2 -m apps.graphrec train ")
    assert result["table"][1:] == trained.result["table"][1:]
    assert result["table"][0]["Recall@20"] == pytest.approx(trained.result["table"][0]["Recall@20"], abs=0.02)
    succeed(trained.folder, "train", "--resume", str(run))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("--local-rank=1 --lr 1", "--lr 1"), ("--lr 1 --local_rank 0", "--lr 1"), ("--lr 1", "--lr 1")],
)
def test_the_rank_that_an_older_launcher_adds_is_dropped(given, expected):
    assert cli.without_local_rank(given.split()) == expected.split()


# Demo data


def test_demo_data_is_said_to_be_demo_data_wherever_a_number_is(tmp_path, monkeypatch):
    made = demo_data(num_users=NUM_USERS, num_items=NUM_ITEMS)
    monkeypatch.setattr(demo, "demo_data", lambda: made)
    out = succeed(tmp_path, "train", *SMALL, "--epochs", "1", "--lr", "0.05", "--baselines", "popularity")
    run = run_folder(tmp_path)
    assert "-demo-" in run.name
    assert out.count("demo data") >= 2  # at the start and above the table
    assert out.index("demo data") < out.index("epoch 1")
    assert "demo data" in (tmp_path / run / "train.log").read_text(encoding="utf-8")
    (note,) = strict_json(tmp_path / run / "result.json")["notes"]
    assert "demo data" in note
    assert note in (tmp_path / run / "report.html").read_text(encoding="utf-8")
    assert note in succeed(tmp_path, "evaluate", str(run), "--output", "found.json")
    assert [part["notes"] for part in strict_json(tmp_path / "found.json")["stages"].values()] == [[note], [note]]
    assert "demo data" in succeed(tmp_path, "predict", str(run))
    assert "demo data" in succeed(tmp_path, "export", "model.safetensors", "--run", str(run))


def test_real_data_is_never_called_demo_data(trained):
    said = trained.out + succeed(trained.folder, "evaluate", str(trained.run))
    said += succeed(trained.folder, "predict", str(trained.run))
    said += "".join(
        (trained.folder / trained.run / name).read_text(encoding="utf-8") for name in ("train.log", "report.html")
    )
    assert "demo" not in said
