"""Decisions that the processes of a run share: all get the same answer, and none waits for another in vain."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather

from pipeline.base.errors import RefshardError, interruption_of
from pipeline.run.checkpoints import processes_of

__all__ = ["first_on_each_machine", "largest", "of_main_process", "on_main_process", "other_processes"]

T = TypeVar("T")


def on_main_process(action: Callable[[], T]) -> T:
    """Run an action in the main process; every process returns its result or raises its RefshardError."""
    state = PartialState()
    if state.num_processes == 1:
        return action()
    outcome: list[tuple[T | None, RefshardError | None]] = [(None, None)]
    bug: Exception | None = None
    if state.is_main_process:
        try:
            outcome = [(action(), None)]
        except RefshardError as error:
            outcome = [(None, error)]
        except Exception as error:
            # It may not be picklable. The other processes leave as well, and this one raises it.
            bug = error
            failed = RefshardError(f"the main process failed: {type(error).__name__}")
            outcome = [(None, interruption_of(error) or failed)]
    result, failure = broadcast_object_list(outcome)[0]
    if bug is not None:
        raise bug
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def first_on_each_machine(first: Callable[[], T], then: Callable[[], T]) -> T:
    """Run `first` in one process of each machine, then `then` in the others; each returns its own result.

    If one fails, every process raises a RefshardError of its exit status.
    """
    state = PartialState()
    if state.num_processes == 1:
        return first()
    result, failure = None, None
    if state.is_local_main_process:
        try:
            result = first()
        except Exception as error:
            failure = error
    status = largest(getattr(failure, "exit_status", 1) if failure is not None else 0)
    if failure is not None:
        raise failure
    if status:
        other = RefshardError("another process of the run failed, and names the reason")
        other.exit_status = status
        raise other
    return then() if not state.is_local_main_process else result  # type: ignore[return-value]


def of_main_process(value: T) -> T:
    """Give all processes the main process's value, so that no rounding makes them decide differently."""
    if PartialState().num_processes == 1:
        return value
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]


def largest(value: int) -> int:
    """Give the largest of the values that the processes call this with, at the same point of their work."""
    state = PartialState()
    if state.num_processes == 1:
        return value
    return int(gather(torch.tensor([value], device=state.device)).max().item())


def other_processes(checkpoint: Path, policy: Any) -> str:
    """Describe a change in the number of processes since the checkpoint was saved; empty if there is none."""
    before, now = processes_of(checkpoint), PartialState().num_processes
    if before == now:
        return ""
    changed = f", saved by {before} process{'es' if before > 1 else ''}, in {now}"
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.modules()):
        changed += "; dropout draws other random numbers from here on than it would have"
    return changed
