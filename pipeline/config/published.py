"""Make a JSON schema of the settings file, for editors, from the settings' dataclasses and their docstrings."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from pipeline.config.columns import LAYOUT_COLUMNS, LOSS_COLUMNS, PAIR_COLUMNS, ROLES, SPOKEN_COLUMNS
from pipeline.config.convert import FALSE_WORDS, NULL_WORDS, TRUE_WORDS, PathText
from pipeline.config.keys import REQUIRED, Setting, section_in, settings
from pipeline.config.library import fields_of_training, hint_of_field
from pipeline.config.schema import Config
from pipeline.config.training import FIXED_TRAIN_FIELDS, TRAIN_DEFAULTS

__all__ = ["schema_of_settings"]

_NULL = {"enum": [None, *NULL_WORDS]}
_DECIMAL = r"(\d+(_\d+)*\.?(\d+(_\d+)*)?|\.\d+(_\d+)*)([eE][-+]?\d+)?"
_WHOLE = r"(\d+(_\d+)*(\.0*)?|\d+(\.\d+)?[eE]\+?\d+)"
_WORD = {"type": ["string", "number", "boolean"], "not": {"type": "string", "pattern": r"://[^/?#\s]*@"}}
"""A text without a password: YAML takes some words for numbers, dates or truth"""

_Limits = Mapping[str, float]
_COUNT: _Limits = {"minimum": 1}
_POSITIVE: _Limits = {"exclusiveMinimum": 0}
_SHARE: _Limits = {"minimum": 0, "maximum": 1}
_LIMITS: dict[str, _Limits] = {
    "data.max_length": {"minimum": 2},
    "data.sets.NAME.fraction": _POSITIVE,
    "precompute.rows_per_shard": _COUNT,
    "precompute.tokens_per_batch": _COUNT,
    "policy.lora.r": _COUNT,
    "policy.lora.alpha": _POSITIVE,
    "policy.lora.dropout": {"minimum": 0, "exclusiveMaximum": 1},
    "reference.sync.steps": _COUNT,
    "reference.sync.mixup_alpha": _SHARE,
    "loss.weights": {},
    "loss.beta": _POSITIVE,
    "loss.label_smoothing": {"minimum": 0, "maximum": 0.5},
    "loss.f_alpha_divergence_coef": {},
    "loss.ld_alpha": _SHARE,
    "loss.discopop_tau": _POSITIVE,
    "loss.beta_dpo_filter": {"minimum": 0, "exclusiveMaximum": 1},
    **{f"loss.{name}": {"minimum": 0} for name in ("dpop_lambda", "beta_dpo_alpha", "r_dpo_alpha", "simpo_gamma")},
    **{f"loss.{name}": {"minimum": 0} for name in ("cpo_alpha", "router_aux_loss_coef")},
    **{f"cluster.{stage}.{name}": _COUNT for stage in ("precompute", "train") for name in ("processes", "cpus")},
    **{f"cluster.{stage}.gpus": {"minimum": 0} for stage in ("precompute", "train")},
    **{f"cluster.{name}": _COUNT for name in ("workers", "grace", "train.nodes")},
    "cluster.precompute.nodes": {"minimum": 1, "maximum": 1},
    "cluster.restarts": {"minimum": 0},
}
"""Limits of finite numbers, as the sections have them; `tests/config/test_published.py` compares the two"""

_COLUMNS = {
    "propertyNames": {"enum": [*PAIR_COLUMNS, *SPOKEN_COLUMNS, *LAYOUT_COLUMNS, *LOSS_COLUMNS]},
    "dependentRequired": {"system": ["user"]},
    "dependentSchemas": {"user": {"properties": {"prompt": False}}},
}
_ROLES = {"propertyNames": {"enum": [*ROLES]}}
_GIVEN = {"not": _NULL}
_RULES: dict[str, dict[str, Any]] = {
    "data": {
        "type": "object",
        "anyOf": [
            {"required": ["path"], "properties": {"path": _GIVEN}},
            {"required": ["sets"], "properties": {"sets": {"type": "object", "minProperties": 1}}},
        ],
    },
    "data.columns": _COLUMNS,
    "data.sets.NAME.columns": _COLUMNS,
    "data.eval.NAME.columns": _COLUMNS,
    **dict.fromkeys(("data.roles", "data.sets.NAME.roles", "data.eval.NAME.roles"), _ROLES),
    "data.eval": {"propertyNames": {"pattern": r"^(?!(train|costs)$)[^\s./\\]+$"}},
    "data.sets": {"propertyNames": {"pattern": r"^(?!costs$)[^\s./\\]+$"}},
    "data.template_date": {"format": "date"},
    "loss.type": {"minItems": 1, "uniqueItems": True},
}
"""Further rules of single keys"""


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
        properties[name] = {
            **_of(setting.hint, setting.key, keys),
            **_RULES.get(setting.key, {}),
            "description": setting.meaning,
        }
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
        limits = _LIMITS.get(key)
        number = {"type": "integer" if hint is int else "number", **(limits or {})}
        return {"anyOf": [number, {"type": "string", "pattern": _pattern(hint, limits)}]}
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


def _pattern(hint: type, limits: _Limits | None) -> str:
    """Give the pattern of a number that YAML takes for a word: 5e-7, 1e3."""
    sign = r"\+?" if limits else "[-+]?"
    digits = rf"^\s*{sign}{_WHOLE if hint is int else _DECIMAL}\s*$"
    return digits if hint is int or limits is not None else rf"{digits}|^\s*[-+]?(inf|nan)\s*$"
