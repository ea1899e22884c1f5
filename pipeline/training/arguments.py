"""Make TrainingArguments from the `train` section; refuse what stage two cannot do."""

import os
from collections.abc import Mapping
from typing import Any, cast

import transformers
from transformers.integrations import integration_utils

from pipeline.base.errors import ConfigError
from pipeline.config.schema import Config

__all__ = [
    "training_arguments",
]


def training_arguments(config: Config) -> transformers.TrainingArguments:
    """Make the library's arguments from the settings, and refuse what can't work.

    Raises:
        ConfigError: A field is unknown, of the wrong type, or impossible here.
    """
    settings = {"output_dir": str(config.train.folder), **config.train.options}
    if str(settings.get("fsdp")).lower() in ("true", "yes", "on", "false", "no", "off"):
        # The library declares a word, its old way of saying how; YAML's yes and no are meant.
        settings["fsdp"] = _is_on(settings["fsdp"]) or None
    _check_launcher(settings)
    try:
        made = transformers.TrainingArguments(**settings, remove_unused_columns=False, label_names=[])
    except (ValueError, TypeError, ImportError, OSError) as error:
        # OSError: a file of fsdp_config or deepspeed that is not there.
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    # Without an accelerator there is nothing to pin for, and the loader would say so for every set.
    made.dataloader_pin_memory &= made.device.type != "cpu"
    if made.n_gpu > 1:
        raise ConfigError(
            "train: several GPUs are visible to one process; start one for each (refshard train --processes N), or set "
            "CUDA_VISIBLE_DEVICES to one of them"
        )
    if made.world_size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each would train the whole run by itself, into one folder.
        raise ConfigError(
            f"train: {os.environ['WORLD_SIZE']} processes were started, but none sees a GPU of its own; to train in "
            "processes on CPUs, set train.use_cpu: true"
        )
    _check_trackers(made)
    _check_fsdp(made, config)
    _check_deepspeed(made)
    if made.eval_strategy != "no" and not config.data.eval:
        raise ConfigError("train.eval_strategy: set, but data.eval names no held-out set")
    if getattr(made, "train_sampling_strategy", None) == "group_by_length":
        raise ConfigError("train.train_sampling_strategy: group_by_length is not supported; leave it out or use random")
    if made.save_strategy == "best" and not made.metric_for_best_model:
        raise ConfigError("train.save_strategy: best of what? Set train.metric_for_best_model, like eval_loss")
    if made.save_total_limit == 1:
        raise ConfigError(
            "train.save_total_limit: at least 2, since the checkpoint before is what is left if the newest is cut short"
        )
    if config.reference.sync is not None:
        if made.save_strategy == "best":
            raise ConfigError("train.save_strategy: best can't be told across windows (reference.sync)")
        if made.world_size > 1:
            raise ConfigError(
                f"reference.sync: {made.world_size} processes; windows are planned for one process. Start it alone"
            )
        if made.save_strategy == "no":
            # Every window ends in a checkpoint; one behind the newest is kept, in case that one is cut short.
            made.save_total_limit = made.save_total_limit or 2
    return made


def _check_launcher(settings: Mapping[str, Any]) -> None:
    """Refuse what accelerate was told and the settings were not: one of the two would be the one that is not heard."""
    for key, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        if _is_on(os.environ.get(f"ACCELERATE_USE_{name.upper()}")) and not settings.get(key):
            raise ConfigError(
                f"train.{key}: accelerate launch was told to use {name}, but the settings were not; set train.{key}, "
                "and leave it out of accelerate's own settings"
            )


def _check_fsdp(made: transformers.TrainingArguments, config: Config) -> None:
    if not made.fsdp:
        return
    settings = cast("dict[str, Any]", made.fsdp_config)
    if made.world_size == 1:
        raise ConfigError(
            "train.fsdp: one process has nobody to share the policy with; start with torchrun or accelerate launch, or "
            "leave it out (-o train.fsdp=false), also to go on alone with a run that had several"
        )
    if int(settings.get("version", 2)) != 2 or settings.get("xla"):
        raise ConfigError("train.fsdp_config: FSDP2 alone is supported; set version: 2, and leave xla out")
    if str(settings.get("state_dict_type", "FULL_STATE_DICT")) not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise ConfigError("train.fsdp_config.state_dict_type: expected FULL_STATE_DICT or SHARDED_STATE_DICT")
    if _is_on(settings.get("cpu_ram_efficient_loading")):
        raise ConfigError(
            "train.fsdp_config.cpu_ram_efficient_loading: can't be set: each process checks the policy that it has "
            "loaded before it is sharded"
        )
    if _is_on(settings.get("activation_checkpointing")) and config.policy.has_adapter:
        # PEFT saves what it finds by its modules' names, which the checkpoints' wrappers change: an empty adapter.
        raise ConfigError(
            "train.fsdp_config.activation_checkpointing: can't be set with an adapter; set train.gradient_checkpointing"
        )


def _check_deepspeed(made: transformers.TrainingArguments) -> None:
    if not made.deepspeed:
        return
    settings: Any = made.hf_deepspeed_config
    if settings.is_zero3() and not settings.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "train.deepspeed: set zero_optimization.stage3_gather_16bit_weights_on_model_save: true, without which no "
            "policy would be saved that can be loaded"
        )


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1")


def _check_trackers(made: transformers.TrainingArguments) -> None:
    """Make sure that the trackers are installed, which the library says after the model is loaded.

    None is made for that: some lock files, or open a connection, as soon as they are.
    """
    try:
        integration_utils.get_reporting_integration_callbacks(made.report_to)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"train.report_to: {' '.join(str(error).split())}") from error
    for tracker in made.report_to or ():
        # The library asks for azure_ml by is_azureml_available, for comet_ml by is_comet_available.
        names = (f"is_{spelled}_available" for spelled in (tracker.replace("_", ""), tracker.replace("_ml", "")))
        is_available = next((found for name in names if (found := getattr(integration_utils, name, None))), None)
        if is_available is not None and not is_available():
            package = tracker.replace("_", "-")
            raise ConfigError(f"train.report_to: {tracker} is not installed: pip install {package}")
