"""Index the pairs of one or several stores by key, sorted and memory-mapped, with their summed log-probs."""

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import ConfigError, DataError, StorageError
from pipeline.store.format import pair_keys
from pipeline.store.store import Store, read_parts

__all__ = ["INDEX_ROW", "ReferenceTable", "TokenLogps", "load_reference_table"]

INDEX_ROW = np.dtype(
    [
        ("key", "S16"),
        ("token_start", "<i8"),
        ("chosen_logps", "<f4"),
        ("rejected_logps", "<f4"),
        ("chosen_tokens", "<i4"),
        ("rejected_tokens", "<i4"),
        ("part", "<i4"),
    ]
)
"""One pair in 44 bytes: its key; the position of its token logps in their file, in values, -1 without them; sums in
nats and token counts, both cut to this run's max_length; the number of its part, counted through the stores"""

_ABSENT = np.array((b"", -1, np.nan, np.nan, 0, 0, -1), INDEX_ROW)
_ROWS_PER_WRITE = 2**18
"""Rows copied at once, 11 MiB"""
_BLOCK = 32
"""Rows for which one key stays in memory: half a byte a row"""
_KEYS_AT_ONCE = 32
"""Keys looked up between two releases of mapped pages: the system maps up to 2 MiB for a page that is read"""


class ReferenceTable:
    """Stored log-probs by pair, sorted by key and memory-mapped. Equal keys are equal pairs, and the first is kept."""

    def __init__(
        self, pieces: Iterable[npt.NDArray[np.void]], *, folder: Path | None = None, with_tokens: bool = False
    ) -> None:
        """Sort rows by key in memory, about 110 bytes a row at most, and map them from a file without a name.

        The pieces are rows of `INDEX_ROW` in any order; `with_tokens` says that these know where their token logps are.
        The folder of the file is made if needed.

        Raises:
            StorageError: The disk is full or failing.
        """
        self.with_tokens = with_tokens
        rows = np.concatenate([np.empty(0, INDEX_ROW), *pieces])
        keys, first = np.unique(rows["key"], return_index=True)
        self._fence = keys[::_BLOCK].copy()
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                # As bytes without fields: numpy copies those an order of magnitude faster.
                whole = rows.view(f"V{INDEX_ROW.itemsize}")
                for start in range(0, len(first), _ROWS_PER_WRITE):
                    file.write(whole[first[start : start + _ROWS_PER_WRITE]].tobytes())
                file.flush()
                # An empty file can't be mapped.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(keys) else None
        except OSError as error:
            where = folder or tempfile.gettempdir()
            raise StorageError(f"{where}: the stores' index can't be written ({error.strerror or error})") from error
        self.rows: npt.NDArray[np.void] = np.frombuffer(self._map or b"", INDEX_ROW)
        """Rows of `INDEX_ROW`, [R], ascending by key, read-only"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def keys(self) -> npt.NDArray[np.bytes_]:
        """Keys, [R] of 16 bytes, ascending"""
        return self.rows["key"]

    def look_up(self, keys: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.void]]:
        """Find K pairs by key, in any order.

        Returns:
            Row numbers in the table, [K], -1 for an absent key; and copies of these rows, [K] `INDEX_ROW`. An absent
            key has NaN for the sums and -1 for part and start.
        """
        wanted = np.array(keys, dtype="S16")
        at = np.full(len(wanted), -1, dtype=np.int64)
        found = np.full(len(wanted), _ABSENT)
        if self._map is None:
            return at, found
        # Ascending, so that neighbours in the file are read together.
        order = np.argsort(wanted)
        for start in range(0, len(order), _KEYS_AT_ONCE):
            some = order[start : start + _KEYS_AT_ONCE]
            blocks = np.maximum(np.searchsorted(self._fence, wanted[some], side="right") - 1, 0)
            near = np.minimum(blocks[:, None] * _BLOCK + np.arange(_BLOCK), len(self) - 1)
            same = self.keys[near] == wanted[some, None]
            hit = same.any(axis=1)
            at[some[hit]] = near[hit, same[hit].argmax(axis=1)]
            found[some[hit]] = self.rows[at[some[hit]]]
            # The pages stay in the system's cache, but no longer count as this process's memory.
            self._map.madvise(mmap.MADV_DONTNEED)
        return at, found


class TokenLogps:
    """Token logps of all stored pairs, read from their file pair by pair.

    The file is not mapped: an epoch touches every page, and mapped pages count as the process's memory. A pickle holds
    the path, so that a DataLoader's workers open the file themselves.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._opened: IO[bytes] | None = None

    def __reduce__(self) -> tuple[type["TokenLogps"], tuple[Path]]:
        return TokenLogps, (self._file,)

    def read(self, start: int, count: int) -> npt.NDArray[np.float32]:
        """Read `count` values from position `start`: a pair's chosen logps, then its rejected ones. Nats, read-only.

        Raises:
            StorageError: The file can't be read, or ends too early.
        """
        try:
            if self._opened is None:
                self._opened = self._file.open("rb", buffering=0)
            # pread takes a position of its own: forked workers share the file's.
            content = os.pread(self._opened.fileno(), 4 * count, 4 * start)
        except OSError as error:
            raise StorageError(f"{self._file}: can't be read ({error.strerror or error})") from error
        if len(content) != 4 * count:
            raise StorageError(f"{self._file}: cut short. Run refshard train again, which writes it anew")
        return np.frombuffer(content, dtype="<f4")


