"""Checkpoints that count: a marker with sizes and digests, written last; resume takes the newest that holds.

The library's own resume takes the highest number, accepts a missing optimizer and flipped bits, and stops at a
half-written folder. So a checkpoint without our marker is one that a kill cut short, and is set aside.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import transformers

from pipeline.attempts import Attempt, set_aside
from pipeline.config import Config, ReferenceConfig, as_dict, training_settings
from pipeline.digests import read_sha256, sha256_of_files
from pipeline.errors import ConfigError, DataError, IdentityError, StorageError, UnfinishedError
from pipeline.gate import policy_dtype
from pipeline.models import find_adapter, find_model
from pipeline.processes import largest, on_main_process
from pipeline.records import delete_records
from pipeline.runs import RECORD, SETTINGS
from pipeline.signals import StopFlag
from pipeline.sources import data_files, open_source
from pipeline.storage import read_json, sync_tree, write_json
from pipeline.trainer import EvaluationLeft, PairTrainer

__all__ = [
    "CommitCallback",
    "check_same_run",
    "checkpoint_folders",
    "commit_checkpoint",
    "delete_older",
    "delete_run",
    "find_checkpoint",
    "is_recorded",
    "newest_step",
    "newest_whole",
    "policy_as_reference",
    "refuse_other_run",
    "run_identity",
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


def check_same_run(place: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to go on with what a run with other settings left.

    Raises:
        IdentityError: The differing settings are named, both values side by side.
    """
    found = [f"{field}: saved {old!r}, this run {new!r}" for field, old, new in _differences(stored, run)]
    if found:
        raise IdentityError(
            f"{place}: saved by a run with other settings. It differs in {'; '.join(found)}. "
            "Set train.output_dir to a new folder, or pass --overwrite to start over in this one"
        )


