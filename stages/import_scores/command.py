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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.base.digests import WatchedFiles, sha256_of_files
from pipeline.base.errors import ConfigError, DataError, number_of
from pipeline.base.folders import LocalFolder, open_folder
from pipeline.base.progress import say, say_loading
from pipeline.base.versions import library_versions
from pipeline.config.data import DataConfig
from pipeline.config.schema import Config
from pipeline.data.intake import KeptPair, Ledger, kept_rows
from pipeline.data.reading import look_at_rows
from pipeline.data.rows import Source
from pipeline.data.sources import open_source, read_rows
from pipeline.models.files import declared_reference, load_tokenizer
from pipeline.models.identity import identity_of_run
from pipeline.run.outputs import guard_shards
from pipeline.store.dating import with_template_date
from pipeline.store.finishing import finish_store
from pipeline.store.format import ScoredPair, SummedPair
from pipeline.store.plan import rules_of_reading
from pipeline.store.store import create_store, delete_store, is_finished, write_part
from stages.import_scores.compared import report_differences
from stages.import_scores.engines import is_answer, logps_of_answer

__all__ = ["run"]

_Kind = Literal["sums", "tokens", "answers"]
"""Content of the columns: a log-prob for each completion, one for each of its tokens, or an engine's answer"""

_SAMPLE = 8
"""Pairs that the reference scores too, if the log-probs come from an engine"""


def run(
    config: Config,
    scores: Path,
    *,
    set_name: str,
    chosen: str,
    rejected: str,
    sample: int | None = None,
    overwrite: bool = False,
) -> None:
    """Read scores and write them as a store, ready for stage two.

    A column of numbers holds sums over a completion's tokens; a column of lists holds a log-prob for each token; a
    column of an engine's answers holds one for each token of prompt and completion. The settings' `reference`
    identifies the scorer: a model whose weights are digested, or a name (`reference.declared`). The reference scores
    `sample` pairs here, to report the differences; None stands for 8 of an engine's answers, and for none else.

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
        raise ConfigError(f"SCORES: must not be what --overwrite deletes, got {scores}. Move it out of {folder}")
    say_loading()
    tokenizer = load_tokenizer(config)
    config = with_template_date(config, tokenizer, overwrite=overwrite)
    data = config.data.of(set_name)
    source = _open(scores, data, tokenizer)
    watched = WatchedFiles(source.files)
    ledger = Ledger()
    rows = kept_rows(read_rows(source), tokenizer, data, ledger)
    batch = list(itertools.islice(rows, config.precompute.rows_per_shard))
    if not batch:
        raise DataError(f"{scores}: no pair was kept: {ledger.summary()}")
    read = _Reader(chosen, rejected, _kind_of(batch[0], chosen, rejected), len(tokenizer))
    token_logps = read.kind != "sums"
    # Read before the store is created: a file that can't be imported leaves nothing behind.
    pairs = [read(pair, row) for pair, row in batch]
    config = dataclasses.replace(config, precompute=dataclasses.replace(config.precompute, token_logps=token_logps))
    if overwrite:
        delete_store(folder)
    plan = _plan(config, source, {"files": sha256_of_files(source.files), "chosen": chosen, "rejected": rejected})
    declared = {**declared_reference(config), "dataset": str(scores), "imported": True}
    provenance = {"imported": str(scores), "versions": library_versions()}
    identity = identity_of_run(config, tokenizer)
    header = create_store(folder, identity, plan, declared, provenance)
    if is_finished(folder):
        say(f"{folder}: imported already; nothing to do.")
        return
    if sample := (_SAMPLE if read.kind == "answers" else 0) if sample is None else sample:
        imported = [(kept, score) for (kept, _), score in zip(batch, pairs, strict=True)]
        report_differences(config, tokenizer, identity["reference"], imported, sample)
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


def _open(scores: Path, data: DataConfig, tokenizer: Any) -> Source:
    """Open the file of scores as a set of pairs with all its columns."""
    try:
        source = open_source(dataclasses.replace(data, path=str(scores), split="train", format=None))
    except ConfigError as error:
        if scores.is_dir():
            raise
        # The error's own way out, data.format, is that of the data.
        raise ConfigError(
            f"{scores}: must be a Parquet or a JSON Lines file, which ends in .parquet or .jsonl, got another one. "
            "Rename or convert it"
        ) from error
    source = dataclasses.replace(source, all_columns=True)
    if source.format not in ("jsonl", "parquet"):
        raise ConfigError(f"{scores}: must be a Parquet or a JSON Lines file, got {source.format}. Convert it")
    reading = look_at_rows(source, data, has_template=tokenizer.chat_template is not None)
    if reading.refused is not None:
        raise reading.refused
    return source


def _plan(config: Config, source: Source, imported: Mapping[str, Any]) -> dict[str, Any]:
    """Give what must be equal to continue the store."""
    return {
        "rows_per_shard": config.precompute.rows_per_shard,
        "on_identical": config.data.on_identical,
        **rules_of_reading(config.data, source),
        "imported": imported,
    }


def _kind_of(first: tuple[KeptPair, Mapping[str, Any]], chosen: str, rejected: str) -> _Kind:
    """Say what the first row has: a log-prob for each completion, one for each token, or an engine's answers."""
    pair, row = first
    for column in (chosen, rejected):
        if column not in row:
            raise DataError(
                f"{pair.place}: no column {column!r}; there are {', '.join(map(repr, row))}. Name the scores' columns "
                "with --chosen and --rejected"
            )
    if is_answer(row[chosen]):
        return "answers"
    return "tokens" if isinstance(row[chosen], Sequence) and not isinstance(row[chosen], str) else "sums"


