"""Name the precision that policy and reference compute in: the dtype of the weights, and that of autocast."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.files import read_json
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel

__all__ = ["Precision", "policy_precision", "recorded_precision", "reference_precision", "resolve_dtype"]

_SIGNIFICAND_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes that decide how a model's log-probs are rounded."""

    weights: str
    """Dtype of the weights, and of everything that autocast leaves alone"""
    autocast: str | None = None
    """Dtype of the products under autocast; None without it"""

    @property
    def products(self) -> str:
        """Dtype that products of matrices run in."""
        return self.autocast or self.weights

    @property
    def bits(self) -> int:
        """Number of significand bits of the products, 24 if the dtype is unknown."""
        return _SIGNIFICAND_BITS.get(self.products, 24)

    def __str__(self) -> str:
        return self.weights if self.autocast is None else f"{self.weights} under {self.autocast} autocast"


def policy_precision(config: Config) -> Precision:
    """Give the precision that the policy trains in. Fetches no weights."""
    dtype = config.policy.dtype
    if dtype == "auto":
        folder = NamedModel.policy(config).folder(weights=False)
        weights = resolve_dtype(dtype, read_json(folder / "config.json"))
    else:
        weights = dtype
    return Precision(weights=weights, autocast=config.train.autocast)


def reference_precision(config: Config) -> Precision:
    """Give the precision that the reference is scored in: the policy's, unless the settings name another.

    So does TRL, also for a reference that is another model. Fetches no weights.
    """
    named = config.reference
    if named.dtype != "auto":
        return Precision(weights=named.dtype, autocast=named.autocast)
    policy = policy_precision(config)
    return Precision(weights=policy.weights, autocast=named.autocast or policy.autocast)


def recorded_precision(reference: Mapping[str, Any]) -> Precision:
    """Give the precision of a store's reference, as its manifest has it; float32 if it is not known."""
    return Precision(weights=str(reference.get("dtype", "float32")), autocast=reference.get("autocast"))


def resolve_dtype(dtype: str, model_config: Mapping[str, Any]) -> str:
    """Name the dtype that `auto` means for a model's own weights: the one in its config.json, else float32."""
    if dtype != "auto":
        return dtype
    named = model_config.get("dtype") or model_config.get("torch_dtype") or "float32"
    return str(named).removeprefix("torch.")
