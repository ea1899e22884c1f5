"""Keep saved activations in the CPU's memory until backward needs them.

This frees the memory of every layer's activations on a GPU, and costs two transfers of each over the bus. Parameters
and small tensors stay where they are. `torch.autograd.graph.save_on_cpu` does not serve. It moves parameters as well:
a third of all bytes in a small Llama, and a second copy of each weight on the GPU in backward. Its pinned copies lose
their strides.
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

__all__ = ["ActivationOffload"]

_SMALLEST_BYTES = 2**20


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """Context in which autograd keeps what it saves in the CPU's memory, pinned for transfers from a GPU."""

    def __init__(self, model: torch.nn.Module, smallest_bytes: int = _SMALLEST_BYTES) -> None:
        super().__init__(self._pack, _fetch)
        self._model = model
        self._smallest_bytes = smallest_bytes
        self._parameters: set[int] = set()
        self.num_bytes = 0
        """Number of bytes that were moved so far"""

    def __enter__(self) -> None:
        # On each entry: DeepSpeed gives parameters other memory from step to step. Parameters that FSDP2 has sharded
        # have none of their own.
        whole = (p for p in self._model.parameters() if p.numel() and not isinstance(p, DTensor))
        self._parameters = {p.untyped_storage().data_ptr() for p in whole}
        super().__enter__()

    def _pack(self, tensor: torch.Tensor) -> Any:
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes < self._smallest_bytes or _is_parameter(tensor) or not _is_plain(tensor):
            return tensor
        # A view of a parameter (a transpose) shares its memory.
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor
        pin = tensor.device.type == "cuda"
        # Keep the strides: backward's kernels may have been chosen by them.
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        # The stream that writes pinned memory here also reads it in `_fetch`, so this need not wait.
        kept.copy_(tensor, non_blocking=pin)
        self.num_bytes += num_bytes
        return tensor.device, kept


def _is_parameter(tensor: torch.Tensor) -> bool:
    """Return True for a parameter or a view of one; FSDP2 makes new ones whenever it gathers a sharded parameter."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return False for sparse tensors and subclasses (DTensor, quantized weights): copied bytes do not restore them."""
    return type(tensor) is torch.Tensor and tensor.layout == torch.strided


def _fetch(packed: Any) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    device, kept = packed
    fetched: torch.Tensor = kept.to(device, non_blocking=device.type == "cuda")
    return fetched
