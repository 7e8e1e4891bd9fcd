"""A small app with every kind of knob, driven through the command line as a user would."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from shared.cli import bool_flags, config_options, find_preset, make_app, new_run_dir, normalise_argv, output_file, run
from shared.config import ConfigError, Resolved, knob

ROOT = Path(__file__).parents[2]
ALIASES = {"num-epochs": "epochs", "hidden-units": "embed-dim", "l-r": "lr", "pre_norm": "norm_first"}
VERBS = ("train", "evaluate", "import-data")


@dataclass(frozen=True)
class DataConfig:
    batch_size: int = knob(64, "Users per step.", minimum=1)
    data: str | None = knob(None, "Folder of the data, [B, L] each.")


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int = knob(64, "Embedding dimension.", minimum=1)
    num_blocks: int = knob(2, "Transformer blocks.", minimum=1)
    dropout: float = knob(0.2, "Share of values dropped.", minimum=0, below=1)
    norm_first: bool = knob(True, "Normalise before each block.")
    has_a: bool = knob(False, "Use the second input.")


@dataclass(frozen=True)
class TrainConfig:
    lr: float = knob(1e-3, "Learning rate.", above=0)
    epochs: int = knob(5, "Passes over the data, epochs.", minimum=1)
    optimizer: str = knob("adam", "Optimizer.", choices=("adam", "adamw"))
    cutoffs: tuple[int, ...] = knob((5, 10), "Cut-offs of the metrics.", minimum=1)
    clip: float | None = knob(1.0, "Gradient norm limit; none is off.", above=0)
    tag: str = knob("", "Words for the log.")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class Seen:
    """What the verb was called with."""

    resolved: Resolved[Config] | None = None
    resume: Path | None = None

    @property
    def config(self) -> Config:
        assert self.resolved is not None
        return self.resolved.config


@pytest.fixture(autouse=True)
def _own_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer installs its own and leaves it


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "ml-1m.yaml").write_text("model:\n  dropout: 0.5\n  hidden_units: 50\n")
    (folder / "fast.yaml").write_text("training:\n  epochs: 1\n")
    return folder


def app_of(presets: Path, seen: Seen, *, failure: BaseException | None = None) -> typer.Typer:
    app = make_app("fake", "A fake app.")

    @app.command()
    @config_options(Config, presets=presets, aliases=ALIASES)
    def train(
        resolved: Resolved[Config],
        resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    ) -> None:
        """Train a model."""
        seen.resolved, seen.resume = resolved, resume
        typer.echo("trained")
        if failure is not None:
            raise failure

    return app


def call(presets: Path, argv: Sequence[str], *, failure: BaseException | None = None) -> tuple[Any, Seen]:
    """Return the exit code of the process and what the verb saw."""
    seen = Seen()
    with pytest.raises(SystemExit) as left:
        run(
            app_of(presets, seen, failure=failure),
            argv,
            prog_name="fake",
            flags_bool=bool_flags(Config),
            aliases=ALIASES,
            default_verb="train",
            verbs=VERBS,
        )
    return left.value.code, seen


def help_of(presets: Path) -> str:
    return CliRunner().invoke(app_of(presets, Seen()), ["train", "--help"], env={"COLUMNS": "200"}).stdout


def test_help_shows_panels_flags_sentences_and_defaults(presets: Path) -> None:
    text = help_of(presets)
    for panel in ("Data", "Model", "Training"):
        assert re.search(rf"- {panel} -|\u2500 {panel} \u2500", text)
    expected = {
        "--batch-size": "Users per step. (>= 1) [default: 64]",
        "--data": "Folder of the data, [B, L] each. [default: (none)]",
        "--dropout": "Share of values dropped. (>= 0, < 1) [default: 0.2]",
        "--no-norm-first": "Normalise before each block. [default: norm-first]",
        "--lr": "Learning rate. (> 0) [default: 0.001]",
        "--optimizer": "Optimizer. [default: adam]",
        "--cutoffs": "Cut-offs of the metrics. (>= 1) [default: 5,10]",
        "--tag": "Words for the log. [default: (empty)]",
        "--resume": "Run folder to go on with.",
        "--config": "Presets: fast, ml-1m.",
    }
    for flag, words in expected.items():
        [line] = (line for line in text.splitlines() if re.search(rf"{flag}\s", line))
        assert words in line
    assert "adam|adamw" in text
    assert "hidden" not in text


def test_help_keeps_the_verb_of_an_app_with_one_verb(presets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(presets, ["-h"])[0] == 0
    text = capsys.readouterr().out
    assert "A fake app." in text
    assert "Train a model." in text


def test_without_flags_the_defaults_hold(presets: Path) -> None:
    code, seen = call(presets, ["train"])
    assert (code, seen.config, seen.resume) == (0, Config(), None)
    assert seen.resolved is not None
    assert set(seen.resolved.sources.values()) == {"default"}


def test_flag_wins_over_preset_and_preset_over_default(presets: Path) -> None:
    argv = ["train", "--config", "ml-1m", "--dropout", "0.1", "--optimizer", "adam", "--resume", "runs/x"]
    code, seen = call(presets, argv)
    assert code == 0
    assert seen.config == Config(model=ModelConfig(dropout=0.1, embed_dim=50))
    assert seen.resume == Path("runs/x")
    assert seen.resolved is not None
    sources = seen.resolved.sources
    assert sources["model.embed_dim"] == "preset ml-1m.yaml"
    assert sources["model.dropout"] == "flag --dropout"
    assert sources["training.optimizer"] == "flag --optimizer"  # given, though it equals the default
    assert sources["model.norm_first"] == "default"


def test_original_spellings_without_a_verb_are_understood(presets: Path) -> None:
    line = (
        "--batch_size 128 --lr 1e-4 --num_epochs 10 --hidden_units 128 --num_blocks 4 --norm_first=False --has_a True"
    )
    code, seen = call(presets, line.split())
    assert code == 0
    assert seen.config == Config(
        DataConfig(batch_size=128),
        ModelConfig(embed_dim=128, num_blocks=4, norm_first=False, has_a=True),
        TrainConfig(lr=1e-4, epochs=10),
    )


def test_tuples_none_and_negated_flags_are_typed_as_text(presets: Path) -> None:
    code, seen = call(presets, ["train", "--cutoffs", "1,20", "--clip", "none", "--no-norm-first", "--tag", "a b"])
    assert code == 0
    assert seen.config == Config(
        model=ModelConfig(norm_first=False), training=TrainConfig(cutoffs=(1, 20), clip=None, tag="a b")
    )


def test_config_may_be_a_path(presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {lr: 1e-2}\n")
    for word in (str(path), "mine.yaml"):
        monkeypatch.chdir(tmp_path)
        code, seen = call(presets, ["train", "--config", word])
        assert (code, seen.config.training.lr) == (0, 0.01)
        assert seen.resolved is not None
        assert seen.resolved.sources["training.lr"] == word


def test_preset_is_found_by_name_with_or_without_suffix(presets: Path) -> None:
    assert find_preset("fast", presets) == find_preset("fast.yaml", presets) == presets / "fast.yaml"
    for name in ("ml1m", "../configs/fast", "nowhere/fast.yaml", ""):
        with pytest.raises(ConfigError, match="presets: fast, ml-1m"):
            find_preset(name, presets)
    with pytest.raises(ConfigError, match="did you mean ml-1m"):
        find_preset("ml1m", presets)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["train", "--lr", "fast"], "error: flag --lr: training.lr is 'fast'; expected a number > 0"),
        (["train", "--dropout", "1"], "model.dropout is 1.0; expected a number >= 0, < 1"),
        (["train", "--optimizer", "adan"], "expected one of adam, adamw; did you mean adam?"),
        (["train", "--cutoffs", "5,x"], "training.cutoffs is 'x'"),
        (["train", "--config", "slow"], "presets: fast, ml-1m"),
        (["train", "--batch-sizes", "3"], "--batch-size"),
        (["trian"], "No such command 'trian'"),
        (["train", "--has_a=maybe"], "--has-a"),
        (["train", "--lr"], "--lr"),
    ],
)
def test_usage_errors_exit_with_2_and_help_on_stderr(
    presets: Path, capsys: pytest.CaptureFixture[str], argv: list[str], part: str
) -> None:
    code, seen = call(presets, argv)
    output = capsys.readouterr()
    assert (code, seen.resolved, output.out) == (2, None, "")
    assert part in output.err
    assert "Traceback" not in output.err


def test_wrong_key_in_a_preset_names_file_line_and_nearest_key(
    presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (presets / "fast.yaml").write_text("training:\n  epoch: 1\n")
    assert call(presets, ["train", "--config", "fast"])[0] == 2
    error = capsys.readouterr().err
    assert f"error: {presets / 'fast.yaml'}, line 2: unknown key training.epoch; did you mean epochs?" in error


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (ValueError("lower --batch-size"), "error: lower --batch-size\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "error: a/b: No such file or directory\n"),
        (FileNotFoundError("run `prepare` first"), "error: run `prepare` first\n"),
        (IsADirectoryError(21, "Is a directory", "a"), "error: a: Is a directory\n"),
    ],
)
def test_what_the_user_can_repair_is_one_line_and_exit_2(
    presets: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    text: str,
) -> None:
    monkeypatch.delenv("TYPER_STANDARD_TRACEBACK", raising=False)
    assert call(presets, ["train"], failure=failure)[0] == 2
    assert capsys.readouterr().err == text
    monkeypatch.setenv("TYPER_STANDARD_TRACEBACK", "1")
    assert call(presets, ["train"], failure=failure)[0] == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_exits_130_and_a_verb_may_choose_its_code(presets: Path) -> None:
    assert call(presets, ["train"], failure=KeyboardInterrupt())[0] == 130
    assert call(presets, ["train"], failure=SystemExit(143))[0] == 143
    assert call(presets, ["train"], failure=typer.Exit(3))[0] == 3


def test_other_exceptions_are_not_swallowed(presets: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(
            app_of(presets, Seen(), failure=ZeroDivisionError()),
            ["train"],
            prog_name="fake",
            flags_bool=(),
            aliases={},
            default_verb="train",
            verbs=("train",),
        )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ""),
        ("-h", "-h"),
        ("--help", "--help"),
        ("train --help", "train --help"),
        ("import_data --x_y a_b", "import-data --x-y a_b"),
        ("unknown_verb x_y", "unknown_verb x_y"),
        ("--state_dict_path=a_b/c_d.pt", "train --state-dict-path=a_b/c_d.pt"),
        ("--l_r=0.001", "train --lr=0.001"),
        ("-v --lr -1", "train -v --lr -1"),
        ("train --has_a=True --has-a=false --has_a=1 --has-a=0", "train --has-a --no-has-a --has-a --no-has-a"),
        ("train --has_a True --norm-first False", "train --has-a --no-norm-first"),
        ("train --has_a --lr 1", "train --has-a --lr 1"),
        ("train --no_has_a --no-has-a=False --no_has_a true", "train --no-has-a --has-a --no-has-a"),
        ("train --pre_norm=False --no_pre_norm --pre-norm", "train --no-norm-first --no-norm-first --norm-first"),
        ("train --no-lr 1", "train --no-lr 1"),
        ("train --tag True --epochs 1", "train --tag True --epochs 1"),
        ("train --has-a=maybe", "train --has-a=maybe"),
        ("train --num_epochs=3 -- --num_epochs --has_a=True", "train --epochs=3 -- --num_epochs --has_a=True"),
        ("train --tag=--has_a=True", "train --tag=--has_a=True"),
    ],
)
def test_words_are_rewritten_to_todays_spelling(line: str, expected: str) -> None:
    words = normalise_argv(
        line.split(), flags_bool={"has-a", "norm-first"}, aliases=ALIASES, default_verb="train", verbs=VERBS
    )
    assert words == expected.split()


def test_bool_flags_are_the_on_off_knobs() -> None:
    assert bool_flags(Config) == {"norm-first", "has-a"}


def test_verb_option_named_like_a_knob_is_a_mistake_of_the_app(presets: Path) -> None:
    with pytest.raises(AssertionError, match="lr"):

        @config_options(Config, presets=presets)
        def train(resolved: Resolved[Config], lr: float = 0.1) -> None: ...


NOW = datetime(2026, 11, 21, 4, 15, 0)


def test_run_folder_is_named_by_time_and_never_reused(tmp_path: Path) -> None:
    paths = [new_run_dir(tmp_path / "runs", "seqrec", "ml-1m", now=NOW) for _ in range(3)]
    assert [path.name for path in paths] == [
        "20261121-041500-ml-1m",
        "20261121-041500-ml-1m-2",
        "20261121-041500-ml-1m-3",
    ]
    assert all(path.is_dir() and path.parent == tmp_path / "runs" / "seqrec" for path in paths)


@pytest.mark.parametrize(
    "name", ["con", "NUL.txt", "a:b", "a/../b", "trailing. ", "", "...", "x" * 300, "caf\xe9 \u4e2d", "\0"]
)
def test_run_folder_name_is_valid_on_every_system(tmp_path: Path, name: str) -> None:
    path = new_run_dir(tmp_path, "seqrec", name, now=NOW)
    assert path.parent == tmp_path / "seqrec"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,80}", path.name)
    assert path.name[-1] not in ". "
    assert path.name.split(".")[0].upper() not in {"CON", "PRN", "AUX", "NUL", "COM1", "LPT1"}


def test_run_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError):
        new_run_dir(tmp_path / "runs", "seqrec", "x", now=NOW)


SCRIPT = """
from dataclasses import dataclass, field
from pathlib import Path

