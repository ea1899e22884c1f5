"""Steps of a training run: how many there are, and at which ones it evaluates, saves and moves its reference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a run, by the `train` section and the number of training pairs."""

    options: Mapping[str, Any]
    """The library's fields of the section. TrainingArguments' defaults hold for the others."""
    pairs: int
    processes: int
    window: int | None = None
    """Steps between two moves of the reference (`reference.sync.steps`); None if it does not move."""

    @property
    def batch_pairs(self) -> int:
        """Number of pairs per device and batch."""
        return int(self.options.get("per_device_train_batch_size", 8))

    @property
    def batches_per_step(self) -> int:
        return int(self.options.get("gradient_accumulation_steps", 1))

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.pairs / (self.batch_pairs * self.batches_per_step * self.processes)))

    @property
    def steps(self) -> int:
        limit = int(self.options.get("max_steps", -1))
        return limit if limit > 0 else math.ceil(self.steps_per_epoch * float(self.options.get("num_train_epochs", 3)))

    @property
    def epochs(self) -> float:
        """Number of epochs; the last step of an epoch takes the pairs that are left."""
        return self.steps / self.steps_per_epoch

    @property
    def evaluated(self) -> set[int]:
        """Steps at which held-out sets are evaluated; the last one too, unless the settings say `eval_strategy: no`."""
        if self.options.get("eval_strategy") == "no":
            return set()
        every = float(self.options.get("eval_steps") or self.options.get("logging_steps", 10))
        return {*self._due("eval_strategy", "no", every), self.steps}

    @property
    def saved(self) -> set[int]:
        """Steps at which a checkpoint is written; each window ends in one."""
        due = self._due("save_strategy", "steps", float(self.options.get("save_steps", 500)))
        return due if self.window is None else due | {*range(self.window, self.steps, self.window), self.steps}

    @property
    def kept_checkpoints(self) -> int | None:
        """`train.save_total_limit`; None if all are kept."""
        return int(self.options.get("save_total_limit") or 0) or None

    def passes_of_windows(self) -> tuple[float, float]:
        """Return how often all windows together score the training pairs, and, if they evaluate, the held-out pairs."""
        assert self.window is not None
        whole, rest = divmod(self.steps, self.window)
        trained = whole * min(1.0, self.window / self.steps_per_epoch) + min(1.0, rest / self.steps_per_epoch)
        return trained, float(len({step // self.window for step in self.evaluated}))

    def references_at_once(self, *, evaluates: bool) -> int:
        """Return the largest number of moved references on disk: those that a kept checkpoint may resume from.

        A reference moves at the very end too if a held-out set is evaluated on it.
        """
        assert self.window is not None
        made = self.steps // self.window if evaluates else max(0, self.steps - 1) // self.window
        if not made:
            return 0
        kept = made
        if self.kept_checkpoints is not None:
            between = min(self.window, *self.saved)
            # The oldest one's reference, those since, and the next one, written before the oldest is deleted.
            kept = min(made, math.ceil((self.kept_checkpoints - 1) * between / self.window) + 2)
        # The first move writes the first reference beside it, merged and in float32.
        return max(2, kept)

    def _due(self, option: str, default: str, every: float) -> set[int]:
        """Return the steps at which an action by steps or epochs is due, the last step among them."""
        strategy = self.options.get(option, default)
        strategy = str(getattr(strategy, "value", strategy))
        if strategy == "steps":
            period = max(1, math.ceil(every * self.steps) if every < 1 else int(every))
        elif strategy in ("epoch", "best"):
            period = self.steps_per_epoch
        else:
            return set()
        return {*range(period, self.steps, period), self.steps}
