"""The DPO family and the losses without a reference: pure functions of logps, each with its paper and equation.

Symbols, for a pair with completions c (chosen) and r (rejected): the log-ratio u is the policy's logps minus the
reference's. The score s is f'(ratio), which is u for the usual reverse KL. n is the number of completion tokens,
delta is s_c - s_r, and x is beta delta. A loss without a reference has reference logps of 0, and so u = log pi.
With margins m of the data, x - m stands for x (ODPO, arXiv 2402.10571, whose offset m is). `total_loss` averages each
loss over the pairs and adds the losses up.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from pipeline.base.errors import ConfigError
from pipeline.config.loss import LossConfig, LossName
from pipeline.models.parts import backbone_of, causal_of

__all__ = [
    "PairLoss",
    "Pairs",
    "balance_weight",
    "divergence_score",
    "pair_losses",
    "router_aux_weight",
    "total_loss",
    "wpo_weights",
]

Tensor = torch.Tensor

DPOP_LAMBDA, R_DPO_ALPHA, SIMPO_GAMMA, CPO_ALPHA = 50.0, 0.01, 0.5, 1.0
"""Values of options that are left out: the paper's, a reward of 1 for 100 tokens, and the two of TRL's CPOConfig"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Inputs of a loss: P pairs under both models, logps in nats. Only the policy's logps carry a gradient."""

    chosen_logps: Tensor
    """Policy, [P] float32; with `ld_alpha`, tokens past the shorter completion's length count `ld_alpha` each"""
    rejected_logps: Tensor
    """Policy, [P] float32, weighted likewise"""
    ref_chosen_logps: Tensor
    """Reference, [P] float32, weighted likewise"""
    ref_rejected_logps: Tensor
    """Reference, [P] float32, weighted likewise"""
    chosen_tokens: Tensor
    """Number of tokens of each chosen completion, [P]"""
    rejected_tokens: Tensor
    """Number of tokens of each rejected completion, [P]"""
    chosen_plain_logps: Tensor
    """Policy, [P] float32, every token counted once; equal to `chosen_logps` without `ld_alpha`"""
    wpo_weights: Tensor | None = None
    """WPO's weights, [P] float32, without gradient; None without WPO"""
    margins: Tensor | None = None
    """Margins of the data, [P] float32; None for 0"""
    betas: Tensor | None = None
    """beta-DPO's beta for each pair, [P], without gradient; None for `loss.beta`"""
    weights: Tensor | None = None
    """How often each pair counts in the mean, [P] float32; None for once"""
    total_weight: float | None = None
    """Divisor of the sum over pairs; None for the sum of `weights`"""

    @property
    def chosen_ratios(self) -> Tensor:
        """Log-ratios u_c, [P]"""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_ratios(self) -> Tensor:
        """Log-ratios u_r, [P]"""
        return self.rejected_logps - self.ref_rejected_logps


@dataclass(frozen=True)
class PairLoss:
    """The objective over P pairs, and the rewards that are logged."""

    loss: Tensor
    """Objective, scalar, with the gradient"""
    chosen_rewards: Tensor
    """beta * u_c for every loss and divergence, per token for `simpo` and `orpo`; [P] float32, detached"""
    rejected_rewards: Tensor
    """beta * u_r likewise, [P] float32, detached"""


def total_loss(pairs: Pairs, config: LossConfig) -> PairLoss:
    """Add up the named losses, each averaged over the pairs and times its weight.

    A policy equal to its reference has rewards of 0 and a `sigmoid` loss of ln 2: the numbers to look for at step 0.
    The mean is over this micro-batch alone, without the pairs of other ranks.
    """
    loss = torch.zeros((), dtype=pairs.chosen_logps.dtype, device=pairs.chosen_logps.device)
    chosen, rejected = pairs.chosen_ratios.detach(), pairs.rejected_ratios.detach()
    if not config.needs_reference and config.types[0] in ("simpo", "orpo"):
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    for name, weight in zip(config.types, config.weights_of_types, strict=True):
        per_pair = pair_losses(name, pairs, config)  # [P]
        if pairs.wpo_weights is not None:
            per_pair = per_pair * pairs.wpo_weights
        loss = loss + weight * _mean(per_pair, pairs)
    return PairLoss(loss=loss, chosen_rewards=config.beta * chosen, rejected_rewards=config.beta * rejected)


def _mean(per_pair: Tensor, pairs: Pairs) -> Tensor:
    """Average over the pairs, each as often as it counts; 0 if none does."""
    if pairs.weights is None:
        return per_pair.mean()
    total = pairs.weights.sum().clamp(min=torch.finfo(per_pair.dtype).tiny)
    return (per_pair * pairs.weights).sum() / (total if pairs.total_weight is None else pairs.total_weight)


