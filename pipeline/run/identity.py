"""Identify a run: the settings that must stay the same for it to resume a checkpoint."""

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
from pipeline.models.identity import describe_differences

__all__ = ["check_same_run", "run_identity"]

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


def check_same_run(place: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise IdentityError, which names each difference, if a run with other settings has saved it."""
    found = describe_differences(stored, run, "saved")
    if found:
        raise IdentityError(
            f"{place}: saved by a run with other settings. It differs in {'; '.join(found)}. "
            "Set train.output_dir to a new folder, or pass --overwrite to start over in this one"
        )


def run_identity(config: Config, fingerprints: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Collect what a checkpoint must agree with to be resumed as if training had never stopped.

    A setting that equals its default is left out. The number of processes may change as long as a step has as many
    pairs: micro-batches are dealt to the processes in turn, so the pairs of a step stay the same.
    """
    defaults: dict[str, Any] = {"on_missing": "stop"}
    for field in dataclasses.fields(transformers.TrainingArguments):
        make = field.default_factory
        defaults[field.name] = field.default if make is dataclasses.MISSING else make()
    options = config.train.options
    fixed = {
        key: value
        for key, value in {"on_missing": config.train.on_missing, **options}.items()
        if key not in _FREE and not key.startswith(_FREE_KINDS) and value != defaults.get(key)
    }
    run, source = as_dict(config), open_source(config.data)
    files = data_files(source)
    identity = {
        "fingerprints": dict(fingerprints),
        "data": run["data"],
        # The order of local rows decides the pairs of a step. Hub data has a revision.
        "dataset": sha256_of_files(files) if files else source.revision,
        "policy": run["policy"],
        "loss": run["loss"],
        "sync": run["reference"]["sync"],
        "train": fixed,
        "processes x gradient_accumulation_steps": processes * options.get("gradient_accumulation_steps", 1),
    }
    if options.get("deepspeed"):
        # DeepSpeed's shares can be loaded only by as many processes.
        identity["processes"] = processes
    # As JSON gives it back, without tuples.
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain
