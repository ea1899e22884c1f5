"""Convert the words, lists and mappings of a settings file to the types that the schema declares.

The declared type decides, not YAML: `5e-7` is a float, and `off` is a word where a word is wanted.
"""

import contextlib
import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml

from pipeline.base.errors import ConfigError
from pipeline.config.names import hint_for_key, hint_for_value

__all__ = [
    "FALSE_WORDS",
    "NULL_WORDS",
    "TRUE_WORDS",
    "PathText",
    "convert",
    "kind_of",
    "refuse_both",
    "require",
    "require_at_least",
]

NULL_WORDS = ("", "null", "Null", "NULL", "~")
TRUE_WORDS = ("true", "yes", "on")
FALSE_WORDS = ("false", "no", "off")


PathText = Annotated[str, "path"]
"""A path, whose `~` is expanded, or a URL or hub name."""


def convert(value: Any, hint: Any, where: str) -> Any:
    """Convert YAML's strings, lists and mappings to a declared type. Raises ConfigError with the key (`where`).

    The type `object` leaves the value as it is; `Any` reads it as YAML does.
    """
    kind, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is object:
        return value
    if hint is Any:
        return _plain(value)
    if hint == PathText:
        return _from_home(convert(value, str, where), where)
    if kind in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if kind is Literal:
        for choice in args:
            if str(choice) == value:
                return choice
        choices = [str(choice) for choice in args]
        hint = hint_for_value(value, choices, where)
        raise ConfigError(f"{where}: must be one of {', '.join(choices)}, got {kind_of(value)}{hint}")
    if kind is dict:
        value = {} if _is_null(value) else value
        if isinstance(value, Mapping):
            inner = args[1] if args else Any
            return {str(key): convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    elif kind is list:
        if isinstance(value, list):
            inner = args[0] if args else Any
            return [convert(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    elif not isinstance(value, list | Mapping):
        with contextlib.suppress(ValueError):
            return _scalar(str(value), hint)
    raise ConfigError(f"{where}: must be {_name_of(hint)}, got {kind_of(value)}")


def _build(cls: type, value: Any, where: str) -> Any:
    """Make a dataclass of a mapping. A field with the metadata `rest` takes the unknown keys, unconverted."""
    prefix = f"{where}." if where else ""
    value = {} if _is_null(value) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of settings, got {kind_of(value)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("rest")}
    rest = next((f.name for f in dataclasses.fields(cls) if f.metadata.get("rest")), None)
    unknown = {key: item for key, item in value.items() if key not in fields}
    if unknown and rest is None:
        key = next(iter(unknown))
        raise ConfigError(f"{prefix}{key}: unknown key{hint_for_key(where, key, list(fields))}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    hints = typing.get_type_hints(cls, include_extras=True)
    arguments = {key: convert(item, hints[key], f"{prefix}{key}") for key, item in value.items() if key in fields}
    try:
        return cls(**arguments, **({} if rest is None else {rest: unknown}))
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _from_home(path: str, where: str) -> str:
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ConfigError(f"{where}: {path}: there is no such user here to have a home folder") from error


def _scalar(text: str, hint: Any) -> Any:
    """Convert a word. Raises ValueError."""
    if hint is bool and text.lower() in (*TRUE_WORDS, *FALSE_WORDS):
        return text.lower() in TRUE_WORDS
    if hint is float:
        return float(text)
    if hint is int:
        with contextlib.suppress(ValueError):
            return int(text)
        # 1e3 is a whole number too.
        number = float(text)
        if number.is_integer():
            return int(number)
    # Enums of the library take their word: `save_strategy: no` is not False. Null is not a word: nobody means a folder
    # named "null", nor the one that "" stands for.
    if isinstance(hint, type) and issubclass(hint, str | enum.Enum) and text not in NULL_WORDS:
        return text
    raise ValueError


def _convert_union(value: Any, members: tuple[Any, ...], where: str) -> Any:
    """Take the first member that fits, from the narrowest type to the widest."""
    if type(None) in members and _is_null(value):
        return None
    members = tuple(member for member in members if member is not type(None))
    # If the value has the form of one member only, that member's complaint helps most.
    members = tuple(member for member in members if _has_form(value, member)) or members
    if len(members) == 1:
        return convert(value, members[0], where)
    order: dict[Any, int] = {dict: 0, list: 1, bool: 2, int: 3, float: 4}
    for member in sorted(members, key=lambda m: order.get(typing.get_origin(m), order.get(m, 5))):
        with contextlib.suppress(ConfigError):
            return convert(value, member, where)
    raise ConfigError(f"{where}: must be {' or '.join(map(_name_of, members))}, got {kind_of(value)}")


def _has_form(value: Any, hint: Any) -> bool:
    """Return True if value and type are both lists, both mappings or both scalars."""
    kind = typing.get_origin(hint) or hint
    return isinstance(value, list) == (kind is list) and (
        isinstance(value, Mapping) == (kind is dict or dataclasses.is_dataclass(kind))
    )


def _plain(value: Any) -> Any:
    """Read a value whose type nothing declares, as YAML does; `1e-1` is a float too."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and "e" in value.lower():
        with contextlib.suppress(ValueError):
            return float(value)
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except (yaml.YAMLError, ValueError, RecursionError):
        # Looks like a date or a number and is neither: 2024-13-45, 0x_.
        return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in NULL_WORDS)


def kind_of(value: Any) -> str:
    """Name a value in a message."""
    if isinstance(value, Mapping | list):
        return "a list" if isinstance(value, list) else "a mapping"
    return "nothing" if _is_null(value) else repr(value)


def _name_of(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {dict: "a mapping", list: "a list"}
    return names.get(hint) or names.get(typing.get_origin(hint)) or str(hint)


def require(holds: bool, key: str, rule: str, value: object, remedy: str = "") -> None:
    """Refuse a value that breaks a rule. Raises ValueError."""
    if not holds:
        raise ValueError(f"{key}: must be {rule}, got {value!r}" + (f". {remedy}" if remedy else ""))


def require_at_least(section: object, **least: int) -> None:
    """Refuse fields of a section that are below their least value; None is not. Raises ValueError."""
    for key, bound in least.items():
        value = getattr(section, key)
        require(value is None or value >= bound, key, f"at least {bound}", value)


def refuse_both(key: str, other: str, both: bool) -> None:
    """Refuse a setting that is set together with another. Raises ValueError."""
    if both:
        raise ValueError(f"{key}: must be left out if {other} is set. Keep one of the two")
