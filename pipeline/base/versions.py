"""Versions of the libraries that compute; recorded with every result, never compared."""

import platform
from importlib import metadata

__all__ = ["library_versions"]


def library_versions() -> dict[str, str]:
    """Return the versions of Python, refshard and the libraries that numbers depend on, without importing them."""
    names = ("refshard", "torch", "transformers", "peft", "pyarrow", "tokenizers")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
