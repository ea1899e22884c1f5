"""Committed checkpoints: a marker with sizes and digests is written last, and resume takes the newest that holds.

The library's own resume takes the highest number, accepts a missing optimizer and flipped bits, and stops at a
half-written folder. Here a checkpoint without a marker counts as cut short by a kill, and is set aside.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.digests import read_sha256
from pipeline.base.errors import ConfigError, DataError, IdentityError, StorageError, UnfinishedError
from pipeline.base.files import TEMPORARY, delete_named, read_json, sync_tree, write_json
from pipeline.base.schemas import Schema
from pipeline.config.schema import Config
from pipeline.models.files import NamedModel, find_adapter
from pipeline.run.attempts import set_aside
from pipeline.run.identity import check_same_run, is_longer
from pipeline.run.reading import RECORD, SETTINGS, read_record
from pipeline.run.records import delete_records

__all__ = [
    "best_checkpoint",
    "checkpoint_folders",
    "commit_checkpoint",
    "delete_older",
    "delete_references",
    "delete_run",
    "digests_of_weights",
    "find_checkpoint",
    "is_last",
    "is_recorded",
    "newest_identity",
    "newest_step",
    "problem_of",
    "processes_of",
    "reference_folder",
    "reference_folders",
    "refuse_other_run",
    "reopening",
    "saved_policy",
    "trained_weights",
]

MARKER = "refshard-commit.json"
_MARKER_SCHEMA = Schema(__package__, "commit")
_REFERENCE = "step-([0-9]{8,})"


def commit_checkpoint(
    folder: Path, step: int, identity: Mapping[str, Any], attempt: int = 0, *, marker_name: str = MARKER
) -> None:
    """Write the marker of a complete checkpoint: sizes and SHA-256 of its files, step, identity, its own digest.

    All files are synced to the disk before the marker is written.

    Raises:
        StorageError: The disk is full or failing; the checkpoint stays uncommitted.
    """
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != marker_name):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": read_sha256(file)}
    sync_tree(folder)
    marker = {"step": step, "attempt": attempt, "identity": identity, "files": files}
    write_json(folder / marker_name, {**marker, "digest": _digest(marker)})


def find_checkpoint(run_folder: Path, identity: Mapping[str, Any], warn: Callable[[str], None]) -> Path | None:
    """Give the newest checkpoint whose marker and files hold, or None if none was committed yet.

    Newer folders are renamed, never deleted, with a warning. One without a marker was being written when the process
    died; one whose marker does not hold is damaged. If all committed ones are damaged, they stay as they are, so that
    the same command fails again and never starts over by itself.

    Raises:
        IdentityError: The checkpoint is of a run with other settings; each is named.
        DataError: Checkpoints were committed, but all of them are damaged.
    """
    unfit: dict[Path, str] = {}
    for step, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        problem = problem_of(folder, step)
        if problem is None:
            check_same_run(folder, _read_marker(folder / MARKER)["identity"], identity)
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
        warn(f"{broken}: {kind} ({problem}); set aside as {set_aside(broken)}")
    return folder


def refuse_other_run(run_folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise IdentityError if the newest readable marker is of another run. Checkpoints' files are not read."""
    found = newest_identity(run_folder)
    if found is not None:
        check_same_run(*found, identity)


def newest_identity(run_folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Give the newest checkpoint with a readable marker, and the run's identity in it. Other files are not read."""
    for _, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        with contextlib.suppress(DataError, StorageError):
            return folder, _read_marker(folder / MARKER)["identity"]
    return None


def best_checkpoint(run_folder: Path, saved_as: str) -> Path:
    """Give the best checkpoint after a check; `saved_as` is its path before the run's folder may have moved.

    Raises DataError if it is damaged or gone.
    """
    folder = run_folder / Path(saved_as).name
    problem = problem_of(folder, int(folder.name.rpartition("-")[2])) if folder.exists() else "it is gone"
    if problem is not None:
        raise DataError(
            f"{folder}: must be the run's best checkpoint as it was saved, but {problem}. Restore it from a backup, or "
            "set train.load_best_model_at_end: false to keep the last step's policy; the same command then ends the run"
        )
    return folder


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """Give the run's checkpoints by step, whatever their state."""
    # Only the library's own names: checkpoint-500-backup is a user's copy.
    found = {p: re.fullmatch("checkpoint-([0-9]+)", p.name) for p in run_folder.glob("checkpoint-*") if p.is_dir()}
    return {int(name[1]): p for p, name in found.items() if name}


def newest_step(run_folder: Path) -> int:
    """Give the step of the newest committed checkpoint, 0 if there is none. Its files are not checked."""
    committed = (step for step, folder in checkpoint_folders(run_folder).items() if (folder / MARKER).exists())
    return max(committed, default=0)


def saved_policy(run_folder: Path) -> tuple[int, Path]:
    """Give step and folder of a run's policy: the finished one, or the newest whole checkpoint.

    Raises UnfinishedError if nothing was saved yet.
    """
    if is_recorded(run_folder):
        return int(read_record(run_folder)["step"]), run_folder
    for step, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        if problem_of(folder, step) is None:
            return step, folder
    raise UnfinishedError(f"{run_folder}: neither finished nor a whole checkpoint in it. Run: refshard train")


def trained_weights(config: Config, folder: Path, option: str) -> Path:
    """Give the folder that holds a trained policy.

    Args:
        config: Settings of the policy: an adapter or a whole model.
        folder: Folder of a run, finished or not, of a checkpoint, or of a copy of its weights.
        option: Option that names the folder, for messages.

    Raises:
        ConfigError: The folder holds no weights of this kind of policy.
        UnfinishedError: The folder is a run's, and nothing was saved yet.
    """
    if is_recorded(folder) or checkpoint_folders(folder) or (folder / SETTINGS).exists():
        folder = saved_policy(folder)[1]
    try:
        if config.policy.has_adapter:
            find_adapter(str(folder), option)
        else:
            NamedModel(str(folder), None, option).folder()
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Name the folder of a run of these settings (its train.output_dir), or a checkpoint"
        ) from error
    return folder


