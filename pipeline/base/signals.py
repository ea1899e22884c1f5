"""A request to stop, as a flag that a signal or a time sets. The program leaves at its next safe point."""

import contextlib
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection, get_context, parent_process
from types import FrameType
from typing import Any

__all__ = [
    "STOP_SIGNALS",
    "StopFlag",
    "is_stop_requested",
    "leave_with_parent",
    "process_context",
    "signals_restored",
    "watch_signals",
    "work_unsignalled",
]

# SIGTERM and SIGINT come from people and schedulers; USR1 and USR2 are what batch systems send ahead of the end.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class StopFlag:
    """A flag that is set by a signal or at a time (`time.monotonic`'s), and read between batches and steps."""

    def __init__(self, stop_at: float | None = None) -> None:
        self._stop_at = stop_at
        # Shared with the forks of this process, in which loaders wait for a template.
        self._requested = mmap.mmap(-1, 1)
        self._terminations = 0

    def request(self, *, terminate: bool = False) -> None:
        self._requested[0] = 1
        self._terminations += terminate

    def __bool__(self) -> bool:
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self._requested[0] = 1
        return self._requested[0] == 1

    @property
    def is_urgent(self) -> bool:
        """True if SIGTERM came twice, so that another save may take too long."""
        return self._terminations > 1


_watched: StopFlag | None = None


def is_stop_requested() -> bool:
    """Return True if this process, or the one that it is a fork of, watches signals and was asked to stop."""
    return bool(_watched)


def watch_signals(stop_at: float | None = None) -> StopFlag:
    """Turn SIGTERM, SIGUSR1, SIGUSR2, SIGINT and a time into a flag. A second Ctrl-C interrupts at once, as usual."""
    global _watched
    flag = _watched = StopFlag(stop_at)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        flag.request(terminate=number == signal.SIGTERM)

    # Only the main thread can set handlers; elsewhere (tests, notebooks) the flag stays unset.
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, handle)
    return flag


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Put the handlers of the watched signals back afterwards, and forget a request to stop."""
    global _watched
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS} if is_main else {}
    try:
        yield
    finally:
        _watched = None
        for number, handler in before.items():
            # None stands for a handler that was not set from Python.
            if handler is not None:
                signal.signal(number, handler)


def work_unsignalled(closing: Any) -> None:
    """Keep a worker process alive through signals as long as its parent needs it.

    A scheduler signals every process of a job. Without its workers the parent could not save. `closing` is a shared
    value, not 0 after the parent has finished with them. Only then SIGTERM, by which libraries stop a worker, ends it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def leave_if_meant(number: int, frame: FrameType | None) -> None:
        if closing.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_meant)
    # Libraries check for the parent only between two items, and wait until their queue is read. Without a reader, an
    # item larger than the pipe would keep them forever.
    leave_with_parent(1)


def process_context() -> Any:
    """Return the context for processes that run a stage, after the libraries are imported.

    A fork has the libraries at once. But peft imports bitsandbytes, which may initialize CUDA at its import, and a fork
    of an initialized process can't use the GPUs.
    """
    import torch

    forks = sys.platform == "linux" and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return get_context("fork" if forks else "spawn")


def leave_with_parent(status: int) -> None:
    """End this process with an exit status as soon as its parent is gone."""
    parent = parent_process()
    if parent is None:
        return

    def wait_and_leave() -> None:
        connection.wait([parent.sentinel])
        os._exit(status)

    threading.Thread(target=wait_and_leave, daemon=True).start()
