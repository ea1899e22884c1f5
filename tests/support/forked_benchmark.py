"""The benchmark's scripts, with their measurements as forks of one process that has imported both sides already.

Of the six seconds that a measurement takes at toy size, five are imports. A fork runs the same script with the same
arguments and environment; that one also starts on its own is left to a test of `rounds.measure` itself.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from support.processes import ROOT, redirected, said

__all__ = ["BENCH", "run_script"]

BENCH = ROOT / "tests" / "bench"


def run_script(script: str, *arguments: str) -> str:
    """Run one of the scripts to its end, which must be a success, and give what it wrote to stdout."""
    return _finished("forkserver", _drive, [str(BENCH / script), *arguments], os.environ, check=True).stdout


def _drive(words: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    sys.path.insert(0, str(BENCH))
    import model
    import ours  # noqa: F401
    import rounds
    import theirs  # noqa: F401

    import support.warm  # noqa: F401

    rounds.subprocess = _Forks
    # At toy size nothing is made of the machine's own speed, which takes a second to measure.
    model.matrix_rate = functools.partial(model.matrix_rate, seconds=0.05)
    _become(words, folder, environment)


class _Forks:
    """Stands in for the module `subprocess` in the driver."""

    @staticmethod
    def run(
        command: Sequence[str],
        *,
        capture_output: bool,
        text: bool,
        check: bool,
        env: Mapping[str, str],
        timeout: float | None,
    ) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and capture_output and text
        return _finished("fork", _become, command[1:], env, check=check)


def _finished(
    method: str, target: Any, words: Sequence[str], environment: Mapping[str, str], *, check: bool
) -> subprocess.CompletedProcess[str]:
    context: Any = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=target, args=(words, folder, dict(environment)))
        process.start()
        process.join()
        out, err = said(folder)
    assert not check or process.exitcode == 0, out + err
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _become(words: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    """Be the process that `python WORDS` would be, but for what is imported already."""
    redirected(folder, environment)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
