"""Every loss against its formula written out in `math`, its limits, and the combinations that are refused."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

from pipeline.base.errors import ConfigError
from pipeline.config.loss import WITHOUT_MARGIN, WITHOUT_WEIGHT, LossConfig, LossName
from pipeline.config.reader import load_config
from pipeline.scoring.forward import weighted_sums
from pipeline.training.losses import (
    Pairs,
    balance_weight,
    divergence_score,
    pair_losses,
    total_loss,
    wpo_weights,
)
from support.models import GROUPED

LOSSES: tuple[LossName, ...] = get_args(LossName)
Rows = Sequence[Sequence[float]]

# Per pair: policy chosen, policy rejected, reference chosen, reference rejected, tokens chosen, tokens rejected.
ROWS: Rows = [
    (-10.0, -12.0, -11.0, -11.0, 5, 7),
    (-30.0, -10.0, -24.5, -12.0, 9, 4),
    (-7.25, -40.5, -7.5, -33.0, 3, 12),
    (-21.0, -22.0, -19.0, -25.5, 8, 8),
]


def make_pairs(rows: Rows = ROWS, dtype: torch.dtype = torch.float64, **changes: Any) -> Pairs:
    columns = [torch.tensor(values, dtype=torch.float64) for values in zip(*rows, strict=True)]
    policy = [column.to(dtype).requires_grad_() for column in columns[:2]]
    ref = [column.to(dtype) for column in columns[2:4]]
    tokens = [column.long() for column in columns[4:]]
    values = {
        "chosen_logps": policy[0],
        "rejected_logps": policy[1],
        "ref_chosen_logps": ref[0],
        "ref_rejected_logps": ref[1],
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
        "chosen_plain_logps": policy[0],
        **changes,
    }
    return Pairs(**values)


def settings_for(name: LossName, **changes: Any) -> LossConfig:
    """The loss alone, with a smoothing where it needs one."""
    if name in ("exo_pair", "robust"):
        changes.setdefault("label_smoothing", 0.1)
    return LossConfig(type=name, **changes)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def score_of(u: float, divergence: str, alpha: float) -> float:
    if divergence == "forward_kl":
        return 1 - math.exp(-u)
    if divergence == "js_divergence":
        return math.log(2) + log_sigmoid(u)
    if divergence == "alpha_divergence":
        return (math.exp((alpha - 1) * u) - 1) / (alpha - 1)
    return u


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * log_sigmoid(x) - (e * log_sigmoid(-x) if e else 0.0)


def written_out(name: str, rows: Rows, settings: LossConfig) -> list[float]:
    """Losses of all pairs, from the formulas, one float at a time."""
    b, e = settings.beta, settings.label_smoothing
    u_c = [policy - ref for policy, _, ref, _, _, _ in rows]
    u_r = [policy - ref for _, policy, _, ref, _, _ in rows]
    if name == "sft":
        return [-sum(row[0] for row in rows) / sum(row[4] for row in rows)] * len(rows)
    if name in ("simpo", "cpo", "orpo"):
        return written_out_without_reference(name, rows, settings)
    if name == "aot":
        margins = sorted(row[0] - row[1] for row in rows), sorted(row[2] - row[3] for row in rows)
        return [smoothed(b * (policy - ref), e) for policy, ref in zip(*margins, strict=True)]
    if name == "aot_unpaired":
        return [smoothed(b * (c - r), e) for c, r in zip(sorted(u_c), sorted(u_r), strict=True)]
    return [written_out_pair(name, *values, settings) for values in zip(u_c, u_r, rows, strict=True)]


def written_out_pair(name: str, c: float, r: float, row: Sequence[float], settings: LossConfig) -> float:
    """Loss of the pair with log-ratios c and r."""
    b, e, tau = settings.beta, settings.label_smoothing, settings.discopop_tau
    s_c, s_r = (score_of(u, settings.f_divergence_type, settings.f_alpha_divergence_coef) for u in (c, r))
    per_token = s_c / row[4] - s_r / row[5]
    x = b * (s_c - s_r)
    q, m = logistic(x), logistic(x / tau)
    match name:
        case "sigmoid":
            return smoothed(x, e)
        case "sigmoid_norm":
            return smoothed(b * per_token, e)
        case "hinge":
            return max(0.0, 1 - x)
        case "ipo":
            return (per_token - 1 / (2 * b)) ** 2
        case "exo_pair":
            return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)
        case "robust":
            return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)
        case "discopop":
            return -(1 - m) * log_sigmoid(x) + m * math.exp(-x)
        case "nca_pair":
            return -log_sigmoid(b * c) - log_sigmoid(-b * c) / 2 - log_sigmoid(-b * r) / 2
        case "bco_pair":
            return -log_sigmoid(b * c) - log_sigmoid(-b * r)
        case "sppo_hard":
            return (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2
        case "apo_zero":
            return 1 - logistic(b * c) + logistic(b * r)
        case "apo_down":
            return logistic(b * c) + 1 - logistic(b * (c - r))
        case "dpop":
            weight = 50.0 if settings.dpop_lambda is None else settings.dpop_lambda
            return -log_sigmoid(b * (c - r - weight * max(0.0, -c)))
        case "beta_dpo":  # without a micro-batch's beta, DPO
            return -log_sigmoid(b * (c - r))
        case "cal_dpo":
            return -log_sigmoid(c - r) + (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2
        case "r_dpo":
            price = 0.01 if settings.r_dpo_alpha is None else settings.r_dpo_alpha
            return -log_sigmoid(b * (c - r) + price * (row[4] - row[5]))
    raise AssertionError(f"no formula for {name}")


def written_out_without_reference(name: str, rows: Rows, settings: LossConfig) -> list[float]:
    """Losses of all pairs from the policy's logps alone."""
    b, e = settings.beta, settings.label_smoothing
    cross_entropy = -sum(row[0] for row in rows) / sum(row[4] for row in rows)
    losses = []
    for chosen, rejected, _, _, n_c, n_r in rows:
        p_c, p_r = math.exp(chosen / n_c), math.exp(rejected / n_r)
        gamma = 0.5 if settings.simpo_gamma is None else settings.simpo_gamma
        weight = 1.0 if settings.cpo_alpha is None else settings.cpo_alpha
        odds_ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
        losses.append(
            {
                "simpo": smoothed(b * chosen / n_c - b * rejected / n_r - gamma, e),
                "cpo": smoothed(b * (chosen - rejected), e) + weight * cross_entropy,
                "orpo": cross_entropy - b * log_sigmoid(math.log(odds_ratio)),
            }[name]
        )
    return losses


