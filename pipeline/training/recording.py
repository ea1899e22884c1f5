"""Record training as it runs: the progress line, the run's log, the margins of its pairs."""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from pipeline.base.progress import Progress, emit, say
from pipeline.base.versions import library_versions
from pipeline.run.attempts import Attempt
from pipeline.run.records import RunLog, write_margins
from pipeline.scoring.memory import name_of_device, peak_memory

__all__ = ["Margins", "RecordCallback"]

_LAST_TRAINED = 2048
"""Number of trained pairs whose margins are kept: enough for a histogram"""

_SHOWN = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
"""Word for people -> metric"""


_Pair = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Ids of a pair, [3], and its margins, [5]"""


class Margins:
    """Collects the margins of pairs during training and evaluation, and writes them when a set is done.

    `only_set` is the name of the held-out set, if there is exactly one.
    """

    def __init__(self, attempt: Attempt, only_set: str | None) -> None:
        self._attempt = attempt
        self._only_set = only_set
        self._held_out: list[_Pair] = []
        self._trained: deque[_Pair] = deque(maxlen=_LAST_TRAINED)

    def add(self, columns: Mapping[str, torch.Tensor], ids: torch.Tensor, *, training: bool) -> None:
        """Add the pairs of a micro-batch, of all processes: each column [P], their ids [P, 3]."""
        policy = columns["logps/chosen"] - columns["logps/rejected"]
        # Without a reference, nothing is subtracted.
        shift = columns.get("logps/chosen_shift", columns["logps/chosen"])
        ref = columns.get("ref/margins", torch.zeros_like(policy))
        # log-ratio margin = chosen shift - rejected shift = policy margin - reference margin
        rejected_shift = shift - (policy - ref)
        values = [ref, policy, columns["rewards/margins"], shift, rejected_shift]
        pairs = zip(ids.numpy(), torch.stack(values, dim=1).float().numpy(), strict=True)
        (self._trained if training else self._held_out).extend(pairs)

    def finish_set(self, prefix: str, step: int) -> None:
        """Write the margins of a held-out set, which the library names by its metrics' prefix."""
        name = prefix.removeprefix("eval").removeprefix("_") or self._only_set
        if self._held_out and name is not None:
            self._write(name, step, self._held_out)
        self.forget()

    def forget(self) -> None:
        """Drop the margins of a set whose evaluation was left."""
        self._held_out = []

    def finish_training(self, step: int) -> None:
        """Write the margins of the last trained pairs."""
        if self._trained:
            self._write("train", step, self._trained)

    def _write(self, name: str, step: int, pairs: Iterable[_Pair]) -> None:
        # An attempt that another has taken over from must not overwrite that one's.
        if self._attempt.is_newest():
            ids, values = map(np.stack, zip(*pairs, strict=True))
            write_margins(self._attempt.run_folder, name, step, ids, values)


class RecordCallback(transformers.TrainerCallback):
    """Writes the run's log and its progress line, in place of the library's own.

    Args:
        log: The run's log.
        margins: The margins that the trainer collects.
        about: Sizes of the run, for the attempt's first line.
    """

    def __init__(self, log: RunLog, margins: Margins, about: Mapping[str, Any]) -> None:
        self._log = log
        self._margins = margins
        self._about = about
        self._progress: Progress | None = None
        self._tokens = self._evaluated = 0

    def _begun(self, args: Any, state: Any) -> Progress | None:
        """Give the attempt's progress, begun at the first event; None on all processes but the first.

        If all steps were done before, the first event is one of an evaluation.
        """
        if self._progress is None and args.process_index == 0:
            self._tokens = state.num_input_tokens_seen
            self._progress = Progress("train", state.max_steps, "steps", done=state.global_step)
            steps = {"step": state.global_step, "max_steps": state.max_steps}
            where = {"device": name_of_device(args.device), "versions": library_versions()}
            self._add("start", {**steps, **self._about, **where})
        return self._progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is None:
            return
        tokens = state.num_input_tokens_seen - self._tokens
        self._tokens = state.num_input_tokens_seen
        self._progress.advance(1, tokens=tokens, memory=peak_memory(args.device))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        progress = self._begun(args, state)
        if progress is None:
            return
        kind = "summary" if "train_runtime" in logs else "log"
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        measured = {"seconds": progress.seconds, "memory_bytes": peak_memory(args.device)}
        self._add(kind, {"step": state.global_step, "epoch": state.epoch, **measured, **numbers})
        if "loss" in logs:
            progress.show({name: logs[key] for name, key in _SHOWN.items() if key in logs})
        elif prefix := next((key[: -len("loss")] for key in logs if key.endswith("_loss") and kind == "log"), None):
            shown = [f"{name} {logs[prefix + key]:.4g}" for name, key in _SHOWN.items() if prefix + key in logs]
            name = prefix.removeprefix("eval").rstrip("_").replace("_", " ", 1)
            say(f"step {state.global_step:,}: held-out{name} {', '.join(shown)}")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self._evaluated += 1
        progress = self._begun(args, state)
        if progress is not None and eval_dataloader is not None:
            progress.pulse(f"evaluating, batch {self._evaluated:,} of {len(eval_dataloader):,}")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = 0

    def pulse(self, doing: str) -> None:
        """Show what the run does before its first step."""
        if self._progress is not None:
            self._progress.pulse(doing)

    def restart(self) -> None:
        """Let time and rates count from here: the gate is passed."""
        if self._progress is not None:
            self._progress.restart()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.close()
            self._margins.finish_training(state.global_step)

    def end(self, step: int, *, finished: bool) -> None:
        """Log the end of the attempt, after all evaluations."""
        if self._progress is not None:
            self._progress.close()
            self._add("end", {"step": step, "finished": finished})

    def _add(self, kind: str, record: Mapping[str, Any]) -> None:
        self._log.add(kind, record)
        emit(kind, record)
