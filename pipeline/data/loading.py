"""Read and tokenize the units of a source in loader processes, in order, while the consumer does something else.

    loader 0:  unit 0, unit 2, ...  \
                                      bounded queue -> consumer, one unit at a time
    loader 1:  unit 1, unit 3, ...  /

Every loader reads the whole source, but decodes and tokenizes the rows of its own units only. Finding a row costs
little compared with tokenizing it. A small source is read without loaders, by the consumer's own process.
"""

import atexit
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.base.errors import interruption_of
from pipeline.base.signals import work_unsignalled
from pipeline.config.data import DataConfig
from pipeline.data.intake import KeptPair, Ledger, kept_pairs, outcomes
from pipeline.data.rows import Row, Source
from pipeline.data.sources import count_rows, read_rows
from pipeline.data.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Unit", "UnitQueue", "count_loaders", "load_pairs", "survey_pairs"]

# A process and its queue cost about a tenth of a second, in which a few hundred rows are tokenized.
_FEW_ROWS = 512
# Rows of a unit where nothing asks for another size: enough to make the transfer between processes cheap.
_ROWS_PER_UNIT = 256
# Loaders where the consumer only collects the pairs. It keeps up with about as many.
_MOST_LOADERS = 8


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Kept pairs of consecutive rows, with the counts of all rows."""

    number: int
    """Position among all units of the source, from 0."""
    pairs: list[KeptPair]
    """Empty in a unit with a survey."""
    ledger: Ledger
    survey: Survey | None = None


def count_loaders(source: Source, rows: int | None, rows_per_unit: int, *, most: int) -> int:
    """Return how many loader processes are worth their cost, at most `most`; 0 to read in the consumer's process.

    `rows` is the number of rows to tokenize, None if unknown; a loader tokenizes `rows_per_unit` at a time.
    """
    if rows is None and source.stop is not None:
        rows = source.stop - source.start
    if rows is not None and (rows <= _FEW_ROWS or rows <= rows_per_unit):
        return 0
    if multiprocessing.current_process().daemon:
        # A daemonic process may not have children.
        return 0
    may_be_an_array = any(".json" in file.suffixes for file in source.files)
    if (source.format == "hub" and source.streaming) or may_be_an_array:
        # Each loader would fetch the whole stream again, or hold the whole array.
        most = 1
    if rows is not None:
        most = min(most, -(-rows // rows_per_unit))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The processes of torchrun share the machine. One CPU is for the consumer.
    return max(1, min(most, available // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


@dataclass(eq=False)
class UnitQueue:
    """Yield the units of a source in order, each tokenized as a whole, in a `with` block.

    A loader is at most two units ahead of the consumer. An error in a loader is raised where its unit would have come,
    with the loader's traceback as a note.
    """

    source: Source
    tokenizer: "PreTrainedTokenizerBase"
    data: DataConfig
    _: KW_ONLY
    rows_per_unit: int
    """Number of consecutive rows of a unit."""
    wanted: frozenset[int] | None = None
    """Numbers of the rows to read; units are cut from them. None: all rows."""
    share: tuple[int, int] = (0, 1)
    """(I, N): yield the units whose number leaves I when divided by N."""
    is_done: Callable[[int], bool] | None = None
    """Return True if the unit of this number need not be read. Called when its turn comes."""
    num_loaders: int = 0
    """Number of processes that read and tokenize; 0: this one does."""
    survey_batch: int | None = None
    """Survey each unit instead of keeping its pairs. Value: pairs per padded batch to compare with."""
    num_units: int = field(init=False)
    """Number of units of the whole source, all shares included. Set once the last unit was given."""
    _closing: Any = field(default=None, init=False)
    """Shared value that is not 0 once the loaders shall leave."""
    _items: Any = field(default=None, init=False)

    def __enter__(self) -> "UnitQueue":
        return self

    def __iter__(self) -> Iterator[Unit]:
        self._items = self._start() if self.num_loaders else self._read(0, 1)
        # A `for` loop would hold a reference to the iterator, and `close` could not end it.
        while (item := next(self._items, _END)) is not _END:
            match item:
                case Exception():
                    raise item
                case Unit():
                    yield item
                case int():
                    self.num_units = item

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()
        # DataLoader raises this in the consumer, whatever it is doing, when a loader dies.
        if (
            isinstance(error, RuntimeError | OSError | EOFError)
            and (interruption := interruption_of(error)) is not None
        ):
            raise interruption from error

    def close(self) -> None:
        """Stop the loaders at the end of their current row."""
        if self._closing is not None:
            atexit.unregister(self.close)
            self._closing.value = 1
        # This drops the last reference to DataLoader's iterator, which then joins its processes.
        self._items = None

    def _start(self) -> Any:
        """Start the loaders. Return an iterator of what `_read` yields in them."""
        # A fork starts in milliseconds and is safe here, since loaders use neither model nor device.
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        # It has no lock, since a signal handler reads it.
        self._closing = context.RawValue("b", 0)
        # Stop the loaders before the interpreter exits; they would ignore a SIGTERM at exit.
        atexit.register(self.close)
        # A text at a time needs no threads, and some versions of tokenizers warn in a fork of a threaded process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loaders: DataLoader[Any] = DataLoader(
            _LoaderStream(self),
            batch_size=None,
            num_workers=self.num_loaders,
            # One loader prefetches two units, for one may take longer than the next.
            prefetch_factor=2 if self.num_loaders == 1 else 1,
            multiprocessing_context=context,
            # Without a generator of its own it would advance the run's random numbers.
            generator=torch.Generator(),
        )
        return iter(loaders)

    def _read(self, loader: int, num_loaders: int) -> Iterator[Unit | int | None]:
        """Yield an item at every `num_loaders`-th turn: a unit, None for one that is done; last the number of units.

        A unit's turn depends on its number only, so the order holds whichever units are done.
        """
        index, count = self.share
        unit = -1
        for unit, group in groupby(enumerate(self._rows()), key=lambda item: item[0] // self.rows_per_unit):
            if unit % count == index and unit // count % num_loaders == loader:
                is_done = self.is_done is not None and self.is_done(unit)
                yield None if is_done else self._read_unit(unit, (row for _, row in group))
        yield unit + 1

    def _read_unit(self, number: int, rows: Iterator[Row]) -> Unit:
        ledger = Ledger()
        if self.survey_batch is None:
            pairs = list(kept_pairs(rows, self.tokenizer, self.data, ledger))
            return Unit(number=number, pairs=pairs, ledger=ledger)
        survey = Survey(self.survey_batch)
        for outcome in outcomes(rows, self.tokenizer, self.data):
            ledger.take(outcome)
            survey.take(outcome, self.tokenizer)
        survey.close()
        # The survey keeps a few examples of bad rows. A list of a million would not fit.
        ledger.skipped.clear()
        return Unit(number=number, pairs=[], ledger=ledger, survey=survey)

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self.source):
            if self._closing is not None and self._closing.value:
                raise _ClosingError
            if self.wanted is None or row.number in self.wanted:
                yield row


_END = object()  # of a queue's items


class _ClosingError(Exception):
    """The consumer takes no more units."""


class _LoaderStream(IterableDataset[Any]):
    """Read the units of one loader, in its process."""

    def __init__(self, queue: UnitQueue) -> None:
        self._queue = queue

    def __iter__(self) -> Iterator[Any]:
        work_unsignalled(self._queue._closing)
        info = get_worker_info()
        assert info is not None
        try:
            yield from self._queue._read(info.id, info.num_workers)
        except _ClosingError:
            return
        except Exception as error:
            # DataLoader would raise an error of its own type instead.
            yield _portable(error)


def load_pairs(
    source: Source, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, ledger: Ledger
) -> Iterator[KeptPair]:
    """Yield the kept pairs of a whole source, tokenized in loader processes; the ledger is complete after the last."""
    num_loaders = count_loaders(source, count_rows(source), _ROWS_PER_UNIT, most=_MOST_LOADERS)
    with UnitQueue(source, tokenizer, data, rows_per_unit=_ROWS_PER_UNIT, num_loaders=num_loaders) as units:
        for unit in units:
            ledger.add(unit.ledger.as_dict())
            ledger.skipped += unit.ledger.skipped
            yield from unit.pairs


def survey_pairs(
    source: Source, tokenizer: Any, data: DataConfig, ledger: Ledger, *, rows_per_unit: int, batch_pairs: int
) -> Survey:
    """Survey the pairs of a whole source in loader processes. The ledger's list of skipped rows stays empty.

    A prompt is computed once in `rows_per_unit` consecutive rows; padded batches to compare with have `batch_pairs`.
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


def _portable(error: Exception) -> Exception:
    """Return the error with its traceback as a note, or a RuntimeError of the same text if it can't be pickled."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if type(copy) is not type(error) or str(copy) != str(error):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a process that reads and tokenizes:\n{trace}")
    return error
