"""Stores of made-up log-probs, by the project's own writer: some pairs whose numbers are known, or a million.

And what stores are compared by: their bytes and digests.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.intake import Ledger
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair, content_digest
from pipeline.store.store import PartHeader, create_store, open_store, read_parts, write_part

IDENTITY: dict[str, Any] = {
    "schema": 1,
    "reference": {"weights": "a" * 64, "config": "c" * 64, "dtype": "float32", "adapter": None},
    "tokenization": {"version": 1, "tokenizer": "t", "max_length": 64, "token_logps": True},
}
DECLARED = {"reference": "somewhere/model", "dataset": "pairs.jsonl"}
PLAN = {"rows_per_shard": 2, "rows": "0:"}
UNITS = 3


def pair_of(row: int, chosen: Sequence[float], rejected: Sequence[float]) -> ScoredPair:
    """A pair of these token logps, with a key of its row's own."""
    return ScoredPair(
        key=hashlib.blake2b(b"%d" % row, digest_size=16).digest(),
        row=row,
        prompt_tokens=3,
        chosen_token_logps=np.asarray(chosen, np.float32),
        rejected_token_logps=np.asarray(rejected, np.float32),
    )


def write_store(folder: Path) -> None:
    """What a worker does: the manifest, the units that are missing, the index."""
    header = create_store(folder, IDENTITY, PLAN, {})
    for unit in range(UNITS):
        pairs = [pair_of(row, [-1.0 - row, -0.5], [-2.0 - row]) for row in (2 * unit, 2 * unit + 1)]
        ledger = Ledger(rows=2, kept=2)
        if unit == UNITS - 1:
            ledger.rows += 1
            ledger.dropped["empty"] += 1
            ledger.skipped.append({"row": 9, "place": "p.jsonl:10", "reason": "empty", "message": "no text"})
        write_part(folder, unit, pairs, ledger, header=header)
    assert finish_store(folder, UNITS) == []


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished store, part by part."""
    return [row for part in read_parts(open_store(folder)) for row in part.to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".tmp-")}


def bytes_of_stores(output: Path) -> dict[str, bytes]:
    """All files of an output folder by their path in it, but for what its workers have cost, which is never alike.

    Joined sets, which stage two keeps beside the stores, are left out.
    """
    files = (file for file in sorted(output.rglob("*")) if file.is_file())
    return {
        name: file.read_bytes()
        for name, file in ((file.relative_to(output).as_posix(), file) for file in files)
        if not name.startswith(("costs/", ".joined/"))
    }


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in bytes_of_stores(folder).items()}


def forge_part(file: Path, table: pa.Table) -> None:
    """Write a part with other content as one who means it: with the digest of what it says now."""
    said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    digest = {b"refshard.digest": content_digest(table, said).encode()}
    whole = table.replace_schema_metadata({**table.schema.metadata, **digest})
    file.unlink()
    pq.write_table(whole, file, write_page_checksum=True, store_schema=True)


def made_pairs(count: int, *, seed: int = 0, tokens: float = 40.0, start: int = 0) -> list[ScoredPair]:
    """Pairs of a reference that finds the chosen completion a little more likely per token, of 3 to 400 tokens."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(tokens), 0.6, (count, 2)), 3, 400).astype(int)
    ends = np.cumsum(lengths.ravel())
    level = random.gamma(6, 1 / 6, (count, 2)) * [1.0, 1.05]
    flat = -random.exponential(1.0, ends[-1]) * np.repeat(level.ravel(), lengths.ravel())
    parts = np.split(flat.astype(np.float32), ends[:-1])
    prompts, keys = random.integers(8, 500, count).tolist(), random.bytes(16 * count)
    return [
        ScoredPair(
            key=keys[16 * i : 16 * i + 16],
            row=start + i,
            prompt_tokens=prompts[i],
            chosen_token_logps=parts[2 * i],
            rejected_token_logps=parts[2 * i + 1],
        )
        for i in range(count)
    ]


def start_store(folder: Path, rows_per_shard: int = 1024) -> PartHeader:
    """Write the manifest; gives what the parts carry."""
    plan: dict[str, Any] = {"rows_per_shard": rows_per_shard, "rows": "0:"}
    return create_store(folder, IDENTITY, plan, DECLARED)


def write_unit(
    folder: Path, unit: int, pairs: Sequence[ScoredPair], header: PartHeader, noise: float = 0.0, **changes: Any
) -> None:
    write_part(
        folder,
        unit,
        pairs,
        Ledger(rows=len(pairs), kept=len(pairs)),
        NoiseFloor(tokens=100, mean=noise, largest=4 * noise),
        header=dataclasses.replace(header, **changes),
    )


def make_store(folder: Path, units: Sequence[Sequence[ScoredPair]], *, noise: float = 0.0, finish: bool = True) -> Path:
    header = start_store(folder, max(map(len, units)))
    for unit, pairs in enumerate(units):
        write_unit(folder, unit, pairs, header, noise)
    if finish:
        finish_store(folder, len(units))
    return folder


def make_large_store(folder: Path, pairs: int, rows_per_shard: int = 1024) -> Path:
    header = start_store(folder, rows_per_shard)
    units = -(-pairs // rows_per_shard)
    for unit in range(units):
        start = unit * rows_per_shard
        count = min(rows_per_shard, pairs - start)
        write_unit(folder, unit, made_pairs(count, seed=unit, start=start), header)
    finish_store(folder, units)
    return folder
