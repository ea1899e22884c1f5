"""Copy the log-probs of pairs that other stores have scored, so that adding 5% of data means scoring 5%."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import ConfigError, DataError, IdentityError
from pipeline.data.intake import KeptPair
from pipeline.models.identity import differences, remedy
from pipeline.store.format import ScoredPair, pair_keys
from pipeline.store.store import Store, find_stores, open_store, read_part, read_parts

__all__ = ["Reusable", "copy_scored", "open_reusable", "reusable_of"]

_PARTS_IN_MEMORY = 8
"""Decoded parts that are kept; rows in their old order read one part after the other"""


@dataclass(frozen=True)
class Reusable:
    """Places of the scored pairs of several stores, sorted by key."""

    stores: list[Store]
    keys: npt.NDArray[np.bytes_]
    """Keys, [R] of 16 bytes, ascending"""
    places: npt.NDArray[np.int64]
    """Store, part, and row in the part of each pair, [R, 3]"""
    read: Callable[[int, int], pa.Table]
    """Reads the token logps of a part, by store and part; keeps the latest tables"""


def open_reusable(folders: Sequence[str], identity: Mapping[str, Any]) -> Reusable:
    """Open stores, or folders of stores, to copy from. Their identity must equal this run's in every field.

    Raises:
        ConfigError: A store has no token logps, without which a row can't be copied.
        IdentityError: A store is of another reference or tokenization; the message names the fields.
        DataError: A store is missing or damaged.
    """
    stores = [open_store(store) for folder in folders for store in find_stores(folder)]
    for store in stores:
        stored = store.manifest["identity"]
        if not (stored["tokenization"]["token_logps"] and identity["tokenization"]["token_logps"]):
            raise ConfigError(
                f"precompute.reuse: {store.folder}: copying needs token logps on both sides. Set "
                "precompute.token_logps: true for both"
            )
        found = differences(stored, identity, joining=False)
        if found:
            raise IdentityError(
                f"precompute.reuse: {store.folder}: scored by another reference or tokenization. It differs in "
                f"{'; '.join(found)}.{remedy(stored, identity)} Leave it out, or restore the settings"
            )
    return reusable_of(stores)


def reusable_of(stores: list[Store]) -> Reusable:
    """Index the pairs of finished stores of one identity, with token logps. Raises DataError for a damaged part."""
    keys: list[npt.NDArray[np.bytes_]] = []
    places: list[npt.NDArray[np.int64]] = []
    for number, store in enumerate(stores):
        for part, table in enumerate(read_parts(store, ["pair_key"])):
            keys.append(pair_keys(table))
            rows = np.arange(table.num_rows)
            places.append(np.stack([np.full_like(rows, number), np.full_like(rows, part), rows], axis=1))
    unique, first = np.unique(np.concatenate([np.empty(0, "S16"), *keys]), return_index=True)

    @functools.lru_cache(_PARTS_IN_MEMORY)
    def read(store: int, part: int) -> pa.Table:
        return read_part(stores[store], part, ["chosen_token_logps", "rejected_token_logps"]).combine_chunks()

    return Reusable(stores, unique, np.concatenate([np.empty((0, 3), np.int64), *places])[first], read)


def copy_scored(reusable: Reusable, pairs: Sequence[KeptPair]) -> dict[int, ScoredPair]:
    """Give the pairs that are scored already by their index in `pairs`, with this dataset's row numbers.

    Raises:
        DataError: A stored pair has the same key but other token counts; its store was cut at another length.
    """
    if not len(reusable.keys) or not pairs:
        return {}
    wanted = np.array([pair.key for pair in pairs], dtype="S16")
    at = np.minimum(np.searchsorted(reusable.keys, wanted), len(reusable.keys) - 1)
    copied = {}
    for i in np.flatnonzero(reusable.keys[at] == wanted).tolist():
        (store, part, row), pair = reusable.places[at[i]].tolist(), pairs[i]
        table = reusable.read(store, part)
        chosen, rejected = (
            table[f"{side}_token_logps"][row].values.to_numpy().astype(np.float32) for side in ("chosen", "rejected")
        )
        if (len(chosen), len(rejected)) != (len(pair.pair.chosen_ids), len(pair.pair.rejected_ids)):
            raise DataError(
                f"{pair.place}: precompute.reuse: stored with {len(chosen)} and {len(rejected)} tokens, this run has "
                f"{len(pair.pair.chosen_ids)} and {len(pair.pair.rejected_ids)}"
            )
        copied[i] = ScoredPair(
            key=pair.key,
            row=pair.row,
            prompt_tokens=len(pair.pair.prompt_ids),
            chosen_token_logps=chosen,
            rejected_token_logps=rejected,
        )
    return copied
