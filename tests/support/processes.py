"""The real command in real processes, to be waited for, signalled or killed.

Importing torch and transformers takes seconds, so the commands start as forks of a process that has done it.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# As the command itself sets it before it imports the libraries, which the forks find imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_FORKS = multiprocessing.get_context("forkserver")
_STAGES = ("precompute.command", "train", "inspect", "sweep.command", "generate")
_FORKS.set_forkserver_preload([*(f"stages.{name}" for name in _STAGES), "s3fs", "tests.support.warm"])


class Command:
    """A `refshard` command that runs, in a working folder and an environment.

    `before` is called in the process before the command is; it is a function of a module, or a partial of one.
    """

    def __init__(
        self,
        *arguments: Any,
        folder: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.words = ["refshard", *map(str, arguments)]
        self._said = tempfile.TemporaryDirectory()
        environment = dict(os.environ if environment is None else environment)
        self._process = _FORKS.Process(target=_run, args=(self.words, self._said.name, environment, folder, before))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs, the negative number of the signal that killed it."""
        return self._process.exitcode

    def signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float | None = 600) -> int | None:
        """Wait for its end; gives the exit status, None if it still runs."""
        self._process.join(seconds)
        return self._process.exitcode

    def said(self) -> tuple[str, str]:
        """What it wrote to stdout and to stderr."""
        return said(self._said.name)


def said(folder: str) -> tuple[str, str]:
    """What a process that was `redirected` into the folder wrote to stdout and to stderr."""
    out, err = (Path(folder, name) for name in ("out", "err"))
    return tuple(file.read_text("utf-8", "replace") if file.exists() else "" for file in (out, err))  # type: ignore[return-value]


def redirected(folder: str, environment: Mapping[str, str]) -> None:
    """Give a fork the standing of a process of its own: its output into files, working folder and environment."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    # The fork server has the environment of its own start.
    os.environ.clear()
    os.environ.update(environment)


def _run(
    words: list[str], said_in: str, environment: dict[str, str], folder: Path, before: Callable[[], None] | None
) -> None:
    redirected(said_in, environment)
    os.chdir(folder)
    sys.argv = words
    if before is not None:
        before()
    from stages.cli import run

    run()
