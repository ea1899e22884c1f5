"""Join tokenized pairs with stored log-probs by the pair's key, into an Arrow file with reference columns.

Memory does not grow with pairs or tokens: the stores' keys and sums are memory-mapped, their token logps are read from
one flat file batch by batch, and the joined set is an Arrow file in the source's order. The trainer shuffles it.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import DataError, StorageError
from pipeline.data.intake import KeptPair
from pipeline.store.reference_table import ReferenceTable

__all__ = ["JoinReport", "join"]

_CHUNK = 1024
_BATCH_BYTES = 16 * 2**20
"""Size of an Arrow batch. A reader of the joined set holds 6 KiB for each batch, so chunks are combined"""
_SCHEMA = pa.schema(
    [
        ("pair_key", pa.binary(16)),
        ("row", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("truncated", pa.bool_()),
        ("part", pa.int32()),
        ("ref_chosen_logps", pa.float32()),
        ("ref_rejected_logps", pa.float32()),
    ]
)


@dataclass(frozen=True)
class JoinReport:
    """Counts of a join."""

    matched: int
    missing: int
    first_missing: str | None
    """Place of the first pair without reference log-probs"""
    surplus: int
    """Number of keys in the shards that no pair has"""

    def summary(self) -> str:
        return f"{self.matched:,} matched, {self.missing:,} missing, {self.surplus:,} surplus in the shards"


def join(
    pairs: Iterable[KeptPair],
    table: ReferenceTable,
    file: Path,
    *,
    keep_missing: bool = False,
    numbers: Sequence[str] = (),
) -> JoinReport:
    """Look up every pair by key and write those that match to an Arrow file, in order.

    Columns are those of `_SCHEMA`, `numbers` (of weight and margin), and, where the table has it, `token_start` for
    `TokenLogps`. Pairs without a match
    are counted and left out. `keep_missing` writes them too, with NaN for their log-probs and -1 for part and start: a
    pair's place in the set then does not depend on which pairs are scored.

    Raises:
        DataError: A pair matches by key but not by its token counts: the shard was cut at another length.
        StorageError: The file can't be written.
    """
    matched, missing, first_missing = 0, 0, None
    used = np.zeros(len(table), dtype=bool)
    columns = pa.schema([*_SCHEMA, *(pa.field(name, pa.float32()) for name in numbers)])
    if table.with_tokens:
        columns = columns.append(pa.field("token_start", pa.int64()))
    held: list[pa.RecordBatch] = []
    pairs = iter(pairs)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, columns) as writer:
            while chunk := list(itertools.islice(pairs, _CHUNK)):
                at, found = table.look_up([p.key for p in chunk])
                hits = at >= 0
                for pair, hit, tokens in zip(
                    chunk, hits, found[["chosen_tokens", "rejected_tokens"]].tolist(), strict=True
                ):
                    if not hit:
                        missing += 1
                        first_missing = first_missing or pair.place
                    elif (len(pair.pair.chosen_ids), len(pair.pair.rejected_ids)) != tokens:
                        raise DataError(
                            f"{pair.place}: the shards scored {tokens[0]} and {tokens[1]} tokens of it, this run has "
                            f"{len(pair.pair.chosen_ids)} and {len(pair.pair.rejected_ids)}"
                        )
                matched += int(hits.sum())
                used[at[hits]] = True
                written = np.arange(len(chunk)) if keep_missing else np.flatnonzero(hits)
                if len(written):
                    held.append(_joined_batch([chunk[i] for i in written], found[written], columns))
                if sum(batch.nbytes for batch in held) >= _BATCH_BYTES:
                    writer.write_table(pa.Table.from_batches(held, columns).combine_chunks())
                    held = []
            writer.write_table(pa.Table.from_batches(held, columns).combine_chunks())
    except OSError as error:
        raise StorageError(f"{file}: can't be written ({error.strerror or error})") from error
    return JoinReport(matched, missing, first_missing, len(table) - int(used.sum()))


def _joined_batch(pairs: Sequence[KeptPair], found: npt.NDArray[np.void], schema: pa.Schema) -> pa.RecordBatch:
    columns = {
        "pair_key": [p.key for p in pairs],
        "row": [p.row for p in pairs],
        "prompt_ids": [p.pair.prompt_ids for p in pairs],
        "chosen_ids": [p.pair.chosen_ids for p in pairs],
        "rejected_ids": [p.pair.rejected_ids for p in pairs],
        "truncated": [p.truncated for p in pairs],
        "part": found["part"],
        "weight": [p.weight for p in pairs],
        "margin": [p.margin for p in pairs],
        "ref_chosen_logps": found["chosen_logps"],
        "ref_rejected_logps": found["rejected_logps"],
        "token_start": found["token_start"],
    }
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
