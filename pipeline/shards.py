"""The shard store: manifest, parts and index of one split; schema, write, read, verify.

    STORE/manifest.json        who the reference is, how pairs were tokenized; written once, first
    STORE/part-00000.parquet   one per unit of `rows_per_shard` consecutive dataset rows
    STORE/index.json           written last, when every unit is there

A file under its final name is whole and never changes. A missing index means unfinished, never empty. This module
needs pyarrow and numpy only.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, IdentityError, StorageError, UnfinishedError
from pipeline.fingerprint import SCHEMA_VERSION, differences, fingerprint_of
from pipeline.intake import Ledger
from pipeline.storage import put_if_absent, read_json, replace_file

__all__ = [
    "NoiseFloor",
    "ScoredPair",
    "Store",
    "SummedPair",
    "create_store",
    "delete_store",
    "finish_store",
    "is_finished",
    "open_store",
    "pair_keys",
    "part_exists",
    "part_name",
    "read_part",
    "read_parts",
    "schema",
    "write_part",
]

MANIFEST, INDEX, SKIPPED = "manifest.json", "index.json", "skipped.jsonl"


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """One shard row: the pair's key and what the reference gave its completions."""

    key: bytes
    row: int
    prompt_tokens: int
    chosen_token_logps: npt.NDArray[np.float32]
    """[chosen tokens] nats"""
    rejected_token_logps: npt.NDArray[np.float32]
    """[rejected tokens] nats"""


@dataclass(frozen=True, kw_only=True)
class SummedPair:
    """One shard row of which only the sums are known."""

    key: bytes
    row: int
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_logps: float
    """Nats"""
    rejected_logps: float


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How far token logps move when the same pairs are scored in other company: model, dtype and kernel's own noise."""

    tokens: int = 0
    """Tokens that were scored twice"""
    mean: float = 0.0
    """Mean absolute difference, nats"""
    largest: float = 0.0
    """Largest absolute difference, nats"""

    def __add__(self, other: "NoiseFloor") -> "NoiseFloor":
        tokens = self.tokens + other.tokens
        total = self.mean * self.tokens + other.mean * other.tokens
        return NoiseFloor(
            tokens=tokens, mean=total / tokens if tokens else 0.0, largest=max(self.largest, other.largest)
        )


