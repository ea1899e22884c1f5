"""Make TrainingArguments from the `train` section, and refuse what stage two can't do."""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.integrations import integration_utils
from transformers.utils import import_utils

from pipeline.base.errors import ConfigError, one_line
from pipeline.base.files import special_kind
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel
from pipeline.training.tracking import TrackedArguments

__all__ = ["arguments_of_loop", "in_one_piece", "loads_once", "refused_here", "training_arguments", "trial_arguments"]

_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
"""Fields that may name a JSON file"""
_LARGEST_SETTINGS = 2**24


def training_arguments(config: Config) -> transformers.TrainingArguments:
    """Make the library's arguments from the settings.

    Raises:
        ConfigError: A field is unknown, of the wrong type, or impossible here.
    """
    settings = _settings(config)
    if str(settings.get("fsdp")).lower() in ("true", "yes", "on", "false", "no", "off"):
        # The library declares this field as a string. YAML's yes and no are meant.
        settings["fsdp"] = _is_on(settings["fsdp"]) or None
    _check_launcher(settings)
    if error := refused_here(config):
        raise error
    made = _make(TrackedArguments, settings)
    # Without an accelerator the loader would warn for every set that it can't pin.
    made.dataloader_pin_memory &= made.device.type != "cpu"
    if made.n_gpu > 1:
        raise ConfigError(
            f"train: {made.n_gpu} GPUs are visible to one process. Start a process for each (refshard train "
            "--processes N), or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if made.world_size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would train the whole run by itself, into one folder.
        raise ConfigError(
            f"train: {os.environ['WORLD_SIZE']} processes were started, but none sees a GPU of its own. To train in "
            "processes on CPUs, set train.use_cpu: true"
        )
    _check_fsdp(made, config)
    if made.fsdp:
        _load_once(made, config)
    _check_deepspeed(made)
    _check_options(made, config)
    if config.reference.sync is not None:
        if made.world_size > 1:
            raise ConfigError(
                f"reference.sync: must run in one process, got {made.world_size}. Start it without a launcher"
            )
        if made.save_strategy == "no":
            # Every window ends in a checkpoint. Keep one behind the newest, in case that one is cut short.
            made.save_total_limit = made.save_total_limit or 2
    return made


def refused_here(config: Config) -> ConfigError | None:
    """Make the error for an option that needs a GPU which this machine lacks; None if stage two could train here."""
    options = config.train.options
    needing = [key for key in ("bf16", "bf16_full_eval") if _is_on(options.get(key))]
    if not needing or _is_on(options.get("use_cpu")):
        return None
    if import_utils.is_torch_bf16_gpu_available() or import_utils.is_torch_xla_available():
        return None
    return ConfigError(
        f"train.{needing[0]}: must be false on a machine without a GPU that computes in bfloat16, got true. To train "
        "on the CPU, set train.use_cpu: true"
    )


def trial_arguments(config: Config) -> transformers.TrainingArguments:
    """Make the library's arguments in a process that trains nothing, to find what is impossible on any machine.

    Fields that the machine decides are left out, and no device or process group is touched.

    Raises:
        ConfigError: A field is unknown, of the wrong type, or impossible.
    """
    settings = {key: value for key, value in _settings(config).items() if key not in _OF_THE_MACHINE}
    with warnings.catch_warnings(action="ignore"):
        made = _make(_Trial, {**settings, "use_cpu": True})
    _check_options(made, config)
    return made


_OF_THE_MACHINE = (
    *("deepspeed", "fsdp", "fsdp_config", "tf32"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
)


class _Trial(transformers.TrainingArguments):
    _setup_devices = torch.device("cpu")


def _settings(config: Config) -> dict[str, Any]:
    return {"output_dir": str(config.train.folder), **config.train.options}


def _make(kind: type[transformers.TrainingArguments], settings: Mapping[str, Any]) -> transformers.TrainingArguments:
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if settings.get(key, 1) < 1:
            raise ConfigError(f"train.{key}: must be at least 1, got {settings[key]}. Raise it")
    _check_files(settings)
    try:
        return kind(**settings, remove_unused_columns=False, label_names=[])
    except (ValueError, TypeError, ImportError, OSError) as error:
        # OSError: the file of fsdp_config or deepspeed is missing.
        raise ConfigError(f"train: {one_line(str(error))}") from error


def _check_options(made: transformers.TrainingArguments, config: Config) -> None:
    """Refuse what is impossible on any machine."""
    _check_trackers(made)
    if made.max_steps < 1 and made.max_steps != -1:
        raise ConfigError(
            f"train.max_steps: must be at least 1, or -1 for train.num_train_epochs, got {made.max_steps}. Leave it out"
        )
    if made.max_steps == -1 and not made.num_train_epochs > 0:
        raise ConfigError(f"train.num_train_epochs: must be positive, got {made.num_train_epochs}. Raise it")
    if made.eval_strategy != "no" and not config.data.eval:
        raise ConfigError(
            "train.eval_strategy: must be no without a held-out set, got "
            f"{config.train.options['eval_strategy']}. Set data.eval"
        )
    if getattr(made, "train_sampling_strategy", None) == "group_by_length":
        raise ConfigError(
            "train.train_sampling_strategy: must be random or sequential, got group_by_length. Leave it out"
        )
    if made.save_strategy == "best" and not made.metric_for_best_model:
        raise ConfigError(
            "train.metric_for_best_model: must name a metric with train.save_strategy best, got none. Set eval_loss"
        )
    if made.save_total_limit == 1:
        raise ConfigError(
            "train.save_total_limit: must be at least 2, as a kill may cut the newest checkpoint short, got 1. Raise it"
        )
    if config.reference.sync is not None and made.save_strategy == "best":
        raise ConfigError("train.save_strategy: must be no, steps or epoch with reference.sync, got best. Change it")


def arguments_of_loop(arguments: transformers.TrainingArguments) -> transformers.TrainingArguments:
    """Give the arguments to train with: the run's, but for what stage two does in the library's place."""
    arguments = copy.copy(arguments)
    # The library would count broken checkpoints.
    arguments.save_total_limit = None
    # A resumed run was measured at its start.
    arguments.eval_on_start = False
    # The library would push the joined data and its own arguments; see `hub`.
    arguments.push_to_hub = False
    # The library would load a damaged checkpoint, and ignore one that is gone.
    arguments.load_best_model_at_end = False
    return arguments


@contextlib.contextmanager
def in_one_piece(arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Load the policy whole under DeepSpeed too, whose ZeRO-3 would give each process a share of it at once.

    The policy is checked before it is trained. DeepSpeed gathers weights for a forward only once training has begun.
    """
    library: Any = transformers.integrations.deepspeed
    library.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed:
            library.set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def _check_launcher(settings: Mapping[str, Any]) -> None:
    """Refuse FSDP or DeepSpeed that accelerate launch was told of and the settings were not: one would be ignored."""
    for key, name in (("fsdp", "FSDP"), ("deepspeed", "DeepSpeed")):
        if _is_on(os.environ.get(f"ACCELERATE_USE_{name.upper()}")) and not settings.get(key):
            raise ConfigError(
                f"train.{key}: must be set, as accelerate launch was told to use {name}, got none. Set it, and leave "
                f"{name} out of accelerate's own settings"
            )


def _check_files(settings: Mapping[str, Any]) -> None:
    """Refuse what is no regular file where the library opens one: it would wait for a FIFO's writer for ever."""
    for key in _FILES:
        named = settings.get(key)
        if not isinstance(named, str):
            continue
        try:
            kind, size = special_kind(Path(named)), Path(named).stat().st_size
        except (OSError, ValueError):
            continue  # The library names a file that is missing. A text may be the settings themselves.
        if kind is not None or size > _LARGEST_SETTINGS:
            raise ConfigError(
                f"train.{key}: must be a regular file of settings, got {kind or f'{size:,} bytes'}, {named}. Name one"
            )


def _check_fsdp(made: transformers.TrainingArguments, config: Config) -> None:
    if not made.fsdp:
        return
    settings = cast("dict[str, Any]", made.fsdp_config)
    if made.world_size == 1:
        raise ConfigError(
            "train.fsdp: must be off in one process, got on. Start several with torchrun or accelerate launch, or set "
            "-o train.fsdp=false, which also resumes a run of several processes"
        )
    if int(settings.get("version", 2)) != 2 or settings.get("xla"):
        raise ConfigError(
            f"train.fsdp_config: must be FSDP2's, got version {settings.get('version', 2)}, xla {settings.get('xla')}. "
            "Set version: 2, and leave xla out"
        )
    state_dict = str(settings.get("state_dict_type", "FULL_STATE_DICT"))
    if state_dict not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise ConfigError(
            f"train.fsdp_config.state_dict_type: must be FULL_STATE_DICT or SHARDED_STATE_DICT, got {state_dict}"
        )
    if _is_on(settings.get("activation_checkpointing")) and config.policy.has_adapter:
        # PEFT saves modules by name, and the checkpointing wrappers change the names: the adapter would be empty.
        raise ConfigError(
            "train.fsdp_config.activation_checkpointing: must be off with an adapter, got on. Set "
            "train.gradient_checkpointing: true"
        )


def _load_once(made: transformers.TrainingArguments, config: Config) -> None:
    """Let the main process alone load the policy, unless the settings forbid it; quantized weights can't move."""
    settings, plugin = cast("dict[str, Any]", made.fsdp_config), cast("dict[str, Any]", made.fsdp_plugin_args)
    wanted = _is_on(settings.get("cpu_ram_efficient_loading", True))
    is_plain = config.policy.quantization is None and NamedModel.policy(config).quantization_method() is None
    plugin["cpu_ram_efficient_loading"] = wanted and is_plain
    # The library would read whole models without weights in all processes but one of each machine.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def loads_once(arguments: transformers.TrainingArguments) -> bool:
    """Return True if the main process alone loads the policy, and FSDP hands its weights on."""
    return bool((arguments.fsdp_plugin_args or {}).get("cpu_ram_efficient_loading"))


def _check_deepspeed(made: transformers.TrainingArguments) -> None:
    if not made.deepspeed:
        return
    settings: Any = made.hf_deepspeed_config
    if settings.is_zero3() and not settings.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise ConfigError(
            "train.deepspeed: zero_optimization.stage3_gather_16bit_weights_on_model_save must be true, got false. Set "
            "it; no policy that loads would be saved otherwise"
        )


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "on", "1")


def _check_trackers(made: transformers.TrainingArguments) -> None:
    """Check that the trackers are installed, which the library would report only after the model is loaded.

    No tracker is made for that: some lock files or open a connection at once.
    """
    try:
        integration_utils.get_reporting_integration_callbacks(made.report_to)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"train.report_to: {one_line(str(error))}") from error
    for tracker in made.report_to or ():
        # The library's functions are is_azureml_available for azure_ml, is_comet_available for comet_ml.
        names = (f"is_{spelled}_available" for spelled in (tracker.replace("_", ""), tracker.replace("_ml", "")))
        is_available = next((found for name in names if (found := getattr(integration_utils, name, None))), None)
        if is_available is not None and not is_available():
            package = tracker.replace("_", "-")
            raise ConfigError(
                f"train.report_to: must name installed trackers, got {tracker}. Run pip install {package}"
            )
