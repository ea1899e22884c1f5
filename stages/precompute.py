"""Stage one: stream the pairs through the frozen reference, write their log-probs to shards.

    rows -> units of rows_per_shard -> pairs -> tokens -> batches -> token logps -> one Parquet part per unit
    '------------- loading processes ---------------'   '---- this process ---'   '----- a thread -----'

Workers share nothing but the folder: worker I of N takes the units whose number leaves I when divided by N, skips
those that are there, and whoever finds all of them there writes the index. So any number of workers can start a
run, and any other number can finish it. Of several processes that were launched together each is a worker, unless
they hold one reference together (`precompute.tp_plan`): then the first of them is one.
"""

import functools
import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from transformers import TrainingArguments

from pipeline.base.digests import sha256_of_files
from pipeline.base.errors import ConfigError, DataError, IdentityError, StorageError, UnfinishedError
from pipeline.base.folders import Folder, open_folder
from pipeline.base.progress import Progress, emit
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.base.versions import library_versions
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.loading import Unit, UnitQueue, count_loaders, load_pairs
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, data_files, describe, open_source
from pipeline.models.files import declared_reference, load_tokenizer, policy_settings, reference_sources
from pipeline.models.identity import check_dtypes, fingerprint_of, identity_of_run
from pipeline.models.loading import pick_device
from pipeline.run.checkpoints import find_checkpoint, is_recorded
from pipeline.run.identity import run_identity
from pipeline.run.records import delete_costs, write_cost
from pipeline.scoring.agreement import NoiseFloor
from pipeline.scoring.memory import free_memory, is_out_of_memory, name_of_device, peak_memory
from pipeline.scoring.scorer import Scorer, load_scorer
from pipeline.scoring.selfcheck import not_packed
from pipeline.scoring.tensor_parallel import Ensemble, Led, processes_of_launch, share_of_process
from pipeline.store.format import ScoredPair
from pipeline.store.reuse import Reusable, copy_scored, open_reusable
from pipeline.store.store import (
    create_store,
    delete_store,
    finish_store,
    is_finished,
    open_store,
    part_exists,
    parts_there,
    write_part,
)
from pipeline.training.arguments import training_arguments
from pipeline.training.losses import router_aux_weight
from pipeline.training.steps import order_of_run
from pipeline.training.windows import check_mixable, prepare_reference, window_at, window_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "run",
]


def run(
    config: Config, *, worker: tuple[int, int] = (0, 1), overwrite: bool = False, stop_at: float | None = None
) -> None:
    """Score the training split and every held-out set; do only what is missing.

    Args:
        config: The run's settings.
        worker: (I, N): this process is worker I, from 0, of N; where several were launched together, all of them are.
        overwrite: Delete the stores that are there and start over.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        UnfinishedError: A signal, or the time, asked to stop; the finished units are saved.
        IdentityError: The output folder holds shards of another reference, tokenization or dataset.
        DataError: A row can't be a pair, or a log-prob is not finite, and the settings say stop.
        ConfigError: A setting is impossible here.
    """
    flag = watch_signals(stop_at)
    if config.precompute.tp_plan is not None:
        ensemble = Ensemble(flag)
        if not ensemble.leads:
            _follow(config, ensemble)
            return
        with ensemble.leading():
            _run(config, worker, flag, ensemble, overwrite=overwrite)
        return
    if overwrite and processes_of_launch()[1] > 1:
        raise ConfigError(
            "--overwrite: of several processes each would delete what the others have begun; delete "
            f"{config.precompute.output} yourself, or start one process first"
        )
    _run(config, share_of_process(worker), flag, None, overwrite=overwrite)


def _follow(config: Config, ensemble: Ensemble) -> None:
    """Run what the leader of the launch runs, on this process's part of the reference, until it says to leave."""
    model: Any = None
    while True:
        order, content = ensemble.receive()
        if order == "leave":
            if content:
                raise click.exceptions.Exit(content)
            return
        if order == "load":
            model = _load_scorer(config, load_tokenizer(config, weights=False), ensemble).model
            continue
        try:
            Led.follow(model, content, ensemble, pick_device())
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The leader goes on with less.
        free_memory()


