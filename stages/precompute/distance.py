"""Measure how far from ln 2 a policy starts that the settings let compute otherwise than its reference."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.base.errors import ConfigError, first_line, is_out_of_memory
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair
from pipeline.models.identity import precisions_apart
from pipeline.scoring.agreement import distance_from_start
from pipeline.scoring.scorer import load_scorer
from pipeline.store.format import ScoredPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["say_distance"]

_SAMPLE = 16
"""Number of pairs to score a second time, over all lengths"""


def say_distance(
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[KeptPair],
    score: Callable[[list[KeptPair]], list[ScoredPair]],
) -> None:
    """Print how far the policy starts from its reference, if the settings set their precisions apart.

    It loads the reference as the policy will compute, scores a few of the pairs, and releases it. Then `score` gives
    the reference's own log-probs, for which it may load the reference.
    """
    apart = precisions_apart(config)
    if apart is None:
        return
    told = f"warning: reference.dtype: the reference is scored in {apart[0]}, the policy computes in {apart[1]}"
    remedy = "To start at ln 2, leave reference.dtype and reference.autocast out"
    by_length = sorted(pairs, key=lambda pair: pair.longest)
    sample = by_length[:: -(-len(by_length) // _SAMPLE)]
    as_policy = dataclasses.replace(config.reference, dtype="auto", autocast=None)
    try:
        policy = _margins(dataclasses.replace(config, reference=as_policy), tokenizer, sample)
    except (RuntimeError, MemoryError, ConfigError) as error:
        if not isinstance(error, ConfigError) and not is_out_of_memory(error):
            raise
        # What stage two will need may not fit the devices of stage one.
        say(f"{told}, so it will not start at ln 2 (not measured: {first_line(error)}). {remedy}", err=True)
        return
    reference = [scored.chosen_token_logps.sum() - scored.rejected_token_logps.sum() for scored in score(sample)]
    margins = [policy[i] - float(margin) for i, margin in enumerate(reference)]
    say(f"{told}: {distance_from_start(margins, config.loss.beta)}. {remedy}", err=True)


def _margins(config: Config, tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[KeptPair]) -> dict[int, float]:
    """Load the reference of the settings, and give each pair's margin, nats, by its index."""
    if config.precompute.tp_plan is not None:
        raise ConfigError("precompute.tp_plan splits the reference over processes")
    with load_scorer(config, tokenizer, tokens_per_batch=1) as scorer:
        scored = scorer.logps([pair.pair for pair in pairs])
        return {i: float(chosen.sum() - rejected.sum()) for i, chosen, rejected in scored}
