"""Read a run's settings: one YAML file and its overrides, converted strictly by the types that the schema declares.

Every value reaches its dataclass as a string, a list or a mapping of strings, and is converted by the declared type.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.base.errors import ConfigError, one_line
from pipeline.config.convert import NULL_WORDS, convert, kind_of
from pipeline.config.schema import Config

__all__ = ["as_dict", "load_config", "settings_text"]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a run's settings from a YAML file and apply `key=value` overrides (`loss.beta=0.2`).

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown or repeated, or a value has the wrong type or is
            impossible. The message names the key.
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
        raise ConfigError(f"{path}: must hold sections like `data:` and `policy:`, got {kind_of(tree)}")
    for override in overrides:
        _apply_override(tree, override)
    _refuse_passwords(tree, "")
    return _expand_home(typing.cast(Config, convert(tree, Config, "")))


_LARGEST_CONFIG = 2**20


_MOST_VALUES = 100_000


def _refuse_passwords(value: Any, where: str) -> None:
    """Refuse credentials in URLs: settings are saved beside shards and policy, and shown in messages."""
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
    """Expand `~` in the paths of data, shards and run, as model folders do."""
    data, precompute, train = config.data, config.precompute, config.train
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
        train=dataclasses.replace(train, output_dir=train.output_dir and _from_home(train.output_dir)),
    )


def _from_home(path: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no such user here to have a home folder") from error


def as_dict(config: Config) -> dict[str, Any]:
    """Give the settings, with their defaults, as dicts, lists and scalars."""
    settings = dataclasses.asdict(config)
    settings["train"] = config.train.as_dict()
    return settings


def settings_text(config: Config) -> str:
    """Give the settings, with their defaults but without access tokens, as a YAML file for `load_config`."""
    settings = as_dict(config)
    settings["train"] = {key: value for key, value in settings["train"].items() if not key.endswith("_token")}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class _Loader(yaml.BaseLoader):
    """Keeps every scalar a string, and refuses repeated keys and tags."""


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


def _word(loader: _Loader, node: yaml.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
for _name in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _word)
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
    """Refuse aliases that make billions of values of a small file."""
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


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or one_line(str(error))
