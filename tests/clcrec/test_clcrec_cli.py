"""The command line as a user meets it: what it writes, what it says, and how it ends."""

import contextlib
import io
import json
import os
import pickle
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
from safetensors import safe_open

from apps.clcrec import demo, main
from apps.clcrec import evaluate as evaluation
from apps.clcrec.config import ALIASES, Config
from apps.clcrec.dataset import ColdStart
from apps.clcrec.demo import demo_data, write_demo
from apps.clcrec.formats import read_data
from shared import cli, progress
from shared.checkpoint import load_checkpoint, load_weights
from shared.config import Resolved, knobs, resolve
from shared.log import read_metrics

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_WARM, NUM_COLD = 40, 30, 10
SMALL = ("--embed-dim", "8", "--hidden-dim", "8", "--batch-size", "128", "--num-negatives", "8")
ORIGINAL_SMALL = ("--dim_E", "8", "--hidden_dim", "8")
TRAIN = ("train", "--data-path", "shop", *SMALL, "--epochs", "2", "--log-every", "2", "--lr", "0.01")
LITERAL = (  # the command line of the original's README, with the batch size of the user's notes
    "--model_name='CLCRec' --l_r=0.001 --reg_weight=0.1 --num_workers=4 --num_neg=128 --batch_size=512 --has_a=True "
    "--has_t=True --has_v=True --lr_lambda=0.5 --temp_value=2.0 --num_sample=0.5"
)


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
        mock.patch.object(sys, "argv", ["apps/clcrec/__main__.py", *words]),
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


def write_shop(folder: Path, *, seed: int = 7) -> None:
    """A small folder in the original's layout: what the demo's generator makes, under a name of its own."""
    made = demo_data(num_users=NUM_USERS, num_warm=NUM_WARM, num_cold=NUM_COLD, seed=seed)
    with mock.patch.object(demo, "demo_data", return_value=made):
        write_demo(folder)


def run_folder(folder: Path) -> Path:
    """The only run folder below `folder`, as a path to be used there."""
    (config,) = folder.glob("runs/clcrec/*/config.yaml")
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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Trained(NamedTuple):
    """A folder with data and one finished run."""

    folder: Path
    run: Path  # relative to the folder
    out: str

    @property
    def result(self) -> Any:
        return strict_json(self.folder / self.run / "result.json")

    @property
    def data(self) -> ColdStart:
        return read_data(self.folder / "shop")

    @property
    def best(self) -> Path:
        return self.run / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run that nobody may change."""
    folder = tmp_path_factory.mktemp("finished")
    write_shop(folder / "shop")
    out = succeed(folder, *TRAIN, "--name", "first")
    return Trained(folder, run_folder(folder), out)


@pytest.fixture
def trained(finished: Trained, tmp_path: Path) -> Iterator[Trained]:
    """A copy of the finished run, for tests that change it."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    before = contents(finished.folder)
    yield finished._replace(folder=tmp_path / "copy")
    assert contents(finished.folder) == before


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with data and nothing else."""
    write_shop(tmp_path / "shop")
    return tmp_path


def process_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


def steps_per_epoch(data: ColdStart, batch_size: int = 128) -> int:
    return -(-data.num_pairs // batch_size)


# Help


def test_help_loads_neither_torch_nor_anything_that_does(tmp_path):
    code = """
import sys
from apps.clcrec import main
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
            shown = "(none)" if default is None else str(default)
        assert f"[default: {shown}]" in line
        assert knob.help in line
        assert knob.limits in line


def test_the_default_preset_holds_the_built_in_defaults():
    found: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / "default.yaml", aliases=ALIASES)
    assert found.config == Config()


def test_the_movielens_preset_is_the_original_command_line():
    found: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / "movielens.yaml", aliases=ALIASES)
    data, training = found.config.data, found.config.training
    assert (data.has_v, data.has_a, data.has_t) == (True, True, True)
    assert (training.lr, training.reg_weight, training.num_negatives, training.batch_size) == (1e-3, 0.1, 128, 256)
    assert (training.lr_lambda, training.temperature, training.num_sample) == (0.5, 2.0, 0.5)


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
    succeed(shop, "train", "--config", "citeulike", *words)
    text = (shop / run_folder(shop) / "config.yaml").read_text(encoding="utf-8")
    assert "  batch_size: 64  # flag --batch-size\n" in text
    preset: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / "citeulike.yaml")
    assert f"  temperature: {preset.config.training.temperature}  # preset citeulike.yaml\n" in text


def test_the_log_and_the_metrics_tell_the_run(finished):
    log = (finished.folder / finished.run / "train.log").read_text(encoding="utf-8")
    pairs = finished.data.num_pairs
    for words in (
        f"shop: 40 users, 30 warm and 10 cold items, {pairs} training pairs, content feat_v, feat_a, feat_t",
        "epoch 1: validation Recall@10 all ",
        "epoch 2:",
        str(finished.run),
    ):
        assert words in log
        assert words in finished.out
    epoch = steps_per_epoch(finished.data)
    expected = [("train", step, 0) for step in range(2, epoch, 2)]
    expected += [("train", epoch, 0), ("valid", epoch, 0)]
    expected += [("train", step, 1) for step in range(epoch + 1, 2 * epoch) if step % 2 == 0]
    expected += [("train", 2 * epoch, 1), ("valid", 2 * epoch, 1)]
    records = read_metrics(finished.folder / finished.run / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["epoch"]) for line in records] == expected


