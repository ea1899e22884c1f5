"""Run a stage within this process, which is left as it was: no exit, no signal handlers, no changed log level."""

import contextlib
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import ConfigError, RefshardError, interruption_of, stopped_as_asked
from pipeline.base.folders import Folder, open_folder
from pipeline.base.quiet import silence_libraries
from pipeline.base.signals import is_stop_requested, signals_restored
from pipeline.config.reader import load_config
from pipeline.config.schema import Config

from .stores import Store, open_store

__all__ = ["precompute", "train"]

_SECONDS_BETWEEN_LOOKS = 1.0


def precompute(
    config: Path | str | Mapping[str, Any], *, overrides: Sequence[str] = (), overwrite: bool = False
) -> dict[str, Store]:
    """Run stage one: write the reference's log-probs to shards. Only what is missing is scored.

    Each of several processes of a launch scores its share, and waits for the others.

    An interrupt (Ctrl-C, or the notebook's stop button) ends it at the next unit; a second one ends it at once.

    Args:
        config: A settings file, or its content as a mapping.
        overrides: Changes of single settings, like `loss.beta=0.2`.
        overwrite: Delete the shards in the output folder and start over.

    Returns:
        Each set's store by name; none for a loss without a reference.

    Raises:
        UnfinishedError: It was interrupted; the same call resumes.
        RefshardError: The settings or data are wrong, or the disk failed; see the subclasses.
    """
    settings = _settings(config, overrides)
    with _visiting():
        from stages.early import refuse_early
        from stages.precompute import command

        refuse_early(settings)
        command.run(settings, overwrite=overwrite)
        output = open_folder(settings.precompute.output)
        names = settings.data.names if settings.loss.needs_reference else ()
        folders = {name: output.child(name) for name in names}
        _wait_for_others(folders.values())
    return {name: open_store(str(folder)) for name, folder in folders.items()}


def train(config: Path | str | Mapping[str, Any], *, overrides: Sequence[str] = (), overwrite: bool = False) -> Path:
    """Run stage two: train the policy on the shards. It resumes from the newest complete checkpoint.

    An interrupt ends it after the current step, with a checkpoint; a second one ends it at once.

    Args:
        config: A settings file, or its content as a mapping.
        overrides: Changes of single settings, like `loss.beta=0.2`.
        overwrite: Delete the checkpoints in the output folder and start over.

    Returns:
        Folder of the policy, which `from_pretrained` or PEFT loads.

    Raises:
        UnfinishedError: It was interrupted, or the shards are not complete; the same call resumes.
        RefshardError: The settings or data are wrong, or the disk failed; see the subclasses.
    """
    settings = _settings(config, overrides)
    with _visiting():
        from stages import train as stage
        from stages.early import refuse_early

        refuse_early(settings, is_scored=True)
        stage.run(settings, overwrite=overwrite)
    return settings.train.folder


def _settings(config: Path | str | Mapping[str, Any], overrides: Sequence[str]) -> Config:
    settings = load_config(config, overrides)
    if settings.reference.sync is not None:
        raise ConfigError(
            "reference.sync: must be left out here, since each window is trained in a process of its own. Run: "
            "refshard train --config FILE"
        )
    return settings


def _wait_for_others(folders: Collection[Folder]) -> None:
    """Wait until the other processes of a launch have scored their shares."""
    from pipeline.scoring.tensor_parallel import processes_of_launch
    from pipeline.store.store import is_finished

    while processes_of_launch()[1] > 1 and not all(is_finished(folder) for folder in folders):
        if is_stop_requested():
            raise stopped_as_asked("the finished units are saved")
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _visiting() -> Iterator[None]:
    """Leave signal handlers, warnings, log level and memory as they were, and raise what a user can act on as ours."""
    import click
    from transformers.utils import logging as library

    from pipeline.scoring.memory import free_memory

    level = library.get_verbosity()
    try:
        with signals_restored(), warnings.catch_warnings():
            silence_libraries()
            yield
    except click.exceptions.Exit as error:
        raise RefshardError(f"another process of this launch has failed, with status {error.exit_code}") from error
    except BaseException as error:
        ours = interruption_of(error)
        if ours is not None or isinstance(error, RefshardError | KeyboardInterrupt):
            _let_go(error)
        if ours is not None:
            raise ours from error
        raise
    finally:
        library.set_verbosity(level)
        free_memory()


def _let_go(error: BaseException | None) -> None:
    """Clear the variables of the calls that an error has left; they hold models, and a notebook keeps its error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
