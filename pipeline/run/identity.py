"""Identify a run: the settings that must stay the same for it to go on from a checkpoint."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from pipeline.base.digests import sha256_of_files
from pipeline.base.errors import IdentityError
from pipeline.config.reader import as_dict
from pipeline.config.schema import Config
from pipeline.data.sources import data_files, open_source

__all__ = [
    "check_same_run",
    "run_identity",
]

# What may change while a run goes on, since no step's result depends on it: what is written where and how often, what
# is measured on the way, how batches are fetched, and how memory is saved. All else that a user sets must stay.
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
    "fsdp",
    "fsdp_config",
    # Counted together with the number of processes.
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
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
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_cpu",
}


_FREE_KINDS = ("eval_", "hub_", "log_", "logging_", "save_", "trackio_")


def check_same_run(place: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to go on with what a run with other settings left.

    Raises:
        IdentityError: The differing settings are named, both values side by side.
    """
    found = [f"{field}: saved {old!r}, this run {new!r}" for field, old, new in _differences(stored, run)]
    if found:
        raise IdentityError(
            f"{place}: saved by a run with other settings. It differs in {'; '.join(found)}. "
            "Set train.output_dir to a new folder, or pass --overwrite to start over in this one"
        )


def _differences(stored: Any, run: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two identities differ, by their full names."""
    if not (isinstance(stored, Mapping) and isinstance(run, Mapping)):
        return [] if stored == run else [(field, stored, run)]
    return [
        difference
        for key in sorted({*stored, *run})
        for difference in _differences(stored.get(key), run.get(key), f"{field}.{key}" if field else key)
    ]


def run_identity(config: Config, fingerprints: Mapping[str, str], processes: int) -> dict[str, Any]:
    """What a checkpoint must agree with for training to go on from it as if it had never stopped.

    A setting that is spelled out as its default is as one that is left out. How many processes there are is free as
    long as a step sees as many pairs: micro-batches are dealt to them in turn, so that a step's pairs are the same.
    """
    defaults: dict[str, Any] = {"on_missing": "stop"}
    for field in dataclasses.fields(transformers.TrainingArguments):
        make = field.default_factory
        defaults[field.name] = field.default if isinstance(make, dataclasses._MISSING_TYPE) else make()
    options = config.train.options
    fixed = {
        key: value
        for key, value in {"on_missing": config.train.on_missing, **options}.items()
        if key not in _FREE and not key.startswith(_FREE_KINDS) and value != defaults.get(key)
    }
    run = as_dict(config)
    identity = {
        "fingerprints": dict(fingerprints),
        "data": run["data"],
        "dataset": _content_of_data(config),
        "policy": run["policy"],
        "loss": run["loss"],
        "sync": run["reference"]["sync"],
        "train": fixed,
        "processes x gradient_accumulation_steps": processes * options.get("gradient_accumulation_steps", 1),
    }
    if options.get("deepspeed"):
        # Its shares can be loaded by as many processes alone.
        identity["processes"] = processes
    # As it will be read back: without tuples and the like.
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _content_of_data(config: Config) -> dict[str, str] | str | None:
    """Local data by content, since the order of its rows decides which pairs a step sees; other data by revision."""
    source = open_source(config.data)
    files = data_files(source)
    return sha256_of_files(files) if files else source.revision
