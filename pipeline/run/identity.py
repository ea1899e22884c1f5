"""Identify a run: the settings that must stay the same for it to resume a checkpoint."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import IdentityError
from pipeline.config.library import defaults_of_training
from pipeline.config.reader import as_dict
from pipeline.config.schema import Config, ReferenceConfig
from pipeline.data.sources import as_recorded, digests_of_data, open_source
from pipeline.models.identity import as_json, describe_differences, identity_of_reference
from pipeline.models.precision import policy_precision

__all__ = [
    "check_same_run",
    "identity_of_base",
    "identity_of_training",
    "is_longer",
    "run_identity",
    "with_settings_of",
]

# Settings that may change when a run resumes, since no step's result depends on them: outputs and their frequency,
# measurements, the fetching of batches, the saving of memory. All others must stay.
_FREE = {
    "batch_eval_metrics",
    "bf16_full_eval",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_timeout",
    "debug",
    "disable_tqdm",
    "do_eval",
    "fp16_full_eval",
    # Counted together with the number of processes.
    "gradient_accumulation_steps",
    "include_for_metrics",
    "load_best_model_at_end",
    "local_rank",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
    "use_cpu",
}
_FREE_KINDS = (
    "activation_",
    "eval_",
    "fsdp",
    "gradient_checkpoint",
    "hub_",
    "log",
    "save_",
    "torch_compile",
    "trackio_",
)


# The schedules whose rates up to a step are the same in a longer run.
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")
_LENGTHS = {"max_steps": -1, "num_train_epochs": 3.0}
"""Fields that say how long a run is, with their defaults"""


def check_same_run(place: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise IdentityError, which names each difference, if what was saved is not this run's or its beginning."""
    recorded = _as_recorded(stored, run)
    found = describe_differences(recorded, run, "saved")
    if not found or is_longer(stored, run):
        return
    why = _why_not_its_beginning(run) if _has_grown(recorded, run) else ""
    further = (
        "To train its policy further, see Making a run longer in docs/guide.md. To start over, set" if why else "Set"
    )
    raise IdentityError(
        f"{place}: saved by a run with other settings. It differs in {'; '.join(found)}. {why}"
        f"{further} train.output_dir to a new folder, or pass --overwrite to replace this one"
    )


