"""Stores of made-up log-probs, by the project's own writer: some pairs whose numbers are known, or a million."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from test_shards import DECLARED, IDENTITY

from pipeline.data.intake import Ledger
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store.format import ScoredPair
from pipeline.store.store import create_store, finish_store, write_part


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


def start_store(folder: Path, rows_per_shard: int = 1024) -> str:
    """Write the manifest; gives the fingerprint."""
    plan: dict[str, Any] = {"rows_per_shard": rows_per_shard, "rows": "0:"}
    return create_store(folder, IDENTITY, plan, DECLARED)


def write_unit(folder: Path, unit: int, pairs: Sequence[ScoredPair], fingerprint: str, noise: float = 0.0) -> None:
    write_part(
        folder,
        unit,
        pairs,
        fingerprint=fingerprint,
        token_logps=True,
        ledger=Ledger(rows=len(pairs), kept=len(pairs)),
        provenance={},
        noise=NoiseFloor(tokens=100, mean=noise, largest=4 * noise),
    )


def make_store(folder: Path, units: Sequence[Sequence[ScoredPair]], *, noise: float = 0.0, finish: bool = True) -> Path:
    fingerprint = start_store(folder, max(map(len, units)))
    for unit, pairs in enumerate(units):
        write_unit(folder, unit, pairs, fingerprint, noise)
    if finish:
        finish_store(folder, len(units))
    return folder


def make_large_store(folder: Path, pairs: int, rows_per_shard: int = 1024) -> Path:
    fingerprint = start_store(folder, rows_per_shard)
    units = -(-pairs // rows_per_shard)
    for unit in range(units):
        start = unit * rows_per_shard
        count = min(rows_per_shard, pairs - start)
        write_unit(folder, unit, made_pairs(count, seed=unit, start=start), fingerprint)
    finish_store(folder, units)
    return folder
