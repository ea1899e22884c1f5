"""Memory, time and disk of both stages, estimated from a model's config and the tokens of the data alone.

No weights are read and nothing is computed: parameters are counted on the meta device, the rest is arithmetic.
Weights, gradients and optimizer states are exact to the byte; activations are counted tensor by tensor for the
decoder layer that most families share (the method of arXiv 2205.05198, section 4, for a gated feed-forward, rotary
positions and attention without a score matrix). Computation is 2 operations a weight and token forward (arXiv
2001.08361, section 2.1), as many again for each gradient that backward makes. How much of a device's peak is reached
can't be known from a config: it is measured by a probe (probe.py) or assumed, and the estimate says which.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.config.schema import Config, PolicyConfig, Quantization
from pipeline.models.files import reference_quantization
from pipeline.models.loading import empty_model
from pipeline.scoring.head import positions_of_chunk
from pipeline.scoring.memory import tokens_for
from stages.check.hardware import Hardware

__all__ = [
    "MEMORY_BAND",
    "UTILISATION",
    "Estimate",
    "Lengths",
    "Shapes",
    "StageEstimate",
    "activation_bytes",
    "estimate",
    "forward_flops",
    "shapes_of",
]

UTILISATION = (0.2, 0.35, 0.5)
"""Share of a GPU's peak that both stages are assumed to reach: in a bad case, as expected, in a good one. Large
transformers are trained at 0.2 to 0.5 (arXiv 2204.02311, table 3); short pairs and small models reach less."""


MEMORY_BAND = (0.8, 1.25)
"""What is really held, as a multiple of the estimate; tests/scoring/test_memory.py holds training on a CPU to it"""


# Of a measured speed: one layer in a loop is a little better off than a model among its loaders.
_MEASURED_BAND = (0.6, 0.9, 1.1)


_GPU_CONTEXT = 10**9
"""Bytes that the driver, its kernels and their workspaces hold, about"""


_PROGRAM = 520 * 10**6
"""Bytes that a process holds of Python, torch and the imports before it has a model: resident, measured on Linux with
torch 2.13 for CPUs"""


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of a model, and of what is trained on it."""

    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward that a token passes: of all its experts together"""
    query: int
    """Width of all query heads together"""
    key_value: int
    """Width of all key heads together"""
    vocabulary: int
    parameters: int
    """Of the model, without its adapter"""
    layer_parameters: int
    """Of all decoder layers"""
    active_parameters: int
    """Of all decoder layers, those that one token passes: fewer in a mixture of experts"""
    trained_parameters: int
    """All, or the adapter's"""
    rank: int | None = None
    """Of the adapter; None where the model itself is trained"""

    @property
    def has_adapter(self) -> bool:
        return self.rank is not None


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The tokens of a set of pairs, as they are scored (after truncation)."""

    pairs: int
    prompt_tokens: int
    """Of all prompts together, each pair's counted once"""
    chosen_tokens: int
    rejected_tokens: int
    longest_pair: int
    """Prompt, chosen and rejected together: the pair that has most"""
    usual_pair: int
    """The same of a long pair that is not rare, the 95th percentile"""
    shared_tokens: int | None = None
    """What stage one computes, every prompt of a shard once; None: no prompt is there twice"""

    @property
    def completion_tokens(self) -> int:
        return self.chosen_tokens + self.rejected_tokens

    @property
    def packed_tokens(self) -> int:
        """What a forward pass of each pair computes: a prompt once, no completion's last token."""
        return max(0, self.prompt_tokens + self.completion_tokens - 2 * self.pairs)


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage takes, about."""

    memory: Mapping[str, int]
    """Bytes of the fullest device, by what holds them, at whatever time that is most"""
    total_memory: int
    """At the time when all together are most"""
    flops: float
    """Of all devices together"""
    seconds: tuple[float, float, float] | None
    """At best, about, at worst; None where nothing is known of the device's speed"""
    tokens: int
    """That are computed, every epoch counted"""
    measured: bool
    """Whether the speed behind `seconds` was measured here; else it is assumed"""
    batch_tokens: int
    """Of the largest forward pass"""
    steps: int = 0
    """Optimizer steps, of stage two"""

    @property
    def memory_range(self) -> tuple[int, int]:
        return round(MEMORY_BAND[0] * self.total_memory), round(MEMORY_BAND[1] * self.total_memory)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes, about, on given hardware."""

    hardware: Hardware
    precompute: StageEstimate
    train: StageEstimate | None
    """None where the settings have no `train` section"""
    disk: Mapping[str, int]
    """Bytes, by what they are for"""
    host_memory: int
    """Bytes of the CPU's memory while the policy is loaded, of all processes together: each is a program that holds it
    whole"""

    @property
    def total_disk(self) -> int:
        return sum(self.disk.values())


def shapes_of(settings: Any, policy: PolicyConfig | None = None) -> Shapes:
    """Count a model's parameters and read its widths.

    Args:
        settings: The model's transformers config, of its text model.
        policy: With an adapter in it, that one's parameters are counted; left out, all are trained.

    Raises:
        ConfigError: The library makes no causal language model of the config.
    """
    model, adapter = empty_model(settings, policy)
    layers = int(settings.num_hidden_layers)
    blocks = _blocks(model, layers)
    in_layers = [(name, p.numel()) for block in blocks for name, p in block.named_parameters()]
    in_experts = sum(count for name, count in in_layers if "experts." in name and "shared" not in name)
    experts = _first_of(settings, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _first_of(settings, "num_experts_per_tok", "moe_top_k") or 1
    idle = in_experts - in_experts * chosen // experts if experts else 0
    heads = int(settings.num_attention_heads)
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    intermediate = _first_of(settings, "intermediate_size", "n_inner", "ffn_dim") or 4 * settings.hidden_size
    if experts:
        shared = _first_of(settings, "shared_expert_intermediate_size") or 0
        intermediate = (_first_of(settings, "moe_intermediate_size") or intermediate) * chosen + shared
    parameters = sum(p.numel() for p in model.parameters())
    in_adapter, rank = adapter if adapter is not None else (parameters, None)
    total = sum(count for _, count in in_layers)
    return Shapes(
        layers=layers,
        hidden=int(settings.hidden_size),
        intermediate=int(intermediate),
        query=heads * width,
        key_value=(getattr(settings, "num_key_value_heads", None) or heads) * width,
        vocabulary=int(settings.vocab_size),
        parameters=parameters,
        layer_parameters=total,
        active_parameters=total - idle,
        trained_parameters=in_adapter,
        rank=rank,
    )


def _blocks(model: Any, layers: int) -> Any:
    """The decoder layers: the first list of modules that has as many."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module
    raise ConfigError(f"policy.model: {type(model).__name__} has no list of {layers} layers, so it can't be estimated")


