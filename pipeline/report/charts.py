"""Charts: curves over steps, histograms, and points with error bars.

Long curves are thinned, so that a page stays small; thinning keeps the extremes. A smoothed curve is drawn over the
raw one, never instead of it.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base.errors import printable
from pipeline.base.statistics import histogram
from pipeline.replies.means import Mean
from pipeline.report.pages import COLORS, GRAY, chart
from pipeline.run.reading import Curve

__all__ = ["Line", "Point", "histogram_chart", "line_chart", "point_chart", "running_mean", "style_of", "thin"]

_MOST_POINTS, _MOST_MARKERS, _FEWEST_SMOOTHED, _MOST_BINS = 2000, 60, 80, 50
_POINT_CHART, _LINE_HEIGHT = 460, 16
"""Height of a chart of points, and of a line of text, pixels"""
_DASHES = ("solid", "dash", "dot", "dashdot")
_FAINT = {"line": {"color": GRAY, "width": 1, "dash": "dot"}, "layer": "below"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    curve: Curve
    color: str
    dash: str = "solid"
    smoothed: bool = False
    """Draw a running mean over the curve, if it has enough points"""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point with its standard errors."""

    name: str
    x: Mean
    y: Mean
    color: str


def style_of(number: int) -> tuple[str, str]:
    """Give the color and the dash of the nth of many curves."""
    return COLORS[number % len(COLORS)], _DASHES[number // len(COLORS) % len(_DASHES)]


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = _MOST_POINTS
) -> tuple[list[float], list[float | None]]:
    """Keep at most so many points of a curve: both ends, and the lowest and the highest of each stretch."""
    if len(x) <= most:
        return list(x), list(y)
    kept = {0, len(x) - 1}
    values = _with_nan(y)
    # A stretch keeps two points, and perhaps a gap.
    for stretch in np.array_split(np.arange(len(x)), (most - 2) // 3):
        gaps = np.isnan(values[stretch])
        if present := stretch[~gaps].tolist():
            kept |= {pick(present, key=values.__getitem__) for pick in (min, max)}
        kept.update(stretch[gaps][:1].tolist())
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def running_mean(y: Sequence[float | None]) -> tuple[list[float | None], int]:
    """Average each point with its neighbours, the same number on both sides. Also give the largest window."""
    half = len(y) // 40
    values = _with_nan(y)
    present = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    place = np.arange(len(y))
    # A window with more points on one side would bend the curve where it rises.
    reach = np.minimum(np.minimum(place, place[::-1]), half)
    low, high = place - reach, place + reach + 1
    number = counts[high] - counts[low]
    means = (sums[high] - sums[low]) / np.maximum(number, 1)
    return [float(m) if n and p else None for m, n, p in zip(means, number, present, strict=True)], 2 * half + 1


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
    """Draw curves with points. `bounds` are the ends of the y axis; None shows zero and all of the curves.

    `level` is a value to compare with, and its name, which is printed under the chart and not across the curves.
    `marks` are places on the x axis, drawn as vertical lines.
    """
    figure = _new_figure()
    for line in lines:
        if line.curve.steps:
            _add_line(figure, line)
    shapes = [{"type": "line", "xref": "x", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1} for x in marks]
    if level is not None:
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level[0], "y1": level[0]})
    _lay_out(figure, x_title, y_title, shapes=[{**shape, **_FAINT} for shape in shapes], hovermode="x unified")
    figure.update_yaxes(**({"rangemode": "tozero"} if bounds is None else {"range": bounds}))
    note = "" if level is None else f"Dotted horizontal line: {level[1]}."
    return chart(figure, title=title, label=f"{title}: {y_title} over {x_title}", note=note)


def _new_figure() -> Any:
    import plotly.graph_objects as go

    return go.Figure()


def _add_line(figure: Any, line: Line) -> None:
    steps, raw = line.curve.steps, line.curve.values

    def add(values: Sequence[float | None], width: float, hint: str = "", **how: Any) -> None:
        x, y = thin(steps, _rounded(values))
        stroke = {"color": line.color, "dash": line.dash, "width": width}
        name, hint = _text(line.name), f"%{{y:.5g}}{hint}"
        figure.add_scatter(x=x, y=y, name=name, legendgroup=name, line=stroke, hovertemplate=hint, **how)

    if line.smoothed and len(steps) >= _FEWEST_SMOOTHED:
        add(raw, 1, mode="lines", opacity=0.4, showlegend=False)
        means, window = running_mean(raw)
        add(means, 2.2, f" (mean of {window})", mode="lines")
    else:
        add(raw, 1.8, mode="lines+markers" if len(steps) <= _MOST_MARKERS else "lines", marker={"size": 4})


