"""Find what becomes of the rows of each set, and what stage one has already done with them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import ConfigError
from pipeline.base.folders import Folder, open_folder
from pipeline.config.schema import Config
from pipeline.data.intake import Ledger
from pipeline.data.loading import survey_pairs
from pipeline.data.reading import Reading, look_at_rows
from pipeline.data.rows import Source
from pipeline.data.sources import count_rows, open_source
from pipeline.data.survey import Survey, percentiles
from pipeline.models.identity import differences, identity_of_run
from pipeline.models.lengths import exact_length_of_reference
from pipeline.store.format import MANIFEST, pair_keys
from pipeline.store.store import load_store, read_parts
from pipeline.training.joined_cache import cached_sets, joined_folder
from stages.check.estimate import Estimate, Lengths

__all__ = [
    "Findings",
    "JoinedState",
    "PairSet",
    "StoreState",
    "add_up",
    "look_at_joined",
    "look_at_set",
    "look_at_stores",
]


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """One set of pairs, surveyed."""

    source: Source
    ledger: Ledger
    survey: Survey
    reading: Reading
    """How its first rows are read."""
    rows: int | None
    """Rows of the whole set; None if only a full read would tell."""
    only_first_rows: int | None
    """Number of rows that were surveyed if there are more; None: all."""

    @property
    def scale(self) -> float:
        """Rows of the whole set as a multiple of the surveyed rows."""
        if self.only_first_rows is None or self.rows is None or not self.ledger.rows:
            return 1.0
        return self.rows / self.ledger.rows


@dataclass(frozen=True, kw_only=True)
class StoreState:
    """Progress of stage one in the store of a set. None: unknown."""

    folder: str
    state: str
    """not begun, unfinished or finished."""
    differences: list[str] | None = None
    """Fields of its identity that differ from this run's, with both values."""
    units_done: int | None = None
    units: int | None = None
    totals: Mapping[str, Any] | None = None
    """Counts of a finished store, as its index has them."""
    pairs_missing: int | None = None
    """Number of kept pairs that a finished store lacks."""
    rows_of_set: int | None = None
    rows_missing: int | None = None
    """Number of rows whose part an unfinished store lacks."""

    def missing_share(self, kept: int) -> float:
        """Return the share of the set's `kept` pairs to score; all if the store is another run's or unknown."""
        if self.differences:
            return 1.0
        if self.state == "finished":
            return (self.pairs_missing or 0) / max(1, kept)
        return 1.0 if self.rows_missing is None else self.rows_missing / max(1, self.rows_of_set or 0)


@dataclass(frozen=True, kw_only=True)
class JoinedState:
    """Joined sets that stage two would take."""

    folder: str
    bytes: int | None
    """Size of their files; None if they are not there."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is printed."""

    sets: Mapping[str, PairSet]
    stores: Mapping[str, StoreState]
    joined: JoinedState | None = None
    """None if stage two can't begin yet, or its sets can't be kept."""
    template_date: str | None = None
    """Date that the chat template is told; None if it asks for none, or if a store of an earlier version fixes none."""
    estimate: Estimate | None = None
    """None if no training pair was kept."""
    host_memory: int | None = None
    """Bytes of this machine's memory; None if the run is planned for another one."""
    refused_here: ConfigError | None = None
    """Option of the `train` section that needs a GPU which this machine lacks."""
    start: str | None = None
    """Warning that training does not start at ln 2, since the settings set policy and reference apart."""


def look_at_set(config: Config, name: str, tokenizer: Any, rows: int | None, batch_pairs: int) -> PairSet:
    """Survey a set, or its first `rows`. Bad rows are counted whatever `data.on_bad_row` says."""
    source, data = open_source(config.data, name), config.data.of(name)
    total = count_rows(source)
    surveyed = source
    if rows is not None and (total is None or total > rows):
        surveyed = dataclasses.replace(source, stop=source.start + rows)
    reading = look_at_rows(surveyed, data, has_template=tokenizer.chat_template is not None)
    ledger = Ledger()
    survey = survey_pairs(
        surveyed,
        tokenizer,
        dataclasses.replace(data, on_bad_row="skip"),
        ledger,
        rows_per_unit=config.precompute.rows_per_shard,
        batch_pairs=batch_pairs,
    )
    is_part = surveyed is not source and (total is not None or ledger.rows == rows)
    return PairSet(
        source=source,
        ledger=ledger,
        survey=survey,
        reading=reading,
        rows=total,
        only_first_rows=rows if is_part else None,
    )