# --- each loss and its formula ---


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name: LossName, beta: float) -> None:
    settings = settings_for(name, beta=beta)
    found = pair_losses(name, make_pairs(), settings)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(written_out(name, ROWS, settings), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [
        (name, smoothing)
        for name in ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo")
        for smoothing in (1e-3, 0.1, 0.4, 0.5)
        if (name, smoothing) != ("robust", 0.5)  # refused: it would divide by 0
    ],
)
def test_a_loss_with_smoothed_labels_is_its_formula(name: LossName, smoothing: float) -> None:
    settings = settings_for(name, beta=0.2, label_smoothing=smoothing)
    found = pair_losses(name, make_pairs(), settings)
    assert found.tolist() == pytest.approx(written_out(name, ROWS, settings), rel=1e-11)


DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -0.5},
]
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
# Ratios within a few nats, so that no score reaches e^10.
NEAR_ROWS: Rows = [
    (-10.0, -12.0, -11.0, -11.0, 5, 7),
    (-30.0, -10.0, -29.25, -9.0, 9, 4),
    (-7.25, -40.5, -7.5, -38.0, 3, 12),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: "-".join(map(str, d.values())))
@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_a_loss_under_another_divergence_is_its_formula(name: LossName, divergence: dict[str, Any]) -> None:
    settings = settings_for(name, beta=0.3, **divergence)
    found = pair_losses(name, make_pairs(NEAR_ROWS), settings)
    assert found.tolist() == pytest.approx(written_out(name, NEAR_ROWS, settings), rel=1e-11)


