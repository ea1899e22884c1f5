"""File formats of a store: schema and checks of a part, checks of the manifest and the index.

docs/shard-format.md describes the format for readers outside this project.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.base.errors import DataError, IdentityError
from pipeline.base.files import parse_json
from pipeline.base.folders import Folder
from pipeline.base.schemas import Schema
from pipeline.data.intake import Ledger
from pipeline.scoring.agreement import NoiseFloor

__all__ = [
    "DELETE_INDEX",
    "DELETE_PART",
    "MAKE_AGAIN",
    "MANIFEST",
    "MANIFEST_SCHEMA",
    "MAX_BYTES",
    "MOST_SKIPPED",
    "PART_NAME",
    "CheckedPart",
    "ForeignPartError",
    "ScoredPair",
    "SummedPair",
    "add_skipped",
    "check_part",
    "content_digest",
    "is_our_file",
    "is_ours",
    "is_sealed",
    "pair_keys",
    "parse_index",
    "part_name",
    "plan_digest",
    "schema",
    "sealed",
    "to_table",
]

MANIFEST, INDEX, SKIPPED = "manifest.json", "index.json", "skipped.jsonl"


@dataclass(frozen=True, kw_only=True)
class ScoredPair:
    """One row of a part: a pair's key and the token log-probs of its completions."""

    key: bytes
    row: int
    prompt_tokens: int
    chosen_token_logps: npt.NDArray[np.float32]
    """[chosen tokens], nats"""
    rejected_token_logps: npt.NDArray[np.float32]
    """[rejected tokens], nats"""


@dataclass(frozen=True, kw_only=True)
class SummedPair:
    """One row of a part whose token log-probs are not known, only their sums."""

    key: bytes
    row: int
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    chosen_logps: float
    """Nats"""
    rejected_logps: float


@dataclass(frozen=True)
class CheckedPart:
    """Content of a part whose bytes were checked."""

    table: pa.Table
    ledger: Ledger
    skipped: list[Any]
    noise: NoiseFloor
    size: int
    """Bytes of the file"""


class ForeignPartError(IdentityError):
    """Parts of another run: a worker of an earlier store has written them after its store was replaced."""

    units: Sequence[int] = ()
    """Units of the parts, where several were read"""


PART_NAME = re.compile(r"part-([0-9]{5,})\.parquet")
DELETE_PART = "Delete this part, then run refshard precompute again: it scores this unit only"
SCORE_ANEW = "Run refshard precompute again: it deletes this part, and scores its unit anew"
MAKE_AGAIN = "Run refshard precompute again: it scores this unit only"
DELETE_INDEX = "Delete it and run refshard precompute again: it scores one pair of each part twice"
MOST_SKIPPED = 2**28
"""Bytes of skipped.jsonl beyond which no further part's rows are listed, as memory holds all; the index counts all"""
MAX_BYTES = 2**32
"""Largest part, manifest, or index. Parts of the default size have some megabytes"""

MANIFEST_SCHEMA = Schema(__package__, "manifest", "Restore it from a backup, or score again")
_INDEX_SCHEMA = Schema(__package__, "index", DELETE_INDEX)


def schema(*, token_logps: bool) -> pa.Schema:
    """Give the columns of a part, schema version 1."""
    columns = {
        "pair_key": pa.binary(16),
        "row": pa.int64(),
        "prompt_tokens": pa.int32(),
        "chosen_tokens": pa.int32(),
        "rejected_tokens": pa.int32(),
        "ref_chosen_logps": pa.float32(),
        "ref_rejected_logps": pa.float32(),
    }
    if token_logps:
        lists = pa.list_(pa.field("element", pa.float32(), nullable=False))
        columns |= {"chosen_token_logps": lists, "rejected_token_logps": lists}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def part_name(unit: int) -> str:
    return f"part-{unit:05d}.parquet"


