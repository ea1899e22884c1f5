"""Versions of the libraries that compute; recorded with every result, never compared."""

import functools
import platform
from importlib import metadata

__all__ = ["library_versions", "version_of"]


def library_versions() -> dict[str, str]:
    """Return the versions of Python, refshard and the libraries that numbers depend on, without importing them."""
    names = ("refshard", "torch", "transformers", "peft", "pyarrow", "tokenizers")
    return {"python": platform.python_version(), **{name: version_of(name) or "unknown" for name in names}}


@functools.cache
def version_of(name: str) -> str | None:
    """Return the version of an installed package, without importing it; None if it is not installed.

    Read once in a process: what it has imported stays, whatever is installed meanwhile.
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
