"""Read the numbers that the loss takes besides the pair: a row's weight and its margin."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.base.errors import BadRow, printable
from pipeline.config.columns import LOSS_COLUMNS
from pipeline.data.layouts import in_row, is_in_row

__all__ = ["numbers_of_loss"]

_TOO_LARGE = 3e38
"""About the largest float32"""


def numbers_of_loss(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> dict[str, float]:
    """Read the weight and the margin of a row, as far as `columns` names them. Raises BadRow if one is no number."""
    numbers = {}
    for name in LOSS_COLUMNS:
        if name not in columns:
            continue
        column = columns[name]
        if not is_in_row(row, column):
            raise BadRow("missing_column", f"{place}: no column {column!r} for data.columns.{name}")
        value: Any = in_row(row, column)
        # NaN compares as False.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
        if not is_number or (name == "weight" and value < 0):
            rule = "a finite number from 0" if name == "weight" else "a finite number"
            raise BadRow(f"bad_{name}", f"{place}: {column} must be {rule}, got {printable(repr(value))[:80]}")
        # As the joined sets hold it, so that a weight too small for them counts as 0 from the start.
        numbers[name] = float(np.float32(value))
    return numbers
