"""The `train` section: our own options, and the fields of transformers.TrainingArguments."""

import dataclasses
import typing
from typing import Any, Literal

from pipeline.base.errors import ConfigError, did_you_mean
from pipeline.config.reader import convert
from pipeline.config.schema import Config

__all__ = [
    "OWN_TRAIN_FIELDS",
    "training_settings",
]

# What pairs without reference logps do, what a policy does that is not the reference that it should start as, and
# whether what backward needs of forward waits for it in the CPU's memory.
OWN_TRAIN_FIELDS = {
    "on_missing": Literal["stop", "drop"],
    "on_mismatch": Literal["stop", "warn"],
    "activation_offload": bool,
}


_FIXED_TRAIN_FIELDS = {
    "remove_unused_columns": "can't be set: the join's columns are always needed",
    "label_names": "can't be set: preference pairs have no labels",
    "resume_from_checkpoint": "can't be set: a rerun goes on from the last whole checkpoint by itself",
    "save_only_model": "can't be set: a run that goes on from a checkpoint without its optimizer is another run",
    "ignore_data_skip": "can't be set: a run that goes on must go on with the pairs that it has not seen",
    "enable_jit_checkpoint": "can't be set: signals are handled by refshard, which saves and exits with 75",
    "do_train": "can't be set: `refshard train` trains",
    "do_predict": "can't be set: there is nothing to predict",
    "label_smoothing_factor": "can't be set: it belongs to cross-entropy, not to DPO",
    "use_liger_kernel": "can't be set: refshard scores through its own head",
    "auto_find_batch_size": "can't be set: it would change the batches between two runs of one configuration",
    "include_num_input_tokens_seen": "can't be set: num_tokens counts them, and is always logged",
    "neftune_noise_alpha": "can't be set: noise on the policy's embeddings would be scored against a reference without",
}


def training_settings(config: Config) -> dict[str, Any]:
    """Check the `train` section against `transformers.TrainingArguments` and convert its values.

    Our defaults differ from the library's where DPO needs it: learning_rate 1e-6 (DPO's usual order for full
    fine-tuning), logging every 10 steps, no experiment tracker unless named, and six hours for processes to wait for
    the one that joins the data, which takes longer than the library's half an hour for millions of pairs.

    Raises:
        ConfigError: An unknown field, a wrong type, or a field that refshard itself must set.
    """
    # Imported here: the module pulls torch, and settings are read by commands that answer without it.
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    settings: dict[str, Any] = {
        "learning_rate": 1e-6,
        "logging_steps": 10,
        "report_to": "none",
        "ddp_timeout": 6 * 3600,
    }
    for key, value in config.train.items():
        where = f"train.{key}"
        if key in OWN_TRAIN_FIELDS:
            settings[key] = convert(value, OWN_TRAIN_FIELDS[key], where)
            continue
        if key not in known:
            raise ConfigError(
                f"{where}: no such field of TrainingArguments{did_you_mean(key, [*sorted(known), *OWN_TRAIN_FIELDS])}"
            )
        if key in _FIXED_TRAIN_FIELDS:
            raise ConfigError(f"{where}: {_FIXED_TRAIN_FIELDS[key]}")
        settings[key] = convert(value, hints.get(key, Any), where)
    if not settings.get("output_dir"):
        raise ConfigError("train.output_dir: missing; name the folder that the trained policy goes to")
    return settings
