"""Stage two: train the policy on pairs joined with their reference log-probs. No reference model is loaded.

stores + dataset -> joined set -> micro-batches -> policy token logps -> DPO loss -> a folder that loads
"""

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState

from pipeline.base.digests import WatchedFiles
from pipeline.base.errors import DataError, number_of, stopped_as_asked
from pipeline.base.files import delete_named, read_json, replace_file, write_json
from pipeline.base.folders import open_folder
from pipeline.base.progress import say, without_nan, without_other_bars
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.base.versions import library_versions
from pipeline.config.schema import Config
from pipeline.models.adapters import check_adapters
from pipeline.models.files import NamedModel, at_checkpoint, load_tokenizer
from pipeline.models.lengths import check_max_length
from pipeline.models.loading import load_policy
from pipeline.models.recollection import Recollection, facts_of_run
from pipeline.run.attempts import ATTEMPT_NAME, Attempt, claim_run
from pipeline.run.card import model_card
from pipeline.run.checkpoints import (
    best_checkpoint,
    delete_references,
    is_last,
    is_recorded,
    newest_step,
    refuse_other_run,
    reopening,
)
from pipeline.run.identity import check_same_run, identity_of_training, is_longer, run_identity
from pipeline.run.inputs import RunInputs, SetInputs, describe_policy, describe_reference
from pipeline.run.outputs import guard_run
from pipeline.run.reading import RECORD, read_record
from pipeline.run.records import INPUTS, RunLog, read_costs
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import not_packed
from pipeline.store.dating import with_template_date
from pipeline.store.store import Store
from pipeline.training.arguments import arguments_of_loop, in_one_piece, loads_once, training_arguments
from pipeline.training.batches import Collator
from pipeline.training.beginning import JOINED, begin_attempt
from pipeline.training.commit import CommitCallback
from pipeline.training.ending import metrics_of, rehearse_saving, save_policy
from pipeline.training.finite import FiniteWatch
from pipeline.training.gate import make_gate, run_gate
from pipeline.training.handover import load_in_main_process
from pipeline.training.hub import Hub, HubCallback
from pipeline.training.joined_cache import JoinedCache, joined_folder
from pipeline.training.joining import (
    check_joined,
    count_pairs,
    join_sets,
    joined_token_logps,
    open_joined,
    open_mixture,
    open_stores_of_run,
    watch_inputs,
    watch_joined,
)
from pipeline.training.losses import balance_weight
from pipeline.training.processes import first_on_each_machine, on_main_process, other_processes
from pipeline.training.recording import Margins, RecordCallback
from pipeline.training.settings import check_metric, check_training, quantized_error, too_few_pairs
from pipeline.training.spacing import SpacingWatch
from pipeline.training.steps import order_of_run
from pipeline.training.tracking import attach, one_page
from pipeline.training.trainer import EvaluationLeft, PairTrainer
from pipeline.training.windows import Window, WindowCallback, first_reference, window_at, window_config

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One attempt of a run, as the phases of stage two share it."""

    config: Config
    """The run's settings"""
    arguments: transformers.TrainingArguments
    """The `train` section, as the user has set it"""
    tokenizer: Any
    base: WatchedFiles
    """Files of the policy's model, and of its adapter, before training"""
    data: WatchedFiles
    """Local files of the sets"""
    cache: JoinedCache
    """Joined sets of earlier runs; those of a window lie with its reference, and are deleted with it"""
    identity: Mapping[str, Any]
    """Identity that a checkpoint must have"""
    attempt: Attempt
    flag: StopFlag
    checkpoint: Path | None
    """Checkpoint that the attempt resumes"""
    all_steps_are_done: bool
    """True if the checkpoint is that of the run's last step"""
    window: Window | None
    """With `reference.sync`, the window that this attempt trains"""
    scored: Config
    """Settings that the stores were scored with: the run's own, or the window's"""
    stores: Mapping[str, Store]
    """Stores by set; a window has those alone that it uses, and a loss without a reference has none"""

    @property
    def output(self) -> Path:
        return self.attempt.run_folder

    @property
    def joined(self) -> Path:
        return self.output / JOINED / self.attempt.name


