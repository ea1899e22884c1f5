"""The chunked head: the numbers and gradients of a plain log-softmax, without a tensor of the logits' size."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.scoring import head as module
from pipeline.scoring.head import Head, TokenStatistics, token_logps, token_statistics

HIDDEN, VOCABULARY = 8, 37
# In chunks of 16 positions: this makes three of them, the last one ragged.
COUNT = 16 + 16 + 5

HEADS = {
    "plain": (False, 1.0, None),
    "bias": (True, 1.0, None),
    "scale": (False, 0.25, None),
    "softcap": (False, 1.0, 2.0),
    "all three": (True, 1.7, 3.0),
}


@pytest.fixture(autouse=True, params=[0, 2**20], ids=["recomputed", "kept"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 positions, whose logits backward computes again, or which forward keeps."""
    monkeypatch.setattr(module, "_KEPT_BYTES", request.param)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "_SMALLEST_CHUNK", 16)


def make_case(kind: str, count: int = COUNT, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, Head, Any]:
    """Hidden states, head and targets, all random; a softcap of 2 bends logits of this size clearly."""
    with_bias, scale, softcap = HEADS[kind]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, HIDDEN, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (count,), generator=random)
    return hidden, Head(weight, bias if with_bias else None, scale, softcap), targets


def plain_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def plain_statistics(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> TokenStatistics:
    logits = plain_logits(hidden, head)
    log_softmax = torch.log_softmax(logits, dim=-1)
    return TokenStatistics(
        logps=log_softmax.gather(1, targets[:, None]).squeeze(1),
        entropy=-(log_softmax.exp() * log_softmax).sum(dim=-1),
        mean_logit=logits.mean(dim=-1),
        is_top1=logits.argmax(dim=-1) == targets,
        log_sum_squares=log_softmax.exp().square().sum(dim=-1).log(),
    )


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [1, 16, COUNT])
def test_statistics_are_those_of_the_full_logits(kind: str, count: int) -> None:
    hidden, head, targets = make_case(kind, count)
    # Half of the targets are the model's first choice, so that both answers occur.
    targets[::2] = plain_logits(hidden, head).argmax(dim=-1)[::2]
    ours, plain = token_statistics(hidden, targets, head), plain_statistics(hidden, targets, head)
    for name in ("logps", "entropy", "mean_logit"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(ours.is_top1, plain.is_top1)
    assert ours.is_top1[0]


@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_autograd(kind: str) -> None:
    hidden, head, targets = make_case(kind)
    inputs = [hidden, head.weight, *([] if head.bias is None else [head.bias])]
    upstream = torch.randn(COUNT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(token_statistics(hidden, targets, head).logps, inputs, upstream)
    plain = torch.autograd.grad(plain_statistics(hidden, targets, head).logps, inputs, upstream)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("count", [1, 16, COUNT])
def test_summed_squares_are_those_of_all_probabilities_and_change_nothing_else(kind: str, count: int) -> None:
    hidden, head, targets = make_case(kind, count)
    ours, plain = token_statistics(hidden, targets, head, squares=True), plain_statistics(hidden, targets, head)
    assert ours.log_sum_squares is not None and plain.log_sum_squares is not None
    torch.testing.assert_close(ours.log_sum_squares, plain.log_sum_squares, rtol=1e-12, atol=1e-12)
    # Between that of one sure token and that of a uniform choice.
    assert (ours.log_sum_squares <= 0).all() and (ours.log_sum_squares > -math.log(VOCABULARY)).all()
    without = token_statistics(hidden, targets, head)
    assert without.log_sum_squares is None
    for name in ("logps", "entropy", "mean_logit", "is_top1"):
        assert torch.equal(getattr(ours, name), getattr(without, name))
    gradients = (torch.autograd.grad(s.logps.sum(), [hidden, head.weight]) for s in (ours, without))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["uniform", "usual", "one sure token"])
def test_summed_squares_stay_finite_at_either_end(scale: float) -> None:
    hidden, head, targets = make_case("plain", dtype=torch.float32)
    sharp = Head(head.weight, None, scale)
    found = token_statistics(hidden, targets, sharp, squares=True).log_sum_squares
    expected = plain_statistics(hidden.double(), targets, Head(head.weight.double(), None, scale)).log_sum_squares
    assert found is not None and expected is not None and found.dtype == torch.float32
    # Float32 logits of 1e4 are known to about 1e-3.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2 if scale > 1 else 1e-5)


def test_a_position_without_gradient_upstream_passes_none_down() -> None:
    hidden, head, targets = make_case("all three")
    token_statistics(hidden, targets, head).logps[3].backward()
    assert hidden.grad is not None
    assert hidden.grad[3].abs().sum() > 0
    assert torch.count_nonzero(hidden.grad[[i for i in range(COUNT) if i != 3]]) == 0


def test_the_size_of_a_chunk_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = make_case("all three")
    many = token_statistics(hidden, targets, head)
    gradient_of_many = torch.autograd.grad(many.logps.sum(), head.weight)[0]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2**30)
    one = token_statistics(hidden, targets, head)
    torch.testing.assert_close(one.logps, many.logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(one.logps.sum(), head.weight)[0], gradient_of_many)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 model", "autocast"])
