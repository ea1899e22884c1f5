"""What one row of the data becomes: its tokens, which of them are scored, and log-probs for each, side by side.

    row -> why it is dropped
        -> prompt, chosen, rejected, token by token -> stored logps | recomputed ones | those of a trained policy

The row goes through the code that both stages take their pairs from; here is only written down what came of it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.base.errors import ConfigError, RefshardError
from pipeline.base.folders import Folder
from pipeline.config.schema import DataConfig
from pipeline.data.intake import KeptPair, Outcome, outcome_of
from pipeline.data.rows import Row, Source
from pipeline.data.sources import describe, read_rows
from pipeline.data.tokens import TokenizedPair
from pipeline.models.identity import differences
from pipeline.scoring import agreement
from pipeline.scoring.agreement import Agreement, NoiseFloor
from pipeline.store.format import pair_keys, part_name
from pipeline.store.store import Store, load_store, read_checked_part, read_part
from stages.explain.pieces import shown, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Completion",
    "Explanation",
    "StoredPair",
    "Token",
    "compare",
    "explain_row",
    "find_row",
    "find_stored",
    "minus",
    "tokens_of",
    "with_logps",
    "with_stored",
]

Kind = Literal["stored", "recomputed", "policy"]
"""Whose log-prob: the reference's as the store has it, the reference's as scored just now, a trained policy's"""


SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a pair. Log-probs are in nats; None is not known, or not scored."""

    id: int
    text: str
    """As `pieces.shown` writes it"""
    special: bool
    """Not spelled by the text, but a token of its own: BOS, EOS, a template's marks"""
    scored: bool = False
    """Its log-prob counts"""
    cut: bool = False
    """Past max_length: the model never sees it"""
    stored: float | None = None
    recomputed: float | None = None
    policy: float | None = None

    @property
    def reference(self) -> float | None:
        """The reference's log-prob: as scored just now, or else as stored."""
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
    """All of a completion's tokens; those past max_length are among them, and say so."""

    tokens: tuple[Token, ...]
    ending: str
    """In words: where its EOS comes from, and whether it is still there"""
    stored_sum: float | None = None
    """Nats, over the scored tokens"""

    @property
    def scored(self) -> list[Token]:
        return [token for token in self.tokens if token.scored]

    @property
    def num_cut(self) -> int:
        return len(self.tokens) - len(self.scored)

    def sum(self, kind: Literal["stored", "recomputed", "policy", "reference", "gap", "shift"]) -> float | None:
        """Sum over the scored tokens, nats; None where one is not known, or none is scored."""
        if kind == "stored" or (kind == "reference" and self.tokens[0].recomputed is None):
            return self.stored_sum
        if kind == "gap":
            return minus(self.sum("recomputed"), self.stored_sum)
        if kind == "shift":
            return minus(self.sum("policy"), self.sum("reference"))
        values = [getattr(token, kind) for token in self.scored]
        return None if not values or None in values else _sum(values)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One row and what became of it."""

    set_name: str
    row: int
    """Position in the source, from 0"""
    place: str
    """File and line, or dataset and row"""
    max_length: int | None
    dropped: str | None = None
    """The reason under which the row is counted as dropped; None where it is kept"""
    why: str = ""
    """The same as a sentence"""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What the row says, where no tokens came of it: each column as JSON"""
    key: str | None = None
    """The pair's key, in hex"""
    prompt: tuple[Token, ...] = ()
    """No tokens where the row could not be tokenized"""
    completions: Mapping[str, Completion] = field(default_factory=dict)
    """`chosen` and `rejected`; none where the row could not be tokenized"""
    remarks: tuple[str, ...] = ()
    """What people should know of the pair, a sentence each"""

    @property
    def first_tokens(self) -> list[str]:
        """The texts of the prompt's last token, and of both completions' first."""
        return [self.prompt[-1].text, *(self.completions[side].tokens[0].text for side in SIDES)]


def find_row(source: Source, number: int) -> Row:
    """Read the source up to a row.

    Args:
        source: Where the rows are.
        number: Position in the source from 0, as shards have it.

    Raises:
        ConfigError: There is no such row; the message says which there are.
    """
    first = last = None
    for row in read_rows(source):
        if row.number == number:
            return row
        first, last = row.number if first is None else first, row.number
    raise ConfigError(f"--row {number}: {describe(source)} has rows {first} to {last}, counted from 0")