@pytest.mark.parametrize("tau", [0.01, 0.05, 1.0, 5.0])
def test_discopop_is_its_formula_at_any_temperature(tau: float) -> None:
    settings = LossConfig(type="discopop", discopop_tau=tau)
    expected = written_out("discopop", ROWS, settings)
    assert pair_losses("discopop", make_pairs(), settings).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),  # (0 - 5)^2
        ("discopop", 0.5 * math.log(2) + 0.5),
        ("robust", math.log(2)),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("sppo_hard", 50.0),  # (0 - 5)^2 + (0 + 5)^2
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("dpop", math.log(2)),
        ("beta_dpo", math.log(2)),
        ("cal_dpo", math.log(2) + 50.0),  # (0 - 5)^2 + (0 + 5)^2
        ("sft", 2.0),  # 8 nats over 4 tokens, not the mean of 2 and 2 weighed anew
    ],
)
def test_losses_at_equality_can_be_checked_in_the_head(name: LossName, loss: float) -> None:
    pairs = make_pairs([(-6.0, -5.0, -6.0, -5.0, 3, 2), (-2.0, -9.0, -2.0, -9.0, 1, 4)])
    assert pair_losses(name, pairs, settings_for(name)).tolist() == pytest.approx([loss] * 2)


NEW_OPTIONS: list[tuple[LossName, dict[str, float]]] = [
    ("dpop", {"dpop_lambda": 0.0}),
    ("dpop", {"dpop_lambda": 5.0}),
    ("r_dpo", {"r_dpo_alpha": 0.0}),
    ("r_dpo", {"r_dpo_alpha": 0.3}),
    ("simpo", {"simpo_gamma": 0.0}),
    ("simpo", {"simpo_gamma": 1.4, "beta": 2.5}),
    ("cpo", {"cpo_alpha": 0.0}),
    ("cpo", {"cpo_alpha": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), NEW_OPTIONS, ids=str)
def test_a_loss_with_an_option_of_its_own_is_its_formula(name: LossName, options: dict[str, float]) -> None:
    settings = LossConfig(type=name, **options)  # type: ignore[arg-type]
    found = pair_losses(name, make_pairs(), settings)
    assert found.tolist() == pytest.approx(written_out(name, ROWS, settings), rel=1e-12)
    assert gradients_agree(settings, ROWS)


def test_losses_without_their_correction_are_dpo() -> None:
    plain = pair_losses("sigmoid", make_pairs(), LossConfig()).tolist()
    assert pair_losses("dpop", make_pairs(), LossConfig(type="dpop", dpop_lambda=0)).tolist() == pytest.approx(plain)
    assert pair_losses("r_dpo", make_pairs(), LossConfig(type="r_dpo", r_dpo_alpha=0)).tolist() == pytest.approx(plain)
    zeros = torch.zeros(len(ROWS), dtype=torch.float64)
    uniform = make_pairs(ref_chosen_logps=zeros, ref_rejected_logps=zeros)
    cpo = pair_losses("cpo", make_pairs(), LossConfig(type="cpo", cpo_alpha=0)).tolist()
    assert cpo == pytest.approx(pair_losses("sigmoid", uniform, LossConfig()).tolist())


def test_length_regularization_asks_less_of_a_pair_whose_chosen_completion_is_longer() -> None:
    longer, shorter = make_pairs([(-9, -9, -9, -9, 20, 10)]), make_pairs([(-9, -9, -9, -9, 10, 20)])
    settings = LossConfig(type="r_dpo")
    losses = [pair_losses("r_dpo", pairs, settings).item() for pairs in (longer, shorter)]
    assert losses[0] < math.log(2) < losses[1]


@pytest.mark.parametrize(
    ("types", "needed"),
    [
        (["simpo"], False),
        (["cpo", "orpo"], False),
        (["simpo", "sft"], False),
        (["simpo", "sigmoid"], True),
        (["sft"], True),  # its rewards compare with the reference
        (["beta_dpo"], True),
    ],
)
def test_a_reference_is_needed_unless_every_loss_does_without(types: list[LossName], needed: bool) -> None:
    assert LossConfig(type=types).needs_reference is needed


def test_sft_is_a_mean_over_tokens_not_over_completions() -> None:
    pairs = make_pairs([(-12.0, 0.0, 0.0, 0.0, 3, 1), (-1.0, 0.0, 0.0, 0.0, 10, 1)])
    assert pair_losses("sft", pairs, LossConfig(type="sft")).tolist() == [1.0, 1.0]


def test_aot_moves_with_the_micro_batch_and_the_others_do_not() -> None:
    def one_by_one(name: LossName) -> list[float]:
        return [pair_losses(name, make_pairs([row]), settings_for(name)).item() for row in ROWS]

    for name in LOSSES:
        together = pair_losses(name, make_pairs(), settings_for(name)).tolist()
        assert len(together) == len(ROWS)
        shares = name in ("aot", "aot_unpaired", "sft", "cpo", "orpo")
        assert (together == pytest.approx(one_by_one(name), rel=1e-12)) is not shares, name


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
    found = total_loss(make_pairs([(*policy, *ref, 1, 1)]), LossConfig(beta=0.1))
    assert found.loss.item() == pytest.approx(loss, rel=1e-14, abs=1e-40)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == pytest.approx(rewards)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_a_policy_equal_to_its_reference_loses_ln_2(beta: float) -> None:
    found = total_loss(
        make_pairs([(-3.0, -80.0, -3.0, -80.0, 2, 9), (-700, -0.5, -700, -0.5, 99, 1)]), LossConfig(beta=beta)
    )
    assert found.loss.item() == pytest.approx(math.log(2))
    assert found.chosen_rewards.tolist() == found.rejected_rewards.tolist() == [0, 0]


# --- divergences ---


def test_scores_are_those_worked_out_by_hand() -> None:
    ratios = torch.tensor([math.log(2)], dtype=torch.float64)  # the policy is twice as likely
    assert divergence_score(ratios, "reverse_kl", 0.5).item() == pytest.approx(math.log(2))
    assert divergence_score(ratios, "forward_kl", 0.5).item() == pytest.approx(0.5)
    assert divergence_score(ratios, "js_divergence", 0.5).item() == pytest.approx(math.log(4 / 3))
    assert divergence_score(ratios, "alpha_divergence", 0.5).item() == pytest.approx(2 - math.sqrt(2))
    assert divergence_score(ratios, "alpha_divergence", 2.0).item() == pytest.approx(1.0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_scores_are_0_with_slope_at_equality(divergence: str) -> None:
    ratios = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    scores = divergence_score(ratios, divergence, 0.5)
    scores.sum().backward()
    assert scores.tolist() == pytest.approx([0, 0, 0], abs=1e-15)
    # t f''(t) at t = 1: 1, and one half for the JS divergence, whose f'' is 1 / (t (1 + t)).
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([0.5 if divergence == "js_divergence" else 1.0] * 3)


def test_the_alpha_divergence_tends_to_the_reverse_kl() -> None:
    ratios = torch.tensor([-5.0, 0.3, 4.0], dtype=torch.float64)
    for alpha, tolerance in ((1 - 1e-3, 2e-2), (1 + 1e-5, 2e-4), (1 + 1e-7, 0.0), (1.0, 0.0)):
        scores = divergence_score(ratios, "alpha_divergence", alpha)
        assert (scores - ratios).abs().max().item() <= tolerance


def test_the_alpha_divergence_stops_at_e_to_the_80() -> None:
    ratios = torch.tensor([-1e4, -159.0], requires_grad=True)
    scores = divergence_score(ratios, "alpha_divergence", 0.5)
    scores.sum().backward()
    assert torch.isfinite(scores).all()
    assert ratios.grad is not None and ratios.grad[0] == 0 and ratios.grad[1] > 1e34


# --- tokens that count less, pairs that count less ---


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_weighted_sums_are_those_of_a_loop(alpha: float) -> None:
    lengths = [3, 5, 2, 4, 1, 5, 7, 2]  # four chosen, four rejected
    random = torch.Generator().manual_seed(0)
    logps = -8 * torch.rand(sum(lengths), generator=random)
    expected, start = [], 0
    for row, length in enumerate(lengths):
        shared = min(length, lengths[(row + 4) % 8])
        values = logps[start : start + length].tolist()
        expected.append(math.fsum(values[:shared]) + alpha * math.fsum(values[shared:]))
        start += length
    chosen, rejected = weighted_sums(logps, torch.tensor(lengths), alpha)
    assert chosen.tolist() + rejected.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_weighted_sums_is_the_weight_of_each_token() -> None:
    logps = torch.zeros(3 + 1 + 1 + 2, requires_grad=True)  # chosen of 3 and 1 tokens, rejected of 1 and 2
    chosen, rejected = weighted_sums(logps, torch.tensor([3, 1, 1, 2]), 0.25)
    (chosen.sum() - rejected.sum()).backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1, 0.25, 0.25, 1, -1, -1, -0.25]


def test_wpo_weights_are_those_of_a_loop_over_the_softmax() -> None:
    lengths, vocabulary = [2, 3, 4, 1], 5  # two chosen, two rejected
    random = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(sum(lengths), vocabulary, generator=random, dtype=torch.float64)
    targets = torch.randint(vocabulary, (sum(lengths),), generator=random)
    expected, start = [], 0
    for length in lengths:
        total = 0.0
        for row in range(start, start + length):
            powers = [math.exp(x) for x in logits[row].tolist()]
            probabilities = [power / sum(powers) for power in powers]
            total += math.log(probabilities[targets[row]]) - math.log(sum(p * p for p in probabilities))
        expected.append(math.exp(total / length))
        start += length
    logps = torch.log_softmax(logits, dim=-1).requires_grad_()
    token_logps = logps.gather(1, targets[:, None]).squeeze(1)
    found = wpo_weights(token_logps, torch.logsumexp(2 * logps, dim=-1), torch.tensor(lengths))
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([expected[0] * expected[2], expected[1] * expected[3]], rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("aot", "aot_unpaired")])
def test_weights_of_pairs_multiply_each_pairs_loss(name: LossName) -> None:
    weights = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
    settings = settings_for(name, use_weighting=True)
    found = total_loss(make_pairs(wpo_weights=weights), settings).loss.item()
    losses = written_out(name, ROWS, settings)
    assert found == pytest.approx(sum(w * x for w, x in zip(weights.tolist(), losses, strict=True)) / 4, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_WEIGHT])
