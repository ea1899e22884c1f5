"""Write a dataset with the reference's log-probs as columns, for trainers that read `ref_chosen_logps` from it."""

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.base.errors import BadRow, DataError, RefshardError, StorageError, number_of
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger, kept_rows
from pipeline.data.rows import Source
from pipeline.data.sources import describe, open_source, read_rows
from pipeline.models.files import load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.models.lengths import exact_length_of_reference
from pipeline.run.outputs import guard_output
from pipeline.store.dating import with_template_date
from pipeline.store.reference_table import load_reference_table
from pipeline.store.serving import open_stores, remedy_for_missing
from pipeline.store.store import Store, check_identity

__all__ = ["run"]


def run(config: Config, output: Path) -> None:
    """Write every set, with all its columns and `ref_chosen_logps` and `ref_rejected_logps`, as a datasets folder.

    Rows that refshard drops are left out, so that the other trainer sees exactly the scored pairs. The sums are those
    of the run's `max_length` and `ld_alpha`.

    Raises:
        DataError: The output exists, a pair was not scored, or the rows do not fit one table.
        IdentityError: The shards are of another reference or tokenization.
        UnfinishedError: A store is unfinished.
    """
    import datasets

    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: must be a new folder, it exists already. Name another one")
    guard_output("--output", output, config)
    tokenizer = load_tokenizer(config)
    config = with_template_date(config, tokenizer)
    names = config.data.names
    stores = open_stores(config, names)
    check_identity(list(stores.values()), identity_of_run(config, tokenizer), exact_length_of_reference(config))
    work = output.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        work.mkdir(parents=True)
        sets = {}
        for name in names:
            of_set = dataclasses.replace(config, data=config.data.of(name))
            source = dataclasses.replace(open_source(config.data, name), all_columns=True)
            rows = _Rows(of_set, source, tokenizer, stores[name], work)
            sets[name] = datasets.Dataset.from_generator(rows, cache_dir=str(work / "cache"), split=name)
            say(f"{name}: {number_of(len(sets[name]), 'pair')}; {rows.ledger.summary()}")
        datasets.DatasetDict(sets).save_to_disk(str(work / "sets"))
        (work / "sets").rename(output)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, RefshardError):
            raise cause from error
        raise DataError(f"{describe(source)}: its rows do not fit one table: {' '.join(str(cause).split())}") from error
    except OSError as error:
        raise StorageError(f"{output}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"The dataset is in {output}; datasets.load_from_disk reads it")


@dataclasses.dataclass
class _Rows:
    """Generator of one set's rows for the datasets library."""

    config: Config
    source: Source
    tokenizer: Any
    store: Store
    work: Path
    """Folder for files that are needed while it runs"""
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    def __call__(self) -> Iterator[dict[str, Any]]:
        data, alpha = self.config.data, self.config.loss.ld_alpha
        table = load_reference_table([self.store], data.max_length, ld_alpha=alpha, folder=self.work)
        self.ledger = Ledger()
        # Lines of JSON may differ in their columns; the library takes the first row's for those of all.
        names: dict[str, None] = {}
        for line in read_rows(self.source) if self.source.format == "jsonl" else ():
            with contextlib.suppress(BadRow):
                names |= dict.fromkeys(line.load())
        for pair, row in kept_rows(read_rows(self.source), self.tokenizer, data, self.ledger):
            (at,), (found,) = table.look_up([pair.key])
            if at >= 0:
                sums = {f"ref_{side}_logps": float(found[f"{side}_logps"]) for side in ("chosen", "rejected")}
                yield {**names, **row, **sums}
            elif self.config.train.on_missing != "drop":
                raise DataError(
                    f"{pair.place} of {describe(self.source)} has no reference logps in {self.store.folder}. "
                    f"{remedy_for_missing(self.store)}"
                )

    def __reduce__(self) -> Any:
        # The library names its cache after a pickle of the generator; this one's cache is deleted.
        return uuid.uuid4, ()
