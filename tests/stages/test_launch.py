"""One command as several processes: what they end with, what reaches them, and what is left when one is gone."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pipeline.base.errors import ConfigError
from pipeline.base.signals import STOP_SIGNALS, process_context
from pipeline.run.checkpoints import newest_step
from stages import cli, launch
from support.runs import has_stepped, refshard
from support.stores import bytes_of_stores
from support.watched import Watched

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _launched(behaviours: Sequence[Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> int:
    """Launch processes that behave so; gives the launch's exit status."""

    def behave(entry: Callable[[], None], words: list[str], environment: dict[str, str]) -> None:
        behaviours[int(environment["RANK"])]()

    monkeypatch.setattr(launch, "_run_command", behave)
    monkeypatch.setattr(launch, "_SECONDS_TO_END", 0.5)
    before = psutil.Process().children()
    status = launch._Processes(cli.run, len(behaviours), [], {}).wait()
    assert psutil.Process().children() == before
    return status


def _ends(status: int) -> Callable[[], None]:
    return lambda: os._exit(status)


def _hangs() -> None:
    """As one that waits for another in a collective: no signal that can be heeded ends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def _is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("behaviours", "status"),
    [
        ((_ends(0), _ends(0)), 0),
        ((_ends(0), _ends(78)), 78),
        ((_ends(65), _hangs), 65),
        ((_hangs, _ends(75)), 75),
        ((_hangs, _is_killed), 128 + 9),
    ],
    ids=["all done", "one refused", "one failed, one hangs", "one left unasked, one hangs", "one killed, one hangs"],
)
def test_a_launch_ends_with_the_status_of_the_first_that_failed_and_waits_for_none_that_hangs(
    behaviours: tuple[Callable[[], None], ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _launched(behaviours, monkeypatch) == status


@pytest.mark.parametrize(
    ("codes", "status"),
    [((1, 75), 75), ((75, 1), 75), ((1, 65, 75), 65), ((1, -9), 137), ((1, 1), 1), ((0, 75, 1), 75)],
)
def test_of_processes_that_ended_at_once_the_cause_is_not_the_one_that_missed_another(
    codes: tuple[int, ...], status: int
) -> None:
    processes: Any = object.__new__(launch._Processes)
    with contextlib.ExitStack() as open_ends:
        ends = [multiprocessing.Pipe() for _ in codes]
        for ours, theirs in ends:
            open_ends.enter_context(ours)
            theirs.close()
        running = [
            SimpleNamespace(exitcode=code, sentinel=ours, pid=0) for code, (ours, _) in zip(codes, ends, strict=True)
        ]
        vars(processes).update(_running=running, _asked=True, _status=0, _deadline=None)
        assert processes.wait() == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_every_process_gets_every_signal_once_and_all_the_time_that_it_takes_to_save(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saves(name: str, seconds: float) -> Callable[[], None]:
        def behave() -> None:
            got: list[int] = []
            for each in STOP_SIGNALS:
                signal.signal(each, lambda number, frame: got.append(number))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            while not got:
                time.sleep(0.01)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.01)
            (tmp_path / name).write_text(repr([int(each) for each in got]))
            os._exit(75)

        return behave

    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    # The second takes longer than those have that fail.
    assert _launched((saves("quick", 0), saves("slow", 1)), monkeypatch) == 75
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        ("quick", "slow"), repr([int(number)])
    )


def test_a_signal_while_the_processes_start_reaches_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first signals its launcher as soon as it is there, when the others are not. To whichever of the launcher's
    threads the system gives the signal, so there is one more."""

    def behave() -> None:
        end = time.monotonic() + 5
        while signal.SIGTERM not in signal.sigpending() and time.monotonic() < end:
            time.sleep(0.01)
        if signal.SIGTERM in signal.sigpending():
            (tmp_path / str(os.getpid())).touch()
        os._exit(75)

    def signals() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        behave()

    over = threading.Event()
    threading.Thread(target=over.wait).start()
    assert _launched((signals, behave, behave, behave), monkeypatch) == 75
    over.set()
    assert len(list(tmp_path.iterdir())) == 4


