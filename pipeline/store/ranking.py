"""How a reference ranks the pairs that it scored, and which of them look wrong: arithmetic on a store's columns.

Needs numpy only, and about 200 bytes a pair.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.statistics import Floats, Integers, share_positive

__all__ = [
    "PairColumns",
    "Swaps",
    "first_of_each",
    "length_differences",
    "likely_swapped",
    "longer_sides",
    "margins",
    "margins_per_token",
    "part_means",
    "same_on_both_sides",
    "worst",
]

_LEAST_NOISE = 1e-5
"""Nats a token: what float32 leaves of equal token logps, however they were scored"""


@dataclass(frozen=True, kw_only=True)
class PairColumns:
    """The columns of P pairs, in the store's order."""

    keys: npt.NDArray[np.bytes_]
    """[P] strings of 16 bytes"""
    rows: Integers
    """[P] positions in the dataset"""
    parts: Integers
    """[P] number of the part that holds it"""
    prompt_tokens: Integers
    chosen_tokens: Integers
    """[P] at least 1"""
    rejected_tokens: Integers
    chosen_logps: Floats
    """[P] nats, finite"""
    rejected_logps: Floats

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """Pairs that look like another one with chosen and rejected changed over."""

    indexes: Integers
    """[S, 2] the two of each match, the earlier first, in order; a later pair is in one match at most"""
    same_order: int
    """Pairs of another key that coincide with an earlier one just as well, but not changed over: what chance, or
    texts that differ only after max_length, makes of the data"""
    tolerance: float
    """How far apart the sums may be, nats a token"""


def margins(pairs: PairColumns) -> Floats:
    """Give log p(chosen) - log p(rejected) under the reference, [P] nats."""
    return pairs.chosen_logps - pairs.rejected_logps


def margins_per_token(pairs: PairColumns) -> Floats:
    """Give the difference of the completions' mean token logps, chosen less rejected, [P] nats a token."""
    return pairs.chosen_logps / pairs.chosen_tokens - pairs.rejected_logps / pairs.rejected_tokens


def length_differences(pairs: PairColumns) -> Integers:
    """Give by how many tokens the chosen completion is longer, [P]."""
    return pairs.chosen_tokens - pairs.rejected_tokens


def longer_sides(pairs: PairColumns) -> dict[str, dict[str, Any]]:
    """Give, for the pairs of which the chosen, the rejected or neither completion is longer, how they are ranked.

    Each has `pairs`, `share_chosen_preferred` and `share_chosen_preferred_per_token`, None where there are no pairs.
    """
    difference, whole, per_token = length_differences(pairs), margins(pairs), margins_per_token(pairs)
    groups = {"chosen": difference > 0, "rejected": difference < 0, "neither": difference == 0}
    return {
        name: {
            "pairs": int(inside.sum()),
            "share_chosen_preferred": share_positive(whole[inside]),
            "share_chosen_preferred_per_token": share_positive(per_token[inside]),
        }
        for name, inside in groups.items()
    }


def first_of_each(keys: npt.NDArray[np.bytes_]) -> Integers:
    """Give for each pair the index of the first that has its key: its own, if it is no duplicate. [P]"""
    first = np.arange(len(keys), dtype=np.int64)
    # Sorting numbers is some times as fast as sorting strings, and half of a hash tells nearly all apart.
    shared = _has_equal(np.ascontiguousarray(keys).view(np.uint64)[::2])
    candidates = np.flatnonzero(shared)
    _, earliest, inverse = np.unique(keys[candidates], return_index=True, return_inverse=True)
    first[candidates] = candidates[earliest[inverse]]
    return first


