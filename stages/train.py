"""Stage two: train the policy on pairs joined with their reference log-probs. No reference model is loaded.

stores + dataset -> joined set -> micro-batches -> policy token logps -> DPO loss -> a folder that loads
"""

import contextlib
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import datasets
import pyarrow.compute as pc
import torch
import transformers
from accelerate import PartialState

from pipeline.base.errors import ConfigError, DataError, UnfinishedError
from pipeline.base.files import read_json, replace_file, sync_tree, write_json
from pipeline.base.folders import open_folder
from pipeline.base.progress import say, without_other_bars
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.base.versions import library_versions
from pipeline.config.reader import as_dict, settings_text
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger
from pipeline.data.loading import load_pairs
from pipeline.data.sources import describe, open_source
from pipeline.models.files import at_checkpoint, load_tokenizer, policy_dtype, policy_settings
from pipeline.models.identity import Kinship, fingerprint_of, identity_of_run, kinship
from pipeline.models.loading import load_policy
from pipeline.run.attempts import Attempt, claim_run
from pipeline.run.card import model_card
from pipeline.run.checkpoints import (
    delete_run,
    find_checkpoint,
    is_recorded,
    newest_step,
    processes_of,
    refuse_other_run,
)
from pipeline.run.identity import check_same_run, run_identity
from pipeline.run.reading import RECORD, SETTINGS
from pipeline.run.records import RunLog, read_costs, write_inputs
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.selfcheck import not_packed
from pipeline.store.join import join
from pipeline.store.reference_table import TokenLogps, load_reference_table
from pipeline.store.store import Store, check_identity, open_store
from pipeline.training.arguments import training_arguments
from pipeline.training.batches import make_collator
from pipeline.training.commit import CommitCallback
from pipeline.training.gate import Gate, GateCallback
from pipeline.training.losses import balance_weight, router_aux_weight
from pipeline.training.processes import on_main_process
from pipeline.training.recording import Margins, RecordCallback
from pipeline.training.steps import order_of_run
from pipeline.training.trainer import EvaluationLeft, PairTrainer, saving
from pipeline.training.windows import Window, WindowCallback, check_mixable, window_at, window_config

__all__ = [
    "run",
]

JOINED = "joined"


def run(config: Config, *, overwrite: bool = False, stop_at: float | None = None) -> None:
    """Train, going on from the run's last whole checkpoint if there is one, and save the policy.

    With `reference.sync`, train one window: up to the step where the reference moves.

    Args:
        config: The run's settings.
        overwrite: Delete the checkpoints and the record of an earlier run in the output folder.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        UnfinishedError: The stores are not complete, or a signal or the time asked to stop and a checkpoint was saved.
        IdentityError: Shards or checkpoints belong to another reference, tokenization or run.
        DataError: Pairs have no reference log-probs, or files are damaged.
        FencedError: Another start of this run has taken over.
    """
    flag = watch_signals(stop_at)
    arguments = training_arguments(config)
    output = config.train.folder
    state = PartialState()
    router_aux_weight(policy_settings(config), config.loss)
    if config.reference.sync:
        check_mixable(config)
    tokenizer = load_tokenizer(config)
    stores = {} if config.reference.sync else _open_stores(config, ["train", *config.data.eval], tokenizer)
    identity = run_identity(config, _fingerprints(config, stores, tokenizer), state.num_processes)

    if not overwrite:
        if _is_finished(output, identity):
            _say(state, f"{output}: this run is finished already; nothing to do.")
            return
        refuse_other_run(output, identity)
    attempt = on_main_process(lambda: claim_run(output, identity))
    with _while_owned(attempt):
        _train(config, arguments, attempt, flag, stores, tokenizer, identity, state, overwrite=overwrite)


