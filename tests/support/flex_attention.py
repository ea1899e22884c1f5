"""The packed path's flex attention on any device, and the number of its compilations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from pipeline.scoring import attention
from pipeline.scoring.packing import Kernel

__all__ = ["compilations", "flex_on_any_device", "forget_compilations"]


@contextmanager
def flex_on_any_device() -> Iterator[None]:
    """Attend with compiled flex attention on a CPU too, where it has a forward pass only."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any = None, *, layout: Any, **keywords: Any
    ) -> tuple[torch.Tensor, None]:
        kernel = Kernel(
            scaling=keywords.get("scaling"), window=keywords.get("sliding_window"), softcap=keywords.get("softcap")
        )
        if layout.kernels is not None:
            layout.kernels.add(kernel)
        return attention._flex(module, query, key, value, layout, kernel), None

    with mock.patch.object(attention, "_packed", attend):
        yield


def forget_compilations() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def compilations() -> int:
    """Count the graphs that were compiled since `forget_compilations`."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