def _first_of(settings: Any, *names: str) -> int | None:
    return next((int(value) for name in names if (value := getattr(settings, name, None))), None)


def estimate(
    config: Config,
    shapes: Shapes,
    lengths: Lengths,
    hardware: Hardware,
    *,
    reference: Shapes | None = None,
    reference_dtype: str | None = None,
    held_out: Lengths | None = None,
    measured: tuple[float, float] | None = None,
    unscored: tuple[float, float] = (1.0, 1.0),
) -> Estimate:
    """Estimate what both stages of a run take on given hardware. Reads no file, loads nothing.

    Args:
        config: The run's settings.
        shapes: Of the policy.
        lengths: Of the training set.
        hardware: Every device is used by both stages, but for a reference that moves: one process alternates between
            them on one device. Layers spread by `precompute.device_map` take turns.
        reference: Shapes of the reference, where it is another model than the policy.
        reference_dtype: What `reference.dtype: auto` stands for; bfloat16 if left out, as most checkpoints have it.
        held_out: Of all held-out sets together.
        measured: Operations per second of one device, forward alone and with backward; taken instead of its peak.
        unscored: Share of the training pairs, and of the held-out ones, that stage one has still to score. Not read
            where the reference moves, whose windows each score anew.
    """
    # A reference that moves is kept in float32, but scores in the first one's dtype; every window's pairs anew.
    sync = config.reference.sync
    dtype = reference_dtype or _dtype_of(config.reference.dtype)
    train = None
    settings = config.train.options
    used = hardware if sync is None else replace(hardware, count=1)
    if not config.train.is_empty:
        train = _stage_two(config, settings, shapes, lengths, held_out, used, measured)
    passes = unscored if sync is None else _passes_of_windows(sync.steps, settings, lengths.pairs)
    policy = _weight_bytes(shapes, _dtype_of(config.policy.dtype), config.policy.quantization)
    return Estimate(
        hardware=hardware,
        precompute=_stage_one(config, reference or shapes, dtype, lengths, held_out, hardware, measured, passes),
        train=train,
        disk=_disk(config, settings, shapes, lengths, held_out, train, used.count),
        host_memory=used.count * (policy + _PROGRAM),
    )


