"""A refshard command in a process of its own: what stops this process is handed on, its exit status is kept."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from pipeline.base.errors import UnfinishedError, stopped_as_asked
from pipeline.base.signals import StopFlag, leave_with_parent, process_context

__all__ = [
    "run_command",
]


def run_command(entry: Callable[[], None], words: Sequence[str], flag: StopFlag) -> int:
    """Run a command and wait for its end.

    Args:
        entry: The command line's entry, which reads `sys.argv`.
        words: The command's, without the program's name.
        flag: Once it is set, the command is asked to stop.

    Returns:
        Its exit status; of one that was killed 128 and the signal's number, as shells have it.

    Raises:
        UnfinishedError: Asked to stop before it began.
    """
    if flag:
        raise stopped_as_asked("all that was done is saved")
    process = process_context().Process(target=_run, args=(entry, ["refshard", *words]))
    process.start()
    told = False
    while process.is_alive():
        process.join(0.2)
        if flag and not told and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            told = True
    status: int = process.exitcode or 0
    # A process that was killed reports the signal as a negative number.
    return status if status >= 0 else 128 - status


def _run(entry: Callable[[], None], words: list[str]) -> None:
    # Without the one who would start the next command, going on would only get in a rerun's way.
    leave_with_parent(UnfinishedError.exit_status)
    sys.argv = words
    entry()
