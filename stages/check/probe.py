"""Operations per second that one decoder layer of a model reaches on this machine, timed for a few seconds.

The layer has the model's shape and random weights, so nothing is loaded; its speed stands for all of them.
"""

import copy
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.scoring.memory import name_of_device
from stages.check.estimate import Shapes, forward_flops, shapes_of
from stages.check.hardware import Hardware

__all__ = [
    "Probe",
    "probe_layer",
    "this_hardware",
]

_TOKENS = 256


_TOKENS_ON_GPU = 4096


_SECONDS = 0.5
"""Of each timing, about, but for a layer that takes longer"""


_VOCABULARY = 32
"""Of the probe's model, whose embedding and head are not what is timed"""


@dataclass(frozen=True)
class Probe:
    """What one layer reached, in operations per second."""

    forward: float
    training: float
    """Forward and backward, of the layer's weights or, with an adapter, of its input alone"""
    device: str
    seconds: float
    """That the probe took"""


def this_hardware(device: torch.device) -> Hardware:
    """Describe this machine's device; of its speed nothing is known but what a probe finds."""
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory)
        return Hardware(
            name=name_of_device(device), memory=memory, count=torch.cuda.device_count(), source="this machine"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        name=f"this CPU, threads: {torch.get_num_threads()}", memory=memory, source="this machine", is_gpu=False
    )


def probe_layer(
    settings: Any, shapes: Shapes, device: torch.device, *, scoring: str, training: str, autocast: torch.dtype | None
) -> Probe | None:
    """Time a few passes of one layer.

    Args:
        settings: The model's transformers config, of its text model.
        shapes: Its shapes, and whether its weights or an adapter are trained.
        device: Where.
        scoring: Dtype of stage one's weights.
        training: Dtype of the policy's weights.
        autocast: The 16-bit dtype that training's products run in, if it is not that of the weights.

    Returns:
        None where a layer of the model can't be made alone, or takes more than a quarter of the device's memory.
    """
    began = time.perf_counter()
    one_layer = shapes.layer_parameters // shapes.layers
    # Weights and gradients.
    if 8 * one_layer > this_hardware(device).memory / 4:
        return None
    try:
        model = _one_layer(settings).to(device)
    except Exception:  # a family with a config of its own; there is no telling how it fails
        return None
    tokens = _TOKENS if device.type == "cpu" else _TOKENS_ON_GPU
    ids = torch.arange(tokens, device=device)[None] % _VOCABULARY

    def forward() -> Any:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def train() -> None:
        with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
            hidden = forward()
        hidden.float().sum().backward()
        model.zero_grad()

    model.eval().to(getattr(torch, scoring))
    with torch.inference_mode():
        forward_seconds = _time(forward, device)
    model.train().to(getattr(torch, training))
    for name, parameter in model.named_parameters():
        # The embedding's gradient has the layer's input made one.
        parameter.requires_grad_(not shapes.has_adapter or "embed" in name)
    train_seconds = _time(train, device)
    alone = shapes_of(model.config)
    flops = forward_flops(alone, tokens, 0, tokens / 2)
    return Probe(
        forward=flops / forward_seconds,
        training=flops * (2 if shapes.has_adapter else 3) / train_seconds,
        device=name_of_device(device),
        seconds=time.perf_counter() - began,
    )


def _one_layer(settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    alone = copy.deepcopy(settings)
    alone.num_hidden_layers, alone.vocab_size = 1, _VOCABULARY
    alone.pad_token_id = alone.bos_token_id = alone.eos_token_id = None
    if getattr(alone, "layer_types", None):
        alone.layer_types = alone.layer_types[:1]
    return library.from_config(alone, trust_remote_code=False, dtype=torch.float32)


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of some, after one to warm up."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    once()
    taken = [once()]
    while sum(taken) < _SECONDS and len(taken) < 20:
        taken.append(once())
    return sorted(taken)[len(taken) // 2]