def run(config: Config, *, overwrite: bool = False, stop_at: float | None = None) -> None:
    """Train, resuming the run's last whole checkpoint if there is one, and save the policy.

    With `reference.sync`, train one window: up to the step where the reference moves.

    Args:
        config: The run's settings.
        overwrite: Delete the checkpoints and the record of an earlier run in the output folder.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        UnfinishedError: The stores are not complete, or a signal or the time asked to stop and a checkpoint was saved.
        IdentityError: Shards or checkpoints belong to another reference, tokenization or run.
        DataError: Pairs have no reference log-probs, or files are damaged.
        FencedError: Another attempt of this run has taken over.
    """
    flag, recollection = watch_signals(stop_at), Recollection("train", config)
    arguments = training_arguments(config)
    output = config.train.folder
    # Before any process makes something in the folder.
    on_main_process(lambda: guard_run(config))
    check_training(config, arguments)
    check_adapters(config)
    check_max_length(config)
    # Before any identity takes their digests, which the other processes of a machine then find in the cache.
    base, data = first_on_each_machine(lambda: watch_inputs(config), lambda: watch_inputs(config))
    tokenizer = load_tokenizer(config)
    training = identity_of_training(config)
    facts = facts_of_run(config, tokenizer, training, pushes=arguments.push_to_hub)
    on_main_process(lambda: recollection.remember(facts))
    config = with_template_date(config, tokenizer)
    if config.reference.sync:
        # The stores change with every window; the first reference does not.
        stores, fingerprints = {}, first_reference(config, tokenizer, overwrite=overwrite)
    else:
        stores = open_stores_of_run(config, config.data.names if config.loss.needs_reference else (), tokenizer)
        fingerprints = {name: store.fingerprint for name, store in stores.items()}
    identity = run_identity(config, fingerprints, PartialState().num_processes, training)

    if not overwrite:
        if is_recorded(output):
            record = read_record(output)
            check_same_run(output, record.get("identity", {}), identity)
            if is_longer(record["identity"], identity):
                _say(reopening(output, record))
            elif arguments.push_to_hub and "pushed_to" not in record:
                on_main_process(lambda: _push(output, Hub(arguments), record))
                return
            else:
                _say(f"{output}: this run is finished already; nothing to do.")
                return
        refuse_other_run(output, identity)
    attempt = on_main_process(lambda: claim_run(output, identity))
    with attempt.owning():
        checkpoint = on_main_process(lambda: begin_attempt(config, attempt, identity, overwrite=overwrite))
        window, scored = None, config
        if config.reference.sync:
            order = order_of_run(arguments, count_pairs(config, tokenizer, flag))
            window = window_at(config, arguments, order, checkpoint)
            scored = window_config(config, window, output)
            stores = open_stores_of_run(scored, filter(window.uses, config.data.names), tokenizer)
        _train(
            TrainingRun(
                config=config,
                arguments=arguments,
                tokenizer=tokenizer,
                base=base,
                data=data,
                cache=JoinedCache(joined_folder(scored), lambda: recollection.is_current() and data.are_untouched()),
                identity=identity,
                attempt=attempt,
                flag=flag,
                checkpoint=checkpoint,
                all_steps_are_done=checkpoint is not None and is_last(checkpoint, identity),
                window=window,
                scored=scored,
                stores=stores,
            )
        )


# Train.


