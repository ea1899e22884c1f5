"""Prompts of a run's own set -> replies of a model, drawn token by token, and what any model makes of replies.

At temperature 1 a reply is drawn from the model's distribution as it is: whatever the model's folder says of top_k,
top_p, temperature or penalties is left aside. So the mean of `log policy - log reference` over the policy's replies
estimates the KL divergence from the reference without bias. Of replies that are cut off it is that of what stands
before the cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from pipeline.base.errors import ConfigError, UnfinishedError
from pipeline.base.signals import StopFlag
from pipeline.config.schema import Config
from pipeline.data.intake import outcomes
from pipeline.data.pairs import Message
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, read_rows
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import find_model, policy_settings
from pipeline.scoring.forward import input_device
from pipeline.scoring.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Prompt",
    "Sampling",
    "choose_prompts",
    "draw_replies",
    "leave_if_asked",
    "score_replies",
    "stop_ids",
]

_BATCH = 16
"""Replies that are drawn at once: on a GPU hardly slower than one, and the cache of keys and values stays small."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a preference set."""

    row: int
    """Position in the source of the pair that it was taken from"""
    ids: list[int]
    """As DPO saw them"""
    content: str | list[Message]
    """As the row has it: text, or a conversation that ends before the reply"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn."""

    max_tokens: int
    """Longest reply"""
    temperature: float
    """1 draws from the model's own distribution, 0 takes the likeliest token"""
    seed: int


def choose_prompts(
    source: Source, tokenizer: "PreTrainedTokenizerBase", config: Config, count: int, flag: StopFlag
) -> list[Prompt]:
    """Choose prompts that are spread evenly over a set, all different; fewer where the set has no more.

    Of a hub dataset that is streamed it is the first ones, since its end is not known.

    Raises:
        UnfinishedError: Asked to stop.
    """
    total = count_rows(source)
    if total is None and not (source.format == "hub" and source.streaming):
        total = sum(1 for _ in read_rows(source))
    wanted = range(count) if total is None else np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    chosen: list[Prompt] = []
    seen: set[tuple[int, ...]] = set()
    for position, row in enumerate(read_rows(source)):
        leave_if_asked(flag)
        if len(chosen) == len(wanted):
            break
        if position < wanted[len(chosen)]:
            continue
        # A row that was dropped, or whose prompt was there already, leaves its place to the next.
        for outcome in outcomes([row], tokenizer, config.data):
            if outcome.kept is None or outcome.pair is None:
                continue
            ids = outcome.kept.pair.prompt_ids
            if tuple(ids) not in seen:
                seen.add(tuple(ids))
                chosen.append(Prompt(row=row.number, ids=ids, content=outcome.pair.prompt))
    return chosen


def stop_ids(config: Config, tokenizer: Any) -> list[int]:
    """Give the tokens that end a reply, for both models alike: the tokenizer's EOS and those that the policy's model
    names."""
    folder = find_model(config.policy.model, config.policy.revision, "policy.model")
    named: Any = getattr(policy_settings(config), "eos_token_id", None)
    if (folder / "generation_config.json").exists():
        named = transformers.GenerationConfig.from_pretrained(folder).eos_token_id or named
    listed = named if isinstance(named, list) else [named]
    return sorted({i for i in (*listed, tokenizer.eos_token_id) if i is not None})


def draw_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: Sequence[int],
    pad_id: int,
    flag: StopFlag,
    count: Callable[[int, int], None] = lambda replies, tokens: None,
) -> list[list[int]]:
    """Draw one reply to each prompt; two models that are asked with one seed meet the same random numbers.

    Args:
        model: A causal language model in evaluation mode, with or without adapter.
        prompts: Token ids.
        sampling: How.
        stops: Tokens that end a reply.
        pad_id: What the shorter prompts of a batch are filled with, on their left.
        flag: Asks to stop.
        count: Called with the number of replies that each batch has given, and of their tokens.

    Returns:
        Token ids of the replies, in the prompts' order, with the token that ended each; without one where a reply was
        cut off.

    Raises:
        ConfigError: A prompt leaves no room for a reply in what the model can read.
        UnfinishedError: Asked to stop.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest = getattr(causal.config.get_text_config(), "max_position_embeddings", None) or math.inf
    device = input_device(model)
    replies: dict[int, list[int]] = {}
    # Prompts of one length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        width = max(len(prompts[i]) for i in batch)
        room = min(sampling.max_tokens, longest - width)
        if room < 1:
            raise ConfigError(f"a prompt of {width} tokens leaves no room for a reply: the model reads {longest}")
        ids = torch.tensor([[pad_id] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        settings = _generation(sampling, int(room), stops, pad_id)
        # What is not named here would be taken from the model's own.
        causal.generation_config = settings
        # Anew for each batch: the models' batches take different numbers of steps.
        transformers.set_seed(sampling.seed + start)
        with torch.inference_mode():
            drawn = causal.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=transformers.StoppingCriteriaList([_Asked(flag)]),
            )
        leave_if_asked(flag)
        for i, reply in zip(batch, drawn[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(reply, start=1) if token in stops), len(reply))
            replies[i] = reply[:end]
        count(len(batch), sum(len(replies[i]) for i in batch))
    return [replies[i] for i in range(len(prompts))]


def _generation(sampling: Sampling, max_tokens: int, stops: Sequence[int], pad_id: int) -> Any:
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # Left out, top_k would be 50.
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    return transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens, eos_token_id=list(stops) or None, pad_token_id=pad_id, **how
    )


class _Asked(transformers.StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends a batch between two tokens when the program is asked to stop."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), bool(self._flag), device=input_ids.device)


def leave_if_asked(flag: StopFlag) -> None:
    """Raise UnfinishedError if asked to stop: replies are written once all are there."""
    if flag:
        raise UnfinishedError("stopped as asked; no replies were written. Run the same command again")


def score_replies(
    scorer: Scorer, prompts: Sequence[Sequence[int]], *replies: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Give a model's logps of replies.

    Args:
        scorer: Holds the model; its adapter, if any, as it is worn now.
        prompts: Token ids of N prompts.
        replies: One or two lists of N replies each, as token ids.

    Returns:
        For each list, the logps of its replies: nats, summed over the tokens.
    """
    # A prompt and two replies are a pair; a single reply is both sides of its own, and computed once.
    pairs = [
        TokenizedPair(prompt_ids=list(prompt), chosen_ids=list(one), rejected_ids=list(other))
        for prompt, one, other in zip(prompts, replies[0], replies[-1], strict=True)
    ]
    sums = {i: (math.fsum(one.tolist()), math.fsum(other.tolist())) for i, one, other in scorer.logps(pairs)}
    return [[sums[i][side] for i in range(len(pairs))] for side in range(len(replies))]
