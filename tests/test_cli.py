"""How the command leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_LEAVE = """
import atexit
from stages.cli import _leave
class Last:
    def __del__(self): print("destructors")
last = Last()
atexit.register(print, "exit handlers")
print("work")
_leave(75)
"""


@pytest.mark.parametrize(
    ("processes", "said"), [("1", ["work", "exit handlers", "destructors"]), ("2", ["work", "exit handlers"])]
)
def test_one_of_several_processes_leaves_before_its_destructors(processes: str, said: list[str]) -> None:
    """Those of torch's process groups abort a finished rank now and then; exit handlers and output are kept."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAVE],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "WORLD_SIZE": processes},
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.split("\n")[:-1] == said
