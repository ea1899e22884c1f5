"""A mean is shown with the digits that its standard error allows."""

import math

import pytest

from pipeline.replies.means import Mean, estimate


def test_the_standard_error_is_that_of_the_mean() -> None:
    # Variance 5/3 of four values.
    assert estimate([1.0, 2.0, 3.0, 4.0]) == Mean(2.5, pytest.approx(math.sqrt(5 / 3 / 4)), 4)  # type: ignore[arg-type]
    assert estimate([0.5]) == Mean(0.5, None, 1)


@pytest.mark.parametrize(
    ("mean", "error", "shown"),
    [
        (-14.6712, 1.3149, "-14.7 ± 1.3"),
        (0.42512, 0.00372, "0.4251 ± 0.0037"),
        (1234.5, 260.0, "1230 ± 260"),
        (-0.0001, 0.13, "0.00 ± 0.13"),
        (0.42512, None, "0.4251"),
        (0.42512, 0.0, "0.4251 ± 0"),
        (math.nan, math.nan, "nan ± nan"),
    ],
)
def test_digits_that_the_error_does_not_allow_are_not_shown(mean: float, error: float | None, shown: str) -> None:
    assert str(Mean(mean, error, 9)) == shown
