"""Per-pair metrics of a micro-batch, and their averages over the pairs of one log entry."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.config.loss import LossConfig
from pipeline.scoring.forward import Scores, weighted_sums
from pipeline.training.batches import JoinedBatch
from pipeline.training.losses import PairLoss, Pairs, wpo_weights

__all__ = ["MetricsBySet", "averages_of", "columns_of", "evaluated_metrics", "first_pairs", "pairs_of"]

_OF_PAIRS = (
    *("logps/chosen", "logps/rejected", "logps/chosen_shift", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "ref/margins", "ref/accuracies", "lengths/chosen", "lengths/rejected", "lengths/truncated"),
)
_OF_TOKENS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
_OF_REFERENCE = ("logps/chosen_shift", "ref/margins", "ref/accuracies")
_OF_REFERENCE_TOKENS = ("kl/chosen", "kl/rejected")
_OF_EVALUATION = ("loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens")


def pairs_of(scores: Scores, joined: JoinedBatch, loss: LossConfig) -> Pairs:
    """Put together the losses' inputs: policy logps from the scorer, reference logps from the batch.

    Losses without a reference get 0 for its logps.
    """
    chosen, rejected = plain = scores.sums()
    if loss.ld_alpha is not None:
        # The join has weighted the reference's sums likewise.
        chosen, rejected = weighted_sums(scores.tokens.logps, scores.lengths, loss.ld_alpha)
    weights = None
    if scores.tokens.log_sum_squares is not None:
        weights = wpo_weights(scores.tokens.logps, scores.tokens.log_sum_squares, scores.lengths)
    chosen_tokens, rejected_tokens = scores.lengths.chunk(2)
    ref_chosen, ref_rejected = joined.ref_chosen_logps, joined.ref_rejected_logps
    if not loss.needs_reference:
        ref_chosen, ref_rejected = torch.zeros_like(ref_chosen), torch.zeros_like(ref_rejected)
    return Pairs(
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_plain_logps=plain[0],
        wpo_weights=weights,
        margins=joined.margins,
    )


def first_pairs(pairs: Pairs, count: int) -> Pairs:
    """Give the first `count` pairs."""
    columns: dict[str, Any] = {n: c[:count] if torch.is_tensor(c) else c for n, c in vars(pairs).items()}
    return Pairs(**columns)


def columns_of(
    joined: JoinedBatch, scores: Scores, pairs: Pairs, objective: PairLoss, loss: LossConfig
) -> dict[str, torch.Tensor]:
    """Compute all that is averaged, as sums per pair: each [P] float32."""
    ref_margins = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    margins = objective.chosen_rewards - objective.rejected_rewards
    columns = {
        "logps/chosen": pairs.chosen_logps,
        "logps/rejected": pairs.rejected_logps,
        "logps/chosen_shift": pairs.chosen_ratios,
        "rewards/chosen": objective.chosen_rewards,
        "rewards/rejected": objective.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": _share_above_zero(margins),
        "ref/margins": ref_margins,
        "ref/accuracies": _share_above_zero(ref_margins),
        "lengths/chosen": pairs.chosen_tokens,
        "lengths/rejected": pairs.rejected_tokens,
        "lengths/truncated": joined.truncated,
    }
    if not loss.needs_reference:
        for name in _OF_REFERENCE:
            del columns[name]
    if scores.aux_loss is not None:
        columns["aux_loss"] = scores.aux_loss.expand(joined.batch.num_pairs)
    columns["tokens"] = joined.batch.num_tokens
    tokens = scores.tokens
    assert tokens.entropy is not None and tokens.is_top1 is not None and tokens.mean_logit is not None
    per_token = {"entropy": tokens.entropy, "top1": tokens.is_top1, "logit": tokens.mean_logit}
    if joined.ref_token_logps is not None:
        # The k3 estimator (joschu.net/blog/kl-approx.html): never negative, 0 where the two agree.
        gap = joined.ref_token_logps - tokens.logps.detach()
        per_token["kl"] = torch.expm1(gap) - gap
    rows = torch.repeat_interleave(scores.lengths)
    for name, values in per_token.items():
        sums = torch.zeros(len(scores.lengths), device=values.device).index_add(0, rows, values.detach().float())
        columns[f"{name}_chosen"], columns[f"{name}_rejected"] = sums.chunk(2)
    columns["num_chosen"], columns["num_rejected"] = scores.lengths.chunk(2)
    return {name: values.detach().float() for name, values in columns.items()}


def _share_above_zero(margins: torch.Tensor) -> torch.Tensor:
    # A tie counts as half right, so a policy equal to its reference has an accuracy of 0.5, not 0.
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def evaluated_metrics(loss: LossConfig, *, token_logps: bool, balanced: bool) -> tuple[str, ...]:
    """Name the metrics of a held-out set, without their prefix.

    `token_logps` says that the set has reference token log-probs, `balanced` that the loss has a balance loss.
    """
    optional = _OF_REFERENCE_TOKENS * (token_logps and loss.needs_reference) + ("aux_loss",) * balanced
    of_pairs = [name for name in _OF_PAIRS if loss.needs_reference or name not in _OF_REFERENCE]
    return (*of_pairs, *_OF_TOKENS, *_OF_EVALUATION, *optional)


class MetricsBySet:
    """Averages a few metrics over the pairs of each training set, between two log entries.

    `names` are those of several sets, by number; nothing is measured without them.
    """

    _MEASURED = ("rewards/accuracies", "rewards/margins")

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._totals: dict[str, tuple[float, int]] = {}

    def add(self, columns: Mapping[str, torch.Tensor], numbers: torch.Tensor) -> None:
        """Add pairs of all processes: each column [P], the numbers of their sets [P]."""
        for number, name in enumerate(self._names):
            of_set = numbers == number
            for metric in self._MEASURED:
                total, pairs = self._totals.get(f"{metric}/{name}", (0.0, 0))
                added = float(columns[metric][of_set].sum()), int(of_set.sum())
                self._totals[f"{metric}/{name}"] = (total + added[0], pairs + added[1])

    def take(self) -> dict[str, float]:
        """Give the averages, `rewards/accuracies/NAME`, and begin anew. A set without a pair has none."""
        averages = {name: total / pairs for name, (total, pairs) in self._totals.items() if pairs}
        self._totals = {}
        return averages


def averages_of(totals: Mapping[str, float]) -> dict[str, float]:
    """Average over pairs, or over tokens for a metric of tokens."""
    chosen, rejected, pairs = totals["num_chosen"], totals["num_rejected"], totals["pairs"]
    averages = {name: total / pairs for name, total in totals.items() if "/" in name or name == "aux_loss"}
    averages["logits/chosen"] = totals["logit_chosen"] / chosen
    averages["logits/rejected"] = totals["logit_rejected"] / rejected
    if "kl_chosen" in totals:
        averages["kl/chosen"] = totals["kl_chosen"] / chosen
        averages["kl/rejected"] = totals["kl_rejected"] / rejected
    averages["entropy"] = (totals["entropy_chosen"] + totals["entropy_rejected"]) / (chosen + rejected)
    averages["mean_token_accuracy"] = totals["top1_chosen"] / chosen
    return averages