def test_a_pair_of_weight_2_is_the_pair_twice_and_one_of_weight_0_is_not_there(name: LossName) -> None:
    settings = settings_for(name)
    weighted = make_pairs(weights=torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=torch.float64))
    repeated = make_pairs([ROWS[0], ROWS[0], ROWS[2], ROWS[3]])
    found, expected = (total_loss(pairs, settings).loss for pairs in (weighted, repeated))
    assert found.item() == pytest.approx(expected.item(), rel=1e-13)
    found.backward()
    expected.backward()
    assert weighted.chosen_logps.grad is not None and repeated.chosen_logps.grad is not None
    (first, second, *others), gradient = repeated.chosen_logps.grad.tolist(), weighted.chosen_logps.grad.tolist()
    assert gradient == pytest.approx([first + second, 0.0, *others], rel=1e-12)


def test_pairs_that_all_weigh_nothing_have_a_loss_of_0() -> None:
    for name in ("sigmoid", "sft", "orpo"):
        pairs = make_pairs(weights=torch.zeros(4, dtype=torch.float64))
        loss = total_loss(pairs, LossConfig(type=name)).loss
        loss.backward()
        assert loss.item() == 0 and pairs.chosen_logps.grad is not None and not pairs.chosen_logps.grad.any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WITHOUT_MARGIN])
