"""The public face of refshard for scripts and notebooks: run a stage, read a store, add columns to a dataset.

docs/python.md describes every name. Nothing else of this package, of `pipeline` or of `stages` is promised to stay.
"""

import importlib.util
import sys
from pathlib import Path


def _bind_packages() -> None:
    """Import our two packages from where this one lies, whatever folders of their names come before on the path."""
    here = Path(__file__).parent
    # Installed, all three lie side by side; in a clone this one is a folder of `stages`.
    root = next(root for root in (here.parent, here.parents[1]) if (root / "stages" / "cli.py").is_file())
    for name in ("pipeline", "stages"):
        folder = root / name
        if name in sys.modules:
            found = [Path(path) for path in getattr(sys.modules[name], "__path__", [])]
            if not any(path.exists() and path.samefile(folder) for path in found):
                raise ImportError(
                    f"refshard: its package {name} must be the one in {root}, got another one, imported before from "
                    f"{found[0] if found else getattr(sys.modules[name], '__file__', 'memory')}. Rename that one, or "
                    "start refshard in a process of its own"
                )
            continue
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_bind_packages()

from pipeline.base.errors import (  # noqa: E402
    ConfigError,
    DataError,
    FencedError,
    IdentityError,
    RefshardError,
    StorageError,
    UnfinishedError,
)

from .running import precompute, train  # noqa: E402
from .stores import Store, open_store, reference_columns  # noqa: E402

__all__ = [
    "ConfigError",
    "DataError",
    "FencedError",
    "IdentityError",
    "RefshardError",
    "StorageError",
    "Store",
    "UnfinishedError",
    "open_store",
    "precompute",
    "reference_columns",
    "train",
]
