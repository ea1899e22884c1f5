"""How a reference ranks its pairs: every figure against one made by hand, and searches against looking at all pairs."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from pipeline.base.statistics import share_positive
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
    assert means["margin_per_token"][:2].tolist() == [0.25, -3.75]
    assert means["chosen_tokens"][:2].tolist() == [3.0, 2.0]
    assert all(np.isnan(values[2]) for values in means.values())