@dataclass(frozen=True, kw_only=True)
class Store:
    """A finished store, as its manifest and index describe it."""

    folder: Path
    manifest: Mapping[str, Any]
    index: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def digest(self) -> str:
        """SHA-256 of what the index says: of the store's whole content, as it holds each part's own."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> list[Mapping[str, Any]]:
        return list(self.index["parts"])

    @property
    def noise(self) -> NoiseFloor:
        """The noise floor over all parts; of 0 tokens where nothing was scored twice, as in imported stores."""
        return NoiseFloor(**self.index["noise"])


def schema(*, token_logps: bool) -> pa.Schema:
    """Columns of a part, schema version 1."""
    fields = [
        pa.field("pair_key", pa.binary(16), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("ref_chosen_logps", pa.float32(), nullable=False),
        pa.field("ref_rejected_logps", pa.float32(), nullable=False),
    ]
    if token_logps:
        item = pa.list_(pa.field("element", pa.float32(), nullable=False))
        fields += [
            pa.field("chosen_token_logps", item, nullable=False),
            pa.field("rejected_token_logps", item, nullable=False),
        ]
    return pa.schema(fields)


def part_name(unit: int) -> str:
    return f"part-{unit:05d}.parquet"


_PART = re.compile(r"part-[0-9]{5,}\.parquet")


def part_exists(folder: Path, unit: int) -> bool:
    return (folder / part_name(unit)).exists()


def is_finished(folder: Path) -> bool:
    return (folder / INDEX).exists()


def delete_store(folder: Path) -> None:
    """Delete a store's own files, the index first: a store cut short in this is unfinished, never wrong.

    Raises:
        StorageError: A file can't be deleted.
    """
    # Other programs write part-*.parquet too (Spark: part-00000-UUID.parquet), and those are not ours to delete.
    parts = [file for file in folder.glob("part-*.parquet") if _PART.fullmatch(file.name)]
    try:
        for file in (folder / INDEX, folder / SKIPPED, *sorted(parts), folder / MANIFEST):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: can't be deleted ({error.strerror})") from error


def create_store(
    folder: Path, identity: Mapping[str, Any], plan: Mapping[str, Any], declared: Mapping[str, Any]
) -> str:
    """Write the manifest, or check that the one that is there is this run's. Gives the fingerprint.

    Args:
        folder: The store's folder, made if needed.
        identity: What must match: everything that a log-prob depends on.
        plan: What must be equal for this store to be continued: rows per shard, dataset, rules for dropping.
        declared: Recorded for people, compared with nothing.

    Raises:
        IdentityError: The folder holds another run's store; the differing fields are named.
        StorageError: The folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: can't be made ({error.strerror}); choose another precompute.output") from error
    fingerprint = fingerprint_of(identity)
    manifest = {
        "format": "refshard",
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "identity": identity,
        "plan": plan,
        "declared": declared,
    }
    put_if_absent(folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    # Read back in any case: another worker may have been first.
    stored = _read_manifest(folder)
    found = differences(stored["identity"], identity, joining=False)
    # The manifest is JSON; compare the plan as JSON would give it back.
    ours = json.loads(json.dumps(plan))
    found += [
        f"{key}: shards {stored['plan'].get(key)!r}, this run {ours.get(key)!r}"
        for key in sorted({*stored["plan"], *ours})
        if stored["plan"].get(key) != ours.get(key)
    ]
    if found:
        raise IdentityError(
            f"{folder}: holds the shards of another run. It differs in {'; '.join(found)}. "
            "Set precompute.output to a new folder, or pass --overwrite to delete these shards"
        )
    return fingerprint


def write_part(
    folder: Path,
    unit: int,
    pairs: Sequence[ScoredPair] | Sequence[SummedPair],
    *,
    fingerprint: str,
    token_logps: bool,
    ledger: Ledger,
    provenance: Mapping[str, Any],
    noise: NoiseFloor | None = None,
) -> bool:
    """Write one unit's part: serialized, read back and compared, then committed. False if another was first.

    Raises:
        DataError: A log-prob is not finite or a row has no tokens; nothing is written.
        StorageError: The disk failed; nothing is left behind.
    """
    footer = {
        "refshard.fingerprint": fingerprint,
        "refshard.unit": str(unit),
        "refshard.ledger": json.dumps(ledger.as_dict()),
        "refshard.skipped": json.dumps(ledger.skipped),
        "refshard.provenance": json.dumps(provenance, sort_keys=True),
        "refshard.noise": json.dumps(vars(noise or NoiseFloor())),
    }
    table = _to_table(pairs, token_logps=token_logps).replace_schema_metadata(footer)
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        write_page_checksum=True,
        store_schema=True,
    )
    content = buffer.getvalue()
    # A writer can produce wrong bytes; what is committed must decode to what was meant.
    if not pq.read_table(io.BytesIO(content), page_checksum_verification=True).equals(table, check_metadata=False):
        raise DataError(f"{folder / part_name(unit)}: does not read back as written; nothing was committed. Run again")
    return put_if_absent(folder / part_name(unit), content)


