"""Stage one: stream the pairs through the frozen reference, and write their log-probs to shards.

Worker I of N takes the units whose number leaves I when divided by N, and skips those that are there. A worker that
finds all of them there writes the index. So any number of workers can start a run, and any other number can finish it.
Each process of one launch is a worker, unless they hold one reference together (`precompute.tp_plan`): then the first
process is the only worker.
"""

import math
from collections.abc import Mapping
from typing import Any

import click

from pipeline.base.digests import WatchedFiles
from pipeline.base.errors import ConfigError, is_out_of_memory
from pipeline.base.folders import open_folder
from pipeline.base.progress import say
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.base.versions import library_versions
from pipeline.config.schema import Config
from pipeline.data.reading import say_how_read
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, data_files, open_source
from pipeline.models.adapters import check_adapters
from pipeline.models.files import files_of_model, load_tokenizer, reference_sources
from pipeline.models.identity import check_dtypes, identity_of_run
from pipeline.models.lengths import check_max_length, exact_length_of_reference
from pipeline.models.loading import pick_device
from pipeline.models.recollection import Recollection, facts_of_stores
from pipeline.run.outputs import guard_run, guard_shards
from pipeline.run.records import delete_costs
from pipeline.scoring.memory import free_memory
from pipeline.scoring.tensor_parallel import Ensemble, LeaderModel, processes_of_launch, share_of_process
from pipeline.store.dating import with_template_date
from pipeline.store.plan import declared_of, plan_of, report_of
from pipeline.store.reuse import open_reusable
from pipeline.store.serving import serving_store
from pipeline.store.store import create_store, delete_store, is_finished
from pipeline.training.arguments import refused_here
from pipeline.training.settings import check_training, too_few_pairs
from pipeline.training.windows import next_window
from stages.precompute.siblings import Siblings
from stages.precompute.worker import Reference, ScoringJob, Worker, load_reference_scorer

__all__ = ["run"]


def run(
    config: Config, *, worker: tuple[int, int] = (0, 1), overwrite: bool = False, stop_at: float | None = None
) -> None:
    """Score the training split and every held-out set; do only what is missing, and nothing for `simpo` and the like.

    `worker` is (I, N): this process is worker I, from 0, of N; of several launched together, all of them are.

    Raises:
        UnfinishedError: A signal or the time asks to stop; the finished units are saved.
        IdentityError: The output folder holds shards of another reference, tokenization or dataset.
        DataError: A row can't be a pair, or a log-prob is not finite, and the settings say stop.
        ConfigError: A setting is impossible here.
    """
    if not config.loss.needs_reference:
        say(
            f"loss.type {', '.join(config.loss.types)}: has no reference, so there is nothing to do. Run refshard train"
        )
        return
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
            "--overwrite: each of several processes would delete what the others have begun. Delete "
            f"{config.precompute.output} yourself, or start one process first"
        )
    _run(config, share_of_process(worker), flag, None, overwrite=overwrite)


def _follow(config: Config, ensemble: Ensemble) -> None:
    """Run the leader's forward passes on this process's part of the reference, until the leader says to leave."""
    model: Any = None
    while True:
        order, content = ensemble.broadcast()
        if order == "leave":
            if content:
                raise click.exceptions.Exit(content)
            return
        if order == "load":
            model = load_reference_scorer(config, load_tokenizer(config, weights=False), ensemble).model
            continue
        try:
            LeaderModel.follow(model, content, ensemble, pick_device())
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # The leader continues with smaller batches.
        free_memory()


