"""The plan of a store, and the report of a finished one. Needs no torch."""

import hashlib
from typing import Any

from pipeline.base.errors import DataError, number_of
from pipeline.base.folders import Folder
from pipeline.config.columns import LOSS_COLUMNS
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger
from pipeline.data.rows import Source
from pipeline.data.sources import describe, digests_of_data
from pipeline.models.files import declared_reference
from pipeline.store.reuse import Reusable
from pipeline.store.store import open_store

__all__ = ["declared_of", "plan_of", "report_of", "rules_of_reading"]


def report_of(name: str, folder: Folder, config: Config | None = None) -> tuple[str, int]:
    """Sum up a set's finished store in a line, and give its number of pairs. Raises DataError if there are none.

    `config` are the settings of a run that another run's store serves.
    """
    store = open_store(folder)
    totals = Ledger()
    totals.add(dict(store.index["totals"]))
    where = f"in {folder} ({number_of(len(store.units), 'part')})"
    if config is not None:
        for_what = "this run" if store.is_imported else f"max_length {config.data.max_length}"
        return f"{name}: these shards serve {for_what} as they are; {where}", totals.kept
    if totals.kept == 0:
        raise DataError(f"{folder}: no pair was kept, so there is nothing to train on: {totals.summary()}")
    return f"{name}: {totals.summary()}; {where}", totals.kept


def plan_of(config: Config, source: Source, reusable: Reusable, rows: frozenset[int] | None) -> dict[str, Any]:
    """Give what a part's content depends on besides the identity; a store is continued only if all of it is equal.

    `data.on_bad_row` is left out: no part holds a bad row. So a run that stopped at one can resume with `skip`.
    """
    of_window = {}
    if rows is not None:
        digest = hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()
        of_window = {"window": f"{len(rows)} pairs in the order of training ({digest[:12]})"}
    remote = {"path": source.path, "name": source.name, "revision": source.revision}
    return {
        **of_window,
        "rows_per_shard": config.precompute.rows_per_shard,
        "on_identical": config.data.on_identical,
        **rules_of_reading(config.data, source),
        "reuse": [store.digest for store in reusable.stores],
        "rows": f"{source.start}:{'' if source.stop is None else source.stop}",
        # Local data is identified by content: a moved file is the same, an edited one is not.
        "dataset": digests_of_data(source) or remote,
        "split": source.split,
    }


def declared_of(config: Config, source: Source) -> dict[str, Any]:
    """Describe reference and source for people who read the manifest."""
    range_of_rows = "" if (source.start, source.stop) == (0, None) else f"[{source.start}:{source.stop or ''}]"
    return {
        **declared_reference(config),
        "dataset": describe(source),
        # The settings of `data` that read the set's rows again.
        "data": {
            "path": source.path,
            "name": source.name,
            "revision": source.revision,
            "split": source.split + range_of_rows,
            "format": source.format,
            **rules_of_reading(config.data, source),
            "streaming": source.streaming,
        },
        "tokens_per_batch": config.precompute.tokens_per_batch,
    }


def rules_of_reading(data: DataConfig, source: Source) -> dict[str, Any]:
    """Give what rows are read as pairs by. A rule that is not set is left out, as plans of earlier versions have it."""
    rules = {"roles": source.roles or None, "random_rejected": data.random_rejected}
    return {
        # Weights and margins do not change what is scored.
        "columns": {name: column for name, column in source.columns.items() if name not in LOSS_COLUMNS},
        **{name: rule for name, rule in rules.items() if rule is not None},
    }
