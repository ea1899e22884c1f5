"""Tokens of a batch that fit the device's memory; detection and cleanup if memory runs out."""

import gc
import resource
import sys
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.data.tokens import TokenizedPair
from pipeline.models.lengths import positions_of
from pipeline.scoring.forward import LOGPS, input_device, score
from pipeline.scoring.packing import Reading, make_batch

__all__ = ["free_memory", "name_of_device", "peak_memory", "tokens_for", "tokens_that_fit"]

# More tokens at once leave a CPU's caches and are slower. A constant makes every run the same to the bit.
_ON_CPU = 2048
_FEWEST, _MOST = 2048, 65536

# Share of the free memory; the rest is for fragments, and for tensors that grow faster than the probe shows.
_SHARE = 0.7


def tokens_that_fit(model: Any, reading: Reading) -> int:
    """Choose the tokens of one forward pass, a power of two, by the memory that two probes of the model take.

    If a model is spread over several GPUs, the one with the least room decides. On a CPU it is a constant.
    """
    devices = list(dict.fromkeys(p.device for p in model.parameters() if p.device.type == "cuda"))
    if not devices:
        return tokens_for(None, 0)
    small, large = (_peaks(model, reading, tokens, devices) for tokens in (_FEWEST // 2, _FEWEST))
    free_memory()
    return min(
        tokens_for(torch.cuda.mem_get_info(device)[0], (more - less) / (_FEWEST // 2))
        for device, less, more in zip(devices, small, large, strict=True)
    )


def tokens_for(free: float | None, per_token: float) -> int:
    """Choose the tokens of one forward pass for a GPU's free bytes, None for a CPU, and the bytes of a token."""
    if free is None:
        return _ON_CPU
    tokens = min(_MOST, int(_SHARE * free / max(per_token, 1.0)))
    return 1 << (max(_FEWEST, tokens).bit_length() - 1)


def _peaks(model: Any, reading: Reading, tokens: int, devices: Sequence[torch.device]) -> list[int]:
    """Give the peak bytes on each device while one batch of so many tokens is scored, weights included."""
    width = min(tokens // 4, (positions_of(model) or tokens) - 1)
    # Two prompts or more, since equal pairs would be packed into one group.
    prompts = range(tokens // (2 * width))
    pairs = [TokenizedPair(prompt_ids=[i], chosen_ids=[2] * width, rejected_ids=[3] * width) for i in prompts]
    batch = make_batch(pairs, 0, reading).to(input_device(model))
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        score(model, batch, want=LOGPS)
    return [int(torch.cuda.max_memory_allocated(device)) for device in devices]


def free_memory() -> None:
    """Release the memory that is held for reuse."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Give the peak bytes since the process began: on its GPU, or, without one, of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def name_of_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
