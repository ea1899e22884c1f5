"""Create, write, open, and read a store: the shards of one set.

    STORE/manifest.json        identity of the reference and tokenization; written once, first
    STORE/part-00000.parquet   one per unit of `rows_per_shard` consecutive dataset rows
    STORE/index.json           written last, once every unit has its part

A file under its final name is complete and never changes. A store without an index is unfinished, never empty. This
module needs pyarrow, numpy and fastjsonschema only.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import ConfigError, DataError, IdentityError, UnfinishedError, number_of
from pipeline.base.files import parse_json
from pipeline.base.folders import Folder, Where, open_folder
from pipeline.data.intake import Ledger
from pipeline.data.sources import as_recorded
from pipeline.models.identity import SCHEMA_VERSION, describe_differences, differences, fingerprint_of, remedy
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store import format
from pipeline.store.format import CheckedPart, ScoredPair, SummedPair, part_name

__all__ = [
    "PartHeader",
    "Store",
    "check_identity",
    "create_store",
    "delete_store",
    "find_stores",
    "is_finished",
    "load_store",
    "open_store",
    "part_exists",
    "parts_there",
    "plan_differences",
    "read_checked_part",
    "read_content",
    "read_manifest",
    "read_part",
    "read_parts",
    "write_part",
]


_MOST_LISTED = 16 * 2**20
"""Most bytes of the skipped rows in a part's footer; readers refuse one of 100 MB"""


@dataclass(frozen=True, kw_only=True)
class Store:
    """A store, finished or not, as its manifest and index describe it."""

    folder: Folder
    manifest: Mapping[str, Any]
    index: Mapping[str, Any]
    """Empty until the store is finished"""
    units: Sequence[int] = ()
    """Units whose part is there, ascending; all of them once the store is finished"""

    @property
    def unfinished(self) -> UnfinishedError | None:
        """Error that says how to finish the store; None once it is finished."""
        if self.index:
            return None
        return UnfinishedError(
            f"{self.folder}: unfinished, {number_of(len(self.units), 'part')} so far and no index. Run: "
            "refshard precompute with the same settings"
        )

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def is_imported(self) -> bool:
        """True if the log-probs come from a file of the user's."""
        return "imported" in self.manifest["plan"]

    @property
    def digest(self) -> str:
        """SHA-256 of the index, which holds the SHA-256 of every part."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    @property
    def noise(self) -> NoiseFloor:
        """Noise floor over all parts; 0 tokens where nothing was scored twice, as in imported stores."""
        return NoiseFloor(**self.index["noise"])


def part_exists(where: Where, unit: int) -> bool:
    return open_folder(where).size(part_name(unit)) is not None


def parts_there(where: Where) -> frozenset[int]:
    """List the units whose part is there, with one request."""
    return frozenset(
        int(match[1]) for name in open_folder(where).names() if (match := format.PART_NAME.fullmatch(name))
    )


def is_finished(where: Where) -> bool:
    return open_folder(where).size(format.INDEX) is not None


def find_stores(where: Where) -> list[Folder]:
    """Give the store in a folder, or the stores in its subfolders. Raises DataError where there are none."""
    folder = open_folder(where)
    if folder.size(format.MANIFEST) is not None:
        return [folder]
    names = sorted(folder.names(), key=lambda name: (name != "train", name))
    found = [folder.child(name) for name in names if folder.child(name).size(format.MANIFEST) is not None]
    if not found:
        raise DataError(
            f"{folder}: no shards there, neither a manifest.json nor folders with one. Name a precompute.output"
        )
    return found


def delete_store(where: Where) -> None:
    """Delete a store's own files, the index first and the manifest last, so that an interruption can be resumed.

    Raises:
        ConfigError: The folder's manifest is another program's.
        StorageError: A file can't be deleted.
    """
    folder = open_folder(where)
    if folder.size(format.MANIFEST) is None:
        return
    if not format.is_ours(folder):
        raise ConfigError(
            f"--overwrite: must delete a store of refshard, got {folder}, whose {format.MANIFEST} is another's. "
            "Name another folder"
        )
    # Other programs write part-*.parquet too (Spark: part-00000-UUID.parquet), which are not ours to delete.
    parts = [name for name in folder.names() if format.PART_NAME.fullmatch(name)]
    for name in (format.INDEX, format.SKIPPED, *parts, format.MANIFEST):
        folder.delete(name)


@dataclass(frozen=True, kw_only=True)
class PartHeader:
    """Footer entries that all parts of a store share."""

    fingerprint: str
    plan: str
    """Digest of the store's plan"""
    token_logps: bool
    """Parts hold token logps, not sums alone"""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Settings, device, and versions that wrote the part; recorded for people"""


def create_store(
    where: Where,
    identity: Mapping[str, Any],
    plan: Mapping[str, Any],
    declared: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> PartHeader:
    """Write the manifest, or check that the one that is there is this run's. Give what its parts carry.

    The identity is everything that a log-prob depends on. The plan is everything else that must be equal to continue a
    store: rows per shard, dataset, rules for dropping. `declared` is recorded for people, and compared with nothing.

    Raises:
        ConfigError: The folder holds another program's files under the names of a store's.
        IdentityError: The folder holds another run's store; the message names the fields that differ.
        StorageError: The folder can't be made, or is in an object store without conditional writes.
    """
    folder = open_folder(where)
    fingerprint = fingerprint_of(identity)
    # A store that is there needs no permission to write.
    if folder.size(format.MANIFEST) is None:
        _refuse_others_files(folder)
        folder.make()
        manifest = {
            "format": "refshard",
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint,
            "identity": identity,
            "plan": plan,
            "plan_digest": format.plan_digest(plan),
            "declared": declared,
        }
        folder.put_if_absent(format.MANIFEST, format.sealed(manifest))
    # Read back: another worker may have been first.
    stored = read_manifest(folder)
    of_identity = differences(stored["identity"], identity, joining=False)
    if found := of_identity + plan_differences(stored["plan"], plan):
        raise IdentityError(
            f"{folder}: holds the shards of another run. It differs in {'; '.join(found)}."
            f"{remedy(stored['identity'], identity)} " + _remedy(folder, stored, reusable=not of_identity)
        )
    return PartHeader(
        fingerprint=fingerprint,
        plan=format.plan_digest(stored["plan"]),
        token_logps=bool(identity["tokenization"]["token_logps"]),
        provenance=provenance or {},
    )


def plan_differences(stored: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Name every field in which a store's plan differs from a run's, which is compared as JSON gives it back."""
    recorded = {**stored, "dataset": as_recorded(stored.get("dataset"), plan.get("dataset"))}
    return describe_differences(recorded, json.loads(json.dumps(plan)))


