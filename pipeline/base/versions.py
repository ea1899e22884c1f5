"""The versions of what computes: recorded beside every result, compared with nothing."""

import platform
from importlib import metadata

__all__ = ["library_versions"]


def library_versions() -> dict[str, str]:
    """Versions of Python, refshard and the libraries that numbers can depend on, without importing them."""
    names = ("torch", "transformers", "peft", "pyarrow", "tokenizers")
    return {
        "python": platform.python_version(),
        "refshard": _version("refshard"),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
