"""Measure the operations per second that one decoder layer of a model reaches on this machine, in a few seconds.

The layer has the model's shape and random weights, so nothing is loaded. Its speed stands for all layers.
"""

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from pipeline.models.lengths import positions_of
from pipeline.models.parts import backbone_of
from pipeline.models.precision import Precision
from pipeline.scoring.memory import name_of_device
from stages.check.hardware import Hardware
from stages.check.shapes import Shapes, forward_flops, shapes_of

__all__ = ["Probe", "probe_layer", "this_hardware"]

_TOKENS, _TOKENS_ON_GPU = 256, 4096

_SECONDS = 0.5
"""Approximate length of each timing, unless one pass of the layer takes longer."""

_VOCABULARY = 32
"""Vocabulary of the probe's model, whose embedding and head are not timed."""


class Probe(NamedTuple):
    """Operations per second of one layer."""

    forward: float
    training: float
    """Operations per second of forward and backward: of the layer's weights, or with an adapter of its input alone."""


def this_hardware(device: torch.device) -> Hardware:
    """Describe this machine's device. Only a probe tells its speed."""
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        name, count = name_of_device(device), torch.cuda.device_count()
        return Hardware(name=name, memory=memory, count=count, source="this machine")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    name = f"this CPU with {threads} thread{'s' if threads > 1 else ''}"
    return Hardware(name=name, memory=memory, source="this machine", is_gpu=False)


def probe_layer(
    model_config: Any,
    shapes: Shapes,
    device: torch.device,
    *,
    scoring: Precision,
    training: Precision,
) -> Probe | None:
    """Time a few passes of one layer of a transformers config, in stage one's precision and in training's.

    `shapes` tell if the weights or an adapter are trained. Return None if one layer can't be made alone, or takes more
    than a quarter of the device's memory.
    """
    # Weights and gradients in float32.
    if 8 * shapes.layer_parameters // shapes.layers > this_hardware(device).memory / 4:
        return None
    try:
        model = _one_layer(model_config).to(device)
    except Exception:  # a family with a config of its own may fail in any way
        return None
    tokens = _TOKENS if device.type == "cpu" else _TOKENS_ON_GPU
    tokens = min(tokens, positions_of(model) or tokens)
    ids = torch.arange(tokens, device=device)[None] % _VOCABULARY

    def forward(precision: Precision) -> Any:
        autocast = precision.autocast
        with torch.autocast(device.type, getattr(torch, autocast)) if autocast else nullcontext():
            return backbone_of(model)(input_ids=ids, use_cache=False).last_hidden_state

    def train() -> None:
        forward(training).float().sum().backward()
        model.zero_grad()

    model.requires_grad_(False).eval().to(getattr(torch, scoring.weights))
    with torch.inference_mode():
        forward_seconds = _seconds_of(lambda: forward(scoring))
    model.train().to(getattr(torch, training.weights))
    for name, parameter in model.named_parameters():
        # A trained embedding makes backward compute the gradient of the layer's input.
        parameter.requires_grad_(not shapes.has_adapter or "embed" in name)
    train_seconds = _seconds_of(train)
    flops = forward_flops(shapes_of(model.config), tokens, 0, tokens / 2)
    return Probe(
        forward=flops / forward_seconds,
        training=flops * (2 if shapes.has_adapter else 3) / train_seconds,
    )


def _one_layer(model_config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    alone = copy.deepcopy(model_config)
    alone.num_hidden_layers, alone.vocab_size = 1, _VOCABULARY
    alone.pad_token_id = alone.bos_token_id = alone.eos_token_id = None
    if getattr(alone, "layer_types", None):
        alone.layer_types = alone.layer_types[:1]
    return library.from_config(alone, trust_remote_code=False, dtype=torch.float32)


def _seconds_of(work: Callable[[], object]) -> float:
    """Return the median seconds of a call, which the timer warms up first."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_SECONDS).median
