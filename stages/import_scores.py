"""Import log-probs from outside: columns of a file become a store, under an identity that the settings declare.

The file holds the pairs beside their scores, so each score is stored under its pair's key. A score of another pair, or
of a text that now tokenizes otherwise, can't be joined.
"""

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.digests import WatchedFiles, sha256_of_files
from pipeline.base.errors import ConfigError, DataError, number_of
from pipeline.base.folders import LocalFolder, open_folder
from pipeline.base.progress import say
from pipeline.base.versions import library_versions
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger, kept_rows
from pipeline.data.reading import look_at_rows
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import declared_reference, load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.run.outputs import guard_shards
from pipeline.store.dating import with_template_date
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair, SummedPair
from pipeline.store.store import create_store, delete_store, is_finished, write_part

__all__ = ["run"]


def run(config: Config, scores: Path, *, set_name: str, chosen: str, rejected: str, overwrite: bool = False) -> None:
    """Read scores and write them as a store, ready for stage two.

    A column of numbers holds sums over a completion's tokens; a column of lists holds a log-prob for each token. The
    settings' `reference` identifies the scorer: a model whose weights are digested, or a name (`reference.declared`).

    Raises:
        ConfigError: The set or the file does not exist, or settings rule imported scores out.
        DataError: A score is missing, of another kind than the first, not finite, above 0, or not one for each token.
        IdentityError: The output folder holds another store, or the file was changed while it was read.
    """
    config.data.of(set_name)  # refuses an unknown name
    if not scores.exists():
        raise ConfigError(f"{scores}: no such file")
    guard_shards(config, overwrite=overwrite)
    folder = open_folder(config.precompute.output).child(set_name)
    if overwrite and isinstance(folder, LocalFolder) and scores.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(f"FILE: must not be what --overwrite deletes, got {scores}. Move it out of {folder}")
    tokenizer = load_tokenizer(config)
    config = with_template_date(config, tokenizer, overwrite=overwrite)
    data = config.data.of(set_name)
    source = open_source(dataclasses.replace(data, path=str(scores), split="train", format=None))
    source = dataclasses.replace(source, all_columns=True)
    watched = WatchedFiles(source.files)
    if source.format not in ("jsonl", "parquet"):
        raise ConfigError(f"{scores}: must be a Parquet or a JSON Lines file, got {source.format}. Convert it")
    reading = look_at_rows(source, data, has_template=tokenizer.chat_template is not None)
    if reading.refused is not None:
        raise reading.refused
    ledger = Ledger()
    rows = kept_rows(read_rows(source), tokenizer, data, ledger)
    batch = list(itertools.islice(rows, config.precompute.rows_per_shard))
    if not batch:
        raise DataError(f"{scores}: no pair was kept: {ledger.summary()}")
    read = _Reader(chosen, rejected, token_logps=_holds_lists(batch[0], chosen, rejected))
    token_logps = read.token_logps
    # Read before the store is created: a file that can't be imported leaves nothing behind.
    pairs = [read(pair, row) for pair, row in batch]
    config = dataclasses.replace(config, precompute=dataclasses.replace(config.precompute, token_logps=token_logps))
    if overwrite:
        delete_store(folder)
    plan = {
        "rows_per_shard": config.precompute.rows_per_shard,
        "on_identical": data.on_identical,
        "columns": dict(data.columns),
        **({} if data.random_rejected is None else {"random_rejected": data.random_rejected}),
        "imported": {"files": sha256_of_files(source.files), "chosen": chosen, "rejected": rejected},
    }
    declared = {**declared_reference(config), "dataset": str(scores), "imported": True}
    provenance = {"imported": str(scores), "versions": library_versions()}
    header = create_store(folder, identity_of_run(config, tokenizer), plan, declared, provenance)
    if is_finished(folder):
        say(f"{folder}: imported already; nothing to do.")
        return
    unit, written = 0, Ledger()
    while pairs:
        ledger_copy = copy.deepcopy(ledger)
        # Read before the part is written: rows dropped after the last pair belong to the last part.
        following = [read(pair, row) for pair, row in itertools.islice(rows, config.precompute.rows_per_shard)]
        ledger_copy = ledger_copy if following else ledger
        watched.check()
        write_part(folder, unit, pairs, ledger_copy.since(written), header=header)  # type: ignore[arg-type]
        pairs, written, unit = following, ledger_copy, unit + 1
    finish_store(folder, unit, header=header)
    kind = "a log-prob for each token" if token_logps else "sums"
    say(f"{set_name}: {ledger.summary()}; {kind}, in {folder} ({number_of(unit, 'part')})")


