"""Checkpoints that count: a marker with sizes and digests, written last; resume takes the newest that holds.

The library's own resume takes the highest number, accepts a missing optimizer and flipped bits, and stops at a
half-written folder. So a checkpoint without our marker is one that a kill cut short, and is set aside.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.base.digests import read_sha256
from pipeline.base.errors import ConfigError, DataError, StorageError, UnfinishedError
from pipeline.base.files import read_json, sync_tree, write_json
from pipeline.config.schema import Config
from pipeline.models.files import find_adapter, find_model
from pipeline.run.attempts import set_aside
from pipeline.run.identity import check_same_run
from pipeline.run.reading import RECORD, SETTINGS
from pipeline.run.records import delete_records

__all__ = [
    "checkpoint_folders",
    "commit_checkpoint",
    "delete_older",
    "delete_run",
    "find_checkpoint",
    "is_recorded",
    "newest_step",
    "newest_whole",
    "processes_of",
    "refuse_other_run",
    "saved_policy",
    "trained_weights",
]

MARKER = "refshard-commit.json"


# What the library's own saving on a signal leaves in a folder until it is done. It is off here, but folders travel.
_INCOMPLETE = "checkpoint-is-incomplete.txt"


def commit_checkpoint(folder: Path, step: int, identity: Mapping[str, Any], attempt: int = 0) -> None:
    """Write the marker of a checkpoint whose files are all there: their sizes and SHA-256, step, identity.

    All of it is on the disk before the marker is. The marker carries a digest of itself.

    Raises:
        StorageError: The disk is full or failing; the checkpoint stays uncommitted.
    """
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": read_sha256(file)}
    sync_tree(folder)
    marker = {"step": step, "attempt": attempt, "identity": identity, "files": files}
    write_json(folder / MARKER, {**marker, "digest": _digest(marker)})


def find_checkpoint(run_folder: Path, identity: Mapping[str, Any], warn: Callable[[str], None]) -> Path | None:
    """Give the newest checkpoint whose marker and files hold, or None where no training was saved yet.

    Newer folders are renamed, never deleted, with a warning: one without a marker was being written when the process
    died, one with a marker that does not hold is damaged. Where none is left to go on from, but there were some, all
    stay as they are, so that the same command says the same again and never starts from the beginning by itself.

    Raises:
        IdentityError: The checkpoint is of a run with other settings, named field by field.
        DataError: Checkpoints were committed, but every one of them is damaged.
    """
    unfit: dict[Path, str] = {}
    for step, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        problem = _problem(folder, step)
        if problem is None:
            check_same_run(folder, read_json(folder / MARKER)["identity"], identity)
            break
        unfit[folder] = problem
    else:
        folder = None
        damaged = [f"{name.name} ({problem})" for name, problem in unfit.items() if (name / MARKER).exists()]
        if damaged:
            raise DataError(
                f"{run_folder}: every checkpoint is damaged: {'; '.join(damaged)}. Restore one of them from a backup, "
                "or train from the beginning with refshard train --overwrite"
            )
    for broken, problem in unfit.items():
        kind = "damaged" if (broken / MARKER).exists() else "cut short while it was saved"
        warn(f"{broken}: {kind} ({problem}); set aside as {set_aside(broken)}, going on without it")
    return folder


def refuse_other_run(run_folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder whose newest readable checkpoint is of another run, without a look at its files.

    Raises:
        IdentityError: The differing settings are named.
    """
    for _, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        with contextlib.suppress(DataError, StorageError):
            marker = read_json(folder / MARKER)
            if _is_intact(marker):
                check_same_run(folder, marker["identity"], identity)
                return


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """Give the run's checkpoints by step, whatever their state."""
    # Only the library's own names: checkpoint-500-backup is somebody's copy, to be left alone.
    found = {p: re.fullmatch("checkpoint-([0-9]+)", p.name) for p in run_folder.glob("checkpoint-*") if p.is_dir()}
    return {int(name[1]): p for p, name in found.items() if name}


def newest_step(run_folder: Path) -> int:
    """Step of the newest committed checkpoint, 0 if there is none. Only looks; its files are not checked."""
    committed = (step for step, folder in checkpoint_folders(run_folder).items() if (folder / MARKER).exists())
    return max(committed, default=0)


def newest_whole(run_folder: Path) -> tuple[int, Path] | None:
    """Give the step and the folder of the newest checkpoint whose marker and files hold. Only looks."""
    for step, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        if _problem(folder, step) is None:
            return step, folder
    return None


