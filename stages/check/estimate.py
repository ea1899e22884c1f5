"""Estimate memory, time and disk of both stages from a model's config and the tokens of the data alone.

Weights, gradients and optimizer states are exact to the byte, activations are counted by `shapes.activation_bytes`.
Backward takes as many operations again for each gradient that it makes. A config can't tell how much of a device's peak
is reached: it is measured (`probe`) or assumed, and the estimate says which.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.convert import TRUE_WORDS
from pipeline.config.schema import Config
from pipeline.models.files import reference_quantization
from pipeline.models.precision import reference_precision
from pipeline.models.products import dtype_of_products
from pipeline.scoring.head import positions_of_chunk
from pipeline.scoring.memory import tokens_for
from stages.check.hardware import Hardware
from stages.check.probe import Probe
from stages.check.schedule import Schedule
from stages.check.shapes import Shapes, activation_bytes, bytes_of, forward_flops, weight_bytes

__all__ = ["MEMORY_BAND", "UTILISATION", "Estimate", "Lengths", "StageEstimate", "estimate"]

UTILISATION = (0.2, 0.35, 0.5)
"""Assumed share of a GPU's peak: in a bad case, as expected, in a good case. Large transformers are trained at 0.2 to
0.5 (arXiv 2204.02311, table 3); short pairs and small models reach less."""

MEMORY_BAND = (0.8, 1.25)
"""Real memory as a multiple of the estimate; tests/scoring/test_memory.py holds training on a CPU to it."""

# Multiples of a measured speed: one layer in a loop is a little faster than a model among its loaders.
_MEASURED_BAND = (0.6, 0.9, 1.1)

_GPU_CONTEXT = 10**9
"""Bytes that the driver, its kernels and their workspaces take, about."""

_PROGRAM = 520 * 10**6
"""Resident bytes of a process with Python, torch and the imports, before it has a model. Measured on Linux with torch
2.13 for CPUs."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a set of pairs, as they are scored (after truncation)."""

    pairs: int
    prompt_tokens: int
    """Each pair's prompt counted once."""
    chosen_tokens: int
    rejected_tokens: int
    longest_pair: int
    """Tokens of prompt, chosen and rejected together, in the longest pair."""
    usual_pair: int
    """The same at the 95th percentile."""
    shared_tokens: int | None = None
    """Tokens that stage one computes, each prompt of a shard once; None if no prompt repeats."""
    unscored: float = 1.0
    """Share of the set that stage one has still to score."""
    pairs_of_epoch: int | None = None
    """Number of pairs of an epoch, by the sets' fractions; None: all."""
    share_of_epoch: float = 1.0
    """Tokens of an epoch as a multiple of the sets'."""

    @property
    def completion_tokens(self) -> int:
        return self.chosen_tokens + self.rejected_tokens

    @property
    def packed_tokens(self) -> int:
        """Tokens of a forward pass of each pair: its prompt once, and no completion's last token."""
        return self.prompt_tokens + self.completion_tokens - 2 * self.pairs

    @property
    def stage_one_tokens(self) -> int:
        return self.packed_tokens if self.shared_tokens is None else self.shared_tokens

    @property
    def context(self) -> float:
        """Mean number of tokens that a token of the mean pair attends to: those before it in its own sequence."""
        p, c, r = (n / self.pairs for n in (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens))
        return (p * p / 2 + c * (p + c / 2) + r * (p + r / 2)) / (p + c + r)


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Approximate cost of one stage."""

    memory: Mapping[str, int]
    """Bytes of the fullest device by what holds them, each at its own peak."""
    total_memory: int
    """Bytes of the fullest device at the time when all together are most."""
    flops: float
    """Operations of all devices together."""
    seconds: tuple[float, float, float] | None
    """Seconds at best, as expected, at worst; None if the device's speed is unknown."""
    tokens: int
    """Tokens that are computed in all epochs."""
    batch_tokens: int
    """Tokens of the largest forward pass."""
    steps: int = 0
    """Optimizer steps of stage two."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Approximate cost of a run on given hardware."""

    hardware: Hardware
    probe: Probe | None
    """Speed behind all times; None if it is assumed."""
    precompute: StageEstimate
    train: StageEstimate | None
    """None if the settings have no `train` section."""
    disk: Mapping[str, int]
    """Bytes on disk by what they are for."""
    scores: bool = True
    """False for a loss without a reference, which has no first stage"""
    host_memory: int
    """Bytes of the CPU's memory while the policy is loaded, by all processes together."""

    @property
    def stages(self) -> dict[str, StageEstimate]:
        """Both stages by their commands, or the one that there is."""
        return ({"precompute": self.precompute} if self.scores else {}) | (
            {} if self.train is None else {"train": self.train}
        )

    @property
    def total_disk(self) -> int:
        return sum(self.disk.values())


