"""Make a JSON schema of the settings file, for editors, from the settings' dataclasses and their docstrings."""

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from pipeline.config.convert import FALSE_WORDS, NULL_WORDS, TRUE_WORDS, PathText
from pipeline.config.keys import REQUIRED, Setting, section_in, settings
from pipeline.config.library import fields_of_training, hint_of_field
from pipeline.config.schema import Config
from pipeline.config.training import FIXED_TRAIN_FIELDS, TRAIN_DEFAULTS

__all__ = ["schema_of_settings"]

_NULL = {"enum": [None, *NULL_WORDS]}
_NUMBER = {"type": "string", "pattern": r"^\s*[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?\s*$|^[-+]?(inf|nan)$"}
"""A number that YAML takes for a word: 5e-7"""
_WORD = {"type": ["string", "number", "boolean"]}
"""A text: YAML takes some words for numbers, dates or truth"""


def schema_of_settings() -> dict[str, Any]:
    """Return the schema (JSON Schema, draft 2020-12) of a settings file.

    `train` also has the fields of the installed transformers.TrainingArguments. The schema accepts what a value's type
    allows; rules between settings are checked by the commands.
    """
    keys = {setting.key: setting for setting in settings()}
    schema = _section(Config, "", keys)
    train = schema["properties"]["train"]
    for name in sorted(fields_of_training().keys() - FIXED_TRAIN_FIELDS.keys()):
        if not name.endswith("_token"):
            train["properties"].setdefault(name, _field_of_library(name))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of refshard",
        **schema,
    }


def _section(section: type, prefix: str, keys: dict[str, Setting]) -> dict[str, Any]:
    """Give the schema of a section; `prefix` is that of its keys."""
    found = {field.name: keys.get(f"{prefix}{field.name}") for field in dataclasses.fields(section)}
    properties, required = {}, []
    for name, setting in found.items():
        if setting is None:
            continue
        properties[name] = {**_of(setting.hint, setting.key, keys), "description": setting.meaning}
        if setting.default is REQUIRED:
            required.append(name)
        elif setting.default is None or isinstance(setting.default, str | int | float):
            properties[name]["default"] = setting.default
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": required} if required else {})


def _field_of_library(name: str) -> dict[str, Any]:
    about = f"Field of transformers.TrainingArguments: {name}"
    default, reason = TRAIN_DEFAULTS.get(name, (None, ""))
    if name in TRAIN_DEFAULTS:
        about += f". refshard's default: {default} ({reason})"
    return {**_of(hint_of_field(name), f"train.{name}", {}), "description": about}


def _of(hint: Any, key: str, keys: dict[str, Setting]) -> dict[str, Any]:
    """Give the schema of a declared type, as `convert` takes it."""
    kind, members = typing.get_origin(hint), typing.get_args(hint)
    if hint == PathText or hint is str:
        return _WORD
    if hint is bool:
        return {"anyOf": [{"type": "boolean"}, {"enum": [*TRUE_WORDS, *FALSE_WORDS]}]}
    if hint in (int, float):
        return {"anyOf": [{"type": "number"}, _NUMBER]}
    if kind is Literal:
        # YAML 1.1 takes `off` and `no` for false.
        off = [False] if any(choice in FALSE_WORDS for choice in members) else []
        return {"enum": [*members, *off, *(choice for choice in map(str, members) if choice not in members)]}
    if kind in (Union, types.UnionType):
        return {
            "anyOf": [_of(member, key, keys) for member in members if member is not type(None)]
            + ([_NULL] if type(None) in members else [])
        }
    if dataclasses.is_dataclass(hint):
        # A section without keys has its defaults.
        inner = _section(typing.cast(type, hint), f"{key}.", keys)
        return inner if inner.get("required") else {**inner, "type": ["object", "null"]}
    if kind is dict:
        named = section_in(hint)
        inner = _section(named, f"{key}.NAME.", keys) if named else _of(members[1], key, keys) if members else {}
        return {"type": ["object", "null"], "additionalProperties": inner}
    if kind is list:
        return {"type": "array", "items": _of(members[0], key, keys) if members else {}}
    return {}
