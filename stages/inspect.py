"""Show a store: its reference, counts, lengths, the reference's margins, and the pairs that look wrong.

Needs pyarrow and numpy only (and Plotly for the page), so it runs on any machine, in seconds for a million pairs.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.base import statistics
from pipeline.base.errors import UnfinishedError, printable
from pipeline.store import ranking
from pipeline.store.contents import Contents, describe, explain_command, identity_facts, read_contents
from pipeline.store.store import find_stores

__all__ = ["run"]

_EXAMPLES = 10
"""Examples of each kind of suspicious pairs; JSON and the page have more"""
_BAR = 40
"""Columns of the longest bar"""


def run(where: str, *, as_json: bool, page: Path | None = None) -> None:
    """Print the contents of one store, or of each store of an output folder.

    Args:
        where: Folder or URL.
        as_json: Print JSON instead of text.
        page: File to write an HTML page with pictures to.

    Raises:
        ConfigError: A page is asked for, and Plotly is not installed.
        DataError: The folder holds no store, or a damaged one.
        UnfinishedError: A store is unfinished; its parts so far are shown before.
    """
    if page is not None:
        from pipeline.report.pages import check_charts

        check_charts()
    stores = [read_contents(folder) for folder in find_stores(where)]
    described = [describe(store) for store in stores]
    if as_json:
        click.echo(json.dumps(described, indent=1))
    else:
        click.echo("\n\n".join(_as_text(entry, store) for entry, store in zip(described, stores, strict=True)))
    if page is not None:
        from pipeline.report.pages import write_page
        from pipeline.report.store_page import store_page

        write_page(page, store_page(where, stores, described))
        if not as_json:
            click.echo(f"\nPictures: {printable(str(page))}")
    if unfinished := [str(store.unfinished) for store in stores if store.unfinished is not None]:
        raise UnfinishedError("; ".join(unfinished))


def _as_text(entry: Mapping[str, Any], store: Contents) -> str:
    lines = [entry["store"] + ("" if entry["finished"] else "  (unfinished: its parts so far)")]
    lines += [f"  {name:<13} {said}" for name, said in identity_facts(entry).items()]
    if entry["pairs"]:
        lines += ["", *_percentiles(entry), "", *_preferences(entry), "", *_bars(store)]
        lines += [line for block in _suspicious(entry) for line in ("", *block)]
    return "\n".join(map(printable, lines))


def _percentiles(entry: Mapping[str, Any]) -> Iterator[str]:
    yield f"  {'':22}" + "".join(f"{f'{p}%':>10}" for p in statistics.PERCENTILES) + f"{'mean':>10}"
    rows = [
        (f"{name} tokens", values | {"mean": values["total"] / entry["pairs"]}, 1)
        for name, values in entry["tokens"].items()
    ]
    rows += [
        ("margin, nats", entry["reference_margin"], 1),
        ("margin, nats a token", entry["reference_margin_per_token"], 3),
    ]
    for label, values, digits in rows:
        shown = [*(values[f"p{p}"] for p in statistics.PERCENTILES), values["mean"]]
        yield f"  {label:22}" + "".join(f"{value:>10,.{digits}f}" for value in shown)


def _preferences(entry: Mapping[str, Any]) -> Iterator[str]:
    margin, bias = entry["reference_margin"], entry["length_bias"]
    yield (
        f"  The reference itself prefers the chosen completion in {margin['share_chosen_preferred']:.1%} of the "
        f"pairs ({margin['share_chosen_preferred_per_token']:.1%} per token); the chosen one is longer in "
        f"{entry['share_chosen_longer']:.1%}."
    )
    yield "  margin = log p(chosen) - log p(rejected) under the reference; per token: of the completions' means."
    yield ""
    yield f"  {'longer completion':22}{'pairs':>12}{'prefers chosen':>18}{'per token':>12}"
    for side, found in bias["longer"].items():
        shares = [found["share_chosen_preferred"], found["share_chosen_preferred_per_token"]]
        whole, per_token = ("-" if share is None else f"{share:.1%}" for share in shares)
        yield f"  {side:22}{found['pairs']:>12,}{whole:>18}{per_token:>12}"
    if bias["correlation"] is not None and bias["correlation_per_token"] is not None:
        yield (
            f"  Correlation of the margin with how much longer the chosen completion is: {bias['correlation']:+z.2f} "
            f"({bias['correlation_per_token']:+z.2f} per token)."
        )


def _bars(store: Contents) -> Iterator[str]:
    """Draw the histogram of margins with blocks on a terminal that has them, else with #."""
    found = statistics.histogram(ranking.margins(store.pairs), 16)
    blocks = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    largest = max(1, int(found.counts.max()))
    # As many digits as the bins' width needs.
    digits = max(0, -math.floor(math.log10(found.edges[1] - found.edges[0])))
    yield f"  {'margin, nats':>23}{'pairs':>12}"
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts.tolist(), strict=True):
        bar = _bar(count / largest, blocks=blocks)
        yield f"  {low:>10,.{digits}f} to {high:>9,.{digits}f}{count:>12,}  {bar}".rstrip()
    if found.below or found.above:
        yield f"  {found.below:,} pairs are below, {found.above:,} above."


