"""Show a store: its reference, counts, lengths, the reference's margins, and the pairs that look wrong.

Needs pyarrow, numpy and fastjsonschema only (and Plotly for the page), so it runs on any machine, in seconds for a
million pairs.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.base import statistics
from pipeline.base.errors import UnfinishedError, printable
from pipeline.base.progress import say
from pipeline.base.tables import aligned
from pipeline.store import ranking
from pipeline.store.contents import (
    Contents,
    describe,
    identity_facts,
    length_block,
    margin_note,
    read_contents,
    suspicious_blocks,
)
from pipeline.store.store import find_stores

__all__ = ["run"]

_EXAMPLES = 10
"""Examples of each kind of suspicious pairs; JSON and the page have more"""
_COLUMNS = 110
"""Width of the text"""
_BAR = 40
"""Columns of the longest bar"""


def run(where: str, *, as_json: bool, page: Path | None = None) -> None:
    """Print the contents of the store at a folder or URL, or of each store of an output folder.

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
        say("\n\n".join(_as_text(entry, store) for entry, store in zip(described, stores, strict=True)))
    if page is not None:
        from pipeline.report.pages import write_page
        from pipeline.report.store_page import store_page

        write_page(page, store_page(where, stores, described))
        if not as_json:
            say(f"\nPictures: {page}")
    if unfinished := [str(found.store.unfinished) for found in stores if found.store.unfinished is not None]:
        raise UnfinishedError("; ".join(unfinished))


def _as_text(entry: Mapping[str, Any], store: Contents) -> str:
    lines = [entry["store"] + ("" if entry["finished"] else "  (unfinished; these are the parts so far)")]
    lines += [f"  {name:<13} {said}" for name, said in identity_facts(entry).items()]
    if entry["pairs"]:
        lines += ["", *_indented(_percentiles(entry)), "", *_wrapped(margin_note(entry)), "", *_bars(store)]
        for block in (length_block(entry), *suspicious_blocks(entry, _EXAMPLES)):
            lines += ["", *_wrapped(block.text)]
            lines += _indented([block.header, *(map(_cell, row) for row in block.rows)]) if block.rows else []
    return "\n".join(map(printable, lines))


def _wrapped(text: str) -> list[str]:
    return click.wrap_text(text, _COLUMNS, "  ", "  ").split("\n")


def _indented(rows: Iterable[Iterable[str]]) -> list[str]:
    return [f"  {line}" for line in aligned([list(row) for row in rows])]


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if isinstance(value, float) else str(value)


def _percentiles(entry: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["", *(f"{p}%" for p in statistics.PERCENTILES), "mean"]
    rows = [
        (f"{name} tokens", values | {"mean": values["total"] / entry["pairs"]}, 1)
        for name, values in entry["tokens"].items()
    ]
    rows += [
        ("margin, nats", entry["reference_margin"], 1),
        ("margin, nats per token", entry["reference_margin_per_token"], 3),
    ]
    for label, values, digits in rows:
        shown = [*(values[f"p{p}"] for p in statistics.PERCENTILES), values["mean"]]
        yield [label, *(f"{value:,.{digits}f}" for value in shown)]


def _bars(store: Contents) -> Iterator[str]:
    """Draw the histogram of margins; a bin with pairs always has a bar."""
    found = statistics.histogram(ranking.margins(store.pairs), 16)
    largest = max(1, int(found.counts.max()))
    # As many digits as the bins' width needs.
    digits = max(0, -math.floor(math.log10(found.edges[1] - found.edges[0])))
    yield f"  {'margin, nats':>23}{'pairs':>12}"
    for low, high, count in zip(found.edges[:-1], found.edges[1:], found.counts.tolist(), strict=True):
        bar = "#" * (max(1, round(count / largest * _BAR)) if count else 0)
        yield f"  {low:>10,.{digits}f} to {high:>9,.{digits}f}{count:>12,}  {bar}".rstrip()
    if found.below or found.above:
        yield f"  Not shown: {found.below:,} pairs below, {found.above:,} above."
