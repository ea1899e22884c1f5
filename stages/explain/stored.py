"""Look up a pair in a store, finished or not, and compare its log-probs with recomputed ones."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base.errors import RefshardError
from pipeline.base.folders import Folder
from pipeline.models.identity import differences
from pipeline.scoring import agreement
from pipeline.scoring.agreement import Agreement, NoiseFloor
from pipeline.store.format import pair_keys, part_name
from pipeline.store.store import Store, load_store, read_checked_part
from stages.explain.row import SIDES, Explanation, with_logps

__all__ = ["StoredPair", "compare", "find_stored", "with_stored"]


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """A pair as a store has it, and as the store cut it."""

    place: str
    """Part that holds it."""
    row: int
    """Row of the dataset that was scored."""
    sums: Mapping[str, float]
    """Log-prob of each completion, nats."""
    lengths: Mapping[str, int]
    token_logps: Mapping[str, Sequence[float]]
    """Log-probs of each completion's tokens, nats; empty if the store has sums only."""
    noise: NoiseFloor
    """Noise floor of the store, or of the part while the store is unfinished."""


def find_stored(
    folder: Folder, key: str, row: int, identity: Mapping[str, Any], exact: int | None
) -> tuple[StoredPair | None, tuple[str, ...]]:
    """Look up a pair by its key, in hex; its row tells where to look first; `exact` is the reference's exact length.

    Returns:
        The stored pair, and remarks: why there is none, or why it may not be of this run, which `identity` describes.
    """
    remarks = []
    try:
        store = load_store(folder)
        if store.unfinished is not None:
            remarks.append(str(store.unfinished))
        found = differences(store.manifest["identity"], identity, joining=True, exact=exact)
        if found:
            remarks.append(f"{folder}: of another reference or tokenization than this run's: {'; '.join(found)}")
        stored = _search(store, bytes.fromhex(key), row)
    except RefshardError as error:
        return None, (*remarks, str(error))
    if stored is None:
        remarks.append(f"{folder}: no pair in it has this key")
    elif stored.row != row:
        remarks.append(f"{stored.place}: stored as row {stored.row}, an equal pair")
    return stored, tuple(remarks)


def _search(store: Store, key: bytes, row: int) -> StoredPair | None:
    plan = store.manifest["plan"]
    # The part of the row, unless the data has changed since.
    start = int(str(plan.get("rows", "0")).partition(":")[0] or 0)
    likely = (row - start) // int(plan.get("rows_per_shard") or 1)
    for unit in sorted(store.units, key=lambda unit: unit != likely):
        # Token logps are most of a part, so they are read only from the part that has the key.
        keys = pair_keys(read_checked_part(store, unit, ["pair_key"]).table)
        # NumPy's byte strings drop trailing zeros.
        hits = (keys == key.rstrip(b"\0")).nonzero()[0]
        if not len(hits):
            continue
        part = read_checked_part(store, unit)
        found = part.table.slice(int(hits[0]), 1).to_pylist()[0]
        return StoredPair(
            place=store.folder.place(part_name(unit)),
            row=found["row"],
            sums={side: found[f"ref_{side}_logps"] for side in SIDES},
            lengths={side: found[f"{side}_tokens"] for side in SIDES},
            token_logps={side: found[f"{side}_token_logps"] for side in SIDES if f"{side}_token_logps" in found},
            noise=store.noise if store.index else part.noise,
        )
    return None


def with_stored(pair: Explanation, stored: StoredPair) -> Explanation:
    """Add stored log-probs to the tokens. If the store cut a completion later than this run, the rest is left out."""
    counts = {side: len(completion.scored) for side, completion in pair.completions.items()}
    logps = {side: list(stored.token_logps.get(side, ()))[: counts[side]] for side in SIDES}
    pair = with_logps(pair, "stored", *logps.values())
    remarks, completions = list(pair.remarks), {}
    for side, completion in pair.completions.items():
        total: float | None = stored.sums[side]
        if stored.lengths[side] != counts[side]:
            total = completion.sums.stored if len(logps[side]) == counts[side] else None
            remarks.append(
                f"{side}: the store has {stored.lengths[side]} tokens of it, this run scores {counts[side]}"
                + ("" if total is not None else ", so the sums are of different texts")
            )
        sums = dataclasses.replace(completion.sums, stored=total)
        completions[side] = dataclasses.replace(completion, sums=sums)
    return dataclasses.replace(pair, completions=completions, remarks=tuple(remarks))


def compare(pair: Explanation, allowed: tuple[float, float]) -> Agreement | None:
    """Compare recomputed with stored log-probs by token, or by sums per token if only sums are stored."""
    gaps = []
    for completion in pair.completions.values():
        if by_token := [token.gap for token in completion.scored if token.gap is not None]:
            gaps.append(np.array(by_token))
        elif completion.sums.gap is not None:
            gaps.append(np.array([completion.sums.gap / len(completion.scored)]))
    return agreement.compare(gaps, allowed) if gaps else None
