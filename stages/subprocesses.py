"""Run refshard commands, each in a process of its own, that pass on a stop request and keep the exit status."""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.base.errors import UnfinishedError, stopped_as_asked
from pipeline.base.signals import StopFlag, leave_with_parent, process_context

__all__ = ["Commands", "import_libraries", "leave"]


def import_libraries() -> None:
    """Import what both stages need, so that forked processes start with it."""
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
    sys.argv = words
    entry()


def leave(status: int) -> None:
    """End the process; one of several ends without its C++ destructors.

    Threads of torch's process groups outlive them and sometimes abort a finished rank, which ends the launch as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
