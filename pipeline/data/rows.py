"""A row of a preference dataset with its place, and the source that it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "LARGEST_ROW",
    "Row",
    "Source",
]

LARGEST_ROW = 4 * 2**20
"""Bytes of one row of a text file. About a million tokens: what is longer is no preference, but a file without ends of
lines, or another file's content."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: `files` for local files, `path` for a `save_to_disk` folder or a hub name."""

    path: str
    format: str
    """jsonl, parquet, csv, disk or hub."""
    name: str | None
    revision: str | None
    split: str
    start: int
    """First row that is read, counted from 0."""
    stop: int | None
    """Row before which reading stops; None: at the end."""
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    streaming: bool
    all_columns: bool = False
    """Read the columns too that no pair has, where a format could leave them out."""


@dataclass(frozen=True)
class Row:
    """One row of the source, not yet decoded."""

    number: int
    """Position in the source, from 0."""
    place: str
    """For people: file and line, or dataset and row."""
    load: Callable[[], Mapping[str, Any]]
    """Decode the row. Raises BadRow if it is damaged."""
