"""Heatmaps of tokens: each token on a ground whose color stands for a number, in a terminal or on a page.

    [Cell, ...] + Scale -> lines for a terminal of 256 colors, or HTML

The colors of a page are transparent, so the text is readable on a light and on a dark ground.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import click
from markupsafe import Markup

from pipeline.base.tables import width_of

__all__ = ["Cell", "Scale", "legend", "of_differences", "of_logps", "on_page", "on_terminal"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One token to paint."""

    text: str
    """Printable text, without control characters"""
    value: float | None = None
    """Number that chooses the ground; None for a plain cell"""
    struck: bool = False
    """Crossed out"""
    ends_line: bool = False
    """A line break follows"""
    hint: str = ""
    """Tooltip on a page"""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Colors of numbers, from the lowest to the highest: one more than there are edges."""

    edges: tuple[float, ...]
    names: tuple[str, ...]
    """Name of each color, for the legend"""
    terminal: tuple[tuple[int, int], ...]
    """Ink and ground of each color, as numbers among 256"""
    page: tuple[str, ...]
    """Ground of each color, as CSS"""

    def step(self, value: float) -> int:
        return bisect.bisect_right(self.edges, value)


# NaN must not look like either end of a scale.
_NOT_FINITE_TERMINAL, _NOT_FINITE_PAGE = (231, 91), "rgba(150, 60, 200, .8)"


def of_logps() -> Scale:
    """Give the scale of log-probs, nats: a less likely token has a stronger color."""
    return Scale(
        edges=tuple(math.log(p) for p in (0.001, 0.01, 0.1, 0.5, 0.9)),
        names=("p < 0.1%", "< 1%", "< 10%", "< 50%", "< 90%", "p > 90%"),
        terminal=((231, 124), (231, 166), (16, 208), (16, 215), (16, 223), (16, 230)),
        page=tuple(f"rgba(222, 84, 20, {alpha})" for alpha in (0.8, 0.6, 0.42, 0.27, 0.15, 0.05)),
    )


def of_differences(values: Sequence[float]) -> Scale:
    """Give a scale of differences, nats, that is symmetric and reaches the largest of these values."""
    most = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    high = [0.1 * most, 0.3 * most, 0.6 * most]
    low = [-edge for edge in reversed(high)]
    strengths = (0.75, 0.45, 0.2)
    return Scale(
        edges=(*low, *high),
        names=(*(f"< {edge:.2g}" for edge in low), f"within {high[0]:.2g}", *(f"> {edge:+.2g}" for edge in high)),
        terminal=((231, 166), (16, 208), (16, 223), (16, 255), (16, 153), (16, 75), (231, 25)),
        page=(
            *(f"rgba(222, 84, 20, {alpha})" for alpha in strengths),
            "rgba(128, 128, 128, .08)",
            *(f"rgba(40, 120, 230, {alpha})" for alpha in reversed(strengths)),
        ),
    )


def legend(scale: Scale) -> list[Cell]:
    """Make a cell for each color of a scale."""
    values = [scale.edges[0] - 1, *((a + b) / 2 for a, b in pairwise(scale.edges)), scale.edges[-1] + 1]
    return [Cell(text=name, value=value) for name, value in zip(scale.names, values, strict=True)]


def on_terminal(cells: Sequence[Cell], scale: Scale, width: int) -> list[str]:
    """Paint cells for a terminal, in lines of at most `width` columns. Wider cells are cut."""
    lines, line, used = [], "", 0
    for cell in cells:
        for piece in _pieces(cell.text, width):
            size = width_of(piece)
            if used and used + 1 + size > width:
                lines.append(line)
                line, used = "", 0
            line += (" " if used else "") + _painted(piece, cell, scale)
            used += size + (1 if used else 0)
        if cell.ends_line:
            lines.append(line)
            line, used = "", 0
    return [*lines, line] if line else lines


def on_page(cells: Sequence[Cell], scale: Scale) -> Markup:
    """Paint cells for a page."""
    spans = []
    for cell in cells:
        style, kind = "", " struck" if cell.struck else " plain" if cell.value is None else ""
        if cell.value is not None:
            ground = scale.page[scale.step(cell.value)] if math.isfinite(cell.value) else _NOT_FINITE_PAGE
            style = Markup(' style="background: {}"').format(ground)
        span = Markup('<span class="token{}"{} title="{}">{}</span>').format(kind, style, cell.hint, cell.text)
        # The browser must, or may, break the line here.
        spans.append(span + Markup("<br>" if cell.ends_line else "<wbr>"))
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(spans))


def _painted(text: str, cell: Cell, scale: Scale) -> str:
    if cell.value is None:
        return click.style(text, dim=True, strikethrough=cell.struck or None)
    ink, ground = scale.terminal[scale.step(cell.value)] if math.isfinite(cell.value) else _NOT_FINITE_TERMINAL
    return click.style(text, fg=ink, bg=ground)


def _pieces(text: str, width: int) -> Iterator[str]:
    piece = ""
    for c in text:
        if piece and width_of(piece + c) > width:
            yield piece
            piece = ""
        piece += c
    if piece:
        yield piece
