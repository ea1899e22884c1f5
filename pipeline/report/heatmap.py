"""Tokens on coloured ground, by a number that each has: for a terminal of 256 colours, and for a page.

    [Cell, ...] + Scale -> lines of a terminal, with a blank between tokens
                        -> spans of HTML

The colours of a page are see-through, so that its own ink stays readable on them, on light paper and on dark.
"""

import bisect
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import click
from markupsafe import Markup

__all__ = [
    "Cell",
    "Scale",
    "legend",
    "of_differences",
    "of_logps",
    "on_page",
    "on_terminal",
    "width_of",
]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One token to paint."""

    text: str
    """As it is shown; nothing in it that a terminal obeys"""
    value: float | None = None
    """None: no ground"""
    struck: bool = False
    """Crossed out"""
    ends_line: bool = False
    """What follows stands on a new line"""
    hint: str = ""
    """What a page says of it under the pointer"""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Colours of numbers: one more than there are edges between them, from the lowest numbers to the highest."""

    edges: tuple[float, ...]
    names: tuple[str, ...]
    """Of each colour, for the legend"""
    terminal: tuple[tuple[int, int], ...]
    """Ink and ground, by their numbers among 256"""
    page: tuple[str, ...]
    """Ground, as CSS has it"""

    def step(self, value: float) -> int:
        return bisect.bisect_right(self.edges, value)


# A number that is none must not pass for one at the end of a scale.
_NOT_FINITE_TERMINAL, _NOT_FINITE_PAGE = (231, 91), "rgba(150, 60, 200, .8)"


def of_logps() -> Scale:
    """The scale of log-probs, nats: the less likely a token, the stronger its colour."""
    return Scale(
        edges=tuple(math.log(p) for p in (0.001, 0.01, 0.1, 0.5, 0.9)),
        names=("p < 0.1%", "< 1%", "< 10%", "< 50%", "< 90%", "p > 90%"),
        terminal=((231, 124), (231, 166), (16, 208), (16, 215), (16, 223), (16, 230)),
        page=tuple(f"rgba(222, 84, 20, {alpha})" for alpha in (0.8, 0.6, 0.42, 0.27, 0.15, 0.05)),
    )


def of_differences(values: Sequence[float]) -> Scale:
    """A scale of differences, nats, from the largest fall to the largest rise among these values."""
    most = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    edges = [0.6 * most, 0.3 * most, 0.1 * most]
    return Scale(
        edges=(*(-edge for edge in edges), *reversed(edges)),
        names=(
            *(f"< {-edge:.2g}" for edge in edges),
            f"within {edges[-1]:.2g}",
            *(f"> {edge:+.2g}" for edge in reversed(edges)),
        ),
        terminal=((231, 166), (16, 208), (16, 223), (16, 255), (16, 153), (16, 75), (231, 25)),
        page=(
            *(f"rgba(222, 84, 20, {alpha})" for alpha in (0.75, 0.45, 0.2)),
            "rgba(128, 128, 128, .08)",
            *(f"rgba(40, 120, 230, {alpha})" for alpha in (0.2, 0.45, 0.75)),
        ),
    )


def legend(scale: Scale) -> list[Cell]:
    """Cells that show what each colour stands for."""
    low, high = scale.edges[0] - 1, scale.edges[-1] + 1
    values = [low, *((a + b) / 2 for a, b in zip(scale.edges, scale.edges[1:], strict=False)), high]
    return [Cell(text=name, value=value) for name, value in zip(scale.names, values, strict=True)]


def on_terminal(cells: Sequence[Cell], scale: Scale, width: int) -> list[str]:
    """Paint cells for a terminal, in lines of at most `width` columns. A cell wider than a line is cut into pieces."""
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
        style = "" if cell.value is None else Markup(' style="background: {}"').format(_ground(cell.value, scale))
        kind = " struck" if cell.struck else " plain" if cell.value is None else ""
        span = Markup('<span class="token{}"{} title="{}">{}</span>').format(kind, style, cell.hint, cell.text)
        # A place where the browser may begin a new line, or must.
        spans.append(span + Markup("<br>" if cell.ends_line else "<wbr>"))
    return Markup('<div class="tokens">{}</div>').format(Markup("").join(spans))


def width_of(text: str) -> int:
    """Columns that text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def _painted(text: str, cell: Cell, scale: Scale) -> str:
    if cell.value is None:
        return click.style(text, dim=True, strikethrough=cell.struck or None)
    ink, ground = scale.terminal[scale.step(cell.value)] if math.isfinite(cell.value) else _NOT_FINITE_TERMINAL
    return click.style(text, fg=ink, bg=ground)


def _ground(value: float, scale: Scale) -> str:
    return scale.page[scale.step(value)] if math.isfinite(value) else _NOT_FINITE_PAGE


def _pieces(text: str, width: int) -> Iterator[str]:
    piece, used = "", 0
    for c in text:
        size = width_of(c)
        if piece and used + size > width:
            yield piece
            piece, used = "", 0
        piece += c
        used += size
    if piece:
        yield piece
