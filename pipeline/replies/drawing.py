"""Replies of the policy and of the reference to the same prompts, each scored under both models.

    reference draws -> policy draws, scores both -> reference scores both

One model is in memory at a time. A reference that is the policy with its adapter off is not loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError
from pipeline.base.progress import Progress, say, without_other_bars
from pipeline.base.signals import StopFlag
from pipeline.config.schema import Config
from pipeline.models.files import policy_as_reference
from pipeline.models.identity import policy_reference_relation
from pipeline.models.loading import load_reference, pick_device
from pipeline.models.precision import reference_precision
from pipeline.replies.records import Reply
from pipeline.replies.sampling import Sampling, draw_replies, leave_if_asked, score_replies, stop_ids
from pipeline.scoring.memory import peak_memory
from pipeline.scoring.scorer import Scorer

__all__ = ["draw_both", "loaded_scorer"]


def draw_both(
    config: Config,
    policy_folder: Path,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokenizer: Any,
    flag: StopFlag,
) -> list[tuple[Reply, Reply]]:
    """Draw a reply of the reference and one of the policy to each prompt's ids, and score all under both.

    The policy's folder holds a whole model or an adapter. The replies, of the reference and of the policy for each
    prompt, come without rewards.

    Raises:
        ConfigError: A model can't draw or score replies.
        DataError: The weights of a model are not all finite.
        UnfinishedError: A stop was requested.
    """
    trained = policy_as_reference(config, policy_folder)
    stops = stop_ids(config, tokenizer)
    progress = Progress("generate", 2 * len(prompts), "replies")

    def count(replies: int, tokens: int) -> None:
        progress.advance(replies, tokens=tokens, memory=peak_memory(pick_device()))

    def draw(scorer: Scorer) -> list[list[int]]:
        model, pad_id = scorer.model, scorer.pad_id
        return draw_replies(model, prompts, sampling, stops=stops, pad_id=pad_id, flag=flag, count=count)

    def score(scorer: Scorer) -> list[list[float]]:
        leave_if_asked(flag)
        return score_replies(scorer, prompts, of_policy, of_reference)

    try:
        alike = reference_precision(config) == reference_precision(trained)
        if alike and policy_reference_relation(config).adapters_off:
            with loaded_scorer(trained, "policy", tokenizer) as scorer:
                with scorer.model.disable_adapter():
                    of_reference = draw(scorer)
                of_policy = draw(scorer)
                policy_logps = score(scorer)
                with scorer.model.disable_adapter():
                    ref_logps = score(scorer)
        else:
            with loaded_scorer(config, "reference", tokenizer) as scorer:
                of_reference = draw(scorer)
            with loaded_scorer(trained, "policy", tokenizer) as scorer:
                of_policy = draw(scorer)
                policy_logps = score(scorer)
            with loaded_scorer(config, "reference", tokenizer) as scorer:
                ref_logps = score(scorer)
    finally:
        progress.close()

    def reply(ids: list[int], ref_logps: float, policy_logps: float) -> Reply:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(text=text, num_tokens=len(ids), ref_logps=ref_logps, policy_logps=policy_logps, reward=None)

    by_policy = map(reply, of_policy, ref_logps[0], policy_logps[0])
    by_reference = map(reply, of_reference, ref_logps[1], policy_logps[1])
    return list(zip(by_reference, by_policy, strict=True))


def loaded_scorer(config: Config, what: str, tokenizer: Any) -> Scorer:
    """Load the reference that the settings name, and check its weights. A `with` block releases it."""
    named = config.reference
    say(f"Loading the {what} {named.adapter or named.model or config.policy.model} ...")
    with without_other_bars():
        model: Any = load_reference(config, pick_device())
    # Quantized weights and weights on the meta device have no values to look at.
    visible = (w for w in model.parameters() if w.is_floating_point() and w.device.type != "meta")
    if not all(bool(weight.isfinite().all()) for weight in visible):
        raise DataError(f"the {what}'s weights must be finite, got NaN or infinity: its training has diverged")
    autocast = reference_precision(config).autocast
    return Scorer.check(model, tokenizer, f"the {what}", config.data.max_length, autocast)
