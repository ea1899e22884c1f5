"""A page of stores: their identities, the reference's margins and lengths, and the pairs worth a look."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from pipeline.base import statistics
from pipeline.report.charts import Line, histogram_chart, line_chart
from pipeline.report.pages import COLORS, Section, beside, chart, facts, page, table
from pipeline.store import ranking
from pipeline.store.contents import Contents, explain_command, identity_facts

__all__ = ["store_page"]

_CHOSEN, _REJECTED = COLORS[2], COLORS[1]
_DENSITY = [[0.0, "rgba(66,105,208,0.15)"], [0.5, "rgba(66,105,208,0.95)"], [1.0, "rgba(217,119,6,1)"]]
"""Color scale that is visible on a light and on a dark page"""


def store_page(where: str, stores: Sequence[Contents], described: Sequence[Mapping[str, Any]]) -> str:
    """Make the page of some stores, each with its description from `describe`."""
    sections = []
    for store, entry in zip(stores, described, strict=True):
        name = f"{entry['store'].rstrip('/').rpartition('/')[2]}: " if len(stores) > 1 else ""
        sections += [
            Section(title=f"{name}{section.title}", body=section.body, note=section.note)
            for section in _sections(store, entry)
        ]
    return page("Contents of the shards", sections, subtitle=where)


def _sections(store: Contents, entry: Mapping[str, Any]) -> Iterator[Section]:
    state = {} if entry["finished"] else {"unfinished": str(store.unfinished)}
    yield Section(title="Store", body=facts({"store": entry["store"], **state, **identity_facts(entry)}))
    if not entry["pairs"]:
        return
    margin = entry["reference_margin"]
    margins, per_token = ranking.margins(store.pairs), ranking.margins_per_token(store.pairs)
    yield Section(
        title="Margins of the reference",
        note=(
            f"The reference prefers the chosen completion in {_share(margin['share_chosen_preferred'])} of the pairs "
            f"({_share(margin['share_chosen_preferred_per_token'])} per token). A margin is log p(chosen) minus "
            "log p(rejected) under the reference; per token, it is the difference of the completions' means. A margin "
            "below 0 means that the reference prefers the rejected completion."
        ),
        body=beside(
            [
                histogram_chart(title, [(title, values, COLORS[0], "solid")], x_title=unit, of="pairs")
                for title, values, unit in (
                    ("Margin", margins, "nats"),
                    ("Margin per token", per_token, "nats per token"),
                )
            ]
        ),
    )
    lengths = [
        ("chosen", store.pairs.chosen_tokens, _CHOSEN, "solid"),
        ("rejected", store.pairs.rejected_tokens, _REJECTED, "solid"),
    ]
    yield Section(
        title="Lengths",
        note=(
            f"The chosen completion is longer in {entry['share_chosen_longer']:.1%} of the pairs. A longer completion "
            "has a lower log-prob, so a reference seems to prefer short ones; the preference per token excludes this."
        ),
        body=beside(
            [
                histogram_chart("Tokens of a completion", lengths, x_title="tokens", of="completions"),
                _margin_by_length(ranking.length_differences(store.pairs), margins),
            ]
        )
        + _length_bias(entry["length_bias"]),
    )
    if len(store.files) > 1:
        yield Section(
            title="Parts",
            note=(
                "Means over the pairs of each part, in the order of the files' names. A part far from the others holds "
                "other data, or log-probs of another model."
            ),
            body=beside(_part_charts(ranking.part_means(store.pairs, len(store.files)))),
        )
    yield Section(
        title="Suspicious pairs",
        note=f"The reference can be wrong: look at a pair with {explain_command(entry, 'N')} before you drop it.",
        body=_suspicious(entry["suspicious"]),
    )


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
    note = f"{found.outside:,} pairs are outside the chart" if found.outside else ""
    return chart(figure, title=title, label=f"Pairs by margin and by difference in length. {note}", note=note)


def _length_bias(bias: Mapping[str, Any]) -> Markup:
    lines = [
        [longer, found["pairs"], *(_share(found[f"share_chosen_preferred{unit}"]) for unit in ("", "_per_token"))]
        for longer, found in bias["longer"].items()
    ]
    made = table(["longer completion", "pairs", "prefers chosen", "per token"], lines)
    if bias["correlation"] is None or bias["correlation_per_token"] is None:
        return made
    return made + _paragraph(
        f"Correlation of the margin with the difference in length: {bias['correlation']:+z.2f} "
        f"({bias['correlation_per_token']:+z.2f} per token)."
    )


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _part_charts(means: Mapping[str, npt.NDArray[np.float64]]) -> list[Markup]:
    def line(name: str, key: str, color: str) -> Line:
        return Line(name=name, x=range(len(means[key])), y=means[key].tolist(), color=color)

    margins = [line("margin per token", "margin_per_token", COLORS[0])]
    lengths = [line("chosen", "chosen_tokens", _CHOSEN), line("rejected", "rejected_tokens", _REJECTED)]
    return [
        line_chart("Mean margin per token", margins, x_title="part", y_title="nats per token"),
        line_chart("Mean tokens of a completion", lengths, x_title="part", y_title="tokens"),
    ]


def _suspicious(found: Mapping[str, Any]) -> Markup:
    duplicates, same, swapped = found["duplicates"], found["same_on_both_sides"], found["likely_swapped"]
    blocks = []
    if found["likely_mislabelled"]:
        blocks.append(
            _paragraph("Likely mislabelled: the rejected completion is more likely, in sum and per token.")
            + _pairs(found["likely_mislabelled"])
        )
    if duplicates["count"]:
        lines = [[str(example["again_in_row"]), str(example["row"])] for example in duplicates["examples"]]
        blocks.append(
            _paragraph(f"{duplicates['count']:,} duplicates: pairs with the key of an earlier pair.")
            + table(["row", "duplicate of row"], lines)
        )
    if same["count"]:
        rows = ", ".join(map(str, same["rows"])) + (" and more" if same["count"] > len(same["rows"]) else "")
        blocks.append(_paragraph(f"{same['count']:,} with the same completion on both sides, as scored: row {rows}."))
    if swapped["count"]:
        blocks.append(
            _paragraph(
                f"{swapped['count']:,} likely swapped: lengths and log-probs are those of an earlier pair whose chosen "
                f"and rejected completion changed places, within {swapped['tolerance_per_token']:.1g} nats per token. "
                f"In the same order, {swapped['coincide_in_the_same_order']:,} pairs coincide, which is chance."
            )
            + _pairs([pair for both in swapped["examples"] for pair in both])
        )
    return Markup("").join(blocks) or _paragraph("None.")


def _paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def _pairs(examples: Sequence[Mapping[str, Any]]) -> Markup:
    header = ["row", "margin per token", "margin", "prompt tokens", "chosen tokens", "nats", "rejected tokens", "nats"]
    names = ["margin_per_token", "margin", "prompt_tokens"]
    names += ["chosen_tokens", "ref_chosen_logps", "rejected_tokens", "ref_rejected_logps"]
    # A row's number stands as a user types it, without commas.
    return table(header, [[str(example["row"]), *(example[name] for name in names)] for example in examples])
