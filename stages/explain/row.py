"""Describe the outcome of one row: its tokens, which of them are scored, and the log-probs of each."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.base.errors import ConfigError
from pipeline.config.data import DataConfig
from pipeline.data.intake import KeptPair, Outcome, outcome_of
from pipeline.data.rows import Row, Source
from pipeline.data.sources import describe, read_rows
from pipeline.data.tokens import TokenizedPair, adds_bos, num_beginnings
from stages.explain.pieces import shown, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SIDES", "Completion", "Explanation", "Logps", "Token", "explain_row", "find_row", "minus", "with_logps"]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Logps:
    """Log-probs of a token, or of a completion's scored tokens together, nats; None if unknown or not scored."""

    stored: float | None = None
    """Reference's, in the store"""
    recomputed: float | None = None
    """Reference's, as scored just now"""
    policy: float | None = None
    """Trained policy's"""

    @property
    def reference(self) -> float | None:
        return self.stored if self.recomputed is None else self.recomputed

    @property
    def gap(self) -> float | None:
        """Recomputed minus stored."""
        return minus(self.recomputed, self.stored)

    @property
    def shift(self) -> float | None:
        """Policy minus reference: the share of the reward, without beta."""
        return minus(self.policy, self.reference)


@dataclass(frozen=True, kw_only=True)
class Token(Logps):
    """One token of a pair."""

    id: int
    text: str
    """Text as `pieces.shown` writes it."""
    special: bool
    """True for a token of its own that text does not spell: BOS, EOS, a template's marks."""
    scored: bool = False
    """True if its log-prob counts."""
    cut: bool = False
    """True if it is past max_length, so the model never sees it."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """All tokens of a completion, including those past max_length."""

    tokens: tuple[Token, ...]
    ending: str
    """Sentence about its EOS: where it comes from, and if it is cut off."""
    sums: Logps = Logps()

    @property
    def scored(self) -> list[Token]:
        return [token for token in self.tokens if token.scored]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One row and what became of it."""

    set_name: str
    row: int
    place: str
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

    @property
    def scored_ids(self) -> TokenizedPair:
        """The pair as it is scored."""
        chosen, rejected = ([token.id for token in self.completions[side].scored] for side in SIDES)
        return TokenizedPair(prompt_ids=[token.id for token in self.prompt], chosen_ids=chosen, rejected_ids=rejected)


def find_row(source: Source, number: int) -> Row:
    """Read the source up to the row at this position, counted from 0. Raises ConfigError if there is no such row."""
    numbers: list[int] = []
    for row in read_rows(source):
        if row.number == number:
            return row
        numbers = [*numbers[:1], row.number]
    raise ConfigError(f"--row {number}: {describe(source)} has rows {numbers[0]} to {numbers[-1]}, counted from 0")


def explain_row(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, set_name: str) -> Explanation:
    """Describe the outcome of a row of a set."""
    outcome = outcome_of(row, tokenizer, data)
    pair, whole = outcome.pair, outcome.whole
    known = Explanation(
        set_name=set_name,
        row=row.number,
        place=row.place,
        max_length=data.max_length,
        dropped=outcome.dropped,
        why=_why_dropped(outcome, data),
    )
    if pair is None or whole is None or outcome.key is None:
        values = outcome.values or {}
        columns = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in values.items()}
        return dataclasses.replace(known, columns=columns)
    return dataclasses.replace(
        known,
        key=outcome.key.hex(),
        prompt=tuple(_tokens(tokenizer, whole.prompt_ids)),
        completions={side: _completion(getattr(pair, side), side, whole, outcome.kept, tokenizer) for side in SIDES},
        remarks=tuple(_remarks(whole, outcome.remarks, tokenizer)),
    )


def _why_dropped(outcome: Outcome, data: DataConfig) -> str:
    if outcome.error is not None:
        fate = "Both stages stop at it, since data.on_bad_row is stop" if data.on_bad_row == "stop" else "It is skipped"
        return f"{outcome.error}. {fate}"
    if outcome.dropped == "prompt_too_long" and outcome.whole is not None:
        return (
            f"its prompt alone has {len(outcome.whole.prompt_ids)} tokens, which leaves no room for a completion "
            f"within data.max_length: {data.max_length}"
        )
    if outcome.dropped == "tie":
        return "no answer of it is better than the others"
    return "" if outcome.dropped is None else "chosen and rejected are the same tokens, and data.on_identical is drop"


def _remarks(whole: TokenizedPair, remarks: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    begins = num_beginnings(whole, tokenizer)
    if begins > 1 or (begins == 0 and adds_bos(tokenizer)):
        yield f"the prompt begins with {begins or 'no'} BOS, {tokenizer.bos_token!r}"
    if whole.merged:
        yield (
            "tokens merge across the prompt's end: tokenized alone, the prompt ends in other tokens than here. Each "
            "completion therefore starts with the end of the prompt's text"
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
    return f"EOS {eos!r} {origin}" + ("" if at < count else ", and cut off")


def _tokens(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Iterator[Token]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for id, piece in zip(ids, token_bytes(tokenizer, ids), strict=True):
        yield Token(id=id, text=shown(piece) or f"<{id}>", special=id in special)


def with_logps(
    pair: Explanation,
    kind: Literal["stored", "recomputed", "policy"],
    chosen: Sequence[float],
    rejected: Sequence[float],
) -> Explanation:
    """Add log-probs of the first scored tokens, nats, and their sums to both completions."""

    def added(to: Any, logp: float) -> Any:
        return dataclasses.replace(to, **{kind: float(logp)})

    completions = {}
    for side, logps in zip(SIDES, (chosen, rejected), strict=True):
        completion = pair.completions[side]
        tokens = (*map(added, completion.tokens, logps), *completion.tokens[len(logps) :])
        # As both stages do: in float64, rounded once to float32.
        total = np.array(logps, dtype=np.float64).sum().astype(np.float32)
        completions[side] = dataclasses.replace(completion, tokens=tokens, sums=added(completion.sums, total))
    return dataclasses.replace(pair, completions=completions)


def minus(a: float | None, b: float | None) -> float | None:
    """Return a - b; None if one of them is unknown."""
    return None if a is None or b is None else a - b
