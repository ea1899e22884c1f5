"""Compare two scorings of the same pairs: rounding, and the noise floor of a store."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "ROUNDING",
    "Agreement",
    "NoiseFloor",
    "allowed_gap",
    "compare",
    "completion_gap",
    "distance_from_start",
    "token_noise",
]

_FLOORS = 4.0
"""Multiple of the noise floor that is allowed: training batches differ more from stage one's than those did"""

ROUNDING = {
    "float64": (1e-4, 5e-3),
    "float32": (1e-4, 5e-3),
    "float16": (2e-2, 5e-1),
    "bfloat16": (1e-1, 3.0),
    # LLM.int8() rounds activations except some columns, and the batch decides on those.
    "int8": (1e-1, 3.0),
}
"""Mean and largest difference, nats a token, that rounding may make between two ways of computing in a dtype, such as
pure bf16 weights and float32 weights under autocast"""


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """Noise of model, dtype and kernel: how far token logps move if the same pairs are scored in another batch."""

    tokens: int = 0
    """Number of tokens that were scored twice"""
    mean: float = 0.0
    """Mean absolute difference, nats"""
    largest: float = 0.0
    """Largest absolute difference, nats"""

    @classmethod
    def of(cls, gaps: Sequence[npt.NDArray[np.float64]]) -> "NoiseFloor":
        """Measure the differences of all completions; those that are not finite are left out."""
        flat = np.abs(np.concatenate([np.empty(0), *gaps]))
        flat = flat[np.isfinite(flat)]
        return cls(tokens=len(flat), mean=float(flat.mean()), largest=float(flat.max())) if len(flat) else cls()

    def __add__(self, other: "NoiseFloor") -> "NoiseFloor":
        tokens = self.tokens + other.tokens
        total = self.mean * self.tokens + other.mean * other.tokens
        return NoiseFloor(
            tokens=tokens, mean=total / tokens if tokens else 0.0, largest=max(self.largest, other.largest)
        )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Difference between two scorings of the same completions, nats a token."""

    mean: float
    """Mean absolute difference"""
    largest: float
    """Largest absolute difference"""
    allowed: tuple[float, float]
    """Largest mean and largest single difference that pass"""

    @property
    def agrees(self) -> bool:
        """Return True if both are within what is allowed; NaN is not."""
        return self.mean <= self.allowed[0] and self.largest <= self.allowed[1]

    def __str__(self) -> str:
        return (
            f"token log-probs differ by {self.mean:.2g} nats on average, by {self.largest:.2g} at most "
            f"(allowed {self.allowed[0]:.2g} and {self.allowed[1]:.2g})"
        )


def completion_gap(logps: Any, stored_logps: Any, stored_sum: float) -> npt.NDArray[np.float64]:
    """Subtract a completion's stored token logps from its token logps, [tokens] nats.

    If only their sum is stored and `stored_logps` is None, give the sum's difference divided by the tokens, [1].
    """
    found = np.asarray(logps, dtype=np.float64)
    if stored_logps is None:
        return np.array([(found.sum() - stored_sum) / len(found)])
    return found - np.asarray(stored_logps, dtype=np.float64)


def compare(gaps: Sequence[npt.NDArray[np.float64]], allowed: tuple[float, float]) -> Agreement:
    """Judge the differences of all completions by what is allowed, from `allowed_gap`."""
    flat = np.abs(np.concatenate(gaps))
    return Agreement(mean=float(flat.mean()), largest=float(flat.max()), allowed=allowed)


def allowed_gap(noise: NoiseFloor, dtype: str, *, in_8_bits: bool = False) -> tuple[float, float]:
    """Give the mean and the largest difference, nats a token, that two scorings of one pair by one model may have.

    `noise` is the floor that stage one measured, `dtype` that of the model's weights.
    """
    mean, largest = ROUNDING["int8" if in_8_bits else dtype]
    return mean + _FLOORS * noise.mean, largest + _FLOORS * noise.largest


def token_noise(dtype: str) -> float:
    """Give the usual distance of a token logp in a dtype from that in float32, root mean square, nats."""
    return {"bfloat16": 0.05, "float16": 0.006}.get(dtype, 1e-5)


def distance_from_start(margins: Sequence[float], beta: float) -> str:
    """Say how far from 0 and ln 2 the first rewards and loss are, by policy minus reference margins of pairs, nats."""
    rewards = beta * np.asarray(margins, dtype=np.float64)
    loss = float(np.logaddexp(0, -rewards).mean())
    return (
        f"on {len(rewards)} pairs, rewards/margins begin {float(np.sqrt((rewards**2).mean())):.2g} away from 0 (root "
        f"mean square), and the sigmoid loss at {loss:.4f}, where equal models have 0 and ln 2, 0.6931"
    )
