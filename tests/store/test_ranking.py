"""How a reference ranks its pairs: every figure against one made by hand, and searches against looking at all pairs."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.base.statistics import correlation, grid, histogram, percentiles, share_positive
from pipeline.store.ranking import (
    PairColumns,
    first_of_each,
    likely_swapped,
    longer_sides,
    margins,
    margins_per_token,
    part_means,
    same_on_both_sides,
    worst,
)


def columns(pairs: list[tuple[int, int, int, float, float]], **changes: Any) -> PairColumns:
    """Pairs of prompt, chosen, rejected tokens and the two sums; all keys differ."""
    prompt, chosen, rejected, chosen_logps, rejected_logps = (np.array(c) for c in zip(*pairs, strict=True))
    made = PairColumns(
        keys=np.array([b"%016d" % i for i in range(len(pairs))], dtype="S16"),
        rows=np.arange(len(pairs)) + 100,
        parts=np.arange(len(pairs)) // 2,
        prompt_tokens=prompt,
        chosen_tokens=chosen,
        rejected_tokens=rejected,
        chosen_logps=chosen_logps.astype(np.float64),
        rejected_logps=rejected_logps.astype(np.float64),
    )
    return dataclasses.replace(made, **changes)


def found(pairs: PairColumns, noise: float = 0.0) -> list[list[int]]:
    return likely_swapped(pairs, first_of_each(pairs.keys), noise).indexes.tolist()


HAND = columns([(5, 2, 4, -4.0, -6.0), (5, 4, 2, -6.0, -5.0), (5, 3, 3, -1.5, -1.5), (5, 1, 2, -8.0, -1.0)])


def test_margins_are_differences_of_sums_and_of_means() -> None:
    assert margins(HAND).tolist() == [2.0, -1.0, 0.0, -7.0]
    assert margins_per_token(HAND).tolist() == [-0.5, 1.0, 0.0, -7.5]


def test_a_tie_is_half_a_preference() -> None:
    assert share_positive(margins(HAND)) == (1 + 0.5) / 4
    assert share_positive(np.empty(0)) is None
    assert percentiles(np.empty(0)) == {}
    assert percentiles(np.arange(101)) == {"p5": 5.0, "p25": 25.0, "p50": 50.0, "p75": 75.0, "p95": 95.0}


def test_preferences_are_counted_by_which_side_is_longer() -> None:
    sides = longer_sides(HAND)
    assert sides["chosen"] == {
        "pairs": 1,
        "share_chosen_preferred": 0.0,
        "share_chosen_preferred_per_token": 1.0,
    }
    assert sides["rejected"]["pairs"] == 2
    assert sides["rejected"]["share_chosen_preferred"] == 0.5
    assert sides["rejected"]["share_chosen_preferred_per_token"] == 0.0
    assert sides["neither"] == {
        "pairs": 1,
        "share_chosen_preferred": 0.5,
        "share_chosen_preferred_per_token": 0.5,
    }


def test_correlation_is_pearsons_and_none_without_variation() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): 1 over the roots of 42/9 and 2.
    assert correlation(x, y) == pytest.approx(1 / (42 / 9 * 2) ** 0.5)
    assert correlation(x, np.ones(3)) is None
    assert correlation(x[:1], y[:1]) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 37.0])
@pytest.mark.parametrize("whole", [False, True])
def test_a_histogram_counts_every_value_once_and_has_an_edge_at_zero(scale: float, whole: bool) -> None:
    values: Any = np.random.default_rng(0).standard_t(2, 3000) * scale
    if whole:
        values = np.round(values).astype(np.int64)
    made = histogram(values, 20)
    width = made.edges[1] - made.edges[0]
    assert 0.0 in made.edges
    assert not whole or width >= 1
    digits = f"{width:.9e}"
    assert digits[0] in "125"
    assert float(digits.split("e")[0]) == pytest.approx(int(digits[0]))
    by_hand = Counter(
        min(int(np.searchsorted(made.edges, v, side="right")) - 1, len(made.counts) - 1)
        for v in values
        if made.edges[0] <= v <= made.edges[-1]
    )
    assert made.counts.tolist() == [by_hand[i] for i in range(len(made.counts))]
    assert made.counts.sum() + made.below + made.above == 3000
    assert made.below + made.above < 40
    assert whole or 10 <= len(made.counts) <= 22


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [3.25], [-1e9, -1e9], [5, 5, 5]])
def test_values_that_do_not_vary_are_in_one_bin(values: list[float]) -> None:
    made = histogram(np.array(values), 16)
    assert made.counts.tolist() == [len(values)]
    assert not values or made.edges[0] <= values[0] <= made.edges[1]


def test_a_grid_counts_points_by_cell() -> None:
    random = np.random.default_rng(1)
    x, y = random.integers(-9, 10, 500), random.normal(0, 3, 500)
    made = grid(x, y, 10)
    for row in range(len(made.up) - 1):
        for column in range(len(made.across) - 1):
            last = column == len(made.across) - 2
            right = (x <= made.across[-1]) if last else (x < made.across[column + 1])
            inside = (x >= made.across[column]) & right & (y >= made.up[row]) & (y < made.up[row + 1])
            assert made.counts[row, column] == inside.sum()
    assert made.outside == 500 - made.counts.sum()


def test_the_first_of_each_key_is_found_though_halves_of_keys_agree() -> None:
    random = np.random.default_rng(2)
    # Halves of few kinds: many keys share their first half, and not their second.
    halves = random.integers(0, 12, (400, 2))
    keys = np.array([b"%08d%08d" % (a, b) for a, b in halves], dtype="S16")
    first: dict[bytes, int] = {}
    expected = [first.setdefault(bytes(key), i) for i, key in enumerate(keys)]
    assert first_of_each(keys).tolist() == expected
    assert len(set(expected)) < 145
    assert first_of_each(keys[:0]).tolist() == []


def test_equal_sides_are_those_equal_to_the_bit() -> None:
    pairs = columns([(5, 3, 3, -1.5, -1.5), (5, 3, 3, -1.5, -1.5000001), (5, 3, 4, -1.5, -1.5)])
    assert same_on_both_sides(pairs).tolist() == [0]


def test_the_worst_are_the_most_negative_per_token_and_never_positive_in_sum() -> None:
    # The first is negative per token alone.
    assert worst(HAND, 20).tolist() == [3]
    random = np.random.default_rng(3)
    pairs = columns([(5, *random.integers(1, 5, 2), *random.integers(-9, 0, 2)) for _ in range(300)])
    values = margins_per_token(pairs)
    by_hand = sorted((i for i in range(300) if values[i] < 0 and margins(pairs)[i] < 0), key=lambda i: (values[i], i))
    for most in (1, 7, 50):
        assert worst(pairs, most).tolist() == by_hand[:most]


def test_a_pair_with_its_sides_changed_over_is_found_and_one_that_is_not_is_not() -> None:
    pair = (7, 12, 20, -33.0, -41.5)
    swapped, other_prompt, other_sum = (7, 20, 12, -41.5, -33.0), (8, 20, 12, -41.5, -33.0), (7, 20, 12, -41.6, -33.0)
    assert found(columns([pair, swapped])) == [[0, 1]]
    assert found(columns([swapped, other_prompt, pair])) == [[0, 2]]
    assert found(columns([pair, other_prompt, other_sum, pair])) == []
    # Equal lengths: the sums alone tell which is which.
    assert found(columns([(7, 12, 12, -33.0, -41.5), (7, 12, 12, -41.5, -33.0)])) == [[0, 1]]
    # Completions that are the same have no sides to change.
    assert found(columns([(7, 12, 12, -33.0, -33.0), (7, 12, 12, -33.0, -33.0)])) == []


def test_sums_may_differ_by_the_noise_of_their_tokens() -> None:
    apart = columns([(7, 12, 20, -33.0, -41.5), (7, 20, 12, -41.5 - 0.15, -33.0 + 0.1)])
    assert found(apart) == []
    assert found(apart, noise=0.01) == [[0, 1]]
    assert found(apart, noise=0.001) == []
    # A noise that cannot be: everything is as good as equal.
    assert found(apart, noise=10**30) == [[0, 1]]


def test_duplicates_are_looked_at_once_and_chance_is_counted() -> None:
    pair, swapped = (7, 12, 20, -33.0, -41.5), (7, 20, 12, -41.5, -33.0)
    pairs = columns([pair, pair, swapped, swapped])
    keys = np.array([b"a", b"a", b"b", b"b"], dtype="S16")
    swaps = likely_swapped(dataclasses.replace(pairs, keys=keys), first_of_each(keys), 0.0)
    assert (swaps.indexes.tolist(), swaps.same_order) == ([[0, 2]], 0)
    swaps = likely_swapped(pairs, np.arange(4), 0.0)
    assert (swaps.indexes.tolist(), swaps.same_order) == ([[0, 2], [0, 3]], 2)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_swaps_are_those_that_a_look_at_all_pairs_finds(noise: float) -> None:
    random = np.random.default_rng(4)
    made = [
        (int(p), int(c), int(r), -float(a), -float(b))
        for p, c, r, a, b in zip(
            random.integers(1, 3, 400),
            *random.integers(1, 4, (2, 400)),
            *random.integers(1, 40, (2, 400)) / 50,
            strict=True,
        )
    ]
    pairs = columns(made)
    swaps = likely_swapped(pairs, np.arange(400), noise)
    tolerance = swaps.tolerance

    def apart(i: int, j: int) -> float:
        """How far the crossed sums are apart, in tolerances; infinite where lengths differ."""
        a, b = made[i], made[j]
        if (a[0], a[1], a[2]) != (b[0], b[2], b[1]):
            return np.inf
        return max(abs(a[3] - b[4]) / a[1], abs(a[4] - b[3]) / a[2]) / tolerance

    def ordered(i: int) -> bool:
        return made[i][1] != made[i][2] or abs(made[i][3] - made[i][4]) > 4 * tolerance * made[i][1]

    certain = {j for j in range(400) if ordered(j) for i in range(j) if ordered(i) and apart(i, j) <= 1 - 1e-6}
    matched = {j: i for i, j in swaps.indexes.tolist()}
    assert len(certain) >= (2 if noise == 0 else 10)
    assert certain <= matched.keys()
    assert all(i < j and apart(i, j) <= 2 + 1e-6 for j, i in matched.items())


def test_means_are_taken_part_by_part() -> None:
    means = part_means(HAND, 3)
    assert means["pairs"].tolist() == [2, 2, 0]
    assert means["margin"][:2].tolist() == [0.5, -3.5]
    assert means["margin_per_token"][:2].tolist() == [0.25, -3.75]
    assert means["share_chosen_preferred"][:2].tolist() == [0.5, 0.25]
    assert means["chosen_tokens"][:2].tolist() == [3.0, 2.0]
    assert all(np.isnan(values[2]) for name, values in means.items() if name != "pairs")
