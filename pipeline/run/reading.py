"""What a run of stage two has written down so far, read for people: nothing in the folder is changed.

A run may still be going on, may have been killed in the middle of a line, may have been resumed: what is missing or
damaged is left out and said among the remarks, and of steps that were done twice the later start's count.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.base.files import read_json
from pipeline.config.reader import as_dict, load_config
from pipeline.replies.records import Generation, Reply
from pipeline.run.records import GENERATIONS, INPUTS, LOG, MARGIN_COLUMNS, MARGINS

__all__ = ["RECORD", "SETTINGS", "Curve", "MarginRows", "Record", "Run", "Start", "part", "read_run"]

SETTINGS, RECORD = "refshard.yaml", "run.json"
"""Of a run's folder: its settings; what marks it as finished"""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the log that holds numbers."""

    step: int
    attempt: int
    numbers: Mapping[str, float | None]
    """By metric; None for what was not finite."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of the run, and how far it came."""

    attempt: int
    step: int
    """That it began after; 0 for a fresh one."""
    last_step: int
    seconds: float
    """From its first step to the last line that it wrote."""
    memory_bytes: float | None
    """The most at any time, of the first process."""
    device: str | None
    processes: int | None
    batch_pairs: int | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Curve:
    """A metric over the steps."""

    steps: Sequence[int]
    values: Sequence[float | None]
    """None: it was logged, and not finite"""

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


@dataclass(frozen=True, kw_only=True)
class MarginRows:
    """Margins of a set's pairs, as last measured."""

    step: int | None
    columns: Mapping[str, npt.NDArray[np.float32]]
    """As `records.MARGIN_COLUMNS`, each [P]."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's folder, as far as it can be read."""

    folder: Path
    settings: Mapping[str, Any]
    """As `config.as_dict` gives them; empty where they can't be read."""
    records: Sequence[Record]
    """Those that count, by step: of steps that were done again, what the last start logged."""
    starts: Sequence[Start]
    inputs: Mapping[str, Any]
    """As `records.write_inputs` wrote them; empty where they can't be read."""
    margins: Mapping[str, MarginRows]
    """By set; `train`: the last pairs that were trained on."""
    generations: Sequence[Generation]
    finished: bool
    max_steps: int | None
    began: float | None
    """Unix time of the first line of the log"""
    last_written: float | None
    """Unix time of the last line of the log"""
    remarks: Sequence[str]
    """What is missing, damaged or odd, for people."""

    @property
    def step(self) -> int:
        """The last one that was logged and counts."""
        return max((record.step for record in self.records), default=0)

    def curve(self, metric: str) -> Curve:
        """Give a metric over the steps; an empty curve if it was never logged."""
        values = {record.step: record.numbers[metric] for record in self.records if metric in record.numbers}
        steps = sorted(values)
        return Curve(steps, [values[step] for step in steps])

    def held_out(self) -> dict[str, str]:
        """Name the held-out sets that were evaluated, each with what its metrics begin with: `eval_`, `eval_NAME_`."""
        prefixes: dict[str, None] = {}
        for record in self.records:
            named = [key for key in record.numbers if key.startswith("eval_") and key.endswith("_loss")]
            if named:
                # Beside a set's loss there may be its aux_loss.
                prefixes[min(named, key=len).removesuffix("loss")] = None
        names = list(self.settings.get("data", {}).get("eval") or {})
        only = names[0] if len(names) == 1 else "held-out"
        return {prefix.removeprefix("eval").strip("_") or only: prefix for prefix in prefixes}


