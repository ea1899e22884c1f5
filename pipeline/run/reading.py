"""Read what a run of stage two has written so far. Nothing in the folder changes.

The run may still be training, may have been killed within a line, or may have been resumed. A file that is missing or
damaged is left out and named in a remark. Of steps that were done twice, the later attempt counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import ConfigError, DataError, RefshardError, first_line
from pipeline.base.files import parse_json, read_file
from pipeline.base.schemas import Schema
from pipeline.config.reader import as_dict, load_config
from pipeline.data.readers import open_parquet
from pipeline.replies.records import GENERATIONS, Generation, read_generations
from pipeline.run.records import INPUTS, LOG, MARGIN_COLUMNS, MARGINS

__all__ = [
    "RECORD",
    "SETTINGS",
    "AttemptSummary",
    "Curve",
    "MarginRows",
    "Run",
    "part",
    "read_inputs",
    "read_record",
    "read_run",
]

_Content = TypeVar("_Content")

SETTINGS, RECORD = "refshard.yaml", "run.json"
"""Files of a run's folder: its settings, and the record that marks it as finished"""

_LOG_SCHEMA = Schema(__package__, "log", "Restore the line, or delete it")
_INPUTS_SCHEMA = Schema(__package__, "inputs", "Restore it from a backup, or delete it")
_RECORD_SCHEMA = Schema(__package__, "record", "Restore it from a backup")


@dataclass(frozen=True, kw_only=True)
class AttemptSummary:
    """One attempt of the run, as its log describes it."""

    step: int
    """Step that it resumed after; 0 for a fresh one"""
    last_step: int
    seconds: float
    """Time from its first step to the last line that it logged"""
    memory_bytes: float | None
    """Peak memory of the first process"""
    device: str | None
    processes: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Curve:
    """A metric over the steps."""

    steps: Sequence[int]
    values: Sequence[float | None]
    """None for a value that was logged and not finite"""

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


@dataclass(frozen=True, kw_only=True)
class MarginRows:
    """Margins of a set's pairs, as last measured."""

    step: int
    columns: Mapping[str, npt.NDArray[np.float32]]
    """Column of `records.MARGIN_COLUMNS` -> values, [P] each"""
    rows: npt.NDArray[np.int64] | None = None
    """Position of each pair in the source, [P]; None in a file of an earlier version"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, as far as it can be read."""

    folder: Path
    settings: Mapping[str, Any]
    """Settings as `config.as_dict` gives them; empty if they can't be read"""
    records: Sequence[tuple[int, Mapping[str, float | None]]]
    """Step and metrics of each line that counts, by step; None for a value that was not finite"""
    attempts: Sequence[AttemptSummary]
    inputs: Mapping[str, Any]
    """Content of `inputs.json`; empty if it can't be read"""
    margins: Mapping[str, MarginRows]
    """Set -> margins; `train` holds the last pairs that were trained on"""
    generations: Sequence[Generation]
    finished: bool
    policy_step: int | None
    """Step of the saved policy; None if the run has not finished"""
    max_steps: int | None
    last_written: float | None
    """Unix time of the newest line of the log"""
    remarks: Sequence[str]
    """Sentences for people about what is missing, damaged or odd"""

    @property
    def step(self) -> int:
        """The last step that was logged and counts."""
        return max((step for step, _ in self.records), default=0)

    def curve(self, metric: str) -> Curve:
        """Give a metric over the steps; an empty curve if it was never logged."""
        values = {step: numbers[metric] for step, numbers in self.records if metric in numbers}
        return Curve(list(values), list(values.values()))

    def figure(self, metric: str) -> float | None:
        """Give a metric of the saved policy if it was measured, else its last value."""
        curve = self.curve(metric)
        return dict(zip(curve.steps, curve.values, strict=True)).get(self.policy_step or 0, curve.last)

    def held_out(self) -> dict[str, str]:
        """Give the evaluated held-out sets, each with its metrics' prefix: `eval_` or `eval_NAME_`."""
        prefixes: dict[str, None] = {}
        for _, numbers in self.records:
            named = [key for key in numbers if key.startswith("eval_") and key.endswith("_loss")]
            if named:
                # The set's aux_loss may stand beside its loss.
                prefixes[min(named, key=len).removesuffix("loss")] = None
        names = list(part(self.settings, "data", "eval"))
        only = names[0] if len(names) == 1 else "held-out"
        return {prefix.removeprefix("eval").strip("_") or only: prefix for prefix in prefixes}


