"""Commit checkpoints after each save, and answer stop requests at the end of a step."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from accelerate import PartialState

from pipeline.base.digests import WatchedFiles
from pipeline.base.signals import StopFlag
from pipeline.run.attempts import Attempt
from pipeline.run.checkpoints import commit_checkpoint, delete_older
from pipeline.training.processes import largest, on_main_process
from pipeline.training.trainer import EvaluationLeft

__all__ = ["CommitCallback"]

_SAVE, _LEAVE = 1, 2
"""Answers to a stop request: save and leave; leave without another save"""


class CommitCallback(transformers.TrainerCallback):
    """Commits each checkpoint that the library saved, and saves a last one on a stop request.

    `keep` is the user's `save_total_limit`. A checkpoint is committed only if none of the files in `watched` has
    changed. `clock` gives seconds that never jump, unlike the wall clock's.
    """

    # On a second SIGTERM time is short, and a checkpoint of this age is not saved again.
    RECENT_SECONDS = 60.0

    def __init__(
        self,
        identity: Mapping[str, Any],
        flag: StopFlag,
        *,
        attempt: Attempt,
        keep: int | None = None,
        watched: Sequence[WatchedFiles] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._flag = flag
        self._attempt = attempt
        self._keep = keep
        self._watched = watched
        self._clock = clock
        self._committed_at: float | None = None
        self.stopped_early = False

    def check_files(self) -> None:
        """Raise IdentityError if a file in use has changed."""
        for files in self._watched:
            files.check()

    def leave_if_asked(self) -> None:
        """Raise EvaluationLeft if any process was asked to stop, at a point where there is nothing to save."""
        if self._request():
            self.stopped_early = True
            raise EvaluationLeft(save=False)

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
        # An evaluation may take longer than the time between a signal and the kill.
        request = self._request()
        if request:
            self.stopped_early = True
            raise EvaluationLeft(save=request == _SAVE)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The library also calls this when it leaves an epoch in its middle.
        if self.stopped_early:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir():
            return  # Its weights are not finite, and were not saved.
        # Every rank saves its own random state. The marker must follow the last of them.
        PartialState().wait_for_everyone()
        on_main_process(lambda: self._commit(Path(args.output_dir), state))
        self._committed_at = self._clock()

    def _commit(self, run_folder: Path, state: Any) -> None:
        step = state.global_step
        self.check_files()
        self._attempt.check()
        commit_checkpoint(run_folder / f"checkpoint-{step}", step, self._identity, self._attempt.number)
        if self._keep:
            best = state.best_model_checkpoint
            delete_older(run_folder, self._keep, best and Path(best).name)

    def _request(self) -> int:
        """Agree on an answer: signals come to processes at different times, and any process's request counts."""
        own = _SAVE if self._flag else 0
        if self._flag.is_urgent and self._committed_at is not None:
            own = _LEAVE if self._clock() - self._committed_at < self.RECENT_SECONDS else _SAVE
        return largest(own)
