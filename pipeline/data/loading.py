"""Units of a source, read and tokenized in loader processes, in order, while their taker does something else.

    loader 0:  unit 0, unit 2, ...  \
                                      bounded queue -> the taker, one unit at a time
    loader 1:  unit 1, unit 3, ...  /

Every loader reads the whole source, but decodes and tokenizes the rows of its own units alone; finding a row costs
little beside tokenizing it. Where there is little to do, no process is started and the taker does it all.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.base.errors import UnfinishedError
from pipeline.base.signals import work_unsignalled
from pipeline.config.schema import DataConfig
from pipeline.data.intake import KeptPair, Ledger, kept_pairs
from pipeline.data.rows import Row, Source
from pipeline.data.sources import count_rows, read_rows
from pipeline.data.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Unit",
    "UnitQueue",
    "count_loaders",
    "load_pairs",
    "survey_pairs",
]

# A process and its queue cost about a tenth of a second, in which a few hundred rows are tokenized.
_FEW_ROWS = 512


# Rows of a unit where nothing asks for another size: enough to make the way between processes cheap.
_ROWS_PER_UNIT = 256


# Loaders where nothing but tokenization goes on; the one process that takes their pairs keeps up with about so many.
_MOST_LOADERS = 8


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The kept pairs of consecutive rows, and what became of the others."""

    number: int
    """Position among all units of the source, from 0"""
    pairs: list[KeptPair]
    """Left out of a unit with a survey"""
    ledger: Ledger
    survey: Survey | None = None


