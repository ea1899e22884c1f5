"""Stage two: train the policy on pairs joined with their reference log-probs. No reference model is loaded.

stores + dataset -> joined set -> micro-batches -> policy token logps -> DPO loss -> a folder that loads
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import datasets
import transformers
import yaml
from accelerate import PartialState

from pipeline.card import model_card
from pipeline.checkpoints import CommitCallback, check_same_run, find_checkpoint, write_json
from pipeline.config import Config, as_dict, training_settings
from pipeline.errors import ConfigError, DataError, UnfinishedError
from pipeline.fingerprint import identity_of_run, kinship
from pipeline.gate import Gate, GateCallback
from pipeline.intake import Ledger, kept_pairs
from pipeline.join import check_identity, join, load_reference_table
from pipeline.models import find_model, load_policy, load_tokenizer, resolve_dtype
from pipeline.scoring import check_scoring, prepare
from pipeline.shards import Store, open_store
from pipeline.signals import watch_signals
from pipeline.sources import describe, open_source, read_rows
from pipeline.storage import read_json, replace_file
from pipeline.trainer import PairTrainer, make_collator
from pipeline.versions import library_versions

__all__ = ["run"]

RUN, SETTINGS, JOINED = "run.json", "refshard.yaml", "joined"


def run(config: Config, *, overwrite: bool = False) -> None:
    """Train, going on from the run's last whole checkpoint if there is one, and save the policy.

    Args:
        config: The run's settings.
        overwrite: Delete the checkpoints and the record of an earlier run in the output folder.

    Raises:
        UnfinishedError: The stores are not complete, or a signal asked to stop and a checkpoint was saved.
        IdentityError: Shards or checkpoints belong to another reference, tokenization or run.
        DataError: Pairs have no reference log-probs, or files are damaged.
    """
    flag = watch_signals()
    settings = training_settings(config)
    on_missing, on_mismatch = (settings.pop(key, "stop") for key in ("on_missing", "on_mismatch"))
    arguments = _training_arguments(config, settings)
    output = Path(str(arguments.output_dir))
    state = PartialState()
    stores = _open_stores(config)
    tokenizer = load_tokenizer(config)
    check_identity(list(stores.values()), identity_of_run(config, tokenizer))
    identity = _run_identity(config, settings, stores, state.num_processes)

    if overwrite and state.is_main_process:
        _delete_run(output)
    state.wait_for_everyone()
    if _is_finished(output, identity):
        _say(state, f"{output}: this run is finished already; nothing to do.")
        return
    checkpoint = None
    if state.is_main_process:
        # First, since it refuses a folder of another run, whose settings are then still its own.
        checkpoint = find_checkpoint(output, identity, lambda text: click.echo(f"warning: {text}", err=True))
        _save_settings(output, config)
        _join_all(config, stores, tokenizer, output, on_missing)
    state.wait_for_everyone()
    checkpoint = _from_main_process(checkpoint)
    sets = {name: datasets.Dataset.from_file(str(_joined_file(output, name))) for name in stores}

    # The fresh adapter's factors are the first random numbers of the run, as in TRL.
    transformers.set_seed(arguments.seed)
    policy = load_policy(config)
    prepare(policy)
    check_scoring(policy, "policy.model")
    if config.policy.has_adapter:
        if arguments.gradient_checkpointing:
            policy.enable_input_require_grads()
        trained, total = policy.get_nb_trainable_parameters()
        _say(state, f"Training {trained:,} of {total:,} parameters")
    callback = CommitCallback(identity, flag)
    gate = GateCallback(_gate(config, arguments, stores["train"], on_mismatch), lambda text: _say(state, text))
    trainer = PairTrainer(
        loss=config.loss,
        model=policy,
        args=arguments,
        data_collator=make_collator(tokenizer.pad_token_id or tokenizer.eos_token_id or 0, config.data.max_length),
        train_dataset=sets["train"],
        eval_dataset=_eval_sets(sets),
        processing_class=tokenizer,
        callbacks=[callback, gate],
    )
    callback.trainer = gate.trainer = trainer
    if checkpoint is not None:
        _say(state, f"Going on from {checkpoint}")
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if callback.stopped_early:
        raise UnfinishedError(
            f"stopped by a signal after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            f"saved in {output}. Run the same command again"
        )
    metrics = _final_metrics(trainer)
    trainer.save_model(str(output))
    if state.is_main_process:
        trainer.state.save_to_json(str(output / "trainer_state.json"))
        _write_card(config, output, stores, len(sets["train"]), settings, metrics)
        write_json(
            output / RUN,
            {
                "finished": True,
                "step": trainer.state.global_step,
                "identity": identity,
                "train_loss": result.training_loss,
                "metrics": metrics,
                "versions": library_versions(),
            },
        )
        shutil.rmtree(output / JOINED, ignore_errors=True)
        click.echo(
            f"The policy is in {output} ({trainer.state.global_step} steps, training loss {result.training_loss:.4f})"
        )


def _say(state: PartialState, text: str) -> None:
    if state.is_main_process:
        click.echo(text)


def _training_arguments(config: Config, settings: Mapping[str, Any]) -> transformers.TrainingArguments:
    arguments = {**settings, "remove_unused_columns": False, "label_names": []}
    try:
        made = transformers.TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    if made.n_gpu > 1:
        raise ConfigError(
            "train: several GPUs are visible to one process; start with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    if made.eval_strategy != "no" and not config.data.eval:
        raise ConfigError("train.eval_strategy: set, but data.eval names no held-out set")
    return made


def _open_stores(config: Config) -> dict[str, Store]:
    folder = Path(config.precompute.output)
    return {name: open_store(folder / name) for name in ("train", *config.data.eval)}


def _gate(config: Config, arguments: transformers.TrainingArguments, store: Store, on_mismatch: str) -> Gate:
    kin = kinship(config)
    model = find_model(config.policy.model, config.policy.revision, "policy.model")
    policy_dtype = resolve_dtype(config.policy.dtype, read_json(model / "config.json"))
    if arguments.bf16 or arguments.fp16:
        policy_dtype = "bfloat16" if arguments.bf16 else "float16"
    return Gate(
        store=store,
        reference_dtype=str(store.manifest["identity"]["reference"].get("dtype", "float32")),
        policy_dtype=policy_dtype,
        at_start=kin.at_start,
        adapters_off=kin.adapters_off,
        frozen_adapter=kin.frozen_adapter,
        warn_only=on_mismatch == "warn",
    )


def _run_identity(
    config: Config, settings: Mapping[str, Any], stores: Mapping[str, Store], processes: int
) -> dict[str, Any]:
    """What a checkpoint must agree with for training to go on from it as if it had never stopped."""
    fixed = (
        "seed",
        "data_seed",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
    )
    return {
        "fingerprints": {name: store.fingerprint for name, store in stores.items()},
        "data": as_dict(config)["data"],
        "policy": as_dict(config)["policy"],
        "loss": as_dict(config)["loss"],
        "train": {key: settings[key] for key in fixed if key in settings},
        "processes": processes,
    }


def _is_finished(output: Path, identity: Mapping[str, Any]) -> bool:
    file = output / RUN
    if not file.exists():
        return False
    check_same_run(output, read_json(file).get("identity", {}), identity)
    return True


def _delete_run(output: Path) -> None:
    """Delete what an earlier run of this program recorded and saved for going on; the weights get replaced."""
    (output / RUN).unlink(missing_ok=True)
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)


def _save_settings(output: Path, config: Config) -> None:
    """Save the settings, defaults filled in, before anything runs. Access tokens are left out."""
    output.mkdir(parents=True, exist_ok=True)
    settings = as_dict(config)
    settings["train"] = {key: value for key, value in settings["train"].items() if not key.endswith("_token")}
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    replace_file(output / SETTINGS, text.encode())


def _joined_file(output: Path, name: str) -> Path:
    return output / JOINED / f"{name}.arrow"


def _join_all(config: Config, stores: Mapping[str, Store], tokenizer: Any, output: Path, on_missing: str) -> None:
    for name, store in stores.items():
        source = open_source(config.data, config.data.eval.get(name))
        ledger = Ledger()
        pairs = kept_pairs(read_rows(source), tokenizer, config.data, ledger)
        token_file = output / JOINED / f"{name}-token-logps.arrow"
        table = load_reference_table(
            [store], config.data.max_length, ld_alpha=config.loss.ld_alpha, token_file=token_file
        )
        report = join(pairs, table, _joined_file(output, name))
        token_file.unlink(missing_ok=True)
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


def _from_main_process(checkpoint: Path | None) -> Path | None:
    from accelerate.utils import broadcast_object_list

    agreed: Path | None = broadcast_object_list([checkpoint])[0]
    return agreed


def _write_card(
    config: Config,
    output: Path,
    stores: Mapping[str, Store],
    pairs: int,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    policy, declared = config.policy, stores["train"].manifest["declared"]
    adapter = None
    if policy.lora:
        adapter = f"LoRA, rank {policy.lora.r}, alpha {policy.lora.alpha:g}, on {policy.lora.target_modules}"
    elif policy.adapter:
        adapter = f"adapter {policy.adapter}"
    reference = declared["reference"]
    if declared.get("reference_adapter") and not config.reference.disable_adapters:
        reference += f" with adapter {declared['reference_adapter']}"
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
        reference=reference,
        fingerprint=stores["train"].fingerprint,
        dataset=describe(open_source(config.data)),
        pairs=pairs,
        loss=as_dict(config)["loss"],
        adapter=adapter,
        training={key: settings[key] for key in shown if key in settings},
        metrics={key: value for key, value in metrics.items() if "runtime" not in key and "per_second" not in key},
        versions=library_versions(),
        hub_model=None if Path(policy.model).exists() else policy.model,
        hub_dataset=config.data.path if open_source(config.data).format == "hub" else None,
    )
    replace_file(output / "README.md", card.encode("utf-8", errors="replace"))
