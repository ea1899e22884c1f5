"""Flatten nested mappings, such as settings, to one level."""

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten"]


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Give the values of a nested mapping by their path, the keys joined; None is left out."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{separator}{inner}": found for inner, found in flatten(value, separator).items()}
        elif value is not None:
            flat[f"{key}"] = value
    return flat