def _run(
    config: Config, worker: tuple[int, int], flag: StopFlag, ensemble: Ensemble | None, *, overwrite: bool
) -> None:
    if config.reference.declared is not None:
        raise ConfigError(
            "reference.declared: a reference known by name alone can't be scored with. Bring its log-probs with "
            "refshard import, or name a model in reference.model"
        )
    if not config.train.is_empty:
        # A mistake in the other stage's section is better found before an hour of scoring than after it.
        _ = config.train.options
        check_dtypes(config)
        router_aux_weight(policy_settings(config), config.loss)
    sources = {"train": open_source(config.data)}
    sources |= {name: open_source(config.data, eval_set) for name, eval_set in config.data.eval.items()}
    tokenizer = load_tokenizer(config)
    rows = None
    # A window's own folder is deleted when its reference has moved; what it took is written down with the run's.
    accounts_in = open_folder(config.precompute.output)
    if config.reference.sync is not None:
        arguments = training_arguments(config)
        if is_recorded(config.train.folder):
            click.echo(f"{config.train.folder}: this run is finished already; nothing to score.")
            return
        config, sources, rows = _next_window(config, arguments, sources, tokenizer)
    identity = identity_of_run(config, tokenizer)
    reference = _Reference(config, tokenizer, ensemble)
    reusable = open_reusable(config.precompute.reuse, identity)
    others = 0
    for name, source in sources.items():
        folder = open_folder(config.precompute.output).child(name)
        wanted = rows if name == "train" else None
        if overwrite:
            delete_store(folder)
            delete_costs(accounts_in, name)
        stamps = _stamps(source)
        plan = _plan(config, source, reusable, wanted)
        fingerprint = create_store(folder, identity, plan, _declared(config, source))
        if not is_finished(folder):
            accounts = functools.partial(_Account, accounts_in, name, worker)
            others += _score_split(
                config,
                source,
                stamps,
                wanted,
                folder,
                fingerprint,
                worker,
                reference,
                reusable,
                tokenizer,
                flag,
                accounts,
            )
        if is_finished(folder):
            _report_finished(folder, name)
    if others:
        click.echo(f"Worker {worker[0]}/{worker[1]} is done; {others} units of other workers are still missing.")


