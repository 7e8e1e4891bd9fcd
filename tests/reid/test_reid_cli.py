"""The command line as a user meets it: what it writes, what it says, and how it ends."""

import base64
import contextlib
import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from apps.reid import demo, main
from apps.reid.config import ALIASES, Config
from apps.reid.dataset import QUERY_LISTS, RGB, TEXT, People
from apps.reid.formats import read_data
from apps.reid.images import png_bytes
from apps.reid.loaders import WINDOWS_LINE
from shared import cli, progress
from shared.checkpoint import load_checkpoint, load_weights
from shared.config import Resolved, knobs, resolve
from shared.log import read_metrics

ROOT = Path(__file__).parents[2]
NUM_TRAIN, NUM_TEST = 6, 3
IMAGES = 27  # of a person
SIZE = ("--height", "32", "--width", "16")
MODEL = tuple(
    shlex.split(
        "--patch 16 --embed-dim 16 --tower-width 16 --tower-layers 1 --tower-heads 2 --text-width 16 --text-layers 1 "
        "--text-heads 2 --rank 2 --fusion-heads 2"
    )
)
BATCH = shlex.split("--val-share 0.4 --identities-per-batch 3 --num-instances 2 --epoch-length 2 --pad 1")
SMALL = (*MODEL, *BATCH)
QUICK = shlex.split("--epochs 2 --warmup-steps 1 --eval-every 1 --log-every 1 --norm-every 2 --precision fp32")
TRAIN = ("train", "--data-path", "people.safetensors", *SMALL, *QUICK)
STEPS = 2  # of an epoch


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def invoke(folder: Path, *words: str, encoding: str = "utf-8", **environment: str) -> Ended:
    """Run the command line in this process, in `folder`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n") for _ in range(2))
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, {"COLUMNS": "300", **environment}),
        mock.patch.object(sys, "argv", ["apps/reid/__main__.py", *words]),
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


def succeed(folder: Path, *words: str, **environment: str) -> str:
    """Run a command that has to end well; what it said."""
    ended = invoke(folder, *words, **environment)
    assert ended.code == 0, ended
    assert ended.err == ""
    return ended.out


def run_folder(folder: Path) -> Path:
    """The only run folder below `folder`, as a path to be used there."""
    (config,) = folder.glob("runs/reid/*/config.yaml")
    return config.parent.relative_to(folder)


def strict_json(path: Path) -> Any:
    """The content of a JSON file that holds no NaN or Infinity."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def configuration(run_dir: Path) -> Config:
    """The configuration that a run folder says it was started with."""
    found: Resolved[Config] = resolve(Config, yaml_path=run_dir / "config.yaml")
    return found.config


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Trained(NamedTuple):
    """A folder with data and one finished run."""

    folder: Path
    run: Path  # relative to the folder
    out: str

    @property
    def result(self) -> Any:
        return strict_json(self.folder / self.run / "result.json")

    @property
    def people(self) -> People:
        return read_data(self.folder / "people.safetensors", val_share=0.4)

    @property
    def best(self) -> Path:
        return self.run / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People in ORBench's folders, of the demo's generator under a name of their own, which nobody may change."""
    folder = tmp_path_factory.mktemp("source") / "crowd"
    with mock.patch.multiple(demo, NUM_TRAIN=NUM_TRAIN, NUM_TEST=NUM_TEST):
        return demo.write_demo(folder)


@pytest.fixture(scope="module")
def pack(tree: Path) -> Path:
    """The same as a pack that `prepare` made."""
    succeed(tree.parent, "prepare", "crowd", "people.safetensors", *SIZE)
    return tree.with_name("people.safetensors")


def copy_pack(pack: Path, folder: Path) -> None:
    for path in (pack, pack.with_name("people.images.safetensors")):
        shutil.copy(path, folder)


@pytest.fixture(scope="module")
def finished(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run that nobody may change."""
    folder = tmp_path_factory.mktemp("finished")
    copy_pack(pack, folder)
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
def crowd(pack: Path, tmp_path: Path) -> Path:
    """A folder with a pack of people and nothing else."""
    copy_pack(pack, tmp_path)
    return tmp_path


@pytest.fixture
def few_demo_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NUM_TRAIN", 5)
    monkeypatch.setattr(demo, "NUM_TEST", 2)


def write_market(root: Path) -> Path:
    """Four people to train on and two to find, RGB images alone."""
    names = [
        *(f"bounding_box_train/{person:04d}_c{i % 2 + 1}s1_{i}.png" for person in (2, 3, 4, 6) for i in range(4)),
        *(f"query/{person:04d}_c1s1_1.png" for person in (1, 5)),
        *(f"bounding_box_test/{person:04d}_c{camera}s1_1.png" for person in (1, 5) for camera in (2, 3)),
    ]
    generator = torch.Generator().manual_seed(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png_bytes(torch.randint(256, (3, 32, 16), dtype=torch.uint8, generator=generator)))
    return root


# Help and presets