def _has_equal(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell which values are there more than once."""
    order = np.argsort(values)
    equal = values[order][1:] == values[order][:-1]
    found = np.zeros(len(values), dtype=bool)
    found[order[1:][equal]] = found[order[:-1][equal]] = True
    return found


def same_on_both_sides(pairs: PairColumns) -> Integers:
    """Give the indexes of pairs whose completions were one as scored: as many tokens, and the same sum to the bit.

    A completion that is there twice for a prompt is scored once, so nothing but equality is expected of it.
    """
    same = (pairs.chosen_tokens == pairs.rejected_tokens) & (pairs.chosen_logps == pairs.rejected_logps)
    return np.flatnonzero(same)


def worst(pairs: PairColumns, most: int) -> Integers:
    """Give the indexes of the pairs with the most negative margins per token, the most negative first.

    Only pairs whose margin is negative in sum as well: where the two disagree, the lengths alone may be why.
    """
    values = margins_per_token(pairs)
    negative = np.flatnonzero((values < 0) & (margins(pairs) < 0))
    if len(negative) > most:
        # All that tie with the last one wanted stay in, so that the order below decides.
        negative = negative[values[negative] <= np.partition(values[negative], most - 1)[most - 1]]
    return negative[np.argsort(values[negative], kind="stable")][:most]


def likely_swapped(pairs: PairColumns, first: Integers, noise: float) -> Swaps:
    """Find pairs that are likely another one with chosen and rejected changed over.

    The key can't tell, as it is one of all three texts. But the same prompt and completions have the same three
    lengths and, but for noise, the same two sums.

    Args:
        pairs: Of a store.
        first: As `first_of_each` gives it: of duplicates the first alone is looked at.
        noise: Mean difference of token logps that are scored twice, nats a token.
    """
    tolerance = max(float(noise), _LEAST_NOISE)
    here = np.arange(len(pairs))
    lengths = np.stack([pairs.chosen_tokens, pairs.rejected_tokens])
    sums = np.stack([pairs.chosen_logps, pairs.rejected_logps])
    # The shorter completion first; of equally long ones the less likely.
    changed = (lengths[0] > lengths[1]) | ((lengths[0] == lengths[1]) & (sums[0] > sums[1]))
    order = np.stack([changed, ~changed]).astype(np.int64)
    lengths, sums = lengths[order, here], sums[order, here]
    # Completions that are as good as equal are in no order.
    told = (lengths[0] != lengths[1]) | (sums[1] - sums[0] > 2 * tolerance * lengths[0])
    kept = np.flatnonzero((first == here) & told)
    # Nearly all pairs are alone with their lengths.
    kept = kept[_has_equal(_hashed(pairs.prompt_tokens[kept], *lengths[:, kept]))]
    fixed = (pairs.prompt_tokens[kept], *lengths[:, kept])
    steps = sums[:, kept] / (2 * tolerance * lengths[:, kept])
    partner = np.full(len(pairs), -1, dtype=np.int64)
    coincides = np.zeros(len(pairs), dtype=bool)
    # Two sums at most a tolerance apart are in one cell of twice that width, or in one of those moved by half of it.
    for shift in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)):
        cells = _hashed(*fixed, *np.floor(steps + np.array(shift)[:, None]))
        in_company = _has_equal(cells)
        cells, indexes = cells[in_company], kept[in_company]
        groups = [_Group(cells[changed[indexes] == way], indexes[changed[indexes] == way]) for way in (False, True)]
        for mine, other in (groups, groups[::-1]):
            coincides[mine.indexes[mine.earliest(mine.cells) < mine.indexes]] = True
            found = other.earliest(mine.cells)
            match = found < mine.indexes
            partner[mine.indexes[match]] = found[match]
    later = np.flatnonzero(partner >= 0)
    return Swaps(
        indexes=np.stack([partner[later], later], axis=1), same_order=int(coincides.sum()), tolerance=tolerance
    )


class _Group:
    """Pairs that have their sides in one order, by cell."""

    def __init__(self, cells: npt.NDArray[np.uint64], indexes: Integers) -> None:
        self.cells, self.indexes = cells, indexes
        self._known, at = np.unique(cells, return_index=True)
        self._first = indexes[at]

    def earliest(self, cells: npt.NDArray[np.uint64]) -> Integers:
        """Give the least index in each cell; one beyond all where nobody is in it."""
        beyond = np.iinfo(np.int64).max
        if len(self._known) == 0:
            return np.full(len(cells), beyond)
        at = np.minimum(np.searchsorted(self._known, cells), len(self._known) - 1)
        return np.where(self._known[at] == cells, self._first[at], beyond)


def _hashed(*columns: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Mix the numbers of each pair into one: equal for equal ones, and for others once in 2**64 times."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        # The mixing of splitmix64 (doi 10.1145/2660193.2660195), which wraps around as meant.
        mixed = (mixed + column.astype(np.float64).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def part_means(pairs: PairColumns, num_parts: int) -> dict[str, npt.NDArray[Any]]:
    """Give `pairs` of each part, and means over them: [parts], NaN for a part without pairs.

    `margin` and `margin_per_token` in nats, `chosen_tokens`, `rejected_tokens`, `share_chosen_preferred` (a tie
    counts one half).
    """
    counts = np.bincount(pairs.parts, minlength=num_parts)
    whole = margins(pairs)
    columns = {
        "margin": whole,
        "margin_per_token": margins_per_token(pairs),
        "chosen_tokens": pairs.chosen_tokens,
        "rejected_tokens": pairs.rejected_tokens,
        "share_chosen_preferred": (whole > 0) + 0.5 * (whole == 0),
    }
    with np.errstate(invalid="ignore"):
        return {"pairs": counts} | {
            name: np.bincount(pairs.parts, weights=values, minlength=num_parts) / counts
            for name, values in columns.items()
        }
