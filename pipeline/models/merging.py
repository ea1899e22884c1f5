"""Merge a policy's adapter into its base, layer by layer, so that one plain model is left."""

import warnings
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError, first_line
from pipeline.base.files import read_json
from pipeline.config.schema import Config
from pipeline.models.files import ADAPTER_CONFIG, NamedModel
from pipeline.models.loading import load_base, loading_errors, with_adapter
from pipeline.models.precision import policy_precision, resolve_dtype
from pipeline.models.products import adds_products

__all__ = ["dtype_of_base", "load_merged"]

_NARROW = {"bfloat16": "BF16", "float16": "F16"}
"""Dtype -> its name in safetensors, of those whose numbers float32 has too"""


def dtype_of_base(config: Config) -> str:
    """Name the dtype of the policy's checkpoint before training."""
    return resolve_dtype("auto", read_json(NamedModel.policy(config).folder(weights=False) / "config.json"))


def load_merged(config: Config, adapter: Path, dtype: str) -> Any:
    """Load the policy's base and merge an adapter into its weights, which are then of a dtype; its buffers stay.

    Each layer is merged in float32 and rounded once. A quantized base is dequantized first, since the adapter was
    trained on the rounded weights.

    Raises:
        ConfigError: The base can't be dequantized, the adapter does not fit it or can't be merged, or a weight is too
            large for float16.
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
    if dtype == "float16":  # the other dtypes have float32's range
        _refuse_infinite(merged)
    if was_tied:
        _tie_if_equal(merged)
    return merged


def _loaded_in(config: Config, adapter: Path) -> str:
    """Name the dtype to load the base in: the policy's, or for one in float32 a narrower one of all weight files."""
    trained, settings = policy_precision(config).weights, read_json(adapter / ADAPTER_CONFIG)
    # Weights that the adapter replaces whole take the base's dtype.
    replaces = settings.get("modules_to_save") or settings.get("bias", "none") != "none"
    if config.policy.quantization is not None or replaces or not adds_products(adapter):
        return trained
    stored, folder = dtype_of_base(config), NamedModel.policy(config).folder()
    is_narrow = trained == "float32" and stored in _NARROW and _are_stored_in(stored, folder)
    return stored if is_narrow else trained


def _are_stored_in(dtype: str, folder: Path) -> bool:
    """Return True if a model's files have all floating-point weights in a dtype; its config.json may name another."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                found |= {opened.get_slice(name).get_dtype() for name in names}
    except (SafetensorError, OSError):  # which loading reports
        return False
    return {name for name in found if name.startswith(("F", "BF"))} <= {_NARROW[dtype]}


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


def _refuse_infinite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"--dtype: must hold every weight, got float16, in which numbers of {name} are infinite. Choose "
                "bfloat16 or float32"
            )


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
