"""Figures of columns: each against one made by hand."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.base.statistics import correlation, grid, histogram, percentiles, share_positive


def test_percentiles_and_shares_of_a_column() -> None:
    assert share_positive(np.array([2.0, -1.0, 0.0, -7.0])) == (1 + 0.5) / 4
    assert share_positive(np.empty(0)) is None
    assert percentiles(np.empty(0)) == {}
    assert percentiles(np.arange(101)) == {"p5": 5.0, "p25": 25.0, "p50": 50.0, "p75": 75.0, "p95": 95.0}


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
