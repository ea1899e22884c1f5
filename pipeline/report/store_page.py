"""A page of stores: their identities, the reference's margins and lengths, and the pairs worth a look."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base import statistics
from pipeline.base.errors import number_of
from pipeline.report.charts import Line, histogram_chart, line_chart
from pipeline.report.pages import COLORS, Section, beside, chart, facts, page, table
from pipeline.run.reading import Curve
from pipeline.store import ranking
from pipeline.store.contents import Block, Contents, identity_facts, length_block, margin_note, suspicious_blocks

__all__ = ["store_page"]

_CHOSEN, _REJECTED = COLORS[2], COLORS[1]
_DENSITY = [[0.0, "rgba(66,105,208,0.15)"], [0.5, "rgba(66,105,208,0.95)"], [1.0, "rgba(217,119,6,1)"]]
"""Color scale that is visible on a light and on a dark page"""


def store_page(where: str, stores: Sequence[Contents], described: Sequence[Mapping[str, Any]]) -> str:
    """Make the page of some stores, each with its description from `describe`."""
    sections = []
    for store, entry in zip(stores, described, strict=True):
        name = f"{entry['store'].rstrip('/').rpartition('/')[2]}: " if len(stores) > 1 else ""
        sections += [replace(section, title=name + section.title) for section in _sections(store, entry)]
    named = "/".join(where.rstrip("/").split("/")[-2:])
    return page(f"Shards {named}", sections, subtitle=where)


def _sections(store: Contents, entry: Mapping[str, Any]) -> Iterator[Section]:
    state = {} if entry["finished"] else {"unfinished": str(store.store.unfinished)}
    yield Section(title="Store", body=facts({"store": entry["store"], **state, **identity_facts(entry)}))
    if not entry["pairs"]:
        return
    margins, per_token = ranking.margins(store.pairs), ranking.margins_per_token(store.pairs)
    margin_charts = [
        histogram_chart(title, [(title, values, COLORS[0], "solid")], x_title=unit, of="pairs")
        for title, values, unit in (("Margin", margins, "nats"), ("Margin per token", per_token, "nats per token"))
    ]
    note = f"{margin_note(entry)} Below 0, the reference prefers the rejected completion."
    yield Section(title="Margins of the reference", note=note, body=beside(margin_charts))
    sides = (("chosen", store.pairs.chosen_tokens, _CHOSEN), ("rejected", store.pairs.rejected_tokens, _REJECTED))
    tokens = [(side, values, color, "solid") for side, values, color in sides]
    length_charts = [
        histogram_chart("Tokens of a completion", tokens, x_title="tokens", of="completions"),
        _margin_by_length(ranking.length_differences(store.pairs), margins),
    ]
    length = length_block(entry)
    yield Section(title="Lengths", note=length.text, body=beside(length_charts) + table(length.header, length.rows))
    if len(store.store.units) > 1:
        note = (
            "Means over the pairs of each part, in the order of the files' names. A part far from the others holds "
            "other data, or log-probs of another model."
        )
        means = ranking.part_means(store.pairs, len(store.store.units))
        yield Section(title="Parts", note=note, body=beside(_part_charts(means)))
    blocks = list(suspicious_blocks(entry)) or [Block("None.")]
    yield Section(title="Suspicious pairs", body=Markup("").join(map(_shown, blocks)))


def _margin_by_length(differences: npt.NDArray[Any], margins: npt.NDArray[Any]) -> Markup:
    import plotly.graph_objects as go

    found = statistics.grid(differences, margins, 40)
    # A few cells hold most of the pairs, so the color is that of the logarithm.
    shade = np.where(found.counts > 0, np.log10(np.maximum(found.counts, 1)), np.nan)
    most = int(found.counts.max())
    ticks = sorted({10**power for power in range(len(str(most)))} | ({most} if most < 10 else set()))
    figure = go.Figure(
        go.Heatmap(
            x=found.across,
            y=found.up,
            z=shade,
            customdata=found.counts,
            colorscale=_DENSITY,
            zmin=0,
            zmax=max(float(np.log10(max(most, 1))), 1e-9),
            hoverongaps=False,
            hovertemplate="%{x:,} tokens, %{y:,} nats: %{customdata:,} pairs<extra></extra>",
            colorbar={"title": "pairs", "tickvals": np.log10(ticks).tolist(), "ticktext": [f"{t:,}" for t in ticks]},
        )
    )
    figure.update_layout(height=320, xaxis_title="tokens, chosen minus rejected", yaxis_title="margin, nats")
    title = "Margin by difference in length"
    note = f"Outside the chart: {number_of(found.outside, 'pair')}" if found.outside else ""
    return chart(figure, title=title, label=f"Pairs by margin and by difference in length. {note}", note=note)


def _part_charts(means: Mapping[str, npt.NDArray[np.float64]]) -> list[Markup]:
    def line(name: str, key: str, color: str) -> Line:
        return Line(name=name, curve=Curve(range(len(means[key])), means[key].tolist()), color=color)

    margins = [line("margin per token", "margin_per_token", COLORS[0])]
    lengths = [line("chosen", "chosen_tokens", _CHOSEN), line("rejected", "rejected_tokens", _REJECTED)]
    return [
        line_chart("Mean margin per token", margins, x_title="part", y_title="nats per token"),
        line_chart("Mean tokens of a completion", lengths, x_title="part", y_title="tokens"),
    ]


def _shown(block: Block) -> Markup:
    text = Markup("<p>{}</p>").format(block.text)
    # As many digits as the terminal shows, so that a column's points stand below each other.
    rows = [[f"{cell:.3f}" if isinstance(cell, float) else cell for cell in row] for row in block.rows]
    return text + table(block.header, rows) if rows else text
