"""One value from defaults, a strict YAML file and flags, with the source of every part of it.

A field of a section dataclass is a knob: type, default, one sentence with its unit. Flags, help text, YAML keys and
the resolved config.yaml of a run are views of it. Precedence: default < YAML < flag. A value is read by its declared
type, so `1e-3` is a float and `012` is twelve; what YAML would guess does not matter.

An app writes three frozen section dataclasses and one frozen Config that holds them:

    @dataclass(frozen=True)
    class TrainConfig:
        lr: float = knob(1e-3, "Learning rate after warm-up.", above=0)

    @dataclass(frozen=True)
    class Config:
        training: TrainConfig = field(default_factory=TrainConfig)

This module must not import torch: the help text of an app is built from it.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

C = TypeVar("C")

BOOL_WORDS: Mapping[str, bool] = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
NONE_WORDS = frozenset({"none", "null"})

_KINDS: Mapping[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
_KINDS_MANY: Mapping[type, str] = {
    bool: "a list of true or false",
    int: "integers like 1,5,10",
    float: "numbers like 0.1,0.5",
    str: "words like a,b",
}
_YAML = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_YAML + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"))
_INTEGER = re.compile(r"[+-]?[0-9](_?[0-9]){0,30}")
_NUMBER = re.compile(r"[+-]?([0-9](_?[0-9])*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class ConfigError(ValueError):
    """A configuration that cannot be used: names the place, the key, what was found and what is expected."""


@dataclass(frozen=True)
class Knob:
    """One field of a section: where it lives, what it may hold, and the sentence that explains it."""

    section: str
    name: str
    kind: type  # bool, int, float or str; of a tuple's elements where many
    many: bool  # a tuple of any length
    optional: bool  # None is allowed
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None  # inclusive
    above: float | None = None  # exclusive
    maximum: float | None = None  # inclusive
    below: float | None = None  # exclusive

    @property
    def key(self) -> str:
        """The name in a YAML file and in messages: section.field."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """The name on the command line: --kebab-case."""
        return _flag(self.name)

    @property
    def limits(self) -> str:
        """The allowed range such as ">= 0, < 1"; empty where there is none."""
        bounds = ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below))
        return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)

    @property
    def expected(self) -> str:
        """What a value of this knob looks like, in words."""
        if self.choices:
            words = ("any of " if self.many else "one of ") + ", ".join(self.choices)
        else:
            words = (_KINDS_MANY if self.many else _KINDS)[self.kind]
        return words + (f" {self.limits}" if self.limits else "") + (" or none" if self.optional else "")


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """A configuration and, for each "section.field", where its value came from."""

    config: C
    sources: dict[str, str]  # "training.lr" -> "default" | "preset ml-1m.yaml" | "flag --lr"


def knob(
    default: Any,
    help: str,  # noqa: A002
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field with a default, one sentence of help with its unit, and the values allowed.

    minimum and maximum are inclusive, above and below exclusive. On a tuple they and the choices hold for its elements.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices), **limits})


def knobs(config_type: type) -> dict[str, Knob]:
    """Return every knob of a Config by field name, in the order of its sections.

    A definition that cannot work (a name in two sections, an unsupported type, a default out of range) fails here.
    """
    found: dict[str, Knob] = {}
    for section, section_type in _sections(config_type).items():
        hints = typing.get_type_hints(section_type)
        for field in dataclasses.fields(section_type):
            assert "help" in field.metadata, f"{section}.{field.name} is not made by knob()"
            assert field.name not in found, f"{field.name} is in two sections: {found[field.name].section}, {section}"
            kind, many, optional = _declared(hints[field.name], f"{section}.{field.name}")
            item = Knob(section, field.name, kind, many, optional, field.default, **field.metadata)
            assert not item.choices or kind is str, f"{item.key}: choices are for str"
            assert repr(_typed(item, item.default, "default")) == repr(item.default), f"{item.key}: default"
            found[field.name] = item
    return found


def resolve(
    config_type: type[C],
    *,
    yaml_path: Path | None = None,
    yaml_label: str | None = None,
    flags: Mapping[str, Any] = types.MappingProxyType({}),
    aliases: Mapping[str, str] = types.MappingProxyType({}),
) -> Resolved[C]:
    """Return the configuration made of defaults, then the YAML file, then flags, and the source of each value.

    flags maps field names to text, as typed on the command line, or to typed values; only flags that were given belong
    in it. aliases maps names of the past to field names, for the keys of the file. yaml_label names the file in the
    sources; messages always name its path. Raises ConfigError; a file that cannot be opened raises OSError.
    """
    table = knobs(config_type)
    values: dict[str, Any] = {}
    sources = {item.key: "default" for item in table.values()}
    if yaml_path is not None:
        for name, value in _read_yaml(config_type, yaml_path, _underscored(aliases)).items():
            values[name] = value
            sources[table[name].key] = yaml_label or str(yaml_path)
    for name, value in flags.items():
        if name not in table:
            raise ConfigError(f"unknown flag {_flag(name)}{_suggestion(_nearest(name, table)).rstrip(';')}")
        item = table[name]
        source = f"flag {item.flag}"
        values[name] = _from_text(item, value, source) if isinstance(value, str) else _typed(item, value, source)
        sources[item.key] = source
    return Resolved(_build(config_type, values), sources)


def as_dict(config: Any) -> dict[str, dict[str, Any]]:
    """Return the configuration as nested plain dictionaries, ready for JSON: tuples become lists."""
    return {
        section: {name: list(value) if isinstance(value, tuple) else value for name, value in part.items()}
        for section, part in dataclasses.asdict(config).items()
    }


def dump_yaml(resolved: Resolved[Any]) -> str:
    """Return the configuration as YAML that resolve reads back equal; a comment behind each value names its source."""
    lines = []
    for section in dataclasses.fields(resolved.config):
        part = getattr(resolved.config, section.name)
        lines.append(f"{section.name}:")
        for field in dataclasses.fields(part):
            source = re.sub(r"[^ -~]", "?", resolved.sources[f"{section.name}.{field.name}"])
            lines.append(f"  {field.name}: {_yaml_value(getattr(part, field.name))}  # {source}")
    return "\n".join(lines) + "\n"


# Definition


def _sections(config_type: type) -> dict[str, type]:
    """Return the section dataclasses of a Config by name, in order."""
    assert dataclasses.is_dataclass(config_type)
    hints = typing.get_type_hints(config_type)
    sections = {field.name: hints[field.name] for field in dataclasses.fields(config_type)}
    for name, section in sections.items():
        assert dataclasses.is_dataclass(section), f"{name}: a section is a dataclass"
    return sections


def _declared(hint: Any, key: str) -> tuple[type, bool, bool]:
    """Return (kind, many, optional) of a type hint."""
    arguments = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arguments = list(typing.get_args(hint))
    optional = type(None) in arguments
    kinds = [argument for argument in arguments if argument is not type(None)]
    assert len(kinds) == 1, f"{key}: unsupported type {hint}"
    kind, many = kinds[0], False
    if typing.get_origin(kind) is tuple:
        element, *rest = typing.get_args(kind)
        assert rest == [...], f"{key}: a tuple is tuple[type, ...]"
        kind, many = element, True
    assert kind in _KINDS, f"{key}: unsupported type {hint}"
    return kind, many, optional


def _build(config_type: type[C], values: Mapping[str, Any]) -> C:
    """Return the Config whose fields are the given values and otherwise the defaults."""
    chosen = {name: values.get(name, item.default) for name, item in knobs(config_type).items()}
    parts = {
        section: section_type(**{field.name: chosen[field.name] for field in dataclasses.fields(section_type)})
        for section, section_type in _sections(config_type).items()
    }
    return config_type(**parts)


# Values


def _typed(item: Knob, value: Any, where: str) -> Any:
    """Return a value as its knob holds it: lists become tuples, and integers become floats where declared."""
    if value is None and item.optional:
        return None
    if not item.many:
        return _typed_scalar(item, value, where)
    if not isinstance(value, list | tuple):
        raise _refused(item, value, where)
    return tuple(_typed_scalar(item, element, where) for element in value)


def _typed_scalar(item: Knob, value: Any, where: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if item.kind is float and is_number:
        try:
            return _within(item, float(value), where)
        except OverflowError:
            raise _refused(item, value, where) from None
    if not isinstance(value, item.kind) or (item.kind is int and not is_number):
        raise _refused(item, value, where)
    return _within(item, value, where)


def _from_text(item: Knob, text: str, where: str) -> Any:
    """Return the value that a text stands for: `none` where None is allowed, commas between the elements of a tuple."""
    if item.optional and text.strip().lower() in NONE_WORDS:
        return None
    if not item.many:
        return _scalar_from_text(item, text, where)
    parts = text.split(",") if text.strip() else []
    return tuple(_scalar_from_text(item, part.strip(), where) for part in parts)


def _scalar_from_text(item: Knob, text: str, where: str) -> Any:
    word = text.strip()
    value: Any = None
    if item.kind is str:
        value = text
    elif item.kind is bool:
        value = BOOL_WORDS.get(word.lower())
    elif item.kind is int and _INTEGER.fullmatch(word):
        value = int(word)
    elif item.kind is float and _NUMBER.fullmatch(word):
        value = float(word)
    if value is None:
        raise _refused(item, text, where)
    return _within(item, value, where)


def _within(item: Knob, value: Any, where: str) -> Any:
    """Return the value, which has the declared type, after the check of choices and range."""
    if item.choices and value not in item.choices:
        raise _refused(item, value, where, _suggestion(_nearest(value, item.choices)).rstrip(";"))
    if item.kind in (int, float) and not (
        (item.kind is int or math.isfinite(value))
        and (item.minimum is None or value >= item.minimum)
        and (item.above is None or value > item.above)
        and (item.maximum is None or value <= item.maximum)
        and (item.below is None or value < item.below)
    ):
        raise _refused(item, value, where)
    return value


def _refused(item: Knob, value: Any, where: str, hint: str = "") -> ConfigError:
    return ConfigError(f"{where}: {item.key} is {_shown(value)}; expected {item.expected}{hint}")


def _shown(value: object) -> str:
    """Return a value for a message, cut where it is long."""
    text = "none" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(name: object, candidates: Iterable[str]) -> str | None:
    """Return the candidate that looks most like the name, None where none is near."""
    return next(iter(difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.5)), None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _suggestion(near: str | None) -> str:
    return f"; did you mean {near}?" if near else ";"


def _unknown_section(config_type: type, section: object, where: str) -> ConfigError:
    sections = list(_sections(config_type))
    item = knobs(config_type).get(str(section))
    hint = f"; {item.name} belongs into section {item.section};" if item else _suggestion(_nearest(section, sections))
    return ConfigError(f"{where}: unknown section {_shown(section)}{hint} valid sections: {', '.join(sections)}")


def _unknown_key(config_type: type, section: str, name: object, where: str) -> ConfigError:
    table = knobs(config_type)
    own = [item.name for item in table.values() if item.section == section]
    near = _nearest(name, own) or _nearest(name, table)
    if name in table:
        hint = f"; {name} belongs into section {table[str(name)].section};"
    else:
        hint = _suggestion(near if near is None or near in own else table[near].key)
    return ConfigError(f"{where}: unknown key {section}.{str(name)[:80]}{hint} valid keys: {', '.join(own)}")


# YAML


def _read_yaml(config_type: type, path: Path, aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that a YAML file gives, by field name, each read by its declared type."""
    root = _compose(path)
    sections = _sections(config_type)
    table = knobs(config_type)
    values: dict[str, Any] = {}
    for section, _, node in _items(root, path, "the file"):
        where = _place(path, section)
        if section.value not in sections:
            raise _unknown_section(config_type, section.value, where)
        lines: dict[str, int] = {}
        for key, line, value in _items(node, path, f"section {section.value}"):
            name = key.value if key.value in table else aliases.get(key.value, key.value)
            if name not in table or table[name].section != section.value:
                raise _unknown_key(config_type, section.value, name, _place(path, key))
            if name in lines:
                both = f"{key.value} sets {table[name].key}, and so does line {lines[name]}"
                raise ConfigError(f"{_place(path, key)}: {both}; keep one of them")
            lines[name] = line
            values[name] = _from_node(table[name], value, path)
    return values


