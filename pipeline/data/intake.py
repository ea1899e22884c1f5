"""Rows of a source -> the pairs that are kept, tokenized; every drop is counted under its reason.

Both stages take their pairs from here, so what stage one scored and what stage two asks for can't drift apart.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.base.errors import BadRow
from pipeline.config.schema import DataConfig
from pipeline.data.pairs import to_pair
from pipeline.data.rows import Row
from pipeline.data.survey import Survey
from pipeline.data.tokens import TokenizedPair, pair_key, tokenize, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KeptPair",
    "Ledger",
    "kept_pairs",
    "kept_rows",
]


@dataclass(frozen=True, kw_only=True)
class KeptPair:
    """A pair ready to be scored: ids as scored (truncated), key as joined (from the ids before truncation)."""

    row: int
    place: str
    key: bytes
    pair: TokenizedPair
    truncated: bool = False
    """Whether `max_length` cut a completion"""


@dataclass
class Ledger:
    """What became of the rows: rows = kept + the sum of dropped."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    noted: Counter[str] = field(default_factory=Counter)
    """Pairs kept that people should know of: truncated, identical, merged at the prompt's end."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Each bad row that was skipped: row, place, reason, message."""

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

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
        """What has become of the rows that came after an earlier copy of these books."""
        return Ledger(
            rows=self.rows - earlier.rows,
            kept=self.kept - earlier.kept,
            dropped=self.dropped - earlier.dropped,
            noted=self.noted - earlier.noted,
            skipped=self.skipped[len(earlier.skipped) :],
        )

    def summary(self) -> str:
        """One line for people: rows, kept, and every drop and remark with its count."""
        parts = [f"{self.rows:,} rows, {self.kept:,} pairs kept"]
        parts += [f"{count:,} dropped: {reason.replace('_', ' ')}" for reason, count in sorted(self.dropped.items())]
        parts += [f"{count:,} {remark.replace('_', ' ')}" for remark, count in sorted(self.noted.items())]
        return "; ".join(parts)


def kept_pairs(
    rows: Iterable[Row],
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    ledger: Ledger,
    survey: Survey | None = None,
) -> Iterator[KeptPair]:
    """Yield the pairs that can be scored, in the rows' order, and keep the books; a survey learns of every row too.

    Raises:
        BadRow: A row can't be a pair and `data.on_bad_row` is `stop`; the message names the way on.
    """
    for row in rows:
        ledger.rows += 1
        try:
            pair = to_pair(row.load(), data.columns, row.place)
            whole = tokenize(pair, tokenizer, row.place)
        except BadRow as error:
            if data.on_bad_row == "stop":
                way_on = "Set data.on_bad_row: skip, or mend the row and start over with --overwrite"
                raise BadRow(error.reason, f"{error}. {way_on}") from error
            ledger.drop(error.reason)
            ledger.skipped.append(
                {"row": row.number, "place": row.place, "reason": error.reason, "message": str(error)}
            )
            if survey is not None:
                survey.refuse(row.place, row.number, error.reason, str(error))
            continue
        scored = truncate(whole, data.max_length)
        identical = whole.chosen_ids == whole.rejected_ids
        if scored is None or (identical and data.on_identical == "drop"):
            reason = "prompt_too_long" if scored is None else "identical"
            ledger.drop(reason)
            if survey is not None:
                survey.drop(row.place, row.number, reason, pair, whole)
            continue
        ledger.kept += 1
        ledger.noted.update(
            remark
            for remark, holds in (
                ("identical", identical),
                ("truncated", scored is not whole),
                ("identical_after_truncation", not identical and scored.chosen_ids == scored.rejected_ids),
                ("merged_at_the_prompt's_end", whole.merged),
            )
            if holds
        )
        key = pair_key(whole)
        if survey is not None:
            survey.keep(row.place, row.number, key, pair, whole, scored, tokenizer)
        yield KeptPair(row=row.number, place=row.place, key=key, pair=scored, truncated=scored is not whole)


def kept_rows(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", data: DataConfig, ledger: Ledger
) -> Iterator[tuple[KeptPair, Mapping[str, Any]]]:
    """Yield the kept pairs, each with the row that it came from, all its columns included. Raises as `kept_pairs`."""
    latest: Mapping[str, Any] = {}

    def remembering(row: Row) -> Row:
        def load() -> Mapping[str, Any]:
            nonlocal latest
            latest = row.load()
            return latest

        return dataclasses.replace(row, load=load)

    for pair in kept_pairs((remembering(row) for row in rows), tokenizer, data, ledger):
        yield pair, latest