def _remedy(folder: Folder, manifest: Mapping[str, Any], *, reusable: bool) -> str:
    """Say what to do with a store of another run; a reusable one has the run's identity."""
    if "imported" in manifest["plan"]:
        return "Set precompute.output to a new folder, or pass --overwrite to refshard import to import anew"
    new = "Set precompute.output to a new folder"
    if reusable and manifest["identity"]["tokenization"]["token_logps"]:
        new += f" and precompute.reuse: [{folder}], which copies the pairs that are scored already"
    return f"{new}, or pass --overwrite to refshard precompute to delete these shards"


def _refuse_others_files(folder: Folder) -> None:
    """Refuse a folder without a manifest if it holds a store's names, and none of their files is ours."""
    named = [name for name in folder.names() if format.PART_NAME.fullmatch(name)]
    named += [name for name in (format.INDEX, format.SKIPPED) if folder.size(name) is not None]
    if named and not any(format.is_our_file(folder, name) for name in named):
        raise ConfigError(
            f"precompute.output: must be a new folder, got {folder}, which holds {named[0]} of another program. Name "
            "another folder"
        )


def write_part(
    where: Where,
    unit: int,
    pairs: Sequence[ScoredPair] | Sequence[SummedPair],
    ledger: Ledger,
    noise: NoiseFloor | None = None,
    *,
    header: PartHeader,
) -> bool:
    """Write the part of a unit: serialize, read back, compare, commit. Return False if another writer was first.

    Raises:
        DataError: A log-prob is not finite or a row has no tokens; nothing is written.
        StorageError: The disk failed; nothing is left behind.
    """
    folder = open_folder(where)
    footer = {
        "refshard.fingerprint": header.fingerprint,
        "refshard.plan": header.plan,
        "refshard.unit": str(unit),
        "refshard.ledger": json.dumps(ledger.as_dict()),
        "refshard.skipped": _listed(ledger.skipped),
        "refshard.provenance": json.dumps(header.provenance, sort_keys=True),
        "refshard.noise": json.dumps(vars(noise or NoiseFloor())),
    }
    table = format.to_table(pairs, token_logps=header.token_logps)
    footer["refshard.digest"] = format.content_digest(table, footer)
    table = table.replace_schema_metadata(footer)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True, store_schema=True)
    content = buffer.getvalue()
    # Guard against a writer that produces wrong bytes.
    if not pq.read_table(io.BytesIO(content), page_checksum_verification=True).equals(table, check_metadata=False):
        raise DataError(
            f"{folder.place(part_name(unit))}: does not read back as written; nothing was committed. Run again"
        )
    return folder.put_if_absent(part_name(unit), content)


def _listed(skipped: Sequence[Mapping[str, Any]]) -> str:
    """List skipped rows as JSON, as many as leave a footer that every reader takes. The ledger counts all."""
    size = itertools.accumulate(len(json.dumps(entry)) for entry in skipped)
    return json.dumps([entry for entry, end in zip(skipped, size, strict=True) if end <= _MOST_LISTED])


