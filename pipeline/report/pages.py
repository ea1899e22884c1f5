"""HTML pages in one file: styles, charts and their library inside, nothing fetched, light and dark by the reader's own.

Charts are drawn by Plotly (`pip install 'refshard[report]'`), which is imported when the first one is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.base.errors import ConfigError, StorageError, printable
from pipeline.base.files import replace_file

__all__ = [
    "COLORS",
    "Section",
    "beside",
    "chart",
    "check_charts",
    "facts",
    "has_charts",
    "page",
    "table",
    "write_page",
]

COLORS = ("#4269d0", "#d97706", "#3a9d6e", "#c2417c", "#7c5cd6", "#0d8fa8", "#8d6e4f", "#6b7787")
"""Of the lines of charts, in order; each is told from both backgrounds and from its neighbours."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page."""

    title: str
    body: Markup
    """HTML that this module's functions or Markup made; plain text is to be escaped before."""
    note: str = ""
    """One or two sentences under the title: how to read what follows."""


def check_charts() -> None:
    """Make sure that charts can be drawn.

    Raises:
        ConfigError: Plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as error:
        raise ConfigError("charts need Plotly, which is not installed: pip install 'refshard[report]'") from error
    assert plotly.graph_objects


def chart(figure: Any, *, label: str, title: str = "", note: str = "") -> Markup:
    """Put a Plotly figure on a page.

    Args:
        figure: Without colors of text, axes and grid, which are the page's, by its style sheet.
        label: What it shows, in words, for those who can't see it.
        title: Above the figure; in HTML, since a title of Plotly's own is cut off on a narrow screen.
        note: Under the figure.
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
        # The library's prefixes, 300µ for 0.0003, belong to units that it does not know.
        update(automargin=True, title_standoff=8, exponentformat="e")
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        # Its buttons would lie over the curves; dragging zooms, and a double click shows all again.
        config={"displayModeBar": False, "responsive": True, "showTips": False},
    )
    caption = Markup("<figcaption>{}</figcaption>").format(_text(title)) if title else Markup("")
    below = Markup('<p class="note">{}</p>').format(_text(note)) if note else Markup("")
    return Markup('<figure role="img" aria-label="{}">{}{}{}</figure>').format(
        printable(label), caption, Markup(drawn), below
    )


def has_charts(text: str) -> bool:
    """Tell whether there is a chart in HTML of this module; what people wrote has no quotes of its own in it."""
    return 'class="plotly-graph-div"' in text


def beside(charts: Sequence[Markup]) -> Markup:
    """Put charts beside each other, as many in a line as there is room for."""
    return Markup('<div class="charts">{}</div>').format(Markup("").join(charts))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """Make a table; columns of what is no text are set to the right, numbers written for people; Markup stays."""
    numbers = [any(_is_number(row[i]) for row in rows) for i in range(len(header))]
    head = Markup("").join(
        Markup('<th class="number">{}</th>' if number else "<th>{}</th>").format(_text(name))
        for name, number in zip(header, numbers, strict=True)
    )
    lines = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(_cell(value) for value in row)) for row in rows
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, lines
    )


def _is_number(value: object) -> bool:
    return not isinstance(value, bool | str | None)


def _cell(value: object) -> Markup:
    if not _is_number(value):
        return Markup("<td>{}</td>").format(_text(value))
    return Markup('<td class="number">{}</td>').format(
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def facts(pairs: Mapping[str, object]) -> Markup:
    """Make a list of names and what they are."""
    items = Markup("").join(
        Markup("<dt>{}</dt><dd>{}</dd>").format(_text(name), _text(value)) for name, value in pairs.items()
    )
    return Markup("<dl>{}</dl>").format(items)


def _text(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    return escape(printable("" if value is None else str(value)))


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """Make a page of sections. The library of the charts is in it only if there is a chart.

    The page forbids its reader's browser to fetch anything, so that what is in the data can't make it do so.
    """
    library = ""
    if any(has_charts(section.body) for section in sections):
        from plotly.offline import get_plotlyjs

        library = get_plotlyjs()
    template = (resources.files("pipeline.report") / "page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["printable"] = printable
    return environment.from_string(template).render(
        title=title, subtitle=subtitle, sections=sections, library=Markup(library)
    )


def write_page(file: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        StorageError: It can't be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise StorageError(f"{file}: can't be written ({error.strerror or error})") from error