def is_longer(stored: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Return True if a run is one that was saved, made longer: the saved steps would be its first ones.

    Steps or epochs are more, all else is equal, and no step of training depends on their number.
    """
    return _has_grown(_as_recorded(stored, run), run) and not _why_not_its_beginning(run)


def _has_grown(recorded: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Return True if the two differ in their length alone, and the run's is larger."""
    before, now = ({**_LENGTHS, **one.get("train", {})} for one in (recorded, run))
    unit = "max_steps" if now["max_steps"] != -1 else "num_train_epochs"
    if (before["max_steps"] == -1) != (now["max_steps"] == -1) or not before[unit] < now[unit]:
        return False
    shorter = {**recorded, "train": {**before, unit: now[unit]}}
    return not describe_differences(shorter, {**run, "train": now})


def _why_not_its_beginning(run: Mapping[str, Any]) -> str:
    """Say why the steps of a shorter run are not the first ones of this run; empty if they are."""
    train = run.get("train", {})
    schedule = train.get("lr_scheduler_type", "linear")
    if schedule not in _WITHOUT_END:
        return (
            f"It can't be made longer: with train.lr_scheduler_type {schedule} the learning rates of all steps depend "
            f"on their number; with {', '.join(_WITHOUT_END)} they do not. "
        )
    if train.get("warmup_ratio") or 0 < train.get("warmup_steps", 0) < 1:
        return "It can't be made longer: its warmup is a share of all steps. "
    if run.get("sync") is not None:
        return "It can't be made longer: the references of a finished run with reference.sync are deleted. "
    if train.get("deepspeed"):
        return "It can't be made longer: DeepSpeed has a schedule of its own. "
    return ""


def _as_recorded(stored: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a stored identity by what earlier versions did not record, and by held-out sets that were added."""
    data, now = dict(stored.get("data", {})), run.get("held_out", {})
    sets = {**data.pop("eval", {}), **stored.get("held_out", {})}
    for name, settings in sets.items():
        sets[name] = {"dataset": now.get(name, {}).get("dataset"), **_unplaced(settings, now.get(name, {}))}
    completed = {
        "data": _unplaced(data, run.get("data", {})),
        "dataset": as_recorded(stored.get("dataset"), run.get("dataset")),
        "fingerprints": {**run.get("fingerprints", {}), **stored.get("fingerprints", {})},
        "held_out": {**now, **sets},
        "policy_base": stored.get("policy_base", run.get("policy_base")),
    }
    return {**stored, **{key: value for key, value in completed.items() if key in run}}


def _unplaced(settings: Mapping[str, Any], of_run: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the path of local data, which earlier versions recorded."""
    return {key: value for key, value in settings.items() if key != "path" or key in of_run}


def identity_of_training(config: Config) -> dict[str, Any]:
    """Collect what of the `train` section a checkpoint must agree with, without settings that equal their default."""
    defaults = {"on_missing": "stop", **defaults_of_training()}
    options = config.train.options
    fixed = {
        key: value
        for key, value in {"on_missing": config.train.on_missing, **options}.items()
        if key not in _FREE and not key.startswith(_FREE_KINDS) and value != defaults.get(key)
    }
    return as_json(
        {
            "train": fixed,
            "accumulation": options.get("gradient_accumulation_steps", 1),
            "deepspeed": bool(options.get("deepspeed")),
        }
    )


def run_identity(
    config: Config, fingerprints: Mapping[str, str], processes: int, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Collect what a checkpoint must agree with to be resumed as if training had never stopped.

    The number of processes may change as long as a step has as many pairs: micro-batches are dealt to the processes in
    turn, so the pairs of a step stay the same. `training` is that of `identity_of_training`.
    """
    run, contents = as_dict(config), {}
    held_out, sets = run["data"].pop("eval"), run["data"].pop("sets")
    for name, settings in {**(sets or {"train": run["data"]}), **held_out}.items():
        contents[name] = digests_of_data(open_source(config.data, name))
        if contents[name]:
            # Data that has moved is the same data.
            del settings["path"]
    if sets:
        # Without them the identity is that of runs from before there were any.
        run["data"]["sets"] = {name: {**settings, "dataset": contents[name]} for name, settings in sets.items()}
    identity = {
        "fingerprints": dict(fingerprints),
        "data": run["data"],
        # The order of local rows decides the pairs of a step. Hub data has a revision.
        "dataset": None if sets else contents["train"] or config.data.revision,
        "held_out": {name: {**settings, "dataset": contents[name]} for name, settings in held_out.items()},
        "policy": run["policy"],
        "sync": run["reference"]["sync"],
        **_identity_of_steps(run, processes, training),
    }
    if config.policy.has_adapter:
        # Checkpoints hold the adapter alone.
        identity["policy_base"] = identity_of_base(config)
    return as_json(identity)


def with_settings_of(saved: Mapping[str, Any], config: Config, processes: int) -> dict[str, Any]:
    """Give a saved run's identity, with what these settings say of loss, training and adapter in place of its own.

    They say it at once: no file is read for it. No store depends on these settings.
    """
    run = as_dict(config)
    recorded = _as_recorded(saved, {"data": saved.get("data", {}), "held_out": {}})
    kept = {key: value for key, value in recorded.items() if key != "processes"}
    policy = {**saved["policy"], **{key: run["policy"][key] for key in ("lora", "ia3")}}
    steps = _identity_of_steps(run, processes, identity_of_training(config))
    return as_json({**kept, "policy": policy, **steps})


def _identity_of_steps(run: Mapping[str, Any], processes: int, training: Mapping[str, Any]) -> dict[str, Any]:
    steps = {
        "loss": run["loss"],
        "train": training["train"],
        "processes x gradient_accumulation_steps": processes * training["accumulation"],
    }
    # DeepSpeed's shares can be loaded only by as many processes.
    return {**steps, "processes": processes} if training["deepspeed"] else steps


def identity_of_base(config: Config) -> dict[str, Any]:
    """Collect the identity of the model that the policy's adapter is trained on."""
    dtype: Any = policy_precision(config).weights
    base = ReferenceConfig(dtype=dtype, disable_adapters=True)
    return as_json(identity_of_reference(dataclasses.replace(config, reference=base)))