def load_store(where: Where) -> Store:
    """Open a store, finished or not. Its parts are checked when they are read.

    Raises:
        DataError: There is no store, or its manifest or index is damaged.
        IdentityError: The store is of another version of the format.
    """
    folder = open_folder(where)
    manifest = read_manifest(folder)
    if not is_finished(folder):
        return Store(folder=folder, manifest=manifest, index={}, units=sorted(parts_there(folder)))
    content = read_content(folder, format.INDEX, format.DELETE_INDEX)
    index = format.parse_index(folder.place(format.INDEX), content, manifest["fingerprint"])
    return Store(folder=folder, manifest=manifest, index=index, units=range(len(index["parts"])))


def open_store(where: Where) -> Store:
    """Open a finished store. Raises UnfinishedError where parts are missing, and as `load_store` does."""
    store = load_store(where)
    if store.unfinished is not None:
        raise store.unfinished
    return store


def read_checked_part(
    store: Store, unit: int, columns: Sequence[str] | None = None, *, thorough: bool = False
) -> CheckedPart:
    """Read a part after checking its bytes: against the index, or, without one, against the digest in its footer.

    `thorough` checks that digest although an index vouches for the bytes. No `columns` are all of the schema.

    Raises:
        DataError: The part is missing or damaged; the message names it and the remedy.
        IdentityError: The part is another run's.
    """
    name = part_name(unit)
    if not store.index:
        content = read_content(store.folder, name, format.DELETE_PART)
        return format.check_part(store.folder, unit, content, store.manifest, columns)
    place, entry = store.folder.place(name), store.index["parts"][unit]
    if (size := store.folder.size(name)) is None:
        raise DataError(f"{place}: missing, though the index lists it. {format.MAKE_AGAIN}")
    # The size first: a file that is longer than it should be is not read at all.
    if size != entry["bytes"] or hashlib.sha256(
        content := read_content(store.folder, name, format.DELETE_PART)
    ).hexdigest() != entry.get("sha256"):
        raise DataError(f"{place}: damaged, its SHA-256 is not the one in index.json. {format.DELETE_PART}")
    return format.check_part(store.folder, unit, content, store.manifest, columns, vouched=not thorough)


def read_part(store: Store, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a part. Arguments and errors are those of `read_checked_part`."""
    return read_checked_part(store, number, columns).table


def read_parts(store: Store, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read the parts in order, one at a time."""
    for unit in store.units:
        yield read_part(store, unit, columns)


def read_manifest(where: Where) -> dict[str, Any]:
    """Read a store's manifest.

    Raises:
        DataError: The manifest is missing, damaged, or was edited.
        IdentityError: The manifest is of another version of the format.
    """
    folder = open_folder(where)
    place = folder.place(format.MANIFEST)
    if folder.size(format.MANIFEST) is None:
        raise DataError(f"{folder}: no shards there. Run: refshard precompute --config F")
    manifest = parse_json(place, read_content(folder, format.MANIFEST, "Restore it from a backup, or score again"))
    if manifest.get("format") != "refshard":
        raise DataError(f"{place}: not a refshard manifest")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise IdentityError(
            f"{place}: schema version {manifest.get('schema_version')}, this refshard reads {SCHEMA_VERSION}"
        )
    format.MANIFEST_SCHEMA.check(place, manifest)
    if manifest["fingerprint"] != fingerprint_of(manifest["identity"]):
        raise DataError(f"{place}: edited or damaged, its fingerprint is not that of its identity")
    if not format.is_sealed(manifest):
        raise DataError(f"{place}: edited or damaged, its SHA-256 is not that of its content")
    return manifest


def read_content(folder: Folder, name: str, remedy: str) -> bytes:
    """Read a store's file, unless it is far larger than any that this program writes.

    Raises:
        DataError: The file is missing or too large; the message ends with the remedy.
        StorageError: The file can't be read.
    """
    if (size := folder.size(name) or 0) > format.MAX_BYTES:
        raise DataError(f"{folder.place(name)}: {size:,} bytes, more than any file of a store has. {remedy}")
    try:
        return folder.read(name)
    except FileNotFoundError as error:
        raise DataError(f"{folder.place(name)}: missing. {remedy}") from error


def check_identity(stores: Sequence[Store], identity: Mapping[str, Any], exact: int | None = None) -> None:
    """Refuse stores of another reference or tokenization than this run's, by an IdentityError with their fields.

    `exact` is the reference's `exact_length`.
    """
    for store in stores:
        found = differences(store.manifest["identity"], identity, joining=True, exact=exact)
        if found:
            raise IdentityError(
                f"{store.folder}: these shards are not of this run's reference and tokenization. They differ in "
                f"{'; '.join(found)}.{remedy(store.manifest['identity'], identity)} Score again into another "
                "precompute.output, or restore the settings"
            )
