"""Processes of one launch: each is a worker of its own, or all of them hold one model together.

If they hold one model (tensor parallelism), the first process leads. Only it reads, decides and writes; it sends each
pass to the others, which follow. After each step all processes exchange their status, so that none continues or ends
without the others.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.base.errors import ConfigError, RefshardError, UnfinishedError, is_out_of_memory
from pipeline.base.signals import StopFlag
from pipeline.models.loading import pick_device
from pipeline.scoring.packing import Continuation

__all__ = ["Ensemble", "LeaderModel", "Order", "processes_of_launch", "share_of_process"]

T = TypeVar("T")

Order = tuple[str, Any]
"""Name of the followers' next step, and its arguments"""

# A pause is not a fault: the leader may read, copy or wait for a disk for hours.
_PATIENCE = timedelta(days=7)

# A process that failed waits so long for the others, which may be waiting for it in the model's layers.
_PATIENCE_AFTER_FAILURE = timedelta(seconds=60)

# Status of a step; for a failure the exit status is added.
_DONE, _OUT_OF_MEMORY, _FAILED = 0, 1, 2


def processes_of_launch() -> tuple[int, int]:
    """Give this process's rank and the number of processes that torchrun, accelerate or `--processes` started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of_process(worker: tuple[int, int]) -> tuple[int, int]:
    """Give this process's share, (I, N), if each process of worker I of N is a worker of its own."""
    (index, count), (rank, processes) = worker, processes_of_launch()
    return index * processes + rank, count * processes


class Ensemble:
    """Processes of this launch, as one model. Raises ConfigError if there is only one process.

    The flag is set at the end of a step if any of the processes was asked to stop.
    """

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        rank, self.num_processes = processes_of_launch()
        if self.num_processes == 1:
            raise ConfigError(
                "precompute.tp_plan: splits each layer over several processes, and this is one. Start as many as there "
                "are GPUs: refshard precompute --processes N"
            )
        self.leads = rank == 0
        device = pick_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The library uses this group. Some processes may take long to load a large model.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        # A group of its own: a status must not be mistaken for a part of a layer's sum.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._failed = False

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Lead; at the end or at an error, tell the followers to leave with this process's status."""
        try:
            yield
        except Exception as error:
            # After a failed step they leave by themselves.
            if not self._failed:
                with contextlib.suppress(UnfinishedError):
                    self.broadcast(("leave", _status_of(error)))
            raise
        self.broadcast(("leave", 0))

    def broadcast(self, order: Order | None = None) -> Order:
        """Send the leader's order to the followers, who call this without one and wait for it.

        Raises:
            UnfinishedError: Another process is gone.
        """
        box: list[Any] = [order]
        try:
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        except RuntimeError as error:
            raise _gone() from error
        received: Order = box[0]
        return received

    def together(self, step: Callable[[], T]) -> T:
        """Run a step that every process runs now; give its result if it succeeded in all of them.

        Raises:
            RefshardError: It failed in another process, whose exit status the error has.
            torch.OutOfMemoryError: Memory ran out in another process.
            ConfigError: Memory ran out in this process while the others wait for it inside of a layer.
        """
        failure: Exception | None = None
        try:
            try:
                result = step()
            finally:
                # A process queues a pass without waiting. It must not call the step done before the others reach its
                # sums, which would then meet those of the next step.
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                    torch.cuda.synchronize()
        except Exception as error:
            failure = error
        own = _DONE if failure is None else _OUT_OF_MEMORY if is_out_of_memory(failure) else _FAILED
        worst = self._worst(own, failure)
        self._failed = worst >= _FAILED
        if failure is not None and (own == _FAILED or worst == _OUT_OF_MEMORY):
            raise failure
        if worst == _OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("in another process of this launch")
        if worst >= _FAILED:
            elsewhere = RefshardError("another process of this launch failed, and says why")
            elsewhere.exit_status = worst - _FAILED
            raise elsewhere
        return result

    def _worst(self, own: int, failure: Exception | None) -> int:
        """Exchange the step's status; give the worst one, and set the flag if any process was asked to stop."""
        status = 0 if failure is None or own == _OUT_OF_MEMORY else _status_of(failure)
        said = torch.tensor([own + status, int(bool(self._flag))])
        patience = _PATIENCE if failure is None else _PATIENCE_AFTER_FAILURE
        start = time.monotonic()
        try:
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group, async_op=True).wait(patience)
        except RuntimeError as error:
            self._failed = True
            if time.monotonic() - start < patience.total_seconds():
                # A failure here is a consequence of the other's end.
                raise _gone() from (failure or error)
            if own == _OUT_OF_MEMORY:
                raise ConfigError(
                    "precompute.tokens_per_batch: memory ran out in one process of this launch, while the others wait "
                    "for it. Finished units are saved; set it, or set it lower, and run the same command again"
                ) from failure
            return own + status
        worst, asked = (int(value) for value in said)
        if asked:
            self._flag.request()
        return worst

    def smallest(self, value: int) -> int:
        """Give the smallest of all processes' values; all must call it at the same point."""
        said = torch.tensor([value])
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self._group)
        return int(said)


class LeaderModel:
    """Prepared model whose every pass the followers run too; all attributes are those of the leader's own part."""

    def __init__(self, model: Any, ensemble: Ensemble) -> None:
        self._model, self._ensemble = model, ensemble

    def __call__(self, **inputs: Any) -> Any:
        self._ensemble.broadcast(("forward", {name: _on(value, torch.device("cpu")) for name, value in inputs.items()}))
        return self._ensemble.together(lambda: self._model(**inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @staticmethod
    def follow(model: Any, inputs: dict[str, Any], ensemble: Ensemble, device: torch.device) -> None:
        """Run the pass that the leader runs now. Raises the errors of `Ensemble.together`."""
        with torch.inference_mode():
            ensemble.together(lambda: model(**{name: _on(value, device) for name, value in inputs.items()}))


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Continuation):
        return Continuation(*(_on(tensor, device) for tensor in value))
    if isinstance(value, tuple):
        return tuple(_on(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _status_of(error: Exception) -> int:
    return error.exit_status if isinstance(error, RefshardError) else 1


def _gone() -> UnfinishedError:
    return UnfinishedError(
        "another process of this launch has ended; finished units are saved. Run the same command again"
    )