def _cross_entropy(pairs: Pairs) -> Tensor:
    """Average over all tokens of the micro-batch's chosen completions, in nats, the same for every pair: [P]."""
    logps, tokens = pairs.chosen_plain_logps, pairs.chosen_tokens
    if pairs.weights is not None:
        logps, tokens = logps * pairs.weights, (tokens * pairs.weights).clamp(min=torch.finfo(logps.dtype).tiny)
    return -(logps.sum() / tokens.sum()).expand(len(logps))


def pair_losses(name: LossName, pairs: Pairs, config: LossConfig) -> Tensor:
    """Compute the loss `name` of each pair, [P]. In the formulas, e is the label smoothing, and t is discopop's tau."""
    beta, e, t = config.beta, config.label_smoothing, config.discopop_tau
    n_c, n_r = pairs.chosen_tokens, pairs.rejected_tokens
    u_c, u_r = pairs.chosen_ratios, pairs.rejected_ratios
    s_c, s_r = (divergence_score(u, config.f_divergence_type, config.f_alpha_divergence_coef) for u in (u_c, u_r))
    # Times beta, it is the margin.
    shift = 0.0 if pairs.margins is None else pairs.margins / beta
    delta = s_c - s_r - shift
    match name:
        case "sigmoid":
            # DPO (arXiv 2305.18290, eq. 7): -log sigmoid(x). With smoothing, conservative DPO.
            return _smoothed(delta, beta, e)
        case "sigmoid_norm":
            # Length-normalized DPO (arXiv 2411.15124, eq. 6): DPO on scores per token.
            return _smoothed(s_c / n_c - s_r / n_r - shift, beta, e)
        case "hinge":
            # RSO's hinge loss on the normalized likelihood (arXiv 2309.06657, eq. 10): max(0, 1 - x).
            return torch.relu(1 - beta * delta)
        case "ipo":
            # IPO (arXiv 2310.12036, eq. 17): (delta - 1/(2 beta))^2, with beta for the paper's tau, and delta per token
            # as in the authors' own code (TRL pull request 1265).
            return (s_c / n_c - s_r / n_r - 1 / (2 * beta)) ** 2
        case "exo_pair":
            # EXO for pairs (arXiv 2402.00856, eq. 16): KL of the policy's preference q = sigmoid(x) for chosen from the
            # label's, 1 - e: q ln(q/(1-e)) + (1-q) ln((1-q)/e).
            log_q, log_not_q = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
            return log_q.exp() * (log_q - math.log1p(-e)) + log_not_q.exp() * (log_not_q - math.log(e))
        case "robust":
            # Robust DPO (arXiv 2403.00409, section 3.1), unbiased if a share e below one half of the labels is flipped:
            # (-(1-e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e).
            right, flipped = -F.logsigmoid(beta * delta), -F.logsigmoid(-beta * delta)
            return ((1 - e) * right - e * flipped) / (1 - 2 * e)
        case "discopop":
            # DiscoPOP, the log-ratio modulated loss (arXiv 2406.08414, eq. 5): -(1-m) log sigmoid(x) + m exp(-x).
            x = beta * delta
            m = torch.sigmoid(x / t)
            # m exp(-x) in one exponential: their product is 0 times infinity if x is far below 0.
            exponential = torch.exp((F.logsigmoid(x / t) - x).clamp(max=80.0))
            return -(1 - m) * F.logsigmoid(x) + exponential
        case "nca_pair":
            # NCA for two completions of a prompt (arXiv 2402.05369, section 4, K = 2), with rewards r = beta u:
            # -log sigmoid(r_c) - 1/2 log sigmoid(-r_c) - 1/2 log sigmoid(-r_r).
            return -F.logsigmoid(beta * u_c) - 0.5 * F.logsigmoid(-beta * u_c) - 0.5 * F.logsigmoid(-beta * u_r)
        case "bco_pair":
            # BCO's bound on the DPO loss (arXiv 2404.04656, theorem 1), without the reward shift.
            return -F.logsigmoid(beta * u_c) - F.logsigmoid(-beta * u_r)
        case "sppo_hard":
            # SPPO (arXiv 2405.00675, eq. 4.7) with hard labels.
            return (u_c - 0.5 / beta) ** 2 + (u_r + 0.5 / beta) ** 2
        case "apo_zero":
            # APO-zero (arXiv 2408.06266, eq. 7): chosen up, rejected down.
            return 1 - torch.sigmoid(beta * u_c) + torch.sigmoid(beta * u_r)
        case "apo_down":
            # APO-down (arXiv 2408.06266, eq. 8): both down, rejected more. The paper has no 1, which has no gradient.
            return torch.sigmoid(beta * u_c) + 1 - torch.sigmoid(beta * (u_c - u_r))
        case "aot":
            # Paired alignment by optimal transport (arXiv 2406.05882, section 3): the policy's margins, sorted over the
            # micro-batch, should exceed the reference's. A value belongs to a place in that order, not to a pair.
            policy, ref = pairs.chosen_logps - pairs.rejected_logps, pairs.ref_chosen_logps - pairs.ref_rejected_logps
            return _smoothed(policy.sort().values - ref.sort().values, beta, e)
        case "aot_unpaired":
            # The same on sorted log-ratios (section 3).
            return _smoothed(u_c.sort().values - u_r.sort().values, beta, e)
        case "sft":
            # Cross-entropy on the chosen completions, without the reference: for every pair, the mean over all their
            # tokens in the micro-batch. Added to `sigmoid`, the anchor of iterative RPO (arXiv 2404.19733, the DPO+NLL
            # loss, averaged per completion there).
            return _cross_entropy(pairs)
        case "simpo" | "cpo" | "orpo":
            return _loss_without_reference(name, pairs, config)
        case "dpop" | "beta_dpo" | "cal_dpo" | "r_dpo":
            return _corrected_loss(name, pairs, config)