def test_a_margin_is_subtracted_from_the_logit(name: LossName) -> None:
    margins = torch.tensor([0.5, 0.0, -1.25, 3.0], dtype=torch.float64)
    options: dict[str, Any] = {"dpop_lambda": 0.0} if name == "dpop" else {}
    settings = settings_for(name, beta=0.25, **options)
    # A chosen completion that is less likely by so much, for every token where the loss has a mean over tokens.
    per_token = [row[4] if name in ("sigmoid_norm", "simpo") else 1 for row in ROWS]
    rows = [(row[0] - m / 0.25 * n, *row[1:]) for row, m, n in zip(ROWS, margins.tolist(), per_token, strict=True)]
    whole = torch.tensor([row[0] for row in ROWS], dtype=torch.float64)
    expected = pair_losses(name, make_pairs(rows, chosen_plain_logps=whole), settings).tolist()
    assert pair_losses(name, make_pairs(margins=margins), settings).tolist() == pytest.approx(expected, rel=1e-12)
    if name == "sigmoid":  # ODPO
        logits = [0.25 * (row[0] - row[2] - row[1] + row[3]) for row in ROWS]
        assert expected == pytest.approx([-log_sigmoid(x - m) for x, m in zip(logits, margins.tolist(), strict=True)])


# --- the sum ---


