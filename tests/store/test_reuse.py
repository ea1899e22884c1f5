"""Grown and remixed datasets: what is scored already is copied, the rest is scored."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.store import open_store, read_parts
from support.models import make_model
from support.runs import refshard, simple_rows, write_jsonl


def rows_by_key(folder: Path) -> dict[bytes, dict[str, Any]]:
    return {row["pair_key"]: row for part in read_parts(open_store(folder)) for row in part.to_pylist()}


@pytest.fixture
def old_and_grown(make_run: Callable[..., Path], tmp_path: Path) -> tuple[Path, list[str]]:
    """A config whose 24 pairs are scored, and overrides for a shuffled dataset with 6 more pairs."""
    config = make_run(rows=simple_rows(24))
    refshard("precompute", "--config", config)
    grown = write_jsonl(tmp_path / "grown.jsonl", [*simple_rows(6, start=50), *reversed(simple_rows(24))])
    return config, ["-o", f"data.path={grown}", "-o", f"precompute.output={tmp_path / 'grown'}"]


def test_a_grown_dataset_costs_its_new_pairs_only(old_and_grown: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, overrides = old_and_grown
    reuse = f"precompute.reuse=[{tmp_path / 'shards' / 'train'}]"
    done = refshard("precompute", "--config", config, *overrides, "-o", reuse)
    assert "30 pairs kept; 24 copied from other shards" in done.stdout

    old, grown = rows_by_key(tmp_path / "shards" / "train"), rows_by_key(tmp_path / "grown" / "train")
    assert len(grown) == 30
    for key, row in old.items():
        # Bit for bit, but for the row number, which is that of the new dataset.
        assert {**row, "row": None} == {**grown[key], "row": None}
    assert sorted(row["row"] for row in grown.values()) == list(range(30))
    refshard(
        "precompute", "--config", config, *overrides, "-o", reuse, "-o", f"precompute.output={tmp_path / 'scored'}"
    )
    scored = refshard("precompute", "--config", config, *overrides, "-o", f"precompute.output={tmp_path / 'fresh'}")
    assert "copied" not in scored.stdout
    for key, row in rows_by_key(tmp_path / "fresh" / "train").items():
        assert row["ref_chosen_logps"] == pytest.approx(grown[key]["ref_chosen_logps"], abs=1e-4)


def test_the_reference_is_not_loaded_when_every_pair_is_there(
    old_and_grown: tuple[Path, list[str]], tmp_path: Path
) -> None:
    config, _ = old_and_grown
    subset = write_jsonl(tmp_path / "subset.jsonl", simple_rows(10, start=5))
    arguments = ["-o", f"data.path={subset}", "-o", f"precompute.output={tmp_path / 'subset'}"]
    arguments += ["-o", f"precompute.reuse=[{tmp_path / 'shards' / 'train'}]"]
    done = refshard("precompute", "--config", config, *arguments)
    assert "Loading the reference" not in done.stdout
    assert "10 copied" in done.stdout


def test_a_store_of_another_reference_is_not_copied_from(
    old_and_grown: tuple[Path, list[str]], tmp_path: Path, tokenizer: Any
) -> None:
    config, overrides = old_and_grown
    other = make_model(tmp_path / "other", tokenizer, seed=1)
    reuse = ["-o", f"precompute.reuse=[{tmp_path / 'shards' / 'train'}]"]
    done = refshard("precompute", "--config", config, *overrides, *reuse, "-o", f"policy.model={other}", check=78)
    assert "precompute.reuse" in done.stderr
    assert "reference.weights" in done.stderr
    done = refshard("precompute", "--config", config, *overrides, *reuse, "-o", "precompute.token_logps=false", check=2)
    assert "token logps" in done.stderr


def test_a_damaged_or_missing_store_is_named(old_and_grown: tuple[Path, list[str]], tmp_path: Path) -> None:
    config, overrides = old_and_grown
    store = tmp_path / "shards" / "train"
    content = bytearray((store / "part-00001.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (store / "part-00001.parquet").write_bytes(content)
    done = refshard("precompute", "--config", config, *overrides, "-o", f"precompute.reuse=[{store}]", check=65)
    assert "part-00001.parquet: damaged" in done.stderr
    shutil.rmtree(store)
    done = refshard("precompute", "--config", config, *overrides, "-o", f"precompute.reuse=[{store}]", check=65)
    assert str(store) in done.stderr