def _holds_lists(first: tuple[KeptPair, Mapping[str, Any]], chosen: str, rejected: str) -> bool:
    """Return True if the first row has a log-prob for each token, not one for each completion."""
    pair, row = first
    for column in (chosen, rejected):
        if column not in row:
            raise DataError(
                f"{pair.place}: no column {column!r}; there are {', '.join(map(repr, row))}. Name the scores' columns "
                "with --chosen and --rejected"
            )
    return isinstance(row[chosen], Sequence) and not isinstance(row[chosen], str)


class _Reader:
    """Converts rows to scored pairs, and refuses other scores of a pair that came before."""

    def __init__(self, chosen: str, rejected: str, *, token_logps: bool) -> None:
        self._columns = (chosen, rejected)
        self.token_logps = token_logps
        self._seen: dict[bytes, bytes] = {}

    def __call__(self, pair: KeptPair, row: Mapping[str, Any]) -> ScoredPair | SummedPair:
        if not self.token_logps and pair.truncated:
            raise DataError(
                f"{pair.place}: data.max_length cuts this pair, and a sum can't be cut with it. Import a log-prob for "
                "each token, or raise data.max_length"
            )
        completions = (pair.pair.chosen_ids, pair.pair.rejected_ids)
        values = [
            _numbers(row.get(column), len(ids), column, pair)
            if self.token_logps
            else np.array([_number(row.get(column), column, pair.place)], dtype=np.float32)
            for column, ids in zip(self._columns, completions, strict=True)
        ]
        digest = hashlib.blake2b(values[0].tobytes() + values[1].tobytes(), digest_size=16).digest()
        if self._seen.setdefault(pair.key, digest) != digest:
            raise DataError(f"{pair.place}: this pair appears twice with different scores. Remove one of the two rows")
        common: dict[str, Any] = {"key": pair.key, "row": pair.row, "prompt_tokens": len(pair.pair.prompt_ids)}
        if self.token_logps:
            return ScoredPair(**common, chosen_token_logps=values[0], rejected_token_logps=values[1])
        return SummedPair(
            **common,
            chosen_tokens=len(completions[0]),
            rejected_tokens=len(completions[1]),
            chosen_logps=float(values[0][0]),
            rejected_logps=float(values[1][0]),
        )


def _numbers(values: Any, tokens: int, column: str, pair: KeptPair) -> npt.NDArray[np.float32]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise DataError(
            f"{pair.place}: column {column!r}: must be a list of log-probs, as in the first row, got {_shown(values)}"
        )
    # Tokens past max_length may have scores too.
    if len(values) < tokens or (len(values) > tokens and not pair.truncated):
        raise DataError(
            f"{pair.place}: column {column!r} has {len(values)} log-probs, the completion {tokens} tokens: scored with "
            "another tokenizer, chat template or EOS rule"
        )
    return np.array([_number(value, column, pair.place) for value in values[:tokens]], dtype=np.float32)


def _number(value: Any, column: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{place}: column {column!r}: must be a log-prob, got {_shown(value)}")
    # Shards hold float32.
    if not -3e38 < value <= 0:
        raise DataError(f"{place}: column {column!r}: must be finite and at most 0, got {value}")
    return float(value)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