from shared.cli import bool_flags, config_options, make_app, run
from shared.config import Resolved, knob


@dataclass(frozen=True)
class TrainConfig:
    lr: float = knob(1e-3, "Learning rate.", above=0)


@dataclass(frozen=True)
class Config:
    training: TrainConfig = field(default_factory=TrainConfig)


app = make_app("fake", "A fake app, caf\\u00e9 \\u4e2d.")


@app.command()
@config_options(Config, presets=Path("nowhere"))
def train(resolved: Resolved[Config]) -> None:
    print(f"lr {resolved.config.training.lr} \\u4e2d \\U0001f600")


run(app, None, prog_name="fake", flags_bool=bool_flags(Config), aliases={}, default_verb="train", verbs=["train"])
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_console_with_few_characters_gets_question_marks_instead_of_a_crash(tmp_path: Path, encoding: str) -> None:
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT, encoding="ascii")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "COLUMNS": "60"}

    def process(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), *words]
        return subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )

    done = process("--lr", "1e-2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "lr 0.01 ? ?\n", "")
    for words, code, part in ((["train", "--help"], 0, "--lr"), (["--lr", "\u4e2d"], 2, "error: flag --lr")):
        done = process(*words)
        assert done.returncode == code
        assert part in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_output_files_are_refused_before_the_work(tmp_path):
    path = tmp_path / "new" / "out.safetensors"
    assert output_file(path, suffix=".safetensors") == path
    assert path.parent.is_dir()
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"is a folder; name a file to write, such as .*result\.json"):
        output_file(tmp_path)
    with pytest.raises(ConfigError, match=r"out\.bin: the name must end in \.safetensors; write to .*out\.safetensors"):
        output_file(tmp_path / "out.bin", suffix=".safetensors")
