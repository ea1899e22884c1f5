"""A request to stop, as a flag: a signal or a time sets it and does nothing else; the program leaves at its next safe
point.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing import connection, get_context, parent_process
from types import FrameType
from typing import Any

__all__ = ["STOP_SIGNALS", "StopFlag", "leave_with_parent", "process_context", "watch_signals", "work_unsignalled"]

# SIGTERM and SIGINT come from people and schedulers; USR1 and USR2 are what batch systems send ahead of the end.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]


class StopFlag:
    """Set by a signal, or by the time; read between batches and steps.

    Args:
        stop_at: When to stop without a signal, on `time.monotonic`'s clock.
    """

    def __init__(self, stop_at: float | None = None) -> None:
        self._stop_at = stop_at
        self._requested = False
        self._terminations = 0

    def request(self, *, terminate: bool = False) -> None:
        self._requested = True
        self._terminations += terminate

    def __bool__(self) -> bool:
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self._requested = True
        return self._requested

    @property
    def is_urgent(self) -> bool:
        """Whether SIGTERM came twice: there may be no time left for another save."""
        return self._terminations > 1


def watch_signals(stop_at: float | None = None) -> StopFlag:
    """Turn SIGTERM, SIGUSR1, SIGUSR2 and SIGINT into a flag. A second Ctrl-C interrupts at once, as usual.

    Args:
        stop_at: When to stop without a signal, on `time.monotonic`'s clock.
    """
    flag = StopFlag(stop_at)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        flag.request(terminate=number == signal.SIGTERM)

    # Handlers can be set in the main thread only; elsewhere (tests, notebooks) the flag just stays unset.
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, handle)
    return flag


def work_unsignalled(closing: Any) -> None:
    """Have a worker process live as long as its parent needs it, whoever is signalled.

    A scheduler signals every process of a job. If the workers left, the parent could not save what it has.

    Args:
        closing: A shared value that is not 0 once the parent has no more use for workers; only then SIGTERM, which
            is how libraries have a worker leave, ends this one.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def leave_if_meant(number: int, frame: FrameType | None) -> None:
        if closing.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_meant)
    # Libraries look after the parent between two items only, and wait for their queue to be read before they leave:
    # without a reader, forever, once an item is larger than the pipe.
    leave_with_parent(1)


def process_context() -> Any:
    """Say how to start processes that run a stage, once the libraries are imported.

    A fork starts at once, with the libraries imported; the process that forks does nothing else with them. But the
    import of bitsandbytes, which peft's brings along, begins to use the GPUs, and a fork of that can't use them.
    """
    import torch

    forks = sys.platform == "linux" and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return get_context("fork" if forks else "spawn")


def leave_with_parent(status: int) -> None:
    """Have this process end, with that exit status, as soon as the one that started it is gone, however it went."""
    parent = parent_process()
    if parent is None:
        return

    def wait_and_leave() -> None:
        connection.wait([parent.sentinel])
        os._exit(status)

    threading.Thread(target=wait_and_leave, daemon=True).start()
