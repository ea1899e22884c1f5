"""TR-DPO: the two stages in alternation, each in a process of its own, so that no two models are ever in memory.

    move the reference -> score the next window's pairs -> train the window -> move the reference -> ...

Each process finds out from the checkpoints where the run stands, so it does not matter which of them is killed, or
when: the same command goes on. A scheduler can run the two commands in turn itself:
`refshard precompute --config F`, then `refshard train --config F --one-window`.
"""

import importlib
import shutil
from collections.abc import Sequence

import click

from pipeline.base.errors import UnfinishedError
from pipeline.base.folders import open_folder
from pipeline.base.signals import StopFlag, watch_signals
from pipeline.config.schema import Config
from pipeline.run.checkpoints import delete_run, is_recorded, newest_step
from pipeline.store.store import delete_store
from stages.subprocesses import run_command

__all__ = [
    "run",
]

_UNFINISHED = UnfinishedError.exit_status


def run(
    config: Config, words: Sequence[str], *, overwrite: bool = False, debug: bool = False, stop_at: float | None = None
) -> None:
    """Alternate until the run is finished.

    Args:
        config: The run's settings, with `reference.sync`.
        words: The options that the two commands are called with: `--config FILE -o KEY=VALUE ...`.
        overwrite: Delete the shards, the checkpoints, the moved references and the record of an earlier run first.
        debug: Have the commands show tracebacks.
        stop_at: When to stop, on `time.monotonic`'s clock.

    Raises:
        click.exceptions.Exit: A command failed, which has said why; with its exit status.
    """
    flag = watch_signals(stop_at)
    for needed in ("pipeline.training.gate", "pipeline.training.trainer", "pipeline.training.windows"):
        importlib.import_module(needed)
    program = ["--debug"] if debug else []
    output = config.train.folder
    if overwrite:
        delete_run(output)
        for name in ("train", *config.data.eval):
            delete_store(open_folder(config.precompute.output).child(name))
    for leftover in (output / "references").glob(".tmp-*"):
        # Of a process that was killed while it moved the reference: this one alone moves it now.
        shutil.rmtree(leftover, ignore_errors=True)
    if is_recorded(output):
        # Says that the run is finished, or that the folder is another run's.
        _command([*program, "train", *words, "--one-window"], flag)
    while not is_recorded(output):
        _command([*program, "precompute", *words], flag)
        step = newest_step(output)
        status = _command([*program, "train", *words, "--one-window"], flag, accept=(0, _UNFINISHED))
        # A damaged checkpoint is set aside by stage two, and the one before may stand in an earlier window.
        went_back = newest_step(output) < step
        if status == _UNFINISHED and (flag or not went_back):
            raise click.exceptions.Exit(_UNFINISHED)
        if not is_recorded(output) and newest_step(output) == step:
            raise AssertionError(f"{output}: a window was trained, and no step was taken after step {step}")


def _command(words: Sequence[str], flag: StopFlag, accept: Sequence[int] = (0,)) -> int:
    """Run a command in a process of its own; a status that is not accepted ends this one with it."""
    status = run_command(importlib.import_module("stages.cli").run, words, flag)
    if status not in accept:
        raise click.exceptions.Exit(status)
    return status
