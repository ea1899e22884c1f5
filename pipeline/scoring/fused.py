"""The head in one fused kernel, from the Liger library, on GPUs where it is installed and measures faster.

Liger's kernel goes over each chunk of logits once, where plain operations go over it several times. Which is faster
depends on the GPU, the dtype and the vocabulary, so the first batch is scored by both and timed.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "liger_logps",
    "liger_pays",
]

# Nats that the two may differ by: both take the same products, and sum in float32.
_AGREEMENT = 1e-3


_measured: dict[Any, bool] = {}


def liger_logps(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Log-probs of each position's target by Liger's fused linear cross-entropy (arXiv 2410.10989): [N] float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    losses: torch.Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, targets, bias=bias, reduction="none", softcap=softcap
    )
    return losses.neg_()


def liger_pays(
    hidden: torch.Tensor, weight: torch.Tensor, plain: Callable[[], torch.Tensor], fused: Callable[[], torch.Tensor]
) -> bool:
    """Whether the fused kernel gives the same numbers in less time, measured once for each device, dtype and shape.

    Args:
        hidden: What is scored, [N, hidden].
        weight: The head's, [vocabulary, hidden].
        plain: Scores it chunk by chunk.
        fused: Scores it with Liger.
    """
    if hidden.device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    name = (hidden.device, hidden.dtype, tuple(weight.shape))
    if name not in _measured:
        _measured[name] = _agrees_and_is_faster(plain, fused)
    return _measured[name]


def _agrees_and_is_faster(plain: Callable[[], torch.Tensor], fused: Callable[[], torch.Tensor]) -> bool:
    try:
        gap = (fused() - plain()).abs().max()
    except Exception:
        # A kernel that does not compile for this GPU, or an interface that has changed: the plain way always works.
        return False
    return bool(gap <= _AGREEMENT) and _seconds(fused) < _seconds(plain)


def _seconds(score: Callable[[], torch.Tensor]) -> float:
    """The shorter of two runs; fetching one number waits for the GPU."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        score().sum().item()
        times.append(time.perf_counter() - start)
    return min(times)