def _corrected_loss(name: Literal["dpop", "beta_dpo", "cal_dpo", "r_dpo"], pairs: Pairs, config: LossConfig) -> Tensor:
    """Compute a DPO loss with a correction against what DPO does to likelihoods, outliers or lengths, [P]."""
    beta, u_c, u_r = config.beta, pairs.chosen_ratios, pairs.rejected_ratios
    shift = 0.0 if pairs.margins is None else pairs.margins
    delta = u_c - u_r
    match name:
        case "dpop":
            # DPO-Positive (arXiv 2402.13228): -log sigmoid(beta (delta - lambda max(0, -u_c))). The penalty acts while
            # the chosen completion is less likely than under the reference. There is no authors' code.
            weight = _or(config.dpop_lambda, DPOP_LAMBDA)
            return -F.logsigmoid(beta * (delta - weight * torch.relu(-u_c)) - shift)
        case "beta_dpo":
            # beta-DPO (arXiv 2407.08639): DPO with a beta of the micro-batch, from `DynamicBeta`, which follows the
            # authors' code.
            return -F.logsigmoid((beta if pairs.betas is None else pairs.betas) * delta - shift)
        case "cal_dpo":
            # Cal-DPO (arXiv 2412.14516): -log sigmoid(delta), without beta, plus
            # (u_c - 1/(2 beta))^2 + (u_r + 1/(2 beta))^2, as in the paper's listing and the authors' first code
            # (Cal-DPO/Cal-DPO). Their later code (tengxiao1/Cal-DPO) has half of the squares.
            return -F.logsigmoid(delta) + (u_c - 0.5 / beta) ** 2 + (u_r + 0.5 / beta) ** 2
        case "r_dpo":
            # Length-regularized DPO (R-DPO, arXiv 2403.19159): -log sigmoid(x + alpha n_c - alpha n_r). The optimal
            # policy for the reward r - alpha n has r = beta u + alpha n, which gives the sign. There is no authors'
            # code.
            lengths = (pairs.chosen_tokens - pairs.rejected_tokens).to(delta)
            return -F.logsigmoid(beta * delta + _or(config.r_dpo_alpha, R_DPO_ALPHA) * lengths - shift)


def _loss_without_reference(name: Literal["simpo", "cpo", "orpo"], pairs: Pairs, config: LossConfig) -> Tensor:
    """Compute a loss of the policy's logps alone, [P]. n is the number of a completion's tokens."""
    beta, e = config.beta, config.label_smoothing
    chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
    shift = 0.0 if pairs.margins is None else pairs.margins / beta
    match name:
        case "simpo":
            # SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta/n_c log pi(c) - beta/n_r log pi(r) - gamma).
            per_token = chosen / pairs.chosen_tokens - rejected / pairs.rejected_tokens
            return _smoothed(per_token - _or(config.simpo_gamma, SIMPO_GAMMA) / beta - shift, beta, e)
        case "cpo":
            # CPO (arXiv 2401.08417): -log sigmoid(beta log pi(c) - beta log pi(r)), with a uniform reference (eq. 3),
            # plus the cross-entropy on the chosen completions. That is a mean over tokens, as in the authors' code,
            # which TRL has; the paper sums over a completion's tokens.
            weight = _or(config.cpo_alpha, CPO_ALPHA)
            return _smoothed(chosen - rejected - shift, beta, e) + weight * _cross_entropy(pairs)
        case "orpo":
            # ORPO (arXiv 2403.07691, eq. 6 and 7): cross-entropy - lambda log sigmoid(log odds(c) - log odds(r)), with
            # odds P/(1-P) and P the geometric mean of a completion's token probabilities, and beta for lambda. As in
            # the paper, the cross-entropy is that of the completion; TRL and, by default, the authors' code add the
            # prompt's tokens.
            log_odds = _log_odds(chosen / pairs.chosen_tokens) - _log_odds(rejected / pairs.rejected_tokens)
            return _cross_entropy(pairs) - beta * F.logsigmoid(log_odds)