def test_the_total_is_the_mean_over_pairs_of_each_loss() -> None:
    for name in LOSSES:
        settings = settings_for(name)
        losses = written_out(name, ROWS, settings)
        assert total_loss(make_pairs(), settings).loss.item() == pytest.approx(sum(losses) / 4, rel=1e-12), name


def test_losses_add_up_with_their_weights() -> None:
    names: list[LossName] = ["sigmoid", "hinge", "ipo", "sft", "apo_down"]
    for weights in (None, [1.0, 0.5, -0.25, 0.0, 3.0]):
        settings = LossConfig(type=names, weights=weights, beta=0.2)
        expected = sum(
            weight * sum(written_out(name, ROWS, settings)) / 4
            for name, weight in zip(names, weights or [1.0] * 5, strict=True)
        )
        assert total_loss(make_pairs(), settings).loss.item() == pytest.approx(expected, rel=1e-12)


def test_smoothing_reaches_only_the_losses_that_take_it() -> None:
    settings = LossConfig(type=["hinge", "sigmoid"], label_smoothing=0.3)
    smooth, plain = LossConfig(label_smoothing=0.3), LossConfig()
    expected = written_out("hinge", ROWS, plain), written_out("sigmoid", ROWS, smooth)
    assert total_loss(make_pairs(), settings).loss.item() == pytest.approx(sum(map(sum, expected)) / 4, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_beta_times_the_plain_ratio_and_carry_no_gradient(name: LossName) -> None:
    changes: dict[str, Any] = {"f_divergence_type": "js_divergence"} if name in WITH_DIVERGENCE else {}
    found = total_loss(make_pairs(), settings_for(name, beta=0.25, **changes))
    assert found.loss.requires_grad and found.loss.shape == ()
    assert not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad
    tokens = [(row[4], row[5]) if name in ("simpo", "orpo") else (1, 1) for row in ROWS]
    chosen = [0.25 * (row[0] - row[2]) / n for row, (n, _) in zip(ROWS, tokens, strict=True)]
    rejected = [0.25 * (row[1] - row[3]) / n for row, (_, n) in zip(ROWS, tokens, strict=True)]
    assert found.chosen_rewards.tolist() == pytest.approx(chosen)
    assert found.rejected_rewards.tolist() == pytest.approx(rejected)


# --- gradients ---


def gradients_agree(settings: LossConfig, rows: Rows) -> bool:
    """Compare autograd with differences, in all three policy logps, each of them a leaf of its own."""
    pairs = make_pairs(rows)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        changes = {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_plain_logps": plain}
        return total_loss(make_pairs(rows, **changes), settings).loss

    leaves = [pairs.chosen_logps, pairs.rejected_logps, pairs.chosen_logps]
    return bool(torch.autograd.gradcheck(loss, [leaf.detach().clone().requires_grad_() for leaf in leaves]))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_differences(name: LossName) -> None:
    assert gradients_agree(settings_for(name, beta=0.3), ROWS)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: "-".join(map(str, d.values())))
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_gradients_under_another_divergence_are_those_of_differences(
    name: LossName, divergence: dict[str, Any]
) -> None:
    assert gradients_agree(settings_for(name, beta=0.3, **divergence), NEAR_ROWS)


def test_the_gradient_raises_chosen_and_lowers_rejected_in_equal_measure() -> None:
    pairs = make_pairs([(-10, -12, -11, -11, 1, 1)])
    total_loss(pairs, LossConfig(beta=0.1)).loss.backward()
    assert pairs.chosen_logps.grad is not None and pairs.rejected_logps.grad is not None
    # d loss / d chosen = -beta * sigmoid(-margin), eq. 7 differentiated; the margin is 0.2.
    assert pairs.chosen_logps.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.2)))
    assert pairs.rejected_logps.grad.item() == pytest.approx(0.1 / (1 + math.exp(0.2)))


# --- extremes, in the float32 of training ---

