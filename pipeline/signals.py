"""A request to stop, as a flag: SIGTERM, SIGUSR1 or Ctrl-C set it, the program leaves at its next safe point."""

import signal
import threading
from types import FrameType

__all__ = ["StopFlag", "watch_signals"]


class StopFlag:
    """Set by a signal, read between batches and steps."""

    def __init__(self) -> None:
        self._requested = False

    def request(self) -> None:
        self._requested = True

    def __bool__(self) -> bool:
        return self._requested


def watch_signals() -> StopFlag:
    """Turn SIGTERM, SIGUSR1 and SIGINT into a flag. A second Ctrl-C interrupts at once, as usual."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        flag.request()

    # Handlers can be set in the main thread only; elsewhere (tests, notebooks) the flag just stays unset.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, handle)
    return flag
