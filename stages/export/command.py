"""Write the reference's log-probs for other trainers, which read them from columns or from a file of their own."""

import dataclasses
import shutil
import uuid
from pathlib import Path

from pipeline.base.errors import ConfigError, DataError
from pipeline.base.files import storage_errors, sync_tree
from pipeline.base.progress import say, say_loading
from pipeline.config.schema import Config
from pipeline.data.sources import open_source
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.models.lengths import exact_length_of_reference
from pipeline.run.outputs import guard_output
from pipeline.store.dating import with_template_date
from pipeline.store.serving import open_stores
from pipeline.store.store import check_identity
from stages.export import as_datasets, as_fairseq2, as_open_instruct
from stages.export.scored import ScoredSet

__all__ = ["run"]

_NEXT = {
    "datasets": "The dataset is in {output}; datasets.load_from_disk reads it",
    "fairseq2": "The lines are in {output}; name one of its folders as the path of fairseq2's dataset",
    "open-instruct": "The file is {output}; copy it to the path that open-instruct logs as its cache",
}


def run(config: Config, output: Path, *, form: str = "datasets", tokenized: Path | None = None) -> None:
    """Write the log-probs of every set: a datasets folder, fairseq2's lines, or open-instruct's file.

    Rows that refshard drops are left out, so that the other trainer sees exactly the scored pairs. The sums are those
    of the run's `max_length` and `ld_alpha`.

    Raises:
        ConfigError: `tokenized` is missing, or given for another form than open-instruct's.
        DataError: The output exists, a pair was not scored, or the rows do not fit the form.
        IdentityError: The shards are of another reference or tokenization.
        StorageError: The disk is full or failing.
        UnfinishedError: A store is unfinished.
    """
    if (tokenized is not None) != (form == "open-instruct"):
        given = "nothing" if tokenized is None else tokenized
        raise ConfigError(f"--tokenized: must be given with --format open-instruct and not without, got {given}")
    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: must be a new folder or file, it exists already. Name another one")
    guard_output("OUTPUT", output, config)
    sources = {name: open_source(config.data, name) for name in config.data.names}
    stores = open_stores(config, config.data.names)
    say_loading()
    tokenizer = load_tokenizer(config)
    config = with_template_date(config, tokenizer)
    check_identity(list(stores.values()), identity_of_run(config, tokenizer), exact_length_of_reference(config))
    work = output.with_name(f".tmp-{uuid.uuid4().hex}")
    sets = {}
    for name in config.data.names:
        of_set = dataclasses.replace(config, data=config.data.of(name))
        source = dataclasses.replace(sources[name], all_columns=form == "datasets")
        sets[name] = ScoredSet(of_set, source, tokenizer, stores[name], work)
    try:
        with storage_errors(output):
            work.mkdir(parents=True)
            if form == "datasets":
                as_datasets.write(sets, work / "made", work / "cache")
            elif form == "fairseq2":
                as_fairseq2.write(sets, work / "made")
            elif tokenized is not None:
                averages = config.loss.types == ["sigmoid_norm"]
                as_open_instruct.write(sets.values(), tokenized, work / "made", averages=averages)
            sync_tree(work / "made")
            (work / "made").rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(_NEXT[form].format(output=output))
