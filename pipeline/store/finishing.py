"""Finish a store: check all its parts and write the index; delete other runs' parts; make it unfinished again."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping

import pyarrow as pa

from pipeline.base.errors import IdentityError
from pipeline.base.folders import Where, open_folder
from pipeline.data.intake import Ledger
from pipeline.scoring.agreement import NoiseFloor
from pipeline.store import format
from pipeline.store.format import ForeignPartError, part_name
from pipeline.store.store import PartHeader, Store, is_finished, load_store, parts_there, read_content, read_manifest

__all__ = ["delete_foreign", "finish_store", "longest_pair", "lost_parts", "reopen_store"]


def finish_store(
    where: Where,
    num_units: int,
    approve: Callable[[Mapping[int, pa.Table], NoiseFloor], None] | None = None,
    *,
    header: PartHeader | None = None,
) -> list[int]:
    """Write the index if every unit's part is there. Return the missing units.

    `approve` gets the longest pair of each part by its unit, and the noise floor; its error keeps the index unwritten.
    `header` is that of the caller's parts.

    Raises:
        DataError: A part is damaged.
        ForeignPartError: Parts carry another fingerprint or plan; the message names all of them.
        IdentityError: The store is no longer the caller's: it was replaced by another run's.
        StorageError: A part can't be read, or the index can't be written.
    """
    folder = open_folder(where)
    there = parts_there(folder)
    missing = [unit for unit in range(num_units) if unit not in there]
    if missing or is_finished(folder):
        return missing
    manifest = read_manifest(folder)
    stamp = manifest["fingerprint"], format.plan_digest(manifest["plan"])
    if header is not None and (header.fingerprint, header.plan) != stamp:
        raise IdentityError(
            f"{folder}: was replaced by another run's store while this worker was at work; it writes no index. Run the "
            "command of the store that shall be there"
        )
    totals, noise, parts, skipped, samples = Ledger(), NoiseFloor(), [], bytearray(), {}
    foreign: dict[int, ForeignPartError] = {}
    for unit in range(num_units):
        # Check all bytes once: from here on the index vouches for them.
        content = read_content(folder, part_name(unit), format.DELETE_PART)
        try:
            part = format.check_part(folder, unit, content, manifest)
        except ForeignPartError as error:
            foreign[unit] = error
            continue
        totals.add(part.ledger.as_dict())
        noise += part.noise
        format.add_skipped(skipped, part)
        if approve is not None:
            samples[unit] = longest_pair(part.table)
        parts.append(
            {
                "file": part_name(unit),
                "rows": part.table.num_rows,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    if foreign:
        others = ", ".join(map(part_name, list(foreign)[1:]))
        first = next(iter(foreign.values()))
        refused = ForeignPartError(f"{first}. The same holds for {others}" if others else str(first))
        refused.units = tuple(foreign)
        raise refused
    if approve is not None:
        approve(samples, noise)
    if skipped:
        folder.replace(format.SKIPPED, bytes(skipped))
    elif folder.size(format.SKIPPED) is not None:
        # Of parts that are made again by now.
        folder.delete(format.SKIPPED)
    fingerprint = manifest["fingerprint"]
    index = {"fingerprint": fingerprint, "parts": parts, "totals": totals.as_dict(), "noise": vars(noise)}
    folder.put_if_absent(format.INDEX, format.sealed(index))
    return []


def delete_foreign(where: Where, units: Iterable[int]) -> list[str]:
    """Delete the parts of these units that are another run's; give their names. Raises StorageError.

    Each is read again just before: another worker may have put the right one there.
    """
    folder, deleted = open_folder(where), []
    manifest = read_manifest(folder)
    for unit in units:
        try:
            with contextlib.suppress(FileNotFoundError):
                format.check_part(folder, unit, folder.read(part_name(unit)), manifest, ["row"])
        except ForeignPartError:
            folder.delete(part_name(unit))
            deleted.append(part_name(unit))
    return deleted


def longest_pair(part: pa.Table) -> pa.Table:
    """Give the row of a part whose completions have most tokens; none of an empty part."""
    tokens = part["chosen_tokens"].to_numpy() + part["rejected_tokens"].to_numpy()
    return part.slice(int(tokens.argmax()) if len(tokens) else 0, 1)


def reopen_store(where: Where) -> list[str]:
    """Make a finished store unfinished if parts are gone or have another size than its index says. Return their names.

    The index is deleted first, then parts of another size.

    Raises:
        DataError: The index is damaged.
        StorageError: A file can't be deleted.
    """
    store = load_store(where)
    lost = lost_parts(store)
    for name in [format.INDEX, *lost] if lost else ():
        store.folder.delete(name)
    return lost


def lost_parts(store: Store) -> list[str]:
    """Name the parts of a finished store that are gone or have another size than its index says."""
    sizes = store.folder.sizes()
    return [part["file"] for part in store.index.get("parts", ()) if sizes.get(part["file"]) != part["bytes"]]