def _train(run: TrainingRun) -> None:
    window = None if run.window is None else run.window.number
    described = on_main_process(
        lambda: join_sets(run.config, run.stores, run.tokenizer, run.joined, run.flag, window=window, cache=run.cache)
    )
    run.data.check()
    first_on_each_machine(lambda: check_joined(run.joined), lambda: None)
    mixture = open_mixture(run.config, run.joined, run.arguments)
    sets = {"train": mixture.pairs, **{name: open_joined(run.joined, name) for name in run.config.data.eval}}
    if run.config.data.sets:
        _say(f"An epoch has {', '.join(f'{count:,} pairs of {name}' for name, count in mixture.counts.items())}")
    if error := too_few_pairs(run.config.train.options, len(sets["train"]), PartialState().num_processes):
        raise error
    scorer = _load_policy(run)
    trainer, record, commit = _make_trainer(run, sets, scorer)
    taken = {name: replace(inputs, of_epoch=mixture.counts.get(name)) for name, inputs in described.items()}
    inputs = on_main_process(lambda: _write_inputs(run, taken, scorer.model))
    attach(trainer.args, run.config, inputs)
    hub = Hub(run.arguments) if run.arguments.push_to_hub else None
    on_main_process(lambda: _rehearse(run, trainer, inputs, sets, hub))
    if run.checkpoint is not None:
        _say(f"Resuming {run.checkpoint}{other_processes(run.checkpoint, scorer.model)}")
    finishes = run.window is None or run.window.is_last
    with one_page(trainer, run.attempt, resumes=run.checkpoint is not None):
        try:
            _run_steps(run, trainer)
            if finishes and not commit.stopped_early:
                on_main_process(commit.check_files)
                _finish(run, trainer, inputs, len(sets["train"]), hub)
        except EvaluationLeft as left:
            trainer.leave(save=left.save)
    step = trainer.state.global_step
    record.end(step, finished=finishes and not commit.stopped_early)
    if commit.stopped_early:
        saved = newest_step(run.output)
        where = f"saved in {run.output / f'checkpoint-{saved}'}" if saved else "there was nothing to save"
        raise stopped_as_asked(where, f"after step {step} of {trainer.state.max_steps}")
    if not finishes:
        _say(f"Window {window} is done: step {step}; next the reference moves")


def _load_policy(run: TrainingRun) -> Scorer:
    """Load the policy, ready to be scored and trained."""
    config, arguments = run.config, run.arguments
    # DeepSpeed loads its own form of the weights by itself.
    if run.checkpoint is not None and (run.all_steps_are_done or not arguments.deepspeed):
        config = at_checkpoint(config, run.checkpoint)
    # The fresh adapter's factors are the first random numbers of the run, as in TRL.
    transformers.set_seed(arguments.seed)
    _say(f"Loading the policy {config.policy.model} on {arguments.device.type} ...")

    def load() -> Any:
        with in_one_piece(arguments):
            loaded = load_policy(config)
        if getattr(loaded, "is_quantized", False) and not config.policy.has_adapter:
            raise quantized_error(NamedModel.policy(config), str(loaded.quantization_method))
        if NamedModel.policy(config) == NamedModel.policy(run.config):
            run.base.check_untouched()
        return loaded

    def check(loaded: Any) -> Scorer:
        return Scorer.check(loaded, run.tokenizer, "policy.model", config.data.max_length)

    # Weights are handed on when training begins.
    if loads_once(arguments) and not run.all_steps_are_done:
        scorer = load_in_main_process(load, check, config.policy, run.tokenizer, arguments)
    else:
        scorer = check(load())
    policy = scorer.model
    if scorer.reading == "cached":
        # A cache keeps no gradient.
        scorer.reading = "padded"
    if scorer.reading != "packed":
        _say(f"warning: {not_packed(policy, scorer.reading)}")
    if balance_weight(policy, config.loss):
        # A balance loss counts every token as often as it stands in padded rows.
        scorer.reading = "padded"
    if config.policy.has_adapter:
        if arguments.gradient_checkpointing:
            policy.enable_input_require_grads()
        trained, total = policy.get_nb_trainable_parameters()
        _say(f"Training {trained:,} of {total:,} parameters")
    return scorer


