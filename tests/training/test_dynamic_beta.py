"""beta-DPO's beta follows the micro-batch's mean margin, and its filter draws the same pairs wherever it runs."""

import json
import math
from typing import Any

import pytest
import torch

from pipeline.config.loss import LossConfig
from pipeline.training.dynamic_beta import DynamicBeta
from pipeline.training.losses import Pairs, total_loss

GAPS = ([4.0, -1.0, 0.5, 2.5], [1.0, 1.0, -3.0, 0.0])


def make_pairs(gaps: list[float]) -> Pairs:
    zeros, ones = torch.zeros(len(gaps), dtype=torch.float64), torch.ones(len(gaps), dtype=torch.int64)
    chosen = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    return Pairs(
        chosen_logps=chosen,
        rejected_logps=zeros,
        ref_chosen_logps=zeros,
        ref_rejected_logps=zeros,
        chosen_tokens=ones,
        rejected_tokens=ones,
        chosen_plain_logps=chosen,
    )


def test_beta_is_that_of_a_loop_over_micro_batches() -> None:
    loss = LossConfig(type="beta_dpo", beta=0.2, beta_dpo_alpha=0.3)
    dynamic, state, running = DynamicBeta(loss, seed=1), {}, 0.0
    for gaps in GAPS * 2:
        mean = sum(gaps) / len(gaps)
        running = 0.9 * running + 0.1 * mean
        beta = 0.2 * (1 + 0.3 * (mean - running))
        pairs = dynamic.apply(make_pairs(gaps), state, lambda own: own, 0)
        assert pairs.betas is not None and pairs.betas.tolist() == pytest.approx([beta] * 4, rel=1e-14)
        expected = sum(math.log1p(math.exp(-beta * gap)) for gap in gaps) / 4
        found = total_loss(pairs, loss)
        assert found.loss.item() == pytest.approx(expected, rel=1e-12)
        # The rewards keep loss.beta, so that they can be compared from step to step.
        assert found.chosen_rewards.tolist() == pytest.approx([0.2 * gap for gap in gaps])
        found.loss.backward()
        assert pairs.chosen_logps.grad is not None
        slopes = [-beta / (1 + math.exp(beta * gap)) / 4 for gap in gaps]
        assert pairs.chosen_logps.grad.tolist() == pytest.approx(slopes, rel=1e-12)


def test_beta_is_that_of_the_pairs_that_the_filter_keeps_and_the_running_mean_that_of_all() -> None:
    loss = LossConfig(type="beta_dpo", beta=0.2, beta_dpo_alpha=0.3, beta_dpo_filter=0.5)
    gaps, state = GAPS[0], {}
    pairs = DynamicBeta(loss, seed=2).apply(make_pairs(gaps), state, lambda own: own, 0)
    assert pairs.weights is not None and pairs.betas is not None
    kept = [gap for gap, weight in zip(gaps, pairs.weights.tolist(), strict=True) if weight]
    running, beta = 0.1 * sum(gaps) / 4, pairs.betas[0].item()
    assert len(kept) == 2 and state["mean"] == pytest.approx(running)
    assert beta == pytest.approx(0.2 * (1 + 0.3 * (sum(kept) / 2 - running)), rel=1e-14)
    expected = sum(math.log1p(math.exp(-beta * gap)) for gap in kept) / 2
    assert total_loss(pairs, loss).loss.item() == pytest.approx(expected, rel=1e-12)


def test_beta_stays_positive_far_below_the_running_mean() -> None:
    dynamic = DynamicBeta(LossConfig(type="beta_dpo"), seed=1)
    pairs = dynamic.apply(make_pairs([-1e4, -1e4]), {}, lambda own: own, 0)
    assert pairs.betas is not None and pairs.betas.tolist() == [1e-3, 1e-3]


def test_a_micro_batch_that_is_not_finite_does_not_move_the_running_means() -> None:
    for option in (0.0, 0.5):
        dynamic, state = DynamicBeta(LossConfig(type="beta_dpo", beta_dpo_filter=option), seed=1), {}
        dynamic.apply(make_pairs([math.nan, 1.0]), state, lambda own: own, 0)
        dynamic.apply(make_pairs([1.0, 3.0]), state, lambda own: own, 0)
        dynamic.apply(make_pairs([math.inf, 1.0]), state, lambda own: own, 0)
        assert state["mean"] == pytest.approx(0.2) and state["batches"] == 3


def test_a_resumed_run_goes_on_with_the_same_beta_and_pairs() -> None:
    loss = LossConfig(type="beta_dpo", beta_dpo_filter=0.5)
    whole: dict[str, Any] = {}
    expected = [DynamicBeta(loss, seed=7).apply(make_pairs(gaps), whole, lambda own: own, 0) for gaps in GAPS]
    state: dict[str, Any] = {}
    for gaps, pairs in zip(GAPS, expected, strict=True):
        state = json.loads(json.dumps(state))  # as a checkpoint gives it back
        found = DynamicBeta(loss, seed=7).apply(make_pairs(gaps), state, lambda own: own, 0)
        assert torch.equal(found.betas, pairs.betas) and torch.equal(found.weights, pairs.weights)
    assert state == whole


def test_two_processes_leave_out_the_pairs_that_one_does() -> None:
    loss = LossConfig(type="beta_dpo", beta_dpo_filter=0.4)
    gaps = GAPS[0] + GAPS[1]
    one = DynamicBeta(loss, seed=3).apply(make_pairs(gaps), {}, lambda own: own, 0)
    assert one.weights is not None and one.weights.sum().item() == 4  # int(8 * 0.6)
    everything = torch.tensor(gaps, dtype=torch.float64)
    two = [
        DynamicBeta(loss, seed=3).apply(make_pairs(half), {}, lambda own: everything, rank)
        for rank, half in enumerate(GAPS)
    ]
    assert torch.cat([pairs.weights for pairs in two if pairs.weights is not None]).equal(one.weights)
    means = [total_loss(pairs, loss).loss.item() for pairs in two]
    assert sum(means) / 2 == pytest.approx(total_loss(one, loss).loss.item(), rel=1e-12)


def test_the_filter_leaves_out_outliers_first_and_one_pair_at_least_stays() -> None:
    loss, gaps = LossConfig(type="beta_dpo", beta_dpo_filter=0.25), [0.0, 0.1, 1e6, -0.1]
    for seed in range(20):
        # The running mean and deviation of a run that has seen no such pair.
        state: dict[str, Any] = {"mean": 0.0, "deviation": 1e-6, "batches": 0}
        pairs = DynamicBeta(loss, seed).apply(make_pairs([*gaps[:2], -300.0, 0.2]), state, lambda own: own, 0)
        assert pairs.weights is not None and pairs.weights.sum() == 3
    most = DynamicBeta(LossConfig(type="beta_dpo", beta_dpo_filter=0.99), seed=0)
    pairs = most.apply(make_pairs([1.0, 2.0]), {}, lambda own: own, 0)
    assert pairs.weights is not None and pairs.weights.sum() == 1
