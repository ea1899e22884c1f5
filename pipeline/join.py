"""Tokenized pairs x shards -> dataset with reference columns, joined by the pair's key.

The joined set is written to disk once, as an Arrow file that is then memory-mapped: its size costs no memory, and
the order is that of the source, so shuffling stays the trainer's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import DataError, IdentityError, StorageError
from pipeline.fingerprint import differences
from pipeline.intake import KeptPair
from pipeline.shards import Store, pair_keys, read_parts

__all__ = ["JoinReport", "ReferenceTable", "check_identity", "join", "load_reference_table"]

_CHUNK = 1024


@dataclass(frozen=True)
class ReferenceTable:
    """Keys and sums of one or more stores, sorted by key. Equal keys are equal pairs, and kept once."""

    keys: npt.NDArray[np.bytes_]
    """[R] 16 bytes each, ascending"""
    chosen_logps: npt.NDArray[np.float32]
    """[R] nats, cut to this run's max_length"""
    rejected_logps: npt.NDArray[np.float32]
    """[R] nats"""
    chosen_tokens: npt.NDArray[np.int32]
    """[R]"""
    rejected_tokens: npt.NDArray[np.int32]
    """[R]"""


@dataclass(frozen=True)
class JoinReport:
    """How the join went."""

    matched: int
    missing: int
    first_missing: str | None
    """Place of the first pair without reference logps"""
    surplus: int
    """Keys in the shards that no pair asked for"""

    def summary(self) -> str:
        return f"{self.matched:,} matched, {self.missing:,} missing, {self.surplus:,} surplus in the shards"


def check_identity(stores: Sequence[Store], identity: Mapping[str, Any]) -> None:
    """Refuse stores that were made by another reference or tokenization than this run's.

    Raises:
        IdentityError: The differing fields are named, both values side by side.
    """
    for store in stores:
        found = differences(store.manifest["identity"], identity, joining=True)
        if found:
            raise IdentityError(
                f"{store.folder}: these shards are not of this run's reference and tokenization. They differ in "
                f"{'; '.join(found)}. Score again into another precompute.output, or restore the settings"
            )


def load_reference_table(stores: Sequence[Store], max_length: int | None) -> ReferenceTable:
    """Read keys and sums from the stores; where they were cut later than `max_length`, sum the shorter prefix.

    A causal model's log-probs do not depend on what comes after, so the prefix of stored token logps is what a
    scoring at the smaller length would have given.
    """
    pieces: list[tuple[Any, ...]] = []
    for store in stores:
        stored_length = store.manifest["identity"]["tokenization"]["max_length"]
        shorter = max_length is not None and (stored_length is None or stored_length > max_length)
        columns = ["pair_key", "prompt_tokens", "chosen_tokens", "rejected_tokens"]
        columns += ["ref_chosen_logps", "ref_rejected_logps"]
        columns += ["chosen_token_logps", "rejected_token_logps"] if shorter else []
        for part in read_parts(store, columns):
            keys = pair_keys(part)
            sides = []
            for side in ("chosen", "rejected"):
                tokens = part[f"{side}_tokens"].to_numpy().astype(np.int32)
                sums = part[f"ref_{side}_logps"].to_numpy()
                if shorter:
                    room = np.maximum(max_length - part["prompt_tokens"].to_numpy(), 0)
                    tokens = np.minimum(tokens, room).astype(np.int32)
                    sums = _prefix_sums(part[f"{side}_token_logps"].combine_chunks(), tokens)
                sides += [sums.astype(np.float32), tokens]
            pieces.append((keys, *sides))
    if not pieces:
        raise DataError("the stores hold no part")
    keys, chosen, chosen_tokens, rejected, rejected_tokens = (
        np.concatenate([piece[i] for piece in pieces]) for i in range(5)
    )
    unique_keys, first = np.unique(keys, return_index=True)
    return ReferenceTable(
        keys=unique_keys,
        chosen_logps=chosen[first],
        rejected_logps=rejected[first],
        chosen_tokens=chosen_tokens[first],
        rejected_tokens=rejected_tokens[first],
    )


def join(pairs: Iterable[KeptPair], table: ReferenceTable, file: Path) -> JoinReport:
    """Look up every pair by key and write those that match to an Arrow file, in order.

    Columns: `pair_key`, `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps`,
    `ref_rejected_logps`. Pairs without a match are counted, not written; what that means is the caller's to say.

    Raises:
        DataError: A pair matches by key but not by its token counts: the shard was cut elsewhere.
        StorageError: The file can't be written.
    """
    matched, missing, first_missing = 0, 0, None
    used = np.zeros(len(table.keys), dtype=bool)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, _JOINED) as writer:
            for chunk in _chunks(pairs):
                keys = np.array([p.key for p in chunk], dtype="S16")
                at = np.minimum(np.searchsorted(table.keys, keys), max(len(table.keys) - 1, 0))
                hits = table.keys[at] == keys if len(table.keys) else np.zeros(len(keys), dtype=bool)
                for pair, i, hit in zip(chunk, at, hits, strict=True):
                    if not hit:
                        missing += 1
                        first_missing = first_missing or pair.place
                    elif (len(pair.pair.chosen_ids), len(pair.pair.rejected_ids)) != (
                        table.chosen_tokens[i],
                        table.rejected_tokens[i],
                    ):
                        raise DataError(
                            f"{pair.place}: the shards scored {table.chosen_tokens[i]} and {table.rejected_tokens[i]} "
                            f"tokens of it, this run has {len(pair.pair.chosen_ids)} and {len(pair.pair.rejected_ids)}"
                        )
                kept = [(p, i) for p, i, hit in zip(chunk, at, hits, strict=True) if hit]
                matched += len(kept)
                used[at[hits]] = True
                if kept:
                    writer.write_batch(_joined_batch(kept, table))
    except OSError as error:
        raise StorageError(f"{file}: can't be written ({error.strerror or error})") from error
    return JoinReport(matched, missing, first_missing, int(len(used) - used.sum()))


_JOINED = pa.schema(
    [
        ("pair_key", pa.binary(16)),
        ("row", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
    ]
)


def _joined_batch(kept: Sequence[tuple[KeptPair, int]], table: ReferenceTable) -> pa.RecordBatch:
    at = np.array([i for _, i in kept])
    return pa.RecordBatch.from_arrays(
        [
            pa.array([p.key for p, _ in kept], pa.binary(16)),
            pa.array([p.row for p, _ in kept], pa.int64()),
            pa.array([p.pair.prompt_ids for p, _ in kept], pa.list_(pa.int32())),
            pa.array([p.pair.chosen_ids for p, _ in kept], pa.list_(pa.int32())),
            pa.array([p.pair.rejected_ids for p, _ in kept], pa.list_(pa.int32())),
            pa.array(table.chosen_logps[at], pa.float32()),
            pa.array(table.rejected_logps[at], pa.float32()),
        ],
        schema=_JOINED,
    )


def _chunks(pairs: Iterable[KeptPair]) -> Iterator[list[KeptPair]]:
    chunk: list[KeptPair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _prefix_sums(lists: pa.Array, lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Sum the first `lengths[i]` values of each list, in float64."""
    offsets = lists.offsets.to_numpy().astype(np.int64)
    # A running sum over a whole part would round; each list is summed by itself.
    values = lists.values.to_numpy().astype(np.float64)
    return np.array([values[o : o + n].sum() for o, n in zip(offsets[:-1], lengths, strict=True)], dtype=np.float64)
