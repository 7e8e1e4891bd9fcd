"""The command line as a user meets it: what it writes, what it says, and how it ends."""

import contextlib
import io
import json
import os
import pickle
import random
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

from apps.seqrec import evaluate as evaluation
from apps.seqrec import main
from apps.seqrec.config import ALIASES, Config
from apps.seqrec.formats import read_sequences
from apps.seqrec.model import SeqRec
from shared import cli, progress
from shared.checkpoint import load_checkpoint, load_weights
from shared.config import Resolved, knobs, resolve
from shared.log import read_metrics

ROOT = Path(__file__).parents[2]
NUM_ITEMS = 15
SMALL = ("--max-len", "8", "--embed-dim", "8", "--batch-size", "16")
ORIGINAL_SMALL = ("--maxlen", "8", "--hidden_units", "8")
TRAIN = ("train", "--data-path", "walk.txt", *SMALL, "--epochs", "2", "--log-every", "2", "--lr", "0.01")


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
        mock.patch.object(sys, "argv", ["apps/seqrec/__main__.py", *words]),
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


def write_walk(path: Path, *, seed: int = 0) -> None:
    """Users who walk in a circle, as SASRec text with ids that are words."""
    draw = random.Random(seed)
    lines = []
    for user in range(40):
        start = draw.randrange(NUM_ITEMS)
        lines += [f"user-{user} item-{(start + i) % NUM_ITEMS}" for i in range(draw.randint(3, 12))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_folder(folder: Path) -> Path:
    """The only run folder below `folder`, as a path to be used there."""
    (config,) = folder.glob("runs/seqrec/*/config.yaml")
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


class Trained(NamedTuple):
    """A folder with data and one finished run."""

    folder: Path
    run: Path  # relative to the folder
    out: str

    @property
    def result(self) -> Any:
        return strict_json(self.folder / self.run / "result.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A finished run that nobody may change."""
    folder = tmp_path_factory.mktemp("finished")
    write_walk(folder / "walk.txt")
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
def walk(tmp_path: Path) -> Path:
    """A folder with data and nothing else."""
    write_walk(tmp_path / "walk.txt")
    return tmp_path


def process_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}


# Help


def test_help_loads_neither_torch_nor_anything_that_does(tmp_path):
    code = """
import sys
from apps.seqrec import main
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
        (line,) = [text for text in panels[knob.section.capitalize()] if f" {knob.flag} " in text]
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


# What training leaves behind


def test_a_run_folder_holds_what_was_promised(finished):
    names = {
        str(path.relative_to(finished.folder / finished.run)) for path in (finished.folder / finished.run).rglob("*")
    }
    steps = {f"checkpoints/step-{step:08d}.safetensors" for step in (3, 6)}
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
        'data_path: "walk.txt"  # flag --data-path',
        "dropout: 0.2  # default",
    ):
        assert f"  {line}\n" in text
    config = configuration(finished.folder / finished.run)
    assert (config.model.embed_dim, config.data.max_len, config.training.epochs) == (8, 8, 2)


def test_a_preset_is_named_as_the_source_and_overridden_by_flags(walk):
    words = ("--data-path", "walk.txt", "--max-steps", "1", "--batch-size", "8", "--warmup-steps", "0")
    succeed(walk, "train", "--config", "fast", *words)
    text = (walk / run_folder(walk) / "config.yaml").read_text(encoding="utf-8")
    assert '  loss: "sampled"  # preset fast.yaml\n' in text
    assert "  batch_size: 8  # flag --batch-size\n" in text
    preset: Resolved[Config] = resolve(Config, yaml_path=main.PRESETS / "fast.yaml")
    assert f"  epochs: {preset.config.training.epochs}  # preset fast.yaml\n" in text


def test_the_log_and_the_metrics_tell_the_run(finished):
    log = (finished.folder / finished.run / "train.log").read_text(encoding="utf-8")
    for words in ("walk.txt: 40 users, 15 items", "epoch 1: validation NDCG@10", "epoch 2:", str(finished.run)):
        assert words in log
        assert words in finished.out
    records = read_metrics(finished.folder / finished.run / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["epoch"]) for line in records] == [
        ("train", 2, 0),
        ("train", 3, 0),
        ("valid", 3, 0),
        ("train", 4, 1),
        ("train", 6, 1),
        ("valid", 6, 1),
    ]


def test_the_result_holds_every_metric_with_its_protocol_and_where_it_came_from(finished):
    result = finished.result
    for stage in ("valid", "test"):
        assert f"leave-one-out, {stage} (" in result["metrics"][stage]["protocol"]
        assert "all 40 users, full ranking over 15 items, history filtered" in result["metrics"][stage]["protocol"]
        assert 0 < result["metrics"][stage]["NDCG@10"] < 1
    assert result["protocol"] == result["metrics"]["test"]["protocol"]
    assert [row["model"] for row in result["table"]] == ["seqrec", "popularity", "most recent", "successor"]
    for row in result["table"]:
        assert list(row) == result["table_columns"]
    assert result["table"][0]["NDCG@10"] == result["metrics"]["test"]["NDCG@10"]
    assert result["speed"]["sequences/s"] > 0
    assert "evaluation and saving are not in it" in result["speed_measured"]
    assert {"cpu", "cores", "os"} <= set(result["machine"])
    assert result["versions"] == {"torch": str(torch.__version__), "python": sys.version.split()[0]}
    expected = read_sequences(finished.folder / "walk.txt")
    assert result["data"] == {
        "name": "walk.txt",
        "users": 40,
        "items": NUM_ITEMS,
        "events": expected.num_events,
        "fingerprint": expected.fingerprint,
    }
    assert result["git"] is None or isinstance(result["git"], str)
    assert result["command"] == shlex.join(["python", "-m", "apps.seqrec", *TRAIN, "--name", "first"])
    assert (result["steps"], result["notes"]) == (6, [])


def test_the_console_and_the_report_show_the_table_with_its_protocol(finished):
    report = (finished.folder / finished.run / "report.html").read_text(encoding="utf-8")
    protocol = finished.result["protocol"]
    assert protocol in finished.out
    assert protocol in report
    assert f"{finished.result['metrics']['test']['NDCG@10']:.4f}" in finished.out
    for name in ("popularity", "most recent", "successor"):
        assert name in finished.out
        assert name in report
    assert f"open {finished.run / 'report.html'}" in finished.out


def test_outside_a_checkout_the_revision_is_null(monkeypatch):
    def absent(*words: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert cli.git_revision() is None


# The original scripts' spellings


def test_the_original_spellings_reach_the_configuration(walk):
    words = "--batch_size 128 --lr 0.001 --num_epochs 10 --hidden_units 128 --num_blocks 4"
    succeed(
        walk,
        *words.split(),
        "--norm_first=False",
        "--data_dir",
        "walk.txt",
        "--dropout_rate",
        "0.1",
        "--max-steps",
        "2",
    )
    config = configuration(walk / run_folder(walk))
    assert (config.training.batch_size, config.training.lr, config.training.epochs) == (128, 0.001, 10)
    assert (config.model.embed_dim, config.model.num_blocks, config.model.norm_first) == (128, 4, False)
    assert (config.data.data_path, config.model.dropout, config.training.max_steps) == ("walk.txt", 0.1, 2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--inference_only --lr 1", "predict --lr 1"),
        ("--lr 1 --inference-only", "predict --lr 1"),
        ("--inference_only=True --lr 1", "predict --lr 1"),
        ("--inference_only True --lr 1", "predict --lr 1"),
        ("train --inference_only --lr 1", "predict --lr 1"),
        ("--inference_only False --lr 1", "--lr 1"),
        ("train --lr 1 --inference_only=false", "train --lr 1"),
        ("train --lr 1", "train --lr 1"),
    ],
)
def test_inference_only_means_the_verb_predict(given, expected):
    assert main.inference_only_as_verb(given.split()) == expected.split()


def weights_file(trained: Trained, kind: str) -> str:
    """A file with the weights of the finished run's best checkpoint; its name."""
    best = trained.run / "checkpoints" / "best.safetensors"
    if kind == "checkpoint":
        return str(best)
    if kind == "export":
        out = succeed(trained.folder, "export", "model.safetensors", "--run", str(trained.run))
        assert f"weights from {best}" in out
        return "model.safetensors"
    state, _ = load_weights(trained.folder / best)
    torch.save(state if kind == "pt" else {"epoch": 3, "state_dict": state}, trained.folder / "model.pt")
    return "model.pt"


@pytest.mark.parametrize("kind", ["checkpoint", "export", "pt", "nested pt"])
def test_inference_only_ranks_with_weights_of_every_kind_of_file(kind, trained):
    name = weights_file(trained, kind)
    words = ("--inference_only", "--state_dict_path", name, "--data_path", "walk.txt", *ORIGINAL_SMALL)
    out = succeed(trained.folder, *words, "--output", "found.jsonl")
    assert f"exact over 15 items, from {name}" in out
    succeed(trained.folder, "predict", str(trained.run), "--output", "expected.jsonl")
    assert (trained.folder / "found.jsonl").read_bytes() == (trained.folder / "expected.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["checkpoint", "export", "pt", "nested pt"])
def test_evaluate_measures_weights_of_every_kind_of_file(kind, trained):
    name = weights_file(trained, kind)
    words = ("evaluate", "--state_dict_path", name, "--data_path", "walk.txt", *ORIGINAL_SMALL)
    out = succeed(trained.folder, *words, "--output", "found.json")
    found = strict_json(trained.folder / "found.json")
    assert found["stages"]["test"]["table"] == trained.result["table"]
    assert found["stages"]["test"]["protocol"] == trained.result["protocol"]
    assert found["weights"] == name
    assert trained.result["protocol"] in out


class Hostile:
    """Makes a folder when it is unpickled by a careless reader."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_a_hostile_state_dict_is_refused_and_nothing_of_it_runs(form, suffix, walk):
    canary = walk / "canary"
    path = walk / f"model{suffix}"
    state = {"item.weight": torch.zeros(2, 2), "extra": Hostile(canary)}
    if form == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Hostile(canary)}, protocol=2))
    words = ("--inference_only", "--state_dict_path", path.name, "--data_path", "walk.txt")
    ended = invoke(walk, *words)
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
    words = ("evaluate", "--weights", name, "--data-path", "walk.txt", "--max-len", "8")
    ended = invoke(trained.folder, *words, "--embed-dim", "16")
    assert ended.code == 2
    assert f"error: {name} does not fit the model: item.weight is [16, 8], expected [16, 16]" in ended.err
    ended = invoke(trained.folder, *words, "--embed-dim", "8", "--num-blocks", "1")
    assert ended.code == 2
    assert "blocks.1.attention.qkv.weight is not part of this model" in ended.err
    ended = invoke(trained.folder, *words, "--embed-dim", "8", "--num-blocks", "3")
    assert ended.code == 2
    assert "blocks.2.attention.qkv.weight is missing" in ended.err


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_our_own_weights_are_refused_under_another_model_or_other_items(kind, trained):
    name = weights_file(trained, kind)
    words = ("evaluate", "--weights", name, *SMALL)
    ended = invoke(trained.folder, *words, "--data-path", "walk.txt", "--attention", "hstu")
    assert ended.code == 2
    assert "model.attention: 'softmax' in the checkpoint, 'hstu' now" in ended.err
    text = (trained.folder / "walk.txt").read_text(encoding="utf-8")
    (trained.folder / "other.txt").write_text(text.replace("item-3\n", "item-three\n"), encoding="utf-8")
    ended = invoke(trained.folder, *words, "--data-path", "other.txt")
    assert ended.code == 2
    assert name in ended.err
    assert "items:" in ended.err


# The other verbs


def test_evaluating_a_run_gives_the_numbers_of_its_result(trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--output", "new/folder/found.json")
    found = strict_json(trained.folder / "new" / "folder" / "found.json")
    assert found["app"] == "seqrec"
    assert found["data"] == "walk.txt"
    assert found["weights"] == str(trained.run / "checkpoints" / "best.safetensors")
    assert found["stages"]["test"]["table"] == trained.result["table"]
    for stage in ("valid", "test"):
        part, expected = found["stages"][stage], trained.result["metrics"][stage]
        assert part["protocol"] == expected["protocol"]
        assert part["protocol"] in out
        row = part["table"][0]
        assert row["model"] == "seqrec"
        assert {name: value for name, value in row.items() if name != "model"} == {
            name: expected[name] for name in row if name != "model"
        }


@pytest.mark.parametrize(("protocol", "words"), [("unfiltered", "history not filtered"), ("sampled", "not comparable")])
def test_another_protocol_is_said_with_the_numbers(protocol, words, trained):
    out = succeed(trained.folder, "evaluate", str(trained.run), "--protocol", protocol, "--output", "found.json")
    assert words in out
    part = strict_json(trained.folder / "found.json")["stages"]["test"]
    assert words in part["protocol"]
    assert part["table"] != trained.result["table"]


def test_a_run_that_ended_before_its_first_validation_is_measured_with_its_last_weights(walk):
    succeed(walk, *TRAIN, "--max-steps", "2")
    run = run_folder(walk)
    assert not (walk / run / "checkpoints" / "best.safetensors").exists()
    succeed(walk, "evaluate", str(run), "--output", "found.json")
    found = strict_json(walk / "found.json")
    assert found["weights"] == str(run / "checkpoints" / "step-00000002.safetensors")
    assert found["stages"]["test"]["table"] == strict_json(walk / run / "result.json")["table"]


def test_predictions_are_raw_ids_of_the_best_items_that_the_user_has_not_met(trained):
    k = 4
    out = succeed(trained.folder, "predict", str(trained.run), "--k", str(k), "--output", "new/top.jsonl")
    lines = (trained.folder / "new" / "top.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    met: dict[str, list[str]] = {}
    for line in (trained.folder / "walk.txt").read_text(encoding="utf-8").splitlines():
        user, item = line.split()
        met.setdefault(user, []).append(item)
    assert [record["user"] for record in records] == list(met)
    for record in records:
        assert list(record) == ["user", "items", "scores"]
        assert len(record["items"]) == len(set(record["items"])) == len(record["scores"])
        assert len(record["items"]) == min(k, NUM_ITEMS - len(set(met[record["user"]])))
        assert not set(record["items"]) & set(met[record["user"]])
        assert record["scores"] == sorted(record["scores"], reverse=True)

    config, sequences = configuration(trained.folder / trained.run), read_sequences(trained.folder / "walk.txt")
    model = SeqRec(config.model, num_items=NUM_ITEMS, max_len=config.data.max_len)
    model.load_state_dict(load_weights(trained.folder / trained.run / "checkpoints" / "best.safetensors")[0])
    (chunk,) = evaluation.predict(model, sequences, k=k, config=config, packed=True)
    expected = [[sequences.item_ids[i - 1] for i in row if i > 0] for row in chunk[1].tolist()]
    assert [record["items"] for record in records] == expected
    assert "new/top.jsonl" in out
    assert "40 users" in out
    assert "exact over 15 items" in out


def test_seen_items_are_kept_when_asked_and_k_may_exceed_the_catalogue(trained):
    succeed(trained.folder, "predict", str(trained.run), "--k", "99", "--keep-seen", "--output", "all.jsonl")
    for line in (trained.folder / "all.jsonl").read_text(encoding="utf-8").splitlines():
        assert sorted(json.loads(line)["items"]) == sorted(f"item-{i}" for i in range(NUM_ITEMS))


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


def test_training_on_a_pack_gives_the_result_of_training_on_its_source(trained):
    out = succeed(trained.folder, "prepare", "walk.txt", "packs/walk.safetensors")
    assert "train --data-path packs/walk.safetensors" in out
    words = [word.replace("walk.txt", "packs/walk.safetensors") for word in TRAIN]
    succeed(trained.folder, *words, "--runs-dir", "packed/runs")
    run = trained.folder / "packed" / run_folder(trained.folder / "packed")
    result = strict_json(run / "result.json")
    for key in ("metrics", "table", "data", "steps", "best_epoch"):
        assert result[key] == trained.result[key]
    trees = [load_checkpoint(path / "checkpoints" / "best.safetensors") for path in (run, trained.folder / trained.run)]
    for name, weight in trees[0]["model"].items():
        assert torch.equal(weight, trees[1]["model"][name])


def test_check_exits_with_2_on_an_error_only(walk):
    assert "walk.txt: no fault found" in succeed(walk, "check", "walk.txt")
    with (walk / "walk.txt").open("a", encoding="utf-8") as file:
        file.write("user-9 item-2 17 18\n")
    ended = invoke(walk, "check", "walk.txt")
    line = len((walk / "walk.txt").read_text(encoding="utf-8").splitlines())
    assert ended.code == 2
    assert f"walk.txt:{line}: error: " in ended.out
    assert "cannot be read" in ended.out
    (walk / "odd.txt").write_text("1 2 30\n1 3 20\n1 4 40\n", encoding="utf-8")
    assert "odd.txt:2: warning: " in succeed(walk, "check", "odd.txt")


# What the user can repair


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --data-path absent.txt", ["absent.txt"]),
        ("train --data-path walk.txt --batch-sise 3", ["--batch-sise", "--batch-size"]),
        ("trian --data-path walk.txt", ["trian"]),
        ("train --data-path walk.txt --config fasst", ["fasst", "did you mean fast"]),
        (
            "train --data-path walk.txt --config broken.yaml",
            ["broken.yaml, line 3", "batch_sise", "did you mean batch_size"],
        ),
        ("train --data-path walk.txt --dropout 2", ["--dropout", "2", "<= 0.9"]),
        ("train --data-path walk.txt --epochs few", ["--epochs", "few", "an integer"]),
        ("train --data-path walk.txt --loss cee", ["--loss", "cee", "did you mean"]),
        ("train --data-path walk.txt --embed-dim 10 --num-heads 4", ["embed_dim 10", "num_heads 4"]),
        ("train --data-path walk.txt --select Recall@7", ["Recall@7", "NDCG@10"]),
        ("train --data-path pairs.txt", ["pairs.txt", "nothing to train on"]),
        ("train --data-path walk.txt --device cuda:99", ["cuda:99"]),
        ("train --resume absent", ["absent is no run folder"]),
        ("train --resume folder", ["folder is no run folder"]),
        ("evaluate folder", ["folder is no run folder"]),
        ("evaluate --data-path walk.txt", ["which model?"]),
        ("evaluate --weights absent.safetensors --data-path walk.txt", ["absent.safetensors"]),
        ("evaluate --weights walk.txt --data-path walk.txt", ["walk.txt", ".safetensors"]),
        ("predict --weights absent.pt --data-path walk.txt", ["absent.pt"]),
        ("export out.safetensors", ["which model?"]),
        ("prepare absent.txt pack.safetensors", ["absent.txt"]),
        ("prepare walk.txt pack.bin", ["pack.bin", ".safetensors"]),
        ("check absent.txt", ["absent.txt"]),
    ],
)
def test_a_mistake_is_named_with_exit_code_2_and_leaves_nothing_behind(words, expected, walk):
    (walk / "folder").mkdir()
    (walk / "broken.yaml").write_text("training:\n  lr: 0.1\n  batch_sise: 3\n", encoding="utf-8")
    (walk / "pairs.txt").write_text("1 1\n2 2\n", encoding="utf-8")
    before = sorted(walk.rglob("*"))
    ended = invoke(walk, *words.split())
    assert ended.code == 2
    said = ended.out if words.startswith("check") else ended.err
    for part in expected:
        assert part in said
    assert "Traceback" not in ended.out + ended.err
    assert sorted(walk.rglob("*")) == before


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
        (["--config", "fast"], ["--config", "exclude each other"]),
        (["--lr", "0.5"], ["config.training.lr: 0.01 in the checkpoint, 0.5 now"]),
        (["--embed-dim", "16"], ["config.model.embed_dim: 8 in the checkpoint, 16 now"]),
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
    write_walk(trained.folder / "walk.txt", seed=1)
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
    assert again.pop("command") == f"python -m apps.seqrec train --resume {trained.run}"
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


def test_a_diverging_run_ends_with_exit_code_1_and_names_the_step(walk):
    words = ("--lr", "1e30", "--clip-norm", "0", "--log-every", "1")
    ended = invoke(walk, *(*TRAIN[:-2], *words))
    assert ended.code == 1
    run = walk / run_folder(walk)
    (warning,) = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert "not a number since step 2; no checkpoint had been written yet" in warning
    assert warning in (run / "train.log").read_text(encoding="utf-8")
    assert "--clip-norm 1" in ended.out
    assert "Traceback" not in ended.err
    assert not (run / "result.json").exists()


def resume_words(out: str) -> list[str]:
    """The command line that a stopped run printed."""
    (line,) = [line for line in out.splitlines() if "resume with: python -m apps.seqrec " in line]
    return shlex.split(line.partition("python -m apps.seqrec ")[2])


def test_an_interrupt_ends_with_130_and_the_printed_command_ends_the_run_as_if_it_had_not_been(trained, monkeypatch):
    folder, steps = trained.folder / "a folder", 0
    folder.mkdir()
    write_walk(folder / "walk.txt")
    advance = progress.Bar.advance

    def interrupting(self: progress.Bar, n: int = 1) -> None:
        nonlocal steps
        steps += 1
        advance(self, n)
        if steps == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Bar, "advance", interrupting)
    ended = invoke(folder, *TRAIN, "--runs-dir", str(folder / "runs"))
    assert ended.code == 130
    assert "stopped at step 4" in ended.out
    run = folder / run_folder(folder)
    words = resume_words(ended.out)
    assert words == ["train", "--resume", str(run)]
    assert not (run / "result.json").exists()
    succeed(folder, *words)
    result = strict_json(run / "result.json")
    assert result["metrics"] == trained.result["metrics"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM to a process")
def test_a_terminated_process_saves_and_ends_with_143_and_the_command_to_resume(walk):
    words = ["-m", "apps.seqrec", *TRAIN, "--epochs", "100000", "--log-every", "1", "--eval-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=walk,
        env=process_environment(PYTHONIOENCODING="utf-8"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in walk.glob("runs/seqrec/*/metrics.jsonl")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, err) == (143, "")
    assert "SIGTERM: stopping after this step" in out
    run = run_folder(walk)
    assert resume_words(out) == ["train", "--resume", str(run)]
    (checkpoint,) = sorted((walk / run / "checkpoints").iterdir())[-1:]
    step = load_checkpoint(checkpoint)["step"]
    assert f"stopped at step {step};" in out
    succeed(walk, *resume_words(out), "--max-steps", str(step + 2))
    assert strict_json(walk / run / "result.json")["steps"] == step + 2


# Demo data


def test_demo_data_is_said_to_be_demo_data_wherever_a_number_is(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.seqrec.demo.CONTEST_USERS", 60)
    monkeypatch.setattr("apps.seqrec.demo.CONTEST_ITEMS", 40)
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
    name = "\u96fb\u5f71.txt"
    write_walk(tmp_path / name)
    words = ["-m", "apps.seqrec", *TRAIN, "--data-path", name, "--max-steps", "3"]
    found = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=process_environment(PYTHONIOENCODING="cp1252", PYTHONUTF8="0"),
        capture_output=True,
        check=False,
    )
    out = found.stdout.decode("cp1252")
    assert found.returncode == 0, found.stderr
    assert "??.txt: 40 users" in out
    assert "popularity" in out
    assert "Traceback" not in found.stderr.decode("cp1252")
    log = (tmp_path / run_folder(tmp_path) / "train.log").read_text(encoding="utf-8")
    assert f"{name}: 40 users" in log
