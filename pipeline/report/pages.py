"""HTML pages in one file: styles, charts and the chart library are inside, and nothing is fetched.

Plotly draws the charts (`pip install 'refshard[report]'`). It is imported with the first chart.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.base.errors import ConfigError, printable
from pipeline.base.files import make_folder, read_head, replace_file

__all__ = [
    "COLORS",
    "GRAY",
    "Section",
    "beside",
    "chart",
    "check_charts",
    "check_page",
    "facts",
    "page",
    "preformatted",
    "swatch",
    "table",
    "write_page",
]

COLORS = ("#4269d0", "#d97706", "#3a9d6e", "#c2417c", "#7c5cd6", "#0d8fa8", "#8d6e4f")
GRAY = "#6b7787"
"""Colors of lines. Each is distinct from its neighbours and from both backgrounds; gray is for references."""

_MOST_CHARACTERS = 8000
_NUMBER = re.compile(r"[-+−–]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%| [KMGT]i?B)?")
"""A number as text, perhaps with a unit"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page."""

    title: str
    body: Markup
    """HTML from this module's functions or from Markup; plain text must be escaped before"""
    note: str = ""
    """One or two sentences under the title that explain how to read the body"""


def check_charts() -> None:
    """Check that Plotly is installed. Raises ConfigError if not."""
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError as error:
        raise ConfigError("charts need Plotly, which is not installed: pip install 'refshard[report]'") from error


def chart(figure: Any, *, label: str, title: str = "", note: str = "") -> Markup:
    """Put a Plotly figure on a page, whose style sheet gives text, axes and grid their colors.

    `label` describes the figure for readers who can't see it. `title` is HTML: a narrow screen cuts Plotly's titles.
    """
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 56, "r": 16, "t": 12 if title else 44, "b": 48},
        colorway=COLORS,
        hoverlabel={"font": {"size": 12}, "namelength": 40},
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        # Plotly would write 0.0003 as 300µ, a prefix for units that it does not know.
        update(automargin=True, title_standoff=8, exponentformat="e")
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        # Plotly's buttons would cover the curves. Dragging zooms, and a double click shows everything again.
        config={"displayModeBar": False, "responsive": True, "showTips": False},
    )
    caption = Markup("<figcaption>{}</figcaption>").format(_text(title)) if title else Markup("")
    below = Markup('<p class="note">{}</p>').format(_text(note)) if note else Markup("")
    return Markup('<figure role="img" aria-label="{}">{}{}{}</figure>').format(
        printable(label), caption, Markup(drawn), below
    )


def beside(charts: Sequence[Markup]) -> Markup:
    """Put charts beside each other, as many in a line as fit."""
    return Markup('<div class="charts">{}</div>').format(Markup("").join(charts))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """Make a table. Columns of numbers align right, and their numbers are formatted; Markup stays as it is."""
    numbers = [_is_column_of_numbers([row[i] for row in rows]) for i in range(len(header))]
    head = Markup("").join(
        Markup('<th{} style="min-width:{}ch">{}</th>').format(
            Markup(' class="number"' if number else ""), len(Markup(name).striptags()) // _HEADER_LINES + 2, _text(name)
        )
        for name, number in zip(header, numbers, strict=True)
    )
    lines = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(*cell) for cell in zip(row, numbers, strict=True)))
        for row in rows
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, lines
    )


def _is_column_of_numbers(cells: Sequence[object]) -> bool:
    """Return True if a cell is a number, or all texts are: `85.0%`, `1.20 GiB`."""
    if any(not isinstance(cell, bool | str | None) for cell in cells):
        return True
    texts = [cell for cell in cells if cell not in (None, "")]
    return bool(texts) and all(isinstance(text, str) and _NUMBER.fullmatch(text) for text in texts)


def _cell(value: object, number: bool) -> Markup:
    right = number and not isinstance(value, bool)
    return Markup('<td class="number">{}</td>' if right else "<td>{}</td>").format(_text(value))


def facts(pairs: Mapping[str, object]) -> Markup:
    """Make a list of names and their values; numbers are formatted."""
    items = Markup("").join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(_text(name), _text(value)) for name, value in pairs.items()
    )
    return Markup("<dl>{}</dl>").format(items)


def preformatted(text: str) -> Markup:
    """Show text with its line breaks. Very long text is cut."""
    cut = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ... ({len(text):,} characters)"
    return Markup("<pre>{}</pre>").format("\n".join(map(printable, cut.split("\n"))))


def swatch(color: str, name: str) -> Markup:
    """Show a name after a square of its color."""
    return Markup('<span class="swatch" style="background:{}"></span>{}').format(color, printable(name))


def _text(value: object) -> Markup:
    if isinstance(value, float):
        return Markup(f"{value:.4g}")
    if isinstance(value, int) and not isinstance(value, bool):
        return Markup(f"{value:,}")
    return value if isinstance(value, Markup) else escape(printable("" if value is None else str(value)))


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Make a page of sections. It holds the chart library only if a section has a chart.

    The page forbids the browser to fetch anything, so nothing in the data can make it do so.
    """
    library = ""
    # Escaped text has no plain quotes, so it can't match.
    if any('class="plotly-graph-div"' in section.body for section in sections):
        from plotly.offline import get_plotlyjs

        library = get_plotlyjs()
    template = (resources.files("pipeline.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["printable"] = printable
    return environment.from_string(template).render(
        title=title, subtitle=subtitle, sections=sections, library=Markup(library)
    )


_HEADER_LINES = 3
"""Most lines of a column's title on narrow screens, about"""
_OF_A_PAGE = b"default-src 'none'; script-src 'unsafe-inline'"
"""Words at the start of each page"""


def check_page(file: Path) -> None:
    """Refuse a name under which a file is that is no page of ours. Raises ConfigError."""
    is_page = _OF_A_PAGE in read_head(file, 1000)
    if file.exists() and not is_page:
        raise ConfigError(f"{file}: must be a new file or a page of refshard, it is neither. Name another file")


def write_page(file: Path, text: str) -> None:
    """Write a page, whole or not at all. Raises StorageError, and as `check_page` does."""
    check_page(file)
    make_folder(file.parent)
    replace_file(file, text.encode("utf-8", errors="replace"))
