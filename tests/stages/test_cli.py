"""How the command leaves."""

import atexit
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.base.signals import StopFlag
from stages.cli import main
from stages.options import parse_stop_after
from stages.subprocesses import Commands, leave
from support.processes import ROOT
from support.runs import refshard

_LEAVE = """
import atexit, threading, time
from stages.subprocesses import leave
class Last:
    def __del__(self): print("destructors")
last = Last()
atexit.register(print, "exit handlers")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
print("work")
try:
    leave(75)
finally:
    print("finally")
"""


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_leaves_after_threads_and_exit_handlers_and_before_its_destructors(processes: str) -> None:
    """Those of C++ libraries abort a finished process now and then; all that an end does in Python is kept."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAVE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": processes},
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.splitlines() == ["work", "finally", "a thread", "exit handlers"]


def _leaves(file: Path) -> None:
    atexit._clear()  # those of the tests' process, whose fork this is
    atexit.register(file.write_text, "exit handlers")
    leave(75)


def test_a_fork_that_runs_a_command_runs_its_exit_handlers_too(tmp_path: Path) -> None:
    """Trackers finish their page in one; multiprocessing ends forks without them."""
    commands = Commands(entry=partial(_leaves, tmp_path / "said"), flag=StopFlag())
    assert commands.run("train") == 75
    assert (tmp_path / "said").read_text() == "exit handlers"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("3h50m", 13800), ("2m5s", 125), ("1h", 3600), ("0s", 0)])
def test_a_time_to_stop_after_is_counted_from_the_start(text: str, seconds: int) -> None:
    assert parse_stop_after(text) == pytest.approx(time.monotonic() + seconds, abs=5)


@pytest.mark.parametrize("text", ["", "90", "1:30:00", "50m3h", "-5s", "1.5h", "soon"])
def test_a_time_of_another_form_is_refused_with_an_example(text: str) -> None:
    done = refshard("train", "--config", "run.yaml", "--stop-after", text, check=2)
    assert "--stop-after" in done.stderr
    assert "like 3h50m or 90s" in done.stderr


def test_a_flag_is_set_by_a_signal_or_by_the_time() -> None:
    assert not StopFlag()
    later, now = StopFlag(time.monotonic() + 3600), StopFlag(time.monotonic())
    assert (bool(later), bool(now)) == (False, True)
    later.request()
    assert later
    assert not now.is_urgent


def test_asking_for_gpus_leaves_them_to_forks() -> None:
    """With this set, torch asks NVML and not CUDA, which does not outlive a fork once it was asked."""
    code = """
import sys
sys.argv = ["refshard", "--version"]
from stages.cli import run
try:
    run()
except SystemExit:
    import torch
    assert torch.cuda._nvml_based_avail()
    print("by NVML")
"""
    environment = {name: value for name, value in os.environ.items() if "NVML" not in name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.endswith("by NVML\n"), done.stderr


@pytest.mark.parametrize(("words", "said"), [("refshard rec", "recipes"), ("refshard merge --dt", "--dtype")])
def test_a_shell_completes_commands_and_options(words: str, said: str) -> None:
    asked = {"_REFSHARD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    assert CliRunner().invoke(main, [], prog_name="refshard", env=asked).output == f"plain,{said}\n"


_INTERRUPTED = """
import os, signal, sys
from stages import cli
cli.main.commands["schema"].callback = lambda: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["refshard", "schema"]
cli.run()
"""


def test_an_interrupt_before_anything_has_begun_ends_with_130_and_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (130, "refshard: interrupted")
