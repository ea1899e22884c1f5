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

from pipeline.errors import ConfigError, DataError, IdentityError, StorageError
from pipeline.fingerprint import differences
from pipeline.intake import KeptPair
from pipeline.shards import Store, pair_keys, read_parts

__all__ = ["JoinReport", "ReferenceTable", "check_identity", "join", "load_reference_table"]

_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
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
    parts: npt.NDArray[np.int32]
    """[R] number of the part, counted through the stores"""
    rows: npt.NDArray[np.int64]
    """[R] row of `token_logps`"""
    token_logps: pa.Table | None = None
    """`chosen_token_logps` and `rejected_token_logps`, memory-mapped, cut as the sums are; None if not asked for"""


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


def load_reference_table(
    stores: Sequence[Store],
    max_length: int | None,
    *,
    ld_alpha: float | None = None,
    token_file: Path | None = None,
) -> ReferenceTable:
    """Read keys and sums from the stores; where they were cut later than `max_length`, sum the shorter prefix.

    A causal model's log-probs do not depend on what comes after, so the prefix of stored token logps is what a
    scoring at the smaller length would have given.

    Args:
        stores: Finished stores of one identity.
        max_length: Of this run, at most that of the stores.
        ld_alpha: Weight in the sums of tokens past the shorter completion's length (LD-DPO, arXiv 2409.06411).
        token_file: Where token logps go to be memory-mapped; they are left out if None, or where none are stored.

    Raises:
        ConfigError: `ld_alpha` is asked for, and a store has no token logps.
        DataError: A part is damaged, or its sums are not those of its token logps.
    """
    sums_only = [s for s in stores if not s.manifest["identity"]["tokenization"]["token_logps"]]
    stored = bool(stores) and not sums_only
    if ld_alpha is not None and sums_only:
        raise ConfigError(
            f"loss.ld_alpha: {sums_only[0].folder} holds sums alone, and tokens are weighed one by one; "
            "score again with precompute.token_logps: true"
        )
    token_file = token_file if stored else None
    pieces: list[dict[str, npt.NDArray[Any]]] = []
    with _TokenFile(token_file) as sink:
        for store in stores:
            for part in read_parts(store):
                piece, lists = _piece(store, part, len(pieces), max_length, ld_alpha)
                pieces.append(piece)
                sink.write(lists)
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(piece[name] for piece in pieces)]) for name, dtype in _PIECE.items()
    }
    columns["rows"] = np.arange(len(columns["keys"]))
    columns["keys"], first = np.unique(columns["keys"], return_index=True)
    return ReferenceTable(
        keys=columns.pop("keys"),
        **{name: values[first] for name, values in columns.items()},
        token_logps=None if token_file is None else pa.ipc.open_stream(pa.memory_map(str(token_file))).read_all(),
    )


_PIECE = {
    "keys": "S16",
    "parts": "int32",
    "chosen_logps": "float32",
    "rejected_logps": "float32",
    "chosen_tokens": "int32",
    "rejected_tokens": "int32",
}


def _piece(
    store: Store, part: pa.Table, number: int, max_length: int | None, ld_alpha: float | None
) -> tuple[dict[str, npt.NDArray[Any]], list[pa.Array]]:
    """One part's share of the table, and its token logps, chosen and rejected, where they are stored."""
    room = part["prompt_tokens"].to_numpy()
    room = np.maximum(max_length - room, 0) if max_length is not None else np.full_like(room, np.iinfo(np.int32).max)
    tokens = {
        side: np.minimum(part[f"{side}_tokens"].to_numpy(), room).astype(np.int32) for side in ("chosen", "rejected")
    }
    shared = np.minimum(tokens["chosen"], tokens["rejected"])
    piece: dict[str, npt.NDArray[Any]] = {
        "keys": pair_keys(part),
        "parts": np.full(part.num_rows, number, dtype=np.int32),
    }
    lists = []
    for side, counts in tokens.items():
        sums = part[f"ref_{side}_logps"].to_numpy()
        if "chosen_token_logps" in part.column_names:
            column = part[f"{side}_token_logps"].combine_chunks()
            whole, cut, weighted = _sums_of(column, counts, shared, 1.0 if ld_alpha is None else ld_alpha)
            # The sum was rounded once; anything beyond that was not written by refshard.
            if not np.allclose(whole, sums, rtol=1e-5, atol=1e-5):
                raise DataError(
                    f"{store.folder}, part {number}: its sums are not those of its token logps, so one of the two was "
                    "changed after it was scored. Delete the part and index.json, then run refshard precompute again"
                )
            sums = weighted
            lists.append(cut)
        piece[f"{side}_logps"] = sums.astype(np.float32)
        piece[f"{side}_tokens"] = counts
    return piece, lists