def explain_row(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataConfig, set_name: str) -> Explanation:
    """Say what becomes of a row in both stages: kept or dropped and why, its tokens and which of them are scored."""
    place: dict[str, Any] = {"set_name": set_name, "row": row.number, "place": row.place, "max_length": data.max_length}
    outcome = outcome_of(row, tokenizer, data)
    pair, whole = outcome.pair, outcome.whole
    if pair is None or whole is None or outcome.key is None:
        stops = (
            "Both stages stop at it, since data.on_bad_row is stop" if data.on_bad_row == "stop" else "It is skipped"
        )
        columns = {
            name: json.dumps(value, ensure_ascii=False, default=str) for name, value in (outcome.values or {}).items()
        }
        return Explanation(**place, dropped=outcome.dropped, why=f"{outcome.error}. {stops}", columns=columns)
    return Explanation(
        **place,
        dropped=outcome.dropped,
        why="" if outcome.dropped is None else _why_dropped(outcome.dropped, whole, data),
        key=outcome.key.hex(),
        prompt=tuple(_tokens(tokenizer, whole.prompt_ids)),
        completions={side: _completion(getattr(pair, side), side, whole, outcome.kept, tokenizer) for side in SIDES},
        remarks=tuple(_remarks(whole, outcome, tokenizer)),
    )


def tokens_of(pair: Explanation) -> TokenizedPair:
    """The pair as it is scored."""
    chosen, rejected = ([token.id for token in pair.completions[side].scored] for side in SIDES)
    return TokenizedPair(prompt_ids=[token.id for token in pair.prompt], chosen_ids=chosen, rejected_ids=rejected)


def _why_dropped(reason: str, whole: TokenizedPair, data: DataConfig) -> str:
    if reason == "prompt_too_long":
        return (
            f"its prompt alone has {len(whole.prompt_ids)} tokens, which leaves no room for a completion within "
            f"data.max_length: {data.max_length}"
        )
    return "chosen and rejected are the same tokens, and data.on_identical is drop"