def _differences(stored: Any, run: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two identities differ, by their full names."""
    if not (isinstance(stored, Mapping) and isinstance(run, Mapping)):
        return [] if stored == run else [(field, stored, run)]
    return [
        difference
        for key in sorted({*stored, *run})
        for difference in _differences(stored.get(key), run.get(key), f"{field}.{key}" if field else key)
    ]


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


def policy_as_reference(config: Config, folder: Path) -> Config:
    """Give settings whose reference is the trained policy in a folder: frozen, in the dtype that it computed in.

    Trained weights are kept in float32 beside bf16 products, which writing and scoring have no use for.
    """
    policy = config.policy
    # Whoever explains pairs or scores them need not have a `train` section.
    dtype: Any = policy_dtype(config, training_settings(config) if config.train else {})
    if policy.has_adapter:
        reference = ReferenceConfig(
            model=policy.model,
            revision=policy.revision,
            adapter=str(folder),
            dtype=dtype,
            quantization=policy.quantization,
        )
    else:
        reference = ReferenceConfig(model=str(folder), dtype=dtype)
    return dataclasses.replace(config, reference=reference)


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


# What may change while a run goes on, since no step's result depends on it: what is written where and how often, what
# is measured on the way, how batches are fetched, and how memory is saved. All else that a user sets must stay.
_FREE = {
    "activation_offload",
    "batch_eval_metrics",
    "bf16_full_eval",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_timeout",
    "debug",
    "disable_tqdm",
    "do_eval",
    "fp16_full_eval",
    "fsdp",
    "fsdp_config",
    # Counted together with the number of processes.
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "include_for_metrics",
    "load_best_model_at_end",
    "local_rank",
    "on_mismatch",
    "output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "push_to_hub",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "use_cpu",
}
_FREE_KINDS = ("eval_", "hub_", "log_", "logging_", "save_", "trackio_")


def run_identity(
    config: Config, settings: Mapping[str, Any], fingerprints: Mapping[str, str], processes: int
) -> dict[str, Any]:
    """What a checkpoint must agree with for training to go on from it as if it had never stopped.

    A setting that is spelled out as its default is as one that is left out. How many processes there are is free as
    long as a step sees as many pairs: micro-batches are dealt to them in turn, so that a step's pairs are the same.
    """
    defaults: dict[str, Any] = {"on_missing": "stop"}
    for field in dataclasses.fields(transformers.TrainingArguments):
        make = field.default_factory
        defaults[field.name] = field.default if isinstance(make, dataclasses._MISSING_TYPE) else make()
    fixed = {
        key: value
        for key, value in settings.items()
        if key not in _FREE and not key.startswith(_FREE_KINDS) and value != defaults.get(key)
    }
    run = as_dict(config)
    identity = {
        "fingerprints": dict(fingerprints),
        "data": run["data"],
        "dataset": _content_of_data(config),
        "policy": run["policy"],
        "loss": run["loss"],
        "sync": run["reference"]["sync"],
        "train": fixed,
        "processes x gradient_accumulation_steps": processes * settings.get("gradient_accumulation_steps", 1),
    }
    if settings.get("deepspeed"):
        # Its shares can be loaded by as many processes alone.
        identity["processes"] = processes
    # As it will be read back: without tuples and the like.
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return plain


def _content_of_data(config: Config) -> dict[str, str] | str | None:
    """Local data by content, since the order of its rows decides which pairs a step sees; other data by revision."""
    source = open_source(config.data)
    files = data_files(source)
    return sha256_of_files(files) if files else source.revision


class CommitCallback(transformers.TrainerCallback):
    """Commits each checkpoint that the library saved, and turns a stop request into a last one.

    Args:
        identity: Of the run, for the marker.
        flag: The stop request.
        attempt: This start of the run.
        keep: The user's `save_total_limit`.
        going_on_from: The checkpoint that training goes on from.
        clock: Seconds that never jump, unlike those of the wall.
    """

    # A checkpoint this young is worth as much as another one, when a second SIGTERM says that time is short.
    RECENT_SECONDS = 60.0

    def __init__(
        self,
        identity: Mapping[str, Any],
        flag: StopFlag,
        *,
        attempt: Attempt,
        keep: int | None = None,
        going_on_from: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._flag = flag
        self._attempt = attempt
        self._keep = keep
        self._going_on_from = going_on_from
        self._clock = clock
        self._committed_at: float | None = None
        self.stopped_early = False
        self.trainer: PairTrainer | None = None

    def leave_if_asked(self) -> None:
        """Leave where no training was done since the last save, if any process was asked to stop.

        Raises:
            EvaluationLeft: It was; there is nothing to save.
        """
        if self._request():
            self.stopped_early = True
            raise EvaluationLeft(save=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.leave_if_asked()
        if self._going_on_from is not None:
            assert self.trainer is not None
            self.trainer.finish_evaluation(self._going_on_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        request = self._request()
        if not request or state.global_step >= state.max_steps:
            return
        self.stopped_early = True
        control.should_training_stop = True
        control.should_save = request == _SAVE
        if request == _LEAVE:
            control.should_evaluate = control.should_log = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An evaluation may take longer than the time between a signal and the end.
        request = self._request()
        if request:
            self.stopped_early = True
            raise EvaluationLeft(save=request == _SAVE)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The library comes here when it leaves an epoch in its middle, too.
        if self.stopped_early:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        # Every rank saves its own random state; the marker may only follow the last of them.
        self.trainer.accelerator.wait_for_everyone()
        on_main_process(lambda: self._commit(Path(args.output_dir), state))
        self._committed_at = self._clock()

    def _commit(self, run_folder: Path, state: Any) -> None:
        step = state.global_step
        self._attempt.check()
        commit_checkpoint(run_folder / f"checkpoint-{step}", step, self._identity, self._attempt.number)
        if self._keep:
            best = state.best_model_checkpoint
            delete_older(run_folder, self._keep, best and Path(best).name)

    def _request(self) -> int:
        """Processes get their signals at different times; all do after a step what any of them was asked."""
        own = _SAVE if self._flag else 0
        if self._flag.is_urgent and self._committed_at is not None:
            own = _LEAVE if self._clock() - self._committed_at < self.RECENT_SECONDS else _SAVE
        return largest(own)


# Save and leave; leave without another save.
_SAVE, _LEAVE = 1, 2


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
