"""Check all of a store, and report everything that is wrong with it, not only the first problem.

    manifest -> its own digest, the fingerprint of its identity
    index    -> its own digest, every unit; the parts' counts and noise add up to its totals
    skipped  -> the rows that the parts list as skipped
    part     -> size and SHA-256 of the index, page checksums, content digest, fingerprint, schema
    rows     -> in their unit's range, once each, finite, sums those of their tokens; equal keys, equal values

Needs pyarrow, numpy and fastjsonschema only. Parts of an unfinished store are checked without an index.
"""

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import RefshardError, UnfinishedError
from pipeline.base.folders import LEFTOVERS, Folder
from pipeline.data.intake import Ledger
from pipeline.models.identity import differing_fields
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store.format import (
    DELETE_INDEX,
    INDEX,
    MANIFEST,
    MOST_SKIPPED,
    SKIPPED,
    add_skipped,
    is_ours,
    pair_keys,
    part_name,
)
from pipeline.store.store import Store, load_store, parts_there, read_checked_part, read_manifest

__all__ = ["Findings", "delete_leftovers", "verify_store"]

_SIDES = ("chosen", "rejected")


@dataclass
class Findings:
    """Counts of a store, and its problems."""

    place: str
    parts: int = 0
    """Number of parts that hold"""
    pairs: int = 0
    token_logps: int = 0
    duplicates: int = 0
    """Number of pairs whose key an earlier pair has"""
    largest_gap: float = 0.0
    """Largest difference of the sums of two pairs with one key, nats"""
    leftovers: list[str] = field(default_factory=list)
    """Temporary files of writers, killed or at work; no reader uses them"""
    unknown_files: list[str] = field(default_factory=list)
    """Other files; no reader uses them"""
    unfinished: UnfinishedError | None = None
    problems: list[RefshardError | str] = field(default_factory=list)


def verify_store(folder: Folder) -> Findings:
    """Check all of a store. Problems are returned, not raised; nothing is changed."""
    findings = Findings(str(folder))
    try:
        # Without the manifest nothing says what the parts should be.
        store = Store(folder=folder, manifest=read_manifest(folder), index={}, units=sorted(parts_there(folder)))
    except RefshardError as error:
        findings.problems.append(error)
        return findings
    try:
        store = load_store(folder)
        findings.unfinished = store.unfinished
    except RefshardError as error:
        findings.problems.append(error)
    known = {MANIFEST, INDEX, SKIPPED, *map(part_name, store.units)}
    for name in folder.names():
        if LEFTOVERS.fullmatch(name):
            findings.leftovers.append(name)
        elif name not in known:
            findings.unknown_files.append(name)
    _check_parts(store, findings)
    return findings


def delete_leftovers(folder: Folder, older_than: float = 3600.0) -> int:
    """Delete temporary files of at least `older_than` seconds by the file server's clock; return their number.

    Nothing is deleted where the manifest is another program's. Workers may be at work: one that loses a file, because a
    clock has jumped, writes it again. Raises StorageError.
    """
    if not is_ours(folder):
        return 0
    names = [name for name in folder.names() if LEFTOVERS.fullmatch(name)]
    now_file = f".tmp-{uuid.uuid4().hex}"
    folder.replace(now_file, b"")
    now = folder.modified(now_file) or 0.0
    folder.delete(now_file)
    old = [name for name in names if (written := folder.modified(name)) is not None and now - written >= older_than]
    for name in old:
        folder.delete(name)
    return len(old)


def _check_parts(store: Store, findings: Findings) -> None:
    keys: list[npt.NDArray[np.bytes_]] = []
    sums: list[npt.NDArray[np.float32]] = []
    last, totals, noise, skipped = -1, Ledger(), NoiseFloor(), bytearray()
    for unit in store.units:
        try:
            part = read_checked_part(store, unit, thorough=True)
        except RefshardError as error:
            findings.problems.append(error)
            continue
        table = part.table
        findings.parts += 1
        totals.add(part.ledger.as_dict())
        noise += part.noise
        add_skipped(skipped, part)
        place = store.folder.place(part_name(unit))
        problems = [*_problems_of_rows(unit, table, store.manifest["plan"], last)]
        if unit < len(store.index.get("parts", ())) - 1:
            problems += _problems_of_unit(part.ledger, store.manifest["plan"])
        findings.problems += [f"{place}: {problem}" for problem in problems]
        last = int(table["row"].to_numpy().max(initial=last))
        keys.append(pair_keys(table))
        sums.append(np.stack([table[f"ref_{side}_logps"].to_numpy() for side in _SIDES], axis=1))
        findings.pairs += table.num_rows
        findings.token_logps += sum(int(table[f"{side}_tokens"].to_numpy().sum()) for side in _SIDES)
    if store.index and findings.parts == len(store.units):
        findings.problems += (
            f"{store.folder.place(INDEX)}: {name} is {stored}, its parts add up to {found}. {DELETE_INDEX}"
            for name, stored, found in _differing_counts(store.index, totals, noise)
        )
        findings.problems += _problems_of_skipped(store.folder, bytes(skipped))
    if keys:
        _check_duplicates(np.concatenate(keys), np.concatenate(sums), findings)


