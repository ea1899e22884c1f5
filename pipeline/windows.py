"""TR-DPO's windows: consecutive optimizer steps that share one reference, and where each of them keeps its things.

The reference moves after steps K, 2K, ... Window w trains steps wK + 1 to (w + 1)K on the reference as it stands
after step wK; an evaluation at step wK sees the moved reference already. Where a run stands is read from its
checkpoints, so that every process finds out by itself.

    precompute.output/window-00002/train    log-probs of the pairs of window 2 alone
    train.output_dir/references/step-1024   the reference of window 2, float32, where K is 512
"""

import dataclasses
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from pipeline.checkpoints import newest_step
from pipeline.config import Config, ReferenceConfig
from pipeline.digests import sha256_of_file
from pipeline.errors import DataError
from pipeline.mixing import MARKER, mix
from pipeline.models import reference_dtype
from pipeline.order import Order
from pipeline.storage import read_json

__all__ = ["Window", "WindowCallback", "make_window", "next_window", "prepare_reference", "window_config"]


@dataclass(frozen=True)
class Window:
    """Steps first + 1 to last, on the reference as it stands after step first."""

    number: int
    first: int
    last: int
    evaluations: frozenset[int]
    """Steps at which held-out sets are evaluated on this window's reference, `first` among them if it is one"""
    is_last: bool


def next_window(config: Config, arguments: transformers.TrainingArguments, order: Order) -> Window:
    """Give the window that the run's newest checkpoint stands in."""
    assert config.reference.sync is not None
    step = newest_step(Path(str(arguments.output_dir)))
    return make_window(config, arguments, order, step // config.reference.sync.steps)


def make_window(config: Config, arguments: transformers.TrainingArguments, order: Order, number: int) -> Window:
    """Give window `number`, or the last one there is."""
    assert config.reference.sync is not None
    size, total = config.reference.sync.steps, len(order.steps)
    evaluated = _evaluated_steps(arguments, order) if config.data.eval else set()
    # Where the reference moves at the very end, an evaluation there has a window of its own, without steps.
    last_number = total // size if total % size or total in evaluated else total // size - 1
    number = min(number, last_number)
    return Window(
        number=number,
        first=size * number,
        last=min(size * (number + 1), total),
        evaluations=frozenset(step for step in evaluated if step // size == number),
        is_last=number == last_number,
    )


def _evaluated_steps(arguments: transformers.TrainingArguments, order: Order) -> set[int]:
    """Steps at which the library evaluates, and the last one, whose metrics go into the model card."""
    total = len(order.steps)
    steps = {total}
    if arguments.eval_on_start:
        steps.add(0)
    strategy = str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy))
    if strategy == "steps":
        every = arguments.eval_steps or 1
        every = math.ceil(total * every) if every < 1 else int(every)
        steps |= {step for step in range(every, total, every) if step >= arguments.eval_delay}
    elif strategy == "epoch":
        per_epoch = order.steps_per_epoch
        steps |= {step for step in range(per_epoch, total, per_epoch) if step / per_epoch >= arguments.eval_delay}
    return steps


def window_config(config: Config, window: Window, output: Path) -> Config:
    """Give the settings of one window: the run's own, with the reference and the stores of this window."""
    if window.number == 0:
        return dataclasses.replace(config, reference=dataclasses.replace(config.reference, sync=None))
    folder = _reference_folder(output, window.first)
    return dataclasses.replace(
        config,
        reference=ReferenceConfig(model=str(folder), dtype=reference_dtype(config)),
        precompute=dataclasses.replace(config.precompute, output=str(folder / "shards"), reuse=[]),
    )


def _reference_folder(output: Path, step: int) -> Path:
    """Folder of the reference as it stands after a step."""
    return output / "references" / f"step-{step:08d}"


def prepare_reference(config: Config, window: Window, output: Path) -> None:
    """Make the window's reference, unless it is there: the one before, moved toward the window's first checkpoint.

    A reference that was made from another training than the checkpoint's (a run that went back to an older
    checkpoint may come out differently) is made again, and its log-probs go with it.

    Raises:
        DataError: What it is made from is gone.
    """
    assert config.reference.sync is not None
    if window.number == 0:
        return
    target = _reference_folder(output, window.first)
    checkpoint = output / f"checkpoint-{window.first}"
    if target.exists():
        policy = read_json(target / MARKER).get("policy")
        if not checkpoint.exists() or policy == _weights(checkpoint):
            return
        shutil.rmtree(target)
    before = window.first - config.reference.sync.steps
    previous = _reference_folder(output, before) if before > 0 else None
    for needed in (checkpoint, previous):
        if needed is not None and not needed.exists():
            raise DataError(
                f"{needed}: gone, and the reference of step {window.first} is made from it. Restore it, or start over "
                "with refshard train --overwrite"
            )
    mix(config, checkpoint=checkpoint, previous=previous, target=target, step=window.first)
    _delete_older(output, config.reference.sync.steps)


def _weights(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))}


def _delete_older(output: Path, size: int) -> None:
    """Delete the references that no checkpoint can go on from."""
    steps = [int(found[1]) for p in output.glob("checkpoint-*") if (found := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    oldest = min(steps) // size * size
    for folder in (output / "references").glob("step-*"):
        if int(folder.name.removeprefix("step-")) < oldest:
            shutil.rmtree(folder, ignore_errors=True)


class WindowCallback(transformers.TrainerCallback):
    """Ends training where the reference moves, and evaluates there once it has moved.

    The library evaluates at a step's end. Where the reference moves at that step, the evaluation is the next
    window's first act, since its log-probs are not there before.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = self._window.first
        if first > 0 and state.global_step == first and first in self._window.evaluations:
            self.trainer.evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._ends(state):
            return
        control.should_log = control.should_save = control.should_training_stop = True
        control.should_evaluate = state.global_step in self._window.evaluations

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The end of a step is the end of an epoch at times; all is done by then.
        if self._ends(state):
            control.should_evaluate = control.should_save = False

    def _ends(self, state: Any) -> bool:
        return bool(state.global_step == self._window.last)