def part(tree: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Give the mapping at nested keys; an empty one if a key is missing."""
    for key in keys:
        found = tree.get(key)
        if not isinstance(found, Mapping):
            return {}
        tree = found
    return tree


def read_record(run_folder: Path) -> dict[str, Any]:
    """Read the record of a finished run. Raises DataError if it is damaged, StorageError if it can't be read."""
    return _RECORD_SCHEMA.read(run_folder / RECORD)


def read_inputs(run_folder: Path) -> dict[str, Any]:
    """Read what the last attempt began with. Raises as `read_record` does."""
    return _INPUTS_SCHEMA.read(run_folder / INPUTS)


def read_run(folder: Path) -> Run:
    """Read a run's folder: `train.output_dir`.

    Raises:
        ConfigError: The folder is not a run's.
        DataError: A whole line of the log is not as the run wrote it.
    """
    if not any((folder / name).is_file() for name in (SETTINGS, LOG, INPUTS, RECORD)):
        found = f"one without {LOG} and {SETTINGS}" if folder.is_dir() else "no folder"
        inside = sorted({file.parent.name for name in (LOG, SETTINGS) for file in folder.glob(f"*/{name}")})
        known = f" (runs inside: {', '.join(inside[:8])})" if inside else ""
        raise ConfigError(f"{folder}: must be a run's folder, got {found}{known}. Name a train.output_dir")
    remarks: list[str] = []

    def read(name: str, reader: Callable[[Path], _Content], missing: str = "") -> _Content | None:
        file = folder / name
        if not file.exists():
            if missing:
                remarks.append(f"{name} is missing: {missing}")
            return None
        try:
            return reader(file)
        except (RefshardError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            remarks.append(f"{name} can't be read: {first_line(error)}")
            return None

    texts = read(LOG, lambda file: read_file(file, most=2**32).splitlines(), "the page has no curves") or []
    lines, num_broken = _parse_log(folder / LOG, texts)
    if num_broken:
        remarks.append(f"{LOG}: {num_broken:,} of {num_broken + len(lines):,} lines can't be read")
    attempts = _attempts(lines)
    records = _records(lines, attempts)
    not_finite = sum(value is None for _, numbers in records for value in numbers.values())
    if not_finite:
        remarks.append(f"{LOG}: {not_finite:,} values are not finite (NaN or infinite); the curves have gaps there")
    names = sorted(file.name for file in (folder / MARGINS).glob("*.parquet"))
    margins = {Path(name).stem: read(f"{MARGINS}/{name}", _read_margins) for name in names}
    record = read(RECORD, _RECORD_SCHEMA.read) or {}
    return Run(
        folder=folder,
        settings=read(SETTINGS, lambda file: as_dict(load_config(file)), "the run's settings are unknown") or {},
        records=records,
        attempts=list(attempts.values()),
        inputs=read(INPUTS, _INPUTS_SCHEMA.read, "the run's reference, policy and sets are unknown") or {},
        margins={name: rows for name, rows in margins.items() if rows is not None},
        generations=read(GENERATIONS, read_generations) or [],
        finished=record.get("finished") is True,
        policy_step=record.get("step"),
        max_steps=next((line["max_steps"] for line in reversed(lines) if "max_steps" in line), None),
        last_written=max((line["time"] for line in lines), default=None),
        remarks=remarks,
    )


def _parse_log(file: Path, texts: Sequence[bytes]) -> tuple[list[dict[str, Any]], int]:
    """Parse a log's whole lines. Also count the others: a kill, or a write in progress, leaves part of a line.

    Raises:
        DataError: A whole line is not as the run wrote it.
    """
    lines, num_broken = [], 0
    for number, text in enumerate(texts, start=1):
        place = f"{file}, line {number}"
        if not text.strip():
            continue
        try:
            line = parse_json(place, text, finite=True)
        except DataError:
            num_broken += 1
            continue
        _LOG_SCHEMA.check(place, line)
        lines.append(line)
    return lines, num_broken


def _attempts(lines: Sequence[Mapping[str, Any]]) -> dict[int, AttemptSummary]:
    """Summarize each attempt, by number."""
    attempts = {}
    for number in sorted({line["attempt"] for line in lines}):
        own = [line for line in lines if line["attempt"] == number]
        first: Mapping[str, Any] = next((line for line in own if line["kind"] == "start"), {})
        steps = [line["step"] for line in own]
        attempts[number] = AttemptSummary(
            # Without its first line, an attempt began before the first step that it logged.
            step=first.get("step", max(min(steps) - 1, 0)),
            last_step=max(steps),
            seconds=max(line.get("seconds") or 0.0 for line in own),
            memory_bytes=max(line.get("memory_bytes") or 0 for line in own) or None,
            device=first.get("device"),
            processes=first.get("processes"),
            versions=first.get("versions") or {},
        )
    return attempts


def _records(
    lines: Sequence[Mapping[str, Any]], attempts: dict[int, AttemptSummary]
) -> list[tuple[int, dict[str, float | None]]]:
    """Give step and metrics of the lines that no later attempt has repeated, by step; within a step, by attempt."""
    # An attempt resumes after its own first step, whatever earlier attempts logged beyond it.
    valid_to: dict[int, float] = {}
    limit = math.inf
    for number, attempt in reversed(attempts.items()):
        valid_to[number] = limit
        limit = min(limit, attempt.step)
    valid = [line for line in lines if line["kind"] in ("log", "summary") and line["step"] <= valid_to[line["attempt"]]]
    return [(line["step"], _numbers(line)) for line in sorted(valid, key=lambda line: (line["step"], line["attempt"]))]


_NOT_METRICS = ("kind", "time", "attempt", "step", "epoch", "seconds", "memory_bytes")


def _numbers(line: Mapping[str, Any]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {key: value for key, value in line.items() if key not in _NOT_METRICS}
    for prefix in [key.removesuffix("logps/chosen_shift") for key in numbers if key.endswith("logps/chosen_shift")]:
        names = ("logps/chosen_shift", "logps/chosen", "logps/rejected", "ref/margins")
        parts = [value for name in names if (value := numbers.get(f"{prefix}{name}")) is not None]
        if len(parts) == len(names):
            # The two shifts differ by the policy's margin minus the reference's.
            shift, chosen, rejected, ref_margin = parts
            numbers[f"{prefix}logps/rejected_shift"] = shift - (chosen - rejected) + ref_margin
    return numbers


def _read_margins(file: Path) -> MarginRows:
    # The file alone; `read_table` would read partition columns from the folder's name.
    with open_parquet(file) as parquet:
        table = parquet.read(columns=["row", *MARGIN_COLUMNS])
        step = int(parquet.metadata.metadata[b"refshard.step"])
    rows = table["row"].cast(pa.int64()).to_numpy() if "row" in table.column_names else None
    columns = {name: table[name].cast(pa.float32()).to_numpy() for name in MARGIN_COLUMNS}
    return MarginRows(step=step, columns=columns, rows=rows)