def part(tree: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Give a mapping within a mapping; an empty one where there is none."""
    for key in keys:
        found = tree.get(key)
        if not isinstance(found, Mapping):
            return {}
        tree = found
    return tree


def read_run(folder: Path) -> Run:
    """Read a run's folder: `train.output_dir`.

    Raises:
        ConfigError: It is no run's folder.
    """
    if not any((folder / name).is_file() for name in (SETTINGS, LOG, INPUTS, RECORD)):
        raise ConfigError(_no_run(folder))
    remarks: list[str] = []
    lines, began_and_last = _read_log(folder / LOG, remarks)
    starts = _starts(lines)
    records = _counting(lines, starts)
    not_finite = sum(value is None for record in records for value in record.numbers.values())
    if not_finite:
        remarks.append(f"values that are not finite (NaN or infinite): {not_finite:,}; the curves have gaps there")
    record = _read_optional(folder / RECORD, remarks)
    announced = [line["max_steps"] for line in lines if line["kind"] == "start" and _is_count(line.get("max_steps"))]
    return Run(
        folder=folder,
        settings=_read_settings(folder / SETTINGS, remarks),
        records=records,
        starts=starts,
        inputs=_read_optional(folder / INPUTS, remarks, missing="what it began with is not known"),
        margins=_read_margins(folder / MARGINS, remarks),
        generations=_read_generations(folder / GENERATIONS, remarks),
        finished=record.get("finished") is True,
        max_steps=announced[-1] if announced else None,
        began=began_and_last[0],
        last_written=began_and_last[1],
        remarks=remarks,
    )


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such folder; name the folder of a run (its train.output_dir)"
    inside = sorted({file.parent.name for name in (LOG, SETTINGS) for file in folder.glob(f"*/{name}")})
    hint = f"; these in it are runs: {', '.join(inside[:8])}" if inside else " (its train.output_dir)"
    return f"{folder}: no run there, neither {LOG} nor {SETTINGS}; name the folder of a run{hint}"


def _read_log(file: Path, remarks: list[str]) -> tuple[list[dict[str, Any]], tuple[float | None, float | None]]:
    """Read the lines that can be read, in the file's order, and when the first and the last of them were written."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        remarks.append(f"{LOG} is missing: there are no curves")
        return [], (None, None)
    except OSError as error:
        remarks.append(f"{LOG} can't be read ({error.strerror or error}): there are no curves")
        return [], (None, None)
    lines, broken = [], 0
    for text in content.splitlines():
        line = _parse_line(text)
        if line is not None and _is_count(line.get("step")) and _is_count(line.get("attempt")):
            lines.append({"kind": None, **line})
        elif text.strip():
            broken += 1
    if broken:
        remarks.append(f"{LOG}: {broken:,} of {broken + len(lines):,} lines can't be read, as a kill leaves them")
    times = [line["time"] for line in lines if _number(line.get("time")) is not None]
    return lines, (min(times), max(times)) if times else (None, None)


def _parse_line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: object) -> float | None:
    """A number that is finite, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _starts(lines: Sequence[Mapping[str, Any]]) -> list[Start]:
    by_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_attempt.setdefault(line["attempt"], []).append(line)
    starts = []
    for attempt, own in sorted(by_attempt.items()):
        begun: Mapping[str, Any] = next((line for line in own if line["kind"] == "start"), {})
        memory = [value for line in own if (value := _number(line.get("memory_bytes"))) is not None]
        # Without its first line a start began before the first step that it logged, at the latest.
        step = begun["step"] if begun else max(min(line["step"] for line in own) - 1, 0)
        starts.append(
            Start(
                attempt=attempt,
                step=step,
                last_step=max(line["step"] for line in own),
                seconds=max((_number(line.get("seconds")) or 0.0 for line in own), default=0.0),
                memory_bytes=max(memory, default=None),
                device=str(begun["device"]) if begun.get("device") else None,
                processes=begun.get("processes") if _is_count(begun.get("processes")) else None,
                batch_pairs=begun.get("batch_pairs") if _is_count(begun.get("batch_pairs")) else None,
                versions=versions if isinstance(versions := begun.get("versions"), dict) else {},
            )
        )
    return starts


_NO_METRICS = ("time", "attempt", "step", "epoch", "seconds", "memory_bytes")


def _counting(lines: Iterable[Mapping[str, Any]], starts: Sequence[Start]) -> list[Record]:
    """Keep the lines that no later start has done again, by step; of one step the later starts' come last."""
    # A start goes on after its own first step, whatever earlier ones have logged beyond it.
    valid_to: dict[int, float] = {}
    limit = math.inf
    for start in reversed(starts):
        valid_to[start.attempt] = limit
        limit = min(limit, start.step)
    records = [
        Record(
            step=line["step"],
            attempt=line["attempt"],
            numbers=_numbers(line),
        )
        for line in lines
        if line["kind"] in ("log", "summary") and line["step"] <= valid_to[line["attempt"]]
    ]
    return sorted(records, key=lambda record: (record.step, record.attempt))