def _train(
    config: Config,
    arguments: transformers.TrainingArguments,
    attempt: Attempt,
    flag: StopFlag,
    stores: dict[str, Store],
    tokenizer: Any,
    identity: Mapping[str, Any],
    state: PartialState,
    *,
    overwrite: bool,
) -> None:
    """Train, in a folder that is this start's own by now."""
    output = attempt.run_folder

    def begin() -> Path | None:
        if overwrite:
            delete_run(output)
        _delete_leftovers(output)
        checkpoint = find_checkpoint(output, identity, lambda text: click.echo(f"warning: {text}", err=True))
        _save_settings(output, config)
        return checkpoint

    checkpoint = on_main_process(begin)
    window, settings_of_window = None, config
    if config.reference.sync:
        window = _window(config, arguments, tokenizer, checkpoint, flag)
        settings_of_window = window_config(config, window, output)
        stores = _open_stores(settings_of_window, _sets_of(config, window), tokenizer)
    joined = output / JOINED / attempt.name
    on_missing = config.train.on_missing
    joins = on_main_process(lambda: _join_all(config, stores, tokenizer, joined, on_missing, window, flag))
    sets = {name: datasets.Dataset.from_file(str(_joined_file(joined, name))) for name in ("train", *config.data.eval)}

    finished = checkpoint is not None and _is_trained(checkpoint)
    # DeepSpeed loads its own form of the weights by itself.
    comes_with_weights = checkpoint is not None and (finished or not arguments.deepspeed)
    scorer = _load_policy(
        at_checkpoint(config, checkpoint) if checkpoint and comes_with_weights else config, tokenizer, arguments, state
    )
    policy = scorer.model
    keep, arguments.save_total_limit = arguments.save_total_limit, None  # the library would count broken ones
    # A run that goes on has been measured at its start.
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    commit = CommitCallback(identity, flag, attempt=attempt, keep=keep, going_on_from=checkpoint)
    margins = Margins(attempt, next(iter(config.data.eval)) if len(config.data.eval) == 1 else None)
    record = RecordCallback(
        RunLog(attempt),
        margins,
        pairs={name: len(dataset) for name, dataset in sets.items()},
        batch_pairs=(
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * state.num_processes
        ),
    )
    callbacks: list[Any] = [record]
    if "train" in stores:
        gate = _gate(config, settings_of_window, stores["train"], window)
        callbacks.append(GateCallback(gate, lambda text: _say(state, text), commit.leave_if_asked))
    if window is not None:
        callbacks.append(WindowCallback(window))
    # Last, since a stop request overrules what the others want done at a step's end.
    callbacks.append(commit)
    trainer = PairTrainer(
        loss=config.loss,
        activation_offload=config.train.activation_offload,
        attempt=attempt,
        load_policy=lambda folder: load_policy(at_checkpoint(config, folder)),
        margins=margins if state.is_main_process else None,
        model=policy,
        args=arguments,
        data_collator=make_collator(
            scorer.pad_id,
            config.data.max_length,
            TokenLogps(_token_file(joined)),
            packed=scorer.packed,
        ),
        train_dataset=sets["train"],
        eval_dataset=_eval_sets(sets),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    for callback in callbacks:
        callback.trainer = trainer
    for librarys_own in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(librarys_own)
    on_main_process(lambda: write_inputs(output, _inputs(config, stores, joins, sets, policy)))
    if checkpoint is not None:
        _say(state, f"Going on from {checkpoint}{_with_other_processes(checkpoint, policy, state)}")
    try:
        with contextlib.suppress(EvaluationLeft), without_other_bars():
            if checkpoint is not None and finished:
                # All steps are done, and the library would take one more.
                trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
                trainer.finish_evaluation(checkpoint)
                if arguments.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                    trainer._load_best_model()
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except pickle.UnpicklingError as error:
        # Its digests hold, so it was saved like that, and not by this program.
        raise DataError(f"{checkpoint}: holds objects other than tensors and numbers; nothing of it was run") from error
    if commit.stopped_early:
        record.end(trainer.state.global_step, finished=False)
        raise _unfinished(trainer, output)
    if window is not None and not window.is_last:
        record.end(trainer.state.global_step, finished=False)
        _say(state, f"Window {window.number} is done: step {trainer.state.global_step}; next the reference moves")
        return
    try:
        _finish(config, trainer, attempt, stores, identity, len(sets["train"]), state)
    except UnfinishedError:
        record.end(trainer.state.global_step, finished=False)
        raise
    record.end(trainer.state.global_step, finished=True)


@contextlib.contextmanager
def _while_owned(attempt: Attempt) -> Iterator[None]:
    """Say so where another start has taken over: whatever went wrong then is a consequence of it."""
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):
            attempt.check()
        raise


def _unfinished(trainer: PairTrainer, output: Path) -> UnfinishedError:
    step, saved = trainer.state.global_step, newest_step(output)
    return UnfinishedError(
        f"stopped as asked after step {step} of {trainer.state.max_steps}; "
        + (f"saved in {output / f'checkpoint-{saved}'}" if saved else "nothing was to be saved")
        + ". Run the same command again"
    )


