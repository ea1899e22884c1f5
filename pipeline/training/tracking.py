"""Give a run one page in the library's trackers, with refshard's settings and what stage one took."""

import contextlib
import dataclasses
import importlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations import integration_utils

from pipeline.base.errors import DataError, StorageError
from pipeline.base.files import read_json, write_json
from pipeline.base.nested import flatten
from pipeline.config.reader import as_dict
from pipeline.config.schema import Config
from pipeline.run.attempts import Attempt
from pipeline.run.inputs import RunInputs
from pipeline.run.records import PAGES

__all__ = ["TrackedArguments", "attach", "one_page"]

_LEFT_OUT = ("train", "cluster")
"""Sections that are not attached: the library attaches its own fields of `train`, and jobs are not part of a run"""


class TrackedArguments(transformers.TrainingArguments):
    """The library's arguments, with further settings in `to_dict`, from which its trackers take a run's settings."""

    attached: Mapping[str, Any] = {}
    """Values by name, such as `loss/beta`; not a field, so no setting of `train`"""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.attached}  # type: ignore[no-untyped-call]


def attach(arguments: transformers.TrainingArguments, config: Config, inputs: RunInputs) -> None:
    """Let trackers show refshard's own settings (`loss/beta`), and stage one (`stage_one/tokens`), on the run's page.

    Call it before training begins. A name has the characters that all trackers take.
    """
    assert isinstance(arguments, TrackedArguments)
    settings = {name: value for name, value in as_dict(config).items() if name not in _LEFT_OUT}
    own = [field.name for field in dataclasses.fields(config.train) if field.name not in ("output_dir", "given")]
    settings["train"] = {name: getattr(config.train, name) for name in own}
    costs, reference = inputs.stage_one, inputs.reference
    summed = {key: math.fsum(cost.get(key) or 0 for cost in costs) for key in ("pairs", "tokens", "seconds")}
    devices = sorted({str(cost["device"]) for cost in costs if cost.get("device") is not None})
    settings["stage_one"] = {
        **({} if reference is None else {"reference": reference.name, "fingerprint": reference.fingerprint}),
        **(summed if costs else {}),
        **({"device": ", ".join(devices)} if devices else {}),
    }
    # MLflow's characters; the others take these too.
    flat = flatten(settings, "/")
    arguments.attached = {re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name): value for name, value in flat.items()}


@contextlib.contextmanager
def one_page(trainer: transformers.Trainer, attempt: Attempt, *, resumes: bool) -> Iterator[None]:
    """Train in this block with one page for the run in each tracker, which a later attempt continues.

    The library would open another page for each attempt, each window of `reference.sync`, and for an evaluation after
    the training. What the environment says of a page holds.

    Args:
        trainer: The trainer, with its trackers.
        attempt: The attempt that trains.
        resumes: It resumes a checkpoint; without one the run begins anew, on new pages.
    """
    kinds = {kind: name for name, kind in integration_utils.INTEGRATION_TO_CALLBACK.items()}
    trackers = {kinds[type(one)]: one for one in trainer.callback_handler.callbacks if type(one) in kinds}
    pages = _read_pages(attempt.run_folder) if resumes else {}
    variables = _continued(trainer, trackers, attempt.run_folder, pages)
    if trackers:
        trainer.add_callback(_PageWriter(attempt, trackers, pages))
    for tracker in trackers.values():
        vars(tracker)["on_train_end"] = lambda *args, **kwargs: None
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
        for tracker in trackers.values():
            del vars(tracker)["on_train_end"]
    model = {"model": trainer.model, "processing_class": trainer.processing_class}
    for tracker in trackers.values():
        tracker.on_train_end(trainer.args, trainer.state, trainer.control, **model)


def _read_pages(run_folder: Path) -> dict[str, str]:
    """Read the names of the pages of the attempts before; none if the file is missing or damaged."""
    with contextlib.suppress(DataError, StorageError):
        return {name: str(page) for name, page in read_json(run_folder / PAGES).items()}
    return {}


def _continued(
    trainer: transformers.Trainer, trackers: Mapping[str, Any], run_folder: Path, pages: Mapping[str, str]
) -> dict[str, str]:
    """Have the trackers continue their pages; return the variables by which some are told."""
    pages = {name: page for name, page in pages.items() if name in trackers}
    if "trackio" in pages:
        trainer.args.run_name = trainer.args.run_name or pages["trackio"]
    if "tensorboard" in pages:
        tensorboard = trackers["tensorboard"]
        tensorboard.logging_dir = tensorboard.logging_dir or str(run_folder / pages["tensorboard"])
    variables = {}
    if "wandb" in pages:
        variables = {"WANDB_RUN_ID": pages["wandb"], "WANDB_RESUME": "allow"}
    if "mlflow" in pages and _is_in_mlflow(pages["mlflow"]):
        # MLflow refuses other settings than those of the first attempt, with an error in the log.
        variables |= {"MLFLOW_RUN_ID": pages["mlflow"], "MLFLOW_MAX_LOG_PARAMS": "0"}
    return variables


def _is_in_mlflow(page: str) -> bool:
    """Return True if the run can be continued: it is on this server, and was not deleted."""
    mlflow = importlib.import_module("mlflow")
    try:
        return bool(mlflow.get_run(page).info.lifecycle_stage == "active")
    except mlflow.exceptions.MlflowException:
        return False


class _PageWriter(transformers.TrainerCallback):
    """Writes the names of the pages to the run's folder once they are open. The trackers' callbacks come before it."""

    def __init__(self, attempt: Attempt, trackers: Mapping[str, Any], pages: Mapping[str, str]) -> None:
        self._attempt, self._trackers, self._pages = attempt, trackers, pages

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._attempt.is_newest():
            return
        folder = self._attempt.run_folder
        pages = {name: page for name, tracker in self._trackers.items() if (page := _page_of(name, tracker, folder))}
        # As with the other records for people, a disk that refuses it stops no run.
        with contextlib.suppress(StorageError):
            # Those of a tracker that this attempt does not use stay.
            write_json(folder / PAGES, {**self._pages, **pages})


def _page_of(name: str, tracker: Any, run_folder: Path) -> str | None:
    """Return what a tracker finds its open page by; None for one whose pages are not continued."""
    if name == "tensorboard":
        page = Path(tracker.logging_dir)
        # A run's folder may be moved.
        return str(page.relative_to(run_folder) if page.is_relative_to(run_folder) else page.resolve())
    if name not in ("wandb", "mlflow", "trackio"):
        return None
    library = importlib.import_module(name)
    if name == "mlflow":
        run = library.active_run()
        return run and str(run.info.run_id)
    if name == "trackio":
        run = library.context_vars.current_run.get()
        return run and str(run.name)
    return library.run and str(library.run.id)
