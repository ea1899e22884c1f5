"""Rank a store's pairs by the reference's own margins, and find the pairs that look wrong.

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
"""Rounding of float32 between two scorings of equal pairs, nats a token"""


@dataclass(frozen=True, kw_only=True)
class PairColumns:
    """Columns of P pairs, in the store's order."""

    keys: npt.NDArray[np.bytes_]
    """Keys, [P] strings of 16 bytes"""
    rows: Integers
    """Positions in the dataset, [P]"""
    parts: Integers
    """Numbers of the parts that hold the pairs, [P]"""
    prompt_tokens: Integers
    chosen_tokens: Integers
    """Token counts, [P], at least 1"""
    rejected_tokens: Integers
    chosen_logps: Floats
    """Sums of token log-probs, [P] nats, finite"""
    rejected_logps: Floats

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """Pairs that look like another one with chosen and rejected swapped."""

    indexes: Integers
    """Both pairs of each match, the earlier first, [S, 2], ascending; a later pair is in one match at most"""
    same_order: int
    """Pairs of another key that coincide with an earlier one without a swap: by chance, or because the texts differ
    only after max_length"""
    tolerance: float
    """Largest difference of the sums, nats a token"""


def margins(pairs: PairColumns) -> Floats:
    """Give log p(chosen) - log p(rejected) under the reference, [P] nats."""
    return pairs.chosen_logps - pairs.rejected_logps


def margins_per_token(pairs: PairColumns) -> Floats:
    """Give the difference of the completions' mean token logps, chosen less rejected, [P] nats a token."""
    return pairs.chosen_logps / pairs.chosen_tokens - pairs.rejected_logps / pairs.rejected_tokens


def length_differences(pairs: PairColumns) -> Integers:
    """Give the chosen completion's tokens less the rejected one's, [P]."""
    return pairs.chosen_tokens - pairs.rejected_tokens


def longer_sides(pairs: PairColumns) -> dict[str, dict[str, Any]]:
    """Give the reference's preferences by which completion is longer: `chosen`, `rejected`, or `neither`.

    Each has `pairs`, `share_chosen_preferred`, and `share_chosen_preferred_per_token`; shares of no pairs are None.
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
    """Give for each pair the index of the first pair with its key, [P]: its own, unless it is a duplicate."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def same_on_both_sides(pairs: PairColumns) -> Integers:
    """Give the indexes of pairs with equal completions as scored: equal token counts, and sums equal to the bit.

    Equal completions of a prompt are scored once, so their sums are exactly equal.
    """
    same = (pairs.chosen_tokens == pairs.rejected_tokens) & (pairs.chosen_logps == pairs.rejected_logps)
    return np.flatnonzero(same)


def worst(pairs: PairColumns, most: int) -> Integers:
    """Give the indexes of the pairs with the most negative margins per token, the most negative first.

    The summed margin must be negative too: where the two disagree, the lengths alone may be the cause.
    """
    values = margins_per_token(pairs)
    negative = np.flatnonzero((values < 0) & (margins(pairs) < 0))
    return negative[np.argsort(values[negative], kind="stable")][:most]


def likely_swapped(pairs: PairColumns, first: Integers, noise: float) -> Swaps:
    """Find pairs that are likely another pair with chosen and rejected swapped.

    The key covers all three texts in order, so it differs. The same prompt and completions have the same three lengths
    and, up to noise, the same two sums. `noise` is the mean difference of token logps that were scored twice, nats a
    token. `first` is the result of `first_of_each`: later duplicates are left out.
    """
    tolerance = max(float(noise), _LEAST_NOISE)
    here = np.arange(len(pairs))
    lengths = np.stack([pairs.chosen_tokens, pairs.rejected_tokens])
    sums = np.stack([pairs.chosen_logps, pairs.rejected_logps])
    # The shorter completion first; of equally long ones, the less likely.
    changed = (lengths[0] > lengths[1]) | ((lengths[0] == lengths[1]) & (sums[0] > sums[1]))
    order = np.stack([changed, ~changed]).astype(np.int64)
    lengths, sums = lengths[order, here], sums[order, here]
    # Nearly equal completions have no order.
    ordered = (lengths[0] != lengths[1]) | (sums[1] - sums[0] > 2 * tolerance * lengths[0])
    kept = np.flatnonzero((first == here) & ordered)
    # Hardly any pairs have their lengths in common.
    of_lengths = _hashed(pairs.prompt_tokens[kept], *lengths[:, kept])
    _, inverse, counts = np.unique(of_lengths, return_inverse=True, return_counts=True)
    kept = kept[counts[inverse] > 1]
    fixed = (pairs.prompt_tokens[kept], *lengths[:, kept])
    steps = sums[:, kept] / (2 * tolerance * lengths[:, kept])
    partner = np.full(len(pairs), -1, dtype=np.int64)
    coincides = np.zeros(len(pairs), dtype=bool)
    # Two sums at most a tolerance apart share a cell of twice that width, or one of those shifted by half of it.
    for shift in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5)):
        cells = (*fixed, *np.floor(steps + np.array(shift)[:, None]))
        same, swapped = _hashed(*cells, changed[kept]), _hashed(*cells, ~changed[kept])
        coincides[kept[_earliest(same, kept, same) < kept]] = True
        found = _earliest(same, kept, swapped)
        match = found < kept
        partner[kept[match]] = found[match]
    later = np.flatnonzero(partner >= 0)
    return Swaps(
        indexes=np.stack([partner[later], later], axis=1), same_order=int(coincides.sum()), tolerance=tolerance
    )


def _earliest(cells: npt.NDArray[np.uint64], indexes: Integers, wanted: npt.NDArray[np.uint64]) -> Integers:
    """Give the least index in each wanted cell; one beyond all others where the cell is empty."""
    if len(cells) == 0:
        return np.empty(0, np.int64)
    known, at = np.unique(cells, return_index=True)
    near = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[near] == wanted, indexes[at[near]], np.iinfo(np.int64).max)


def _hashed(*columns: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Hash the numbers of each pair, [P]; different numbers collide once in 2**64 times."""
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        # The mixing of splitmix64 (doi 10.1145/2660193.2660195); it is meant to wrap around.
        mixed = (mixed + column.astype(np.float64).view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def part_means(pairs: PairColumns, num_parts: int) -> dict[str, npt.NDArray[Any]]:
    """Give means over the pairs of each part, [parts], NaN for a part without pairs.

    The means: `margin_per_token` in nats, `chosen_tokens`, and `rejected_tokens`.
    """
    columns = {
        "margin_per_token": margins_per_token(pairs),
        "chosen_tokens": pairs.chosen_tokens,
        "rejected_tokens": pairs.rejected_tokens,
    }
    counts = np.bincount(pairs.parts, minlength=num_parts)
    with np.errstate(invalid="ignore"):
        return {name: np.bincount(pairs.parts, values, num_parts) / counts for name, values in columns.items()}
