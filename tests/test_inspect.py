"""What `refshard inspect` says of a store, against the same figures computed from the pairs themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import refshard, simple_rows


def test_counts_lengths_and_margins_are_those_of_the_rows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    rows = [*simple_rows(20), *simple_rows(3), {"prompt": "A?", "chosen": " same.", "rejected": " same."}]
    config = make_run(rows=rows)
    refshard("precompute", "--config", config)
    (entry,) = json.loads(refshard("inspect", tmp_path / "shards", "--json").stdout)

    stored = pq.read_table(sorted((tmp_path / "shards" / "train").glob("part-*.parquet"))).to_pylist()
    assert entry["pairs"] == len(stored) == 24
    assert entry["duplicates"] == 3
    assert entry["totals"]["rows"] == 24
    assert entry["totals"]["noted"]["identical"] == 1
    margins = np.array([row["ref_chosen_logps"] - row["ref_rejected_logps"] for row in stored])
    assert entry["reference_margin"]["mean"] == pytest.approx(margins.mean(), abs=1e-4)
    share = ((margins > 0).sum() + 0.5 * (margins == 0).sum()) / 24
    assert entry["reference_margin"]["share_chosen_preferred"] == pytest.approx(share)
    assert entry["tokens"]["prompt"]["total"] == sum(row["prompt_tokens"] for row in stored)
    assert entry["tokens"]["chosen"]["p50"] == np.median([row["chosen_tokens"] for row in stored])
    text = refshard("inspect", tmp_path / "shards" / "train").stdout
    for part in (
        entry["fingerprint"],
        f"{tmp_path / 'pairs.jsonl'} (train)",
        "24 pairs kept",
        "3 are duplicates",
        "margin",
    ):
        assert part in text


def test_an_unfinished_store_is_shown_as_such(make_run: Callable[..., Path], tmp_path: Path) -> None:
    config = make_run()
    refshard("precompute", "--config", config, "--worker", "0/2")
    done = refshard("inspect", tmp_path / "shards", check=75)
    assert "unfinished, 2 parts so far" in done.stderr
    refshard("inspect", tmp_path / "nowhere", check=65)
    refshard("inspect", tmp_path, check=65)