def load_reference_table(
    stores: Sequence[Store],
    max_length: int | None,
    *,
    ld_alpha: float | None = None,
    folder: Path | None = None,
    token_file: Path | None = None,
) -> ReferenceTable:
    """Read keys and sums from the stores; where a store was cut later than `max_length`, sum the shorter prefix.

    Log-probs of a causal model do not depend on later tokens, so a prefix of stored token logps equals a scoring at the
    smaller length. One part is in memory at a time.

    Args:
        stores: Finished stores of one identity.
        max_length: This run's, at most that of the stores.
        ld_alpha: Weight of tokens past the shorter completion's length (LD-DPO, arXiv 2409.06411).
        folder: Folder of the index, which disappears with the process; None takes the system's for temporary files.
        token_file: File that token logps are appended to, cut to `max_length` and unweighted, for `TokenLogps`; several
            sets may share it. They are left out if None, or where a store has none.

    Raises:
        ConfigError: `ld_alpha` is given, and a store has no token logps.
        DataError: A part is damaged, or its sums are not those of its token logps.
        StorageError: The index or the token logps can't be written.
    """
    sums_only = [s for s in stores if not s.manifest["identity"]["tokenization"]["token_logps"]]
    if ld_alpha is not None and sums_only:
        raise ConfigError(
            f"loss.ld_alpha: must be unset, got {ld_alpha}: {sums_only[0].folder} holds sums alone. Score again with "
            "precompute.token_logps: true"
        )
    if not stores or sums_only:
        token_file = None
    pieces = _pieces(stores, max_length, ld_alpha, token_file)
    return ReferenceTable(pieces, folder=folder, with_tokens=token_file is not None)


def _pieces(
    stores: Sequence[Store], max_length: int | None, ld_alpha: float | None, token_file: Path | None
) -> Iterator[npt.NDArray[np.void]]:
    """Yield the index rows of each part, and append its token logps to their file."""
    start = token_file.stat().st_size // 4 if token_file is not None and token_file.exists() else 0
    parts = ((store, part) for store in stores for part in read_parts(store))
    for number, (store, part) in enumerate(parts):
        piece, lists = _piece(store, part, number, max_length, ld_alpha)
        if token_file is not None:
            values, starts = _side_by_side(*lists)
            piece["token_start"] = start + starts
            try:
                token_file.parent.mkdir(parents=True, exist_ok=True)
                with token_file.open("ab") as sink:
                    there = sink.tell() // 4
                    sink.write(values.tobytes())
            except OSError as error:
                raise StorageError(f"{token_file}: can't be written ({error.strerror or error})") from error
            if there != start:
                # A newer attempt of the run deletes what this one makes.
                raise StorageError(
                    f"{token_file}: must hold {start} values before part {number}, got {there}: another process "
                    "changed it. Run refshard train again"
                )
            start += len(values)
        yield piece


