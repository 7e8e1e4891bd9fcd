"""What a user of a YAML file or a flag notices: precedence, types as declared, and messages that name the repair."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import ConfigError, Resolved, as_dict, dump_yaml, knob, knobs, resolve


@dataclass(frozen=True)
class DataConfig:
    batch_size: int = knob(64, "Users per step.", minimum=1)
    path: str | None = knob(None, "Folder of the data.")


@dataclass(frozen=True)
class ModelConfig:
    embed_dim: int = knob(64, "Embedding dimension.", minimum=1)
    dropout: float = knob(0.2, "Share of values dropped.", minimum=0, below=1)
    norm_first: bool = knob(True, "Normalise before each block.")
    name: str = knob("sasrec", "Name of the model.")


@dataclass(frozen=True)
class TrainConfig:
    learning_rate: float = knob(1e-3, "Learning rate.", above=0)
    optimizer: str = knob("adam", "Optimizer.", choices=("adam", "adamw", "muon"))
    cutoffs: tuple[int, ...] = knob((5, 10), "Cut-offs of the metrics.", minimum=1)
    tags: tuple[str, ...] = knob((), "Words for the log.")
    clip: float | None = knob(None, "Gradient norm limit.", above=0)


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainConfig = field(default_factory=TrainConfig)


DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"batch_size": 64, "path": None},
    "model": {"embed_dim": 64, "dropout": 0.2, "norm_first": True, "name": "sasrec"},
    "training": {"learning_rate": 1e-3, "optimizer": "adam", "cutoffs": [5, 10], "tags": [], "clip": None},
}


def load(tmp_path: Path, text: str | bytes, **more: Any) -> Resolved[Config]:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve(Config, yaml_path=path, **more)


def refusal(tmp_path: Path, text: str | bytes, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **more)
    return str(caught.value)


def test_flag_wins_over_yaml_and_yaml_over_default(tmp_path: Path) -> None:
    text = "model:\n  embed_dim: 32\n  dropout: 0.5\n"
    resolved = load(tmp_path, text, yaml_label="preset x.yaml", flags={"dropout": "0.1"})
    assert resolved.config.model == ModelConfig(embed_dim=32, dropout=0.1)
    assert resolved.sources["model.embed_dim"] == "preset x.yaml"
    assert resolved.sources["model.dropout"] == "flag --dropout"
    assert resolved.sources["model.norm_first"] == "default"
    assert set(resolved.sources) == {f"{section}.{name}" for section, part in DEFAULTS.items() for name in part}


def test_source_of_an_unlabelled_file_is_its_path(tmp_path: Path) -> None:
    resolved = load(tmp_path, "data:\n  batch_size: 3\n")
    assert resolved.sources["data.batch_size"] == str(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "data:\n", "data: {}\n", "\ufeffdata:\n"])
def test_empty_file_or_section_means_defaults(tmp_path: Path, text: Any) -> None:
    assert load(tmp_path, text).config == Config()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("training: {learning_rate: 1e-3}", 1e-3),
        ("training: {learning_rate: 1e3}", 1000.0),
        ("training: {learning_rate: 1}", 1.0),
        ("training: {learning_rate: 1_000.5}", 1000.5),
        ("training: {learning_rate: '1e-3'}", 1e-3),
        ("training: {clip: null}", None),
        ("training: {clip: None}", None),
        ("training: {clip: }", None),
        ("training: {clip: 5}", 5.0),
        ("training: {cutoffs: [1, 20]}", (1, 20)),
        ("training: {cutoffs: []}", ()),
        ("training: {cutoffs: '1,20'}", (1, 20)),
        ("training: {cutoffs: 7}", (7,)),
        ("training: {tags: [a b, 'no', 12]}", ("a b", "no", "12")),
        ("data: {batch_size: 012}", 12),
        ("data: {batch_size: 1_024}", 1024),
        ("data: {path: 'none'}", "none"),
        ("data: {path: none}", None),
        ("data: {path: 12:30}", "12:30"),
        ("model: {norm_first: no}", False),
        ("model: {norm_first: ON}", True),
        ("model: {norm_first: 'false'}", False),
        ("model: {name: 012}", "012"),
        ("model: {name: 1e-3}", "1e-3"),
        ("model: {name: 2026-11-21}", "2026-11-21"),
        ("model: {name: 'no'}", "no"),
        ("model: {name: ''}", ""),
    ],
)
def test_yaml_value_is_read_by_its_declared_type(tmp_path: Path, line: Any, expected: Any) -> None:
    config = as_dict(load(tmp_path, line).config)
    [(section, part)] = yaml.load(line, Loader=yaml.BaseLoader).items()
    value = config[section][next(iter(part))]
    value = tuple(value) if isinstance(value, list) else value
    assert (type(value), value) == (type(expected), expected)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("data: {batch_size: 64.0}", ["data.batch_size is '64.0'", "an integer"]),
        ("data: {batch_size: true}", ["'true'", "an integer"]),
        ("data: {batch_size: 0x10}", ["'0x10'"]),
        ("data: {batch_size: 12:30}", ["'12:30'"]),
        ("data: {batch_size: }", ["empty or null", "an integer"]),
        ("data: {batch_size: [1]}", ["a list", "an integer"]),
        ("data: {batch_size: {a: 1}}", ["a mapping"]),
        ("data: {batch_size: 0}", ["data.batch_size is 0", ">= 1"]),
        ("data: {path: yes}", ["quote it", '"yes"']),
        ("model: {dropout: 1}", ["model.dropout is 1.0", "< 1"]),
        ("model: {dropout: .nan}", ["'.nan'"]),
        ("model: {dropout: 1e999}", ["inf"]),
        ("model: {norm_first: maybe}", ["'maybe'", "true or false"]),
        ("model: {name: no}", ["model.name", 'quote it: "no"']),
        ("model: {name: null}", ["empty or null"]),
        ("model: {name: !!python/name:os.system }", ["tag"]),
        ("model: {name: !mine x}", ["tag !mine"]),
        ("training: {optimizer: adamm}", ["'adamm'", "one of adam, adamw, muon", "did you mean adam"]),
        ("training: {cutoffs: [1, 0]}", ["training.cutoffs is 0"]),
        ("training: {cutoffs: [1, x]}", ["'x'"]),
        ("training: {cutoffs: [[1]]}", ["a list"]),
        ("training: {tags: [no]}", ["quote it"]),
        ("training: {learning_rate: 0}", ["training.learning_rate is 0.0", "> 0"]),
        ("training: {clip: fast}", ["'fast'", "or none"]),
    ],
)
def test_yaml_value_of_another_type_or_range_is_refused(tmp_path: Path, line: Any, parts: Any) -> None:
    message = refusal(tmp_path, f"# head\n{line}\n")
    assert message.startswith(f"{tmp_path / 'x.yaml'}, line 2: ")
    for part in parts:
        assert part in message


def test_unknown_key_names_line_nearest_and_valid_keys(tmp_path: Path) -> None:
    message = refusal(tmp_path, "training:\n  clip: 1.0\n  learning_rat: 0.1\n")
    assert message == (
        f"{tmp_path / 'x.yaml'}, line 3: unknown key training.learning_rat; did you mean learning_rate? "
        "valid keys: learning_rate, optimizer, cutoffs, tags, clip"
    )


def test_key_of_another_section_is_sent_there(tmp_path: Path) -> None:
    assert "batch_size belongs into section data" in refusal(tmp_path, "training:\n  batch_size: 3\n")
    assert "did you mean data.batch_size?" in refusal(tmp_path, "training:\n  batch_sizes: 3\n")


def test_unknown_section_and_flat_files_name_the_section(tmp_path: Path) -> None:
    assert "line 1: unknown section 'trainig'; did you mean training?" in refusal(tmp_path, "trainig:\n  clip: 1\n")
    assert "clip belongs into section training" in refusal(tmp_path, "clip: 1.0\n")
    assert "unknown section '<<'" in refusal(tmp_path, "data: &a {batch_size: 1}\n<<: *a\n")


@pytest.mark.parametrize(
    "text", ["training:\n  clip: 1.0\n  clip: 1.0\n", "data:\n  path: a\ndata:\n  batch_size: 3\n"]
)
def test_key_given_twice_is_refused_with_both_lines(tmp_path: Path, text: Any) -> None:
    message = refusal(tmp_path, text)
    assert "line 3: key " in message
    assert f"first on line {1 if text.startswith('data') else 2}" in message


def test_names_of_the_past_are_accepted_in_either_spelling(tmp_path: Path) -> None:
    for aliases in ({"hidden_units": "embed_dim"}, {"hidden-units": "embed-dim"}):
        resolved = load(tmp_path, "model:\n  hidden_units: 128\n", aliases=aliases)
        assert resolved.config.model.embed_dim == 128
        message = refusal(tmp_path, "model:\n  hidden_units: 128\n  embed_dim: 64\n", aliases=aliases)
        assert "line 3: embed_dim sets model.embed_dim, and so does line 2" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"data:\n  path: caf\xe9\n", "line 2: not UTF-8"),
        (b"data:\n  path: [1\n", "line 3: not valid YAML"),
        (b"data:\n\tpath: x\n", "line 2: not valid YAML"),
        (b"data:\n  path: a\x01b\n", "line 2: not valid YAML"),
        (b"data: {}\n---\nmodel: {}\n", "line 2: not valid YAML"),
        (b'data:\n  path: "\\UFFFFFFFF"\n', "not valid YAML"),
        (b"[" * 2000, "not valid YAML"),
        (b"- data\n", "line 1: the file must be a mapping"),
        (b"data\n", "line 1: the file must be a mapping"),
        (b"data: 3\n", "line 1: section data must be a mapping"),
        (b"[data]: 3\n", "line 1: a key must be a word"),
    ],
)
def test_file_that_is_no_configuration_is_refused_with_its_line(tmp_path: Path, content: Any, part: Any) -> None:
    message = refusal(tmp_path, content)
    assert message.startswith(str(tmp_path / "x.yaml"))
    assert part in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", "128", 128),
        ("batch_size", 128, 128),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("norm_first", False, False),
        ("norm_first", "False", False),
        ("clip", "none", None),
        ("clip", None, None),
        ("cutoffs", "1, 5,10", (1, 5, 10)),
        ("cutoffs", [1, 5], (1, 5)),
        ("tags", "", ()),
        ("name", "none", "none"),
        ("path", "None", None),
        ("path", "a,b", "a,b"),
    ],
)
def test_flag_may_be_text_or_typed(name: Any, value: Any, expected: Any) -> None:
    config = as_dict(resolve(Config, flags={name: value}).config)
    [found] = (part[name] for part in config.values() if name in part)
    found = tuple(found) if isinstance(found, list) else found
    assert (type(found), found) == (type(expected), expected)


def test_refused_flag_names_the_flag() -> None:
    with pytest.raises(
        ConfigError, match=r"^flag --learning-rate: training.learning_rate is 'fast'; expected a number"
    ):
        resolve(Config, flags={"learning_rate": "fast"})
    with pytest.raises(ConfigError, match="unknown flag --learning-rat; did you mean learning_rate"):
        resolve(Config, flags={"learning_rat": "1"})


def test_dictionaries_hold_lists_and_survive_json() -> None:
    assert as_dict(Config()) == DEFAULTS
    assert json.loads(json.dumps(as_dict(Config()))) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("embed_dim", True, "model.embed_dim is True; expected an integer"),
        ("dropout", True, "model.dropout is True"),
        ("embed_dim", 1.0, "model.embed_dim is 1.0"),
        ("embed_dim", None, "model.embed_dim is none"),
        ("name", 3, "model.name is 3"),
        ("cutoffs", 5, "training.cutoffs is 5; expected integers"),
        ("learning_rate", float("nan"), "training.learning_rate is nan"),
        ("learning_rate", 10**400, "training.learning_rate is 1000"),
    ],
)
def test_typed_flag_of_another_type_is_refused(name: Any, value: Any, part: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Config, flags={name: value})
    assert part in str(caught.value)


def test_dump_says_where_each_value_came_from(tmp_path: Path) -> None:
    resolved = load(tmp_path, "model:\n  dropout: 0.5\n", yaml_label="preset x.yaml", flags={"learning_rate": "1e-5"})
    lines = dump_yaml(resolved).splitlines()
    assert "  dropout: 0.5  # preset x.yaml" in lines
    assert "  learning_rate: 1.0e-05  # flag --learning-rate" in lines
    assert '  optimizer: "adam"  # default' in lines


def test_dump_is_ascii_and_one_line_per_value_whatever_the_source_is_called() -> None:
    resolved = resolve(Config)
    sources = dict.fromkeys(resolved.sources, "caf\xe9\n# x")
    text = dump_yaml(Resolved(resolved.config, sources))
    assert text.isascii()
    assert yaml.safe_load(text) == DEFAULTS


AWKWARD = [
    "no",
    "1e-3",
    "",
    "null",
    "~",
    "012",
    "12:30",
    "# x",
    "a: b",
    " pad ",
    "\\",
    '"',
    "\n",
    "\x85",
    "\u2028",
    "\U0001f600",
]
WORDS = st.sampled_from(AWKWARD) | st.text(max_size=8)
FLOATS = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.sampled_from([1e-5, 1e16, 1e22, 5e-324])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    path=st.none() | WORDS,
    name=WORDS,
    lr=FLOATS,
    clip=st.none() | FLOATS,
    norm_first=st.booleans(),
    tags=st.lists(WORDS, max_size=3),
    cutoffs=st.lists(st.integers(1, 2**63), max_size=3),
)
def test_dumped_file_reads_back_to_the_same_configuration(
    tmp_path_factory: pytest.TempPathFactory,
    path: Any,
    name: Any,
    lr: Any,
    clip: Any,
    norm_first: Any,
    tags: Any,
    cutoffs: Any,
) -> None:
    config = Config(
        DataConfig(path=path),
        ModelConfig(name=name, norm_first=norm_first),
        TrainConfig(learning_rate=lr, clip=clip, tags=tuple(tags), cutoffs=tuple(cutoffs)),
    )
    text = dump_yaml(Resolved(config, dict.fromkeys(resolve(Config).sources, "flag --x")))
    assert yaml.safe_load(text) == as_dict(config)  # another reader, which guesses types
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(text, encoding="ascii", newline="\n")
    assert resolve(Config, yaml_path=file).config == config


def test_definitions_that_cannot_work_fail_at_once() -> None:
    def config_of(*sections: type) -> type:
        return dataclasses.make_dataclass(
            "Broken", [(f"part{i}", section, field(default_factory=section)) for i, section in enumerate(sections)]
        )

    @dataclass(frozen=True)
    class Again:
        embed_dim: int = knob(3, "Embedding dimension.")

    @dataclass(frozen=True)
    class OutOfRange:
        rate: float = knob(2.0, "Rate.", maximum=1)

    @dataclass(frozen=True)
    class IntegerDefault:
        rate: float = knob(2, "Rate.")

    @dataclass(frozen=True)
    class Unsupported:
        rates: bytes = knob(b"", "Rates.")

    @dataclass(frozen=True)
    class Plain:
        rate: float = 1.0

    with pytest.raises(ConfigError, match=r"part0\.rate is 2\.0"):
        knobs(config_of(OutOfRange))
    for sections in [(ModelConfig, Again), (IntegerDefault,), (Unsupported,), (Plain,)]:
        with pytest.raises(AssertionError):
            knobs(config_of(*sections))


def test_importing_configuration_and_command_line_does_not_load_torch() -> None:
    script = (
        "import sys, shared.config, shared.cli, shared.progress\n"
        "print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
