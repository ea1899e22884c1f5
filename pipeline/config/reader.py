"""Read a run's settings: one YAML file and its overrides, converted strictly by the types that the schema declares.

Every value reaches its dataclass as a string, a list or a mapping of strings, and is converted by the declared type.
"""

import dataclasses
import re
import typing
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from pipeline.base.errors import ConfigError, DataError, one_line
from pipeline.base.files import read_file
from pipeline.config.convert import NULL_WORDS, convert, kind_of
from pipeline.config.schema import Config

__all__ = ["as_dict", "dump_settings", "load_config", "settings_text"]


def load_config(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a run's settings from a YAML file, or from a mapping with a file's content; then apply overrides.

    An override is `key=value`, like `loss.beta=0.2`. Raises ConfigError.
    """
    place, text = ("config", _as_text(source)) if isinstance(source, Mapping) else (str(source), _read_text(source))
    tree = _parse_yaml(text, place)
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: must hold sections like `data:` and `policy:`, got {kind_of(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    _refuse_passwords(tree, "")
    return typing.cast(Config, convert(tree, Config, ""))


def _read_text(path: Path | str) -> str:
    try:
        return read_file(Path(path), most=_LARGEST_CONFIG).decode("utf-8")
    except (OSError, ValueError, DataError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or one_line(str(error))
        raise ConfigError(f"--config {path}: can't be read ({reason})") from error


def _as_text(settings: Mapping[str, Any]) -> str:
    """Write a mapping as a settings file has it, so that both are read in one way."""
    try:
        return yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config: must hold text, numbers, lists and mappings, got {one_line(str(error))}") from error


_LARGEST_CONFIG = 2**20
_MOST_VALUES = 100_000


def _refuse_passwords(value: Any, where: str) -> None:
    """Refuse credentials in URLs: settings are saved beside shards and policy, and shown in messages."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if where == "train" and key.endswith("_token"):
                raise ConfigError(f"train.{key}: must not be in the settings, which are saved. Set HF_TOKEN instead")
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


def as_dict(config: Config) -> dict[str, Any]:
    """Give the settings, with their defaults, as dicts, lists and scalars."""
    settings = dataclasses.asdict(config)
    settings["train"] = config.train.as_dict()
    return settings


def settings_text(config: Config) -> str:
    """Give the settings, with their defaults, as a YAML file for `load_config`."""
    return dump_settings(as_dict(config))


def dump_settings(settings: Mapping[str, Any]) -> str:
    """Give settings, as `as_dict` has them, as YAML: numbers of `train` as numbers, true and false as booleans."""
    tree = {key: _as_written(value) if key == "train" else value for key, value in settings.items()}
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Written(str):
    """A scalar of `train` as the file gives it, whose type the library's field declares."""


class _Dumper(yaml.SafeDumper):
    """Writes numbers and booleans of `train` without quotes, letter by letter as the user wrote them."""

    def represent_written(self, text: _Written) -> yaml.ScalarNode:
        tag = self.resolve(yaml.ScalarNode, str(text), (True, False))  # type: ignore[no-untyped-call]
        plain = tag.removeprefix("tag:yaml.org,2002:") in ("int", "float", "bool")
        return self.represent_scalar(tag if plain else "tag:yaml.org,2002:str", str(text))


_Dumper.add_representer(_Written, _Dumper.represent_written)
_Dumper.add_representer(tuple, _Dumper.represent_list)
# Subclasses of float are numpy's.
_Dumper.add_multi_representer(float, lambda dumper, number: dumper.represent_float(float(number)))
_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


def _as_written(value: Any) -> Any:
    if isinstance(value, Mapping):
        # `save_strategy: no` is a word; other readers would take it for false.
        return {key: item if key.endswith("_strategy") else _as_written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    return _Written(value) if isinstance(value, str) else value


_TYPES = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")


class _Loader(yaml.BaseLoader):
    """Keeps every scalar a string, and refuses repeated keys and tags."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _TYPES:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: the tag {node.tag!r} is not a type of a setting. Remove it")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        result: dict[Hashable, Any] = {}
        for key_node, value in node.value:
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {line}: a key must be a word")
            if key in result:
                raise yaml.YAMLError(f"line {line}: key {key!r} is repeated. Remove one of the two")
            result[key] = self.construct_object(value)
        return result


def _parse_yaml(text: str, where: str) -> Any:
    try:
        tree = yaml.load(text, Loader=_Loader)
    # An impossible escape like "\\Uffffffff" is a ValueError of Python's.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {one_line(str(error))}") from error
    _check_size(tree, where)
    return tree


def _check_size(tree: Any, where: str) -> None:
    """Refuse aliases that make billions of values of a small file."""
    left, values = [tree], 0
    while left:
        item = left.pop()
        values += 1
        if values > _MOST_VALUES:
            raise ConfigError(f"{where}: must hold at most {_MOST_VALUES:,} values, got more. Remove its aliases")
        if isinstance(item, str) and "\0" in item:
            raise ConfigError(f"{where}: holds a NUL character, which no setting may")
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"-o {override}: must be key=value, like loss.beta=0.2")
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None or child in NULL_WORDS:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"-o {override}: {section} holds a value, not settings")
        node[section] = child
        node = child
    value = _parse_yaml(text, f"-o {override}")
    # An empty document is YAML's None, an empty value in a file the empty string: one meaning, one form.
    node[last] = "" if value is None else value
