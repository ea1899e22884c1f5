"""Charts of runs: curves over steps, histograms, points with error bars; thinned so that a page stays small.

Thinning keeps the extremes, and a smoothed curve is drawn over the raw one, never in its place.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.statistics import histogram
from pipeline.report.pages import COLORS, chart

__all__ = [
    "Line",
    "Point",
    "histogram_chart",
    "line_chart",
    "point_chart",
    "running_mean",
    "style_of",
    "thin",
]

_MOST_POINTS = 2000


_DASHES = ("solid", "dash", "dot", "dashdot")


_GRAY = COLORS[-1]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None is a gap."""
    color: str
    dash: str = "solid"
    smoothed: bool = False
    """Whether a running mean is drawn over it, where it has points enough for one."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point, each error None where it is not known."""

    name: str
    x: float
    y: float
    x_error: float | None
    y_error: float | None
    color: str


def style_of(number: int) -> tuple[str, str]:
    """Give the color and the dash of the nth of many curves."""
    colors = COLORS[:-1]
    return colors[number % len(colors)], _DASHES[number // len(colors) % len(_DASHES)]


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = _MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """Keep at most so many points of a curve: of each stretch its lowest and its highest, and both ends."""
    if len(x) <= most:
        return list(x), list(y)
    kept = {0, len(x) - 1}
    # Two points of each stretch, and perhaps a gap.
    edges = np.linspace(0, len(x), (most - 2) // 3 + 1).astype(int)
    values = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    for start, stop in pairwise(edges):
        stretch = values[start:stop]
        there = np.flatnonzero(~np.isnan(stretch))
        if len(there):
            kept |= {int(start + there[stretch[there].argmin()]), int(start + there[stretch[there].argmax()])}
        if len(there) < len(stretch):
            kept.add(int(start + np.flatnonzero(np.isnan(stretch))[0]))
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def running_mean(y: Sequence[float | None]) -> tuple[list[float | None], int]:
    """Average each point with its neighbours, as many on either side, fewer at the ends; also give how many at most."""
    half = len(y) // 40
    values = np.array([np.nan if value is None else value for value in y], dtype=np.float64)
    there = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    place = np.arange(len(y))
    # The same number on both sides, or the curve would lean where it rises.
    reach = np.minimum(np.minimum(place, place[::-1]), half)
    low, high = place - reach, place + reach + 1
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return [float(m) if n and t else None for m, n, t in zip(means, number, there, strict=True)], 2 * half + 1


_FEWEST_SMOOTHED = 80


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    y_title: str,
    x_title: str = "optimizer step",
    bounds: tuple[float, float] | None = None,
    level: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
) -> Markup:
    """Draw curves over the steps.

    Args:
        title: Above the chart.
        lines: Those without points are left out.
        y_title: With the unit.
        x_title: With the unit.
        bounds: Of the y axis; left out, it has zero in it and all of the curves.
        level: A value to compare with, and what it is, which is said under the chart: in it a curve may pass anywhere.
        marks: Steps at which something happened, as vertical lines.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for line in lines:
        if not line.x:
            continue
        smooth = line.smoothed and len(line.x) >= _FEWEST_SMOOTHED
        name = _text(line.name)
        x, y = thin(line.x, _rounded(line.y))
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            legendgroup=name,
            mode="lines+markers" if len(x) <= 60 else "lines",
            line={"color": line.color, "dash": line.dash, "width": 1 if smooth else 1.8},
            marker={"size": 4},
            opacity=0.4 if smooth else 1,
            showlegend=not smooth,
            hovertemplate="%{y:.5g}",
        )
        if smooth:
            means, width = running_mean(line.y)
            x, y = thin(line.x, _rounded(means))
            figure.add_scatter(
                x=x,
                y=y,
                name=name,
                legendgroup=name,
                mode="lines",
                line={"color": line.color, "dash": line.dash, "width": 2.2},
                hovertemplate=f"%{{y:.5g}} (mean of {width})",
            )
    shapes: list[dict[str, Any]] = [
        {"type": "line", "xref": "x", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, **_FAINT}
        for step in marks
    ]
    if level is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level[0], "y1": level[0], **_FAINT})
    _lay_out(figure, x_title, y_title, shapes=shapes, hovermode="x unified")
    if bounds is not None:
        figure.update_yaxes(range=bounds)
    else:
        figure.update_yaxes(rangemode="tozero")
    note = "" if level is None else f"Dotted across: {level[1]}."
    return chart(figure, title=title, label=f"{title}: {y_title} over {x_title}", note=note)


_FAINT = {"line": {"color": _GRAY, "width": 1, "dash": "dot"}, "layer": "below"}


def histogram_chart(
    title: str, columns: Sequence[tuple[str, npt.NDArray[Any], str, str]], *, x_title: str, of: str
) -> Markup:
    """Draw how values are spread, all columns in the same bins, and say how many values lie outside or are no numbers.

    Args:
        title: Above the chart.
        columns: Name, values, color and dash of each.
        x_title: With the unit.
        of: What the values are of, in the plural: pairs, replies.
    """
    import plotly.graph_objects as go

    finite = [values[np.isfinite(values)].astype(np.float64) for _, values, _, _ in columns]
    together = np.concatenate(finite)
    edges = histogram(together, int(np.clip(3 * len(together) ** (1 / 3), 10, _MOST_BINS))).edges
    figure = go.Figure()
    for (name, _, color, dash), values in zip(columns, finite, strict=True):
        shares = histogram(values, edges).counts / max(len(values), 1)
        figure.add_scatter(
            x=_rounded(edges.tolist()),
            y=_rounded([*shares.tolist(), float(shares[-1])]),
            name=_text(name),
            mode="lines",
            line={"color": color, "dash": dash, "width": 1.8, "shape": "hv"},
            fill="tozeroy" if len(columns) <= 2 else "none",
            fillcolor=_pale(color),
            hovertemplate="%{y:.2%}",
        )
    _lay_out(figure, x_title, f"share of {of}", hovermode="x unified")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(zeroline=True)
    whole, outside = histogram(together, edges), []
    if beyond := whole.below + whole.above:
        outside.append(f"{beyond:,} of {len(together):,} values lie beyond the bins")
    if broken := sum(len(values) for _, values, _, _ in columns) - len(together):
        outside.append(f"{broken:,} of {broken + len(together):,} are not numbers")
    return chart(figure, title=title, label=f"{title}: share of {of} by {x_title}", note="; ".join(outside))


_MOST_BINS = 50
"""As on the page of a store"""


def _pale(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def point_chart(title: str, points: Sequence[Point], *, x_title: str, y_title: str) -> Markup:
    """Draw points with their errors, each with its name beside it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    middle = max(point.x for point in points) / 2
    for point in points:
        figure.add_scatter(
            x=_rounded([point.x]),
            y=_rounded([point.y]),
            name=_text(point.name),
            mode="markers+text",
            text=[_text(point.name)],
            # Inward, where there is room on a narrow screen too.
            textposition="top left" if point.x > middle > 0 else "top right",
            cliponaxis=False,
            marker={"size": 9, "color": point.color},
            error_x=_error(point.x_error, point.color),
            error_y=_error(point.y_error, point.color),
            hovertemplate="%{x:.4g}, %{y:.4g}",
        )
    _lay_out(figure, x_title, y_title, hovermode="closest")
    figure.update_layout(showlegend=False, height=460)
    # Room for the errors and for the names, which the library does not leave.
    figure.update_xaxes(range=_padded([0.0, *(v for p in points for v in _ends(p.x, p.x_error))]), zeroline=True)
    figure.update_yaxes(range=_padded([v for p in points for v in _ends(p.y, p.y_error)]))
    return chart(figure, title=title, label=f"{title}: {y_title} over {x_title}")


def _ends(value: float, error: float | None) -> tuple[float, float]:
    return value - (error or 0.0), value + (error or 0.0)


def _padded(values: Sequence[float]) -> list[float | None]:
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.5
    return _rounded([low - room, high + room])


def _error(error: float | None, color: str) -> dict[str, Any]:
    if error is None:
        return {"visible": False}
    return {"type": "constant", "value": float(f"{error:.6g}"), "color": color, "thickness": 1.2, "width": 4}


def _lay_out(figure: Any, x_title: str, y_title: str, **layout: Any) -> None:
    names = {trace.name for trace in figure.data}
    figure.update_layout(
        height=320 + 22 * max(0, len(names) - 2),
        showlegend=len(names) > 1,
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
        **layout,
    )
    figure.update_xaxes(
        title={"text": _text(x_title)}, zeroline=False, spikethickness=1, spikecolor=_GRAY, spikedash="dot"
    )
    figure.update_yaxes(title={"text": _text(y_title)}, zeroline=True)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Six digits: more than a screen shows, and a smaller page."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _text(text: str) -> str:
    """Text as Plotly shows it as it stands: it takes some HTML for formatting."""
    return html.escape(printable(text), quote=False)
