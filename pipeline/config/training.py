"""The `train` section: our own options, and the fields of transformers.TrainingArguments."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.base.errors import ConfigError, nearest
from pipeline.config.convert import PathText, convert
from pipeline.config.library import fields_of_training, hint_of_field
from pipeline.config.names import hint_for_key

__all__ = ["FIXED_TRAIN_FIELDS", "TRAIN_DEFAULTS", "TrainSection"]

TRAIN_DEFAULTS: dict[str, tuple[Any, str]] = {
    "learning_rate": (1e-6, "the usual order for DPO with full fine-tuning; the recipes for adapters set a larger one"),
    "logging_steps": (10, "metrics are logged every 10 steps"),
    "report_to": ("none", "a tracker is used only if it is named"),
    "ddp_timeout": (6 * 3600, "seconds; one process joins data and shards, for hours with millions of pairs"),
    "logging_nan_inf_filter": (False, "it would log 0 or a mean in place of a loss that is not finite"),
}
"""Fields of TrainingArguments whose defaults are ours: the value and the reason"""

FIXED_TRAIN_FIELDS = {
    "remove_unused_columns": "can't be set: the join's columns are always needed",
    "label_names": "can't be set: preference pairs have no labels",
    "resume_from_checkpoint": "can't be set: the same command resumes from the newest complete checkpoint",
    "save_only_model": "can't be set: a run that resumes without its optimizer is another run",
    "ignore_data_skip": "can't be set: a resumed run must continue with the pairs that it has not seen",
    "enable_jit_checkpoint": "can't be set: signals are handled by refshard, which saves and exits with 75",
    "do_train": "can't be set: `refshard train` trains",
    "do_predict": "can't be set: there is nothing to predict",
    "logging_nan_inf_filter": "can't be set: it would hide a loss that is not finite; see train.on_nonfinite",
    "label_smoothing_factor": "can't be set: it belongs to cross-entropy, not to DPO",
    "use_liger_kernel": "can't be set: refshard scores through its own head",
    "auto_find_batch_size": "can't be set: it would change the batches between two runs of one configuration",
    "include_num_input_tokens_seen": "can't be set: num_tokens counts them, and is always logged",
    "neftune_noise_alpha": "can't be set: noise on the policy's embeddings would be scored against a reference without",
}


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """Stage two: our own options, and any field of `transformers.TrainingArguments`."""

    output_dir: PathText | None = None
    """Folder of the run: checkpoints, the trained policy, its records."""
    joined_dir: PathText | None = None
    """Folder that keeps joined sets for later runs; if left out, `.joined` beside the stores in `precompute.output`."""
    on_missing: Literal["stop", "drop"] = "stop"
    """Stop at pairs that have no reference log-probs, or drop them."""
    on_mismatch: Literal["stop", "warn"] = "stop"
    """Stop or warn if policy and reference should be the same model before training, and are not (the parity gate)."""
    on_nonfinite: Literal["stop", "continue"] = "stop"
    """Stop at the first step whose loss, gradient norm or weights are not finite, or warn and train on."""
    activation_offload: bool = False
    """Keep the tensors for backward in CPU memory: slower, the same numbers."""
    given: Mapping[str, object] = field(default_factory=dict, metadata={"rest": True})
    """The library's fields as the file gives them; see `options`."""

    @property
    def is_empty(self) -> bool:
        """True if the settings have no `train` section."""
        return self == TrainSection()

    @property
    def folder(self) -> Path:
        """Folder of the run. Raises ConfigError if the settings name none."""
        if not self.output_dir:
            raise ConfigError("train.output_dir: missing; name the folder that the trained policy goes to")
        return Path(self.output_dir)

    @functools.cached_property
    def options(self) -> Mapping[str, Any]:
        """The library's fields, converted by its types, on top of `TRAIN_DEFAULTS`.

        Raises ConfigError if a field is unknown, of the wrong type or set by refshard, or `output_dir` is missing.
        """
        own = [f.name for f in dataclasses.fields(self) if f.name != "given"]
        known = sorted(fields_of_training().keys() | set(own))
        options = {key: value for key, (value, _) in TRAIN_DEFAULTS.items()}
        for key, value in self.given.items():
            if key not in known:
                raise ConfigError(f"train.{key}: no such field of TrainingArguments{_hint_for(key, known, own)}")
            if key in FIXED_TRAIN_FIELDS:
                raise ConfigError(f"train.{key}: {FIXED_TRAIN_FIELDS[key]}")
            options[key] = convert(value, hint_of_field(key), f"train.{key}")
        if not self.is_empty:
            _ = self.folder
        return options

    @property
    def autocast(self) -> str | None:
        """Dtype of autocast in training, None without it. Unlike `options`, it needs no library."""
        dtypes = {"bf16": "bfloat16", "fp16": "float16"}
        return next(
            (d for key, d in dtypes.items() if convert(self.given.get(key) or False, bool, f"train.{key}")), None
        )

    @property
    def evaluates_at_end(self) -> bool:
        """True unless the settings say `eval_strategy: no`: the held-out sets are evaluated with the saved policy."""
        return bool(self.options.get("eval_strategy") != "no")

    def as_dict(self) -> dict[str, Any]:
        """Give the section as a file would hold it: our options where they are not the defaults, and `given`."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "given"}
        return {key: value for key, value in own.items() if value != getattr(TrainSection, key)} | dict(self.given)


def _hint_for(key: str, known: Sequence[str], own: Sequence[str]) -> str:
    if nearest(key, known) is None:
        # The library has 120 fields.
        known = [*own, "and the fields at https://huggingface.co/docs/transformers/main_classes/trainer"]
    return hint_for_key("train", key, known)
