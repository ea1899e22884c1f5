"""Commands that are watched while they run, to be signalled at the right moment; one alone, or the ranks of one run."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

from support.processes import Command


class Watched(Command):
    """A `refshard` command that has been started."""

    # Kept as long as the process is.
    meeting_point: TCPStore | None = None

    def __init__(
        self, *words: Any, environment: Mapping[str, str] | None = None, before: Callable[[], None] | None = None
    ) -> None:
        with mock.patch.dict(os.environ, environment or {}):
            super().__init__(*words, before=before)

    def finish(self, seconds: float = 120) -> int:
        """Wait for its end; gives the exit status, negative where a signal ended it."""
        status = self.wait(seconds)
        if status is None:
            self.kill()
            raise AssertionError(f"{self.words} still runs after {seconds} s\n{self.out}\n{self.err}")
        return status

    def watches(self, number: int) -> bool:
        """Whether it has a handler for a signal by now; before that, its start can simply be done again."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return False
        caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
        return bool(int(caught, 16) >> (number - 1) & 1)

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60) -> bool:
        """Wait for something that it does; False where it ended before that."""
        end = time.monotonic() + seconds
        while self.status is None and not ready():
            assert time.monotonic() < end, f"{self.words}: nothing in {seconds} s\n{self.out}\n{self.err}"
            time.sleep(0.0005)
        return self.status is None

    @property
    def out(self) -> str:
        return self.said()[0]

    @property
    def err(self) -> str:
        return self.said()[1]


def main_process_loads_alone() -> None:
    """Fail in every process but the main one if it loads a model's weights."""
    if os.environ["RANK"] != "0":
        from pipeline.models import loading

        def fail(*arguments: Any) -> None:
            raise AssertionError("this process loads weights")

        loading._load = fail  # type: ignore[assignment]


def start_ranks(count: int, *words: Any, before: Callable[[], None] | None = None) -> list[Watched]:
    """Start the processes of one run, as torchrun does.

    They meet at a store of this process, whose port is its own from the first moment on: one that was only looked up
    could be another process's by the time that it is used.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    ranks = [
        Watched(
            *words,
            environment={k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
            before=before,
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.meeting_point = store
    return ranks
