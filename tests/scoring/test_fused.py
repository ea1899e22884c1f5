"""Liger's kernel is taken where it agrees and is faster, and never otherwise.

It needs a GPU; here its place is taken by functions of known speed and numbers.
"""

import sys
import time
import types
from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.scoring import fused as module
from pipeline.scoring.fused import liger_logps, liger_pays

LOGPS = torch.tensor([-1.0, -2.5])
WEIGHT = torch.zeros(7, 3)


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


HIDDEN = torch.zeros(2, 3).as_subclass(OnGpu)


def taking(seconds: float, shift: float = 0.0) -> Callable[[], torch.Tensor]:
    def score() -> torch.Tensor:
        time.sleep(seconds)
        return LOGPS + shift

    return score


@pytest.fixture(autouse=True)
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed Liger, and nothing measured yet."""
    monkeypatch.setattr(module, "_measured", {})
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object() if name == "liger_kernel" else None)
    yield


def test_the_faster_of_two_that_agree_is_taken() -> None:
    assert liger_pays(HIDDEN, WEIGHT, taking(0.02), taking(0.001))


def test_a_slower_kernel_is_not_taken() -> None:
    assert not liger_pays(HIDDEN, WEIGHT, taking(0.001), taking(0.02))


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_kernel_with_other_numbers_is_not_taken_however_fast(shift: float) -> None:
    assert not liger_pays(HIDDEN, WEIGHT, taking(0.02), taking(0.0, shift))


def test_a_kernel_that_fails_is_not_taken() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("PTX was compiled for another GPU")

    assert not liger_pays(HIDDEN, WEIGHT, taking(0.02), broken)


def test_it_is_measured_once_for_each_shape_and_dtype() -> None:
    calls: list[int] = []

    def fused() -> torch.Tensor:
        calls.append(1)
        return LOGPS

    for _ in range(3):
        liger_pays(HIDDEN, WEIGHT, taking(0.001), fused)
    once = len(calls)
    liger_pays(HIDDEN, torch.zeros(8, 3), taking(0.001), fused)
    assert once == 3 and len(calls) == 6


def test_without_a_gpu_or_without_liger_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> torch.Tensor:
        raise AssertionError("measured")

    assert not liger_pays(torch.zeros(2, 3), WEIGHT, never, never)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert not liger_pays(HIDDEN, WEIGHT, never, never)


def test_ligers_losses_are_negative_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the signature of liger-kernel 0.8: a loss for each position, head bias and cap named."""

    def liger_fused_linear_cross_entropy(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        reduction: str,
        softcap: float | None,
    ) -> torch.Tensor:
        assert reduction == "none"
        logits = torch.tanh((hidden @ weight.t() + bias) / softcap) * softcap
        return torch.nn.functional.cross_entropy(logits, target, reduction="none")

    functional = types.ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = liger_fused_linear_cross_entropy  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    hidden, weight, bias = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    targets = torch.arange(5)
    plain = torch.log_softmax(torch.tanh((hidden @ weight.t() + bias) / 2) * 2, dim=-1).gather(1, targets[:, None])
    torch.testing.assert_close(liger_logps(hidden, weight, bias, targets, 2.0), plain.squeeze(1))
