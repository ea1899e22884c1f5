"""A row of a preference dataset with its place, and the source that it comes from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LARGEST_ROW", "Row", "Source"]

LARGEST_ROW = 4 * 2**20
"""Most bytes of one row of a text file, about a million tokens. A longer one is a file without line ends."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A set of rows: `files` for local files, `path` for a `save_to_disk` folder or a hub name."""

    path: str
    format: str
    """jsonl, parquet, csv, disk or hub."""
    name: str | None
    revision: str | None
    split: str
    start: int
    """Number of the first row to read, from 0."""
    stop: int | None
    """Number of the row to stop before; None: read to the end."""
    files: tuple[Path, ...]
    columns: Mapping[str, str]
    streaming: bool
    all_columns: bool = False
    """Read also the columns that a pair does not use, if the format could skip them."""
    roles: Mapping[str, str] | None = None
    """Names of those who speak, ours to the rows' (`data.roles`)."""


@dataclass(frozen=True)
class Row:
    """One row of the source, not yet decoded."""

    number: int
    """Position in the source, from 0."""
    place: str
    """Place for people: file and line, or dataset and row."""
    load: Callable[[], Mapping[str, Any]]
    """Decode the row. Raises BadRow if it is damaged."""
