"""Write sets as a datasets folder with `ref_chosen_logps` and `ref_rejected_logps` beside the data's columns."""

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import BadRow, DataError, RefshardError, number_of
from pipeline.base.progress import say
from pipeline.data.sources import describe, read_rows
from stages.export.scored import ScoredSet

__all__ = ["write"]


def write(sets: Mapping[str, ScoredSet], folder: Path, cache: Path) -> None:
    """Write every set with all its columns; `cache` is a folder for the library's files.

    Raises:
        DataError: A pair was not scored, or the rows do not fit one table.
        OSError: The disk is full or failing.
    """
    import datasets

    made = {}
    for name, scored in sets.items():
        try:
            made[name] = datasets.Dataset.from_generator(_Rows(scored), cache_dir=str(cache), split=name)
        except datasets.exceptions.DatasetGenerationError as error:
            cause = error.__cause__
            if isinstance(cause, RefshardError | OSError):
                raise cause from error
            where = describe(scored.source)
            raise DataError(f"{where}: its rows do not fit one table: {' '.join(str(cause).split())}") from error
        say(f"{name}: {number_of(len(made[name]), 'pair')}; {scored.summary()}")
    datasets.DatasetDict(made).save_to_disk(str(folder))


class _Rows:
    """Generator of one set's rows for the datasets library."""

    def __init__(self, scored: ScoredSet) -> None:
        self._scored = scored

    def __call__(self) -> Iterator[dict[str, Any]]:
        # Lines of JSON may differ in their columns; the library takes the first row's for those of all.
        source = self._scored.source
        names: dict[str, None] = {}
        for line in read_rows(source) if source.format == "jsonl" else ():
            with contextlib.suppress(BadRow):
                names |= dict.fromkeys(line.load())
        for row in self._scored:
            sums = {"ref_chosen_logps": row.chosen_logps, "ref_rejected_logps": row.rejected_logps}
            yield {**names, **(row.outcome.values or {}), **sums}

    def __reduce__(self) -> Any:
        # The library names its cache after a pickle of the generator; this one's cache is deleted.
        return uuid.uuid4, ()
