"""Read the fields of transformers.TrainingArguments from the library's source, since its import takes seconds."""

import ast
import dataclasses
import functools
import importlib.util
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

__all__ = ["defaults_of_training", "fields_of_training", "hint_of_field"]

_CLASS = "TrainingArguments"
_MODULES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
"""Modules of the class and of the words that its fields take"""


def fields_of_training() -> Mapping[str, str]:
    """Return the annotation of each field that the class can be made with, by the field's name."""
    return _read().annotations


def defaults_of_training() -> Mapping[str, Any]:
    """Return the default of each field, by the field's name."""
    defaults = _read().defaults
    return _defaults_of_class() if defaults is None else defaults


def hint_of_field(name: str) -> Any:
    """Return the type of a field; of a field that takes the words of an enum, these words."""
    parts, enums = fields_of_training()[name].split(" | "), _read().enums
    # Beside its enum, such a field is declared to be any text, and then refuses all others.
    words = [part for part in parts if part in enums]
    field = types.SimpleNamespace(__annotations__={name: " | ".join(words or parts)})
    try:
        return typing.get_type_hints(field, {**_NAMES, **enums})[name]
    except (NameError, SyntaxError, TypeError):
        # A class of another library, or a type that is written in another way.
        return _hints_of_class().get(name, Any)


_NAMES = {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}


class _Source(NamedTuple):
    """The class as its source has it."""

    annotations: Mapping[str, str]
    defaults: Mapping[str, Any] | None
    """None: not all of them can be read"""
    enums: Mapping[str, Any]
    """Words of each enum, as a Literal"""


@functools.cache
def _read() -> _Source:
    found: dict[str, ast.ClassDef] = {}
    for text in _sources():
        found |= {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    enums = {name: Literal[words] for name, node in found.items() if (words := _words_of(node))}
    if _CLASS not in found or found[_CLASS].bases:
        # Another version of the library keeps fields elsewhere.
        return _Source({name: repr(hint) for name, hint in _hints_of_class().items()}, None, {})
    nodes = {ast.unparse(n.target): n for n in found[_CLASS].body if isinstance(n, ast.AnnAssign) and _is_given(n)}
    annotations = {name: ast.unparse(node.annotation) for name, node in nodes.items()}
    constants = _constants_of(found[_CLASS])
    try:
        defaults = {name: _default_in(node.value, constants) for name, node in nodes.items()}
    except (KeyError, ValueError, SyntaxError):
        return _Source(annotations, None, enums)
    return _Source(annotations, defaults, enums)


def _constants_of(node: ast.ClassDef) -> dict[str, Any]:
    """Read the names that a class body assigns. Conditions in it ask for older versions of torch than ours."""
    assigned = [line for outer in node.body if isinstance(outer, ast.Assign | ast.If) for line in ast.walk(outer)]
    return {
        ast.unparse(line.targets[0]): line.value.value
        for line in assigned
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
    }


_FACTORIES: Mapping[str, Callable[[], Any]] = {"list": list, "dict": dict}


def _default_in(value: ast.expr | None, constants: Mapping[str, Any]) -> Any:
    """Evaluate a field's default. Raises KeyError, ValueError or SyntaxError for one that is not a constant."""
    if not isinstance(value, ast.Call):
        return ast.literal_eval(value or "")
    given = {word.arg: word.value for word in value.keywords}
    if "default_factory" in given:
        return _FACTORIES[ast.unparse(given["default_factory"])]()
    default = given["default"]
    return constants[default.id] if isinstance(default, ast.Name) else ast.literal_eval(default)


def _sources() -> list[str]:
    spec = importlib.util.find_spec("transformers")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = [folder / name for folder in folders for name in _MODULES]
    return [file.read_text(encoding="utf-8") for file in files if file.exists()]


def _words_of(node: ast.ClassDef) -> tuple[str, ...]:
    if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return ()
    values = (line.value for line in node.body if isinstance(line, ast.Assign))
    return tuple(str(value.value) for value in values if isinstance(value, ast.Constant))


def _is_given(node: ast.AnnAssign) -> bool:
    """Return False for a class variable, and for a field that the class sets itself."""
    return "ClassVar" not in ast.unparse(node.annotation) and "init=False" not in ast.unparse(node)


@functools.cache
def _hints_of_class() -> Mapping[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints.get(field.name, Any) for field in dataclasses.fields(TrainingArguments) if field.init}


@functools.cache
def _defaults_of_class() -> Mapping[str, Any]:
    from transformers import TrainingArguments

    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }
