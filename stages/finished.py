"""Answer `precompute` and `train` when there is nothing left to do, without the libraries that score and train.

Everything that the full commands compare is compared here too: settings, data, weights, tokenizer, manifests, indexes,
sizes of parts, the run's record. Only what the libraries say of tokenizer and settings is recalled. In any doubt, and
for every error, the full command runs and says what there is to say.
"""

from typing import Any

from pipeline.base.errors import RefshardError
from pipeline.base.folders import open_folder
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.identity import TokenizerFacts, identity_of_run
from pipeline.models.recollection import Recollection
from pipeline.run.checkpoints import is_recorded
from pipeline.run.identity import check_same_run, is_longer, run_identity
from pipeline.run.outputs import guard_run, guard_shards
from pipeline.run.reading import read_record
from pipeline.store.dating import with_template_date
from pipeline.store.finishing import lost_parts
from pipeline.store.format import MANIFEST
from pipeline.store.plan import declared_of, plan_of, report_of
from pipeline.store.reuse import open_reusable
from pipeline.store.serving import serving_store
from pipeline.store.store import check_identity, create_store, is_finished, load_store, open_store
from stages.early import is_launched

__all__ = ["reported_run", "reported_stores"]


def reported_stores(config: Config) -> bool:
    """Report the stores if all of them are finished and this run's. Return False if the full command must look."""
    if config.precompute.tp_plan is not None or (known := _recalled("precompute", config)) is None:
        return False
    try:
        reports = _reports(config, known)
    except (RefshardError, OSError):
        return False
    for report in reports or ():
        say(report)
    return reports is not None


def reported_run(config: Config) -> bool:
    """Report the run if it is finished and the settings' own. Return False if the full command must look."""
    if (known := _recalled("train", config)) is None:
        return False
    try:
        return _is_this_run(config, known)
    except (RefshardError, OSError):
        return False


def _recalled(command: str, config: Config) -> dict[str, Any] | None:
    """Give what the command found out before; None where more than one process or reference takes part."""
    if is_launched() or config.reference.sync is not None:
        return None
    known = Recollection(command, config).recall()
    try:
        return None if known is None else {**known, "tokenizer": TokenizerFacts(**known["tokenizer"])}
    except (KeyError, TypeError):  # not as this program writes it
        return None


def _reports(config: Config, known: dict[str, Any]) -> list[str] | None:
    """Give a line for each set; None if a store is not there, not finished, or lacks a part."""
    guard_shards(config)
    if not config.train.is_empty:
        guard_run(config)
    sources = {name: open_source(config.data, name) for name in config.data.names}
    folders = {name: open_folder(config.precompute.output).child(name) for name in sources}
    for folder in folders.values():
        if folder.size(MANIFEST) is None or not is_finished(folder) or lost_parts(load_store(folder)):
            return None
    config = with_template_date(config, known["tokenizer"])
    identity = identity_of_run(config, known["tokenizer"])
    reusable = open_reusable(config.precompute.reuse, identity)
    reports = {}
    for name, source in sources.items():
        plan, folder = plan_of(config, source, reusable, None), folders[name]
        serves = serving_store(folder, identity, plan, known["exact_length"]) is not None
        if not serves:
            # With a manifest there, this compares and writes nothing.
            create_store(folder, identity, plan, declared_of(config, source))
        reports[name] = report_of(name, folder, config if serves else None)
    # That they are enough to train on was checked.
    if {name: kept for name, (_, kept) in reports.items()} != known["kept"]:
        return None
    return [report for report, _ in reports.values()]


def _is_this_run(config: Config, known: dict[str, Any]) -> bool:
    output = config.train.folder
    guard_run(config)
    if not is_recorded(output):
        return False
    config = with_template_date(config, known["tokenizer"])
    scored = config.data.names if config.loss.needs_reference else ()
    stores = {name: open_store(open_folder(config.precompute.output).child(name)) for name in scored}
    if stores:
        check_identity(list(stores.values()), identity_of_run(config, known["tokenizer"]), known["exact_length"])
    fingerprints = {name: store.fingerprint for name, store in stores.items()}
    record, identity = read_record(output), run_identity(config, fingerprints, 1, known["training"])
    check_same_run(output, record.get("identity", {}), identity)
    if is_longer(record.get("identity", {}), identity) or (known["pushes"] and "pushed_to" not in record):
        return False
    say(f"{output}: this run is finished already; nothing to do.")
    return True