def add_up(
    sets: Mapping[str, PairSet], stores: Mapping[str, StoreState], fraction: Callable[[str], float] = lambda name: 1.0
) -> Lengths | None:
    """Add up the tokens of some sets, extended to the rows that were not surveyed; None if no pair was kept.

    `fraction` says by set how often an epoch has each pair; it never has a pair of weight 0.
    """
    surveys = [(s.scale, s.survey) for s in sets.values()]
    pair_lengths = [percentiles(survey.lengths.get("pair", {})) for _, survey in surveys]
    shared = {name: s.scale * s.survey.shared_tokens for name, s in sets.items()}
    missing = sum(
        shared[name] * (stores[name].missing_share(s.ledger.kept) if name in stores else 1.0)
        for name, s in sets.items()
    )
    pairs = {name: round(s.scale * s.ledger.kept) for name, s in sets.items()}
    if not sum(pairs.values()):
        return None
    tokens = {name: s.scale * sum(s.survey.scored.values()) for name, s in sets.items()}
    left_out = {name: s.survey.found["weight_0"] / max(1, s.ledger.kept) for name, s in sets.items()}
    copies = {name: fraction(name) * (1 - left_out[name]) for name in sets}
    return Lengths(
        pairs=sum(pairs.values()),
        pairs_of_epoch=round(sum(copies[name] * pairs[name] for name in sets)),
        share_of_epoch=sum(copies[name] * tokens[name] for name in sets) / max(1, sum(tokens.values())),
        **{
            f"{side}_tokens": sum(round(scale * survey.scored[side]) for scale, survey in surveys)
            for side in ("prompt", "chosen", "rejected")
        },
        longest_pair=max(p.get("p100", 0) for p in pair_lengths),
        usual_pair=max(p.get("p95", 0) for p in pair_lengths),
        shared_tokens=sum(map(round, shared.values())),
        unscored=missing / whole if (whole := sum(shared.values())) else 1.0,
    )


def look_at_stores(config: Config, sets: Mapping[str, PairSet], tokenizer: Any) -> dict[str, StoreState]:
    """Return what stage one has done for each set, what is missing, and what differs from this run."""
    identity = None
    states = {}
    for name, pairs in sets.items():
        folder = open_folder(config.precompute.output).child(name)
        if folder.size(MANIFEST) is None:
            states[name] = StoreState(folder=str(folder), state="not begun")
            continue
        # It takes digests of the weights, so only if there is a store to compare with.
        identity = identity or identity_of_run(config, tokenizer)
        states[name] = _state_of(folder, pairs, identity, config)
    return states


def look_at_joined(config: Config, states: Mapping[str, StoreState], tokenizer: Any) -> JoinedState | None:
    """Return whether an earlier run has joined the sets that stage two trains on, and their size."""
    ready = [state.state == "finished" and not state.differences for state in states.values()]
    scored = config.loss.needs_reference
    if config.train.is_empty or not all(ready) or (scored and not ready):
        return None
    stores = {name: load_store(state.folder) for name, state in states.items()}
    found = cached_sets(joined_folder(config), config, stores, tokenizer, keep_missing=not scored)
    return None if found is None else JoinedState(folder=str(found.folder), bytes=found.size())


def _state_of(folder: Folder, pairs: PairSet, identity: Mapping[str, Any], config: Config) -> StoreState:
    store = load_store(folder)
    exact = exact_length_of_reference(config)
    found = differences(store.manifest["identity"], identity, joining=True, exact=exact)
    begun = StoreState(folder=str(folder), state="unfinished", differences=found, units_done=len(store.units))
    if store.index:
        missing = None
        if pairs.only_first_rows is None and not found:
            # A survey keeps the first 8 bytes of a key, as a number.
            parts = read_parts(store, ["pair_key"])
            missing = pairs.survey.missing_from(pair_keys(part).astype("S8").view(">u8") for part in parts)
        return dataclasses.replace(
            begun, state="finished", units=len(store.units), totals=store.index["totals"], pairs_missing=missing
        )
    total = pairs.rows
    if total is None and pairs.only_first_rows is None:
        total = pairs.ledger.rows
    if total is None or "window" in store.manifest["plan"]:
        return begun
    size = int(store.manifest["plan"].get("rows_per_shard", config.precompute.rows_per_shard))
    units = -(-total // size)
    rows_missing = sum(min(size, total - unit * size) for unit in range(units) if unit not in store.units)
    return dataclasses.replace(begun, units=units, rows_of_set=total, rows_missing=rows_missing)
