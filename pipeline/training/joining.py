"""Join the sets of a run to their stores, or take what an earlier run has joined: one Arrow file a set."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from pipeline.base.digests import WatchedFiles, read_sha256, sha256_of_files
from pipeline.base.errors import ConfigError, DataError, stopped_as_asked
from pipeline.base.progress import say
from pipeline.base.signals import StopFlag
from pipeline.config.columns import LOSS_COLUMNS
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.loading import load_pairs
from pipeline.data.sources import data_files, describe, open_source
from pipeline.models.files import NamedModel, files_of_model, find_adapter
from pipeline.models.identity import identity_of_run
from pipeline.models.lengths import exact_length_of_reference, length_error, most_positions
from pipeline.run.inputs import SetInputs
from pipeline.store.join import JoinReport, join
from pipeline.store.reference_table import TokenLogps, load_reference_table
from pipeline.store.serving import open_stores, remedy_for_missing
from pipeline.store.store import Store, check_identity
from pipeline.training.joined_cache import CachedSets, JoinedCache, cached_sets, read_joined, write_joined
from pipeline.training.mixture import Mixture, mix

__all__ = [
    "check_joined",
    "count_pairs",
    "join_sets",
    "joined_token_logps",
    "open_joined",
    "open_mixture",
    "open_stores_of_run",
    "watch_inputs",
    "watch_joined",
]


def watch_inputs(config: Config) -> tuple[WatchedFiles, WatchedFiles]:
    """Take the digests of the policy's files and of the sets'."""
    adapter = None if config.policy.adapter is None else find_adapter(config.policy.adapter, "policy.adapter")
    rows = [file for name in config.data.names for file in data_files(open_source(config.data, name))]
    return WatchedFiles(files_of_model(NamedModel.policy(config).folder(), adapter)), WatchedFiles(rows)


def open_stores_of_run(config: Config, names: Iterable[str], tokenizer: Any) -> dict[str, Store]:
    """Open the finished stores of sets. Raises IdentityError for one of another reference or tokenization."""
    stores = open_stores(config, names)
    if stores:
        check_identity(list(stores.values()), identity_of_run(config, tokenizer), exact_length_of_reference(config))
    return stores


def join_sets(
    config: Config,
    stores: Mapping[str, Store],
    tokenizer: Any,
    folder: Path,
    flag: StopFlag,
    *,
    window: int | None = None,
    cache: JoinedCache | None = None,
) -> dict[str, SetInputs]:
    """Join every set to its store, into files in `folder`; give what became of its rows, by set.

    Within a window, sets that are not used have no store. Pairs outside of the window are kept without logps, and so
    are all pairs for a loss without a reference. What the cache has is not joined again.

    Raises:
        DataError: Pairs have no reference logps, and `train.on_missing` is stop.
        ConfigError: The tokenizer gives an id, or a pair has a position, that the policy does not have.
        UnfinishedError: A signal or the time asked to stop.
    """

    def find() -> CachedSets | None:
        if cache is None:
            return None
        keep_missing = window is not None or not config.loss.needs_reference
        return cached_sets(cache.folder, config, stores, tokenizer, keep_missing=keep_missing)

    found = find()
    if found is not None and found.take(folder):
        for name in config.data.names:
            say(_summary(name, read_joined(folder)["sets"][name], config, window))
    else:
        sets = _join_anew(config, stores, tokenizer, folder, flag, window)
        made_from = None if found is None else found.made_from
        write_joined(folder, {"made_from": made_from, "files": _digests(folder, config.data.names), "sets": sets})
        # What changed while it was read is known by other digests than those of the rows that were read.
        if cache is not None and found is not None and cache.unchanged() and find() == found:
            found.keep(folder)
    sets = read_joined(folder)["sets"]
    return {name: _inputs_of(config, name, sets[name], stores.get(name)) for name in config.data.names}


def _inputs_of(config: Config, name: str, counts: Mapping[str, Any], store: Store | None) -> SetInputs:
    return SetInputs(
        dataset=describe(open_source(config.data, name)),
        ledger=counts["ledger"],
        matched=counts["matched"],
        missing=counts["missing"],
        tokens=counts["tokens"],
        store=None if store is None else str(store.folder),
        noise=None if store is None else dict(store.index["noise"]),
    )


def _summary(name: str, counts: Mapping[str, Any], config: Config, window: int | None) -> str:
    """Say what became of the rows of a set."""
    if window is not None:
        return f"{name}: {counts['matched']:,} of {counts['ledger']['kept']:,} pairs scored for window {window}"
    ledger = Ledger()
    ledger.add(counts["ledger"])
    if not config.loss.needs_reference:
        return f"{name}: {ledger.summary()}; no reference is needed"
    report = JoinReport(counts["matched"], counts["missing"], None, counts["surplus"])
    return f"{name}: {ledger.summary()}; {report.summary()}"


def _join_anew(
    config: Config, stores: Mapping[str, Store], tokenizer: Any, folder: Path, flag: StopFlag, window: int | None
) -> dict[str, dict[str, Any]]:
    """Join every set; give the counts of its rows, as they are recorded."""
    # Token logps are appended.
    _token_file(folder).unlink(missing_ok=True)
    sets, unscored = {}, window is not None or not config.loss.needs_reference
    # Sets are concatenated, so all have the numbers that one has: weight 1 and margin 0.
    named = {column for name in config.data.names for column in config.data.of(name).columns}
    numbers = [number for number in LOSS_COLUMNS if number in named]
    for name in config.data.names:
        source, store, ledger = open_source(config.data, name), stores.get(name), Ledger()
        read = load_pairs(source, tokenizer, config.data.of(name), ledger)
        pairs = _until_stopped(_within_model(read, config), flag)
        table = load_reference_table(
            [] if store is None else [store],
            config.data.max_length,
            ld_alpha=config.loss.ld_alpha,
            folder=folder,
            token_file=_token_file(folder),
        )
        # Held-out sets are evaluated as they are.
        if name in config.data.training and "weight" in numbers:
            pairs = _weighted(pairs, ledger)
        report = join(pairs, table, _joined_file(folder, name), keep_missing=unscored, numbers=numbers)
        columns = datasets.Dataset.from_file(str(_joined_file(folder, name))).data.table
        sets[name] = {
            "ledger": ledger.as_dict(),
            "matched": report.matched,
            "missing": report.missing,
            "surplus": report.surplus,
            "tokens": {
                side: int(pc.sum(pc.list_value_length(columns[f"{side}_ids"])).as_py() or 0)
                for side in ("prompt", "chosen", "rejected")
            },
        }
        say(_summary(name, sets[name], config, window))
        if not unscored:
            assert store is not None
            _check_matched(report, ledger.kept, describe(source), store, config.train.on_missing)
    return sets


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Take the digests of the files that were joined. Raises StorageError if a newer attempt has deleted one."""
    files = [_joined_file(folder, name) for name in names]
    digests = sha256_of_files(files)
    if any("token_start" in datasets.Dataset.from_file(str(file)).column_names for file in files):
        digests |= sha256_of_files([_token_file(folder)])
    return digests


