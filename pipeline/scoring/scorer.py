"""A loaded, checked model that gives pairs their token log-probs, for every command that scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.base.errors import ConfigError, is_out_of_memory
from pipeline.base.progress import say
from pipeline.config.schema import Config
from pipeline.data.tokens import TokenizedPair
from pipeline.models.files import reference_sources
from pipeline.models.loading import load_reference, pick_device
from pipeline.models.precision import reference_precision
from pipeline.scoring.attention import switch_attention
from pipeline.scoring.forward import LOGPS, input_device, prepare, score, under_autocast
from pipeline.scoring.memory import free_memory, tokens_that_fit
from pipeline.scoring.packing import Reading, make_batch, plan_batches
from pipeline.scoring.selfcheck import check_scoring

__all__ = ["Scorer", "load_scorer"]


@dataclass(kw_only=True)
class Scorer:
    """Prepared and checked model, with the rules by which pairs are batched for it."""

    model: Any
    reading: Reading
    """How the model reads batches"""
    pad_id: int
    """Token id that fills padded rows"""
    key: str
    """Setting or option that named the model, for messages"""
    tokens_per_batch: int | None = None
    """Most tokens of one forward pass; None until `fit` has chosen it"""

    @classmethod
    def check(
        cls,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        key: str,
        max_length: int | None,
        autocast: str | None = None,
    ) -> "Scorer":
        """Prepare a loaded causal language model for scoring, and check its scores; it keeps its mode.

        `max_length` is the number of tokens of the longest sequence that can come; None if it is not known. With a
        dtype of `autocast` the model runs under it from here on, for the check too.

        Raises:
            ConfigError: The model can't be scored.
        """
        prepare(model)
        if autocast is not None:
            under_autocast(model, getattr(torch, autocast))
        reading = check_scoring(model, key, max_length, autocast)
        return cls(model=model, reading=reading, pad_id=_pad_id(tokenizer), key=key)

    @classmethod
    def of_checked(cls, model: Any, tokenizer: PreTrainedTokenizerBase, key: str, reading: Reading) -> "Scorer":
        """Prepare a model for scoring as `check` has prepared another one with the same config."""
        prepare(model)
        if reading == "packed":
            switch_attention(model)
        model.train(model.training)  # the check leaves all modules in the model's own mode
        return cls(model=model, reading=reading, pad_id=_pad_id(tokenizer), key=key)

    def fit(self) -> int:
        """Give the tokens of one forward pass; the first call probes the device if no number was given."""
        self.tokens_per_batch = self.tokens_per_batch or tokens_that_fit(self.model, self.reading)
        return self.tokens_per_batch

    def logps(
        self, pairs: Sequence[TokenizedPair]
    ) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Score pairs without gradients, in batches of similar lengths, the longest first.

        Batches depend only on the pairs' order and lengths. If memory runs out, the remaining pairs are batched anew
        with half the tokens.

        Yields:
            A pair's index, and the token logps of its chosen and its rejected completion, [tokens] float32, nats.

        Raises:
            ConfigError: Not even the longest pair alone fits the device's memory.
        """
        left = list(range(len(pairs)))
        while left:
            done: set[int] = set()
            for batch in plan_batches([pairs[i] for i in left], self.fit(), self.reading):
                indices = [left[i] for i in batch]
                try:
                    scored = self._score([pairs[i] for i in indices])
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    break
                done.update(indices)
                yield from ((i, *completions) for i, completions in zip(indices, scored, strict=True))
            left = [i for i in left if i not in done]
            if left:
                # Outside of the handler, whose error keeps the batch that did not fit.
                self._halve([pairs[i] for i in left])

    def _score(self, pairs: Sequence[TokenizedPair]) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Score one batch; give the token logps of each pair's chosen and rejected completion."""
        batch = make_batch(pairs, self.pad_id, self.reading)
        with torch.inference_mode():
            scores = score(self.model, batch.to(input_device(self.model)), want=LOGPS)
        flat = scores.tokens.logps.float().cpu().numpy()
        completions = np.split(flat, np.cumsum(batch.lengths.numpy())[:-1])
        return list(zip(completions[: len(pairs)], completions[len(pairs) :], strict=True))

    def _halve(self, pairs: Sequence[TokenizedPair]) -> None:
        widest = max(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        if self.fit() <= widest:
            raise ConfigError(
                f"{self.key}: not even the longest pair alone, {widest} tokens, fits the device's memory. "
                "Use a larger device, a narrower dtype or a smaller data.max_length"
            )
        self.tokens_per_batch = self.fit() // 2
        say(
            f"Out of memory: resuming with {self.tokens_per_batch} tokens in a batch "
            f"(precompute.tokens_per_batch: {self.tokens_per_batch} avoids this)",
            err=True,
        )
        free_memory()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        """Drop the model and release its memory."""
        self.model = None
        free_memory()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id or tokenizer.eos_token_id or 0


def load_scorer(
    config: Config, tokenizer: PreTrainedTokenizerBase, key: str | None = None, tokens_per_batch: int | None = None
) -> Scorer:
    """Load the reference that the settings name, and check it. A `with` block releases it.

    Raises:
        ConfigError: The model can't be scored.
        DataError: A weight file is damaged.
    """
    model = load_reference(config, pick_device())
    named, autocast = reference_sources(config)[0], reference_precision(config).autocast
    scorer = Scorer.check(model, tokenizer, key or named.key, config.data.max_length, autocast)
    scorer.tokens_per_batch = tokens_per_batch
    return scorer
