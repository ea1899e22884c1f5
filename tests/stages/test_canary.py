"""The canary of stage one: what another library, kernel or flag computes never joins a store, nor gets an index."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.base.errors import IdentityError
from pipeline.config.reader import load_config
from pipeline.data import intake
from pipeline.store.format import ScoredPair, part_name
from stages.precompute import command, worker
from support.runs import simple_rows
from support.stores import bytes_of_stores
from support.tally import tally

MakeRun = Callable[..., Path]


def precompute(config: Path, index: int = 0, count: int = 1) -> None:
    command.run(load_config(config), worker=(index, count))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each call that scores."""
    calls: list[list[int]] = []
    score = worker.Reference.score

    def counting(self: Any, pairs: list[Any], *arguments: Any) -> list[ScoredPair]:
        calls.append([pair.row for pair in pairs])
        return score(self, pairs, *arguments)

    monkeypatch.setattr(worker.Reference, "score", counting)
    return calls


def compute_otherwise(monkeypatch: pytest.MonkeyPatch, nats: float) -> None:
    """Have every token's log-prob come out as another kernel would give it."""
    logps = worker.Scorer.logps

    def other(self: Any, pairs: Any) -> Any:
        for i, chosen, rejected in logps(self, pairs):
            yield i, chosen - np.float32(nats), rejected - np.float32(nats)

    monkeypatch.setattr(worker.Scorer, "logps", other)


def test_a_lone_worker_scores_nothing_again(make_run: MakeRun, scored: list[list[int]]) -> None:
    config = make_run(rows=simple_rows(20))
    precompute(config)
    # Each unit, and one of its pairs again for the noise floor.
    assert [len(rows) for rows in scored] == [8, 1, 8, 1, 4, 1]
    precompute(config)
    assert len(scored) == 6


def test_a_worker_that_joins_scores_a_few_pairs_first_and_the_last_one_a_pair_of_each_part(
    make_run: MakeRun, tmp_path: Path, scored: list[list[int]]
) -> None:
    config = make_run(rows=simple_rows(40))
    precompute(config, 0, 2)
    del scored[:]
    precompute(config, 1, 2)
    # Parts 0, 2 and 4 are the other worker's.
    joining, *units, finishing = [rows for rows in scored if len(rows) > 1]
    assert joining == finishing
    assert [row // 8 for row in joining] == [0, 2, 4]
    assert units == [[*range(8, 16)], [*range(24, 32)]]
    several = bytes_of_stores(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards")
    precompute(config)
    assert bytes_of_stores(tmp_path / "shards") == several


@pytest.mark.parametrize("missing", ["part-00001.parquet", "index.json"])
def test_another_way_of_computing_is_refused_with_the_difference(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    config, store = make_run(rows=simple_rows(20)), tmp_path / "shards" / "train"
    precompute(config)
    for name in {missing, "index.json"}:
        (store / name).unlink()
    before = bytes_of_stores(store)
    compute_otherwise(monkeypatch, 0.02)
    with pytest.raises(
        IdentityError, match=r"part-00000\.parquet: row \d scored again: token log-probs differ by 0.02 nats"
    ):
        precompute(config)
    assert bytes_of_stores(store) == before
    # The noise of another batch passes.
    monkeypatch.undo()
    compute_otherwise(monkeypatch, 1e-5)
    precompute(config)
    assert (store / "index.json").exists()
    tally("a worker whose kernel computes otherwise", 1, outcome="78, the difference shown; nothing written")


def test_a_row_that_is_read_otherwise_is_refused(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenization has changed in what no identity lists."""
    config = make_run(rows=simple_rows(20))
    precompute(config)
    (tmp_path / "shards" / "train" / "index.json").unlink()
    monkeypatch.setattr(intake, "pair_key", lambda pair: bytes(16))
    with pytest.raises(IdentityError, match=r"part-00000\.parquet: row \d of the dataset is not the pair that was"):
        precompute(config)


def test_parts_of_another_run_are_scored_anew_by_the_same_command(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker of the store that was there before has lived on, and written its parts beside the new one's."""
    store = tmp_path / "shards" / "train"
    precompute(make_run(rows=simple_rows(43)[3:]), 0, 2)
    theirs = bytes_of_stores(store)
    shutil.rmtree(store)
    config = make_run(rows=simple_rows(40))
    precompute(config)
    whole = bytes_of_stores(store)
    for name in (part_name(0), part_name(2)):
        (store / name).write_bytes(theirs[name])
    (store / part_name(1)).unlink()
    (store / "index.json").unlink()
    capsys.readouterr()
    precompute(config)
    assert f"another run's, and scored anew: {part_name(0)}, {part_name(2)}" in capsys.readouterr().out
    assert bytes_of_stores(store) == whole
    tally("a part that a worker of a replaced store has written", 2, outcome="named, scored anew; the same bytes")


def test_parts_that_are_gone_are_made_again_by_the_same_command(make_run: MakeRun, tmp_path: Path) -> None:
    config, store = make_run(rows=simple_rows(40)), tmp_path / "shards" / "train"
    precompute(config)
    before = bytes_of_stores(store)
    (store / part_name(1)).unlink()
    (store / part_name(4)).write_bytes(b"cut short")
    precompute(config)
    assert bytes_of_stores(store) == before