def _compose(path: Path) -> yaml.Node | None:
    """Return the root node of a YAML file, None for an empty one; nothing in it is turned into an object."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.reason}") from error
    except (RecursionError, ValueError, OverflowError) as error:  # nested too deeply, or an impossible \U escape
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return node


def _items(node: yaml.Node | None, path: Path, what: str) -> list[tuple[yaml.ScalarNode, int, yaml.Node]]:
    """Return (key, line, value) of a mapping node; an empty place is an empty mapping; a repeated key is refused."""
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _YAML + "null"):
        return []
    if not isinstance(node, yaml.MappingNode) or node.tag != _YAML + "map":
        raise ConfigError(f"{_place(path, node)}: {what} must be a mapping of keys to values")
    first: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{_place(path, key)}: a key must be a word")
        if key.value in first:
            raise ConfigError(f"{_place(path, key)}: key {key.value} is given twice, first on line {first[key.value]}")
        first[key.value] = key.start_mark.line + 1
    return [(key, key.start_mark.line + 1, value) for key, value in node.value]


def _from_node(item: Knob, node: yaml.Node, path: Path) -> Any:
    """Return the value of a YAML node as its knob declares it."""
    where = _place(path, node)
    if item.optional and isinstance(node, yaml.ScalarNode) and node.style is None and _is_none_word(node):
        return None
    if item.many and isinstance(node, yaml.SequenceNode) and node.tag == _YAML + "seq":
        return tuple(_scalar_from_text(item, _text(item, part, path), _place(path, part)) for part in node.value)
    text = _text(item, node, path)
    return _from_text(item, text, where) if item.many else _scalar_from_text(item, text, where)


def _is_none_word(node: yaml.ScalarNode) -> bool:
    return node.tag == _YAML + "null" or node.value.lower() in NONE_WORDS


def _text(item: Knob, node: yaml.Node, path: Path) -> str:
    """Return the text of a scalar node, as it stands in the file; what YAML would guess wrongly from it is refused."""
    where = _place(path, node)
    if not isinstance(node, yaml.ScalarNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        raise ConfigError(f"{where}: {item.key} is {found}; expected {item.expected}")
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{where}: {item.key} has the tag {node.tag}; expected {item.expected} without a tag")
    if node.style is None and node.tag == _YAML + "null":
        raise ConfigError(f"{where}: {item.key} is empty or null; expected {item.expected}")
    if item.kind is str and node.style is None and node.tag == _YAML + "bool":
        raise ConfigError(f'{where}: {item.key} is the truth value {node.value}; for text quote it: "{node.value}"')
    text: str = node.value
    return text


def _place(path: Path, node: yaml.Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _yaml_value(value: Any) -> str:
    """Return one value in YAML that every reader takes for the same type: strings quoted, floats with a dot."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        mantissa, mark, exponent = repr(value).partition("e")
        return mantissa + ("" if "." in mantissa else ".0") + mark + exponent
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml_value(element) for element in value) + "]"
    return str(value)


def _escaped(text: str) -> str:
    """Return the text as printable ASCII with the escapes of YAML's double quotes."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in '"\\':
            return "\\" + match[0]
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return re.sub(r"[^ !#-\[\]-~]", escape, text)


def _underscored(aliases: Mapping[str, str]) -> dict[str, str]:
    """Return the alias table in YAML's spelling; the command line writes the same names with hyphens."""
    return {old.replace("-", "_"): new.replace("-", "_") for old, new in aliases.items()}