def _write_inputs(run: TrainingRun, sets: Mapping[str, SetInputs], policy: Any) -> RunInputs:
    inputs = RunInputs(
        reference=describe_reference(run.config, run.stores),
        policy=describe_policy(run.config.policy, policy),
        sets=sets,
        stage_one=read_costs(open_folder(run.config.precompute.output)),
    )
    write_json(run.output / INPUTS, asdict(inputs))
    return inputs


def _make_trainer(
    run: TrainingRun, sets: Mapping[str, datasets.Dataset], scorer: Scorer
) -> tuple[PairTrainer, RecordCallback, CommitCallback]:
    config, arguments, window = run.config, run.arguments, run.window
    state = PartialState()
    held_out = {name: rows for name, rows in sets.items() if name != "train"}
    # Other checkpoints than adapters are whole models.
    watched = [run.base] if config.policy.has_adapter else []
    if state.is_main_process:
        watched.append(watch_joined(run.joined))
    keep = arguments.save_total_limit
    commit = CommitCallback(run.identity, run.flag, attempt=run.attempt, keep=keep, watched=watched)
    margins = Margins(run.attempt, next(iter(held_out)) if len(held_out) == 1 else None)
    micro_batches = arguments.gradient_accumulation_steps * state.num_processes
    about = {
        "pairs": {name: len(rows) for name, rows in sets.items()},
        "processes": state.num_processes,
        "batch_pairs": arguments.per_device_train_batch_size * micro_batches,
    }
    record = RecordCallback(RunLog(run.attempt), margins, about)
    gates = {
        name: make_gate(config, run.scored, run.stores[name], window)
        for name in config.data.training
        if name in run.stores
    }

    def before_training(trainer: PairTrainer) -> None:
        if run.checkpoint is not None:
            # The library forgets a best checkpoint that is not where it was saved.
            saved = read_json(run.checkpoint / "trainer_state.json")
            trainer.state.best_model_checkpoint = saved["best_model_checkpoint"]
        for name, gate in gates.items():
            run_gate(trainer, gate, open_joined(run.joined, name), _say, commit.leave_if_asked, record.pulse)
            record.restart()
        if window is not None and trainer.state.global_step == window.first > 0 and window.first in window.evaluations:
            # The library evaluated at a step's end, and could not where the reference moves right after it.
            trainer.evaluate()
        commit.leave_if_asked()
        if run.checkpoint is not None:
            trainer.finish_evaluation(run.checkpoint)
        elif arguments.eval_on_start:
            trainer.evaluate()

    finite = FiniteWatch(run.output, _say, go_on=config.train.on_nonfinite == "continue")
    trainer = PairTrainer(
        loss=config.loss,
        activation_offload=config.train.activation_offload,
        attempt=run.attempt,
        margins=margins if state.is_main_process else None,
        finite=finite,
        set_names=sorted(config.data.sets),
        before_training=before_training,
        model=scorer.model,
        args=arguments_of_loop(arguments),
        data_collator=Collator(
            scorer.pad_id, config.data.max_length, joined_token_logps(run.joined), packed=scorer.reading == "packed"
        ),
        train_dataset=sets["train"],
        # One held-out set logs under `eval_`, several under `eval_NAME_`.
        eval_dataset=(held_out if len(held_out) > 1 else next(iter(held_out.values()), None)),
        processing_class=run.tokenizer,
        # A stop request comes last, since it overrules what the others want done at a step's end.
        callbacks=[SpacingWatch(_say), finite, record, *([] if window is None else [WindowCallback(window)]), commit],
    )
    # In a notebook the library draws a table.
    for librarys_own in (transformers.trainer.DEFAULT_PROGRESS_CALLBACK, transformers.PrinterCallback):
        trainer.remove_callback(librarys_own)
    return trainer, record, commit


