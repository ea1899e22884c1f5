"""Checkpoints that count: a marker with sizes and digests, written last; resume takes the newest that holds.

The library's own resume takes the highest number, accepts a missing optimizer and flipped bits, and stops at a
half-written folder. So a checkpoint without our marker is one that a kill cut short, and is set aside.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers

from pipeline.config import Config, as_dict
from pipeline.digests import read_sha256
from pipeline.errors import DataError, IdentityError
from pipeline.signals import StopFlag
from pipeline.storage import read_json, write_json

__all__ = [
    "RUN",
    "CommitCallback",
    "check_same_run",
    "checkpoint_folders",
    "commit_checkpoint",
    "delete_run",
    "find_checkpoint",
    "is_recorded",
    "newest_step",
    "run_identity",
]

MARKER, RUN = "refshard-commit.json", "run.json"


def commit_checkpoint(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Write the marker of a checkpoint whose files are all there: their sizes and SHA-256, step, identity."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": read_sha256(file)}
    write_json(folder / MARKER, {"step": step, "identity": identity, "files": files})


def find_checkpoint(run_folder: Path, identity: Mapping[str, Any], warn: Callable[[str], None]) -> Path | None:
    """Give the newest checkpoint whose marker and files hold, or None where no training was saved yet.

    A folder without a marker was being written when the process died: it is renamed, never deleted. One with a
    marker that does not hold is damaged: it is renamed too, with a warning, and the one before is taken.

    Raises:
        IdentityError: The checkpoint is of a run with other settings, named field by field.
        DataError: Checkpoints were committed, but every one of them is damaged.
    """
    damaged = []
    for _, folder in sorted(checkpoint_folders(run_folder).items(), reverse=True):
        if not (folder / MARKER).exists():
            _set_aside(folder)
            warn(f"{folder}: cut short while it was saved; set aside")
            continue
        problem = _problem(folder)
        if problem is None:
            check_same_run(folder, read_json(folder / MARKER)["identity"], identity)
            return folder
        damaged.append(folder)
        _set_aside(folder)
        warn(f"{folder}: damaged ({problem}); set aside, going back to the one before")
    if damaged:
        raise DataError(
            f"{run_folder}: no whole checkpoint is left, the last damaged one was {damaged[-1].name}. "
            "Run again to train from the beginning, or restore it from a backup"
        )
    return None


def check_same_run(place: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to go on with what a run with other settings left.

    Raises:
        IdentityError: The differing settings are named, both values side by side.
    """
    found = [
        f"{key}: saved {stored.get(key)!r}, this run {run.get(key)!r}"
        for key in sorted({*stored, *run})
        if stored.get(key) != run.get(key)
    ]
    if found:
        raise IdentityError(
            f"{place}: saved by a run with other settings. It differs in {'; '.join(found)}. "
            "Set train.output_dir to a new folder, or pass --overwrite to start over in this one"
        )


def checkpoint_folders(run_folder: Path) -> dict[int, Path]:
    """Give the run's checkpoints by step, whatever their state."""
    # Only the library's own names: checkpoint-500-backup is somebody's copy, to be left alone.
    found = {p: re.fullmatch("checkpoint-([0-9]+)", p.name) for p in run_folder.glob("checkpoint-*") if p.is_dir()}
    return {int(name[1]): p for p, name in found.items() if name}


def newest_step(run_folder: Path) -> int:
    """Step of the newest committed checkpoint, 0 if there is none. Only looks; its files are not checked."""
    committed = (step for step, folder in checkpoint_folders(run_folder).items() if (folder / MARKER).exists())
    return max(committed, default=0)


def is_recorded(run_folder: Path) -> bool:
    """Whether the run is recorded as finished."""
    return (run_folder / RUN).exists()


def delete_run(run_folder: Path) -> None:
    """Delete what an earlier run of this program recorded and saved for going on; the weights get replaced."""
    (run_folder / RUN).unlink(missing_ok=True)
    for folder in (*run_folder.glob("checkpoint-*"), *run_folder.glob("references")):
        shutil.rmtree(folder)


def run_identity(
    config: Config, settings: Mapping[str, Any], fingerprints: Mapping[str, str], processes: int
) -> dict[str, Any]:
    """What a checkpoint must agree with for training to go on from it as if it had never stopped."""
    fixed = (
        "seed",
        "data_seed",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim",
        "optim_args",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "weight_decay",
        "max_grad_norm",
        "bf16",
        "fp16",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "max_steps",
    )
    run = as_dict(config)
    return {
        "fingerprints": dict(fingerprints),
        "data": run["data"],
        "policy": run["policy"],
        "loss": run["loss"],
        "sync": run["reference"]["sync"],
        "train": {key: settings[key] for key in fixed if key in settings},
        "processes": processes,
    }


class CommitCallback(transformers.TrainerCallback):
    """Commits each checkpoint that the library saved, and turns a stop request into a last one."""

    def __init__(self, identity: Mapping[str, Any], flag: StopFlag) -> None:
        self._identity = identity
        self._flag = flag
        self.stopped_early = False
        self.trainer: transformers.Trainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agree() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self.stopped_early = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The library comes here when it leaves an epoch in its middle, too.
        if self.stopped_early:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        # Every rank saves its own random state; the marker may only follow the last of them.
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            commit_checkpoint(
                Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step, self._identity
            )
        self.trainer.accelerator.wait_for_everyone()

    def _agree(self) -> bool:
        """Ranks get their signals at different times; all stop at the step after which any of them had one."""
        assert self.trainer is not None
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return bool(self._flag)
        import torch

        flags = torch.tensor([int(bool(self._flag))], device=accelerator.device)
        return bool(accelerator.reduce(flags, reduction="sum").item())


def _problem(folder: Path) -> str | None:
    try:
        marker = read_json(folder / MARKER)
    except DataError as error:
        return str(error)
    if not isinstance(marker.get("files"), dict) or not isinstance(marker.get("identity"), dict):
        return "its marker is not one of refshard"
    for name, expected in marker["files"].items():
        file = folder / name
        if ".." in Path(name).parts or not file.is_file():
            return f"{name} is missing"
        if not isinstance(expected, dict) or not expected.keys() >= {"bytes", "sha256"}:
            return "its marker is not one of refshard"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        # Not the cached digest: a checkpoint is judged by what is on the disk now.
        if read_sha256(file) != expected["sha256"]:
            return f"{name} has another SHA-256"
    return None


def _set_aside(folder: Path) -> None:
    number = 0
    while (target := folder.with_name(f"broken-{folder.name}-{number}")).exists():
        number += 1
    # Another worker may be looking at the same folders.
    with contextlib.suppress(FileNotFoundError):
        folder.rename(target)
