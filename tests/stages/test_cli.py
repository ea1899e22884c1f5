"""How the command leaves."""

import os
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from pipeline.base.signals import StopFlag
from stages.cli import main
from stages.options import parse_stop_after
from support.processes import ROOT
from support.runs import refshard

_LEAVE = """
import atexit
from stages.subprocesses import leave
class Last:
    def __del__(self): print("destructors")
last = Last()
atexit.register(print, "exit handlers")
print("work")
leave(75)
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
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": processes},
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.split("\n")[:-1] == said


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
