"""The DPO objective: pure functions of logps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["PairLogps", "PairLoss", "dpo_loss"]


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs of P pairs under one model, in nats."""

    chosen: torch.Tensor
    """[P] float32"""
    rejected: torch.Tensor
    """[P] float32"""


@dataclass(frozen=True)
class PairLoss:
    """Loss and rewards of P pairs, not averaged."""

    losses: torch.Tensor
    """[P] float32, carries the gradient"""
    chosen_rewards: torch.Tensor
    """[P] float32, detached"""
    rejected_rewards: torch.Tensor
    """[P] float32, detached"""


def dpo_loss(policy: PairLogps, ref: PairLogps, *, beta: float) -> PairLoss:
    """Score pairs with the DPO objective (arXiv 2305.18290, eq. 7): -log sigmoid(margin).

    A reward is beta times the log-ratio (policy minus reference); the margin is the chosen reward minus the
    rejected one. A policy equal to its reference has every margin at 0 and every loss at ln 2: the number to look
    for at step 0.

    Args:
        policy: Logps under the model in training. Carries the gradient.
        ref: The same pairs, in the same order, under the frozen reference.
        beta: Pull toward the reference, per nat. Positive.

    Returns:
        Loss and rewards per pair. Averaging is left to the caller, who knows how many pairs the other ranks hold.
    """
    chosen_ratio = policy.chosen - ref.chosen
    rejected_ratio = policy.rejected - ref.rejected
    return PairLoss(
        losses=-F.logsigmoid(beta * (chosen_ratio - rejected_ratio)),
        chosen_rewards=beta * chosen_ratio.detach(),
        rejected_rewards=beta * rejected_ratio.detach(),
    )