def test_bf16_rounds_the_operands_and_nothing_after_them(autocast: bool) -> None:
    hidden, head, targets = make_case("all three", dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = token_statistics(hidden, targets, head)
        assert torch.is_autocast_enabled("cpu") == autocast
    ours.logps.sum().backward()
    wide = hidden.detach().double().requires_grad_()
    assert head.bias is not None
    plain_head = Head(head.weight.detach().double(), head.bias.detach().double(), head.scale, head.softcap)
    plain = plain_statistics(wide, targets, plain_head)
    plain.logps.sum().backward()
    for name in ("logps", "entropy", "mean_logit"):
        assert getattr(ours, name).dtype == torch.float32
        # A bf16 logit below 16 is rounded by less than 1/16.
        torch.testing.assert_close(getattr(ours, name).double(), getattr(plain, name), rtol=0, atol=0.06)
    assert hidden.grad is not None and wide.grad is not None and head.weight.grad is not None
    assert hidden.grad.dtype == hidden.dtype and head.weight.grad.dtype == head.weight.dtype
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=0.05, atol=0.1)


def test_only_logps_carry_a_gradient() -> None:
    hidden, head, targets = make_case("all three")
    statistics = token_statistics(hidden, targets, head, squares=True)
    assert statistics.log_sum_squares is not None
    assert {name for name, value in vars(statistics).items() if value.requires_grad} == {"logps"}


def test_no_tokens_give_empty_statistics_and_zero_gradients() -> None:
    hidden, head, targets = make_case("all three", count=0)
    statistics = token_statistics(hidden, targets, head, squares=True)
    assert all(t.shape == (0,) for t in vars(statistics).values())
    statistics.logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert head.weight.grad is not None and torch.count_nonzero(head.weight.grad) == 0


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operation gives, and of those that are matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.products: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, torch.Tensor):
                self.shapes.append(output.shape)
                if func in PRODUCTS:
                    self.products.append(output.shape)
        return result


@pytest.mark.parametrize("kind", HEADS)
def test_no_tensor_of_the_logits_size_is_made_forward_or_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 200
    monkeypatch.setattr(module, "_KEPT_BYTES", 8 * count * VOCABULARY - 1)
    hidden, head, targets = make_case(kind, count)
    with Allocations() as forward:
        logps = token_statistics(hidden, targets, head, squares=True).logps
    with Allocations() as backward:
        logps.sum().backward()
    for recorded in (forward, backward):
        # The chunks were seen, so the recording worked.
        assert torch.Size([16, VOCABULARY]) in recorded.shapes
        assert max(shape.numel() for shape in recorded.shapes) <= max(count * HIDDEN, 16 * VOCABULARY)


