"""Read a run's settings: one YAML file and its overrides, converted strictly by the types that the schema declares.

Every value reaches its dataclass as a string, a list or a mapping of strings, and is converted by the declared type, so
that `5e-7` is a float and `off` a word where a word is wanted, whatever YAML makes of them.
"""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from pipeline.base.errors import ConfigError, did_you_mean
from pipeline.config.schema import FALSE_WORDS, NULL_WORDS, TRUE_WORDS, Config

__all__ = [
    "as_dict",
    "convert",
    "load_config",
    "settings_text",
]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's settings from YAML and put `key=value` overrides (`loss.beta=0.2`) on top.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown or twice there, a value has the wrong
            type or is impossible. The message names the key.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_CONFIG + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: can't be read ({_reason(error)})") from error
    if len(content) > _LARGEST_CONFIG:
        raise ConfigError(f"--config {path}: larger than {_LARGEST_CONFIG:,} bytes; is it the right file?")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like `data:` and `policy:` at the top, found {_kind(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    _refuse_passwords(tree, "")
    return _expand_home(typing.cast(Config, _build(Config, tree, "")))


_LARGEST_CONFIG = 2**20


_MOST_VALUES = 100_000


def _refuse_passwords(value: Any, where: str) -> None:
    """Settings are saved beside shards and policy, and shown in messages: no place for what opens an account."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_passwords(item, f"{where}.{key}" if where else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_passwords(item, f"{where}[{i}]")
    elif isinstance(value, str) and re.search(r"://[^/?#\s]*@", value):
        # The value is not shown, since the message goes to a log.
        raise ConfigError(
            f"{where}: holds a user name or password; take it out, and give it by the environment (HF_TOKEN, "
            "AWS_ACCESS_KEY_ID, ...)"
        )


def _expand_home(config: Config) -> Config:
    """Read `~` in the paths of data and shards, as model folders and the library's own paths do."""
    data, precompute = config.data, config.precompute
    sets = {
        name: dataclasses.replace(held_out, path=held_out.path and _from_home(held_out.path))
        for name, held_out in data.eval.items()
    }
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, path=_from_home(data.path), eval=sets),
        precompute=dataclasses.replace(
            precompute,
            output=_from_home(precompute.output),
            reuse=[_from_home(store) for store in precompute.reuse],
        ),
    )


def _from_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user here to have a home folder") from error


def as_dict(config: Config) -> dict[str, Any]:
    """The settings as plain dicts, lists and scalars, defaults filled in: what is saved beside a run."""
    return dataclasses.asdict(config)


