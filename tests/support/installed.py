"""The three packages as a wheel installs them, and a working folder whose own packages have two of their names."""

import os
from pathlib import Path

from support.processes import ROOT

__all__ = ["as_installed", "folder_of_others"]


def as_installed(folder: Path) -> dict[str, str]:
    """Lay the packages side by side in a new folder; give the environment in which Python finds them there."""
    folder.mkdir()
    for name, place in {"pipeline": "pipeline", "stages": "stages", "refshard": "stages/refshard"}.items():
        (folder / name).symlink_to(ROOT / place)
    return {**os.environ, "PYTHONPATH": str(folder)}


def folder_of_others(folder: Path) -> Path:
    """Make a folder with packages `pipeline` and `stages` that are not ours, and end whoever imports them."""
    for name in ("pipeline", "stages"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f'raise SystemExit("{name} of the working folder was imported")\n')
    return folder
