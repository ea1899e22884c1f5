"""The shard store: manifest, parts and index of one split; schema, write, read, verify.

    STORE/manifest.json        who the reference is, how pairs were tokenized; written once, first
    STORE/part-00000.parquet   one per unit of `rows_per_shard` consecutive dataset rows
    STORE/index.json           written last, when every unit is there

A file under its final name is whole and never changes. A missing index means unfinished, never empty. This module
needs pyarrow and numpy only.
"""

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError, IdentityError, UnfinishedError
from pipeline.fingerprint import SCHEMA_VERSION, differences, fingerprint_of
from pipeline.folders import Folder, Where, open_folder
from pipeline.intake import Ledger
from pipeline.storage import parse_json

__all__ = [
    "MANIFEST",
    "CheckedPart",
    "NoiseFloor",
    "ScoredPair",
    "Store",
    "SummedPair",
    "check_part",
    "create_store",
    "delete_store",
    "find_stores",
    "finish_store",
    "is_finished",
    "open_store",
    "pair_keys",
    "part_exists",
    "part_name",
    "parts_there",
    "read_content",
    "read_manifest",
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

    folder: Folder
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


_PART = re.compile(r"part-([0-9]{5,})\.parquet")


def part_exists(where: Where, unit: int) -> bool:
    return open_folder(where).size(part_name(unit)) is not None


def parts_there(where: Where) -> frozenset[int]:
    """Units whose part is there, with one look at the folder."""
    return frozenset(int(match[1]) for name in open_folder(where).names() if (match := _PART.fullmatch(name)))


def is_finished(where: Where) -> bool:
    return open_folder(where).size(INDEX) is not None


def find_stores(where: Where) -> list[Folder]:
    """The store that a folder is, or the stores that it holds.

    Raises:
        DataError: There is none.
    """
    folder = open_folder(where)
    if folder.size(MANIFEST) is not None:
        return [folder]
    found = [folder.child(name) for name in folder.names() if folder.child(name).size(MANIFEST) is not None]
    if not found:
        raise DataError(f"{folder}: no shards there, neither a manifest.json nor folders with one")
    return found


def delete_store(where: Where) -> None:
    """Delete a store's own files, the index first: a store cut short in this is unfinished, never wrong.

    Raises:
        StorageError: A file can't be deleted.
    """
    folder = open_folder(where)
    # Other programs write part-*.parquet too (Spark: part-00000-UUID.parquet), and those are not ours to delete.
    parts = [name for name in folder.names() if _PART.fullmatch(name)]
    for name in (INDEX, SKIPPED, *parts, MANIFEST):
        folder.delete(name)


def create_store(
    where: Where, identity: Mapping[str, Any], plan: Mapping[str, Any], declared: Mapping[str, Any]
) -> str:
    """Write the manifest, or check that the one that is there is this run's. Gives the fingerprint.

    Args:
        where: The store's folder or URL, made if needed.
        identity: What must match: everything that a log-prob depends on.
        plan: What must be equal for this store to be continued: rows per shard, dataset, rules for dropping.
        declared: Recorded for people, compared with nothing.

    Raises:
        IdentityError: The folder holds another run's store; the differing fields are named.
        StorageError: The folder can't be made, or is in an object store that can't put if absent.
    """
    folder = open_folder(where)
    folder.make()
    fingerprint = fingerprint_of(identity)
    manifest = {
        "format": "refshard",
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "identity": identity,
        "plan": plan,
        "declared": declared,
    }
    folder.put_if_absent(MANIFEST, _sealed(manifest))
    # Read back in any case: another worker may have been first.
    stored = read_manifest(folder)
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
    where: Where,
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
    folder = open_folder(where)
    footer = {
        "refshard.fingerprint": fingerprint,
        "refshard.unit": str(unit),
        "refshard.ledger": json.dumps(ledger.as_dict()),
        "refshard.skipped": json.dumps(ledger.skipped),
        "refshard.provenance": json.dumps(provenance, sort_keys=True),
        "refshard.noise": json.dumps(vars(noise or NoiseFloor())),
    }
    table = _to_table(pairs, token_logps=token_logps)
    footer["refshard.digest"] = _digest_of_content(table, footer)
    table = table.replace_schema_metadata(footer)
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
        raise DataError(
            f"{folder.place(part_name(unit))}: does not read back as written; nothing was committed. Run again"
        )
    return folder.put_if_absent(part_name(unit), content)


def finish_store(where: Where, num_units: int) -> list[int]:
    """Write the index if every unit's part is there. Gives the units that are missing, none if finished.

    Raises:
        DataError: A part is damaged.
        IdentityError: A part carries another fingerprint.
        StorageError: A part can't be read, or the index can't be written.
    """
    folder = open_folder(where)
    there = parts_there(folder)
    missing = [unit for unit in range(num_units) if unit not in there]
    if missing or is_finished(folder):
        return missing
    manifest = read_manifest(folder)
    totals, noise, parts, skipped = Ledger(), NoiseFloor(), [], []
    for unit in range(num_units):
        # From here on the index vouches for these bytes, whatever they are: so all of them is looked at, once.
        content = read_content(folder, part_name(unit), _DELETE_PART)
        part = check_part(folder, unit, content, manifest)
        totals.add(part.ledger.as_dict())
        noise += part.noise
        skipped += part.skipped
        parts.append(
            {
                "file": part_name(unit),
                "rows": part.table.num_rows,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    if skipped:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
        folder.replace(SKIPPED, lines.encode("utf-8", errors="backslashreplace"))
    index = {
        "fingerprint": manifest["fingerprint"],
        "parts": parts,
        "totals": totals.as_dict(),
        "noise": vars(noise),
    }
    folder.put_if_absent(INDEX, _sealed(index))
    return []


def open_store(where: Where) -> Store:
    """Open a finished store. Its parts are checked when they are read.

    Raises:
        UnfinishedError: There is a store, but not all of it yet.
        DataError: There is none, or its manifest or index is damaged.
    """
    folder = open_folder(where)
    manifest = read_manifest(folder)
    if not is_finished(folder):
        raise UnfinishedError(
            f"{folder}: unfinished, {len(parts_there(folder))} parts so far and no index. Run: refshard precompute "
            "with the same settings"
        )
    index = parse_json(folder.place(INDEX), read_content(folder, INDEX, _DELETE_INDEX))
    _check_index(folder.place(INDEX), index, manifest["fingerprint"])
    return Store(folder=folder, manifest=manifest, index=index)


def read_part(store: Store, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part after checking size, SHA-256, page checksums and fingerprint. Columns as in `schema`.

    Raises:
        DataError: The part is missing, damaged, or another run's; the message names it and the way on.
    """
    entry = store.parts[number]
    name = part_name(number)
    place = store.folder.place(name)
    way_on = "Delete this part and index.json, then run refshard precompute again: it scores this unit only"
    if (size := store.folder.size(name)) is None:
        raise DataError(f"{place}: missing, though the index lists it. {way_on}")
    # The size first: what is longer than it should be is not read at all.
    if size != entry.get("bytes") or hashlib.sha256(
        content := read_content(store.folder, name, way_on)
    ).hexdigest() != entry.get("sha256"):
        raise DataError(f"{place}: damaged, its SHA-256 is not the one in index.json. {way_on}")
    with _opened(place, content, way_on) as part:
        _check_footer(place, _metadata(part), store.fingerprint, number)
        return part.read(columns and list(columns))


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


def read_manifest(where: Where) -> dict[str, Any]:
    """Read a store's manifest.

    Raises:
        DataError: There is none, or it is damaged or was edited.
        IdentityError: It is of another version of the format.
    """
    folder = open_folder(where)
    place = folder.place(MANIFEST)
    if folder.size(MANIFEST) is None:
        raise DataError(f"{folder}: no shards there. Run: refshard precompute --config F")
    manifest = parse_json(place, read_content(folder, MANIFEST, "Restore it from a backup, or score again"))
    if manifest.get("format") != "refshard" or not _has_shape_of_manifest(manifest):
        raise DataError(f"{place}: not a refshard manifest")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise IdentityError(
            f"{place}: schema version {manifest.get('schema_version')}, this refshard reads {SCHEMA_VERSION}"
        )
    if manifest.get("fingerprint") != fingerprint_of(manifest["identity"]):
        raise DataError(f"{place}: edited or damaged, its fingerprint is not that of its identity")
    if not _is_sealed(manifest):
        raise DataError(f"{place}: edited or damaged, its SHA-256 is not that of what it says")
    return manifest


def _has_shape_of_manifest(manifest: Mapping[str, Any]) -> bool:
    """Whether everything is there, and of its type, that readers take for granted."""
    identity, plan, declared = (manifest.get(section) for section in ("identity", "plan", "declared"))
    if not (isinstance(identity, dict) and isinstance(plan, dict) and isinstance(declared, dict)):
        return False
    tokenization = identity.get("tokenization")
    return (
        _has_shape_of_reference(identity.get("reference"))
        and isinstance(tokenization, dict)
        and isinstance(tokenization.get("token_logps"), bool)
        and isinstance(tokenization.get("max_length"), int | None)
        and ("rows" not in plan or _has_shape_of_ranges(plan))
    )


def _has_shape_of_ranges(plan: Mapping[str, Any]) -> bool:
    rows = plan["rows"]
    return (
        isinstance(rows, str)
        and re.fullmatch(r"[0-9]{1,18}:[0-9]{0,18}", rows) is not None
        and _is_count(plan.get("rows_per_shard"))
        and plan["rows_per_shard"] > 0
    )


def _has_shape_of_reference(reference: Any) -> bool:
    if not isinstance(reference, dict) or "declared" in reference:
        return isinstance(reference, dict)
    bits = reference.get("quantization")
    return (
        all(isinstance(reference.get(name), str) for name in ("weights", "dtype"))
        and isinstance(reference.get("adapter"), str | None)
        and (bits is None or (isinstance(bits, dict) and _is_count(bits.get("bits"))))
    )


def read_content(folder: Folder, name: str, way_on: str) -> bytes:
    """Read a store's file, unless it is far larger than any that this program writes.

    Raises:
        DataError: It is missing or too large.
        StorageError: It can't be read.
    """
    if (size := folder.size(name) or 0) > _MOST_BYTES:
        raise DataError(f"{folder.place(name)}: {size:,} bytes, more than any file of a store has. {way_on}")
    try:
        return folder.read(name)
    except FileNotFoundError as error:
        raise DataError(f"{folder.place(name)}: missing. {way_on}") from error


@dataclass(frozen=True)
class CheckedPart:
    """What a part holds, once every byte of it is known to be what was written."""

    table: pa.Table
    ledger: Ledger
    skipped: list[Any]
    noise: NoiseFloor


def check_part(folder: Folder, unit: int, content: bytes, manifest: Mapping[str, Any]) -> CheckedPart:
    """Check the bytes of a part against themselves and the manifest: no index is needed for it.

    Raises:
        DataError: Damaged: the content digest in its footer is not that of its rows and footer.
        IdentityError: Another run's part.
    """
    place, way_on = folder.place(part_name(unit)), _DELETE_PART
    with _opened(place, content, way_on) as part:
        metadata = _metadata(part)
        _check_footer(place, metadata, manifest["fingerprint"], unit)
        table = part.read()
    if not table.schema.equals(schema(token_logps=bool(manifest["identity"]["tokenization"]["token_logps"]))):
        raise DataError(f"{place}: damaged, its columns are not those of a part. {way_on}")
    footer = {key.decode("utf-8", "replace"): value.decode("utf-8", "replace") for key, value in metadata.items()}
    if footer.get("refshard.digest") != _digest_of_content(table, footer):
        raise DataError(f"{place}: damaged, the digest in its footer is not that of its content. {way_on}")
    try:
        ledger = Ledger()
        ledger.add(json.loads(footer["refshard.ledger"]))
        skipped = json.loads(footer["refshard.skipped"])
        noise = NoiseFloor(**json.loads(footer["refshard.noise"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: damaged, its footer does not say what became of its rows. {way_on}") from error
    if not table.num_rows == ledger.kept == ledger.rows - ledger.dropped.total():
        raise DataError(f"{place}: damaged, its {table.num_rows} rows are not what its footer counts. {way_on}")
    return CheckedPart(table=table, ledger=ledger, skipped=skipped, noise=noise)


_DELETE_PART = "Delete this part, then run the same command again: it scores this unit only"
_DELETE_INDEX = "Delete it and run refshard precompute again: it scores nothing twice"

_MOST_BYTES = 2**32
"""Of a part, manifest or index. Parts of the default size have some megabytes"""


def _digest_of_content(table: pa.Table, footer: Mapping[str, str]) -> str:
    """SHA-256 of what a part says, however Parquet has encoded it: its columns' values and the rest of its footer.

    Page checksums let a flipped bit in a page's header through now and then, and do not cover the footer at all.
    """
    digest = hashlib.sha256()
    said = {key: value for key, value in footer.items() if key.startswith("refshard.") and key != "refshard.digest"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name in table.column_names:
        column = table[name].combine_chunks()
        digest.update(f"{name} {len(column)} {column.null_count}".encode())
        if pa.types.is_list(column.type):
            digest.update(np.asarray(pc.list_value_length(column)).astype("<i4").tobytes())
            column = column.flatten()
        if pa.types.is_fixed_size_binary(column.type):
            digest.update(b"".join(column.to_pylist()))
        else:
            values = column.to_numpy(zero_copy_only=False)
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON file of what is said, with its own SHA-256 in it."""
    return (json.dumps({**content, "sha256": _seal(content)}, indent=1, sort_keys=True) + "\n").encode()


def _is_sealed(content: Mapping[str, Any]) -> bool:
    return content.get("sha256") == _seal({key: value for key, value in content.items() if key != "sha256"})


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_index(place: str, index: Mapping[str, Any], fingerprint: str) -> None:
    parts, totals, noise = index.get("parts"), index.get("totals"), index.get("noise")
    if index.get("fingerprint") != fingerprint or not isinstance(parts, list):
        raise DataError(f"{place}: does not belong to the manifest beside it. {_DELETE_INDEX}")
    if not _is_sealed(index):
        raise DataError(f"{place}: edited or damaged, its SHA-256 is not that of what it says. {_DELETE_INDEX}")
    for number, part in enumerate(parts):
        # A name from a file must not lead out of its folder; there is only one right name anyway.
        if not isinstance(part, dict) or part.get("file") != part_name(number):
            raise DataError(f"{place}: entry {number} must name {part_name(number)}. {_DELETE_INDEX}")
    if (
        not all(_is_count(part.get("rows")) and _is_count(part.get("bytes")) for part in parts)
        or not _has_shape_of_totals(totals)
        or not _has_shape_of_noise(noise)
        or sum(part["rows"] for part in parts) != index["totals"]["kept"]
    ):
        raise DataError(f"{place}: damaged, its parts do not add up to its totals. {_DELETE_INDEX}")


def _has_shape_of_totals(totals: Any) -> bool:
    return (
        isinstance(totals, dict)
        and all(_is_count(totals.get(name)) for name in ("rows", "kept"))
        and all(
            isinstance(totals.get(name), dict) and all(map(_is_count, totals[name].values()))
            for name in ("dropped", "noted")
        )
    )


def _has_shape_of_noise(noise: Any) -> bool:
    return (
        isinstance(noise, dict)
        and noise.keys() == vars(NoiseFloor()).keys()
        and _is_count(noise["tokens"])
        and all(isinstance(noise[name], int | float) and 0 <= noise[name] < math.inf for name in ("mean", "largest"))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@contextlib.contextmanager
def _opened(place: str, content: bytes, way_on: str) -> Iterator[pq.ParquetFile]:
    """Open the bytes of a part once, for its footer and its columns. Raises DataError where they can't be read."""
    unreadable = (pa.ArrowException, OSError, ValueError)
    try:
        part = _open_part(content)
    except unreadable as error:
        raise DataError(f"{place}: damaged, no readable Parquet footer ({error}). Delete it and run again") from error
    with part:
        try:
            yield part
        except unreadable as error:
            raise DataError(f"{place}: damaged ({error}). {way_on}") from error


def _metadata(part: pq.ParquetFile) -> dict[bytes, bytes]:
    return dict(part.schema_arrow.metadata or {})


def _open_part(content: bytes) -> pq.ParquetFile:
    """Open the bytes of a part, from whomever they are.

    Raises:
        ValueError: They would unpack to more than any part does; or what the library raises for what is no Parquet.
    """
    start = max(0, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    # The footer may name types of other libraries, whose code would run to make them; columns are plain without it.
    plain = content[:start] + content[start:].replace(b"ARROW:schema", b"no-ARROW-use")
    part = pq.ParquetFile(
        pa.BufferReader(plain),
        page_checksum_verification=True,
        # What a footer may have allocated: strings hold what a unit skipped, lists its row groups.
        thrift_string_size_limit=2**28,
        thrift_container_size_limit=2**20,
    )
    groups = range(part.metadata.num_row_groups)
    if sum(part.metadata.row_group(number).total_byte_size for number in groups) > _MOST_BYTES:
        raise ValueError(f"would unpack to more than {_MOST_BYTES:,} bytes")
    return part


def _check_footer(place: str, metadata: Mapping[bytes, bytes], fingerprint: str, unit: int) -> None:
    found = metadata.get(b"refshard.fingerprint", b"none").decode("utf-8", errors="replace")
    if found != fingerprint:
        raise IdentityError(
            f"{place}: fingerprint {found[:12]}, the manifest says {fingerprint[:12]}: another run's part"
        )
    if metadata.get(b"refshard.unit") != str(unit).encode():
        raise DataError(f"{place}: holds another unit than its name says; delete it and run again")