def test_processes_of_processes_and_of_a_moving_reference_are_refused(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--config", str(make_run(reference={"sync": {"steps": 2}})), "--processes", "2"]
    with pytest.raises(ConfigError, match="--processes 2: a run whose reference moves"):
        cli.main.main(words, standalone_mode=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--processes: must be 1 in one of several processes"):
        launch.run(cli.run, 2, [])


def _ranks(launcher: Watched) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def _gone(processes: list[psutil.Process], seconds: float = 15) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def test_two_processes_write_what_one_writes_and_keep_its_exit_status(make_run: Callable[..., Path]) -> None:
    config = make_run()
    folder = config.parent
    refshard("precompute", "--config", config)
    two = Watched("precompute", "--config", config, "--processes", 2, "-o", f"precompute.output={folder / 'two'}")
    assert two.finish() == 0, two.err
    files = bytes_of_stores(folder / "two")
    assert files == bytes_of_stores(folder / "shards")
    assert len(files) == 5
    other = Watched("precompute", "--config", config, "--processes", 2, "-o", "reference.dtype=bfloat16")
    assert other.finish() == 78
    assert "holds the shards of another run. It differs in reference.dtype" in other.err
    overwrite = Watched("precompute", "--config", config, "--processes", 2, "--overwrite")
    assert overwrite.finish() == 2
    assert "--overwrite: each of several processes would delete" in overwrite.err


# As if the import of a library had begun to use a GPU. The last words are the command's.
_GPU_IN_USE = """
import sys, torch
torch.cuda.is_initialized = lambda: True
from pipeline.base.signals import process_context
from stages import cli
assert process_context().get_start_method() == "spawn"
sys.argv[0] = "refshard"
cli.run()
"""


def test_a_signal_that_comes_while_another_is_handed_on_is_no_error() -> None:
    class Interrupted(deque[int]):
        """The next signal's handler runs in between, and hands on all that is there."""

        def __len__(self) -> int:
            count = super().__len__()
            self.clear()
            return count

    processes = launch._Processes.__new__(launch._Processes)
    processes._running, processes._received = [], Interrupted([signal.SIGTERM])
    processes._hand_on()


@pytest.mark.parametrize(("in_use", "way"), [(False, "fork"), (True, "spawn")])
def test_processes_are_no_forks_of_one_that_uses_gpus(in_use: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    assert process_context().get_start_method() == way


@pytest.mark.nightly
def test_where_an_import_has_begun_to_use_the_gpus_processes_are_no_forks(make_run: Callable[..., Path]) -> None:
    config = make_run()
    words = ["precompute", "--config", str(config), "--processes", "2"]
    done = subprocess.run([sys.executable, "-c", _GPU_IN_USE, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refshard("verify", config.parent / "shards")


def test_a_launched_training_saves_when_asked_and_leaves_nothing_behind_when_killed(
    make_run: Callable[..., Path],
) -> None:
    config = make_run(train={"max_steps": 2000, "per_device_train_batch_size": 2, "save_strategy": "no"})
    refshard("precompute", "--config", config)
    output = config.parent / "policy"
    words = ("train", "--config", config, "--processes", 2)

    def started() -> Watched:
        launcher = Watched(*words)
        assert launcher.wait_until(lambda: has_stepped(launcher.err)), launcher.err
        assert len(_ranks(launcher)) == 2
        # A terminal's Ctrl-C, which a whole group gets, must not come to them twice.
        assert all(os.getpgid(rank.pid) == rank.pid for rank in _ranks(launcher))
        return launcher

    launcher = started()
    launcher.signal(signal.SIGTERM)
    assert launcher.finish() == 75, launcher.err
    saved = newest_step(output)
    assert saved > 0

    launcher = started()
    ranks = _ranks(launcher)
    ranks[1].kill()
    assert launcher.finish(60) == 128 + 9, launcher.err
    assert "was ended by SIGKILL" in launcher.err
    assert _gone(ranks)

    launcher = started()
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    assert _gone(ranks)
    assert newest_step(output) == saved
