"""Warn of a 16-bit policy whose steps are smaller than the spacing of its weights, and so are rounded away."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

__all__ = ["SpacingWatch"]

_SAMPLE = 4096
"""Number of elements to look at in each weight, evenly spaced"""
_FEWEST = 0.5
"""Share of the weights with a gradient that must move"""


class SpacingWatch(transformers.TrainerCallback):
    """Compares 16-bit weights before and after one optimizer step, the first near the full learning rate.

    A bfloat16 number near 0.02 has neighbours 1e-4 apart. A step that is less than half of that leaves it as it was,
    however many such steps follow. Autocast trains float32 weights, and an adapter is float32 on 16-bit weights.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before: list[torch.Tensor] | None = None
        self._is_done = False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        # A warm-up begins with steps that are meant to be small.
        if not self._is_done and optimizer.param_groups[0]["lr"] >= 0.5 * args.learning_rate:
            self._before = [weight.clone() for weight, _ in _samples(model)]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._before is None:
            return
        moved = total = 0
        for before, (weight, has_gradient) in zip(self._before, _samples(model), strict=True):
            moved += int((weight[has_gradient] != before[has_gradient]).sum())
            total += int(has_gradient.sum())
        self._before, self._is_done = None, True
        if total and moved < _FEWEST * total:
            name = next(str(p.dtype) for p in model.parameters() if _is_narrow(p)).removeprefix("torch.")
            self._say(
                f"warning: step {state.global_step + 1} moved {moved / total:.1%} of the policy's weights: at "
                f"train.learning_rate {args.learning_rate:g}, most steps are smaller than the spacing of {name} "
                "numbers and are rounded away. Set policy.dtype: float32, with train.bf16: true for speed"
            )


def _samples(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield some elements of each trained 16-bit weight that has a gradient, and where that is not 0, both [N]."""
    for parameter in model.parameters():
        # DeepSpeed keeps the gradients, and float32 copies of the weights, elsewhere.
        if _is_narrow(parameter) and parameter.grad is not None:
            weight, gradient = (
                (part.to_local() if isinstance(part, DTensor) else part).detach().flatten()
                for part in (parameter, parameter.grad)
            )
            step = max(1, len(weight) // _SAMPLE)
            yield weight[::step], gradient[::step] != 0


def _is_narrow(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