def estimate(
    config: Config,
    shapes: Shapes,
    lengths: Lengths,
    hardware: Hardware,
    *,
    reference: Shapes | None = None,
    held_out: Lengths | None = None,
    probe: Probe | None = None,
) -> Estimate:
    """Estimate what both stages of a run take on given hardware. Reads no file and loads nothing.

    Args:
        config: The run's settings, in which `policy.dtype` names a dtype.
        shapes: Sizes of the policy; and `reference` of the reference, if it is another model.
        lengths: Tokens of the training set; and `held_out` of all held-out sets together.
        hardware: Devices of both stages; one process on one device alternates between them if the reference moves.
        probe: Speed of one device, instead of a share of its peak.
    """
    sync = config.reference.sync
    used = hardware if sync is None else replace(hardware, count=1)
    sets = [lengths] if held_out is None else [lengths, held_out]
    schedule = Schedule(
        options=config.train.options,
        pairs=lengths.pairs if lengths.pairs_of_epoch is None else lengths.pairs_of_epoch,
        processes=used.count,
        window=None if sync is None else sync.steps,
    )
    # Each window scores its pairs anew, whatever a store has.
    passes = [s.unscored for s in sets] if sync is None else schedule.passes_of_windows()
    return Estimate(
        hardware=hardware,
        probe=probe,
        precompute=_stage_one(config, reference or shapes, sets, passes, used, probe and probe.forward),
        train=None if config.train.is_empty else _stage_two(config, shapes, sets, schedule, used, probe),
        scores=config.loss.needs_reference,
        disk=_disk(config, shapes, sets, schedule),
        host_memory=_host_memory(config, shapes, used.count),
    )


def _host_memory(config: Config, shapes: Shapes, processes: int) -> int:
    """Return the bytes of the CPU's memory while the policy is loaded: by each process, or under FSDP by one alone."""
    policy, options = config.policy, config.train.options
    weights = weight_bytes(shapes, policy.dtype, policy.quantization)
    of_fsdp = options.get("fsdp_config")
    once = not isinstance(of_fsdp, Mapping) or of_fsdp.get("cpu_ram_efficient_loading", True)
    each = str(once).lower() not in (*TRUE_WORDS, "1")
    if processes > 1 and options.get("fsdp") and policy.quantization is None and not each:
        mixed = bool(options.get("bf16") or options.get("fp16"))
        widened = shapes.trained_parameters * (4 - bytes_of(policy.dtype)) if mixed and not shapes.has_adapter else 0
        return weights + widened + processes * _PROGRAM
    return processes * (weights + _PROGRAM)


def _stage_one(
    config: Config,
    shapes: Shapes,
    sets: Sequence[Lengths],
    passes: Sequence[float],
    hardware: Hardware,
    measured: float | None,
) -> StageEstimate:
    precision = reference_precision(config)
    size, product = bytes_of(precision.weights), bytes_of(precision.products)
    weights = weight_bytes(shapes, precision.weights, reference_quantization(config))
    outside = shapes.outside_parameters * size
    # Weights of products are held in autocast's dtype.
    saved = 0 if dtype_of_products(config) is None else size - product
    weights, outside = weights - saved * shapes.product_parameters, outside - saved * shapes.head_parameters
    at_work = hardware.count
    if config.precompute.tp_plan:
        # Only layers are split. Each process has the whole embedding and the whole head.
        weights = (weights - outside) // hardware.count + outside
    elif config.precompute.device_map:
        # A batch passes one device's layers after another's.
        weights, at_work = weights // hardware.count, 1
    # Nothing is kept for backward: a layer's input, its norm in float32, and the widest of its tensors.
    per_token = (4 + 2 * size) * shapes.hidden + product * max(3 * shapes.intermediate, 3 * shapes.query)
    own, context = _own_memory(hardware)
    tokens = config.precompute.tokens_per_batch
    if tokens is None:
        tokens = tokens_for(hardware.memory - weights - context, per_token) if hardware.is_gpu else tokens_for(None, 0)
    tokens = min(tokens, sum(s.stage_one_tokens for s in sets))
    tokens = max(tokens, *(s.longest_pair for s in sets))
    scored = min(tokens, sum(s.completion_tokens for s in sets))
    done = list(zip(passes, sets, strict=False))
    flops = sum(share * forward_flops(shapes, s.stage_one_tokens, s.completion_tokens, s.context) for share, s in done)
    memory = {
        "weights": weights,
        "one batch": tokens * per_token,
        "logits of a chunk": _chunk_bytes(shapes, scored, product, hardware, buffers=1),
        own: context,
    }
    if product < size and not (saved and shapes.head_parameters):
        # Autocast makes a copy of one weight at a time; the head's is the largest.
        memory["copies of weights"] = product * shapes.vocabulary * shapes.hidden
    return StageEstimate(
        memory=memory,
        total_memory=sum(memory.values()),
        flops=flops,
        seconds=_seconds(flops, replace(hardware, count=at_work), measured, sixteen=product == 2),
        tokens=round(sum(share * s.stage_one_tokens for share, s in done)),
        batch_tokens=tokens,
    )