def _load_policy(
    config: Config, tokenizer: Any, arguments: transformers.TrainingArguments, state: PartialState
) -> Scorer:
    """Load the policy, ready to be scored and trained."""
    # The fresh adapter's factors are the first random numbers of the run, as in TRL.
    transformers.set_seed(arguments.seed)
    with _in_one_piece(arguments):
        policy = load_policy(config)
    scorer = Scorer.check(policy, tokenizer, "policy.model")
    if not scorer.packed:
        _say(state, f"warning: {not_packed(policy)}")
    if balance_weight(policy, config.loss):
        # A balance loss counts every token as often as it stands in padded rows.
        scorer.packed = False
    if config.policy.has_adapter:
        if arguments.gradient_checkpointing:
            policy.enable_input_require_grads()
        trained, total = policy.get_nb_trainable_parameters()
        _say(state, f"Training {trained:,} of {total:,} parameters")
    return scorer


@contextlib.contextmanager
def _in_one_piece(arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Have the policy loaded whole under DeepSpeed too, whose ZeRO-3 would give each process a share of it at once.

    It is checked before it is trained, and DeepSpeed puts weights together for a forward only once training has begun.
    """
    library: Any = transformers.integrations.deepspeed
    library.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed:
            library.set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def _finish(
    config: Config,
    trainer: PairTrainer,
    attempt: Attempt,
    stores: Mapping[str, Store],
    identity: Mapping[str, Any],
    pairs: int,
    state: PartialState,
) -> None:
    """Evaluate, save the policy and its card, and write down that the run is finished."""
    output = attempt.run_folder
    try:
        metrics = _final_metrics(trainer)
    except EvaluationLeft:
        trainer.forget_evaluation()
        if on_main_process(lambda: newest_step(output)) < trainer.state.global_step:
            trainer.save_checkpoint()
        raise _unfinished(trainer, output) from None
    _save_policy(trainer, attempt)
    if not state.is_main_process:
        return
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    train_loss = sum(losses) / len(losses) if losses else None
    _write_card(config, output, stores, pairs, metrics)
    record = {"finished": True, "step": trainer.state.global_step, "identity": identity, "train_loss": train_loss}
    attempt.check()
    write_json(output / RECORD, {**record, "metrics": metrics, "versions": library_versions()})
    for folder in (JOINED, "references"):
        shutil.rmtree(output / folder, ignore_errors=True)
    mean = "" if train_loss is None else f", training loss {train_loss:.4f}"
    click.echo(f"The policy is in {output} ({trainer.state.global_step} steps{mean})")


def _save_policy(trainer: PairTrainer, attempt: Attempt) -> None:
    """Save the policy beside, then put each file under its name: another start's writing can't mix with this one's."""
    output, staging = attempt.run_folder, attempt.run_folder / f"{_STAGING}{attempt.name}"
    with saving(f"{output}: the policy"):
        trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()

    def put() -> None:
        sync_tree(staging)
        attempt.check()
        with saving(f"{output}: the policy"):
            for file in sorted(path for path in staging.rglob("*") if path.is_file()):
                target = output / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            shutil.rmtree(staging)

    on_main_process(put)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


# In front of the number of the start that saves there.
_STAGING = ".saving-"


def _delete_leftovers(output: Path) -> None:
    """Delete what earlier starts made for themselves alone."""
    for folder in (output / JOINED, *output.glob(f"{_STAGING}*")):
        shutil.rmtree(folder, ignore_errors=True)


def _window(
    config: Config, arguments: transformers.TrainingArguments, tokenizer: Any, checkpoint: Path | None, flag: StopFlag
) -> Window:
    """The window that the checkpoint stands in."""
    pairs = _until_stopped(load_pairs(open_source(config.data), tokenizer, config.data, Ledger()), flag)
    order = order_of_run(arguments, sum(1 for _ in pairs))
    return window_at(config, arguments, order, checkpoint)


def _until_stopped(pairs: Iterator[KeptPair], flag: StopFlag) -> Iterator[KeptPair]:
    """The pairs, up to a stop request."""
    for pair in pairs:
        if flag:
            raise UnfinishedError("stopped as asked before training began; run the same command again")
        yield pair


def _sets_of(config: Config, window: Window) -> list[str]:
    trains = ["train"] if window.last > window.first else []
    return [*trains, *(config.data.eval if window.evaluations else [])]


def _with_other_processes(checkpoint: Path, policy: Any, state: PartialState) -> str:
    """What to tell people where the checkpoint was saved by more or fewer processes than go on."""
    before = processes_of(checkpoint)
    if before == state.num_processes:
        return ""
    changed = f", saved by {before} process{'es' if before > 1 else ''}, in {state.num_processes}"
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.modules()):
        changed += "; dropout draws other random numbers from here on than it would have"
    return changed