def _numbers(line: Mapping[str, Any]) -> dict[str, float | None]:
    numbers = {
        key: _number(value)
        for key, value in line.items()
        if key not in _NO_METRICS
        and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }
    for chosen_shift in [key for key in numbers if key.endswith("logps/chosen_shift")]:
        prefix = chosen_shift.removesuffix("logps/chosen_shift")
        parts = (chosen_shift, *(f"{prefix}{name}" for name in ("logps/chosen", "logps/rejected", "ref/margins")))
        shift, chosen, rejected, ref_margin = (numbers.get(key) for key in parts)
        if shift is not None and chosen is not None and rejected is not None and ref_margin is not None:
            # The two shifts differ by the policy's margin less the reference's.
            numbers[f"{prefix}logps/rejected_shift"] = shift - (chosen - rejected) + ref_margin
    return numbers


def _read_settings(file: Path, remarks: list[str]) -> dict[str, Any]:
    if not file.is_file():
        remarks.append(f"{SETTINGS} is missing: what the run's settings were is not known")
        return {}
    try:
        return as_dict(load_config(file))
    except ConfigError as error:
        remarks.append(f"the settings can't be read: {error}")
        return {}


def _read_optional(file: Path, remarks: list[str], *, missing: str = "") -> dict[str, Any]:
    if not file.exists():
        if missing:
            remarks.append(f"{file.name} is missing: {missing}")
        return {}
    try:
        return read_json(file)
    except (DataError, StorageError) as error:
        remarks.append(str(error))
        return {}


def _read_margins(folder: Path, remarks: list[str]) -> dict[str, MarginRows]:
    margins = {}
    for file in sorted(folder.glob("*.parquet")):
        try:
            # The file alone, not what its folder's name may say of it.
            table = pq.ParquetFile(file).read(columns=list(MARGIN_COLUMNS))
            columns = {name: table[name].to_numpy().astype(np.float32) for name in MARGIN_COLUMNS}
            step = int((table.schema.metadata or {}).get(b"refshard.step", b"-1"))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            remarks.append(f"{MARGINS}/{file.name} can't be read ({error})")
            continue
        if table.num_rows:
            margins[file.stem] = MarginRows(step=step if step >= 0 else None, columns=columns)
    return margins


def _read_generations(file: Path, remarks: list[str]) -> list[Generation]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        remarks.append(f"{GENERATIONS} can't be read ({error.strerror or error})")
        return []
    generations, broken = [], 0
    for text in content.splitlines():
        generation = _generation(_parse_line(text) or {})
        if generation is not None:
            generations.append(generation)
        elif text.strip():
            broken += 1
    if broken:
        remarks.append(f"{GENERATIONS}: {broken:,} of {broken + len(generations):,} lines can't be read")
    return generations


def _generation(line: Mapping[str, Any]) -> Generation | None:
    reference, policy = _reply(line.get("reference")), _reply(line.get("policy"))
    if reference is None or policy is None or not isinstance(line.get("prompt"), str):
        return None
    if not _is_count(line.get("row")):
        return None
    reward_by = line.get("reward_by")
    return Generation(
        set_name=str(line.get("set", "")),
        row=line["row"],
        prompt=line["prompt"],
        step=line.get("step") if _is_count(line.get("step")) else None,
        temperature=_number(line.get("temperature")),
        max_tokens=line.get("max_tokens") if _is_count(line.get("max_tokens")) else None,
        seed=seed if isinstance(seed := line.get("seed"), int) else None,
        num_prompts=line.get("prompts") if _is_count(line.get("prompts")) else None,
        reward_by=None if reward_by is None else str(reward_by),
        reference=reference,
        policy=policy,
    )


def _reply(value: object) -> Reply | None:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not _is_count(value.get("num_tokens")):
        return None
    ref_logps, policy_logps = _number(value.get("ref_logps")), _number(value.get("policy_logps"))
    if ref_logps is None or policy_logps is None:
        return None
    return Reply(
        text=value["text"],
        num_tokens=value["num_tokens"],
        ref_logps=ref_logps,
        policy_logps=policy_logps,
        reward=_number(value.get("reward")),
    )