FAR = (1e4, -1e4, 0.0)
FAR_ROWS: Rows = [(c, r, 0.0, 0.0, 5, 7) for c in FAR for r in FAR]


def far_losses(settings: LossConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of all far pairs, and the gradients of both sides."""
    pairs = make_pairs(FAR_ROWS, torch.float32)
    losses = pair_losses(settings.types[0], pairs, settings)
    losses.sum().backward()
    sides = [side.grad for side in (pairs.chosen_logps, pairs.rejected_logps) if side.grad is not None]
    return losses.detach(), torch.stack(sides)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_ratios_of_ten_thousand_give_finite_losses_and_gradients(name: LossName, beta: float) -> None:
    losses, gradients = far_losses(settings_for(name, beta=beta))
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradients).all()


def test_discopop_above_a_temperature_of_1_is_beyond_all_measure_far_down_and_never_nan() -> None:
    # Far down m exp(-x) is exp(-x (1 - 1/tau)) and grows, to exp(900): infinite in float32, or a cap near its end.
    losses, gradients = far_losses(LossConfig(type="discopop", discopop_tau=10.0))
    assert (losses > 1e30).sum() == 3  # the three pairs with chosen below rejected
    assert not losses.isnan().any()
    assert not gradients.isnan().any()


@pytest.mark.parametrize(
    ("name", "divergence"),
    [(n, d) for n in WITH_DIVERGENCE for d in ("forward_kl", "js_divergence", "alpha_divergence")],
)
def test_ratios_of_ten_thousand_give_no_nan_under_another_divergence(name: LossName, divergence: str) -> None:
    # Not finite throughout: the square of a score near e^80, in ipo, is beyond float32.
    losses, gradients = far_losses(settings_for(name, f_divergence_type=divergence))
    assert not losses.isnan().any()
    assert not gradients.isnan().any()


# --- what is refused ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["type=[]"], "loss.type: must be at least one loss"),
        (["type=[hinge, sft, hinge]"], "loss.type: must be different losses"),
        (["type=[hinge, sft]", "weights=[1]"], "loss.weights: must be 2 finite numbers, one for each loss, got [1.0]"),
        (["weights=[1, 2]"], "loss.weights: must be 1 finite numbers, one for each loss, got [1.0, 2.0]"),
        (["weights=[nan]"], "loss.weights: must be 1 finite numbers, one for each loss, got [nan]"),
        (
            ["type=[hinge, sft]", "weights=[1, inf]"],
            "loss.weights: must be 2 finite numbers, one for each loss, got [1.0, inf]",
        ),
        (["beta=0"], "loss.beta: must be a positive finite number, got 0.0"),
        (["beta=-0.1"], "loss.beta: must be a positive finite number, got -0.1"),
        (["beta=inf"], "loss.beta: must be a positive finite number, got inf"),
        (["beta=nan"], "loss.beta: must be a positive finite number, got nan"),
        (["label_smoothing=0.51"], "loss.label_smoothing: must be from 0 to 0.5, got 0.51"),
        (["label_smoothing=-0.1"], "loss.label_smoothing: must be from 0 to 0.5, got -0.1"),
        (["type=hinge", "label_smoothing=0.1"], "loss.label_smoothing: must be 0 for hinge, got 0.1"),
        (["type=[ipo, sft]", "label_smoothing=0.1"], "got 0.1. Add one of sigmoid, sigmoid_norm, exo_pair"),
        (["type=robust", "label_smoothing=0.5"], "loss.label_smoothing: must be below 0.5 for robust, got 0.5"),
        (["type=exo_pair"], "loss.label_smoothing: must be above 0 for exo_pair, got 0.0"),
        (["type=[sigmoid, exo_pair]"], "loss.label_smoothing: must be above 0 for exo_pair, got 0.0"),
        *(
            (
                [f"type={name}", "f_divergence_type=forward_kl"],
                f"loss.f_divergence_type: must be reverse_kl for {name}, got 'forward_kl'",
            )
            for name in LOSSES
            if name not in WITH_DIVERGENCE
        ),
        (
            ["f_alpha_divergence_coef=0.3"],
            "loss.f_alpha_divergence_coef: must be left out unless f_divergence_type is alpha_divergence, got 0.3",
        ),
        (
            ["f_divergence_type=alpha_divergence", "f_alpha_divergence_coef=inf"],
            "loss.f_alpha_divergence_coef: must be a finite number, got inf",
        ),
        (["ld_alpha=1.01"], "to 1 (plain sums), got 1.01"),
        (["ld_alpha=-0.01"], "loss.ld_alpha: must be from 0 ("),
        (["type=aot", "use_weighting=true"], "loss.use_weighting: must be false for aot and aot_unpaired, got True"),
        (
            ["type=[sigmoid, aot_unpaired]", "use_weighting=true"],
            "loss.use_weighting: must be false for aot and aot_unpaired, got True",
        ),
        (["type=discopop", "discopop_tau=0"], "loss.discopop_tau: must be a positive finite number, got 0.0"),
        (["type=discopop", "discopop_tau=inf"], "loss.discopop_tau: must be a positive finite number, got inf"),
        *(
            ([f"{option}=0.1"], f"loss.{option}: must be left out unless {name} is a loss, got 0.1")
            for name, option in (
                ("dpop", "dpop_lambda"),
                ("beta_dpo", "beta_dpo_alpha"),
                ("beta_dpo", "beta_dpo_filter"),
                ("r_dpo", "r_dpo_alpha"),
                ("simpo", "simpo_gamma"),
                ("cpo", "cpo_alpha"),
            )
        ),
        (["type=beta_dpo", "beta_dpo_filter=1"], "loss.beta_dpo_filter: must be from 0 to below 1, got 1.0"),
        (["type=simpo", "simpo_gamma=-1"], "loss.simpo_gamma: must be a finite number from 0, got -1.0"),
        (["type=[sigmoid, orpo]", "ld_alpha=0.5"], "loss.ld_alpha: must be left out for orpo, got 0.5"),
        *(
            ([f"type={name}", "data.columns={weight: w}"], f"data.columns.weight: must be left out for {name}, which")
            for name in WITHOUT_WEIGHT
        ),
        *(
            ([f"type={name}", "data.columns={margin: m}"], f"data.columns.margin: must be left out for {name}, which")
            for name in WITHOUT_MARGIN
        ),
        (["type=simpo", "reference.sync={}"], "reference.sync: must be left out for simpo"),
        (["data.columns={weight: w}", "reference.sync={}"], "must be left out if reference.sync is set"),
        (["discopop_tau=0.1"], "loss.discopop_tau: must be left out unless discopop is a loss, got 0.1"),
        (["router_aux_loss_coef=-1"], "loss.router_aux_loss_coef: must be a finite number from 0, got -1.0"),
        (["router_aux_loss_coef=inf"], "loss.router_aux_loss_coef: must be a finite number from 0, got inf"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_an_impossible_combination_is_refused_and_its_key_named(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: pairs.jsonl}\npolicy: {model: model}\nprecompute: {output: shards}\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(file, [o if o.startswith(("data.", "reference.")) else f"loss.{o}" for o in overrides])
    assert message in str(refusal.value)


def test_a_balance_loss_that_the_library_does_not_compute_weighs_nothing() -> None:
    """Llama 4 has a coefficient and routers, and its class gives no such loss."""
    settings = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}
    with torch.device("meta"):
        mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings))
        llama4 = transformers.Llama4ForCausalLM(
            transformers.Llama4TextConfig(**settings, head_dim=8, intermediate_size_mlp=48)
        )
    assert llama4.config.router_aux_loss_coef == mixtral.config.router_aux_loss_coef == 0.001
    assert balance_weight(mixtral, LossConfig()) == 0.001
    assert balance_weight(llama4, LossConfig()) == 0
    asked = LossConfig(router_aux_loss_coef=0.1)
    assert balance_weight(mixtral, asked) == 0.1
    with pytest.raises(ConfigError, match=r"loss\.router_aux_loss_coef: must be left out .*, got 0\.1 for llama4_text"):
        balance_weight(llama4, asked)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_asked_for_by_name(tmp_path: Path, name: LossName) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: pairs.jsonl}\npolicy: {model: model}\nprecompute: {output: shards}\n")
    smoothing = ["loss.label_smoothing=0.1"] if name == "exo_pair" else []
    assert load_config(file, [f"loss.type={name}", *smoothing]).loss.types == [name]
