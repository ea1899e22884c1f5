"""Sizes of a model, and what a token costs in it, from its config alone: no weights are read.

Parameters are counted on the meta device. Activations are counted tensor by tensor for the decoder layer that most
families share (the method of arXiv 2205.05198, section 4, for a gated feed-forward, rotary positions and attention
without a score matrix). A forward pass takes 2 operations per weight and token (arXiv 2001.08361, section 2.1).
"""

from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.config.schema import PolicyConfig, Quantization
from pipeline.models.loading import empty_model
from pipeline.models.products import has_only_products

__all__ = ["Shapes", "activation_bytes", "bytes_of", "forward_flops", "shapes_of", "weight_bytes"]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a model, and of what is trained on it."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward that a token passes; the sum over the experts it passes."""
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together."""
    vocabulary: int
    parameters: int
    """Number of the model's parameters, without an adapter's."""
    layer_parameters: int
    """Number of parameters of all decoder layers."""
    active_parameters: int
    """Number of those that one token passes; fewer in a mixture of experts."""
    trained_parameters: int
    """All parameters, or the adapter's."""
    rank: int | None = None
    """Rank of the adapter; None if the model itself is trained."""
    product_parameters: int = 0
    """Number of parameters that are operands of products and nothing else, a head that is not tied among them."""
    head_parameters: int = 0
    """Number of those that are the head's."""

    @property
    def has_adapter(self) -> bool:
        return self.rank is not None

    @property
    def outside_parameters(self) -> int:
        """Number of parameters outside the layers: embedding, head and final norm."""
        return self.parameters - self.layer_parameters


def shapes_of(model_config: Any, policy: PolicyConfig | None = None) -> Shapes:
    """Count the parameters and read the widths of a text model's transformers config.

    The trained parameters are those of the policy's adapter, if it has one. Raises ConfigError if the library makes no
    causal language model of the config.
    """
    import torch

    model, adapter = empty_model(model_config, policy)
    layers = int(model_config.num_hidden_layers)
    # The decoder layers are the first list of modules of that length.
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = next((modules for modules in lists if len(modules) == layers), None)
    if blocks is None:
        raise ConfigError(
            f"policy.model: {type(model).__name__} has no list of {layers} layers, so it can't be estimated"
        )
    in_layers = [(name, p.numel()) for name, p in blocks.named_parameters()]
    total = sum(count for _, count in in_layers)
    intermediate = _first_of(model_config, "intermediate_size", "n_inner", "ffn_dim") or 4 * model_config.hidden_size
    idle = 0
    if experts := _first_of(model_config, "num_local_experts", "num_experts", "n_routed_experts"):
        in_experts = sum(count for name, count in in_layers if "experts." in name and "shared" not in name)
        passed = _first_of(model_config, "num_experts_per_tok", "moe_top_k") or 1
        idle = in_experts - in_experts * passed // experts
        shared = _first_of(model_config, "shared_expert_intermediate_size") or 0
        intermediate = (_first_of(model_config, "moe_intermediate_size") or intermediate) * passed + shared
    heads = int(model_config.num_attention_heads)
    width = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    parameters = sum(p.numel() for p in model.parameters())
    trained, rank = adapter if adapter is not None else (parameters, None)
    output: Any = model.get_output_embeddings()
    tied = output.weight is model.get_input_embeddings().weight
    head = output.weight.numel() if has_only_products(output) and not tied else 0
    layer_modules: list[Any] = list(blocks.modules())
    in_products = sum(module.weight.numel() for module in layer_modules if has_only_products(module))
    return Shapes(
        layers=layers,
        hidden=int(model_config.hidden_size),
        intermediate=int(intermediate),
        query=heads * width,
        key_value=(getattr(model_config, "num_key_value_heads", None) or heads) * width,
        vocabulary=int(model_config.vocab_size),
        parameters=parameters,
        layer_parameters=total,
        active_parameters=total - idle,
        trained_parameters=trained,
        rank=rank,
        product_parameters=head + in_products,
        head_parameters=head,
    )


def _first_of(model_config: Any, *names: str) -> int | None:
    return next((int(value) for name in names if (value := getattr(model_config, name, None))), None)


def bytes_of(dtype: str) -> int:
    """Return the bytes of one number. `auto` is bfloat16, the dtype of most checkpoints."""
    return {"auto": 2, "bfloat16": 2, "float16": 2, "float64": 8}.get(dtype, 4)


def weight_bytes(shapes: Shapes, dtype: str, quantization: Quantization | None) -> int:
    """Return the bytes of a model's weights. bitsandbytes quantizes the layers, not the embedding and the head."""
    size = bytes_of(dtype)
    if quantization is None:
        return shapes.parameters * size
    # In 4 bits each 64 weights have a float32 scale, or one in 8 bits and a float32 for each 256 scales.
    scales = {8: 0.0, 4: (8 + 32 / 256) / 64 if quantization.double else 32 / 64}[quantization.bits]
    return round(shapes.layer_parameters * (quantization.bits + scales) / 8) + shapes.outside_parameters * size


def forward_flops(shapes: Shapes, tokens: int, scored: int, context: float) -> float:
    """Count the operations of a forward pass of `tokens` tokens, of which `scored` pass the head.

    `context` is the mean number of tokens that a token attends to.
    """
    # A query meets `context` keys and as many values, with 2 operations for each of the 2 products.
    layers = tokens * (2 * shapes.active_parameters + 4 * shapes.layers * shapes.query * context)
    return float(layers + 2 * scored * shapes.vocabulary * shapes.hidden)


def activation_bytes(shapes: Shapes, weights: str, *, autocast: bool) -> int:
    """Count the bytes that one token leaves in one decoder layer for backward.

    A norm keeps its input in float32 and, if its weight is trained, the normed input. A product keeps its input if its
    weight or an adapter's is trained. Attention keeps query, key, value and output. The gated feed-forward keeps its
    two branches, and the gate after its activation. Under autocast (`train.bf16` on float32 `weights`) every product
    keeps a 16-bit copy of its input; an adapter, which stays in float32 on 16-bit weights, a float32 copy.
    """
    h, f, q, kv, r = shapes.hidden, shapes.intermediate, shapes.query, shapes.key_value, shapes.rank
    common = 3 * q + 2 * kv + 4 * f
    if bytes_of(weights) >= 4:
        size = 2 if autocast else 4
        if r is None:
            return (26 if autocast else 24) * h + size * common
        return (18 if autocast else 16) * h + size * (common + 7 * r)
    if r is None:
        return 16 * h + 2 * common
    return 30 * h + 8 * q + 4 * kv + 10 * f + 28 * r
