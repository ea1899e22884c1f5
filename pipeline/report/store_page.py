"""A page of what stores hold: whose they are, how the reference ranks the pairs, which to look at."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base import statistics
from pipeline.report.pages import COLORS, Section, beside, chart, facts, page, table
from pipeline.store import ranking
from pipeline.store.contents import Contents, explain_command, identity_facts

__all__ = [
    "store_page",
]

_CHOSEN, _REJECTED = COLORS[2], COLORS[1]


_DENSITY = [[0.0, "rgba(66,105,208,0.15)"], [0.5, "rgba(66,105,208,0.95)"], [1.0, "rgba(217,119,6,1)"]]
"""Seen on a light and on a dark page"""


_HEIGHT = 360
"""Of a chart, pixels"""


_LEGEND: dict[str, Any] = {"legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}}


def store_page(where: str, stores: Sequence[Contents], described: Sequence[Mapping[str, Any]]) -> str:
    """Make the page of some stores, each with what `describe` says of it.

    Raises:
        ImportError: Plotly is not installed; `check_charts` tells before.
    """
    sections = []
    for store, entry in zip(stores, described, strict=True):
        name = f"{entry['store'].rstrip('/').rpartition('/')[2]}: " if len(stores) > 1 else ""
        sections += [
            Section(title=f"{name}{section.title}", body=section.body, note=section.note)
            for section in _sections(store, entry)
        ]
    return page("What the shards hold", sections, subtitle=where)


def _sections(store: Contents, entry: Mapping[str, Any]) -> Iterator[Section]:
    state = {} if entry["finished"] else {"unfinished": str(store.unfinished)}
    yield Section(title="The store", body=facts({"store": entry["store"], **state, **identity_facts(entry)}))
    if not entry["pairs"]:
        return
    margin = entry["reference_margin"]
    yield Section(
        title="How the reference ranks the pairs",
        note=(
            f"It prefers the chosen completion in {margin['share_chosen_preferred']:.1%} of the pairs "
            f"({margin['share_chosen_preferred_per_token']:.1%} per token). Margin: log p(chosen) - log p(rejected) "
            "under the reference; per token, the difference of the completions' means. Left of 0, in orange, are the "
            "pairs of which it prefers the rejected one."
        ),
        body=beside([_margins(store), _margins(store, per_token=True)]),
    )
    yield Section(
        title="Length",
        note=(
            f"The chosen completion is longer in {entry['share_chosen_longer']:.1%} of the pairs. A longer completion "
            "has the lower sum, so that a reference seems to prefer short ones; what stays per token is more than that."
        ),
        body=beside([_lengths(store), _margin_by_length(store)]) + _longer(entry["length_bias"]),
    )
    if len(store.files) > 1:
        yield Section(
            title="From part to part",
            note="Means over the pairs of each part. A part far off the others holds other data, or another model's.",
            body=beside(_part_charts(store)),
        )
    yield Section(
        title="Pairs to look at",
        note=f"The reference is no judge: look at a pair, with {explain_command(entry, 'N')}, before you drop it.",
        body=_suspicious(entry["suspicious"]),
    )


def _titled(figure: Any, title: str, label: str, **layout: Any) -> Markup:
    figure.update_layout(height=_HEIGHT, **layout)
    return chart(figure, label=label, title=title)


def _bars(found: statistics.Histogram, colors: Sequence[str]) -> Any:
    import plotly.graph_objects as go

    width = found.edges[1] - found.edges[0]
    return go.Figure(
        go.Bar(
            x=found.edges[:-1] + width / 2,
            y=found.counts,
            width=width,
            marker={"color": list(colors), "line": {"width": 0}},
            customdata=np.stack([found.edges[:-1], found.edges[1:]], axis=1),
            hovertemplate="%{customdata[0]:.4~g} to %{customdata[1]:.4~g}: %{y:,} pairs<extra></extra>",
        )
    )


def _margins(store: Contents, *, per_token: bool = False) -> Markup:
    values = (ranking.margins_per_token if per_token else ranking.margins)(store.pairs)
    found = statistics.histogram(values, 50)
    colors = [_REJECTED if low < 0 else _CHOSEN for low in found.edges[:-1]]
    title = "Margin per token" if per_token else "Margin"
    return _titled(
        _bars(found, colors),
        title,
        f"Histogram of the reference's {title.lower()}: left of 0 it prefers the rejected completion; "
        f"{found.below + found.above:,} pairs lie outside",
        xaxis_title="nats a token" if per_token else "nats",
        yaxis_title="pairs",
        yaxis_tickformat=",",
        showlegend=False,
        bargap=0,
    )


def _lengths(store: Contents) -> Markup:
    import plotly.graph_objects as go

    pairs = store.pairs
    edges = statistics.histogram(np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens]), 50).edges
    figure = go.Figure()
    for name, tokens, color in (
        ("chosen", pairs.chosen_tokens, _CHOSEN),
        ("rejected", pairs.rejected_tokens, _REJECTED),
    ):
        counts, _ = np.histogram(tokens, edges)
        steps = [*counts.tolist(), int(counts[-1])]
        figure.add_scatter(x=edges, y=steps, name=name, mode="lines", line={"shape": "hv", "color": color})
    return _titled(
        figure,
        "Tokens of a completion",
        "Histogram of the lengths of chosen and rejected completions",
        xaxis_title="tokens",
        yaxis_title="pairs",
        yaxis_tickformat=",",
        **_LEGEND,
    )


def _margin_by_length(store: Contents) -> Markup:
    import plotly.graph_objects as go

    found = statistics.grid(ranking.length_differences(store.pairs), ranking.margins(store.pairs), 40)
    # Few cells hold most of the pairs.
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
    return _titled(
        figure,
        "Margin by difference in length",
        f"Pairs by margin and by difference in length; {found.outside:,} pairs lie outside the picture",
        xaxis_title="tokens by which the chosen one is longer",
        yaxis_title="margin, nats",
    )


def _longer(bias: Mapping[str, Any]) -> Markup:
    lines = [
        [
            side,
            found["pairs"],
            _share(found["share_chosen_preferred"]),
            _share(found["share_chosen_preferred_per_token"]),
        ]
        for side, found in bias["longer"].items()
    ]
    made = table(["longer completion", "pairs", "prefers chosen", "per token"], lines)
    if bias["correlation"] is None or bias["correlation_per_token"] is None:
        return made
    return made + Markup("<p>{}</p>").format(
        f"Correlation of the margin with how much longer the chosen completion is: {bias['correlation']:+z.2f} "
        f"({bias['correlation_per_token']:+z.2f} per token)."
    )


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _part_charts(store: Contents) -> list[Markup]:
    means = ranking.part_means(store.pairs, len(store.files))
    margins = [("margin per token", means["margin_per_token"], COLORS[0])]
    lengths = [("chosen", means["chosen_tokens"], _CHOSEN), ("rejected", means["rejected_tokens"], _REJECTED)]
    return [
        _lines(store, "Mean margin per token", "nats a token", margins),
        _lines(store, "Mean tokens of a completion", "tokens", lengths),
    ]


def _lines(
    store: Contents, title: str, unit: str, series: Sequence[tuple[str, npt.NDArray[np.float64], str]]
) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, values, color in series:
        figure.add_scatter(
            x=np.arange(len(values)),
            y=values,
            name=name,
            mode="lines+markers" if len(values) <= 50 else "lines",
            line={"color": color},
            text=store.files,
            hovertemplate="%{text}: %{y:.4~g}<extra></extra>",
        )
    return _titled(
        figure,
        title,
        f"{title}, part by part",
        xaxis_title="part",
        yaxis_title=unit,
        showlegend=len(series) > 1,
        **_LEGEND,
    )


def _suspicious(found: Mapping[str, Any]) -> Markup:
    duplicates, same, swapped = found["duplicates"], found["same_on_both_sides"], found["likely_swapped"]
    blocks = []
    if found["likely_mislabelled"]:
        blocks.append(
            _said("Likely mislabelled: the reference finds the rejected completion more likely, in sum and per token.")
            + _pairs(found["likely_mislabelled"])
        )
    if duplicates["count"]:
        lines = [[str(example["again_in_row"]), str(example["row"])] for example in duplicates["examples"]]
        blocks.append(
            _said(f"{duplicates['count']:,} duplicates: pairs with the key of an earlier one.")
            + table(["row", "is row"], lines)
        )
    if same["count"]:
        rows = ", ".join(map(str, same["rows"])) + (" and more" if same["count"] > len(same["rows"]) else "")
        blocks.append(_said(f"{same['count']:,} with the same completion on both sides, as scored: row {rows}."))
    if swapped["count"]:
        blocks.append(
            _said(
                f"{swapped['count']:,} likely swapped: an earlier pair's three lengths and, within "
                f"{swapped['tolerance_per_token']:.1g} nats a token, its two sums, with chosen and rejected changed "
                f"over. {swapped['coincide_in_the_same_order']:,} others coincide in the same order, which is what "
                "chance makes of it."
            )
            + _pairs([pair for both in swapped["examples"] for pair in both])
        )
    return Markup("").join(blocks) or _said("None.")


def _said(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def _pairs(examples: Sequence[Mapping[str, Any]]) -> Markup:
    header = ["row", "margin a token", "margin", "prompt tokens", "chosen tokens", "nats", "rejected tokens", "nats"]
    names = ["margin_per_token", "margin", "prompt_tokens"]
    names += ["chosen_tokens", "ref_chosen_logps", "rejected_tokens", "ref_rejected_logps"]
    # A row's number as it is typed, without commas.
    return table(header, [[str(example["row"]), *(example[name] for name in names)] for example in examples])
