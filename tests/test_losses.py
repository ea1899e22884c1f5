"""The DPO objective against numbers worked out by hand."""

import math

import pytest
import torch

from pipeline.losses import PairLogps, PairLoss, dpo_loss


def loss_of(policy: tuple[float, float], ref: tuple[float, float], beta: float = 0.1) -> PairLoss:
    """Loss of one pair in float64; logps are (chosen, rejected)."""
    tensors = [torch.tensor([value], dtype=torch.float64) for value in (*policy, *ref)]
    return dpo_loss(PairLogps(*tensors[:2]), PairLogps(*tensors[2:]), beta=beta)


@pytest.mark.parametrize(
    ("policy", "ref", "loss", "rewards"),
    [
        ((-10, -12), (-11, -11), 0.5981388693815918, (0.1, -0.1)),
        ((-30, -10), (-20, -20), 2.1269280110429727, (-1, 1)),
        ((-10, -1010), (-11, -11), 0.0, (0.1, -99.9)),
    ],
)
def test_loss_and_rewards_are_those_worked_out_by_hand(
    policy: tuple[float, float], ref: tuple[float, float], loss: float, rewards: tuple[float, float]
) -> None:
    found = loss_of(policy, ref)
    assert found.losses.item() == pytest.approx(loss, rel=1e-14, abs=1e-40)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx(rewards)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_a_policy_equal_to_its_reference_loses_ln_2(beta: float) -> None:
    logps = PairLogps(torch.tensor([-3.0, -700.0]), torch.tensor([-80.0, -0.5]))
    found = dpo_loss(logps, logps, beta=beta)
    assert found.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert found.chosen_rewards.tolist() == found.rejected_rewards.tolist() == [0, 0]


def test_the_gradient_raises_chosen_and_lowers_rejected_in_equal_measure() -> None:
    policy = PairLogps(torch.tensor([-10.0], requires_grad=True), torch.tensor([-12.0], requires_grad=True))
    found = dpo_loss(policy, PairLogps(torch.tensor([-11.0]), torch.tensor([-11.0])), beta=0.1)
    found.losses.sum().backward()
    assert policy.chosen.grad is not None and policy.rejected.grad is not None
    # d loss / d chosen = -beta * sigmoid(-margin), eq. 7 differentiated; the margin is 0.2.
    assert policy.chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.2)))
    assert policy.rejected.grad.item() == pytest.approx(0.1 / (1 + math.exp(0.2)))


def test_rewards_carry_no_gradient() -> None:
    policy = PairLogps(torch.tensor([-10.0], requires_grad=True), torch.tensor([-12.0], requires_grad=True))
    found = dpo_loss(policy, policy, beta=0.1)
    assert found.losses.requires_grad
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad


@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_margins_of_ten_thousand_give_no_nan_forward_or_backward(margin: float) -> None:
    policy = PairLogps(torch.tensor([margin], requires_grad=True), torch.tensor([0.0], requires_grad=True))
    found = dpo_loss(policy, PairLogps(torch.tensor([0.0]), torch.tensor([0.0])), beta=1.0)
    found.losses.sum().backward()
    assert found.losses.item() == pytest.approx(max(-margin, 0.0))
    assert policy.chosen.grad is not None
    assert policy.chosen.grad.item() == (0.0 if margin > 0 else -1.0)


def test_pairs_do_not_touch_each_other_and_nothing_is_averaged() -> None:
    random = torch.Generator().manual_seed(0)
    columns = [-50 * torch.rand(5, generator=random) for _ in range(4)]
    together = dpo_loss(PairLogps(*columns[:2]), PairLogps(*columns[2:]), beta=0.3)
    assert together.losses.shape == (5,)
    for i in range(5):
        one = [column[i : i + 1] for column in columns]
        alone = dpo_loss(PairLogps(*one[:2]), PairLogps(*one[2:]), beta=0.3)
        torch.testing.assert_close(alone.losses[0], together.losses[i])
