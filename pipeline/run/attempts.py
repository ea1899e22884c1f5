"""Attempts of stage two on one output folder, numbered: the newest one owns the folder, older ones save no more.

A scheduler that loses sight of a process starts another one, and the first may come back at any time. So each attempt
puts a file with the next number into `attempts/`, and looks there again before each save. The file also records what
the attempt began with.
"""

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import FencedError
from pipeline.base.files import make_folder, put_if_absent
from pipeline.base.versions import library_versions

__all__ = ["ATTEMPT_NAME", "Attempt", "claim_run", "set_aside"]


ATTEMPT_NAME = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class Attempt:
    """One attempt of stage two."""

    run_folder: Path
    number: int

    @property
    def name(self) -> str:
        return f"{self.number:04d}"

    def is_newest(self) -> bool:
        """Return True if this attempt still owns the run's folder."""
        return _newest(self.run_folder) <= self.number

    def check(self) -> None:
        """Raise FencedError if a newer attempt has taken over the run's folder."""
        newest = _newest(self.run_folder)
        if newest > self.number:
            raise FencedError(
                f"{self.run_folder}: attempt {newest} of this run has taken over from this one (attempt "
                f"{self.number}), which stops and saves nothing more. Let the newer one finish"
            )

    @contextlib.contextmanager
    def owning(self) -> Iterator[None]:
        """Report that another attempt has taken over, if so, in place of any error: the error follows from it."""
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):
                self.check()
            raise


def claim_run(run_folder: Path, identity: Mapping[str, Any]) -> Attempt:
    """Take over the run's folder from any other attempt that may still be running. Raises StorageError."""
    folder = _folder(run_folder)
    make_folder(folder)
    about = {"host": platform.node(), "process": os.getpid(), "identity": identity, "versions": library_versions()}
    content = (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()
    while True:
        attempt = Attempt(run_folder, _newest(run_folder) + 1)
        # If two begin at once, one gets the number and the other the next.
        if put_if_absent(folder / f"{attempt.name}.json", content):
            return attempt


def set_aside(folder: Path) -> str:
    """Rename a checkpoint that no attempt can resume; give its new name.

    A process that is still writing into it continues there, and the content stays for inspection.
    """
    number = 0
    while (target := folder.with_name(f"broken-{folder.name}-{number}")).exists():
        number += 1
    # Another process may be looking at the same folders.
    with contextlib.suppress(FileNotFoundError):
        folder.rename(target)
    return target.name


def _folder(run_folder: Path) -> Path:
    return run_folder / "attempts"


def _newest(run_folder: Path) -> int:
    names = (file.stem for file in _folder(run_folder).glob("*.json"))
    return max((int(name) for name in names if ATTEMPT_NAME.fullmatch(name)), default=0)