def saved_policy(run_folder: Path) -> tuple[int, Path]:
    """Give step and folder of a run's policy: the finished one, or the newest whole checkpoint. Only looks.

    Raises:
        UnfinishedError: Nothing was saved yet.
    """
    if is_recorded(run_folder):
        return int(read_json(run_folder / RECORD)["step"]), run_folder
    saved = newest_whole(run_folder)
    if saved is None:
        raise UnfinishedError(f"{run_folder}: neither finished nor a whole checkpoint in it. Run: refshard train")
    return saved


def trained_weights(config: Config, folder: Path, option: str) -> Path:
    """Give the folder that holds the trained policy where a user names a run, finished or not, or a checkpoint.

    A copy of either's weights, without what a run records, will do as well.

    Args:
        config: Says whether they are an adapter's or a whole model's.
        folder: What the user named.
        option: The option that it was named with, for messages.

    Raises:
        ConfigError: It is neither, or its weights are not of this kind of policy.
        UnfinishedError: It is a run's, and nothing was saved yet.
    """
    if is_recorded(folder) or checkpoint_folders(folder) or (folder / SETTINGS).exists():
        folder = saved_policy(folder)[1]
    find: Callable[[], Path] = (
        (lambda: find_adapter(str(folder), option))
        if config.policy.has_adapter
        else (lambda: find_model(str(folder), None, option))
    )
    try:
        find()
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Name the folder of a run of these settings (its train.output_dir), or a checkpoint"
        ) from error
    return folder


def is_recorded(run_folder: Path) -> bool:
    """Whether the run is recorded as finished."""
    return (run_folder / RECORD).exists()


def delete_run(run_folder: Path) -> None:
    """Delete what an earlier run of this program recorded and saved for going on; the weights get replaced."""
    (run_folder / RECORD).unlink(missing_ok=True)
    delete_records(run_folder)
    for folder in (*checkpoint_folders(run_folder).values(), *run_folder.glob("references")):
        shutil.rmtree(folder)


def delete_older(run_folder: Path, keep: int, best: str | None = None) -> None:
    """Delete the checkpoints that are older than the newest `keep` whole ones, and at least two of those.

    Folders that are not whole are not counted. Whole means here that the marker and all sizes hold.

    Args:
        run_folder: Where they are.
        keep: The user's `save_total_limit`.
        best: Name of the one that is kept whatever its age.
    """
    folders = checkpoint_folders(run_folder)
    whole = sorted(step for step, folder in folders.items() if _problem(folder, step, digests=False) is None)
    kept = whole[-max(keep, 2) :]
    if len(kept) < max(keep, 2):
        return
    for step, folder in folders.items():
        if step < kept[0] and folder.name != best:
            # First the marker: a deletion that is cut short must not leave what looks like a damaged checkpoint.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _problem(folder: Path, step: int, *, digests: bool = True) -> str | None:
    """Say what is wrong with a checkpoint, naming the file; None if nothing is."""
    if not (folder / MARKER).exists():
        return f"it has no {MARKER}"
    try:
        marker = read_json(folder / MARKER)
    except (DataError, StorageError) as error:
        return str(error)
    if not _is_intact(marker):
        return f"{MARKER} is not as refshard wrote it"
    if marker["step"] != step:
        return f"{MARKER} is of step {marker['step']}"
    if (folder / _INCOMPLETE).exists():
        return f"it has a {_INCOMPLETE}"
    for name, expected in marker["files"].items():
        file = folder / name
        if ".." in Path(name).parts or PurePosixPath(name).is_absolute():
            return f"{MARKER} leads out of the folder, to {name}"
        if any(part.is_symlink() for part in (file, *file.parents) if part.is_relative_to(folder) and part != folder):
            return f"{name} is a link"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        # Not the cached digest: a checkpoint is judged by what is on the disk now.
        if digests and read_sha256(file) != expected["sha256"]:
            return f"{name} has another SHA-256"
    return None


def _is_intact(marker: Mapping[str, Any]) -> bool:
    content = {key: value for key, value in marker.items() if key != "digest"}
    return content.keys() == {"step", "attempt", "identity", "files"} and marker.get("digest") == _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def processes_of(checkpoint: Path) -> int:
    """Say how many processes saved a checkpoint, by the random states that are in it.

    Raises:
        DataError: There is none, or not that of every process.
    """
    found = {file.name for file in checkpoint.glob("rng_state*.pth")}
    if "rng_state.pth" in found:
        return 1
    wanted = [f"rng_state_{rank}.pth" for rank in range(max(len(found), 2))] if found else ["rng_state.pth"]
    for name in wanted:
        if name not in found:
            raise DataError(f"{checkpoint}: {name} is missing, so the run can't resume exactly")
    return len(found)
