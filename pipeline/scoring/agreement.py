"""Bound the difference between two scorings of the same pairs: rounding, and the noise floor of a store."""

from dataclasses import dataclass

__all__ = ["ROUNDING", "NoiseFloor", "allowed_gap"]

_FLOORS = 4.0
"""How many times the noise floor is allowed: training batches differ more from stage one's than its own did."""


ROUNDING = {
    "float64": (1e-4, 5e-3),
    "float32": (1e-4, 5e-3),
    "float16": (2e-2, 5e-1),
    "bfloat16": (1e-1, 3.0),
    # LLM.int8() rounds activations, and which of them it leaves alone depends on the batch.
    "int8": (1e-1, 3.0),
}
"""Mean and largest difference, nats a token, that rounding alone may make between two ways of computing in a dtype:
pure bf16 weights against float32 weights under autocast, for one."""


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """How far token logps move when the same pairs are scored in other company: model, dtype and kernel's own noise."""

    tokens: int = 0
    """Tokens that were scored twice"""
    mean: float = 0.0
    """Mean absolute difference, nats"""
    largest: float = 0.0
    """Largest absolute difference, nats"""

    def __add__(self, other: "NoiseFloor") -> "NoiseFloor":
        tokens = self.tokens + other.tokens
        total = self.mean * self.tokens + other.mean * other.tokens
        return NoiseFloor(
            tokens=tokens, mean=total / tokens if tokens else 0.0, largest=max(self.largest, other.largest)
        )


def allowed_gap(noise: NoiseFloor, dtype: str) -> tuple[float, float]:
    """Mean and largest difference, nats a token, that two scorings of one pair by one model may have.

    Args:
        noise: The noise floor that stage one measured.
        dtype: Of the model's weights; `int8` where they are in 8 bits.
    """
    mean, largest = ROUNDING[dtype]
    return mean + _FLOORS * noise.mean, largest + _FLOORS * noise.largest