def _remarks(whole: TokenizedPair, outcome: Outcome, tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    bos = tokenizer.bos_token_id
    begins = next((i for i, id in enumerate(whole.prompt_ids) if id != bos), len(whole.prompt_ids))
    if bos is not None and begins != 1:
        yield f"the prompt begins with {begins or 'no'} BOS, {tokenizer.bos_token!r}"
    if whole.merged:
        yield (
            "tokens merge across the prompt's end: tokenized alone, the prompt ends otherwise than here, so each "
            "completion starts with the end of the prompt's text"
        )
    if "identical" in outcome.remarks:
        yield "chosen and rejected are the same tokens: the loss of this pair is a constant"
    if "identical_after_truncation" in outcome.remarks:
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


def _ending(completion: Any, ids: Sequence[int], count: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say where a completion's EOS comes from. Templates write an end of line after it, so the last few count."""
    eos = tokenizer.eos_token
    at = next((i for i in range(len(ids) - 1, max(-1, len(ids) - 4), -1) if ids[i] == tokenizer.eos_token_id), None)
    if eos is None or at is None:
        return "no EOS at its end"
    if not isinstance(completion, str):
        said = f"EOS {eos!r} by the template"
    else:
        said = f"EOS {eos!r} of its own" if completion.endswith(eos) else f"EOS {eos!r} added"
    return said if at < count else f"{said}, and cut off with its end"


def _tokens(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> Iterator[Token]:
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for id, piece in zip(ids, token_bytes(tokenizer, ids), strict=True):
        yield Token(id=id, text=shown(piece) or f"<{id}>", special=id in special)


@dataclass(frozen=True, kw_only=True)
class StoredPair:
    """What a store has of one pair."""

    place: str
    """The part that it is in"""
    row: int
    """Of the dataset that was scored"""
    sums: Mapping[str, float]
    """Of either completion as the store cut it, nats"""
    lengths: Mapping[str, int]
    """Tokens of either completion as the store cut it"""
    token_logps: Mapping[str, Sequence[float]]
    """Of either completion, nats; none where the store has sums alone"""
    noise: NoiseFloor
    """Of the store, or, while it is unfinished, of the part"""


def find_stored(
    folder: Folder, key: str, row: int, identity: Mapping[str, Any]
) -> tuple[StoredPair | None, tuple[str, ...]]:
    """Look for a pair in a store, by its key, which need not be finished.

    Args:
        folder: The store.
        key: The pair's, in hex.
        row: Its row, which says where to look first.
        identity: The run's.

    Returns:
        What is stored of it, and remarks: why there is nothing, or why it may not be this run's.
    """
    remarks = []
    try:
        store = load_store(folder)
        if store.unfinished is not None:
            remarks.append(str(store.unfinished))
        found = differences(store.manifest["identity"], identity, joining=True)
        if found:
            remarks.append(f"{folder}: of another reference or tokenization than this run's: {'; '.join(found)}")
        stored = _search(store, bytes.fromhex(key), row)
    except RefshardError as error:
        return None, (*remarks, str(error))
    if stored is None:
        remarks.append(f"{folder}: no pair in it has this key")
    elif stored.row != row:
        remarks.append(f"{stored.place}: stored as row {stored.row}, an equal pair")
    return stored, tuple(remarks)


def _search(store: Store, key: bytes, row: int) -> StoredPair | None:
    for unit in _likely_first(store.units, store.manifest["plan"], row):
        # Token logps are most of a part, and are not read where the key is not there.
        keys = pair_keys(read_part(store, unit, ["pair_key"]))
        # numpy's strings of bytes drop trailing zeros.
        hits = (keys == key.rstrip(b"\0")).nonzero()[0]
        if not len(hits):
            continue
        part = read_checked_part(store, unit)
        table, noise = part.table, store.noise if store.index else part.noise
        found = table.slice(int(hits[0]), 1).to_pylist()[0]
        token_logps = {side: found[f"{side}_token_logps"] for side in SIDES if f"{side}_token_logps" in found}
        return StoredPair(
            place=store.folder.place(part_name(unit)),
            row=found["row"],
            sums={side: found[f"ref_{side}_logps"] for side in SIDES},
            lengths={side: found[f"{side}_tokens"] for side in SIDES},
            token_logps=token_logps,
            noise=noise,
        )
    return None


def _likely_first(units: Sequence[int], plan: Mapping[str, Any], row: int) -> list[int]:
    """The units, those first that hold the row if the data is as it was scored."""
    start = int(str(plan.get("rows", "0")).partition(":")[0] or 0)
    likely = (row - start) // int(plan.get("rows_per_shard") or 1)
    return sorted(units, key=lambda unit: unit != likely)


def with_stored(pair: Explanation, stored: StoredPair) -> Explanation:
    """Put what a store has of the pair beside its tokens; what is stored of a longer cut is cut as the pair is."""
    completions, remarks = {}, list(pair.remarks)
    for side, completion in pair.completions.items():
        count, length = len(completion.scored), stored.lengths[side]
        values = list(stored.token_logps.get(side, ()))[:count]
        total: float | None = stored.sums[side]
        if length != count:
            total = _sum(values) if len(values) == count else None
            remarks.append(
                f"{side}: the store has {length} tokens of it, this run scores {count}"
                + ("" if total is not None else ", so the sums are of different texts")
            )
        completions[side] = dataclasses.replace(_with_values(completion, "stored", values), stored_sum=total)
    return dataclasses.replace(pair, completions=completions, remarks=tuple(remarks))


def with_logps(
    pair: Explanation, kind: Literal["recomputed", "policy"], chosen: Sequence[float], rejected: Sequence[float]
) -> Explanation:
    """Put log-probs of all scored tokens, nats, beside the tokens."""
    values = dict(zip(SIDES, (chosen, rejected), strict=True))
    completions = {side: _with_values(completion, kind, values[side]) for side, completion in pair.completions.items()}
    return dataclasses.replace(pair, completions=completions)


def _with_values(completion: Completion, kind: Kind, values: Sequence[float]) -> Completion:
    known = [float(value) for value in values]
    tokens = [
        dataclasses.replace(token, **{kind: known[i]}) if i < len(known) else token  # type: ignore[arg-type]
        for i, token in enumerate(completion.tokens)
    ]
    return dataclasses.replace(completion, tokens=tuple(tokens))


def compare(pair: Explanation, allowed: tuple[float, float]) -> Agreement | None:
    """Compare recomputed with stored, token by token, or, where sums alone are stored, by the sums over their tokens.

    Returns:
        None where there is nothing to compare.
    """
    gaps = []
    for completion in pair.completions.values():
        by_token = [token.gap for token in completion.scored if token.gap is not None]
        of_sums = completion.sum("gap")
        if by_token:
            gaps.append(np.array(by_token))
        elif of_sums is not None:
            gaps.append(np.array([of_sums / len(completion.scored)]))
    return agreement.compare(gaps, allowed) if gaps else None


def minus(a: float | None, b: float | None) -> float | None:
    """Subtract where both are known."""
    return None if a is None or b is None else a - b


def _sum(values: Sequence[float]) -> float:
    """Add log-probs as both stages do: in float64, rounded once to float32."""
    return float(np.array(values, dtype=np.float64).sum().astype(np.float32))