def test_the_result_holds_every_metric_with_its_protocol_and_where_it_came_from(finished):
    result = finished.result
    for stage in ("valid", "test"):
        metrics = result["metrics"][stage]
        assert metrics["protocol"].startswith(f"{stage} positives, full ranking of all (")
        for words in ("40 items)", "30 items)", "10 items)", "training positives left out"):
            assert words in metrics["protocol"]
        for group in ("all", "warm", "cold"):
            assert 0 < metrics[f"{group}/Recall@10"] <= 1
            assert 0 < metrics[f"{group}/NDCG@20"] <= 1
    assert result["protocol"] == result["metrics"]["test"]["protocol"]
    assert [row["model"] for row in result["table"]] == ["clcrec", "popularity", "content"]
    for row in result["table"]:
        assert list(row) == result["table_columns"]
    assert result["table"][0]["cold/NDCG@10"] == result["metrics"]["test"]["cold/NDCG@10"]
    assert result["speed"]["pairs/s"] > 0
    assert "evaluation and saving are not in it" in result["speed_measured"]
    assert {"cpu", "cores", "os"} <= set(result["machine"])
    assert result["versions"] == {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    expected = finished.data
    assert result["data"] == {
        "name": "shop",
        "users": NUM_USERS,
        "warm items": NUM_WARM,
        "cold items": NUM_COLD,
        "pairs": expected.num_pairs,
        "content": ["v", "a", "t"],
        "fingerprint": expected.fingerprint,
    }
    assert result["git"] is None or isinstance(result["git"], str)
    assert result["command"] == shlex.join(["python", "-m", "apps.clcrec", *TRAIN, "--name", "first"])
    assert (result["steps"], result["notes"]) == (2 * steps_per_epoch(expected), [])


def test_the_console_and_the_report_show_the_table_with_its_protocol(finished):
    report = (finished.folder / finished.run / "report.html").read_text(encoding="utf-8")
    protocol = finished.result["protocol"]
    said, _, table = finished.out.rpartition(protocol)
    assert said
    assert protocol in report
    for word in ("all", "warm", "cold", "Recall", "NDCG", "@20"):
        assert word in table
    for group in ("all", "warm", "cold"):
        for name in (f"{group}/Recall@20", f"{group}/NDCG@20"):
            assert f"{finished.result['metrics']['test'][name]:.4f}" in table
    for name in ("popularity", "content"):
        assert name in table
        assert name in report
    assert f"open {finished.run / 'report.html'}" in finished.out


def test_outside_a_checkout_the_revision_is_null(monkeypatch):
    def absent(*words: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert cli.git_revision() is None


# The original scripts' spellings


@pytest.mark.parametrize("verb", [["train"], []])
def test_the_original_command_line_runs_unchanged(verb, tmp_path, monkeypatch):
    made = demo_data(num_users=30, num_warm=300, num_cold=20)
    monkeypatch.setattr(demo, "demo_data", lambda: made)
    words = [*verb, *shlex.split(LITERAL)]
    out = succeed(tmp_path, *words, "--max-steps", "2")
    run = run_folder(tmp_path)
    assert run.name.endswith("-demo-CLCRec")
    config = configuration(tmp_path / run)
    training = config.training
    assert (config.data.has_v, config.data.has_a, config.data.has_t) == (True, True, True)
    assert (training.lr, training.reg_weight, training.num_negatives, training.batch_size) == (1e-3, 0.1, 128, 512)
    assert (training.lr_lambda, training.temperature, training.num_sample) == (0.5, 2.0, 0.5)
    assert training.num_workers == 4
    (line,) = [line for line in out.splitlines() if "workers" in line]
    assert line.startswith("--num-workers 4 is not used: batches are made from tensors")
    assert "warning" not in out


def test_only_workers_that_were_asked_for_are_spoken_of(finished):
    assert "workers" not in finished.out


@pytest.mark.parametrize("flag", ["--PATH_weight_load", "--save_file"])
def test_flags_of_the_original_that_have_no_meaning_here_are_named(flag, tmp_path):
    ended = invoke(tmp_path, flag, "somewhere")
    assert ended.code == 2
    assert f"No such option: {flag.replace('_', '-')}" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--amp --lr 1", "--precision=auto --lr 1"),
        ("--amp=True --lr 1", "--precision=auto --lr 1"),
        ("--amp true --lr 1", "--precision=auto --lr 1"),
        ("train --lr 1 --amp", "train --lr 1 --precision=auto"),
        ("--amp=False --lr 1", "--precision=fp32 --lr 1"),
        ("--amp False --lr 1", "--precision=fp32 --lr 1"),
        ("--no-amp --lr 1", "--precision=fp32 --lr 1"),
        ("--no_amp", "--precision=fp32"),
        ("--no-amp=False", "--precision=auto"),
        ("train --amp --no-amp", "train --precision=auto --precision=fp32"),
        ("--amp=maybe", "--amp=maybe"),
        ("--amp some_path", "--precision=auto some_path"),
        ("evaluate some_path --l_r 1", "evaluate some_path --l_r 1"),
    ],
)
def test_amp_means_a_precision(given, expected):
    assert main.amp_as_precision(given.split()) == expected.split()