class _TokenFile:
    """Token logps of all parts in one file that needs no decoding, so that it can be memory-mapped."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._sink: Any = None
        self._writer: Any = None

    def __enter__(self) -> "_TokenFile":
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._sink = pa.OSFile(str(self._file), "wb")
            except OSError as error:
                raise StorageError(f"{self._file}: can't be written ({error.strerror or error})") from error
            self._writer = pa.ipc.new_stream(self._sink, _TOKEN_LOGPS)
        return self

    def write(self, lists: list[pa.Array]) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=_TOKEN_LOGPS))
        except OSError as error:
            raise StorageError(f"{self._file}: can't be written ({error.strerror or error})") from error

    def __exit__(self, *exception: object) -> None:
        for resource in (self._writer, self._sink):
            if resource is not None:
                resource.close()


def join(pairs: Iterable[KeptPair], table: ReferenceTable, file: Path, *, keep_missing: bool = False) -> JoinReport:
    """Look up every pair by key and write those that match to an Arrow file, in order.

    Columns: `pair_key`, `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`, `truncated`, `part`, `ref_chosen_logps`,
    `ref_rejected_logps`, and where the table has them `ref_chosen_token_logps`, `ref_rejected_token_logps`. Pairs
    without a match are counted, not written; what that means is the caller's to say.

    Args:
        pairs: In the source's order.
        table: What the stores hold.
        file: Where the joined set goes.
        keep_missing: Write pairs without a match too, with NaN for the reference's logps, so that a pair's place in
            the set does not depend on which pairs are scored.

    Raises:
        DataError: A pair matches by key but not by its token counts: the shard was cut elsewhere.
        StorageError: The file can't be written.
    """
    matched, missing, first_missing = 0, 0, None
    used = np.zeros(len(table.keys), dtype=bool)
    columns = _joined_schema(with_tokens=table.token_logps is not None)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, columns) as writer:
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
                matched += int(hits.sum())
                used[at[hits]] = True
                written = np.arange(len(chunk)) if keep_missing else np.flatnonzero(hits)
                if len(written):
                    batch = _joined_batch([chunk[i] for i in written], at[written], hits[written], table)
                    writer.write_batch(pa.RecordBatch.from_arrays(batch, schema=columns))
    except OSError as error:
        raise StorageError(f"{file}: can't be written ({error.strerror or error})") from error
    return JoinReport(matched, missing, first_missing, int(len(used) - used.sum()))


_IDS, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.float32())
_TOKEN_LOGPS = pa.schema([("chosen_token_logps", _LOGPS), ("rejected_token_logps", _LOGPS)])


def _joined_schema(*, with_tokens: bool) -> pa.Schema:
    fields = [
        ("pair_key", pa.binary(16)),
        ("row", pa.int64()),
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),
        ("truncated", pa.bool_()),
        ("part", pa.int32()),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
    ]
    if with_tokens:
        fields += [("ref_chosen_token_logps", _LOGPS), ("ref_rejected_token_logps", _LOGPS)]
    return pa.schema(fields)


def _joined_batch(
    pairs: Sequence[KeptPair], at: npt.NDArray[np.int64], hits: npt.NDArray[np.bool_], table: ReferenceTable
) -> list[pa.Array]:
    def looked_up(values: npt.NDArray[Any], missing: float) -> npt.NDArray[Any]:
        found = np.full(len(at), missing, dtype=values.dtype)
        found[hits] = values[at[hits]]
        return found

    columns = [
        pa.array([p.key for p in pairs], pa.binary(16)),
        pa.array([p.row for p in pairs], pa.int64()),
        pa.array([p.pair.prompt_ids for p in pairs], _IDS),
        pa.array([p.pair.chosen_ids for p in pairs], _IDS),
        pa.array([p.pair.rejected_ids for p in pairs], _IDS),
        pa.array([p.truncated for p in pairs], pa.bool_()),
        pa.array(looked_up(table.parts, -1), pa.int32()),
        pa.array(looked_up(table.chosen_logps, np.nan), pa.float32()),
        pa.array(looked_up(table.rejected_logps, np.nan), pa.float32()),
    ]
    if table.token_logps is not None:
        rows = looked_up(table.rows, -1)
        columns += [_take(column, rows, hits) for column in table.token_logps.columns]
    return columns


def _take(column: pa.ChunkedArray, rows: npt.NDArray[np.int64], hits: npt.NDArray[np.bool_]) -> pa.Array:
    """Take rows of a column, null where there is no hit, without putting its chunks (one for each part) together."""
    starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
    chunk_of = np.searchsorted(starts, rows, side="right") - 1
    pieces, at, taken = [], np.zeros(len(rows), dtype=np.int64), 0
    for chunk in np.unique(chunk_of[hits]):
        wanted = np.flatnonzero(hits & (chunk_of == chunk))
        pieces.append(column.chunk(int(chunk)).take(pa.array(rows[wanted] - starts[chunk])))
        at[wanted] = taken + np.arange(len(wanted))
        taken += len(wanted)
    # A null index takes a null list.
    return pa.concat_arrays(pieces or [pa.array([], _LOGPS)]).take(pa.array(at, mask=~hits))


def _chunks(pairs: Iterable[KeptPair]) -> Iterator[list[KeptPair]]:
    chunk: list[KeptPair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _sums_of(
    lists: pa.ListArray, counts: npt.NDArray[np.int32], shared: npt.NDArray[np.int32], tail_weight: float
) -> tuple[npt.NDArray[np.float64], pa.ListArray, npt.NDArray[np.float64]]:
    """Cut lists of token logps and add them up, in float64.

    Args:
        lists: [R] lists, none of them empty.
        counts: [R] values of each list that stay.
        shared: [R] values of each list, from its start, that count once.
        tail_weight: What the values after those count.

    Returns:
        Sums of the whole lists, [R]; the lists cut to `counts`; their weighted sums, [R].
    """
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    offsets -= offsets[0]
    lengths = np.diff(offsets)
    if not len(lengths):
        return np.zeros(0), lists, np.zeros(0)
    position = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    kept = position < np.repeat(counts, lengths)
    weights = np.where(position < np.repeat(shared, lengths), 1.0, tail_weight) * kept
    # Each list is added up by itself; a running sum over a whole part would round.
    whole = np.add.reduceat(values, offsets[:-1], dtype=np.float64)
    weighted = np.add.reduceat(values * weights, offsets[:-1])
    cut = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(np.minimum(counts, lengths))]), pa.int32()),
        pa.array(values[kept], pa.float32()),
        type=_LOGPS,
    )
    return whole, cut, weighted