def _piece(
    store: Store, part: pa.Table, number: int, max_length: int | None, ld_alpha: float | None
) -> tuple[npt.NDArray[np.void], list[pa.ListArray]]:
    """Give the index rows of one part and, where stored, its token logps, chosen and rejected."""
    room = part["prompt_tokens"].to_numpy()
    room = np.maximum(max_length - room, 0) if max_length is not None else np.full_like(room, np.iinfo(np.int32).max)
    tokens = {
        side: np.minimum(part[f"{side}_tokens"].to_numpy(), room).astype(np.int32) for side in ("chosen", "rejected")
    }
    common = np.minimum(tokens["chosen"], tokens["rejected"])
    piece = np.empty(part.num_rows, INDEX_ROW)
    piece["key"], piece["part"], piece["token_start"] = pair_keys(part), number, -1
    lists = []
    for side, counts in tokens.items():
        sums = part[f"ref_{side}_logps"].to_numpy()
        if "chosen_token_logps" in part.column_names:
            column = part[f"{side}_token_logps"].combine_chunks()
            whole, cut, weighted = _sums_of(column, counts, common, 1.0 if ld_alpha is None else ld_alpha)
            # refshard rounds a sum once. A larger difference was written by another program.
            if not np.allclose(whole, sums, rtol=1e-5, atol=1e-5):
                raise DataError(
                    f"{store.folder}, part {number}: its sums are not those of its token logps, so one of the two was "
                    "changed after scoring. Delete the part, then run refshard precompute again"
                )
            sums = weighted
            lists.append(cut)
        piece[f"{side}_logps"] = sums.astype(np.float32)
        piece[f"{side}_tokens"] = counts
    return piece, lists


def _side_by_side(
    chosen: pa.ListArray, rejected: pa.ListArray
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Interleave chosen and rejected values row by row; give all values, and the start of each row, [R]."""
    order = np.arange(2 * len(chosen)).reshape(2, -1).T.ravel()
    both = pa.concat_arrays([chosen, rejected]).take(pa.array(order))
    return both.flatten().to_numpy(), both.offsets.to_numpy()[:-1:2].astype(np.int64)


def _sums_of(
    lists: pa.ListArray, counts: npt.NDArray[np.int32], common: npt.NDArray[np.int32], tail_weight: float
) -> tuple[npt.NDArray[np.float64], pa.ListArray, npt.NDArray[np.float64]]:
    """Cut R lists of token logps, none of them empty, to `counts` values each, and sum them, in float64.

    Give the sums of the whole lists, [R]; the cut lists; and their sums, [R], where the first `common` values weigh 1
    and the others `tail_weight`.
    """
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]]
    offsets -= offsets[0]
    lengths = np.diff(offsets)
    if not len(lengths):
        return np.zeros(0), lists, np.zeros(0)
    position = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    kept = position < np.repeat(counts, lengths)
    weights = np.where(position < np.repeat(common, lengths), 1.0, tail_weight) * kept
    # Each list is summed by itself; a running sum over the part would round.
    whole = np.add.reduceat(values, offsets[:-1], dtype=np.float64)
    weighted = np.add.reduceat(values * weights, offsets[:-1])
    cut = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(np.minimum(counts, lengths))]), pa.int32()),
        pa.array(values[kept], pa.float32()),
    )
    return whole, cut, weighted