def _problems_of_skipped(folder: Folder, lines: bytes) -> Iterator[RefshardError | str]:
    """Yield what is wrong with the list of skipped rows, which is the parts' own, put together."""
    try:
        content = folder.read(SKIPPED) if folder.size(SKIPPED) is not None else b""
    except RefshardError as error:
        yield error
        return
    # Earlier versions listed more.
    if content[:MOST_SKIPPED] != lines[:MOST_SKIPPED]:
        found, wanted = (text.count(b"\n") for text in (content, lines))
        yield (
            f"{folder.place(SKIPPED)}: must list the {wanted:,} rows that the parts list as skipped, got {found:,}. "
            f"Delete {INDEX} and run refshard precompute again: it writes both anew"
        )


def _differing_counts(index: Mapping[str, Any], totals: Ledger, noise: NoiseFloor) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and sum over the parts of each count of the index that is not what its parts say."""
    yield from differing_fields(index["totals"], totals.as_dict(), "totals.")
    for name, found in vars(noise).items():
        if not math.isclose(index["noise"][name], found, rel_tol=1e-9):
            yield f"noise.{name}", index["noise"][name], found


def _problems_of_unit(ledger: Ledger, plan: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the rows that a part counts; the last part alone may count fewer than a unit has."""
    size = plan.get("rows_per_shard")
    # Units of an imported store count kept pairs.
    if isinstance(plan.get("rows"), str) and ledger.rows != size:
        yield f"it counts {ledger.rows:,} rows, a unit has {size:,}"


def _problems_of_rows(unit: int, table: pa.Table, plan: Mapping[str, Any], last: int) -> Iterator[str]:
    rows = table["row"].to_numpy()
    if (np.diff(rows, prepend=last) <= 0).any():
        yield "its rows do not ascend, or an earlier part holds one of them"
    # Units of an imported store count kept pairs, and a TR-DPO window picks its rows.
    if isinstance(plan.get("rows"), str) and "window" not in plan:
        start = int(plan["rows"].partition(":")[0] or 0)
        size = int(plan["rows_per_shard"])
        first, end = start + unit * size, start + (unit + 1) * size
        stop = plan["rows"].partition(":")[2]
        end = min(end, int(stop)) if stop else end
        if ((rows < first) | (rows >= end)).any():
            yield f"it holds rows {rows.min()} to {rows.max()}, its unit's are {first} to {end - 1}"
    if (table["prompt_tokens"].to_numpy() < 1).any():
        yield "a prompt has no tokens"
    for side in _SIDES:
        totals = table[f"ref_{side}_logps"].to_numpy()
        lengths = table[f"{side}_tokens"].to_numpy()
        if not np.isfinite(totals).all():
            yield f"row {rows[~np.isfinite(totals)][0]}: a {side} log-prob is not finite"
        if (lengths < 1).any():
            yield f"row {rows[lengths < 1][0]}: a {side} completion has no tokens"
        if f"{side}_token_logps" not in table.column_names:
            continue
        lists = table[f"{side}_token_logps"].combine_chunks()
        values = lists.flatten().to_numpy()
        if not np.isfinite(values).all():
            yield f"a token of a {side} completion has a log-prob that is not finite"
        found = pc.list_value_length(lists).to_numpy()
        if not np.array_equal(found, lengths):
            yield f"row {rows[found != lengths][0]}: as many {side} token logps as {side}_tokens says are not there"
        elif (lengths >= 1).all() and len(lengths):
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            added = np.add.reduceat(values.astype(np.float64), starts).astype(np.float32)
            wrong = ~np.isclose(added, totals, rtol=1e-6, atol=1e-6)
            if wrong.any():
                yield f"row {rows[wrong][0]}: ref_{side}_logps is not the sum of its token logps"


def _check_duplicates(keys: npt.NDArray[np.bytes_], sums: npt.NDArray[np.float32], findings: Findings) -> None:
    """Compare the log-probs of equal keys, which may differ by the noise of another batch and no more."""
    order = np.argsort(keys, kind="stable")
    keys, sums = keys[order], sums[order].astype(np.float64)
    same = keys[1:] == keys[:-1]
    gaps, size = np.abs(sums[1:] - sums[:-1])[same], np.abs(sums[1:])[same]
    findings.duplicates, findings.largest_gap = int(same.sum()), float(gaps.max(initial=0.0))
    # Far above the noise of any dtype, and far below the difference that another prompt or model makes.
    if (gaps > 1.0 + 0.05 * size).any():
        findings.problems.append(
            f"{findings.place}: two pairs with one key have log-probs that differ by {findings.largest_gap:.3g} nats. "
            "One of them is not of this reference. Score again into another precompute.output"
        )