def finish_store(folder: Path, num_units: int) -> list[int]:
    """Write the index if every unit's part is there. Gives the units that are missing, none if finished.

    Raises:
        DataError: A part is damaged.
        IdentityError: A part carries another fingerprint.
        StorageError: A part can't be read, or the index can't be written.
    """
    missing = [unit for unit in range(num_units) if not part_exists(folder, unit)]
    if missing or (folder / INDEX).exists():
        return missing
    manifest = _read_manifest(folder)
    totals, noise, parts, skipped = Ledger(), NoiseFloor(), [], []
    for unit in range(num_units):
        file = folder / part_name(unit)
        way_on = "Delete this part, then run the same command again: it scores this unit only"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StorageError(f"{file}: can't be read ({error.strerror})") from error
        metadata = _footer(file, content)
        _check_footer(file, metadata, manifest["fingerprint"], unit)
        # From here on the index vouches for these bytes, whatever they are: so they must decode, once.
        table = _decode(file, content, None, way_on)
        if not table.schema.equals(schema(token_logps="chosen_token_logps" in table.column_names)):
            raise DataError(f"{file}: damaged, its columns are not those of a part. {way_on}")
        try:
            ledger = Ledger()
            ledger.add(json.loads(metadata[b"refshard.ledger"]))
            skipped += json.loads(metadata[b"refshard.skipped"])
            noise += NoiseFloor(**json.loads(metadata[b"refshard.noise"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: damaged, its footer does not say what became of its rows. {way_on}") from error
        if not table.num_rows == ledger.kept == ledger.rows - ledger.dropped.total():
            raise DataError(f"{file}: damaged, its {table.num_rows} rows are not what its footer counts. {way_on}")
        totals.add(ledger.as_dict())
        digest = hashlib.sha256(content).hexdigest()
        parts.append({"file": file.name, "rows": table.num_rows, "bytes": len(content), "sha256": digest})
    if skipped:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        replace_file(folder / SKIPPED, lines.encode("utf-8", errors="backslashreplace"))
    index = {
        "fingerprint": manifest["fingerprint"],
        "parts": parts,
        "totals": totals.as_dict(),
        "noise": vars(noise),
    }
    put_if_absent(folder / INDEX, (json.dumps(index, indent=1, sort_keys=True) + "\n").encode())
    return []


def open_store(folder: Path) -> Store:
    """Open a finished store. Its parts are checked when they are read.

    Raises:
        UnfinishedError: There is a store, but not all of it yet.
        DataError: There is none, or its manifest or index is damaged.
    """
    if not (folder / MANIFEST).exists():
        raise DataError(f"{folder}: no shards there. Run: refshard precompute --config F")
    manifest = _read_manifest(folder)
    if not (folder / INDEX).exists():
        done = len(list(folder.glob("part-*.parquet")))
        raise UnfinishedError(
            f"{folder}: unfinished, {done} parts so far and no index. Run: refshard precompute with the same settings"
        )
    index = read_json(folder / INDEX)
    _check_index(folder / INDEX, index, manifest["fingerprint"])
    return Store(folder=folder, manifest=manifest, index=index)


def read_part(store: Store, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part after checking size, SHA-256, page checksums and fingerprint. Columns as in `schema`.

    Raises:
        DataError: The part is missing, damaged, or another run's; the message names it and the way on.
    """
    entry = store.parts[number]
    file = store.folder / str(entry["file"])
    way_on = "Delete this part and index.json, then run refshard precompute again: it scores this unit only"
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{file}: missing, though the index lists it. {way_on}") from error
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror})") from error
    if len(content) != entry.get("bytes") or hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise DataError(f"{file}: damaged, its SHA-256 is not the one in index.json. {way_on}")
    _check_footer(file, _footer(file, content), store.fingerprint, number)
    return _decode(file, content, columns, way_on)


def read_parts(store: Store, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read the parts in order, one in memory at a time."""
    for number in range(len(store.parts)):
        yield read_part(store, number, columns)


def pair_keys(part: pa.Table) -> npt.NDArray[np.bytes_]:
    """The keys of a part's rows, [rows], as numpy strings of 16 bytes.

    Comparing such strings ignores trailing zero bytes, which changes no order and no equality among keys of one
    length.
    """
    column = part["pair_key"].combine_chunks()
    return np.frombuffer(column.buffers()[1], dtype="S16")[column.offset : column.offset + len(column)]


def _to_table(pairs: Sequence[ScoredPair] | Sequence[SummedPair], *, token_logps: bool) -> pa.Table:
    columns: dict[str, Any] = {
        "pair_key": [p.key for p in pairs],
        "row": np.array([p.row for p in pairs], dtype=np.int64),
        "prompt_tokens": np.array([p.prompt_tokens for p in pairs], dtype=np.int32),
    }
    for side in ("chosen", "rejected"):
        lengths, sums, lists = _side_of(pairs, side)
        for row, length, total in zip(columns["row"], lengths, sums, strict=True):
            if length == 0 or not np.isfinite(total):
                raise DataError(f"row {row}: a {side} log-prob is missing or not finite; it can't be stored")
        columns[f"{side}_tokens"] = lengths
        columns[f"ref_{side}_logps"] = sums
        if token_logps:
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            flat = np.concatenate([*lists, np.empty(0, np.float32)]).astype(np.float32)
            columns[f"{side}_token_logps"] = pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(flat), type=schema(token_logps=True).field(f"{side}_token_logps").type
            )
    target = schema(token_logps=token_logps)
    return pa.table([pa.array(columns[f.name], type=f.type) for f in target], schema=target)


def _side_of(
    pairs: Sequence[ScoredPair] | Sequence[SummedPair], side: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """Token counts and sums of one side's completions, and their token logps where they are known."""
    lists = [getattr(pair, f"{side}_token_logps") for pair in pairs if isinstance(pair, ScoredPair)]
    if len(lists) == len(pairs):
        lengths = [len(values) for values in lists]
        sums = [values.sum(dtype=np.float64) for values in lists]
    else:
        lengths = [getattr(pair, f"{side}_tokens") for pair in pairs]
        sums = [getattr(pair, f"{side}_logps") for pair in pairs]
    # A sum is finite only if every term is, and if it fits float32.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(lengths, dtype=np.int32), np.array(sums, dtype=np.float64).astype(np.float32), lists


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    sections = ("identity", "plan", "declared")
    if manifest.get("format") != "refshard" or not all(isinstance(manifest.get(s), dict) for s in sections):
        raise DataError(f"{folder / MANIFEST}: not a refshard manifest")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise IdentityError(
            f"{folder / MANIFEST}: schema version {manifest.get('schema_version')}, "
            f"this refshard reads {SCHEMA_VERSION}"
        )
    if manifest.get("fingerprint") != fingerprint_of(manifest["identity"]):
        raise DataError(f"{folder / MANIFEST}: edited or damaged, its fingerprint is not that of its identity")
    return manifest


def _check_index(file: Path, index: Mapping[str, Any], fingerprint: str) -> None:
    way_on = "Delete it and run refshard precompute again: it scores nothing twice"
    parts, totals = index.get("parts"), index.get("totals")
    if index.get("fingerprint") != fingerprint or not isinstance(parts, list):
        raise DataError(f"{file}: does not belong to the manifest beside it. {way_on}")
    for number, part in enumerate(parts):
        # A name from a file must not lead out of its folder; there is only one right name anyway.
        if not isinstance(part, dict) or part.get("file") != part_name(number):
            raise DataError(f"{file}: entry {number} must name {part_name(number)}. {way_on}")
    if (
        not isinstance(totals, dict)
        or not totals.keys() >= Ledger().as_dict().keys()
        or not all(isinstance(part.get("rows"), int) for part in parts)
        or sum(part["rows"] for part in parts) != totals["kept"]
        or not isinstance(index.get("noise"), dict)
        or index["noise"].keys() != vars(NoiseFloor()).keys()
    ):
        raise DataError(f"{file}: damaged, its parts do not add up to its totals. {way_on}")


def _decode(file: Path, content: bytes, columns: Sequence[str] | None, way_on: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(content), columns=columns and list(columns), page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error}). {way_on}") from error


def _footer(file: Path, content: bytes) -> dict[bytes, bytes]:
    try:
        return dict(pq.read_schema(io.BytesIO(content)).metadata or {})
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: damaged, no readable Parquet footer ({error}). Delete it and run again") from error


def _check_footer(file: Path, metadata: Mapping[bytes, bytes], fingerprint: str, unit: int) -> None:
    found = metadata.get(b"refshard.fingerprint", b"none").decode("utf-8", errors="replace")
    if found != fingerprint:
        raise IdentityError(
            f"{file}: fingerprint {found[:12]}, the manifest says {fingerprint[:12]}: another run's part"
        )
    if metadata.get(b"refshard.unit") != str(unit).encode():
        raise DataError(f"{file}: holds another unit than its name says; delete it and run again")
