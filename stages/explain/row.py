"""Explain one row of the data: its tokens, which of them are scored, and log-probs for each, side by side.

    row -> reason of a drop
        -> prompt, chosen, rejected, token by token -> log-probs: stored | recomputed | of a trained policy

The outcome of the row is that of both stages; this module only describes it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.base.errors import ConfigError
from pipeline.config.schema import DataConfig
from pipeline.data.intake import KeptPair, Outcome, outcome_of
from pipeline.data.rows import Row, Source
from pipeline.data.sources import describe, read_rows
from pipeline.data.tokens import TokenizedPair
from stages.explain.pieces import shown, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SIDES", "Completion", "Explanation", "Token", "add", "explain_row", "find_row", "minus", "with_logps"]

Kind = Literal["stored", "recomputed", "policy"]
"""Source of a log-prob: the reference's in the store, the reference's as scored just now, or a trained policy's."""

Number = Literal["stored", "recomputed", "reference", "gap", "policy", "shift"]
"""A log-prob of a token, or a difference of two."""

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a pair. Log-probs are in nats; None if unknown or not scored."""

    id: int
    text: str
    """Text as `pieces.shown` writes it."""
    special: bool
    """True for a token of its own that text does not spell: BOS, EOS, a template's marks."""
    scored: bool = False
    """True if its log-prob counts."""
    cut: bool = False
    """True if it is past max_length, so the model never sees it."""
    stored: float | None = None
    recomputed: float | None = None
    policy: float | None = None

    @property
    def reference(self) -> float | None:
        """Log-prob of the reference: recomputed, or else stored."""
        return self.stored if self.recomputed is None else self.recomputed

    @property
    def gap(self) -> float | None:
        """Recomputed minus stored."""
        return minus(self.recomputed, self.stored)

    @property
    def shift(self) -> float | None:
        """Policy minus reference: the token's share of the reward, without beta."""
        return minus(self.policy, self.reference)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """All tokens of a completion, including those past max_length."""

    tokens: tuple[Token, ...]
    ending: str
    """Sentence about its EOS: where it comes from, and if it is cut off."""
    stored_sum: float | None = None
    """Stored log-prob of the scored tokens, nats."""

    @property
    def scored(self) -> list[Token]:
        return [token for token in self.tokens if token.scored]

    def sum(self, number: Number) -> float | None:
        """Return a sum over the scored tokens, nats; None if one is unknown or none is scored."""
        if number == "stored" or (number == "reference" and self.tokens[0].recomputed is None):
            return self.stored_sum
        if number == "gap":
            return minus(self.sum("recomputed"), self.stored_sum)
        if number == "shift":
            return minus(self.sum("policy"), self.sum("reference"))
        values = [getattr(token, number) for token in self.scored]
        return None if not values or None in values else add(values)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One row and what became of it."""

    set_name: str
    row: int
    """Position in the source, from 0."""
    place: str
    """File and line, or dataset and row."""
    max_length: int | None
    dropped: str | None = None
    """Reason of the drop; None if the pair is kept."""
    why: str = ""
    """The same as a sentence."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of a row that could not be tokenized, each as JSON."""
    key: str | None = None
    """Key of the pair, in hex."""
    prompt: tuple[Token, ...] = ()
    """Empty if the row could not be tokenized."""
    completions: Mapping[str, Completion] = field(default_factory=dict)
    """`chosen` and `rejected`; empty if the row could not be tokenized."""
    remarks: tuple[str, ...] = ()
    """Sentences about the pair."""

    @property
    def scored_ids(self) -> TokenizedPair:
        """The pair as it is scored."""
        chosen, rejected = ([token.id for token in self.completions[side].scored] for side in SIDES)
        return TokenizedPair(prompt_ids=[token.id for token in self.prompt], chosen_ids=chosen, rejected_ids=rejected)


def find_row(source: Source, number: int) -> Row:
    """Read the source up to the row at this position, counted from 0 as in shards.

    Raises:
        ConfigError: There is no such row; the message names the first and the last.
    """
    numbers: list[int] = []
    for row in read_rows(source):
        if row.number == number:
            return row
        numbers = [*numbers[:1], row.number]
    raise ConfigError(f"--row {number}: {describe(source)} has rows {numbers[0]} to {numbers[-1]}, counted from 0")


