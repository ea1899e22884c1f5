"""Read the fields of transformers.TrainingArguments from the library's source, since its import takes seconds."""

import ast
import dataclasses
import functools
import importlib.util
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Optional, Union

__all__ = ["fields_of_training", "hint_of_field"]

_CLASS = "TrainingArguments"
_MODULES = ("training_args.py", "trainer_utils.py", "debug_utils.py")
"""Modules of the class and of the words that its fields take"""


def fields_of_training() -> Mapping[str, str]:
    """Return the annotation of each field that the class can be made with, by the field's name."""
    return _read()[0]


def hint_of_field(name: str) -> Any:
    """Return the type of a field; of a field that takes the words of an enum, these words."""
    parts, enums = fields_of_training()[name].split(" | "), _read()[1]
    # Beside its enum, such a field is declared to be any text, and then refuses all others.
    words = [part for part in parts if part in enums]
    field = types.SimpleNamespace(__annotations__={name: " | ".join(words or parts)})
    try:
        return typing.get_type_hints(field, {**_NAMES, **enums})[name]
    except (NameError, SyntaxError, TypeError):
        # A class of another library, or a type that is written in another way.
        return _hints_of_class().get(name, Any)


_NAMES = {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}


@functools.cache
def _read() -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Read the annotations of the fields, and the words of each enum as a Literal."""
    found: dict[str, ast.ClassDef] = {}
    for text in _sources():
        found |= {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    enums = {name: Literal[words] for name, node in found.items() if (words := _words_of(node))}
    if _CLASS not in found or found[_CLASS].bases:
        # Another version of the library keeps fields elsewhere.
        return {name: repr(hint) for name, hint in _hints_of_class().items()}, {}
    nodes = (node for node in found[_CLASS].body if isinstance(node, ast.AnnAssign) and _is_given(node))
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in nodes}, enums


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
