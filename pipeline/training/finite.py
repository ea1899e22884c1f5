"""Watch that training stays finite: each step's loss, the norm of its gradient, and the trained weights after it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor

from pipeline.base.errors import DataError
from pipeline.run.checkpoints import newest_step
from pipeline.training.processes import largest

__all__ = ["FiniteWatch"]

_PARTS = ("loss", "gradient", "weights")


class FiniteWatch(transformers.TrainerCallback):
    """Ends training at the first step that is not finite in any process, before anything of it is saved.

    With `go_on`, it warns of that step instead; see `weights_are_finite` for its checkpoints. A gradient that
    overflows in float16 is no fault if the loss scale has the optimizer skip the step.
    """

    def __init__(self, run_folder: Path, say: Callable[[str], None], *, go_on: bool = False) -> None:
        self._run_folder = run_folder
        self._say = say
        self._go_on = go_on
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._warned = False
        self.weights_are_finite = True
        """False if a weight is not finite since the last step, in any process"""

    def attach(self, accelerator: Any) -> None:
        """Take note of each gradient norm that the library computes."""
        clip = accelerator.clip_grad_norm_

        def noted(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        accelerator.clip_grad_norm_ = noted
        self._accelerator = accelerator

    def take_loss(self, loss: torch.Tensor) -> None:
        """Take note of a micro-batch's loss."""
        self._losses.append(loss.detach())

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        is_skipped = self._accelerator.optimizer_step_was_skipped
        norm = 0.0 if self._norm is None or is_skipped else float(self._norm)
        loss = float(torch.stack(self._losses).sum()) if self._losses else 0.0
        self._losses, self._norm = [], None
        found = (not math.isfinite(loss), not math.isfinite(norm), not math.isfinite(_largest_weight(model)))
        # One bit a part.
        faults = largest(sum(is_bad << i for i, is_bad in enumerate(found)))
        self.weights_are_finite = faults < 1 << 2
        if not faults or self._warned:
            return
        parts = ", ".join(part for i, part in enumerate(_PARTS) if faults >> i & 1)
        where = f"step {state.global_step} of {state.max_steps}"
        if self._go_on:
            self._warned = True
            self._say(f"warning: training is not finite since {where}: {parts} (train.on_nonfinite: continue)")
            return
        saved = newest_step(self._run_folder)
        kept = f"checkpoint-{saved} is the last finite one" if saved else "no checkpoint was saved before"
        raise DataError(
            f"{self._run_folder}: training must stay finite, got NaN or infinity since {where}: {parts}; {kept}. Lower "
            "train.learning_rate, or set train.on_nonfinite: continue to train on anyway"
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Warn of held-out losses that are not finite: the step is finite, and training goes on."""
        for name, value in (metrics or {}).items():
            if name.endswith("_loss") and not math.isfinite(value):
                self._say(
                    f"warning: {name} is {value} at step {state.global_step}: a held-out pair's loss is not finite. "
                    "This evaluation is never the best one"
                )


def _largest_weight(model: torch.nn.Module) -> float:
    """Give the largest magnitude of the trained weights that this process holds; NaN if one is NaN."""
    held = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Each process holds a share of a weight under FSDP, and under DeepSpeed's ZeRO-3.
            share = getattr(parameter, "ds_tensor", parameter)
            share = share.to_local() if isinstance(share, DTensor) else share
            if share.numel():
                held.append(share.detach())
    return float(torch.nn.utils.get_total_norm(held, norm_type=math.inf)) if held else 0.0