@pytest.mark.parametrize(("word", "precision"), [("--amp", "auto"), ("--amp=False", "fp32"), ("--no-amp", "fp32")])
def test_amp_reaches_the_configuration(word, precision, shop):
    succeed(shop, *TRAIN, "--max-steps", "1", word)
    assert configuration(shop / run_folder(shop)).training.precision == precision


@pytest.mark.parametrize(("value", "loss"), [("0", "item-content"), ("1", "user-item"), ("1.0", "user-item")])
def test_a_loss_that_is_multiplied_by_zero_is_warned_of(value, loss, shop):
    out = succeed(shop, *TRAIN, "--max-steps", "1", "--lr_lambda", value)
    (line,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert f"multiplies the {loss} loss by zero" in line
    assert line in (shop / run_folder(shop) / "train.log").read_text(encoding="utf-8")


# Weights of every kind


def weights_file(trained: Trained, kind: str) -> str:
    """A file with the weights of the finished run's best checkpoint; its name."""
    if kind == "checkpoint":
        return str(trained.best)
    if kind == "export":
        out = succeed(trained.folder, "export", "model.safetensors", "--run", str(trained.run))
        assert f"from {trained.best}" in out
        return "model.safetensors"
    state, _ = load_weights(trained.folder / trained.best)
    torch.save(state if kind == "pt" else {"epoch": 3, "state_dict": state}, trained.folder / "model.pt")
    return "model.pt"


@pytest.mark.parametrize("kind", ["checkpoint", "export", "pt", "nested pt"])
def test_weights_of_every_kind_of_file_are_measured(kind, trained):
    name = weights_file(trained, kind)
    words = ("evaluate", "--weights", name, "--data_path", "shop", *ORIGINAL_SMALL)
    out = succeed(trained.folder, *words, "--output", "found.json")
    found = strict_json(trained.folder / "found.json")
    assert found["stages"]["test"]["table"] == trained.result["table"]
    assert found["stages"]["test"]["protocol"] == trained.result["protocol"]
    assert found["weights"] == name
    assert trained.result["protocol"] in out


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_weights_bring_the_notes_and_the_factor_that_their_numbers_have(kind, shop):
    succeed(shop, *TRAIN, "--neg-exclude", "all", "--cold-scale", "1.5")
    run = run_folder(shop)
    weights = str(run / "checkpoints" / "best.safetensors")
    if kind == "export":
        weights = "model.safetensors"
        succeed(shop, "export", weights, "--run", str(run))
    out = succeed(shop, "evaluate", "--weights", weights, "--data-path", "shop", *SMALL)
    assert main.LEAK_NOTE in out
    assert "cold scores times 1.5" in out
    assert "cold scores times 2" in succeed(
        shop, "evaluate", "--weights", weights, "--data-path", "shop", *SMALL, "--cold-scale", "2"
    )


@pytest.mark.parametrize("turned", [("--users-for", "all"), ("--new-items", "arrivals")])
def test_a_group_of_items_is_refused_where_users_are_wanted(turned, trained):
    ended = invoke(trained.folder, "predict", str(trained.best.parents[1]), "--group", "cold", *turned)
    assert ended.code == 2
    assert "--group is about items for users" in ended.err


def test_settings_without_effect_are_named(shop):
    out = succeed(shop, *TRAIN, "--resample_epochs=10", "--negatives", "shared", "--scores", "gather")
    assert "--resample-epochs 10 is about --negatives pool, and changes nothing here" in out
    assert "--scores gather is about negatives of each pair's own, and changes nothing here" in out


class Hostile:
    """Makes a folder when it is unpickled by a careless reader."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_hostile_state_dict_is_refused_and_nothing_of_it_runs(form, suffix, shop):
    canary = shop / "canary"
    path = shop / f"model{suffix}"
    state = {"item": torch.zeros(2, 2), "extra": Hostile(canary)}
    if form == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Hostile(canary)}, protocol=2))
    ended = invoke(shop, "evaluate", "--weights", path.name, "--data_path", "shop")
    assert ended.code == 2
    assert f"error: {path.name}: refused" in ended.err
    assert "mkdir" in ended.err
    assert "weights_only" not in ended.err  # no advice to switch the protection off
    assert not canary.exists()
    with contextlib.suppress(RuntimeError):  # of what it finds afterwards
        torch.load(path, weights_only=False)  # a careless reader
    assert canary.exists()


def test_foreign_weights_that_do_not_fit_are_refused_with_the_tensors_names(trained):
    name = weights_file(trained, "pt")
    words = ("evaluate", "--weights", name, "--data-path", "shop", "--hidden-dim", "8")
    ended = invoke(trained.folder, *words, "--embed-dim", "16")
    assert ended.code == 2
    assert f"error: {name} does not fit the model: user is [40, 8], expected [40, 16]" in ended.err
    ended = invoke(trained.folder, *words, "--embed-dim", "8", "--has-v")
    assert ended.code == 2
    assert "hidden.weight is [8, " in ended.err
    state = torch.load(trained.folder / name, weights_only=True)
    state["mlp.weight"] = state.pop("output.bias")
    torch.save(state, trained.folder / name)
    ended = invoke(trained.folder, *words, "--embed-dim", "8")
    assert ended.code == 2
    assert "output.bias is missing; mlp.weight is not part of this model" in ended.err


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_our_own_weights_are_refused_under_another_model_other_content_or_other_items(kind, trained):
    name = weights_file(trained, kind)
    words = ("evaluate", "--weights", name, *SMALL)
    ended = invoke(trained.folder, *words, "--data-path", "shop", "--hidden-dim", "16")
    assert ended.code == 2
    assert "model.hidden_dim: 8 in the checkpoint, 16 now" in ended.err
    ended = invoke(trained.folder, *words, "--data-path", "shop", "--has-v", "--has-t")
    assert ended.code == 2
    assert "content: ['v', 'a', 't'] in the checkpoint, ['v', 't'] now" in ended.err
    made = demo_data(num_users=NUM_USERS, num_warm=NUM_WARM - 1, num_cold=NUM_COLD + 1)
    with mock.patch.object(demo, "demo_data", return_value=made):
        write_demo(trained.folder / "other")
    ended = invoke(trained.folder, *words, "--data-path", "other")
    assert ended.code == 2
    assert name in ended.err
    assert "items:" in ended.err


def test_all_content_and_each_of_its_parts_are_the_same_model(trained):
    words = ("evaluate", "--weights", str(trained.best), "--data-path", "shop", *SMALL, "--output", "found.json")
    succeed(trained.folder, *words, "--has-v", "--has-a", "--has-t")
    assert strict_json(trained.folder / "found.json")["stages"]["test"]["table"] == trained.result["table"]


# The other verbs


def test_evaluating_a_run_gives_the_numbers_of_its_result(trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--output", "new/folder/found.json")
    found = strict_json(trained.folder / "new" / "folder" / "found.json")
    assert found["app"] == "clcrec"
    assert found["data"] == "shop"
    assert found["weights"] == str(trained.best)
    assert found["stages"]["test"]["table"] == trained.result["table"]
    for stage in ("valid", "test"):
        part, expected = found["stages"][stage], trained.result["metrics"][stage]
        assert part["protocol"] == expected["protocol"]
        assert part["protocol"] in out
        row = part["table"][0]
        assert row["model"] == "clcrec"
        assert {name: value for name, value in row.items() if name != "model"} == {
            name: expected[name] for name in row if name != "model"
        }


def test_the_masks_of_the_original_are_said_with_the_numbers(trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--mask-value", "legacy", "--output", "found.json")
    assert "as the original does: not comparable" in out
    part = strict_json(trained.folder / "found.json")["stages"]["test"]
    assert "not comparable" in part["protocol"]
    assert part["table"] != trained.result["table"]


def test_negatives_that_know_the_held_out_pairs_are_said_with_the_numbers(shop):
    out = succeed(shop, *TRAIN, "--max-steps", "1", "--neg-exclude", "all")
    run = run_folder(shop)
    (note,) = strict_json(shop / run / "result.json")["notes"]
    assert "--neg-exclude all" in note
    assert note in out
    assert note in succeed(shop, "evaluate", str(run))


def test_a_run_that_ended_before_its_first_validation_is_measured_with_its_last_weights(shop):
    succeed(shop, *TRAIN, "--max-steps", "2")
    run = run_folder(shop)
    assert not (shop / run / "checkpoints" / "best.safetensors").exists()
    succeed(shop, "evaluate", str(run), "--output", "found.json")
    found = strict_json(shop / "found.json")
    assert found["weights"] == str(run / "checkpoints" / "step-00000002.safetensors")
    assert found["stages"]["test"]["table"] == strict_json(shop / run / "result.json")["table"]


def scores_of(trained: Trained) -> torch.Tensor:
    """Every user's score of every item under the finished run's best weights, float64, by a loop over users."""
    data = trained.data
    state, _ = load_weights(trained.folder / trained.best)
    content = torch.cat([torch.nn.functional.normalize(data.content[m].double(), dim=1) for m in ("v", "a", "t")], 1)
    item = encoded({name: value.double() for name, value in state.items()}, content)
    item[:NUM_WARM] = state["item"]
    return torch.stack([item @ user for user in state["user"].double()])


def encoded(state: dict[str, torch.Tensor], content: torch.Tensor) -> torch.Tensor:
    hidden = content @ state["hidden.weight"].T + state["hidden.bias"]
    return torch.where(hidden > 0, hidden, 0.01 * hidden) @ state["output.weight"].T + state["output.bias"]


def best_first(values: dict[str, float], k: int) -> list[str]:
    return sorted(values, key=lambda name: -values[name])[:k]


def known_items(data: ColdStart) -> list[set[int]]:
    """Per user, the items of training, validation and test."""
    return [set(part.tolist()) for part in torch.split(data.known.item, data.known.ptr.diff().tolist())]


@pytest.mark.parametrize("group", [None, "all", "warm", "cold"])
def test_predictions_are_raw_ids_of_the_best_items_of_a_group_that_are_not_known(group, trained):
    k = 4
    words = () if group is None else ("--group", group)
    out = succeed(trained.folder, "predict", str(trained.run), "--k", str(k), "--output", "new/top.jsonl", *words)
    data, scores = trained.data, scores_of(trained)
    items = {"warm": range(NUM_WARM), "cold": range(NUM_WARM, NUM_WARM + NUM_COLD)}.get(
        group or "all", range(NUM_WARM + NUM_COLD)
    )
    found = json_lines(trained.folder / "new" / "top.jsonl")
    assert [record["user"] for record in found] == list(data.user_ids)
    for user, (record, known) in enumerate(zip(found, known_items(data), strict=True)):
        assert list(record) == ["user", "items", "scores"]
        values = {data.item_ids[item]: float(scores[user, item]) for item in items if item not in known}
        assert record["items"] == best_first(values, k)
        assert record["scores"] == pytest.approx([values[name] for name in record["items"]], abs=2e-6)
    assert "new/top.jsonl" in out
    assert "40 users" in out
    assert f"exact over {len(items)} items" in out


@pytest.mark.parametrize(("group", "size"), [("all", NUM_WARM + NUM_COLD), ("warm", NUM_WARM), ("cold", NUM_COLD)])
def test_known_items_are_kept_when_asked_and_k_may_exceed_the_catalogue(group, size, trained):
    words = ("--k", "99", "--keep-seen", "--group", group, "--output", "all.jsonl")
    succeed(trained.folder, "predict", str(trained.run), *words)
    ids = trained.data.item_ids
    expected = {"all": ids, "warm": ids[:NUM_WARM], "cold": ids[NUM_WARM:]}[group]
    assert len(expected) == size
    for record in json_lines(trained.folder / "all.jsonl"):
        assert sorted(record["items"]) == sorted(expected)


@pytest.mark.parametrize("group", ["cold", "warm", "all"])
@pytest.mark.parametrize("keep_seen", [False, True])
def test_users_are_found_for_items_of_the_data(group, keep_seen, trained):
    k = 5
    words = ("--users-for", group, "--k", str(k), "--output", "users.jsonl", *(["--keep-seen"] * keep_seen))
    out = succeed(trained.folder, "predict", str(trained.run), *words)
    data, scores, known = trained.data, scores_of(trained), known_items(trained.data)
    items = {"warm": range(NUM_WARM), "cold": range(NUM_WARM, NUM_WARM + NUM_COLD)}.get(
        group, range(NUM_WARM + NUM_COLD)
    )
    found = json_lines(trained.folder / "users.jsonl")
    assert [record["item"] for record in found] == [data.item_ids[item] for item in items]
    for item, record in zip(items, found, strict=True):
        assert list(record) == ["item", "users", "scores"]
        values = {
            data.user_ids[user]: float(scores[user, item])
            for user in range(NUM_USERS)
            if keep_seen or item not in known[user]
        }
        assert record["users"] == best_first(values, k)
        assert record["scores"] == pytest.approx([values[name] for name in record["users"]], abs=2e-6)
    assert f"{len(items)} items, exact over 40 users" in out


def test_users_are_found_for_new_items_given_only_their_content(trained):
    k, data = 5, trained.data
    folder = trained.folder / "arrivals"
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    rows = {m: torch.randn(3, data.content[m].shape[1], generator=draw) for m in ("v", "a", "t")}
    for modality, features in rows.items():
        torch.save(features, folder / f"feat_{modality}.pt")
    words = ("--new-items", "arrivals", "--k", str(k), "--output", "users.jsonl")
    out = succeed(trained.folder, "predict", str(trained.run), *words)
    state = {name: value.double() for name, value in load_weights(trained.folder / trained.best)[0].items()}
    vectors = encoded(
        state, torch.cat([torch.nn.functional.normalize(rows[m].double(), dim=1) for m in ("v", "a", "t")], 1)
    )
    found = json_lines(trained.folder / "users.jsonl")
    assert [record["item"] for record in found] == ["0", "1", "2"]
    for vector, record in zip(vectors, found, strict=True):
        values = dict(zip(data.user_ids, (state["user"] @ vector).tolist(), strict=True))
        assert record["users"] == best_first(values, k)
        assert record["scores"] == pytest.approx([values[name] for name in record["users"]], abs=2e-6)
    assert "3 items, exact over 40 users" in out


def test_items_of_the_data_given_as_new_ones_find_the_users_that_cold_items_find(trained):
    succeed(trained.folder, "predict", str(trained.run), "--users-for", "cold", "--keep-seen", "--output", "a.jsonl")
    folder = trained.folder / "arrivals"
    folder.mkdir()
    for modality, features in trained.data.content.items():
        torch.save(features[NUM_WARM:].clone(), folder / f"feat_{modality}.pt")
    succeed(trained.folder, "predict", str(trained.run), "--new-items", "arrivals", "--output", "b.jsonl")
    pairs = zip(json_lines(trained.folder / "a.jsonl"), json_lines(trained.folder / "b.jsonl"), strict=True)
    for cold, new in pairs:
        assert new["users"] == cold["users"]
        assert new["scores"] == pytest.approx(cold["scores"], abs=2e-6)


def test_a_prediction_that_fails_leaves_the_old_file_alone(trained, monkeypatch):
    def fails(*args: Any, **options: Any) -> Iterator[Any]:
        yield torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[0.5]])
        raise ValueError("in the middle")

    (trained.folder / "top.jsonl").write_text("old\n", encoding="utf-8")
    before = contents(trained.folder)
    monkeypatch.setattr(evaluation, "predict_items", fails)
    ended = invoke(trained.folder, "predict", str(trained.run), "--output", "top.jsonl")
    assert (ended.code, ended.err) == (2, "error: in the middle\n")
    assert contents(trained.folder) == before


def test_an_export_holds_the_vectors_whose_products_are_the_scores(trained):
    out = succeed(trained.folder, "export", "new/model.safetensors", "--run", str(trained.run))
    assert "40 users and 40 items in 8 dimensions" in out
    with safe_open(trained.folder / "new" / "model.safetensors", framework="pt") as file:  # as other programs read it
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert {name: (value.dtype, list(value.shape)) for name, value in tensors.items()} == {
        "user": (torch.float32, [40, 8]),
        "item": (torch.float32, [40, 8]),
        "hidden.weight": (torch.float32, [8, trained.data.content["v"].shape[1] + 16 + 24]),
        "hidden.bias": (torch.float32, [8]),
        "output.weight": (torch.float32, [8, 8]),
        "output.bias": (torch.float32, [8]),
    }
    found = tensors["user"].double() @ tensors["item"].double().T
    assert torch.allclose(found, scores_of(trained), atol=1e-5)
    meta = load_weights(trained.folder / "new" / "model.safetensors")[1]
    assert meta["user_ids"] == list(trained.data.user_ids)
    assert meta["item_ids"] == list(trained.data.item_ids)
    assert (meta["num_warm"], meta["content"]) == (NUM_WARM, ["v", "a", "t"])


def test_training_on_a_pack_gives_the_result_of_training_on_its_source(trained):
    out = succeed(trained.folder, "prepare", "shop", "packs/shop.safetensors")
    assert "train --data-path packs/shop.safetensors" in out
    assert f"40 users, 30 warm and 10 cold items, {trained.data.num_pairs} training pairs" in out
    words = [word.replace("shop", "packs/shop.safetensors") for word in TRAIN]
    succeed(trained.folder, *words, "--runs-dir", "packed/runs")
    run = trained.folder / "packed" / run_folder(trained.folder / "packed")
    result = strict_json(run / "result.json")
    for key in ("metrics", "table", "data", "steps", "best_epoch"):
        assert result[key] == trained.result[key]
    trees = [load_checkpoint(path / "checkpoints" / "best.safetensors") for path in (run, trained.folder / trained.run)]
    for name, weight in trees[0]["model"].items():
        assert torch.equal(weight, trees[1]["model"][name])


def write_ratings(folder: Path) -> None:
    """MovieLens' two files, small: ratings of films with a genre."""
    folder.mkdir()
    lines = [
        f"{user}::{film}::{1 + (user * film) % 5}::97830{user:02d}{film:02d}"
        for user in range(1, 13)
        for film in range(1, 21)
        if (user + film) % 3
    ]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    genres = ("Drama", "Comedy|Drama", "Horror", "Comedy")
    films = [f"{film}::Film {film} (1999)::{genres[film % 4]}" for film in range(1, 21)]
    (folder / "movies.dat").write_text("\n".join(films) + "\n", encoding="latin-1")


def test_ratings_are_split_prepared_and_trained_on(tmp_path):
    write_ratings(tmp_path / "ml")
    out = succeed(
        tmp_path, "prepare", "ml", "ml.safetensors", "--cold-share", "0.25", "--seed", "3", "--min-rating", "2"
    )
    assert "below 2 left out" in out
    data = read_data(tmp_path / "ml.safetensors")
    assert (data.num_items - data.num_warm) / data.num_items == pytest.approx(0.25, abs=0.05)
    words = ("--embed-dim", "8", "--hidden-dim", "8", "--word-dim", "4", "--num-negatives", "2", "--epochs", "1")
    said = succeed(tmp_path, "train", "--data-path", "ml.safetensors", *words)
    assert "content feat_t" in said
    run = run_folder(tmp_path)
    succeed(tmp_path, "predict", str(run), "--users-for", "cold", "--output", "users.jsonl")
    assert [record["item"] for record in json_lines(tmp_path / "users.jsonl")] == list(data.item_ids[data.num_warm :])
    succeed(tmp_path, "export", "model.safetensors", "--run", str(run))
    (tmp_path / "arrivals").mkdir()
    ended = invoke(tmp_path, "predict", str(run), "--new-items", "arrivals")
    assert ended.code == 2
    assert "feat_t as lists of words" in ended.err


def test_preparing_says_that_a_split_is_kept_and_packs_differ_by_their_seed(shop):
    assert "its split is kept" in succeed(shop, "prepare", "shop", "shop.safetensors", "--seed", "5")
    write_ratings(shop / "ml")
    for seed in ("1", "2"):
        succeed(shop, "prepare", "ml", f"{seed}.safetensors", "--seed", seed)
    assert read_data(shop / "1.safetensors").item_ids != read_data(shop / "2.safetensors").item_ids


def test_check_exits_with_2_on_an_error_only(shop):
    assert "shop: no fault found" in succeed(shop, "check", "shop")
    torch.save(torch.ones(NUM_WARM + NUM_COLD - 1, 4), shop / "shop" / "feat_v.pt")
    (shop / "shop" / "feat_v.npy").unlink()
    ended = invoke(shop, "check", "shop")
    assert ended.code == 2
    assert "feat_v.pt: error: " in ended.out
    assert "shop: cannot be read as it is" in ended.out
    (shop / "shop" / "feat_v.pt").unlink()
    (shop / "shop" / "val_full.npy").unlink()
    (shop / "shop" / "user_item_all_dict.npy").write_bytes((shop / "shop" / "user_item_train_dict.npy").read_bytes())
    said = succeed(shop, "check", "shop")
    assert "user_item_all_dict.npy: warning: " in said
    assert "can be read, with these warnings" in said


# What the user can repair


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --data-path absent", ["absent"]),
        ("train --data-path shop --batch-sise 3", ["--batch-sise", "--batch-size"]),
        ("trian --data-path shop", ["trian"]),
        ("train --data-path shop --config citeulkie", ["citeulkie", "did you mean citeulike"]),
        (
            "train --data-path shop --config broken.yaml",
            ["broken.yaml, line 3", "batch_sise", "did you mean batch_size"],
        ),
        ("train --data-path shop --num-sample 2", ["--num-sample", "2", "<= 1"]),
        ("train --data-path shop --epochs few", ["--epochs", "few", "an integer"]),
        ("train --data-path shop --negatives pol", ["--negatives", "pol", "did you mean pool"]),
        ("train --data-path shop --num-negatives 8 --select Recall@7", ["Recall@7", "all/Recall@10"]),
        ("train --data-path shop --num-negatives 29", ["29"]),
        ("train --data-path poor --num-negatives 8 --has-a", ["poor has no feat_a", "--has-a"]),
        ("train --data-path shop --device cuda:99", ["cuda:99"]),
        ("train --data-path shop --amp=maybe", ["--amp"]),
        ("train --data-path text.txt", ["text.txt"]),
        ("train --resume absent", ["absent is no run folder"]),
        ("train --resume folder", ["folder is no run folder"]),
        ("evaluate folder", ["folder is no run folder"]),
        ("evaluate --data-path shop", ["which model?"]),
        ("evaluate --weights absent.safetensors --data-path shop", ["absent.safetensors"]),
        ("evaluate --weights text.txt --data-path shop", ["text.txt", ".safetensors"]),
        ("predict --weights absent.pt --data-path shop", ["absent.pt"]),
        ("predict --group cool --weights absent.pt", ["--group is cool", "all, warm, cold"]),
        ("predict --users-for nobody --weights absent.pt", ["--users-for is nobody", "all, warm, cold"]),
        ("predict --users-for cold --new-items folder --weights absent.pt", ["--users-for", "--new-items"]),
        ("export out.safetensors", ["which model?"]),
        ("prepare absent pack.safetensors", ["absent"]),
        ("prepare shop pack.bin", ["pack.bin", ".safetensors"]),
        ("prepare shop pack.safetensors --min-rating 3", ["shop", "--min-rating"]),
        ("check absent", ["absent"]),
    ],
)
def test_a_mistake_is_named_with_exit_code_2_and_leaves_nothing_behind(words, expected, shop):
    (shop / "folder").mkdir()
    (shop / "broken.yaml").write_text("training:\n  lr: 0.1\n  batch_sise: 3\n", encoding="utf-8")
    (shop / "text.txt").write_text("1 1\n2 2\n", encoding="utf-8")
    shutil.copytree(shop / "shop", shop / "poor")
    (shop / "poor" / "feat_a.npy").unlink()
    before = sorted(shop.rglob("*"))
    ended = invoke(shop, *words.split())
    assert ended.code == 2
    said = ended.out if words.startswith("check") else ended.err
    for part in expected:
        assert part in said
    assert "Traceback" not in ended.out + ended.err
    assert sorted(shop.rglob("*")) == before