def test_help_loads_neither_torch_nor_anything_that_does(tmp_path):
    code = """
import sys
from apps.reid import main
try:
    main.app(["train", "--help"])
except SystemExit as end:
    print("code", end.code)
print("loaded", *sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "safetensors"}))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert "--epoch-length" in found.stdout
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


@pytest.mark.parametrize("preset", sorted(path.stem for path in main.PRESETS.glob("*.yaml")))
def test_every_preset_trains(preset, pack, tmp_path):
    copy_pack(pack, tmp_path)
    data: tuple[str, ...] = ("people.safetensors",)
    if preset == "market":
        data = (write_market(tmp_path / "market").name, "--val-share", "0")
    short = ("--epochs", "1", "--warmup-steps", "0", "--max-steps", "1", *SIZE)
    succeed(tmp_path, "train", "--config", preset, *SMALL, *short, "--data-path", *data)
    text = (tmp_path / run_folder(tmp_path) / "config.yaml").read_text(encoding="utf-8")
    assert f"  # preset {preset}.yaml\n" in text


# What training leaves behind


def test_a_run_folder_holds_what_was_promised(finished):
    run = finished.folder / finished.run
    steps = {f"checkpoints/step-{step:08d}.safetensors" for step in (STEPS, 2 * STEPS)}
    assert {path.relative_to(run).as_posix() for path in run.rglob("*")} == steps | {
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
        "embed_dim: 16  # flag --embed-dim",
        'data_path: "people.safetensors"  # flag --data-path',
        f"lr: {Config().training.lr}  # default",
    ):
        assert f"  {line}\n" in text
    config = configuration(finished.folder / finished.run)
    assert (config.model.rank, config.training.num_instances, config.training.epochs) == (2, 2, 2)


def test_a_preset_is_named_as_the_source_and_overridden_by_flags(crowd):
    words = (*SMALL, "--epochs", "1", "--max-steps", "1", "--warmup-steps", "0")
    succeed(crowd, "train", "--data-path", "people.safetensors", "--config", "notes", *words)
    text = (crowd / run_folder(crowd) / "config.yaml").read_text(encoding="utf-8")
    assert "  identities_per_batch: 3  # flag --identities-per-batch\n" in text
    preset: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / "notes.yaml")
    assert f"  sdm_weight: {preset.config.training.sdm_weight}  # preset notes.yaml\n" in text


def test_the_log_and_the_metrics_tell_the_run(finished):
    log = (finished.folder / finished.run / "train.log").read_text(encoding="utf-8")
    people = finished.people
    captions = len(people.captions)
    for words in (
        "crowd: 9 people (4 to train on, 2 to validate on), 90 rgb, 45 nir, 54 cp, 54 sk images seen in 32 x 16, "
        f"{captions} captions; 2 of 6 training identities drawn to validate on (seed 42); ",
        f"; {STEPS} steps per epoch on ",
        "loader: workers=0, prefetch=0: batches are made when they are asked for",
        "epoch 1: validation MM/mAP ",
        "100.0% of the identities pairable",
        "epoch 2:",
        str(finished.run),
    ):
        assert words in log
        assert words in finished.out
    expected = [
        *(("train", 1, 0), ("train", 2, 0), ("norm", 2, 0), ("valid", 2, 0)),
        *(("train", 3, 1), ("train", 4, 1), ("norm", 4, 1), ("valid", 4, 1)),
    ]
    records = read_metrics(finished.folder / finished.run / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["epoch"]) for line in records] == expected


def test_the_result_holds_every_metric_with_its_protocol_and_where_it_came_from(finished):
    result = finished.result
    for stage, images in (("valid", 20), ("test", 30)):
        metrics = result["metrics"][stage]
        assert metrics["protocol"].startswith(f"{stage} people, cosine, full ranking of {images} RGB images")
        for name in ("MM", "MM-1", "MM-2", "MM-3", "MM-4", *QUERY_LISTS):
            for figure in ("mAP", "R1", "R5", "R10", "mINP"):
                assert 0 <= metrics[f"{name}/{figure}"] <= 1
        modes = [metrics[f"MM-{count}/mAP"] for count in (1, 2, 3, 4)]
        assert metrics["MM/mAP"] == pytest.approx(sum(modes) / 4)
    assert result["protocol"] == result["metrics"]["test"]["protocol"]
    assert [row["model"] for row in result["table"]] == ["reid", "pixels", "chance"]
    for row in result["table"]:
        assert list(row) == result["table_columns"]
    assert result["table"][0]["MM-2/mAP"] == result["metrics"]["test"]["MM-2/mAP"]
    assert result["speed"]["samples/s"] > 0
    assert "evaluation and saving are not in it" in result["speed_measured"]
    assert {"cpu", "cores", "os"} <= set(result["machine"])
    assert result["versions"] == {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    people = finished.people
    data = result["data"]
    assert (data["name"], data["identities to train on"], data["samples"]) == ("crowd", 4, 40)
    assert (data["images"], data["captions"]) == (IMAGES * (NUM_TRAIN + NUM_TEST), len(people.captions))
    assert (data["modalities"], data["fingerprint"]) == (["rgb", "nir", "cp", "sk", "text"], people.fingerprint)
    assert result["git"] is None or isinstance(result["git"], str)
    assert result["command"] == shlex.join(["python", "-m", "apps.reid", *TRAIN, "--name", "first"])
    assert (result["steps"], result["notes"]) == (2 * STEPS, [])


def test_the_console_and_the_report_show_the_table_with_its_protocol(finished):
    report = (finished.folder / finished.run / "report.html").read_text(encoding="utf-8")
    protocol = finished.result["protocol"]
    said, _, table = finished.out.rpartition(protocol)
    assert said
    assert protocol in report
    for mean in ("MM", "MM-1", "MM-2", "MM-3", "MM-4"):
        assert mean in table
        assert f"{finished.result['metrics']['test'][f'{mean}/mAP']:.4f}" in table
    for name in ("reid", "pixels", "chance"):
        assert name in table
        assert name in report
    assert f"open {finished.run / 'report.html'}" in finished.out


def test_the_tables_fit_a_terminal(trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--rerank", COLUMNS="80")
    assert "reid re-ranked" in out
    assert "\u2026" not in out  # what stands for letters that were cut off
    assert trained.result["protocol"] in out.splitlines()  # which a terminal folds


def test_a_single_list_of_rgb_queries_is_a_table_of_its_mean_and_needs_no_other_modality(tmp_path):
    write_market(tmp_path / "market")
    words = ("--val-share", "0", "--identities-per-batch", "2", "--modalities", "rgb", *SIZE)
    out = succeed(tmp_path, *TRAIN, "--data-path", "market", *words)
    run = run_folder(tmp_path)
    result = strict_json(tmp_path / run / "result.json")
    assert list(result["metrics"]) == ["test"]
    assert result["metrics"]["test"]["MM/mAP"] == result["metrics"]["test"]["RGB/mAP"]
    assert "images of the query's person and camera do not count" in out
    assert "images are decoded whenever they are needed" in out
    assert f"prepare market people.safetensors {shlex.join(SIZE)}" in out
    assert "nobody is held out to validate on" in out
    table = out.rpartition(result["protocol"])[2]
    assert "MM" in table
    assert "MM-1" not in table
    out = succeed(tmp_path, "evaluate", str(run))
    assert "market has nobody for valid" in out
    assert result["protocol"] in out


# The original scripts' spellings


@pytest.mark.parametrize("verb", [["train"], []])
def test_the_original_spellings_mean_the_same(verb, crowd):
    words = "--data_dir people.safetensors --num_epochs 2 --accumulation_steps 2 --windows=True --prefetch_factor 3"
    out = succeed(crowd, *verb, *words.split(), *SMALL, "--warmup_steps", "1", "--learning_rate=0.001")
    training = configuration(crowd / run_folder(crowd)).training
    assert (training.epochs, training.accumulate, training.lr) == (2, 2, 1e-3)
    assert (training.windows, training.prefetch) == (True, 3)
    assert strict_json(crowd / run_folder(crowd) / "result.json")["steps"] == 2  # of two batches each
    assert "warning" not in out


def test_windows_prints_the_line_of_the_notes_and_what_it_comes_to(crowd):
    out = succeed(crowd, *TRAIN, "--windows", "--max-steps", "1")
    lines = out.splitlines()
    assert WINDOWS_LINE in lines
    (line,) = [line for line in lines if line.startswith("loader: ")]
    assert "--windows" in line


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
    flags = (*MODEL, "--val_share", "0.4") if kind.endswith("pt") else ()  # our own files say it themselves
    words = ("evaluate", "--weights", name, "--data_path", "people.safetensors", *flags)
    out = succeed(trained.folder, *words, "--output", "found.json")
    found = strict_json(trained.folder / "found.json")
    assert found["stages"]["test"]["table"] == trained.result["table"]
    for stage in ("valid", "test"):
        assert found["stages"][stage]["protocol"] == trained.result["metrics"][stage]["protocol"]
    assert found["weights"] == name
    assert trained.result["protocol"] in out


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_weights_find_people_that_they_were_not_trained_on(kind, trained):
    write_market(trained.folder / "market")  # of another number of people
    words = ("evaluate", "--weights", weights_file(trained, kind), "--data-path", "market", *SIZE)
    succeed(trained.folder, *words, "--val-share", "0", "--output", "found.json")
    found = strict_json(trained.folder / "found.json")
    assert (found["data"], list(found["stages"])) == ("market", ["test"])
    metrics = found["stages"]["test"]["metrics"]
    assert metrics["MM/mAP"] == metrics["RGB/mAP"]
    assert 0 < metrics["RGB/mINP"] <= 1


def test_other_people_are_searched_for_by_the_modalities_of_the_training_alone(crowd):
    succeed(crowd, *TRAIN, "--max-steps", "2", "--modalities", "rgb,nir,text", "--subsets", "single")
    (weights,) = crowd.glob("runs/reid/*/checkpoints/step-*")
    words = ("evaluate", "--weights", str(weights), "--data-path", "people.safetensors", "--output", "found.json")
    for more, lists in (((), {"NIR", "TEXT", "NIR+TEXT", "TEXT+NIR"}), (("--modalities", "rgb,nir"), {"NIR"})):
        succeed(crowd, *words, "--val-share", "0.2", *more)
        metrics = strict_json(crowd / "found.json")["stages"]["test"]["metrics"]
        assert {name.partition("/")[0] for name in metrics} & set(QUERY_LISTS) == lists


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_people_seen_in_another_size_are_refused_with_the_flags_to_give(kind, trained):
    write_market(trained.folder / "market")
    ended = invoke(trained.folder, "evaluate", "--weights", weights_file(trained, kind), "--data-path", "market")
    assert ended.code == 2
    assert "images of 32 x 16, and those of market are seen in 256 x 128; use --height 32 --width 16" in ended.err


def test_foreign_weights_that_do_not_fit_are_refused_with_the_tensors_names(trained):
    name = weights_file(trained, "pt")
    words = ("evaluate", "--weights", name, "--data-path", "people.safetensors", *MODEL)
    ended = invoke(trained.folder, *words, "--rank", "3")
    assert ended.code == 2
    assert f"error: {name} does not fit the model: " in ended.err
    assert re.search(r"\.up is \[.*\], expected \[.*\]", ended.err)
    state = torch.load(trained.folder / name, weights_only=True)
    state["mlp.weight"] = state.pop("null")
    torch.save(state, trained.folder / name)
    ended = invoke(trained.folder, *words)
    assert ended.code == 2
    assert "null is missing; mlp.weight is not part of this model" in ended.err


def test_weights_of_another_app_are_refused(trained):
    from shared.checkpoint import save_weights

    state, _ = load_weights(trained.folder / trained.best)
    save_weights(trained.folder / "other.safetensors", state, {"app": "clcrec", "config": {}})
    words = ("--weights", "other.safetensors", "--data-path", "people.safetensors", *MODEL)
    ended = invoke(trained.folder, "evaluate", *words)
    assert ended.code == 2
    assert "app: 'clcrec' in the checkpoint, 'reid' now" in ended.err


# The other verbs


def test_evaluating_a_run_gives_the_numbers_of_its_result(trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--output", "new/folder/found.json")
    found = strict_json(trained.folder / "new" / "folder" / "found.json")
    assert (found["app"], found["data"], found["weights"]) == ("reid", "crowd", str(trained.best))
    assert found["stages"]["test"]["table"] == trained.result["table"]
    for stage in ("valid", "test"):
        part, expected = found["stages"][stage], trained.result["metrics"][stage]
        assert {"protocol": part["protocol"], **part["metrics"]} == expected
        shown, found_it, out = out.partition(part["protocol"])  # the lists stand before it
        assert found_it
        for name in QUERY_LISTS:
            (line,) = [line for line in shown.splitlines() if f" {name} " in line]
            for figure in ("mAP", "R1", "mINP"):
                assert f" {expected[f'{name}/{figure}']:.4f} " in line


def test_re_ranked_figures_stand_beside_the_others(trained):
    succeed(trained.folder, "evaluate", str(trained.run), "--rerank", "--output", "found.json")
    part = strict_json(trained.folder / "found.json")["stages"]["test"]
    assert [row["model"] for row in part["table"]] == ["reid", "reid re-ranked", "pixels", "chance"]
    assert part["metrics"]["MM/mAP"] == trained.result["metrics"]["test"]["MM/mAP"]
    assert 0 < part["metrics"]["NIR+SK re-ranked/mAP"] <= 1


def test_kept_features_are_used_again_and_change_nothing(trained, monkeypatch):
    expected = trained.result["table"]
    words = ("evaluate", str(trained.run), "--modalities", "rgb,nir", "--cache", "features", "--output", "found.json")
    succeed(trained.folder, *words)
    first = strict_json(trained.folder / "found.json")
    assert list((trained.folder / "features").iterdir())
    monkeypatch.setattr("apps.reid.evaluate.encode_images", lambda *args: pytest.fail("encoded again"))
    succeed(trained.folder, *words)
    assert strict_json(trained.folder / "found.json") == first
    assert trained.result["table"] == expected


def test_a_run_that_ended_before_its_first_validation_is_measured_with_its_last_weights(crowd):
    succeed(crowd, *TRAIN, "--max-steps", "1")
    run = run_folder(crowd)
    assert not (crowd / run / "checkpoints" / "best.safetensors").exists()
    succeed(crowd, "evaluate", str(run), "--output", "found.json")
    found = strict_json(crowd / "found.json")
    assert found["weights"] == str(run / "checkpoints" / "step-00000001.safetensors")
    assert found["stages"]["test"]["table"] == strict_json(crowd / run / "result.json")["table"]


class Features(NamedTuple):
    """What `export` wrote of the finished run."""

    state: dict[str, torch.Tensor]
    meta: dict[str, Any]


@pytest.fixture(scope="module")
def exported(finished: Trained, tmp_path_factory: pytest.TempPathFactory) -> Features:
    path = tmp_path_factory.mktemp("exported") / "features.safetensors"
    out = succeed(finished.folder, "export", str(path), "--run", str(finished.run))
    images, captions = IMAGES * (NUM_TRAIN + NUM_TEST), len(finished.people.captions)
    assert f"{path}: {images:,} images and {captions:,} captions in 16 dimensions" in out
    return Features(*load_weights(path))


def test_an_export_holds_the_model_and_unit_features_with_paths_and_identities(finished, exported):
    people, meta = finished.people, exported.meta
    state, _ = load_weights(finished.folder / finished.best)
    assert all(torch.equal(exported.state[name], value) for name, value in state.items())
    for name, length in (("image", people.num_images), ("caption", len(people.captions))):
        assert exported.state[name].shape == (length, 16)
        assert torch.allclose(exported.state[name].norm(dim=1), torch.ones(length), atol=1e-5)
    assert set(exported.state) == {*state, "image", "caption"}
    assert (meta["app"], meta["config"]["model"]["embed_dim"]) == ("reid", 16)
    assert (meta["paths"], meta["captions"]) == (list(people.path), list(people.captions))
    assert meta["identity_ids"] == list(people.identity_ids)
    assert meta["identity_of_image"] == people.identity.tolist()
    assert meta["modality_of_image"] == people.modality.tolist()
    assert meta["modalities"] == ["rgb", "nir", "cp", "sk", "text"]


@pytest.mark.parametrize("name", [None, "nir", "TEXT"])
def test_rankings_are_those_of_the_exported_features(name, finished, exported, tmp_path):
    k, words = 4, () if name is None else ("--list", name)
    output = tmp_path / "new" / "top.csv"
    out = succeed(finished.folder, "predict", str(finished.run), "--k", str(k), "--output", str(output), *words)
    people, found = finished.people, table_rows(output)
    assert people.test is not None
    shown = "NIR" if name is None else name.upper()
    queries, gallery = people.test.queries[shown], people.test.gallery.tolist()
    assert f"{output}: the best {k} gallery images of {len(queries.item)} {shown} queries, from {finished.best}" in out
    image_NE, caption_CE = exported.state["image"].double(), exported.state["caption"].double()
    assert len(found) == len(queries.item) * k
    for number, (item,) in enumerate(queries.item.tolist()):
        is_text = queries.modalities == (TEXT,)
        query_E = caption_CE[item] if is_text else image_NE[item]
        scores = {row: float(query_E @ image_NE[row]) for row in gallery}
        best = sorted(gallery, key=lambda row: -scores[row])[:k]
        lines = found[number * k : (number + 1) * k]
        assert [line["gallery"] for line in lines] == [people.path[row] for row in best]
        assert [float(line["score"]) for line in lines] == pytest.approx([scores[row] for row in best], abs=2e-6)
        assert {line["query"] for line in lines} == {people.captions[item] if is_text else people.path[item]}
        right = [bool(people.identity[row] == queries.identity[number]) for row in best]
        assert [line["right"] for line in lines] == ["right" if is_right else "wrong" for is_right in right]
        assert [(line["number"], line["rank"]) for line in lines] == [(str(number + 1), str(r + 1)) for r in range(k)]


def test_a_sheet_shows_queries_with_what_was_found_and_loads_nothing(finished, tmp_path):
    sheet, output = tmp_path / "new" / "sheet.html", tmp_path / "all.csv"
    words = ("--list", "SK+TEXT", "--stage", "valid", "--queries", "5", "--k", "3", "--output", str(output))
    out = succeed(finished.folder, "predict", str(finished.run), *words, "--sheet", str(sheet), "--wrong-first")
    assert f"{sheet}: 5 queries to look at" in out
    page, found = sheet.read_text(encoding="utf-8"), table_rows(output)
    assert "SK+TEXT, valid people of crowd" in page
    assert f"weights: {finished.best}" in page
    assert page.count("<section>") == 5
    assert page.count("<blockquote>") == 5
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 5 * (1 + 3)
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?:|<script|<link", page)
    firsts = [line["right"] for line in found if line["rank"] == "1"]
    assert page.count('alt="rank 1, wrong"') == min(5, firsts.count("wrong"))


@pytest.mark.parametrize("flag", ["--cache", "--rerank"])
def test_rankings_of_several_modalities_are_the_same_from_a_cache_and_differ_re_ranked(flag, finished, tmp_path):
    def ranked(name: str, *words: str) -> list[dict[str, str]]:
        output = tmp_path / name
        succeed(finished.folder, "predict", str(finished.run), "--list", "CP+NIR", "--output", str(output), *words)
        return table_rows(output)

    plain = ranked("plain.csv")
    other = ranked("other.csv", flag, *([str(tmp_path / "features")] if flag == "--cache" else []))
    if flag == "--cache":
        assert [line["gallery"] for line in other] == [line["gallery"] for line in plain]
    else:
        assert [line["score"] for line in other] != [line["score"] for line in plain]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--list NIR+RADAR", ["--list is NIR+RADAR", "NIR+SK"]),
        ("--list SK --modalities rgb,nir", ["--list is SK", "test: NIR"]),
        ("--stage final", ["--stage is final", "valid and test"]),
        ("--stage valid --data-path market --val-share 0 --height 32 --width 16", ["--stage is valid", "has test"]),
        ("--sheet sheet.pdf", ["sheet.pdf", ".html"]),
        ("--output market", ["market is a folder"]),
    ],
)
def test_what_cannot_be_ranked_is_refused_and_nothing_is_written(words, expected, trained):
    write_market(trained.folder / "market")
    before = contents(trained.folder)
    ended = invoke(trained.folder, "predict", str(trained.run), *words.split())
    assert ended.code == 2
    for part in expected:
        assert part in ended.err
    assert contents(trained.folder) == before


def test_preparing_says_how_much_it_writes_and_what_to_do_then_and_shows_how_far_it_is(tree, tmp_path, monkeypatch):
    shown: list[tuple[int, int]] = []
    reach = progress.Bar.reach

    def noting(self: progress.Bar, done: int) -> None:
        reach(self, done)
        shown.append((self.done, self.total))

    monkeypatch.setattr(progress.Bar, "reach", noting)
    out = succeed(tmp_path, "prepare", str(tree), "a pack.safetensors", *SIZE, "--workers", "1")
    images = IMAGES * (NUM_TRAIN + NUM_TEST)
    assert f"{images} images of " in out
    assert out.splitlines()[-1].startswith(f"a pack.safetensors: {images} images of 9 people, ")
    assert out.splitlines()[-1].endswith("python -m apps.reid train --data-path 'a pack.safetensors'")
    assert (shown[0], shown[-1]) == ((0, images), (images, images))
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)


def test_an_interrupted_preparation_ends_with_130_and_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    reach, stops = progress.Bar.reach, 1

    def interrupting(self: progress.Bar, done: int) -> None:
        nonlocal stops
        reach(self, done)
        if done and stops:
            stops -= 1
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bar, "reach", interrupting)
    ended = invoke(tmp_path, "prepare", str(tree), "pack.safetensors", *SIZE, "--workers", "1")
    assert ended.code == 130
    assert not (tmp_path / "pack.safetensors").exists()
    assert "64 images were decoded before" in succeed(tmp_path, "prepare", str(tree), "pack.safetensors", *SIZE)
    assert read_data(tmp_path / "pack.safetensors").num_images == IMAGES * (NUM_TRAIN + NUM_TEST)


def test_check_exits_with_2_on_an_error_only(tmp_path):
    root = write_market(tmp_path / "market")
    assert "market: no fault found" in succeed(tmp_path, "check", "market", "--format", "market")
    (root / "query" / "0009_c1s1_1.png").write_bytes(next(root.glob("query/*.png")).read_bytes())
    said = succeed(tmp_path, "check", "market")
    assert ": warning: " in said
    assert "market: can be read, with these warnings" in said
    broken = root / "bounding_box_train" / "0002_c1s1_0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    ended = invoke(tmp_path, "check", "market")
    assert ended.code == 2
    assert f"{broken.name}: error: " in ended.out
    assert "market: cannot be read as it is" in ended.out


# What the user can repair


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --data-path absent", ["absent"]),
        ("train --data-path P --batch-sise 3", ["--batch-sise"]),
        ("trian --data-path P", ["trian"]),
        ("train --data-path P --config markt", ["markt", "did you mean market"]),
        ("train --data-path P --config broken.yaml", ["broken.yaml, line 3", "temprature", "did you mean temperature"]),
        ("train --data-path P --subsets some", ["--subsets", "some", "single"]),
        ("train --data-path P --epochs few", ["--epochs", "few", "an integer"]),
        ("train --data-path P --modalities rgb,radar", ["--modalities", "radar", "sk"]),
        ("train --data-path P --modalities nir,text", ["--modalities", "rgb among them"]),
        ("train --data-path P --epoch-length long", ["--epoch-length", "long", "identities"]),
        ("train --data-path P --epoch-length 0", ["--epoch-length"]),
        ("train --data-path P --height 64", ["--height", "32 x 16"]),
        ("train --data-path P --patch 12", ["32 x 16", "12 x 12", "--patch"]),
        ("train --data-path market --val-share 0 --height 40 --width 16", ["40 x 16", "16 x 16", "--height"]),
        ("train --data-path P --tower-heads 3", ["width 16", "3 heads"]),
        ("train --data-path P --max-tokens 2", ["max_tokens", "3"]),
        ("train --data-path P --identities-per-batch 9", ["9", "identities"]),
        ("train --data-path P --vocab absent.txt.gz", ["absent.txt.gz"]),
        ("train --data-path P --vocab text.txt", ["text.txt"]),
        ("train --data-path P --init absent.safetensors", ["absent.safetensors"]),
        ("train --data-path P --init P", ["people.safetensors"]),
        ("train --data-path P --select MM/R7", ["--select", "MM/R7", "R10"]),
        ("train --data-path P --warmup-steps 99999", ["warmup_steps", "99999"]),
        ("train --data-path market --val-share 0.99", ["at least 2 identities"]),
        ("train --data-path P --device cuda:99", ["cuda:99"]),
        ("train --data-path P --precision fp61", ["--precision", "fp61", "fp16"]),
        ("train --data-path text.txt", ["text.txt"]),
        ("train --data-path folder", ["folder"]),
        ("train --resume absent", ["absent is no run folder"]),
        ("train --resume folder", ["folder is no run folder"]),
        ("evaluate folder", ["folder is no run folder"]),
        ("evaluate --data-path P", ["which model?"]),
        ("evaluate --weights absent.safetensors --data-path P", ["absent.safetensors"]),
        ("evaluate --weights text.txt --data-path P", ["text.txt", ".safetensors"]),
        ("predict --weights absent.pt --data-path P", ["absent.pt"]),
        ("export out.safetensors", ["which model?"]),
        ("export out.bin --weights absent.pt", ["out.bin", ".safetensors"]),
        ("prepare absent pack.safetensors", ["absent"]),
        ("prepare market pack.bin", ["pack.bin", ".safetensors"]),
        ("prepare market pack.safetensors --format xml", ["--format", "xml", "orbench"]),
        ("prepare market pack.safetensors --margin 0.9", ["--margin", "0.5"]),
        ("prepare market pack.safetensors --height 8", ["--height", "16"]),
        ("check absent", ["absent"]),
    ],
)
def test_a_mistake_is_named_with_exit_code_2_and_leaves_nothing_behind(words, expected, crowd):
    (crowd / "folder").mkdir()
    write_market(crowd / "market")
    (crowd / "broken.yaml").write_text("training:\n  lr: 0.1\n  temprature: 3\n", encoding="utf-8")
    (crowd / "text.txt").write_text("1 1\n2 2\n", encoding="utf-8")
    before = sorted(crowd.rglob("*"))
    verb, *flags = words.replace(" P", " people.safetensors").split()
    base = (*SMALL, "--warmup-steps", "1") if words.startswith("train --data-path") else ()
    ended = invoke(crowd, verb, *base, *flags)
    assert ended.code == 2
    said = ended.out if words.startswith("check") else ended.err
    for part in expected:
        assert part in said
    assert "Traceback" not in ended.out + ended.err
    assert sorted(crowd.rglob("*")) == before


def test_evaluating_data_without_anybody_held_out_says_so(trained):
    write_market(trained.folder / "market")
    for folder in ("query", "bounding_box_test"):
        for path in (trained.folder / "market" / folder).iterdir():
            path.unlink()
    rows = "".join(
        f"bounding_box_train/{path.name},{path.name[:4]},train\n"
        for path in sorted((trained.folder / "market" / "bounding_box_train").iterdir())
    )
    (trained.folder / "market" / "table.csv").write_text(f"path,identity,split\n{rows}", encoding="utf-8")
    words = ("evaluate", str(trained.run), "--data-path", "market/table.csv", "--val-share", "0", *SIZE)
    ended = invoke(trained.folder, *words, "--output", "found.json")
    assert ended.code == 2
    assert "has nobody to measure on" in ended.err
    assert "--val-share" in ended.err
    assert not (trained.folder / "found.json").exists()


def test_a_run_without_a_checkpoint_says_how_to_go_on(trained):
    shutil.rmtree(trained.folder / trained.run / "checkpoints")
    ended = invoke(trained.folder, "evaluate", str(trained.run))
    assert ended.code == 2
    assert f"{trained.run} holds no checkpoint yet" in ended.err
    assert f"train --resume {trained.run}" in ended.err


def test_settings_without_effect_are_named(tmp_path):
    write_market(tmp_path / "market")
    words = ("--data-path", "market", "--val-share", "0", "--identities-per-batch", "2", "--max-tokens", "9", *SIZE)
    out = succeed(tmp_path, *TRAIN, *words, "--max-steps", "1")
    assert "--max-tokens 9 changes nothing: market has no captions" in out


# Going on with a run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "notes"], ["--config", "exclude each other"]),
        (["--lr", "0.5"], [f"config.training.lr: {Config().training.lr} in the checkpoint, 0.5 now"]),
        (["--rank", "3"], ["config.model.rank: 2 in the checkpoint, 3 now"]),
        (["--val-share", "0.2"], ["data.fingerprint"]),
    ],
)
def test_a_run_cannot_go_on_with_another_configuration_and_is_left_as_it_was(words, expected, trained):
    before = contents(trained.folder)
    ended = invoke(trained.folder, "train", "--resume", str(trained.run), *words)
    assert ended.code == 2
    for part in expected:
        assert part in ended.err
    assert contents(trained.folder) == before


def test_resuming_a_finished_run_changes_nothing_but_what_tells_of_the_command(trained):
    before, result = contents(trained.folder / trained.run), trained.result
    out = succeed(trained.folder, "train", "--resume", str(trained.run))
    after = contents(trained.folder / trained.run)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"train.log", "result.json", "report.html"}
    again = trained.result
    assert again.pop("command") == f"python -m apps.reid train --resume {trained.run}"
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


def test_running_out_of_memory_ends_with_exit_code_1_and_what_to_try(crowd, monkeypatch):
    def fails(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("apps.reid.train.amp_step", fails)
    ended = invoke(crowd, *TRAIN)
    assert ended.code == 1
    for words in ("no memory left", "--identities-per-batch 2 with --accumulate 2", "--grad-checkpoint", "--subsets"):
        assert words in ended.out
    assert "Traceback" not in ended.err


def test_a_diverging_run_ends_with_exit_code_1_and_names_the_step(crowd):
    ended = invoke(crowd, *TRAIN, "--lr", "1e30", "--clip", "off", "--warmup-steps", "0")
    assert ended.code == 1
    run = crowd / run_folder(crowd)
    (warning,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert "not a number since step " in warning
    assert warning in (run / "train.log").read_text(encoding="utf-8")
    assert "Traceback" not in ended.err
    assert not (run / "result.json").exists()


def resume_words(out: str) -> list[str]:
    """The command line that a stopped run printed."""
    (line,) = [line for line in out.splitlines() if "resume with: python -m apps.reid " in line]
    return shlex.split(line.partition("python -m apps.reid ")[2])


def stop_after(monkeypatch: pytest.MonkeyPatch, last: int, number: signal.Signals) -> None:
    """Send this process a signal once so many steps are done."""
    advance, steps = progress.Bar.advance, 0

    def stopping(self: progress.Bar, n: int = 1) -> None:
        nonlocal steps
        steps += n
        advance(self, n)
        if steps == last and n:
            signal.raise_signal(number)

    monkeypatch.setattr(progress.Bar, "advance", stopping)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_and_the_printed_command_ends_it_as_if_it_had_not_been(
    number, code, finished, crowd, monkeypatch
):
    folder = crowd / "a folder"
    folder.mkdir()
    copy_pack(crowd / "people.safetensors", folder)
    stop_after(monkeypatch, 3, number)
    ended = invoke(folder, *TRAIN, "--runs-dir", str(folder / "runs"))
    assert ended.code == code
    assert "stopped at step 3;" in ended.out
    run = folder / run_folder(folder)
    words = tuple(resume_words(ended.out))
    assert words == ("train", "--resume", str(run))
    assert load_checkpoint(sorted((run / "checkpoints").iterdir())[-1])["step"] == 3
    assert not (run / "result.json").exists()
    succeed(folder, *words)
    assert strict_json(run / "result.json")["metrics"] == finished.result["metrics"]
    expected = finished.folder / finished.run
    for path in (expected / "checkpoints").glob("*4.safetensors"):
        weights, found = (load_weights(folder / "checkpoints" / path.name)[0] for folder in (expected, run))
        assert all(torch.equal(weight, found[name]) for name, weight in weights.items())


def test_an_evaluation_moves_the_bar_by_no_step_and_says_what_it_is_about(crowd, monkeypatch):
    notes: list[str] = []
    note = progress.Bar.note

    def noting(self: progress.Bar, text: str) -> None:
        notes.append(text)
        note(self, text)
        assert self.done <= self.total

    monkeypatch.setattr(progress.Bar, "note", noting)
    succeed(crowd, *TRAIN)
    assert any(text.startswith("evaluating: ") for text in notes)


# Demo data


def test_demo_data_is_said_to_be_demo_data_wherever_a_number_is(tmp_path, few_demo_people):
    out = succeed(tmp_path, "train", *SMALL, *QUICK, *SIZE, "--epochs", "1")
    run = run_folder(tmp_path)
    assert "-demo-" in run.name
    assert out.count("demo data") >= 4  # when it is made, at the start and above the table
    assert out.index("demo data") < out.index("epoch 1")
    assert "demo data" in (tmp_path / run / "train.log").read_text(encoding="utf-8")
    (note,) = strict_json(tmp_path / run / "result.json")["notes"]
    assert "demo data" in note
    assert note in (tmp_path / run / "report.html").read_text(encoding="utf-8")
    said = succeed(tmp_path, "evaluate", str(run), "--output", "found.json")
    assert said.count(note) == 2
    for stage in ("valid", "test"):
        assert f"{stage} (demo data)" in said
    assert [part["notes"] for part in strict_json(tmp_path / "found.json")["stages"].values()] == [[note], [note]]
    for words in (("predict", str(run), "--sheet", "page.html"), ("export", "a.safetensors", "--run", str(run))):
        lines = succeed(tmp_path, *words).splitlines()
        assert lines
        assert all("demo data" in line for line in lines)
    assert note in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_demo_data_is_drawn_once_and_belongs_to_the_runs_beside_it(tmp_path, few_demo_people, monkeypatch):
    words = ("train", *SMALL, *QUICK, *SIZE, "--runs-dir", "elsewhere")
    with monkeypatch.context() as patch:
        stop_after(patch, 1, signal.SIGINT)
        ended = invoke(tmp_path, *words)
    assert ended.code == 130
    assert "drawing people into" in ended.out
    again = resume_words(ended.out)
    monkeypatch.setattr(demo, "draw_people", lambda *args, **options: pytest.fail("drawn again"))
    out = succeed(tmp_path, *again)
    assert "drawing people into" not in out
    assert "demo data" in out
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    (packed,) = tmp_path.glob("elsewhere/reid/demo-data-32x16.safetensors")
    packed.write_bytes(b"damaged")
    succeed(tmp_path, "evaluate", again[-1])
    assert read_data(packed).modality.unique().tolist()[0] == RGB


def test_real_data_is_never_called_demo_data(trained):
    said = trained.out + succeed(trained.folder, "evaluate", str(trained.run))
    said += succeed(trained.folder, "predict", str(trained.run), "--sheet", "page.html")
    said += (trained.folder / "page.html").read_text(encoding="utf-8")
    said += "".join(
        (trained.folder / trained.run / name).read_text(encoding="utf-8") for name in ("train.log", "report.html")
    )
    assert "demo" not in re.sub(r"_demo_\d+", "", said)  # which the files of this test are called


# Consoles


def test_a_console_that_lacks_characters_gets_question_marks(crowd):
    name = "\u96fb\u5f71"
    os.replace(crowd / "people.safetensors", crowd / f"{name}.safetensors")
    os.replace(crowd / "people.images.safetensors", crowd / f"{name}.images.safetensors")
    words = (*TRAIN, "--data-path", f"{name}.safetensors", "--max-steps", "2")
    ended = invoke(crowd, *words, encoding="cp1252")
    assert (ended.code, ended.err) == (0, "")
    assert "[????] Epoch 1, Batch 2: ????=" in ended.out
    assert "chance" in ended.out
    log = (crowd / run_folder(crowd) / "train.log").read_text(encoding="utf-8")
    assert "\u7279\u5f81\u76d1\u63a7" in log


def test_outside_a_checkout_the_revision_is_null(monkeypatch):
    def absent(*words: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert cli.git_revision() is None
