"""Start one command as several processes on this machine, and keep signals and exit status, unlike torchrun.

A scheduler ends a job with a signal, and reads from the exit status whether to run it again. torchrun always ends with
1, passes on few signals, and kills a process that saves for longer than 30 seconds. Here every process gets every
signal, has the time that the scheduler leaves, and gives the launch its exit status.
"""

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import click

from pipeline.base.errors import ConfigError, UnfinishedError
from pipeline.base.progress import say
from pipeline.base.signals import STOP_SIGNALS, leave_with_parent, process_context
from stages.subprocesses import import_libraries, run_entry

__all__ = ["run"]

_UNFINISHED = UnfinishedError.exit_status
# Time for the others to end after one has failed: a batch, unless they wait for the one that is gone.
_SECONDS_TO_END = 30.0


def run(entry: Callable[[], None], count: int, words: Sequence[str]) -> None:
    """Run `refshard WORDS` in `count` processes and wait for all of them; `entry` reads the words from `sys.argv`.

    After one has failed, the others are asked to stop, and killed if they do not.

    Raises:
        ConfigError: This process is one of several itself.
        click.exceptions.Exit: A process failed and has said why; with the exit status of the first that failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"--processes: must be 1 in one of several processes, got {count}. Leave it out, or start one process"
        )
    # One thread for each core in all; torch reads this at its import.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    import_libraries()
    import torch.distributed as dist

    # The processes meet here. This process listens on a port that the system chooses, so nobody else can take it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    meeting = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    status = _Processes(entry, count, words, meeting).wait()
    if status:
        raise click.exceptions.Exit(status)


class _Processes:
    """The processes of one launch, and their exit status."""

    def __init__(self, entry: Callable[[], None], count: int, words: Sequence[str], meeting: Mapping[str, str]) -> None:
        context = process_context()
        self._running: list[Any] = []
        self._asked = self._all_there = False
        self._received: deque[int] = deque()
        self._status = 0
        self._deadline: float | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        # Until the processes have set handlers of their own, they have this one's.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for rank in range(count):
                environment = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = context.Process(target=_run_command, args=(entry, ["refshard", *words], environment))
                process.start()
                self._running.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._all_there = True
        self._hand_on()

    def wait(self) -> int:
        """Wait for all to end. Returns the exit status of the first that failed, 0 if none did."""
        while self._running:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            wait([process.sentinel for process in self._running], left)
            # If two ended at once, the one that was killed is the more likely cause, and the one that failed because
            # another was gone (1) the least likely.
            for process in sorted(self._running, key=lambda process: (process.exitcode == 1, process.exitcode or 0)):
                if process.exitcode is not None:
                    self._running.remove(process)
                    self._note(process)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                for process in self._running:
                    process.kill()
        return self._status

    def _note(self, process: Any) -> None:
        """Note one that has ended; the first that failed ends all."""
        if process.exitcode == 0:
            return
        if process.exitcode < 0 and self._deadline is None:
            say(
                f"refshard: process {process.pid} was ended by {signal.Signals(-process.exitcode).name}; the others "
                "are asked to stop",
                err=True,
            )
        # A process that was killed reports the signal as a negative number.
        status = process.exitcode if process.exitcode > 0 else 128 - process.exitcode
        self._status = self._status or status
        if self._asked and status == _UNFINISHED:
            # It stopped as asked; so will the others, which may still be saving.
            return
        if self._deadline is None:
            self._deadline = time.monotonic() + _SECONDS_TO_END
            if not self._asked:
                self._send(signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._received.append(number)
        # A signal that comes while the processes start waits here until all can get it. Blocking it would not do:
        # only this thread's is blocked, and the libraries have others.
        if self._all_there:
            self._hand_on()

    def _hand_on(self) -> None:
        # Another signal may come at any time and empty the queue first.
        with contextlib.suppress(IndexError):
            while True:
                self._send(self._received.popleft())

    def _send(self, number: int) -> None:
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _run_command(entry: Callable[[], None], words: list[str], environment: Mapping[str, str]) -> None:
    for number in STOP_SIGNALS:
        # Until the stage sets handlers of its own, there is nothing to save.
        signal.signal(number, lambda *_: os._exit(_UNFINISHED))
    # A terminal's Ctrl-C goes to the whole group, and would come a second time from the launcher.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    leave_with_parent(_UNFINISHED)
    os.environ.update(environment)
    run_entry(entry, words)