def test_new_items_that_do_not_fit_the_model_are_refused_and_nothing_is_written(trained):
    folder = trained.folder / "arrivals"
    folder.mkdir()
    before = contents(trained.folder)
    ended = invoke(trained.folder, "predict", str(trained.run), "--new-items", "arrivals")
    assert ended.code == 2
    assert "feat_v" in ended.err
    assert contents(trained.folder) == before
    for modality, features in trained.data.content.items():
        torch.save(torch.ones(2, features.shape[1] + (modality == "a")), folder / f"feat_{modality}.pt")
    before = contents(trained.folder)
    ended = invoke(trained.folder, "predict", str(trained.run), "--new-items", "arrivals")
    assert ended.code == 2
    width = trained.data.content["a"].shape[1]
    assert f"expected {width} columns" in ended.err
    assert f"found {width + 1} columns" in ended.err
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
        (["--config", "turbo"], ["--config", "exclude each other"]),
        (["--lr", "0.5"], ["config.training.lr: 0.01 in the checkpoint, 0.5 now"]),
        (["--hidden-dim", "16"], ["config.model.hidden_dim: 8 in the checkpoint, 16 now"]),
        (["--negatives", "pool"], ["config.training.negatives: 'device' in the checkpoint, 'pool' now"]),
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


def test_resuming_a_finished_run_changes_nothing_but_what_tells_of_the_command(trained):
    before, result = contents(trained.folder / trained.run), trained.result
    out = succeed(trained.folder, "train", "--resume", str(trained.run))
    after = contents(trained.folder / trained.run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"train.log", "result.json", "report.html"}
    again = trained.result
    assert again.pop("command") == f"python -m apps.clcrec train --resume {trained.run}"
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


