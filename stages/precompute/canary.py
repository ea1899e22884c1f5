"""Canary of stage one: score stored pairs again, so that one store never mixes what two ways of computing give.

The identity lists what a log-prob depends on. Another library, kernel or flag changes values too, and is on no list.
"""

import contextlib
import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pipeline.base.errors import IdentityError
from pipeline.base.folders import Folder
from pipeline.base.progress import say
from pipeline.base.signals import StopFlag
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair
from pipeline.data.loading import UnitQueue
from pipeline.data.rows import Source
from pipeline.models.files import reference_quantization
from pipeline.models.precision import reference_precision
from pipeline.scoring.agreement import Agreement, NoiseFloor, allowed_gap, compare, completion_gap
from pipeline.store.finishing import longest_pair
from pipeline.store.format import ForeignPartError, ScoredPair, part_name
from pipeline.store.store import load_store, read_checked_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["StoredPairs"]

_SIDES = ("chosen", "rejected")
_PARTS = 3
"""Parts that a worker looks at before its first unit"""
_AT_ONCE = 64
"""Pairs tokenized and scored at once"""


class _Scores(Protocol):
    def score(self, pairs: list[KeptPair], flag: StopFlag) -> list[ScoredPair]: ...


@dataclass
class StoredPairs:
    """Check of the stored log-probs of a set against this process's own."""

    source: Source
    folder: Folder
    config: Config
    tokenizer: "PreTrainedTokenizerBase"
    reference: _Scores
    flag: StopFlag
    _begun: bool = field(default=False, init=False)

    def before_first_unit(self) -> None:
        """At the first call check a pair in each of a few parts. Raises as `each`, and DataError for a damaged part."""
        if self._begun:
            return
        self._begun = True
        store = load_store(self.folder)
        last = len(store.units) - 1
        units = {store.units[last * i // (_PARTS - 1)] for i in range(_PARTS)} if store.units else ()
        parts = {}
        for unit in sorted(units):
            # Another run's part is made anew before the store is finished.
            with contextlib.suppress(ForeignPartError):
                parts[unit] = read_checked_part(store, unit)
        noise = sum((part.noise for part in parts.values()), NoiseFloor())
        self.each({unit: longest_pair(part.table) for unit, part in parts.items()}, noise)

    def each(self, samples: Mapping[int, pa.Table], noise: NoiseFloor, written: Container[int] = ()) -> None:
        """Check stored pairs by the unit that they are of, except units that this process has `written` itself.

        Raises:
            IdentityError: A row is another pair now, or a log-prob is farther from the stored one than the noise.
        """
        stored = {
            row["row"]: {**row, "place": self.folder.place(part_name(unit))}
            for unit, sample in samples.items()
            if unit not in written
            for row in sample.to_pylist()
        }
        if not stored:
            return
        source = dataclasses.replace(self.source, stop=max(stored) + 1)
        queue = UnitQueue(source, self.tokenizer, self.config.data, rows_per_unit=_AT_ONCE, wanted=frozenset(stored))
        found = {}
        with queue as units:
            for unit in units:
                pairs = [pair for pair in unit.pairs if pair.key == stored[pair.row]["pair_key"]]
                found.update({scored.row: scored for scored in self.reference.score(pairs, self.flag)})
        for row, entry in stored.items():
            if row not in found:
                raise IdentityError(
                    f"{entry['place']}: row {row} of the dataset is not the pair that was scored: this process "
                    "reads other data. Restore the data and the libraries, or set precompute.output to a new folder"
                )
            agreement = self._compare(found[row], entry, noise)
            if not agreement.agrees:
                raise IdentityError(
                    f"{entry['place']}: row {row} scored again: {agreement}. This process computes with another "
                    "library, kernel or flag than the one that wrote this part. Restore that one, or set "
                    "precompute.output to a new folder"
                )
        checked = "1 stored pair" if len(stored) == 1 else f"{len(stored):,} stored pairs"
        say(f"Checked {checked} by scoring again: equal within the noise floor")

    def _compare(self, scored: ScoredPair, stored: Mapping[str, Any], noise: NoiseFloor) -> Agreement:
        gaps = [
            completion_gap(
                getattr(scored, f"{side}_token_logps"), stored.get(f"{side}_token_logps"), stored[f"ref_{side}_logps"]
            )
            for side in _SIDES
        ]
        quantization = reference_quantization(self.config)
        in_8_bits = quantization is not None and quantization.bits == 8
        mean, largest = allowed_gap(noise, reference_precision(self.config).products, in_8_bits=in_8_bits)
        # In one pair a single token may be as far off as any token of the store.
        return compare(gaps, (mean + largest / sum(map(len, gaps)), largest))
