"""TR-DPO: the two stages in alternation, each in a process of its own, so that two models are never in memory.

    move the reference -> score the next window's pairs -> train the window -> move the reference -> ...

Each process reads the current window from the checkpoints. If any of them is killed at any time, the same command
resumes. A scheduler can run the two commands in turn itself: `refshard precompute --config F`, then
`refshard train --config F --one-window`.
"""

from collections.abc import Sequence

import click

from pipeline.base.errors import UnfinishedError
from pipeline.base.files import TEMPORARY, delete_named
from pipeline.base.folders import open_folder
from pipeline.config.schema import Config
from pipeline.run.checkpoints import delete_run, is_recorded, newest_step
from pipeline.run.outputs import guard_run, guard_shards
from pipeline.store.store import delete_store
from stages.subprocesses import Commands, import_libraries

__all__ = ["run"]

_UNFINISHED = UnfinishedError.exit_status


def run(config: Config, commands: Commands, words: Sequence[str], *, overwrite: bool = False) -> None:
    """Alternate until the run is finished. Raises click's Exit, with its status, if a command failed and printed why.

    Args:
        config: The run's settings, with `reference.sync`.
        commands: Runs the two commands.
        words: Options of both commands: `--config FILE -o KEY=VALUE ...`.
        overwrite: Delete the shards, the checkpoints, the moved references and the record of an earlier run first.
    """
    import_libraries()
    guard_shards(config, overwrite=overwrite)
    guard_run(config)
    output = config.train.folder
    if overwrite:
        delete_run(output)
        for name in config.data.names:
            delete_store(open_folder(config.precompute.output).child(name))
    # A process was killed while it moved the reference. No other one moves it now.
    delete_named(output / "references", TEMPORARY)
    if is_recorded(output):
        # Prints that the run is finished, or that the folder is another run's.
        _command(commands, ["train", *words, "--one-window"])
    while not is_recorded(output):
        _command(commands, ["precompute", *words])
        step = newest_step(output)
        status = _command(commands, ["train", *words, "--one-window"], accept=(0, _UNFINISHED))
        # A damaged checkpoint is set aside by stage two, and the one before may stand in an earlier window.
        went_back = newest_step(output) < step
        if status == _UNFINISHED and (commands.flag or not went_back):
            raise click.exceptions.Exit(_UNFINISHED)
        if not is_recorded(output) and newest_step(output) == step:
            raise AssertionError(f"{output}: a window was trained, and no step was taken after step {step}")


def _command(commands: Commands, words: Sequence[str], accept: Sequence[int] = (0,)) -> int:
    """Run a command in another process; end this one with its status unless that is accepted."""
    status = commands.run(*words)
    if status not in accept:
        raise click.exceptions.Exit(status)
    return status
