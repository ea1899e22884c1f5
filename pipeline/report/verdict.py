"""Say in plain words what training and held-out pairs tell together: learned, generalized, or neither."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.base.statistics import share_positive
from pipeline.replies.means import Mean, estimate
from pipeline.run.reading import MarginRows, Run, part

__all__ = ["verdict_of"]

_ERRORS = 2.0
"""Standard errors from which a difference counts: one in twenty is larger by chance"""


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A set under the policy, from the reward margins of its pairs."""

    accuracy: Mean
    """Share of pairs whose reward margin is above 0"""
    loss: Mean | None
    """Sigmoid loss; None if the run has another one"""

    @property
    def gain(self) -> float:
        """Accuracy above one half, in standard errors of guessing."""
        return (self.accuracy.mean - 0.5) / (0.5 / math.sqrt(self.accuracy.count))

    @property
    def is_worse(self) -> bool:
        """True if it is clearly worse than before training, where accuracy is one half and loss ln 2."""
        rise = 0.0 if self.loss is None else self.loss.mean - math.log(2)
        return self.gain < -_ERRORS or (rise > 0 and rise > _ERRORS * ((self.loss and self.loss.error) or math.inf))

    def __str__(self) -> str:
        return f"accuracy {self.accuracy}" + ("" if self.loss is None else f", loss {self.loss}")


def verdict_of(run: Run) -> list[str]:
    """Give a sentence or more for each held-out set; nothing where no margins were written."""
    loss = run.settings.get("loss") or {}
    is_sigmoid = loss.get("type") in ("sigmoid", ["sigmoid"]) and not loss.get("label_smoothing")
    measured = {name: found for name, rows in run.margins.items() if (found := _measure(rows, with_loss=is_sigmoid))}
    train = measured.pop("train", None)
    if not measured and train is not None and run.finished:
        hint = "" if part(run.settings, "data", "eval") else ": set data.eval to hold some out"
        return [
            f"Training pairs: {train}. No held-out pairs were evaluated, so nothing shows how it generalizes{hint}."
        ]
    texts = []
    for name, held_out in measured.items():
        numbers = f"Held-out pairs {name} ({held_out.accuracy.count:,}): {held_out}."
        if train is not None:
            which = f"Training pairs, the last {train.accuracy.count:,}, each as it was last trained on"
            numbers = f"{which}: {train}. {numbers}"
        texts.append(f"{_judge(train, held_out)} {numbers} Before training, accuracy is 0.5{_ln2(is_sigmoid)}.")
    return texts


def _ln2(is_sigmoid: bool) -> str:
    return f" and loss {math.log(2):.4f}" if is_sigmoid else ""


def _measure(margins: MarginRows, *, with_loss: bool) -> _Measured | None:
    values: npt.NDArray[np.float64] = margins.columns["reward_margin"].astype(np.float64)
    if margins.rows is not None:
        # Over several epochs a pair is there several times. They are no independent measurements; the last one counts.
        values = values[list({int(row): i for i, row in enumerate(margins.rows)}.values())]
    values = values[np.isfinite(values)]
    share = share_positive(values)
    if share is None:
        return None
    error = math.sqrt(share * (1 - share) / len(values))
    losses = np.logaddexp(0.0, -values)
    return _Measured(
        accuracy=Mean(share, error or None, len(values)), loss=estimate(losses.tolist()) if with_loss else None
    )


def _judge(train: _Measured | None, held_out: _Measured) -> str:
    """Put the two together: what was learned, and whether it holds for other pairs."""
    learned = train is not None and train.gain > _ERRORS
    if held_out.is_worse:
        cause = (
            "The policy has overfitted: it has learned the training pairs and is worse" if learned else "It is worse"
        )
        return f"{cause} than the reference on held-out pairs. Try fewer steps, a lower learning rate or more pairs."
    if held_out.gain > _ERRORS:
        text = "The policy prefers the chosen completion on pairs that it was not trained on: it generalizes."
        if train is not None and _gap(train, held_out) > _ERRORS:
            text += " It is clearly better on training pairs, so a part of that is overfitting."
        # A policy far from its reference may prefer the right completions and write broken ones (docs/choosing.md).
        return f"{text} Pairs do not show whether its own replies got better: read them (refshard generate)."
    if learned:
        return (
            "The training pairs are learned, but held-out pairs show no change beyond chance: the policy overfits, or "
            "the held-out pairs are too few to tell."
        )
    if train is None:
        return "Held-out pairs show no change beyond chance."
    return "Neither training nor held-out pairs show a change beyond chance. Train longer, or raise the learning rate."


def _gap(train: _Measured, held_out: _Measured) -> float:
    """Give the difference of the accuracies in standard errors."""
    errors = [0.5 / math.sqrt(one.accuracy.count) for one in (train, held_out)]
    return (train.accuracy.mean - held_out.accuracy.mean) / math.hypot(*errors)
