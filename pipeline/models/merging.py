"""Merge a policy's adapter into its base, layer by layer, so that one plain model is left."""

import warnings
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError, first_line
from pipeline.base.files import read_json
from pipeline.config.schema import Config
from pipeline.models.files import ADAPTER_CONFIG, NamedModel
from pipeline.models.loading import load_base, loading_errors, with_adapter
from pipeline.models.precision import Precision, policy_precision, resolve_dtype
from pipeline.models.products import adds_products

__all__ = ["dtype_of_base", "load_merged"]


def dtype_of_base(config: Config) -> str:
    """Name the dtype of the policy's checkpoint before training."""
    return resolve_dtype("auto", read_json(NamedModel.policy(config).folder(weights=False) / "config.json"))


def load_merged(config: Config, adapter: Path, dtype: str) -> Any:
    """Load the policy's base and merge an adapter into its weights, which are then of a dtype; its buffers stay.

    Each layer is merged in float32 and rounded once. A quantized base is dequantized first, since the adapter was
    trained on the rounded weights.

    Raises:
        ConfigError: The base can't be dequantized, or the adapter does not fit it or can't be merged.
        DataError: A weight file is damaged.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = getattr(torch, dtype)
    model = load_base(config, _loaded_in(config, adapter))
    if getattr(model, "is_quantized", False):
        model = _dequantized(model, NamedModel.policy(config))
    was_tied = _untie(model)
    wrapped = with_adapter(model, adapter, trainable=False)
    with loading_errors(f"adapter {adapter}", "can't be merged into its base"), torch.no_grad():
        for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
            base: Any = layer.get_base_layer()
            base.float()
            layer.merge(safe_merge=True)
            _narrow(base, wanted)
        with warnings.catch_warnings(action="ignore"):  # of layers that are merged already
            merged: Any = wrapped.merge_and_unload()
    _narrow(merged, wanted)
    if was_tied:
        _tie_if_equal(merged)
    return merged


def _loaded_in(config: Config, adapter: Path) -> str:
    """Name the dtype to load the base in: the policy's, or a narrower one of the checkpoint, with the same numbers."""
    trained, settings = policy_precision(config).weights, read_json(adapter / ADAPTER_CONFIG)
    # Weights that the adapter replaces whole take the base's dtype.
    replaces = settings.get("modules_to_save") or settings.get("bias", "none") != "none"
    if config.policy.quantization is not None or replaces or not adds_products(adapter):
        return trained
    return min((trained, dtype_of_base(config)), key=lambda name: Precision(weights=name).bits)


def _dequantized(model: Any, named: NamedModel) -> Any:
    try:
        return model.dequantize()
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(
            f"{named.key}: must be a model whose weights can be dequantized, got {named.name} "
            f"({model.quantization_method}): {first_line(error)}. Load its adapter with PEFT instead"
        ) from error


def _narrow(module: Any, dtype: Any) -> None:
    """Cast floating-point weights, one at a time."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _untie(model: Any) -> bool:
    """Give a tied head a weight of its own, which an adapter on the embeddings leaves alone. Return True if it was."""
    import torch

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def _tie_if_equal(model: Any) -> None:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight.equal(embeddings.weight):
        head.weight = embeddings.weight
        model.config.tie_word_embeddings = True
