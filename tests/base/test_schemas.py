"""Records against their schemas: the first field that does not fit is named, with its rule and its value."""

import json
from pathlib import Path
from typing import Any

import fastjsonschema
import jsonschema
import pytest

from pipeline.base.errors import DataError
from pipeline.base.schemas import Schema

ROOT = Path(__file__).parents[2]
FILES = sorted(file for package in ("pipeline", "stages") for file in (ROOT / package).rglob("*.schema.json"))

INDEX = Schema("pipeline.store", "index", "Delete it")
NOISE = {"tokens": 3, "mean": 0.5, "largest": 1}
TOTALS = {"rows": 2, "kept": 1, "dropped": {"identical": 1}, "noted": {}}
PART = {"file": "part-00000.parquet", "rows": 1, "bytes": 9, "sha256": "0" * 64}
WHOLE: dict[str, Any] = {"fingerprint": "a" * 64, "parts": [PART], "totals": TOTALS, "noise": NOISE, "sha256": "b" * 64}


def problem_of(record: Any) -> str:
    """Give the error's message of a record at the place `P`; empty if it fits."""
    try:
        INDEX.parse("P", json.dumps(record).encode())
    except DataError as error:
        return str(error)
    return ""


def test_a_record_that_fits_may_hold_more() -> None:
    assert INDEX.parse("P", json.dumps({**WHOLE, "later": 1}).encode())["later"] == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"parts": [PART, {**PART, "rows": "3"}]}, 'P: parts[1].rows: must be integer, got "3". Delete it'),
        ({"parts": [{**PART, "rows": True}]}, "P: parts[0].rows: must be integer, got a boolean. Delete it"),
        ({"parts": {}}, "P: parts: must be array, got an object. Delete it"),
        ({"parts": [{**PART, "file": "x" * 99}]}, f'got "{"x" * 59} .... Delete it'),
        ({"totals": {}}, "P: totals.rows: must be there, got nothing. Delete it"),
        ({"noise": {**NOISE, "mean": -1}}, "P: noise.mean: must be bigger than or equal to 0, got -1. Delete it"),
        ({"noise": {**NOISE, "mean": float("nan")}}, "P: noise.mean: must be number, got null. Delete it"),
        ({"noise": {**NOISE, "more": 1}}, "P: noise: must not contain"),
        (
            {"totals": {**TOTALS, "dropped": {"{data}.x": None}}},
            "P: totals.dropped.{data}.x: must be integer, got null",
        ),
    ],
)
def test_the_field_that_does_not_fit_is_named(change: dict[str, Any], problem: str) -> None:
    assert problem in problem_of({**WHOLE, **change})


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"parts": [', b'{"parts": ' + b"[" * 99_999])
def test_what_is_no_object_is_damaged(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^P: damaged, .*\. Delete it$"):
        INDEX.parse("P", content)


def test_a_number_that_no_float_holds_counts_as_null() -> None:
    text = json.dumps({**WHOLE, "noise": {**NOISE, "mean": 7.5}}).replace("7.5", "1e999")
    with pytest.raises(DataError, match=r"noise\.mean: must be number, got null"):
        INDEX.parse("P", text.encode())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_schemas_are_schemas_and_are_installed_with_their_package(file: Path) -> None:
    schema = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    fastjsonschema.compile(schema)
    assert schema["title"] and schema["description"]
    package = ".".join(file.parent.relative_to(ROOT).parts)
    assert f'"{package}" = ["*.schema.json"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_files_that_an_earlier_version_wrote_fit() -> None:
    written = ROOT / "tests" / "data" / "written_by_0.1"
    for name in ("manifest", "index"):
        for file in written.glob(f"shards/*/{name}.json"):
            Schema("pipeline.store", name).read(file)
    for file in written.glob("shards/costs/*.json"):
        Schema("pipeline.run", "cost").read(file)
    Schema("pipeline.run", "inputs").read(written / "policy" / "inputs.json")
    Schema("pipeline.run", "commit").read(written / "policy" / "checkpoint-3" / "refshard-commit.json")
    for line in (written / "policy" / "log.jsonl").read_bytes().splitlines():
        Schema("pipeline.run", "log").parse("log.jsonl", line)