def _log_odds(logps: Tensor) -> Tensor:
    """Compute log p - log(1 - p) of log-probs; a probability of 1 counts as 1 - 1e-7, so that all is finite."""
    logps = logps.clamp(max=-1e-7)
    return logps - torch.log(-torch.expm1(logps))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _smoothed(delta: Tensor, beta: float, e: float) -> Tensor:
    """Compute the DPO loss if a share e of the labels is flipped.

    This is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    return -(1 - e) * F.logsigmoid(beta * delta) - e * F.logsigmoid(-beta * delta)


def divergence_score(ratios: Tensor, divergence: str, alpha: float) -> Tensor:
    """Compute f'(t) at t = exp(u) for log-ratios u, [P], and the divergence D_f (f-DPO, arXiv 2309.16240).

    reverse_kl: ln t, as in DPO. forward_kl: 1 - 1/t. js_divergence: ln 2t/(1+t). alpha_divergence:
    (t^(alpha-1) - 1) / (alpha - 1), which tends to ln t as alpha tends to 1. Constants that cancel in the
    difference of two scores are left out, as in TRL.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return ratios
    if divergence == "forward_kl":
        # e^80 is near the largest float32. Beyond it the score is infinite and its gradient NaN.
        return 1 - torch.exp((-ratios).clamp(max=80.0))
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratios)
    return (torch.exp(((alpha - 1) * ratios).clamp(max=80.0)) - 1) / (alpha - 1)


def wpo_weights(token_logps: Tensor, log_sum_squares: Tensor, lengths: Tensor) -> Tensor:
    """Weight pairs by the policy's own likelihood of them (WPO, arXiv 2406.11827, eq. 2 and its alignment).

    A completion's weight is exp of the mean over its tokens of log p(token) - log sum_v p(v)^2. A pair's weight is
    the product of both.

    Args:
        token_logps: Policy's token logps, [N], all chosen completions and then all rejected ones.
        log_sum_squares: Log of the summed squares of the policy's probabilities at those positions, [N].
        lengths: Number of tokens of each completion, [2P].

    Returns:
        Weights, [P] float32, without gradient.
    """
    rows = torch.repeat_interleave(lengths)  # [N], the completion of each token
    aligned = (token_logps - log_sum_squares).detach()
    sums = torch.zeros(len(lengths), dtype=aligned.dtype, device=aligned.device).index_add(0, rows, aligned)
    chosen, rejected = torch.exp(sums / lengths).chunk(2)
    return chosen * rejected


def router_aux_weight(config: Any, loss: LossConfig) -> float:
    """Give the weight of the balance loss: the configured one, or the model's own; 0 for a model without experts.

    Raises ConfigError if one is configured for a model without experts.
    """
    if hasattr(config, "output_router_logits"):
        own = getattr(config, "router_aux_loss_coef", 0.0)
        return float(own if loss.router_aux_loss_coef is None else loss.router_aux_loss_coef)
    if loss.router_aux_loss_coef:
        raise _no_balance(config, loss.router_aux_loss_coef, "a model without experts that give their router's logits")
    return 0.0


def balance_weight(model: Any, loss: LossConfig) -> float:
    """Give the weight of the balance loss for a loaded model; 0 if none of its layers has experts.

    It is 0, too, if the library computes no such loss for the model's class, as for Llama 4.

    Raises ConfigError if a weight is configured for such a class.
    """
    config, causal = model.config.get_text_config(), causal_of(model)
    weight = router_aux_weight(config, loss) if _has_router(causal) else 0.0
    if weight and "output_router_logits" not in inspect.signature(type(causal).forward).parameters:
        if loss.router_aux_loss_coef:
            raise _no_balance(config, weight, "a model whose class has no balance loss")
        return 0.0
    return weight


def _no_balance(config: Any, weight: float, kind: str) -> ConfigError:
    return ConfigError(
        f"loss.router_aux_loss_coef: must be left out for {kind}, got {weight:g} for {config.model_type}. Remove it"
    )


def _has_router(causal: Any) -> bool:
    """Return True if a layer has experts; some members of mixture families have none (Jamba with one expert)."""
    recorders = (getattr(backbone_of(causal), "_can_record_outputs", None) or {}).get("router_logits")
    if recorders is None:
        return True  # The config alone says so.
    # Each recorder is a class of modules, or holds one, with the modules' name within a layer.
    wanted: list[tuple[Any, str]] = [
        (getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None) or "")
        for recorder in (recorders if isinstance(recorders, list | tuple) else (recorders,))
    ]
    return any(
        isinstance(module, kind) and part in name for name, module in causal.named_modules() for kind, part in wanted
    )
