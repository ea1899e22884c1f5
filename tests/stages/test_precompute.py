"""Stage one beside stores that serve as they are, folders of stores to copy from, and requests to stop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.base.errors import ConfigError, UnfinishedError
from pipeline.config.reader import load_config
from pipeline.config.schema import Config
from stages.import_scores import command as import_scores
from stages.precompute import command, worker
from support.runs import simple_rows, write_jsonl
from support.stores import bytes_of_stores

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


def with_settings(config: Config, section: str, **settings: Any) -> Config:
    changed: Any = dataclasses.replace(getattr(config, section), **settings)
    return dataclasses.replace(config, **{section: changed})


@pytest.fixture
def two_sets(make_run: MakeRun, tmp_path: Path) -> Config:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", simple_rows(3, start=100))
    return load_config(make_run(simple_rows(10), data={"eval": {"test": {"path": str(held_out)}}}))


def test_shards_serve_a_smaller_length_and_a_folder_of_stores_is_copied_from(
    two_sets: Config, capsys: Captured
) -> None:
    command.run(two_sets)
    output = Path(two_sets.precompute.output)
    before = bytes_of_stores(output)
    capsys.readouterr()
    command.run(with_settings(two_sets, "data", max_length=64))
    said = capsys.readouterr().out
    for name, parts in (("train", "2 parts"), ("test", "1 part")):
        assert f"{name}: these shards serve max_length 64 as they are; in {output / name} ({parts})" in said
    assert bytes_of_stores(output) == before
    # The folder that precompute.output names, not its stores.
    command.run(with_settings(two_sets, "precompute", output=f"{output}-2", reuse=[str(output)]))
    assert "10 copied from other shards" in (said := capsys.readouterr().out)
    assert "3 copied from other shards" in said and "Loading the reference" not in said


def test_sets_that_were_not_imported_are_scored(two_sets: Config, tmp_path: Path, capsys: Captured) -> None:
    rows = [{**row, "ref_chosen_logps": -9.0, "ref_rejected_logps": -8.0} for row in simple_rows(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "scores.parquet")
    names = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps"}
    import_scores.run(two_sets, tmp_path / "scores.parquet", set_name="train", **names)
    capsys.readouterr()
    command.run(two_sets)
    said = capsys.readouterr().out
    assert "train: these shards serve this run as they are" in said
    assert "test: 3 rows, 3 pairs kept" in said


@pytest.mark.parametrize(("after", "saved"), [(1, "0 of 2 units of train saved"), (10, "1 of 2 units of train saved")])
def test_a_stop_says_how_many_units_are_saved(
    after: int, saved: str, two_sets: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [after]
    score = worker.Scorer.logps

    def stopping(self: Any, pairs: Any) -> Any:
        for scored in score(self, pairs):
            left[0] -= 1
            if left[0] == 0:
                flags[0].request()
            yield scored

    flags: list[Any] = []
    watch = command.watch_signals
    monkeypatch.setattr(command, "watch_signals", lambda stop_at: flags.append(watch(stop_at)) or flags[0])
    monkeypatch.setattr(worker.Scorer, "logps", stopping)
    with pytest.raises(UnfinishedError, match=rf"^stopped as asked; {saved}; rows since then .*rows_per_shard: 8\)"):
        command.run(two_sets)


def test_what_stage_two_can_not_do_is_refused_before_a_store_is_made(two_sets: Config) -> None:
    wrong = dataclasses.replace(two_sets.train, given={**two_sets.train.given, "optim": "apollo_adamw"})
    with pytest.raises(ConfigError, match=r"^train\.optim: "):
        command.run(dataclasses.replace(two_sets, train=wrong))
    many = {"dataloader_drop_last": "true", "per_device_train_batch_size": "11"}
    wrong = dataclasses.replace(two_sets.train, given={**two_sets.train.given, **many})
    with pytest.raises(ConfigError, match=r"^train\.dataloader_drop_last: .* 10 pairs and batches of 11"):
        command.run(dataclasses.replace(two_sets, train=wrong))
    assert not Path(two_sets.precompute.output).exists()