def pair_keys(part: pa.Table) -> npt.NDArray[np.bytes_]:
    """Give the keys of a part's rows as numpy strings of 16 bytes, [rows].

    numpy ignores trailing zero bytes in comparisons, which changes no order and no equality among keys of one length.
    """
    column = part["pair_key"].combine_chunks()
    return np.frombuffer(column.buffers()[1], dtype="S16")[column.offset : column.offset + len(column)]


def to_table(pairs: Sequence[ScoredPair] | Sequence[SummedPair], *, token_logps: bool) -> pa.Table:
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
    """Give the token counts, the sums, and, where known, the token logps of one side's completions."""
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


def check_part(
    folder: Folder,
    unit: int,
    content: bytes,
    manifest: Mapping[str, Any],
    columns: Sequence[str] | None = None,
    *,
    vouched: bool = False,
) -> CheckedPart:
    """Check the bytes of a part against themselves and the manifest; give `columns` of its table, None for all.

    `vouched` says that the index vouches for the bytes: their own digest is not computed, nor other columns read.

    Raises:
        DataError: The part is damaged: unreadable, or not what the digest in its footer says.
        ForeignPartError: The part is another run's.
        IdentityError: So it is, though the index vouches for it; or it is another program's.
    """
    place, remedy = folder.place(part_name(unit)), DELETE_PART
    fingerprint, identity = manifest["fingerprint"], manifest["identity"]
    expected = schema(token_logps=bool(identity["tokenization"]["token_logps"]))
    try:
        with _open_parquet(content) as part:
            metadata = part.schema_arrow.metadata or {}
            footer = {key.decode("utf-8", "replace"): text.decode("utf-8", "replace") for key, text in metadata.items()}
            found = footer.get("refshard.fingerprint", "none")
            if found != fingerprint:
                other = f"{place}: fingerprint {found[:12]}, the manifest says {fingerprint[:12]}: another"
                if vouched or found == "none":
                    raise IdentityError(f"{other} {'program' if found == 'none' else 'run'}'s part. {remedy}")
                raise ForeignPartError(f"{other} run's part. {SCORE_ANEW}")
            plan, own = footer.get("refshard.plan"), plan_digest(manifest["plan"])
            # Parts and manifests of earlier versions do not say it.
            if plan != own and (plan is not None or "plan_digest" in manifest):
                raise (IdentityError if vouched else ForeignPartError)(
                    f"{place}: of the plan {str(plan)[:12].lower()}, the manifest's is {own[:12]}: another run's part, "
                    f"of other data or other settings. {remedy if vouched else SCORE_ANEW}"
                )
            if footer.get("refshard.unit") != str(unit):
                raise DataError(f"{place}: holds another unit than its name says. {DELETE_PART}")
            if not part.schema_arrow.equals(expected):
                raise DataError(f"{place}: damaged, its columns are not those of a part. {remedy}")
            table = part.read(list(columns) if columns and vouched else None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{place}: damaged ({error}). {remedy}") from error
    if not vouched and footer.get("refshard.digest") != content_digest(table, footer):
        raise DataError(f"{place}: damaged, the digest in its footer is not that of its content. {remedy}")
    texts = (f'"{name}": {footer.get(f"refshard.{name}", "null")}' for name in ("ledger", "noise", "skipped"))
    counts = Schema(__package__, "footer", remedy).parse(f"{place}: its footer", f"{{{', '.join(texts)}}}".encode())
    ledger, noise = Ledger(), NoiseFloor(**counts["noise"])
    ledger.add(counts["ledger"])
    if not table.num_rows == ledger.kept == ledger.rows - ledger.dropped.total():
        raise DataError(f"{place}: damaged, its {table.num_rows} rows are not what its footer counts. {remedy}")
    table = table.select(list(columns)) if columns else table
    return CheckedPart(table=table, ledger=ledger, skipped=counts["skipped"], noise=noise, size=len(content))


def content_digest(table: pa.Table, footer: Mapping[str, str]) -> str:
    """Give the SHA-256 of a part's values and footer, which does not depend on Parquet's encoding.

    Page checksums miss some flipped bits in page headers, and do not cover the footer.
    """
    digest = hashlib.sha256()
    ours = {key: value for key, value in footer.items() if key.startswith("refshard.") and key != "refshard.digest"}
    digest.update(json.dumps(ours, sort_keys=True).encode())
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


def sealed(content: Mapping[str, Any]) -> bytes:
    """Encode a JSON file that holds the SHA-256 of its own content."""
    return (json.dumps({**content, "sha256": _seal(content)}, indent=1, sort_keys=True) + "\n").encode()


def add_skipped(lines: bytearray, part: CheckedPart) -> None:
    """Append a part's skipped rows, one a line, to the content of skipped.jsonl."""
    for entry in part.skipped if len(lines) < MOST_SKIPPED else ():
        lines += json.dumps(entry, ensure_ascii=False).encode("utf-8", errors="backslashreplace") + b"\n"


def is_sealed(content: Mapping[str, Any]) -> bool:
    """Return True if a JSON file holds the SHA-256 of its own content."""
    return content.get("sha256") == _seal({key: value for key, value in content.items() if key != "sha256"})


def plan_digest(plan: Mapping[str, Any]) -> str:
    """Give the SHA-256, in hex, of a store's plan, which each part carries in its footer."""
    return _seal(plan)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_ours(folder: Folder) -> bool:
    """Return True if a folder's manifest is this program's. A damaged one counts if the program's name is in it."""
    size = folder.size(MANIFEST)
    if size is None or size > MAX_BYTES:
        return False
    content = folder.read(MANIFEST)
    try:
        return parse_json(folder.place(MANIFEST), content).get("format") == "refshard"
    except DataError:
        return b"refshard" in content


def is_our_file(folder: Folder, name: str) -> bool:
    """Return True if a part or an index, damaged or not, was written by this program."""
    content = folder.read(name)
    if PART_NAME.fullmatch(name):
        # The footer's keys are not compressed.
        return b"refshard.fingerprint" in content
    with contextlib.suppress(DataError):
        return is_sealed(parse_json(name, content))
    return False


def parse_index(place: str, content: bytes, fingerprint: str) -> dict[str, Any]:
    """Parse an index; refuse one that is not the manifest's, was edited, or does not add up. Raises DataError."""
    index = _INDEX_SCHEMA.parse(place, content)
    if index["fingerprint"] != fingerprint:
        raise DataError(f"{place}: does not belong to the manifest beside it. {DELETE_INDEX}")
    if not is_sealed(index):
        raise DataError(f"{place}: edited or damaged, its SHA-256 is not that of its content. {DELETE_INDEX}")
    # Only these names: a name from a file must not lead out of its folder.
    if [part["file"] for part in index["parts"]] != [part_name(unit) for unit in range(len(index["parts"]))]:
        raise DataError(f"{place}: damaged, it does not name the parts in order. {DELETE_INDEX}")
    if sum(part["rows"] for part in index["parts"]) != index["totals"]["kept"]:
        raise DataError(f"{place}: damaged, its parts do not add up to its totals. {DELETE_INDEX}")
    return index


def _open_parquet(content: bytes) -> pq.ParquetFile:
    """Open the bytes of a part, which may be an untrusted writer's. Raises ValueError, and the library's own errors."""
    start = max(0, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    # The Arrow schema in a footer may name extension types, whose code would run. Columns are plain without it.
    plain = content[:start] + content[start:].replace(b"ARROW:schema", b"no-ARROW-use")
    part = pq.ParquetFile(
        pa.BufferReader(plain),
        page_checksum_verification=True,
        # Limits on what a footer makes the reader allocate: strings hold skipped rows, lists row groups.
        thrift_string_size_limit=2**28,
        thrift_container_size_limit=2**20,
    )
    groups = range(part.metadata.num_row_groups)
    if sum(part.metadata.row_group(number).total_byte_size for number in groups) > MAX_BYTES:
        raise ValueError(f"would unpack to more than {MAX_BYTES:,} bytes")
    return part
