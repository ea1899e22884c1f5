"""Records of a run for people.

    RUN/log.jsonl              a line for each start of an attempt, log, evaluation and end, appended
    RUN/inputs.json            reference, policy, sets: what the last attempt began with
    RUN/margins/NAME.parquet   a row a pair, of the newest evaluation; `train`: the last trained pairs
    RUN/trackers.json          pages of the run in trackers, which the next attempt continues
    RUN/generations.jsonl      replies of the reference and of the policy to the same prompts (refshard generate)
    OUTPUT/costs/*.json        costs of stage one, a file for each worker's work on a set

Each file may be deleted, and none is part of a run's or a store's identity.
"""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import DataError, StorageError
from pipeline.base.files import delete_named, make_folder, replace_file
from pipeline.base.folders import Folder
from pipeline.base.progress import say, without_nan
from pipeline.base.schemas import Schema
from pipeline.replies.records import GENERATIONS
from pipeline.run.attempts import Attempt

__all__ = [
    "COSTS",
    "INPUTS",
    "LOG",
    "MARGINS",
    "MARGIN_COLUMNS",
    "PAGES",
    "RunLog",
    "delete_costs",
    "delete_records",
    "read_costs",
    "write_cost",
    "write_margins",
]

LOG, INPUTS, MARGINS, PAGES, COSTS = "log.jsonl", "inputs.json", "margins", "trackers.json", "costs"

_COST_SCHEMA = Schema(__package__, "cost")
_LARGEST_COST = 2**20
"""Most bytes of a file of costs, which has some hundred"""


MARGIN_COLUMNS = ("ref_margin", "policy_margin", "reward_margin", "chosen_shift", "rejected_shift")
"""Columns of a pair: chosen minus rejected logps under either model, nats; reward margin; log-ratios, nats"""


class RunLog:
    """Appends to a run's log, as long as its attempt is the newest.

    If the disk refuses a line, the line is lost and the run continues, with one warning.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._file = attempt.run_folder / LOG
        self._attempt = attempt
        self._warned = False

    def add(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one line."""
        if not self._attempt.is_newest():
            return
        line = json.dumps(without_nan({"kind": kind, "time": time.time(), "attempt": self._attempt.number, **record}))
        try:
            if self._file.exists() and self._file.stat().st_nlink > 1:
                # A copy of a run that was made with hard links, as backups are, shares its log with the original.
                replace_file(self._file, self._file.read_bytes())
            with self._file.open("a+b") as log:
                # Start a new line after one that a kill has cut short.
                log.seek(-1 if log.tell() else 0, 2)
                log.write(b"" if log.read(1) in (b"", b"\n") else b"\n")
                log.write(line.encode() + b"\n")
        except (OSError, StorageError) as error:
            if not self._warned:
                reason = (isinstance(error, OSError) and error.strerror) or error
                say(f"warning: {self._file}: a line is lost ({reason})", err=True)
            self._warned = True


def write_margins(
    run_folder: Path, name: str, step: int, ids: npt.NDArray[np.int64], values: npt.NDArray[np.float32]
) -> None:
    """Write the margins of a set's pairs, in place of an earlier evaluation's. Raises StorageError.

    Args:
        run_folder: Folder of the run.
        name: Set.
        step: Step of the evaluation.
        ids: Row in the source, and the pair's key as two little-endian integers, [P, 3].
        values: Values of `MARGIN_COLUMNS`, [P, 5].
    """
    named = [("row", pa.int64()), ("pair_key", pa.binary(16)), *((name, pa.float32()) for name in MARGIN_COLUMNS)]
    schema = pa.schema([pa.field(column, kind, nullable=False) for column, kind in named])
    keys = [key.tobytes() for key in np.ascontiguousarray(ids[:, 1:]).astype("<i8")]
    columns = [pa.array(ids[:, 0]), pa.array(keys, pa.binary(16)), *map(pa.array, values.T)]
    table = pa.Table.from_arrays(columns, schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"refshard.step": str(step)}), sink)
    folder = run_folder / MARGINS
    make_folder(folder)
    replace_file(folder / f"{name}.parquet", sink.getvalue().to_pybytes())


def delete_records(run_folder: Path) -> None:
    """Delete the records of an earlier run in this folder."""
    for name in (LOG, INPUTS, PAGES, GENERATIONS):
        (run_folder / name).unlink(missing_ok=True)
    delete_named(run_folder / MARGINS, re.compile(r".+\.parquet"))


def write_cost(output: Folder, cost: Mapping[str, Any]) -> None:
    """Record the costs of a worker's work on one set; warn if the disk fails."""
    folder = output.child(COSTS)
    try:
        folder.make()
        folder.put_if_absent(f"{cost['set']}-{uuid.uuid4().hex[:12]}.json", json.dumps(cost).encode())
    except StorageError as error:
        say(f"warning: {error}; what scoring {cost['set']} took is not written down", err=True)


def delete_costs(output: Folder, name: str) -> None:
    """Delete the costs of one set, whose store is deleted too. Raises StorageError."""
    folder = output.child(COSTS)
    # Match the whole suffix: another set may be named `NAME-2`.
    mine = re.compile(rf"{re.escape(name)}-[0-9a-f]{{12}}\.json")
    for file in folder.names():
        if mine.fullmatch(file):
            folder.delete(file)


def read_costs(output: Folder) -> list[dict[str, Any]]:
    """Read the costs of all workers; files that can't be read are left out."""
    folder = output.child(COSTS)
    costs = []
    with contextlib.suppress(StorageError):
        for name, size in sorted(folder.sizes().items()):
            if name.endswith(".json") and size <= _LARGEST_COST:
                with contextlib.suppress(StorageError, DataError, FileNotFoundError):
                    costs.append(_COST_SCHEMA.parse(folder.place(name), folder.read(name)))
    return costs