@pytest.mark.parametrize("kind", HEADS)
def test_logits_that_fit_are_computed_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 8 * COUNT * VOCABULARY)
    hidden, head, targets = make_case(kind)
    with Allocations() as forward:
        logps = token_statistics(hidden, targets, head).logps
    with Allocations() as backward:
        logps.sum().backward()
    assert torch.Size([16, VOCABULARY]) in forward.products
    assert not any(shape[1] == VOCABULARY for shape in backward.products)
    assert torch.Size([VOCABULARY, HIDDEN]) in backward.products


def test_logits_are_not_kept_where_no_backward_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT_BYTES", 8 * COUNT * VOCABULARY)
    hidden, head, targets = make_case("plain")
    with torch.no_grad(), Allocations() as recorded:
        token_statistics(hidden, targets, head)
    assert torch.Size([16, VOCABULARY]) in recorded.products
    assert torch.Size([COUNT, VOCABULARY]) not in recorded.shapes


def test_the_recording_would_see_full_logits() -> None:
    hidden, head, targets = make_case("plain")
    with Allocations() as recorded:
        plain_statistics(hidden, targets, head).logps.sum().backward()
    assert max(shape.numel() for shape in recorded.shapes) >= COUNT * VOCABULARY


def test_the_gradient_of_frozen_hidden_states_is_not_computed() -> None:
    hidden, head, targets = make_case("plain")
    hidden.requires_grad_(False)
    logps = token_statistics(hidden, targets, head).logps
    with Allocations() as recorded:
        logps.sum().backward()
    assert torch.Size([VOCABULARY, HIDDEN]) in recorded.products
    assert torch.Size([16, HIDDEN]) not in recorded.products
    assert head.weight.grad is not None


# A frozen head, as under adapters.


def freeze(head: Head) -> None:
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            parameter.requires_grad_(False)


@pytest.mark.parametrize("kind", HEADS)
def test_under_a_frozen_head_the_gradients_are_the_same_and_backward_makes_no_product(kind: str) -> None:
    hidden, head, targets = make_case(kind)
    upstream = torch.randn(COUNT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = torch.autograd.grad(plain_statistics(hidden, targets, head).logps, hidden, upstream)[0]
    freeze(head)
    statistics = token_statistics(hidden, targets, head, squares=True)
    with Allocations() as recorded:
        ours = torch.autograd.grad(statistics.logps, hidden, upstream)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    assert recorded.products == []
    assert head.weight.grad is None


@pytest.mark.parametrize("kind", HEADS)
def test_a_frozen_head_changes_no_statistic(kind: str) -> None:
    hidden, head, targets = make_case(kind)
    trained = token_statistics(hidden, targets, head, squares=True)
    freeze(head)
    frozen = token_statistics(hidden, targets, head, squares=True)
    for name, value in vars(trained).items():
        assert torch.equal(getattr(frozen, name), value), name


def test_without_gradients_a_frozen_head_makes_no_product_ahead() -> None:
    hidden, head, targets = make_case("plain")
    freeze(head)
    with torch.no_grad(), Allocations() as recorded:
        token_statistics(hidden, targets, head)
    assert torch.Size([16, HIDDEN]) not in recorded.products
    assert torch.Size([16, VOCABULARY]) in recorded.products


# Log-probs alone.


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_log_probs_alone_are_those_of_all_statistics(kind: str, dtype: torch.dtype) -> None:
    hidden, head, targets = make_case(kind, dtype=dtype)
    alone, with_all = token_logps(hidden, targets, head), token_statistics(hidden, targets, head).logps
    assert torch.equal(alone, with_all)
    assert not alone.requires_grad and alone.dtype == with_all.dtype
    if dtype == torch.float64:
        torch.testing.assert_close(alone, plain_statistics(hidden, targets, head).logps, rtol=1e-12, atol=1e-12)


def test_log_probs_alone_of_no_tokens_are_none() -> None:
    hidden, head, targets = make_case("plain", count=0)
    assert token_logps(hidden, targets, head).shape == (0,)
