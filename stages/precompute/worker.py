"""One worker of stage one: score the missing units of a set with the reference, and write them as parts.

rows -> units of rows_per_shard -> pairs -> tokens -> batches -> token logps -> one Parquet part per unit
'------------- loading processes ---------------'   '---- this process ---'   '----- a thread -----'
"""

import contextlib
import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.base.digests import WatchedFiles
from pipeline.base.errors import ConfigError, DataError, UnfinishedError, stopped_as_asked
from pipeline.base.folders import Folder
from pipeline.base.progress import Progress, emit, say
from pipeline.base.signals import StopFlag
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.loading import Unit, UnitQueue, count_loaders
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows
from pipeline.models.files import reference_sources
from pipeline.models.lengths import length_error, most_positions
from pipeline.models.loading import pick_device
from pipeline.run.records import write_cost
from pipeline.scoring.agreement import NoiseFloor
from pipeline.scoring.memory import name_of_device, peak_memory
from pipeline.scoring.scorer import Scorer, load_scorer
from pipeline.scoring.selfcheck import not_packed
from pipeline.scoring.tensor_parallel import Ensemble, LeaderModel
from pipeline.store.finishing import delete_foreign, finish_store, reopen_store
from pipeline.store.format import ForeignPartError, ScoredPair
from pipeline.store.reuse import Reusable, copy_scored
from pipeline.store.store import PartHeader, is_finished, part_exists, parts_there, write_part
from stages.precompute.canary import StoredPairs
from stages.precompute.distance import say_distance
from stages.precompute.siblings import Siblings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Reference", "ScoringJob", "Worker", "load_reference_scorer"]