def histogram_chart(
    title: str, columns: Sequence[tuple[str, npt.NDArray[Any], str, str]], *, x_title: str, of: str
) -> Markup:
    """Draw the distributions of columns in the same bins, and count values that are outside or not finite.

    A column is a name, values, a color and a dash. `of` names what has a value, in the plural: pairs, replies.
    """
    finite = [values[np.isfinite(values)] for _, values, _, _ in columns]
    pooled = np.concatenate(finite)
    edges = histogram(pooled, int(np.clip(3 * len(pooled) ** (1 / 3), 10, _MOST_BINS))).edges
    figure = _new_figure()
    for (name, _, color, dash), values in zip(columns, finite, strict=True):
        shares = histogram(values, edges).counts / max(len(values), 1)
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_scatter(
            x=_rounded(edges.tolist()),
            y=_rounded([*shares.tolist(), float(shares[-1])]),
            name=_text(name),
            mode="lines",
            line={"color": color, "dash": dash, "width": 1.8, "shape": "hv"},
            fill="tozeroy" if len(columns) <= 2 else "none",
            fillcolor=f"rgba({red},{green},{blue},0.18)",
            hovertemplate="%{y:.2%}",
        )
    _lay_out(figure, x_title, f"share of {of}", hovermode="x unified")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_xaxes(zeroline=True)
    counted, notes = histogram(pooled, edges), []
    if outside := counted.below + counted.above:
        notes.append(f"Outside the chart: {outside:,} of {len(pooled):,} values")
    if broken := sum(len(values) for _, values, _, _ in columns) - len(pooled):
        notes.append(f"Not finite: {broken:,} of {broken + len(pooled):,} values")
    return chart(figure, title=title, label=f"{title}: share of {of} by {x_title}", note=". ".join(notes))


def point_chart(title: str, points: Sequence[Point], *, x_title: str, y_title: str) -> Markup:
    """Draw points with their errors, each with its name beside it."""
    figure = _new_figure()
    middle = max(point.x.mean for point in points) / 2
    low, high = _ends([point.y for point in points])
    labels = _label_shifts(points, low, high)
    for point, shift in zip(points, labels, strict=True):
        # Names point inward, where a narrow screen has room too.
        inward = "right" if point.x.mean > middle > 0 else "left"
        figure.add_annotation(
            x=point.x.mean,
            y=point.y.mean,
            text=_text(point.name),
            showarrow=False,
            xanchor=inward,
            yshift=shift,
            xshift=-6 if inward == "right" else 6,
            font={"color": point.color},
        )
        figure.add_scatter(
            x=_rounded([point.x.mean]),
            y=_rounded([point.y.mean]),
            name=_text(point.name),
            mode="markers",
            cliponaxis=False,
            marker={"size": 9, "color": point.color},
            error_x=_error(point.x, point.color),
            error_y=_error(point.y, point.color),
            hovertemplate="%{x:.4g}, %{y:.4g}",
        )
    _lay_out(figure, x_title, y_title, hovermode="closest")
    figure.update_layout(showlegend=False, height=_POINT_CHART)
    figure.update_yaxes(range=(low, high))
    figure.update_xaxes(autorangeoptions={"include": 0}, zeroline=True)
    return chart(figure, title=title, label=f"{title}: {y_title} over {x_title}")


def _ends(values: Sequence[Mean]) -> tuple[float, float]:
    """Give the ends of an axis with room for all means, their errors and a name above the highest."""
    low = min(value.mean - (value.error or 0.0) for value in values)
    high = max(value.mean + (value.error or 0.0) for value in values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + 2 * room


def _label_shifts(points: Sequence[Point], low: float, high: float) -> list[float]:
    """Give how far above its point each name stands, in pixels: on no other name, and on no other point's error bar."""
    x_span = max(point.x.mean for point in points) - min(0.0, *(point.x.mean for point in points)) or 1.0
    placed: list[tuple[float, float]] = []
    shifts = dict.fromkeys(range(len(points)), 0.0)
    heights = [(point.y.mean - low) / (high - low) * (_POINT_CHART - 80) for point in points]
    for i in sorted(shifts, key=lambda i: points[i].y.mean):
        x, height = points[i].x.mean / x_span, heights[i]
        # Names of points in one half of a narrow chart may reach each other.
        near = [other for at, other in placed if abs(at - x) < 0.5]
        bars = [
            at
            for at, other in zip(heights, points, strict=True)
            if abs(other.x.mean / x_span - x) < 0.5 + (other.x.error or 0.0) / x_span
        ]
        shift = 12.0
        while any(abs(height + shift - other) < _LINE_HEIGHT for other in near) or any(
            abs(height + shift - bar) < _LINE_HEIGHT / 2 for bar in bars
        ):
            shift += 1.0
        placed.append((x, height + shift))
        shifts[i] = shift
    return list(shifts.values())


def _error(value: Mean, color: str) -> dict[str, Any]:
    if value.error is None:
        return {"visible": False}
    return {"type": "constant", "value": float(f"{value.error:.6g}"), "color": color, "thickness": 1.2, "width": 4}


def _lay_out(figure: Any, x_title: str, y_title: str, **layout: Any) -> None:
    names = {trace.name for trace in figure.data}
    figure.update_layout(
        height=320 + 22 * max(0, len(names) - 2),
        showlegend=len(names) > 1,
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
        **layout,
    )
    spikes = {"spikethickness": 1, "spikecolor": GRAY, "spikedash": "dot"}
    # Room below the axis, without which the first labels of both axes lie on each other.
    room = {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    figure.update_xaxes(title={"text": _text(x_title)}, zeroline=False, **spikes, **room)
    figure.update_yaxes(title={"text": _text(y_title)}, zeroline=True)


def _with_nan(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    """Round to six digits: more than a screen shows, and a smaller page."""
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _text(text: str) -> str:
    """Escape text for Plotly, which reads some HTML as formatting."""
    return html.escape(printable(text), quote=False)
