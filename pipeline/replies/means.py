"""Means over replies with their standard errors: rewards, and the KL between policy and reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.replies.records import Generation

__all__ = ["Mean", "estimate", "estimate_kl", "estimate_reward"]


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error."""

    mean: float
    error: float | None
    """Standard error; None for a single value"""
    count: int

    def __str__(self) -> str:
        if not self.error or not math.isfinite(self.error):
            return f"{self.mean:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")
        # Two digits of the error, and no digit of the mean that the error does not allow.
        digits = 1 - math.floor(math.log10(self.error))
        mean, error = round(self.mean, digits) + 0.0, round(self.error, digits)
        return f"{mean:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"


def estimate_kl(generations: Sequence[Generation]) -> Mean:
    """Estimate KL(policy || reference), nats per reply: the mean log-ratio of the policy's replies."""
    return estimate([g.policy.policy_logps - g.policy.ref_logps for g in generations])


def estimate_reward(generations: Sequence[Generation], side: str) -> Mean | None:
    """Average the rewards of one side's replies, `reference` or `policy`; None without rewards."""
    replies = [g.reference if side == "reference" else g.policy for g in generations]
    rewards = [reply.reward for reply in replies if reply.reward is not None]
    return estimate(rewards) if rewards else None


def estimate(values: Sequence[float]) -> Mean:
    """Average one value or more."""
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return Mean(float(np.mean(values)), error, count)
