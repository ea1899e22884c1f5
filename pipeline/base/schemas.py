"""Check JSON records against their schemas: JSON Schema files beside the code that reads and writes the records."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from pipeline.base.errors import DataError
from pipeline.base.files import parse_json, read_json

__all__ = ["Schema"]

_KINDS = {bool: "a boolean", dict: "an object", list: "a list", type(None): "null"}
_MOST_SHOWN = 60


@dataclass(frozen=True)
class Schema:
    """The schema of one kind of record, in the file `NAME.schema.json` of a package."""

    package: str
    """Package that holds the file, with dots"""
    name: str
    """Name of the kind of record"""
    remedy: str = ""
    """Sentence that ends the error's message"""

    def check(self, place: str, record: Any) -> None:
        """Raise DataError, which names the place and the first field that does not fit."""
        try:
            _validator(self.package, self.name)(record)
        except fastjsonschema.JsonSchemaValueException as error:
            raise self._error(f"{place}: {_problem(error)}") from error

    def parse(self, place: str, content: bytes) -> dict[str, Any]:
        """Parse and check a record. A number that is not finite, which JSON lacks, counts as null. Raises DataError."""
        try:
            record = parse_json(place, content, finite=True)
        except DataError as error:
            raise self._error(str(error)) from error
        self.check(place, record)
        return record

    def read(self, file: Path) -> dict[str, Any]:
        """Read and check a file of one record. Raises DataError, StorageError if it can't be read."""
        record = read_json(file)
        self.check(str(file), record)
        return record

    def _error(self, problem: str) -> DataError:
        return DataError(f"{problem}. {self.remedy}" if self.remedy else problem)


@functools.cache
def _validator(package: str, name: str) -> Callable[[Any], Any]:
    text = resources.files(package).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    validator: Callable[[Any], Any] = fastjsonschema.compile(json.loads(text), use_default=False)
    return validator


def _problem(error: fastjsonschema.JsonSchemaValueException) -> str:
    """Say which field must be what, and what it is."""
    field = str(error.name).removeprefix("data").removeprefix(".")
    if error.rule == "required" and isinstance(error.value, Mapping):
        missing = next(key for key in error.rule_definition if key not in error.value)
        return f"{f'{field}.' if field else ''}{missing}: must be there, got nothing"
    rule = str(error.message).removeprefix(str(error.name)).strip()
    return f"{f'{field}: ' if field else ''}{rule}, got {_shown(error.value)}"


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = _KINDS.get(type(value)) or json.dumps(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."
