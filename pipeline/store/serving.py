"""Find the stores that serve a run as they are, or say which command makes the missing ones."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.base.errors import DataError
from pipeline.base.folders import Folder, open_folder
from pipeline.config.schema import Config
from pipeline.models.identity import differences
from pipeline.store import format
from pipeline.store.finishing import lost_parts
from pipeline.store.store import Store, is_finished, load_store, open_store, plan_differences

__all__ = ["open_stores", "remedy_for_missing", "serving_store"]


def serving_store(
    folder: Folder, identity: Mapping[str, Any], plan: Mapping[str, Any], exact: int | None
) -> Store | None:
    """Give a finished store that a run with another identity or plan can be joined with; None if there is none.

    It was scored with a larger `max_length`, or imported. `exact` is the reference's `exact_length`.

    Raises:
        DataError: A manifest or an index is damaged.
    """
    if folder.size(format.MANIFEST) is None or not is_finished(folder):
        return None
    store = load_store(folder)
    stored = store.manifest["identity"]
    other_plan = [] if store.is_imported else plan_differences(store.manifest["plan"], plan)
    is_equal = not differences(stored, identity, joining=False) and not store.is_imported
    if is_equal or other_plan or differences(stored, identity, joining=True, exact=exact) or lost_parts(store):
        return None
    return store


def open_stores(config: Config, names: Iterable[str]) -> dict[str, Store]:
    """Open the finished stores of sets.

    Raises:
        DataError: A set has no store; the message says which command makes it.
        UnfinishedError: Parts are missing.
    """
    output = open_folder(config.precompute.output)
    stores: dict[str, Store] = {}
    for name in names:
        if (folder := output.child(name)).size(format.MANIFEST) is None:
            _raise_missing(config, name, folder, any(store.is_imported for store in stores.values()))
        stores[name] = open_store(folder)
    return stores


def remedy_for_missing(store: Store) -> str:
    """Say what to do if pairs of the dataset are not in a finished store."""
    anyway = "To train without these pairs, set train.on_missing: drop"
    if store.is_imported:
        return f"Import a file that has them with refshard import --overwrite. {anyway}"
    reuse = ""
    if store.manifest["identity"]["tokenization"]["token_logps"]:
        reuse = f" and precompute.reuse: [{store.folder}], which copies the pairs that are scored already"
    return (
        "If the dataset has changed since they were scored, run refshard precompute with a new precompute.output"
        f"{reuse}. If it has not, run refshard precompute --overwrite, which scores all again. {anyway}"
    )


def _raise_missing(config: Config, name: str, folder: Folder, others_are_imported: bool) -> None:
    imports, scores = f"refshard import FILE --config F --set {name}", "refshard precompute --config F"
    remedy = scores
    if config.reference.declared is not None:
        remedy = imports
    elif others_are_imported:
        remedy = f"{imports}, or {scores}, which scores what is not imported with the reference"
    raise DataError(f"{folder}: no shards there. Run: {remedy}")