def _stage_two(
    config: Config,
    shapes: Shapes,
    sets: Sequence[Lengths],
    schedule: Schedule,
    hardware: Hardware,
    probe: Probe | None,
) -> StageEstimate:
    lengths, *held_out = sets
    tokens = lengths.longest_pair + (schedule.batch_pairs - 1) * lengths.usual_pair
    memory = _training_memory(config, shapes, lengths, hardware, tokens)
    total = sum(memory.values())
    if schedule.batches_per_step == 1:
        # Backward frees a layer's activations while it makes its gradients, so the larger of the two counts.
        total -= min(memory.get("gradients", 0), memory.get("activations", 0))
    # Backward makes gradients of activations and, unless they are frozen, of weights. The head's logits are made again
    # for it, or, if the head is frozen, their gradient is made in the forward pass.
    through_layers = (2 if shapes.has_adapter else 3) + _is_checkpointed(config)
    through_head = 2 if shapes.has_adapter else 4
    flops = (
        schedule.epochs
        * lengths.share_of_epoch
        * (
            through_layers * forward_flops(shapes, lengths.packed_tokens, 0, lengths.context)
            + through_head * forward_flops(shapes, 0, lengths.completion_tokens, 0)
        )
    )
    computed = round(schedule.epochs * lengths.share_of_epoch * lengths.packed_tokens)
    for s in held_out:
        computed += len(schedule.evaluated) * s.packed_tokens
        flops += len(schedule.evaluated) * forward_flops(shapes, s.packed_tokens, s.completion_tokens, s.context)
    sixteen = _has_autocast(config) or bytes_of(config.policy.dtype) == 2
    return StageEstimate(
        memory=memory,
        total_memory=total,
        flops=flops,
        seconds=_seconds(flops, hardware, probe and probe.training, sixteen=sixteen),
        tokens=computed,
        batch_tokens=tokens,
        steps=schedule.steps,
    )


def _training_memory(
    config: Config, shapes: Shapes, lengths: Lengths, hardware: Hardware, tokens: int
) -> dict[str, int]:
    """Return the bytes of one device while it trains on a batch of `tokens`, by what holds them."""
    options = config.train.options
    size = bytes_of(config.policy.dtype)
    autocast, checkpointed, offloaded = _has_autocast(config), _is_checkpointed(config), config.train.activation_offload
    sharded = hardware.count > 1 and bool(options.get("fsdp") or options.get("deepspeed"))
    devices = hardware.count if sharded else 1
    one_layer = shapes.layer_parameters // shapes.layers
    # PEFT keeps an adapter in float32 on 16-bit weights too.
    trained_size = 4 if shapes.has_adapter else size
    trained = shapes.trained_parameters * trained_size
    product = 2 if autocast else size
    per_token = activation_bytes(shapes, config.policy.dtype, autocast=autocast)
    # With checkpointing a layer keeps its input; offloaded activations wait in the CPU's memory.
    of_layer = (4 if autocast else size) * shapes.hidden if checkpointed else per_token
    kept = 0 if offloaded else shapes.layers * of_layer
    # A layer is computed again, or its gradients are made, while all that is kept is still there.
    passing = product * (2 * shapes.hidden + 3 * shapes.intermediate)
    passing += per_token if checkpointed or offloaded else 0
    scored = min(tokens, round(tokens * lengths.completion_tokens / max(1, lengths.packed_tokens)))
    copies = 0
    if sharded:
        # Two whole layers, the current one and the one fetched ahead; and the whole head and embedding.
        copies = product * (2 * one_layer + shapes.outside_parameters)
    elif autocast:
        # A 16-bit copy of each trained weight for the length of a step; of a frozen one until its layer's backward.
        copies = 2 * (one_layer if shapes.has_adapter and checkpointed else shapes.layer_parameters)
    weights = weight_bytes(shapes, config.policy.dtype, config.policy.quantization)
    own, context = _own_memory(hardware)
    memory = {
        "weights": (weights + (trained if shapes.has_adapter else 0)) // devices,
        "copies of weights": copies,
        "gradients": trained // devices,
        "buckets of DDP": trained if hardware.count > 1 and not sharded else 0,
        "optimizer": _state_bytes(shapes, options, trained_size) // devices,
        "activations": tokens * (kept + passing),
        "logits of a chunk": _chunk_bytes(shapes, scored, product, hardware, buffers=3 if product == 2 else 2)
        + 2 * scored * shapes.hidden * 4,
        "gradient of the head": 0 if shapes.has_adapter else shapes.vocabulary * shapes.hidden * 4,
        own: context,
    }
    return {name: held for name, held in memory.items() if held}


