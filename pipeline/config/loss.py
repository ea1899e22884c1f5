"""The `loss` section: the objective's names and options, and what contradicts what."""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.config.convert import require

__all__ = ["WITHOUT_MARGIN", "WITHOUT_REFERENCE", "WITHOUT_WEIGHT", "LossConfig", "LossName"]

# fmt: off
LossName = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "dpop", "beta_dpo", "cal_dpo", "r_dpo", "simpo", "cpo",
    "orpo",
]
# fmt: on

WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
"""Losses without a reference. `sft` alone has none in its formula either, but its metrics compare with one."""
WITHOUT_WEIGHT = ("aot", "aot_unpaired", "beta_dpo")
"""Losses of which no value belongs to one pair, so that pairs can't be weighted"""
WITHOUT_MARGIN = (
    *("ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft", "cal_dpo"),
    "orpo",
)
"""Losses that are no function of one logit beta (delta)"""

# The losses that take each option. An option that no named loss takes is refused, not ignored.
_WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_WITH_SMOOTHING = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo")
_OPTIONS_OF = {
    "dpop_lambda": ("dpop", math.inf),
    "beta_dpo_alpha": ("beta_dpo", math.inf),
    "beta_dpo_filter": ("beta_dpo", 1.0),
    "r_dpo_alpha": ("r_dpo", math.inf),
    "simpo_gamma": ("simpo", math.inf),
    "cpo_alpha": ("cpo", math.inf),
}
"""Options of one loss: the loss, and the value that they must stay below"""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective. Names and defaults are those of TRL's DPOConfig."""

    type: list[LossName] | LossName = "sigmoid"
    """One loss or a list of them; `sigmoid` is DPO (arXiv 2305.18290, eq. 7)."""
    weights: list[float] | None = None
    """One weight for each loss of a list; if left out, 1 each."""
    beta: float = 0.1
    """Strength of the pull toward the reference, per nat; the paper's tau for `ipo`, and its lambda for `orpo`."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, 0 to 0.5: conservative DPO for `sigmoid`, the epsilon of `robust`, ..."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence between policy and reference (arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """The alpha of `alpha_divergence`."""
    ld_alpha: float | None = None
    """Weight, 0 to 1, of tokens beyond the shorter completion's length, in both models (LD-DPO, arXiv 2409.06411)."""
    use_weighting: bool = False
    """Weight pairs by their probability under the policy (WPO, arXiv 2406.11827)."""
    discopop_tau: float = 0.05
    """Temperature of `discopop`."""
    dpop_lambda: float | None = None
    """Weight of `dpop`'s penalty for a chosen completion below its reference; if left out, 50, the paper's."""
    beta_dpo_alpha: float | None = None
    """Share by which `beta_dpo` moves beta for each nat of the micro-batch's mean log-ratio margin above the running
    mean; if left out, 0.6."""
    beta_dpo_filter: float | None = None
    """Share of each micro-batch that `beta_dpo` leaves out, mostly outliers; if left out, 0. The paper has 0.2."""
    r_dpo_alpha: float | None = None
    """Price of a token in `r_dpo`, a reward; if left out, 0.01."""
    simpo_gamma: float | None = None
    """Margin of rewards that `simpo` asks for; if left out, 0.5. Its paper tries 0.3 to 1.6, with beta 2 to 2.5."""
    cpo_alpha: float | None = None
    """Weight of `cpo`'s cross-entropy on the chosen completions; if left out, 1."""
    router_aux_loss_coef: float | None = None
    """Weight of the balance loss of a mixture-of-experts model, 0 for none; if left out, the model's own."""

    @property
    def types(self) -> list[LossName]:
        """The losses as a list."""
        return self.type if isinstance(self.type, list) else [self.type]

    @property
    def weights_of_types(self) -> list[float]:
        """One weight for each of `types`."""
        return self.weights if self.weights is not None else [1.0] * len(self.types)

    @property
    def needs_reference(self) -> bool:
        """False for `simpo`, `cpo` and `orpo`, alone or with `sft`: there is nothing for stage one to do."""
        return not set(self.types) & set(WITHOUT_REFERENCE) or bool(set(self.types) - {*WITHOUT_REFERENCE, "sft"})

    def __post_init__(self) -> None:
        types, names = set(self.types), ", ".join(self.types)
        require(bool(types), "type", "at least one loss", self.types)
        require(len(types) == len(self.types), "type", "different losses", names, "Weight a loss instead")
        if self.weights is not None:
            fits = len(self.weights) == len(types) and all(map(math.isfinite, self.weights))
            require(fits, "weights", f"{len(types)} finite numbers, one for each loss", self.weights)
        require(0 < self.beta < math.inf, "beta", "a positive finite number", self.beta)
        smoothing, tau, alpha = self.label_smoothing, self.discopop_tau, self.f_alpha_divergence_coef
        require(0 <= smoothing <= 0.5, "label_smoothing", "from 0 to 0.5", smoothing)
        takes_it = not smoothing or bool(types & set(_WITH_SMOOTHING))
        require(takes_it, "label_smoothing", f"0 for {names}", smoothing, f"Add one of {', '.join(_WITH_SMOOTHING)}")
        # robust divides by 1 - 2 label_smoothing; exo_pair takes its logarithm.
        require("robust" not in types or smoothing < 0.5, "label_smoothing", "below 0.5 for robust", smoothing)
        above = "exo_pair" not in types or smoothing > 0
        require(above, "label_smoothing", "above 0 for exo_pair", smoothing, "Set 1e-3, which is usual")
        without = ", ".join(name for name in self.types if name not in _WITH_DIVERGENCE)
        divergence = self.f_divergence_type
        require(divergence == "reverse_kl" or not without, "f_divergence_type", f"reverse_kl for {without}", divergence)
        require(math.isfinite(alpha), "f_alpha_divergence_coef", "a finite number", alpha)
        read, rule = divergence == "alpha_divergence", "left out unless f_divergence_type is alpha_divergence"
        require(read or alpha == 0.5, "f_alpha_divergence_coef", rule, alpha)
        share, weight = self.ld_alpha, self.router_aux_loss_coef
        rule = "from 0 (the common length alone) to 1 (plain sums)"
        require(share is None or 0 <= share <= 1, "ld_alpha", rule, share)
        # aot sorts pairs, so none of its values belongs to a pair that could be weighted.
        weighted = self.use_weighting and bool(types & {"aot", "aot_unpaired"})
        require(not weighted, "use_weighting", "false for aot and aot_unpaired", True)
        apart = ", ".join(name for name in self.types if name in WITHOUT_REFERENCE)
        require(share is None or not apart, "ld_alpha", f"left out for {apart}", share)
        for option, (loss, below) in _OPTIONS_OF.items():
            value = getattr(self, option)
            if value is not None:
                require(loss in types, option, f"left out unless {loss} is a loss", value)
                require(
                    0 <= value < below, option, "a finite number from 0" if below > 1 else "from 0 to below 1", value
                )
        require(0 < tau < math.inf, "discopop_tau", "a positive finite number", tau)
        require(tau == 0.05 or "discopop" in types, "discopop_tau", "left out unless discopop is a loss", tau)
        fits = weight is None or 0 <= weight < math.inf
        require(fits, "router_aux_loss_coef", "a finite number from 0", weight)
