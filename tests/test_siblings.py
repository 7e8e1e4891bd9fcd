"""Every app has the same silhouette: files, names, verbs, README headings, presets and a frozen list of flags.

An app is a folder below apps/ with a `__main__.py`; it only has to appear to be checked.
`python tests/test_siblings.py` writes the frozen lists anew after a change of a configuration.
"""

import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from shared.config import Knob, knobs, resolve  # noqa: E402

FILES = (
    "__init__.py",
    "__main__.py",
    "main.py",
    "config.py",
    "dataset.py",
    "formats.py",
    "demo.py",
    "model.py",
    "losses.py",
    "train.py",
    "evaluate.py",
    "bench.py",
    "originals.py",
    "diagnose.py",
    "README.md",
    "configs/default.yaml",
)
NAMES = {
    "config": ("Config", "DataConfig", "ModelConfig", "TrainConfig", "ALIASES"),
    "dataset": ("Batch",),
    "train": ("Components", "build", "loss_fn", "train_epoch", "fit"),
    "evaluate": ("evaluate",),
    "bench": ("ladder",),
    "diagnose": ("subject", "open_piece", "candidates", "dials"),
    "main": ("app",),
}
SECTIONS = {"data": "DataConfig", "model": "ModelConfig", "training": "TrainConfig"}
VERBS = ("train", "evaluate", "predict", "prepare", "check", "export", "bench", "diagnose", "tune-speed")
HEADINGS = (
    "What it is",
    "Quick start",
    "Data",
    "Commands",
    "Configuration",
    "Model and losses",
    "Evaluation protocol",
    "Speed",
    "Resuming and files",
    "Original -> ours",
)


def app_names(folder: Path) -> list[str]:
    """Every folder below `folder` that can be started; one without `__main__.py` is still being built."""
    return sorted({path.parent.name for path in folder.glob("*/__main__.py")})


def missing_files(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).is_file()]


def headings(markdown: str) -> list[str]:
    """The lines of a page that are headings of the first or second rank; a comment in a code block is none."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^##? .*", text, flags=re.MULTILINE)


def expected_headings(app: str) -> list[str]:
    return [f"# {app}", *(f"## {heading}" for heading in HEADINGS)]


def unlabelled_fields(source: str) -> list[str]:
    """The fields of the class Batch whose line has no comment."""
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Batch"]
    fields = [node for node in classes[0].body if isinstance(node, ast.AnnAssign)]
    return [ast.unparse(node.target) for node in fields if "  # " not in lines[node.lineno - 1]]


def flag_list(config_type: type) -> str:
    """One line per knob: flag, type, key in YAML. Defaults are no part of it: presets and tests hold those."""
    return "".join(f"{_flag(item)}  {item.key}\n" for item in knobs(config_type).values())


def _flag(item: Knob) -> str:
    if item.kind is bool and not item.many and not item.optional:
        return f"{item.flag}/--no-{item.flag.removeprefix('--')}"
    kind = "|".join(item.choices) or item.kind.__name__
    return f"{item.flag} {kind}{',...' if item.many else ''}{' or none' if item.optional else ''}"


def preset_command(text: str) -> list[str]:
    """The words of the command in the first line of a preset; empty where that line is no comment."""
    first = text.partition("\n")[0]
    return shlex.split(first.removeprefix("#")) if first.startswith("# ") else []


def module(app: str, name: str) -> ModuleType:
    return importlib.import_module(f"apps.{app}.{name}")


APPS = app_names(ROOT / "apps")
PRESETS = [
    pytest.param(app, path, id=f"{app}-{path.stem}")
    for app in APPS
    for path in sorted((ROOT / "apps" / app / "configs").glob("*.yaml"))
]


def test_apps_are_found():
    assert "seqrec" in APPS


@pytest.mark.parametrize("app", APPS)
def test_app_has_every_file(app: str):
    assert missing_files(ROOT / "apps" / app) == []


@pytest.mark.parametrize(("app", "name"), [(app, name) for app in APPS for name in NAMES])
def test_module_has_its_public_names(app: str, name: str):
    found = module(app, name)
    assert [wanted for wanted in NAMES[name] if not hasattr(found, wanted)] == []


@pytest.mark.parametrize("app", APPS)
def test_config_is_frozen_and_has_the_three_sections(app: str):
    config = module(app, "config")
    sections = {field.name: field.type for field in dataclasses.fields(config.Config)}
    assert sections == {name: getattr(config, section) for name, section in SECTIONS.items()}
    for frozen in (config.Config, *sections.values()):
        assert frozen.__dataclass_params__.frozen, f"{frozen.__name__} is not frozen"


@pytest.mark.parametrize("app", APPS)
def test_batch_is_a_named_tuple_with_labelled_fields(app: str):
    batch = module(app, "dataset").Batch
    assert issubclass(batch, tuple)
    assert batch._fields
    source = (ROOT / "apps" / app / "dataset.py").read_text(encoding="utf-8")
    assert unlabelled_fields(source) == [], "each field states its shape and dtype in a comment on its line"


@pytest.mark.parametrize("app", APPS)
def test_components_are_frozen(app: str):
    assert module(app, "train").Components.__dataclass_params__.frozen


def help_of(app: str, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `python -m apps.APP VERB --help` prints, without colours and on one wide screen."""
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with pytest.raises(SystemExit) as stopped:
        module(app, "main").app([verb, "--help"])
    captured = capsys.readouterr()
    assert stopped.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize(("app", "verb"), [(app, verb) for app in APPS for verb in VERBS])
