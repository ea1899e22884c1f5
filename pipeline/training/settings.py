"""Refuse settings of stage two that no machine could train with, before any model is loaded."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from pipeline.base.errors import ConfigError, RefshardError, first_line, is_out_of_memory, nearest
from pipeline.config.loss import LossConfig
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel
from pipeline.training.arguments import trial_arguments
from pipeline.training.losses import router_aux_weight
from pipeline.training.metrics import evaluated_metrics

__all__ = ["building", "check_metric", "check_training", "quantized_error", "too_few_pairs"]


def check_training(config: Config, made: transformers.TrainingArguments | None = None) -> None:
    """Refuse settings of stage two that contradict each other, the policy's files or the libraries here.

    It loads no weights. `made` are the library's arguments in a process that trains; stage one and `check`, which call
    it if there is a `train` section, make a trial of them.

    Raises:
        ConfigError: A setting is impossible.
    """
    made = made or trial_arguments(config)
    policy = NamedModel.policy(config)
    method = policy.quantization_method()
    if method is not None and not config.policy.has_adapter:
        raise quantized_error(policy, method)
    balanced = router_aux_weight(policy.text_config(weights=False), config.loss) != 0
    held_out = dict.fromkeys(config.data.eval, config.precompute.token_logps)
    check_metric(made, config.loss, held_out, balanced=balanced)
    with warnings.catch_warnings(action="ignore"):
        _check_optimizer(made)
        _check_schedule(made)


def quantized_error(policy: NamedModel, method: str) -> ConfigError:
    """Make the error for a policy of quantized weights without an adapter."""
    return ConfigError(
        f"policy.model: must have weights that can be trained, got {policy.name}, whose weights are quantized "
        f"({method}). Set policy.lora, or name the model before it was quantized"
    )


def too_few_pairs(options: Mapping[str, Any], pairs: int, processes: int) -> ConfigError | None:
    """Make the error for a training set that fills no batch while incomplete batches are dropped."""
    batch = int(options.get("per_device_train_batch_size", 8)) * processes
    if not options.get("dataloader_drop_last") or pairs >= batch:
        return None
    return ConfigError(
        f"train.dataloader_drop_last: must be false with fewer pairs than one batch, got true with {pairs:,} pairs and "
        f"batches of {batch:,}, so there is nothing to train on. Leave it out, or set a smaller "
        "train.per_device_train_batch_size"
    )


def check_metric(
    arguments: transformers.TrainingArguments, loss: LossConfig, held_out: Mapping[str, bool], *, balanced: bool
) -> None:
    """Raise ConfigError if no evaluation gives the metric that the run is to choose by.

    `held_out` says by set if it has reference token log-probs, `balanced` that the loss has a mixture's balance loss.
    """
    wanted = arguments.metric_for_best_model
    if wanted is None or arguments.eval_strategy == "no":
        return
    known: list[str] = []
    for name, token_logps in held_out.items():
        prefix = "eval_" if len(held_out) == 1 else f"eval_{name}_"
        known += [prefix + metric for metric in evaluated_metrics(loss, token_logps=token_logps, balanced=balanced)]
    if (wanted if wanted.startswith("eval_") else f"eval_{wanted}") not in known:
        # One of several sets must be named too.
        meant = [metric for metric in known if metric.endswith(wanted.removeprefix("eval_"))] or known
        near = meant[0] if meant is not known else nearest(wanted, known)
        raise ConfigError(
            f"train.metric_for_best_model: must be a metric of the held-out pairs ({', '.join(sorted(known))}), got "
            f"{wanted}. " + ("Choose one of them" if near is None else f"Set train.metric_for_best_model: {near}")
        )


@contextmanager
def building(field: str, what: str, value: Any, options: str) -> Iterator[None]:
    """Raise ConfigError for what the settings ask for and the library can't build."""
    try:
        yield
    except Exception as error:  # it raises errors of any type
        if isinstance(error, RefshardError) or is_out_of_memory(error):
            raise
        raise ConfigError(
            f"train.{field}: must be {what} that can be built here, got {getattr(value, 'value', value)} "
            f"({first_line(error)}). Choose another, or correct train.{options}"
        ) from error


def _check_optimizer(made: transformers.TrainingArguments) -> None:
    """Build the optimizer for a model of one layer."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with building("optim", "an optimizer", made.optim, "optim_args"):
        try:
            kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(made, layer)  # type: ignore[arg-type]
        except Exception as error:
            if isinstance(error, ImportError) or made.optim_target_modules is None:
                raise
            # The layer has none of the modules that the optimizer is for.
            return
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and "params" not in options:
            build: Callable[..., Any] = kind
            build(layer.parameters(), **options)


def _check_schedule(made: transformers.TrainingArguments) -> None:
    """Build the schedule for a run that is longer than any part of it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=made.learning_rate)
    warmup = int(made.warmup_steps) if made.warmup_steps >= 1 else 1
    with building("lr_scheduler_type", "a schedule", made.lr_scheduler_type, "lr_scheduler_kwargs"):
        transformers.get_scheduler(
            made.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=10**9,
            scheduler_specific_kwargs=made.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
