"""Read stores as Arrow, and look up the pairs of a dataset in one by their content."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.base.errors import ConfigError, DataError, number_of

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.intake import Outcome
    from pipeline.store.store import Store as StoredParts

__all__ = ["Store", "open_store", "reference_columns"]

_ROWS_AT_ONCE = 1024
_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Store:
    """A finished store: the reference's log-probs of one set of pairs."""

    parts: "StoredParts" = dataclasses.field(repr=False)

    @property
    def folder(self) -> str:
        """Folder or URL of the store."""
        return str(self.parts.folder)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Content of manifest.json, which docs/shard-format.md describes."""
        return self.parts.manifest

    def __len__(self) -> int:
        """Return the number of pairs."""
        return sum(part["rows"] for part in self.parts.index["parts"])

    def __repr__(self) -> str:
        return f"Store({self.folder!r}, {number_of(len(self), 'pair')})"

    def pairs(self, columns: Sequence[str] | None = None) -> Iterator["pa.RecordBatch"]:
        """Yield the pairs in the rows' order, a part at a time, each checked against its SHA-256.

        Args:
            columns: Names of the columns to read; all of them if left out. docs/shard-format.md describes them.

        Raises:
            ConfigError: There is no such column.
            DataError: A part is missing or damaged.
        """
        from pipeline.store.format import schema
        from pipeline.store.store import read_parts

        known = schema(token_logps=self.manifest["identity"]["tokenization"]["token_logps"]).names
        if unknown := [name for name in columns or () if name not in known]:
            raise ConfigError(f"columns: must be names of {', '.join(known)}, got {unknown[0]!r}. Correct it")
        for table in read_parts(self.parts, columns):
            yield from table.combine_chunks().to_batches()


def open_store(folder: Path | str) -> Store:
    """Open a store: `OUTPUT/train`, or OUTPUT if there is only one in it; also `s3://...`.

    Raises:
        DataError: There is no store, there are several, or a file of it is damaged.
        UnfinishedError: Parts are missing.
    """
    from pipeline.store import store

    found = store.find_stores(folder)
    if len(found) > 1:
        raise DataError(f"{folder}: must be one store, got {', '.join(map(str, found))}. Name one of them")
    return Store(store.open_store(found[0]))


def reference_columns(
    dataset: "datasets.Dataset",
    store: Store,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    on_missing: Literal["stop", "drop"] = "stop",
) -> "datasets.Dataset":
    """Add the columns `ref_chosen_logps` and `ref_rejected_logps` to preference pairs, as other trainers read them.

    A pair is found by its token ids, so rows may be in any order, filtered or mixed. The log-probs are sums in nats, of
    the completions as the store cut them (`max_length`).

    Args:
        dataset: Rows in the layout that was scored.
        store: The reference's log-probs.
        tokenizer: The tokenizer that the pairs were scored with, its chat template included.
        on_missing: Raise at rows that the store does not have, or drop them.

    Raises:
        ConfigError: The dataset is of another kind or has these columns already, or `on_missing` is unknown.
        DataError: Rows are not in the store; the message says how many, and the likely cause.
    """
    import datasets
    import numpy as np

    from pipeline.store.reference_table import load_reference_table

    if on_missing not in ("stop", "drop"):
        raise ConfigError(f"on_missing: must be 'stop' or 'drop', got {on_missing!r}. Choose one of them")
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(f"dataset: must be a datasets.Dataset, got {type(dataset).__name__}. Name one of its splits")
    if there := [name for name in _COLUMNS if name in dataset.column_names]:
        raise ConfigError(f"dataset: must not have the column {there[0]} yet. Remove it with remove_columns")
    table = load_reference_table([store.parts], store.manifest["identity"]["tokenization"]["max_length"])
    sums, found = np.full((len(dataset), 2), np.nan, np.float32), np.zeros(len(dataset), dtype=bool)
    first: Outcome | None = None
    rows = _outcomes(dataset, store, tokenizer)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        at, stored = table.look_up([outcome.key or b"" for outcome in chunk])
        numbers = [outcome.row.number for outcome in chunk]
        found[numbers] = at >= 0
        sums[numbers] = np.stack([stored["chosen_logps"], stored["rejected_logps"]], axis=1)
        first = first or next((outcome for outcome, hit in zip(chunk, at >= 0, strict=True) if not hit), None)
    if first is not None and on_missing == "stop":
        raise DataError(_missing(int((~found).sum()), first, store, tokenizer))
    if first is not None:
        dataset = dataset.select(np.flatnonzero(found))
    for i, name in enumerate(_COLUMNS):
        dataset = dataset.add_column(name, sums[found, i])
    return dataset


def _outcomes(dataset: "datasets.Dataset", store: Store, tokenizer: "PreTrainedTokenizerBase") -> Iterator["Outcome"]:
    """Read and tokenize the rows as stage one did."""
    from pipeline.config.data import DataConfig
    from pipeline.data.intake import outcome_of
    from pipeline.data.rows import Row

    tokenization, read = store.manifest["identity"]["tokenization"], store.manifest["declared"].get("data", {})
    data = DataConfig(
        path="dataset",
        columns=read.get("columns") or {},
        roles=read.get("roles"),
        random_rejected=read.get("random_rejected"),
        max_length=tokenization["max_length"],
        template_date=tokenization.get("template_date"),
    )
    for number, row in enumerate(dataset.with_format(None)):
        yield outcome_of(Row(number, f"row {number}", functools.partial(dict, row)), tokenizer, data)


def _missing(count: int, first: "Outcome", store: Store, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say how many rows a store does not have, which is the first, and why, as far as it is known."""
    from pipeline.models.identity import TokenizerFacts, describe_differences, identity_of_tokenizer

    now = identity_of_tokenizer(TokenizerFacts.of(tokenizer))
    differing = describe_differences({key: store.manifest["identity"]["tokenization"].get(key) for key in now}, now)
    why = f"; {first.error or first.dropped.replace('_', ' ')}" if first.dropped else ""
    cause = f" The tokenizer is another one than the store's: {'; '.join(differing)}." if differing else ""
    return (
        f"dataset: must have only pairs of {store.folder}, got {number_of(count, 'row')} without log-probs in it "
        f"(first: row {first.row.number}{why}).{cause} Score them, or pass on_missing='drop'"
    )
