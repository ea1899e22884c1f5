"""Run refshard commands, each in a process of its own, that pass on a stop request and keep the exit status."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from pipeline.base.errors import UnfinishedError, stopped_as_asked
from pipeline.base.progress import say_loading
from pipeline.base.signals import StopFlag, leave_with_parent, process_context

__all__ = ["Commands", "import_libraries", "leave", "run_entry"]


def import_libraries() -> None:
    """Import what both stages need, so that forked processes start with it."""
    say_loading()
    import pipeline.scoring.forward
    import pipeline.training.trainer
    import pipeline.training.windows  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class Commands:
    """The command line, as a stage runs it in other processes."""

    entry: Callable[[], None]
    """Entry of the command line, which reads `sys.argv`"""
    flag: StopFlag
    """Stop request, which is passed on as SIGTERM"""
    debug: bool = False
    """Have the commands show tracebacks."""

    def run(self, *words: str) -> int:
        """Run `refshard WORDS` and wait for its end.

        Returns:
            Its exit status; 128 plus the signal's number if a signal killed it, as in shells.

        Raises:
            UnfinishedError: The flag was set before the command began.
        """
        if self.flag:
            raise stopped_as_asked("all that was done is saved")
        program = ["refshard", "--debug"] if self.debug else ["refshard"]
        process = process_context().Process(target=_run, args=(self.entry, [*program, *words]))
        process.start()
        told = False
        while process.is_alive():
            process.join(0.2)
            if self.flag and not told and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
                told = True
        status: int = process.exitcode or 0
        # A process that was killed reports the signal as a negative number.
        return status if status >= 0 else 128 - status


def _run(entry: Callable[[], None], words: list[str]) -> None:
    # Without the parent, which starts the next command, this one would only get in a rerun's way.
    leave_with_parent(UnfinishedError.exit_status)
    run_entry(entry, words)


def run_entry(entry: Callable[[], None], words: list[str]) -> None:
    """Run the command line in a process that multiprocessing started, with its exit handlers."""
    sys.argv = words
    try:
        entry()
    finally:
        # A fork ends without them before Python 3.14, and trackers finish a run in theirs.
        atexit._run_exitfuncs()


def leave(status: int) -> NoReturn:
    """End the process as `sys.exit` does: threads are joined, exit handlers run. Only C++ destructors do not.

    Threads of torch and of other libraries outlive their destructors and sometimes abort a process that has done all.
    """
    atexit.register(_skip_destructors, status)
    sys.exit(status)


def _skip_destructors(status: int) -> None:
    """Run the other exit handlers, and end. The handler that is registered last runs first."""
    atexit.unregister(_skip_destructors)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
