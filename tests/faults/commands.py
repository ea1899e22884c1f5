"""Commands as processes of their own that are signalled while they run; forks of the tests' warmed server."""

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conftest import _FORKS, _run_command


class Command:
    """A `refshard` command that has been started."""

    def __init__(self, *words: Any, environment: Mapping[str, str] | None = None) -> None:
        self.words = ["refshard", *map(str, words)]
        self._folder = tempfile.TemporaryDirectory()
        self._process = _FORKS.Process(target=_run, args=(self.words, self._folder.name, dict(environment or {})))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        pid: int = self._process.pid
        return pid

    def poll(self) -> int | None:
        """Exit status, negative where a signal ended it; None while it runs."""
        status: int | None = self._process.exitcode
        return status

    def wait(self, seconds: float = 120) -> int:
        self._process.join(seconds)
        status = self.poll()
        if status is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"{self.words} still runs after {seconds} s\n{self.out}\n{self.err}")
        return status

    def send(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def watches(self, number: int) -> bool:
        """Whether it has a handler for a signal by now; before that, its start can simply be done again."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait for something that it does; False where it ended before that."""
        end = time.monotonic() + seconds
        while self.poll() is None and not ready():
            assert time.monotonic() < end, f"{self.words}: nothing in {seconds} s\n{self.out}\n{self.err}"
            time.sleep(0.0005)
        return self.poll() is None

    @property
    def out(self) -> str:
        return self._read("out")

    @property
    def err(self) -> str:
        return self._read("err")

    def _read(self, name: str) -> str:
        file = Path(self._folder.name, name)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def start_ranks(count: int, *words: Any) -> list[Command]:
    """Start the processes of one run, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Command(*words, environment={k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()})
        for rank in range(count)
    ]


def _run(words: list[str], folder: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    _run_command(words, folder)