def _own_memory(hardware: Hardware) -> tuple[str, int]:
    """Return the name and bytes of what a device holds before there is a model."""
    return ("the device's own", _GPU_CONTEXT) if hardware.is_gpu else ("Python and torch", _PROGRAM)


def _state_bytes(shapes: Shapes, options: Mapping[str, Any], size: int) -> int:
    """Return the bytes of the optimizer's states, for trained parameters of `size` bytes each."""
    optimizer = str(options.get("optim", "adamw"))
    if optimizer.startswith(("sgd", "adafactor")):
        # Adafactor's rows and columns are negligible.
        return 0
    states = 1 if any(name in optimizer for name in ("lion", "rmsprop", "adagrad")) else 2
    return shapes.trained_parameters * (1 if "8bit" in optimizer else size) * states


def _chunk_bytes(shapes: Shapes, scored: int, size: int, hardware: Hardware, *, buffers: int) -> int:
    """Return the bytes of the head's chunk: the product in its own dtype, and `buffers` float32 tensors of its size."""
    rows = positions_of_chunk(scored, shapes.vocabulary, on_gpu=hardware.is_gpu)
    return rows * shapes.vocabulary * ((size if size == 2 else 0) + 4 * buffers)


def _has_autocast(config: Config) -> bool:
    options = config.train.options
    return config.policy.dtype == "float32" and bool(options.get("bf16") or options.get("fp16"))


def _is_checkpointed(config: Config) -> bool:
    options = config.train.options
    of_fsdp = options.get("fsdp_config")
    inside = isinstance(of_fsdp, Mapping) and of_fsdp.get("activation_checkpointing")
    return bool(options.get("gradient_checkpointing") or options.get("activation_checkpointing") or inside)


def _seconds(
    flops: float, hardware: Hardware, measured: float | None, *, sixteen: bool
) -> tuple[float, float, float] | None:
    peak = hardware.tflops_16bit if sixteen else hardware.tflops_32bit
    if measured is None and peak is None:
        return None
    band, speed = (UTILISATION, 1e12 * (peak or 0)) if measured is None else (_MEASURED_BAND, measured)
    worst, about, best = (flops / (speed * share * hardware.count) for share in band)
    return best, about, worst


def _disk(config: Config, shapes: Shapes, sets: Sequence[Lengths], schedule: Schedule) -> dict[str, int]:
    # A pair's key, row, three lengths and two sums; float32 token logps, which hardly compress; a footer a part.
    per_token = 4 if config.precompute.token_logps else 0
    logps = sum(44 * s.pairs + per_token * s.completion_tokens for s in sets)
    shards = logps + sum(8192 * math.ceil(s.pairs / config.precompute.rows_per_shard) for s in sets)
    disk = {"shards": shards} if config.loss.needs_reference else {}
    if config.train.is_empty:
        return disk
    size = 4 if shapes.has_adapter or config.policy.dtype == "float32" else 2
    policy = shapes.trained_parameters * size
    # One checkpoint more than are kept is there while the newest is written.
    saves = min(len(schedule.saved), (schedule.kept_checkpoints or math.inf) + 1)
    disk |= {
        "joined sets": logps + sum(4 * (s.prompt_tokens + s.completion_tokens) for s in sets),
        "checkpoints": int(saves) * (policy + _state_bytes(shapes, schedule.options, size)),
        "policy": policy,
    }
    if schedule.window is not None:
        references = schedule.references_at_once(evaluates=len(sets) > 1 and bool(schedule.evaluated))
        # With an adapter the merged policy is there too while the two are mixed.
        references += 1 if references and shapes.has_adapter else 0
        disk["moved references"] = references * 4 * shapes.parameters
    return disk
