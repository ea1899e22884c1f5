"""Saved activations in the CPU's memory until backward needs them.

What it buys is the memory of every layer's activations on a GPU, for two trips of each over the bus. Parameters stay
where they are, and so do small tensors, whose trips cost more than they save.
"""

from types import TracebackType
from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = [
    "ActivationOffload",
]

_SMALLEST_BYTES = 2**20


class ActivationOffload:
    """While it is entered, autograd keeps what it saves in the CPU's memory, pinned where a GPU will fetch it."""

    def __init__(self, model: torch.nn.Module, smallest_bytes: int = _SMALLEST_BYTES) -> None:
        self._model = model
        self._smallest_bytes = smallest_bytes
        self._parameters: set[int] = set()
        self._hooks: Any = None
        self.num_bytes = 0
        """Bytes that have been moved since the start"""

    def __enter__(self) -> "ActivationOffload":
        # Anew each time: DeepSpeed gives parameters other memory from step to step. What FSDP2 has sharded has none of
        # its own, and is put together during forward.
        whole = (p for p in self._model.parameters() if p.numel() and not isinstance(p, DTensor))
        self._parameters = {p.untyped_storage().data_ptr() for p in whole}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _fetch)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: torch.Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes < self._smallest_bytes or _is_parameter(tensor) or not _is_plain(tensor):
            return tensor
        # A view of a parameter, a transpose for one, shares its memory.
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor
        pin = tensor.device.type == "cuda"
        # With the strides that it had: kernels of backward may have been chosen by them.
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        # Pinned memory is written by the stream that goes on to read it in `_fetch`: no need to wait here.
        kept.copy_(tensor, non_blocking=pin)
        self.num_bytes += num_bytes
        return tensor.device, kept


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Whether it is one, or a view of one; FSDP2 makes a new one each time that it puts a sharded one together."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Dense, and not of a subclass (DTensor, quantized weights), which a copy of its bytes would not give back."""
    return type(tensor) is torch.Tensor and tensor.layout == torch.strided


def _fetch(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    device, kept = packed
    fetched: torch.Tensor = kept.to(device, non_blocking=device.type == "cuda")
    return fetched