_MOST_LOADERS = 4
"""Loading processes of one worker: the reference takes the time, and a few keep up with it"""
_PAIRS_PER_SECOND_SCORING = 64
"""Pairs of a unit for each one that is scored twice: 1.6% of the work"""


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """One set to score: the same for all workers."""

    name: str
    source: Source
    files: WatchedFiles
    """Files of the dataset"""
    rows: frozenset[int] | None
    """Rows to score; None for all"""
    folder: Folder
    header: PartHeader


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process that scores."""

    config: Config
    share: tuple[int, int]
    """(index, count): the worker takes every unit whose number leaves index when divided by count"""
    tokenizer: "PreTrainedTokenizerBase"
    reference: "Reference"
    reusable: Reusable
    """Stores to copy scored pairs from"""
    siblings: Siblings
    flag: StopFlag
    """Set when the process is asked to stop"""
    costs_in: Folder
    """Folder that the cost of the scoring is recorded in"""

    @property
    def name(self) -> str:
        return f"{self.share[0]}/{self.share[1]}"

    def score(self, job: ScoringJob) -> int:
        """Score this worker's missing units, and finish the store if no unit is missing.

        While a unit is scored, the next ones are read and tokenized, and the last ones are written.

        Returns:
            Number of units that other workers still owe.
        """
        if is_finished(job.folder):
            lost = reopen_store(job.folder)
            if not lost:
                return 0
            say(f"{job.folder}: scores missing or shortened parts again: {', '.join(lost)}")
        config = dataclasses.replace(self.config, data=self.config.data.of(job.name))
        check = StoredPairs(job.source, job.folder, config, self.tokenizer, self.reference, self.flag)
        share, written = self.share, set[int]()
        while True:
            num_units = self._score_missing(job, share, check, written)
            try:
                approve = functools.partial(check.each, written=written)
                return len(finish_store(job.folder, num_units, approve, header=job.header))
            except ForeignPartError as error:
                deleted = delete_foreign(job.folder, error.units)
                say(f"{job.folder}: deleted, since they are another run's, and scored anew: {', '.join(deleted)}")
            # No other unit is missing, and the workers whose units these are may have left.
            share = (0, 1)

    def _score_missing(self, job: ScoringJob, share: tuple[int, int], check: StoredPairs, written: set[int]) -> int:
        """Score the missing units of a share, add those whose part is ours to `written`; give the set's units."""
        to_do = self._rows_to_do(job, share)
        size = self.config.precompute.rows_per_shard
        queue = UnitQueue(
            job.source,
            self.tokenizer,
            self.config.data.of(job.name),
            rows_per_unit=size,
            wanted=job.rows,
            share=share,
            is_done=functools.partial(part_exists, job.folder),
            num_loaders=count_loaders(job.source, to_do, size, most=_MOST_LOADERS),
        )
        with (
            self._telling_what_is_saved(job),
            queue as units,
            _Account(self.costs_in, job.name, self.name, to_do) as account,
            _Writer(job.folder, job.header, written) as writer,
        ):
            for unit in units:
                if part_exists(job.folder, unit.number):
                    # A copy of this worker wrote the part since the unit was read.
                    continue
                if self.flag:
                    raise stopped_as_asked("finished units are saved")
                scored, noise = self._score_unit(job.name, unit, account, check)
                job.files.check()
                writer.put(unit, scored, noise)
        job.files.check()
        return queue.num_units

    @contextlib.contextmanager
    def _telling_what_is_saved(self, job: ScoringJob) -> Iterator[None]:
        """Count the saved units in the error of a stop request, once the last parts are written."""
        try:
            yield
        except UnfinishedError:
            if not self.flag:
                raise
            total, size = count_rows(job.source) if job.rows is None else None, self.config.precompute.rows_per_shard
            of_all = "" if total is None else f" of {-(-total // size):,}"
            saved = f"{len(parts_there(job.folder)):,}{of_all} units of {job.name} saved"
            raise stopped_as_asked(
                f"{saved}; rows since then are scored again (precompute.rows_per_shard: {size})"
            ) from None

    def _score_unit(
        self, name: str, unit: Unit, account: "_Account", check: StoredPairs
    ) -> tuple[list[ScoredPair], NoiseFloor]:
        """Copy the pairs that other stores hold, score the rest, and count both in the unit's ledger."""
        copied = self.siblings.copy(name, unit.pairs) | copy_scored(self.reusable, unit.pairs)
        new = [pair for i, pair in enumerate(unit.pairs) if i not in copied]
        if new and not self.reference.is_loaded:
            self._say_distance(new)
            self.reference.load()
            # Neither the rate nor the cost counts the loading.
            account.restart()
        if new:
            check.before_first_unit()
        fresh, noise = self.reference.score_unit(new, self.flag, account.add) if new else ([], NoiseFloor())
        unread = iter(fresh)
        scored = [copied[i] if i in copied else next(unread) for i in range(len(unit.pairs))]
        scored = _finite(scored, unit.pairs, self.config.precompute.on_nonfinite, unit.ledger)
        account.finish_unit(unit)
        if copied:
            unit.ledger.noted["copied from other shards"] += len(copied)
        return scored, noise

    def _say_distance(self, pairs: list[KeptPair]) -> None:
        """Let the first of the workers, before it has loaded the reference, tell how far from ln 2 training starts."""
        if self.share[0] == 0 and not self.config.train.is_empty:
            say_distance(self.config, self.tokenizer, pairs, lambda sample: self.reference.score(sample, self.flag))

    def _rows_to_do(self, job: ScoringJob, share: tuple[int, int]) -> int | None:
        """Count the rows of a share's missing units; None where the set's size is not known."""
        total = count_rows(job.source) if job.rows is None else len(job.rows)
        if total is None:
            return None
        size = self.config.precompute.rows_per_shard
        there = parts_there(job.folder)
        mine = range(share[0], -(-total // size), share[1])
        return sum(min(size, total - unit * size) for unit in mine if unit not in there)


class _Account:
    """Progress of a set, shown as it grows, and the cost of scoring it, written however the scoring ends."""

    _SECONDS_BETWEEN_UPDATES = 0.5

    def __init__(self, output: Folder, name: str, worker: str, to_do: int | None) -> None:
        self._output, self._name, self._worker = output, name, worker
        self._device = pick_device()
        self._progress = Progress(name, to_do, "rows")
        self._pairs = self._rows = self._tokens = self._of_unit = 0
        self._last_update = time.monotonic()

    def __enter__(self) -> "_Account":
        return self

    def restart(self) -> None:
        """Let time and rates count from here: the reference is loaded."""
        self._progress.restart()

    def add(self, pair: KeptPair) -> None:
        """Count a pair that was scored."""
        self._of_unit += 1
        self._rows += 1
        self._pairs += 1
        # The prompt stands in both sequences.
        self._tokens += 2 * len(pair.pair.prompt_ids) + len(pair.pair.chosen_ids) + len(pair.pair.rejected_ids)
        if time.monotonic() - self._last_update > self._SECONDS_BETWEEN_UPDATES:
            self._update()

    def finish_unit(self, unit: Unit) -> None:
        """Count the unit's dropped and copied rows too."""
        self._rows += unit.ledger.rows - self._of_unit
        self._of_unit = 0
        self._update()

    def _update(self) -> None:
        self._last_update = time.monotonic()
        self._progress.advance(self._rows, tokens=self._tokens, memory=peak_memory(self._device))
        self._rows = self._tokens = 0

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if not self._pairs:
            return
        cost = {
            "set": self._name,
            "worker": self._worker,
            "seconds": self._progress.seconds,
            "pairs": self._pairs,
            "tokens": self._progress.tokens,
            "memory_bytes": peak_memory(self._device),
            "device": name_of_device(self._device),
        }
        write_cost(self._output, cost)
        emit("cost", cost)


class Reference:
    """The reference model. The first unit that needs it loads it, so a rerun with nothing to do loads nothing."""

    def __init__(
        self,
        config: Config,
        tokenizer: "PreTrainedTokenizerBase",
        files: WatchedFiles,
        ensemble: Ensemble | None = None,
    ) -> None:
        self._config, self._tokenizer, self._files, self._ensemble = config, tokenizer, files, ensemble
        self._scorer: Scorer | None = None
        self._positions: tuple[int, str] | None = None

    @property
    def is_loaded(self) -> bool:
        return self._scorer is not None

    def load(self) -> bool:
        """Load and check the model. Return False if it was loaded before."""
        if self._scorer is not None:
            return False
        self._scorer = self._load()
        return True

    def score_unit(
        self, pairs: list[KeptPair], flag: StopFlag, count: Callable[[KeptPair], None]
    ) -> tuple[list[ScoredPair], NoiseFloor]:
        """Score the pairs of one unit, and a few of them a second time in another batch.

        Returns:
            The scored pairs, in the order of `pairs`, each counted once by `count`, and the differences of the second
            scoring from the first.

        Raises:
            UnfinishedError: The process is asked to stop; the whole unit is dropped.
        """
        scored = self.score(pairs, flag, count)
        # A single pair has no other batch.
        twice = -(-len(pairs) // _PAIRS_PER_SECOND_SCORING) if len(pairs) > 1 else 0
        again = [i * len(pairs) // twice for i in range(twice)]
        second = self.score([pairs[i] for i in again], flag)
        gaps = [
            getattr(scored[i], side).astype(np.float64) - getattr(other, side)
            for i, other in zip(again, second, strict=True)
            for side in ("chosen_token_logps", "rejected_token_logps")
        ]
        self._files.check()
        return scored, NoiseFloor.of(gaps)

    def score(
        self, pairs: list[KeptPair], flag: StopFlag, count: Callable[[KeptPair], None] | None = None
    ) -> list[ScoredPair]:
        """Score pairs in batches of similar length; give them in the order of `pairs`. Raises as `score_unit`."""
        self.load()
        scorer = self._scorer
        assert scorer is not None
        self._check_ids(scorer, pairs)
        scored: dict[int, ScoredPair] = {}
        for i, chosen, rejected in scorer.logps([p.pair for p in pairs]):
            scored[i] = ScoredPair(
                key=pairs[i].key,
                row=pairs[i].row,
                prompt_tokens=len(pairs[i].pair.prompt_ids),
                chosen_token_logps=chosen,
                rejected_token_logps=rejected,
            )
            if count is not None:
                count(pairs[i])
            if flag:
                raise stopped_as_asked("finished units are saved")
        return [scored[i] for i in range(len(pairs))]

    def _load(self) -> Scorer:
        where = str(pick_device())
        if self._config.precompute.device_map is not None:
            where = "all GPUs that this process sees" if pick_device().type == "cuda" else where
        if self._ensemble is not None:
            where = f"{self._ensemble.num_processes} processes"
            self._ensemble.broadcast(("load", None))
        say(f"Loading the reference {reference_sources(self._config)[0].name} on {where} ...")
        scorer = load_reference_scorer(self._config, self._tokenizer, self._ensemble)
        self._positions = most_positions(self._config)
        self._files.check_untouched()
        elsewhere = sum(p.numel() for p in scorer.model.parameters() if p.device.type == "meta")
        if elsewhere:
            say(
                f"warning: {elsewhere:,} of the reference's weights do not fit the devices' memory and are fetched for "
                "every batch, which is slow; use more GPUs or a narrower reference.dtype",
                err=True,
            )
        if scorer.reading != "packed":
            say(f"warning: {not_packed(scorer.model, scorer.reading)}", err=True)
        if self._ensemble is not None:
            scorer.model = LeaderModel(scorer.model, self._ensemble)
        return scorer

    def _check_ids(self, scorer: Scorer, pairs: list[KeptPair]) -> None:
        # On a GPU, an id or a position beyond the embedding crashes without a message.
        size = scorer.model.get_input_embeddings().weight.shape[0]
        for pair in pairs:
            if error := length_error(self._positions, pair.longest, pair.place, self._config):
                raise error
            top = max(max(pair.pair.prompt_ids), max(pair.pair.chosen_ids), max(pair.pair.rejected_ids))
            if top >= size:
                raise ConfigError(
                    f"reference.model: {pair.place} holds token id {top}, but the model's vocabulary has {size}; "
                    "reference and policy must share one vocabulary"
                )


def load_reference_scorer(config: Config, tokenizer: "PreTrainedTokenizerBase", ensemble: Ensemble | None) -> Scorer:
    """Load and check the reference, in all processes of an ensemble at once."""

    def load() -> Scorer:
        scorer = load_scorer(config, tokenizer, tokens_per_batch=config.precompute.tokens_per_batch)
        scorer.fit()
        return scorer

    if ensemble is None:
        return load()
    scorer = ensemble.together(load)
    scorer.tokens_per_batch = ensemble.smallest(scorer.fit())
    return scorer


class _Writer:
    """Writes parts in a thread, in order, so that scoring does not wait for the disk.

    A failed write raises its error at a later `put`, or at the end. The end, even by an error, writes all parts first.
    The numbers of its units are added to `written`, unless another writer was first.
    """

    # A full disk loses the pending parts, and scoring hardly ever waits for one.
    _MOST_PENDING = 2

    def __init__(self, folder: Folder, header: PartHeader, written: set[int]) -> None:
        self._write_part = functools.partial(write_part, folder, header=header)
        self._written = written
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: deque[Future[None]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def put(self, unit: Unit, scored: list[ScoredPair], noise: NoiseFloor) -> None:
        """Write a part in the thread; wait while too many are pending."""
        while self._pending and (len(self._pending) >= self._MOST_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, unit, scored, noise))

    def _write(self, unit: Unit, scored: list[ScoredPair], noise: NoiseFloor) -> None:
        if self._write_part(unit.number, scored, unit.ledger, noise):
            self._written.add(unit.number)

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()
        # An error of an earlier unit replaces the one that ends the block.
        while self._pending:
            self._pending.popleft().result()


def _finite(scored: list[ScoredPair], pairs: list[KeptPair], on_nonfinite: str, ledger: Ledger) -> list[ScoredPair]:
    """Keep the pairs whose log-probs are all finite; others stop the run, or are dropped and counted."""
    kept = []
    for result, pair in zip(scored, pairs, strict=True):
        if np.isfinite(result.chosen_token_logps).all() and np.isfinite(result.rejected_token_logps).all():
            kept.append(result)
            continue
        if on_nonfinite == "stop":
            raise DataError(
                f"{pair.place}: the reference gives a log-prob that is not finite; its dtype may be too narrow "
                "(reference.dtype: float32), or set precompute.on_nonfinite: drop"
            )
        ledger.kept -= 1
        ledger.dropped["nonfinite"] += 1
    return kept
