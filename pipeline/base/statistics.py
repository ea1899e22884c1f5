"""Histograms, percentiles and shares of numpy columns."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Grid", "Histogram", "correlation", "grid", "histogram", "percentiles", "share_positive"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

PERCENTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of values in bins of one width."""

    edges: Floats
    """[B + 1] multiples of the width; a value on an edge counts in the bin above it"""
    counts: Integers
    """[B]"""
    below: int
    above: int
    """Values over the last edge, as `below` the first one"""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Counts of points in a grid of cells."""

    across: Floats
    """[C + 1] edges"""
    up: Floats
    """[R + 1] edges"""
    counts: Integers
    """[R, C]"""
    outside: int
    """Points that are in no cell"""


def percentiles(values: npt.NDArray[Any]) -> dict[str, float]:
    """Give the percentiles that are shown, by name; none of no values."""
    if len(values) == 0:
        return {}
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def share_positive(values: npt.NDArray[Any]) -> float | None:
    """Give the share of values above 0; a tie counts one half. None of no values."""
    return float((values > 0).mean() + 0.5 * (values == 0).mean()) if len(values) else None


def correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float | None:
    """Give Pearson's correlation; None where one of them does not vary."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def histogram(values: npt.NDArray[Any], bins: int | Floats) -> Histogram:
    """Count finite values in bins of a round width, about `bins` of them over all but the outermost percent.

    There are up to twice as few bins and one more at either end. `bins` may also be the edges.
    """
    edges = _edges(values, bins) if isinstance(bins, int) else bins
    counts, _ = np.histogram(values, edges)
    return Histogram(
        edges=edges,
        counts=counts.astype(np.int64),
        below=int((values < edges[0]).sum()),
        above=int((values > edges[-1]).sum()),
    )


def grid(x: npt.NDArray[Any], y: npt.NDArray[Any], bins: int) -> Grid:
    """Count points (x, y) in a grid of about `bins` by `bins` cells, each way as `histogram` has them."""
    across, up = _edges(x, bins), _edges(y, bins)
    counts, _, _ = np.histogram2d(y, x, (up, across))
    return Grid(across=across, up=up, counts=counts.astype(np.int64), outside=len(x) - int(counts.sum()))


def _edges(values: npt.NDArray[Any], bins: int) -> Floats:
    """Multiples of 1, 2 or 5 times a power of ten: 0 is an edge wherever it is in reach."""
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5))) if len(values) else (0.0, 0.0)
    least = (high - low) / bins
    # Of values that are all alike, or apart by rounding only, one bin is enough.
    if least <= 1e-9 * max(abs(low), abs(high)):
        least = max(abs(low), 1.0) / bins
    if np.issubdtype(values.dtype, np.integer):
        # Finer bins of whole numbers would be empty by turns.
        least = max(least, 1.0)
    power = 10.0 ** float(np.floor(np.log10(least)))
    width = next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))
    first = int(np.floor(low / width))
    last = max(int(np.ceil(high / width)), first + 1)
    edges: Floats = np.arange(first, last + 1, dtype=np.float64) * width
    return edges
