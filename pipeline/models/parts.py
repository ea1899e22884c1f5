"""Find the parts of a loaded causal language model: the model below its adapters, and its backbone."""

from typing import Any

__all__ = ["backbone_of", "causal_of"]


def causal_of(model: Any) -> Any:
    """Give the causal language model that an adapter wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(causal: Any) -> Any:
    """Give the module that turns token ids into the final hidden states, which the head reads.

    The library's `base_model` gives the whole model if it has no part of the name that its class declares (Llama 4,
    Mllama). The backbone is then the part that holds the input embeddings.

    Raises LookupError if the model has no such part.
    """
    if causal.base_model is not causal:
        return causal.base_model
    embeddings = causal.get_input_embeddings()
    for part in causal.children():
        if any(module is embeddings for module in part.modules()):
            return part
    raise LookupError(f"{type(causal).__name__} has no part that holds its input embeddings")
