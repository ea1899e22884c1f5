"""How many tokens of a batch fit the device's memory, and what to do when they did not."""

import gc
from typing import Any

import torch

from pipeline.packing import make_batch
from pipeline.scoring import score
from pipeline.tokens import TokenizedPair

__all__ = ["free_memory", "is_out_of_memory", "tokens_that_fit"]

# More tokens at once make a CPU slower, whose caches they leave; a fixed number makes every run the same to the bit.
_ON_CPU = 2048
_FEWEST, _MOST = 2048, 65536
# Of what is free; the rest is for fragments, and for what grows faster than the probe shows.
_SHARE = 0.7


def tokens_that_fit(model: Any, packed: bool) -> int:
    """Choose the tokens of one forward pass, a power of two, by what two probes of the model take.

    On a CPU it is a constant.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return _ON_CPU
    small, large = (_peak(model, packed, tokens, device) for tokens in (_FEWEST // 2, _FEWEST))
    per_token = max((large - small) / (_FEWEST // 2), 1.0)
    free_memory()
    free = torch.cuda.mem_get_info(device)[0]
    tokens = int(_SHARE * free / per_token)
    return max(_FEWEST, min(_MOST, 1 << (tokens.bit_length() - 1)))


def _peak(model: Any, packed: bool, tokens: int, device: torch.device) -> int:
    """Bytes that scoring one batch of so many tokens takes at most, weights included."""
    quarter = tokens // 4
    # Of two prompts: equal pairs would be packed into one group.
    pairs = [TokenizedPair(prompt_ids=[i], chosen_ids=[2] * quarter, rejected_ids=[3] * quarter) for i in (1, 4)]
    batch = make_batch(pairs, 0, packed=packed).to(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        score(model, batch, statistics=False)
    return int(torch.cuda.max_memory_allocated(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU has a class for it, a CPU only words."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def free_memory() -> None:
    """Give back what is held for reuse, so that smaller pieces can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
