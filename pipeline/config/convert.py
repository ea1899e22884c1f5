"""Convert the words, lists and mappings of a settings file by the types that the schema declares, strictly.

`5e-7` is a float, and `off` a word where a word is wanted, whatever YAML makes of them.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

import yaml

from pipeline.base.errors import ConfigError, did_you_mean

__all__ = ["FALSE_WORDS", "NULL_WORDS", "convert", "kind_of"]

NULL_WORDS = ("", "null", "Null", "NULL", "~")


_TRUE_WORDS = ("true", "yes", "on")


FALSE_WORDS = ("false", "no", "off")


def _build(cls: type, value: Any, where: str) -> Any:
    """Make the dataclass `cls` from a mapping of strings; `where` is the dotted path for messages.

    A field with the metadata `rest` takes the keys that are no other field's, unconverted.
    """
    prefix = f"{where}." if where else ""
    if value is None or (isinstance(value, str) and value in NULL_WORDS):
        value = {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected settings (a mapping), found {kind_of(value)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("rest")}
    rest = next((f.name for f in dataclasses.fields(cls) if f.metadata.get("rest")), None)
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields and rest is None:
            raise ConfigError(f"{prefix}{key}: unknown key{did_you_mean(key, list(fields))}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    arguments = {key: convert(item, hints[key], f"{prefix}{key}") for key, item in value.items() if key in fields}
    if rest is not None:
        arguments[rest] = {key: item for key, item in value.items() if key not in fields}
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
            raise ConfigError(f"{where}: expected a mapping, found {kind_of(value)}")
        inner = args[1] if args else Any
        return {str(key): convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    if hint is list or origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, found {kind_of(value)}")
        inner = args[0] if args else Any
        return [convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, list | Mapping):
        raise ConfigError(f"{where}: expected {_type_name(hint)}, found {kind_of(value)}")
    return _convert_scalar(str(value), hint, where)


def _convert_scalar(text: str, hint: Any, where: str) -> Any:
    if hint is bool:
        if text.lower() in _TRUE_WORDS:
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


def kind_of(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value in (None, "") else repr(value)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint) or str(hint)
