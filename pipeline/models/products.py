"""Hold the weights of matrix products in the dtype of autocast, which would cast them again in each forward pass."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.files import read_json
from pipeline.config.schema import Config
from pipeline.models.files import ADAPTER_CONFIG, reference_quantization, reference_sources
from pipeline.models.precision import reference_precision

if TYPE_CHECKING:
    import torch

__all__ = ["adds_products", "dtype_of_products", "has_only_products", "products_held_in"]


def dtype_of_products(config: Config) -> str | None:
    """Name the dtype in which the reference's products are loaded instead of that of its weights; None if in theirs.

    Autocast casts weights in float32 alone, and quantized ones not at all.
    """
    precision, adapter = reference_precision(config), reference_sources(config)[1]
    if precision.weights != "float32" or reference_quantization(config) is not None:
        return None
    return precision.autocast if adapter is None or adds_products(adapter) else None


def adds_products(adapter: Path) -> bool:
    """Return True if an adapter adds products to those of the layers, and reads none of their weights itself."""
    settings = read_json(adapter / ADAPTER_CONFIG)
    reading = ("use_dora", "target_parameters", "trainable_token_indices")
    # Other initial values, such as PiSSA's, are made from the layers' weights, which they change.
    drawn = settings.get("init_lora_weights", True) in (True, False, "gaussian")
    return settings.get("peft_type") == "LORA" and drawn and not any(settings.get(key) for key in reading)


def has_only_products(module: Any) -> bool:
    """Return True for a layer whose weight is nothing but an operand of its product."""
    import torch
    from transformers.pytorch_utils import Conv1D

    # A layer of another class, such as a router, may compute in a dtype of its own.
    return type(module) in (torch.nn.Linear, Conv1D)


@contextlib.contextmanager
def products_held_in(dtype: "torch.dtype | None") -> Iterator[None]:
    """Let models that are made and loaded within hold the float32 weights of their products in another dtype.

    The library reads each weight from its file in the dtype that the empty model has, so none is held in float32 at any
    time. Under autocast in this dtype all log-probs are the same to the bit. Without a dtype nothing is changed.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def narrow(module: Any, name: str, parameter: Any) -> Any:
        # A head that is tied gets a second weight, the embedding's, in place of its own.
        first = name == "weight" and getattr(module, name, None) is None
        if not first or not has_only_products(module) or parameter is None or parameter.dtype != torch.float32:
            return None
        return torch.nn.Parameter(parameter.data.to(dtype), requires_grad=parameter.requires_grad)

    if dtype is None:
        yield
        return
    hook = register_module_parameter_registration_hook(narrow)
    try:
        yield
    finally:
        hook.remove()