def forward_flops(shapes: Shapes, tokens: int, scored: int, context: float) -> float:
    """Count the operations of a forward pass.

    Args:
        shapes: Of the model.
        tokens: That pass the layers.
        scored: Positions that pass the head.
        context: Tokens that one token sees, on average.
    """
    # Each query meets `context` keys and as many values: 2 operations for each of 2 products.
    layers = tokens * (2 * shapes.active_parameters + 4 * shapes.layers * shapes.query * context)
    return float(layers + 2 * scored * shapes.vocabulary * shapes.hidden)


def activation_bytes(shapes: Shapes, weights: str, *, autocast: bool) -> int:
    """Count what one token leaves in one decoder layer for backward, in bytes.

    A norm keeps its input in float32 and, where its weight is trained, the normed input; a product keeps its input
    where its weight, or an adapter's, is trained; attention keeps query, key, value and output; the gated feed-forward
    its two branches, and the gate after its activation. Under autocast every product keeps a 16-bit copy of its own;
    an adapter, which stays in float32 on 16-bit weights, a float32 one.

    Args:
        shapes: Of the model.
        weights: Dtype of the weights.
        autocast: Whether products run in 16 bits on float32 weights (`train.bf16`).
    """
    h, f, q, kv, r = shapes.hidden, shapes.intermediate, shapes.query, shapes.key_value, shapes.rank
    common = 3 * q + 2 * kv + 4 * f
    if _BYTES.get(weights, 4) >= 4:
        size = 2 if autocast else 4
        if r is None:
            return (26 if autocast else 24) * h + size * common
        return (18 if autocast else 16) * h + size * (common + 7 * r)
    if r is None:
        return 16 * h + 2 * common
    return 30 * h + 8 * q + 4 * kv + 10 * f + 28 * r