def test_app_has_the_verb(app: str, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert f"python -m apps.{app} {verb}" in help_of(app, verb, capsys, monkeypatch)


@pytest.mark.parametrize("app", APPS)
def test_app_refuses_a_verb_it_does_not_have(app: str):
    with pytest.raises(SystemExit) as stopped:
        module(app, "main").app(["brew", "--help"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("app", APPS)
def test_readme_has_the_headings_in_order(app: str):
    assert headings((ROOT / "apps" / app / "README.md").read_text(encoding="utf-8")) == expected_headings(app)


@pytest.mark.parametrize("app", APPS)
def test_flags_are_the_frozen_ones(app: str):
    frozen = ROOT / "tests" / app / "flags.txt"
    found = frozen.read_text(encoding="utf-8") if frozen.is_file() else ""
    assert flag_list(module(app, "config").Config) == found, (
        f"the flags of {app} are not those of {frozen.relative_to(ROOT)}; if that is meant, run "
        "`python tests/test_siblings.py`, look at the difference, and name it in CHANGELOG.md"
    )


@pytest.mark.parametrize("app", APPS)
def test_there_is_a_preset(app: str):
    assert app in [str(parameter.values[0]) for parameter in PRESETS]


@pytest.mark.parametrize(("app", "path"), PRESETS)
def test_preset_loads_strictly(app: str, path: Path):
    config = module(app, "config")
    resolved = resolve(config.Config, yaml_path=path, aliases=config.ALIASES)
    assert str(path) in resolved.sources.values(), "the preset sets nothing"


@pytest.mark.parametrize(("app", "path"), PRESETS)
def test_preset_begins_with_its_command(
    app: str, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = preset_command(path.read_text(encoding="utf-8"))
    assert words[:3] == ["python", "-m", f"apps.{app}"], "the first line is the exact command that uses the preset"
    assert ("--config", path.stem) in itertools.pairwise(words)
    options = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(app, words[3], capsys, monkeypatch)))
    unknown = [word for word in words[4:] if word.startswith("--") and word.partition("=")[0] not in options]
    assert unknown == []


# The checks themselves


def test_a_new_folder_that_can_be_started_is_an_app(tmp_path: Path):
    names = ("b/__main__.py", "a/__main__.py", "a/model.py", "__init__.py", "notes/readme.txt", "begun/model.py")
    for name in (f"apps/{name}" for name in names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert app_names(tmp_path / "apps") == ["a", "b"]


def test_every_missing_file_is_named(tmp_path: Path):
    (tmp_path / "configs").mkdir()
    for name in FILES:
        (tmp_path / name).touch()
    assert missing_files(tmp_path) == []
    (tmp_path / "losses.py").unlink()
    (tmp_path / "configs/default.yaml").unlink()
    assert missing_files(tmp_path) == ["losses.py", "configs/default.yaml"]


def test_headings_leave_code_and_lower_ranks_out():
    page = "# a\n\n## What it is\n```bash\n# a comment\n## another\n```\n### Detail\n#hash\n## Data\n"
    assert headings(page) == ["# a", "## What it is", "## Data"]


def test_fields_without_a_comment_are_named():
    source = "class Batch(NamedTuple):\n    user: Tensor  # [B] int64\n    item: Tensor\n    mask: Tensor | None\n"
    assert unlabelled_fields(source) == ["item", "mask"]


def test_preset_command_is_the_first_comment():
    assert preset_command("# python -m apps.a train --config 'x y'\ndata:\n") == [
        "python",
        "-m",
        "apps.a",
        "train",
        "--config",
        "x y",
    ]
    assert preset_command("data:\n# python -m apps.a train\n") == []


def write_flag_lists() -> None:
    """Write tests/<app>/flags.txt of every app."""
    for app in APPS:
        path = ROOT / "tests" / app / "flags.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(flag_list(module(app, "config").Config), encoding="utf-8", newline="\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    write_flag_lists()