def _bar(share: float, *, blocks: bool) -> str:
    """Draw a bar for a share of the longest one; a share above 0 is always visible."""
    if not blocks:
        return "#" * (max(1, round(share * _BAR)) if share else 0)
    eighths = max(1, round(share * _BAR * 8)) if share else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _suspicious(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    found = entry["suspicious"]
    rows: list[int] = []
    if worst := found["likely_mislabelled"]:
        rows.append(worst[0]["row"])
        yield [
            "  Likely mislabelled, or least known to the reference: it finds the rejected completion more likely, in",
            "  sum and, by the most, per token. The reference is not a judge, so look at a pair before you drop it.",
            *_pairs_table(worst[:_EXAMPLES]),
        ]
    if found["duplicates"]["count"]:
        examples = found["duplicates"]["examples"]
        rows.append(examples[0]["again_in_row"])
        yield [
            f"  {found['duplicates']['count']:,} duplicates (the key of an earlier pair): "
            + ", ".join(f"row {e['again_in_row']} is row {e['row']}" for e in examples[:_EXAMPLES])
            + _more(found["duplicates"]["count"])
        ]
    if found["same_on_both_sides"]["count"]:
        same = found["same_on_both_sides"]
        yield [
            f"  {same['count']:,} with the same completion on both sides, as scored (equal lengths and sums): row "
            + ", ".join(map(str, same["rows"][:_EXAMPLES]))
            + _more(same["count"])
        ]
    if found["likely_swapped"]["count"]:
        swapped = found["likely_swapped"]
        yield [
            f"  {swapped['count']:,} likely swapped: an earlier pair's three lengths, and its sums within "
            f"{swapped['tolerance_per_token']:.1g} nats a token, with chosen",
            f"  and rejected swapped.{_by_chance(swapped)}",
            *_pairs_table([pair for both in swapped["examples"][: _EXAMPLES // 2] for pair in both]),
        ]
    if rows:
        yield [f"  To look at a pair as the models see it: {explain_command(entry, rows[0])}"]


def _pairs_table(examples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"  {'row':>12}{'margin a token':>16}{'margin':>12}{'prompt tokens':>15}{'chosen tokens, nats':>22}"
        f"{'rejected tokens, nats':>23}"
    )
    for pair in examples:
        chosen, rejected = (
            f"{pair[f'{side}_tokens']:,} {pair[f'ref_{side}_logps']:>11,.3f}" for side in ("chosen", "rejected")
        )
        yield (
            f"  {pair['row']:>12}{pair['margin_per_token']:>16,.3f}{pair['margin']:>12,.2f}{pair['prompt_tokens']:>15,}"
            f"{chosen:>22}{rejected:>23}"
        )


def _more(count: int) -> str:
    return f" and {count - _EXAMPLES:,} more" if count > _EXAMPLES else ""


def _by_chance(swapped: Mapping[str, Any]) -> str:
    """Estimate the chance matches: as many pairs as coincide without a swap."""
    if not swapped["coincide_in_the_same_order"]:
        return ""
    return (
        f" {swapped['coincide_in_the_same_order']:,} others coincide in the same order, so about as many of these "
        "may be chance."
    )
