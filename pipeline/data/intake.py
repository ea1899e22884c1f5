"""Turn rows into tokenized pairs, and count what became of each row.

Both stages take their pairs from here, so stage two asks for exactly the pairs that stage one scored.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.base.errors import BadRow
from pipeline.config.data import DataConfig
from pipeline.data.layouts import to_pair
from pipeline.data.numbers import numbers_of_loss
from pipeline.data.pairs import Pair
from pipeline.data.rows import Row
from pipeline.data.tokens import TokenizedPair, pair_key, tokenize, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KeptPair", "Ledger", "Outcome", "kept_pairs", "kept_rows", "outcome_of", "outcomes"]


@dataclass(frozen=True, kw_only=True)
class KeptPair:
    """A pair ready to be scored: truncated ids, and the key of the ids before truncation."""

    row: int
    place: str
    key: bytes
    pair: TokenizedPair
    truncated: bool = False
    """True if `max_length` cut a completion."""
    weight: float = 1.0
    """How often the pair counts in training, from 0."""
    margin: float = 0.0
    """Number that the loss subtracts from the pair's logit."""

    @property
    def longest(self) -> int:
        """Number of tokens of the longer sequence: prompt and one completion."""
        return len(self.pair.prompt_ids) + max(len(self.pair.chosen_ids), len(self.pair.rejected_ids))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row and what became of it: a kept pair, or a reason for dropping it."""

    row: Row
    values: Mapping[str, Any] | None = None
    """Columns of the row; None if the row can't be decoded."""
    pair: Pair | None = None
    """Texts or messages; None if the row is not a pair."""
    whole: TokenizedPair | None = None
    """Token ids before truncation; None if the row can't be tokenized."""
    key: bytes | None = None
    """Join key of `whole`."""
    kept: KeptPair | None = None
    """The pair as it is scored; None if the row is dropped."""
    dropped: str | None = None
    """Reason of the drop; None if the pair is kept."""
    error: BadRow | None = None
    """Error that names the fault of a bad row."""
    remarks: tuple[str, ...] = ()
    """Remarks on a kept pair, as the ledger counts them."""


@dataclass
class Ledger:
    """Counts of outcomes: rows = kept + the sum of dropped."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Dropped rows by reason."""
    noted: Counter[str] = field(default_factory=Counter)
    """Kept pairs by remark: truncated, identical, merged at the prompt's end."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Each bad row that was skipped: row, place, reason, message."""

    def take(self, outcome: Outcome) -> None:
        """Count one row."""
        self.rows += 1
        if outcome.dropped is None:
            self.kept += 1
            self.noted.update(outcome.remarks)
            return
        self.dropped[outcome.dropped] += 1
        if outcome.error is not None:
            row = outcome.row
            self.skipped.append(
                {"row": row.number, "place": row.place, "reason": outcome.dropped, "message": str(outcome.error)}
            )

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "noted": dict(sorted(self.noted.items())),
        }

    def add(self, other: dict[str, Any]) -> None:
        """Add the counts of another ledger's `as_dict`."""
        self.rows += other["rows"]
        self.kept += other["kept"]
        self.dropped.update(other["dropped"])
        self.noted.update(other["noted"])

    def since(self, earlier: "Ledger") -> "Ledger":
        """Return the counts of the rows after an earlier copy of this ledger."""
        return Ledger(
            rows=self.rows - earlier.rows,
            kept=self.kept - earlier.kept,
            dropped=self.dropped - earlier.dropped,
            noted=self.noted - earlier.noted,
            skipped=self.skipped[len(earlier.skipped) :],
        )

    def summary(self) -> str:
        """Return one line for people: rows, kept pairs, and the count of every drop and remark."""
        parts = [f"{self.rows:,} rows, {self.kept:,} pairs kept"]
        parts += [f"{count:,} dropped: {reason.replace('_', ' ')}" for reason, count in sorted(self.dropped.items())]
        parts += [f"{count:,} {remark.replace('_', ' ')}" for remark, count in sorted(self.noted.items())]
        return "; ".join(parts)


def outcome_of(row: Row, tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> Outcome:
    """Decode, tokenize and truncate one row. A bad row is dropped whatever `data.on_bad_row` says."""
    values: Mapping[str, Any] | None = None
    pair: Pair | None = None
    try:
        values = row.load()
        pair = to_pair(values, data.columns, row.place, data.random_rejected, data.roles)
        whole = tokenize(pair, tokenizer, row.place, data.template_date)
        numbers = numbers_of_loss(values, data.columns, row.place)
    except BadRow as error:
        if error.reason == "tie":
            # A tie is no fault of the row.
            return Outcome(row=row, values=values, dropped=error.reason)
        return Outcome(row=row, values=values, pair=pair, dropped=error.reason, error=error)
    key, scored = pair_key(whole), truncate(whole, data.max_length)
    outcome = Outcome(row=row, values=values, pair=pair, whole=whole, key=key)
    identical = whole.chosen_ids == whole.rejected_ids
    if scored is None or (identical and data.on_identical == "drop"):
        return dataclasses.replace(outcome, dropped="prompt_too_long" if scored is None else "identical")
    truncated = scored is not whole
    remarks = {
        "identical": identical,
        "truncated": truncated,
        "identical_after_truncation": not identical and scored.chosen_ids == scored.rejected_ids,
        "merged_at_the_prompt's_end": whole.merged,
    }
    kept = KeptPair(row=row.number, place=row.place, key=key, pair=scored, truncated=truncated, **numbers)
    return dataclasses.replace(outcome, kept=kept, remarks=tuple(remark for remark, holds in remarks.items() if holds))


def outcomes(rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", data: DataConfig) -> Iterator[Outcome]:
    """Yield the outcome of every row, in order. Raises BadRow for a bad row if `data.on_bad_row` is `stop`."""
    for row in rows:
        outcome = outcome_of(row, tokenizer, data)
        if outcome.error is not None and data.on_bad_row == "stop":
            remedy = "Set data.on_bad_row: skip, or fix the row and start over with --overwrite"
            raise BadRow(outcome.error.reason, f"{outcome.error}. {remedy}") from outcome.error
        yield outcome


def kept_rows(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", data: DataConfig, ledger: Ledger
) -> Iterator[tuple[KeptPair, Mapping[str, Any]]]:
    """Yield each kept pair with all columns of its row. Count every row in the ledger. Raises as `outcomes`."""
    for outcome in outcomes(rows, tokenizer, data):
        ledger.take(outcome)
        if outcome.kept is not None and outcome.values is not None:
            yield outcome.kept, outcome.values


def kept_pairs(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", data: DataConfig, ledger: Ledger
) -> Iterator[KeptPair]:
    """Yield the kept pairs in the rows' order. Count every row in the ledger. Raises as `outcomes`."""
    return (pair for pair, _ in kept_rows(rows, tokenizer, data, ledger))