def settings_text(config: Config) -> str:
    """The settings as a YAML file that `load_config` reads, defaults filled in. Access tokens are left out."""
    settings = as_dict(config)
    settings["train"] = {key: value for key, value in settings["train"].items() if not key.endswith("_token")}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class _Loader(yaml.BaseLoader):
    """Leaves every scalar a string, refuses a key that is there twice, and tags of types that YAML does not have."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise yaml.YAMLError(f"line {line}: a key must be a word")
        if key in result:
            raise yaml.YAMLError(f"line {line}: key {key!r} is there twice")
        result[key] = loader.construct_object(value, deep=True)
    return result


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: the tag {node.tag!r} is of no type that a setting has")


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> Any:
    return loader.construct_sequence(node, deep=True)


def _scalar(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)


for _name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _scalar)


_Loader.add_constructor(None, _refuse_tag)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    # An impossible escape like "\\Uffffffff" is a ValueError of Python's.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_reason(error)}") from error
    _check_size(tree, where)
    return tree


def _check_size(tree: Any, where: str) -> None:
    """Refuse what a few aliases in a small file can stand for: billions of values, if each is looked at."""
    left, values = [tree], 0
    while left:
        item = left.pop()
        values += 1
        if values > _MOST_VALUES:
            raise ConfigError(f"{where}: stands for more than {_MOST_VALUES:,} values; are its aliases meant?")
        if isinstance(item, str) and "\0" in item:
            raise ConfigError(f"{where}: holds a NUL character, which no setting may")
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"-o {override}: expected key=value, like loss.beta=0.2")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None or (isinstance(child, str) and child in NULL_WORDS):
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"-o {override}: {section} holds a value, not settings")
        node[section] = child
        node = child
    value = _parse_yaml(text, f"-o {override}")
    # An empty document is YAML's None, an empty value in a file the empty string: one meaning, one form.
    node[last] = "" if value is None else value


def _build(cls: type, value: Any, where: str) -> Any:
    """Make the dataclass `cls` from a mapping of strings; `where` is the dotted path for messages."""
    prefix = f"{where}." if where else ""
    if value is None or (isinstance(value, str) and value in NULL_WORDS):
        value = {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected settings (a mapping), found {_kind(value)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise ConfigError(f"{prefix}{key}: unknown key{did_you_mean(key, list(fields))}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    arguments = {key: convert(item, hints[key], f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """Turn YAML's strings, lists and mappings into what `hint` declares."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is object:
        return value  # converted later, by whoever knows its type
    if hint is Any:
        return _plain(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        for choice in args:
            if str(choice) == value:
                return choice
        choices = ", ".join(str(choice) for choice in args)
        raise ConfigError(f"{where}: expected one of {choices}; found {value!r}")
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is dict or origin is dict:
        if isinstance(value, str) and value in NULL_WORDS:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, found {_kind(value)}")
        inner = args[1] if args else Any
        return {str(key): convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    if hint is list or origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {_kind(value)}")
        inner = args[0] if args else Any
        return [convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, list | Mapping):
        raise ConfigError(f"{where}: expected {_type_name(hint)}, found {_kind(value)}")
    return _convert_scalar(str(value), hint, where)


def _convert_scalar(text: str, hint: Any, where: str) -> Any:
    if hint is bool:
        if text.lower() in TRUE_WORDS:
            return True
        if text.lower() in FALSE_WORDS:
            return False
    elif hint is int:
        try:
            return int(text)
        except ValueError:
            pass
        # 1e3 is a whole number too; 2.5 is not.
        try:
            number = float(text)
        except ValueError:
            number = 0.5
        if number.is_integer():
            return int(number)
    elif hint is float:
        try:
            return float(text)
        except ValueError:
            pass
    elif (hint is str or (isinstance(hint, type) and issubclass(hint, enum.Enum))) and text not in NULL_WORDS:
        # An enum of the library takes its word: `save_strategy: no` is the word, not False. Null is no word: a
        # folder named "null", or the one that "" stands for, is never meant.
        return text
    raise ConfigError(f"{where}: expected {_type_name(hint)}, found {'nothing' if text in NULL_WORDS else repr(text)}")


def _convert_union(value: Any, members: Sequence[Any], where: str) -> Any:
    """Take the first member that fits, from the narrowest type to the widest."""
    if type(None) in members and isinstance(value, str) and value in NULL_WORDS:
        return None
    order = [dict, list, bool, int, float]
    # Where one form of the value is meant (a word, or a list of words), only that one's complaint helps.
    rest = [m for m in members if m is not type(None)]
    rest = [m for m in rest if _is_shape(m, value)] or rest
    rest.sort(key=lambda m: next((i for i, t in enumerate(order) if t in (m, typing.get_origin(m))), len(order)))
    problem: ConfigError | None = None
    for member in rest:
        try:
            return convert(value, member, where)
        except ConfigError as error:
            if problem is None or dataclasses.is_dataclass(member) or len(rest) == 1:
                problem = error
    if len(rest) > 1 and not any(dataclasses.is_dataclass(m) for m in rest):
        names = " or ".join(_type_name(m) for m in rest)
        raise ConfigError(f"{where}: expected {names}, found {value!r}")
    assert problem is not None
    raise problem


def _is_shape(hint: Any, value: Any) -> bool:
    """Whether a list, a mapping or a scalar of YAML is the kind of thing that `hint` asks for."""
    kind = typing.get_origin(hint) or hint
    if isinstance(value, list):
        return kind is list
    if isinstance(value, Mapping):
        return kind is dict or dataclasses.is_dataclass(kind)
    return not (kind in (list, dict) or dataclasses.is_dataclass(kind))


def _plain(value: Any) -> Any:
    """YAML's usual reading, for values whose type nothing declares."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and _is_float(value) else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            # Looks like a date or a number and is none: 2024-13-45, 0x_.
            return value
    return value


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value in (None, "") else repr(value)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint) or str(hint)


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