def _stage_one(
    config: Config,
    shapes: Shapes,
    dtype: str,
    lengths: Lengths,
    held_out: Lengths | None,
    hardware: Hardware,
    measured: tuple[float, float] | None,
    passes: tuple[float, float],
) -> StageEstimate:
    size = _BYTES.get(dtype, 4)
    weights = _weight_bytes(shapes, dtype, reference_quantization(config))
    at_work = hardware.count
    if config.precompute.tp_plan:
        # Layers alone are split: each process has the embedding whole, as the library has it, and the head, as we do.
        outside = (shapes.parameters - shapes.layer_parameters) * size
        weights = (weights - outside) // hardware.count + outside
    elif config.precompute.device_map:
        # A batch passes one device's layers after another's.
        weights, at_work = weights // hardware.count, 1
    if config.reference.sync is not None:
        at_work = 1
    # Nothing is kept for backward: a layer's input, its norm in float32, and the widest of what it makes.
    per_token = (4 + 2 * size) * shapes.hidden + size * max(3 * shapes.intermediate, 3 * shapes.query)
    context = _GPU_CONTEXT if hardware.is_gpu else _PROGRAM
    widest = max(lengths.longest_pair, held_out.longest_pair if held_out else 0)
    tokens = config.precompute.tokens_per_batch
    if tokens is None:
        tokens = tokens_for(hardware.memory - weights - context, per_token) if hardware.is_gpu else tokens_for(None, 0)
    sets = [lengths, held_out] if held_out else [lengths]
    computed = sum(_tokens_of_stage_one(s) for s in sets)
    tokens = max(widest, min(tokens, computed))
    scored = sum(s.completion_tokens for s in sets)
    # One pair in 64 is scored twice, which measures the noise.
    flops = (65 / 64) * sum(
        share * forward_flops(shapes, _tokens_of_stage_one(s), s.completion_tokens, _context_of(s))
        for share, s in zip(passes, sets, strict=False)
    )
    memory = {
        "weights": weights,
        "one batch": tokens * per_token,
        "logits of a chunk": _chunk_bytes(shapes, min(tokens, scored), size, hardware, buffers=1),
        _name_of_own(hardware): context,
    }
    return StageEstimate(
        memory=_held(memory),
        total_memory=sum(memory.values()),
        flops=flops,
        seconds=_seconds(flops, replace(hardware, count=at_work), measured and measured[0], sixteen=size == 2),
        tokens=round(sum(share * _tokens_of_stage_one(s) for share, s in zip(passes, sets, strict=False))),
        measured=measured is not None,
        batch_tokens=tokens,
    )


def _name_of_own(hardware: Hardware) -> str:
    return "the device's own" if hardware.is_gpu else "Python and torch"


def _tokens_of_stage_one(lengths: Lengths) -> int:
    return lengths.packed_tokens if lengths.shared_tokens is None else lengths.shared_tokens


def _stage_two(
    config: Config,
    settings: Mapping[str, Any],
    shapes: Shapes,
    lengths: Lengths,
    held_out: Lengths | None,
    hardware: Hardware,
    measured: tuple[float, float] | None,
) -> StageEstimate:
    policy = config.policy
    batch = int(settings.get("per_device_train_batch_size", 8))
    per_epoch = _steps_per_epoch(settings, lengths.pairs, hardware.count)
    steps = _steps(settings, per_epoch)
    # The last step of an epoch takes what is left.
    epochs = steps / per_epoch if _max_steps(settings) else _epochs(settings)
    autocast = policy.dtype == "float32" and bool(settings.get("bf16") or settings.get("fp16"))
    tokens = lengths.longest_pair + (batch - 1) * lengths.usual_pair
    memory = _training_memory(config, settings, shapes, tokens, lengths, hardware, autocast=autocast)

    checkpointed = _is_checkpointed(settings)
    forward = forward_flops(shapes, lengths.packed_tokens, 0, _context_of(lengths))
    head = forward_flops(shapes, 0, lengths.completion_tokens, 0)
    # Backward makes gradients of activations and, unless they are frozen, of weights; the head's logits are made again
    # for it, or, where it is frozen, their gradient comes along forward.
    through_layers = (2 if shapes.has_adapter else 3) + (1 if checkpointed else 0)
    flops = epochs * (through_layers * forward + (2 if shapes.has_adapter else 4) * head)
    if shapes.has_adapter:
        flops += epochs * 6 * shapes.trained_parameters * lengths.packed_tokens
    computed = round(epochs * lengths.packed_tokens)
    if held_out is not None:
        evaluations = len(_evaluated_steps(settings, steps, per_epoch))
        computed += evaluations * held_out.packed_tokens
        flops += evaluations * forward_flops(
            shapes, held_out.packed_tokens, held_out.completion_tokens, _context_of(held_out)
        )
    sixteen = autocast or _BYTES.get(_dtype_of(policy.dtype), 4) == 2
    total = sum(memory.values())
    if int(settings.get("gradient_accumulation_steps", 1)) == 1:
        # Backward frees a layer's activations as it makes its gradients, so the larger of the two counts.
        total -= min(memory.get("gradients", 0), memory.get("activations", 0))
    return StageEstimate(
        memory=memory,
        total_memory=total,
        flops=flops,
        seconds=_seconds(flops, hardware, measured and measured[1], sixteen=sixteen),
        tokens=computed,
        measured=measured is not None,
        batch_tokens=tokens,
        steps=steps,
    )


