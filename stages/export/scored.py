"""Join the kept rows of a set with the sums of its store."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger, Outcome, outcomes
from pipeline.data.rows import Source
from pipeline.data.sources import describe, read_rows
from pipeline.store.reference_table import load_reference_table
from pipeline.store.serving import remedy_for_missing
from pipeline.store.store import Store

__all__ = ["ScoredRow", "ScoredSet"]


@dataclass(frozen=True)
class ScoredRow:
    """A row whose pair was scored."""

    outcome: Outcome
    """The row, its texts and its token ids"""
    kept: KeptPair
    """The pair as it was scored"""
    chosen_logps: float
    """Sum over the chosen completion's tokens, nats"""
    rejected_logps: float
    """Sum over the rejected completion's tokens, nats"""


@dataclass
class ScoredSet:
    """One set of the run, which gives its scored rows in the rows' order."""

    config: Config
    """Settings whose `data` is this set's"""
    source: Source
    tokenizer: Any
    store: Store
    work: Path
    """Folder for files that are needed while it runs"""
    ledger: Ledger = field(default_factory=Ledger)
    """Counts of the rows that were read last"""
    unscored: int = 0
    """Number of kept pairs among them that were left out, as they were not scored"""

    def __iter__(self) -> Iterator[ScoredRow]:
        """Read the rows anew.

        Raises DataError if a kept pair was not scored and `train.on_missing` is not `drop`.
        """
        data, alpha = self.config.data, self.config.loss.ld_alpha
        table = load_reference_table([self.store], data.max_length, ld_alpha=alpha, folder=self.work)
        self.ledger, self.unscored = Ledger(), 0
        for outcome in outcomes(read_rows(self.source), self.tokenizer, data):
            self.ledger.take(outcome)
            kept = outcome.kept
            if kept is None:
                continue
            (at,), (found,) = table.look_up([kept.key])
            if at >= 0:
                yield ScoredRow(outcome, kept, float(found["chosen_logps"]), float(found["rejected_logps"]))
            elif self.config.train.on_missing != "drop":
                raise DataError(
                    f"{kept.place} of {describe(self.source)} has no reference logps in {self.store.folder}. "
                    f"{remedy_for_missing(self.store)}"
                )
            else:
                self.unscored += 1

    def summary(self) -> str:
        """Return one line for people: what became of the rows that were read last."""
        unscored = f"; {self.unscored:,} left out: not scored" if self.unscored else ""
        return f"{self.ledger.summary()}{unscored}"