def _next_window(
    config: Config,
    arguments: TrainingArguments,
    sources: Mapping[str, Source],
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[Config, dict[str, Source], frozenset[int]]:
    """Find out where a TR-DPO run stands and move its reference there.

    Returns:
        The settings of the window that comes next, the sets that it needs scored, and the training rows that it has.
    """
    output = config.train.folder
    kept = [pair.row for pair in load_pairs(sources["train"], tokenizer, config.data, Ledger())]
    order = order_of_run(arguments, len(kept))
    check_mixable(config)
    fingerprint = fingerprint_of(identity_of_run(config, tokenizer))
    identity = run_identity(config, {"reference": fingerprint}, arguments.world_size)
    # Also refuses what another run's training would move the reference to.
    checkpoint = find_checkpoint(output, identity, lambda text: click.echo(f"warning: {text}", err=True))
    window = window_at(config, arguments, order, checkpoint)
    prepare_reference(config, window, output)
    rows = frozenset(kept[i] for i in order.pairs_of(window.first, window.last))
    steps = f"steps {window.first + 1} to {window.last} of {len(order.steps)}" if rows else "held-out sets alone"
    click.echo(f"Window {window.number}: {steps}, {len(rows):,} of {len(kept):,} pairs")
    needed = {
        name: source
        for name, source in sources.items()
        if (bool(rows) if name == "train" else bool(window.evaluations))
    }
    return window_config(config, window, output), needed, rows


class _Account:
    """How far a set is, shown as it goes, and what scoring it has taken, written down however it ends."""

    _SECONDS_BETWEEN_LOOKS = 0.5

    def __init__(self, output: Folder, name: str, worker: tuple[int, int], to_do: int | None) -> None:
        self._output, self._name, self._worker = output, name, worker
        self._device = pick_device()
        self._progress = Progress(name, to_do, "rows")
        self._pairs = self._rows = self._tokens = 0
        self._of_unit = 0
        self._last_look = time.monotonic()

    def __enter__(self) -> "_Account":
        return self

    def add(self, pair: KeptPair) -> None:
        """Count a pair that was scored."""
        self._of_unit += 1
        self._rows += 1
        self._pairs += 1
        self._tokens += _num_tokens(pair)
        if time.monotonic() - self._last_look > self._SECONDS_BETWEEN_LOOKS:
            self._look()

    def finish_unit(self, unit: Unit) -> None:
        """Count the rows that were dropped or copied, too."""
        self._rows += unit.ledger.rows - self._of_unit
        self._of_unit = 0
        self._look()

    def _look(self) -> None:
        self._last_look = time.monotonic()
        self._progress.advance(self._rows, tokens=self._tokens, memory=peak_memory(self._device))
        self._rows = self._tokens = 0

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if not self._pairs:
            return
        cost = {
            "set": self._name,
            "worker": f"{self._worker[0]}/{self._worker[1]}",
            "seconds": self._progress.seconds,
            "pairs": self._pairs,
            "tokens": self._progress.tokens,
            "memory_bytes": peak_memory(self._device),
            "device": name_of_device(self._device),
        }
        write_cost(self._output, cost)
        emit("cost", cost)


class _Reference:
    """The reference model, loaded when the first unit needs it: a rerun with nothing to do loads nothing."""

    def __init__(self, config: Config, tokenizer: "PreTrainedTokenizerBase", ensemble: Ensemble | None = None) -> None:
        self._config, self._tokenizer, self._ensemble = config, tokenizer, ensemble
        self._scorer: Scorer | None = None

    def score_unit(
        self, pairs: list[KeptPair], flag: StopFlag, count: Callable[[KeptPair], None]
    ) -> tuple[list[ScoredPair], NoiseFloor]:
        """Score the pairs of one unit, and a few of them a second time in other company.

        Args:
            pairs: Of the unit.
            flag: Asks to stop.
            count: Called for each pair that is scored.

        Returns:
            The scored pairs, in the order that they came in, and how far the second scoring was from the first.

        Raises:
            UnfinishedError: A signal came; the unit is dropped as a whole.
        """
        if self._scorer is None:
            self._scorer = self._load()
        self._check_vocabulary(self._scorer, pairs)
        scored = self._score(self._scorer, pairs, flag, count)
        # One pair alone has no other company to be scored in.
        twice = -(-len(pairs) // _PAIRS_PER_SECOND_SCORING) if len(pairs) > 1 else 0
        again = [i * len(pairs) // twice for i in range(twice)]
        second = self._score(self._scorer, [pairs[i] for i in again], flag, None)
        return scored, _noise_floor([scored[i] for i in again], second)

    def _score(
        self, scorer: Scorer, pairs: list[KeptPair], flag: StopFlag, count: Callable[[KeptPair], None] | None
    ) -> list[ScoredPair]:
        """Score pairs in batches of similar length; give them in the order that they came in."""
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
                raise UnfinishedError("stopped as asked; finished units are saved. Run the same command again")
        return [scored[i] for i in range(len(pairs))]

    def _load(self) -> Scorer:
        where = str(pick_device())
        if self._config.precompute.device_map is not None:
            where = "all GPUs that this process sees" if pick_device().type == "cuda" else where
        if self._ensemble is not None:
            where = f"{self._ensemble.num_processes} processes"
            self._ensemble.send(("load", None))
        click.echo(f"Loading the reference {reference_sources(self._config)[0].name} on {where} ...")
        scorer = _load_scorer(self._config, self._tokenizer, self._ensemble)
        elsewhere = sum(p.numel() for p in scorer.model.parameters() if p.device.type == "meta")
        if elsewhere:
            click.echo(
                f"warning: {elsewhere:,} of the reference's weights do not fit the devices' memory and are fetched for "
                "every batch, which is slow; use more GPUs or a narrower reference.dtype",
                err=True,
            )
        if not scorer.packed:
            click.echo(f"warning: {not_packed(scorer.model)}", err=True)
        if self._ensemble is not None:
            scorer.model = Led(scorer.model, self._ensemble)
        return scorer

    def _check_vocabulary(self, scorer: Scorer, pairs: list[KeptPair]) -> None:
        # An id past the embedding is a crash without a name on a GPU.
        size = scorer.model.get_input_embeddings().weight.shape[0]
        for pair in pairs:
            top = max(max(pair.pair.prompt_ids), max(pair.pair.chosen_ids), max(pair.pair.rejected_ids))
            if top >= size:
                raise ConfigError(
                    f"reference.model: {pair.place} holds token id {top}, but the model's vocabulary has {size}; "
                    "reference and policy must share one vocabulary"
                )


def _load_scorer(config: Config, tokenizer: "PreTrainedTokenizerBase", ensemble: Ensemble | None) -> Scorer:
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


# Pairs of a unit for each one that is scored twice: 1.6% of the work.
_PAIRS_PER_SECOND_SCORING = 64


def _noise_floor(once: list[ScoredPair], again: list[ScoredPair]) -> NoiseFloor:
    if not once:
        return NoiseFloor()
    gaps = [
        np.abs(getattr(a, side).astype(np.float64) - getattr(b, side))
        for a, b in zip(once, again, strict=True)
        for side in ("chosen_token_logps", "rejected_token_logps")
    ]
    flat = np.concatenate(gaps)
    # What is not finite is dealt with pair by pair, and measures nothing.
    flat = flat[np.isfinite(flat)]
    if not len(flat):
        return NoiseFloor()
    return NoiseFloor(tokens=len(flat), mean=float(flat.mean()), largest=float(flat.max()))


# Loading processes of one worker: the reference is what takes time, and a few keep up with it.
_MOST_LOADERS = 4


def _score_split(
    config: Config,
    source: Source,
    stamps: list[tuple[int, int]],
    wanted: frozenset[int] | None,
    folder: Folder,
    fingerprint: str,
    worker: tuple[int, int],
    reference: _Reference,
    reusable: Reusable,
    tokenizer: "PreTrainedTokenizerBase",
    flag: StopFlag,
    accounts: Callable[[int | None], _Account],
) -> int:
    """Score this worker's missing units of one split; gives the number of units that others still owe.

    While a unit is scored, the next ones are read and tokenized and the last ones are written.
    """
    total = count_rows(source) if wanted is None else len(wanted)
    to_do = _rows_to_do(total, config, folder, worker)
    rows_per_unit = config.precompute.rows_per_shard
    queue = UnitQueue(
        source,
        tokenizer,
        config.data,
        rows_per_unit=rows_per_unit,
        wanted=wanted,
        share=worker,
        is_done=functools.partial(part_exists, folder),
        num_loaders=count_loaders(source, to_do, rows_per_unit, most=_MOST_LOADERS),
    )
    with queue as units, accounts(to_do) as account, _Writer(folder, config, fingerprint) as writer:
        for unit in units:
            if part_exists(folder, unit.number):
                # Another copy of this worker was first, since the unit was read.
                continue
            if flag:
                raise UnfinishedError("stopped as asked; finished units are saved. Run the same command again")
            scored, noise = _score_unit(unit, reference, reusable, config.precompute.on_nonfinite, flag, account)
            _check_unchanged(source, stamps)
            writer.put(unit, scored, noise)
    _check_unchanged(source, stamps)
    return len(finish_store(folder, queue.num_units))


def _score_unit(
    unit: Unit, reference: _Reference, reusable: Reusable, on_nonfinite: str, flag: StopFlag, account: _Account
) -> tuple[list[ScoredPair], NoiseFloor]:
    """Copy what other stores have scored, score the rest; the unit's ledger learns of both."""
    copied = copy_scored(reusable, unit.pairs)
    new = [pair for i, pair in enumerate(unit.pairs) if i not in copied]
    fresh, noise = reference.score_unit(new, flag, account.add) if new else ([], NoiseFloor())
    unread = iter(fresh)
    scored = [copied[i] if i in copied else next(unread) for i in range(len(unit.pairs))]
    scored = _finite(scored, unit.pairs, on_nonfinite, unit.ledger)
    account.finish_unit(unit)
    if copied:
        unit.ledger.noted["copied from other shards"] += len(copied)
    return scored, noise


class _Writer:
    """Writes parts in a thread, in order, so that nobody waits for the disk.

    A part that could not be written raises its error at a later `put`, or at the end. What was put is written before
    the end, however it comes.
    """

    # More would be lost with a full disk, and the scoring hardly ever waits for one.
    _MOST_PENDING = 2

    def __init__(self, folder: Folder, config: Config, fingerprint: str) -> None:
        self._write = functools.partial(
            write_part,
            folder,
            fingerprint=fingerprint,
            token_logps=config.precompute.token_logps,
            provenance=_provenance(config),
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: deque[Future[bool]] = deque()

    def __enter__(self) -> "_Writer":
        return self

    def put(self, unit: Unit, scored: list[ScoredPair], noise: NoiseFloor) -> None:
        """Have a part written; waits while too many are pending."""
        while self._pending and (len(self._pending) >= self._MOST_PENDING or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, unit.number, scored, ledger=unit.ledger, noise=noise))

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown()
        # An error here belongs to an earlier unit than one that is on its way, and goes first as it would have then.
        while self._pending:
            self._pending.popleft().result()


def _finite(scored: list[ScoredPair], pairs: list[KeptPair], on_nonfinite: str, ledger: Ledger) -> list[ScoredPair]:
    """Keep the pairs whose every log-prob is a number; the others stop the run or are dropped and counted."""
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
        ledger.drop("nonfinite")
    return kept


def _num_tokens(pair: KeptPair) -> int:
    """Tokens of a pair's two sequences, the prompt counted in each."""
    return 2 * len(pair.pair.prompt_ids) + len(pair.pair.chosen_ids) + len(pair.pair.rejected_ids)


def _rows_to_do(total: int | None, config: Config, folder: Folder, worker: tuple[int, int]) -> int | None:
    if total is None:
        return None
    size = config.precompute.rows_per_shard
    mine = range(worker[0], -(-total // size), worker[1])
    there = parts_there(folder)
    return sum(min(size, total - unit * size) for unit in mine if unit not in there)


def _report_finished(folder: Folder, name: str) -> None:
    store = open_store(folder)
    totals = Ledger()
    totals.add(dict(store.index["totals"]))
    click.echo(f"{name}: {totals.summary()}; in {folder} ({len(store.parts)} parts)")
    if totals.kept == 0:
        raise DataError(f"{folder}: no pair was kept, so there is nothing to train on: {totals.summary()}")


def _plan(config: Config, source: Source, reusable: Reusable, wanted: frozenset[int] | None) -> dict[str, Any]:
    """What the content of a part depends on besides the identity: a store is continued only if all is equal.

    Whether a bad row stops the run or is skipped is not in it: no part ever holds one. So the way on that an error
    names, to skip, goes on with the parts that are there.
    """
    files = data_files(source)
    local = bool(files)
    of_window = {}
    if wanted is not None:
        digest = hashlib.sha256(repr(sorted(wanted)).encode()).hexdigest()
        of_window = {"window": f"{len(wanted)} pairs in the order of training ({digest[:12]})"}
    return {
        **of_window,
        "rows_per_shard": config.precompute.rows_per_shard,
        "on_identical": config.data.on_identical,
        "columns": dict(source.columns),
        "reuse": [store.digest for store in reusable.stores],
        "rows": f"{source.start}:{'' if source.stop is None else source.stop}",
        # Local data is known by content, so that a moved file is the same and an edited one is not.
        "dataset": (
            sha256_of_files(files) if local else {"path": source.path, "name": source.name, "revision": source.revision}
        ),
        "split": source.split,
    }


def _stamps(source: Source) -> list[tuple[int, int]]:
    """Size and time of change of each file."""
    try:
        return [((status := file.stat()).st_size, status.st_mtime_ns) for file in data_files(source)]
    except OSError as error:
        raise StorageError(f"{source.path}: can't be read ({error.strerror})") from error


def _check_unchanged(source: Source, stamps: list[tuple[int, int]]) -> None:
    """Refuse to commit rows that may not be those whose digest the manifest has."""
    if _stamps(source) != stamps:
        raise IdentityError(
            f"{source.path}: changed while it was scored. What was scored before is kept; restore the file and run the "
            "same command again, or score the new one into another precompute.output (precompute.reuse copies)"
        )


def _declared(config: Config, source: Source) -> dict[str, Any]:
    return {
        **declared_reference(config),
        "dataset": describe(source),
        "data": _data_of(source),
        "tokens_per_batch": config.precompute.tokens_per_batch,
    }


def _data_of(source: Source) -> dict[str, Any]:
    """The settings of `data` that read a set's rows again."""
    range_of_rows = "" if (source.start, source.stop) == (0, None) else f"[{source.start}:{source.stop or ''}]"
    return {
        "path": source.path,
        "name": source.name,
        "revision": source.revision,
        "split": source.split + range_of_rows,
        "format": source.format,
        "columns": dict(source.columns),
        "streaming": source.streaming,
    }


def _provenance(config: Config) -> Mapping[str, Any]:
    settings = config.precompute
    spread: dict[str, str] = {}
    if settings.device_map is not None:
        spread["device_map"] = settings.device_map
    if settings.tp_plan is not None:
        spread["tp_plan"] = f"{settings.tp_plan}, {processes_of_launch()[1]} processes"
    return {
        "tokens_per_batch": settings.tokens_per_batch,
        "device": pick_device().type,
        **spread,
        "versions": library_versions(),
    }