class _Reader:
    """Converts rows to scored pairs, and refuses other scores of a pair that came before."""

    def __init__(self, chosen: str, rejected: str, kind: _Kind, vocabulary: int) -> None:
        self._columns = (chosen, rejected)
        self._vocabulary = vocabulary
        self.kind = kind
        self._seen: dict[bytes, bytes] = {}

    def __call__(self, pair: KeptPair, row: Mapping[str, Any]) -> ScoredPair | SummedPair:
        if self.kind == "sums" and pair.truncated:
            raise DataError(
                f"{pair.place}: data.max_length cuts this pair, and a sum can't be cut with it. Import a log-prob for "
                "each token, or raise data.max_length"
            )
        completions = (pair.pair.chosen_ids, pair.pair.rejected_ids)
        values = [
            self._values(row.get(column), pair, ids, column)
            for column, ids in zip(self._columns, completions, strict=True)
        ]
        digest = hashlib.blake2b(values[0].tobytes() + values[1].tobytes(), digest_size=16).digest()
        if self._seen.setdefault(pair.key, digest) != digest:
            raise DataError(f"{pair.place}: this pair appears twice with different scores. Remove one of the two rows")
        common: dict[str, Any] = {"key": pair.key, "row": pair.row, "prompt_tokens": len(pair.pair.prompt_ids)}
        if self.kind != "sums":
            return ScoredPair(**common, chosen_token_logps=values[0], rejected_token_logps=values[1])
        return SummedPair(
            **common,
            chosen_tokens=len(completions[0]),
            rejected_tokens=len(completions[1]),
            chosen_logps=float(values[0][0]),
            rejected_logps=float(values[1][0]),
        )

    def _values(self, value: Any, pair: KeptPair, ids: Sequence[int], column: str) -> npt.NDArray[np.float32]:
        match self.kind:
            case "sums":
                return np.array([_number(value, column, pair.place)], dtype=np.float32)
            case "tokens":
                return _numbers(value, len(ids), column, pair)
            case "answers":
                logps = logps_of_answer(value, pair, ids, column, self._vocabulary)
                return _numbers(logps, len(ids), column, pair)


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
