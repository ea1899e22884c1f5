"""The processes of one launch: each a worker of its own, or all of them one model, of which each holds a part.

Where they are one model (tensor parallelism), the first process leads: it alone reads, decides and writes, and hands
what it is about to run to the others, which follow. After each such step all say how it went, so that none goes on,
or leaves, without the others.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.base.errors import ConfigError, RefshardError, UnfinishedError
from pipeline.base.signals import StopFlag
from pipeline.models.loading import pick_device
from pipeline.scoring.memory import is_out_of_memory

__all__ = [
    "Ensemble",
    "Led",
    "Order",
    "processes_of_launch",
    "share_of_process",
]

T = TypeVar("T")


Order = tuple[str, Any]
"""What the followers do next, and with what."""


# Among followers a pause is no fault: the leader may read, copy or wait for a disk for hours.
_PATIENCE = timedelta(days=7)


# Of one that failed, for the others to come to the same point; they may be waiting for it in the model's layers.
_PATIENCE_AFTER_FAILURE = timedelta(seconds=60)


# How a step went; a failure is that and its exit status.
_DONE, _OUT_OF_MEMORY, _FAILED = 0, 1, 2


def processes_of_launch() -> tuple[int, int]:
    """Give the rank of this process and the number of those that torchrun, accelerate or `--processes` started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of_process(worker: tuple[int, int]) -> tuple[int, int]:
    """Give the share, (I, N), of this process where each process of worker I of N is a worker of its own."""
    (index, count), (rank, processes) = worker, processes_of_launch()
    return index * processes + rank, count * processes


class Ensemble:
    """The processes of this launch, as one model.

    Args:
        flag: Set where any of the processes was asked to stop, at the end of a step.

    Raises:
        ConfigError: There is no launch of several processes.
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
        # The library takes the group that is there. Loading a large model on some processes may take long.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        # Apart from the model's own traffic: what is said here must not be taken for a part of a layer's sum.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._failed = False

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Be the leader for a while; at its end, however it comes, the followers are told to leave, and its status."""
        try:
            yield
        except Exception as error:
            # After a step that failed anywhere they leave by themselves.
            if not self._failed:
                with contextlib.suppress(UnfinishedError):
                    self.send(("leave", _status_of(error)))
            raise
        self.send(("leave", 0))

    def send(self, order: Order) -> None:
        """Tell the followers what to do next."""
        self._broadcast([order])

    def receive(self) -> Order:
        """Wait for what the leader tells.

        Raises:
            UnfinishedError: The leader is gone.
        """
        box: list[Any] = [None]
        self._broadcast(box)
        order: Order = box[0]
        return order

    def _broadcast(self, box: list[Any]) -> None:
        try:
            dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        except RuntimeError as error:
            raise _gone() from error

    def together(self, step: Callable[[], T]) -> T:
        """Do a step that every process does now; give its result if it went well in all of them.

        Raises:
            RefshardError: It failed elsewhere; with the exit status that the process there ends with.
            torch.OutOfMemoryError: Memory ran out elsewhere, after this process had what it needed.
            ConfigError: Memory ran out in this process while others wait for it, so that none can go on.
        """
        failure: Exception | None = None
        try:
            try:
                result = step()
            finally:
                _finish_on_device()
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
        """Say how a step went here, hear how it went at worst, and whether any process was asked to stop."""
        status = 0 if failure is None or own == _OUT_OF_MEMORY else _status_of(failure)
        said = torch.tensor([own + status, int(bool(self._flag))])
        patience = _PATIENCE if failure is None else _PATIENCE_AFTER_FAILURE
        start = time.monotonic()
        try:
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self._group, async_op=True).wait(patience)
        except RuntimeError as error:
            self._failed = True
            if time.monotonic() - start < patience.total_seconds():
                # What went wrong here, if anything, came of the other's end.
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
        """Give the smallest of the values that the processes call this with, each at the same point of its work."""
        said = torch.tensor([value])
        dist.all_reduce(said, dist.ReduceOp.MIN, group=self._group)
        return int(said)


class Led:
    """A prepared model whose every pass the followers run too. For all else it is the leader's own part of it."""

    def __init__(self, model: Any, ensemble: Ensemble) -> None:
        self._model, self._ensemble = model, ensemble

    def __call__(self, **inputs: Any) -> Any:
        self._ensemble.send(("forward", {name: _on(value, torch.device("cpu")) for name, value in inputs.items()}))
        return self._ensemble.together(lambda: self._model(**inputs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @staticmethod
    def follow(model: Any, inputs: dict[str, Any], ensemble: Ensemble, device: torch.device) -> None:
        """Run the pass that the leader runs now. Raises as `Ensemble.together` does."""
        with torch.inference_mode():
            ensemble.together(lambda: model(**{name: _on(value, device) for name, value in inputs.items()}))


def _finish_on_device() -> None:
    """Wait for a GPU to do what it was given, sums over the processes included.

    A process hands its GPU a whole pass without waiting, so that it would call a step done whose sums the others have
    not come to; the next step's would then be added up with those.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _status_of(error: Exception) -> int:
    return error.exit_status if isinstance(error, RefshardError) else 1


def _gone() -> UnfinishedError:
    return UnfinishedError(
        "another process of this launch has ended; finished units are saved. Run the same command again"
    )