def _rehearse(
    run: TrainingRun, trainer: PairTrainer, inputs: RunInputs, sets: Mapping[str, datasets.Dataset], hub: Hub | None
) -> None:
    """Try what the run's end needs, before its first step."""
    held_out = {name: "token_start" in rows.column_names for name, rows in sets.items() if name != "train"}
    balanced = balance_weight(trainer.model, run.config.loss) != 0
    check_metric(run.arguments, run.config.loss, held_out, balanced=balanced)
    rehearse_saving(trainer, run.attempt, lambda: _card(run, inputs, len(sets["train"]), {}, 0, 0))
    if hub is not None:
        hub.open()
        trainer.add_callback(HubCallback(hub))


def _run_steps(run: TrainingRun, trainer: PairTrainer) -> None:
    checkpoint = run.checkpoint
    try:
        with without_other_bars():
            if checkpoint is not None and run.all_steps_are_done:
                # The library would take one more step.
                trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                trainer.finish_evaluation(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except pickle.UnpicklingError as error:
        # Its digests hold, so it was saved like that, and not by this program.
        raise DataError(f"{checkpoint}: holds objects other than tensors and numbers; nothing of it was run") from error


# Finish.


def _finish(run: TrainingRun, trainer: PairTrainer, inputs: RunInputs, pairs: int, hub: Hub | None) -> None:
    """Evaluate, save the policy and its card, and record that the run is finished."""
    output = run.output
    step = last = trainer.state.global_step
    saved_as = trainer.state.best_model_checkpoint
    if run.arguments.load_best_model_at_end and saved_as is not None:
        best = on_main_process(lambda: best_checkpoint(output, saved_as))
        trainer.load_best(best, lambda folder: load_policy(at_checkpoint(run.config, folder)))
        step = int(best.name.removeprefix("checkpoint-"))
    elif run.arguments.load_best_model_at_end:
        wanted = run.arguments.metric_for_best_model
        _say(f"warning: no evaluation gave a finite {wanted}; the weights are those of the last step, {last}")
    metrics = metrics_of(trainer, step) if run.config.train.evaluates_at_end else {}
    save_policy(trainer, run.attempt)
    if not PartialState().is_main_process:
        return
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    train_loss = sum(losses) / len(losses) if losses else None
    replace_file(output / "README.md", _card(run, inputs, pairs, metrics, step, last))
    record: dict[str, Any] = {"finished": True, "step": step, "trained_steps": last, "train_loss": train_loss}
    record |= {"identity": run.identity, "metrics": without_nan(metrics), "versions": library_versions()}
    run.attempt.check()
    write_json(output / RECORD, without_nan(record))
    delete_named(output / JOINED, ATTEMPT_NAME)
    delete_references(output)
    mean = "" if train_loss is None else f", training loss {train_loss:.4f}"
    which = "" if step == last else f"; its weights are those of step {step}, the best"
    widened = f"; its weights are {inputs.policy.widened}" if inputs.policy.widened else ""
    say(f"The policy is in {output} ({number_of(last, 'step')}{mean}){which}{widened}")
    if hub is not None:
        _push(output, hub, without_nan(record))


def _card(run: TrainingRun, inputs: RunInputs, pairs: int, metrics: Mapping[str, float], step: int, last: int) -> bytes:
    """Write the model card; `step` is that of the weights, `last` the run's last one."""
    card = model_card(run.config, inputs, name=run.output.name, pairs=pairs, metrics=metrics, steps=(step, last))
    return card.encode("utf-8", errors="replace")


def _push(output: Path, hub: Hub, record: Mapping[str, Any]) -> None:
    """Push a finished run's policy, and record where it is."""
    name = hub.push(output, "Model save")
    write_json(output / RECORD, {**record, "pushed_to": name})
    say(f"The policy is on the hub, in {name}")


def _say(text: str) -> None:
    if PartialState().is_main_process:
        say(text)