def _is_trained(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the run's last step."""
    state = read_json(checkpoint / "trainer_state.json")
    return bool(state["global_step"] >= state["max_steps"])


def _fingerprints(config: Config, stores: Mapping[str, Store], tokenizer: Any) -> dict[str, str]:
    if config.reference.sync is None:
        return {name: store.fingerprint for name, store in stores.items()}
    # The stores change with every window; what they start from does not.
    return {"reference": fingerprint_of(identity_of_run(config, tokenizer))}


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        say(text)


def _open_stores(config: Config, names: Iterable[str], tokenizer: Any) -> dict[str, Store]:
    folder = open_folder(config.precompute.output)
    stores = {name: open_store(folder.child(name)) for name in names}
    check_identity(list(stores.values()), identity_of_run(config, tokenizer))
    return stores


def _gate(
    config: Config,
    settings_of_window: Config,
    store: Store,
    window: Window | None,
) -> Gate:
    kin = kinship(settings_of_window)
    if window is not None and window.number > 0:
        # A reference that has moved is the policy's equal only where it is a copy of it.
        copied = config.reference.sync is not None and config.reference.sync.mixup_alpha == 1
        kin = Kinship(at_start=copied, adapters_off=False, frozen_adapter=None)
    reference = store.manifest["identity"]["reference"]
    return Gate(
        store=store,
        # Of a reference known by name alone nothing is known, and nothing compared.
        reference_dtype=str(reference.get("dtype", "float32")),
        policy_dtype=policy_dtype(config),
        in_8_bits=(reference.get("quantization") or {}).get("bits") == 8,
        kinship=kin,
        start=0 if window is None else window.first,
        warn_only=config.train.on_mismatch == "warn",
    )


def _is_finished(output: Path, identity: Mapping[str, Any]) -> bool:
    if not is_recorded(output):
        return False
    check_same_run(output, read_json(output / RECORD).get("identity", {}), identity)
    return True


def _save_settings(output: Path, config: Config) -> None:
    """Save the settings, defaults filled in, before anything runs. Access tokens are left out."""
    output.mkdir(parents=True, exist_ok=True)
    replace_file(output / SETTINGS, settings_text(config).encode())


def _joined_file(joined: Path, name: str) -> Path:
    return joined / f"{name}.arrow"


def _token_file(joined: Path) -> Path:
    """Reference token logps of all sets, while the run lasts."""
    return joined / "token-logps.f32"


def _join_all(
    config: Config,
    stores: Mapping[str, Store],
    tokenizer: Any,
    joined: Path,
    on_missing: str,
    window: Window | None,
    flag: StopFlag,
) -> dict[str, dict[str, Any]]:
    """Join every set to its store, in a file of its own; give what became of its rows, by set."""
    joins = {}
    token_file = _token_file(joined)
    for name in ("train", *config.data.eval):
        source = open_source(config.data, config.data.eval.get(name))
        ledger = Ledger()
        pairs = _until_stopped(_in_vocabulary(load_pairs(source, tokenizer, config.data, ledger), config), flag)
        table = load_reference_table(
            [stores[name]] if name in stores else [],
            config.data.max_length,
            ld_alpha=config.loss.ld_alpha,
            folder=joined,
            token_file=token_file,
        )
        report = join(pairs, table, _joined_file(joined, name), keep_missing=window is not None)
        joins[name] = {
            "dataset": describe(source),
            "ledger": ledger.as_dict(),
            "matched": report.matched,
            "missing": report.missing,
        }
        if window is not None:
            # Only a window's pairs are scored; one that is missing stops its step.
            click.echo(f"{name}: {report.matched:,} of {ledger.kept:,} pairs scored for window {window.number}")
            continue
        store = stores[name]
        click.echo(f"{name}: {ledger.summary()}; {report.summary()}")
        if report.missing and on_missing == "stop":
            raise DataError(
                f"{report.missing:,} of {ledger.kept:,} pairs of {describe(source)} have no reference logps in "
                f"{store.folder} (first: {report.first_missing}). Either the dataset has changed since they "
                "were scored: run refshard precompute into a new precompute.output; or train without these pairs: "
                "train.on_missing: drop"
            )
        if report.matched == 0:
            raise DataError(
                f"{describe(source)}: none of its {ledger.kept:,} pairs is in {store.folder}; nothing to train on"
            )
    return joins


def _inputs(
    config: Config,
    stores: Mapping[str, Store],
    joins: Mapping[str, dict[str, Any]],
    sets: Mapping[str, datasets.Dataset],
    policy: Any,
) -> dict[str, Any]:
    """What this start of the run begins with, for people who look at it later."""
    store = stores["train"] if "train" in stores else next(iter(stores.values()))
    manifest = store.manifest
    described = {}
    for name, joined in joins.items():
        lengths = {
            side: int(pc.sum(pc.list_value_length(sets[name].data.table[f"{side}_ids"])).as_py() or 0)
            for side in ("prompt", "chosen", "rejected")
        }
        described[name] = {**joined, "tokens": lengths}
        if name in stores:
            described[name] |= {"store": str(stores[name].folder), "noise": dict(stores[name].index["noise"])}
    return {
        "reference": {
            "name": _reference_text(config, store),
            "identity": manifest["identity"]["reference"],
            "fingerprint": store.fingerprint,
        },
        "policy": {
            "model": config.policy.model,
            "adapter": _adapter_text(config),
            "dtype": config.policy.dtype,
            "parameters": sum(p.numel() for p in policy.parameters()),
            "trained_parameters": sum(p.numel() for p in policy.parameters() if p.requires_grad),
        },
        "sets": described,
        "stage_one": read_costs(open_folder(config.precompute.output)),
    }


def _in_vocabulary(pairs: Iterable[KeptPair], config: Config) -> Iterator[KeptPair]:
    """Pass pairs on; an id past the embedding is a crash without a name on a GPU."""
    size = getattr(policy_settings(config), "vocab_size", None)
    for pair in pairs:
        ids = pair.pair
        top = max(max(ids.prompt_ids), max(ids.chosen_ids), max(ids.rejected_ids))
        if size is not None and top >= size:
            raise ConfigError(
                f"policy.model: {pair.place} holds token id {top}, but the model's vocabulary has {size}; its weights "
                "and its tokenizer do not belong together"
            )
        yield pair


def _eval_sets(sets: Mapping[str, datasets.Dataset]) -> datasets.Dataset | dict[str, datasets.Dataset] | None:
    """One held-out set logs under `eval_`, several under `eval_NAME_`."""
    held_out = {name: dataset for name, dataset in sets.items() if name != "train"}
    if not held_out:
        return None
    return next(iter(held_out.values())) if len(held_out) == 1 else held_out


def _final_metrics(trainer: PairTrainer) -> dict[str, float]:
    """Held-out metrics of the finished policy: those of an evaluation at the last step, or of one now."""
    if trainer.eval_dataset is None:
        return {}
    last = [entry for entry in trainer.state.log_history if entry.get("step") == trainer.state.global_step]
    held_out = {key: value for entry in last for key, value in entry.items() if key.startswith("eval_")}
    return held_out or dict(trainer.evaluate())


def _is_timing(metric: str) -> bool:
    return any(word in metric for word in ("runtime", "per_second", "preparation_time"))


def _write_card(
    config: Config,
    output: Path,
    stores: Mapping[str, Store],
    pairs: int,
    metrics: Mapping[str, float],
) -> None:
    # The last window of all may have held-out sets alone.
    store = stores["train"] if "train" in stores else next(iter(stores.values()))
    policy, options = config.policy, config.train.options
    shown = (
        "learning_rate",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
        "seed",
    )
    card = model_card(
        name=output.name,
        base_model=policy.model,
        reference=_reference_text(config, store),
        fingerprint=store.fingerprint,
        dataset=describe(open_source(config.data)),
        pairs=pairs,
        loss=as_dict(config)["loss"],
        adapter=_adapter_text(config),
        training={key: options[key] for key in shown if key in options},
        metrics={key: value for key, value in metrics.items() if not _is_timing(key)},
        versions=library_versions(),
        hub_model=None if Path(policy.model).exists() else policy.model,
        hub_dataset=config.data.path if open_source(config.data).format == "hub" else None,
    )
    replace_file(output / "README.md", card.encode("utf-8", errors="replace"))


def _adapter_text(config: Config) -> str | None:
    policy = config.policy
    if policy.lora:
        return f"LoRA, rank {policy.lora.r}, alpha {policy.lora.alpha:g}, on {policy.lora.target_modules}"
    if policy.ia3:
        return f"IA3, on {policy.ia3.target_modules or 'the layers usual for its architecture'}"
    return f"adapter {policy.adapter}" if policy.adapter else None


def _reference_text(config: Config, store: Store) -> str:
    reference = config.reference.declared or config.reference.model or config.policy.model
    declared = store.manifest["declared"]
    if declared.get("reference_adapter"):
        reference += f" with adapter {declared['reference_adapter']}"
    if config.reference.sync is not None:
        # What the last window had is a folder that is gone by now.
        sync = config.reference.sync
        reference += f", moved toward the policy every {sync.steps} steps (alpha {sync.mixup_alpha:g})"
    return reference