def count_loaders(source: Source, rows: int | None, rows_per_unit: int, *, most: int) -> int:
    """How many loader processes are worth it; 0 where reading in line is as quick.

    Args:
        source: What is read.
        rows: Rows that there are to be tokenized, where that is known.
        rows_per_unit: What one loader tokenizes at a time.
        most: Upper limit.
    """
    if rows is None and source.stop is not None:
        rows = source.stop - source.start
    if rows is not None and (rows <= _FEW_ROWS or rows <= rows_per_unit):
        return 0
    if multiprocessing.current_process().daemon:
        # Such a process may have no children.
        return 0
    holds_an_array = any(".json" in file.suffixes for file in source.files)
    if (source.format == "hub" and source.streaming) or holds_an_array:
        # Each loader would fetch the whole stream again, or hold all that may be a JSON array.
        most = 1
    if rows is not None:
        most = min(most, -(-rows // rows_per_unit))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun's processes share the machine; one CPU is for the process that takes the units.
    return max(1, min(most, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class UnitQueue:
    """Gives the units of a source in order, each tokenized as a whole.

        with UnitQueue(...) as units:
            for unit in units:
                ...
        units.num_units

    No loader is more than two units ahead of the taker. An error in a loader is raised where its unit would have come,
    as if there were no loaders, with the loader's traceback as a note.

    Args:
        source: Where the rows are.
        tokenizer: Tokenizes them.
        data: What is kept and how it is cut.
        rows_per_unit: Consecutive rows of a unit.
        wanted: Numbers of the rows that count; the others are passed over, and units cut from those that remain.
        share: (I, N): give the units whose number leaves I when divided by N.
        is_done: Tells by its number that a unit is not needed any more; asked when its turn to be read comes.
        num_loaders: Processes that read and tokenize; 0: none but this one.
        survey_batch: Survey each unit in place of its pairs; compare with padded batches of so many pairs.
    """

    num_units: int
    """Units of the whole source, other shares and those done included; known once the last unit was given."""

    def __init__(
        self,
        source: Source,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        rows_per_unit: int,
        wanted: frozenset[int] | None = None,
        share: tuple[int, int] = (0, 1),
        is_done: Callable[[int], bool] | None = None,
        num_loaders: int = 0,
        survey_batch: int | None = None,
    ) -> None:
        # A fork starts in milliseconds, and loaders touch neither model nor device. Elsewhere it is not safe or absent.
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._num_loaders = num_loaders
        self._stream = _UnitStream(
            source,
            tokenizer,
            data,
            rows_per_unit=rows_per_unit,
            wanted=wanted,
            share=share,
            is_done=is_done,
            survey_batch=survey_batch,
            # Without a lock of its own: it is read in a signal handler.
            closing=self._context.RawValue("b", 0) if num_loaders else None,
        )
        self._items: Any = None

    def __enter__(self) -> "UnitQueue":
        return self

    def __iter__(self) -> Iterator[Unit]:
        self._items = self._start() if self._num_loaders else self._stream.read(0, 1)
        while (item := self._next()) is not None:
            match item:
                case _Failure():
                    raise item.error
                case Unit():
                    yield item
                case _End():
                    self.num_units = item.num_units
                case _Skipped():
                    pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        # Raised by the library at whatever this process is doing when a loader dies.
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise UnfinishedError(
                f"a process that reads and tokenizes was ended from outside ({error}), maybe for lack of memory; "
                "finished units are saved. Run the same command again"
            ) from error

    def close(self) -> None:
        """Have the loaders leave, at the end of the row that they are at."""
        if self._stream.closing is not None:
            atexit.unregister(self.close)
            self._stream.closing.value = 1
        # With its last reference goes the iterator, which waits for its loaders.
        self._items = None

    def _start(self) -> Any:
        # Loaders left to the end of the process would be told to end, and would not know that it is meant.
        atexit.register(self.close)
        # A text at a time needs no threads, and some versions of the tokenizers warn in a fork of those they had.
        with _default_environment("TOKENIZERS_PARALLELISM", "false"):
            return iter(
                DataLoader(
                    self._stream,
                    batch_size=None,
                    num_workers=self._num_loaders,
                    # Of one loader two units, for one may take longer than the next.
                    prefetch_factor=2 if self._num_loaders == 1 else 1,
                    collate_fn=_as_it_is,
                    worker_init_fn=functools.partial(_start_loader, self._stream.closing),
                    multiprocessing_context=self._context,
                    # Otherwise the run's own random numbers would move on by one.
                    generator=torch.Generator(),
                )
            )

    def _next(self) -> Any:
        return next(self._items, None)


def load_pairs(
    source: Source, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, ledger: Ledger
) -> Iterator[KeptPair]:
    """Yield the kept pairs of a whole source as `kept_pairs` does, tokenized in loader processes.

    The books are kept a unit at a time, so they are right once the last pair was given.
    """
    num_loaders = count_loaders(source, count_rows(source), _ROWS_PER_UNIT, most=_MOST_LOADERS)
    with UnitQueue(source, tokenizer, data, rows_per_unit=_ROWS_PER_UNIT, num_loaders=num_loaders) as units:
        for unit in units:
            ledger.add(unit.ledger.as_dict())
            ledger.skipped += unit.ledger.skipped
            yield from unit.pairs


def survey_pairs(
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    ledger: Ledger,
    *,
    rows_per_unit: int,
    batch_pairs: int,
) -> Survey:
    """Survey the pairs of a whole source, in loader processes; the ledger learns what `kept_pairs` would tell it.

    Args:
        source: Where the rows are.
        tokenizer: Tokenizes them.
        data: What is kept and how it is cut.
        ledger: Keeps the books, but for the list of what was skipped.
        rows_per_unit: Consecutive rows among which a prompt is computed once.
        batch_pairs: Pairs of the padded batches that are compared with.
    """
    num_loaders = count_loaders(source, count_rows(source), rows_per_unit, most=_MOST_LOADERS)
    whole = Survey(batch_pairs)
    with UnitQueue(
        source, tokenizer, data, rows_per_unit=rows_per_unit, num_loaders=num_loaders, survey_batch=batch_pairs
    ) as units:
        for unit in units:
            assert unit.survey is not None
            ledger.add(unit.ledger.as_dict())
            whole.add(unit.survey)
    return whole


@dataclass(frozen=True)
class _Skipped:
    """Stands where a unit would be that is done already, so that the units behind it keep their turns."""


@dataclass(frozen=True)
class _End:
    num_units: int


@dataclass(frozen=True)
class _Failure:
    """An error on its way to the main process; the library would raise one of its own making."""

    error: Exception


class _Closing(Exception):
    """Nobody takes units any more."""


class _UnitStream(IterableDataset[Any]):
    """What a loader runs: reads all rows, gives the units that are its own, then the number of all units."""

    def __init__(
        self,
        source: Source,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        rows_per_unit: int,
        wanted: frozenset[int] | None,
        share: tuple[int, int],
        is_done: Callable[[int], bool] | None,
        survey_batch: int | None,
        closing: Any,
    ) -> None:
        self._source, self._tokenizer, self._data = source, tokenizer, data
        self._rows_per_unit, self._wanted, self._share, self._is_done = rows_per_unit, wanted, share, is_done
        self._survey_batch = survey_batch
        self.closing = closing

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self.read(info.id, info.num_workers)
        except _Closing:
            return
        except Exception as error:
            yield _Failure(_portable(error))

    def read(self, loader: int, num_loaders: int) -> Iterator[Any]:
        """Give what is due at every `num_loaders`-th turn; whose turn it is depends on the unit's number alone."""
        index, count = self._share
        unit = -1
        for unit, rows in self._units():
            if unit % count != index or unit // count % num_loaders != loader:
                continue
            if self._is_done is not None and self._is_done(unit):
                yield _Skipped()
                continue
            yield self._read_unit(unit, rows)
        yield _End(unit + 1)

    def _read_unit(self, number: int, rows: Iterator[Row]) -> Unit:
        ledger = Ledger()
        if self._survey_batch is None:
            pairs = list(kept_pairs(rows, self._tokenizer, self._data, ledger))
            return Unit(number=number, pairs=pairs, ledger=ledger)
        survey = Survey(self._survey_batch)
        for _ in kept_pairs(rows, self._tokenizer, self._data, ledger, survey):
            pass
        survey.close()
        # Of a million bad rows the survey has a few examples.
        ledger.skipped.clear()
        return Unit(number=number, pairs=[], ledger=ledger, survey=survey)

    def _units(self) -> Iterator[tuple[int, Iterator[Row]]]:
        """Cut the source, or its wanted rows, into units, numbered from 0; unread rows are never decoded."""
        for unit, group in groupby(enumerate(self._rows()), key=lambda item: item[0] // self._rows_per_unit):
            yield unit, (row for _, row in group)

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self._source):
            if self.closing is not None and self.closing.value:
                raise _Closing
            if self._wanted is None or row.number in self._wanted:
                yield row


def _as_it_is(item: Any) -> Any:
    return item


def _start_loader(closing: Any, loader: int) -> None:
    work_unsignalled(closing)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or one that says the same, if it can't travel between processes."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is not type(error) or str(copy) != str(error):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a process that reads and tokenizes:\n{trace}")
    return error


@contextlib.contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for a while, unless it is set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
