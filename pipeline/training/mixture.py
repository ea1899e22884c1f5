"""Mix the joined training sets of a run to one set, which has each pair as often as its set's fraction says."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import numpy.typing as npt

from pipeline.config.data import TrainSetConfig

__all__ = ["Mixture", "copies_of", "mix"]


@dataclass(frozen=True)
class Mixture:
    """The pairs of an epoch."""

    pairs: datasets.Dataset
    """Rows of all sets, one after the other; the column `set` has the number of each row's set, by name"""
    counts: Mapping[str, int]
    """Number of pairs of an epoch by set; a pair that is taken twice counts twice"""


def mix(sets: Mapping[str, datasets.Dataset], settings: Mapping[str, TrainSetConfig], seed: int) -> Mixture:
    """Concatenate joined sets in the order of their names, each by its `fraction`.

    The rows stay on disk; memory has 9 bytes for each. A single set, without `settings`, is given as it is.
    """
    if not settings:
        ((name, pairs),) = sets.items()
        return Mixture(pairs, {name: len(pairs)})
    # A set without token log-probs has no place of them.
    shared = set.intersection(*(set(pairs.column_names) for pairs in sets.values()))
    parts, chosen, counts, before = [], [], {}, 0
    # A resumed run has the sets in the order of its file, which the identity of a run does not hold.
    for number, (name, pairs) in enumerate(sorted(sets.items(), key=lambda item: item[0])):
        kept = pairs.remove_columns([column for column in pairs.column_names if column not in shared])
        parts.append(kept.add_column("set", np.full(len(pairs), number, np.int16)))
        keys = (key.as_py() for chunk in pairs.data.table["pair_key"].chunks for key in chunk)
        copies = copies_of(keys, settings[name].fraction, seed)
        chosen.append(before + np.repeat(np.arange(len(pairs)), copies))
        counts[name] = int(copies.sum())
        before += len(pairs)
    return Mixture(datasets.concatenate_datasets(parts).select(np.concatenate(chosen)), counts)


def copies_of(keys: Iterable[bytes], fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Count how often an epoch has each pair: the whole part of `fraction`, and once more for a share of the pairs.

    The seed and the pair's key decide, so the order of the rows does not matter, and a larger fraction has all pairs of
    a smaller one.
    """
    salt = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(hashlib.blake2b(key, digest_size=8, salt=salt).digest() for key in keys)
    # The upper 53 bits are a float64 from 0 to below 1, exactly.
    places = (np.frombuffer(digests, "<u8") >> np.uint64(11)) / 2.0**53
    return np.maximum(np.ceil(fraction - places), 0).astype(np.int64)
