"""Choose beta-DPO's beta for each micro-batch, and the pairs that its filter leaves out (arXiv 2407.08639).

Written after the authors' code (junkangwu/beta-DPO, trainers.py). A gap is a pair's log-ratio margin u_c - u_r in nats:
the paper has a difference of rewards, the code leaves beta out of it, and this module follows the code. With the mean M
of the gaps that the filter keeps, and a running mean M_0 of all gaps, beta is loss.beta times 1 + alpha (M - M_0).
Micro-batches are those of all processes together. The loss is a mean over all pairs that are kept; the code averages
the means of the processes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config.loss import LossConfig
from pipeline.training.losses import Pairs

__all__ = ["DynamicBeta"]

_ALPHA, _MOMENTUM, _LEAST = 0.6, 0.9, 1e-3
"""Sensitivity and momentum of the paper, and the authors' lower bound of beta"""


class DynamicBeta:
    """Gives a micro-batch its beta, and its filtered pairs a weight of 0.

    Args:
        loss: The `loss` section.
        seed: Seed of the filter.
    """

    def __init__(self, loss: LossConfig, seed: int) -> None:
        self._beta, self._seed = loss.beta, seed
        self._alpha = _ALPHA if loss.beta_dpo_alpha is None else loss.beta_dpo_alpha
        self._filter = loss.beta_dpo_filter or 0.0

    def apply(
        self, pairs: Pairs, state: dict[str, Any], gather: Callable[[torch.Tensor], torch.Tensor], rank: int
    ) -> Pairs:
        """Give the pairs of this process with their beta, after the running means have taken the micro-batch.

        Args:
            pairs: P pairs of this process.
            state: Running mean and deviation of gaps, and the number of micro-batches; changed. Checkpoints hold it.
            gather: Concatenates the processes' tensors, [P] each, by rank.
            rank: Number of this process.
        """
        own = (pairs.chosen_ratios - pairs.rejected_ratios).detach()
        gaps = gather(own).double().cpu()
        mean = self._take(gaps, state)
        kept = self._draw(gaps, state)
        beta = max(self._beta * (1 + self._alpha * (float(gaps[kept].mean()) - mean)), _LEAST)
        changes: dict[str, Any] = {"betas": torch.full_like(own, beta)}
        if self._filter:
            weights = torch.zeros_like(gaps)
            weights[kept] = 1.0
            changes["weights"] = weights[rank * len(own) : (rank + 1) * len(own)].to(own)
            # The mean over the processes is then the mean over all pairs that are kept.
            changes["total_weight"] = len(kept) * len(own) / len(gaps)
        return dataclasses.replace(pairs, **changes)

    def _take(self, gaps: torch.Tensor, state: dict[str, Any]) -> float:
        """Move the running mean and deviation toward the micro-batch's; return the mean."""
        state["batches"] = state.get("batches", 0) + 1
        if not gaps.isfinite().all():
            # With train.on_nonfinite: continue, training goes on, and would do so with NaN for ever.
            return float(state.get("mean", 0.0))
        now = {"mean": float(gaps.mean()), "deviation": float(gaps.std()) if len(gaps) > 1 else 0.0}
        for name, value in now.items():
            state[name] = _MOMENTUM * state.get(name, 0.0) + (1 - _MOMENTUM) * value
        return float(state["mean"])

    def _draw(self, gaps: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        """Draw the pairs to keep, without replacement, by a normal density around the running mean."""
        if not self._filter:
            return torch.arange(len(gaps))
        # The largest of log-weights plus Gumbel noise are such a draw, even where the density itself would be 0.
        generator = torch.Generator().manual_seed(self._seed + int(state["batches"]))
        noise = -torch.log(-torch.log(torch.rand(len(gaps), generator=generator, dtype=torch.float64)))
        distances = (gaps - state.get("mean", 0.0)) / (state.get("deviation") or 1.0)
        count = max(1, int(len(gaps) * (1 - self._filter)))
        return torch.topk(noise - 0.5 * distances**2, count).indices