def watch_joined(folder: Path) -> WatchedFiles:
    """Watch the files of the joined sets and of their token logps, which are in use until training ends."""
    return WatchedFiles(_joined_files(folder), "Run the same command again, which joins the sets anew")


def _joined_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".arrow", ".f32"))


def check_joined(folder: Path) -> None:
    """Compare the joined sets and their token logps, read whole, with their digests. Raises DataError."""
    for name, digest in read_joined(folder)["files"].items():
        file = folder / name
        if read_sha256(file) != digest:
            raise DataError(
                f"{file}: must hold what was joined, got other bytes. Check the disk, and run the command again"
            )


def open_joined(folder: Path, name: str) -> datasets.Dataset:
    """Open a joined set, memory-mapped; `check_joined` comes first."""
    return datasets.Dataset.from_file(str(_joined_file(folder, name)))


def open_mixture(config: Config, folder: Path, arguments: Any) -> Mixture:
    """Open the joined training sets as the one that an epoch has, chosen by the seed of the data's order."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return mix({name: open_joined(folder, name) for name in config.data.training}, config.data.sets, seed)


def joined_token_logps(folder: Path) -> TokenLogps:
    """Give the reference token logps that the joined sets' `token_start` counts in; `check_joined` comes first.

    A run without losses that need them has none.
    """
    return TokenLogps(_token_file(folder))


def count_pairs(config: Config, tokenizer: Any, flag: StopFlag) -> int:
    """Count the pairs of the training set that are kept. Raises UnfinishedError if asked to stop."""
    return sum(1 for _ in _until_stopped(load_pairs(open_source(config.data), tokenizer, config.data, Ledger()), flag))


def _joined_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.arrow"


def _token_file(folder: Path) -> Path:
    return folder / "token-logps.f32"


def _check_matched(report: JoinReport, kept: int, dataset: str, store: Store, on_missing: str) -> None:
    if report.missing and on_missing == "stop":
        raise DataError(
            f"{report.missing:,} of {kept:,} pairs of {dataset} have no reference logps in {store.folder} (first: "
            f"{report.first_missing}). {remedy_for_missing(store)}"
        )
    if report.matched == 0:
        raise DataError(f"{dataset}: none of its {kept:,} pairs is in {store.folder}; nothing to train on")


def _weighted(pairs: Iterable[KeptPair], ledger: Ledger) -> Iterator[KeptPair]:
    """Leave out the pairs of weight 0, so that a run is that of rows without them, and note them in the ledger."""
    for pair in pairs:
        if pair.weight > 0:
            yield pair
        else:
            ledger.noted["of_weight_0"] += 1


def _until_stopped(pairs: Iterable[KeptPair], flag: StopFlag) -> Iterator[KeptPair]:
    for pair in pairs:
        if flag:
            raise stopped_as_asked("there was nothing to save", "before training began")
        yield pair


def _within_model(pairs: Iterable[KeptPair], config: Config) -> Iterator[KeptPair]:
    """Check each pair's ids and positions: one past the embedding is a crash without a name on a GPU."""
    size, positions = getattr(NamedModel.policy(config).text_config(), "vocab_size", None), most_positions(config)
    for pair in pairs:
        ids = pair.pair
        if error := length_error(positions, pair.longest, pair.place, config):
            raise error
        top = max(max(ids.prompt_ids), max(ids.chosen_ids), max(ids.rejected_ids))
        if size is not None and top >= size:
            raise ConfigError(
                f"policy.model: {pair.place} holds token id {top}, but the model's vocabulary has {size}; its weights "
                "and its tokenizer do not belong together"
            )
        yield pair