def _run(config: Config, share: tuple[int, int], flag: StopFlag, ensemble: Ensemble | None, *, overwrite: bool) -> None:
    if config.reference.declared is not None:
        raise ConfigError(
            "reference.declared: a reference known by name alone can't be scored with. Bring its log-probs with "
            f"refshard import FILE --config F --set NAME (for {', '.join(config.data.names)}), or name a model in "
            "reference.model"
        )
    recollection = Recollection("precompute", config)
    guard_shards(config, overwrite=overwrite)
    if not config.train.is_empty:
        guard_run(config)
        # Report a mistake in the other stage's section before an hour of scoring, not after it.
        check_training(config)
        check_dtypes(config)
        if error := refused_here(config):
            say(f"warning: refshard train would stop on this machine: {error}", err=True)
    check_adapters(config)
    check_max_length(config)
    sources = {name: open_source(config.data, name) for name in config.data.names}
    _check_enough(config, {name: count_rows(sources[name]) for name in config.data.training})
    tokenizer = load_tokenizer(config)
    for name, source in sources.items():
        if overwrite or not is_finished(open_folder(config.precompute.output).child(name)):
            say_how_read(name, source, config.data.of(name), has_template=tokenizer.chat_template is not None)
    # The run's folder, not a window's, which is deleted when its reference has moved.
    costs_in = open_folder(config.precompute.output)
    rows = None
    if config.reference.sync is not None:
        window = next_window(with_template_date(config, tokenizer, overwrite=overwrite), sources, tokenizer)
        if window is None:
            return
        config, sources, rows = window
    model, adapter = reference_sources(config)
    # Before the identity takes their digests, for the same reason as with the data.
    files = WatchedFiles(files_of_model(model.folder(), adapter))
    # Late, so that workers that start together at midnight hardly disagree.
    config = with_template_date(config, tokenizer, overwrite=overwrite)
    identity, output = identity_of_run(config, tokenizer), open_folder(config.precompute.output)
    worker = Worker(
        config=config,
        share=share,
        tokenizer=tokenizer,
        reference=Reference(config, tokenizer, files, ensemble),
        reusable=open_reusable(config.precompute.reuse, identity),
        siblings=Siblings({name: output.child(name) for name in config.data.training}, identity),
        flag=flag,
        costs_in=costs_in,
    )
    missing, kept = 0, {}
    # All at first: a set copies what another set's store holds.
    for name in sources if overwrite else ():
        delete_store(output.child(name))
        delete_costs(costs_in, name)
    for name, source in sources.items():
        job = _make_job(name, source, rows if name == "train" else None, worker, identity)
        if job is None:
            report, kept[name] = report_of(name, output.child(name), config)
            say(report)
            continue
        missing += worker.score(job)
        if is_finished(job.folder):
            report, kept[name] = report_of(name, job.folder)
            say(report)
            if name == config.data.training[-1] and rows is None:
                _check_enough(config, {name: kept.get(name) for name in config.data.training})
    if len(kept) == len(sources):
        recollection.remember(facts_of_stores(config, tokenizer, kept))
    if missing:
        say(f"Worker {worker.name} is done; {missing} units of other workers are still missing.")


def _make_job(
    name: str, source: Source, rows: frozenset[int] | None, worker: Worker, identity: Mapping[str, Any]
) -> ScoringJob | None:
    """Create the store of a set, or check that the one that is there is this run's; None if another one serves it."""
    config = worker.config
    folder = open_folder(config.precompute.output).child(name)
    # Before the plan takes the data's digest: a change in between must be noticed.
    files = WatchedFiles(
        data_files(source),
        "Parts written before are kept. Restore the file and run the same command again, or score the new one into "
        "another precompute.output (precompute.reuse copies)",
    )
    plan = plan_of(config, source, worker.reusable, rows)
    if serving_store(folder, identity, plan, exact_length_of_reference(config)):
        return None
    header = create_store(folder, identity, plan, declared_of(config, source), _provenance(config))
    return ScoringJob(name=name, source=source, files=files, rows=rows, folder=folder, header=header)


def _check_enough(config: Config, pairs: Mapping[str, int | None]) -> None:
    """Raise ConfigError if stage two would have nothing to train on. A set's number of pairs may be unknown."""
    known = {name: count for name, count in pairs.items() if count is not None}
    if len(known) < len(pairs):
        return
    launch, of_epoch = config.cluster.train, math.ceil(sum(config.data.fraction(n) * known[n] for n in known))
    if error := too_few_pairs(config.train.options, of_epoch, launch.nodes * launch.processes):
        raise error


def _provenance(config: Config) -> Mapping[str, Any]:
    section = config.precompute
    spread: dict[str, str] = {} if section.device_map is None else {"device_map": section.device_map}
    if section.tp_plan is not None:
        spread["tp_plan"] = f"{section.tp_plan}, {processes_of_launch()[1]} processes"
    return {
        "tokens_per_batch": section.tokens_per_batch,
        "device": pick_device().type,
        **spread,
        "versions": library_versions(),
    }