def is_last(checkpoint: Path, identity: Mapping[str, Any]) -> bool:
    """Return True if a committed checkpoint is that of the run's last step, and the run was not made longer since."""
    state = read_json(checkpoint / "trainer_state.json")
    is_done = state["global_step"] >= state["max_steps"]
    return bool(is_done) and not is_longer(_read_marker(checkpoint / MARKER)["identity"], identity)


def reopening(run_folder: Path, record: Mapping[str, Any]) -> str:
    """Say where a finished run that was made longer resumes. Raises IdentityError if it has kept no checkpoint."""
    step, done = newest_step(run_folder), record.get("trained_steps", record["step"])
    if not step:
        raise IdentityError(
            f"{run_folder}: can't be made longer: it is finished after {done} steps and has kept no checkpoint to "
            "resume. Set train.output_dir to a new folder, or pass --overwrite to start over in this one"
        )
    return f"{run_folder}: finished after step {done}, and made longer since; it resumes after step {step}."


def is_recorded(run_folder: Path) -> bool:
    """Return True if the run is recorded as finished."""
    return (run_folder / RECORD).exists()


def delete_run(run_folder: Path) -> None:
    """Delete an earlier run's records and checkpoints. Its weights stay until they are replaced."""
    (run_folder / RECORD).unlink(missing_ok=True)
    delete_records(run_folder)
    delete_references(run_folder)
    for folder in checkpoint_folders(run_folder).values():
        shutil.rmtree(folder)


def delete_references(run_folder: Path) -> None:
    """Delete a run's moved references."""
    delete_named(run_folder / "references", re.compile(rf"{_REFERENCE}|{TEMPORARY.pattern}"))


def reference_folder(run_folder: Path, step: int) -> Path:
    """Give the folder of the moved reference after a step."""
    return run_folder / "references" / f"step-{step:08d}"


def reference_folders(run_folder: Path) -> dict[int, Path]:
    """Give the run's moved references by step."""
    found = {path: re.fullmatch(_REFERENCE, path.name) for path in (run_folder / "references").glob("step-*")}
    return {int(name[1]): path for path, name in found.items() if name}


def delete_older(run_folder: Path, keep: int, best: str | None = None) -> None:
    """Delete the checkpoints that are older than the newest `keep` whole ones (at least 2).

    A whole checkpoint is one whose marker and sizes hold. Others are not counted. The one named `best` is kept at any
    age.
    """
    folders = checkpoint_folders(run_folder)
    whole = sorted(step for step, folder in folders.items() if problem_of(folder, step, digests=False) is None)
    kept = whole[-max(keep, 2) :]
    if len(kept) < max(keep, 2):
        return
    for step, folder in folders.items():
        if step < kept[0] and folder.name != best:
            # The marker first, so that a deletion that is cut short does not look like damage.
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def problem_of(folder: Path, step: int, *, digests: bool = True, marker_name: str = MARKER) -> str | None:
    """Describe what is wrong with a committed folder; None if nothing is."""
    if not (folder / marker_name).exists():
        return f"it has no {marker_name}"
    try:
        marker = _read_marker(folder / marker_name)
    except (DataError, StorageError) as error:
        return str(error)
    if marker["step"] != step:
        return f"{marker_name} is of step {marker['step']}"
    for name, expected in marker["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{name} leads out of the folder"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        # Not the cached digest: the disk's content may have changed.
        if digests and read_sha256(file) != expected["sha256"]:
            return f"{name} has another SHA-256"
    return None


def _read_marker(file: Path) -> dict[str, Any]:
    """Read a marker. Raises DataError if it is damaged or was edited, StorageError if it can't be read."""
    marker = _MARKER_SCHEMA.read(file)
    if marker["digest"] != _digest({key: value for key, value in marker.items() if key != "digest"}):
        raise DataError(f"{file}: edited or damaged, its digest is not that of its content")
    return marker


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests_of_weights(checkpoint: Path) -> dict[str, str]:
    """Give the SHA-256 of weight files that a checkpoint's marker has recorded; nothing without an intact marker."""
    with contextlib.suppress(DataError, StorageError):
        files = _read_marker(checkpoint / MARKER)["files"].items()
        return {name: file["sha256"] for name, file in files if name.endswith(".safetensors")}
    return {}


def processes_of(checkpoint: Path) -> int:
    """Count the processes that saved a checkpoint, by their random states. Raises DataError if one is missing."""
    found = {file.name for file in checkpoint.glob("rng_state*.pth")}
    if "rng_state.pth" in found:
        return 1
    wanted = [f"rng_state_{rank}.pth" for rank in range(max(len(found), 2))] if found else ["rng_state.pth"]
    for name in wanted:
        if name not in found:
            raise DataError(f"{checkpoint}: {name} is missing, so the run can't resume exactly")
    return len(found)