def _training_memory(
    config: Config,
    settings: Mapping[str, Any],
    shapes: Shapes,
    tokens: int,
    lengths: Lengths,
    hardware: Hardware,
    *,
    autocast: bool,
) -> dict[str, int]:
    policy = config.policy
    dtype = _dtype_of(policy.dtype)
    size = _BYTES.get(dtype, 4)
    sharded = hardware.count > 1 and bool(settings.get("fsdp") or settings.get("deepspeed"))
    devices = hardware.count if sharded else 1
    one_layer = shapes.layer_parameters // shapes.layers
    # PEFT keeps an adapter in float32 on 16-bit weights too.
    trained_size = 4 if shapes.has_adapter else size
    trained = shapes.trained_parameters
    per_token = activation_bytes(shapes, dtype, autocast=autocast)
    product = 2 if autocast else size
    stream = 4 if autocast else size
    kept = shapes.layers * per_token
    if _is_checkpointed(settings):
        kept = shapes.layers * stream * shapes.hidden
    if config.train.activation_offload:
        # They wait in the CPU's memory.
        kept = 0
    # A layer is computed again, or its gradients are made, while all that is kept is still there.
    passing = per_token if _is_checkpointed(settings) or config.train.activation_offload else 0
    passing += product * (2 * shapes.hidden + 3 * shapes.intermediate)
    scored = min(tokens, round(tokens * lengths.completion_tokens / max(1, lengths.packed_tokens)))
    of_head = 0 if shapes.has_adapter else shapes.vocabulary * shapes.hidden * 4
    copies = 0
    if autocast and not sharded:
        # Autocast holds a 16-bit copy of each trained weight for the length of a step; of a frozen one while its
        # layer waits for backward.
        frozen_again = shapes.has_adapter and _is_checkpointed(settings)
        copies = 2 * (one_layer if frozen_again else shapes.layer_parameters)
    if sharded:
        # Two layers whole: the one at work, and the one that is fetched ahead; the head and the embedding likewise.
        outside = shapes.parameters - shapes.layer_parameters
        copies = product * (2 * one_layer + outside)
    memory = {
        "weights": (_weight_bytes(shapes, dtype, policy.quantization)) // devices
        + (trained * 4 // devices if shapes.has_adapter else 0),
        "copies of weights": copies,
        "gradients": trained * trained_size // devices,
        "buckets of DDP": trained * trained_size if hardware.count > 1 and not sharded else 0,
        "optimizer": round(trained * _state_bytes(str(settings.get("optim", "adamw")), trained_size)) // devices,
        "activations": tokens * (kept + passing),
        "logits of a chunk": _chunk_bytes(shapes, scored, product, hardware, buffers=3 if product == 2 else 2)
        + 2 * scored * shapes.hidden * 4,
        "gradient of the head": of_head,
        _name_of_own(hardware): _GPU_CONTEXT if hardware.is_gpu else _PROGRAM,
    }
    if policy.quantization is not None:
        # The widest layer's weights as they are multiplied, again whole.
        memory["weights dequantized"] = product * shapes.hidden * shapes.intermediate
    return _held(memory)


def _dtype_of(setting: str) -> str:
    """What `auto` stands for in most checkpoints."""
    return "bfloat16" if setting == "auto" else setting


def _held(memory: Mapping[str, int]) -> dict[str, int]:
    return {name: int(size) for name, size in memory.items() if size}


def _weight_bytes(shapes: Shapes, dtype: str, quantization: Quantization | None) -> int:
    size = _BYTES.get(dtype, 4)
    if quantization is None:
        return shapes.parameters * size
    # bitsandbytes: a float32 scale for each 64 weights, or 8 bits for it and a float32 for each 256 scales.
    scales = {8: 0.0, 4: (8 + 32 / 256) / 64 if quantization.double else 32 / 64}[quantization.bits]
    outside = shapes.parameters - shapes.layer_parameters
    return round(shapes.layer_parameters * (quantization.bits + scales) / 8) + outside * size


def _state_bytes(optimizer: str, size: int) -> float:
    """Bytes of an optimizer's states for each trained parameter of `size` bytes."""
    if "8bit" in optimizer:
        return 1 if "lion" in optimizer or "rmsprop" in optimizer else 2
    if optimizer.startswith(("sgd", "adafactor")):
        # Adafactor's rows and columns are next to nothing.
        return 0
    if optimizer.startswith(("adagrad", "rmsprop", "lion")) or "lion" in optimizer:
        return size
    return 2 * size


def _chunk_bytes(shapes: Shapes, scored: int, size: int, hardware: Hardware, *, buffers: int) -> int:
    """Bytes of the head's chunk: the product in its own dtype, and `buffers` tensors of its size in float32."""
    rows = positions_of_chunk(scored, shapes.vocabulary, on_gpu=hardware.is_gpu)
    return int(rows * shapes.vocabulary * ((size if size == 2 else 0) + 4 * buffers))


def _is_checkpointed(settings: Mapping[str, Any]) -> bool:
    of_fsdp = settings.get("fsdp_config")
    inside = isinstance(of_fsdp, Mapping) and of_fsdp.get("activation_checkpointing")
    return bool(settings.get("gradient_checkpointing") or settings.get("activation_checkpointing") or inside)


def _context_of(lengths: Lengths) -> float:
    """Tokens that a token of the mean pair sees: half of its own sequence's part, and all of the prompt before it."""
    if not lengths.pairs:
        return 0.0
    p, c, r = (n / lengths.pairs for n in (lengths.prompt_tokens, lengths.chosen_tokens, lengths.rejected_tokens))
    seen = p * p / 2 + c * (p + c / 2) + r * (p + r / 2)
    return seen / max(1.0, p + c + r)


def _epochs(settings: Mapping[str, Any]) -> float:
    return float(settings.get("num_train_epochs", 3.0))


def _max_steps(settings: Mapping[str, Any]) -> int:
    """`train.max_steps`, 0 where it is left out."""
    return max(0, int(settings.get("max_steps", -1)))


def _steps_per_epoch(settings: Mapping[str, Any], pairs: int, processes: int) -> int:
    in_step = int(settings.get("per_device_train_batch_size", 8)) * int(settings.get("gradient_accumulation_steps", 1))
    return max(1, math.ceil(pairs / (in_step * processes)))


def _steps(settings: Mapping[str, Any], per_epoch: int) -> int:
    return _max_steps(settings) or math.ceil(per_epoch * _epochs(settings))


def _due_steps(settings: Mapping[str, Any], strategy: str, every: float, steps: int, per_epoch: int) -> set[int]:
    """The steps at which something is done that is due at steps or at epochs; the last one is among them."""
    strategy = str(getattr(settings.get(strategy), "value", settings.get(strategy)))
    if strategy == "steps":
        period = max(1, math.ceil(every * steps) if every < 1 else int(every))
    elif strategy in ("epoch", "best"):
        period = per_epoch
    else:
        return set()
    return {*range(period, steps, period), steps}


def _evaluated_steps(settings: Mapping[str, Any], steps: int, per_epoch: int) -> set[int]:
    """The steps at which held-out sets are evaluated: the last one always, for the model card."""
    every = settings.get("eval_steps") or settings.get("logging_steps", 10)
    due = _due_steps(settings, "eval_strategy", float(every), steps, per_epoch)
    delay = float(settings.get("eval_delay") or 0)
    if settings.get("eval_strategy") == "epoch":
        delay *= per_epoch
    return {step for step in due if step >= delay} | {steps} | ({0} if settings.get("eval_on_start") else set())


def _passes_of_windows(size: int, settings: Mapping[str, Any], pairs: int) -> tuple[float, float]:
    """How often stage one scores the training pairs, and the held-out ones, in all windows of `size` steps together.

    A window scores each pair that it trains on once, and held-out pairs where it evaluates.
    """
    per_epoch = _steps_per_epoch(settings, pairs, 1)
    steps = _steps(settings, per_epoch)
    whole, rest = divmod(steps, size)
    trained = whole * min(1.0, size / per_epoch) + min(1.0, rest / per_epoch)
    return trained, float(len({step // size for step in _evaluated_steps(settings, steps, per_epoch)}))


def _references_at_once(size: int, steps: int, saved_every: int, limit: int | None, *, evaluates: bool) -> int:
    """How many moved references are on the disk together, at most: those that a kept checkpoint may go on from.

    Args:
        size: Steps of a window.
        steps: Of the run.
        saved_every: Steps between checkpoints; at a window's end there is one too.
        limit: Checkpoints that are kept; None: all.
        evaluates: Whether held-out sets are evaluated, and so on a reference that moves at the very end.
    """
    made = steps // size if evaluates else max(0, steps - 1) // size
    # The oldest one's reference, those since, and the next one, which is written before the oldest is deleted.
    kept = made if limit is None else min(made, math.ceil((limit - 1) * min(saved_every, size) / size) + 2)
    # The first move writes the first reference beside it, plain and in float32.
    return max(2, kept) if made else 0


def _seconds(
    flops: float, hardware: Hardware, measured: float | None, *, sixteen: bool
) -> tuple[float, float, float] | None:
    if measured:
        speeds = [measured * share for share in _MEASURED_BAND]
    else:
        peak = hardware.tflops_16bit if sixteen else hardware.tflops_32bit
        if peak is None:
            return None
        speeds = [1e12 * peak * share for share in UTILISATION]
    worst, about, best = (flops / (speed * hardware.count) for speed in speeds)
    return best, about, worst


def _disk(
    config: Config,
    settings: Mapping[str, Any],
    shapes: Shapes,
    lengths: Lengths,
    held_out: Lengths | None,
    train: StageEstimate | None,
    processes: int,
) -> dict[str, int]:
    sets = [lengths, held_out] if held_out else [lengths]
    # Of a pair: key, row, three lengths, two sums; then float32 token logps, which hardly compress. Of a part: footer.
    per_pair, per_token = 44, 4 if config.precompute.token_logps else 0
    shards = sum(
        s.pairs * per_pair + per_token * s.completion_tokens + 8192 * -(-s.pairs // config.precompute.rows_per_shard)
        for s in sets
    )
    disk = {"shards": shards}
    if train is None:
        return disk
    size = 4 if shapes.has_adapter or config.policy.dtype == "float32" else 2
    policy = shapes.trained_parameters * size
    states = round(shapes.trained_parameters * _state_bytes(str(settings.get("optim", "adamw")), size))
    per_epoch = _steps_per_epoch(settings, lengths.pairs, processes)
    every = float(settings.get("save_steps", 500))
    saved = _due_steps({"save_strategy": "steps", **settings}, "save_strategy", every, train.steps, per_epoch)
    sync = config.reference.sync
    if sync is not None:
        # A window ends in a checkpoint, from which the reference moves.
        saved |= {*range(sync.steps, train.steps, sync.steps), train.steps}
    saves = len(saved)
    # One more than are kept is there while the newest is written.
    if limit := settings.get("save_total_limit"):
        saves = min(saves, int(limit) + 1)
    ids = sum(4 * (s.prompt_tokens + s.completion_tokens) for s in sets)
    logps = sum(per_token * s.completion_tokens + 44 * s.pairs for s in sets)
    disk |= {
        "joined set, while training": ids + logps,
        "checkpoints": saves * (policy + states),
        "policy": policy,
    }
    if sync is not None:
        between = min(saved, default=sync.steps)
        references = _references_at_once(
            sync.steps, train.steps, between, int(limit) if limit else None, evaluates=held_out is not None
        )
        if references and shapes.has_adapter:
            # The policy, merged, while the two are mixed.
            references += 1
        disk["moved references"] = references * 4 * shapes.parameters
    return disk