def test_a_pool_of_negatives_is_announced_with_its_memory(shop):
    out = succeed(shop, *TRAIN, "--negatives", "pool", "--resample-epochs", "1", "--num-negatives", "7")
    pairs = read_data(shop / "shop").num_pairs
    lines = [line for line in out.splitlines() if line.startswith("pool of negatives")]
    assert len(lines) == 2  # one for each epoch
    for line in lines:
        assert f"{pairs:,} x 7 x " in line


def test_running_out_of_memory_ends_with_exit_code_1_and_what_to_try(shop, monkeypatch):
    def fails(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("apps.clcrec.train.amp_step", fails)
    ended = invoke(shop, *TRAIN)
    assert ended.code == 1
    for words in ("no memory left", "--batch-size 256 or 128", "--num-negatives 64"):
        assert words in ended.out
    assert "Traceback" not in ended.err


def test_a_diverging_run_ends_with_exit_code_1_and_names_the_step(shop):
    words = ("--lr", "1e30", "--clip-norm", "0", "--log-every", "1")
    ended = invoke(shop, *(*TRAIN[:-2], *words))
    assert ended.code == 1
    run = shop / run_folder(shop)
    (warning,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert "not a number since step " in warning
    assert "no checkpoint had been written yet" in warning
    assert warning in (run / "train.log").read_text(encoding="utf-8")
    assert "--clip-norm 1" in ended.out
    assert "Traceback" not in ended.err
    assert not (run / "result.json").exists()


def resume_words(out: str) -> list[str]:
    """The command line that a stopped run printed."""
    (line,) = [line for line in out.splitlines() if "resume with: python -m apps.clcrec " in line]
    return shlex.split(line.partition("python -m apps.clcrec ")[2])


@pytest.mark.parametrize("negatives", ["device", "pool", "shared"])
def test_an_interrupt_ends_with_130_and_the_printed_command_ends_the_run_as_if_it_had_not_been(
    negatives, shop, monkeypatch
):
    folder, steps = shop / "a folder", 0
    folder.mkdir()
    shutil.copytree(shop / "shop", folder / "shop")
    words: tuple[str, ...] = (*TRAIN, "--negatives", negatives)
    succeed(shop, *words)
    expected = shop / run_folder(shop)
    last = steps_per_epoch(read_data(shop / "shop")) + 2  # in the second epoch, for which nothing is drawn in a pool
    advance = progress.Bar.advance

    def interrupting(self: progress.Bar, n: int = 1) -> None:
        nonlocal steps
        steps += n
        advance(self, n)
        if steps == last and n:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bar, "advance", interrupting)
    ended = invoke(folder, *words, "--runs-dir", str(folder / "runs"))
    assert ended.code == 130
    assert f"stopped at step {last}" in ended.out
    run = folder / run_folder(folder)
    words = tuple(resume_words(ended.out))
    assert words == ("train", "--resume", str(run))
    assert not (run / "result.json").exists()
    succeed(folder, *words)
    assert strict_json(run / "result.json")["metrics"] == strict_json(expected / "result.json")["metrics"]
    best, *_, newest = sorted((expected / "checkpoints").iterdir())
    for path in (best, newest):
        weights, found = (load_weights(folder / "checkpoints" / path.name)[0] for folder in (expected, run))
        assert all(torch.equal(weight, found[name]) for name, weight in weights.items())


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM to a process")
def test_a_terminated_process_saves_and_ends_with_143_and_the_command_to_resume(shop):
    words = ["-m", "apps.clcrec", *TRAIN, "--epochs", "100000", "--log-every", "1", "--eval-every", "100000"]
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
        while not any(path.stat().st_size for path in shop.glob("runs/clcrec/*/metrics.jsonl")):
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


# Demo data


def test_demo_data_is_said_to_be_demo_data_wherever_a_number_is(tmp_path, monkeypatch):
    made = demo_data(num_users=NUM_USERS, num_warm=NUM_WARM, num_cold=NUM_COLD)
    monkeypatch.setattr(demo, "demo_data", lambda: made)
    out = succeed(tmp_path, "train", *SMALL, "--epochs", "1")
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
    assert "demo data" in succeed(tmp_path, "predict", str(run), "--users-for", "cold")
    assert "demo data" in succeed(tmp_path, "export", "model.safetensors", "--run", str(run))


def test_real_data_is_never_called_demo_data(trained):
    said = trained.out + succeed(trained.folder, "evaluate", str(trained.run))
    said += succeed(trained.folder, "predict", str(trained.run))
    said += "".join(
        (trained.folder / trained.run / name).read_text(encoding="utf-8") for name in ("train.log", "report.html")
    )
    assert "demo" not in said


# Consoles


def test_a_console_that_lacks_characters_gets_question_marks(tmp_path):
    name = "\u96fb\u5f71"
    write_shop(tmp_path / name)
    words = ["-m", "apps.clcrec", *TRAIN, "--data-path", name, "--max-steps", "3"]
    found = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=process_environment(PYTHONIOENCODING="cp1252", PYTHONUTF8="0"),
        capture_output=True,
        check=False,
    )
    out = found.stdout.decode("cp1252")
    assert found.returncode == 0, found.stderr
    assert "??: 40 users" in out
    assert "popularity" in out
    assert "Traceback" not in found.stderr.decode("cp1252")
    log = (tmp_path / run_folder(tmp_path) / "train.log").read_text(encoding="utf-8")
    assert f"{name}: 40 users" in log
