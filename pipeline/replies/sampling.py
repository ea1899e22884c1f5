"""Prompts of a set, replies that a model draws to them, and the log-probs of replies under a model.

At temperature 1 a reply is drawn from the model's own distribution: top_k, top_p, temperature and penalties of the
model's folder are ignored. The mean of log policy - log reference over the policy's replies is then an unbiased
estimate of the KL divergence. For replies that are cut off, it is the KL of the part before the cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from pipeline.base.errors import ConfigError, stopped_as_asked
from pipeline.base.signals import StopFlag
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.data.intake import outcomes
from pipeline.data.pairs import Message
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, read_rows
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import NamedModel
from pipeline.models.lengths import exact_length
from pipeline.models.parts import causal_of
from pipeline.scoring.forward import input_device
from pipeline.scoring.scorer import Scorer

__all__ = ["Prompt", "Sampling", "choose_prompts", "draw_replies", "leave_if_asked", "score_replies", "stop_ids"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a preference set."""

    row: int
    """Position of its pair in the source"""
    ids: list[int]
    """Token ids, as DPO reads them"""
    content: str | list[Message]
    """Text, or a conversation that ends before the reply"""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of drawing replies."""

    max_tokens: int
    """Number of tokens of the longest reply"""
    temperature: float
    """1 draws from the model's own distribution, 0 takes the most likely token"""
    seed: int
    batch_replies: int = 16
    """Number of replies that are drawn together; a GPU draws 16 about as fast as one, with a small key-value cache"""


def choose_prompts(
    source: Source, tokenizer: transformers.PreTrainedTokenizerBase, data: DataConfig, count: int, flag: StopFlag
) -> list[Prompt]:
    """Choose different prompts, spread evenly over a set, by row; fewer than `count` if the set has no more.

    A streamed hub dataset gives its first prompts, since its length is unknown.

    Raises:
        UnfinishedError: A stop was requested.
    """
    total = count_rows(source)
    if total is None and not (source.format == "hub" and source.streaming):
        total = sum(1 for _ in read_rows(source))
    wanted = range(count) if total is None else np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    chosen: dict[tuple[int, ...], Prompt] = {}
    # If a row is dropped, or repeats a prompt, the next row takes its place; at the set's end, the first ones do.
    for places in (wanted, [0] * len(wanted)):
        for position, row in enumerate(read_rows(source)):
            leave_if_asked(flag)
            if len(chosen) == len(wanted):
                break
            if position < places[len(chosen)]:
                continue
            for outcome in outcomes([row], tokenizer, data):
                if outcome.kept is not None and outcome.pair is not None:
                    ids = outcome.kept.pair.prompt_ids
                    chosen.setdefault(tuple(ids), Prompt(row=row.number, ids=ids, content=outcome.pair.prompt))
    return sorted(chosen.values(), key=lambda prompt: prompt.row)


def stop_ids(config: Config, tokenizer: Any) -> list[int]:
    """Give the tokens that end a reply of either model: the tokenizer's EOS, and those of the policy's model."""
    folder = NamedModel.policy(config).folder()
    named: Any = getattr(NamedModel.policy(config).text_config(), "eos_token_id", None)
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
    """Draw one reply to each prompt. Two models with the same prompts and seed use the same random numbers.

    Args:
        model: Causal language model in evaluation mode, with or without adapter.
        prompts: Token ids of each prompt.
        stops: Tokens that end a reply.
        pad_id: Token that fills the shorter prompts of a batch, on the left.
        count: Called after each batch with its number of replies and of their tokens.

    Returns:
        Token ids of the replies, in the prompts' order. A reply ends with its stop token unless it was cut off.

    Raises:
        ConfigError: A prompt leaves no room for a reply.
        UnfinishedError: A stop was requested.
    """
    causal = causal_of(model)

    def stop_is_asked(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), bool(flag), device=input_ids.device)

    replies: dict[int, list[int]] = {}
    # Prompts of similar lengths need little padding.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for start in range(0, len(order), sampling.batch_replies):
        batch = order[start : start + sampling.batch_replies]
        width = max(len(prompts[i]) for i in batch)
        config = _generation_config(causal, width, sampling, stops, pad_id)
        padded = [[pad_id] * (width - len(prompts[i])) + list(prompts[i]) for i in batch]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch]
        # Seed each batch: the two models' batches take different numbers of steps.
        torch.manual_seed(sampling.seed + start)
        with torch.inference_mode():
            drawn = causal.generate(
                input_ids=torch.tensor(padded, device=input_device(model)),
                attention_mask=torch.tensor(mask, device=input_device(model)),
                generation_config=config,
                stopping_criteria=transformers.StoppingCriteriaList([stop_is_asked]),
            )
        leave_if_asked(flag)
        for i, reply in zip(batch, drawn[:, width:].tolist(), strict=True):
            end = next((n for n, token in enumerate(reply, start=1) if token in stops), len(reply))
            replies[i] = reply[:end]
        count(len(batch), sum(len(replies[i]) for i in batch))
    return [replies[i] for i in range(len(prompts))]


def _generation_config(causal: Any, width: int, sampling: Sampling, stops: Sequence[int], pad_id: int) -> Any:
    model_config = causal.config.get_text_config()
    longest = exact_length(model_config) or getattr(model_config, "max_position_embeddings", None) or math.inf
    room = min(sampling.max_tokens, longest - width)
    if room < 1:
        raise ConfigError(f"data.max_length: prompts must be shorter than the model's {longest} tokens, got {width}")
    # A top_k that is left out would be 50.
    how: dict[str, Any] = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=int(room),
        eos_token_id=list(stops) or None,
        pad_token_id=pad_id,
        **(how if sampling.temperature > 0 else {"do_sample": False}),
    )
    # `generate` takes options that are not set here from the model's own configuration.
    causal.generation_config = config
    return config


def leave_if_asked(flag: StopFlag) -> None:
    """Raise UnfinishedError if a stop was requested. Replies are written only once all are drawn."""
    if flag:
        raise stopped_as_asked("no replies were written")


def score_replies(
    scorer: Scorer, prompts: Sequence[Sequence[int]], *replies: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Give a model's logps of one or two lists of replies to N prompts, as token ids.

    Returns:
        For each list, the logps of its replies: nats, summed over the tokens.
    """
    # Two replies to a prompt make a pair. A single reply is both sides of its pair, and is computed once.
    pairs = [
        TokenizedPair(prompt_ids=list(prompt), chosen_ids=list(one), rejected_ids=list(other))
        for prompt, one, other in zip(prompts, replies[0], replies[-1], strict=True)
    ]
    sums = {i: (math.fsum(one.tolist()), math.fsum(other.tolist())) for i, one, other in scorer.logps(pairs)}
    return [[sums[i][side] for i in range(len(pairs))] for side in range(len(replies))]