def explain_row(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, set_name: str) -> Explanation:
    """Describe the outcome of a row: kept, or dropped and why; its tokens, and which of them are scored."""
    outcome = outcome_of(row, tokenizer, data)
    known: dict[str, Any] = {
        "set_name": set_name,
        "row": row.number,
        "place": row.place,
        "max_length": data.max_length,
        "dropped": outcome.dropped,
        "why": _why_dropped(outcome, data),
    }
    pair, whole = outcome.pair, outcome.whole
    if pair is None or whole is None or outcome.key is None:
        values = outcome.values or {}
        columns = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in values.items()}
        return Explanation(**known, columns=columns)
    return Explanation(
        **known,
        key=outcome.key.hex(),
        prompt=tuple(_tokens(tokenizer, whole.prompt_ids)),
        completions={side: _completion(getattr(pair, side), side, whole, outcome.kept, tokenizer) for side in SIDES},
        remarks=tuple(_remarks(whole, outcome.remarks, tokenizer)),
    )


def _why_dropped(outcome: Outcome, data: DataConfig) -> str:
    if outcome.error is not None:
        stops = data.on_bad_row == "stop"
        return f"{outcome.error}. " + (
            "Both stages stop at it, since data.on_bad_row is stop" if stops else "It is skipped"
        )
    if outcome.dropped == "prompt_too_long" and outcome.whole is not None:
        return (
            f"its prompt alone has {len(outcome.whole.prompt_ids)} tokens, which leaves no room for a completion "
            f"within data.max_length: {data.max_length}"
        )
    return "" if outcome.dropped is None else "chosen and rejected are the same tokens, and data.on_identical is drop"


def _remarks(whole: TokenizedPair, remarks: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    bos = tokenizer.bos_token_id
    begins = next((i for i, id in enumerate(whole.prompt_ids) if id != bos), len(whole.prompt_ids))
    if bos is not None and begins != 1:
        yield f"the prompt begins with {begins or 'no'} BOS, {tokenizer.bos_token!r}"
    if whole.merged:
        yield (
            "tokens merge across the prompt's end: tokenized alone, the prompt ends otherwise than here, so each "
            "completion starts with the end of the prompt's text"
        )
    if "identical" in remarks:
        yield "chosen and rejected are the same tokens: the loss of this pair is a constant"
    if "identical_after_truncation" in remarks:
        yield "cut to max_length, chosen and rejected are the same tokens: the loss of this pair is a constant"


def _completion(
    text: Any, side: str, whole: TokenizedPair, kept: KeptPair | None, tokenizer: "PreTrainedTokenizerBase"
) -> Completion:
    ids: list[int] = getattr(whole, f"{side}_ids")
    count = len(getattr(kept.pair, f"{side}_ids")) if kept is not None else 0
    tokens = [
        dataclasses.replace(token, scored=i < count, cut=i >= count and kept is not None)
        for i, token in enumerate(_tokens(tokenizer, ids))
    ]
    return Completion(tokens=tuple(tokens), ending=_ending(text, ids, count or len(ids), tokenizer))


def _ending(text: Any, ids: Sequence[int], count: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say where a completion's EOS comes from. A template may write line ends after it, so the last three count."""
    eos = tokenizer.eos_token
    at = next((i for i in range(len(ids) - 1, max(-1, len(ids) - 4), -1) if ids[i] == tokenizer.eos_token_id), None)
    if eos is None or at is None:
        return "no EOS at its end"
    origin = "by the template" if not isinstance(text, str) else "of its own" if text.endswith(eos) else "added"
    return f"EOS {eos!r} {origin}" + ("" if at < count else ", and cut off with its end")


def _tokens(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Iterator[Token]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for id, piece in zip(ids, token_bytes(tokenizer, ids), strict=True):
        yield Token(id=id, text=shown(piece) or f"<{id}>", special=id in special)


def with_logps(pair: Explanation, kind: Kind, chosen: Sequence[float], rejected: Sequence[float]) -> Explanation:
    """Add log-probs of the first scored tokens, nats, to the tokens of both completions."""
    completions = {}
    for side, values in zip(SIDES, (chosen, rejected), strict=True):
        completion = pair.completions[side]
        known: list[dict[str, Any]] = [{kind: float(value)} for value in values]
        known += [{}] * (len(completion.tokens) - len(known))
        tokens = [dataclasses.replace(token, **logp) for token, logp in zip(completion.tokens, known, strict=True)]
        completions[side] = dataclasses.replace(completion, tokens=tuple(tokens))
    return dataclasses.replace(pair, completions=completions)


def minus(a: float | None, b: float | None) -> float | None:
    """Return a - b; None if one of them is unknown."""
    return None if a is None or b is None else a - b


def add(logps: Sequence[float]) -> float:
    """Add log-probs as both stages do: in float64, rounded once to float32."""
    return float(np.array(logps, dtype=np.float64).sum().astype(np.float32))
